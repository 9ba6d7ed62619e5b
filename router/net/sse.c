// SPDX-License-Identifier: Apache-2.0
#include "router/net/sse.h"
#include "common/check.h"
#include "router/net/net_int.h"
#include <string.h>

enum { MAX_EXTRA = 24 };

void td_sse_start(td_exchange *x, const td_header *extra, size_t n)
{
    td_header h[MAX_EXTRA + 3] = {
        {"content-type", "text/event-stream"}, {"cache-control", "no-cache"}, {"x-accel-buffering", "no"}};
    n = TD_MIN(n, (size_t)MAX_EXTRA);
    if (n) memcpy(h + 3, extra, n * sizeof *extra);
    td_exchange_start(x, 200, h, n + 3);
}

void td_sse_event(td_exchange *x, const char *json, size_t n)
{
    exchange_write_parts(x, "data: ", 6, json, n, "\n\n", 2);
}

void td_sse_comment(td_exchange *x)
{
    static const char text[] = ": keep-alive\n\n";
    td_exchange_write(x, text, sizeof text - 1);
}

void td_sse_done(td_exchange *x)
{
    td_sse_event(x, "[DONE]", 6);
}
