// SPDX-License-Identifier: Apache-2.0
/* UTF-8 probing, classes, case, normalization and the byte-level alphabet. */
#include "router/text/normalizer.h"
#include "router/text/unicode.h"
#include "tests/t.h"

static void probing(void)
{
    static const struct {
        const char *s;
        size_t n;
        int want;
    } cases[] = {
        {"a", 1, 1},
        {"\xC3\xA9", 2, 2},
        {"\xC3", 1, 0},
        {"\xE2\x82", 2, 0},
        {"\xE2\x82\xAC", 3, 3},
        {"\xF0\x9F\xA6", 3, 0},
        {"\xF0\x9F\xA6\x99", 4, 4},
        {"\x80", 1, -1},
        {"\xFF", 1, -1},
        {"\xC0\xAF", 2, -1},
        {"\xE2\x28", 2, -1},
        {"\xE2\x82\x28", 3, -2},
        {"\xF0\x9F\x41", 3, -2},
        {"\xED\xA0", 2, -1},
        {"\xF5\x80", 2, -1},
        {"\xE0\x80", 2, -1},
        {"\xF4\x90", 2, -1},
        {"\xF0\x8F", 2, -1},
        {"\xC3\x28", 2, -1},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++)
        T_EQ(td_uc_probe(cases[i].s, cases[i].n), cases[i].want);
    size_t at = 0;
    T_OK(td_uc_valid("12345678\xC3\xA9", 10, &at));
    T_OK(!td_uc_valid("123456789\xC3", 10, &at));
    T_EQ(at, 9);
    T_EQ(td_uc_count("a\xC3\xA9\xE2\x82\xAC", 6), 3);
    T_EQ(td_uc_offset("a\xC3\xA9\xE2\x82\xAC", 6, 2), 3);
    T_EQ(td_uc_offset("a\xC3\xA9", 3, 9), 3);
}

static void classes(void)
{
    T_OK(td_uc_class('a') & TD_UC_LETTER && td_uc_class(0x4E2D) & TD_UC_LETTER &&
         !(td_uc_class('1') & TD_UC_LETTER));
    T_OK(td_uc_class(0xBD) & TD_UC_NUMBER && td_uc_class(0x663) & TD_UC_DIGIT &&
         !(td_uc_class(0xBD) & TD_UC_WORD));
    T_OK(td_uc_class(0x3000) & TD_UC_SPACE && td_uc_class(0x85) & TD_UC_SPACE &&
         !(td_uc_class(0x180E) & TD_UC_SPACE) && !(td_uc_class(0x200B) & TD_UC_SPACE));
    T_OK(td_uc_py_space(0x1C) && !(td_uc_class(0x1C) & TD_UC_SPACE));
    T_OK(td_uc_class(0x301) & TD_UC_NONSPACING && td_uc_class('_') & TD_UC_WORD &&
         td_uc_class(0x200D) & TD_UC_WORD);
    T_OK(td_uc_class(0xE000) & TD_UC_HIDDEN && td_uc_class(0xA0) & TD_UC_HIDDEN &&
         !(td_uc_class('~') & TD_UC_HIDDEN));
}

static void normalize(td_nform f, const char *in, const char *want)
{
    td_buf b;
    td_buf_init(&b, 0);
    T_EQ(td_uc_normalize(f, in, strlen(in), &b), TD_OK);
    T_STR(b.p, want);
    td_buf_deinit(&b);
}

static void forms(void)
{
    normalize(TD_NFC, "e\xCC\x81", "\xC3\xA9");
    normalize(TD_NFD, "\xC3\xA9", "e\xCC\x81");
    normalize(TD_NFKC, "\xEF\xAC\x81\xC2\xBD",
              "fi1\xE2\x81\x84"
              "2");
    normalize(TD_NFKD, "\xEF\xBC\xA1", "A");
    normalize(TD_NFC, "\xEA\xB0\x80", "\xEA\xB0\x80");
    normalize(TD_NFD, "\xEA\xB0\x80", "\xE1\x84\x80\xE1\x85\xA1");
    normalize(TD_NFC, "q\xCC\x87\xCC\xA3", "q\xCC\xA3\xCC\x87"); /* canonical order */
    normalize(TD_NFC, "plain ascii", "plain ascii");
}

/* A million marks in the worst order: an insertion sort would need hours. */
static void long_marks(void)
{
    enum { N = 500000 };
    char *p = malloc(4 * N + 1);
    size_t n = 0;
    p[n++] = 'a';
    for (int i = 0; i < N; i++) memcpy(p + n, i % 2 ? "\xCC\xA3" : "\xCC\x81", 2), n += 2;
    td_buf b;
    td_buf_init(&b, 0);
    long long t = T_CPU_US();
    T_EQ(td_uc_normalize(TD_NFC, p, n, &b), TD_OK);
    T_OK(T_CPU_US() - t < 5000000);
    T_OK(b.len > N && td_uc_valid(b.p, b.len, NULL));
    td_buf_deinit(&b);
    free(p);
}

static void letters(void)
{
    td_buf b;
    td_buf_init(&b, 0);
    td_uc_add_lower(&b, "\xC4\xB0X\xC3\x84", 5);
    td_uc_add_upper(&b, "\xC3\x9Fx\xC3\xA4", 5);
    T_STR(b.p, "i\xCC\x87x\xC3\xA4SSX\xC3\x84");
    td_buf_deinit(&b);
}

/* 256 bytes, 256 different printable characters, and back. */
static void alphabet(void)
{
    unsigned char seen[512] = {0};
    for (int i = 0; i < 256; i++) {
        uint32_t c = td_bytelevel_char((unsigned char)i);
        T_OK(c < 512 && !seen[c]++ && !(td_uc_class(c) & (TD_UC_SPACE | TD_UC_HIDDEN)), "byte %d", i);
        T_EQ(td_bytelevel_byte(c), i);
    }
    T_EQ(td_bytelevel_char(' '), 0x120);
    T_EQ(td_bytelevel_char('\n'), 0x10A);
    T_EQ(td_bytelevel_byte(' '), -1);
    T_EQ(td_bytelevel_byte(0x4E2D), -1);
    T_EQ(td_bytelevel_byte(0x144), -1);
}

int main(void)
{
    probing();
    classes();
    forms();
    long_marks();
    letters();
    alphabet();
    return T_DONE();
}
