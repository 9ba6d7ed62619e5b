/* router/api/parse.c - on a text thread: a body becomes jobs for the core, or an error, or (tokenize) the
 * answer itself. */
// SPDX-License-Identifier: Apache-2.0
#include "common/blockhash.h"
#include "router/api/grpc.h"

#include <stdio.h>
#include <string.h>

enum {
    JSON_DEPTH = 64,
    SCRATCH_BASE = 64 << 20,
    SCRATCH_PER_BYTE = 64,
    JOB_ARENA = 256 << 20,
    RENDER_MAX = 32 << 20
};

/* Everything the KV bytes depend on besides the tokens is the same in one cluster but the tenant's salt. */
static td_h128 hash_root(const td_api *api, const char *salt)
{
    char domain[512];
    int n = snprintf(domain, sizeof domain, "salt:%zu:%s", salt ? strlen(salt) : 0, salt ? salt : "");
    return td_blockhash_root(api->hash_key, domain, (size_t)n);
}

static bool copy_sampling(td_job *j, const td_call *c)
{
    const td_api_model *m = &c->n->api->model;
    const td_sampling *s = &c->ask.s;
    j->sampling = *s;
    td_bias *bias = td_arena_copy(&j->arena, s->bias, s->n_bias * sizeof *bias);
    uint32_t *stops = td_arena_alloc(&j->arena, TD_MAX_STOP_IDS * sizeof *stops), n = 0;
    if ((s->n_bias && !bias) || !stops) return false;
    for (uint32_t i = 0; i < s->n_stop_ids; i++) stops[n++] = s->stop_ids[i];
    for (uint32_t i = 0; !s->ignore_eos && i < m->n_stops && n < TD_MAX_STOP_IDS; i++) {
        bool have = false;
        for (uint32_t k = 0; k < n; k++) have |= stops[k] == m->stops[i];
        if (!have) stops[n++] = m->stops[i];
    }
    j->sampling.bias = s->n_bias ? bias : NULL;
    j->sampling.stop_ids = stops;
    j->sampling.n_stop_ids = n;
    return true;
}

static bool copy_stop(td_job *j, const td_ask *a)
{
    const char **list = td_arena_alloc(&j->arena, (a->n_stop + 1) * sizeof *list);
    if (!list) return false;
    for (uint32_t i = 0; i < a->n_stop; i++)
        if (!(list[i] = td_arena_strndup(&j->arena, a->stop[i], strlen(a->stop[i])))) return false;
    j->stop = list;
    j->n_stop = a->n_stop;
    return true;
}

static td_job *make_job(td_call *c, uint32_t part, const uint32_t *ids, uint32_t n)
{
    td_api *api = c->n->api;
    const td_ask *a = &c->ask;
    td_job *j = td_job_new(JOB_ARENA);
    j->id = atomic_fetch_add(&api->next_id, 1) + 1;
    snprintf(j->name, sizeof j->name, "%s", c->request_id);
    j->client = c;
    j->net = c->n->index;
    j->part = part;
    j->n_prompt = n;
    j->prompt = td_arena_copy(&j->arena, ids, n * sizeof *ids);
    td_h128 *blocks = td_arena_alloc(&j->arena, (n / TD_BLOCK_TOKENS + 1) * sizeof *blocks);
    if (a->salt) {
        j->salt_bytes = (uint32_t)strlen(a->salt);
        j->salt = td_arena_copy(&j->arena, a->salt, j->salt_bytes);
    }
    if (!j->prompt || !blocks || (a->salt && !j->salt) || !copy_sampling(j, c) || !copy_stop(j, a)) {
        td_job_free(j);
        return NULL;
    }
    j->blocks = blocks;
    j->n_blocks = (uint32_t)td_blockhash_chain(api->hash_key, hash_root(api, a->salt), ids, n, blocks);
    j->max_tokens_open = !a->max_tokens_given && a->kind == TD_ASK_CHAT;
    j->max_tokens_soft = !a->max_tokens_given;
    j->include_stop = a->include_stop;
    j->skip_special = a->skip_special;
    j->want_text = api->model.tokenizer != NULL;
    j->received_us = c->received_us;
    j->deadline_us = c->deadline_us;
    return j;
}

static bool too_large(td_call *c)
{
    return td_api_fail(&c->err, 413, NULL, NULL, "the request is too large");
}

bool td_call_make_jobs(td_call *c, const uint32_t *const *ids, const uint32_t *n_ids, uint32_t n)
{
    td_ask *a = &c->ask;
    if (!a->seed_given) a->s.seed = td_api_random_u64();
    if (a->n_stop && !c->n->api->model.tokenizer)
        return td_api_fail(&c->err, 400, "no_tokenizer", "stop",
                           "this model has no tokenizer: stop strings cannot be found");
    for (uint32_t i = 0; i < n; i++)
        if (!n_ids[i]) return td_api_fail(&c->err, 400, "invalid_value", "prompt", "the prompt is empty");
    c->jobs = td_arena_alloc(&c->arena, n * sizeof *c->jobs);
    c->job_ids = td_arena_alloc(&c->arena, n * sizeof *c->job_ids);
    c->job_done = td_arena_alloc(&c->arena, n * sizeof *c->job_done);
    c->parts = td_arena_alloc(&c->arena, (size_t)n * a->s.n * sizeof *c->parts);
    if (!c->jobs || !c->job_ids || !c->job_done || !c->parts) return too_large(c);
    for (uint32_t i = 0; i < n * a->s.n; i++) c->parts[i].stop_string = -1;
    for (; c->n_jobs < n; c->n_jobs++) {
        td_job *j = make_job(c, c->n_jobs, ids[c->n_jobs], n_ids[c->n_jobs]);
        if (!j) return too_large(c);
        c->jobs[c->n_jobs] = j;
        c->job_ids[c->n_jobs] = j->id;
    }
    /* Stop strings are named in the answer: keep them when the body is gone. */
    const char **list = td_arena_alloc(&c->arena, (a->n_stop + 1) * sizeof *list);
    if (!list) return too_large(c);
    for (uint32_t i = 0; i < a->n_stop; i++)
        if (!(list[i] = td_arena_strndup(&c->arena, a->stop[i], strlen(a->stop[i])))) return too_large(c);
    a->stop = list;
    return true;
}

static bool check_model(td_call *c, const char *name)
{
    const char *ours = c->n->api->model.name;
    if (!name || !strcmp(name, ours)) return true;
    return td_api_fail(&c->err, 404, "model_not_found", "model",
                       "the model '%.128s' does not exist; this server has '%s'", name, ours);
}

/* What echo and return_token_ids need of the prompts later. */
static bool keep_prompts(td_call *c, const uint32_t *const *ids, const uint32_t *n_ids, uint32_t n)
{
    const td_ask *a = &c->ask;
    bool want_ids = a->return_token_ids || (a->echo && a->logprobs) || a->prompt_logprobs;
    if (!want_ids && !a->echo) return true;
    c->prompt_ids = td_arena_alloc(&c->arena, n * sizeof *c->prompt_ids);
    c->n_prompt_ids = td_arena_alloc(&c->arena, n * sizeof *c->n_prompt_ids);
    c->echo = td_arena_alloc(&c->arena, n * sizeof *c->echo);
    c->echo_lp = td_arena_alloc(&c->arena, 4 * n * sizeof *c->echo_lp);
    if (!c->prompt_ids || !c->n_prompt_ids || !c->echo || !c->echo_lp) return too_large(c);
    for (uint32_t i = 0; i < n; i++) {
        c->n_prompt_ids[i] = n_ids[i];
        c->prompt_ids[i] = td_arena_copy(&c->arena, ids[i], n_ids[i] * sizeof **ids);
        if (!c->prompt_ids[i]) return too_large(c);
        if (!a->echo) continue;
        td_buf b;
        td_buf_init(&b, RENDER_MAX);
        const td_prompt *p = &a->prompts[i];
        if (p->text) td_buf_add(&b, p->text, p->n_text);
        else td_api_model_decode(&c->n->api->model, ids[i], n_ids[i], a->skip_special, &b);
        c->echo[i] = td_arena_strndup(&c->arena, b.p ? b.p : "", b.len);
        td_buf_deinit(&b);
        if (!c->echo[i]) return too_large(c);
    }
    return true;
}

static bool generate(td_call *c, const td_json *body, td_arena *scratch)
{
    const td_api_model *m = &c->n->api->model;
    td_ask *a = &c->ask;
    td_ask_kind kind = c->kind == TD_TEXT_CHAT ? TD_ASK_CHAT : TD_ASK_COMPLETION;
    if (!td_ask_parse(kind, body, &m->defaults, m->vocab, scratch, a, &c->err)) return false;
    if (!a->model)
        return td_api_fail(&c->err, 400, "missing_required_parameter", "model", "'model' is missing");
    if (!check_model(c, a->model)) return false;
    const uint32_t **ids = td_arena_alloc(scratch, a->n_prompts * sizeof *ids);
    uint32_t *n_ids = td_arena_alloc(scratch, a->n_prompts * sizeof *n_ids);
    if (!ids || !n_ids) return too_large(c);
    if (kind == TD_ASK_CHAT) {
        td_buf text;
        td_buf_init(&text, RENDER_MAX);
        bool ok = td_api_model_render(m, a, scratch, &text, &c->err) &&
                  td_api_model_encode(m, text.p ? text.p : "", text.len, a->add_special, scratch, &ids[0],
                                      &n_ids[0], &c->err);
        td_buf_deinit(&text);
        if (!ok) return false;
    }
    for (uint32_t i = 0; kind == TD_ASK_COMPLETION && i < a->n_prompts; i++) {
        const td_prompt *p = &a->prompts[i];
        ids[i] = p->ids;
        n_ids[i] = p->n_ids;
        if (p->text &&
            !td_api_model_encode(m, p->text, p->n_text, a->add_special, scratch, &ids[i], &n_ids[i], &c->err))
            return false;
    }
    return td_call_make_jobs(c, ids, n_ids, a->n_prompts) && keep_prompts(c, ids, n_ids, a->n_prompts);
}

static bool tokenize(td_call *c, td_json *body, td_arena *scratch)
{
    td_api *api = c->n->api;
    td_api_error *err = &c->err;
    if (body->type != TD_JSON_OBJ) return td_api_fail(err, 400, NULL, NULL, "the body must be a JSON object");
    if (!check_model(c, td_json_str(body, "model", NULL))) return false;
    const td_json *prompt = td_json_get(body, "prompt");
    const uint32_t *ids;
    uint32_t n;
    if (td_json_get(body, "messages")) {
        td_ask ask = {.kind = TD_ASK_CHAT};
        if (!td_ask_parse(TD_ASK_CHAT, body, &api->model.defaults, api->model.vocab, scratch, &ask, err))
            return false;
        td_buf text;
        td_buf_init(&text, RENDER_MAX);
        bool ok = td_api_model_render(&api->model, &ask, scratch, &text, err) &&
                  td_api_model_encode(&api->model, text.p ? text.p : "", text.len, ask.add_special, scratch,
                                      &ids, &n, err);
        td_buf_deinit(&text);
        if (!ok) return false;
    } else {
        if (!prompt || prompt->type != TD_JSON_STR)
            return td_api_fail(err, 400, "invalid_type", "prompt",
                               "'prompt' must be a string (or send 'messages')");
        const td_json *special = td_json_get(body, "add_special_tokens");
        if (special && special->type != TD_JSON_BOOL)
            return td_api_fail(err, 400, "invalid_type", "add_special_tokens",
                               "'add_special_tokens' must be a boolean");
        if (!td_api_model_encode(&api->model, prompt->s, prompt->n, !special || special->truth, scratch, &ids,
                                 &n, err))
            return false;
    }
    uint32_t len = atomic_load(&api->max_model_len);
    td_buf_fmt(&c->reply, "{\"count\": %u, \"max_model_len\": %u, \"tokens\": [", n,
               len ? len : api->model.max_len);
    for (uint32_t i = 0; i < n; i++) td_buf_fmt(&c->reply, i ? ", %u" : "%u", ids[i]);
    td_buf_str(&c->reply, "]}");
    return true;
}

static bool detokenize(td_call *c, const td_json *body, td_arena *scratch)
{
    td_api *api = c->n->api;
    if (body->type != TD_JSON_OBJ)
        return td_api_fail(&c->err, 400, NULL, NULL, "the body must be a JSON object");
    if (!check_model(c, td_json_str(body, "model", NULL))) return false;
    if (!api->model.tokenizer)
        return td_api_fail(&c->err, 400, "no_tokenizer", NULL, "this model has no tokenizer");
    const td_json *v = td_json_get(body, "tokens");
    const uint32_t *ids;
    uint32_t n;
    if (!v) return td_api_fail(&c->err, 400, "missing_required_parameter", "tokens", "'tokens' is missing");
    if (!td_ask_ids(v, "tokens", api->model.vocab, scratch, &ids, &n, &c->err)) return false;
    td_buf text;
    td_buf_init(&text, RENDER_MAX);
    td_api_model_decode(&api->model, ids, n, false, &text);
    td_buf_str(&c->reply, "{\"prompt\": ");
    td_buf_json_str(&c->reply, text.p ? text.p : "", text.len);
    td_buf_str(&c->reply, "}");
    td_buf_deinit(&text);
    return true;
}



void td_call_parse_text(td_call *c)
{
    td_arena scratch;
    td_arena_init(&scratch, SCRATCH_BASE + SCRATCH_PER_BYTE * c->body.len);
    td_json *body = NULL;
    bool ok;
    if (c->kind == TD_TEXT_GRPC) ok = td_grpc_parse_text(c, &scratch);
    else {
        td_status s = td_json_parse(&scratch, c->body.p ? c->body.p : "", c->body.len,
                                    (td_json_limits){JSON_DEPTH, 0}, &body);
        if (s == TD_EFULL)
            ok = td_api_fail(&c->err, 400, "invalid_json", NULL, "the JSON is too large or too deep: %s",
                             td_reason());
        else if (s != TD_OK)
            ok = td_api_fail(&c->err, 400, "invalid_json", NULL, "the body is not valid JSON: %s",
                             td_reason());
        else if (c->kind == TD_TEXT_TOKENIZE) ok = tokenize(c, body, &scratch);
        else if (c->kind == TD_TEXT_DETOKENIZE) ok = detokenize(c, body, &scratch);
        else ok = generate(c, body, &scratch);
    }
    c->failed = !ok;
    /* What pointed into the scratch arena is of no use any more. */
    c->ask.model = c->ask.salt = NULL;
    c->ask.messages = c->ask.tools = c->ask.template_kwargs = NULL;
    c->ask.prompts = NULL;
    c->ask.s.bias = NULL;
    c->ask.s.stop_ids = NULL;
    if (!ok) c->ask.stop = NULL;
    td_arena_deinit(&scratch);
}
