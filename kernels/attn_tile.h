/* kernels/attn_tile.h - paged attention for the x86 families; included once per instruction set by
 * attn_avx*.c.
 *
 * The includer defines:  ATTN_FILL   name of the fill function
 *                        ATTN_TILES  products on the tiles of AMX (attn_amx_tile.h); if not, in vectors (attn_dots.h):
 *                        NATIVE_DP   1: vdpbf16ps; 0: two fused multiply-adds with the same bits
 *                        NV_MAX      vectors per row in the inner product tile (rows x NV_MAX accumulators)
 * An item is (sequence, kv head, up to 512 rows); a row is one query head of one token. For each tile of 64
 * keys at an absolute multiple of 64 the item copies K as [D/2][64] pairs and V as [32][D] pairs into its
 * scratch, whatever the page size, and runs its rows over it four at a time.
 * Rules:   1. A row's arithmetic is the same in every company: scores are chains over D pairs, P V chains
 *             over key pairs in order, tiles in order, state in f32.
 *          2. A masked key contributes an exact 0 to the sum and to P V, so a tile that is all masked for a row
 *             leaves its bits alone, computed or skipped.
 *          3. A masked key that is not finite never meets a row (guarded_row).
 *          4. Keys outside [first key of the item, last key] are zeros, never read.
 *          5. Keys are taken split by split (ops.h): each starts anew, and its (m, l, o) is merged into the total of
 *             those before. A part without keys is m = M_START, l = 0, o = 0, and merging it changes nothing.
 * Source:  online softmax, algorithms notes 7.2, in base 2: scale x log2 e is folded into q before it is
 *          rounded to bf16. */
// SPDX-License-Identifier: Apache-2.0
#include "kernels/simd.h"
#include "kernels/x86.h"
#include <math.h>

#ifndef ATTN_TILES
#define ATTN_TILES 0
#endif
#if ATTN_TILES
#define PAIRED 1
#else
#define PAIRED NATIVE_DP
#endif
enum { TILE = TD_ATTN_TILE, PAIRS = TILE / 2, MR = 4, ROWS = TD_ATTN_ROWS, AHEAD = 2 /* tiles prefetched */ };
/* Dwords of a pair of q or P: without vdpbf16ps both stay f32, rounded to bf16, and nothing of them is unpacked in the inner
 * loop. */
enum { XD = PAIRED ? 1 : 2 };
/* Rows that are multiplied together; buffers of MR rows' scores and P, of two such groups. */
enum { GROUP = ATTN_TILES ? 32 : MR, BUFFERS = 2 * GROUP / MR };
#define M_START -1e30f /* finite: a row that has seen only masked keys must not compute inf - inf */

typedef struct space {
    uint32_t *k, *v;   /* [D/2][64], [32][D]: pairs of bf16; D of k and q padded */
    uint32_t *q;       /* [ROWS][D/2][XD] */
    float *o, *m, *l;  /* [ROWS][D], [ROWS], [ROWS]: of the split at hand */
    float *all_o, *all_m, *all_l; /* of the splits before it */
    float *s;          /* [BUFFERS][MR][64] scores */
    uint32_t *p;       /* [BUFFERS][MR][32][XD] */
} space;

typedef struct attn_job {
    const td_attn_args *a;
    int split;
    char *scratch;
    size_t member_bytes;
    int32_t *first_item; /* [n_seq + 1] */
    int group;           /* query heads per kv head */
    int rows;            /* of an item, at most: many, but a few items for each member */
} attn_job;

/* What an item works on. Keys are absolute; k0 of a tile is a multiple of 64. */
typedef struct item {
    const td_attn_args *a;
    const td_attn_seq *seq;
    space sp;
    int g, group, row0, n_rows; /* rows of the sequence's (token, head) list */
    int key_lo, key_hi;         /* of all rows together */
    int split;
    int *tiles;                 /* AMX: rows they are configured for, 0 at first */
    int pos[ROWS];              /* of each row */
} item;

static const uint16_t zero_row[TD_MAX_HEAD_DIM] __attribute__((aligned(64)));

/* D of q and K: runs of 32 on tiles. */
TD_INLINE size_t padded(int D)
{
    return ATTN_TILES ? ((size_t)D + 31) & ~(size_t)31 : (size_t)D;
}

static space carve(char *at, int D)
{
    size_t d = (size_t)D, rows = (size_t)td_attn_rows(D);
    space s;
    s.k = (uint32_t *)at, at += TILE * padded(D) * 2;
    s.v = (uint32_t *)at, at += TILE * d * 2;
    s.o = (float *)at, at += rows * d * 4;
    s.all_o = (float *)at, at += rows * d * 4;
    s.q = (uint32_t *)at, at += rows * padded(D) * 2 * XD;
    s.s = (float *)at, at += BUFFERS * MR * TILE * 4;
    s.p = (uint32_t *)at, at += BUFFERS * MR * TILE * 2 * XD;
    s.m = (float *)at, at += (rows + MR) * 4; /* softmax_rows reads four, of m and of l */
    s.l = (float *)at, at += (rows + MR) * 4;
    s.all_m = (float *)at, at += (rows + MR) * 4;
    s.all_l = (float *)at;
    return s;
}

/* ---- one tile of keys and values into scratch ---- */

/* Pointers to the K rows of keys k0 .. k0+63 (V lies v_half elements behind), zero_row outside the item's
 * keys. */
static void find_rows(const item *it, int k0, const uint16_t *rows[TILE])
{
    const td_kv *kv = it->a->kv;
    int P = kv->P, lo = it->key_lo > k0 ? it->key_lo - k0 : 0,
        hi = it->key_hi - k0 < TILE ? it->key_hi - k0 : TILE;
    int u = k0 / it->split; /* keys that are not in these pages */
    int elsewhere = it->a->part ? (u - u / it->a->ranks + it->a->part0) * it->split : 0;
    for (int i = 0; i < lo; i++) rows[i] = zero_row;
    for (int i = hi; i < TILE; i++) rows[i] = zero_row;
    for (int i = lo; i < hi;) {
        int at = k0 + i - elsewhere, page = it->seq->pages[at / P], in = at % P,
            n = P - in < hi - i ? P - in : hi - i;
        const uint16_t *row = zero_row;
        size_t step = 0;
        if (page >= 0) {
            step = (size_t)kv->D;
            row = (const uint16_t *)td_kv_page(kv, it->a->slot, page) +
                  ((size_t)it->g * (size_t)P + (size_t)in) * step;
        }
        for (int e = i + n; i < e; i++, row += step) rows[i] = row;
    }
}

/* The copies touch the same lines of the tile two ahead: one burst of prefetches would only queue up in front
 * of the work. */
TD_INLINE void touch(const uint16_t *p, size_t elements)
{
    _mm_prefetch((const char *)((uintptr_t)p + elements * 2), _MM_HINT_T1);
}

/* D = 16: a row is half a vector, so the rows pass through a block of whole vectors. */
TD_NOINLINE void copy_k_16(const item *it, const uint16_t *const rows[TILE])
{
    uint32_t in[16][16] __attribute__((aligned(64))) = {{0}}, out[16][16] __attribute__((aligned(64)));
    const uint32_t *lines[16];
    for (int c = 0; c < TILE; c += 16) {
        for (int i = 0; i < 16; i++) lines[i] = memcpy(in[i], rows[c + i], 32);
        transpose_16x16(lines, 0, &out[0][0], 16);
        for (int k = 0; k < 8; k++) memcpy(it->sp.k + k * TILE + c, out[k], sizeof out[k]);
    }
}

/* Pairs in the outer loop: the other way round the compiler keeps 16 row pointers alive across it. */
static void copy_k(const item *it, const uint16_t *const rows[TILE], const uint16_t *const ahead[TILE])
{
    int pairs = it->a->D / 2;
    for (int k = 0; k < pairs; k += 16) {
        int at = k + 16 <= pairs ? k : pairs - 16; /* a last half block repeats what is there */
        uint32_t *to = it->sp.k + at * TILE;
        for (int c = 0; c < TILE; c += 16) {
            if (ahead)
                TD_UNROLL for (int i = 0; i < 16; i++) touch(ahead[c + i], 2 * (size_t)at);
            transpose_16x16((const uint32_t *const *)(const void *)(rows + c), (size_t)at, to + c, TILE);
        }
    }
}

static void copy_v(const item *it, const uint16_t *const rows[TILE], const uint16_t *const ahead[TILE])
{
    const td_kv *kv = it->a->kv;
    int D = it->a->D, wide = D & ~31;
    size_t v_half = (size_t)kv->G * (size_t)kv->P * (size_t)D;
    uint32_t *to = it->sp.v;
    for (int j = 0; j < PAIRS; j++, to += D) {
        const uint16_t *a = rows[2 * j], *b = rows[2 * j + 1];
        if (a != zero_row) a += v_half;
        if (b != zero_row) b += v_half;
        for (int d = 0; d < wide; d += 32) {
            if (ahead) touch(ahead[2 * j], v_half + (size_t)d), touch(ahead[2 * j + 1], v_half + (size_t)d);
            interleave_32(to + d, a + d, b + d);
        }
        if (wide < D) interleave_16(to + wide, a + wide, b + wide);
    }
}

/* Is a value of the copied V tile infinite or NaN? */
static bool v_special(const item *it)
{
    bool found = false;
    for (int i = 0; i < PAIRS * it->a->D; i += 16) found |= special_32(it->sp.v + i);
    return found;
}

/* ---- rows ---- */

TD_INLINE void store_x_16(uint32_t *p, v16 v)
{
#if !PAIRED
    v16_store((float *)p, v16_round_bf16(v));
#else
    store_bf16_16((uint16_t *)p, v);
#endif
}

TD_INLINE void store_exp2_32(uint32_t *p, v16 a, v16 b)
{
#if !PAIRED
    v16_store((float *)p, v16_round_exp2(a));
    v16_store((float *)p + 16, v16_round_exp2(b));
#else
    store_bf16_32((uint16_t *)p, a, b);
#endif
}

/* Valid keys of row r in the tile at k0, as a range of 0..64; empty: lo >= hi. */
TD_INLINE void valid_keys(const item *it, int r, int k0, int *lo, int *hi)
{
    int pos = it->pos[r], w = it->a->window;
    int first = w > 0 && pos + 1 > w ? pos + 1 - w : 0;
    *lo = first > k0 ? first - k0 : 0;
    *hi = pos + 1 - k0 < TILE ? pos + 1 - k0 : TILE;
    if (*lo > TILE) *lo = TILE;
    if (*hi < 0) *hi = 0;
}

/* Scores of four rows to P (of the group's buffer), running maxima and sums; alpha: what each output so far must
 * be multiplied by. All four are computed (rows from n on from whatever lies in the buffer), n are kept. lo, hi:
 * valid keys of each row. */
TD_NOINLINE void softmax_rows(const space *sp, int buffer, int r, int n, const int *lo, const int *hi, bool whole,
                              float *alpha)
{
    const float *s = sp->s + buffer * MR * TILE;
    uint32_t *p = sp->p + buffer * MR * PAIRS * XD;
    v16 x[MR][4], fold[MR], none = v16_set1(-INFINITY);
    TD_UNROLL for (int i = 0; i < MR; i++) {
        TD_UNROLL for (int c = 0; c < 4; c++) {
            x[i][c] = v16_load(s + i * TILE + 16 * c);
            if (!whole) x[i][c] = v16_keep(x[i][c], lo[i] - 16 * c, hi[i] - 16 * c, none);
        }
        fold[i] = v16_max(v16_max(x[i][0], x[i][1]), v16_max(x[i][2], x[i][3]));
    }
    __m128 old = _mm_loadu_ps(sp->m + r), m = _mm_max_ps(v16_max4(fold), old); /* old where a score is NaN */
    __m128 a = v16_first4(v16_exp2(v16_from4(_mm_sub_ps(old, m)))), each[MR];
    each[0] = m, each[1] = _mm_shuffle_ps(m, m, 0x55), each[2] = _mm_shuffle_ps(m, m, 0xaa),
    each[3] = _mm_shuffle_ps(m, m, 0xff);
    TD_UNROLL for (int i = 0; i < MR; i++) {
        v16 vm = v16_lane(each[i]);
        TD_UNROLL for (int c = 0; c < 4; c++) {
            x[i][c] = v16_exp2(v16_sub(x[i][c], vm));
            if (!whole) x[i][c] = v16_keep(x[i][c], lo[i] - 16 * c, hi[i] - 16 * c, v16_zero());
        }
        store_exp2_32(p + i * PAIRS * XD, x[i][0], x[i][1]);
        store_exp2_32(p + (i * PAIRS + 16) * XD, x[i][2], x[i][3]);
        fold[i] = v16_add(v16_add(x[i][0], x[i][1]), v16_add(x[i][2], x[i][3]));
    }
    float new_m[MR], new_l[MR];
    _mm_storeu_ps(alpha, a);
    _mm_storeu_ps(new_m, m);
    _mm_storeu_ps(new_l, _mm_add_ps(_mm_mul_ps(_mm_loadu_ps(sp->l + r), a), v16_sum4(fold)));
    for (int i = 0; i < n; i++) sp->m[r + i] = new_m[i], sp->l[r + i] = new_l[i];
}

#if ATTN_TILES
#include "kernels/attn_amx_tile.h"
#else
#include "kernels/attn_dots.h"
#endif

static void run_tile(const item *it, int k0, const uint16_t *const rows[TILE],
                     const uint16_t *const ahead[TILE])
{
    if (it->a->D < 32) copy_k_16(it, rows);
    else copy_k(it, rows, ahead);
    copy_v(it, rows, ahead);
    int first_pos = it->pos[0], last_pos = it->pos[it->n_rows - 1];
    if (k0 + TILE <= first_pos + 1 && (it->a->window <= 0 || last_pos - it->a->window + 1 <= k0)) {
        whole_tile(it);
        return;
    }
    /* Rows of one token share their keys, and the others are zeros. */
    bool bad = first_pos != last_pos && v_special(it);
    for (int r = 0; r < it->n_rows; r += GROUP) {
        int n = it->n_rows - r < GROUP ? it->n_rows - r : GROUP, lo, hi, first, last;
        valid_keys(it, r, k0, &lo, &last);
        valid_keys(it, r + n - 1, k0, &first, &hi); /* later rows see later keys: [lo, hi) spans the group */
        if (lo >= hi) continue;
        if (!bad) {
            row_group(it, r, n, k0, lo, hi);
            continue;
        }
        for (int i = 0; i < n; i++) {
            valid_keys(it, r + i, k0, &lo, &hi);
            if (lo < hi) guarded_row(it, r + i, k0, lo, hi);
        }
    }
}

static void start_rows(item *it)
{
    const td_attn_args *a = it->a;
    int D = a->D;
    size_t width = padded(D);
    v16 scale = v16_set1(a->scale * 1.44269504f);
    memset(it->sp.k + D / 2 * TILE, 0, (width - (size_t)D) * TILE * 2);
    for (int r = 0; r < it->n_rows; r++) {
        int at = it->row0 + r;
        it->pos[r] = it->seq->pos0 + at / it->group;
        const float *q = a->q + (size_t)(it->seq->row0 + at / it->group) * a->ldq +
                         (size_t)(it->g * it->group + at % it->group) * (size_t)D;
        for (int d = 0; d < D; d += 16)
            store_x_16(it->sp.q + ((size_t)r * width + (size_t)d) / 2 * XD, v16_mul(v16_load(q + d), scale));
        if (width > (size_t)D) memset(it->sp.q + ((size_t)r * width + (size_t)D) / 2 * XD, 0, 32);
    }
}

static void start_split(const item *it)
{
    int D = it->a->D;
    for (int r = 0; r < it->n_rows; r++) {
        for (int d = 0; d < D; d += 16) v16_store(it->sp.o + r * D + d, v16_zero());
        it->sp.m[r] = M_START;
        it->sp.l[r] = 0;
    }
}

/* (m, l, o) becomes (m, l, o) with (m2, l2, o2) after it. */
TD_INLINE void merge_part(float *m, float *l, float *o, float m2, float l2, const float *o2, int D)
{
    float top = m2 > *m ? m2 : *m, w[16];
    v16 a, b;
    v16_store(w, v16_exp2(v16_set1(*m - top)));
    a = v16_set1(w[0]);
    *l *= w[0];
    v16_store(w, v16_exp2(v16_set1(m2 - top)));
    b = v16_set1(w[0]);
    *l += l2 * w[0];
    *m = top;
    for (int d = 0; d < D; d += 16)
        v16_store(o + d, v16_add(v16_mul(v16_load(o + d), a), v16_mul(v16_load(o2 + d), b)));
}

/* The split is done: into the total, which is the first split's own state at first. */
static void end_split(item *it, bool first)
{
    space *s = &it->sp;
    int D = it->a->D;
    if (first) {
        float *o = s->o, *m = s->m, *l = s->l;
        s->o = s->all_o, s->m = s->all_m, s->l = s->all_l;
        s->all_o = o, s->all_m = m, s->all_l = l;
        return;
    }
    for (int r = 0; r < it->n_rows; r++)
        merge_part(&s->all_m[r], &s->all_l[r], s->all_o + r * D, s->m[r], s->l[r], s->o + r * D, D);
}

TD_INLINE void write_out(float *out, const float *o, float l, int D)
{
    v16 inverse = v16_set1(1.0f / l);
    for (int d = 0; d < D; d += 16) /* + 0: one sign of zero, whatever zeros were added on the way */
        v16_store(out + d, v16_add(v16_mul(v16_load(o + d), inverse), v16_zero()));
}

static void finish_rows(const item *it)
{
    const td_attn_args *a = it->a;
    int D = a->D;
    for (int r = 0; r < it->n_rows; r++) {
        int at = it->row0 + r;
        write_out(a->out + (size_t)(it->seq->row0 + at / it->group) * a->ldo +
                      (size_t)(it->g * it->group + at % it->group) * (size_t)D,
                  it->sp.all_o + r * D, it->sp.all_l[r], D);
    }
}

/* Part p of every row, to where parts are collected. */
static void store_parts(const item *it, int p)
{
    const td_attn_args *a = it->a;
    size_t D = (size_t)a->D;
    for (int r = 0; r < it->n_rows; r++) {
        int at = it->row0 + r;
        size_t row = (size_t)(it->seq->row0 + at / it->group), h = (size_t)(it->g * it->group + at % it->group);
        float *to = a->part + ((row * (size_t)a->n_parts + (size_t)p) * (size_t)a->H + h) * (D + 2);
        to[0] = it->sp.m[r];
        to[1] = it->sp.l[r];
        memcpy(to + 2, it->sp.o + (size_t)r * D, D * sizeof *to);
    }
}

TD_INLINE int blocks_of(const attn_job *j, const td_attn_seq *s)
{
    return (s->n_rows * j->group + j->rows - 1) / j->rows;
}

/* Tiles in ascending order; of parts, those of this rank's splits. */
TD_INLINE int from_tile(const item *it, int k0)
{
    int S = it->split, ranks = it->a->part ? it->a->ranks : 1,
        skip = ranks > 1 ? (it->a->rank - k0 / S % ranks + ranks) % ranks : 0;
    return skip ? (k0 / S + skip) * S : k0;
}

/* Each split begins anew; two tiles ahead are prefetched across splits. */
static void run_tiles(item *it)
{
    const uint16_t *rows[AHEAD + 1][TILE];
    int at[AHEAD + 1], n = 0, begun = 0; /* at: first keys of the tiles in rows; begun: parts */
    for (int k = from_tile(it, it->key_lo / TILE * TILE); n < AHEAD && k < it->key_hi; k = from_tile(it, k + TILE))
        {
        at[n] = k;
        find_rows(it, k, rows[n++]);
    }
    start_split(it);
    bool first = true;
    for (int t = 0; n > 0; t = (t + 1) % (AHEAD + 1)) {
        int k0 = at[t], last = at[(t + n - 1) % (AHEAD + 1)], next = from_tile(it, last + TILE),
            slot = (t + n) % (AHEAD + 1);
        bool more = next < it->key_hi && n == AHEAD;
        if (more) find_rows(it, at[slot] = next, rows[slot]);
        if (it->a->part)
            for (int p = k0 / it->split / it->a->ranks - it->a->part0; begun < p; begun++)
                store_parts(it, begun); /* none of its keys */
        run_tile(it, k0, rows[t], more ? rows[slot] : NULL);
        n += more - 1;
        if (n && at[(t + 1) % (AHEAD + 1)] / it->split == k0 / it->split) continue;
        if (it->a->part) store_parts(it, begun++);
        else end_split(it, first);
        first = false;
        start_split(it);
    }
    for (; it->a->part && begun < it->a->n_parts; begun++) store_parts(it, begun);
}

static void run_item(void *arg, int i, int member)
{
    const attn_job *j = arg;
    const td_attn_args *a = j->a;
    int lo = 0, hi = a->n_seq; /* the sequence: last with first_item <= i */
    while (hi - lo > 1) {
        int mid = (lo + hi) / 2;
        if (j->first_item[mid] <= i) lo = mid;
        else hi = mid;
    }
    const td_attn_seq *seq = &a->seq[lo];
    int at = i - j->first_item[lo], block = blocks_of(j, seq) - 1 - at / a->G; /* longest first */
    item it;
    it.a = a, it.seq = seq, it.g = at % a->G, it.group = j->group, it.row0 = block * j->rows;
    it.n_rows = seq->n_rows * j->group - it.row0 < j->rows ? seq->n_rows * j->group - it.row0 : j->rows;
    int first_pos = seq->pos0 + it.row0 / it.group;
    it.key_hi = seq->pos0 + (it.row0 + it.n_rows - 1) / it.group + 1;
    it.key_lo = a->window > 0 && first_pos + 1 > a->window ? first_pos + 1 - a->window : 0;
    if (a->part) { /* of this rank's splits, those that are asked for */
        int first = (a->part0 * a->ranks + a->rank) * j->split, end = ((a->part0 + a->n_parts - 1) * a->ranks + a->rank + 1) * j->split;
        if (it.key_lo < first) it.key_lo = first;
        if (it.key_hi > end) it.key_hi = end;
    }
    it.sp = carve(j->scratch + (size_t)member * j->member_bytes, a->D);
    it.split = j->split;
    int tiles = 0;
    it.tiles = &tiles;
    unsigned fp = td_fp_enter();
    start_rows(&it);
    run_tiles(&it);
    if (!a->part) finish_rows(&it);
#if ATTN_TILES
    td_tile_release();
#endif
    td_fp_leave(fp);
}

static void merge_item(void *arg, int i, int member)
{
    (void)member;
    const td_merge_args *a = arg;
    size_t D = (size_t)a->D, unit = D + 2,
           at = ((size_t)(i / a->H) * (size_t)a->n_parts * (size_t)a->H + (size_t)(i % a->H)) * unit;
    float o[TD_MAX_HEAD_DIM], m = M_START, l = 0;
    const float *before = a->before ? a->before + (size_t)i * unit : NULL;
    bool any = before && before[1] != 0;
    unsigned fp = td_fp_enter();
    if (any) m = before[0], l = before[1], memcpy(o, before + 2, D * sizeof *o);
    for (int u = 0; u < a->n_parts * a->ranks; u++) {
        const float *part = a->part[u % a->ranks] + at + (size_t)(u / a->ranks) * (size_t)a->H * unit;
        if (part[1] == 0) continue; /* no keys; NaN is not 0 */
        if (any) {
            merge_part(&m, &l, o, part[0], part[1], part + 2, a->D);
            continue;
        }
        any = true;
        m = part[0], l = part[1];
        memcpy(o, part + 2, D * sizeof *o);
    }
    if (!any) memset(o, 0, sizeof o);
    float *state = a->state ? a->state + (size_t)i * unit : NULL;
    if (state) state[0] = m, state[1] = l, memcpy(state + 2, o, D * sizeof *o);
    else write_out(a->out + (size_t)(i / a->H) * a->ldo + (size_t)(i % a->H) * D, o, l, a->D);
    td_fp_leave(fp);
}

static void attn_merge(td_pool *pool, const td_merge_args *a)
{
    td_pool_for(pool, a->T * a->H, merge_item, (void *)(uintptr_t)a);
}

enum { ROWS_LEAST = 64, ITEMS_EACH = 4 };

/* Numbers the items; returns how many there are. */
static int plan_items(attn_job *j)
{
    const td_attn_args *a = j->a;
    int n = 0;
    for (int s = 0; s < a->n_seq; s++) {
        j->first_item[s] = n;
        n += blocks_of(j, &a->seq[s]) * a->G;
    }
    return n;
}

static void attention(td_pool *pool, void *scratch, const td_attn_args *a)
{
    attn_job j = {.a = a,
                  .split = a->split ? a->split : TD_ATTN_SPLIT,
                  .scratch = scratch,
                  .member_bytes = td_round64(td_attn_member_bytes(a->D)),
                  .group = a->H / a->G};
    j.first_item = (int32_t *)(void *)(j.scratch + (size_t)td_pool_size(pool) * j.member_bytes);
    j.rows = td_attn_rows(a->D);
    int n = plan_items(&j);
    for (; n < ITEMS_EACH * td_pool_size(pool) && j.rows > ROWS_LEAST; n = plan_items(&j)) j.rows /= 2;
    td_pool_for(pool, n, run_item, &j);
}

void ATTN_FILL(td_ops *t)
{
    t->kv_dtype = TD_BF16;
    t->attention = attention;
    t->attn_merge = attn_merge;
}
