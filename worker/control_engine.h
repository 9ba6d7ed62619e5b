/* worker/control_engine.h - the engine thread: the only caller of td_engine. It takes commands from the
 * control thread, drives turns, hands finished layers to the ship thread, and reports.
 *
 *   control --td_wcmd--> [engine thread: td_engine_turn] --td_wbatch--> control
 *                          |  ^
 *              frames, COMMIT  LANDED, LOST, SENT
 *                          v  |
 *                         ship thread
 *
 * A leg here is live in the engine, in ship, or in both; when it is in neither, its last word is said and it
 * is forgotten.
 *
 * Rules:     1. Pages of a leg that ships are held from its start until ship's last event about it.
 *            2. Every leg gets one last word: ENDED or BUSY. A prefill leg says it when the hand-off is
 *               decided.
 *            3. A failing step ends the legs, not the worker.
 * Threads:   open, close, command (control thread only), poll (control thread only), snapshot (any).
 * Limits:    max_legs legs; the command ring holds 4 per leg. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_CONTROL_ENGINE_H
#define TD_WORKER_CONTROL_ENGINE_H

#include "common/buf.h"
#include "worker/control.h"
#include "worker/engine.h"
#include "worker/ship/ship.h"

typedef struct td_wengine td_wengine;

typedef struct td_wengine_opts {
    td_engine *engine;           /* borrowed; nobody else calls it until close */
    uint32_t max_legs, credits;
    int layer0, layer1;          /* layers that this rank computes */
    const td_ship_home *home;    /* where each replica receives; borrowed; one rank: NULL */
    td_trace *trace;
    int wake_fd;                 /* signalled when batches are there */
} td_wengine_opts;

typedef struct td_wengine_snapshot {
    td_engine_stats stats;
    uint64_t progress;           /* moves while the thread is alive */
    bool busy;                   /* rows to compute */
    uint32_t n_groups;
} td_wengine_snapshot;

/* Two steps, because ship needs the wake-up of this thread and this thread needs ship. */
td_wengine *td_wengine_open(const td_wengine_opts *o);
int td_wengine_wake_fd(const td_wengine *w);
void td_wengine_start(td_wengine *w, td_ship *ship);
void td_wengine_close(td_wengine *w); /* stops and joins the thread; not ship */

bool td_wengine_command(td_wengine *w, td_wcmd *c); /* false: no room, c stays the caller's */
td_wbatch *td_wengine_poll(td_wengine *w);          /* NULL: none */
void td_wengine_snapshot_get(td_wengine *w, td_wengine_snapshot *out);

#endif
