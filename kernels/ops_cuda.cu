// SPDX-License-Identifier: Apache-2.0
/* kernels/ops_cuda.cu - the launchers as one td_ops over a device's compute stream (kernels/cuda.h, "the
 * table").
 *
 * What host memory holds (rows to sample, page tables) goes through a ring of two pinned halves: a half is
 * written again only after the stream has passed the event that follows its last copy. */
#include "kernels/cuda.h"
#include "kernels/choose_cuda.h"
#include "kernels/cuda_attn.h"
#include "kernels/cuda_gemm.h"
#include "kernels/td_cuda.h"
#include <stdlib.h>
#include <string.h>

namespace
{
enum { HALVES = 2, STEPS = 4, LAYOUT_FRAGMENT = 2 /* family.h */ };
const size_t MAX_SPLIT_SLOTS = (size_t)1 << 17; /* partial results of attention: 68 MB at D = 128 */
const size_t HALF_BYTES = (size_t)1 << 20, ALIGN = 256;

struct ring_half {
    char *host, *device;
    size_t used, bytes;
    td_event *passed;
};

struct block {
    char *p;
    size_t bytes;
};

/* Sequences and page tables as the device has them, with the work list made from them: serves every layer of
 * a group, and is sent again only when it differs. */
struct step_copy {
    char *host; /* what was sent */
    size_t bytes, room;
    int n_seq, H, G, D, window;
    size_t max_slots, stamp;
    bool prompts, few;
    block data, plan;
};

struct context {
    td_dev *dev;
    td_status status;
    ring_half half[HALVES];
    int at;
    block sample, out, gemm, splits;
    step_copy step[STEPS];
    size_t stamp;
    td_cuda_choice choice;
    unsigned grown;
    td_ops ops;
} ctx;

void failed(td_status s)
{
    if (ctx.status == TD_OK) ctx.status = s;
}

/* False after any error: nothing is queued behind one. */
bool may_run()
{
    return ctx.status == TD_OK;
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
    return ctx.dev->stream[TD_STREAM_COMPUTE];
}

/* Device memory of at least `bytes`, kept for the next call; grows with a synchronization. */
bool want(block *b, size_t bytes)
{
    if (b->bytes >= bytes) return true;
    td_dev *d = ctx.dev;
    ctx.grown++;
    td_status s = d->sync(d, TD_STREAM_COMPUTE);
    if (b->p) d->free(d, b->p);
    *b = block{nullptr, 0};
    void *p = nullptr;
    if (s == TD_OK) s = d->alloc(d, bytes, &p);
    if (s == TD_OK)
        *b = block{(char *)p, bytes};
    else
        failed(s);
    return s == TD_OK;
}

/* ---- the ring ---- */

void half_close(ring_half *h)
{
    td_dev *d = ctx.dev;
    if (h->host) d->free_host(d, h->host);
    if (h->device) d->free(d, h->device);
    if (h->passed) d->event_close(d, h->passed);
    *h = ring_half{};
}

td_status half_open(ring_half *h, size_t bytes)
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
td_status turn(size_t bytes)
{
    td_dev *d = ctx.dev;
    TD_TRY(d->record(d, TD_STREAM_COMPUTE, ctx.half[ctx.at].passed));
    ctx.at = (ctx.at + 1) % HALVES;
    ring_half *h = &ctx.half[ctx.at];
    if (h->bytes < bytes) {
        TD_TRY(d->sync(d, TD_STREAM_COMPUTE));
        ctx.grown++;
        half_close(h);
        TD_TRY(half_open(h, bytes * 2));
    } else {
        td_status s;
        while ((s = d->done(d, h->passed)) == TD_AGAIN) {
        }
        TD_TRY(s);
    }
    h->used = 0;
    return TD_OK;
}

/* One argument block of a call: parts are put one after another, then sent in one transfer. */
struct parcel {
    ring_half *h;
    size_t start, used;
};

size_t padded(size_t n)
{
    return (n + ALIGN - 1) / ALIGN * ALIGN;
}

bool parcel_open(parcel *p, size_t bytes)
{
    if (ctx.half[ctx.at].used + bytes > ctx.half[ctx.at].bytes) {
        td_status s = turn(bytes);
        if (s != TD_OK) failed(s);
        if (s != TD_OK) return false;
    }
    *p = parcel{&ctx.half[ctx.at], ctx.half[ctx.at].used, ctx.half[ctx.at].used};
    return true;
}

/* Copies n bytes in; the device address they will have. NULL stays NULL. */
template <class T> const T *parcel_put(parcel *p, const T *src, size_t n)
{
    if (!src || !n) return nullptr;
    memcpy(p->h->host + p->used, src, n * sizeof(T));
    const T *at = (const T *)(p->h->device + p->used);
    p->used += padded(n * sizeof(T));
    return at;
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

/* ---- weights and products ---- */

td_dtype ops_packed_dtype(td_dtype from)
{
    return from == TD_F16 ? TD_F16 : TD_BF16;
}

td_cuda_wtype type_of(td_dtype packed)
{
    return packed == TD_F16 ? TD_CUDA_W_F16 : TD_CUDA_W_BF16;
}

size_t ops_packed_bytes(int N, int K, td_dtype from)
{
    return td_cuda_gemm_packed_bytes(N, K, 0, type_of(ops_packed_dtype(from)));
}

void ops_pack(void *dst, const void *src, td_dtype from, int N, int K, int n0, int n1)
{
    td_cuda_gemm_pack_host(dst, src, from, N, K, 0, type_of(ops_packed_dtype(from)), n0, n1);
}

size_t ops_scratch_bytes(int, int, int, int)
{
    return ALIGN; /* workspaces are the table's own */
}

/* Packing knows no slices: the order is the same when slices are whole blocks of 64 columns. Other matrices have
 * bits of this table alone and cannot be cut over ranks. */
bool weight_of(const td_weight *w, td_cuda_weight *out)
{
    /* 1 is one chain, as a rank of eight has it; 0 leaves the cut of K to the kernel */
    int slices = w->slices > 1 && w->K / w->slices % 64 ? 0 : w->slices;
    *out = td_cuda_weight{w->N, w->K, slices, type_of(w->dtype), w->p, w->bias, nullptr};
    const char *why = td_cuda_gemm_refuses(w->N, w->K, slices, out->type);
    if (why)
        failed(td_fail(TD_ENOSUP, "CUDA: product of %d x %d in %d slices: %s", w->N, w->K, w->slices, why));
    return !why;
}

/* Its counters are zero before the first call. */
bool want_gemm(int T, int N, int K)
{
    size_t had = ctx.gemm.bytes;
    if (!want(&ctx.gemm, td_cuda_gemm_ws_bytes(T, N, K))) return false;
    if (ctx.gemm.bytes != had) kept(ctx.dev->fill(ctx.dev, TD_STREAM_COMPUTE, ctx.gemm.p, 0, TD_CUDA_GEMM_COUNTERS * 4));
    return may_run();
}

void ops_linear(td_pool *, void *, const td_weight *w, const float *x, size_t ldx, int T, float *y,
                size_t ldy, bool add)
{
    td_cuda_weight d;
    if (T == 0 || !may_run() || !weight_of(w, &d)) return;
    if (!want_gemm(T, w->N, w->K)) return;
    td_cuda_gemm_args a = {};
    a.w = &d;
    a.x = x;
    a.x_is_f32 = true;
    a.ldx = ldx;
    a.T = T;
    a.y = y;
    a.ldy = ldy;
    a.add = add;
    a.ws = ctx.gemm.p;
    kept(td_cuda_choice_gemm(&ctx.choice, stream(), &a, w->rows));
}

/* Row counts come to the host first: one wait for each grouped product. */
void ops_linear_grouped(const td_ops *, td_pool *, void *, const td_grouped *a)
{
    int32_t row0[TD_MAX_EXPERTS + 1];
    td_dev *d = ctx.dev;
    if (!may_run() || a->n > TD_MAX_EXPERTS) return;
    td_status s = d->download(d, TD_STREAM_COMPUTE, row0, a->row0, ((size_t)a->n + 1) * sizeof *row0);
    if (s == TD_OK) s = d->sync(d, TD_STREAM_COMPUTE);
    if (s != TD_OK) failed(s);
    for (int e = 0; e < a->n && may_run(); e++)
        if (row0[e + 1] > row0[e])
            ops_linear(nullptr, nullptr, &a->w[e], a->x + (size_t)row0[e] * a->ldx, a->ldx,
                       row0[e + 1] - row0[e], a->y + (size_t)row0[e] * a->ldy, a->ldy, false);
}

void ops_embed_packed(td_pool *, const td_weight *w, const int32_t *ids, int T, float *out, size_t ldo)
{
    td_cuda_weight d;
    if (T && may_run() && weight_of(w, &d))
        launched(td_cuda_gemm_embed(stream(), &d, ids, T, out, ldo), "embedding");
}

/* ---- attention ---- */

int pages_of(const td_attn_seq *q, int P)
{
    return q->n_rows > 0 ? (q->pos0 + q->n_rows + P - 1) / P : 0;
}

/* [n_seq] td_cuda_attn_seq, then all page tables one after another. */
size_t describe_step(const td_attn_args *a, step_copy *c)
{
    int P = a->kv->P, n_pages = 0;
    for (int i = 0; i < a->n_seq; i++) n_pages += pages_of(&a->seq[i], P);
    size_t head = (size_t)a->n_seq * sizeof(td_cuda_attn_seq), bytes = head + (size_t)n_pages * 4;
    if (c->room < bytes) {
        free(c->host);
        c->room = bytes * 2;
        c->host = (char *)malloc(c->room);
        if (!c->host) c->room = 0;
        if (!c->host) return 0;
    }
    td_cuda_attn_seq *q = (td_cuda_attn_seq *)c->host;
    int32_t *pages = (int32_t *)(c->host + head), at = 0;
    for (int i = 0; i < a->n_seq; i++) {
        q[i] = td_cuda_attn_seq{a->seq[i].row0, a->seq[i].n_rows, a->seq[i].pos0, at};
        int n = pages_of(&a->seq[i], P);
        memcpy(pages + at, a->seq[i].pages, (size_t)n * 4);
        at += n;
    }
    return bytes;
}

/* Where each sequence will be computed: the rule of cuda_attn.h's plan. */
void choose_kernels(const td_attn_args *a, step_copy *c)
{
    size_t slots = 0;
    c->prompts = c->few = false;
    for (int i = 0; i < a->n_seq; i++) {
        const td_attn_seq *q = &a->seq[i];
        if (q->n_rows * (a->H / a->G) <= TD_CUDA_ATTN_FEW) {
            c->few = true;
            slots += td_cuda_attn_slots(q->n_rows, q->pos0, a->window, a->H);
        } else
            c->prompts = true;
    }
    c->max_slots = slots < MAX_SPLIT_SLOTS ? slots : MAX_SPLIT_SLOTS;
    if (slots > MAX_SPLIT_SLOTS) c->prompts = true;
}

bool send_step(const td_attn_args *a, step_copy *c)
{
    parcel p;
    td_dev *d = ctx.dev;
    choose_kernels(a, c);
    if (!want(&c->data, c->bytes) || !want(&c->plan, td_cuda_attn_plan_bytes(a->n_seq)) ||
        !want(&ctx.splits, td_cuda_attn_ws_bytes(c->max_slots, a->D)) || !parcel_open(&p, padded(c->bytes)))
        return false;
    const char *sent = parcel_put(&p, c->host, c->bytes);
    if (!parcel_send(&p)) return false;
    td_status s = d->copy(d, TD_STREAM_COMPUTE, c->data.p, sent, c->bytes);
    if (s != TD_OK) failed(s);
    if (s == TD_OK)
        launched(td_cuda_attn_plan(stream(), (const td_cuda_attn_seq *)c->data.p, a->n_seq, a->H, a->G, a->D,
                                   a->window, c->max_slots, TD_CUDA_ATTN_FEW, c->plan.p),
                 "plan of attention");
    return may_run();
}

/* The copy that holds this step's tables; the least recently used one is given to a new step. */
step_copy *step_of(const td_attn_args *a)
{
    static step_copy fresh; /* its buffer is swapped with the copy's */
    size_t bytes = describe_step(a, &fresh);
    step_copy *c = &ctx.step[0];
    if (!bytes) failed(td_fail(TD_EFULL, "out of memory for page tables"));
    if (!bytes) return nullptr;
    for (step_copy &s : ctx.step) {
        if (s.bytes == bytes && s.n_seq == a->n_seq && s.H == a->H && s.G == a->G && s.D == a->D &&
            s.window == a->window && !memcmp(s.host, fresh.host, bytes)) {
            s.stamp = ++ctx.stamp;
            return &s;
        }
        if (s.stamp < c->stamp) c = &s;
    }
    char *host = c->host;
    size_t room = c->room;
    c->host = fresh.host;
    c->room = fresh.room;
    fresh.host = host;
    fresh.room = room;
    c->bytes = bytes;
    c->n_seq = a->n_seq;
    c->H = a->H;
    c->G = a->G;
    c->D = a->D;
    c->window = a->window;
    c->stamp = ++ctx.stamp;
    if (send_step(a, c)) return c;
    c->bytes = 0;
    return nullptr;
}

void ops_attention(td_pool *, void *, const td_attn_args *a)
{
    if (a->n_seq == 0 || !may_run()) return;
    const char *why = td_cuda_attn_refuses(a->H, a->G, a->D, a->kv->P, a->kv->dtype);
    if (why) failed(td_fail(TD_ENOSUP, "CUDA: attention of %d/%d heads of %d: %s", a->H, a->G, a->D, why));
    step_copy *c = why ? nullptr : step_of(a);
    if (!c) return;
    td_cuda_attn_args d = {};
    d.q = a->q;
    d.ldq = a->ldq;
    d.out = a->out;
    d.ldo = a->ldo;
    d.out_dtype = TD_F32;
    d.kv = a->kv;
    d.slot = a->slot;
    d.seq = (const td_cuda_attn_seq *)c->data.p;
    d.n_seq = a->n_seq;
    d.pages = (const int32_t *)(c->data.p + (size_t)a->n_seq * sizeof(td_cuda_attn_seq));
    d.H = a->H;
    d.G = a->G;
    d.D = a->D;
    d.scale = a->scale;
    d.window = a->window;
    for (int i = 0; i < a->n_seq; i++) d.T = max(d.T, a->seq[i].row0 + a->seq[i].n_rows);
    d.prompts = c->prompts;
    d.few = c->few;
    d.plan = c->plan.p;
    d.ws = ctx.splits.p;
    d.max_slots = c->max_slots;
    kept(td_cuda_choice_attention(&ctx.choice, stream(), &d));
}

/* ---- rows ---- */

void ops_embed_table(td_pool *, const td_table *w, const int32_t *ids, int T, float *out, size_t ldo)
{
    if (may_run())
        launched(td_cuda_embed(stream(), w->p, w->dtype, w->N, w->K, ids, T, out, ldo), "embedding");
}

void ops_rmsnorm(td_pool *, const float *x, size_t ldx, const float *w, float eps, int T, int E, float *out,
                 size_t ldo)
{
    if (may_run()) launched(td_cuda_rmsnorm(stream(), x, ldx, w, eps, T, E, out, TD_F32, ldo), "norm");
}

void ops_take_rows(td_pool *, const float *x, size_t ldx, const int32_t *rows, int n, int width, float *out,
                   size_t ldo)
{
    if (n && may_run()) launched(td_cuda_take_rows(stream(), x, ldx, rows, n, width, out, ldo), "choice of rows");
}

void ops_sum_tree(td_pool *, const float *parts, size_t part_stride, int n_parts, int T, int N, size_t ld,
                  const float *bias, float *y, size_t ldy, bool add)
{
    if (may_run())
        launched(td_cuda_sum_tree(stream(), parts, part_stride, n_parts, T, N, ld, bias, y, ldy, add),
                 "sum of parts");
}

void ops_rope_append(td_pool *, const td_rope_args *a)
{
    if (may_run()) launched(td_cuda_rope_append(stream(), a), "rope");
}

void ops_silu_mul(td_pool *, const float *x, size_t ldx, int T, int F, float *out, size_t ldo)
{
    if (may_run())
        launched(td_cuda_act_mul(stream(), TD_ACT_SILU, x, ldx, T, F, out, TD_F32, ldo), "activation");
}

/* ---- mixture of experts ---- */

void ops_moe_logits(td_pool *, const td_table *router, const float *x, size_t ldx, int T, float *logits)
{
    if (may_run())
        launched(
            td_cuda_moe_logits(stream(), router->p, router->dtype, router->N, router->K, x, ldx, T, logits),
            "router");
}

void ops_moe_route(td_pool *, const td_route_law *law, const float *logits, int T, int32_t *ids,
                   float *weights)
{
    if (may_run()) launched(td_cuda_moe_route(stream(), law, logits, T, ids, weights), "choice of experts");
}

void ops_moe_place(td_pool *, const int32_t *ids, int T, int top_k, int n_experts, int32_t *row0,
                   int32_t *row)
{
    if (may_run()) launched(td_cuda_moe_place(stream(), ids, T, top_k, n_experts, row0, row), "placement");
}

void ops_moe_gather(td_pool *, const float *x, size_t ldx, const int32_t *row, int T, int top_k, int E,
                    float *out, size_t ldo)
{
    if (may_run())
        launched(td_cuda_moe_gather(stream(), x, ldx, row, T, top_k, E, out, TD_F32, ldo), "gathering");
}

void ops_moe_combine(td_pool *, const float *y, size_t ldy, const int32_t *row, const float *weights, int T,
                     int top_k, int E, float *out, size_t ldo)
{
    if (may_run())
        launched(td_cuda_moe_combine(stream(), y, ldy, row, weights, T, top_k, E, out, ldo), "combination");
}

/* ---- token choice ---- */

size_t row_bytes(const td_sample_row *r, int V)
{
    return padded(r->n_pen * sizeof *r->pen) + padded(r->n_bias * sizeof *r->bias) +
           (r->mask ? padded(((size_t)V + 31) / 32 * 4) : 0);
}

/* Copies of the rows whose pointers are the device's; false after an error. */
const td_sample_row *send_rows(const td_sample_row *rows, int n, int V)
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
void fetch_out(td_sample_out *out, int n)
{
    td_dev *d = ctx.dev;
    td_status s = d->download(d, TD_STREAM_COMPUTE, out, ctx.out.p, (size_t)n * sizeof *out);
    if (s == TD_OK) s = d->sync(d, TD_STREAM_COMPUTE);
    if (s != TD_OK) failed(s);
}

void ops_sample(td_pool *, float *logits, size_t ld, int V, const td_sample_row *rows, int n,
                td_sample_out *out)
{
    bool with_logprobs = false;
    for (int i = 0; i < n; i++) {
        out[i].token = -1;
        with_logprobs = with_logprobs || rows[i].logprobs >= 0;
    }
    if (n == 0 || !may_run() || !want(&ctx.sample, td_cuda_sample_bytes(n, V)) ||
        !want(&ctx.out, (size_t)n * sizeof *out))
        return;
    const td_sample_row *at = send_rows(rows, n, V);
    if (!at) return;
    launched(td_cuda_sample(stream(), logits, ld, V, at, n, with_logprobs, ctx.sample.p,
                            (td_sample_out *)ctx.out.p),
             "token choice");
    if (may_run()) fetch_out(out, n);
}

void ops_score(td_pool *, const float *logits, size_t ld, int V, const int32_t *ids, int n_alternatives,
               int n, td_sample_out *out)
{
    parcel p;
    if (n == 0 || !may_run() || !want(&ctx.out, (size_t)n * sizeof *out) ||
        !parcel_open(&p, padded((size_t)n * sizeof *ids)))
        return;
    const int32_t *at = parcel_put(&p, ids, (size_t)n);
    if (!parcel_send(&p)) return;
    launched(td_cuda_score(stream(), logits, ld, V, at, n_alternatives, n, (td_sample_out *)ctx.out.p),
             "scores");
    if (may_run()) fetch_out(out, n);
}

td_status ops_wait()
{
    td_status s = ctx.dev->sync(ctx.dev, TD_STREAM_COMPUTE);
    if (s != TD_OK) failed(s);
    return td_cuda_ops_status();
}

/* ---- sizes ---- */

/* Partial results of attention that a step may have, whatever its sequences are. */
size_t most_slots(const td_ops_room *r)
{
    size_t splits = ((size_t)r->max_len + TD_CUDA_ATTN_SPLIT - 1) / TD_CUDA_ATTN_SPLIT;
    size_t slots = (size_t)r->max_rows * (size_t)r->H * splits;
    return slots < MAX_SPLIT_SLOTS ? slots : MAX_SPLIT_SLOTS;
}

/* Masks and page tables of a step; penalties and biases may need more. */
size_t ring_bytes(const td_ops_room *r)
{
    size_t rows = (size_t)r->max_logits * (sizeof(td_sample_row) + padded(((size_t)r->V + 31) / 32 * 4)) + ALIGN;
    return rows > HALF_BYTES ? rows : HALF_BYTES;
}

td_status ops_reserve(const td_ops_room *r)
{
    const int rows = r->max_rows > r->max_expert_rows ? r->max_rows : r->max_expert_rows;
    const int block = (rows * (r->H / r->G) + 63) / 64 + r->max_rows; /* of the prompt kernel, at least 64 rows each */
    if (want_gemm(rows, r->N, r->K) && want(&ctx.splits, td_cuda_attn_ws_bytes(most_slots(r), r->D)) &&
        want(&ctx.sample, td_cuda_sample_bytes(r->max_logits, r->V)) &&
        want(&ctx.out, (size_t)r->max_logits * sizeof(td_sample_out)))
        for (int i = 0; i < HALVES && may_run(); i++)
            if (ctx.half[ctx.at].used || ctx.half[(ctx.at + 1) % HALVES].bytes < ring_bytes(r)) kept(turn(ring_bytes(r)));
    if (may_run()) kept(td_cuda_choice_reserve(&ctx.choice, rows, r->K, (long long)block * r->G));
    ctx.grown = 0;
    return td_cuda_ops_status();
}

td_status ops_beside(td_weight *const *w, int n, void **block)
{
    return td_cuda_choice_copies(&ctx.choice, w, n, block);
}

void fill_table(td_ops *t)
{
    *t = td_ops{};
    t->dev = ctx.dev;
    t->wait = ops_wait;
    t->reserve = ops_reserve;
    t->beside = ops_beside;
    t->take_rows = ops_take_rows;
    t->family = "cuda";
    t->numerics = ctx.choice.numerics;
    t->weight_dtype = t->kv_dtype = TD_BF16;
    t->layout = LAYOUT_FRAGMENT;
    t->packed_dtype = ops_packed_dtype;
    t->packed_bytes = ops_packed_bytes;
    t->pack = ops_pack;
    t->scratch_bytes = ops_scratch_bytes;
    t->linear = ops_linear;
    t->linear_grouped = ops_linear_grouped;
    t->attention = ops_attention;
    t->embed_packed = ops_embed_packed;
    t->embed_table = ops_embed_table;
    t->rmsnorm = ops_rmsnorm;
    t->sum_tree = ops_sum_tree;
    t->rope_append = ops_rope_append;
    t->silu_mul = ops_silu_mul;
    t->moe_logits = ops_moe_logits;
    t->moe_route = ops_moe_route;
    t->moe_place = ops_moe_place;
    t->moe_gather = ops_moe_gather;
    t->moe_combine = ops_moe_combine;
    t->sample = ops_sample;
    t->score = ops_score;
}
} // namespace

extern "C" td_status td_cuda_ops_open_as(td_dev *dev, const td_cuda_mode *mode, const td_ops **out)
{
    if (ctx.dev) return td_fail(TD_EFULL, "the CUDA operations are open already");
    if (strcmp(dev->kind, "cuda"))
        return td_fail(TD_ENOSUP, "CUDA operations on a device of kind %s", dev->kind);
    ctx = context{};
    ctx.dev = dev;
    td_status s = TD_OK;
    for (int i = 0; i < HALVES && s == TD_OK; i++) s = half_open(&ctx.half[i], HALF_BYTES);
    if (s == TD_OK) s = td_cuda_choice_open(dev, mode->fast, mode->also, &ctx.choice);
    if (s == TD_OK && mode->check) s = td_cuda_choice_check(&ctx.choice);
    if (s != TD_OK) {
        td_cuda_ops_close();
        return s;
    }
    fill_table(&ctx.ops);
    *out = &ctx.ops;
    return TD_OK;
}

extern "C" td_status td_cuda_ops_status(void)
{
    td_status s = ctx.status;
    ctx.status = TD_OK;
    return s;
}

extern "C" unsigned td_cuda_ops_grown(void)
{
    return ctx.grown;
}

extern "C" void td_cuda_ops_close(void)
{
    if (!ctx.dev) return;
    ctx.dev->sync(ctx.dev, TD_STREAM_COMPUTE);
    td_cuda_choice_close(&ctx.choice);
    for (ring_half &h : ctx.half) half_close(&h);
    for (block *b : {&ctx.sample, &ctx.out, &ctx.gemm, &ctx.splits})
        if (b->p) ctx.dev->free(ctx.dev, b->p);
    for (step_copy &c : ctx.step) {
        free(c.host);
        if (c.data.p) ctx.dev->free(ctx.dev, c.data.p);
        if (c.plan.p) ctx.dev->free(ctx.dev, c.plan.p);
    }
    ctx = context{};
}

extern "C" td_status td_cuda_status(int code, const char *what)
{
    if (!code) return TD_OK;
    if (code == cudaErrorInvalidValue)
        return td_fail(TD_ENOSUP, "CUDA: %s: a shape that no kernel takes", what);
    return td_fail(TD_EDEVICE, "CUDA: %s: %s", what, cudaGetErrorString((cudaError_t)code));
}
