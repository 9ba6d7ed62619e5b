// SPDX-License-Identifier: Apache-2.0
/* tool_render: reads lines of JSON from stdin, answers each with one line; for the Python tests.
 *   {"template": s, "context": {..}, "immutable": bool, "now": n, "steps": n} -> {"text": s} | {"error": s,
 *   "status": s}
 *   {"compile": s} -> {"doubt": s, "": none} | {"error": s, "status": s}
 *   {"model": dir, "override": file or null, "messages": [..], "tools": .., "extra": {..},
 *   "prompt": bool}
 *                                                  -> {"text": s, "ids": [..], "parts": b, "objects": b} */
#include "router/text/chat.h"
#include "router/text/jinja.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void error(td_buf *out, td_status st)
{
    td_buf_str(out, "{\"error\": ");
    td_buf_json_str(out, td_reason(), strlen(td_reason()));
    td_buf_fmt(out, ", \"status\": \"%s\"}", td_status_name(st));
}

static void compile(const td_json *src, td_buf *out)
{
    td_jinja *t;
    td_status st = td_jinja_compile(src->s, src->n, &t);
    if (st < 0) {
        error(out, st);
        return;
    }
    const char *doubt = td_jinja_doubt(t) ? td_jinja_doubt(t) : "";
    td_buf_str(out, "{\"doubt\": ");
    td_buf_json_str(out, doubt, strlen(doubt));
    td_buf_str(out, "}");
    td_jinja_close(t);
}

static void render(const td_json *q, td_arena *a, td_buf *out)
{
    const td_json *src = td_json_get(q, "template");
    td_jinja_limits lim = {.now_s = td_json_int(q, "now", 0),
                           .immutable = td_json_bool(q, "immutable", false),
                           .steps = (uint64_t)td_json_int(q, "steps", 0)};
    td_jinja *t;
    td_buf text;
    td_status st = td_jinja_compile(src->s, src->n, &t);
    if (st < 0) {
        error(out, st);
        return;
    }
    td_buf_init(&text, (size_t)td_json_int(q, "output", 0));
    st = td_jinja_render(t, td_json_get(q, "context"), a, lim, &text);
    if (st < 0) error(out, st);
    else {
        td_buf_str(out, "{\"text\": ");
        td_buf_json_str(out, text.p ? text.p : "", text.len);
        td_buf_str(out, "}");
    }
    td_buf_deinit(&text);
    td_jinja_close(t);
}

static td_tokenizer *tokenizer;
static td_chat *chat;
static char opened[4096];

static td_status open_model(const td_json *q)
{
    char name[4096];
    const char *dir = td_json_str(q, "model", ""), *file = td_json_str(q, "override", NULL);
    snprintf(name, sizeof name, "%s %s", dir, file ? file : "");
    if (chat && !strcmp(name, opened)) return TD_OK;
    td_chat_close(chat);
    td_tokenizer_close(tokenizer);
    chat = NULL;
    tokenizer = NULL;
    snprintf(opened, sizeof opened, "%s", name);
    TD_TRY(td_tokenizer_open(dir, &tokenizer));
    return td_chat_open(dir, file, tokenizer, &chat);
}

static void chat_question(const td_json *q, td_arena *a, td_buf *out)
{
    td_buf text;
    uint32_t *ids;
    size_t n;
    td_buf_init(&text, 0);
    td_status st = open_model(q);
    if (st >= 0)
        st = td_chat_render(chat, td_json_get(q, "messages"), td_json_get(q, "tools"),
                            td_json_get(q, "extra"), td_json_bool(q, "prompt", true), a, &text);
    if (st >= 0)
        st = td_tokenizer_encode(tokenizer, text.p ? text.p : "", text.len, false, true, 0, a, &ids, &n);
    if (st < 0) error(out, st);
    else {
        td_buf_str(out, "{\"text\": ");
        td_buf_json_str(out, text.p ? text.p : "", text.len);
        td_buf_fmt(out, ", \"parts\": %s, \"objects\": %s, \"ids\": [",
                   td_chat_takes_parts(chat) ? "true" : "false",
                   td_chat_takes_argument_objects(chat) ? "true" : "false");
        for (size_t i = 0; i < n; i++) td_buf_fmt(out, i ? ", %u" : "%u", ids[i]);
        td_buf_str(out, "]}");
    }
    td_buf_deinit(&text);
}

int main(void)
{
    char *line = NULL;
    size_t cap = 0;
    ssize_t k;
    while ((k = getline(&line, &cap, stdin)) > 0) {
        td_arena a;
        td_json *q;
        td_buf out;
        td_arena_init(&a, (size_t)256 << 20);
        td_buf_init(&out, (size_t)1 << 30);
        if (td_json_parse(&a, line, (size_t)k, (td_json_limits){.max_depth = 500}, &q) < 0)
            error(&out, TD_EPROTO);
        else if (td_json_get(q, "model")) chat_question(q, &a, &out);
        else if (td_json_get(q, "compile")) compile(td_json_get(q, "compile"), &out);
        else render(q, &a, &out);
        printf("%s\n", out.p);
        fflush(stdout);
        td_buf_deinit(&out);
        td_arena_deinit(&a);
    }
    free(line);
    td_chat_close(chat);
    td_tokenizer_close(tokenizer);
    return 0;
}
