/* tests/simt/simt_rt.h - what parts of the shim's runtime ask of each other: simt_rt.cpp (fibers, memory,
 * checks) and simt_sm90a.cpp (Hopper's asynchronous instructions).
 *
 * Order:   A thread's accesses are counted in warp epochs (Fiber.wep). Fiber.seen[w] is what a thread knows
 * of warp w: accesses of it before that epoch happen before whatever the thread does next. Barriers of the
 * whole block need none of it; everything else that orders threads joins one clock with another. Threads:
 * one; `cur` is the CUDA thread that runs. */
// SPDX-License-Identifier: Apache-2.0
#pragma once
#include "tests/simt/simt.h"

namespace simt
{
/* What an access is: flags of touch. ASYNC, a read: what ordinary stores wrote must have been fenced. */
enum { ATOMIC = 1, INFLIGHT = 2, ASYNC = 4 };

/* A warp operation with a meaning of its own: run once, when all 32 lanes are there; each lane's operands are
 * behind Fiber.call. */
struct Call {
    void (*run)(Fiber *warp);
};
void warp_call(Call *c, int line, const char *file);

/* This thread sleeps until somebody wakes `on`. what: for the text of a deadlock. */
void sleep_on(const void *on, const char *what, int line, const char *file);
void wake(const void *on);

void touch(const void *p, unsigned n, bool write, int flags, int line);
void poison(void *p, unsigned n);
Fiber *fibers();
unsigned block_threads();
char *dynamic_shared(size_t *bytes);
bool in_device_memory(const void *p, size_t n);

/* Of simt_sm90a.cpp: a block begins; it has ended (what is left undone?); a thread ends; no thread can run:
 * true if something that was under way has come to its end. */
void sm90_block_begin();
void sm90_block_end();
void sm90_thread_end();
bool sm90_progress();
} // namespace simt
