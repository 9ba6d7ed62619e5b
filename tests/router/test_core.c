/* tests/router/test_core.c - the machine, event by event: refusals, limits, timers, and each way a request
 * can end. */
// SPDX-License-Identifier: Apache-2.0
#include "router/core/core_int.h"
#include "tests/router/support_msg.h"
#include "tests/router/support_sim.h"
#include "tests/router/support_tok.h"
#include "tests/t.h"

/* ---- by hand: one step, its actions ---- */
typedef struct hand { td_core *c; td_actions a; int64_t now; uint64_t id; } hand;

static hand open_hand(td_core_opts o)
{
    hand h = {.now = 1000000};
    o.incarnation = 42;
    h.c = td_core_open(&o);
    td_actions_init(&h.a);
    return h;
}
static void close_hand(hand *h)
{
    td_actions_deinit(&h->a);
    td_core_close(h->c);
}
static void step(hand *h, td_event e) { td_core_step(h->c, h->now, &e, &h->a); }
static void tick(hand *h, int64_t us)
{
    h->now += us;
    step(h, (td_event){.type = TD_EV_TICK});
}

static const td_msg *sent(const hand *h, uint64_t to, td_msg_type type)
{
    for (uint32_t i = 0; i < h->a.n; i++)
        if (h->a.a[i].type == TD_ACT_SEND && h->a.a[i].to == to && h->a.a[i].msg.type == type)
            return &h->a.a[i].msg;
    return NULL;
}
static const td_out *emitted(const hand *h, td_out_kind k)
{
    for (uint32_t i = 0; i < h->a.n; i++)
        if (h->a.a[i].type == TD_ACT_EMIT && h->a.a[i].out->kind == k) return h->a.a[i].out;
    return NULL;
}

static td_msg hello_msg(const char *name, td_role role)
{
    td_msg m = support_hello(name, role, 100, 64, 9);
    m.hello.bulk_endpoint = "tcp://x";
    m.hello.max_seqs = 4;
    m.hello.max_batched_tokens = 64;
    m.hello.kv_tokens = 1000;
    return m;
}
static void say(hand *h, uint64_t from, const td_msg *m)
{
    step(h, (td_event){.type = TD_EV_MESSAGE, .id = from, .msg = m});
}
static void beat(hand *h, uint64_t from, td_wstate s, uint64_t n, bool busy)
{
    td_msg m = support_beat(s, n, busy);
    m.heartbeat.step_us = 1000;
    say(h, from, &m);
}
static void join(hand *h, uint64_t inc, const char *name, td_role role)
{
    td_msg m = hello_msg(name, role);
    say(h, inc, &m);
    beat(h, inc, TD_WSTATE_READY, 1, false);
}
static uint64_t submit(hand *h, uint32_t n_prompt, uint32_t max_tokens, uint32_t n)
{
    static uint32_t ids[256];
    td_job *j = td_job_new(1 << 16);
    j->id = ++h->id;
    j->prompt = ids;
    j->n_prompt = n_prompt;
    j->sampling = (td_sampling){.n = n, .max_tokens = max_tokens, .logprobs = -1, .prompt_logprobs = -1};
    step(h, (td_event){.type = TD_EV_SUBMIT, .job = j}); /* the core has it now */
    return h->id;
}
static td_msg tokens_msg(td_msg_tokens *t, uint64_t id, uint32_t attempt, uint32_t base, const uint32_t *ids,
                         uint32_t n, td_finish f)
{
    *t = (td_msg_tokens){.key = {id, attempt}, .base_index = base, .ids = ids, .n = n, .finish = f};
    return support_tokens(t, 0);
}
static void say_tokens(hand *h, uint64_t from, uint64_t id, uint32_t attempt, uint32_t base,
                       const uint32_t *ids, uint32_t n, td_finish f)
{
    td_msg_tokens t;
    td_msg m = tokens_msg(&t, id, attempt, base, ids, n, f);
    say(h, from, &m);
}
static void say_ended(hand *h, uint64_t from, uint64_t id, uint32_t attempt, td_status s, const char *why)
{
    td_msg m = support_ended((td_req_key){id, attempt}, TD_FINISH_NONE, s, why, false);
    say(h, from, &m);
}
static void say_reserved(hand *h, uint64_t from, uint64_t id, uint32_t attempt)
{
    td_msg m = support_reserved((td_req_key){id, attempt}, 77, 3, 5, "tcp://bulk");
    say(h, from, &m);
}

static const uint32_t seven[] = {70, 71, 72, 73, 74, 75, 76};

/* RESERVE, RESERVED, START with the sink, tokens of both, DONE, RELEASED. */
static void normal_life(void)
{
    hand h = open_hand((td_core_opts){0});
    join(&h, 1, "p", TD_ROLE_PREFILL);
    join(&h, 2, "d", TD_ROLE_DECODE);
    uint64_t id = submit(&h, 20, 4, 1);
    const td_msg *m = sent(&h, 2, TD_MSG_RESERVE);
    T_OK(m && !sent(&h, 1, TD_MSG_START));
    if (m) {
        T_EQ(m->reserve.work.prompt.n, 20);
        T_EQ(m->reserve.work.sampling.n_stop_ids, 1);
        T_EQ(m->reserve.work.sampling.stop_ids[0], 9); /* the worker's EOS is added */
    }
    say_reserved(&h, 2, id, 1);
    m = sent(&h, 1, TD_MSG_START);
    T_OK(m && m->start.has_sink);
    if (m) {
        T_EQ(m->start.sink.epoch, 77);
        T_EQ(m->start.sink.incarnation, 2);
        T_EQ(m->start.sink.hit_tokens, 3);
        T_EQ(m->start.sink.credits, 5);
        T_STR(m->start.sink.endpoint, "tcp://bulk");
    }
    say_reserved(&h, 2, id, 1); /* repeated: no second START */
    T_OK(!sent(&h, 1, TD_MSG_START));
    h.now += 5000;
    say_tokens(&h, 1, id, 1, 0, seven, 1, TD_FINISH_NONE);
    T_OK(emitted(&h, TD_OUT_DELTA)); /* the first token at once */
    h.now += 7000;
    say_tokens(&h, 2, id, 1, 0, seven, 3, TD_FINISH_NONE);
    const td_out *o = emitted(&h, TD_OUT_DELTA);
    T_OK(o && o->n_ids == 2 && o->offset == 1 && o->ids[0] == 71);
    say_tokens(&h, 1, id, 1, 0, seven, 1, TD_FINISH_NONE); /* repeated */
    T_OK(!emitted(&h, TD_OUT_DELTA));
    say_tokens(&h, 2, id, 1, 3, seven + 3, 1, TD_FINISH_LENGTH);
    o = emitted(&h, TD_OUT_DELTA);
    T_OK(o && o->finish == TD_FINISH_LENGTH);
    o = emitted(&h, TD_OUT_DONE);
    T_OK(o && o->usage.completion_tokens == 4 && o->usage.placements == 1);
    if (o) {
        T_NEAR(o->timings.ttft_ms, 5, 1e-9);
        T_NEAR(o->timings.second_token_ms, 7, 1e-9);
    }
    T_OK(!sent(&h, 2, TD_MSG_CANCEL));
    T_OK(!td_core_idle(h.c));
    say_ended(&h, 1, id, 1, TD_OK, "");
    say_ended(&h, 2, id, 1, TD_OK, "");
    T_OK(td_core_idle(h.c));
    close_hand(&h);
}

/* The first token is the last: nothing is shipped, the reservation is given back. */
static void first_token_ends(void)
{
    hand h = open_hand((td_core_opts){0});
    join(&h, 1, "p", TD_ROLE_PREFILL);
    join(&h, 2, "d", TD_ROLE_DECODE);
    uint64_t id = submit(&h, 20, 1, 1);
    say_reserved(&h, 2, id, 1);
    say_tokens(&h, 1, id, 1, 0, seven, 1, TD_FINISH_LENGTH);
    T_OK(emitted(&h, TD_OUT_DONE));
    T_OK(sent(&h, 2, TD_MSG_CANCEL));
    T_OK(!sent(&h, 1, TD_MSG_CANCEL));
    say_ended(&h, 1, id, 1, TD_OK, "");
    say_ended(&h, 2, id, 1, TD_OK, "");
    T_OK(td_core_idle(h.c));
    close_hand(&h);
}

static void tokens_that_differ(void)
{
    hand h = open_hand((td_core_opts){0});
    join(&h, 1, "a", TD_ROLE_MIXED);
    join(&h, 2, "b", TD_ROLE_MIXED);
    uint64_t id = submit(&h, 5, 6, 1);
    uint64_t first = sent(&h, 1, TD_MSG_START) ? 1 : 2, other = 3 - first;
    say_tokens(&h, first, id, 1, 0, seven, 3, TD_FINISH_NONE);
    static const uint32_t wrong[] = {72, 99};
    say_tokens(&h, first, id, 1, 2, wrong, 1, TD_FINISH_NONE); /* equal overlap: fine */
    T_EQ(td_core_counts_of(h.c)->mismatches, 0);
    say_tokens(&h, first, id, 1, 1, wrong, 2, TD_FINISH_NONE);
    T_OK(!emitted(&h, TD_OUT_DELTA));
    T_EQ(td_core_counts_of(h.c)->mismatches, 1);
    T_OK(sent(&h, first, TD_MSG_CANCEL));
    const td_msg *m = sent(&h, other, TD_MSG_START);
    T_OK(m && m->start.work.n_resume == 1 && m->start.work.resume[0].n == 3 &&
         m->start.work.key.attempt == 2);
    say_tokens(&h, first, id, 1, 3, seven + 3, 2, TD_FINISH_NONE); /* of the old attempt */
    T_OK(!emitted(&h, TD_OUT_DELTA));
    say_tokens(&h, other, id, 2, 4, seven + 4, 1, TD_FINISH_NONE); /* a gap */
    T_EQ(td_core_counts_of(h.c)->mismatches, 2);
    m = sent(&h, first, TD_MSG_START); /* both failed: forgiven, as there is nobody else */
    T_OK(m && m->start.work.key.attempt == 3);
    say_tokens(&h, first, id, 3, 3, seven + 3, 3, TD_FINISH_LENGTH);
    T_OK(emitted(&h, TD_OUT_DONE));
    close_hand(&h);
}

/* It died between its last token and the finish: the log knows. */
static void log_already_complete(void)
{
    hand h = open_hand((td_core_opts){0});
    join(&h, 1, "a", TD_ROLE_MIXED);
    uint64_t id = submit(&h, 5, 3, 1);
    say_tokens(&h, 1, id, 1, 0, seven, 3, TD_FINISH_NONE);
    T_OK(!emitted(&h, TD_OUT_DONE));
    step(&h, (td_event){.type = TD_EV_PEER_LOST, .id = 1});
    const td_out *o = emitted(&h, TD_OUT_DELTA);
    T_OK(o && o->finish == TD_FINISH_LENGTH && o->n_ids == 0 && o->offset == 3);
    T_OK(emitted(&h, TD_OUT_DONE));
    T_OK(td_core_idle(h.c));
    close_hand(&h);
}

static void refusals(void)
{
    hand h = open_hand((td_core_opts){.max_queue = 2});
    submit(&h, 3, 4, 1);
    submit(&h, 3, 4, 1);
    T_OK(!emitted(&h, TD_OUT_FAILED)); /* no worker yet: they wait */
    submit(&h, 3, 4, 1);
    const td_out *o = emitted(&h, TD_OUT_FAILED);
    T_OK(o && o->why == TD_WHY_QUEUE_FULL && o->retry_ms);
    join(&h, 1, "m", TD_ROLE_MIXED);
    T_OK(sent(&h, 1, TD_MSG_START));
    submit(&h, 64, 4, 1); /* context 64 */
    o = emitted(&h, TD_OUT_FAILED);
    T_OK(o && o->why == TD_WHY_TOO_LONG && strstr(o->reason, "64"), "%s", o ? o->reason : "");
    submit(&h, 60, 5, 1);
    o = emitted(&h, TD_OUT_FAILED);
    T_OK(o && o->why == TD_WHY_TOO_LONG);
    uint32_t big = 100;
    td_job *j = td_job_new(1 << 16);
    j->id = 900;
    j->prompt = &big;
    j->n_prompt = 1;
    j->sampling = (td_sampling){.n = 1, .max_tokens = 4, .logprobs = -1, .prompt_logprobs = -1};
    step(&h, (td_event){.type = TD_EV_SUBMIT, .job = j});
    o = emitted(&h, TD_OUT_FAILED);
    T_OK(o && o->why == TD_WHY_BAD && strstr(o->reason, "vocabulary"));
    step(&h, (td_event){.type = TD_EV_DRAIN});
    submit(&h, 3, 4, 1);
    o = emitted(&h, TD_OUT_FAILED);
    T_OK(o && o->why == TD_WHY_DRAINING);
    T_OK(!td_core_serves(h.c, h.now));
    close_hand(&h);
}

static void open_limits(void)
{
    hand h = open_hand((td_core_opts){0});
    join(&h, 1, "m", TD_ROLE_MIXED);
    static uint32_t ids[256];
    for (int open = 0; open < 2; open++) {
        td_job *j = td_job_new(1 << 16);
        j->id = 900 + (uint64_t)open;
        j->prompt = ids;
        j->n_prompt = 60;
        j->max_tokens_open = open;
        j->max_tokens_soft = !open;
        j->sampling =
            (td_sampling){.n = 1, .max_tokens = open ? 1 : 16, .logprobs = -1, .prompt_logprobs = -1};
        step(&h, (td_event){.type = TD_EV_SUBMIT, .job = j});
        const td_msg *m = sent(&h, 1, TD_MSG_START);
        T_OK(m && m->start.work.sampling.max_tokens == 4);
    }
    close_hand(&h);
}

static void identity(void)
{
    hand h = open_hand((td_core_opts){0});
    td_msg m = hello_msg("a", TD_ROLE_PREFILL);
    say(&h, 1, &m);
    T_OK(sent(&h, 1, TD_MSG_WELCOME));
    td_msg other = hello_msg("b", TD_ROLE_DECODE);
    other.hello.id.numerics = "avx2";
    say(&h, 2, &other);
    const td_msg *no = sent(&h, 2, TD_MSG_REFUSED);
    T_OK(no && strstr(no->refused.reason, "avx2") && strstr(no->refused.reason, "ref"), "%s",
         no ? no->refused.reason : "nothing");
    other = hello_msg("c", TD_ROLE_DECODE);
    other.hello.id.max_model_len = 32; /* may differ: the smallest binds */
    say(&h, 3, &other);
    T_OK(sent(&h, 3, TD_MSG_WELCOME));
    T_EQ(td_core_fleet(h.c)->id.max_model_len, 32);
    /* a beat of a process we do not know: the answer carries our incarnation */
    beat(&h, 55, TD_WSTATE_READY, 1, false);
    const td_msg *ack = sent(&h, 55, TD_MSG_HEARTBEAT_ACK);
    T_OK(ack && ack->sender == 42);
    close_hand(&h);
}

static void death_and_return(void)
{
    hand h = open_hand((td_core_opts){0});
    join(&h, 1, "a", TD_ROLE_MIXED);
    uint64_t id = submit(&h, 5, 6, 1);
    T_OK(sent(&h, 1, TD_MSG_START));
    tick(&h, 900000);
    T_OK(sent(&h, 1, TD_MSG_HEARTBEAT_ACK)); /* late: pinged, so that a closed connection shows */
    tick(&h, 2000000);
    T_EQ(td_core_fleet(h.c)->w[0].state, TD_WORKER_READY);
    tick(&h, 200000);
    T_EQ(td_core_fleet(h.c)->w[0].state, TD_WORKER_DEAD);
    T_OK(sent(&h, 1, TD_MSG_CANCEL)); /* in case it only sleeps */
    T_EQ(td_core_fleet(h.c)->w[0].seqs, 0);
    submit(&h, 3, 3, 1);
    const td_out *o = emitted(&h, TD_OUT_FAILED);
    T_OK(o && o->why == TD_WHY_NO_WORKER);
    beat(&h, 1, TD_WSTATE_READY, 2, false); /* it only slept */
    const td_msg *m = sent(&h, 1, TD_MSG_START);
    T_OK(m && m->start.work.key.request == id && m->start.work.key.attempt == 2);
    step(&h, (td_event){.type = TD_EV_PEER_LOST, .id = 1});
    tick(&h, 50000);
    T_OK(!emitted(&h, TD_OUT_FAILED));
    tick(&h, 3100000);
    o = emitted(&h, TD_OUT_FAILED);
    T_OK(o && o->why == TD_WHY_NO_WORKER && o->id == id);
    T_OK(td_core_idle(h.c));
    close_hand(&h);
}

static void hang(void)
{
    hand h = open_hand((td_core_opts){0});
    join(&h, 1, "a", TD_ROLE_MIXED);
    join(&h, 2, "b", TD_ROLE_MIXED);
    uint64_t id = submit(&h, 5, 6, 1);
    uint64_t first = sent(&h, 1, TD_MSG_START) ? 1 : 2, other = 3 - first;
    const td_msg *m = NULL;
    for (int i = 0; i < 60 && !m; i++) {
        h.now += 100000;
        beat(&h, first, TD_WSTATE_READY, 1, true); /* alive, busy, and not moving */
        beat(&h, other, TD_WSTATE_READY, 1, false);
        tick(&h, 0);
        m = sent(&h, other, TD_MSG_START);
    }
    T_OK(m && m->start.work.key.request == id);
    T_EQ(td_core_counts_of(h.c)->workers_hung, 1);
    T_OK(h.now - 1000000 > 5000000);
    T_EQ(td_fleet_find(td_core_fleet(h.c), first)->state, TD_WORKER_HUNG);
    beat(&h, first, TD_WSTATE_READY, 2, true);
    T_EQ(td_fleet_find(td_core_fleet(h.c), first)->state, TD_WORKER_READY);
    close_hand(&h);
}

/* A long prompt on a slow worker is not a hang. */
static void patience(void)
{
    td_fleet f;
    td_fleet_init(&f, &(td_fleet_opts){.dead_us = 3000000, .hang_us = 5000000});
    td_worker w = {.state = TD_WORKER_READY, .max_batched_tokens = 2048};
    T_EQ(td_fleet_hang_us(&f, &w), 20000000); /* nothing measured */
    w.beat.step_us = 1000;
    T_EQ(td_fleet_hang_us(&f, &w), 5000000);
    w.beat.step_us = 1000000;
    T_EQ(td_fleet_hang_us(&f, &w), 20000000);
    w.beat.step_us = 1000;
    w.beat.prefill_tok_s = 20;
    w.pending_tokens = 100000;
    T_EQ(td_fleet_hang_us(&f, &w), 3 * 102400000LL); /* a whole chunk at 20 tokens/s */
}

static void deadline_and_cancel(void)
{
    hand h = open_hand((td_core_opts){0});
    join(&h, 1, "p", TD_ROLE_PREFILL);
    join(&h, 2, "d", TD_ROLE_DECODE);
    uint64_t id = submit(&h, 5, 6, 1);
    say_reserved(&h, 2, id, 1);
    step(&h, (td_event){.type = TD_EV_CANCEL, .id = id});
    T_OK(sent(&h, 1, TD_MSG_CANCEL) && sent(&h, 2, TD_MSG_CANCEL)); /* both legs */
    const td_out *o = emitted(&h, TD_OUT_FAILED);
    T_OK(o && o->why == TD_WHY_CANCELLED);
    step(&h, (td_event){.type = TD_EV_CANCEL, .id = id});
    T_OK(!emitted(&h, TD_OUT_FAILED));
    say_tokens(&h, 1, id, 1, 0, seven, 1, TD_FINISH_NONE);
    T_OK(!emitted(&h, TD_OUT_DELTA));
    say_ended(&h, 1, id, 1, TD_OK, "");
    T_OK(!td_core_idle(h.c)); /* the other lease is open: released when it ends, or in time */
    T_EQ(td_core_fleet(h.c)->w[1].seqs, 1);
    for (int i = 0; i < 110; i++) {
        h.now += 100000;
        beat(&h, 1, TD_WSTATE_READY, 1, false);
        beat(&h, 2, TD_WSTATE_READY, 1, false);
        tick(&h, 0);
    }
    T_OK(td_core_idle(h.c));
    T_EQ(td_core_fleet(h.c)->w[1].seqs, 0);
    /* unknown to us by now: it is told to stop */
    say_tokens(&h, 2, id, 1, 0, seven, 1, TD_FINISH_NONE);
    T_OK(sent(&h, 2, TD_MSG_CANCEL));
    static uint32_t ids[8];
    td_job *j = td_job_new(1 << 16);
    j->id = 950;
    j->prompt = ids;
    j->n_prompt = 4;
    j->received_us = h.now;
    j->deadline_us = h.now + 70000;
    j->sampling = (td_sampling){.n = 1, .max_tokens = 4, .logprobs = -1, .prompt_logprobs = -1};
    step(&h, (td_event){.type = TD_EV_SUBMIT, .job = j});
    const td_msg *m = sent(&h, 2, TD_MSG_RESERVE);
    T_OK(m && m->reserve.work.remaining_ms == 70);
    tick(&h, 60000);
    T_OK(!emitted(&h, TD_OUT_FAILED));
    tick(&h, 20000);
    o = emitted(&h, TD_OUT_FAILED);
    T_OK(o && o->why == TD_WHY_DEADLINE);
    close_hand(&h);
}

static void busy_and_drain(void)
{
    hand h = open_hand((td_core_opts){0});
    join(&h, 1, "d", TD_ROLE_DECODE);
    join(&h, 2, "p", TD_ROLE_PREFILL);
    uint64_t id = submit(&h, 5, 6, 1);
    td_msg m = support_busy((td_req_key){id, 1}, 100, "full");
    say(&h, 1, &m);
    T_OK(!sent(&h, 1, TD_MSG_RESERVE)); /* held off */
    tick(&h, 90000);
    T_OK(!sent(&h, 1, TD_MSG_RESERVE));
    tick(&h, 20000);
    const td_msg *again = sent(&h, 1, TD_MSG_RESERVE);
    T_OK(again && again->reserve.work.key.attempt == 2);
    T_EQ(td_core_counts_of(h.c)->replaced[TD_REPLACE_BUSY], 1);
    /* The only prefill worker drains: a decode worker does both. */
    step(&h, (td_event){.type = TD_EV_CANCEL, .id = id});
    beat(&h, 2, TD_WSTATE_DRAINING, 1, false);
    submit(&h, 5, 6, 1);
    const td_msg *st = sent(&h, 1, TD_MSG_START);
    T_OK(st && !st->start.has_sink);
    td_msg bye = {.type = TD_MSG_GOODBYE};
    say(&h, 2, &bye);
    T_EQ(td_fleet_find(td_core_fleet(h.c), 2)->state, TD_WORKER_DEAD);
    close_hand(&h);
}

/* What runs when the router drains has drain_us; what comes is refused at once. */
static void drain_ends(void)
{
    hand h = open_hand((td_core_opts){.drain_us = 5000000});
    join(&h, 1, "d", TD_ROLE_DECODE);
    tick(&h, 2100000);
    uint64_t id = submit(&h, 5, 6, 1);
    step(&h, (td_event){.type = TD_EV_DRAIN});
    T_OK(!emitted(&h, TD_OUT_FAILED));
    submit(&h, 5, 6, 1);
    const td_out *o = emitted(&h, TD_OUT_FAILED);
    T_OK(o && o->why == TD_WHY_DRAINING && o->retry_ms == 1000);
    for (uint64_t i = 0; i < 4; i++) {
        beat(&h, 1, TD_WSTATE_READY, 2 + i, true);
        tick(&h, 1000000);
        T_OK(!emitted(&h, TD_OUT_FAILED));
    }
    step(&h, (td_event){.type = TD_EV_DRAIN}); /* again: does not begin anew */
    tick(&h, 1000001);
    o = emitted(&h, TD_OUT_FAILED);
    T_OK(o && o->why == TD_WHY_DRAINING && td_core_counts_of(h.c)->failed[TD_WHY_DRAINING] == 2 && id);
    close_hand(&h);
}

static void first_requests_wait_for_the_pair(void)
{
    hand h = open_hand((td_core_opts){0});
    submit(&h, 5, 6, 1);
    join(&h, 1, "d", TD_ROLE_DECODE);
    T_OK(!sent(&h, 1, TD_MSG_START) && !td_core_serves(h.c, h.now));
    h.now += 1000000;
    join(&h, 2, "p", TD_ROLE_PREFILL);
    T_OK(sent(&h, 1, TD_MSG_RESERVE));
    close_hand(&h);
    h = open_hand((td_core_opts){0});
    submit(&h, 5, 6, 1);
    join(&h, 1, "d", TD_ROLE_DECODE);
    for (int i = 0; i < 25; i++) {
        h.now += 100000;
        beat(&h, 1, TD_WSTATE_READY, 1, false);
        if (sent(&h, 1, TD_MSG_START)) break;
    }
    T_OK(sent(&h, 1, TD_MSG_START)); /* the other half never came */
    close_hand(&h);
}

static void worker_errors(void)
{
    hand h = open_hand((td_core_opts){.max_losses = 2});
    join(&h, 1, "a", TD_ROLE_MIXED);
    uint64_t id = submit(&h, 5, 6, 1);
    say_ended(&h, 1, id, 1, TD_EBADREQ, "token 7 is bad");
    const td_out *o = emitted(&h, TD_OUT_FAILED);
    T_OK(o && o->why == TD_WHY_BAD && !strcmp(o->reason, "token 7 is bad"));
    T_OK(td_core_idle(h.c));
    id = submit(&h, 5, 6, 1);
    for (uint32_t k = 1; k <= 3; k++) say_ended(&h, 1, id, k, TD_EDEVICE, "on fire");
    o = emitted(&h, TD_OUT_FAILED);
    T_OK(o && o->why == TD_WHY_INTERNAL && strstr(o->reason, "on fire"));
    /* hello again while it has work: what it had is lost */
    id = submit(&h, 5, 6, 1);
    join(&h, 1, "a", TD_ROLE_MIXED);
    T_EQ(td_core_counts_of(h.c)->replaced[TD_REPLACE_LOST], 1);
    /* same name, new process: the old one is gone at once */
    join(&h, 7, "a", TD_ROLE_MIXED);
    T_EQ(td_fleet_find(td_core_fleet(h.c), 1)->state, TD_WORKER_DEAD);
    T_OK(td_fleet_find(td_core_fleet(h.c), 7)->seqs == 1);
    close_hand(&h);
}

static void say_choice(hand *h, uint64_t from, uint64_t id, uint32_t attempt, uint32_t choice, uint32_t base,
                       const char *text, td_finish f)
{
    uint32_t ids[16], n = (uint32_t)strlen(text);
    for (uint32_t i = 0; i < n; i++) ids[i] = (uint8_t)text[i];
    td_msg_tokens t;
    td_msg m = tokens_msg(&t, id, attempt, base, ids, n, f);
    t.choice = choice;
    t.stop_token = n ? ids[n - 1] : 0;
    say(h, from, &m);
}

static uint64_t submit_text(hand *h, uint32_t n, const char *const *stop, uint32_t n_stop, bool include)
{
    static const uint32_t ids[4] = {1, 2, 3, 4};
    td_job *j = td_job_new(1 << 16);
    j->id = ++h->id;
    j->prompt = ids;
    j->n_prompt = 4;
    j->want_text = true;
    j->stop = stop;
    j->n_stop = n_stop;
    j->include_stop = include;
    j->sampling = (td_sampling){.n = n, .max_tokens = 20, .logprobs = -1, .prompt_logprobs = -1};
    step(h, (td_event){.type = TD_EV_SUBMIT, .job = j});
    return h->id;
}

/* One choice ends by a stop string, the other goes on, also on the next worker. */
static void stop_string_of_one_choice(void)
{
    static const char *const stop[] = {"xyz"};
    hand h = open_hand((td_core_opts){.tokenizer = support_tokenizer()});
    td_msg hello = hello_msg("a", TD_ROLE_MIXED);
    hello.hello.id.vocab = 258;
    hello.hello.eos[0] = 256;
    say(&h, 1, &hello);
    beat(&h, 1, TD_WSTATE_READY, 1, false);
    uint64_t id = submit_text(&h, 2, stop, 1, false);
    say_choice(&h, 1, id, 1, 0, 0, "abxy", TD_FINISH_NONE);
    const td_out *o = emitted(&h, TD_OUT_DELTA);
    T_OK(o && o->n_ids == 4 && o->text_len == 2); /* "xy" is held back */
    say_choice(&h, 1, id, 1, 0, 4, "zq", TD_FINISH_NONE);
    o = emitted(&h, TD_OUT_DELTA);
    T_OK(o && o->n_ids == 1 && o->text_len == 0 && o->finish == TD_FINISH_STOP &&
         o->stop_string == 0); /* what follows is not delivered */
    const td_msg *m = sent(&h, 1, TD_MSG_CANCEL_CHOICE);
    T_OK(m && m->cancel.choice == 0 && m->cancel.key.request == id);
    say_choice(&h, 1, id, 1, 0, 6, "rs", TD_FINISH_NONE); /* it had gone on: no fault */
    T_EQ(td_core_counts_of(h.c)->faults, 0);
    T_OK(!emitted(&h, TD_OUT_DELTA));
    say_choice(&h, 1, id, 1, 1, 0, "hi", TD_FINISH_NONE);
    hello.hello.name = "b";
    say(&h, 2, &hello);
    beat(&h, 2, TD_WSTATE_READY, 1, false);
    step(&h, (td_event){.type = TD_EV_PEER_LOST, .id = 1});
    m = sent(&h, 2, TD_MSG_START);
    T_OK(m && m->start.work.n_resume == 2 && m->start.work.resume[0].n == 5 &&
         m->start.work.resume[1].n == 2);
    m = sent(&h, 2, TD_MSG_CANCEL_CHOICE); /* to the worker that choice looks unfinished */
    T_OK(m && m->cancel.choice == 0 && m->cancel.key.attempt == 2);
    say_choice(&h, 2, id, 2, 1, 2, "!", TD_FINISH_STOP);
    T_OK(emitted(&h, TD_OUT_DONE));
    close_hand(&h);
}

/* The token that ends a text is not part of it, unless asked for. */
static void stop_token_text(void)
{
    for (int include = 0; include < 2; include++) {
        hand h = open_hand((td_core_opts){.tokenizer = support_tokenizer()});
        td_msg hello = hello_msg("a", TD_ROLE_MIXED);
        hello.hello.id.vocab = 258;
        say(&h, 1, &hello);
        beat(&h, 1, TD_WSTATE_READY, 1, false);
        uint64_t id = submit_text(&h, 1, NULL, 0, include);
        say_choice(&h, 1, id, 1, 0, 0, "ab.", TD_FINISH_STOP);
        const td_out *o = emitted(&h, TD_OUT_DELTA);
        T_OK(o && o->n_ids == 3 && o->stop_token == '.');
        T_STR(o ? o->text : "", include ? "ab." : "ab");
        close_hand(&h);
    }
}

/* A worker that failed a request is avoided, however cheap it is. */
static void failed_worker_is_avoided(void)
{
    hand h = open_hand((td_core_opts){0});
    join(&h, 1, "a", TD_ROLE_MIXED);
    uint64_t id = submit(&h, 5, 6, 1);
    T_OK(sent(&h, 1, TD_MSG_START));
    join(&h, 2, "b", TD_ROLE_MIXED);
    td_msg m = {.type = TD_MSG_HEARTBEAT};
    m.heartbeat = (td_msg_heartbeat){.seq = 2,
                                     .state = TD_WSTATE_READY,
                                     .step_us = 50000,
                                     .seqs_running = 3,
                                     .prefill_tok_s = 1,
                                     .waiting_tokens = 100};
    say(&h, 2, &m);
    say_ended(&h, 1, id, 1, TD_EDEVICE, "on fire");
    T_OK(sent(&h, 2, TD_MSG_START) && !sent(&h, 1, TD_MSG_START));
    close_hand(&h);
}

/* A slot that changes hands takes no cached prefixes along. */
static void slots_are_cleared(void)
{
    hand h = open_hand((td_core_opts){0});
    char name[16];
    for (uint64_t i = 1; i <= TD_INDEX_SLOTS; i++) {
        snprintf(name, sizeof name, "w%d", (int)i);
        td_msg m = hello_msg(name, TD_ROLE_MIXED);
        say(&h, i, &m);
    }
    td_msg more = hello_msg("one-more", TD_ROLE_MIXED);
    say(&h, 99, &more);
    T_OK(sent(&h, 99, TD_MSG_REFUSED));
    td_h128 block = {5, 6};
    uint32_t hits[TD_INDEX_SLOTS];
    unsigned slot = td_fleet_find(td_core_fleet(h.c), 7)->slot;
    td_index_add(h.c->index, slot, &block, 1);
    step(&h, (td_event){.type = TD_EV_PEER_LOST, .id = 7});
    say(&h, 99, &more);
    T_OK(sent(&h, 99, TD_MSG_WELCOME) && !td_fleet_find(td_core_fleet(h.c), 7));
    T_EQ(td_fleet_find(td_core_fleet(h.c), 99)->slot, slot);
    td_index_match(h.c->index, &block, 1, hits);
    T_EQ(hits[slot], 0);
    close_hand(&h);
}

/* A worker that never worked has no measured speed: it must be tried all the same. */
static void unmeasured_is_tried(void)
{
    hand h = open_hand((td_core_opts){0});
    join(&h, 1, "p", TD_ROLE_PREFILL);
    join(&h, 2, "d", TD_ROLE_DECODE);
    td_msg m = hello_msg("e", TD_ROLE_DECODE);
    say(&h, 3, &m);
    m = (td_msg){.type = TD_MSG_HEARTBEAT};
    m.heartbeat = (td_msg_heartbeat){.seq = 1, .state = TD_WSTATE_READY}; /* step_us 0 */
    say(&h, 3, &m);
    int to[4] = {0};
    for (int i = 0; i < 4; i++) {
        submit(&h, 5, 6, 1);
        for (uint64_t w = 2; w <= 3; w++) to[w] += sent(&h, w, TD_MSG_RESERVE) != NULL;
    }
    T_EQ(to[2], 2);
    T_EQ(to[3], 2);
    close_hand(&h);
}

/* A prefill worker that dies after its pages have landed disturbs nobody. */
static void prefill_dies_late(void)
{
    hand h = open_hand((td_core_opts){0});
    join(&h, 1, "p", TD_ROLE_PREFILL);
    join(&h, 2, "d", TD_ROLE_DECODE);
    uint64_t id = submit(&h, 20, 6, 1);
    say_reserved(&h, 2, id, 1);
    say_tokens(&h, 1, id, 1, 0, seven, 1, TD_FINISH_NONE);
    td_msg m = support_landed((td_req_key){id, 1}, 999, 100);
    say(&h, 2, &m);
    step(&h, (td_event){.type = TD_EV_PEER_LOST, .id = 1});
    T_OK(!sent(&h, 2, TD_MSG_CANCEL));
    say_tokens(&h, 2, id, 1, 0, seven, 6, TD_FINISH_LENGTH);
    const td_out *o = emitted(&h, TD_OUT_DONE);
    T_OK(o && o->timings.kv_bytes_shipped == 999 && o->usage.placements == 1);
    /* before: the whole attempt is lost, and the log goes along */
    join(&h, 3, "p2", TD_ROLE_PREFILL);
    id = submit(&h, 20, 6, 1);
    say_reserved(&h, 2, id, 1);
    say_tokens(&h, 3, id, 1, 0, seven, 1, TD_FINISH_NONE);
    step(&h, (td_event){.type = TD_EV_PEER_LOST, .id = 3});
    T_OK(sent(&h, 2, TD_MSG_CANCEL));
    const td_msg *st = sent(&h, 2, TD_MSG_START);
    T_OK(st && !st->start.has_sink && st->start.work.n_resume == 1 && st->start.work.resume[0].n == 1);
    close_hand(&h);
}

/* ---- with mock workers ---- */
static void kill_all_prefill(void)
{
    sim *s = sim_open(&(sim_opts){.seed = 3, .prefill = 2, .decode = 2});
    sim_run(s, 100000);
    sim_client *c[30];
    for (uint64_t i = 0; i < 30; i++) c[i] = sim_submit(s, 200, 1, 40, i);
    sim_run(s, 140000);
    sim_kill(s, 0);
    sim_kill(s, 1);
    T_OK(sim_settle(s, 30000000));
    T_EQ(sim_check(s, false), 0);
    int again = 0;
    for (int i = 0; i < 30; i++) again += c[i]->usage.placements > 1;
    T_OK(again > 0);
    T_OK(sim_worker_started(s, 2) + sim_worker_started(s, 3) > 30);
    sim_close(s);
}

static void kill_decode_midstream(void)
{
    sim *s = sim_open(&(sim_opts){.seed = 4, .prefill = 1, .decode = 2});
    sim_run(s, 100000);
    sim_client *c = sim_submit(s, 50, 2, 80, 3);
    int64_t t = 100000;
    while (c->n_got[0] < 8 && !c->terminals && t < 5000000) sim_run(s, t += 5000);
    for (int w = 1; w <= 2; w++)
        if (sim_worker_legs(s, w)) sim_kill(s, w);
    T_OK(sim_settle(s, 30000000));
    T_EQ(sim_check(s, false), 0);
    T_OK(c->usage.placements == 2, "%u placements", c->usage.placements);
    sim_close(s);
}

/* What landed tells how fast both ends are, whoever of them ended first. */
static void link_of_a_shipment(void)
{
    hand h = open_hand((td_core_opts){0});
    join(&h, 1, "p", TD_ROLE_PREFILL);
    join(&h, 2, "d", TD_ROLE_DECODE);
    uint64_t id = submit(&h, 20, 4, 1);
    say_reserved(&h, 2, id, 1);
    say_tokens(&h, 1, id, 1, 0, seven, 1, TD_FINISH_NONE);
    say_ended(&h, 1, id, 1, TD_OK, "");
    td_msg m = support_landed((td_req_key){id, 1}, 2 << 20, 1000);
    say(&h, 2, &m);
    for (uint64_t i = 1; i <= 2; i++)
        T_NEAR(td_fleet_link(td_fleet_find(td_core_fleet(h.c), i)), 1048576e3, 1);
    close_hand(&h);
}

/* The last step: who is alive is told, and nothing is started any more. */
static void leaving(void)
{
    hand h = open_hand((td_core_opts){0});
    join(&h, 1, "a", TD_ROLE_MIXED);
    join(&h, 2, "b", TD_ROLE_MIXED);
    join(&h, 3, "c", TD_ROLE_MIXED);
    step(&h, (td_event){.type = TD_EV_PEER_LOST, .id = 2});
    beat(&h, 3, TD_WSTATE_DRAINING, 1, false);
    step(&h, (td_event){.type = TD_EV_LEAVE});
    T_OK(sent(&h, 1, TD_MSG_GOODBYE) && !sent(&h, 2, TD_MSG_GOODBYE) && sent(&h, 3, TD_MSG_GOODBYE));
    T_EQ(h.a.n, 2);
    submit(&h, 5, 6, 1);
    const td_out *o = emitted(&h, TD_OUT_FAILED);
    T_OK(o && o->why == TD_WHY_DRAINING);
    td_msg bye = {.type = TD_MSG_GOODBYE};
    say(&h, 1, &bye);
    T_OK(td_fleet_anyone(td_core_fleet(h.c)));
    say(&h, 3, &bye);
    T_OK(!td_fleet_anyone(td_core_fleet(h.c)));
    close_hand(&h);
}

int main(void)
{
    normal_life();
    leaving();
    link_of_a_shipment();
    first_token_ends();
    tokens_that_differ();
    log_already_complete();
    refusals();
    open_limits();
    identity();
    death_and_return();
    hang();
    patience();
    deadline_and_cancel();
    busy_and_drain();
    drain_ends();
    first_requests_wait_for_the_pair();
    worker_errors();
    stop_string_of_one_choice();
    stop_token_text();
    failed_worker_is_avoided();
    slots_are_cleared();
    unmeasured_is_tried();
    prefill_dies_late();
    kill_all_prefill();
    kill_decode_midstream();
    support_tokenizer_close();
    return T_DONE();
}
