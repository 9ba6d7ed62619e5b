/* router/api/openai.c - chunks and whole answers. Source: OpenAI's API description; vLLM's extensions where
 * named in reference notes B2, B5. */
// SPDX-License-Identifier: Apache-2.0
#include "router/api/openai.h"
#include "common/check.h"
#include "common/clock.h"
#include "router/net/sse.h"

#include <math.h>
#include <string.h>

static bool is_chat(const td_call *c) { return c->kind == TD_TEXT_CHAT; }
static td_answer *part_of(td_call *c, const td_out *o) { return &c->parts[o->part * c->ask.s.n + o->choice]; }

/* ---- pieces ---- */

static void put_str(td_buf *b, const char *s) { td_buf_json_str(b, s, strlen(s)); }

/* JSON has no infinity; what others send for "impossible" is -9999. */
static void put_logprob(td_buf *b, float lp) { td_buf_json_num(b, isfinite(lp) ? (double)lp : -9999.0); }

static void put_token(td_buf *b, const td_call *c, uint32_t id)
{
    size_t n;
    const char *p = td_api_model_piece(&c->n->api->model, id, &n);
    if (c->ask.tokens_as_ids || !c->n->api->model.tokenizer) td_buf_fmt(b, "\"token_id:%u\"", id);
    else td_buf_json_str(b, p, n);
}

static void put_bytes(td_buf *b, const td_call *c, uint32_t id)
{
    size_t n;
    const char *p = td_api_model_piece(&c->n->api->model, id, &n);
    td_buf_chr(b, '[');
    for (size_t i = 0; i < n; i++) td_buf_fmt(b, i ? ", %u" : "%u", (unsigned char)p[i]);
    td_buf_chr(b, ']');
}

static void put_ids(td_buf *b, const uint32_t *ids, uint32_t n)
{
    td_buf_chr(b, '[');
    for (uint32_t i = 0; i < n; i++) td_buf_fmt(b, i ? ", %u" : "%u", ids[i]);
    td_buf_chr(b, ']');
}

static void put_ms(td_buf *b, const char *name, double ms)
{
    td_buf_fmt(b, "\"%s\": ", name);
    if (ms < 0) td_buf_str(b, "null");
    else td_buf_fmt(b, "%.3f", ms);
}

static void put_timings(td_buf *b, const td_timings *t)
{
    td_buf_str(b, "\"timings\": {");
    const struct {
        const char *name;
        double ms;
    } v[] = {{"queue_ms", t->queue_ms},       {"prefill_ms", t->prefill_ms},
             {"transfer_ms", t->transfer_ms}, {"transfer_exposed_ms", t->transfer_exposed_ms},
             {"ttft_ms", t->ttft_ms},         {"second_token_ms", t->second_token_ms},
             {"total_ms", t->total_ms}};
    for (unsigned i = 0; i < TD_COUNT(v); i++) {
        put_ms(b, v[i].name, v[i].ms);
        td_buf_str(b, ", ");
    }
    td_buf_str(b, "\"itl_ms\": {");
    put_ms(b, "mean", t->itl_ms_mean);
    td_buf_str(b, ", ");
    put_ms(b, "p99", t->itl_ms_p99);
    td_buf_fmt(b, "}, \"kv_bytes_shipped\": %llu}", (unsigned long long)t->kv_bytes_shipped);
}

static void put_usage(td_buf *b, const td_usage *u)
{
    td_buf_fmt(b,
               "\"usage\": {\"prompt_tokens\": %u, \"completion_tokens\": %u, \"total_tokens\": %u, "
               "\"prompt_tokens_details\": {\"cached_tokens\": %u}}",
               u->prompt_tokens, u->completion_tokens, u->prompt_tokens + u->completion_tokens,
               u->cached_tokens);
}

static void put_head(td_buf *b, const td_call *c, const char *object)
{
    td_buf_fmt(b, "{\"id\": \"%s\", \"object\": \"%s\", \"created\": %lld, \"model\": ", c->id, object,
               (long long)c->created);
    put_str(b, c->n->api->model.name);
    td_buf_str(b, ", \"system_fingerprint\": \"tandem-" TD_VERSION "\"");
}

static void put_finish(td_buf *b, const td_call *c, td_finish f, uint32_t stop_token, int stop_string)
{
    const char *reason = f == TD_FINISH_STOP     ? "\"stop\""
                         : f == TD_FINISH_LENGTH ? "\"length\""
                         : f == TD_FINISH_NONE   ? "null"
                                                 : "\"abort\"";
    td_buf_fmt(b, "\"finish_reason\": %s, \"stop_reason\": ", reason);
    bool eos = false;
    for (uint32_t i = 0; i < c->n->api->model.n_stops; i++) eos |= c->n->api->model.stops[i] == stop_token;
    if (f == TD_FINISH_STOP && stop_string >= 0) put_str(b, c->ask.stop[stop_string]);
    else if (f == TD_FINISH_STOP && !eos) td_buf_fmt(b, "%u", stop_token);
    else td_buf_str(b, "null");
}

/* ---- log probabilities ---- */

static void chat_logprob(td_buf *b, const td_call *c, uint32_t id, float lp, const td_top *top,
                         uint32_t n_top)
{
    if (b->len) td_buf_str(b, ", ");
    td_buf_str(b, "{\"token\": ");
    put_token(b, c, id);
    td_buf_str(b, ", \"logprob\": ");
    put_logprob(b, lp);
    td_buf_str(b, ", \"bytes\": ");
    put_bytes(b, c, id);
    td_buf_str(b, ", \"top_logprobs\": [");
    for (uint32_t i = 0; i < n_top; i++) {
        td_buf_str(b, i ? ", {\"token\": " : "{\"token\": ");
        put_token(b, c, top[i].id);
        td_buf_str(b, ", \"logprob\": ");
        put_logprob(b, top[i].logprob);
        td_buf_str(b, ", \"bytes\": ");
        put_bytes(b, c, top[i].id);
        td_buf_chr(b, '}');
    }
    td_buf_str(b, "]}");
}

static uint32_t code_points(const char *p, size_t n)
{
    uint32_t k = 0;
    for (size_t i = 0; i < n; i++) k += ((unsigned char)p[i] & 0xC0) != 0x80;
    return k;
}

/* The four parallel arrays of the completions API: tokens, token_logprobs, top_logprobs, text_offset. lp NAN:
 * the first token has none. */
static void completion_logprob(td_buf lp4[4], uint32_t *chars, const td_call *c, uint32_t id, float lp,
                               const td_top *top, uint32_t n_top)
{
    for (int k = 0; k < 4; k++)
        if (lp4[k].len) td_buf_str(&lp4[k], ", ");
    put_token(&lp4[0], c, id);
    td_buf_fmt(&lp4[3], "%u", *chars);
    size_t n;
    const char *p = td_api_model_piece(&c->n->api->model, id, &n);
    *chars += code_points(p, n);
    if (isnan(lp)) {
        td_buf_str(&lp4[1], "null");
        td_buf_str(&lp4[2], "null");
        return;
    }
    put_logprob(&lp4[1], lp);
    td_buf_chr(&lp4[2], '{');
    bool own = false;
    for (uint32_t i = 0; i < n_top; i++) {
        if (i) td_buf_str(&lp4[2], ", ");
        put_token(&lp4[2], c, top[i].id);
        td_buf_str(&lp4[2], ": ");
        put_logprob(&lp4[2], top[i].logprob);
        own |= top[i].id == id;
    }
    if (!own) { /* the chosen token is always among them */
        if (n_top) td_buf_str(&lp4[2], ", ");
        put_token(&lp4[2], c, id);
        td_buf_str(&lp4[2], ": ");
        put_logprob(&lp4[2], lp);
    }
    td_buf_chr(&lp4[2], '}');
}

static void add_logprobs(td_call *c, td_answer *p, const td_out *o)
{
    if (!c->ask.logprobs || !o->logprobs) return;
    for (uint32_t i = 0; i < o->n_ids; i++) {
        const td_top *top = o->top + (size_t)i * o->n_top;
        if (is_chat(c)) chat_logprob(&p->lp[0], c, o->ids[i], o->logprobs[i], top, o->n_top);
        else completion_logprob(p->lp, &p->lp_chars, c, o->ids[i], o->logprobs[i], top, o->n_top);
    }
}

static void put_logprobs(td_buf *b, const td_call *c, const td_buf echo[4], const td_buf lp[4])
{
    td_buf_str(b, "\"logprobs\": ");
    if (!c->ask.logprobs) {
        td_buf_str(b, "null");
        return;
    }
    if (is_chat(c)) {
        td_buf_str(b, "{\"content\": [");
        td_buf_add(b, lp[0].p, lp[0].len);
        td_buf_str(b, "], \"refusal\": null}");
        return;
    }
    static const char *const name[4] = {"{\"tokens\": [", ", \"token_logprobs\": [", ", \"top_logprobs\": [",
                                        ", \"text_offset\": ["};
    for (int k = 0; k < 4; k++) {
        td_buf_str(b, name[k]);
        if (echo) td_buf_add(b, echo[k].p, echo[k].len);
        if (echo && echo[k].len && lp[k].len) td_buf_str(b, ", ");
        td_buf_add(b, lp[k].p, lp[k].len);
        td_buf_chr(b, ']');
    }
    td_buf_chr(b, '}');
}

/* Prompt log probabilities: vLLM's prompt_logprobs, and the echoed part of the completions' arrays. */
static void take_scores(td_call *c, const td_out *o)
{
    td_buf *b = &c->scores;
    uint32_t n = c->n_prompt_ids[o->part], chars = 0;
    const uint32_t *ids = c->prompt_ids[o->part];
    if (c->ask.prompt_logprobs) {
        if (b->len) td_buf_str(b, ", ");
        td_buf_str(b, "[null");
        for (uint32_t i = 0; i < o->n_scores; i++) {
            const td_score *s = &o->scores[i];
            td_buf_str(b, ", {");
            bool own = false;
            for (uint32_t k = 0; k <= s->n_top; k++) {
                bool last = k == s->n_top;
                if (last && own) break;
                uint32_t id = last ? s->id : s->top[k].id;
                own |= id == s->id;
                td_buf_fmt(b, k ? ", \"%u\": {\"logprob\": " : "\"%u\": {\"logprob\": ", id);
                put_logprob(b, last ? s->logprob : s->top[k].logprob);
                td_buf_str(b, ", \"decoded_token\": ");
                put_token(b, c, id);
                td_buf_chr(b, '}');
            }
            td_buf_chr(b, '}');
        }
        td_buf_chr(b, ']');
    }
    if (!c->ask.echo || !c->ask.logprobs) return;
    td_buf *lp = &c->echo_lp[4 * o->part];
    for (uint32_t i = 0; i < n && i <= o->n_scores; i++) {
        if (!i) completion_logprob(lp, &chars, c, ids[0], NAN, NULL, 0);
        else
            completion_logprob(lp, &chars, c, ids[i], o->scores[i - 1].logprob, o->scores[i - 1].top,
                               TD_MIN(o->scores[i - 1].n_top, (uint32_t)c->ask.top_logprobs));
    }
    for (uint32_t k = 0; k < c->ask.s.n; k++) c->parts[o->part * c->ask.s.n + k].lp_chars = chars;
}

/* ---- streaming ---- */

static void event(td_call *c, td_buf *b)
{
    if (!td_exchange_started(c->x)) td_sse_start(c->x, &(td_header){"x-request-id", c->request_id}, 1);
    if (td_buf_ok(b)) td_sse_event(c->x, b->p, b->len);
    c->wrote_us = td_now_us();
}

static void put_usage_tail(td_buf *b, const td_call *c)
{
    if (c->ask.continuous_usage) {
        td_usage u = {0};
        for (uint32_t i = 0; i < c->n_jobs * c->ask.s.n; i++) u.completion_tokens += c->parts[i].n_ids;
        u.prompt_tokens = c->n_prompt_ids ? c->n_prompt_ids[0] : 0;
        td_buf_str(b, ", ");
        put_usage(b, &u);
    } else if (c->ask.include_usage) {
        td_buf_str(b, ", \"usage\": null");
    }
}

static void chunk_head(td_buf *b, const td_call *c, uint32_t index)
{
    put_head(b, c, is_chat(c) ? "chat.completion.chunk" : "text_completion");
    td_buf_fmt(b, ", \"choices\": [{\"index\": %u, ", index);
}

static void role_chunk(td_call *c, uint32_t index, uint32_t part)
{
    td_buf b;
    td_buf_init(&b, 0);
    chunk_head(&b, c, index);
    td_buf_str(&b, "\"delta\": {\"role\": \"assistant\", \"content\": \"\"}, \"logprobs\": null, "
                   "\"finish_reason\": null}]");
    if (c->ask.return_token_ids && c->prompt_ids) {
        td_buf_str(&b, ", \"prompt_token_ids\": ");
        put_ids(&b, c->prompt_ids[part], c->n_prompt_ids[part]);
    }
    put_usage_tail(&b, c);
    td_buf_chr(&b, '}');
    event(c, &b);
    td_buf_deinit(&b);
}

/* timings: on the last chunk of the last choice. */
static void delta_chunk(td_call *c, const td_out *o, const td_timings *timings)
{
    td_answer *p = part_of(c, o);
    uint32_t index = o->part * c->ask.s.n + o->choice;
    td_buf b;
    td_buf_init(&b, 0);
    bool first = !p->told_role;
    if (is_chat(c) && first) role_chunk(c, index, o->part);
    p->told_role = true;
    const char *echo = first && !is_chat(c) && c->ask.echo ? c->echo[o->part] : "";
    bool says = o->text_len || o->finish != TD_FINISH_NONE || *echo ||
                (c->ask.return_token_ids && o->n_ids) || (c->ask.logprobs && o->n_ids);
    if (says) {
        chunk_head(&b, c, index);
        td_buf_str(&b, is_chat(c) ? "\"delta\": {" : "\"text\": ");
        td_buf text;
        td_buf_init(&text, 0);
        td_buf_str(&text, echo);
        if (!c->ask.drop_output) td_buf_add(&text, o->text, o->text_len);
        if (is_chat(c) && text.len) td_buf_str(&b, "\"content\": ");
        if (!is_chat(c) || text.len) td_buf_json_str(&b, text.p, text.len);
        td_buf_deinit(&text);
        td_buf_str(&b, is_chat(c) ? "}, " : ", ");
        add_logprobs(c, p, o);
        put_logprobs(&b, c, NULL, p->lp);
        for (int k = 0; k < 4; k++) td_buf_reset(&p->lp[k]);
        td_buf_str(&b, ", ");
        put_finish(&b, c, o->finish, o->stop_token, o->stop_string);
        if (c->ask.return_token_ids) {
            td_buf_str(&b, ", \"token_ids\": ");
            put_ids(&b, o->ids, o->n_ids);
            if (first && !is_chat(c)) {
                td_buf_str(&b, ", \"prompt_token_ids\": ");
                put_ids(&b, c->prompt_ids[o->part], c->n_prompt_ids[o->part]);
            }
        }
        td_buf_str(&b, "}]");
        put_usage_tail(&b, c);
        if (timings) {
            td_buf_str(&b, ", ");
            put_timings(&b, timings);
        }
        td_buf_chr(&b, '}');
        event(c, &b);
    }
    td_buf_deinit(&b);
}

static bool all_finished(const td_call *c)
{
    for (uint32_t i = 0; i < c->n_jobs * c->ask.s.n; i++)
        if (c->parts[i].finish == TD_FINISH_NONE) return false;
    return true;
}

/* ---- the whole answer ---- */

void td_answer_add(td_call *c, td_answer *p, const td_out *o)
{
    if (!c->ask.stream && !c->ask.drop_output) td_buf_add(&p->text, o->text, o->text_len);
    if (!c->ask.stream && c->ask.return_token_ids) {
        while (p->n_ids + o->n_ids > p->cap_ids) {
            p->cap_ids = p->cap_ids ? p->cap_ids * 2 : 64;
            p->ids = td_xrealloc(p->ids, p->cap_ids * sizeof *p->ids);
        }
        memcpy(p->ids + p->n_ids, o->ids, o->n_ids * sizeof *p->ids);
    }
    p->n_ids += o->n_ids;
    p->finish = o->finish;
    p->stop_token = o->stop_token;
    p->stop_string = o->stop_string;
}

static void put_choice(td_buf *b, td_call *c, uint32_t index)
{
    td_answer *p = &c->parts[index];
    uint32_t part = index / c->ask.s.n;
    td_buf_fmt(b, "{\"index\": %u, ", index);
    if (is_chat(c)) {
        td_buf_str(b, "\"message\": {\"role\": \"assistant\", \"content\": ");
        td_buf_json_str(b, p->text.p ? p->text.p : "", p->text.len);
        td_buf_str(b, ", \"refusal\": null}, ");
    } else {
        td_buf text;
        td_buf_init(&text, 256 << 20);
        if (c->ask.echo) td_buf_str(&text, c->echo[part]);
        td_buf_add(&text, p->text.p, p->text.len);
        td_buf_str(b, "\"text\": ");
        td_buf_json_str(b, text.p ? text.p : "", text.len);
        td_buf_str(b, ", ");
        td_buf_deinit(&text);
    }
    put_logprobs(b, c, c->ask.echo ? &c->echo_lp[4 * part] : NULL, p->lp);
    td_buf_str(b, ", ");
    put_finish(b, c, p->finish, p->stop_token, p->stop_string);
    if (c->ask.return_token_ids) {
        td_buf_str(b, ", \"token_ids\": ");
        put_ids(b, p->ids, c->ask.drop_output ? 0 : p->n_ids);
        if (!is_chat(c)) {
            td_buf_str(b, ", \"prompt_token_ids\": ");
            put_ids(b, c->prompt_ids[part], c->n_prompt_ids[part]);
        }
    }
    td_buf_chr(b, '}');
}

static void whole_answer(td_call *c)
{
    td_buf *b = &c->reply;
    put_head(b, c, is_chat(c) ? "chat.completion" : "text_completion");
    td_buf_str(b, ", \"choices\": [");
    for (uint32_t i = 0; i < c->n_jobs * c->ask.s.n; i++) {
        if (i) td_buf_str(b, ", ");
        put_choice(b, c, i);
    }
    td_buf_str(b, "], ");
    if (c->ask.drop_output) c->usage.completion_tokens = 0;
    put_usage(b, &c->usage);
    if (c->ask.return_token_ids) {
        td_buf_str(b, ", \"prompt_token_ids\": ");
        put_ids(b, c->prompt_ids[0], c->n_prompt_ids[0]);
    }
    if (c->ask.prompt_logprobs) {
        td_buf_str(b, c->n_jobs > 1 ? ", \"prompt_logprobs\": [" : ", \"prompt_logprobs\": ");
        td_buf_add(b, c->scores.p, c->scores.len);
        if (c->n_jobs > 1) td_buf_chr(b, ']');
    }
    td_buf_str(b, ", ");
    put_timings(b, &c->timings);
    td_buf_chr(b, '}');
}

/* ---- the voice ---- */

static void on_out(td_call *c, const td_out *o)
{
    if (o->kind == TD_OUT_PROMPT) {
        if (c->prompt_ids) take_scores(c, o);
        return;
    }
    td_answer *p = part_of(c, o);
    td_answer_add(c, p, o);
    if (!c->ask.stream) {
        if (!c->ask.drop_output) add_logprobs(c, p, o);
        return;
    }
    /* The very last chunk waits for DONE, which is already on its way, to carry the timings. */
    if (o->finish != TD_FINISH_NONE && all_finished(c)) c->held = (td_out *)(uintptr_t)o;
    else delta_chunk(c, o, NULL);
}

static void on_done(td_call *c, const td_out *last)
{
    (void)last;
    if (!c->ask.stream) {
        whole_answer(c);
        if (td_buf_ok(&c->reply)) {
            td_call_reply(c, 200, "application/json", &c->reply);
        } else {
            td_api_error e;
            td_api_fail(&e, 500, "answer_too_large", NULL, "the answer is larger than this server can hold");
            td_call_reply_error(c, &e);
        }
        return;
    }
    if (c->held) delta_chunk(c, c->held, &c->timings);
    if (c->ask.include_usage) {
        td_buf b;
        td_buf_init(&b, 0);
        put_head(&b, c, is_chat(c) ? "chat.completion.chunk" : "text_completion");
        td_buf_str(&b, ", \"choices\": [], ");
        put_usage(&b, &c->usage);
        td_buf_str(&b, ", ");
        put_timings(&b, &c->timings);
        td_buf_chr(&b, '}');
        event(c, &b);
        td_buf_deinit(&b);
    }
    td_sse_done(c->x);
    td_exchange_finish(c->x, NULL, 0);
}

static void on_fail(td_call *c, const td_api_error *e)
{
    if (!td_exchange_started(c->x)) {
        td_call_reply_error(c, e);
        return;
    }
    td_buf b;
    td_buf_init(&b, 0);
    td_api_error_json(&b, e);
    td_sse_event(c->x, b.p, b.len);
    td_exchange_finish(c->x, NULL, 0); /* no [DONE]: the client can tell */
    td_buf_deinit(&b);
    atomic_fetch_add(&c->n->http_errors, 1);
}

static void on_quiet(td_call *c)
{
    if (!c->ask.stream) return;
    if (!td_exchange_started(c->x)) td_sse_start(c->x, &(td_header){"x-request-id", c->request_id}, 1);
    if (!td_exchange_unsent(c->x)) td_sse_comment(c->x);
}

const td_voice td_voice_openai = {on_out, on_done, on_fail, on_quiet};

static void plain_done(td_call *c, const td_out *last)
{
    (void)last;
    td_call_reply(c, 200, "application/json", &c->reply);
}

const td_voice td_voice_plain = {NULL, plain_done, on_fail, NULL};
