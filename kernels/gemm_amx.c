// SPDX-License-Identifier: Apache-2.0
/* kernels/gemm_amx.c - y = W x on the tiles of Intel AMX, by the amx family's matrix law (ops.h).
 *
 * A block is up to 32 rows: two tiles of A against the two halves of a panel, four accumulators, 32 k to a step.
 * A block of up to 16 rows has one tile of A and two accumulators; tiles have as many rows as there are, down to one.
 * The accumulators of a slice of K leave the tiles when it is done; the tree over slices, bias and residual are
 * ordinary vectors.
 *
 * One block: panel after panel, the weights fetched a little ahead, as fast as memory gives them.
 * More blocks: the tiles take 64 bytes of A and B a cycle, L2 gives 48, memory four, so
 *   - a piece of a panel (256 k, 16 KiB) goes against up to four blocks while it is in L1;
 *   - A, as far as K goes at a time (a stretch), stays in L2. A long K has several: a group of panels passes over one
 *     stretch before the next, their sums wait meanwhile. Sums that leave tiles and come back lose nothing;
 *   - while the tiles work on a panel, a few lines of the next one are fetched in each step, and the vectors fold what the
 *     piece before has left;
 *   - outputs go past the caches, which they would only empty: they are read again when many more have been written. */
#if defined(__x86_64__)
#include "common/check.h"
#include "kernels/amx.h"
#include "kernels/amx_block.h"
#include "kernels/gemm_drive.h"

enum {
    STEP_BYTES = TD_PANEL * 4 * STEP_PAIRS, /* of a panel */
    PART_ROWS = 256, /* packed x of 2048 k: half of an L2 of 2 MiB */
    BLOCKS = PART_ROWS / BLOCK_ROWS,
    PIECE_STEPS = 8,
    NEAR_BLOCKS = 4,    /* that share a piece of weights in L1 */
    WHOLE_STEPS = 64,   /* of all K: one stretch */
    STRETCH_STEPS = 32, /* else: packed x of a stretch is a quarter of L2, and the sums of a group another */
    GROUP = 16,         /* panels */
    AHEAD = 12 << 10,   /* one block; as far as the other families on Intel: gemm_tile.h */
    FEW_AHEAD = 24 << 10 /* up to four: all pass over a piece before the next */
};

TD_INLINE int slices_of(const td_weight *w)
{
    return w->slices > 1 ? w->slices : 1;
}

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
            if (n >= STEP_K)
                store_bf16_32(to, v16_load(x), v16_load(x + 16));
            else
                store_bf16_32(to, v16_load_n(x, n), n > 16 ? v16_load_n(x + 16, n - 16) : v16_zero());
        }
    }
    td_fp_leave(fp);
}

/* ---- what both ways share ---- */

typedef struct block {
    int row, rows, upper; /* upper: of them in the first tile */
    const uint8_t *a;     /* packed x */
} block;

enum { STACKED = 4 }; /* sums of slices that wait at a time, and the newest: log2(TD_MAX_SLICES) + 1 */
typedef float sum[BLOCK_ROWS][TD_PANEL];
typedef struct sums {
    sum v[STACKED];
} sums;
/* One member's: of the panels of a group and of all blocks. */
typedef struct area {
    sums of[GROUP][BLOCKS];
} area;

static void configure(const block *b)
{
    block_configure(b->upper, b->rows - b->upper);
}

/* Where the sum of slice i goes: above the subtrees of lower slices that wait. */
TD_INLINE int level(int i)
{
    return _mm_popcnt_u32((unsigned)i);
}

/* Rows [m0, m1): slice i is done, adds the subtrees that it completes, as a binary counter carries; lower slices on the
 * left. */
TD_INLINE void fold(sums *s, int i, int m0, int m1)
{
    for (int top = level(i); i & 1; i >>= 1, top--)
        for (int m = m0; m < m1; m++)
            for (int v = 0; v < TD_PANEL; v += 16) {
                float *left = &s->v[top - 1][m][v];
                v16_store(left, v16_add(v16_load(left), v16_load(&s->v[top][m][v])));
            }
}

/* Rows [m0, m1) to y: bias, then the residual; columns beyond N stay as they are. past: the caches. */
TD_INLINE void finish(const td_gemm_job *j, const block *at, int n0, const sums *s, int m0, int m1, bool past)
{
    const float *bias = j->w->bias;
    for (int v = 0; v < TD_PANEL && n0 + v < j->w->N; v += 16) {
        int n = n0 + v, lanes = j->w->N - n;
        v16 plus = bias ? v16_load_n(bias + n, lanes) : v16_zero();
        for (int m = m0; m < m1; m++) {
            float *y = j->y + (size_t)(at->row + m) * j->ldy + n;
            v16 out = v16_load(&s->v[0][m][v]);
            if (bias) out = v16_add(out, plus);
            if (j->add) out = v16_add(v16_load_n(y, lanes), out);
            if (past && lanes >= 16) v16_stream(y, out);
            else v16_store_n(y, out, lanes);
        }
    }
}

/* What vectors do while tiles work: a part of it goes with each step. */
typedef struct beside {
    const uint8_t *p, *end; /* weights to fetch */
    int lines;              /* in a step */
    sums *s;                /* of a block with a slice done: to fold and, the last one, to finish */
    const block *at;
    int slice, n0;
    int row, rows;          /* the next one, all: none left if equal */
    bool past;              /* outputs past the caches */
} beside;

enum { ROWS_A_STEP = BLOCK_ROWS / PIECE_STEPS };

TD_INLINE void fold_rows(const td_gemm_job *j, beside *w, int rows)
{
    int to = TD_MIN(w->row + rows, w->rows);
    fold(w->s, w->slice, w->row, to);
    if (w->slice == j->slices - 1) finish(j, w->at, w->n0, w->s, w->row, to, w->past);
    w->row = to;
}

TD_INLINE void fetch_some(beside *w)
{
    const uint8_t *end = w->p + (size_t)w->lines * 64;
    for (const uint8_t *p = w->p; p < end; p += 64) _mm_prefetch((const char *)p, _MM_HINT_T1);
    w->p = end < w->end ? end : w->end;
    if (w->p == w->end) w->lines = 0;
}

/* len of K from a step on, x at a, weights at b; added to the sum at `to` if `more`. What the last step would read behind
 * them is another slice, another panel or nobody's memory: it reads a copy padded with zeros. */
TD_INLINE void run(const td_gemm_job *j, const block *at, const uint8_t *a, const uint8_t *b, int len, const bool two,
                   bool more, beside *w, sum *to)
{
    const size_t low = (size_t)at->upper * ROW_BYTES, a_step = (size_t)at->rows * ROW_BYTES;
    float *c = (*to)[0];
    if (more) block_load(c, TD_PANEL * 4, at->upper, two, true);
    else block_zero(two);
    TD_ONCE for (int k = len / STEP_K; k; k--, a += a_step, b += STEP_BYTES)
    {
        fetch_some(w);
        block_step(a, ROW_BYTES, low, b, TD_PANEL * 4, two, true);
        if (w->row < w->rows) fold_rows(j, w, ROWS_A_STEP);
    }
    if (len % STEP_K) {
        uint8_t end[STEP_BYTES] __attribute__((aligned(64))) = {0};
        memcpy(end, b, (size_t)(len % STEP_K + 1) / 2 * TD_PANEL * 4);
        block_step(a, ROW_BYTES, low, end, TD_PANEL * 4, two, true);
    }
    if (w->row < w->rows) fold_rows(j, w, BLOCK_ROWS);
    block_store(c, TD_PANEL * 4, at->upper, two, true);
}

static block block_of(const td_gemm_job *j, int b)
{
    int row = td_block_row(j, b), rows = td_block_row(j, b + 1) - row;
    return (block){row, rows, rows > TILE_ROWS ? (rows + 1) / 2 : rows,
                   (const uint8_t *)j->packed + (size_t)row * j->steps * ROW_BYTES};
}

static const uint8_t *panel(const td_gemm_job *j, int n)
{
    return (const uint8_t *)j->w->p + (size_t)n * td_panel_bytes(j->w->K);
}

/* ---- one block ---- */

TD_NOINLINE void one_block(const td_gemm_job *j, int first, int end)
{
    sums s;
    const block at = block_of(j, 0);
    int len = j->w->K / j->slices;
    size_t a_slice = (size_t)at.rows * ROW_BYTES * (j->steps / (size_t)j->slices);
    configure(&at);
    for (int n = first; n < end; n++) {
        const uint8_t *a = at.a, *b = panel(j, n);
        for (int i = 0; i < j->slices; i++, a += a_slice, b += td_pairs(len) * TD_PANEL * 4) {
            beside w = {.p = b + AHEAD, .end = b + AHEAD + td_pairs(len) * TD_PANEL * 4, .lines = STEP_BYTES / 64};
            if (at.rows > at.upper) run(j, &at, a, b, len, true, false, &w, &s.v[level(i)]);
            else run(j, &at, a, b, len, false, false, &w, &s.v[level(i)]);
            fold(&s, i, 0, at.rows);
        }
        finish(j, &at, n * TD_PANEL, &s, 0, at.rows, false);
    }
}

/* ---- more blocks ---- */

typedef struct walk {
    const td_gemm_job *j;
    block at[BLOCKS];
    int each, per, piece; /* steps of a slice, its pieces, their steps */
    int pieces, stretch;  /* of all K, of a stretch */
    int configured;       /* rows of a block */
    beside beside;
} walk;

/* Piece i of K: block `at` against panel n. */
static void piece(walk *w, const block *at, int n, int i, sums *s)
{
    int len = w->j->w->K / w->j->slices, slice = i / w->per, step0 = i % w->per * w->piece,
        k = len - step0 * STEP_K;
    const uint8_t *a = at->a + (size_t)(slice * w->each + step0) * (size_t)at->rows * ROW_BYTES,
                  *b = panel(w->j, n) + (size_t)slice * td_pairs(len) * TD_PANEL * 4 +
                       (size_t)step0 * STEP_BYTES;
    bool last = k <= w->piece * STEP_K;
    if (!last) k = w->piece * STEP_K;
    if (at->rows != w->configured) configure(at);
    w->configured = at->rows;
    if (at->rows > at->upper) run(w->j, at, a, b, k, true, step0 > 0, &w->beside, &s->v[level(slice)]);
    else run(w->j, at, a, b, k, false, step0 > 0, &w->beside, &s->v[level(slice)]);
    if (!last) return;
    w->beside.s = s;
    w->beside.at = at;
    w->beside.slice = slice;
    w->beside.n0 = n * TD_PANEL;
    w->beside.row = 0;
    w->beside.rows = slice & 1 || slice == w->j->slices - 1 ? at->rows : 0;
}

/* Pieces [i0, i1) of panel n against all blocks. */
static void stretch(walk *w, int n, sums *of, int i0, int i1)
{
    for (int b = 0; b < w->j->n_blocks; b += NEAR_BLOCKS)
        for (int i = i0; i < i1; i++)
            for (int k = b; k < TD_MIN(b + NEAR_BLOCKS, w->j->n_blocks); k++) piece(w, &w->at[k], n, i, &of[k]);
}

/* Fetch what comes after the stretch of panel n from piece i on: `n2, i2` if many blocks leave time, else the same a little
 * ahead. */
static void plan_fetch(walk *w, int n, int i, int n2, int i2)
{
    bool few = w->j->n_blocks <= NEAR_BLOCKS;
    if (few) n2 = n, i2 = i;
    size_t slice = td_pairs(w->j->w->K / w->j->slices) * TD_PANEL * 4, all = td_panel_bytes(w->j->w->K),
           from = (size_t)(i2 / w->per) * slice + (size_t)(i2 % w->per * w->piece) * STEP_BYTES,
           bytes = (size_t)(w->stretch * w->piece) * STEP_BYTES;
    w->beside.p = panel(w->j, n2) + from + (few ? FEW_AHEAD : 0);
    w->beside.end = w->beside.p + TD_MIN(bytes, all - from) / 64 * 64;
    w->beside.lines = (STEP_BYTES / 64 + w->j->n_blocks - 1) / w->j->n_blocks;
}

TD_NOINLINE void more_blocks(const td_gemm_job *j, int first, int end, area *mine)
{
    bool whole = j->steps <= WHOLE_STEPS;
    walk w = {.j = j, .each = (int)j->steps / j->slices};
    w.beside.past = !j->add && !((uintptr_t)j->y % 64) && !(j->ldy % 16);
    w.per = (w.each + PIECE_STEPS - 1) / PIECE_STEPS;
    w.piece = (w.each + w.per - 1) / w.per;
    w.pieces = w.per * j->slices;
    w.stretch = whole ? w.pieces : TD_MAX(STRETCH_STEPS / w.piece, 1);
    for (int b = 0; b < j->n_blocks; b++) w.at[b] = block_of(j, b);
    for (int p = first, p1; p < end; p = p1) {
        p1 = whole ? p + 1 : TD_MIN(p + GROUP, end);
        for (int i = 0, i1; i < w.pieces; i = i1) {
            i1 = TD_MIN(i + w.stretch, w.pieces);
            for (int n = p; n < p1; n++) {
                if (n + 1 < p1) plan_fetch(&w, n, i, n + 1, i);
                else if (i1 < w.pieces) plan_fetch(&w, n, i, p, i1);
                else plan_fetch(&w, n, i, TD_MIN(p1, end - 1), 0);
                stretch(&w, n, mine->of[n - p], i, i1);
            }
        }
    }
    fold_rows(j, &w.beside, BLOCK_ROWS);
    _mm_sfence(); /* the members that read these outputs see them */
}

/* ---- driver ---- */

static size_t packed_bytes(size_t rows, size_t steps)
{
    return td_round64(rows * steps * STEP_K * 2);
}

static void panels(const td_gemm_job *j, int first, int end, int member)
{
    unsigned fp = td_fp_enter();
    if (j->n_blocks == 1)
        one_block(j, first, end);
    else
        more_blocks(j, first, end,
                    (area *)((uint8_t *)j->packed + packed_bytes((size_t)j->T, j->steps)) + member);
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

static void linear(td_pool *pool, void *scratch, const td_weight *w, const float *x, size_t ldx, int T,
                   float *y, size_t ldy, bool add)
{
    td_gemm_drive(&kind, pool, scratch, w, x, ldx, T, y, ldy, add);
}

/* Packed x of a part, whose up to TD_MAX_SLICES slices have whole steps each, and the members' sums. */
static size_t scratch_bytes(int max_rows, int max_K, int max_D, int n_threads)
{
    size_t rows = (size_t)TD_MIN(max_rows, (int)PART_ROWS), steps = (size_t)max_K / STEP_K + TD_MAX_SLICES;
    return TD_MAX(td_x86_scratch_bytes(max_rows, max_K, max_D, n_threads),
                  packed_bytes(rows, steps) + (size_t)n_threads * sizeof(area));
}

float td_amx_loop(long steps)
{
    static const uint8_t zeros[TILE_ROWS * ROW_BYTES];
    float out[TILE_ROWS * TILE_ROWS];
    block_configure(TILE_ROWS, TILE_ROWS);
    td_tile_load(A0, zeros, ROW_BYTES);
    td_tile_load(A1, zeros, ROW_BYTES);
    td_tile_load(B0, zeros, ROW_BYTES);
    td_tile_load(B1, zeros, ROW_BYTES);
    block_zero(true);
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
