/* worker/seq.h - a leg and its choices as the engine keeps them: token logs, page tables, lengths, when a
 * choice ends.
 *
 * A leg's n choices share the prompt's pages: until the prompt is computed there is one *trunk* (choice 0's
 * tables), then a fork per choice. A choice's log is prompt + output; `computed` tokens of it have KV, those
 * up to `planned` are in steps in flight. What is wanted next is always rows [planned, length), and a token
 * drawn from the last of them. Prompt, resume after another worker's death, recompute after preemption and decode are the same case.
 * Tokens drawn in steps in flight are part of the log that is planned (td_seq_planned), though not known yet; a
 * row of such a token names the sample that it is. When the choice turns out to have ended before it, the row is
 * thrown away.
 *
 *   WAITING --admit--> RUNNING --> (ended)        RESERVED --land/recompute--> RUNNING
 *      ^----preempt-------'                       any --cancel--> (ended)
 *
 * Ownership: a leg owns copies of everything in its description. Threads: the engine thread. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SEQ_H
#define TD_WORKER_SEQ_H

#include "common/map.h"
#include "worker/engine.h"
#include "worker/kvpool.h"

typedef struct td_choice {
    td_kvseq kv;
    uint32_t *out, n_out;           /* [sampling.max_tokens + resume]; output tokens */
    uint32_t computed, planned;     /* planned: and those in steps in flight */
    uint32_t flying;                /* items of steps in flight in these tables */
    uint32_t ahead;                 /* tokens drawn in steps in flight */
    uint64_t drawn_in;              /* the last of them: in which step, */
    uint32_t drawn_at;              /* as which sample */
    bool done;
    bool ready;                     /* of this turn: the pages of its next rows are there and its own */
    bool copied;                    /* of this turn: one of them is a copy that the step makes */
    td_penalty *pen;                /* distinct ids of prompt and output; NULL unless a penalty is set */
    uint32_t n_pen;
    td_map pen_at;                  /* id -> index in pen */
} td_choice;

typedef enum { TD_LEG_WAITING, TD_LEG_RUNNING, TD_LEG_RESERVED, TD_LEG_ENDED } td_leg_state;

typedef struct td_seq {             /* a leg in the engine's table */
    td_leg d;                       /* arrays owned */
    td_leg_state state;
    td_choice *choice;              /* [d.sampling.n] */
    bool forked;                    /* choices have tables of their own (always with n = 1) */
    bool prompt_told;
    uint32_t replica;               /* whose pages it has, once it has some (data parallel) */
    uint32_t holds, hit;
    uint32_t flying;                /* items of steps in flight: the tables stay until they are collected */
    bool gone;                      /* over for everybody but those items: its key is free */
    uint32_t kv_told;               /* tokens whose layers on_kv was told of: not again after a preemption */
    td_h128 root;
    td_sample_out *score;           /* [n_prompt - 1] with prompt logprobs */
    int64_t arrived_us, first_row_us;
} td_seq;

td_status td_seq_open(const td_leg *leg, td_seq **out); /* EBADREQ, EFULL */
void td_seq_close(td_seq *q);                           /* page tables must be released before */

uint32_t td_seq_slots(const td_seq *q);                 /* sequences it takes: 1 for a PREFILL leg */
bool td_seq_resumes(const td_seq *q);                   /* some choice came with tokens */
/* Length of the log that choice c computes next (the trunk's: the prompt alone when there are several
 * choices). */
uint32_t td_seq_length(const td_seq *q, uint32_t c);
/* The same with the tokens that are not known yet. */
uint32_t td_seq_planned(const td_seq *q, uint32_t c);
/* Whether the row of a token that is not known yet can be planned: nothing of it depends on the token, and the
 * choice ends there only if the token is a stop id. */
bool td_seq_runs_ahead(const td_seq *q, uint32_t c, uint32_t max_model_len);
uint32_t td_seq_token(const td_seq *q, uint32_t c, uint32_t position);
/* The id as a step has it: below 0 for a token that is not known yet. */
int32_t td_seq_id(const td_seq *q, uint32_t c, uint32_t position);
/* A token was drawn for choice c: append it and say whether the choice ends. */
td_finish td_seq_append(td_seq *q, uint32_t c, uint32_t token, uint32_t max_model_len);
/* Whether choice c's log has already ended (resumed tokens may contain the end). */
td_finish td_seq_ended(const td_seq *q, uint32_t c, uint32_t max_model_len);
bool td_seq_all_done(const td_seq *q);

#endif
