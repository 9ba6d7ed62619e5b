/* router/api/grpc.c - the client API over gRPC: the same calls and jobs as over HTTP, other words. */
// SPDX-License-Identifier: Apache-2.0
#include "router/api/grpc.h"
#include "common/check.h"
#include "common/clock.h"
#include "health.pb-c.h"
#include "inference.pb-c.h"
#include "router/api/openai.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#define PB(name) Tandem__V1__##name

enum { ANSWER_ARENA_BYTES = 256 << 20, MESSAGE_MAX_BYTES = 8 << 20 };

typedef enum { GENERATE, COMPLETE, TOKENIZE, LIST_MODELS, CHECK, WATCH } method;
typedef struct grpc_call {
    method m;
    td_api_net *n;
    int told;                  /* WATCH: the state last sent; -1: none */
    struct grpc_call *next;    /* WATCH: of the thread */
    td_exchange *x;
    /* COMPLETE: the answer so far, in the call's arena */
    PB(TokenLogprob) ***lp;    /* [n][tokens] */
    uint32_t *n_lp, *cap_lp;
    PB(TokenLogprob) **scores;
    uint32_t n_scores;
    td_arena arena;
} grpc_call;

/* ---- protobuf ---- */

static void *arena_alloc(void *a, size_t n) { return td_arena_alloc(a, n); }
static void arena_free(void *a, void *p) { (void)a, (void)p; }
static ProtobufCAllocator in_arena(td_arena *a) { return (ProtobufCAllocator){arena_alloc, arena_free, a}; }

static void send_message(td_exchange *x, const ProtobufCMessage *m)
{
    size_t n = protobuf_c_message_get_packed_size(m);
    uint8_t *p = td_xalloc(n + 1);
    protobuf_c_message_pack(m, p);
    td_grpc_send(x, p, n);
    free(p);
}

static void finish(td_exchange *x, td_grpc_status s, const char *why) { td_grpc_finish(x, s, why); }

/* ---- the request, on a text thread ---- */

static bool bad(td_api_error *e, const char *param, const char *what)
{
    return td_api_fail(e, 400, "invalid_value", param, "%s: %s", param, what);
}

static bool number(td_api_error *e, const char *name, double v, double lo, double hi, bool open_lo)
{
    if (isfinite(v) && v >= lo && v <= hi && !(open_lo && v == lo)) return true;
    return td_api_fail(e, 400, "invalid_value", name, "%s is %.10g; it must be %s %.10g and at most %.10g", name, v,
                       open_lo ? "greater than" : "at least", lo, hi);
}

#define TRY(e)                  \
    do {                        \
        if (!(e)) return false; \
    } while (0)

static bool at_most(td_api_error *e, const char *name, size_t n, size_t most)
{
    if (n <= most) return true;
    return td_api_fail(e, 400, "invalid_value", name, "%s has %zu entries; at most %zu are allowed", name, n, most);
}

static bool known_id(td_api_error *e, const td_api_model *m, const char *name, uint32_t id)
{
    if (!m->vocab || id < m->vocab) return true;
    return td_api_fail(e, 400, "invalid_value", name, "%s: token id %u is outside the vocabulary of %u", name, id, m->vocab);
}

static double or_else(double v, double d) { return isnan(v) ? d : v; }

static bool take_sampling(const td_api_model *m, const PB(SamplingParams) * p, td_arena *a, td_ask *o,
                          td_api_error *e)
{
    static const PB(SamplingParams) none = TANDEM__V1__SAMPLING_PARAMS__INIT;
    const td_defaults *d = &m->defaults;
    if (!p) p = &none;
    double temperature = p->temperature__case ? (double)p->temperature : or_else(d->temperature, 1);
    double top_p = p->top_p__case ? (double)p->top_p : or_else(d->top_p, 1);
    double min_p = p->min_p__case ? (double)p->min_p : or_else(d->min_p, 0);
    double rep =
        p->repetition_penalty__case ? (double)p->repetition_penalty : or_else(d->repetition_penalty, 1);
    double pres = p->presence_penalty__case ? (double)p->presence_penalty : 0,
           freq = p->frequency_penalty__case ? (double)p->frequency_penalty : 0;
    double top_k = p->top_k__case ? p->top_k : or_else(d->top_k, 0);
    uint32_t n = p->n__case ? p->n : 1;
    TRY(number(e, "temperature", temperature, 0, 2, false));
    TRY(number(e, "top_p", top_p, 0, 1, true));
    TRY(number(e, "min_p", min_p, 0, 1, false));
    TRY(number(e, "repetition_penalty", rep, 0, 10, true));
    TRY(number(e, "presence_penalty", pres, -2, 2, false));
    TRY(number(e, "frequency_penalty", freq, -2, 2, false));
    TRY(number(e, "top_k", top_k, -1, INT32_MAX, false));
    TRY(number(e, "n", n, 1, TD_MAX_CHOICES, false));
    o->max_tokens_given = p->max_tokens__case != 0;
    uint32_t max = o->max_tokens_given ? p->max_tokens : o->kind == TD_ASK_CHAT ? INT32_MAX : 16;
    TRY(number(e, "max_tokens", max, 1, INT32_MAX, false));
    if (o->max_tokens_given) TRY(number(e, "min_tokens", p->min_tokens, 0, max, false));
    o->seed_given = p->seed__case != 0;
    o->include_stop = p->include_stop;
    o->s = (td_sampling){.temperature = (float)temperature,
                         .top_p = (float)top_p,
                         .min_p = (float)min_p,
                         .repetition_penalty = (float)rep,
                         .presence_penalty = (float)pres,
                         .frequency_penalty = (float)freq,
                         .top_k = (int32_t)top_k,
                         .n = n,
                         .max_tokens = max,
                         .min_tokens = p->min_tokens,
                         .seed = p->seed,
                         .ignore_eos = p->ignore_eos,
                         .logprobs = -1,
                         .prompt_logprobs = -1};
    TRY(at_most(e, "stop", p->n_stop, TD_MAX_STOP_STRINGS));
    for (size_t i = 0; i < p->n_stop; i++)
        if (!p->stop[i][0] || strlen(p->stop[i]) > TD_ASK_STOP_BYTES)
            return td_api_fail(e, 400, "invalid_value", "stop", "stop: a string must have 1 to %d bytes", (int)TD_ASK_STOP_BYTES);
    o->stop = (const char *const *)p->stop;
    o->n_stop = (uint32_t)p->n_stop;
    TRY(at_most(e, "stop_token_ids", p->n_stop_token_ids, TD_MAX_STOP_IDS / 2));
    for (size_t i = 0; i < p->n_stop_token_ids; i++)
        TRY(known_id(e, m, "stop_token_ids", p->stop_token_ids[i]));
    o->s.stop_ids = p->stop_token_ids;
    o->s.n_stop_ids = (uint32_t)p->n_stop_token_ids;
    TRY(at_most(e, "logit_bias", p->n_logit_bias, TD_MAX_LOGIT_BIAS));
    td_bias *b = td_arena_alloc(a, (p->n_logit_bias + 1) * sizeof *b);
    if (!b) return bad(e, "logit_bias", "too many entries");
    for (size_t i = 0; i < p->n_logit_bias; i++) {
        TRY(known_id(e, m, "logit_bias", p->logit_bias[i]->id));
        TRY(number(e, "logit_bias", (double)p->logit_bias[i]->bias, -100, 100, false));
        b[i] = (td_bias){p->logit_bias[i]->id, p->logit_bias[i]->bias};
    }
    o->s.bias = b;
    o->s.n_bias = (uint32_t)p->n_logit_bias;
    return true;
}

static bool parse_json(td_arena *a, const char *text, const char *param, td_json **out, td_api_error *e)
{
    td_status s = td_json_parse(a, text, strlen(text), (td_json_limits){0}, out);
    if (s == TD_OK) return true;
    return td_api_fail(e, 400, "invalid_json", param, "%s is not valid JSON: %s", param, td_reason());
}

/* Typed messages become the array that templates read. */
static bool chat_messages(const PB(ChatInput) *in, td_arena *a, td_ask *o, td_api_error *e)
{
    td_json *messages = NULL, *tools = NULL;
    if (in->messages_json[0] && in->n_messages) return bad(e, "messages", "messages or messages_json, not both");
    if (in->messages_json[0]) {
        TRY(parse_json(a, in->messages_json, "messages_json", &messages, e));
    } else {
        td_buf b;
        td_buf_init(&b, MESSAGE_MAX_BYTES * 2);
        td_buf_chr(&b, '[');
        for (size_t i = 0; i < in->n_messages; i++) {
            td_buf_str(&b, i ? ", {\"role\": " : "{\"role\": ");
            td_buf_json_str(&b, in->messages[i]->role, strlen(in->messages[i]->role));
            td_buf_str(&b, ", \"content\": ");
            td_buf_json_str(&b, in->messages[i]->content, strlen(in->messages[i]->content));
            td_buf_chr(&b, '}');
        }
        td_buf_chr(&b, ']');
        bool ok =
            td_buf_ok(&b) ? parse_json(a, b.p, "messages", &messages, e) : bad(e, "messages", "too large");
        td_buf_deinit(&b);
        TRY(ok);
    }
    if (in->tools_json[0]) {
        TRY(parse_json(a, in->tools_json, "tools_json", &tools, e));
        if (tools->type != TD_JSON_ARR) return bad(e, "tools_json", "not a list");
    }
    TRY(td_ask_messages(messages, e));
    o->messages = messages;
    o->tools = tools && tools->n ? tools : NULL;
    o->add_generation_prompt = true;
    return true;
}

static bool chat_ids(const td_api_model *m, const PB(ChatInput) * in, td_arena *a, td_ask *o,
                     const uint32_t **ids, uint32_t *n, td_api_error *e)
{
    TRY(chat_messages(in, a, o, e));
    td_buf text;
    td_buf_init(&text, MESSAGE_MAX_BYTES * 4);
    bool ok = td_api_model_render(m, o, a, &text, e) &&
              td_api_model_encode(m, text.p ? text.p : "", text.len, false, a, ids, n, e);
    td_buf_deinit(&text);
    return ok;
}

static bool name_is_ours(const td_api_model *m, const char *name, bool required, td_api_error *e)
{
    if (!name[0] && required) return bad(e, "model", "missing");
    if (!name[0] || !strcmp(name, m->name)) return true;
    return td_api_fail(e, 404, "model_not_found", "model",
                       "the model '%.128s' does not exist; this server has '%s'", name, m->name);
}

static bool generate_request(td_call *c, td_arena *a)
{
    const td_api_model *m = &c->n->api->model;
    td_ask *o = &c->ask;
    ProtobufCAllocator al = in_arena(a);
    const PB(GenerateRequest) *q =
        tandem__v1__generate_request__unpack(&al, c->body.len, (const uint8_t *)c->body.p);
    if (!q)
        return td_api_fail(&c->err, 400, NULL, NULL, "the message is not a GenerateRequest, or too large");
    TRY(name_is_ours(m, q->model, true, &c->err));
    bool stream = ((grpc_call *)c->grpc)->m == GENERATE;
    *o = (td_ask){.stream = stream,
                  .skip_special = true,
                  .n_prompts = 1,
                  .return_token_ids = true,
                  .kind = q->input_case == TANDEM__V1__GENERATE_REQUEST__INPUT_CHAT ? TD_ASK_CHAT
                                                                                    : TD_ASK_COMPLETION};
    TRY(take_sampling(m, q->sampling, a, o, &c->err));
    if (q->logprobs__case) {
        if (q->logprobs > TD_MAX_TOP_LOGPROBS) return bad(&c->err, "logprobs", "more than 20");
        o->logprobs = true;
        o->top_logprobs = o->s.logprobs = (int32_t)q->logprobs;
    }
    if (q->prompt_logprobs__case) {
        if (stream) return bad(&c->err, "prompt_logprobs", "cannot be streamed: use Complete");
        if (q->prompt_logprobs > TD_MAX_TOP_LOGPROBS) return bad(&c->err, "prompt_logprobs", "more than 20");
        o->prompt_logprobs = true;
        o->s.prompt_logprobs = (int32_t)q->prompt_logprobs;
    }
    if (strlen(q->cache_salt) > TD_ASK_SALT_BYTES) return bad(&c->err, "cache_salt", "too long");
    if (q->cache_salt[0]) o->salt = q->cache_salt;
    if (q->request_id[0] && strlen(q->request_id) < sizeof c->request_id)
        strcpy(c->request_id, q->request_id);
    const uint32_t *ids;
    uint32_t n;
    switch (q->input_case) {
    case TANDEM__V1__GENERATE_REQUEST__INPUT_TOKENS:
        ids = q->tokens->ids;
        if (q->tokens->n_ids > INT32_MAX) return bad(&c->err, "tokens", "too many");
        n = (uint32_t)q->tokens->n_ids;
        for (uint32_t i = 0; i < n; i++)
            if (m->vocab && ids[i] >= m->vocab)
                return td_api_fail(&c->err, 400, "invalid_value", "tokens",
                                   "token id %u at position %u is outside the vocabulary of %u", ids[i], i,
                                   m->vocab);
        break;
    case TANDEM__V1__GENERATE_REQUEST__INPUT_TEXT:
        TRY(td_api_model_encode(m, q->text, strlen(q->text), true, a, &ids, &n, &c->err));
        break;
    case TANDEM__V1__GENERATE_REQUEST__INPUT_CHAT: TRY(chat_ids(m, q->chat, a, o, &ids, &n, &c->err)); break;
    default: return bad(&c->err, "input", "missing: tokens, text or chat");
    }
    return td_call_make_jobs(c, &ids, &n, 1);
}

static bool tokenize_request(td_call *c, td_arena *a)
{
    const td_api_model *m = &c->n->api->model;
    ProtobufCAllocator al = in_arena(a);
    const PB(TokenizeRequest) *q =
        tandem__v1__tokenize_request__unpack(&al, c->body.len, (const uint8_t *)c->body.p);
    if (!q)
        return td_api_fail(&c->err, 400, NULL, NULL, "the message is not a TokenizeRequest, or too large");
    TRY(name_is_ours(m, q->model, false, &c->err));
    td_ask ask = {.kind = TD_ASK_CHAT};
    const uint32_t *ids;
    uint32_t n;
    if (q->input_case == TANDEM__V1__TOKENIZE_REQUEST__INPUT_TEXT)
        TRY(td_api_model_encode(m, q->text, strlen(q->text), !q->no_special, a, &ids, &n, &c->err));
    else if (q->input_case == TANDEM__V1__TOKENIZE_REQUEST__INPUT_CHAT)
        TRY(chat_ids(m, q->chat, a, &ask, &ids, &n, &c->err));
    else return bad(&c->err, "input", "missing: text or chat");
    PB(TokenizeResponse) r = TANDEM__V1__TOKENIZE_RESPONSE__INIT;
    r.n_ids = n;
    r.ids = (uint32_t *)(uintptr_t)ids;
    uint32_t len = atomic_load(&c->n->api->max_model_len);
    r.max_model_len = len ? len : m->max_len;
    size_t bytes = tandem__v1__tokenize_response__get_packed_size(&r);
    uint8_t *p = td_arena_alloc(a, bytes + 1);
    if (!p) return td_api_fail(&c->err, 413, NULL, NULL, "the answer is too large");
    td_buf_add(&c->reply, p, tandem__v1__tokenize_response__pack(&r, p));
    return true;
}

bool td_grpc_parse_text(td_call *c, td_arena *scratch)
{
    grpc_call *g = c->grpc;
    return g->m == TOKENIZE ? tokenize_request(c, scratch) : generate_request(c, scratch);
}

/* ---- the answer ---- */

/* One token's report, in an arena; NULL when that is full. */
static PB(TokenLogprob) * token_logprob(const td_api_model *m, td_arena *a, uint32_t id, float lp,
                                        const td_top *top, uint32_t n_top)
{
    size_t n;
    PB(TokenLogprob) *t = td_arena_alloc(a, sizeof *t);
    PB(TopLogprob) **list = td_arena_alloc(a, (n_top + 1) * sizeof *list);
    if (!t || !list) return NULL;
    tandem__v1__token_logprob__init(t);
    const char *p = td_api_model_piece(m, id, &n);
    t->id = id;
    t->logprob = lp;
    t->text = td_arena_strndup(a, p, n);
    for (uint32_t i = 0; i < n_top; i++) {
        PB(TopLogprob) *k = list[i] = td_arena_alloc(a, sizeof *k);
        if (!k) return NULL;
        tandem__v1__top_logprob__init(k);
        p = td_api_model_piece(m, top[i].id, &n);
        k->id = top[i].id;
        k->logprob = top[i].logprob;
        k->text = td_arena_strndup(a, p, n);
        if (!k->text) return NULL;
    }
    t->top = list;
    t->n_top = n_top;
    return t->text ? t : NULL;
}

static PB(FinishReason) reason_of(td_finish f)
{
    switch (f) {
    case TD_FINISH_STOP: return TANDEM__V1__FINISH_REASON__FINISH_STOP;
    case TD_FINISH_LENGTH: return TANDEM__V1__FINISH_REASON__FINISH_LENGTH;
    case TD_FINISH_NONE: return TANDEM__V1__FINISH_REASON__FINISH_UNSPECIFIED;
    default: return TANDEM__V1__FINISH_REASON__FINISH_CANCELLED;
    }
}

static void fill_usage(const td_call *c, PB(Usage) *u, PB(Timings) *t)
{
    tandem__v1__usage__init(u);
    tandem__v1__timings__init(t);
    u->prompt_tokens = c->usage.prompt_tokens;
    u->completion_tokens = c->usage.completion_tokens;
    u->cached_tokens = c->usage.cached_tokens;
    u->placements = c->usage.placements;
    const td_timings *v = &c->timings;
#define MS(x) ((x) < 0 ? 0 : (x))
    t->queue_ms = MS(v->queue_ms);
    t->prefill_ms = MS(v->prefill_ms);
    t->transfer_ms = MS(v->transfer_ms);
    t->transfer_exposed_ms = MS(v->transfer_exposed_ms);
    t->ttft_ms = MS(v->ttft_ms);
    t->second_token_ms = MS(v->second_token_ms);
    t->itl_ms_mean = MS(v->itl_ms_mean);
    t->itl_ms_p99 = MS(v->itl_ms_p99);
#undef MS
    t->kv_bytes_shipped = v->kv_bytes_shipped;
}

static void send_event(td_call *c, const td_out *o, bool last)
{
    PB(GenerateEvent) e = TANDEM__V1__GENERATE_EVENT__INIT;
    PB(Usage) usage;
    PB(Timings) timings;
    td_arena a;
    td_arena_init(&a, MESSAGE_MAX_BYTES);
    e.index = o->choice;
    e.token_offset = o->offset;
    e.n_token_ids = o->n_ids;
    e.token_ids = (uint32_t *)(uintptr_t)o->ids;
    char *text = td_arena_strndup(&a, o->text, o->text_len);
    if (text) e.text = text;
    e.finish_reason = reason_of(o->finish);
    e.request_id = c->request_id;
    if (o->finish == TD_FINISH_STOP && o->stop_string >= 0) {
        e.stop__case = TANDEM__V1__GENERATE_EVENT__STOP__STOP_STRING;
        e.stop_string = (char *)(uintptr_t)c->ask.stop[o->stop_string];
    } else if (o->finish == TD_FINISH_STOP) {
        e.stop__case = TANDEM__V1__GENERATE_EVENT__STOP__STOP_TOKEN_ID;
        e.stop_token_id = o->stop_token;
    }
    PB(TokenLogprob) **lp =
        o->logprobs && c->ask.logprobs ? td_arena_alloc(&a, (o->n_ids + 1) * sizeof *lp) : NULL;
    for (uint32_t i = 0; lp && i < o->n_ids; i++) {
        lp[i] = token_logprob(&c->n->api->model, &a, o->ids[i], o->logprobs[i], o->top + (size_t)i * o->n_top,
                              o->n_top);
        if (!lp[i]) break;
        e.n_logprobs = i + 1;
    }
    e.logprobs = lp;
    if (last) {
        fill_usage(c, &usage, &timings);
        e.usage = &usage;
        e.timings = &timings;
    }
    send_message(c->x, &e.base);
    td_arena_deinit(&a);
    c->wrote_us = td_now_us();
}

static void collect_logprobs(td_call *c, grpc_call *g, const td_out *o)
{
    uint32_t k = o->choice;
    if (!c->ask.logprobs || !o->logprobs) return;
    if (!g->lp) {
        g->lp = td_arena_alloc(&g->arena, c->ask.s.n * sizeof *g->lp);
        g->n_lp = td_arena_alloc(&g->arena, c->ask.s.n * sizeof *g->n_lp);
        g->cap_lp = td_arena_alloc(&g->arena, c->ask.s.n * sizeof *g->cap_lp);
        if (!g->lp || !g->n_lp || !g->cap_lp) return;
    }
    for (uint32_t i = 0; i < o->n_ids; i++) {
        if (g->n_lp[k] == g->cap_lp[k]) {
            uint32_t cap = g->cap_lp[k] ? 2 * g->cap_lp[k] : 32;
            PB(TokenLogprob) **more = td_arena_alloc(&g->arena, cap * sizeof *more);
            if (!more) return;
            if (g->n_lp[k]) memcpy(more, g->lp[k], g->n_lp[k] * sizeof *more);
            g->lp[k] = more;
            g->cap_lp[k] = cap;
        }
        PB(TokenLogprob) *t = token_logprob(&c->n->api->model, &g->arena, o->ids[i], o->logprobs[i],
                                            o->top + (size_t)i * o->n_top, o->n_top);
        if (!t) return;
        g->lp[k][g->n_lp[k]++] = t;
    }
}

static void take_scores(td_call *c, grpc_call *g, const td_out *o)
{
    g->scores = td_arena_alloc(&g->arena, (o->n_scores + 1) * sizeof *g->scores);
    for (uint32_t i = 0; g->scores && i < o->n_scores; i++) {
        const td_score *s = &o->scores[i];
        g->scores[i] = token_logprob(&c->n->api->model, &g->arena, s->id, s->logprob, s->top, s->n_top);
        if (!g->scores[i]) return;
        g->n_scores = i + 1;
    }
}

static void on_out(td_call *c, const td_out *o)
{
    grpc_call *g = c->grpc;
    if (o->kind == TD_OUT_PROMPT) {
        take_scores(c, g, o);
        return;
    }
    td_answer *p = &c->parts[o->choice];
    td_answer_add(c, p, o);
    if (g->m == COMPLETE) {
        collect_logprobs(c, g, o);
        return;
    }
    bool all = o->finish != TD_FINISH_NONE;
    for (uint32_t i = 0; i < c->ask.s.n; i++) all &= c->parts[i].finish != TD_FINISH_NONE;
    if (all) c->held = (td_out *)(uintptr_t)o; /* waits for usage and timings */
    else send_event(c, o, false);
}

static void send_result(td_call *c, grpc_call *g)
{
    uint32_t n = c->ask.s.n;
    PB(GenerateResult) r = TANDEM__V1__GENERATE_RESULT__INIT;
    PB(Usage) usage;
    PB(Timings) timings;
    PB(Choice) *choice = td_xalloc(n * sizeof *choice), **list = td_xalloc(n * sizeof *list);
    for (uint32_t i = 0; i < n; i++) {
        td_answer *p = &c->parts[i];
        PB(Choice) *k = list[i] = &choice[i];
        tandem__v1__choice__init(k);
        k->index = i;
        k->n_token_ids = p->n_ids;
        k->token_ids = p->ids;
        td_buf_str(&p->text, "");
        if (p->text.p && strlen(p->text.p) == p->text.len) k->text = p->text.p;
        k->finish_reason = reason_of(p->finish);
        if (g->lp) {
            k->n_logprobs = g->n_lp[i];
            k->logprobs = g->lp[i];
        }
        if (p->finish != TD_FINISH_STOP) continue;
        k->stop__case = p->stop_string >= 0 ? TANDEM__V1__CHOICE__STOP__STOP_STRING
                                            : TANDEM__V1__CHOICE__STOP__STOP_TOKEN_ID;
        if (p->stop_string >= 0) k->stop_string = (char *)(uintptr_t)c->ask.stop[p->stop_string];
        else k->stop_token_id = p->stop_token;
    }
    fill_usage(c, &usage, &timings);
    r.request_id = c->request_id;
    r.n_choices = n;
    r.choices = list;
    r.n_prompt_logprobs = g->n_scores;
    r.prompt_logprobs = g->scores;
    r.usage = &usage;
    r.timings = &timings;
    send_message(c->x, &r.base);
    free(choice);
    free(list);
}

static void on_done(td_call *c, const td_out *last)
{
    (void)last;
    grpc_call *g = c->grpc;
    if (g->m == TOKENIZE) td_grpc_send(c->x, c->reply.p, c->reply.len);
    else if (g->m == COMPLETE) send_result(c, g);
    else if (c->held) send_event(c, c->held, true);
    finish(c->x, TD_GRPC_OK, NULL);
}

static void on_fail(td_call *c, const td_api_error *e)
{
    finish(c->x, td_api_error_grpc(e), e->message);
    atomic_fetch_add(&c->n->http_errors, 1);
}

static const td_voice voice = {on_out, on_done, on_fail, NULL};

/* ---- health ---- */

static int serving(const td_api *a)
{
    bool ok = td_api_alive(a) && atomic_load(&a->ready) && !atomic_load(&a->draining);
    return ok ? GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVING
              : GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__NOT_SERVING;
}

static void send_health(td_exchange *x, int status)
{
    Grpc__Health__V1__HealthCheckResponse r = GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__INIT;
    r.status = (Grpc__Health__V1__HealthCheckResponse__ServingStatus)status;
    send_message(x, &r.base);
}

static void watcher_left(void *user)
{
    grpc_call *g = user, **p = (grpc_call **)&g->n->watchers;
    while (*p && *p != g) p = &(*p)->next;
    if (*p) *p = g->next;
    free(g);
}

void td_grpc_health_changed(td_api_net *n)
{
    int now = serving(n->api);
    for (grpc_call *g = n->watchers; g; g = g->next) {
        if (g->told == now ||
            g->told == GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN)
            continue;
        g->told = now;
        send_health(g->x, now);
    }
}

/* A watch never ends by itself: in a drain it would hold the server open. */
void td_grpc_watches_end(td_api_net *n)
{
    while (n->watchers) {
        grpc_call *g = n->watchers;
        n->watchers = g->next;
        finish(g->x, TD_GRPC_UNAVAILABLE, "the server is shutting down");
        free(g);
    }
}

static void health(td_api_net *n, td_exchange *x, const td_grpc_call *call, bool watch)
{
    td_arena a;
    td_arena_init(&a, 65536);
    ProtobufCAllocator al = in_arena(&a);
    Grpc__Health__V1__HealthCheckRequest *q =
        call->msg_len > 4096 ? NULL
                             : grpc__health__v1__health_check_request__unpack(&al, call->msg_len, call->msg);
    bool known = q && (!q->service[0] || !strcmp(q->service, "tandem.v1.Inference") ||
                       !strcmp(q->service, "grpc.health.v1.Health"));
    if (!q) finish(x, TD_GRPC_INVALID_ARGUMENT, "the message is not a HealthCheckRequest");
    else if (!watch && !known) finish(x, TD_GRPC_NOT_FOUND, "unknown service");
    else if (!watch) {
        send_health(x, serving(n->api));
        finish(x, TD_GRPC_OK, NULL);
    } else {
        grpc_call *g = td_xalloc(sizeof *g);
        *g = (grpc_call){.m = WATCH, .n = n, .x = x, .next = n->watchers};
        n->watchers = g;
        td_exchange_set_user(x, g, watcher_left);
        g->told = known ? serving(n->api)
                        : GRPC__HEALTH__V1__HEALTH_CHECK_RESPONSE__SERVING_STATUS__SERVICE_UNKNOWN;
        send_health(x, g->told);
    }
    td_arena_deinit(&a);
}

/* ---- methods ---- */

static void list_models(td_api_net *n, td_exchange *x)
{
    PB(ListModelsResponse) r = TANDEM__V1__LIST_MODELS_RESPONSE__INIT;
    PB(Model) m = TANDEM__V1__MODEL__INIT, *list[1] = {&m};
    uint32_t len = atomic_load(&n->api->max_model_len);
    m.id = n->api->model.name;
    m.max_model_len = len ? len : n->api->model.max_len;
    m.created = n->api->model.created;
    r.models = list;
    r.n_models = 1;
    send_message(x, &r.base);
    finish(x, TD_GRPC_OK, NULL);
}

static void to_text(td_api_net *n, td_exchange *x, const td_grpc_call *call, method m)
{
    if (call->msg_len > MESSAGE_MAX_BYTES) {
        finish(x, TD_GRPC_RESOURCE_EXHAUSTED, "the message is larger than 8 MiB");
        return;
    }
    td_call *c = td_call_new(n, x, TD_TEXT_GRPC, &voice);
    grpc_call *g = td_arena_alloc(&c->arena, sizeof *g);
    TD_CHECK(g);
    g->m = m;
    td_arena_init(&g->arena, ANSWER_ARENA_BYTES);
    c->grpc = g;
    int64_t now = td_now_us();
    if (call->timeout_us < c->deadline_us - now) c->deadline_us = now + call->timeout_us;
    td_buf_add(&c->body, call->msg, call->msg_len);
    td_call_parse(c);
}

void td_grpc_call_free(td_call *c)
{
    grpc_call *g = c->grpc;
    if (g) td_arena_deinit(&g->arena);
}

void td_grpc_handle(td_api_net *n, td_exchange *x)
{
    td_grpc_call call;
    if (!td_grpc_open(x, &call)) return;
    bool inference = !strcmp(call.service, "tandem.v1.Inference"),
         is_health = !strcmp(call.service, "grpc.health.v1.Health");
    if (is_health && !strcmp(call.method, "Check")) health(n, x, &call, false);
    else if (is_health && !strcmp(call.method, "Watch")) health(n, x, &call, true);
    else if (!td_api_authorized(n->api, x))
        finish(x, TD_GRPC_UNAUTHENTICATED, "the API key is missing or wrong");
    else if (inference && !strcmp(call.method, "Generate")) to_text(n, x, &call, GENERATE);
    else if (inference && !strcmp(call.method, "Complete")) to_text(n, x, &call, COMPLETE);
    else if (inference && !strcmp(call.method, "Tokenize")) to_text(n, x, &call, TOKENIZE);
    else if (inference && !strcmp(call.method, "ListModels")) list_models(n, x);
    else finish(x, TD_GRPC_UNIMPLEMENTED, "unknown method");
}
