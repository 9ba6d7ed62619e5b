// SPDX-License-Identifier: Apache-2.0
/* common/wire/sock.c - see sock.h. Why each option is set is in README.md. */
#include "common/wire/sock.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/rng.h"
#include "common/wire/zap.h"
#include <arpa/inet.h>
#include <errno.h>
#include <netdb.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <zmq.h>

enum { BACKLOG = 1024, HANDSHAKE_MS = 3000, RECONNECT_MS = 20, RECONNECT_MAX_MS = 2000,
       CONNECT_TIMEOUT_MS = 3000, TCP_MAXRT_MS = 5000 };

struct td_zctx {
    void *ctx;
    td_zap *zap;
};

struct td_sock {
    void *s;
    bool router;
    bool open[3];      /* msg[i] is initialized */
    zmq_msg_t msg[3];  /* identity, part 0, part 1 of the last received message */
};

td_zctx *td_zctx_open(void)
{
    td_zctx *z = td_xalloc(sizeof *z);
    z->ctx = zmq_ctx_new();
    TD_CHECK(z->ctx);
    (void)zmq_ctx_set(z->ctx, ZMQ_MAX_SOCKETS, 4096);
    return z;
}

void td_zctx_close(td_zctx *z)
{
    if (!z) return;
    td_zap_stop(z->zap);
    while (zmq_ctx_term(z->ctx) && errno == EINTR) {}
    free(z);
}

static bool set_int(void *s, int option, int v)
{
    return !zmq_setsockopt(s, option, &v, sizeof v);
}

/* Dual stack for names, "*" and IPv6; a plain IPv4 address stays what it is in the endpoint that is told to
 * others. */
static bool is_ipv4(const char *endpoint)
{
    return !strncmp(endpoint, "tcp://", 6) && endpoint[6] >= '0' && endpoint[6] <= '9' &&
        !strchr(endpoint, '[');
}

static bool set_common(void *s, const char *endpoint, const td_sock_opts *o)
{
    int64_t max = (int64_t)o->max_message_bytes;
    return set_int(s, ZMQ_LINGER, o->linger_ms) && set_int(s, ZMQ_SNDHWM, o->hwm) &&
        set_int(s, ZMQ_RCVHWM, o->hwm) && !zmq_setsockopt(s, ZMQ_MAXMSGSIZE, &max, sizeof max) &&
        set_int(s, ZMQ_HANDSHAKE_IVL, HANDSHAKE_MS) && set_int(s, ZMQ_TCP_KEEPALIVE, 1) &&
        set_int(s, ZMQ_TCP_KEEPALIVE_IDLE, 10) && set_int(s, ZMQ_TCP_KEEPALIVE_INTVL, 5) &&
        set_int(s, ZMQ_TCP_KEEPALIVE_CNT, 3) && set_int(s, ZMQ_TCP_MAXRT, TCP_MAXRT_MS) &&
        set_int(s, ZMQ_IPV6, !is_ipv4(endpoint)) &&
        set_int(s, ZMQ_SNDBUF, o->send_buffer ? o->send_buffer : -1);
}

static bool set_router(void *s, const td_curve *curve)
{
    if (!set_int(s, ZMQ_ROUTER_MANDATORY, 1) || !set_int(s, ZMQ_ROUTER_HANDOVER, 1) ||
        !set_int(s, ZMQ_BACKLOG, BACKLOG)) return false;
    if (!curve) return true;
    return set_int(s, ZMQ_CURVE_SERVER, 1) && !zmq_setsockopt(s, ZMQ_CURVE_SECRETKEY, curve->secret_key,
                                                              32) && !zmq_setsockopt(s, ZMQ_ZAP_DOMAIN,
                                                                  TD_ZAP_DOMAIN, strlen(TD_ZAP_DOMAIN));
}

/* The first reconnect is spread over 20..40 ms (doubling to RECONNECT_MAX_MS), so that a cluster does not
 * return to a restarted router all at once. */
static bool set_dealer(void *s, const td_curve *curve)
{
    uint32_t r[4], key[2] = {(uint32_t)(uintptr_t)s, (uint32_t)td_now_us()};
    td_philox4x32((uint32_t[4]){0}, key, r);
    if (!set_int(s, ZMQ_IMMEDIATE, 1) || !set_int(s, ZMQ_RECONNECT_IVL,
                                                  RECONNECT_MS + (int)(r[0] % RECONNECT_MS)) ||
                                                  !set_int(s, ZMQ_RECONNECT_IVL_MAX, RECONNECT_MAX_MS) ||
                                                  !set_int(s, ZMQ_CONNECT_TIMEOUT, CONNECT_TIMEOUT_MS))
        return false;
    if (!curve) return true;
    return !zmq_setsockopt(s, ZMQ_CURVE_SERVERKEY, curve->server_key, 32) &&
           !zmq_setsockopt(s, ZMQ_CURVE_PUBLICKEY, curve->public_key, 32) &&
           !zmq_setsockopt(s, ZMQ_CURVE_SECRETKEY, curve->secret_key, 32);
}

static td_status open_sock(td_zctx *z, int type, const char *endpoint, const td_sock_opts *o, td_sock **out)
{
    void *s = zmq_socket(z->ctx, type);
    if (!s) return td_fail(TD_EFULL, "socket: %s", zmq_strerror(errno));
    bool ok = o->hwm > 0 && o->max_message_bytes > 0 && set_common(s, endpoint, o) &&
              (type == ZMQ_ROUTER ? set_router(s, o->curve) : set_dealer(s, o->curve));
    if (!ok) {
        td_status st = td_fail(TD_EIO, "socket options: %s", zmq_strerror(errno));
        zmq_close(s);
        return st;
    }
    td_sock *k = td_xalloc(sizeof *k);
    k->s = s;
    k->router = type == ZMQ_ROUTER;
    *out = k;
    return TD_OK;
}

/* ZeroMQ binds to numbers and names of interfaces; of a host's name it says "No such device". Here it means the
 * address that it has. */
static bool bind_name(void *s, const char *endpoint)
{
    char host[256], text[INET_ADDRSTRLEN], numeric[320];
    const char *at = endpoint + 6, *colon = strrchr(endpoint, ':');
    struct addrinfo hints = {.ai_family = AF_INET, .ai_socktype = SOCK_STREAM}, *found = NULL;
    if (strncmp(endpoint, "tcp://", 6) || !colon || colon <= at || (size_t)(colon - at) >= sizeof host)
        return false;
    snprintf(host, sizeof host, "%.*s", (int)(colon - at), at);
    if (getaddrinfo(host, NULL, &hints, &found)) return false;
    const struct sockaddr_in *a = (const void *)found->ai_addr;
    inet_ntop(AF_INET, &a->sin_addr, text, sizeof text);
    freeaddrinfo(found);
    snprintf(numeric, sizeof numeric, "tcp://%s%s", text, colon);
    return zmq_bind(s, numeric) == 0;
}

td_status td_sock_bind_router(td_zctx *z, const char *endpoint, const td_sock_opts *o, char *bound, size_t n,
                              td_sock **out)
{
    if (o->curve) {
        /* Without a handler CURVE lets any client key in: it has to stand before the socket is bound. */
        if (!z->zap) TD_TRY(td_zap_start(z->ctx, &z->zap));
        TD_TRY(td_zap_allow(z->zap, o->curve->public_key));
    }
    td_sock *s;
    TD_TRY(open_sock(z, ZMQ_ROUTER, endpoint, o, &s));
    int why = zmq_bind(s->s, endpoint) ? errno : 0;
    if (why && !(why == ENODEV && bind_name(s->s, endpoint))) {
        td_status st = td_fail(TD_EIO, "bind %s: %s", endpoint,
                               why == ENODEV ? "no address of this host" : zmq_strerror(why));
        td_sock_close(s);
        return st;
    }
    if (bound && zmq_getsockopt(s->s, ZMQ_LAST_ENDPOINT, bound, &n)) {
        td_status st = td_fail(TD_EIO, "bound endpoint of %s: %s", endpoint, zmq_strerror(errno));
        td_sock_close(s);
        return st;
    }
    *out = s;
    return TD_OK;
}

td_status td_sock_connect_dealer(td_zctx *z, const char *endpoint, const void *identity, size_t id_bytes,
                                 const td_sock_opts *o, td_sock **out)
{
    td_sock *s;
    TD_TRY(open_sock(z, ZMQ_DEALER, endpoint, o, &s));
    if ((id_bytes && zmq_setsockopt(s->s, ZMQ_ROUTING_ID, identity, id_bytes)) || zmq_connect(s->s, endpoint))
        {
        td_status st = td_fail(TD_EIO, "connect %s: %s", endpoint, zmq_strerror(errno));
        td_sock_close(s);
        return st;
    }
    *out = s;
    return TD_OK;
}

static void release(td_sock *s)
{
    for (int i = 0; i < 3; i++) {
        if (s->open[i]) zmq_msg_close(&s->msg[i]);
        s->open[i] = false;
    }
}

void td_sock_close(td_sock *s)
{
    if (!s) return;
    release(s);
    zmq_close(s->s);
    free(s);
}

int td_sock_fd(const td_sock *s)
{
    int fd = -1;
    size_t n = sizeof fd;
    (void)zmq_getsockopt(s->s, ZMQ_FD, &fd, &n);
    return fd;
}

static int events_of(td_sock *s)
{
    int events = 0;
    size_t n = sizeof events;
    while (zmq_getsockopt(s->s, ZMQ_EVENTS, &events, &n) && errno == EINTR) {}
    return events;
}

bool td_sock_ready(td_sock *s)
{
    return events_of(s) & ZMQ_POLLIN;
}

bool td_sock_writable(td_sock *s)
{
    return events_of(s) & ZMQ_POLLOUT;
}

bool td_sock_ready_or_room(td_sock *s)
{
    return events_of(s) & (ZMQ_POLLIN | ZMQ_POLLOUT);
}

/* ---- sending ---- */
static td_status send_status(const td_sock *s, bool first)
{
    if (errno == EHOSTUNREACH) return TD_EGONE;
    if (errno == EAGAIN && first) return TD_AGAIN;
    return td_fail(TD_EIO, "send on %s: %s", s->router ? "router" : "dealer", zmq_strerror(errno));
}

static int send_part(td_sock *s, const void *p, size_t n, bool more)
{
    int rc;
    while ((rc = zmq_send(s->s, p, n, ZMQ_DONTWAIT | (more ? ZMQ_SNDMORE : 0))) < 0 && errno == EINTR) {}
    return rc;
}

/* ZeroMQ decides at the first part whether the peer exists and has room; the others follow into the same
 * pipe. */
static td_status send_id(td_sock *s, const void *id, size_t id_bytes)
{
    if (!s->router) return TD_OK;
    return send_part(s, id, id_bytes, true) < 0 ? send_status(s, true) : TD_OK;
}

td_status td_sock_send(td_sock *s, const void *id, size_t id_bytes, const td_part *part, int n_parts)
{
    TD_CHECK(n_parts >= 1 && n_parts <= 2 && s->router == (id != NULL));
    td_status st = send_id(s, id, id_bytes);
    if (st != TD_OK) return st;
    for (int i = 0; i < n_parts; i++)
        if (send_part(s, part[i].p, part[i].n, i + 1 < n_parts) < 0)
            return send_status(s, i == 0 && !s->router);
    return TD_OK;
}

td_status td_sock_send_owned(td_sock *s, const void *id, size_t id_bytes, td_part head, void *payload,
                             size_t n, void (*free_fn)(void *payload, void *hint), void *hint)
{
    TD_CHECK(s->router == (id != NULL));
    zmq_msg_t m;
    if (zmq_msg_init_data(&m, payload, n, free_fn, hint)) {
        free_fn(payload, hint);
        return td_fail(TD_EIO, "message of %zu bytes: %s", n, zmq_strerror(errno));
    }
    td_status st = send_id(s, id, id_bytes);
    if (st == TD_OK && send_part(s, head.p, head.n, true) < 0) st = send_status(s, !s->router);
    if (st == TD_OK) {
        int rc;
        while ((rc = zmq_msg_send(&m, s->s, ZMQ_DONTWAIT)) < 0 && errno == EINTR) {}
        if (rc < 0) st = send_status(s, false);
    }
    if (st != TD_OK) zmq_msg_close(&m); /* calls free_fn */
    return st;
}

/* ---- receiving ---- */
static int recv_part(td_sock *s, zmq_msg_t *m)
{
    int rc;
    zmq_msg_init(m);
    while ((rc = zmq_msg_recv(m, s->s, ZMQ_DONTWAIT)) < 0 && errno == EINTR) {}
    if (rc < 0) zmq_msg_close(m);
    return rc;
}

static void drop_rest(td_sock *s, bool more)
{
    while (more) {
        zmq_msg_t m;
        if (recv_part(s, &m) < 0) return;
        more = zmq_msg_more(&m);
        zmq_msg_close(&m);
    }
}

static td_part view(zmq_msg_t *m)
{
    return (td_part){.p = zmq_msg_data(m), .n = zmq_msg_size(m)};
}

td_status td_sock_recv(td_sock *s, td_part *id, td_part part[2], int *n_parts)
{
    for (;;) {
        release(s);
        int first = s->router ? 0 : 1, i = first;
        bool more = true;
        for (; more && i < 3; i++) {
            if (recv_part(s, &s->msg[i]) < 0) {
                if (i > first || errno != EAGAIN) return td_fail(TD_EIO, "receive: %s", zmq_strerror(errno));
                return TD_AGAIN;
            }
            s->open[i] = true;
            more = zmq_msg_more(&s->msg[i]);
        }
        if (more || i == 1) { /* too many parts, or an identity without a body */
            drop_rest(s, more);
            continue;
        }
        if (id) *id = s->router ? view(&s->msg[0]) : (td_part){0};
        part[0] = view(&s->msg[1]);
        part[1] = i == 3 ? view(&s->msg[2]) : (td_part){0};
        *n_parts = i - 1;
        return TD_OK;
    }
}

