/* common/utf8.h - one strict UTF-8 decoder for everything that reads or checks text.
 *
 * Strict as Unicode 15 table 3-7: no overlong forms, no surrogates, nothing above U+10FFFF. Threads: any
 * (pure). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_UTF8_H
#define TD_COMMON_UTF8_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Decodes the sequence at p < end. Returns its length 1..4 and sets *cp; or, if it is ill-formed or cut off,
 * returns minus the length of its maximal subpart (what one U+FFFD stands for), *cp untouched. */
static inline int td_utf8_next(const char *p, const char *end, uint32_t *cp)
{
    const unsigned char *s = (const unsigned char *)p;
    size_t n = (size_t)(end - p);
    uint32_t c = s[0];
    if (c < 0x80) {
        *cp = c;
        return 1;
    }
    if (c < 0xC2 || c > 0xF4) return -1;
    int len = c < 0xE0 ? 2 : c < 0xF0 ? 3 : 4;
    uint32_t lo = c == 0xE0 ? 0xA0 : c == 0xF0 ? 0x90 : 0x80;
    uint32_t hi = c == 0xED ? 0x9F : c == 0xF4 ? 0x8F : 0xBF;
    c &= 0x7Fu >> len;
    for (int i = 1; i < len; i++) {
        if ((size_t)i >= n || s[i] < lo || s[i] > hi) return -i;
        c = c << 6 | (s[i] & 0x3Fu);
        lo = 0x80;
        hi = 0xBF;
    }
    *cp = c;
    return len;
}

/* Writes cp (a scalar value) at out, 1..4 bytes; returns how many. */
static inline int td_utf8_put(char *out, uint32_t cp)
{
    if (cp < 0x80) {
        out[0] = (char)cp;
        return 1;
    }
    if (cp < 0x800) {
        out[0] = (char)(0xC0 | cp >> 6);
        out[1] = (char)(0x80 | (cp & 0x3F));
        return 2;
    }
    if (cp < 0x10000) {
        out[0] = (char)(0xE0 | cp >> 12);
        out[1] = (char)(0x80 | (cp >> 6 & 0x3F));
        out[2] = (char)(0x80 | (cp & 0x3F));
        return 3;
    }
    out[0] = (char)(0xF0 | cp >> 18);
    out[1] = (char)(0x80 | (cp >> 12 & 0x3F));
    out[2] = (char)(0x80 | (cp >> 6 & 0x3F));
    out[3] = (char)(0x80 | (cp & 0x3F));
    return 4;
}

static inline bool td_utf8_valid(const char *p, size_t n)
{
    const char *end = p + n;
    while (p < end) {
        uint32_t cp;
        int k = td_utf8_next(p, end, &cp);
        if (k < 0) return false;
        p += k;
    }
    return true;
}

#endif
