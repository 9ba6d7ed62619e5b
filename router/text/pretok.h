/* router/text/pretok.h - the "pre_tokenizer" of tokenizer.json: text into words, in order, one call back a
 * word.
 *
 * Taken: Sequence, ByteLevel, Split, Metaspace, Digits, Punctuation, Whitespace, WhitespaceSplit,
 * CharDelimiterSplit; others are refused by name. All are flattened into a list of two kinds of step: rewrite
 * the word, or split it. A word runs through the steps depth first, so memory is one buffer a step. Three
 * well-known patterns (GPT-2, cl100k/Llama 3, Qwen 2) have matchers by hand in pretok_fast.c; the rest goes
 * to PCRE2; a test holds both to the same cuts.
 * Threads: const after opening; a td_pretok_run belongs to one thread. Limits: 16 steps. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_TEXT_PRETOK_H
#define TD_ROUTER_TEXT_PRETOK_H

#include "common/json.h"
#include "router/text/normalizer.h"

enum { TD_PRETOK_STEPS = 16 };

typedef struct td_pretok td_pretok;
typedef td_status td_pretok_word(void *arg, const char *p, size_t n);

typedef struct td_cut {
    size_t start, end;
    bool match;
} td_cut;
typedef struct td_pretok_run {
    td_match *match; /* of the caller */
    size_t text_max; /* bytes of a rewritten word */
    td_pretok_word *word;
    void *arg;
    struct {
        td_buf text;
        td_cut *cut;
        size_t cap;
    } level[TD_PRETOK_STEPS];
} td_pretok_run;

/* slow: match by PCRE2 only (tests). */
td_status td_pretok_open(const td_json *node, const char *file, bool slow, td_pretok **out);
void td_pretok_close(td_pretok *t);
/* at_start: p is where the original text starts (Metaspace's "first"). */
td_status td_pretok_split(const td_pretok *t, td_pretok_run *run, const char *p, size_t n, bool at_start);
void td_pretok_run_deinit(td_pretok_run *run);

/* pretok_fast.c: the pattern with a matcher by hand, or NULL. Returns the end of the match at p[from]. */
typedef size_t td_pretok_fast(const char *p, size_t n, size_t from);
td_pretok_fast *td_pretok_fast_for(const char *pattern, size_t n);
extern const char TD_PRETOK_GPT2[];

#endif
