/* router/api/model.c - reading the model folder. */
// SPDX-License-Identifier: Apache-2.0
#include "router/api/model.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "router/text/chat.h"
#include "router/text/detok.h"

#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { CONFIG_MAX_BYTES = 4 << 20, JSON_ARENA_BYTES = 64 << 20 };

/* A small JSON file of the folder; *out NULL when there is none. */
static td_status read_json(const char *dir, const char *name, td_arena *a, td_json **out)
{
    *out = NULL;
    char path[4300];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return errno == ENOENT ? TD_OK : td_fail(TD_EIO, "%s: %s", name, strerror(errno));
    td_buf b;
    td_buf_init(&b, CONFIG_MAX_BYTES);
    char chunk[16384];
    ssize_t n;
    while ((n = read(fd, chunk, sizeof chunk)) > 0) td_buf_add(&b, chunk, (size_t)n);
    close(fd);
    td_status s = TD_OK;
    if (n < 0) s = td_fail(TD_EIO, "%s: %s", name, strerror(errno));
    else if (!td_buf_ok(&b)) s = td_fail(TD_EFULL, "%s is larger than %d bytes", name, CONFIG_MAX_BYTES);
    else s = td_json_parse(a, b.p ? b.p : "", b.len, (td_json_limits){0}, out);
    td_buf_deinit(&b);
    return s;
}

static bool is_number(const td_json *v) { return v && (v->type == TD_JSON_INT || v->type == TD_JSON_REAL); }

static double number_or_nan(const td_json *o, const char *key)
{
    const td_json *v = td_json_get(o, key);
    return is_number(v) && isfinite(v->num) ? v->num : NAN;
}

static void add_stop(td_api_model *m, int64_t id)
{
    if (id < 0 || id > INT32_MAX || m->n_stops == TD_API_MAX_STOPS) return;
    for (uint32_t i = 0; i < m->n_stops; i++)
        if (m->stops[i] == (uint32_t)id) return;
    m->stops[m->n_stops++] = (uint32_t)id;
}

static void add_stops(td_api_model *m, const td_json *config)
{
    const td_json *v = td_json_get(config, "eos_token_id");
    if (!v) return;
    if (v->type == TD_JSON_INT) add_stop(m, v->i);
    if (v->type != TD_JSON_ARR) return;
    for (const td_json *e = v->child; e; e = e->next)
        if (e->type == TD_JSON_INT) add_stop(m, e->i);
}

/* Requests may rely on them: what a request must not ask for is no default either. */
static td_status check_defaults(const td_defaults *d)
{
    const struct { const char *name; double v, lo, hi; } of[] = {
        {"temperature", d->temperature, 0, 2},
        {"top_p", d->top_p, 1e-30, 1},
        {"top_k", d->top_k, -1, INT32_MAX},
        {"min_p", d->min_p, 0, 1},
        {"repetition_penalty", d->repetition_penalty, 1e-30, 10},
    };
    for (size_t i = 0; i < TD_COUNT(of); i++)
        if (of[i].v < of[i].lo || of[i].v > of[i].hi)
            return td_fail(TD_EBADREQ, "generation_config.json: %s is %g; it must be from %g to %g",
                           of[i].name, of[i].v, of[i].lo, of[i].hi);
    return TD_OK;
}

static td_status read_configs(td_api_model *m, const char *dir)
{
    td_arena a;
    td_arena_init(&a, JSON_ARENA_BYTES);
    td_json *config, *gen;
    td_status s = read_json(dir, "config.json", &a, &config);
    if (s == TD_OK) s = read_json(dir, "generation_config.json", &a, &gen);
    if (s == TD_OK) {
        /* Multimodal configs keep the language model's facts one level down. */
        const td_json *text = td_json_get(config, "text_config"), *c = text ? text : config;
        m->vocab = (uint32_t)td_json_int(c, "vocab_size", 0);
        m->max_len = (uint32_t)td_json_int(c, "max_position_embeddings", 0);
        add_stops(m, gen);
        add_stops(m, config);
        if (text) add_stops(m, text);
        const td_json *sample = td_json_get(gen, "do_sample");
        bool greedy = sample && sample->type == TD_JSON_BOOL && !sample->truth;
        m->defaults = (td_defaults){greedy ? 0 : number_or_nan(gen, "temperature"),
                                    number_or_nan(gen, "top_p"), number_or_nan(gen, "top_k"),
                                    number_or_nan(gen, "min_p"), number_or_nan(gen, "repetition_penalty")};
        s = check_defaults(&m->defaults);
    }
    td_arena_deinit(&a);
    return s;
}

static bool has_file(const char *dir, const char *name)
{
    char path[4300];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    return !access(path, R_OK);
}

static td_status read_text(td_api_model *m, const char *dir, const char *template_file)
{
    if (!has_file(dir, "tokenizer.json") && !has_file(dir, "vocab.json")) {
        TD_WARN("the model directory has no tokenizer: prompts must be token ids");
        return TD_OK;
    }
    TD_TRY(td_tokenizer_open(dir, &m->tokenizer));
    size_t n;
    const uint32_t *ids = td_tokenizer_stops(m->tokenizer, &n);
    for (size_t i = 0; i < n; i++) add_stop(m, ids[i]);
    uint32_t have = td_tokenizer_vocab(m->tokenizer)->n;
    if (m->vocab < have) m->vocab = have;
    td_status s = td_chat_open(dir, template_file, m->tokenizer, &m->chat);
    if (s == TD_AGAIN)
        TD_INFO("the model directory has no chat template: /v1/chat/completions is not served");
    return s < 0 ? s : TD_OK;
}

static void name_of(td_api_model *m, const td_conf *c)
{
    if (c->served_model_name[0]) snprintf(m->name, sizeof m->name, "%s", c->served_model_name);
    else if (!c->model[0]) snprintf(m->name, sizeof m->name, "dummy-%s", c->shape);
    else {
        size_t n = strlen(c->model);
        while (n > 1 && c->model[n - 1] == '/') n--;
        size_t from = n;
        while (from && c->model[from - 1] != '/') from--;
        snprintf(m->name, sizeof m->name, "%.*s", (int)TD_MIN(n - from, sizeof m->name - 1), c->model + from);
    }
}

td_status td_api_model_open(td_api_model *m, const td_conf *c)
{
    memset(m, 0, sizeof *m);
    m->defaults = td_defaults_none();
    m->created = td_wall_s();
    name_of(m, c);
    if (!c->model[0]) {
        if (!strcmp(c->load_format, "dummy")) return TD_OK;
        return td_fail(TD_EBADREQ, "--model is missing: the directory with tokenizer and chat template");
    }
    struct stat st;
    if (stat(c->model, &st) || !S_ISDIR(st.st_mode))
        return td_fail(TD_EBADREQ, "--model: no such directory: %s", c->model);
    td_status s = read_configs(m, c->model);
    if (s == TD_OK) s = read_text(m, c->model, c->chat_template);
    if (c->max_model_len && (!m->max_len || (uint32_t)c->max_model_len < m->max_len))
        m->max_len = (uint32_t)c->max_model_len;
    if (s != TD_OK) td_api_model_close(m);
    return s;
}

void td_api_model_close(td_api_model *m)
{
    td_chat_close(m->chat);
    td_tokenizer_close(m->tokenizer);
    m->chat = NULL;
    m->tokenizer = NULL;
}

bool td_api_model_encode(const td_api_model *m, const char *text, size_t n, bool add_special, td_arena *a,
                         const uint32_t **ids, uint32_t *n_ids, td_api_error *err)
{
    if (!m->tokenizer)
        return td_api_fail(err, 400, "no_tokenizer", "prompt",
                           "this model has no tokenizer: send the prompt as token ids");
    uint32_t *p;
    size_t k;
    td_status s = td_tokenizer_encode(m->tokenizer, text, n, add_special, true, 0, a, &p, &k);
    if (s == TD_EFULL) return td_api_fail(err, 413, "prompt_too_large", "prompt", "%s", td_reason());
    if (s != TD_OK) return td_api_fail(err, s == TD_EBADREQ ? 400 : 500, NULL, "prompt", "%s", td_reason());
    if (k > INT32_MAX)
        return td_api_fail(err, 413, "prompt_too_large", "prompt", "the prompt has %zu tokens", k);
    *ids = p;
    *n_ids = (uint32_t)k;
    return true;
}

void td_api_model_decode(const td_api_model *m, const uint32_t *ids, uint32_t n, bool skip_special,
                         td_buf *out)
{
    if (!m->tokenizer) return;
    td_detok d;
    td_detok_init(&d, m->tokenizer, skip_special);
    for (uint32_t i = 0; i < n; i++) td_detok_push(&d, ids[i], out);
    td_detok_flush(&d, out);
}

const char *td_api_model_piece(const td_api_model *m, uint32_t id, size_t *n)
{
    *n = 0;
    if (!m->tokenizer) return "";
    const td_vocab *v = td_tokenizer_vocab(m->tokenizer);
    return id < v->n ? td_vocab_bytes(v, id, n) : "";
}

bool td_api_model_render(const td_api_model *m, const td_ask *ask, td_arena *a, td_buf *out,
                         td_api_error *err)
{
    if (!m->chat)
        return td_api_fail(err, 400, "no_chat_template", "messages",
                           "this model has no chat template: use /v1/completions");
    td_status s = td_chat_render(m->chat, ask->messages, ask->tools, ask->template_kwargs,
                                 ask->add_generation_prompt, a, out);
    if (s == TD_OK) return true;
    if (s == TD_EFULL) return td_api_fail(err, 413, "prompt_too_large", "messages", "%s", td_reason());
    return td_api_fail(err, s == TD_EBADREQ ? 400 : 500, "chat_template_error", "messages", "%s",
                       td_reason());
}
