// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "router/text/decoder.h"
#include "router/text/unicode.h"
#include <stdlib.h>
#include <string.h>

enum { STEPS = 16, NESTING = 8 };

typedef enum { D_BYTELEVEL, D_REPLACE, D_BYTE_FALLBACK, D_STRIP, D_METASPACE } kind;

typedef struct step {
    kind kind;
    td_pattern pattern;
    char *text; /* Replace: content */
    size_t n;
    char mark[4]; /* Strip: content; Metaspace: replacement */
    size_t mark_n;
    uint32_t start, stop;
    bool keep_first; /* Metaspace with prepend_scheme never */
} step;

struct td_decoder {
    unsigned n;
    bool fused;
    td_decoder_facts facts;
    step step[STEPS];
};

static td_status one_char(const td_json *node, const char *key, const char *dflt, const char *file,
                          char mark[4], size_t *n)
{
    const char *s = td_json_str(node, key, dflt);
    size_t k = strlen(s);
    if (k < 1 || k > 4 || td_uc_count(s, k) != 1)
        return td_fail(TD_EPROTO, "%s: decoder: %s is not one character", file, key);
    memcpy(mark, s, k);
    *n = k;
    return TD_OK;
}

static td_status open_strip(td_decoder *d, const td_json *node, const char *file, step *s)
{
    int64_t start = td_json_int(node, "start", 0), stop = td_json_int(node, "stop", 0);
    if (start < 0 || start > 1024 || stop < 0 || stop > 1024)
        return td_fail(TD_EPROTO, "%s: decoder: Strip start or stop out of range", file);
    TD_TRY(one_char(node, "content", " ", file, s->mark, &s->mark_n));
    s->start = (uint32_t)start;
    s->stop = (uint32_t)stop;
    if (!d->fused) return TD_OK;
    d->n--; /* not a step on tokens */
    if (stop)
        return td_fail(TD_ENOSUP, "%s: decoder: Strip with stop > 0 behind Fuse is not supported", file);
    if (d->facts.lead_max)
        return td_fail(TD_ENOSUP, "%s: decoder: two Strips behind Fuse are not supported", file);
    memcpy(d->facts.lead, s->mark, s->mark_n);
    d->facts.lead_n = (uint8_t)s->mark_n;
    d->facts.lead_max = (uint32_t)start;
    return TD_OK;
}

static td_status open_step(td_decoder *d, const td_json *node, const char *file, kind k)
{
    if (d->n == STEPS) return td_fail(TD_ENOSUP, "%s: more than %d decoder steps", file, STEPS);
    step *s = &d->step[d->n++];
    s->kind = k;
    if (k == D_STRIP) return open_strip(d, node, file, s);
    if (d->fused)
        return td_fail(TD_ENOSUP, "%s: decoder \"%.40s\" behind Fuse is not supported", file,
                       td_json_str(node, "type", ""));
    if (k == D_BYTELEVEL) d->fused = true;
    if (k == D_BYTE_FALLBACK) d->facts.byte_fallback = true;
    if (k == D_METASPACE) {
        const char *scheme = td_json_str(node, "prepend_scheme",
                                         td_json_bool(node, "add_prefix_space", true) ? "always" : "never");
        s->keep_first = !strcmp(scheme, "never");
        if (!s->keep_first) d->facts.first_differs = true;
        return one_char(node, "replacement", "\xE2\x96\x81", file, s->mark, &s->mark_n);
    }
    if (k == D_REPLACE) {
        const td_json *c = td_json_get(node, "content");
        if (!c || c->type != TD_JSON_STR)
            return td_fail(TD_EPROTO, "%s: decoder: Replace has no content", file);
        s->text = td_xstrndup(c->s, c->n);
        s->n = c->n;
        return td_pattern_open(td_json_get(node, "pattern"), file, &s->pattern);
    }
    return TD_OK;
}

static td_status add_node(td_decoder *d, const td_json *node, const char *file, int depth)
{
    static const struct {
        const char *name;
        kind kind;
    } known[] = {
        {"ByteLevel", D_BYTELEVEL}, {"Replace", D_REPLACE},     {"ByteFallback", D_BYTE_FALLBACK},
        {"Strip", D_STRIP},         {"Metaspace", D_METASPACE},
    };
    const char *type = td_json_str(node, "type", "");
    if (depth > NESTING) return td_fail(TD_ENOSUP, "%s: decoder nested too deeply", file);
    if (!strcmp(type, "Sequence")) {
        const td_json *list = td_json_get(node, "decoders");
        if (!list || list->type != TD_JSON_ARR)
            return td_fail(TD_EPROTO, "%s: decoder Sequence has no decoders", file);
        for (const td_json *c = list->child; c; c = c->next) TD_TRY(add_node(d, c, file, depth + 1));
        return TD_OK;
    }
    if (!strcmp(type, "Fuse")) {
        d->fused = true;
        return TD_OK;
    }
    for (size_t k = 0; k < TD_COUNT(known); k++)
        if (!strcmp(type, known[k].name)) return open_step(d, node, file, known[k].kind);
    return td_fail(TD_ENOSUP, "%s: decoder type \"%.40s\" is not supported", file, type);
}

td_status td_decoder_open(const td_json *node, const char *file, td_decoder **out)
{
    td_decoder *d = td_xalloc(sizeof *d);
    td_status st = TD_OK;
    if (td_json_is_null(node)) d->facts.join_spaces = true;
    else st = add_node(d, node, file, 0);
    if (st < 0) td_decoder_close(d);
    else *out = d;
    return st;
}

td_status td_decoder_bytelevel(td_decoder **out)
{
    td_decoder *d = td_xalloc(sizeof *d);
    d->step[d->n++].kind = D_BYTELEVEL;
    *out = d;
    return TD_OK;
}

void td_decoder_close(td_decoder *d)
{
    if (!d) return;
    for (unsigned i = 0; i < STEPS; i++) {
        free(d->step[i].text);
        td_pattern_close(&d->step[i].pattern);
    }
    free(d);
}

const td_decoder_facts *td_decoder_about(const td_decoder *d) { return &d->facts; }

static int hex(char c)
{
    if (c >= '0' && c <= '9') return c - '0';
    c = (char)(c | 0x20);
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
}

static bool byte_token(const char *p, size_t n, char *out)
{
    if (n != 6 || memcmp(p, "<0x", 3) || p[5] != '>' || hex(p[3]) < 0 || hex(p[4]) < 0) return false;
    *out = (char)(hex(p[3]) << 4 | hex(p[4]));
    return true;
}

/* A token with a character outside the byte alphabet (an added token) stands for its own text. */
static void bytelevel(const char *p, size_t n, td_buf *out)
{
    size_t before = out->len;
    uint32_t cp;
    for (size_t i = 0; i < n;) {
        i += td_uc_next(p + i, n - i, &cp);
        int b = td_bytelevel_byte(cp);
        if (b < 0) {
            if (td_buf_ok(out)) out->len = before;
            td_buf_add(out, p, n);
            return;
        }
        td_buf_chr(out, (char)b);
    }
}

static void strip(const step *s, const char *p, size_t n, td_buf *out)
{
    size_t from = 0, to = n;
    for (uint32_t k = 0; k < s->start && n - from >= s->mark_n && !memcmp(p + from, s->mark, s->mark_n); k++)
        from += s->mark_n;
    for (uint32_t k = 0;
         k < s->stop && to - from >= s->mark_n && !memcmp(p + to - s->mark_n, s->mark, s->mark_n); k++)
        to -= s->mark_n;
    td_buf_add(out, p + from, to - from);
}

static void metaspace(const step *s, const char *p, size_t n, bool first, td_buf *out)
{
    for (size_t i = 0; i < n;) {
        if (n - i >= s->mark_n && !memcmp(p + i, s->mark, s->mark_n)) {
            if (!first || s->keep_first) td_buf_chr(out, ' ');
            i += s->mark_n;
        } else {
            td_buf_chr(out, p[i++]);
        }
    }
}

td_status td_decoder_token(const td_decoder *d, td_match *m, const char *p, size_t n, bool first, td_buf *out)
{
    if (d->n == 1 && d->step[0].kind == D_BYTELEVEL) {
        bytelevel(p, n, out);
        return td_buf_ok(out) ? TD_OK : td_refuse(TD_EFULL, "decoder: token text over its limit");
    }
    td_buf b[2]; /* the text so far is in b[turn ^ 1], or p itself before the first step */
    int turn = 0;
    td_status st = TD_OK;
    bool raw = false; /* a byte: later steps work on text and leave it alone */
    td_buf_init(&b[0], out->max);
    td_buf_init(&b[1], out->max);
    for (unsigned i = 0; i < d->n && st >= 0 && !raw; i++) {
        const step *s = &d->step[i];
        td_buf *to = &b[turn];
        char byte;
        td_buf_reset(to);
        switch (s->kind) {
        case D_BYTELEVEL: bytelevel(p, n, to); break;
        case D_REPLACE: st = td_pattern_replace(&s->pattern, m, p, n, s->text, s->n, to); break;
        case D_STRIP: strip(s, p, n, to); break;
        case D_METASPACE: metaspace(s, p, n, first, to); break;
        case D_BYTE_FALLBACK:
            raw = byte_token(p, n, &byte);
            if (!raw) continue;
            td_buf_chr(to, byte);
        }
        p = to->p ? to->p : "";
        n = to->len;
        turn ^= 1;
    }
    if (st >= 0) td_buf_add(out, p, n);
    td_buf_deinit(&b[0]);
    td_buf_deinit(&b[1]);
    return st < 0 ? st : td_buf_ok(out) ? TD_OK : td_refuse(TD_EFULL, "decoder: token text over its limit");
}
