// SPDX-License-Identifier: Apache-2.0
/* kernels/ops_cuda_attn.cu - the CUDA table's attention: sequences and page tables go to the device once a
 * step. */
#include "kernels/cuda_attn.h"
#include "kernels/ops_cuda.h"
#include <stdlib.h>

namespace td_ops_cuda
{
static const size_t MAX_PAGES = (size_t)4 << 20;
static const size_t MAX_SPLIT_SLOTS = (size_t)1 << 17; /* partial results of attention: 68 MB at D = 128 */

/* Sequences and page tables as the device has them, with the work list made from them: serves every layer of
 * a group, and is sent again only when it differs. */
struct step_copy {
    char *host; /* what was sent */
    size_t bytes, room;
    int n_seq, H, G, D, window;
    int part0, n_parts, rank, ranks; /* n_parts 0: no parts */
    size_t max_slots, stamp;
    bool prompts, few;
    block data, plan;
};

static step_copy copies[4];
static size_t now; /* counts uses */
static block splits = {nullptr, 0, true};
static block plans[TD_ATTN_GROUPS] = {
    {nullptr, 0, true}, {nullptr, 0, true}, {nullptr, 0, true}, {nullptr, 0, true}}; /* of placed sequences */

/* Entries of its page table that are read. */
static int pages_of(const td_attn_args *a, const td_attn_seq *q)
{
    int P = a->kv->P, S = TD_CUDA_ATTN_SPLIT, end = q->pos0 + q->n_rows;
    if (q->n_rows <= 0) return 0;
    if (!a->part) return (end + P - 1) / P;
    int rest = end % (S * a->ranks) - a->rank * S; /* of this rank's keys, those of the asked parts */
    int keys = end / (S * a->ranks) * S + min(max(rest, 0), S) - a->part0 * S;
    return (min(max(keys, 0), a->n_parts * S) + P - 1) / P;
}

/* [n_seq] td_cuda_attn_seq, then all page tables one after another. */
static size_t describe_step(const td_attn_args *a, step_copy *c)
{
    int n_pages = 0;
    for (int i = 0; i < a->n_seq; i++) n_pages += pages_of(a, &a->seq[i]);
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
        int n = pages_of(a, &a->seq[i]);
        memcpy(pages + at, a->seq[i].pages, (size_t)n * 4);
        at += n;
    }
    return bytes;
}

/* Where each sequence will be computed: the rule of cuda_attn.h's plan. */
static void choose_kernels(const td_attn_args *a, step_copy *c)
{
    size_t slots = 0;
    c->prompts = c->few = false;
    c->max_slots = 0;
    if (a->part) return;
    for (int i = 0; i < a->n_seq; i++) {
        const td_attn_seq *q = &a->seq[i];
        if (q->n_rows * (a->H / a->G) <= TD_CUDA_ATTN_FEW) {
            c->few = true;
            slots += td_attn_parts(q->n_rows, q->pos0, a->window, a->H);
        } else
            c->prompts = true;
    }
    c->max_slots = slots < MAX_SPLIT_SLOTS ? slots : MAX_SPLIT_SLOTS;
    if (slots > MAX_SPLIT_SLOTS) c->prompts = true;
}

static bool send_step(const td_attn_args *a, step_copy *c)
{
    choose_kernels(a, c);
    if (!want(&c->data, c->room) || !want(&c->plan, td_cuda_attn_plan_bytes(a->n_seq)) ||
        !want(&splits, td_cuda_attn_ws_bytes(c->max_slots, a->D)) || !send_to(c->data.p, c->host, c->bytes))
        return false;
    const td_cuda_attn_seq *seq = (const td_cuda_attn_seq *)c->data.p;
    if (a->part)
        launched(td_cuda_attn_plan_parts(stream(), seq, a->n_seq, a->H, a->G, a->n_parts, c->plan.p),
                 "plan of attention");
    else
        launched(td_cuda_attn_plan(stream(), seq, a->n_seq, a->H, a->G, a->D, a->window, c->max_slots,
                                   TD_CUDA_ATTN_FEW, c->plan.p),
                 "plan of attention");
    return may_run();
}

static bool same_parts(const td_attn_args *a, const step_copy *c)
{
    if (!a->part || !c->n_parts) return !a->part && !c->n_parts;
    return a->part0 == c->part0 && a->n_parts == c->n_parts && a->rank == c->rank && a->ranks == c->ranks;
}

/* The copy that holds this step's tables; the least recently used one is given to a new step. */
static step_copy *step_of(const td_attn_args *a)
{
    static step_copy fresh; /* its buffer is swapped with the copy's */
    size_t bytes = describe_step(a, &fresh);
    step_copy *c = &copies[0];
    if (!bytes) failed(td_fail(TD_EFULL, "out of memory for page tables"));
    if (!bytes) return nullptr;
    for (step_copy &s : copies) {
        if (s.bytes == bytes && s.n_seq == a->n_seq && s.H == a->H && s.G == a->G && s.D == a->D &&
            s.window == a->window && same_parts(a, &s) && !memcmp(s.host, fresh.host, bytes)) {
            s.stamp = ++now;
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
    c->part0 = a->part0;
    c->n_parts = a->part ? a->n_parts : 0;
    c->rank = a->rank;
    c->ranks = a->ranks;
    c->stamp = ++now;
    if (send_step(a, c)) return c;
    c->bytes = 0;
    return nullptr;
}

static bool sent(const td_attn_args *a, td_cuda_attn_args *d)
{
    step_copy *c = step_of(a);
    if (!c) return false;
    d->seq = (const td_cuda_attn_seq *)c->data.p;
    d->n_seq = a->n_seq;
    d->pages = (const int32_t *)(c->data.p + (size_t)a->n_seq * sizeof(td_cuda_attn_seq));
    for (int i = 0; i < a->n_seq; i++) d->T = max(d->T, a->seq[i].row0 + a->seq[i].n_rows);
    d->prompts = c->prompts;
    d->few = c->few;
    d->plan = c->plan.p;
    d->max_slots = c->max_slots;
    return true;
}

/* ---- sequences that are there already ---- */

/* All the room for partial results that there is, so that recordings outlive a growing context; it grows to
 * powers of two. */
static size_t room_for(size_t parts, int D)
{
    const size_t none = td_cuda_attn_ws_bytes(0, D), each = td_cuda_attn_ws_bytes(1, D) - none;
    size_t have = splits.bytes > none ? (splits.bytes - none) / each : 0, room = 1;
    if (have >= min(parts, MAX_SPLIT_SLOTS)) return min(have, MAX_SPLIT_SLOTS);
    while (room < parts && room < MAX_SPLIT_SLOTS) room *= 2;
    return want(&splits, td_cuda_attn_ws_bytes(room, D)) ? room : 0;
}

/* The launches follow from n, the number of parts that have room, and whether more may come (prompts). */
static bool placed(const td_attn_args *a, td_cuda_attn_args *d)
{
    const td_attn_placed *p = a->placed;
    block *plan = &plans[p->group];
    size_t room = room_for(p->parts, a->D);
    if (!room || !want(plan, td_cuda_attn_plan_bytes(p->n))) return false;
    d->seq = p->seq;
    d->n_seq = d->T = p->n;
    d->pages = p->pages;
    d->prompts = p->parts > MAX_SPLIT_SLOTS;
    d->few = true;
    d->plan = plan->p;
    d->max_slots = room;
    if (!d->prompts) ctx.rec.parts = min(ctx.rec.parts, room);
    if (p->fresh)
        launched(td_cuda_attn_plan(stream(), d->seq, d->n_seq, a->H, a->G, a->D, a->window, d->max_slots,
                                   TD_CUDA_ATTN_FEW, plan->p),
                 "plan of attention");
    return may_run();
}

static void ops_attention(td_pool *, void *, const td_attn_args *a)
{
    if ((a->placed ? a->placed->n : a->n_seq) == 0 || !may_run()) return;
    const char *why = td_cuda_attn_refuses(a->H, a->G, a->D, a->kv->P, a->kv->dtype);
    if (a->split && a->split != TD_CUDA_ATTN_SPLIT) why = "splits must have 256 keys";
    if (why) failed(td_fail(TD_ENOSUP, "CUDA: attention of %d/%d heads of %d: %s", a->H, a->G, a->D, why));
    td_cuda_attn_args d = {};
    if (why || !(a->placed ? placed : sent)(a, &d)) return;
    d.q = a->q;
    d.ldq = a->ldq;
    d.out = a->out;
    d.ldo = a->ldo;
    d.out_dtype = a->out_dtype;
    d.kv = a->kv;
    d.slot = a->slot;
    d.H = a->H;
    d.G = a->G;
    d.D = a->D;
    d.scale = a->scale;
    d.window = a->window;
    d.ws = splits.p;
    d.part = a->part;
    d.part0 = a->part0;
    d.n_parts = a->n_parts;
    d.rank = a->rank;
    d.ranks = a->ranks;
    if (a->part) launched(td_cuda_attention(stream(), &d), "attention by parts");
    else kept(td_cuda_choice_attention(&ctx.kernels, stream(), &d));
}

static void ops_attn_merge(td_pool *, const td_merge_args *a)
{
    if (may_run())
        launched(td_cuda_attn_merge(stream(), a->part, a->before, a->state, a->out, a->ldo, a->T, a->H, a->D,
                                    a->n_parts, a->ranks),
                 "merge of parts");
}

/* Pages of one slot: a pool of one slot begins there. */
static void ops_gather_pages(td_pool *, const td_kv *kv, int slot, const int32_t *pages, int n, void *out)
{
    enum { AT_ONCE = 1024 };
    td_kv src = *kv, dst = *kv;
    src.base = td_kv_page(kv, slot, 0);
    int32_t to[AT_ONCE];
    for (int i = 0; i < n && may_run(); i += AT_ONCE) {
        int k = min(n - i, (int)AT_ONCE);
        parcel p;
        if (!parcel_open(&p, 2 * padded((size_t)k * 4))) return;
        for (int j = 0; j < k; j++) to[j] = j;
        const int32_t *from_d = parcel_put(&p, pages + i, (size_t)k), *to_d = parcel_put(&p, to, (size_t)k);
        dst.base = (uint8_t *)out + (size_t)i * td_kv_page_bytes(kv);
        dst.n_pages = k;
        if (parcel_send(&p))
            launched(td_cuda_kv_copy(stream(), &dst, to_d, &src, from_d, k, 1), "gathering of pages");
    }
}

size_t attention_most_parts()
{
    return MAX_SPLIT_SLOTS;
}

void attention_fill(td_ops *t)
{
    t->attention = ops_attention;
    t->attn_merge = ops_attn_merge;
    t->gather_pages = ops_gather_pages;
}

/* Partial results that a step may have, whatever its sequences are. */
static size_t most_slots(const td_ops_room *r)
{
    size_t splits = ((size_t)r->max_len + TD_CUDA_ATTN_SPLIT - 1) / TD_CUDA_ATTN_SPLIT;
    size_t slots = (size_t)r->max_rows * (size_t)r->H * splits;
    return slots < MAX_SPLIT_SLOTS ? slots : MAX_SPLIT_SLOTS;
}

static size_t most_seqs(const td_ops_room *r)
{
    return (size_t)(r->max_seqs < r->max_rows ? r->max_seqs : r->max_rows);
}

size_t step_bytes(const td_ops_room *r)
{
    size_t pages = most_seqs(r) * ((size_t)r->max_len / (size_t)r->page_size + 1);
    if (pages > MAX_PAGES) pages = MAX_PAGES; /* more are possible where prefixes are shared, and make it grow */
    return most_seqs(r) * sizeof(td_cuda_attn_seq) + pages * 4;
}

void attention_reserve(const td_ops_room *r)
{
    const long long blocks = ((long long)r->max_rows * (r->H / r->G) + 63) / 64 + r->max_seqs; /* of 64 rows at least */
    want(&splits, td_cuda_attn_ws_bytes(most_slots(r), r->D));
    for (step_copy &c : copies)
        if (may_run() && want(&c.data, step_bytes(r))) want(&c.plan, td_cuda_attn_plan_bytes((int)most_seqs(r)));
    for (block &b : plans)
        if (may_run()) want(&b, td_cuda_attn_plan_bytes(min(r->max_rows, (int)TD_REPLAY_MAX_ROWS)));
    if (may_run()) kept(td_cuda_choice_reserve(&ctx.kernels, 0, 0, blocks * r->G));
}

void attention_close()
{
    for (step_copy &c : copies) {
        free(c.host);
        drop(&c.data);
        drop(&c.plan);
        c = step_copy{};
    }
    for (block &b : plans) drop(&b);
    drop(&splits);
}
} // namespace td_ops_cuda
