/* Vectors of VW floats, for one instruction set: included by kernels.h, which says which.
 *
 * The vector types are those of GCC and Clang: arithmetic is written as for numbers, and the same text becomes
 * AVX-512, AVX2, NEON or SSE. All loads may be unaligned.
 */

typedef float NAME(vf) __attribute__((vector_size(VW * 4), aligned(4), may_alias));
typedef int32_t NAME(vi) __attribute__((vector_size(VW * 4), aligned(4), may_alias));

#define vf NAME(vf)
#define vi NAME(vi)
#define INLINE static inline __attribute__((always_inline, unused))

INLINE vf NAME(load)(const float *at) { return *(const vf *)at; }
INLINE void NAME(save)(float *at, vf x) { *(vf *)at = x; }
INLINE vf NAME(all)(float x) { return x - (vf){0}; }

/* where a bit of mask is set, a, else b; comparisons give such masks */
INLINE vf NAME(choose)(vi mask, vf a, vf b) { return (vf)((mask & (vi)a) | (~mask & (vi)b)); }

INLINE float NAME(sum)(vf x) {
#if VW == 16
    return _mm512_reduce_add_ps((__m512)x);
#elif VW == 8
    __m256 y = (__m256)x;
    __m128 h = _mm_add_ps(_mm256_castps256_ps128(y), _mm256_extractf128_ps(y, 1));
    h = _mm_add_ps(h, _mm_movehl_ps(h, h));
    return _mm_cvtss_f32(_mm_add_ss(h, _mm_shuffle_ps(h, h, 1)));
#elif defined(__aarch64__)
    return vaddvq_f32((float32x4_t)x);
#else
    float total = 0;
    for (int i = 0; i < VW; i++) total += x[i];
    return total;
#endif
}

INLINE float NAME(top)(vf x) {
    float most = x[0];
    for (int i = 1; i < VW; i++) most = x[i] > most ? x[i] : most;
    return most;
}

/* the sums of four vectors */
INLINE void NAME(four_sums)(const vf *x, float *out) {
#if VW == 16
    __m512 a = _mm512_add_ps(_mm512_unpacklo_ps((__m512)x[0], (__m512)x[1]),
                             _mm512_unpackhi_ps((__m512)x[0], (__m512)x[1]));
    __m512 b = _mm512_add_ps(_mm512_unpacklo_ps((__m512)x[2], (__m512)x[3]),
                             _mm512_unpackhi_ps((__m512)x[2], (__m512)x[3]));
    __m512 c = _mm512_add_ps((__m512)_mm512_unpacklo_pd((__m512d)a, (__m512d)b),
                             (__m512)_mm512_unpackhi_pd((__m512d)a, (__m512d)b));
    __m256 half = _mm256_add_ps(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#elif VW == 8
    __m256 a = _mm256_hadd_ps((__m256)x[0], (__m256)x[1]), b = _mm256_hadd_ps((__m256)x[2], (__m256)x[3]);
    a = _mm256_hadd_ps(a, b);
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1)));
#else
    for (int i = 0; i < 4; i++) out[i] = NAME(sum)(x[i]);
#endif
}

/* e^x within 2 units in the last place; below -87.3 about 1e-38, NaN stays NaN.
 * Range reduction and polynomial of Moshier's Cephes library (expf). */
INLINE vf NAME(exp)(vf x) {
    const vf low = NAME(all)(-87.3f), high = NAME(all)(88.3f), magic = NAME(all)(12582912.0f);
    x = NAME(choose)(x < low, low, x);
    x = NAME(choose)(x > high, high, x);
    vf shifted = x * 1.44269504088896341f + magic; /* the whole number lies in the low bits */
    vi power = (vi)shifted - 0x4B400000;
    vf n = shifted - magic;
    vf r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf p = NAME(all)(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    return p * (vf)((power + 127) << 23);
}

/* log(1 + e) for e in [0, 1], of full relative accuracy near 0; polynomial of Cephes (logf). */
INLINE vf NAME(log1p)(vf e) {
    vi upper = e > NAME(all)(0.41421356f);
    vf z = NAME(choose)(upper, (e - 1.0f) * 0.5f, e);
    vf p = NAME(all)(7.0376836292e-2f);
    p = p * z - 1.1514610310e-1f;
    p = p * z + 1.1676998740e-1f;
    p = p * z - 1.2420140846e-1f;
    p = p * z + 1.4249322787e-1f;
    p = p * z - 1.6668057665e-1f;
    p = p * z + 2.0000714765e-1f;
    p = p * z - 2.4999993993e-1f;
    p = p * z + 3.3333331174e-1f;
    vf square = z * z;
    vf log = z + (p * z * square - 0.5f * square);
    return log + NAME(choose)(upper, NAME(all)(0.69314718056f), NAME(all)(0.0f));
}

/* log(1 + e^x) for any x */
INLINE vf NAME(softplus)(vf x) {
    vf zero = NAME(all)(0.0f), size = NAME(choose)(x < zero, -x, x);
    return NAME(choose)(x < zero, zero, x) + NAME(log1p)(NAME(exp)(-size));
}

/* x / (1 + e^-x) */
INLINE vf NAME(silu)(vf x) { return x / (1.0f + NAME(exp)(-x)); }

/* `count` numbers through one of the functions above; the last ones in a vector that is not full */
#define MAP(name, function)                                                                                  \
    INLINE void NAME(name)(float *out, const float *x, int64_t count, float before, float after) {           \
        int64_t i = 0;                                                                                       \
        for (; i + VW <= count; i += VW) NAME(save)(out + i, function((NAME(load)(x + i) - before) * after));  \
        if (i < count) {                                                                                     \
            float rest[VW] = {0};                                                                            \
            memcpy(rest, x + i, (size_t)(count - i) * sizeof(float));                                        \
            NAME(save)(rest, function((NAME(load)(rest) - before) * after));                                   \
            memcpy(out + i, rest, (size_t)(count - i) * sizeof(float));                                      \
        }                                                                                                    \
    }
MAP(map_exp, NAME(exp))
MAP(map_softplus, NAME(softplus))
#undef MAP

INLINE float NAME(max_of)(const float *x, int64_t count) {
    float most = x[0];
    int64_t i = 0;
    if (count >= VW) {
        vf m = NAME(load)(x);
        for (i = VW; i + VW <= count; i += VW) {
            vf y = NAME(load)(x + i);
            m = NAME(choose)(y > m, y, m);
        }
        most = NAME(top)(m);
    }
    for (; i < count; i++) most = x[i] > most ? x[i] : most;
    return most;
}

INLINE float NAME(sum_of)(const float *x, int64_t count) {
    vf s = NAME(all)(0.0f);
    int64_t i = 0;
    for (; i + VW <= count; i += VW) s += NAME(load)(x + i);
    float total = NAME(sum)(s);
    for (; i < count; i++) total += x[i];
    return total;
}

INLINE float NAME(dot)(const float *x, const float *y, int64_t count) {
    vf s = NAME(all)(0.0f);
    int64_t i = 0;
    for (; i + VW <= count; i += VW) s += NAME(load)(x + i) * NAME(load)(y + i);
    float total = NAME(sum)(s);
    for (; i < count; i++) total += x[i] * y[i];
    return total;
}

/* out [n] = the rows of Y [n][d] times x [d] */
INLINE void NAME(dots)(const float *x, const float *Y, int64_t n, int64_t d, float *out) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        const float *y = Y + j * d;
        vf s[4] = {NAME(all)(0.0f), NAME(all)(0.0f), NAME(all)(0.0f), NAME(all)(0.0f)};
        int64_t i = 0;
        for (; i + VW <= d; i += VW) {
            vf a = NAME(load)(x + i);
            for (int r = 0; r < 4; r++) s[r] += a * NAME(load)(y + r * d + i);
        }
        NAME(four_sums)(s, out + j);
        for (; i < d; i++)
            for (int r = 0; r < 4; r++) out[j + r] += x[i] * y[r * d + i];
    }
    for (; j < n; j++) out[j] = NAME(dot)(x, Y + j * d, d);
}

/* rows x [m][K] of stride lda times B [K][m' vectors] of stride ldb: a tile of m rows and n vectors */
INLINE void NAME(tile)(const int m, const int n, int64_t K, const float *A, int64_t lda, const float *B,
                       int64_t ldb, float *C, int64_t ldc) {
    vf sums[4][4];
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) sums[i][j] = NAME(all)(0.0f);
    for (int64_t k = 0; k < K; k++) {
        vf b[4];
        for (int j = 0; j < n; j++) b[j] = NAME(load)(B + k * ldb + j * VW);
        for (int i = 0; i < m; i++) {
            vf a = NAME(all)(A[i * lda + k]);
            for (int j = 0; j < n; j++) sums[i][j] += a * b[j];
        }
    }
    for (int i = 0; i < m; i++)
        for (int j = 0; j < n; j++) NAME(save)(C + i * ldc + j * VW, sums[i][j]);
}

/* the same for one row, whose sums run in two halves so as not to wait for each other */
INLINE void NAME(row_tile)(const int n, int64_t K, const float *A, const float *B, int64_t ldb, float *C) {
    vf even[4], odd[4];
    for (int j = 0; j < n; j++) even[j] = odd[j] = NAME(all)(0.0f);
    int64_t k = 0;
    for (; k + 2 <= K; k += 2) {
        vf a = NAME(all)(A[k]), b = NAME(all)(A[k + 1]);
        for (int j = 0; j < n; j++) even[j] += a * NAME(load)(B + k * ldb + j * VW);
        for (int j = 0; j < n; j++) odd[j] += b * NAME(load)(B + (k + 1) * ldb + j * VW);
    }
    for (; k < K; k++)
        for (int j = 0; j < n; j++) even[j] += NAME(all)(A[k]) * NAME(load)(B + k * ldb + j * VW);
    for (int j = 0; j < n; j++) NAME(save)(C + j * VW, even[j] + odd[j]);
}

/* C [M][N] = A [M][K] B [K][N], each with a stride of its own */
static __attribute__((unused)) void NAME(gemm)(int64_t M, int64_t N, int64_t K, const float *A, int64_t lda,
                                               const float *B, int64_t ldb, float *C, int64_t ldc) {
    int64_t i = 0;
    for (; i + 4 <= M; i += 4) {
        const float *a = A + i * lda;
        float *c = C + i * ldc;
        int64_t j = 0;
        for (; j + 2 * VW <= N; j += 2 * VW) NAME(tile)(4, 2, K, a, lda, B + j, ldb, c + j, ldc);
        for (; j + VW <= N; j += VW) NAME(tile)(4, 1, K, a, lda, B + j, ldb, c + j, ldc);
    }
    for (; i + 2 <= M; i += 2) {
        const float *a = A + i * lda;
        float *c = C + i * ldc;
        int64_t j = 0;
        for (; j + 2 * VW <= N; j += 2 * VW) NAME(tile)(2, 2, K, a, lda, B + j, ldb, c + j, ldc);
        for (; j + VW <= N; j += VW) NAME(tile)(2, 1, K, a, lda, B + j, ldb, c + j, ldc);
    }
    for (; i < M; i++) {
        const float *a = A + i * lda;
        float *c = C + i * ldc;
        int64_t j = 0;
        for (; j + 4 * VW <= N; j += 4 * VW) NAME(row_tile)(4, K, a, B + j, ldb, c + j);
        for (; j + 2 * VW <= N; j += 2 * VW) NAME(row_tile)(2, K, a, B + j, ldb, c + j);
        for (; j + VW <= N; j += VW) NAME(row_tile)(1, K, a, B + j, ldb, c + j);
    }
    for (int64_t j = N - N % VW; j < N; j++) /* columns that fill no vector */
        for (i = 0; i < M; i++) {
            float total = 0;
            for (int64_t k = 0; k < K; k++) total += A[i * lda + k] * B[k * ldb + j];
            C[i * ldc + j] = total;
        }
}
