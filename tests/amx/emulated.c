// SPDX-License-Identifier: Apache-2.0
#include "tests/amx/emulated.h"
#include "common/check.h"
#include "kernels/amx.h"
#include <immintrin.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>

enum { TILES = 8, ROWS = 16, ROW_BYTES = 64, ROW_DWORDS = 16 };
#define WIDE __attribute__((target("avx2,fma")))

typedef struct tile {
    int rows, row_bytes;
    uint32_t at[ROWS][ROW_DWORDS];
} tile;

static _Thread_local tile tiles[TILES];
static _Thread_local bool configured;
static atomic_int held;
static atomic_long n_configured, n_multiplied;
bool td_tile_as_chain;

bool td_amx_supported(void)
{
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
}

td_tile_counts td_tile_count(void)
{
    return (td_tile_counts){atomic_load(&held), atomic_load(&n_configured), atomic_load(&n_multiplied)};
}

const td_ops *td_amx_family(int i)
{
    const td_ops *o;
    for (int f = 0; (o = td_ops_family(f)); f++)
        if (!strcmp(o->family, "amx")) return i ? NULL : o;
    printf("SKIP: the tiles are emulated with AVX2, which this CPU has not\n");
    exit(77);
}

/* ---- configuration ---- */

static void refused(const char *why, int n)
{
    fprintf(stderr, "emulated tile %d: %s\n", n, why);
    abort();
}

void td_tile_configure(const td_tile_config *c)
{
    if (c->palette != 1 || c->start_row) refused("palette 1 from row 0 only", -1);
    for (size_t i = 0; i < sizeof c->reserved; i++)
        if (c->reserved[i]) refused("a reserved byte is set", -1);
    for (int n = 0; n < 16; n++) {
        if (n >= TILES && (c->rows[n] || c->row_bytes[n])) refused("there is no such tile", n);
        if (c->rows[n] > ROWS || c->row_bytes[n] > ROW_BYTES) refused("too large", n);
        if (!c->rows[n] != !c->row_bytes[n]) refused("rows without columns, or columns without rows", n);
    }
    if (!configured) atomic_fetch_add(&held, 1);
    atomic_fetch_add(&n_configured, 1);
    configured = true;
    memset(tiles, 0, sizeof tiles);
    for (int n = 0; n < TILES; n++) tiles[n].rows = c->rows[n], tiles[n].row_bytes = c->row_bytes[n];
}

void td_tile_release(void)
{
    if (configured) atomic_fetch_sub(&held, 1);
    configured = false;
    memset(tiles, 0, sizeof tiles);
}

static tile *valid(int n)
{
    if (n < 0 || n >= TILES) refused("there is no such tile", n);
    if (!configured || !tiles[n].rows) refused("not configured", n);
    if (tiles[n].row_bytes % 4) refused("rows are not whole elements", n);
    return &tiles[n];
}

/* ---- moves ---- */

void td_tile_zero(int n)
{
    memset(valid(n)->at, 0, sizeof tiles[n].at);
}

void td_tile_load(int n, const void *p, size_t stride)
{
    tile *t = valid(n);
    memset(t->at, 0, sizeof t->at);
    for (int m = 0; m < t->rows; m++) memcpy(t->at[m], (const char *)p + (size_t)m * stride, (size_t)t->row_bytes);
}

void td_tile_store(int n, void *p, size_t stride)
{
    const tile *t = valid(n);
    for (int m = 0; m < t->rows; m++) memcpy((char *)p + (size_t)m * stride, t->at[m], (size_t)t->row_bytes);
}

/* ---- products ---- */

static inline float low(uint32_t pair)
{
    return td_bf16_to_f32((uint16_t)pair);
}

static inline float high(uint32_t pair)
{
    return td_bf16_to_f32((uint16_t)(pair >> 16));
}

/* One row of C, of 16 columns: those beyond the tile's are zeros in B, and stay what they are. */
WIDE __attribute__((noinline)) static void row_sdm(uint32_t *c, const uint32_t *a, const tile *b, int k_pairs)
{
    float even[ROW_DWORDS] = {0}, odd[ROW_DWORDS] = {0}, sum[ROW_DWORDS];
    for (int k = 0; k < k_pairs; k++)
        for (int n = 0; n < ROW_DWORDS; n++) {
            even[n] = __builtin_fmaf(low(a[k]), low(b->at[k][n]), even[n]);
            odd[n] = __builtin_fmaf(high(a[k]), high(b->at[k][n]), odd[n]);
        }
    memcpy(sum, c, sizeof sum);
    for (int n = 0; n < ROW_DWORDS; n++) {
        float both = even[n] + odd[n];
        sum[n] = sum[n] + both;
    }
    memcpy(c, sum, sizeof sum);
}

WIDE __attribute__((noinline)) static void row_chain(uint32_t *c, const uint32_t *a, const tile *b, int k_pairs)
{
    float sum[ROW_DWORDS];
    memcpy(sum, c, sizeof sum);
    for (int k = 0; k < k_pairs; k++)
        for (int n = 0; n < ROW_DWORDS; n++) {
            sum[n] = __builtin_fmaf(high(a[k]), high(b->at[k][n]), sum[n]);
            sum[n] = __builtin_fmaf(low(a[k]), low(b->at[k][n]), sum[n]);
        }
    memcpy(c, sum, sizeof sum);
}

void td_tile_dp(int nc, int na, int nb)
{
    enum { MASKED_FLUSHED_NEAREST = 0x9fc0 };
    tile *c = valid(nc), *a = valid(na), *b = valid(nb);
    if (nc == na || nc == nb || na == nb) refused("the three tiles of a product differ", nc);
    if (c->rows != a->rows) refused("C and A differ in rows", nc);
    if (c->row_bytes != b->row_bytes) refused("C and B differ in columns", nc);
    if (a->row_bytes / 4 != b->rows) refused("A's columns are not B's rows", na);
    unsigned old = _mm_getcsr();
    _mm_setcsr(MASKED_FLUSHED_NEAREST);
    for (int m = 0; m < c->rows; m++) (td_tile_as_chain ? row_chain : row_sdm)(c->at[m], a->at[m], b, b->rows);
    _mm_setcsr(old);
    for (int m = 0; m < c->rows; m++) memset((char *)c->at[m] + c->row_bytes, 0, (size_t)(ROW_BYTES - c->row_bytes));
    atomic_fetch_add(&n_multiplied, 1);
}
