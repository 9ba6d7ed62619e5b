/* router/core/router.c - the events: jobs, workers, time. */
// SPDX-License-Identifier: Apache-2.0
#include "router/core/router.h"
#include "common/check.h"
#include "router/core/core_int.h"

#include <stdlib.h>
#include <string.h>

static void defaults(td_core_opts *o)
{
#define OR(field, value) if (!o->field) o->field = (value)
    OR(max_queue, 4096);
    OR(max_requests, 65536);
    OR(max_losses, 5);
    OR(heartbeat_ms, 250);
    OR(index_entries, 262144);
    OR(link_bytes_per_s, 1.25e9);
    OR(dead_us, 3000000);
    OR(hang_us, 5000000);
    OR(settle_us, 2000000);
    OR(reply_us, 10000000);
    OR(ship_us, 60000000);
    OR(lease_us, 10000000);
    OR(no_worker_us, 3000000);
    OR(drain_us, 30000000);
#undef OR
}

td_core *td_core_open(const td_core_opts *o)
{
    td_core *c = td_xalloc(sizeof *c);
    c->o = *o;
    defaults(&c->o);
    td_fleet_init(&c->fleet, &(td_fleet_opts){c->o.dead_us, c->o.hang_us, c->o.settle_us});
    c->index = td_index_open(c->o.index_entries);
    td_map_init(&c->by_id, c->o.max_requests);
    td_buf_init(&c->text, 1 << 20);
    return c;
}

static void bury(td_core *c)
{
    while (c->grave) {
        td_request *r = c->grave;
        c->grave = r->next;
        td_request_free(r);
    }
}

static void drop_list(td_list *l)
{
    while (l->first) {
        td_request *r = l->first;
        td_list_remove(l, r);
        while (r->leases) td_lease_close(&r->leases, r->leases);
        td_request_free(r);
    }
}

void td_core_close(td_core *c)
{
    if (!c) return;
    bury(c);
    drop_list(&c->queue);
    drop_list(&c->running);
    drop_list(&c->closing);
    td_index_close(c->index);
    td_map_deinit(&c->by_id);
    td_buf_deinit(&c->text);
    free(c);
}

/* ---- the API ---- */

static uint32_t total(const td_core *c) { return c->queue.n + c->running.n + c->closing.n; }

static bool dark(const td_core *c) { return c->fleet.served && !td_fleet_hopeful(&c->fleet); }

static void on_submit(td_core *c, td_job *j)
{
    c->counts.submitted++;
    uint64_t there;
    const char *reason = NULL;
    td_why why = TD_WHY_NONE;
    uint32_t retry_ms = 1000;
    if (c->draining) why = TD_WHY_DRAINING, reason = "the server is shutting down";
    else if (!j->n_prompt || j->sampling.n < 1 || j->sampling.n > TD_MAX_CHOICES ||
             td_map_get(&c->by_id, j->id, &there))
        why = TD_WHY_BAD, reason = "the request is empty or repeated", retry_ms = 0;
    else if (c->queue.n >= c->o.max_queue || total(c) >= c->o.max_requests)
        why = TD_WHY_QUEUE_FULL, reason = "too many requests are waiting";
    else if (dark(c)) why = TD_WHY_NO_WORKER, reason = "no worker is connected";
    if (why != TD_WHY_NONE) {
        core_emit_refusal(c, j, why, retry_ms, reason);
        td_job_free(j);
        return;
    }
    td_request *r = td_request_new(j, c->now_us, c->o.tokenizer);
    td_map_put(&c->by_id, j->id, (uint64_t)(uintptr_t)r);
    td_admit_push(&c->queue, r, c->o.max_queue);
}

static void on_cancel(td_core *c, uint64_t id)
{
    uint64_t p;
    if (td_map_get(&c->by_id, id, &p))
        core_fail(c, (td_request *)(uintptr_t)p, TD_WHY_CANCELLED, 0, "the client is gone");
}

/* ---- workers ---- */

static void on_hello(td_core *c, uint64_t from, const td_msg *m)
{
    char reason[256] = "";
    td_worker *w, *old, *known = td_fleet_find(&c->fleet, from);
    bool first = !c->fleet.has_identity;
    if (td_fleet_hello(&c->fleet, c->now_us, from, &m->hello, &w, &old, reason, sizeof reason) != TD_OK) {
        c->counts.workers_refused++;
        core_log(c, TD_LOG_ERROR, "worker %s refused: %s", m->hello.name, reason);
        td_msg *no = core_send(c, &(td_worker){.incarnation = from}, TD_MSG_REFUSED);
        no->refused.reason = td_arena_strndup(&c->out->arena, reason, strlen(reason));
        return;
    }
    if (old)
        core_lose_worker(c, old, TD_WORKER_DEAD, TD_REPLACE_LOST, "a new process of the same name has come");
    if (known && known->leases) { /* it starts over: what it had is gone */
        td_worker_state s = known->state;
        core_lose_worker(c, known, TD_WORKER_DEAD, TD_REPLACE_LOST, "it said hello again");
        known->state = s;
    }
    if (!known) td_index_drop(c->index, w->slot);
    td_msg *yes = core_send(c, w, TD_MSG_WELCOME);
    yes->welcome.heartbeat_ms = c->o.heartbeat_ms;
    yes->welcome.hash_key = c->o.hash_key;
    static const char *const role[] = {"?", "prefill", "decode", "mixed"};
    core_log(c, TD_LOG_INFO, "worker %s joined: %s, %llu KV tokens, %u sequences%s", w->name,
             role[w->role & 3], (unsigned long long)w->kv_tokens, w->max_seqs,
             first ? ", fixes the cluster's identity" : "");
}

static void on_beat(td_core *c, uint64_t from, td_worker *w, const td_msg *m)
{
    /* An unknown sender (this router is younger than it thinks) learns from our incarnation that it must say
     * hello. */
    td_msg *ack = core_send(c, w ? w : &(td_worker){.incarnation = from}, TD_MSG_HEARTBEAT_ACK);
    ack->heartbeat_ack.seq = m->heartbeat.seq;
    if (!w) {
        c->counts.unknown_messages++;
        return;
    }
    td_worker_state was = w->state;
    if (td_fleet_beat(&c->fleet, w, c->now_us, &m->heartbeat))
        core_log(c, TD_LOG_WARN, "worker %s is back", w->name);
    if (w->state != was)
        core_log(c, TD_LOG_INFO, "worker %s: %s -> %s", w->name, td_worker_state_name(was),
                 td_worker_state_name(w->state));
}

static void on_message(td_core *c, uint64_t from, const td_msg *m)
{
    td_worker *w = td_fleet_find(&c->fleet, from);
    if (m->type == TD_MSG_HELLO) on_hello(c, from, m);
    else if (m->type == TD_MSG_HEARTBEAT) on_beat(c, from, w, m);
    else if (!w || w->state == TD_WORKER_DEAD)
        c->counts.unknown_messages++; /* its leases are gone; its next beat brings it back */
    else if (m->type == TD_MSG_GOODBYE)
        core_lose_worker(c, w, TD_WORKER_DEAD, TD_REPLACE_LOST, "it said goodbye");
    else core_leg_message(c, w, m);
}

static void on_peer_lost(td_core *c, uint64_t from)
{
    td_worker *w = td_fleet_find(&c->fleet, from);
    if (w && td_worker_alive(w))
        core_lose_worker(c, w, TD_WORKER_DEAD, TD_REPLACE_LOST, "its connection is closed");
}

static void on_leave(td_core *c)
{
    c->draining = c->left = true;
    for (unsigned i = 0; i < TD_INDEX_SLOTS; i++)
        if (td_worker_alive(&c->fleet.w[i])) core_send(c, &c->fleet.w[i], TD_MSG_GOODBYE);
}

/* ---- time ---- */

static void check_worker(td_core *c, td_worker *w)
{
    bool hung;
    if (!td_worker_alive(w)) return;
    if (td_fleet_overdue(&c->fleet, w, c->now_us, &hung)) {
        if (hung)
            core_lose_worker(c, w, TD_WORKER_HUNG, TD_REPLACE_HUNG, "its step stands still with work queued");
        else core_lose_worker(c, w, TD_WORKER_DEAD, TD_REPLACE_LOST, "no heartbeat");
        return;
    }
    /* A late beat may mean a dead process: a send to it says so long before dead_us. */
    int64_t ping = (int64_t)c->o.heartbeat_ms * 1000, late = ping + ping / 2;
    if (c->now_us - w->beat_us < late || c->now_us - w->pinged_us < ping) return;
    w->pinged_us = c->now_us;
    core_send(c, w, TD_MSG_HEARTBEAT_ACK)->heartbeat_ack.seq = w->beat.seq;
}

static bool past_deadline(const td_core *c, const td_request *r)
{
    return r->job->deadline_us && c->now_us >= r->job->deadline_us;
}

static void fail_deadline(td_core *c, td_request *r)
{
    core_fail(c, r, TD_WHY_DEADLINE, 0, "not finished within %lld ms",
              (long long)(r->job->deadline_us - r->arrived_us) / 1000);
}

static void fail_shutdown(td_core *c, td_request *r)
{
    core_fail(c, r, TD_WHY_DRAINING, 1000, "the server is shutting down");
}

static void check_running(td_core *c, td_request *r)
{
    int64_t age = c->now_us - r->entered_us;
    if (past_deadline(c, r)) fail_deadline(c, r);
    else if (r->state == TD_REQ_ROUTED && age > c->o.reply_us)
        core_again(c, r, r->decode_worker, TD_REPLACE_TIMEOUT, "no answer to the reservation");
    else if ((r->state == TD_REQ_SHIPPING || r->state == TD_REQ_LANDED) && age > c->o.ship_us)
        core_again(c, r, r->decode_worker, TD_REPLACE_TIMEOUT, "the pages have not landed");
}

/* Leases that a worker forgot to end. Closing the last one releases the request, so `next` is taken before.
 * */
static void check_leases(td_core *c, td_request *r)
{
    for (td_lease *l = r->leases, *next; l; l = next) {
        next = l->next_of_request;
        if (!l->close_us || c->now_us < l->close_us) continue;
        core_log(c, TD_LOG_WARN, "request %s: worker %s never ended attempt %u", r->job->name,
                 l->worker->name, l->attempt);
        core_close_lease(c, l);
    }
}

static void on_tick(td_core *c)
{
    for (unsigned i = 0; i < TD_INDEX_SLOTS; i++) check_worker(c, &c->fleet.w[i]);
    if (!td_fleet_hopeful(&c->fleet)) {
        if (!c->dark_us) c->dark_us = c->now_us;
    } else {
        c->dark_us = 0;
    }
    bool cut = c->draining && !c->left && c->now_us >= c->drain_end_us;
    bool give_up = c->fleet.served && c->dark_us && c->now_us - c->dark_us >= c->o.no_worker_us;
    for (td_request *r = c->queue.first, *next; r; r = next) {
        next = r->next;
        if (past_deadline(c, r)) fail_deadline(c, r);
        else if (cut) fail_shutdown(c, r);
        else if (give_up) core_fail(c, r, TD_WHY_NO_WORKER, 1000, "no worker is left");
    }
    td_list *lists[3] = {&c->queue, &c->running, &c->closing};
    for (int i = 0; i < 3; i++)
        for (td_request *r = lists[i]->first, *next; r; r = next) {
            next = r->next;
            if (i == 1 && cut) fail_shutdown(c, r);
            else if (i == 1) check_running(c, r);
            if (r->leases) check_leases(c, r);
        }
}

void td_core_step(td_core *c, int64_t now_us, const td_event *ev, td_actions *out)
{
    td_actions_deinit(out);
    td_actions_init(out);
    bury(c);
    c->out = out;
    c->now_us = now_us;
    switch (ev->type) {
    case TD_EV_SUBMIT: on_submit(c, ev->job); break;
    case TD_EV_CANCEL: on_cancel(c, ev->id); break;
    case TD_EV_MESSAGE: on_message(c, ev->id, ev->msg); break;
    case TD_EV_PEER_LOST: on_peer_lost(c, ev->id); break;
    case TD_EV_TICK: on_tick(c); break;
    case TD_EV_DRAIN:
        if (!c->draining) c->drain_end_us = now_us + c->o.drain_us;
        c->draining = true;
        break;
    case TD_EV_LEAVE: on_leave(c); break;
    }
    if (!c->left) core_schedule(c);
    c->out = NULL;
}

/* ---- views ---- */

td_fleet *td_core_fleet(td_core *c) { return &c->fleet; }
const td_core_counts *td_core_counts_of(const td_core *c) { return &c->counts; }
bool td_core_idle(const td_core *c) { return !total(c); }

void td_core_load(const td_core *c, uint32_t *queued, uint32_t *running, uint32_t *closing)
{
    *queued = c->queue.n;
    *running = c->running.n;
    *closing = c->closing.n;
}

bool td_core_serves(td_core *c, int64_t now_us) { return !c->draining && td_fleet_serves(&c->fleet, now_us); }

void td_core_each(const td_core *c, void (*fn)(void *arg, const td_request *r), void *arg)
{
    const td_list *lists[3] = {&c->queue, &c->running, &c->closing};
    for (int i = 0; i < 3; i++)
        for (const td_request *r = lists[i]->first; r; r = r->next) fn(arg, r);
}
