/* tests/said.h - what a function writes to stderr, and how often a line is in it. Threads: one; at most 4 KiB. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SAID_H
#define TD_TESTS_SAID_H

#include "common/check.h"
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static inline const char *said(void (*fn)(void))
{
    static char text[4096];
    char path[] = "/tmp/td-said-XXXXXX";
    int old = dup(2), f = mkstemp(path);
    TD_CHECK(old >= 0 && f >= 0 && dup2(f, 2) == 2);
    fn();
    ssize_t n = pread(f, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = 0;
    TD_CHECK(dup2(old, 2) == 2);
    close(old), close(f), unlink(path);
    return text;
}

static inline int times_said(const char *text, const char *line)
{
    int n = 0;
    for (; (text = strstr(text, line)); text++) n++;
    return n;
}

#endif
