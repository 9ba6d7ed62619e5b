// SPDX-License-Identifier: Apache-2.0
/* Mixture of experts in every family: router's products against double and against each other; choice and
 * weights by brute force, ties; placement; the grouped product against one product per expert; combination in
 * slot order; and a token alone against the same token in any batch, through the whole chain. */
#include "tests/kernels/support.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

enum { MAX_T = 37, PAD = 3 };

typedef struct shape {
    int X, k, E, F;
} shape;
static const shape shapes[] = {{8, 2, 64, 160},   {3, 1, 5, 7},   {17, 4, 33, 48}, {64, 8, 96, 32},
                               {512, 32, 16, 16}, {1, 1, 64, 32}, {4, 4, 40, 96},  {6, 2, 512, 1200}};

/* ---- router ---- */

static float *first_logits[TD_COUNT(shapes)]; /* of the first x86 family: the others make the same bits */

static void logits(const td_ops *o, size_t i, td_dtype dtype)
{
    shape s = shapes[i];
    size_t ld = (size_t)s.E + PAD, n = (size_t)MAX_T * (size_t)s.X, nw = (size_t)s.X * (size_t)s.E;
    float *w = floats(nw), *x = floats(MAX_T * ld), *out = floats(n + 1), *alone = floats((size_t)s.X);
    void *stored = block_alloc(nw * 4);
    rnd_fill(w, nw, 5, 1), rnd_fill(x, MAX_T * ld, 6, 2);
    td_convert(stored, dtype, w, TD_F32, nw);
    td_convert(w, TD_F32, stored, dtype, nw);
    td_table t = {s.X, s.E, dtype, stored};
    o->moe_logits(team(3), &t, x, ld, MAX_T, out);
    double worst = 0;
    for (int r = 0; r < MAX_T; r++) {
        for (int e = 0; e < s.X; e++) {
            double want = 0, size = 1e-30;
            for (int k = 0; k < s.E; k++) {
                double p =
                    (double)x[(size_t)r * ld + (size_t)k] * (double)w[(size_t)e * (size_t)s.E + (size_t)k];
                want += p, size += fabs(p);
            }
            double err = fabs((double)out[(size_t)r * (size_t)s.X + (size_t)e] - want) / size;
            worst = err <= worst ? worst : err;
        }
        o->moe_logits(team(1 + r % 2), &t, x + (size_t)r * ld, ld, 1, alone);
        T_OK(!memcmp(alone, out + (size_t)r * (size_t)s.X, (size_t)s.X * 4), "%s logits: row %d alone",
             o->family, r);
    }
    T_OK(worst < 2e-6, "%s logits of shape %zu: %g", o->family, i, worst);
    T_OK(out[n] != out[n], "%s logits: wrote outside", o->family);
    if (!is_ref(o) && dtype == TD_BF16) {
        if (!first_logits[i]) {
            first_logits[i] = floats(n);
            memcpy(first_logits[i], out, n * 4);
        }
        T_OK(!memcmp(first_logits[i], out, n * 4), "%s logits of shape %zu: another family's bits", o->family,
             i);
    }
    x[2 * ld] = NAN;
    float *again = floats(n);
    o->moe_logits(team(2), &t, x, ld, MAX_T, again);
    for (int r = 0; r < MAX_T; r++)
        T_OK(r == 2
                 ? count_nan(again + 2 * s.X, (size_t)s.X) == s.X
                 : !memcmp(again + (size_t)r * (size_t)s.X, out + (size_t)r * (size_t)s.X, (size_t)s.X * 4));
    free(w), free(x), free(out), free(alone), free(stored), free(again);
}

/* The best id not yet taken, k times: ties to the lower id. */
static void brute(const td_route_law *law, const float *l, int32_t *ids, double *weights)
{
    bool taken[TD_MAX_EXPERTS] = {0};
    double all = 0, top = 0;
    for (int i = 0; i < law->top_k; i++) {
        int best = -1;
        for (int e = 0; e < law->n_experts; e++)
            if (!taken[e] && (best < 0 || l[e] > l[best])) best = e;
        taken[best] = true;
        ids[i] = best;
        top += weights[i] = exp((double)l[best] - (double)l[ids[0]]);
    }
    for (int e = 0; e < law->n_experts; e++) all += exp((double)l[e] - (double)l[ids[0]]);
    bool over_top = law->renormalise || law->score == TD_ROUTE_SOFTMAX_TOP;
    for (int i = 0; i < law->top_k; i++) weights[i] *= (double)law->scale / (over_top ? top : all);
}

static float *first_weights[TD_COUNT(shapes) * 3];

static void route(const td_ops *o, size_t i, int variant)
{
    shape s = shapes[i];
    td_route_law law = {s.X, s.k, variant == 2 ? TD_ROUTE_SOFTMAX_TOP : TD_ROUTE_SOFTMAX, variant == 1,
                        variant == 2 ? 2.5f : 1.0f};
    size_t n = (size_t)MAX_T * (size_t)s.X, nk = (size_t)MAX_T * (size_t)s.k;
    float *l = floats(n), *w = floats(nk), alone[TD_MAX_TOP_K];
    int32_t *ids = block_alloc(nk * 4), want[TD_MAX_TOP_K], alone_ids[TD_MAX_TOP_K];
    double weights[TD_MAX_TOP_K];
    rnd_fill(l, n, 9 + i, 4);
    for (size_t j = 0; j < n; j++)
        if (j / (size_t)s.X % 3 == 0) l[j] = roundf(l[j] / 4); /* many ties */
    for (int e = 0; e < s.X; e++) l[e] = 1;                    /* nothing but a tie */
    o->moe_route(team(3), &law, l, MAX_T, ids, w);
    for (int t = 0; t < MAX_T; t++) {
        const float *row = l + (size_t)t * (size_t)s.X;
        brute(&law, row, want, weights);
        T_OK(!memcmp(want, ids + (size_t)t * (size_t)s.k, (size_t)s.k * 4), "%s shape %zu row %d: ids",
             o->family, i, t);
        for (int j = 0; j < s.k; j++) T_NEAR(w[(size_t)t * (size_t)s.k + (size_t)j] / weights[j], 1, 3e-6);
        o->moe_route(team(1), &law, row, 1, alone_ids, alone);
        T_OK(!memcmp(alone, w + (size_t)t * (size_t)s.k, (size_t)s.k * 4) &&
                 !memcmp(alone_ids, want, (size_t)s.k * 4),
             "%s route: row %d alone", o->family, t);
    }
    float **first = &first_weights[i * 3 + (size_t)variant];
    if (!is_ref(o)) {
        if (!*first) memcpy(*first = floats(nk), w, nk * 4);
        T_OK(!memcmp(*first, w, nk * 4), "%s shape %zu: weights of another family", o->family, i);
    }
    for (int e = 0; e < s.X; e++) l[s.X + e] = e % 2 ? NAN : (float)e; /* ids stay ids */
    o->moe_route(team(2), &law, l, MAX_T, ids, w);
    for (int j = 0; j < s.k; j++) {
        T_OK(ids[s.k + j] >= 0 && ids[s.k + j] < s.X, "%d", ids[s.k + j]);
        for (int m = 0; m < j; m++) T_OK(ids[s.k + j] != ids[s.k + m]);
    }
    free(l), free(w), free(ids);
}

/* ---- placement ---- */

static void place(const td_ops *o, shape s)
{
    enum { T = MAX_T };
    int32_t ids[T * TD_MAX_TOP_K], row0[TD_MAX_EXPERTS + 2], row[T * TD_MAX_TOP_K];
    uint64_t seed = 77;
    int n = T * s.k;
    for (int t = 0; t < T; t++)
        for (int j = 0; j < s.k; j++) /* distinct; the last expert gets nothing where there is room */
            ids[t * s.k + j] =
                (int)((rnd_next(&seed) % 2 * (uint32_t)j + (uint32_t)(t / 5 + j)) % (uint32_t)s.X);
    row0[s.X + 1] = -7;
    o->moe_place(team(2), ids, T, s.k, s.X, row0, row);
    bool used[T * TD_MAX_TOP_K] = {0};
    int last[TD_MAX_EXPERTS];
    T_OK(row0[0] == 0 && row0[s.X] == n && row0[s.X + 1] == -7);
    for (int e = 0; e < s.X; e++) last[e] = -1;
    for (int i = 0; i < n; i++) {
        int e = ids[i];
        T_OK(row[i] >= row0[e] && row[i] < row0[e + 1] && !used[row[i]], "slot %d", i);
        T_OK(row[i] > last[e], "rows of expert %d ascend", e);
        used[row[i]] = true, last[e] = row[i];
    }
}

/* ---- the chain: experts of random weights ---- */

typedef struct layer {
    shape s;
    float *w; /* gate, up and down of all experts, as f32 */
    void *packed;
    td_weight *up, *down;
    void *scratch;
    float *x;
    td_table router;
} layer;

static const void *pack_one(const td_ops *o, char **at, const float *w, int N, int K, int slices)
{
    void *dst = *at;
    for (int n0 = 0; n0 < N; n0 += 32)
        o->pack(dst, w, TD_F32, N, K, slices, n0, n0 + 32 < N ? n0 + 32 : N);
    *at += (o->packed_bytes(N, K, slices, TD_F32) + 63) / 64 * 64;
    return dst;
}

static layer layer_open(const td_ops *o, shape s)
{
    layer l = {.s = s};
    size_t X = (size_t)s.X, each = 3 * (size_t)s.E * (size_t)s.F;
    l.w = floats(X * each);
    rnd_fill(l.w, X * each, 11, 0.3f);
    int slices = s.X == 8 ? 8 : 0; /* as ranks have it: sums by the tree */
    l.packed = block_alloc(X * (o->packed_bytes(2 * s.F, s.E, slices, TD_F32) +
                                o->packed_bytes(s.E, s.F, slices, TD_F32) + 128));
    l.up = calloc(X, sizeof *l.up), l.down = calloc(X, sizeof *l.down);
    char *at = l.packed;
    for (size_t e = 0; e < X; e++) {
        const float *w = l.w + e * each;
        l.up[e].N = 2 * s.F, l.up[e].K = s.E, l.down[e].N = s.E, l.down[e].K = s.F;
        l.up[e].dtype = l.down[e].dtype = o->packed_dtype(TD_F32);
        l.up[e].slices = l.down[e].slices = slices;
        l.up[e].p = pack_one(o, &at, w, 2 * s.F, s.E, slices);
        l.down[e].p = pack_one(o, &at, w + 2 * (size_t)s.E * (size_t)s.F, s.E, s.F, slices);
    }
    l.scratch = block_alloc(td_moe_scratch_bytes(o, MAX_T * s.k, s.E > s.F ? s.E : s.F, MAX_TEAM));
    l.x = floats(MAX_T * (size_t)s.E);
    rnd_fill(l.x, MAX_T * (size_t)s.E, 12, 1);
    float *r = floats(X * (size_t)s.E);
    rnd_fill(r, X * (size_t)s.E, 13, 1);
    l.router = (td_table){s.X, s.E, TD_F32, r};
    return l;
}

static void layer_close(layer *l)
{
    free(l->w), free(l->packed), free(l->up), free(l->down), free(l->scratch), free(l->x),
        free((void *)(uintptr_t)l->router.p);
}

typedef struct run {
    float *logits, *weights, *rows, *mid, *out;
    int32_t *ids, *row, row0[TD_MAX_EXPERTS + 1];
} run;

static run run_open(const layer *l, int T)
{
    size_t n = (size_t)T, R = n * (size_t)l->s.k;
    run r = {.logits = floats(n * (size_t)l->s.X),
             .weights = floats(R),
             .rows = floats(R * (size_t)l->s.E),
             .mid = floats(R * 2 * (size_t)l->s.F),
             .out = floats(n * (size_t)l->s.E),
             .ids = block_alloc(R * 4),
             .row = block_alloc(R * 4)};
    rnd_fill(r.out, n * (size_t)l->s.E, 14, 0); /* zeros */
    return r;
}

static void run_close(run *r)
{
    free(r->logits), free(r->weights), free(r->rows), free(r->mid), free(r->out), free(r->ids), free(r->row);
}

static void chain(const td_ops *o, const layer *l, int threads, const float *x, int T, run *r)
{
    td_pool *p = team(threads);
    size_t E = (size_t)l->s.E, F2 = 2 * (size_t)l->s.F;
    td_route_law law = {l->s.X, l->s.k, TD_ROUTE_SOFTMAX, true, 1};
    o->moe_logits(p, &l->router, x, E, T, r->logits);
    o->moe_route(p, &law, r->logits, T, r->ids, r->weights);
    o->moe_place(p, r->ids, T, l->s.k, l->s.X, r->row0, r->row);
    o->moe_gather(p, x, E, r->row, T, l->s.k, l->s.E, r->rows, E);
    o->linear_grouped(o, p, l->scratch,
                      &(td_grouped){l->up, l->s.X, r->row0, r->row0[l->s.X], r->rows, E, r->mid, F2, TD_F32});
    o->silu_mul(p, r->mid, F2, T * l->s.k, l->s.F, r->mid, F2);
    o->linear_grouped(
        o, p, l->scratch,
        &(td_grouped){l->down, l->s.X, r->row0, r->row0[l->s.X], r->mid, F2, r->rows, E, TD_F32});
    o->moe_combine(p, r->rows, E, r->row, r->weights, T, l->s.k, l->s.E, r->out, E);
}

/* One token in double, its experts in a loop. */
static double worst_error(const layer *l, const run *r, int t)
{
    size_t E = (size_t)l->s.E, F = (size_t)l->s.F, each = 3 * E * F;
    double *want = calloc(E, sizeof *want), *h = calloc(F, sizeof *h), most = 0, worst = 0;
    for (int j = 0; j < l->s.k; j++) {
        size_t slot = (size_t)t * (size_t)l->s.k + (size_t)j;
        const float *w = l->w + (size_t)r->ids[slot] * each, *x = l->x + (size_t)t * E;
        for (size_t f = 0; f < F; f++) {
            double g = 0, u = 0;
            for (size_t k = 0; k < E; k++) {
                g += (double)w[f * E + k] * (double)x[k];
                u += (double)w[(F + f) * E + k] * (double)x[k];
            }
            h[f] = g / (1 + exp(-g)) * u;
        }
        for (size_t i = 0; i < E; i++)
            for (size_t f = 0; f < F; f++)
                want[i] += (double)r->weights[slot] * h[f] * (double)w[2 * E * F + i * F + f];
    }
    for (size_t i = 0; i < E; i++) {
        most = fmax(most, fabs(want[i]));
        double e = fabs(want[i] - (double)r->out[(size_t)t * E + i]);
        worst = e <= worst ? worst : e;
    }
    free(want), free(h);
    return worst / most;
}

static void whole(const td_ops *o, shape s)
{
    layer l = layer_open(o, s);
    run all = run_open(&l, MAX_T), one = run_open(&l, 1);
    size_t E = (size_t)s.E;
    chain(o, &l, 3, l.x, MAX_T, &all);
    for (int t = 0; t < MAX_T; t += t < 4 ? 1 : 8)
        T_OK(worst_error(&l, &all, t) < (is_ref(o) ? 1e-5 : 3e-2), "%s X=%d row %d: %g", o->family, s.X, t,
             worst_error(&l, &all, t));
    for (int t = 0; t < MAX_T; t++) {
        memset(one.out, 0, E * sizeof *one.out);
        chain(o, &l, 1 + t % 2, l.x + (size_t)t * E, 1, &one);
        T_OK(!memcmp(one.out, all.out + (size_t)t * E, E * 4), "%s X=%d: row %d alone", o->family, s.X, t);
    }
    for (int T = 2; T < MAX_T; T += 5) { /* part of the batch, elsewhere, by other teams */
        run some = run_open(&l, T);
        int at = T * 7 % (MAX_T - T + 1);
        chain(o, &l, T % MAX_TEAM + 1, l.x + (size_t)at * E, T, &some);
        T_OK(!memcmp(some.out, all.out + (size_t)at * E, (size_t)T * E * 4), "%s X=%d: %d rows from %d",
             o->family, s.X, T, at);
        run_close(&some);
    }
    run_close(&all), run_close(&one);
    layer_close(&l);
}

/* All rows to one expert, and to none of the others; a range that does not begin at row 0. */
static void one_hot(const td_ops *o)
{
    layer l = layer_open(o, (shape){5, 1, 64, 96});
    run r = run_open(&l, MAX_T);
    float *want = floats(MAX_T * 192);
    for (int e = 0; e < 5; e++) {
        int32_t row0[6];
        for (int i = 0; i <= 5; i++) row0[i] = i <= e ? 3 : MAX_T;
        memset(r.mid, 0xff, MAX_T * 192 * 4);
        o->linear_grouped(o, team(2), l.scratch, &(td_grouped){l.up, 5, row0, row0[5], l.x, 64, r.mid, 192, TD_F32});
        o->linear(team(2), l.scratch, &l.up[e], l.x + (size_t)3 * 64, 64, MAX_T - 3, want, 192, false);
        T_OK(!memcmp(r.mid + (size_t)3 * 192, want, (MAX_T - 3) * 192 * 4), "%s hot expert %d", o->family, e);
        T_EQ(count_nan(r.mid, 3 * 192), 3 * 192);
    }
    free(want);
    run_close(&r);
    layer_close(&l);
}

/* ---- combination ---- */

static void combine(const td_ops *o, int E)
{
    enum { T = 9, K = 5 };
    size_t ld = (size_t)E + PAD, R = T * K;
    float *y = floats(R * ld), *out = floats(T * ld), *old = floats(T * ld), w[T * K];
    int32_t row[T * K];
    rnd_fill(y, R * ld, 21, 1), rnd_fill(old, T * ld, 22, 1), rnd_fill(w, R, 23, 1);
    for (int i = 0; i < T * K; i++) row[i] = (i * 7 + 3) % (T * K);
    row[2 * K + 1] = -1; /* a slot that is elsewhere */
    memcpy(out, old, T * ld * 4);
    o->moe_combine(team(3), y, ld, row, w, T, K, E, out, ld);
    int bad = 0, outside = 0;
    for (int t = 0; t < T; t++)
        for (size_t i = 0; i < ld; i++) {
            float sum = 0, got = out[(size_t)t * ld + i], was = old[(size_t)t * ld + i];
            double exact = 0;
            for (int k = 0; k < K; k++) {
                int r = row[t * K + k];
                if (r < 0) continue;
                sum = fmaf(w[t * K + k], y[(size_t)r * ld + i], sum);
                exact += (double)w[t * K + k] * (double)y[(size_t)r * ld + i];
            }
            float want = is_ref(o) ? (float)((double)was + exact) : was + sum;
            if (i < (size_t)E)
                bad += memcmp(&got, &want, 4) != 0;
            else
                outside += memcmp(&got, &was, 4) != 0;
        }
    T_OK(!bad && !outside, "%s combine E=%d: %d differ, %d outside", o->family, E, bad, outside);
    free(y), free(out), free(old);
}

int main(void)
{
    const td_ops *o;
    for (int f = 0; (o = td_ops_family(f)); f++) {
        for (size_t i = 0; i < TD_COUNT(shapes); i++) {
            logits(o, i, TD_BF16);
            logits(o, i, i % 2 ? TD_F32 : TD_F16);
            for (int v = 0; v < 3; v++) route(o, i, v);
            place(o, shapes[i]);
            whole(o, shapes[i]);
        }
        one_hot(o);
        combine(o, 1), combine(o, 16), combine(o, 77);
    }
    for (size_t i = 0; i < TD_COUNT(first_logits); i++) free(first_logits[i]);
    for (size_t i = 0; i < TD_COUNT(first_weights); i++) free(first_weights[i]);
    return T_DONE();
}
