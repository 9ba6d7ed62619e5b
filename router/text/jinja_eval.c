// SPDX-License-Identifier: Apache-2.0
/* router/text/jinja_eval.c - walking the tree. Scopes are chained lists of bindings: if and the template
 * share one, every loop turn, macro call, with, filter and set block opens a new one, and set writes into the
 * innermost (Jinja's rule). A macro's scope hangs on the one it was defined in, so it sees later assignments
 * there. */
#include "common/clock.h"
#include "router/text/jinja_impl.h"
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

enum { DEFAULT_STEPS = 20000000, DEFAULT_DEPTH = 400, ARGS_MAX = 256 };

typedef enum { FLOW_ON, FLOW_BREAK, FLOW_CONTINUE } flow;

/* A running loop. Items are pulled one ahead only when somebody asks what comes next, as its condition may
 * change meanwhile. */
typedef struct td_jloop {
    td_jrun *r;
    const td_jnode *node;
    td_jscope *scope; /* the loop is in; for its condition */
    td_jiter it;
    td_jlist *ahead; /* pulled, not yet run */
    uint32_t ahead_at;
    td_jv prev, cur;       /* prev JV_MISSING in the first turn */
    int64_t index0, total; /* total -1: not known */
    int nesting;
    td_jv changed; /* arguments of the last loop.changed() */
} td_jloop;

static td_jv eval(td_jrun *r, const td_jnode *x, td_jscope *s);
static flow exec(td_jrun *r, const td_jnode *first, td_jscope *s);

/* ---- errors and limits ---- */

td_jv td_jrun_fail(td_jrun *r, td_status st, const char *fmt, ...)
{
    if (r->st >= 0) {
        char what[400];
        va_list ap;
        va_start(ap, fmt);
        vsnprintf(what, sizeof what, fmt, ap);
        va_end(ap);
        r->st = td_jinja_syntax(st, r->line, "%s", what);
    }
    return td_jv_undef("", 0, false);
}

void td_jrun_charge(td_jrun *r, uint64_t steps)
{
    r->steps += steps;
    if (r->steps > r->lim.steps && r->st >= 0)
        td_jrun_fail(r, TD_EFULL, "more than %llu steps", (unsigned long long)r->lim.steps);
}

static bool enter(td_jrun *r, const td_jnode *x)
{
    r->line = x->line;
    td_jrun_charge(r, 1);
    if (r->st < 0) return false;
    if (r->depth >= r->lim.depth) {
        td_jrun_fail(r, TD_EFULL, "nested or called more than %d deep", r->lim.depth);
        return false;
    }
    r->depth++;
    return true;
}

/* ---- names ---- */

static td_jv *binding(td_jscope *s, uint32_t sym)
{
    for (uint32_t i = 0; i < s->n; i++)
        if (s->b[i].sym == sym) return &s->b[i].v;
    return NULL;
}

static td_jv lookup(td_jrun *r, td_jscope *s, uint32_t sym)
{
    for (; s; s = s->parent) {
        td_jv *v = binding(s, sym);
        if (v) return *v;
    }
    if (r->ctx[sym].kind != JV_MISSING) return r->ctx[sym];
    const td_jsym *name = &r->t->sym[sym];
    if (name->global) return (td_jv){.kind = JV_FUNC, .u.fn = name->global};
    return td_jv_undef(name->name, name->n, false);
}

static void bind(td_jrun *r, td_jscope *s, uint32_t sym, td_jv v)
{
    td_jv *old = binding(s, sym);
    if (old) {
        *old = v;
        return;
    }
    if (s->n == s->cap) {
        uint32_t cap = s->cap ? 2 * s->cap : 4;
        td_jbinding *bigger = td_jrun_alloc(r, cap * sizeof *bigger);
        if (!bigger) return;
        if (s->n) memcpy(bigger, s->b, s->n * sizeof *bigger);
        s->b = bigger;
        s->cap = cap;
    }
    s->b[s->n++] = (td_jbinding){sym, v};
}

static td_jscope *new_scope(td_jrun *r, td_jscope *parent)
{
    td_jscope *s = td_jrun_alloc(r, sizeof *s);
    if (s) s->parent = parent;
    return s;
}

static void assign(td_jrun *r, const td_jnode *target, td_jv v, td_jscope *s)
{
    if (r->st < 0) return;
    if (target->type == N_NAME) {
        bind(r, s, target->sym, v);
    } else if (target->type == N_NSREF) {
        td_jv ns = lookup(r, s, target->sym);
        r->line = target->line;
        if (ns.kind != JV_NS) td_jrun_fail(r, TD_EBADREQ, "cannot assign attribute on non-namespace object");
        else td_jdict_set(r, ns.u.dict, target->value, v);
    } else {
        td_jlist *l = td_jv_collect(r, v);
        if (!l) return;
        if (l->n != target->n) {
            td_jrun_fail(r, TD_EBADREQ,
                         l->n > target->n ? "too many values to unpack (expected %u)"
                                          : "not enough values to unpack (expected %u)",
                         target->n);
            return;
        }
        uint32_t i = 0;
        for (const td_jnode *c = target->list; c; c = c->next) assign(r, c, l->v[i++], s);
    }
}

/* ---- calls ---- */

bool td_jargs_bind(td_jrun *r, td_jargs *a, const char *what, const char *names, unsigned required, td_jv *v)
{
    const char *name[16];
    uint32_t len[16];
    unsigned n = 0;
    for (const char *p = names; *p && n < 16; n++) {
        name[n] = p;
        while (*p && *p != ' ') p++;
        len[n] = (uint32_t)(p - name[n]);
        v[n] = (td_jv){0};
        while (*p == ' ') p++;
    }
    if (r->st < 0) return false;
    if (a->n > n)
        return td_jrun_fail(r, TD_EBADREQ, "%s takes at most %u arguments (%u given)", what, n, a->n), false;
    for (unsigned i = 0; i < a->n; i++) v[i] = a->pos[i];
    for (unsigned k = 0; k < a->n_kw; k++) {
        unsigned i = 0;
        while (i < n && (len[i] != a->kw[k].n || memcmp(name[i], a->kw[k].name, len[i]))) i++;
        if (i == n || v[i].kind != JV_MISSING)
            return td_jrun_fail(r, TD_EBADREQ, "%s got an unexpected argument '%.*s'", what, (int)a->kw[k].n,
                                a->kw[k].name),
                   false;
        v[i] = a->kw[k].v;
    }
    for (unsigned i = 0; i < required; i++)
        if (v[i].kind == JV_MISSING)
            return td_jrun_fail(r, TD_EBADREQ, "%s is missing its argument '%.*s'", what, (int)len[i],
                                name[i]),
                   false;
    return true;
}

static td_jargs eval_args(td_jrun *r, const td_jnode *call, td_jscope *s)
{
    td_jargs a = {0};
    if (!call->n) return a;
    td_jlist *pos = td_jlist_new(r, call->n);
    td_jdict *kw = td_jdict_new(r);
    for (const td_jnode *c = call->list; c && pos && kw && r->st >= 0; c = c->next) {
        td_jv v = eval(r, c->type == N_KEYWORD || c->type == N_STAR || c->type == N_DSTAR ? c->a : c, s), x;
        td_jiter it;
        if (c->type == N_KEYWORD) {
            if (td_jdict_find(r, kw, c->value))
                td_jrun_fail(r, TD_EBADREQ, "keyword argument repeated: %.*s", (int)c->value.n, c->value.u.s);
            td_jdict_set(r, kw, c->value, v);
        } else if (c->type == N_STAR) {
            if (td_jiter_open(r, &it, v))
                while (td_jiter_next(r, &it, &x)) td_jlist_push(r, pos, x);
        } else if (c->type == N_DSTAR) {
            if (v.kind != JV_DICT)
                td_jrun_fail(r, TD_EBADREQ, "argument after ** must be a mapping, not %s", td_jv_type(v));
            else
                for (uint32_t i = 0; i < v.u.dict->n; i++)
                    td_jdict_set(r, kw, v.u.dict->e[i].k, v.u.dict->e[i].v);
        } else td_jlist_push(r, pos, v);
    }
    if (!pos || !kw || r->st < 0) return a;
    if (pos->n > ARGS_MAX || kw->n > ARGS_MAX) td_jrun_fail(r, TD_EFULL, "more than %d arguments", ARGS_MAX);
    a.pos = pos->v;
    a.n = pos->n;
    a.kw = td_jrun_alloc(r, (kw->n + 1) * sizeof *a.kw);
    for (uint32_t i = 0; a.kw && i < kw->n; i++) {
        if (kw->e[i].k.kind != JV_STR) td_jrun_fail(r, TD_EBADREQ, "keywords must be strings");
        else a.kw[a.n_kw++] = (td_jkw){kw->e[i].k.u.s, kw->e[i].k.n, kw->e[i].v};
    }
    return a;
}

/* Text that a list of statements writes. */
static td_jv capture(td_jrun *r, const td_jnode *body, td_jscope *s)
{
    td_buf b, *outer = r->out;
    td_jbuf_init(r, &b);
    r->out = &b;
    exec(r, body, s);
    r->out = outer;
    return td_jv_take(r, &b);
}

/* The arguments of a macro that are not its parameters: caller, kwargs, varargs if the body names them; else
 * an error. */
static void bind_rest(td_jrun *r, const td_jnode *m, td_jargs *a, td_jscope *s)
{
    const td_jinja *t = r->t;
    td_jlist *rest = td_jlist_new(r, 4);
    td_jdict *kw = td_jdict_new(r);
    td_jv caller = td_jv_undef("caller", 6, false);
    for (uint32_t i = m->n; rest && i < a->n; i++) td_jlist_push(r, rest, a->pos[i]);
    for (uint32_t k = 0; kw && k < a->n_kw; k++) {
        bool param = false;
        for (const td_jnode *p = m->list; p; p = p->next)
            param |=
                t->sym[p->sym].n == a->kw[k].n && !memcmp(t->sym[p->sym].name, a->kw[k].name, a->kw[k].n);
        if (param) continue;
        if (m->flag & 4 && a->kw[k].n == 6 && !memcmp(a->kw[k].name, "caller", 6)) caller = a->kw[k].v;
        else if (m->flag & 2) td_jdict_set(r, kw, td_jv_text(a->kw[k].name, a->kw[k].n), a->kw[k].v);
        else
            td_jrun_fail(r, TD_EBADREQ, "macro '%s' takes no keyword argument '%.*s'", t->sym[m->sym].name,
                         (int)a->kw[k].n, a->kw[k].name);
    }
    if (!rest || !kw) return;
    if (rest->n && !(m->flag & 1))
        td_jrun_fail(r, TD_EBADREQ, "macro '%s' takes not more than %u argument(s)", t->sym[m->sym].name,
                     m->n);
    if (m->flag & 1) bind(r, s, t->s_varargs, (td_jv){.kind = JV_TUPLE, .u.list = rest});
    if (m->flag & 2) bind(r, s, t->s_kwargs, (td_jv){.kind = JV_DICT, .u.dict = kw});
    if (m->flag & 4) bind(r, s, t->s_caller, caller);
}

static td_jv call_macro(td_jrun *r, td_jmacro *macro, td_jargs *a)
{
    const td_jnode *m = macro->node;
    const td_jsym *sym = r->t->sym;
    td_jscope *s = new_scope(r, macro->scope);
    uint32_t line = r->line, i = 0;
    if (!s) return td_jv_undef("", 0, false);
    bind_rest(r, m, a, s);
    for (const td_jnode *p = m->list; p && r->st >= 0; p = p->next, i++) {
        td_jv v = {0};
        if (i < a->n) v = a->pos[i];
        for (uint32_t k = 0; k < a->n_kw; k++) {
            if (sym[p->sym].n != a->kw[k].n || memcmp(sym[p->sym].name, a->kw[k].name, a->kw[k].n)) continue;
            if (v.kind != JV_MISSING)
                td_jrun_fail(r, TD_EBADREQ, "macro '%s' got multiple values for argument '%s'",
                             sym[m->sym].name, sym[p->sym].name);
            v = a->kw[k].v;
        }
        if (v.kind == JV_MISSING)
            v = p->a ? eval(r, p->a, s) : td_jv_undef(sym[p->sym].name, sym[p->sym].n, false);
        bind(r, s, p->sym, v);
    }
    td_jv text = capture(r, m->body, s);
    r->line = line;
    return text;
}

td_jv td_jrun_call(td_jrun *r, td_jv f, td_jargs *a, const char *what)
{
    if (r->st < 0) return f;
    switch (f.kind) {
    case JV_MACRO: return call_macro(r, f.u.macro, a);
    case JV_METHOD: return f.u.bound->fn->call(r, f.u.bound->self, a);
    case JV_FUNC: return f.u.fn->call(r, (td_jv){0}, a);
    case JV_JOINER: { /* nothing the first time, then its separator */
        td_jgen *g = f.u.gen;
        return g->at++ ? g->list->v[0] : td_jv_text("", 0);
    }
    case JV_UNDEF:
        if (f.flag) return td_jrun_fail(r, TD_EBADREQ, "object has no attribute '%.*s'", (int)f.n, f.u.s);
        return td_jrun_fail(r, TD_EBADREQ, "'%.*s' is undefined", (int)f.n, f.u.s);
    default: return td_jrun_fail(r, TD_EBADREQ, "'%s' object is not callable%s", td_jv_type(f), what);
    }
}

/* obj.name(...): without making a bound method where the method is known. */
static td_jv eval_call(td_jrun *r, const td_jnode *x, td_jscope *s)
{
    const td_jnode *f = x->a;
    td_jargs a;
    if (f->type == N_ATTR) {
        td_jv obj = eval(r, f->a, s);
        const td_jfn *fn = r->st < 0 ? NULL : td_jinja_method((td_jkind)obj.kind, f->value.u.s, f->value.n);
        if (fn && !(fn->mutates && r->lim.immutable)) {
            a = eval_args(r, x, s);
            r->line = x->line;
            return r->st < 0 ? obj : fn->call(r, obj, &a);
        }
        r->line = f->line;
        td_jv callee = r->st < 0 ? obj : td_jrun_attr(r, obj, f->value.u.s, f->value.n);
        a = eval_args(r, x, s);
        r->line = x->line;
        return td_jrun_call(r, callee, &a, "");
    }
    td_jv callee = eval(r, f, s);
    a = eval_args(r, x, s);
    r->line = x->line;
    return td_jrun_call(r, callee, &a, "");
}

static td_jv eval_applied(td_jrun *r, const td_jnode *x, td_jscope *s)
{
    td_jv v = eval(r, x->a, s);
    td_jargs a = eval_args(r, x, s);
    r->line = x->line;
    if (r->st < 0) return v;
    if (!x->fn)
        return td_jrun_fail(r, TD_ENOSUP, "no %s named '%.*s'", x->type == N_FILTER ? "filter" : "test",
                            (int)x->value.n, x->value.u.s);
    return x->fn->call(r, v, &a);
}

/* ---- expressions ---- */

static td_jv eval_sequence(td_jrun *r, const td_jnode *x, td_jscope *s)
{
    td_jlist *l = td_jlist_new(r, x->n);
    for (const td_jnode *c = x->list; c && l && r->st >= 0; c = c->next) td_jlist_push(r, l, eval(r, c, s));
    return l ? (td_jv){.kind = x->type == N_LIST ? JV_LIST : JV_TUPLE, .u.list = l} : td_jv_none();
}

static td_jv eval_dict(td_jrun *r, const td_jnode *x, td_jscope *s)
{
    td_jdict *d = td_jdict_new(r);
    for (const td_jnode *c = x->list; c && d && r->st >= 0; c = c->next->next) {
        td_jv k = eval(r, c, s);
        td_jdict_set(r, d, k, eval(r, c->next, s));
    }
    return d ? (td_jv){.kind = JV_DICT, .u.dict = d} : td_jv_none();
}

static td_jv eval_concat(td_jrun *r, const td_jnode *x, td_jscope *s)
{
    td_buf b;
    td_jbuf_init(r, &b);
    for (const td_jnode *c = x->list; c && r->st >= 0; c = c->next) td_jv_str(r, eval(r, c, s), &b);
    return td_jv_take(r, &b);
}

static td_jv eval_compare(td_jrun *r, const td_jnode *x, td_jscope *s)
{
    td_jv left = eval(r, x->a, s), v = td_jv_bool(true);
    for (const td_jnode *c = x->list; c && r->st >= 0; c = c->next) {
        td_jv right = eval(r, c->a, s);
        if (r->st < 0) break;
        r->line = c->line;
        v = td_jv_compare(r, (td_jop)c->op, left, right);
        if (!v.u.b) break;
        left = right;
    }
    return v;
}

static td_jv eval_slice(td_jrun *r, const td_jnode *x, td_jscope *s)
{
    td_jv obj = eval(r, x->a, s), part[3] = {{0}};
    const td_jnode *p[3] = {x->b->a, x->b->b, x->b->c};
    for (int i = 0; i < 3; i++)
        if (p[i]) part[i] = eval(r, p[i], s);
    r->line = x->line;
    return r->st < 0 ? obj : td_jv_slice(r, obj, part[0], part[1], part[2]);
}

static td_jv eval_sign(td_jrun *r, const td_jnode *x, td_jscope *s)
{
    td_jv v = eval(r, x->a, s);
    int64_t i;
    r->line = x->line;
    if (r->st < 0) return v;
    if (v.kind == JV_REAL) return td_jv_real(x->type == N_NEG ? -v.u.f : v.u.f);
    if (td_jv_integer(v, &i) && i != INT64_MIN) return td_jv_int(x->type == N_NEG ? -i : i);
    if (v.kind == JV_UNDEF) return td_jrun_fail(r, TD_EBADREQ, "'%.*s' is undefined", (int)v.n, v.u.s);
    return td_jrun_fail(r, TD_EBADREQ, "bad operand type for unary %c: '%s'", x->type == N_NEG ? '-' : '+',
                        td_jv_type(v));
}

static td_jv eval_node(td_jrun *r, const td_jnode *x, td_jscope *s)
{
    td_jv v, w;
    switch (x->type) {
    case N_CONST: return x->value;
    case N_NAME: return lookup(r, s, x->sym);
    case N_HOLE: return r->hole;
    case N_LIST:
    case N_TUPLE: return eval_sequence(r, x, s);
    case N_DICT: return eval_dict(r, x, s);
    case N_ATTR:
        v = eval(r, x->a, s);
        r->line = x->line;
        return r->st < 0 ? v : td_jrun_attr(r, v, x->value.u.s, x->value.n);
    case N_ITEM:
        if (x->b->type == N_SLICE) return eval_slice(r, x, s);
        v = eval(r, x->a, s);
        w = eval(r, x->b, s);
        r->line = x->line;
        return r->st < 0 ? v : td_jrun_item(r, v, w);
    case N_CALL: return eval_call(r, x, s);
    case N_FILTER:
    case N_TEST: return eval_applied(r, x, s);
    case N_NOT: return td_jv_bool(!td_jv_true(eval(r, x->a, s)));
    case N_NEG:
    case N_POS: return eval_sign(r, x, s);
    case N_AND: v = eval(r, x->a, s); return td_jv_true(v) ? eval(r, x->b, s) : v;
    case N_OR: v = eval(r, x->a, s); return td_jv_true(v) ? v : eval(r, x->b, s);
    case N_COND:
        if (td_jv_true(eval(r, x->a, s))) return eval(r, x->b, s);
        return x->c ? eval(r, x->c, s) : td_jv_undef("the inline if-expression", 24, false);
    case N_BIN:
        v = eval(r, x->a, s);
        w = eval(r, x->b, s);
        r->line = x->line;
        return r->st < 0 ? v : td_jv_arith(r, (td_jop)x->op, v, w);
    case N_CONCAT: return eval_concat(r, x, s);
    case N_COMPARE: return eval_compare(r, x, s);
    default: return td_jrun_fail(r, TD_EPROTO, "a slice is only allowed in brackets of its own");
    }
}

static td_jv eval(td_jrun *r, const td_jnode *x, td_jscope *s)
{
    if (!enter(r, x)) return td_jv_undef("", 0, false);
    td_jv v = eval_node(r, x, s);
    r->depth--;
    return v;
}

/* ---- loops ---- */

/* The next item that passes the condition, from the iterable. */
static bool pull(td_jloop *l, td_jv *out)
{
    td_jrun *r = l->r;
    while (td_jiter_next(r, &l->it, out)) {
        if (!l->node->c) return true;
        td_jscope *s = new_scope(r, l->scope);
        if (!s) return false;
        assign(r, l->node->a, *out, s);
        if (td_jv_true(eval(r, l->node->c, s)) && r->st >= 0) return true;
    }
    return false;
}

static bool peek(td_jloop *l, td_jv *out)
{
    td_jv v;
    if (l->ahead_at < l->ahead->n) {
        *out = l->ahead->v[l->ahead_at];
        return true;
    }
    if (!pull(l, &v)) return false;
    l->ahead->n = l->ahead_at = 0;
    td_jlist_push(l->r, l->ahead, v);
    *out = v;
    return l->r->st >= 0;
}

static bool advance(td_jloop *l, td_jv *out)
{
    if (l->ahead_at < l->ahead->n) {
        *out = l->ahead->v[l->ahead_at++];
        return true;
    }
    return pull(l, out);
}

static int64_t length(td_jloop *l)
{
    td_jv v;
    if (l->total >= 0) return l->total;
    if (!l->node->c && l->it.src.kind != JV_GEN) return l->total = td_jv_len(l->r, l->it.src);
    if (l->ahead_at) { /* make room at the front, keep what is waiting */
        memmove(l->ahead->v, l->ahead->v + l->ahead_at, (l->ahead->n - l->ahead_at) * sizeof(td_jv));
        l->ahead->n -= l->ahead_at;
        l->ahead_at = 0;
    }
    while (pull(l, &v) && td_jlist_push(l->r, l->ahead, v)) {
    }
    return l->total = l->index0 + 1 + l->ahead->n;
}

static td_jv loop_cycle(td_jrun *r, td_jv self, td_jargs *a)
{
    if (!a->n || a->n_kw) return td_jrun_fail(r, TD_EBADREQ, "no items for cycling given");
    return a->pos[self.u.loop->index0 % a->n];
}

static td_jv loop_changed(td_jrun *r, td_jv self, td_jargs *a)
{
    td_jlist *l = td_jlist_new(r, a->n);
    for (uint32_t i = 0; i < a->n; i++) td_jlist_push(r, l, a->pos[i]);
    if (!l) return self;
    td_jv now = {.kind = JV_TUPLE, .u.list = l};
    bool same = self.u.loop->changed.kind == JV_TUPLE && td_jv_eq(r, self.u.loop->changed, now);
    self.u.loop->changed = now;
    return td_jv_bool(!same);
}

td_jv td_jloop_attr(td_jrun *r, td_jloop *l, const char *name, uint32_t n)
{
    static const td_jfn cycle = {"cycle", loop_cycle, false}, changed = {"changed", loop_changed, false};
    td_jv self = {.kind = JV_LOOP, .u.loop = l}, key = td_jv_text(name, n), v;
    if (td_jv_is(key, "index0")) return td_jv_int(l->index0);
    if (td_jv_is(key, "index")) return td_jv_int(l->index0 + 1);
    if (td_jv_is(key, "first")) return td_jv_bool(!l->index0);
    if (td_jv_is(key, "last")) return td_jv_bool(!peek(l, &v));
    if (td_jv_is(key, "length")) return td_jv_int(length(l));
    if (td_jv_is(key, "revindex")) return td_jv_int(length(l) - l->index0);
    if (td_jv_is(key, "revindex0")) return td_jv_int(length(l) - l->index0 - 1);
    if (td_jv_is(key, "depth")) return td_jv_int(1);
    if (td_jv_is(key, "depth0")) return td_jv_int(0);
    if (td_jv_is(key, "previtem"))
        return l->prev.kind == JV_MISSING ? td_jv_undef("there is no previous item", 25, false) : l->prev;
    if (td_jv_is(key, "nextitem")) return peek(l, &v) ? v : td_jv_undef("there is no next item", 21, false);
    if (td_jv_is(key, "cycle") || td_jv_is(key, "changed")) {
        td_jbound *b = td_jrun_alloc(r, sizeof *b);
        if (!b) return self;
        *b = (td_jbound){self, name[1] == 'y' ? &cycle : &changed};
        return (td_jv){.kind = JV_METHOD, .u.bound = b};
    }
    return td_jv_undef(name, n, true);
}

static flow exec_for(td_jrun *r, const td_jnode *x, td_jscope *s)
{
    td_jloop *l = td_jrun_alloc(r, sizeof *l);
    if (!l) return FLOW_ON;
    *l = (td_jloop){.r = r, .node = x, .scope = s, .index0 = -1, .total = -1, .ahead = td_jlist_new(r, 4)};
    td_jv item, over = eval(r, x->b, s);
    r->line = x->line;
    if (!l->ahead || r->st < 0 || !td_jiter_open(r, &l->it, over)) return FLOW_ON;
    while (r->st >= 0 && advance(l, &item)) {
        l->prev = l->index0 >= 0 ? l->cur : (td_jv){0};
        l->cur = item;
        l->index0++;
        td_jscope *turn = new_scope(r, s);
        if (!turn) break;
        bind(r, turn, r->t->s_loop, (td_jv){.kind = JV_LOOP, .u.loop = l});
        assign(r, x->a, item, turn);
        if (exec(r, x->body, turn) == FLOW_BREAK) return FLOW_ON;
    }
    return l->index0 < 0 && r->st >= 0 ? exec(r, x->orelse, s) : FLOW_ON;
}

/* ---- statements ---- */

static void print(td_jrun *r, td_jv v)
{
    if (r->st < 0) return;
    td_jv_str(r, v, r->out);
    if (!td_buf_ok(r->out)) td_jrun_fail(r, TD_EFULL, "output limit reached");
}

static flow exec_if(td_jrun *r, const td_jnode *x, td_jscope *s)
{
    for (const td_jnode *b = x->list; b && r->st >= 0; b = b->next)
        if (!b->a || td_jv_true(eval(r, b->a, s))) return r->st < 0 ? FLOW_ON : exec(r, b->body, s);
    return FLOW_ON;
}

/* Captured text, through the filters of the block. */
static td_jv filtered(td_jrun *r, const td_jnode *x, td_jscope *s)
{
    td_jscope *inner = new_scope(r, s);
    if (!inner) return td_jv_none();
    td_jv outer = r->hole, text = capture(r, x->body, inner);
    r->hole = text;
    if (x->b) text = eval(r, x->b, s);
    r->hole = outer;
    return text;
}

static void exec_with(td_jrun *r, const td_jnode *x, td_jscope *s)
{
    td_jscope *inner = new_scope(r, s);
    for (const td_jnode *c = x->list; inner && c && r->st >= 0; c = c->next->next)
        assign(r, c, eval(r, c->next, s), inner);
    if (inner && r->st >= 0) exec(r, x->body, inner);
}

static td_jv make_macro(td_jrun *r, const td_jnode *x, td_jscope *s)
{
    td_jmacro *m = td_jrun_alloc(r, sizeof *m);
    if (!m) return td_jv_none();
    *m = (td_jmacro){x, s};
    return (td_jv){.kind = JV_MACRO, .u.macro = m};
}

static void exec_callblock(td_jrun *r, const td_jnode *x, td_jscope *s)
{
    td_jv callee = eval(r, x->a->a, s);
    td_jargs a = eval_args(r, x->a, s);
    td_jkw *kw = td_jrun_alloc(r, (a.n_kw + 1) * sizeof *kw);
    if (!kw) return;
    if (a.n_kw) memcpy(kw, a.kw, a.n_kw * sizeof *kw);
    kw[a.n_kw] = (td_jkw){"caller", 6, make_macro(r, x->b, s)};
    a.kw = kw;
    a.n_kw++;
    r->line = x->line;
    print(r, td_jrun_call(r, callee, &a, ""));
}

static flow exec_node(td_jrun *r, const td_jnode *x, td_jscope *s)
{
    switch (x->type) {
    case N_TEXT: print(r, x->value); break;
    case N_PRINT: print(r, eval(r, x->a, s)); break;
    case N_IF: return exec_if(r, x, s);
    case N_FOR: return exec_for(r, x, s);
    case N_SET: assign(r, x->a, eval(r, x->b, s), s); break;
    case N_SETBLOCK: assign(r, x->a, filtered(r, x, s), s); break;
    case N_MACRO: bind(r, s, x->sym, make_macro(r, x, s)); break;
    case N_CALLBLOCK: exec_callblock(r, x, s); break;
    case N_FILTERBLOCK: print(r, filtered(r, x, s)); break;
    case N_WITH: exec_with(r, x, s); break;
    case N_BODY: return exec(r, x->body, s);
    case N_BREAK: return FLOW_BREAK;
    case N_CONTINUE: return FLOW_CONTINUE;
    default: td_jrun_fail(r, TD_EPROTO, "not a statement");
    }
    return FLOW_ON;
}

static flow exec(td_jrun *r, const td_jnode *first, td_jscope *s)
{
    for (const td_jnode *x = first; x && r->st >= 0; x = x->next) {
        if (!enter(r, x)) break;
        flow f = exec_node(r, x, s);
        r->depth--;
        if (f != FLOW_ON) return f;
    }
    return FLOW_ON;
}

/* ---- rendering ---- */

static void load_context(td_jrun *r, const td_json *context)
{
    for (const td_json *m = context->child; m && r->st >= 0; m = m->next)
        for (uint32_t i = 0; i < r->t->n_sym; i++)
            if (r->t->sym[i].n == m->key_len && !memcmp(r->t->sym[i].name, m->key, m->key_len))
                r->ctx[i] = td_jv_from_json(r, m);
}

td_status td_jinja_render(const td_jinja *t, const td_json *context, td_arena *a, td_jinja_limits lim,
                          td_buf *out)
{
    td_jrun r = {.t = t, .a = a, .lim = lim, .out = out};
    if (!r.lim.steps) r.lim.steps = DEFAULT_STEPS;
    if (!r.lim.depth) r.lim.depth = DEFAULT_DEPTH;
    if (!r.lim.now_s) r.lim.now_s = td_wall_s();
    if (!context || context->type != TD_JSON_OBJ)
        return td_refuse(TD_EBADREQ, "chat template: the context is no object");
    size_t before = out->len;
    r.ctx = td_jrun_alloc(&r, (t->n_sym + 1) * sizeof(td_jv));
    td_jscope *root = new_scope(&r, NULL);
    if (r.ctx && root) {
        load_context(&r, context);
        exec(&r, t->body, root);
    }
    if (r.st < 0 && out->len > before) { /* outputs only on success */
        out->len = before;
        out->p[before] = '\0';
    }
    return r.st;
}
