/* router/net/exchange.h - one HTTP request and its response, whatever carried it: HTTP/1.1, HTTP/2, TLS or
 * not.
 *
 *   listener --accept--> connection --parsed request--> td_exchange --handler--> api --> text pool, core
 *   core --events--> net thread --> td_exchange_start / write / finish --> socket
 *
 * An exchange is handed to the handler when its request is complete (headers and whole body). The handler
 * answers now or later, on the same net thread: from td_net_post() callbacks or channel drains. Between,
 * on_close may tell that the client left.
 *
 * Rules:   1. start once, then writes, then finish once. reply() is start + write + finish.
 *          2. After on_close, or after finish, the pointer is dead. on_close is called exactly once for every
 *             exchange that was handed over and not finished or aborted by us; never after that.
 *          3. write queues; bytes above the high mark (unsent() > limit) mean a slow reader: the caller
 *             decides. Net ends it after slow_reader_us above the mark without progress, or at 16 marks.
 *          4. Errors found while parsing (400, 408, 413, 414, 417, 431, 501, 503, 505) are answered by net
 *             itself with the body made by opts.error_body (gRPC: with a status), and never reach the
 *             handler.
 * Ownership: net owns the exchange; request bytes are borrowed until finish/on_close. `user` is the
 *            handler's.
 * Threads:   everything on the net thread that owns the connection, except td_net_post, td_net_drain and
 *            td_net_stop.
 * Limits:    td_net_opts; each has its own answer (431 header flood, 413 body, 503 connections). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_NET_EXCHANGE_H
#define TD_ROUTER_NET_EXCHANGE_H

#include "common/buf.h"
#include "common/status.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct td_net td_net;           /* one net thread: event loop, listeners, connections */
typedef struct td_exchange td_exchange;

typedef struct td_header { const char *name, *value; } td_header; /* NUL-terminated */

typedef struct td_net_opts {
    const char *host;            /* address to bind */
    int port;                    /* HTTP/1.1 and h2 (told by the first bytes, on every port); 0: a free one */
    int grpc_port;               /* same protocols; second listener; -1 none */
    size_t max_body_bytes;       /* 8 MiB */
    size_t max_header_bytes;     /* 32 KiB, all header lines of a request */
    int max_connections;         /* 10000 */
    int max_streams;             /* 256 concurrent HTTP/2 streams per connection */
    int64_t idle_us, header_us, body_us, slow_reader_us; /* 75 s, 10 s, 60 s, 30 s */
    size_t high_mark_bytes;      /* 1 MiB unsent response bytes */
    int64_t drain_us;            /* 30 s: after td_net_stop, how long running exchanges may go on */
    bool reuse_port;             /* several net threads on one port; else a second server is an error */
    const char *tls_cert_file;   /* PEM, with tls_key_file: TLS 1.2+ on both ports; NULL: plain */
    const char *tls_key_file;    /* both are read again when they change */
    const char *tls_client_ca_file; /* PEM; clients must show a certificate of this authority; NULL: no */
    void (*handler)(void *arg, td_exchange *x);
    void (*error_body)(void *arg, int status, const char *what, td_buf *out); /* JSON, for net's own errors */
    void *arg;
} td_net_opts;

/* Since the start of the thread; read on the net thread (from a post or a timer). */
typedef struct td_net_counts {
    uint64_t accepted, refused, requests, errors, lost, slow_readers, timeouts; /* lost: on_close calls */
    int connections, exchanges;                                                 /* now */
    size_t body_bytes;                                                          /* request bytes held now */
} td_net_counts;

/* Fills every 0 in the limits and times with the value in the comment above. */
td_status td_net_open(const td_net_opts *o, td_net **out); /* binds and listens */
void td_net_get_counts(const td_net *n, td_net_counts *out);
void td_net_ports(const td_net *n, int *port, int *grpc_port); /* as bound */
void td_net_run(td_net *n);                                /* the thread's body: returns after td_net_stop */
/* Both: any thread, also a signal handler. Drain: answers say Connection: close, HTTP/2 connections get GOAWAY,
 * but who comes is still let in and answered: a refused connection would be an error at a load balancer that
 * has not noticed yet. Stop (after drain or without it): stop accepting, close idle connections; run returns
 * when all are closed or after drain_us (then on_close for what is left). */
void td_net_drain(td_net *n);
void td_net_stop(td_net *n);
void td_net_close(td_net *n); /* after td_net_run returned (or without it) */
/* Run fn(arg) on the net thread soon; any thread; never lost. */
void td_net_post(td_net *n, void (*fn)(void *), void *arg);
/* Watch an eventfd (a td_chan's): fn runs on the net thread whenever it is readable. Before td_net_run. */
td_status td_net_watch(td_net *n, int fd, void (*fn)(void *), void *arg);
/* Call fn every period_us on the net thread. Before td_net_run. */
td_status td_net_every(td_net *n, int64_t period_us, void (*fn)(void *), void *arg);

/* The request. */
const char *td_exchange_method(const td_exchange *x);
const char *td_exchange_path(const td_exchange *x);  /* without query */
const char *td_exchange_query(const td_exchange *x); /* "" if none */
const char *td_exchange_header(const td_exchange *x, const char *lower_name); /* NULL if absent */
const char *td_exchange_body(const td_exchange *x, size_t *n);
const char *td_exchange_peer(const td_exchange *x);  /* "127.0.0.1:1234" */
bool td_exchange_is_h2(const td_exchange *x);
int64_t td_exchange_received_us(const td_exchange *x); /* when the request was complete */

void td_exchange_drop_body(td_exchange *x); /* the handler has copied it: free it before a long answer */

/* The response. Header values are copied. Content-Length is added when finish comes in the same loop turn as
 * start; otherwise chunked on HTTP/1.1. Trailers only on HTTP/2 (gRPC); NULL or n = 0 for none. A
 * trailers-only answer is td_exchange_reply with len 0: one HEADERS frame with END_STREAM. */
void td_exchange_start(td_exchange *x, int status, const td_header *h, size_t n);
void td_exchange_write(td_exchange *x, const void *p, size_t n);
void td_exchange_finish(td_exchange *x, const td_header *trailers, size_t n);
void td_exchange_reply(td_exchange *x, int status, const td_header *h, size_t n, const void *body,
                       size_t len);
void td_exchange_abort(td_exchange *x); /* drop the connection / RST_STREAM; no on_close */
bool td_exchange_started(const td_exchange *x);
size_t td_exchange_unsent(const td_exchange *x);
void td_exchange_drop_unsent(td_exchange *x); /* h2: forget queued DATA, so that trailers need not wait */

void td_exchange_set_user(td_exchange *x, void *user, void (*on_close)(void *user));

#endif
