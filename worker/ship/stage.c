// SPDX-License-Identifier: Apache-2.0
#include "worker/ship/stage.h"
#include "common/check.h"
#include <stdlib.h>

td_status td_stage_open(td_stage *s, td_dev *dev)
{
    *s = (td_stage){.dev = dev};
    return dev ? dev->event_open(dev, &s->event) : TD_OK;
}

void td_stage_close(td_stage *s)
{
    if (s->room) s->dev->free_host(s->dev, s->room);
    if (s->event) s->dev->event_close(s->dev, s->event);
    free(s->page);
    *s = (td_stage){0};
}

/* The rectangle's own slots and pages, as they lie in the room: page j of n, slot after slot. */
typedef struct window {
    td_kv kv;
    td_codec_side side;
    const td_codec_side *from;
    const td_rect *r;
    uint32_t first; /* page of the side's table that is page 0 here */
    uint32_t n;
} window;

static td_status missing(const td_rect *r)
{
    return td_refuse(TD_EPROTO, "pages of tokens %u.. of group %u are not held", r->tok0, r->group);
}

static td_status grow(td_stage *s, size_t bytes, uint32_t n)
{
    if (s->n_page < n) {
        s->n_page = n;
        s->page = td_xrealloc(s->page, n * sizeof *s->page);
    }
    if (s->bytes >= bytes) return TD_OK;
    void *p;
    if (s->room) s->dev->free_host(s->dev, s->room);
    s->room = NULL, s->bytes = 0;
    TD_TRY(s->dev->alloc_host(s->dev, bytes, &p));
    s->room = p, s->bytes = bytes;
    return TD_OK;
}

/* Pages that are not held become -1 in the staged table: then the codec refuses the rectangle if it needs them. */
static td_status window_open(td_stage *s, const td_codec_side *side, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                             const td_rect *r, window *w)
{
    uint32_t P = (uint32_t)side->kv->P, a = td_token_before(&side->tokens, r->tok0),
             b = td_token_before(&side->tokens, r->tok0 + r->n_tok);
    if (!r->n_tok || a >= b || r->layer0 < side->slot0 || r->layer0 + r->n_layers > side->slot0 + side->n_slots)
        return missing(r);
    *w = (window){.kv = *side->kv, .side = *side, .from = side, .r = r, .first = a / P, .n = (b + P - 1) / P - a / P};
    TD_TRY(grow(s, td_kv_page_bytes(side->kv) * w->n * r->n_layers, w->n));
    w->kv.base = s->room;
    w->kv.n_pages = (int)w->n;
    w->side.kv = &w->kv;
    w->side.slot0 = r->layer0;
    w->side.n_slots = r->n_layers;
    for (uint32_t j = 0; j < w->n; j++) {
        bool held = w->first + j >= page0 && w->first + j - page0 < n_pages;
        int32_t page = held ? pages[w->first + j - page0] : -1;
        s->page[j] = page < 0 || page >= side->kv->n_pages ? -1 : (int32_t)j;
    }
    return TD_OK;
}

/* Each page of the window between the room and the device. */
static td_status move(td_stage *s, const window *w, const int32_t *pages, uint32_t page0, bool to_device)
{
    td_dev *d = s->dev;
    td_stream_kind stream = to_device ? TD_STREAM_IN : TD_STREAM_OUT;
    size_t bytes = td_kv_page_bytes(&w->kv);
    for (int l = 0; l < w->r->n_layers; l++)
        for (uint32_t j = 0; j < w->n; j++) {
            if (s->page[j] < 0) continue;
            uint8_t *here = td_kv_page(&w->kv, l, (int)j);
            uint8_t *there = td_kv_page(w->from->kv, w->r->layer0 - w->from->slot0 + l, pages[w->first + j - page0]);
            TD_TRY(to_device ? d->upload(d, stream, there, here, bytes) : d->download(d, stream, here, there, bytes));
        }
    return d->sync(d, stream);
}

static td_status load(td_stage *s, const td_codec_side *side, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                      const td_rect *r, window *w)
{
    TD_TRY(window_open(s, side, pages, page0, n_pages, r, w));
    TD_TRY(s->dev->record(s->dev, TD_STREAM_COMPUTE, s->event));
    TD_TRY(s->dev->wait(s->dev, TD_STREAM_OUT, s->event));
    return move(s, w, pages, page0, false);
}

td_status td_stage_gather(td_stage *s, const td_codec_side *side, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                          const td_rect *r, const td_token_set *pick, void *payload, uint32_t *crc)
{
    window w;
    if (!s->dev) return td_codec_gather(side, pages, page0, n_pages, r, pick, payload, crc) ? TD_OK : missing(r);
    TD_TRY(load(s, side, pages, page0, n_pages, r, &w));
    return td_codec_gather(&w.side, s->page, w.first, w.n, r, pick, payload, crc) ? TD_OK : missing(r);
}

/* What is beside the rectangle in its pages stays: they come here first. */
td_status td_stage_scatter(td_stage *s, const td_codec_side *side, const int32_t *pages, uint32_t page0, uint32_t n_pages,
                           const td_rect *r, const td_token_set *pick, const void *payload, uint32_t *crc)
{
    window w;
    if (!s->dev) return td_codec_scatter(side, pages, page0, n_pages, r, pick, payload, crc) ? TD_OK : missing(r);
    TD_TRY(load(s, side, pages, page0, n_pages, r, &w));
    if (!td_codec_scatter(&w.side, s->page, w.first, w.n, r, pick, payload, crc)) return missing(r);
    return move(s, &w, pages, page0, true);
}
