/* worker/sched.h - which rows go into the next step. A pure function; roles and phases are only its inputs.
 *
 * Decode-maximal batching: every decode row first (stall-free), then prompt chunks, oldest first, in what the
 * budget leaves.
 * A chunk may also be bounded per sequence (max_chunk) and by the logits it needs (score rows).
 *
 * A pipeline of stages waits for its first step and its last: td_sched_pipe_rows bounds a step's prompt rows so that those
 * are small beside the whole. With n equal steps, d stages take (n + d - 1) / n of the time; with unequal ones the largest
 * step is waited for, so the rows that are left say how many, not how many there might be.
 *
 * Shapes: items in order of arrival. Source: Sarathi-Serve (OSDI 24) 4.2, algorithm 3. Threads: pure. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SCHED_H
#define TD_WORKER_SCHED_H

#include <stdbool.h>
#include <stdint.h>

typedef struct td_sched_item {
    uint32_t want;      /* rows until this sequence can be sampled; 1 and `decode`: a decode row */
    bool decode;
    bool all_logits;    /* each row needs logits (prompt logprobs) */
    uint32_t rows;      /* out */
} td_sched_item;

/* max_chunk 0: none; max_prompt_rows, of all prompts together, 0: none */
typedef struct td_sched_caps { uint32_t max_rows, max_chunk, max_logits, max_prompt_rows; } td_sched_caps;

/* Rows left of the budget afterwards. */
uint32_t td_sched_plan(td_sched_item *item, uint32_t n, td_sched_caps caps);

/* max_prompt_rows for `wanted` prompt rows in `stages` stages: a 32nd of a stage's wait each, at least `least`, below
 * which the matrix products lose more than the wait costs (td_ops.full_rows; 2 % from 128 rows to 64 in vectors, half from
 * 256 to 64 on tiles). */
enum { TD_SCHED_PIPE_STEPS = 32 };
uint32_t td_sched_pipe_rows(uint64_t wanted, int stages, uint32_t least);

#endif
