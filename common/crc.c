// SPDX-License-Identifier: Apache-2.0
/* common/crc.c - CRC32C by tables (8 bytes a step), by the SSE4.2 instruction in three streams, because one
 * stream is bound by the instruction's latency of 3 cycles, or by carry-less products of 64 bytes (AVX-512),
 * which cost a copy beside them nothing. Streams are joined by CRC's linearity over GF(2): appending n bytes
 * multiplies the register by x^(8n) modulo the polynomial. */
#include "common/crc.h"
#include "common/check.h"
#include <pthread.h>
#include <stdbool.h>
#include <string.h>

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "words are read little-endian");

static const uint32_t poly = 0x82F63B78; /* 0x1EDC6F41, bits reversed: bit 31 is x^0 */
enum { LONG = 2048, MIDDLE = 512, SHORT = 128 };

typedef struct over { uint32_t z[8][16]; } over; /* moves a register over n bytes that follow */
static uint32_t table[8][256]; /* table[k][b]: byte b followed by k zero bytes */
static over over_long, over_middle, over_short;
static uint64_t over_256[2], over_64[2], over_16[2]; /* the two factors that move 16 bytes so far (fold) */
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

/* x^n */
static uint32_t power(uint32_t n)
{
    uint32_t r = 1u << 31; /* x^0 */
    for (uint32_t x = 1u << 30 /* x^1 */; n; n >>= 1, x = times(x, x))
        if (n & 1) r = times(r, x);
    return r;
}

static void over_init(over *o, uint32_t n)
{
    uint32_t r = power(8 * n);
    for (int bit = 31; bit >= 0; bit--, r = times_x(r)) o->z[bit / 4][1 << bit % 4] = r;
    for (int k = 0; k < 8; k++) {
        o->z[k][0] = 0;
        for (unsigned v = 3; v < 16; v++)
            if (v & (v - 1)) o->z[k][v] = o->z[k][v & (v - 1)] ^ o->z[k][v & -v];
    }
}

static inline uint32_t join(const over *o, uint32_t a, uint32_t b)
{
    for (int k = 0; k < 8; k++, a >>= 4) b ^= o->z[k][a & 15];
    return b;
}

/* Of 16 bytes the first 8 stand 64 bits higher than the last 8. The product of 8 of them and a factor of 32
 * bits, shifted by one because it is of reversed words, reads as 16 bytes 32 bits too high: hence 32 and -32
 * for 64 and 0. */
static void factors(uint64_t f[2], uint32_t n)
{
    f[0] = (uint64_t)power(8 * n + 32) << 1;
    f[1] = (uint64_t)power(8 * n - 32) << 1;
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
    over_init(&over_long, LONG);
    over_init(&over_middle, MIDDLE);
    over_init(&over_short, SHORT);
    factors(over_256, 256);
    factors(over_64, 64);
    factors(over_16, 16);
}

static uint32_t by_tables(uint32_t crc, const unsigned char *p, size_t n)
{
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
#include <immintrin.h>

#define SSE42 __attribute__((target("sse4.2")))
SSE42 static inline uint64_t word(uint64_t crc, unsigned char *to, const unsigned char *p, size_t at)
{
    uint64_t x = load64(p + at);
    if (to) memcpy(to + at, &x, 8);
    return _mm_crc32_u64(crc, x);
}

/* Three streams of `len` bytes side by side, then joined: a's register is moved over b's bytes, and so on.
 * They are copied on the way, if `to` is there. How many bytes were done. */
SSE42 static inline size_t three(uint64_t *crc, unsigned char *to, const unsigned char *p, size_t n,
                                 size_t len, const over *z)
{
    size_t done = 0;
    for (; n - done >= 3 * len; done += 3 * len, p += 3 * len, to += to ? 3 * len : 0) {
        uint64_t a = *crc, b = 0, c = 0;
        for (size_t at = 0; at < len; at += 8) {
            a = word(a, to, p, at);
            b = word(b, to, p, len + at);
            c = word(c, to, p, 2 * len + at);
        }
        *crc = join(z, join(z, (uint32_t)a, (uint32_t)b), (uint32_t)c);
    }
    return done;
}

SSE42 static uint32_t rest(uint32_t r, const unsigned char *p, size_t n)
{
    for (; n >= 8; p += 8, n -= 8) r = (uint32_t)_mm_crc32_u64(r, load64(p));
    for (; n; p++, n--) r = _mm_crc32_u8(r, *p);
    return r;
}

/* to: NULL, nothing is copied. */
SSE42 static uint32_t by_sse42(uint32_t crc, unsigned char *to, const unsigned char *p, size_t n)
{
    const struct {
        size_t len;
        const over *z;
    } step[] = {{LONG, &over_long}, {MIDDLE, &over_middle}, {SHORT, &over_short}};
    uint64_t r = ~crc;
    size_t at = 0;
    for (size_t i = 0; i < TD_COUNT(step); i++)
        at += three(&r, to ? to + at : NULL, p + at, n - at, step[i].len, step[i].z);
    if (to) memcpy(to + at, p + at, n - at);
    return ~rest((uint32_t)r, p + at, n - at);
}

/* Part of a line past the caches costs more. */
static inline bool whole_lines(const void *to, size_t n)
{
    return !(((uintptr_t)to | n) % 64);
}

static void put(unsigned char *to, const unsigned char *from, size_t n)
{
    for (const unsigned char *end = from + n; from < end; from += 16, to += 16)
        _mm_stream_si128((__m128i *)(void *)to, _mm_loadu_si128((const __m128i *)(const void *)from));
}

#define WIDE __attribute__((target("avx512f,avx512dq,avx512vl,vpclmulqdq,pclmul,sse4.2")))
typedef enum { CHECK, COPY, COPY_PAST } wide_what;

WIDE static inline __m512i wide_factors(const uint64_t f[2])
{
    return _mm512_broadcast_i64x2(_mm_loadu_si128((const __m128i *)(const void *)f));
}

/* Each 16 bytes of a moved by what f says, and added to b's. */
WIDE static inline __m512i fold(__m512i a, __m512i f, __m512i b)
{
    enum { XOR3 = 0x96 };
    return _mm512_ternarylogic_epi64(_mm512_clmulepi64_epi128(a, f, 0x00),
                                     _mm512_clmulepi64_epi128(a, f, 0x11), b, XOR3);
}

WIDE static inline __m128i fold_16(__m128i a, __m128i b)
{
    const __m128i f = _mm_loadu_si128((const __m128i *)(const void *)over_16);
    return _mm_xor_si128(_mm_xor_si128(_mm_clmulepi64_si128(a, f, 0x00), _mm_clmulepi64_si128(a, f, 0x11)),
                         b);
}

/* The register behind 64 bytes that stand for all before them. */
WIDE static inline uint32_t reduce(__m512i x)
{
    __m128i r = fold_16(_mm512_castsi512_si128(x), _mm512_extracti64x2_epi64(x, 1));
    r = fold_16(fold_16(r, _mm512_extracti64x2_epi64(x, 2)), _mm512_extracti64x2_epi64(x, 3));
    uint64_t low = _mm_crc32_u64(0, (uint64_t)_mm_cvtsi128_si64(r));
    return (uint32_t)_mm_crc32_u64(low, (uint64_t)_mm_extract_epi64(r, 1));
}

WIDE static inline __attribute__((always_inline)) __m512i line(unsigned char *to, const unsigned char *p,
                                                               const wide_what what)
{
    __m512i x = _mm512_loadu_si512(p);
    if (what == COPY) _mm512_storeu_si512(to, x);
    if (what == COPY_PAST) _mm512_stream_si512((__m512i *)(void *)to, x);
    return x;
}

/* n: whole lines, one at least. A constant `what` where it is called. */
WIDE static inline __attribute__((always_inline)) uint32_t
wide(uint32_t r, unsigned char *to, const unsigned char *p, size_t n, const wide_what what)
{
    const __m512i far = wide_factors(over_256), near = wide_factors(over_64);
    __m512i a = line(to, p, what);
    size_t at = 64;
    a = _mm512_xor_si512(a, _mm512_zextsi128_si512(_mm_cvtsi32_si128((int)r)));
    if (n >= 256) {
        __m512i b = line(to + 64, p + 64, what), c = line(to + 128, p + 128, what),
                d = line(to + 192, p + 192, what);
        for (at = 256; at + 256 <= n; at += 256) {
            a = fold(a, far, line(to + at, p + at, what));
            b = fold(b, far, line(to + at + 64, p + at + 64, what));
            c = fold(c, far, line(to + at + 128, p + at + 128, what));
            d = fold(d, far, line(to + at + 192, p + at + 192, what));
        }
        a = fold(fold(fold(a, near, b), near, c), near, d);
    }
    for (; at < n; at += 64) a = fold(a, near, line(to + at, p + at, what));
    return reduce(a);
}

WIDE static uint32_t wide_check(uint32_t crc, const unsigned char *p, size_t n)
{
    size_t lines = n / 64 * 64;
    return ~rest(wide(~crc, NULL, p, lines, CHECK), p + lines, n - lines);
}

WIDE static uint32_t wide_copy(uint32_t crc, unsigned char *to, const unsigned char *p, size_t n)
{
    size_t lines = n / 64 * 64;
    uint32_t r = wide(~crc, to, p, lines, COPY);
    memcpy(to + lines, p + lines, n - lines);
    return ~rest(r, p + lines, n - lines);
}

WIDE static uint32_t wide_copy_past(uint32_t crc, unsigned char *to, const unsigned char *p, size_t n)
{
    return ~wide(~crc, to, p, n, COPY_PAST);
}

td_crc_way td_crc_best(void)
{
    bool products = __builtin_cpu_supports("vpclmulqdq") && __builtin_cpu_supports("avx512vl") &&
                    __builtin_cpu_supports("avx512dq");
    return products ? TD_CRC_WIDE : __builtin_cpu_supports("sse4.2") ? TD_CRC_SSE42 : TD_CRC_TABLES;
}

uint32_t td_crc32c_by(td_crc_way way, uint32_t crc, const void *p, size_t n)
{
    pthread_once(&once, fill_tables);
    if (way == TD_CRC_WIDE && n >= 64) return wide_check(crc, p, n);
    return way == TD_CRC_TABLES ? by_tables(crc, p, n) : by_sse42(crc, NULL, p, n);
}

uint32_t td_crc32c_copy_by(td_crc_way way, uint32_t crc, void *to, const void *from, size_t n, bool past)
{
    past = past && whole_lines(to, n);
    pthread_once(&once, fill_tables);
    if (way == TD_CRC_WIDE && n >= 64)
        return past ? wide_copy_past(crc, to, from, n) : wide_copy(crc, to, from, n);
    if (way != TD_CRC_TABLES && !past) return by_sse42(crc, to, from, n);
    if (past)
        put(to, from, n);
    else
        memcpy(to, from, n);
    return td_crc32c_by(way, crc, from, n);
}

void td_crc32c_copied(void)
{
    _mm_sfence();
}
#else
td_crc_way td_crc_best(void)
{
    return TD_CRC_TABLES;
}

uint32_t td_crc32c_by(td_crc_way way, uint32_t crc, const void *p, size_t n)
{
    (void)way;
    pthread_once(&once, fill_tables);
    return by_tables(crc, p, n);
}

uint32_t td_crc32c_copy_by(td_crc_way way, uint32_t crc, void *to, const void *from, size_t n, bool past)
{
    (void)past;
    memcpy(to, from, n);
    return td_crc32c_by(way, crc, from, n);
}

void td_crc32c_copied(void)
{
}
#endif

uint32_t td_crc32c(uint32_t crc, const void *p, size_t n)
{
    return td_crc32c_by(td_crc_best(), crc, p, n);
}

uint32_t td_crc32c_copy(uint32_t crc, void *to, const void *from, size_t n, bool past)
{
    return td_crc32c_copy_by(td_crc_best(), crc, to, from, n, past);
}
