/* Tensor parallel where no tree over 8 slices is possible (a feed-forward size that is no multiple of 16): what ranks
 * make is within 1e-5 of one rank with ref ops. Sums that are trees agree to the bit:
 * test_ranks.c. Ranks are threads. */
// SPDX-License-Identifier: Apache-2.0
#include "common/log.h"
#include "tests/worker/support_engine.h"
#include "tests/worker/support_ranks.h"

enum { V = 509, ROWS = 77 };

static float want[ROWS][V], got[ROWS][V];
static int n_rows;

static void take(void *arg, uint64_t key, uint32_t position, const float *logits)
{
    float(*to)[V] = arg;
    (void)key;
    if (position >= ROWS) return;
    memcpy(to[position], logits, sizeof *to);
    n_rows++;
}

static void run(td_engine *e, void *arg)
{
    te_rnd = 7; /* the same prompt each time */
    te_spec s = te_make(1, ROWS, 1, V);
    td_engine_out out;
    s.leg.all_logits = true;
    s.leg.sampling.logprobs = -1;
    n_rows = 0;
    td_engine_on_logits(e, take, arg);
    T_OK(td_engine_start(e, te_leg(&s)) == TD_OK, "%s", td_reason());
    for (bool over = false; !over;) {
        T_OK(td_engine_turn(e, &out) == TD_OK, "%s", td_reason());
        over = out.n_end > 0;
    }
    te_drain(e);
    T_EQ(n_rows, ROWS);
}

static void shape(tr_config c)
{
    char dir[32];
    const td_ops *ref;
    td_model_desc d;
    tr_make_dir(dir, c);
    T_OK(td_ops_open("ref", &ref) == TD_OK && td_model_desc_read(dir, &d) == TD_OK);
    for (int tp = 1; tp <= 4; tp *= 2) {
        tr_opts o = {.shape = "tiny",
                     .dir = dir,
                     .ops = ref,
                     .depth = 1,
                     .grid = {.tp = tp, .pp = 1, .cp = 1, .dp = 1},
                     .engine = {.page_size = 16,
                                .kv_pages = 40,
                                .max_batched_tokens = 32,
                                .max_seqs = 2,
                                .max_legs = 4,
                                .max_model_len = 200,
                                .hash_key = {3, 4}}};
        T_OK(!td_grid_tree(&o.grid, &d), "%d: a tree", c.ffn);
        for (int blocks = 0; blocks < 2; blocks++) {
            double worst = 0, most = 0;
            o.block_rows = blocks ? 1 : 1000;
            T_OK(tr_run(&o, run, tp > 1 ? got : want), "tensor %d", tp);
            if (tp == 1) continue;
            for (int t = 0; t < ROWS; t++)
                for (int v = 0; v < V; v++) {
                    worst = fmax(worst, fabs((double)got[t][v] - (double)want[t][v]));
                    most = fmax(most, fabs((double)want[t][v]));
                }
            T_OK(most > 0.1 && worst <= 1e-5 * fmax(1, most), "tensor %d, %d: %g off, logits up to %g", tp,
                 c.ffn, worst, most);
            printf("feed-forward %d, %d experts, tensor %d%s: %.1e off one rank, logits up to %.2f\n", c.ffn,
                   c.experts, tp, blocks ? " in blocks" : "", worst, most);
        }
    }
    tr_drop_dir(dir);
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    shape((tr_config){4, 2, 88, 0});
    shape((tr_config){4, 1, 172, 0});
    shape((tr_config){4, 2, 60, 8});
    return T_DONE();
}
