/* router/text/bpe.h - the "model" of tokenizer.json, type BPE: words into token ids by ranked merges.
 *
 * A word starts as one symbol a character (a byte token <0xNN> each byte where the character is unknown and
 * byte_fallback is set, else unk); then the adjacent pair of lowest rank, leftmost on ties, is merged until
 * no pair is in the table.
 * Rules:     1. Time is n log n in the length of a word: a heap of candidate merges over a doubly linked
 *               list; entries made stale by an earlier merge are recognized when popped. Short words scan a
 *               small array instead; same result.
 *            2. Repeated short words are answered from a cache in the run. Where no merge crosses the start
 *               of a SentencePiece word, a long text that is one word to the pre-tokenizer is cut there
 *               first.
 * Threads:   const after opening; a td_bpe_run belongs to one thread.
 * Limits:    ids below 4 million, 8 million merges, run->max tokens a call (TD_EFULL).
 * Source:    Sennrich, Haddow, Birch, Neural Machine Translation of Rare Words with Subword Units (ACL 2016),
 *            3.2. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_TEXT_BPE_H
#define TD_ROUTER_TEXT_BPE_H

#include "common/json.h"
#include <stdbool.h>

enum { TD_BPE_MAX_ID = 4 << 20, TD_BPE_MAX_MERGES = 8 << 20 };

typedef struct td_bpe td_bpe;

typedef struct td_bpe_run {
    uint32_t *ids;
    size_t n, cap, max;
    struct td_bpe_sym *sym;
    size_t sym_cap;
    struct td_bpe_cand *heap;
    size_t heap_n, heap_cap;
    struct td_bpe_memo *memo; /* NULL: no cache */
} td_bpe_run;

td_status td_bpe_open(const td_json *model, const char *file, td_bpe **out);
/* GPT-2 style pair of files: vocab is the JSON object, merges the text of merges.txt. */
td_status td_bpe_open_files(const td_json *vocab, const char *merges, size_t n, td_bpe **out);
void td_bpe_close(td_bpe *b);

uint32_t td_bpe_size(const td_bpe *b);                             /* largest id + 1 */
int64_t td_bpe_find(const td_bpe *b, const char *s, size_t n);     /* id or -1 */
const char *td_bpe_token(const td_bpe *b, uint32_t id, size_t *n); /* NULL: no such id */

void td_bpe_memo_open(td_bpe_run *run);
td_status td_bpe_push(td_bpe_run *run, uint32_t id);
td_status td_bpe_word(const td_bpe *b, td_bpe_run *run, const char *p, size_t n);
void td_bpe_run_deinit(td_bpe_run *run);

#endif
