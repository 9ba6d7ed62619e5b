/* deploy/cli/cluster_procs.h - looking after processes that are not our children: ranks are children of
 * mpirun.
 *
 * Rules:   1. td_procs_adopt once: orphans below us become our children; nothing escapes td_procs_kill_all.
 *          2. td_procs_kill_all ends every descendant, stopped ones too, and reaps them.
 * Threads: one. Errors: none; a process that the kernel does not let go in time is logged.
 * Source:  prctl(2) PR_SET_CHILD_SUBREAPER, proc(5). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_DEPLOY_CLI_CLUSTER_PROCS_H
#define TD_DEPLOY_CLI_CLUSTER_PROCS_H

#include "common/status.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

enum { TD_PROCS_MAX = 65536 };

void td_procs_adopt(void);
/* Where our sibling programs are: beside this executable. Leaves room in dir[n] for the name of one. */
td_status td_procs_programs(char *dir, size_t n);
/* As in /proc/PID/stat: 'R', 'S', 'D', 'T' (stopped), 'Z' (ended, not reaped); 0: no such process. */
char td_procs_state(pid_t pid);
/* SIGKILL to all descendants until there are none, at most wait_us long. False: some are left. */
bool td_procs_kill_all(int64_t wait_us);
/* Unsets what another mpirun left in the environment (OMPI_*, PMIX_*, PMI_*, PRTE_*), by which Open MPI would
 * take a child for a part of that job; with `alone` also SLURM_*, by which it would spread over an
 * allocation. */
void td_procs_clear_mpi(bool alone);
/* A new directory for this process: parent/tandem-mpi.XXXXXX. *lock: an open file that says, while it is
 * open, that the directory is in use. Old ones that nobody uses (their launcher was killed) are removed
 * first. False: cannot be made. */
bool td_procs_make_dir(const char *parent, char *dir, size_t n, int *lock);
/* Removes a directory of ours and what is in it (not across file systems, not through links). */
void td_procs_remove_tree(const char *dir);

#endif
