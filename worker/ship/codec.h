/* worker/ship/codec.h - pages to payload and back. Payload order: [layer][k|v][G][token][D], independent of
 * page size.
 *
 * `pages` is the page table from page `page0` on: token t lies in pages[t / P - page0].
 * Rules:   1. A page of -1 inside the rectangle is an error (false), nothing outside the given pages is
 *             touched.
 *          2. gather(scatter(x)) == x for every pair of page sizes.
 * Threads: any; the pages must be held. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SHIP_CODEC_H
#define TD_WORKER_SHIP_CODEC_H

#include "kernels/tensor.h"
#include "worker/ship/plan.h"

size_t td_codec_bytes(const td_kv *kv, const td_rect *r);
bool td_codec_gather(const td_kv *kv, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                     const td_rect *r, void *payload);
bool td_codec_scatter(const td_kv *kv, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                      const td_rect *r, const void *payload);

#endif
