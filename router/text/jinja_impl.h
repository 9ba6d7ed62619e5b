/* router/text/jinja_impl.h - values, syntax tree and run state of the interpreter, shared by jinja_*.c.
 *
 * Files: jinja_lex.c text -> tokens; jinja_parse.c tokens -> tree; jinja_eval.c walks it; jinja_value.c what
 * values are; jinja_ops.c what operators do; jinja_filter.c, jinja_method.c, jinja_global.c the library.
 * Rules: 1. Errors stick: td_jrun_fail() records the first one in run->st, values computed afterwards are
 *           undefined and ignored; every loop looks at run->st.
 *        2. Values are small and copied; what they point to is in the render's arena.
 *        3. Work that is not constant per node is charged with td_jrun_charge(). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_TEXT_JINJA_IMPL_H
#define TD_ROUTER_TEXT_JINJA_IMPL_H

#include "router/text/jinja.h"

typedef enum {
    JV_MISSING, /* an argument not given; never a template's value */
    JV_UNDEF, JV_NONE, JV_BOOL, JV_INT, JV_REAL, JV_STR, JV_LIST, JV_TUPLE, JV_DICT,
    JV_VIEW,    /* dict.keys(), values(), items(): sized, iterable, not indexable */
    JV_GEN,     /* generator: iterable once, true, no length */
    JV_NS, JV_LOOP, JV_MACRO, JV_METHOD, JV_FUNC, JV_CYCLER, JV_JOINER
} td_jkind;

typedef struct td_jv {
    uint8_t kind;
    uint8_t flag; /* JV_STR: 1 marked safe; JV_UNDEF: 1 an attribute; JV_VIEW: 0 keys, 1 values, 2 items */
    uint32_t n;   /* JV_STR: bytes; JV_UNDEF: bytes of the name */
    union {
        bool b;
        int64_t i;
        double f;
        const char *s;
        struct td_jlist *list;   /* JV_LIST, JV_TUPLE, JV_VIEW */
        struct td_jdict *dict;   /* JV_DICT, JV_NS */
        struct td_jgen *gen;     /* JV_GEN, JV_CYCLER, JV_JOINER */
        struct td_jloop *loop;
        struct td_jmacro *macro;
        struct td_jbound *bound; /* JV_METHOD */
        const struct td_jfn *fn; /* JV_FUNC */
    } u;
} td_jv;

typedef struct td_jlist { td_jv *v; uint32_t n, cap; } td_jlist;
typedef struct td_jentry { td_jv k, v; } td_jentry;
typedef struct td_jdict { td_jentry *e; uint32_t n, cap, *index, slots; } td_jdict;
typedef struct td_jgen { td_jlist *list; uint32_t at; } td_jgen;

typedef struct td_jkw { const char *name; uint32_t n; td_jv v; } td_jkw;
typedef struct td_jargs { td_jv *pos; uint32_t n; td_jkw *kw; uint32_t n_kw; } td_jargs;

/* A filter, test, method or global. self is the value it is applied to (JV_MISSING for globals). */
typedef struct td_jrun td_jrun;
typedef td_jv td_jcall(td_jrun *r, td_jv self, td_jargs *a);
typedef struct td_jfn { const char *name; td_jcall *call; bool mutates; } td_jfn;
typedef struct td_jbound { td_jv self; const td_jfn *fn; } td_jbound;

/* ---- syntax tree ---- */

typedef enum {
    N_CONST, N_NAME, N_LIST, N_TUPLE, N_DICT, N_ATTR, N_ITEM, N_SLICE, N_CALL, N_FILTER, N_TEST,
    N_NOT, N_NEG, N_POS, N_BIN, N_CONCAT,
    N_AND, N_OR, N_COND, N_COMPARE, N_KEYWORD, N_STAR, N_DSTAR, N_NSREF, N_HOLE,
    N_TEXT, N_PRINT, N_IF, N_BRANCH, N_FOR, N_SET, N_SETBLOCK, N_MACRO, N_CALLBLOCK, N_FILTERBLOCK, N_WITH,
    N_BREAK, N_CONTINUE, N_BODY
} td_jnode_type;

/* Operators; the lexer's punctuation too. */
typedef enum {
    O_NONE, O_ADD, O_SUB, O_MUL, O_DIV, O_FLOORDIV, O_MOD, O_POW, O_TILDE, 
    O_EQ, O_NE, O_LT, O_LE, O_GT, O_GE, O_IN, O_NOTIN, O_LPAREN, O_RPAREN,
    O_LBRACKET, O_RBRACKET, O_LBRACE, O_RBRACE, O_DOT, O_COMMA, O_COLON, O_PIPE, O_ASSIGN, O_SEMICOLON
} td_jop;

typedef struct td_jnode {
    uint8_t type, op, flag;      /* flag: N_MACRO bits 1 varargs, 2 kwargs, 4 caller are used in the body */
    bool soft;                   /* directly below an if: Jinja2 does not look whether its filters exist */
    uint32_t line, sym, n;       /* sym: name; n: children in list */
    struct td_jnode *a, *b, *c;  /* by type, see jinja_parse.c */
    struct td_jnode *list, *body, *orelse, *next;
    struct td_jnode *made;       /* all nodes of a template, as they were made: about the order of its text */
    td_jv value;                 /* N_CONST, N_TEXT; names of attributes, filters, tests as text */
    const td_jfn *fn;            /* N_FILTER, N_TEST; NULL: unknown */
} td_jnode;

/* named: where it stands in the text, counted when all is parsed; called: of those, f in f(..) */
typedef struct td_jsym { const char *name; uint32_t n; const td_jfn *global; uint32_t named, called; } td_jsym;

struct td_jinja {
    td_arena arena;
    td_jnode *body, *nodes;      /* nodes: the first one made */
    td_jsym *sym;
    uint32_t n_sym, cap_sym;
    uint32_t s_loop, s_caller, s_varargs, s_kwargs;
    char doubt[160];             /* td_jinja_doubt; "": none */
};

/* ---- lexer ---- */

typedef enum {
    T_EOF, T_DATA, T_VAR_BEGIN, T_VAR_END, T_BLOCK_BEGIN, T_BLOCK_END, T_NAME, T_INT, T_REAL, T_STR, T_OP
} td_jtoken_type;
typedef struct td_jtoken {
    uint8_t type, op;
    uint32_t line, n;
    const char *s;
    int64_t i;
    double f;
} td_jtoken;
td_status td_jinja_lex(td_arena *a, const char *src, size_t n, td_jtoken **out, uint32_t *count);
td_status td_jinja_parse(td_jinja *t, const td_jtoken *tok, uint32_t n);
/* Does what the tree names exist: jinja_check.c. */
td_status td_jinja_check(td_jinja *t);
td_status td_jinja_syntax(td_status st, uint32_t line, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));

/* ---- run ---- */

typedef struct td_jbinding { uint32_t sym; td_jv v; } td_jbinding;
typedef struct td_jscope { struct td_jscope *parent; td_jbinding *b; uint32_t n, cap; } td_jscope;
typedef struct td_jmacro { const td_jnode *node; td_jscope *scope; } td_jmacro;

struct td_jrun {
    const td_jinja *t;
    td_arena *a;
    td_jinja_limits lim;
    td_status st;
    uint64_t steps;
    int depth;
    uint32_t line;
    td_buf *out;
    td_jv *ctx;   /* by symbol; JV_MISSING: not in the context */
    td_jv hole;   /* what N_HOLE stands for: captured text of a block with filters */
};

td_jv td_jrun_fail(td_jrun *r, td_status st, const char *fmt, ...)
    __attribute__((format(printf, 3, 4)));
void *td_jrun_alloc(td_jrun *r, size_t bytes);
void td_jrun_charge(td_jrun *r, uint64_t steps);
td_jv td_jrun_call(td_jrun *r, td_jv callee, td_jargs *args, const char *what);
td_jv td_jrun_attr(td_jrun *r, td_jv obj, const char *name, uint32_t n);
td_jv td_jrun_item(td_jrun *r, td_jv obj, td_jv key);
td_jv td_jloop_attr(td_jrun *r, struct td_jloop *l, const char *name, uint32_t n);
/* names: "a b c"; v[] gets positional and keyword arguments in that order, JV_MISSING where absent. False:
 * error set. v has room for 16. */
bool td_jargs_bind(td_jrun *r, td_jargs *args, const char *what, const char *names, unsigned required,
                   td_jv *v);

/* ---- values ---- */

static inline td_jv td_jv_undef(const char *name, uint32_t n, bool attr)
{
    return (td_jv){JV_UNDEF, attr, n, {.s = name}};
}
static inline td_jv td_jv_none(void) { return (td_jv){.kind = JV_NONE}; }
static inline td_jv td_jv_bool(bool b) { return (td_jv){.kind = JV_BOOL, .u.b = b}; }
static inline td_jv td_jv_int(int64_t i) { return (td_jv){.kind = JV_INT, .u.i = i}; }
static inline td_jv td_jv_real(double f) { return (td_jv){.kind = JV_REAL, .u.f = f}; }
static inline td_jv td_jv_text(const char *s, size_t n) { return (td_jv){JV_STR, 0, (uint32_t)n, {.s = s}}; }
static inline td_jv td_jv_list(td_jlist *l) { return (td_jv){.kind = JV_LIST, .u.list = l}; }

const char *td_jv_type(td_jv v); /* Python's name of the type */
bool td_jv_true(td_jv v);
bool td_jv_is(td_jv v, const char *text);
bool td_jv_eq(td_jrun *r, td_jv x, td_jv y);
int td_jv_cmp(td_jrun *r, td_jv x, td_jv y, const char *op); /* error set when the types have no order */
bool td_jv_number(td_jv v, double *f);           /* bool, int, real */
bool td_jv_integer(td_jv v, int64_t *i);         /* bool, int */
td_jv td_jv_copy_text(td_jrun *r, const char *s, size_t n);
td_jv td_jv_take(td_jrun *r, td_buf *b);         /* text of b, which is deinitialized */
void td_jv_str(td_jrun *r, td_jv v, td_buf *b);  /* Python's str() */
td_jv td_jv_to_str(td_jrun *r, td_jv v);         /* v itself if a string */
void td_jv_repr(td_jrun *r, td_jv v, td_buf *b, int depth);
typedef struct td_jjson {
    const char *item_sep, *key_sep;
    const char *indent; /* NULL: one line */
    bool ascii, sort;
} td_jjson;
void td_jv_json(td_jrun *r, td_jv v, const td_jjson *o, td_buf *b, int depth);
td_jv td_jv_from_json(td_jrun *r, const td_json *j);
void td_jbuf_init(td_jrun *r, td_buf *b);        /* limited to what the arena has left */

td_jlist *td_jlist_new(td_jrun *r, uint32_t cap);
bool td_jlist_push(td_jrun *r, td_jlist *l, td_jv v);
td_jdict *td_jdict_new(td_jrun *r);
bool td_jdict_set(td_jrun *r, td_jdict *d, td_jv k, td_jv v);
td_jv *td_jdict_find(td_jrun *r, td_jdict *d, td_jv k);
bool td_jdict_del(td_jrun *r, td_jdict *d, td_jv k);
bool td_jv_hashable(td_jrun *r, td_jv k);
td_jv td_jv_gen(td_jrun *r, td_jlist *l);

typedef struct td_jiter { td_jv src; uint32_t i; size_t at; } td_jiter;
bool td_jiter_open(td_jrun *r, td_jiter *it, td_jv v);  /* false: not iterable, error set */
bool td_jiter_next(td_jrun *r, td_jiter *it, td_jv *out);
td_jlist *td_jv_collect(td_jrun *r, td_jv v);           /* all items, a fresh list; NULL: error set */
int64_t td_jv_len(td_jrun *r, td_jv v);                 /* -1: no length, error set */
bool td_jv_contains(td_jrun *r, td_jv in, td_jv x);
td_jv td_jv_slice(td_jrun *r, td_jv v, td_jv start, td_jv stop, td_jv step);
td_jv td_jv_arith(td_jrun *r, td_jop op, td_jv x, td_jv y);
td_jv td_jv_compare(td_jrun *r, td_jop op, td_jv x, td_jv y);
/* Stable, by key; key == item is allowed. */
void td_jlist_sort(td_jrun *r, td_jv *item, td_jv *key, uint32_t n, bool reverse);

const td_jfn *td_jinja_filter(const char *name, uint32_t n);
const td_jfn *td_jinja_test(const char *name, uint32_t n);
const td_jfn *td_jinja_global(const char *name, uint32_t n);
const td_jfn *td_jinja_method(td_jkind kind, const char *name, uint32_t n);
td_jv td_jinja_percent(td_jrun *r, td_jv format, td_jv args); /* str % args */

#endif
