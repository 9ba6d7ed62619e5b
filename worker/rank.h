/* worker/rank.h - one process of a worker of several ranks: its start, and what ranks other than 0 do.
 *
 * Rank 0 is the worker as everybody knows it; the others execute its steps. They start by agreeing: the build,
 * every option that is not a place's own (TD_CONF_PLACE), config.json and, before they are packed, the weights are
 * compared, and all stop, naming rank and value, where they differ.
 * Threads: main. Errors: EBADREQ: an impossible shape; EPROTO: started differently; ETIME: a rank was not there in
 * time. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_RANK_H
#define TD_WORKER_RANK_H

#include "worker/boot.h"
#include "worker/ranks.h"

enum { TD_RANK_MEET_MS = 10000 }; /* ranks that do not meet within this time give up */

/* The shape that the options ask for; sizes only. */
td_grid td_rank_grid(const td_conf *c);
/* MPI, the agreement and the groups. Only for shapes of more than one rank. */
td_status td_rank_open(const td_conf *c, int *argc, char ***argv, td_ranks *out);
void td_rank_close(td_ranks *r);
/* EBADREQ: the shape is of one rank, but mpirun started several. It would be a worker beside the others, who would
 * wait for it in MPI_Init for ever. */
td_status td_rank_alone(const td_conf *c);

/* A rank that is not 0, while it serves. */
typedef struct td_rank_self {
    const td_conf *conf;
    td_ranks *ranks;
    td_boot boot;
    td_kv kv[TD_MAX_GROUPS];
} td_rank_self;

/* What a program does beside the steps. opened: model and pages are there; it may set the callbacks of x, whose arg it is.
 * closing: no step comes any more (NULL: nothing); also after an error, and then opened may not have been called. */
typedef struct td_rank_hooks {
    td_status (*opened)(void *arg, td_rank_self *self, td_exec_opts *x);
    void (*closing)(void *arg);
    void *arg;
} td_rank_hooks;

/* Ranks other than 0: model, pages, steps, until rank 0 ends it. */
td_status td_rank_serve(const td_conf *c, td_ranks *r, const td_rank_hooks *h);

#endif
