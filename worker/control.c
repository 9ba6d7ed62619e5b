// SPDX-License-Identifier: Apache-2.0
#include "worker/control.h"
#include "common/check.h"
#include "common/log.h"
#include "common/map.h"
#include <stdlib.h>

enum { HELLO_RETRY_US = 10000, HELLO_AGAIN_US = 500000, BACKOFF_MIN_US = 100000, BACKOFF_MAX_US = 5000000,
       BUSY_LOADING_MS = 200, BUSY_FULL_MS = 20, BUSY_DRAIN_MS = 1000, EXTRA_BEAT_US = 20000,
       GIVE_UP_US = 2000000 };

typedef enum { LINK_DOWN, LINK_CONNECTING, LINK_JOINED } link_state;

typedef struct leg {
    uint64_t id;                 /* key towards the engine */
    uint64_t router;             /* incarnation; 0: it is gone */
    td_req_key key;
} leg;

struct td_control {
    td_control_opts o;
    td_control_io io;
    td_wstate state;
    td_control_outcome outcome;
    const td_msg_hello *hello;
    link_state link;
    uint64_t router;             /* incarnation, of Welcome */
    uint32_t silent;             /* connections in a row on which nobody answered */
    int64_t retry_us, backoff_us, heard_us, beat_us, hello_us, drain_until_us;
    bool beat_soon, drain_cancelled;
    uint64_t beat_seq, next_leg;
    td_map by_leg, by_key;       /* leg id -> leg *; hash of (router, request, attempt) -> leg * */
};

/* ---- commands and batches ---- */
void td_wcmd_free(td_wcmd *c)
{
    td_arena_deinit(&c->arena);
    free(c);
}

td_wbatch *td_wbatch_new(void)
{
    td_wbatch *b = td_xalloc(sizeof *b);
    td_arena_init(&b->arena, 64 << 20);
    return b;
}

void td_wbatch_free(td_wbatch *b)
{
    td_arena_deinit(&b->arena);
    free(b->tokens);
    free(b->event);
    free(b);
}

td_msg_tokens *td_wbatch_tokens(td_wbatch *b)
{
    if (b->n_tokens == b->cap_tokens) {
        b->cap_tokens = b->cap_tokens ? b->cap_tokens * 2 : 16;
        b->tokens = td_xrealloc(b->tokens, b->cap_tokens * sizeof *b->tokens);
    }
    td_msg_tokens *t = &b->tokens[b->n_tokens++];
    *t = (td_msg_tokens){0};
    return t;
}

td_msg *td_wbatch_event(td_wbatch *b, uint64_t leg_id, td_msg_type type)
{
    if (b->n_events == b->cap_events) {
        b->cap_events = b->cap_events ? b->cap_events * 2 : 8;
        b->event = td_xrealloc(b->event, b->cap_events * sizeof *b->event);
    }
    td_wevent *e = &b->event[b->n_events++];
    *e = (td_wevent){.leg = leg_id, .msg = {.type = type}};
    return &e->msg;
}

/* ---- legs ---- */
static uint64_t key_hash(uint64_t router, td_req_key k)
{
    return td_mix64(router ^ td_mix64(k.request ^ td_mix64(k.attempt)));
}

static leg *find_id(const td_control *c, uint64_t id)
{
    uint64_t v;
    return td_map_get(&c->by_leg, id, &v) ? (leg *)(uintptr_t)v : NULL;
}

static leg *find_key(const td_control *c, uint64_t router, td_req_key k)
{
    uint64_t v;
    if (!td_map_get(&c->by_key, key_hash(router, k), &v)) return NULL;
    leg *l = (leg *)(uintptr_t)v;
    return l->router == router && l->key.request == k.request && l->key.attempt == k.attempt ? l : NULL;
}

static leg *add_leg(td_control *c, uint64_t router, td_req_key k)
{
    uint64_t taken;
    if (c->by_leg.n == c->o.max_legs || td_map_get(&c->by_key, key_hash(router, k), &taken)) return NULL;
    leg *l = td_xalloc(sizeof *l);
    *l = (leg){.id = ++c->next_leg, .router = router, .key = k};
    td_map_put(&c->by_leg, l->id, (uint64_t)(uintptr_t)l);
    td_map_put(&c->by_key, key_hash(router, k), (uint64_t)(uintptr_t)l);
    return l;
}

static void unname(td_control *c, leg *l)
{
    if (l->router) td_map_del(&c->by_key, key_hash(l->router, l->key));
    l->router = 0;
}

static void drop_leg(td_control *c, leg *l)
{
    unname(c, l);
    td_map_del(&c->by_leg, l->id);
    free(l);
    c->beat_soon = true; /* the ledger has changed: the router need not wait for the next beat */
}

uint32_t td_control_legs(const td_control *c)
{
    return (uint32_t)c->by_leg.n;
}

/* ---- open, close ---- */
td_control *td_control_open(const td_control_opts *o, td_control_io io)
{
    td_control *c = td_xalloc(sizeof *c);
    c->o = *o;
    c->io = io;
    c->state = TD_WSTATE_LOADING;
    c->backoff_us = BACKOFF_MIN_US;
    td_map_init(&c->by_leg, o->max_legs);
    td_map_init(&c->by_key, o->max_legs);
    return c;
}

void td_control_close(td_control *c)
{
    if (!c) return;
    size_t it = 0;
    uint64_t k, v;
    while (td_map_next(&c->by_leg, &it, &k, &v)) free((leg *)(uintptr_t)v);
    td_map_deinit(&c->by_leg);
    td_map_deinit(&c->by_key);
    free(c);
}

/* ---- link ---- */
static bool command_cancel(td_control *c, uint64_t id)
{
    td_wcmd *w = td_xalloc(sizeof *w);
    w->type = TD_WCMD_CANCEL;
    w->leg = id;
    if (c->io.command(c->io.arg, w)) return true;
    td_wcmd_free(w);
    return false;
}

static void cancel_all(td_control *c)
{
    size_t it = 0;
    uint64_t k, v;
    while (td_map_next(&c->by_leg, &it, &k, &v))
        if (!command_cancel(c, k)) TD_WARN("leg %llu could not be cancelled now", (unsigned long long)k);
}

/* Legs of a router that is gone go on only until the engine has let go of them. */
static void orphan_all(td_control *c)
{
    size_t it = 0;
    uint64_t k, v;
    cancel_all(c);
    while (td_map_next(&c->by_leg, &it, &k, &v)) unname(c, (leg *)(uintptr_t)v);
}

/* why NULL: it left in order. */
/* Said ever more rarely: at the first try, the second, fourth, eighth. */
static void nobody_answers(td_control *c)
{
    c->silent++;
    if (c->silent & (c->silent - 1)) return;
    TD_WARN("no router answers at %s (try %u): is it running there, and are the keys of one pair?", c->o.router, c->silent);
}

static void link_lost(td_control *c, int64_t now, const char *why)
{
    if (c->link == LINK_JOINED && !why) TD_INFO("the router said goodbye");
    else if (c->link == LINK_JOINED)
        TD_WARN("router lost (%s), %u legs cancelled", why, td_control_legs(c));
    else if (why) nobody_answers(c);
    orphan_all(c);
    c->link = LINK_DOWN;
    c->router = 0;
    c->retry_us = now + c->backoff_us;
    c->backoff_us = TD_MIN(c->backoff_us * 2, (int64_t)BACKOFF_MAX_US);
}

static td_status send(td_control *c, td_msg *m)
{
    m->sender = c->o.incarnation;
    return c->link == LINK_DOWN ? TD_AGAIN : c->io.send(c->io.arg, m);
}

/* A message that has to arrive: if the link cannot take it, the link is of no use. */
static void tell(td_control *c, int64_t now, td_msg *m)
{
    if (send(c, m) < 0) link_lost(c, now, "it does not take its messages");
}

static void send_beat(td_control *c, int64_t now)
{
    td_msg m = {.type = TD_MSG_HEARTBEAT};
    c->io.beat(c->io.arg, &m.heartbeat);
    m.heartbeat.seq = ++c->beat_seq;
    m.heartbeat.state = c->state;
    c->beat_us = now;
    c->beat_soon = false;
    (void)send(c, &m);
}

static void send_hello(td_control *c, int64_t now)
{
    td_msg m = {.type = TD_MSG_HELLO, .hello = *c->hello};
    td_status s = send(c, &m);
    c->hello_us = now + (s == TD_OK ? HELLO_AGAIN_US : HELLO_RETRY_US);
    if (s == TD_OK) send_beat(c, now); /* right behind it: READY is told by the beat */
}

void td_control_loaded(td_control *c, int64_t now_us, const td_msg_hello *hello)
{
    c->hello = hello;
    if (c->state == TD_WSTATE_LOADING) c->state = TD_WSTATE_READY;
    if (c->link == LINK_CONNECTING) send_hello(c, now_us);
}

void td_control_tick(td_control *c, int64_t now_us)
{
    if (c->link == LINK_DOWN && now_us >= c->retry_us) {
        c->io.connect(c->io.arg);
        c->link = LINK_CONNECTING;
        c->heard_us = now_us;
        c->hello_us = 0;
    }
    if (c->link != LINK_DOWN && now_us - c->heard_us >= c->o.dead_us) link_lost(c, now_us, "no word from it");
    if (c->link == LINK_CONNECTING && c->hello && now_us >= c->hello_us) send_hello(c, now_us);
    int64_t since = now_us - c->beat_us;
    if (c->link != LINK_DOWN && (since >= c->o.beat_us || (c->beat_soon && since >= EXTRA_BEAT_US)))
        send_beat(c, now_us);
    if (c->state != TD_WSTATE_DRAINING || c->outcome != TD_CONTROL_RUNS) return;
    if (c->by_leg.n && now_us >= c->drain_until_us) {
        TD_WARN("draining took too long: %u legs are cancelled", td_control_legs(c));
        cancel_all(c); /* their Ended still goes to the router, which places them again */
        c->drain_until_us = now_us + GIVE_UP_US;
        if (c->drain_cancelled) c->outcome = TD_CONTROL_FINISHED;
        c->drain_cancelled = true;
    }
    if (!c->by_leg.n) {
        td_msg m = {.type = TD_MSG_GOODBYE};
        (void)send(c, &m);
        c->outcome = TD_CONTROL_FINISHED;
    }
}

int64_t td_control_deadline(const td_control *c)
{
    if (c->link == LINK_DOWN) return c->retry_us;
    int64_t due = TD_MIN(c->heard_us + c->o.dead_us, c->beat_us + (c->beat_soon ? (int64_t)EXTRA_BEAT_US
                                                                   : c->o.beat_us));
    if (c->link == LINK_CONNECTING && c->hello) due = TD_MIN(due, c->hello_us);
    if (c->state == TD_WSTATE_DRAINING) due = TD_MIN(due, c->by_leg.n ? c->drain_until_us : 0);
    return due;
}

void td_control_drain(td_control *c, int64_t now_us)
{
    if (c->state == TD_WSTATE_DRAINING) return;
    TD_INFO("draining: %u legs to finish", td_control_legs(c));
    c->state = TD_WSTATE_DRAINING;
    c->drain_until_us = now_us + c->o.drain_us;
    c->beat_soon = true;
    c->beat_us = 0;
    td_control_tick(c, now_us);
}

td_control_outcome td_control_over(const td_control *c)
{
    return c->outcome;
}

/* ---- what the router says ---- */
static void busy(td_control *c, int64_t now, td_req_key key, uint32_t retry_ms, const char *why)
{
    td_msg m = {.type = TD_MSG_BUSY};
    m.busy.key = key;
    m.busy.retry_ms = retry_ms;
    m.busy.reason = why;
    tell(c, now, &m);
}

static void on_work(td_control *c, int64_t now, const td_msg *m, td_arena *arena)
{
    bool start = m->type == TD_MSG_START;
    const td_msg_work *w = start ? &m->start.work : &m->reserve.work;
    if (find_key(c, m->sender, w->key)) return;
    if (c->state != TD_WSTATE_READY) {
        bool drains = c->state == TD_WSTATE_DRAINING;
        busy(c, now, w->key, drains ? BUSY_DRAIN_MS : BUSY_LOADING_MS, drains ? "draining" : "loading");
        return;
    }
    leg *l = add_leg(c, m->sender, w->key);
    if (!l) {
        busy(c, now, w->key, BUSY_FULL_MS, "all legs are in use");
        return;
    }
    td_wcmd *cmd = td_xalloc(sizeof *cmd);
    *cmd = (td_wcmd){.type = start ? TD_WCMD_START : TD_WCMD_RESERVE, .leg = l->id, .arena = *arena,
                     .work = *w, .has_sink = start && m->start.has_sink,
                     .deadline_us = w->remaining_ms ? now + (int64_t)w->remaining_ms * 1000 : 0};
    if (cmd->has_sink) cmd->sink = m->start.sink;
    if (c->io.command(c->io.arg, cmd)) {
        *arena = (td_arena){.max = arena->max}; /* the command has it now */
        return;
    }
    cmd->arena = (td_arena){0};
    td_wcmd_free(cmd);
    drop_leg(c, l);
    busy(c, now, w->key, BUSY_FULL_MS, "the engine's queue is full");
}

static void on_cancel(td_control *c, int64_t now, const td_msg *m)
{
    leg *l = find_key(c, m->sender, m->cancel.key);
    if (!l && m->type == TD_MSG_CANCEL) {
        td_msg e = {.type = TD_MSG_ENDED};
        e.ended.key = m->cancel.key;
        e.ended.finish = TD_FINISH_CANCEL;
        e.ended.status = TD_EGONE;
        e.ended.reason = "no such leg";
        tell(c, now, &e);
    }
    if (!l) return;
    td_wcmd *w = td_xalloc(sizeof *w);
    w->type = m->type == TD_MSG_CANCEL ? TD_WCMD_CANCEL : TD_WCMD_CANCEL_CHOICE;
    w->leg = l->id;
    w->choice = m->cancel.choice;
    if (c->io.command(c->io.arg, w)) return;
    td_wcmd_free(w);
    TD_WARN("a cancel was lost: the engine's queue is full"); /* the leg ends by its deadline or length */
}

static void on_welcome(td_control *c, const td_msg *m)
{
    if (c->link == LINK_JOINED && m->sender == c->router) return;
    if (c->link == LINK_JOINED) orphan_all(c);
    c->link = LINK_JOINED;
    c->silent = 0;
    c->router = m->sender;
    c->backoff_us = BACKOFF_MIN_US;
    if (m->welcome.heartbeat_ms) c->o.beat_us = (int64_t)m->welcome.heartbeat_ms * 1000;
    c->beat_us = 0; /* at the next tick */
    TD_INFO("joined the router");
}

/* The answer lets it go: a connection that is closed while we write to it may lose what we have not read. */
static void on_goodbye(td_control *c, int64_t now)
{
    td_msg m = {.type = TD_MSG_GOODBYE};
    (void)send(c, &m);
    link_lost(c, now, NULL);
}

void td_control_message(td_control *c, int64_t now_us, const td_msg *m, td_arena *arena)
{
    if (c->link == LINK_DOWN) return;
    if (c->link == LINK_JOINED && m->sender != c->router && m->type != TD_MSG_WELCOME &&
        m->type != TD_MSG_REFUSED) {
        /* Another process answers at this address: everything the old one had started is void. The link
         * itself works. */
        TD_WARN("the router was restarted, %u legs cancelled", td_control_legs(c));
        orphan_all(c);
        c->link = LINK_CONNECTING;
        c->router = 0;
        c->hello_us = 0;
    }
    c->heard_us = now_us;
    switch (m->type) {
    case TD_MSG_WELCOME: on_welcome(c, m); break;
    case TD_MSG_REFUSED:
        TD_ERROR("the router refused this worker: %s", m->refused.reason);
        c->outcome = TD_CONTROL_REFUSED;
        break;
    case TD_MSG_DRAIN: td_control_drain(c, now_us); break;
    case TD_MSG_GOODBYE: on_goodbye(c, now_us); break;
    case TD_MSG_START:
    case TD_MSG_RESERVE:
        if (c->link == LINK_JOINED) on_work(c, now_us, m, arena);
        break;
    case TD_MSG_CANCEL:
    case TD_MSG_CANCEL_CHOICE: on_cancel(c, now_us, m); break;
    default: break; /* HeartbeatAck: heard; others are not for workers */
    }
    if (c->link == LINK_CONNECTING && c->hello && now_us >= c->hello_us) send_hello(c, now_us);
}

/* ---- what the engine says ---- */
static void set_key(td_msg *m, td_req_key k)
{
    switch (m->type) {
    case TD_MSG_RESERVED: m->reserved.key = k; break;
    case TD_MSG_BUSY: m->busy.key = k; break;
    case TD_MSG_PROMPT_DONE: m->prompt_done.key = k; break;
    case TD_MSG_SHIP_REPORT: m->ship_report.key = k; break;
    default: m->ended.key = k;
    }
}

static void pass_event(td_control *c, int64_t now, td_wevent *e)
{
    leg *l = find_id(c, e->leg);
    if (!l) return;
    bool last = e->msg.type == TD_MSG_ENDED || e->msg.type == TD_MSG_BUSY;
    uint64_t router = l->router;
    set_key(&e->msg, l->key);
    if (last) drop_leg(c, l);
    if (router && router == c->router) tell(c, now, &e->msg);
}

static void pass_tokens(td_control *c, int64_t now, td_wbatch *b)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < b->n_tokens; i++) {
        const leg *l = find_id(c, b->tokens[i].key.request);
        if (!l || !l->router || l->router != c->router) continue;
        b->tokens[n] = b->tokens[i];
        b->tokens[n++].key = l->key;
    }
    if (!n) return;
    td_msg m = {.type = TD_MSG_TOKENS};
    m.tokens.step = b->step;
    m.tokens.list = b->tokens;
    m.tokens.n = n;
    tell(c, now, &m);
}

void td_control_batch(td_control *c, int64_t now_us, td_wbatch *b)
{
    for (uint32_t i = 0; i < b->n_events; i++)
        if (b->event[i].msg.type != TD_MSG_ENDED) pass_event(c, now_us, &b->event[i]);
    pass_tokens(c, now_us, b);
    for (uint32_t i = 0; i < b->n_events; i++)
        if (b->event[i].msg.type == TD_MSG_ENDED) pass_event(c, now_us, &b->event[i]);
    td_wbatch_free(b);
}
