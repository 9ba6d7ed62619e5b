/* router/main.c - the router program: options in, threads up, the core's loop on this thread, drain on
 * SIGTERM. */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "router/api/bridge.h"
#include "router/api/grpc.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/signalfd.h>
#include <unistd.h>

enum { CONTROL_HWM = 10000, LINGER_MS = 500 /* for the goodbye */, EVERY_US = 1000000,
       FLUSH_US = 5000000 /* after a drain, for what slow readers still have to take */ };

typedef struct router {
    td_conf conf;
    td_api api;
    td_zctx *z;
    td_sock *sock;
    td_curve curve;
    td_core *core;
    td_metrics *metrics;
    td_bridge *bridge;
    int wake_fd, signal_fd;
    atomic_uint nets_running;
    pthread_t threads[TD_API_NETS];
    unsigned n_threads;
    int port, grpc_port;
    char endpoint[256];
} router;

/* One line to whoever started us ("listening PORT GRPC_PORT", "ready TEXT"). */
static void tell(const router *r, const char *line)
{
    if (r->conf.ready_fd < 0) return;
    size_t n = strlen(line);
    while (n) {
        ssize_t k = write(r->conf.ready_fd, line, n);
        if (k < 0 && errno != EINTR) return;
        if (k > 0) line += k, n -= (size_t)k;
    }
}

/* Signals first: every thread inherits the mask, and only signalfd sees them. */
static td_status open_signals(router *r)
{
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGTERM);
    sigaddset(&set, SIGINT);
    signal(SIGPIPE, SIG_IGN);
    if (pthread_sigmask(SIG_BLOCK, &set, NULL)) return td_fail(TD_EIO, "cannot block signals");
    r->signal_fd = signalfd(-1, &set, SFD_NONBLOCK | SFD_CLOEXEC);
    return r->signal_fd < 0 ? td_fail(TD_EIO, "signalfd: %s", strerror(errno)) : TD_OK;
}

static td_status open_control(router *r)
{
    const td_conf *c = &r->conf;
    bool keys = c->curve_secret_file[0] != 0;
    TD_TRY(td_curve_required("router-bind", c->router_bind, keys ? &r->curve : NULL, c->insecure));
    if (keys)
        TD_TRY(td_curve_load(&r->curve, c->curve_secret_file,
                             c->curve_public_file[0] ? c->curve_public_file : NULL));
    r->z = td_zctx_open();
    td_sock_opts o = {.max_message_bytes = TD_BRIDGE_MESSAGE_BYTES,
                      .hwm = CONTROL_HWM,
                      .linger_ms = LINGER_MS,
                      .curve = keys ? &r->curve : NULL};
    return td_sock_bind_router(r->z, c->router_bind, &o, r->endpoint, sizeof r->endpoint, &r->sock);
}

static td_status open_core(router *r)
{
    r->api.hash_key = (td_hkey){td_api_random_u64(), td_api_random_u64()};
    td_core_opts o = {.incarnation = td_api_random_u64() | 1,
                      .hash_key = r->api.hash_key,
                      .tokenizer = r->api.model.tokenizer,
                      .drain_us = TD_MAX(1, (int64_t)r->conf.drain_s * 1000000),
                      .max_queue = (uint32_t)r->conf.max_queue};
    r->core = td_core_open(&o);
    r->metrics = td_metrics_open();
    return TD_OK;
}

static const char *given(const char *option) { return option[0] ? option : NULL; }

static td_status open_net(router *r, unsigned i)
{
    td_api_net *n = &r->api.nets[i];
    *n = (td_api_net){.api = &r->api, .index = i};
    n->to_core = td_chan_open(TD_API_RING, r->wake_fd);
    n->from_core = td_chan_open(TD_API_RING, -1);
    if (!n->to_core || !n->from_core) return td_fail(TD_EIO, "no more file descriptors");
    td_net_opts o = {.host = r->conf.host,
                     .port = i ? r->port : r->conf.port,
                     .grpc_port = i ? r->grpc_port : r->conf.grpc_port,
                     .max_body_bytes = (size_t)r->conf.max_body_bytes,
                     .reuse_port = r->conf.net_threads > 1,
                     .drain_us = FLUSH_US,
                     .tls_cert_file = given(r->conf.tls_cert),
                     .tls_key_file = given(r->conf.tls_key),
                     .tls_client_ca_file = given(r->conf.tls_client_ca),
                     .handler = td_api_handle,
                     .error_body = td_api_error_body,
                     .arg = n};
    TD_TRY(td_net_open(&o, &n->net));
    if (!i) td_net_ports(n->net, &r->port, &r->grpc_port);
    r->api.n_nets = i + 1;
    TD_TRY(td_net_watch(n->net, td_chan_fd(n->from_core), td_api_from_core, n));
    return td_net_every(n->net, EVERY_US, td_api_every_second, n);
}

static void *net_thread(void *arg)
{
    td_api_net *n = arg;
    router *r = (router *)((char *)n->api - offsetof(router, api));
    td_net_run(n->net);
    atomic_fetch_sub(&r->nets_running, 1);
    td_wake_signal(r->wake_fd);
    return NULL;
}

static td_status start_nets(router *r)
{
    for (unsigned i = 0; i < r->api.n_nets; i++) {
        atomic_fetch_add(&r->nets_running, 1);
        if (pthread_create(&r->threads[i], NULL, net_thread, &r->api.nets[i]))
            return td_fail(TD_EIO, "cannot start a thread");
        r->n_threads++;
    }
    return TD_OK;
}

static void on_ready(void *arg, const td_fleet *f)
{
    router *r = arg;
    char line[1024], kernels[128];
    td_fleet_kernels(f, kernels, sizeof kernels);
    uint64_t kv = td_fleet_kv_tokens(f, TD_ROLE_DECODE);
    if (!kv) kv = td_fleet_kv_tokens(f, TD_ROLE_PREFILL);
    double full = f->id.max_model_len ? (double)kv / f->id.max_model_len : 0;
    snprintf(line, sizeof line,
             "ready %.200s on %s://%.200s:%d (gRPC %d), kernels %s (numerics %.100s), KV %llu tokens: %.1f "
             "requests of the full %u tokens at once\n",
             r->api.model.name, r->conf.tls_cert[0] ? "https" : "http", r->conf.host, r->port,
             r->grpc_port, kernels, f->numerics, (unsigned long long)kv,
             full, f->id.max_model_len);
    TD_INFO("%.*s", (int)strlen(line) - 1, line);
    tell(r, line);
}

static void on_drain(void *arg)
{
    router *r = arg;
    for (unsigned i = 0; i < r->api.n_nets; i++) td_net_drain(r->api.nets[i].net);
}

static void on_stop(void *arg)
{
    router *r = arg;
    for (unsigned i = 0; i < r->api.n_nets; i++) td_net_stop(r->api.nets[i].net);
}

static td_status check_tls(const td_conf *c)
{
    if (!c->tls_cert[0] == !c->tls_key[0] && (c->tls_cert[0] || !c->tls_client_ca[0])) return TD_OK;
    const char *given = c->tls_cert[0] ? "--tls-cert" : c->tls_key[0] ? "--tls-key" : "--tls-client-ca",
               *missing = c->tls_cert[0] ? "--tls-key" : c->tls_key[0] ? "--tls-cert" : "--tls-cert and --tls-key";
    return td_refuse(TD_EBADREQ, "%s needs %s too", given, missing);
}

static td_status open_all(router *r)
{
    TD_TRY(check_tls(&r->conf));
    TD_TRY(open_signals(r));
    TD_TRY(td_api_model_open(&r->api.model, &r->conf));
    r->wake_fd = td_wake_open();
    if (r->wake_fd < 0) return td_fail(TD_EIO, "eventfd: %s", strerror(errno));
    TD_TRY(open_control(r));
    TD_TRY(open_core(r));
    r->api.text = td_textpool_open(r->conf.text_threads, TD_API_TEXT_JOBS);
    for (int i = 0; i < r->conf.net_threads; i++) TD_TRY(open_net(r, (unsigned)i));
    r->bridge = td_bridge_open(&(td_bridge_opts){.api = &r->api,
                                                 .core = r->core,
                                                 .metrics = r->metrics,
                                                 .sock = r->sock,
                                                 .wake_fd = r->wake_fd,
                                                 .signal_fd = r->signal_fd,
                                                 .nets_running = &r->nets_running,
                                                 .expected_workers = (uint32_t)r->conf.expected_workers,
                                                 .on_ready = on_ready,
                                                 .drain_us = (int64_t)r->conf.drain_s * 1000000,
                                                 .listen_us = (int64_t)r->conf.drain_listen_s * 1000000,
                                                 .on_drain = on_drain,
                                                 .on_stop = on_stop,
                                                 .arg = r});
    atomic_store(&r->api.core_beat_us, td_now_us());
    return start_nets(r);
}

/* The rest is the kernel's. After a second signal threads may still run: leave at once. */
static void close_all(router *r)
{
    if (atomic_load(&r->nets_running)) return;
    for (unsigned i = 0; i < r->n_threads; i++) pthread_join(r->threads[i], NULL);
    td_textpool_close(r->api.text);
    td_sock_close(r->sock); /* workers see it at once and drop our work */
    td_zctx_close(r->z);
}

int main(int argc, char **argv)
{
    static router r = {.wake_fd = -1, .signal_fd = -1};
    td_log_open("router", TD_LOG_INFO);
    td_status s = td_conf_parse(&r.conf, TD_CONF_ROUTER, argc, argv, NULL, 0, NULL);
    if (s == TD_AGAIN) return 0;
    if (s != TD_OK) {
        fprintf(stderr, "tandem-router: %s\n", td_reason());
        return 2;
    }
    td_log_open("router", td_log_parse(r.conf.log_level));
    r.api.conf = &r.conf;
    td_fail_hold(true);
    if (open_all(&r) != TD_OK) {
        TD_ERROR("cannot start: %s", td_reason_take());
        return 1;
    }
    td_fail_hold(false);
    char line[64];
    snprintf(line, sizeof line, "listening %d %d\n", r.port, r.grpc_port);
    tell(&r, line);
    TD_INFO("listening on %s, HTTP port %d, gRPC port %d; workers at %s", r.conf.host, r.port, r.grpc_port,
            r.endpoint);
    td_bridge_run(r.bridge);
    close_all(&r);
    TD_INFO("stopped");
    return 0;
}
