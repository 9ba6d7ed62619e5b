/* kernels/simd.h - the vector vocabulary of the x86 families, included once per file compiled for an
 * instruction set.
 *
 * Two types:  v16  16 floats whatever the machine (one zmm or two ymm): softmax, norms, activations. Sums
 *                  over lanes use one fixed tree, so all families give the same bits.
 *             vec  one native register (LANES floats): the inner loops of the matrix kernels, where registers
 *             are counted.
 * Rules:   1. Work runs between td_fp_enter and td_fp_leave: denormals are flushed, as vdpbf16ps always does.
 *          2. Conversions to bf16 round to nearest even, flush denormals and quiet NaN (td_f32_to_bf16), in
 *             every family. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_SIMD_H
#define TD_KERNELS_SIMD_H

#include "kernels/tensor.h"
#include <immintrin.h>
#include <stdbool.h>

#define TD_INLINE static inline __attribute__((always_inline, unused))
#define TD_NOINLINE static __attribute__((noinline))
#define TD_UNROLL _Pragma("GCC unroll 32")
#define TD_ONCE _Pragma("GCC unroll 1")

enum { MXCSR_FTZ_DAZ = 0x8040 };

TD_INLINE unsigned td_fp_enter(void)
{
    unsigned old = _mm_getcsr();
    _mm_setcsr(old | MXCSR_FTZ_DAZ);
    return old;
}
TD_INLINE void td_fp_leave(unsigned old) { _mm_setcsr(old); }

/* ---- sums and maxima of lanes: the common end of both families' trees ---- */

TD_INLINE float sum8(__m256 v)
{
    __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    s = _mm_add_ps(s, _mm_movehl_ps(s, s));
    return _mm_cvtss_f32(_mm_add_ss(s, _mm_shuffle_ps(s, s, 1)));
}
/* lo holds lanes 0-7 and hi lanes 8-15 of four interleaved rows, four to a group: the last two steps. */
TD_INLINE __m128 fold_add(__m256 lo, __m256 hi)
{
    __m256 s = _mm256_add_ps(lo, hi);
    return _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}
TD_INLINE __m128 fold_max(__m256 lo, __m256 hi)
{
    __m256 s = _mm256_max_ps(lo, hi);
    return _mm_max_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
}

#if defined(__AVX512F__)

enum { LANES = 16 };
typedef __m512 vec;
typedef __m512i veci;
typedef __m512 v16;

TD_INLINE vec vec_zero(void) { return _mm512_setzero_ps(); }
TD_INLINE vec vec_load(const float *p) { return _mm512_loadu_ps(p); }
TD_INLINE void vec_store(float *p, vec v) { _mm512_storeu_ps(p, v); }
TD_INLINE vec vec_set1(float f) { return _mm512_set1_ps(f); }
TD_INLINE vec vec_add(vec a, vec b) { return _mm512_add_ps(a, b); }
TD_INLINE vec vec_mul(vec a, vec b) { return _mm512_mul_ps(a, b); }
TD_INLINE vec vec_fma(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
TD_INLINE veci veci_load(const void *p) { return _mm512_loadu_si512(p); }
TD_INLINE veci veci_set1(uint32_t u) { return _mm512_set1_epi32((int)u); }
TD_INLINE vec vec_even(veci w) { return _mm512_castsi512_ps(_mm512_slli_epi32(w, 16)); }
TD_INLINE vec vec_odd(veci w)
{
    return _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32((int)0xffff0000)));
}

TD_INLINE v16 v16_zero(void) { return _mm512_setzero_ps(); }
TD_INLINE v16 v16_set1(float f) { return _mm512_set1_ps(f); }
TD_INLINE v16 v16_load(const float *p) { return _mm512_loadu_ps(p); }
TD_INLINE void v16_store(float *p, v16 v) { _mm512_storeu_ps(p, v); }
TD_INLINE void v16_stream(float *p, v16 v) { _mm512_stream_ps(p, v); } /* past the caches; p: of 64 bytes */
TD_INLINE __mmask16 mask16(int n) { return (__mmask16)(n >= 16 ? 0xffffu : n <= 0 ? 0u : (1u << n) - 1); }
TD_INLINE v16 v16_load_n(const float *p, int n) { return _mm512_maskz_loadu_ps(mask16(n), p); }
TD_INLINE void v16_store_n(float *p, v16 v, int n) { _mm512_mask_storeu_ps(p, mask16(n), v); }
TD_INLINE v16 v16_add(v16 a, v16 b) { return _mm512_add_ps(a, b); }
TD_INLINE v16 v16_sub(v16 a, v16 b) { return _mm512_sub_ps(a, b); }
TD_INLINE v16 v16_mul(v16 a, v16 b) { return _mm512_mul_ps(a, b); }
TD_INLINE v16 v16_div(v16 a, v16 b) { return _mm512_div_ps(a, b); }
TD_INLINE v16 v16_fma(v16 a, v16 b, v16 c) { return _mm512_fmadd_ps(a, b, c); }
TD_INLINE v16 v16_fnma(v16 a, v16 b, v16 c) { return _mm512_fnmadd_ps(a, b, c); }
TD_INLINE v16 v16_max(v16 a, v16 b) { return _mm512_max_ps(a, b); } /* b where either is NaN */
TD_INLINE v16 v16_min(v16 a, v16 b) { return _mm512_min_ps(a, b); }
/* p * 2^n for the n in the low bits of t = n + 1.5 x 2^23, the result normal: exponent arithmetic. */
TD_INLINE v16 v16_scale(v16 p, v16 t)
{
    return _mm512_castsi512_ps(
        _mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(_mm512_castps_si512(t), 23)));
}
/* Lanes [lo, hi) of v, `other` elsewhere. */
TD_INLINE v16 v16_keep(v16 v, int lo, int hi, v16 other)
{
    return _mm512_mask_mov_ps(other, (__mmask16)(mask16(hi) & ~mask16(lo)), v);
}
TD_INLINE float v16_sum(v16 v)
{
    return sum8(_mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1)));
}
/* The sums (maxima) of four vectors at once, in the order of fold4 below. */
#define V16_FOLD4(name, op, end) \
    TD_INLINE __m128 name(const v16 v[4]) \
    { \
        v16 a = op(_mm512_unpacklo_ps(v[0], v[1]), _mm512_unpackhi_ps(v[0], v[1])); \
        v16 b = op(_mm512_unpacklo_ps(v[2], v[3]), _mm512_unpackhi_ps(v[2], v[3])); \
        v16 c = op(_mm512_shuffle_ps(a, b, 0x44), _mm512_shuffle_ps(a, b, 0xee)); \
        return end(_mm512_castps512_ps256(c), _mm512_extractf32x8_ps(c, 1)); \
    }
TD_INLINE v16 v16_from_bf16(__m256i b)
{
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(b), 16));
}
/* Rounded, the low half of each lane still to be cut off. */
TD_INLINE __m512i round_bf16_16(__m512 v)
{
    __m512i u = _mm512_castps_si512(v), one = _mm512_set1_epi32(1);
    __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)),
                                 _mm512_and_si512(_mm512_srli_epi32(u, 16), one));
    __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    r = _mm512_mask_or_epi32(r, nan, u, _mm512_set1_epi32(0x400000));
    __mmask16 tiny = _mm512_testn_epi32_mask(u, _mm512_set1_epi32(0x7f800000));
    return _mm512_mask_and_epi32(r, tiny, u, _mm512_set1_epi32((int)0x80000000));
}
#if defined(__AVX512BF16__)
TD_INLINE __m256i v16_to_bf16(v16 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
#else
TD_INLINE __m256i v16_to_bf16(v16 v) { return _mm512_cvtepi32_epi16(_mm512_srli_epi32(round_bf16_16(v), 16)); }
#endif
/* Rounded to bf16, as f32. */
TD_INLINE v16 v16_round_bf16(v16 v) { return vec_odd(round_bf16_16(v)); }
/* The same for what v16_exp2 makes of sums of bf16 products: 0, normal, or a quiet NaN whose low half is 0. */
TD_INLINE v16 v16_round_exp2(v16 v)
{
    veci u = _mm512_castps_si512(v), odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
    return vec_odd(_mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd));
}

/* 16 x 16 dwords in registers: r[i] lane j <-> r[j] lane i. */
TD_INLINE void transpose16(__m512i r[16])
{
    __m512i t[16];
    TD_UNROLL for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    TD_UNROLL for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    TD_UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
        t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
        t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
        t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
    }
    TD_UNROLL for (int i = 0; i < 4; i++) {
        r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
        r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
        r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
        r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
    }
}

/* dst[k * stride + i] = rows[i][k0 + k]: 16 dwords of 16 rows. */
TD_INLINE void transpose_16x16(const uint32_t *const rows[16], size_t k0, uint32_t *dst, size_t stride)
{
    __m512i r[16];
    TD_UNROLL for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(rows[i] + k0);
    transpose16(r);
    TD_UNROLL for (int i = 0; i < 16; i++) _mm512_storeu_si512(dst + (size_t)i * stride, r[i]);
}

/* to[d] = a[d] | b[d] << 16 for 16 or 32 elements. */
TD_INLINE void interleave_16(uint32_t *to, const uint16_t *a, const uint16_t *b)
{
    __m512i lo = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)a)),
            hi = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const void *)b));
    _mm512_storeu_si512(to, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
}
TD_INLINE void interleave_32(uint32_t *to, const uint16_t *a, const uint16_t *b)
{
    __m512i x = _mm512_loadu_si512(a), y = _mm512_loadu_si512(b), step = _mm512_set1_epi32(0x00010001);
    __m512i first = _mm512_set_epi32(0x002f000f, 0x002e000e, 0x002d000d, 0x002c000c, 0x002b000b, 0x002a000a,
                                     0x00290009, 0x00280008, 0x00270007, 0x00260006, 0x00250005, 0x00240004,
                                     0x00230003, 0x00220002, 0x00210001, 0x00200000);
    _mm512_storeu_si512(to, _mm512_permutex2var_epi16(x, first, y));
    _mm512_storeu_si512(to + 16,
                        _mm512_permutex2var_epi16(x, _mm512_add_epi32(first, _mm512_slli_epi32(step, 4)), y));
}
/* Is one of the 32 bf16 values at p infinite or NaN? */
TD_INLINE bool special_32(const void *p)
{
    __m512i big = _mm512_set1_epi16(0x7f80);
    return _mm512_cmpeq_epi16_mask(_mm512_and_si512(_mm512_loadu_si512(p), big), big) != 0;
}
TD_INLINE __m128 v16_first4(v16 v) { return _mm512_castps512_ps128(v); }
TD_INLINE v16 v16_from4(__m128 v) { return _mm512_broadcast_f32x4(v); }
TD_INLINE v16 v16_lane(__m128 v) { return _mm512_broadcastss_ps(v); }
V16_FOLD4(v16_sum4, _mm512_add_ps, fold_add)
V16_FOLD4(v16_max4, _mm512_max_ps, fold_max)

#else /* AVX2 */

enum { LANES = 8 };
typedef __m256 vec;
typedef __m256i veci;
typedef struct v16 {
    __m256 lo, hi;
} v16;

TD_INLINE vec vec_zero(void) { return _mm256_setzero_ps(); }
TD_INLINE vec vec_load(const float *p) { return _mm256_loadu_ps(p); }
TD_INLINE void vec_store(float *p, vec v) { _mm256_storeu_ps(p, v); }
TD_INLINE vec vec_set1(float f) { return _mm256_set1_ps(f); }
TD_INLINE vec vec_add(vec a, vec b) { return _mm256_add_ps(a, b); }
TD_INLINE vec vec_mul(vec a, vec b) { return _mm256_mul_ps(a, b); }
TD_INLINE vec vec_fma(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
TD_INLINE veci veci_load(const void *p) { return _mm256_loadu_si256(p); }
TD_INLINE veci veci_set1(uint32_t u) { return _mm256_set1_epi32((int)u); }
TD_INLINE vec vec_even(veci w) { return _mm256_castsi256_ps(_mm256_slli_epi32(w, 16)); }
TD_INLINE vec vec_odd(veci w)
{
    return _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32((int)0xffff0000)));
}

TD_INLINE v16 v16_zero(void) { return (v16){_mm256_setzero_ps(), _mm256_setzero_ps()}; }
TD_INLINE v16 v16_set1(float f) { return (v16){_mm256_set1_ps(f), _mm256_set1_ps(f)}; }
TD_INLINE v16 v16_load(const float *p) { return (v16){_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
TD_INLINE void v16_store(float *p, v16 v) { _mm256_storeu_ps(p, v.lo), _mm256_storeu_ps(p + 8, v.hi); }
TD_INLINE void v16_stream(float *p, v16 v) { _mm256_stream_ps(p, v.lo), _mm256_stream_ps(p + 8, v.hi); }
/* All ones in lanes below n of the eight from `first`. */
TD_INLINE __m256i mask8(int n, int first)
{
    return _mm256_cmpgt_epi32(_mm256_set1_epi32(n - first), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
TD_INLINE vec vec_load_n(const float *p, int n) { return _mm256_maskload_ps(p, mask8(n, 0)); }
TD_INLINE v16 v16_load_n(const float *p, int n)
{
    return (v16){_mm256_maskload_ps(p, mask8(n, 0)), _mm256_maskload_ps(p + 8, mask8(n, 8))};
}
TD_INLINE void v16_store_n(float *p, v16 v, int n)
{
    _mm256_maskstore_ps(p, mask8(n, 0), v.lo), _mm256_maskstore_ps(p + 8, mask8(n, 8), v.hi);
}
#define V16_OP2(name, op) \
    TD_INLINE v16 name(v16 a, v16 b) { return (v16){op(a.lo, b.lo), op(a.hi, b.hi)}; }
V16_OP2(v16_add, _mm256_add_ps)
V16_OP2(v16_sub, _mm256_sub_ps)
V16_OP2(v16_mul, _mm256_mul_ps)
V16_OP2(v16_div, _mm256_div_ps)
V16_OP2(v16_max, _mm256_max_ps)
V16_OP2(v16_min, _mm256_min_ps)
#undef V16_OP2
TD_INLINE v16 v16_fma(v16 a, v16 b, v16 c)
{
    return (v16){_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
TD_INLINE v16 v16_fnma(v16 a, v16 b, v16 c)
{
    return (v16){_mm256_fnmadd_ps(a.lo, b.lo, c.lo), _mm256_fnmadd_ps(a.hi, b.hi, c.hi)};
}
TD_INLINE __m256 scale8(__m256 p, __m256 t)
{
    return _mm256_castsi256_ps(
        _mm256_add_epi32(_mm256_castps_si256(p), _mm256_slli_epi32(_mm256_castps_si256(t), 23)));
}
TD_INLINE v16 v16_scale(v16 p, v16 t) { return (v16){scale8(p.lo, t.lo), scale8(p.hi, t.hi)}; }
TD_INLINE __m256 keep8(__m256 v, int lo, int hi, int first, __m256 other)
{
    __m256i in = _mm256_andnot_si256(mask8(lo, first), mask8(hi, first));
    return _mm256_blendv_ps(other, v, _mm256_castsi256_ps(in));
}
TD_INLINE v16 v16_keep(v16 v, int lo, int hi, v16 other)
{
    return (v16){keep8(v.lo, lo, hi, 0, other.lo), keep8(v.hi, lo, hi, 8, other.hi)};
}
TD_INLINE float v16_sum(v16 v) { return sum8(_mm256_add_ps(v.lo, v.hi)); }
#define FOLD8(op, a, b, c, d) \
    op(_mm256_shuffle_ps(op(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)), \
                         op(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)), 0x44), \
       _mm256_shuffle_ps(op(_mm256_unpacklo_ps(a, b), _mm256_unpackhi_ps(a, b)), \
                         op(_mm256_unpacklo_ps(c, d), _mm256_unpackhi_ps(c, d)), 0xee))
#define V16_FOLD4(name, op, end) \
    TD_INLINE __m128 name(const v16 v[4]) \
    { \
        return end(FOLD8(op, v[0].lo, v[1].lo, v[2].lo, v[3].lo), \
                   FOLD8(op, v[0].hi, v[1].hi, v[2].hi, v[3].hi)); \
    }
TD_INLINE v16 v16_from_bf16(__m256i b)
{
    __m256i lo = _mm256_cvtepu16_epi32(_mm256_castsi256_si128(b)),
            hi = _mm256_cvtepu16_epi32(_mm256_extracti128_si256(b, 1));
    return (v16){_mm256_castsi256_ps(_mm256_slli_epi32(lo, 16)),
                 _mm256_castsi256_ps(_mm256_slli_epi32(hi, 16))};
}
/* Eight bf16 patterns in the high halves of dwords; the low halves hold whatever the rounding left. */
TD_INLINE __m256i round_bf16_8(__m256 v)
{
    __m256i u = _mm256_castps_si256(v), one = _mm256_set1_epi32(1);
    __m256i r = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)),
                                 _mm256_and_si256(_mm256_srli_epi32(u, 16), one));
    __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
    r = _mm256_blendv_epi8(r, _mm256_or_si256(u, _mm256_set1_epi32(0x400000)), nan);
    __m256i exponent = _mm256_and_si256(u, _mm256_set1_epi32(0x7f800000));
    __m256i tiny = _mm256_cmpeq_epi32(exponent, _mm256_setzero_si256());
    return _mm256_blendv_epi8(r, _mm256_and_si256(u, _mm256_set1_epi32((int)0x80000000)), tiny);
}
TD_INLINE __m256i v16_to_bf16(v16 v)
{
    __m256i lo = _mm256_srli_epi32(round_bf16_8(v.lo), 16), hi = _mm256_srli_epi32(round_bf16_8(v.hi), 16);
    return _mm256_permute4x64_epi64(_mm256_packus_epi32(lo, hi), 0xd8);
}
/* Rounded to bf16, as f32. */
TD_INLINE vec vec_round_bf16(vec v) { return vec_odd(round_bf16_8(v)); }
TD_INLINE v16 v16_round_bf16(v16 v) { return (v16){vec_round_bf16(v.lo), vec_round_bf16(v.hi)}; }
/* The same for what v16_exp2 makes of sums of bf16 products: 0, normal, or a quiet NaN whose low half is 0. */
TD_INLINE vec vec_round_exp2(vec v)
{
    veci u = _mm256_castps_si256(v), odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
    return vec_odd(_mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd));
}
TD_INLINE v16 v16_round_exp2(v16 v) { return (v16){vec_round_exp2(v.lo), vec_round_exp2(v.hi)}; }

/* 8 x 8 dwords in registers: r[i] lane j <-> r[j] lane i. */
TD_INLINE void transpose8(__m256 r[8])
{
    __m256 t[8];
    TD_UNROLL for (int i = 0; i < 8; i += 2) {
        t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
        t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
    }
    TD_UNROLL for (int i = 0; i < 8; i += 4) {
        r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
        r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
        r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
        r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
    }
    TD_UNROLL for (int i = 0; i < 4; i++) {
        t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
        t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
    }
    TD_UNROLL for (int i = 0; i < 8; i++) r[i] = t[i];
}

/* dst[k * stride + i] = rows[i][k0 + k]: 8 dwords of 8 rows. */
TD_INLINE void transpose_8x8(const uint32_t *const rows[8], size_t k0, uint32_t *dst, size_t stride)
{
    __m256 r[8];
    TD_UNROLL for (int i = 0; i < 8; i++) r[i] = _mm256_loadu_ps((const float *)rows[i] + k0);
    transpose8(r);
    TD_UNROLL for (int i = 0; i < 8; i++) _mm256_storeu_ps((float *)dst + (size_t)i * stride, r[i]);
}
TD_INLINE void transpose_16x16(const uint32_t *const rows[16], size_t k0, uint32_t *dst, size_t stride)
{
    for (size_t k = 0; k < 16; k += 8)
        for (int i = 0; i < 16; i += 8) transpose_8x8(rows + i, k0 + k, dst + k * stride + i, stride);
}

TD_INLINE void interleave_16(uint32_t *to, const uint16_t *a, const uint16_t *b)
{
    for (int d = 0; d < 16; d += 8) {
        __m128i x = _mm_loadu_si128((const void *)(a + d)), y = _mm_loadu_si128((const void *)(b + d));
        _mm_storeu_si128((void *)(to + d), _mm_unpacklo_epi16(x, y));
        _mm_storeu_si128((void *)(to + d + 4), _mm_unpackhi_epi16(x, y));
    }
}
TD_INLINE void interleave_32(uint32_t *to, const uint16_t *a, const uint16_t *b)
{
    interleave_16(to, a, b);
    interleave_16(to + 16, a + 16, b + 16);
}
TD_INLINE bool special_32(const void *p)
{
    __m256i big = _mm256_set1_epi16(0x7f80), x = _mm256_loadu_si256(p),
            y = _mm256_loadu_si256((const __m256i *)p + 1);
    x = _mm256_cmpeq_epi16(_mm256_and_si256(x, big), big),
    y = _mm256_cmpeq_epi16(_mm256_and_si256(y, big), big);
    return _mm256_movemask_epi8(_mm256_or_si256(x, y)) != 0;
}
TD_INLINE __m128 v16_first4(v16 v) { return _mm256_castps256_ps128(v.lo); }
TD_INLINE v16 v16_from4(__m128 v) { return (v16){_mm256_set_m128(v, v), _mm256_set_m128(v, v)}; }
TD_INLINE v16 v16_lane(__m128 v) { return (v16){_mm256_broadcastss_ps(v), _mm256_broadcastss_ps(v)}; }
V16_FOLD4(v16_sum4, _mm256_add_ps, fold_add)
V16_FOLD4(v16_max4, _mm256_max_ps, fold_max)

#endif

TD_INLINE void store_bf16_16(uint16_t *p, v16 v) { _mm256_storeu_si256((void *)p, v16_to_bf16(v)); }
/* 32 values to bf16. */
TD_INLINE void store_bf16_32(uint16_t *p, v16 a, v16 b)
{
#if defined(__AVX512BF16__)
    _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh(b, a));
#else
    store_bf16_16(p, a);
    store_bf16_16(p + 16, b);
#endif
}
TD_INLINE v16 load_bf16_16(const uint16_t *p) { return v16_from_bf16(_mm256_loadu_si256((const void *)p)); }

/* exp2(t) for t <= 0 (or NaN), clamped at 2^-125; exact at 0. Least maximal relative error on [-1/2, 1/2]:
 * 1.6e-7 with rounding. */
TD_INLINE v16 v16_exp2(v16 t)
{
    t = v16_max(v16_set1(-125.0f), t); /* this order keeps NaN */
    v16 magic = v16_set1(0x1.8p23f), n = v16_add(t, magic), f = v16_sub(t, v16_sub(n, magic));
    v16 p = v16_set1(0x1.5bba14p-10f);
    p = v16_fma(p, f, v16_set1(0x1.3cea88p-7f));
    p = v16_fma(p, f, v16_set1(0x1.c6b752p-5f));
    p = v16_fma(p, f, v16_set1(0x1.ebf9bcp-3f));
    p = v16_fma(p, f, v16_set1(0x1.62e42ap-1f));
    p = v16_fma(p, f, v16_set1(1.0f));
    return v16_scale(p, n);
}

/* exp(x), clamped to [-87, 88]; NaN stays. Two-constant reduction by log 2; 1e-7 relative. */
TD_INLINE v16 v16_exp(v16 x)
{
    x = v16_min(v16_set1(88.0f), v16_max(v16_set1(-87.0f), x));
    v16 magic = v16_set1(0x1.8p23f), n = v16_fma(x, v16_set1(0x1.715476p+0f), magic),
        whole = v16_sub(n, magic);
    v16 r = v16_fnma(whole, v16_set1(0x1.62e4p-1f), x);
    r = v16_fnma(whole, v16_set1(0x1.7f7d1cp-20f), r);
    v16 p = v16_set1(0x1.6ae73p-10f);
    p = v16_fma(p, r, v16_set1(0x1.126782p-7f));
    p = v16_fma(p, r, v16_set1(0x1.555822p-5f));
    p = v16_fma(p, r, v16_set1(0x1.55541ap-3f));
    p = v16_fma(p, r, v16_set1(0x1.fffffcp-2f));
    p = v16_fma(p, r, v16_set1(1.0f));
    p = v16_fma(p, r, v16_set1(1.0f));
    return v16_scale(p, n);
}

#endif
