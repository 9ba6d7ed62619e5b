/* kernels/gemm_tile.h - y = W x for the x86 families; included once per instruction set by gemm_avx*.c.
 *
 * The includer defines:
 *   NATIVE_DP   1: vdpbf16ps; 0: two fused multiply-adds, same bits (w even = dword << 16, odd = top half)
 *   MR_MAX      rows per tile: what the registers hold
 *   MR_WIDE     largest tile that covers the panel at once; above it, NV_HALF vectors at a time
 *   QUIET_AHEAD bytes that a tile of QUIET_ROWS rows or less prefetches ahead where the hardware fetches well; 0: none
 *   PIECE       0, or: k pairs of a panel that all tiles pass over before the next ones (few registers, many tiles)
 *   GEMM_FILL   name of the fill function
 * An output is one chain over k pairs whatever the tile: the matrix law of ops.h; with slices, one chain per
 * slice in registers, the sums of finished subtrees wait on a small stack in L1. Loop order: panels (outer),
 * pieces of K where the family has them, row blocks (inner). A chain that goes on in the next piece waits in memory
 * in f32, which is what it was in the register: the same bits. */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "kernels/gemm_drive.h"
#include "kernels/simd.h"

enum { NV_FULL = TD_PANEL / LANES, XD = NATIVE_DP ? 1 : 2 };

typedef struct tile_arg {
    const uint32_t *a;     /* packed x: [steps][XD][MR] */
    const uint8_t *b;      /* panel: [steps][32] dwords, from the tile's first column */
    size_t steps;          /* of one slice */
    int slices;
    float *c;
    size_t ldc;
    const float *bias;     /* or NULL */
    bool add;
} tile_arg;

/* Up to QUIET_ROWS rows the weights' stream itself is the limit, and AMD's hardware fetches it best alone or with a near
 * hint. Above, and with any count on Intel, the tile fetches its own lines into L2 so many panel bytes ahead, over the
 * panel's end too. */
enum { QUIET_ROWS = NATIVE_DP ? 4 : 2, AHEAD = 12 << 10 };

TD_INLINE void finish(const tile_arg *t, int m, int v, vec s)
{
    float *c = t->c + (size_t)m * t->ldc + v * LANES;
    if (t->bias) s = vec_add(s, vec_load(t->bias + v * LANES));
    vec_store(c, t->add ? vec_add(vec_load(c), s) : s);
}

enum { STACKED = 3 }; /* subtrees that wait at a time: log2(TD_MAX_SLICES) */

/* Slice i is done: adds the subtrees that it completes, as a binary counter carries; lower slices on the left. */
TD_INLINE float *fold(vec s[MR_MAX][NV_FULL], float *top, int i, bool last, const int MR, const int NV)
{
    TD_ONCE for (; i & 1; i >>= 1) {
        top -= MR * NV * LANES;
        TD_UNROLL for (int m = 0; m < MR; m++)
            TD_UNROLL for (int v = 0; v < NV; v++)
                s[m][v] = vec_add(vec_load(top + (m * NV + v) * LANES), s[m][v]);
    }
    if (last) return top;
    TD_UNROLL for (int m = 0; m < MR; m++)
        TD_UNROLL for (int v = 0; v < NV; v++) vec_store(top + (m * NV + v) * LANES, s[m][v]);
    return top + MR * NV * LANES;
}

typedef struct cursor {
    const uint32_t *a;
    const uint8_t *b;
#if PIECE
    const uint8_t *next; /* to fetch, `pace` bytes further with every step */
    size_t pace;
#endif
} cursor;

TD_INLINE void zero(vec s[MR_MAX][NV_FULL], const int MR, const int NV)
{
    TD_UNROLL for (int m = 0; m < MR; m++)
        TD_UNROLL for (int v = 0; v < NV; v++) s[m][v] = vec_zero();
}

/* Goes on with one chain per output over the next t->steps pairs. */
TD_INLINE void chain(const tile_arg *t, cursor *at, vec s[MR_MAX][NV_FULL], const int MR, const int NV,
                     const int ahead)
{
    const uint32_t *a = at->a;
    const uint8_t *b = at->b;
    TD_ONCE for (size_t k = t->steps; k; k--) {
        veci w[NV_FULL];
        TD_UNROLL for (int v = 0; v < NV; v++) w[v] = veci_load(b + v * LANES * 4);
        if (ahead > 0)
            TD_UNROLL for (int i = 0; i < NV * LANES * 4; i += 64)
                _mm_prefetch((const char *)b + ahead + i, _MM_HINT_T1);
#if PIECE
        if (ahead < 0) {
            _mm_prefetch((const char *)at->next, _MM_HINT_T1);
            at->next += at->pace;
        }
#endif
#if NATIVE_DP
        TD_UNROLL for (int m = 0; m < MR; m++) {
            veci x = veci_set1(a[m]);
            TD_UNROLL for (int v = 0; v < NV; v++)
                s[m][v] = _mm512_dpbf16_ps(s[m][v], (__m512bh)w[v], (__m512bh)x);
        }
#else
        vec half[NV_FULL];
        const float *f = (const float *)a;
        TD_UNROLL for (int v = 0; v < NV; v++) half[v] = vec_odd(w[v]);
        TD_UNROLL for (int m = 0; m < MR; m++) {
            vec x = vec_set1(f[m]);
            TD_UNROLL for (int v = 0; v < NV; v++) s[m][v] = vec_fma(half[v], x, s[m][v]);
        }
        TD_UNROLL for (int v = 0; v < NV; v++) half[v] = vec_even(w[v]);
        TD_UNROLL for (int m = 0; m < MR; m++) {
            vec x = vec_set1(f[MR + m]);
            TD_UNROLL for (int v = 0; v < NV; v++) s[m][v] = vec_fma(half[v], x, s[m][v]);
        }
#endif
        a += XD * MR;
        b += TD_PANEL * 4;
    }
    at->a = a;
    at->b = b;
}

TD_INLINE void tile(const tile_arg *t, const int MR, const int NV, const int ahead)
{
    vec s[MR_MAX][NV_FULL];
    float stack[STACKED * MR_MAX * NV_FULL * LANES] __attribute__((aligned(64))), *top = stack;
    cursor at = {.a = t->a, .b = t->b};
    int i = 0;
    do {
        zero(s, MR, NV);
        chain(t, &at, s, MR, NV, ahead);
        top = fold(s, top, i, i + 1 == t->slices, MR, NV);
    } while (++i < t->slices);
    TD_UNROLL for (int m = 0; m < MR; m++)
        TD_UNROLL for (int v = 0; v < NV; v++) finish(t, m, v, s[m][v]);
}

#define NV_OF(MR) ((MR) <= MR_WIDE ? NV_FULL : NV_HALF)
#define QUIET(MR) \
    TD_NOINLINE void quiet_##MR(const tile_arg *t) { tile(t, MR, NV_OF(MR), QUIET_AHEAD); }
typedef void tile_fn(const tile_arg *t);
QUIET(1) QUIET(2)
#if NATIVE_DP
QUIET(3) QUIET(4)
#endif
static tile_fn *const quiet[] = {
    NULL, quiet_1, quiet_2,
#if NATIVE_DP
    quiet_3, quiet_4,
#endif
};


#define TILE(MR) \
    TD_NOINLINE void tile_##MR(const tile_arg *t) { tile(t, MR, NV_OF(MR), AHEAD * (NV_FULL / NV_OF(MR))); }
TILE(1) TILE(2)
#if !PIECE
TILE(3) TILE(4) TILE(5) TILE(6) TILE(7) TILE(8) TILE(9) TILE(10) TILE(11) TILE(12)
#endif
static tile_fn *const tiles[] = {
    NULL, tile_1, tile_2,
#if !PIECE
    tile_3, tile_4, tile_5, tile_6, tile_7, tile_8, tile_9, tile_10, tile_11, tile_12,
#endif
};

/* For a block of `rows` of T, which is at most QUIET_ROWS where a family goes piece by piece. */
TD_INLINE tile_fn *tile_of(int T, int rows)
{
    return (T <= QUIET_ROWS && !__builtin_cpu_is("intel") ? quiet : tiles)[rows];
}

#if PIECE
/* ---- a panel piece by piece ----
 * Eight rows take four tiles to a panel. Were each to pass over all of K, the first would wait for memory and the
 * others for the multipliers, one after the other; over pieces, each fetches its share of the next one into L2 while
 * it multiplies, and memory and multipliers are busy all the time. */

enum { NEAR = 16,        /* k pairs of a piece of up to NEAR_ROWS rows, which live on what the hardware fetches */
       NEAR_ROWS = 4,
       PART_BLOCKS = 16, /* of rows, at most, that pass over a piece */
       STATE = (1 + STACKED) * MR_MAX * NV_HALF * LANES };

typedef struct piece {
    tile_arg t;       /* steps: of each chain; slices: of all K */
    int first, n;     /* slices in this piece */
    bool begun, ends; /* the first chain goes on where the piece before left it; the last one ends its slice */
    float *state;     /* [1 + STACKED][MR][NV]: chains under way, subtrees that wait */
    const uint8_t *next;
    size_t pace;
} piece;

TD_INLINE void tile_piece(const piece *p, const int MR, const int NV)
{
    const tile_arg *t = &p->t;
    const int unit = MR * NV * LANES;
    vec s[MR_MAX][NV_FULL];
    float *top = p->state + (1 + __builtin_popcount((unsigned)p->first)) * unit;
    cursor at = {t->a, t->b, p->next, p->pace};
    if (p->begun)
        TD_UNROLL for (int m = 0; m < MR; m++)
            TD_UNROLL for (int v = 0; v < NV; v++) s[m][v] = vec_load(p->state + (m * NV + v) * LANES);
    else zero(s, MR, NV);
    for (int i = p->first;;) {
        chain(t, &at, s, MR, NV, -1);
        if (!p->ends) {
            TD_UNROLL for (int m = 0; m < MR; m++)
                TD_UNROLL for (int v = 0; v < NV; v++) vec_store(p->state + (m * NV + v) * LANES, s[m][v]);
            return;
        }
        bool last = i + 1 == t->slices;
        top = fold(s, top, i, last, MR, NV);
        if (last) break;
        if (++i == p->first + p->n) return;
        zero(s, MR, NV);
    }
    TD_UNROLL for (int m = 0; m < MR; m++)
        TD_UNROLL for (int v = 0; v < NV; v++) finish(t, m, v, s[m][v]);
}

#define PART(MR) TD_NOINLINE void piece_##MR(const piece *p) { tile_piece(p, MR, NV_HALF); }
PART(3) PART(4) PART(5) PART(6)
typedef void piece_fn(const piece *p);
static piece_fn *const pieces[] = {NULL, NULL, NULL, piece_3, piece_4, piece_5, piece_6};
#endif

/* ---- packing ---- */

#if PIECE
/* Four pairs of up to R rows of x, rounded to bf16, to [4][XD][R]: the odd elements first, as the chain takes them.
 * Stores run over their end, into what is stored next; the last ones before `end` do not. */
TD_INLINE void pack_four(float *to, const float *end, const float *x, size_t ldx, int left, const int R)
{
    vec r[8];
    TD_UNROLL for (int m = 0; m < 8; m++)
        r[m] = m >= R ? vec_zero()
                      : vec_round_bf16(left >= 8 ? vec_load(x + (size_t)m * ldx)
                                                 : vec_load_n(x + (size_t)m * ldx, left));
    transpose8(r);
    TD_UNROLL for (int i = 0; i < 8; i++, to += R) {
        if (to + 8 <= end) vec_store(to, r[i ^ 1]);
        else if (to < end) memcpy(to, &r[i ^ 1], (size_t)R * sizeof *to);
    }
}

TD_INLINE void pack_rows(const td_gemm_job *j, int row, int p0, int p1, const int R)
{
    const float *x = j->x + (size_t)row * j->ldx;
    float *base = (float *)j->packed + (size_t)row * j->steps * XD, *end = base + p1 * XD * R;
    for (int p = p0; p < p1; p += 4) pack_four(base + p * XD * R, end, x + 2 * p, j->ldx, j->w->K - 2 * p, R);
}

#define PACK(R) \
    TD_NOINLINE void pack_##R(const td_gemm_job *j, int row, int p0, int p1) { pack_rows(j, row, p0, p1, R); }
PACK(1) PACK(2) PACK(3) PACK(4) PACK(5) PACK(6)
typedef void pack_fn(const td_gemm_job *j, int row, int p0, int p1);
static pack_fn *const packs[] = {NULL, pack_1, pack_2, pack_3, pack_4, pack_5, pack_6};

/* Rounds pairs [p0, p1) of the rows of block b to bf16 and interleaves them. */
static void pack_strip(const td_gemm_job *j, int b, int p0, int p1)
{
    int row = td_block_row(j, b);
    packs[td_block_row(j, b + 1) - row](j, row, p0, p1);
}
#else
/* The 16 dwords at `from` are one pair of each row of the block; `rows` of them are real. */
TD_INLINE void store_pair(uint32_t *to, const uint32_t *from, int rows)
{
#if NATIVE_DP
    _mm512_mask_storeu_epi32(to, mask16(rows), _mm512_loadu_si512(from));
#else
    for (int m = 0; m < rows; m++) {
        to[m] = from[m] & 0xffff0000u; /* odd first: the order of the chain */
        to[rows + m] = from[m] << 16;
    }
#endif
}

/* Rounds pairs [p0, p1) of the rows of block b to bf16 and interleaves them, 16 pairs at a time. */
TD_NOINLINE void pack_strip(const td_gemm_job *j, int b, int p0, int p1)
{
    int row = td_block_row(j, b), rows = td_block_row(j, b + 1) - row, K = j->w->K;
    uint32_t in[16][16] __attribute__((aligned(64))) = {{0}}, out[16][16] __attribute__((aligned(64)));
    const uint32_t *lines[16];
    for (int i = 0; i < 16; i++) lines[i] = in[i];
    uint32_t *to = j->packed + (size_t)row * j->steps * XD;
    for (int p = p0; p < p1; p += 16) {
        for (int m = 0; m < rows; m++) {
            const float *x = j->x + (size_t)(row + m) * j->ldx + 2 * p;
            bool whole = 2 * p + 32 <= K;
            store_bf16_16((uint16_t *)in[m], whole ? v16_load(x) : v16_load_n(x, K - 2 * p));
            store_bf16_16((uint16_t *)in[m] + 16,
                          whole ? v16_load(x + 16) : v16_load_n(x + 16, K - 2 * p - 16));
        }
        transpose_16x16(lines, 0, &out[0][0], 16);
        for (int k = 0; k < 16 && p + k < p1; k++)
            store_pair(to + (size_t)(p + k) * XD * (size_t)rows, out[k], rows);
    }
}

#endif

static void pack(const td_gemm_job *j, int block, int p0, int p1)
{
    unsigned fp = td_fp_enter();
    pack_strip(j, block, p0, p1);
    td_fp_leave(fp);
}

/* ---- panels ---- */

/* Sums of a ragged last panel go through a buffer; same additions in the same order. */
static void store_ragged(const td_gemm_job *j, int row, int rows, int n0, const float *buf)
{
    const float *bias = j->w->bias;
    for (int m = 0; m < rows; m++)
        for (int n = n0; n < j->w->N; n++) {
            float *y = j->y + (size_t)(row + m) * j->ldy + n, v = buf[m * TD_PANEL + n - n0];
            if (bias) v = v + bias[n];
            *y = j->add ? *y + v : v;
        }
}

/* All rows against one panel. */
static void whole_panel(const td_gemm_job *j, int p)
{
    float buf[MR_MAX * TD_PANEL] __attribute__((aligned(64)));
    int n0 = p * TD_PANEL;
    bool ragged = n0 + TD_PANEL > j->w->N;
    const uint8_t *panel = (const uint8_t *)j->w->p + (size_t)p * td_panel_bytes(j->w->K);
    for (int b = 0; b < j->n_blocks; b++) {
        int row = td_block_row(j, b), rows = td_block_row(j, b + 1) - row, width = NV_OF(rows) * LANES;
        tile_arg t = {.a = j->packed + (size_t)row * j->steps * XD, .slices = j->slices};
        t.steps = j->steps / (size_t)j->slices;
        t.add = j->add && !ragged;
        t.ldc = ragged ? TD_PANEL : j->ldy;
        for (int col = 0; col < TD_PANEL; col += width) {
            t.b = panel + col * 4;
            t.c = ragged ? buf + col : j->y + (size_t)row * j->ldy + n0 + col;
            t.bias = j->w->bias && !ragged ? j->w->bias + n0 + col : NULL;
            tile_of(j->T, rows)(&t);
        }
        if (ragged) store_ragged(j, row, rows, n0, buf);
    }
}

#if PIECE
enum { PACED = 16 }; /* tiles that share the fetching of the next piece */

/* One panel under way. */
typedef struct walk {
    const td_gemm_job *j;
    piece p;
    int n0, tiles;              /* first column; how many tiles fetch */
    int row[PART_BLOCKS + 1];   /* of each block */
    float *state;
} walk;

/* The block of rows b over the piece whose weights begin at w, k pairs into K: both halves of the panel. */
TD_INLINE void block_piece(walk *at, int b, const uint8_t *w, size_t k)
{
    float buf[MR_MAX * TD_PANEL] __attribute__((aligned(64)));
    const td_gemm_job *j = at->j;
    piece *p = &at->p;
    int row = at->row[b], rows = at->row[b + 1] - row, n0 = at->n0;
    bool ragged = n0 + TD_PANEL > j->w->N, last = p->ends && p->first + p->n == j->slices;
    size_t steps = p->t.steps * (size_t)p->n;
    p->t.a = j->packed + ((size_t)row * j->steps + k * (size_t)rows) * XD;
    for (int h = 0; h < 2; h++) {
        int i = 2 * b + h, col = h * NV_HALF * LANES;
        if (i == at->tiles) p->pace = 0;
        p->state = at->state + i * STATE;
        p->next = w + steps * (TD_PANEL * 4 + p->pace * (size_t)i);
        p->t.b = w + col * 4;
        p->t.c = ragged ? buf + col : j->y + (size_t)row * j->ldy + n0 + col;
        p->t.bias = j->w->bias && !ragged ? j->w->bias + n0 + col : NULL;
        pieces[rows](p);
    }
    if (ragged && last) store_ragged(j, row, rows, n0, buf);
}

/* All rows against one panel, a piece of it at a time: slices in several pieces, or several slices to a piece. */
TD_NOINLINE void piecewise_panel(const td_gemm_job *j, int n)
{
    float state[2 * PART_BLOCKS * STATE] __attribute__((aligned(64)));
    size_t slice = j->steps / (size_t)j->slices, most = j->T <= NEAR_ROWS ? NEAR : PIECE,
           runs = (slice + most - 1) / most, run = (slice + runs - 1) / runs;
    int together = slice < most ? (int)(most / slice) : 1;
    const uint8_t *panel = (const uint8_t *)j->w->p + (size_t)n * td_panel_bytes(j->w->K);
    walk at = {.j = j, .n0 = n * TD_PANEL, .tiles = TD_MIN(2 * j->n_blocks, PACED), .state = state};
    bool ragged = at.n0 + TD_PANEL > j->w->N;
    size_t pace = (size_t)((TD_PANEL * 4 + at.tiles - 1) / at.tiles);
    piece *p = &at.p;
    p->t = (tile_arg){.slices = j->slices, .add = j->add && !ragged, .ldc = ragged ? TD_PANEL : j->ldy};
    for (int b = 0; b <= j->n_blocks; b++) at.row[b] = td_block_row(j, b);
    for (p->first = 0; p->first < j->slices; p->first += p->n)
        for (size_t k = 0; k < slice; k += run) {
            size_t from = (size_t)p->first * slice + k;
            p->n = TD_MIN(j->slices - p->first, together);
            p->t.steps = TD_MIN(slice - k, run);
            p->begun = k > 0, p->ends = k + p->t.steps == slice, p->pace = pace;
            for (int b = 0; b < j->n_blocks; b++) block_piece(&at, b, panel + from * TD_PANEL * 4, from);
        }
}

TD_INLINE void run_panel(const td_gemm_job *j, int n)
{
    if (j->T <= QUIET_ROWS) whole_panel(j, n);
    else piecewise_panel(j, n);
}
#else
TD_INLINE void run_panel(const td_gemm_job *j, int n) { whole_panel(j, n); }
#endif

static void panels(const td_gemm_job *j, int first, int end, int member)
{
    (void)member;
    unsigned fp = td_fp_enter();
    for (int p = first; p < end; p++) run_panel(j, p);
    td_fp_leave(fp);
}

#if PIECE
/* Rows at a time: a piece's worth of their x stays in L2. */
static int part_rows(int K)
{
    (void)K;
    return PART_BLOCKS * MR_MAX;
}
#else
enum {
    HOT_BYTES = 3 << 19,   /* packed x that stays close while every panel passes over it */
    PART_LEAST = 96 / XD   /* rows: below, reading the weights would take 2.5 GB/s and more of each core */
};

static int part_rows(int K)
{
    size_t blocks = HOT_BYTES / (td_pairs(K) * XD * 4 * MR_MAX), least = (PART_LEAST + MR_MAX - 1) / MR_MAX;
    return (int)(blocks < least ? least : blocks) * MR_MAX;
}
#endif

static size_t steps_of(const td_weight *w) { return td_pairs(w->K); }

/* Rows in parts of whole blocks: reading the weights once more for each costs less than x from far away. */
static const td_gemm_kind kind = {.block_rows = MR_MAX,
                                  .strip_steps = 64,
                                  .pack_serial = PIECE ? 1 << 13 : 1 << 15,
                                  .steps = steps_of,
                                  .part_rows = part_rows,
                                  .pack = pack,
                                  .panels = panels};

static void linear(td_pool *pool, void *scratch, const td_weight *w, const float *x, size_t ldx, int T,
                   float *y, size_t ldy, bool add)
{
    td_gemm_drive(&kind, pool, scratch, w, x, ldx, T, y, ldy, add);
}

/* ---- sums of several ranks' parts ---- */

typedef struct tree_job {
    const float *parts, *bias;
    float *y;
    size_t part_stride, ld, ldy;
    int n_parts, N, rows, T;
    bool add;
} tree_job;

TD_INLINE v16 tree_16(const tree_job *j, const float *p, int n)
{
    v16 v[TD_MAX_SLICES];
    for (int i = 0; i < j->n_parts; i++)
        v[i] = n >= 16 ? v16_load(p + (size_t)i * j->part_stride)
                       : v16_load_n(p + (size_t)i * j->part_stride, n);
    for (int step = 1; step < j->n_parts; step *= 2)
        for (int i = 0; i + step < j->n_parts; i += 2 * step) v[i] = v16_add(v[i], v[i + step]);
    return v[0];
}

static void tree_rows(void *arg, int item, int member)
{
    (void)member;
    const tree_job *j = arg;
    unsigned fp = td_fp_enter();
    for (int t = item * j->rows; t < (item + 1) * j->rows && t < j->T; t++)
        for (int n = 0; n < j->N; n += 16) {
            int lanes = j->N - n;
            float *y = j->y + (size_t)t * j->ldy + n;
            v16 v = tree_16(j, j->parts + (size_t)t * j->ld + n, lanes);
            if (j->bias) v = v16_add(v, v16_load_n(j->bias + n, lanes));
            if (j->add) v = v16_add(v16_load_n(y, lanes), v);
            v16_store_n(y, v, lanes);
        }
    td_fp_leave(fp);
}

static void sum_tree(td_pool *pool, const float *parts, size_t part_stride, int n_parts, int T, int N, size_t ld,
                     const float *bias, float *y, size_t ldy, bool add)
{
    tree_job j = {parts, bias, y, part_stride, ld, ldy, n_parts, N, 0, T, add};
    j.rows = td_rows_per_item(T, (size_t)N * (size_t)n_parts);
    td_pool_for(pool, (T + j.rows - 1) / j.rows, tree_rows, &j);
}

void GEMM_FILL(td_ops *t)
{
    t->weight_dtype = TD_BF16;
    t->layout = TD_LAYOUT_PANEL32_BF16;
    t->packed_dtype = td_panel_dtype;
    t->packed_bytes = td_panel_packed_bytes;
    t->pack = td_panel_pack;
    t->scratch_bytes = td_x86_scratch_bytes;
    t->embed_packed = td_panel_embed;
    t->linear = linear;
    t->sum_tree = sum_tree;
}
