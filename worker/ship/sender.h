/* worker/ship/sender.h - the sending end of one hand-off from one rank to one rank, as a pure machine.
 *
 *            RECT, CREDIT, POSTED                 POSTED(COMMIT)
 *   SENDING ----------------------> SENDING ------------------------> COMMITTED --ACK--> ACKED
 *      |                                                                 |
 *      +--- NACK, deadline, CANCEL, peer gone ------> FAILED <-----------+
 *
 * td_sender_step(machine, now, event) returns what to do next: post a frame, COMMIT or ABORT, or nothing. The
 * caller posts it and answers with POSTED; if the link has no room it answers nothing and the same action is
 * returned at the next step.
 *
 * Rules:   1. At most `credits` frames are posted and not returned by CREDIT.
 *          2. Every state has a deadline: SENDING, while something is ready to go and does not (no credits, no
 *             room); COMMITTED, until ACK; FAILED, until its ABORT has left. Waiting for the model to compute is
 *             no fault.
 *          3. After FAILED by deadline, or CANCEL, one ABORT is offered until it is POSTED, the peer is GONE, or
 *             the deadline has passed: frames before it may have filled the link.
 *          4. ACKED and FAILED are final.
 * Ownership: rectangles carry `ref`, an opaque word of the caller; td_sender_deinit hands the unposted ones
 *            back through drop.
 * Threads: one owner; no clock, socket or thread inside. Limits: max_frames rectangles in the queue. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SHIP_SENDER_H
#define TD_WORKER_SHIP_SENDER_H

#include "worker/ship/frame.h"
#include "worker/ship/plan.h"

typedef enum { TD_SENDER_SENDING, TD_SENDER_COMMITTED, TD_SENDER_ACKED, TD_SENDER_FAILED } td_sender_state;
typedef enum {
    TD_SEND_TICK, TD_SEND_RECT, TD_SEND_COMMIT, TD_SEND_POSTED, TD_SEND_CREDIT, TD_SEND_ACK, TD_SEND_NACK,
        TD_SEND_CANCEL, TD_SEND_GONE
} td_send_event_type;
typedef enum { TD_SEND_NOTHING, TD_SEND_DO_FRAME, TD_SEND_DO_COMMIT, TD_SEND_DO_ABORT } td_send_action_type;

typedef struct td_send_event {
    td_send_event_type type;
    td_rect rect;                /* RECT */
    void *ref;                   /* RECT: whatever the caller needs to gather it */
    /* CREDIT: frames returned; COMMIT: number of first tokens; CANCEL: ABORT's index (kvframe.h rule 8) */
    uint32_t n;
    uint64_t digest;             /* POSTED: td_frame_digest of the frame that was posted */
    size_t bytes;                /* POSTED */
    const char *reason;          /* NACK, CANCEL, GONE */
} td_send_event;

typedef struct td_send_action {
    td_send_action_type type;
    td_rect rect;                /* FRAME */
    void *ref;                   /* FRAME */
    td_kvframe head;             /* to be sealed with the payload (FRAME: geometry is the caller's to fill) */
} td_send_action;

/* n_src: COMMIT's (kvframe.h rule 4); 0 is 1. */
typedef struct td_sender_opts {
    uint64_t epoch, incarnation;
    uint32_t credits, max_frames;
    int64_t timeout_us;
    uint16_t src_rank, dst_rank, n_src;
} td_sender_opts;

typedef struct td_send_item { td_rect rect; void *ref; } td_send_item;
typedef struct td_sender {
    td_sender_opts o;
    td_sender_state state;
    td_send_item *item;          /* ring of queued rectangles */
    uint32_t cap, head, n;
    uint32_t credits, index;     /* left; next frame's index */
    uint32_t n_first;
    bool commit_ready, abort_due;
    uint32_t abort_index;
    uint64_t digest, bytes;
    /* first frame posted; since when something is ready and does not go (-1: nothing is) */
    int64_t first_us, stuck_us;
    char reason[160];            /* of FAILED */
} td_sender;

void td_sender_init(td_sender *s, const td_sender_opts *o);
void td_sender_deinit(td_sender *s, void (*drop)(void *ref));
td_send_action td_sender_step(td_sender *s, int64_t now_us, const td_send_event *e);
/* when TICK is due at the latest; INT64_MAX: no deadline runs */
int64_t td_sender_deadline(const td_sender *s);
/* The i-th rectangle that waits; NULL: there are fewer. */
static inline const td_send_item *td_sender_peek(const td_sender *s, uint32_t i)
{
    return i < s->n ? &s->item[(s->head + i) % s->cap] : NULL;
}
static inline bool td_sender_done(const td_sender *s)
{
    return s->state >= TD_SENDER_ACKED && !s->abort_due;
}

#endif
