/* tests/simt/simt.h - runs CUDA C kernels on the CPU: host compiler only, one fiber per CUDA thread, blocks
 * one after another. Forced in front of every .cu file (-include) in place of the CUDA runtime;
 * kernels/td_cuda.h sees SIMT_SHIM and adds nothing.
 *
 * Model:   A fiber runs until it blocks: barrier, warp operation, exit. Static __shared__ is thread_local, so
 * that all of it lies in one TLS block that is poisoned before every block. Device memory has its own pages,
 *          each allocation flush with an inaccessible one, contents poisoned. A fault, a deadlock, a wrong
 * mask ends the launch with cudaErrorLaunchFailure and a text (simt_last_error in simt_c.h), not the process.
 * Rules:   1. Kernels live in the shared library of the shim, never in the test program: the program's own
 *             thread_local variables would be poisoned with the shared memory.
 *          2. SIMT_CHECK: kernel files are compiled with -fsanitize=thread, libtsan is not linked: the hooks
 * of every access arrive in simt_rt.cpp, which itself is compiled without the flag.
 *          3. Tests compare with a tolerance where mma or __expf is involved: neither has the hardware's
 * bits. Environment: SIMT_ORDER 0/1 skewed schedules, 2 round robin, 3.. random seeds; SIMT_POISON byte;
 * SIMT_TIMEOUT s; SIMT_EAGER=1 copies cp.async at once; SIMT_EXIT_OK=1 lets exited threads count at barriers.
 * Hopper: simt_sm90a.h. Not emulated: clusters, memory order, streams (all synchronous).
 * tests/simt/README.md. */
// SPDX-License-Identifier: Apache-2.0
#pragma once
#ifdef __CUDACC__
#error "simt.h is the host emulation"
#endif
#define SIMT_SHIM 1
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif

// ---------------------------------------------------------------- qualifiers
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
// No __noinline__ here: libstdc++ writes __attribute__((__noinline__)).
// Static __shared__: a function-local static is one object per template instantiation; blocks run one after
// another, so one copy is enough.  thread_local puts all of them (and nothing else) in .tbss, which the
// runtime can find and poison at the start of every block (g++ 12 ignores section attributes on template
// statics, so sections cannot). Under ASan plain static, because only that gets red zones.
#ifdef SIMT_ASAN
#define __shared__ static
#else
#define __shared__ static thread_local
#endif
#define TD_DYN_SMEM(T, name) T *name = reinterpret_cast<T *>(simt::dyn_smem())

// ---------------------------------------------------------------- vector types
#define SIMT_V(T, S, A)                                                                                      \
    struct __attribute__((aligned(sizeof(T)))) S##1                                                          \
    {                                                                                                        \
        T x;                                                                                                 \
    };                                                                                                       \
    struct __attribute__((aligned(2 * sizeof(T)))) S##2                                                      \
    {                                                                                                        \
        T x, y;                                                                                              \
    };                                                                                                       \
    struct S##3                                                                                              \
    {                                                                                                        \
        T x, y, z;                                                                                           \
    };                                                                                                       \
    struct __attribute__((aligned(A))) S##4                                                                  \
    {                                                                                                        \
        T x, y, z, w;                                                                                        \
    };                                                                                                       \
    inline S##2 make_##S##2(T x, T y)                                                                        \
    {                                                                                                        \
        return {x, y};                                                                                       \
    }                                                                                                        \
    inline S##3 make_##S##3(T x, T y, T z)                                                                   \
    {                                                                                                        \
        return {x, y, z};                                                                                    \
    }                                                                                                        \
    inline S##4 make_##S##4(T x, T y, T z, T w)                                                              \
    {                                                                                                        \
        return {x, y, z, w};                                                                                 \
    }
SIMT_V(signed char, char, 4)
SIMT_V(unsigned char, uchar, 4) SIMT_V(short, short, 8) SIMT_V(unsigned short, ushort, 8) SIMT_V(int, int, 16)
    SIMT_V(unsigned, uint, 16) SIMT_V(float, float, 16) SIMT_V(double, double, 16)
        SIMT_V(long long, longlong, 16) SIMT_V(unsigned long long, ulonglong, 16)
#undef SIMT_V
            struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
// Plain globals, not macros: cudaLaunchConfig_t has members called gridDim and blockDim.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---------------------------------------------------------------- runtime interface
namespace simt
{
enum Kind : int {
    SYNC,
    SHFL,
    BALLOT,
    MATCH,
    RADD,
    RMIN,
    RMAX,
    RAND,
    ROR,
    MMABF,
    MMAF16,
    LDM1,
    LDM2,
    LDM4,
    LDM1T,
    LDM2T,
    LDM4T,
    CALL
};
struct Fiber {
    void *sp;
    char *stack;
    void *fake;
    void *uctx;
    uint3 tid;
    unsigned idx, lane, warp;
    int alive, where; // where: 0 running/ready, 1 block barrier, 2 warp op, 3 asleep
    unsigned mask;
    int kind, line;
    const char *file;
    unsigned wep;
    int pred;
    alignas(16) uint32_t in[12];
    alignas(16) uint32_t out[4];
    int waited; // td_grid_wait has been passed
    // simt_rt.h: a warp operation's operands; what is slept on; what is known of other warps; stores before this epoch
    // are fenced for the async proxy
    void *call;
    const void *on;
    const char *what;
    uint32_t seen[32], fenced;
};
struct Options {
    int order = 0, poison = 0xFF, timeout = 20, exit_ok = 0, uninit = 1, quiet = 0, eager = 0, hide = 0;
    // the device that is emulated: how many (0: none, -1: the driver is too old), MiB of memory, compute capability
    int devices = 1, memory = 4096, arch = 80;
    int wrong = 0;      // bits: 1 mma, 2 cuBLASLt, 4, 8 Hopper's product and attention compute wrongly
    int plant = 0;      // simt_sm90a.h: a mistake that Hopper's kernels then make
    int fail_after = 0; // that launch fails, and everything after it; 0: none
};
struct Stats {
    uint64_t launches, blocks, threads, switches, barriers, warp_ops, mma, hooks;
};
extern Fiber *cur;
extern Options opt;
extern Stats stats;
void *dyn_smem();
int block_barrier(int pred, int what, int line, const char *file); // what: 0 count 1 and 2 or
void warp_op(int kind, unsigned mask, int line, const char *file); // operands in cur->in, result in cur->out
void yield();
[[noreturn]] void fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
const char *last_error(); // text of the last failed launch or copy, "" if none
void clear_error();
void set_static_shared(const void *fn);
void grid_wait();
void hook_atomic(const void *p, unsigned n, void *pc);
void cp_async(void *dst, const void *src, unsigned n, unsigned srcn, int line);
void cp_commit();
void cp_wait(int keep);
void acquire_all(); // CHECK mode: treat earlier blocks' writes of this launch as visible from here on
template <class... P> struct Thunk {
    void (*k)(P...);
    std::tuple<P...> a;
    static void run(void *s)
    {
        Thunk *t = (Thunk *)s;
        std::apply(t->k, t->a);
    }
};
template <class T> struct same {
    using type = T;
};
} // namespace simt
#define SIMT_AT int line = __builtin_LINE(), const char *file = __builtin_FILE()
#define SIMT_NOSAN __attribute__((noinline, no_sanitize("thread")))

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

// ---------------------------------------------------------------- bf16 / half (default constructors trivial:
// needed for __shared__ arrays)
namespace simt
{
inline uint16_t f2bf(float f)
{
    uint32_t u = bits<uint32_t>(f);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fff; // CUDA's canonical NaN
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
inline float bf2f(uint16_t h)
{
    return bits<float>((uint32_t)h << 16);
}
inline uint16_t f2h(float f)
{
    uint32_t u = bits<uint32_t>(f), s = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return 0x7fff;
    if (a >= 0x477ff000u) return (uint16_t)(s | 0x7c00u); // rounds to infinity
    if (a < 0x38800000u) {                                // subnormal or zero: scale so that the FPU rounds
        return (uint16_t)(s | (uint32_t)std::nearbyint(bits<float>(a) * 16777216.f));
    }
    a += 0xfffu + ((a >> 13) & 1);
    return (uint16_t)(s | ((a - 0x38000000u) >> 13));
}
inline float h2f(uint16_t h)
{
    uint32_t s = (uint32_t)(h & 0x8000u) << 16, e = (h >> 10) & 31, m = h & 1023u;
    if (e == 31) return bits<float>(s | 0x7f800000u | (m << 13));
    if (e == 0) {
        float v = (float)m * 5.9604644775390625e-8f;
        return s ? -v : v;
    }
    return bits<float>(s | ((e + 112) << 23) | (m << 13));
}
} // namespace simt
#define SIMT_H(N, N2, TO, FROM)                                                                              \
    struct __attribute__((aligned(2))) N {                                                                   \
        uint16_t x_;                                                                                         \
        N() = default;                                                                                       \
        N(float f) : x_(simt::TO(f)) {}                                                                      \
        N(double f) : x_(simt::TO((float)f)) {}                                                              \
        N(int f) : x_(simt::TO((float)f)) {}                                                                 \
        operator float() const { return simt::FROM(x_); }                                                    \
    };                                                                                                       \
    struct __attribute__((aligned(4))) N2 {                                                                  \
        N x, y;                                                                                              \
        N2() = default;                                                                                      \
        N2(N a, N b) : x(a), y(b) {}                                                                         \
    };                                                                                                       \
    inline N operator+(N a, N b)                                                                             \
    {                                                                                                        \
        return N((float)a + (float)b);                                                                       \
    }                                                                                                        \
    inline N operator-(N a, N b)                                                                             \
    {                                                                                                        \
        return N((float)a - (float)b);                                                                       \
    }                                                                                                        \
    inline N operator*(N a, N b)                                                                             \
    {                                                                                                        \
        return N((float)a * (float)b);                                                                       \
    }                                                                                                        \
    inline N operator/(N a, N b)                                                                             \
    {                                                                                                        \
        return N((float)a / (float)b);                                                                       \
    }                                                                                                        \
    inline N operator-(N a)                                                                                  \
    {                                                                                                        \
        a.x_ ^= 0x8000;                                                                                      \
        return a;                                                                                            \
    }                                                                                                        \
    inline N &operator+=(N &a, N b)                                                                          \
    {                                                                                                        \
        return a = a + b;                                                                                    \
    }                                                                                                        \
    inline N &operator*=(N &a, N b)                                                                          \
    {                                                                                                        \
        return a = a * b;                                                                                    \
    }                                                                                                        \
    inline bool operator<(N a, N b)                                                                          \
    {                                                                                                        \
        return (float)a < (float)b;                                                                          \
    }                                                                                                        \
    inline bool operator>(N a, N b)                                                                          \
    {                                                                                                        \
        return (float)a > (float)b;                                                                          \
    }                                                                                                        \
    inline bool operator==(N a, N b)                                                                         \
    {                                                                                                        \
        return (float)a == (float)b;                                                                         \
    }                                                                                                        \
    inline N2 operator+(N2 a, N2 b)                                                                          \
    {                                                                                                        \
        return N2(a.x + b.x, a.y + b.y);                                                                     \
    }                                                                                                        \
    inline N2 operator*(N2 a, N2 b)                                                                          \
    {                                                                                                        \
        return N2(a.x * b.x, a.y * b.y);                                                                     \
    }                                                                                                        \
    inline N __hadd(N a, N b)                                                                                \
    {                                                                                                        \
        return a + b;                                                                                        \
    }                                                                                                        \
    inline N __hsub(N a, N b)                                                                                \
    {                                                                                                        \
        return a - b;                                                                                        \
    }                                                                                                        \
    inline N __hmul(N a, N b)                                                                                \
    {                                                                                                        \
        return a * b;                                                                                        \
    }                                                                                                        \
    inline N __hmax(N a, N b)                                                                                \
    {                                                                                                        \
        return N(std::fmax((float)a, (float)b));                                                             \
    }                                                                                                        \
    inline N __hfma(N a, N b, N c)                                                                           \
    {                                                                                                        \
        return N((float)((double)(float)a * (float)b + (double)(float)c));                                   \
    }                                                                                                        \
    inline N2 __hadd2(N2 a, N2 b)                                                                            \
    {                                                                                                        \
        return a + b;                                                                                        \
    }                                                                                                        \
    inline N2 __hmul2(N2 a, N2 b)                                                                            \
    {                                                                                                        \
        return a * b;                                                                                        \
    }                                                                                                        \
    inline N2 __hfma2(N2 a, N2 b, N2 c)                                                                      \
    {                                                                                                        \
        return N2(__hfma(a.x, b.x, c.x), __hfma(a.y, b.y, c.y));                                             \
    }                                                                                                        \
    inline float __low2float(N2 a)                                                                           \
    {                                                                                                        \
        return a.x;                                                                                          \
    }                                                                                                        \
    inline float __high2float(N2 a)                                                                          \
    {                                                                                                        \
        return a.y;                                                                                          \
    }
SIMT_H(__nv_bfloat16, __nv_bfloat162, f2bf, bf2f)
SIMT_H(__half, __half2, f2h, h2f)
#undef SIMT_H
using nv_bfloat16 = __nv_bfloat16;
using nv_bfloat162 = __nv_bfloat162;
using half = __half;
using half2 = __half2;
inline __nv_bfloat16 __float2bfloat16(float f)
{
    return __nv_bfloat16(f);
}
inline __nv_bfloat16 __float2bfloat16_rn(float f)
{
    return __nv_bfloat16(f);
}
inline float __bfloat162float(__nv_bfloat16 h)
{
    return h;
}
inline __nv_bfloat162 __floats2bfloat162_rn(float a, float b)
{
    return {__nv_bfloat16(a), __nv_bfloat16(b)};
}
inline __nv_bfloat162 __float22bfloat162_rn(float2 a)
{
    return {__nv_bfloat16(a.x), __nv_bfloat16(a.y)};
}
inline float2 __bfloat1622float2(__nv_bfloat162 a)
{
    return {a.x, a.y};
}
inline __nv_bfloat162 __halves2bfloat162(__nv_bfloat16 a, __nv_bfloat16 b)
{
    return {a, b};
}
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a)
{
    return {a, a};
}
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 h)
{
    return h.x_;
}
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short u)
{
    __nv_bfloat16 h;
    h.x_ = u;
    return h;
}
inline __half __float2half(float f)
{
    return __half(f);
}
inline __half __float2half_rn(float f)
{
    return __half(f);
}
inline float __half2float(__half h)
{
    return h;
}
inline __half2 __floats2half2_rn(float a, float b)
{
    return {__half(a), __half(b)};
}
inline float2 __half22float2(__half2 a)
{
    return {a.x, a.y};
}
inline __half2 __halves2half2(__half a, __half b)
{
    return {a, b};
}
inline unsigned short __half_as_ushort(__half h)
{
    return h.x_;
}
inline __half __ushort_as_half(unsigned short u)
{
    __half h;
    h.x_ = u;
    return h;
}

// ---------------------------------------------------------------- PTX wrappers (same names in
// kernels/td_cuda.h for nvcc) D(16x8,f32) = A(16x16,bf16 or f16,row) * B(16x8,bf16,col) + C; registers
// exactly as in the PTX manual's fragment figures.
#define SIMT_MMA(NAME, K)                                                                                    \
    inline void NAME(float(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2], const float(&c)[4],         \
                     SIMT_AT)                                                                                \
    {                                                                                                        \
        simt::Fiber *f = simt::cur;                                                                          \
        memcpy(f->in, a, 16);                                                                                \
        memcpy(f->in + 4, b, 8);                                                                             \
        memcpy(f->in + 6, c, 16);                                                                            \
        simt::warp_op(simt::K, 0xffffffffu, line, file);                                                     \
        memcpy(d, f->out, 16);                                                                               \
    }
SIMT_MMA(td_mma_m16n8k16_bf16, MMABF)
SIMT_MMA(td_mma_m16n8k16_f16, MMAF16)
#undef SIMT_MMA
#define SIMT_LDM(NAME, N, K)                                                                                 \
    inline void NAME(uint32_t(&r)[N], const void *p, SIMT_AT)                                                \
    {                                                                                                        \
        simt::Fiber *f = simt::cur;                                                                          \
        memcpy(f->in, &p, 8);                                                                                \
        simt::warp_op(simt::K, 0xffffffffu, line, file);                                                     \
        memcpy(r, f->out, 4 * N);                                                                            \
    }
    SIMT_LDM(td_ldmatrix_x1, 1, LDM1) SIMT_LDM(td_ldmatrix_x2, 2, LDM2) SIMT_LDM(td_ldmatrix_x4, 4, LDM4)
        SIMT_LDM(td_ldmatrix_x1_trans, 1, LDM1T) SIMT_LDM(td_ldmatrix_x2_trans, 2, LDM2T)
            SIMT_LDM(td_ldmatrix_x4_trans, 4, LDM4T)
#undef SIMT_LDM
                inline void td_cp_async_16(void *smem, const void *gmem, bool pred = true,
                                           int line = __builtin_LINE())
{
    simt::cp_async(smem, gmem, 16, pred ? 16 : 0, line);
}
inline void td_cp_async_8(void *smem, const void *gmem, bool pred = true, int line = __builtin_LINE())
{
    simt::cp_async(smem, gmem, 8, pred ? 8 : 0, line);
}
inline void td_cp_async_4(void *smem, const void *gmem, bool pred = true, int line = __builtin_LINE())
{
    simt::cp_async(smem, gmem, 4, pred ? 4 : 0, line);
}
inline void td_cp_async_commit()
{
    simt::cp_commit();
}
template <int N> inline void td_cp_async_wait()
{
    simt::cp_wait(N);
}
inline float td_exp2(float x)
{
    return ::exp2f(x);
}
inline uint4 td_ld_stream(const void *p)
{
    return *(const uint4 *)p;
}
inline uint2 td_ld_stream8(const void *p)
{
    return *(const uint2 *)p;
}
inline void td_grid_wait()
{
    simt::grid_wait();
}
inline void td_grid_launch() {}
#define TD_ACQUIRE_ALL() simt::acquire_all()

// ---------------------------------------------------------------- host API
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorNotReady = 600,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorStreamCaptureImplicit = 906
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaDeviceAttr {
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76
};
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin;
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock;
};
struct simt_stream;
struct simt_graph;
struct simt_event {
    double t;
};
using cudaStream_t = simt_stream *;
using cudaEvent_t = simt_event *;
using cudaGraph_t = simt_graph *;
using cudaGraphExec_t = simt_graph *;
using cudaGraphNode_t = void *;
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};
namespace simt
{
// Runs the kernel, or takes it down where the stream is recorded.
int launch(const cudaLaunchConfig_t *c, void (*fn)(void *), void *arg, size_t argsz, const void *kernel);
} // namespace simt
// Streams are synchronous, but a recorded one takes its copies and launches down (argument bytes and all) and runs
// them at each cudaGraphLaunch. What a device refuses meanwhile is refused here: waiting, asking, allocating.
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long flags);
cudaError_t cudaGraphUpload(cudaGraphExec_t e, cudaStream_t s);
cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s);
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *n);
cudaError_t cudaGraphDestroy(cudaGraph_t g);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e);
cudaError_t simt_refused_while_recorded(const char *what); // cudaSuccess when nothing is
cudaError_t simt_malloc(void **p, size_t n);
cudaError_t cudaFree(void *p);
cudaError_t cudaMemcpy(void *d, const void *s, size_t n, cudaMemcpyKind k);
cudaError_t cudaMemset(void *d, int v, size_t n);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char *cudaGetErrorString(cudaError_t e);
cudaError_t simt_set_smem(const void *fn, int bytes);
double simt_now();
template <class T> cudaError_t cudaMalloc(T **p, size_t n)
{
    return simt_malloc((void **)p, n);
}
template <class T> cudaError_t cudaMallocHost(T **p, size_t n)
{
    if (auto e = simt_refused_while_recorded("cudaMallocHost")) return e;
    *p = (T *)malloc(n);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
template <class T> cudaError_t cudaMallocAsync(T **p, size_t n, cudaStream_t)
{
    return simt_malloc((void **)p, n);
}
inline cudaError_t cudaFreeHost(void *p)
{
    free(p);
    return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void *p, cudaStream_t)
{
    return cudaFree(p);
}
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, cudaMemcpyKind k, cudaStream_t stream = 0);
cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t stream = 0);
template <class T>
cudaError_t cudaMemcpyToSymbol(T &sym, const void *s, size_t n, size_t off = 0,
                               cudaMemcpyKind = cudaMemcpyHostToDevice)
{
    memcpy((char *)&sym + off, s, n);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *s);
enum { cudaStreamNonBlocking = 1 };
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned)
{
    return cudaStreamCreate(s);
}
inline cudaError_t cudaEventQuery(cudaEvent_t)
{
    if (auto e = simt_refused_while_recorded("cudaEventQuery")) return e;
    return cudaPeekAtLastError();
}
cudaError_t cudaMemGetInfo(size_t *left, size_t *total);
cudaError_t cudaStreamDestroy(cudaStream_t s);
inline cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    if (auto e = simt_refused_while_recorded("cudaStreamSynchronize")) return e;
    return cudaPeekAtLastError();
}
inline cudaError_t cudaDeviceSynchronize()
{
    if (auto e = simt_refused_while_recorded("cudaDeviceSynchronize")) return e;
    return cudaPeekAtLastError();
}
inline cudaError_t cudaEventCreate(cudaEvent_t *e)
{
    *e = new simt_event{0};
    return cudaSuccess;
}
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t = 0)
{
    if (auto x = simt_refused_while_recorded("cudaEventRecord")) return x;
    e->t = simt_now();
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t)
{
    return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0)
{
    return cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b)
{
    *ms = (float)((b->t - a->t) * 1e3);
    return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t e)
{
    delete e;
    return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int d)
{
    return d >= 0 && d < simt::opt.devices ? cudaSuccess : cudaErrorInvalidDevice;
}
inline cudaError_t cudaGetDevice(int *d)
{
    *d = 0;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *n);
inline cudaError_t cudaDriverGetVersion(int *v)
{
    *v = simt::opt.devices < 0 ? 12020 : 13000;
    return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int *v)
{
    *v = 13000;
    return cudaSuccess;
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int)
{
    *p = cudaDeviceProp{};
    strcpy(p->name, "simt host emulation");
    size_t left;
    cudaMemGetInfo(&left, &p->totalGlobalMem);
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->major = simt::opt.arch / 10;
    p->minor = simt::opt.arch % 10;
    p->multiProcessorCount = 4;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr a, int)
{
    *v = a == cudaDevAttrMaxSharedMemoryPerBlockOptin ? 232448
         : a == cudaDevAttrMultiProcessorCount        ? 4
         : a == cudaDevAttrComputeCapabilityMajor     ? simt::opt.arch / 10
                                                      : 0;
    return cudaSuccess;
}
template <class F> cudaError_t cudaFuncSetAttribute(F *f, cudaFuncAttribute a, int v)
{
    return a == cudaFuncAttributeMaxDynamicSharedMemorySize ? simt_set_smem((const void *)f, v) : cudaSuccess;
}
// The launch form both compilers take: the CUDA runtime's own C++ call, no <<<>>>.
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *c, void (*k)(P...), A &&...a)
{
    static_assert(sizeof...(P) == sizeof...(A), "kernel argument count");
    simt::Thunk<std::remove_cv_t<P>...> t{(void (*)(std::remove_cv_t<P>...))k,
                                          std::tuple<std::remove_cv_t<P>...>(std::forward<A>(a)...)};
    return (cudaError_t)simt::launch(c, &t.run, &t, sizeof t, (const void *)k);
}

#include "tests/simt/simt_sm90a.h"
