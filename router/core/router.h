/* router/core/router.h - the router's machine: td_core_step(state, now, event) -> actions. No socket, thread,
 * clock or randomness.
 *
 *   SUBMIT, CANCEL from the API           \                  / SEND a message to a worker
 *   MESSAGE, PEER_LOST from the socket     > td_core_step > { EMIT a td_out to the API
 *   TICK, DRAIN, LEAVE from the loop      /                  \ ENDED: a request had its terminal event; LOG
 *
 * Rules:     1. Every submitted job ends in exactly one terminal td_out, within its deadline (checked on
 *               ticks).
 *            2. Actions must be carried out before the next step: what they point to lives until then. EMITs
 *               belong to the caller.
 *            3. A decode worker is reserved first; the prefill worker starts only after RESERVED.
 *            4. A token is accepted if its attempt is current, its worker has the lease, base_index <= log
 *               length and it equals the log where they overlap. Anything else changes nothing the client
 *               sees.
 *            5. A worker that dies, hangs, fails or breaks rule 4 loses its requests; they are placed again
 *               with prompt and log.
 *            6. A request that lost more than max_losses workers fails; so does one that finds no worker for
 *               no_worker_us.
 *            7. After LEAVE nothing is placed. Every worker alive is told GOODBYE, so that none waits for us
 *               or takes the silence for a fault; it answers with GOODBYE and is DEAD to us.
 *            8. Same events, same times: same actions. The simulator (tests/router) depends on it.
 * Ownership: the core owns requests, jobs, fleet and index. Threads: one owner (the core thread).
 * Limits:    max_queue waiting requests, max_requests in all, TD_INDEX_SLOTS workers. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_CORE_ROUTER_H
#define TD_ROUTER_CORE_ROUTER_H

#include "common/log.h"
#include "router/core/fleet.h"
#include "router/core/job.h"
#include "router/core/request.h"

typedef struct td_core td_core;

typedef struct td_core_opts {
    uint64_t incarnation;          /* this router process; the sender of its messages */
    td_hkey hash_key;              /* told to workers; names prompt blocks */
    const td_tokenizer *tokenizer; /* NULL: ids only */
    uint32_t max_queue;            /* 4096 */
    uint32_t max_requests;         /* 65536 */
    uint32_t max_losses;           /* 5: workers a request may lose */
    uint32_t heartbeat_ms;         /* 250: told to workers */
    uint32_t index_entries;        /* 262144 */
    double link_bytes_per_s;       /* 1.25e9: between workers that were not measured */
    int64_t dead_us;               /* 3 s without a beat */
    int64_t hang_us;               /* 5 s without a step */
    int64_t settle_us;             /* 2 s: the first request waits for the missing half of the fleet */
    int64_t reply_us;              /* 10 s: for RESERVED or BUSY */
    int64_t ship_us;               /* 60 s: from prompt done to landed */
    int64_t lease_us;              /* 10 s: for ENDED after cancel or done */
    int64_t no_worker_us;          /* 3 s: requests wait for a worker after the last one is gone */
    int64_t drain_us;              /* 30 s: what still runs then after DRAIN fails */
} td_core_opts;

typedef enum {
    TD_EV_SUBMIT,
    TD_EV_CANCEL,
    TD_EV_MESSAGE,
    TD_EV_PEER_LOST,
    TD_EV_TICK,
    TD_EV_DRAIN,
    TD_EV_LEAVE
} td_event_type;
typedef struct td_event {
    td_event_type type;
    td_job *job;        /* SUBMIT: taken */
    uint64_t id;        /* CANCEL: job id. MESSAGE, PEER_LOST: the worker's incarnation */
    const td_msg *msg;  /* MESSAGE: borrowed for the step */
} td_event;

typedef enum { TD_ACT_SEND, TD_ACT_EMIT, TD_ACT_ENDED, TD_ACT_LOG } td_action_type;
typedef struct td_action {
    td_action_type type;
    uint64_t to;                /* SEND */
    td_msg msg;
    td_out *out;                /* EMIT */
    const td_request *request;  /* ENDED */
    td_log_level level;         /* LOG */
    const char *text;
} td_action;
typedef struct td_actions {
    td_action *a;
    uint32_t n, cap;
    td_arena arena;
} td_actions;

void td_actions_init(td_actions *a);
void td_actions_deinit(td_actions *a);

/* Why placements ended before their request: labels of tandem_replacements_total. */
#define TD_REPLACE_MAP(X)                                                                                    \
    X(LOST, "lost")                                                                                          \
    X(HUNG, "hung") X(BUSY, "busy") X(FAILED, "failed") X(FAULT, "fault") X(TIMEOUT, "timeout")
typedef enum {
#define X(id, name) TD_REPLACE_##id,
    TD_REPLACE_MAP(X)
#undef X
    TD_REPLACE_COUNT
} td_replace;

typedef struct td_core_counts {
    uint64_t submitted, done, failed[16];       /* by td_why */
    uint64_t placed_pair, placed_alone, replaced[TD_REPLACE_COUNT];
    uint64_t prompt_tokens, cached_tokens, output_tokens;
    uint64_t stale_messages, unknown_messages, faults, mismatches;
    uint64_t landed, recomputed, kv_bytes, workers_lost, workers_hung, workers_refused, illegal;
} td_core_counts;

td_core *td_core_open(const td_core_opts *o); /* 0 in a field: the value in its comment */
void td_core_close(td_core *c); /* jobs that are still there are dropped without a terminal event */
void td_core_step(td_core *c, int64_t now_us, const td_event *ev, td_actions *out);

/* Read-only views, for metrics, readiness and tests. */
td_fleet *td_core_fleet(td_core *c);
const td_core_counts *td_core_counts_of(const td_core *c);
void td_core_load(const td_core *c, uint32_t *queued, uint32_t *running, uint32_t *closing);
bool td_core_serves(td_core *c, int64_t now_us);
bool td_core_idle(const td_core *c); /* no request of any state */
/* Visit every live request (queued, running, closing). */
void td_core_each(const td_core *c, void (*fn)(void *arg, const td_request *r), void *arg);

#endif
