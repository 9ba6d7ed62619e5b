/* worker/beat.h - the ranks of a worker prove to each other that they run, whatever their engines are at: a long step is
 * no death, a stopped process is one.
 *
 * A thread of its own in each rank: ranks other than 0 send rank 0 a beat every TD_BEAT_MS, and rank 0 answers. Who has not
 * been heard for timeout_us is given up: the process ends at once (exit status TD_BEAT_EXIT), and with it, by mpirun, all
 * ranks of the worker. A process that died needs no beats: mpirun sees it.
 *
 * Threads: open and close: main. Errors: EIO (bind). Limits: TD_MAX_RANKS. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_BEAT_H
#define TD_WORKER_BEAT_H

#include "common/wire/sock.h"

enum { TD_BEAT_MS = 400, TD_BEAT_EXIT = 4 };

typedef struct td_beat td_beat;
typedef struct td_beat_opts {
    td_zctx *z;
    int rank, n_ranks;
    const char *endpoint;            /* rank 0: to bind; others: rank 0's as bound */
    const td_curve *curve;           /* or NULL; borrowed */
    int64_t timeout_us;
    void (*lost)(void *arg, int rank); /* tests; NULL: the process ends */
    void *arg;
} td_beat_opts;

/* bound (at least 256 bytes): rank 0's endpoint. */
td_status td_beat_open(const td_beat_opts *o, char *bound, size_t n, td_beat **out);
void td_beat_close(td_beat *b);

#endif
