/* tests/router/test_api.c - the router program itself, over real sockets, with a mock worker in this process.
 *
 * The worker's tokens are sim_token(): what every answer must be is known. Needs bin/tandem-router beside
 * this test (or TANDEM_ROUTER). */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "common/clock.h"
#include "tests/router/support_api.h"
#include "tests/router/support_tok.h"
#include "tests/t.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <sys/socket.h>
#include <unistd.h>

/* What the model must answer to this text. */
static uint32_t expect(const char *prompt, uint64_t seed, uint32_t choice, uint32_t max, const char *stop,
                       uint32_t *ids, char **text)
{
    sim_client c = {
        .n_prompt = (uint32_t)strlen(prompt), .seed = seed, .max_tokens = max, .n_stop = stop != NULL};
    uint32_t p[512];
    for (uint32_t i = 0; i < c.n_prompt; i++) p[i] = (uint8_t)prompt[i];
    c.prompt = p;
    c.stop[0] = (char *)(uintptr_t)stop;
    size_t n;
    td_finish f;
    uint32_t k = sim_expect(&c, support_tokenizer(), choice, ids, text, &n, &f);
    (*text)[n] = 0;
    return k;
}

static bool ids_are(const td_json *v, const uint32_t *ids, uint32_t n)
{
    if (!v || v->type != TD_JSON_ARR || v->n != n) return false;
    uint32_t i = 0;
    for (const td_json *e = v->child; e; e = e->next)
        if (e->i != ids[i++]) return false;
    return true;
}

/* ---- cases ---- */
static void before_workers(api_router *r)
{
    api_reply a = api_get("/readyz");
    T_EQ(a.status, 503);
    api_done(&a);
    a = api_get("/livez");
    T_EQ(a.status, 200);
    api_done(&a);
    (void)r;
}

static void completion(api_mock *m)
{
    uint32_t ids[300];
    char *text;
    uint32_t n = expect("hello", 7, 0, 12, NULL, ids, &text);
    api_reply a = api_send_json("/v1/completions", "{\"model\": \"toy\", \"prompt\": \"hello\", \"seed\": 7, "
                                                   "\"max_tokens\": 12, \"return_token_ids\": true}");
    T_EQ(a.status, 200);
    T_STR(api_str_at(a.json, "choices.0.text"), text);
    T_OK(ids_are(api_at(a.json, "choices.0.token_ids"), ids, n));
    T_EQ(api_int_at(a.json, "usage.prompt_tokens"), 5);
    T_EQ(api_int_at(a.json, "usage.completion_tokens"), n);
    T_EQ(api_int_at(a.json, "usage.prompt_tokens_details.cached_tokens"), 3);
    T_NEAR(api_at(a.json, "timings.prefill_ms") ? api_at(a.json, "timings.prefill_ms")->num : 0, 4, 1e-9);
    T_OK(api_at(a.json, "timings.itl_ms.p99") && api_at(a.json, "timings.ttft_ms")->num >= 0);
    T_OK(strcasestr(a.head, "x-request-id: ") != NULL);
    T_STR(api_str_at(a.json, "object"), "text_completion");
    T_EQ(atomic_load(&m->seen_temp_milli), 500); /* generation_config.json */
    T_EQ(atomic_load(&m->seen_topk), 7);
    T_EQ(atomic_load(&m->seen_stop_ids), 1);
    api_done(&a);
    free(text);
    /* several prompts and choices: index = prompt * n + choice */
    a = api_send_json(
        "/v1/completions",
        "{\"prompt\": [\"ab\", \"cde\"], \"n\": 2, \"seed\": 3, \"max_tokens\": 5, \"temperature\": 1}");
    T_EQ(api_at(a.json, "choices") ? api_at(a.json, "choices")->n : 0, 4);
    for (unsigned i = 0; i < 4; i++) {
        char path[32];
        snprintf(path, sizeof path, "choices.%u.text", i);
        expect(i < 2 ? "ab" : "cde", 3, i % 2, 5, NULL, ids, &text);
        T_STR(api_str_at(a.json, path), text);
        free(text);
    }
    T_EQ(api_int_at(a.json, "usage.prompt_tokens"), 5);
    T_EQ(atomic_load(&m->seen_temp_milli), 1000);
    api_done(&a);
    /* ids as prompt; without max_tokens: 16 */
    a = api_send_json("/v1/completions",
                      "{\"prompt\": [104, 101, 108, 108, 111], \"seed\": 7, \"ignore_eos\": true}");
    T_EQ(a.status, 200);
    T_EQ(atomic_load(&m->seen_max), 16);
    api_done(&a);
}

static void stop_string(void)
{
    uint32_t ids[300];
    char *all, *text, stop[3] = "";
    expect("stop here", 11, 0, 60, NULL, ids, &all);
    T_OK(strlen(all) > 8, "the model says too little: %s", all);
    memcpy(stop, all + 4, 2);
    uint32_t n = expect("stop here", 11, 0, 60, stop, ids, &text);
    char body[300];
    td_buf b;
    td_buf_init(&b, 0);
    td_buf_json_str(&b, stop, 2);
    for (int stream = 0; stream < 2; stream++) {
        snprintf(body, sizeof body,
                 "{\"prompt\": \"stop here\", \"seed\": 11, \"max_tokens\": 60, \"stop\": [%s], "
                 "\"return_token_ids\": true, \"stream\": %s}",
                 b.p, stream ? "true" : "false");
        api_reply a = api_send_json("/v1/completions", body);
        if (!stream) {
            T_STR(api_str_at(a.json, "choices.0.text"), text);
            T_STR(api_str_at(a.json, "choices.0.finish_reason"), "stop");
            T_STR(api_str_at(a.json, "choices.0.stop_reason"), stop);
            T_EQ(api_int_at(a.json, "usage.completion_tokens"), n);
        } else {
            T_OK(!strstr(a.body, all + 4) && strstr(a.body, "\"finish_reason\": \"stop\""));
        }
        api_done(&a);
    }
    td_buf_deinit(&b);
    free(all);
    free(text);
}

typedef struct events {
    td_arena arena;
    td_json *v[400];
    unsigned n;
    bool finished;
} events;

static void split_events(const api_reply *r, events *e)
{
    memset(e, 0, sizeof *e);
    td_arena_init(&e->arena, 32 << 20);
    for (const char *p = r->body; (p = strstr(p, "data: "));) {
        p += 6;
        const char *end = strstr(p, "\n\n");
        if (!end || e->n == 400) break;
        if (!strncmp(p, "[DONE]", 6))
            e->finished = !strcmp(end, "\n\n");
        else
            T_OK(td_json_parse(&e->arena, p, (size_t)(end - p), (td_json_limits){0}, &e->v[e->n++]) == TD_OK);
        p = end;
    }
}

static void streaming(void)
{
    uint32_t ids[300];
    char *text;
    uint32_t n = expect("hello", 7, 0, 12, NULL, ids, &text);
    api_reply a = api_send_json("/v1/completions",
                                "{\"prompt\": \"hello\", \"seed\": 7, \"max_tokens\": 12, \"stream\": true, "
                                "\"stream_options\": {\"include_usage\": true}, \"return_token_ids\": true}");
    T_EQ(a.status, 200);
    T_OK(strcasestr(a.head, "text/event-stream") != NULL);
    events e;
    split_events(&a, &e);
    T_OK(e.finished);
    td_buf got;
    td_buf_init(&got, 0);
    td_buf_str(&got, "");
    uint32_t k = 0;
    for (unsigned i = 0; i + 1 < e.n; i++) {
        td_buf_str(&got, api_str_at(e.v[i], "choices.0.text"));
        const td_json *t = api_at(e.v[i], "choices.0.token_ids");
        for (const td_json *x = t ? t->child : NULL; x; x = x->next) T_EQ(x->i, ids[k++]);
        T_OK(api_at(e.v[i], "usage") && api_at(e.v[i], "usage")->type == TD_JSON_NULL);
        bool last = i + 2 == e.n;
        T_EQ(api_at(e.v[i], "choices.0.finish_reason")->type == TD_JSON_NULL, !last);
        T_EQ(api_at(e.v[i], "timings") != NULL, last);
    }
    T_EQ(k, n);
    T_STR(got.p, text);
    const td_json *u = e.n ? e.v[e.n - 1] : NULL;
    T_EQ(api_at(u, "choices") ? api_at(u, "choices")->n : 9, 0);
    T_EQ(api_int_at(u, "usage.completion_tokens"), n);
    td_buf_deinit(&got);
    td_arena_deinit(&e.arena);
    api_done(&a);
    free(text);
}

static void chat(void)
{
    uint32_t ids[300];
    char *text;
    expect("[user]hi\n[assistant]", 5, 0, 9, NULL, ids, &text);
    const char *body = "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"seed\": 5, "
                       "\"max_completion_tokens\": 9, \"logprobs\": true, \"top_logprobs\": 2%s}";
    char q[300];
    snprintf(q, sizeof q, body, "");
    api_reply a = api_send_json("/v1/chat/completions", q);
    T_EQ(a.status, 200);
    T_STR(api_str_at(a.json, "object"), "chat.completion");
    T_STR(api_str_at(a.json, "choices.0.message.content"), text);
    T_STR(api_str_at(a.json, "choices.0.message.role"), "assistant");
    T_NEAR(api_at(a.json, "choices.0.logprobs.content.0.logprob")
               ? api_at(a.json, "choices.0.logprobs.content.0.logprob")->num
               : 0,
           -0.25, 1e-9);
    T_EQ(api_at(a.json, "choices.0.logprobs.content.0.top_logprobs")
             ? api_at(a.json, "choices.0.logprobs.content.0.top_logprobs")->n
             : 0,
         2);
    api_done(&a);
    snprintf(q, sizeof q, body, ", \"stream\": true, \"n\": 2");
    a = api_send_json("/v1/chat/completions", q);
    events e;
    split_events(&a, &e);
    T_OK(e.finished);
    int roles = 0, ends = 0;
    td_buf got;
    td_buf_init(&got, 0);
    td_buf_str(&got, "");
    for (unsigned i = 0; i < e.n; i++) {
        roles += !strcmp(api_str_at(e.v[i], "choices.0.delta.role"), "assistant");
        ends += api_at(e.v[i], "choices.0.finish_reason")->type == TD_JSON_STR;
        if (api_int_at(e.v[i], "choices.0.index") == 0 && api_at(e.v[i], "choices.0.delta.content"))
            td_buf_str(&got, api_str_at(e.v[i], "choices.0.delta.content"));
    }
    T_EQ(roles, 2);
    T_EQ(ends, 2);
    T_STR(got.p, text);
    td_buf_deinit(&got);
    td_arena_deinit(&e.arena);
    api_done(&a);
    a = api_send_json("/tokenize", "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}");
    T_EQ(api_int_at(a.json, "count"), 20);
    api_done(&a);
    free(text);
}

static void logprobs_and_echo(void)
{
    api_reply a = api_send_json(
        "/v1/completions",
        "{\"prompt\": \"abc\", \"seed\": 1, \"max_tokens\": 0, \"echo\": true, \"logprobs\": 1}");
    T_EQ(a.status, 200);
    T_STR(api_str_at(a.json, "choices.0.text"), "abc");
    T_EQ(api_at(a.json, "choices.0.logprobs.tokens") ? api_at(a.json, "choices.0.logprobs.tokens")->n : 0, 3);
    T_OK(api_at(a.json, "choices.0.logprobs.token_logprobs.0") &&
         api_at(a.json, "choices.0.logprobs.token_logprobs.0")->type == TD_JSON_NULL);
    T_NEAR(api_at(a.json, "choices.0.logprobs.token_logprobs.2")
               ? api_at(a.json, "choices.0.logprobs.token_logprobs.2")->num
               : 0,
           -1.25, 1e-9);
    T_NEAR(api_at(a.json, "choices.0.logprobs.top_logprobs.1.x")
               ? api_at(a.json, "choices.0.logprobs.top_logprobs.1.x")->num
               : 0,
           -0.5, 1e-9);
    T_EQ(api_int_at(a.json, "choices.0.logprobs.text_offset.2"), 2);
    T_EQ(api_int_at(a.json, "usage.completion_tokens"), 0);
    api_done(&a);
    a = api_send_json(
        "/v1/completions",
        "{\"prompt\": \"abc\", \"seed\": 1, \"max_tokens\": 2, \"min_tokens\": 2, \"prompt_logprobs\": 0}");
    T_OK(api_at(a.json, "prompt_logprobs.0") && api_at(a.json, "prompt_logprobs.0")->type == TD_JSON_NULL);
    T_NEAR(api_at(a.json, "prompt_logprobs.1.98.logprob")
               ? api_at(a.json, "prompt_logprobs.1.98.logprob")->num
               : 0,
           -1.25, 1e-9);
    T_STR(api_str_at(a.json, "prompt_logprobs.1.98.decoded_token"), "b");
    api_done(&a);
}

static void refusals(void)
{
    static const struct {
        const char *method, *path, *body;
        int status;
        const char *code, *param;
    } c[] = {
        {"POST", "/v1/completions", "{\"prompt\": \"x\"", 400, "invalid_json", NULL},
        {"POST", "/v1/completions", " {\"prompt\": \"x\"}", 400, "missing_required_parameter", "model"},
        {"POST", "/v1/completions", "{\"prompt\": \"x\", \"n\": 0}", 400, "invalid_value", "n"},
        {"POST", "/v1/completions", "{\"prompt\": \"\"}", 400, "invalid_value", "prompt"},
        {"POST", "/v1/completions", "{\"prompt\": [300]}", 400, "invalid_value", "prompt"},
        {"POST", "/v1/completions", "{\"prompt\": \"x\", \"model\": \"other\"}", 404, "model_not_found",
         "model"},
        {"POST", "/v1/completions", "{\"prompt\": \"x\", \"max_tokens\": 256}", 400,
         "context_length_exceeded", NULL},
        {"POST", "/v1/completions", "{\"prompt\": \"x\", \"response_format\": {\"type\": \"json_object\"}}",
         400, "unsupported_parameter", "response_format"},
        {"POST", "/v1/chat/completions", "{\"messages\": []}", 400, "invalid_type", "messages"},
        {"GET", "/v1/completions", NULL, 405, "method_not_allowed", NULL},
        {"POST", "/v1/models", "{}", 405, "method_not_allowed", NULL},
        {"GET", "/v1/models/none", NULL, 404, "model_not_found", "model"},
        {"GET", "/nothing", NULL, 404, "not_found", NULL},
        {"POST", "/detokenize", "{\"tokens\": \"x\"}", 400, "invalid_type", "tokens"},
        {"POST", "/tokenize", "{}", 400, "invalid_type", "prompt"},
    };
    for (unsigned i = 0; i < TD_COUNT(c); i++) {
        api_reply a = api_finish(api_ask(c[i].method, c[i].path, "", c[i].body));
        T_EQ(a.status, c[i].status);
        T_STR(api_str_at(a.json, "error.code"), c[i].code);
        if (c[i].param) T_STR(api_str_at(a.json, "error.param"), c[i].param);
        T_OK(api_at(a.json, "error.type") && api_at(a.json, "error.message"));
        api_done(&a);
    }
    char big[2200] = "{\"prompt\": \"";
    memset(big + strlen(big), 'x', 300);
    strcat(big, "\"}");
    api_reply a = api_send_json("/v1/completions", big);
    T_EQ(a.status, 400);
    T_STR(api_str_at(a.json, "error.code"), "context_length_exceeded");
    T_OK(strstr(api_str_at(a.json, "error.message"), "256") &&
             strstr(api_str_at(a.json, "error.message"), "300"),
         "%s", api_str_at(a.json, "error.message"));
    api_done(&a);
}

static void small_pages(void)
{
    api_reply a = api_get("/v1/models");
    T_STR(api_str_at(a.json, "data.0.id"), "toy");
    T_EQ(api_int_at(a.json, "data.0.max_model_len"), 256);
    api_done(&a);
    a = api_get("/v1/models/toy");
    T_STR(api_str_at(a.json, "id"), "toy");
    api_done(&a);
    a = api_send_json("/tokenize", "{\"prompt\": \"h\\u00e9\"}");
    T_EQ(api_int_at(a.json, "count"), 3);
    T_EQ(api_int_at(a.json, "tokens.1"), 0xC3);
    api_done(&a);
    a = api_send_json("/detokenize", "{\"tokens\": [104, 195, 169]}");
    T_STR(api_str_at(a.json, "prompt"), "h\xc3\xa9");
    api_done(&a);
    a = api_get("/health");
    T_EQ(a.status, 200);
    api_done(&a);
    a = api_get("/metrics");
    T_EQ(a.status, 200);
    static const char *const names[] = {"tandem_requests_done_total",
                                        "tandem_kv_pages{",
                                        "vllm:num_requests_running{",
                                        "vllm:kv_cache_usage_perc{",
                                        "vllm:time_to_first_token_seconds_bucket{",
                                        "vllm:request_success_total{",
                                        "tandem_inter_token_latency_seconds_bucket{"};
    for (unsigned i = 0; i < TD_COUNT(names); i++) T_OK(strstr(a.body, names[i]) != NULL, "%s", names[i]);
    api_done(&a);
    a = api_finish(api_ask("POST", "/v1/completions", "x-request-id: mine-1\r\n",
                           "{\"prompt\": \"x\", \"max_tokens\": 1, \"zzz\": 1}"));
    T_OK(strcasestr(a.head, "x-request-id: mine-1") != NULL);
    T_STR(api_str_at(a.json, "id"), "cmpl-mine-1");
    api_done(&a);
}

static void wait_idle(api_mock *m)
{
    for (int i = 0; i < 500 && atomic_load(&m->legs); i++) usleep(20000);
    T_EQ(atomic_load(&m->legs), 0);
}

static void client_leaves(api_mock *m)
{
    wait_idle(m);
    atomic_store(&m->step_ms, 30);
    atomic_store(&m->cancels, 0);
    for (int stream = 0; stream < 2; stream++) {
        char body[200];
        snprintf(body, sizeof body,
                 "{\"prompt\": \"long one\", \"seed\": 2, \"max_tokens\": 200, \"ignore_eos\": true, "
                 "\"stream\": %s}",
                 stream ? "true" : "false");
        int fd = api_ask("POST", "/v1/completions", "", body);
        for (int i = 0; i < 1000 && !atomic_load(&m->legs); i++) usleep(10000);
        T_EQ(atomic_load(&m->legs), 1);
        close(fd);
        for (int i = 0; i < 2000 && atomic_load(&m->cancels) <= stream; i++) usleep(5000);
        T_EQ(atomic_load(&m->cancels), stream + 1);
    }
    wait_idle(m);
    api_reply a = api_get("/debug/ledger");
    for (int i = 0; i < 500 && api_int_at(a.json, "requests"); i++) {
        usleep(10000);
        api_done(&a);
        a = api_get("/debug/ledger");
    }
    T_EQ(api_int_at(a.json, "leases"), 0);
    T_EQ(api_int_at(a.json, "requests"), 0);
    T_STR(api_str_at(a.json, "workers.0.state"), "READY");
    T_EQ(api_int_at(a.json, "workers.0.groups.0.total"), 9);
    api_done(&a);
    atomic_store(&m->step_ms, 0);
}

/* A worker dies in the middle: another one goes on, the client sees nothing. */
static api_mock *worker_dies(api_mock *m)
{
    uint32_t ids[300];
    char *text;
    atomic_store(&m->step_ms, 20);
    expect("survive", 4, 0, 40, NULL, ids, &text);
    int fd =
        api_ask("POST", "/v1/completions", "", "{\"prompt\": \"survive\", \"seed\": 4, \"max_tokens\": 40}");
    usleep(250000);
    api_mock *next = api_mock_start(901, 0);
    usleep(150000);
    api_mock_stop(m);
    api_reply a = api_finish(fd);
    T_EQ(a.status, 200);
    T_STR(api_str_at(a.json, "choices.0.text"), text);
    api_done(&a);
    free(text);
    return next;
}

static void drain(api_router *r, api_mock *m)
{
    uint32_t ids[300];
    char *text;
    atomic_store(&m->step_ms, 20);
    expect("goodbye", 4, 0, 30, NULL, ids, &text);
    int fd =
        api_ask("POST", "/v1/completions", "", "{\"prompt\": \"goodbye\", \"seed\": 4, \"max_tokens\": 30}");
    usleep(150000);
    T_EQ(atomic_load(&m->goodbyes), 0);
    T_EQ(api_router_stop(r), 0);
    for (int i = 0; i < 300 && !atomic_load(&m->goodbyes); i++) usleep(10000);
    T_EQ(atomic_load(&m->goodbyes), 1);
    api_reply a = api_finish(fd);
    T_EQ(a.status, 200);
    T_STR(api_str_at(a.json, "choices.0.text"), text);
    api_done(&a);
    free(text);
}

static void keys_and_queue(void)
{
    api_router r = api_router_start("--api-key", "s3cret");
    api_reply a = api_get("/v1/models");
    T_EQ(a.status, 401);
    T_STR(api_str_at(a.json, "error.code"), "invalid_api_key");
    api_done(&a);
    a = api_get("/livez");
    T_EQ(a.status, 200);
    api_done(&a);
    static const struct {
        const char *h;
        int status;
    } keys[] = {{"Authorization: Bearer s3cret\r\n", 200}, {"Authorization: bearer s3cret\r\n", 200},
                {"Authorization: Bearer s3cre\r\n", 401},  {"Authorization: Bearer s3cretx\r\n", 401},
                {"Authorization: Bearer \r\n", 401},       {"Authorization: s3cret\r\n", 401}};
    for (unsigned i = 0; i < TD_COUNT(keys); i++) {
        a = api_finish(api_ask("GET", "/v1/models", keys[i].h, NULL));
        T_EQ(a.status, keys[i].status);
        api_done(&a);
    }
    T_EQ(api_router_stop(&r), 0);
    r = api_router_start("--max-queue", "2");
    int fd[3];
    for (int i = 0; i < 3; i++) {
        fd[i] = api_ask("POST", "/v1/completions", "", "{\"prompt\": \"x\", \"max_tokens\": 2}");
        usleep(100000);
    }
    a = api_finish(fd[2]);
    T_EQ(a.status, 429);
    T_STR(api_str_at(a.json, "error.code"), "queue_full");
    T_OK(strcasestr(a.head, "retry-after: ") != NULL);
    api_done(&a);
    api_mock *m = api_mock_start(77, 0); /* the two that wait are served */
    for (int i = 0; i < 2; i++) {
        a = api_finish(fd[i]);
        T_EQ(a.status, 200);
        api_done(&a);
    }
    api_mock_stop(m);
    for (int i = 0; i < 200; i++) { /* nobody left: said at once */
        a = api_send_json("/v1/completions", "{\"prompt\": \"x\", \"max_tokens\": 2}");
        bool gone = a.status == 503;
        if (gone) T_STR(api_str_at(a.json, "error.code"), "no_worker");
        api_done(&a);
        if (gone) break;
        T_OK(i < 199);
    }
    T_EQ(api_router_stop(&r), 0);
}

/* A stream that waits is kept alive by comments, and answered when somebody comes. */
static void keepalive(void)
{
    api_router r = api_router_start("--keepalive-s", "1");
    int fd =
        api_ask("POST", "/v1/completions", "", "{\"prompt\": \"x\", \"max_tokens\": 2, \"stream\": true}");
    usleep(2300000);
    api_mock *m = api_mock_start(78, 0);
    api_reply a = api_finish(fd);
    T_EQ(a.status, 200);
    T_OK(!strncmp(a.body, ": keep-alive\n\n", 14) && strstr(a.body, "[DONE]"), "%.60s", a.body);
    api_done(&a);
    api_mock_stop(m);
    T_EQ(api_router_stop(&r), 0);
}

/* The ready line is about all workers that are expected; requests are served before. */
static void ready_line(void)
{
    api_router r = api_router_start("--expected-workers", "2");
    char line[512] = "";
    api_mock *m[2] = {api_mock_start(81, 0)};
    api_reply a = api_send_json("/v1/completions", "{\"prompt\": \"x\", \"max_tokens\": 2}");
    T_EQ(a.status, 200);
    api_done(&a);
    T_OK(!api_read_line(r.fd, line, sizeof line, 200), "one of two: %s", line);
    m[1] = api_mock_start(82, 0);
    T_OK(api_read_line(r.fd, line, sizeof line, 5000) && strstr(line, "kernels toy (numerics ") &&
             strstr(line, ", KV 200000 tokens: ") && strstr(line, " of the full 256 tokens"),
         "%s", line);
    T_EQ(api_router_stop(&r), 0);
    for (int i = 0; i < 2; i++) api_mock_stop(m[i]);
}

int main(int argc, char **argv)
{
    (void)argc;
    if (!api_init(argv[0])) T_SKIP("no tandem-router program beside this test");
    support_tokenizer();

    api_router r = api_router_start("--debug-endpoints", "--log-level=info");
    before_workers(&r);
    /* A request sent before any worker is there waits for one. */
    int fd =
        api_ask("POST", "/v1/completions", "", "{\"prompt\": \"early\", \"seed\": 1, \"max_tokens\": 3}");
    usleep(50000);
    api_mock *m = api_mock_start(900, 0);
    char line[512];
    T_OK(api_read_line(r.fd, line, sizeof line, 5000) && !strncmp(line, "ready toy", 9), "%s", line);
    api_reply a = api_finish(fd);
    T_EQ(a.status, 200);
    api_done(&a);
    completion(m);
    stop_string();
    streaming();
    chat();
    logprobs_and_echo();
    refusals();
    small_pages();
    client_leaves(m);
    m = worker_dies(m);
    drain(&r, m);
    api_mock_stop(m);
    keys_and_queue();
    keepalive();
    ready_line();
    unlink(api_control + 6);
    support_tokenizer_close();
    return T_DONE();
}
