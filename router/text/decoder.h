/* router/text/decoder.h - the "decoder" of tokenizer.json, as a map from one token to its bytes.
 *
 * Taken: Sequence, ByteLevel, ByteFallback, Fuse, Replace, Strip, Metaspace, or none (tokens joined by
 * spaces). Every one of them works token by token except Strip behind a Fuse, which takes leading characters
 * off the whole text: the detokenizer does that (lead, lead_max).
 * Threads: const after opening. Limits: 16 steps. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_TEXT_DECODER_H
#define TD_ROUTER_TEXT_DECODER_H

#include "common/json.h"
#include "router/text/normalizer.h"

typedef struct td_decoder td_decoder;

typedef struct td_decoder_facts {
    char lead[4];       /* the character taken off the start of the text */
    uint8_t lead_n;     /* its bytes */
    uint32_t lead_max;  /* at most this many of them */
    bool join_spaces;   /* a space between tokens */
    bool first_differs; /* the first token of a text decodes differently (Metaspace) */
    bool byte_fallback; /* <0xNN> is the byte NN */
} td_decoder_facts;

/* node NULL or null: tokens joined by spaces. */
td_status td_decoder_open(const td_json *node, const char *file, td_decoder **out);
td_status td_decoder_bytelevel(td_decoder **out);
void td_decoder_close(td_decoder *d);
const td_decoder_facts *td_decoder_about(const td_decoder *d);
/* Append the bytes of one token. */
td_status td_decoder_token(const td_decoder *d, td_match *m, const char *p, size_t n, bool first,
                           td_buf *out);

#endif
