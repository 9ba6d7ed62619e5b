// SPDX-License-Identifier: Apache-2.0
/* worker/coll/coll_mpi.c - ranks as processes, over Open MPI; the only file that knows mpi.h.
 *
 * A part is one or more MPI_Isend or MPI_Irecv (cut at 1 GiB: counts are int), its tag the channel. Nothing
 * else of MPI moves data: its collectives may not be waited for without burning a core, and wake nobody.
 *
 * Within a host a message from 16 KiB on takes a pipe in shared memory (coll_pipe.h) instead: through MPI
 * goes only its pass, which keeps MPI's matching and order. The receiver grants the pipe to one message at a
 * time, one whose buffer it knows; so whoever waits moves the bytes of all its messages, and none stands in
 * another's way. A started send is different: its sender computes on, and would write to the pipe only at its next
 * wait. Its bytes go through MPI, after their pass and with a tag of their own, and within a host the receiver takes
 * them from the sender's memory alone (one copy by the kernel); where that is not so, td_coll_poke helps on.
 *
 * Waiting. Open MPI only polls; mpi_yield_when_idle still keeps a core at 100 %. So a wait tests for 50 us
 * (not at all when the host has fewer cores than ranks), then blocks on a futex in memory that the ranks of a
 * host share, its bell. Who has sent something to a rank of its host, or taken something from it, rings if
 * that rank sleeps. What MPI does inside (a rendezvous that needs another round) rings no bell, so a sleep
 * ends by itself after 1 ms; in groups with members on other hosts, who cannot ring, after 50 us, doubling to
 * 500 us. Costs measured beside MPI's own ping-pong: tests/bench/coll.py.
 *
 * bell: 0 awake, 1 asleep. Sleeper and ringer both change it by read-modify-write, so one of them sees the
 * other: either the ringer sees 1, or the sleeper's last test follows the ringer's send.
 *
 * After an error nothing more of MPI is used, not even MPI_Finalize: the process is to end, and mpirun ends
 * the others when one leaves like that. */
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "worker/coll/coll_int.h"
#include "worker/coll/coll_pipe.h"
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <mpi.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { LOOKS_PER_CLOCK = 16, NAP_LOCAL_US = 1000, NAP_MIN_US = 50, NAP_MAX_US = 500 };
enum { PIPE_MIN = 16 << 10, PIPE_RANKS = 8, PASS_MAGIC = 0x7d9a55 }; /* with at most 8 ranks on the host */
enum { DIRECT_MAGIC = PASS_MAGIC + 1, DIRECT_TAG = TD_COLL_CHANNELS };
static const size_t cut_bytes = (size_t)1 << 30;

typedef struct bell {
    _Alignas(64) _Atomic uint32_t asleep; /* futex, shared by processes */
} bell;

typedef struct peer { /* a rank of the world; all NULL on another host */
    bell *bell;
    td_coll_pipe *in, *out; /* NULL: no pipes */
    uint32_t tickets;       /* given to messages that go out */
    uint32_t reading;       /* ticket of the message that comes in; 0: none */
} peer;

typedef struct pass { /* goes ahead of a message that takes the pipe */
    uint32_t magic, ticket;
    uint64_t bytes;
} pass;

typedef struct transfer {  /* a message that takes the pipe */
    struct transfer *next; /* in the world's list while it is not done */
    td_coll_part *part;
    td_coll *started; /* whose started exchange it is; NULL: a call waits for it */
    peer *peer;
    pass pass;
    size_t moved;
    enum { BY_PASS, BY_PIPE, BY_MPI } how; /* to receive: what comes next */
    MPI_Comm comm;
    MPI_Request req; /* to receive: the pass, or bytes that come by MPI */
    int asked;       /* of those */
} transfer;

typedef struct world {
    int users, size, spin_us;
    td_status broken;
    char why[256];
    MPI_Win win; /* MPI_WIN_NULL: no memory is shared */
    bell *self;
    bell *own;   /* of a host without shared memory: nobody rings it */
    peer *peers; /* [size] */
    transfer *active;
} world;

typedef struct flight { /* what a lane has under way: MPI requests, receives first, and transfers */
    int n, room, n_recv, n_transfers;
    MPI_Request *req;
    MPI_Status *status;
    int *bytes;
    transfer *transfers; /* room for all parts */
    pass direct;         /* of a started send, which has one part */
} flight;

typedef struct end {
    td_coll base;
    world *w;
    MPI_Comm comm;
    peer **peers; /* [size] of the group's ranks */
    bool all_local;
    flight flights[TD_COLL_LANES];
} end;

/* ---- breaking ---- */

static td_status world_health(world *w)
{
    return w->broken == TD_OK ? TD_OK : td_refuse(w->broken, "the group is broken: %s", w->why);
}

static td_status world_break(world *w, td_status s, const char *why)
{
    TD_TRY(world_health(w));
    snprintf(w->why, sizeof w->why, "%s", why);
    w->broken = s;
    return td_fail(s, "%s", why);
}

static td_status mpi_check(world *w, const char *what, int code)
{
    if (code == MPI_SUCCESS) return TD_OK;
    char text[MPI_MAX_ERROR_STRING] = "", why[256];
    int len = 0, class = MPI_ERR_OTHER;
    MPI_Error_string(code, text, &len);
    MPI_Error_class(code, &class);
    snprintf(why, sizeof why, "%s: %.180s", what, text);
    return world_break(w, class == MPI_ERR_TRUNCATE ? TD_EPROTO : TD_EIO, why);
}

static td_status health(td_coll *c)
{
    return world_health(((end *)c)->w);
}

static void end_abort(td_coll *c, const char *why)
{
    TD_ERROR("rank %d of %d ends all ranks: %s", c->rank, c->size, why);
    MPI_Abort(MPI_COMM_WORLD, 1);
}

/* ---- bells ---- */

static void ring(bell *b)
{
    if (!b || !atomic_fetch_or(&b->asleep, 0)) return;
    if (atomic_exchange(&b->asleep, 0)) syscall(SYS_futex, &b->asleep, FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
}

static void ring_peers(end *e, const td_coll_lane *l)
{
    for (int i = 0; i < l->n_send; i++) ring(e->peers[l->send[i].peer]->bell);
    for (int i = 0; i < l->n_recv; i++) ring(e->peers[l->recv[i].peer]->bell);
}

static void nap(world *w, int64_t us)
{
    struct timespec t = {us / 1000000, us % 1000000 * 1000};
    syscall(SYS_futex, &w->self->asleep, FUTEX_WAIT, 1, &t, NULL, 0);
}

/* ---- large messages within a host ---- */

static bool takes_pipe(const peer *p, size_t bytes)
{
    return bytes >= PIPE_MIN && p->in;
}

static td_status transfer_post(end *e, flight *f, const td_coll_lane *l, td_coll_part *p)
{
    transfer *t = &f->transfers[f->n_transfers];
    int tag = (int)l->channel, code;
    *t = (transfer){.next = e->w->active, .part = p, .started = l != &e->base.lane[0] ? &e->base : NULL, .peer = e->peers[p->peer], .comm = e->comm, .req = MPI_REQUEST_NULL};
    if (p->to) {
        code = MPI_Irecv(&t->pass, sizeof t->pass, MPI_BYTE, p->peer, tag, e->comm, &t->req);
    } else {
        if (++t->peer->tickets == 0) t->peer->tickets = 1;
        t->pass = (pass){PASS_MAGIC, t->peer->tickets, p->bytes};
        code = MPI_Isend(&t->pass, sizeof t->pass, MPI_BYTE, p->peer, tag, e->comm, &f->req[f->n]);
    }
    TD_TRY(mpi_check(e->w, p->to ? "MPI_Irecv" : "MPI_Isend", code));
    if (!p->to) f->bytes[f->n++] = sizeof t->pass;
    f->n_transfers++;
    e->w->active = t;
    return TD_OK;
}

/* OK when the pass came and is for a message of the size that is expected here. */
static td_status pass_look(world *w, transfer *t)
{
    int done = 0, got = 0;
    MPI_Status status;
    TD_TRY(mpi_check(w, "MPI_Test", MPI_Test(&t->req, &done, &status)));
    if (!done) return TD_AGAIN;
    MPI_Get_count(&status, MPI_BYTE, &got);
    bool direct = t->pass.magic == DIRECT_MAGIC;
    if (got == sizeof t->pass && (direct || t->pass.magic == PASS_MAGIC) && t->pass.bytes == t->part->bytes) {
        t->how = direct ? BY_MPI : BY_PIPE;
        return TD_OK;
    }
    char why[120];
    snprintf(why, sizeof why, "ranks differ: %llu bytes from rank %d, %zu expected",
             got == sizeof t->pass ? (unsigned long long)t->pass.bytes : (unsigned long long)got,
             status.MPI_SOURCE, t->part->bytes);
    return world_break(w, TD_EPROTO, why);
}

/* A piece of a started send. OK: it came. */
static td_status direct_in(world *w, transfer *t)
{
    int done = 0, got = 0;
    MPI_Status status;
    if (t->req == MPI_REQUEST_NULL) {
        t->asked = (int)TD_MIN(t->part->bytes - t->moved, cut_bytes);
        TD_TRY(mpi_check(w, "MPI_Irecv", MPI_Irecv((char *)t->part->to + t->moved, t->asked, MPI_BYTE, t->part->peer, DIRECT_TAG,
                                                   t->comm, &t->req)));
    }
    TD_TRY(mpi_check(w, "MPI_Test", MPI_Test(&t->req, &done, &status)));
    if (!done) return TD_AGAIN;
    MPI_Get_count(&status, MPI_BYTE, &got);
    if (got != t->asked) return world_break(w, TD_EPROTO, "ranks differ: a started send is shorter than its pass says");
    t->moved += (size_t)got;
    return TD_OK;
}

/* OK: something moved. */
static td_status transfer_in(world *w, transfer *t)
{
    peer *p = t->peer;
    if (t->how == BY_PASS) {
        td_status s = pass_look(w, t);
        if (s != TD_OK) return s;
    }
    if (t->how == BY_MPI) return direct_in(w, t);
    if (!p->reading) {
        p->reading = t->pass.ticket;
        atomic_store(&p->in->granted, t->pass.ticket);
        ring(p->bell);
    }
    if (p->reading != t->pass.ticket) return TD_AGAIN;
    size_t n = td_coll_pipe_read(p->in, (char *)t->part->to + t->moved, t->part->bytes - t->moved);
    if (!n) return TD_AGAIN;
    t->moved += n;
    if (t->moved == t->part->bytes) p->reading = 0;
    ring(p->bell);
    return TD_OK;
}

static td_status transfer_out(transfer *t)
{
    peer *p = t->peer;
    if (atomic_load_explicit(&p->out->granted, memory_order_acquire) != t->pass.ticket) return TD_AGAIN;
    size_t n = td_coll_pipe_write(p->out, (const char *)t->part->from + t->moved, t->part->bytes - t->moved);
    if (!n) return TD_AGAIN;
    t->moved += n;
    ring(p->bell);
    return TD_OK;
}

/* Everything that moves, of all groups, until nothing does: then only a peer can change that, and rings. */
static td_status transfers_look(world *w)
{
    for (bool moved = true; moved;) {
        moved = false;
        for (transfer **at = &w->active; *at;) {
            transfer *t = *at;
            int64_t before = t->started ? td_spin_us() : 0;
            td_status s = t->part->to ? transfer_in(w, t) : transfer_out(t);
            if (t->started && s == TD_OK) t->started->started_us += td_spin_us() - before;
            if (s < 0) return s;
            if (s == TD_OK) moved = true;
            t->part->done = t->moved == t->part->bytes;
            if (t->part->done)
                *at = t->next;
            else
                at = &t->next;
        }
    }
    return TD_OK;
}

/* ---- exchanges ---- */

static void flight_grow(flight *f)
{
    f->room = f->room ? f->room * 2 : 16;
    f->req = td_xrealloc(f->req, (size_t)f->room * sizeof *f->req);
    f->status = td_xrealloc(f->status, (size_t)f->room * sizeof *f->status);
    f->bytes = td_xrealloc(f->bytes, (size_t)f->room * sizeof *f->bytes);
}

/* The bytes of a part through MPI, behind whatever went before with this tag. */
static td_status bytes_post(end *e, flight *f, int tag, const td_coll_part *p)
{
    for (size_t at = 0; at < p->bytes; at += cut_bytes) {
        if (f->n == f->room) flight_grow(f);
        int n = (int)TD_MIN(p->bytes - at, cut_bytes);
        MPI_Request *req = &f->req[f->n];
        int code = p->to ? MPI_Irecv((char *)p->to + at, n, MPI_BYTE, p->peer, tag, e->comm, req)
                         : MPI_Isend((const char *)p->from + at, n, MPI_BYTE, p->peer, tag, e->comm, req);
        TD_TRY(mpi_check(e->w, p->to ? "MPI_Irecv" : "MPI_Isend", code));
        f->bytes[f->n++] = n;
    }
    return TD_OK;
}

/* A started send of a size that its receiver expects a pass for. */
static td_status direct_post(end *e, flight *f, const td_coll_lane *l, const td_coll_part *p)
{
    f->direct = (pass){DIRECT_MAGIC, 0, p->bytes};
    int code = MPI_Isend(&f->direct, sizeof f->direct, MPI_BYTE, p->peer, (int)l->channel, e->comm, &f->req[f->n]);
    TD_TRY(mpi_check(e->w, "MPI_Isend", code));
    f->bytes[f->n++] = sizeof f->direct;
    return bytes_post(e, f, DIRECT_TAG, p);
}

static td_status part_post(end *e, flight *f, const td_coll_lane *l, td_coll_part *p)
{
    bool started = l != &e->base.lane[0] && l->channel == TD_COLL_CHANNEL_P2P;
    if (f->n == f->room) flight_grow(f);
    if (!takes_pipe(e->peers[p->peer], p->bytes)) return bytes_post(e, f, (int)l->channel, p);
    return started ? direct_post(e, f, l, p) : transfer_post(e, f, l, p);
}

static td_status end_start(td_coll *c, int lane)
{
    end *e = (end *)c;
    td_coll_lane *l = &c->lane[lane];
    flight *f = &e->flights[lane];
    f->n = f->n_transfers = 0;
    for (int i = 0; i < l->n_recv; i++) TD_TRY(part_post(e, f, l, &l->recv[i]));
    f->n_recv = f->n;
    for (int i = 0; i < l->n_send; i++) {
        TD_TRY(part_post(e, f, l, &l->send[i]));
        ring(e->peers[l->send[i].peer]->bell);
    }
    return TD_OK;
}

static td_status too_short(end *e, int got, int expected, int source)
{
    char why[120];
    snprintf(why, sizeof why, "ranks differ: %d bytes from rank %d of %d, %d expected", got, source,
             e->base.size, expected);
    return world_break(e->w, TD_EPROTO, why);
}

/* OK: all arrived, with the sizes that were expected. */
static td_status flight_look(end *e, flight *f)
{
    int done = 1;
    if (e->w->active) TD_TRY(transfers_look(e->w));
    for (int i = 0; i < f->n_transfers; i++)
        if (!f->transfers[i].part->done) return TD_AGAIN;
    int code = MPI_Testall(f->n, f->req, &done, f->status);
    if (code == MPI_ERR_IN_STATUS)
        for (int i = 0; i < f->n; i++)
            if (f->status[i].MPI_ERROR != MPI_ERR_PENDING)
                TD_TRY(mpi_check(e->w, "MPI", f->status[i].MPI_ERROR));
    TD_TRY(mpi_check(e->w, "MPI_Testall", code));
    if (!done) return TD_AGAIN;
    for (int i = 0; i < f->n_recv; i++) {
        int got = 0;
        MPI_Get_count(&f->status[i], MPI_BYTE, &got);
        if (got != f->bytes[i]) return too_short(e, got, f->bytes[i], f->status[i].MPI_SOURCE);
    }
    return TD_OK;
}

static td_status too_late(end *e)
{
    char why[120];
    snprintf(why, sizeof why, "a peer of rank %d of %d did not come within %lld us", e->base.rank,
             e->base.size, (long long)e->base.timeout_us);
    return world_break(e->w, TD_ETIME, why);
}

/* 16 looks take 1 us when nothing happens. When they take long they moved bytes: that is no idling. */
static td_status spin(end *e, flight *f)
{
    int64_t idle_from = td_spin_us(), before, now = idle_from;
    do {
        for (int i = 0; i < LOOKS_PER_CLOCK; i++) {
            td_status s = flight_look(e, f);
            if (s != TD_AGAIN) return s;
        }
        before = now;
        now = td_spin_us();
        if (now - before > TD_COLL_WORK_US) idle_from = now;
    } while (now - idle_from < e->w->spin_us);
    return TD_AGAIN;
}

static td_status sleep_looking(end *e, flight *f, int64_t start)
{
    int64_t limit = e->base.timeout_us, nap_us = e->all_local ? NAP_LOCAL_US : NAP_MIN_US;
    for (;;) {
        int64_t left = limit ? start + limit - td_spin_us() : nap_us;
        if (left <= 0) return too_late(e);
        atomic_exchange(&e->w->self->asleep, 1);
        td_status s = flight_look(e, f);
        if (s == TD_AGAIN) nap(e->w, TD_MIN(left, nap_us));
        bool rung = !atomic_exchange(&e->w->self->asleep, 0);
        if (s == TD_AGAIN) s = rung && e->w->spin_us ? spin(e, f) : flight_look(e, f);
        if (s != TD_AGAIN) return s;
        if (!e->all_local) nap_us = rung ? NAP_MIN_US : TD_MIN(nap_us * 2, NAP_MAX_US);
    }
}

/* What is under way in any lane goes on as far as it can. */
static td_status end_poke(td_coll *c)
{
    end *e = (end *)c;
    int any = 0;
    TD_TRY(health(c));
    if (e->w->active) TD_TRY(transfers_look(e->w));
    return mpi_check(e->w, "MPI_Iprobe", MPI_Iprobe(MPI_ANY_SOURCE, MPI_ANY_TAG, e->comm, &any, MPI_STATUS_IGNORE));
}

static td_status end_wait(td_coll *c, int lane)
{
    end *e = (end *)c;
    flight *f = &e->flights[lane];
    td_status s = health(c);
    if (s == TD_OK) s = flight_look(e, f);
    if (s == TD_AGAIN) {
        int64_t start = td_spin_us();
        if (e->w->spin_us) s = spin(e, f);
        if (s == TD_AGAIN) s = sleep_looking(e, f, start);
    }
    if (s == TD_OK) ring_peers(e, &c->lane[lane]);
    return s;
}

/* ---- opening, splitting, closing ---- */

static td_status end_split(td_coll *c, int color, int key, td_coll **out);
static void end_close(td_coll *c);

static const td_coll_ops mpi_ops = {
    .name = "mpi",
    .start = end_start,
    .wait = end_wait,
    .health = health,
    .copy = td_coll_copy_host,
    .split = end_split,
    .close = end_close,
    .abort = end_abort,
    .poke = end_poke,
};

/* The group's ranks, by translating them to the world's. */
static void find_peers(end *e)
{
    MPI_Group mine, all;
    int n = e->base.size, *ranks = td_xalloc((size_t)n * 2 * sizeof *ranks), *in_world = ranks + n;
    for (int i = 0; i < n; i++) ranks[i] = i;
    MPI_Comm_group(e->comm, &mine);
    MPI_Comm_group(MPI_COMM_WORLD, &all);
    MPI_Group_translate_ranks(mine, n, ranks, all, in_world);
    e->peers = td_xalloc((size_t)n * sizeof *e->peers);
    e->all_local = true;
    for (int i = 0; i < n; i++) {
        e->peers[i] = &e->w->peers[in_world[i]];
        if (!e->peers[i]->bell && i != e->base.rank) e->all_local = false;
    }
    MPI_Group_free(&mine);
    MPI_Group_free(&all);
    free(ranks);
}

static td_coll *end_open(world *w, MPI_Comm comm)
{
    int rank = 0, size = 1;
    MPI_Comm_set_errhandler(comm, MPI_ERRORS_RETURN);
    MPI_Comm_rank(comm, &rank);
    MPI_Comm_size(comm, &size);
    end *e = td_xalloc(sizeof *e);
    td_coll_init(&e->base, &mpi_ops, rank, size);
    e->w = w;
    e->comm = comm;
    w->users++;
    find_peers(e);
    for (int i = 0; i < TD_COLL_LANES; i++)
        e->flights[i].transfers = td_xalloc((size_t)size * 2 * sizeof *e->flights[i].transfers);
    return &e->base;
}

/* MPI_Comm_split spins until all have come: so they come first. */
static td_status end_split(td_coll *c, int color, int key, td_coll **out)
{
    end *e = (end *)c;
    MPI_Comm comm = MPI_COMM_NULL;
    TD_TRY(td_coll_barrier(c));
    int code = MPI_Comm_split(e->comm, color < 0 ? MPI_UNDEFINED : color, key, &comm);
    TD_TRY(mpi_check(e->w, "MPI_Comm_split", code));
    *out = comm == MPI_COMM_NULL ? NULL : end_open(e->w, comm);
    return TD_OK;
}

static void world_close(world *w)
{
    if (w->broken == TD_OK) {
        if (w->win != MPI_WIN_NULL) MPI_Win_free(&w->win);
        MPI_Finalize();
    } else {
        TD_WARN("MPI is left as it is: %s", w->why);
    }
    free(w->own);
    free(w->peers);
    free(w);
}

static void end_close(td_coll *c)
{
    end *e = (end *)c;
    bool busy = false;
    for (int i = 0; i < TD_COLL_LANES; i++) {
        busy = busy || (c->lane[i].busy && c->lane[i].n_send + c->lane[i].n_recv);
        if (e->w->broken) continue; /* MPI may still write into the statuses' requests */
        free(e->flights[i].req);
        free(e->flights[i].status);
        free(e->flights[i].bytes);
        free(e->flights[i].transfers);
    }
    if (busy && e->w->broken == TD_OK)
        world_break(e->w, TD_EGONE, "a group was closed before what was started in it was waited for");
    if (e->w->broken == TD_OK) MPI_Comm_free(&e->comm);
    if (--e->w->users == 0) world_close(e->w);
    td_coll_deinit(c);
    free(e->peers);
    free(e);
}

/* What a rank shares with its host: its bell, then a pipe from each rank of the host. */
static bell *bell_in(void *base)
{
    return (bell *)(((uintptr_t)base + 4095) / 4096 * 4096);
}

static td_coll_pipe *pipe_in(void *base, int from)
{
    return (td_coll_pipe *)((char *)bell_in(base) + 4096) + from;
}

static void no_shared_memory(world *w)
{
    w->win = MPI_WIN_NULL;
    w->self = w->own = aligned_alloc(sizeof(bell), sizeof(bell));
    TD_CHECK(w->self != NULL);
    atomic_store(&w->self->asleep, 0);
    TD_WARN("ranks of this host share no memory: waits wake up by themselves");
}

/* Each rank clears its own part; then all meet. */
static void share_memory(world *w, MPI_Comm host)
{
    int n = 0, me = 0;
    MPI_Comm_size(host, &n);
    MPI_Comm_rank(host, &me);
    bool pipes = n > 1 && n <= PIPE_RANKS;
    size_t bytes = 2 * 4096 + (pipes ? (size_t)n * sizeof(td_coll_pipe) : 0);
    void *mine = NULL;
    if (MPI_Win_allocate_shared((MPI_Aint)bytes, 1, MPI_INFO_NULL, host, &mine, &w->win) != MPI_SUCCESS) {
        no_shared_memory(w);
        return;
    }
    MPI_Group of_host, all;
    MPI_Comm_group(host, &of_host);
    MPI_Comm_group(MPI_COMM_WORLD, &all);
    for (int i = 0; i < n; i++) {
        MPI_Aint size = 0;
        int unit = 0, in_world = 0;
        void *base = NULL;
        MPI_Win_shared_query(w->win, i, &size, &unit, &base);
        MPI_Group_translate_ranks(of_host, 1, &i, all, &in_world);
        w->peers[in_world].bell = bell_in(base);
        w->peers[in_world].in = pipes ? pipe_in(mine, i) : NULL;
        w->peers[in_world].out = pipes ? pipe_in(base, me) : NULL;
    }
    w->self = bell_in(mine);
    atomic_store(&w->self->asleep, 0);
    for (int i = 0; pipes && i < n; i++) memset(pipe_in(mine, i), 0, offsetof(td_coll_pipe, ring));
    MPI_Group_free(&of_host);
    MPI_Group_free(&all);
    MPI_Barrier(host);
}

/* Cores that the ranks of this host may use together: mpirun may have bound each to its own. */
static int cores_of(MPI_Comm host)
{
    cpu_set_t mine, all;
    CPU_ZERO(&mine);
    if (sched_getaffinity(0, sizeof mine, &mine) != 0) CPU_SET(0, &mine);
    MPI_Allreduce(&mine, &all, (int)sizeof mine, MPI_BYTE, MPI_BOR, host);
    return CPU_COUNT(&all);
}

static td_status mpi_init(int *argc, char ***argv)
{
    int already = 0, level = 0, size = 0;
    MPI_Initialized(&already);
    if (already) return td_refuse(TD_EBADREQ, "MPI is already open: once per process");
    if (MPI_Init_thread(argc, argv, MPI_THREAD_FUNNELED, &level) != MPI_SUCCESS)
        return td_fail(TD_EIO, "MPI_Init_thread failed");
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    if (level >= MPI_THREAD_FUNNELED && size <= TD_COLL_MAX_RANKS) return TD_OK;
    MPI_Finalize();
    return td_fail(TD_ENOSUP, "MPI with %d ranks (at most %d) and thread level %d (at least %d)", size,
                   TD_COLL_MAX_RANKS, level, MPI_THREAD_FUNNELED);
}

/* MPI's own first messages wait for ever when a rank cannot be reached: a thread beside them does not. */
typedef struct guard {
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t cond;
    bool started, done;
    int rank, size;
} guard;

static void *guard_main(void *arg)
{
    guard *g = arg;
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    until.tv_sec += TD_COLL_MEET_MS / 1000;
    pthread_mutex_lock(&g->lock);
    while (!g->done && pthread_cond_timedwait(&g->cond, &g->lock, &until) != ETIMEDOUT) continue;
    if (!g->done) {
        TD_ERROR("rank %d of %d: MPI has not reached the other ranks within %d s: all ranks end", g->rank,
                 g->size, TD_COLL_MEET_MS / 1000);
        _exit(1);
    }
    pthread_mutex_unlock(&g->lock);
    return NULL;
}

static void guard_open(guard *g)
{
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&g->lock, NULL);
    pthread_cond_init(&g->cond, &monotonic);
    pthread_condattr_destroy(&monotonic);
    g->started = pthread_create(&g->thread, NULL, guard_main, g) == 0;
}

static void guard_close(guard *g)
{
    pthread_mutex_lock(&g->lock);
    g->done = true;
    pthread_cond_signal(&g->cond);
    pthread_mutex_unlock(&g->lock);
    if (g->started) pthread_join(g->thread, NULL);
    pthread_cond_destroy(&g->cond);
    pthread_mutex_destroy(&g->lock);
}

static td_status make_comms(MPI_Comm *host, MPI_Comm *comm)
{
    if (MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, host) != MPI_SUCCESS ||
        MPI_Comm_dup(MPI_COMM_WORLD, comm) != MPI_SUCCESS)
        return td_fail(TD_EIO, "MPI communicators could not be made");
    return TD_OK;
}

td_status td_coll_mpi_open(int *argc, char ***argv, td_coll **out)
{
    TD_TRY(mpi_init(argc, argv));
    MPI_Comm host = MPI_COMM_NULL, comm = MPI_COMM_NULL;
    int size = 0, rank = 0, on_host = 0;
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    MPI_Comm_rank(MPI_COMM_WORLD, &rank);
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    world *w = td_xalloc(sizeof *w);
    w->size = size;
    w->peers = td_xalloc((size_t)size * sizeof *w->peers);
    guard g = {.rank = rank, .size = size};
    guard_open(&g);
    td_status s = make_comms(&host, &comm);
    if (s == TD_OK) {
        MPI_Comm_size(host, &on_host);
        w->spin_us = on_host <= cores_of(host) ? TD_COLL_SPIN_US : 0;
        share_memory(w, host);
        MPI_Comm_free(&host);
    }
    guard_close(&g);
    if (s < 0) {
        free(w->peers);
        free(w);
        return s;
    }
    *out = end_open(w, comm);
    return TD_OK;
}
