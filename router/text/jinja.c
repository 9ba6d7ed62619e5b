// SPDX-License-Identifier: Apache-2.0
/* router/text/jinja.c - a template from its text: tokens, a tree, a look at what the tree names. */
#include "router/text/jinja_impl.h"
#include "common/check.h"
#include "router/text/unicode.h"
#include <stdlib.h>

enum { SOURCE_MAX = 1 << 20, ARENA_MAX = 256 << 20 };

td_status td_jinja_compile(const char *src, size_t n, td_jinja **out)
{
    td_arena scratch;
    td_jtoken *tok;
    uint32_t count;
    if (n > SOURCE_MAX) return td_refuse(TD_EFULL, "chat template of %zu bytes, limit %d", n, SOURCE_MAX);
    td_jinja *t = td_xalloc(sizeof *t);
    td_arena_init(&t->arena, ARENA_MAX);
    td_arena_init(&scratch, ARENA_MAX);
    td_status st = td_uc_valid(src, n, NULL) ? TD_OK : td_jinja_syntax(TD_EPROTO, 1, "not UTF-8");
    if (st >= 0) st = td_jinja_lex(&scratch, src, n, &tok, &count);
    if (st >= 0) st = td_jinja_parse(t, tok, count);
    if (st >= 0) st = td_jinja_check(t);
    td_arena_deinit(&scratch);
    if (st < 0) td_jinja_close(t);
    else *out = t;
    return st;
}

const char *td_jinja_doubt(const td_jinja *t)
{
    return t->doubt[0] ? t->doubt : NULL;
}

void td_jinja_close(td_jinja *t)
{
    if (!t) return;
    td_arena_deinit(&t->arena);
    free(t);
}
