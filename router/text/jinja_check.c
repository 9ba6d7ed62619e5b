// SPDX-License-Identifier: Apache-2.0
/* router/text/jinja_check.c - what a template names and nobody has: filters, tests, functions. Looked for when it is
 * compiled, so that it is the operator who reads it, not a client whose messages reach that line. Jinja2 refuses filters
 * and tests then too, but not directly below an if, and not what is named by a text or called; those are doubts here:
 * said, not refused. What the template itself asks about ("x" is filter, f is defined) may be missing: its author has
 * thought of that. */
#include "common/check.h"
#include "router/text/jinja_impl.h"
#include <stdio.h>
#include <string.h>

enum { SHOWN = 80 };

typedef struct check {
    td_jinja *t;
    bool asks[2]; /* somewhere stands `x is filter`, `x is test` */
} check;

/* The first one is kept. */
static void doubt(check *c, const td_jnode *x, const char *kind, const char *name, uint32_t n)
{
    if (c->t->doubt[0]) return;
    snprintf(c->t->doubt, sizeof c->t->doubt, "chat template line %u: no %s named '%.*s'", x->line, kind,
             (int)TD_MIN(n, (uint32_t)SHOWN), name);
}

static void count_names(check *c)
{
    for (const td_jnode *x = c->t->nodes; x; x = x->made) {
        if (x->type == N_NAME || x->type == N_NSREF) c->t->sym[x->sym].named++;
        if (x->type == N_CALL && x->a->type == N_NAME) c->t->sym[x->a->sym].called++;
        if (x->type == N_MACRO) c->t->sym[x->sym].named++;
        if (x->type == N_TEST && td_jv_is(x->value, "filter")) c->asks[0] = true;
        if (x->type == N_TEST && td_jv_is(x->value, "test")) c->asks[1] = true;
    }
}

static td_status check_applied(check *c, const td_jnode *x)
{
    bool test = x->type == N_TEST;
    const char *kind = test ? "test" : "filter";
    td_jv name = x->value;
    if (x->fn) return TD_OK;
    if (!x->soft)
        return td_jinja_syntax(TD_ENOSUP, x->line, "no %s named '%.*s'", kind,
                               (int)TD_MIN(name.n, (uint32_t)SHOWN), name.u.s);
    if (!c->asks[test]) doubt(c, x, kind, name.u.s, name.n);
    return TD_OK;
}

/* map, select and their kin take the name of another as text. */
static void check_argument(check *c, const td_jnode *x)
{
    static const struct {
        const char *name;
        bool test, second;
    } takers[] = {
        {"map", false, false},      {"select", true, false},    {"reject", true, false},
        {"selectattr", true, true}, {"rejectattr", true, true},
    };
    for (size_t k = 0; k < TD_COUNT(takers); k++) {
        if (!td_jv_is(x->value, takers[k].name)) continue;
        bool test = takers[k].test;
        const td_jnode *of = x->list;
        if (of && takers[k].second) of = of->type == N_STAR ? NULL : of->next;
        if (!of || of->type != N_CONST || of->value.kind != JV_STR || c->asks[test]) return;
        td_jv name = of->value;
        if (!(test ? td_jinja_test : td_jinja_filter)(name.u.s, name.n))
            doubt(c, of, test ? "test" : "filter", name.u.s, name.n);
    }
}

/* A name that is called, and stands nowhere else: nothing can have given it a value. A variable of the context has
 * one, but that is data, and cannot be called. */
static void check_call(check *c, const td_jnode *call)
{
    const td_jinja *t = c->t;
    const uint32_t sym = call->a->sym;
    const td_jsym *s = &t->sym[sym];
    bool made = sym == t->s_loop || sym == t->s_caller || sym == t->s_varargs || sym == t->s_kwargs;
    if (!made && !s->global && s->named == s->called) doubt(c, call, "function", s->name, s->n);
}

td_status td_jinja_check(td_jinja *t)
{
    check c = {.t = t};
    count_names(&c);
    for (const td_jnode *x = t->nodes; x; x = x->made) {
        if (x->type == N_FILTER || x->type == N_TEST) TD_TRY(check_applied(&c, x));
        if (x->type == N_FILTER) check_argument(&c, x);
        if (x->type == N_CALL && x->a->type == N_NAME) check_call(&c, x);
    }
    return TD_OK;
}
