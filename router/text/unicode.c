// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "router/text/unicode.h"
#include <stdlib.h>
#include <string.h>
#include <utf8proc.h>

int td_uc_probe(const char *p, size_t n)
{
    uint32_t cp;
    unsigned char lead = (unsigned char)p[0];
    int k = td_utf8_next(p, p + n, &cp);
    return k < 0 && (size_t)-k == n && lead >= 0xC2 && lead <= 0xF4 ? 0 : k;
}

bool td_uc_valid(const char *p, size_t n, size_t *bad_at)
{
    for (size_t i = 0; i < n;) {
        uint64_t w;
        uint32_t cp;
        if (i + 8 <= n && (memcpy(&w, p + i, 8), !(w & 0x8080808080808080u))) {
            i += 8;
            continue;
        }
        int k = td_utf8_next(p + i, p + n, &cp);
        if (k <= 0) {
            if (bad_at) *bad_at = i;
            return false;
        }
        i += (size_t)k;
    }
    return true;
}

void td_uc_add(td_buf *b, uint32_t cp)
{
    char t[4];
    if (cp > 0x10FFFF || (cp >= 0xD800 && cp < 0xE000)) cp = 0xFFFD;
    td_buf_add(b, t, (size_t)td_utf8_put(t, cp));
}

size_t td_uc_count(const char *p, size_t n)
{
    size_t k = 0;
    for (size_t i = 0; i < n; i++) k += ((unsigned char)p[i] & 0xC0) != 0x80;
    return k;
}

size_t td_uc_offset(const char *p, size_t n, size_t index)
{
    size_t i = 0;
    while (i < n && index--) {
        i++;
        while (i < n && ((unsigned char)p[i] & 0xC0) == 0x80) i++;
    }
    return i;
}

static bool white_space(uint32_t c)
{
    return (c >= 9 && c <= 13) || c == 32 || c == 0x85 || c == 0xA0 || c == 0x1680 ||
           (c >= 0x2000 && c <= 0x200A) || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F ||
           c == 0x3000;
}

bool td_uc_py_space(uint32_t c) { return white_space(c) || (c >= 0x1C && c <= 0x1F); }

static unsigned category_class(int cat)
{
    switch (cat) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LT: return TD_UC_LETTER | TD_UC_WORD | TD_UC_UPPER;
    case UTF8PROC_CATEGORY_LL: return TD_UC_LETTER | TD_UC_WORD | TD_UC_LOWER;
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO: return TD_UC_LETTER | TD_UC_WORD;
    case UTF8PROC_CATEGORY_MN: return TD_UC_MARK | TD_UC_NONSPACING | TD_UC_WORD;
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME: return TD_UC_MARK | TD_UC_WORD;
    case UTF8PROC_CATEGORY_ND: return TD_UC_NUMBER | TD_UC_WORD | TD_UC_DIGIT;
    case UTF8PROC_CATEGORY_NL: return TD_UC_NUMBER | TD_UC_WORD;
    case UTF8PROC_CATEGORY_NO: return TD_UC_NUMBER;
    case UTF8PROC_CATEGORY_PC: return TD_UC_PUNCT | TD_UC_WORD;
    case UTF8PROC_CATEGORY_PD:
    case UTF8PROC_CATEGORY_PS:
    case UTF8PROC_CATEGORY_PE:
    case UTF8PROC_CATEGORY_PI:
    case UTF8PROC_CATEGORY_PF:
    case UTF8PROC_CATEGORY_PO: return TD_UC_PUNCT;
    case UTF8PROC_CATEGORY_CN:
    case UTF8PROC_CATEGORY_CC:
    case UTF8PROC_CATEGORY_CF:
    case UTF8PROC_CATEGORY_CS:
    case UTF8PROC_CATEGORY_CO:
    case UTF8PROC_CATEGORY_ZL:
    case UTF8PROC_CATEGORY_ZP:
    case UTF8PROC_CATEGORY_ZS: return TD_UC_HIDDEN;
    default: return 0;
    }
}

/* Joiners and letters in circles and squares: words by UTS #18 though no letters by category. */
static bool other_word(uint32_t c)
{
    return c == 0x200C || c == 0x200D || (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) ||
           (c >= 0x1F150 && c <= 0x1F169) || (c >= 0x1F170 && c <= 0x1F189);
}

unsigned td_uc_class(uint32_t cp)
{
    if (cp < 0x80) {
        if (cp - 'a' < 26u) return TD_UC_LETTER | TD_UC_WORD | TD_UC_LOWER;
        if (cp == ' ') return TD_UC_SPACE;
        if (cp - 'A' < 26u) return TD_UC_LETTER | TD_UC_WORD | TD_UC_UPPER;
        if (cp - '0' < 10u) return TD_UC_NUMBER | TD_UC_WORD | TD_UC_DIGIT;
    }
    unsigned c = category_class(utf8proc_category((utf8proc_int32_t)cp));
    if (white_space(cp)) c |= TD_UC_SPACE;
    if (other_word(cp)) c |= TD_UC_WORD;
    return c;
}

uint32_t td_uc_lower(uint32_t cp) { return (uint32_t)utf8proc_tolower((utf8proc_int32_t)cp); }
uint32_t td_uc_upper(uint32_t cp) { return (uint32_t)utf8proc_toupper((utf8proc_int32_t)cp); }
uint32_t td_uc_title(uint32_t cp) { return (uint32_t)utf8proc_totitle((utf8proc_int32_t)cp); }

void td_uc_add_lower(td_buf *b, const char *p, size_t n)
{
    uint32_t cp;
    for (size_t i = 0; i < n;) {
        i += td_uc_next(p + i, n - i, &cp);
        if (cp == 0x130) td_buf_add(b, "i\xCC\x87", 3); /* the only code point whose lower case is longer */
        else td_uc_add(b, td_uc_lower(cp));
    }
}

void td_uc_add_upper(td_buf *b, const char *p, size_t n)
{
    static const struct {
        uint32_t cp;
        const char *to;
    } longer[] = {
        {0xDF, "SS"},   {0x149, "\xCA\xBCN"}, {0x1F0, "J\xCC\x8C"}, {0xFB00, "FF"}, {0xFB01, "FI"},
        {0xFB02, "FL"}, {0xFB03, "FFI"},      {0xFB04, "FFL"},      {0xFB05, "ST"}, {0xFB06, "ST"},
    };
    uint32_t cp;
    for (size_t i = 0; i < n;) {
        i += td_uc_next(p + i, n - i, &cp);
        size_t k = TD_COUNT(longer);
        if (cp >= 0xDF)
            for (k = 0; k < TD_COUNT(longer) && longer[k].cp != cp;) k++;
        if (k < TD_COUNT(longer)) td_buf_str(b, longer[k].to);
        else td_uc_add(b, td_uc_upper(cp));
    }
}

/* ---- normalization ---- */

typedef struct marks {
    utf8proc_int32_t *cp, *tmp;
} marks;

static int ccc(utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; }

/* Stable bottom-up merge sort of cp[lo, hi) by combining class. */
static void sort_marks(marks m, size_t lo, size_t hi)
{
    for (size_t w = 1; w < hi - lo; w *= 2) {
        for (size_t a = lo; a < hi; a += 2 * w) {
            size_t mid = TD_MIN(a + w, hi), end = TD_MIN(a + 2 * w, hi), i = a, j = mid, k = a;
            while (i < mid && j < end) m.tmp[k++] = ccc(m.cp[i]) <= ccc(m.cp[j]) ? m.cp[i++] : m.cp[j++];
            while (i < mid) m.tmp[k++] = m.cp[i++];
            while (j < end) m.tmp[k++] = m.cp[j++];
        }
        memcpy(m.cp + lo, m.tmp + lo, (hi - lo) * sizeof m.cp[0]);
    }
}

static void canonical_order(marks m, size_t n)
{
    for (size_t i = 0; i < n;) {
        if (!ccc(m.cp[i])) {
            i++;
            continue;
        }
        size_t j = i + 1;
        while (j < n && ccc(m.cp[j])) j++;
        if (j - i > 1) sort_marks(m, i, j);
        i = j;
    }
}

td_status td_uc_normalize(td_nform form, const char *p, size_t n, td_buf *out)
{
    size_t ascii = 0;
    while (ascii < n && (unsigned char)p[ascii] < 0x80) ascii++;
    if (ascii == n) {
        td_buf_add(out, p, n);
        return td_buf_ok(out) ? TD_OK : td_refuse(TD_EFULL, "normalize: text over its limit");
    }
    int options =
        form == TD_NFKC || form == TD_NFKD ? UTF8PROC_DECOMPOSE | UTF8PROC_COMPAT : UTF8PROC_DECOMPOSE;
    enum { WORST = 32 }; /* longest compatibility decomposition is 18 code points */
    size_t cap = n + 64, len = 0;
    marks m = {td_xalloc(cap * sizeof(int32_t)), NULL};
    for (size_t i = 0; i < n;) {
        uint32_t cp;
        i += td_uc_next(p + i, n - i, &cp);
        if (cap - len < WORST) {
            cap += cap / 2 + WORST;
            m.cp = td_xrealloc(m.cp, cap * sizeof(int32_t));
        }
        int boundclass = 0;
        utf8proc_ssize_t k =
            utf8proc_decompose_char((utf8proc_int32_t)cp, m.cp + len, (utf8proc_ssize_t)(cap - len),
                                    (utf8proc_option_t)options, &boundclass);
        if (k > 0) len += (size_t)k;
    }
    m.tmp = td_xalloc(len * sizeof(int32_t) + 1);
    canonical_order(m, len);
    if (form == TD_NFC || form == TD_NFKC) {
        utf8proc_ssize_t k =
            utf8proc_normalize_utf32(m.cp, (utf8proc_ssize_t)len, UTF8PROC_STABLE | UTF8PROC_COMPOSE);
        if (k >= 0) len = (size_t)k;
    }
    for (size_t i = 0; i < len; i++) td_uc_add(out, (uint32_t)m.cp[i]);
    free(m.cp);
    free(m.tmp);
    return td_buf_ok(out) ? TD_OK : td_refuse(TD_EFULL, "normalize: text over its limit");
}
