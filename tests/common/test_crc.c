// SPDX-License-Identifier: Apache-2.0
/* CRC32C against RFC 3720's values, in each way of this machine, as it lies and while it is copied. */
#include "tests/t.h"
#include "common/check.h"
#include "common/crc.h"

enum { N = 50000 };
static unsigned char p[N + 64];

static void test_values(void)
{
    unsigned char b[32];
    memset(b, 0, 32);
    T_OK(td_crc32c(0, b, 32) == 0x8a9136aa); /* RFC 3720 B.4, bytes in the order of its table */
    memset(b, 0xff, 32);
    T_OK(td_crc32c(0, b, 32) == 0x62a8ab43);
    for (int i = 0; i < 32; i++) b[i] = (unsigned char)i;
    T_OK(td_crc32c(0, b, 32) == 0x46dd794e);
    for (int w = TD_CRC_TABLES; w <= (int)td_crc_best(); w++)
        T_OK(td_crc32c_by((td_crc_way)w, 0, "123456789", 9) == 0xe3069283);
    T_OK(td_crc32c(td_crc32c(0, p, 12345), p + 12345, N - 12345) == td_crc32c(0, p, N), "chainable");
    p[777] ^= 1;
    T_OK(td_crc32c(0, p, N) != td_crc32c(td_crc32c(0, p, 0), p + 1, N - 1));
}

/* Each way says what the tables say, and a copy is one: from any place to any place, nothing beside it touched. */
static void test_way(td_crc_way way)
{
    static unsigned char to[N + 192] __attribute__((aligned(64)));
    for (size_t n = 0; n < N; n = n < 600 ? n + 1 : n * 5 / 4)
        for (size_t at = 0; at < 3; at++) {
            uint32_t expect = td_crc32c_by(TD_CRC_TABLES, 5, p + at, n), got = td_crc32c_by(way, 5, p + at, n);
            T_OK(got == expect, "way %d, %zu bytes: %08x %08x", way, n, got, expect);
            for (int past = 0; past < 2; past++) {
                unsigned char *dst = to + 64 + (past ? 0 : at * 7);
                memset(to, 0xee, n + 192);
                got = td_crc32c_copy_by(way, 5, dst, p + at, n, past);
                td_crc32c_copied();
                bool same = !memcmp(dst, p + at, n) && dst[-1] == 0xee && dst[n] == 0xee;
                T_OK(same && got == expect, "way %d, copy of %zu, past %d: %08x %08x", way, n, past, got, expect);
            }
        }
}

int main(void)
{
    uint64_t x = 7;
    for (int i = 0; i < N; i++) p[i] = (unsigned char)((x = x * 6364136223846793005u + 1) >> 56);
    test_values();
    for (int w = TD_CRC_TABLES; w <= (int)td_crc_best(); w++) test_way((td_crc_way)w);
    return T_DONE();
}
