// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_ranks_cuda.c - workers of several ranks on the CUDA table: tokens, log probabilities and
 * logits are those of one rank, byte for byte, for every way to divide a model that devices have; through
 * this host's memory (coll_staged.c).
 *
 * Each rank is a process (the table is one per process): without arguments this program starts itself by
 * mpirun, grid after grid; rank 0 makes what one rank makes, too. Host accesses to device memory end the
 * process (option "hide"). */
#include "common/log.h"
#include "kernels/cuda.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"
#include "tests/worker/support_engine.h"
#include "tests/worker/support_ranks.h"
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

enum { N = 4, V = 509, LIMIT_S = 120 };

typedef struct way {
    const char *shape;
    int tp, pp, cp, ep;
} way;
static const way ways[] = {{"ranks-tiny", 2, 1, 1, 0},
                           {"ranks-tiny", 4, 1, 1, 0},
                           {"ranks-tiny", 1, 2, 1, 0},
                           {"ranks-tiny", 1, 1, 2, 0},
                           {"ranks-mqa", 2, 2, 1, 0},
                           {"moe-tiny", 2, 1, 1, 1}};

static te_spec spec[N];
static te_result want[N], got[N];
static float want_logits[N * 8][V], got_logits[N * 8][V];

typedef struct job {
    te_result *to;
    float (*logits)[V];
    uint32_t n_logits;
} job;

static void make_specs(bool long_one)
{
    static const uint32_t lengths[N] = {7, 33, 12, 20};
    for (int i = 0; i < N; i++) {
        uint32_t n = long_one && i == 1 && !simt_checks() ? 530 : lengths[i];
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
    if (position >= N * 8) return;
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
    te_run(e, spec, j->to, N);
    all.key = 77, all.all_logits = true;
    all.sampling = (td_sampling){
        .top_p = 1, .repetition_penalty = 1, .max_tokens = 1, .n = 1, .logprobs = -1, .prompt_logprobs = -1};
    td_engine_on_logits(e, take_logits, j);
    T_OK(td_engine_start(e, &all) == TD_OK, "%s", td_reason());
    while (!over && td_engine_turn(e, &out) == TD_OK) over = out.n_end > 0;
    T_OK(over && te_ledger(e, true), "pages are left");
}

/* One rank of a grid. */
static int one_rank(int argc, char **argv)
{
    static job one = {want, want_logits, 0}, many = {got, got_logits, 0};
    td_coll *world;
    const td_ops *cuda;
    tr_opts o = {.shape = argv[1],
                 .depth = 1,
                 .engine = {.page_size = 16,
                            .kv_pages = 200,
                            .max_batched_tokens = 160,
                            .max_seqs = 8,
                            .max_legs = 8,
                            .max_model_len = 600,
                            .prefix_cache = true,
                            .hash_key = {3, 4}}};
    simt_set_option("hide", 1);
    if (td_coll_mpi_open(&argc, &argv, &world) < 0) T_SKIP("no MPI");
    T_OK(td_cuda_ops_open(dev(), &cuda) == TD_OK, "%s", td_reason());
    o.ops = cuda;
    td_grid grid = {
        .tp = atoi(argv[2]), .pp = atoi(argv[3]), .cp = atoi(argv[4]), .dp = 1, .ep = atoi(argv[5]) != 0};
    int rank = td_coll_rank(world);
    make_specs(grid.cp > 1);
    o.grid = (td_grid){.tp = 1, .pp = 1, .cp = 1, .dp = 1};
    if (rank == 0) T_OK(tr_run(&o, run_all, &one), "one rank");
    o.grid = grid;
    if (grid.ep) o.grid.redundant = 2, o.engine.eplb_interval = 3;
    o.depth = grid.pp, o.block_rows = 8, o.least_workspace = grid.cp > 1;
    tr_world = world;
    T_OK(tr_run(&o, run_all, &many), "all ranks");
    for (int i = 0; rank == 0 && i < N; i++) te_same(&spec[i], &want[i], &got[i], "several ranks");
    if (rank == 0)
        T_OK(one.n_logits == spec[3].leg.n_prompt && many.n_logits == one.n_logits &&
                 !memcmp(want_logits, got_logits, sizeof want_logits),
             "logits");
    td_cuda_ops_close();
    td_dev_close(dev());
    td_coll_close(world);
    return T_DONE();
}

static int run_way(const char *self, const way *w)
{
    char n[8], tp[8], pp[8], cp[8], ep[8], limit[8];
    snprintf(n, sizeof n, "%d", w->tp * w->pp * w->cp);
    snprintf(tp, sizeof tp, "%d", w->tp), snprintf(pp, sizeof pp, "%d", w->pp),
        snprintf(cp, sizeof cp, "%d", w->cp);
    snprintf(ep, sizeof ep, "%d", w->ep), snprintf(limit, sizeof limit, "%d", LIMIT_S);
    pid_t child = fork();
    if (child == 0) {
        execlp("timeout", "timeout", "-k", "5", limit, "mpirun", "--allow-run-as-root", "--oversubscribe",
               "--bind-to", "none", "-n", n, self, w->shape, tp, pp, cp, ep, (char *)NULL);
        _exit(127);
    }
    int how = 0;
    if (child < 0 || waitpid(child, &how, 0) != child || !WIFEXITED(how)) return 1;
    return WEXITSTATUS(how);
}

int main(int argc, char **argv)
{
    td_log_open("test", TD_LOG_ERROR);
    if (argc == 6) return one_rank(argc, argv);
    (void)dev(); /* skips where there is none */
    for (size_t i = 0; i < TD_COUNT(ways); i++) {
        const way *w = &ways[i];
        if (simt_checks() && i != 0 && i != 4) continue;
        int how = run_way(argv[0], w);
        if (how == 77) T_SKIP("built without MPI");
        if (how == 127) T_SKIP("no mpirun");
        T_OK(how == 0, "%s: tensor %d, pipeline %d, context %d%s: exit %d", w->shape, w->tp, w->pp, w->cp,
             w->ep ? ", experts" : "", how);
    }
    return T_DONE();
}
