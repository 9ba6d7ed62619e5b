// SPDX-License-Identifier: Apache-2.0
/* worker/main.c - the tandem-worker program: options, model, engine, and the three threads around it.
 *
 * Exit status: 0 drained, 1 could not start, 2 bad options, 3 refused by the router. A second SIGTERM or
 * SIGINT ends at once (1). */
#include "common/buf.h"
#include "common/build.h"
#include "common/chan.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/conf.h"
#include "common/log.h"
#include "worker/boot.h"
#include "worker/control_thread.h"
#include "worker/rank_ship.h"
#include "worker/fault.h"
#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <unistd.h>

typedef struct worker {
    td_conf conf;
    uint64_t incarnation;
    td_curve curve;
    bool has_curve;
    char name[64], model_name[256], endpoint[256];
    int signal_fd, done_fd;
    td_zctx *z;
    td_trace *trace;
    td_control_thread *control;
    td_ranks ranks;              /* of a worker of several ranks, of which this is rank 0 */
    bool many;
    char numerics[64];
    td_beat *beat;
    td_ship_home *home;          /* [dp]: where its ranks receive pages; of one rank: NULL */
    td_boot boot;
    td_engine *engine;
    td_wengine *wengine;
    td_ship *ship;
    td_msg_hello hello;
} worker;

static td_status prepare(worker *w)
{
    const td_conf *c = &w->conf;
    if (getrandom(&w->incarnation, sizeof w->incarnation, 0) != sizeof w->incarnation)
        return td_fail(TD_EIO, "getrandom: %s", strerror(errno));
    w->incarnation |= 1; /* never 0 */
    if (c->curve_secret_file[0]) {
        TD_TRY(td_curve_load(&w->curve, c->curve_secret_file,
                             c->curve_public_file[0] ? c->curve_public_file : NULL));
        w->has_curve = true;
    }
    const td_curve *key = w->has_curve ? &w->curve : NULL;
    TD_TRY(td_curve_required("router", c->router, key, c->insecure));
    if (strcmp(c->role, "prefill")) TD_TRY(td_curve_required("bulk-bind", c->bulk_bind, key, c->insecure));
    if (c->name[0]) snprintf(w->name, sizeof w->name, "%s", c->name);
    else snprintf(w->name, sizeof w->name, "%s-%06llx", c->role, (unsigned long long)(w->incarnation >> 40));
    const char *dir = c->load_format[0] == 'd' && !c->model[0] ? c->shape : c->model;
    size_t n = strlen(dir);
    while (n > 1 && dir[n - 1] == '/') n--;
    size_t at = n;
    while (at && dir[at - 1] != '/') at--;
    snprintf(w->model_name, sizeof w->model_name, "%.*s", (int)(n - at), dir + at);
    if (c->served_model_name[0]) snprintf(w->model_name, sizeof w->model_name, "%s", c->served_model_name);
    if (c->trace_file[0]) TD_TRY(td_trace_open(c->trace_file, &w->trace));
    return TD_OK;
}

static td_role role_of(const char *s)
{
    return !strcmp(s, "prefill") ? TD_ROLE_PREFILL : !strcmp(s, "decode") ? TD_ROLE_DECODE : TD_ROLE_MIXED;
}

static void fill_hello(worker *w)
{
    const td_model_desc *d = td_engine_descr(w->engine);
    const td_conf *c = &w->conf;
    td_msg_hello *h = &w->hello;
    *h = (td_msg_hello){.name = w->name, .bulk_endpoint = w->endpoint, .build = td_build(),
                        .kernels = w->boot.ops->family,
                        .page_size = (uint32_t)c->page_size, .role = role_of(c->role),
                        .max_seqs = (uint32_t)c->max_num_seqs, .has_bulk_key = w->has_curve,
                        .max_batched_tokens = (uint32_t)c->max_num_batched_tokens,
                        .kv_tokens = (uint64_t)td_engine_capacity_tokens(w->engine)};
    if (w->has_curve) memcpy(h->bulk_public_key, w->curve.public_key, 32);
    for (int i = 0; i < d->n_eos && i < TD_MSG_MAX_EOS; i++) h->eos[h->n_eos++] = (uint32_t)d->eos[i];
    h->id = (td_identity){.model_digest = d->digest, .model = w->model_name,
                          .kv_dtype = td_dtype_name(w->boot.ops->kv_dtype), .numerics = w->numerics,
                          .layers = (uint32_t)d->L, .kv_heads = (uint32_t)d->G, .head_dim = (uint32_t)d->D,
                          .vocab = (uint32_t)d->V,
                          .max_model_len = (uint32_t)td_engine_max_model_len(w->engine)};
}

static td_status load(worker *w)
{
    const td_conf *c = &w->conf;
    if (w->many) TD_TRY(td_rank_beat(c, &w->ranks, w->z, w->has_curve ? &w->curve : NULL, &w->beat));
    TD_TRY(td_boot_open(c, c->model, 0, w->many ? &w->ranks : NULL, &w->boot));
    td_boot_numerics(&w->boot, w->numerics, sizeof w->numerics);
    if (getrandom(&w->boot.opts.hash_key, sizeof w->boot.opts.hash_key, 0) < 0)
        return td_fail(TD_EIO, "getrandom: %s", strerror(errno));
    w->boot.opts.numerics = w->numerics;
    td_status paused = td_fault_arm(c->fault); /* AGAIN: another fault, which ship reads */
    if (paused < 0) return paused;
    TD_TRY(td_engine_open(&w->boot.opts, &w->engine));
    uint32_t max_legs = (uint32_t)w->boot.opts.max_legs;
    td_ship_grid grid = w->many ? td_ship_grid_of(&w->ranks.grid, (uint32_t)c->attention_split)
                                : td_ship_grid_one(td_engine_descr(w->engine));
    if (w->many) w->home = td_xalloc((size_t)w->ranks.grid.dp * sizeof *w->home);
    for (int i = 0; w->many && i < w->ranks.grid.dp; i++) td_buf_init(&w->home[i].ranks, 0);
    td_wengine_opts wo = {.engine = w->engine, .max_legs = max_legs,
                          .credits = (uint32_t)c->credits, .trace = w->trace,
                          .layer0 = grid.stage[0], .layer1 = grid.stage[1],
                          .home = w->home,
                          .wake_fd = td_control_thread_wake_fd(w->control)};
    w->wengine = td_wengine_open(&wo);
    td_ship_opts so = {.z = w->z, .desc = td_engine_descr(w->engine), .incarnation = w->incarnation,
                       .grid = &grid, .replicas = w->many ? (uint32_t)w->ranks.grid.dp : 1, .dev = w->boot.dev,
                       .bulk_bind = strcmp(c->role, "prefill") ? c->bulk_bind : NULL,
                       .curve = w->has_curve ? &w->curve : NULL, .max_keys = max_legs, .credits = (uint32_t)c->credits,
                       .timeout_us = (int64_t)c->ship_timeout_ms * 1000,
                       .wake_fd = td_wengine_wake_fd(w->wengine), .trace = w->trace, 
                       .fault = paused == TD_OK ? NULL : c->fault};
    for (int g = 0; g < so.desc->n_groups; g++) so.kv[g] = td_engine_kv(w->engine, g);
    if (w->many) TD_TRY(td_rank_incarnation(&w->ranks, &w->incarnation));
    TD_TRY(td_ship_open(&so, &w->ship));
    td_ship_advertised(w->ship, c->bulk_advertise, w->endpoint, sizeof w->endpoint);
    if (w->many) TD_TRY(td_rank_endpoints(&w->ranks, &grid, w->endpoint, w->home)); /* all are loaded */
    td_wengine_start(w->wengine, w->ship);
    fill_hello(w);
    td_control_thread_loaded(w->control, w->wengine, w->ship, &w->hello);
    TD_INFO("worker %s ready: %s, %lld KV tokens, %d sequences%s%s", w->name, c->role,
            (long long)td_engine_capacity_tokens(w->engine), c->max_num_seqs,
            w->endpoint[0] ? ", pages at " : "", w->endpoint);
    if (c->ready_fd >= 0 && dprintf(c->ready_fd, "ready %s\n", w->name) < 0)
        TD_WARN("ready-fd %d: %s", c->ready_fd, strerror(errno));
    return TD_OK;
}

/* Until the control machine is over, or a second signal. */
static int wait_end(worker *w)
{
    for (int signals = 0;;) {
        struct pollfd p[2] = {{.fd = w->signal_fd, .events = POLLIN}, {.fd = w->done_fd, .events = POLLIN}};
        if (poll(p, 2, -1) < 0 && errno != EINTR) return 1;
        struct signalfd_siginfo si;
        if (p[0].revents && read(w->signal_fd, &si, sizeof si) == (ssize_t)sizeof si) {
            if (++signals > 1 && si.ssi_signo != SIGUSR1) return 1;
            TD_INFO("signal %u", si.ssi_signo);
            td_control_thread_drain(w->control);
        }
        if (p[1].revents) return td_control_thread_over(w->control) == TD_CONTROL_REFUSED ? 3 : 0;
    }
}

static void block_signals(worker *w)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    sigaddset(&set, SIGUSR1); /* drain: the one signal that mpirun passes on and lets be answered in time */
    pthread_sigmask(SIG_BLOCK, &set, NULL); /* before any thread exists */
    w->signal_fd = signalfd(-1, &set, SFD_CLOEXEC | SFD_NONBLOCK);
    signal(SIGPIPE, SIG_IGN);
}

static int run(worker *w)
{
    w->done_fd = td_wake_open();
    td_status s = w->signal_fd < 0 || w->done_fd < 0 ? td_refuse(TD_EIO, "no file descriptors") : prepare(w);
    if (s < 0) {
        TD_ERROR("cannot start: %s", td_reason_take());
        return 2;
    }
    w->z = td_zctx_open();
    td_control_thread_opts co = {.z = w->z, .router = w->conf.router,
                                 .curve = w->has_curve ? &w->curve : NULL, .incarnation = w->incarnation,
                                 .max_legs = (uint32_t)TD_MAX(64, 4 * w->conf.max_num_seqs),
                                 .drain_us = (int64_t)w->conf.drain_s * 1000000, .done_fd = w->done_fd};
    if (td_control_thread_open(&co, &w->control) < 0) return 1;
    if (load(w) == TD_OK) {
        td_fail_hold(false);
        return wait_end(w);
    }
    if (w->many) td_coll_abort(w->ranks.world, td_reason_take());
    TD_ERROR("worker %s cannot start: %s", w->name, td_reason_take());
    return 1;
}

static void stop(worker *w)
{
    td_control_thread_close(w->control); /* first: it talks to the other two */
    td_wengine_close(w->wengine);
    td_ship_close(w->ship);              /* nothing touches pages after this */
    td_engine_close(w->engine);
    td_beat_close(w->beat);              /* ranks take their own time to give their memory back */
    td_boot_close(&w->boot);
    for (int i = 0; w->home && i < w->ranks.grid.dp; i++) td_buf_deinit(&w->home[i].ranks);
    free(w->home);
    td_rank_close(&w->ranks);
    td_zctx_close(w->z);
    td_trace_close(w->trace);
    td_conf_deinit(&w->conf);
}

/* A process of a worker of several ranks. Other ranks than 0 end here, and who was to be one and does not know it. */
static bool other_rank(worker *w, int *argc, char ***argv, int *rc)
{
    td_grid g = td_rank_grid(&w->conf);
    w->many = td_grid_ranks(&g) > 1;
    *rc = 2;
    if (!w->many) return td_rank_alone(&w->conf) < 0;
    *rc = 1;
    if (td_rank_open(&w->conf, argc, argv, &w->ranks) < 0) return true;
    if (w->ranks.grid.rank == 0) return false;
    td_fail_hold(false);
    *rc = td_rank_ship_serve(&w->conf, &w->ranks) < 0;
    if (!*rc) td_rank_close(&w->ranks);
    return true;
}

int main(int argc, char **argv)
{
    static worker w;
    const char *positional[1];
    int n_positional = 0;
    td_log_open("worker", TD_LOG_INFO);
    block_signals(&w);
    td_status s = td_conf_parse(&w.conf, TD_CONF_WORKER, argc, argv, positional, 0, &n_positional);
    if (s != TD_OK) {
        if (s < 0) fprintf(stderr, "tandem-worker: %s\n", td_reason());
        td_conf_deinit(&w.conf);
        return s < 0 ? 2 : 0;
    }
    td_log_open("worker", td_log_parse(w.conf.log_level));
    int rc = 0;
    td_fail_hold(true);
    if (other_rank(&w, &argc, &argv, &rc)) {
        td_fail_hold(false); /* of one that has no other ranks to tell */
        td_conf_deinit(&w.conf);
        return rc;
    }
    rc = run(&w);
    td_fail_hold(false);
    stop(&w);
    return rc;
}
