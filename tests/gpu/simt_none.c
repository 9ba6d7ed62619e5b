// SPDX-License-Identifier: Apache-2.0
/* tests/gpu/simt_none.c - the shim's questions, answered by a device: no checks, no schedule to choose. */
#include "tests/simt/simt_c.h"

const char *simt_last_error(void)
{
    return "";
}

void simt_clear_error(void)
{
}

void simt_quiet(int on)
{
    (void)on;
}

int simt_checks(void)
{
    return 0;
}

int simt_set_option(const char *name, int value)
{
    (void)name, (void)value;
    return -1;
}
