// SPDX-License-Identifier: Apache-2.0
/* router/text/jinja_filter.c - filters. Each is Jinja2's of the same name; tojson is the one transformers
 * installs. */
#include "common/check.h"
#include "router/text/jinja_impl.h"
#include "router/text/unicode.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { INDENT_MAX = 64, WIDTH_MAX = 1 << 20 };

#define FILTER(name) static td_jv name(td_jrun *r, td_jv v, td_jargs *a)
#define BIND(what, names, required, out)                                                                     \
    td_jv out[16];                                                                                           \
    if (!td_jargs_bind(r, a, what, names, required, out)) return v

static int64_t int_arg(td_jrun *r, td_jv v, int64_t dflt, const char *what)
{
    int64_t i = dflt;
    if (v.kind != JV_MISSING && v.kind != JV_NONE && !td_jv_integer(v, &i))
        td_jrun_fail(r, TD_EBADREQ, "%s must be an integer, not %s", what, td_jv_type(v));
    return i;
}

static bool flag_arg(td_jv v, bool dflt) { return v.kind == JV_MISSING ? dflt : td_jv_true(v); }

static td_jv need_text(td_jrun *r, td_jv v, const char *what)
{
    if (v.kind == JV_STR) return v;
    return td_jrun_fail(r, TD_EBADREQ, "%s must be a string, not %s", what, td_jv_type(v));
}

/* ---- text: most are str methods of the same name applied to str(value) ---- */

static td_jv via_method(td_jrun *r, td_jv v, td_jargs *a, const char *name)
{
    td_jv s = td_jv_to_str(r, v);
    return r->st < 0 ? s : td_jinja_method(JV_STR, name, (uint32_t)strlen(name))->call(r, s, a);
}

FILTER(f_upper) { return via_method(r, v, a, "upper"); }
FILTER(f_lower) { return via_method(r, v, a, "lower"); }
FILTER(f_capitalize) { return via_method(r, v, a, "capitalize"); }

FILTER(f_trim)
{
    BIND("trim", "chars", 0, x);
    td_jargs pass = {.pos = x, .n = x[0].kind != JV_MISSING};
    return via_method(r, v, &pass, "strip");
}

FILTER(f_center)
{
    BIND("center", "width", 0, x);
    td_jv width = td_jv_int(int_arg(r, x[0], 80, "width"));
    td_jargs pass = {.pos = &width, .n = 1};
    return via_method(r, v, &pass, "center");
}

FILTER(f_replace)
{
    BIND("replace", "old new count", 2, x);
    td_jv pass[3] = {td_jv_to_str(r, x[0]), td_jv_to_str(r, x[1]), x[2]};
    td_jargs b = {.pos = pass, .n = x[2].kind == JV_MISSING || x[2].kind == JV_NONE ? 2 : 3};
    td_jv out = via_method(r, v, &b, "replace");
    out.flag = 0; /* plain text without autoescape, whatever went in */
    return out;
}

/* First letter of each word upper, the rest lower; words end at blanks, dashes and opening brackets. */
FILTER(f_title)
{
    BIND("title", "", 0, none);
    (void)none;
    td_buf b;
    td_jv s = td_jv_to_str(r, v);
    bool start = true;
    uint32_t cp;
    if (r->st < 0) return v;
    td_jbuf_init(r, &b);
    for (size_t i = 0, k; i < s.n; i += k) {
        k = td_uc_next(s.u.s + i, s.n - i, &cp);
        if (td_uc_py_space(cp) || (cp < 0x80 && cp && strchr("-({[<", (int)cp))) {
            td_buf_add(&b, s.u.s + i, k);
            start = true;
        } else {
            if (start) td_uc_add_upper(&b, s.u.s + i, k);
            else td_uc_add_lower(&b, s.u.s + i, k);
            start = false;
        }
    }
    return td_jv_take(r, &b);
}

FILTER(f_string)
{
    BIND("string", "", 0, none);
    (void)none;
    return td_jv_to_str(r, v);
}

FILTER(f_safe)
{
    BIND("safe", "", 0, none);
    (void)none;
    td_jv s = td_jv_to_str(r, v);
    if (s.kind == JV_STR) s.flag = 1;
    return s;
}

FILTER(f_escape)
{
    BIND("escape", "", 0, none);
    (void)none;
    td_jv s = td_jv_to_str(r, v), empty = {JV_STR, 1, 0, {.s = ""}};
    if (s.kind != JV_STR || s.flag) return s;
    return td_jv_arith(r, O_ADD, empty, s); /* adding to safe text escapes */
}

static size_t line_end(td_jv s, size_t i, size_t *next)
{
    uint32_t cp;
    while (i < s.n) {
        size_t k = td_uc_next(s.u.s + i, s.n - i, &cp);
        bool crlf = cp == '\r' && i + 1 < s.n && s.u.s[i + 1] == '\n';
        if ((cp >= 10 && cp <= 13) || (cp >= 0x1C && cp <= 0x1E) || cp == 0x85 || cp == 0x2028 ||
            cp == 0x2029) {
            *next = i + k + crlf;
            return i;
        }
        i += k;
    }
    *next = s.n;
    return s.n;
}

FILTER(f_indent)
{
    BIND("indent", "width first blank", 0, x);
    td_jv s = need_text(r, v, "value");
    char spaces[INDENT_MAX * 4];
    const char *pad = spaces;
    size_t pad_n;
    if (x[0].kind == JV_STR) pad = x[0].u.s, pad_n = x[0].n;
    else {
        int64_t n = int_arg(r, x[0], 4, "width");
        if (n > (int64_t)sizeof spaces)
            return td_jrun_fail(r, TD_EFULL, "indent of more than %zu", sizeof spaces);
        pad_n = n > 0 ? (size_t)n : 0;
        memset(spaces, ' ', pad_n);
    }
    if (r->st < 0) return s;
    td_buf b;
    td_jbuf_init(r, &b);
    if (flag_arg(x[1], false)) td_buf_add(&b, pad, pad_n);
    /* A line break at the end of the text is followed by an empty line, which gets no indent: so in Jinja2.
     * */
    bool first = true;
    for (size_t i = 0, next = 0, e = 0; first || e < s.n; i = next, first = false) {
        e = line_end(s, i, &next);
        if (!first) td_buf_chr(&b, '\n');
        if (!first && (e > i || flag_arg(x[2], false))) td_buf_add(&b, pad, pad_n);
        td_buf_add(&b, s.u.s + i, e - i);
    }
    return td_jv_take(r, &b);
}

FILTER(f_wordcount)
{
    BIND("wordcount", "", 0, none);
    (void)none;
    td_jv s = td_jv_to_str(r, v);
    int64_t n = 0;
    bool in = false;
    uint32_t cp;
    for (size_t i = 0; s.kind == JV_STR && i < s.n;) {
        i += td_uc_next(s.u.s + i, s.n - i, &cp);
        bool word = td_uc_class(cp) & TD_UC_WORD;
        n += word && !in;
        in = word;
    }
    return td_jv_int(n);
}

FILTER(f_truncate)
{
    BIND("truncate", "length killwords end leeway", 0, x);
    td_jv end = x[2].kind == JV_MISSING ? td_jv_text("...", 3) : need_text(r, x[2], "end");
    int64_t length = int_arg(r, x[0], 255, "length"), leeway = int_arg(r, x[3], 5, "leeway"), n;
    n = td_jv_len(r, v);
    if (r->st < 0 || n <= length + leeway) return v;
    td_jv s = need_text(r, v, "value");
    if (r->st < 0) return v;
    int64_t keep = length - td_jv_len(r, end);
    if (keep < 0) return td_jrun_fail(r, TD_EBADREQ, "truncate: length is shorter than its end");
    size_t bytes = td_uc_offset(s.u.s, s.n, (size_t)keep);
    if (!flag_arg(x[1], false))
        for (size_t i = bytes; i-- > 0;)
            if (s.u.s[i] == ' ') {
                bytes = i;
                break;
            }
    return td_jv_arith(r, O_ADD, td_jv_text(s.u.s, bytes), end);
}

FILTER(f_format)
{
    if (a->n_kw) return td_jrun_fail(r, TD_ENOSUP, "filter format with keyword arguments is not supported");
    td_jlist l = {a->pos, a->n, a->n};
    return td_jinja_percent(r, td_jv_to_str(r, v), (td_jv){.kind = JV_TUPLE, .u.list = &l});
}

/* ---- JSON ---- */

FILTER(f_tojson)
{
    BIND("tojson", "ensure_ascii indent separators sort_keys", 0, x);
    td_jjson o = {
        .item_sep = ", ", .key_sep = ": ", .ascii = flag_arg(x[0], false), .sort = flag_arg(x[3], false)};
    char spaces[INDENT_MAX + 1];
    if (x[1].kind == JV_STR) {
        td_jv keep = td_jv_copy_text(r, x[1].u.s, x[1].n);
        if (keep.kind == JV_STR) o.indent = keep.u.s;
    } else if (x[1].kind != JV_MISSING && x[1].kind != JV_NONE) {
        int64_t n = int_arg(r, x[1], 0, "indent");
        if (n > INDENT_MAX) return td_jrun_fail(r, TD_EFULL, "tojson: indent of more than %d", INDENT_MAX);
        memset(spaces, ' ', sizeof spaces);
        spaces[n > 0 ? n : 0] = '\0';
        o.indent = spaces;
    }
    if (o.indent) o.item_sep = ",";
    if (x[2].kind == JV_TUPLE || x[2].kind == JV_LIST) {
        td_jlist *l = x[2].u.list;
        if (l->n != 2 || l->v[0].kind != JV_STR || l->v[1].kind != JV_STR)
            return td_jrun_fail(r, TD_EBADREQ, "tojson: separators must be two strings");
        td_jv i = td_jv_copy_text(r, l->v[0].u.s, l->v[0].n), k = td_jv_copy_text(r, l->v[1].u.s, l->v[1].n);
        if (r->st < 0) return v;
        o.item_sep = i.u.s;
        o.key_sep = k.u.s;
    } else if (x[2].kind != JV_MISSING && x[2].kind != JV_NONE)
        return td_jrun_fail(r, TD_EBADREQ, "tojson: separators must be two strings");
    td_buf b;
    td_jbuf_init(r, &b);
    td_jv_json(r, v, &o, &b, 0);
    return td_jv_take(r, &b);
}

/* ---- numbers ---- */

/* Python's int(text, base): blanks around, a sign, single underscores between digits. */
static bool parse_int(td_jv s, int64_t base, int64_t *out)
{
    char t[80];
    size_t n = 0, i = 0, e = s.n;
    while (i < e && td_uc_py_space((unsigned char)s.u.s[i])) i++;
    while (e > i && td_uc_py_space((unsigned char)s.u.s[e - 1])) e--;
    for (; i < e; i++) {
        char c = s.u.s[i];
        if (c == '_' && n && i + 1 < e && s.u.s[i - 1] != '_' && s.u.s[i - 1] != '+' && s.u.s[i - 1] != '-')
            continue;
        if (n > 70 ||
            !(c == '+' || c == '-' || (c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'z')))
            return false;
        t[n++] = c;
    }
    t[n] = '\0';
    size_t at = t[0] == '+' || t[0] == '-';
    if (t[at] == '0' && t[at + 1] &&
        ((base == 8 && (t[at + 1] | 0x20) == 'o') || (base == 2 && (t[at + 1] | 0x20) == 'b')))
        memmove(t + at, t + at + 2, n - at - 1);
    if (!t[at] || t[at] == '+' || t[at] == '-') return false;
    char *end;
    long long v = strtoll(t, &end, (int)base);
    if (*end || end == t || v == INT64_MAX || v == INT64_MIN) return false;
    *out = v;
    return true;
}

static bool parse_real(td_jv s, double *out)
{
    char t[400], *end;
    size_t i = 0, e = s.n, n = 0;
    while (i < e && td_uc_py_space((unsigned char)s.u.s[i])) i++;
    while (e > i && td_uc_py_space((unsigned char)s.u.s[e - 1])) e--;
    if (e == i || e - i >= sizeof t) return false;
    for (; i < e; i++) {
        char c = s.u.s[i];
        if (c == '_') continue;
        if ((c | 0x20) == 'x' || c == '(') return false; /* strtod's hexadecimal and nan(...) */
        t[n++] = c;
    }
    t[n] = '\0';
    *out = strtod(t, &end);
    return n && !*end;
}

FILTER(f_int)
{
    BIND("int", "default base", 0, x);
    td_jv dflt = x[0].kind == JV_MISSING ? td_jv_int(0) : x[0];
    int64_t i, base = int_arg(r, x[1], 10, "base");
    double f;
    if (v.kind == JV_UNDEF) td_jrun_fail(r, TD_EBADREQ, "'%.*s' is undefined", (int)v.n, v.u.s);
    if (r->st < 0) return v;
    if (td_jv_integer(v, &i)) return td_jv_int(i);
    if (base != 0 && (base < 2 || base > 36)) return dflt;
    if (v.kind == JV_STR && parse_int(v, base, &i)) return td_jv_int(i);
    if (v.kind == JV_REAL) f = v.u.f;
    else if (v.kind != JV_STR || !parse_real(v, &f)) return dflt;
    if (isnan(f) || isinf(f)) return dflt;
    return fabs(f) < 9.2e18 ? td_jv_int((int64_t)f) : td_jrun_fail(r, TD_ENOSUP, "integer beyond 64 bits");
}

FILTER(f_float)
{
    BIND("float", "default", 0, x);
    double f;
    if (v.kind == JV_UNDEF) return td_jrun_fail(r, TD_EBADREQ, "'%.*s' is undefined", (int)v.n, v.u.s);
    if (td_jv_number(v, &f) || (v.kind == JV_STR && parse_real(v, &f))) return td_jv_real(f);
    return x[0].kind == JV_MISSING ? td_jv_real(0) : x[0];
}

FILTER(f_abs)
{
    BIND("abs", "", 0, none);
    (void)none;
    int64_t i;
    if (v.kind == JV_REAL) return td_jv_real(fabs(v.u.f));
    if (td_jv_integer(v, &i) && i != INT64_MIN) return td_jv_int(i < 0 ? -i : i);
    return td_jrun_fail(r, TD_EBADREQ, "bad operand type for abs(): '%s'", td_jv_type(v));
}

FILTER(f_round)
{
    BIND("round", "precision method", 0, x);
    int64_t places = int_arg(r, x[0], 0, "precision"), i;
    double f;
    td_jv method = x[1].kind == JV_MISSING ? td_jv_text("common", 6) : x[1];
    if (!td_jv_number(v, &f))
        return td_jrun_fail(r, TD_EBADREQ, "type %s doesn't define __round__ method", td_jv_type(v));
    if (places < -300 || places > 300) return td_jrun_fail(r, TD_EBADREQ, "round: precision out of range");
    double scale = pow(10, (double)places);
    if (td_jv_is(method, "ceil")) return td_jv_real(ceil(f * scale) / scale);
    if (td_jv_is(method, "floor")) return td_jv_real(floor(f * scale) / scale);
    if (!td_jv_is(method, "common"))
        return td_jrun_fail(r, TD_EBADREQ, "method must be common, ceil or floor");
    if (td_jv_integer(v, &i) && places >= 0) return td_jv_int(i);
    if (places == 0) return td_jv_real(nearbyint(f));
    if (places > 0 && places <= 17 && isfinite(f) &&
        fabs(f) < 1e17) { /* correctly rounded decimal, halves by the exact binary value */
        char t[64];
        td_buf b;
        td_buf_init(&b, 0);
        td_buf_fmt(&b, "%.*f", (int)places, f);
        size_t n = TD_MIN(b.len, sizeof t - 1);
        memcpy(t, b.p, n);
        t[n] = '\0';
        td_buf_deinit(&b);
        return td_jv_real(strtod(t, NULL));
    }
    td_jv rounded = td_jv_real(nearbyint(f * scale) / scale);
    return td_jv_integer(v, &i) ? td_jv_int((int64_t)rounded.u.f) : rounded;
}

/* ---- sequences ---- */

FILTER(f_length)
{
    BIND("length", "", 0, none);
    (void)none;
    return td_jv_int(td_jv_len(r, v));
}

FILTER(f_list)
{
    BIND("list", "", 0, none);
    (void)none;
    td_jlist *l = td_jv_collect(r, v);
    return l ? td_jv_list(l) : v;
}

FILTER(f_first)
{
    BIND("first", "", 0, none);
    (void)none;
    td_jiter it;
    td_jv x;
    if (!td_jiter_open(r, &it, v)) return v;
    return td_jiter_next(r, &it, &x) ? x : td_jv_undef("no first item, sequence was empty", 33, false);
}

FILTER(f_last)
{
    BIND("last", "", 0, none);
    (void)none;
    if (v.kind == JV_GEN) return td_jrun_fail(r, TD_EBADREQ, "'%s' object is not reversible", td_jv_type(v));
    td_jlist *l = td_jv_collect(r, v);
    if (!l) return v;
    return l->n ? l->v[l->n - 1] : td_jv_undef("no last item, sequence was empty", 32, false);
}

FILTER(f_reverse)
{
    BIND("reverse", "", 0, none);
    (void)none;
    td_jv step = td_jv_int(-1), missing = {0};
    if (v.kind == JV_STR) return td_jv_slice(r, v, missing, missing, step);
    td_jlist *l = td_jv_collect(r, v);
    for (uint32_t i = 0; l && i < l->n / 2; i++) {
        td_jv t = l->v[i];
        l->v[i] = l->v[l->n - 1 - i];
        l->v[l->n - 1 - i] = t;
    }
    return l ? td_jv_gen(r, l) : v;
}

/* "a.b.0" of a value; MISSING: the value itself. Integers index. dflt replaces what is undefined on the way,
 * unless MISSING. */
static td_jv attribute_or(td_jrun *r, td_jv v, td_jv path, td_jv dflt)
{
    int64_t i;
    if (path.kind == JV_MISSING || path.kind == JV_NONE) return v;
    if (td_jv_integer(path, &i)) return td_jrun_item(r, v, path);
    if (path.kind != JV_STR) return td_jrun_fail(r, TD_EBADREQ, "attribute must be a string");
    for (uint32_t from = 0; from <= path.n && r->st >= 0;) {
        const char *p = path.u.s + from, *dot = memchr(p, '.', path.n - from);
        uint32_t n = (uint32_t)(dot ? (size_t)(dot - p) : path.n - from), k = 0;
        while (k < n && p[k] >= '0' && p[k] <= '9') k++;
        td_jv key = n && k == n && n < 10 ? td_jv_int(strtoll(p, NULL, 10)) : td_jv_text(p, n);
        v = td_jrun_item(r, v, key);
        if (v.kind == JV_UNDEF && dflt.kind != JV_MISSING && dflt.kind != JV_NONE) v = dflt;
        from += n + 1;
    }
    return v;
}

static td_jv attribute(td_jrun *r, td_jv v, td_jv path) { return attribute_or(r, v, path, (td_jv){0}); }

static td_jv lowered(td_jrun *r, td_jv v)
{
    td_buf b;
    if (v.kind != JV_STR) return v;
    td_jbuf_init(r, &b);
    td_uc_add_lower(&b, v.u.s, v.n);
    return td_jv_take(r, &b);
}

/* Items of v and their sort keys: attribute (several by commas), lower case unless case_sensitive. */
static td_jlist *keyed(td_jrun *r, td_jv v, td_jv path, td_jv dflt, bool case_sensitive, td_jlist **keys)
{
    td_jlist *l = td_jv_collect(r, v);
    *keys = l ? td_jlist_new(r, l->n) : NULL;
    for (uint32_t i = 0; l && *keys && i < l->n && r->st >= 0; i++) {
        if (path.kind != JV_STR || !memchr(path.u.s, ',', path.n)) {
            td_jv k = attribute_or(r, l->v[i], path, dflt);
            td_jlist_push(r, *keys, case_sensitive ? k : lowered(r, k));
            continue;
        }
        td_jlist *several = td_jlist_new(r, 4);
        for (uint32_t from = 0; from <= path.n && r->st >= 0;) {
            const char *p = path.u.s + from, *comma = memchr(p, ',', path.n - from);
            uint32_t n = (uint32_t)(comma ? (size_t)(comma - p) : path.n - from);
            td_jv k = attribute(r, l->v[i], td_jv_text(p, n));
            td_jlist_push(r, several, case_sensitive ? k : lowered(r, k));
            from += n + 1;
        }
        if (several) td_jlist_push(r, *keys, td_jv_list(several));
    }
    return r->st < 0 ? NULL : l;
}

FILTER(f_sort)
{
    BIND("sort", "reverse case_sensitive attribute", 0, x);
    td_jlist *keys, *l = keyed(r, v, x[2], (td_jv){0}, flag_arg(x[1], false), &keys);
    if (!l) return v;
    td_jlist_sort(r, l->v, keys->v, l->n, flag_arg(x[0], false));
    return td_jv_list(l);
}

FILTER(f_unique)
{
    BIND("unique", "case_sensitive attribute", 0, x);
    td_jlist *keys, *l = keyed(r, v, x[1], (td_jv){0}, flag_arg(x[0], false), &keys),
                    *out = td_jlist_new(r, 8);
    td_jdict *seen = td_jdict_new(r);
    for (uint32_t i = 0; l && out && seen && i < l->n && r->st >= 0; i++) {
        if (!td_jv_hashable(r, keys->v[i]) || td_jdict_find(r, seen, keys->v[i])) continue;
        td_jdict_set(r, seen, keys->v[i], td_jv_none());
        td_jlist_push(r, out, l->v[i]);
    }
    return out ? td_jv_gen(r, out) : v;
}

static td_jv extreme(td_jrun *r, td_jv v, td_jargs *a, const char *what, int sign)
{
    BIND(what, "case_sensitive attribute", 0, x);
    td_jlist *keys, *l = keyed(r, v, x[1], (td_jv){0}, flag_arg(x[0], false), &keys);
    uint32_t best = 0;
    if (!l) return v;
    if (!l->n) return td_jv_undef("no aggregated item, sequence was empty", 38, false);
    for (uint32_t i = 1; i < l->n && r->st >= 0; i++)
        if (sign * td_jv_cmp(r, keys->v[i], keys->v[best], sign > 0 ? ">" : "<") > 0) best = i;
    return l->v[best];
}

FILTER(f_min) { return extreme(r, v, a, "min", -1); }
FILTER(f_max) { return extreme(r, v, a, "max", 1); }

FILTER(f_sum)
{
    BIND("sum", "attribute start", 0, x);
    td_jiter it;
    td_jv item, total = x[1].kind == JV_MISSING ? td_jv_int(0) : x[1];
    if (!td_jiter_open(r, &it, v)) return v;
    while (td_jiter_next(r, &it, &item)) total = td_jv_arith(r, O_ADD, total, attribute(r, item, x[0]));
    return total;
}

FILTER(f_join)
{
    BIND("join", "d attribute", 0, x);
    td_jiter it;
    td_jv item, sep = x[0].kind == JV_MISSING ? td_jv_text("", 0) : td_jv_to_str(r, x[0]);
    bool first = true;
    td_buf b;
    if (!td_jiter_open(r, &it, v)) return v;
    td_jbuf_init(r, &b);
    while (td_jiter_next(r, &it, &item)) {
        if (!first) td_buf_add(&b, sep.u.s, sep.n);
        td_jv_str(r, attribute(r, item, x[1]), &b);
        first = false;
    }
    return td_jv_take(r, &b);
}

FILTER(f_batch)
{
    BIND("batch", "linecount fill_with", 1, x);
    int64_t size = int_arg(r, x[0], 1, "linecount");
    td_jlist *all = td_jv_collect(r, v), *out = td_jlist_new(r, 8), *row = NULL;
    if (r->st < 0) return v;
    if (size < 1) size = 1;
    for (uint32_t i = 0; i < all->n && r->st >= 0; i++) {
        if (i % size == 0) {
            row = td_jlist_new(r, 8);
            if (row) td_jlist_push(r, out, td_jv_list(row));
        }
        td_jlist_push(r, row, all->v[i]);
    }
    while (row && x[1].kind != JV_MISSING && x[1].kind != JV_NONE && row->n < size &&
           td_jlist_push(r, row, x[1])) {
    }
    return td_jv_gen(r, out);
}

FILTER(f_slice)
{
    BIND("slice", "slices fill_with", 1, x);
    int64_t n = int_arg(r, x[0], 1, "slices");
    td_jlist *all = td_jv_collect(r, v), *out = td_jlist_new(r, 8);
    if (r->st < 0) return v;
    if (n < 1 || n > WIDTH_MAX) return td_jrun_fail(r, TD_EBADREQ, "slice: number of slices out of range");
    int64_t each = all->n / n, extra = all->n % n, at = 0;
    for (int64_t s = 0; s < n && r->st >= 0; s++) {
        td_jlist *row = td_jlist_new(r, 8);
        int64_t k = each + (s < extra);
        for (int64_t i = 0; i < k; i++) td_jlist_push(r, row, all->v[at++]);
        if (x[1].kind != JV_MISSING && x[1].kind != JV_NONE && s >= extra) td_jlist_push(r, row, x[1]);
        if (row) td_jlist_push(r, out, td_jv_list(row));
    }
    return td_jv_gen(r, out);
}

static td_jv pair(td_jrun *r, td_jv k, td_jv v)
{
    td_jlist *l = td_jlist_new(r, 2);
    td_jlist_push(r, l, k);
    td_jlist_push(r, l, v);
    return l ? (td_jv){.kind = JV_TUPLE, .u.list = l} : k;
}

FILTER(f_items)
{
    BIND("items", "", 0, none);
    (void)none;
    td_jlist *l = td_jlist_new(r, 8);
    if (v.kind != JV_UNDEF && v.kind != JV_DICT)
        return td_jrun_fail(r, TD_EBADREQ, "Can only get item pairs from a mapping.");
    for (uint32_t i = 0; v.kind == JV_DICT && i < v.u.dict->n; i++)
        td_jlist_push(r, l, pair(r, v.u.dict->e[i].k, v.u.dict->e[i].v));
    return td_jv_gen(r, l);
}

FILTER(f_dictsort)
{
    BIND("dictsort", "case_sensitive by reverse", 0, x);
    bool by_value = td_jv_is(x[1], "value"), sensitive = flag_arg(x[0], false);
    td_jlist *l = td_jlist_new(r, 8), *keys = td_jlist_new(r, 8);
    if (x[1].kind != JV_MISSING && !by_value && !td_jv_is(x[1], "key"))
        return td_jrun_fail(r, TD_EBADREQ, "You can only sort by either \"key\" or \"value\"");
    if (v.kind == JV_UNDEF) return td_jrun_fail(r, TD_EBADREQ, "'%.*s' is undefined", (int)v.n, v.u.s);
    if (v.kind != JV_DICT)
        return td_jrun_fail(r, TD_EBADREQ, "'%s' object has no attribute 'items'", td_jv_type(v));
    for (uint32_t i = 0; l && keys && i < v.u.dict->n && r->st >= 0; i++) {
        td_jentry e = v.u.dict->e[i];
        td_jlist_push(r, l, pair(r, e.k, e.v));
        td_jv k = by_value ? e.v : e.k;
        td_jlist_push(r, keys, sensitive ? k : lowered(r, k));
    }
    if (r->st < 0) return v;
    td_jlist_sort(r, l->v, keys->v, l->n, flag_arg(x[2], false));
    return td_jv_list(l);
}

FILTER(f_groupby)
{
    BIND("groupby", "attribute default case_sensitive", 1, x);
    td_jlist *keys, *l = keyed(r, v, x[0], x[1], flag_arg(x[2], false), &keys), *out = td_jlist_new(r, 8),
                    *group = NULL;
    if (!l || !out) return v;
    td_jlist_sort(r, l->v, keys->v, l->n, false);
    for (uint32_t i = 0; i < l->n && r->st >= 0; i++) {
        if (!i || !td_jv_eq(r, keys->v[i], keys->v[i - 1])) {
            group = td_jlist_new(r, 8);
            td_jv name = attribute_or(r, l->v[i], x[0], x[1]);
            if (group) td_jlist_push(r, out, pair(r, name, td_jv_list(group)));
        }
        td_jlist_push(r, group, l->v[i]);
    }
    return td_jv_list(out);
}

/* ---- map, select and their kin ---- */

static td_jargs rest(td_jargs *a, uint32_t skip)
{
    return (td_jargs){a->pos + skip, a->n > skip ? a->n - skip : 0, a->kw, a->n_kw};
}

static td_jkw *keyword(td_jargs *a, const char *name)
{
    for (uint32_t k = 0; k < a->n_kw; k++)
        if (a->kw[k].n == strlen(name) && !memcmp(a->kw[k].name, name, a->kw[k].n)) return &a->kw[k];
    return NULL;
}

/* Jinja2 looks at the value's truth first: none, false and 0 are as good as an empty list. */
static bool nothing(td_jv v) { return v.kind != JV_GEN && !td_jv_true(v); }

FILTER(f_map)
{
    if (nothing(v)) return td_jv_gen(r, td_jlist_new(r, 1));
    td_jlist *l = td_jv_collect(r, v), *out = td_jlist_new(r, 8);
    td_jkw *attr = a->n ? NULL : keyword(a, "attribute"), *dflt = keyword(a, "default");
    const td_jfn *fn = NULL;
    td_jargs more = rest(a, 1);
    if (r->st < 0) return v;
    if (!attr) {
        if (!a->n || a->pos[0].kind != JV_STR)
            return td_jrun_fail(r, TD_EBADREQ, "map requires a filter argument");
        fn = td_jinja_filter(a->pos[0].u.s, a->pos[0].n);
        if (!fn) return td_jrun_fail(r, TD_ENOSUP, "no filter named '%.*s'", (int)a->pos[0].n, a->pos[0].u.s);
    }
    for (uint32_t i = 0; i < l->n && r->st >= 0; i++) {
        td_jv x = attr ? attribute_or(r, l->v[i], attr->v, dflt ? dflt->v : (td_jv){0})
                       : fn->call(r, l->v[i], &more);
        td_jlist_push(r, out, x);
    }
    return td_jv_gen(r, out);
}

/* attr: the first argument names what is tested of each item; then a test's name and its arguments, or none:
 * truth. */
static td_jv select_items(td_jrun *r, td_jv v, td_jargs *a, bool attr, bool want)
{
    if (nothing(v)) return td_jv_gen(r, td_jlist_new(r, 1));
    td_jlist *l = td_jv_collect(r, v), *out = td_jlist_new(r, 8);
    td_jv path = {0};
    const td_jfn *fn = NULL;
    uint32_t skip = attr;
    if (r->st < 0) return v;
    if (attr) {
        if (!a->n) return td_jrun_fail(r, TD_EBADREQ, "Missing parameter for attribute name");
        path = a->pos[0];
    }
    if (a->n > skip) {
        td_jv name = a->pos[skip];
        if (name.kind == JV_STR) fn = td_jinja_test(name.u.s, name.n);
        if (!fn)
            return td_jrun_fail(r, TD_ENOSUP, "no test named '%.*s'", name.kind == JV_STR ? (int)name.n : 1,
                                name.kind == JV_STR ? name.u.s : "?");
    }
    td_jargs more = rest(a, skip + 1);
    for (uint32_t i = 0; i < l->n && r->st >= 0; i++) {
        td_jv x = attribute(r, l->v[i], path);
        if (td_jv_true(fn ? fn->call(r, x, &more) : x) == want) td_jlist_push(r, out, l->v[i]);
    }
    return td_jv_gen(r, out);
}

FILTER(f_select) { return select_items(r, v, a, false, true); }
FILTER(f_reject) { return select_items(r, v, a, false, false); }
FILTER(f_selectattr) { return select_items(r, v, a, true, true); }
FILTER(f_rejectattr) { return select_items(r, v, a, true, false); }

/* ---- others ---- */

FILTER(f_default)
{
    BIND("default", "default_value boolean", 0, x);
    td_jv dflt = x[0].kind == JV_MISSING ? td_jv_text("", 0) : x[0];
    return v.kind == JV_UNDEF || (flag_arg(x[1], false) && !td_jv_true(v)) ? dflt : v;
}

FILTER(f_attr)
{
    BIND("attr", "name", 1, x);
    td_jv name = td_jv_to_str(r, x[0]);
    if (r->st < 0) return v;
    if (v.kind == JV_DICT) { /* attributes only, never items */
        td_jdict *none = td_jdict_new(r);
        td_jv as = {.kind = JV_DICT, .u.dict = none};
        td_jv got = none ? td_jrun_attr(r, as, name.u.s, name.n) : v;
        if (got.kind == JV_METHOD) got.u.bound->self = v;
        return got;
    }
    return td_jrun_attr(r, v, name.u.s, name.n);
}

const td_jfn *td_jinja_filter(const char *name, uint32_t n)
{
    static const td_jfn all[] = {
        {"abs", f_abs, false},
        {"attr", f_attr, false},
        {"batch", f_batch, false},
        {"capitalize", f_capitalize, false},
        {"center", f_center, false},
        {"count", f_length, false},
        {"d", f_default, false},
        {"default", f_default, false},
        {"dictsort", f_dictsort, false},
        {"e", f_escape, false},
        {"escape", f_escape, false},
        {"first", f_first, false},
        {"float", f_float, false},
        {"format", f_format, false},
        {"groupby", f_groupby, false},
        {"indent", f_indent, false},
        {"int", f_int, false},
        {"items", f_items, false},
        {"join", f_join, false},
        {"last", f_last, false},
        {"length", f_length, false},
        {"list", f_list, false},
        {"lower", f_lower, false},
        {"map", f_map, false},
        {"max", f_max, false},
        {"min", f_min, false},
        {"reject", f_reject, false},
        {"rejectattr", f_rejectattr, false},
        {"replace", f_replace, false},
        {"reverse", f_reverse, false},
        {"round", f_round, false},
        {"safe", f_safe, false},
        {"select", f_select, false},
        {"selectattr", f_selectattr, false},
        {"slice", f_slice, false},
        {"sort", f_sort, false},
        {"string", f_string, false},
        {"sum", f_sum, false},
        {"title", f_title, false},
        {"tojson", f_tojson, false},
        {"trim", f_trim, false},
        {"truncate", f_truncate, false},
        {"unique", f_unique, false},
        {"upper", f_upper, false},
        {"wordcount", f_wordcount, false},
    };
    for (size_t k = 0; k < TD_COUNT(all); k++)
        if (strlen(all[k].name) == n && !memcmp(all[k].name, name, n)) return &all[k];
    return NULL;
}
