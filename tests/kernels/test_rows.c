// SPDX-License-Identifier: Apache-2.0
/* Row-wise operations of every family: norm, rope and append, gated activation, embedding, conversions. */
#include "tests/kernels/support.h"

enum { MAX_T = 37 };
static const int widths[] = {1, 5, 16, 64, 66, 288, 2048};

static int differ(const float *a, const float *b, size_t n)
{
    return memcmp(a, b, n * sizeof *a) != 0;
}

/* x86 families agree bit for bit: the first one's output is kept and the others compared. */
static float *kept[64];
static int n_kept;
static bool same_as_first(const td_ops *o, int key, const float *out, size_t n)
{
    if (is_ref(o)) return true;
    TD_CHECK(key < 64);
    if (kept[key]) return !differ(kept[key], out, n);
    kept[key] = floats(n);
    memcpy(kept[key], out, n * sizeof *out);
    n_kept++;
    return true;
}

static void norm(const td_ops *o, int E, int key)
{
    size_t ld = (size_t)E + 2;
    float *x = floats(MAX_T * ld), *w = floats((size_t)E), *out = floats(MAX_T * ld),
          *alone = floats((size_t)E);
    rnd_fill(x, MAX_T * ld, 21, 3), rnd_fill(w, (size_t)E, 22, 1);
    o->rmsnorm(team(3), x, ld, w, 1e-5f, MAX_T, E, out, ld);
    for (int t = 0; t < MAX_T; t++) {
        const float *row = x + (size_t)t * ld, *y = out + (size_t)t * ld;
        double sum = 0, worst = 0;
        for (int i = 0; i < E; i++) sum += (double)row[i] * (double)row[i];
        double scale = 1 / sqrt(sum / E + (double)1e-5f);
        for (int i = 0; i < E; i++) {
            double want = (double)row[i] * scale * (double)w[i],
                   e = fabs((double)y[i] - want) / (fabs(want) + 1e-20);
            worst = e <= worst ? worst : e;
        }
        T_OK(worst < 8e-7, "%s norm E=%d: %g", o->family, E, worst);
        T_OK(y[E] != y[E] && y[E + 1] != y[E + 1], "%s norm wrote outside", o->family);
        o->rmsnorm(team(1), row, ld, w, 1e-5f, 1, E, alone, (size_t)E);
        T_OK(!differ(alone, y, (size_t)E), "%s norm E=%d row %d alone", o->family, E, t);
    }
    float *packed = floats((size_t)MAX_T * (size_t)E);
    o->rmsnorm(team(2), x, ld, w, 1e-5f, MAX_T, E, packed, (size_t)E);
    T_OK(same_as_first(o, key, packed, (size_t)MAX_T * (size_t)E), "%s norm E=%d: family", o->family, E);
    x[3 * ld] = NAN;
    o->rmsnorm(team(2), x, ld, w, 1e-5f, MAX_T, E, out, ld);
    for (int t = 0; t < MAX_T; t++)
        T_OK(t == 3 ? count_nan(out + 3 * ld, (size_t)E) == E
                    : !differ(out + (size_t)t * ld, packed + (size_t)t * (size_t)E, (size_t)E));
    free(x), free(w), free(out), free(alone), free(packed);
}

static void silu(const td_ops *o, int F, int key)
{
    size_t ld = 2 * (size_t)F + 1, n = (size_t)MAX_T * (size_t)F;
    float *x = floats(MAX_T * ld), *out = floats(n);
    rnd_fill(x, MAX_T * ld, 31, 8);
    x[0] = 0, x[ld] = -120, x[2 * ld] = 120, x[3 * ld] = -1e-20f;
    o->silu_mul(team(3), x, ld, MAX_T, F, out, (size_t)F);
    double worst = 0;
    for (int t = 0; t < MAX_T; t++)
        for (int f = 0; f < F; f++) {
            double g = (double)x[(size_t)t * ld + (size_t)f],
                   want = g / (1 + exp(-g)) * (double)x[(size_t)t * ld + (size_t)(F + f)];
            double e = fabs((double)out[t * F + f] - want) / (fabs(want) + 1e-30);
            if (g < -80) e = fabs((double)out[t * F + f]); /* silu(-120) is 1e-50: any tiny value */
            worst = e <= worst ? worst : e;
        }
    T_OK(worst < 1e-6, "%s silu F=%d: %g", o->family, F, worst);
    T_OK(same_as_first(o, key, out, n), "%s silu F=%d: family", o->family, F);
    float *in_place = floats(MAX_T * ld);
    memcpy(in_place, x, MAX_T * ld * sizeof *x);
    o->silu_mul(team(2), in_place, ld, MAX_T, F, in_place, ld);
    for (int t = 0; t < MAX_T; t++)
        T_OK(!differ(in_place + (size_t)t * ld, out + t * F, (size_t)F), "%s silu in place", o->family);
    free(x), free(out), free(in_place);
}

typedef struct rope_case {
    int H, G, D, rot;
    bool norms, scale;
} rope_case;
static const rope_case ropes[] = {{4, 2, 16, 16, false, false},  {8, 1, 64, 64, true, false},
                                  {3, 3, 80, 32, false, true},   {4, 4, 96, 96, true, true},
                                  {32, 8, 64, 64, false, false}, {2, 1, 256, 64, true, true}};

static void rope(const td_ops *o, rope_case c, int P, int key)
{
    int half = c.rot / 2, pages = (MAX_T + P - 1) / P;
    size_t width = (size_t)(c.H + 2 * c.G) * (size_t)c.D, ld = width + 3;
    float *x = floats(MAX_T * ld), *y = floats(MAX_T * ld), *cs = floats((size_t)(MAX_T * c.rot)),
          *qn = floats((size_t)c.D);
    float *kn = floats((size_t)c.D), *scale = floats(MAX_T);
    rnd_fill(x, MAX_T * ld, 41, 1), rnd_fill(qn, (size_t)c.D, 42, 1), rnd_fill(kn, (size_t)c.D, 43, 1),
        rnd_fill(scale, MAX_T, 44, 1);
    for (int i = 0; i < MAX_T * half; i++) cs[2 * i] = cosf((float)i), cs[2 * i + 1] = sinf((float)i);
    memcpy(y, x, MAX_T * ld * sizeof *x);
    td_kv kv = {.dtype = o->kv_dtype, .n_pages = pages, .P = P, .G = c.G, .D = c.D};
    size_t bytes = (size_t)pages * td_kv_page_bytes(&kv);
    kv.base = block_alloc(bytes);
    int32_t page[MAX_T], in[MAX_T];
    for (int t = 0; t < MAX_T; t++) page[t] = t == 5 ? -1 : pages - 1 - t / P, in[t] = t % P;
    td_rope_args a = {y,
                      ld,
                      MAX_T,
                      cs,
                      c.scale ? scale : NULL,
                      c.norms ? qn : NULL,
                      c.norms ? kn : NULL,
                      1e-6f,
                      c.H,
                      c.G,
                      c.D,
                      c.rot,
                      &kv,
                      0,
                      page,
                      in};
    o->rope_append(team(3), &a);
    double worst = 0;
    for (int t = 0; t < MAX_T; t++)
        for (int h = 0; h < c.H + 2 * c.G; h++) {
            float *in_x = x + (size_t)t * ld + (size_t)(h * c.D),
                  *out = y + (size_t)t * ld + (size_t)(h * c.D);
            double v[TD_MAX_HEAD_DIM], r[TD_MAX_HEAD_DIM], sum = 0;
            bool is_q = h < c.H, is_v = h >= c.H + c.G;
            for (int d = 0; d < c.D; d++) v[d] = (double)in_x[d], sum += v[d] * v[d];
            for (int d = 0; d < c.D && c.norms && !is_v; d++)
                v[d] *= (double)(is_q ? qn : kn)[d] / sqrt(sum / c.D + (double)1e-6f);
            memcpy(r, v, sizeof r);
            for (int i = 0; i < half && !is_v; i++) {
                double co = (double)cs[(t * half + i) * 2], si = (double)cs[(t * half + i) * 2 + 1];
                r[i] = v[i] * co - v[i + half] * si, r[i + half] = v[i] * si + v[i + half] * co;
            }
            for (int d = 0; d < c.D && is_q && c.scale; d++) r[d] *= (double)scale[t];
            for (int d = 0; d < c.D; d++) {
                double e = fabs((double)out[d] - r[d]);
                worst = e <= worst ? worst : e;
            }
            if (is_q || page[t] < 0) continue;
            int g = is_v ? h - c.H - c.G : h - c.H;
            size_t at = (((size_t)is_v * (size_t)c.G + (size_t)g) * (size_t)P + (size_t)in[t]) * (size_t)c.D;
            uint8_t want[TD_MAX_HEAD_DIM * 4];
            td_convert(want, kv.dtype, out, TD_F32, (size_t)c.D);
            T_OK(!memcmp(want, td_kv_page(&kv, 0, page[t]) + at * td_dtype_bytes(kv.dtype),
                         (size_t)c.D * td_dtype_bytes(kv.dtype)),
                 "%s D=%d t=%d h=%d", o->family, c.D, t, h);
        }
    T_OK(worst < 4e-6, "%s rope D=%d: %g", o->family, c.D, worst);
    int untouched = 0; /* the row without a page, and nothing else of those pages */
    for (size_t i = 0; i < bytes; i++) untouched += kv.base[i] == 0xff;
    T_OK(untouched >= (int)(2 * (size_t)(c.G * c.D) * td_dtype_bytes(kv.dtype)),
         "%s rope wrote a row without a page", o->family);
    float *alone = floats(ld);
    for (int t = 0; t < MAX_T; t++) {
        memcpy(alone, x + (size_t)t * ld, ld * sizeof *x);
        td_rope_args b = a;
        b.qkv = alone, b.T = 1, b.cs = cs + (size_t)(t * c.rot), b.row_page = page + t,
        b.row_in_page = in + t, b.q_scale = c.scale ? scale + t : NULL;
        o->rope_append(team(1), &b);
        T_OK(!differ(alone, y + (size_t)t * ld, ld), "%s rope D=%d row %d alone", o->family, c.D, t);
    }
    T_OK(same_as_first(o, key, y, MAX_T * ld), "%s rope D=%d: family", o->family, c.D);
    free(x), free(y), free(cs), free(qn), free(kn), free(scale), free(alone), free(kv.base);
}

static void embed_table(const td_ops *o)
{
    static const td_dtype types[] = {TD_F32, TD_BF16, TD_F16};
    float *w = floats(50 * 33), *out = floats(5 * 40);
    rnd_fill(w, 50 * 33, 51, 1);
    for (int i = 0; i < 3; i++) {
        void *stored = block_alloc(50 * 33 * 4);
        td_convert(stored, types[i], w, TD_F32, 50 * 33);
        td_convert(w, TD_F32, stored, types[i], 50 * 33);
        int32_t ids[] = {49, 0, 7, 50, -3};
        td_table table = {50, 33, types[i], stored};
        o->embed_table(team(2), &table, ids, 5, out, 40);
        for (int t = 0; t < 5; t++)
            for (int k = 0; k < 33; k++) T_OK(out[t * 40 + k] == (t < 3 ? w[ids[t] * 33 + k] : 0));
        free(stored);
    }
    free(w), free(out);
}

/* Whole pages of one slot, in the order asked for, most of them often (more than a table takes at once); nothing behind them. */
static void gather_pages(const td_ops *o)
{
    enum { SLOTS = 3, PAGES = 9, N = 1030 };
    int32_t pages[N];
    td_kv kv = {.dtype = o->kv_dtype, .n_pages = PAGES, .P = 3, .G = 1, .D = 16};
    size_t page = td_kv_page_bytes(&kv), bytes = SLOTS * PAGES * page;
    uint8_t *out = block_alloc((N + 1) * page);
    kv.base = block_alloc(bytes);
    for (size_t i = 0; i < bytes; i++) kv.base[i] = (uint8_t)(i * 2654435761u >> 13);
    for (int i = 0; i < N; i++) pages[i] = (i * 7 + i / 9) % PAGES;
    for (int slot = 0; slot < SLOTS; slot++) {
        int bad = 0;
        memset(out, 0xff, (N + 1) * page);
        o->gather_pages(team(2), &kv, slot, pages, N, out);
        for (int i = 0; i < N; i++) bad += memcmp(out + (size_t)i * page, td_kv_page(&kv, slot, pages[i]), page) != 0;
        for (size_t i = 0; i < page; i++) bad += out[N * page + i] != 0xff;
        T_OK(!bad, "%s slot %d: %d pages", o->family, slot, bad);
    }
    free(out), free(kv.base);
}

/* Only ids below 0 are replaced, each by its own sample; a draw without a token gives 0. */
static void fill_ids(const td_ops *o)
{
    td_sample_out before[300];
    int32_t ids[700], want[700];
    for (int i = 0; i < 300; i++) before[i] = (td_sample_out){.token = i % 7 == 6 ? -1 : 1000 + i};
    for (int i = 0; i < 700; i++) {
        int s = i * 13 % 300;
        ids[i] = i % 3 ? -1 - s : 5 * i;
        want[i] = i % 3 ? TD_MAX(before[s].token, 0) : 5 * i;
    }
    o->fill_ids(team(2), ids, 700, before);
    T_OK(!memcmp(ids, want, sizeof ids), "%s", o->family);
    o->fill_ids(team(1), ids, 700, before);
    T_OK(!memcmp(ids, want, sizeof ids), "%s: known ids changed", o->family);
}

/* Every f16 value goes to f32 and back; f32 to f16 and bf16 rounds to nearest even, checked by distance. */
static void conversions(void)
{
    int bad = 0;
    for (uint32_t h = 0; h < 65536; h++) {
        float f = td_f16_to_f32((uint16_t)h);
        if (f != f) bad += !((h & 0x7c00) == 0x7c00 && (h & 0x3ff));
        else bad += td_f32_to_f16(f) != h;
    }
    T_EQ(bad, 0);
    T_OK(td_f16_to_f32(0x3c00) == 1 && td_f16_to_f32(0x0001) == 0x1p-24f && td_f16_to_f32(0xfbff) == -65504);
    uint64_t seed = 9;
    for (int i = 0; i < 20000; i++) {
        uint32_t u = rnd_next(&seed) & 0xffff0000u, lows[] = {0, 1, 0x7fff, 0x8000, 0x8001, 0xffff};
        for (int k = 0; k < 6; k++) {
            uint32_t bits = u | lows[k];
            float f, up;
            memcpy(&f, &bits, 4);
            if (!(bits & 0x7f800000u) || (bits & 0x7f800000u) == 0x7f800000u) continue;
            uint16_t got = td_f32_to_bf16(f), want = (uint16_t)(bits >> 16);
            if (lows[k] > 0x8000 || (lows[k] == 0x8000 && (want & 1))) want++;
            bad += got != want;
            uint16_t half = td_f32_to_f16(f); /* no neighbour is nearer */
            up = td_f16_to_f32(half);
            for (int d = -1; d <= 1; d += 2) {
                float n = td_f16_to_f32((uint16_t)(half + d));
                if (fabsf(f) < 65504 && fabsf(f) > 0x1p-24f && n == n && (half & 0x7fff))
                    bad += fabs((double)n - (double)f) < fabs((double)up - (double)f);
            }
        }
    }
    T_EQ(bad, 0);
    T_EQ(td_f32_to_bf16(0x1p-127f), 0);
    T_EQ(td_f32_to_bf16(-0x1p-127f), 0x8000);
}

int main(void)
{
    const td_ops *o;
    conversions();
    for (int f = 0; (o = td_ops_family(f)); f++) {
        int key = 0;
        for (size_t i = 0; i < TD_COUNT(widths); i++) norm(o, widths[i], key++), silu(o, widths[i], key++);
        for (size_t i = 0; i < TD_COUNT(ropes); i++) rope(o, ropes[i], i % 2 ? 16 : 1 << i, key++);
        embed_table(o);
        fill_ids(o);
        gather_pages(o);
    }
    for (int i = 0; i < 64; i++) free(kept[i]);
    return T_DONE();
}
