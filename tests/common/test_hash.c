// SPDX-License-Identifier: Apache-2.0
/* SipHash against OpenSSL's outputs, block names. */
#include "tests/t.h"
#include "common/blockhash.h"
#include "common/check.h"
#include "common/hash.h"

static void test_siphash(void)
{
    /* `openssl mac -macopt hexkey:00..0f -macopt size:16 SIPHASH` over the bytes 0, 1, 2, ... */
    static const struct { size_t n; const char *hex; } v[] = {
        {0, "A3817F04BA25A8E66DF67214C7550293"},  {1, "DA87C1D86B99AF44347659119B22FC45"},
        {7, "A1F1EBBED8DBC153C0B84AA61FF08239"},  {8, "3B62A9BA6258F5610F83E264F31497B4"},
        {15, "5493E99933B0A8117E08EC0F97CFC3D9"}, {16, "6EE2A4CA67B054BBFD3315BF85230577"},
        {63, "5150D1772F50834A503E069A973FBD7C"}, {80, "D2C76AE17A4370F858FBA4795A0DF822"},
    };
    unsigned char in[80], out[16];
    for (int i = 0; i < 80; i++) in[i] = (unsigned char)i;
    for (size_t k = 0; k < TD_COUNT(v); k++) {
        td_h128 h = td_siphash128((td_hkey){0x0706050403020100u, 0x0f0e0d0c0b0a0908u}, in, v[k].n);
        char hex[33];
        memcpy(out, &h, 16);
        for (int i = 0; i < 16; i++) snprintf(hex + 2 * i, 3, "%02X", out[i]);
        T_STR(hex, v[k].hex);
    }
}

static int same(td_h128 a, td_h128 b)
{
    return a.lo == b.lo && a.hi == b.hi;
}

static void test_blocks(void)
{
    uint32_t tokens[100];
    for (uint32_t i = 0; i < 100; i++) tokens[i] = i * 77;
    td_hkey key = {1, 2};
    td_h128 root = td_blockhash_root(key, "model", 5), a[6], b[6];
    T_EQ(td_blockhash_chain(key, root, tokens, 100, a), 6);
    T_EQ(td_blockhash_chain(key, root, tokens, 15, b), 0);
    T_EQ(td_blockhash_chain(key, root, tokens, 16, b), 1);
    T_OK(same(a[0], b[0]), "a prefix has its name whatever follows");
    tokens[40] ^= 1;
    td_blockhash_chain(key, root, tokens, 100, b);
    T_OK(same(a[1], b[1]) && !same(a[2], b[2]) && !same(a[5], b[5]), "a change reaches every later name");
    td_blockhash_chain(key, td_blockhash_root(key, "model2", 6), tokens, 100, b);
    T_OK(!same(a[0], b[0]));
    td_blockhash_chain((td_hkey){1, 3}, root, tokens, 100, b);
    T_OK(!same(a[0], b[0]));
    unsigned char bytes[80] = {0};
    memcpy(bytes, &root, 16);
    memcpy(bytes + 16, tokens, 64);
    T_OK(same(a[0], td_siphash128(key, bytes, 80)), "the definition in blockhash.h");
    T_OK(td_mix64(0) == 0 && td_mix64(1) != 1 && td_mix64(1) != td_mix64(2));
}

int main(void)
{
    test_siphash();
    test_blocks();
    return T_DONE();
}
