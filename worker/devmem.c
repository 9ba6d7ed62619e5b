// SPDX-License-Identifier: Apache-2.0
#include "worker/devmem.h"
#include "common/check.h"
#include <stdlib.h>
#include <string.h>

td_status td_devmem_alloc(td_dev *dev, size_t bytes, const char *what, void **out)
{
    if (dev) return dev->alloc(dev, bytes, out);
    void *p = bytes > SIZE_MAX - 64 ? NULL : aligned_alloc(64, (bytes + 64) / 64 * 64);
    if (!p) return td_fail(TD_EFULL, "no memory for %s: %zu bytes", what, bytes);
    *out = p;
    return TD_OK;
}

void td_devmem_free(td_dev *dev, void *p)
{
    if (p && dev) dev->free(dev, p);
    else free(p);
}

td_status td_devmem_fetch(td_dev *dev, void *host, const void *src, size_t bytes)
{
    if (dev) {
        TD_TRY(dev->download(dev, TD_STREAM_COMPUTE, host, src, bytes));
        return dev->sync(dev, TD_STREAM_COMPUTE);
    }
    if (bytes) memcpy(host, src, bytes);
    return TD_OK;
}

td_status td_devmem_put(td_dev *dev, void *dst, const void *host, size_t bytes)
{
    if (dev) {
        TD_TRY(dev->upload(dev, TD_STREAM_COMPUTE, dst, host, bytes));
        return dev->sync(dev, TD_STREAM_COMPUTE);
    }
    if (bytes) memcpy(dst, host, bytes);
    return TD_OK;
}

/* ---- staged ---- */

enum { STAGE_BYTES = 16 << 20, COPY_BYTES = 1 << 20 };

typedef struct stage {
    void *p;
    td_event *gone; /* its last transfer */
} stage;

typedef struct copy {
    uint8_t *to;
    const uint8_t *from;
    size_t bytes;
} copy;

static void copy_part(void *arg, int i, int member)
{
    const copy *c = arg;
    size_t at = (size_t)i * COPY_BYTES;
    (void)member;
    memcpy(c->to + at, c->from + at, TD_MIN(c->bytes - at, (size_t)COPY_BYTES));
}

static td_status stage_open(td_dev *d, stage *s)
{
    TD_TRY(d->alloc_host(d, STAGE_BYTES, &s->p));
    return d->event_open(d, &s->gone);
}

static void stage_close(td_dev *d, stage *s)
{
    if (s->p) d->free_host(d, s->p);
    if (s->gone) d->event_close(d, s->gone);
}

/* Transfers in turn; a buffer is filled once its last transfer is over. */
static td_status send_all(td_dev *d, td_pool *pool, stage *s, uint8_t *dst, const uint8_t *src, size_t bytes,
                          void (*progress)(void *, const char *, double), void *arg)
{
    for (size_t at = 0, i = 0; at < bytes; at += STAGE_BYTES, i++) {
        stage *b = &s[i % 2];
        copy c = {b->p, src + at, TD_MIN(bytes - at, (size_t)STAGE_BYTES)};
        if (i >= 2) TD_TRY(d->await(d, b->gone));
        td_pool_for(pool, (int)((c.bytes + COPY_BYTES - 1) / COPY_BYTES), copy_part, &c);
        TD_TRY(d->upload(d, TD_STREAM_IN, dst + at, b->p, c.bytes));
        TD_TRY(d->record(d, TD_STREAM_IN, b->gone));
        if (progress) progress(arg, "upload", (double)(at + c.bytes) / (double)bytes);
    }
    return d->sync(d, TD_STREAM_IN);
}

td_status td_devmem_put_staged(td_dev *dev, td_pool *pool, void *dst, const void *host, size_t bytes,
                               void (*progress)(void *, const char *, double), void *arg)
{
    stage s[2] = {{0}};
    td_status st = stage_open(dev, &s[0]);
    if (st == TD_OK) st = stage_open(dev, &s[1]);
    if (st == TD_OK) st = send_all(dev, pool, s, dst, host, bytes, progress, arg);
    if (st < 0) (void)dev->sync(dev, TD_STREAM_IN); /* nothing may still read the buffers */
    for (int i = 0; i < 2; i++) stage_close(dev, &s[i]);
    return st;
}
