// SPDX-License-Identifier: Apache-2.0
#include "worker/profile.h"
#include "common/check.h"
#include "common/clock.h"
#include "kernels/peak.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
enum { PARTS_PER_THREAD = 8, MAX_MEMBERS = 256 };
typedef struct sink {
    uint64_t bits;
    double sum;
    char pad[48];
} sink; /* one cache line each: results are kept, so nothing is optimized out */

/* ---- read ---- */

typedef struct reader {
    const uint8_t *p;
    size_t part;
    sink *out;
    bool fetch;
} reader;

static void read_part(void *arg, int i, int member)
{
    reader *r = arg;
    r->out[member].bits ^= td_peak_read(r->p + (size_t)i * r->part, r->part, r->fetch);
}

static void touch_part(void *arg, int i, int member)
{
    const reader *r = arg;
    (void)member;
    memset((uint8_t *)(uintptr_t)r->p + (size_t)i * r->part, i + 1, r->part);
}

td_status td_profile_read(td_pool *pool, td_profile_clock clock, size_t bytes, int passes, double *out)
{
    if (!clock) clock = td_spin_us;
    int parts = td_pool_size(pool) * PARTS_PER_THREAD;
    sink *s = td_xalloc(MAX_MEMBERS * sizeof *s);
    void *m = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (m == MAP_FAILED) {
        free(s);
        return td_fail(TD_EFULL, "no memory for a read of %zu bytes: %s", bytes, strerror(errno));
    }
    madvise(m, bytes, MADV_HUGEPAGE);
    reader r = {m, bytes / (size_t)parts / 256 * 256, s, false};
    td_pool_for(pool, parts, touch_part, &r);
    double best = 0;
    for (int i = 0; i < 2 * passes; i++) { /* as the hardware fetches, and with hints: the better one is the limit */
        r.fetch = i & 1;
        int64_t t = clock();
        td_pool_for(pool, parts, read_part, &r);
        t = clock() - t;
        double v = (double)r.part * parts / (double)TD_MAX(t, 1) * 1e6;
        best = TD_MAX(best, v);
    }
    munmap(m, bytes);
    free(s);
    *out = best;
    return TD_OK;
}

/* ---- multiply ---- */

enum { STEPS = 200000 };

typedef struct multiply {
    const char *family;
    sink *out;
} multiply;

static void multiply_part(void *arg, int i, int member)
{
    multiply *m = arg;
    (void)i;
    m->out[member].sum += td_peak_multiply(m->family, STEPS);
}

double td_profile_multiply(td_pool *pool, td_profile_clock clock, const td_ops *ops)
{
    if (!clock) clock = td_spin_us;
    int parts = td_pool_size(pool) * 4;
    double best = 0;
    for (int i = 0; i < 5; i++) {
        multiply m = {ops->family, td_xalloc(MAX_MEMBERS * sizeof(sink))};
        int64_t t = clock();
        td_pool_for(pool, parts, multiply_part, &m);
        t = clock() - t;
        double done = 0;
        for (int k = 0; k < MAX_MEMBERS; k++) done += m.out[k].sum;
        best = TD_MAX(best, done / (double)TD_MAX(t, 1) * 1e6);
        free(m.out);
    }
    return best;
}

/* ---- work ---- */

/* Keys that positions [pos0, pos0 + n) attend, summed. */
static double attended(uint32_t pos0, uint32_t n, uint32_t window)
{
    double sum = 0;
    for (uint32_t i = 0; i < n; i++) sum += window ? TD_MIN(pos0 + i + 1, window) : pos0 + i + 1;
    return sum;
}

td_work td_profile_work(const td_model_desc *d, td_dtype kv, uint32_t pos0, uint32_t n_rows,
                        uint32_t n_logits)
{
    double E = d->E, H = d->H, G = d->G, D = d->D, qkv = E * (H + 2 * G) * D;
    td_work w = {.ops = 2 * (qkv * d->L * n_rows + (double)d->V * E * n_logits)};
    for (int i = 0; i < d->L; i++) { /* the last layer goes on only with rows whose logits are wanted */
        const td_route_law *r = &d->moe.route;
        double ffn = d->layer[i].moe ? 3 * E * d->moe.F * r->top_k + E * r->n_experts : 3 * E * d->F;
        w.ops += 2 * (H * D * E + ffn) * (i < d->L - 1 ? n_rows : n_logits);
    }
    for (int g = 0; g < d->n_groups; g++) {
        const td_group_desc *q = &d->group[g];
        uint32_t end = pos0 + n_rows,
                 first = q->window && pos0 + 1 > (uint32_t)q->window ? pos0 + 1 - (uint32_t)q->window : 0;
        w.ops += 4 * H * D * q->n_slots * attended(pos0, n_rows, (uint32_t)q->window);
        w.kv_bytes += 2.0 * q->G * q->D * (double)td_dtype_bytes(kv) * q->n_slots * (end - first);
    }
    return w;
}

/* ---- the output matrix against a layer ---- */

enum { HEAD_ROWS = 8, HEAD_MAX_N = 16384, HEAD_PASSES = 3 };

/* Least of a few passes over matrices [N, K], one after the other in one block of weights, in us per pass. */
static int64_t time_products(td_pool *pool, const td_ops *ops, const int (*shape)[2], int n, void *scratch, float *x, float *y,
                             uint8_t *weights)
{
    int64_t best = INT64_MAX;
    for (int pass = 0; pass < HEAD_PASSES; pass++) {
        int64_t t = td_now_us();
        size_t at = 0;
        for (int i = 0; i < n; i++) {
            td_weight w = {.N = shape[i][0], .K = shape[i][1], .dtype = ops->packed_dtype(TD_BF16), .p = weights + at};
            ops->linear(pool, scratch, &w, x, (size_t)w.K, HEAD_ROWS, y, (size_t)w.N, false);
            at += (ops->packed_bytes(w.N, w.K, w.slices, TD_BF16) + 63) / 64 * 64;
        }
        best = TD_MIN(best, td_now_us() - t);
    }
    return TD_MAX(best, 1);
}

int td_profile_head_cost(td_pool *pool, const td_ops *ops, const td_model_desc *d, int tp)
{
    int k = d->moe.route.n_experts ? d->moe.route.top_k : 1, F = (k > 1 || d->moe.route.n_experts ? k * d->moe.F : d->F) / tp;
    int kv = TD_MAX(d->G / tp, 1), V = (d->V + tp - 1) / tp, N = TD_MIN(V, (int)HEAD_MAX_N), H = d->H / tp;
    const int layer[][2] = {{(H + 2 * kv) * d->D, d->E}, {d->E, H * d->D}, {2 * F, d->E}, {d->E, F}}, head[][2] = {{N, d->E}};
    size_t bytes = (ops->packed_bytes(N, d->E, 0, TD_BF16) + 63) / 64 * 64, most = (size_t)N;
    int max_K = d->E;
    for (size_t i = 0; i < TD_COUNT(layer); i++) {
        bytes += (ops->packed_bytes(layer[i][0], layer[i][1], 0, TD_BF16) + 63) / 64 * 64;
        most = TD_MAX(most, (size_t)layer[i][0]);
        max_K = TD_MAX(max_K, layer[i][1]);
    }
    void *scratch = aligned_alloc(64, (ops->scratch_bytes(HEAD_ROWS, max_K, d->D, td_pool_size(pool)) + 127) / 64 * 64);
    uint8_t *weights = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    float *x = calloc((size_t)HEAD_ROWS * (size_t)max_K, sizeof *x), *y = calloc((size_t)HEAD_ROWS * most, sizeof *y);
    int cost = 0;
    if (scratch && weights != MAP_FAILED && x && y) {
        memset(weights, 0, bytes); /* pages of its own: zeros that are all the same page would come from the cache */
        size_t head_at = bytes - (ops->packed_bytes(N, d->E, 0, TD_BF16) + 63) / 64 * 64;
        int64_t l = time_products(pool, ops, layer, (int)TD_COUNT(layer), scratch, x, y, weights);
        int64_t h = time_products(pool, ops, head, 1, scratch, x, y, weights + head_at);
        cost = (int)TD_MIN(10 * h * V / ((int64_t)N * l), (int64_t)1 << 20);
    }
    if (weights != MAP_FAILED) munmap(weights, bytes);
    free(scratch), free(x), free(y);
    return TD_MAX(cost, 1);
}
