/* Parts of sums as integers between tensor-parallel ranks: what a row becomes, that the way a step is cut does not matter, and
 * how far the distributions are from those of exact sums, on the demo model (text it makes itself) and on random experts. */
// SPDX-License-Identifier: Apache-2.0
#include "common/log.h"
#include "tests/worker/support_engine.h"
#include "tests/worker/support_ranks.h"
#include "kernels/row_i8.h"
#include <unistd.h>

enum { ROWS = 200, V = 512 };

static const char *stories = "../shared/data/stories260K";
static uint32_t text[ROWS];

/* ---- rows ---- */

static void rows(void)
{
    static const int widths[] = {1, 3, 64, 127, 128, 129, 300};
    td_pool *pool = td_pool_open(1);
    for (size_t k = 0; k < TD_COUNT(widths); k++) {
        enum { T = 11 };
        int E = widths[k];
        size_t n = (size_t)T * (size_t)E, bytes = td_quant_row_bytes(E);
        float *x = malloc(n * sizeof *x), *y = malloc(n * sizeof *y);
        char *q = malloc(T * bytes), *alone = malloc(bytes);
        for (size_t i = 0; i < n; i++)
            x[i] = ((float)te_draw(2000001) - 1e6f) *
                   (i / (size_t)E == 4 ? 0 : powf(10, (float)(i / (size_t)E) - 8));
        td_quant_rows(pool, x, T, E, q);
        td_dequant_rows(pool, q, T, E, y);
        for (int t = 0; t < T; t++)
            for (int e = 0; e < E; e++) {
                float most = 0;
                for (int i = e / 128 * 128; i < TD_MIN(e / 128 * 128 + 128, E); i++)
                    most = fmaxf(most, fabsf(x[t * E + i]));
                float d = fabsf(x[t * E + e] - y[t * E + e]);
                T_OK(d <= most / 254 * 1.0001f, "width %d: %g became %g, largest %g", E, (double)x[t * E + e],
                     (double)y[t * E + e], (double)most);
            }
        td_quant_rows(pool, x + 9 * E, 1, E, alone);
        T_OK(!memcmp(alone, q + 9 * bytes, bytes), "a row alone");
        x[0] = NAN;
        td_quant_rows(pool, x, T, E, q);
        td_dequant_rows(pool, q, T, E, y);
        T_OK(isnan(y[0]) && !isnan(y[E]), "NaN stays");
        free(x), free(y), free(q), free(alone);
    }
    td_pool_close(pool);
}

/* ---- distributions ---- */

typedef struct job {
    float (*logits)[V];
    int vocab, n;
    bool write;                      /* the text is made, not read */
} job;

static void take(void *arg, uint64_t key, uint32_t position, const float *logits)
{
    const job *j = arg;
    (void)key;
    if (position < ROWS) memcpy(j->logits[position], logits, (size_t)j->vocab * sizeof(float));
}

static void write_text(td_engine *e)
{
    te_spec s = te_make(1, 1, ROWS - 1, V);
    bool over = false;
    uint32_t n = 1;
    s.prompt[0] = text[0] = 1;
    s.leg.sampling.temperature = 1, s.leg.sampling.seed = 5;
    T_OK(td_engine_start(e, te_leg(&s)) == TD_OK, "%s", td_reason());
    for (td_engine_out out; !over && td_engine_turn(e, &out) == TD_OK; over = out.n_end > 0)
        for (uint32_t i = 0; i < out.n_tokens; i++)
            for (uint32_t k = 0; k < out.tokens[i].n && n < ROWS; k++) text[n++] = out.tokens[i].token[k];
    T_OK(over);
}

static void read_text(td_engine *e, void *arg)
{
    job *j = arg;
    te_spec s = te_make(2, ROWS, 1, V);
    td_engine_out out;
    bool over = false;
    if (j->write) write_text(e);
    memcpy(s.prompt, text, sizeof text);
    s.leg.all_logits = true;
    s.leg.sampling.logprobs = -1;
    td_engine_on_logits(e, take, j);
    T_OK(td_engine_start(e, te_leg(&s)) == TD_OK, "%s", td_reason());
    while (!over && td_engine_turn(e, &out) == TD_OK) over = out.n_end > 0;
    T_OK(over);
}

static void run(tr_opts o, td_grid g, bool quantized, int block_rows, job *j)
{
    o.grid = g, o.quantized = quantized, o.block_rows = block_rows, o.depth = g.pp;
    memset(j->logits, 0, ROWS * sizeof *j->logits);
    T_OK(tr_run(&o, read_text, j));
    j->write = false;
}

/* Mean and largest over rows of KL(exact || got), in nats. */
static void divergence(const job *exact, const job *got, double *mean, double *most)
{
    *mean = *most = 0;
    for (int t = 0; t < ROWS; t++) {
        const float *a = exact->logits[t], *b = got->logits[t];
        double za = 0, zb = 0, kl = 0;
        for (int i = 0; i < exact->vocab; i++) za += exp((double)a[i]), zb += exp((double)b[i]);
        for (int i = 0; i < exact->vocab; i++)
            kl += exp((double)a[i]) / za * ((double)a[i] - log(za) - (double)b[i] + log(zb));
        *mean += kl / ROWS;
        *most = TD_MAX(*most, kl);
    }
}

static void distributions(tr_opts o, int vocab, bool write, double bound, const char *what)
{
    static float exact_logits[ROWS][V], got_logits[ROWS][V], other_logits[ROWS][V];
    job exact = {exact_logits, vocab, 0, write}, got = {got_logits, vocab, 0, false},
        other = {other_logits, vocab, 0, false};
    for (uint32_t i = 0; !write && i < ROWS; i++) text[i] = te_draw((uint32_t)vocab);
    run(o, (td_grid){.tp = 1, .pp = 1, .cp = 1, .dp = 1}, false, 0, &exact);
    run(o, (td_grid){.tp = 1, .pp = 2, .cp = 1, .dp = 1}, true, 8, &got);
    T_OK(!memcmp(exact_logits, got_logits, sizeof got_logits),
         "%s: one tensor-parallel rank exchanges nothing", what);
    for (int tp = 2; tp <= 4; tp *= 2) {
        double mean, most;
        run(o, (td_grid){.tp = tp, .pp = 1, .cp = 1, .dp = 1}, true, 1000, &got);
        run(o, (td_grid){.tp = tp, .pp = 2, .cp = 1, .dp = 1}, true, 1, &other);
        T_OK(!memcmp(other_logits, got_logits, sizeof got_logits),
             "%s, tensor %d: blocks of rows and stages change bits", what, tp);
        divergence(&exact, &got, &mean, &most);
        T_OK(mean > 0 && mean < bound && most < 20 * bound, "%s, tensor %d: %g, at most %g", what, tp, mean, most);
        printf("%s, tensor %d: KL to exact sums %.2e nats a token, at most %.2e\n", what, tp, mean, most);
    }
}

int main(void)
{
    tr_opts o = {.attn_split = 64,
                 .engine = {.page_size = 16,
                            .kv_pages = 100,
                            .max_batched_tokens = 64,
                            .max_seqs = 4,
                            .max_legs = 8,
                            .max_model_len = 400,
                            .hash_key = {3, 4}}};
    td_log_open("test", TD_LOG_ERROR);
    rows();
    T_OK(td_ops_open("ref", &o.ops) == TD_OK); /* heads of 8 */
    o.dir = stories;
    if (!access(stories, R_OK)) distributions(o, 512, true, 5e-4, "demo model");
    T_OK(td_ops_open("auto", &o.ops) == TD_OK);
    o.dir = NULL, o.shape = "moe-tiny";
    distributions(o, 509, false, 5e-5, "random experts");
    return T_DONE();
}
