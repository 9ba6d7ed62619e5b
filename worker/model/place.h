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

#include "kernels/dev.h"
#include "worker/model/model.h"

/* Of own rows. */
typedef struct td_placed {
    int32_t *ids;                                             /* [n_own] */
    const int32_t *want;                                      /* [n_want] */
    const int32_t *page[TD_MAX_GROUPS], *in_page[TD_MAX_GROUPS]; /* [n_own] */
    const float *cs, *q_scale;                                /* [n_own][rot_dim]; [n_own] or NULL */
} td_placed;

typedef struct td_place_block {
    uint8_t *host, *device;
    size_t bytes;
    td_event *sent;
} td_place_block;

typedef struct td_place {
    td_dev *dev;
    td_place_block block[2];
    int turn;
} td_place;

/* After td_share_rows and the step's cosines (all rows of the shared order; q_scale: own rows', or NULL). */
td_status td_place_step(td_model *m, const float *cs, const float *q_scale, td_placed *out);
/* Blocks for the model's largest step; nothing on the host. */
td_status td_place_open(td_model *m);
void td_place_close(td_place *p);

#endif
