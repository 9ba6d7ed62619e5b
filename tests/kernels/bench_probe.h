/* tests/kernels/bench_probe.h - the two limits a kernel is measured against: a sequential read by all
 * members, and the family's own multiply-adds on registers (kernels/peak.h). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_KERNELS_BENCH_PROBE_H
#define TD_TESTS_KERNELS_BENCH_PROBE_H

#include "common/pool.h"

typedef struct probe {
    double gb_s, gf_s;
} probe;

double probe_now(void);
double probe_clock(td_pool *pool); /* one member: this process's processor time; else as probe_now */
probe probe_run(td_pool *pool, const char *family); /* about 0.2 s */

#endif
