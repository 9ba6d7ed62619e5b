/* kernels/act_tile.h - the gated activation for the x86 families; included by act_avx*.c, which define
 * ACT_FILL. */
// SPDX-License-Identifier: Apache-2.0
#include "kernels/family.h"
#include "kernels/simd.h"

typedef struct job {
    const float *x;
    float *out;
    size_t ldx, ldo;
    int T, F, rows;
} job;

/* g / (1 + exp(-g)) * u */
TD_INLINE v16 gate(v16 g, v16 u)
{
    v16 e = v16_exp(v16_sub(v16_zero(), g));
    return v16_mul(v16_div(g, v16_add(v16_set1(1.0f), e)), u);
}

static void rows(void *arg, int i, int member)
{
    (void)member;
    const job *j = arg;
    int t1 = (i + 1) * j->rows < j->T ? (i + 1) * j->rows : j->T, F = j->F;
    unsigned fp = td_fp_enter();
    for (int t = i * j->rows; t < t1; t++) {
        const float *x = j->x + (size_t)t * j->ldx;
        float *out = j->out + (size_t)t * j->ldo;
        int f = 0;
        for (; f + 16 <= F; f += 16) v16_store(out + f, gate(v16_load(x + f), v16_load(x + F + f)));
        if (f < F) v16_store_n(out + f, gate(v16_load_n(x + f, F - f), v16_load_n(x + F + f, F - f)), F - f);
    }
    td_fp_leave(fp);
}

static void silu_mul(td_pool *pool, const float *x, size_t ldx, int T, int F, float *out, size_t ldo)
{
    job j = {x, out, ldx, ldo, T, F, td_rows_per_item(T, 2 * (size_t)F)};
    td_pool_for(pool, (T + j.rows - 1) / j.rows, rows, &j);
}

void ACT_FILL(td_ops *t)
{
    t->silu_mul = silu_mul;
}
