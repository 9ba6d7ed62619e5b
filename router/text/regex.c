// SPDX-License-Identifier: Apache-2.0
#define PCRE2_CODE_UNIT_WIDTH 8
#include "common/buf.h"
#include "common/check.h"
#include "router/text/regex.h"
#include <pcre2.h>
#include <stdlib.h>
#include <string.h>

enum { PATTERN_MAX = 64 << 10, STEPS_MAX = 20000000, HEAP_KIB_MAX = 64 << 10 };

struct td_regex {
    pcre2_code *code;
};
struct td_match {
    pcre2_match_data *data;
    pcre2_match_context *ctx;
};

/* PCRE2's \s under UCP also has U+180E, which is a format character and no space for Oniguruma. */
static const char SPACE_SET[] =
    "\\x{09}-\\x{0d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}"
    "\\x{202f}\\x{205f}\\x{3000}";

/* PCRE2's \w is letters, numbers, underscore; Oniguruma's follows UTS #18, and counts Latin-1's digits-like
 * characters. */
static const char WORD_SET[] =
    "\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{b2}\\x{b3}\\x{b9}\\x{bc}-\\x{be}\\x{24b6}-\\x{24e9}"
    "\\x{1f130}-\\x{1f149}\\x{1f150}-\\x{1f169}\\x{1f170}-\\x{1f189}";

static void rewrite_escape(td_buf *b, char c, bool in_class)
{
    const char *set = c == 's' || c == 'S' ? SPACE_SET : c == 'w' || c == 'W' ? WORD_SET : NULL;
    bool negated = c == 'S' || c == 'W';
    if (!set || (negated && in_class)) {
        td_buf_chr(b, '\\');
        td_buf_chr(b, c);
        return;
    }
    if (!in_class) td_buf_str(b, negated ? "[^" : "[");
    td_buf_str(b, set);
    if (!in_class) td_buf_chr(b, ']');
}

static void rewrite(td_buf *b, const char *p, size_t n)
{
    bool in_class = false;
    size_t class_at = 0;
    for (size_t i = 0; i < n; i++) {
        if (p[i] == '\\' && i + 1 < n) {
            rewrite_escape(b, p[++i], in_class);
            continue;
        }
        if (in_class && p[i] == '[' && i + 1 < n && p[i + 1] == ':') { /* [:name:] */
            const char *close = memmem(p + i + 2, n - i - 2, ":]", 2);
            if (close) {
                size_t end = (size_t)(close - p) + 2;
                td_buf_add(b, p + i, end - i);
                i = end - 1;
                continue;
            }
        }
        if (!in_class && p[i] == '[') {
            in_class = true;
            class_at = i + (i + 1 < n && p[i + 1] == '^');
        } else if (in_class && p[i] == ']' && i > class_at + 1) {
            in_class = false;
        }
        td_buf_chr(b, p[i]);
    }
}

td_status td_regex_open(const char *pattern, size_t n, td_regex **out)
{
    if (n > PATTERN_MAX) return td_fail(TD_ENOSUP, "regex: pattern of %zu bytes, limit %d", n, PATTERN_MAX);
    td_buf b;
    td_buf_init(&b, 0);
    td_buf_str(&b, "");
    rewrite(&b, pattern, n);
    int err = 0;
    PCRE2_SIZE at = 0;
    pcre2_code *code = pcre2_compile((PCRE2_SPTR)(b.p ? b.p : ""), b.len,
                                     PCRE2_UTF | PCRE2_UCP | PCRE2_MULTILINE, &err, &at, NULL);
    td_buf_deinit(&b);
    if (!code) {
        PCRE2_UCHAR msg[128];
        pcre2_get_error_message(err, msg, sizeof msg);
        return td_fail(TD_ENOSUP, "regex: %s in pattern \"%.*s\"", (const char *)msg,
                       (int)TD_MIN(n, (size_t)200), pattern);
    }
    pcre2_jit_compile(code, PCRE2_JIT_COMPLETE); /* without JIT the interpreter runs: slower, same result */
    td_regex *r = td_xalloc(sizeof *r);
    r->code = code;
    *out = r;
    return TD_OK;
}

void td_regex_close(td_regex *r)
{
    if (!r) return;
    pcre2_code_free(r->code);
    free(r);
}

td_match *td_match_open(void)
{
    td_match *m = td_xalloc(sizeof *m);
    m->data = pcre2_match_data_create(1, NULL);
    m->ctx = pcre2_match_context_create(NULL);
    TD_CHECK(m->data && m->ctx);
    pcre2_set_match_limit(m->ctx, STEPS_MAX);
    pcre2_set_heap_limit(m->ctx, HEAP_KIB_MAX);
    return m;
}

void td_match_close(td_match *m)
{
    if (!m) return;
    pcre2_match_data_free(m->data);
    pcre2_match_context_free(m->ctx);
    free(m);
}

td_status td_regex_find(const td_regex *r, td_match *m, const char *text, size_t n, size_t from,
                        size_t *start, size_t *end)
{
    uint32_t options = PCRE2_NO_UTF_CHECK;
    int rc = pcre2_match(r->code, (PCRE2_SPTR)text, n, from, options, m->data, m->ctx);
    if (rc == PCRE2_ERROR_JIT_STACKLIMIT)
        rc = pcre2_match(r->code, (PCRE2_SPTR)text, n, from, options | PCRE2_NO_JIT, m->data, m->ctx);
    if (rc == PCRE2_ERROR_NOMATCH) return TD_AGAIN;
    if (rc < 0)
        return td_refuse(TD_EBADREQ, "regex: text needs more than the allowed steps or memory (pcre2 %d)",
                         rc);
    const PCRE2_SIZE *ov = pcre2_get_ovector_pointer(m->data);
    if (ov[1] < ov[0]) return td_refuse(TD_EBADREQ, "regex: match ends before its start (\\K)");
    *start = ov[0];
    *end = ov[1];
    return TD_OK;
}
