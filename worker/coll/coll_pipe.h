/* worker/coll/coll_pipe.h - bytes from one process to another of the same host through shared memory: a ring
 * with one writer and one reader, who copy in and out a piece at a time, so that both copies run at once.
 * coll_mpi.c sends its large messages through them: 1 MiB both ways takes 56 us, by Open MPI (one copy by the
 * kernel) 80 us. The ring is large on purpose: what a core wrote just now is fetched from its own cache,
 * which took 137 us with 128 KiB and pieces of 32 KiB; later it is in the cache they share.
 *
 * Rules:   1. Zeroed memory is an empty pipe.
 *          2. The reader grants the pipe to one message at a time (its ticket); only that one's bytes are in it.
 *          3. Nothing here waits.
 * Threads: writer and reader one thread each, of any process. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_COLL_PIPE_H
#define TD_WORKER_COLL_PIPE_H

#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>

enum { TD_COLL_PIPE_BYTES = 1 << 20, TD_COLL_PIPE_PIECE = 256 << 10 };

typedef struct td_coll_pipe {
    _Alignas(64) _Atomic uint64_t written; /* by the writer, ever */
    _Alignas(64) _Atomic uint64_t read;    /* by the reader, ever */
    _Alignas(64) _Atomic uint32_t granted; /* ticket; by the reader */
    _Alignas(4096) char ring[TD_COLL_PIPE_BYTES];
} td_coll_pipe;

/* At most n bytes and one piece; how many. */
size_t td_coll_pipe_write(td_coll_pipe *p, const void *from, size_t n);
size_t td_coll_pipe_read(td_coll_pipe *p, void *to, size_t n);

#endif
