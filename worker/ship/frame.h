/* worker/ship/frame.h - the header of kvframe.h as bytes: built with checksum, and checked on arrival.
 * COMMIT's payload likewise.
 *
 * Errors:  td_frame_parse answers EPROTO (with td_reason) for anything that is not a well-formed header for
 *          the payload it came with; meaning (epoch, geometry, coverage) is the receiver's business.
 * Threads: pure. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SHIP_FRAME_H
#define TD_WORKER_SHIP_FRAME_H

#include "common/arena.h"
#include "common/buf.h"
#include "common/sampling.h"
#include "common/status.h"
#include "proto/kvframe.h"
#include "worker/ship/plan.h"
#include <stdbool.h>

/* The first token of each choice, as the prefill worker drew it. */
typedef struct td_first {
    uint32_t token;
    float logprob;
    uint32_t n_top;
    const td_top *top;
} td_first;

typedef struct td_commit {
    uint32_t n_first;
    bool logprobs;
    const td_first *first;
} td_commit;

void td_frame_init(td_kvframe *f, uint16_t type, uint64_t epoch, uint64_t incarnation);
/* A FRAME's geometry. n_held: tokens of the rectangle that the payload has. */
void td_frame_rect(td_kvframe *f, const td_rect *r, td_dtype dtype, int head_dim, uint32_t n_held);
/* Last thing before sending: sizes and checksums (payload may be NULL when n is 0). _with: the payload's is known. */
void td_frame_seal(td_kvframe *f, const void *payload, size_t n);
void td_frame_seal_with(td_kvframe *f, uint32_t payload_crc, size_t n);
td_status td_frame_parse(const void *head, size_t n_head, size_t n_payload, td_kvframe *out);
bool td_frame_payload_ok(const td_kvframe *f, const void *payload);
uint64_t td_frame_digest(const td_kvframe *f); /* a frame's share of COMMIT's digest */

void td_commit_write(td_buf *b, const td_commit *c);
td_status td_commit_read(td_arena *a, const void *p, size_t n, uint32_t n_first, td_commit *out);

#endif
