// SPDX-License-Identifier: Apache-2.0
/* common/rng.c - every operation below is an IEEE f32 operation written out once (the build forbids
 * contraction), and fma is exact wherever it runs: as an instruction, in libm, in 8 or 16 lanes. The vector
 * paths therefore have the scalar path's bits. */
#include "common/rng.h"
#include "common/noise.h"
#ifdef __x86_64__
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))

INLINE void gumbel4(uint64_t seed, uint32_t position, uint32_t stream, uint32_t block, float out[4])
{
    uint32_t x[4];
    td_noise_block(seed, position, stream, block, x);
    for (int i = 0; i < 4; i++) out[i] = td_noise_gumbel(x[i]);
}

/* Tokens that are not a whole block, at either end of a row; then whole blocks. */
INLINE void row_scalar(uint64_t seed, uint32_t position, uint32_t stream, uint32_t id, uint32_t n, float *out)
{
    while (n) {
        float g[4];
        gumbel4(seed, position, stream, id / 4, g);
        uint32_t lane = id % 4, take = 4 - lane < n ? 4 - lane : n;
        memcpy(out, g + lane, take * sizeof *g);
        id += take;
        out += take;
        n -= take;
    }
}

void td_philox4x32(const uint32_t ctr[4], const uint32_t key[2], uint32_t out[4])
{
    td_noise_philox(ctr, key, out);
}

float td_uniform_f32(uint32_t x)
{
    return td_noise_uniform(x);
}

float td_log_f32(float x)
{
    return td_noise_log(x);
}

float td_log1p_f32(float x)
{
    return td_noise_log1p(x);
}

#ifdef __x86_64__
#define FMA __attribute__((target("avx2,fma")))

FMA static inline __m256 log_of_8(__m256 f, __m256 e)
{
    __m256 p = _mm256_set1_ps(TD_LOG_P0);
#define X(c) p = _mm256_fmadd_ps(p, f, _mm256_set1_ps(c));
    TD_LOG_P(X)
#undef X
    __m256 q = _mm256_mul_ps(_mm256_mul_ps(f, f), _mm256_fmadd_ps(p, f, _mm256_set1_ps(-0.5f)));
    __m256 low = _mm256_add_ps(f, _mm256_fmadd_ps(e, _mm256_set1_ps(TD_LN2_LO), q));
    return _mm256_add_ps(_mm256_mul_ps(e, _mm256_set1_ps(TD_LN2_HI)), low);
}

FMA static inline __m256i exponent_of_8(__m256 x)
{
    return _mm256_srai_epi32(_mm256_sub_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(TD_SQRT_HALF_BITS)), 23);
}

FMA static inline __m256 log_8(__m256 x)
{
    __m256i e = exponent_of_8(x);
    __m256i m = _mm256_sub_epi32(_mm256_castps_si256(x), _mm256_slli_epi32(e, 23));
    return log_of_8(_mm256_sub_ps(_mm256_castsi256_ps(m), _mm256_set1_ps(1.0f)), _mm256_cvtepi32_ps(e));
}

FMA static inline __m256 log1p_8(__m256 x)
{
    __m256 one = _mm256_set1_ps(1.0f);
    __m256i e = exponent_of_8(_mm256_add_ps(one, x));
    __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_sub_epi32(_mm256_set1_epi32(127), e), 23));
    return log_of_8(_mm256_fmadd_ps(x, scale, _mm256_sub_ps(scale, one)), _mm256_cvtepi32_ps(e));
}

FMA static inline __m256 gumbel_8(__m256i x)
{
    __m256 minus = _mm256_set1_ps(-0.0f);
    /* Unsigned to float with one rounding: both halves are exact, the fma rounds their sum. */
    __m256 hi = _mm256_cvtepi32_ps(_mm256_srli_epi32(x, 16));
    __m256 lo = _mm256_cvtepi32_ps(_mm256_and_si256(x, _mm256_set1_epi32(0xffff)));
    __m256 u = _mm256_fmadd_ps(hi, _mm256_set1_ps(65536.0f), lo);
    u = _mm256_fmadd_ps(u, _mm256_set1_ps(0x1p-32f), _mm256_set1_ps(0x1p-33f));
    u = _mm256_min_ps(u, _mm256_set1_ps(TD_UNIFORM_MAX));
    __m256 e = _mm256_xor_ps(log1p_8(_mm256_xor_ps(u, minus)), minus);
    return _mm256_xor_ps(log_8(e), minus);
}

/* 32-bit products of 8 lanes, as high and low halves. */
FMA static inline void mul_8(__m256i x, uint32_t m, __m256i *hi, __m256i *lo)
{
    __m256i mm = _mm256_set1_epi32((int)m);
    __m256i even = _mm256_mul_epu32(x, mm), odd = _mm256_mul_epu32(_mm256_srli_epi64(x, 32), mm);
    *lo = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA);
    *hi = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0xAA);
}

/* 8 blocks, 32 tokens. */
FMA static inline void gumbel_32(uint64_t seed, uint32_t position, uint32_t stream, uint32_t block,
                                 float *out)
{
    __m256i a = _mm256_add_epi32(_mm256_set1_epi32((int)block), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    __m256i b = _mm256_set1_epi32((int)position), c = _mm256_set1_epi32((int)stream);
    __m256i d = _mm256_setzero_si256();
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int r = 0; r < TD_PHILOX_ROUNDS; r++) {
        __m256i ph, pl, qh, ql;
        mul_8(a, TD_PHILOX_M0, &ph, &pl);
        mul_8(c, TD_PHILOX_M1, &qh, &ql);
        a = _mm256_xor_si256(_mm256_xor_si256(qh, b), _mm256_set1_epi32((int)k0));
        c = _mm256_xor_si256(_mm256_xor_si256(ph, d), _mm256_set1_epi32((int)k1));
        b = ql;
        d = pl;
        k0 += TD_PHILOX_W0;
        k1 += TD_PHILOX_W1;
    }
    /* Lane i of a, b, c, d is block i: transpose 4 x 8 so that tokens are in order. */
    __m256i ab0 = _mm256_unpacklo_epi32(a, b), ab1 = _mm256_unpackhi_epi32(a, b);
    __m256i cd0 = _mm256_unpacklo_epi32(c, d), cd1 = _mm256_unpackhi_epi32(c, d);
    __m256i r0 = _mm256_unpacklo_epi64(ab0, cd0), r1 = _mm256_unpackhi_epi64(ab0, cd0);
    __m256i r2 = _mm256_unpacklo_epi64(ab1, cd1), r3 = _mm256_unpackhi_epi64(ab1, cd1);
    _mm256_storeu_ps(out, gumbel_8(_mm256_permute2x128_si256(r0, r1, 0x20)));
    _mm256_storeu_ps(out + 8, gumbel_8(_mm256_permute2x128_si256(r2, r3, 0x20)));
    _mm256_storeu_ps(out + 16, gumbel_8(_mm256_permute2x128_si256(r0, r1, 0x31)));
    _mm256_storeu_ps(out + 24, gumbel_8(_mm256_permute2x128_si256(r2, r3, 0x31)));
}

/* Whole groups of `step` tokens by the vector path; ids that start inside a block, and the rest, by the
 * scalar one. */
#define ROW(name, target, step, group)                                                                     \
    target static void name(uint64_t seed, uint32_t position, uint32_t stream, uint32_t id, uint32_t n,    \
                            float *out)                                                                    \
    {                                                                                                      \
        uint32_t head = (4 - id % 4) % 4;                                                                  \
        if (head > n) head = n;                                                                            \
        row_scalar(seed, position, stream, id, head, out);                                                 \
        for (id += head, n -= head, out += head; n >= step; id += step, n -= step, out += step)            \
            group(seed, position, stream, id / 4, out);                                                    \
        row_scalar(seed, position, stream, id, n, out);                                                    \
    }
ROW(row_avx2, FMA, 32, gumbel_32)

/* ---- the same in 16 lanes ---- */
#define WIDE __attribute__((target("avx512f,avx512dq,avx2,fma")))

WIDE static inline __m512 log_of_16(__m512 f, __m512 e)
{
    __m512 p = _mm512_set1_ps(TD_LOG_P0);
#define X(c) p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(c));
    TD_LOG_P(X)
#undef X
    __m512 q = _mm512_mul_ps(_mm512_mul_ps(f, f), _mm512_fmadd_ps(p, f, _mm512_set1_ps(-0.5f)));
    __m512 low = _mm512_add_ps(f, _mm512_fmadd_ps(e, _mm512_set1_ps(TD_LN2_LO), q));
    return _mm512_add_ps(_mm512_mul_ps(e, _mm512_set1_ps(TD_LN2_HI)), low);
}

WIDE static inline __m512i exponent_of_16(__m512 x)
{
    return _mm512_srai_epi32(_mm512_sub_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(TD_SQRT_HALF_BITS)), 23);
}

WIDE static inline __m512 log_16(__m512 x)
{
    __m512i e = exponent_of_16(x);
    __m512i m = _mm512_sub_epi32(_mm512_castps_si512(x), _mm512_slli_epi32(e, 23));
    return log_of_16(_mm512_sub_ps(_mm512_castsi512_ps(m), _mm512_set1_ps(1.0f)), _mm512_cvtepi32_ps(e));
}

WIDE static inline __m512 log1p_16(__m512 x)
{
    __m512 one = _mm512_set1_ps(1.0f);
    __m512i e = exponent_of_16(_mm512_add_ps(one, x));
    __m512 scale = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_sub_epi32(_mm512_set1_epi32(127), e), 23));
    return log_of_16(_mm512_fmadd_ps(x, scale, _mm512_sub_ps(scale, one)), _mm512_cvtepi32_ps(e));
}

WIDE static inline __m512 gumbel_16(__m512i x)
{
    __m512 minus = _mm512_set1_ps(-0.0f);
    __m512 u = _mm512_fmadd_ps(_mm512_cvtepu32_ps(x), _mm512_set1_ps(0x1p-32f), _mm512_set1_ps(0x1p-33f));
    u = _mm512_min_ps(u, _mm512_set1_ps(TD_UNIFORM_MAX));
    __m512 e = _mm512_xor_ps(log1p_16(_mm512_xor_ps(u, minus)), minus);
    return _mm512_xor_ps(log_16(e), minus);
}

WIDE static inline void mul_16(__m512i x, uint32_t m, __m512i *hi, __m512i *lo)
{
    __m512i mm = _mm512_set1_epi32((int)m);
    __m512i even = _mm512_mul_epu32(x, mm), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), mm);
    *lo = _mm512_mask_mov_epi32(even, 0xAAAA, _mm512_slli_epi64(odd, 32));
    *hi = _mm512_mask_mov_epi32(_mm512_srli_epi64(even, 32), 0xAAAA, odd);
}

/* 16 blocks, 64 tokens. */
WIDE static inline void gumbel_64(uint64_t seed, uint32_t position, uint32_t stream, uint32_t block,
                                  float *out)
{
    __m512i count = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i a = _mm512_add_epi32(_mm512_set1_epi32((int)block), count);
    __m512i b = _mm512_set1_epi32((int)position), c = _mm512_set1_epi32((int)stream);
    __m512i d = _mm512_setzero_si512();
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int r = 0; r < TD_PHILOX_ROUNDS; r++) {
        __m512i ph, pl, qh, ql;
        mul_16(a, TD_PHILOX_M0, &ph, &pl);
        mul_16(c, TD_PHILOX_M1, &qh, &ql);
        a = _mm512_ternarylogic_epi32(qh, b, _mm512_set1_epi32((int)k0), 0x96);
        c = _mm512_ternarylogic_epi32(ph, d, _mm512_set1_epi32((int)k1), 0x96);
        b = ql;
        d = pl;
        k0 += TD_PHILOX_W0;
        k1 += TD_PHILOX_W1;
    }
    /* Quarter q of r[i] is block 4q + i: transpose the quarters. */
    __m512i ab0 = _mm512_unpacklo_epi32(a, b), ab1 = _mm512_unpackhi_epi32(a, b);
    __m512i cd0 = _mm512_unpacklo_epi32(c, d), cd1 = _mm512_unpackhi_epi32(c, d);
    __m512i r0 = _mm512_unpacklo_epi64(ab0, cd0), r1 = _mm512_unpackhi_epi64(ab0, cd0);
    __m512i r2 = _mm512_unpacklo_epi64(ab1, cd1), r3 = _mm512_unpackhi_epi64(ab1, cd1);
    __m512i t0 = _mm512_shuffle_i32x4(r0, r1, 0x44), t1 = _mm512_shuffle_i32x4(r2, r3, 0x44);
    __m512i t2 = _mm512_shuffle_i32x4(r0, r1, 0xEE), t3 = _mm512_shuffle_i32x4(r2, r3, 0xEE);
    _mm512_storeu_ps(out, gumbel_16(_mm512_shuffle_i32x4(t0, t1, 0x88)));
    _mm512_storeu_ps(out + 16, gumbel_16(_mm512_shuffle_i32x4(t0, t1, 0xDD)));
    _mm512_storeu_ps(out + 32, gumbel_16(_mm512_shuffle_i32x4(t2, t3, 0x88)));
    _mm512_storeu_ps(out + 48, gumbel_16(_mm512_shuffle_i32x4(t2, t3, 0xDD)));
}
ROW(row_avx512, WIDE, 64, gumbel_64)

FMA static void gumbel4_fma(uint64_t seed, uint32_t position, uint32_t stream, uint32_t block, float out[4])
{
    gumbel4(seed, position, stream, block, out);
}

static int best_path(void)
{
    if (!__builtin_cpu_supports("fma") || !__builtin_cpu_supports("avx2")) return 0;
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") ? 2 : 1;
}

void td_gumbel4(uint64_t seed, uint32_t position, uint32_t stream, uint32_t block, float out[4])
{
    if (best_path()) gumbel4_fma(seed, position, stream, block, out);
    else gumbel4(seed, position, stream, block, out);
}

bool td_gumbel_row_path(int path, uint64_t seed, uint32_t position, uint32_t stream, uint32_t id0, uint32_t n,
                        float *out)
{
    if (path > best_path()) return false;
    if (path == 2) row_avx512(seed, position, stream, id0, n, out);
    else if (path == 1) row_avx2(seed, position, stream, id0, n, out);
    else row_scalar(seed, position, stream, id0, n, out);
    return true;
}
#else
static int best_path(void)
{
    return 0;
}

void td_gumbel4(uint64_t seed, uint32_t position, uint32_t stream, uint32_t block, float out[4])
{
    gumbel4(seed, position, stream, block, out);
}

bool td_gumbel_row_path(int path, uint64_t seed, uint32_t position, uint32_t stream, uint32_t id0, uint32_t n,
                        float *out)
{
    if (path == 0) row_scalar(seed, position, stream, id0, n, out);
    return path == 0;
}
#endif

void td_gumbel_row(uint64_t seed, uint32_t position, uint32_t stream, uint32_t id0, uint32_t n, float *out)
{
    td_gumbel_row_path(best_path(), seed, position, stream, id0, n, out);
}
