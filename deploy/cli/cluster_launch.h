/* deploy/cli/cluster_launch.h - `tandem launch-worker`: one worker of many ranks, started by mpirun, watched,
 * and started again.
 *
 *   launch-worker -> mpirun -> rank step (tandem rank) = tandem-worker of rank 0, 1, ..
 *
 * Rules:   1. mpirun gets an environment without OMPI_*, PMIX_* and PMI_*, so that it starts a job of its own
 *             even below another mpirun; settings for it go through --mpi-args.
 *          2. A worker is one failure domain: when a rank of this host ends, the rest has TD_LAUNCH_GRACE_US
 *             to end by itself (mpirun notices, on all hosts), then everything below the launcher is killed.
 *             A rank that is stopped for TD_LAUNCH_STOPPED_US counts as dead (on other hosts a small process
 *             below each rank sees to that); one that hangs is noticed by the others (worker/beat.h), which
 *             end.
 *          3. SIGTERM, SIGINT or SIGUSR1 drain: rank 0 gets SIGTERM, the others leave with it. A second one,
 *             or drain-s and 5 s, kill.
 *          4. Whoever dies takes along what is below: mpirun gets SIGTERM when the launcher dies, ranks
 *             SIGKILL when mpirun does. Nothing is left: no process, no file in /tmp or /dev/shm (a killed
 *             launcher's files go when the next one starts).
 *          5. One rank: no mpirun, the worker is the child.
 *          6. Restarts as `tandem serve` does; a worker whose options are refused (status 2) is not started
 *             again.
 * Threads: one. Limits: 1024 ranks. Errors: exit status 2: bad options or shape; 1: the worker ended badly
 *          with --no-restart. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_DEPLOY_CLI_CLUSTER_LAUNCH_H
#define TD_DEPLOY_CLI_CLUSTER_LAUNCH_H

#include <stdbool.h>
#include <stdint.h>

enum {
    TD_LAUNCH_TICK_MS = 100,        /* ranks are looked at this often */
    TD_LAUNCH_GRACE_US = 500000,
    TD_LAUNCH_STOPPED_US = 1000000,
};

/* When to start a program again that has just ended after ran_us: 0.2 s, doubling to 5 s while it keeps
 * failing within 10 s. *backoff_us: 0 at first. */
static inline int64_t td_launch_backoff(int64_t ran_us, int64_t *backoff_us)
{
    int64_t twice = 2 * *backoff_us;
    *backoff_us = ran_us < 10 * 1000000 && *backoff_us ? (twice < 5000000 ? twice : 5000000) : 200000;
    return *backoff_us;
}

/* Whether a process whose state (td_procs_state) is seen again and again has been stopped for too long.
 * *since_us: 0 at first. */
static inline bool td_launch_stopped(char state, int64_t now_us, int64_t *since_us)
{
    if (state != 'T') *since_us = 0;
    else if (!*since_us) *since_us = now_us;
    return *since_us && now_us - *since_us > TD_LAUNCH_STOPPED_US;
}

#endif
