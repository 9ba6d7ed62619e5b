/* router/net/http1_out.h - the bytes of an HTTP/1.1 response. No socket, no clock.
 *
 *   fields(user's headers) -> head(status, framing, fields) -> raw body | chunk* last
 *
 * Rules:     1. A value never carries CR, LF or NUL out: control bytes become spaces (header injection).
 *            2. Framing fields (Content-Length, Transfer-Encoding, Connection, Date) are written here, not by
 *               the user.
 *            3. 1xx, 204 and 304 have no body and no length.
 * Source:    RFC 9112 sections 4, 6, 7.1; RFC 9110 section 15. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_NET_HTTP1_OUT_H
#define TD_ROUTER_NET_HTTP1_OUT_H

#include "common/buf.h"
#include <stdbool.h>
#include <stdint.h>

struct td_header;

typedef enum { TD_HTTP1_LENGTH, TD_HTTP1_CHUNKED, TD_HTTP1_UNTIL_CLOSE } td_http1_framing;

bool td_http1_own_field(const char *name); /* a framing header (rule 2) */
bool td_http1_bodyless(int status);
void td_http1_fields(td_buf *out, const struct td_header *h, size_t n); /* "Name: value\r\n", sanitized */
void td_http1_head(td_buf *out, int status, td_http1_framing framing, uint64_t length, bool keep_alive,
                   const char *date, const td_buf *fields);
void td_http1_chunk(td_buf *out, const void *p, size_t n); /* n 0: nothing; an empty chunk ends the body */
void td_http1_last_chunk(td_buf *out);
const char *td_http1_reason(int status);

#endif
