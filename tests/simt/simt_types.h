/* tests/simt/simt_types.h - bf16 and half as device code has them, with their conversions. Part of simt.h. */
// SPDX-License-Identifier: Apache-2.0
#pragma once

// Default constructors are trivial: needed for __shared__ arrays.
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
/* The conversions of one type, by the names that CUDA makes of it. */
#define SIMT_CONVERT(N, T, T2)                                                                               \
    inline T __float2##N(float f)                                                                            \
    {                                                                                                        \
        return T(f);                                                                                         \
    }                                                                                                        \
    inline T __float2##N##_rn(float f)                                                                       \
    {                                                                                                        \
        return T(f);                                                                                         \
    }                                                                                                        \
    inline float __##N##2float(T h)                                                                          \
    {                                                                                                        \
        return h;                                                                                            \
    }                                                                                                        \
    inline T2 __floats2##N##2_rn(float a, float b)                                                           \
    {                                                                                                        \
        return {T(a), T(b)};                                                                                 \
    }                                                                                                        \
    inline float2 __##N##22float2(T2 a)                                                                      \
    {                                                                                                        \
        return {a.x, a.y};                                                                                   \
    }                                                                                                        \
    inline T2 __halves2##N##2(T a, T b)                                                                      \
    {                                                                                                        \
        return {a, b};                                                                                       \
    }                                                                                                        \
    inline unsigned short __##N##_as_ushort(T h)                                                             \
    {                                                                                                        \
        return h.x_;                                                                                         \
    }                                                                                                        \
    inline T __ushort_as_##N(unsigned short u)                                                               \
    {                                                                                                        \
        T h;                                                                                                 \
        h.x_ = u;                                                                                            \
        return h;                                                                                            \
    }
SIMT_CONVERT(bfloat16, __nv_bfloat16, __nv_bfloat162)
SIMT_CONVERT(half, __half, __half2)
#undef SIMT_CONVERT
inline __nv_bfloat162 __float22bfloat162_rn(float2 a)
{
    return {__nv_bfloat16(a.x), __nv_bfloat16(a.y)};
}
inline __nv_bfloat162 __bfloat162bfloat162(__nv_bfloat16 a)
{
    return {a, a};
}
