// SPDX-License-Identifier: Apache-2.0
#include "worker/control_thread.h"
#include "common/chan.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "common/wire/loop.h"
#include <errno.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { HWM = 10000, LINGER_MS = 500, BEAT_US = 250000, DEAD_US = 3000000, RECV_PER_TURN = 256,
       FLUSH_US = 10000, ARENA_MAX = 256 << 20 };

typedef struct queued { struct queued *next; size_t n; char bytes[]; } queued;

struct td_control_thread {
    td_control_thread_opts o;
    pthread_t thread;
    int fd;
    atomic_bool stop, drain, loaded;
    atomic_int outcome;
    td_wengine *w;
    td_ship *ship;
    const td_msg_hello *hello;
    /* the thread's own */
    td_control *c;
    td_sock *sock;
    td_loop loop;
    td_buf out;
    queued *first, **last;
    size_t queue_bytes;
    uint64_t unknown;
    bool is_loaded;
};

/* ---- how the machine acts ---- */
static void drop_queue(td_control_thread *t)
{
    for (queued *q = t->first, *next; q; q = next) {
        next = q->next;
        free(q);
    }
    t->first = NULL;
    t->last = &t->first;
    t->queue_bytes = 0;
}

static void io_connect(void *arg)
{
    td_control_thread *t = arg;
    if (t->sock) {
        td_loop_del_sock(&t->loop, t->sock);
        td_sock_close(t->sock);
        t->sock = NULL;
    }
    drop_queue(t);
    char id[32];
    int n = snprintf(id, sizeof id, "w/%016llx", (unsigned long long)t->o.incarnation);
    td_sock_opts so = {.max_message_bytes = TD_CONTROL_MESSAGE_BYTES, .hwm = HWM, .curve = t->o.curve,
                       .linger_ms = LINGER_MS};
    if (td_sock_connect_dealer(t->o.z, t->o.router, id, (size_t)n, &so, &t->sock) < 0) {
        t->sock = NULL; /* logged; the machine tries again when no word comes */
        return;
    }
    td_loop_add_sock(&t->loop, t->sock);
}

/* True when nothing waits any more. */
static bool flush(td_control_thread *t)
{
    while (t->first && t->sock) {
        queued *q = t->first;
        td_part p = {q->bytes, q->n};
        if (td_sock_send(t->sock, NULL, 0, &p, 1) != TD_OK) return false;
        t->first = q->next;
        if (!t->first) t->last = &t->first;
        t->queue_bytes -= q->n;
        free(q);
    }
    return !t->first;
}

static td_status io_send(void *arg, const td_msg *m)
{
    td_control_thread *t = arg;
    bool may_skip = m->type == TD_MSG_HEARTBEAT || m->type == TD_MSG_HELLO;
    if (!t->sock) return TD_AGAIN;
    td_buf_reset(&t->out);
    TD_TRY(td_msg_pack(m, &t->out));
    td_part p = {t->out.p, t->out.len};
    td_status s = flush(t) ? td_sock_send(t->sock, NULL, 0, &p, 1) : TD_AGAIN;
    if (s != TD_AGAIN || may_skip) return s;
    if (t->queue_bytes + p.n > TD_CONTROL_QUEUE_BYTES)
        return td_fail(TD_EFULL, "%zu bytes wait for the router", t->queue_bytes);
    queued *q = td_xalloc(sizeof *q + p.n);
    q->n = p.n;
    memcpy(q->bytes, p.p, p.n);
    *t->last = q;
    t->last = &q->next;
    t->queue_bytes += p.n;
    return TD_OK;
}

static bool io_command(void *arg, td_wcmd *c)
{
    td_control_thread *t = arg;
    return t->is_loaded && td_wengine_command(t->w, c);
}

static void io_beat(void *arg, td_msg_heartbeat *h)
{
    td_control_thread *t = arg;
    if (!t->is_loaded) return;
    td_wengine_snapshot s;
    td_ship_stats f;
    td_wengine_snapshot_get(t->w, &s);
    td_ship_stats_get(t->ship, &f);
    *h = (td_msg_heartbeat){.step = s.progress, .busy = s.busy, .waiting_tokens = s.stats.waiting_tokens,
                            .legs_waiting = s.stats.legs_waiting, .legs_running = s.stats.legs_running,
                            .seqs_running = s.stats.seqs_running, .epochs_open = f.epochs_open,
                            .n_groups = s.n_groups, .prefill_tok_s = s.stats.prefill_tok_s,
                            .decode_tok_s = s.stats.decode_tok_s, .step_us = s.stats.step_us_ewma,
                            .prompt_rows = s.stats.prompt_rows, .decode_rows = s.stats.decode_rows,
                            .preemptions = s.stats.preemptions, .hit_tokens = s.stats.hit_tokens,
                            .query_tokens = s.stats.query_tokens, .frames_sent = f.frames_sent,
                            .frames_received = f.frames_received, .bytes_sent = f.bytes_sent,
                            .frames_bad = f.frames_bad, .steps = s.stats.steps,
                            .discarded_rows = s.stats.discarded_rows};
    const td_expert_stats *x = &s.stats.experts;
    h->has_experts = x->balanced > 0;
    h->experts = (td_msg_experts){x->balanced, x->moved, x->bytes, x->measured, x->before, x->after};
    for (uint32_t g = 0; g < s.n_groups && g < TD_MSG_MAX_GROUPS; g++) {
        const td_engine_ledger_row *r = &s.stats.ledger[g];
        h->ledger[g] = (td_msg_ledger){.total = r->total, .free = r->free, .private_ = r->private_,
                                       .shared = r->shared, .cached = r->cached, .in_transit = r->in_transit,
                                       .pinned = r->pinned};
    }
}

/* ---- the loop ---- */
static void receive(td_control_thread *t)
{
    for (int i = 0; i < RECV_PER_TURN && t->sock; i++) {
        td_part part[2];
        int n;
        if (td_sock_recv(t->sock, NULL, part, &n) != TD_OK) return;
        td_arena a;
        td_arena_init(&a, ARENA_MAX);
        td_msg m;
        td_status s = td_msg_unpack(part[0].p, part[0].n, &a, &m);
        if (s == TD_OK) td_control_message(t->c, td_now_us(), &m, &a);
        else if (s == TD_AGAIN) t->unknown++;
        else TD_WARN("a message from the router was dropped: %s", td_reason());
        td_arena_deinit(&a);
    }
}

static void pass_requests(td_control_thread *t)
{
    if (!t->is_loaded && t->loaded) {
        t->is_loaded = true;
        td_control_loaded(t->c, td_now_us(), t->hello);
    }
    if (t->drain) td_control_drain(t->c, td_now_us());
}

static void *run(void *arg)
{
    td_control_thread *t = arg;
    while (!t->stop) {
        td_wake_clear(t->fd);
        pass_requests(t);
        receive(t);
        td_wbatch *b;
        while (t->is_loaded && (b = td_wengine_poll(t->w))) td_control_batch(t->c, td_now_us(), b);
        td_control_tick(t->c, td_now_us());
        bool empty = flush(t);
        td_control_outcome over = td_control_over(t->c);
        if (over != TD_CONTROL_RUNS && (int)over != t->outcome) {
            t->outcome = (int)over;
            td_wake_signal(t->o.done_fd);
        }
        int64_t due = td_control_deadline(t->c) - td_now_us();
        if (over != TD_CONTROL_RUNS) due = BEAT_US;
        if (!empty) due = TD_MIN(due, (int64_t)FLUSH_US);
        td_loop_wait(&t->loop, TD_MAX(due, (int64_t)0));
    }
    td_sock_close(t->sock);
    return NULL;
}

/* ---- main thread ---- */
td_status td_control_thread_open(const td_control_thread_opts *o, td_control_thread **out)
{
    td_control_thread *t = td_xalloc(sizeof *t);
    t->o = *o;
    t->fd = td_wake_open();
    t->last = &t->first;
    td_buf_init(&t->out, TD_CONTROL_MESSAGE_BYTES);
    td_loop_init(&t->loop);
    td_loop_add_fd(&t->loop, t->fd);
    td_control_io io = {.arg = t, .connect = io_connect, .send = io_send, .command = io_command,
                        .beat = io_beat};
    td_control_opts co = {.incarnation = o->incarnation, .router = o->router, .max_legs = o->max_legs, .beat_us = BEAT_US,
                          .dead_us = DEAD_US, .drain_us = o->drain_us};
    t->c = td_control_open(&co, io);
    if (t->fd >= 0 && !pthread_create(&t->thread, NULL, run, t)) {
        *out = t;
        return TD_OK;
    }
    td_control_close(t->c);
    free(t);
    return td_fail(TD_EIO, "control thread: %s", strerror(errno));
}

int td_control_thread_wake_fd(const td_control_thread *t)
{
    return t->fd;
}

void td_control_thread_loaded(td_control_thread *t, td_wengine *w, td_ship *ship, const td_msg_hello *hello)
{
    t->w = w;
    t->ship = ship;
    t->hello = hello;
    t->loaded = true;
    td_wake_signal(t->fd);
}

void td_control_thread_drain(td_control_thread *t)
{
    t->drain = true;
    td_wake_signal(t->fd);
}

td_control_outcome td_control_thread_over(td_control_thread *t)
{
    return (td_control_outcome)t->outcome;
}

void td_control_thread_close(td_control_thread *t)
{
    if (!t) return;
    t->stop = true;
    td_wake_signal(t->fd);
    pthread_join(t->thread, NULL);
    drop_queue(t);
    td_control_close(t->c);
    td_buf_deinit(&t->out);
    close(t->fd);
    free(t);
}
