/* common/vocab.h - token id -> bytes and flags. The tokenizer fills it; the worker's grammar masks read it
 * too.
 * Ownership: owns its bytes. Threads: read-only after filling. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_VOCAB_H
#define TD_COMMON_VOCAB_H

#include <stdint.h>
#include <stddef.h>

enum { TD_TOK_SPECIAL = 1, TD_TOK_BYTE = 2, TD_TOK_ADDED = 4, TD_TOK_UNUSED = 8 };

typedef struct td_vocab {
    uint32_t n;          /* ids are 0 .. n-1 */
    uint32_t *off;       /* [n+1] into bytes */
    uint8_t *flags;      /* [n] TD_TOK_* */
    char *bytes;
} td_vocab;

void td_vocab_deinit(td_vocab *v);
static inline const char *td_vocab_bytes(const td_vocab *v, uint32_t id, size_t *len)
{
    *len = v->off[id + 1] - v->off[id];
    return v->bytes + v->off[id];
}

#endif
