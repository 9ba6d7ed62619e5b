// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_replay_cuda.c - steps that are recorded and replayed (td_replay of kernels/ops.h) beside
 * the same steps queued launch by launch: the same logits and the same pages, byte for byte, while sequences
 * come, grow, move and go. On the shim and on a device. */
#include "kernels/cuda.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"
#include "tests/worker/support_step.h"

enum { SEQS = 12, MAX_TOKENS = 304, MAX_ROWS = 64, P = 16 };

static const td_ops *cuda;
static td_ops plain; /* the table without replay */

/* One way to compute, with pages of its own. */
typedef struct side {
    td_model *m;
    ts_kv kv;
    float *logits; /* device, [MAX_ROWS][V] */
    size_t bytes[TD_MAX_GROUPS];
} side;

typedef struct pair {
    side replayed, queued;
    size_t V;
    int len[SEQS];
    int32_t ids[SEQS][MAX_TOKENS];
    int layers; /* told by on_layer */
} pair;

static side side_open(const char *name, const td_ops *ops)
{
    char dir[200];
    side s = {0};
    snprintf(dir, sizeof dir, "tests/golden/models/%s", name);
    td_model_opts o = {.dir = dir, .ops = ops, .pool = team(1), .max_rows = MAX_ROWS, .max_logits = MAX_ROWS};
    T_OK(td_model_open(&o, &s.m) == TD_OK, "%s: %s", name, td_reason());
    TD_CHECK(s.m);
    const td_model_desc *d = td_model_descr(s.m);
    s.kv = (ts_kv){.pages_per_seq = (MAX_TOKENS + P - 1) / P, .n_groups = d->n_groups, .drop_window = true};
    for (int g = 0; g < d->n_groups; g++) {
        td_kv *kv = &s.kv.kv[g];
        *kv = (td_kv){NULL, ops->kv_dtype, s.kv.pages_per_seq * SEQS + 3, P, d->group[g].G, d->group[g].D};
        s.bytes[g] = td_kv_page_bytes(kv) * (size_t)kv->n_pages * (size_t)d->group[g].n_slots;
        kv->base = dev_new(s.bytes[g]);
        dev()->fill(dev(), TD_STREAM_COMPUTE, kv->base, 0xff,
                    s.bytes[g]); /* NaN: what is read unwritten shows */
    }
    s.logits = dev_new((size_t)MAX_ROWS * (size_t)d->V * sizeof *s.logits);
    return s;
}

static pair *pair_open(const char *name)
{
    pair *p = calloc(1, sizeof *p);
    uint64_t seed = 11;
    p->replayed = side_open(name, cuda);
    p->queued = side_open(name, &plain);
    p->V = (size_t)td_model_descr(p->queued.m)->V;
    for (int i = 0; i < SEQS; i++)
        for (int t = 0; t < MAX_TOKENS; t++) p->ids[i][t] = (int32_t)(rnd_next(&seed) % p->V);
    return p;
}

static void pair_close(pair *p)
{
    td_model_close(p->replayed.m);
    td_model_close(p->queued.m);
    dev_done();
    free(p);
}

static td_replay_stats stats(void)
{
    td_replay_stats s;
    cuda->replay->stats(&s);
    return s;
}

static void count_layer(void *arg, int layer)
{
    pair *p = arg;
    (void)layer;
    p->layers++;
}

static void run_side(pair *p, side *s, const ts_seq *q, int n, bool all, float *out)
{
    const td_model_desc *d = td_model_descr(s->m);
    td_step *step = ts_step(&s->kv, d, q, n, all);
    p->layers = 0;
    T_OK(td_model_forward(s->m, step, s->kv.kv, s->logits, count_layer, p) == TD_OK, "%s", td_reason());
    T_EQ(p->layers, d->L);
    td_model_record(s->m);
    T_OK(td_cuda_ops_status() == TD_OK &&
             dev_get(out, s->logits, (size_t)step->n_logits * p->V * sizeof *out),
         "%s", simt_last_error());
    free(step);
}

/* `rows` more tokens of each of these sequences, both ways. */
static void advance(pair *p, const int *seqs, int n, int rows, const char *why)
{
    size_t bytes = (size_t)n * p->V * sizeof(float);
    float *a = malloc(bytes), *b = malloc(bytes);
    ts_seq q[SEQS];
    for (int i = 0; i < n; i++) {
        q[i] = (ts_seq){seqs[i], p->len[seqs[i]], rows, p->ids[seqs[i]] + p->len[seqs[i]]};
        p->len[seqs[i]] += rows;
    }
    run_side(p, &p->replayed, q, n, false, a);
    run_side(p, &p->queued, q, n, false, b);
    T_OK(!memcmp(a, b, bytes), "%s: %d sequences, the first with %d tokens: logits differ", why, n,
         q[0].pos0);
    free(a), free(b);
}

static void same_pages(pair *p, const char *why)
{
    for (int g = 0; g < p->queued.kv.n_groups; g++) {
        size_t n = p->queued.bytes[g];
        char *a = malloc(n), *b = malloc(n);
        T_OK(dev_get(a, p->replayed.kv.kv[g].base, n) && dev_get(b, p->queued.kv.kv[g].base, n));
        T_OK(!memcmp(a, b, n), "%s: pages of group %d differ", why, g);
        free(a), free(b);
    }
}

/* ---- sequences come, grow, change places and go ---- */

static void test_steps(const char *name)
{
    static const struct {
        int n, first;
    } steps[] = {{1, 0}, {1, 0}, {1, 3}, {2, 0}, {2, 1}, {3, 0},  {4, 0}, {3, 2},
                 {4, 5}, {1, 2}, {5, 0}, {8, 0}, {7, 3}, {12, 0}, {9, 2}, {2, 4}};
    pair *p = pair_open(name);
    int all[SEQS], few = simt_checks() ? 4 : SEQS, ran = 0;
    for (int i = 0; i < few; i++) {
        all[0] = i;
        advance(p, all, 1, 3 + i * 4 % 30, "prompt");
    }
    for (int i = 0; i < few; i++) all[i] = i;
    td_replay_stats first = stats(), before;
    advance(p, all, few, 1, "all"); /* workspaces have their sizes now */
    before = stats();
    for (size_t s = 0; s < TD_COUNT(steps); s++) {
        if (steps[s].n + steps[s].first > few) continue;
        for (int i = 0; i < steps[s].n; i++) all[i] = (steps[s].first + (i * 5 + (int)s) % steps[s].n) % few;
        for (int i = 0; i < steps[s].n; i++)
            all[i] = steps[s].first + i; /* and in another order every other time */
        for (int i = 0; s % 2 && i < steps[s].n / 2; i++) {
            int t = all[i];
            all[i] = all[steps[s].n - 1 - i];
            all[steps[s].n - 1 - i] = t;
        }
        advance(p, all, steps[s].n, 1, name);
        ran++;
    }
    td_replay_stats after = stats();
    td_model_idle idle = td_model_idle_time(p->replayed.m);
    if (after.failed ==
        first.failed) /* all but the first ones, and the last two, which nobody has asked yet */
        T_OK(idle.steps + 4 >= (uint64_t)ran && idle.steps <= (uint64_t)ran && idle.us >= 0 &&
                 idle.most_us <= idle.us,
             "%d of %d", (int)idle.steps, ran);
    T_EQ(td_model_idle_time(p->queued.m).steps, 0);
    if (after.failed == first.failed) { /* of 1, 2, 4 and 8 rows, and of all */
        uint64_t sizes = few < SEQS ? 2 : 4;
        T_EQ(after.recorded - before.recorded, sizes);
        T_EQ(after.runs - before.runs, (uint64_t)ran - sizes);
    } else {
        T_OK(td_model_descr(p->queued.m)->moe.route.n_experts > 0, "%s is not recorded", name);
        T_EQ(after.failed - first.failed, 1);
    }
    same_pages(p, name);
    pair_close(p);
    T_EQ(stats().dropped - first.dropped, stats().recorded - first.recorded); /* with the model */
}

/* Over the border of a split of keys: the recording is that of a short context. */
static void test_growth(const char *name)
{
    pair *p = pair_open(name);
    int two[2] = {4, 1}, swapped[2] = {1, 4}, other = 7;
    td_replay_stats before = stats();
    advance(p, &other, 1, 61, "another sequence"); /* workspaces have their sizes now */
    advance(p, two, 2, 1, "prompts"); /* makes as much room for partial results as a short context takes */
    for (int i = 0; i < 3; i++) advance(p, two, 2, 1, "short");
    for (int i = 0; i < 4; i++) advance(p, two, 1, 61, "a longer prompt");
    for (int i = 0; i < 15; i++) advance(p, i % 2 ? two : swapped, 2, 1, "long");
    T_OK(p->len[4] > 256 && p->len[4] % P != p->len[1] % P, "%d, %d", p->len[4], p->len[1]);
    T_EQ(stats().recorded - before.recorded, 1);
    T_EQ(stats().runs - before.runs, 1 + 3 + 15 - 1);
    same_pages(p, name);
    pair_close(p);
}

/* ---- what cannot be recorded ---- */

static td_status (*real_begin)(td_dev *d, td_stream_kind s);
static td_status (*real_end)(td_dev *d, td_stream_kind s, td_graph **out);

static td_status no_begin(td_dev *d, td_stream_kind s)
{
    (void)d, (void)s;
    return td_fail(TD_EDEVICE, "planted: no recording");
}

static td_status no_end(td_dev *d, td_stream_kind s, td_graph **out)
{
    td_graph *g = NULL;
    if (real_end(d, s, &g) == TD_OK) d->graph_close(d, g);
    (void)out;
    return td_fail(TD_EDEVICE, "planted: the recording is lost");
}

static void test_failure(bool at_end)
{
    pair *p = pair_open("llama-gqa");
    int one[3] = {2, 3, 5};
    td_replay_stats before = stats();
    real_begin = dev()->capture_begin;
    real_end = dev()->capture_end;
    if (at_end)
        dev()->capture_end = no_end;
    else
        dev()->capture_begin = no_begin;
    advance(p, one, 3, 9, "prompt");
    for (int i = 0; i < 3; i++) advance(p, one, 3, 1, "not recorded");
    dev()->capture_begin = real_begin;
    dev()->capture_end = real_end;
    T_EQ(cuda->replay->rows(p->replayed.m, 3), 0); /* told once, and no padding for nothing */
    T_EQ(cuda->replay->rows(p->queued.m, 3), 4);
    for (int i = 0; i < 2; i++) advance(p, one, 3, 1, "not recorded");
    T_EQ(stats().failed - before.failed, 1);
    T_EQ(stats().runs, before.runs);
    same_pages(p, "not recorded");
    pair_close(p);
}

/* ---- the limit ---- */

/* Many keys of one launch each: the one unused for longest goes. */
static void test_limit(void)
{
    enum { KEYS = 60, N = 64 };
    float x[N], got[N];
    for (int i = 0; i < N; i++) x[i] = (float)(i % 5) + 1;
    float *in = dev_put(x, sizeof x), *w = dev_put(x, sizeof x), *out = dev_new(KEYS * sizeof x);
    td_replay_stats a = stats();
    const td_replay *r = cuda->replay;
    int owner;
    for (int k = 0; k < KEYS; k++) {
        td_replay_key key = {.owner = &owner, .rows = 1, .word = {(uint64_t)k}},
                      first = {.owner = &owner, .rows = 1, .word = {0}};
        T_OK(!r->run(&key), "key %d", k);
        T_OK(r->record_begin(&key));
        cuda->rmsnorm(NULL, in, N, w, 1e-5f, 1, N, out + k * N, N);
        r->record_end();
        T_OK(r->run(&key) && r->run(&first) && dev_get(got, out + k * N, sizeof got), "key %d", k);
    }
    td_replay_stats b = stats();
    T_EQ(b.recorded - a.recorded, KEYS);
    T_EQ(b.runs - a.runs, 2 * KEYS);
    T_OK(b.dropped - a.dropped > 0 && b.dropped - a.dropped < KEYS / 2, "%d dropped",
         (int)(b.dropped - a.dropped));
    r->drop(&owner);
    T_EQ(stats().dropped - a.dropped, KEYS);
    dev_done();
}

/* A recording serves as many partial results of attention as there was room for, and is gone when more come.
 */
static void test_parts(void)
{
    enum { D = 16 };
    const td_replay *r = cuda->replay;
    float q[D] = {1};
    int32_t page = 0;
    td_attn_place seq = {0, 1, 3, 0};
    td_kv kv = {NULL, cuda->kv_dtype, 1, P, 1, D};
    kv.base = dev_new(td_kv_page_bytes(&kv));
    dev()->fill(dev(), TD_STREAM_COMPUTE, kv.base, 0, td_kv_page_bytes(&kv));
    td_attn_placed at = {dev_put(&seq, sizeof seq), 1, dev_put(&page, sizeof page), 0, true, 1};
    td_attn_args a = {
        .q = dev_put(q, sizeof q), .ldq = D, .out = dev_new(sizeof q), .ldo = D, .out_dtype = TD_F32};
    a.kv = &kv, a.placed = &at, a.H = a.G = 1, a.D = D, a.scale = 1;
    td_replay_key key = {.owner = &seq, .rows = 1, .parts = 1}, much = key, more = key;
    much.parts = (size_t)1 << 17;
    more.parts = much.parts + 1;
    cuda->attention(NULL, NULL, &a);
    T_OK(r->record_begin(&key));
    cuda->attention(NULL, NULL, &a);
    r->record_end();
    T_OK(r->run(&key));
    T_OK(!r->run(&more)); /* with the other kernel's launch */
    T_OK(r->run(&key));
    T_OK(!r->run(&much));
    T_OK(!r->run(&key));
    T_OK(td_cuda_ops_status() == TD_OK, "%s", td_reason());
    r->drop(&seq);
    dev_done();
}

static void test_rows(void)
{
    int owner, last = 0;
    for (int n = 1; n <= TD_REPLAY_MAX_ROWS; n++) {
        int rows = cuda->replay->rows(&owner, n);
        T_OK(rows >= n && rows >= last && rows <= n + TD_MAX(n, 8) &&
                 cuda->replay->rows(&owner, rows) == rows,
             "%d -> %d", n, rows);
        last = rows;
    }
    T_EQ(cuda->replay->rows(&owner, 0), 0);
    T_EQ(cuda->replay->rows(&owner, TD_REPLAY_MAX_ROWS + 1), 0);
}

int main(void)
{
    T_OK(td_cuda_ops_open(dev(), &cuda) == TD_OK, "%s", td_reason());
    if (!cuda) return T_DONE();
    plain = *cuda;
    plain.replay = NULL;
    test_rows();
    test_limit();
    test_parts();
    test_steps("llama-gqa");
    test_steps("mistral-swa");
    test_steps("qwen3");
    if (!simt_checks()) test_steps("mixtral");
    if (!simt_checks()) test_growth("llama-gqa");
    if (!simt_checks()) test_growth("mistral-swa");
    test_failure(false);
    test_failure(true);
    td_cuda_ops_steps(true, true);
    T_OK(cuda->replay != NULL);
    td_cuda_ops_steps(false, false);
    T_OK(!cuda->replay);
    td_cuda_ops_close();
    td_dev_close(dev());
    return T_DONE();
}
