/* worker/step.h - one step of the engine: everything the ranks need to compute it, in one flat, pointer-free buffer.
 *
 *   [td_step header][rows: ids, pos][seqs][page tables by group][copies][logit rows][samples][penalties][biases]
 *
 * Rank 0 builds it, broadcasts it, and every rank executes it without deciding anything; tests record and replay
 * it. All positions are absolute; offsets are in bytes from the start of td_step, 8-byte aligned.
 *
 * Ids:       an id below 0 is a token that rank 0 has not seen yet: -1 - i stands for the one drawn as sample i
 *            of the step submitted before this one. Whoever computes the rows puts it in (td_ops.fill_ids).
 * Rules:     1. A sequence's rows are consecutive in the batch and at consecutive positions.
 *            2. Rows of a step never write a page that another sequence reads in the same step.
 *            3. Sampling is a pure function of the logits and this struct.
 * Ownership: the buffer belongs to whoever built it, until collect. Threads: read-only once submitted.
 * Limits:    TD_MAX_GROUPS; rows and seqs by configuration (max-num-batched-tokens, max-num-seqs). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_STEP_H
#define TD_WORKER_STEP_H

#include "kernels/ops.h"
#include <stdint.h>

enum { TD_MAX_GROUPS = 4 };

/* Where a row of logits lies: which context-parallel rank computes it, and where among that rank's rows. */
typedef struct td_logit_place { int32_t cp, row; } td_logit_place;

typedef struct td_step_seq {
    uint64_t key;                       /* whose rows these are (trace and hooks only; arithmetic never reads it) */
    uint32_t row0, n_rows, pos0;
    uint32_t n_pages[TD_MAX_GROUPS];    /* that pos0 + n_rows tokens take (td_kvmap_most) */
    uint32_t pages[TD_MAX_GROUPS];      /* offset of int32_t[n_pages[g]]; -1: freed (before the window) */
} td_step_seq;

/* A token to be drawn from logits row `logit` (several samples may share one: n choices), or, with score >= 0, only the log
 * probability of token `score` (prompt logprobs). */
typedef struct td_step_sample {
    uint64_t key;
    uint32_t choice, logit;
    int32_t score;                      /* -1: draw */
    float temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
    int32_t top_k, logprobs;
    uint64_t seed;
    uint32_t position, stream;
    uint32_t n_pen, pen;                /* offset of td_penalty[n_pen] */
    uint32_t n_bias, bias;              /* offset of td_bias[n_bias] */
    uint32_t n_mask, mask;              /* offset of uint32_t[n_mask]; 0: none */
} td_step_sample;

/* A page to be copied before the rows are computed (copy on write), in order. */
typedef struct td_step_copy { uint32_t group; int32_t from, to; uint32_t pad_; } td_step_copy;

typedef struct td_step {
    uint64_t number;
    uint32_t bytes, n_rows, n_seqs, n_groups, n_logits, n_samples, n_copies;
    uint32_t n_before;                  /* samples of the step before that ids refer to; 0: no id does */
    uint32_t ids, pos;                  /* offsets of int32_t[n_rows] */
    uint32_t seqs;                      /* td_step_seq[n_seqs] */
    uint32_t logit_rows;                /* int32_t[n_logits]: rows whose logits are wanted, ascending */
    uint32_t samples;                   /* td_step_sample[n_samples] */
    uint32_t copies;                    /* td_step_copy[n_copies] */
    uint32_t want_logits;               /* 1: hand out the logits too (tools) */
} td_step;

#define TD_STEP_AT(step, type, off) ((const type *)(const void *)((const char *)(step) + (off)))
static inline const int32_t *td_step_ids(const td_step *s) { return TD_STEP_AT(s, int32_t, s->ids); }
static inline const int32_t *td_step_pos(const td_step *s) { return TD_STEP_AT(s, int32_t, s->pos); }
static inline const td_step_seq *td_step_seqs(const td_step *s) { return TD_STEP_AT(s, td_step_seq, s->seqs); }
static inline const int32_t *td_step_pages(const td_step *s, const td_step_seq *q, int group)
{
    return TD_STEP_AT(s, int32_t, q->pages[group]);
}
static inline const td_step_copy *td_step_copies(const td_step *s) { return TD_STEP_AT(s, td_step_copy, s->copies); }
static inline const int32_t *td_step_logit_rows(const td_step *s) { return TD_STEP_AT(s, int32_t, s->logit_rows); }
static inline const td_step_sample *td_step_samples(const td_step *s) { return TD_STEP_AT(s, td_step_sample, s->samples); }

#endif
