/* common/log.h - one line per event on stderr: "2026-01-02T03:04:05.678901Z I worker text". No host paths,
 * prompts or keys at info level and below. Threads: any (one write(2) per line). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_LOG_H
#define TD_COMMON_LOG_H

#include <stdbool.h>

typedef enum { TD_LOG_ERROR, TD_LOG_WARN, TD_LOG_INFO, TD_LOG_DEBUG, TD_LOG_TRACE } td_log_level;

void td_log_open(const char *program, td_log_level level); /* name shown in each line; static storage */
td_log_level td_log_parse(const char *name);               /* "info" -> TD_LOG_INFO; unknown: TD_LOG_INFO */
void td_log(td_log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
/* A line that is written before this thread's next one, or by td_log_release(true); td_log_release(false)
 * forgets it. One at most: the one before is written. */
void td_log_hold(td_log_level level, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void td_log_release(bool write_it);

#define TD_ERROR(...) td_log(TD_LOG_ERROR, __VA_ARGS__)
#define TD_WARN(...) td_log(TD_LOG_WARN, __VA_ARGS__)
#define TD_INFO(...) td_log(TD_LOG_INFO, __VA_ARGS__)
#define TD_DEBUG_LOG(...) td_log(TD_LOG_DEBUG, __VA_ARGS__)
#define TD_TRACE(...) td_log(TD_LOG_TRACE, __VA_ARGS__)

#endif
