/* router/net/sse.h - server-sent events over an exchange, as the OpenAI API uses them.
 *
 *   td_sse_start(x, extra headers)  td_sse_event(x, json)*  td_sse_comment(x)*  td_sse_done(x)
 *
 * Rules:     1. An event is one line of JSON: no CR or LF inside (our JSON writer escapes them).
 *            2. An error after the start is one more event, then td_exchange_finish without td_sse_done, so
 *               that clients can tell.
 *            3. td_sse_comment keeps proxies from dropping a quiet stream; skip it while unsent() is not 0.
 * Threads:   the net thread. Source: the HTML standard, section 9.2 (event stream). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_NET_SSE_H
#define TD_ROUTER_NET_SSE_H

#include "router/net/exchange.h"

void td_sse_start(td_exchange *x, const td_header *extra, size_t n); /* at most 24 extra headers */
void td_sse_event(td_exchange *x, const char *json, size_t n);       /* data: json */
void td_sse_comment(td_exchange *x);                                 /* : keep-alive */
void td_sse_done(td_exchange *x);                                    /* data: [DONE]; the caller finishes */

#endif
