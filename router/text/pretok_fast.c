// SPDX-License-Identifier: Apache-2.0
/* router/text/pretok_fast.c - the three patterns that most models use, by hand. Each alternative below is
 * named by its text in the pattern; they are tried in the pattern's order, and every position matches one of
 * them. */
#include "router/text/pretok.h"
#include "router/text/unicode.h"
#include <string.h>

const char TD_PRETOK_GPT2[] =
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+";
static const char LLAMA3[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}{1,3}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";
static const char QWEN2[] =
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*"
    "|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+";

enum { L = TD_UC_LETTER, N = TD_UC_NUMBER, S = TD_UC_SPACE };

typedef struct at {
    uint32_t cp;
    unsigned cls;
    size_t len;
} at;

static inline at look(const char *p, size_t n, size_t i)
{
    at a = {0, 0, 0};
    if (i >= n) return a;
    a.len = td_uc_next(p + i, n - i, &a.cp);
    a.cls = td_uc_class(a.cp) & (L | N | S);
    return a;
}

/* End of the run of characters whose class bits, masked to L, N, S, satisfy (cls & want) or, for want 0, have
 * none. */
static size_t run_of(const char *p, size_t n, size_t i, unsigned want, size_t max_chars)
{
    while (i < n && max_chars--) {
        at a = look(p, n, i);
        if (want ? !(a.cls & want) : a.cls != 0) break;
        i += a.len;
    }
    return i;
}

/* 's 't 're 've 'm 'll 'd at the apostrophe p[i]; 0: none. With fold, upper case and U+017F (folds to s)
 * count. */
static size_t contraction(const char *p, size_t n, size_t i, bool fold)
{
    static const char *const two[] = {"re", "ve", "ll"};
    if (i + 1 >= n) return 0;
    unsigned char a = (unsigned char)p[i + 1], b = i + 2 < n ? (unsigned char)p[i + 2] : 0;
    if (fold && a == 0xC5 && b == 0xBF) return i + 3;
    if (fold && a >= 'A' && a <= 'Z') a = (unsigned char)(a | 0x20);
    if (fold && b >= 'A' && b <= 'Z') b = (unsigned char)(b | 0x20);
    if (a == 's' || a == 't' || a == 'm' || a == 'd') return i + 2;
    for (int k = 0; k < 3; k++)
        if (a == (unsigned char)two[k][0] && b == (unsigned char)two[k][1]) return i + 3;
    return 0;
}

/* \s+(?!\S) | \s+ for the run of white space [i, e): all of it at the end of text, else all but its last
 * character. */
static size_t spaces(const char *p, size_t n, size_t i, size_t e)
{
    if (e == n) return e;
    size_t last = e - 1;
    while (last > i && ((unsigned char)p[last] & 0xC0) == 0x80) last--;
    return last > i ? last : e;
}

static size_t gpt2(const char *p, size_t n, size_t i)
{
    at c = look(p, n, i);
    if (c.cp == '\'') {
        size_t e = contraction(p, n, i, false);
        if (e) return e;
    }
    size_t j = i;
    at d = c;
    if (c.cp == ' ' && i + 1 < n) {
        d = look(p, n, i + 1);
        if (!(d.cls & S)) j = i + 1;
        else d = c;
    }
    if (d.cls & L) return run_of(p, n, j, L, SIZE_MAX);
    if (d.cls & N) return run_of(p, n, j, N, SIZE_MAX);
    if (!(d.cls & S)) return run_of(p, n, j, 0, SIZE_MAX);
    return spaces(p, n, i, run_of(p, n, i, S, SIZE_MAX));
}

static size_t cl100k(const char *p, size_t n, size_t i, size_t digits)
{
    at c = look(p, n, i);
    if (c.cp == '\'') {
        size_t e = contraction(p, n, i, true);
        if (e) return e;
    }
    if (c.cls & L) return run_of(p, n, i, L, SIZE_MAX);
    if (c.cls & N) return run_of(p, n, i, N, digits);
    at d = look(p, n, i + c.len);
    if (c.cp != '\r' && c.cp != '\n' && (d.cls & L)) return run_of(p, n, i + c.len, L, SIZE_MAX);
    bool other = !(c.cls & S);
    if (other || (c.cp == ' ' && d.len && !d.cls)) { /* ` ?[^\s\p{L}\p{N}]+[\r\n]*` */
        size_t e = run_of(p, n, other ? i : i + 1, 0, SIZE_MAX);
        while (e < n && (p[e] == '\r' || p[e] == '\n')) e++;
        return e;
    }
    size_t e = run_of(p, n, i, S, SIZE_MAX);
    for (size_t k = e; k > i; k--) /* `\s*[\r\n]+` ends behind the last line break of the run */
        if (p[k - 1] == '\r' || p[k - 1] == '\n') return k;
    return spaces(p, n, i, e);
}

static size_t llama3(const char *p, size_t n, size_t i) { return cl100k(p, n, i, 3); }
static size_t qwen2(const char *p, size_t n, size_t i) { return cl100k(p, n, i, 1); }

td_pretok_fast *td_pretok_fast_for(const char *pattern, size_t n)
{
    static const struct {
        const char *text;
        td_pretok_fast *fn;
    } known[] = {{TD_PRETOK_GPT2, gpt2}, {LLAMA3, llama3}, {QWEN2, qwen2}};
    for (size_t k = 0; k < sizeof known / sizeof known[0]; k++)
        if (strlen(known[k].text) == n && !memcmp(known[k].text, pattern, n)) return known[k].fn;
    return NULL;
}
