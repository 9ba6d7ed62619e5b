// SPDX-License-Identifier: Apache-2.0
#include "kernels/gemm_drive.h"

static void pack_item(void *arg, int i, int member)
{
    (void)member;
    const td_gemm_job *j = arg;
    int from = i % j->strips * j->steps_per_strip, to = from + j->steps_per_strip;
    j->kind->pack(j, i / j->strips, from, to < (int)j->steps ? to : (int)j->steps);
}

static void panels_item(void *arg, int i, int member)
{
    const td_gemm_job *j = arg;
    j->kind->panels(j, j->chunk[i], j->chunk[i + 1], member);
}

static void plan_chunks(td_gemm_job *j, int members)
{
    int P = (int)td_panels(j->w->N), least = (P + TD_GEMM_CHUNKS - 1) / TD_GEMM_CHUNKS, at = 0;
    j->n_chunks = 0;
    while (at < P) {
        int left = P - at, n = j->n_chunks < members ? P * 3 / (4 * members) : left / (2 * members);
        if (n < least) n = least;
        j->chunk[j->n_chunks++] = at;
        at += n < left ? n : left;
    }
    j->chunk[j->n_chunks] = P;
}

static void plan_strips(td_gemm_job *j, int members)
{
    int unit = j->kind->strip_steps;
    j->strips = j->n_blocks >= 2 * members ? 1 : (2 * members + j->n_blocks - 1) / j->n_blocks;
    j->steps_per_strip = ((int)j->steps + j->strips - 1) / j->strips;
    j->steps_per_strip = (j->steps_per_strip + unit - 1) / unit * unit;
    j->strips = ((int)j->steps + j->steps_per_strip - 1) / j->steps_per_strip;
}

static void part(td_pool *pool, td_gemm_job *j)
{
    int members = td_pool_size(pool);
    j->slices = j->w->slices > 1 ? j->w->slices : 1;
    j->steps = j->kind->steps(j->w);
    j->n_blocks = (j->T + j->kind->block_rows - 1) / j->kind->block_rows;
    plan_strips(j, members);
    plan_chunks(j, members);
    if ((size_t)j->T * (size_t)j->w->K < (size_t)j->kind->pack_serial)
        for (int i = 0; i < j->n_blocks * j->strips; i++) pack_item(j, i, 0);
    else
        td_pool_for(pool, j->n_blocks * j->strips, pack_item, j);
    td_pool_for(pool, j->n_chunks, panels_item, j);
}

void td_gemm_drive(const td_gemm_kind *kind, td_pool *pool, void *scratch, const td_weight *w, const float *x,
                   size_t ldx, int T, float *y, size_t ldy, bool add)
{
    int each = kind->part_rows(w->K);
    for (int t = 0; t < T; t += each) {
        td_gemm_job j = {.kind = kind,
                         .w = w,
                         .x = x + (size_t)t * ldx,
                         .ldx = ldx,
                         .y = y + (size_t)t * ldy,
                         .ldy = ldy,
                         .packed = scratch,
                         .T = T - t < each ? T - t : each,
                         .add = add};
        part(pool, &j);
    }
}
