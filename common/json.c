// SPDX-License-Identifier: Apache-2.0
/* common/json.c - one pass, no recursion: while a container is open, its `next` points to the container
 * around it and its `s` to its last child, so nesting needs no stack and no second structure. */
#include "common/json.h"
#include "common/check.h"
#include "common/hash.h"
#include "common/utf8.h"
#include <errno.h>
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

enum { DEFAULT_DEPTH = 64, DEEPEST = 1024, DEFAULT_NODES = 4 << 20, NUMBER_BYTES = 1024, SMALL_OBJECT = 16 };

typedef struct reader {
    td_arena *arena;
    const char *start, *p, *end;
    size_t nodes, max_nodes;
} reader;

/* ---- errors ---- */

static td_status bad_at(const reader *r, const char *where, td_status code, const char *what)
{
    size_t line = 1, column = 1;
    for (const char *q = r->start; q < where; q++) {
        if (*q == '\n') {
            line++;
            column = 1;
        } else if (((unsigned char)*q & 0xC0) != 0x80) {
            column++;
        }
    }
    return td_refuse(code, "line %zu column %zu: %s", line, column, what);
}

static td_status bad(const reader *r, const char *what)
{
    return bad_at(r, r->p, TD_EPROTO, r->p < r->end ? what : "unexpected end of text");
}

static td_status no_memory(const reader *r)
{
    return bad_at(r, r->p, TD_EFULL, "too large: memory limit reached");
}

/* ---- scalars ---- */

/* What a byte means inside a string. */
enum { PLAIN, QUOTE, BACKSLASH, CONTROL, HIGH };
static inline int class_of(unsigned char c)
{
    return c == '"' ? QUOTE : c == '\\' ? BACKSLASH : c < 0x20 ? CONTROL : c >= 0x80 ? HIGH : PLAIN;
}

static int hex4(const char *p)
{
    int v = 0;
    for (int i = 0; i < 4; i++) {
        int c = p[i] | 0x20;
        int d = p[i] >= '0' && p[i] <= '9' ? p[i] - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
        if (d < 0) return -1;
        v = v << 4 | d;
    }
    return v;
}

/* r->p is behind the backslash; writes the character at *to. */
static td_status read_escape(reader *r, char **to)
{
    static const char names[] = "\"\\/bfnrt", values[] = "\"\\/\b\f\n\r\t";
    char c = *r->p;
    const char *name = c ? strchr(names, c) : NULL;
    if (name) {
        *(*to)++ = values[name - names];
        r->p++;
        return TD_OK;
    }
    if (c != 'u') return bad(r, "unknown escape");
    int v = r->end - r->p >= 5 ? hex4(r->p + 1) : -1;
    if (v < 0) return bad(r, "\\u needs four hexadecimal digits");
    uint32_t cp = (uint32_t)v;
    if (cp >= 0xD800 && cp < 0xE000) {
        bool pair = cp < 0xDC00 && r->end - r->p >= 11 && r->p[5] == '\\' && r->p[6] == 'u';
        int low = pair ? hex4(r->p + 7) : -1;
        if (low < 0xDC00 || low > 0xDFFF) return bad(r, "unpaired surrogate");
        cp = 0x10000 + ((cp - 0xD800) << 10) + ((uint32_t)low - 0xDC00);
        r->p += 6;
    }
    r->p += 5;
    *to += td_utf8_put(*to, cp);
    return TD_OK;
}

/* From the opening quote to the closing one, checking bytes; tells whether any escape is inside. */
static td_status scan_string(reader *r, const char **close, bool *escaped)
{
    *escaped = false;
    for (;;) {
        while (r->p < r->end && class_of((unsigned char)*r->p) == PLAIN) r->p++;
        if (r->p >= r->end) return bad(r, "");
        uint32_t cp;
        int k;
        switch (class_of((unsigned char)*r->p)) {
        case QUOTE: *close = r->p++; return TD_OK;
        case CONTROL: return bad(r, "control character in a string");
        case BACKSLASH:
            *escaped = true;
            if (++r->p >= r->end) return bad(r, "");
            if ((unsigned char)*r->p >= 0x20 && (unsigned char)*r->p < 0x80) r->p++;
            break;
        default:
            k = td_utf8_next(r->p, r->end, &cp);
            if (k < 0) return bad(r, "invalid UTF-8");
            r->p += k;
        }
    }
}

static td_status read_string(reader *r, const char **s, uint32_t *n)
{
    const char *open = ++r->p, *close = open;
    bool escaped;
    TD_TRY(scan_string(r, &close, &escaped));
    if (close - open > UINT32_MAX / 2) return no_memory(r);
    char *t = escaped ? td_arena_alloc(r->arena, (size_t)(close - open) + 1)
                      : td_arena_strndup(r->arena, open, (size_t)(close - open));
    if (!t) return no_memory(r);
    *s = t;
    *n = (uint32_t)(close - open);
    if (!escaped) return TD_OK;
    char *to = t;
    r->p = open;
    while (r->p < close) {
        const char *slash = memchr(r->p, '\\', (size_t)(close - r->p));
        size_t run = (size_t)((slash ? slash : close) - r->p);
        memcpy(to, r->p, run);
        to += run;
        r->p += run;
        if (!slash) break;
        r->p++;
        TD_TRY(read_escape(r, &to));
    }
    *n = (uint32_t)(to - t);
    r->p = close + 1;
    return TD_OK;
}

static inline bool digit(const reader *r)
{
    return r->p < r->end && *r->p >= '0' && *r->p <= '9';
}

/* Digits into *m while it holds; counts the significant ones. */
static void read_digits(reader *r, uint64_t *m, int *n)
{
    for (; digit(r); r->p++) {
        if (*n < 19) *m = *m * 10 + (uint64_t)(*r->p - '0');
        if (*m) ++*n;
    }
}

/* Exact by one rounding when both factors are exact doubles (15 digits, 10^22); else the C library. */
static double to_double(const char *text, uint64_t m, int digits, int64_t exp10)
{
    static const double power[] = {1e0,  1e1,  1e2,  1e3,  1e4,  1e5,  1e6,  1e7,  1e8,  1e9,  1e10, 1e11,
                                   1e12, 1e13, 1e14, 1e15, 1e16, 1e17, 1e18, 1e19, 1e20, 1e21, 1e22};
    if (digits > 15 || exp10 < -22 || exp10 > 22) return strtod(text, NULL);
    double v = (double)m;
    v = exp10 < 0 ? v / power[-exp10] : v * power[exp10];
    return text[0] == '-' ? -v : v;
}

static td_status read_number(reader *r, td_json *v)
{
    const char *from = r->p;
    bool minus = *r->p == '-', real = false;
    uint64_t m = 0;
    int n = 0, fraction = 0;
    r->p += minus;
    if (!digit(r)) return bad(r, "a digit must follow '-'");
    if (*r->p == '0') r->p++;
    else read_digits(r, &m, &n);
    if (digit(r)) return bad(r, "a number may not start with 0");
    if (r->p < r->end && *r->p == '.') {
        const char *point = r->p++;
        if (!digit(r)) return bad(r, "a digit must follow '.'");
        read_digits(r, &m, &n);
        fraction = (int)TD_MIN(r->p - point - 1, INT_MAX);
        real = true;
    }
    int exponent = 0;
    if (r->p < r->end && (*r->p | 0x20) == 'e') {
        r->p++;
        bool down = r->p < r->end && *r->p == '-';
        if (r->p < r->end && (*r->p == '-' || *r->p == '+')) r->p++;
        if (!digit(r)) return bad(r, "a digit must follow the exponent sign");
        for (; digit(r); r->p++)
            if (exponent < 100000) exponent = exponent * 10 + (*r->p - '0');
        if (down) exponent = -exponent;
        real = true;
    }
    if (r->p - from > NUMBER_BYTES) return bad_at(r, from, TD_EFULL, "number longer than 1024 characters");
    if (!real && (n < 19 || (n == 19 && m <= INT64_MAX))) {
        v->type = TD_JSON_INT;
        v->i = minus ? -(int64_t)m : (int64_t)m;
        v->num = (double)v->i;
        return TD_OK;
    }
    v->type = TD_JSON_REAL;
    v->n = (uint32_t)(r->p - from);
    v->s = td_arena_strndup(r->arena, from, v->n);
    if (!v->s) return no_memory(r);
    v->num = to_double(v->s, m, n, (int64_t)exponent - fraction);
    if (isfinite(v->num)) return TD_OK;
    return bad_at(r, from, TD_EPROTO, "number out of range");
}

static td_status read_word(reader *r, td_json *v, const char *word, td_json_type type, bool truth)
{
    size_t n = strlen(word);
    if ((size_t)(r->end - r->p) < n || memcmp(r->p, word, n))
        return bad_at(r, r->p, TD_EPROTO, "expected a value");
    r->p += n;
    v->type = type;
    v->truth = truth;
    return TD_OK;
}

/* ---- containers ---- */

static inline void skip_space(reader *r)
{
    while (r->p < r->end && (*r->p == ' ' || *r->p == '\n' || *r->p == '\r' || *r->p == '\t')) r->p++;
}

/* Containers are only opened here: type set, bracket consumed. */
static td_status read_value(reader *r, td_json *v)
{
    if (r->p >= r->end) return bad(r, "");
    switch (*r->p) {
    case '{':
    case '[':
        v->type = *r->p++ == '{' ? TD_JSON_OBJ : TD_JSON_ARR;
        return TD_OK;
    case '"': v->type = TD_JSON_STR; return read_string(r, &v->s, &v->n);
    case 't': return read_word(r, v, "true", TD_JSON_BOOL, true);
    case 'f': return read_word(r, v, "false", TD_JSON_BOOL, false);
    case 'n': return read_word(r, v, "null", TD_JSON_NULL, false);
    default:
        if (*r->p != '-' && !digit(r)) return bad(r, "expected a value");
        return read_number(r, v);
    }
}

static td_status read_key(reader *r, td_json *v)
{
    if (r->p >= r->end || *r->p != '"') return bad(r, "expected a member name in quotes");
    TD_TRY(read_string(r, &v->key, &v->key_len));
    skip_space(r);
    if (r->p >= r->end || *r->p != ':') return bad(r, "expected ':'");
    r->p++;
    skip_space(r);
    return TD_OK;
}

static inline td_json *last_child(const td_json *open)
{
    return (td_json *)(uintptr_t)open->s;
}

static td_json *add_node(reader *r, td_json *open)
{
    td_json *v = r->nodes < r->max_nodes ? td_arena_alloc(r->arena, sizeof *v) : NULL;
    if (!v) return NULL;
    r->nodes++;
    if (!open) return v;
    if (open->n++) last_child(open)->next = v;
    else open->child = v;
    open->s = (const char *)v;
    return v;
}

static inline bool same_key(const td_json *a, const td_json *b)
{
    return a->key_len == b->key_len && !memcmp(a->key, b->key, a->key_len);
}

/* `later` repeats the key of `first`: its value moves there and the node leaves the list (before = its
 * predecessor). */
static void replace_member(td_json *obj, td_json *first, td_json *before, td_json *later)
{
    before->next = later->next;
    td_json *next = first->next;
    *first = *later;
    first->next = next;
    obj->n--;
}

static td_hkey table_key;
static pthread_once_t table_once = PTHREAD_ONCE_INIT;
static void fill_table_key(void)
{
    /* A client must not be able to choose keys that collide; without entropy, addresses are the next best. */
    if (getrandom(&table_key, sizeof table_key, GRND_NONBLOCK) != (ssize_t)sizeof table_key)
        table_key = (td_hkey){(uintptr_t)&table_key, (uintptr_t)&errno};
}

static bool merge_large(td_json *obj)
{
    pthread_once(&table_once, fill_table_key);
    size_t size = 64;
    while (size < (size_t)obj->n * 2) size *= 2;
    td_json **slot = calloc(size, sizeof *slot);
    if (!slot) return false;
    for (td_json *m = obj->child, *before = NULL; m; m = m->next) {
        size_t i = (size_t)td_siphash128(table_key, m->key, m->key_len).lo & (size - 1);
        while (slot[i] && !same_key(slot[i], m)) i = (i + 1) & (size - 1);
        if (slot[i]) {
            replace_member(obj, slot[i], before, m);
            m = before;
        } else {
            slot[i] = m;
        }
        before = m;
    }
    free(slot);
    return true;
}

static void merge_small(td_json *obj)
{
    for (td_json *m = obj->child, *before = NULL; m; m = m->next) {
        td_json *f = obj->child;
        while (f != m && !same_key(f, m)) f = f->next;
        if (f != m) {
            replace_member(obj, f, before, m);
            m = before;
        }
        before = m;
    }
}

static td_status close_container(reader *r, td_json *open)
{
    open->next = NULL;
    open->s = NULL;
    if (open->type != TD_JSON_OBJ || open->n < 2) return TD_OK;
    if (open->n <= SMALL_OBJECT) merge_small(open);
    else if (!merge_large(open)) return no_memory(r);
    return TD_OK;
}

/* A value is complete: close what ends here; afterwards either *open is NULL (all done) or the next element
 * follows. */
static td_status after_value(reader *r, td_json **open, int *depth)
{
    while (*open) {
        td_json *c = *open;
        bool object = c->type == TD_JSON_OBJ;
        skip_space(r);
        if (r->p < r->end && *r->p == ',') {
            r->p++;
            skip_space(r);
            return TD_OK;
        }
        if (r->p >= r->end || *r->p != (object ? '}' : ']'))
            return bad(r, object ? "expected ',' or '}'" : "expected ',' or ']'");
        r->p++;
        *open = c->next;
        --*depth;
        TD_TRY(close_container(r, c));
    }
    return TD_OK;
}

static td_status parse_tree(reader *r, int max_depth, td_json **out)
{
    td_json *open = NULL;
    int depth = 0;
    skip_space(r);
    do {
        td_json *v = add_node(r, open);
        if (!v) return r->nodes >= r->max_nodes ? bad_at(r, r->p, TD_EFULL, "too many values") : no_memory(r);
        if (!*out) *out = v;
        if (open && open->type == TD_JSON_OBJ) TD_TRY(read_key(r, v));
        TD_TRY(read_value(r, v));
        if (v->type == TD_JSON_OBJ || v->type == TD_JSON_ARR) {
            if (depth >= max_depth) return bad_at(r, r->p, TD_EFULL, "nested too deeply");
            skip_space(r);
            if (r->p >= r->end || *r->p != (v->type == TD_JSON_OBJ ? '}' : ']')) {
                v->next = open;
                open = v;
                depth++;
                continue;
            }
            r->p++;
        }
        TD_TRY(after_value(r, &open, &depth));
    } while (open);
    skip_space(r);
    return r->p < r->end ? bad(r, "text after the value") : TD_OK;
}

td_status td_json_parse(td_arena *a, const char *text, size_t n, td_json_limits lim, td_json **out)
{
    int depth = lim.max_depth > 0 ? TD_MIN(lim.max_depth, DEEPEST) : DEFAULT_DEPTH;
    reader r = {.arena = a, .start = text, .p = text, .end = text + n,
                .max_nodes = lim.max_nodes ? lim.max_nodes : DEFAULT_NODES};
    td_json *root = NULL;
    TD_TRY(parse_tree(&r, depth, &root));
    *out = root;
    return TD_OK;
}

/* ---- getters ---- */

const td_json *td_json_get(const td_json *obj, const char *key)
{
    if (!obj || obj->type != TD_JSON_OBJ) return NULL;
    size_t n = strlen(key);
    for (const td_json *m = obj->child; m; m = m->next)
        if (m->key_len == n && !memcmp(m->key, key, n)) return m;
    return NULL;
}

const td_json *td_json_at(const td_json *arr, size_t i)
{
    if (!arr || arr->type != TD_JSON_ARR) return NULL;
    const td_json *e = arr->child;
    while (e && i--) e = e->next;
    return e;
}

const char *td_json_str(const td_json *obj, const char *key, const char *dflt)
{
    const td_json *v = td_json_get(obj, key);
    return v && v->type == TD_JSON_STR ? v->s : dflt;
}

/* 2.0 counts as an integer here: clients and config files write it. */
int64_t td_json_int(const td_json *obj, const char *key, int64_t dflt)
{
    const td_json *v = td_json_get(obj, key);
    if (!v) return dflt;
    if (v->type == TD_JSON_INT) return v->i;
    if (v->type == TD_JSON_REAL && fabs(v->num) < 0x1p62 && v->num == floor(v->num)) return (int64_t)v->num;
    return dflt;
}

double td_json_num(const td_json *obj, const char *key, double dflt)
{
    const td_json *v = td_json_get(obj, key);
    return v && (v->type == TD_JSON_INT || v->type == TD_JSON_REAL) ? v->num : dflt;
}

bool td_json_bool(const td_json *obj, const char *key, bool dflt)
{
    const td_json *v = td_json_get(obj, key);
    return v && v->type == TD_JSON_BOOL ? v->truth : dflt;
}

bool td_json_is_null(const td_json *v)
{
    return !v || v->type == TD_JSON_NULL;
}

/* ---- writer ---- */

static void new_line(td_buf *b, int indent, int depth)
{
    if (indent > 0) td_buf_fmt(b, "\n%*s", indent * depth, "");
}

/* An integer beyond i64 keeps its digits, as Python's integers do. */
static void write_real(td_buf *b, const td_json *v)
{
    if (v->s && v->n && !strpbrk(v->s, ".eE")) td_buf_add(b, v->s, v->n);
    else td_buf_json_num(b, v->num);
}

static void write_value(td_buf *b, const td_json *v, int indent, int depth);

static void write_children(td_buf *b, const td_json *v, int indent, int depth)
{
    bool object = v->type == TD_JSON_OBJ;
    td_buf_chr(b, object ? '{' : '[');
    for (const td_json *c = v->child; c && td_buf_ok(b); c = c->next) {
        if (c != v->child) td_buf_str(b, indent > 0 ? "," : ", ");
        new_line(b, indent, depth + 1);
        if (object) {
            td_buf_json_str(b, c->key, c->key_len);
            td_buf_str(b, ": ");
        }
        write_value(b, c, indent, depth + 1);
    }
    if (v->child) new_line(b, indent, depth);
    td_buf_chr(b, object ? '}' : ']');
}

static void write_value(td_buf *b, const td_json *v, int indent, int depth)
{
    switch (v->type) {
    case TD_JSON_NULL: td_buf_str(b, "null"); break;
    case TD_JSON_BOOL: td_buf_str(b, v->truth ? "true" : "false"); break;
    case TD_JSON_INT: td_buf_fmt(b, "%lld", (long long)v->i); break;
    case TD_JSON_REAL: write_real(b, v); break;
    case TD_JSON_STR: td_buf_json_str(b, v->s, v->n); break;
    case TD_JSON_ARR:
    case TD_JSON_OBJ:
        if (depth <= DEEPEST) write_children(b, v, indent, depth);
        else b->full = true;
    }
}

void td_json_write(td_buf *b, const td_json *v, int indent)
{
    write_value(b, v, indent, 0);
}
