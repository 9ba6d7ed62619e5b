/* tests/capture.h - what is written to standard error from here to there, for tests of what is logged. One at a time. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_CAPTURE_H
#define TD_TESTS_CAPTURE_H

#include "common/check.h"
#include <stdlib.h>
#include <unistd.h>

static int capture_old, capture_file;

static void capture_begin(void)
{
    char path[] = "/tmp/td-test-XXXXXX";
    capture_old = dup(2), capture_file = mkstemp(path);
    TD_CHECK(capture_old >= 0 && capture_file >= 0 && dup2(capture_file, 2) == 2);
    unlink(path);
}

/* The text stays until the next one. */
static const char *capture_end(void)
{
    static char text[1 << 14];
    ssize_t n = pread(capture_file, text, sizeof text - 1, 0);
    text[n > 0 ? n : 0] = 0;
    TD_CHECK(dup2(capture_old, 2) == 2);
    close(capture_old), close(capture_file);
    return text;
}

#endif
