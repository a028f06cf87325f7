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
#include <cpuid.h>
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
#if defined(__aarch64__)
#include "products_arm.h"
#endif

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

#ifdef X86
/* Clang's __builtin_cpu_supports does not know f16c in every version. */
static int has_f16c(void) {
    unsigned a, b, c, d;
    return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

/* The best that this processor has; LAWCAT_EDGE_ISA=base, avx2, avx512 or dotprod asks for less, for tests. */
static void choose_kernels(void) {
    const char *asked = getenv("LAWCAT_EDGE_ISA");
#ifdef X86
    int most = !asked || !strcmp(asked, "avx512") ? 2 : !strcmp(asked, "avx2") ? 1 : 0;
    __builtin_cpu_init();
    if (most >= 2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        kernels = &kernels_avx512, product = product_avx2;
    else if (most >= 1 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c())
        kernels = &kernels_avx2, product = product_avx2;
    if (kernels == &kernels_avx512 && __builtin_cpu_supports("avx512vnni"))
        product = product_vnni, lanes_matter = 1;
#elif defined(__aarch64__)
    if ((!asked || !strcmp(asked, "dotprod")) && has_dot()) product = product_dot;
#else
    (void)asked;
#endif
}

#include "ort.h"

#include "block_product.h"
#include "lawcat_attention.h"

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
