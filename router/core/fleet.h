/* router/core/fleet.h - the workers this router knows, by incarnation (one process start), and what is placed
 * on each.
 *
 *   HELLO --> LOADING --> READY --> DRAINING
 *   any               --no beat for dead_us, GOODBYE, a send failed--> DEAD --beat--> back
 *   READY, DRAINING   --step stands still while busy--> HUNG --step moves--> back
 *
 * Rules:     1. The first worker fixes the cluster's identity (model, KV type, numerics ...); a different one
 *               is refused, both values named.
 *            2. A worker is usable when READY and not held off (it said BUSY a moment ago). Requests wait for
 *               READY and LOADING workers; nobody waits for one that is DEAD, HUNG or DRAINING.
 *            3. seqs, pending_tokens and kv_tokens of a worker are the sums over its open leases: zero when
 *               it has none.
 *            4. A dead worker's record is kept until its slot is needed, so that one that only slept is taken
 *               back by its next beat.
 * Ownership: the fleet owns workers and their strings; requests own leases, which are linked into the worker
 *            too.
 * Threads:   core. Limits: TD_INDEX_SLOTS workers (dead ones give up their slot). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_CORE_FLEET_H
#define TD_ROUTER_CORE_FLEET_H

#include "common/wire/msg.h"
#include "router/core/index.h"

enum { TD_FLEET_LINK_SAMPLES = 8, TD_FLEET_LINK_BYTES = 64 << 10 /* smaller shipments say little */ };

typedef struct td_request td_request;
typedef struct td_worker td_worker;

#define TD_WORKER_STATES(X) X(NONE) X(LOADING) X(READY) X(DRAINING) X(HUNG) X(DEAD)
typedef enum {
#define X(name) TD_WORKER_##name,
    TD_WORKER_STATES(X)
#undef X
} td_worker_state;

typedef enum { TD_LEASE_PREFILL, TD_LEASE_DECODE, TD_LEASE_ALONE } td_lease_kind;

/* One worker's part in one attempt of one request. */
typedef struct td_lease {
    struct td_lease *next_of_request, *next_of_worker, *prev_of_worker;
    td_request *request;
    td_worker *worker;
    uint32_t attempt;
    td_lease_kind kind;
    uint32_t seqs;
    uint64_t pending_tokens, kv_tokens;
    bool cancelled, prompt_done;
    int64_t close_us;        /* cancelled, or its request is done: dropped at this time; 0: open-ended */
} td_lease;

struct td_worker {
    td_worker_state state;
    unsigned slot;
    uint64_t incarnation;
    char name[64], endpoint[256], build[64], kernels[32];
    td_role role;
    uint32_t page_size, max_seqs, max_batched_tokens, max_model_len;
    uint64_t kv_tokens;
    uint8_t bulk_key[32];
    bool has_bulk_key;
    bool replaced;           /* DEAD, and a younger process has its name: of no interest any more */
    td_msg_heartbeat beat;   /* the last one */
    int64_t joined_us, beat_us, moved_us, pinged_us, hold_us, dead_us;
    /* bytes/s of the last shipments, a ring */
    double link[TD_FLEET_LINK_SAMPLES];
    uint32_t n_links;        /* ever */
    td_lease *leases;
    uint32_t n_leases, seqs;
    uint64_t pending_tokens, kv_leased;
    uint64_t placed, lost, busy, faults; /* counters */
};

typedef struct td_fleet_opts { int64_t dead_us, hang_us, settle_us; } td_fleet_opts;

typedef struct td_fleet {
    td_fleet_opts o;
    td_worker w[TD_INDEX_SLOTS];
    bool has_identity;
    td_identity id;
    char model[256], kv_dtype[32], numerics[256];
    uint32_t n_eos, eos[TD_MSG_MAX_EOS];
    bool served;             /* was able to serve at some time */
    int64_t first_ready_us;
    uint64_t refused;
} td_fleet;

void td_fleet_init(td_fleet *f, const td_fleet_opts *o);
const char *td_worker_state_name(td_worker_state s);
td_worker *td_fleet_find(td_fleet *f, uint64_t incarnation); /* DEAD ones too; NULL: unknown */
/* A HELLO. EBADREQ: reason says why it is refused. *replaced: an older process of the same name, to be
 * declared lost, or NULL. */
td_status td_fleet_hello(td_fleet *f, int64_t now_us, uint64_t incarnation, const td_msg_hello *h,
                         td_worker **out, td_worker **replaced, char *reason, size_t n);
/* A beat of a known worker. True: it was DEAD and is back. */
bool td_fleet_beat(td_fleet *f, td_worker *w, int64_t now_us, const td_msg_heartbeat *b);
/* Whether it is time to call it dead (*hung false) or hung (*hung true). */
bool td_fleet_overdue(const td_fleet *f, const td_worker *w, int64_t now_us, bool *hung);
/* How long a step may stand still: max(hang_us, 20 mean steps, 3 times the prompt chunk it may hold). */
int64_t td_fleet_hang_us(const td_fleet *f, const td_worker *w);
/* A shipment that this worker sent or received landed, us after the arrival of its first frame: what came in that
 * time is the other frames. */
void td_fleet_shipped(td_worker *w, uint64_t bytes, uint32_t frames, int64_t us);
/* bytes/s of its link, 0: not measured. A shipment may have waited for the compute: the best of the last
 * TD_FLEET_LINK_SAMPLES. */
double td_fleet_link(const td_worker *w);
void td_fleet_lose(td_worker *w, td_worker_state to, int64_t now_us);

static inline bool td_worker_alive(const td_worker *w)
{
    return w->state >= TD_WORKER_LOADING && w->state <= TD_WORKER_HUNG;
}
/* Can complete a request now. Until it could for the first time it waits for workers that are still loading
 * (at most settle_us), so that the first requests do not all go to whoever was ready first. */
bool td_fleet_serves(td_fleet *f, int64_t now_us);
bool td_fleet_anyone(const td_fleet *f);  /* someone is alive */
bool td_fleet_hopeful(const td_fleet *f); /* someone is ready or loading */
uint32_t td_fleet_ready(const td_fleet *f); /* number of ready workers */
uint64_t td_fleet_kv_tokens(const td_fleet *f,
                            td_role counted_as); /* of ready workers: DECODE counts DECODE and MIXED */
void td_fleet_kernels(const td_fleet *f, char *out, size_t n); /* families of ready workers, each once: "amx, avx2" */

td_lease *td_lease_open(td_request *r, td_lease **of_request, td_worker *w, td_lease_kind kind,
                        uint32_t attempt, uint32_t seqs, uint64_t pending, uint64_t kv);
void td_lease_prompt_done(td_lease *l);
void td_lease_close(td_lease **of_request, td_lease *l); /* frees it */

#endif
