/* router/net/net_int.h - what the files of router/net share: the thread, the connection, the exchange.
 *
 *   net.c  loop, posts, timers, drain    listen.c  accept, limits, EMFILE    conn.c      bytes, timeouts
 *   h1.c   HTTP/1.1 on a connection      h2.c      HTTP/2 on a connection    exchange.c  the public calls
 *
 * The model: callbacks only set flags and put the connection on the dirty list. All reading, parsing,
 * framing, writing and closing is done by conn_turn(), once per loop turn after the events. So the writes of
 * a turn leave in one send(), and no connection is freed below a handler's feet.
 * Rules:     1. Only conn_turn() and td_net_close() free a connection. Others set c->dead and conn_touch().
 *            2. Sockets are edge-triggered: readable/writable stay true until EAGAIN. Pausing is not reading.
 *            3. An HTTP/1.1 exchange is freed by finish/abort, an HTTP/2 one when nghttp2 closes the
 *               stream. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_NET_NET_INT_H
#define TD_ROUTER_NET_NET_INT_H

#include "common/buf.h"
#include "router/net/exchange.h"
#include "router/net/head.h"
#include "router/net/http1.h"
#include <event2/event.h>
#include <event2/event_struct.h>
#include <nghttp2/nghttp2.h>
#include <openssl/ssl.h>
#include <pthread.h>
#include <stdatomic.h>

enum {
    TD_NET_READ_BYTES = 64 << 10,     /* one recv */
    TD_NET_READS_PER_TURN = 4,
    TD_NET_PIPELINE_BYTES = 32 << 10, /* unparsed bytes kept while a response is pending */
    TD_NET_REQUESTS_PER_TURN = 16,    /* of one connection, then the others get their turn */
    TD_NET_WRITE_PER_TURN = 1 << 20,
    TD_NET_NOTSENT_BYTES = 256 << 10, /* unsent bytes in the kernel; more stays here, counted */
    TD_NET_H2_FILL_BYTES = 64 << 10,  /* frames made ahead of the socket: what cannot be dropped any more */
    TD_NET_OVERFLOW_MARKS = 16,       /* unsent above this many high marks: the connection is dropped */
    TD_NET_REFUSED_CONNECTIONS = 64,  /* over max_connections, being told 503 */
    TD_NET_LINGER_BYTES = 16 << 20,
    TD_NET_LINGER_US = 2000000,
    TD_NET_SETTLE_US = 100000,        /* a round trip: what a client sent before it heard of a drain has arrived */
    TD_NET_POSTS = 65536,
    TD_NET_BODY_BUDGET = 32,          /* request bytes held by the thread, in units of max_body_bytes */
};

/* Bytes on their way out; the front is dropped by moving an offset. */
typedef struct td_outq {
    td_buf b;
    size_t off;
    uint64_t sent; /* bytes ever dropped as sent */
} td_outq;

void outq_init(td_outq *q);
void outq_deinit(td_outq *q);
static inline size_t outq_len(const td_outq *q) { return q->b.len - q->off; }
static inline const char *outq_ptr(const td_outq *q) { return q->b.p + q->off; }
void outq_sent(td_outq *q, size_t n);
void outq_clear(td_outq *q);

/* Slow reader watch: above the limit, a window of slow_reader_us must move at least high_mark/16 bytes. */
typedef struct td_slow {
    int64_t since_us; /* 0: not above */
    uint64_t sent;
} td_slow;

typedef enum { PROTO_UNKNOWN, PROTO_H1, PROTO_H2 } td_proto;
typedef struct td_conn td_conn;

struct td_exchange {
    td_conn *c;
    td_exchange *next, *prev; /* of the connection */
    int32_t stream_id;        /* 0 on HTTP/1.1 */
    td_head req;
    td_buf body;
    size_t body_held; /* bytes counted in n->body_bytes */
    int64_t created_us, received_us;
    int64_t ended_us; /* h2: our END_STREAM is sent, the client's is missing */
    bool head_done;   /* h2: the header block is complete */
    bool client_end;  /* h2: END_STREAM received */
    bool handed;      /* the handler has it: on_close is owed until finish */
    bool started, finished, gone;
    bool head_sent;   /* h1: status line is framed; h2: HEADERS are submitted */
    bool deferred;    /* h2: the data provider sleeps */
    bool reset;       /* h2: RST_STREAM is submitted */
    bool trailers_sent, no_body, chunked;
    size_t list_bytes; /* h2: header list size so far */
    int bad_status;    /* h2: error found while reading the headers */
    int status;
    uint64_t discarded; /* no_body: what the body would have been */
    td_buf fields;     /* h1: response header lines */
    td_outq out;       /* response body bytes not framed yet */
    td_head trailers;
    td_slow slow;
    void *user;
    void (*on_close)(void *user);
};

struct td_conn {
    td_net *n;
    td_conn *next, *prev;
    td_conn *next_dirty;
    int fd;
    SSL *ssl; /* NULL: plain */
    struct event ev;
    char peer[64];
    td_proto proto;
    bool dirty, readable, writable, hup, check_hup;
    bool eof;
    bool dead;      /* free it at the next turn */
    bool closing;   /* no more requests: close when everything is written */
    bool linger;    /* then wait for the peer's FIN, so that it can read our last answer */
    bool lingering;
    bool keep;      /* h1: the request now being answered allows another one */
    bool v11, refused;
    size_t lingered;
    td_buf in;      /* bytes not parsed yet */
    td_outq out;
    int64_t opened_us, active_us, progress_us, since_us, head_us, linger_us;
    td_slow slow;
    td_exchange *xs;
    int n_xs;
    td_http1 *h1;
    size_t body_held; /* h1: bytes of an incomplete body counted in n->body_bytes */
    nghttp2_session *h2;
    bool h2_notice, h2_goaway; /* GOAWAYs sent */
    int64_t h2_notice_us;
};

typedef struct td_post { void (*fn)(void *); void *arg; } td_post;
typedef struct td_watch {
    struct td_watch *next;
    td_net *n;
    struct event *ev;
    void (*fn)(void *);
    void *arg;
} td_watch;

struct td_net {
    td_net_opts o;
    char *host;
    struct event_base *base;
    struct event *wake_ev, *sweep_ev;
    int wake_fd, reserve_fd;
    int listen_fd[2], port[2];
    struct event *listen_ev[2];
    int64_t accept_log_us;
    td_conn *conns;
    int n_conns, n_exchanges;
    td_conn *dirty, **dirty_tail;
    size_t body_bytes;
    td_watch *watches;
    int64_t date_s;
    char date[40];
    nghttp2_session_callbacks *h2_cb;
    nghttp2_option *h2_opt;
    SSL_CTX *tls; /* NULL: plain */
    char *tls_file[3];
    int64_t tls_changed_us, tls_looked_us;
    td_net_counts counts;
    char scratch[TD_NET_READ_BYTES];

    atomic_bool drain, stop;
    atomic_bool running;
    bool draining;
    int64_t drain_end_us;  /* 0: not stopped yet */
    int64_t drain_look_us;
    pthread_t thread;
    pthread_mutex_t mutex; /* guards the posts */
    pthread_cond_t room;
    td_post *posts;
    size_t n_posts, cap_posts;
};

/* net.c */
const char *net_date(td_net *n);
/* listen.c */
td_status listen_open(td_net *n);
void listen_close(td_net *n);
void listen_end(td_net *n); /* takes in who has connected already, then closes */
/* tls.c */
td_status tls_open(td_net *n);
void tls_close(td_net *n);
void tls_sweep(td_net *n, int64_t now);
SSL *tls_accept(td_net *n, int fd); /* NULL: out of memory */
/* conn.c */
td_conn *conn_open(td_net *n, int fd, SSL *ssl, const char *peer, bool refused); /* takes fd and ssl */
void conn_touch(td_conn *c);
void conn_turn(td_conn *c);
void conn_free(td_conn *c); /* on_close for every exchange handed over */
void conn_sweep(td_conn *c, int64_t now);
void conn_drain(td_conn *c, int64_t now);
bool conn_slow(const td_conn *c, td_slow *s, size_t unsent, uint64_t sent, bool finished, int64_t now);
/* exchange.c */
td_exchange *exchange_new(td_conn *c, int32_t stream_id);
void exchange_free(td_exchange *x);
void exchange_hand(td_exchange *x);  /* complete: counts, stamps, calls the handler */
void exchange_lost(td_exchange *x);  /* on_close if owed */
bool body_hold(td_net *n, size_t *held, size_t now); /* request bytes; false: budget is spent */
void exchange_write_parts(td_exchange *x, const char *a, size_t na, const char *b, size_t nb, const char *c,
                          size_t nc);
/* h1.c */
size_t h1_consume(td_conn *c, const char *p, size_t n); /* returns bytes used */
void h1_turn(td_conn *c);
void h1_error(td_conn *c, int status, const char *what);
void h1_finish(td_exchange *x);
void h1_sweep(td_conn *c, int64_t now);
/* h2.c */
td_status h2_setup(td_net *n);
bool h2_open(td_conn *c);
void h2_input(td_conn *c, const char *p, size_t n);
void h2_fill(td_conn *c); /* frames into c->out, up to TD_NET_H2_FILL_BYTES */
void h2_start(td_exchange *x, const td_header *h, size_t n, bool end, bool has_length, size_t length);
void h2_kick(td_exchange *x); /* there is something new for the data provider */
void h2_finish(td_exchange *x, const td_header *trailers, size_t n);
void h2_reset(td_exchange *x, uint32_t code);
void h2_error(td_exchange *x, int status, const char *what);
void h2_sweep(td_conn *c, int64_t now);
void h2_drain(td_conn *c, int64_t now);
bool h2_over(const td_conn *c);

#endif
