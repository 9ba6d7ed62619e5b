/* router/text/tokenizer.h - text to token ids and ids to bytes, as a model folder's files say.
 *
 *   text -> added tokens (raw) -> normalizer -> added tokens (normalized) -> pre-tokenizer -> BPE
 *        -> post-processor -> ids
 *
 * Reads tokenizer.json, or vocab.json + merges.txt (GPT-2 style, byte level); tokenizer_config.json and
 * special_tokens_map.json for bos, eos, add_bos_token; generation_config.json and config.json for the ids
 * that end a text.
 * Rules:     1. What is not understood is refused at opening with TD_ENOSUP and the file and key in
 *               td_reason(), never approximated.
 *            2. Ids equal those of the tokenizers library; tests/text compares them.
 *            3. "truncation" and "padding" of tokenizer.json are not applied: they belong to batches of
 *               training text.
 *            4. add_bos_token and add_eos_token of tokenizer_config.json override the post-processor for the
 *               Llama, Code Llama and Gemma classes (which build theirs from them) and where there is no
 *               post-processor.
 * Ownership: encode's ids live in the caller's arena.
 * Threads:   const after opening: any number may encode and read at once.
 * Errors:    text that is not UTF-8: TD_EBADREQ; more than max_tokens or 64 MiB of text: TD_EFULL.
 * Limits:    file 256 MiB; vocabulary 4 million ids; time n log n in the text. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_TEXT_TOKENIZER_H
#define TD_ROUTER_TEXT_TOKENIZER_H

#include "common/arena.h"
#include "common/status.h"
#include "common/vocab.h"
#include <stdbool.h>

enum { TD_TOKENIZER_TEXT_MAX = 64 << 20 };

typedef struct td_tokenizer td_tokenizer;

td_status td_tokenizer_open(const char *model_dir, td_tokenizer **out);
void td_tokenizer_close(td_tokenizer *t);

/* add_special: what the post-processor adds (BOS, EOS). parse_special: special tokens written in the text
 * become their ids (templates do; user text does not). max_tokens 0: no limit but the text's. n_ids counts
 * the added ones too. */
td_status td_tokenizer_encode(const td_tokenizer *t, const char *text, size_t n, bool add_special,
                              bool parse_special, size_t max_tokens, td_arena *a, uint32_t **ids,
                              size_t *n_ids);

/* Id -> bytes after the decoder's rules, and flags. Special tokens have their text. */
const td_vocab *td_tokenizer_vocab(const td_tokenizer *t);
/* A token by its text as in the files (-1: none), and the other way (NULL: no such id). */
int64_t td_tokenizer_id(const td_tokenizer *t, const char *text);
const char *td_tokenizer_raw(const td_tokenizer *t, uint32_t id, size_t *n);

int64_t td_tokenizer_bos(const td_tokenizer *t); /* -1: none */
int64_t td_tokenizer_eos(const td_tokenizer *t);
const char *td_tokenizer_bos_text(const td_tokenizer *t); /* "" if none */
const char *td_tokenizer_eos_text(const td_tokenizer *t);
/* Ids that end a text: eos and eos_token_id of generation_config.json and config.json, without repeats. */
const uint32_t *td_tokenizer_stops(const td_tokenizer *t, size_t *n);

#endif
