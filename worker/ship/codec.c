// SPDX-License-Identifier: Apache-2.0
#include "worker/ship/codec.h"
#include "common/check.h"
#include "common/crc.h"
#include <string.h>

/* Into pages that nobody reads soon: past the caches, so that a line is not read from memory only to be
 * overwritten (half the time of memcpy). */
#ifdef __x86_64__
#include <immintrin.h>
static void put(uint8_t *to, const uint8_t *from, size_t n)
{
    if (((uintptr_t)to | n) % 64) { /* part of a line past the caches costs more */
        memcpy(to, from, n);
        return;
    }
    for (const uint8_t *end = from + n; from < end; from += 64, to += 64)
        for (int i = 0; i < 64; i += 16)
            _mm_stream_si128((__m128i *)(void *)(to + i),
                             _mm_loadu_si128((const __m128i *)(const void *)(from + i)));
}

static void put_end(void)
{
    _mm_sfence(); /* whoever is told of the pages sees what was written */
}
#else
static void put(uint8_t *to, const uint8_t *from, size_t n)
{
    memcpy(to, from, n);
}

static void put_end(void)
{
}
#endif

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
/* A piece is what one head of one slot's K or V has of one stretch: it lies in one run in the page and in the
 * payload. The payload is a row of such heads, one after the other, each with a checksum that its pieces
 * carry on. Pieces are done four at a time, while the caches fetch the next four. */
enum { MAX_HEADS = 1024, MIN_ROW = 64 }; /* beyond: one pass over the payload afterwards */

typedef struct batch {
    uint8_t *page[TD_CRC_LANES], *payload[TD_CRC_LANES];
    uint32_t *crc[TD_CRC_LANES];
    int k;
    size_t n;
} batch;

typedef struct mover {
    bool gather, check;
    batch now, next;
    uint32_t crc[MAX_HEADS]; /* of [layer][k|v][head] */
} mover;

static void check(const batch *b, const batch *next, bool gather)
{
    td_crc_lane lane[TD_CRC_LANES];
    for (int i = 0; i < b->k; i++) {
        const uint8_t *ahead = i >= next->k || next->n < b->n ? NULL
                               : gather                       ? next->page[i]
                                                              : next->payload[i];
        lane[i] = (td_crc_lane){b->payload[i], ahead, *b->crc[i]};
    }
    td_crc32c_lanes(lane, b->k, b->n);
    for (int i = 0; i < b->k; i++) *b->crc[i] = lane[i].crc;
}

/* The batch before the one that is being filled. */
static void turn(mover *m)
{
    const batch *b = &m->now;
    if (m->gather)
        for (int i = 0; i < b->k; i++) memcpy(b->payload[i], b->page[i], b->n);
    if (m->check && b->k) check(b, &m->next, m->gather);
    if (!m->gather)
        for (int i = 0; i < b->k; i++) put(b->page[i], b->payload[i], b->n);
    m->now = m->next;
    m->next.k = 0;
}

static void piece(mover *m, uint8_t *page, uint8_t *payload, uint32_t *crc, size_t n)
{
    batch *b = &m->next;
    if (b->k == TD_CRC_LANES) turn(m);
    b->page[b->k] = page;
    b->payload[b->k] = payload;
    b->crc[b->k++] = crc;
    b->n = n;
}

/* Both directions walk the same stretches. A stretch has one piece of each head, so a batch has no head
 * twice. */
static void walk(mover *m, const td_codec_side *s, const int32_t *pages, uint32_t page0, const td_rect *r,
                 const td_token_set *pick, uint8_t *payload)
{
    const td_kv *kv = s->kv;
    uint32_t P = (uint32_t)kv->P;
    size_t row = (size_t)kv->D * td_dtype_bytes(kv->dtype), head = row * td_codec_tokens(r, pick), off = 0;
    size_t page_head = (size_t)P * row,
           skip = page_head * (size_t)(kv->G - r->n_heads); /* to the same head of V */
    for (stretch x = {.token = r->tok0}; next(s, r, pick, &x); off += x.n * row) {
        uint8_t *at = payload + off;
        uint32_t *crc = m->crc;
        for (int l = 0; l < r->n_layers; l++) {
            uint8_t *page = td_kv_page(kv, r->layer0 - s->slot0 + l, pages[x.local / P - page0]) +
                page_head * (size_t)(r->head0 - s->head0) + x.local % P * row;
            for (int kv2 = 0; kv2 < 2; kv2++, page += skip)
                for (int h = 0; h < r->n_heads; h++, page += page_head, at += head, crc += m->check)
                    piece(m, page, at, crc, x.n * row);
        }
        turn(m);
    }
    turn(m);
}

static uint32_t joined(const mover *m, uint32_t n_heads, size_t head)
{
    td_crc_over over;
    uint32_t crc = 0;
    td_crc_over_init(&over, head);
    for (uint32_t i = 0; i < n_heads; i++) crc = td_crc_join(&over, crc, m->crc[i]);
    return crc;
}

static bool run(bool gather, const td_codec_side *s, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                const td_rect *r, const td_token_set *pick, uint8_t *payload, uint32_t *crc)
{
    mover m;
    uint32_t n_heads = 2u * r->n_layers * r->n_heads;
    if (!fits(s, pages, page0, n_pages, r, pick)) return false;
    size_t bytes = td_codec_bytes(s->kv, r, pick);
    m.gather = gather;
    m.check = crc && n_heads <= MAX_HEADS && (size_t)s->kv->D * td_dtype_bytes(s->kv->dtype) >= MIN_ROW;
    m.now.k = m.next.k = 0;
    memset(m.crc, 0, sizeof *m.crc * (m.check ? n_heads : 1));
    walk(&m, s, pages, page0, r, pick, payload);
    if (!gather) put_end();
    if (crc) *crc = m.check ? joined(&m, n_heads, bytes / n_heads) : td_crc32c(0, payload, bytes);
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
