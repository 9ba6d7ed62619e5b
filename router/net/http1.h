/* router/net/http1.h - strict HTTP/1.1 request parser: bytes in, one request out. No socket, no clock.
 *
 *   feed(bytes) -> MORE | DONE (head and body are complete; the unused rest is the next request's)
 *                | ERROR (status, what)
 *
 * Strict where laxness is a known attack (request smuggling, header injection); what is refused:
 *   400  bare CR or LF, NUL and control bytes, obs-fold, space before the colon, no or several Host on 1.1,
 *        Content-Length together with Transfer-Encoding, repeated or non-decimal Content-Length,
 *        Transfer-Encoding on HTTP/1.0, bad chunk, bad target
 *   413  body over max_body_bytes, at the head when Content-Length says so
 *   414  target over 8 KiB (or over max_header_bytes)    431  over max_header_bytes or TD_HEAD_MAX headers
 *   417  an expectation other than 100-continue
 *   501  Transfer-Encoding other than "chunked"; a method over 24 bytes          505  not HTTP/1.0 or 1.1
 * Rules:     1. The head is parsed byte by byte, so any split of the same bytes gives the same result.
 *            2. After DONE take head and body (or leave them) and reset(); after ERROR close the connection.
 *            3. Chunk extensions and trailers are checked, bounded and dropped.
 * Ownership: the parser owns head and body until the caller moves them out. Threads: one owner.
 * Source:    RFC 9112 (2.2, 3, 5, 6, 7.1), RFC 9110 (5.5, 10.1.1). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_NET_HTTP1_H
#define TD_ROUTER_NET_HTTP1_H

#include "router/net/head.h"

typedef enum { TD_HTTP1_MORE, TD_HTTP1_DONE, TD_HTTP1_ERROR } td_http1_result;

typedef struct td_http1 {
    td_head head;
    td_buf body;
    bool v11;        /* HTTP/1.1, not 1.0 */
    bool keep_alive; /* what the client asked for, by version and Connection */
    bool started;    /* a byte of the request was seen */
    bool head_done;  /* all headers are in; the body may be missing */
    bool expect;     /* head_done, no body byte yet, 100-continue was asked for: answer and clear it */
    int status;      /* after ERROR */
    const char *what; /* after ERROR; static text */

    /* internal */
    size_t max_header_bytes, max_body_bytes;
    int state, blank_lines, hosts, version_len, digits;
    char version[9];
    bool chunked, has_length, te_bad;
    size_t header_bytes, ext_bytes, mark, value_mark; /* mark: offset in head.text of the string being read */
    uint64_t length; /* body bytes (of this chunk) still to come */
} td_http1;

void td_http1_init(td_http1 *p, size_t max_header_bytes, size_t max_body_bytes);
void td_http1_deinit(td_http1 *p);
void td_http1_reset(td_http1 *p); /* ready for the next request; frees what was not moved out */
td_http1_result td_http1_feed(td_http1 *p, const char *in, size_t n, size_t *used);

#endif
