/* worker/control.h - the worker's side of the control protocol, as a machine: the link to the router, and
 * which leg belongs to whom.
 *
 *   link:  DOWN --connect--> CONNECTING --Hello, Welcome--> JOINED
 *          JOINED --no word for dead_us, another router, Goodbye--> DOWN
 *   state: LOADING --td_control_loaded--> READY --SIGTERM, Drain--> DRAINING --no legs--> finished
 *
 * A leg is (router incarnation, request, attempt); its key towards the engine is a number that is never used
 * again in this process, and at the same time the epoch of its hand-off. What the engine tells comes in
 * batches, one per turn, keyed by leg; this machine turns the keys into the router's and passes the messages
 * on: all tokens of a turn are one TokenBatch.
 *
 * Rules:     1. Heartbeats run in every state, also while the model loads. A router that answers with another
 *               incarnation, or not at all for dead_us, is gone: its legs are cancelled and the link is made
 *               anew, with a growing pause.
 *            2. Every Start and Reserve gets exactly one last word: Ended or Busy. Messages of a router that
 *               is gone are dropped.
 *            3. A second Start or Reserve of a key that lives is ignored; Cancel of one that does not live is
 *               answered with Ended (EGONE).
 *            4. While loading or draining, new work is answered with Busy.
 * Ownership: td_control_message may keep the message's arena (it sets *arena to empty then). Commands belong
 *            to the engine thread once given.
 * Threads:   the control thread. No socket, clock or thread inside: td_control_io is how it acts.
 * Limits:    max_legs legs. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_CONTROL_H
#define TD_WORKER_CONTROL_H

#include "common/wire/msg.h"

/* ---- control thread -> engine thread ---- */
typedef enum { TD_WCMD_START, TD_WCMD_RESERVE, TD_WCMD_CANCEL, TD_WCMD_CANCEL_CHOICE,
               TD_WCMD_STOP } td_wcmd_type;
typedef struct td_wcmd {
    td_wcmd_type type;
    uint64_t leg;
    uint32_t choice;
    int64_t deadline_us;
    td_arena arena;              /* of work and sink */
    td_msg_work work;
    bool has_sink;
    td_msg_sink sink;
} td_wcmd;
void td_wcmd_free(td_wcmd *c);

/* ---- engine thread -> control thread: what one turn brought. Keys of the messages are left empty. ---- */
/* RESERVED, BUSY, PROMPT_DONE, SHIP_REPORT, ENDED */
typedef struct td_wevent { uint64_t leg; td_msg msg; } td_wevent;
typedef struct td_wbatch {
    td_arena arena;
    uint64_t step;
    td_msg_tokens *tokens;       /* key.request holds the leg */
    uint32_t n_tokens, cap_tokens;
    td_wevent *event;
    uint32_t n_events, cap_events;
} td_wbatch;
td_wbatch *td_wbatch_new(void);
void td_wbatch_free(td_wbatch *b);
td_msg_tokens *td_wbatch_tokens(td_wbatch *b);             /* one more, zeroed */
td_msg *td_wbatch_event(td_wbatch *b, uint64_t leg, td_msg_type type);

/* ---- the machine ---- */
typedef struct td_control_io {
    void *arg;
    /* close the link if there is one, open a new one */
    void (*connect)(void *arg);
    /* AGAIN: not now (Hello, Heartbeat only); negative: the link is of no use */
    td_status (*send)(void *arg, const td_msg *m);
    bool (*command)(void *arg, td_wcmd *c);                /* false: no room */
    void (*beat)(void *arg, td_msg_heartbeat *out);        /* the worker's numbers */
} td_control_io;

typedef struct td_control_opts {
    uint64_t incarnation;
    const char *router;          /* where it is, for the log */
    uint32_t max_legs;
    int64_t beat_us, dead_us, drain_us;
} td_control_opts;

typedef enum { TD_CONTROL_RUNS, TD_CONTROL_FINISHED, TD_CONTROL_REFUSED } td_control_outcome;

typedef struct td_control td_control;

td_control *td_control_open(const td_control_opts *o, td_control_io io);
void td_control_close(td_control *c);
void td_control_loaded(td_control *c, int64_t now_us, const td_msg_hello *hello); /* borrowed until close */
void td_control_message(td_control *c, int64_t now_us, const td_msg *m, td_arena *arena);
void td_control_batch(td_control *c, int64_t now_us, td_wbatch *b);
void td_control_tick(td_control *c, int64_t now_us);
void td_control_drain(td_control *c, int64_t now_us);
int64_t td_control_deadline(const td_control *c);          /* when tick is due at the latest */
td_control_outcome td_control_over(const td_control *c);
uint32_t td_control_legs(const td_control *c);

#endif
