/* deploy/cli/cluster_local.h - a cluster on this machine: one router and its workers as child processes,
 * supervised.
 *
 * Rules:   1. Children get SIGTERM when this process dies, however it dies (parent-death signal).
 *          2. A worker that exits is started again after 0.2 s, doubling to 5 s while it keeps failing within
 *             10 s; one that cannot start at all before the cluster was ever ready ends the cluster.
 *          3. stop: SIGTERM to the router (it drains: running requests finish), then to the workers; a second
 *             stop signal kills.
 *          4. A worker of more than one rank is started by `tandem launch-worker`, which watches its ranks.
 * Threads: one. Limits: 256 + 256 + 256 workers by configuration. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_DEPLOY_CLI_CLUSTER_LOCAL_H
#define TD_DEPLOY_CLI_CLUSTER_LOCAL_H

#include "common/conf.h"
#include <stdbool.h>

typedef struct td_local td_local;

/* conf: as parsed for `tandem serve`, model set. quiet: the ready line is not printed. */
td_status td_local_start(const td_conf *conf, bool quiet, td_local **out);
/* Supervise until the router printed its ready line (returns TD_OK), or a failure. */
td_status td_local_wait_ready(td_local *l);
int td_local_port(const td_local *l); /* HTTP port as bound; after the router said it listens */
/* Supervise until SIGINT/SIGTERM, then drain. Returns the exit status. */
int td_local_run(td_local *l);
void td_local_stop(td_local *l); /* drain and free */

#endif
