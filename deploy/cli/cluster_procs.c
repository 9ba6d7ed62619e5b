// SPDX-License-Identifier: Apache-2.0
/* deploy/cli/cluster_procs.c - descendants by /proc: a kernel may be built without its list of children, so
 * all parents are read; that happens only when something is being ended. */
#include "deploy/cli/cluster_procs.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include <ctype.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <ftw.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

extern char **environ;

typedef struct proc { pid_t pid, parent; bool ours; } proc;

void td_procs_adopt(void)
{
    prctl(PR_SET_CHILD_SUBREAPER, 1);
}

td_status td_procs_programs(char *dir, size_t n)
{
    ssize_t k = readlink("/proc/self/exe", dir, n - 32);
    if (k <= 0) return td_fail(TD_EIO, "cannot find this program's directory: %s", strerror(errno));
    dir[k] = 0;
    char *slash = strrchr(dir, '/');
    if (slash) *slash = 0;
    return TD_OK;
}

/* State and parent; the name before them may hold anything, so they are read from its last parenthesis on. */
static char read_stat(const char *pid, pid_t *parent)
{
    char path[64], text[512], state = 0;
    snprintf(path, sizeof path, "/proc/%.20s/stat", pid);
    FILE *f = fopen(path, "re");
    if (!f) return 0;
    size_t n = fread(text, 1, sizeof text - 1, f);
    fclose(f);
    text[n] = 0;
    const char *p = strrchr(text, ')');
    int parent_pid = 0;
    if (!p || sscanf(p + 1, " %c %d", &state, &parent_pid) != 2) return 0;
    *parent = (pid_t)parent_pid;
    return state;
}

char td_procs_state(pid_t pid)
{
    char name[24];
    pid_t parent;
    snprintf(name, sizeof name, "%d", (int)pid);
    return read_stat(name, &parent);
}

static int read_all(proc *p, int max)
{
    DIR *d = opendir("/proc");
    int n = 0;
    if (!d) return 0;
    for (struct dirent *e; n < max && (e = readdir(d));) {
        if (!isdigit((unsigned char)e->d_name[0])) continue;
        pid_t parent;
        char state = read_stat(e->d_name, &parent);
        if (state && state != 'Z') p[n++] = (proc){.pid = (pid_t)atoi(e->d_name), .parent = parent};
    }
    closedir(d);
    return n;
}

/* One round: everything below this process gets SIGKILL. How many that were. */
static int kill_round(void)
{
    proc *p = td_xalloc(TD_PROCS_MAX * sizeof *p);
    pid_t me = getpid();
    int n = read_all(p, TD_PROCS_MAX), killed = 0;
    for (bool more = true; more;) {
        more = false;
        for (int i = 0; i < n; i++) {
            bool below = p[i].parent == me;
            for (int j = 0; j < n && !below; j++) below = p[j].ours && p[j].pid == p[i].parent;
            if (p[i].ours || !below) continue;
            p[i].ours = more = true;
        }
    }
    for (int i = 0; i < n; i++)
        if (p[i].ours && kill(p[i].pid, SIGKILL) == 0) killed++;
    free(p);
    return killed;
}

bool td_procs_kill_all(int64_t wait_us)
{
    int64_t end = td_now_us() + wait_us;
    for (;;) {
        int left = kill_round();
        while (waitpid(-1, NULL, WNOHANG) > 0) {}
        if (!left) return true;
        if (td_now_us() > end) {
            TD_ERROR("%d processes cannot be ended", left);
            return false;
        }
        nanosleep(&(struct timespec){.tv_nsec = 5000000}, NULL);
    }
}

void td_procs_clear_mpi(bool alone)
{
    static const char *const prefix[] = {"OMPI_", "PMIX_", "PMI_", "PRTE_", "SLURM_"};
    for (size_t i = 0; environ && environ[i];) {
        bool drop = false;
        for (size_t k = 0; k < TD_COUNT(prefix) - !alone; k++)
            drop |= !strncmp(environ[i], prefix[k], strlen(prefix[k]));
        char name[256];
        size_t n = strcspn(environ[i], "=");
        if (!drop || n >= sizeof name) {
            i++;
            continue;
        }
        memcpy(name, environ[i], n);
        name[n] = 0;
        unsetenv(name); /* moves the later ones down */
    }
}

static bool in_use(const char *dir)
{
    int fd = open(dir, O_RDONLY | O_DIRECTORY | O_NOFOLLOW | O_CLOEXEC);
    struct stat st;
    /* Younger than a minute: made, but perhaps not locked yet; or what a killed launcher started still ends.
     * */
    bool used = fd < 0 || fstat(fd, &st) < 0 || st.st_uid != geteuid() || td_wall_s() - st.st_mtime < 60 ||
                flock(fd, LOCK_EX | LOCK_NB) < 0;
    if (fd >= 0) close(fd);
    return used;
}

static void remove_unused(const char *parent)
{
    DIR *d = opendir(parent);
    if (!d) return;
    char path[300];
    for (struct dirent *e; (e = readdir(d));) {
        if (strncmp(e->d_name, "tandem-mpi.", 11)) continue;
        int n = snprintf(path, sizeof path, "%s/%s", parent, e->d_name);
        if (n < (int)sizeof path && !in_use(path)) td_procs_remove_tree(path);
    }
    closedir(d);
}

bool td_procs_make_dir(const char *parent, char *dir, size_t n, int *lock)
{
    remove_unused(parent);
    if (snprintf(dir, n, "%s/tandem-mpi.XXXXXX", parent) >= (int)n || !mkdtemp(dir)) return dir[0] = 0, false;
    *lock = open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    if (*lock >= 0) flock(*lock, LOCK_EX);
    return true;
}

static int remove_one(const char *path, const struct stat *st, int flag, struct FTW *at)
{
    (void)st, (void)flag, (void)at;
    (void)!remove(path);
    return 0;
}

void td_procs_remove_tree(const char *dir)
{
    if (dir[0]) nftw(dir, remove_one, 16, FTW_DEPTH | FTW_PHYS | FTW_MOUNT);
}
