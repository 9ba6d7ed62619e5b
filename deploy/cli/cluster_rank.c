// SPDX-License-Identifier: Apache-2.0
/* deploy/cli/cluster_rank.c - `tandem rank PROGRAM ARGS`: the step between mpirun and a rank, in the rank's own process: what
 * has to be set on the rank's host before the program starts (cluster_launch.h rules 2, 4). Not for users. */
#include "deploy/cli/cli.h"
#include "worker/boot.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <unistd.h>

static int env_int(const char *name, int dflt)
{
    const char *s = getenv(name);
    int v = s ? atoi(s) : dflt;
    return v < 0 ? dflt : v;
}

/* For the launcher, when it runs on this host. */
static void write_down(int rank)
{
    const char *dir = getenv("TANDEM_LAUNCH_DIR");
    char path[128];
    if (!dir || snprintf(path, sizeof path, "%s/rank%d", dir, rank) >= (int)sizeof path) return;
    int fd = open(path, O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (fd < 0) return;
    if (dprintf(fd, "%d", (int)getpid()) < 0) unlink(path);
    close(fd);
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
    write_down(rank);
    unsetenv("TANDEM_LAUNCH_DIR");
    share_cores(argv + 1);
    execv(argv[1], argv + 1);
    fprintf(stderr, "tandem rank %d: cannot run %s: %s\n", rank, argv[1], strerror(errno));
    return 127;
}
