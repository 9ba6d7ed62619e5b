// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_forward_cuda.c - the forward pass of the engine on the CUDA table (support_staged.h):
 * logits beside ref's, and the same bits in one go, in chunks, batched and at another page size. On the shim
 * and on a device. */
#include "tests/simt/support.h"
#include "tests/simt/support_staged.h"
#include "tests/worker/support_step.h"

enum { N = 41, SEQS = 2, MAX_ROWS = 128 };

static td_model *open_model(const char *name, const td_ops *ops)
{
    char dir[200];
    td_model *m = NULL;
    snprintf(dir, sizeof dir, "tests/golden/%s", name);
    td_model_opts o = {.dir = dir, .ops = ops, .pool = team(1), .max_rows = MAX_ROWS, .max_logits = MAX_ROWS};
    T_OK(td_model_open(&o, &m) == TD_OK, "%s: %s", name, td_reason());
    return m;
}

/* Both sequences, `chunk` rows of each a step; logits [SEQS][N][V]. */
static void run(td_model *m, const td_ops *ops, const int32_t *ids, int P, int chunk, bool together,
                float *out)
{
    const td_model_desc *d = td_model_descr(m);
    size_t V = (size_t)d->V;
    float *part = floats((size_t)MAX_ROWS * V);
    ts_kv kv;
    ts_kv_open(&kv, d, ops, P, N, SEQS);
    for (int first = 0; first < SEQS; first += together ? SEQS : 1)
        for (int at = 0; at < N; at += chunk) {
            int n = at + chunk > N ? N - at : chunk, k = together ? SEQS : 1;
            ts_seq q[SEQS];
            for (int i = 0; i < k; i++) q[i] = (ts_seq){first + i, at, n, ids + (first + i) * N + at};
            td_step *s = ts_step(&kv, d, q, k, true);
            T_OK(td_model_forward(m, s, kv.kv, part, NULL, NULL) == TD_OK, "%s", td_reason());
            for (int i = 0; i < k; i++)
                memcpy(out + ((size_t)(first + i) * N + (size_t)at) * V, part + (size_t)(i * n) * V,
                       (size_t)n * V * 4);
            free(s);
        }
    ts_kv_close(&kv);
    free(part);
}

static void test_model(const char *name, const td_ops *ref, const td_ops *cuda)
{
    td_model *a = open_model(name, ref), *b = open_model(name, cuda);
    if (!a || !b) return;
    size_t V = (size_t)td_model_descr(a)->V, n = SEQS * N * V;
    float *want = floats(n), *got = floats(n), *again = floats(n), largest = 0;
    int32_t ids[SEQS * N];
    uint64_t seed = 5;
    for (int i = 0; i < SEQS * N; i++) ids[i] = (int32_t)(rnd_next(&seed) % (uint32_t)V);
    run(a, ref, ids, 16, N, true, want);
    run(b, cuda, ids, 16, N, true, got);
    for (size_t i = 0; i < n; i++) largest = fmaxf(largest, fabsf(want[i]));
    int off = 0; /* rows: near a tie of the router, rounding sends a token to another expert */
    for (size_t r = 0; r < SEQS * N; r++) {
        double worst = 0;
        for (size_t i = r * V; i < (r + 1) * V; i++) {
            double e = fabs((double)got[i] - (double)want[i]);
            if (!(e <= worst)) worst = e; /* NaN too */
        }
        off += !(worst <= 0.04 * (double)largest);
        T_OK(worst == worst, "%s: row %zu is no number", name, r);
    }
    T_OK(off <= (td_model_descr(a)->moe.route.n_experts ? SEQS * N / 8 : 0), "%s: %d rows off", name, off);
    static const struct {
        int P, chunk;
        bool together;
    } ways[] = {{16, 7, true}, {8, N, false}, {8, 16, true}, {16, 1, true}};
    bool fp8 = td_model_descr(a)->fp8.kind; /* other products, the same ways */
    for (size_t w = 0; w < (fp8 ? 1 : TD_COUNT(ways)); w++) {
        memset(again, 0xff, n * 4);
        run(b, cuda, ids, ways[w].P, ways[w].chunk, ways[w].together, again);
        T_OK(!memcmp(got, again, n * 4), "%s: pages of %d, chunks of %d differ", name, ways[w].P,
             ways[w].chunk);
    }
    free(want), free(got), free(again);
    td_model_close(a), td_model_close(b);
}

int main(void)
{
    static const char *const models[] = {"models/llama-gqa", "models/mistral-swa",   "models/qwen3",
                                         "models/mixtral",   "quantized/fp8-block", "quantized/fp8-row"};
    const td_ops *ref = NULL, *cuda = td_staged_family(0);
    T_EQ(td_ops_open("ref", &ref), TD_OK);
    for (size_t i = 0; i < TD_COUNT(models); i++) test_model(models[i], ref, cuda);
    return T_DONE();
}
