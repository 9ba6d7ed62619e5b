// SPDX-License-Identifier: Apache-2.0
/* router/text/jinja_global.c - tests, global functions and str % args. */
#include "common/check.h"
#include "router/text/jinja_impl.h"
#include "router/text/unicode.h"
#include <stdio.h>
#include <string.h>
#include <time.h>

enum { RANGE_MAX = 100000, TIME_TEXT = 512 };

/* ---- tests ---- */

#define TEST(name) static td_jv name(td_jrun *r, td_jv v, td_jargs *a)
#define NO_ARGS(what)                                                                                        \
    td_jv none[16];                                                                                          \
    if (!td_jargs_bind(r, a, what, "", 0, none)) return v

#define KIND_TEST(fn, what, condition)                                                                       \
    TEST(fn)                                                                                                 \
    {                                                                                                        \
        NO_ARGS(what);                                                                                       \
        return td_jv_bool(condition);                                                                        \
    }

KIND_TEST(t_defined, "defined", v.kind != JV_UNDEF)
KIND_TEST(t_undefined, "undefined", v.kind == JV_UNDEF)
KIND_TEST(t_none, "none", v.kind == JV_NONE)
KIND_TEST(t_string, "string", v.kind == JV_STR)
KIND_TEST(t_boolean, "boolean", v.kind == JV_BOOL)
KIND_TEST(t_true, "true", v.kind == JV_BOOL && v.u.b)
KIND_TEST(t_false, "false", v.kind == JV_BOOL && !v.u.b)
KIND_TEST(t_integer, "integer", v.kind == JV_INT)
KIND_TEST(t_float, "float", v.kind == JV_REAL)
KIND_TEST(t_number, "number", v.kind == JV_INT || v.kind == JV_REAL || v.kind == JV_BOOL)
KIND_TEST(t_mapping, "mapping", v.kind == JV_DICT)
KIND_TEST(t_sequence, "sequence",
          v.kind == JV_STR || v.kind == JV_LIST || v.kind == JV_TUPLE || v.kind == JV_DICT ||
              v.kind == JV_UNDEF)
KIND_TEST(t_iterable, "iterable",
          v.kind == JV_UNDEF || (v.kind >= JV_STR && v.kind <= JV_GEN) || v.kind == JV_LOOP)
KIND_TEST(t_callable, "callable",
          v.kind == JV_UNDEF || v.kind == JV_MACRO || v.kind == JV_METHOD || v.kind == JV_FUNC ||
              v.kind == JV_JOINER)
KIND_TEST(t_escaped, "escaped", v.kind == JV_STR && v.flag)

static td_jv parity(td_jrun *r, td_jv v, td_jargs *a, int64_t want)
{
    NO_ARGS("parity test");
    td_jv m = td_jv_arith(r, O_MOD, v, td_jv_int(2));
    return td_jv_bool(td_jv_eq(r, m, td_jv_int(want)));
}

TEST(t_odd) { return parity(r, v, a, 1); }
TEST(t_even) { return parity(r, v, a, 0); }

TEST(t_divisibleby)
{
    td_jv x[16];
    if (!td_jargs_bind(r, a, "divisibleby", "num", 1, x)) return v;
    return td_jv_bool(td_jv_eq(r, td_jv_arith(r, O_MOD, v, x[0]), td_jv_int(0)));
}

static td_jv against(td_jrun *r, td_jv v, td_jargs *a, td_jop op)
{
    td_jv x[16];
    if (!td_jargs_bind(r, a, "comparison test", "other", 1, x)) return v;
    return td_jv_compare(r, op, v, x[0]);
}

TEST(t_eq) { return against(r, v, a, O_EQ); }
TEST(t_ne) { return against(r, v, a, O_NE); }
TEST(t_lt) { return against(r, v, a, O_LT); }
TEST(t_le) { return against(r, v, a, O_LE); }
TEST(t_gt) { return against(r, v, a, O_GT); }
TEST(t_ge) { return against(r, v, a, O_GE); }
TEST(t_in) { return against(r, v, a, O_IN); }

TEST(t_sameas)
{
    td_jv x[16];
    if (!td_jargs_bind(r, a, "sameas", "other", 1, x)) return v;
    return td_jv_bool(v.kind == x[0].kind &&
                      (v.kind <= JV_STR ? td_jv_eq(r, v, x[0]) : v.u.list == x[0].u.list));
}

static td_jv cased(td_jrun *r, td_jv v, td_jargs *a, const char *method)
{
    td_jv s = td_jv_to_str(r, v);
    if (r->st < 0) return v;
    return td_jinja_method(JV_STR, method, (uint32_t)strlen(method))->call(r, s, a);
}

TEST(t_lower) { return cased(r, v, a, "islower"); }
TEST(t_upper) { return cased(r, v, a, "isupper"); }

TEST(t_filter)
{
    NO_ARGS("filter");
    return td_jv_bool(v.kind == JV_STR && td_jinja_filter(v.u.s, v.n));
}

TEST(t_test)
{
    NO_ARGS("test");
    return td_jv_bool(v.kind == JV_STR && td_jinja_test(v.u.s, v.n));
}

const td_jfn *td_jinja_test(const char *name, uint32_t n)
{
    static const td_jfn all[] = {
        {"!=", t_ne, false},
        {"<", t_lt, false},
        {"<=", t_le, false},
        {"==", t_eq, false},
        {">", t_gt, false},
        {">=", t_ge, false},
        {"boolean", t_boolean, false},
        {"callable", t_callable, false},
        {"defined", t_defined, false},
        {"divisibleby", t_divisibleby, false},
        {"eq", t_eq, false},
        {"equalto", t_eq, false},
        {"escaped", t_escaped, false},
        {"even", t_even, false},
        {"false", t_false, false},
        {"filter", t_filter, false},
        {"float", t_float, false},
        {"ge", t_ge, false},
        {"greaterthan", t_gt, false},
        {"gt", t_gt, false},
        {"in", t_in, false},
        {"integer", t_integer, false},
        {"iterable", t_iterable, false},
        {"le", t_le, false},
        {"lessthan", t_lt, false},
        {"lower", t_lower, false},
        {"lt", t_lt, false},
        {"mapping", t_mapping, false},
        {"ne", t_ne, false},
        {"none", t_none, false},
        {"number", t_number, false},
        {"odd", t_odd, false},
        {"sameas", t_sameas, false},
        {"sequence", t_sequence, false},
        {"string", t_string, false},
        {"test", t_test, false},
        {"true", t_true, false},
        {"undefined", t_undefined, false},
        {"upper", t_upper, false},
    };
    for (size_t k = 0; k < TD_COUNT(all); k++)
        if (strlen(all[k].name) == n && !memcmp(all[k].name, name, n)) return &all[k];
    return NULL;
}

/* ---- globals ---- */

TEST(g_range)
{
    int64_t x[3] = {0, 0, 1};
    if (a->n < 1 || a->n > 3 || a->n_kw)
        return td_jrun_fail(r, TD_EBADREQ, "range expected 1 to 3 arguments, got %u", a->n);
    for (uint32_t i = 0; i < a->n; i++)
        if (!td_jv_integer(a->pos[i], &x[i]))
            return td_jrun_fail(r, TD_EBADREQ, "'%s' object cannot be interpreted as an integer",
                                td_jv_type(a->pos[i]));
    if (a->n == 1) x[1] = x[0], x[0] = 0;
    if (!x[2]) return td_jrun_fail(r, TD_EBADREQ, "range() arg 3 must not be zero");
    td_jlist *l = td_jlist_new(r, 8);
    for (int64_t i = x[0]; x[2] > 0 ? i < x[1] : i > x[1];) {
        if (!l || r->st < 0) return v;
        if (l->n == RANGE_MAX) return td_jrun_fail(r, TD_EBADREQ, "Range too big: more than %d", RANGE_MAX);
        td_jlist_push(r, l, td_jv_int(i));
        if (__builtin_add_overflow(i, x[2], &i)) break;
    }
    return l ? td_jv_list(l) : v;
}

/* dict(mapping or pairs, key=value...) */
static td_jdict *make_dict(td_jrun *r, td_jargs *a, const char *what)
{
    td_jdict *d = td_jdict_new(r);
    td_jiter it;
    td_jv item;
    if (a->n > 1) td_jrun_fail(r, TD_EBADREQ, "%s expected at most 1 argument, got %u", what, a->n);
    if (!d || r->st < 0) return NULL;
    if (a->n && a->pos[0].kind == JV_DICT) {
        for (uint32_t i = 0; i < a->pos[0].u.dict->n; i++)
            td_jdict_set(r, d, a->pos[0].u.dict->e[i].k, a->pos[0].u.dict->e[i].v);
    } else if (a->n && td_jiter_open(r, &it, a->pos[0])) {
        while (td_jiter_next(r, &it, &item)) {
            td_jlist *pair = td_jv_collect(r, item);
            if (!pair || pair->n != 2) {
                td_jrun_fail(r, TD_EBADREQ, "%s: an element is not a pair", what);
                break;
            }
            td_jdict_set(r, d, pair->v[0], pair->v[1]);
        }
    }
    for (uint32_t k = 0; k < a->n_kw; k++)
        td_jdict_set(r, d, td_jv_text(a->kw[k].name, a->kw[k].n), a->kw[k].v);
    return r->st < 0 ? NULL : d;
}

TEST(g_dict)
{
    td_jdict *d = make_dict(r, a, "dict");
    return d ? (td_jv){.kind = JV_DICT, .u.dict = d} : v;
}

TEST(g_namespace)
{
    td_jdict *d = make_dict(r, a, "namespace");
    return d ? (td_jv){.kind = JV_NS, .u.dict = d} : v;
}

TEST(g_raise)
{
    td_jv x[16];
    if (!td_jargs_bind(r, a, "raise_exception", "message", 1, x)) return v;
    td_jv s = td_jv_to_str(r, x[0]);
    if (r->st >= 0) r->st = td_refuse(TD_EBADREQ, "%.*s", (int)s.n, s.u.s);
    return v;
}

TEST(g_strftime_now)
{
    td_jv x[16];
    if (!td_jargs_bind(r, a, "strftime_now", "format", 1, x)) return v;
    if (x[0].kind != JV_STR) return td_jrun_fail(r, TD_EBADREQ, "strftime_now: the format must be a string");
    char format[256], text[TIME_TEXT];
    struct tm tm;
    time_t now = (time_t)r->lim.now_s;
    if (x[0].n >= sizeof format) return td_jrun_fail(r, TD_EFULL, "strftime_now: format too long");
    if (!x[0].n) return td_jv_text("", 0);
    memcpy(format, x[0].u.s, x[0].n);
    format[x[0].n] = '\0';
    gmtime_r(&now, &tm);
    size_t n = strftime(text, sizeof text, format, &tm);
    if (!n) return td_jrun_fail(r, TD_EFULL, "strftime_now: text too long");
    return td_jv_copy_text(r, text, n);
}

static td_jv with_items(td_jrun *r, td_jkind kind, const td_jv *v, uint32_t n)
{
    td_jgen *g = td_jrun_alloc(r, sizeof *g);
    td_jlist *l = td_jlist_new(r, n);
    for (uint32_t i = 0; i < n; i++) td_jlist_push(r, l, v[i]);
    if (!g || !l) return td_jv_none();
    g->list = l;
    return (td_jv){.kind = (uint8_t)kind, .u.gen = g};
}

TEST(g_cycler)
{
    (void)v;
    if (!a->n || a->n_kw) return td_jrun_fail(r, TD_EBADREQ, "at least one item has to be provided");
    return with_items(r, JV_CYCLER, a->pos, a->n);
}

TEST(g_joiner)
{
    td_jv x[16];
    if (!td_jargs_bind(r, a, "joiner", "sep", 0, x)) return v;
    td_jv sep = x[0].kind == JV_MISSING ? td_jv_text(", ", 2) : x[0];
    return with_items(r, JV_JOINER, &sep, 1);
}

const td_jfn *td_jinja_global(const char *name, uint32_t n)
{
    static const td_jfn all[] = {
        {"range", g_range, false},
        {"dict", g_dict, false},
        {"namespace", g_namespace, false},
        {"raise_exception", g_raise, false},
        {"strftime_now", g_strftime_now, false},
        {"cycler", g_cycler, false},
        {"joiner", g_joiner, false},
    };
    for (size_t k = 0; k < TD_COUNT(all); k++)
        if (strlen(all[k].name) == n && !memcmp(all[k].name, name, n)) return &all[k];
    return NULL;
}

/* ---- str % args: %s %r %d %i %f %x %% with flags, width and precision for numbers ---- */

static bool percent_number(td_jrun *r, td_buf *b, char conv, const char *spec, size_t n, td_jv v)
{
    char fmt[32];
    double f;
    int64_t i;
    if (n > 5) return td_jrun_fail(r, TD_ENOSUP, "format specification too long"), false;
    if (!td_jv_number(v, &f))
        return td_jrun_fail(r, TD_EBADREQ, "%%%c format: a number is required, not %s", conv, td_jv_type(v)),
               false;
    fmt[0] = '%';
    memcpy(fmt + 1, spec, n);
    bool real = conv == 'f' || conv == 'e' || conv == 'g';
    snprintf(fmt + 1 + n, sizeof fmt - 1 - n, "%s%c", real ? "" : "ll", conv == 'i' ? 'd' : conv);
    if (!td_jv_integer(v, &i)) i = (int64_t)f;
    char text[400];
    int k = real ? snprintf(text, sizeof text, fmt, f) : snprintf(text, sizeof text, fmt, (long long)i);
    if (k < 0 || (size_t)k >= sizeof text)
        return td_jrun_fail(r, TD_EFULL, "formatted number too long"), false;
    td_buf_add(b, text, (size_t)k);
    return true;
}

td_jv td_jinja_percent(td_jrun *r, td_jv format, td_jv args)
{
    td_buf b;
    uint32_t next = 0, n = args.kind == JV_TUPLE ? args.u.list->n : 1;
    td_jbuf_init(r, &b);
    for (size_t i = 0; i < format.n && r->st >= 0; i++) {
        if (format.u.s[i] != '%') {
            td_buf_chr(&b, format.u.s[i]);
            continue;
        }
        size_t from = ++i;
        while (i < format.n && strchr("-+ #0123456789.", format.u.s[i]) && format.u.s[i]) i++;
        char conv = i < format.n ? format.u.s[i] : 0;
        if (conv == '%') {
            td_buf_chr(&b, '%');
            continue;
        }
        if (!conv || !strchr("srdifegx", conv) || (i > from && strchr("sr", conv))) {
            td_jrun_fail(r, TD_ENOSUP, "this %% format is not supported");
            break;
        }
        if (next >= n) {
            td_jrun_fail(r, TD_EBADREQ, "not enough arguments for format string");
            break;
        }
        td_jv v = args.kind == JV_TUPLE ? args.u.list->v[next] : args;
        next++;
        if (conv == 's') td_jv_str(r, v, &b);
        else if (conv == 'r') td_jv_repr(r, v, &b, 0);
        else if (!percent_number(r, &b, conv, format.u.s + from, i - from, v)) break;
    }
    if (next < n && args.kind != JV_DICT && args.kind != JV_LIST && args.kind != JV_UNDEF && r->st >= 0)
        td_jrun_fail(r, TD_EBADREQ, "not all arguments converted during string formatting");
    return td_jv_take(r, &b);
}
