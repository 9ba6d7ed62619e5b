// SPDX-License-Identifier: Apache-2.0
/* router/text/tokenizer.c - encoding. Scratch memory is made per call: a tokenizer is shared by threads and
 * holds none. */
#include "router/text/tokenizer_impl.h"
#include "router/text/unicode.h"

enum { MEMO_FROM = 1024 }; /* bytes of text from which the word cache pays for its memory */

typedef struct encoder {
    const td_tokenizer *t;
    bool parse_special;
    td_match *match;
    td_bpe_run bpe;
    td_pretok_run pre;
    td_buf norm, tmp;
} encoder;

static td_status on_word(void *arg, const char *p, size_t n)
{
    encoder *e = arg;
    return td_bpe_word(e->t->bpe, &e->bpe, p, n);
}

/* Normalized text: added tokens of the normalized kind, then words. */
static td_status encode_normalized(encoder *e, const char *p, size_t n, bool at_start)
{
    size_t from = 0, done = 0, s, end;
    uint32_t id;
    while (td_added_next(&e->t->added, true, e->parse_special, p, n, &from, done, &s, &end, &id)) {
        if (s > done) TD_TRY(td_pretok_split(e->t->pretok, &e->pre, p + done, s - done, at_start && !done));
        TD_TRY(td_bpe_push(&e->bpe, id));
        done = end;
    }
    return done < n ? td_pretok_split(e->t->pretok, &e->pre, p + done, n - done, at_start && !done) : TD_OK;
}

static td_status encode_plain(encoder *e, const char *p, size_t n, bool at_start)
{
    if (td_normalizer_identity(e->t->normalizer)) return encode_normalized(e, p, n, at_start);
    TD_TRY(td_normalizer_run(e->t->normalizer, e->match, p, n, &e->norm, &e->tmp));
    return encode_normalized(e, e->norm.p ? e->norm.p : "", e->norm.len, at_start);
}

static td_status encode_text(encoder *e, const char *p, size_t n)
{
    size_t from = 0, done = 0, s, end;
    uint32_t id;
    while (td_added_next(&e->t->added, false, e->parse_special, p, n, &from, done, &s, &end, &id)) {
        if (s > done) TD_TRY(encode_plain(e, p + done, s - done, !done));
        TD_TRY(td_bpe_push(&e->bpe, id));
        done = end;
    }
    return done < n ? encode_plain(e, p + done, n - done, !done) : TD_OK;
}

static td_status encode_wrapped(encoder *e, const char *p, size_t n, bool add_special)
{
    const td_tokenizer *t = e->t;
    for (uint32_t i = 0; add_special && i < t->n_before; i++) TD_TRY(td_bpe_push(&e->bpe, t->before[i]));
    TD_TRY(encode_text(e, p, n));
    for (uint32_t i = 0; add_special && i < t->n_after; i++) TD_TRY(td_bpe_push(&e->bpe, t->after[i]));
    return TD_OK;
}

td_status td_tokenizer_encode(const td_tokenizer *t, const char *text, size_t n, bool add_special,
                              bool parse_special, size_t max_tokens, td_arena *a, uint32_t **ids,
                              size_t *n_ids)
{
    size_t bad;
    if (n > TD_TOKENIZER_TEXT_MAX)
        return td_refuse(TD_EFULL, "text of %zu bytes, limit %d", n, TD_TOKENIZER_TEXT_MAX);
    if (!td_uc_valid(text, n, &bad)) return td_refuse(TD_EBADREQ, "text is not UTF-8 at byte %zu", bad);
    encoder e = {.t = t, .parse_special = parse_special, .match = td_match_open()};
    e.bpe.max = max_tokens ? max_tokens : SIZE_MAX;
    e.pre = (td_pretok_run){.match = e.match, .text_max = 4 * n + 4096, .word = on_word, .arg = &e};
    td_buf_init(&e.norm, 32 * n + 65536);
    td_buf_init(&e.tmp, 32 * n + 65536);
    e.pre.text_max = 4 * (32 * n + 65536);
    if (n >= MEMO_FROM) td_bpe_memo_open(&e.bpe);
    td_status st = encode_wrapped(&e, text, n, add_special);
    if (st >= 0) {
        uint32_t *copy = td_arena_copy(a, e.bpe.ids, e.bpe.n * sizeof *copy);
        if (!copy) st = td_refuse(TD_EFULL, "no room for %zu token ids", e.bpe.n);
        else *ids = copy, *n_ids = e.bpe.n;
    }
    td_bpe_run_deinit(&e.bpe);
    td_pretok_run_deinit(&e.pre);
    td_buf_deinit(&e.norm);
    td_buf_deinit(&e.tmp);
    td_match_close(e.match);
    return st < 0 ? st : TD_OK;
}

const td_vocab *td_tokenizer_vocab(const td_tokenizer *t) { return &t->vocab; }
int64_t td_tokenizer_bos(const td_tokenizer *t) { return t->bos; }
int64_t td_tokenizer_eos(const td_tokenizer *t) { return t->eos; }
const char *td_tokenizer_bos_text(const td_tokenizer *t) { return t->bos_text; }
const char *td_tokenizer_eos_text(const td_tokenizer *t) { return t->eos_text; }

const uint32_t *td_tokenizer_stops(const td_tokenizer *t, size_t *n)
{
    *n = t->n_stop;
    return t->stop;
}
