/* common/check.h - assertions for programmer errors, never for input. TD_CHECK is always on; TD_ASSERT only
 * in debug and sanitizer builds (TD_DEBUG). Both print file, line and expression, then abort. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_CHECK_H
#define TD_COMMON_CHECK_H

#include <stddef.h>

void td_check_failed(const char *file, int line, const char *expr) __attribute__((noreturn));
/* malloc/calloc/strdup for small control structures: abort when memory is gone. calloc semantics: zeroed. */
void *td_xalloc(size_t bytes) __attribute__((malloc, returns_nonnull));
void *td_xrealloc(void *p, size_t bytes);
char *td_xstrdup(const char *s);
char *td_xstrndup(const char *s, size_t n);

#define TD_CHECK(e) ((e) ? (void)0 : td_check_failed(__FILE__, __LINE__, #e))
#ifdef TD_DEBUG
#define TD_ASSERT(e) TD_CHECK(e)
#else
#define TD_ASSERT(e) ((void)sizeof(e))
#endif
#define TD_COUNT(a) (sizeof(a) / sizeof((a)[0]))
#define TD_MIN(a, b) ((a) < (b) ? (a) : (b))
#define TD_MAX(a, b) ((a) > (b) ? (a) : (b))

#endif
