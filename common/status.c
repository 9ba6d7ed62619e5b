// SPDX-License-Identifier: Apache-2.0
/* common/status.c - the thread's last reason and the names of the codes. */
#include "common/status.h"
#include "common/log.h"
#include <stdarg.h>
#include <stdio.h>

static _Thread_local char reason[512];
static _Thread_local bool quiet;

const char *td_status_name(td_status s)
{
    switch (s) {
#define X(name, value, text) \
    case TD_##name: return #name;
        TD_STATUS_MAP(X)
#undef X
    }
    return "unknown";
}

/* Through a second buffer: the arguments may include td_reason() itself ("file x: %s"). */
static void remember(const char *fmt, va_list ap) __attribute__((format(printf, 1, 0)));
static void remember(const char *fmt, va_list ap)
{
    char text[sizeof reason];
    vsnprintf(text, sizeof text, fmt, ap);
    snprintf(reason, sizeof reason, "%s", text);
}

td_status td_fail(td_status s, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    remember(fmt, ap);
    va_end(ap);
    td_log(quiet ? TD_LOG_DEBUG : TD_LOG_WARN, "%s: %s", td_status_name(s), reason);
    return s;
}

void td_fail_quietly(bool on)
{
    quiet = on;
}

td_status td_refuse(td_status s, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    remember(fmt, ap);
    va_end(ap);
    return s;
}

const char *td_reason(void)
{
    return reason;
}
