// SPDX-License-Identifier: Apache-2.0
/* kernels/tensor.c - element conversions. */
#include "kernels/tensor.h"
#include "kernels/family.h"

const char *td_dtype_name(td_dtype t)
{
    switch (t) {
    case TD_F32: return "f32";
    case TD_BF16: return "bf16";
    case TD_F16: return "f16";
    case TD_E4M3: return "e4m3";
    }
    return "?";
}

static float from_bits(uint32_t u)
{
    float f;
    memcpy(&f, &u, 4);
    return f;
}

float td_f16_to_f32(uint16_t v)
{
    uint32_t sign = (uint32_t)(v & 0x8000u) << 16, exponent = (v >> 10) & 31u, fraction = v & 1023u;
    if (exponent == 31) return from_bits(sign | 0x7f800000u | fraction << 13);
    if (exponent) return from_bits(sign | (exponent + 112) << 23 | fraction << 13);
    float f = (float)fraction * 0x1p-24f; /* denormal: exact in f32 */
    return sign ? -f : f;
}

uint16_t td_f32_to_f16(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    uint32_t sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u | ((a >> 13) & 0x3ffu));
    if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* 65520 and above round to infinity */
    if (a < 0x33000001u) return (uint16_t)sign;              /* up to 2^-25 rounds to zero */
    if (a < 0x38800000u) {                                   /* denormal result: shift with round to even */
        uint32_t shift = 126 - (a >> 23), m = (a & 0x7fffffu) | 0x800000u;
        uint32_t q = m >> shift, rest = m & ((1u << shift) - 1), half = 1u << (shift - 1);
        q += rest > half || (rest == half && (q & 1u));
        return (uint16_t)(sign | q);
    }
    a += 0xfffu + ((a >> 13) & 1u);
    return (uint16_t)(sign | ((a - 0x38000000u) >> 13));
}

float td_e4m3_to_f32(uint8_t code)
{
    uint32_t sign = (uint32_t)(code & 0x80u) << 24, exponent = (code >> 3) & 15u, fraction = code & 7u;
    if ((code & 0x7fu) == 0x7fu) return from_bits(sign | 0x7fc00000u);
    if (exponent) return from_bits(sign | (exponent + 120) << 23 | fraction << 20);
    float f = (float)fraction * 0x1p-9f;
    return sign ? -f : f;
}

uint8_t td_f32_to_e4m3(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    uint8_t sign = (uint8_t)(u >> 24 & 0x80u);
    uint32_t a = u & 0x7fffffffu;
    if (a > 0x7f800000u) return (uint8_t)(sign | 0x7fu);
    if (a >= 0x43e00000u) return (uint8_t)(sign | 0x7eu); /* 448 */
    if (a < 0x3c800000u) {                                /* below 2^-6: multiples of 2^-9; the sum rounds to even */
        float m = from_bits(a) + 0x1p14f;
        uint32_t q;
        memcpy(&q, &m, 4);
        return (uint8_t)(sign | (q & 15u));
    }
    a += 0x7ffffu + (a >> 20 & 1u);
    return (uint8_t)(sign | ((a >> 20) - 960)); /* (127 - 7) * 8 */
}

void td_convert(void *dst, td_dtype to, const void *src, td_dtype from, size_t n)
{
    if (to == from) {
        memcpy(dst, src, n * td_dtype_bytes(to));
        return;
    }
    if (from == TD_BF16 && to == TD_F32) { /* the common case, as a loop that becomes vectors */
        const uint16_t *s = src;
        uint32_t *d = dst;
        for (size_t i = 0; i < n; i++) d[i] = (uint32_t)s[i] << 16;
        return;
    }
    for (size_t i = 0; i < n; i++) {
        float f = td_load_f32(src, from, i);
        switch (to) {
        case TD_F32: ((float *)dst)[i] = f; break;
        case TD_BF16: ((uint16_t *)dst)[i] = td_f32_to_bf16(f); break;
        case TD_F16: ((uint16_t *)dst)[i] = td_f32_to_f16(f); break;
        case TD_E4M3: ((uint8_t *)dst)[i] = td_f32_to_e4m3(f); break;
        }
    }
}
