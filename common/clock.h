/* common/clock.h - monotonic microseconds; the only reader of time in the project. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_CLOCK_H
#define TD_COMMON_CLOCK_H

#include <stdint.h>

int64_t td_now_us(void);       /* monotonic; or the fake time when one is set */
int64_t td_wall_s(void);       /* seconds since 1970, for "created" fields only */
int64_t td_wall_us(void);      /* microseconds since 1970, for log lines only */
int64_t td_spin_us(void);      /* monotonic and never fake: for bounded spinning */
void td_clock_fake(int64_t us); /* tests: fixed time from now on; -1 returns to the real clock */

#endif
