// SPDX-License-Identifier: Apache-2.0
/* common/check.c - the end of a process that broke its own rules, and allocation that cannot fail. */
#include "common/check.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void td_check_failed(const char *file, int line, const char *expr)
{
    fprintf(stderr, "%s:%d: check failed: %s\n", file, line, expr);
    abort();
}

void *td_xalloc(size_t bytes)
{
    void *p = calloc(1, bytes ? bytes : 1);
    TD_CHECK(p != NULL);
    return p;
}

void *td_xrealloc(void *p, size_t bytes)
{
    void *q = realloc(p, bytes ? bytes : 1);
    TD_CHECK(q != NULL);
    return q;
}

char *td_xstrdup(const char *s)
{
    return td_xstrndup(s, strlen(s));
}

char *td_xstrndup(const char *s, size_t n)
{
    char *p = td_xalloc(n + 1);
    memcpy(p, s, n);
    return p;
}
