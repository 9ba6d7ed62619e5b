// SPDX-License-Identifier: Apache-2.0
/* common/buf.c - growable bytes; JSON strings and numbers are here because every writer of JSON writes into a
 * td_buf. */
#include "common/buf.h"
#include "common/utf8.h"
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { DEFAULT_MAX = 64 << 20, FIRST_CAP = 256 };

void td_buf_init(td_buf *b, size_t max)
{
    *b = (td_buf){.max = max};
}

void td_buf_deinit(td_buf *b)
{
    free(b->p);
    *b = (td_buf){.max = b->max};
}

void td_buf_reset(td_buf *b)
{
    b->len = 0;
    b->full = false;
    if (b->p) b->p[0] = '\0';
}

/* Room for n more bytes and the NUL; false marks the buffer full. Doubles: appends cost O(1) on average. */
static bool reserve(td_buf *b, size_t n)
{
    if (b->full) return false;
    size_t max = b->max ? b->max : DEFAULT_MAX;
    if (n > max || b->len > max - n) {
        b->full = true;
        return false;
    }
    size_t need = b->len + n + 1;
    if (need <= b->cap) return true;
    size_t cap = b->cap ? b->cap * 2 : FIRST_CAP;
    if (cap < need) cap = need;
    if (cap > max + 1) cap = max + 1;
    char *p = realloc(b->p, cap);
    if (!p) {
        b->full = true;
        return false;
    }
    b->p = p;
    b->cap = cap;
    return true;
}

void td_buf_add(td_buf *b, const void *p, size_t n)
{
    if (!reserve(b, n)) return;
    if (n) memcpy(b->p + b->len, p, n);
    b->len += n;
    b->p[b->len] = '\0';
}

void td_buf_str(td_buf *b, const char *s)
{
    td_buf_add(b, s, strlen(s));
}

void td_buf_chr(td_buf *b, char c)
{
    td_buf_add(b, &c, 1);
}

void td_buf_fmt(td_buf *b, const char *fmt, ...)
{
    va_list ap, again;
    va_start(ap, fmt);
    va_copy(again, ap);
    char small[256];
    int n = vsnprintf(small, sizeof small, fmt, ap);
    va_end(ap);
    if (n < 0) b->full = true;
    else if ((size_t)n < sizeof small) td_buf_add(b, small, (size_t)n);
    else if (reserve(b, (size_t)n)) {
        vsnprintf(b->p + b->len, (size_t)n + 1, fmt, again);
        b->len += (size_t)n;
    }
    va_end(again);
}

static void json_escape(td_buf *b, unsigned char c)
{
    static const char short_form[32] = {[8] = 'b', [9] = 't', [10] = 'n', [12] = 'f', [13] = 'r'};
    char e[6] = {'\\', 'u', '0', '0', 0, 0};
    if (c == '"' || c == '\\' || (c < 32 && short_form[c])) {
        e[1] = c < 32 ? short_form[c] : (char)c;
        td_buf_add(b, e, 2);
        return;
    }
    e[4] = "0123456789abcdef"[c >> 4];
    e[5] = "0123456789abcdef"[c & 15];
    td_buf_add(b, e, 6);
}

void td_buf_json_str(td_buf *b, const char *s, size_t n)
{
    const char *end = s + n, *run = s;
    td_buf_chr(b, '"');
    while (s < end) {
        unsigned char c = (unsigned char)*s;
        uint32_t cp;
        int k = c < 0x80 ? 1 : td_utf8_next(s, end, &cp);
        if (k > 0 && c >= 0x20 && c != '"' && c != '\\') {
            s += k;
            continue;
        }
        td_buf_add(b, run, (size_t)(s - run));
        if (k < 0) {
            td_buf_str(b, "\xEF\xBF\xBD");
            s -= k;
        } else {
            json_escape(b, c);
            s++;
        }
        run = s;
    }
    td_buf_add(b, run, (size_t)(end - run));
    td_buf_chr(b, '"');
}

/* The last digit of d.ddde+xx one up; false where it would carry. Below a power of two doubles are twice as
 * dense, so the nearest 16 digits may lie just outside v's interval and the next ones above inside. */
static bool next_decimal(char *t)
{
    char *last = strchr(t, 'e') - 1;
    if (*last == '9') return false;
    ++*last;
    return true;
}

/* Digits of the shortest decimal that reads back as v > 0, and its exponent: v = 0.d1d2d3... * 10^*point. 15
 * digits always survive a round trip unless v is subnormal, and %e drops nothing we need, so at most three
 * tries in the common case. */
static int shortest_digits(double v, char digits[20], int *point)
{
    char t[40];
    for (int prec = v < 2.3e-308 ? 1 : 15; prec <= 17; prec++) {
        snprintf(t, sizeof t, "%.*e", prec - 1, v);
        if (strtod(t, NULL) == v || prec == 17) break;
        if (prec == 16 && next_decimal(t) && strtod(t, NULL) == v) break;
    }
    char *e = strchr(t, 'e');
    *point = atoi(e + 1) + 1;
    int n = 0;
    for (char *p = t; p < e; p++)
        if (*p != '.') digits[n++] = *p;
    while (n > 1 && digits[n - 1] == '0') n--;
    digits[n] = '\0';
    return n;
}

/* Python's repr: exponent form below 1e-4 and from 1e16, always a point or an exponent. */
void td_buf_json_num(td_buf *b, double v)
{
    if (!isfinite(v)) {
        td_buf_str(b, "null");
        return;
    }
    if (signbit(v)) td_buf_chr(b, '-');
    v = fabs(v);
    if (v < 1e15 && v == (double)(int64_t)v) {
        td_buf_fmt(b, "%lld.0", (long long)v);
        return;
    }
    char d[20];
    int point, n = shortest_digits(v, d, &point);
    if (point < -3 || point > 16) {
        char sign = point < 1 ? '-' : '+';
        td_buf_fmt(b, n > 1 ? "%c.%se%c%02d" : "%c%se%c%02d", d[0], d + 1, sign, abs(point - 1));
    } else if (point <= 0) {
        td_buf_fmt(b, "0.%.*s%s", -point, "000", d);
    } else if (n <= point) {
        td_buf_fmt(b, "%s%.*s.0", d, point - n, "0000000000000000");
    } else {
        td_buf_fmt(b, "%.*s.%s", point, d, d + point);
    }
}

void td_buf_drop_front(td_buf *b, size_t n)
{
    if (n >= b->len) n = b->len;
    if (!n) return;
    memmove(b->p, b->p + n, b->len - n + 1);
    b->len -= n;
}

bool td_buf_ok(const td_buf *b)
{
    return !b->full;
}
