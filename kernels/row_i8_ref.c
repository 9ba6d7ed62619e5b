// SPDX-License-Identifier: Apache-2.0
/* kernels/row_i8_ref.c - see row_i8.h: of every family of this host. */
#include "kernels/row_i8.h"
#include "common/check.h"
#include "kernels/family.h"
#include <math.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>

enum { GROUP = TD_QUANT_GROUP, MOST = 127, ITEM_ROWS = 8 };

typedef struct job {
    float *x;
    char *rows;
    int T, E;
} job;

static size_t scales_at(int E) { return ((size_t)E + 3) / 4 * 4; }

/* n values; returns the scale. */
static float quant_group(const float *x, int n, int8_t *q)
{
    float most = 0;
    bool finite = true;
    for (int i = 0; i < n; i++) {
        most = fmaxf(most, fabsf(x[i]));
        finite &= isfinite(x[i]) != 0;
    }
    float scale = finite ? most / MOST : NAN;
    for (int i = 0; i < n; i++) q[i] = scale > 0 ? (int8_t)lrintf(fminf(fmaxf(x[i] / scale, -MOST), MOST)) : 0;
    return scale;
}

static void quant_item(void *arg, int item, int member)
{
    const job *j = arg;
    (void)member;
    for (int t = item * ITEM_ROWS; t < TD_MIN((item + 1) * ITEM_ROWS, j->T); t++) {
        char *row = j->rows + (size_t)t * td_quant_row_bytes(j->E), *scale = row + scales_at(j->E);
        memset(row + j->E, 0, scales_at(j->E) - (size_t)j->E);
        for (int e = 0; e < j->E; e += GROUP, scale += sizeof(float)) {
            float s = quant_group(j->x + (size_t)t * (size_t)j->E + e, TD_MIN((int)GROUP, j->E - e), (int8_t *)row + e);
            memcpy(scale, &s, sizeof s);
        }
    }
}

static void dequant_item(void *arg, int item, int member)
{
    const job *j = arg;
    (void)member;
    for (int t = item * ITEM_ROWS; t < TD_MIN((item + 1) * ITEM_ROWS, j->T); t++) {
        const char *row = j->rows + (size_t)t * td_quant_row_bytes(j->E), *scale = row + scales_at(j->E);
        float *x = j->x + (size_t)t * (size_t)j->E, s = 0;
        for (int e = 0; e < j->E; e++) {
            if (e % GROUP == 0) memcpy(&s, scale + (size_t)(e / GROUP) * sizeof s, sizeof s);
            x[e] = (float)(int8_t)row[e] * s;
        }
    }
}

void td_quant_rows(td_pool *pool, const float *x, int T, int E, void *out)
{
    job j = {(float *)(uintptr_t)x, out, T, E};
    td_pool_for(pool, (T + ITEM_ROWS - 1) / ITEM_ROWS, quant_item, &j);
}

void td_dequant_rows(td_pool *pool, const void *in, int T, int E, float *x)
{
    job j = {x, (char *)(uintptr_t)in, T, E};
    td_pool_for(pool, (T + ITEM_ROWS - 1) / ITEM_ROWS, dequant_item, &j);
}

void td_row_i8_fill_ref(td_ops *t)
{
    t->rows_to_i8 = td_quant_rows;
    t->rows_of_i8 = td_dequant_rows;
}
