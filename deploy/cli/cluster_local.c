/* Child processes: fork, watch with a SIGCHLD self-pipe, restart with backoff. Endpoints between router and
 * workers are unix sockets in a private directory below the runtime directory, so that two clusters on a
 * machine never meet. */
// SPDX-License-Identifier: Apache-2.0
#include "deploy/cli/cluster_local.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "deploy/cli/cluster_launch.h"
#include "deploy/cli/cluster_procs.h"
#include "deploy/cli/cluster_shape.h"
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum { MAX_ARGS = 160, DRAIN_SPARE_US = 10 * 1000000, KILL_US = 3 * 1000000 };

typedef struct child {
    const char *role; /* "router", "prefill", "decode", "mixed" */
    int index;
    td_shape shape;   /* more than one rank: below a launcher */
    pid_t pid;        /* 0: not running */
    int64_t started_us, restart_us, backoff_us;
} child;

struct td_local {
    const td_conf *conf;
    bool quiet, ready, failed;
    char bin_dir[4096], run_dir[64];
    child *kid;
    int n_kid;
    int ready_fd[2]; /* the router writes lines here */
    char line[1024];
    size_t line_len;
    int port;
    td_arena arena;
};

static int wake_pipe[2] = {-1, -1};
static volatile sig_atomic_t stop_asked;

static void on_signal(int sig)
{
    int saved = errno;
    if (sig != SIGCHLD) stop_asked++;
    char c = (char)sig;
    if (write(wake_pipe[1], &c, 1) < 0) errno = saved; /* full: a wake-up is pending anyway */
    errno = saved;
}

static td_status signals_open(void)
{
    if (pipe2(wake_pipe, O_CLOEXEC | O_NONBLOCK) < 0) return td_fail(TD_EIO, "pipe: %s", strerror(errno));
    struct sigaction sa = {.sa_handler = on_signal};
    sigaction(SIGCHLD, &sa, NULL);
    sigaction(SIGTERM, &sa, NULL);
    sigaction(SIGINT, &sa, NULL);
    signal(SIGPIPE, SIG_IGN);
    return TD_OK;
}

static char *arena_fmt(td_arena *a, const char *fmt, const char *x, int i)
{
    char text[256];
    snprintf(text, sizeof text, fmt, x, i);
    char *s = td_arena_strndup(a, text, strlen(text));
    TD_CHECK(s);
    return s;
}

static void child_main(td_local *l, const child *k, char **argv)
{
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() == 1) _exit(1);
    setpgid(0, 0); /* Ctrl-C goes to the supervisor alone, which then drains */
    signal(SIGPIPE, SIG_DFL);
    char path[4200];
    snprintf(path, sizeof path, "%s/%s", l->bin_dir, argv[0]);
    if (!strcmp(k->role, "router")) {
        if (fcntl(l->ready_fd[1], F_SETFD, 0) < 0) _exit(127);
    }
    execv(path, argv);
    fprintf(stderr, "cannot run %s: %s\n", path, strerror(errno));
    _exit(127);
}

/* Each adds words at argv[n] and returns the new n. */
static int router_args(td_local *l, td_arena *a, char **argv, int n)
{
    if (l->conf->source[TD_CONF_ID_router_bind] == TD_CONF_DEFAULT) {
        argv[n++] = "--router-bind";
        argv[n++] = arena_fmt(a, "ipc://%s/control", l->run_dir, 0);
    }
    argv[n++] = "--ready-fd";
    argv[n++] = arena_fmt(a, "%s%d", "", l->ready_fd[1]);
    argv[n++] = "--expected-workers";
    argv[n++] = arena_fmt(a, "%s%d", "", l->n_kid - 1);
    return n;
}

static int worker_args(td_local *l, const child *k, td_arena *a, char **argv, int n)
{
    bool own = l->conf->source[TD_CONF_ID_router_bind] == TD_CONF_DEFAULT;
    argv[n++] = "--router";
    argv[n++] = own ? arena_fmt(a, "ipc://%s/control", l->run_dir, 0)
                    : (char *)(uintptr_t)l->conf->router_bind;
    if (l->conf->source[TD_CONF_ID_bulk_bind] == TD_CONF_DEFAULT) {
        argv[n++] = "--bulk-bind";
        argv[n++] = arena_fmt(a, "ipc://%s/bulk%d", l->run_dir, k->index);
    }
    argv[n++] = "--role";
    argv[n++] = arena_fmt(a, "%s", k->role, 0);
    argv[n++] = "--name";
    argv[n++] = arena_fmt(a, "%s-%d", k->role, k->index);
    int ranks = (int)td_shape_ranks(&k->shape);
    if (ranks > 1 && l->conf->threads) { /* auto: the cores are shared out where the ranks start */
        argv[n++] = "--threads";
        argv[n++] = arena_fmt(a, "%s%d", "", TD_MAX(1, l->conf->threads / ranks));
    }
    int words = td_shape_args(&k->shape, a, argv + n);
    TD_CHECK(words >= 0);
    return n + words;
}

static int launcher_args(td_local *l, td_arena *a, char **argv)
{
    int n = 0;
    argv[n++] = "tandem";
    argv[n++] = "launch-worker";
    argv[n++] = "--no-restart"; /* this process starts it again */
    argv[n++] = "--log-level";
    argv[n++] = (char *)(uintptr_t)l->conf->log_level;
    if (l->conf->mpi_args[0]) {
        argv[n++] = "--mpi-args";
        argv[n] = td_arena_strndup(a, l->conf->mpi_args, strlen(l->conf->mpi_args));
        TD_CHECK(argv[n++]);
    }
    argv[n++] = "--";
    return n;
}

static td_status child_start(td_local *l, child *k)
{
    char *argv[MAX_ARGS];
    bool router = !strcmp(k->role, "router");
    td_arena a;
    td_arena_init(&a, 1 << 20);
    int n = 0;
    if (!router && td_shape_ranks(&k->shape) > 1) n = launcher_args(l, &a, argv);
    else argv[n++] = router ? "tandem-router" : "tandem-worker";
    unsigned program = router ? TD_CONF_ROUTER : TD_CONF_WORKER;
    int words = td_conf_to_argv(l->conf, program, &a, argv + n, MAX_ARGS - 32);
    if (words < 0) {
        td_arena_deinit(&a);
        return td_fail(TD_EFULL, "too many options for a child process");
    }
    n += words;
    n = router ? router_args(l, &a, argv, n) : worker_args(l, k, &a, argv, n);
    argv[n] = NULL;
    pid_t pid = fork();
    if (pid == 0) child_main(l, k, argv);
    td_arena_deinit(&a);
    if (pid < 0) return td_fail(TD_EIO, "fork: %s", strerror(errno));
    k->pid = pid;
    k->started_us = td_now_us();
    k->restart_us = 0;
    return TD_OK;
}

static void add_kids(td_local *l, const char *role, int n, td_shape shape)
{
    for (int i = 0; i < n; i++) {
        child *k = &l->kid[l->n_kid];
        k->role = role;
        k->shape = shape;
        k->index = l->n_kid++;
    }
}

/* How the workers of one role divide the model, from --ROLE-ranks and --ROLE-parallel. */
static td_status role_shape(const td_model_desc *d, const char *role, int ranks, const char *text,
                            td_shape *out)
{
    char what[64];
    snprintf(what, sizeof what, "%s-parallel", role);
    TD_TRY(td_shape_parse(what, text, out));
    snprintf(what, sizeof what, "%s-ranks", role);
    return td_shape_settle(what, d, ranks, text[0] != 0, out);
}

static td_status add_workers(td_local *l)
{
    const td_conf *c = l->conf;
    td_shape one = {.tp = 1, .pp = 1, .cp = 1, .dp = 1}, shape[3] = {one, one, one};
    const struct { const char *role; int n, ranks; const char *parallel; } role[] = {
        {"prefill", c->prefill, c->prefill_ranks, c->prefill_parallel},
        {"decode", c->decode, c->decode_ranks, c->decode_parallel},
        {"mixed", c->mixed, c->mixed_ranks, c->mixed_parallel}};
    td_model_desc *d = td_xalloc(sizeof *d);
    td_status s = c->model[0] ? td_model_desc_read(c->model, d) : td_model_desc_shape(c->shape, d);
    if (s < 0) s = td_refuse(s, "%s%s%s", c->model, c->model[0] ? ": " : "", td_reason()); /* not by every child */
    for (size_t i = 0; i < TD_COUNT(role) && s == TD_OK; i++) {
        if (!role[i].n || (role[i].ranks < 2 && !role[i].parallel[0])) continue;
        s = role_shape(d, role[i].role, role[i].ranks, role[i].parallel, &shape[i]);
    }
    free(d);
    add_kids(l, "router", 1, one);
    for (size_t i = 0; i < TD_COUNT(role); i++) add_kids(l, role[i].role, role[i].n, shape[i]);
    return s;
}

/* Said once here, not by every child. */
static td_status check_model(const td_conf *conf)
{
    struct stat st;
    char path[4200];
    if (!conf->model[0]) return TD_OK; /* dummy weights of a shape */
    if (stat(conf->model, &st) < 0) return td_refuse(TD_EBADREQ, "%s: %s", conf->model, strerror(errno));
    if (!S_ISDIR(st.st_mode)) return td_refuse(TD_EBADREQ, "%s is no directory: a model is a folder with config.json", conf->model);
    snprintf(path, sizeof path, "%s/config.json", conf->model);
    if (access(path, R_OK) < 0) return td_refuse(TD_EBADREQ, "%s is no model: config.json: %s", conf->model, strerror(errno));
    return TD_OK;
}

td_status td_local_start(const td_conf *conf, bool quiet, td_local **out)
{
    TD_TRY(check_model(conf));
    if (conf->prefill + conf->decode + conf->mixed == 0)
        return td_refuse(TD_EBADREQ, "no workers: --prefill, --decode and --mixed are all 0");
    td_local *l = td_xalloc(sizeof *l);
    l->conf = conf;
    l->quiet = quiet;
    l->ready_fd[0] = l->ready_fd[1] = -1;
    l->kid = td_xalloc(sizeof *l->kid * (size_t)(1 + conf->prefill + conf->decode + conf->mixed));
    td_status s = td_procs_programs(l->bin_dir, sizeof l->bin_dir);
    if (s == TD_OK) s = signals_open();
    if (s == TD_OK && pipe2(l->ready_fd, O_CLOEXEC | O_NONBLOCK) < 0)
        s = td_fail(TD_EIO, "pipe: %s", strerror(errno));
    if (s == TD_OK) {
        /* Short: a unix socket's path has at most 107 bytes. */
        snprintf(l->run_dir, sizeof l->run_dir, "/tmp/tandem.XXXXXX");
        if (!mkdtemp(l->run_dir)) s = td_fail(TD_EIO, "cannot make a runtime directory: %s", strerror(errno));
    }
    if (s == TD_OK) s = add_workers(l);
    for (int i = 0; i < l->n_kid && s == TD_OK; i++) s = child_start(l, &l->kid[i]);
    if (s < 0) {
        td_local_stop(l);
        return s;
    }
    *out = l;
    return TD_OK;
}

static void reap(td_local *l, bool stopping)
{
    int status;
    pid_t pid;
    while ((pid = waitpid(-1, &status, WNOHANG)) > 0) {
        for (int i = 0; i < l->n_kid; i++) {
            child *k = &l->kid[i];
            if (k->pid != pid) continue;
            k->pid = 0;
            if (stopping) break;
            int64_t now = td_now_us();
            k->restart_us = now + td_launch_backoff(now - k->started_us, &k->backoff_us);
            int how = WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status);
            if (WIFSIGNALED(status)) TD_WARN("%s-%d was ended by signal %d", k->role, k->index, how);
            else TD_WARN("%s-%d exited with status %d", k->role, k->index, how);
            /* It cannot even start: say so, do not loop. */
            if (!l->ready && WIFEXITED(status) && how) l->failed = true;
        }
    }
}

/* Lines from the router: "listening PORT GRPC_PORT" and "ready TEXT". */
static void read_ready(td_local *l)
{
    char c;
    while (read(l->ready_fd[0], &c, 1) == 1) {
        if (c != '\n') {
            if (l->line_len < sizeof l->line - 1) l->line[l->line_len++] = c;
            continue;
        }
        l->line[l->line_len] = 0;
        l->line_len = 0;
        if (!strncmp(l->line, "listening ", 10)) l->port = atoi(l->line + 10);
        if (!strncmp(l->line, "ready ", 6)) {
            l->ready = true;
            if (!l->quiet) printf("%s\n", l->line + 6), fflush(stdout);
        }
    }
}

static void turn(td_local *l, int timeout_ms, bool stopping)
{
    int64_t now = td_now_us();
    for (int i = 0; i < l->n_kid && !stopping; i++) {
        child *k = &l->kid[i];
        if (k->pid || !k->restart_us) continue;
        if (k->restart_us <= now) {
            TD_INFO("starting %s-%d again", k->role, k->index);
            if (child_start(l, k) < 0) k->restart_us = now + 5000000;
        } else {
            timeout_ms = TD_MIN(timeout_ms, (int)((k->restart_us - now) / 1000) + 1);
        }
    }
    struct pollfd p[2] = {{.fd = wake_pipe[0], .events = POLLIN}, {.fd = l->ready_fd[0], .events = POLLIN}};
    poll(p, 2, timeout_ms);
    char buf[64];
    while (read(wake_pipe[0], buf, sizeof buf) > 0) {}
    read_ready(l);
    reap(l, stopping);
}

td_status td_local_wait_ready(td_local *l)
{
    while (!l->ready && !l->failed && !stop_asked) turn(l, 1000, false);
    if (l->failed) return td_fail(TD_EIO, "a program of the cluster could not start (its message is above)");
    return l->ready ? TD_OK : td_refuse(TD_EGONE, "stopped");
}

int td_local_port(const td_local *l) { return l->port; }

int td_local_run(td_local *l)
{
    while (!stop_asked && !l->failed) turn(l, 1000, false);
    return l->failed ? 1 : 0;
}

static bool signal_kids(td_local *l, int sig, bool routers, bool workers)
{
    bool any = false;
    for (int i = 0; i < l->n_kid; i++) {
        bool is_router = !strcmp(l->kid[i].role, "router");
        if (!l->kid[i].pid || (is_router ? !routers : !workers)) continue;
        any = true;
        if (sig) kill(l->kid[i].pid, sig);
    }
    return any;
}

void td_local_stop(td_local *l)
{
    if (!l) return;
    int64_t end = td_now_us() + (int64_t)l->conf->drain_s * 1000000 + DRAIN_SPARE_US; /* the router's own, and its end */
    int asked = stop_asked;
    signal_kids(l, SIGTERM, true, false);
    while (signal_kids(l, 0, true, false) && td_now_us() < end && stop_asked <= asked) turn(l, 200, true);
    signal_kids(l, SIGTERM, false, true);
    while (signal_kids(l, 0, false, true) && td_now_us() < end && stop_asked <= asked) turn(l, 200, true);
    signal_kids(l, SIGTERM, false, true); /* launchers kill their ranks at the second one */
    end = td_now_us() + KILL_US;
    while (signal_kids(l, 0, false, true) && td_now_us() < end) turn(l, 200, true);
    signal_kids(l, SIGKILL, true, true);
    while (signal_kids(l, 0, true, true)) turn(l, 200, true);
    td_procs_remove_tree(l->run_dir); /* with the sockets that killed children left */
    for (int i = 0; i < 2; i++)
        if (l->ready_fd[i] >= 0) close(l->ready_fd[i]);
    free(l->kid);
    free(l);
}
