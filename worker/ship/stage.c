// SPDX-License-Identifier: Apache-2.0
#include "worker/ship/stage.h"
#include "common/check.h"
#include "common/crc.h"
#include "common/log.h"
#include <string.h>

static td_status slot_open(td_stage *s, td_stage_slot *k, bool host)
{
    td_dev *d = s->dev;
    TD_TRY(d->event_open(d, &k->done));
    TD_TRY(d->alloc(d, s->frame_bytes, &k->frame));
    return host ? d->alloc_host(d, s->frame_bytes, &k->host) : TD_OK;
}

static void slot_rows_free(td_dev *d, td_stage_slot *k)
{
    if (k->row) d->free_host(d, k->row);
    if (k->frame_row) d->free(d, k->frame_row);
    k->row = k->frame_row = NULL;
    k->n_row = 0;
}

static void slot_close(td_dev *d, td_stage_slot *k, bool host)
{
    slot_rows_free(d, k);
    if (host && k->host) d->free_host(d, k->host);
    if (k->frame) d->free(d, k->frame);
    if (k->done) d->event_close(d, k->done);
}

td_status td_stage_open(td_stage *s, td_dev *dev, size_t frame_bytes)
{
    td_status st = TD_OK;
    *s = (td_stage){.dev = dev, .frame_bytes = frame_bytes};
    if (!dev) return TD_OK;
    if (!dev->pack) return td_refuse(TD_ENOSUP, "pages of a device of kind %s", dev->kind);
    for (int i = 0; i < TD_STAGE_MARKS && st >= 0; i++) st = dev->event_open(dev, &s->mark[i]);
    for (int i = 0; i < TD_STAGE_OUT && st >= 0; i++) st = slot_open(s, &s->out[i], false);
    for (int i = 0; i < TD_STAGE_IN && st >= 0; i++) st = slot_open(s, &s->in[i], true);
    if (st < 0) td_stage_close(s);
    return st;
}

void td_stage_close(td_stage *s)
{
    td_dev *d = s->dev;
    if (d && (d->sync(d, TD_STREAM_OUT) < 0 || d->sync(d, TD_STREAM_IN) < 0)) TD_DEBUG_LOG("%s", td_reason());
    for (int i = 0; d && i < TD_STAGE_MARKS; i++)
        if (s->mark[i]) d->event_close(d, s->mark[i]);
    for (int i = 0; d && i < TD_STAGE_OUT; i++) slot_close(d, &s->out[i], false);
    for (int i = 0; d && i < TD_STAGE_IN; i++) slot_close(d, &s->in[i], true);
    *s = (td_stage){0};
}

td_status td_stage_mark(td_stage *s, uint32_t *mark)
{
    *mark = s->n_marks++ % TD_STAGE_MARKS;
    return s->dev ? s->dev->record(s->dev, TD_STREAM_COMPUTE, s->mark[*mark]) : TD_OK;
}

static td_status missing(const td_rect *r)
{
    return td_refuse(TD_EPROTO, "pages of tokens %u.. of group %u are not held", r->tok0, r->group);
}

static td_status rows_grow(td_stage *s, td_stage_slot *k, uint32_t n)
{
    td_dev *d = s->dev;
    void *host, *device;
    if (k->n_row >= n) return TD_OK;
    slot_rows_free(d, k);
    TD_TRY(d->alloc_host(d, n * sizeof *k->row, &host));
    k->row = host;
    TD_TRY(d->alloc(d, n * sizeof *k->row, &device));
    k->frame_row = device;
    k->n_row = n;
    return TD_OK;
}

/* Where the rectangle lies, sent along on the stream. */
static td_status place(td_stage *s, td_stage_slot *k, td_stream_kind stream, const td_stage_rect *x,
                       td_kv_rows *out)
{
    const td_codec_side *side = x->side;
    uint32_t n = td_codec_tokens(x->r, x->pick);
    TD_CHECK(td_codec_bytes(side->kv, x->r, x->pick) <= s->frame_bytes);
    TD_TRY(rows_grow(s, k, n));
    if (!td_codec_rows(side, x->pages, x->page0, x->n_pages, x->r, x->pick, k->row)) return missing(x->r);
    *out = (td_kv_rows){.kv = side->kv,
                        .row = k->frame_row,
                        .n_tok = n,
                        .slot0 = x->r->layer0 - side->slot0,
                        .n_slots = x->r->n_layers,
                        .head0 = x->r->head0 - side->head0,
                        .n_heads = x->r->n_heads};
    return s->dev->upload(s->dev, stream, k->frame_row, k->row, n * sizeof *k->row);
}

/* ---- out ---- */
static td_stage_slot *slot_of(const td_stage *s, const void *name)
{
    for (int i = 0; i < TD_STAGE_OUT; i++)
        if (s->out[i].name == name) return (td_stage_slot *)(uintptr_t)&s->out[i];
    return NULL;
}

uint32_t td_stage_room(const td_stage *s)
{
    uint32_t n = 0;
    for (int i = 0; i < TD_STAGE_OUT; i++) n += s->dev && !s->out[i].name;
    return n;
}

td_status td_stage_begin(td_stage *s, const td_stage_rect *x, void *payload)
{
    td_dev *d = s->dev;
    td_kv_rows rows;
    td_stage_slot *k = slot_of(s, NULL);
    if (!d) return TD_OK;
    if (!k) return TD_AGAIN;
    TD_TRY(place(s, k, TD_STREAM_OUT, x, &rows));
    TD_TRY(d->wait(d, TD_STREAM_OUT, s->mark[x->mark]));
    TD_TRY(d->pack(d, TD_STREAM_OUT, &rows, k->frame));
    TD_TRY(d->download(d, TD_STREAM_OUT, payload, k->frame, td_codec_bytes(x->side->kv, x->r, x->pick)));
    TD_TRY(d->record(d, TD_STREAM_OUT, k->done));
    k->name = x->name;
    k->host = payload;
    return TD_OK;
}

void *td_stage_begun(const td_stage *s, const void *name)
{
    const td_stage_slot *k = s->dev ? slot_of(s, name) : NULL;
    return k ? k->host : NULL;
}

void *td_stage_forget(td_stage *s, const void *name)
{
    td_stage_slot *k = s->dev ? slot_of(s, name) : NULL;
    if (!k) return NULL;
    if (s->dev->await(s->dev, k->done) < 0) TD_DEBUG_LOG("%s", td_reason());
    k->name = NULL;
    return k->host;
}

td_status td_stage_gather(td_stage *s, const td_stage_rect *x, void *payload, uint32_t *crc)
{
    if (!s->dev)
        return td_codec_gather(x->side, x->pages, x->page0, x->n_pages, x->r, x->pick, payload, crc)
                   ? TD_OK
                   : missing(x->r);
    if (!slot_of(s, x->name)) TD_TRY(td_stage_begin(s, x, payload));
    td_stage_slot *k = slot_of(s, x->name);
    if (!k) return TD_AGAIN;
    TD_CHECK(k->host == payload);
    k->name = NULL;
    TD_TRY(s->dev->await(s->dev, k->done));
    if (crc) *crc = td_crc32c(0, payload, td_codec_bytes(x->side->kv, x->r, x->pick));
    return TD_OK;
}

/* ---- in ---- */
td_status td_stage_scatter(td_stage *s, const td_stage_rect *x, const void *payload, uint32_t *crc)
{
    td_dev *d = s->dev;
    td_kv_rows rows;
    if (!d)
        return td_codec_scatter(x->side, x->pages, x->page0, x->n_pages, x->r, x->pick, payload, crc)
                   ? TD_OK
                   : missing(x->r);
    td_stage_slot *k = &s->in[s->n_in % TD_STAGE_IN];
    size_t bytes = td_codec_bytes(x->side->kv, x->r, x->pick);
    if (s->n_in >= TD_STAGE_IN) TD_TRY(d->await(d, k->done)); /* what the slot held is in its pages */
    TD_TRY(place(s, k, TD_STREAM_IN, x, &rows));
    memcpy(k->host, payload, bytes);
    if (crc) *crc = td_crc32c(0, k->host, bytes);
    s->writing = true;
    TD_TRY(d->upload(d, TD_STREAM_IN, k->frame, k->host, bytes));
    TD_TRY(d->unpack(d, TD_STREAM_IN, &rows, k->frame));
    TD_TRY(d->record(d, TD_STREAM_IN, k->done));
    s->n_in++;
    return TD_OK;
}

td_status td_stage_flush(td_stage *s)
{
    if (!s->writing) return TD_OK;
    s->writing = false;
    return s->dev->sync(s->dev, TD_STREAM_IN);
}
