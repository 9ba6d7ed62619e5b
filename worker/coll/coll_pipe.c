// SPDX-License-Identifier: Apache-2.0
/* worker/coll/coll_pipe.c - see coll_pipe.h. A piece never runs over the ring's end. */
#include "worker/coll/coll_pipe.h"
#include "common/check.h"
#include <string.h>

static size_t piece(size_t n, size_t possible, uint64_t at)
{
    size_t to_end = TD_COLL_PIPE_BYTES - (size_t)(at % TD_COLL_PIPE_BYTES);
    n = TD_MIN(n, possible);
    n = TD_MIN(n, to_end);
    return TD_MIN(n, (size_t)TD_COLL_PIPE_PIECE);
}

size_t td_coll_pipe_write(td_coll_pipe *p, const void *from, size_t n)
{
    uint64_t written = atomic_load_explicit(&p->written, memory_order_relaxed);
    uint64_t read = atomic_load_explicit(&p->read, memory_order_acquire);
    n = piece(n, TD_COLL_PIPE_BYTES - (size_t)(written - read), written);
    if (!n) return 0;
    memcpy(p->ring + written % TD_COLL_PIPE_BYTES, from, n);
    atomic_store_explicit(&p->written, written + n, memory_order_release);
    return n;
}

size_t td_coll_pipe_read(td_coll_pipe *p, void *to, size_t n)
{
    uint64_t read = atomic_load_explicit(&p->read, memory_order_relaxed);
    uint64_t written = atomic_load_explicit(&p->written, memory_order_acquire);
    n = piece(n, (size_t)(written - read), read);
    if (!n) return 0;
    memcpy(to, p->ring + read % TD_COLL_PIPE_BYTES, n);
    atomic_store_explicit(&p->read, read + n, memory_order_release);
    return n;
}
