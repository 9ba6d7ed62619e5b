/* router/core/leg.c - what a worker says about its part of a request.
 *
 * Messages of two workers may overtake each other: the decode worker's tokens can come before the prefill
 * worker's first token. The log's rule (4 of router.h) makes the order irrelevant. */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "router/core/core_int.h"

#include <string.h>

enum { HOLD_MIN_US = 5000, HOLD_MAX_US = 2000000 };

static td_request *find(td_core *c, uint64_t id)
{
    uint64_t p;
    return td_map_get(&c->by_id, id, &p) ? (td_request *)(uintptr_t)p : NULL;
}

static td_lease *lease_of(td_request *r, const td_worker *w, uint32_t attempt)
{
    for (td_lease *l = r->leases; l; l = l->next_of_request)
        if (l->worker == w && l->attempt == attempt) return l;
    return NULL;
}

/* A worker speaks of something it should not be doing: tell it to stop. */
static void stray(td_core *c, const td_worker *w, td_req_key key)
{
    c->counts.stale_messages++;
    td_msg *m = core_send(c, w, TD_MSG_CANCEL);
    m->cancel.key = key;
}

/* The open lease this key names, if its messages may change the request. */
static td_lease *current(td_core *c, td_worker *w, td_req_key key, bool answer)
{
    td_request *r = find(c, key.request);
    td_lease *l = r ? lease_of(r, w, key.attempt) : NULL;
    if (!l) {
        if (answer) stray(c, w, key);
        else c->counts.stale_messages++;
        return NULL;
    }
    if (l->cancelled || r->terminal || (l != r->decode && l != r->prefill)) return NULL;
    return l;
}

static void fault(td_core *c, td_lease *l, const char *what)
{
    td_worker *w = l->worker;
    w->faults++;
    c->counts.faults++;
    l->request->faults++;
    core_log(c, TD_LOG_ERROR, "request %s: worker %s broke the protocol: %s", l->request->job->name, w->name,
             what);
    core_again(c, l->request, w->incarnation, TD_REPLACE_FAULT, what);
}

static void on_reserved(td_core *c, td_worker *w, const td_msg *m)
{
    td_lease *l = current(c, w, m->reserved.key, true);
    if (!l) return;
    td_request *r = l->request;
    if (r->state != TD_REQ_ROUTED || l != r->decode || !r->prefill) return; /* repeated */
    core_start_prefill(c, r, m);
}

static void on_busy(td_core *c, td_worker *w, const td_msg *m)
{
    td_lease *l = current(c, w, m->busy.key, false);
    w->busy++;
    int64_t hold = (int64_t)m->busy.retry_ms * 1000;
    w->hold_us = c->now_us + (hold < HOLD_MIN_US ? HOLD_MIN_US : hold > HOLD_MAX_US ? HOLD_MAX_US : hold);
    if (!l) {
        td_request *r = find(c, m->busy.key.request);
        td_lease *old = r ? lease_of(r, w, m->busy.key.attempt) : NULL;
        if (old) core_close_lease(c, old); /* cancelled meanwhile: it never held anything */
        return;
    }
    td_request *r = l->request;
    core_close_lease(c, l);
    core_again(c, r, w->incarnation, TD_REPLACE_BUSY, m->busy.reason);
}

static void to_state_after_tokens(td_core *c, td_request *r, const td_lease *l)
{
    if (l->kind == TD_LEASE_PREFILL) {
        if (r->state == TD_REQ_PREFILLING) td_request_go(r, TD_REQ_SHIPPING, c->now_us);
    } else if (r->state >= TD_REQ_PREFILLING && r->state < TD_REQ_DECODING) {
        td_request_go(r, TD_REQ_DECODING, c->now_us);
    }
}

/* Feed new tokens [from, from + n) of the log to the text; stops at a stop string. Returns how many were
 * used. */
static uint32_t speak(td_core *c, td_request *r, const td_msg_tokens *t, uint32_t skip)
{
    td_choice *ch = &r->choice[t->choice];
    const td_job *j = r->job;
    uint32_t limit = j->sampling.max_tokens;
    td_buf_reset(&c->text);
    for (uint32_t i = skip; i < t->n; i++) {
        if (!td_choice_append(ch, t->ids[i], limit)) return i - skip;
        bool last = i + 1 == t->n;
        if (!r->speech) continue;
        /* The token that ended the text is not part of it. */
        if (last && t->finish == TD_FINISH_STOP && t->stop_token == t->ids[i] && !j->include_stop) continue;
        int s = td_speech_push(r->speech, t->choice, t->ids[i], &c->text);
        if (s < 0) continue;
        ch->finish = TD_FINISH_STOP;
        ch->stop_string = s;
        return i + 1 - skip;
    }
    return t->n - skip;
}

static const char *check_overlap(const td_choice *ch, const td_msg_tokens *t)
{
    if (t->base_index > ch->n) return "tokens are missing";
    uint32_t common = TD_MIN(ch->n - t->base_index, t->n);
    if (common && memcmp(ch->ids + t->base_index, t->ids, common * sizeof *t->ids))
        return "tokens differ from those already delivered";
    return NULL;
}

static void cut_choice(td_core *c, td_request *r, uint32_t choice)
{
    td_lease *both[2] = {r->prefill, r->decode};
    for (int i = 0; i < 2; i++) {
        if (!both[i]) continue;
        td_msg *m = core_send(c, both[i]->worker, TD_MSG_CANCEL_CHOICE);
        m->cancel.key = (td_req_key){r->job->id, r->attempt};
        m->cancel.choice = choice;
    }
}

static void on_tokens_of(td_core *c, td_worker *w, const td_msg_tokens *t)
{
    td_lease *l = current(c, w, t->key, true);
    if (!l) return;
    td_request *r = l->request;
    if (r->state < TD_REQ_PREFILLING) {
        fault(c, l, "tokens before a start");
        return;
    }
    if (t->choice >= r->job->sampling.n) {
        fault(c, l, "no such choice");
        return;
    }
    td_choice *ch = &r->choice[t->choice];
    /* A choice that a stop string ended is shorter here than there: the worker had gone on. */
    if (ch->stop_string >= 0) return;
    const char *wrong = check_overlap(ch, t);
    if (wrong) {
        c->counts.mismatches++;
        fault(c, l, wrong);
        return;
    }
    to_state_after_tokens(c, r, l);
    if (ch->finish != TD_FINISH_NONE) {
        if (t->base_index + t->n > ch->n) fault(c, l, "tokens after the end");
        return;
    }
    uint32_t offset = ch->n, skip = ch->n - t->base_index;
    if (skip > t->n) return; /* all known already */
    uint32_t used = speak(c, r, t, skip);
    bool cut = ch->stop_string >= 0, over = !cut && used < t->n - skip;
    if (!cut && !over && (t->finish == TD_FINISH_STOP || t->finish == TD_FINISH_LENGTH)) {
        ch->finish = t->finish;
        ch->stop_token = t->stop_token;
        if (r->speech) {
            int s = td_speech_end(r->speech, t->choice, &c->text);
            if (s >= 0) { /* the held-back end was one */
                ch->stop_string = s;
                ch->finish = TD_FINISH_STOP;
            }
        }
    }
    if (used) td_request_token_time(r, t->choice, used, c->now_us);
    if (used || ch->finish != TD_FINISH_NONE)
        core_emit_delta(c, r, t->choice, offset, t, skip, used, c->text.p, c->text.len);
    if (ch->finish != TD_FINISH_NONE) r->n_open--;
    if (cut) cut_choice(c, r, t->choice);
    if (over) {
        fault(c, l, "more tokens than max_tokens");
        return;
    }
    core_check_done(c, r);
}

static void on_prompt_done(td_core *c, td_worker *w, const td_msg *m)
{
    td_lease *l = current(c, w, m->prompt_done.key, true);
    if (!l) return;
    td_request *r = l->request;
    if (!l->prompt_done) td_lease_prompt_done(l);
    if (r->prefill_us < 0) {
        r->worker_queue_us = m->prompt_done.queued_us;
        r->prefill_us = m->prompt_done.prefill_us;
        r->cached_tokens = m->prompt_done.cached_tokens;
        c->counts.prompt_tokens += r->job->n_prompt;
        c->counts.cached_tokens += m->prompt_done.cached_tokens;
    }
    if (l->kind == TD_LEASE_PREFILL && r->state == TD_REQ_PREFILLING)
        td_request_go(r, TD_REQ_SHIPPING, c->now_us);
    if (!r->scores_due) return;
    if (m->prompt_done.n_scores != r->job->n_prompt - 1) {
        fault(c, l, "prompt log probabilities are missing");
        return;
    }
    r->scores_due = false;
    core_emit_prompt(c, r, m->prompt_done.scores, m->prompt_done.n_scores);
    core_check_done(c, r);
}

static void on_ship_report(td_core *c, td_worker *w, const td_msg *m)
{
    td_lease *l = current(c, w, m->ship_report.key, false);
    if (!l || l->kind != TD_LEASE_DECODE) return;
    td_request *r = l->request;
    if (m->ship_report.landed) {
        c->counts.landed++;
        c->counts.kv_bytes += m->ship_report.bytes;
        r->transfer_us = m->ship_report.transfer_us;
        r->exposed_us = m->ship_report.exposed_us;
        r->kv_bytes += m->ship_report.bytes;
        td_worker *from = td_fleet_find(&c->fleet, r->prefill_worker); /* its lease may be closed by now */
        td_fleet_shipped(w, m->ship_report.bytes, m->ship_report.frames, m->ship_report.transfer_us);
        if (from) td_fleet_shipped(from, m->ship_report.bytes, m->ship_report.frames, m->ship_report.transfer_us);
    } else {
        c->counts.recomputed++;
        core_log(c, TD_LOG_WARN, "request %s: worker %s recomputes the prompt (%s)", r->job->name, w->name,
                 m->ship_report.reason ? m->ship_report.reason : "no reason given");
    }
    if (r->state == TD_REQ_PREFILLING || r->state == TD_REQ_SHIPPING)
        td_request_go(r, TD_REQ_LANDED, c->now_us);
}

static void on_ended(td_core *c, td_worker *w, const td_msg *m)
{
    td_request *r = find(c, m->ended.key.request);
    td_lease *l = r ? lease_of(r, w, m->ended.key.attempt) : NULL;
    if (!l) {
        c->counts.stale_messages++;
        return;
    }
    bool live = !l->cancelled && !r->terminal && (l == r->decode || l == r->prefill);
    td_lease_kind kind = l->kind;
    core_close_lease(c, l); /* may release r when it had its terminal event */
    if (!live) return;
    const char *why =
        m->ended.reason && m->ended.reason[0] ? m->ended.reason : td_status_name(m->ended.status);
    if (m->ended.status == TD_EBADREQ) core_fail(c, r, TD_WHY_BAD, 0, "%s", why);
    else if (m->ended.status == TD_ETIME)
        core_fail(c, r, TD_WHY_DEADLINE, 0, "the request took longer than its deadline allows");
    else if (m->ended.status != TD_OK) core_again(c, r, w->incarnation, TD_REPLACE_FAILED, why);
    else if (m->ended.finish == TD_FINISH_CANCEL)
        core_again(c, r, w->incarnation, TD_REPLACE_FAILED, "the worker gave it up");
    else if (kind != TD_LEASE_PREFILL)
        core_again(c, r, w->incarnation, TD_REPLACE_FAULT, "it ended before all tokens had come");
    /* A prefill worker is done when its pages are handed off, or refused: then the decode side recomputes. */
}

void core_leg_message(td_core *c, td_worker *w, const td_msg *m)
{
    switch (m->type) {
    case TD_MSG_RESERVED: on_reserved(c, w, m); break;
    case TD_MSG_BUSY: on_busy(c, w, m); break;
    case TD_MSG_TOKENS:
        for (uint32_t i = 0; i < m->tokens.n; i++) on_tokens_of(c, w, &m->tokens.list[i]);
        break;
    case TD_MSG_PROMPT_DONE: on_prompt_done(c, w, m); break;
    case TD_MSG_SHIP_REPORT: on_ship_report(c, w, m); break;
    case TD_MSG_ENDED: on_ended(c, w, m); break;
    default: c->counts.unknown_messages++;
    }
}
