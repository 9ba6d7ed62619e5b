// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_attn_cuda.c - kernels/cuda_attn.h: a whole prompt against double; then chunks, single rows,
 * drafts, mixed batches, page sizes and either kernel against the whole prompt, bit for bit; what no row may
 * see. */
#include "kernels/cuda_attn.h"
#include "tests/simt/support.h"
#include <math.h>

typedef struct attn_case {
    int D, G, group, L, window;
    float softcap;
    bool sinks;
    td_dtype dtype;
} attn_case;

static const attn_case cases[] = {
    {64, 2, 4, 300, 0, 0, false, TD_BF16},  {128, 1, 1, 270, 0, 0, true, TD_BF16},
    {80, 1, 3, 140, 0, 0, false, TD_F16},   {96, 2, 2, 130, 70, 0, false, TD_BF16},
    {256, 1, 2, 150, 0, 0, false, TD_BF16}, {16, 1, 8, 600, 0, 20, false, TD_BF16},
    {64, 1, 2, 580, 100, 0, true, TD_BF16}, {128, 2, 8, 70, 1, 0, false, TD_F16},
    {32, 1, 20, 90, 33, 5, true, TD_BF16},
};
enum { MAX_SEQ = 32, SLOTS = 4096 };

/* A sequence of L tokens on the host, and as pages on the device. */
typedef struct world {
    attn_case c;
    uint16_t *k, *v; /* [L][G][D] */
    float *q, *sinks;
    td_kv kv;
    int32_t *pages; /* on the device, L / P up */
    float *d_q, *d_sinks;
} world;

static float scale_of(const attn_case *c)
{
    return 1.5f / sqrtf((float)c->D);
}
static float value(const attn_case *c, uint16_t u)
{
    return c->dtype == TD_F16 ? td_f16_to_f32(u) : td_bf16_to_f32(u);
}
static uint16_t round_to(const attn_case *c, float f)
{
    return c->dtype == TD_F16 ? td_f32_to_f16(f) : td_f32_to_bf16(f);
}

static void world_make(world *w, const attn_case *c, uint64_t seed)
{
    size_t n = (size_t)c->L * (size_t)(c->G * c->D), nq = n * (size_t)c->group;
    *w = (world){
        .c = *c, .k = block_alloc(n * 2), .v = block_alloc(n * 2), .q = floats(nq), .sinks = floats(64)};
    for (size_t i = 0; i < n; i++) {
        w->k[i] = round_to(c, rnd_float(&seed, 1));
        w->v[i] = round_to(c, rnd_float(&seed, 1));
    }
    rnd_fill(w->q, nq, seed + 1, 1);
    rnd_fill(w->sinks, 64, seed + 2, 2);
    T_OK(!td_cuda_attn_refuses(c->G * c->group, c->G, c->D, 16, c->dtype));
}
static void world_free(world *w)
{
    free(w->k);
    free(w->v);
    free(w->q);
    free(w->sinks);
}

/* Pages in a scattered order in slot 1 of 2; whatever holds no token is NaN. First page of the table: `gone`
 * are -1. */
static void world_put(world *w, int P, int gone)
{
    const attn_case *c = &w->c;
    int n = (c->L + P - 1) / P, total = n + 3;
    w->kv = (td_kv){NULL, c->dtype, total, P, c->G, c->D};
    size_t page = td_kv_page_bytes(&w->kv), half = page / 4;
    uint16_t *host = block_alloc(2 * (size_t)total * page);
    int32_t *table = block_alloc((size_t)n * 4);
    for (int i = 0; i < n; i++) table[i] = (i * 7 + 2) % total;
    for (int i = 1; i < n; i++)
        for (int j = 0; j < i; j++)
            if (table[i] == table[j]) { /* total is a multiple of 7 */
                for (int k = 0; k < n; k++) table[k] = n - k;
                i = n;
                break;
            }
    for (int t = 0; t < c->L; t++)
        for (int g = 0; g < c->G; g++) {
            uint16_t *p = host + ((size_t)(total + table[t / P]) * page) / 2 +
                          ((size_t)g * (size_t)P + (size_t)(t % P)) * (size_t)c->D;
            memcpy(p, w->k + (size_t)(t * c->G + g) * (size_t)c->D, (size_t)c->D * 2);
            memcpy(p + half, w->v + (size_t)(t * c->G + g) * (size_t)c->D, (size_t)c->D * 2);
        }
    for (int i = 0; i < gone; i++) table[i] = -1;
    w->kv.base = dev_put(host, 2 * (size_t)total * page);
    w->pages = dev_put(table, (size_t)n * 4);
    w->d_q = dev_put(w->q, (size_t)c->L * (size_t)(c->G * c->group * c->D) * 4);
    w->d_sinks = c->sinks ? dev_put(w->sinks, 64 * 4) : NULL;
    free(host);
    free(table);
}

/* Rows pos0 .. pos0 + n - 1 of the world's sequence, several times in one call; out[i] row after row. */
typedef struct piece {
    int pos0, n;
} piece;
static bool run(const world *w, const piece *p, int n_seq, int few, size_t max_slots, float *out)
{
    const attn_case *c = &w->c;
    int H = c->G * c->group, T = 0;
    size_t width = (size_t)(H * c->D);
    td_cuda_attn_seq seq[MAX_SEQ];
    for (int i = 0; i < n_seq; i++) {
        seq[i] = (td_cuda_attn_seq){T, p[i].n, p[i].pos0, 0};
        T += p[i].n;
    }
    float *q = floats((size_t)T * width);
    for (int i = 0; i < n_seq; i++)
        memcpy(q + (size_t)seq[i].row0 * width, w->q + (size_t)p[i].pos0 * width, (size_t)p[i].n * width * 4);
    float *d_out = dev_new((size_t)T * width * 4);
    void *d_seq = dev_put(seq, sizeof seq[0] * (size_t)n_seq),
         *plan = dev_new(td_cuda_attn_plan_bytes(n_seq));
    void *ws = dev_new(td_cuda_attn_ws_bytes(max_slots, c->D));
    int e = td_cuda_attn_plan(dev()->stream[0], d_seq, n_seq, H, c->G, c->D, c->window, max_slots, few, plan);
    td_cuda_attn_args a = {.q = dev_put(q, (size_t)T * width * 4),
                           .ldq = width,
                           .out = d_out,
                           .ldo = width,
                           .out_dtype = TD_F32,
                           .kv = &w->kv,
                           .slot = 1,
                           .seq = d_seq,
                           .n_seq = n_seq,
                           .pages = w->pages,
                           .H = H,
                           .G = c->G,
                           .D = c->D,
                           .scale = scale_of(c),
                           .window = c->window,
                           .softcap = c->softcap,
                           .sinks = w->d_sinks,
                           .T = T,
                           .prompts = true,
                           .few = few != 0,
                           .plan = plan,
                           .ws = ws,
                           .max_slots = max_slots};
    if (e == 0) e = td_cuda_attention(dev()->stream[0], &a);
    bool ok = e == 0 && dev_get(out, d_out, (size_t)T * width * 4);
    free(q);
    return ok;
}

static void check(const world *w, const float *whole, const piece *p, int n_seq, int few, size_t max_slots,
                  const char *what)
{
    size_t width = (size_t)(w->c.G * w->c.group * w->c.D), T = 0;
    for (int i = 0; i < n_seq; i++) T += (size_t)p[i].n;
    float *out = floats(T * width);
    bool ok = run(w, p, n_seq, few, max_slots, out);
    int bad = 0;
    size_t at = 0;
    for (int i = 0; i < n_seq; i++)
        for (int r = 0; r < p[i].n; r++, at++)
            bad += !ok || memcmp(out + at * width, whole + (size_t)(p[i].pos0 + r) * width, width * 4) != 0;
    T_OK(!bad, "%s: %d of %d rows differ (D %d G %d group %d window %d)", what, bad, (int)T, w->c.D, w->c.G,
         w->c.group, w->c.window);
    free(out);
}

/* Within 2x of what rounding the weights to the pages' type may do, with q rounded. */
static void check_values(const world *w, const float *out)
{
    const attn_case *c = &w->c;
    int H = c->G * c->group;
    double *s = block_alloc((size_t)c->L * 8), worst = 0, eps = c->dtype == TD_F16 ? 0x1p-11 : 0x1p-8;
    for (int t = 0; t < c->L; t += t < 20 ? 1 : 7)
        for (int h = 0; h < H; h++) {
            const float *q = w->q + (size_t)(t * H + h) * (size_t)c->D;
            int g = h / c->group, first = c->window > 0 && t + 1 > c->window ? t + 1 - c->window : 0;
            double top = c->sinks ? (double)w->sinks[h] : -INFINITY, sum = 0;
            for (int k = first; k <= t; k++) {
                double dot = 0;
                for (int d = 0; d < c->D; d++)
                    dot += (double)value(c, round_to(c, q[d])) *
                           (double)value(c, w->k[(size_t)(k * c->G + g) * (size_t)c->D + (size_t)d]);
                dot *= (double)scale_of(c);
                if (c->softcap > 0) dot = (double)c->softcap * tanh(dot / (double)c->softcap);
                s[k] = dot;
                if (dot > top) top = dot;
            }
            if (c->sinks) sum = exp((double)w->sinks[h] - top);
            for (int k = first; k <= t; k++) sum += s[k] = exp(s[k] - top);
            for (int d = 0; d < c->D; d++) {
                double o = 0, size = 0;
                for (int k = first; k <= t; k++) {
                    double v = (double)value(c, w->v[(size_t)(k * c->G + g) * (size_t)c->D + (size_t)d]);
                    o += s[k] * v;
                    size += s[k] * fabs(v);
                }
                double e = fabs((double)out[(size_t)(t * H + h) * (size_t)c->D + (size_t)d] - o / sum) /
                           (eps * size / sum + 1e-6);
                if (!(e <= worst)) worst = e;
            }
        }
    T_OK(worst <= 1, "D %d group %d window %d: error %g of the bound", c->D, c->group, c->window, worst);
    free(s);
}

/* The same rows over keys that lie on `ranks` ranks, split by split, `most` parts at a time, merged into what was merged before. */
static bool run_parts(const world *w, const piece *p, int n_seq, int ranks, int most, float *out)
{
    const attn_case *c = &w->c;
    int H = c->G * c->group, T = 0, P = w->kv.P, per = TD_CUDA_ATTN_SPLIT / P, longest = 0, e = 0;
    int n_pages = (c->L + P - 1) / P;
    size_t width = (size_t)(H * c->D), unit = (size_t)H * (size_t)(c->D + 2);
    int32_t *all = block_alloc((size_t)n_pages * 4), *local = block_alloc((size_t)(n_pages + per) * 4);
    T_OK(dev_get(all, w->pages, (size_t)n_pages * 4));
    for (int i = 0; i < n_seq; i++) T += p[i].n, longest = p[i].pos0 + p[i].n > longest ? p[i].pos0 + p[i].n : longest;
    int parts = ((longest + TD_CUDA_ATTN_SPLIT - 1) / TD_CUDA_ATTN_SPLIT + ranks - 1) / ranks;
    float *q = floats((size_t)T * width), *d_out = dev_new((size_t)T * width * 4), *state = dev_new((size_t)T * unit * 4);
    td_cuda_attn_seq seq[MAX_SEQ];
    for (int i = 0, row = 0; i < n_seq; row += p[i++].n) {
        seq[i] = (td_cuda_attn_seq){row, p[i].n, p[i].pos0, 0};
        memcpy(q + (size_t)row * width, w->q + (size_t)p[i].pos0 * width, (size_t)p[i].n * width * 4);
    }
    td_cuda_attn_args a = {.q = dev_put(q, (size_t)T * width * 4), .ldq = width, .kv = &w->kv, .slot = 1,
                           .seq = dev_put(seq, sizeof seq[0] * (size_t)n_seq), .n_seq = n_seq, .H = H, .G = c->G, .D = c->D,
                           .scale = scale_of(c), .window = c->window, .softcap = c->softcap, .T = T, .ranks = ranks,
                           .plan = dev_new(td_cuda_attn_plan_bytes(n_seq)), .ws = dev_new(256)};
    for (int part0 = 0; part0 < parts && e == 0; part0 += most) {
        float *part[4];
        a.part0 = part0, a.n_parts = parts - part0 < most ? parts - part0 : most;
        for (int r = 0; r < ranks && e == 0; r++) {
            int n = 0; /* pages of the rank's splits from part0 on; foreign pages would be noticed: they are out of range */
            for (int i = part0; i < part0 + a.n_parts; i++)
                for (int k = 0; k < per; k++, n++) local[n] = (i * ranks + r) * per + k < n_pages ? all[(i * ranks + r) * per + k] : -1;
            a.rank = r, a.pages = dev_put(local, (size_t)n * 4);
            a.part = part[r] = dev_new((size_t)T * (size_t)a.n_parts * unit * 4);
            e = td_cuda_attn_plan_parts(dev()->stream[0], a.seq, n_seq, H, c->G, a.n_parts, (void *)(uintptr_t)a.plan);
            if (e == 0) e = td_cuda_attention(dev()->stream[0], &a);
        }
        bool last = part0 + a.n_parts == parts;
        if (e == 0) e = td_cuda_attn_merge(dev()->stream[0], (const float *const *)part, part0 ? state : NULL, last ? NULL : state, d_out,
                                           width, T, H, c->D, a.n_parts, ranks);
    }
    bool ok = e == 0 && dev_get(out, d_out, (size_t)T * width * 4);
    free(all), free(local), free(q);
    return ok;
}

static void test_parts(const attn_case *c, int P)
{
    world w;
    world_make(&w, c, 5);
    world_put(&w, P, 0);
    const piece p[] = {{0, 20}, {c->L - 21, 21}, {255, 2}, {300, 1}};
    size_t width = (size_t)(c->G * c->group * c->D), n = 44 * width;
    float *want = floats(n), *got = floats(n);
    T_OK(run(&w, p, 4, 0, 0, want));
    for (int ranks = 1; ranks <= 3; ranks++)
        for (int most = 1; most <= 2; most++) {
            memset(got, 0xff, n * 4);
            T_OK(run_parts(&w, p, 4, ranks, most, got) && !memcmp(want, got, n * 4), "parts of %d ranks, %d at a time, pages of %d", ranks, most, P);
        }
    dev_done();
    free(want), free(got);
    world_free(&w);
}

static void test_case(const attn_case *c, uint64_t seed)
{
    world w;
    world_make(&w, c, seed);
    int L = c->L;
    float *whole = floats((size_t)L * (size_t)(c->G * c->group * c->D));
    world_put(&w, 16, 0);
    T_OK(run(&w, &(piece){0, L}, 1, 0, 0, whole));
    check_values(&w, whole);
    check(&w, whole, (piece[]){{0, 1}, {1, 17}, {18, 46}, {64, L - 64}}, 4, 0, 0, "chunks, prompt kernel");
    check(&w, whole, (piece[]){{L - 1, 1}, {0, 1}, {63, 1}, {64, 1}, {L / 2, 1}, {15, 1}}, 6, 64, SLOTS,
          "single rows");
    if (L > 257)
        check(&w, whole, (piece[]){{255, 1}, {256, 1}, {257, 1}}, 3, 64, SLOTS, "single rows at the split");
    check(&w, whole, (piece[]){{L - 3, 3}, {62, 4}, {0, 2}}, 3, 64, SLOTS, "drafts");
    check(&w, whole, (piece[]){{7, 1}, {0, 40}, {L - 1, 1}, {30, 37}}, 4, 64, SLOTS, "mixed");
    check(&w, whole, (piece[]){{L - 1, 1}, {L - 2, 1}, {5, 2}}, 3, 64, (size_t)(c->G * c->group * 2),
          "few slots");
    dev_done();
    static const int pages[] = {8, 64, 5};
    for (size_t i = 0; i < TD_COUNT(pages); i++) {
        int P = pages[i], first = c->window ? (L - 20 - c->window + 1) / P : 0;
        world_put(&w, P, first > 0 ? first : 0);
        check(&w, whole, (piece[]){{L - 20, 20}, {L - 1, 1}}, 2, P == 5 ? 0 : 64, SLOTS, "page sizes");
        dev_done();
    }
    free(whole);
    world_free(&w);
}

/* NaN and infinity in a row's K and V reach the rows that see the key, and only those, in either kernel. */
static void test_nan(const attn_case *c)
{
    world w;
    world_make(&w, c, 77);
    size_t width = (size_t)(c->G * c->group * c->D), one = (size_t)(c->G * c->D);
    float *good = floats((size_t)c->L * width), *bad = floats((size_t)c->L * width);
    world_put(&w, 16, 0);
    T_OK(run(&w, &(piece){0, c->L}, 1, 0, 0, good));
    dev_done();
    const int at = 70; /* inside a tile, a block and a warp */
    uint16_t inf = round_to(c, INFINITY), nan = round_to(c, NAN);
    for (int kind = 0; kind < 3; kind++) {
        uint16_t *p = (kind ? w.v : w.k) + (size_t)at * one + 3, old = *p;
        *p = kind == 2 ? inf : nan;
        world_put(&w, 16, 0);
        T_OK(run(&w, &(piece){0, c->L}, 1, 0, 0, bad));
        int end = c->window ? at + c->window : c->L, wrong = 0;
        for (int t = 0; t < c->L; t++) {
            bool sees = t >= at && t < end;
            if (!sees)
                wrong += memcmp(good + (size_t)t * width, bad + (size_t)t * width, width * 4) != 0;
            else /* the first head's column 3 sees it; with K all columns do */
                wrong += isfinite(bad[(size_t)t * width + 3]) ||
                         (kind == 0) == isfinite(bad[(size_t)t * width + 4]);
        }
        T_OK(!wrong, "kind %d: %d rows", kind, wrong);
        for (int t = 66; t < 76; t++) { /* alone and as a draft; NaN may have another sign */
            float *row = floats(3 * width);
            T_OK(run(&w, &(piece){t, 1}, 1, 64, SLOTS, row));
            T_OK(run(&w, &(piece){t - 2, 3}, 1, 64, SLOTS, row));
            int differ = 0;
            for (size_t i = 0; i < width; i++) {
                float a = row[2 * width + i], b = bad[(size_t)t * width + i];
                differ += !(a == b || (a != a && b != b));
            }
            T_EQ(differ, 0);
            free(row);
        }
        dev_done();
        *p = old;
    }
    free(good);
    free(bad);
    world_free(&w);
}

/* Output types, promises of the caller, an empty sequence, lengths of zero to many in one batch. */
static void test_forms(void)
{
    world w;
    attn_case c = {64, 2, 2, 200, 0, 0, false, TD_BF16};
    world_make(&w, &c, 9);
    world_put(&w, 16, 0);
    enum { W = 4 * 64 };
    float *whole = floats(200 * W);
    T_OK(run(&w, &(piece){0, 200}, 1, 0, 0, whole));
    td_cuda_attn_seq seq[] = {{0, 1, 150, 0}, {1, 0, 0, 0}, {1, 1, 3, 0}, {2, 2, 198, 0}};
    int pos[] = {150, 3, 198, 199};
    float q[4 * W];
    for (int t = 0; t < 4; t++) memcpy(q + t * W, w.q + pos[t] * W, W * 4);
    void *plan = dev_new(td_cuda_attn_plan_bytes(4)), *d_seq = dev_put(seq, sizeof seq);
    uint16_t *d_out = dev_new(4 * W * 2), out[4 * W];
    size_t slots = 0;
    for (int i = 0; i < 4; i++) slots += td_attn_parts(seq[i].n_rows, seq[i].pos0, 0, 4);
    T_EQ(slots, 16);
    void *ws = dev_new(td_cuda_attn_ws_bytes(slots, 64));
    T_EQ(td_cuda_attn_plan(dev()->stream[0], d_seq, 4, 4, 2, 64, 0, slots, TD_CUDA_ATTN_FEW, plan), 0);
    td_cuda_attn_args a = {.q = dev_put(q, sizeof q),
                           .ldq = W,
                           .out = d_out,
                           .ldo = W,
                           .out_dtype = TD_BF16,
                           .kv = &w.kv,
                           .slot = 1,
                           .seq = d_seq,
                           .n_seq = 4,
                           .pages = w.pages,
                           .H = 4,
                           .G = 2,
                           .D = 64,
                           .scale = scale_of(&c),
                           .T = 4,
                           .few = true,
                           .plan = plan,
                           .ws = ws,
                           .max_slots = slots};
    T_EQ(td_cuda_attention(dev()->stream[0], &a), 0);
    T_OK(dev_get(out, d_out, sizeof out));
    int bad = 0;
    for (int t = 0; t < 4; t++)
        for (int i = 0; i < W; i++) bad += out[t * W + i] != td_f32_to_bf16(whole[pos[t] * W + i]);
    T_EQ(bad, 0);
    dev_done();
    free(whole);
    world_free(&w);
    T_OK(td_cuda_attn_refuses(4, 2, 60, 16, TD_BF16));
    T_OK(td_cuda_attn_refuses(4, 3, 64, 16, TD_BF16));
    T_OK(td_cuda_attn_refuses(4, 2, 64, 16, TD_F32));
    T_OK(td_cuda_attn_refuses(4, 2, 64, 0, TD_BF16));
}

/* The plan of many sequences: every (row, head) once, prefix sums as counted on the host. */
static void test_plan(void)
{
    enum { N = 700, H = 8, G = 2, WINDOW = 300 };
    td_cuda_attn_seq seq[N];
    uint64_t seed = 4;
    for (int i = 0; i < N; i++)
        seq[i] = (td_cuda_attn_seq){0, (int32_t)(rnd_next(&seed) % 24), (int32_t)(rnd_next(&seed) % 3000), 0};
    int32_t *plan = block_alloc(td_cuda_attn_plan_bytes(N));
    void *d = dev_new(td_cuda_attn_plan_bytes(N));
    TD_CHECK(dev()->fill(dev(), TD_STREAM_COMPUTE, d, 0, td_cuda_attn_plan_bytes(N)) == TD_OK);
    size_t max_slots = 40000, used = 0;
    T_EQ(
        td_cuda_attn_plan(dev()->stream[0], dev_put(seq, sizeof seq), N, H, G, 128, WINDOW, max_slots, 64, d),
        0);
    T_OK(dev_get(plan, d, td_cuda_attn_plan_bytes(N)));
    long long sum[4] = {0};
    int wrong = 0, kept_out = 0;
    for (int i = 0; i <= N; i++) {
        for (int k = 0; k < 4; k++) wrong += plan[8 + k * (N + 1) + i] != sum[k];
        if (i == N || !seq[i].n_rows) continue;
        int n = seq[i].n_rows * H / G;
        size_t slots = td_attn_parts(seq[i].n_rows, seq[i].pos0, WINDOW, H);
        bool few = n <= 64;
        if (few) used += slots;
        kept_out += few && used > max_slots;
        if (few && used <= max_slots) {
            sum[0] += (long long)((size_t)((n + 15) / 16 * G) * (slots / (size_t)(seq[i].n_rows * H)));
            sum[1] += (long long)slots;
            sum[2] += seq[i].n_rows * H;
        } else
            sum[3] += (n + 127) / 128 * G;
    }
    T_OK(!wrong && kept_out > 0 && plan[0] == sum[0] && plan[1] == sum[2] && plan[2] == sum[3]);
    free(plan);
    dev_done();
}

int main(void)
{
    for (size_t i = 0; i < TD_COUNT(cases); i++) test_case(&cases[i], 300 + i);
    test_nan(&(attn_case){64, 1, 4, 140, 0, 0, false, TD_BF16});
    test_nan(&(attn_case){32, 2, 1, 140, 20, 0, false, TD_F16});
    test_parts(&(attn_case){64, 2, 2, 820, 0, 0, false, TD_BF16}, 16);
    test_parts(&(attn_case){16, 1, 3, 530, 0, 0, false, TD_F16}, 64);
    test_forms();
    test_plan();
    return T_DONE();
}
