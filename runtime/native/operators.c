/* lawcat-edge's own operators for onnxruntime on CPUs, domain "lawcat_edge", version 1.
 *
 * LawcatAttention: all of a linear-attention layer between its fused input product and its output product, in
 * one node: convolution, feature map, gate, the normalised gated linear recurrence, the softmax window and the
 * mix of both. The equations are those of lawcat_edge/attention.py; what is stored how, those of
 * export/step.py. From operators of onnxruntime the same takes 25 nodes, whose start takes longer than their
 * work when a single token is read.
 *
 *   packed [B,T,N]      q [H d], k [G d], v [G d], 1, latent [R]; without a window v is [G (d+1)], each head
 *                       with a 1 of its own, and there is no other
 *   conv_taps [2 H d,1,K], feature [H,2,f,d] (W, then -W, which is not read), gate_b [R,H F], F = 2 f
 *   window_scale [H,1]  with a window
 *   qk_gamma [H+G,d]    where q and k are normed by head
 *   conv_state [B,2 H d,K-1], recurrent_state [B,H,F,d+1]
 *   key, value [B,G,C,d], seqlens_k [B]      with a window: the slot of the last token in its buffers
 *   cos_cache, sin_cache [R',d/2], position_ids [B,T]      with a window or rope: rows of these tables
 *   -> y [B,T,H d], conv_state, recurrent_state, key, value after the tokens, which may be the same memory
 *
 * BlockProduct: x [B,T,K] times the transpose of weights that are quantised in blocks along K (products.h).
 *   weights [N,blocks,block bits / 8] uint8 with the zero point 128 or 8, as MatMulNBits has them; scales
 *   [N,blocks] float16; offsets [N,blocks] int8 (of 4 bits: what a block's values lie off, in `offset_unit`s
 *   of its scale); bias [N] -> [B,T,N]
 *
 * SwiGlu: x [..,2 I] -> silu(x[.., :I]) * x[.., I:]
 *
 * Whatever is run is checked first: a size that does not fit ends in an error message.
 */

#include <math.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#define X86 1
#endif

#include "third_party/onnxruntime_c_api.h"

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

enum { LONGEST_TILE = 32, LEAST_TRANSPOSED = 8 };

static const OrtApi *api;

/* -- what the kernels are given ------------------------------------------------------------------------------ */

/* A layer: its sizes and its weights, as the kernels read them. */
typedef struct {
    int64_t H, G, d, f, K, R, window;
    int max_score, rope;
    float gate_divisor, eps, norm_eps;
    float *taps;         /* [2 H][K][d] */
    float *feature;      /* [H][d][f] */
    float *gate;         /* [R][H F] */
    float *window_scale; /* [H], or NULL */
    float *gamma;        /* [H+G][d], or NULL */
} Attention;

/* One run of it. */
typedef struct {
    const Attention *layer;
    int64_t B, T, N, C, tile;
    const float *packed, *conv_past, *state_past, *cos, *sin;
    const int64_t *positions;
    const int32_t *slots;
    float *out, *conv, *state, *key, *value;
    float *transposed; /* [B G][d][columns]: keys of several tokens, or NULL */
    int64_t columns;
    float *scratch; /* item_floats for each item */
    int64_t item_floats;
} AttentionCall;

typedef struct {
    const float *x;
    float *out;
    size_t width;
} SwiGluCall;

/* Each does one item of a run. */
typedef struct {
    void (*append)(void *, size_t);
    void (*attend)(void *, size_t);
    void (*swiglu)(void *, size_t);
    void (*quantise)(void *, size_t);
} Kernels;

/* Room for full vectors of any width. */
static inline int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

#include "products.h"

#define ISA base
#define VW 4
#include "kernels.h"
#undef ISA
#undef VW

#ifdef X86
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define ISA avx2
#define VW 8
#include "kernels.h"
#undef ISA
#undef VW
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512dq,avx512bw,avx512vl,avx2,fma")
#endif
#define ISA avx512
#define VW 16
#include "kernels.h"
#undef ISA
#undef VW
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

static const Kernels *kernels = &kernels_base;
static void (*product)(void *, size_t) = product_base;
static int lanes_matter = 0; /* whether `product` reads lane_zero */

/* The best that this processor has; LAWCAT_EDGE_ISA=base, avx2 or avx512 asks for less, for tests. */
static void choose_kernels(void) {
#ifdef X86
    const char *asked = getenv("LAWCAT_EDGE_ISA");
    int most = !asked || !strcmp(asked, "avx512") ? 2 : !strcmp(asked, "avx2") ? 1 : 0;
    __builtin_cpu_init();
    if (most >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        kernels = &kernels_avx512, product = product_avx2;
    else if (most >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
             __builtin_cpu_supports("f16c"))
        kernels = &kernels_avx2, product = product_avx2;
    if (kernels == &kernels_avx512 && __builtin_cpu_supports("avx512vnni"))
        product = product_vnni, lanes_matter = 1;
#endif
}

/* -- onnxruntime's side -------------------------------------------------------------------------------------- */

#define TRY(call)                                                                                            \
    do {                                                                                                     \
        OrtStatus *status_ = (call);                                                                         \
        if (status_) return status_;                                                                         \
    } while (0)

static OrtStatus *wrong(const char *what) { return api->CreateStatus(ORT_INVALID_ARGUMENT, what); }

enum { MOST_DIMS = 4 };

/* A tensor: where it lies, and its sizes; `at` is NULL where an optional one was left out. */
typedef struct {
    void *at;
    int64_t dims[MOST_DIMS];
    size_t rank;
} Tensor;

static OrtStatus *describe(const OrtValue *value, Tensor *tensor) {
    memset(tensor, 0, sizeof *tensor);
    if (!value) return NULL;
    OrtTensorTypeAndShapeInfo *info;
    TRY(api->GetTensorTypeAndShape(value, &info));
    OrtStatus *status = api->GetDimensionsCount(info, &tensor->rank);
    if (!status && tensor->rank > MOST_DIMS) status = wrong("a tensor has too many dimensions");
    if (!status) status = api->GetDimensions(info, tensor->dims, tensor->rank);
    api->ReleaseTensorTypeAndShapeInfo(info);
    if (status) return status;
    return api->GetTensorMutableData((OrtValue *)value, &tensor->at);
}

static OrtStatus *input(OrtKernelContext *context, size_t index, Tensor *tensor) {
    const OrtValue *value = NULL;
    TRY(api->KernelContext_GetInput(context, index, &value));
    return describe(value, tensor);
}

static OrtStatus *output(OrtKernelContext *context, size_t index, const int64_t *dims, size_t rank, void **at) {
    OrtValue *value = NULL;
    TRY(api->KernelContext_GetOutput(context, index, dims, rank, &value));
    if (!value) return wrong("an output of the operator is not asked for");
    return api->GetTensorMutableData(value, at);
}

static int has_shape(const Tensor *tensor, size_t rank, int64_t a, int64_t b, int64_t c, int64_t d) {
    const int64_t dims[MOST_DIMS] = {a, b, c, d};
    if (!tensor->at || tensor->rank != rank) return 0;
    for (size_t i = 0; i < rank; i++)
        if (tensor->dims[i] != dims[i]) return 0;
    return 1;
}

/* -- LawcatAttention ----------------------------------------------------------------------------------------- */

enum {
    PACKED, TAPS, FEATURE, GATE, WINDOW_SCALE, GAMMA, CONV_STATE, STATE, KEY, VALUE, SEQLENS, COS, SIN,
    POSITIONS, ATTENTION_INPUTS
};

static void free_attention(void *kernel) {
    Attention *a = kernel;
    if (!a) return;
    free(a->taps), free(a->feature), free(a->gate), free(a->window_scale), free(a->gamma), free(a);
}

static OrtStatus *weight(const OrtKernelInfo *info, size_t index, Tensor *tensor) {
    int constant = 0;
    const OrtValue *value = NULL;
    TRY(api->KernelInfoGetConstantInput_tensor(info, index, &constant, &value));
    TRY(describe(constant ? value : NULL, tensor));
    return NULL;
}

static float *copied(const Tensor *tensor, int64_t count) {
    float *own = malloc((size_t)count * sizeof(float));
    if (own) memcpy(own, tensor->at, (size_t)count * sizeof(float));
    return own;
}

static OrtStatus *read_weights(const OrtKernelInfo *info, Attention *a) {
    Tensor taps, feature, gate, scale, gamma;
    TRY(weight(info, TAPS, &taps));
    TRY(weight(info, FEATURE, &feature));
    TRY(weight(info, GATE, &gate));
    TRY(weight(info, WINDOW_SCALE, &scale));
    TRY(weight(info, GAMMA, &gamma));
    if (!taps.at || taps.rank != 3 || !feature.at || feature.rank != 4 || !gate.at || gate.rank != 2)
        return wrong("LawcatAttention: conv_taps, feature and gate_b must be constants");
    a->d = feature.dims[3], a->f = feature.dims[2], a->K = taps.dims[2], a->R = gate.dims[0];
    int64_t H = a->H, d = a->d, f = a->f, K = a->K, heads = a->H + a->G;
    if (d < 2 || d % 2 || f < 1 || K < 2 || a->R < 1 || d > 65536 || f > 65536 || K > 65536 || a->R > 65536)
        return wrong("LawcatAttention: sizes out of range");
    if (!has_shape(&taps, 3, 2 * H * d, 1, K, 0) || !has_shape(&feature, 4, H, 2, f, d) ||
        !has_shape(&gate, 2, a->R, 2 * H * f, 0, 0) || (a->window && !has_shape(&scale, 2, H, 1, 0, 0)) ||
        (gamma.at && !has_shape(&gamma, 2, heads, d, 0, 0)))
        return wrong("LawcatAttention: the weights do not fit each other");
    a->taps = malloc((size_t)(2 * H * d * K) * sizeof(float));
    a->feature = malloc((size_t)(H * d * f) * sizeof(float));
    a->gate = copied(&gate, a->R * 2 * H * f);
    if (a->window) a->window_scale = copied(&scale, H);
    if (gamma.at) a->gamma = copied(&gamma, heads * d);
    if (!a->taps || !a->feature || !a->gate || (a->window && !a->window_scale) || (gamma.at && !a->gamma))
        return wrong("LawcatAttention: out of memory");
    const float *given = taps.at, *W = feature.at;
    for (int64_t h = 0; h < 2 * H; h++)
        for (int64_t i = 0; i < d; i++)
            for (int64_t j = 0; j < K; j++) a->taps[(h * K + j) * d + i] = given[(h * d + i) * K + j];
    for (int64_t h = 0; h < H; h++)
        for (int64_t i = 0; i < d; i++)
            for (int64_t j = 0; j < f; j++) a->feature[(h * d + i) * f + j] = W[(h * 2 * f + j) * d + i];
    return NULL;
}

static OrtStatus *read_attributes(const OrtKernelInfo *info, Attention *a) {
    int64_t max_score, rope;
    TRY(api->KernelInfoGetAttribute_int64(info, "num_heads", &a->H));
    TRY(api->KernelInfoGetAttribute_int64(info, "kv_num_heads", &a->G));
    TRY(api->KernelInfoGetAttribute_int64(info, "window", &a->window));
    TRY(api->KernelInfoGetAttribute_int64(info, "max_score", &max_score));
    TRY(api->KernelInfoGetAttribute_int64(info, "rope", &rope));
    TRY(api->KernelInfoGetAttribute_float(info, "gate_divisor", &a->gate_divisor));
    TRY(api->KernelInfoGetAttribute_float(info, "eps", &a->eps));
    TRY(api->KernelInfoGetAttribute_float(info, "norm_eps", &a->norm_eps));
    a->max_score = max_score != 0, a->rope = rope != 0;
    if (a->H < 1 || a->G < 1 || a->H > 4096 || a->H % a->G || a->window < 0 || a->window > INT32_MAX)
        return wrong("LawcatAttention: num_heads, kv_num_heads or window is out of range");
    return NULL;
}

static OrtStatus *ORT_API_CALL create_attention(const OrtCustomOp *op, const OrtApi *given,
                                                const OrtKernelInfo *info, void **kernel) {
    (void)op, (void)given;
    Attention *a = calloc(1, sizeof *a);
    if (!a) return wrong("LawcatAttention: out of memory");
    OrtStatus *status = read_attributes(info, a);
    if (!status) status = read_weights(info, a);
    if (status) {
        free_attention(a);
        return status;
    }
    *kernel = a;
    return NULL;
}

/* The inputs of a run, held against the layer's sizes. */
static OrtStatus *read_inputs(const Attention *a, OrtKernelContext *context, AttentionCall *c, Tensor *conv,
                              Tensor *state, Tensor *key, Tensor *value) {
    Tensor packed, gamma, seqlens = {0}, cos = {0}, sin = {0}, positions = {0};
    int64_t H = a->H, G = a->G, d = a->d;
    TRY(input(context, PACKED, &packed));
    TRY(input(context, CONV_STATE, conv));
    TRY(input(context, STATE, state));
    if (!packed.at || packed.rank != 3) return wrong("LawcatAttention: the packed product is not [B,T,N]");
    int64_t B = c->B = packed.dims[0], T = c->T = packed.dims[1];
    c->N = packed.dims[2], c->packed = packed.at;
    if (B < 1 || T < 1 || c->N != (H + 2 * G) * d + (a->window ? 1 : G) + a->R)
        return wrong("LawcatAttention: the packed product does not fit the layer");
    if (!has_shape(conv, 3, B, 2 * H * d, a->K - 1, 0) || !has_shape(state, 4, B, H, 2 * a->f, d + 1))
        return wrong("LawcatAttention: the state does not fit the layer");
    TRY(input(context, GAMMA, &gamma));
    if (!a->gamma && gamma.rank) return wrong("LawcatAttention: qk_gamma must be a constant that fits the layer");
    if (a->window || a->rope) {
        TRY(input(context, COS, &cos));
        TRY(input(context, SIN, &sin));
        TRY(input(context, POSITIONS, &positions));
        int64_t rows = cos.at && cos.rank == 2 ? cos.dims[0] : 0;
        if (!has_shape(&cos, 2, rows, d / 2, 0, 0) || !has_shape(&sin, 2, rows, d / 2, 0, 0) ||
            !has_shape(&positions, 2, B, T, 0, 0))
            return wrong("LawcatAttention: the rotary tables do not fit the layer");
        c->cos = cos.at, c->sin = sin.at, c->positions = positions.at;
        for (int64_t i = 0; i < B * T; i++)
            if (c->positions[i] < 0 || c->positions[i] >= rows)
                return wrong("LawcatAttention: a position is outside the rotary tables");
    }
    TRY(input(context, KEY, key));
    TRY(input(context, VALUE, value));
    if (!a->window && (key->rank || value->rank))
        return wrong("LawcatAttention: a layer without a window has no keys and values");
    if (!a->window) return NULL;
    TRY(input(context, SEQLENS, &seqlens));
    c->C = key->at && key->rank == 4 ? key->dims[2] : 0;
    if (!has_shape(key, 4, B, G, c->C, d) || !has_shape(value, 4, B, G, c->C, d) ||
        !has_shape(&seqlens, 1, B, 0, 0, 0))
        return wrong("LawcatAttention: the window's buffers do not fit the layer");
    c->slots = seqlens.at;
    for (int64_t b = 0; b < B; b++)
        if (c->slots[b] < T - 1 || c->slots[b] >= c->C)
            return wrong("LawcatAttention: a token's slot is outside the window's buffers");
    return NULL;
}

static OrtStatus *make_outputs(const Attention *a, OrtKernelContext *context, AttentionCall *c,
                               const Tensor *conv, const Tensor *state, const Tensor *key,
                               const Tensor *value) {
    const int64_t y[] = {c->B, c->T, a->H * a->d};
    TRY(output(context, 0, y, 3, (void **)&c->out));
    TRY(output(context, 1, conv->dims, 3, (void **)&c->conv));
    TRY(output(context, 2, state->dims, 4, (void **)&c->state));
    c->conv_past = conv->at, c->state_past = state->at;
    if (!a->window) return NULL;
    TRY(output(context, 3, key->dims, 4, (void **)&c->key));
    TRY(output(context, 4, value->dims, 4, (void **)&c->value));
    size_t bytes = (size_t)(c->B * a->G * c->C * a->d) * sizeof(float);
    if (c->key != key->at) memcpy(c->key, key->at, bytes);
    if (c->value != value->at) memcpy(c->value, value->at, bytes);
    return NULL;
}

static OrtStatus *ORT_API_CALL run_attention(void *kernel, OrtKernelContext *context) {
    const Attention *a = kernel;
    AttentionCall c = {.layer = a};
    Tensor conv, state, key = {0}, value = {0};
    TRY(read_inputs(a, context, &c, &conv, &state, &key, &value));
    TRY(make_outputs(a, context, &c, &conv, &state, &key, &value));

    c.tile = c.T < LONGEST_TILE ? c.T : LONGEST_TILE;
    int64_t d = a->d, F = 2 * a->f, seen = a->window ? a->window - 1 : 0;
    if (c.C && seen > c.C) seen = c.C;
    int64_t rows = 2 * (a->K - 1 + c.tile) * d, widths = 4 * d + 3 * F + 2;
    c.item_floats = padded(rows + c.tile * widths + c.tile * padded(seen + c.tile));
    c.columns = a->window && c.T >= LEAST_TRANSPOSED ? padded(seen + c.T) + 16 : 0;
    size_t turned = (size_t)(c.B * a->G * d * c.columns);
    float *memory = malloc(((size_t)(c.B * a->H * c.item_floats) + turned) * sizeof(float));
    if (!memory) return wrong("LawcatAttention: out of memory");
    c.scratch = memory + turned;
    if (turned) c.transposed = memory;
    OrtStatus *status = NULL;
    if (a->window && c.transposed)
        status = api->KernelContext_ParallelFor(context, kernels->append, (size_t)(c.B * a->G),
                                                (size_t)(c.B * a->G), &c);
    else if (a->window) /* a few numbers */
        for (int64_t i = 0; i < c.B * a->G; i++) kernels->append(&c, (size_t)i);
    /* Heads that share keys and values stay together where that leaves enough for all threads. */
    size_t heads = (size_t)(c.B * a->H), parts = c.B > 1 ? (size_t)(c.B * a->G) : heads;
    if (!status) status = api->KernelContext_ParallelFor(context, kernels->attend, heads, parts, &c);
    free(memory);
    return status;
}

static const char *ORT_API_CALL attention_name(const OrtCustomOp *op) { return (void)op, "LawcatAttention"; }
static size_t ORT_API_CALL attention_inputs(const OrtCustomOp *op) { return (void)op, ATTENTION_INPUTS; }
static size_t ORT_API_CALL attention_outputs(const OrtCustomOp *op) { return (void)op, 5; }

static ONNXTensorElementDataType ORT_API_CALL attention_input_type(const OrtCustomOp *op, size_t index) {
    (void)op;
    return index == SEQLENS     ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32
           : index == POSITIONS ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
                                : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}

static OrtCustomOpInputOutputCharacteristic ORT_API_CALL attention_input_kind(const OrtCustomOp *op,
                                                                              size_t index) {
    (void)op;
    int needed = index <= GATE || index == CONV_STATE || index == STATE;
    return needed ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
}

static OrtCustomOpInputOutputCharacteristic ORT_API_CALL attention_output_kind(const OrtCustomOp *op,
                                                                               size_t index) {
    return (void)op, index < 3 ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
}

/* -- SwiGlu -------------------------------------------------------------------------------------------------- */

static OrtStatus *ORT_API_CALL create_swiglu(const OrtCustomOp *op, const OrtApi *given,
                                             const OrtKernelInfo *info, void **kernel) {
    (void)op, (void)given, (void)info;
    *kernel = (void *)&kernels; /* has nothing of its own */
    return NULL;
}

static void ORT_API_CALL free_swiglu(void *kernel) { (void)kernel; }

static OrtStatus *ORT_API_CALL run_swiglu(void *kernel, OrtKernelContext *context) {
    (void)kernel;
    Tensor x;
    TRY(input(context, 0, &x));
    if (!x.at || x.rank != 3 || x.dims[2] % 2) return wrong("SwiGlu: the input is not [B,T,2 I]");
    const int64_t dims[] = {x.dims[0], x.dims[1], x.dims[2] / 2};
    SwiGluCall c = {x.at, NULL, (size_t)dims[2]};
    TRY(output(context, 0, dims, 3, (void **)&c.out));
    size_t rows = (size_t)(dims[0] * dims[1]);
    if (rows > 1) return api->KernelContext_ParallelFor(context, kernels->swiglu, rows, 0, &c);
    if (rows) kernels->swiglu(&c, 0);
    return NULL;
}

static const char *ORT_API_CALL swiglu_name(const OrtCustomOp *op) { return (void)op, "SwiGlu"; }
static size_t ORT_API_CALL one(const OrtCustomOp *op) { return (void)op, 1; }

/* -- BlockProduct -------------------------------------------------------------------------------------------- */

enum { X, WEIGHTS, SCALES, OFFSETS, BIAS, PRODUCT_INPUTS };
enum { SLICE_BYTES = 1 << 15 };

/* A product with its weights, which lie where onnxruntime has them as long as the session lives. */
typedef struct {
    Product of;
    Tensor weights, scales, offsets, bias;
} StoredProduct;

static OrtStatus *read_product(const OrtKernelInfo *info, StoredProduct *own) {
    Product *p = &own->of;
    int64_t bits;
    TRY(api->KernelInfoGetAttribute_int64(info, "N", &p->N));
    TRY(api->KernelInfoGetAttribute_int64(info, "K", &p->K));
    TRY(api->KernelInfoGetAttribute_int64(info, "bits", &bits));
    TRY(api->KernelInfoGetAttribute_int64(info, "block_size", &p->block));
    TRY(api->KernelInfoGetAttribute_float(info, "offset_unit", &p->unit));
    if ((bits != 4 && bits != 8) || p->N < 1 || p->K < 1 || p->N > INT32_MAX || p->block < 1 || p->block > 1024)
        return wrong("BlockProduct: a size is out of range");
    p->bits = (int)bits, p->chunk = bits == 8 ? 64 : 32;
    if (p->block % p->chunk || p->K > (int64_t)MOST_CHUNKS * p->chunk)
        return wrong("BlockProduct: blocks must hold whole chunks, and rows not too many of them");
    p->blocks = (p->K + p->block - 1) / p->block;
    p->chunks = p->blocks * p->block / p->chunk;
    p->groups = bits == 8 ? p->chunks : (p->chunks + 3) / 4;
    TRY(weight(info, WEIGHTS, &own->weights));
    TRY(weight(info, SCALES, &own->scales));
    TRY(weight(info, OFFSETS, &own->offsets));
    TRY(weight(info, BIAS, &own->bias));
    if (!has_shape(&own->weights, 3, p->N, p->blocks, p->block * p->bits / 8, 0) ||
        !has_shape(&own->scales, 2, p->N, p->blocks, 0, 0) ||
        (own->offsets.at && !has_shape(&own->offsets, 2, p->N, p->blocks, 0, 0)) ||
        (own->bias.at && !has_shape(&own->bias, 1, p->N, 0, 0, 0)))
        return wrong("BlockProduct: the weights must be constants that fit the product");
    return NULL;
}

static OrtStatus *ORT_API_CALL create_product(const OrtCustomOp *op, const OrtApi *given,
                                              const OrtKernelInfo *info, void **kernel) {
    (void)op, (void)given;
    StoredProduct *own = calloc(1, sizeof *own);
    if (!own) return wrong("BlockProduct: out of memory");
    OrtStatus *status = read_product(info, own);
    if (status) {
        free(own);
        return status;
    }
    *kernel = own;
    return NULL;
}

static void ORT_API_CALL free_product(void *kernel) { free(kernel); }

static OrtStatus *ORT_API_CALL run_product(void *kernel, OrtKernelContext *context) {
    const StoredProduct *own = kernel;
    const Product *p = &own->of;
    Tensor x, offsets = {0}, bias = {0};
    TRY(input(context, X, &x));
    if (!own->offsets.at) TRY(input(context, OFFSETS, &offsets));
    if (!own->bias.at) TRY(input(context, BIAS, &bias));
    if (offsets.rank || bias.rank)
        return wrong("BlockProduct: offsets and bias must be constants that fit the product");
    if (!x.at || x.rank != 3 || x.dims[2] != p->K || x.dims[0] < 1 || x.dims[1] < 1)
        return wrong("BlockProduct: the input is not [B,T,K]");
    ProductCall c = {.of = p, .M = x.dims[0] * x.dims[1], .x = x.at, .weights = own->weights.at,
                     .scales = own->scales.at, .offsets = own->offsets.at, .bias = own->bias.at};
    const int64_t dims[] = {x.dims[0], x.dims[1], p->N};
    TRY(output(context, 0, dims, 3, (void **)&c.y));

    c.stride = p->groups * (p->bits == 8 ? 64 : 128);
    size_t M = (size_t)c.M, chunks = (size_t)p->chunks, groups = (size_t)p->groups;
    size_t bytes = M * (chunks * 3 * 4 + groups * 64 + (size_t)c.stride);
    char *memory = malloc(bytes);
    if (!memory) return wrong("BlockProduct: out of memory");
    c.scale = (float *)memory, c.sum = c.scale + M * chunks;
    c.chunk_zero = (int32_t *)(c.sum + M * chunks);
    int32_t *lanes = c.chunk_zero + M * chunks;
    c.a = (int8_t *)(lanes + M * groups * 16);
    if (lanes_matter && M < FEW_TOKENS) c.lane_zero = lanes;
    OrtStatus *status = NULL;
    if (M < 8)
        for (size_t m = 0; m < M; m++) kernels->quantise(&c, m);
    else
        status = api->KernelContext_ParallelFor(context, kernels->quantise, M, 0, &c);

    int64_t row = p->blocks * p->block * p->bits / 8, rows = SLICE_BYTES / row / 16 * 16;
    c.rows_in_slice = rows < 16 ? 16 : rows;
    size_t slices = (size_t)((p->N + c.rows_in_slice - 1) / c.rows_in_slice);
    if (!status) status = api->KernelContext_ParallelFor(context, product, slices, slices, &c);
    free(memory);
    return status;
}

static const char *ORT_API_CALL product_name(const OrtCustomOp *op) { return (void)op, "BlockProduct"; }
static size_t ORT_API_CALL product_inputs(const OrtCustomOp *op) { return (void)op, PRODUCT_INPUTS; }

static ONNXTensorElementDataType ORT_API_CALL product_input_type(const OrtCustomOp *op, size_t index) {
    (void)op;
    switch (index) {
    case WEIGHTS: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    case SCALES: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case OFFSETS: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    default: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
}

static OrtCustomOpInputOutputCharacteristic ORT_API_CALL product_input_kind(const OrtCustomOp *op,
                                                                            size_t index) {
    return (void)op, index <= SCALES ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
}

/* -- registration -------------------------------------------------------------------------------------------- */

static const char *ORT_API_CALL on_cpu(const OrtCustomOp *op) { return (void)op, NULL; }
static int ORT_API_CALL version_one(const OrtCustomOp *op) { return (void)op, 1; }
static OrtMemType ORT_API_CALL plain_memory(const OrtCustomOp *op, size_t index) {
    return (void)op, (void)index, OrtMemTypeDefault;
}
static ONNXTensorElementDataType ORT_API_CALL floats(const OrtCustomOp *op, size_t index) {
    return (void)op, (void)index, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}
static OrtCustomOpInputOutputCharacteristic ORT_API_CALL needed(const OrtCustomOp *op, size_t index) {
    return (void)op, (void)index, INPUT_OUTPUT_REQUIRED;
}

static const OrtCustomOp attention_op = {
    .version = ORT_API_VERSION,
    .GetName = attention_name,
    .GetExecutionProviderType = on_cpu,
    .GetInputType = attention_input_type,
    .GetInputTypeCount = attention_inputs,
    .GetOutputType = floats,
    .GetOutputTypeCount = attention_outputs,
    .KernelDestroy = free_attention,
    .GetInputCharacteristic = attention_input_kind,
    .GetOutputCharacteristic = attention_output_kind,
    .GetInputMemoryType = plain_memory,
    .CreateKernelV2 = create_attention,
    .KernelComputeV2 = run_attention,
    .GetStartVersion = version_one,
    .GetEndVersion = version_one,
};

static const OrtCustomOp swiglu_op = {
    .version = ORT_API_VERSION,
    .GetName = swiglu_name,
    .GetExecutionProviderType = on_cpu,
    .GetInputType = floats,
    .GetInputTypeCount = one,
    .GetOutputType = floats,
    .GetOutputTypeCount = one,
    .KernelDestroy = free_swiglu,
    .GetInputCharacteristic = needed,
    .GetOutputCharacteristic = needed,
    .GetInputMemoryType = plain_memory,
    .CreateKernelV2 = create_swiglu,
    .KernelComputeV2 = run_swiglu,
    .GetStartVersion = version_one,
    .GetEndVersion = version_one,
};

static const OrtCustomOp product_op = {
    .version = ORT_API_VERSION,
    .GetName = product_name,
    .GetExecutionProviderType = on_cpu,
    .GetInputType = product_input_type,
    .GetInputTypeCount = product_inputs,
    .GetOutputType = floats,
    .GetOutputTypeCount = one,
    .KernelDestroy = free_product,
    .GetInputCharacteristic = product_input_kind,
    .GetOutputCharacteristic = needed,
    .GetInputMemoryType = plain_memory,
    .CreateKernelV2 = create_product,
    .KernelComputeV2 = run_product,
    .GetStartVersion = version_one,
    .GetEndVersion = version_one,
};

/* What onnxruntime calls when a session's options name this library. */
EXPORT OrtStatus *ORT_API_CALL RegisterCustomOps(OrtSessionOptions *options, const OrtApiBase *base) {
    static atomic_flag busy = ATOMIC_FLAG_INIT; /* sessions may be opened by several threads at once */
    static OrtCustomOpDomain *domain;           /* lives as long as the process, as sessions may */
    const OrtApi *known = base->GetApi(ORT_API_VERSION);
    if (!known) return NULL; /* an onnxruntime older than any that bundles are for */
    OrtStatus *status = NULL;
    while (atomic_flag_test_and_set(&busy)) continue;
    if (!domain) {
        api = known;
        choose_kernels();
        status = api->CreateCustomOpDomain("lawcat_edge", &domain);
        if (!status) status = api->CustomOpDomain_Add(domain, &attention_op);
        if (!status) status = api->CustomOpDomain_Add(domain, &product_op);
        if (!status) status = api->CustomOpDomain_Add(domain, &swiglu_op);
    }
    atomic_flag_clear(&busy);
    return status ? status : known->AddCustomOpDomain(options, domain);
}
