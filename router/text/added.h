/* router/text/added.h - "added_tokens": pieces of text that are one token wherever they stand, found before
 * the model runs.
 *
 * Two sets: tokens with normalized=false are looked for in the text as given, the others in the normalized
 * text (their content is normalized too). Search is leftmost, longest at that place; lstrip and rstrip
 * swallow white space beside a match, single_word refuses one inside a word. Matching costs at most the
 * longest token per byte of text.
 * Threads: const after opening. Limits: 1 million tokens, 4096 bytes each. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_TEXT_ADDED_H
#define TD_ROUTER_TEXT_ADDED_H

#include "common/json.h"
#include "router/text/normalizer.h"

typedef struct td_added_token {
    uint32_t id;
    char *text;
    size_t n;
    bool special, normalized, lstrip, rstrip, single_word;
} td_added_token;

typedef struct td_trie {
    struct td_trie_node *node;
    uint32_t n, cap;
    bool first[256];
} td_trie;

typedef struct td_added {
    td_added_token *token;
    size_t n, cap;
    td_trie raw, cooked; /* by td_added_token.normalized */
} td_added;

/* flags: the JSON object with special, normalized, lstrip, rstrip, single_word (NULL: a plain special token).
 * Known content: ignored. */
td_status td_added_add(td_added *a, uint32_t id, const char *text, size_t n, const td_json *flags,
                       const char *file);
td_status td_added_build(td_added *a, const td_normalizer *z);
void td_added_deinit(td_added *a);
const td_added_token *td_added_find(const td_added *a, const char *text, size_t n); /* by content; linear */

/* Cut text into tokens and what is between them: each call finds the next token at or after *from. False:
 * none is left. On true, [*start, *end) is the token with the spaces it swallows; *from is set for the next
 * call. done = end of the previous token. */
bool td_added_next(const td_added *a, bool cooked, bool parse_special, const char *p, size_t n, size_t *from,
                   size_t done, size_t *start, size_t *end, uint32_t *id);

#endif
