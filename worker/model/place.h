/* worker/model/place.h - the arrays of a step that kernels read (ids, pages, wanted rows, cosines), where the kernels work.
 *
 * On the host they are those of share.h and scratch. For a device they are put one after another into one page-locked block
 * and sent in one transfer, ahead of the step's kernels on their stream. Two blocks in turn: one is written again once the
 * transfer of its last step is over.
 *
 * Ownership: the addresses are good for one step. Threads: the rank's engine thread. Errors: EFULL, EDEVICE.
 * Limits: a block is of the largest step from the start. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_PLACE_H
#define TD_WORKER_MODEL_PLACE_H

#include "worker/devmem.h"
#include "worker/model/model.h"

/* Of own rows. page, in_page and cs are within those of all rows of the shared order. */
typedef struct td_placed {
    int32_t *ids;                                             /* [n_own], in this rank's part of the vocabulary */
    const int32_t *want;                                      /* [n_want] */
    const int32_t *page[TD_MAX_GROUPS], *in_page[TD_MAX_GROUPS]; /* [n_own] */
    const float *cs, *q_scale;                                /* [n_own][rot_dim]; [n_own] or NULL */
} td_placed;

typedef struct td_place_block {
    td_devmem_post post;
    uint8_t *device; /* as many bytes */
} td_place_block;

typedef struct td_place {
    td_dev *dev;
    td_place_block step[2], more[2];
    int turn, more_turn;
} td_place;

/* After td_share_rows and the step's cosines (all rows of the shared order; q_scale: own rows', or NULL). */
td_status td_place_step(td_model *m, const float *cs, const float *q_scale, td_placed *out);
/* Numbers that come up during a step; on the host src itself. Good until the second put after this one. */
td_status td_place_put(td_model *m, const void *src, size_t bytes, const void **out);
/* Blocks for the model's largest step; nothing on the host. */
td_status td_place_open(td_model *m);
void td_place_close(td_place *p);

#endif
