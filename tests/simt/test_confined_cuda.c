// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_confined_cuda.c - what tests/kernels/test_confined.c asks of the table, asked of the rest of cuda.h,
 * cuda_quant.h, cuda_gemm.h and cuda_attn.h: results in bf16 and f16 and as codes, the fused norm, GELU, FP8 weights, products
 * of operands, either attention kernel. */
#include "kernels/cuda_attn.h"
#include "kernels/cuda_gemm.h"
#include "kernels/cuda_quant.h"
#include "tests/kernels/case_confined.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"

enum { E = 72, ODD = 70, CODES = 256, N = 40, K = 256, H = 4, G = 2, D = 64, LEN = 150, P = 16, PAGES = (LEN + P - 1) / P };

typedef struct kind {
    td_dtype type; /* of results, or of keys and values */
    td_act act;
    int group;     /* of codes; of attention: 1: the kernel for few rows */
    td_cuda_wtype weights;
} kind;

static const kind *kind_of(const row_op *op)
{
    return op->with;
}

static td_stream stream(void)
{
    return dev()->stream[TD_STREAM_COMPUTE];
}

static const float *fixed(size_t n)
{
    static float *p;
    TD_CHECK(n <= 1 << 16);
    if (!p) rnd_fill(p = floats(1 << 16), 1 << 16, 77, 1);
    return p;
}
static const float *fixed_on_device(size_t n)
{
    return dev_put(fixed(n), n * 4);
}

static const float *in(const float *x, size_t ldx, int n, int width)
{
    return dev_put(x, ((size_t)(n - 1) * ldx + (size_t)width) * 4);
}

/* All rows with what lies between them, poison included. */
static void *out_open(const uint8_t *out, size_t ldo)
{
    return dev_put(out, ROWS * ldo);
}
static void out_fetch(const row_op *op, uint8_t *out, const void *d, size_t ldo, int e)
{
    T_EQ(e, 0);
    T_OK(dev_get(out, d, ROWS * ldo), "%s: %s", op->name, simt_last_error());
    dev_done();
}

static size_t unit(const row_op *op)
{
    return td_dtype_bytes(kind_of(op)->type);
}

static void rmsnorm(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    void *d = out_open(out, ldo);
    (void)t0;
    out_fetch(op, out, d, ldo,
              td_cuda_rmsnorm(stream(), in(x, ldx, n, op->in), ldx, fixed_on_device(E), 1e-5f, n, op->in, d, kind_of(op)->type, ldo / unit(op)));
}

/* x and the delta beside it; the sum is looked at through the norm. */
static void add_rmsnorm(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    void *d = out_open(out, ldo);
    int width = op->in / 2;
    float *dx = dev_put(x, ((size_t)(n - 1) * ldx + (size_t)op->in) * 4);
    (void)t0;
    out_fetch(op, out, d, ldo,
              td_cuda_add_rmsnorm(stream(), dx, ldx, dx + width, ldx, fixed_on_device(E), 1e-5f, n, width, d, kind_of(op)->type, ldo / unit(op)));
}

static void add(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    void *d;
    (void)t0;
    for (int i = 0; i < n; i++) memcpy(out + (size_t)i * ldo, fixed(E), (size_t)op->in * 4);
    d = out_open(out, ldo);
    out_fetch(op, out, d, ldo, td_cuda_add(stream(), d, ldo / 4, in(x, ldx, n, op->in), ldx, n, op->in));
}

static void act_mul(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    void *d = out_open(out, ldo);
    (void)t0;
    out_fetch(op, out, d, ldo,
              td_cuda_act_mul(stream(), kind_of(op)->act, in(x, ldx, n, op->in), ldx, n, op->in / 2, d, kind_of(op)->type, ldo / unit(op)));
}

static void convert(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    void *d = out_open(out, ldo);
    (void)t0;
    out_fetch(op, out, d, ldo, td_cuda_convert(stream(), in(x, ldx, n, op->in), ldx, n, op->in, d, kind_of(op)->type, ldo / unit(op)));
}

static void moe_gather(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    int32_t row[ROWS] = {0};
    void *d = out_open(out, ldo);
    (void)t0;
    for (int i = 0; i < n; i++) row[i] = i;
    out_fetch(op, out, d, ldo, td_cuda_moe_gather(stream(), in(x, ldx, n, op->in), ldx, dev_put(row, sizeof row), n, 1, op->in, d, kind_of(op)->type,
                                                  ldo / unit(op)));
}

/* A row of codes, then its scales as bytes. */
static void codes_of(const row_op *op, const float *x, size_t ldx, int n, uint8_t *out, size_t ldo)
{
    int group = kind_of(op)->group, width = CODES, blocks = group ? width / 128 : 1;
    size_t scales = td_cuda_code_scales(n, width, group);
    uint8_t *block = block_alloc(td_cuda_codes_bytes((size_t)width, n, width, group));
    memset(block, out[0], td_cuda_codes_bytes((size_t)width, n, width, group));
    td_cuda_codes host = td_cuda_codes_in(block, (size_t)width, n, width, group), c = host;
    c.code = dev_put(host.code, (size_t)(n * width)), c.scale = dev_put(host.scale, scales * 4);
    const float *dx = in(x, ldx, n, op->in);
    int e = !strcmp(op->name, "quant")           ? td_cuda_quant(stream(), dx, TD_F32, ldx, &c)
            : !strcmp(op->name, "rmsnorm_quant") ? td_cuda_rmsnorm_quant(stream(), dx, ldx, fixed_on_device(CODES), 1e-5f, &c)
                                                 : td_cuda_act_quant(stream(), TD_ACT_SILU, dx, ldx, &c);
    T_EQ(e, 0);
    T_OK(dev_get(host.code, c.code, (size_t)(n * width)) && dev_get(host.scale, c.scale, scales * 4), "%s: %s", op->name, simt_last_error());
    for (int t = 0; t < n; t++) {
        memcpy(out + (size_t)t * ldo, host.code + t * width, (size_t)width);
        for (int b = 0; b < blocks; b++)
            memcpy(out + (size_t)t * ldo + width + b * 4, host.scale + td_cuda_code_scale_at(n, width, group, t, b), 4);
    }
    free(block);
    dev_done();
}

static void codes(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    (void)t0;
    codes_of(op, x, ldx, n, out, ldo);
}

/* x as f32, or (group) as the weight's operand. */
static void linear(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    const kind *k = kind_of(op);
    bool fp8 = k->weights >= TD_CUDA_W_E4M3_ROW;
    uint8_t *raw = block_alloc(N * K * 2);
    size_t bytes = td_cuda_gemm_packed_bytes(N, K, 0, k->weights), ws_bytes = td_cuda_gemm_ws_bytes(ROWS, N, K);
    void *packed = block_alloc(bytes), *ws = dev_new(ws_bytes);
    td_dtype operand = k->weights == TD_CUDA_W_F16 ? TD_F16 : TD_BF16;
    (void)t0;
    td_convert(raw, fp8 ? TD_E4M3 : operand, fixed(N * K), TD_F32, N * K);
    td_cuda_gemm_pack_host(packed, raw, operand, N, K, 0, k->weights, 0, N);
    td_cuda_weight w = {.N = N, .K = K, .type = k->weights, .p = dev_put(packed, bytes), .bias = fixed_on_device(N),
                        .scale = fp8 ? fixed_on_device(N + 8) : NULL};
    uint16_t *half = block_alloc((size_t)n * ldx * 2);
    for (int i = 0; i < n; i++) td_convert(half + (size_t)i * ldx, operand, x + (size_t)i * ldx, TD_F32, K);
    void *d = out_open(out, ldo);
    TD_CHECK(dev()->fill(dev(), TD_STREAM_COMPUTE, ws, 0, TD_CUDA_GEMM_COUNTERS * 4) == TD_OK);
    td_cuda_gemm_args a = {&w, k->group ? dev_put(half, (size_t)n * ldx * 2) : (const void *)in(x, ldx, n, K), !k->group, ldx, n, d, ldo / 4, false, ws, 0};
    out_fetch(op, out, d, ldo, td_cuda_gemm(stream(), &a));
    free(raw), free(packed), free(half);
}

/* Each row a query of its own at position 13 t. */
static void attention(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    const kind *k = kind_of(op);
    bool few = k->group != 0;
    enum { SLOTS = 512 };
    td_kv kv = {.dtype = k->type, .n_pages = PAGES, .P = P, .G = G, .D = D};
    size_t values = (size_t)PAGES * 2 * G * P * D;
    uint16_t *host = block_alloc(values * 2);
    int32_t pages[PAGES];
    td_cuda_attn_seq seq[ROWS];
    td_convert(host, k->type, fixed(values), TD_F32, values);
    kv.base = dev_put(host, values * 2);
    for (int i = 0; i < PAGES; i++) pages[i] = (i * 3 + 1) % PAGES;
    for (int i = 0; i < n; i++) seq[i] = (td_cuda_attn_seq){i, 1, 13 * (t0 + i), 0};
    void *d_seq = dev_put(seq, sizeof seq[0] * (size_t)n), *plan = dev_new(td_cuda_attn_plan_bytes(n)), *d = out_open(out, ldo);
    T_EQ(td_cuda_attn_plan(stream(), d_seq, n, H, G, D, 0, SLOTS, few ? TD_CUDA_ATTN_FEW : 0, plan), 0);
    td_cuda_attn_args a = {.q = in(x, ldx, n, op->in), .ldq = ldx, .out = d, .ldo = ldo / unit(op), .out_dtype = k->type, .kv = &kv, .seq = d_seq,
                           .n_seq = n, .pages = dev_put(pages, sizeof pages), .H = H, .G = G, .D = D, .scale = 0.125f, .T = n, .prompts = true,
                           .few = few, .plan = plan, .ws = dev_new(td_cuda_attn_ws_bytes(SLOTS, D)), .max_slots = SLOTS};
    out_fetch(op, out, d, ldo, td_cuda_attention(stream(), &a));
    free(host);
}

static void check(const char *name, int width, int out_width, kind k,
                  void (*run)(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo))
{
    row_op op = {.who = td_dtype_name(k.type), .name = name, .with = &k, .in = width, .out = out_width * (int)td_dtype_bytes(k.type), .type = k.type,
                 .keeps_nan = k.type != TD_E4M3, .run = run};
    row_op_check(&op);
}

int main(void)
{
    static const td_dtype types[] = {TD_F32, TD_BF16, TD_F16};
    for (size_t i = 0; i < TD_COUNT(types); i++)
        for (int w = ODD; w <= E; w += 2) {
            kind k = {.type = types[i]};
            check("rmsnorm", w, w, k, rmsnorm);
            check("add_rmsnorm", 2 * w, w, k, add_rmsnorm);
            check("convert", w, w, k, convert);
            check("moe_gather", w, w, k, moe_gather);
            for (int a = TD_ACT_SILU; a <= TD_ACT_GELU_TANH; a++) k.act = (td_act)a, check("act_mul", 2 * w, w, k, act_mul);
        }
    for (int w = ODD; w <= E; w += 2) check("add", w, w, (kind){.type = TD_F32}, add);
    for (int group = 0; group <= 128; group += 128) {
        kind k = {.type = TD_E4M3, .group = group};
        int out = CODES + 4 * (group ? CODES / 128 : 1);
        check("quant", CODES, out, k, codes);
        check("rmsnorm_quant", CODES, out, k, codes);
        check("act_quant", 2 * CODES, out, k, codes);
    }
    for (int w = 0; w < TD_CUDA_W_TYPES; w++)
        for (int operand = 0; operand < 2; operand++)
            check("linear", K, N, (kind){.type = TD_F32, .weights = (td_cuda_wtype)w, .group = operand}, linear);
    for (size_t i = 1; i < TD_COUNT(types); i++)
        for (int few = 0; few < 2; few++) check("attention", H * D, H * D, (kind){.type = types[i], .group = few}, attention);
    return T_DONE();
}
