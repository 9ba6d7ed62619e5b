/* router/core/attempt.c - one placement of a request: choosing workers, giving it up, ending it. */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "router/core/core_int.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { OUT_GUESS = 256 /* expected output tokens when max_tokens says nothing sharper */, PENDING_STEPS = 4 };

/* ---- leases ---- */

static void release(td_core *c, td_request *r)
{
    td_request_go(r, TD_REQ_RELEASED, c->now_us);
    td_list_remove(&c->closing, r);
    td_map_del(&c->by_id, r->job->id);
    c->counts.illegal += r->illegal;
    r->next = c->grave;
    c->grave = r;
}

static bool ended(const td_request *r) { return r->state == TD_REQ_DONE || r->state == TD_REQ_DRAINING; }

void core_close_lease(td_core *c, td_lease *l)
{
    td_request *r = l->request;
    if (r->decode == l) r->decode = NULL;
    if (r->prefill == l) r->prefill = NULL;
    td_lease_close(&r->leases, l);
    if (ended(r) && !r->leases) release(c, r);
}

void core_cancel_lease(td_core *c, td_lease *l)
{
    if (l->cancelled) return;
    l->cancelled = true;
    l->close_us = c->now_us + c->o.lease_us;
    if (!td_worker_alive(l->worker)) return;
    td_msg *m = core_send(c, l->worker, TD_MSG_CANCEL);
    m->cancel.key = (td_req_key){l->request->job->id, l->attempt};
}

/* A prefill lease is opened with the placement, so that others see the load; the worker hears of it only with
 * START. */
static bool started(const td_request *r, const td_lease *l)
{
    return !(l == r->prefill && r->state < TD_REQ_RESERVED);
}

static void drop_attempt(td_core *c, td_request *r)
{
    td_lease *both[2] = {r->prefill, r->decode};
    bool told[2] = {both[0] && started(r, both[0]), true};
    r->prefill = r->decode = NULL;
    for (int i = 0; i < 2; i++) {
        if (!both[i]) continue;
        if (told[i]) core_cancel_lease(c, both[i]);
        if (!told[i] || !td_worker_alive(both[i]->worker)) td_lease_close(&r->leases, both[i]);
    }
}

/* ---- ending ---- */

static void leave_lists(td_core *c, td_request *r)
{
    td_list_remove(r->queued ? &c->queue : &c->running, r);
    r->queued = false;
    td_list_add(&c->closing, r);
}

void core_fail(td_core *c, td_request *r, td_why why, uint32_t retry_ms, const char *fmt, ...)
{
    if (r->terminal) return;
    char reason[384];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(reason, sizeof reason, fmt, ap);
    va_end(ap);
    r->why = why;
    core_emit_end(c, r, TD_OUT_FAILED, retry_ms, reason);
    drop_attempt(c, r);
    leave_lists(c, r);
    td_request_go(r, TD_REQ_DRAINING, c->now_us);
    if (!r->leases) release(c, r);
}

void core_check_done(td_core *c, td_request *r)
{
    if (r->terminal || r->n_open || r->scores_due) return;
    core_emit_end(c, r, TD_OUT_DONE, 0, NULL);
    leave_lists(c, r);
    /* A decode worker that never sent a token still holds a reservation, and a stop string is known to us
     * alone. */
    bool cut = false;
    for (uint32_t i = 0; i < r->job->sampling.n; i++) cut |= r->choice[i].stop_string >= 0;
    bool waiting = r->state != TD_REQ_DECODING;
    td_request_go(r, TD_REQ_DONE, c->now_us);
    for (td_lease *l = r->leases; l; l = l->next_of_request) {
        if (!l->cancelled && (cut || (waiting && l->kind == TD_LEASE_DECODE))) core_cancel_lease(c, l);
        if (!l->close_us) l->close_us = c->now_us + c->o.lease_us;
    }
    r->decode = r->prefill = NULL;
    if (!r->leases) release(c, r);
}

/* Its worker died after the last token and before saying so: the log knows. */
static void finish_implied(td_core *c, td_request *r)
{
    for (uint32_t i = 0; i < r->job->sampling.n; i++) {
        td_choice *ch = &r->choice[i];
        if (ch->finish != TD_FINISH_NONE) continue;
        ch->finish = td_choice_implied(ch, &r->job->sampling);
        if (ch->finish == TD_FINISH_NONE) continue;
        if (ch->finish == TD_FINISH_STOP) ch->stop_token = ch->ids[ch->n - 1];
        r->n_open--;
        td_buf_reset(&c->text);
        if (r->speech) td_speech_end(r->speech, i, &c->text);
        core_emit_delta(c, r, i, ch->n, &(td_msg_tokens){0}, 0, 0, c->text.p, c->text.len);
    }
    core_check_done(c, r);
}

void core_again(td_core *c, td_request *r, uint64_t worker, td_replace why, const char *reason)
{
    if (r->terminal || r->state == TD_REQ_QUEUED) return;
    c->counts.replaced[why]++;
    drop_attempt(c, r);
    if (worker && why != TD_REPLACE_BUSY) td_request_exclude(r, worker);
    td_list_remove(&c->running, r);
    td_admit_again(&c->queue, r);
    td_request_go(r, TD_REQ_QUEUED, c->now_us);
    if (why != TD_REPLACE_BUSY) {
        core_log(c, TD_LOG_WARN, "request %s: attempt %u ended (%s), placing again at token %u", r->job->name,
                 r->attempt, reason, r->choice[0].n);
        if (++r->losses > c->o.max_losses) {
            core_fail(c, r, TD_WHY_INTERNAL, 0, "%u workers failed on this request, the last one: %s",
                      r->losses, reason);
            return;
        }
    }
    finish_implied(c, r);
}

void core_lose_worker(td_core *c, td_worker *w, td_worker_state to, td_replace why, const char *reason)
{
    uint64_t incarnation = w->incarnation;
    core_log(c, c->left ? TD_LOG_DEBUG : TD_LOG_WARN, "worker %s lost (%s), %u leases", w->name, reason,
             w->n_leases);
    /* While it still counts as alive: tell it, in case it only sleeps. */
    for (td_lease *l = w->leases; l; l = l->next_of_worker)
        if (started(l->request, l)) core_cancel_lease(c, l);
    td_fleet_lose(w, to, c->now_us);
    if (to == TD_WORKER_HUNG) c->counts.workers_hung++;
    else c->counts.workers_lost++;
    while (w->leases) {
        td_lease *l = w->leases;
        td_request *r = l->request;
        bool was_prefill = l == r->prefill, current = was_prefill || l == r->decode;
        /* Its pages are already on the other side: nothing is lost. */
        bool harmless =
            was_prefill && (r->state == TD_REQ_LANDED || r->state == TD_REQ_DECODING) && !r->scores_due;
        core_close_lease(c, l);
        if (current && !harmless) core_again(c, r, incarnation, why, reason);
    }
}

/* ---- placing ---- */

/* Limits that need the worker's facts, once per request. False: it failed. */
static bool check_facts(td_core *c, td_request *r)
{
    if (r->admitted) return true;
    td_job *j = r->job;
    const td_fleet *f = &c->fleet;
    uint32_t most = f->id.max_model_len ? f->id.max_model_len : UINT32_MAX;
    for (uint32_t i = 0; i < j->n_prompt; i++)
        if (f->id.vocab && j->prompt[i] >= f->id.vocab) {
            core_fail(c, r, TD_WHY_BAD, 0, "prompt token %u is %u; the vocabulary has %u", i, j->prompt[i],
                      f->id.vocab);
            return false;
        }
    if (j->n_prompt >= most) {
        core_fail(c, r, TD_WHY_TOO_LONG, 0,
                  "the context holds %u tokens; the prompt has %u and leaves no room for output", most,
                  j->n_prompt);
        return false;
    }
    uint32_t left = most - j->n_prompt;
    if (j->max_tokens_open || (j->max_tokens_soft && j->sampling.max_tokens > left))
        j->sampling.max_tokens = left;
    if (j->sampling.max_tokens > left) {
        core_fail(c, r, TD_WHY_TOO_LONG, 0,
                  "the context holds %u tokens; the prompt has %u and max_tokens is %u", most, j->n_prompt,
                  j->sampling.max_tokens);
        return false;
    }
    if (!j->sampling.ignore_eos && f->n_eos) {
        uint32_t *ids = td_arena_alloc(&j->arena, (j->sampling.n_stop_ids + f->n_eos) * sizeof *ids);
        uint32_t n = j->sampling.n_stop_ids;
        if (ids) {
            if (n) memcpy(ids, j->sampling.stop_ids, n * sizeof *ids);
            for (uint32_t e = 0; e < f->n_eos && n < TD_MAX_STOP_IDS; e++) {
                bool have = false;
                for (uint32_t i = 0; i < n; i++) have |= ids[i] == f->eos[e];
                if (!have) ids[n++] = f->eos[e];
            }
            j->sampling.stop_ids = ids;
            j->sampling.n_stop_ids = n;
        }
    }
    r->admitted = true;
    return true;
}

static uint32_t log_tokens(const td_request *r)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < r->job->sampling.n; i++) n += r->choice[i].n;
    return n;
}

static uint64_t kv_need(const td_request *r)
{
    return (uint64_t)r->job->n_prompt + log_tokens(r) + 16u * r->job->sampling.n;
}

typedef struct speed { double prefill_tok_s, step_ms; } speed;

/* What to expect of a worker that was not measured yet: as much as of the best, or it would never be tried.
 * */
static speed best_speed(const td_core *c)
{
    speed best = {0, 0};
    for (unsigned i = 0; i < TD_INDEX_SLOTS; i++) {
        const td_worker *w = &c->fleet.w[i];
        if (!td_worker_alive(w)) continue;
        double ms = (double)w->beat.step_us / 1e3;
        if (w->beat.prefill_tok_s > best.prefill_tok_s) best.prefill_tok_s = w->beat.prefill_tok_s;
        if (ms > 0 && (best.step_ms <= 0 || ms < best.step_ms) && w->role != TD_ROLE_PREFILL)
            best.step_ms = ms;
    }
    return (speed){best.prefill_tok_s > 0 ? best.prefill_tok_s : 1000, best.step_ms > 0 ? best.step_ms : 20};
}

static td_place_worker row_of(const td_core *c, const td_request *r, const td_worker *w, uint32_t hit_blocks,
                              speed best, bool forgive)
{
    uint64_t need = kv_need(r), step_tokens = w->max_batched_tokens ? w->max_batched_tokens : 2048;
    uint64_t pending = TD_MAX(w->pending_tokens, w->beat.waiting_tokens);
    bool idle = !w->n_leases, held = c->now_us < w->hold_us;
    bool fits =
        w->seqs + r->job->sampling.n <= w->max_seqs && (!w->kv_tokens || w->kv_leased + need <= w->kv_tokens);
    return (td_place_worker){
        .role = w->role,
        .usable = w->state == TD_WORKER_READY && (forgive || !td_request_excludes(r, w->incarnation)),
        .room_prefill = !held && (idle || w->pending_tokens < PENDING_STEPS * step_tokens),
        .room_decode = !held && (idle || fits),
        .prefill_tok_s = w->beat.prefill_tok_s > 0 ? w->beat.prefill_tok_s : best.prefill_tok_s,
        .step_ms =
            w->beat.step_us > 0 && w->role != TD_ROLE_PREFILL ? (double)w->beat.step_us / 1e3 : best.step_ms,
        .pending_tokens = (double)pending,
        .seqs = TD_MAX(w->seqs, w->beat.seqs_running),
        .max_seqs = w->max_seqs,
        .kv_used = w->kv_tokens ? (double)(w->kv_leased + need) / (double)w->kv_tokens : 0,
        .hit_tokens = hit_blocks * 16,
        .link_bytes_per_s = td_fleet_link(w),
        .id = w->incarnation,
    };
}

static td_placement choose(td_core *c, const td_request *r, td_worker **of)
{
    const td_job *j = r->job;
    const td_identity *id = &c->fleet.id;
    uint32_t hits[TD_INDEX_SLOTS];
    td_index_match(c->index, j->blocks, j->n_blocks, hits);
    speed fastest = best_speed(c);
    uint32_t out = TD_MIN(j->sampling.max_tokens, (uint32_t)OUT_GUESS);
    td_place_ask ask = {.tokens = j->n_prompt + r->choice[0].n,
                        .n = j->sampling.n,
                        .out_tokens = out,
                        .kv_bytes_per_token =
                            4.0 * id->layers * id->kv_heads * id->head_dim, /* K and V of two bytes */
                        .link_bytes_per_s = c->o.link_bytes_per_s,
                        .tie = j->n_blocks ? j->blocks[0].hi : j->id};
    td_placement best = {TD_PLACE_NONE, -1, -1, 0};
    /* Workers that failed on this request come last: only when there is nobody else. */
    for (int forgive = 0; forgive < 2 && best.kind == TD_PLACE_NONE; forgive++) {
        td_place_worker row[TD_INDEX_SLOTS];
        int n = 0;
        for (unsigned i = 0; i < TD_INDEX_SLOTS; i++) {
            if (!td_worker_alive(&c->fleet.w[i])) continue;
            of[n] = &c->fleet.w[i];
            row[n] = row_of(c, r, of[n], hits[i], fastest, forgive);
            n++;
        }
        best = td_place_choose(row, n, &ask);
        if (!r->n_excluded) break;
    }
    return best;
}

static bool fill_work(td_core *c, const td_request *r, td_msg_work *w)
{
    const td_job *j = r->job;
    *w = (td_msg_work){.key = {j->id, r->attempt},
                       .prompt = {j->prompt, j->n_prompt},
                       .sampling = j->sampling,
                       .salt = j->salt,
                       .salt_bytes = j->salt_bytes};
    if (j->deadline_us) {
        int64_t left = (j->deadline_us - c->now_us + 999) / 1000;
        w->remaining_ms = left < 1 ? 1 : left > UINT32_MAX ? UINT32_MAX : (uint32_t)left;
    }
    /* Every token is known and only prompt scores are missing: the worker has to run it as if it were new. */
    if (!log_tokens(r) || !r->n_open) return true;
    td_ids *resume = td_arena_alloc(&c->out->arena, j->sampling.n * sizeof *resume);
    if (!resume) return false;
    for (uint32_t i = 0; i < j->sampling.n; i++) resume[i] = (td_ids){r->choice[i].ids, r->choice[i].n};
    w->resume = resume;
    w->n_resume = j->sampling.n;
    return true;
}

/* Choices that ended by a stop string look unfinished to a worker. */
static void cancel_finished_choices(td_core *c, const td_request *r, const td_worker *w)
{
    if (!r->n_open) return;
    for (uint32_t i = 0; i < r->job->sampling.n; i++) {
        if (r->choice[i].finish == TD_FINISH_NONE) continue;
        td_msg *m = core_send(c, w, TD_MSG_CANCEL_CHOICE);
        m->cancel.key = (td_req_key){r->job->id, r->attempt};
        m->cancel.choice = i;
    }
}

/* Out of the queue, with what its workers are to be told. False: the request has failed. */
static bool begin_attempt(td_core *c, td_request *r, td_msg_work *work)
{
    r->attempt++;
    if (!fill_work(c, r, work)) {
        core_fail(c, r, TD_WHY_INTERNAL, 0, "out of memory for the request's tokens");
        return false;
    }
    td_list_remove(&c->queue, r);
    r->queued = false;
    td_list_add(&c->running, r);
    if (!r->placed_us) r->placed_us = c->now_us;
    return true;
}

static void place_alone(td_core *c, td_request *r, td_worker *w)
{
    td_msg_work work;
    if (!begin_attempt(c, r, &work)) return;
    uint64_t tokens = (uint64_t)r->job->n_prompt + r->choice[0].n;
    r->decode =
        td_lease_open(r, &r->leases, w, TD_LEASE_ALONE, r->attempt, r->job->sampling.n, tokens, kv_need(r));
    r->decode_worker = w->incarnation;
    r->prefill_worker = 0;
    td_msg *m = core_send(c, w, TD_MSG_START);
    m->start.work = work;
    m->start.has_sink = false;
    td_request_go(r, TD_REQ_PREFILLING, c->now_us);
    cancel_finished_choices(c, r, w);
    td_index_add(c->index, w->slot, r->job->blocks, r->job->n_blocks);
    c->counts.placed_alone++;
}

static void place_pair(td_core *c, td_request *r, td_worker *d, td_worker *p)
{
    td_msg_work work;
    if (!begin_attempt(c, r, &work)) return;
    uint64_t tokens = (uint64_t)r->job->n_prompt + r->choice[0].n;
    r->decode =
        td_lease_open(r, &r->leases, d, TD_LEASE_DECODE, r->attempt, r->job->sampling.n, 0, kv_need(r));
    r->prefill = td_lease_open(r, &r->leases, p, TD_LEASE_PREFILL, r->attempt, 0, tokens, tokens);
    r->decode_worker = d->incarnation;
    r->prefill_worker = p->incarnation;
    td_msg *m = core_send(c, d, TD_MSG_RESERVE);
    m->reserve.work = work;
    td_request_go(r, TD_REQ_ROUTED, c->now_us);
    c->counts.placed_pair++;
}

void core_start_prefill(td_core *c, td_request *r, const td_msg *reserved)
{
    td_worker *d = r->decode->worker, *p = r->prefill->worker;
    td_msg_work work;
    if (!fill_work(c, r, &work)) {
        core_fail(c, r, TD_WHY_INTERNAL, 0, "out of memory for the request's tokens");
        return;
    }
    td_request_go(r, TD_REQ_RESERVED, c->now_us);
    const char *endpoint = reserved->reserved.endpoint;
    td_msg *m = core_send(c, p, TD_MSG_START);
    m->start.work = work;
    m->start.has_sink = true;
    m->start.sink = (td_msg_sink){.endpoint = endpoint && endpoint[0] ? endpoint : d->endpoint,
                                  .epoch = reserved->reserved.epoch,
                                  .incarnation = d->incarnation,
                                  .hit_tokens = reserved->reserved.hit_tokens,
                                  .credits = reserved->reserved.credits,
                                  .ranks = reserved->reserved.ranks,
                                  .ranks_bytes = reserved->reserved.ranks_bytes,
                                  .has_key = d->has_bulk_key};
    memcpy(m->start.sink.public_key, d->bulk_key, sizeof d->bulk_key);
    td_request_go(r, TD_REQ_PREFILLING, c->now_us);
    cancel_finished_choices(c, r, p);
    cancel_finished_choices(c, r, d);
    td_index_add(c->index, p->slot, r->job->blocks, r->job->n_blocks);
    td_index_add(c->index, d->slot, r->job->blocks, r->job->n_blocks);
}

void core_schedule(td_core *c)
{
    while (c->queue.first && td_fleet_serves(&c->fleet, c->now_us)) {
        td_request *r = c->queue.first;
        if (!check_facts(c, r)) continue; /* it failed and left the queue */
        td_worker *of[TD_INDEX_SLOTS];
        td_placement p = choose(c, r, of);
        if (p.kind == TD_PLACE_ALONE) place_alone(c, r, of[p.decode]);
        else if (p.kind == TD_PLACE_PAIR) place_pair(c, r, of[p.decode], of[p.prefill]);
        else return;
    }
}
