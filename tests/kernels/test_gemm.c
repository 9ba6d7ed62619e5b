// SPDX-License-Identifier: Apache-2.0
/* Matrix products of every family of this CPU: the family's matrix law bit for bit (x86), double within tolerance (ref: of
 * the values, x86: of the rounded values), row invariance, sums over slices of K as one rank and as several, NaN, and
 * nothing read or written outside the operands. */
#include "tests/kernels/case_gemm.h"
#include "tests/kernels/support.h"
#include <sys/mman.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef TEST_X86_LAW
#define TEST_X86_LAW 1 /* 0: a family that adds otherwise: held to double alone */
#endif
enum { MAX_M = 40, PAD = 3 };

typedef struct problem {
    int N, K;
    float *w, *bias, *x; /* x: MAX_M rows */
    void *packed, *scratch;
    td_weight weight;
} problem;

static problem problem_open(const td_ops *o, gemm_case c, td_dtype from, float scale, int slices)
{
    problem p = {.N = c.N, .K = c.K};
    size_t n = (size_t)c.N * (size_t)c.K;
    p.w = floats(n), p.bias = floats((size_t)c.N), p.x = floats((size_t)MAX_M * (size_t)c.K);
    rnd_fill(p.w, n, 1, scale), rnd_fill(p.bias, (size_t)c.N, 2, scale),
        rnd_fill(p.x, (size_t)MAX_M * (size_t)c.K, 3, scale);
    void *stored = block_alloc(n * 4);
    td_convert(stored, from, p.w, TD_F32, n);
    td_convert(p.w, TD_F32, stored, from, n);
    p.packed = block_alloc(o->packed_bytes(c.N, c.K, slices, from));
    for (int n0 = 0; n0 < c.N; n0 += 32)
        o->pack(p.packed, stored, from, c.N, c.K, slices, n0, n0 + 32 < c.N ? n0 + 32 : c.N);
    p.scratch = block_alloc(o->scratch_bytes(MAX_M, c.K, 16, MAX_TEAM));
    p.weight = (td_weight){
        .N = c.N, .K = c.K, .dtype = o->packed_dtype(from), .p = p.packed, .bias = p.bias, .slices = slices};
    free(stored);
    return p;
}

static void problem_close(problem *p)
{
    free(p->w), free(p->bias), free(p->x), free(p->packed), free(p->scratch);
}

/* As the family's products read it. */
static float rounded(const problem *p, float v)
{
    return p->weight.dtype == TD_F16 ? td_f16_to_f32(td_f32_to_f16(v)) : td_bf16_to_f32(td_f32_to_bf16(v));
}

/* The sum of the amx family's matrix law over [k0, k1). */
static float runs(const problem *p, const float *x, int n, int k0, int k1)
{
    float acc = 0;
    const float *w = p->w + (size_t)n * (size_t)p->K;
    for (int run = k0; run < k1; run += 32) {
        float even = 0, odd = 0;
        for (int k = run; k < run + 32; k += 2) { /* the zeros of the last run count: -0 + 0 x 0 is 0 */
            even = fmaf(k < k1 ? rounded(p, x[k]) : 0, k < k1 ? rounded(p, w[k]) : 0, even);
            odd = fmaf(k + 1 < k1 ? rounded(p, x[k + 1]) : 0, k + 1 < k1 ? rounded(p, w[k + 1]) : 0, odd);
        }
        acc = acc + (even + odd);
    }
    return acc;
}

/* The other x86 families': one chain. */
static float chain(const problem *p, const float *x, int n, int k0, int k1)
{
    float acc = 0;
    for (int k = k0; k < k1; k += 2) {
        float x0 = rounded(p, x[k]), w0 = rounded(p, p->w[(size_t)n * (size_t)p->K + (size_t)k]), x1 = 0, w1 = 0;
        if (k + 1 < p->K) x1 = rounded(p, x[k + 1]), w1 = rounded(p, p->w[(size_t)n * (size_t)p->K + (size_t)k + 1]);
        acc = fmaf(x0, w0, fmaf(x1, w1, acc));
    }
    return acc;
}

/* The matrix law, one output at a time. */
static float law(const td_ops *o, const problem *p, const float *x, int n, float old, bool add)
{
    float s[TD_MAX_SLICES] = {0}, acc;
    int S = p->weight.slices, len = p->K / S;
    bool amx = !strcmp(o->numerics, "cpu-amx-bf16");
    for (int i = 0; i < S; i++) s[i] = (amx ? runs : chain)(p, x, n, i * len, i + 1 < S ? (i + 1) * len : p->K);
    if (S == 8) acc = ((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7]));
    else if (S == 4) acc = (s[0] + s[1]) + (s[2] + s[3]);
    else acc = S == 2 ? s[0] + s[1] : s[0];
    if (p->weight.bias) acc = acc + p->bias[n];
    return add ? old + acc : acc;
}

/* In double, of the values or of what rounding makes of them; size: the sum of magnitudes. */
static double exact(const problem *p, const float *x, int n, float old, bool add, bool round, double *size)
{
    double s = p->weight.bias ? (double)p->bias[n] : 0;
    *size = fabs(s);
    for (int k = 0; k < p->K; k++) {
        float a = x[k], b = p->w[(size_t)n * (size_t)p->K + (size_t)k];
        double t = round ? (double)rounded(p, a) * (double)rounded(p, b) : (double)a * (double)b;
        s += t, *size += fabs(t);
    }
    return add ? s + (double)old : s;
}

/* Half an ulp for each rounding on the longest way to an output, of sums that are at most `size`; what is flushed is
 * below the least normal number, at most once for each product and sum. */
static bool near_exact(const problem *p, const float *x, int n, float old, bool add, float got)
{
    double size, want = exact(p, x, n, old, add, true, &size), steps = p->K + 8;
    size += fabs((double)old);
    return fabs((double)got - want) <= 1.01 * steps * (0x1p-24 * size + 2 * 0x1p-126);
}

static void run(const td_ops *o, const problem *p, int threads, const float *x, int M, float *y, size_t ldy,
                bool add)
{
    o->linear(team(threads), p->scratch, &p->weight, x, (size_t)p->K, M, y, ldy, add);
}

static unsigned flush_denormals(void)
{
#if defined(__x86_64__)
    unsigned old = _mm_getcsr();
    _mm_setcsr(old | 0x8040);
    return old;
#else
    return 0;
#endif
}

static void restore(unsigned csr)
{
#if defined(__x86_64__)
    _mm_setcsr(csr);
#else
    (void)csr;
#endif
}

/* Every M, add and no add, against the law (x86) or double (ref: half an ulp of f32, 1e-7 of the sum of
 * magnitudes). */
static void values(const td_ops *o, gemm_case c, td_dtype from, float scale, int slices)
{
    problem p = problem_open(o, c, from, scale, slices);
    size_t ldy = (size_t)c.N + PAD;
    float *y = floats(MAX_M * ldy);
    for (int M = 1; M <= MAX_M; M++) {
        bool add = M % 2;
        p.weight.bias = M % 3 ? p.bias : NULL;
        for (size_t i = 0; i < MAX_M * ldy; i++) y[i] = add ? (float)(i % 7) : NAN;
        run(o, &p, M % MAX_TEAM + 1, p.x, M, y, ldy, add);
        int bad = 0, far = 0, outside = 0;
        unsigned csr = is_ref(o) ? 0 : flush_denormals();
        for (int m = 0; m < M; m++)
            for (size_t n = 0; n < ldy; n++) {
                float got = y[(size_t)m * ldy + n], old = (float)(((size_t)m * ldy + n) % 7);
                const float *x = p.x + (size_t)m * (size_t)c.K;
                if (n >= (size_t)c.N) {
                    outside += add ? got != old : got == got;
                } else if (is_ref(o)) {
                    double size, want = exact(&p, x, (int)n, old, add, false, &size);
                    bad += !(fabs((double)got - want) <= (slices > 1 ? 3e-7 : 1e-7) * (size + fabs(want)) + 1e-44);
                } else {
                    float want = TEST_X86_LAW ? law(o, &p, x, (int)n, old, add) : got;
                    bad += memcmp(&got, &want, 4) != 0;
                    far += !near_exact(&p, x, (int)n, old, add, got);
                }
            }
        if (!is_ref(o)) restore(csr);
        T_OK(!bad, "%s N=%d K=%d M=%d slices %d scale %g: %d outputs differ", o->family, c.N, c.K, M, slices,
             (double)scale, bad);
        T_OK(!far, "%s N=%d K=%d M=%d slices %d scale %g: %d outputs are far from double", o->family, c.N, c.K, M, slices,
             (double)scale, far);
        T_OK(!outside, "%s N=%d K=%d M=%d: wrote outside", o->family, c.N, c.K, M);
    }
    free(y);
    problem_close(&p);
}

/* Each row alone, at any place of any batch and by any team: the same bits. */
static void invariance(const td_ops *o, gemm_case c, int slices)
{
    problem p = problem_open(o, c, TD_BF16, 1, slices);
    size_t N = (size_t)c.N;
    float *alone = floats(MAX_M * N), *y = floats(MAX_M * N);
    for (int m = 0; m < MAX_M; m++)
        run(o, &p, 1, p.x + (size_t)m * (size_t)c.K, 1, alone + (size_t)m * N, N, false);
    for (int M = 1; M <= MAX_M; M++)
        for (int threads = 1; threads <= MAX_TEAM; threads++) {
            int at = (M * 7 + threads) % (MAX_M - M + 1);
            run(o, &p, threads, p.x + (size_t)at * (size_t)c.K, M, y, N, false);
            T_OK(!memcmp(y, alone + (size_t)at * N, (size_t)M * N * 4), "%s N=%d M=%d threads=%d", o->family,
                 c.N, M, threads);
        }
    free(alone), free(y);
    problem_close(&p);
}

/* Rank r of `ranks` computes its columns of K alone, into parts. */
static void rank_part(const td_ops *o, const problem *p, int r, int ranks, int M, float *parts, size_t ld)
{
    int len = p->K / ranks;
    float *w = floats((size_t)p->N * (size_t)len);
    for (int n = 0; n < p->N; n++)
        memcpy(w + (size_t)n * (size_t)len, p->w + (size_t)n * (size_t)p->K + (size_t)r * (size_t)len,
               (size_t)len * 4);
    void *packed = block_alloc(o->packed_bytes(p->N, len, p->weight.slices / ranks, TD_F32));
    o->pack(packed, w, TD_F32, p->N, len, p->weight.slices / ranks, 0, p->N);
    td_weight weight = {
        .N = p->N, .K = len, .dtype = o->packed_dtype(TD_F32), .p = packed, .slices = p->weight.slices / ranks};
    o->linear(team(r % MAX_TEAM + 1), p->scratch, &weight, p->x + (size_t)r * (size_t)len, (size_t)p->K, M, parts,
              ld, false);
    free(w), free(packed);
}

/* One rank with all slices = 1, 2, 4 .. ranks with some each and the tree over their parts, bit for bit. */
static void ranks_agree(const td_ops *o, gemm_case c, int slices, int M)
{
    problem p = problem_open(o, c, TD_F32, 1, slices);
    size_t ld = (size_t)c.N + PAD, stride = (size_t)M * ld + 5, ldy = (size_t)c.N + 1;
    float *want = floats((size_t)M * ldy), *y = floats((size_t)M * ldy), *parts = floats(8 * stride);
    bool add = M % 2, bias = M % 3 != 0;
    if (!bias) p.weight.bias = NULL;
    for (size_t i = 0; i < (size_t)M * ldy; i++) want[i] = (float)(i % 7);
    run(o, &p, 1, p.x, M, want, ldy, add);
    for (int ranks = 1; ranks <= slices; ranks *= 2) {
        for (int r = 0; r < ranks; r++) rank_part(o, &p, r, ranks, M, parts + (size_t)r * stride, ld);
        for (size_t i = 0; i < (size_t)M * ldy; i++) y[i] = (float)(i % 7);
        o->sum_tree(team(ranks % MAX_TEAM + 1), parts, stride, ranks, M, c.N, ld, p.weight.bias, y, ldy, add);
        T_OK(!memcmp(y, want, (size_t)M * ldy * 4), "%s N=%d K=%d M=%d: %d slices on %d ranks", o->family, c.N,
             c.K, M, slices, ranks);
    }
    free(want), free(y), free(parts);
    problem_close(&p);
}

/* More than the product takes at a time, of rows, of K and of columns, in several parts each: each row as alone. Without
 * residual, outputs of whole cache lines. */
static void parts(const td_ops *o, gemm_case c, int slices, int M, bool add)
{
    problem p = problem_open(o, c, TD_BF16, 1, slices);
    size_t K = (size_t)c.K, ldy = ((size_t)c.N + PAD + 15) / 16 * 16, bytes = (size_t)M * ldy * 4;
    float *y = block_alloc(bytes), *alone = block_alloc(bytes);
    free(p.x), free(p.scratch);
    rnd_fill(p.x = floats((size_t)M * K), (size_t)M * K, 4, 1);
    p.scratch = block_alloc(o->scratch_bytes(M, c.K, 16, MAX_TEAM));
    for (size_t i = 0; i < bytes / 4; i++) y[i] = alone[i] = (float)(i % 7);
    run(o, &p, 2, p.x, M, y, ldy, add);
    for (int m = 0; m < M; m++) run(o, &p, 1, p.x + (size_t)m * K, 1, alone + (size_t)m * ldy, ldy, add);
    T_OK(!memcmp(y, alone, bytes), "%s N=%d K=%d M=%d", o->family, c.N, c.K, M);
    free(y), free(alone);
    problem_close(&p);
}

static void slices_fit(void)
{
    T_OK(td_slices_fit(7, 1) && td_slices_fit(16, 8) && td_slices_fit(8, 4) && td_slices_fit(12, 2));
    T_OK(!td_slices_fit(24, 8) && !td_slices_fit(6, 2) && !td_slices_fit(12, 3) && !td_slices_fit(64, 16));
    T_OK(!td_slices_fit(64, 0) && !td_slices_fit(64, -2) && !td_slices_fit(0, 2));
}

static void nan_stays(const td_ops *o)
{
    problem p = problem_open(o, (gemm_case){70, 66}, TD_F32, 1, 1);
    float *y = floats(30 * 70), *clean = floats(30 * 70);
    run(o, &p, 2, p.x, 30, clean, 70, false);
    p.x[13 * 66 + 5] = NAN, p.x[20 * 66] = INFINITY;
    run(o, &p, 2, p.x, 30, y, 70, false);
    for (int m = 0; m < 30; m++) {
        if (m == 13) T_EQ(count_nan(y + m * 70, 70), 70);
        else if (m != 20) T_OK(!memcmp(y + m * 70, clean + m * 70, 70 * 4), "%s row %d", o->family, m);
    }
    free(y), free(clean);
    problem_close(&p);
}

/* NaN and infinity in a row of W stay in that output: beside it in its panel, before and behind the ends of panels and of
 * slices. */
static void weights_stay(const td_ops *o, gemm_case c, int slices)
{
    enum { M = 19 };
    problem p = problem_open(o, c, TD_F32, 1, slices);
    size_t N = (size_t)c.N;
    float *y = floats(M * N), *clean = floats(M * N);
    run(o, &p, 2, p.x, M, clean, N, false);
    for (int n = 1; n < c.N; n += 31) p.w[n * c.K] = NAN, p.w[n * c.K + c.K - 1] = -INFINITY;
    o->pack(p.packed, p.w, TD_F32, c.N, c.K, slices, 0, c.N);
    run(o, &p, 2, p.x, M, y, N, false);
    for (int i = 0; i < M * c.N; i++)
        if (i % c.N % 31 == 1) T_OK(y[i] != y[i], "%s column %d", o->family, i % c.N);
        else T_OK(!memcmp(y + i, clean + i, 4), "%s N=%d K=%d row %d column %d", o->family, c.N, c.K, i / c.N, i % c.N);
    free(y), free(clean);
    problem_close(&p);
}

/* Bytes that end (to a multiple of align) where the next page cannot be touched. */
typedef struct fenced {
    char *map, *p;
    size_t pages;
} fenced;

static fenced fence(size_t bytes, size_t align)
{
    size_t page = 4096, n = (bytes + page - 1) / page * page;
    fenced f = {.pages = n + page};
    f.map = mmap(NULL, f.pages, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TD_CHECK(f.map != MAP_FAILED && !mprotect(f.map + n, page, PROT_NONE));
    memset(f.map, 0xff, n);
    f.p = f.map + (n - bytes) / align * align;
    return f;
}

/* Every operand at the end of readable memory: one byte too far is a crash. */
static void in_bounds(const td_ops *o, gemm_case c, int slices)
{
    enum { MOST = 34 };
    problem p = problem_open(o, c, TD_F32, 1, slices);
    size_t N = (size_t)c.N, K = (size_t)c.K, packed = o->packed_bytes(c.N, c.K, slices, TD_F32);
    static const int rows[] = {1, 2, 5, 16, 17, 32, 33, MOST};
    fenced w = fence(packed, 64), bias = fence(N * 4, 4);
    memcpy(w.p, p.packed, packed), memcpy(bias.p, p.bias, N * 4);
    for (size_t i = 0; i < TD_COUNT(rows); i++) {
        size_t M = (size_t)rows[i];
        fenced x = fence(M * K * 4, 4), y = fence(M * N * 4, 4), s = fence(o->scratch_bytes((int)M, c.K, 1, 2), 64);
        float *want = floats(M * N);
        memcpy(x.p, p.x, M * K * 4);
        run(o, &p, 1, p.x, (int)M, want, N, false);
        td_weight fenced_w = p.weight;
        fenced_w.p = w.p, fenced_w.bias = (const float *)(void *)bias.p;
        o->linear(team(2), s.p, &fenced_w, (const float *)(void *)x.p, K, (int)M, (float *)(void *)y.p, N, false);
        T_OK(!memcmp(want, y.p, M * N * 4), "%s N=%d K=%d M=%zu", o->family, c.N, c.K, M);
        munmap(x.map, x.pages), munmap(y.map, y.pages), munmap(s.map, s.pages);
        free(want);
    }
    munmap(w.map, w.pages), munmap(bias.map, bias.pages);
    problem_close(&p);
}

/* A packed matrix read back row by row. */
static void embed(const td_ops *o)
{
    problem p = problem_open(o, (gemm_case){67, 35}, TD_BF16, 1, 1);
    int32_t ids[] = {0, 66, 31, 32, 67, -1};
    float *out = floats(6 * 36);
    o->embed_packed(team(2), &p.weight, ids, 6, out, 36);
    for (int t = 0; t < 6; t++)
        for (int k = 0; k < 35; k++)
            T_OK(out[t * 36 + k] == (t < 4 ? p.w[ids[t] * 35 + k] : 0), "%s id %d k %d", o->family, ids[t],
                 k);
    free(out);
    problem_close(&p);
}

int main(void)
{
    const td_ops *o;
    for (int f = 0; (o = td_ops_family(f)); f++) {
        for (size_t i = 0; i < TD_COUNT(gemm_odd); i++) {
            values(o, gemm_odd[i], i % 3 == 0 ? TD_F32 : i % 3 == 1 ? TD_BF16 : TD_F16, 1, 1);
            if (i % 4 == 2)
                values(o, gemm_odd[i], TD_F32, 1e-19f, 1); /* products and sums around the smallest normal */
            if (i % 4 == 3) values(o, gemm_odd[i], TD_F32, 1e-38f, 1); /* denormal inputs */
            if (i % 3 == 2) invariance(o, gemm_odd[i], 1);
            in_bounds(o, gemm_odd[i], 1);
        }
        for (size_t i = 0; i < TD_COUNT(gemm_sliced); i++)
            for (int slices = 2; slices <= TD_MAX_SLICES; slices *= 2) {
                values(o, gemm_sliced[i], i % 2 ? TD_F32 : TD_BF16, slices == 4 ? 1e-19f : 1, slices);
                if (i % 2) invariance(o, gemm_sliced[i], slices);
                if (i < 3) in_bounds(o, gemm_sliced[i], slices);
                for (int M = 1; M < MAX_M; M += M < 14 ? 1 : 11) ranks_agree(o, gemm_sliced[i], slices, M);
            }
        parts(o, (gemm_case){35, 20000}, 1, 101, true);
        parts(o, (gemm_case){530, 2176}, 8, 133, false);
        parts(o, (gemm_case){94, 512}, 8, 290, false);
        nan_stays(o);
        weights_stay(o, (gemm_case){70, 66}, 1), weights_stay(o, (gemm_case){97, 48}, 8);
        embed(o);
    }
    slices_fit();
    const td_ops *best;
    T_EQ(td_ops_open("auto", &best), TD_OK);
    T_OK(best == td_ops_family(0) || !is_ref(best));
    T_EQ(td_ops_open("nonsense", &best), TD_ENOSUP);
    return T_DONE();
}
