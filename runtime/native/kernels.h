/* The operators for one instruction set. operators.c includes this once for each, with
 *     ISA  a suffix for the names    VW  floats in a vector
 */

#define PASTE2(name, isa) name##_##isa
#define PASTE(name, isa) PASTE2(name, isa)
#define NAME(name) PASTE(name, ISA)

#include "simd.h"

/* -- LawcatAttention ---------------------------------------------------------------------------------------- */

/* number i of a head turns with number i + d/2 */
INLINE void NAME(rotate)(float *out, const float *x, const float *cos, const float *sin, int64_t d) {
    int64_t half = d / 2, i = 0;
    for (; i + VW <= half; i += VW) {
        vf a = NAME(load)(x + i), b = NAME(load)(x + half + i), c = NAME(load)(cos + i), s = NAME(load)(sin + i);
        NAME(save)(out + i, a * c - b * s);
        NAME(save)(out + half + i, b * c + a * s);
    }
    for (; i < half; i++) {
        float a = x[i], b = x[half + i];
        out[i] = a * cos[i] - b * sin[i];
        out[half + i] = b * cos[i] + a * sin[i];
    }
}

/* root mean square norm of one head, with its gains */
INLINE void NAME(norm_head)(float *out, const float *x, const float *gamma, float eps, int64_t d) {
    float scale = 1.0f / sqrtf(NAME(dot)(x, x, d) / (float)d + eps);
    for (int64_t i = 0; i < d; i++) out[i] = x[i] * scale * gamma[i];
}

/* Have the first lines of every page of `count` numbers brought nearer, which are needed soon: what follows the
 * processor then fetches by itself, and faster than it is told to line by line. */
INLINE void NAME(fetch)(const float *at, int64_t count) {
    for (int64_t i = 0; i < count; i += 1024)
        for (int line = 0; line < 3; line++) __builtin_prefetch(at + i + 16 * line, 0, 2);
}

/* One head's q or k [d] of one token out of the packed product, normed where the model does. */
INLINE void NAME(head_of)(float *out, const Attention *a, const float *packed, int64_t column, int64_t norm) {
    if (a->gamma)
        NAME(norm_head)(out, packed + column, a->gamma + norm * a->d, a->norm_eps, a->d);
    else
        memcpy(out, packed + column, (size_t)a->d * sizeof(float));
}

/* Append the keys (rotated) and values of one sequence's T tokens to one head's buffers; with several tokens
 * also the transpose [d][columns] of the keys that any of them sees. `item` numbers sequences and key heads. */
static void NAME(append)(void *of, size_t item) {
    const AttentionCall *c = of;
    const Attention *a = c->layer;
    int64_t d = a->d, b = (int64_t)item / a->G, g = (int64_t)item % a->G, first = c->slots[b] + 1 - c->T;
    int64_t size = c->C * d;
    float *keys = c->key + (int64_t)item * size, *values = c->value + (int64_t)item * size;
    for (int64_t t = 0; t < c->T; t++) {
        const float *packed = c->packed + (b * c->T + t) * c->N;
        int64_t row = c->positions[b * c->T + t] * (d / 2);
        float *key = keys + (first + t) * d, *normed = c->scratch + (int64_t)item * c->item_floats;
        NAME(head_of)(normed, a, packed, (a->H + g) * d, a->H + g);
        NAME(rotate)(key, normed, c->cos + row, c->sin + row, d);
        memcpy(values + (first + t) * d, packed + (a->H + a->G + g) * d, (size_t)d * sizeof(float));
    }
    if (c->transposed) {
        int64_t from = first - a->window + 1 > 0 ? first - a->window + 1 : 0;
        float *into = c->transposed + (int64_t)item * d * c->columns;
        for (int64_t j = from; j < first + c->T; j++)
            for (int64_t i = 0; i < d; i++) into[i * c->columns + j - from] = keys[j * d + i];
    }
}

/* weights of softmax over scores [n], not yet divided by their sum, which is returned */
INLINE float NAME(softmax)(float *scores, int64_t n) {
    NAME(map_exp)(scores, scores, n, NAME(max_of)(scores, n), 1.0f);
    return NAME(sum_of)(scores, n);
}

/* Softmax attention of `m` tokens of one head, from token t0 of the call, over the window: out [m][d], and the
 * sums [m] of weights that are scaled by the largest. q [m][d] is rotated and scaled already. */
static void NAME(window)(const AttentionCall *c, int64_t b, int64_t g, int64_t t0, int64_t m, const float *q,
                         float *scores, float *out, float *sums) {
    const Attention *a = c->layer;
    int64_t d = a->d, first = c->slots[b] + 1 - c->T, slot = first + t0, item = b * a->G + g;
    int64_t from = slot - a->window + 1 > 0 ? slot - a->window + 1 : 0, n = slot + m - from;
    int64_t stride = padded(n);
    const float *keys = c->key + item * c->C * d, *values = c->value + item * c->C * d;
    if (c->transposed) {
        int64_t begin = first - a->window + 1 > 0 ? first - a->window + 1 : 0;
        const float *columns = c->transposed + item * d * c->columns + from - begin;
        NAME(gemm)(m, stride, d, q, d, columns, c->columns, scores, stride); /* the last ones mean nothing */
    } else {
        for (int64_t i = 0; i < m; i++) NAME(dots)(q + i * d, keys + from * d, n, d, scores + i * stride);
    }
    for (int64_t i = 0; i < m; i++) { /* token i sees `window` rows up to its own */
        int64_t end = slot + i - from + 1, begin = end > a->window ? end - a->window : 0;
        float *row = scores + i * stride;
        sums[i] = NAME(softmax)(row + begin, end - begin);
        for (int64_t j = 0; j < begin; j++) row[j] = 0;
        for (int64_t j = end; j < n; j++) row[j] = 0;
    }
    NAME(gemm)(m, d, n, scores, stride, values + from * d, d, out, d);
    for (int64_t i = 0; i < m; i++)
        for (int64_t j = 0; j < d; j++) out[i * d + j] /= sums[i];
}

/* `n` vectors of columns of one token of the recurrence S = decay S + k (x) v, out = q S; with the normaliser
 * z [F], whose value is 1, where that is given. Rows of S and of z are `stride` apart. */
INLINE void NAME(recur_columns)(const int n, float *S, float *z, int64_t stride, const float *q,
                                const float *k, const float *decay, const float *v, float *out,
                                float *normaliser, int64_t F) {
    vf sums[4], value[4];
    float total = 0;
    for (int j = 0; j < n; j++) {
        sums[j] = NAME(all)(0.0f);
        value[j] = NAME(load)(v + j * VW);
    }
    for (int64_t i = 0; i < F; i++) {
        float *row = S + i * stride;
        vf keep = NAME(all)(decay[i]), key = NAME(all)(k[i]), query = NAME(all)(q[i]);
        for (int j = 0; j < n; j++) {
            vf s = NAME(load)(row + j * VW) * keep + key * value[j];
            NAME(save)(row + j * VW, s);
            sums[j] += query * s;
        }
        if (z) {
            float s = z[i * stride] * decay[i] + k[i];
            z[i * stride] = s;
            total += q[i] * s;
        }
    }
    for (int j = 0; j < n; j++) NAME(save)(out + j * VW, sums[j]);
    if (z) *normaliser = total;
}

/* One token of the recurrence; S [F][d+1], the normaliser in the last column, out [d+1]. */
INLINE void NAME(recur)(float *S, const float *q, const float *k, const float *decay, const float *v,
                        float *out, int64_t F, int64_t d) {
    int64_t stride = d + 1, j = 0;
    float *z = S + d; /* goes with the first columns */
    for (; j + 4 * VW <= d; j += 4 * VW, z = NULL)
        NAME(recur_columns)(4, S + j, z, stride, q, k, decay, v + j, out + j, out + d, F);
    for (; j + VW <= d; j += VW, z = NULL)
        NAME(recur_columns)(1, S + j, z, stride, q, k, decay, v + j, out + j, out + d, F);
    if (z) NAME(recur_columns)(0, S, z, stride, q, k, decay, v, out, out + d, F);
    for (; j < d; j++) { /* what fills no vector */
        float total = 0;
        for (int64_t i = 0; i < F; i++) {
            float s = S[i * stride + j] * decay[i] + k[i] * v[j];
            S[i * stride + j] = s;
            total += q[i] * s;
        }
        out[j] = total;
    }
}

/* x [m][d] = the convolution of `rows` [K-1 + m][d] */
INLINE void NAME(convolve)(const Attention *a, const float *taps, const float *rows, float *x, int64_t m) {
    int64_t d = a->d;
    for (int64_t t = 0; t < m; t++) {
        int64_t i = 0;
        for (; i + VW <= d; i += VW) {
            vf total = NAME(all)(0.0f);
            for (int64_t j = 0; j < a->K; j++)
                total += NAME(load)(taps + j * d + i) * NAME(load)(rows + (t + j) * d + i);
            NAME(save)(x + t * d + i, total);
        }
        for (; i < d; i++) {
            x[t * d + i] = 0;
            for (int64_t j = 0; j < a->K; j++) x[t * d + i] += taps[j * d + i] * rows[(t + j) * d + i];
        }
    }
}

/* phi [m][F] = [softmax(x W), softmax(-x W)], x [m][d] */
INLINE void NAME(feature)(const Attention *a, const float *W, const float *x, float *phi, int64_t m) {
    int64_t f = a->f, F = 2 * f;
    NAME(gemm)(m, f, a->d, x, a->d, W, f, phi, F);
    for (int64_t t = 0; t < m; t++) {
        float *plus = phi + t * F, *minus = plus + f;
        for (int64_t i = 0; i < f; i++) minus[i] = -plus[i];
        for (float *half = plus; half <= minus; half += f) {
            float scale = 1.0f / NAME(softmax)(half, f);
            for (int64_t i = 0; i < f; i++) half[i] *= scale;
        }
    }
}

/* All of one query head of one sequence: convolution, feature map, gate, recurrence, window, mix.
 * `item` numbers sequences and heads. */
static void NAME(attend)(void *of, size_t item) {
    const AttentionCall *c = of;
    const Attention *a = c->layer;
    int64_t H = a->H, G = a->G, d = a->d, F = 2 * a->f, K = a->K, past = K - 1;
    int64_t b = (int64_t)item / H, h = (int64_t)item % H, g = h / (H / G);
    int64_t values = (H + G) * d + g * (a->window ? d : d + 1);
    int64_t latent = (H + 2 * G) * d + (a->window ? 1 : G);

    float *at = c->scratch + (int64_t)item * c->item_floats;
    float *rows_q = at, *rows_k = rows_q + (past + c->tile) * d, *x = rows_k + (past + c->tile) * d;
    float *phi_q = x + 2 * c->tile * d, *decay = phi_q + 2 * c->tile * F;
    float *linear = decay + c->tile * F, *near = linear + c->tile * (d + 1), *sums = near + c->tile * d;
    float *scores = sums + c->tile;

    const float *past_q = c->conv_past + (b * 2 * H + h) * d * past, *past_k = past_q + H * d * past;
    for (int64_t i = 0; i < d; i++)
        for (int64_t j = 0; j < past; j++) {
            rows_q[j * d + i] = past_q[i * past + j];
            rows_k[j * d + i] = past_k[i * past + j];
        }
    float *S = c->state + (int64_t)item * F * (d + 1);
    if (c->state_past != c->state)
        memcpy(S, c->state_past + (int64_t)item * F * (d + 1), (size_t)(F * (d + 1)) * sizeof(float));

    NAME(fetch)(S, F * (d + 1));
    for (int64_t t0 = 0; t0 < c->T; t0 += c->tile) {
        int64_t m = c->T - t0 < c->tile ? c->T - t0 : c->tile;
        const float *packed = c->packed + (b * c->T + t0) * c->N;
        for (int64_t t = 0; t < m; t++) {
            float *q = rows_q + (past + t) * d, *k = rows_k + (past + t) * d;
            NAME(head_of)(q, a, packed + t * c->N, h * d, h);
            NAME(head_of)(k, a, packed + t * c->N, (H + g) * d, H + g);
            if (c->positions) {
                int64_t row = c->positions[b * c->T + t0 + t] * (d / 2);
                const float *cos = c->cos + row, *sin = c->sin + row;
                if (a->window) NAME(rotate)(near + t * d, q, cos, sin, d);
                if (a->rope) {
                    NAME(rotate)(x, q, cos, sin, d);
                    memcpy(q, x, (size_t)d * sizeof(float));
                    NAME(rotate)(x, k, cos, sin, d);
                    memcpy(k, x, (size_t)d * sizeof(float));
                }
            }
        }
        NAME(convolve)(a, a->taps + h * K * d, rows_q, x, m);
        NAME(convolve)(a, a->taps + (H + h) * K * d, rows_k, x + m * d, m);
        NAME(feature)(a, a->feature + h * d * a->f, x, phi_q, 2 * m); /* phi_k comes behind phi_q */
        const float *phi_k = phi_q + m * F;

        if (a->window && !c->transposed && (c->B == 1 || h % (H / G) == 0)) { /* what the window sees */
            int64_t from = c->slots[b] - a->window + 1 > 0 ? c->slots[b] - a->window + 1 : 0;
            int64_t begin = ((b * G + g) * c->C + from) * d, count = (c->slots[b] + 1 - from) * d;
            NAME(fetch)(c->key + begin, count);
            NAME(fetch)(c->value + begin, count);
        }
        NAME(gemm)(m, F, a->R, packed + latent, c->N, a->gate + h * F, H * F, decay, F);
        NAME(map_softplus)(decay, decay, m * F, 0.0f, 1.0f);
        NAME(map_exp)(decay, decay, m * F, 0.0f, -1.0f / a->gate_divisor);

        for (int64_t t = 0; t < m; t++)
            NAME(recur)(S, phi_q + t * F, phi_k + t * F, decay + t * F, packed + t * c->N + values,
                        linear + t * (d + 1), F, d);

        float *y = c->out + (b * c->T + t0) * H * d + h * d;
        if (a->window) {
            float scale = 1.0f / sqrtf((float)d);
            for (int64_t i = 0; i < m * d; i++) x[i] = near[i] * scale;
            NAME(window)(c, b, g, t0, m, x, scores, near, sums);
        }
        for (int64_t t = 0; t < m; t++) {
            const float *n = linear + t * (d + 1), *w = near + t * d;
            float *to = y + t * H * d;
            if (a->window) {
                float share = a->window_scale[h] / (a->max_score ? sums[t] : 1.0f);
                float whole = 1.0f / (n[d] * share + (1.0f + a->eps));
                for (int64_t i = 0; i < d; i++) to[i] = (w[i] + n[i] * share) * whole;
            } else {
                float whole = 1.0f / (n[d] + a->eps);
                for (int64_t i = 0; i < d; i++) to[i] = n[i] * whole;
            }
        }
        /* the last rows are the past of the next tile */
        memmove(rows_q, rows_q + m * d, (size_t)(past * d) * sizeof(float));
        memmove(rows_k, rows_k + m * d, (size_t)(past * d) * sizeof(float));
    }
    float *next_q = c->conv + (b * 2 * H + h) * d * past, *next_k = next_q + H * d * past;
    for (int64_t i = 0; i < d; i++)
        for (int64_t j = 0; j < past; j++) {
            next_q[i * past + j] = rows_q[j * d + i];
            next_k[i * past + j] = rows_k[j * d + i];
        }
}

/* -- SwiGlu ------------------------------------------------------------------------------------------------- */

static void NAME(swiglu)(void *of, size_t item) {
    const SwiGluCall *c = of;
    const float *gate = c->x + item * 2 * c->width, *up = gate + c->width;
    float *out = c->out + item * c->width;
    int64_t i = 0;
    for (; i + VW <= (int64_t)c->width; i += VW)
        NAME(save)(out + i, NAME(silu)(NAME(load)(gate + i)) * NAME(load)(up + i));
    for (; i < (int64_t)c->width; i++) out[i] = gate[i] / (1.0f + expf(-gate[i])) * up[i];
}

/* -- BlockProduct ------------------------------------------------------------------------------------------- */

/* One token's activations, rounded chunk by chunk as products.h says. */
static void NAME(quantise)(void *of, size_t item) {
    const ProductCall *c = of;
    const Product *p = c->of;
    int64_t m = (int64_t)item, zero = p->bits == 8 ? 128 : 8;
    const float *x = c->x + m * p->K;
    int8_t *a = c->a + m * c->stride;
    if (p->bits == 4) memset(a, 0, (size_t)c->stride); /* the last group may not be full */
    for (int64_t k = 0; k < p->chunks; k++) {
        int64_t begin = k * p->chunk, count = p->K - begin < p->chunk ? p->K - begin : p->chunk;
        if (count < 0) count = 0; /* the last block may be mostly padding */
        float values[GROUP] = {0}, sizes[GROUP];
        int32_t whole[GROUP], total = 0;
        memcpy(values, x + begin, (size_t)count * sizeof(float));
        for (int i = 0; i < GROUP; i++) sizes[i] = fabsf(values[i]);
        float most = NAME(max_of)(sizes, GROUP), sum = NAME(sum_of)(values, GROUP);
        int finite = isfinite(most) && isfinite(sum); /* else the scale is NaN, and all that comes of it */
        vf inverse = NAME(all)(most > 0 ? 127.0f / most : 0.0f), magic = NAME(all)(12582912.0f);
        for (int i = 0; i < GROUP; i += VW)
            *(vi *)(whole + i) = (vi)(NAME(load)(values + i) * inverse + magic) - 0x4B400000;
        if (!finite) memset(whole, 0, sizeof whole);
        for (int i = 0; i < GROUP; i++) total += whole[i];
        if (p->bits == 8)
            for (int i = 0; i < GROUP; i++) a[begin + i] = (int8_t)whole[i];
        else {
            int8_t *group = a + k / 4 * 128 + k % 4 * 16;
            for (int i = 0; i < 16; i++) {
                group[i] = (int8_t)whole[2 * i];
                group[i + 64] = (int8_t)whole[2 * i + 1];
            }
        }
        c->scale[m * p->chunks + k] = finite ? most / 127.0f : NAN;
        c->sum[m * p->chunks + k] = sum;
        c->chunk_zero[m * p->chunks + k] = (int32_t)-zero * total;
    }
    if (!c->lane_zero) return;
    int32_t *lanes = c->lane_zero + m * p->groups * 16;
    for (int64_t g = 0; g < p->groups; g++)
        for (int64_t lane = 0; lane < 16; lane++) {
            const int8_t *even = a + g * (p->bits == 8 ? 64 : 128) + 4 * lane, *odd = even + 64;
            int32_t total = even[0] + even[1] + even[2] + even[3];
            if (p->bits == 4) total += odd[0] + odd[1] + odd[2] + odd[3];
            lanes[g * 16 + lane] = (int32_t)-zero * total;
        }
}

static const Kernels NAME(kernels) = {NAME(append), NAME(attend), NAME(swiglu), NAME(quantise)};

#undef vf
#undef vi
#undef INLINE
#undef NAME
#undef PASTE
#undef PASTE2
