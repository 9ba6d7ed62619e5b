// SPDX-License-Identifier: Apache-2.0
/* router/text/jinja_lex.c - template text into tokens, with the white space rules of trim_blocks and
 * lstrip_blocks:
 *   a block or comment swallows the line break right behind it, and the blanks between the line's start and
 *   itself; "-" inside a delimiter strips all white space on that side, "+" switches the rule off there. */
#include "common/check.h"
#include "router/text/jinja_impl.h"
#include "router/text/unicode.h"
#include <errno.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { TOKENS_MAX = 1 << 20, BRACES_MAX = 200 };

typedef struct lexer {
    td_arena *a;
    const char *p; /* source, \n line ends only */
    size_t n, at;
    uint32_t line;
    bool line_start; /* only white space can stand between here and the line's start */
    td_jtoken *tok;
    uint32_t count, cap;
} lexer;

td_status td_jinja_syntax(td_status st, uint32_t line, const char *fmt, ...)
{
    char what[300];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(what, sizeof what, fmt, ap);
    va_end(ap);
    return td_refuse(st, "chat template line %u: %s", line, what);
}

static td_status add(lexer *l, td_jtoken t)
{
    if (l->count == l->cap) {
        uint32_t cap = l->cap ? l->cap * 2 : 256;
        td_jtoken *bigger = l->count < TOKENS_MAX ? td_arena_alloc(l->a, cap * sizeof *bigger) : NULL;
        if (!bigger) return td_jinja_syntax(TD_EFULL, l->line, "too many tokens");
        if (l->count) memcpy(bigger, l->tok, l->count * sizeof *bigger);
        l->tok = bigger;
        l->cap = cap;
    }
    if (!t.line) t.line = l->line;
    l->tok[l->count++] = t;
    return TD_OK;
}

static bool starts(const lexer *l, size_t at, const char *s)
{
    size_t k = strlen(s);
    return l->n - at >= k && !memcmp(l->p + at, s, k);
}

static void go(lexer *l, size_t to)
{
    for (; l->at < to; l->at++) l->line += l->p[l->at] == '\n';
}

static size_t skip_space(const lexer *l, size_t at)
{
    uint32_t cp;
    while (at < l->n) {
        size_t k = td_uc_next(l->p + at, l->n - at, &cp);
        if (!td_uc_py_space(cp)) break;
        at += k;
    }
    return at;
}

static size_t strip_end(const char *p, size_t n)
{
    uint32_t cp;
    while (n) {
        size_t k = n - 1;
        while (k && ((unsigned char)p[k] & 0xC0) == 0x80) k--;
        td_uc_next(p + k, n - k, &cp);
        if (!td_uc_py_space(cp)) break;
        n = k;
    }
    return n;
}

/* Text before a delimiter with sign ('-', '+' or 0): what of [p, p + n) is kept. */
static size_t keep_before(const lexer *l, const char *p, size_t n, char sign, bool variable)
{
    if (sign == '-') return strip_end(p, n);
    if (sign == '+' || variable) return n;
    size_t from = n;
    while (from && p[from - 1] != '\n') from--;
    if (!from && !l->line_start) return n;
    uint32_t cp;
    for (size_t i = from; i < n;) {
        i += td_uc_next(p + i, n - i, &cp);
        if (!td_uc_py_space(cp)) return n;
    }
    return from;
}

static char sign_at(const lexer *l, size_t at)
{
    return at < l->n && (l->p[at] == '-' || l->p[at] == '+') ? l->p[at] : 0;
}

/* Behind a closing delimiter that ends at `at`. */
static void after_close(lexer *l, size_t at, char sign, bool trim)
{
    if (sign == '-') at = skip_space(l, at);
    else if (trim && !sign && at < l->n && l->p[at] == '\n') at++;
    l->line_start = at && l->p[at - 1] == '\n';
    go(l, at);
}

/* `{% raw %}` or `{% endraw %}` at `at`: end of the tag before its closing delimiter's strip, 0 if it is
 * something else. */
static size_t raw_tag(const lexer *l, size_t at, const char *word, char *open_sign, char *close_sign)
{
    if (!starts(l, at, "{%")) return 0;
    size_t i = at + 2;
    *open_sign = sign_at(l, i);
    i = skip_space(l, i + (*open_sign != 0));
    if (!starts(l, i, word)) return 0;
    i = skip_space(l, i + strlen(word));
    *close_sign = sign_at(l, i);
    i += *close_sign != 0;
    return starts(l, i, "%}") ? i + 2 : 0;
}

static td_status add_data(lexer *l, const char *p, size_t n, uint32_t line)
{
    return n ? add(l, (td_jtoken){.type = T_DATA, .s = p, .n = (uint32_t)n, .line = line}) : TD_OK;
}

static td_status lex_raw(lexer *l, size_t tag_end, char sign)
{
    char open_sign, close_sign;
    uint32_t line = l->line;
    after_close(l, tag_end, sign, false);
    size_t from = l->at;
    for (size_t i = from; i < l->n; i++) {
        size_t end = l->p[i] == '{' ? raw_tag(l, i, "endraw", &open_sign, &close_sign) : 0;
        if (!end) continue;
        TD_TRY(add_data(l, l->p + from, keep_before(l, l->p + from, i - from, open_sign, false), line));
        go(l, end);
        after_close(l, end, close_sign, true);
        return TD_OK;
    }
    return td_jinja_syntax(TD_EPROTO, line, "raw block is not closed");
}

static td_status lex_comment(lexer *l)
{
    const char *end = memmem(l->p + l->at + 2, l->n - l->at - 2, "#}", 2);
    if (!end) return td_jinja_syntax(TD_EPROTO, l->line, "comment is not closed");
    size_t e = (size_t)(end - l->p);
    char sign = e > l->at + 2 ? sign_at(l, e - 1) : 0;
    go(l, e + 2);
    after_close(l, e + 2, sign, true);
    return TD_OK;
}

/* ---- inside delimiters ---- */

static int digit_of(char c, int base)
{
    int d = c >= '0' && c <= '9'                     ? c - '0'
            : (c | 0x20) >= 'a' && (c | 0x20) <= 'f' ? (c | 0x20) - 'a' + 10
                                                     : 99;
    return d < base ? d : -1;
}

static void add_octal(td_buf *b, const char *p, size_t n, size_t *i)
{
    uint32_t v = 0;
    for (int k = 0; k < 3 && *i < n && digit_of(p[*i], 8) >= 0; k++)
        v = v * 8 + (uint32_t)digit_of(p[(*i)++], 8);
    td_uc_add(b, v);
}

/* Python's unicode-escape of p[0, n). */
static td_status unescape(lexer *l, const char *p, size_t n, td_buf *b)
{
    static const char from[] = "abfnrtv\\'\"", to[] = "\a\b\f\n\r\t\v\\'\"";
    for (size_t i = 0; i < n;) {
        if (p[i] != '\\' || i + 1 >= n) {
            td_buf_chr(b, p[i++]);
            continue;
        }
        char c = p[i + 1];
        const char *known = c ? strchr(from, c) : NULL;
        if (known) {
            td_buf_chr(b, to[known - from]);
            i += 2;
        } else if (c == '\n') {
            i += 2;
        } else if (digit_of(c, 8) >= 0) {
            i++;
            add_octal(b, p, n, &i);
        } else if (c == 'x' || c == 'u' || c == 'U') {
            size_t want = c == 'x' ? 2 : c == 'u' ? 4 : 8, k = 0;
            uint32_t v = 0;
            for (; k < want && i + 2 + k < n && digit_of(p[i + 2 + k], 16) >= 0; k++)
                v = v << 4 | (uint32_t)digit_of(p[i + 2 + k], 16);
            if (k < want) return td_jinja_syntax(TD_EPROTO, l->line, "truncated \\%c escape in a string", c);
            td_uc_add(b, v);
            i += 2 + want;
        } else {
            td_buf_chr(b, '\\');
            i++;
        }
    }
    return TD_OK;
}

static td_status lex_string(lexer *l)
{
    char quote = l->p[l->at];
    size_t i = l->at + 1;
    bool escaped = false;
    while (i < l->n && l->p[i] != quote) {
        if (l->p[i] == '\\') escaped = true, i++;
        i++;
    }
    if (i >= l->n) return td_jinja_syntax(TD_EPROTO, l->line, "string is not closed");
    td_jtoken t = {.type = T_STR, .s = l->p + l->at + 1, .n = (uint32_t)(i - l->at - 1), .line = l->line};
    if (escaped) {
        td_buf b;
        td_buf_init(&b, 0);
        td_status st = unescape(l, t.s, t.n, &b);
        t.s = td_arena_strndup(l->a, b.p ? b.p : "", b.len);
        t.n = (uint32_t)b.len;
        td_buf_deinit(&b);
        if (st < 0) return st;
        if (!t.s) return td_jinja_syntax(TD_EFULL, l->line, "template too large");
    }
    go(l, i + 1);
    return add(l, t);
}

/* Digits of p from i, underscores between digits dropped, into t; returns the end. */
static size_t digits(const lexer *l, size_t i, int base, char *t, size_t *n)
{
    while (i < l->n) {
        size_t k = i + (l->p[i] == '_');
        if (k >= l->n || digit_of(l->p[k], base) < 0) break;
        if (*n < 60) t[(*n)++] = l->p[k];
        i = k + 1;
    }
    return i;
}

static td_status lex_number(lexer *l)
{
    char t[64];
    size_t n = 0, i = l->at;
    td_jtoken tok = {.type = T_INT};
    char x = i + 1 < l->n && l->p[i] == '0' ? (char)(l->p[i + 1] | 0x20) : 0;
    int base = x == 'x' ? 16 : x == 'o' ? 8 : x == 'b' ? 2 : 10;
    if (base != 10 && i + 2 < l->n && digit_of(l->p[i + 2], base) >= 0) i = digits(l, i + 2, base, t, &n);
    else base = 10, i = digits(l, i, 10, t, &n);
    if (base == 10) {
        size_t e = i;
        if (e + 1 < l->n && l->p[e] == '.' && digit_of(l->p[e + 1], 10) >= 0 &&
            !(l->at && l->p[l->at - 1] == '.')) {
            t[n++] = '.';
            tok.type = T_REAL;
            e = i = digits(l, e + 1, 10, t, &n);
        }
        if (e < l->n && (l->p[e] | 0x20) == 'e') {
            size_t k = e + 1, keep = n;
            t[n++] = 'e';
            if (k < l->n && (l->p[k] == '+' || l->p[k] == '-')) t[n++] = l->p[k++];
            if (k < l->n && digit_of(l->p[k], 10) >= 0 && n < 56) {
                i = digits(l, k, 10, t, &n);
                tok.type = T_REAL;
            } else n = keep;
        }
    }
    t[n] = '\0';
    errno = 0;
    if (tok.type == T_REAL) tok.f = strtod(t, NULL);
    else tok.i = strtoll(t, NULL, base);
    if (tok.type == T_INT && errno == ERANGE)
        return td_jinja_syntax(TD_ENOSUP, l->line, "integer beyond 64 bits");
    go(l, i);
    return add(l, tok);
}

static td_status lex_operator(lexer *l, char *braces, int *depth)
{
    static const struct {
        const char *s;
        td_jop op;
    } ops[] = {
        {"//", O_FLOORDIV}, {"**", O_POW},     {"==", O_EQ},      {"!=", O_NE},    {">=", O_GE},
        {"<=", O_LE},       {"+", O_ADD},      {"-", O_SUB},      {"*", O_MUL},    {"/", O_DIV},
        {"%", O_MOD},       {"~", O_TILDE},    {"<", O_LT},       {">", O_GT},     {"(", O_LPAREN},
        {")", O_RPAREN},    {"[", O_LBRACKET}, {"]", O_RBRACKET}, {"{", O_LBRACE}, {"}", O_RBRACE},
        {".", O_DOT},       {",", O_COMMA},    {":", O_COLON},    {"|", O_PIPE},   {"=", O_ASSIGN},
        {";", O_SEMICOLON},
    };
    size_t k = 0;
    while (k < TD_COUNT(ops) && !starts(l, l->at, ops[k].s)) k++;
    if (k == TD_COUNT(ops))
        return td_jinja_syntax(TD_EPROTO, l->line, "unexpected character '%c'",
                               l->p[l->at] >= 32 ? l->p[l->at] : '?');
    td_jop op = ops[k].op;
    if (op == O_LPAREN || op == O_LBRACKET || op == O_LBRACE) {
        if (*depth == BRACES_MAX) return td_jinja_syntax(TD_EFULL, l->line, "brackets nested too deeply");
        braces[(*depth)++] = (char)(op + 1);
    } else if (op == O_RPAREN || op == O_RBRACKET || op == O_RBRACE) {
        if (!*depth || braces[--*depth] != (char)op)
            return td_jinja_syntax(TD_EPROTO, l->line, "unexpected '%s'", ops[k].s);
    }
    go(l, l->at + strlen(ops[k].s));
    return add(l, (td_jtoken){.type = T_OP, .op = (uint8_t)op});
}

static bool name_char(const lexer *l, size_t at, size_t *k)
{
    uint32_t cp;
    *k = td_uc_next(l->p + at, l->n - at, &cp);
    return td_uc_class(cp) & TD_UC_WORD;
}

/* From behind the opening delimiter to behind the closing one. */
static td_status lex_inside(lexer *l, bool block)
{
    char braces[BRACES_MAX];
    int depth = 0;
    const char *close = block ? "%}" : "}}";
    for (;;) {
        go(l, skip_space(l, l->at));
        if (l->at >= l->n)
            return td_jinja_syntax(TD_EPROTO, l->line, "%s is not closed", block ? "block" : "expression");
        char sign = sign_at(l, l->at), c = l->p[l->at];
        if (!block && sign == '+') sign = 0;
        if (!depth && starts(l, l->at + (sign != 0), close)) {
            TD_TRY(add(l, (td_jtoken){.type = block ? T_BLOCK_END : T_VAR_END}));
            size_t end = l->at + (sign != 0) + 2;
            go(l, end);
            after_close(l, end, sign, block);
            return TD_OK;
        }
        size_t k;
        if (c == '"' || c == '\'') TD_TRY(lex_string(l));
        else if (c >= '0' && c <= '9') TD_TRY(lex_number(l));
        else if (name_char(l, l->at, &k)) {
            size_t i = l->at;
            while (i < l->n && name_char(l, i, &k)) i += k;
            td_jtoken t = {.type = T_NAME, .s = l->p + l->at, .n = (uint32_t)(i - l->at)};
            go(l, i);
            TD_TRY(add(l, t));
        } else TD_TRY(lex_operator(l, braces, &depth));
    }
}

static td_status lex_all(lexer *l)
{
    while (l->at < l->n) {
        size_t i = l->at;
        while (i < l->n && !(l->p[i] == '{' && i + 1 < l->n &&
                             (l->p[i + 1] == '{' || l->p[i + 1] == '%' || l->p[i + 1] == '#')))
            i++;
        if (i >= l->n) {
            TD_TRY(add_data(l, l->p + l->at, l->n - l->at, l->line));
            go(l, l->n);
            break;
        }
        char kind = l->p[i + 1], sign = sign_at(l, i + 2), open_sign = 0, close_sign = 0;
        TD_TRY(
            add_data(l, l->p + l->at, keep_before(l, l->p + l->at, i - l->at, sign, kind == '{'), l->line));
        go(l, i);
        size_t raw = raw_tag(l, i, "raw", &open_sign, &close_sign);
        if (raw && close_sign != '+') {
            go(l, raw);
            TD_TRY(lex_raw(l, raw, close_sign));
        } else if (kind == '#') {
            TD_TRY(lex_comment(l));
        } else {
            TD_TRY(add(l, (td_jtoken){.type = kind == '%' ? T_BLOCK_BEGIN : T_VAR_BEGIN}));
            go(l, i + 2 + (sign != 0));
            TD_TRY(lex_inside(l, kind == '%'));
        }
    }
    return add(l, (td_jtoken){.type = T_EOF});
}

/* Line ends become \n; one at the very end is dropped. */
static char *normalize(td_arena *a, const char *src, size_t n, size_t *out)
{
    char *p = td_arena_alloc(a, n + 1);
    size_t k = 0;
    if (!p) return NULL;
    for (size_t i = 0; i < n; i++) {
        if (src[i] == '\r' && i + 1 < n && src[i + 1] == '\n') continue;
        p[k++] = src[i] == '\r' ? '\n' : src[i];
    }
    if (k && p[k - 1] == '\n') k--;
    p[k] = '\0';
    *out = k;
    return p;
}

td_status td_jinja_lex(td_arena *a, const char *src, size_t n, td_jtoken **out, uint32_t *count)
{
    lexer l = {.a = a, .line = 1, .line_start = true};
    l.p = normalize(a, src, n, &l.n);
    if (!l.p) return td_jinja_syntax(TD_EFULL, 1, "template too large");
    TD_TRY(lex_all(&l));
    *out = l.tok;
    *count = l.count;
    return TD_OK;
}
