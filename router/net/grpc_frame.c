// SPDX-License-Identifier: Apache-2.0
#include "router/net/grpc_frame.h"
#include "common/check.h"
#include "router/net/net_int.h"
#include <stdio.h>
#include <string.h>
#include <strings.h>

enum { PREFIX_BYTES = 5, MAX_MESSAGE_TEXT = 1024 };

bool td_grpc_content_type(const char *value)
{
    static const char base[] = "application/grpc";
    if (!value || strncasecmp(value, base, sizeof base - 1)) return false;
    value += sizeof base - 1;
    if (!strncasecmp(value, "+proto", 6)) value += 6;
    return !*value || *value == ';' || *value == ' ';
}

bool td_grpc_is(const td_exchange *x)
{
    const char *type = td_exchange_header(x, "content-type");
    return x->stream_id && type && !strncasecmp(type, "application/grpc", 16);
}

static bool is_name(const char *p, size_t n, size_t max)
{
    if (!n || n >= max) return false;
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)p[i] <= 0x20 || (unsigned char)p[i] >= 0x7f) return false;
    return true;
}

bool td_grpc_split_path(const char *path, td_grpc_call *call)
{
    if (*path != '/') return false;
    const char *service = path + 1, *slash = strchr(service, '/');
    if (!slash || strchr(slash + 1, '/')) return false;
    size_t ns = (size_t)(slash - service), nm = strlen(slash + 1);
    if (!is_name(service, ns, sizeof call->service) || !is_name(slash + 1, nm, sizeof call->method))
        return false;
    memcpy(call->service, service, ns);
    call->service[ns] = 0;
    memcpy(call->method, slash + 1, nm + 1);
    return true;
}

bool td_grpc_timeout(const char *value, int64_t *us)
{
    int64_t v = 0;
    int digits = 0;
    for (; *value >= '0' && *value <= '9'; value++) {
        if (++digits > 8) return false;
        v = v * 10 + (*value - '0');
    }
    if (!digits || !value[0] || value[1]) return false;
    switch (value[0]) {
    case 'H': v *= 3600000000; break; /* 8 digits of hours stay below 2^59 us */
    case 'M': v *= 60000000; break;
    case 'S': v *= 1000000; break;
    case 'm': v *= 1000; break;
    case 'u': break;
    case 'n': v = (v + 999) / 1000; break;
    default: return false;
    }
    *us = v;
    return true;
}

td_grpc_status td_grpc_deframe(const void *body, size_t n, const void **msg, size_t *len, const char **why)
{
    const unsigned char *p = body;
    if (n < PREFIX_BYTES) {
        *why = n ? "request message cut short" : "the request has no message";
        return TD_GRPC_INTERNAL;
    }
    size_t k = (size_t)p[1] << 24 | (size_t)p[2] << 16 | (size_t)p[3] << 8 | p[4];
    if (p[0] > 1) {
        *why = "bad message prefix";
        return TD_GRPC_INTERNAL;
    }
    if (k != n - PREFIX_BYTES) {
        *why = k > n - PREFIX_BYTES ? "request message cut short" : "one request message expected, more came";
        return k > n - PREFIX_BYTES ? TD_GRPC_INTERNAL : TD_GRPC_UNIMPLEMENTED;
    }
    if (p[0] == 1) {
        *why = "compressed messages are not supported";
        return TD_GRPC_UNIMPLEMENTED;
    }
    *msg = p + PREFIX_BYTES;
    *len = k;
    return TD_GRPC_OK;
}

void td_grpc_encode_message(td_buf *out, const char *text)
{
    for (int i = 0; text[i] && i < MAX_MESSAGE_TEXT; i++) {
        unsigned char b = (unsigned char)text[i];
        if (b < 0x20 || b > 0x7e || b == '%') td_buf_fmt(out, "%%%02X", b);
        else td_buf_chr(out, text[i]);
    }
}

bool td_grpc_open(td_exchange *x, td_grpc_call *call)
{
    const char *timeout = td_exchange_header(x, "grpc-timeout"), *why = "";
    td_grpc_call c = {.timeout_us = INT64_MAX};
    size_t n;
    if (!x->stream_id || !td_grpc_content_type(td_exchange_header(x, "content-type")) ||
        strcmp(td_exchange_method(x), "POST")) {
        td_exchange_reply(x, x->stream_id ? 415 : 426, NULL, 0, NULL, 0);
        return false;
    }
    if (!td_grpc_split_path(td_exchange_path(x), &c)) {
        td_grpc_finish(x, TD_GRPC_UNIMPLEMENTED, "the path is not /package.Service/Method");
        return false;
    }
    if (timeout && !td_grpc_timeout(timeout, &c.timeout_us)) {
        td_grpc_finish(x, TD_GRPC_INTERNAL, "bad grpc-timeout");
        return false;
    }
    const char *body = td_exchange_body(x, &n);
    td_grpc_status s = td_grpc_deframe(body, n, &c.msg, &c.msg_len, &why);
    if (s != TD_GRPC_OK) {
        td_grpc_finish(x, s, why);
        return false;
    }
    *call = c;
    return true;
}

void td_grpc_start(td_exchange *x)
{
    static const td_header h[] = {{"content-type", "application/grpc"}, {"grpc-accept-encoding", "identity"}};
    td_exchange_start(x, 200, h, TD_COUNT(h));
}

void td_grpc_send(td_exchange *x, const void *msg, size_t n)
{
    if (!x->started) td_grpc_start(x);
    const char prefix[PREFIX_BYTES] = {0, (char)(n >> 24), (char)(n >> 16), (char)(n >> 8), (char)n};
    exchange_write_parts(x, prefix, sizeof prefix, msg, n, NULL, 0);
}

void td_grpc_finish(td_exchange *x, td_grpc_status status, const char *message)
{
    char text[16];
    td_buf why;
    td_buf_init(&why, 0);
    snprintf(text, sizeof text, "%d", (int)status);
    if (message) td_grpc_encode_message(&why, message);
    const td_header h[] = {{"content-type", "application/grpc"},
                           {"grpc-accept-encoding", "identity"},
                           {"grpc-status", text},
                           {"grpc-message", why.len ? why.p : ""}};
    size_t n = why.len ? 4 : 3;
    if (!x->started) {
        td_exchange_reply(x, 200, h, n, NULL, 0);
    } else {
        if (status == TD_GRPC_DEADLINE) td_exchange_drop_unsent(x);
        td_exchange_finish(x, h + 2, n - 2);
    }
    td_buf_deinit(&why);
}
