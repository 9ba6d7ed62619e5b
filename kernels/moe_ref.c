// SPDX-License-Identifier: Apache-2.0
/* kernels/moe_ref.c - mixture of experts: router and combination in double; placement, gathering and the
 * grouped product, which all CPU families share.
 *
 * The grouped product calls the family's own linear once per expert that got rows: an order of summation per
 * (N, K), whatever the number of rows. Experts with little work go one to a member, the others to the whole
 * team in turn; neither changes a bit. */
#include "common/check.h"
#include "kernels/moe.h"
#include <math.h>
#include <pthread.h>

/* ---- the router ---- */

enum { LOGIT_ROWS = 4 };

typedef struct logits_job {
    const td_table *w;
    const float *x;
    float *out;
    size_t ldx;
    int T;
} logits_job;

static void logits_item(void *arg, int i, int member)
{
    const logits_job *j = arg;
    (void)member;
    int t1 = TD_MIN((i + 1) * LOGIT_ROWS, j->T), K = j->w->K;
    for (int n = 0; n < j->w->N; n++)
        for (int t = i * LOGIT_ROWS; t < t1; t++) {
            const float *x = j->x + (size_t)t * j->ldx;
            size_t base = (size_t)n * (size_t)K;
            double s[8] = {0};
            for (int k = 0; k < K; k++)
                s[k & 7] += (double)x[k] * (double)td_load_f32(j->w->p, j->w->dtype, base + (size_t)k);
            j->out[(size_t)t * (size_t)j->w->N + (size_t)n] =
                (float)(((s[0] + s[1]) + (s[2] + s[3])) + ((s[4] + s[5]) + (s[6] + s[7])));
        }
}

static void logits(td_pool *pool, const td_table *w, const float *x, size_t ldx, int T, float *out)
{
    logits_job j = {w, x, out, ldx, T};
    td_pool_for(pool, (T + LOGIT_ROWS - 1) / LOGIT_ROWS, logits_item, &j);
}

typedef struct route_job {
    const td_route_law *law;
    const float *logits;
    int32_t *ids;
    float *weights;
} route_job;

static void route_row(void *arg, int t, int member)
{
    const route_job *j = arg;
    const td_route_law *law = j->law;
    const float *l = j->logits + (size_t)t * (size_t)law->n_experts;
    int32_t *ids = j->ids + (size_t)t * (size_t)law->top_k;
    float *w = j->weights + (size_t)t * (size_t)law->top_k, value[TD_MAX_TOP_K];
    (void)member;
    td_moe_top(l, law->n_experts, law->top_k, ids, value);
    double e[TD_MAX_TOP_K], top = 0, all = 0;
    for (int i = 0; i < law->top_k; i++) top += e[i] = exp((double)value[i] - (double)value[0]);
    for (int i = 0; i < law->n_experts; i++) all += exp((double)l[i] - (double)value[0]);
    double sum = td_moe_over_top(law) ? top : all;
    for (int i = 0; i < law->top_k; i++) w[i] = (float)(e[i] / sum * (double)law->scale);
}

static void route(td_pool *pool, const td_route_law *law, const float *l, int T, int32_t *ids, float *weights)
{
    route_job j = {law, l, ids, weights};
    td_pool_for(pool, T, route_row, &j);
}

/* ---- placement ---- */

static void place(td_pool *pool, const int32_t *ids, int T, int top_k, int n_experts, int32_t *row0,
                  int32_t *row)
{
    int n = T * top_k, next[TD_MAX_EXPERTS];
    (void)pool;
    for (int e = 0; e <= n_experts; e++) row0[e] = 0;
    for (int i = 0; i < n; i++) row0[ids[i] + 1]++;
    for (int e = 0; e < n_experts; e++) {
        row0[e + 1] += row0[e];
        next[e] = row0[e];
    }
    for (int i = 0; i < n; i++) row[i] = next[ids[i]]++;
}

typedef struct gather_job {
    const float *x;
    float *out;
    size_t ldx, ldo;
    const int32_t *row;
    int T, top_k, E, rows;
} gather_job;

static void gather_rows(void *arg, int i, int member)
{
    const gather_job *j = arg;
    (void)member;
    for (int t = i * j->rows; t < TD_MIN((i + 1) * j->rows, j->T); t++)
        for (int s = 0; s < j->top_k; s++) {
            int32_t r = j->row[(size_t)t * (size_t)j->top_k + (size_t)s];
            if (r >= 0)
                memcpy(j->out + (size_t)r * j->ldo, j->x + (size_t)t * j->ldx, (size_t)j->E * sizeof *j->x);
        }
}

static void gather(td_pool *pool, const float *x, size_t ldx, const int32_t *row, int T, int top_k, int E,
                   float *out, size_t ldo)
{
    gather_job j = {x, out, ldx, ldo, row, T, top_k, E, td_rows_per_item(T, (size_t)E * (size_t)top_k)};
    td_pool_for(pool, (T + j.rows - 1) / j.rows, gather_rows, &j);
}

/* ---- the grouped product ---- */

enum {
    SPREAD_ROWS = 16,          /* an expert with more rows is for the whole team, */
    SPREAD_PRODUCTS = 1 << 20, /* so is one with more multiply-adds: 50 us or more */
};

static td_pool *alone; /* of one member: runs on the caller and keeps no state, so all may share it */
static pthread_once_t alone_once = PTHREAD_ONCE_INIT;
static void open_alone(void)
{
    alone = td_pool_open(1);
}

typedef struct grouped_job {
    const td_ops *ops;
    const td_grouped *a;
    char *scratch;
    size_t stride;
    int expert[TD_MAX_EXPERTS]; /* those that go one to a member */
} grouped_job;

static void one_expert(const grouped_job *j, td_pool *pool, void *scratch, int e)
{
    const td_grouped *a = j->a;
    size_t r = (size_t)a->row0[e];
    j->ops->linear(pool, scratch, &a->w[e], (const float *)a->x + r * a->ldx, a->ldx, a->row0[e + 1] - a->row0[e],
                   a->y + r * a->ldy, a->ldy, false);
}

static void spread_item(void *arg, int i, int member)
{
    const grouped_job *j = arg;
    one_expert(j, alone, j->scratch + (size_t)member * j->stride, j->expert[i]);
}

static bool is_small(const td_weight *w, int rows)
{
    return rows <= SPREAD_ROWS && (size_t)rows * (size_t)w->N * (size_t)w->K <= SPREAD_PRODUCTS;
}

static void linear_grouped(const td_ops *ops, td_pool *pool, void *scratch, const td_grouped *a)
{
    grouped_job j = {.ops = ops, .a = a, .scratch = scratch};
    int n_small = 0;
    pthread_once(&alone_once, open_alone);
    for (int e = 0; e < a->n; e++) {
        int rows = a->row0[e + 1] - a->row0[e];
        if (rows <= 0) continue;
        if (!is_small(&a->w[e], rows))
            one_expert(&j, pool, scratch, e);
        else {
            size_t bytes = td_round64(ops->scratch_bytes(rows, a->w[e].K, 1, 1));
            if (bytes > j.stride) j.stride = bytes;
            j.expert[n_small++] = e;
        }
    }
    if (n_small == 1)
        one_expert(&j, pool, scratch, j.expert[0]);
    else
        td_pool_for(pool, n_small, spread_item, &j);
}

size_t td_moe_scratch_bytes(const td_ops *ops, int max_rows, int max_K, int n_threads)
{
    size_t team = ops->scratch_bytes(max_rows, max_K, 1, n_threads);
    size_t spread = td_round64(ops->scratch_bytes(SPREAD_ROWS, max_K, 1, 1)) * (size_t)n_threads;
    return team > spread ? team : spread;
}

/* ---- the combination ---- */

typedef struct combine_job {
    const float *y, *weights;
    float *out;
    size_t ldy, ldo;
    const int32_t *row;
    int top_k, E;
} combine_job;

static void combine_row(void *arg, int t, int member)
{
    const combine_job *j = arg;
    const int32_t *row = j->row + (size_t)t * (size_t)j->top_k;
    const float *w = j->weights + (size_t)t * (size_t)j->top_k;
    float *out = j->out + (size_t)t * j->ldo;
    (void)member;
    for (int i = 0; i < j->E; i++) {
        double s = 0;
        for (int k = 0; k < j->top_k; k++)
            if (row[k] >= 0) s += (double)w[k] * (double)j->y[(size_t)row[k] * j->ldy + (size_t)i];
        out[i] = (float)((double)out[i] + s);
    }
}

static void combine(td_pool *pool, const float *y, size_t ldy, const int32_t *row, const float *weights,
                    int T, int top_k, int E, float *out, size_t ldo)
{
    combine_job j = {y, weights, out, ldy, ldo, row, top_k, E};
    td_pool_for(pool, T, combine_row, &j);
}

void td_moe_fill_ref(td_ops *t)
{
    t->moe_logits = logits;
    t->moe_route = route;
    t->moe_place = place;
    t->moe_gather = gather;
    t->linear_grouped = linear_grouped;
    t->moe_combine = combine;
}
