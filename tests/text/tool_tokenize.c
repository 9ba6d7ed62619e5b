// SPDX-License-Identifier: Apache-2.0
/* tool_tokenize DIR [flags]: reads lines of JSON from stdin, answers each with one line of JSON; for the
 * Python tests.
 *   {"text": s, "special": bool, "parse": bool} -> {"ids": [..]} | {"error": s}
 *   {"ids": [..], "skip": bool}                  -> {"text": s, "parts": n} (streamed one id at a time)
 * --slow: pre-tokenizer by PCRE2. */
#include "common/clock.h"
#include "common/json.h"
#include "router/text/detok.h"
#include "router/text/tokenizer_impl.h"
#include "router/text/unicode.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static void encode(const td_tokenizer *t, const td_json *q, td_arena *a, td_buf *out)
{
    const td_json *text = td_json_get(q, "text");
    uint32_t *ids;
    size_t n;
    td_status st =
        td_tokenizer_encode(t, text->s, text->n, td_json_bool(q, "special", false),
                            td_json_bool(q, "parse", true), (size_t)td_json_int(q, "max", 0), a, &ids, &n);
    if (st < 0) {
        td_buf_str(out, "{\"error\": ");
        td_buf_json_str(out, td_reason(), strlen(td_reason()));
        td_buf_str(out, "}");
        return;
    }
    td_buf_str(out, "{\"ids\": [");
    for (size_t i = 0; i < n; i++) td_buf_fmt(out, i ? ", %u" : "%u", ids[i]);
    td_buf_str(out, "]}");
}

static void decode(const td_tokenizer *t, const td_json *q, td_buf *out)
{
    td_detok d;
    td_buf text;
    int broken = 0;
    td_buf_init(&text, 0);
    td_detok_init(&d, t, td_json_bool(q, "skip", false));
    for (const td_json *v = td_json_get(q, "ids")->child; v; v = v->next) {
        size_t before = text.len;
        td_detok_push(&d, (uint32_t)v->i, &text);
        broken += text.p && !td_uc_valid(text.p + before, text.len - before, NULL);
    }
    td_detok_flush(&d, &text);
    td_buf_str(out, "{\"text\": ");
    td_buf_json_str(out, text.p ? text.p : "", text.len);
    td_buf_fmt(out, ", \"broken\": %d}", broken);
    td_buf_deinit(&text);
}

int main(int argc, char **argv)
{
    td_tokenizer *t;
    bool slow = argc > 2 && !strcmp(argv[2], "--slow");
    if (argc < 2 || td_tokenizer_open_slow(argv[1], slow, &t) < 0) {
        printf("{\"error\": \"open\"}\n");
        return 1;
    }
    char *line = NULL;
    size_t cap = 0;
    ssize_t k;
    while ((k = getline(&line, &cap, stdin)) > 0) {
        td_arena a;
        td_json *q;
        td_buf out;
        td_arena_init(&a, (size_t)1 << 30);
        td_buf_init(&out, (size_t)1 << 30);
        if (td_json_parse(&a, line, (size_t)k, (td_json_limits){0}, &q) < 0)
            td_buf_str(&out, "{\"error\": \"bad question\"}");
        else if (td_json_get(q, "ids")) decode(t, q, &out);
        else encode(t, q, &a, &out);
        printf("%s\n", out.p);
        fflush(stdout);
        td_buf_deinit(&out);
        td_arena_deinit(&a);
    }
    free(line);
    td_tokenizer_close(t);
    return 0;
}
