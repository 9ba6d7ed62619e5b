// SPDX-License-Identifier: Apache-2.0
#include "router/text/chat.h"
#include "common/check.h"
#include "router/text/files.h"
#include <stdlib.h>
#include <string.h>

enum { MAX_RENDER_STEPS = 20 * 1000 * 1000 };

struct td_chat {
    td_jinja *plain, *with_tools; /* with_tools: NULL: plain serves both */
    char *bos, *eos;
    bool knows_parts;             /* the template handles content given as a list of parts */
};

static td_status compile(td_chat *c, const char *src, size_t n, td_jinja **out)
{
    c->knows_parts |= memmem(src, n, "['text']", 8) || memmem(src, n, "[\"text\"]", 8) || memmem(src, n, ".text", 5);
    return td_jinja_compile(src, n, out);
}

static td_status from_file(td_chat *c, const char *dir, const char *name)
{
    char *text;
    size_t n;
    td_status s = td_files_read(dir, name, &text, &n);
    if (s != TD_OK) return s;
    s = compile(c, text, n, &c->plain);
    free(text);
    return s;
}

static td_status from_config(td_chat *c, const char *dir)
{
    td_arena a;
    td_json *root;
    td_arena_init(&a, 256 << 20);
    td_status s = td_files_json(dir, "tokenizer_config.json", &a, &root);
    const td_json *t = s == TD_OK ? td_json_get(root, "chat_template") : NULL;
    if (s == TD_OK && td_json_is_null(t)) s = TD_AGAIN;
    if (s == TD_OK && t->type == TD_JSON_STR) {
        s = compile(c, t->s, t->n, &c->plain);
    } else if (s == TD_OK && t->type == TD_JSON_ARR) {
        for (const td_json *x = t->child; x && s == TD_OK; x = x->next) {
            const char *name = td_json_str(x, "name", "");
            const td_json *src = td_json_get(x, "template");
            if (!src || src->type != TD_JSON_STR) continue;
            if (!strcmp(name, "default") && !c->plain) s = compile(c, src->s, src->n, &c->plain);
            else if (!strcmp(name, "tool_use") && !c->with_tools) s = compile(c, src->s, src->n, &c->with_tools);
        }
        if (s == TD_OK && !c->plain && c->with_tools) c->plain = c->with_tools, c->with_tools = NULL;
        if (s == TD_OK && !c->plain) s = TD_AGAIN;
    } else if (s == TD_OK) {
        s = td_fail(TD_EPROTO, "tokenizer_config.json: chat_template is neither a string nor a list");
    }
    td_arena_deinit(&a);
    return s;
}

td_status td_chat_open(const char *model_dir, const char *override_file, const td_tokenizer *t, td_chat **out)
{
    td_chat *c = td_xalloc(sizeof *c);
    c->bos = td_xstrdup(t ? td_tokenizer_bos_text(t) : "");
    c->eos = td_xstrdup(t ? td_tokenizer_eos_text(t) : "");
    td_status s;
    if (override_file && override_file[0]) {
        s = from_file(c, NULL, override_file);
        if (s == TD_AGAIN) s = td_fail(TD_EBADREQ, "no chat template file %s", override_file);
    } else {
        s = from_file(c, model_dir, "chat_template.jinja");
        if (s == TD_AGAIN) s = from_config(c, model_dir);
    }
    if (s != TD_OK) {
        td_chat_close(c);
        return s;
    }
    *out = c;
    return TD_OK;
}

void td_chat_close(td_chat *c)
{
    if (!c) return;
    td_jinja_close(c->plain);
    td_jinja_close(c->with_tools);
    free(c->bos);
    free(c->eos);
    free(c);
}

/* ---- the context object ---- */

static td_json *new_value(td_arena *a, td_json_type type)
{
    td_json *v = td_arena_alloc(a, sizeof *v);
    if (v) v->type = type;
    return v;
}

static td_json *new_string(td_arena *a, const char *s, size_t n)
{
    td_json *v = new_value(a, TD_JSON_STR);
    if (v) v->s = td_arena_strndup(a, s, n), v->n = (uint32_t)n;
    return v && v->s ? v : NULL;
}

/* Appends a member; false: the arena is full. */
static bool add(td_json *obj, td_json ***tail, const char *key, td_json *v)
{
    if (!v) return false;
    v->key = key;
    v->key_len = (uint32_t)strlen(key);
    v->next = NULL;
    **tail = v;
    *tail = &v->next;
    obj->n++;
    return true;
}

static td_json *shallow(td_arena *a, const td_json *v) { return td_arena_copy(a, v, sizeof *v); }

static bool is_text_parts(const td_json *content)
{
    if (!content || content->type != TD_JSON_ARR) return false;
    for (const td_json *p = content->child; p; p = p->next) {
        const td_json *text = td_json_get(p, "text");
        if (strcmp(td_json_str(p, "type", ""), "text") || !text || text->type != TD_JSON_STR) return false;
    }
    return true;
}

static td_json *joined(td_arena *a, const td_json *parts)
{
    size_t n = 0, at = 0;
    for (const td_json *p = parts->child; p; p = p->next) n += td_json_get(p, "text")->n;
    char *s = td_arena_alloc(a, n + 1);
    td_json *v = new_value(a, TD_JSON_STR);
    if (!s || !v) return NULL;
    for (const td_json *p = parts->child; p; p = p->next) {
        const td_json *t = td_json_get(p, "text");
        memcpy(s + at, t->s, t->n);
        at += t->n;
    }
    v->s = s;
    v->n = (uint32_t)n;
    return v;
}

/* The messages with every list of text parts as one string. NULL: the arena is full. */
static td_json *flatten(td_arena *a, const td_json *messages)
{
    td_json *out = new_value(a, TD_JSON_ARR), **tail = out ? &out->child : NULL;
    for (const td_json *m = messages->child; m && out; m = m->next) {
        td_json *copy = shallow(a, m);
        if (!copy) return NULL;
        copy->next = NULL;
        if (m->type == TD_JSON_OBJ) {
            td_json **field = &copy->child;
            for (const td_json *f = m->child; f; f = f->next) {
                td_json *g = f->key && !strcmp(f->key, "content") && is_text_parts(f) ? joined(a, f) : shallow(a, f);
                if (!g) return NULL;
                g->key = f->key, g->key_len = f->key_len, g->next = NULL;
                *field = g;
                field = &g->next;
            }
        }
        *tail = copy;
        tail = &copy->next;
        out->n++;
    }
    return out;
}

td_status td_chat_render(const td_chat *c, const td_json *messages, const td_json *tools, const td_json *extra, bool add_generation_prompt, td_arena *a,
                         td_buf *out)
{
    td_json *ctx = new_value(a, TD_JSON_OBJ), **tail = ctx ? &ctx->child : NULL, *flag = new_value(a, TD_JSON_BOOL);
    bool has_tools = tools && tools->type == TD_JSON_ARR && tools->n;
    bool ok = ctx && flag;
    if (ok) flag->truth = add_generation_prompt;
    ok = ok && add(ctx, &tail, "messages", c->knows_parts ? shallow(a, messages) : flatten(a, messages));
    ok = ok && add(ctx, &tail, "tools", has_tools ? shallow(a, tools) : new_value(a, TD_JSON_NULL));
    ok = ok && add(ctx, &tail, "add_generation_prompt", flag);
    ok = ok && add(ctx, &tail, "bos_token", new_string(a, c->bos, strlen(c->bos))) && add(ctx, &tail, "eos_token", new_string(a, c->eos, strlen(c->eos)));
    for (const td_json *v = extra && extra->type == TD_JSON_OBJ ? extra->child : NULL; v && ok; v = v->next)
        if (!td_json_get(ctx, v->key)) ok = add(ctx, &tail, v->key, shallow(a, v));
    if (!ok) return td_refuse(TD_EFULL, "the messages are too large for the chat template");
    const td_jinja *t = has_tools && c->with_tools ? c->with_tools : c->plain;
    return td_jinja_render(t, ctx, a, (td_jinja_limits){.steps = MAX_RENDER_STEPS, .immutable = true}, out);
}
