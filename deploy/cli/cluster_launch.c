// SPDX-License-Identifier: Apache-2.0
/* deploy/cli/cluster_launch.c - the launcher of a worker of many ranks: options, mpirun's arguments, the
 * watch. */
#include "deploy/cli/cluster_launch.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "deploy/cli/cli.h"
#include "deploy/cli/cluster_procs.h"
#include "deploy/cli/cluster_shape.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_WORKER_ARGS = 256, MAX_ARGS = MAX_WORKER_ARGS + 256, MAX_RANKS = 1024 };
enum { KILL_WAIT_US = 3000000, STOP_SPARE_US = 5000000 };

extern char **environ;

/* pid 0: not seen here (yet); -1: was here, has ended */
typedef struct rank { pid_t pid; int64_t stopped_us; } rank;

typedef struct launcher {
    td_conf conf, worker;
    td_arena arena;
    char *args[MAX_WORKER_ARGS + TD_SHAPE_ARGS + 1]; /* of the worker */
    int n_args, ranks;
    const char *label;
    char bin_dir[4096], run_dir[64], shm_dir[64];
    int run_lock, shm_lock, signal_fd;
    /* one life of the worker */
    pid_t top;                 /* mpirun, or the worker of one rank */
    rank rank[MAX_RANKS];
    int64_t rank_ended_us, top_stopped_us;
    bool ended, killed;
    int status;
    /* being stopped */
    int stops;
    int64_t stop_by_us;
} launcher;

/* ---- options ---- */

static td_status read_options(launcher *l, int argc, char **argv)
{
    int own = 1, n = 0;
    while (own < argc && strcmp(argv[own], "--")) own++;
    td_status s = td_conf_parse(&l->conf, TD_CONF_LAUNCH, own, argv, NULL, 0, NULL);
    if (s != TD_OK) return s == TD_AGAIN ? TD_EGONE : s;
    if (own == argc)
        return td_refuse(TD_EBADREQ, "the worker's options are missing: launch-worker .. -- --model DIR ..");
    for (int i = own + 1; i < argc; i++) {
        if (n == MAX_WORKER_ARGS) return td_refuse(TD_EFULL, "more than %d worker options", MAX_WORKER_ARGS);
        l->args[n++] = argv[i];
    }
    l->n_args = n;
    argv[own] = argv[0]; /* the program's name, for the parser */
    s = td_conf_parse(&l->worker, TD_CONF_WORKER, argc - own, argv + own, NULL, 0, NULL);
    return s == TD_AGAIN ? TD_EGONE : s;
}

/* By the worker's options, else by the number of ranks; the model is asked where this host has it. */
static td_status settle_shape(launcher *l)
{
    td_shape shape = td_shape_of_conf(&l->worker);
    bool given = td_shape_ranks(&shape) > 1 || l->conf.ranks <= 1;
    td_model_desc *d = td_xalloc(sizeof *d);
    td_status known = l->worker.model[0] ? td_model_desc_read(l->worker.model, d)
                                         : td_model_desc_shape(l->worker.shape, d);
    td_status s = td_shape_settle("ranks", known == TD_OK ? d : NULL, l->conf.ranks, given, &shape);
    free(d);
    TD_TRY(s);
    l->ranks = (int)td_shape_ranks(&shape);
    if (given) return TD_OK;
    int n = td_shape_args(&shape, &l->arena, l->args + l->n_args);
    TD_CHECK(n > 0);
    l->n_args += n;
    TD_INFO("%d ranks: tensor parallel %d, pipeline parallel %d", l->ranks, shape.tp, shape.pp);
    return TD_OK;
}

static bool remote(const td_conf *c)
{
    return c->hosts[0] || c->hostfile[0] || c->rankfile[0];
}

/* Where mpirun and its ranks keep their files, so that they can be removed whatever ended them. Shared memory
 * only when all ranks are here: other hosts do not have the directory. */
static td_status make_dirs(launcher *l)
{
    if (!td_procs_make_dir("/tmp", l->run_dir, sizeof l->run_dir, &l->run_lock))
        return td_fail(TD_EIO, "cannot make a directory in /tmp: %s", strerror(errno));
    if (!remote(&l->conf)) td_procs_make_dir("/dev/shm", l->shm_dir, sizeof l->shm_dir, &l->shm_lock);
    return TD_OK;
}

static void remove_dirs(launcher *l)
{
    td_procs_remove_tree(l->run_dir);
    td_procs_remove_tree(l->shm_dir);
    if (l->run_lock >= 0) close(l->run_lock);
    if (l->shm_lock >= 0) close(l->shm_lock);
    l->run_dir[0] = l->shm_dir[0] = 0;
    l->run_lock = l->shm_lock = -1;
}

/* ---- mpirun's arguments ---- */

typedef struct words { td_arena *a; char **w; int n, max; } words;

__attribute__((format(printf, 2, 3))) static void word(words *w, const char *fmt, ...)
{
    char text[8192];
    va_list ap;
    va_start(ap, fmt);
    int len = vsnprintf(text, sizeof text, fmt, ap);
    va_end(ap);
    TD_CHECK(len >= 0 && len < (int)sizeof text && w->n + 1 < w->max);
    TD_CHECK(w->w[w->n++] = td_arena_strndup(w->a, text, (size_t)len));
    w->w[w->n] = NULL;
}

static void mca(words *w, const char *name, const char *value)
{
    word(w, "--mca");
    word(w, "%s", name);
    word(w, "%s", value);
}

static void place_words(launcher *l, words *w)
{
    const td_conf *c = &l->conf;
    if (c->hosts[0]) word(w, "--host"), word(w, "%s", c->hosts);
    if (c->hostfile[0]) word(w, "--hostfile"), word(w, "%s", c->hostfile);
    if (c->rankfile[0]) word(w, "--rankfile"), word(w, "%s", c->rankfile);
    /* A rank's threads get cores as the caller says (rank file, --mpi-args); without, the kernel places them.
     * */
    if (!c->rankfile[0] && !strstr(c->mpi_args, "bind-to")) word(w, "--bind-to"), word(w, "none");
    if (!c->rankfile[0] && !strstr(c->mpi_args, "subscribe")) word(w, "--oversubscribe");
    if (!remote(c)) return;
    for (char **e = environ; *e; e++) { /* this host's ranks inherit it; the others are sent it */
        size_t n = strcspn(*e, "=");
        if (strncmp(*e, "TANDEM_", 7) || n >= 64 || w->n >= w->max - MAX_WORKER_ARGS - 64) continue;
        word(w, "-x");
        word(w, "%.*s", (int)n, *e);
    }
}

static td_status mpirun_words(launcher *l, words *w)
{
    word(w, "mpirun");
    if (!geteuid()) word(w, "--allow-run-as-root");
    word(w, "-n");
    word(w, "%d", l->ranks);
    place_words(l, w);
    /* An abort ends all at once: an orderly end never comes from mpirun. */
    mca(w, "odls_base_sigkill_timeout", "0");
    /* Other hosts have one of the same name, which goes with a later launcher there. */
    mca(w, "orte_tmpdir_base", l->run_dir);
    if (remote(&l->conf)) { /* daemons elsewhere notice a lost link in about 10 s, and end their ranks */
        mca(w, "oob_tcp_keepalive_time", "3");
        mca(w, "oob_tcp_keepalive_intvl", "2");
        mca(w, "oob_tcp_keepalive_probes", "3");
    }
    if (l->shm_dir[0]) {
        mca(w, "btl_vader_backing_directory", l->shm_dir);
        mca(w, "osc_sm_backing_directory", l->shm_dir);
        mca(w, "osc_rdma_backing_directory", l->shm_dir);
    }
    for (const char *p = l->conf.mpi_args; *(p += strspn(p, " \t"));) {
        size_t n = strcspn(p, " \t");
        if (w->n > 200) return td_refuse(TD_EFULL, "mpi-args: too many words");
        word(w, "%.*s", (int)n, p);
        p += n;
    }
    word(w, "%s/tandem", l->bin_dir);
    word(w, "rank");
    return TD_OK;
}

/* ---- one life ---- */

static void child_main(launcher *l, char **argv)
{
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (td_procs_state(getppid()) == 0) _exit(1);
    setpgid(0, 0);
    sigset_t none;
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    signal(SIGPIPE, SIG_DFL);
    int null = open("/dev/null", O_RDONLY);
    if (null >= 0) dup2(null, 0);
    td_procs_clear_mpi(!remote(&l->conf));
    if (l->ranks > 1) setenv("TANDEM_LAUNCH_DIR", l->run_dir, 1);
    execvp(argv[0], argv);
    if (l->ranks > 1 && errno == ENOENT)
        fprintf(stderr, "tandem launch-worker: no mpirun on this host: install openmpi-bin\n");
    else
        fprintf(stderr, "tandem launch-worker: cannot run %s: %s\n", argv[0], strerror(errno));
    _exit(127);
}

static td_status life_start(launcher *l)
{
    char *argv[MAX_ARGS + 1] = {0};
    td_arena a;
    td_arena_init(&a, 1 << 20);
    words w = {.a = &a, .w = argv, .max = MAX_ARGS};
    td_status s = l->ranks > 1 ? make_dirs(l) : TD_OK;
    if (s == TD_OK && l->ranks > 1) s = mpirun_words(l, &w);
    if (s == TD_OK) word(&w, "%s/tandem-worker", l->bin_dir);
    for (int i = 0; i < l->n_args && s == TD_OK; i++) w.w[w.n++] = l->args[i];
    memset(l->rank, 0, sizeof l->rank);
    l->rank_ended_us = l->top_stopped_us = 0;
    l->ended = l->killed = false;
    if (s == TD_OK) {
        l->top = fork();
        if (l->top == 0) child_main(l, argv);
        if (l->top < 0) s = td_fail(TD_EIO, "fork: %s", strerror(errno));
    }
    if (s == TD_OK && l->ranks == 1) l->rank[0].pid = l->top;
    td_arena_deinit(&a);
    return s;
}

/* The process of a rank on this host, which the rank step has written down. */
static pid_t rank_pid(const launcher *l, int r)
{
    char path[96], text[24] = "";
    snprintf(path, sizeof path, "%s/rank%d", l->run_dir, r);
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0) return 0;
    ssize_t n = read(fd, text, sizeof text - 1);
    close(fd);
    return n > 0 ? (pid_t)atoi(text) : 0;
}

static void life_kill(launcher *l, const char *why)
{
    if (why) TD_WARN("%s: %s: ending all its ranks", l->label, why);
    l->killed = true;
    kill(l->top, SIGKILL);
}

/* Rule 2: what the ranks of this host are doing. */
static void life_look(launcher *l, int64_t now)
{
    char why[64];
    for (int r = 0; r < l->ranks && !l->killed; r++) {
        rank *k = &l->rank[r];
        if (!k->pid) k->pid = rank_pid(l, r);
        if (k->pid <= 0) continue;
        char state = td_procs_state(k->pid);
        if (!state || state == 'Z') {
            if (!l->rank_ended_us) l->rank_ended_us = now;
            k->pid = -1;
        } else if (td_launch_stopped(state, now, &k->stopped_us)) {
            snprintf(why, sizeof why, "rank %d is stopped", r);
            life_kill(l, why);
        }
    }
    if (l->killed || l->ranks == 1) return;
    if (td_launch_stopped(td_procs_state(l->top), now, &l->top_stopped_us)) life_kill(l, "mpirun is stopped");
    else if (l->rank_ended_us && now - l->rank_ended_us > (l->stops ? STOP_SPARE_US : TD_LAUNCH_GRACE_US))
        life_kill(l, "a rank has ended and others have not");
}

static void ask_stop(launcher *l)
{
    if (++l->stops > 1) {
        life_kill(l, "asked twice to stop");
        return;
    }
    l->stop_by_us = td_now_us() + (int64_t)l->worker.drain_s * 1000000 + STOP_SPARE_US;
    if (!l->rank[0].pid) l->rank[0].pid = rank_pid(l, 0);
    if (l->rank[0].pid > 0) kill(l->rank[0].pid, SIGTERM);
    else if (l->top) /* mpirun passes SIGUSR1 on to ranks elsewhere */
        kill(l->top, remote(&l->conf) ? SIGUSR1 : SIGTERM);
}

static void read_signals(launcher *l, int timeout_ms)
{
    struct pollfd p = {.fd = l->signal_fd, .events = POLLIN};
    poll(&p, 1, timeout_ms);
    struct signalfd_siginfo si;
    while (read(l->signal_fd, &si, sizeof si) == (ssize_t)sizeof si)
        if (si.ssi_signo != SIGCHLD) ask_stop(l);
}

static void reap(launcher *l)
{
    int status;
    for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
        if (pid != l->top) continue; /* an orphan that became ours */
        l->ended = true;
        l->status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    }
}

/* From the start of the worker to its end: exit status. Afterwards nothing of it is left. */
static int life(launcher *l)
{
    if (life_start(l) < 0) {
        TD_ERROR("%s: %s", l->label, td_reason_take());
        remove_dirs(l);
        return 1;
    }
    while (!l->ended && !l->killed) {
        read_signals(l, TD_LAUNCH_TICK_MS);
        reap(l);
        int64_t now = td_now_us();
        if (!l->ended && !l->killed) life_look(l, now);
        if (l->stops && now > l->stop_by_us && !l->ended && !l->killed) life_kill(l, "does not end in time");
    }
    td_procs_kill_all(KILL_WAIT_US);
    reap(l);
    remove_dirs(l);
    l->top = 0;
    return l->killed ? 1 : l->status;
}

static int watch(launcher *l)
{
    int64_t backoff = 0;
    for (;;) {
        int64_t start = td_now_us();
        int status = life(l);
        if (l->stops || !l->conf.restart || status == 2) return l->stops && !l->killed ? 0 : status;
        int64_t again = td_now_us() + td_launch_backoff(td_now_us() - start, &backoff);
        double seconds = (double)backoff / 1e6;
        TD_WARN("%s ended with status %d, starting it again in %.1f s", l->label, status, seconds);
        for (int64_t left; (left = again - td_now_us()) > 0 && !l->stops;)
            read_signals(l, (int)(left / 1000) + 1);
        if (l->stops) return 0;
    }
}

static td_status prepare(launcher *l, int argc, char **argv)
{
    TD_TRY(read_options(l, argc, argv));
    td_log_open("launch", td_log_parse(l->conf.log_level));
    l->label = l->worker.name[0] ? l->worker.name : l->worker.role;
    TD_TRY(settle_shape(l));
    TD_TRY(td_procs_programs(l->bin_dir, sizeof l->bin_dir));
    sigset_t set;
    sigemptyset(&set);
    const int sig[] = {SIGTERM, SIGINT, SIGUSR1, SIGCHLD};
    for (size_t i = 0; i < TD_COUNT(sig); i++) sigaddset(&set, sig[i]);
    sigprocmask(SIG_BLOCK, &set, NULL);
    l->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    if (l->signal_fd < 0) return td_fail(TD_EIO, "signalfd: %s", strerror(errno));
    td_procs_adopt();
    return TD_OK;
}

int cmd_launch(int argc, char **argv)
{
    launcher *l = td_xalloc(sizeof *l);
    l->run_lock = l->shm_lock = -1;
    td_log_open("launch", TD_LOG_INFO);
    td_conf_init(&l->worker);
    td_arena_init(&l->arena, 65536);
    td_status s = prepare(l, argc, argv);
    int status = s == TD_EGONE ? 0 : 2;
    if (s == TD_OK) status = watch(l);
    else if (s != TD_EGONE) fprintf(stderr, "tandem launch-worker: %s\n", td_reason_take());
    td_conf_deinit(&l->conf);
    td_conf_deinit(&l->worker);
    td_arena_deinit(&l->arena);
    free(l);
    return status;
}
