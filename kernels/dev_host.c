// SPDX-License-Identifier: Apache-2.0
/* kernels/dev_host.c - the host as a device: malloc and memcpy, every call done on return; and the opening of
 * either kind. */
#include "common/check.h"
#include "common/clock.h"
#include "kernels/dev.h"
#include <stdlib.h>
#include <string.h>

enum { ALIGN = 256 };

struct td_event {
    int64_t at_us;
};

static td_status host_alloc(td_dev *d, size_t bytes, void **out)
{
    (void)d;
    void *p = bytes > SIZE_MAX - ALIGN ? NULL : aligned_alloc(ALIGN, (bytes + ALIGN) / ALIGN * ALIGN);
    if (!p) return td_fail(TD_EFULL, "out of memory: %zu bytes", bytes);
    *out = p;
    return TD_OK;
}

static void host_free(td_dev *d, void *p)
{
    (void)d;
    free(p);
}

static td_status host_free_bytes(td_dev *d, size_t *out)
{
    (void)d;
    *out = SIZE_MAX;
    return TD_OK;
}

static td_status host_copy(td_dev *d, td_stream_kind s, void *dst, const void *src, size_t bytes)
{
    (void)d;
    (void)s;
    if (bytes) memmove(dst, src, bytes);
    return TD_OK;
}

static td_status host_fill(td_dev *d, td_stream_kind s, void *dst, int byte, size_t bytes)
{
    (void)d;
    (void)s;
    if (bytes) memset(dst, byte, bytes);
    return TD_OK;
}

static td_status host_event_open(td_dev *d, td_event **out)
{
    (void)d;
    *out = td_xalloc(sizeof **out);
    return TD_OK;
}

static void host_event_close(td_dev *d, td_event *e)
{
    (void)d;
    free(e);
}

static td_status host_record(td_dev *d, td_stream_kind s, td_event *e)
{
    (void)d;
    (void)s;
    e->at_us = td_now_us();
    return TD_OK;
}

static td_status host_wait(td_dev *d, td_stream_kind s, td_event *e)
{
    (void)d;
    (void)s;
    (void)e;
    return TD_OK;
}

static td_status host_await(td_dev *d, td_event *e)
{
    (void)d;
    (void)e;
    return TD_OK;
}

static td_status host_elapsed(td_dev *d, td_event *from, td_event *to, double *us)
{
    (void)d;
    *us = (double)(to->at_us - from->at_us);
    return TD_OK;
}

static td_status host_sync(td_dev *d, td_stream_kind s)
{
    (void)d;
    (void)s;
    return TD_OK;
}

static void host_close(td_dev *d)
{
    free(d);
}

static const td_dev host_table = {.kind = "host",
                                  .name = "host memory",
                                  .alloc = host_alloc,
                                  .free = host_free,
                                  .alloc_host = host_alloc,
                                  .free_host = host_free,
                                  .free_bytes = host_free_bytes,
                                  .upload = host_copy,
                                  .download = host_copy,
                                  .copy = host_copy,
                                  .fill = host_fill,
                                  .event_open = host_event_open,
                                  .event_close = host_event_close,
                                  .record = host_record,
                                  .wait = host_wait,
                                  .elapsed_us = host_elapsed,
                                  .await = host_await,
                                  .sync = host_sync,
                                  .close = host_close};

static td_status open_host(td_dev **out)
{
    td_dev *d = td_xalloc(sizeof *d);
    *d = host_table;
    *out = d;
    return TD_OK;
}

td_status td_dev_open(const char *kind, int index, td_dev **out)
{
    if (!strcmp(kind, "host")) return open_host(out);
    if (!strcmp(kind, "cuda")) return td_dev_open_cuda(index, out);
    if (!strcmp(kind, "auto")) return td_dev_open_cuda(index, out) == TD_OK ? TD_OK : open_host(out);
    return td_fail(TD_EBADREQ, "device \"%s\": expected host, cuda or auto", kind);
}

void td_dev_close(td_dev *d)
{
    if (d) d->close(d);
}
