// SPDX-License-Identifier: Apache-2.0
/* worker/coll/coll_staged.c - buffers of a device's memory over a group that moves host memory: what is sent
 * comes to page-locked memory first, what is received goes to the device from there.
 *
 * A lane has one block of page-locked memory, its parts one after the other; what goes to several peers is there
 * once. start waits for the device (the bytes to send must exist), once, and never for a peer; wait queues the
 * upload and returns: kernels queued after it see the bytes. The block is written again only after the device
 * has passed that upload: by the device itself in the order of its queue, by peers after start's wait. */
#include "common/check.h"
#include "kernels/dev.h"
#include "worker/coll/coll_int.h"
#include <stdlib.h>

typedef struct stage {
    char *host;
    size_t bytes;
    bool uploads; /* may still read it */
} stage;

typedef struct end {
    td_coll base;
    td_coll *inner; /* a group of its own: its lanes are this one's */
    td_dev *dev;
    stage stage[TD_COLL_LANES];
} end;

static size_t padded(size_t n)
{
    return (n + 63) / 64 * 64;
}

static td_status room(end *e, stage *s, size_t bytes)
{
    void *p;
    if (s->bytes >= bytes) return TD_OK;
    if (s->host) e->dev->free_host(e->dev, s->host);
    *s = (stage){0};
    TD_TRY(e->dev->alloc_host(e->dev, bytes, &p));
    *s = (stage){.host = p, .bytes = bytes};
    return TD_OK;
}

/* Part i is the one before it again, to another peer (all-gather). */
static bool again(const td_coll_part *send, int i)
{
    return i > 0 && send[i].from == send[i - 1].from && send[i].bytes == send[i - 1].bytes;
}

static size_t bytes_of(const td_coll_lane *l)
{
    size_t bytes = 0;
    for (int i = 0; i < l->n_send; i++) bytes += again(l->send, i) ? 0 : padded(l->send[i].bytes);
    for (int i = 0; i < l->n_recv; i++) bytes += padded(l->recv[i].bytes);
    return bytes;
}

static td_status end_start(td_coll *c, int lane)
{
    end *e = (end *)c;
    td_coll_lane *l = &c->lane[lane], *in = &e->inner->lane[lane];
    stage *s = &e->stage[lane];
    td_dev *d = e->dev;
    size_t bytes = bytes_of(l);
    if (s->uploads && (!l->n_send || s->bytes < bytes)) TD_TRY(d->sync(d, TD_STREAM_COMPUTE));
    s->uploads = false;
    TD_TRY(room(e, s, bytes));
    e->inner->timeout_us = c->timeout_us;
    in->channel = l->channel, in->kind = l->kind, in->n_send = l->n_send, in->n_recv = l->n_recv;
    char *at = s->host;
    for (int i = 0; i < l->n_send; i++) {
        bool there = again(l->send, i);
        in->send[i] = (td_coll_part){.peer = l->send[i].peer, .bytes = l->send[i].bytes, .from = there ? in->send[i - 1].from : at};
        if (there) continue;
        TD_TRY(d->download(d, TD_STREAM_COMPUTE, at, l->send[i].from, l->send[i].bytes));
        at += padded(l->send[i].bytes);
    }
    for (int i = 0; i < l->n_recv; at += padded(l->recv[i++].bytes))
        in->recv[i] = (td_coll_part){.peer = l->recv[i].peer, .bytes = l->recv[i].bytes, .to = at};
    if (l->n_send) TD_TRY(d->sync(d, TD_STREAM_COMPUTE));
    TD_TRY(e->inner->ops->start(e->inner, lane));
    in->busy = true;
    return TD_OK;
}

static td_status end_wait(td_coll *c, int lane)
{
    end *e = (end *)c;
    td_coll_lane *l = &c->lane[lane], *in = &e->inner->lane[lane];
    td_dev *d = e->dev;
    td_status s = e->inner->ops->wait(e->inner, lane);
    in->busy = false;
    for (int i = 0; i < l->n_recv && s >= 0; i++) {
        s = d->upload(d, TD_STREAM_COMPUTE, l->recv[i].to, in->recv[i].to, l->recv[i].bytes);
        e->stage[lane].uploads = true;
    }
    return s;
}

static td_status end_copy(td_coll *c, void *to, const void *from, size_t bytes)
{
    td_dev *d = ((end *)c)->dev;
    return d->copy(d, TD_STREAM_COMPUTE, to, from, bytes);
}

/* As of NCCL: the device's own work before it is done too. */
static td_status end_barrier(td_coll *c)
{
    end *e = (end *)c;
    TD_TRY(e->dev->sync(e->dev, TD_STREAM_COMPUTE));
    e->inner->timeout_us = c->timeout_us;
    return td_coll_barrier(e->inner);
}

static td_status end_health(td_coll *c)
{
    return ((end *)c)->inner->ops->health(((end *)c)->inner);
}
static td_status end_poke(td_coll *c)
{
    return td_coll_poke(((end *)c)->inner);
}
static void end_abort(td_coll *c, const char *why)
{
    td_coll_abort(((end *)c)->inner, why);
}

static void end_close(td_coll *c)
{
    end *e = (end *)c;
    (void)e->dev->sync(e->dev, TD_STREAM_COMPUTE); /* uploads */
    td_coll_close(e->inner);                       /* before its buffers go */
    for (int i = 0; i < TD_COLL_LANES; i++)
        if (e->stage[i].host) e->dev->free_host(e->dev, e->stage[i].host);
    td_coll_deinit(c);
    free(e);
}

static td_status end_split(td_coll *c, int color, int key, td_coll **out);

static const td_coll_ops staged_ops = {
    .name = "staged",
    .start = end_start,
    .wait = end_wait,
    .health = end_health,
    .copy = end_copy,
    .split = end_split,
    .close = end_close,
    .abort = end_abort,
    .poke = end_poke,
    .barrier = end_barrier,
};

static td_coll *end_open(td_coll *inner, td_dev *dev)
{
    end *e = td_xalloc(sizeof *e);
    td_coll_init(&e->base, &staged_ops, td_coll_rank(inner), td_coll_size(inner));
    e->inner = inner;
    e->dev = dev;
    e->base.timeout_us = inner->timeout_us;
    return &e->base;
}

static td_status end_split(td_coll *c, int color, int key, td_coll **out)
{
    end *e = (end *)c;
    td_coll *inner;
    e->inner->timeout_us = c->timeout_us;
    TD_TRY(td_coll_split(e->inner, color, key, &inner));
    *out = inner ? end_open(inner, e->dev) : NULL;
    return TD_OK;
}

td_status td_coll_staged_open(td_coll *host, td_dev *dev, td_coll **out)
{
    td_coll *inner;
    TD_TRY(td_coll_split(host, 0, td_coll_rank(host), &inner));
    *out = end_open(inner, dev);
    return TD_OK;
}
