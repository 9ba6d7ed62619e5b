/* router/text/jinja.h - an interpreter for the part of Jinja2 that chat templates are written in.
 *
 * Settings are those that transformers renders with: trim_blocks, lstrip_blocks, loop controls, no
 * autoescape, tojson = json.dumps(ensure_ascii=False), sandboxed. What is taken: README.md. include, import,
 * extends, block and recursive loops are not.
 * Rules:     1. Text in, syntax tree, tree walk. A compiled template is const: any number of threads render
 *               it at once.
 *            2. Semantics are Jinja2 3.1's, undefined values included: they print as nothing, test false, and
 *               fail when an attribute or item is asked of them. tests/text compares bytes with Jinja2.
 *            3. A template cannot exceed its limits: steps, depth of nesting and calls, bytes of output,
 *               bytes of arena.
 *            4. No model's name is known here.
 *            5. Filters and tests that do not exist are refused where Jinja2 refuses them when it compiles: not
 *               directly below an if. There, and of functions, td_jinja_doubt names the first one.
 * Errors:    all name the line. TD_ENOSUP a construct, filter, test or method we lack; TD_EPROTO syntax;
 *            TD_EBADREQ a run-time error of the template on these messages, raise_exception included
 *            (td_reason() is then exactly its text); TD_EFULL a limit.
 * Ownership: the source is copied. Values made while rendering live in the caller's arena.
 * Limits:    source 1 MiB, nesting 200. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_TEXT_JINJA_H
#define TD_ROUTER_TEXT_JINJA_H

#include "common/arena.h"
#include "common/buf.h"
#include "common/json.h"
#include "common/status.h"

typedef struct td_jinja td_jinja;

typedef struct td_jinja_limits {
    uint64_t steps; /* 0: 20 million */
    int depth;      /* 0: 400 */
    int64_t now_s;  /* strftime_now's time in seconds since 1970, UTC; 0: the clock */
    bool immutable; /* refuse list.append, dict.update and the like, as transformers' sandbox does */
} td_jinja_limits;

td_status td_jinja_compile(const char *src, size_t n, td_jinja **out);
void td_jinja_close(td_jinja *t);
/* What messages that reach it will be refused for; NULL: nothing is known to be missing. */
const char *td_jinja_doubt(const td_jinja *t);
/* context: an object, its members are the template's variables. out receives the text after what it holds;
 * its max bounds it. */
td_status td_jinja_render(const td_jinja *t, const td_json *context, td_arena *a, td_jinja_limits lim,
                          td_buf *out);

#endif
