// SPDX-License-Identifier: Apache-2.0
#include "worker/ship/codec.h"
#include "common/check.h"

/* Into pages that nobody reads soon: past the caches, so that a line is not read from memory only to be
 * overwritten (half the time of memcpy). */
#ifdef __x86_64__
#include <immintrin.h>
static void put(uint8_t *to, const uint8_t *from, size_t n)
{
    if (((uintptr_t)to | n) % 64) {
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

static uint32_t picked(const td_rect *r, const td_token_set *pick)
{
    return td_token_before(pick, r->tok0 + r->n_tok) - td_token_before(pick, r->tok0);
}

size_t td_codec_bytes(const td_kv *kv, const td_rect *r, const td_token_set *pick)
{
    return 2 * (size_t)r->n_layers * r->n_heads * picked(r, pick) * (size_t)kv->D * td_dtype_bytes(kv->dtype);
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

/* Both directions walk the same stretches. */
static void walk(const td_codec_side *s, const int32_t *pages, uint32_t page0, const td_rect *r,
                 const td_token_set *pick, uint8_t *payload, const uint8_t *from)
{
    const td_kv *kv = s->kv;
    uint32_t P = (uint32_t)kv->P;
    size_t row = (size_t)kv->D * td_dtype_bytes(kv->dtype), head = row * picked(r, pick), off = 0;
    size_t page_head = (size_t)P * row,
           skip = page_head * (size_t)(kv->G - r->n_heads); /* to the same head of V */
    for (stretch x = {.token = r->tok0}; next(s, r, pick, &x); off += x.n * row) {
        size_t at = off;
        for (int l = 0; l < r->n_layers; l++) {
            uint8_t *page = td_kv_page(kv, r->layer0 - s->slot0 + l, pages[x.local / P - page0]) +
                page_head * (size_t)(r->head0 - s->head0) + x.local % P * row;
            for (int kv2 = 0; kv2 < 2; kv2++, page += skip)
                for (int h = 0; h < r->n_heads; h++, page += page_head, at += head) {
                    if (from) put(page, from + at, x.n * row);
                    else memcpy(payload + at, page, x.n * row);
                }
        }
    }
}

bool td_codec_gather(const td_codec_side *s, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                     const td_rect *r, const td_token_set *pick, void *payload)
{
    if (!fits(s, pages, page0, n_pages, r, pick)) return false;
    walk(s, pages, page0, r, pick, payload, NULL);
    return true;
}

bool td_codec_scatter(const td_codec_side *s, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                      const td_rect *r, const td_token_set *pick, const void *payload)
{
    if (!fits(s, pages, page0, n_pages, r, pick)) return false;
    walk(s, pages, page0, r, pick, NULL, payload);
    put_end();
    return true;
}
