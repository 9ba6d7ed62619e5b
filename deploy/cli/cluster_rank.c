// SPDX-License-Identifier: Apache-2.0
/* deploy/cli/cluster_rank.c - `tandem rank PROGRAM ARGS`: the step between mpirun and a rank, in the rank's
 * own process: what has to be set on its host before the program starts (cluster_launch.h rules 2, 4). Not
 * for users. */
#include "common/clock.h"
#include "deploy/cli/cli.h"
#include "deploy/cli/cluster_launch.h"
#include "deploy/cli/cluster_procs.h"
#include "worker/boot.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

static int env_int(const char *name, int dflt)
{
    const char *s = getenv(name);
    int v = s ? atoi(s) : dflt;
    return v < 0 ? dflt : v;
}

/* For the launcher, when it runs on this host. */
static bool write_down(int rank)
{
    const char *dir = getenv("TANDEM_LAUNCH_DIR");
    char path[128];
    if (!dir || snprintf(path, sizeof path, "%s/rank%d", dir, rank) >= (int)sizeof path) return false;
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) return false;
    bool done = dprintf(fd, "%d", (int)getpid()) > 0;
    close(fd);
    return done;
}

/* A small process below the rank, for as long as the rank lives: ends it when it has been stopped for too
 * long. */
static void watch_from_below(void)
{
    pid_t rank = getpid();
    if (fork() != 0) return; /* no process to be had: the other ranks' deadline is left */
    prctl(PR_SET_PDEATHSIG, SIGKILL);
    setpgid(0, 0); /* what stops the rank's group does not stop this */
    for (int fd = 0; fd < 3; fd++) close(fd);
    int64_t stopped_us = 0;
    while (getppid() == rank) {
        nanosleep(&(struct timespec){.tv_nsec = TD_LAUNCH_TICK_MS * 1000000}, NULL);
        if (td_launch_stopped(td_procs_state(rank), td_now_us(), &stopped_us)) kill(rank, SIGKILL);
    }
    _exit(0);
}

/* Ranks of a host share its cores. */
static void share_cores(char **argv)
{
    for (char **a = argv; *a; a++)
        if (!strncmp(*a, "--threads", 9) || !strncmp(*a, "-t", 2)) return;
    if (getenv("TANDEM_THREADS")) return;
    int here = env_int("OMPI_COMM_WORLD_LOCAL_SIZE", 1), cores = td_boot_cores() / (here ? here : 1);
    char text[16];
    snprintf(text, sizeof text, "%d", cores > 1 ? cores : 1);
    setenv("TANDEM_THREADS", text, 1);
}

int cmd_rank(int argc, char **argv)
{
    int rank = env_int("OMPI_COMM_WORLD_RANK", 0);
    if (argc < 2) {
        fprintf(stderr, "tandem rank: which program?\n");
        return 2;
    }
    prctl(PR_SET_PDEATHSIG, SIGKILL); /* kept by exec */
    signal(SIGUSR1, SIG_IGN);         /* mpirun passes it to all ranks; rank 0 reads it */
    if (!write_down(rank)) watch_from_below();
    unsetenv("TANDEM_LAUNCH_DIR");
    share_cores(argv + 1);
    execv(argv[1], argv + 1);
    fprintf(stderr, "tandem rank %d: cannot run %s: %s\n", rank, argv[1], strerror(errno));
    return 127;
}
