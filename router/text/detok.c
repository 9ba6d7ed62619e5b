// SPDX-License-Identifier: Apache-2.0
#include "router/text/detok.h"
#include "router/text/tokenizer_impl.h"
#include "router/text/unicode.h"
#include <string.h>

static const char REPLACEMENT[] = "\xEF\xBF\xBD";

void td_detok_init(td_detok *d, const td_tokenizer *t, bool skip_special)
{
    *d = (td_detok){.t = t, .lead = t->facts.lead_max, .skip_special = skip_special, .first = true};
}

void td_detok_continue(td_detok *d)
{
    d->lead = 0;
    d->first = false;
}

/* One complete character, or what stands for a broken one. */
static void emit(td_detok *d, const char *p, size_t n, td_buf *out)
{
    if (d->lead) {
        if (n == d->t->facts.lead_n && !memcmp(p, d->t->facts.lead, n)) {
            d->lead--;
            return;
        }
        d->lead = 0;
    }
    td_buf_add(out, p, n);
}

static void push_byte(td_detok *d, char c, td_buf *out)
{
    d->held[d->n_held++] = c;
    while (d->n_held) {
        int k = td_uc_probe(d->held, d->n_held);
        if (!k) return;
        size_t used = (size_t)(k < 0 ? -k : k);
        if (k > 0) emit(d, d->held, used, out);
        else emit(d, REPLACEMENT, 3, out);
        d->n_held = (uint8_t)(d->n_held - used);
        memmove(d->held, d->held + used, d->n_held);
    }
}

static void push_bytes(td_detok *d, const char *p, size_t n, td_buf *out)
{
    if (!d->n_held && !d->lead && td_uc_valid(p, n, NULL)) {
        td_buf_add(out, p, n);
        return;
    }
    for (size_t i = 0; i < n; i++) push_byte(d, p[i], out);
}

/* The first token of a text under a Metaspace decoder: decoded on the spot, once a text. */
static void push_first(td_detok *d, uint32_t id, td_buf *out)
{
    size_t n;
    const char *raw = td_tokenizer_raw(d->t, id, &n);
    td_match *m = td_match_open();
    td_buf b;
    td_buf_init(&b, 0);
    td_decoder_token(d->t->decoder, m, raw, n, true, &b);
    push_bytes(d, b.p ? b.p : "", b.len, out);
    td_buf_deinit(&b);
    td_match_close(m);
}

void td_detok_push(td_detok *d, uint32_t id, td_buf *out)
{
    const td_vocab *v = &d->t->vocab;
    size_t n;
    if (id >= v->n || v->flags[id] & TD_TOK_UNUSED) return;
    if (d->skip_special && v->flags[id] & TD_TOK_SPECIAL) return;
    bool first = d->first;
    d->first = false;
    if (first && d->t->facts.first_differs) {
        push_first(d, id, out);
        return;
    }
    if (!first && d->t->facts.join_spaces) push_bytes(d, " ", 1, out);
    const char *p = td_vocab_bytes(v, id, &n);
    push_bytes(d, p, n, out);
}

void td_detok_flush(td_detok *d, td_buf *out)
{
    if (d->n_held) emit(d, REPLACEMENT, 3, out);
    d->n_held = 0;
}
