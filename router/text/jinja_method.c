// SPDX-License-Identifier: Apache-2.0
/* router/text/jinja_method.c - methods of str, list and dict. Lengths and widths count code points. */
#include "common/check.h"
#include "router/text/jinja_impl.h"
#include "router/text/unicode.h"
#include <stdlib.h>
#include <string.h>

enum { WIDTH_MAX = 1 << 20 };

#define METHOD(name) static td_jv name(td_jrun *r, td_jv self, td_jargs *a)
#define BIND(what, names, required, out)                                                                     \
    td_jv out[16];                                                                                           \
    if (!td_jargs_bind(r, a, what, names, required, out)) return self

static bool given(td_jv v) { return v.kind != JV_MISSING && v.kind != JV_NONE; }

static bool text_arg(td_jrun *r, td_jv v, const char *what)
{
    if (v.kind == JV_STR) return true;
    td_jrun_fail(r, TD_EBADREQ, "%s must be str, not %s", what, td_jv_type(v));
    return false;
}

static int64_t int_arg(td_jrun *r, td_jv v, int64_t dflt)
{
    int64_t i = dflt;
    if (given(v) && !td_jv_integer(v, &i))
        td_jrun_fail(r, TD_EBADREQ, "'%s' object cannot be interpreted as an integer", td_jv_type(v));
    return i;
}

static td_jv part(td_jv s, size_t from, size_t to)
{
    td_jv v = td_jv_text(s.u.s + from, to - from);
    v.flag = s.flag;
    return v;
}

/* ---- strip ---- */

static bool in_set(const char *p, size_t k, td_jv set)
{
    if (set.kind != JV_STR) {
        uint32_t cp;
        td_uc_next(p, k, &cp);
        return td_uc_py_space(cp);
    }
    for (size_t i = 0; i < set.n;) { /* the set is a set of characters */
        uint32_t cp;
        size_t m = td_uc_next(set.u.s + i, set.n - i, &cp);
        if (m == k && !memcmp(set.u.s + i, p, k)) return true;
        i += m;
    }
    return false;
}

static td_jv strip(td_jrun *r, td_jv self, td_jargs *a, bool left, bool right)
{
    BIND("strip", "chars", 0, x);
    size_t from = 0, to = self.n;
    uint32_t cp;
    if (given(x[0]) && !text_arg(r, x[0], "strip arg")) return self;
    td_jrun_charge(r, self.n / 64);
    while (left && from < to) {
        size_t k = td_uc_next(self.u.s + from, to - from, &cp);
        if (!in_set(self.u.s + from, k, x[0])) break;
        from += k;
    }
    while (right && to > from) {
        size_t k = to - 1;
        while (k > from && ((unsigned char)self.u.s[k] & 0xC0) == 0x80) k--;
        if (!in_set(self.u.s + k, to - k, x[0])) break;
        to = k;
    }
    return part(self, from, to);
}

METHOD(s_strip) { return strip(r, self, a, true, true); }
METHOD(s_lstrip) { return strip(r, self, a, true, false); }
METHOD(s_rstrip) { return strip(r, self, a, false, true); }

/* ---- split ---- */

static td_jv split_spaces(td_jrun *r, td_jv s, int64_t max, bool from_right)
{
    td_jlist *l = td_jlist_new(r, 8);
    size_t i = 0, end = s.n;
    uint32_t cp;
    if (from_right) { /* collect from the back, then turn around */
        while (end && r->st >= 0) {
            td_jargs none = {0};
            end = s_rstrip(r, part(s, 0, end), &none).n;
            if (!end) break;
            size_t k = end;
            if (max < 0 || l->n < max)
                while (k) {
                    size_t m = k - 1;
                    while (m && ((unsigned char)s.u.s[m] & 0xC0) == 0x80) m--;
                    td_uc_next(s.u.s + m, k - m, &cp);
                    if (td_uc_py_space(cp)) break;
                    k = m;
                }
            else {
                td_jlist_push(r, l, part(s, 0, end));
                break;
            }
            if (!td_jlist_push(r, l, part(s, k, end))) break;
            end = k;
        }
        for (uint32_t k = 0; l && k < l->n / 2; k++) {
            td_jv t = l->v[k];
            l->v[k] = l->v[l->n - 1 - k];
            l->v[l->n - 1 - k] = t;
        }
        return l ? td_jv_list(l) : s;
    }
    while (i < s.n && r->st >= 0) {
        size_t k = td_uc_next(s.u.s + i, s.n - i, &cp);
        if (td_uc_py_space(cp)) {
            i += k;
            continue;
        }
        if (max >= 0 && l &&
            l->n >= max) { /* the rest, blanks at its end dropped by Python only if they are all there is */
            td_jlist_push(r, l, part(s, i, s.n));
            break;
        }
        size_t e = i;
        while (e < s.n) {
            k = td_uc_next(s.u.s + e, s.n - e, &cp);
            if (td_uc_py_space(cp)) break;
            e += k;
        }
        td_jlist_push(r, l, part(s, i, e));
        i = e;
    }
    return l ? td_jv_list(l) : s;
}

static const char *find_last(const char *p, size_t n, const char *w, size_t wn)
{
    for (size_t i = n - wn + 1; n >= wn && i-- > 0;)
        if (!memcmp(p + i, w, wn)) return p + i;
    return NULL;
}

static td_jv split(td_jrun *r, td_jv self, td_jargs *a, bool from_right)
{
    BIND("split", "sep maxsplit", 0, x);
    int64_t max = int_arg(r, x[1], -1);
    td_jlist *l = td_jlist_new(r, 8);
    td_jrun_charge(r, self.n / 16);
    if (!l || r->st < 0) return self;
    if (!given(x[0])) return split_spaces(r, self, max, from_right);
    if (!text_arg(r, x[0], "sep")) return self;
    if (!x[0].n) return td_jrun_fail(r, TD_EBADREQ, "empty separator");
    size_t from = 0, to = self.n;
    while ((max < 0 || l->n < max) && r->st >= 0) {
        const char *hit = from_right ? find_last(self.u.s, to, x[0].u.s, x[0].n)
                                     : memmem(self.u.s + from, self.n - from, x[0].u.s, x[0].n);
        if (!hit) break;
        size_t at = (size_t)(hit - self.u.s);
        td_jlist_push(r, l, from_right ? part(self, at + x[0].n, to) : part(self, from, at));
        from = at + x[0].n;
        to = from_right ? at : to;
    }
    td_jlist_push(r, l, from_right ? part(self, 0, to) : part(self, from, self.n));
    for (uint32_t k = 0; from_right && k < l->n / 2; k++) {
        td_jv t = l->v[k];
        l->v[k] = l->v[l->n - 1 - k];
        l->v[l->n - 1 - k] = t;
    }
    return td_jv_list(l);
}

METHOD(s_split) { return split(r, self, a, false); }
METHOD(s_rsplit) { return split(r, self, a, true); }

METHOD(s_splitlines)
{
    BIND("splitlines", "keepends", 0, x);
    td_jlist *l = td_jlist_new(r, 8);
    uint32_t cp;
    size_t from = 0;
    for (size_t i = 0, k; i < self.n && r->st >= 0; i += k) {
        k = td_uc_next(self.u.s + i, self.n - i, &cp);
        if (!((cp >= 10 && cp <= 13) || (cp >= 0x1C && cp <= 0x1E) || cp == 0x85 || cp == 0x2028 ||
              cp == 0x2029))
            continue;
        if (cp == '\r' && i + 1 < self.n && self.u.s[i + 1] == '\n') k = 2;
        td_jlist_push(r, l, part(self, from, td_jv_true(x[0]) ? i + k : i));
        from = i + k;
    }
    if (from < self.n) td_jlist_push(r, l, part(self, from, self.n));
    return l ? td_jv_list(l) : self;
}

static td_jv partition(td_jrun *r, td_jv self, td_jargs *a, bool from_right)
{
    BIND("partition", "sep", 1, x);
    if (!text_arg(r, x[0], "sep")) return self;
    if (!x[0].n) return td_jrun_fail(r, TD_EBADREQ, "empty separator");
    const char *hit = from_right ? find_last(self.u.s, self.n, x[0].u.s, x[0].n)
                                 : memmem(self.u.s, self.n, x[0].u.s, x[0].n);
    size_t at = hit ? (size_t)(hit - self.u.s) : self.n;
    td_jv none = td_jv_text("", 0);
    td_jlist *l = td_jlist_new(r, 4);
    if (!hit && from_right) td_jlist_push(r, l, none), td_jlist_push(r, l, none), td_jlist_push(r, l, self);
    else {
        td_jlist_push(r, l, part(self, 0, at));
        td_jlist_push(r, l, hit ? x[0] : none);
        td_jlist_push(r, l, hit ? part(self, at + x[0].n, self.n) : none);
    }
    return l ? (td_jv){.kind = JV_TUPLE, .u.list = l} : self;
}

METHOD(s_partition) { return partition(r, self, a, false); }
METHOD(s_rpartition) { return partition(r, self, a, true); }

/* ---- search and replace ---- */

static bool affix(td_jv s, td_jv w, bool end)
{
    return s.n >= w.n && !memcmp(s.u.s + (end ? s.n - w.n : 0), w.u.s, w.n);
}

static td_jv has_affix(td_jrun *r, td_jv self, td_jargs *a, bool end)
{
    BIND(end ? "endswith" : "startswith", "affix start end", 1, x);
    if (given(x[1]) || given(x[2])) self = td_jv_slice(r, self, x[1], x[2], (td_jv){0});
    if (x[0].kind == JV_TUPLE) {
        for (uint32_t i = 0; i < x[0].u.list->n; i++)
            if (text_arg(r, x[0].u.list->v[i], "affix") && affix(self, x[0].u.list->v[i], end))
                return td_jv_bool(true);
        return td_jv_bool(false);
    }
    if (x[0].kind != JV_STR)
        return td_jrun_fail(r, TD_EBADREQ, "%s first arg must be str or a tuple of str, not %s",
                            end ? "endswith" : "startswith", td_jv_type(x[0]));
    return td_jv_bool(affix(self, x[0], end));
}

METHOD(s_startswith) { return has_affix(r, self, a, false); }
METHOD(s_endswith) { return has_affix(r, self, a, true); }

static td_jv remove_affix(td_jrun *r, td_jv self, td_jargs *a, bool end)
{
    BIND("removeprefix or removesuffix", "affix", 1, x);
    if (!text_arg(r, x[0], "affix") || !affix(self, x[0], end)) return self;
    return end ? part(self, 0, self.n - x[0].n) : part(self, x[0].n, self.n);
}

METHOD(s_removeprefix) { return remove_affix(r, self, a, false); }
METHOD(s_removesuffix) { return remove_affix(r, self, a, true); }

static td_jv locate(td_jrun *r, td_jv self, td_jargs *a, bool last, bool must)
{
    BIND("find", "sub start end", 1, x);
    if (!text_arg(r, x[0], "sub")) return self;
    if (given(x[1]) || given(x[2]))
        return td_jrun_fail(r, TD_ENOSUP, "find with start or end is not supported");
    td_jrun_charge(r, self.n / 16);
    const char *hit =
        last ? find_last(self.u.s, self.n, x[0].u.s, x[0].n) : memmem(self.u.s, self.n, x[0].u.s, x[0].n);
    if (!x[0].n) hit = self.u.s + (last ? self.n : 0);
    if (!hit && must) return td_jrun_fail(r, TD_EBADREQ, "substring not found");
    return td_jv_int(hit ? (int64_t)td_uc_count(self.u.s, (size_t)(hit - self.u.s)) : -1);
}

METHOD(s_find) { return locate(r, self, a, false, false); }
METHOD(s_rfind) { return locate(r, self, a, true, false); }
METHOD(s_index) { return locate(r, self, a, false, true); }
METHOD(s_rindex) { return locate(r, self, a, true, true); }

METHOD(s_count)
{
    BIND("count", "sub", 1, x);
    int64_t n = 0;
    if (!text_arg(r, x[0], "sub")) return self;
    if (!x[0].n) return td_jv_int((int64_t)td_uc_count(self.u.s, self.n) + 1);
    td_jrun_charge(r, self.n / 16);
    for (const char *p = self.u.s, *end = p + self.n; (p = memmem(p, (size_t)(end - p), x[0].u.s, x[0].n));
         p += x[0].n)
        n++;
    return td_jv_int(n);
}

METHOD(s_replace)
{
    BIND("replace", "old new count", 2, x);
    int64_t left = int_arg(r, x[2], -1);
    td_buf b;
    if (!text_arg(r, x[0], "replace() argument 1") || !text_arg(r, x[1], "replace() argument 2") || r->st < 0)
        return self;
    td_jrun_charge(r, self.n / 16);
    td_jbuf_init(r, &b);
    size_t from = 0;
    for (size_t i = 0; i <= self.n && left != 0 && td_buf_ok(&b);) {
        uint32_t cp;
        if (!x[0].n) { /* between all characters */
            td_buf_add(&b, x[1].u.s, x[1].n);
            size_t k = i < self.n ? td_uc_next(self.u.s + i, self.n - i, &cp) : 1;
            if (i < self.n) td_buf_add(&b, self.u.s + i, k);
            i += k;
            from = TD_MIN(i, self.n);
        } else {
            const char *hit = memmem(self.u.s + i, self.n - i, x[0].u.s, x[0].n);
            if (!hit) break;
            size_t at = (size_t)(hit - self.u.s);
            td_buf_add(&b, self.u.s + from, at - from);
            td_buf_add(&b, x[1].u.s, x[1].n);
            i = from = at + x[0].n;
        }
        if (left > 0) left--;
    }
    td_buf_add(&b, self.u.s + from, self.n - from);
    td_jv v = td_jv_take(r, &b);
    v.flag = self.flag;
    return v;
}

METHOD(s_join)
{
    BIND("join", "iterable", 1, x);
    td_jiter it;
    td_jv item;
    td_buf b;
    bool first = true;
    if (!td_jiter_open(r, &it, x[0])) return self;
    td_jbuf_init(r, &b);
    while (td_jiter_next(r, &it, &item)) {
        if (!text_arg(r, item, "sequence item")) break;
        if (!first) td_buf_add(&b, self.u.s, self.n);
        td_buf_add(&b, item.u.s, item.n);
        first = false;
    }
    return td_jv_take(r, &b);
}

/* ---- case ---- */

typedef enum { UPPER, LOWER, TITLE, CAPITAL, SWAP } case_kind;

static void add_one(td_buf *b, const char *p, size_t k, uint32_t cp, bool up, bool title)
{
    if (!up) td_uc_add_lower(b, p, k);
    else if (title && td_uc_title(cp) != cp) td_uc_add(b, td_uc_title(cp));
    else td_uc_add_upper(b, p, k);
}

static td_jv recase(td_jrun *r, td_jv self, td_jargs *a, case_kind kind)
{
    BIND("case method", "", 0, none);
    (void)none;
    td_buf b;
    bool start = true;
    uint32_t cp;
    td_jrun_charge(r, self.n / 16);
    td_jbuf_init(r, &b);
    for (size_t i = 0, k; i < self.n; i += k) {
        k = td_uc_next(self.u.s + i, self.n - i, &cp);
        unsigned cls = td_uc_class(cp);
        bool cased = cls & (TD_UC_UPPER | TD_UC_LOWER);
        bool up = kind == UPPER || (kind == TITLE && start) || (kind == CAPITAL && !i) ||
                  (kind == SWAP && (cls & TD_UC_LOWER));
        /* Greek sigma is final behind a letter and before none */
        if (!up && cp == 0x3A3 && i &&
            (td_uc_class((unsigned char)self.u.s[i - 1]) & TD_UC_LETTER ||
             (unsigned char)self.u.s[i - 1] >= 0x80)) {
            uint32_t after = 0;
            if (i + k < self.n) td_uc_next(self.u.s + i + k, self.n - i - k, &after);
            td_uc_add(&b, td_uc_class(after) & TD_UC_LETTER ? 0x3C3 : 0x3C2);
        } else if (kind == SWAP && !cased) td_buf_add(&b, self.u.s + i, k);
        else add_one(&b, self.u.s + i, k, cp, up, kind == TITLE || kind == CAPITAL);
        start = !cased;
    }
    td_jv v = td_jv_take(r, &b);
    v.flag = self.flag;
    return v;
}

METHOD(s_upper) { return recase(r, self, a, UPPER); }
METHOD(s_lower) { return recase(r, self, a, LOWER); }
METHOD(s_title) { return recase(r, self, a, TITLE); }
METHOD(s_capitalize) { return recase(r, self, a, CAPITAL); }
METHOD(s_swapcase) { return recase(r, self, a, SWAP); }

/* All characters have one of the classes; at least one does. */
static td_jv all_in(td_jrun *r, td_jv self, td_jargs *a, unsigned want, bool space)
{
    BIND("is method", "", 0, none);
    (void)none;
    uint32_t cp;
    for (size_t i = 0; i < self.n;) {
        i += td_uc_next(self.u.s + i, self.n - i, &cp);
        if (space ? !td_uc_py_space(cp) : !(td_uc_class(cp) & want)) return td_jv_bool(false);
    }
    return td_jv_bool(self.n > 0);
}

METHOD(s_isalpha) { return all_in(r, self, a, TD_UC_LETTER, false); }
METHOD(s_isalnum) { return all_in(r, self, a, TD_UC_LETTER | TD_UC_NUMBER, false); }
METHOD(s_isdigit) { return all_in(r, self, a, TD_UC_DIGIT, false); }
METHOD(s_isnumeric) { return all_in(r, self, a, TD_UC_NUMBER, false); }
METHOD(s_isspace) { return all_in(r, self, a, 0, true); }

static td_jv is_case(td_jrun *r, td_jv self, td_jargs *a, unsigned want, unsigned never)
{
    BIND("is method", "", 0, none);
    (void)none;
    bool seen = false;
    uint32_t cp;
    for (size_t i = 0; i < self.n;) {
        i += td_uc_next(self.u.s + i, self.n - i, &cp);
        unsigned cls = td_uc_class(cp);
        if (cls & never) return td_jv_bool(false);
        seen |= (cls & want) != 0;
    }
    return td_jv_bool(seen);
}

METHOD(s_isupper) { return is_case(r, self, a, TD_UC_UPPER, TD_UC_LOWER); }
METHOD(s_islower) { return is_case(r, self, a, TD_UC_LOWER, TD_UC_UPPER); }

/* ---- padding ---- */

static td_jv pad(td_jrun *r, td_jv self, td_jargs *a, int side)
{
    BIND("justify", "width fillchar", 1, x);
    int64_t width = int_arg(r, x[0], 0), n = td_jv_len(r, self), left, right;
    td_jv fill = given(x[1]) ? x[1] : td_jv_text(" ", 1);
    td_buf b;
    if (!text_arg(r, fill, "fillchar") || r->st < 0) return self;
    if (td_uc_count(fill.u.s, fill.n) != 1)
        return td_jrun_fail(r, TD_EBADREQ, "The fill character must be exactly one character long");
    if (width > WIDTH_MAX) return td_jrun_fail(r, TD_EFULL, "string too long");
    if (width <= n) return self;
    left = side > 0 ? width - n : side < 0 ? 0 : (width - n) / 2 + ((width - n) & width & 1);
    right = width - n - left;
    td_jbuf_init(r, &b);
    while (left-- > 0) td_buf_add(&b, fill.u.s, fill.n);
    td_buf_add(&b, self.u.s, self.n);
    while (right-- > 0) td_buf_add(&b, fill.u.s, fill.n);
    return td_jv_take(r, &b);
}

METHOD(s_ljust) { return pad(r, self, a, -1); }
METHOD(s_rjust) { return pad(r, self, a, 1); }
METHOD(s_center) { return pad(r, self, a, 0); }

METHOD(s_zfill)
{
    BIND("zfill", "width", 1, x);
    int64_t width = int_arg(r, x[0], 0), n = td_jv_len(r, self);
    bool sign = self.n && (self.u.s[0] == '+' || self.u.s[0] == '-');
    td_buf b;
    if (width > WIDTH_MAX) return td_jrun_fail(r, TD_EFULL, "string too long");
    if (width <= n || r->st < 0) return self;
    td_jbuf_init(r, &b);
    if (sign) td_buf_chr(&b, self.u.s[0]);
    for (int64_t i = n; i < width; i++) td_buf_chr(&b, '0');
    td_buf_add(&b, self.u.s + sign, self.n - sign);
    return td_jv_take(r, &b);
}

/* "{} {0} {name}".format(...), without format specifications. */
METHOD(s_format)
{
    td_buf b;
    uint32_t next = 0;
    td_jbuf_init(r, &b);
    for (size_t i = 0; i < self.n && r->st >= 0; i++) {
        char c = self.u.s[i];
        if ((c == '{' || c == '}') && i + 1 < self.n && self.u.s[i + 1] == c) {
            td_buf_chr(&b, c);
            i++;
            continue;
        }
        if (c != '{') {
            td_buf_chr(&b, c);
            continue;
        }
        const char *p = self.u.s + i + 1, *end = memchr(p, '}', self.n - i - 1);
        size_t n = end ? (size_t)(end - p) : 0;
        td_jv v = {0};
        if (!end || memchr(p, ':', n) || memchr(p, '!', n) || memchr(p, '.', n) || memchr(p, '[', n)) {
            td_jrun_fail(r, TD_ENOSUP, "this format string is not supported");
            break;
        }
        uint32_t at = n && *p >= '0' && *p <= '9' ? (uint32_t)TD_MIN(strtoul(p, NULL, 10), 100000ul) : next;
        if (!n) next++;
        if (!n || (*p >= '0' && *p <= '9')) v = at < a->n ? a->pos[at] : v;
        else
            for (uint32_t k = 0; k < a->n_kw; k++)
                if (a->kw[k].n == n && !memcmp(a->kw[k].name, p, n)) v = a->kw[k].v;
        if (v.kind == JV_MISSING) td_jrun_fail(r, TD_EBADREQ, "format: no argument '%.*s'", (int)n, p);
        else td_jv_str(r, v, &b);
        i += n + 1;
    }
    return td_jv_take(r, &b);
}

/* ---- list ---- */

METHOD(l_append)
{
    BIND("append", "object", 1, x);
    td_jlist_push(r, self.u.list, x[0]);
    return td_jv_none();
}

METHOD(l_extend)
{
    BIND("extend", "iterable", 1, x);
    td_jlist *more = td_jv_collect(r, x[0]);
    for (uint32_t i = 0; more && i < more->n; i++) td_jlist_push(r, self.u.list, more->v[i]);
    return td_jv_none();
}

METHOD(l_insert)
{
    BIND("insert", "index object", 2, x);
    td_jlist *l = self.u.list;
    int64_t i = int_arg(r, x[0], 0);
    if (!td_jlist_push(r, l, x[1])) return self;
    if (i < 0) i = TD_MAX(i + l->n - 1, (int64_t)0);
    i = TD_MIN(i, (int64_t)l->n - 1);
    memmove(l->v + i + 1, l->v + i, (l->n - 1 - (size_t)i) * sizeof *l->v);
    l->v[i] = x[1];
    td_jrun_charge(r, l->n / 16);
    return td_jv_none();
}

METHOD(l_pop)
{
    BIND("pop", "index", 0, x);
    td_jlist *l = self.u.list;
    int64_t i = int_arg(r, x[0], -1);
    if (!l->n) return td_jrun_fail(r, TD_EBADREQ, "pop from empty list");
    if (i < 0) i += l->n;
    if (i < 0 || i >= l->n) return td_jrun_fail(r, TD_EBADREQ, "pop index out of range");
    td_jv v = l->v[i];
    memmove(l->v + i, l->v + i + 1, (l->n - 1 - (size_t)i) * sizeof *l->v);
    l->n--;
    td_jrun_charge(r, l->n / 16);
    return v;
}

static td_jv find_item(td_jrun *r, td_jv self, td_jargs *a, int what)
{
    BIND("list method", "value", 1, x);
    td_jlist *l = self.u.list;
    int64_t n = 0;
    for (uint32_t i = 0; i < l->n && r->st >= 0; i++) {
        if (!td_jv_eq(r, l->v[i], x[0])) continue;
        n++;
        if (what == 0) return td_jv_int(i);
        if (what == 1) {
            td_jv at = td_jv_int(i);
            td_jargs one = {.pos = &at, .n = 1};
            l_pop(r, self, &one);
            return td_jv_none();
        }
    }
    return what == 2 ? td_jv_int(n) : td_jrun_fail(r, TD_EBADREQ, "value is not in list");
}

METHOD(l_index) { return find_item(r, self, a, 0); }
METHOD(l_remove) { return find_item(r, self, a, 1); }
METHOD(l_count) { return find_item(r, self, a, 2); }

METHOD(l_clear)
{
    BIND("clear", "", 0, none);
    (void)none;
    self.u.list->n = 0;
    return td_jv_none();
}

METHOD(l_copy)
{
    BIND("copy", "", 0, none);
    (void)none;
    td_jlist *l = td_jv_collect(r, self);
    return l ? td_jv_list(l) : self;
}

METHOD(l_reverse)
{
    BIND("reverse", "", 0, none);
    (void)none;
    td_jlist *l = self.u.list;
    for (uint32_t i = 0; i < l->n / 2; i++) {
        td_jv t = l->v[i];
        l->v[i] = l->v[l->n - 1 - i];
        l->v[l->n - 1 - i] = t;
    }
    return td_jv_none();
}

METHOD(l_sort)
{
    BIND("sort", "reverse", 0, x);
    td_jlist_sort(r, self.u.list->v, self.u.list->v, self.u.list->n, td_jv_true(x[0]));
    return td_jv_none();
}

/* ---- dict ---- */

METHOD(d_get)
{
    BIND("get", "key default", 1, x);
    if (!td_jv_hashable(r, x[0])) return self;
    td_jv *v = td_jdict_find(r, self.u.dict, x[0]);
    return v ? *v : x[1].kind == JV_MISSING ? td_jv_none() : x[1];
}

static td_jv view(td_jrun *r, td_jv self, td_jargs *a, uint8_t what)
{
    BIND("dict method", "", 0, none);
    (void)none;
    td_jdict *d = self.u.dict;
    td_jlist *l = td_jlist_new(r, d->n);
    for (uint32_t i = 0; l && i < d->n && r->st >= 0; i++) {
        if (what < 2) {
            td_jlist_push(r, l, what ? d->e[i].v : d->e[i].k);
            continue;
        }
        td_jlist *pair = td_jlist_new(r, 2);
        td_jlist_push(r, pair, d->e[i].k);
        td_jlist_push(r, pair, d->e[i].v);
        td_jlist_push(r, l, (td_jv){.kind = JV_TUPLE, .u.list = pair});
    }
    return l ? (td_jv){.kind = JV_VIEW, .flag = what, .u.list = l} : self;
}

METHOD(d_keys) { return view(r, self, a, 0); }
METHOD(d_values) { return view(r, self, a, 1); }
METHOD(d_items) { return view(r, self, a, 2); }

METHOD(d_copy)
{
    BIND("copy", "", 0, none);
    (void)none;
    td_jdict *d = td_jdict_new(r);
    for (uint32_t i = 0; d && i < self.u.dict->n; i++)
        td_jdict_set(r, d, self.u.dict->e[i].k, self.u.dict->e[i].v);
    return d ? (td_jv){.kind = JV_DICT, .u.dict = d} : self;
}

METHOD(d_pop)
{
    BIND("pop", "key default", 1, x);
    td_jv *v = td_jv_hashable(r, x[0]) ? td_jdict_find(r, self.u.dict, x[0]) : NULL;
    if (!v) return x[1].kind != JV_MISSING ? x[1] : td_jrun_fail(r, TD_EBADREQ, "pop: no such key");
    td_jv keep = *v;
    td_jdict_del(r, self.u.dict, x[0]);
    return keep;
}

METHOD(d_popitem)
{
    BIND("popitem", "", 0, none);
    (void)none;
    td_jdict *d = self.u.dict;
    if (!d->n) return td_jrun_fail(r, TD_EBADREQ, "popitem(): dictionary is empty");
    td_jlist *pair = td_jlist_new(r, 2);
    td_jlist_push(r, pair, d->e[d->n - 1].k);
    td_jlist_push(r, pair, d->e[d->n - 1].v);
    td_jdict_del(r, d, d->e[d->n - 1].k);
    return pair ? (td_jv){.kind = JV_TUPLE, .u.list = pair} : self;
}

METHOD(d_setdefault)
{
    BIND("setdefault", "key default", 1, x);
    if (!td_jv_hashable(r, x[0])) return self;
    td_jv *v = td_jdict_find(r, self.u.dict, x[0]);
    if (v) return *v;
    if (x[1].kind == JV_MISSING) x[1] = td_jv_none();
    td_jdict_set(r, self.u.dict, x[0], x[1]);
    return x[1];
}

METHOD(d_update)
{
    if (a->n > 1) return td_jrun_fail(r, TD_EBADREQ, "update expected at most 1 argument");
    if (a->n && a->pos[0].kind != JV_DICT)
        return td_jrun_fail(r, TD_ENOSUP, "update with a %s is not supported", td_jv_type(a->pos[0]));
    for (uint32_t i = 0; a->n && i < a->pos[0].u.dict->n; i++)
        td_jdict_set(r, self.u.dict, a->pos[0].u.dict->e[i].k, a->pos[0].u.dict->e[i].v);
    for (uint32_t k = 0; k < a->n_kw; k++)
        td_jdict_set(r, self.u.dict, td_jv_text(a->kw[k].name, a->kw[k].n), a->kw[k].v);
    return td_jv_none();
}

METHOD(d_clear)
{
    BIND("clear", "", 0, none);
    (void)none;
    self.u.dict->n = 0;
    self.u.dict->index = NULL;
    return td_jv_none();
}

/* ---- cycler ---- */

METHOD(c_next)
{
    BIND("next", "", 0, none);
    (void)none;
    td_jgen *g = self.u.gen;
    td_jv v = g->list->v[g->at];
    g->at = (g->at + 1) % g->list->n;
    return v;
}

METHOD(c_reset)
{
    BIND("reset", "", 0, none);
    (void)none;
    self.u.gen->at = 0;
    return td_jv_none();
}

const td_jfn *td_jinja_method(td_jkind kind, const char *name, uint32_t n)
{
    static const td_jfn str[] = {
        {"capitalize", s_capitalize, false},
        {"casefold", s_lower, false},
        {"center", s_center, false},
        {"count", s_count, false},
        {"endswith", s_endswith, false},
        {"find", s_find, false},
        {"format", s_format, false},
        {"index", s_index, false},
        {"isalnum", s_isalnum, false},
        {"isalpha", s_isalpha, false},
        {"isdecimal", s_isdigit, false},
        {"isdigit", s_isdigit, false},
        {"islower", s_islower, false},
        {"isnumeric", s_isnumeric, false},
        {"isspace", s_isspace, false},
        {"isupper", s_isupper, false},
        {"join", s_join, false},
        {"ljust", s_ljust, false},
        {"lower", s_lower, false},
        {"lstrip", s_lstrip, false},
        {"partition", s_partition, false},
        {"removeprefix", s_removeprefix, false},
        {"removesuffix", s_removesuffix, false},
        {"replace", s_replace, false},
        {"rfind", s_rfind, false},
        {"rindex", s_rindex, false},
        {"rjust", s_rjust, false},
        {"rpartition", s_rpartition, false},
        {"rsplit", s_rsplit, false},
        {"rstrip", s_rstrip, false},
        {"split", s_split, false},
        {"splitlines", s_splitlines, false},
        {"startswith", s_startswith, false},
        {"strip", s_strip, false},
        {"swapcase", s_swapcase, false},
        {"title", s_title, false},
        {"upper", s_upper, false},
        {"zfill", s_zfill, false},
        {NULL, NULL, false},
    };
    static const td_jfn list[] = {
        {"append", l_append, true},   {"clear", l_clear, true},   {"copy", l_copy, false},
        {"count", l_count, false},    {"extend", l_extend, true}, {"index", l_index, false},
        {"insert", l_insert, true},   {"pop", l_pop, true},       {"remove", l_remove, true},
        {"reverse", l_reverse, true}, {"sort", l_sort, true},     {NULL, NULL, false},
    };
    static const td_jfn tuple[] = {{"count", l_count, false}, {"index", l_index, false}, {NULL, NULL, false}};
    static const td_jfn dict[] = {
        {"clear", d_clear, true},     {"copy", d_copy, false},
        {"get", d_get, false},        {"items", d_items, false},
        {"keys", d_keys, false},      {"pop", d_pop, true},
        {"popitem", d_popitem, true}, {"setdefault", d_setdefault, true},
        {"update", d_update, true},   {"values", d_values, false},
        {NULL, NULL, false},
    };
    static const td_jfn cycler[] = {{"next", c_next, false}, {"reset", c_reset, false}, {NULL, NULL, false}};
    const td_jfn *t = kind == JV_STR      ? str
                      : kind == JV_LIST   ? list
                      : kind == JV_TUPLE  ? tuple
                      : kind == JV_DICT   ? dict
                      : kind == JV_CYCLER ? cycler
                                          : NULL;
    for (; t && t->name; t++)
        if (strlen(t->name) == n && !memcmp(t->name, name, n)) return t;
    return NULL;
}
