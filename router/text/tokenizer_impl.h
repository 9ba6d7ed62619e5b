/* router/text/tokenizer_impl.h - the parts of a tokenizer, for tokenizer.c, tokenizer_load.c, detok.c and
 * tests only. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_TEXT_TOKENIZER_IMPL_H
#define TD_ROUTER_TEXT_TOKENIZER_IMPL_H

#include "router/text/added.h"
#include "router/text/bpe.h"
#include "router/text/decoder.h"
#include "router/text/normalizer.h"
#include "router/text/pretok.h"
#include "router/text/tokenizer.h"

enum { TD_TOKENIZER_WRAP = 16, TD_TOKENIZER_STOPS = 64 };

struct td_tokenizer {
    td_bpe *bpe;
    td_normalizer *normalizer;
    td_pretok *pretok;
    td_decoder *decoder;
    td_decoder_facts facts;
    td_added added;
    uint32_t *added_at; /* [vocab.n] index in added.token + 1; 0: none */
    td_vocab vocab;
    uint32_t before[TD_TOKENIZER_WRAP], after[TD_TOKENIZER_WRAP]; /* post-processor: ids around the text */
    uint32_t n_before, n_after;
    bool has_post;
    char *bos_text, *eos_text;
    int64_t bos, eos;
    uint32_t stop[TD_TOKENIZER_STOPS];
    size_t n_stop;
};

/* As td_tokenizer_open; slow: pre-tokenizer patterns by PCRE2 only. */
td_status td_tokenizer_open_slow(const char *model_dir, bool slow, td_tokenizer **out);

#endif
