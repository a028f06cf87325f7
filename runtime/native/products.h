/* Products with weights quantised in blocks: y = x W^T (+ bias), W stored as MatMulNBits stores it.
 *
 * A chunk is 64 weights of 8 bits or 32 of 4 bits, of which a row holds whole blocks' worth. Activations are
 * rounded to 8 bits chunk by chunk, sums within a chunk are exact integers, and one multiplication makes them
 * floats. Weights are read where they lie, once for all tokens: for few tokens row by row (`rows`), for more
 * in tiles of 16 rows that are transposed in registers, so that a sum's 16 lanes are 16 rows (`tile`).
 *
 * Activations of 4-bit products lie in groups of 128, first the 64 even ones, then the 64 odd ones: a byte of
 * weights holds an even one in its low half and the odd one after it in its high half.
 */

enum { GROUP = 64, MOST_CHUNKS = 4096, MOST_TOKENS = 256, FEW_TOKENS = 4 };
enum { AHEAD = 4096 }; /* bytes: the processor's own prefetching ends with every page of memory */
enum { SEGMENT = 16 }; /* chunks whose scales are at hand at once */

typedef struct {
    int64_t N, K, block, chunk, chunks, blocks, groups;
    int bits;
    float unit; /* of the offsets */
} Product;

typedef struct {
    const Product *of;
    int64_t M, rows_in_slice;
    const float *x;
    const uint8_t *weights;
    const uint16_t *scales; /* float16 [N][blocks] */
    const int8_t *offsets;  /* [N][blocks], or NULL */
    const float *bias;      /* [N], or NULL */
    float *y;
    /* activations, made by `quantise` of kernels.h */
    int8_t *a;           /* [M][stride] */
    int32_t *lane_zero;  /* [M][groups][16]: what the weights' zero point adds, negated; for `rows` */
    int32_t *chunk_zero; /* [M][chunks] */
    float *scale, *sum;  /* [M][chunks]: of the integers, and of x itself */
    int64_t stride;
} ProductCall;

static inline float half_to_float(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 31, fraction = half & 1023;
    union { uint32_t bits; float value; } out;
    if (exponent == 0) { /* zero or subnormal */
        out.value = (float)fraction * 5.9604644775390625e-8f;
        out.bits |= sign;
    } else
        out.bits = sign | (exponent == 31 ? 0x7F800000 : (exponent + 112) << 23) | fraction << 13;
    return out.value;
}

/* The rows that one item of a run has: from *n up to *end. */
static inline void slice_of(const ProductCall *c, size_t item, int64_t *n, int64_t *end) {
    *n = (int64_t)item * c->rows_in_slice;
    *end = *n + c->rows_in_slice < c->of->N ? *n + c->rows_in_slice : c->of->N;
}

/* -- without vector instructions of its own ------------------------------------------------------------------ */

static void product_base(void *of, size_t item) {
    const ProductCall *c = of;
    const Product *p = c->of;
    int64_t begin, end;
    slice_of(c, item, &begin, &end);
    int64_t bytes = p->chunk * p->bits / 8, per_block = p->block / p->chunk;
    for (int64_t n = begin; n < end; n++)
        for (int64_t m = 0; m < c->M; m++) {
            float total = c->bias ? c->bias[n] : 0.0f;
            for (int64_t k = 0; k < p->chunks; k++) {
                const uint8_t *w = c->weights + n * p->blocks * per_block * bytes + k * bytes;
                const int8_t *a = c->a + m * c->stride + (p->bits == 8 ? k * 64 : k / 4 * 128 + k % 4 * 16);
                int32_t dot = c->chunk_zero[m * p->chunks + k];
                if (p->bits == 8)
                    for (int i = 0; i < 64; i++) dot += (int32_t)w[i] * a[i];
                else
                    for (int i = 0; i < 16; i++)
                        dot += (int32_t)(w[i] & 15) * a[i] + (int32_t)(w[i] >> 4) * a[i + 64];
                int64_t block = n * p->blocks + k / per_block;
                float scale = half_to_float(c->scales[block]);
                total += (float)dot * c->scale[m * p->chunks + k] * scale;
                if (c->offsets)
                    total += c->sum[m * p->chunks + k] * scale * p->unit * (float)c->offsets[block];
            }
            c->y[m * p->N + n] = total;
        }
}

#ifdef X86

/* -- AVX2 ---------------------------------------------------------------------------------------------------- */

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

/* Products of unsigned by signed bytes, added in pairs, saturate here, so both are widened to 16 bits. */
static void product_avx2(void *of, size_t item) {
    const ProductCall *c = of;
    const Product *p = c->of;
    int64_t begin, end;
    slice_of(c, item, &begin, &end);
    int64_t bytes = p->chunk * p->bits / 8, per_block = p->block / p->chunk;
    const __m128i low = _mm_set1_epi8(15);
    for (int64_t n = begin; n < end; n++) {
        const uint8_t *row = c->weights + n * p->blocks * per_block * bytes;
        for (int64_t m0 = 0; m0 < c->M; m0 += 8) {
            int64_t count = c->M - m0 < 8 ? c->M - m0 : 8;
            __m256 sums[8];
            float rest[8] = {0};
            for (int64_t m = 0; m < 8; m++) sums[m] = _mm256_setzero_ps();
            for (int64_t k = 0; k < p->chunks; k++) {
                const uint8_t *w = row + k * bytes;
                int64_t block = n * p->blocks + k / per_block;
                float scale = _cvtsh_ss(c->scales[block]);
                float shift = c->offsets ? scale * p->unit * (float)c->offsets[block] : 0.0f;
                __m256i wide[4];
                int parts;
                if (p->bits == 8) {
                    parts = 4;
                    for (int i = 0; i < 4; i++)
                        wide[i] = _mm256_sub_epi16(
                            _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i *)(w + 16 * i))),
                            _mm256_set1_epi16(128));
                } else {
                    parts = 2;
                    __m128i both = _mm_loadu_si128((const __m128i *)w), eight = _mm_set1_epi8(8);
                    __m128i even = _mm_sub_epi8(_mm_and_si128(both, low), eight);
                    __m128i odd = _mm_sub_epi8(_mm_and_si128(_mm_srli_epi16(both, 4), low), eight);
                    wide[0] = _mm256_cvtepi8_epi16(even), wide[1] = _mm256_cvtepi8_epi16(odd);
                    wide[2] = wide[3] = _mm256_setzero_si256();
                }
                int64_t at = p->bits == 8 ? k * 64 : k / 4 * 128 + k % 4 * 16, step = p->bits == 8 ? 16 : 64;
                for (int64_t m = 0; m < count; m++) {
                    const int8_t *a = c->a + (m0 + m) * c->stride + at;
                    __m256i dot = _mm256_setzero_si256();
                    for (int i = 0; i < parts; i++)
                        dot = _mm256_add_epi32(
                            dot, _mm256_madd_epi16(wide[i], _mm256_cvtepi8_epi16(_mm_loadu_si128(
                                                                (const __m128i *)(a + i * step)))));
                    float factor = scale * c->scale[(m0 + m) * p->chunks + k];
                    sums[m] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(dot), _mm256_set1_ps(factor), sums[m]);
                    rest[m] += shift * c->sum[(m0 + m) * p->chunks + k];
                }
            }
            for (int64_t m = 0; m < count; m++) {
                __m128 h = _mm_add_ps(_mm256_castps256_ps128(sums[m]), _mm256_extractf128_ps(sums[m], 1));
                h = _mm_add_ps(h, _mm_movehl_ps(h, h));
                float total = _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
                c->y[(m0 + m) * p->N + n] = total + rest[m] + (c->bias ? c->bias[n] : 0.0f);
            }
        }
    }
}

#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(                                                                                \
    __attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c"))),                  \
    apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx512vnni,avx2,fma,f16c")
#endif

/* -- AVX-512 with VNNI --------------------------------------------------------------------------------------- */

#define INLINE static inline __attribute__((always_inline))

/* The scales of chunks k to k + 15 of row n (0 past the last), and what its offsets make of the sums of x. */
INLINE __m512 row_scales(const ProductCall *c, int64_t n, int64_t k, __m512 *shifts) {
    const Product *p = c->of;
    int64_t count = p->chunks - k < SEGMENT ? p->chunks - k : SEGMENT, per_block = p->block / p->chunk;
    const uint16_t *halves = c->scales + n * p->blocks;
    const int8_t *offsets = c->offsets ? c->offsets + n * p->blocks : NULL;
    uint16_t repeated[SEGMENT];
    int8_t repeated_offsets[SEGMENT];
    if (per_block > 1) {
        for (int64_t i = 0; i < count; i++) repeated[i] = halves[(k + i) / per_block];
        for (int64_t i = 0; i < count && offsets; i++) repeated_offsets[i] = offsets[(k + i) / per_block];
        halves = repeated, offsets = offsets ? repeated_offsets : NULL;
    } else {
        halves += k, offsets = offsets ? offsets + k : NULL;
    }
    __mmask16 mask = (__mmask16)((1u << count) - 1);
    __m512 scales = _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, halves));
    if (offsets) {
        __m512 steps = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_maskz_loadu_epi8(mask, offsets)));
        *shifts = _mm512_mul_ps(_mm512_mul_ps(scales, _mm512_set1_ps(p->unit)), steps);
    }
    return scales;
}

/* `count` numbers from `at` on, then zeros */
INLINE __m512 some(const float *at, int64_t count) {
    return _mm512_maskz_loadu_ps(count >= 16 ? (__mmask16)0xFFFF : (__mmask16)((1u << count) - 1), at);
}

/* the bytes of a group of one row that are there */
INLINE __mmask64 group_mask(const Product *p, int64_t g) {
    int64_t bytes = p->chunks * p->chunk * p->bits / 8 - g * 64;
    return bytes >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << bytes) - 1;
}

/* the sum of each of four vectors */
INLINE __m128 sums_of_four(const __m512 *x) {
    __m512 a = _mm512_add_ps(_mm512_unpacklo_ps(x[0], x[1]), _mm512_unpackhi_ps(x[0], x[1]));
    __m512 b = _mm512_add_ps(_mm512_unpacklo_ps(x[2], x[3]), _mm512_unpackhi_ps(x[2], x[3]));
    __m512d lower = _mm512_unpacklo_pd((__m512d)a, (__m512d)b), upper = _mm512_unpackhi_pd((__m512d)a, (__m512d)b);
    __m512 whole = _mm512_add_ps((__m512)lower, (__m512)upper);
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(whole), _mm512_extractf32x8_ps(whole, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
}

/* R rows from n on, times M tokens */
INLINE void rows(const int R, const int M, const int bits, const ProductCall *c, int64_t n) {
    const Product *p = c->of;
    const int64_t bytes = p->blocks * p->block * bits / 8, in_group = bits == 8 ? 1 : 4;
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i fourfold = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
    const uint8_t *w = c->weights + n * bytes;
    __m512 sums[4][4], shifted[4][4];
    float factors[4][4][SEGMENT];
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) sums[r][m] = shifted[r][m] = _mm512_setzero_ps();
    for (int64_t k = 0; k < p->chunks; k += SEGMENT) {
        __m512 scale[4], sum[4];
        for (int m = 0; m < M; m++) {
            scale[m] = some(c->scale + m * p->chunks + k, p->chunks - k);
            sum[m] = c->offsets ? some(c->sum + m * p->chunks + k, p->chunks - k) : _mm512_setzero_ps();
        }
        for (int r = 0; r < R; r++) {
            __m512 shift = _mm512_setzero_ps(), own = row_scales(c, n + r, k, &shift);
            for (int m = 0; m < M; m++) {
                _mm512_storeu_ps(factors[r][m], _mm512_mul_ps(own, scale[m]));
                if (c->offsets) shifted[r][m] = _mm512_fmadd_ps(shift, sum[m], shifted[r][m]);
            }
        }
        int64_t last = k / in_group + SEGMENT / in_group;
        for (int64_t g = k / in_group; g < (last < p->groups ? last : p->groups); g++) {
            __mmask64 mask = bits == 8 ? ~(__mmask64)0 : group_mask(p, g);
            for (int r = 0; r < R; r++) {
                __m512i even, odd;
                _mm_prefetch((const char *)w + r * bytes + g * 64 + AHEAD, _MM_HINT_T0);
                if (bits == 8)
                    even = _mm512_loadu_si512(w + r * bytes + g * 64);
                else {
                    odd = _mm512_maskz_loadu_epi8(mask, w + r * bytes + g * 64);
                    even = _mm512_and_si512(odd, low);
                    odd = _mm512_and_si512(_mm512_srli_epi16(odd, 4), low);
                }
                for (int m = 0; m < M; m++) {
                    const int8_t *a = c->a + m * c->stride + g * (bits == 8 ? 64 : 128);
                    __m512i dot = _mm512_loadu_si512(c->lane_zero + (m * p->groups + g) * 16);
                    dot = _mm512_dpbusd_epi32(dot, even, _mm512_loadu_si512(a));
                    __m512 factor;
                    if (bits == 8)
                        factor = _mm512_set1_ps(factors[r][m][g - k]);
                    else {
                        dot = _mm512_dpbusd_epi32(dot, odd, _mm512_loadu_si512(a + 64));
                        __m128 four = _mm_loadu_ps(factors[r][m] + g * 4 - k);
                        factor = _mm512_permutexvar_ps(fourfold, _mm512_castps128_ps512(four));
                    }
                    sums[r][m] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), factor, sums[r][m]);
                }
            }
        }
    }
    for (int m = 0; m < M; m++) {
        __m512 all[4];
        for (int r = 0; r < 4; r++)
            all[r] = r >= R         ? _mm512_setzero_ps()
                     : c->offsets ? _mm512_add_ps(sums[r][m], shifted[r][m])
                                  : sums[r][m];
        __mmask8 mask = (1 << R) - 1;
        __m128 total = sums_of_four(all);
        if (c->bias) total = _mm_add_ps(total, _mm_maskz_loadu_ps(mask, c->bias + n));
        _mm_mask_storeu_ps(c->y + m * p->N + n, mask, total);
    }
}

/* rows n to end, times M tokens */
INLINE void all_rows(const int M, const int bits, const ProductCall *c, int64_t n, int64_t end) {
    for (; n + 4 <= end; n += 4) rows(4, M, bits, c, n);
    for (; n < end; n++) rows(1, M, bits, c, n);
}

/* 16 registers of 16 numbers, as a matrix, transposed */
INLINE void transpose(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xDD);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xDD);
    }
    for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xDD);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xDD);
    }
}

/* Registers of weights of chunk k of 16 rows (of 4 bits: the even ones, then the odd ones) times the bytes
 * `at` of m tokens from m0 on. */
INLINE void chunk(const int m, const int bits, const ProductCall *c, const __m512i *w, int64_t k, int64_t m0,
                  int64_t at, __m512 scales, __m512 shifts, __m512 *sums) {
    const Product *p = c->of;
    __m512i dots[4];
    for (int i = 0; i < m; i++) dots[i] = _mm512_set1_epi32(c->chunk_zero[(m0 + i) * p->chunks + k]);
    for (int j = 0; j < (bits == 8 ? 16 : 8); j++)
        for (int i = 0; i < m; i++) {
            const int8_t *a = c->a + (m0 + i) * c->stride + at + (bits == 8 || j < 4 ? 4 * j : 48 + 4 * j);
            int32_t four;
            memcpy(&four, a, 4);
            dots[i] = _mm512_dpbusd_epi32(dots[i], w[j], _mm512_set1_epi32(four));
        }
    for (int i = 0; i < m; i++) {
        __m512 factor = _mm512_mul_ps(scales, _mm512_set1_ps(c->scale[(m0 + i) * p->chunks + k]));
        sums[i] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dots[i]), factor, sums[i]);
        if (c->offsets)
            sums[i] = _mm512_fmadd_ps(shifts, _mm512_set1_ps(c->sum[(m0 + i) * p->chunks + k]), sums[i]);
    }
}

/* the same for all tokens of sums [M][16], four at a time */
INLINE void chunk_of_all(const int bits, const ProductCall *c, const __m512i *w, int64_t k, int64_t m0,
                         int64_t M, int64_t at, __m512 scales, __m512 shifts, __m512 *sums) {
    int64_t m = 0;
    for (; m + 4 <= M; m += 4) chunk(4, bits, c, w, k, m0 + m, at, scales, shifts, sums + m);
    for (; m < M; m++) chunk(1, bits, c, w, k, m0 + m, at, scales, shifts, sums + m);
}

/* 16 rows from n on (fewer at the end), times M tokens from m0 on */
INLINE void tile(const int bits, const ProductCall *c, int64_t n, int64_t m0, int64_t M) {
    const Product *p = c->of;
    int64_t bytes = p->blocks * p->block * bits / 8, count = p->N - n < 16 ? p->N - n : 16;
    const __m512i low = _mm512_set1_epi8(15);
    __m512 sums[MOST_TOKENS];
    __m512i scales[SEGMENT], shifts[SEGMENT];
    for (int64_t m = 0; m < M; m++) sums[m] = _mm512_setzero_ps();
    for (int64_t k = 0; k < p->chunks; k++) {
        if (k % SEGMENT == 0) {
            for (int64_t r = 0; r < 16; r++) {
                __m512 shift = _mm512_setzero_ps();
                scales[r] = (__m512i)row_scales(c, n + (r < count ? r : count - 1), k, &shift);
                shifts[r] = (__m512i)shift;
            }
            transpose(scales);
            if (c->offsets) transpose(shifts);
        }
        __m512i w[16];
        int64_t g = bits == 8 ? k : k / 4;
        if (bits == 8 || k % 4 == 0) {
            __mmask64 mask = group_mask(p, g);
            for (int64_t r = 0; r < 16; r++) {
                const uint8_t *row = c->weights + (n + (r < count ? r : count - 1)) * bytes;
                _mm_prefetch((const char *)row + g * 64 + 16 * bytes, _MM_HINT_T0); /* of the next tile */
                w[r] = _mm512_maskz_loadu_epi8(mask, row + g * 64);
            }
            transpose(w);
        }
        __m512 scale = (__m512)scales[k % SEGMENT], shift = (__m512)shifts[k % SEGMENT];
        if (bits == 8)
            chunk_of_all(8, c, w, k, m0, M, g * 64, scale, shift, sums);
        else {
            __m512i halves[8];
            for (int i = 0; i < 4; i++) {
                halves[i] = _mm512_and_si512(w[k % 4 * 4 + i], low);
                halves[i + 4] = _mm512_and_si512(_mm512_srli_epi16(w[k % 4 * 4 + i], 4), low);
            }
            chunk_of_all(4, c, halves, k, m0, M, g * 128 + k % 4 * 16, scale, shift, sums);
        }
    }
    __mmask16 mask = (__mmask16)((1u << count) - 1);
    __m512 bias = c->bias ? _mm512_maskz_loadu_ps(mask, c->bias + n) : _mm512_setzero_ps();
    for (int64_t m = 0; m < M; m++)
        _mm512_mask_storeu_ps(c->y + (m0 + m) * p->N + n, mask, _mm512_add_ps(sums[m], bias));
}

INLINE void product_of_bits(const int bits, const ProductCall *c, int64_t n, int64_t end) {
    switch (c->M) {
    case 1: all_rows(1, bits, c, n, end); break;
    case 2: all_rows(2, bits, c, n, end); break;
    case 3: all_rows(3, bits, c, n, end); break;
    default:
        for (; n < end; n += 16)
            for (int64_t m0 = 0; m0 < c->M; m0 += MOST_TOKENS)
                tile(bits, c, n, m0, c->M - m0 < MOST_TOKENS ? c->M - m0 : MOST_TOKENS);
    }
}

static void product_vnni(void *of, size_t item) {
    const ProductCall *c = of;
    int64_t n, end;
    slice_of(c, item, &n, &end);
    if (c->of->bits == 8)
        product_of_bits(8, c, n, end);
    else
        product_of_bits(4, c, n, end);
}

#undef INLINE
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
