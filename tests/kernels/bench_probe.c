// SPDX-License-Identifier: Apache-2.0
#include "tests/kernels/bench_probe.h"
#include "common/check.h"
#include "kernels/peak.h"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { READ_BYTES = 1024 << 20, STEPS = 200000 };

double probe_now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

double probe_clock(td_pool *pool)
{
    struct timespec t;
    if (td_pool_size(pool) > 1) return probe_now();
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

typedef struct reader {
    const char *p;
    int parts;
    bool fetch;
    uint64_t sink[256];
} reader;

static void read_part(void *arg, int i, int member)
{
    reader *r = arg;
    size_t n = READ_BYTES / (size_t)r->parts / 256 * 256;
    r->sink[member] += td_peak_read(r->p + (size_t)i * n, n, r->fetch);
}

typedef struct multiplier {
    const char *family;
    double ops[256];
} multiplier;

static void multiply_part(void *arg, int i, int member)
{
    multiplier *m = arg;
    (void)i;
    m->ops[member] += td_peak_multiply(m->family, STEPS);
}

probe probe_run(td_pool *pool, const char *family)
{
    static char *block;
    int n = td_pool_size(pool);
    if (!block) {
        block = aligned_alloc(2 << 20, READ_BYTES);
        madvise(block, READ_BYTES, MADV_HUGEPAGE);
        memset(block, 1, READ_BYTES);
    }
    reader r = {.p = block, .parts = n};
    probe best = {0, 1};
    for (int i = 0; i < 4; i++) {
        for (int fetch = 0; fetch < 2; fetch++) {
            r.fetch = fetch;
            double t = probe_clock(pool);
            td_pool_for(pool, n, read_part, &r);
            best.gb_s = TD_MAX(best.gb_s, READ_BYTES / (probe_clock(pool) - t) * 1e-9);
        }
        multiplier m = {.family = family};
        double t = probe_clock(pool), ops = 0;
        td_pool_for(pool, n, multiply_part, &m);
        t = probe_clock(pool) - t;
        for (int k = 0; k < n; k++) ops += m.ops[k];
        best.gf_s = TD_MAX(best.gf_s, ops / t * 1e-9);
    }
    return best;
}
