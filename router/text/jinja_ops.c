// SPDX-License-Identifier: Apache-2.0
/* router/text/jinja_ops.c - what operators, iteration, indexing and slicing do with values. */
#include "common/check.h"
#include "router/text/jinja_impl.h"
#include "router/text/unicode.h"
#include <math.h>
#include <string.h>

enum { REPEAT_MAX = 64 << 20 };

/* ---- iteration ---- */

bool td_jiter_open(td_jrun *r, td_jiter *it, td_jv v)
{
    *it = (td_jiter){.src = v};
    if (r->st < 0) return false;
    switch (v.kind) {
    case JV_UNDEF:
    case JV_STR:
    case JV_LIST:
    case JV_TUPLE:
    case JV_DICT:
    case JV_VIEW:
    case JV_GEN: return true;
    default: td_jrun_fail(r, TD_EBADREQ, "'%s' object is not iterable", td_jv_type(v)); return false;
    }
}

bool td_jiter_next(td_jrun *r, td_jiter *it, td_jv *out)
{
    td_jv v = it->src;
    td_jrun_charge(r, 1);
    if (r->st < 0) return false;
    switch (v.kind) {
    case JV_STR: {
        uint32_t cp;
        if (it->at >= v.n) return false;
        size_t k = td_uc_next(v.u.s + it->at, v.n - it->at, &cp);
        *out = td_jv_text(v.u.s + it->at, k);
        it->at += k;
        return true;
    }
    case JV_LIST:
    case JV_TUPLE:
    case JV_VIEW:
        if (it->i >= v.u.list->n) return false;
        *out = v.u.list->v[it->i++];
        return true;
    case JV_DICT:
        if (it->i >= v.u.dict->n) return false;
        *out = v.u.dict->e[it->i++].k;
        return true;
    case JV_GEN:
        if (v.u.gen->at >= v.u.gen->list->n) return false;
        *out = v.u.gen->list->v[v.u.gen->at++];
        return true;
    default: return false;
    }
}

td_jlist *td_jv_collect(td_jrun *r, td_jv v)
{
    td_jiter it;
    td_jv x;
    td_jlist *l = td_jlist_new(r, 8);
    if (!l || !td_jiter_open(r, &it, v)) return NULL;
    while (td_jiter_next(r, &it, &x)) td_jlist_push(r, l, x);
    return r->st < 0 ? NULL : l;
}

int64_t td_jv_len(td_jrun *r, td_jv v)
{
    switch (v.kind) {
    case JV_UNDEF: return 0;
    case JV_STR: td_jrun_charge(r, v.n / 64); return (int64_t)td_uc_count(v.u.s, v.n);
    case JV_LIST:
    case JV_TUPLE:
    case JV_VIEW: return v.u.list->n;
    case JV_DICT: return v.u.dict->n;
    default: td_jrun_fail(r, TD_EBADREQ, "object of type '%s' has no len()", td_jv_type(v)); return -1;
    }
}

bool td_jv_contains(td_jrun *r, td_jv in, td_jv x)
{
    td_jiter it;
    td_jv y;
    if (in.kind == JV_STR) {
        if (x.kind != JV_STR) {
            td_jrun_fail(r, TD_EBADREQ, "'in <string>' requires string as left operand, not %s",
                         td_jv_type(x));
            return false;
        }
        td_jrun_charge(r, in.n / 64);
        return !x.n || memmem(in.u.s, in.n, x.u.s, x.n);
    }
    if (in.kind == JV_DICT) return td_jv_hashable(r, x) && td_jdict_find(r, in.u.dict, x);
    if (!td_jiter_open(r, &it, in)) return false;
    while (td_jiter_next(r, &it, &y))
        if (td_jv_eq(r, y, x)) return true;
    return false;
}

/* ---- items and slices ---- */

static td_jv text_index(td_jrun *r, td_jv v, int64_t i)
{
    int64_t n = (int64_t)td_uc_count(v.u.s, v.n);
    uint32_t cp;
    td_jrun_charge(r, v.n / 64);
    if (i < 0) i += n;
    if (i < 0 || i >= n) return td_jv_undef("index out of range", 18, true);
    size_t at = td_uc_offset(v.u.s, v.n, (size_t)i);
    return td_jv_text(v.u.s + at, td_uc_next(v.u.s + at, v.n - at, &cp));
}

static bool undefined_base(td_jrun *r, td_jv obj)
{
    if (obj.kind != JV_UNDEF) return false;
    if (obj.flag) td_jrun_fail(r, TD_EBADREQ, "object has no attribute '%.*s'", (int)obj.n, obj.u.s);
    else td_jrun_fail(r, TD_EBADREQ, "'%.*s' is undefined", (int)obj.n, obj.u.s);
    return true;
}

static td_jv own_attr(td_jrun *r, td_jv obj, const char *name, uint32_t n)
{
    if (obj.kind == JV_LOOP) return td_jloop_attr(r, obj.u.loop, name, n);
    if (obj.kind == JV_NS) {
        td_jv *v = td_jdict_find(r, obj.u.dict, td_jv_text(name, n));
        return v ? *v : td_jv_undef(name, n, true);
    }
    if (obj.kind == JV_CYCLER && td_jv_is(td_jv_text(name, n), "current"))
        return obj.u.gen->list->v[obj.u.gen->at];
    const td_jfn *fn = td_jinja_method((td_jkind)obj.kind, name, n);
    if (!fn) return td_jv_undef(name, n, true);
    if (fn->mutates && r->lim.immutable)
        return td_jv_undef("access to a method that changes its object is unsafe", 52, false);
    td_jbound *b = td_jrun_alloc(r, sizeof *b);
    if (!b) return td_jv_undef(name, n, true);
    *b = (td_jbound){obj, fn};
    return (td_jv){.kind = JV_METHOD, .u.bound = b};
}

/* obj.name: Python's attribute first, then the item. */
td_jv td_jrun_attr(td_jrun *r, td_jv obj, const char *name, uint32_t n)
{
    if (undefined_base(r, obj)) return obj;
    td_jv v = own_attr(r, obj, name, n);
    if (obj.kind != JV_DICT || v.kind != JV_UNDEF || !v.flag) return v;
    td_jv *item = td_jdict_find(r, obj.u.dict, td_jv_text(name, n));
    return item ? *item : v;
}

/* obj[key]: the item first, then the attribute. */
td_jv td_jrun_item(td_jrun *r, td_jv obj, td_jv key)
{
    int64_t i;
    if (undefined_base(r, obj)) return obj;
    if (obj.kind == JV_DICT) {
        if (key.kind != JV_LIST && key.kind != JV_DICT) {
            td_jv *item = td_jdict_find(r, obj.u.dict, key);
            if (item) return *item;
        }
    } else if (td_jv_integer(key, &i)) {
        if (obj.kind == JV_STR) return text_index(r, obj, i);
        if (obj.kind == JV_LIST || obj.kind == JV_TUPLE) {
            if (i < 0) i += obj.u.list->n;
            if (i >= 0 && i < obj.u.list->n) return obj.u.list->v[i];
            return td_jv_undef("index out of range", 18, true);
        }
    }
    if (key.kind == JV_STR) return own_attr(r, obj, key.u.s, key.n);
    return td_jv_undef("item", 4, true);
}

static bool slice_bound(td_jrun *r, td_jv v, int64_t n, int64_t step, int64_t dflt, int64_t *out)
{
    int64_t i;
    if (v.kind == JV_MISSING || v.kind == JV_NONE) {
        *out = dflt;
        return true;
    }
    if (!td_jv_integer(v, &i)) {
        if (!undefined_base(r, v)) td_jrun_fail(r, TD_EBADREQ, "slice indices must be integers or None");
        return false;
    }
    if (i < 0) i += n;
    if (i < 0) i = step < 0 ? -1 : 0;
    if (i >= n) i = step < 0 ? n - 1 : n;
    *out = i;
    return true;
}

static td_jv slice_text(td_jrun *r, td_jv v, int64_t a, int64_t b, int64_t step, int64_t n)
{
    td_buf out;
    if (step == 1) {
        size_t from = td_uc_offset(v.u.s, v.n, (size_t)a), to = from;
        if (b > a) to += td_uc_offset(v.u.s + from, v.n - from, (size_t)(b - a));
        td_jv s = td_jv_text(v.u.s + from, to - from);
        s.flag = v.flag;
        return s;
    }
    /* Offsets of all characters: a step may go backwards. */
    uint32_t *at = td_jrun_alloc(r, ((size_t)n + 1) * sizeof *at), cp;
    if (!at) return v;
    int64_t k = 0;
    for (size_t i = 0; i < v.n; k++) {
        at[k] = (uint32_t)i;
        i += td_uc_next(v.u.s + i, v.n - i, &cp);
    }
    at[k] = v.n;
    td_jbuf_init(r, &out);
    for (int64_t i = a; step > 0 ? i < b : i > b; i += step)
        td_buf_add(&out, v.u.s + at[i], at[i + 1] - at[i]);
    return td_jv_take(r, &out);
}

td_jv td_jv_slice(td_jrun *r, td_jv v, td_jv start, td_jv stop, td_jv step)
{
    int64_t k = 1, n, a, b;
    if (undefined_base(r, v)) return v;
    if (v.kind != JV_STR && v.kind != JV_LIST && v.kind != JV_TUPLE)
        return td_jrun_fail(r, TD_EBADREQ, "'%s' object is not subscriptable", td_jv_type(v));
    if (step.kind != JV_MISSING && step.kind != JV_NONE && !td_jv_integer(step, &k))
        return td_jrun_fail(r, TD_EBADREQ, "slice indices must be integers or None");
    if (!k) return td_jrun_fail(r, TD_EBADREQ, "slice step cannot be zero");
    n = td_jv_len(r, v);
    k = TD_MAX(TD_MIN(k, (int64_t)1 << 40), -((int64_t)1 << 40));
    if (!slice_bound(r, start, n, k, k < 0 ? n - 1 : 0, &a) ||
        !slice_bound(r, stop, n, k, k < 0 ? -1 : n, &b))
        return v;
    if (v.kind == JV_STR) return slice_text(r, v, a, b, k, n);
    td_jlist *l = td_jlist_new(r, 8);
    for (int64_t i = a; l && r->st >= 0 && (k > 0 ? i < b : i > b); i += k)
        td_jlist_push(r, l, v.u.list->v[i]);
    if (!l) return v;
    return (td_jv){.kind = v.kind, .u.list = l};
}

/* ---- arithmetic ---- */

static td_jv bad_operands(td_jrun *r, const char *op, td_jv x, td_jv y)
{
    if (undefined_base(r, x) || undefined_base(r, y)) return x;
    if (x.kind == JV_STR && *op == '+')
        return td_jrun_fail(r, TD_EBADREQ, "can only concatenate str (not \"%s\") to str", td_jv_type(y));
    return td_jrun_fail(r, TD_EBADREQ, "unsupported operand type(s) for %s: '%s' and '%s'", op, td_jv_type(x),
                        td_jv_type(y));
}

static void add_escaped(td_buf *b, td_jv v)
{
    for (uint32_t i = 0; i < v.n; i++) {
        switch (v.u.s[i]) {
        case '&': td_buf_str(b, "&amp;"); break;
        case '<': td_buf_str(b, "&lt;"); break;
        case '>': td_buf_str(b, "&gt;"); break;
        case '"': td_buf_str(b, "&#34;"); break;
        case '\'': td_buf_str(b, "&#39;"); break;
        default: td_buf_chr(b, v.u.s[i]);
        }
    }
}

/* Text marked safe stays safe under +, and escapes what is not: surprising, but what Markup does. */
static td_jv add_text(td_jrun *r, td_jv x, td_jv y)
{
    if (!x.flag && !y.flag) {
        size_t n = (size_t)x.n + y.n;
        char *p = n < UINT32_MAX ? td_jrun_alloc(r, n + 1) : NULL;
        if (!p) return r->st < 0 ? x : td_jrun_fail(r, TD_EFULL, "string too long");
        memcpy(p, x.u.s, x.n);
        memcpy(p + x.n, y.u.s, y.n);
        td_jrun_charge(r, n / 64);
        return td_jv_text(p, n);
    }
    td_buf b;
    td_jbuf_init(r, &b);
    if (x.flag) td_buf_add(&b, x.u.s, x.n);
    else add_escaped(&b, x);
    if (y.flag) td_buf_add(&b, y.u.s, y.n);
    else add_escaped(&b, y);
    td_jv v = td_jv_take(r, &b);
    v.flag = 1;
    return v;
}

static td_jv add_lists(td_jrun *r, td_jv x, td_jv y)
{
    td_jlist *l = td_jlist_new(r, x.u.list->n + y.u.list->n);
    for (uint32_t i = 0; i < x.u.list->n; i++) td_jlist_push(r, l, x.u.list->v[i]);
    for (uint32_t i = 0; i < y.u.list->n; i++) td_jlist_push(r, l, y.u.list->v[i]);
    return l ? (td_jv){.kind = x.kind, .u.list = l} : x;
}

static td_jv repeat(td_jrun *r, td_jv v, int64_t times)
{
    if (times < 0) times = 0;
    if (v.kind == JV_STR) {
        if (v.n && times > REPEAT_MAX / v.n) return td_jrun_fail(r, TD_EFULL, "string too long");
        td_buf b;
        td_jbuf_init(r, &b);
        for (int64_t i = 0; i < times && td_buf_ok(&b); i++) td_buf_add(&b, v.u.s, v.n);
        return td_jv_take(r, &b);
    }
    td_jlist *l = td_jlist_new(r, 8);
    if (!l || !v.u.list->n) times = 0;
    for (int64_t i = 0; i < times && r->st >= 0; i++)
        for (uint32_t k = 0; k < v.u.list->n; k++) td_jlist_push(r, l, v.u.list->v[k]);
    return l ? (td_jv){.kind = v.kind, .u.list = l} : v;
}

static td_jv int_arith(td_jrun *r, td_jop op, int64_t x, int64_t y)
{
    int64_t v = 0;
    bool over = false;
    switch (op) {
    case O_ADD: over = __builtin_add_overflow(x, y, &v); break;
    case O_SUB: over = __builtin_sub_overflow(x, y, &v); break;
    case O_MUL: over = __builtin_mul_overflow(x, y, &v); break;
    case O_DIV:
        if (!y) return td_jrun_fail(r, TD_EBADREQ, "division by zero");
        return td_jv_real((double)x / (double)y);
    case O_FLOORDIV:
    case O_MOD:
        if (!y) return td_jrun_fail(r, TD_EBADREQ, "integer division or modulo by zero");
        if (y == -1) { /* INT64_MIN / -1 traps */
            over = op == O_FLOORDIV && x == INT64_MIN;
            v = op == O_FLOORDIV && !over ? -x : 0;
            break;
        }
        v = op == O_FLOORDIV ? x / y : x % y;
        if (x % y && (x % y < 0) != (y < 0)) v += op == O_FLOORDIV ? -1 : y;
        break;
    default: /* power */
        if (y < 0)
            return x ? td_jv_real(pow((double)x, (double)y))
                     : td_jrun_fail(r, TD_EBADREQ, "0.0 cannot be raised to a negative power");
        v = 1;
        for (; y && !over; y >>= 1) {
            if (y & 1) over = __builtin_mul_overflow(v, x, &v);
            if (y > 1) over |= __builtin_mul_overflow(x, x, &x);
        }
    }
    return over ? td_jrun_fail(r, TD_ENOSUP, "integer beyond 64 bits") : td_jv_int(v);
}

static td_jv real_arith(td_jrun *r, td_jop op, double x, double y)
{
    switch (op) {
    case O_ADD: return td_jv_real(x + y);
    case O_SUB: return td_jv_real(x - y);
    case O_MUL: return td_jv_real(x * y);
    case O_POW: return td_jv_real(pow(x, y));
    default: break;
    }
    if (y == 0) return td_jrun_fail(r, TD_EBADREQ, "float division by zero");
    if (op == O_DIV) return td_jv_real(x / y);
    double m = fmod(x, y);
    if (m && (m < 0) != (y < 0)) m += y;
    if (op == O_MOD) return td_jv_real(m ? m : copysign(0.0, y));
    double whole = (x - m) / y, v = floor(whole);
    if (!whole) return td_jv_real(copysign(0.0, x / y));
    return td_jv_real(whole - v > 0.5 ? v + 1 : v);
}

td_jv td_jv_arith(td_jrun *r, td_jop op, td_jv x, td_jv y)
{
    static const char *const names[] = {
        [O_ADD] = "+",       [O_SUB] = "-", [O_MUL] = "*",          [O_DIV] = "/",
        [O_FLOORDIV] = "//", [O_MOD] = "%", [O_POW] = "** or pow()"};
    int64_t i, j;
    double f, g;
    if (td_jv_integer(x, &i) && td_jv_integer(y, &j)) return int_arith(r, op, i, j);
    if (td_jv_number(x, &f) && td_jv_number(y, &g)) return real_arith(r, op, f, g);
    bool seq = x.kind == JV_STR || x.kind == JV_LIST || x.kind == JV_TUPLE;
    if (op == O_ADD && x.kind == JV_STR && y.kind == JV_STR) return add_text(r, x, y);
    if (op == O_ADD && seq && x.kind == y.kind) return add_lists(r, x, y);
    if (op == O_MUL && seq && td_jv_integer(y, &j)) return repeat(r, x, j);
    if (op == O_MUL && (y.kind == JV_STR || y.kind == JV_LIST || y.kind == JV_TUPLE) && td_jv_integer(x, &i))
        return repeat(r, y, i);
    if (op == O_MOD && x.kind == JV_STR) return td_jinja_percent(r, x, y);
    return bad_operands(r, names[op], x, y);
}

td_jv td_jv_compare(td_jrun *r, td_jop op, td_jv x, td_jv y)
{
    static const char *const names[] = {[O_LT] = "<", [O_LE] = "<=", [O_GT] = ">", [O_GE] = ">="};
    switch (op) {
    case O_EQ: return td_jv_bool(td_jv_eq(r, x, y));
    case O_NE: return td_jv_bool(!td_jv_eq(r, x, y));
    case O_IN: return td_jv_bool(td_jv_contains(r, y, x));
    case O_NOTIN: return td_jv_bool(!td_jv_contains(r, y, x));
    default: break;
    }
    if (x.kind == JV_REAL || y.kind == JV_REAL) { /* NaN is not ordered */
        double f, g;
        if (td_jv_number(x, &f) && td_jv_number(y, &g))
            return td_jv_bool(op == O_LT ? f < g : op == O_LE ? f <= g : op == O_GT ? f > g : f >= g);
    }
    int c = td_jv_cmp(r, x, y, names[op]);
    return td_jv_bool(op == O_LT ? c < 0 : op == O_LE ? c <= 0 : op == O_GT ? c > 0 : c >= 0);
}
