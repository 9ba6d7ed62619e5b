// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "router/text/added.h"
#include "router/text/unicode.h"
#include <stdlib.h>
#include <string.h>

enum { TOKENS_MAX = 1 << 20, TOKEN_BYTES_MAX = 4096, NODES_MAX = 1 << 26 };

/* Children of a node are a linked list; node 0 is the root. token is an index + 1. */
typedef struct td_trie_node {
    uint32_t child, sibling, token;
    unsigned char byte;
} node;

static td_status trie_add(td_trie *t, const char *p, size_t n, uint32_t token)
{
    uint32_t at = 0;
    if (!n) return TD_OK;
    if (n > TOKEN_BYTES_MAX || t->n > NODES_MAX - n)
        return td_fail(TD_ENOSUP, "added_tokens: more text than supported");
    if (t->n + n + 1 > t->cap) {
        t->cap = TD_MAX(t->cap * 2, t->n + (uint32_t)n + 64);
        t->node = td_xrealloc(t->node, t->cap * sizeof(node));
    }
    if (!t->n) t->node[t->n++] = (node){0};
    t->first[(unsigned char)p[0]] = true;
    for (size_t i = 0; i < n; i++) {
        uint32_t c = t->node[at].child;
        while (c && t->node[c].byte != (unsigned char)p[i]) c = t->node[c].sibling;
        if (!c) {
            c = t->n++;
            t->node[c] = (node){.sibling = t->node[at].child, .byte = (unsigned char)p[i]};
            t->node[at].child = c;
        }
        at = c;
    }
    if (!t->node[at].token) t->node[at].token = token + 1;
    return TD_OK;
}

/* Longest token that starts at p[0]; 0: none. */
static size_t trie_longest(const td_trie *t, const char *p, size_t n, uint32_t *token)
{
    size_t best = 0;
    uint32_t at = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t c = t->node[at].child;
        while (c && t->node[c].byte != (unsigned char)p[i]) c = t->node[c].sibling;
        if (!c) break;
        at = c;
        if (t->node[at].token) best = i + 1, *token = t->node[at].token - 1;
    }
    return best;
}

const td_added_token *td_added_find(const td_added *a, const char *text, size_t n)
{
    for (size_t i = 0; i < a->n; i++)
        if (a->token[i].n == n && !memcmp(a->token[i].text, text, n)) return &a->token[i];
    return NULL;
}

td_status td_added_add(td_added *a, uint32_t id, const char *text, size_t n, const td_json *flags,
                       const char *file)
{
    uint32_t seen;
    if (!n) return TD_OK;
    if (n > TOKEN_BYTES_MAX || a->n >= TOKENS_MAX)
        return td_fail(TD_ENOSUP, "%s: added_tokens over %d entries or %d bytes", file, TOKENS_MAX,
                       TOKEN_BYTES_MAX);
    if (a->raw.n && trie_longest(&a->raw, text, n, &seen) == n) return TD_OK;
    if (a->cooked.n && trie_longest(&a->cooked, text, n, &seen) == n) return TD_OK;
    if (a->n == a->cap) {
        a->cap = TD_MAX(a->cap * 2, (size_t)32);
        a->token = td_xrealloc(a->token, a->cap * sizeof a->token[0]);
    }
    bool special = td_json_bool(flags, "special", !flags);
    a->token[a->n] = (td_added_token){
        .id = id,
        .text = td_xstrndup(text, n),
        .n = n,
        .special = special,
        .normalized = td_json_bool(flags, "normalized", !special),
        .lstrip = td_json_bool(flags, "lstrip", false),
        .rstrip = td_json_bool(flags, "rstrip", false),
        .single_word = td_json_bool(flags, "single_word", false),
    };
    /* Until td_added_build() the tries hold the contents as given and serve as the set of known ones. */
    size_t k = a->n++;
    return trie_add(a->token[k].normalized ? &a->cooked : &a->raw, text, n, (uint32_t)k);
}

td_status td_added_build(td_added *a, const td_normalizer *z)
{
    if (td_normalizer_identity(z) || !a->cooked.n) return TD_OK;
    free(a->cooked.node);
    a->cooked = (td_trie){0};
    td_match *m = td_match_open();
    td_buf out, tmp;
    td_buf_init(&out, 1 << 20);
    td_buf_init(&tmp, 1 << 20);
    td_status st = TD_OK;
    for (size_t i = 0; i < a->n && st >= 0; i++) {
        if (!a->token[i].normalized) continue;
        st = td_normalizer_run(z, m, a->token[i].text, a->token[i].n, &out, &tmp);
        if (st >= 0) st = trie_add(&a->cooked, out.p, out.len, (uint32_t)i);
    }
    td_buf_deinit(&out);
    td_buf_deinit(&tmp);
    td_match_close(m);
    return st;
}

void td_added_deinit(td_added *a)
{
    for (size_t i = 0; i < a->n; i++) free(a->token[i].text);
    free(a->token);
    free(a->raw.node);
    free(a->cooked.node);
    *a = (td_added){0};
}

static bool word_before(const char *p, size_t i)
{
    uint32_t cp;
    size_t k = i;
    if (!i) return false;
    do k--;
    while (k && ((unsigned char)p[k] & 0xC0) == 0x80);
    td_uc_next(p + k, i - k, &cp);
    return td_uc_class(cp) & TD_UC_WORD;
}

static bool word_after(const char *p, size_t n, size_t i)
{
    uint32_t cp;
    if (i >= n) return false;
    td_uc_next(p + i, n - i, &cp);
    return td_uc_class(cp) & TD_UC_WORD;
}

static size_t spaces_before(const char *p, size_t i, size_t floor)
{
    while (i > floor) {
        uint32_t cp;
        size_t k = i;
        do k--;
        while (k > floor && ((unsigned char)p[k] & 0xC0) == 0x80);
        td_uc_next(p + k, i - k, &cp);
        if (!(td_uc_class(cp) & TD_UC_SPACE)) break;
        i = k;
    }
    return i;
}

static size_t spaces_after(const char *p, size_t n, size_t i)
{
    while (i < n) {
        uint32_t cp;
        size_t k = td_uc_next(p + i, n - i, &cp);
        if (!(td_uc_class(cp) & TD_UC_SPACE)) break;
        i += k;
    }
    return i;
}

bool td_added_next(const td_added *a, bool cooked, bool parse_special, const char *p, size_t n, size_t *from,
                   size_t done, size_t *start, size_t *end, uint32_t *id)
{
    const td_trie *t = cooked ? &a->cooked : &a->raw;
    if (!t->n) return false;
    for (size_t i = *from; i < n;) {
        uint32_t k = 0;
        size_t len = t->first[(unsigned char)p[i]] ? trie_longest(t, p + i, n - i, &k) : 0;
        if (!len) {
            i++;
            continue;
        }
        const td_added_token *x = &a->token[k];
        size_t e = i + len;
        /* A refused match still consumes its text, as the search goes on behind it. */
        if ((x->special && !parse_special) ||
            (x->single_word && (word_before(p, i) || word_after(p, n, e)))) {
            i = e;
            continue;
        }
        *from = e;
        *start = x->lstrip ? TD_MAX(spaces_before(p, i, 0), done) : i;
        *end = x->rstrip ? spaces_after(p, n, e) : e;
        if (*start >= *end) { /* all of it was swallowed by the token before */
            i = e;
            continue;
        }
        *id = x->id;
        return true;
    }
    return false;
}
