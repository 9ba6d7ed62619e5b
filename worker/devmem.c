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

/* ---- posts ---- */

td_status td_devmem_post_open(td_dev *dev, td_stream_kind stream, size_t bytes, td_devmem_post *p)
{
    void *host;
    TD_TRY(dev->alloc_host(dev, bytes, &host));
    *p = (td_devmem_post){.host = host, .bytes = bytes, .stream = stream};
    TD_TRY(dev->event_open(dev, &p->sent));
    return dev->record(dev, stream, p->sent);
}

void td_devmem_post_close(td_dev *dev, td_devmem_post *p)
{
    if (p->host) dev->free_host(dev, p->host);
    if (p->sent) dev->event_close(dev, p->sent);
    *p = (td_devmem_post){0};
}

td_status td_devmem_post_wait(td_dev *dev, const td_devmem_post *p)
{
    td_status s = p->sent ? TD_AGAIN : TD_OK;
    while (s == TD_AGAIN) s = dev->done(dev, p->sent);
    return s;
}

td_status td_devmem_post_send(td_dev *dev, void *dst, const td_devmem_post *p, size_t bytes)
{
    TD_TRY(dev->upload(dev, p->stream, dst, p->host, bytes));
    return dev->record(dev, p->stream, p->sent);
}

/* ---- staged ---- */

enum { STAGE_BYTES = 16 << 20, COPY_BYTES = 1 << 20 };

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

/* Transfers in turn. */
static td_status send_all(td_dev *d, td_pool *pool, td_devmem_post *two, uint8_t *dst, const uint8_t *src, size_t bytes,
                          void (*progress)(void *, const char *, double), void *arg)
{
    for (size_t at = 0, i = 0; at < bytes; at += STAGE_BYTES, i++) {
        td_devmem_post *b = &two[i % 2];
        copy c = {b->host, src + at, TD_MIN(bytes - at, (size_t)STAGE_BYTES)};
        TD_TRY(td_devmem_post_wait(d, b));
        td_pool_for(pool, (int)((c.bytes + COPY_BYTES - 1) / COPY_BYTES), copy_part, &c);
        TD_TRY(td_devmem_post_send(d, dst + at, b, c.bytes));
        if (progress) progress(arg, "upload", (double)(at + c.bytes) / (double)bytes);
    }
    return d->sync(d, TD_STREAM_IN);
}

td_status td_devmem_put_staged(td_dev *dev, td_pool *pool, void *dst, const void *host, size_t bytes,
                               void (*progress)(void *, const char *, double), void *arg)
{
    td_devmem_post two[2] = {{0}};
    td_status st = td_devmem_post_open(dev, TD_STREAM_IN, STAGE_BYTES, &two[0]);
    if (st == TD_OK) st = td_devmem_post_open(dev, TD_STREAM_IN, STAGE_BYTES, &two[1]);
    if (st == TD_OK) st = send_all(dev, pool, two, dst, host, bytes, progress, arg);
    if (st < 0) (void)dev->sync(dev, TD_STREAM_IN); /* nothing may still read the buffers */
    for (int i = 0; i < 2; i++) td_devmem_post_close(dev, &two[i]);
    return st;
}
