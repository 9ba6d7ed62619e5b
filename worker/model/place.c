// SPDX-License-Identifier: Apache-2.0
#include "worker/model/place.h"
#include "common/check.h"
#include "worker/model/model_int.h"
#include "worker/model/shard.h"
#include <string.h>

/* Of all rows. */
static void on_host(const td_model *m, const float *cs, const float *q_scale, td_placed *out)
{
    const td_share *s = &m->share;
    *out = (td_placed){.ids = s->local_ids, .want = s->want, .q_scale = q_scale, .cs = cs};
    for (int g = 0; g < m->desc.n_groups; g++) {
        size_t at = (size_t)g * (size_t)m->max_rows;
        out->page[g] = s->page + at;
        out->in_page[g] = s->in_page + at;
    }
}

/* From the first row of all to the first own one. */
static void to_own(const td_model *m, td_placed *x)
{
    size_t own0 = (size_t)m->share.own0;
    x->cs += own0 * (size_t)m->desc.rope.rot_dim;
    for (int g = 0; g < m->desc.n_groups; g++) x->page[g] += own0, x->in_page[g] += own0;
}

/* ---- blocks ---- */

static void block_close(td_dev *d, td_place_block *b)
{
    td_devmem_post_close(d, &b->post);
    if (b->device) d->free(d, b->device);
    b->device = NULL;
}

static td_status block_open(td_dev *d, size_t bytes, td_place_block *b)
{
    void *p;
    TD_TRY(d->alloc(d, bytes, &p));
    b->device = p;
    return td_devmem_post_open(d, TD_STREAM_COMPUTE, bytes, &b->post);
}

/* The other block of two, free to be written. */
static td_status next_block(td_dev *d, td_place_block *two, int *turn, size_t bytes, td_place_block **out)
{
    td_place_block *b = *out = &two[*turn ^= 1];
    TD_TRY(td_devmem_post_wait(d, &b->post));
    if (b->post.bytes >= bytes) return TD_OK;
    TD_TRY(d->sync(d, TD_STREAM_COMPUTE)); /* kernels may still read the device's part */
    block_close(d, b);
    return block_open(d, bytes + bytes / 2, b);
}

/* ---- a step ---- */

/* `src` becomes the block's copy; counted only while there is no block. */
static void *put(td_place_block *b, size_t *at, const void *src, size_t bytes)
{
    void *there = (void *)(uintptr_t)src;
    if (!src) return NULL;
    if (b) {
        if (bytes) memcpy(b->post.host + *at, src, bytes);
        there = b->device + *at;
    }
    *at += td_devmem_padded(bytes);
    return there;
}

/* n rows of all, own ones, wanted ones */
static size_t put_all(const td_model *m, td_place_block *b, size_t n, size_t own, size_t n_want, td_placed *x)
{
    size_t at = 0;
    x->ids = put(b, &at, x->ids, own * sizeof *x->ids);
    x->want = put(b, &at, x->want, n_want * sizeof *x->want);
    for (int g = 0; g < m->desc.n_groups; g++) {
        x->page[g] = put(b, &at, x->page[g], n * sizeof(int32_t));
        x->in_page[g] = put(b, &at, x->in_page[g], n * sizeof(int32_t));
    }
    x->cs = put(b, &at, x->cs, n * (size_t)m->desc.rope.rot_dim * sizeof *x->cs);
    x->q_scale = put(b, &at, x->q_scale, own * sizeof *x->q_scale);
    return at;
}

td_status td_place_step(td_model *m, const float *cs, const float *q_scale, td_placed *out)
{
    td_place *p = &m->place;
    td_place_block *b;
    on_host(m, cs, q_scale, out);
    const td_share *s = &m->share;
    if (p->dev) {
        size_t n = (size_t)s->T, own = (size_t)s->n_own, n_want = (size_t)s->n_want;
        size_t bytes = put_all(m, NULL, n, own, n_want, out);
        TD_TRY(next_block(p->dev, p->step, &p->turn, bytes, &b));
        put_all(m, b, n, own, n_want, out);
        TD_TRY(td_devmem_post_send(p->dev, b->device, &b->post, bytes));
    }
    to_own(m, out);
    return TD_OK;
}

td_status td_place_put(td_model *m, const void *src, size_t bytes, const void **out)
{
    td_place *p = &m->place;
    td_place_block *b;
    *out = src;
    if (!p->dev) return TD_OK;
    TD_TRY(next_block(p->dev, p->more, &p->more_turn, TD_MAX(bytes, (size_t)TD_DEVMEM_PART), &b));
    if (bytes) memcpy(b->post.host, src, bytes);
    *out = b->device;
    return td_devmem_post_send(p->dev, b->device, &b->post, bytes);
}

td_status td_place_open(td_model *m)
{
    td_placed most;
    size_t rows = (size_t)m->max_rows;
    if (!m->place.dev) return TD_OK;
    on_host(m, m->scratch.cs, m->scratch.q_scale, &most);
    size_t bytes = put_all(m, NULL, rows, rows, rows, &most);
    size_t more = TD_MAX(TD_MAX(td_model_tp(m) > 1 ? rows : 0, td_shard_numbers(m)), td_moe_numbers(m)) * sizeof(int32_t);
    for (int i = 0; i < 2; i++) {
        TD_TRY(block_open(m->place.dev, bytes, &m->place.step[i]));
        if (more) TD_TRY(block_open(m->place.dev, TD_MAX(more, (size_t)TD_DEVMEM_PART), &m->place.more[i]));
    }
    return TD_OK;
}

void td_place_close(td_place *p)
{
    for (int i = 0; i < 2 && p->dev; i++) {
        block_close(p->dev, &p->step[i]);
        block_close(p->dev, &p->more[i]);
    }
}
