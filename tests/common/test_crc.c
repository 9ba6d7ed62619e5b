// SPDX-License-Identifier: Apache-2.0
/* CRC32C against RFC 3720's values, with and without hardware, in parts that are joined, in lanes. */
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
    T_OK(td_crc32c(0, "123456789", 9) == 0xe3069283 && td_crc32c_tables(0, "123456789", 9) == 0xe3069283);
    for (size_t n = 0; n < N; n = n * 5 / 4 + 1)
        for (size_t at = 0; at < 3 && at + n <= N; at++) {
            uint32_t hard = td_crc32c(5, p + at, n), soft = td_crc32c_tables(5, p + at, n);
            T_OK(hard == soft, "%zu bytes: %08x %08x", n, hard, soft);
        }
    T_OK(td_crc32c(td_crc32c(0, p, 12345), p + 12345, N - 12345) == td_crc32c(0, p, N), "chainable");
    p[777] ^= 1;
    T_OK(td_crc32c(0, p, N) != td_crc32c(td_crc32c(0, p, 0), p + 1, N - 1));
}

static void test_join(void)
{
    const size_t cut[] = {0, 1, 7, 63, 64, 2048, 12345, N - 1, N};
    td_crc_over over;
    for (size_t i = 0; i < TD_COUNT(cut); i++) {
        td_crc_over_init(&over, N - cut[i]);
        uint32_t whole = td_crc32c(5, p, N), a = td_crc32c(5, p, cut[i]), b = td_crc32c(0, p + cut[i], N - cut[i]);
        T_OK(td_crc_join(&over, a, b) == whole, "cut at %zu", cut[i]);
    }
    /* 2^40 zeros after "123456789": the register over 2^20 zeros, 2^20 times */
    td_crc_over mega, tera;
    td_crc_over_init(&mega, 1u << 20);
    td_crc_over_init(&tera, 1ull << 40);
    uint32_t slow = 0xe3069283;
    for (int i = 0; i < 1 << 20; i++) slow = td_crc_join(&mega, slow, 0);
    T_EQ(td_crc_join(&tera, 0xe3069283, 0), slow);
}

static void test_lanes(void)
{
    const size_t sizes[] = {0, 1, 8, 63, 64, 65, 200, 2048, 2050};
    for (int k = 1; k <= TD_CRC_LANES; k++)
        for (size_t s = 0; s < TD_COUNT(sizes); s++) {
            td_crc_lane lane[TD_CRC_LANES];
            for (int i = 0; i < k; i++) lane[i] = (td_crc_lane){p + i * 3001, i % 2 ? p : NULL, (uint32_t)i * 77};
            td_crc32c_lanes(lane, k, sizes[s]);
            for (int i = 0; i < k; i++)
                T_OK(lane[i].crc == td_crc32c_tables((uint32_t)i * 77, p + i * 3001, sizes[s]), "lane %d of %d, %zu bytes", i, k, sizes[s]);
        }
}

int main(void)
{
    uint64_t x = 7;
    for (int i = 0; i < N; i++) p[i] = (unsigned char)((x = x * 6364136223846793005u + 1) >> 56);
    test_values();
    test_join();
    test_lanes();
    return T_DONE();
}
