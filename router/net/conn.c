// SPDX-License-Identifier: Apache-2.0
/* Bytes between a socket and a protocol: edge-triggered flags in, one turn of work out; disconnects, slow
 * readers, timeouts. */
#include "common/check.h"
#include "common/clock.h"
#include "router/net/net_int.h"
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <openssl/err.h>
#include <poll.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

static const char PREFACE[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

void conn_touch(td_conn *c)
{
    if (c->dirty) return;
    c->dirty = true;
    c->next_dirty = NULL;
    *c->n->dirty_tail = c;
    c->n->dirty_tail = &c->next_dirty;
}

static void on_event(evutil_socket_t fd, short what, void *arg)
{
    td_conn *c = arg;
    (void)fd;
    if (what & EV_READ) c->readable = c->check_hup = true;
    if (what & EV_WRITE) c->writable = true;
    if (what & EV_CLOSED) c->hup = c->readable = true;
    if (c->ssl) c->readable = c->writable = true; /* TLS may wait for the other direction */
    conn_touch(c);
}

static void set_socket(int fd)
{
    int one = 1, idle_s = 60, every_s = 15, count = 4;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    int notsent = TD_NET_NOTSENT_BYTES;
    setsockopt(fd, IPPROTO_TCP, TCP_NOTSENT_LOWAT, &notsent, sizeof notsent);
    /* A peer that vanished without FIN is found within two minutes. */
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof one);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof idle_s);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &every_s, sizeof every_s);
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &count, sizeof count);
}

td_conn *conn_open(td_net *n, int fd, SSL *ssl, const char *peer, bool refused)
{
    td_conn *c = td_xalloc(sizeof *c);
    set_socket(fd);
    c->n = n;
    c->fd = fd;
    c->ssl = ssl;
    c->refused = refused;
    c->dead =
        event_assign(&c->ev, n->base, fd, EV_READ | EV_WRITE | EV_CLOSED | EV_ET | EV_PERSIST, on_event, c) ||
        event_add(&c->ev, NULL);
    for (size_t i = 0; i + 1 < sizeof c->peer && peer[i]; i++) c->peer[i] = peer[i];
    c->opened_us = c->active_us = c->progress_us = td_now_us();
    c->writable = true;
    td_buf_init(&c->in, TD_NET_PIPELINE_BYTES + TD_NET_READ_BYTES + sizeof PREFACE);
    outq_init(&c->out);
    c->next = n->conns;
    if (n->conns) n->conns->prev = c;
    n->conns = c;
    n->n_conns++;
    n->counts.accepted++;
    if (refused) {
        n->counts.refused++;
        h1_error(c, 503, "too many connections");
    }
    conn_touch(c);
    return c;
}

void conn_free(td_conn *c)
{
    td_net *n = c->n;
    c->dead = true; /* on_close handlers may still call exchanges of this connection; nothing comes of it */
    while (c->xs) {
        exchange_lost(c->xs);
        exchange_free(c->xs);
    }
    if (c->h2) nghttp2_session_del(c->h2);
    body_hold(n, &c->body_held, 0);
    if (c->h1) td_http1_deinit(c->h1);
    free(c->h1);
    event_del(&c->ev);
    if (c->ssl) SSL_free(c->ssl);
    close(c->fd);
    td_buf_deinit(&c->in);
    outq_deinit(&c->out);
    if (c->prev) c->prev->next = c->next;
    else n->conns = c->next;
    if (c->next) c->next->prev = c->prev;
    n->n_conns--;
    for (td_conn **d = &n->dirty; c->dirty && *d; d = &(*d)->next_dirty) { /* touched by its own on_close */
        if (*d != c) continue;
        if (!(*d = c->next_dirty)) n->dirty_tail = d;
        break;
    }
    free(c);
}

/* ---- bytes ---- */

enum { IO_AGAIN = -1, IO_LOST = -2 };

static ssize_t ssl_result(td_conn *c, int r)
{
    int e = SSL_get_error(c->ssl, r);
    if (e == SSL_ERROR_ZERO_RETURN) return 0;
    ERR_clear_error();
    return e == SSL_ERROR_WANT_READ || e == SSL_ERROR_WANT_WRITE ? IO_AGAIN : IO_LOST;
}

static ssize_t io_recv(td_conn *c, char *p, size_t n)
{
    if (c->ssl) {
        int r = SSL_read(c->ssl, p, (int)n);
        return r > 0 ? r : ssl_result(c, r);
    }
    ssize_t r;
    do r = recv(c->fd, p, n, 0);
    while (r < 0 && errno == EINTR);
    return r >= 0 ? r : errno == EAGAIN ? IO_AGAIN : IO_LOST;
}

static ssize_t io_send(td_conn *c, const char *p, size_t n)
{
    if (c->ssl) {
        int r = SSL_write(c->ssl, p, (int)TD_MIN(n, (size_t)1 << 20));
        return r > 0 ? r : ssl_result(c, r);
    }
    ssize_t r;
    do r = send(c->fd, p, n, MSG_NOSIGNAL);
    while (r < 0 && errno == EINTR);
    return r >= 0 ? r : errno == EAGAIN ? IO_AGAIN : IO_LOST;
}

/* ---- input ---- */

static void feed_h1(td_conn *c, const char *p, size_t n)
{
    size_t used = c->in.len || c->xs ? 0 : h1_consume(c, p, n);
    if (used < n) td_buf_add(&c->in, p + used, n - used);
}

/* HTTP/2 by prior knowledge announces itself with 24 fixed bytes that no HTTP/1.1 method begins with. */
static void feed_unknown(td_conn *c, const char *p, size_t n)
{
    if (!c->since_us) c->since_us = td_now_us();
    td_buf_add(&c->in, p, n);
    size_t seen = TD_MIN(c->in.len, sizeof PREFACE - 1);
    if (memcmp(c->in.p, PREFACE, seen)) {
        c->proto = PROTO_H1;
        c->since_us = 0;
    } else if (seen == sizeof PREFACE - 1) {
        c->proto = PROTO_H2;
        if (!h2_open(c)) {
            c->dead = true;
            return;
        }
        h2_input(c, c->in.p, c->in.len);
        td_buf_deinit(&c->in);
    }
}

static void feed(td_conn *c, const char *p, size_t n)
{
    if (c->closing) {
        c->lingered += n;
        if (c->lingered > TD_NET_LINGER_BYTES) c->dead = true;
        return;
    }
    if (c->proto == PROTO_UNKNOWN) feed_unknown(c, p, n);
    else if (c->proto == PROTO_H1) feed_h1(c, p, n);
    else h2_input(c, p, n);
}

static bool wants_input(const td_conn *c)
{
    if (c->closing) return true;
    if (c->proto == PROTO_H2) return outq_len(&c->out) < (size_t)TD_NET_WRITE_PER_TURN;
    return c->in.len < TD_NET_PIPELINE_BYTES;
}

/* While input is paused an edge tells of new bytes and of a lost peer alike; only the second matters. The
 * edge may also have come in the turn that paused. */
static bool peer_left(td_conn *c)
{
    if (!c->xs || !c->readable || c->eof || wants_input(c)) return false;
    if (c->check_hup) {
        struct pollfd p = {.fd = c->fd, .events = POLLRDHUP};
        c->check_hup = false;
        if (poll(&p, 1, 0) > 0 && (p.revents & (POLLRDHUP | POLLHUP | POLLERR))) c->hup = true;
    }
    return c->hup;
}

static void conn_read(td_conn *c)
{
    int reads = 0;
    while (c->readable && !c->eof && !c->dead && wants_input(c)) {
        if (reads++ == TD_NET_READS_PER_TURN) {
            conn_touch(c);
            return;
        }
        ssize_t r = io_recv(c, c->n->scratch, sizeof c->n->scratch);
        if (r > 0) {
            c->active_us = td_now_us();
            feed(c, c->n->scratch, (size_t)r);
        } else if (r == 0) {
            c->eof = true;
        } else if (r == IO_AGAIN) {
            c->readable = false;
        } else {
            c->dead = true;
        }
    }
}

/* The client's FIN: it will not read what is pending (most clients never half-close), so a pending answer is
 * cancelled; an answer that is already complete is still written. */
static void conn_eof(td_conn *c)
{
    if (c->xs || c->proto == PROTO_H2 || c->lingering) c->dead = true;
    else if (!c->in.len || c->proto == PROTO_UNKNOWN) c->closing = true;
    c->linger = false;
}

/* ---- output ---- */

static void conn_write(td_conn *c)
{
    size_t budget = TD_NET_WRITE_PER_TURN;
    for (;;) {
        if (c->proto == PROTO_H2) h2_fill(c);
        size_t n = outq_len(&c->out);
        if (!n || !c->writable || c->dead) return;
        if (!budget) {
            conn_touch(c);
            return;
        }
        ssize_t r = io_send(c, outq_ptr(&c->out), n);
        if (r > 0) {
            outq_sent(&c->out, (size_t)r);
            c->progress_us = td_now_us();
            budget -= TD_MIN(budget, (size_t)r);
        } else if (r == IO_AGAIN) {
            c->writable = false;
        } else {
            c->dead = true;
        }
    }
}

static void conn_settle(td_conn *c)
{
    if (c->proto == PROTO_H2 && !c->closing && h2_over(c)) c->closing = true;
    if (outq_len(&c->out)) return;
    if (c->closing && c->linger && !c->lingering) {
        /* Closing with unread input sends RST, and RST can destroy the answer before the client reads it. */
        c->lingering = true;
        c->linger_us = td_now_us() + TD_NET_LINGER_US;
        if (c->ssl) SSL_shutdown(c->ssl);
        shutdown(c->fd, SHUT_WR);
        if (c->eof) c->dead = true;
    } else if (c->closing && !c->linger) {
        c->dead = true;
    } else if (c->proto == PROTO_H1 && c->in.len && !c->xs) {
        conn_touch(c); /* the answers are out: go on with the pipelined rest */
    }
}

void conn_turn(td_conn *c)
{
    if (!c->dead) conn_read(c);
    if (!c->dead && c->proto == PROTO_H1) h1_turn(c);
    if (!c->dead && peer_left(c)) c->dead = true;
    if (!c->dead && c->eof) conn_eof(c);
    if (!c->dead) conn_write(c);
    if (!c->dead) conn_settle(c);
    if (c->dead) conn_free(c);
    else if (c->readable && !c->eof && wants_input(c))
        conn_touch(c); /* was paused: no edge will tell of what is already there */
}

/* ---- time ---- */

bool conn_slow(const td_conn *c, td_slow *s, size_t unsent, uint64_t sent, bool finished, int64_t now)
{
    const td_net_opts *o = &c->n->o;
    if (finished ? !unsent : unsent <= o->high_mark_bytes) {
        s->since_us = 0;
    } else if (!s->since_us || sent - s->sent >= o->high_mark_bytes / 16) {
        s->since_us = now;
        s->sent = sent;
    }
    if (!s->since_us || now - s->since_us <= o->slow_reader_us) return false;
    c->n->counts.slow_readers++;
    return true;
}

void conn_sweep(td_conn *c, int64_t now)
{
    const td_net_opts *o = &c->n->o;
    bool dead = c->lingering && now > c->linger_us;
    if (conn_slow(c, &c->slow, outq_len(&c->out), c->out.sent, !c->xs, now)) dead = true;
    if (c->ssl && !SSL_is_init_finished(c->ssl) && now - c->opened_us > o->header_us) dead = true;
    if (c->proto == PROTO_UNKNOWN && !c->closing)
        dead = dead || (c->since_us ? now - c->since_us > o->header_us : now - c->opened_us > o->idle_us);
    if (dead) {
        c->dead = true;
        conn_touch(c);
    } else if (c->proto == PROTO_H1 && !c->closing) {
        h1_sweep(c, now);
    } else if (c->proto == PROTO_H2) {
        h2_sweep(c, now);
    }
}

/* Idle ones stay until the listeners close: a request may be on its way, and gets an answer. */
void conn_drain(td_conn *c, int64_t now)
{
    bool stopped = c->n->drain_end_us != 0, fresh = c->proto == PROTO_UNKNOWN && now - c->opened_us < TD_NET_SETTLE_US;
    if (c->proto == PROTO_H2) h2_drain(c, now);
    else if (stopped && !fresh && !c->xs && !c->since_us && !c->in.len) c->closing = true;
    if (stopped) conn_touch(c);
}
