// SPDX-License-Identifier: Apache-2.0
/* router/text/jinja_value.c - what template values are: Python's, as far as a template can tell. */
#include "common/check.h"
#include "router/text/jinja_impl.h"
#include "router/text/unicode.h"
#include <math.h>
#include <string.h>

enum { NEST_MAX = 100, PLAIN_DICT = 8, LIST_MAX = 1 << 22 };

/* ---- memory ---- */

void *td_jrun_alloc(td_jrun *r, size_t bytes)
{
    void *p = r->st < 0 ? NULL : td_arena_alloc(r->a, bytes);
    if (!p && r->st >= 0) td_jrun_fail(r, TD_EFULL, "memory limit reached");
    return p;
}

td_jv td_jv_copy_text(td_jrun *r, const char *s, size_t n)
{
    char *p = n < UINT32_MAX ? td_jrun_alloc(r, n + 1) : NULL;
    if (!p) return td_jv_undef("", 0, false);
    if (n) memcpy(p, s, n);
    return td_jv_text(p, n);
}

void td_jbuf_init(td_jrun *r, td_buf *b) { td_buf_init(b, TD_MAX(r->a->max - r->a->used, (size_t)1)); }

td_jv td_jv_take(td_jrun *r, td_buf *b)
{
    td_jv v = td_buf_ok(b) ? td_jv_copy_text(r, b->p ? b->p : "", b->len)
                           : td_jrun_fail(r, TD_EFULL, "memory limit reached");
    td_jrun_charge(r, b->len / 64);
    td_buf_deinit(b);
    return v;
}

td_jlist *td_jlist_new(td_jrun *r, uint32_t cap)
{
    td_jlist *l = td_jrun_alloc(r, sizeof *l);
    if (!l) return NULL;
    l->v = td_jrun_alloc(r, TD_MAX(cap, 4u) * sizeof(td_jv));
    l->cap = TD_MAX(cap, 4u);
    return l->v ? l : NULL;
}

bool td_jlist_push(td_jrun *r, td_jlist *l, td_jv v)
{
    if (!l || r->st < 0) return false;
    if (l->n == l->cap) {
        td_jv *bigger = l->n < LIST_MAX ? td_jrun_alloc(r, 2 * l->cap * sizeof *bigger) : NULL;
        if (!bigger) {
            td_jrun_fail(r, TD_EFULL, "list too long");
            return false;
        }
        memcpy(bigger, l->v, l->n * sizeof *bigger);
        l->v = bigger;
        l->cap *= 2;
    }
    l->v[l->n++] = v;
    td_jrun_charge(r, 1);
    return true;
}

td_jv td_jv_gen(td_jrun *r, td_jlist *l)
{
    td_jgen *g = td_jrun_alloc(r, sizeof *g);
    if (!g || !l) return td_jv_undef("", 0, false);
    g->list = l;
    return (td_jv){.kind = JV_GEN, .u.gen = g};
}

/* ---- basic facts ---- */

const char *td_jv_type(td_jv v)
{
    static const char *const names[] = {
        [JV_MISSING] = "missing", [JV_UNDEF] = "Undefined",  [JV_NONE] = "NoneType",  [JV_BOOL] = "bool",
        [JV_INT] = "int",         [JV_REAL] = "float",       [JV_STR] = "str",        [JV_LIST] = "list",
        [JV_TUPLE] = "tuple",     [JV_DICT] = "dict",        [JV_VIEW] = "dict view", [JV_GEN] = "generator",
        [JV_NS] = "Namespace",    [JV_LOOP] = "LoopContext", [JV_MACRO] = "Macro",    [JV_METHOD] = "method",
        [JV_FUNC] = "function",   [JV_CYCLER] = "Cycler",    [JV_JOINER] = "Joiner",
    };
    return names[v.kind];
}

bool td_jv_true(td_jv v)
{
    switch (v.kind) {
    case JV_MISSING:
    case JV_UNDEF:
    case JV_NONE: return false;
    case JV_BOOL: return v.u.b;
    case JV_INT: return v.u.i != 0;
    case JV_REAL: return v.u.f != 0;
    case JV_STR: return v.n != 0;
    case JV_LIST:
    case JV_TUPLE:
    case JV_VIEW: return v.u.list->n != 0;
    case JV_DICT: return v.u.dict->n != 0;
    default: return true;
    }
}

bool td_jv_is(td_jv v, const char *text)
{
    return v.kind == JV_STR && v.n == strlen(text) && !memcmp(v.u.s, text, v.n);
}

bool td_jv_integer(td_jv v, int64_t *i)
{
    if (v.kind == JV_INT) *i = v.u.i;
    else if (v.kind == JV_BOOL) *i = v.u.b;
    else return false;
    return true;
}

bool td_jv_number(td_jv v, double *f)
{
    int64_t i;
    if (v.kind == JV_REAL) *f = v.u.f;
    else if (td_jv_integer(v, &i)) *f = (double)i;
    else return false;
    return true;
}

/* ---- order and equality ---- */

static bool eq(td_jrun *r, td_jv x, td_jv y, int depth);

static bool eq_list(td_jrun *r, const td_jlist *x, const td_jlist *y, int depth)
{
    if (x == y) return true;
    if (x->n != y->n) return false;
    for (uint32_t i = 0; i < x->n; i++)
        if (!eq(r, x->v[i], y->v[i], depth)) return false;
    return true;
}

static bool eq_dict(td_jrun *r, td_jdict *x, td_jdict *y, int depth)
{
    if (x == y) return true;
    if (x->n != y->n) return false;
    for (uint32_t i = 0; i < x->n; i++) {
        td_jv *other = td_jdict_find(r, y, x->e[i].k);
        if (!other || !eq(r, x->e[i].v, *other, depth)) return false;
    }
    return true;
}

static bool eq(td_jrun *r, td_jv x, td_jv y, int depth)
{
    int64_t i, j;
    double f, g;
    td_jrun_charge(r, 1);
    if (r->st < 0) return false;
    if (depth > NEST_MAX) {
        td_jrun_fail(r, TD_EFULL, "values nested too deeply");
        return false;
    }
    if (td_jv_integer(x, &i) && td_jv_integer(y, &j)) return i == j;
    if (td_jv_number(x, &f) && td_jv_number(y, &g)) return f == g;
    if (x.kind != y.kind) return false;
    switch (x.kind) {
    case JV_UNDEF:
    case JV_NONE: return true;
    case JV_STR: return x.n == y.n && (x.u.s == y.u.s || !memcmp(x.u.s, y.u.s, x.n));
    case JV_LIST:
    case JV_TUPLE: return eq_list(r, x.u.list, y.u.list, depth + 1);
    case JV_VIEW: return x.flag == y.flag && eq_list(r, x.u.list, y.u.list, depth + 1);
    case JV_DICT: return eq_dict(r, x.u.dict, y.u.dict, depth + 1);
    default: return x.u.dict == y.u.dict; /* identity */
    }
}

bool td_jv_eq(td_jrun *r, td_jv x, td_jv y) { return eq(r, x, y, 0); }

static int text_cmp(td_jv x, td_jv y)
{
    int c = memcmp(x.u.s, y.u.s, TD_MIN(x.n, y.n)); /* UTF-8 sorts as its code points do */
    return c ? c : (x.n > y.n) - (x.n < y.n);
}

int td_jv_cmp(td_jrun *r, td_jv x, td_jv y, const char *op)
{
    int64_t i, j;
    double f, g;
    td_jrun_charge(r, 1);
    if (r->st < 0 || r->depth > 10000) return 0;
    if (td_jv_integer(x, &i) && td_jv_integer(y, &j)) return (i > j) - (i < j);
    if (td_jv_number(x, &f) && td_jv_number(y, &g)) return (f > g) - (f < g);
    if (x.kind == JV_STR && y.kind == JV_STR) return text_cmp(x, y);
    if ((x.kind == JV_LIST || x.kind == JV_TUPLE) && x.kind == y.kind) {
        uint32_t n = TD_MIN(x.u.list->n, y.u.list->n);
        for (uint32_t k = 0; k < n; k++) {
            if (eq(r, x.u.list->v[k], y.u.list->v[k], 0)) continue;
            r->depth += 100; /* a bound on nesting of the values themselves */
            int c = td_jv_cmp(r, x.u.list->v[k], y.u.list->v[k], op);
            r->depth -= 100;
            return c;
        }
        return (x.u.list->n > y.u.list->n) - (x.u.list->n < y.u.list->n);
    }
    if (x.kind == JV_UNDEF || y.kind == JV_UNDEF) {
        td_jv u = x.kind == JV_UNDEF ? x : y;
        td_jrun_fail(r, TD_EBADREQ, "'%.*s' is undefined", (int)u.n, u.u.s);
        return 0;
    }
    td_jrun_fail(r, TD_EBADREQ, "'%s' not supported between instances of '%s' and '%s'", op, td_jv_type(x),
                 td_jv_type(y));
    return 0;
}

/* Stable merge sort. Keys and items move together. */
void td_jlist_sort(td_jrun *r, td_jv *item, td_jv *key, uint32_t n, bool reverse)
{
    bool apart = item != key;
    td_jv *ti = td_jrun_alloc(r, n * sizeof *ti), *tk = apart ? td_jrun_alloc(r, n * sizeof *tk) : ti;
    if (!ti || !tk) return;
    for (uint32_t w = 1; w < n; w *= 2) {
        for (uint32_t a = 0; a < n; a += 2 * w) {
            uint32_t mid = TD_MIN(a + w, n), end = TD_MIN(a + 2 * w, n), i = a, j = mid, k = a;
            while (i < mid || j < end) {
                bool left = j >= end;
                if (i < mid && j < end) {
                    /* reversed order is still stable: equal keys keep theirs */
                    int c = reverse ? td_jv_cmp(r, key[i], key[j], "<") : td_jv_cmp(r, key[j], key[i], "<");
                    left = c >= 0;
                }
                uint32_t from = left ? i++ : j++;
                ti[k] = item[from];
                if (apart) tk[k] = key[from];
                k++;
            }
        }
        if (r->st < 0) return;
        memcpy(item, ti, n * sizeof *item);
        if (apart) memcpy(key, tk, n * sizeof *key);
    }
}

/* ---- dictionaries: entries in insertion order; a hash index from PLAIN_DICT entries on ---- */

static uint32_t hash_key(td_jv k)
{
    uint64_t h = 1469598103934665603u;
    double f;
    if (k.kind == JV_STR) {
        for (uint32_t i = 0; i < k.n; i++) h = (h ^ (unsigned char)k.u.s[i]) * 1099511628211u;
    } else if (td_jv_number(k, &f)) {
        if (f == 0) f = 0;
        memcpy(&h, &f, sizeof h);
    } else {
        h = k.kind;
    }
    h *= 0x9E3779B97F4A7C15u;
    return (uint32_t)(h >> 32);
}

bool td_jv_hashable(td_jrun *r, td_jv k)
{
    if (k.kind == JV_TUPLE) {
        for (uint32_t i = 0; i < k.u.list->n; i++)
            if (k.u.list->v[i].kind == JV_TUPLE || !td_jv_hashable(r, k.u.list->v[i])) {
                if (r->st >= 0) td_jrun_fail(r, TD_ENOSUP, "nested tuples as keys are not supported");
                return false;
            }
        return true;
    }
    if (k.kind != JV_LIST && k.kind != JV_DICT) return true;
    td_jrun_fail(r, TD_EBADREQ, "unhashable type: '%s'", td_jv_type(k));
    return false;
}

td_jdict *td_jdict_new(td_jrun *r) { return td_jrun_alloc(r, sizeof(td_jdict)); }

static void put_index(td_jdict *d, uint32_t i)
{
    uint32_t s = hash_key(d->e[i].k) & (d->slots - 1);
    while (d->index[s]) s = (s + 1) & (d->slots - 1);
    d->index[s] = i + 1;
}

static bool build_index(td_jrun *r, td_jdict *d)
{
    uint32_t slots = 4 * PLAIN_DICT;
    while (slots < 2 * d->cap) slots *= 2;
    d->index = td_jrun_alloc(r, slots * sizeof(uint32_t));
    d->slots = d->index ? slots : 0;
    for (uint32_t i = 0; d->index && i < d->n; i++) put_index(d, i);
    td_jrun_charge(r, d->n);
    return d->index != NULL;
}

static td_jentry *find_entry(td_jrun *r, td_jdict *d, td_jv k)
{
    if (d->n <= PLAIN_DICT) {
        for (uint32_t i = 0; i < d->n; i++)
            if (eq(r, d->e[i].k, k, 0)) return &d->e[i];
        return NULL;
    }
    if (!d->index && !build_index(r, d)) return NULL;
    for (uint32_t s = hash_key(k) & (d->slots - 1); d->index[s]; s = (s + 1) & (d->slots - 1))
        if (eq(r, d->e[d->index[s] - 1].k, k, 0)) return &d->e[d->index[s] - 1];
    return NULL;
}

td_jv *td_jdict_find(td_jrun *r, td_jdict *d, td_jv k)
{
    td_jentry *e = find_entry(r, d, k);
    return e ? &e->v : NULL;
}

bool td_jdict_set(td_jrun *r, td_jdict *d, td_jv k, td_jv v)
{
    if (!d || r->st < 0 || !td_jv_hashable(r, k)) return false;
    td_jv *old = td_jdict_find(r, d, k);
    if (old) {
        *old = v;
        return true;
    }
    if (d->n == d->cap) {
        uint32_t cap = d->cap ? 2 * d->cap : 8;
        td_jentry *bigger = d->n < LIST_MAX ? td_jrun_alloc(r, cap * sizeof *bigger) : NULL;
        if (!bigger) {
            td_jrun_fail(r, TD_EFULL, "dict too large");
            return false;
        }
        if (d->n) memcpy(bigger, d->e, d->n * sizeof *bigger);
        d->e = bigger;
        d->cap = cap;
        d->index = NULL; /* sized to cap: made anew at the next search */
    }
    d->e[d->n++] = (td_jentry){k, v};
    if (d->index) put_index(d, d->n - 1);
    td_jrun_charge(r, 1);
    return true;
}

bool td_jdict_del(td_jrun *r, td_jdict *d, td_jv k)
{
    td_jentry *e = find_entry(r, d, k);
    if (!e) return false;
    size_t i = (size_t)(e - d->e);
    memmove(e, e + 1, (d->n - i - 1) * sizeof *e);
    d->n--;
    d->index = NULL;
    td_jrun_charge(r, d->n);
    return true;
}

/* ---- text of values ---- */

static void real_text(double f, td_buf *b)
{
    if (isnan(f)) td_buf_str(b, "nan");
    else if (isinf(f)) td_buf_str(b, f < 0 ? "-inf" : "inf");
    else td_buf_json_num(b, f);
}

static void repr_text(td_jv v, td_buf *b)
{
    char quote = memchr(v.u.s, '\'', v.n) && !memchr(v.u.s, '"', v.n) ? '"' : '\'';
    uint32_t cp;
    if (v.flag) td_buf_str(b, "Markup(");
    td_buf_chr(b, quote);
    for (size_t i = 0, k; i < v.n; i += k) {
        k = td_uc_next(v.u.s + i, v.n - i, &cp);
        if (cp == (uint32_t)quote || cp == '\\') td_buf_chr(b, '\\'), td_buf_chr(b, (char)cp);
        else if (cp == '\n') td_buf_str(b, "\\n");
        else if (cp == '\r') td_buf_str(b, "\\r");
        else if (cp == '\t') td_buf_str(b, "\\t");
        else if (cp != ' ' && td_uc_class(cp) & TD_UC_HIDDEN)
            td_buf_fmt(b, cp < 0x100 ? "\\x%02x" : cp < 0x10000 ? "\\u%04x" : "\\U%08x", cp);
        else td_buf_add(b, v.u.s + i, k);
    }
    td_buf_chr(b, quote);
    if (v.flag) td_buf_chr(b, ')');
}

static void repr_items(td_jrun *r, const td_jlist *l, td_buf *b, int depth)
{
    for (uint32_t i = 0; i < l->n && r->st >= 0 && td_buf_ok(b); i++) {
        if (i) td_buf_str(b, ", ");
        td_jv_repr(r, l->v[i], b, depth);
    }
}

static void repr_dict(td_jrun *r, const td_jdict *d, td_buf *b, int depth)
{
    td_buf_chr(b, '{');
    for (uint32_t i = 0; i < d->n && r->st >= 0 && td_buf_ok(b); i++) {
        if (i) td_buf_str(b, ", ");
        td_jv_repr(r, d->e[i].k, b, depth);
        td_buf_str(b, ": ");
        td_jv_repr(r, d->e[i].v, b, depth);
    }
    td_buf_chr(b, '}');
}

void td_jv_repr(td_jrun *r, td_jv v, td_buf *b, int depth)
{
    static const char *const views[] = {"dict_keys([", "dict_values([", "dict_items(["};
    td_jrun_charge(r, 1);
    if (depth > NEST_MAX) {
        td_jrun_fail(r, TD_EFULL, "values nested too deeply");
        return;
    }
    switch (v.kind) {
    case JV_UNDEF: td_buf_str(b, "Undefined"); break;
    case JV_NONE: td_buf_str(b, "None"); break;
    case JV_BOOL: td_buf_str(b, v.u.b ? "True" : "False"); break;
    case JV_INT: td_buf_fmt(b, "%lld", (long long)v.u.i); break;
    case JV_REAL: real_text(v.u.f, b); break;
    case JV_STR: repr_text(v, b); break;
    case JV_LIST:
        td_buf_chr(b, '[');
        repr_items(r, v.u.list, b, depth + 1);
        td_buf_chr(b, ']');
        break;
    case JV_TUPLE:
        td_buf_chr(b, '(');
        repr_items(r, v.u.list, b, depth + 1);
        td_buf_str(b, v.u.list->n == 1 ? ",)" : ")");
        break;
    case JV_VIEW:
        td_buf_str(b, views[v.flag]);
        repr_items(r, v.u.list, b, depth + 1);
        td_buf_str(b, "])");
        break;
    case JV_DICT: repr_dict(r, v.u.dict, b, depth + 1); break;
    case JV_NS:
        td_buf_str(b, "<Namespace ");
        repr_dict(r, v.u.dict, b, depth + 1);
        td_buf_chr(b, '>');
        break;
    default: td_buf_fmt(b, "<%s>", td_jv_type(v)); /* Python prints an address here */
    }
}

void td_jv_str(td_jrun *r, td_jv v, td_buf *b)
{
    if (v.kind == JV_STR) td_buf_add(b, v.u.s, v.n);
    else if (v.kind != JV_UNDEF) td_jv_repr(r, v, b, 0);
}

td_jv td_jv_to_str(td_jrun *r, td_jv v)
{
    td_buf b;
    if (v.kind == JV_STR) return v;
    td_jbuf_init(r, &b);
    td_jv_str(r, v, &b);
    return td_jv_take(r, &b);
}

/* ---- JSON ---- */

static void json_text(td_jv v, bool ascii, td_buf *b)
{
    if (!ascii) {
        td_buf_json_str(b, v.u.s, v.n);
        return;
    }
    uint32_t cp = 0;
    td_buf_chr(b, '"');
    for (size_t i = 0, k, from = 0; i <= v.n; i += k) {
        k = i < v.n ? td_uc_next(v.u.s + i, v.n - i, &cp) : 1;
        if (i < v.n && cp >= 0x20 && cp < 0x7F && cp != '"' && cp != '\\') continue;
        td_buf_add(b, v.u.s + from, i - from);
        from = i + k;
        if (i == v.n) break;
        if (cp == '"' || cp == '\\') td_buf_chr(b, '\\'), td_buf_chr(b, (char)cp);
        else if (cp == '\n') td_buf_str(b, "\\n");
        else if (cp == '\r') td_buf_str(b, "\\r");
        else if (cp == '\t') td_buf_str(b, "\\t");
        else if (cp == '\b') td_buf_str(b, "\\b");
        else if (cp == '\f') td_buf_str(b, "\\f");
        else if (cp == 0x7F) td_buf_chr(b, 0x7F);
        else if (cp < 0x10000) td_buf_fmt(b, "\\u%04x", cp);
        else
            td_buf_fmt(b, "\\u%04x\\u%04x", 0xD800 + ((cp - 0x10000) >> 10),
                       0xDC00 + ((cp - 0x10000) & 0x3FF));
    }
    td_buf_chr(b, '"');
}

static void json_line(const td_jjson *o, td_buf *b, int depth)
{
    if (!o->indent) return;
    td_buf_chr(b, '\n');
    for (int i = 0; i < depth; i++) td_buf_str(b, o->indent);
}

static void json_key(td_jrun *r, td_jv k, const td_jjson *o, td_buf *b)
{
    td_buf t;
    if (k.kind == JV_STR) {
        json_text(k, o->ascii, b);
        return;
    }
    if (k.kind == JV_TUPLE || k.kind > JV_STR || k.kind == JV_UNDEF) {
        td_jrun_fail(r, TD_EBADREQ, "keys must be str, int, float, bool or None, not %s", td_jv_type(k));
        return;
    }
    td_jbuf_init(r, &t);
    td_jv_json(r, k, o, &t, 0);
    td_buf_chr(b, '"');
    if (t.p) td_buf_add(b, t.p, t.len);
    td_buf_chr(b, '"');
    td_buf_deinit(&t);
}

static void json_list(td_jrun *r, const td_jlist *l, const td_jjson *o, td_buf *b, int depth)
{
    td_buf_chr(b, '[');
    for (uint32_t i = 0; i < l->n && r->st >= 0 && td_buf_ok(b); i++) {
        if (i) td_buf_str(b, o->item_sep);
        json_line(o, b, depth + 1);
        td_jv_json(r, l->v[i], o, b, depth + 1);
    }
    if (l->n) json_line(o, b, depth);
    td_buf_chr(b, ']');
}

static void json_dict(td_jrun *r, const td_jdict *d, const td_jjson *o, td_buf *b, int depth)
{
    td_jentry *e = d->e;
    if (o->sort && d->n) {
        td_jv *key = td_jrun_alloc(r, d->n * sizeof *key), *at = td_jrun_alloc(r, d->n * sizeof *at);
        e = td_jrun_alloc(r, d->n * sizeof *e);
        if (!key || !at || !e) return;
        for (uint32_t i = 0; i < d->n; i++) key[i] = d->e[i].k, at[i] = td_jv_int(i);
        td_jlist_sort(r, at, key, d->n, false);
        for (uint32_t i = 0; i < d->n; i++) e[i] = d->e[at[i].u.i];
    }
    td_buf_chr(b, '{');
    for (uint32_t i = 0; i < d->n && r->st >= 0 && td_buf_ok(b); i++) {
        if (i) td_buf_str(b, o->item_sep);
        json_line(o, b, depth + 1);
        json_key(r, e[i].k, o, b);
        td_buf_str(b, o->key_sep);
        td_jv_json(r, e[i].v, o, b, depth + 1);
    }
    if (d->n) json_line(o, b, depth);
    td_buf_chr(b, '}');
}

void td_jv_json(td_jrun *r, td_jv v, const td_jjson *o, td_buf *b, int depth)
{
    td_jrun_charge(r, 1);
    if (depth > NEST_MAX) {
        td_jrun_fail(r, TD_EFULL, "values nested too deeply");
        return;
    }
    switch (v.kind) {
    case JV_NONE: td_buf_str(b, "null"); break;
    case JV_BOOL: td_buf_str(b, v.u.b ? "true" : "false"); break;
    case JV_INT: td_buf_fmt(b, "%lld", (long long)v.u.i); break;
    case JV_REAL:
        if (isnan(v.u.f)) td_buf_str(b, "NaN");
        else if (isinf(v.u.f)) td_buf_str(b, v.u.f < 0 ? "-Infinity" : "Infinity");
        else td_buf_json_num(b, v.u.f);
        break;
    case JV_STR: json_text(v, o->ascii, b); break;
    case JV_LIST:
    case JV_TUPLE: json_list(r, v.u.list, o, b, depth); break;
    case JV_DICT: json_dict(r, v.u.dict, o, b, depth); break;
    default: td_jrun_fail(r, TD_EBADREQ, "Object of type %s is not JSON serializable", td_jv_type(v));
    }
}

td_jv td_jv_from_json(td_jrun *r, const td_json *j)
{
    td_jrun_charge(r, 1);
    if (!j) return td_jv_none();
    switch (j->type) {
    case TD_JSON_NULL: return td_jv_none();
    case TD_JSON_BOOL: return td_jv_bool(j->truth);
    case TD_JSON_INT: return td_jv_int(j->i);
    case TD_JSON_REAL: return td_jv_real(j->num);
    case TD_JSON_STR: return td_jv_text(j->s, j->n); /* the context outlives the render */
    case TD_JSON_ARR: {
        td_jlist *l = td_jlist_new(r, j->n);
        for (const td_json *c = j->child; c && r->st >= 0; c = c->next)
            td_jlist_push(r, l, td_jv_from_json(r, c));
        return l ? td_jv_list(l) : td_jv_none();
    }
    default: {
        td_jdict *d = td_jdict_new(r);
        for (const td_json *c = j->child; c && r->st >= 0; c = c->next)
            td_jdict_set(r, d, td_jv_text(c->key, c->key_len), td_jv_from_json(r, c));
        return d ? (td_jv){.kind = JV_DICT, .u.dict = d} : td_jv_none();
    }
    }
}
