// SPDX-License-Identifier: Apache-2.0
/* tests/ship/test_cluster.c - two whole workers and a scripted router in one process: what the client gets does not depend on how it was
 * computed, whatever is damaged or cancelled, and every page comes back. */
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "common/wire/loop.h"
#include "tests/ship/support_kv.h"
#include "tests/ship/support_worker.h"
#include "tests/t.h"
#include "worker/ship/frame.h"
#include <unistd.h>

#ifdef TD_DEBUG /* sanitizers: computing a prompt takes several times as long */
#define SHIP_TIMEOUT "ship-timeout-ms=3000"
#define DELAY_COMMIT "fault=delay-commit:7000"
#else
#define SHIP_TIMEOUT "ship-timeout-ms=1500"
#define DELAY_COMMIT "fault=delay-commit:3500"
#endif

enum { A = 101, B = 102, PATIENCE = 20000 };
static td_zctx *z;
static sw_router r;
static uint64_t next_request = 1;

typedef struct { td_msg_work w; uint32_t prompt[1500]; td_ids resume[SW_MAX_CHOICES]; } request;

static void make(request *q, uint64_t seed, uint32_t n_prompt, uint32_t n, uint32_t max_tokens, float temperature)
{
    memset(q, 0, sizeof *q);
    for (uint32_t i = 0; i < n_prompt; i++) q->prompt[i] = kv_rnd(&seed, 2000) + 10;
    q->w = (td_msg_work){.key = {next_request++, 1},
                         .prompt = {q->prompt, n_prompt},
                         .sampling = {.temperature = temperature,
                                      .top_p = 1,
                                      .repetition_penalty = 1,
                                      .seed = seed,
                                      .max_tokens = max_tokens,
                                      .ignore_eos = true,
                                      .n = n,
                                      .logprobs = -1,
                                      .prompt_logprobs = -1}};
}

static void again(request *q)
{
    q->w.key = (td_req_key){next_request++, 1};
}

static void start(uint64_t worker, const request *q, const sw_leg *decode)
{
    td_msg m = {.type = TD_MSG_START};
    m.start.work = q->w;
    if (decode) {
        const sw_peer *p = sw_peer_of(&r, decode->worker);
        m.start.has_sink = true;
        m.start.sink = (td_msg_sink){.endpoint = p->endpoint,
                                     .epoch = decode->epoch,
                                     .incarnation = decode->worker,
                                     .hit_tokens = decode->hit,
                                     .credits = decode->credits};
    }
    sw_send(&r, worker, &m);
}

static void reserve(uint64_t worker, const request *q)
{
    td_msg m = {.type = TD_MSG_RESERVE};
    m.reserve.work = q->w;
    sw_send(&r, worker, &m);
}

static void cancel(uint64_t worker, const request *q)
{
    td_msg m = {.type = TD_MSG_CANCEL};
    m.cancel.key = q->w.key;
    sw_send(&r, worker, &m);
}

typedef struct { uint64_t worker; td_req_key key; } at;
static bool is_ended(void *arg)
{
    const at *a = arg;
    return sw_leg_of(&r, a->worker, a->key)->ended;
}
static bool is_reserved(void *arg)
{
    const at *a = arg;
    const sw_leg *l = sw_leg_of(&r, a->worker, a->key);
    return l->reserved || l->ended;
}
static bool has_tokens(void *arg)
{
    const at *a = arg;
    return sw_leg_of(&r, a->worker, a->key)->token_messages > 0;
}
static bool ready(void *arg)
{
    const sw_peer *p = sw_peer_of(&r, *(uint64_t *)arg);
    return p->hello && p->state == TD_WSTATE_READY;
}
static bool wait_ready(uint64_t worker)
{
    return sw_until(&r, PATIENCE, ready, &worker);
}

/* One request on one worker; the log is copied: later requests may reuse the slot. */
static sw_log run_mixed(uint64_t worker, request *q)
{
    again(q);
    start(worker, q, NULL);
    at a = {worker, q->w.key};
    T_OK(sw_until(&r, PATIENCE, is_ended, &a), "mixed request does not end");
    const sw_leg *l = sw_leg_of(&r, worker, q->w.key);
    T_OK(l->status == TD_OK && !l->busy, "%s", l->reason);
    return *sw_log_of(&r, q->w.key.request);
}

typedef struct { sw_log log; sw_leg prefill, decode; } outcome;

static outcome run_pair(uint64_t p, uint64_t d, request *q)
{
    outcome o;
    again(q);
    reserve(d, q);
    at ad = {d, q->w.key}, ap = {p, q->w.key};
    T_OK(sw_until(&r, PATIENCE, is_reserved, &ad));
    sw_leg *l = sw_leg_of(&r, d, q->w.key);
    T_OK(l->reserved, "%s", l->reason);
    if (l->reserved) {
        start(p, q, l);
        T_OK(sw_until(&r, PATIENCE, is_ended, &ap), "prefill leg does not end");
        T_OK(sw_until(&r, PATIENCE, is_ended, &ad), "decode leg does not end");
    }
    o.log = *sw_log_of(&r, q->w.key.request);
    o.prefill = *sw_leg_of(&r, p, q->w.key);
    o.decode = *sw_leg_of(&r, d, q->w.key);
    return o;
}

static void same(const sw_log *a, const sw_log *b, uint32_t n, const char *what)
{
    T_EQ(a->gaps + b->gaps, 0);
    T_EQ(a->differences + b->differences, 0);
    for (uint32_t c = 0; c < n; c++) {
        T_OK(a->n[c] == b->n[c] && a->n[c] > 0, "%s: choice %u has %u and %u tokens", what, c, a->n[c], b->n[c]);
        T_OK(!memcmp(a->ids[c], b->ids[c], a->n[c] * 4), "%s: tokens of choice %u differ", what, c);
        T_OK(!memcmp(a->lp[c], b->lp[c], a->n[c] * 4), "%s: log probabilities of choice %u differ", what, c);
        T_OK(!memcmp(a->top[c], b->top[c], a->n[c] * sizeof a->top[c][0]),
             "%s: alternatives of choice %u differ", what, c);
        T_OK(a->finish[c] == b->finish[c] && a->finish[c] != TD_FINISH_NONE,
             "%s: choice %u ends as %d and %d", what, c, a->finish[c], b->finish[c]);
    }
}

static void both_clean(sw_worker *a, sw_worker *b, const char *what)
{
    T_OK(sw_clean(a, 3000), "%s: pages of the first worker", what);
    T_OK(sw_clean(b, 3000), "%s: pages of the second worker", what);
}

static void test_equal(sw_worker *a, sw_worker *b)
{
    static request q;
    static sw_log want;
    static outcome got;
    const struct { const char *what; uint32_t n_prompt, n, max_tokens; float temperature; int logprobs;
    } cases[] = {{"one token prompt", 1, 1, 8, 0, -1},     {"greedy", 40, 1, 20, 0, -1},
                 {"sampled", 131, 1, 20, 0.9f, -1},        {"three choices", 77, 3, 12, 0.9f, -1},
                 {"log probabilities", 50, 2, 6, 0.7f, 3}, {"long", 900, 1, 10, 0.8f, -1},
                 {"page edge", 64, 1, 5, 0.8f, 0}};
    for (size_t i = 0; i < TD_COUNT(cases); i++) {
        make(&q, i + 50, cases[i].n_prompt, cases[i].n, cases[i].max_tokens, cases[i].temperature);
        q.w.sampling.logprobs = cases[i].logprobs;
        want = run_mixed(A, &q);
        for (int back = 0; back < 2;
             back++) { /* in both directions: two page sizes; the second time with prefix hits */
            got = run_pair(back ? B : A, back ? A : B, &q);
            same(&want, &got.log, cases[i].n, cases[i].what);
            T_OK(got.prefill.handed_off && got.prefill.status == TD_OK, "%s: %s", cases[i].what, got.prefill.reason);
            T_OK(got.decode.reported && got.decode.landed, "%s: %s", cases[i].what, got.decode.report_reason);
            T_OK(got.prefill.prompt_done && got.prefill.token_messages == cases[i].n);
        }
        both_clean(a, b, cases[i].what);
    }
    /* resumed: one choice in the middle of its output; two choices at different places */
    static uint32_t head[2][8];
    make(&q, 99, 60, 1, 16, 0.9f);
    want = run_mixed(A, &q);
    memcpy(head[0], want.ids[0], 5 * 4);
    q.w.n_resume = 1, q.w.resume = q.resume, q.resume[0] = (td_ids){head[0], 5};
    again(&q);
    memcpy(sw_log_of(&r, q.w.key.request + 1)->ids[0], head[0], 5 * 4);
    sw_log_of(&r, q.w.key.request + 1)->n[0] = 5;
    got = run_pair(A, B, &q);
    same(&want, &got.log, 1, "resumed");
    T_OK(got.decode.landed, "%s", got.decode.report_reason);
    make(&q, 98, 45, 2, 10, 0.9f);
    want = run_mixed(A, &q);
    memcpy(head[0], want.ids[0], 7 * 4);
    memcpy(head[1], want.ids[1], 2 * 4);
    q.w.n_resume = 2, q.w.resume = q.resume, q.resume[0] = (td_ids){head[0], 7}, q.resume[1] = (td_ids){head[1], 2};
    sw_log *l = sw_log_of(&r, q.w.key.request + 1);
    for (int c = 0; c < 2; c++) l->n[c] = q.resume[c].n, memcpy(l->ids[c], head[c], q.resume[c].n * 4);
    next_request = q.w.key.request + 1;
    got = run_pair(A, B, &q);
    same(&want, &got.log, 2, "two resumed");
    T_OK(got.decode.landed, "%s", got.decode.report_reason);
    both_clean(a, b, "resumed");
    /* finished at the first token: nothing to decode */
    make(&q, 97, 30, 1, 1, 0);
    want = run_mixed(A, &q);
    got = run_pair(A, B, &q);
    same(&want, &got.log, 1, "one token");
    T_OK(!got.prefill.handed_off && !got.decode.landed && got.decode.finish == TD_FINISH_CANCEL);
    both_clean(a, b, "one token");
}

static void test_bad_requests(sw_worker *a, sw_worker *b)
{
    static request q;
    make(&q, 5, 20, 1, 5, 0);
    q.prompt[7] = 1u << 30;
    for (int kind = 0; kind < 2; kind++) {
        again(&q);
        if (kind) reserve(A, &q);
        else start(A, &q, NULL);
        at x = {A, q.w.key};
        T_OK(sw_until(&r, PATIENCE, is_ended, &x));
        T_OK(sw_leg_of(&r, A, q.w.key)->status == TD_EBADREQ &&
             strstr(sw_leg_of(&r, A, q.w.key)->reason, "vocabulary"));
    }
    /* cancel of what is not there; a message that is none; a start whose sink does not exist */
    make(&q, 6, 20, 1, 5, 0);
    cancel(A, &q);
    at x = {A, q.w.key};
    T_OK(sw_until(&r, PATIENCE, is_ended, &x));
    T_EQ(sw_leg_of(&r, A, q.w.key)->status, TD_EGONE);
    td_part junk = {"\xff\xff\xff", 3};
    (void)td_sock_send(r.sock, sw_peer_of(&r, A)->id, sw_peer_of(&r, A)->id_bytes, &junk, 1);
    again(&q);
    sw_leg gone = {.worker = B, .epoch = 999999, .credits = 4};
    start(A, &q, &gone);
    x.key = q.w.key;
    T_OK(sw_until(&r, PATIENCE, is_ended, &x));
    T_OK(sw_leg_of(&r, A, q.w.key)->status == TD_OK && !sw_leg_of(&r, A, q.w.key)->handed_off);
    T_STR(sw_leg_of(&r, A, q.w.key)->reason, "the epoch is not live");
    /* more than there is room for: Busy, and it goes on */
    static request many[12];
    for (int i = 0; i < 12; i++) {
        make(&many[i], (uint64_t)i, 1000, 1, 5, 0);
        reserve(B, &many[i]);
    }
    int busy = 0;
    for (int i = 0; i < 12; i++) {
        at y = {B, many[i].w.key};
        T_OK(sw_until(&r, PATIENCE, is_reserved, &y));
        busy += sw_leg_of(&r, B, many[i].w.key)->busy;
    }
    T_OK(busy > 0 && busy < 12, "%d busy", busy);
    for (int i = 0; i < 12; i++) cancel(B, &many[i]);
    for (int i = 0; i < 12; i++) {
        at y = {B, many[i].w.key};
        T_OK(sw_until(&r, PATIENCE, is_ended, &y));
    }
    both_clean(a, b, "bad requests");
}

/* The request is over before the link has room for a word: the leg ends at once, and the receiver is told when there
 * is room. */
static void test_late_abort(sw_worker *a)
{
    static request q;
    char at_sock[64];
    snprintf(at_sock, sizeof at_sock, "ipc:///tmp/td-late-%d", (int)getpid());
    make(&q, 12, 1, 1, 1, 0);
    td_msg m = {.type = TD_MSG_START};
    m.start.work = q.w;
    m.start.has_sink = true;
    m.start.sink = (td_msg_sink){.endpoint = at_sock, .epoch = 4711, .incarnation = B, .credits = 4};
    sw_send(&r, A, &m);
    at x = {A, q.w.key};
    T_OK(sw_until(&r, PATIENCE, is_ended, &x));
    T_OK(sw_clean(a, 3000), "a leg waits for its ABORT");
    td_sock *late;
    td_sock_opts o = {.max_message_bytes = 8 << 20, .hwm = 16};
    T_OK(td_sock_bind_router(z, at_sock, &o, NULL, 0, &late) == TD_OK);
    td_loop loop;
    td_loop_init(&loop);
    td_loop_add_sock(&loop, late);
    td_kvframe f = {0};
    td_part id, part[2];
    for (int64_t until = td_now_us() + PATIENCE * 1000ll; f.type != TD_KVF_ABORT && td_now_us() < until;) {
        int n;
        if (td_sock_recv(late, &id, part, &n) != TD_OK) {
            sw_pump(&r, 0); /* the router's beats go on */
            td_loop_wait(&loop, 50000);
        } else T_OK(td_frame_parse(part[0].p, part[0].n, n > 1 ? part[1].n : 0, &f) == TD_OK);
    }
    T_OK(f.type == TD_KVF_ABORT && f.epoch == 4711 && f.incarnation == B && f.index == 0);
    td_sock_close(late);
}

static void test_cancel(sw_worker *a, sw_worker *b)
{
    static request q;
    for (int state = 0; state < 8; state++) {
        make(&q, 300 + (uint64_t)state, 500, 1, 400, 0.9f);
        reserve(B, &q);
        at xb = {B, q.w.key}, xa = {A, q.w.key};
        if (state > 0) T_OK(sw_until(&r, PATIENCE, is_reserved, &xb));
        bool started = state > 1;
        if (started) start(A, &q, sw_leg_of(&r, B, q.w.key));
        if (state == 3) sw_pump(&r, 5);
        if (state == 4) sw_pump(&r, 20);
        if (state == 5) T_OK(sw_until(&r, PATIENCE, has_tokens, &xa));
        if (state >= 6) T_OK(sw_until(&r, PATIENCE, has_tokens, &xb));
        if (state == 7) sw_pump(&r, 20);
        int order = state & 1;
        for (int k = 0; k < 2; k++)
            if ((k ^ order) == 0) cancel(B, &q);
            else if (started) cancel(A, &q);
        T_OK(sw_until(&r, PATIENCE, is_ended, &xb), "state %d: decode leg", state);
        if (started) T_OK(sw_until(&r, PATIENCE, is_ended, &xa), "state %d: prefill leg", state);
        both_clean(a, b, "cancel");
    }
    /* a deadline: the legs end by themselves */
    make(&q, 310, 100, 1, 400, 0.9f);
    q.w.remaining_ms = 60;
    reserve(B, &q);
    at xb = {B, q.w.key};
    T_OK(sw_until(&r, PATIENCE, is_ended, &xb));
    T_EQ(sw_leg_of(&r, B, q.w.key)->status, TD_ETIME);
    both_clean(a, b, "deadline");
}

/* Damage on the way is seen, and computed again with the same result. */
static void test_faults(void)
{
    static request q;
    static sw_log want;
    static outcome got;
    const struct { const char *option, *why; uint32_t n_prompt;
    } faults[] = {{"fault=flip:0", "payload checksum", 100},
                  {"fault=flip:2", "payload checksum", 900},
                  {"fault=drop:1", "frames missing in time", 900},
                  {DELAY_COMMIT, "no COMMIT in time", 100}};
    for (size_t i = 0; i < TD_COUNT(faults); i++) {
        sw_worker a, b;
        const char *oa[] = {faults[i].option, NULL}, *ob[] = {SHIP_TIMEOUT, "page-size=8", "kv-pages=800", NULL};
        sw_open(&a, z, 200 + 2 * i, r.endpoint, NULL, oa);
        sw_open(&b, z, 201 + 2 * i, r.endpoint, NULL, ob);
        r.n_peers = 0;
        T_OK(wait_ready(200 + 2 * i) && wait_ready(201 + 2 * i));
        make(&q, i + 700, faults[i].n_prompt, 1, 9, 0.9f);
        want = run_mixed(201 + 2 * i, &q);
        make(&q, i + 700, faults[i].n_prompt, 1, 9, 0.9f);
        q.w.salt = "x"; /* another salt: no prefix hit, so that frames flow */
        q.w.salt_bytes = 1;
        got = run_pair(200 + 2 * i, 201 + 2 * i, &q);
        same(&want, &got.log, 1, faults[i].option);
        T_OK(!got.prefill.handed_off && got.decode.reported && !got.decode.landed);
        T_STR(got.decode.report_reason, faults[i].why);
        got = run_pair(200 + 2 * i, 201 + 2 * i, &q); /* the next one is fine */
        same(&want, &got.log, 1, faults[i].option);
        if (strncmp(faults[i].option, "fault=delay", 11)) T_OK(got.decode.landed, "%s", got.decode.report_reason);
        both_clean(&a, &b, faults[i].option);
        sw_close(&a);
        sw_close(&b);
    }
}

/* The hand-off runs beside the computation: the first frame leaves before the last layers are computed. */
static void test_overlap(void)
{
    static request q;
    char path[64], option[96];
    snprintf(path, sizeof path, "/tmp/td-ship-trace-%d", (int)getpid());
    snprintf(option, sizeof option, "trace-file=%s", path);
    unlink(path);
    sw_worker a, b;
    const char *oa[] = {option, "max-num-batched-tokens=1024", NULL};
    sw_open(&a, z, 301, r.endpoint, NULL, oa);
    sw_open(&b, z, 302, r.endpoint, NULL, NULL);
    r.n_peers = 0;
    T_OK(wait_ready(301) && wait_ready(302));
    make(&q, 1, 1000, 1, 3, 0);
    outcome o = run_pair(301, 302, &q);
    T_OK(o.decode.landed);
    T_OK(o.decode.msg_report.ship_report.frames >= 12 &&
             o.decode.msg_report.ship_report.bytes == 1000u * 512 * 6,
         "%u frames, %llu bytes, hit %u", o.decode.msg_report.ship_report.frames,
         (unsigned long long)o.decode.msg_report.ship_report.bytes, o.decode.hit);
    sw_close(&a);
    sw_close(&b);
    FILE *f = fopen(path, "r");
    long long first_frame = 0, last_layers = 0, t;
    char line[1024];
    int frames = 0;
    while (f && fgets(line, sizeof line, f)) {
        T_OK(sscanf(line, "{\"t_us\":%lld", &t) == 1);
        if (strstr(line, "\"frame_sent\"") && !frames++) first_frame = t;
        if (strstr(line, "\"layers\"")) last_layers = t;
    }
    if (f) fclose(f);
    T_OK(frames >= 12 && first_frame && first_frame < last_layers,
         "%d frames, the first %lld us before the last layer", frames, last_layers - first_frame);
    unlink(path);
}

static void test_curve_tcp(void)
{
    static request q;
    sw_router plain = r;
    td_curve key;
    td_curve_generate(&key);
    sw_router_open(&r, z, "tcp://127.0.0.1:*", 8, &key);
    sw_worker a, b;
    const char *o[] = {"bulk-bind=tcp://127.0.0.1:*", NULL};
    sw_open(&a, z, 401, r.endpoint, &key, o);
    sw_open(&b, z, 402, r.endpoint, &key, o);
    T_OK(wait_ready(401) && wait_ready(402));
    make(&q, 2, 300, 1, 5, 0.9f);
    sw_log want = run_mixed(402, &q);
    q.w.salt = "y", q.w.salt_bytes = 1;
    again(&q);
    reserve(402, &q);
    at xb = {402, q.w.key}, xa = {401, q.w.key};
    T_OK(sw_until(&r, PATIENCE, is_reserved, &xb));
    td_msg m = {.type = TD_MSG_START};
    m.start.work = q.w;
    m.start.has_sink = true;
    m.start.sink = (td_msg_sink){.endpoint = sw_peer_of(&r, 402)->endpoint,
                                 .epoch = sw_leg_of(&r, 402, q.w.key)->epoch,
                                 .incarnation = 402,
                                 .credits = sw_leg_of(&r, 402, q.w.key)->credits,
                                 .has_key = true};
    memcpy(m.start.sink.public_key, key.public_key, 32);
    sw_send(&r, 401, &m);
    T_OK(sw_until(&r, PATIENCE, is_ended, &xa) && sw_until(&r, PATIENCE, is_ended, &xb));
    T_OK(sw_leg_of(&r, 401, q.w.key)->handed_off, "%s", sw_leg_of(&r, 401, q.w.key)->reason);
    sw_log got = *sw_log_of(&r, q.w.key.request);
    same(&want, &got, 1, "curve");
    sw_close(&a);
    sw_close(&b);
    sw_router_close(&r);
    r = plain;
}

static bool said_hello_again(void *arg)
{
    return sw_peer_of(&r, *(uint64_t *)arg)->hellos >= 2;
}
static bool said_goodbye(void *arg)
{
    return sw_peer_of(&r, *(uint64_t *)arg)->goodbye;
}

static void test_link(void)
{
    static request q;
    uint64_t id = 501;
    sw_worker w;
    sw_open(&w, z, id, r.endpoint, NULL, NULL);
    r.n_peers = 0;
    T_OK(wait_ready(id));
    /* another router process at the same socket: legs of the old one are void, hello again */
    make(&q, 3, 50, 1, 1900, 0.9f);
    start(id, &q, NULL);
    at x = {id, q.w.key};
    T_OK(sw_until(&r, PATIENCE, has_tokens, &x));
    r.incarnation++;
    T_OK(sw_until(&r, PATIENCE, said_hello_again, &id));
    T_OK(sw_clean(&w, 3000));
    sw_pump(&r, 100);
    T_OK(!sw_leg_of(&r, id, q.w.key)->ended, "a leg of the old router was told to the new one");
    /* a router that falls silent: legs cancelled after 3 s, a new link, hello again */
    make(&q, 4, 50, 1, 1900, 0.9f);
    start(id, &q, NULL);
    x.key = q.w.key;
    T_OK(sw_until(&r, PATIENCE, has_tokens, &x));
    r.mute = true;
    sw_pump(&r, 300);
    T_OK(!sw_clean(&w, 0), "gave up too early");
    sw_pump(&r, 3300);
    T_OK(sw_clean(&w, 1000));
    r.mute = false;
    sw_peer_of(&r, id)->hellos = 1;
    T_OK(sw_until(&r, 8000, said_hello_again, &id));
    static sw_log l;
    make(&q, 5, 50, 1, 5, 0);
    l = run_mixed(id, &q);
    T_EQ(l.n[0], 5);
    /* drain: what runs is finished, new work is refused, goodbye */
    make(&q, 6, 50, 1, 300, 0.9f);
    start(id, &q, NULL);
    x.key = q.w.key;
    T_OK(sw_until(&r, PATIENCE, has_tokens, &x));
    td_msg d = {.type = TD_MSG_DRAIN};
    sw_send(&r, id, &d);
    static request late;
    make(&late, 7, 50, 1, 5, 0);
    start(id, &late, NULL);
    at y = {id, late.w.key};
    T_OK(sw_until(&r, PATIENCE, is_ended, &y) && sw_leg_of(&r, id, late.w.key)->busy);
    T_OK(!sw_leg_of(&r, id, q.w.key)->ended);
    T_OK(sw_until(&r, PATIENCE, is_ended, &x) && sw_log_of(&r, q.w.key.request)->n[0] == 300);
    T_OK(sw_until(&r, PATIENCE, said_goodbye, &id));
    for (int i = 0; i < 1000 && td_control_thread_over(w.control) == TD_CONTROL_RUNS; i++) usleep(1000);
    T_EQ(td_control_thread_over(w.control), TD_CONTROL_FINISHED);
    sw_close(&w);
}

int main(void)
{
    td_log_open("test", getenv("SHIP_TEST_LOG") ? TD_LOG_INFO : TD_LOG_ERROR);
    z = td_zctx_open();
    char bind[64];
    snprintf(bind, sizeof bind, "ipc:///tmp/td-router-%d", (int)getpid());
    sw_router_open(&r, z, bind, 7, NULL);
    sw_worker a, b;
    const char *oa[] = {"max-prefill-chunk=48", NULL},
               *ob[] = {"page-size=4", "kv-pages=1500", "max-prefill-chunk=33", NULL};
    sw_open(&a, z, A, r.endpoint, NULL, oa);
    sw_open(&b, z, B, r.endpoint, NULL, ob);
    T_OK(wait_ready(A) && wait_ready(B));
    test_equal(&a, &b);
    test_bad_requests(&a, &b);
    test_late_abort(&a);
    test_cancel(&a, &b);
    sw_close(&a);
    sw_close(&b);
    test_faults();
    test_overlap();
    test_curve_tcp();
    test_link();
    T_EQ(r.bad, 0);
    sw_router_close(&r);
    td_zctx_close(z);
    return T_DONE();
}
