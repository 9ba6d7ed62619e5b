/* worker/ship/ship.h - the ship thread: KV pages out to decode workers, and in from prefill workers.
 *
 *   engine thread --commands--> ship thread: senders --DEALER--> another worker's ROUTER
 *                 <--events---               receiver <--ROUTER-- other workers' DEALERs
 *
 * Payloads are gathered and scattered on the ship thread, straight from and to the pages, which the engine
 * holds (td_engine_hold) from the first command about a key until that key's last event: SENT for a sending
 * key; LANDED, LOST or CLOSED for a receiving one. Every key that was opened gets exactly one of these.
 *
 * Rules:     1. A key's last event comes only after its pages were touched for the last time.
 *            2. The epoch of a hand-off is the receiving side's key; opening it happens before any frame for
 *               it is looked at.
 *            3. Commands never block the engine: those that find the ring full wait in order on the engine's
 *               side (td_ship_flush).
 * Ownership: commands copy what they are given; events belong to the caller (td_ship_event_free).
 * Threads:   open, close: main. Commands, flush and poll: the engine thread. Stats: any.
 * Errors:    open: EIO (bind). Later faults end the hand-off concerned, never the worker.
 * Limits:    max_keys open keys; TD_SHIP_MAX_DESTS connections out (idle ones are closed); as many frames in
 *            flight per hand-off as its sink gave credits. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SHIP_SHIP_H
#define TD_WORKER_SHIP_SHIP_H

#include "common/wire/msg.h"
#include "common/wire/sock.h"
#include "worker/ship/frame.h"
#include "worker/ship/plan.h"
#include "worker/ship/trace.h"

enum { TD_SHIP_MAX_DESTS = 64 };

typedef struct td_ship td_ship;

typedef struct td_ship_opts {
    td_zctx *z;
    const td_model_desc *desc;
    const td_kv *kv[TD_MAX_GROUPS];
    uint64_t incarnation;
    const char *bulk_bind;       /* NULL: this worker receives nothing */
    const td_curve *curve;       /* NULL: no encryption. Borrowed */
    uint32_t max_keys;
    int64_t timeout_us;          /* without progress a hand-off fails */
    int wake_fd;                 /* signalled when events are there */
    td_trace *trace;             /* or NULL */
    /* tests: "flip:N", "drop:N" (N-th frame sent), "delay-commit:MS"; NULL or "": none */
    const char *fault;
} td_ship_opts;

typedef enum { TD_SHIP_SENT, TD_SHIP_LANDED, TD_SHIP_LOST, TD_SHIP_CLOSED } td_ship_event_type;
typedef struct td_ship_event {
    td_ship_event_type type;
    uint64_t key;
    bool ok;                     /* SENT: acknowledged */
    bool over;                   /* LOST: the other side says that the request is over */
    char reason[160];            /* SENT and not ok; LOST */
    td_arena arena;
    td_commit commit;            /* LANDED */
    int64_t transfer_us, exposed_us;
    uint64_t bytes;
    uint32_t frames;
} td_ship_event;

typedef struct td_ship_stats { uint64_t frames_sent, frames_received, bytes_sent, bytes_received,
                               frames_bad; uint32_t epochs_open; } td_ship_stats;

td_status td_ship_open(const td_ship_opts *o, td_ship **out);
void td_ship_close(td_ship *s);  /* open keys get no event any more; nothing touches pages afterwards */
const char *td_ship_endpoint(const td_ship *s); /* as bound; "" without bulk_bind */
/* What others are told: given, if not ""; else as bound, with this host's name for a wildcard address. */
void td_ship_advertised(const td_ship *s, const char *given, char *out, size_t n);

void td_ship_send_open(td_ship *s, uint64_t key, const td_msg_sink *sink, uint32_t n_tokens);
/* pages: the group's page table from page page0 on, covering the rectangle. */
void td_ship_send_rect(td_ship *s, uint64_t key, const td_rect *r, const int32_t *pages, uint32_t page0,
                       uint32_t n_pages);
void td_ship_send_commit(td_ship *s, uint64_t key, const td_commit *c, int64_t prompt_end_us);
/* kvframe.h rule 8 */
void td_ship_send_cancel(td_ship *s, uint64_t key, uint32_t abort_index, const char *reason);
void td_ship_recv_open(td_ship *s, uint64_t key, uint32_t hit, uint32_t n_tokens, uint32_t n_first,
                       const int32_t *const pages[TD_MAX_GROUPS], const uint32_t n_pages[TD_MAX_GROUPS]);
void td_ship_recv_close(td_ship *s, uint64_t key);
void td_ship_flush(td_ship *s);
td_ship_event *td_ship_poll(td_ship *s); /* NULL: none */
void td_ship_event_free(td_ship_event *e);
void td_ship_stats_get(td_ship *s, td_ship_stats *out);

#endif
