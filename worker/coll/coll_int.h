/* worker/coll/coll_int.h - what a back end serves: exchanges of parts; coll.c makes every operation of them.
 *
 * An exchange is a list of parts to send and a list of parts to receive, at most one of each per peer, none
 * of zero bytes and none with the rank itself. A lane holds one exchange from start to wait: lane 0 the
 * blocking operation, lanes 1.. the slots of start/wait pairs. Exchanges meet by channel, peer and order: a
 * collective uses the channel of its lane; all point-to-point messages share CHANNEL_P2P, so that a started
 * send is met by an ordinary recv. `kind` is equal at both ends when all members call the same operation.
 *
 * Rules:   1. start never waits for a peer.
 *          2. wait returns when the buffers of its lane are free and filled.
 *          3. A back end that fails breaks itself: health() then answers the same status for ever.
 * Limits:  on CHANNEL_P2P at most TD_COLL_MAX_PENDING + 1 exchanges are in flight, on others one. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_COLL_COLL_INT_H
#define TD_WORKER_COLL_COLL_INT_H

#include "worker/coll/coll.h"
#include <stdbool.h>

enum {
    TD_COLL_LANES = 1 + TD_COLL_MAX_PENDING,
    TD_COLL_CHANNEL_P2P = TD_COLL_LANES,
    TD_COLL_CHANNELS,
    TD_COLL_TIMED = 64 << 10, /* bytes; copies of less are not timed */
    TD_COLL_SPIN_US = 50, /* rule 5 of coll.h */
    TD_COLL_WORK_US = 8,  /* looks that take longer than this found work */
};

typedef enum {
    TD_COLL_BARRIER = 1,
    TD_COLL_BCAST,
    TD_COLL_GATHER,
    TD_COLL_ALL_GATHER,
    TD_COLL_ALL_TO_ALL,
    TD_COLL_P2P,
} td_coll_kind;

typedef struct td_coll_part {
    int peer;
    size_t bytes;
    const void *from; /* of a part to send */
    void *to;         /* of a part to receive */
    void *own;        /* the back end's; NULL at start */
    bool done;        /* the back end's; false at start */
} td_coll_part;

typedef struct td_coll_lane {
    bool busy;
    unsigned channel, kind;
    int n_send, n_recv;
    td_coll_part *send, *recv; /* room for size - 1, at least 1 */
} td_coll_lane;

typedef struct td_coll_ops {
    const char *name;
    td_status (*start)(td_coll *c, int lane);
    td_status (*wait)(td_coll *c, int lane);
    td_status (*health)(td_coll *c);                                         /* with the reason */
    td_status (*copy)(td_coll *c, void *to, const void *from, size_t bytes); /* a rank's own block */
    td_status (*split)(td_coll *c, int color, int key, td_coll **out);
    void (*close)(td_coll *c); /* lanes may be busy */
    void (*abort)(td_coll *c, const char *why);
    td_status (*poke)(td_coll *c);    /* NULL: nothing to do */
    td_status (*barrier)(td_coll *c); /* NULL: by exchanges */
    td_status (*all_gather)(td_coll *c, int lane, const void *send, void *recv, size_t bytes_each); /* same */
} td_coll_ops;

/* First member of every back end's own struct. */
struct td_coll {
    const td_coll_ops *ops;
    int rank, size;
    int64_t timeout_us, started_us;
    td_coll_lane lane[TD_COLL_LANES];
};

void td_coll_init(td_coll *c, const td_coll_ops *ops, int rank, int size);
void td_coll_deinit(td_coll *c);

/* Members of `color` in their new order, from all members' {color, key}: old ranks into ranks[n]. Returns how
 * many. */
int td_coll_members(const int (*color_key)[2], int n, int color, int *ranks);

/* memcpy on the host, for ops->copy. */
td_status td_coll_copy_host(td_coll *c, void *to, const void *from, size_t bytes);

#endif
