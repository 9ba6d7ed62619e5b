/* worker/coll/coll.h - moving bytes among the ranks of a worker: one table, five back ends.
 *
 *   self      a group of one: copies
 *   threads   ranks as threads of one process (tests, a single CPU host): copies between their buffers
 *   mpi       Open MPI, CPU memory
 *   nccl      NCCL by dlopen, device memory on a stream
 *   staged    device memory through page-locked buffers, over any of the first three
 *
 * A td_coll is one rank's end of one group. All members call the same functions in the same order with the
 * same sizes. Nothing here adds: sums are kernels, in a fixed order (DESIGN 2).
 *
 * Rules:     1. Sizes are in bytes; recv holds size() blocks in rank order. send may be recv's own block
 *               (in place); otherwise buffers do not overlap.
 *            2. Zero bytes are allowed everywhere; then nothing is waited for.
 *            3. One operation in flight per group, except start/wait pairs, of which there may be
 *               TD_COLL_MAX_PENDING; other groups are independent. Members wait for started operations in the
 *               same order relative to the group's other operations. nccl runs a group's operations in the
 *               order of their calls: a started send whose recv comes after another operation of the group
 *               hangs there; pipelines have a group of their own.
 *            4. A peer that is gone is EGONE, one that does not come within the deadline ETIME, one that calls
 *               something else or with another size EPROTO (threads: always noticed; mpi: sizes). The group is
 *               then broken and every later call says so at once; so are all groups that come from the same
 *               opening: the worker ends (a worker is one failure domain). mpi: buffers of the failed call stay
 *               borrowed until the process ends.
 *            5. Members wait without spinning for more than 50 us: ranks share machines.
 * Ownership: groups are closed by their owner, children before parents. Buffers are borrowed until the call
 *            returns (start: until wait). self, threads, mpi: a call that returned is done. nccl: it is
 *            enqueued, and done in the order of the stream; only barrier waits for the device. staged: what was to be sent is
 *            sent, what was received is enqueued on the compute stream.
 * Threads:   one owner thread for all groups of a rank (MPI_THREAD_FUNNELED suffices). td_coll_abort: that
 *            thread too; it ends the waits of all others.
 * Errors:    EBADREQ: a wrong argument (nothing was sent, the group is as before). EGONE, ETIME, EPROTO, EIO:
 *            rule 4. td_reason() has the cause.
 * Limits:    TD_COLL_MAX_RANKS, threads TD_COLL_MAX_THREADS; messages of any size (back ends cut them).
 * Source:    algorithms notes 9.1, 9.9; MPI 3.1 chapter 5. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_COLL_COLL_H
#define TD_WORKER_COLL_COLL_H

#include "common/status.h"
#include <stddef.h>
#include <stdint.h>

enum { TD_COLL_MAX_RANKS = 1024, TD_COLL_MAX_THREADS = 64, TD_COLL_MAX_PENDING = 4, TD_COLL_MEET_MS = 8000 };

typedef struct td_coll td_coll;
typedef struct td_dev td_dev; /* kernels/dev.h */

/* ---- opening ---- */

td_status td_coll_self_open(td_coll **out);
/* n ends of one group; ends[i] is handed to the thread of rank i, which closes it. */
td_status td_coll_threads_open(int n, td_coll **ends);
/* MPI_Init_thread and COMM_WORLD; ENOSUP when built without MPI. argc/argv as main's. Once per process. Where MPI cannot
 * reach a rank within TD_COLL_MEET_MS after its start, the process says so and ends: MPI itself would wait for ever. */
td_status td_coll_mpi_open(int *argc, char ***argv, td_coll **out);
/* Same ranks as `host` (which carries the unique id); buffers of this group are device memory on `stream`.
 * ENOSUP on all ranks when one has no libnccl (with what was looked for) or no such device, or when their
 * versions differ. version: of the library that was found, e.g. 23004; may be NULL. */
td_status td_coll_nccl_open(td_coll *host, int device, void *stream, int *version, td_coll **out);
/* Same ranks as `host`, an own group of them; buffers are memory of `dev` (kernels/dev.h), borrowed. */
td_status td_coll_staged_open(td_coll *host, td_dev *dev, td_coll **out);
/* The newest libnccl of this machine, whether it has a device or not: the system's, then the Python
 * packages'. path: static. Both may be NULL. */
td_status td_coll_nccl_find(int *version, const char **path);
/* Members of equal color become a group, ordered by (key, rank). color < 0: *out = NULL. The deadline is
 * inherited. */
td_status td_coll_split(td_coll *c, int color, int key, td_coll **out);
void td_coll_close(td_coll *c);
/* How long a member waits for others in one call; default 0: for ever (the launcher's watchdog ends a hung
 * group). */
void td_coll_deadline(td_coll *c, int64_t timeout_us);
/* Break all groups for everybody (threads: their calls return EGONE), or end all ranks (mpi: MPI_Abort). */
void td_coll_abort(td_coll *c, const char *why);

/* ---- facts ---- */

int td_coll_rank(const td_coll *c);
int td_coll_size(const td_coll *c);
const char *td_coll_name(const td_coll *c); /* "self", "threads", "mpi", "nccl", "staged" */

/* ---- moving ---- */

td_status td_coll_barrier(td_coll *c);
td_status td_coll_bcast(td_coll *c, void *buf, size_t bytes, int root);
td_status td_coll_all_gather(td_coll *c, const void *send, void *recv, size_t bytes_each);
/* recv at root only: bytes[i] at offset[i] (both [size], equal on all members). */
td_status td_coll_gatherv(td_coll *c, const void *send, void *recv, const size_t *bytes, const size_t *offset,
                          int root);
td_status td_coll_all_gatherv(td_coll *c, const void *send, void *recv, const size_t *bytes,
                              const size_t *offset);
/* Block i of send goes to rank i; recv holds what came from each. */
td_status td_coll_all_to_all(td_coll *c, const void *send, void *recv, size_t bytes_each);
td_status td_coll_all_to_allv(td_coll *c, const void *send, const size_t *send_bytes,
                              const size_t *send_offset, void *recv, const size_t *recv_bytes,
                              const size_t *recv_offset);
/* To or from another rank; messages of a pair arrive in the order they were sent. */
td_status td_coll_send(td_coll *c, int to, const void *buf, size_t bytes);
td_status td_coll_recv(td_coll *c, int from, void *buf, size_t bytes);
/* Both at once: rings. to and from may be this rank, then both are. Matches send and recv of the peers. */
td_status td_coll_sendrecv(td_coll *c, int to, const void *send, size_t send_bytes, int from, void *recv,
                           size_t recv_bytes);

/* An all-gather that runs beside computation (weights of the next layer). Slot: 0 .. MAX_PENDING-1. */
td_status td_coll_all_gather_start(td_coll *c, int slot, const void *send, void *recv, size_t bytes_each);
td_status td_coll_all_gather_wait(td_coll *c, int slot);

/* A send that does not wait for its receiver (pipeline stages): buf may be reused once wait returns. Slots as
 * above, shared with all_gather_start. */
td_status td_coll_send_start(td_coll *c, int slot, int to, const void *buf, size_t bytes);
td_status td_coll_send_wait(td_coll *c, int slot);
/* Microseconds that calls of this rank took to move large parts of started exchanges of this group, in whichever call was waiting:
 * time that nothing else was done in. nccl, staged: 0. */
int64_t td_coll_started_us(const td_coll *c);
/* Between pieces of a long computation: what was started goes on as far as it can without waiting (mpi moves nothing by
 * itself). Cheap. */
td_status td_coll_poke(td_coll *c);

#endif
