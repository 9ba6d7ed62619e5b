// SPDX-License-Identifier: Apache-2.0
/* worker/model/weights_fill.c - packed bytes from the files or from random numbers. A matrix is packed in
 * strips of rows shared among the pool; a strip that lies in one part reads the map, one that crosses parts
 * is gathered first. */
#include "common/check.h"
#include "worker/model/fp8.h"
#include <stdlib.h>

enum { STRIP_BYTES = 1 << 20, ROW_STEP = 32, RANDOM_ELEMENTS = 1 << 22 };

typedef struct fill_job {
    const td_plan *p;
    const td_piece *e;
    uint8_t *dst;
    int strip;             /* rows */
    const uint8_t *random; /* dummy: this many elements of e->from */
    size_t n_random;
} fill_job;

static size_t row_bytes(const td_piece *e)
{
    return (size_t)e->K * td_dtype_bytes(e->from);
}

/* ops->pack takes the whole matrix and packs rows [n0, n1) of it: give it an address such that those rows are
 * at `rows`. */
static void pack(const fill_job *j, const void *rows, td_dtype from, int n0, int n1)
{
    const td_piece *e = j->e;
    const void *base = (const void *)((uintptr_t)rows - (size_t)n0 * (size_t)e->K * td_dtype_bytes(from));
    j->p->ops->pack(j->dst, base, from, e->N, e->K, e->slices, n0, n1);
}

/* FP8 codes for kernels that do not take them: times their scales. */
static void pack_products(const fill_job *j, const uint8_t *codes, int n0, int n1)
{
    const td_piece *e = j->e;
    float *v = td_xalloc((size_t)(n1 - n0) * (size_t)e->K * sizeof *v);
    td_fp8_multiply(e, j->p->desc->fp8.kind, codes, n0, n1, v);
    pack(j, v, TD_F32, n0, n1);
    free(v);
}

static void pack_rows(const fill_job *j, const void *rows, int n0, int n1)
{
    const td_piece *e = j->e;
    if (e->kind == TD_PIECE_TABLE) memcpy(j->dst + (size_t)n0 * row_bytes(e), rows, (size_t)(n1 - n0) * row_bytes(e));
    else if (e->from == TD_E4M3 && e->to != TD_E4M3) pack_products(j, rows, n0, n1);
    else pack(j, rows, e->from, n0, n1);
}

/* Rows [a, b) from `from`, whose rows lie src_K apart. */
static void copy_rows(const td_piece *e, const uint8_t *from, int a, int b, uint8_t *to)
{
    size_t pitch = (size_t)e->src_K * td_dtype_bytes(e->from), n = row_bytes(e);
    if (pitch == n) {
        memcpy(to, from + (size_t)a * n, (size_t)(b - a) * n);
        return;
    }
    for (int i = a; i < b; i++, to += n) memcpy(to, from + (size_t)i * pitch, n);
}

/* A dummy's rows: each begins at a place of its own in the random values. */
static void gather_random(const fill_job *j, int n0, int n1, uint8_t *out)
{
    const td_piece *e = j->e;
    size_t unit = td_dtype_bytes(e->from), room = j->n_random - (size_t)e->src_K;
    int first = 0;
    for (int i = 0; i < e->n_parts; first += e->part[i++].rows) {
        const td_part *p = &e->part[i];
        uint64_t salt = (uint64_t)p->index;
        for (const char *c = p->name; *c; c++) salt = td_mix64(salt ^ (uint64_t)(unsigned char)*c);
        for (int r = TD_MAX(n0, first); r < TD_MIN(n1, first + p->rows); r++) {
            uint64_t row = td_mix64(salt ^ td_mix64((uint64_t)(p->row0 + r - first) + 1));
            memcpy(out + (size_t)(r - n0) * row_bytes(e), j->random + (row % (room + 1) + (size_t)e->k0) * unit, row_bytes(e));
        }
    }
}

static void gather(const td_piece *e, int n0, int n1, uint8_t *out)
{
    int first = 0;
    for (int i = 0; i < e->n_parts; i++) {
        int a = TD_MAX(n0, first), b = TD_MIN(n1, first + e->part[i].rows);
        if (a < b)
            copy_rows(e, td_piece_data(e, i), a - first, b - first, out + (size_t)(a - n0) * row_bytes(e));
        first += e->part[i].rows;
    }
}

/* The stored rows [n0, n1) if they are in one part and aligned for the kernels' loads; else NULL. */
static const uint8_t *stored_rows(const td_piece *e, int n0, int n1)
{
    int first = 0;
    if (e->K != e->src_K) return NULL;
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
    const uint8_t *rows = j->random ? NULL : stored_rows(e, n0, n1);
    if (rows) {
        pack_rows(j, rows, n0, n1);
        return;
    }
    uint8_t *tmp = td_xalloc((size_t)(n1 - n0) * row_bytes(e));
    if (j->random) gather_random(j, n0, n1, tmp);
    else gather(e, n0, n1, tmp);
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
        const td_part *part = &e->part[i];
        float *all = td_xalloc((size_t)part->src_rows * sizeof *all);
        td_status st = td_st_read_f32(part->src, all, (size_t)part->src_rows);
        TD_CHECK(st == TD_OK); /* dtype and shape were checked by bind */
        memcpy(out, all + part->row0, (size_t)part->rows * sizeof *all);
        free(all);
    }
}

/* The same for every part of the model: several times its longest row, and a multiple of 1024. */
static size_t random_elements(const td_plan *p)
{
    const td_model_desc *d = p->desc;
    size_t longest = (size_t)TD_MAX(TD_MAX(d->E, d->H * d->D), TD_MAX(d->F, d->moe.F));
    return (TD_MAX((size_t)RANDOM_ELEMENTS, 4 * longest) + 1023) / 1024 * 1024;
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

/* Of a tensor only what was read: the next expert, or column, is still to come. */
static void drop_part(const td_piece *e, int k)
{
    const td_part *part = &e->part[k];
    if (!part->rows) return;
    size_t elements = (size_t)(part->rows - 1) * (size_t)e->src_K + (size_t)e->K;
    td_safetensors_drop(td_piece_data(e, k), elements * td_dtype_bytes(e->from));
}

/* The unit that is being packed; only this rank's part of it is kept. */
typedef struct fill_unit {
    int layer;
    uint8_t *p;
} fill_unit;

static void keep_part(const td_plan *p, const fill_unit *u, uint8_t *image)
{
    if (u->layer < 0) return;
    size_t part = p->unit[u->layer].bytes / (size_t)p->local.shards;
    memcpy(image + p->unit[u->layer].part, u->p + (size_t)p->local.shard * part, part);
}

/* Where a piece is packed. Pieces of a unit follow each other in the list. */
static uint8_t *place_of(const td_plan *p, const td_piece *e, fill_unit *u, uint8_t *image)
{
    if (e->unit < 0) return image + e->offset;
    if (e->unit != u->layer) {
        keep_part(p, u, image);
        u->layer = e->unit;
        memset(u->p, 0, p->unit[e->unit].bytes);
    }
    return u->p + e->offset;
}

void td_plan_fill(const td_plan *p, uint8_t *image, td_pool *pool, td_progress_fn *progress, void *arg)
{
    size_t n_random = p->files ? 0 : random_elements(p);
    uint8_t *random = p->files ? NULL : random_values(p->piece[0].from, n_random);
    size_t done = 0, all = 0, largest = 0;
    for (size_t i = 0; i < p->n; i++) all += p->piece[i].bytes;
    for (int i = 0; i < p->desc->L; i++) largest = TD_MAX(largest, p->unit[i].bytes);
    fill_unit unit = {-1, aligned_alloc(64, TD_MAX(largest, (size_t)64))}; /* a multiple of 64 */
    TD_CHECK(unit.p);
    for (size_t i = 0; i < p->n; i++) {
        const td_piece *e = &p->piece[i];
        if (e->bytes == 0) continue;
        uint8_t *to = place_of(p, e, &unit, image);
        if (e->kind == TD_PIECE_VECTOR)
            fill_vector(e, !p->files, to);
        else {
            fill_job j = {p, e, to, strip_rows(e), random, n_random};
            td_pool_for(pool, (e->N + j.strip - 1) / j.strip, fill_strip, &j);
        }
        if (e->scale_at) td_fp8_scales(e, p->desc->fp8.kind, (float *)(void *)(to + e->scale_at));
        for (int k = 0; k < e->n_parts && p->files; k++) drop_part(e, k);
        done += e->bytes;
        if (progress) progress(arg, "packing weights", (double)done / (double)all);
    }
    keep_part(p, &unit, image);
    free(unit.p);
    free(random);
}
