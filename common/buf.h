/* common/buf.h - growable byte string with a hard maximum.
 *
 * Rules:     1. After the first failed append the buffer is "full": every later append is ignored and
 *               td_buf_ok() is false, so a writer checks once at its end.
 *            2. p is always NUL-terminated once anything was appended (the NUL is not counted in len).
 * Ownership: the caller owns the struct; td_buf_deinit frees the bytes. Threads: one owner. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_BUF_H
#define TD_COMMON_BUF_H

#include <stdbool.h>
#include <stddef.h>

typedef struct td_buf {
    char *p;
    size_t len, cap, max; /* bytes; max 0 means 64 MiB */
    bool full;
} td_buf;

void td_buf_init(td_buf *b, size_t max);
void td_buf_deinit(td_buf *b);
void td_buf_reset(td_buf *b); /* len 0, keeps the memory */
void td_buf_add(td_buf *b, const void *p, size_t n);
void td_buf_str(td_buf *b, const char *s);
void td_buf_chr(td_buf *b, char c);
void td_buf_fmt(td_buf *b, const char *fmt, ...) __attribute__((format(printf, 2, 3)));
void td_buf_json_str(td_buf *b, const char *s, size_t n); /* quoted, escaped; bad UTF-8 becomes U+FFFD */
void td_buf_json_num(td_buf *b, double v); /* Python's repr: shortest that reads back; NaN/inf: null */
void td_buf_drop_front(td_buf *b, size_t n);
bool td_buf_ok(const td_buf *b);

#endif
