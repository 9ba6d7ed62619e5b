// SPDX-License-Identifier: Apache-2.0
#include "common/hash.h"
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read little-endian");

static inline uint64_t load64(const unsigned char *p)
{
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

/* ---- SipHash ---- */

typedef struct sip { uint64_t a, b, c, d; } sip;

static inline uint64_t rotl(uint64_t x, int k)
{
    return x << k | x >> (64 - k);
}

static inline void sip_rounds(sip *s, int n)
{
    while (n-- > 0) {
        s->a += s->b;
        s->c += s->d;
        s->b = rotl(s->b, 13) ^ s->a;
        s->d = rotl(s->d, 16) ^ s->c;
        s->a = rotl(s->a, 32) + s->d;
        s->c += s->b;
        s->d = rotl(s->d, 21) ^ s->a;
        s->b = rotl(s->b, 17) ^ s->c;
        s->c = rotl(s->c, 32);
    }
}

td_h128 td_siphash128(td_hkey key, const void *data, size_t n)
{
    const unsigned char *p = data;
    sip s = {key.k0 ^ 0x736f6d6570736575u, key.k1 ^ 0x646f72616e646f6du ^ 0xee, key.k0 ^ 0x6c7967656e657261u,
             key.k1 ^ 0x7465646279746573u};
    uint64_t last = (uint64_t)n << 56;
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t m = load64(p);
        s.d ^= m;
        sip_rounds(&s, 2);
        s.a ^= m;
    }
    for (size_t i = 0; i < n; i++) last |= (uint64_t)p[i] << (8 * i);
    s.d ^= last;
    sip_rounds(&s, 2);
    s.a ^= last;
    s.c ^= 0xee;
    sip_rounds(&s, 4);
    td_h128 h;
    h.lo = s.a ^ s.b ^ s.c ^ s.d;
    s.b ^= 0xdd;
    sip_rounds(&s, 4);
    h.hi = s.a ^ s.b ^ s.c ^ s.d;
    return h;
}

uint64_t td_mix64(uint64_t x)
{
    x ^= x >> 32;
    x *= 0xd6e8feb86659fd93u;
    x ^= x >> 32;
    x *= 0xd6e8feb86659fd93u;
    return x ^ x >> 32;
}
