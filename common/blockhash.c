// SPDX-License-Identifier: Apache-2.0
/* common/blockhash.c - the bytes hashed are little-endian, so that every machine of a cluster agrees. */
#include "common/blockhash.h"
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "hashed and shipped bytes are little-endian");

td_h128 td_blockhash_root(td_hkey key, const void *domain, size_t n)
{
    return td_siphash128(key, domain, n);
}

td_h128 td_blockhash_next(td_hkey key, td_h128 parent, const uint32_t tokens[TD_BLOCK_TOKENS])
{
    struct {
        td_h128 parent;
        uint32_t tokens[TD_BLOCK_TOKENS];
    } block = {.parent = parent};
    _Static_assert(sizeof block == 80, "no padding is hashed");
    memcpy(block.tokens, tokens, sizeof block.tokens);
    return td_siphash128(key, &block, sizeof block);
}

size_t td_blockhash_chain(td_hkey key, td_h128 root, const uint32_t *tokens, size_t n, td_h128 *out)
{
    size_t blocks = n / TD_BLOCK_TOKENS;
    for (size_t j = 0; j < blocks; j++)
        root = out[j] = td_blockhash_next(key, root, tokens + j * TD_BLOCK_TOKENS);
    return blocks;
}
