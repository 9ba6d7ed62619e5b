// SPDX-License-Identifier: Apache-2.0
#include "worker/ship/receiver.h"
#include "common/check.h"
#include <stdlib.h>
#include <string.h>

struct td_receiver {
    td_receiver_opts o;
    td_map live;                       /* epoch -> td_epoch * */
    /* epochs that landed: their COMMIT is acknowledged again (the first ACK may be lost) */
    uint64_t recent[TD_RECV_RECENT];
    uint32_t n_recent;
};

td_receiver *td_receiver_open(const td_receiver_opts *o)
{
    td_receiver *r = td_xalloc(sizeof *r);
    r->o = *o;
    td_map_init(&r->live, o->max_epochs);
    return r;
}

static void epoch_free(td_epoch *e)
{
    for (int g = 0; g < TD_MAX_GROUPS; g++) free(e->have[g]);
    free(e->seen);
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
        uint64_t bits = (uint64_t)(n_tokens - e->first_tok[g]) * (uint64_t)r->o.desc->group[g].n_slots;
        e->missing += bits;
        e->have[g] = td_xalloc((size_t)((bits + 63) / 64 + 1) * 8);
    }
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

static bool cover(td_epoch *e, const td_rect *r, bool set)
{
    uint64_t width = e->n_tokens - e->first_tok[r->group];
    for (uint32_t s = r->layer0; s < (uint32_t)r->layer0 + r->n_layers; s++) {
        uint64_t at = s * width + (r->tok0 - e->first_tok[r->group]);
        if (set) bits_set(e->have[r->group], at, r->n_tok);
        else if (!bits_free(e->have[r->group], at, r->n_tok)) return false;
    }
    if (set) e->missing -= (uint64_t)r->n_layers * r->n_tok;
    return true;
}

/* ---- one message ---- */
static const char *geometry(const td_receiver *r, const td_epoch *e, const td_kvframe *f)
{
    const td_model_desc *d = r->o.desc;
    if (f->group >= d->n_groups) return "no such page group";
    const td_group_desc *g = &d->group[f->group];
    if (f->dtype != (uint16_t)r->o.kv_dtype) return "another KV type";
    if (f->kv_heads != g->G || f->head_dim != g->D) return "other heads or head size";
    if (!f->n_layers || f->layer0 + f->n_layers > g->n_slots) return "layers outside the group";
    if (!f->n_tok || f->tok0 < e->first_tok[f->group] || f->n_tok > e->n_tokens ||
        f->tok0 > e->n_tokens - f->n_tok)
        return "tokens outside the reservation";
    uint64_t bytes = (uint64_t)td_ship_plan_token_bytes(d, f->group, r->o.kv_dtype) * f->n_layers * f->n_tok;
    if (bytes != f->payload_bytes || bytes > TD_KVF_FRAME_BYTES) return "payload size";
    if (f->index >= e->max_frames) return "frame index";
    return NULL;
}

static bool seen(const td_epoch *e, uint32_t index)
{
    return index / 64 < e->seen_words && e->seen[index / 64] >> (index % 64) & 1;
}

static void mark_seen(td_epoch *e, uint32_t index)
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

/* Everything is in: compare with what COMMIT promised. */
static td_recv_action settle(td_epoch *e, td_recv_action a)
{
    if (e->state != TD_EPOCH_COMMITTED) return a;
    if (e->frames > e->commit_frames) return failed(e, "more frames than COMMIT says", true);
    /* some are still on their way, or lost: the deadline decides */
    if (e->frames < e->commit_frames) return a;
    if (e->missing || e->digest != e->commit_digest) {
        td_recv_action bad = failed(e, e->missing ? "frames do not cover the reservation" : "digest", true);
        return bad;
    }
    e->state = TD_EPOCH_LANDED;
    a.answer = TD_KVF_ACK;
    return a;
}

static td_recv_action on_frame(td_receiver *r, td_epoch *e, int64_t now, const td_kvframe *f,
                               const void *payload)
{
    const char *why = geometry(r, e, f);
    if (why) return failed(e, why, true);
    td_recv_action a = {.epoch = e};
    if (seen(e, f->index)) return a;
    a.rect = (td_rect){.group = f->group, .layer0 = f->layer0, .n_layers = f->n_layers, .tok0 = f->tok0,
                       .n_tok = f->n_tok};
    if (!cover(e, &a.rect, false)) return failed(e, "a part came twice", true);
    if (!td_frame_payload_ok(f, payload)) return failed(e, "payload checksum", true);
    cover(e, &a.rect, true);
    mark_seen(e, f->index);
    if (e->first_us < 0) e->first_us = now;
    e->frames++;
    e->bytes += f->payload_bytes;
    e->digest ^= td_frame_digest(f);
    e->progress_us = now;
    a.write = true;
    /* one each: 88 bytes back for up to 256 KiB, and right for any number of credits the sender was told */
    a.answer = TD_KVF_CREDIT;
    a.credits = 1;
    return settle(e, a);
}

static td_recv_action on_commit(td_epoch *e, int64_t now, const td_kvframe *f, const void *payload)
{
    if (e->state == TD_EPOCH_COMMITTED) return (td_recv_action){.epoch = e};
    if (!td_frame_payload_ok(f, payload)) return failed(e, "COMMIT checksum", true);
    if (f->n_first && f->n_first != e->n_first) return failed(e, "not one first token per choice", true);
    e->state = TD_EPOCH_COMMITTED;
    e->n_first = f->n_first;
    e->commit_frames = f->index;
    e->commit_digest = f->digest;
    e->commit_us = e->progress_us = now;
    e->sender_us = f->sent_us;
    e->commit_bytes = (size_t)f->payload_bytes;
    e->commit = td_xalloc(e->commit_bytes + 1);
    if (e->commit_bytes) memcpy(e->commit, payload, e->commit_bytes);
    return settle(e, (td_recv_action){.epoch = e});
}

static bool landed_before(const td_receiver *r, const td_kvframe *f)
{
    bool hit = false;
    for (uint32_t i = 0; i < TD_RECV_RECENT; i++) hit |= r->recent[i] == f->epoch;
    return hit && f->epoch && f->incarnation == r->o.incarnation;
}

td_recv_action td_receiver_message(td_receiver *r, int64_t now_us, const td_kvframe *f, const void *payload)
{
    td_epoch *e = f->incarnation == r->o.incarnation ? td_receiver_find(r, f->epoch) : NULL;
    if (!e) {
        td_recv_action a = {.answer = TD_KVF_NACK, .why = "the epoch is not live"};
        if (f->type != TD_KVF_FRAME && f->type != TD_KVF_COMMIT) a.answer = 0;
        else if (landed_before(r, f)) a.answer = f->type == TD_KVF_COMMIT ? TD_KVF_ACK : 0;
        return a;
    }
    switch (f->type) {
    case TD_KVF_FRAME: return on_frame(r, e, now_us, f, payload);
    case TD_KVF_COMMIT: return on_commit(e, now_us, f, payload);
    case TD_KVF_ABORT:
        e->state = TD_EPOCH_FAILED;
        e->over = f->index == 0;
        e->why = e->over ? "the request is over" : "the prefill worker gave up";
        return (td_recv_action){.epoch = e};
    default: return (td_recv_action){.bad = true}; /* CREDIT, ACK, NACK are for senders */
    }
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
