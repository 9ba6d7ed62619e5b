// SPDX-License-Identifier: Apache-2.0
/* common/hash.c - SipHash-2-4-128; CRC32C by tables (8 bytes a step) or by the SSE4.2 instruction in three
 * streams, because one stream is bound by the instruction's latency of 3 cycles. */
#include "common/hash.h"
#include "common/check.h"
#include <pthread.h>
#include <stdbool.h>
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

/* ---- CRC32C ---- */

static const uint32_t poly = 0x82F63B78; /* 0x1EDC6F41, bits reversed */
enum { LONG = 2048, SHORT = 128 };

static uint32_t table[8][256];              /* table[k][b]: byte b followed by k zero bytes */
static uint32_t skip_long[4][256], skip_short[4][256]; /* a byte, moved over so many zeros */
static pthread_once_t once = PTHREAD_ONCE_INIT;

static inline uint32_t skip(uint32_t z[4][256], uint32_t crc)
{
    return z[0][crc & 255] ^ z[1][crc >> 8 & 255] ^ z[2][crc >> 16 & 255] ^ z[3][crc >> 24];
}

/* CRC is linear over GF(2): 32 unit vectors give the whole operator. */
static void fill_skip(uint32_t z[4][256], int zeros)
{
    for (int bit = 0; bit < 32; bit++) {
        uint32_t crc = 1u << bit;
        for (int i = 0; i < zeros; i++) crc = table[0][crc & 255] ^ crc >> 8;
        for (unsigned b = 0; b < 256; b++)
            if (b >> (bit % 8) & 1) z[bit / 8][b] ^= crc;
    }
}

static void fill_tables(void)
{
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t crc = b;
        for (int i = 0; i < 8; i++) crc = crc >> 1 ^ (crc & 1 ? poly : 0);
        table[0][b] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (int b = 0; b < 256; b++) table[k][b] = table[0][table[k - 1][b] & 255] ^ table[k - 1][b] >> 8;
    fill_skip(skip_long, LONG);
    fill_skip(skip_short, SHORT);
}

uint32_t td_crc32c_tables(uint32_t crc, const void *data, size_t n)
{
    pthread_once(&once, fill_tables);
    const unsigned char *p = data;
    crc = ~crc;
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t x = load64(p) ^ crc;
        crc = table[7][x & 255] ^ table[6][x >> 8 & 255] ^ table[5][x >> 16 & 255] ^ table[4][x >> 24 & 255] ^
              table[3][x >> 32 & 255] ^ table[2][x >> 40 & 255] ^ table[1][x >> 48 & 255] ^ table[0][x >> 56];
    }
    for (; n; p++, n--) crc = table[0][(crc ^ *p) & 255] ^ crc >> 8;
    return ~crc;
}

#ifdef __x86_64__
/* Three streams of `len` bytes side by side, then joined: a's register is moved over b's bytes, and so on. */
#define SSE42 __attribute__((target("sse4.2")))
SSE42 static const unsigned char *three(uint64_t *crc, const unsigned char *p, size_t *n, size_t len,
                                        uint32_t z[4][256])
{
    while (*n >= 3 * len) {
        uint64_t a = *crc, b = 0, c = 0;
        for (const unsigned char *end = p + len; p < end; p += 8) {
            a = __builtin_ia32_crc32di(a, load64(p));
            b = __builtin_ia32_crc32di(b, load64(p + len));
            c = __builtin_ia32_crc32di(c, load64(p + 2 * len));
        }
        *crc = skip(z, skip(z, (uint32_t)a) ^ (uint32_t)b) ^ (uint32_t)c;
        p += 2 * len;
        *n -= 3 * len;
    }
    return p;
}

SSE42 static uint32_t crc_hardware(uint32_t crc, const unsigned char *p, size_t n)
{
    uint64_t r = ~crc;
    p = three(&r, p, &n, LONG, skip_long);
    p = three(&r, p, &n, SHORT, skip_short);
    for (; n >= 8; p += 8, n -= 8) r = __builtin_ia32_crc32di(r, load64(p));
    uint32_t s = (uint32_t)r;
    for (; n; p++, n--) s = __builtin_ia32_crc32qi(s, *p);
    return ~s;
}

uint32_t td_crc32c(uint32_t crc, const void *p, size_t n)
{
    if (!__builtin_cpu_supports("sse4.2")) return td_crc32c_tables(crc, p, n);
    pthread_once(&once, fill_tables);
    return crc_hardware(crc, p, n);
}
#else
uint32_t td_crc32c(uint32_t crc, const void *p, size_t n)
{
    return td_crc32c_tables(crc, p, n);
}
#endif
