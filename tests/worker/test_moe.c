// SPDX-License-Identifier: Apache-2.0
/* tests/worker/test_moe.c - mixtures of experts as checkpoints: both layouts on disk give the same bits, what
 * does not fit is refused by name, dummy models, bytes a row reads; and the fast families against ref.
 *
 * Rounding flips near ties of the router, and a flip changes its row by as much as two experts differ, and a little
 * every later row of its sequence, which attends to it. So large errors say nothing of arithmetic (transformers in bf16:
 * 1.2 of the largest logit on mixtral), and a limit that lets them pass sees nothing. Instead:
 *   routes of ref held still: every row of every case has the error of a dense model;
 *   free: so has every row up to the first flip of its sequence; and that flip is one that such errors can make: the
 *   router's logits are as exact as all others, so the two experts are closer than twice the limit. */
#include "common/log.h"
#include "tests/t.h"
#include "tests/worker/support_step.h"
#include "worker/model/safetensors.h"
#include <sys/stat.h>
#include <unistd.h>

enum { MAX_ROWS = 160, CASES = 5 };

static td_pool *pool;
static char dir[64];

static td_model *open_as(const char *from, const char *shape, const td_ops *ops)
{
    td_model *m = NULL;
    td_model_opts o = {.dir = from,
                       .dummy_shape = shape,
                       .ops = ops,
                       .pool = pool,
                       .max_rows = MAX_ROWS,
                       .max_logits = MAX_ROWS};
    T_OK(td_model_open(&o, &m) == TD_OK, "%s", td_reason());
    return m;
}

/* Logits of all n tokens. */
static void logits_of(td_model *m, const td_ops *ops, const int32_t *ids, int n, float *out)
{
    ts_kv kv;
    ts_kv_open(&kv, td_model_descr(m), ops, 16, MAX_ROWS, 1);
    ts_seq q = {0, 0, n, ids};
    td_step *s = ts_step(&kv, td_model_descr(m), &q, 1, true);
    T_OK(td_model_forward(m, s, kv.kv, out, NULL, NULL) == TD_OK, "%s", td_reason());
    free(s);
    ts_kv_close(&kv);
}

/* ---- routes held still ---- */

enum { MAX_CALLS = 8, MAX_K = 4 };
static struct {
    int calls, at;
    int32_t ids[MAX_CALLS][MAX_ROWS * MAX_K];
    float *logits[MAX_CALLS];
    long slots, flips;
    double widest; /* largest distance of a flipped expert from the least chosen one, in logits of ref */
} tape;
static const td_ops *real;

/* What a dense model of this size makes in bf16: goldens' err_bf16 are 0.02 to 0.11, transformers' KL 2e-4 to 1e-3. */
static const double max_error = 0.05, max_kl = 2e-3;

/* A family that chooses freely: the first row of the case that goes elsewhere than ref's, and how near the tie was. */
static struct { int row; double margin, largest; } flip;

static void record(td_pool *p, const td_route_law *law, const float *logits, int T, int32_t *ids,
                   float *weights)
{
    int k = tape.calls++;
    T_OK(k < MAX_CALLS && law->top_k <= MAX_K && T <= MAX_ROWS);
    real->moe_route(p, law, logits, T, ids, weights);
    memcpy(tape.ids[k], ids, (size_t)(T * law->top_k) * sizeof *ids);
    size_t n = (size_t)T * (size_t)law->n_experts * sizeof *logits;
    tape.logits[k] = realloc(tape.logits[k], n);
    memcpy(tape.logits[k], logits, n);
}

static void count_flips(const td_route_law *law, int call, int t, const int32_t *mine)
{
    const int32_t *theirs = tape.ids[call] + (size_t)t * (size_t)law->top_k;
    const float *l = tape.logits[call] + (size_t)t * (size_t)law->n_experts;
    for (int i = 0; i < law->top_k; i++) {
        bool found = false;
        for (int j = 0; j < law->top_k; j++) found = found || mine[i] == theirs[j];
        tape.slots++;
        if (found) continue;
        tape.flips++;
        tape.widest = fmax(tape.widest, (double)(l[theirs[law->top_k - 1]] - l[mine[i]]));
    }
}

/* The recorded ids with this family's own logits; its own choice is only counted. */
static void replay(td_pool *p, const td_route_law *law, const float *logits, int T, int32_t *ids,
                   float *weights)
{
    int call = tape.at++, k = law->top_k;
    T_OK(call < tape.calls);
    real->moe_route(p, law, logits, T, ids, weights);
    for (int t = 0; t < T; t++) {
        const float *l = logits + (size_t)t * (size_t)law->n_experts;
        int32_t *to = ids + (size_t)t * (size_t)k;
        double sum = 0;
        count_flips(law, call, t, to);
        memcpy(to, tape.ids[call] + (size_t)t * (size_t)k, (size_t)k * sizeof *to);
        for (int i = 0; i < k; i++) sum += exp((double)(l[to[i]] - l[to[0]]));
        for (int i = 0; i < k; i++)
            weights[(size_t)t * (size_t)k + (size_t)i] = (float)(exp((double)(l[to[i]] - l[to[0]])) / sum);
    }
}

static void watch(td_pool *p, const td_route_law *law, const float *logits, int T, int32_t *ids, float *weights)
{
    int call = tape.at++, k = law->top_k;
    T_OK(call < tape.calls);
    real->moe_route(p, law, logits, T, ids, weights);
    for (int t = 0; t < T; t++) {
        const float *l = tape.logits[call] + (size_t)t * (size_t)law->n_experts;
        long before = tape.flips;
        for (int e = 0; e < law->n_experts; e++) flip.largest = fmax(flip.largest, fabs((double)l[e]));
        tape.widest = 0;
        count_flips(law, call, t, ids + (size_t)t * (size_t)k);
        if (tape.flips == before || t > flip.row) continue;
        flip.margin = t < flip.row ? tape.widest
                                   : fmin(flip.margin, tape.widest); /* the first layer's, or a nearer one */
        flip.row = t;
    }
}

static double divergence(const float *want, const float *got, int n)
{
    double mw = want[0], mg = got[0], zw = 0, zg = 0, sum = 0;
    for (int i = 1; i < n; i++) mw = fmax(mw, want[i]), mg = fmax(mg, got[i]);
    for (int i = 0; i < n; i++) zw += exp(want[i] - mw), zg += exp(got[i] - mg);
    for (int i = 0; i < n; i++) sum += exp(want[i] - mw) / zw * (want[i] - mw - log(zw) - (got[i] - mg - log(zg)));
    return sum;
}

/* The case's largest error over rows [0, n), its largest logit, and the sum of the rows' divergences. */
static void add_rows(const float *want, const float *got, int n, double *worst, double *div)
{
    for (int i = 0; i < n * 320; i++) {
        double e = fabs((double)want[i] - (double)got[i]);
        *worst = e <= *worst ? *worst : e; /* NaN too */
    }
    for (int t = 0; t < n; t++) *div += divergence(want + (size_t)t * 320, got + (size_t)t * 320, 320);
}

static double largest(const float *x, int n)
{
    double most = 0;
    for (int i = 0; i < n; i++) most = fmax(most, fabs((double)x[i]));
    return most;
}

static void test_held(const char *name, const td_ops *ops)
{
    char from[256], path[300], key[20];
    td_safetensors *f = NULL;
    float *want = malloc(MAX_ROWS * 320 * sizeof *want), *got = malloc(MAX_ROWS * 320 * sizeof *got);
    double worst = 0, div = 0, most = 0, free_worst = 0, free_div = 0;
    int rows = 0, free_rows = 0;
    snprintf(from, sizeof from, "tests/golden/models/%s", name);
    snprintf(path, sizeof path, "%s/golden.safetensors", from);
    const td_ops *ref = td_ops_family(0);
    td_ops recording = *ref, replaying = *ops, watching = *ops;
    recording.moe_route = record, replaying.moe_route = replay, watching.moe_route = watch;
    td_model *a = open_as(from, NULL, &recording), *b = open_as(from, NULL, &replaying),
             *c = open_as(from, NULL, &watching);
    if (!a || !b || !c || td_safetensors_open(path, &f) < 0) exit(1);
    long slots, flips;
    double widest;
    tape.slots = tape.flips = 0, tape.widest = 0;
    for (int k = 0; k < CASES; k++) {
        int32_t ids[MAX_ROWS];
        snprintf(key, sizeof key, "ids_%d", k);
        const td_st_tensor *t = td_safetensors_find(f, key);
        int n = (int)t->shape[0];
        T_OK(n <= MAX_ROWS && td_st_read_i32(t, ids, (size_t)n) == TD_OK);
        tape.calls = tape.at = 0;
        real = ref;
        logits_of(a, ref, ids, n, want);
        real = ops;
        logits_of(b, ops, ids, n, got);
        add_rows(want, got, n, &worst, &div);
        most = fmax(most, largest(want, n * 320));
        rows += n;
        slots = tape.slots, flips = tape.flips, widest = tape.widest;
        tape.at = 0;
        flip.row = n, flip.margin = flip.largest = 0;
        logits_of(c, ops, ids, n, got);
        add_rows(want, got, flip.row, &free_worst, &free_div);
        free_rows += flip.row;
        T_OK(flip.margin <= 2 * max_error * flip.largest,
             "%s %s: row %d of case %d goes elsewhere by a margin of %g of %g", name, ops->family, flip.row,
             k, flip.margin, flip.largest);
        if (getenv("VERBOSE") && flip.row < n)
            printf("%-10s %-12s case %d: the first flip is in row %d, by %.4f (largest %.2f)\n", name,
                   ops->family, k, flip.row, flip.margin, flip.largest);
        tape.slots = slots, tape.flips = flips, tape.widest = widest;
    }
    if (getenv("VERBOSE"))
        printf("%-10s %-12s routes held: error %.2e, KL %.2e; %ld of %ld slots flipped, the widest by %.3f; "
               "free, %d of %d rows: "
               "error %.2e, KL %.2e\n",
               name, ops->family, worst / most, div / rows, tape.flips, tape.slots, tape.widest, free_rows,
               rows, free_worst / most, free_div / free_rows);
    T_OK(worst <= max_error * most && div <= max_kl * rows, "%s %s: error %g, KL %g", name, ops->family,
         worst / most, div / rows);
    T_OK(free_worst <= max_error * most && free_div <= max_kl * free_rows,
         "%s %s, free: error %g, KL %g of %d rows", name, ops->family, free_worst / most,
         free_div / free_rows, free_rows);
    T_OK(tape.flips * 100 <= 2 * tape.slots && tape.widest <= 0.1,
         "%s %s: %ld of %ld flipped, the widest by %g", name, ops->family, tape.flips, tape.slots,
         tape.widest);
    for (int k = 0; k < MAX_CALLS; k++) free(tape.logits[k]), tape.logits[k] = NULL;
    td_safetensors_close(f);
    td_model_close(a), td_model_close(b), td_model_close(c);
    free(want), free(got);
}

/* ---- layouts on disk, and what does not fit ---- */

enum { E = 32, H = 2, G = 1, D = 16, F = 20, V = 40, X = 5, MAX_TENSORS = 64, BYTES = 1 << 18 };

typedef enum { W123, PROJ, FUSED, FUSED_IN_BLOCK } layout;
typedef struct checkpoint {
    td_st_tensor t[MAX_TENSORS];
    char name[MAX_TENSORS][96];
    size_t n;
} checkpoint;

static const char qwen[] =
    "{\"architectures\":[\"Qwen3MoeForCausalLM\"],\"num_experts\":5,\"num_experts_per_tok\":2,\"moe_"
    "intermediate_size\":20,"
    "\"mlp_only_layers\":[0],\"vocab_size\":40,\"hidden_size\":32,\"intermediate_size\":24,\"num_hidden_"
    "layers\":2,"
    "\"num_attention_heads\":2,\"num_key_value_heads\":1,\"head_dim\":16,\"max_position_embeddings\":64}";
static const char mixtral[] =
    "{\"architectures\":[\"MixtralForCausalLM\"],\"num_local_experts\":5,\"num_experts_per_tok\":2,\"vocab_"
    "size\":40,"
    "\"hidden_size\":32,\"intermediate_size\":20,\"num_hidden_layers\":2,\"num_attention_heads\":2,"
    "\"num_key_value_heads\":1,\"max_position_embeddings\":64}";

/* Values are a function of `salt` alone, so that a tensor and its parts agree. */
static uint16_t values[BYTES];
static void fill_values(void)
{
    uint64_t s = 3;
    for (size_t i = 0; i < BYTES; i++) {
        s = s * UINT64_C(6364136223846793005) + UINT64_C(1442695040888963407);
        values[i] = td_f32_to_bf16(((float)(s >> 40) * 0x1p-24f - 0.5f) * 0.5f);
    }
}

static void put(checkpoint *c, const char *name, size_t salt, int a, int b, int d)
{
    td_st_tensor *t = &c->t[c->n];
    snprintf(c->name[c->n], sizeof c->name[0], "%s", name);
    *t = (td_st_tensor){.name = c->name[c->n],
                        .dtype = TD_ST_BF16,
                        .rank = d   ? 3
                                : b ? 2
                                    : 1,
                        .data = (const uint8_t *)(values + salt)};
    t->shape[0] = a, t->shape[1] = b, t->shape[2] = d;
    c->n++;
}

static void put_expert_matrices(checkpoint *c, int layer, layout how)
{
    static const char *const names[2][3] = {{"w1", "w3", "w2"}, {"gate_proj", "up_proj", "down_proj"}};
    const char *block = how == W123 || how == FUSED_IN_BLOCK ? "block_sparse_moe" : "mlp";
    size_t up = 1000 + 40000 * (size_t)layer, down = up + X * 2 * F * E;
    char name[96];
    snprintf(name, sizeof name, "model.layers.%d.%s.gate.weight", layer, block);
    put(c, name, 500, X, E, 0);
    if (how >= FUSED) {
        snprintf(name, sizeof name, "model.layers.%d.%s.experts.gate_up_proj", layer, block);
        put(c, name, up, X, 2 * F, E);
        snprintf(name, sizeof name, "model.layers.%d.%s.experts.down_proj", layer, block);
        put(c, name, down, X, E, F);
        return;
    }
    for (int e = 0; e < X; e++)
        for (int k = 0; k < 3; k++) {
            snprintf(name, sizeof name, "model.layers.%d.%s.experts.%d.%s.weight", layer, block, e,
                     names[how][k]);
            size_t at = (size_t)e;
            if (k < 2)
                put(c, name, up + at * 2 * F * E + (size_t)k * F * E, F, E, 0);
            else
                put(c, name, down + at * E * F, E, F, 0);
        }
}

static void put_layer(checkpoint *c, int layer, layout how, bool experts)
{
    static const struct {
        const char *name;
        int rows, cols;
    } all[] = {{"input_layernorm", E, 0},      {"post_attention_layernorm", E, 0},
               {"self_attn.q_proj", H * D, E}, {"self_attn.k_proj", G * D, E},
               {"self_attn.v_proj", G * D, E}, {"self_attn.o_proj", E, H * D},
               {"self_attn.q_norm", D, 0},     {"self_attn.k_norm", D, 0}};
    static const struct {
        const char *name;
        int rows, cols;
    } dense[] = {{"mlp.gate_proj", 24, E}, {"mlp.up_proj", 24, E}, {"mlp.down_proj", E, 24}};
    char name[96];
    for (size_t i = 0; i < sizeof all / sizeof *all; i++) {
        snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, all[i].name);
        put(c, name, 100 * i, all[i].rows, all[i].cols, 0);
    }
    for (size_t i = 0; i < 3 && !experts; i++) {
        snprintf(name, sizeof name, "model.layers.%d.%s.weight", layer, dense[i].name);
        put(c, name, 100 * i, dense[i].rows, dense[i].cols, 0);
    }
    if (experts) put_expert_matrices(c, layer, how);
}

static void write_file(const char *name, const char *text)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    T_OK(f && fwrite(text, 1, strlen(text), f) == strlen(text));
    if (f) fclose(f);
}

/* Tensor `change`: left out (how 0), a row more (1), another float type (2). */
static void write_checkpoint(layout how, const char *change, int what)
{
    static checkpoint c;
    char path[512];
    bool is_qwen = how == PROJ || how == FUSED;
    c.n = 0;
    put(&c, "model.embed_tokens.weight", 10, V, E, 0);
    put(&c, "lm_head.weight", 20, V, E, 0);
    put(&c, "model.norm.weight", 30, E, 0, 0);
    put_layer(&c, 0, how, !is_qwen);
    put_layer(&c, 1, how, true);
    for (size_t i = 0; i < c.n; i++) {
        if (strcmp(c.name[i], change)) continue;
        if (what == 1) c.t[i].shape[c.t[i].rank - 2]++;
        if (what == 2) c.t[i].dtype = TD_ST_F32;
        if (what == 0) {
            c.t[i] = c.t[c.n - 1];
            c.n--;
        }
        break;
    }
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    T_OK(td_safetensors_write(path, c.t, c.n) == TD_OK, "%s", td_reason());
    write_file("config.json", is_qwen ? qwen : mixtral);
}

static const int32_t prompt[9] = {3, 1, 4, 1, 5, 9, 2, 6, 39};

static void test_layouts(const td_ops *ops)
{
    float out[4][9 * V];
    size_t row_bytes[4];
    for (int i = 0; i < 4; i++) {
        write_checkpoint((layout)i, "", -1);
        td_model *m = open_as(dir, NULL, ops);
        if (!m) return;
        logits_of(m, ops, prompt, 9, out[i]);
        row_bytes[i] = td_model_weight_bytes(m);
        td_model_close(m);
    }
    T_OK(!memcmp(out[W123], out[FUSED_IN_BLOCK], sizeof out[0]), "%s: mixtral, each and all in one",
         ops->family);
    T_OK(!memcmp(out[PROJ], out[FUSED], sizeof out[0]), "%s: qwen, each and all in one", ops->family);
    bool finite = true;
    for (int i = 0; i < 9 * V; i++) finite = finite && isfinite(out[0][i]) && isfinite(out[1][i]);
    T_OK(finite && memcmp(out[W123], out[PROJ], sizeof out[0]));
    T_OK(row_bytes[0] == row_bytes[3] && row_bytes[1] == row_bytes[2]);
    if (strcmp(ops->family, "ref")) return;
    size_t attention = (H + 2 * G) * D * E + E * H * D, norms = 2 * E;
    size_t layer = 2 * (attention + X * E + 2 * 3 * F * E) + 4 * norms; /* two of five experts */
    T_EQ(row_bytes[0], 2 * layer + 4 * E + 2 * V * E);
}

static void test_misfits(void)
{
    static const struct {
        layout how;
        const char *change;
        int what;
        td_status st;
        const char *reason;
    } cases[] = {
        {W123, "model.layers.1.block_sparse_moe.gate.weight", 0, TD_EPROTO, "block_sparse_moe.gate.weight"},
        {W123, "model.layers.0.block_sparse_moe.experts.4.w3.weight", 0, TD_EPROTO,
         "no tensor \"model.layers.0.block_sparse_moe.experts.4.w3.weight\""},
        {W123, "model.layers.0.block_sparse_moe.experts.0.w1.weight", 0, TD_EPROTO, "experts.0.w1.weight"},
        {W123, "model.layers.1.block_sparse_moe.experts.2.w2.weight", 1, TD_EPROTO,
         "has shape [33, 20], config.json makes it [32, 20]"},
        {W123, "model.layers.1.block_sparse_moe.gate.weight", 1, TD_EPROTO, "has shape [6, 32]"},
        {PROJ, "model.layers.1.mlp.experts.3.up_proj.weight", 0, TD_EPROTO, "mlp.experts.3.up_proj.weight"},
        {PROJ, "model.layers.1.mlp.experts.3.up_proj.weight", 2, TD_ENOSUP,
         "is f32, but the parts joined with it are bf16"},
        {PROJ, "model.layers.1.mlp.gate.weight", 0, TD_EPROTO, "mlp.gate.weight"},
        {PROJ, "model.layers.0.mlp.up_proj.weight", 0, TD_EPROTO, "model.layers.0.mlp.up_proj.weight"},
        {FUSED, "model.layers.1.mlp.experts.gate_up_proj", 0, TD_EPROTO, "experts.gate_up_proj"},
        {FUSED, "model.layers.1.mlp.experts.down_proj", 0, TD_EPROTO, "experts.down_proj"},
        {FUSED, "model.layers.1.mlp.experts.gate_up_proj", 1, TD_EPROTO,
         "has shape [5, 41, 32], config.json makes it [5, 40, 32]"},
        {FUSED, "model.layers.1.mlp.gate.weight", 2, TD_OK, ""}, /* a router may be of any float type */
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        td_model *m = NULL;
        td_model_opts o = {.dir = dir, .ops = td_ops_family(0), .pool = pool, .max_rows = 8, .max_logits = 8};
        write_checkpoint(cases[i].how, cases[i].change, cases[i].what);
        td_status st = td_model_open(&o, &m);
        T_OK(st == cases[i].st && (st == TD_OK || strstr(td_reason(), cases[i].reason)), "%s: %s (%s)",
             cases[i].change, td_status_name(st), td_reason());
        td_model_close(m);
    }
}

/* ---- dummy models ---- */

static void test_dummy(const td_ops *ops)
{
    static const char *const shapes[] = {"moe-tiny", "ranks-tiny", "ranks-mqa"};
    static float x[9 * 509], y[9 * 509];
    for (int i = 0; i < 3; i++) {
        td_model *a = open_as(NULL, shapes[i], ops), *b = open_as(NULL, shapes[i], ops);
        if (!a || !b) return;
        logits_of(a, ops, prompt, 9, x);
        logits_of(b, ops, prompt, 9, y);
        bool finite = true, varied = false;
        for (int k = 0; k < 9 * 509; k++) finite = finite && isfinite(x[k]), varied = varied || x[k] != x[0];
        T_OK(finite && varied && !memcmp(x, y, sizeof x), "%s %s", ops->family, shapes[i]);
        td_model_close(a), td_model_close(b);
    }
    td_model *m = open_as("tests/golden/models/qwen3-moe", "dir", ops);
    if (!m) return;
    logits_of(m, ops, prompt, 9, x);
    for (int k = 0; k < 320; k++) T_OK(isfinite(x[k]));
    td_model_close(m);
}

int main(void)
{
    char path[512];
    td_log_open("test", TD_LOG_ERROR);
    pool = td_pool_open(2);
    snprintf(dir, sizeof dir, "/tmp/td-moe-%d", (int)getpid());
    mkdir(dir, 0755);
    fill_values();
    for (int i = 0; td_ops_family(i); i++) {
        test_layouts(td_ops_family(i));
        test_dummy(td_ops_family(i));
        if (i) test_held("mixtral", td_ops_family(i)), test_held("qwen3-moe", td_ops_family(i));
    }
    test_misfits();
    td_pool_close(pool);
    snprintf(path, sizeof path, "%s/model.safetensors", dir), unlink(path);
    snprintf(path, sizeof path, "%s/config.json", dir), unlink(path);
    T_OK(rmdir(dir) == 0, "the test leaves nothing");
    return T_DONE();
}
