// SPDX-License-Identifier: Apache-2.0
/* Attention of every family: against double, and the same bits for every page size, chunking, team and
 * company of rows; of the x86 families, the bits on record. Pages hold NaN wherever nothing was appended yet. */
#include "common/crc.h"
#include "tests/kernels/case_attn.h"
#include "tests/kernels/support.h"

#ifndef TEST_X86_LAW
#define TEST_X86_LAW 1 /* 0: a family whose scores are rounded otherwise */
#endif
enum { MAX_SEQ = 3, SLOT = 1, SLOTS = 2 };

typedef struct world {
    attn_case c;
    int n_seq, len[MAX_SEQ], row0[MAX_SEQ], rows;
    float *q, *k, *v; /* [rows][H*D], [rows][G*D] */
} world;

static world world_open(attn_case c)
{
    world w = {.c = c, .n_seq = MAX_SEQ};
    int len[MAX_SEQ] = {c.tokens, 1, c.tokens / 3};
    for (int s = 0; s < MAX_SEQ; s++) w.len[s] = len[s], w.row0[s] = w.rows, w.rows += len[s];
    size_t q = (size_t)w.rows * (size_t)(c.H * c.D), kv = (size_t)w.rows * (size_t)(c.G * c.D);
    w.q = floats(q), w.k = floats(kv), w.v = floats(kv);
    rnd_fill(w.q, q, 11, 2), rnd_fill(w.k, kv, 12, 1), rnd_fill(w.v, kv, 13, 1);
    return w;
}

static void world_close(world *w)
{
    free(w->q), free(w->k), free(w->v);
}

/* Pages of P tokens in a shuffled order, filled with NaN bytes. */
typedef struct pages {
    td_kv kv;
    int32_t *table[MAX_SEQ];
} pages;

static pages pages_open(const world *w, td_dtype dtype, int P)
{
    pages p = {.kv = {.dtype = dtype, .P = P, .G = w->c.G, .D = w->c.D}};
    int per[MAX_SEQ], next = 0;
    for (int s = 0; s < w->n_seq; s++) p.kv.n_pages += per[s] = (w->len[s] + P - 1) / P;
    p.kv.base = block_alloc((size_t)SLOTS * (size_t)p.kv.n_pages * td_kv_page_bytes(&p.kv));
    for (int s = 0; s < w->n_seq; s++) {
        p.table[s] = malloc((size_t)per[s] * 4);
        for (int i = 0; i < per[s]; i++, next++) p.table[s][i] = (next * 7 + 3) % p.kv.n_pages;
    }
    bool prime = p.kv.n_pages % 7 != 0;
    if (!prime) /* 7 divides the count: fall back to reversed order */
        for (int s = 0, n = p.kv.n_pages; s < w->n_seq; s++)
            for (int i = 0; i < per[s]; i++) p.table[s][i] = --n;
    return p;
}

static void pages_close(pages *p)
{
    free(p->kv.base);
    for (int s = 0; s < MAX_SEQ; s++) free(p->table[s]);
}

static void append(const world *w, pages *p, int s, int from, int to)
{
    size_t D = (size_t)w->c.D, G = (size_t)w->c.G, P = (size_t)p->kv.P, unit = td_dtype_bytes(p->kv.dtype);
    for (int t = from; t < to; t++)
        for (size_t g = 0; g < G; g++) {
            uint8_t *page = td_kv_page(&p->kv, SLOT, p->table[s][t / p->kv.P]);
            size_t at = (g * P + (size_t)(t % p->kv.P)) * D, row = ((size_t)(w->row0[s] + t) * G + g) * D;
            td_convert(page + at * unit, p->kv.dtype, w->k + row, TD_F32, D);
            td_convert(page + (G * P * D + at) * unit, p->kv.dtype, w->v + row, TD_F32, D);
        }
}

#ifndef TEST_PARTS
#define TEST_PARTS 1 /* 0: a family whose splits are not of 64 keys; tests/simt/test_attn_cuda.c has its own */
#endif

enum { MAX_RANKS = 4, SPLIT = 64, MAX_PAGES = 128 };
static int split, ranks; /* of run: 0, 0: as by default; ranks > 0: parts on so many ranks, then merged */
static int parts_most;   /* so many parts at a time */

/* The table of a rank that keeps only its own splits. */
static void local_table(const td_attn_seq *s, int P, int rank, int32_t *out)
{
    int n = (s->pos0 + s->n_rows + P - 1) / P;
    for (int i = 0, t; i < MAX_PAGES; i++, out++) {
        t = (i * P / SPLIT * ranks + rank) * SPLIT + i * P % SPLIT;
        *out = t / P < n ? s->pages[t / P] : -1;
    }
}

/* Parts [part0, part0 + n_parts) of all rows on rank r. */
static float *parts_of(const td_ops *o, td_attn_args a, int P, int r, int part0, int n_parts, size_t n,
                       int threads, void *scratch)
{
    td_attn_seq seq[MAX_SEQ];
    int32_t *tables = malloc((size_t)a.n_seq * MAX_PAGES * sizeof *tables);
    for (int i = 0; i < a.n_seq; i++) {
        seq[i] = a.seq[i];
        local_table(&a.seq[i], P, r, tables + i * MAX_PAGES);
        seq[i].pages = tables + i * MAX_PAGES + part0 * SPLIT / P;
    }
    a.seq = seq, a.rank = r, a.ranks = ranks, a.part0 = part0, a.n_parts = n_parts;
    a.part = floats(n);
    for (size_t i = 0; i < n; i++) a.part[i] = NAN;
    o->attention(team(threads), scratch, &a);
    free(tables);
    return a.part;
}

/* At most `most` parts at a time, merged into what was merged before. */
static void by_parts(const td_ops *o, td_attn_args a, int P, int rows, int most, int threads, void *scratch)
{
    int longest = 0;
    for (int i = 0; i < a.n_seq; i++)
        if (a.seq[i].pos0 + a.seq[i].n_rows > longest) longest = a.seq[i].pos0 + a.seq[i].n_rows;
    int all = ((longest + SPLIT - 1) / SPLIT + ranks - 1) / ranks;
    size_t unit = (size_t)rows * (size_t)a.H * (size_t)(a.D + 2);
    float *state = floats(unit);
    for (int p = 0, n; p < all; p += n) {
        float *part[MAX_RANKS];
        n = all - p < most ? all - p : most;
        for (int r = 0; r < ranks; r++) part[r] = parts_of(o, a, P, r, p, n, unit * (size_t)n, threads, scratch);
        td_merge_args m = {.part = (const float *const *)part,
                           .before = p ? state : NULL,
                           .state = p + n < all ? state : NULL,
                           .out = a.out,
                           .ldo = a.ldo,
                           .T = rows,
                           .H = a.H,
                           .D = a.D,
                           .n_parts = n,
                           .ranks = ranks};
        o->attn_merge(team(threads), &m);
        for (int r = 0; r < ranks; r++) free(part[r]);
    }
    free(state);
}

/* All sequences in steps of at most `chunk` tokens each; out [rows][H*D]. Pages before the window are
 * forgotten (-1) on the way. */
static void run(const td_ops *o, const world *w, int P, int chunk, int threads, float *out)
{
    pages p = pages_open(w, o->kv_dtype, P);
    size_t HD = (size_t)(w->c.H * w->c.D);
    void *scratch = block_alloc(o->scratch_bytes(w->rows, w->c.D, w->c.D, MAX_TEAM));
    float *q = floats((size_t)w->rows * HD), *y = floats((size_t)w->rows * HD);
    for (int done = 0; done < w->c.tokens; done += chunk) {
        td_attn_seq seq[MAX_SEQ];
        int n = 0, rows = 0, from[MAX_SEQ];
        for (int s = w->n_seq - 1; s >= 0; s--) {
            int to = done + chunk < w->len[s] ? done + chunk : w->len[s];
            if (done >= to) continue;
            append(w, &p, s, done, to);
            for (int i = 0; w->c.window && (i + 1) * P <= done - w->c.window + 1; i++) p.table[s][i] = -1;
            seq[n] = (td_attn_seq){rows, to - done, done, p.table[s]};
            memcpy(q + (size_t)rows * HD, w->q + (size_t)(w->row0[s] + done) * HD,
                   (size_t)(to - done) * HD * 4);
            from[n++] = w->row0[s] + done;
            rows += to - done;
        }
        td_attn_args a = {.q = q,
                          .ldq = HD,
                          .out = y,
                          .ldo = HD,
                          .kv = &p.kv,
                          .slot = SLOT,
                          .seq = seq,
                          .n_seq = n,
                          .H = w->c.H,
                          .G = w->c.G,
                          .D = w->c.D,
                          .scale = 1 / sqrtf((float)w->c.D),
                          .window = w->c.window};
        for (size_t i = 0; i < (size_t)rows * HD; i++) y[i] = NAN;
        a.split = split;
        if (ranks) by_parts(o, a, P, rows, parts_most, threads, scratch);
        else o->attention(team(threads), scratch, &a);
        for (int i = 0; i < n; i++)
            memcpy(out + (size_t)from[i] * HD, y + (size_t)seq[i].row0 * HD, (size_t)seq[i].n_rows * HD * 4);
    }
    free(scratch), free(q), free(y);
    pages_close(&p);
}

/* out in double from f32 or bf16 keys and values; `plain`: with q x scale and P rounded to bf16, what any
 * bf16 kernel does. */
static void oracle(const world *w, int s, int t, int h, bool bf16, bool plain, double *out)
{
    int D = w->c.D, g = h / (w->c.H / w->c.G),
        first = w->c.window && t + 1 > w->c.window ? t + 1 - w->c.window : 0;
    double *p = malloc((size_t)(t + 1) * sizeof *p), top = -1e300, sum = 0;
    double scale = 1 / sqrt((double)D);
    for (int j = first; j <= t; j++) {
        const float *k = w->k + ((size_t)(w->row0[s] + j) * (size_t)w->c.G + (size_t)g) * (size_t)D;
        const float *q = w->q + (size_t)(w->row0[s] + t) * (size_t)(w->c.H * D) + (size_t)(h * D);
        p[j] = 0;
        for (int d = 0; d < D; d++) {
            double qd = (double)q[d] * scale,
                   kd = (double)(bf16 ? td_bf16_to_f32(td_f32_to_bf16(k[d])) : k[d]);
            if (plain) qd = (double)td_bf16_to_f32(td_f32_to_bf16((float)qd));
            p[j] += qd * kd;
        }
        if (p[j] > top) top = p[j];
    }
    for (int d = 0; d < D; d++) out[d] = 0;
    for (int j = first; j <= t; j++) {
        const float *v = w->v + ((size_t)(w->row0[s] + j) * (size_t)w->c.G + (size_t)g) * (size_t)D;
        double e = exp(p[j] - top), r = plain ? (double)td_bf16_to_f32(td_f32_to_bf16((float)e)) : e;
        sum += e;
        for (int d = 0; d < D; d++)
            out[d] += r * (double)(bf16 ? td_bf16_to_f32(td_f32_to_bf16(v[d])) : v[d]);
    }
    for (int d = 0; d < D; d++) out[d] /= sum;
    free(p);
}

/* Error against double: root mean square at most 1.5 times, largest at most 3 times that of a plain bf16
 * computation (ref: 2e-6 of the largest value). */
static void values(const td_ops *o, const world *w, const float *out)
{
    double want[TD_MAX_HEAD_DIM], plain[TD_MAX_HEAD_DIM], err = 0, plain_err = 0, size = 0, sum = 0,
                                                          plain_sum = 0;
    for (int s = 0; s < w->n_seq; s++)
        for (int t = 0; t < w->len[s]; t += t < 70 ? 1 : 9)
            for (int h = 0; h < w->c.H; h++) {
                oracle(w, s, t, h, !is_ref(o), false, want);
                if (!is_ref(o)) oracle(w, s, t, h, true, true, plain);
                const float *y =
                    out + ((size_t)(w->row0[s] + t) * (size_t)w->c.H + (size_t)h) * (size_t)w->c.D;
                for (int d = 0; d < w->c.D; d++) {
                    double e = fabs((double)y[d] - want[d]);
                    err = e <= err ? err : e; /* NaN counts */
                    sum += e * e;
                    if (!is_ref(o)) {
                        plain_err = fmax(plain_err, fabs(plain[d] - want[d]));
                        plain_sum += (plain[d] - want[d]) * (plain[d] - want[d]);
                    }
                    size = fmax(size, fabs(want[d]));
                }
            }
    double limit = is_ref(o) ? 2e-6 * size : 3 * plain_err;
    if (!is_ref(o))
        T_OK(sum <= 1.5 * 1.5 * plain_sum, "%s D=%d window=%d: square %g, plain %g", o->family, w->c.D,
             w->c.window, sum, plain_sum);
    T_OK(err <= limit, "%s D=%d window=%d: error %g, allowed %g", o->family, w->c.D, w->c.window, err, limit);
}

/* The x86 families' bits, written down: a machine that has only one of them still holds it to the others. */
static const uint32_t x86_bits[TD_COUNT(attn_odd)] = {0xaef2f30e, 0xcbd86fc2, 0x3f829c9c, 0xda4fd416, 0x4ec4112b,
                                                      0xce15133b, 0xfa4408c7, 0x7bd52416, 0x9d1df4b1, 0x5f10435d};

/* And those of amx, as a CPU made them. */
static const uint32_t amx_bits[TD_COUNT(attn_odd)] = {0xb0921a77, 0xec09b148, 0xf951d401, 0x69e4244c, 0x7edf2517,
                                                      0x8e96b11b, 0xfa4408c7, 0xd15fbaca, 0x9a875a02, 0x20a69eba};

static void one_case(const td_ops *o, attn_case c, int at)
{
    static const int sizes[] = {1, 8, 16, 64, 128}, chunks[] = {1, 7, 64, 129};
    world w = world_open(c);
    size_t n = (size_t)w.rows * (size_t)(c.H * c.D);
    float *base = floats(n), *out = floats(n);
    run(o, &w, 16, c.tokens, 1, base);
    values(o, &w, base);
    for (size_t i = 0; i < TD_COUNT(sizes); i++) {
        for (size_t k = 0; k < TD_COUNT(chunks); k++) {
            if (is_ref(o) && (k || i % 2)) continue; /* slow, and its item is one row anyway */
            if (!TEST_X86_LAW && (i + k) % 2) continue; /* slow: a device in software */
            int threads = (int)(i + k) % MAX_TEAM + 1, chunk = is_ref(o) ? 64 : chunks[k];
            run(o, &w, sizes[i], chunk, threads, out);
            T_OK(!memcmp(out, base, n * 4), "%s D=%d window=%d P=%d chunk=%d threads=%d", o->family, c.D,
                 c.window, sizes[i], chunk, threads);
        }
    }
    if (TEST_X86_LAW && !is_ref(o)) {
        uint32_t crc = td_crc32c(0, base, n * 4),
                 bits = (strcmp(o->numerics, "cpu-amx-bf16") ? x86_bits : amx_bits)[at];
        T_OK(crc == bits, "%s D=%d window=%d: crc 0x%08x, not 0x%08x as on record for %s", o->family, c.D, c.window, crc,
             bits, o->numerics);
    }
    free(base), free(out);
    world_close(&w);
}

/* The keys on one rank or dealt to several, split by split: the same bits. */
static void parts_equal(const td_ops *o, attn_case c)
{
    static const int sizes[] = {4, 16, 64};
    world w = world_open(c);
    size_t n = (size_t)w.rows * (size_t)(c.H * c.D);
    float *base = floats(n), *out = floats(n);
    split = SPLIT;
    run(o, &w, 16, c.tokens, 1, base);
    values(o, &w, base);
    for (ranks = 1; ranks <= MAX_RANKS; ranks++) {
        int P = sizes[ranks % 3];
        for (parts_most = 1; parts_most <= MAX_PAGES; parts_most *= MAX_PAGES) {
            run(o, &w, P, ranks % 2 ? c.tokens : 37, ranks % MAX_TEAM + 1, out);
            T_OK(!memcmp(out, base, n * 4), "%s D=%d: parts of %d ranks, %d at a time", o->family, c.D, ranks,
                 parts_most);
        }
    }
    split = ranks = 0;
    free(base), free(out);
    world_close(&w);
}

/* A value that is not finite reaches the rows which attend to it and no other, inside a tile and at the
 * window's edge. */
static void nan_stays(const td_ops *o, int window, int at)
{
    attn_case c = {4, 2, 32, window, 150};
    world w = world_open(c);
    size_t HD = (size_t)(c.H * c.D), n = (size_t)w.rows * HD;
    float *clean = floats(n), *out = floats(n);
    run(o, &w, 16, c.tokens, 1, clean);
    for (int g = 0; g < c.G; g++) w.v[(size_t)(at * c.G + g) * (size_t)c.D + 5] = NAN;
    for (int chunk = 50; chunk <= 150; chunk += 50) {
        run(o, &w, 16, chunk, 2, out);
        for (int t = 0; t < w.rows; t++) {
            bool sees = t < w.len[0] && t >= at && (!window || t < at + window);
            bool same = !memcmp(out + (size_t)t * HD, clean + (size_t)t * HD, HD * 4);
            T_OK(sees ? count_nan(out + (size_t)t * HD, HD) == c.H : same, "%s window %d row %d", o->family,
                 window, t);
        }
    }
    free(clean), free(out);
    world_close(&w);
}

/* Two keys, the first with score 0 and V = 1, the second with score t < 0 and V = 0: out = 1 / (1 + 2^t), in
 * which no probability was rounded to bf16. Shows the exponential alone. */
static void exponential(const td_ops *o)
{
    attn_case c = {1, 1, 16, 0, 2};
    world w = world_open(c);
    float *out = floats((size_t)w.rows * 16);
    for (size_t i = 0; i < (size_t)w.rows * 16; i++) w.q[i] = w.k[i] = w.v[i] = 0;
    w.v[0] = 1;
    for (int i = 1; i < 400; i++) {
        w.q[16] = (float)i * 0.17f, w.k[16] = -0.5f;
        run(o, &w, 8, 2, 1, out);
        double q = (double)w.q[16] * 0.25 * 1.4426950408889634;
        if (!is_ref(o)) q = (double)td_bf16_to_f32(td_f32_to_bf16(w.q[16] * (0.25f * 1.44269504f)));
        T_NEAR(out[16], 1 / (1 + exp2(q * -0.5)), 3e-7);
    }
    free(out);
    world_close(&w);
}

int main(void)
{
    const td_ops *o;
    for (int f = 0; (o = td_ops_family(f)); f++) {
        for (size_t i = 0; i < TD_COUNT(attn_odd); i++) one_case(o, attn_odd[i], (int)i);
        for (size_t i = 0; i < TD_COUNT(attn_odd); i++)
            if (TEST_PARTS && !attn_odd[i].window) parts_equal(o, attn_odd[i]);
        for (int at = 84; at <= 85; at++) nan_stays(o, 0, at), nan_stays(o, 20, at), nan_stays(o, 21, at);
        if (TEST_X86_LAW) exponential(o);
    }
    return T_DONE();
}
