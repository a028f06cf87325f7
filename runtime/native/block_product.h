/* BlockProduct as onnxruntime sees it: its weights stay where they lie, its input is checked at every run. */

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
