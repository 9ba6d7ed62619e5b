/* tests/router/test_parts.c - the pure parts of the core: index, placement, request states, queue order,
 * speech. */
// SPDX-License-Identifier: Apache-2.0
#include "common/hash.h"
#include "router/core/admit.h"
#include "router/core/index.h"
#include "router/core/place.h"
#include "router/core/request.h"
#include "tests/router/support_tok.h"
#include "tests/t.h"

static td_h128 h(uint64_t x) { return (td_h128){td_mix64(x), td_mix64(x + 1000)}; }

static void index_prefix_and_lru(void)
{
    td_index *x = td_index_open(8);
    td_h128 a[6], b[6];
    uint32_t out[TD_INDEX_SLOTS];
    for (int i = 0; i < 6; i++) a[i] = h((uint64_t)i), b[i] = h(100 + (uint64_t)i);
    td_index_add(x, 3, a, 4);
    td_index_add(x, 5, a, 2);
    td_index_match(x, a, 6, out);
    T_EQ(out[3], 4);
    T_EQ(out[5], 2);
    T_EQ(out[0], 0);
    /* A gap ends a prefix. */
    td_index_add(x, 7, a + 1, 3);
    td_index_match(x, a, 6, out);
    T_EQ(out[7], 0);
    /* Eight entries: six of b push out all but two of a; the head of b is the youngest. */
    td_index_add(x, 1, b, 6);
    T_EQ(td_index_len(x), 8);
    td_index_match(x, b, 6, out);
    T_EQ(out[1], 6);
    td_index_drop(x, 1);
    td_index_match(x, b, 6, out);
    T_EQ(out[1], 0);
    T_OK(td_index_len(x) <= 2);
    td_index_close(x);
}

/* Against a dumb model: a table of (hash, slot) pairs that never evicts. */
static void index_random(void)
{
    enum { CHAINS = 40, LEN = 12, MAX = 4096 };
    td_index *x = td_index_open(MAX);
    td_h128 c[CHAINS][LEN];
    static uint32_t have[CHAINS][TD_INDEX_SLOTS];
    for (int i = 0; i < CHAINS; i++)
        for (int j = 0; j < LEN; j++) c[i][j] = h((uint64_t)(i * 64 + j));
    uint64_t r = 7;
    for (int k = 0; k < 20000; k++) {
        r = td_mix64(r);
        unsigned i = (unsigned)(r % CHAINS), slot = (unsigned)(r >> 8) % TD_INDEX_SLOTS,
                 n = (unsigned)(r >> 16) % (LEN + 1);
        if ((r >> 32) % 50 == 0) {
            td_index_drop(x, slot);
            for (int q = 0; q < CHAINS; q++) have[q][slot] = 0;
        } else if ((r >> 32) & 1) {
            td_index_add(x, slot, c[i], n);
            if (n > have[i][slot]) have[i][slot] = n;
        } else {
            uint32_t out[TD_INDEX_SLOTS];
            td_index_match(x, c[i], LEN, out);
            for (unsigned s = 0; s < TD_INDEX_SLOTS; s++)
                if (out[s] != have[i][s]) {
                    T_EQ(out[s], have[i][s]);
                    k = 20000;
                    break;
                }
        }
    }
    T_OK(1);
    td_index_close(x);
}

static td_place_worker w(td_role role, uint64_t id)
{
    return (td_place_worker){.role = role,
                             .usable = true,
                             .room_prefill = true,
                             .room_decode = true,
                             .prefill_tok_s = 10000,
                             .step_ms = 10,
                             .max_seqs = 16,
                             .id = id};
}

static td_placement place(const td_place_worker *v, int n)
{
    td_place_ask a = {.tokens = 1000,
                      .n = 1,
                      .out_tokens = 20,
                      .kv_bytes_per_token = 1000,
                      .link_bytes_per_s = 1e9,
                      .tie = 5};
    return td_place_choose(v, n, &a);
}

static void placement(void)
{
    td_place_worker v[4] = {w(TD_ROLE_PREFILL, 1), w(TD_ROLE_DECODE, 2), w(TD_ROLE_PREFILL, 3),
                            w(TD_ROLE_DECODE, 4)};
    td_placement p = place(v, 4);
    T_EQ(p.kind, TD_PLACE_PAIR);
    v[0].pending_tokens = 50000; /* a long queue: the other one */
    T_EQ(place(v, 4).prefill, 2);
    v[0].hit_tokens = 990; /* a cached prefix does not help against it */
    T_EQ(place(v, 4).prefill, 2);
    v[0].pending_tokens = 0; /* but decides between equals */
    T_EQ(place(v, 4).prefill, 0);
    v[1].seqs = 16; /* a full decode batch */
    T_EQ(place(v, 4).decode, 3);
    v[3].room_decode = false;
    T_EQ(place(v, 4).decode, 1);
    v[1].room_decode = false;
    T_EQ(place(v, 4).kind, TD_PLACE_WAIT);
    v[1].usable = v[3].usable = false; /* no decode worker: prefill workers do both */
    p = place(v, 4);
    T_EQ(p.kind, TD_PLACE_ALONE);
    T_EQ(p.decode, 0);
    v[0].usable = v[2].usable = false;
    T_EQ(place(v, 4).kind, TD_PLACE_NONE);
    v[3].usable = v[3].room_decode = true; /* no prefill worker */
    p = place(v, 4);
    T_EQ(p.kind, TD_PLACE_ALONE);
    T_EQ(p.decode, 3);
    T_EQ(p.prefill, -1);
}

/* Pages follow the compute: only what is slower than it costs, and a tenth for the last layer. */
static void transfer_hides(void)
{
    td_place_worker v[2] = {w(TD_ROLE_PREFILL, 1), w(TD_ROLE_DECODE, 2)};
    double ms[3],
        bytes[3] = {0, 50e3,
                    150e3}; /* per token, 1000 tokens at 1e9 bytes/s: 0, 50, 150 ms; computing takes 100 ms */
    for (int i = 0; i < 3; i++)
        ms[i] = td_place_choose(v, 2,
                                &(td_place_ask){.tokens = 1000,
                                                .n = 1,
                                                .out_tokens = 20,
                                                .kv_bytes_per_token = bytes[i],
                                                .link_bytes_per_s = 1e9})
                    .ms;
    T_NEAR(ms[1] - ms[0], 5, 1e-6);
    T_NEAR(ms[2] - ms[0], 50, 1e-6);
    v[1].hit_tokens = 1000; /* nothing has to travel */
    T_NEAR(td_place_choose(v, 2,
                           &(td_place_ask){.tokens = 1000,
                                           .n = 1,
                                           .out_tokens = 20,
                                           .kv_bytes_per_token = 150e3,
                                           .link_bytes_per_s = 1e9})
               .ms,
           ms[0], 1e-6);
}

/* A measured end counts in place of the assumption, the slower of two; the slow decode worker is avoided. */
static void link_is_measured(void)
{
    td_place_worker v[3] = {w(TD_ROLE_PREFILL, 1), w(TD_ROLE_DECODE, 2), w(TD_ROLE_DECODE, 3)};
    td_place_ask a = {.tokens = 1000, .n = 1, .out_tokens = 20, .link_bytes_per_s = 1e9};
    double none = td_place_choose(v, 2, &a).ms, got[3];
    a.kv_bytes_per_token = 1e6; /* 1e9 bytes: a second, of which computing hides 100 ms */
    static const double link[3][2] = {{0, 0}, {0, 2e9}, {4e9, 2e9}};
    for (int i = 0; i < 3; i++) {
        v[0].link_bytes_per_s = link[i][0];
        v[1].link_bytes_per_s = link[i][1];
        got[i] = td_place_choose(v, 2, &a).ms - none;
    }
    T_NEAR(got[0], 900, 1e-6);
    T_NEAR(got[1], 400, 1e-6);
    T_NEAR(got[2], 400, 1e-6);
    v[0].link_bytes_per_s = 4e9;
    for (int slow = 1; slow <= 2; slow++) {
        v[slow].link_bytes_per_s = 1e9;
        v[3 - slow].link_bytes_per_s = 3e9;
        T_EQ(td_place_choose(v, 3, &a).decode, 3 - slow);
    }
}

/* The best of the last eight; what is small or took no time says nothing. */
static void link_samples(void)
{
    td_worker x = {0};
    td_fleet_shipped(&x, 2 * TD_FLEET_LINK_BYTES - 2, 2, 1);
    td_fleet_shipped(&x, 1 << 20, 4, 0);
    td_fleet_shipped(&x, 1 << 20, 1, 10); /* the time runs from the arrival of the first frame: nothing came in it */
    td_fleet_shipped(&x, 1 << 20, 0, 10);
    T_NEAR(td_fleet_link(&x), 0, 0);
    td_fleet_shipped(&x, 1250000, 5, 1000);
    td_fleet_shipped(&x, 1250000, 5, 4000); /* waited for the compute */
    T_NEAR(td_fleet_link(&x), 1e9, 1);
    for (int i = 0; i < TD_FLEET_LINK_SAMPLES - 2; i++) td_fleet_shipped(&x, 1250000, 5, 5000);
    T_NEAR(td_fleet_link(&x), 1e9, 1);
    td_fleet_shipped(&x, 1250000, 5, 5000); /* the fast one is forgotten: the link has become slower */
    T_NEAR(td_fleet_link(&x), 2.5e8, 1);
}

static void placement_mixed(void)
{
    td_place_worker v[3] = {w(TD_ROLE_PREFILL, 1), w(TD_ROLE_DECODE, 2), w(TD_ROLE_MIXED, 3)};
    v[2].seqs = 8; /* a busy mixed worker would be disturbed by the prompt */
    T_EQ(place(v, 3).kind, TD_PLACE_PAIR);
    v[0].pending_tokens = 100000;
    td_placement p = place(v, 3);
    T_EQ(p.kind, TD_PLACE_ALONE);
    T_EQ(p.decode, 2);
    v[2].room_decode = false; /* the pair then, late as it is */
    T_EQ(place(v, 3).kind, TD_PLACE_PAIR);
    T_EQ(td_place_choose(v, 0, &(td_place_ask){.tokens = 1}).kind, TD_PLACE_NONE);
}

static void ties_spread(void)
{
    td_place_worker v[4] = {w(TD_ROLE_MIXED, 11), w(TD_ROLE_MIXED, 12), w(TD_ROLE_MIXED, 13),
                            w(TD_ROLE_MIXED, 14)};
    int hits[4] = {0};
    for (uint64_t i = 0; i < 400; i++) {
        td_place_ask a = {
            .tokens = 100, .n = 1, .out_tokens = 20, .link_bytes_per_s = 1e9, .tie = td_mix64(i)};
        td_placement p = td_place_choose(v, 4, &a);
        hits[p.decode]++;
        T_EQ(td_place_choose(v, 4, &a).decode, p.decode);
    }
    for (int i = 0; i < 4; i++) T_OK(hits[i] > 50, "worker %d got %d of 400", i, hits[i]);
}

static td_request *request(uint64_t id, int64_t arrived, uint32_t n)
{
    td_job *j = td_job_new(1 << 16);
    j->id = id;
    j->n_prompt = 1;
    j->received_us = arrived;
    j->sampling.n = n;
    j->sampling.max_tokens = 5;
    j->sampling.prompt_logprobs = -1;
    return td_request_new(j, arrived, NULL);
}

static void states(void)
{
    td_request *r = request(1, 10, 1);
    static const td_req_state path[] = {TD_REQ_ROUTED, TD_REQ_RESERVED, TD_REQ_PREFILLING, TD_REQ_SHIPPING,
                                        TD_REQ_LANDED, TD_REQ_DECODING, TD_REQ_DONE,       TD_REQ_RELEASED};
    for (unsigned i = 0; i < sizeof path / sizeof path[0]; i++) T_OK(td_request_go(r, path[i], 20 + i));
    T_EQ(r->state, TD_REQ_RELEASED);
    T_EQ(r->entered_us, 27);
    T_EQ(r->illegal, 0);
    td_request_free(r);
    T_OK(!td_request_legal(TD_REQ_QUEUED, TD_REQ_DECODING));
    T_OK(!td_request_legal(TD_REQ_DONE, TD_REQ_QUEUED));
    T_OK(!td_request_legal(TD_REQ_DRAINING, TD_REQ_DONE));
    T_OK(!td_request_legal(TD_REQ_RELEASED, TD_REQ_RELEASED));
    for (int s = TD_REQ_ROUTED; s <= TD_REQ_DECODING; s++) {
        T_OK(td_request_legal((td_req_state)s, TD_REQ_QUEUED));
        T_OK(td_request_legal((td_req_state)s, TD_REQ_DRAINING));
    }
    T_STR(td_request_state_name(TD_REQ_SHIPPING), "SHIPPING");
}

static void logs_and_timings(void)
{
    td_request *r = request(1, 1000, 1);
    td_choice *c = &r->choice[0];
    for (uint32_t i = 0; i < 5; i++) T_OK(td_choice_append(c, 70 + i, 5));
    T_OK(!td_choice_append(c, 1, 5));
    T_EQ(td_choice_implied(c, &r->job->sampling), TD_FINISH_LENGTH);
    uint32_t stop = 74;
    td_sampling s = {.max_tokens = 9, .stop_ids = &stop, .n_stop_ids = 1};
    T_EQ(td_choice_implied(c, &s), TD_FINISH_STOP);
    s.min_tokens = 5;
    T_EQ(td_choice_implied(c, &s), TD_FINISH_NONE);
    /* events at 11, 21, 31 ... ms, one gap of 109 ms: closed-form mean and nearest-rank p99 */
    r->placed_us = 3000;
    for (int i = 0; i < 101; i++) td_request_token_time(r, 0, 2, 11000 + i * 10000 + (i == 100 ? 99000 : 0));
    td_timings t;
    td_request_timings(r, 2000000, &t);
    T_NEAR(t.queue_ms, 2, 1e-9);
    T_NEAR(t.ttft_ms, 10, 1e-9);
    T_NEAR(t.second_token_ms, 10, 1e-9);
    T_NEAR(t.itl_ms_mean, (99 * 10 + 109) / 100.0, 1e-9);
    T_NEAR(t.itl_ms_p99, 10, 1e-9);
    T_NEAR(t.total_ms, 1999, 1e-9);
    T_NEAR(t.prefill_ms, -1, 0);
    td_request_token_time(r, 0, 1, 3000000);
    td_request_token_time(r, 0, 1, 3001000);
    td_request_timings(r, 4000000, &t);
    T_OK(t.itl_ms_p99 > 100, "two of 102 gaps are long: p99 %g", t.itl_ms_p99);
    T_EQ(r->tokens_out, 204);
    td_request_free(r);
}

static void queue_order(void)
{
    td_list q = {0};
    td_request *r[5];
    for (int i = 0; i < 5; i++) r[i] = request((uint64_t)i, 100 + i, 1);
    T_OK(td_admit_push(&q, r[0], 3) && td_admit_push(&q, r[2], 3) && td_admit_push(&q, r[4], 3));
    T_OK(!td_admit_push(&q, r[3], 3));
    td_admit_again(&q, r[1]);
    td_admit_again(&q, r[3]);
    for (int i = 0; i < 5; i++) {
        T_OK(q.first == r[i], "place %d", i);
        td_list_remove(&q, r[i]);
        td_request_free(r[i]);
    }
    T_OK(!q.n && !q.first && !q.last);
}

static void excluded(void)
{
    td_request *r = request(1, 1, 1);
    for (uint64_t i = 1; i <= TD_REQUEST_EXCLUDED + 2; i++) {
        td_request_exclude(r, i);
        td_request_exclude(r, i);
    }
    T_EQ(r->n_excluded, TD_REQUEST_EXCLUDED);
    T_OK(!td_request_excludes(r, 2) && td_request_excludes(r, 3) &&
         td_request_excludes(r, TD_REQUEST_EXCLUDED + 2));
    td_request_free(r);
}

static void speak(const char *in, const char *a, const char *b, bool include, const char *want, int want_stop)
{
    const char *stop[2] = {a, b};
    td_job *j = td_job_new(1 << 16);
    j->sampling.n = 1;
    j->stop = stop;
    j->n_stop = a ? b ? 2 : 1 : 0;
    j->include_stop = include;
    td_speech *s = td_speech_open(support_tokenizer(), j);
    td_buf out;
    td_buf_init(&out, 0);
    td_buf_str(&out, "");
    int hit = -1;
    for (const char *p = in; *p && hit < 0; p++) hit = td_speech_push(s, 0, (uint8_t)*p, &out);
    if (hit < 0) hit = td_speech_end(s, 0, &out);
    T_EQ(hit, want_stop);
    T_STR(out.p, want);
    td_buf_deinit(&out);
    td_speech_close(s);
    td_job_free(j);
}

static void speech(void)
{
    speak("hello", NULL, NULL, false, "hello", -1);
    speak("one STOP two", "STOP", NULL, false, "one ", 0);
    speak("one STOP two", "STOP", NULL, true, "one STOP", 0);
    speak("aab aac", "aac", "zz", false, "aab ", 0);
    speak("abcabd", "bd", "abcd", false, "abca", 0);
    speak("ends with ST", "STOP", NULL, false, "ends with ST", -1);
    speak("x\xc3\xa9y", "\xc3\xa9", NULL, false, "x", 0);
    speak("cut \xe2\x82", NULL, NULL, false, "cut \xef\xbf\xbd", -1);
    speak("ababab!", "abab!", NULL, false, "ab", 0);
}

int main(void)
{
    index_prefix_and_lru();
    index_random();
    placement();
    transfer_hides();
    link_is_measured();
    link_samples();
    placement_mixed();
    ties_spread();
    states();
    logs_and_timings();
    queue_order();
    excluded();
    speech();
    support_tokenizer_close();
    return T_DONE();
}
