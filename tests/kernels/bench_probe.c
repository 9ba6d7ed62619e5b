// SPDX-License-Identifier: Apache-2.0
#include "tests/kernels/bench_probe.h"
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#if defined(__x86_64__)
#include "kernels/amx.h"
#include <immintrin.h>
#endif

enum { READ_BYTES = 192 << 20, LOOP = 400000, TILE_LOOP = LOOP / 4, CHAINS = 24 };
typedef float v16f __attribute__((vector_size(64)));
typedef uint64_t v8u __attribute__((vector_size(64)));

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
    uint64_t sink[256];
} reader;

#if defined(__x86_64__)
__attribute__((target("avx512f"))) static void read_512(reader *r, const char *p, size_t n, int member)
{
    __m512i s0 = _mm512_setzero_si512(), s1 = s0;
    for (size_t i = 0; i < n; i += 128) {
        s0 = _mm512_xor_si512(s0, _mm512_load_si512(p + i));
        s1 = _mm512_xor_si512(s1, _mm512_load_si512(p + i + 64));
    }
    r->sink[member] += (uint64_t)_mm512_reduce_add_epi64(_mm512_xor_si512(s0, s1));
}

__attribute__((target("avx2"))) static void read_256(reader *r, const char *p, size_t n, int member)
{
    __m256i s[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256()};
    for (size_t i = 0; i < n; i += 128) {
#pragma GCC unroll 4
        for (size_t j = 0; j < 4; j++)
            s[j] = _mm256_xor_si256(s[j], _mm256_load_si256((const __m256i *)(const void *)(p + i + 32 * j)));
    }
    s[0] = _mm256_xor_si256(_mm256_xor_si256(s[0], s[1]), _mm256_xor_si256(s[2], s[3]));
    r->sink[member] += (uint64_t)_mm256_extract_epi64(s[0], 0) ^ (uint64_t)_mm256_extract_epi64(s[0], 2);
}

__attribute__((target("avx512f,avx512bf16"))) static float loop_bf16(void)
{
    __m512 a[CHAINS];
    __m512i x = _mm512_setzero_si512();
    __asm__ volatile("" : "+v"(x));
#pragma GCC unroll 32
    for (int j = 0; j < CHAINS; j++) a[j] = _mm512_setzero_ps();
    for (int i = 0; i < LOOP; i++) {
#pragma GCC unroll 32
        for (int j = 0; j < CHAINS; j++) {
            a[j] = _mm512_dpbf16_ps(a[j], (__m512bh)x, (__m512bh)x);
            __asm__ volatile("" : "+v"(a[j]));
        }
    }
    return _mm512_cvtss_f32(a[0]);
}

__attribute__((target("avx2,fma"))) static float loop_fma(void)
{
    __m256 a[12], x = _mm256_setzero_ps();
    __asm__ volatile("" : "+v"(x));
#pragma GCC unroll 32
    for (int j = 0; j < 12; j++) a[j] = _mm256_setzero_ps();
    for (int i = 0; i < LOOP; i++) {
#pragma GCC unroll 32
        for (int j = 0; j < 12; j++) {
            a[j] = _mm256_fmadd_ps(x, x, a[j]);
            __asm__ volatile("" : "+v"(a[j]));
        }
    }
    return _mm256_cvtss_f32(a[0]);
}
#endif

static void read_plain(reader *r, const char *p, size_t n, int member)
{
    v8u s = {0};
    for (size_t i = 0; i < n; i += 64) s ^= *(const v8u *)(p + i);
    r->sink[member] += s[0] ^ s[3];
}

static void read_part(void *arg, int i, int member)
{
    reader *r = arg;
    size_t n = READ_BYTES / (size_t)r->parts / 128 * 128;
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f")) {
        read_512(r, r->p + (size_t)i * n, n, member);
        return;
    }
    if (__builtin_cpu_supports("avx2")) {
        read_256(r, r->p + (size_t)i * n, n, member);
        return;
    }
#endif
    read_plain(r, r->p + (size_t)i * n, n, member);
}

typedef struct compute {
    bool tiles;
    float sink[256];
} compute;

static void compute_part(void *arg, int i, int member)
{
    (void)i;
#if defined(__x86_64__)
    compute *c = arg;
    float *sink = c->sink;
    if (c->tiles) sink[member] += td_amx_loop(TILE_LOOP);
    else if (__builtin_cpu_supports("avx512bf16")) sink[member] += loop_bf16();
    else if (__builtin_cpu_supports("avx2")) sink[member] += loop_fma();
#endif
}

probe probe_run(td_pool *pool, bool tiles)
{
    static char *block;
    static compute c;
    static reader r;
    int n = td_pool_size(pool);
    c.tiles = tiles;
    if (!block) {
        block = aligned_alloc(2 << 20, READ_BYTES);
        madvise(block, READ_BYTES, MADV_HUGEPAGE);
        memset(block, 1, READ_BYTES);
    }
    probe best = {0, 1};
    for (int i = 0; i < 4; i++) {
        r.p = block, r.parts = n;
        double t = probe_clock(pool);
        td_pool_for(pool, n, read_part, &r);
        double gb = READ_BYTES / (probe_clock(pool) - t) * 1e-9;
        t = probe_clock(pool);
        td_pool_for(pool, n, compute_part, &c);
        double flops = 0;
#if defined(__x86_64__)
        if (c.tiles) flops = TD_AMX_LOOP_OPS * TILE_LOOP;
        else flops = __builtin_cpu_supports("avx512bf16") ? 64.0 * CHAINS * LOOP : 16.0 * 12 * LOOP;
#endif
        double gf = flops * n / (probe_clock(pool) - t) * 1e-9;
        if (gb > best.gb_s) best.gb_s = gb;
        if (gf > best.gf_s) best.gf_s = gf;
    }
    return best;
}
