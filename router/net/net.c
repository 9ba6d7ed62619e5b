// SPDX-License-Identifier: Apache-2.0
/* One net thread: libevent tells what happened, net_turn() does the work of the turn; posts, timers,
 * drain. */
#include "common/chan.h"
#include "common/check.h"
#include "common/clock.h"
#include "router/net/net_int.h"
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

enum { SWEEP_MIN_US = 5000, SWEEP_MAX_US = 1000000, DRAIN_LOOK_US = TD_NET_SETTLE_US / 4 };

const char *net_date(td_net *n)
{
    int64_t s = td_wall_s();
    if (s != n->date_s) {
        struct tm tm;
        time_t t = (time_t)s;
        gmtime_r(&t, &tm);
        strftime(n->date, sizeof n->date, "%a, %d %b %Y %H:%M:%S GMT", &tm);
        n->date_s = s;
    }
    return n->date;
}

/* ---- posts ---- */

void td_net_post(td_net *n, void (*fn)(void *), void *arg)
{
    pthread_mutex_lock(&n->mutex);
    /* Bounded: other threads wait for room while the loop runs. The net thread itself may not wait for
     * itself. */
    while (n->n_posts >= TD_NET_POSTS && atomic_load(&n->running) &&
           !pthread_equal(pthread_self(), n->thread))
        pthread_cond_wait(&n->room, &n->mutex);
    if (n->n_posts == n->cap_posts) {
        n->cap_posts = n->cap_posts ? n->cap_posts * 2 : 64;
        n->posts = td_xrealloc(n->posts, n->cap_posts * sizeof *n->posts);
    }
    n->posts[n->n_posts++] = (td_post){fn, arg};
    bool first = n->n_posts == 1;
    pthread_mutex_unlock(&n->mutex);
    if (first) td_wake_signal(n->wake_fd);
}

static void run_posts(td_net *n)
{
    pthread_mutex_lock(&n->mutex);
    td_post *list = n->posts;
    size_t count = n->n_posts;
    n->posts = NULL;
    n->n_posts = n->cap_posts = 0;
    pthread_cond_broadcast(&n->room);
    pthread_mutex_unlock(&n->mutex);
    for (size_t i = 0; i < count; i++) list[i].fn(list[i].arg);
    free(list);
}

static void on_wake(evutil_socket_t fd, short what, void *arg)
{
    (void)what;
    td_wake_clear((int)fd);
    run_posts(arg);
}

/* ---- timers and watches ---- */

static void on_sweep(evutil_socket_t fd, short what, void *arg)
{
    td_net *n = arg;
    (void)fd, (void)what;
    int64_t now = td_now_us();
    tls_sweep(n, now);
    for (td_conn *c = n->conns; c; c = c->next) conn_sweep(c, now);
}

static void on_watch(evutil_socket_t fd, short what, void *arg)
{
    td_watch *w = arg;
    (void)fd, (void)what;
    w->fn(w->arg);
}

static struct timeval tv_of(int64_t us)
{
    return (struct timeval){.tv_sec = us / 1000000, .tv_usec = us % 1000000};
}

static td_status add_watch(td_net *n, int fd, short what, int64_t period_us, void (*fn)(void *), void *arg)
{
    td_watch *w = td_xalloc(sizeof *w);
    *w = (td_watch){.n = n, .fn = fn, .arg = arg, .next = n->watches};
    w->ev = event_new(n->base, fd, (short)(what | EV_PERSIST), on_watch, w);
    struct timeval tv = tv_of(period_us);
    if (!w->ev || event_add(w->ev, period_us ? &tv : NULL)) {
        if (w->ev) event_free(w->ev);
        free(w);
        return td_fail(TD_EIO, "net: cannot watch descriptor %d", fd);
    }
    n->watches = w;
    return TD_OK;
}

td_status td_net_watch(td_net *n, int fd, void (*fn)(void *), void *arg)
{
    return add_watch(n, fd, EV_READ, 0, fn, arg);
}

td_status td_net_every(td_net *n, int64_t period_us, void (*fn)(void *), void *arg)
{
    return add_watch(n, -1, 0, TD_MAX(period_us, 1), fn, arg);
}

/* ---- open, close ---- */

static void set_defaults(td_net_opts *o)
{
    if (!o->max_body_bytes) o->max_body_bytes = 8u << 20;
    if (!o->max_header_bytes) o->max_header_bytes = 32u << 10;
    if (o->max_connections <= 0) o->max_connections = 10000;
    if (o->max_streams <= 0) o->max_streams = 256;
    if (o->idle_us <= 0) o->idle_us = 75000000;
    if (o->header_us <= 0) o->header_us = 10000000;
    if (o->body_us <= 0) o->body_us = 60000000;
    if (o->slow_reader_us <= 0) o->slow_reader_us = 30000000;
    if (!o->high_mark_bytes) o->high_mark_bytes = 1u << 20;
    if (o->drain_us <= 0) o->drain_us = 30000000;
}

static td_status open_loop(td_net *n)
{
    struct event_config *cfg = event_config_new();
    TD_CHECK(cfg);
    event_config_set_flag(cfg, EVENT_BASE_FLAG_NOLOCK); /* one thread; others only write to wake_fd */
    event_config_require_features(cfg, EV_FEATURE_ET | EV_FEATURE_EARLY_CLOSE);
    n->base = event_base_new_with_config(cfg);
    event_config_free(cfg);
    if (!n->base) return td_fail(TD_EIO, "net: no event loop with edge triggers");
    n->wake_fd = td_wake_open();
    if (n->wake_fd < 0) return td_fail(TD_EIO, "net: no eventfd");
    n->wake_ev = event_new(n->base, n->wake_fd, EV_READ | EV_PERSIST, on_wake, n);
    n->sweep_ev = event_new(n->base, -1, EV_PERSIST, on_sweep, n);
    const td_net_opts *o = &n->o;
    int64_t shortest = TD_MIN(TD_MIN(o->idle_us, o->header_us), TD_MIN(o->body_us, o->slow_reader_us));
    struct timeval tv = tv_of(TD_MAX(SWEEP_MIN_US, TD_MIN(SWEEP_MAX_US, shortest / 8)));
    if (!n->wake_ev || !n->sweep_ev || event_add(n->wake_ev, NULL) || event_add(n->sweep_ev, &tv))
        return td_fail(TD_EIO, "net: cannot set up the event loop");
    return TD_OK;
}

td_status td_net_open(const td_net_opts *o, td_net **out)
{
    td_net *n = td_xalloc(sizeof *n);
    n->o = *o;
    set_defaults(&n->o);
    n->host = td_xstrdup(o->host ? o->host : "");
    n->o.host = n->host;
    const char **file[] = {&n->o.tls_cert_file, &n->o.tls_key_file, &n->o.tls_client_ca_file};
    for (int i = 0; i < 3; i++)
        if (*file[i]) *file[i] = n->tls_file[i] = td_xstrdup(*file[i]);
    n->listen_fd[0] = n->listen_fd[1] = n->wake_fd = n->reserve_fd = -1;
    n->dirty_tail = &n->dirty;
    n->date_s = -1;
    pthread_mutex_init(&n->mutex, NULL);
    pthread_cond_init(&n->room, NULL);
    td_status s = open_loop(n);
    if (s == TD_OK) s = h2_setup(n);
    if (s == TD_OK) s = tls_open(n);
    if (s == TD_OK) s = listen_open(n);
    if (s != TD_OK) {
        td_net_close(n);
        return s;
    }
    *out = n;
    return TD_OK;
}

void td_net_close(td_net *n)
{
    if (!n) return;
    while (n->conns) conn_free(n->conns);
    listen_close(n);
    while (n->watches) {
        td_watch *w = n->watches;
        n->watches = w->next;
        event_free(w->ev);
        free(w);
    }
    if (n->wake_ev) event_free(n->wake_ev);
    if (n->sweep_ev) event_free(n->sweep_ev);
    if (n->base) event_base_free(n->base);
    if (n->wake_fd >= 0) close(n->wake_fd);
    if (n->h2_cb) nghttp2_session_callbacks_del(n->h2_cb);
    if (n->h2_opt) nghttp2_option_del(n->h2_opt);
    pthread_mutex_destroy(&n->mutex);
    pthread_cond_destroy(&n->room);
    tls_close(n);
    for (int i = 0; i < 3; i++) free(n->tls_file[i]);
    free(n->posts);
    free(n->host);
    free(n);
}

void td_net_ports(const td_net *n, int *port, int *grpc_port)
{
    if (port) *port = n->port[0];
    if (grpc_port) *grpc_port = n->o.grpc_port < 0 ? -1 : n->port[1];
}

void td_net_get_counts(const td_net *n, td_net_counts *out)
{
    *out = n->counts;
    out->connections = n->n_conns;
    out->exchanges = n->n_exchanges;
    out->body_bytes = n->body_bytes;
}

/* ---- run ---- */

static void net_turn(td_net *n)
{
    for (int left = n->n_conns; left > 0 && n->dirty; left--) {
        td_conn *c = n->dirty;
        if (!(n->dirty = c->next_dirty)) n->dirty_tail = &n->dirty;
        c->dirty = false;
        conn_turn(c);
    }
}

/* A look at a drain; true: it is over. Once stopped, idle connections go at once and running answers may
 * finish. */
static bool drained(td_net *n)
{
    int64_t now = td_now_us();
    bool stopped = atomic_load(&n->stop);
    n->draining = true;
    if (stopped && !n->drain_end_us) {
        n->drain_end_us = now + n->o.drain_us;
        listen_end(n);
    }
    if (!stopped && now - n->drain_look_us < DRAIN_LOOK_US) return false;
    n->drain_look_us = now;
    for (td_conn *c = n->conns; c; c = c->next) conn_drain(c, now);
    net_turn(n);
    return stopped && (!n->conns || now >= n->drain_end_us);
}

void td_net_run(td_net *n)
{
    n->thread = pthread_self();
    atomic_store(&n->running, true);
    struct event *tick = NULL;
    for (;;) {
        event_base_loop(n->base, EVLOOP_ONCE | (n->dirty ? EVLOOP_NONBLOCK : 0));
        net_turn(n);
        if (!atomic_load(&n->stop) && !atomic_load(&n->drain)) continue;
        if (!tick) { /* drain conditions are also looked at without events */
            struct timeval tv = tv_of(DRAIN_LOOK_US);
            tick = event_new(n->base, -1, EV_PERSIST, on_sweep, n);
            if (tick) event_add(tick, &tv);
        }
        if (drained(n)) break;
    }
    while (n->conns) conn_free(n->conns);
    if (tick) event_free(tick);
    atomic_store(&n->running, false);
    run_posts(n);
}

void td_net_drain(td_net *n)
{
    atomic_store(&n->drain, true);
    td_wake_signal(n->wake_fd);
}

void td_net_stop(td_net *n)
{
    atomic_store(&n->stop, true);
    td_wake_signal(n->wake_fd);
}
