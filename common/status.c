// SPDX-License-Identifier: Apache-2.0
/* common/status.c - the thread's last reason and the names of the codes. */
#include "common/status.h"
#include "common/log.h"
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

static _Thread_local char reason[512];
static _Thread_local bool holds;

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
    if (holds) td_log_release(!reason[0] || !strstr(text, reason)); /* wrapped: the outer one says it all */
    snprintf(reason, sizeof reason, "%s", text);
}

td_status td_fail(td_status s, const char *fmt, ...)
{
    va_list ap;
    va_start(ap, fmt);
    remember(fmt, ap);
    va_end(ap);
    (holds ? td_log_hold : td_log)(TD_LOG_WARN, "%s: %s", td_status_name(s), reason);
    return s;
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

void td_fail_hold(bool on)
{
    holds = on;
    if (!on) td_log_release(true);
}

const char *td_reason_take(void)
{
    td_log_release(false);
    return reason;
}
