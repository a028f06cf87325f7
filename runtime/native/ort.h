/* onnxruntime's C interface, as the operators use it: tensors with their sizes, and errors. */

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

/* An input that is a constant of the graph; `at` is NULL for any other. */
static OrtStatus *weight(const OrtKernelInfo *info, size_t index, Tensor *tensor) {
    int constant = 0;
    const OrtValue *value = NULL;
    TRY(api->KernelInfoGetConstantInput_tensor(info, index, &constant, &value));
    TRY(describe(constant ? value : NULL, tensor));
    return NULL;
}
