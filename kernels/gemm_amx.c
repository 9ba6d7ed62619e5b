// SPDX-License-Identifier: Apache-2.0
/* kernels/gemm_amx.c - y = W x on the tiles of Intel AMX, by the amx family's matrix law (ops.h).
 *
 * A block is up to 32 rows: two tiles of A against the two halves of a panel, four accumulators, 32 k to a step.
 * A block of up to 16 rows has one tile of A and two accumulators; tiles have as many rows as there are, down to one.
 * Loop order: a few panels that stay in L2 together (outer), row blocks, panels. The accumulators of a slice of K
 * leave the tiles once, when it is done; the tree over slices, bias and residual are ordinary vectors. */
#if defined(__x86_64__)
#include "common/check.h"
#include "kernels/amx.h"
#include "kernels/amx_tile.h"
#include "kernels/gemm_drive.h"
#include "kernels/simd.h"

enum {
    TILE_ROWS = 16,
    ROW_BYTES = 64,              /* of a tile */
    STEP_K = 32,
    STEP_PAIRS = STEP_K / 2,
    STEP_BYTES = TD_PANEL * 4 * STEP_PAIRS, /* of a panel */
    BLOCK_ROWS = 2 * TILE_ROWS,
    NEAR_BYTES = 1 << 20,        /* panels that row blocks pass over before the next ones: half of an L2 of 2 MiB */
    PART_ROWS = 512,             /* by arithmetic: weights once more for each cost 2 bytes a cycle and core */
    AHEAD = 12 << 10             /* as far as the other families on Intel: gemm_tile.h */
};
/* Literals: they become parts of instructions. */
#define C00 0
#define C01 1
#define C10 2
#define C11 3
#define A0 4
#define A1 5
#define B0 6
#define B1 7

TD_INLINE int slices_of(const td_weight *w) { return w->slices > 1 ? w->slices : 1; }

static size_t steps_of(const td_weight *w)
{
    int S = slices_of(w);
    return (size_t)S * (size_t)((w->K / S + STEP_K - 1) / STEP_K);
}

/* ---- packing: [block][step][row][32] bf16, each slice padded with zeros to whole steps ---- */

static void pack(const td_gemm_job *j, int block, int step0, int step1)
{
    int row = td_block_row(j, block), rows = td_block_row(j, block + 1) - row, len = j->w->K / j->slices,
        each = (int)j->steps / j->slices;
    uint16_t *to = (uint16_t *)j->packed + ((size_t)row * j->steps + (size_t)step0 * (size_t)rows) * STEP_K;
    unsigned fp = td_fp_enter();
    for (int s = step0; s < step1; s++) {
        int k = s % each * STEP_K, n = len - k;
        const float *x = j->x + (size_t)row * j->ldx + s / each * len + k;
        for (int m = 0; m < rows; m++, x += j->ldx, to += STEP_K) {
            if (n >= STEP_K) store_bf16_32(to, v16_load(x), v16_load(x + 16));
            else store_bf16_32(to, v16_load_n(x, n), n > 16 ? v16_load_n(x + 16, n - 16) : v16_zero());
        }
    }
    td_fp_leave(fp);
}

/* ---- one block of rows against one panel ---- */

typedef struct block {
    int row, rows, upper; /* upper: of them in the first tile */
    const uint8_t *a;     /* packed x */
} block;

enum { STACKED = 4 }; /* sums of slices that wait at a time, and the newest: log2(TD_MAX_SLICES) + 1 */
typedef struct sums {
    float v[STACKED][BLOCK_ROWS][TD_PANEL];
} sums;

static void configure(const block *b)
{
    int lower = b->rows - b->upper;
    td_tile_config c = {.palette = 1};
    for (int t = C00; t <= B1; t++) {
        int rows = t == B0 || t == B1 ? STEP_PAIRS : t == C10 || t == C11 || t == A1 ? lower : b->upper;
        c.rows[t] = (uint8_t)rows;
        c.row_bytes[t] = rows ? ROW_BYTES : 0;
    }
    td_tile_configure(&c);
}

/* One step of all accumulators. low: from the first tile of A to the second. */
TD_INLINE void step(const uint8_t *a, size_t low, const uint8_t *b, const bool two)
{
    td_tile_load(B0, b, TD_PANEL * 4);
    td_tile_load(B1, b + ROW_BYTES, TD_PANEL * 4);
    td_tile_load(A0, a, ROW_BYTES);
    td_tile_dp(C00, A0, B0);
    td_tile_dp(C01, A0, B1);
    if (!two) return;
    td_tile_load(A1, a + low, ROW_BYTES);
    td_tile_dp(C10, A1, B0);
    td_tile_dp(C11, A1, B1);
}

/* A slice: len of K, x at a, weights at b. fetch: this block is the first to read these weights. What the last step would
 * read behind them is another slice, another panel or nobody's memory: it reads a copy padded with zeros. */
TD_INLINE void slice(const block *at, const uint8_t *a, const uint8_t *b, int len, const bool two, bool fetch, float *to)
{
    const size_t low = (size_t)at->upper * ROW_BYTES, a_step = (size_t)at->rows * ROW_BYTES;
    td_tile_zero(C00);
    td_tile_zero(C01);
    if (two) {
        td_tile_zero(C10);
        td_tile_zero(C11);
    }
    TD_ONCE for (int k = len / STEP_K; k; k--, a += a_step, b += STEP_BYTES) {
        if (fetch)
            TD_UNROLL for (int i = 0; i < STEP_BYTES; i += 64) _mm_prefetch((const char *)b + AHEAD + i, _MM_HINT_T1);
        step(a, low, b, two);
    }
    if (len % STEP_K) {
        uint8_t end[STEP_BYTES] __attribute__((aligned(64))) = {0};
        memcpy(end, b, (size_t)(len % STEP_K + 1) / 2 * TD_PANEL * 4);
        step(a, low, end, two);
    }
    td_tile_store(C00, to, TD_PANEL * 4);
    td_tile_store(C01, to + TILE_ROWS, TD_PANEL * 4);
    if (two) {
        td_tile_store(C10, to + at->upper * TD_PANEL, TD_PANEL * 4);
        td_tile_store(C11, to + at->upper * TD_PANEL + TILE_ROWS, TD_PANEL * 4);
    }
}

/* Slice i is done, its sums are at `top`: adds the subtrees that it completes, as a binary counter carries; lower slices on
 * the left. The subtree that holds it. */
TD_INLINE int fold(sums *s, int top, int i, int rows)
{
    for (; i & 1; i >>= 1, top--)
        for (int m = 0; m < rows; m++)
            for (int v = 0; v < TD_PANEL; v += 16) {
                float *left = &s->v[top - 1][m][v];
                v16_store(left, v16_add(v16_load(left), v16_load(&s->v[top][m][v])));
            }
    return top;
}

/* To y: bias, then the residual; columns beyond N stay as they are. */
TD_INLINE void finish(const td_gemm_job *j, const block *at, int n0, const sums *s)
{
    const float *bias = j->w->bias;
    for (int v = 0; v < TD_PANEL && n0 + v < j->w->N; v += 16) {
        int n = n0 + v, lanes = j->w->N - n;
        v16 plus = bias ? v16_load_n(bias + n, lanes) : v16_zero();
        for (int m = 0; m < at->rows; m++) {
            float *y = j->y + (size_t)(at->row + m) * j->ldy + n;
            v16 sum = v16_load(&s->v[0][m][v]);
            if (bias) sum = v16_add(sum, plus);
            if (j->add) sum = v16_add(v16_load_n(y, lanes), sum);
            v16_store_n(y, sum, lanes);
        }
    }
}

TD_NOINLINE void block_panel(const td_gemm_job *j, const block *at, int n, bool fetch)
{
    sums s;
    int len = j->w->K / j->slices, top = 0;
    size_t a_slice = (size_t)at->rows * ROW_BYTES * (j->steps / (size_t)j->slices);
    const uint8_t *a = at->a, *b = (const uint8_t *)j->w->p + (size_t)n * td_panel_bytes(j->w->K);
    for (int i = 0; i < j->slices; i++, a += a_slice, b += td_pairs(len) * TD_PANEL * 4) {
        if (at->rows > at->upper) slice(at, a, b, len, true, fetch, &s.v[top][0][0]);
        else slice(at, a, b, len, false, fetch, &s.v[top][0][0]);
        top = fold(&s, top, i, at->rows) + 1;
    }
    finish(j, at, n * TD_PANEL, &s);
}

/* ---- driver ---- */

static block block_of(const td_gemm_job *j, int b)
{
    int row = td_block_row(j, b), rows = td_block_row(j, b + 1) - row;
    return (block){row, rows, rows > TILE_ROWS ? (rows + 1) / 2 : rows,
                   (const uint8_t *)j->packed + (size_t)row * j->steps * ROW_BYTES};
}

static void panels(const td_gemm_job *j, int first, int end)
{
    int near = TD_MAX((int)(NEAR_BYTES / td_panel_bytes(j->w->K)), 1), shape = 0;
    unsigned fp = td_fp_enter();
    for (int p = first; p < end; p += near)
        for (int b = 0; b < j->n_blocks; b++) {
            block at = block_of(j, b);
            if (at.rows != shape) configure(&at);
            shape = at.rows;
            for (int n = p; n < TD_MIN(p + near, end); n++) block_panel(j, &at, n, b == 0);
        }
    td_tile_release();
    td_fp_leave(fp);
}

static int part_rows(int K)
{
    (void)K;
    return PART_ROWS;
}

static const td_gemm_kind kind = {.block_rows = BLOCK_ROWS,
                                  .strip_steps = 8,
                                  .pack_serial = 1 << 15,
                                  .steps = steps_of,
                                  .part_rows = part_rows,
                                  .pack = pack,
                                  .panels = panels};

static void linear(td_pool *pool, void *scratch, const td_weight *w, const float *x, size_t ldx, int T, float *y,
                   size_t ldy, bool add)
{
    td_gemm_drive(&kind, pool, scratch, w, x, ldx, T, y, ldy, add);
}

/* Packed x of a part: each of up to TD_MAX_SLICES slices has whole steps. */
static size_t scratch_bytes(int max_rows, int max_K, int max_D, int n_threads)
{
    size_t rows = (size_t)TD_MIN(max_rows, (int)PART_ROWS), k = (size_t)max_K + TD_MAX_SLICES * (STEP_K - 1);
    return TD_MAX(td_x86_scratch_bytes(max_rows, max_K, max_D, n_threads), td_round64(rows * k * 2));
}

float td_amx_loop(long steps)
{
    static const uint8_t zeros[TILE_ROWS * ROW_BYTES];
    float out[TILE_ROWS * TILE_ROWS];
    configure(&(block){.rows = BLOCK_ROWS, .upper = TILE_ROWS});
    td_tile_load(A0, zeros, ROW_BYTES);
    td_tile_load(A1, zeros, ROW_BYTES);
    td_tile_load(B0, zeros, ROW_BYTES);
    td_tile_load(B1, zeros, ROW_BYTES);
    td_tile_zero(C00);
    td_tile_zero(C01);
    td_tile_zero(C10);
    td_tile_zero(C11);
    for (long i = 0; i < steps; i++) {
        td_tile_dp(C00, A0, B0);
        td_tile_dp(C01, A0, B1);
        td_tile_dp(C10, A1, B0);
        td_tile_dp(C11, A1, B1);
    }
    td_tile_store(C00, out, ROW_BYTES);
    td_tile_release();
    return out[0];
}

void td_gemm_fill_amx(td_ops *t)
{
    t->scratch_bytes = scratch_bytes;
    t->linear = linear;
}
#endif
