// SPDX-License-Identifier: Apache-2.0
/* common/log.c - formats one line and hands it to the kernel in one write, so lines of threads never mix. */
#include "common/log.h"
#include "common/clock.h"
#include <errno.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static const char *_Atomic log_program = "tandem";
static _Atomic int log_level = TD_LOG_INFO;

void td_log_open(const char *program, td_log_level level)
{
    atomic_store_explicit(&log_program, program, memory_order_relaxed);
    atomic_store_explicit(&log_level, (int)level, memory_order_relaxed);
}

td_log_level td_log_parse(const char *name)
{
    static const char *const names[] = {"error", "warn", "info", "debug", "trace"};
    for (int i = 0; i < 5; i++)
        if (name && !strcmp(name, names[i])) return (td_log_level)i;
    return TD_LOG_INFO;
}

/* One event is one line: a line break or control byte in a foreign string could forge another event. */
static void flatten(char *s, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if ((unsigned char)s[i] < 0x20 || s[i] == 0x7f) s[i] = ' ';
}

static _Thread_local char held[2048];
static _Thread_local size_t held_bytes;

static bool shown(td_log_level level)
{
    return (int)level <= atomic_load_explicit(&log_level, memory_order_relaxed);
}

static void put(const char *line, size_t n)
{
    ssize_t done;
    do done = write(STDERR_FILENO, line, n);
    while (done < 0 && errno == EINTR);
}

static size_t compose(char line[2048], td_log_level level, const char *fmt, va_list ap)
    __attribute__((format(printf, 3, 0)));
static size_t compose(char line[2048], td_log_level level, const char *fmt, va_list ap)
{
    enum { SIZE = 2048 };
    int64_t us = td_wall_us();
    time_t sec = (time_t)(us / 1000000);
    struct tm tm;
    gmtime_r(&sec, &tm);
    size_t n = strftime(line, SIZE, "%Y-%m-%dT%H:%M:%S", &tm);
    int k = snprintf(line + n, 128, ".%06dZ %c %s ", (int)(us % 1000000), "EWIDT"[level],
                     atomic_load_explicit(&log_program, memory_order_relaxed));
    n += (size_t)(k < 127 ? k : 127);
    k = vsnprintf(line + n, SIZE - n - 1, fmt, ap);
    size_t room = SIZE - n - 2;
    size_t text = k < 0 ? 0 : (size_t)k < room ? (size_t)k : room;
    flatten(line + n, text);
    n += text;
    line[n++] = '\n';
    return n;
}

void td_log(td_log_level level, const char *fmt, ...)
{
    int saved = errno;
    if (held_bytes) td_log_release(true);
    if (shown(level)) {
        char line[2048];
        va_list ap;
        va_start(ap, fmt);
        size_t n = compose(line, level, fmt, ap);
        va_end(ap);
        put(line, n);
    }
    errno = saved;
}

void td_log_hold(td_log_level level, const char *fmt, ...)
{
    int saved = errno;
    td_log_release(true);
    if (shown(level)) {
        va_list ap;
        va_start(ap, fmt);
        held_bytes = compose(held, level, fmt, ap);
        va_end(ap);
    }
    errno = saved;
}

void td_log_release(bool write_it)
{
    if (write_it && held_bytes) put(held, held_bytes);
    held_bytes = 0;
}
