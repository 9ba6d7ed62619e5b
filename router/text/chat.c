// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "common/log.h"
#include "router/text/chat.h"
#include "router/text/files.h"
#include "router/text/jinja.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { NAMED = 4, PROBE_ARENA = 8 << 20, PROBE_TEXT = 1 << 20, PROBE_STEPS = 200000 };

struct td_chat {
    td_jinja *plain, *tools; /* tools: for requests with tools; either may be NULL, not both */
    char *token[NAMED];      /* by names[]; NULL: not defined */
    bool parts, objects;
};

static const char *const names[NAMED] = {"bos_token", "eos_token", "unk_token", "pad_token"};

/* ---- JSON by hand: nodes live in the arena; NULL is "arena full" throughout ---- */

static td_json *make(td_arena *a, td_json_type type, const char *key)
{
    td_json *v = td_arena_alloc(a, sizeof *v);
    if (!v) return NULL;
    v->type = type;
    v->key = key;
    v->key_len = key ? (uint32_t)strlen(key) : 0;
    return v;
}

static td_json *make_text(td_arena *a, const char *key, const char *s, size_t n)
{
    td_json *v = make(a, TD_JSON_STR, key);
    if (!v) return NULL;
    v->s = s;
    v->n = (uint32_t)n;
    return v;
}

/* The text of b as a value; b is deinitialized. */
static td_json *take_text(td_arena *a, const char *key, td_buf *b)
{
    char *s = td_buf_ok(b) ? td_arena_strndup(a, b->p ? b->p : "", b->len) : NULL;
    td_json *v = s ? make_text(a, key, s, b->len) : NULL;
    td_buf_deinit(b);
    return v;
}

/* A copy of one node (children shared) to hang into another list; from NULL: null. */
static td_json *copy_as(td_arena *a, const td_json *from, const char *key)
{
    td_json *v = make(a, TD_JSON_NULL, key);
    if (!v || !from) return v;
    *v = *from;
    v->next = NULL;
    v->key = key;
    v->key_len = key ? (uint32_t)strlen(key) : 0;
    return v;
}

static td_json *copy_member(td_arena *a, const td_json *from)
{
    td_json *v = copy_as(a, from, NULL);
    if (v) v->key = from->key, v->key_len = from->key_len;
    return v;
}

typedef struct chain {
    td_json *parent, *last;
} chain;

/* An empty container like v, to be filled through the chain. */
static chain start_like(td_arena *a, const td_json *v, const char *key)
{
    chain c = {copy_as(a, v, key), NULL};
    if (c.parent) c.parent->child = NULL, c.parent->n = 0;
    return c;
}

static bool add(chain *c, td_json *v)
{
    if (!v) return false;
    v->next = NULL;
    if (c->last) c->last->next = v;
    else c->parent->child = v;
    c->last = v;
    c->parent->n++;
    return true;
}

static bool named(const td_json *member, const char *name)
{
    return member->key_len == strlen(name) && !memcmp(member->key, name, member->key_len);
}

/* ---- bringing messages to the template's shape ---- */

static const td_json *text_of_part(const td_json *p)
{
    static const char *const types[] = {"text", "input_text", "output_text"};
    const char *type = td_json_str(p, "type", "");
    const td_json *t = td_json_get(p, "text");
    for (size_t i = 0; i < TD_COUNT(types); i++)
        if (!strcmp(type, types[i]) && t && t->type == TD_JSON_STR) return t;
    return NULL;
}

static bool only_text(const td_json *content)
{
    for (const td_json *p = content->child; p; p = p->next)
        if (!text_of_part(p)) return false;
    return true;
}

static td_json *joined(td_arena *a, const td_json *content)
{
    td_buf b;
    td_buf_init(&b, 0);
    for (const td_json *p = content->child; p; p = p->next) {
        const td_json *t = text_of_part(p);
        if (p != content->child) td_buf_chr(&b, '\n');
        td_buf_add(&b, t->s, t->n);
    }
    return take_text(a, "content", &b);
}

static td_json *fix_content(const td_chat *c, td_arena *a, const td_json *content)
{
    if (td_json_is_null(content)) return make_text(a, "content", "", 0);
    if (content->type == TD_JSON_ARR && !c->parts && only_text(content)) return joined(a, content);
    return copy_as(a, content, "content");
}

/* Arguments as the template wants them. Text that is no JSON object stays text. */
static td_json *fix_arguments(const td_chat *c, td_arena *a, const td_json *args)
{
    td_json *parsed;
    if (c->objects && args->type == TD_JSON_STR) {
        if (td_json_parse(a, args->s, args->n, (td_json_limits){0}, &parsed) >= 0 &&
            parsed->type == TD_JSON_OBJ)
            return copy_as(a, parsed, "arguments");
    } else if (!c->objects && args->type == TD_JSON_OBJ) {
        td_buf b;
        td_buf_init(&b, 0);
        td_json_write(&b, args, 0);
        return take_text(a, "arguments", &b);
    }
    return copy_as(a, args, "arguments");
}

/* A shallow copy of an object in which the members called `name` are what fix() makes of them. */
typedef td_json *fix_fn(const td_chat *c, td_arena *a, const td_json *v);
static td_json *with_member(const td_chat *c, td_arena *a, const td_json *obj, const char *key,
                            const char *name, fix_fn *fix)
{
    if (obj->type != TD_JSON_OBJ) return copy_as(a, obj, key);
    chain list = start_like(a, obj, key);
    for (const td_json *m = obj->child; m && list.parent; m = m->next)
        if (!add(&list, named(m, name) ? fix(c, a, m) : copy_member(a, m))) return NULL;
    return list.parent;
}

static td_json *fix_function(const td_chat *c, td_arena *a, const td_json *f)
{
    return with_member(c, a, f, "function", "arguments", fix_arguments);
}

static td_json *fix_calls(const td_chat *c, td_arena *a, const td_json *calls)
{
    if (calls->type != TD_JSON_ARR) return copy_as(a, calls, "tool_calls");
    chain list = start_like(a, calls, "tool_calls");
    for (const td_json *x = calls->child; x && list.parent; x = x->next)
        if (!add(&list, with_member(c, a, x, NULL, "function", fix_function))) return NULL;
    return list.parent;
}

static td_json *fix_message(const td_chat *c, td_arena *a, const td_json *m)
{
    td_json *v = with_member(c, a, m, NULL, "tool_calls", fix_calls);
    if (!v || m->type != TD_JSON_OBJ) return v;
    v = with_member(c, a, v, NULL, "content", fix_content);
    if (!v || td_json_get(v, "content")) return v;
    chain list = {v, v->child};
    while (list.last && list.last->next) list.last = list.last->next;
    return add(&list, make_text(a, "content", "", 0)) ? v : NULL;
}

static td_json *fix_messages(const td_chat *c, td_arena *a, const td_json *messages)
{
    chain list = start_like(a, messages, "messages");
    for (const td_json *m = messages->child; m && list.parent; m = m->next)
        if (!add(&list, fix_message(c, a, m))) return NULL;
    return list.parent;
}

/* ---- rendering ---- */

static td_json *context(const td_chat *c, td_arena *a, const td_json *messages, const td_json *tools,
                        const td_json *extra, bool prompt)
{
    td_json *root = make(a, TD_JSON_OBJ, NULL), *generation = make(a, TD_JSON_BOOL, "add_generation_prompt"),
            *documents = NULL;
    chain list = {root, NULL};
    if (!root || !generation) return NULL;
    generation->truth = prompt;
    if (!add(&list, fix_messages(c, a, messages)) || !add(&list, copy_as(a, tools, "tools")) ||
        !add(&list, generation))
        return NULL;
    for (int i = 0; i < NAMED; i++)
        if (c->token[i] && !add(&list, make_text(a, names[i], c->token[i], strlen(c->token[i])))) return NULL;
    for (const td_json *m = extra && extra->type == TD_JSON_OBJ ? extra->child : NULL; m; m = m->next)
        if (!td_json_get(root, m->key) && !add(&list, copy_member(a, m))) return NULL;
    documents = make(a, TD_JSON_NULL, "documents");
    return td_json_get(root, "documents") || add(&list, documents) ? root : NULL;
}

static td_status render(const td_chat *c, const td_json *messages, const td_json *tools, const td_json *extra,
                        bool prompt, td_jinja_limits lim, td_arena *a, td_buf *out)
{
    bool with_tools = !td_json_is_null(tools) && tools->n;
    const td_jinja *t = (with_tools && c->tools) || !c->plain ? c->tools : c->plain;
    if (!messages || messages->type != TD_JSON_ARR) return td_refuse(TD_EBADREQ, "messages must be an array");
    td_json *root = context(c, a, messages, with_tools ? tools : NULL, extra, prompt);
    if (!root) return td_refuse(TD_EFULL, "the messages are too large for the chat template");
    return td_jinja_render(t, root, a, lim, out);
}

td_status td_chat_render(const td_chat *c, const td_json *messages, const td_json *tools,
                         const td_json *extra, bool add_generation_prompt, td_arena *a, td_buf *out)
{
    return render(c, messages, tools, extra, add_generation_prompt, (td_jinja_limits){0}, a, out);
}

/* ---- learning what the template takes ---- */

/* True if the made-up messages render to a text that has `want` and not `never`. */
static bool probe(const td_chat *c, const char *json, const char *want, const char *never)
{
    td_arena a;
    td_buf out;
    td_json *m;
    td_arena_init(&a, PROBE_ARENA);
    td_buf_init(&out, PROBE_TEXT);
    bool good = td_json_parse(&a, json, strlen(json), (td_json_limits){0}, &m) >= 0 &&
                render(c, m, NULL, NULL, false, (td_jinja_limits){.steps = PROBE_STEPS}, &a, &out) >= 0 &&
                out.p && strstr(out.p, want) && !strstr(out.p, never);
    td_buf_deinit(&out);
    td_arena_deinit(&a);
    return good;
}

#define PROBE_CALL(arguments)                                                                                \
    "[{\"role\": \"user\", \"content\": \"hi\"}, {\"role\": \"assistant\", \"content\": \"\", "              \
    "\"tool_calls\": [{\"id\": \"call00001\", "                                                              \
    "\"type\": \"function\", \"function\": {\"name\": \"probe\", \"arguments\": " arguments                  \
    "}}]}, {\"role\": \"tool\", "                                                                            \
    "\"tool_call_id\": \"call00001\", \"name\": \"probe\", \"content\": \"ok\"}]"

/* A template that wants text prints an object as Python does, with single quotes, or fails; one that wants an
 * object quotes the quotes of a text. Where neither tells, objects: transformers documents them so. */
static void learn(td_chat *c)
{
    static const char PARTS[] =
        "[{\"role\": \"user\", \"content\": [{\"type\": \"text\", \"text\": \"QXZPROBE\"}]}]";
    c->parts = c->objects = true;
    bool parts = probe(c, PARTS, "QXZPROBE", "'text'"),
         objects = probe(c, PROBE_CALL("{\"key\": \"QXZPROBE\"}"), "QXZPROBE", "'key'");
    c->objects = false;
    bool text = probe(c, PROBE_CALL("\"{\\\"key\\\": \\\"QXZPROBE\\\"}\""), "QXZPROBE", "\\\"QXZPROBE");
    c->parts = parts;
    c->objects = objects || !text;
}

/* ---- opening ---- */

static td_status compile(const char *source, size_t n, const char *file, td_jinja **out)
{
    char why[400];
    td_status st = td_jinja_compile(source, n, out);
    if (st >= 0 && td_jinja_doubt(*out)) TD_WARN("%s: %s: messages that reach it will be refused", file, td_jinja_doubt(*out));
    if (st >= 0) return st;
    snprintf(why, sizeof why, "%s", td_reason());
    return td_fail(st, "%s: %s", file, why);
}

/* TD_AGAIN: no such file. */
static td_status from_file(const char *dir, const char *name, td_jinja **out)
{
    char *source;
    size_t n;
    td_status st = td_files_read(dir, name, &source, &n);
    if (st != TD_OK) return st;
    st = compile(source, n, name, out);
    free(source);
    return st;
}

/* TD_AGAIN: the value holds no template. */
static td_status from_json(td_chat *c, const td_json *v, const char *file)
{
    if (td_json_is_null(v)) return TD_AGAIN;
    if (v->type == TD_JSON_STR) return compile(v->s, v->n, file, &c->plain);
    if (v->type != TD_JSON_ARR)
        return td_fail(TD_EPROTO, "%s: chat_template is neither a string nor a list", file);
    for (const td_json *e = v->child; e; e = e->next) {
        const td_json *source = td_json_get(e, "template");
        const char *name = td_json_str(e, "name", "");
        td_jinja **t = !strcmp(name, "default") ? &c->plain : !strcmp(name, "tool_use") ? &c->tools : NULL;
        if (!t || *t) continue; /* others are chosen by name in transformers; no request names one here */
        if (!source || source->type != TD_JSON_STR)
            return td_fail(TD_EPROTO, "%s: chat_template \"%.40s\" is no string", file, name);
        TD_TRY(compile(source->s, source->n, file, t));
    }
    return c->plain || c->tools ? TD_OK : TD_AGAIN;
}

static void load_tokens(td_chat *c, const td_json *config, const td_tokenizer *t)
{
    c->token[0] = td_xstrdup(t ? td_tokenizer_bos_text(t) : "");
    c->token[1] = td_xstrdup(t ? td_tokenizer_eos_text(t) : "");
    for (int i = 2; i < NAMED; i++) {
        const td_json *v = td_json_get(config, names[i]);
        if (v && v->type == TD_JSON_OBJ) v = td_json_get(v, "content");
        if (v && v->type == TD_JSON_STR) c->token[i] = td_xstrndup(v->s, v->n);
    }
}

static td_status load(td_chat *c, const char *dir, const char *override_file, const td_tokenizer *t,
                      td_arena *a)
{
    td_json *config, *extra;
    td_status st = td_files_json(dir, "tokenizer_config.json", a, &config);
    if (st < 0) return st;
    load_tokens(c, config, t);
    if (override_file && override_file[0]) {
        st = from_file(NULL, override_file, &c->plain);
        return st == TD_AGAIN ? td_fail(TD_EBADREQ, "no chat template file %s", override_file) : st;
    }
    st = from_file(dir, "chat_template.jinja", &c->plain);
    if (st == TD_OK) {
        st = from_file(dir, "additional_chat_templates/tool_use.jinja", &c->tools);
        return st == TD_AGAIN ? TD_OK : st;
    }
    if (st == TD_AGAIN) st = from_json(c, td_json_get(config, "chat_template"), "tokenizer_config.json");
    if (st != TD_AGAIN) return st;
    st = td_files_json(dir, "chat_template.json", a, &extra);
    return st == TD_OK ? from_json(c, td_json_get(extra, "chat_template"), "chat_template.json") : st;
}

td_status td_chat_open(const char *model_dir, const char *override_file, const td_tokenizer *t, td_chat **out)
{
    td_chat *c = td_xalloc(sizeof *c);
    td_arena a;
    td_arena_init(&a, (size_t)256 << 20);
    td_status st = load(c, model_dir, override_file, t, &a);
    td_arena_deinit(&a);
    if (st != TD_OK) {
        td_chat_close(c);
        return st;
    }
    learn(c);
    *out = c;
    return TD_OK;
}

void td_chat_close(td_chat *c)
{
    if (!c) return;
    td_jinja_close(c->plain);
    td_jinja_close(c->tools);
    for (int i = 0; i < NAMED; i++) free(c->token[i]);
    free(c);
}

bool td_chat_takes_parts(const td_chat *c) { return c->parts; }
bool td_chat_takes_argument_objects(const td_chat *c) { return c->objects; }
