/* worker/results.h - what steps in flight drew: a ring of arrays where draws write, and their way to the
 * host.
 *
 *   room(n)  at(i): draws write there  send(i, n)  ...at(i): td_ops.fill_ids of the next step reads it...
 * fetch(i, n, out)
 *
 * On a device the array is the device's, and send queues its copy to page-locked memory behind the draws, on
 * the stream of copies out: fetch waits for that one copy and not for what the compute stream got since. On
 * the host draws are done when they return, and fetch copies.
 *
 * Rules:     1. fetch(i) waits for all that the compute stream had when send(i) was called, also with n = 0.
 * Ownership: dev is borrowed. Threads: the engine thread.
 * Errors:    EFULL; EDEVICE of a queue, or of a kernel before it (fetch). Limits: `depth` arrays; they grow
 * to the largest step with a synchronization, once it comes. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_RESULTS_H
#define TD_WORKER_RESULTS_H

#include "kernels/dev.h"
#include "kernels/ops.h"

typedef struct td_results {
    td_dev *dev;
    int depth;
    size_t cap;                /* samples of a step */
    td_sample_out *res, *host; /* [depth][cap]; host: page-locked, with dev only */
    td_event *drawn, **here;   /* drawn: of the send at hand; here[depth] */
} td_results;

td_status td_results_open(td_dev *dev, int depth, size_t cap, td_results *r);
void td_results_close(td_results *r);
td_status td_results_room(td_results *r, size_t n);
td_sample_out *td_results_at(const td_results *r, int i);
td_status td_results_send(td_results *r, int i, size_t n);
td_status td_results_fetch(td_results *r, int i, size_t n, void *out);

#endif
