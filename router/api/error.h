/* router/api/error.h - what a client is told when a request fails: HTTP status and OpenAI's error object, or
 * a gRPC status.
 *
 *   {"error": {"message": str, "type": str, "param": str|null, "code": str|null}}
 * Threads: pure. Source: OpenAI's API description, schema Error; reference notes, engines B3. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_API_ERROR_H
#define TD_ROUTER_API_ERROR_H

#include "common/buf.h"
#include "router/core/job.h"
#include "router/net/grpc_frame.h"

typedef struct td_api_error {
    int status;              /* HTTP */
    const char *type, *code; /* static; code NULL: null */
    char param[64];          /* "": null */
    char message[512];
    uint32_t retry_s;        /* Retry-After; 0: none */
} td_api_error;

/* Fills *e and returns false, so that a check can `return td_api_fail(...)`. param and code may be NULL. */
bool td_api_fail(td_api_error *e, int status, const char *code, const char *param, const char *fmt, ...)
    __attribute__((format(printf, 5, 6)));
void td_api_error_of_out(td_api_error *e, const td_out *failed);
void td_api_error_json(td_buf *out, const td_api_error *e);
td_grpc_status td_api_error_grpc(const td_api_error *e);
/* net's own errors (a bad request line, a body too large). */
void td_api_error_body(void *arg, int status, const char *what, td_buf *out);

#endif
