/* common/wire/sock.h - ZeroMQ sockets as this project uses them: ROUTER that binds, DEALER that connects. The
 * only user of zmq.h.
 *
 * Options set on every socket (reasons in README.md): ROUTER_MANDATORY, ROUTER_HANDOVER, IMMEDIATE, LINGER 0,
 * bounded HWM and message size, HANDSHAKE_IVL, RECONNECT_IVL with backoff, TCP keepalive, no ZMTP heartbeats
 * (ours are in control.proto), CURVE when keys are given.
 *
 * Rules:     1. send and recv never block. send: AGAIN (peer's queue full), EGONE (no such peer). A message
 *               has 1 or 2 parts.
 *            2. Readiness: wait for td_sock_fd() to become readable, then recv until AGAIN; after every send
 *               and before every wait ask td_sock_ready() (ZMQ_FD is edge-triggered): if true, do not sleep.
 * Ownership: recv's parts are borrowed until the next recv on (or the close of) that socket.
 * Threads:   a socket belongs to the thread that opened it; the context is shared. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_WIRE_SOCK_H
#define TD_COMMON_WIRE_SOCK_H

#include "common/status.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct td_zctx td_zctx;
typedef struct td_sock td_sock;

typedef struct td_curve {        /* NULL pointer where given: no encryption (loopback, ipc, --insecure) */
    uint8_t public_key[32], secret_key[32];
    uint8_t server_key[32];      /* connect side */
} td_curve;

typedef struct td_sock_opts {
    size_t max_message_bytes;    /* per part; larger ones drop the peer. Control 8 MiB, bulk frame + 64 KiB */
    int hwm;                     /* messages queued per peer and direction. Control 10000, bulk 64 */
    const td_curve *curve;
    int linger_ms;               /* how long close lets queued messages leave; 0: not at all */
    int send_buffer; /* bytes, of tcp: caps the window; 0: the system's choice */
} td_sock_opts;

td_zctx *td_zctx_open(void);
void td_zctx_close(td_zctx *z);
/* endpoint "tcp://127.0.0.1:0", "tcp://localhost:*" or "ipc:///path"; bound (at least 128 bytes) receives the
 * endpoint as bound. */
td_status td_sock_bind_router(td_zctx *z, const char *endpoint, const td_sock_opts *o, char *bound, size_t n,
                              td_sock **out);
td_status td_sock_connect_dealer(td_zctx *z, const char *endpoint, const void *identity, size_t id_bytes,
                                 const td_sock_opts *o, td_sock **out);
void td_sock_close(td_sock *s);
int td_sock_fd(const td_sock *s);
bool td_sock_ready(td_sock *s);  /* something to receive now */
/* DEALER: its peer is connected and has room (worth preparing a payload) */
bool td_sock_writable(td_sock *s);
bool td_sock_ready_or_room(td_sock *s); /* asked at once: a second question eats the first one's news */

typedef struct td_part { const void *p; size_t n; } td_part;
/* ROUTER: id names the peer; DEALER: id NULL. All or nothing. */
td_status td_sock_send(td_sock *s, const void *id, size_t id_bytes, const td_part *part, int n_parts);
/* Like send for one header part and one payload handed over without copying; free_fn(payload, hint) runs on a
 * ZeroMQ thread, also on failure. */
td_status td_sock_send_owned(td_sock *s, const void *id, size_t id_bytes, td_part head, void *payload,
                             size_t n, void (*free_fn)(void *payload, void *hint), void *hint);
/* id/id_bytes: sender (ROUTER only). At most 2 parts after the identity; others are dropped. */
td_status td_sock_recv(td_sock *s, td_part *id, td_part part[2], int *n_parts);

bool td_endpoint_is_local(const char *endpoint); /* ipc, or a loopback address */
/* An endpoint beyond this machine needs a key, unless the operator says it may be open. option: its name. */
td_status td_curve_required(const char *option, const char *endpoint, const td_curve *key, bool insecure);
/* Keys. A cluster has one key pair: every process holds the secret, connects with it, and a bound socket
 * accepts only clients that prove the same public key (ZAP). Files hold the 40 Z85 characters of a key; the
 * public one is derived. server_public_file NULL: the own key. */
td_status td_curve_load(td_curve *c, const char *secret_file, const char *server_public_file);
void td_curve_generate(td_curve *c); /* server_key = its own public key */
/* mode 0600 / 0644; either may be NULL */
td_status td_curve_save(const td_curve *c, const char *secret_file, const char *public_file);

#endif
