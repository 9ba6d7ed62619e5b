/* tests/simt/simt_ops.h - what device code calls: barriers, warp operations, atomics, math, bits, loads. Part of simt.h. */
// SPDX-License-Identifier: Apache-2.0
#pragma once

// ---------------------------------------------------------------- barriers, warp collectives
inline void __syncthreads(SIMT_AT)
{
    simt::block_barrier(0, 0, line, file);
}
inline int __syncthreads_count(int p, SIMT_AT)
{
    return simt::block_barrier(p != 0, 0, line, file);
}
inline int __syncthreads_and(int p, SIMT_AT)
{
    return simt::block_barrier(p != 0, 1, line, file);
}
inline int __syncthreads_or(int p, SIMT_AT)
{
    return simt::block_barrier(p != 0, 2, line, file);
}
inline void __syncwarp(unsigned m = 0xffffffffu, SIMT_AT)
{
    simt::warp_op(simt::SYNC, m, line, file);
}
namespace simt
{
template <class T> T shfl_from(unsigned mask, T v, int src, int line, const char *file)
{
    static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value,
                  "shuffle of 2/4/8-byte values only");
    Fiber *f = cur;
    f->in[0] = f->in[1] = 0;
    memcpy(f->in, &v, sizeof v);
    f->in[2] = (uint32_t)src;
    warp_op(SHFL, mask, line, file);
    T r;
    memcpy((void *)&r, f->out, sizeof r);
    return r;
}
inline uint32_t warp_u32(int kind, unsigned mask, uint32_t v, int line, const char *file)
{
    Fiber *f = cur;
    f->in[0] = v;
    warp_op(kind, mask, line, file);
    return f->out[0];
}
} // namespace simt
template <class T> T __shfl_sync(unsigned m, T v, int src, int w = 32, SIMT_AT)
{
    int l = simt::cur->lane;
    return simt::shfl_from(m, v, (l & ~(w - 1)) | (src & (w - 1)), line, file);
}
template <class T> T __shfl_xor_sync(unsigned m, T v, int x, int w = 32, SIMT_AT)
{
    int l = simt::cur->lane, s = l ^ x;
    return simt::shfl_from(m, v, s > (l | (w - 1)) ? l : s, line, file);
}
template <class T> T __shfl_up_sync(unsigned m, T v, unsigned d, int w = 32, SIMT_AT)
{
    int l = simt::cur->lane, s = l - (int)d;
    return simt::shfl_from(m, v, s < (l & ~(w - 1)) ? l : s, line, file);
}
template <class T> T __shfl_down_sync(unsigned m, T v, unsigned d, int w = 32, SIMT_AT)
{
    int l = simt::cur->lane, s = l + (int)d;
    return simt::shfl_from(m, v, s > (l | (w - 1)) ? l : s, line, file);
}
inline unsigned __ballot_sync(unsigned m, int p, SIMT_AT)
{
    return simt::warp_u32(simt::BALLOT, m, p != 0, line, file);
}
inline int __any_sync(unsigned m, int p, SIMT_AT)
{
    return simt::warp_u32(simt::BALLOT, m, p != 0, line, file) != 0;
}
inline int __all_sync(unsigned m, int p, SIMT_AT)
{
    return simt::warp_u32(simt::BALLOT, m, p == 0, line, file) == 0;
}
inline unsigned __match_any_sync(unsigned m, unsigned v, SIMT_AT)
{
    return simt::warp_u32(simt::MATCH, m, v, line, file);
}
template <class T> T __reduce_add_sync(unsigned m, T v, SIMT_AT)
{
    return (T)simt::warp_u32(simt::RADD, m, (uint32_t)v, line, file);
}
inline unsigned __reduce_min_sync(unsigned m, unsigned v, SIMT_AT)
{
    return simt::warp_u32(simt::RMIN, m, v, line, file);
}
inline unsigned __reduce_max_sync(unsigned m, unsigned v, SIMT_AT)
{
    return simt::warp_u32(simt::RMAX, m, v, line, file);
}
inline unsigned __reduce_and_sync(unsigned m, unsigned v, SIMT_AT)
{
    return simt::warp_u32(simt::RAND, m, v, line, file);
}
inline unsigned __reduce_or_sync(unsigned m, unsigned v, SIMT_AT)
{
    return simt::warp_u32(simt::ROR, m, v, line, file);
}
inline int __reduce_min_sync(unsigned m, int v, SIMT_AT)
{
    return (int)(simt::warp_u32(simt::RMIN, m, (uint32_t)v ^ 0x80000000u, line, file) ^ 0x80000000u);
}
inline int __reduce_max_sync(unsigned m, int v, SIMT_AT)
{
    return (int)(simt::warp_u32(simt::RMAX, m, (uint32_t)v ^ 0x80000000u, line, file) ^ 0x80000000u);
}

// ---------------------------------------------------------------- atomics (fibers switch only at sync
// points: plain code is atomic)
#define SIMT_ATOMIC(name, expr)                                                                              \
    template <class T> SIMT_NOSAN T name(T *p, typename simt::same<T>::type v)                               \
    {                                                                                                        \
        simt::hook_atomic(p, sizeof(T), __builtin_return_address(0));                                        \
        T o = *p;                                                                                            \
        *p = (T)(expr);                                                                                      \
        return o;                                                                                            \
    }                                                                                                        \
    template <class T> SIMT_NOSAN T name##_block(T *p, typename simt::same<T>::type v)                       \
    {                                                                                                        \
        simt::hook_atomic(p, sizeof(T), __builtin_return_address(0));                                        \
        T o = *p;                                                                                            \
        *p = (T)(expr);                                                                                      \
        return o;                                                                                            \
    }
SIMT_ATOMIC(atomicAdd, o + v)
SIMT_ATOMIC(atomicSub, o - v) SIMT_ATOMIC(atomicMax, o < v ? v : o) SIMT_ATOMIC(atomicMin, v < o ? v : o)
    SIMT_ATOMIC(atomicAnd, o &v) SIMT_ATOMIC(atomicOr, o | v) SIMT_ATOMIC(atomicXor, o ^ v)
        SIMT_ATOMIC(atomicInc, o >= v ? 0 : o + 1)
            SIMT_ATOMIC(atomicDec, (o == 0 || o > v) ? v : o - 1) template <class T>
            SIMT_NOSAN T atomicExch(T *p, typename simt::same<T>::type v)
{
    simt::yield();
    simt::hook_atomic(p, sizeof(T), __builtin_return_address(0));
    T o = *p;
    *p = v;
    return o;
}
template <class T>
SIMT_NOSAN T atomicCAS(T *p, typename simt::same<T>::type c, typename simt::same<T>::type v)
{
    simt::yield();
    simt::hook_atomic(p, sizeof(T), __builtin_return_address(0));
    T o = *p;
    if (o == c) *p = v;
    return o;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __threadfence_system() {}
inline void __nanosleep(unsigned)
{
    simt::yield();
}

// ---------------------------------------------------------------- math, bits, loads
namespace simt
{
template <class D, class S> inline D bits(S s)
{
    static_assert(sizeof(D) == sizeof(S), "");
    D d;
    memcpy((void *)&d, &s, sizeof d);
    return d;
}
} // namespace simt
inline float __uint_as_float(unsigned u)
{
    return simt::bits<float>(u);
}
inline float __int_as_float(int u)
{
    return simt::bits<float>(u);
}
inline unsigned __float_as_uint(float f)
{
    return simt::bits<unsigned>(f);
}
inline int __float_as_int(float f)
{
    return simt::bits<int>(f);
}
// glibc's <math.h> declares __expf, __logf, ... itself (C linkage, not exported).  A definition works only
// after <cmath> and silently takes C linkage, so these are macros.
#define __expf(x) ::expf(x)
#define __exp10f(x) ::powf(10.f, (x))
#define __logf(x) ::logf(x)
#define __log2f(x) ::log2f(x)
#define __log10f(x) ::log10f(x)
#define __sinf(x) ::sinf(x)
#define __cosf(x) ::cosf(x)
#define __tanf(x) ::tanf(x)
#define __powf(x, y) ::powf(x, y)
#define __sincosf(x, s, c) ::sincosf(x, s, c)
inline float rsqrtf(float x)
{
    return (float)(1.0 / std::sqrt((double)x));
}
inline float __frsqrt_rn(float x)
{
    return rsqrtf(x);
}
inline float __frcp_rn(float x)
{
    return 1.f / x;
}
inline float __fdividef(float a, float b)
{
    return a / b;
}
inline float __fdiv_rn(float a, float b)
{
    return a / b;
}
inline float __fmaf_rn(float a, float b, float c)
{
    return std::fma(a, b, c);
}
inline float __fmul_rn(float a, float b)
{
    return a * b;
}
inline float __fadd_rn(float a, float b)
{
    return a + b;
}
inline float __fsqrt_rn(float a)
{
    return std::sqrt(a);
}
inline float __saturatef(float a)
{
    return a > 0.f ? (a < 1.f ? a : 1.f) : 0.f;
}
namespace simt
{
inline int f2i(double d)
{
    return d != d ? 0 : d >= 2147483647.0 ? INT_MAX : d <= -2147483648.0 ? INT_MIN : (int)d;
}
} // namespace simt
inline int __float2int_rn(float f)
{
    return simt::f2i(std::nearbyint(f));
}
inline int __float2int_rz(float f)
{
    return simt::f2i(std::trunc(f));
}
inline int __float2int_rd(float f)
{
    return simt::f2i(std::floor(f));
}
inline int __float2int_ru(float f)
{
    return simt::f2i(std::ceil(f));
}
inline float __int2float_rn(int i)
{
    return (float)i;
}
inline float __uint2float_rn(unsigned i)
{
    return (float)i;
}
inline int __popc(unsigned x)
{
    return __builtin_popcount(x);
}
inline int __popcll(unsigned long long x)
{
    return __builtin_popcountll(x);
}
inline int __clz(int x)
{
    return x ? __builtin_clz((unsigned)x) : 32;
}
inline int __ffs(int x)
{
    return __builtin_ffs(x);
}
inline unsigned __brev(unsigned x)
{
    unsigned r = 0;
    for (int i = 0; i < 32; i++) r |= ((x >> i) & 1u) << (31 - i);
    return r;
}
inline unsigned __umulhi(unsigned a, unsigned b)
{
    return (unsigned)(((uint64_t)a * b) >> 32);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s)
{
    uint64_t v = ((uint64_t)b << 32) | a;
    unsigned r = 0;
    for (int i = 0; i < 4; i++) {
        unsigned n = (s >> (4 * i)) & 15, c = (v >> (8 * (n & 7))) & 255;
        if (n & 8) c = (c & 128) ? 255 : 0;
        r |= c << (8 * i);
    }
    return r;
}
inline int __dp4a(int a, int b, int c)
{
    for (int i = 0; i < 4; i++) c += (int)(int8_t)(a >> (8 * i)) * (int)(int8_t)(b >> (8 * i));
    return c;
}
#define SIMT_MM(T)                                                                                           \
    inline T min(T a, T b)                                                                                   \
    {                                                                                                        \
        return b < a ? b : a;                                                                                \
    }                                                                                                        \
    inline T max(T a, T b)                                                                                   \
    {                                                                                                        \
        return a < b ? b : a;                                                                                \
    }
SIMT_MM(int)
SIMT_MM(unsigned) SIMT_MM(long) SIMT_MM(unsigned long) SIMT_MM(long long)
    SIMT_MM(unsigned long long) inline float min(float a, float b)
{
    return std::fmin(a, b);
}
inline float max(float a, float b)
{
    return std::fmax(a, b);
}
inline double min(double a, double b)
{
    return std::fmin(a, b);
}
inline double max(double a, double b)
{
    return std::fmax(a, b);
}
template <class T> inline T __ldg(const T *p)
{
    return *p;
}
template <class T> inline T __ldcg(const T *p)
{
    return *p;
}
template <class T> inline T __ldcs(const T *p)
{
    return *p;
}
template <class T> inline void __stcs(T *p, typename simt::same<T>::type v)
{
    *p = v;
}
template <class T> inline void __stcg(T *p, typename simt::same<T>::type v)
{
    *p = v;
}
inline long long clock64()
{
    return (long long)__builtin_ia32_rdtsc();
}
inline void __trap()
{
    simt::fail("__trap()");
}
