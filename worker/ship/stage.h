/* worker/ship/stage.h - the codec over pages in a device's memory: the pages of a rectangle come to page-locked memory of the
 * host, where codec.h reads or fills them, and go back.
 *
 * Rules:     1. gather reads what was queued on the compute stream before the call; its copies run beside later kernels.
 *            2. When scatter returns the pages are written: kernels queued afterwards see them.
 *            3. Without a device (dev NULL at open) it is the codec itself.
 * Threads:   one owner. Errors: EPROTO: as the codec's false, nothing was touched; EFULL, EDEVICE.
 * Limits:    memory grows to the pages of the largest rectangle. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SHIP_STAGE_H
#define TD_WORKER_SHIP_STAGE_H

#include "kernels/dev.h"
#include "worker/ship/codec.h"

typedef struct td_stage {
    td_dev *dev;
    uint8_t *room;
    size_t bytes;
    int32_t *page; /* [n_page]: of the staged table */
    uint32_t n_page;
    td_event *event;
} td_stage;

td_status td_stage_open(td_stage *s, td_dev *dev);
void td_stage_close(td_stage *s);
td_status td_stage_gather(td_stage *s, const td_codec_side *side, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                          const td_rect *r, const td_token_set *pick, void *payload, uint32_t *crc);
td_status td_stage_scatter(td_stage *s, const td_codec_side *side, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                           const td_rect *r, const td_token_set *pick, const void *payload, uint32_t *crc);

#endif
