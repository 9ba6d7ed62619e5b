/* worker/mirror.h - the hand-offs of a worker of several ranks, on its other ranks: what rank 0 tells its ship,
 * they are told too, in order with the steps; what their ships say goes back to rank 0.
 *
 *   rank 0:  td_mirror_*() -> td_engine_command .. td_exec ..> on_command -> their td_ship
 *            td_engine_poll <.. td_exec <.. on_poll <- their td_ship: td_ship_report
 *
 * Data parallel: every rank hears every command, and does those of its own replica.
 * Finished layers need no message: a step carries keys, positions and page tables, and on_layer tells the ship.
 * A td_mirror is the other ranks' end.
 *
 * Rules:   1. Commands are numbered. One that cannot be read or carried out, is missing or comes twice ends the
 *             worker, with the reason (exec.h rule 3): its ranks would disagree about what they send and receive
 *             from there on, and a worker is one failure domain. So does one that rank 0 cannot put together, and
 *             a report that it cannot read.
 * Threads: the rank's engine thread. Errors: EPROTO, EFULL. Limits: max_keys keys; commands of 64 MiB. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MIRROR_H
#define TD_WORKER_MIRROR_H

#include "worker/engine.h"
#include "worker/ship/ship.h"

/* ---- rank 0 ---- */

/* A hand-off, and the replica whose ranks take part: rank 0's own ship, if it is of that one, and the others' are
 * told. */
typedef struct td_mirror_key {
    td_engine *engine;
    td_ship *ship;
    uint64_t key;
    uint32_t replica;
    uint32_t *n_told; /* commands so far, of this worker: from 0 */
} td_mirror_key;

/* As td_ship_*. */
void td_mirror_send_open(const td_mirror_key *k, const td_msg_sink *sink, uint32_t n_tokens);
void td_mirror_send_commit(const td_mirror_key *k, const td_commit *commit, int64_t prompt_end_us);
void td_mirror_recv_open(const td_mirror_key *k, uint32_t hit, uint32_t n_tokens, uint32_t n_first,
                         const int32_t *const pages[TD_MAX_GROUPS], const uint32_t n_pages[TD_MAX_GROUPS]);
/* The first rank is told; with its last word the others are recalled (ship.h). */
void td_mirror_send_cancel(const td_mirror_key *k, uint32_t abort_index, const char *reason);
void td_mirror_recv_close(const td_mirror_key *k);
/* That recall, which rank 0's ship has taken in already: only the others are told. */
void td_mirror_recall(const td_mirror_key *k, const td_ship_event *recall);
/* Only the others are told, too: tokens [tok0, tok1) of all layers were there already (a prefix hit); pages of the
 * whole context. */
void td_mirror_send_hit(const td_mirror_key *k, uint32_t tok0, uint32_t tok1,
                        const int32_t *const pages[TD_MAX_GROUPS], const uint32_t n_pages[TD_MAX_GROUPS]);

/* ---- the other ranks ---- */

typedef struct td_mirror td_mirror;
td_mirror *td_mirror_open(td_ship *ship, const td_model_desc *d, const td_ranks *r, uint32_t max_keys);
void td_mirror_close(td_mirror *m);
/* For td_exec_opts: arg is the td_mirror. */
void td_mirror_on_layer(void *arg, const td_step *step, int layer);
td_status td_mirror_on_command(void *arg, const void *p, size_t n);
size_t td_mirror_on_poll(void *arg, void *out, size_t cap);
/* Rank 0: what on_poll of another rank said. */
td_status td_mirror_take(td_ship *ship, const void *p, size_t n);

#endif
