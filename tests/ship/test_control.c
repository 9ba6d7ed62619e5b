// SPDX-License-Identifier: Apache-2.0
/* tests/ship/test_control.c - the control machine alone, with recorded actions and a clock of its own. */
#include "common/check.h"
#include "common/log.h"
#include "tests/t.h"
#include "worker/control.h"
#include <unistd.h>

typedef struct {
    td_msg_type type;
    td_req_key key;
    td_wstate state;
    td_status status;
    uint32_t n;
    td_req_key keys[8];
    uint32_t retry_ms;
} sent;
static struct {
    sent s[256];
    unsigned n_sent, connects, n_cmd;
    td_wcmd *cmd[64];
    bool full, again;
    td_status broken;
} w;
static td_control *c;
static int64_t now;
static td_msg_hello hello = {
    .name = "w", .role = TD_ROLE_MIXED, .bulk_endpoint = "ipc:///x", .page_size = 16, .max_seqs = 4};

static void io_connect(void *a) { (void)a; w.connects++; }
static td_status io_send(void *a, const td_msg *m)
{
    (void)a;
    if (w.broken < 0) return w.broken;
    if (w.again && (m->type == TD_MSG_HELLO || m->type == TD_MSG_HEARTBEAT)) return TD_AGAIN;
    TD_CHECK(w.n_sent < TD_COUNT(w.s) && m->sender == 42);
    sent *s = &w.s[w.n_sent++];
    *s = (sent){.type = m->type};
    if (m->type == TD_MSG_HEARTBEAT) s->state = m->heartbeat.state;
    if (m->type == TD_MSG_BUSY) s->key = m->busy.key, s->retry_ms = m->busy.retry_ms;
    if (m->type == TD_MSG_ENDED) s->key = m->ended.key, s->status = m->ended.status;
    if (m->type == TD_MSG_RESERVED) s->key = m->reserved.key;
    if (m->type == TD_MSG_TOKENS)
        for (s->n = 0; s->n < m->tokens.n && s->n < 8; s->n++) s->keys[s->n] = m->tokens.list[s->n].key;
    return TD_OK;
}
static bool io_command(void *a, td_wcmd *x)
{
    (void)a;
    if (w.full) return false;
    TD_CHECK(w.n_cmd < TD_COUNT(w.cmd));
    w.cmd[w.n_cmd++] = x;
    return true;
}
static void io_beat(void *a, td_msg_heartbeat *h) { (void)a; *h = (td_msg_heartbeat){0}; }

static void clear(void)
{
    for (unsigned i = 0; i < w.n_cmd; i++) td_wcmd_free(w.cmd[i]);
    w.n_cmd = w.n_sent = 0;
}
static int count(td_msg_type t)
{
    int n = 0;
    for (unsigned i = 0; i < w.n_sent; i++) n += w.s[i].type == t;
    return n;
}
static sent *last(td_msg_type t)
{
    for (unsigned i = w.n_sent; i--;)
        if (w.s[i].type == t) return &w.s[i];
    static sent none;
    return &none;
}
static void say(uint64_t router, td_msg m)
{
    td_arena a;
    td_arena_init(&a, 1 << 16);
    (void)td_arena_alloc(&a, 8);
    m.sender = router;
    td_control_message(c, now, &m, &a);
    td_arena_deinit(&a);
}
static void start(uint64_t router, uint64_t request, uint32_t attempt)
{
    td_msg m = {.type = TD_MSG_START};
    m.start.work = (td_msg_work){.key = {request, attempt}, .remaining_ms = 100, .sampling = {.n = 1}};
    say(router, m);
}
static void cancel(uint64_t router, uint64_t request, uint32_t attempt)
{
    td_msg m = {.type = TD_MSG_CANCEL};
    m.cancel.key = (td_req_key){request, attempt};
    say(router, m);
}
static void ended(uint64_t leg)
{
    td_wbatch *b = td_wbatch_new();
    td_wbatch_event(b, leg, TD_MSG_ENDED)->ended.reason = "";
    td_control_batch(c, now, b);
}
static void open_machine(void)
{
    clear();
    w.connects = 0, w.full = w.again = false, w.broken = TD_OK;
    now = 1000000;
    c = td_control_open(
        &(td_control_opts){.incarnation = 42,
                           .router = "ipc:///nowhere",
                           .max_legs = 3,
                           .beat_us = 250000,
                           .dead_us = 3000000,
                           .drain_us = 10000000},
        (td_control_io){.connect = io_connect, .send = io_send, .command = io_command, .beat = io_beat});
}
static void join(uint64_t router)
{
    td_control_tick(c, now);
    td_control_loaded(c, now, &hello);
    say(router, (td_msg){.type = TD_MSG_WELCOME, .welcome = {.heartbeat_ms = 250}});
    td_control_tick(c, now);
    clear();
}
static void acked_until(uint64_t router, int64_t t)
{
    for (; now < t; now += 100000) {
        say(router, (td_msg){.type = TD_MSG_HEARTBEAT_ACK});
        td_control_tick(c, now);
    }
}

static void test_join(void)
{
    open_machine();
    td_control_tick(c, now);
    T_OK(w.connects == 1 && count(TD_MSG_HEARTBEAT) == 1 &&
         last(TD_MSG_HEARTBEAT)->state == TD_WSTATE_LOADING && !count(TD_MSG_HELLO));
    now += 250000;
    td_control_tick(c, now);
    T_EQ(count(TD_MSG_HEARTBEAT), 2);
    start(7, 1, 1); /* nobody can know us yet */
    T_OK(!w.n_cmd && !count(TD_MSG_BUSY));
    w.again = true; /* not connected yet */
    td_control_loaded(c, now, &hello);
    T_EQ(count(TD_MSG_HELLO), 0);
    T_OK(td_control_deadline(c) <= now + 10000);
    w.again = false;
    now += 10000;
    td_control_tick(c, now);
    T_OK(count(TD_MSG_HELLO) == 1 && last(TD_MSG_HEARTBEAT)->state == TD_WSTATE_READY);
    now += 500000;
    td_control_tick(c, now);
    T_EQ(count(TD_MSG_HELLO), 2); /* no Welcome came */
    say(7, (td_msg){.type = TD_MSG_WELCOME, .welcome = {.heartbeat_ms = 50}});
    clear();
    now += 50000;
    td_control_tick(c, now);
    T_EQ(count(TD_MSG_HEARTBEAT), 1);
    td_control_close(c);
    open_machine();
    td_control_tick(c, now);
    td_control_loaded(c, now, &hello);
    say(7, (td_msg){.type = TD_MSG_REFUSED, .refused = {"another model"}});
    T_EQ(td_control_over(c), TD_CONTROL_REFUSED);
    td_control_close(c);
}

static void test_legs(void)
{
    open_machine();
    join(7);
    start(7, 1, 1);
    start(7, 1, 2);
    start(7, 1, 2); /* again: ignored */
    T_OK(w.n_cmd == 2 && w.cmd[0]->leg == 1 && w.cmd[1]->leg == 2 && w.cmd[0]->deadline_us == now + 100000 &&
         w.cmd[0]->arena.chunk);
    w.full = true;
    start(7, 3, 1);
    T_OK(count(TD_MSG_BUSY) == 1 && last(TD_MSG_BUSY)->key.request == 3 && td_control_legs(c) == 2);
    w.full = false;
    td_msg m = {.type = TD_MSG_RESERVE};
    m.reserve.work = (td_msg_work){.key = {4, 1}, .sampling = {.n = 1}};
    say(7, m);
    T_OK(w.n_cmd == 3 && w.cmd[2]->type == TD_WCMD_RESERVE && w.cmd[2]->leg == 4);
    start(7, 5, 1);
    T_OK(count(TD_MSG_BUSY) == 2 && td_control_legs(c) == 3);
    /* one turn: one TokenBatch with the router's keys, Ended behind it */
    td_wbatch *b = td_wbatch_new();
    td_wbatch_event(b, 1, TD_MSG_ENDED)->ended.reason = "";
    td_wbatch_event(b, 4, TD_MSG_RESERVED)->reserved.endpoint = "";
    td_wbatch_tokens(b)->key.request = 1;
    td_wbatch_tokens(b)->key.request = 999; /* unknown */
    td_wbatch_tokens(b)->key.request = 2;
    clear();
    td_control_batch(c, now, b);
    T_OK(w.n_sent == 3 && w.s[0].type == TD_MSG_RESERVED && w.s[1].type == TD_MSG_TOKENS &&
         w.s[2].type == TD_MSG_ENDED);
    T_OK(w.s[1].n == 2 && w.s[1].keys[0].attempt == 1 && w.s[1].keys[1].attempt == 2 && w.s[0].key.request == 4);
    T_EQ(td_control_legs(c), 2);
    T_OK(td_control_deadline(c) <= now + 20000); /* a beat with the new ledger */
    ended(1);
    T_EQ(count(TD_MSG_ENDED), 1);
    clear();
    cancel(7, 1, 1); /* it is gone */
    T_OK(count(TD_MSG_ENDED) == 1 && last(TD_MSG_ENDED)->status == TD_EGONE && !w.n_cmd);
    cancel(7, 1, 2);
    T_OK(w.n_cmd == 1 && w.cmd[0]->type == TD_WCMD_CANCEL && w.cmd[0]->leg == 2);
    cancel(8, 1, 2); /* of another router process: the link starts over */
    T_OK(td_control_legs(c) == 2 && count(TD_MSG_HELLO) == 1);
    td_control_close(c);
}

static void test_loss(void)
{
    open_machine();
    join(7);
    start(7, 1, 1);
    clear();
    acked_until(7, now + 5000000);
    T_OK(!w.n_cmd && w.connects == 1);
    clear();
    int64_t heard = now - 100000;
    now = heard + 2999999;
    td_control_tick(c, now);
    T_EQ(w.n_cmd, 0);
    now++;
    td_control_tick(c, now);
    T_OK(w.n_cmd == 1 && w.cmd[0]->type == TD_WCMD_CANCEL && w.cmd[0]->leg == 1 && td_control_legs(c) == 1);
    clear();
    ended(1); /* of a router that is gone: forgotten, not told */
    T_OK(w.n_sent == 0 && td_control_legs(c) == 0);
    int64_t pause = td_control_deadline(c) - now;
    now += pause;
    td_control_tick(c, now);
    T_OK(w.connects == 2 && count(TD_MSG_HELLO) == 1);
    now += 3000000;
    td_control_tick(c, now);
    T_EQ(td_control_deadline(c) - now, 2 * pause);
    now += 2 * pause;
    clear();
    td_control_tick(c, now);
    say(9, (td_msg){.type = TD_MSG_WELCOME, .welcome = {.heartbeat_ms = 250}});
    start(9, 1, 1); /* the same key of another incarnation is another leg */
    T_OK(w.n_cmd == 1 && w.cmd[0]->leg == 2);
    /* a router restart that only shows in the answer to a beat */
    clear();
    say(10, (td_msg){.type = TD_MSG_HEARTBEAT_ACK});
    T_OK(w.n_cmd == 1 && w.cmd[0]->type == TD_WCMD_CANCEL && count(TD_MSG_HELLO) == 1);
    say(10, (td_msg){.type = TD_MSG_WELCOME, .welcome = {.heartbeat_ms = 250}});
    clear();
    ended(2);
    T_EQ(count(TD_MSG_ENDED), 0);
    /* a link that does not take what must arrive */
    start(10, 5, 1);
    clear();
    w.broken = TD_EFULL;
    td_wbatch *b = td_wbatch_new();
    td_wbatch_tokens(b)->key.request = 3;
    td_control_batch(c, now, b);
    T_OK(w.n_cmd == 1 && w.cmd[0]->leg == 3);
    td_control_close(c);
}

/* The same router after a silence: it has placed again what we had, so nothing of it may be told. */
static void test_same_router(void)
{
    open_machine();
    join(7);
    start(7, 1, 1);
    now += 3000000;
    td_control_tick(c, now);
    now = td_control_deadline(c);
    td_control_tick(c, now);
    say(7, (td_msg){.type = TD_MSG_WELCOME, .welcome = {.heartbeat_ms = 250}});
    clear();
    start(7, 1, 1);
    T_OK(w.n_cmd == 1 && w.cmd[0]->leg == 2 && td_control_legs(c) == 2);
    ended(1);
    T_OK(!count(TD_MSG_ENDED) && td_control_legs(c) == 1);
    ended(2);
    T_EQ(count(TD_MSG_ENDED), 1);
    td_control_close(c);
}

static void test_drain(void)
{
    open_machine();
    join(7);
    start(7, 1, 1);
    clear();
    td_control_drain(c, now);
    T_OK(last(TD_MSG_HEARTBEAT)->state == TD_WSTATE_DRAINING && td_control_over(c) == TD_CONTROL_RUNS);
    start(7, 2, 1);
    T_OK(count(TD_MSG_BUSY) == 1 && !w.n_cmd);
    ended(1);
    td_control_tick(c, now);
    T_OK(count(TD_MSG_ENDED) == 1 && count(TD_MSG_GOODBYE) == 1 && td_control_over(c) == TD_CONTROL_FINISHED);
    td_control_close(c);
    /* legs that do not end are handed back, then it goes anyway */
    open_machine();
    join(7);
    start(7, 1, 1);
    clear();
    td_control_drain(c, now);
    acked_until(7, now + 9900000);
    T_EQ(w.n_cmd, 0);
    acked_until(7, now + 300000);
    T_OK(w.n_cmd == 1 && w.cmd[0]->type == TD_WCMD_CANCEL && td_control_over(c) == TD_CONTROL_RUNS);
    acked_until(7, now + 2100000);
    T_EQ(td_control_over(c), TD_CONTROL_FINISHED);
    td_control_close(c);
}

/* A router that leaves in order: no loss, a new connection at once, what it had started is cancelled. */
static void test_goodbye(void)
{
    open_machine();
    join(7);
    start(7, 1, 1);
    clear();
    unsigned before = w.connects;
    say(7, (td_msg){.type = TD_MSG_GOODBYE});
    T_OK(w.n_cmd == 1 && w.cmd[0]->type == TD_WCMD_CANCEL && count(TD_MSG_GOODBYE) == 1);
    T_OK(td_control_deadline(c) <= now + 100000);
    now = td_control_deadline(c);
    td_control_tick(c, now);
    T_OK(w.connects == before + 1 && count(TD_MSG_HELLO) == 1 && td_control_over(c) == TD_CONTROL_RUNS);
    ended(1);
    T_OK(!count(TD_MSG_ENDED) && !td_control_legs(c));
    td_control_close(c);
}

/* What a machine without a router logs from now to now + us. */
static const char *logged(int64_t us)
{
    static char text[1 << 14];
    char path[] = "/tmp/td-control-XXXXXX";
    int old = dup(2), f = mkstemp(path);
    TD_CHECK(old >= 0 && f >= 0 && dup2(f, 2) == 2);
    for (int64_t end = now + us; now < end; now = TD_MAX(now + 1000, TD_MIN(td_control_deadline(c), end))) {
        td_control_tick(c, now);
        clear();
    }
    ssize_t n = pread(f, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = 0;
    TD_CHECK(dup2(old, 2) == 2);
    close(old), close(f), unlink(path);
    return text;
}

static int times(const char *text, const char *what)
{
    int n = 0;
    for (const char *p = text; (p = strstr(p, what)); p++) n++;
    return n;
}

/* Nobody there: said when the first connection is given up, and ever more rarely; a Welcome ends it. */
static void test_silence(void)
{
    const char *line = "no router answers at ipc:///nowhere (try ", *text;
    td_log_open("test", TD_LOG_WARN);
    open_machine();
    td_control_loaded(c, now, &hello);
    T_STR(logged(2900000), "");
    text = logged(200000);
    T_OK(times(text, line) == 1 && strstr(text, "(try 1)"), "%s", text);
    text = logged(600000000); /* about 80 tries of 8 s */
    T_OK(times(text, line) == 6 && strstr(text, "(try 2)") && strstr(text, "(try 64)"), "%s", text);
    say(7, (td_msg){.type = TD_MSG_WELCOME, .welcome = {.heartbeat_ms = 250}});
    text = logged(3100000); /* lost again: at first it is only that */
    T_OK(!times(text, line) && times(text, "router lost") == 1, "%s", text);
    text = logged(3500000);
    T_OK(times(text, line) == 1 && strstr(text, "(try 1)"), "%s", text);
    td_control_close(c);
    td_log_open("test", TD_LOG_ERROR - 1);
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR - 1);
    test_silence();
    test_join();
    test_legs();
    test_loss();
    test_goodbye();
    test_same_router();
    test_drain();
    clear();
    return T_DONE();
}
