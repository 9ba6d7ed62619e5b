// SPDX-License-Identifier: Apache-2.0
/* common/crc.c - CRC32C by tables (8 bytes a step) or by the SSE4.2 instruction in three streams, because one
 * stream is bound by the instruction's latency of 3 cycles. Streams are joined by CRC's linearity over GF(2):
 * appending n bytes multiplies the register by x^(8n) modulo the polynomial. */
#include "common/crc.h"
#include "common/check.h"
#include <pthread.h>
#include <stdbool.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read little-endian");

static const uint32_t poly = 0x82F63B78; /* 0x1EDC6F41, bits reversed: bit 31 is x^0 */
enum { LONG = 2048, SHORT = 128 };

static uint32_t table[8][256]; /* table[k][b]: byte b followed by k zero bytes */
static td_crc_over over_long, over_short;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static inline uint64_t load64(const unsigned char *p)
{
    uint64_t x;
    memcpy(&x, p, 8);
    return x;
}

/* ---- joining ---- */

static inline uint32_t times_x(uint32_t a)
{
    return a >> 1 ^ (a & 1 ? poly : 0);
}

static uint32_t times(uint32_t a, uint32_t b)
{
    uint32_t p = 0;
    for (uint32_t bit = 1u << 31; bit; bit >>= 1, b = times_x(b))
        if (a & bit) p ^= b;
    return p;
}

void td_crc_over_init(td_crc_over *o, uint64_t n)
{
    uint32_t r = 1u << 31; /* x^0 */
    for (uint32_t x = 1u << 23 /* x^8 */; n; n >>= 1, x = times(x, x))
        if (n & 1) r = times(r, x);
    for (int bit = 31; bit >= 0; bit--, r = times_x(r)) o->z[bit / 4][1 << bit % 4] = r;
    for (int k = 0; k < 8; k++) {
        o->z[k][0] = 0;
        for (unsigned v = 3; v < 16; v++)
            if (v & (v - 1)) o->z[k][v] = o->z[k][v & (v - 1)] ^ o->z[k][v & -v];
    }
}

uint32_t td_crc_join(const td_crc_over *o, uint32_t a, uint32_t b)
{
    for (int k = 0; k < 8; k++, a >>= 4) b ^= o->z[k][a & 15];
    return b;
}

/* ---- without hardware ---- */

static void fill_tables(void)
{
    for (uint32_t b = 0; b < 256; b++) {
        uint32_t crc = b;
        for (int i = 0; i < 8; i++) crc = times_x(crc);
        table[0][b] = crc;
    }
    for (int k = 1; k < 8; k++)
        for (int b = 0; b < 256; b++) table[k][b] = table[0][table[k - 1][b] & 255] ^ table[k - 1][b] >> 8;
    td_crc_over_init(&over_long, LONG);
    td_crc_over_init(&over_short, SHORT);
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

static void one_by_one(td_crc_lane *l, int n_lanes, size_t n)
{
    for (int i = 0; i < n_lanes; i++) l[i].crc = td_crc32c(l[i].crc, l[i].p, n);
}

#ifdef __x86_64__
#include <immintrin.h>

#define SSE42 __attribute__((target("sse4.2")))
/* Three streams of `len` bytes side by side, then joined: a's register is moved over b's bytes, and so on. */
SSE42 static const unsigned char *three(uint64_t *crc, const unsigned char *p, size_t *n, size_t len,
                                        const td_crc_over *z)
{
    while (*n >= 3 * len) {
        uint64_t a = *crc, b = 0, c = 0;
        for (const unsigned char *end = p + len; p < end; p += 8) {
            a = _mm_crc32_u64(a, load64(p));
            b = _mm_crc32_u64(b, load64(p + len));
            c = _mm_crc32_u64(c, load64(p + 2 * len));
        }
        *crc = td_crc_join(z, td_crc_join(z, (uint32_t)a, (uint32_t)b), (uint32_t)c);
        p += 2 * len;
        *n -= 3 * len;
    }
    return p;
}

SSE42 static uint32_t rest(uint32_t r, const unsigned char *p, size_t n)
{
    for (; n >= 8; p += 8, n -= 8) r = (uint32_t)_mm_crc32_u64(r, load64(p));
    for (; n; p++, n--) r = _mm_crc32_u8(r, *p);
    return r;
}

SSE42 static uint32_t crc_hardware(uint32_t crc, const unsigned char *p, size_t n)
{
    uint64_t r = ~crc;
    p = three(&r, p, &n, LONG, &over_long);
    p = three(&r, p, &n, SHORT, &over_short);
    return ~rest((uint32_t)r, p, n);
}

static bool hardware(void)
{
    return __builtin_cpu_supports("sse4.2");
}

uint32_t td_crc32c(uint32_t crc, const void *p, size_t n)
{
    if (!hardware()) return td_crc32c_tables(crc, p, n);
    pthread_once(&once, fill_tables);
    return crc_hardware(crc, p, n);
}

/* K lanes a line at a time. K is a constant where it is called: the loops over it must unroll, so that the
 * registers of the lanes are registers. */
SSE42 static inline __attribute__((always_inline)) void lanes(td_crc_lane *l, const int K, size_t n)
{
    uint64_t c[TD_CRC_LANES];
    const uint8_t *p[TD_CRC_LANES], *ahead[TD_CRC_LANES];
    size_t at = 0;
#pragma GCC unroll 4
    for (int i = 0; i < K; i++) {
        c[i] = ~l[i].crc;
        p[i] = l[i].p;
        ahead[i] = l[i].ahead ? l[i].ahead : p[i]; /* to fetch what is there costs nothing */
    }
    for (; at + 64 <= n; at += 64) {
#pragma GCC unroll 4
        for (int i = 0; i < K; i++) _mm_prefetch((const char *)ahead[i] + at, _MM_HINT_T0);
#pragma GCC unroll 8
        for (size_t w = 0; w < 64; w += 8)
#pragma GCC unroll 4
            for (int i = 0; i < K; i++) c[i] = _mm_crc32_u64(c[i], load64(p[i] + at + w));
    }
    for (int i = 0; i < K; i++) l[i].crc = ~rest((uint32_t)c[i], p[i] + at, n - at);
}

SSE42 static void lanes_of(td_crc_lane *l, int k, size_t n)
{
    if (k == 4)
        lanes(l, 4, n);
    else if (k == 3)
        lanes(l, 3, n);
    else if (k == 2)
        lanes(l, 2, n);
    else
        lanes(l, 1, n);
}

void td_crc32c_lanes(td_crc_lane *l, int k, size_t n)
{
    TD_ASSERT(k >= 1 && k <= TD_CRC_LANES);
    if (hardware())
        lanes_of(l, k, n);
    else
        one_by_one(l, k, n);
}
#else
uint32_t td_crc32c(uint32_t crc, const void *p, size_t n)
{
    return td_crc32c_tables(crc, p, n);
}

void td_crc32c_lanes(td_crc_lane *l, int k, size_t n)
{
    one_by_one(l, k, n);
}
#endif
