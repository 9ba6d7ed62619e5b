/* router/api/bridge.c - the shell around the machine: it moves bytes and decides nothing. */
// SPDX-License-Identifier: Apache-2.0
#include "router/api/bridge.h"
#include "common/check.h"
#include "common/clock.h"
#include "router/api/call.h"
#include "router/trace.h"

#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

enum { UNPACK_ARENA_BYTES = 128 << 20, ID_MAX = 64 };

typedef struct peer { uint64_t incarnation; uint8_t id[ID_MAX]; size_t n; int64_t seen_us; } peer;
typedef struct later { struct later *next; td_out *out; } later;

struct td_bridge {
    td_bridge_opts o;
    td_loop loop;
    td_actions act;
    td_buf packed;
    peer peers[TD_BRIDGE_PEERS];
    later *first[TD_API_NETS], **last[TD_API_NETS];
    int64_t ticked_us;
    bool was_ready, draining, stopped, killed;
    int64_t drain_start_us;
    uint64_t bad_messages;
};

td_bridge *td_bridge_open(const td_bridge_opts *o)
{
    td_bridge *b = td_xalloc(sizeof *b);
    b->o = *o;
    td_loop_init(&b->loop);
    td_actions_init(&b->act);
    td_buf_init(&b->packed, TD_BRIDGE_MESSAGE_BYTES);
    for (unsigned i = 0; i < TD_API_NETS; i++) b->last[i] = &b->first[i];
    TD_CHECK(td_loop_add_sock(&b->loop, o->sock) && td_loop_add_fd(&b->loop, o->wake_fd));
    if (o->signal_fd >= 0) TD_CHECK(td_loop_add_fd(&b->loop, o->signal_fd));
    return b;
}

/* ---- peers ---- */

static peer *find_peer(td_bridge *b, uint64_t incarnation)
{
    for (int i = 0; i < TD_BRIDGE_PEERS; i++)
        if (b->peers[i].n && b->peers[i].incarnation == incarnation) return &b->peers[i];
    return NULL;
}

static void note_peer(td_bridge *b, uint64_t incarnation, td_part id, int64_t now)
{
    if (!id.n || id.n > ID_MAX) return;
    peer *p = find_peer(b, incarnation);
    if (!p) {
        p = &b->peers[0];
        for (int i = 1; i < TD_BRIDGE_PEERS && p->n; i++)
            if (!b->peers[i].n || b->peers[i].seen_us < p->seen_us) p = &b->peers[i];
        p->incarnation = incarnation;
    }
    memcpy(p->id, id.p, id.n);
    p->n = id.n;
    p->seen_us = now;
}

/* ---- actions ---- */

static void step(td_bridge *b, const td_event *e);

/* False: the peer cannot be reached any more. */
static bool send_action(td_bridge *b, const td_action *a)
{
    peer *p = find_peer(b, a->to);
    if (!p) return false;
    td_buf_reset(&b->packed);
    if (td_msg_pack(&a->msg, &b->packed) != TD_OK) {
        TD_ERROR("a message of type %s is too large to send", td_msg_name(a->msg.type));
        return false;
    }
    td_part part = {b->packed.p, b->packed.len};
    /* AGAIN: ten thousand messages wait for it. It sleeps or is cut off; either way it is lost. */
    if (td_sock_send(b->o.sock, p->id, p->n, &part, 1) == TD_OK) return true;
    p->n = 0;
    return false;
}

static void give_out(td_bridge *b, td_out *o)
{
    unsigned i = o->net;
    if (!b->first[i] && td_chan_push(b->o.api->nets[i].from_core, o)) return;
    later *l = td_xalloc(sizeof *l);
    *l = (later){.out = o};
    *b->last[i] = l;
    b->last[i] = &l->next;
}

static void give_later(td_bridge *b)
{
    for (unsigned i = 0; i < b->o.api->n_nets; i++) {
        while (b->first[i] && td_chan_push(b->o.api->nets[i].from_core, b->first[i]->out)) {
            later *l = b->first[i];
            b->first[i] = l->next;
            if (!b->first[i]) b->last[i] = &b->first[i];
            free(l);
        }
    }
}

static void ended(td_bridge *b, const td_request *r, int64_t now)
{
    td_metrics_request(b->o.metrics, r, now);
    td_trace_request(r, td_core_fleet(b->o.core), now);
}

static void step(td_bridge *b, const td_event *e)
{
    uint64_t lost[TD_BRIDGE_PEERS];
    unsigned n_lost = 0;
    int64_t now = td_now_us();
    td_core_step(b->o.core, now, e, &b->act);
    for (uint32_t i = 0; i < b->act.n; i++) {
        td_action *a = &b->act.a[i];
        switch (a->type) {
        case TD_ACT_SEND:
            if (!send_action(b, a) && n_lost < TD_BRIDGE_PEERS) lost[n_lost++] = a->to;
            break;
        case TD_ACT_EMIT: give_out(b, a->out); a->out = NULL; break;
        case TD_ACT_ENDED: ended(b, a->request, now); break;
        case TD_ACT_LOG: td_log(a->level, "%s", a->text); break;
        }
    }
    /* Bounded: each round loses at least one worker that was alive, or the core ignores the event. */
    for (unsigned i = 0; i < n_lost; i++) step(b, &(td_event){.type = TD_EV_PEER_LOST, .id = lost[i]});
}

/* ---- inputs ---- */

static void receive(td_bridge *b)
{
    for (int i = 0; i < TD_BRIDGE_BATCH; i++) {
        td_part id, part[2];
        int n;
        if (td_sock_recv(b->o.sock, &id, part, &n) != TD_OK) return;
        td_arena arena;
        td_arena_init(&arena, UNPACK_ARENA_BYTES);
        td_msg m;
        td_status s = n >= 1 ? td_msg_unpack(part[0].p, part[0].n, &arena, &m) : TD_EPROTO;
        if (s == TD_OK) {
            note_peer(b, m.sender, id, td_now_us());
            step(b, &(td_event){.type = TD_EV_MESSAGE, .id = m.sender, .msg = &m});
        } else if (s != TD_AGAIN) {
            b->bad_messages++;
        }
        td_arena_deinit(&arena);
    }
}

static void report(td_bridge *b, td_ask_core *a)
{
    if (a->kind == TD_CORE_METRICS)
        td_metrics_render(b->o.metrics, b->o.core, b->o.api, b->bad_messages, td_now_us(), &a->text);
    else td_ledger_render(b->o.core, td_now_us(), &a->text);
    td_net_post(a->from->net, td_call_report, a);
}

static void drain_ring(td_bridge *b, td_chan *c)
{
    for (td_ask_core *a; (a = td_chan_pop(c));) {
        if (a->kind == TD_CORE_METRICS || a->kind == TD_CORE_LEDGER) {
            report(b, a);
            continue;
        }
        if (a->kind == TD_CORE_SUBMIT) step(b, &(td_event){.type = TD_EV_SUBMIT, .job = a->job});
        else step(b, &(td_event){.type = TD_EV_CANCEL, .id = a->id});
        free(a);
    }
}

static void start_drain(td_bridge *b)
{
    if (b->draining) {
        b->killed = true;
        return;
    }
    b->draining = true;
    atomic_store(&b->o.api->draining, true);
    step(b, &(td_event){.type = TD_EV_DRAIN});
    uint32_t queued, running, closing;
    td_core_load(b->o.core, &queued, &running, &closing);
    TD_INFO("draining: %u requests are still running", queued + running);
    b->drain_start_us = td_now_us();
    b->o.on_drain(b->o.arg);
}

static void end_drain(td_bridge *b)
{
    if (!b->draining || b->stopped) return;
    int64_t since = td_now_us() - b->drain_start_us;
    if (since < b->o.drain_us && (since < b->o.listen_us || !td_core_idle(b->o.core))) return;
    b->stopped = true;
    b->o.on_stop(b->o.arg);
}

static void signals(td_bridge *b)
{
    struct signalfd_siginfo si;
    while (b->o.signal_fd >= 0 && read(b->o.signal_fd, &si, sizeof si) == sizeof si) start_drain(b);
}

static void tick(td_bridge *b, int64_t now)
{
    b->ticked_us = now;
    step(b, &(td_event){.type = TD_EV_TICK});
    td_fleet *f = td_core_fleet(b->o.core);
    bool ready = td_core_serves(b->o.core, now);
    if (ready && !b->was_ready && td_fleet_ready(f) >= b->o.expected_workers) {
        b->was_ready = true;
        b->o.on_ready(b->o.arg, f);
    }
    atomic_store(&b->o.api->ready, ready);
    atomic_store(&b->o.api->max_model_len, f->has_identity ? f->id.max_model_len : 0);
    atomic_store(&b->o.api->core_beat_us, now);
}

/* Closing at once might lose the goodbye of a worker that is just writing to us, so their answers are waited
 * for. */
static void leave(td_bridge *b)
{
    step(b, &(td_event){.type = TD_EV_LEAVE});
    int64_t end = td_now_us() + TD_BRIDGE_LEAVE_US;
    while (!b->killed && td_fleet_anyone(td_core_fleet(b->o.core)) && td_now_us() < end) {
        td_wake_clear(b->o.wake_fd);
        receive(b);
        signals(b);
        td_loop_wait(&b->loop, TD_BRIDGE_TICK_US / 10);
    }
}

void td_bridge_run(td_bridge *b)
{
    while (!b->killed && !(b->draining && !atomic_load(b->o.nets_running))) {
        td_wake_clear(b->o.wake_fd);
        receive(b);
        for (unsigned i = 0; i < b->o.api->n_nets; i++) drain_ring(b, b->o.api->nets[i].to_core);
        signals(b);
        int64_t now = td_now_us();
        if (now - b->ticked_us >= TD_BRIDGE_TICK_US) tick(b, now);
        end_drain(b);
        give_later(b);
        td_loop_wait(&b->loop, TD_MAX(b->ticked_us + TD_BRIDGE_TICK_US - td_now_us(), 0));
    }
    leave(b);
}
