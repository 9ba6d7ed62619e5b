/* router/net/grpc_frame.h - gRPC over an exchange: one request message in, any number out, a status at the
 * end.
 *
 *   handler: td_grpc_open(x, &call) -> call.service, call.method, call.msg, call.timeout_us
 *            td_grpc_start(x)?  td_grpc_send(x, message)*  td_grpc_finish(x, status, "why")
 *
 * Rules:     1. td_grpc_open answers what is wrong by itself (415, UNIMPLEMENTED, INTERNAL, ...) and then
 *               returns false.
 *            2. finish without start is a trailers-only answer (one HEADERS frame).
 *            3. On TD_GRPC_DEADLINE queued messages are dropped, or the status would wait behind the client's
 *               flow control. A reset would reach the client as CANCELLED instead.
 *            4. Messages are never compressed; a compressed request is UNIMPLEMENTED.
 * Ownership: call's pointers are the exchange's request bytes. Threads: the net thread.
 * Source:    the gRPC over HTTP/2 protocol description (PROTOCOL-HTTP2). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_NET_GRPC_FRAME_H
#define TD_ROUTER_NET_GRPC_FRAME_H

#include "router/net/exchange.h"

typedef enum {
    TD_GRPC_OK = 0, TD_GRPC_CANCELLED = 1, TD_GRPC_UNKNOWN = 2, TD_GRPC_INVALID_ARGUMENT = 3,
    TD_GRPC_DEADLINE = 4, TD_GRPC_NOT_FOUND = 5, TD_GRPC_ALREADY_EXISTS = 6, TD_GRPC_PERMISSION_DENIED = 7,
    TD_GRPC_RESOURCE_EXHAUSTED = 8, TD_GRPC_FAILED_PRECONDITION = 9, TD_GRPC_ABORTED = 10,
    TD_GRPC_OUT_OF_RANGE = 11, TD_GRPC_UNIMPLEMENTED = 12,
    TD_GRPC_INTERNAL = 13, TD_GRPC_UNAVAILABLE = 14, TD_GRPC_DATA_LOSS = 15, TD_GRPC_UNAUTHENTICATED = 16
} td_grpc_status;

typedef struct td_grpc_call {
    char service[128];   /* "package.Service" */
    char method[64];
    int64_t timeout_us;  /* from grpc-timeout; INT64_MAX: none */
    const void *msg;     /* the one request message */
    size_t msg_len;
} td_grpc_call;

bool td_grpc_is(const td_exchange *x); /* HTTP/2 with content-type application/grpc...: call td_grpc_open */
bool td_grpc_open(td_exchange *x, td_grpc_call *call);
void td_grpc_start(td_exchange *x);
void td_grpc_send(td_exchange *x, const void *msg, size_t n); /* starts if needed */
void td_grpc_finish(td_exchange *x, td_grpc_status status, const char *message); /* UTF-8 or NULL */

/* The pure parts. */
bool td_grpc_content_type(const char *value); /* application/grpc or +proto, any parameters */
bool td_grpc_split_path(const char *path, td_grpc_call *call); /* "/package.Service/Method" */
bool td_grpc_timeout(const char *value, int64_t *us);          /* 1-8 digits and one of H M S m u n */
td_grpc_status td_grpc_deframe(const void *body, size_t n, const void **msg, size_t *len, const char **why);
void td_grpc_encode_message(td_buf *out, const char *text);     /* percent-encoding; at most 1 KiB of text */

#endif
