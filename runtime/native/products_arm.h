/* Products with weights in blocks (products.h) on aarch64 with the dot-product extension: sdot adds four
 * products of signed bytes to each of four sums.
 *
 * Weights of 8 bits less their zero point are signed bytes. Those of 4 bits are taken as they are, and sums of a
 * chunk begin with what the zero point adds, negated, which costs less than to subtract it from each.
 */

#if defined(__clang__) && !defined(__ARM_FEATURE_DOTPROD)
#define __ARM_FEATURE_DOTPROD 1 /* or else Clang before 16 hides vdotq_s32, even from functions that may use it */
#endif
#include <arm_neon.h>

#if defined(__linux__)
#include <sys/auxv.h>
#ifndef HWCAP_ASIMDDP
#define HWCAP_ASIMDDP (1 << 20)
#endif
#endif

/* Whether this processor has the extension; every one of Apple's that runs macOS has. */
static int has_dot(void) {
#if defined(__linux__)
    return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#elif defined(__APPLE__)
    return 1;
#else
    return 0;
#endif
}

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("dotprod"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("arch=armv8.2-a+dotprod")
#endif

#define INLINE static inline __attribute__((always_inline))

/* GCC leaves loops over rows as loops, and what they hold in memory, unless it is told; Clang does not. */
#if defined(__clang__)
#define UNROLL
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

/* -- few tokens: row by row ---------------------------------------------------------------------------------- */

/* The scales [SEGMENT] of chunks k to k + count - 1 of row n, then zeros, and what its offsets make of the sums
 * of x. */
static void row_scales(const ProductCall *c, int64_t n, int64_t k, int64_t count, float *scales, float *shifts) {
    const Product *p = c->of;
    int64_t per_block = p->block / p->chunk, block = n * p->blocks + k / per_block, in_block = k % per_block;
    uint16_t halves[SEGMENT] = {0};
    float steps[SEGMENT] = {0};
    if (per_block == 1 && count == SEGMENT) { /* most of all */
        memcpy(halves, c->scales + block, sizeof halves);
        for (int i = 0; i < SEGMENT && c->offsets; i++) steps[i] = (float)c->offsets[block + i] * p->unit;
        count = 0;
    }
    for (int64_t i = 0; i < count; i++) {
        halves[i] = c->scales[block];
        if (c->offsets) steps[i] = (float)c->offsets[block] * p->unit;
        if (++in_block == per_block) block++, in_block = 0;
    }
    for (int i = 0; i < SEGMENT; i += 4) {
        float32x4_t four = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves + i)));
        vst1q_f32(scales + i, four);
        vst1q_f32(shifts + i, vmulq_f32(four, vld1q_f32(steps + i)));
    }
}

/* The numbers [SEGMENT] at `at`; where there are only `count`, these and zeros behind them, in `room`. */
INLINE const float *segment(const float *at, int64_t count, float *room) {
    if (count == SEGMENT) return at;
    memset(room, 0, SEGMENT * sizeof *room);
    return memcpy(room, at, (size_t)count * sizeof *room);
}

/* Chunks k to k + count - 1, at most four, of R rows from n on, times M tokens: added to sums, of which every
 * lane is another chunk. Their factors stand at `factors`. */
INLINE void four_chunks(const int R, const int M, const int bits, const ProductCall *c, int64_t n, int64_t k,
                        const int64_t count, float factors[4][3][SEGMENT], float32x4_t sums[4][3]) {
    const Product *p = c->of;
    const int64_t bytes = p->blocks * p->block * bits / 8, chunk = bits == 8 ? 64 : 16;
    const int8_t *a = c->a + (bits == 8 ? k * 64 : k / 4 * 128);
    int32x4_t zeros[3];
    UNROLL for (int m = 0; m < M && bits == 4; m++) {
        int32_t zero[4] = {0};
        const int32_t *at = c->chunk_zero + m * p->chunks + k;
        if (count < 4) at = memcpy(zero, at, (size_t)count * sizeof *zero);
        zeros[m] = vld1q_s32(at);
    }
    UNROLL for (int r = 0; r < R; r++) {
        const uint8_t *w = c->weights + (n + r) * bytes + k * chunk;
        int32x4_t dots[3][4];
        UNROLL for (int i = 0; i < 4; i++) {
            UNROLL for (int m = 0; m < M; m++) dots[m][i] = vdupq_n_s32(0);
            if (i >= count) continue;
            if (bits == 8 || i == 0) __builtin_prefetch(w + i * chunk + AHEAD);
            if (bits == 8) {
                UNROLL for (int j = 0; j < 4; j++) {
                    uint8x16_t stored = vld1q_u8(w + i * 64 + j * 16);
                    int8x16_t part = vreinterpretq_s8_u8(veorq_u8(stored, vdupq_n_u8(0x80)));
                    UNROLL for (int m = 0; m < M; m++)
                        dots[m][i] = vdotq_s32(dots[m][i], part, vld1q_s8(a + m * c->stride + i * 64 + j * 16));
                }
            } else {
                uint8x16_t both = vld1q_u8(w + i * 16);
                int8x16_t even = vreinterpretq_s8_u8(vandq_u8(both, vdupq_n_u8(15)));
                int8x16_t odd = vreinterpretq_s8_u8(vshrq_n_u8(both, 4));
                UNROLL for (int m = 0; m < M; m++) {
                    dots[m][i] = vdotq_s32(dots[m][i], even, vld1q_s8(a + m * c->stride + i * 16));
                    dots[m][i] = vdotq_s32(dots[m][i], odd, vld1q_s8(a + m * c->stride + i * 16 + 64));
                }
            }
        }
        UNROLL for (int m = 0; m < M; m++) {
            int32x4_t dot = vpaddq_s32(vpaddq_s32(dots[m][0], dots[m][1]), vpaddq_s32(dots[m][2], dots[m][3]));
            if (bits == 4) dot = vaddq_s32(dot, zeros[m]);
            sums[r][m] = vfmaq_f32(sums[r][m], vcvtq_f32_s32(dot), vld1q_f32(factors[r][m] + k % SEGMENT));
        }
    }
}

/* R rows from n on, times M tokens */
INLINE void rows(const int R, const int M, const int bits, const ProductCall *c, int64_t n) {
    const Product *p = c->of;
    float32x4_t sums[4][3];
    float factors[4][3][SEGMENT];
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int m = 0; m < M; m++) sums[r][m] = vdupq_n_f32(0);
    }
    for (int64_t begin = 0; begin < p->chunks; begin += SEGMENT) {
        int64_t count = p->chunks - begin < SEGMENT ? p->chunks - begin : SEGMENT, k = begin;
        UNROLL for (int r = 0; r < R; r++) {
            float scales[SEGMENT], shifts[SEGMENT], room[SEGMENT];
            row_scales(c, n + r, begin, count, scales, shifts);
            UNROLL for (int m = 0; m < M; m++) {
                const float *x = segment(c->scale + m * p->chunks + begin, count, room);
                for (int i = 0; i < SEGMENT; i++) factors[r][m][i] = scales[i] * x[i];
                if (!c->offsets) continue;
                x = segment(c->sum + m * p->chunks + begin, count, room);
                for (int i = 0; i < SEGMENT; i += 4)
                    sums[r][m] = vfmaq_f32(sums[r][m], vld1q_f32(shifts + i), vld1q_f32(x + i));
            }
        }
        for (; k + 4 <= begin + count; k += 4) four_chunks(R, M, bits, c, n, k, 4, factors, sums);
        if (k < begin + count) four_chunks(R, M, bits, c, n, k, begin + count - k, factors, sums);
    }
    UNROLL for (int r = 0; r < R; r++) {
        UNROLL for (int m = 0; m < M; m++)
            c->y[m * p->N + n + r] = vaddvq_f32(sums[r][m]) + (c->bias ? c->bias[n + r] : 0.0f);
    }
}

/* rows n to end, R at a time, times M tokens */
INLINE void all_rows(const int R, const int M, const int bits, const ProductCall *c, int64_t n, int64_t end) {
    for (; n + R <= end; n += R) rows(R, M, bits, c, n);
    for (; n < end; n++) rows(1, M, bits, c, n);
}

/* -- more tokens: four rows at a time ------------------------------------------------------------------------ */

/* four registers of four times four bytes, as a matrix, transposed */
INLINE void transpose(uint8x16_t *r) {
    uint32x4_t a = vreinterpretq_u32_u8(r[0]), b = vreinterpretq_u32_u8(r[1]);
    uint32x4_t c = vreinterpretq_u32_u8(r[2]), d = vreinterpretq_u32_u8(r[3]);
    uint64x2_t ab = vreinterpretq_u64_u32(vtrn1q_u32(a, b)), cd = vreinterpretq_u64_u32(vtrn1q_u32(c, d));
    r[0] = vreinterpretq_u8_u64(vtrn1q_u64(ab, cd));
    r[2] = vreinterpretq_u8_u64(vtrn2q_u64(ab, cd));
    ab = vreinterpretq_u64_u32(vtrn2q_u32(a, b)), cd = vreinterpretq_u64_u32(vtrn2q_u32(c, d));
    r[1] = vreinterpretq_u8_u64(vtrn1q_u64(ab, cd));
    r[3] = vreinterpretq_u8_u64(vtrn2q_u64(ab, cd));
}

/* 16 weights of each of four rows, transposed, times the same 16 activations of M tokens: every lane is a row */
INLINE void sixteen(const int M, const uint8x16_t *w, const int8_t *a, int64_t stride, int32x4_t *dots) {
    UNROLL for (int m = 0; m < M; m++) {
        int8x16_t x = vld1q_s8(a + m * stride);
        dots[m] = vdotq_laneq_s32(dots[m], vreinterpretq_s8_u8(w[0]), x, 0);
        dots[m] = vdotq_laneq_s32(dots[m], vreinterpretq_s8_u8(w[1]), x, 1);
        dots[m] = vdotq_laneq_s32(dots[m], vreinterpretq_s8_u8(w[2]), x, 2);
        dots[m] = vdotq_laneq_s32(dots[m], vreinterpretq_s8_u8(w[3]), x, 3);
    }
}

/* four rows from n on (fewer at the end), times M tokens from m0 on */
INLINE void tile(const int M, const int bits, const ProductCall *c, int64_t n, int64_t m0) {
    const Product *p = c->of;
    const int64_t bytes = p->blocks * p->block * bits / 8, count = p->N - n < 4 ? p->N - n : 4;
    int64_t row[4], per_block = p->block / p->chunk, block = 0, in_block = 0;
    UNROLL for (int r = 0; r < 4; r++) row[r] = n + (r < count ? r : count - 1);
    float32x4_t sums[8], scales = vdupq_n_f32(0), shifts = scales;
    UNROLL for (int m = 0; m < M; m++) sums[m] = vdupq_n_f32(0);
    for (int64_t k = 0; k < p->chunks; k++) {
        if (in_block == 0) {
            uint16_t halves[4];
            UNROLL for (int r = 0; r < 4; r++) halves[r] = c->scales[row[r] * p->blocks + block];
            scales = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(halves)));
            if (c->offsets) {
                float steps[4];
                UNROLL for (int r = 0; r < 4; r++) steps[r] = (float)c->offsets[row[r] * p->blocks + block];
                shifts = vmulq_f32(vmulq_n_f32(scales, p->unit), vld1q_f32(steps));
            }
        }
        if (++in_block == per_block) in_block = 0, block++;

        const int8_t *a = c->a + m0 * c->stride + (bits == 8 ? k * 64 : k / 4 * 128 + k % 4 * 16);
        int32x4_t dots[8];
        UNROLL for (int m = 0; m < M; m++)
            dots[m] = vdupq_n_s32(bits == 8 ? 0 : c->chunk_zero[(m0 + m) * p->chunks + k]);
        for (int i = 0; i < (bits == 8 ? 4 : 1); i++) {
            uint8x16_t w[4], odd[4];
            UNROLL for (int r = 0; r < 4; r++) {
                const uint8_t *at = c->weights + row[r] * bytes + (bits == 8 ? k * 64 + i * 16 : k * 16);
                if (i == 0 && (bits == 8 || k % 4 == 0)) __builtin_prefetch(at + AHEAD);
                w[r] = vld1q_u8(at);
            }
            transpose(w);
            UNROLL for (int r = 0; r < 4; r++) {
                odd[r] = vshrq_n_u8(w[r], 4);
                w[r] = bits == 8 ? veorq_u8(w[r], vdupq_n_u8(0x80)) : vandq_u8(w[r], vdupq_n_u8(15));
            }
            sixteen(M, w, a + i * 16, c->stride, dots);
            if (bits == 4) sixteen(M, odd, a + 64, c->stride, dots);
        }
        UNROLL for (int m = 0; m < M; m++) {
            const int64_t at = (m0 + m) * p->chunks + k;
            sums[m] = vfmaq_f32(sums[m], vcvtq_f32_s32(dots[m]), vmulq_n_f32(scales, c->scale[at]));
            if (c->offsets) sums[m] = vfmaq_n_f32(sums[m], shifts, c->sum[at]);
        }
    }
    UNROLL for (int m = 0; m < M; m++) {
        float *y = c->y + (m0 + m) * p->N + n, four[4];
        vst1q_f32(four, sums[m]);
        for (int64_t r = 0; r < count; r++) y[r] = four[r] + (c->bias ? c->bias[n + r] : 0.0f);
    }
}

/* rows n to end, times tokens m0 to m0 + M - 1, whose activations stay near meanwhile */
INLINE void all_tiles(const int M, const int bits, const ProductCall *c, int64_t n, int64_t end, int64_t m0) {
    for (; n < end; n += 4) tile(M, bits, c, n, m0);
}

INLINE void product_of_bits(const int bits, const ProductCall *c, int64_t n, int64_t end) {
    int64_t m = 0;
    switch (c->M) {
    case 1: all_rows(4, 1, bits, c, n, end); return;
    case 2: all_rows(2, 2, bits, c, n, end); return;
    case 3: all_rows(2, 3, bits, c, n, end); return;
    }
    for (; m + 8 <= c->M; m += 8) all_tiles(8, bits, c, n, end, m);
    for (; m + 4 <= c->M; m += 4) all_tiles(4, bits, c, n, end, m);
    for (; m < c->M; m++) all_tiles(1, bits, c, n, end, m);
}

static void product_dot(void *of, size_t item) {
    const ProductCall *c = of;
    int64_t n, end;
    slice_of(c, item, &n, &end);
    if (c->of->bits == 8)
        product_of_bits(8, c, n, end);
    else
        product_of_bits(4, c, n, end);
}

#undef UNROLL
#undef INLINE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
