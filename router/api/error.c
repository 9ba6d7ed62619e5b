/* router/api/error.c - statuses, types and codes in one table. */
// SPDX-License-Identifier: Apache-2.0
#include "router/api/error.h"
#include "common/check.h"

#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static const struct { int status; const char *type; td_grpc_status grpc; } kinds[] = {
    {400, "invalid_request_error", TD_GRPC_INVALID_ARGUMENT},
    {401, "authentication_error", TD_GRPC_UNAUTHENTICATED},
    {404, "not_found_error", TD_GRPC_NOT_FOUND},
    {405, "invalid_request_error", TD_GRPC_UNIMPLEMENTED},
    {408, "timeout_error", TD_GRPC_DEADLINE},
    {413, "invalid_request_error", TD_GRPC_RESOURCE_EXHAUSTED},
    {415, "invalid_request_error", TD_GRPC_INVALID_ARGUMENT},
    {429, "rate_limit_error", TD_GRPC_RESOURCE_EXHAUSTED},
    {499, "client_closed", TD_GRPC_CANCELLED},
    {500, "server_error", TD_GRPC_INTERNAL},
    {501, "invalid_request_error", TD_GRPC_UNIMPLEMENTED},
    {503, "unavailable_error", TD_GRPC_UNAVAILABLE},
    {504, "timeout_error", TD_GRPC_DEADLINE},
};

static int kind_of(int status)
{
    for (unsigned i = 0; i < TD_COUNT(kinds); i++)
        if (kinds[i].status == status) return (int)i;
    return kind_of(status >= 500 ? 500 : 400);
}

bool td_api_fail(td_api_error *e, int status, const char *code, const char *param, const char *fmt, ...)
{
    *e = (td_api_error){.status = status, .type = kinds[kind_of(status)].type, .code = code};
    snprintf(e->param, sizeof e->param, "%s", param ? param : "");
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(e->message, sizeof e->message, fmt, ap);
    va_end(ap);
    return false;
}

void td_api_error_of_out(td_api_error *e, const td_out *o)
{
    static const struct { int status; const char *code; } of[] = {
        [TD_WHY_NONE] = {500, NULL},
        [TD_WHY_BAD] = {400, NULL},
        [TD_WHY_TOO_LONG] = {400, "context_length_exceeded"},
        [TD_WHY_QUEUE_FULL] = {429, "queue_full"},
        [TD_WHY_NO_WORKER] = {503, "no_worker"},
        [TD_WHY_DEADLINE] = {504, "deadline_exceeded"},
        [TD_WHY_CANCELLED] = {499, "cancelled"},
        [TD_WHY_DRAINING] = {503, "draining"},
        [TD_WHY_INTERNAL] = {500, "internal"},
    };
    unsigned w = (unsigned)o->why < TD_COUNT(of) ? (unsigned)o->why : 0;
    td_api_fail(e, of[w].status, of[w].code, NULL, "%s", o->reason ? o->reason : "");
    e->retry_s = (o->retry_ms + 999) / 1000;
}

void td_api_error_json(td_buf *out, const td_api_error *e)
{
    td_buf_str(out, "{\"error\": {\"message\": ");
    td_buf_json_str(out, e->message, strlen(e->message));
    td_buf_fmt(out, ", \"type\": \"%s\", \"param\": ", e->type);
    if (e->param[0]) td_buf_json_str(out, e->param, strlen(e->param));
    else td_buf_str(out, "null");
    if (e->code) td_buf_fmt(out, ", \"code\": \"%s\"}}", e->code);
    else td_buf_str(out, ", \"code\": null}}");
}

td_grpc_status td_api_error_grpc(const td_api_error *e)
{
    return kinds[kind_of(e->status)].grpc;
}

void td_api_error_body(void *arg, int status, const char *what, td_buf *out)
{
    (void)arg;
    td_api_error e;
    td_api_fail(&e, status, NULL, NULL, "%s", what);
    td_api_error_json(out, &e);
}
