/* proto/kvframe.h - bulk KV frames between workers: fixed little-endian structs, followed by the payload as a
 * second ZeroMQ part.
 *
 *   prefill -> decode: FRAME* COMMIT | ABORT          decode -> prefill: CREDIT, ACK | NACK
 *
 * A worker is one or more ranks; each rank of the prefill worker talks to those ranks of the decode worker
 * that need something of it. One FRAME carries, for one page group, layers [layer0, layer0 + n_layers) (slots
 * of that group) x heads [head0, head0 + n_heads) x those tokens of [tok0, tok0 + n_tok) that the destination
 * rank holds (n_held of them: all, unless it shares the context with others), of one epoch. Slots, heads and
 * tokens are numbered as in the whole model and prompt. Payload order: [layer][k|v][head][token][D], elements
 * of kv dtype: independent of both grids and page sizes.
 * Rules:  1. Frames are idempotent and may come in any order; each (group, layer, head, token) is written at
 *            most once per epoch.
 *         2. A frame whose epoch is not live is dropped before any page is touched.
 *         3. crc32c covers the payload; head_crc32c covers the header with that field zero.
 *         4. COMMIT's payload: td_kvcommit, td_kvfirst[n_first] (one per choice, in order; n_first is the
 *            number of choices, or 0 when choices resume at different lengths: the decode side draws; token
 *            TD_KVF_NO_TOKEN: that choice was cancelled), td_kvtop of all first tokens in order; first tokens
 *            go from rank 0 to rank 0. Its index and digest are about this source's frames for this
 *            destination; the digest is the XOR over them of td_mix64(payload_crc32c << 32 | index). n_src of
 *            every COMMIT says how many sources this destination hears a COMMIT from.
 *         5. Bytes in flight are bounded by credits: a sender may have at most `credits` (its reservation's)
 *            unacknowledged frames for one destination; CREDIT returns some, when a quarter of them is due.
 *         6. A frame is at most TD_KVF_FRAME_BYTES of payload. Messages other than FRAME and COMMIT have an
 *            empty payload, NACK a short text.
 *         7. ACK, NACK or ABORT end an epoch (on this destination rank; ACK goes to all its sources): what
 *            comes after that is dropped and answered with NACK; after ACK, a COMMIT seen again gets ACK
 *            again and a FRAME nothing.
 *         8. ABORT's index: 0, the request is over, free the pages; 1, the pages will not come, compute them
 *            yourself. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_PROTO_KVFRAME_H
#define TD_PROTO_KVFRAME_H

#include <assert.h>
#include <stddef.h>
#include <stdint.h>

enum { TD_KVF_MAGIC = 0x4656544bu /* "KTVF" */, TD_KVF_VERSION = 3, TD_KVF_FRAME_BYTES = 256 * 1024 };
#define TD_KVF_NO_TOKEN 0xffffffffu
enum { TD_KVF_FRAME = 1, TD_KVF_COMMIT, TD_KVF_ABORT, TD_KVF_CREDIT, TD_KVF_ACK, TD_KVF_NACK };

typedef struct td_kvframe {
    uint32_t magic;
    uint16_t version, type;
    uint64_t epoch;          /* the reservation, unique in the decode worker's incarnation */
    uint64_t incarnation;    /* of the decode worker */
    /* FRAME: 0, 1, 2 ... in sending order; COMMIT: number of frames; CREDIT: frames returned; ABORT: rule
     * 8 */
    uint32_t index;
    uint16_t group, dtype;   /* page group; td_dtype of the elements */
    uint16_t layer0, n_layers;
    uint32_t tok0, n_tok;
    uint16_t head0, n_heads, head_dim;
    uint16_t n_src;          /* COMMIT: sources of this destination, from 1 */
    uint16_t src_rank, dst_rank; /* in the prefill worker; in the decode worker */
    uint32_t n_first;        /* COMMIT: number of first tokens in the payload */
    uint32_t n_held;         /* FRAME: tokens in the payload */
    uint64_t digest;         /* COMMIT */
    uint64_t payload_bytes;
    uint32_t payload_crc32c, head_crc32c;
    /* COMMIT: microseconds from this source's first frame to the end of the prompt's computation; 0: it ended first */
    int64_t hidden_us;
} td_kvframe;

typedef struct td_kvcommit {
    uint32_t n_top;          /* of all first tokens together */
    uint32_t logprobs;       /* 1: td_kvfirst.logprob was asked for */
} td_kvcommit;
typedef struct td_kvfirst { uint32_t token; float logprob; uint32_t n_top; } td_kvfirst;
typedef struct td_kvtop { uint32_t id; float logprob; } td_kvtop;

static_assert(offsetof(td_kvframe, epoch) == 8, "kvframe layout");
static_assert(offsetof(td_kvframe, index) == 24, "kvframe layout");
static_assert(offsetof(td_kvframe, tok0) == 36, "kvframe layout");
static_assert(offsetof(td_kvframe, digest) == 64, "kvframe layout");
static_assert(offsetof(td_kvframe, payload_crc32c) == 80, "kvframe layout");
static_assert(sizeof(td_kvframe) == 96, "kvframe layout");
static_assert(sizeof(td_kvcommit) == 8 && sizeof(td_kvfirst) == 12 && sizeof(td_kvtop) == 8,
              "kvframe layout");

#endif
