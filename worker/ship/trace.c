// SPDX-License-Identifier: Apache-2.0
#include "worker/ship/trace.h"
#include "common/check.h"
#include "common/clock.h"
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct td_trace { int fd; };

td_status td_trace_open(const char *path, td_trace **out)
{
    int fd = open(path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
    if (fd < 0) return td_fail(TD_EIO, "trace file %s: %s", path, strerror(errno));
    td_trace *t = td_xalloc(sizeof *t);
    t->fd = fd;
    *out = t;
    return TD_OK;
}

void td_trace_close(td_trace *t)
{
    if (!t) return;
    close(t->fd);
    free(t);
}

void td_trace_event(td_trace *t, const char *ev, const char *fmt, ...)
{
    if (!t) return;
    char line[1024];
    int n = snprintf(line, sizeof line, "{\"t_us\":%lld,\"ev\":\"%s\"", (long long)td_now_us(), ev);
    va_list ap;
    va_start(ap, fmt);
    int m = vsnprintf(line + n, sizeof line - (size_t)n - 2, fmt, ap);
    va_end(ap);
    if (m < 0 || (size_t)m >= sizeof line - (size_t)n - 2) return;
    n += m;
    line[n++] = '}';
    line[n++] = '\n';
    ssize_t w = write(t->fd, line, (size_t)n);
    (void)w; /* a full disk must not stop the worker */
}
