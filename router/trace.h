/* router/trace.h - the access log: one JSON line per request at info level, when it has had its terminal
 * event.
 *
 * Never a prompt, a token or a key: sizes, times, where it ran and how it ended. Threads: core. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_TRACE_H
#define TD_ROUTER_TRACE_H

#include "router/core/router.h"

void td_trace_request(const td_request *r, td_fleet *f, int64_t now_us);

#endif
