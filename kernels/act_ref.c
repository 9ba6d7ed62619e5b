// SPDX-License-Identifier: Apache-2.0
/* kernels/act_ref.c - the gated activation, in double. */
#include "kernels/family.h"
#include <math.h>

typedef struct job {
    const float *x;
    float *out;
    size_t ldx, ldo;
    int F;
} job;

static void row(void *arg, int t, int member)
{
    (void)member;
    const job *j = arg;
    const float *x = j->x + (size_t)t * j->ldx;
    float *out = j->out + (size_t)t * j->ldo;
    for (int f = 0; f < j->F; f++) {
        double g = (double)x[f];
        out[f] = (float)(g / (1.0 + exp(-g)) * (double)x[j->F + f]);
    }
}

static void silu_mul(td_pool *pool, const float *x, size_t ldx, int T, int F, float *out, size_t ldo)
{
    job j = {x, out, ldx, ldo, F};
    td_pool_for(pool, T, row, &j);
}

void td_act_fill_ref(td_ops *t)
{
    t->silu_mul = silu_mul;
}
