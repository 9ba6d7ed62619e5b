// SPDX-License-Identifier: Apache-2.0
/* kernels/ops_cuda_sample.cu - the CUDA table's token choice: queued like everything else. */
#include "kernels/ops_cuda.h"

namespace td_ops_cuda
{
static block ws;

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
    parcel p;
    if (!parcel_open(&p, bytes)) return nullptr;
    td_sample_row *copy = (td_sample_row *)(p.h->host + p.used);
    const td_sample_row *at = parcel_put(&p, rows, (size_t)n);
    for (int i = 0; i < n; i++) {
        copy[i].pen = parcel_put(&p, rows[i].pen, rows[i].n_pen);
        copy[i].bias = parcel_put(&p, rows[i].bias, rows[i].n_bias);
        copy[i].mask = parcel_put(&p, rows[i].mask, ((size_t)V + 31) / 32);
    }
    return parcel_send(&p) ? at : nullptr;
}

static void ops_sample(td_pool *, float *logits, size_t ld, int V, const td_sample_row *rows, int n,
                       td_sample_out *out)
{
    bool with_logprobs = false;
    for (int i = 0; i < n; i++) with_logprobs = with_logprobs || rows[i].logprobs >= 0;
    if (n == 0 || !may_run() || !want(&ws, td_cuda_sample_bytes(n, V))) return;
    const td_sample_row *at = send_rows(rows, n, V);
    if (!at) return;
    launched(td_cuda_sample(stream(), logits, ld, V, at, n, with_logprobs, ws.p, out), "token choice");
}

static void ops_score(td_pool *, const float *logits, size_t ld, int V, const int32_t *ids,
                      int n_alternatives, int n, td_sample_out *out)
{
    parcel p;
    if (n == 0 || !may_run() || !parcel_open(&p, padded((size_t)n * sizeof *ids))) return;
    const int32_t *at = parcel_put(&p, ids, (size_t)n);
    if (!parcel_send(&p)) return;
    launched(td_cuda_score(stream(), logits, ld, V, at, n_alternatives, n, out), "scores");
}

static void ops_fill_ids(td_pool *, int32_t *ids, int n, const td_sample_out *before)
{
    if (may_run()) launched(td_cuda_fill_ids(stream(), ids, n, before), "ids of drawn tokens");
}

void choice_fill(td_ops *t)
{
    t->sample = ops_sample;
    t->score = ops_score;
    t->fill_ids = ops_fill_ids;
}

void choice_reserve(const td_ops_room *r)
{
    want(&ws, td_cuda_sample_bytes(r->max_logits, r->V));
}

void choice_close()
{
    drop(&ws);
}
} // namespace td_ops_cuda
