// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_ranks_cuda.c - workers of several ranks on the CUDA table: tokens, log probabilities and
 * logits are those of one rank, byte for byte, for every way to divide a model that devices have; through
 * this host's memory (coll_staged.c). Steps of ranks that exchange nothing inside a pass are replayed. Fast: those bytes
 * with up to 64 rows a step, the same again in a second run with more, and those bytes if one rank has no room for copies.
 *
 * Each rank is a process (the table is one per process): without arguments this program starts itself by
 * mpirun, grid after grid; rank 0 makes what one rank makes, too. Host accesses to device memory end the
 * process (option "hide"). */
#include "common/log.h"
#include "kernels/cuda.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"
#include "tests/worker/support_engine.h"
#include "tests/worker/support_fp8.h"
#include "tests/worker/support_ranks.h"
#include <math.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

enum { N = 4, V = 509, LIMIT_S = 300, LOGITS = 144 };

/* A shape of random weights, or a checkpoint that is made here. */
typedef struct way {
    const char *model;
    td_grid grid;
    bool quantized; /* beside the same ranks with other blocks and chunks: one rank has other bits */
    bool more;
    int fast; /* the device's architecture; 0: deterministic */
} way;
/* Those with `more` only if asked for ("all", or by number): the others have each of their parts. */
static const way ways[] = {
    {.model = "ranks-tiny", .grid = {.tp = 2, .pp = 1, .cp = 1, .dp = 1}, .more = true},
    {.model = "ranks-tiny", .grid = {.tp = 4, .pp = 1, .cp = 1, .dp = 1}},
    {.model = "ranks-tiny", .grid = {.tp = 1, .pp = 2, .cp = 1, .dp = 1}, .more = true},
    {.model = "ranks-tiny", .grid = {.tp = 1, .pp = 1, .cp = 2, .dp = 1}},
    {.model = "ranks-mqa", .grid = {.tp = 2, .pp = 2, .cp = 1, .dp = 1}},
    {.model = "moe-tiny", .grid = {.tp = 2, .pp = 1, .cp = 1, .dp = 1, .ep = true}},
    {.model = "fp8-blocks", .grid = {.tp = 2, .pp = 1, .cp = 1, .dp = 1}, .more = true},
    {.model = "fp8-blocks", .grid = {.tp = 4, .pp = 1, .cp = 1, .dp = 1}},
    {.model = "fp8-rows", .grid = {.tp = 4, .pp = 1, .cp = 1, .dp = 1}},
    {.model = "ranks-tiny", .grid = {.tp = 1, .pp = 1, .cp = 2, .dp = 1, .fsdp = true}, .more = true},
    {.model = "ranks-mqa", .grid = {.tp = 2, .pp = 1, .cp = 2, .dp = 1, .fsdp = true}}, /* tied */
    {.model = "fp8-blocks", .grid = {.tp = 1, .pp = 2, .cp = 1, .dp = 2, .fsdp = true}},
    {.model = "moe-tiny", .grid = {.tp = 1, .pp = 1, .cp = 1, .dp = 2, .fsdp = true}, .more = true},
    {.model = "moe-tiny", .grid = {.tp = 1, .pp = 1, .cp = 1, .dp = 2, .ep = true, .fsdp = true}},
    {.model = "ranks-tiny", .grid = {.tp = 1, .pp = 1, .cp = 1, .dp = 2}},
    {"ranks-tiny", {.tp = 2, .pp = 1, .cp = 1, .dp = 1}, true, true, 0},
    {"ranks-mqa", {.tp = 4, .pp = 1, .cp = 1, .dp = 1}, true, false, 0},
    {"moe-tiny", {.tp = 2, .pp = 1, .cp = 1, .dp = 1}, true, true, 0},
    {.model = "ranks-mqa", .grid = {.tp = 2, .pp = 2, .cp = 1, .dp = 1}, .fast = 80},
    {.model = "moe-tiny", .grid = {.tp = 2, .pp = 1, .cp = 1, .dp = 1, .ep = true}, .fast = 80, .more = true},
    {.model = "ranks-tiny", .grid = {.tp = 1, .pp = 1, .cp = 2, .dp = 1}, .fast = 80, .more = true},
    {.model = "fp8-blocks", .grid = {.tp = 2, .pp = 1, .cp = 1, .dp = 1}, .fast = 90},
    {.model = "fp8-rows", .grid = {.tp = 2, .pp = 1, .cp = 1, .dp = 1}, .fast = 90, .more = true}};

static te_spec spec[N];
static te_result want[N], got[N];
static float want_logits[LOGITS][V], got_logits[LOGITS][V], exact_logits[LOGITS][V];

typedef struct job {
    te_result *to;
    float (*logits)[V];
    uint32_t n_logits;
    bool more; /* a prompt between steps that are replayed */
} job;

static void make_specs(const way *w)
{
    static const uint32_t lengths[N] = {7, 33, 12, 20};
    for (int i = 0; i < N; i++) {
        uint32_t n = w->grid.cp > 1 && i == 1 && !simt_checks() ? 530 : lengths[i];
        if (w->fast && i == 3) n = 140; /* at once: more rows than the kernels of few take */
        spec[i] = te_make((uint64_t)i + 1, TD_MIN(n, (uint32_t)TE_MAX_PROMPT), 4, V);
        te_vary(&spec[i], V);
        spec[i].leg.sampling.n = 1;
    }
    spec[0].leg.sampling = (td_sampling){.temperature = 0.8f,
                                         .top_p = 0.8f,
                                         .top_k = 30,
                                         .repetition_penalty = 1.2f,
                                         .max_tokens = 4,
                                         .n = 2,
                                         .logprobs = 3,
                                         .prompt_logprobs = 1};
    spec[2].leg.sampling = (td_sampling){.temperature = 1,
                                         .top_p = 0.9f,
                                         .repetition_penalty = 1,
                                         .max_tokens = 4,
                                         .n = 1,
                                         .logprobs = -1,
                                         .prompt_logprobs = -1};
}

static void take_logits(void *arg, uint64_t key, uint32_t position, const float *logits)
{
    job *j = arg;
    (void)key;
    if (position >= LOGITS) return;
    memcpy(j->logits[position], logits, sizeof j->logits[0]);
    j->n_logits++;
}

static void run_all(td_engine *e, void *arg)
{
    job *j = arg;
    td_leg all = *te_leg(&spec[3]);
    td_engine_out out;
    bool over = false;
    for (int i = 0; i < N; i++) te_expect(&spec[i], &j->to[i]);
    te_rnd = 1; /* the same order in every run: in the fast mode a row's bits depend on the rows beside it */
    te_run(e, spec, j->to, N);
    for (int i = 0; i < 2 && j->more; i++) te_run(e, &spec[2], &j->to[2], 1);
    all.key = 77, all.all_logits = true;
    all.sampling = (td_sampling){
        .top_p = 1, .repetition_penalty = 1, .max_tokens = 1, .n = 1, .logprobs = -1, .prompt_logprobs = -1};
    td_engine_on_logits(e, take_logits, j);
    T_OK(td_engine_start(e, &all) == TD_OK, "%s", td_reason());
    while (!over && td_engine_turn(e, &out) == TD_OK) over = out.n_end > 0;
    T_OK(over && te_ledger(e, true), "pages are left");
}

/* ---- checkpoints of FP8 codes whose slices are narrower than a block of scales: 32 and 96 columns ---- */

enum { E = 128, H = 8, G = 4, D = 32, F = 768, L = 2 };

static void add_random(tf_set *s, const char *name, int rows, int cols, float size)
{
    size_t n = (size_t)rows * (size_t)(cols ? cols : 1);
    float *v = floats(n);
    uint16_t *to = calloc(n, sizeof *to);
    rnd_fill(v, n, s->n + 1, size);
    for (size_t i = 0; i < n && !cols; i++) v[i] += 1;
    td_convert(to, TD_BF16, v, TD_F32, n);
    tf_add(s, name, TD_ST_BF16, cols ? 2 : 1, rows, cols, to);
    free(v);
}

static void make_checkpoint(const char *dir)
{
    static const struct {
        const char *name;
        int N, K;
    } all[] = {
        {"input_layernorm", E, 0},      {"self_attn.q_proj", H * D, E}, {"self_attn.k_proj", G * D, E},
        {"self_attn.v_proj", G * D, E}, {"self_attn.o_proj", E, H * D}, {"post_attention_layernorm", E, 0},
        {"mlp.gate_proj", F, E},        {"mlp.up_proj", F, E},          {"mlp.down_proj", E, F}};
    tf_set *s = calloc(1, sizeof *s);
    char name[200], config[600];
    add_random(s, "model.embed_tokens.weight", V, E, 1);
    add_random(s, "lm_head.weight", V, E, 0.3f);
    add_random(s, "model.norm.weight", E, 0, 0.1f);
    for (int l = 0; l < L; l++)
        for (size_t i = 0; i < TD_COUNT(all); i++) {
            snprintf(name, sizeof name, "model.layers.%d.%s.weight", l, all[i].name);
            add_random(s, name, all[i].N, all[i].K, 0.1f);
        }
    snprintf(config, sizeof config,
             "{\"architectures\":[\"LlamaForCausalLM\"],\"vocab_size\":%d,\"hidden_size\":%d,\"intermediate_"
             "size\":%d,"
             "\"num_hidden_layers\":%d,\"num_attention_heads\":%d,\"num_key_value_heads\":%d,\"head_dim\":%d,"
             "\"max_position_embeddings\":1024}",
             (int)V, (int)E, (int)F, (int)L, (int)H, (int)G, (int)D);
    tf_write(s, dir, config);
}

static char tmp[64], plain[80], codes[2][80];

static void make_codes(void)
{
    make_checkpoint(plain);
    for (int i = 0; i < 2; i++) tf_make(plain, codes[i], i ? TF_ROWS : TF_BLOCKS);
}

static void drop_codes(void)
{
    tf_remove(plain), tf_remove(codes[0]), tf_remove(codes[1]);
    rmdir(tmp);
}

static void name_dirs(const char *at)
{
    snprintf(tmp, sizeof tmp, "%s", at);
    snprintf(plain, sizeof plain, "%s/plain", tmp);
    for (int i = 0; i < 2; i++) snprintf(codes[i], sizeof codes[i], "%s/%s", tmp, i ? "rows" : "blocks");
}

/* ---- the fast mode ---- */

static td_status (*real_free_bytes)(td_dev *d, size_t *out);
static int asked;

/* Weights have room, and their copies (the question after that) have none. */
static td_status little_room(td_dev *d, size_t *out)
{
    td_status s = real_free_bytes(d, out);
    if (asked++ == 1) *out = 1;
    return s;
}

/* ||a - b|| / ||b|| */
static double distance(const float *a, const float *b, size_t n)
{
    double d = 0, all = 0;
    for (size_t i = 0; i < n; i++) d += pow((double)a[i] - (double)b[i], 2), all += pow((double)b[i], 2);
    return sqrt(d / all);
}

static void same_as(job *to, job *as, bool leads, const char *what)
{
    for (int i = 0; leads && i < N; i++) te_same(&spec[i], &as->to[i], &to->to[i], what);
    if (leads)
        T_OK(to->n_logits == as->n_logits && !memcmp(to->logits, as->logits, sizeof want_logits),
             "logits: %s", what);
}

static const td_ops *open_fast(void)
{
    const td_cuda_mode mode = {.fast = true};
    const td_ops *ops = NULL;
    T_OK(td_cuda_ops_open_as(dev(), &mode, &ops) == TD_OK && strcmp(ops->numerics, TD_CUDA_NUMERICS), "%s",
         td_reason());
    return ops;
}

/* one: of one deterministic rank. */
static void run_fast(tr_opts *o, job *one, int rank)
{
    static te_result first_result[N];
    static float first_logits[LOGITS][V];
    job many = {got, got_logits, 0, false}, first = {first_result, first_logits, 0, false};
    const size_t n = (size_t)spec[3].leg.n_prompt * V;
    int most = o->engine.max_batched_tokens;
    td_cuda_ops_close();
    o->ops = open_fast();
    o->engine.max_batched_tokens = 64;
    T_OK(tr_run(o, run_all, &many), "few rows");
    same_as(&many, one, rank == 0, "fast, few rows");
    o->engine.max_batched_tokens = most;
    T_OK(tr_run(o, run_all, &first), "fast");
    many.n_logits = 0;
    T_OK(tr_run(o, run_all, &many), "fast again");
    same_as(&many, &first, rank == 0, "a second run");
    double off = distance(got_logits[0], one->logits[0], n),
           most_off = strncmp(o->shape ? o->shape : "fp8", "fp8", 3) ? 0.02 : 0.1;
    bool other = off > 0;
    for (int i = 0; i < N; i++) other |= !te_same_choice(&got[i], 0, &one->to[i], 0);
    if (rank == 0) T_OK(other && off < most_off, "logits are off by %g of their size", off);
    T_OK(strcmp(o->ops->numerics, TD_CUDA_NUMERICS), "%s", o->ops->numerics);
    td_cuda_ops_close(); /* copies of another model would keep the name */
    o->ops = open_fast();
    many.n_logits = 0;
    real_free_bytes = dev()->free_bytes;
    if (rank == td_grid_ranks(&o->grid) - 1) dev()->free_bytes = little_room;
    T_OK(tr_run(o, run_all, &many), "no room for copies");
    dev()->free_bytes = real_free_bytes;
    T_OK(!strcmp(o->ops->numerics, TD_CUDA_NUMERICS), "%s", o->ops->numerics);
    same_as(&many, one, rank == 0, "no room for copies on the last rank");
}

/* ---- the ranks ---- */

/* Whether no rank needs another one or the host inside its part of a pass. */
static bool is_replayed(const td_grid *g)
{
    return g->tp == 1 && g->cp == 1 && !g->ep && !g->fsdp;
}

/* One rank of a grid. */
static int one_rank(int argc, char **argv)
{
    static job one = {want, want_logits, 0, false}, many = {got, got_logits, 0, false};
    td_coll *world;
    const td_ops *cuda;
    const way *w = &ways[atoi(argv[1])];
    tr_opts o = {.shape = w->model,
                 .depth = 1,
                 .engine = {.page_size = 16,
                            .kv_pages = 200,
                            .max_batched_tokens = 160,
                            .max_seqs = 8,
                            .max_legs = 8,
                            .max_model_len = 600,
                            .prefix_cache = true,
                            .hash_key = {3, 4}}};
    name_dirs(argv[2]);
    if (!strncmp(w->model, "fp8", 3)) o.dir = codes[!strcmp(w->model, "fp8-rows")], o.shape = NULL;
    simt_set_option("hide", 1);
    if (w->fast) simt_set_option("arch", w->fast);
    if (td_coll_mpi_open(&argc, &argv, &world) < 0) T_SKIP("no MPI");
    T_OK(td_cuda_ops_open(dev(), &cuda) == TD_OK, "%s", td_reason());
    o.ops = cuda;
    int rank = td_coll_rank(world);
    make_specs(w);
    many.more = is_replayed(&w->grid);
    o.grid = (td_grid){.tp = 1, .pp = 1, .cp = 1, .dp = 1};
    if (rank == 0) T_OK(tr_run(&o, run_all, &one), "one rank");
    o.grid = w->grid;
    if (o.grid.ep) o.grid.redundant = 2, o.engine.eplb_interval = 3;
    o.depth = o.grid.pp, o.quantized = w->quantized;
    tr_world = world;
    if (w->quantized) {
        memcpy(exact_logits, want_logits, sizeof exact_logits);
        o.block_rows = 1 << 20, one.n_logits = 0, o.engine.max_prefill_chunk = 9;
        T_OK(tr_run(&o, run_all, &one), "all ranks, no blocks");
        o.engine.max_prefill_chunk = 0;
        T_OK(rank != 0 || memcmp(exact_logits, want_logits, sizeof want_logits), "nothing became integers");
    }
    o.block_rows = 8, o.least_workspace = o.grid.cp > 1;
    T_OK(rank != 0 || one.n_logits == spec[3].leg.n_prompt, "logits");
    if (w->fast) {
        run_fast(&o, &one, rank);
    } else {
        td_replay_stats before, after;
        cuda->replay->stats(&before);
        T_OK(tr_run(&o, run_all, &many), "all ranks");
        cuda->replay->stats(&after);
        T_OK((after.runs > before.runs) == is_replayed(&w->grid) && after.failed == before.failed,
             "%d steps replayed, %d failed", (int)(after.runs - before.runs),
             (int)(after.failed - before.failed));
        same_as(&many, &one, rank == 0, "several ranks");
    }
    td_cuda_ops_close();
    td_dev_close(dev());
    td_coll_close(world);
    return T_DONE();
}

static int run_way(const char *self, size_t i)
{
    char n[8], number[8], limit[8];
    snprintf(n, sizeof n, "%d", td_grid_ranks(&ways[i].grid));
    snprintf(number, sizeof number, "%zu", i), snprintf(limit, sizeof limit, "%d", LIMIT_S);
    pid_t child = fork();
    if (child == 0) {
        execlp("timeout", "timeout", "-k", "5", limit, "mpirun", "--allow-run-as-root", "--oversubscribe",
               "--bind-to", "none", "-n", n, self, number, tmp, (char *)NULL);
        _exit(127);
    }
    int how = 0;
    if (child < 0 || waitpid(child, &how, 0) != child || !WIFEXITED(how)) return 1;
    return WEXITSTATUS(how);
}

int main(int argc, char **argv)
{
    char dir[] = "/tmp/td-rankscuda-XXXXXX";
    td_log_open("test", TD_LOG_ERROR);
    if (argc == 3) return one_rank(argc, argv);
    (void)dev(); /* skips where there is none */
    bool all = argc == 2 && !strcmp(argv[1], "all");
    int only = argc == 2 && !all ? atoi(argv[1]) : -1;
    TD_CHECK(mkdtemp(dir));
    name_dirs(dir);
    make_codes();
    for (size_t i = 0; i < TD_COUNT(ways); i++) {
        const td_grid *g = &ways[i].grid;
        if (only >= 0 && (int)i != only) continue;
        if (simt_checks() ? i != 0 && i != 4 && !(g->fsdp && g->tp == 2) : ways[i].more && !all && only < 0)
            continue;
        int how = run_way(argv[0], i);
        if (how == 77 || how == 127) {
            drop_codes();
            T_SKIP("%s", how == 77 ? "built without MPI" : "no mpirun");
        }
        T_OK(how == 0, "%s: tensor %d, pipeline %d, context %d, data %d%s%s%s%s: exit %d", ways[i].model,
             g->tp, g->pp, g->cp, g->dp, g->ep ? ", experts" : "", g->fsdp ? ", fully sharded" : "",
             ways[i].quantized ? ", quantized" : "", ways[i].fast ? ", fast" : "", how);
    }
    drop_codes();
    return T_DONE();
}
