/* worker/ship/receiver.h - the receiving end on one rank: the table of live epochs, as a pure machine.
 *
 *   OPEN --frame--> OPEN --COMMIT--> COMMITTED --all sources' frames in, counts and digests equal--> LANDED
 *     |                                  |
 *     +--- bad frame, ABORT, deadline ---+----------------------------------------------> FAILED
 *
 * td_receiver_place says where a frame's payload may be written: the caller writes it, taking its checksum as it goes
 * (codec.h), and then gives the message with that checksum to td_receiver_message, which says what to answer;
 * td_receiver_tick finds epochs whose time is up. An epoch that LANDED or FAILED is out of the table:
 * whatever comes for it later is dropped before a page is touched, and answered: NACK, or, if it LANDED, ACK
 * to a repeated COMMIT and nothing to a repeated frame.
 *
 * Rules:   1. A frame has a place only if its epoch is live, its incarnation is ours, its geometry is the group's,
 *             and every (slot, head, token) of it is still missing. It counts only if its payload's checksum is
 *             right too. The same index of the same source again is ignored. Anything else ends the epoch: it is
 *             recomputed. So wrong bytes lie only where nothing is right yet, and nobody reads those pages before
 *             LANDED.
 *          2. LANDED means: every (slot, head, token) that this rank holds of every group exactly once, a
 *             COMMIT of every source, as many frames as each says, equal digests, and on rank 0 one first
 *             token per choice or none (the decode side draws them itself). Frames and COMMITs may come in
 *             any order. A rank other than 0 that lacks nothing has LANDED when it is added.
 *          3. An epoch that makes no progress for timeout_us FAILS, in every state.
 * Threads: one owner; no clock, socket or thread inside. Limits: max_epochs; TD_SHIP_MAX_RANKS sources;
 *          bitmaps of slots x heads x tokens bits per epoch. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SHIP_RECEIVER_H
#define TD_WORKER_SHIP_RECEIVER_H

#include "common/map.h"
#include "worker/ship/frame.h"
#include "worker/ship/grid_plan.h"

enum { TD_RECV_RECENT = 256 };

typedef struct td_receiver_opts {
    const td_model_desc *desc;      /* borrowed */
    td_dtype kv_dtype;
    uint64_t incarnation;
    uint32_t max_epochs;
    int64_t timeout_us;
    const td_ship_grid *grid;       /* of this worker; NULL: one rank. Copied */
    uint32_t rank;                  /* in it */
} td_receiver_opts;

typedef enum { TD_EPOCH_OPEN, TD_EPOCH_COMMITTED, TD_EPOCH_LANDED, TD_EPOCH_FAILED } td_epoch_state;

/* What came from one rank of the prefill worker. */
typedef struct td_epoch_src {
    uint64_t *seen;                 /* bit per frame index */
    uint32_t seen_words, frames, commit_frames;
    uint64_t digest, commit_digest;
    int64_t first_us;               /* once frames > 0 */
    bool committed;
} td_epoch_src;

typedef struct td_epoch {
    uint64_t id;
    td_epoch_state state;
    void *user;                     /* the caller's */
    uint32_t n_tokens, first_tok[TD_MAX_GROUPS];
    uint32_t before[TD_MAX_GROUPS],
        width[TD_MAX_GROUPS];       /* this rank's tokens: of [0, first_tok); that are due */
    uint64_t *have[TD_MAX_GROUPS];  /* bit ((slot * heads + head) * width + own token - before) */
    uint64_t missing;               /* bits not set */
    td_epoch_src *src;              /* [n_src_seen], by rank */
    uint32_t n_src_seen, n_src, commits; /* n_src: as the first COMMIT says; 0: none came */
    uint32_t frames, n_first, max_frames;
    uint64_t bytes;
    int64_t progress_us;
    int64_t first_us, prompt_us;    /* the first frame came (-1: none did); the prompt was computed; by our clock */
    bool over;                      /* ABORT said: the request is over */
    uint8_t *commit;                /* COMMIT's payload, kept until LANDED */
    size_t commit_bytes;
    const char *why;                /* of FAILED; static text */
} td_epoch;

typedef struct td_receiver td_receiver;

/* What a message led to. An epoch in a final state: settle and td_receiver_close, then answer. */
typedef struct td_recv_action {
    td_epoch *epoch;                /* NULL: unknown epoch, dropped */
    bool taken;                     /* a frame that counts */
    uint16_t answer;                /* 0, TD_KVF_CREDIT, TD_KVF_ACK or TD_KVF_NACK */
    uint32_t credits;               /* with CREDIT */
    const char *why;                /* with NACK */
    bool bad;                       /* counts as a bad frame */
} td_recv_action;

td_receiver *td_receiver_open(const td_receiver_opts *o);
/* drop (or NULL): called for each live epoch's user */
void td_receiver_free(td_receiver *r, void (*drop)(void *user));

/* n_first: choices. EFULL: table full. */
td_status td_receiver_add(td_receiver *r, int64_t now_us, uint64_t epoch, uint32_t hit, uint32_t n_tokens,
                          uint32_t n_first, void *user);
/* The live epoch whose pages of `rect` the payload of this FRAME is for; NULL: it has no place (and
 * td_receiver_message says why). Changes nothing. */
td_epoch *td_receiver_place(td_receiver *r, const td_kvframe *f, td_rect *rect);
/* crc: of the payload as it was read; of a FRAME without a place it is not looked at. */
td_recv_action td_receiver_message(td_receiver *r, int64_t now_us, const td_kvframe *f, const void *payload,
                                   uint32_t crc);
td_epoch *td_receiver_find(td_receiver *r, uint64_t epoch);
/* Of an epoch that has landed now: from its first frame on, and the part of that after the end of the prompt's
 * computation. A source's clock is set against ours by its first frame. 0 <= exposed <= transfer. */
void td_receiver_times(const td_epoch *e, int64_t now_us, int64_t *transfer_us, int64_t *exposed_us);
/* Next epoch whose deadline has passed (it is FAILED now; settle and close it); NULL: none. */
td_epoch *td_receiver_tick(td_receiver *r, int64_t now_us);
int64_t td_receiver_deadline(const td_receiver *r);
void td_receiver_close(td_receiver *r, td_epoch *e);
uint32_t td_receiver_live(const td_receiver *r);

#endif
