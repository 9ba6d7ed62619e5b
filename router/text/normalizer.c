// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "router/text/normalizer.h"
#include "router/text/unicode.h"
#include <stdlib.h>
#include <string.h>

enum { STEPS = 32, NESTING = 8 };

typedef enum { N_FORM, N_LOWER, N_PREPEND, N_REPLACE, N_STRIP, N_ACCENTS, N_BYTES } kind;

typedef struct step {
    kind kind;
    td_nform form;
    bool left, right;
    char *text; /* Prepend, Replace */
    size_t n;
    td_pattern pattern;
} step;

struct td_normalizer {
    unsigned n;
    step step[STEPS];
};

/* ---- byte level alphabet: printable Latin-1 bytes stand for themselves, the rest for U+0100, U+0101, ... in
 * order ---- */

static bool self_mapped(unsigned b)
{
    return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || (b >= 174 && b <= 255);
}

uint32_t td_bytelevel_char(unsigned char byte)
{
    if (self_mapped(byte)) return byte;
    if (byte <= 32) return 256u + byte;
    return byte == 173 ? 256 + 67 : 256u + 33 + (byte - 127u);
}

int td_bytelevel_byte(uint32_t cp)
{
    if (cp < 256) return self_mapped(cp) ? (int)cp : -1;
    cp -= 256;
    if (cp <= 32) return (int)cp;
    if (cp < 67) return (int)(cp - 33 + 127);
    return cp == 67 ? 173 : -1;
}

void td_bytelevel_add(td_buf *b, const char *p, size_t n)
{
    char t[512];
    size_t k = 0;
    for (size_t i = 0; i < n; i++) {
        uint32_t c = td_bytelevel_char((unsigned char)p[i]);
        k += (size_t)td_utf8_put(t + k, c);
        if (k > sizeof t - 4) td_buf_add(b, t, k), k = 0;
    }
    td_buf_add(b, t, k);
}

/* ---- patterns ---- */

td_status td_pattern_open(const td_json *node, const char *file, td_pattern *out)
{
    const td_json *s = td_json_get(node, "String"), *r = td_json_get(node, "Regex");
    td_pattern p = {0};
    if (s && s->type == TD_JSON_STR) {
        p.literal = td_xstrndup(s->s, s->n);
        p.n = s->n;
    } else if (r && r->type == TD_JSON_STR) {
        TD_TRY(td_regex_open(r->s, r->n, &p.regex));
    } else if (node && node->type == TD_JSON_STR) {
        p.literal = td_xstrndup(node->s, node->n);
        p.n = node->n;
    } else {
        return td_fail(TD_ENOSUP, "%s: pattern is neither String nor Regex", file);
    }
    if (p.literal && !p.n) {
        td_pattern_close(&p);
        return td_fail(TD_ENOSUP, "%s: empty String pattern", file);
    }
    *out = p;
    return TD_OK;
}

void td_pattern_close(td_pattern *p)
{
    free(p->literal);
    td_regex_close(p->regex);
    *p = (td_pattern){0};
}

td_status td_pattern_find(const td_pattern *p, td_match *m, const char *text, size_t n, size_t from,
                          size_t *start, size_t *end)
{
    if (p->regex) return td_regex_find(p->regex, m, text, n, from, start, end);
    const char *hit = from < n ? memmem(text + from, n - from, p->literal, p->n) : NULL;
    if (!hit) return TD_AGAIN;
    *start = (size_t)(hit - text);
    *end = *start + p->n;
    return TD_OK;
}

td_status td_pattern_replace(const td_pattern *p, td_match *m, const char *text, size_t n, const char *by,
                             size_t by_n, td_buf *out)
{
    size_t from = 0, done = 0, s, e;
    while (from <= n) {
        td_status st = td_pattern_find(p, m, text, n, from, &s, &e);
        if (st < 0) return st;
        if (st == TD_AGAIN) break;
        td_buf_add(out, text + done, s - done);
        td_buf_add(out, by, by_n);
        done = e;
        if (e > s) from = e;
        else if (e < n) {
            uint32_t cp;
            from = e + td_uc_next(text + e, n - e, &cp);
        } else break;
        if (!td_buf_ok(out)) break;
    }
    td_buf_add(out, text + done, n - done);
    return td_buf_ok(out) ? TD_OK : td_refuse(TD_EFULL, "replace: text over its limit");
}

/* ---- opening ---- */

static td_status take_text(const td_json *node, const char *key, const char *file, step *s)
{
    const td_json *v = td_json_get(node, key);
    if (!v || v->type != TD_JSON_STR) return td_fail(TD_EPROTO, "%s: normalizer.%s is no string", file, key);
    s->text = td_xstrndup(v->s, v->n);
    s->n = v->n;
    return TD_OK;
}

static td_status add_node(td_normalizer *z, const td_json *node, const char *file, int depth);

static td_status add_sequence(td_normalizer *z, const td_json *node, const char *file, int depth)
{
    const td_json *list = td_json_get(node, "normalizers");
    if (!list || list->type != TD_JSON_ARR)
        return td_fail(TD_EPROTO, "%s: normalizer Sequence has no normalizers", file);
    for (const td_json *c = list->child; c; c = c->next) TD_TRY(add_node(z, c, file, depth + 1));
    return TD_OK;
}

static td_status add_node(td_normalizer *z, const td_json *node, const char *file, int depth)
{
    static const struct {
        const char *name;
        kind kind;
        td_nform form;
    } plain[] = {
        {"NFC", N_FORM, TD_NFC},   {"NFD", N_FORM, TD_NFD},   {"NFKC", N_FORM, TD_NFKC},
        {"NFKD", N_FORM, TD_NFKD}, {"Lowercase", N_LOWER, 0}, {"StripAccents", N_ACCENTS, 0},
        {"ByteLevel", N_BYTES, 0}, {"Strip", N_STRIP, 0},     {"Prepend", N_PREPEND, 0},
        {"Replace", N_REPLACE, 0},
    };
    const char *type = td_json_str(node, "type", "");
    if (depth > NESTING) return td_fail(TD_ENOSUP, "%s: normalizer nested too deeply", file);
    if (!strcmp(type, "Sequence")) return add_sequence(z, node, file, depth);
    if (z->n == STEPS) return td_fail(TD_ENOSUP, "%s: more than %d normalizer steps", file, STEPS);
    size_t k = 0;
    while (k < TD_COUNT(plain) && strcmp(type, plain[k].name)) k++;
    if (k == TD_COUNT(plain))
        return td_fail(TD_ENOSUP, "%s: normalizer type \"%.40s\" is not supported", file, type);
    step *s = &z->step[z->n++];
    s->kind = plain[k].kind;
    s->form = plain[k].form;
    if (s->kind == N_STRIP) {
        s->left = td_json_bool(node, "strip_left", true);
        s->right = td_json_bool(node, "strip_right", true);
    }
    if (s->kind == N_PREPEND) return take_text(node, "prepend", file, s);
    if (s->kind != N_REPLACE) return TD_OK;
    TD_TRY(take_text(node, "content", file, s));
    return td_pattern_open(td_json_get(node, "pattern"), file, &s->pattern);
}

td_status td_normalizer_open(const td_json *node, const char *file, td_normalizer **out)
{
    td_normalizer *z = td_xalloc(sizeof *z);
    td_status st = td_json_is_null(node) ? TD_OK : add_node(z, node, file, 0);
    if (st < 0) td_normalizer_close(z);
    else *out = z;
    return st;
}

void td_normalizer_close(td_normalizer *z)
{
    if (!z) return;
    for (unsigned i = 0; i < z->n; i++) {
        free(z->step[i].text);
        td_pattern_close(&z->step[i].pattern);
    }
    free(z);
}

bool td_normalizer_identity(const td_normalizer *z) { return !z->n; }

/* ---- running ---- */

static void strip(const step *s, const char *p, size_t n, td_buf *out)
{
    uint32_t cp;
    size_t from = 0, to = 0, first = 0;
    bool seen = false;
    for (size_t i = 0; i < n;) {
        size_t k = td_uc_next(p + i, n - i, &cp);
        if (!(td_uc_class(cp) & TD_UC_SPACE)) {
            if (!seen) first = i;
            seen = true;
            to = i + k;
        }
        i += k;
    }
    if (!seen) first = s->left ? n : 0;
    from = s->left ? first : 0;
    if (!s->right) to = n;
    if (to > from) td_buf_add(out, p + from, to - from);
}

static void strip_accents(const char *p, size_t n, td_buf *out)
{
    uint32_t cp;
    for (size_t i = 0, k; i < n; i += k) {
        k = td_uc_next(p + i, n - i, &cp);
        if (cp < 0x300 || !(td_uc_class(cp) & TD_UC_NONSPACING)) td_buf_add(out, p + i, k);
    }
}

static td_status run_step(const step *s, td_match *m, const char *p, size_t n, td_buf *out)
{
    switch (s->kind) {
    case N_FORM: return td_uc_normalize(s->form, p, n, out);
    case N_LOWER: td_uc_add_lower(out, p, n); break;
    case N_PREPEND:
        if (n) td_buf_add(out, s->text, s->n);
        td_buf_add(out, p, n);
        break;
    case N_REPLACE: return td_pattern_replace(&s->pattern, m, p, n, s->text, s->n, out);
    case N_STRIP: strip(s, p, n, out); break;
    case N_ACCENTS: strip_accents(p, n, out); break;
    case N_BYTES: td_bytelevel_add(out, p, n); break;
    }
    return td_buf_ok(out) ? TD_OK : td_refuse(TD_EFULL, "normalizer: text over its limit");
}

td_status td_normalizer_run(const td_normalizer *z, td_match *m, const char *p, size_t n, td_buf *out,
                            td_buf *tmp)
{
    td_buf_reset(out);
    if (!z->n) td_buf_add(out, p, n);
    for (unsigned i = 0; i < z->n; i++) {
        td_buf_reset(tmp);
        TD_TRY(run_step(&z->step[i], m, p, n, tmp));
        td_buf swap = *out;
        *out = *tmp;
        *tmp = swap;
        p = out->p ? out->p : "";
        n = out->len;
    }
    return td_buf_ok(out) ? TD_OK : td_refuse(TD_EFULL, "normalizer: text over its limit");
}
