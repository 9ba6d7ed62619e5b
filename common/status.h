/* common/status.h - the one error type. A code names the caller's reaction, not the cause.
 *
 * Rules:   1. The function that first knows of an error calls td_fail(), which logs the cause once and keeps
 *             its text for the thread; callers pass the code on silently with TD_TRY.
 *          2. Outputs are written only on success.
 * Threads: any; the reason text is per thread. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_STATUS_H
#define TD_COMMON_STATUS_H

#include <stdbool.h>

#define TD_STATUS_MAP(X)                                            \
    X(OK,       0, "ok")                                            \
    X(AGAIN,    1, "not ready: call again after the next event")    \
    X(EBADREQ, -1, "the client's request is wrong: answer 4xx")     \
    X(EPROTO,  -2, "peer or file broke the format: drop it")        \
    X(EFULL,   -3, "a configured limit was reached: shed load")     \
    X(EGONE,   -4, "peer or request no longer exists: forget it")   \
    X(ETIME,   -5, "deadline passed: cancel downstream")            \
    X(EIO,     -6, "system call failed: close the object")          \
    X(EDEVICE, -7, "accelerator failed: restart the process")       \
    X(ENOSUP,  -8, "not in this build or device: choose another")

typedef enum {
#define X(name, value, text) TD_##name = value,
    TD_STATUS_MAP(X)
#undef X
} td_status;

const char *td_status_name(td_status s); /* "EFULL"; static storage */

/* Log the cause once at warning level, remember it for td_reason(), return s. */
td_status td_fail(td_status s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Like td_fail, without the log line: for errors that belong to one request, not to the operator. */
td_status td_refuse(td_status s, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* Text of this thread's last td_fail/td_refuse; at most 511 bytes; valid until the next one. */
const char *td_reason(void);
/* While a program starts, a failure mostly ends it, with a last line of its own that says why. So that the
 * reason is there once, td_fail of this thread holds its line back until the thread's next line or failure,
 * and whoever says the reason takes it, which drops the held line. Turning it off writes what is held. */
void td_fail_hold(bool on);
const char *td_reason_take(void);

/* Propagate an error when nothing has to be released. TD_AGAIN passes through. */
#define TD_TRY(expr)                                    \
    do {                                                \
        td_status try_status_ = (expr);                 \
        if (try_status_ < 0) return try_status_;        \
    } while (0)

#endif
