/* router/core/fleet.c - joining, beats, and the sums over leases. */
// SPDX-License-Identifier: Apache-2.0
#include "router/core/fleet.h"
#include "common/check.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { SLOWEST_TOK_S = 10 };

void td_fleet_init(td_fleet *f, const td_fleet_opts *o)
{
    memset(f, 0, sizeof *f);
    f->o = *o;
    for (unsigned i = 0; i < TD_INDEX_SLOTS; i++) f->w[i].slot = i;
}

const char *td_worker_state_name(td_worker_state s)
{
    static const char *const name[] = {
#define X(n) #n,
        TD_WORKER_STATES(X)
#undef X
    };
    return (unsigned)s < TD_COUNT(name) ? name[s] : "?";
}

td_worker *td_fleet_find(td_fleet *f, uint64_t incarnation)
{
    for (unsigned i = 0; i < TD_INDEX_SLOTS; i++)
        if (f->w[i].state != TD_WORKER_NONE && f->w[i].incarnation == incarnation) return &f->w[i];
    return NULL;
}

static void copy(char *to, size_t n, const char *from) { snprintf(to, n, "%s", from ? from : ""); }

bool td_fleet_anyone(const td_fleet *f)
{
    for (unsigned i = 0; i < TD_INDEX_SLOTS; i++)
        if (td_worker_alive(&f->w[i])) return true;
    return false;
}

static void take_identity(td_fleet *f, const td_msg_hello *h)
{
    f->id = h->id;
    copy(f->model, sizeof f->model, h->id.model);
    copy(f->kv_dtype, sizeof f->kv_dtype, h->id.kv_dtype);
    copy(f->numerics, sizeof f->numerics, h->id.numerics);
    f->id.model = f->model;
    f->id.kv_dtype = f->kv_dtype;
    f->id.numerics = f->numerics;
    f->n_eos = h->n_eos < TD_MSG_MAX_EOS ? h->n_eos : TD_MSG_MAX_EOS;
    memcpy(f->eos, h->eos, f->n_eos * sizeof f->eos[0]);
    f->has_identity = true;
}

static td_worker *free_slot(td_fleet *f)
{
    td_worker *best = NULL;
    for (unsigned i = 0; i < TD_INDEX_SLOTS; i++) {
        td_worker *w = &f->w[i];
        if (w->state == TD_WORKER_NONE) return w;
        if (w->state == TD_WORKER_DEAD && !w->leases && (!best || w->dead_us < best->dead_us)) best = w;
    }
    return best;
}

/* Identical facts: page size, KV size and limits may differ; max_model_len too (the smallest one binds a
 * request). */
static bool same_identity(const td_fleet *f, const td_msg_hello *h, char *reason, size_t n)
{
    td_identity mine = f->id;
    mine.max_model_len = h->id.max_model_len;
    return td_identity_same(&mine, &h->id, reason, n);
}

td_status td_fleet_hello(td_fleet *f, int64_t now_us, uint64_t incarnation, const td_msg_hello *h,
                         td_worker **out, td_worker **replaced, char *reason, size_t n)
{
    *replaced = NULL;
    if (!td_fleet_anyone(f) && !td_fleet_find(f, incarnation))
        f->has_identity = false; /* an empty cluster may become another one */
    if (f->has_identity && !same_identity(f, h, reason, n)) {
        f->refused++;
        return TD_EBADREQ;
    }
    td_worker *w = td_fleet_find(f, incarnation);
    for (unsigned i = 0; i < TD_INDEX_SLOTS && !w && h->name && h->name[0]; i++) {
        td_worker *old = &f->w[i];
        if (old->state == TD_WORKER_NONE || strcmp(old->name, h->name)) continue;
        old->replaced = true;
        if (td_worker_alive(old)) *replaced = old;
    }
    if (!w) {
        w = free_slot(f);
        if (!w) {
            snprintf(reason, n, "the router has %d workers already", TD_INDEX_SLOTS);
            f->refused++;
            return TD_EBADREQ;
        }
        unsigned slot = w->slot;
        memset(w, 0, sizeof *w);
        w->slot = slot;
        w->incarnation = incarnation;
        w->joined_us = now_us;
    }
    if (!f->has_identity) take_identity(f, h);
    else f->id.max_model_len = TD_MIN(f->id.max_model_len, h->id.max_model_len);
    copy(w->name, sizeof w->name, h->name);
    copy(w->endpoint, sizeof w->endpoint, h->bulk_endpoint);
    copy(w->build, sizeof w->build, h->build);
    copy(w->kernels, sizeof w->kernels, h->kernels);
    w->role = h->role;
    w->page_size = h->page_size;
    w->max_seqs = h->max_seqs;
    w->max_batched_tokens = h->max_batched_tokens;
    w->max_model_len = h->id.max_model_len;
    w->kv_tokens = h->kv_tokens;
    memcpy(w->bulk_key, h->bulk_public_key, sizeof w->bulk_key);
    w->has_bulk_key = h->has_bulk_key;
    w->beat_us = w->moved_us = now_us;
    if (w->state == TD_WORKER_NONE || w->state == TD_WORKER_DEAD) w->state = TD_WORKER_LOADING;
    *out = w;
    return TD_OK;
}

static td_worker_state state_of(td_wstate s)
{
    return s == TD_WSTATE_READY      ? TD_WORKER_READY
           : s == TD_WSTATE_DRAINING ? TD_WORKER_DRAINING
                                     : TD_WORKER_LOADING;
}

bool td_fleet_beat(td_fleet *f, td_worker *w, int64_t now_us, const td_msg_heartbeat *b)
{
    (void)f;
    bool back = w->state == TD_WORKER_DEAD;
    bool moved = back || b->step != w->beat.step || !b->busy || !w->beat.busy;
    w->beat = *b;
    w->beat_us = now_us;
    if (moved) w->moved_us = now_us;
    if (w->state == TD_WORKER_HUNG && !moved) return false;
    w->state = state_of(b->state);
    w->replaced = false; /* two live workers of one name: odd, but both work */
    return back;
}

/* A step that holds a chunk of a prompt is as long as the chunk: the mean of decode steps says nothing about
 * it. Until a worker's speed was measured a slow one is assumed (a large model on few cores). */
static int64_t chunk_us(const td_worker *w)
{
    uint64_t rows = TD_MAX(w->pending_tokens, w->beat.waiting_tokens);
    if (w->max_batched_tokens && rows > w->max_batched_tokens) rows = w->max_batched_tokens;
    double rate = w->beat.prefill_tok_s > 0 ? w->beat.prefill_tok_s : SLOWEST_TOK_S;
    return (int64_t)((double)rows / rate * 1e6);
}

int64_t td_fleet_hang_us(const td_fleet *f, const td_worker *w)
{
    int64_t decode = w->beat.step_us > 0 ? 20 * w->beat.step_us : 4 * f->o.hang_us;
    int64_t prompt = 3 * chunk_us(w);
    return TD_MAX(f->o.hang_us, TD_MAX(decode, prompt));
}

bool td_fleet_overdue(const td_fleet *f, const td_worker *w, int64_t now_us, bool *hung)
{
    *hung = false;
    if (!td_worker_alive(w)) return false;
    if (now_us - w->beat_us > f->o.dead_us) return true;
    if (w->state != TD_WORKER_READY && w->state != TD_WORKER_DRAINING) return false;
    if (!w->beat.busy || now_us - w->moved_us <= td_fleet_hang_us(f, w)) return false;
    *hung = true;
    return true;
}

void td_fleet_shipped(td_worker *w, uint64_t bytes, uint32_t frames, int64_t us)
{
    uint64_t timed = frames ? bytes - bytes / frames : 0;
    if (timed < TD_FLEET_LINK_BYTES || us <= 0) return;
    w->link[w->n_links++ % TD_FLEET_LINK_SAMPLES] = (double)timed * 1e6 / (double)us;
}

double td_fleet_link(const td_worker *w)
{
    double best = 0;
    for (uint32_t i = 0; i < TD_FLEET_LINK_SAMPLES; i++) best = TD_MAX(best, w->link[i]);
    return best;
}

void td_fleet_lose(td_worker *w, td_worker_state to, int64_t now_us)
{
    w->state = to;
    w->dead_us = now_us;
    w->lost++;
}

bool td_fleet_serves(td_fleet *f, int64_t now_us)
{
    bool ready[4] = {false}, loading = false, any = false;
    for (unsigned i = 0; i < TD_INDEX_SLOTS; i++) {
        const td_worker *w = &f->w[i];
        if (w->state == TD_WORKER_READY) ready[w->role & 3] = any = true;
        if (w->state == TD_WORKER_LOADING) loading = true;
    }
    if (!any) return false;
    if (!f->first_ready_us) f->first_ready_us = now_us;
    bool whole = ready[TD_ROLE_MIXED] || (ready[TD_ROLE_PREFILL] && ready[TD_ROLE_DECODE]);
    int64_t patience = loading ? 30 * f->o.settle_us : f->o.settle_us;
    if (whole || now_us - f->first_ready_us >= patience) f->served = true;
    return f->served;
}

bool td_fleet_hopeful(const td_fleet *f)
{
    for (unsigned i = 0; i < TD_INDEX_SLOTS; i++)
        if (f->w[i].state == TD_WORKER_LOADING || f->w[i].state == TD_WORKER_READY) return true;
    return false;
}

uint32_t td_fleet_ready(const td_fleet *f)
{
    uint32_t n = 0;
    for (unsigned i = 0; i < TD_INDEX_SLOTS; i++) n += f->w[i].state == TD_WORKER_READY;
    return n;
}

uint64_t td_fleet_kv_tokens(const td_fleet *f, td_role counted_as)
{
    uint64_t n = 0;
    for (unsigned i = 0; i < TD_INDEX_SLOTS; i++) {
        const td_worker *w = &f->w[i];
        if (w->state == TD_WORKER_READY && (w->role == counted_as || w->role == TD_ROLE_MIXED))
            n += w->kv_tokens;
    }
    return n;
}

void td_fleet_kernels(const td_fleet *f, char *out, size_t n)
{
    size_t at = 0;
    out[0] = 0;
    for (unsigned i = 0; i < TD_INDEX_SLOTS; i++) {
        bool said = f->w[i].state != TD_WORKER_READY;
        for (unsigned k = 0; k < i && !said; k++)
            said = f->w[k].state == TD_WORKER_READY && !strcmp(f->w[k].kernels, f->w[i].kernels);
        if (!said && at < n) at += (size_t)snprintf(out + at, n - at, "%s%s", at ? ", " : "", f->w[i].kernels);
    }
}

td_lease *td_lease_open(td_request *r, td_lease **of_request, td_worker *w, td_lease_kind kind,
                        uint32_t attempt, uint32_t seqs, uint64_t pending, uint64_t kv)
{
    td_lease *l = td_xalloc(sizeof *l);
    *l = (td_lease){.request = r,
                    .worker = w,
                    .attempt = attempt,
                    .kind = kind,
                    .seqs = seqs,
                    .pending_tokens = pending,
                    .kv_tokens = kv};
    l->next_of_request = *of_request;
    *of_request = l;
    l->next_of_worker = w->leases;
    if (w->leases) w->leases->prev_of_worker = l;
    w->leases = l;
    w->n_leases++;
    w->placed++;
    w->seqs += seqs;
    w->pending_tokens += pending;
    w->kv_leased += kv;
    return l;
}

void td_lease_prompt_done(td_lease *l)
{
    l->worker->pending_tokens -= l->pending_tokens;
    l->pending_tokens = 0;
    l->prompt_done = true;
}

void td_lease_close(td_lease **of_request, td_lease *l)
{
    td_worker *w = l->worker;
    td_lease **p = of_request;
    while (*p && *p != l) p = &(*p)->next_of_request;
    TD_CHECK(*p == l);
    *p = l->next_of_request;
    if (l->prev_of_worker) l->prev_of_worker->next_of_worker = l->next_of_worker;
    else w->leases = l->next_of_worker;
    if (l->next_of_worker) l->next_of_worker->prev_of_worker = l->prev_of_worker;
    w->n_leases--;
    w->seqs -= l->seqs;
    w->pending_tokens -= l->pending_tokens;
    w->kv_leased -= l->kv_tokens;
    free(l);
}
