// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "router/text/pretok.h"
#include "router/text/unicode.h"
#include <stdlib.h>
#include <string.h>

enum { NESTING = 8, CUTS_MAX = 1 << 24 };

/* \w+|[^\w\s]+ with \w as the Rust regex library has it (UTS #18 with joiners), which the library uses for
 * this one. */
#define RUST_WORD                                                                                            \
    "\\p{L}\\p{M}\\p{Nd}\\p{Nl}\\p{Pc}\\x{200c}\\x{200d}\\x{24b6}-\\x{24e9}"                                 \
    "\\x{1f130}-\\x{1f149}\\x{1f150}-\\x{1f169}\\x{1f170}-\\x{1f189}"
static const char WHITESPACE[] = "[" RUST_WORD "]+|[^" RUST_WORD "\\s]+";

typedef enum { P_SPACE_FIRST, P_BYTES, P_METASPACE, P_SPLIT } kind;
typedef enum { REMOVED, ISOLATED, WITH_PREVIOUS, WITH_NEXT, CONTIGUOUS } behavior;
typedef enum { FIRST, ALWAYS, NEVER } scheme;

typedef struct step {
    kind kind;
    behavior behavior;
    bool invert;
    td_pattern pattern; /* P_SPLIT: one of pattern, fast, classes */
    td_pretok_fast *fast;
    unsigned
        classes; /* characters with any of these bits (TD_UC_PUNCT: or ASCII punctuation) match one by one */
    scheme scheme; /* P_METASPACE */
    char mark[4];
    size_t mark_n;
} step;

struct td_pretok {
    unsigned n;
    bool slow;
    step step[TD_PRETOK_STEPS];
};

/* ---- opening ---- */

static td_status new_step(td_pretok *t, const char *file, kind k, step **out)
{
    if (t->n == TD_PRETOK_STEPS)
        return td_fail(TD_ENOSUP, "%s: more than %d pre_tokenizer steps", file, TD_PRETOK_STEPS);
    *out = &t->step[t->n++];
    (*out)->kind = k;
    return TD_OK;
}

static td_status take_behavior(const char *name, const char *file, behavior *out)
{
    static const char *const names[] = {"Removed", "Isolated", "MergedWithPrevious", "MergedWithNext",
                                        "Contiguous"};
    for (size_t k = 0; k < TD_COUNT(names); k++)
        if (!strcmp(name, names[k])) {
            *out = (behavior)k;
            return TD_OK;
        }
    return td_fail(TD_ENOSUP, "%s: pre_tokenizer behavior \"%.40s\" is not supported", file, name);
}

static td_status split_on(td_pretok *t, const char *file, const char *regex, behavior b, bool invert)
{
    step *s = NULL;
    TD_TRY(new_step(t, file, P_SPLIT, &s));
    s->behavior = b;
    s->invert = invert;
    if (!t->slow && !invert) s->fast = td_pretok_fast_for(regex, strlen(regex));
    return s->fast ? TD_OK : td_regex_open(regex, strlen(regex), &s->pattern.regex);
}

static td_status split_literal(td_pretok *t, const char *file, const char *text, size_t n, behavior b)
{
    step *s = NULL;
    if (!n) return td_fail(TD_EPROTO, "%s: pre_tokenizer with an empty delimiter", file);
    TD_TRY(new_step(t, file, P_SPLIT, &s));
    s->behavior = b;
    s->pattern = (td_pattern){.literal = td_xstrndup(text, n), .n = n};
    return TD_OK;
}

static td_status split_class(td_pretok *t, const char *file, unsigned classes, behavior b)
{
    step *s = NULL;
    TD_TRY(new_step(t, file, P_SPLIT, &s));
    s->classes = classes;
    s->behavior = b;
    return TD_OK;
}

static td_status open_bytelevel(td_pretok *t, const td_json *node, const char *file)
{
    step *s = NULL;
    if (td_json_bool(node, "add_prefix_space", true)) TD_TRY(new_step(t, file, P_SPACE_FIRST, &s));
    if (td_json_bool(node, "use_regex", true)) TD_TRY(split_on(t, file, TD_PRETOK_GPT2, ISOLATED, false));
    return new_step(t, file, P_BYTES, &s);
}

static td_status open_split(td_pretok *t, const td_json *node, const char *file)
{
    const td_json *pattern = td_json_get(node, "pattern"), *regex = td_json_get(pattern, "Regex");
    step *s = NULL;
    TD_TRY(new_step(t, file, P_SPLIT, &s));
    TD_TRY(take_behavior(td_json_str(node, "behavior", ""), file, &s->behavior));
    s->invert = td_json_bool(node, "invert", false);
    if (!t->slow && !s->invert && regex && regex->type == TD_JSON_STR)
        s->fast = td_pretok_fast_for(regex->s, regex->n);
    return s->fast ? TD_OK : td_pattern_open(pattern, file, &s->pattern);
}

static td_status open_metaspace(td_pretok *t, const td_json *node, const char *file)
{
    step *s = NULL;
    const char *mark = td_json_str(node, "replacement", "\xE2\x96\x81");
    const char *name = td_json_str(node, "prepend_scheme",
                                   td_json_bool(node, "add_prefix_space", true) ? "always" : "never");
    size_t n = strlen(mark);
    TD_TRY(new_step(t, file, P_METASPACE, &s));
    if (n < 1 || n > 4 || td_uc_count(mark, n) != 1)
        return td_fail(TD_EPROTO, "%s: Metaspace replacement is not one character", file);
    if (!strcmp(name, "always")) s->scheme = ALWAYS;
    else if (!strcmp(name, "never")) s->scheme = NEVER;
    else if (!strcmp(name, "first")) s->scheme = FIRST;
    else return td_fail(TD_ENOSUP, "%s: Metaspace prepend_scheme \"%.40s\" is not supported", file, name);
    memcpy(s->mark, mark, n);
    s->mark_n = n;
    return td_json_bool(node, "split", true) ? split_literal(t, file, mark, n, WITH_NEXT) : TD_OK;
}

static td_status add_node(td_pretok *t, const td_json *node, const char *file, int depth)
{
    const char *type = td_json_str(node, "type", "");
    behavior b = ISOLATED;
    if (depth > NESTING) return td_fail(TD_ENOSUP, "%s: pre_tokenizer nested too deeply", file);
    if (!strcmp(type, "Sequence")) {
        const td_json *list = td_json_get(node, "pretokenizers");
        if (!list || list->type != TD_JSON_ARR)
            return td_fail(TD_EPROTO, "%s: pre_tokenizer Sequence has no pretokenizers", file);
        for (const td_json *c = list->child; c; c = c->next) TD_TRY(add_node(t, c, file, depth + 1));
        return TD_OK;
    }
    if (!strcmp(type, "ByteLevel")) return open_bytelevel(t, node, file);
    if (!strcmp(type, "Split")) return open_split(t, node, file);
    if (!strcmp(type, "Metaspace")) return open_metaspace(t, node, file);
    if (!strcmp(type, "Digits"))
        return split_class(t, file, TD_UC_NUMBER,
                           td_json_bool(node, "individual_digits", false) ? ISOLATED : CONTIGUOUS);
    if (!strcmp(type, "Punctuation")) {
        TD_TRY(take_behavior(td_json_str(node, "behavior", "Isolated"), file, &b));
        return split_class(t, file, TD_UC_PUNCT, b);
    }
    if (!strcmp(type, "Whitespace")) return split_on(t, file, WHITESPACE, REMOVED, true);
    if (!strcmp(type, "WhitespaceSplit")) return split_class(t, file, TD_UC_SPACE, REMOVED);
    if (!strcmp(type, "CharDelimiterSplit")) {
        const char *d = td_json_str(node, "delimiter", "");
        return split_literal(t, file, d, strlen(d), REMOVED);
    }
    return td_fail(TD_ENOSUP, "%s: pre_tokenizer type \"%.40s\" is not supported", file, type);
}

td_status td_pretok_open(const td_json *node, const char *file, bool slow, td_pretok **out)
{
    td_pretok *t = td_xalloc(sizeof *t);
    t->slow = slow;
    td_status st = td_json_is_null(node) ? TD_OK : add_node(t, node, file, 0);
    if (st < 0) td_pretok_close(t);
    else *out = t;
    return st;
}

void td_pretok_close(td_pretok *t)
{
    if (!t) return;
    for (unsigned i = 0; i < t->n; i++) td_pattern_close(&t->step[i].pattern);
    free(t);
}

void td_pretok_run_deinit(td_pretok_run *run)
{
    for (int i = 0; i < TD_PRETOK_STEPS; i++) {
        td_buf_deinit(&run->level[i].text);
        free(run->level[i].cut);
    }
}

/* ---- running ---- */

static bool in_class(uint32_t cp, unsigned classes)
{
    if (classes & TD_UC_PUNCT && cp < 0x80)
        return cp > 32 && cp < 127 && !(td_uc_class(cp) & (TD_UC_LETTER | TD_UC_NUMBER));
    return td_uc_class(cp) & classes;
}

static td_status find_class(const step *s, const char *p, size_t n, size_t from, size_t *start, size_t *end)
{
    uint32_t cp;
    for (size_t i = from, k; i < n; i += k) {
        k = td_uc_next(p + i, n - i, &cp);
        if (!in_class(cp, s->classes)) continue;
        *start = i;
        *end = i + k;
        return TD_OK;
    }
    return TD_AGAIN;
}

static td_status find(const step *s, td_match *m, const char *p, size_t n, size_t from, size_t *start,
                      size_t *end)
{
    if (s->fast) {
        if (from >= n) return TD_AGAIN;
        *start = from;
        *end = s->fast(p, n, from);
        return TD_OK;
    }
    if (s->classes) return find_class(s, p, n, from, start, end);
    return td_pattern_find(&s->pattern, m, p, n, from, start, end);
}

static td_status push(td_pretok_run *run, unsigned lv, size_t *count, size_t start, size_t end, bool match)
{
    if (*count == run->level[lv].cap) {
        if (*count >= CUTS_MAX) return td_refuse(TD_EFULL, "pre-tokenizer: more than %d words", CUTS_MAX);
        run->level[lv].cap = TD_MAX(run->level[lv].cap * 2, (size_t)64);
        run->level[lv].cut = td_xrealloc(run->level[lv].cut, run->level[lv].cap * sizeof(td_cut));
    }
    run->level[lv].cut[(*count)++] = (td_cut){start, end, match};
    return TD_OK;
}

/* Matches and what lies between them, in order. `invert` swaps which of the two counts as the match. */
static td_status collect(const step *s, td_pretok_run *run, unsigned lv, const char *p, size_t n,
                         size_t *count)
{
    size_t from = 0, done = 0, a, b;
    *count = 0;
    while (from <= n) {
        td_status st = find(s, run->match, p, n, from, &a, &b);
        if (st < 0) return st;
        if (st == TD_AGAIN) break;
        if (a > done) TD_TRY(push(run, lv, count, done, a, s->invert));
        if (b > a) TD_TRY(push(run, lv, count, a, b, !s->invert));
        done = b;
        from = b;
        if (b == a) {
            uint32_t cp;
            if (b >= n) break;
            from += td_uc_next(p + b, n - b, &cp);
        }
    }
    return n > done ? push(run, lv, count, done, n, s->invert) : TD_OK;
}

/* Join cuts as the behavior says, in place; returns the new count. */
static size_t merge(td_cut *c, size_t n, behavior b)
{
    size_t k = 0;
    bool before = false;
    if (b == CONTIGUOUS || b == WITH_PREVIOUS) {
        for (size_t i = 0; i < n; i++) {
            td_cut x = c[i];
            bool join = b == CONTIGUOUS ? x.match == before : x.match && !before;
            if (join && k) c[k - 1].end = x.end;
            else c[k++] = x;
            before = x.match;
        }
        return k;
    }
    if (b != WITH_NEXT) return n;
    k = n; /* from the back; kept cuts gather at the end of the array */
    for (size_t i = n; i-- > 0;) {
        td_cut x = c[i];
        if (x.match && !before && k < n) c[k].start = x.start;
        else c[--k] = x;
        before = x.match;
    }
    memmove(c, c + k, (n - k) * sizeof c[0]);
    return n - k;
}

static td_status walk(const td_pretok *t, td_pretok_run *run, unsigned lv, const char *p, size_t n,
                      bool at_start);

static td_status split(const td_pretok *t, td_pretok_run *run, unsigned lv, const char *p, size_t n,
                       bool at_start)
{
    const step *s = &t->step[lv];
    size_t count;
    if (s->fast && s->behavior == ISOLATED) { /* cuts need no list */
        for (size_t i = 0, e; i < n; i = e) {
            e = s->fast(p, n, i);
            TD_TRY(walk(t, run, lv + 1, p + i, e - i, at_start && !i));
        }
        return TD_OK;
    }
    TD_TRY(collect(s, run, lv, p, n, &count));
    count = merge(run->level[lv].cut, count, s->behavior);
    for (size_t i = 0; i < count; i++) {
        td_cut c = run->level[lv].cut[i];
        if (s->behavior == REMOVED && c.match) continue;
        TD_TRY(walk(t, run, lv + 1, p + c.start, c.end - c.start, at_start && !c.start));
    }
    return TD_OK;
}

static td_status rewrite(const td_pretok *t, td_pretok_run *run, unsigned lv, const char *p, size_t n,
                         bool at_start)
{
    const step *s = &t->step[lv];
    td_buf *b = &run->level[lv].text;
    b->max = run->text_max;
    td_buf_reset(b);
    if (s->kind == P_SPACE_FIRST) {
        if (p[0] == ' ') return walk(t, run, lv + 1, p, n, at_start);
        td_buf_chr(b, ' ');
        td_buf_add(b, p, n);
    } else if (s->kind == P_BYTES) {
        td_bytelevel_add(b, p, n);
    } else {
        bool marked = p[0] == ' ' || (n >= s->mark_n && !memcmp(p, s->mark, s->mark_n));
        if (!marked && (s->scheme == ALWAYS || (s->scheme == FIRST && at_start)))
            td_buf_add(b, s->mark, s->mark_n);
        for (size_t i = 0; i < n;) {
            const char *sp = memchr(p + i, ' ', n - i);
            size_t e = sp ? (size_t)(sp - p) : n;
            td_buf_add(b, p + i, e - i);
            if (sp) td_buf_add(b, s->mark, s->mark_n);
            i = e + (sp != NULL);
        }
    }
    if (!td_buf_ok(b)) return td_refuse(TD_EFULL, "pre-tokenizer: text over its limit");
    return walk(t, run, lv + 1, b->p, b->len, at_start);
}

static td_status walk(const td_pretok *t, td_pretok_run *run, unsigned lv, const char *p, size_t n,
                      bool at_start)
{
    if (!n) return TD_OK;
    if (lv == t->n) return run->word(run->arg, p, n);
    return t->step[lv].kind == P_SPLIT ? split(t, run, lv, p, n, at_start)
                                       : rewrite(t, run, lv, p, n, at_start);
}

td_status td_pretok_split(const td_pretok *t, td_pretok_run *run, const char *p, size_t n, bool at_start)
{
    return walk(t, run, 0, p, n, at_start);
}
