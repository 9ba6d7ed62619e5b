// SPDX-License-Identifier: Apache-2.0
/* common/clock.c - see clock.h. A fake time replaces both clocks that decisions read; spinning always uses
 * the real one. */
#include "common/clock.h"
#include <stdatomic.h>
#include <time.h>

static _Atomic int64_t fake_us = -1;

static int64_t read_clock(clockid_t id)
{
    struct timespec t;
    clock_gettime(id, &t);
    return (int64_t)t.tv_sec * 1000000 + t.tv_nsec / 1000;
}

int64_t td_now_us(void)
{
    int64_t us = atomic_load_explicit(&fake_us, memory_order_relaxed);
    return us >= 0 ? us : read_clock(CLOCK_MONOTONIC);
}

int64_t td_spin_us(void)
{
    return read_clock(CLOCK_MONOTONIC);
}

int64_t td_wall_us(void)
{
    int64_t us = atomic_load_explicit(&fake_us, memory_order_relaxed);
    return us >= 0 ? us : read_clock(CLOCK_REALTIME);
}

int64_t td_wall_s(void)
{
    return td_wall_us() / 1000000;
}

void td_clock_fake(int64_t us)
{
    atomic_store_explicit(&fake_us, us, memory_order_relaxed);
}
