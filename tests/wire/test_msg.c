// SPDX-License-Identifier: Apache-2.0
/* tests/wire/test_msg.c - every message survives pack and unpack; no mutation of bytes reads outside or hands out something unchecked. */
#include "common/check.h"
#include "common/rng.h"
#include "common/wire/msg.h"
#include "tests/t.h"

static uint64_t seed = 1;
static uint32_t rnd(uint32_t n)
{
    uint32_t r[4], key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    seed++;
    td_philox4x32((uint32_t[4]){7}, key, r);
    return n ? r[0] % n : r[0];
}

static const uint32_t ids[] = {1, 2, 70000, 3};
static const float lps[] = {-0.5f, -1, -2, -INFINITY};
static const td_top tops[] = {{1, -1}, {2, -2}, {3, -3}, {4, -4}, {5, -5}, {6, -6}, {7, -7}, {8, -8}};
static const td_bias bias[] = {{5, -INFINITY}, {6, 1.5f}};
static const td_ids resume[2] = {{ids, 2}, {NULL, 0}};
static const td_msg_tokens toks[2] = {
    {.key = {9, 1}, .choice = 1, .base_index = 7, .n = 4, .ids = ids, .logprobs = lps, .top = tops, .n_top = 2, .finish = TD_FINISH_STOP, .stop_token = 3},
    {.key = {10, 2}, .choice = 0, .n = 0, .finish = TD_FINISH_LENGTH}};
static const td_msg_score scores[2] = {{4, -1, 2, tops}, {5, -2, 0, NULL}};

static td_msg_work a_work(void)
{
    return (td_msg_work){.key = {77, 3}, .prompt = {ids, 4}, .resume = resume, .n_resume = 2, .remaining_ms = 500, .salt = "ab", .salt_bytes = 2,
        .sampling = {.temperature = 0.7f, .top_k = 5, .top_p = 0.9f, .min_p = 0.1f, .repetition_penalty = 1.1f, .presence_penalty = -1,
                     .frequency_penalty = 2, .seed = 1ull << 63, .max_tokens = 9, .min_tokens = 1, .ignore_eos = true, .n = 2, .logprobs = -1,
                     .prompt_logprobs = 3, .n_bias = 2, .bias = bias, .n_stop_ids = 4, .stop_ids = ids}};
}

static td_msg sample(td_msg_type t)
{
    td_msg m = {.type = t, .sender = 0xfedcba9876543210ull};
    switch (t) {
    case TD_MSG_HELLO:
        m.hello = (td_msg_hello){.name = "w0", .bulk_endpoint = "tcp://127.0.0.1:5", .build = "b", .kernels = "k",
            .role = TD_ROLE_DECODE, .page_size = 16, .max_seqs = 8,
            .max_batched_tokens = 512, .kv_tokens = 1ull << 40, .n_eos = 2, .eos = {3, 4}, .has_bulk_key = true, .bulk_public_key = {1, 2, 3},
            .id = {.model_digest = {5, 6}, .model = "m", .kv_dtype = "bf16", .numerics = "n", .layers = 24, .kv_heads = 2, .head_dim = 64, .vocab = 1000, .max_model_len = 4096}};
        break;
    case TD_MSG_WELCOME: m.welcome.heartbeat_ms = 250; m.welcome.hash_key = (td_hkey){3, 4}; break;
    case TD_MSG_REFUSED: m.refused.reason = "no"; break;
    case TD_MSG_HEARTBEAT:
        m.heartbeat = (td_msg_heartbeat){.seq = 5, .step = 6, .waiting_tokens = 7, .state = TD_WSTATE_READY, .busy = true, .legs_waiting = 1, .legs_running = 2,
            .seqs_running = 3, .epochs_open = 4, .n_groups = 2, .ledger = {{10, 1, 2, 3, 4, 0, 1}, {20, -1, 0, 0, 0, 0, 0}}, .prefill_tok_s = 1.5,
            .decode_tok_s = 2.5, .step_us = -1, .prompt_rows = 8, .steps = 17, .discarded_rows = 16, .frames_sent = 9, .frames_received = 10, .bytes_sent = 11, .frames_bad = 12,
            .has_experts = true, .experts = {13, 14, 15, 1.75, 1.5, 1.25}};
        break;
    case TD_MSG_HEARTBEAT_ACK: m.heartbeat_ack.seq = 5; break;
    case TD_MSG_START:
        m.start.work = a_work();
        m.start.has_sink = true;
        m.start.sink = (td_msg_sink){.endpoint = "ipc:///x", .epoch = 1ull << 50, .incarnation = 3, .hit_tokens = 16, .credits = 8, .has_key = true, .public_key = {9}};
        break;
    case TD_MSG_RESERVE: m.reserve.work = a_work(); break;
    case TD_MSG_RESERVED:
        m.reserved.key = (td_req_key){1, 2}; m.reserved.epoch = 3; m.reserved.hit_tokens = 4; m.reserved.credits = 5; m.reserved.endpoint = "e";
        break;
    case TD_MSG_BUSY: m.busy.key = (td_req_key){1, 2}; m.busy.retry_ms = 3; m.busy.reason = "full"; break;
    case TD_MSG_CANCEL: case TD_MSG_CANCEL_CHOICE: m.cancel.key = (td_req_key){1, 2}; m.cancel.choice = t == TD_MSG_CANCEL ? 0 : 3; break;
    case TD_MSG_TOKENS: m.tokens.step = 4; m.tokens.list = toks; m.tokens.n = 2; break;
    case TD_MSG_PROMPT_DONE:
        m.prompt_done.key = (td_req_key){1, 2}; m.prompt_done.cached_tokens = 3; m.prompt_done.queued_us = 4; m.prompt_done.prefill_us = 5;
        m.prompt_done.scores = scores; m.prompt_done.n_scores = 2;
        break;
    case TD_MSG_ENDED:
        m.ended.key = (td_req_key){1, 2}; m.ended.finish = TD_FINISH_ERROR; m.ended.status = TD_ENOSUP; m.ended.reason = "r"; m.ended.handed_off = true;
        break;
    case TD_MSG_SHIP_REPORT:
        m.ship_report.key = (td_req_key){1, 2}; m.ship_report.landed = true; m.ship_report.reason = "x"; m.ship_report.transfer_us = 3;
        m.ship_report.exposed_us = 4; m.ship_report.bytes = 5; m.ship_report.frames = 6;
        break;
    default: break;
    }
    return m;
}

static void check_work(const td_msg_work *w)
{
    T_OK(w->key.request == 77 && w->key.attempt == 3 && w->prompt.n == 4 && !memcmp(w->prompt.p, ids, sizeof ids));
    T_OK(w->n_resume == 2 && w->resume[0].n == 2 && w->resume[0].p[1] == 2 && w->resume[1].n == 0);
    T_OK(w->remaining_ms == 500 && w->salt_bytes == 2 && !memcmp(w->salt, "ab", 2));
    const td_sampling *s = &w->sampling;
    T_OK(s->temperature == 0.7f && s->top_k == 5 && s->seed == 1ull << 63 && s->logprobs == -1 && s->prompt_logprobs == 3 && s->ignore_eos);
    T_OK(s->n_bias == 2 && s->bias[0].add == -INFINITY && s->bias[1].id == 6 && s->n_stop_ids == 4 && s->stop_ids[2] == 70000);
}

/* Of every fact that differs both values are named. */
static void test_identity(const td_identity *id)
{
    static const char *const why[] = {
        "model: m against x", "kv dtype: bf16 against f32", "numerics: n against (none)", "layers: 24 against 2",
        "kv heads: 2 against 4", "head dim: 64 against 80", "vocabulary: 1000 against 999",
        "max model length: 4096 against 8",
        "model digest: 00000000000000060000000000000005 against 00000000000000060000000000000007"};
    td_identity o[TD_COUNT(why)];
    char got[128];
    for (size_t i = 0; i < TD_COUNT(why); i++) o[i] = *id;
    o[0].model = "x", o[1].kv_dtype = "f32", o[2].numerics = "", o[3].layers = 2, o[4].kv_heads = 4;
    o[5].head_dim = 80, o[6].vocab = 999, o[7].max_model_len = 8, o[8].model_digest.lo = 7;
    for (size_t i = 0; i < TD_COUNT(why); i++) {
        T_OK(!td_identity_same(id, &o[i], got, sizeof got));
        T_STR(got, why[i]);
    }
}

/* Packing what was unpacked must give the same bytes: every field went through. */
static void test_round_trip(void)
{
    for (int t = TD_MSG_HELLO; t <= TD_MSG_SHIP_REPORT; t++) {
        td_msg m = sample((td_msg_type)t), r = {0};
        td_buf a, b;
        td_buf_init(&a, 0);
        td_buf_init(&b, 0);
        td_arena arena;
        td_arena_init(&arena, 1 << 20);
        T_EQ(td_msg_pack(&m, &a), TD_OK);
        T_EQ(td_msg_unpack(a.p, a.len, &arena, &r), TD_OK);
        T_EQ(r.type, t);
        T_OK(r.sender == m.sender);
        T_EQ(td_msg_pack(&r, &b), TD_OK);
        T_OK(a.len == b.len && !memcmp(a.p, b.p, a.len), "%s", td_msg_name(m.type));
        if (t == TD_MSG_START) check_work(&r.start.work);
        if (t == TD_MSG_RESERVE) check_work(&r.reserve.work);
        if (t == TD_MSG_TOKENS) {
            T_OK(r.tokens.n == 2 && r.tokens.list[0].n_top == 2 && r.tokens.list[0].top[7].id == 8 && r.tokens.list[0].logprobs[3] == -INFINITY);
            T_OK(r.tokens.list[0].stop_token == 3 && !r.tokens.list[1].logprobs && r.tokens.list[1].finish == TD_FINISH_LENGTH);
        }
        if (t == TD_MSG_HEARTBEAT) T_OK(r.heartbeat.ledger[1].free == -1 && r.heartbeat.step_us == -1 && r.heartbeat.frames_bad == 12 && r.heartbeat.discarded_rows == 16 && r.heartbeat.steps == 17);
        const td_msg_experts *x = &r.heartbeat.experts;
        if (t == TD_MSG_HEARTBEAT) T_OK(r.heartbeat.has_experts && x->balanced == 13 && x->moved == 14 && x->bytes == 15 && x->counted == 1.75 && x->before == 1.5 && x->after == 1.25);
        if (t == TD_MSG_HELLO) {
            char why[128];
            T_OK(td_identity_same(&r.hello.id, &m.hello.id, why, sizeof why));
            T_STR(r.hello.kernels, "k");
            test_identity(&r.hello.id);
        }
        td_arena_deinit(&arena);
        td_buf_deinit(&a);
        td_buf_deinit(&b);
    }
}

static td_status repack(const td_msg *m)
{
    td_buf a;
    td_buf_init(&a, 0);
    td_arena arena;
    td_arena_init(&arena, 4 << 20);
    td_msg r;
    td_status s = td_msg_pack(m, &a);
    if (s == TD_OK) s = td_msg_unpack(a.p, a.len, &arena, &r);
    td_arena_deinit(&arena);
    td_buf_deinit(&a);
    return s;
}

static void test_refusals(void)
{
    td_msg m = sample(TD_MSG_START);
    m.start.work.sampling.n = 0;
    T_EQ(repack(&m), TD_EPROTO);
    m.start.work.sampling.n = TD_MAX_CHOICES + 1;
    T_EQ(repack(&m), TD_EPROTO);
    m.start.work.sampling.n = 1; /* two resume lists */
    T_EQ(repack(&m), TD_EPROTO);
    m = sample(TD_MSG_START);
    m.start.work.sampling.temperature = NAN;
    T_EQ(repack(&m), TD_EPROTO);
    m = sample(TD_MSG_START);
    m.start.work.sampling.logprobs = 21;
    T_EQ(repack(&m), TD_EPROTO);
    m = sample(TD_MSG_START);
    m.start.work.prompt.n = 0;
    T_EQ(repack(&m), TD_EPROTO);
    m = sample(TD_MSG_START);
    m.start.work.sampling.max_tokens = 0;
    T_EQ(repack(&m), TD_EPROTO);
    m = sample(TD_MSG_START);
    m.start.sink.endpoint = "";
    T_EQ(repack(&m), TD_EPROTO);
    m = sample(TD_MSG_ENDED);
    m.ended.status = (td_status)-9;
    T_EQ(repack(&m), TD_EPROTO);
    m = sample(TD_MSG_HELLO);
    m.hello.role = TD_ROLE_NONE;
    T_EQ(repack(&m), TD_EPROTO);
    m = sample(TD_MSG_HELLO);
    m.hello.id.layers = 0;
    T_EQ(repack(&m), TD_EPROTO);
    /* limits of the buffer and of the arena */
    m = sample(TD_MSG_HELLO);
    td_buf tiny;
    td_buf_init(&tiny, 16);
    T_EQ(td_msg_pack(&m, &tiny), TD_EFULL);
    td_buf_deinit(&tiny);
    td_buf a;
    td_buf_init(&a, 0);
    T_EQ(td_msg_pack(&m, &a), TD_OK);
    td_arena arena;
    td_arena_init(&arena, 200);
    td_msg r = {.type = TD_MSG_NONE};
    T_OK(td_msg_unpack(a.p, a.len, &arena, &r) < 0);
    T_EQ(r.type, TD_MSG_NONE);
    td_arena_deinit(&arena);
    td_buf_deinit(&a);
    /* version, an unknown body, nothing */
    td_arena_init(&arena, 4096);
    T_EQ(td_msg_unpack("\x08\x02", 2, &arena, &r), TD_EPROTO);
    T_EQ(td_msg_unpack("\x08\x01\xa2\x06\x00", 5, &arena, &r), TD_AGAIN); /* field 100 */
    T_EQ(td_msg_unpack("\x08\x01", 2, &arena, &r), TD_AGAIN);
    T_EQ(td_msg_unpack("", 0, &arena, &r), TD_EPROTO);
    td_arena_deinit(&arena);
}

/* Touch everything that was handed out, so that ASan sees a bad pointer or length. */
static uint64_t touch(const td_msg *m)
{
    td_buf b;
    td_buf_init(&b, 0);
    (void)td_msg_pack(m, &b);
    uint64_t sum = b.len;
    td_buf_deinit(&b);
    return sum;
}

static void test_fuzz(int rounds)
{
    uint64_t sum = 0;
    int accepted = 0;
    for (int i = 0; i < rounds; i++) {
        td_msg m = sample((td_msg_type)(1 + rnd(TD_MSG_SHIP_REPORT)));
        td_buf a;
        td_buf_init(&a, 0);
        (void)td_msg_pack(&m, &a);
        size_t n = a.len;
        uint8_t *p = malloc(n + 64); /* exact end is checked by ASan: shrink below */
        memcpy(p, a.p, n);
        for (uint32_t k = 1 + rnd(6); k-- && n;) {
            uint32_t at = rnd((uint32_t)n), what = rnd(5);
            if (what == 0) p[at] ^= (uint8_t)(1u << rnd(8));
            else if (what == 1) p[at] = (uint8_t)rnd(256);
            else if (what == 2) p[at] = 0xff;
            else if (what == 3) n = at;
            else if (n < a.len + 60) {
                memmove(p + at + 1, p + at, n - at);
                n++;
            }
        }
        uint8_t *exact = malloc(n ? n : 1);
        memcpy(exact, p, n);
        td_arena arena;
        td_arena_init(&arena, 1 << 20);
        td_msg r;
        if (td_msg_unpack(exact, n, &arena, &r) == TD_OK) {
            accepted++;
            sum += touch(&r);
        }
        td_arena_deinit(&arena);
        free(exact);
        free(p);
        td_buf_deinit(&a);
    }
    T_OK(sum > 0 && accepted > rounds / 50, "accepted %d", accepted);
}

int main(int argc, char **argv)
{
    test_round_trip();
    test_refusals();
    test_fuzz(argc > 1 ? atoi(argv[1]) : 100000);
    return T_DONE();
}
