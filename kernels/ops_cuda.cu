// SPDX-License-Identifier: Apache-2.0
/* kernels/ops_cuda.cu - the launchers as one td_ops over a device's compute stream (kernels/cuda.h, "the
 * table"): what all parts share, the operations on rows, opening and closing. */
#include "kernels/ops_cuda.h"
#include <stdio.h>

namespace td_ops_cuda
{
context ctx;
static const size_t HALF_BYTES = (size_t)1 << 20, ALIGN = 256;

void failed(td_status s)
{
    td_status *to = ctx.rec.on ? &ctx.rec.status : &ctx.status;
    if (*to != TD_OK) return;
    *to = s;
    if (!ctx.rec.on) snprintf(ctx.reason, sizeof ctx.reason, "%s", td_reason()); /* others may refuse until it is told */
}

bool may_run()
{
    return (ctx.rec.on ? ctx.rec.status : ctx.status) == TD_OK;
}

void kept(td_status s)
{
    if (s != TD_OK) failed(s);
}

void launched(int code, const char *what)
{
    if (code) failed(td_cuda_status(code, what));
}

td_stream stream()
{
    td_cuda_use(ctx.dev);
    return ctx.dev->stream[TD_STREAM_COMPUTE];
}

bool want(block *b, size_t bytes)
{
    if (b->bytes >= bytes) return true;
    td_dev *d = ctx.dev;
    if (ctx.rec.on) {
        failed(td_refuse(TD_EFULL, "a workspace of %zu bytes is not there yet", bytes));
        return false;
    }
    ctx.grown++;
    td_status s = d->sync(d, TD_STREAM_COMPUTE);
    /* Whole pages, and what grew once grows in larger steps: longer sequences want a little more every few steps. */
    if (b->bytes) bytes = max(bytes, b->bytes + b->bytes / 2);
    bytes = (bytes + 4095) / 4096 * 4096;
    ctx.moved += b->held && b->p;
    drop(b);
    void *p = nullptr;
    if (s == TD_OK) s = d->alloc(d, bytes, &p);
    if (s == TD_OK)
        b->p = (char *)p, b->bytes = bytes;
    else
        failed(s);
    return s == TD_OK;
}

void drop(block *b)
{
    if (b->p) ctx.dev->free(ctx.dev, b->p);
    b->p = nullptr, b->bytes = 0;
}

/* ---- the ring ---- */

static void half_close(ring_half *h)
{
    td_dev *d = ctx.dev;
    if (h->host) d->free_host(d, h->host);
    if (h->device) d->free(d, h->device);
    if (h->passed) d->event_close(d, h->passed);
    *h = ring_half{};
}

static td_status half_open(ring_half *h, size_t bytes)
{
    td_dev *d = ctx.dev;
    void *host = nullptr, *device = nullptr;
    TD_TRY(d->alloc_host(d, bytes, &host));
    h->host = (char *)host;
    TD_TRY(d->alloc(d, bytes, &device));
    h->device = (char *)device;
    TD_TRY(d->event_open(d, &h->passed));
    h->bytes = bytes;
    return d->record(d, TD_STREAM_COMPUTE, h->passed);
}

/* The next half, once the stream has passed its last use; larger if it has to be. */
static td_status turn(size_t bytes)
{
    td_dev *d = ctx.dev;
    TD_TRY(d->record(d, TD_STREAM_COMPUTE, ctx.half[ctx.at].passed));
    ctx.at = (ctx.at + 1) % 2;
    ring_half *h = &ctx.half[ctx.at];
    if (h->bytes < bytes) {
        TD_TRY(d->sync(d, TD_STREAM_COMPUTE));
        ctx.grown++;
        half_close(h);
        TD_TRY(half_open(h, bytes * 2));
    } else {
        TD_TRY(d->await(d, h->passed));
    }
    h->used = 0;
    return TD_OK;
}

size_t padded(size_t n)
{
    return (n + ALIGN - 1) / ALIGN * ALIGN;
}

bool parcel_open(parcel *p, size_t bytes)
{
    if (ctx.rec.on) { /* it would be sent again by every run, as it is then */
        failed(td_refuse(TD_ENOSUP, "what the host says of a step is not at a fixed address"));
        return false;
    }
    if (ctx.half[ctx.at].used + bytes > ctx.half[ctx.at].bytes) {
        td_status s = turn(bytes);
        if (s != TD_OK) failed(s);
        if (s != TD_OK) return false;
    }
    *p = parcel{&ctx.half[ctx.at], ctx.half[ctx.at].used, ctx.half[ctx.at].used};
    return true;
}

bool parcel_send(parcel *p)
{
    td_dev *d = ctx.dev;
    td_status s =
        d->upload(d, TD_STREAM_COMPUTE, p->h->device + p->start, p->h->host + p->start, p->used - p->start);
    p->h->used = p->used;
    if (s != TD_OK) failed(s);
    return s == TD_OK;
}

bool send_to(void *to, const void *src, size_t bytes)
{
    parcel p;
    if (!parcel_open(&p, padded(bytes))) return false;
    const char *sent = parcel_put(&p, (const char *)src, bytes);
    if (!parcel_send(&p)) return false;
    kept(ctx.dev->copy(ctx.dev, TD_STREAM_COMPUTE, to, sent, bytes));
    return may_run();
}

/* ---- rows ---- */

static void ops_embed_table(td_pool *, const td_table *w, const int32_t *ids, int T, float *out, size_t ldo)
{
    if (may_run())
        launched(td_cuda_embed(stream(), w->p, w->dtype, w->N, w->K, ids, T, out, ldo), "embedding");
}

static void operand_rmsnorm(td_pool *, const float *x, size_t ldx, const float *w, float eps, int T, int E,
                            void *out, td_operand to, size_t ldo)
{
    if (!may_run()) return;
    const td_cuda_codes codes = td_cuda_codes_in(out, ldo, T, E, to.group);
    launched(to.dtype == TD_E4M3 ? td_cuda_rmsnorm_quant(stream(), x, ldx, w, eps, &codes)
                                 : td_cuda_rmsnorm(stream(), x, ldx, w, eps, T, E, out, to.dtype, ldo),
             "norm");
}

static void ops_rmsnorm(td_pool *, const float *x, size_t ldx, const float *w, float eps, int T, int E,
                        float *out, size_t ldo)
{
    operand_rmsnorm(nullptr, x, ldx, w, eps, T, E, out, td_operand{TD_F32, 0}, ldo);
}

static void ops_take_rows(td_pool *, const float *x, size_t ldx, const int32_t *rows, int n, int width,
                          float *out, size_t ldo)
{
    if (n && may_run())
        launched(td_cuda_take_rows(stream(), x, ldx, rows, n, width, out, ldo), "choice of rows");
}

static void ops_sum_tree(td_pool *, const float *parts, size_t part_stride, int n_parts, int T, int N,
                         size_t ld, const float *bias, float *y, size_t ldy, bool add)
{
    if (may_run())
        launched(td_cuda_sum_tree(stream(), parts, part_stride, n_parts, T, N, ld, bias, y, ldy, add),
                 "sum of parts");
}

static void ops_rows_to_i8(td_pool *, const float *x, int T, int E, void *out)
{
    if (may_run()) launched(td_cuda_rows_to_i8(stream(), x, T, E, out), "rows as integers");
}

static void ops_rows_of_i8(td_pool *, const void *in, int T, int E, float *x)
{
    if (may_run()) launched(td_cuda_rows_of_i8(stream(), in, T, E, x), "rows of integers");
}

static void ops_rope_append(td_pool *, const td_rope_args *a)
{
    if (may_run()) launched(td_cuda_rope_append(stream(), a), "rope");
}

static void operand_silu_mul(td_pool *, const float *x, size_t ldx, int T, int F, void *out, td_operand to,
                             size_t ldo)
{
    if (!may_run()) return;
    const td_cuda_codes codes = td_cuda_codes_in(out, ldo, T, F, to.group);
    launched(to.dtype == TD_E4M3 ? td_cuda_act_quant(stream(), TD_ACT_SILU, x, ldx, &codes)
                                 : td_cuda_act_mul(stream(), TD_ACT_SILU, x, ldx, T, F, out, to.dtype, ldo),
             "activation");
}

static void ops_silu_mul(td_pool *, const float *x, size_t ldx, int T, int F, float *out, size_t ldo)
{
    operand_silu_mul(nullptr, x, ldx, T, F, out, td_operand{TD_F32, 0}, ldo);
}

/* ---- mixture of experts ---- */

static void ops_moe_logits(td_pool *, const td_table *router, const float *x, size_t ldx, int T,
                           float *logits)
{
    if (may_run())
        launched(
            td_cuda_moe_logits(stream(), router->p, router->dtype, router->N, router->K, x, ldx, T, logits),
            "router");
}

static void ops_moe_route(td_pool *, const td_route_law *law, const float *logits, int T, int32_t *ids,
                          float *weights)
{
    if (may_run()) launched(td_cuda_moe_route(stream(), law, logits, T, ids, weights), "choice of experts");
}

static void ops_moe_place(td_pool *, const int32_t *ids, int T, int top_k, int n_experts, int32_t *row0,
                          int32_t *row)
{
    if (may_run()) launched(td_cuda_moe_place(stream(), ids, T, top_k, n_experts, row0, row), "placement");
}

static void operand_moe_gather(td_pool *, const float *x, size_t ldx, const int32_t *row, int T, int top_k,
                               int E, void *out, td_dtype to, size_t ldo)
{
    if (may_run())
        launched(td_cuda_moe_gather(stream(), x, ldx, row, T, top_k, E, out, to, ldo), "gathering");
}

static void ops_moe_gather(td_pool *, const float *x, size_t ldx, const int32_t *row, int T, int top_k, int E,
                           float *out, size_t ldo)
{
    operand_moe_gather(nullptr, x, ldx, row, T, top_k, E, out, TD_F32, ldo);
}

static void ops_moe_combine(td_pool *, const float *y, size_t ldy, const int32_t *row, const float *weights,
                            int T, int top_k, int E, float *out, size_t ldo)
{
    if (may_run())
        launched(td_cuda_moe_combine(stream(), y, ldy, row, weights, T, top_k, E, out, ldo), "combination");
}

static td_status ops_wait()
{
    kept(ctx.dev->sync(ctx.dev, TD_STREAM_COMPUTE));
    return td_cuda_ops_status();
}

/* ---- sizes ---- */

/* A half of the ring: masks and page tables of a step. Penalties and biases may need more. */
static size_t ring_bytes(const td_ops_room *r)
{
    size_t rows = (size_t)r->max_logits * (sizeof(td_sample_row) + padded(((size_t)r->V + 31) / 32 * 4)) + ALIGN;
    size_t bytes = rows + padded(step_bytes(r));
    return bytes > HALF_BYTES ? bytes : HALF_BYTES;
}

static void ring_reserve(size_t bytes)
{
    for (ring_half &h : ctx.half) {
        if (h.bytes >= bytes || !may_run()) continue;
        kept(ctx.dev->sync(ctx.dev, TD_STREAM_COMPUTE));
        half_close(&h);
        kept(half_open(&h, bytes));
    }
}

static td_status ops_reserve(const td_ops_room *r)
{
    if (may_run()) products_reserve(r);
    if (may_run()) attention_reserve(r);
    if (may_run()) choice_reserve(r);
    if (may_run()) ring_reserve(ring_bytes(r));
    ctx.grown = 0;
    return td_cuda_ops_status();
}

static void fill_table(td_ops *t, td_operand_ops *o)
{
    *t = td_ops{};
    t->operand = o;
    o->rmsnorm = operand_rmsnorm;
    o->silu_mul = operand_silu_mul;
    o->moe_gather = operand_moe_gather;
    t->dev = ctx.dev;
    t->wait = ops_wait;
    t->status = td_cuda_ops_status;
    t->reserve = ops_reserve;
    t->take_rows = ops_take_rows;
    t->family = "cuda";
    t->full_rows = 256; /* by arithmetic: flops over bytes of an H200, 170 to 220 */
    t->numerics = ctx.kernels.numerics; /* as it is at any time */
    t->kv_dtype = TD_BF16;
    t->embed_table = ops_embed_table;
    t->rmsnorm = ops_rmsnorm;
    t->sum_tree = ops_sum_tree;
    t->rows_to_i8 = ops_rows_to_i8;
    t->rows_of_i8 = ops_rows_of_i8;
    t->rope_append = ops_rope_append;
    t->silu_mul = ops_silu_mul;
    t->moe_logits = ops_moe_logits;
    t->moe_route = ops_moe_route;
    t->moe_place = ops_moe_place;
    t->moe_gather = ops_moe_gather;
    t->moe_combine = ops_moe_combine;
    products_fill(t, o);
    attention_fill(t);
    choice_fill(t);
    replay_fill(t);
}
} // namespace td_ops_cuda

using namespace td_ops_cuda;

extern "C" td_status td_cuda_ops_open_as(td_dev *dev, const td_cuda_mode *mode, const td_ops **out)
{
    if (ctx.dev) return td_fail(TD_EFULL, "the CUDA operations are open already");
    if (strcmp(dev->kind, "cuda"))
        return td_fail(TD_ENOSUP, "CUDA operations on a device of kind %s", dev->kind);
    ctx = context{};
    ctx.dev = dev;
    td_status s = TD_OK;
    for (ring_half &h : ctx.half)
        if (s == TD_OK) s = half_open(&h, HALF_BYTES);
    if (s == TD_OK) s = td_cuda_choice_open(dev, mode->fast, mode->also, &ctx.kernels);
    if (s == TD_OK && mode->check) s = td_cuda_choice_check(&ctx.kernels);
    if (s != TD_OK) {
        td_cuda_ops_close();
        return s;
    }
    fill_table(&ctx.ops, &ctx.operand);
    *out = &ctx.ops;
    return TD_OK;
}

extern "C" td_status td_cuda_ops_status(void)
{
    td_status s = ctx.status;
    ctx.status = TD_OK;
    return s == TD_OK ? s : td_refuse(s, "%s", ctx.reason);
}

extern "C" unsigned td_cuda_ops_grown(void)
{
    return ctx.grown;
}

extern "C" unsigned td_cuda_ops_kernels(void)
{
    return ctx.kernels.may;
}

extern "C" void td_cuda_ops_keep(unsigned bits)
{
    td_cuda_choice_drop(&ctx.kernels, ~bits);
}

extern "C" void td_cuda_ops_close(void)
{
    if (!ctx.dev) return;
    ctx.dev->sync(ctx.dev, TD_STREAM_COMPUTE);
    replay_close();
    td_cuda_choice_close(&ctx.kernels);
    for (ring_half &h : ctx.half) half_close(&h);
    products_close();
    attention_close();
    choice_close();
    ctx = context{};
}

extern "C" td_status td_cuda_status(int code, const char *what)
{
    if (!code) return TD_OK;
    if (code == cudaErrorInvalidValue)
        return td_fail(TD_ENOSUP, "CUDA: %s: a shape that no kernel takes", what);
    return td_fail(TD_EDEVICE, "CUDA: %s: %s", what, cudaGetErrorString((cudaError_t)code));
}
