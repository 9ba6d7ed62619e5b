/* worker/fault.h - a worker that stops at a named point, once, so that a test finds a request in a known
 * state.
 *
 *   --fault pause:POINT:PATH (or TANDEM_FAULT): the thread that gets to POINT with the marked request makes
 *   the file PATH (its text is this process's id) and goes on when PATH.go exists. The other threads go on,
 *   so heartbeats, cancels and frames of others are as always.
 *
 *   POINT          thread  the router's state meanwhile
 *   prefill-chunk  engine  PREFILLING: a chunk of the prompt is computed, and not the last one
 *   ship-frame     ship    SHIPPING: before the first frame leaves; the prompt is finished meanwhile
 *   ship-landed    engine  LANDED: the pages have landed and this was said; no token was
 *   decode-step    engine  DECODING: after TD_FAULT_DECODED tokens of this worker
 *
 * Rules:     1. The marked request is the one whose seed is TD_FAULT_SEED.
 *            2. Once: the first worker that gets there has PATH; where PATH exists already, nobody stops.
 *            3. Nothing set: one comparison with a constant that stays in the cache.
 * Threads:   arm: main, before there are others. mark: engine. due, pause: any one thread.
 * Errors:    EBADREQ: no such point. Limits: a pause ends by itself after TD_FAULT_MAX_S. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_FAULT_H
#define TD_WORKER_FAULT_H

#include "common/status.h"
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>

enum { TD_FAULT_SEED = 64023, TD_FAULT_MAX_S = 60, TD_FAULT_DECODED = 3 };

typedef enum { TD_FAULT_NONE, TD_FAULT_PREFILL_CHUNK, TD_FAULT_SHIP_FRAME, TD_FAULT_SHIP_LANDED,
               TD_FAULT_DECODE_STEP } td_fault_point;

extern atomic_int td_fault_armed;      /* a td_fault_point; NONE but in tests */
extern atomic_uint_fast64_t td_fault_key; /* the marked request's leg; 0: it has not come */

/* AGAIN: text is no pause, and somebody else's to read. */
td_status td_fault_arm(const char *text);
void td_fault_pause(void);

static inline void td_fault_mark(uint64_t leg, uint64_t seed)
{
    if (td_fault_armed && seed == TD_FAULT_SEED) td_fault_key = leg;
}
static inline bool td_fault_due(td_fault_point p, uint64_t leg)
{
    return atomic_load_explicit(&td_fault_armed, memory_order_relaxed) == (int)p && td_fault_key == leg;
}

#endif
