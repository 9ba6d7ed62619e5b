/* kernels/gemm_drive.h - internal: how the x86 families cut a product y = W x into work for a pool.
 *
 * Model:   rows are packed in even blocks (first rounded to bf16, in the order a family's tiles want), then runs of
 *          panels (x86.h) are handed out, each against all blocks. Many rows go in parts, one after the other, so that
 *          a part's packed x stays close while every panel passes over it.
 * Rules:   1. Which member runs what changes no bits: an output belongs to one panel and one block.
 *          2. Runs are long first (a run is one sequential stream), then ever shorter, so that a member which lost its
 *             core for a while does not hold up the others.
 * Threads: as td_ops.linear: one call at a time per pool.
 * Errors:  none.
 * Limits:  at most TD_GEMM_CHUNKS runs of panels. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_GEMM_DRIVE_H
#define TD_KERNELS_GEMM_DRIVE_H

#include "kernels/x86.h"

enum { TD_GEMM_CHUNKS = 512 };

typedef struct td_gemm_job td_gemm_job;

/* What a family is to the driver. A step is the unit in which it packs x along K. */
typedef struct td_gemm_kind {
    int block_rows;  /* most rows of a block */
    int strip_steps; /* strips are multiples of it: they share no cache line, whatever the rows */
    int pack_serial; /* elements of x below which forking costs more than packing */
    size_t (*steps)(const td_weight *w); /* of all K */
    int (*part_rows)(int K);             /* rows of a part, at least block_rows */
    void (*pack)(const td_gemm_job *j, int block, int step0, int step1);
    void (*panels)(const td_gemm_job *j, int first, int end, int member); /* member: of the pool */
} td_gemm_kind;

struct td_gemm_job {
    const td_gemm_kind *kind;
    const td_weight *w;
    const float *x;
    size_t ldx, ldy, steps;
    float *y;
    uint32_t *packed; /* block after block, in the family's order */
    int T, n_blocks, strips, steps_per_strip, slices;
    bool add;
    int n_chunks, chunk[TD_GEMM_CHUNKS + 1]; /* first panel of each run */
};

/* Rows are split evenly (16 = 8 + 8, 32 = 11 + 11 + 10): first row of block b. */
static inline int td_block_row(const td_gemm_job *j, int b)
{
    int each = j->T / j->n_blocks, more = j->T % j->n_blocks;
    return b * each + (b < more ? b : more);
}

void td_gemm_drive(const td_gemm_kind *kind, td_pool *pool, void *scratch, const td_weight *w, const float *x,
                   size_t ldx, int T, float *y, size_t ldy, bool add);

#endif
