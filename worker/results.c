// SPDX-License-Identifier: Apache-2.0
#include "worker/results.h"
#include "common/check.h"
#include "worker/devmem.h"
#include <stdlib.h>
#include <string.h>

static size_t bytes_of(const td_results *r, size_t cap)
{
    return (size_t)r->depth * cap * sizeof *r->res;
}

td_sample_out *td_results_at(const td_results *r, int i)
{
    return r->res + (size_t)i * r->cap;
}

static td_status arrays(const td_results *r, size_t cap, td_sample_out **res, td_sample_out **host)
{
    void *p;
    *host = NULL;
    TD_TRY(td_devmem_alloc(r->dev, bytes_of(r, cap), "results of draws", &p));
    *res = p;
    if (!r->dev) return TD_OK;
    td_status s = r->dev->alloc_host(r->dev, bytes_of(r, cap), &p);
    if (s < 0)
        td_devmem_free(r->dev, *res);
    else
        *host = p;
    return s;
}

static void free_arrays(td_results *r)
{
    td_devmem_free(r->dev, r->res);
    if (r->host) r->dev->free_host(r->dev, r->host);
}

td_status td_results_open(td_dev *dev, int depth, size_t cap, td_results *r)
{
    *r = (td_results){.dev = dev, .depth = depth, .cap = TD_MAX(cap, 1)};
    r->here = td_xalloc((size_t)depth * sizeof(td_event *));
    td_status s = arrays(r, r->cap, &r->res, &r->host);
    if (s >= 0 && dev) s = dev->event_open(dev, &r->drawn);
    for (int i = 0; i < depth && dev && s >= 0; i++) s = dev->event_open(dev, &r->here[i]);
    if (s < 0) td_results_close(r);
    return s;
}

void td_results_close(td_results *r)
{
    for (int s = TD_STREAM_COMPUTE; r->dev && s < TD_N_STREAMS; s++)
        (void)r->dev->sync(r->dev, (td_stream_kind)s); /* nothing writes any more */
    for (int i = 0; i < r->depth && r->here; i++)
        if (r->here[i]) r->dev->event_close(r->dev, r->here[i]);
    if (r->drawn) r->dev->event_close(r->dev, r->drawn);
    free_arrays(r);
    free(r->here);
    *r = (td_results){0};
}

/* Array by array into the larger ones: steps in flight keep theirs. */
static td_status move(td_results *r, size_t cap, td_sample_out *res, td_sample_out *host)
{
    size_t n = r->cap * sizeof *res;
    for (int i = 0; i < r->depth; i++) {
        td_sample_out *to = res + (size_t)i * cap;
        const td_sample_out *from = td_results_at(r, i);
        if (!r->dev) {
            memcpy(to, from, n);
            continue;
        }
        TD_TRY(r->dev->copy(r->dev, TD_STREAM_COMPUTE, to, from, n));
        memcpy(host + (size_t)i * cap, r->host + (size_t)i * r->cap, n);
    }
    return r->dev ? r->dev->sync(r->dev, TD_STREAM_COMPUTE) : TD_OK;
}

td_status td_results_room(td_results *r, size_t n)
{
    td_sample_out *res, *host;
    size_t cap = n + n / 2;
    if (n <= r->cap) return TD_OK;
    if (r->dev)
        TD_TRY(r->dev->sync(r->dev,
                            TD_STREAM_OUT)); /* what is on its way is there, and with it what it waited for */
    TD_TRY(arrays(r, cap, &res, &host));
    td_status s = move(r, cap, res, host);
    td_results old = *r;
    if (s < 0) {
        old.res = res, old.host = host;
    } else {
        r->res = res, r->host = host, r->cap = cap;
    }
    free_arrays(&old);
    return s;
}

td_status td_results_send(td_results *r, int i, size_t n)
{
    td_dev *d = r->dev;
    if (!d) return TD_OK;
    if (!n) return d->record(d, TD_STREAM_COMPUTE, r->here[i]);
    TD_TRY(d->record(d, TD_STREAM_COMPUTE, r->drawn));
    TD_TRY(d->wait(d, TD_STREAM_OUT, r->drawn));
    TD_TRY(d->download(d, TD_STREAM_OUT, r->host + (size_t)i * r->cap, td_results_at(r, i),
                       n * sizeof *r->host));
    return d->record(d, TD_STREAM_OUT, r->here[i]);
}

td_status td_results_fetch(td_results *r, int i, size_t n, void *out)
{
    if (r->dev) TD_TRY(r->dev->await(r->dev, r->here[i]));
    const td_sample_out *from = r->dev ? r->host + (size_t)i * r->cap : td_results_at(r, i);
    if (n) memcpy(out, from, n * sizeof *from);
    return TD_OK;
}
