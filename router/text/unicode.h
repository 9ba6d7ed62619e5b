/* router/text/unicode.h - UTF-8 and the Unicode facts that tokenizers and templates ask for.
 *
 * Rules:     1. Every text that enters this folder is checked once by td_uc_valid(); the rest may then use
 *               td_uc_next() without looking at errors. On broken bytes td_uc_next() yields U+FFFD and
 *               advances one byte: no overrun.
 *            2. utf8proc.h is included by unicode.c only.
 *            3. Normalization is linear up to a sort: a long run of combining marks costs n log n, never n^2.
 * Threads:   any (pure).
 * Source:    Unicode 15, UAX #15 (normalization), Unicode White_Space property. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_TEXT_UNICODE_H
#define TD_ROUTER_TEXT_UNICODE_H

#include "common/buf.h"
#include "common/status.h"
#include "common/utf8.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Class bits of a code point. */
enum {
    TD_UC_LETTER = 1,      /* L* */
    TD_UC_NUMBER = 2,      /* N* */
    TD_UC_SPACE = 4,       /* White_Space */
    TD_UC_MARK = 8,        /* M* */
    TD_UC_NONSPACING = 16, /* Mn */
    TD_UC_PUNCT = 32,      /* P* */
    TD_UC_WORD = 64,       /* \w of UTS #18: letter, mark, number (Nd, Nl), connector, joiner */
    TD_UC_UPPER = 128,     /* Lu, Lt */
    TD_UC_LOWER = 256,     /* Ll */
    TD_UC_DIGIT = 512,     /* Nd */
    TD_UC_HIDDEN = 1024    /* not printable in the sense of Python's str.isprintable */
};

/* Decode one code point at p (n >= 1 bytes left); returns its length, at least 1. */
static inline size_t td_uc_next(const char *p, size_t n, uint32_t *cp)
{
    int k = td_utf8_next(p, p + n, cp);
    if (k > 0) return (size_t)k;
    *cp = 0xFFFD;
    return 1;
}
bool td_uc_valid(const char *p, size_t n, size_t *bad_at); /* bad_at may be NULL */
void td_uc_add(td_buf *b, uint32_t cp);                    /* U+FFFD when cp is no scalar value */
size_t td_uc_count(const char *p, size_t n);               /* code points */
size_t td_uc_offset(const char *p, size_t n,
                    size_t index); /* byte offset of code point `index`, n if there are fewer */
/* State of the sequence that starts at p[0]: > 0 a complete code point of that length; 0 incomplete so far
 * (all n bytes are a prefix of some code point); < 0 broken after -k bytes, which together are one
 * replacement character. */
int td_uc_probe(const char *p, size_t n);

unsigned td_uc_class(uint32_t cp);
bool td_uc_py_space(uint32_t cp);  /* Python's str.isspace: White_Space and 1C..1F */
uint32_t td_uc_lower(uint32_t cp); /* one to one */
uint32_t td_uc_upper(uint32_t cp);
uint32_t td_uc_title(uint32_t cp);
void td_uc_add_lower(td_buf *b, const char *p, size_t n); /* full lower case; no final-sigma rule */
void td_uc_add_upper(td_buf *b, const char *p, size_t n); /* full upper case (sharp s becomes SS) */

typedef enum { TD_NFC, TD_NFD, TD_NFKC, TD_NFKD } td_nform;
td_status td_uc_normalize(td_nform form, const char *p, size_t n, td_buf *out);

#endif
