// SPDX-License-Identifier: Apache-2.0
/* worker/coll/coll.c - arguments are checked here once for all back ends, and every operation becomes one or
 * a few exchanges of parts (coll_int.h). The self back end is what is left when there is nobody to exchange
 * with.
 *
 * Peers are taken in the order rank+1, rank+2, ..: so that no rank is everybody's first. Trees are only worth
 * it for the barrier and for wide broadcasts: a worker's groups have 2 to 8 members. */
#include "common/check.h"
#include "worker/coll/coll_int.h"
#include <stdlib.h>
#include <string.h>

enum { FLAT_BCAST = 8 }; /* groups up to this size: the root sends to each */

/* ---- the frame of every back end ---- */

void td_coll_init(td_coll *c, const td_coll_ops *ops, int rank, int size)
{
    c->ops = ops;
    c->rank = rank;
    c->size = size;
    c->timeout_us = 0;
    size_t room = size > 1 ? (size_t)size - 1 : 1;
    for (int i = 0; i < TD_COLL_LANES; i++) {
        memset(&c->lane[i], 0, sizeof c->lane[i]);
        c->lane[i].send = td_xalloc(room * sizeof(td_coll_part));
        c->lane[i].recv = td_xalloc(room * sizeof(td_coll_part));
    }
}

void td_coll_deinit(td_coll *c)
{
    for (int i = 0; i < TD_COLL_LANES; i++) {
        free(c->lane[i].send);
        free(c->lane[i].recv);
    }
}

int td_coll_members(const int (*color_key)[2], int n, int color, int *ranks)
{
    int count = 0;
    for (int r = 0; r < n; r++) {
        if (color_key[r][0] != color) continue;
        int at = count++;
        for (; at > 0 && color_key[ranks[at - 1]][1] > color_key[r][1]; at--) ranks[at] = ranks[at - 1];
        ranks[at] = r;
    }
    return count;
}

td_status td_coll_copy_host(td_coll *c, void *to, const void *from, size_t bytes)
{
    (void)c;
    memcpy(to, from, bytes);
    return TD_OK;
}

/* ---- self ---- */

typedef struct self_coll {
    td_coll base;
    bool broken;
} self_coll;

static td_status self_health(td_coll *c)
{
    return ((self_coll *)c)->broken ? td_refuse(TD_EGONE, "the group was aborted") : TD_OK;
}

static td_status self_split(td_coll *c, int color, int key, td_coll **out)
{
    (void)c, (void)key;
    *out = NULL;
    return color < 0 ? TD_OK : td_coll_self_open(out);
}

static void self_close(td_coll *c)
{
    td_coll_deinit(c);
    free(c);
}

static void self_abort(td_coll *c, const char *why)
{
    td_fail(TD_EGONE, "group aborted: %s", why);
    ((self_coll *)c)->broken = true;
}

static const td_coll_ops self_ops = {
    .name = "self",
    .health = self_health,
    .copy = td_coll_copy_host,
    .split = self_split,
    .close = self_close,
    .abort = self_abort,
};

td_status td_coll_self_open(td_coll **out)
{
    self_coll *c = td_xalloc(sizeof *c);
    td_coll_init(&c->base, &self_ops, 0, 1);
    *out = &c->base;
    return TD_OK;
}

/* ---- groups ---- */

td_status td_coll_split(td_coll *c, int color, int key, td_coll **out)
{
    TD_TRY(c->ops->health(c));
    td_coll *child = NULL;
    TD_TRY(c->ops->split(c, color < 0 ? -1 : color, key, &child));
    if (child) child->timeout_us = c->timeout_us;
    *out = child;
    return TD_OK;
}

void td_coll_close(td_coll *c)
{
    if (c) c->ops->close(c);
}

void td_coll_deadline(td_coll *c, int64_t timeout_us)
{
    c->timeout_us = timeout_us > 0 ? timeout_us : 0;
}

void td_coll_abort(td_coll *c, const char *why)
{
    c->ops->abort(c, why ? why : "no reason given");
}

int td_coll_rank(const td_coll *c)
{
    return c->rank;
}

int td_coll_size(const td_coll *c)
{
    return c->size;
}

const char *td_coll_name(const td_coll *c)
{
    return c->ops->name;
}

/* ---- exchanges ---- */

/* A missing buffer has no bytes: its address is not computed. */
static const void *at(const void *base, size_t offset)
{
    return base ? (const char *)base + offset : NULL;
}

static void *into(void *base, size_t offset)
{
    return base ? (char *)base + offset : NULL;
}

static td_coll_lane *lane_open(td_coll *c, int lane, unsigned channel, unsigned kind)
{
    td_coll_lane *l = &c->lane[lane];
    l->channel = channel;
    l->kind = kind;
    l->n_send = l->n_recv = 0;
    return l;
}

static void part_send(td_coll_lane *l, int peer, const void *from, size_t bytes)
{
    if (bytes) l->send[l->n_send++] = (td_coll_part){.peer = peer, .bytes = bytes, .from = from};
}

static void part_recv(td_coll_lane *l, int peer, void *to, size_t bytes)
{
    if (bytes) l->recv[l->n_recv++] = (td_coll_part){.peer = peer, .bytes = bytes, .to = to};
}

static td_status lane_start(td_coll *c, int lane)
{
    td_coll_lane *l = &c->lane[lane];
    if (l->n_send + l->n_recv) TD_TRY(c->ops->start(c, lane));
    l->busy = true;
    return TD_OK;
}

static td_status lane_wait(td_coll *c, int lane)
{
    td_coll_lane *l = &c->lane[lane];
    td_status s = l->n_send + l->n_recv ? c->ops->wait(c, lane) : c->ops->health(c);
    l->busy = false;
    return s;
}

static td_status lane_run(td_coll *c, int lane)
{
    TD_TRY(lane_start(c, lane));
    return lane_wait(c, lane);
}

/* A rank's own block; nothing to do in place. */
static td_status own_block(td_coll *c, void *to, const void *from, size_t bytes)
{
    return bytes == 0 || to == from ? TD_OK : c->ops->copy(c, to, from, bytes);
}

/* ---- arguments ---- */

static td_status check_rank(const td_coll *c, const char *what, int rank)
{
    if (rank >= 0 && rank < c->size) return TD_OK;
    return td_refuse(TD_EBADREQ, "%s: rank %d of a group of %d", what, rank, c->size);
}

static td_status check_peer(const td_coll *c, const char *what, int rank)
{
    TD_TRY(check_rank(c, what, rank));
    if (rank != c->rank) return TD_OK;
    return td_refuse(TD_EBADREQ, "%s: rank %d is this rank", what, rank);
}

static td_status check_buffer(const char *what, const void *p, size_t bytes)
{
    return p || bytes == 0 ? TD_OK : td_refuse(TD_EBADREQ, "%s: no buffer for %zu bytes", what, bytes);
}

static td_status check_blocks(const td_coll *c, const char *what, size_t bytes_each)
{
    if (bytes_each <= SIZE_MAX / 2 / (size_t)c->size) return TD_OK;
    return td_refuse(TD_EBADREQ, "%s: %d blocks of %zu bytes", what, c->size, bytes_each);
}

static td_status check_lists(const td_coll *c, const char *what, const void *p, const size_t *bytes,
                             const size_t *offset)
{
    if (!bytes || !offset) return td_refuse(TD_EBADREQ, "%s: no sizes or offsets", what);
    for (int r = 0; r < c->size; r++) {
        TD_TRY(check_buffer(what, p, bytes[r]));
        if (bytes[r] > SIZE_MAX / 2 || offset[r] > SIZE_MAX / 2)
            return td_refuse(TD_EBADREQ, "%s: %zu bytes at %zu", what, bytes[r], offset[r]);
    }
    return TD_OK;
}

static td_status check_slot(const td_coll *c, const char *what, int slot, bool busy, unsigned channel)
{
    if (slot < 0 || slot >= TD_COLL_MAX_PENDING) return td_refuse(TD_EBADREQ, "%s: slot %d", what, slot);
    const td_coll_lane *l = &c->lane[1 + slot];
    if (!busy) return l->busy ? td_refuse(TD_EBADREQ, "%s: slot %d is in use", what, slot) : TD_OK;
    if (l->busy && l->channel == channel) return TD_OK;
    return td_refuse(TD_EBADREQ, "%s: nothing of that kind was started in slot %d", what, slot);
}

/* ---- collectives ---- */

/* Dissemination: after round k a rank has heard from the 2^(k+1) - 1 ranks before it. */
td_status td_coll_barrier(td_coll *c)
{
    TD_TRY(c->ops->health(c));
    if (c->ops->barrier) return c->ops->barrier(c);
    unsigned round = 0;
    for (int d = 1; d < c->size; d *= 2, round++) {
        char token = 1, got;
        td_coll_lane *l = lane_open(c, 0, 0, TD_COLL_BARRIER | round << 8);
        part_send(l, (c->rank + d) % c->size, &token, 1);
        part_recv(l, (c->rank + c->size - d) % c->size, &got, 1);
        TD_TRY(lane_run(c, 0));
    }
    return TD_OK;
}

/* Binomial tree over ranks relative to the root: a rank receives from itself without its lowest set bit, then
 * sends to itself plus each lower bit. */
static td_status bcast_tree(td_coll *c, void *buf, size_t bytes, int root, unsigned kind)
{
    int n = c->size, me = (c->rank - root + n) % n, bit = 1;
    while (bit < n && !(me & bit)) bit *= 2;
    if (me) {
        td_coll_lane *l = lane_open(c, 0, 0, kind);
        part_recv(l, (me - bit + root) % n, buf, bytes);
        TD_TRY(lane_run(c, 0));
    }
    td_coll_lane *l = lane_open(c, 0, 0, kind);
    for (bit /= 2; bit; bit /= 2)
        if (me + bit < n) part_send(l, (me + bit + root) % n, buf, bytes);
    return lane_run(c, 0);
}

td_status td_coll_bcast(td_coll *c, void *buf, size_t bytes, int root)
{
    TD_TRY(check_rank(c, "bcast", root));
    TD_TRY(check_buffer("bcast", buf, bytes));
    TD_TRY(c->ops->health(c));
    unsigned kind = TD_COLL_BCAST | (unsigned)root << 8;
    if (c->size > FLAT_BCAST) return bcast_tree(c, buf, bytes, root, kind);
    td_coll_lane *l = lane_open(c, 0, 0, kind);
    if (c->rank == root)
        for (int i = 1; i < c->size; i++) part_send(l, (c->rank + i) % c->size, buf, bytes);
    else
        part_recv(l, root, buf, bytes);
    return lane_run(c, 0);
}

static td_status all_gather_start(td_coll *c, int lane, const void *send, void *recv, size_t bytes)
{
    TD_TRY(check_blocks(c, "all_gather", bytes));
    TD_TRY(check_buffer("all_gather send", send, bytes));
    TD_TRY(check_buffer("all_gather recv", recv, bytes));
    TD_TRY(c->ops->health(c));
    td_coll_lane *l = lane_open(c, lane, (unsigned)lane, TD_COLL_ALL_GATHER);
    if (c->ops->all_gather) {
        TD_TRY(c->ops->all_gather(c, lane, send, recv, bytes));
        l->busy = true;
        return TD_OK;
    }
    for (int i = 1; i < c->size; i++) {
        int to = (c->rank + i) % c->size, from = (c->rank + c->size - i) % c->size;
        part_send(l, to, send, bytes);
        part_recv(l, from, into(recv, (size_t)from * bytes), bytes);
    }
    TD_TRY(lane_start(c, lane));
    return own_block(c, into(recv, (size_t)c->rank * bytes), send, bytes);
}

static td_status all_gather_wait(td_coll *c, int lane)
{
    if (!c->ops->all_gather) return lane_wait(c, lane);
    c->lane[lane].busy = false;
    return c->ops->wait(c, lane);
}

td_status td_coll_all_gather(td_coll *c, const void *send, void *recv, size_t bytes_each)
{
    TD_TRY(all_gather_start(c, 0, send, recv, bytes_each));
    return all_gather_wait(c, 0);
}

td_status td_coll_gatherv(td_coll *c, const void *send, void *recv, const size_t *bytes, const size_t *offset,
                          int root)
{
    TD_TRY(check_rank(c, "gatherv", root));
    bool is_root = c->rank == root;
    TD_TRY(check_lists(c, "gatherv", is_root ? recv : c, bytes, offset));
    size_t mine = bytes[c->rank];
    TD_TRY(check_buffer("gatherv send", send, mine));
    TD_TRY(c->ops->health(c));
    td_coll_lane *l = lane_open(c, 0, 0, TD_COLL_GATHER | (unsigned)root << 8);
    if (!is_root) {
        part_send(l, root, send, mine);
        return lane_run(c, 0);
    }
    for (int i = 1; i < c->size; i++) {
        int from = (root + i) % c->size;
        part_recv(l, from, into(recv, offset[from]), bytes[from]);
    }
    TD_TRY(lane_start(c, 0));
    TD_TRY(own_block(c, into(recv, offset[root]), send, mine));
    return lane_wait(c, 0);
}

td_status td_coll_all_gatherv(td_coll *c, const void *send, void *recv, const size_t *bytes,
                              const size_t *offset)
{
    TD_TRY(check_lists(c, "all_gatherv", recv, bytes, offset));
    size_t mine = bytes[c->rank];
    TD_TRY(check_buffer("all_gatherv send", send, mine));
    TD_TRY(c->ops->health(c));
    td_coll_lane *l = lane_open(c, 0, 0, TD_COLL_ALL_GATHER);
    for (int i = 1; i < c->size; i++) {
        int to = (c->rank + i) % c->size, from = (c->rank + c->size - i) % c->size;
        part_send(l, to, send, mine);
        part_recv(l, from, into(recv, offset[from]), bytes[from]);
    }
    TD_TRY(lane_start(c, 0));
    TD_TRY(own_block(c, into(recv, offset[c->rank]), send, mine));
    return lane_wait(c, 0);
}

td_status td_coll_all_to_all(td_coll *c, const void *send, void *recv, size_t bytes_each)
{
    TD_TRY(check_blocks(c, "all_to_all", bytes_each));
    TD_TRY(check_buffer("all_to_all send", send, bytes_each));
    TD_TRY(check_buffer("all_to_all recv", recv, bytes_each));
    TD_TRY(c->ops->health(c));
    td_coll_lane *l = lane_open(c, 0, 0, TD_COLL_ALL_TO_ALL);
    for (int i = 1; i < c->size; i++) {
        int to = (c->rank + i) % c->size, from = (c->rank + c->size - i) % c->size;
        part_send(l, to, at(send, (size_t)to * bytes_each), bytes_each);
        part_recv(l, from, into(recv, (size_t)from * bytes_each), bytes_each);
    }
    TD_TRY(lane_start(c, 0));
    size_t mine = (size_t)c->rank * bytes_each;
    TD_TRY(own_block(c, into(recv, mine), at(send, mine), bytes_each));
    return lane_wait(c, 0);
}

td_status td_coll_all_to_allv(td_coll *c, const void *send, const size_t *send_bytes,
                              const size_t *send_offset, void *recv, const size_t *recv_bytes,
                              const size_t *recv_offset)
{
    TD_TRY(check_lists(c, "all_to_allv send", send, send_bytes, send_offset));
    TD_TRY(check_lists(c, "all_to_allv recv", recv, recv_bytes, recv_offset));
    int me = c->rank;
    if (send_bytes[me] != recv_bytes[me])
        return td_refuse(TD_EBADREQ, "all_to_allv: rank %d sends itself %zu bytes and takes %zu", me,
                         send_bytes[me], recv_bytes[me]);
    TD_TRY(c->ops->health(c));
    td_coll_lane *l = lane_open(c, 0, 0, TD_COLL_ALL_TO_ALL);
    for (int i = 1; i < c->size; i++) {
        int to = (me + i) % c->size, from = (me + c->size - i) % c->size;
        part_send(l, to, at(send, send_offset[to]), send_bytes[to]);
        part_recv(l, from, into(recv, recv_offset[from]), recv_bytes[from]);
    }
    TD_TRY(lane_start(c, 0));
    TD_TRY(own_block(c, into(recv, recv_offset[me]), at(send, send_offset[me]), send_bytes[me]));
    return lane_wait(c, 0);
}

/* ---- point to point ---- */

td_status td_coll_send(td_coll *c, int to, const void *buf, size_t bytes)
{
    TD_TRY(check_peer(c, "send", to));
    TD_TRY(check_buffer("send", buf, bytes));
    TD_TRY(c->ops->health(c));
    part_send(lane_open(c, 0, TD_COLL_CHANNEL_P2P, TD_COLL_P2P), to, buf, bytes);
    return lane_run(c, 0);
}

td_status td_coll_recv(td_coll *c, int from, void *buf, size_t bytes)
{
    TD_TRY(check_peer(c, "recv", from));
    TD_TRY(check_buffer("recv", buf, bytes));
    TD_TRY(c->ops->health(c));
    part_recv(lane_open(c, 0, TD_COLL_CHANNEL_P2P, TD_COLL_P2P), from, buf, bytes);
    return lane_run(c, 0);
}

td_status td_coll_sendrecv(td_coll *c, int to, const void *send, size_t send_bytes, int from, void *recv,
                           size_t recv_bytes)
{
    TD_TRY(check_rank(c, "sendrecv to", to));
    TD_TRY(check_rank(c, "sendrecv from", from));
    TD_TRY(check_buffer("sendrecv send", send, send_bytes));
    TD_TRY(check_buffer("sendrecv recv", recv, recv_bytes));
    if ((to == c->rank) != (from == c->rank) || (to == c->rank && send_bytes != recv_bytes))
        return td_refuse(TD_EBADREQ, "sendrecv: rank %d sends %zu bytes to %d and takes %zu from %d", c->rank,
                         send_bytes, to, recv_bytes, from);
    TD_TRY(c->ops->health(c));
    if (to == c->rank) return own_block(c, recv, send, send_bytes);
    td_coll_lane *l = lane_open(c, 0, TD_COLL_CHANNEL_P2P, TD_COLL_P2P);
    part_send(l, to, send, send_bytes);
    part_recv(l, from, recv, recv_bytes);
    return lane_run(c, 0);
}

/* ---- start and wait ---- */

td_status td_coll_all_gather_start(td_coll *c, int slot, const void *send, void *recv, size_t bytes_each)
{
    TD_TRY(check_slot(c, "all_gather_start", slot, false, 0));
    return all_gather_start(c, 1 + slot, send, recv, bytes_each);
}

td_status td_coll_all_gather_wait(td_coll *c, int slot)
{
    TD_TRY(check_slot(c, "all_gather_wait", slot, true, (unsigned)slot + 1));
    return all_gather_wait(c, 1 + slot);
}

td_status td_coll_send_start(td_coll *c, int slot, int to, const void *buf, size_t bytes)
{
    TD_TRY(check_slot(c, "send_start", slot, false, 0));
    TD_TRY(check_peer(c, "send_start", to));
    TD_TRY(check_buffer("send_start", buf, bytes));
    TD_TRY(c->ops->health(c));
    part_send(lane_open(c, 1 + slot, TD_COLL_CHANNEL_P2P, TD_COLL_P2P), to, buf, bytes);
    return lane_start(c, 1 + slot);
}

td_status td_coll_send_wait(td_coll *c, int slot)
{
    TD_TRY(check_slot(c, "send_wait", slot, true, TD_COLL_CHANNEL_P2P));
    return lane_wait(c, 1 + slot);
}

int64_t td_coll_started_us(const td_coll *c)
{
    return c->started_us;
}

td_status td_coll_poke(td_coll *c)
{
    return c->ops->poke ? c->ops->poke(c) : TD_OK;
}
