/* deploy/cli/bench_ranks.h - the ranks of `tandem bench engine`: rank 0 runs the tests, the others serve its steps and say
 * what they hold, what their share of the machine can do, and the processor time they used.
 *
 *   mpirun -n 2 tandem bench engine MODEL --tensor-parallel-size 2 -t 1
 *
 * With one rank the same calls look at this process alone, and MPI is not opened.
 * Ownership: boot and engine are borrowed. Threads: main. Errors: as td_rank_open; a rank that fails ends all. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_DEPLOY_CLI_BENCH_RANKS_H
#define TD_DEPLOY_CLI_BENCH_RANKS_H

#include "common/buf.h"
#include "worker/rank.h"

typedef struct bench_figures { /* of one rank */
    int rank, threads;
    double row_bytes, resident, unit; /* weights: read each step; kept; the largest gathered layer, of which two are kept */
    double read_s, multiply_s;        /* limits: the best so far */
    double cpu_s;                     /* of the process since its start */
    double gather_alone_s, gather_waited_s; /* fully sharded */
} bench_figures;

typedef struct bench_ranks {
    td_ranks ranks;
    bool many;
    const td_boot *boot;
    td_engine *engine;
    bench_figures *of; /* [n] */
    int n;
} bench_ranks;

/* MPI and the groups, if the shape of c is of more than one rank. */
td_status bench_ranks_open(bench_ranks *r, const td_conf *c, int *argc, char ***argv);
/* On other ranks than 0: all they do. */
td_status bench_ranks_serve(bench_ranks *r, const td_conf *c);
void bench_ranks_close(bench_ranks *r);

/* Rank 0. All measure their limits, as far as the pipeline allows at the same time; then look. */
td_status bench_ranks_measure(bench_ranks *r);
/* Everybody's figures as of now, into r->of. */
td_status bench_ranks_look(bench_ranks *r);
/* ,"ranks":N,"shape":{..} and, per rank, weights and threads. */
void bench_ranks_json(const bench_ranks *r, td_buf *o);

#endif
