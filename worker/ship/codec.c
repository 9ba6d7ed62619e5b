// SPDX-License-Identifier: Apache-2.0
#include "worker/ship/codec.h"
#include "common/check.h"
#include "common/crc.h"
#include <stdlib.h>

uint32_t td_codec_tokens(const td_rect *r, const td_token_set *pick)
{
    return td_token_before(pick, r->tok0 + r->n_tok) - td_token_before(pick, r->tok0);
}

size_t td_codec_bytes(const td_kv *kv, const td_rect *r, const td_token_set *pick)
{
    return 2 * (size_t)r->n_layers * r->n_heads * td_codec_tokens(r, pick) * (size_t)kv->D *
           td_dtype_bytes(kv->dtype);
}

/* The next tokens of the rectangle that lie side by side: picked, and in one page of this side. */
typedef struct stretch { uint32_t token, local, n; } stretch;

static bool next(const td_codec_side *s, const td_rect *r, const td_token_set *pick, stretch *x)
{
    uint32_t end = r->tok0 + r->n_tok, P = (uint32_t)s->kv->P, n;
    uint32_t t = td_token_run(pick, x->token + x->n, end, &n);
    if (!n) return false;
    uint32_t here = n;
    x->token = t;
    if (td_token_run(&s->tokens, t, t + n, &here) != t) here = 0; /* not held: checked once, before */
    x->local = td_token_before(&s->tokens, t);
    x->n = TD_MIN(TD_MIN(n, here), P - x->local % P);
    return true;
}

static bool fits(const td_codec_side *s, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                 const td_rect *r, const td_token_set *pick)
{
    uint32_t P = (uint32_t)s->kv->P;
    if (!r->n_tok || r->layer0 < s->slot0 || r->layer0 + r->n_layers > s->slot0 + s->n_slots ||
        r->head0 < s->head0 || r->head0 + r->n_heads > s->head0 + s->kv->G)
        return false;
    for (stretch x = {.token = r->tok0}; next(s, r, pick, &x);) {
        uint32_t j = x.local / P;
        if (!x.n || j < page0 || j - page0 >= n_pages) return false;
        if (pages[j - page0] < 0 || pages[j - page0] >= s->kv->n_pages) return false;
    }
    return true;
}

bool td_codec_rows(const td_codec_side *s, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                   const td_rect *r, const td_token_set *pick, int32_t *row)
{
    uint32_t P = (uint32_t)s->kv->P;
    if (!fits(s, pages, page0, n_pages, r, pick)) return false;
    for (stretch x = {.token = r->tok0}; next(s, r, pick, &x);)
        for (uint32_t i = 0; i < x.n; i++)
            *row++ = pages[x.local / P - page0] * (int32_t)P + (int32_t)(x.local % P + i);
    return true;
}

/* ---- pieces ---- */
/* What one head of one slot's K or V has of one stretch: it lies in one run in the page and in the payload.
 * The payload is walked as it lies, so that its checksum is one that the pieces carry on. */
enum { FEW = 512 }; /* tokens, each at worst a piece */
typedef struct piece { int32_t page; uint32_t row, n; } piece;

static uint32_t pieces(const td_codec_side *s, const int32_t *pages, uint32_t page0, const td_rect *r,
                       const td_token_set *pick, piece *out)
{
    uint32_t P = (uint32_t)s->kv->P, n = 0;
    for (stretch x = {.token = r->tok0}; next(s, r, pick, &x);)
        out[n++] = (piece){pages[x.local / P - page0], x.local % P, x.n};
    return n;
}

typedef struct mover {
    bool gather;
    size_t row;                  /* bytes of a token of a head */
    const piece *piece;
    uint32_t n;
    uint8_t *payload;            /* where the next piece lies */
    uint32_t crc;
} mover;

/* side: a head of K or V in the slot's first page; page_bytes: from page to page. */
static void move_head(mover *m, uint8_t *side, size_t page_bytes)
{
    for (const piece *p = m->piece, *end = p + m->n; p < end; p++) {
        uint8_t *page = side + page_bytes * (size_t)p->page + p->row * m->row;
        size_t n = p->n * m->row;
        m->crc = m->gather ? td_crc32c_copy(m->crc, m->payload, page, n, false)
                           : td_crc32c_copy(m->crc, page, m->payload, n, true);
        m->payload += n;
    }
}

static void walk(mover *m, const td_codec_side *s, const td_rect *r)
{
    const td_kv *kv = s->kv;
    size_t head = (size_t)kv->P * m->row;
    for (int l = 0; l < r->n_layers; l++)
        for (int side = 0; side < 2; side++)
            for (int h = 0; h < r->n_heads; h++)
                move_head(m,
                          td_kv_page(kv, r->layer0 - s->slot0 + l, 0) +
                              head * (size_t)(side * kv->G + r->head0 - s->head0 + h),
                          td_kv_page_bytes(kv));
}

static bool run(bool gather, const td_codec_side *s, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                const td_rect *r, const td_token_set *pick, uint8_t *payload, uint32_t *crc)
{
    if (!fits(s, pages, page0, n_pages, r, pick)) return false;
    piece few[FEW], *all = few;
    if (td_codec_tokens(r, pick) > FEW) all = td_xalloc(td_codec_tokens(r, pick) * sizeof *all);
    mover m = {.gather = gather,
               .row = (size_t)s->kv->D * td_dtype_bytes(s->kv->dtype),
               .piece = all,
               .n = pieces(s, pages, page0, r, pick, all),
               .payload = payload};
    walk(&m, s, r);
    if (!gather) td_crc32c_copied();
    if (all != few) free(all);
    if (crc) *crc = m.crc;
    return true;
}

bool td_codec_gather(const td_codec_side *s, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                     const td_rect *r, const td_token_set *pick, void *payload, uint32_t *crc)
{
    return run(true, s, pages, page0, n_pages, r, pick, payload, crc);
}

bool td_codec_scatter(const td_codec_side *s, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                      const td_rect *r, const td_token_set *pick, const void *payload, uint32_t *crc)
{
    return run(false, s, pages, page0, n_pages, r, pick, (uint8_t *)(uintptr_t)payload, crc); /* read only */
}
