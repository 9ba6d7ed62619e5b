/* tests/fuzz/test_params.c - mutated request bodies: each is taken with every limit kept, or refused with an
 * error in OpenAI's shape; never a crash. `fuzz_test_params SEED ROUNDS` replays or goes on for longer. */
// SPDX-License-Identifier: Apache-2.0
#include "router/api/params.h"
#include "tests/t.h"

enum { CAP = 1 << 14, VOCAB = 1000 };

static uint64_t state;
static uint32_t rnd(uint32_t n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % n;
}

static const char *const bodies[] = {
    "{\"model\": \"m\", \"prompt\": \"hello\", \"max_tokens\": 9, \"min_tokens\": 2, \"temperature\": 0.5, "
    "\"top_p\": 0.9, \"top_k\": 7, \"min_p\": 0.1, \"repetition_penalty\": 1.5, \"presence_penalty\": -1, "
    "\"frequency_penalty\": 0.5, \"seed\": -3, \"n\": 4, \"best_of\": 4, \"ignore_eos\": true, "
    "\"logit_bias\": {\"5\": -100, \"7\": 1.5}, \"stop\": [\"a\", \"bc\"], \"stop_token_ids\": [1, 2], "
    "\"include_stop_str_in_output\": true, \"logprobs\": 3, \"echo\": true, \"stream\": true, "
    "\"stream_options\": {\"include_usage\": true}, \"return_token_ids\": true, \"cache_salt\": \"t\", "
    "\"user\": \"u\", \"suffix\": null, \"skip_special_tokens\": false, \"add_special_tokens\": true}",
    "{\"prompt\": [[1, 2, 3], [4]], \"max_tokens\": 0, \"echo\": true, \"prompt_logprobs\": 2, "
    "\"stop\": \"x\"}",
    "{\"prompt\": [\"a\", \"b\"], \"stop\": null, \"logprobs\": 0, \"n\": 1}",
    "{\"model\": \"m\", \"messages\": [{\"role\": \"system\", \"content\": \"s\"}, {\"role\": \"user\", "
    "\"content\": [{\"type\": \"text\", \"text\": \"hi\"}]}, {\"role\": \"assistant\", \"content\": null, "
    "\"tool_calls\": [{\"id\": \"1\", \"type\": \"function\", \"function\": {\"name\": \"f\", \"arguments\": "
    "\"{}\"}}]}, {\"role\": \"tool\", \"tool_call_id\": \"1\", \"content\": \"7\"}], \"tools\": [{\"type\": "
    "\"function\", \"function\": {\"name\": \"f\", \"parameters\": {}}}], \"tool_choice\": \"auto\", "
    "\"logprobs\": true, \"top_logprobs\": 5, \"max_tokens\": 5, \"max_completion_tokens\": 7, "
    "\"response_format\": {\"type\": \"text\"}, \"chat_template_kwargs\": {\"a\": 1}, \"documents\": [], "
    "\"add_generation_prompt\": false, \"metadata\": {}, \"parallel_tool_calls\": true, \"n\": 2}",
};
static const char *const values[] = {
    "null", "true", "false", "0", "1", "-1", "2", "129", "4294967296", "9223372036854775807",
    "-9223372036854775808", "18446744073709551616", "1e308", "-1e308", "1e-320", "0.5", "1e999", "\"\"",
    "\"1\"", "\"\\u0000\"", "\"\\ud83d\\ude00\"", "[]", "{}", "[null]", "[[]]", "[-1]", "[0.5]", "[1000]",
    "[\"\"]", "{\"a\": 1}", "{\"5\": 101}", "{\"-1\": 1}", "{\"99999999999\": 1}", "[[1], \"a\"]",
    "{\"type\": \"json_object\"}", "[{\"role\": 5}]", "[{\"role\": \"user\", \"content\": [{}]}]",
};

static size_t insert(char *p, size_t n, size_t at, const char *w, size_t len)
{
    if (n + len >= CAP) return n;
    memmove(p + at + len, p + at, n - at);
    memcpy(p + at, w, len);
    return n + len;
}

/* The end of the JSON value that starts at `at`, near enough: brackets are counted, strings skipped. */
static size_t value_end(const char *p, size_t n, size_t at)
{
    int depth = 0;
    for (; at < n; at++) {
        char c = p[at];
        if (c == '"')
            for (at++; at < n && p[at] != '"'; at++) at += p[at] == '\\';
        if (c == '[' || c == '{') depth++;
        if ((c == ']' || c == '}') && --depth < 0) return at;
        if (!depth && (c == ']' || c == '}' || c == '"')) return at < n ? at + 1 : n;
        if (!depth && (c == ',')) return at;
    }
    return n;
}

/* The value behind some colon becomes another one: the syntax holds and the meaning breaks. */
static size_t swap_value(char *p, size_t n)
{
    size_t colons[256], k = 0;
    for (size_t i = 0; i + 1 < n && k < 256; i++)
        if (p[i] == ':' && p[i + 1] == ' ') colons[k++] = i + 2;
    if (!k) return n;
    size_t at = colons[rnd((uint32_t)k)], end = value_end(p, n, at);
    const char *w = values[rnd(sizeof values / sizeof values[0])];
    memmove(p + at, p + end, n - end);
    return insert(p, n - (end - at), at, w, strlen(w));
}

static size_t mangle(char *p, size_t n)
{
    if (!n) return n;
    size_t at = rnd((uint32_t)n), len = 1 + rnd(30);
    if (len > n - at) len = n - at;
    char piece[32];
    memcpy(piece, p + at, len);
    switch (rnd(4)) {
    case 0: p[at] = (char)rnd(256); return n;
    case 1: memmove(p + at, p + at + len, n - at - len); return n - len;
    case 2: return insert(p, n, rnd((uint32_t)n + 1), piece, len);
    default: p[at] ^= (char)(1 << rnd(8)); return n;
    }
}

static bool within(const td_ask *q)
{
    const td_sampling *s = &q->s;
    bool ok = s->n >= 1 && s->n <= TD_MAX_CHOICES && s->max_tokens >= 1 && s->min_tokens <= s->max_tokens;
    ok &= s->temperature >= 0 && s->temperature <= 2 && s->top_p > 0 && s->top_p <= 1;
    ok &= s->min_p >= 0 && s->min_p <= 1 && s->repetition_penalty > 0 && isfinite(s->repetition_penalty);
    ok &= fabsf(s->presence_penalty) <= 2 && fabsf(s->frequency_penalty) <= 2 && s->top_k >= -1;
    ok &= s->logprobs >= -1 && s->logprobs <= TD_MAX_TOP_LOGPROBS;
    ok &= s->prompt_logprobs >= -1 && s->prompt_logprobs <= TD_MAX_TOP_LOGPROBS;
    ok &= q->n_stop <= TD_MAX_STOP_STRINGS && s->n_stop_ids <= TD_MAX_STOP_IDS;
    ok &= s->n_bias <= TD_MAX_LOGIT_BIAS && q->n_prompts <= TD_ASK_PROMPTS;
    for (uint32_t i = 0; i < q->n_stop; i++) {
        size_t n = strlen(q->stop[i]);
        ok &= n >= 1 && n <= TD_ASK_STOP_BYTES;
    }
    for (uint32_t i = 0; i < s->n_stop_ids; i++) ok &= s->stop_ids[i] < VOCAB;
    for (uint32_t i = 0; i < s->n_bias; i++) ok &= s->bias[i].id < VOCAB && fabsf(s->bias[i].add) <= 100;
    for (uint32_t i = 0; q->kind == TD_ASK_COMPLETION && i < q->n_prompts; i++)
        for (uint32_t k = 0; !q->prompts[i].text && k < q->prompts[i].n_ids; k++)
            ok &= q->prompts[i].ids[k] < VOCAB;
    return ok && (q->kind == TD_ASK_COMPLETION ? q->n_prompts >= 1 : q->messages != NULL);
}

/* {"error": {"message": text, "type": text, "param": text or null, "code": text or null}}, 4xx */
static bool shaped(const td_api_error *e)
{
    td_buf b;
    td_arena a;
    td_json *v = NULL;
    td_buf_init(&b, 0);
    td_arena_init(&a, 1 << 16);
    td_api_error_json(&b, e);
    bool ok = e->status >= 400 && e->status < 500 &&
              td_json_parse(&a, b.p, b.len, (td_json_limits){0}, &v) == TD_OK && v->n == 1;
    const td_json *x = ok ? td_json_get(v, "error") : NULL;
    const char *const key[] = {"message", "type", "param", "code"};
    for (int i = 0; i < 4 && ok; i++) {
        const td_json *f = x ? td_json_get(x, key[i]) : NULL;
        ok = f && ((f->type == TD_JSON_STR && f->n) || (i > 1 && f->type == TD_JSON_NULL));
    }
    td_arena_deinit(&a);
    td_buf_deinit(&b);
    return ok;
}

int main(int argc, char **argv)
{
    uint64_t seed = argc > 1 ? strtoull(argv[1], NULL, 0) : 1;
    long rounds = argc > 2 ? atol(argv[2]) : 100000, json = 0, good = 0;
    td_defaults none = td_defaults_none();
    state = seed;
    for (long i = 0; i < rounds; i++) {
        static char p[CAP + 1];
        const char *body = bodies[rnd(sizeof bodies / sizeof bodies[0])];
        size_t n = strlen(body);
        memcpy(p, body, n);
        for (uint32_t k = 1 + rnd(3); k; k--) n = rnd(4) ? swap_value(p, n) : mangle(p, n);
        td_arena a;
        td_json *v;
        td_ask ask;
        td_api_error err = {0};
        td_arena_init(&a, 1 << 20);
        if (td_json_parse(&a, p, n, (td_json_limits){0}, &v) == TD_OK) {
            json++;
            bool ok = td_ask_parse(rnd(8) ? (strstr(body, "messages") ? TD_ASK_CHAT : TD_ASK_COMPLETION)
                                          : TD_ASK_CHAT,
                                   v, &none, VOCAB, &a, &ask, &err);
            good += ok;
            T_OK(ok ? within(&ask) : shaped(&err), "seed %llu round %ld: %.*s", (unsigned long long)seed, i,
                 (int)n, p);
        }
        td_arena_deinit(&a);
    }
    T_OK(json > rounds / 2 && good > rounds / 20 && good < json, "%ld are JSON, %ld of them taken", json,
         good);
    return T_DONE();
}
