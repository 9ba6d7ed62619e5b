/* worker/ship/trace.h - steps, layers and shipments as JSON lines, for tests and timelines:
 * {"t_us":..,"ev":"frame_sent",...}. t_us is td_now_us, comparable within one machine. Threads: any (one
 * write per line). NULL trace: no-op. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SHIP_TRACE_H
#define TD_WORKER_SHIP_TRACE_H

#include "common/status.h"

typedef struct td_trace td_trace;

td_status td_trace_open(const char *path, td_trace **out); /* appends */
void td_trace_close(td_trace *t);
/* fmt: the members after "ev", with a leading comma. Lines are at most 1 KiB. */
void td_trace_event(td_trace *t, const char *ev, const char *fmt, ...) __attribute__((format(printf, 3, 4)));

#endif
