// SPDX-License-Identifier: Apache-2.0
/* kernels/choose_check_cuda.cu - the check before kernels are used (choose_cuda.h, rule 2).
 *
 * Products: small integers over 8, so that every sum is exact in f32 in any order: all kernels must give the
 * host's bits, and one that adds in less than f32, or from the wrong place, cannot. Products of codes: values that
 * are codes times powers of two, with scales that differ from row to row and block to block; within 2^-8 of the
 * sum of magnitudes, because tensor cores add codes in less than f32. Attention: the host's
 * result in double, within 0.03 (values are up to 1; rounding of weights and queries makes less than 0.02).
 */
#include "kernels/choose_cuda.h"
#include "kernels/cuda.h"
#include "kernels/td_cuda.h"
extern "C" {
#include "common/log.h"
}
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

namespace
{
enum { N = 48, K = 200, T = 80, FEW = 60 }; /* products */
enum { H = 4, G = 2, D = 64, P = 16, ROWS = 40, LONG = 301, PAGES = (ROWS + P - 1) / P + (LONG + P - 1) / P };
enum { GUARD = 64 };

struct arena { /* one block of device memory and its image here */
    td_dev *dev;
    char *device, *host;
    size_t used, bytes;
    td_status status;
};

template <class V> V *put(arena *a, const V *src, size_t n, V **where = nullptr)
{
    size_t at = a->used;
    a->used += (n * sizeof(V) + 255) / 256 * 256;
    if (a->used > a->bytes) abort(); /* the sizes above */
    if (src) memcpy(a->host + at, src, n * sizeof(V));
    if (where) *where = (V *)(a->host + at);
    return (V *)(a->device + at);
}

void keep(arena *a, td_status s)
{
    if (a->status == TD_OK && s != TD_OK) a->status = s;
}

void send(arena *a)
{
    keep(a, a->dev->upload(a->dev, TD_STREAM_COMPUTE, a->device, a->host, a->used));
    keep(a, a->dev->sync(a->dev, TD_STREAM_COMPUTE));
}

void fetch(arena *a, void *dst, const void *src, size_t bytes)
{
    if (a->status != TD_OK) return;
    keep(a, a->dev->download(a->dev, TD_STREAM_COMPUTE, dst, src, bytes));
    keep(a, a->dev->sync(a->dev, TD_STREAM_COMPUTE));
}

uint32_t seed;
/* -16 .. 16 eighths. */
float eighths()
{
    seed = seed * 1664525u + 1013904223u;
    return (float)((int)(seed >> 16) % 33 - 16) / 8.f;
}

/* ---- products ---- */

struct product {
    arena a;
    float x[T * K], w[N * K], bias[N], want[T * N], got[T * N];
    uint16_t w16[N * K];
    td_cuda_weight weight;
    td_cuda_gemm_args args;
    void *rows;
};

void make_product(product *p)
{
    seed = 1;
    for (float &v : p->x) v = eighths();
    for (int i = 0; i < N * K; i++) {
        p->w[i] = eighths();
        p->w16[i] = td_f32_to_bf16(p->w[i]);
    }
    for (float &v : p->bias) v = eighths();
    for (int t = 0; t < T; t++)
        for (int n = 0; n < N; n++) {
            float s = p->bias[n];
            for (int k = 0; k < K; k++) s += p->x[t * K + k] * p->w[n * K + k];
            p->want[t * N + n] = s;
        }
    arena *a = &p->a;
    size_t packed = td_cuda_gemm_packed_bytes(N, K, 0, TD_CUDA_W_BF16), ws = td_cuda_gemm_ws_bytes(T, N, K);
    char *image = nullptr, *zeros = nullptr;
    p->weight.N = N;
    p->weight.K = K;
    p->weight.type = TD_CUDA_W_BF16;
    p->weight.p = put<char>(a, nullptr, packed, &image);
    td_cuda_gemm_pack_host(image, p->w16, TD_BF16, N, K, 0, TD_CUDA_W_BF16, 0, N);
    p->weight.bias = put(a, p->bias, N);
    p->rows = put(a, p->w16, N * K);
    p->args.x = put(a, p->x, T * K);
    p->args.w = &p->weight;
    p->args.x_is_f32 = true;
    p->args.ldx = K;
    p->args.y = put<float>(a, p->got, T * N); /* not the answer */
    p->args.ldy = N;
    p->args.ws = put<char>(a, nullptr, ws, &zeros);
    memset(zeros, 0, ws);
    send(a);
}

/* Rows [0, rows) of the answer as it lies in y are the host's, bit for bit. */
bool product_is_right(product *p, int rows)
{
    memset(p->got, 0xff, sizeof p->got);
    fetch(&p->a, p->got, p->args.y, sizeof p->got);
    return p->a.status == TD_OK && !memcmp(p->got, p->want, (size_t)rows * N * sizeof(float));
}

void spoil(product *p)
{
    keep(&p->a, p->a.dev->fill(p->a.dev, TD_STREAM_COMPUTE, p->args.y, 0xff, T * N * sizeof(float)));
}

const char *portable_products(product *p)
{
    static const char *const names[] = {"product of few rows", "product in tiles of 64",
                                        "product in tiles of 128"};
    for (int kernel = 1; kernel <= 3; kernel++) {
        spoil(p);
        p->args.T = kernel == 1 ? FEW : T;
        p->args.kernel = kernel;
        keep(&p->a,
             td_cuda_status(td_cuda_gemm(p->a.dev->stream[TD_STREAM_COMPUTE], &p->args), names[kernel - 1]));
        if (!product_is_right(p, p->args.T)) return names[kernel - 1];
    }
    p->args.kernel = 0;
    p->args.T = T;
    return nullptr;
}

/* ---- attention ---- */

struct attention {
    arena a;
    float q[(ROWS + 1) * H * D], want[(ROWS + 1) * H * D], got[(ROWS + 1) * H * D];
    uint16_t kv16[PAGES * 2 * G * P * D];
    td_kv kv;
    td_cuda_attn_seq seq[2];
    td_cuda_attn_args args;
    float *out;
};

float kv_at(const attention *t, int page, int v, int g, int in_page, int d)
{
    return td_bf16_to_f32(
        t->kv16[((((size_t)page * 2 + (size_t)v) * G + (size_t)g) * P + (size_t)in_page) * D + (size_t)d]);
}

/* One row and head of a sequence whose pages are page0, page0 + 1, ... */
void attend(attention *t, int row, int head, int pos, int page0)
{
    double s[LONG], most = -1e30, sum = 0;
    const float *q = t->q + (row * H + head) * D;
    const int g = head / (H / G);
    for (int j = 0; j <= pos; j++) {
        s[j] = 0;
        for (int d = 0; d < D; d++)
            s[j] += (double)q[d] * (double)kv_at(t, page0 + j / P, 0, g, j % P, d) / 8;
        most = s[j] > most ? s[j] : most;
    }
    for (int j = 0; j <= pos; j++) sum += s[j] = exp(s[j] - most);
    for (int d = 0; d < D; d++) {
        double v = 0;
        for (int j = 0; j <= pos; j++) v += s[j] * (double)kv_at(t, page0 + j / P, 1, g, j % P, d);
        t->want[(row * H + head) * D + d] = (float)(v / sum);
    }
}

void make_attention(attention *t)
{
    arena *a = &t->a;
    int32_t pages[PAGES];
    seed = 2;
    for (float &v : t->q) v = eighths() / 2;
    for (uint16_t &v : t->kv16) v = td_f32_to_bf16(eighths() / 2);
    t->seq[0] = td_cuda_attn_seq{0, ROWS, 0, 0};
    t->seq[1] = td_cuda_attn_seq{ROWS, 1, LONG - 1, (ROWS + P - 1) / P};
    for (int i = 0; i < PAGES; i++) pages[i] = i;
    for (int h = 0; h < H; h++) {
        for (int r = 0; r < ROWS; r++) attend(t, r, h, r, 0);
        attend(t, ROWS, h, LONG - 1, t->seq[1].page0);
    }
    td_cuda_attn_args *g = &t->args;
    g->q = put(a, t->q, sizeof t->q / 4);
    g->ldq = g->ldo = H * D;
    g->out = t->out = put(a, t->got, sizeof t->got / 4);
    g->out_dtype = TD_F32;
    t->kv = td_kv{(uint8_t *)put(a, t->kv16, sizeof t->kv16 / 2), TD_BF16, PAGES, P, G, D};
    g->kv = &t->kv;
    g->seq = put(a, t->seq, 2);
    g->n_seq = 2;
    g->pages = put(a, pages, PAGES);
    g->H = H;
    g->G = G;
    g->D = D;
    g->scale = 0.125f;
    g->T = ROWS + 1;
    g->prompts = g->few = true;
    g->max_slots = td_attn_parts(1, LONG - 1, 0, H);
    g->plan = put<char>(a, nullptr, td_cuda_attn_plan_bytes(2));
    g->ws = put<char>(a, nullptr, td_cuda_attn_ws_bytes(g->max_slots, D));
    send(a);
    keep(a, td_cuda_status(td_cuda_attn_plan(a->dev->stream[TD_STREAM_COMPUTE], g->seq, 2, H, G, D, 0,
                                             g->max_slots, TD_CUDA_ATTN_FEW, (void *)g->plan),
                           "plan of attention"));
}

bool attention_is_right(attention *t)
{
    memset(t->got, 0xff, sizeof t->got);
    fetch(&t->a, t->got, t->out, sizeof t->got);
    for (size_t i = 0; i < sizeof t->got / 4; i++)
        if (!(fabsf(t->got[i] - t->want[i]) <= 0.03f)) return false;
    return t->a.status == TD_OK;
}

/* ---- the check ---- */

td_status arena_open(arena *a, td_dev *dev, size_t bytes)
{
    void *p = nullptr;
    *a = arena{};
    a->dev = dev;
    a->bytes = bytes;
    a->host = (char *)calloc(1, bytes);
    if (!a->host) return td_fail(TD_EFULL, "out of memory for the check of the kernels");
    td_status s = dev->alloc(dev, bytes, &p);
    a->device = (char *)p;
    return s;
}

void arena_close(arena *a)
{
    if (a->device) a->dev->free(a->dev, a->device);
    free(a->host);
}

td_status wrong(const arena *a, const char *what)
{
    if (a->status != TD_OK) return a->status;
    return td_fail(TD_ENOSUP, "device cuda:%d (%s): %s computes otherwise than the host", a->dev->index,
                   a->dev->name, what);
}

/* A candidate that differs, or refuses the case, goes; a device that fails is an error. */
td_status candidate(td_cuda_choice *c, unsigned bit, const char *name, td_status called, bool right)
{
    if (called == TD_EDEVICE) return called;
    if (called == TD_OK && right) return TD_OK;
    td_cuda_choice_drop(c, bit);
    TD_WARN("%s computes otherwise than the portable kernel on %s: not used, kernels compute as %s", name,
            c->dev->name, c->numerics);
    return TD_OK;
}

/* With no other candidate left for the call. */
td_status check_gemm(td_cuda_choice *c, product *p, unsigned bit, const char *name)
{
    if (!(c->may & bit)) return TD_OK;
    td_cuda_choice only = *c;
    only.may = bit;
    spoil(p);
    td_status s = td_cuda_choice_gemm(&only, c->dev->stream[TD_STREAM_COMPUTE], &p->args, p->rows, nullptr);
    bool right = s == TD_OK && product_is_right(p, T);
    if (s == TD_OK && p->a.status != TD_OK) s = p->a.status;
    return candidate(c, bit, name, s, right);
}

/* ---- products of codes ---- */

enum { K8 = 256, N8 = 144, T8 = 70 }; /* two blocks of rows and columns; rows left over, T8 % 4 */

struct coded {
    arena a;
    float x[T8 * K8], want[T8 * N8], size[T8 * N8], got[T8 * N8], scale[N8 * 2];
    uint8_t w[N8 * K8];
};

/* A power of two that only its place has. */
float two_to(int i)
{
    return ldexpf(1.f, i % 5 - 2);
}

/* Every group of 128 columns has a 14: its scale is 2^-5, or for one scale a row, as well. */
void make_coded(coded *p)
{
    seed = 3;
    for (int i = 0; i < T8 * K8; i++) p->x[i] = i % 128 == i / K8 ? 14.f : 8 * eighths() / 2;
    for (uint8_t &v : p->w) v = td_f32_to_e4m3(8 * eighths() / 2);
}

void expect_coded(coded *p, int scale_rows, int scale_cols)
{
    const int cols = K8 / scale_cols;
    for (int i = 0; i < (N8 + scale_rows - 1) / scale_rows * cols; i++) p->scale[i] = two_to(i);
    for (int t = 0; t < T8; t++)
        for (int n = 0; n < N8; n++) {
            float s = 0, m = 0;
            for (int k = 0; k < K8; k++) {
                float v = p->x[t * K8 + k] * td_e4m3_to_f32(p->w[n * K8 + k]) *
                          p->scale[n / scale_rows * cols + k / scale_cols];
                s += v;
                m += fabsf(v);
            }
            p->want[t * N8 + n] = s;
            p->size[t * N8 + n] = m;
        }
}

bool coded_is_right(coded *p, const float *y)
{
    memset(p->got, 0xff, sizeof p->got);
    fetch(&p->a, p->got, y, sizeof p->got);
    for (int i = 0; i < T8 * N8; i++)
        if (!(fabsf(p->got[i] - p->want[i]) <= p->size[i] * 0x1p-8f)) return false;
    return p->a.status == TD_OK;
}

/* scale_cols K8: a scale a row. */
td_status check_scaling(td_cuda_choice *c, coded *p, int scale_rows, int scale_cols)
{
    arena *a = &p->a;
    void *stream = c->dev->stream[TD_STREAM_COMPUTE];
    td_cuda_weight w = {};
    td_cuda_gemm_args g = {};
    char *image = nullptr, *zeros = nullptr;
    a->used = 0;
    expect_coded(p, scale_rows, scale_cols);
    w.N = N8;
    w.K = K8;
    w.type = scale_cols == K8 ? TD_CUDA_W_E4M3_ROW : TD_CUDA_W_E4M3_BLOCK;
    w.scale_rows = scale_rows;
    w.p = put<char>(a, nullptr, td_cuda_gemm_packed_bytes(N8, K8, 0, w.type), &image);
    td_cuda_gemm_pack_host(image, p->w, TD_E4M3, N8, K8, 0, w.type, 0, N8);
    w.scale = put(a, p->scale, N8 * 2);
    g.x = put(a, p->x, T8 * K8);
    g.y = put<float>(a, p->got, T8 * N8);
    g.ws = put<char>(a, nullptr, td_cuda_gemm_ws_bytes(T8, N8, K8), &zeros);
    memset(zeros, 0, td_cuda_gemm_ws_bytes(T8, N8, K8));
    char *rows = put<char>(a, nullptr, td_cuda_choice_copy_bytes(&w));
    g.w = &w;
    g.x_is_f32 = true;
    g.ldx = K8;
    g.ldy = N8;
    g.T = T8;
    send(a);
    td_cuda_choice only = *c;
    only.may = TD_CUDA_LT_E4M3;
    keep(a, td_cuda_status(td_cuda_choice_copy(stream, &w, rows), "copy of a weight"));
    keep(a, c->dev->fill(c->dev, TD_STREAM_COMPUTE, g.y, 0xff, sizeof p->got));
    td_status s = a->status == TD_OK ? td_cuda_choice_gemm(&only, stream, &g, rows, nullptr) : a->status;
    bool right = s == TD_OK && coded_is_right(p, g.y);
    if (s == TD_OK && a->status != TD_OK) s = a->status;
    return candidate(c, TD_CUDA_LT_E4M3, "cuBLASLt with FP8", s, right);
}

td_status check_codes(td_cuda_choice *c)
{
    static const struct {
        int rows, cols;
    } cases[] = {{1, K8}, {128, 128}, {32, 128}};
    if (!(c->may & TD_CUDA_LT_E4M3)) return TD_OK;
    TD_TRY(td_cuda_choice_reserve(c, T8, K8, 0));
    coded *p = (coded *)calloc(1, sizeof *p);
    td_status s = p ? arena_open(&p->a, c->dev, ((size_t)1 << 20) + td_cuda_gemm_ws_bytes(T8, N8, K8))
                    : td_fail(TD_EFULL, "out of memory for the check of the kernels");
    if (s == TD_OK) make_coded(p);
    for (size_t i = 0; i < sizeof cases / sizeof *cases && s == TD_OK && c->may & TD_CUDA_LT_E4M3; i++)
        s = check_scaling(c, p, cases[i].rows, cases[i].cols);
    if (p) arena_close(&p->a);
    free(p);
    return s;
}

td_status check_products(td_cuda_choice *c, product *p)
{
    make_product(p);
    const char *bad = portable_products(p);
    if (bad) return wrong(&p->a, bad);
    TD_TRY(td_cuda_choice_reserve(c, T, K, 0));
    TD_TRY(check_gemm(c, p, TD_CUDA_LT, "cuBLASLt"));
    TD_TRY(check_gemm(c, p, TD_CUDA_GEMM_SM90A, "the product for Hopper"));
    return check_codes(c);
}

td_status check_attention(td_cuda_choice *c, attention *t)
{
    make_attention(t);
    void *stream = c->dev->stream[TD_STREAM_COMPUTE];
    keep(&t->a, td_cuda_status(td_cuda_attention(stream, &t->args), "attention"));
    if (!attention_is_right(t)) return wrong(&t->a, "attention");
    if (!(c->may & TD_CUDA_ATTN_SM90A)) return TD_OK;
    TD_TRY(td_cuda_choice_reserve(c, 1, 1, (ROWS * H + 2) * G));
    keep(&t->a, c->dev->fill(c->dev, TD_STREAM_COMPUTE, t->out, 0xff, sizeof t->got));
    td_status s = td_cuda_choice_attention(c, stream, &t->args);
    bool right = s == TD_OK && attention_is_right(t);
    if (s == TD_OK && t->a.status != TD_OK) s = t->a.status;
    return candidate(c, TD_CUDA_ATTN_SM90A, "attention for Hopper", s, right);
}
} // namespace

td_status td_cuda_choice_check(td_cuda_choice *c)
{
    const size_t room = (size_t)1 << 20;
    timespec t0, t1;
    product *p = (product *)calloc(1, sizeof *p);
    attention *t = (attention *)calloc(1, sizeof *t);
    clock_gettime(CLOCK_MONOTONIC, &t0);
    td_status s = p && t ? TD_OK : td_fail(TD_EFULL, "out of memory for the check of the kernels");
    if (s == TD_OK) s = arena_open(&p->a, c->dev, room + td_cuda_gemm_ws_bytes(T, N, K));
    if (s == TD_OK) s = check_products(c, p);
    if (s == TD_OK) s = arena_open(&t->a, c->dev, room);
    if (s == TD_OK) s = check_attention(c, t);
    if (p) arena_close(&p->a);
    if (t) arena_close(&t->a);
    free(p);
    free(t);
    clock_gettime(CLOCK_MONOTONIC, &t1);
    TD_DEBUG_LOG("kernels checked in %.1f ms: %s",
                 (double)(t1.tv_sec - t0.tv_sec) * 1e3 + (double)(t1.tv_nsec - t0.tv_nsec) * 1e-6,
                 s == TD_OK ? c->numerics : td_reason());
    return s;
}
