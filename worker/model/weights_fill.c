// SPDX-License-Identifier: Apache-2.0
/* worker/model/weights_fill.c - packed bytes from the files or from random numbers. A matrix is packed in
 * strips of rows shared among the pool; a strip that lies in one part reads the map, one that crosses parts
 * is gathered first. */
#include "common/check.h"
#include "worker/model/weights.h"
#include <stdlib.h>

enum { STRIP_BYTES = 1 << 20, ROW_STEP = 32, RANDOM_ELEMENTS = 1 << 22 };

typedef struct fill_job {
    const td_plan *p;
    const td_piece *e;
    uint8_t *dst;
    int strip;             /* rows */
    const uint8_t *random; /* dummy: this many elements of e->from */
    size_t n_random;
    uint64_t salt;
} fill_job;

static size_t row_bytes(const td_piece *e)
{
    return (size_t)e->K * td_dtype_bytes(e->from);
}

/* ops->pack takes the whole matrix and packs rows [n0, n1) of it: give it an address such that those rows are
 * at `rows`. */
static void pack_rows(const fill_job *j, const void *rows, int n0, int n1)
{
    const td_piece *e = j->e;
    if (e->kind == TD_PIECE_TABLE) {
        memcpy(j->dst + (size_t)n0 * row_bytes(e), rows, (size_t)(n1 - n0) * row_bytes(e));
        return;
    }
    const void *base = (const void *)((uintptr_t)rows - (size_t)n0 * row_bytes(e));
    j->p->ops->pack(j->dst, base, e->from, e->N, e->K, n0, n1);
}

static void gather(const td_piece *e, int n0, int n1, uint8_t *out)
{
    int first = 0;
    for (int i = 0; i < e->n_parts; i++) {
        int a = TD_MAX(n0, first), b = TD_MIN(n1, first + e->part[i].rows);
        if (a < b)
            memcpy(out + (size_t)(a - n0) * row_bytes(e),
                   td_piece_data(e, i) + (size_t)(a - first) * row_bytes(e), (size_t)(b - a) * row_bytes(e));
        first += e->part[i].rows;
    }
}

/* The stored rows [n0, n1) if they are in one part and aligned for the kernels' loads; else NULL. */
static const uint8_t *stored_rows(const td_piece *e, int n0, int n1)
{
    int first = 0;
    for (int i = 0; i < e->n_parts; first += e->part[i++].rows) {
        if (n0 < first || n1 > first + e->part[i].rows) continue;
        const uint8_t *p = td_piece_data(e, i) + (size_t)(n0 - first) * row_bytes(e);
        return (uintptr_t)p % td_dtype_bytes(e->from) ? NULL : p;
    }
    return NULL;
}

static void fill_strip(void *arg, int i, int member)
{
    const fill_job *j = arg;
    const td_piece *e = j->e;
    (void)member;
    int n0 = i * j->strip, n1 = TD_MIN(n0 + j->strip, e->N);
    if (j->random) {
        size_t room = j->n_random - (size_t)(n1 - n0) * (size_t)e->K;
        size_t at = td_mix64(j->salt + (uint64_t)i) % (room + 1);
        pack_rows(j, j->random + at * td_dtype_bytes(e->from), n0, n1);
        return;
    }
    const uint8_t *rows = stored_rows(e, n0, n1);
    if (rows) {
        pack_rows(j, rows, n0, n1);
        return;
    }
    uint8_t *tmp = td_xalloc((size_t)(n1 - n0) * row_bytes(e));
    gather(e, n0, n1, tmp);
    pack_rows(j, tmp, n0, n1);
    free(tmp);
}

static int strip_rows(const td_piece *e)
{
    size_t rows = STRIP_BYTES / row_bytes(e) / ROW_STEP * ROW_STEP;
    return (int)TD_MIN(TD_MAX(rows, (size_t)ROW_STEP), (size_t)1 << 20);
}

static void fill_vector(const td_piece *e, bool dummy, uint8_t *dst)
{
    float *out = (float *)(void *)dst;
    for (int i = 0; i < e->N && dummy; i++) out[i] = e->dummy;
    for (int i = 0; i < e->n_parts && !dummy; out += e->part[i++].rows) {
        td_status st = td_st_read_f32(e->part[i].src, out, (size_t)e->part[i].rows);
        TD_CHECK(st == TD_OK); /* dtype and shape were checked by bind */
    }
}

/* Enough for the largest strip, and a multiple of 1024. */
static size_t random_elements(const td_plan *p)
{
    size_t n = RANDOM_ELEMENTS;
    for (size_t i = 0; i < p->n; i++) n = TD_MAX(n, (size_t)strip_rows(&p->piece[i]) * (size_t)p->piece[i].K);
    return (n + 1023) / 1024 * 1024;
}

/* Uniform with a standard deviation of 0.02, as the benchmark checkpoints have. */
static uint8_t *random_values(td_dtype t, size_t n)
{
    uint8_t *p = td_xalloc(n * td_dtype_bytes(t));
    float v[1024];
    for (size_t i = 0; i < n; i += 1024) {
        for (size_t k = 0; k < 1024; k++)
            v[k] = ((float)(td_mix64(i + k + 1) >> 40) * 0x1p-23f - 1.0f) * 0.0346f;
        td_convert(p + i * td_dtype_bytes(t), t, v, TD_F32, 1024);
    }
    return p;
}

/* Of a tensor of all experts only this one's part: the next expert is still to be read. */
static void drop_part(const td_piece *e, int k)
{
    const td_part *part = &e->part[k];
    td_safetensors_drop(td_piece_data(e, k), part->of ? (size_t)part->rows * row_bytes(e) : part->src->bytes);
}

void td_plan_fill(const td_plan *p, uint8_t *image, td_pool *pool, td_progress_fn *progress, void *arg)
{
    size_t n_random = p->files ? 0 : random_elements(p);
    uint8_t *random = p->files ? NULL : random_values(p->piece[0].from, n_random);
    size_t done = 0;
    for (size_t i = 0; i < p->n; i++) {
        const td_piece *e = &p->piece[i];
        if (e->bytes == 0) continue;
        if (e->kind == TD_PIECE_VECTOR)
            fill_vector(e, !p->files, image + e->offset);
        else {
            fill_job j = {p, e, image + e->offset, strip_rows(e), random, n_random, (uint64_t)i << 32};
            td_pool_for(pool, (e->N + j.strip - 1) / j.strip, fill_strip, &j);
        }
        for (int k = 0; k < e->n_parts && p->files; k++) drop_part(e, k);
        done += e->bytes;
        if (progress) progress(arg, "packing weights", (double)done / (double)p->image_bytes);
    }
    free(random);
}
