/* kernels/ops_cuda.h - what the parts of the CUDA table share: its device, its first error, workspaces that grow, and the
 * ring that host arguments go through. Internal to ops_cuda*.cu.
 *
 *   ops_cuda.cu         the ring, operations on rows, the table
 *   ops_cuda_gemm.cu    matrix products      ops_cuda_attn.cu    attention
 *   ops_cuda_sample.cu  token choice         ops_cuda_replay.cu  steps that are recorded and run again
 *
 * Rules:   1. After the first error nothing is queued any more (may_run); td_cuda_ops_status tells and clears it.
 *          2. What host memory holds (rows to sample, page tables) goes through a ring of two pinned halves: a half is
 *             written again only after the stream has passed the event that follows its last copy.
 * Threads: the engine's. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_OPS_CUDA_H
#define TD_KERNELS_OPS_CUDA_H

#include "kernels/choose_cuda.h"
#include "kernels/cuda.h"
#include "kernels/td_cuda.h"
#include <string.h>

namespace td_ops_cuda
{
struct ring_half {
    char *host, *device;
    size_t used, bytes;
    td_event *passed;
};

/* What a step's launches depend on besides the key: a recording is good while none of it changes. */
struct recording {
    bool on;          /* launches are recorded, not run */
    td_status status; /* the first failure meanwhile */
    size_t parts;     /* partial results of attention for which the launches are right */
};

/* Device memory that grows (want), never shrinks. */
struct block {
    char *p;
    size_t bytes;
    bool held; /* recordings have its address */
};

struct context {
    td_dev *dev;
    td_status status;
    char reason[256]; /* of status */
    ring_half half[2];
    int at;
    size_t moved; /* counts changes of addresses that recordings have */
    recording rec;
    td_cuda_choice kernels; /* what products and attention run */
    unsigned grown;         /* workspaces and halves of the ring that had to become larger since they were reserved */
    td_ops ops;
    td_operand_ops operand;
};
extern context ctx;

/* While a step is recorded, an error is the recording's alone. */
void failed(td_status s);
/* Fails unless s is OK. */
void kept(td_status s);
/* False after any error. */
bool may_run();
void launched(int code, const char *what);
td_stream stream();
/* At least `bytes` in b, kept for the next call; grows with a synchronization, and then by half; not while a step is
 * recorded. False: failed. */
bool want(block *b, size_t bytes);
void drop(block *b);

/* One argument block of a call: parts are put one after another, then sent in one transfer. */
struct parcel {
    ring_half *h;
    size_t start, used;
};
size_t padded(size_t n);
bool parcel_open(parcel *p, size_t bytes); /* not while a step is recorded */
bool parcel_send(parcel *p);
/* Copies n bytes in; the device address they will have. NULL stays NULL. */
template <class T> const T *parcel_put(parcel *p, const T *src, size_t n)
{
    if (!src || !n) return nullptr;
    memcpy(p->h->host + p->used, src, n * sizeof(T));
    const T *at = (const T *)(p->h->device + p->used);
    p->used += padded(n * sizeof(T));
    return at;
}

/* A parcel of its own whose bytes then lie at `to`, device memory that outlives the ring's half. False: failed. */
bool send_to(void *to, const void *src, size_t bytes);

/* Each part enters its operations, sizes its workspaces, and frees them. */
void products_fill(td_ops *t, td_operand_ops *o);
void products_reserve(const td_ops_room *r);
void products_close();
void attention_fill(td_ops *t);
void attention_reserve(const td_ops_room *r);
void attention_close();
void choice_fill(td_ops *t);
void choice_reserve(const td_ops_room *r);
void choice_close();
void replay_fill(td_ops *t);
void replay_close();
size_t attention_most_parts(); /* for which there ever is room; with more, the kernel for prompts takes the rest */
/* Of the sequences and page tables of a step. */
size_t step_bytes(const td_ops_room *r);
} // namespace td_ops_cuda

#endif
