/* tests/said.h - what is written to stderr, by a function or from here to there, and how often a line is in it. Threads: one;
 * at most 16 KiB; the text stays until the next one. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SAID_H
#define TD_TESTS_SAID_H

#include "common/check.h"
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static int said_old, said_file;

static inline void said_begin(void)
{
    char path[] = "/tmp/td-said-XXXXXX";
    said_old = dup(2), said_file = mkstemp(path);
    TD_CHECK(said_old >= 0 && said_file >= 0 && dup2(said_file, 2) == 2);
    unlink(path);
}

static inline const char *said_end(void)
{
    static char text[1 << 14];
    ssize_t n = pread(said_file, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = 0;
    TD_CHECK(dup2(said_old, 2) == 2);
    close(said_old), close(said_file);
    return text;
}

static inline const char *said(void (*fn)(void))
{
    said_begin();
    fn();
    return said_end();
}

static inline int times_said(const char *text, const char *line)
{
    int n = 0;
    for (; (text = strstr(text, line)); text++) n++;
    return n;
}

#endif
