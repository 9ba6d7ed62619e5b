/* Every way to cut 1, 2, 4 and 8 ranks into tensor x pipeline x context parallel (and expert parallel, and
 * with weights fully sharded, and into replicas), against one rank: tokens, log probabilities and logits,
 * byte for byte. Prompts of odd lengths, an odd vocabulary, 2 and 1 kv heads, experts; small attention
 * splits, so that short prompts lie on several ranks. */
// SPDX-License-Identifier: Apache-2.0
#include "common/log.h"
#include "tests/worker/support_engine.h"
#include "tests/worker/support_ranks.h"
#include <unistd.h>

enum { N = 9, V = 509, PAGES = 400, FEW_PAGES = 40 };

static te_spec spec[N];
static te_result want[N], got[N];
static const td_ops *ops;

typedef struct logit_log {
    float (*row)[V];
    uint32_t n;
} logit_log;
static logit_log want_logits, got_logits;

static void take_logits(void *arg, uint64_t key, uint32_t position, const float *logits)
{
    logit_log *l = arg;
    (void)key;
    if (position >= 64) return;
    memcpy(l->row[position], logits, sizeof l->row[0]);
    l->n++;
}

static void make_specs(void)
{
    static const uint32_t lengths[N] = {1, 7, 37, 65, 129, 131, 200, 33, 90};
    for (int i = 0; i < N; i++) {
        spec[i] = te_make((uint64_t)i + 1, lengths[i], 5 + (uint32_t)i, V);
        te_vary(&spec[i], V);
        if (i == 5) memcpy(spec[i].prompt, spec[4].prompt, 128 * sizeof(uint32_t)); /* a prefix to hit */
    }
    spec[3].leg.sampling.n = 3;
    spec[3].leg.sampling.temperature = 1;
}

typedef struct job {
    te_result *to;
    logit_log *logits;
} job;

static int n_ahead; /* steps of the last run with ids that were not known when they were planned */

static void on_step(void *arg, const td_step *s)
{
    (void)arg;
    n_ahead += s->n_before > 0;
}

static void run_all(td_engine *e, void *arg)
{
    const job *j = arg;
    td_leg all = *te_leg(&spec[8]);
    td_engine_out out;
    bool over = false;
    n_ahead = 0;
    td_engine_on_step(e, on_step, NULL);
    for (int i = 0; i < N; i++) te_expect(&spec[i], &j->to[i]);
    te_run(e, spec, j->to, N);
    all.key = 77, all.all_logits = true;
    all.sampling = (td_sampling){
        .top_p = 1, .repetition_penalty = 1, .max_tokens = 1, .n = 1, .logprobs = -1, .prompt_logprobs = -1};
    td_engine_on_logits(e, take_logits, j->logits);
    j->logits->n = 0;
    T_OK(td_engine_start(e, &all) == TD_OK, "%s", td_reason());
    while (!over && td_engine_turn(e, &out) == TD_OK) over = out.n_end > 0;
    te_drain(e);
    T_OK(over && te_ledger(e, true), "pages are left");
}

static void check(tr_opts o, const char *what, bool first)
{
    job j = first ? (job){want, &want_logits} : (job){got, &got_logits};
    bool ok = tr_run(&o, run_all, &j);
    T_OK(ok, "%s", what);
    if (first || !ok) return;
    T_EQ(n_ahead > 0, o.depth > 1 && o.grid.pp == 1 && o.grid.cp == 1);
    for (int i = 0; i < N; i++) te_same(&spec[i], &want[i], &got[i], what);
    T_EQ(got_logits.n, want_logits.n);
    T_OK(!memcmp(got_logits.row, want_logits.row, 64 * sizeof got_logits.row[0]), "%s: logits", what);
}

static tr_opts base_opts(const char *shape)
{
    return (tr_opts){.shape = shape,
                     .ops = ops,
                     .attn_split = 64,
                     .depth = 1,
                     .engine = {.page_size = 16,
                                .kv_pages = PAGES,
                                .max_batched_tokens = 96,
                                .max_seqs = 16,
                                .max_legs = 32,
                                .max_model_len = 300,
                                .prefix_cache = true,
                                .hash_key = {3, 4}}};
}

static void all_grids(const char *shape, bool experts)
{
    tr_opts o = base_opts(shape);
    char what[160];
    int count = 0;
    o.grid = (td_grid){.tp = 1, .pp = 1, .cp = 1, .dp = 1};
    check(o, "one rank", true);
    for (int ranks = 1; ranks <= 8; ranks *= 2)
        for (int cut = 0; cut < 64; cut++)
            for (int mode = 0; mode < 4; mode++) {
                int tp = 1 << (cut & 3), pp = 1 << (cut >> 2 & 3), cp = 1 << (cut >> 4),
                    dp = ranks / tp / pp / cp;
                bool ep = mode & 1, fsdp = mode & 2;
                if (tp * pp * cp * dp != ranks || pp > 4 || ep > experts || (fsdp && cp * dp == 1))
                    continue; /* 4 layers: eight_stages() */
                if (dp > 1 && !experts && (cut + mode) % 4)
                    continue; /* replicas meet where there are experts: there all */
                o.grid = (td_grid){.tp = tp, .pp = pp, .cp = cp, .dp = dp, .ep = ep, .fsdp = fsdp};
                o.block_rows = count % 3 == 0   ? 1
                               : count % 3 == 1 ? 8
                                                : 1000; /* blocks of rows always, sometimes, never */
                o.cp_mode = (td_cp_mode)(count % 3);
                o.least_workspace = count % 4 > 1;
                o.depth = pp > 1 ? pp + count % 2 : 1 + count % 2; /* one for each stage, or one more */
                o.engine.page_size = count % 2 ? 16 : 32;
                o.engine.kv_pages =
                    dp > 1 && count % 3 == 0 ? FEW_PAGES : PAGES; /* legs that must wait, or give way */
                snprintf(what, sizeof what,
                         "%s: tensor %d, pipeline %d, context %d, data %d%s%s, blocks from %d, keys %d, "
                         "pages %d%s",
                         shape, tp, pp, cp, dp, ep ? ", experts" : "", fsdp ? ", sharded" : "", o.block_rows,
                         (int)o.cp_mode, o.engine.page_size, o.least_workspace ? ", least workspace" : "");
                check(o, what, false);
                count++;
            }
}

/* Eight stages, which need more layers than the shapes of all_grids have. */
static void eight_stages(void)
{
    static const tr_config of[] = {{9, 2, 256, 0}, {8, 1, 128, 0}, {11, 2, 128, 8}};
    for (size_t i = 0; i < TD_COUNT(of); i++) {
        char dir[32];
        tr_make_dir(dir, of[i]);
        tr_opts o = base_opts("tiny"); /* random weights; the sizes are dir's */
        o.dir = dir;
        o.grid = (td_grid){.tp = 1, .pp = 1, .cp = 1, .dp = 1};
        check(o, "one rank of many layers", true);
        for (int extra = 0; extra < 2; extra++) {
            o.grid.pp = 8, o.depth = 8 + extra;
            o.grid.ep = of[i].experts && extra; /* all experts of a stage on its rank */
            check(o, of[i].experts ? "eight stages, experts" : "eight stages", false);
            o.grid = (td_grid){.tp = 1, .pp = 1, .cp = 1, .dp = 1};
        }
        tr_drop_dir(dir);
    }
}

/* One grid of each kind, with everything that exchanges something. */
static void some_grids(void)
{
    static const struct {
        const char *shape;
        td_grid grid;
        td_cp_mode mode;
    } some[] = {{"ranks-tiny", {.tp = 2, .pp = 1, .cp = 2, .dp = 1}, TD_CP_PASS_Q},
                {"ranks-tiny", {.tp = 1, .pp = 2, .cp = 2, .dp = 1, .fsdp = true}, TD_CP_PASS_KV},
                {"moe-tiny", {.tp = 2, .pp = 1, .cp = 1, .dp = 2, .ep = true}, TD_CP_AUTO},
                {"moe-tiny", {.tp = 2, .pp = 2, .cp = 1, .dp = 1}, TD_CP_AUTO}};
    for (size_t i = 0; i < TD_COUNT(some); i++) {
        tr_opts o = base_opts(some[i].shape);
        o.grid = (td_grid){.tp = 1, .pp = 1, .cp = 1, .dp = 1};
        check(o, "one rank", true);
        for (int k = 0; k < 2; k++) {
            o.grid = some[i].grid, o.cp_mode = some[i].mode, o.depth = o.grid.pp, o.block_rows = k ? 1 : 1000,
            o.least_workspace = k;
            check(o, some[i].shape, false);
        }
    }
}

/* ---- news of the other ranks, while steps are in flight ---- */

enum { ANSWER = 4000 }; /* bytes: more than goes without the other side */

typedef struct polls {
    int heard[8], answered, waited, ranks;
} polls;

static size_t answer(void *arg, void *out, size_t cap)
{
    const int *rank = arg;
    if (*rank % 2 == 0 || cap < ANSWER) return 0; /* nothing new */
    memset(out, *rank, ANSWER);
    return ANSWER;
}

static td_status hear(void *arg, const void *p, size_t n)
{
    polls *h = arg;
    const uint8_t *b = p;
    T_OK(n == ANSWER && b[0] < h->ranks && b[0] == b[n - 1]);
    h->heard[b[0] % 8]++;
    return TD_OK;
}

/* Polls answer once the steps before them are collected; the engine is closed with steps and a poll under
 * way. */
static void run_polls(td_engine *e, void *arg)
{
    polls *h = arg;
    td_engine_out out;
    for (int i = 0; i < N; i++) T_OK(td_engine_start(e, te_leg(&spec[i])) == TD_OK, "%s", td_reason());
    for (int i = 0; i < 12; i++) {
        T_OK(td_engine_turn(e, &out) == TD_OK, "%s", td_reason());
        td_status s = td_engine_poll(e, hear, h);
        T_OK(s >= 0, "%s", td_reason());
        if (s == TD_OK)
            h->answered++;
        else
            h->waited++;
    }
}

static void polled(int tp, int pp, int cp, int dp)
{
    polls h = {.ranks = tp * pp * cp * dp};
    tr_opts o = base_opts("ranks-tiny");
    o.grid = (td_grid){.tp = tp, .pp = pp, .cp = cp, .dp = dp};
    o.depth = pp;
    o.on_poll = answer;
    T_OK(tr_run(&o, run_polls, &h), "polls: tensor %d, pipeline %d, context %d, data %d", tp, pp, cp, dp);
    T_OK(h.answered > 0 && (h.waited > 0) == (pp > 1), "%d answers, %d times none yet", h.answered, h.waited);
    for (int r = 1; r < h.ranks; r++) T_EQ(h.heard[r], r % 2 ? h.answered : 0);
}

/* ---- what rank 0 works out while the others wait ---- */

enum { DEADLINE_US = 1000000, WORK_US = 1500000, TICK_US = 20000 };
typedef struct waiter {
    pthread_t thread;
    td_coll *world;
    bool dies;
    _Atomic bool *dead;
    td_status status;
    int value;
} waiter;

/* Longer than anybody waits; or until a rank has died. */
static int work(void *arg)
{
    const waiter *w = arg;
    if (!w->dies) usleep(WORK_US);
    while (w->dies && !*w->dead) usleep(1000);
    return 42;
}

static void *wait_for_work(void *arg)
{
    waiter *w = arg;
    td_coll_deadline(w->world, DEADLINE_US);
    if (w->dies && td_coll_rank(w->world) == 2) {
        td_coll_abort(w->world, "dies");
        *w->dead = true;
    } else {
        w->status = td_ranks_compute(w->world, work, w, TICK_US, &w->value);
    }
    td_coll_close(w->world);
    return NULL;
}

static void worked_out(bool dies)
{
    enum { RANKS = 3 };
    td_coll *end[RANKS];
    waiter w[RANKS];
    _Atomic bool dead = false;
    T_OK(td_coll_threads_open(RANKS, end) == TD_OK);
    for (int i = 0; i < RANKS; i++) {
        w[i] = (waiter){.world = end[i], .dies = dies, .dead = &dead};
        if (pthread_create(&w[i].thread, NULL, wait_for_work, &w[i])) abort();
    }
    for (int i = 0; i < RANKS; i++) pthread_join(w[i].thread, NULL);
    for (int i = 0; i < RANKS; i++) {
        if (dies && i == 2) continue;
        T_EQ(w[i].status, dies ? TD_EGONE : TD_OK);
        if (!dies) T_EQ(w[i].value, 42);
    }
}

/* ---- what all must have alike ---- */

enum { LONG_TEXT = 3 * TD_RANKS_TEXT };

typedef struct talker {
    pthread_t thread;
    td_coll *world;
    const char *text;
    td_status status;
    char why[600];
} talker;

static void *compare_text(void *arg)
{
    talker *t = arg;
    t->status = td_ranks_agree(t->world, t->text);
    snprintf(t->why, sizeof t->why, "%s", td_reason());
    td_coll_close(t->world);
    return NULL;
}

/* Three ranks, of which the last says another character at `at` (-1: the same). */
static void alike(int at, td_status want_status, const char *why)
{
    enum { RANKS = 3 };
    static char text[2][LONG_TEXT + 1];
    td_coll *end[RANKS];
    talker t[RANKS];
    for (int i = 0; i < LONG_TEXT; i += 16) snprintf(text[0] + i, 17, "name%05d: abcd\n", i);
    memcpy(text[1], text[0], sizeof text[0]);
    if (at >= 0) text[1][at] = 'x';
    T_OK(td_coll_threads_open(RANKS, end) == TD_OK);
    for (int i = 0; i < RANKS; i++) {
        t[i] = (talker){.world = end[i], .text = text[i == RANKS - 1]};
        if (pthread_create(&t[i].thread, NULL, compare_text, &t[i])) abort();
    }
    for (int i = 0; i < RANKS; i++) pthread_join(t[i].thread, NULL);
    for (int i = 0; i < RANKS; i++) {
        T_EQ(t[i].status, want_status);
        T_OK(!why || strstr(t[i].why, why), "%s", t[i].why);
    }
}

/* Also of a text that is longer than what goes over the wire. */
static void agreements(void)
{
    alike(-1, TD_OK, NULL);
    alike(16 * 7 + 12, TD_EPROTO, "rank 0 has \"name00112: abcd\", rank 2 \"name00112: axcd\"");
    alike(LONG_TEXT - 3, TD_EPROTO, "rank 2 \"the rest: ");
}

/* test_ranks mpi SHAPE TP PP CP EP FSDP [DP], started by mpirun: one grid over processes
 * (tests/coll/test_ranks_mpi.py). Rank 0 knows what one rank makes. */
static void over_mpi(int argc, char **argv)
{
    td_coll *world;
    char what[160];
    T_OK(td_coll_mpi_open(&argc, &argv, &world) == TD_OK, "%s", td_reason());
    tr_opts o = base_opts(argv[2]);
    o.grid = (td_grid){.tp = 1, .pp = 1, .cp = 1, .dp = 1};
    if (td_coll_rank(world) == 0) check(o, "one rank", true);
    o.grid = (td_grid){.tp = atoi(argv[3]),
                       .pp = atoi(argv[4]),
                       .cp = atoi(argv[5]),
                       .dp = argc > 8 ? atoi(argv[8]) : 1,
                       .ep = atoi(argv[6]) != 0,
                       .fsdp = atoi(argv[7]) != 0};
    if (o.grid.ep) o.grid.redundant = 2, o.engine.eplb_interval = 3;
    o.depth = o.grid.pp + (o.grid.pp > 1); /* as of a prefill worker */
    o.block_rows = 8;
    o.least_workspace = o.grid.cp > 1;
    tr_world = world;
    snprintf(what, sizeof what, "%s over MPI: tensor %d, pipeline %d, context %d, data %d", argv[2],
             o.grid.tp, o.grid.pp, o.grid.cp, o.grid.dp);
    if (td_coll_rank(world) == 0)
        check(o, what, false);
    else
        T_OK(tr_run(&o, run_all, NULL), "%s", what);
    td_coll_close(world);
}

int main(int argc, char **argv)
{
    td_log_open("test", TD_LOG_ERROR);
    want_logits.row = calloc(64, sizeof *want_logits.row);
    got_logits.row = calloc(64, sizeof *got_logits.row);
    make_specs();
    T_OK(td_ops_open("auto", &ops) == TD_OK);
    if (argc == 2 && !strcmp(argv[1], "some")) { /* under a sanitizer: not every grid */
        worked_out(false), worked_out(true), agreements();
        polled(1, 2, 1, 1), polled(2, 2, 2, 1);
        some_grids();
    } else if ((argc == 8 || argc == 9) && !strcmp(argv[1], "mpi")) {
        over_mpi(argc, argv);
    } else {
        worked_out(false), worked_out(true), agreements();
        polled(2, 1, 1, 1), polled(1, 2, 1, 1), polled(1, 4, 1, 1), polled(2, 2, 2, 1), polled(1, 2, 1, 2);
        all_grids("ranks-tiny", false);
        all_grids("ranks-mqa", false); /* one kv head */
        all_grids("moe-tiny", true);
        eight_stages();
    }
    for (int i = 0; i < N; i++) te_result_free(&want[i]), te_result_free(&got[i]);
    free(want_logits.row), free(got_logits.row);
    return T_DONE();
}
