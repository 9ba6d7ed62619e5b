// SPDX-License-Identifier: Apache-2.0
/* Every operation on rows, of every family: all of its output and nothing else is written, NaN and infinity stay in their row, a
 * row's bits are its own (case_confined.h). Those of keys and values: test_attn.c; of weights: test_gemm.c. */
#include "tests/kernels/case_confined.h"

static int E; /* a multiple of four, or not */
enum { X = 17, TOP = 5, H = 4, G = 2, D = 16, LEN = 150, P = 8, PAGES = (LEN + P - 1) / P, WIDE = 144, N = 67, V = 600, MERGED = 3 };

static const td_ops *ops(const row_op *op)
{
    return op->with;
}

/* What is no row: the same for every call. */
static const float *fixed(int n)
{
    static float *p;
    TD_CHECK(n <= 1 << 16);
    if (!p) rnd_fill(p = floats(1 << 16), 1 << 16, 77, 1);
    return p;
}

static float *as_f32(uint8_t *out)
{
    return (float *)(void *)out;
}

static void rmsnorm(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    (void)t0;
    ops(op)->rmsnorm(team(2), x, ldx, fixed(E), 1e-5f, n, E, as_f32(out), ldo / 4);
}

static void silu_mul(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    (void)t0;
    ops(op)->silu_mul(team(2), x, ldx, n, E, as_f32(out), ldo / 4);
}

/* A row of results: q, k and v as the call leaves them, then k and v as its page has them. */
static void rope_append(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    enum { W = (H + 2 * G) * D };
    td_kv kv = {.dtype = ops(op)->kv_dtype, .n_pages = ROWS, .P = 1, .G = G, .D = D};
    size_t page = td_kv_page_bytes(&kv);
    int32_t pages[ROWS], zero[ROWS] = {0};
    float *y = floats((size_t)n * W), *v = floats((size_t)(2 * G * D));
    kv.base = block_alloc(ROWS * page);
    for (int i = 0; i < n; i++) pages[i] = (t0 + i) * 3 % ROWS, memcpy(y + i * W, x + (size_t)i * ldx, W * 4);
    ops(op)->rope_append(team(2), &(td_rope_args){.qkv = y, .ld = W, .T = n, .cs = fixed(ROWS * D) + t0 * D, .q_norm = fixed(D), .k_norm = fixed(D),
                                                  .norm_eps = 1e-5f, .H = H, .G = G, .D = D, .rot_dim = D, .kv = &kv, .row_page = pages,
                                                  .row_in_page = zero});
    for (int i = 0; i < n; i++) {
        td_convert(v, TD_F32, td_kv_page(&kv, 0, pages[i]), kv.dtype, 2 * G * D);
        memcpy(out + (size_t)i * ldo, y + i * W, W * 4);
        memcpy(out + (size_t)i * ldo + W * 4, v, 2 * G * D * 4);
    }
    free(y), free(v), free(kv.base);
}

typedef struct packed {
    td_weight w;
    void *scratch;
} packed;

static packed packed_open(const td_ops *o, const float *w, int rows, int K, int slices)
{
    void *p = block_alloc(o->packed_bytes(rows, K, slices, TD_BF16));
    uint16_t *stored = block_alloc((size_t)(rows * K) * 2);
    td_convert(stored, TD_BF16, w, TD_F32, (size_t)(rows * K));
    for (int n = 0; n < rows; n += 32) o->pack(p, stored, TD_BF16, rows, K, slices, n, n + 32 < rows ? n + 32 : rows);
    free(stored);
    return (packed){{.N = rows, .K = K, .dtype = o->packed_dtype(TD_BF16), .p = p, .slices = slices},
                    block_alloc(td_moe_scratch_bytes(o, ROWS, K, MAX_TEAM) + o->scratch_bytes(ROWS, K, D, MAX_TEAM))};
}

static void packed_close(packed *p)
{
    free((void *)(uintptr_t)p->w.p), free(p->scratch);
}

static void linear_of(const row_op *op, const float *x, size_t ldx, int n, uint8_t *out, size_t ldo, int slices)
{
    packed p = packed_open(ops(op), fixed(N * WIDE), N, WIDE, slices);
    p.w.bias = fixed(N);
    ops(op)->linear(team(2), p.scratch, &p.w, x, ldx, n, as_f32(out), ldo / 4, false);
    packed_close(&p);
}

static void linear(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    (void)t0;
    linear_of(op, x, ldx, n, out, ldo, 0);
}

static void linear_slices(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    (void)t0;
    linear_of(op, x, ldx, n, out, ldo, 8);
}

/* Rows 0 to 2 belong to the first of three experts, 3 to 4 to the second, the rest to the third. */
static void linear_grouped(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    static const int first[] = {0, 3, 5, ROWS};
    packed p[3];
    td_weight w[3];
    int32_t row0[4];
    for (int e = 0; e < 3; e++) p[e] = packed_open(ops(op), fixed(N * WIDE + 8) + e * 4, N, WIDE, 0), w[e] = p[e].w;
    for (int e = 0; e < 4; e++) row0[e] = TD_MIN(TD_MAX(first[e] - t0, 0), n);
    ops(op)->linear_grouped(ops(op), team(2), p[0].scratch, &(td_grouped){w, 3, row0, n, x, ldx, as_f32(out), ldo / 4, TD_F32});
    for (int e = 0; e < 3; e++) packed_close(&p[e]);
}

/* A row has its eight parts side by side. */
static void sum_tree(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    (void)t0;
    ops(op)->sum_tree(team(2), x, N, 8, n, N, ldx, fixed(N), as_f32(out), ldo / 4, false);
}

/* Row t is the query at position 13 t of one sequence: each row a sequence of its own over the same pages, or (prompt) the
 * last rows of it together. */
static void attention_of(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo, bool prompt)
{
    td_kv kv = {.dtype = ops(op)->kv_dtype, .n_pages = PAGES, .P = P, .G = G, .D = D};
    size_t values = (size_t)PAGES * 2 * G * P * D;
    int32_t pages[PAGES];
    td_attn_seq seq[ROWS];
    float *q = floats((size_t)(n * H * D)), *y = floats((size_t)(n * H * D));
    kv.base = block_alloc(values * 4);
    td_convert(kv.base, kv.dtype, fixed((int)values), TD_F32, values);
    for (int i = 0; i < PAGES; i++) pages[i] = (i * 3 + 1) % PAGES;
    for (int i = 0; i < n; i++) {
        seq[i] = (td_attn_seq){i, 1, 13 * (t0 + i), pages};
        memcpy(q + i * H * D, x + (size_t)i * ldx, H * D * 4);
    }
    if (prompt) seq[0] = (td_attn_seq){0, n, LEN - ROWS + t0, pages};
    void *scratch = block_alloc(ops(op)->scratch_bytes(ROWS, D, D, MAX_TEAM));
    ops(op)->attention(team(2), scratch, &(td_attn_args){.q = q, .ldq = H * D, .out = y, .ldo = H * D, .kv = &kv, .seq = seq, .n_seq = prompt ? 1 : n,
                                                         .H = H, .G = G, .D = D, .scale = 0.25f});
    for (int i = 0; i < n; i++) memcpy(out + (size_t)i * ldo, y + i * H * D, H * D * 4);
    free(q), free(y), free(kv.base), free(scratch);
}

static void attention_rows(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    attention_of(op, x, ldx, t0, n, out, ldo, false);
}

static void attention_prompt(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    attention_of(op, x, ldx, t0, n, out, ldo, true);
}

/* A row has MERGED parts of all heads; sums are positive. */
static void attn_merge(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    enum { UNIT = H * (D + 2) };
    float *part = floats((size_t)(n * MERGED * UNIT)), *y = floats((size_t)(n * H * D));
    const float *all[1] = {part};
    (void)t0;
    for (int i = 0; i < n; i++) memcpy(part + i * MERGED * UNIT, x + (size_t)i * ldx, MERGED * UNIT * 4);
    for (int i = 0; i < n * MERGED * H; i++) part[i * (D + 2) + 1] = 1 + fabsf(part[i * (D + 2) + 1]);
    ops(op)->attn_merge(team(2), &(td_merge_args){.part = all, .out = y, .ldo = H * D, .T = n, .H = H, .D = D, .n_parts = MERGED, .ranks = 1});
    for (int i = 0; i < n; i++) memcpy(out + (size_t)i * ldo, y + i * H * D, H * D * 4);
    free(part), free(y);
}

static void moe_logits(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    float *y = floats((size_t)(n * X));
    (void)t0;
    ops(op)->moe_logits(team(2), &(td_table){X, E, TD_F32, fixed(X * E)}, x, ldx, n, y);
    for (int i = 0; i < n; i++) memcpy(out + (size_t)i * ldo, y + i * X, X * 4);
    free(y);
}

static void moe_route(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    float *l = floats((size_t)(n * X)), *w = floats((size_t)(n * TOP));
    int32_t ids[ROWS * TOP];
    (void)t0;
    for (int i = 0; i < n; i++) memcpy(l + i * X, x + (size_t)i * ldx, X * 4);
    ops(op)->moe_route(team(2), &(td_route_law){X, TOP, TD_ROUTE_SOFTMAX, false, 1}, l, n, ids, w);
    for (int i = 0; i < n; i++) {
        memcpy(out + (size_t)i * ldo, w + i * TOP, TOP * 4);
        for (int k = 0; k < TOP; k++) as_f32(out + (size_t)i * ldo)[TOP + k] = (float)ids[i * TOP + k];
    }
    free(l), free(w);
}

/* The rows of a token's slots, wherever they went. */
static void moe_gather(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    int32_t row[ROWS * TOP] = {0};
    float *y = floats((size_t)(n * TOP * E));
    (void)t0;
    for (int i = 0; i < n * TOP; i++) row[i] = n * TOP - 1 - i;
    ops(op)->moe_gather(team(2), x, ldx, row, n, TOP, E, y, (size_t)E);
    for (int i = 0; i < n * TOP; i++) memcpy(out + (size_t)(i / TOP) * ldo + (size_t)(i % TOP * E) * 4, y + row[i] * E, (size_t)E * 4);
    free(y);
}

static void moe_combine(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    int32_t row[ROWS * TOP] = {0};
    float *y = floats((size_t)(n * TOP * E));
    for (int i = 0; i < n * TOP; i++) {
        row[i] = n * TOP - 1 - i;
        memcpy(y + row[i] * E, x + (size_t)(i / TOP) * ldx + i % TOP * E, (size_t)E * 4);
    }
    for (int i = 0; i < n; i++) memcpy(out + (size_t)i * ldo, fixed(E), (size_t)E * 4);
    ops(op)->moe_combine(team(2), y, (size_t)E, row, fixed(ROWS * TOP) + t0 * TOP, n, TOP, E, as_f32(out), ldo / 4);
    free(y);
}

/* The rows are the table's. */
static void embed_table(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    int32_t ids[ROWS] = {0};
    float *w = floats((size_t)(n * E));
    (void)t0;
    for (int i = 0; i < n; i++) ids[i] = i, memcpy(w + i * E, x + (size_t)i * ldx, (size_t)E * 4);
    ops(op)->embed_table(team(2), &(td_table){n, E, TD_F32, w}, ids, n, as_f32(out), ldo / 4);
    free(w);
}

static void embed_packed(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    int32_t ids[ROWS] = {0};
    float *w = floats((size_t)(n * E));
    (void)t0;
    for (int i = 0; i < n; i++) ids[i] = i, memcpy(w + i * E, x + (size_t)i * ldx, (size_t)E * 4);
    packed p = packed_open(ops(op), w, n, E, 0);
    ops(op)->embed_packed(team(2), &p.w, ids, n, as_f32(out), ldo / 4);
    packed_close(&p);
    free(w);
}

static void take_rows(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    int32_t rows[ROWS] = {0};
    (void)t0;
    for (int i = 0; i < n; i++) rows[i] = i;
    ops(op)->take_rows(team(2), x, ldx, rows, n, E, as_f32(out), ldo / 4);
}

static void sample(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    static const td_bias ban = {7, -INFINITY};
    static const td_penalty seen = {9, 2, 1};
    td_sample_row rows[ROWS] = {0};
    td_sample_out got[ROWS];
    float *l = floats((size_t)n * (size_t)V);
    for (int i = 0; i < n; i++) {
        int t = t0 + i;
        memcpy(l + i * V, x + (size_t)i * ldx, V * 4);
        rows[i] = (td_sample_row){.temperature = t % 3 ? 0.9f : 0, .top_p = t % 2 ? 0.9f : 1, .min_p = 0.01f, .top_k = t % 4 ? 0 : 40,
                                  .repetition_penalty = 1.2f, .presence_penalty = 0.1f, .frequency_penalty = 0.1f, .seed = (uint64_t)t, .position = 5,
                                  .stream = 256, .logprobs = 3, .pen = &seen, .n_pen = 1, .bias = &ban, .n_bias = 1};
    }
    memset(got, out[0], sizeof got);
    ops(op)->sample(team(2), l, V, V, rows, n, got);
    for (int i = 0; i < n; i++) {
        float *o = as_f32(out + (size_t)i * ldo);
        o[0] = (float)got[i].token, o[1] = got[i].logprob, o[2] = (float)got[i].n_top;
        for (int k = 0; k < 3; k++) o[3 + 2 * k] = (float)got[i].top[k].id, o[4 + 2 * k] = got[i].top[k].logprob;
    }
    free(l);
}

static void score(const row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo)
{
    int32_t ids[ROWS] = {0};
    td_sample_out got[ROWS];
    for (int i = 0; i < n; i++) ids[i] = (t0 + i) * 31 % V;
    memset(got, out[0], sizeof got);
    ops(op)->score(team(2), x, ldx, V, ids, 2, n, got);
    for (int i = 0; i < n; i++) {
        float *o = as_f32(out + (size_t)i * ldo);
        o[0] = got[i].logprob;
        for (int k = 0; k < 2; k++) o[1 + 2 * k] = (float)got[i].top[k].id, o[2 + 2 * k] = got[i].top[k].logprob;
    }
}

static void check_all(const td_ops *o)
{
    const row_op all[] = {
        {.name = "rmsnorm", .in = E, .out = E * 4, .run = rmsnorm},
        {.name = "silu_mul", .in = 2 * E, .out = E * 4, .run = silu_mul},
        {.name = "rope_append", .in = (H + 2 * G) * D, .out = (H + 4 * G) * D * 4, .run = rope_append, .at = H * D + 1},
        {.name = "linear", .in = WIDE, .out = N * 4, .run = linear},
        {.name = "linear, slices", .in = WIDE, .out = N * 4, .run = linear_slices},
        {.name = "linear_grouped", .in = WIDE, .out = N * 4, .run = linear_grouped},
        {.name = "sum_tree", .in = 8 * N, .out = N * 4, .run = sum_tree},
        {.name = "attention, rows", .in = H * D, .out = H * D * 4, .run = attention_rows},
        {.name = "attention, prompt", .in = H * D, .out = H * D * 4, .run = attention_prompt},
        {.name = "attn_merge", .in = MERGED * H * (D + 2), .out = H * D * 4, .run = attn_merge, .at = D + 4},
        {.name = "moe_logits", .in = E, .out = X * 4, .run = moe_logits},
        {.name = "moe_route", .in = X, .out = 2 * TOP * 4, .run = moe_route},
        {.name = "moe_gather", .in = E, .out = TOP * E * 4, .run = moe_gather},
        {.name = "moe_combine", .in = TOP * E, .out = E * 4, .run = moe_combine},
        {.name = "embed_table", .in = E, .out = E * 4, .run = embed_table},
        {.name = "embed_packed", .in = E, .out = E * 4, .run = embed_packed},
        {.name = "take_rows", .in = E, .out = E * 4, .run = take_rows},
        {.name = "sample", .in = V, .out = 9 * 4, .run = sample},
        {.name = "score", .in = V, .out = 5 * 4, .run = score},
    };
    for (size_t i = 0; i < TD_COUNT(all); i++) {
        row_op op = all[i];
        op.who = o->family, op.with = o;
        op.keeps_nan = op.run != sample && op.run != score;
        row_op_check(&op);
    }
}

int main(void)
{
    const td_ops *o;
    for (int f = 0; (o = td_ops_family(f)); f++)
        for (E = 70; E <= 72; E += 2) check_all(o);
    return T_DONE();
}
