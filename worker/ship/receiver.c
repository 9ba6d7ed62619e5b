// SPDX-License-Identifier: Apache-2.0
#include "worker/ship/receiver.h"
#include "common/check.h"
#include <stdlib.h>
#include <string.h>

struct td_receiver {
    td_receiver_opts o;
    td_ship_part part;
    td_map live;                       /* epoch -> td_epoch * */
    /* epochs that landed: their COMMIT is acknowledged again (the first ACK may be lost) */
    uint64_t recent[TD_RECV_RECENT];
    uint32_t n_recent;
};

td_receiver *td_receiver_open(const td_receiver_opts *o)
{
    td_receiver *r = td_xalloc(sizeof *r);
    r->o = *o;
    td_ship_grid one = td_ship_grid_one(o->desc);
    td_ship_part_of(o->grid ? o->grid : &one, o->desc, o->rank, &r->part);
    td_map_init(&r->live, o->max_epochs);
    return r;
}

static void epoch_free(td_epoch *e)
{
    for (int g = 0; g < TD_MAX_GROUPS; g++) free(e->have[g]);
    for (uint32_t i = 0; i < e->n_src_seen; i++) free(e->src[i].seen);
    free(e->src);
    free(e->commit);
    free(e);
}

void td_receiver_free(td_receiver *r, void (*drop)(void *user))
{
    if (!r) return;
    size_t it = 0;
    uint64_t k, v;
    while (td_map_next(&r->live, &it, &k, &v)) {
        td_epoch *e = (td_epoch *)(uintptr_t)v;
        if (drop) drop(e->user);
        epoch_free(e);
    }
    td_map_deinit(&r->live);
    free(r);
}

td_status td_receiver_add(td_receiver *r, int64_t now_us, uint64_t epoch, uint32_t hit, uint32_t n_tokens,
                          uint32_t n_first, void *user)
{
    if (td_receiver_find(r, epoch))
        return td_fail(TD_EBADREQ, "epoch %llu is open already", (unsigned long long)epoch);
    td_epoch *e = td_xalloc(sizeof *e);
    if (!td_map_put(&r->live, epoch, (uint64_t)(uintptr_t)e)) {
        free(e);
        return td_refuse(TD_EFULL, "more than %u epochs", r->o.max_epochs);
    }
    e->id = epoch;
    e->user = user;
    e->n_tokens = n_tokens;
    e->n_first = n_first;
    e->progress_us = now_us;
    e->first_us = -1;
    e->max_frames = td_ship_plan_max_frames(r->o.desc, n_tokens);
    for (int g = 0; g < r->o.desc->n_groups; g++) {
        e->first_tok[g] = td_ship_plan_first(r->o.desc->group[g].window, hit, n_tokens);
        e->before[g] = td_token_before(&r->part.tokens, e->first_tok[g]);
        e->width[g] = td_token_before(&r->part.tokens, n_tokens) - e->before[g];
        uint64_t bits = (uint64_t)e->width[g] * r->part.n_slots[g] * r->part.n_heads[g];
        e->missing += bits;
        e->have[g] = td_xalloc((size_t)((bits + 63) / 64 + 1) * 8);
    }
    if (r->o.rank && !e->missing) e->state = TD_EPOCH_LANDED; /* nobody will say anything */
    return TD_OK;
}

td_epoch *td_receiver_find(td_receiver *r, uint64_t epoch)
{
    uint64_t v;
    return td_map_get(&r->live, epoch, &v) ? (td_epoch *)(uintptr_t)v : NULL;
}

void td_receiver_close(td_receiver *r, td_epoch *e)
{
    if (e->state == TD_EPOCH_LANDED) r->recent[r->n_recent++ % TD_RECV_RECENT] = e->id;
    td_map_del(&r->live, e->id);
    epoch_free(e);
}

uint32_t td_receiver_live(const td_receiver *r)
{
    return (uint32_t)r->live.n;
}

/* ---- coverage ---- */
/* Visit the words of bits [at, at + n): false if any is set already (test), or set them. */
static bool bits_free(const uint64_t *w, uint64_t at, uint64_t n)
{
    for (uint64_t end = at + n; at < end;) {
        uint64_t k = TD_MIN(64 - at % 64, end - at), mask = (k == 64 ? ~0ull : (1ull << k) - 1) << (at % 64);
        if (w[at / 64] & mask) return false;
        at += k;
    }
    return true;
}

static void bits_set(uint64_t *w, uint64_t at, uint64_t n)
{
    for (uint64_t end = at + n; at < end;) {
        uint64_t k = TD_MIN(64 - at % 64, end - at), mask = (k == 64 ? ~0ull : (1ull << k) - 1) << (at % 64);
        w[at / 64] |= mask;
        at += k;
    }
}

/* All (slot, head, token) of a rectangle, of which n tokens are this rank's: are they missing, or take them.
 */
static bool cover(const td_receiver *r, td_epoch *e, const td_rect *x, uint32_t n, bool set)
{
    const td_ship_part *p = &r->part;
    int g = x->group;
    uint64_t tok = td_token_before(&p->tokens, x->tok0) - e->before[g];
    for (uint32_t s = x->layer0; s < (uint32_t)x->layer0 + x->n_layers; s++)
        for (uint32_t h = x->head0; h < (uint32_t)x->head0 + x->n_heads; h++) {
            uint64_t at =
                ((uint64_t)(s - p->slot0[g]) * p->n_heads[g] + (h - p->head0[g])) * e->width[g] + tok;
            if (set) bits_set(e->have[g], at, n);
            else if (!bits_free(e->have[g], at, n)) return false;
        }
    if (set) e->missing -= (uint64_t)x->n_layers * x->n_heads * n;
    return true;
}

/* ---- one message ---- */
static const char *geometry(const td_receiver *r, const td_epoch *e, const td_kvframe *f)
{
    const td_model_desc *d = r->o.desc;
    if (f->group >= d->n_groups) return "no such page group";
    const td_ship_part *p = &r->part;
    int g = f->group;
    if (f->dtype != (uint16_t)r->o.kv_dtype) return "another KV type";
    if (f->head_dim != d->group[g].D || !f->n_heads || f->head0 < p->head0[g] ||
        f->head0 + f->n_heads > p->head0[g] + p->n_heads[g])
        return "other heads or head size";
    if (!f->n_layers || f->layer0 < p->slot0[g] || f->layer0 + f->n_layers > p->slot0[g] + p->n_slots[g])
        return "layers outside the group";
    if (!f->n_tok || f->tok0 < e->first_tok[g] || f->n_tok > e->n_tokens || f->tok0 > e->n_tokens - f->n_tok)
        return "tokens outside the reservation";
    if (!f->n_held || f->n_held != td_token_before(&p->tokens, f->tok0 + f->n_tok) -
                          td_token_before(&p->tokens, f->tok0))
        return "other tokens than this rank holds";
    uint64_t bytes =
        2ull * f->n_heads * f->head_dim * td_dtype_bytes(r->o.kv_dtype) * f->n_layers * f->n_held;
    if (bytes != f->payload_bytes || bytes > TD_KVF_FRAME_BYTES) return "payload size";
    if (f->index >= e->max_frames) return "frame index";
    return NULL;
}

/* Whose message it is; NULL with the reason. */
static td_epoch_src *source(const td_receiver *r, td_epoch *e, const td_kvframe *f, const char **why)
{
    *why = f->dst_rank != r->o.rank ? "for another rank" : "source rank";
    if (f->dst_rank != r->o.rank || f->src_rank >= TD_SHIP_MAX_RANKS) return NULL;
    if (f->src_rank >= e->n_src_seen) {
        uint32_t n = f->src_rank + 1u;
        e->src = td_xrealloc(e->src, n * sizeof *e->src);
        memset(e->src + e->n_src_seen, 0, (n - e->n_src_seen) * sizeof *e->src);
        e->n_src_seen = n;
    }
    return &e->src[f->src_rank];
}

static bool seen(const td_epoch_src *e, uint32_t index)
{
    return index / 64 < e->seen_words && e->seen[index / 64] >> (index % 64) & 1;
}

static void mark_seen(td_epoch_src *e, uint32_t index)
{
    if (index / 64 >= e->seen_words) {
        uint32_t words = TD_MAX(e->seen_words * 2, index / 64 + 1);
        e->seen = td_xrealloc(e->seen, words * sizeof *e->seen);
        memset(e->seen + e->seen_words, 0, (words - e->seen_words) * sizeof *e->seen);
        e->seen_words = words;
    }
    e->seen[index / 64] |= 1ull << (index % 64);
}

static td_recv_action failed(td_epoch *e, const char *why, bool bad)
{
    e->state = TD_EPOCH_FAILED;
    e->why = why;
    return (td_recv_action){.epoch = e, .answer = TD_KVF_NACK, .why = why, .bad = bad};
}

/* One source against its COMMIT, then all of them against what this rank lacks. */
static td_recv_action settle(td_epoch *e, const td_epoch_src *s, td_recv_action a)
{
    if (s->committed && s->frames > s->commit_frames) return failed(e, "more frames than COMMIT says", true);
    if (s->committed && s->frames == s->commit_frames && s->digest != s->commit_digest)
        return failed(e, "digest", true);
    if (!e->n_src || e->commits < e->n_src) return a;
    if (!s->committed) return failed(e, "more sources than COMMIT says", true);
    /* some are still on their way, or lost: the deadline decides */
    for (uint32_t i = 0; i < e->n_src_seen; i++)
        if (e->src[i].frames != e->src[i].commit_frames) return a;
    if (e->missing) return failed(e, "frames do not cover the reservation", true);
    e->state = TD_EPOCH_LANDED;
    a.answer = TD_KVF_ACK;
    return a;
}

static td_rect rect_of(const td_kvframe *f)
{
    return (td_rect){.group = f->group,
                     .layer0 = f->layer0,
                     .n_layers = f->n_layers,
                     .head0 = f->head0,
                     .n_heads = f->n_heads,
                     .dst = f->dst_rank,
                     .tok0 = f->tok0,
                     .n_tok = f->n_tok};
}

td_epoch *td_receiver_place(td_receiver *r, const td_kvframe *f, td_rect *rect)
{
    bool ours = f->type == TD_KVF_FRAME && f->incarnation == r->o.incarnation && f->dst_rank == r->o.rank;
    td_epoch *e = ours ? td_receiver_find(r, f->epoch) : NULL;
    if (!e || f->src_rank >= TD_SHIP_MAX_RANKS || geometry(r, e, f)) return NULL;
    if (f->src_rank < e->n_src_seen && seen(&e->src[f->src_rank], f->index)) return NULL;
    *rect = rect_of(f);
    return cover(r, e, rect, f->n_held, false) ? e : NULL;
}

static td_recv_action on_frame(td_receiver *r, td_epoch *e, int64_t now, const td_kvframe *f, uint32_t crc)
{
    const char *why = geometry(r, e, f);
    td_epoch_src *s = why ? NULL : source(r, e, f, &why);
    if (!s) return failed(e, why, true);
    td_recv_action a = {.epoch = e};
    if (seen(s, f->index)) return a;
    td_rect rect = rect_of(f);
    if (!cover(r, e, &rect, f->n_held, false)) return failed(e, "a part came twice", true);
    if (crc != f->payload_crc32c) return failed(e, "payload checksum", true);
    cover(r, e, &rect, f->n_held, true);
    mark_seen(s, f->index);
    if (e->first_us < 0) e->first_us = now;
    if (!s->frames) s->first_us = now;
    e->frames++;
    s->frames++;
    e->bytes += f->payload_bytes;
    s->digest ^= td_frame_digest(f);
    e->progress_us = now;
    a.taken = true;
    /* one each: right for any number of credits the sender was told */
    a.answer = TD_KVF_CREDIT;
    a.credits = 1;
    return settle(e, s, a);
}

static td_recv_action on_commit(td_receiver *r, td_epoch *e, int64_t now, const td_kvframe *f,
                                const void *payload, uint32_t crc)
{
    const char *why;
    td_epoch_src *s = source(r, e, f, &why);
    if (!s) return failed(e, why, true);
    if (s->committed) return (td_recv_action){.epoch = e};
    if (crc != f->payload_crc32c) return failed(e, "COMMIT checksum", true);
    bool first = !r->o.rank && !f->src_rank; /* from rank 0 to rank 0 */
    if (f->n_first && (!first || f->n_first != e->n_first))
        return failed(e, "not one first token per choice", true);
    if (!f->n_src || f->n_src > TD_SHIP_MAX_RANKS || (e->n_src && f->n_src != e->n_src))
        return failed(e, "number of sources", true);
    e->n_src = f->n_src;
    if (++e->commits > e->n_src) return failed(e, "more sources than COMMIT says", true);
    e->state = TD_EPOCH_COMMITTED;
    s->committed = true;
    s->commit_frames = f->index;
    s->commit_digest = f->digest;
    e->progress_us = now;
    if (s->frames) e->prompt_us = TD_MAX(e->prompt_us, s->first_us + TD_MIN(f->hidden_us, now - s->first_us));
    if (first || !e->commit) {
        free(e->commit);
        e->n_first = first || r->o.rank ? f->n_first : e->n_first;
        e->commit_bytes = (size_t)f->payload_bytes;
        e->commit = td_xalloc(e->commit_bytes + 1);
        if (e->commit_bytes) memcpy(e->commit, payload, e->commit_bytes);
    }
    return settle(e, s, (td_recv_action){.epoch = e});
}

static bool landed_before(const td_receiver *r, const td_kvframe *f)
{
    bool hit = false;
    for (uint32_t i = 0; i < TD_RECV_RECENT; i++) hit |= r->recent[i] == f->epoch;
    return hit && f->epoch && f->incarnation == r->o.incarnation;
}

td_recv_action td_receiver_message(td_receiver *r, int64_t now_us, const td_kvframe *f, const void *payload,
                                   uint32_t crc)
{
    td_epoch *e = f->incarnation == r->o.incarnation ? td_receiver_find(r, f->epoch) : NULL;
    if (!e) {
        td_recv_action a = {.answer = TD_KVF_NACK, .why = "the epoch is not live"};
        if (f->type != TD_KVF_FRAME && f->type != TD_KVF_COMMIT) a.answer = 0;
        else if (landed_before(r, f)) a.answer = f->type == TD_KVF_COMMIT ? TD_KVF_ACK : 0;
        return a;
    }
    switch (f->type) {
    case TD_KVF_FRAME:
        return on_frame(r, e, now_us, f, crc);
    case TD_KVF_COMMIT:
        return on_commit(r, e, now_us, f, payload, crc);
    case TD_KVF_ABORT:
        e->state = TD_EPOCH_FAILED;
        e->over = f->index == 0;
        e->why = e->over ? "the request is over" : "the prefill worker gave up";
        return (td_recv_action){.epoch = e};
    default: return (td_recv_action){.bad = true}; /* CREDIT, ACK, NACK are for senders */
    }
}

void td_receiver_times(const td_epoch *e, int64_t now_us, int64_t *transfer_us, int64_t *exposed_us)
{
    bool any = e->first_us >= 0;
    *transfer_us = any ? now_us - e->first_us : 0;
    *exposed_us = any ? now_us - TD_MAX(e->first_us, e->prompt_us) : 0;
}

td_epoch *td_receiver_tick(td_receiver *r, int64_t now_us)
{
    size_t it = 0;
    uint64_t k, v;
    while (td_map_next(&r->live, &it, &k, &v)) {
        td_epoch *e = (td_epoch *)(uintptr_t)v;
        if (now_us - e->progress_us < r->o.timeout_us) continue;
        e->why = e->state == TD_EPOCH_COMMITTED ? "frames missing in time" : e->first_us < 0
            ? "no frame in time" : "no COMMIT in time";
        e->state = TD_EPOCH_FAILED;
        return e;
    }
    return NULL;
}

int64_t td_receiver_deadline(const td_receiver *r)
{
    size_t it = 0;
    uint64_t k, v;
    int64_t due = INT64_MAX;
    while (td_map_next(&r->live, &it, &k, &v)) {
        const td_epoch *e = (const td_epoch *)(uintptr_t)v;
        due = TD_MIN(due, e->progress_us + r->o.timeout_us);
    }
    return due;
}
