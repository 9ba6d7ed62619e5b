/* worker/ship/codec.h - a rectangle of one rank's pages to payload and back: the order on the wire is
 * [layer][k|v][head][token][D], whatever the page sizes, heads and tokens of the two ranks.
 *
 * A rectangle numbers slots, heads and tokens as the whole model and prompt do; td_codec_side says which of
 * them lie in these pages. The payload has the tokens of the rectangle's range that `pick` holds (the
 * destination's set; grid_plan.h), all of which the side must hold. `pages` is the page table from page
 * `page0` on: the side's i-th token lies in pages[i / P - page0].
 *
 * Rules:   1. A page of -1, or a slot, head or token that the side does not have, inside the rectangle is an
 *             error (false): nothing is touched.
 *          2. gather(scatter(x)) == x for every pair of page sizes.
 *          3. crc, where it is asked for, is the payload's CRC32C, taken in the pass that copies. scatter
 *             writes as it reads: whoever asks for it looks at the checksum before anyone reads the pages.
 * Threads: any; the pages must be held. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SHIP_CODEC_H
#define TD_WORKER_SHIP_CODEC_H

#include "kernels/tensor.h"
#include "worker/ship/plan.h"
#include "worker/ship/token_map.h"

typedef struct td_codec_side {
    const td_kv *kv;             /* kv->G heads from head0 on, slots from slot0 on */
    uint16_t slot0, n_slots, head0;
    td_token_set tokens;
} td_codec_side;

/* A rank that has everything of a group: n_slots of it. */
static inline td_codec_side td_codec_whole(const td_kv *kv, int n_slots)
{
    return (td_codec_side){.kv = kv, .n_slots = (uint16_t)n_slots, .tokens = {{TD_TOKENS_ALL, 1, 0}, 0}};
}

uint32_t td_codec_tokens(const td_rect *r, const td_token_set *pick); /* of the rectangle, in the payload */
size_t td_codec_bytes(const td_kv *kv, const td_rect *r, const td_token_set *pick);
bool td_codec_gather(const td_codec_side *s, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                     const td_rect *r, const td_token_set *pick, void *payload, uint32_t *crc);
bool td_codec_scatter(const td_codec_side *s, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                      const td_rect *r, const td_token_set *pick, const void *payload, uint32_t *crc);
/* Where the payload's tokens lie: page * P + place in it, of each. */
bool td_codec_rows(const td_codec_side *s, const int32_t *pages, uint32_t page0, uint32_t n_pages, const td_rect *r,
                   const td_token_set *pick, int32_t *row);

#endif
