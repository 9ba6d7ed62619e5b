// SPDX-License-Identifier: Apache-2.0
/* worker/coll/coll_mpi.c - ranks as processes, over Open MPI; the only file that knows mpi.h.
 *
 * A part is one or more MPI_Isend or MPI_Irecv (cut at 1 GiB: counts are int), its tag the channel. Nothing
 * else of MPI moves data: its collectives may not be waited for without burning a core, and wake nobody.
 *
 * Waiting. Open MPI only polls; mpi_yield_when_idle still keeps a core at 100 %. So a wait tests for 50 us (not
 * at all when the host has fewer cores than ranks), then blocks on a futex in memory that the ranks of a host
 * share, its bell. Who has sent something to a rank of its host, or taken something from it, rings if that rank
 * sleeps. What MPI does inside (a rendezvous that needs another round) rings no bell, so a sleep ends by itself
 * after 1 ms; in groups with members on other hosts, who cannot ring, after 50 us, doubling to 500 us.
 * Costs measured beside MPI's own ping-pong: tests/bench/coll.py.
 *
 * bell: 0 awake, 1 asleep. Sleeper and ringer both change it by read-modify-write, so one of them sees the
 * other: either the ringer sees 1, or the sleeper's last test follows the ringer's send.
 *
 * After an error nothing more of MPI is used, not even MPI_Finalize: the process is to end, and mpirun ends the
 * others when one leaves like that. */
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "worker/coll/coll_int.h"
#include <limits.h>
#include <linux/futex.h>
#include <mpi.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { LOOKS_PER_CLOCK = 16, NAP_LOCAL_US = 1000, NAP_MIN_US = 50, NAP_MAX_US = 500 };
static const size_t cut_bytes = (size_t)1 << 30;

typedef struct bell {
    _Alignas(64) _Atomic uint32_t asleep; /* futex, shared by processes */
} bell;

typedef struct world {
    int users, size, spin_us;
    td_status broken;
    char why[256];
    MPI_Win win; /* MPI_WIN_NULL: no bells */
    bell *self, **bells; /* [size]; NULL: on another host */
    bell *own;           /* of a host without shared memory: nobody rings it */
} world;

typedef struct flight { /* the MPI requests of a lane */
    int n, room, n_recv; /* receives first */
    MPI_Request *req;
    MPI_Status *status;
    int *bytes;
} flight;

typedef struct end {
    td_coll base;
    world *w;
    MPI_Comm comm;
    bell **bells; /* [size] of the group's ranks */
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
    for (int i = 0; i < l->n_send; i++) ring(e->bells[l->send[i].peer]);
    for (int i = 0; i < l->n_recv; i++) ring(e->bells[l->recv[i].peer]);
}

static void nap(world *w, int64_t us)
{
    struct timespec t = {us / 1000000, us % 1000000 * 1000};
    syscall(SYS_futex, &w->self->asleep, FUTEX_WAIT, 1, &t, NULL, 0);
}

/* ---- exchanges ---- */

static void flight_grow(flight *f)
{
    f->room = f->room ? f->room * 2 : 16;
    f->req = td_xrealloc(f->req, (size_t)f->room * sizeof *f->req);
    f->status = td_xrealloc(f->status, (size_t)f->room * sizeof *f->status);
    f->bytes = td_xrealloc(f->bytes, (size_t)f->room * sizeof *f->bytes);
}

static td_status part_post(end *e, flight *f, const td_coll_lane *l, const td_coll_part *p)
{
    for (size_t at = 0; at < p->bytes; at += cut_bytes) {
        if (f->n == f->room) flight_grow(f);
        int n = (int)TD_MIN(p->bytes - at, cut_bytes), tag = (int)l->channel;
        MPI_Request *req = &f->req[f->n];
        int code = p->to ? MPI_Irecv((char *)p->to + at, n, MPI_BYTE, p->peer, tag, e->comm, req)
                         : MPI_Isend((const char *)p->from + at, n, MPI_BYTE, p->peer, tag, e->comm, req);
        TD_TRY(mpi_check(e->w, p->to ? "MPI_Irecv" : "MPI_Isend", code));
        f->bytes[f->n++] = n;
    }
    return TD_OK;
}

static td_status end_start(td_coll *c, int lane)
{
    end *e = (end *)c;
    td_coll_lane *l = &c->lane[lane];
    flight *f = &e->flights[lane];
    f->n = 0;
    for (int i = 0; i < l->n_recv; i++) TD_TRY(part_post(e, f, l, &l->recv[i]));
    f->n_recv = f->n;
    for (int i = 0; i < l->n_send; i++) {
        TD_TRY(part_post(e, f, l, &l->send[i]));
        ring(e->bells[l->send[i].peer]);
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
    int done = 0;
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
    snprintf(why, sizeof why, "a peer of rank %d of %d did not come within %lld us", e->base.rank, e->base.size,
             (long long)e->base.timeout_us);
    return world_break(e->w, TD_ETIME, why);
}

static td_status spin(end *e, flight *f, int64_t from)
{
    do {
        for (int i = 0; i < LOOKS_PER_CLOCK; i++) {
            td_status s = flight_look(e, f);
            if (s != TD_AGAIN) return s;
        }
    } while (td_spin_us() - from < e->w->spin_us);
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
        if (s == TD_AGAIN) s = rung && e->w->spin_us ? spin(e, f, td_spin_us()) : flight_look(e, f);
        if (s != TD_AGAIN) return s;
        if (!e->all_local) nap_us = rung ? NAP_MIN_US : TD_MIN(nap_us * 2, NAP_MAX_US);
    }
}

static td_status end_wait(td_coll *c, int lane)
{
    end *e = (end *)c;
    flight *f = &e->flights[lane];
    td_status s = health(c);
    if (s == TD_OK) s = flight_look(e, f);
    if (s == TD_AGAIN) {
        int64_t start = td_spin_us();
        if (e->w->spin_us) s = spin(e, f, start);
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
};

/* bells of the group's ranks, by translating them to the world's. */
static void find_bells(end *e)
{
    MPI_Group mine, all;
    int n = e->base.size, *ranks = td_xalloc((size_t)n * 2 * sizeof *ranks), *in_world = ranks + n;
    for (int i = 0; i < n; i++) ranks[i] = i;
    MPI_Comm_group(e->comm, &mine);
    MPI_Comm_group(MPI_COMM_WORLD, &all);
    MPI_Group_translate_ranks(mine, n, ranks, all, in_world);
    e->bells = td_xalloc((size_t)n * sizeof *e->bells);
    e->all_local = true;
    for (int i = 0; i < n; i++) {
        e->bells[i] = e->w->bells[in_world[i]];
        if (!e->bells[i] && i != e->base.rank) e->all_local = false;
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
    find_bells(e);
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
    free(w->bells);
    free(w);
}

static void end_close(td_coll *c)
{
    end *e = (end *)c;
    bool busy = false;
    for (int i = 0; i < TD_COLL_LANES; i++) {
        busy = busy || (c->lane[i].busy && e->flights[i].n);
        if (e->w->broken) continue; /* MPI may still write into the statuses' requests */
        free(e->flights[i].req);
        free(e->flights[i].status);
        free(e->flights[i].bytes);
    }
    if (busy && e->w->broken == TD_OK)
        world_break(e->w, TD_EGONE, "a group was closed before what was started in it was waited for");
    if (e->w->broken == TD_OK) MPI_Comm_free(&e->comm);
    if (--e->w->users == 0) world_close(e->w);
    td_coll_deinit(c);
    free(e->bells);
    free(e);
}

/* The window's memory begins as the kernel gave it; each rank clears its own bell, then all meet. */
static void bells_open(world *w, MPI_Comm host)
{
    bell *mine = NULL;
    w->win = MPI_WIN_NULL;
    int code = MPI_Win_allocate_shared(sizeof(bell) * 2, 1, MPI_INFO_NULL, host, &mine, &w->win);
    if (code != MPI_SUCCESS) {
        w->win = MPI_WIN_NULL;
        w->self = w->own = aligned_alloc(sizeof(bell), sizeof(bell));
        TD_CHECK(w->self != NULL);
        atomic_store(&w->self->asleep, 0);
        TD_WARN("ranks of this host share no memory: waits wake up by themselves");
        return;
    }
    int n = 0;
    MPI_Comm_size(host, &n);
    MPI_Group of_host, all;
    MPI_Comm_group(host, &of_host);
    MPI_Comm_group(MPI_COMM_WORLD, &all);
    for (int i = 0; i < n; i++) {
        MPI_Aint bytes = 0;
        int unit = 0, in_world = 0;
        char *base = NULL;
        MPI_Win_shared_query(w->win, i, &bytes, &unit, &base);
        MPI_Group_translate_ranks(of_host, 1, &i, all, &in_world);
        w->bells[in_world] = (bell *)(((uintptr_t)base + 63) / 64 * 64);
    }
    int me = 0;
    MPI_Comm_rank(MPI_COMM_WORLD, &me);
    w->self = w->bells[me];
    atomic_store(&w->self->asleep, 0);
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

td_status td_coll_mpi_open(int *argc, char ***argv, td_coll **out)
{
    TD_TRY(mpi_init(argc, argv));
    MPI_Comm host = MPI_COMM_NULL, comm = MPI_COMM_NULL;
    int size = 0, on_host = 0;
    MPI_Comm_size(MPI_COMM_WORLD, &size);
    MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
    world *w = td_xalloc(sizeof *w);
    w->size = size;
    w->bells = td_xalloc((size_t)size * sizeof *w->bells);
    if (MPI_Comm_split_type(MPI_COMM_WORLD, MPI_COMM_TYPE_SHARED, 0, MPI_INFO_NULL, &host) != MPI_SUCCESS ||
        MPI_Comm_dup(MPI_COMM_WORLD, &comm) != MPI_SUCCESS) {
        free(w->bells);
        free(w);
        return td_fail(TD_EIO, "MPI communicators could not be made");
    }
    MPI_Comm_size(host, &on_host);
    w->spin_us = on_host <= cores_of(host) ? TD_COLL_SPIN_US : 0;
    bells_open(w, host);
    MPI_Comm_free(&host);
    *out = end_open(w, comm);
    return TD_OK;
}
