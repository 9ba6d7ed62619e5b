/* worker/ship/ship.h - the ship thread: KV pages out to decode workers, and in from prefill workers.
 *
 *   engine thread --commands--> ship thread: senders --DEALER--> another worker's ROUTER
 *                 <--events---               receiver <--ROUTER-- other workers' DEALERs
 *
 * Payloads are gathered and scattered on the ship thread, straight from and to the pages, which the engine
 * holds (td_engine_hold) from the first command about a key until that key's last event: SENT for a sending
 * key; LANDED, LOST or CLOSED for a receiving one. Every key that was opened gets exactly one of these.
 *
 * Workers of several ranks: every rank opens a ship of its own with the worker's grid and its rank in it, and
 * rank 0 tells the others' endpoints and the grid with its reservations (td_ship_ranks). Every command that
 * rank 0's engine gives is given on all ranks, with that rank's pages; each rank then sends and receives what
 * grid_plan.h says. The other ranks' events go to rank 0 as reports (td_ship_event_report there, td_ship_peer
 * here), and rank 0's poll gives the worker's: one last event a key, when all ranks have said theirs, and
 * RECALL (not a last one) when one failed or was cancelled: send_cancel(key, over ? 0 : 1, reason) or
 * recv_close(key) is to be given on the other ranks. So cancelling and closing need no mirroring of their
 * own. Data parallel: one replica's ranks take part in a key; rank 0 opens it with td_ship_expect where that is
 * not its own. A frame may come to another rank before it is told of the reservation: it waits two seconds.
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
 *            flight per hand-off and destination rank as its sink gave credits. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SHIP_SHIP_H
#define TD_WORKER_SHIP_SHIP_H

#include "common/wire/msg.h"
#include "common/wire/sock.h"
#include "kernels/dev.h"
#include "worker/ship/frame.h"
#include "worker/ship/grid_plan.h"
#include "worker/ship/trace.h"

/* TD_SHIP_HWM: frames that wait in a connection's queue. Few, so that a frame is still in the caches when it is
 * sent. TD_SHIP_LOCAL_BUFFER: nor do more bytes wait in the kernel for a worker of the same host (over loopback its
 * own choice is 4 MiB); a link keeps its window. */
enum { TD_SHIP_MAX_DESTS = 112, TD_SHIP_HWM = 2, TD_SHIP_LOCAL_BUFFER = 512 * 1024 };

typedef struct td_ship td_ship;

typedef struct td_ship_opts {
    td_zctx *z;
    const td_model_desc *desc;   /* of the whole model, on every rank */
    const td_kv *kv[TD_MAX_GROUPS]; /* this rank's: its heads, its layers' slots from 0 */
    td_dev *dev;                 /* whose memory the pages are; NULL: this host's. Borrowed */
    const td_ship_grid *grid;    /* NULL: one rank. Copied */
    uint32_t rank;               /* in it */
    uint32_t replica, replicas;  /* data parallel: which of them this rank is of; 0 replicas: one. Rank 0 of replica 0 decides */
    uint64_t incarnation;
    const char *bulk_bind;       /* NULL: this worker receives nothing */
    const td_curve *curve;       /* NULL: no encryption. Borrowed */
    uint32_t max_keys;
    /* that this worker's reservations tell senders of: a quarter goes back at a time; 0: each at once */
    uint32_t credits;
    int64_t timeout_us;          /* without progress a hand-off fails */
    int wake_fd;                 /* signalled when events are there */
    td_trace *trace;             /* or NULL */
    /* tests: "flip:N", "drop:N" (N-th frame sent), "delay-commit:MS"; NULL or "": none */
    const char *fault;
} td_ship_opts;

typedef enum {
    TD_SHIP_SENT,
    TD_SHIP_LANDED,
    TD_SHIP_LOST,
    TD_SHIP_CLOSED,
    TD_SHIP_RECALL
} td_ship_event_type;
typedef struct td_ship_event {
    td_ship_event_type type;
    uint64_t key;
    bool ok;                     /* SENT: acknowledged */
    /* LOST: the other side says that the request is over; SENT, RECALL of a sending key: it was cancelled so
     */
    bool over;
    bool sending;                /* RECALL: a sending key */
    char reason[160];            /* SENT and not ok; LOST; RECALL */
    td_arena arena;
    td_commit commit;            /* LANDED */
    int64_t transfer_us, exposed_us;
    uint64_t bytes;
    uint32_t frames;
} td_ship_event;

/* A rank's last word about a key, for rank 0: plain bytes, to be carried as they lie. */
typedef struct td_ship_report {
    uint64_t key, bytes;
    int64_t transfer_us, exposed_us;
    uint32_t rank, frames;       /* rank: in the whole worker */
    uint32_t n_first, commit_bytes; /* LANDED of a replica's first rank: COMMIT's payload, which follows the report */
    uint8_t type, ok, over;      /* td_ship_event_type */
    char reason[149];
} td_ship_report;

typedef struct td_ship_stats { uint64_t frames_sent, frames_received, bytes_sent, bytes_received,
                               frames_bad; uint32_t epochs_open; } td_ship_stats;

td_status td_ship_open(const td_ship_opts *o, td_ship **out);
void td_ship_close(td_ship *s);  /* open keys get no event any more; nothing touches pages afterwards */
const char *td_ship_endpoint(const td_ship *s); /* as bound; "" without bulk_bind */
/* What others are told: given, if not ""; else as bound, with this host's name for a wildcard address. */
void td_ship_advertised(const td_ship *s, const char *given, char *out, size_t n);
/* An endpoint as bound, as other hosts reach it: this host's name for a wildcard. */
void td_ship_reachable(const char *bound, char *out, size_t n);

/* What Reserved carries for a worker of several ranks: BulkRanks of this grid, endpoints by rank. One rank:
 * nothing. */
td_status td_ship_ranks(const td_ship_grid *g, const char *const *endpoint, td_buf *out);
/* Where a replica receives, for Reserved. endpoint "": Hello's. */
typedef struct td_ship_home { char endpoint[256]; td_buf ranks; } td_ship_home;

void td_ship_send_open(td_ship *s, uint64_t key, const td_msg_sink *sink, uint32_t n_tokens);
/* Layers [layer0, layer1) of tokens [tok0, tok1) of a sending key are computed on this rank (grid_plan.h rule
 * 4): frames go out as they become full. pages[g]: this rank's page table of group g, from its first page on.
 */
void td_ship_send_layers(td_ship *s, uint64_t key, int layer0, int layer1, uint32_t tok0, uint32_t tok1,
                         const int32_t *const pages[TD_MAX_GROUPS], const uint32_t n_pages[TD_MAX_GROUPS]);
void td_ship_send_commit(td_ship *s, uint64_t key, const td_commit *c, int64_t prompt_end_us);
/* kvframe.h rule 8 */
void td_ship_send_cancel(td_ship *s, uint64_t key, uint32_t abort_index, const char *reason);
void td_ship_recv_open(td_ship *s, uint64_t key, uint32_t hit, uint32_t n_tokens, uint32_t n_first,
                       const int32_t *const pages[TD_MAX_GROUPS], const uint32_t n_pages[TD_MAX_GROUPS]);
void td_ship_recv_close(td_ship *s, uint64_t key);
/* Rank 0: the ranks of another replica than its own have been told to open this key. */
void td_ship_expect(td_ship *s, uint64_t key, bool sends, uint32_t replica);
/* Rank 0: another rank's report. */
void td_ship_peer(td_ship *s, const td_ship_report *r, const void *commit);
void td_ship_event_report(const td_ship_event *e, uint32_t rank, td_ship_report *out);
void td_ship_flush(td_ship *s);
td_ship_event *td_ship_poll(td_ship *s); /* NULL: none */
void td_ship_event_free(td_ship_event *e);
void td_ship_stats_get(td_ship *s, td_ship_stats *out);

#endif
