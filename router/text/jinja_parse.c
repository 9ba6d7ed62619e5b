// SPDX-License-Identifier: Apache-2.0
/* router/text/jinja_parse.c - tokens into a tree, by recursive descent. Children by node type:
 *   ATTR a.value; ITEM a[b]; SLICE a:b:c; CALL a(list); FILTER a | value(list); TEST a is value(list);
 *   COND b if a else c; COMPARE a, list of BIN{op, a}; DICT list k v k v; KEYWORD value=a; STAR *a;
 *   DSTAR **a; NSREF sym.value;
 *   PRINT a; IF list of BRANCH{a or NULL, body}; FOR a=target b=iterable c=condition body orelse;
 *   SET a=target b; SETBLOCK a=target b=filters body; MACRO sym, list of NAME{a=default}, body;
 *   CALLBLOCK a=call b=macro; FILTERBLOCK b=filters body; WITH list target value ..., body */
#include "common/check.h"
#include "router/text/jinja_impl.h"
#include "router/text/unicode.h"
#include <stdlib.h>
#include <string.h>

enum { NESTING = 200, SOURCE_MAX = 1 << 20, ARENA_MAX = 256 << 20 };

typedef struct parser {
    td_jinja *t;
    const td_jtoken *tok;
    uint32_t at, n;
    int depth, loops;
    bool soft;       /* directly below an if */
    td_jnode **made; /* where the next node is chained */
    uint8_t uses; /* varargs, kwargs, caller seen in the macro being parsed */
    td_status st;
} parser;

typedef td_jnode node;

static const td_jtoken *cur(const parser *p) { return &p->tok[p->at]; }
static const td_jtoken *ahead(const parser *p) { return &p->tok[TD_MIN(p->at + 1, p->n - 1)]; }
static void next(parser *p)
{
    if (p->at + 1 < p->n) p->at++;
}

static node *fail(parser *p, td_status st, const char *what)
{
    if (p->st < 0) return NULL;
    const td_jtoken *t = cur(p);
    if (t->type == T_NAME || t->type == T_STR)
        p->st = td_jinja_syntax(st, t->line, "%s, at \"%.*s\"", what, (int)TD_MIN(t->n, 40u), t->s);
    else
        p->st = td_jinja_syntax(st, t->line, "%s%s", what,
                                t->type == T_EOF ? ", at the end of the template" : "");
    return NULL;
}

static node *new_node(parser *p, td_jnode_type type)
{
    node *x = p->st < 0 ? NULL : td_arena_alloc(&p->t->arena, sizeof *x);
    if (!x) return fail(p, TD_EFULL, "template too large");
    x->type = (uint8_t)type;
    x->line = cur(p)->line;
    x->soft = p->soft;
    *p->made = x;
    p->made = &x->made;
    return x;
}

static bool is_op(const parser *p, td_jop op) { return cur(p)->type == T_OP && cur(p)->op == op; }
static bool token_is(const td_jtoken *t, const char *name)
{
    return t->type == T_NAME && t->n == strlen(name) && !memcmp(t->s, name, t->n);
}
static bool is_name(const parser *p, const char *name) { return token_is(cur(p), name); }

static bool skip_op(parser *p, td_jop op)
{
    if (!is_op(p, op)) return false;
    next(p);
    return true;
}

static bool skip_name(parser *p, const char *name)
{
    if (!is_name(p, name)) return false;
    next(p);
    return true;
}

static void expect_op(parser *p, td_jop op, const char *what)
{
    if (p->st >= 0 && !skip_op(p, op)) fail(p, TD_EPROTO, what);
}

/* Symbols are interned once: at run time a name is a number. */
static uint32_t intern(parser *p, const char *s, uint32_t n)
{
    td_jinja *t = p->t;
    for (uint32_t i = 0; i < t->n_sym; i++)
        if (t->sym[i].n == n && !memcmp(t->sym[i].name, s, n)) return i;
    if (t->n_sym == t->cap_sym) {
        uint32_t cap = t->cap_sym ? 2 * t->cap_sym : 64;
        td_jsym *bigger = td_arena_alloc(&t->arena, cap * sizeof *bigger);
        if (!bigger) return fail(p, TD_EFULL, "template too large"), 0;
        if (t->n_sym) memcpy(bigger, t->sym, t->n_sym * sizeof *bigger);
        t->sym = bigger;
        t->cap_sym = cap;
    }
    const char *copy = td_arena_strndup(&t->arena, s, n);
    if (!copy) return fail(p, TD_EFULL, "template too large"), 0;
    t->sym[t->n_sym] = (td_jsym){.name = copy, .n = n, .global = td_jinja_global(copy, n)};
    return t->n_sym++;
}

static td_jv keep(parser *p, const char *s, uint32_t n)
{
    const char *copy = td_arena_strndup(&p->t->arena, s, n);
    if (!copy) fail(p, TD_EFULL, "template too large");
    return td_jv_text(copy ? copy : "", copy ? n : 0);
}

static td_jv take_name(parser *p, const char *what)
{
    if (cur(p)->type != T_NAME) {
        fail(p, TD_EPROTO, what);
        return td_jv_text("", 0);
    }
    td_jv v = keep(p, cur(p)->s, cur(p)->n);
    next(p);
    return v;
}

static void append(node *parent, node ***tail, node *child)
{
    if (!child) return;
    **tail = child;
    *tail = &child->next;
    parent->n++;
}

static bool enter(parser *p)
{
    if (p->st >= 0 && ++p->depth <= NESTING) return true;
    p->depth--;
    fail(p, TD_EFULL, "nested too deeply");
    return false;
}

static node *expression(parser *p);
static node *or_test(parser *p);
static node *unary(parser *p, bool with_filter);

/* ---- primaries ---- */

static node *name_node(parser *p)
{
    static const char *const seen[] = {"varargs", "kwargs", "caller"};
    node *x = new_node(p, N_NAME);
    if (!x) return NULL;
    for (int k = 0; k < 3; k++)
        if (is_name(p, seen[k])) p->uses |= (uint8_t)(1 << k);
    x->sym = intern(p, cur(p)->s, cur(p)->n);
    next(p);
    return x;
}

static node *constant(parser *p, td_jv v)
{
    node *x = new_node(p, N_CONST);
    if (x) x->value = v;
    next(p);
    return x;
}

static node *name_or_word(parser *p, bool with_namespace)
{
    if (is_name(p, "true") || is_name(p, "True")) return constant(p, td_jv_bool(true));
    if (is_name(p, "false") || is_name(p, "False")) return constant(p, td_jv_bool(false));
    if (is_name(p, "none") || is_name(p, "None")) return constant(p, td_jv_none());
    node *x = name_node(p);
    if (x && with_namespace && skip_op(p, O_DOT)) {
        x->type = N_NSREF;
        x->value = take_name(p, "attribute name expected");
    }
    return x;
}

static node *string(parser *p)
{
    node *x = new_node(p, N_CONST);
    if (!x) return NULL;
    x->value = keep(p, cur(p)->s, cur(p)->n);
    next(p);
    while (p->st >= 0 && cur(p)->type == T_STR) { /* "a" "b" is one string */
        uint32_t n = x->value.n + cur(p)->n;
        char *both = td_arena_alloc(&p->t->arena, (size_t)n + 1);
        if (!both) return fail(p, TD_EFULL, "template too large");
        memcpy(both, x->value.u.s, x->value.n);
        memcpy(both + x->value.n, cur(p)->s, cur(p)->n);
        x->value = td_jv_text(both, n);
        next(p);
    }
    return x;
}

static bool tuple_end(const parser *p, const char *stop)
{
    return cur(p)->type == T_VAR_END || cur(p)->type == T_BLOCK_END || is_op(p, O_RPAREN) ||
           (stop && is_name(p, stop));
}

static node *primary(parser *p, bool with_namespace);

typedef enum { FULL, NO_CONDITIONAL, TARGET, NS_TARGET } item_kind;

static node *tuple_item(parser *p, item_kind k)
{
    if (k == FULL) return expression(p);
    return k == NO_CONDITIONAL ? or_test(p) : primary(p, k == NS_TARGET);
}

/* One expression, or several separated by commas: a tuple. */
static node *tuple(parser *p, item_kind kind, const char *stop, bool parentheses)
{
    node *t = new_node(p, N_TUPLE), **tail = t ? &t->list : NULL;
    bool comma = false;
    while (p->st >= 0) {
        if (t->n) expect_op(p, O_COMMA, "comma expected");
        if (tuple_end(p, stop)) break;
        append(t, &tail, tuple_item(p, kind));
        if (!is_op(p, O_COMMA)) break;
        comma = true;
    }
    if (p->st < 0) return NULL;
    if (comma) return t;
    if (t->n) return t->list;
    return parentheses ? t : fail(p, TD_EPROTO, "expression expected");
}

static node *bracketed(parser *p, td_jnode_type type, td_jop close)
{
    node *x = new_node(p, type), **tail = x ? &x->list : NULL;
    next(p);
    while (p->st >= 0 && !is_op(p, close)) {
        if (x->n) expect_op(p, O_COMMA, "comma expected");
        if (is_op(p, close)) break;
        append(x, &tail, expression(p));
        if (type != N_DICT) continue;
        expect_op(p, O_COLON, "':' expected");
        append(x, &tail, expression(p));
    }
    expect_op(p, close, "closing bracket expected");
    return x;
}

static node *primary(parser *p, bool with_namespace)
{
    const td_jtoken *t = cur(p);
    if (!enter(p)) return NULL;
    node *x = NULL;
    if (t->type == T_NAME) x = name_or_word(p, with_namespace);
    else if (t->type == T_STR) x = string(p);
    else if (t->type == T_INT) x = constant(p, td_jv_int(t->i));
    else if (t->type == T_REAL) x = constant(p, td_jv_real(t->f));
    else if (is_op(p, O_LPAREN)) {
        next(p);
        x = tuple(p, FULL, NULL, true);
        expect_op(p, O_RPAREN, "')' expected");
    } else if (is_op(p, O_LBRACKET)) x = bracketed(p, N_LIST, O_RBRACKET);
    else if (is_op(p, O_LBRACE)) x = bracketed(p, N_DICT, O_RBRACE);
    else fail(p, TD_EPROTO, "expression expected");
    p->depth--;
    return x;
}

/* ---- postfix ---- */

static node *slice_or_index(parser *p)
{
    node *x = is_op(p, O_COLON) ? NULL : expression(p);
    if (p->st < 0 || !is_op(p, O_COLON)) return x;
    node *s = new_node(p, N_SLICE);
    next(p);
    if (!s) return NULL;
    s->a = x;
    if (!is_op(p, O_COLON) && !is_op(p, O_RBRACKET) && !is_op(p, O_COMMA)) s->b = expression(p);
    if (skip_op(p, O_COLON) && !is_op(p, O_RBRACKET) && !is_op(p, O_COMMA)) s->c = expression(p);
    return s;
}

static node *subscript(parser *p, node *of)
{
    node *x = new_node(p, N_ITEM);
    if (!x) return NULL;
    x->a = of;
    if (skip_op(p, O_DOT)) {
        if (cur(p)->type == T_INT) {
            x->b = constant(p, td_jv_int(cur(p)->i));
            return x;
        }
        x->type = N_ATTR;
        x->value = take_name(p, "attribute name expected");
        return x;
    }
    next(p);
    node *t = new_node(p, N_TUPLE), **tail = t ? &t->list : NULL;
    while (p->st >= 0 && !is_op(p, O_RBRACKET)) {
        if (t->n) expect_op(p, O_COMMA, "comma expected");
        append(t, &tail, slice_or_index(p));
    }
    expect_op(p, O_RBRACKET, "']' expected");
    if (p->st < 0) return NULL;
    x->b = t->n == 1 ? t->list : t;
    return x;
}

static void arguments(parser *p, node *call)
{
    node **tail = &call->list;
    int phase = 0; /* 0 positional, 1 after a keyword, 2 after *args, 3 after **kwargs */
    expect_op(p, O_LPAREN, "'(' expected");
    for (bool first = true; p->st >= 0 && !is_op(p, O_RPAREN); first = false) {
        if (!first) expect_op(p, O_COMMA, "comma expected");
        if (is_op(p, O_RPAREN)) break;
        node *x;
        if (is_op(p, O_MUL) || is_op(p, O_POW)) {
            int to = is_op(p, O_MUL) ? 2 : 3;
            if (phase >= to) fail(p, TD_EPROTO, "invalid arguments of a call");
            x = new_node(p, to == 2 ? N_STAR : N_DSTAR);
            next(p);
            if (x) x->a = expression(p);
            phase = to;
        } else if (cur(p)->type == T_NAME && ahead(p)->type == T_OP && ahead(p)->op == O_ASSIGN) {
            if (phase == 3) fail(p, TD_EPROTO, "invalid arguments of a call");
            x = new_node(p, N_KEYWORD);
            if (!x) return;
            x->value = take_name(p, "name expected");
            next(p);
            x->a = expression(p);
            if (!phase) phase = 1;
        } else {
            if (phase) fail(p, TD_EPROTO, "invalid arguments of a call");
            x = expression(p);
        }
        append(call, &tail, x);
    }
    expect_op(p, O_RPAREN, "')' expected");
}

static node *call(parser *p, node *of)
{
    node *x = new_node(p, N_CALL);
    if (!x) return NULL;
    x->a = of;
    arguments(p, x);
    return x;
}

static node *postfix(parser *p, node *x)
{
    while (p->st >= 0) {
        if (is_op(p, O_DOT) || is_op(p, O_LBRACKET)) x = subscript(p, x);
        else if (is_op(p, O_LPAREN)) x = call(p, x);
        else break;
    }
    return x;
}

static node *filter(parser *p, node *of, bool inline_start)
{
    while (p->st >= 0 && (inline_start || is_op(p, O_PIPE))) {
        if (!inline_start) next(p);
        inline_start = false;
        node *x = new_node(p, N_FILTER);
        if (!x) return NULL;
        x->a = of;
        x->value = take_name(p, "filter name expected");
        x->fn = td_jinja_filter(x->value.u.s, x->value.n);
        if (is_op(p, O_LPAREN)) arguments(p, x);
        of = x;
    }
    return of;
}

static bool test_argument(const parser *p)
{
    const td_jtoken *t = cur(p);
    if (t->type == T_NAME) return !is_name(p, "else") && !is_name(p, "or") && !is_name(p, "and");
    return t->type == T_STR || t->type == T_INT || t->type == T_REAL || is_op(p, O_LBRACKET) ||
           is_op(p, O_LBRACE);
}

static node *test(parser *p, node *of)
{
    next(p);
    bool negated = skip_name(p, "not");
    node *x = new_node(p, N_TEST);
    if (!x) return NULL;
    x->a = of;
    x->value = take_name(p, "test name expected");
    x->fn = td_jinja_test(x->value.u.s, x->value.n);
    if (is_op(p, O_LPAREN)) arguments(p, x);
    else if (test_argument(p)) {
        if (is_name(p, "is")) return fail(p, TD_EPROTO, "tests cannot be chained with is");
        node **tail = &x->list;
        append(x, &tail, postfix(p, primary(p, false)));
    }
    if (!negated || p->st < 0) return x;
    node *inverse = new_node(p, N_NOT);
    if (inverse) inverse->a = x;
    return inverse;
}

static node *unary(parser *p, bool with_filter)
{
    node *x;
    if (!enter(p)) return NULL;
    if (is_op(p, O_SUB) || is_op(p, O_ADD)) {
        x = new_node(p, is_op(p, O_SUB) ? N_NEG : N_POS);
        next(p);
        if (x) x->a = unary(p, false);
    } else x = primary(p, false);
    x = postfix(p, x);
    while (with_filter && p->st >= 0) {
        if (is_op(p, O_PIPE)) x = filter(p, x, false);
        else if (is_name(p, "is")) x = test(p, x);
        else if (is_op(p, O_LPAREN)) x = call(p, x);
        else break;
    }
    p->depth--;
    return x;
}

/* ---- operators, loosest last ---- */

static node *binary(parser *p, td_jnode_type type, td_jop op, node *l, node *r)
{
    node *x = new_node(p, type);
    if (!x) return NULL;
    x->op = (uint8_t)op;
    x->a = l;
    x->b = r;
    return x;
}

/* Left-associative chains build deep trees: their length counts as nesting, as the evaluator will walk down
 * it. */
static node *chain(parser *p, node *(*operand)(parser *), bool (*here)(const parser *), td_jnode_type type)
{
    node *x = operand(p);
    int links = 0;
    while (p->st >= 0 && here(p)) {
        td_jop op = (td_jop)cur(p)->op;
        next(p);
        if (++links > NESTING / 2) return fail(p, TD_EFULL, "expression too long");
        x = binary(p, type, op, x, operand(p));
    }
    return x;
}

static node *operand_unary(parser *p) { return unary(p, true); }
static bool here_pow(const parser *p) { return is_op(p, O_POW); }
static bool here_math2(const parser *p)
{
    return is_op(p, O_MUL) || is_op(p, O_DIV) || is_op(p, O_FLOORDIV) || is_op(p, O_MOD);
}
static bool here_math1(const parser *p) { return is_op(p, O_ADD) || is_op(p, O_SUB); }
static bool here_and(const parser *p) { return is_name(p, "and"); }
static bool here_or(const parser *p) { return is_name(p, "or"); }
static node *power(parser *p) { return chain(p, operand_unary, here_pow, N_BIN); }
static node *math2(parser *p) { return chain(p, power, here_math2, N_BIN); }

static node *concat(parser *p)
{
    node *x = math2(p);
    if (p->st < 0 || !is_op(p, O_TILDE)) return x;
    node *all = new_node(p, N_CONCAT), **tail = all ? &all->list : NULL;
    if (!all) return NULL;
    append(all, &tail, x);
    while (p->st >= 0 && skip_op(p, O_TILDE)) append(all, &tail, math2(p));
    return all;
}

static node *math1(parser *p) { return chain(p, concat, here_math1, N_BIN); }

static td_jop comparison(parser *p)
{
    if (cur(p)->type == T_OP && cur(p)->op >= O_EQ && cur(p)->op <= O_GE) {
        td_jop op = (td_jop)cur(p)->op;
        next(p);
        return op;
    }
    if (skip_name(p, "in")) return O_IN;
    if (!is_name(p, "not") || !token_is(ahead(p), "in")) return O_NONE;
    next(p);
    next(p);
    return O_NOTIN;
}

static node *compare(parser *p)
{
    node *x = math1(p), *all = NULL, **tail = NULL;
    for (td_jop op; p->st >= 0 && (op = comparison(p)) != O_NONE;) {
        if (!all) {
            all = new_node(p, N_COMPARE);
            if (!all) return NULL;
            all->a = x;
            tail = &all->list;
        }
        append(all, &tail, binary(p, N_BIN, op, math1(p), NULL));
    }
    return all ? all : x;
}

static node *not_test(parser *p)
{
    if (!is_name(p, "not")) return compare(p);
    if (!enter(p)) return NULL;
    node *x = new_node(p, N_NOT);
    next(p);
    if (x) x->a = not_test(p);
    p->depth--;
    return x;
}

static node *and_test(parser *p) { return chain(p, not_test, here_and, N_AND); }
static node *or_test(parser *p) { return chain(p, and_test, here_or, N_OR); }

static node *expression(parser *p)
{
    if (!enter(p)) return NULL;
    node **from = p->made, *x = or_test(p);
    bool conditional = false;
    while (p->st >= 0 && skip_name(p, "if")) {
        node *c = new_node(p, N_COND);
        if (!c) break;
        conditional = true;
        c->a = or_test(p);
        c->b = x;
        if (skip_name(p, "else")) c->c = expression(p);
        x = c;
    }
    for (node *of = conditional ? *from : NULL; of; of = of->made) of->soft = true;
    p->depth--;
    return x;
}

/* ---- statements ---- */

static node *body_until(parser *p, const char *const *stops);

static void close_tag(parser *p)
{
    if (p->st < 0) return;
    skip_op(p, O_COLON); /* for Python's sake */
    if (cur(p)->type != T_BLOCK_END) fail(p, TD_EPROTO, "end of the tag expected");
    next(p);
}

/* Returns what it was. */
static bool soft_is(parser *p, bool soft)
{
    bool outer = p->soft;
    p->soft = soft;
    return outer;
}

/* The body of a tag up to one of the stop words, which is left current. */
static node *body(parser *p, const char *const *stops)
{
    close_tag(p);
    node *b = body_until(p, stops);
    if (p->st >= 0 && cur(p)->type == T_EOF) fail(p, TD_EPROTO, "a block is not closed");
    return b;
}

/* Of all tags but if: the body is a scope of its own. */
static node *tag_body(parser *p, const char *const *stops)
{
    bool outer = soft_is(p, false);
    node *b = body(p, stops);
    p->soft = outer;
    return b;
}

static bool assignable(const node *x)
{
    if (!x) return false;
    if (x->type == N_NAME || x->type == N_NSREF) return true;
    if (x->type != N_TUPLE) return false;
    for (const node *c = x->list; c; c = c->next)
        if (!assignable(c)) return false;
    return true;
}

static node *target(parser *p, item_kind kind, const char *stop)
{
    node *x = tuple(p, kind, stop, false);
    if (p->st >= 0 && !assignable(x)) return fail(p, TD_EPROTO, "cannot assign to this");
    return x;
}

static node *if_statement(parser *p)
{
    static const char *const stops[] = {"elif", "else", "endif", NULL}, *const last[] = {"endif", NULL};
    node *x = new_node(p, N_IF), **tail = x ? &x->list : NULL;
    bool more = true, outer = soft_is(p, true);
    while (p->st >= 0 && more) {
        bool orelse = is_name(p, "else");
        node *b = new_node(p, N_BRANCH);
        next(p);
        if (!b) break;
        if (!orelse) b->a = tuple(p, NO_CONDITIONAL, NULL, false);
        b->body = body(p, orelse ? last : stops);
        append(x, &tail, b);
        more = !is_name(p, "endif");
    }
    p->soft = outer;
    next(p);
    close_tag(p);
    return x;
}

static node *for_statement(parser *p)
{
    static const char *const stops[] = {"else", "endfor", NULL}, *const last[] = {"endfor", NULL};
    node *x = new_node(p, N_FOR);
    next(p);
    if (!x) return NULL;
    x->a = target(p, TARGET, "in");
    if (p->st >= 0 && !skip_name(p, "in")) return fail(p, TD_EPROTO, "'in' expected");
    x->b = tuple(p, NO_CONDITIONAL, "recursive", false);
    bool outer = soft_is(p, false);
    if (skip_name(p, "if")) x->c = expression(p);
    p->soft = outer;
    if (is_name(p, "recursive")) return fail(p, TD_ENOSUP, "recursive loops are not supported");
    p->loops++;
    x->body = tag_body(p, stops);
    p->loops--;
    if (skip_name(p, "else")) x->orelse = tag_body(p, last);
    next(p);
    close_tag(p);
    return x;
}

/* Of what the block holds. */
static node *block_filter(parser *p, bool inline_start)
{
    bool outer = soft_is(p, false);
    node *x = filter(p, new_node(p, N_HOLE), inline_start);
    p->soft = outer;
    return x;
}

static node *set_statement(parser *p)
{
    static const char *const stops[] = {"endset", NULL};
    node *x = new_node(p, N_SET);
    next(p);
    if (!x) return NULL;
    x->a = target(p, NS_TARGET, NULL);
    if (skip_op(p, O_ASSIGN)) {
        x->b = tuple(p, FULL, NULL, false);
        close_tag(p);
        return x;
    }
    x->type = N_SETBLOCK;
    x->b = block_filter(p, false);
    x->body = tag_body(p, stops);
    next(p);
    close_tag(p);
    return x;
}

/* (a, b=1): a list of NAME, a = default. */
static void signature(parser *p, node *macro)
{
    node **tail = &macro->list;
    bool defaults = false, outer = soft_is(p, false);
    expect_op(p, O_LPAREN, "'(' expected");
    while (p->st >= 0 && !is_op(p, O_RPAREN)) {
        if (macro->n) expect_op(p, O_COMMA, "comma expected");
        if (cur(p)->type != T_NAME) fail(p, TD_EPROTO, "parameter name expected");
        node *x = p->st < 0 ? NULL : name_node(p);
        if (!x) break;
        if (skip_op(p, O_ASSIGN)) {
            x->a = expression(p);
            defaults = true;
        } else if (defaults) fail(p, TD_EPROTO, "a parameter without a default follows one with");
        append(macro, &tail, x);
    }
    p->soft = outer;
    expect_op(p, O_RPAREN, "')' expected");
}

/* Body of a macro or call block; the loop around it is not its loop. */
static void macro_body(parser *p, node *x, const char *const *stops)
{
    int loops = p->loops;
    p->loops = 0;
    x->body = tag_body(p, stops);
    p->loops = loops;
    x->flag = p->uses;
    next(p);
    close_tag(p);
}

static node *macro_statement(parser *p)
{
    static const char *const stops[] = {"endmacro", NULL};
    node *x = new_node(p, N_MACRO);
    next(p);
    if (!x) return NULL;
    uint8_t outer = p->uses;
    p->uses = 0;
    td_jv name = take_name(p, "macro name expected");
    x->sym = intern(p, name.u.s, name.n);
    if (p->st >= 0) signature(p, x);
    macro_body(p, x, stops);
    p->uses = outer;
    return x;
}

static node *call_statement(parser *p)
{
    static const char *const stops[] = {"endcall", NULL};
    node *x = new_node(p, N_CALLBLOCK), *m = new_node(p, N_MACRO);
    next(p);
    if (!m) return NULL;
    uint8_t outer = p->uses;
    p->uses = 0;
    m->sym = p->t->s_caller;
    if (is_op(p, O_LPAREN)) signature(p, m);
    x->a = expression(p);
    if (p->st >= 0 && x->a->type != N_CALL) return fail(p, TD_EPROTO, "a call is expected");
    macro_body(p, m, stops);
    x->b = m;
    p->uses = outer | m->flag;
    return x;
}

static node *filter_statement(parser *p)
{
    static const char *const stops[] = {"endfilter", NULL};
    node *x = new_node(p, N_FILTERBLOCK);
    next(p);
    if (!x) return NULL;
    x->b = block_filter(p, true);
    x->body = tag_body(p, stops);
    next(p);
    close_tag(p);
    return x;
}

static node *with_statement(parser *p)
{
    static const char *const stops[] = {"endwith", NULL};
    node *x = new_node(p, N_WITH), **tail = x ? &x->list : NULL;
    next(p);
    while (p->st >= 0 && cur(p)->type != T_BLOCK_END) {
        if (x->n) expect_op(p, O_COMMA, "comma expected");
        append(x, &tail, target(p, TARGET, NULL));
        expect_op(p, O_ASSIGN, "'=' expected");
        append(x, &tail, expression(p));
    }
    if (!x) return NULL;
    x->body = tag_body(p, stops);
    next(p);
    close_tag(p);
    return x;
}

/* transformers marks the model's own words with it; the text is the same. */
static node *generation_statement(parser *p)
{
    static const char *const stops[] = {"endgeneration", NULL};
    node *x = new_node(p, N_BODY);
    next(p);
    if (!x) return NULL;
    x->body = tag_body(p, stops);
    next(p);
    close_tag(p);
    return x;
}

static node *print_statement(parser *p)
{
    node *x = new_node(p, N_BODY), **tail = x ? &x->body : NULL;
    next(p);
    while (p->st >= 0 && cur(p)->type != T_BLOCK_END) {
        if (x->n) expect_op(p, O_COMMA, "comma expected");
        node *out = new_node(p, N_PRINT);
        if (!out) break;
        out->a = expression(p);
        append(x, &tail, out);
    }
    close_tag(p);
    return x;
}

static node *loop_control(parser *p)
{
    node *x = new_node(p, is_name(p, "break") ? N_BREAK : N_CONTINUE);
    if (!p->loops) return fail(p, TD_EPROTO, "outside a loop");
    next(p);
    close_tag(p);
    return x;
}

static node *statement(parser *p)
{
    static const struct {
        const char *name;
        node *(*parse)(parser *);
    } known[] = {
        {"if", if_statement},       {"for", for_statement},
        {"set", set_statement},     {"macro", macro_statement},
        {"call", call_statement},   {"filter", filter_statement},
        {"with", with_statement},   {"generation", generation_statement},
        {"print", print_statement}, {"break", loop_control},
        {"continue", loop_control},
    };
    static const char *const refused[] = {"include", "import",     "from", "extends",
                                          "block",   "autoescape", "do",   "trans"};
    if (cur(p)->type != T_NAME) return fail(p, TD_EPROTO, "tag name expected");
    for (size_t k = 0; k < TD_COUNT(known); k++)
        if (is_name(p, known[k].name)) return known[k].parse(p);
    for (size_t k = 0; k < TD_COUNT(refused); k++)
        if (is_name(p, refused[k])) return fail(p, TD_ENOSUP, "tag not supported");
    return fail(p, TD_EPROTO, "unknown or misplaced tag");
}

static node *text_node(parser *p)
{
    node *x = new_node(p, N_TEXT);
    if (x) x->value = keep(p, cur(p)->s, cur(p)->n);
    next(p);
    return x;
}

static node *print_node(parser *p)
{
    node *x = new_node(p, N_PRINT);
    next(p);
    if (!x) return NULL;
    x->a = tuple(p, FULL, NULL, false);
    if (p->st >= 0 && cur(p)->type != T_VAR_END) return fail(p, TD_EPROTO, "end of the expression expected");
    next(p);
    return x;
}

/* Statements up to a tag in stops (current afterwards) or the end of the template; returns the first of a
 * list. */
static node *body_until(parser *p, const char *const *stops)
{
    node *first = NULL, **tail = &first;
    if (!enter(p)) return NULL;
    while (p->st >= 0 && cur(p)->type != T_EOF) {
        node *x = NULL;
        if (cur(p)->type == T_DATA) x = text_node(p);
        else if (cur(p)->type == T_VAR_BEGIN) x = print_node(p);
        else {
            next(p);
            bool stop = false;
            for (size_t k = 0; stops && stops[k]; k++) stop |= is_name(p, stops[k]);
            if (stop) break;
            x = statement(p);
        }
        if (!x) break;
        *tail = x;
        tail = &x->next;
    }
    p->depth--;
    return first;
}

td_status td_jinja_parse(td_jinja *t, const td_jtoken *tok, uint32_t n)
{
    parser p = {.t = t, .tok = tok, .n = n, .made = &t->nodes};
    t->s_loop = intern(&p, "loop", 4);
    t->s_caller = intern(&p, "caller", 6);
    t->s_varargs = intern(&p, "varargs", 7);
    t->s_kwargs = intern(&p, "kwargs", 6);
    t->body = body_until(&p, NULL);
    return p.st;
}

td_status td_jinja_compile(const char *src, size_t n, td_jinja **out)
{
    td_arena scratch;
    td_jtoken *tok;
    uint32_t count;
    if (n > SOURCE_MAX) return td_refuse(TD_EFULL, "chat template of %zu bytes, limit %d", n, SOURCE_MAX);
    td_jinja *t = td_xalloc(sizeof *t);
    td_arena_init(&t->arena, ARENA_MAX);
    td_arena_init(&scratch, ARENA_MAX);
    td_status st = td_uc_valid(src, n, NULL) ? TD_OK : td_jinja_syntax(TD_EPROTO, 1, "not UTF-8");
    if (st >= 0) st = td_jinja_lex(&scratch, src, n, &tok, &count);
    if (st >= 0) st = td_jinja_parse(t, tok, count);
    if (st >= 0) st = td_jinja_check(t);
    td_arena_deinit(&scratch);
    if (st < 0) td_jinja_close(t);
    else *out = t;
    return st;
}

const char *td_jinja_doubt(const td_jinja *t)
{
    return t->doubt[0] ? t->doubt : NULL;
}

void td_jinja_close(td_jinja *t)
{
    if (!t) return;
    td_arena_deinit(&t->arena);
    free(t);
}
