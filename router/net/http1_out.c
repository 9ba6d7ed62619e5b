// SPDX-License-Identifier: Apache-2.0
#include "router/net/http1_out.h"
#include "common/check.h"
#include "router/net/exchange.h"
#include <string.h>
#include <strings.h>

const char *td_http1_reason(int status)
{
    static const struct { int status; const char *text; } table[] = {
        {100, "Continue"}, {200, "OK"}, {201, "Created"}, {202, "Accepted"}, {204, "No Content"},
        {301, "Moved Permanently"}, {302, "Found"}, {304, "Not Modified"}, {307, "Temporary Redirect"},
        {400, "Bad Request"}, {401, "Unauthorized"}, {403, "Forbidden"}, {404, "Not Found"},
        {405, "Method Not Allowed"}, {406, "Not Acceptable"}, {408, "Request Timeout"}, {409, "Conflict"},
        {411, "Length Required"}, {413, "Content Too Large"}, {414, "URI Too Long"},
        {415, "Unsupported Media Type"}, {417, "Expectation Failed"}, {422, "Unprocessable Content"},
        {424, "Failed Dependency"}, {426, "Upgrade Required"}, {429, "Too Many Requests"},
        {431, "Request Header Fields Too Large"}, {499, "Client Closed Request"},
        {500, "Internal Server Error"}, {501, "Not Implemented"}, {502, "Bad Gateway"},
        {503, "Service Unavailable"}, {504, "Gateway Timeout"}, {505, "HTTP Version Not Supported"},
        {529, "Overloaded"},
    };
    for (size_t i = 0; i < TD_COUNT(table); i++)
        if (table[i].status == status) return table[i].text;
    return "Status";
}

bool td_http1_own_field(const char *name)
{
    static const char *const own[] = {"content-length", "transfer-encoding", "connection", "keep-alive",
                                      "date"};
    for (size_t i = 0; i < TD_COUNT(own); i++)
        if (!strcasecmp(name, own[i])) return true;
    return false;
}

bool td_http1_bodyless(int status)
{
    return status < 200 || status == 204 || status == 304;
}

void td_http1_fields(td_buf *out, const td_header *h, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (td_http1_own_field(h[i].name)) continue;
        td_buf_str(out, h[i].name);
        td_buf_str(out, ": ");
        for (const char *v = h[i].value; *v; v++) {
            unsigned char b = (unsigned char)*v;
            td_buf_chr(out, (b < 0x20 && b != '\t') || b == 0x7f ? ' ' : *v);
        }
        td_buf_str(out, "\r\n");
    }
}

void td_http1_head(td_buf *out, int status, td_http1_framing framing, uint64_t length, bool keep_alive,
                   const char *date, const td_buf *fields)
{
    td_buf_fmt(out, "HTTP/1.1 %d %s\r\nDate: %s\r\n", status, td_http1_reason(status), date);
    if (fields && fields->len) td_buf_add(out, fields->p, fields->len);
    if (!td_http1_bodyless(status)) {
        if (framing == TD_HTTP1_LENGTH)
            td_buf_fmt(out, "Content-Length: %llu\r\n", (unsigned long long)length);
        else if (framing == TD_HTTP1_CHUNKED) td_buf_str(out, "Transfer-Encoding: chunked\r\n");
    }
    td_buf_str(out, keep_alive ? "Connection: keep-alive\r\n\r\n" : "Connection: close\r\n\r\n");
}

void td_http1_chunk(td_buf *out, const void *p, size_t n)
{
    if (!n) return;
    td_buf_fmt(out, "%zx\r\n", n);
    td_buf_add(out, p, n);
    td_buf_str(out, "\r\n");
}

void td_http1_last_chunk(td_buf *out)
{
    td_buf_str(out, "0\r\n\r\n");
}
