// SPDX-License-Identifier: Apache-2.0
#include "worker/ship/codec.h"
#include "common/check.h"

size_t td_codec_bytes(const td_kv *kv, const td_rect *r)
{
    return 2 * (size_t)r->n_layers * (size_t)kv->G * r->n_tok * (size_t)kv->D * td_dtype_bytes(kv->dtype);
}

static bool pages_ok(const td_kv *kv, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                     const td_rect *r)
{
    uint32_t P = (uint32_t)kv->P, first = r->tok0 / P, last = (r->tok0 + r->n_tok - 1) / P;
    if (!r->n_tok || first < page0 || last - page0 >= n_pages) return false;
    for (uint32_t i = first; i <= last; i++)
        if (pages[i - page0] < 0 || pages[i - page0] >= kv->n_pages) return false;
    return true;
}

/* Both directions walk the same runs: the tokens of the rectangle that share a page, for one head of K or V.
 * */
static void walk(const td_kv *kv, const int32_t *pages, uint32_t page0, const td_rect *r, uint8_t *payload,
                 const uint8_t *from)
{
    uint32_t P = (uint32_t)kv->P, end = r->tok0 + r->n_tok;
    size_t row = (size_t)kv->D * td_dtype_bytes(kv->dtype), head = row * r->n_tok,
        side = head * (size_t)kv->G;
    for (uint32_t l = 0; l < r->n_layers; l++) {
        for (uint32_t t = r->tok0, run; t < end; t += run) {
            run = TD_MIN(P - t % P, end - t);
            uint8_t *page = td_kv_page(kv, r->layer0 + (int)l, pages[t / P - page0]) + (size_t)(t % P) * row;
            size_t off = 2 * side * l + (t - r->tok0) * row;
            for (int i = 0; i < 2 * kv->G; i++, page += P * row, off += head) {
                if (from) memcpy(page, from + off, run * row);
                else memcpy(payload + off, page, run * row);
            }
        }
    }
}

bool td_codec_gather(const td_kv *kv, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                     const td_rect *r, void *payload)
{
    if (!pages_ok(kv, pages, page0, n_pages, r)) return false;
    walk(kv, pages, page0, r, payload, NULL);
    return true;
}

bool td_codec_scatter(const td_kv *kv, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                      const td_rect *r, const void *payload)
{
    if (!pages_ok(kv, pages, page0, n_pages, r)) return false;
    walk(kv, pages, page0, r, NULL, payload);
    return true;
}
