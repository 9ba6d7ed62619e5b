/* kernels/draw.h - drawing and scoring over a vocabulary that lies in parts on several ranks: the protocol.
 *
 *   every rank:  open a td_draw for each row of the step, then until no draw has bytes left:
 *                say   (ops->draw_say)   each draw writes `bytes` bytes at `at` of this rank's message
 *                      .. all ranks get all messages ..
 *                hear  (ops->draw_hear)  each draw reads all ranks' bytes and goes on to its next stage
 *
 *   START   the largest processed and raw logit   always; all there is of a greedy draw without log probabilities
 *   CUT     a histogram of keys, three times      once for top_k, once for top_p
 *   END     the best of the race, the raw sum of exponentials, the largest raw logits
 *
 * say reads and writes logits, hear reads messages only: on a device say is a kernel, and hear the host's as it is.
 *
 * Rules:     1. All ranks open the same draws in the same order, so messages are equally long everywhere; one
 *               message a stage carries all rows.
 *            2. Exchanged are maxima, counts, and masses as integers: results do not depend on how many ranks
 *               there are or where the vocabulary is cut; sample and score are the same functions with one rank.
 *               Every rank has every result.
 *            3. v0 is a multiple of 32; a part may be empty.
 *            4. td_sample_row keeps global ids: bias, penalties and mask of other ranks' tokens are passed over.
 * Ownership: raw, x, out and what row points to are borrowed until the last hear; x is written.
 * Threads:   as td_ops. Limits: V < 2^20. Errors: none.
 * Source:    algorithms notes 9.2, 13; Megatron-LM (Shoeybi et al. 2019) 3: vocabulary-parallel loss. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_DRAW_H
#define TD_KERNELS_DRAW_H

#include "common/both.h"
#include "kernels/ops.h"

struct td_vocab {
    int V, v0, n; /* of the model; this rank has tokens [v0, v0 + n) */
    int rank, ranks;
};

enum { TD_DRAW_BINS = 2048, TD_DRAW_START_BYTES = 16, TD_DRAW_MAX_BYTES = TD_DRAW_BINS * 8 };

/* Stages, and the messages of two of them; a CUT's is TD_DRAW_BINS masses. */
enum { TD_DRAW_START, TD_DRAW_CUT, TD_DRAW_END };

typedef struct td_draw_start {
    float max, raw_max;
    int32_t first; /* the lowest id of max; INT32_MAX: this part is empty */
    int32_t live;  /* some processed logit is above -inf */
} td_draw_start;

typedef struct td_draw_end { /* then the largest raw logits, as many as alternatives are wanted */
    float best, raw; /* of the race; the raw logit of token, where it is owned */
    int32_t token, owned, n_top, pad_;
    uint64_t mass; /* of the raw logits */
} td_draw_end;

struct td_draw {
    td_sample_row row;
    int32_t score; /* -1: draw; else the token whose log probability is wanted: row.logprobs alternatives */
    const float *raw; /* [n] */
    float *x; /* [n] workspace; may be raw where row.logprobs < 0 and nobody else reads it; unused by a
               * score and by a greedy draw without mask, bias and penalties */
    td_sample_out *out;
    size_t bytes; /* of its next message, a multiple of 8; 0: done */
    size_t at;    /* where in the message; set by the driver */
    /* the kernel's own */
    int stage, pass;
    int token, first; /* -1: not known yet; the likeliest */
    float max, floor, raw_max;
    uint32_t key; /* the cut: as far as it is known */
    int id;       /* the last one of the key's value that stays */
    uint64_t tie; /* > 0: id is the tie-th token here with that value, which the next say finds */
    bool by_mass, filtered;
    uint64_t before, target;
};

#ifndef __cplusplus
static inline td_draw td_draw_open(td_sample_row row, int32_t score, const float *raw, float *x,
                                   td_sample_out *out)
{
    return (td_draw){
        .row = row, .score = score, .raw = raw, .x = x, .out = out, .bytes = TD_DRAW_START_BYTES};
}
#endif
/* A greedy draw of the logits as they are needs no workspace. */
TD_BOTH bool td_draw_plain(const td_sample_row *r)
{
    return r->temperature < TD_GREEDY_BELOW && !r->mask && !r->n_bias && !r->n_pen;
}

#endif
