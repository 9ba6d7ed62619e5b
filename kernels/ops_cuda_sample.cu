// SPDX-License-Identifier: Apache-2.0
/* kernels/ops_cuda_sample.cu - the CUDA table's token choice: queued like everything else. */
#include "kernels/draw.h"
#include "kernels/ops_cuda.h"

extern "C" void td_sample_fill_ref(td_ops *t); /* family.h, whose rest is C */

namespace td_ops_cuda
{
static block ws, messages;

static size_t row_bytes(const td_sample_row *r, int V)
{
    return padded(r->n_pen * sizeof *r->pen) + padded(r->n_bias * sizeof *r->bias) +
           (r->mask ? padded(((size_t)V + 31) / 32 * 4) : 0);
}

/* What the row points to, in the parcel; copy gets its addresses there. */
static void put_row(parcel *p, td_sample_row *copy, const td_sample_row *r, int V)
{
    copy->pen = parcel_put(p, r->pen, r->n_pen);
    copy->bias = parcel_put(p, r->bias, r->n_bias);
    copy->mask = parcel_put(p, r->mask, ((size_t)V + 31) / 32);
}

/* Copies of the rows whose pointers are the device's; NULL after an error. */
static const td_sample_row *send_rows(const td_sample_row *rows, int n, int V)
{
    size_t bytes = padded((size_t)n * sizeof *rows);
    for (int i = 0; i < n; i++) bytes += row_bytes(&rows[i], V);
    parcel p;
    if (!parcel_open(&p, bytes)) return nullptr;
    td_sample_row *copy = (td_sample_row *)(p.h->host + p.used);
    const td_sample_row *at = parcel_put(&p, rows, (size_t)n);
    for (int i = 0; i < n; i++) put_row(&p, &copy[i], &rows[i], V);
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

/* ---- a vocabulary in parts (draw.h) ---- */

/* Copies of the draws whose pointers are the device's. What a row points to is read in the first stage only.
 */
static const td_draw *send_draws(const td_draw *d, int n, int V)
{
    static const td_sample_row bare = {};
    size_t bytes = padded((size_t)n * sizeof *d);
    for (int i = 0; i < n; i++)
        if (d[i].stage == TD_DRAW_START) bytes += row_bytes(&d[i].row, V);
    parcel p;
    if (!parcel_open(&p, bytes)) return nullptr;
    td_draw *copy = (td_draw *)(p.h->host + p.used);
    const td_draw *at = parcel_put(&p, d, (size_t)n);
    for (int i = 0; i < n; i++)
        put_row(&p, &copy[i].row, d[i].stage == TD_DRAW_START ? &d[i].row : &bare, V);
    return parcel_send(&p) ? at : nullptr;
}

static void ops_draw_say(td_pool *, const td_vocab *v, td_draw *d, int n, uint8_t *message)
{
    size_t bytes = 0;
    for (int i = 0; i < n; i++) bytes = max(bytes, d[i].at + d[i].bytes);
    memset(message, 0, bytes); /* also after an error: ranks stay in step until it is told */
    if (!bytes || !may_run() || !want(&messages, bytes)) return;
    const td_draw *at = send_draws(d, n, v->V);
    if (!at) return;
    launched(td_cuda_draw_say(stream(), v, at, n, (unsigned char *)messages.p), "token choice by parts");
    if (!may_run()) return;
    td_dev *dev = ctx.dev;
    td_status s = dev->download(dev, TD_STREAM_COMPUTE, message, messages.p, bytes);
    if (s == TD_OK) s = dev->sync(dev, TD_STREAM_COMPUTE);
    if (s != TD_OK) failed(s);
}

void choice_fill(td_ops *t)
{
    td_ops host = {};
    td_sample_fill_ref(&host);
    t->draw_say = ops_draw_say;
    t->draw_hear = host.draw_hear;
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
    drop(&messages);
}
} // namespace td_ops_cuda
