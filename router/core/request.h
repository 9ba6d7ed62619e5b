/* router/core/request.h - one client request in the core: its state, its token log, its leases.
 *
 *   QUEUED -> ROUTED -> RESERVED -> PREFILLING -> SHIPPING -> LANDED -> DECODING -> DONE -> RELEASED
 *     ^  \___ one worker does both ____^   \______ their messages may overtake ____^
 *     |
 *     +-- ROUTED .. DECODING: a worker was lost, refused or failed; placed again
 *
 *   QUEUED .. DECODING -> DRAINING -> RELEASED: cancel, deadline, error
 *
 *   QUEUED      in the queue, no worker
 *   ROUTED      RESERVE sent to the decode worker
 *   RESERVED    RESERVED received
 *   PREFILLING  START sent
 *   SHIPPING    prompt computed, first token known; pages on their way
 *   LANDED      pages arrived (or are recomputed by the decode worker)
 *   DECODING    the decode (or only) worker has sent tokens
 *   DONE        the client has its terminal event; leases still open
 *   DRAINING    ended early: the client has its terminal event, workers were told; leases still open
 *   RELEASED    no lease left: freed at the start of the next step
 *
 * Rules:     1. Only td_request_go changes the state; an illegal change is refused and counted.
 *            2. A choice's log is append-only. What the client sees is a function of the log alone.
 *            3. `attempt` numbers placements from 1. A lease belongs to one attempt. Only messages of the
 *               current attempt, from a worker with an open lease of it, may change the request.
 *            4. The terminal td_out is emitted when DONE or DRAINING is entered, exactly once.
 *            5. A lease stays open until the worker's ENDED, its loss, or lease_us after it was cancelled or
 *               the request was done.
 * Ownership: the request owns job, logs and leases. Threads: core.
 * Limits:    TD_MAX_CHOICES choices; TD_REQUEST_EXCLUDED excluded workers; TD_REQUEST_GAPS intervals kept for
 *            the p99. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_CORE_REQUEST_H
#define TD_ROUTER_CORE_REQUEST_H

#include "router/core/fleet.h"
#include "router/core/job.h"
#include "router/core/speech.h"

enum { TD_REQUEST_EXCLUDED = 8, TD_REQUEST_GAPS = 4096 };

/* X(state, legal successors) */
#define TD_TO(s) (1u << TD_REQ_##s)
#define TD_TO_END (TD_TO(QUEUED) | TD_TO(DRAINING))
#define TD_REQUEST_STATES(X)                                                                                 \
    X(QUEUED, TD_TO(ROUTED) | TD_TO(PREFILLING) | TD_TO(DONE) | TD_TO(DRAINING))                             \
    X(ROUTED, TD_TO(RESERVED) | TD_TO_END)                                                                   \
    X(RESERVED, TD_TO(PREFILLING) | TD_TO_END)                                                               \
    X(PREFILLING, TD_TO(SHIPPING) | TD_TO(LANDED) | TD_TO(DECODING) | TD_TO(DONE) | TD_TO_END)               \
    X(SHIPPING, TD_TO(LANDED) | TD_TO(DECODING) | TD_TO(DONE) | TD_TO_END)                                   \
    X(LANDED, TD_TO(DECODING) | TD_TO(DONE) | TD_TO_END)                                                     \
    X(DECODING, TD_TO(DONE) | TD_TO_END)                                                                     \
    X(DONE, TD_TO(RELEASED))                                                                                 \
    X(DRAINING, TD_TO(RELEASED))                                                                             \
    X(RELEASED, 0u)

typedef enum {
#define X(name, to) TD_REQ_##name,
    TD_REQUEST_STATES(X)
#undef X
    TD_REQ_COUNT
} td_req_state;

typedef struct td_choice {
    uint32_t *ids;
    uint32_t n, cap;
    td_finish finish;
    uint32_t stop_token;
    int stop_string;         /* index, or -1 */
} td_choice;

typedef struct td_request {
    td_job *job;
    td_req_state state;
    uint32_t attempt, losses, illegal;
    td_choice *choice;       /* [sampling.n] */
    td_speech *speech;       /* detokenizer and stop strings; NULL: no text wanted */
    uint32_t n_open;         /* choices that have not finished */
    td_lease *leases;        /* of all attempts, newest first */
    td_lease *decode, *prefill; /* of the current attempt; one worker for both: decode only */
    uint64_t excluded[TD_REQUEST_EXCLUDED];
    uint32_t n_excluded;
    bool admitted;           /* limits that need the worker's facts were checked */
    bool scores_due;         /* prompt log probabilities were asked for and have not come */
    bool terminal;           /* the terminal td_out was emitted */
    td_why why;
    struct td_request *next, *prev; /* queue or running list */
    bool queued;
    int64_t retry_us;        /* not before; 0: now */
    /* times, monotonic microseconds; 0: not yet */
    int64_t arrived_us, entered_us, placed_us, first_us, second_us, last_us, ended_us;
    int64_t worker_queue_us, prefill_us, transfer_us, exposed_us; /* durations as workers report; -1: none */
    uint64_t kv_bytes;
    uint32_t cached_tokens;
    uint32_t *gap_us;        /* intervals between token events, the last TD_REQUEST_GAPS */
    uint32_t n_gaps;
    uint64_t gap_sum_us, tokens_out;
    uint64_t decode_worker, prefill_worker; /* of the last placement, for the log */
    uint32_t faults;         /* protocol faults of workers seen by this request */
} td_request;

td_request *td_request_new(td_job *job, int64_t now_us, const td_tokenizer *t); /* takes job */
void td_request_free(td_request *r);
const char *td_request_state_name(td_req_state s);
bool td_request_legal(td_req_state from, td_req_state to);
bool td_request_go(td_request *r, td_req_state to, int64_t now_us);

bool td_request_excludes(const td_request *r, uint64_t incarnation);
void td_request_exclude(td_request *r, uint64_t incarnation);

/* Append one token to a choice's log. False: the log is at its limit (prompt + max_tokens), a worker's fault.
 * */
bool td_choice_append(td_choice *c, uint32_t id, uint32_t limit);
/* Whether the log itself says that the choice is over (its worker died between the last token and saying so).
 * */
td_finish td_choice_implied(const td_choice *c, const td_sampling *s);

void td_request_token_time(td_request *r, uint32_t choice, uint32_t n_new, int64_t now_us);
void td_request_timings(const td_request *r, int64_t now_us, td_timings *out);
td_usage td_request_usage(const td_request *r);

#endif
