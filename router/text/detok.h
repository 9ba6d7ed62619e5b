/* router/text/detok.h - token ids to text, one at a time, never half a character.
 *
 * Rules:     1. Output is valid UTF-8 whatever the ids: up to three bytes wait for the rest of their
 *               character; a broken sequence becomes one U+FFFD for each maximal part, as Python's
 *               errors="replace" (a run of broken <0xNN> tokens too, where the tokenizers library writes one
 *               for each byte of the run).
 *            2. Pushing all ids and flushing is the whole decode: leading spaces that the decoder strips from
 *               a text are stripped from its start. td_detok_continue() says that the ids go on behind other
 *               text, so nothing is stripped.
 *            3. Ids without a token add nothing.
 * Ownership: the state is plain data: copy it to fork a stream. The tokenizer must outlive it.
 * Threads:   one owner. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_TEXT_DETOK_H
#define TD_ROUTER_TEXT_DETOK_H

#include "common/buf.h"
#include "router/text/tokenizer.h"

typedef struct td_detok {
    const td_tokenizer *t;
    uint32_t lead; /* leading characters that may still be stripped */
    char held[4];
    uint8_t n_held;
    bool skip_special, first;
} td_detok;

void td_detok_init(td_detok *d, const td_tokenizer *t, bool skip_special);
void td_detok_continue(td_detok *d);
void td_detok_push(td_detok *d, uint32_t id,
                   td_buf *out);               /* appends; td_buf_ok(out) tells whether it fitted */
void td_detok_flush(td_detok *d, td_buf *out); /* end of text: what is held becomes U+FFFD */

#endif
