/* router/api/params.c - one table says what becomes of each field; below it the checks. */
// SPDX-License-Identifier: Apache-2.0
#include "router/api/params.h"
#include "common/check.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

typedef enum { SERVED, ACCEPTED, NOT_SERVED } fate;
enum { BOTH = TD_ASK_CHAT | TD_ASK_COMPLETION };

/* allowed: values (as words) that ask for nothing, besides null, false, "", [] and {}. */
static const struct {
    const char *name; int kinds; fate fate; const char *allowed;
} fields[] = {
    {"model", BOTH, SERVED, NULL},
    {"stream", BOTH, SERVED, NULL},
    {"stream_options", BOTH, SERVED, NULL},
    {"temperature", BOTH, SERVED, NULL},
    {"top_p", BOTH, SERVED, NULL},
    {"top_k", BOTH, SERVED, NULL},
    {"min_p", BOTH, SERVED, NULL},
    {"repetition_penalty", BOTH, SERVED, NULL},
    {"presence_penalty", BOTH, SERVED, NULL},
    {"frequency_penalty", BOTH, SERVED, NULL},
    {"logit_bias", BOTH, SERVED, NULL},
    {"seed", BOTH, SERVED, NULL},
    {"stop", BOTH, SERVED, NULL},
    {"stop_token_ids", BOTH, SERVED, NULL},
    {"include_stop_str_in_output", BOTH, SERVED, NULL},
    {"max_tokens", BOTH, SERVED, NULL},
    {"min_tokens", BOTH, SERVED, NULL},
    {"ignore_eos", BOTH, SERVED, NULL},
    {"n", BOTH, SERVED, NULL},
    {"logprobs", BOTH, SERVED, NULL},
    {"prompt_logprobs", BOTH, SERVED, NULL},
    {"return_token_ids", BOTH, SERVED, NULL},
    {"return_tokens_as_token_ids", BOTH, SERVED, NULL},
    {"skip_special_tokens", BOTH, SERVED, NULL},
    {"cache_salt", BOTH, SERVED, NULL},
    {"add_special_tokens", BOTH, SERVED, NULL},
    {"messages", TD_ASK_CHAT, SERVED, NULL},
    {"max_completion_tokens", TD_ASK_CHAT, SERVED, NULL},
    {"top_logprobs", TD_ASK_CHAT, SERVED, NULL},
    {"tools", TD_ASK_CHAT, SERVED, NULL},
    {"tool_choice", TD_ASK_CHAT, SERVED, NULL},
    {"chat_template_kwargs", TD_ASK_CHAT, SERVED, NULL},
    {"documents", TD_ASK_CHAT, SERVED, NULL},
    {"add_generation_prompt", TD_ASK_CHAT, SERVED, NULL},
    {"prompt", TD_ASK_COMPLETION, SERVED, NULL},
    {"echo", TD_ASK_COMPLETION, SERVED, NULL},
    {"best_of", TD_ASK_COMPLETION, SERVED, NULL},

    {"user", BOTH, ACCEPTED, NULL},
    {"metadata", BOTH, ACCEPTED, NULL},
    {"store", BOTH, ACCEPTED, NULL},
    {"service_tier", BOTH, ACCEPTED, NULL},
    {"parallel_tool_calls", BOTH, ACCEPTED, NULL},
    {"safety_identifier", BOTH, ACCEPTED, NULL},
    {"prompt_cache_key", BOTH, ACCEPTED, NULL},
    {"prompt_cache_retention", BOTH, ACCEPTED, NULL},
    {"session_id", BOTH, ACCEPTED, NULL},
    {"request_id", BOTH, ACCEPTED, NULL},
    {"spaces_between_special_tokens", BOTH, ACCEPTED, NULL},

    {"response_format", BOTH, NOT_SERVED, "text"},
    {"functions", TD_ASK_CHAT, NOT_SERVED, NULL},
    {"function_call", TD_ASK_CHAT, NOT_SERVED, "none auto"},
    {"guided_json", BOTH, NOT_SERVED, NULL},
    {"guided_regex", BOTH, NOT_SERVED, NULL},
    {"guided_choice", BOTH, NOT_SERVED, NULL},
    {"guided_grammar", BOTH, NOT_SERVED, NULL},
    {"structured_outputs", BOTH, NOT_SERVED, NULL},
    {"structural_tag", BOTH, NOT_SERVED, NULL},
    {"guided_decoding_backend", BOTH, NOT_SERVED, NULL},
    {"guided_whitespace_pattern", BOTH, NOT_SERVED, NULL},
    {"json_schema", BOTH, NOT_SERVED, NULL},
    {"grammar", BOTH, NOT_SERVED, NULL},
    {"regex", BOTH, NOT_SERVED, NULL},
    {"ebnf", BOTH, NOT_SERVED, NULL},
    {"suffix", TD_ASK_COMPLETION, NOT_SERVED, NULL},
    {"audio", BOTH, NOT_SERVED, NULL},
    {"modalities", BOTH, NOT_SERVED, "text"},
    {"prediction", BOTH, NOT_SERVED, NULL},
    {"web_search_options", BOTH, NOT_SERVED, NULL},
    {"verbosity", BOTH, NOT_SERVED, "medium"},
    {"reasoning_effort", BOTH, NOT_SERVED, NULL},
    {"include_reasoning", BOTH, NOT_SERVED, "true"},
    {"thinking_token_budget", BOTH, NOT_SERVED, NULL},
    {"use_beam_search", BOTH, NOT_SERVED, NULL},
    {"length_penalty", BOTH, NOT_SERVED, "1"},
    {"early_stopping", BOTH, NOT_SERVED, NULL},
    {"allowed_token_ids", BOTH, NOT_SERVED, NULL},
    {"bad_words", BOTH, NOT_SERVED, NULL},
    {"logits_processors", BOTH, NOT_SERVED, NULL},
    {"logprob_token_ids", BOTH, NOT_SERVED, NULL},
    {"truncate_prompt_tokens", BOTH, NOT_SERVED, NULL},
    {"prompt_embeds", BOTH, NOT_SERVED, NULL},
    {"chat_template", TD_ASK_CHAT, NOT_SERVED, NULL},
    {"continue_final_message", TD_ASK_CHAT, NOT_SERVED, NULL},
    {"mm_processor_kwargs", BOTH, NOT_SERVED, NULL},
    {"priority", BOTH, NOT_SERVED, "0"},
    {"kv_transfer_params", BOTH, NOT_SERVED, NULL},
    {"lora_path", BOTH, NOT_SERVED, NULL},
    {"typical_p", BOTH, NOT_SERVED, "1"},
    {"mirostat", BOTH, NOT_SERVED, "0"},
    {"dry_multiplier", BOTH, NOT_SERVED, "0"},
    {"xtc_probability", BOTH, NOT_SERVED, "0"},
    {"echo", TD_ASK_CHAT, NOT_SERVED, NULL},
    {"best_of", TD_ASK_CHAT, NOT_SERVED, "1"},
};

td_defaults td_defaults_none(void) { return (td_defaults){NAN, NAN, NAN, NAN, NAN}; }

static bool word_in(const char *list, const char *w, size_t n)
{
    for (const char *p = list; p && *p;) {
        const char *e = strchr(p, ' ');
        size_t k = e ? (size_t)(e - p) : strlen(p);
        if (k == n && !memcmp(p, w, n)) return true;
        p = e ? e + 1 : NULL;
    }
    return false;
}

/* Whether a value of a field we do not serve asks for anything. */
static bool asks_nothing(const td_json *v, const char *allowed)
{
    char num[40];
    switch (v->type) {
    case TD_JSON_NULL: return true;
    case TD_JSON_BOOL: return !v->truth || word_in(allowed, "true", 4);
    case TD_JSON_STR: return !v->n || word_in(allowed, v->s, v->n);
    case TD_JSON_ARR:
        return !v->n || (v->n == 1 && asks_nothing(v->child, allowed) && v->child->type == TD_JSON_STR);
    case TD_JSON_OBJ: {
        if (!v->n) return true;
        const char *t = v->n == 1 ? td_json_str(v, "type", NULL) : NULL;
        return t && word_in(allowed, t, strlen(t));
    }
    case TD_JSON_INT:
    case TD_JSON_REAL:
        snprintf(num, sizeof num, "%g", v->num);
        return word_in(allowed, num, strlen(num));
    }
    return false;
}

static bool check_fields(td_ask_kind kind, const td_json *body, td_ask *out, td_api_error *err)
{
    for (const td_json *v = body->child; v; v = v->next) {
        bool known = false;
        for (unsigned i = 0; i < TD_COUNT(fields) && !known; i++) {
            if (!(fields[i].kinds & (int)kind) || strcmp(fields[i].name, v->key)) continue;
            known = true;
            if (fields[i].fate == NOT_SERVED && !asks_nothing(v, fields[i].allowed))
                return td_api_fail(err, 400, "unsupported_parameter", v->key,
                                   "'%s' with this value is not supported by this server", v->key);
        }
        if (!known) out->unknown++;
    }
    return true;
}

/* ---- typed access: absent and null are the same ---- */

static const td_json *given(const td_json *body, const char *name)
{
    const td_json *v = td_json_get(body, name);
    return v && v->type != TD_JSON_NULL ? v : NULL;
}

static bool bad_type(td_api_error *err, const char *name, const char *want)
{
    return td_api_fail(err, 400, "invalid_type", name, "'%s' must be %s", name, want);
}

static bool get_bool(const td_json *body, const char *name, bool *out, td_api_error *err)
{
    const td_json *v = given(body, name);
    if (!v) return true;
    if (v->type != TD_JSON_BOOL) return bad_type(err, name, "a boolean");
    *out = v->truth;
    return true;
}

static bool get_num(const td_json *body, const char *name, double lo, double hi, bool open_lo, double *out,
                    td_api_error *err)
{
    const td_json *v = given(body, name);
    if (!v) return true;
    if (v->type != TD_JSON_INT && v->type != TD_JSON_REAL) return bad_type(err, name, "a number");
    /* It is used as a float, where 1e-320 is 0. */
    if (!isfinite(v->num) || v->num < lo || v->num > hi || (open_lo && (double)(float)v->num == lo))
        return td_api_fail(err, 400, "invalid_value", name, "'%s' is %g; it must be %s %g and at most %g",
                           name, v->num, open_lo ? "greater than" : "at least", lo, hi);
    *out = v->num;
    return true;
}

static bool get_int(const td_json *body, const char *name, int64_t lo, int64_t hi, int64_t *out,
                    td_api_error *err)
{
    const td_json *v = given(body, name);
    if (!v) return true;
    if (v->type != TD_JSON_INT) return bad_type(err, name, "an integer");
    if (v->i < lo || v->i > hi)
        return td_api_fail(err, 400, "invalid_value", name, "'%s' is %lld; it must be between %lld and %lld",
                           name, (long long)v->i, (long long)lo, (long long)hi);
    *out = v->i;
    return true;
}

#define TRY(e)                  \
    do {                        \
        if (!(e)) return false; \
    } while (0)

/* ---- sampling ---- */

static double or_default(double dflt, double last) { return isnan(dflt) ? last : dflt; }

static bool get_sampling(const td_json *b, const td_defaults *d, td_ask *o, td_api_error *err)
{
    double temperature = or_default(d->temperature, 1), top_p = or_default(d->top_p, 1),
           min_p = or_default(d->min_p, 0), rep = or_default(d->repetition_penalty, 1), pres = 0, freq = 0;
    int64_t top_k = (int64_t)or_default(d->top_k, 0), n = 1, seed = 0, min_tokens = 0;
    TRY(get_num(b, "temperature", 0, 2, false, &temperature, err));
    TRY(get_num(b, "top_p", 0, 1, true, &top_p, err));
    TRY(get_num(b, "min_p", 0, 1, false, &min_p, err));
    TRY(get_num(b, "repetition_penalty", 0, 10, true, &rep, err));
    TRY(get_num(b, "presence_penalty", -2, 2, false, &pres, err));
    TRY(get_num(b, "frequency_penalty", -2, 2, false, &freq, err));
    TRY(get_int(b, "top_k", -1, INT32_MAX, &top_k, err));
    TRY(get_int(b, "n", 1, TD_MAX_CHOICES, &n, err));
    TRY(get_int(b, "seed", INT64_MIN, INT64_MAX, &seed, err));
    TRY(get_int(b, "min_tokens", 0, INT32_MAX, &min_tokens, err));
    o->s = (td_sampling){.temperature = (float)temperature,
                         .top_k = (int32_t)top_k,
                         .top_p = (float)top_p,
                         .min_p = (float)min_p,
                         .repetition_penalty = (float)rep,
                         .presence_penalty = (float)pres,
                         .frequency_penalty = (float)freq,
                         .seed = (uint64_t)seed,
                         .min_tokens = (uint32_t)min_tokens,
                         .n = (uint32_t)n,
                         .logprobs = -1,
                         .prompt_logprobs = -1};
    o->seed_given = given(b, "seed") != NULL;
    return get_bool(b, "ignore_eos", &o->s.ignore_eos, err);
}

static bool get_limits(const td_json *b, td_ask *o, td_api_error *err)
{
    const char *name = "max_tokens";
    if (o->kind == TD_ASK_CHAT && given(b, "max_completion_tokens")) name = "max_completion_tokens";
    int64_t max = o->kind == TD_ASK_COMPLETION ? 16 : INT32_MAX;
    o->max_tokens_given = given(b, name) != NULL;
    TRY(get_int(b, name, o->echo ? 0 : 1, INT32_MAX, &max, err));
    o->drop_output = max == 0;
    o->s.max_tokens = max ? (uint32_t)max : 1;
    if (o->max_tokens_given && o->s.min_tokens > o->s.max_tokens)
        return td_api_fail(err, 400, "invalid_value", "min_tokens",
                           "'min_tokens' is %u; it must be at most max_tokens, which is %u", o->s.min_tokens,
                           o->s.max_tokens);
    return true;
}

static bool get_bias(const td_json *b, uint32_t vocab, td_arena *a, td_ask *o, td_api_error *err)
{
    const td_json *v = given(b, "logit_bias");
    if (!v) return true;
    if (v->type != TD_JSON_OBJ) return bad_type(err, "logit_bias", "an object of token ids and numbers");
    if (v->n > TD_MAX_LOGIT_BIAS)
        return td_api_fail(err, 400, "invalid_value", "logit_bias",
                           "'logit_bias' has %u entries; at most %d are allowed", v->n, TD_MAX_LOGIT_BIAS);
    td_bias *bias = td_arena_alloc(a, (v->n + 1) * sizeof *bias);
    if (!bias) return td_api_fail(err, 413, NULL, NULL, "the request is too large");
    for (const td_json *e = v->child; e; e = e->next) {
        uint64_t id = 0;
        bool ok = e->key_len > 0 && e->key_len < 10;
        for (uint32_t i = 0; ok && i < e->key_len; i++) {
            ok = e->key[i] >= '0' && e->key[i] <= '9';
            id = id * 10 + (uint64_t)(e->key[i] - '0');
        }
        if (!ok || (vocab && id >= vocab))
            return td_api_fail(err, 400, "invalid_value", "logit_bias",
                               "'%.32s' in 'logit_bias' is not a token id below %u", e->key, vocab);
        if ((e->type != TD_JSON_INT && e->type != TD_JSON_REAL) || !(e->num >= -100 && e->num <= 100))
            return td_api_fail(err, 400, "invalid_value", "logit_bias",
                               "the bias of token %llu must be a number between -100 and 100",
                               (unsigned long long)id);
        bias[o->s.n_bias++] = (td_bias){(uint32_t)id, (float)e->num};
    }
    o->s.bias = bias;
    return true;
}

static bool one_stop(const td_json *v, const char **out, td_api_error *err)
{
    if (v->type != TD_JSON_STR) return bad_type(err, "stop", "a string or a list of strings");
    if (!v->n || v->n > TD_ASK_STOP_BYTES || strlen(v->s) != v->n)
        return td_api_fail(err, 400, "invalid_value", "stop",
                           "a stop string must have 1 to %d bytes and no NUL", TD_ASK_STOP_BYTES);
    *out = v->s;
    return true;
}

static bool get_stop(const td_json *b, uint32_t vocab, td_arena *a, td_ask *o, td_api_error *err)
{
    TRY(get_bool(b, "include_stop_str_in_output", &o->include_stop, err));
    const td_json *ids = given(b, "stop_token_ids"), *v = given(b, "stop");
    if (ids) {
        TRY(td_ask_ids(ids, "stop_token_ids", vocab, a, &o->s.stop_ids, &o->s.n_stop_ids, err));
        if (o->s.n_stop_ids > TD_MAX_STOP_IDS / 2)
            return td_api_fail(err, 400, "invalid_value", "stop_token_ids",
                               "at most %d stop token ids are allowed", TD_MAX_STOP_IDS / 2);
    }
    if (!v) return true;
    uint32_t n = v->type == TD_JSON_ARR ? v->n : 1;
    if (n > TD_MAX_STOP_STRINGS)
        return td_api_fail(err, 400, "invalid_value", "stop", "'stop' has %u strings; at most %d are allowed",
                           n, TD_MAX_STOP_STRINGS);
    const char **list = td_arena_alloc(a, (n + 1) * sizeof *list);
    if (!list) return td_api_fail(err, 413, NULL, NULL, "the request is too large");
    if (v->type == TD_JSON_ARR)
        for (const td_json *e = v->child; e; e = e->next) TRY(one_stop(e, &list[o->n_stop++], err));
    else TRY(one_stop(v, &list[o->n_stop++], err));
    o->stop = list;
    return true;
}

static bool get_logprobs(const td_json *b, td_ask *o, td_api_error *err)
{
    int64_t top = 0, prompt = -1;
    if (o->kind == TD_ASK_CHAT) {
        TRY(get_bool(b, "logprobs", &o->logprobs, err));
        TRY(get_int(b, "top_logprobs", 0, TD_MAX_TOP_LOGPROBS, &top, err));
        if (top && !o->logprobs)
            return td_api_fail(err, 400, "invalid_value", "top_logprobs",
                               "'top_logprobs' needs 'logprobs' to be true");
    } else {
        const td_json *v = given(b, "logprobs");
        if (v && v->type == TD_JSON_BOOL && !v->truth) v = NULL; /* some clients send it */
        if (v) TRY(get_int(b, "logprobs", 0, TD_MAX_TOP_LOGPROBS, &top, err));
        o->logprobs = v != NULL;
    }
    o->top_logprobs = (int)top;
    if (o->logprobs) o->s.logprobs = (int32_t)top;
    TRY(get_int(b, "prompt_logprobs", 0, TD_MAX_TOP_LOGPROBS, &prompt, err));
    o->prompt_logprobs = prompt >= 0;
    if (o->echo && o->logprobs && prompt < top) prompt = top;
    o->s.prompt_logprobs = (int32_t)prompt;
    if (prompt >= 0 && o->stream)
        return td_api_fail(err, 400, "unsupported_parameter", o->prompt_logprobs ? "prompt_logprobs" : "echo",
                           "log probabilities of the prompt cannot be streamed");
    return true;
}

static bool get_stream(const td_json *b, td_ask *o, td_api_error *err)
{
    TRY(get_bool(b, "stream", &o->stream, err));
    const td_json *v = given(b, "stream_options");
    if (!v) return true;
    if (v->type != TD_JSON_OBJ) return bad_type(err, "stream_options", "an object");
    if (!o->stream)
        return td_api_fail(err, 400, "invalid_value", "stream_options",
                           "'stream_options' needs 'stream' to be true");
    TRY(get_bool(v, "include_usage", &o->include_usage, err));
    return get_bool(v, "continuous_usage_stats", &o->continuous_usage, err);
}

/* ---- prompts ---- */

bool td_ask_ids(const td_json *v, const char *param, uint32_t vocab, td_arena *a, const uint32_t **ids,
                uint32_t *n, td_api_error *err)
{
    if (v->type != TD_JSON_ARR) return bad_type(err, param, "a list of token ids");
    uint32_t *p = td_arena_alloc(a, (v->n + 1) * sizeof *p), k = 0;
    if (!p) return td_api_fail(err, 413, NULL, NULL, "the request is too large");
    for (const td_json *e = v->child; e; e = e->next) {
        if (e->type != TD_JSON_INT) return bad_type(err, param, "a list of token ids");
        if (e->i < 0 || e->i > INT32_MAX || (vocab && e->i >= (int64_t)vocab))
            return td_api_fail(err, 400, "invalid_value", param,
                               "'%s': token id %lld at position %u is outside the vocabulary of %u", param,
                               (long long)e->i, k, vocab);
        p[k++] = (uint32_t)e->i;
    }
    *ids = p;
    *n = k;
    return true;
}

static bool get_prompts(const td_json *b, uint32_t vocab, td_arena *a, td_ask *o, td_api_error *err)
{
    const td_json *v = given(b, "prompt");
    if (!v) return td_api_fail(err, 400, "missing_required_parameter", "prompt", "'prompt' is missing");
    bool list =
        v->type == TD_JSON_ARR && v->n && (v->child->type == TD_JSON_STR || v->child->type == TD_JSON_ARR);
    uint32_t n = list ? v->n : 1;
    if (n > TD_ASK_PROMPTS)
        return td_api_fail(err, 400, "invalid_value", "prompt",
                           "%u prompts; at most %d are allowed in one request", n, TD_ASK_PROMPTS);
    if (v->type == TD_JSON_ARR && !v->n)
        return td_api_fail(err, 400, "invalid_value", "prompt", "'prompt' is empty");
    td_prompt *p = td_arena_alloc(a, n * sizeof *p);
    if (!p) return td_api_fail(err, 413, NULL, NULL, "the request is too large");
    const td_json *e = list ? v->child : v;
    for (uint32_t i = 0; i < n; i++, e = e->next) {
        if (e->type == TD_JSON_STR) p[i] = (td_prompt){.text = e->s, .n_text = e->n};
        else if (e->type == TD_JSON_ARR) {
            TRY(td_ask_ids(e, "prompt", vocab, a, &p[i].ids, &p[i].n_ids, err));
            if (!p[i].n_ids)
                return td_api_fail(err, 400, "invalid_value", "prompt", "prompt %u has no tokens", i);
        } else {
            return bad_type(err, "prompt",
                            "a string, a list of strings, a list of token ids or a list of such lists");
        }
    }
    o->prompts = p;
    o->n_prompts = n;
    return true;
}

/* Content as a list of parts: text only. Joining them is the chat template's business. */
static bool check_parts(const td_json *content, td_api_error *err)
{
    for (const td_json *p = content->child; p; p = p->next) {
        const char *type = td_json_str(p, "type", NULL);
        const td_json *t = td_json_get(p, "text");
        if (type && strcmp(type, "text"))
            return td_api_fail(err, 400, "unsupported_parameter", "messages",
                               "content of type '%.32s' is not supported: this server takes text", type);
        if (!type || !t || t->type != TD_JSON_STR)
            return td_api_fail(
                err, 400, "invalid_type", "messages",
                "a part of a message's content must be {\"type\": \"text\", \"text\": string}");
    }
    return true;
}

bool td_ask_messages(const td_json *messages, td_api_error *err)
{
    if (!messages || messages->type == TD_JSON_NULL)
        return td_api_fail(err, 400, "missing_required_parameter", "messages", "'messages' is missing");
    if (messages->type != TD_JSON_ARR || !messages->n)
        return bad_type(err, "messages", "a list with at least one message");
    if (messages->n > TD_ASK_MESSAGES)
        return td_api_fail(err, 400, "invalid_value", "messages", "%u messages; at most %d are allowed",
                           messages->n, TD_ASK_MESSAGES);
    for (const td_json *m = messages->child; m; m = m->next) {
        if (m->type != TD_JSON_OBJ || !td_json_str(m, "role", NULL))
            return bad_type(err, "messages", "a list of objects with a 'role'");
        const td_json *content = td_json_get(m, "content");
        if (td_json_is_null(content)) {
            /* An assistant may have said nothing but tool calls. */
            if (!strcmp(td_json_str(m, "role", ""), "assistant")) continue;
            return td_api_fail(err, 400, "missing_required_parameter", "messages",
                               "a message has no 'content'");
        }
        if (content->type == TD_JSON_STR) continue;
        if (content->type != TD_JSON_ARR)
            return td_api_fail(err, 400, "invalid_type", "messages",
                               "a message's 'content' must be a string or a list of parts");
        TRY(check_parts(content, err));
    }
    return true;
}

/* To a template documents are one more variable. */
static bool with_documents(td_ask *o, const td_json *documents, td_arena *a)
{
    td_json *all = td_arena_alloc(a, sizeof *all), *d = td_arena_alloc(a, sizeof *d);
    if (!all || !d) return false;
    *d = *documents;
    d->next = o->template_kwargs ? o->template_kwargs->child : NULL;
    *all =
        (td_json){.type = TD_JSON_OBJ, .n = 1 + (o->template_kwargs ? o->template_kwargs->n : 0), .child = d};
    o->template_kwargs = all;
    return true;
}

static bool get_chat(const td_json *b, td_arena *a, td_ask *o, td_api_error *err)
{
    o->messages = td_json_get(b, "messages");
    TRY(td_ask_messages(o->messages, err));
    o->tools = given(b, "tools");
    o->template_kwargs = given(b, "chat_template_kwargs");
    const td_json *documents = given(b, "documents");
    if (o->tools && o->tools->type != TD_JSON_ARR) return bad_type(err, "tools", "a list");
    if (documents && documents->type != TD_JSON_ARR) return bad_type(err, "documents", "a list");
    if (o->template_kwargs && o->template_kwargs->type != TD_JSON_OBJ)
        return bad_type(err, "chat_template_kwargs", "an object");
    if (documents && !with_documents(o, documents, a))
        return td_api_fail(err, 413, NULL, NULL, "the request is too large");
    const td_json *choice = given(b, "tool_choice");
    if (choice) {
        bool none = choice->type == TD_JSON_STR && !strcmp(choice->s, "none");
        if (none) o->tools = NULL;
        else if (choice->type != TD_JSON_STR || strcmp(choice->s, "auto"))
            return td_api_fail(err, 400, "unsupported_parameter", "tool_choice",
                               "forcing a tool is not supported: 'tool_choice' can be \"auto\" or \"none\"");
    }
    if (o->tools && !o->tools->n) o->tools = NULL;
    return get_bool(b, "add_generation_prompt", &o->add_generation_prompt, err);
}

static bool get_best_of(const td_json *b, const td_ask *o, td_api_error *err)
{
    int64_t best = 1;
    TRY(get_int(b, "best_of", 1, TD_MAX_CHOICES, &best, err));
    if (best > (int64_t)o->s.n)
        return td_api_fail(err, 400, "unsupported_parameter", "best_of",
                           "'best_of' greater than 'n' is not supported by this server");
    return true;
}

static bool get_text(const td_json *b, const char *name, uint32_t max, const char **out, td_api_error *err)
{
    const td_json *v = given(b, name);
    if (!v) return true;
    if (v->type != TD_JSON_STR) return bad_type(err, name, "a string");
    if (v->n > max || strlen(v->s) != v->n)
        return td_api_fail(err, 400, "invalid_value", name, "'%s' may have %u bytes at most and no NUL", name,
                           max);
    *out = v->s;
    return true;
}

bool td_ask_parse(td_ask_kind kind, const td_json *b, const td_defaults *d, uint32_t vocab, td_arena *a,
                  td_ask *o, td_api_error *err)
{
    *o = (td_ask){.kind = kind,
                  .skip_special = true,
                  .add_special = kind == TD_ASK_COMPLETION,
                  .add_generation_prompt = true,
                  .n_prompts = 1};
    if (b->type != TD_JSON_OBJ) return td_api_fail(err, 400, NULL, NULL, "the body must be a JSON object");
    TRY(check_fields(kind, b, o, err));
    TRY(get_text(b, "model", 255, &o->model, err));
    TRY(get_text(b, "cache_salt", TD_ASK_SALT_BYTES, &o->salt, err));
    TRY(get_stream(b, o, err));
    if (kind == TD_ASK_COMPLETION) TRY(get_bool(b, "echo", &o->echo, err));
    TRY(get_sampling(b, d, o, err));
    TRY(get_limits(b, o, err));
    TRY(get_bias(b, vocab, a, o, err));
    TRY(get_stop(b, vocab, a, o, err));
    TRY(get_logprobs(b, o, err));
    TRY(get_bool(b, "return_token_ids", &o->return_token_ids, err));
    TRY(get_bool(b, "return_tokens_as_token_ids", &o->tokens_as_ids, err));
    TRY(get_bool(b, "skip_special_tokens", &o->skip_special, err));
    TRY(get_bool(b, "add_special_tokens", &o->add_special, err));
    if (kind == TD_ASK_CHAT) return get_chat(b, a, o, err);
    TRY(get_best_of(b, o, err));
    TRY(get_prompts(b, vocab, a, o, err));
    if ((uint64_t)o->n_prompts * o->s.n > TD_ASK_SEQUENCES)
        return td_api_fail(err, 400, "invalid_value", "n",
                           "%u prompts with n = %u ask for more than %d sequences", o->n_prompts, o->s.n,
                           TD_ASK_SEQUENCES);
    return true;
}
