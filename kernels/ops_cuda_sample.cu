// SPDX-License-Identifier: Apache-2.0
/* kernels/ops_cuda_sample.cu - the CUDA table's token choice. */
#include "kernels/ops_cuda.h"
#include <stdlib.h>

namespace td_ops_cuda
{
static block ws, results;

static size_t row_bytes(const td_sample_row *r, int V)
{
    return padded(r->n_pen * sizeof *r->pen) + padded(r->n_bias * sizeof *r->bias) +
           (r->mask ? padded(((size_t)V + 31) / 32 * 4) : 0);
}

/* Copies of the rows whose pointers are the device's; false after an error. */
static const td_sample_row *send_rows(const td_sample_row *rows, int n, int V)
{
    size_t bytes = padded((size_t)n * sizeof *rows);
    for (int i = 0; i < n; i++) bytes += row_bytes(&rows[i], V);
    td_sample_row *copy = (td_sample_row *)malloc((size_t)n * sizeof *rows);
    parcel p;
    const td_sample_row *at = nullptr;
    if (!copy) failed(td_fail(TD_EFULL, "out of memory for %d rows", n));
    if (copy && parcel_open(&p, bytes)) {
        memcpy(copy, rows, (size_t)n * sizeof *rows);
        for (int i = 0; i < n; i++) {
            copy[i].pen = parcel_put(&p, rows[i].pen, rows[i].n_pen);
            copy[i].bias = parcel_put(&p, rows[i].bias, rows[i].n_bias);
            copy[i].mask = parcel_put(&p, rows[i].mask, ((size_t)V + 31) / 32);
        }
        at = parcel_put(&p, copy, (size_t)n);
        if (!parcel_send(&p)) at = nullptr;
    }
    free(copy);
    return at;
}

/* The one wait of a step. */
static void fetch_out(td_sample_out *out, int n)
{
    td_dev *d = ctx.dev;
    td_status s = d->download(d, TD_STREAM_COMPUTE, out, results.p, (size_t)n * sizeof *out);
    if (s == TD_OK) s = d->sync(d, TD_STREAM_COMPUTE);
    if (s != TD_OK) failed(s);
}

static void ops_sample(td_pool *, float *logits, size_t ld, int V, const td_sample_row *rows, int n,
                       td_sample_out *out)
{
    bool with_logprobs = false;
    for (int i = 0; i < n; i++) {
        out[i].token = -1;
        with_logprobs = with_logprobs || rows[i].logprobs >= 0;
    }
    if (n == 0 || !may_run() || !want(&ws, td_cuda_sample_bytes(n, V)) ||
        !want(&results, (size_t)n * sizeof *out))
        return;
    const td_sample_row *at = send_rows(rows, n, V);
    if (!at) return;
    launched(td_cuda_sample(stream(), logits, ld, V, at, n, with_logprobs, ws.p, (td_sample_out *)results.p),
             "token choice");
    if (may_run()) fetch_out(out, n);
}

static void ops_score(td_pool *, const float *logits, size_t ld, int V, const int32_t *ids,
                      int n_alternatives, int n, td_sample_out *out)
{
    parcel p;
    if (n == 0 || !may_run() || !want(&results, (size_t)n * sizeof *out) ||
        !parcel_open(&p, padded((size_t)n * sizeof *ids)))
        return;
    const int32_t *at = parcel_put(&p, ids, (size_t)n);
    if (!parcel_send(&p)) return;
    launched(td_cuda_score(stream(), logits, ld, V, at, n_alternatives, n, (td_sample_out *)results.p),
             "scores");
    if (may_run()) fetch_out(out, n);
}

void choice_fill(td_ops *t)
{
    t->sample = ops_sample;
    t->score = ops_score;
}

void choice_close()
{
    drop(&ws);
    drop(&results);
}
} // namespace td_ops_cuda
