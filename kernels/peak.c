// SPDX-License-Identifier: Apache-2.0
#include "kernels/peak.h"
#include "common/check.h"
#include <string.h>
#if defined(__x86_64__)
#include "kernels/amx.h"
#include <immintrin.h>
#endif

/* ---- read ---- */

#if defined(__x86_64__)
enum { AHEAD = 12 << 10 }; /* as far as the kernels do: gemm_tile.h */

#define FETCH(p) \
    if (fetch) \
        for (int line = 0; line < 256; line += 64) _mm_prefetch((const char *)(p) + AHEAD + line, _MM_HINT_T1)

__attribute__((target("avx512f"))) static uint64_t read_512(const uint8_t *p, size_t n, bool fetch)
{
    __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
    for (size_t i = 0; i < n; i += 256) {
        FETCH(p + i);
        a = _mm512_xor_si512(a, _mm512_load_si512(p + i));
        b = _mm512_xor_si512(b, _mm512_load_si512(p + i + 64));
        c = _mm512_xor_si512(c, _mm512_load_si512(p + i + 128));
        d = _mm512_xor_si512(d, _mm512_load_si512(p + i + 192));
    }
    return (uint64_t)_mm512_reduce_add_epi64(
        _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d)));
}

__attribute__((target("avx2"))) static uint64_t read_256(const uint8_t *p, size_t n, bool fetch)
{
    __m256i s[4] = {_mm256_setzero_si256(), _mm256_setzero_si256(), _mm256_setzero_si256(),
                    _mm256_setzero_si256()};
    for (size_t i = 0; i < n; i += 256) {
        FETCH(p + i);
        for (size_t j = 0; j < 8; j++)
            s[j % 4] = _mm256_xor_si256(s[j % 4],
                                        _mm256_load_si256((const __m256i *)(const void *)(p + i + 32 * j)));
    }
    s[0] = _mm256_xor_si256(_mm256_xor_si256(s[0], s[1]), _mm256_xor_si256(s[2], s[3]));
    return (uint64_t)_mm256_extract_epi64(s[0], 0) ^ (uint64_t)_mm256_extract_epi64(s[0], 2);
}
#endif

static uint64_t read_plain(const uint8_t *p, size_t n)
{
    uint64_t a = 0, b = 0, v[2];
    for (size_t i = 0; i < n; i += 16) {
        memcpy(v, p + i, sizeof v);
        a ^= v[0];
        b += v[1];
    }
    return a ^ b;
}

uint64_t td_peak_read(const void *p, size_t bytes, bool fetch)
{
#if defined(__x86_64__)
    if (__builtin_cpu_supports("avx512f"))
        return fetch ? read_512(p, bytes, true) : read_512(p, bytes, false);
    if (__builtin_cpu_supports("avx2"))
        return fetch ? read_256(p, bytes, true) : read_256(p, bytes, false);
#endif
    (void)fetch;
    return read_plain(p, bytes);
}

/* ---- multiply ---- */

typedef double loop_fn(long steps);

/* Independent chains hide the latency of the multiply-add; the empty asm keeps each one a separate
 * instruction. */
#define LOOP(name, isa, chains, vec, zero, step, first) \
    __attribute__((target(isa))) static double name(long steps) \
    { \
        vec a[chains], x = zero; \
        __asm__ volatile("" : "+v"(x)); \
        _Pragma("GCC unroll 32") for (int j = 0; j < (chains); j++) a[j] = x; \
        for (long i = 0; i < steps; i++) { \
            _Pragma("GCC unroll 32") for (int j = 0; j < (chains); j++) \
            { \
                a[j] = step; \
                __asm__ volatile("" : "+v"(a[j])); \
            } \
        } \
        double sum = 0; \
        _Pragma("GCC unroll 32") for (int j = 0; j < (chains); j++) sum += (double)first; \
        return sum; \
    }

#if defined(__x86_64__)
LOOP(loop_sse2, "sse2", 12, __m128d, _mm_setzero_pd(), _mm_add_pd(a[j], _mm_mul_pd(x, x)),
     _mm_cvtsd_f64(a[j]))
LOOP(loop_avx2, "avx2,fma", 12, __m256, _mm256_setzero_ps(), _mm256_fmadd_ps(x, x, a[j]),
     _mm256_cvtss_f32(a[j]))
LOOP(loop_avx512, "avx512f", 24, __m512, _mm512_setzero_ps(), _mm512_fmadd_ps(x, x, a[j]),
     _mm512_cvtss_f32(a[j]))
LOOP(loop_bf16, "avx512f,avx512bf16", 24, __m512, _mm512_setzero_ps(),
     _mm512_dpbf16_ps(a[j], (__m512bh)_mm512_castps_si512(x), (__m512bh)_mm512_castps_si512(x)),
     _mm512_cvtss_f32(a[j]))

static double loop_amx(long steps)
{
    return (double)td_amx_loop(steps);
}
#endif

static const struct {
    const char *family;
    loop_fn *run;
    double ops; /* of one step */
} loops[] = {
#if defined(__x86_64__)
    {"ref", loop_sse2, 4.0 * 12}, /* sums in double, without fused multiply-add */
    {"avx2", loop_avx2, 16.0 * 12},
    {"avx512", loop_avx512, 32.0 * 24},
    {"avx512bf16", loop_bf16, 64.0 * 24},
    {"amx", loop_amx, TD_AMX_LOOP_OPS},
#else
    {"", NULL, 0},
#endif
};

double td_peak_multiply(const char *family, long steps)
{
    for (size_t i = 0; i < TD_COUNT(loops); i++) {
        if (!loops[i].run || strcmp(loops[i].family, family)) continue;
        volatile double kept = loops[i].run(steps);
        (void)kept;
        return loops[i].ops * (double)steps;
    }
    return 0;
}
