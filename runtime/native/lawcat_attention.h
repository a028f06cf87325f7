/* LawcatAttention as onnxruntime sees it: its weights are read once, its inputs are checked at every run. */

enum {
    PACKED, TAPS, FEATURE, GATE, WINDOW_SCALE, GAMMA, CONV_STATE, STATE, KEY, VALUE, SEQLENS, COS, SIN,
    POSITIONS, ATTENTION_INPUTS
};

static void free_attention(void *kernel) {
    Attention *a = kernel;
    if (!a) return;
    free(a->taps), free(a->feature), free(a->gate), free(a->window_scale), free(a->gamma), free(a);
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
