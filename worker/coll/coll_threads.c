// SPDX-License-Identifier: Apache-2.0
/* worker/coll/coll_threads.c - ranks as threads of one process.
 *
 * Every ordered pair of ranks has, for each channel, a ring of posts that only these two touch. A sender
 * posts either the bytes themselves (up to INLINE: it need not wait then) or the address of its buffer; the
 * receiver copies straight from there and empties the post, for which the sender waits. One word per post
 * carries it:
 *
 *     EMPTY -> DATA -> EMPTY                     bytes in the post
 *     EMPTY -> POINTER -> READING -> EMPTY       address in the post; READING keeps the buffer from its owner
 *     EMPTY -> POINTER -> EMPTY                  withdrawn by a sender whose group broke
 *
 * A ring never overflows, so start never waits: bytes are put into a post only while at most two posts of the
 * ring are taken, and of addresses there is one per exchange in flight (coll_int.h).
 *
 * Waiting: look at the posts for 50 us (not at all when there are more ranks than cores), then say so in
 * `sleeping` and block on it. Whoever changes a post looks at `sleeping` after. Both sides use sequentially
 * consistent accesses to the two words, so one of them sees the other. While it waits, a rank also serves its
 * other started exchanges in the group.
 *
 * All groups that come from one td_coll_threads_open are a family: it breaks as a whole, as a worker does. */
#include "common/check.h"
#include "common/clock.h"
#include "worker/coll/coll_int.h"
#include <errno.h>
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { EMPTY, DATA, POINTER, READING };
enum { POST_BYTES = 2048, INLINE = POST_BYTES - 16, DEPTH = 4, DEPTH_P2P = 8, LOOKS_PER_CLOCK = 32 };

typedef struct post {
    _Alignas(64) _Atomic unsigned state;
    unsigned kind;
    size_t bytes;
    union {
        const void *from;
        char data[INLINE]; /* the first 48 bytes share the line of the state */
    };
} post;
_Static_assert(sizeof(post) == POST_BYTES, "a post is a whole number of lines");
_Static_assert(DEPTH >= 3 + 1 && DEPTH_P2P >= 3 + TD_COLL_LANES, "rings hold what may be in flight");

enum { PAIR_POSTS = TD_COLL_LANES * DEPTH + DEPTH_P2P };

typedef struct member {
    _Alignas(64) _Atomic uint32_t sleeping; /* futex */
} member;

typedef struct family {
    _Atomic int users;
    int size, spin_us;
    pthread_mutex_t lock; /* of why, until broken is set */
    _Atomic int broken;   /* a td_status */
    char why[256];
    member members[];
} family;

typedef struct group {
    _Atomic int users;
    int size;
    family *fam;
    post *posts; /* [from][to][PAIR_POSTS] */
    size_t posts_bytes;
    int *world;         /* [size] ranks in the family */
    _Atomic bool *gone; /* [size] */
} group;

typedef struct end {
    td_coll base;
    group *g;
    member *self;
    unsigned *next_send, *next_recv; /* [size][channels]: place in the ring */
} end;

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX() atomic_signal_fence(memory_order_seq_cst)
#endif

/* ---- sleeping and waking ---- */

static void wake(member *m)
{
    if (atomic_load(&m->sleeping) && atomic_exchange(&m->sleeping, 0))
        syscall(SYS_futex, &m->sleeping, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

static void sleep_until_woken(member *m, int64_t timeout_us)
{
    struct timespec t = {timeout_us / 1000000, timeout_us % 1000000 * 1000};
    syscall(SYS_futex, &m->sleeping, FUTEX_WAIT_PRIVATE, 1, timeout_us >= 0 ? &t : NULL, NULL, 0);
    atomic_store(&m->sleeping, 0);
}

static member *member_of(const group *g, int rank)
{
    return &g->fam->members[g->world[rank]];
}

/* ---- breaking ---- */

static td_status family_health(family *f)
{
    int s = atomic_load_explicit(&f->broken, memory_order_acquire);
    return s == TD_OK ? TD_OK : td_refuse((td_status)s, "the group is broken: %s", f->why);
}

/* The first cause stays; everybody who sleeps is told. */
static td_status family_break(family *f, td_status s, const char *why)
{
    pthread_mutex_lock(&f->lock);
    bool first = atomic_load(&f->broken) == TD_OK;
    if (first) {
        snprintf(f->why, sizeof f->why, "%s", why);
        atomic_store(&f->broken, (int)s);
    }
    pthread_mutex_unlock(&f->lock);
    if (!first) return family_health(f);
    for (int i = 0; i < f->size; i++) wake(&f->members[i]);
    return td_fail(s, "%s", why);
}

static td_status health(td_coll *c)
{
    return family_health(((end *)c)->g->fam);
}

static void end_abort(td_coll *c, const char *why)
{
    char text[200];
    snprintf(text, sizeof text, "aborted by rank %d: %s", c->rank, why);
    family_break(((end *)c)->g->fam, TD_EGONE, text);
}

/* ---- posts ---- */

static post *ring_at(const group *g, int from, int to, unsigned channel, unsigned place)
{
    unsigned depth = channel == TD_COLL_CHANNEL_P2P ? DEPTH_P2P : DEPTH;
    size_t pair = (size_t)from * (size_t)g->size + (size_t)to;
    return &g->posts[pair * PAIR_POSTS + channel * DEPTH + place % depth];
}

static void post_part(end *e, const td_coll_lane *l, td_coll_part *p)
{
    unsigned *place = &e->next_send[p->peer * TD_COLL_CHANNELS + (int)l->channel];
    post *at = ring_at(e->g, e->base.rank, p->peer, l->channel, *place);
    post *third = ring_at(e->g, e->base.rank, p->peer, l->channel, *place - 3);
    TD_ASSERT(atomic_load(&at->state) == EMPTY);
    at->kind = l->kind;
    at->bytes = p->bytes;
    bool data = p->bytes <= INLINE && atomic_load_explicit(&third->state, memory_order_acquire) == EMPTY;
    if (data) {
        memcpy(at->data, p->from, p->bytes);
        p->done = true;
    } else {
        at->from = p->from;
        p->own = at;
    }
    *place += 1;
    atomic_store(&at->state, data ? DATA : POINTER);
    wake(member_of(e->g, p->peer));
}

static td_status mismatch(end *e, const td_coll_lane *l, const td_coll_part *p, const post *at)
{
    char text[200];
    snprintf(
        text, sizeof text,
        "ranks differ: %d of %d calls operation %#x with %zu bytes for rank %d, which expects %#x with %zu",
        p->peer, e->base.size, at->kind, at->bytes, e->base.rank, l->kind, p->bytes);
    return family_break(e->g->fam, TD_EPROTO, text);
}

static td_status peer_left(end *e, const td_coll_part *p)
{
    char text[80];
    snprintf(text, sizeof text, "rank %d of %d left the group", p->peer, e->base.size);
    return family_break(e->g->fam, TD_EGONE, text);
}

static bool is_gone(const group *g, int rank)
{
    return atomic_load_explicit(&g->gone[rank], memory_order_acquire);
}

/* AGAIN while the peer has not posted. */
static td_status take_part(end *e, const td_coll_lane *l, td_coll_part *p)
{
    unsigned *place = &e->next_recv[p->peer * TD_COLL_CHANNELS + (int)l->channel];
    post *at = ring_at(e->g, p->peer, e->base.rank, l->channel, *place);
    bool gone = is_gone(e->g, p->peer); /* before the look at the post: it may have posted, then left */
    unsigned s = atomic_load(&at->state);
    if (s == EMPTY) return gone ? peer_left(e, p) : TD_AGAIN;
    if (s == POINTER && !atomic_compare_exchange_strong(&at->state, &s, READING))
        return TD_AGAIN; /* withdrawn: the next look says why */
    if (at->kind != l->kind || at->bytes != p->bytes) {
        td_status bad = mismatch(e, l, p, at);
        if (s == POINTER) atomic_store(&at->state, EMPTY);
        return bad;
    }
    bool timed = l != &e->base.lane[0] && p->bytes >= TD_COLL_TIMED;
    int64_t before = timed ? td_spin_us() : 0;
    memcpy(p->to, s == DATA ? at->data : at->from, p->bytes);
    if (timed) e->base.started_us += td_spin_us() - before;
    *place += 1;
    p->done = true;
    atomic_store(&at->state, EMPTY);
    if (s == POINTER) wake(member_of(e->g, p->peer));
    return TD_OK;
}

static td_status posted_part(end *e, td_coll_part *p)
{
    post *at = p->own;
    bool gone = is_gone(e->g, p->peer);
    if (atomic_load(&at->state) != EMPTY) return gone ? peer_left(e, p) : TD_AGAIN;
    p->done = true;
    return TD_OK;
}

/* A look at everything the lane still waits for: OK when that is nothing, AGAIN, or why it never will be. */
static td_status lane_look(end *e, td_coll_lane *l)
{
    td_status all = TD_OK;
    for (int i = 0; i < l->n_recv; i++) {
        td_status s = l->recv[i].done ? TD_OK : take_part(e, l, &l->recv[i]);
        if (s < 0) return s;
        if (s == TD_AGAIN) all = s;
    }
    for (int i = 0; i < l->n_send; i++) {
        td_status s = l->send[i].done ? TD_OK : posted_part(e, &l->send[i]);
        if (s < 0) return s;
        if (s == TD_AGAIN) all = s;
    }
    return all;
}

static td_status look(end *e, int lane)
{
    TD_TRY(health(&e->base));
    for (int i = 1; i < TD_COLL_LANES; i++)
        if (i != lane && e->base.lane[i].busy) TD_TRY(lane_look(e, &e->base.lane[i]));
    return lane_look(e, &e->base.lane[lane]);
}

/* Take the lane's addresses back, so that the caller may reuse its buffers. A peer that reads just now is
 * waited for: that is one copy. */
static void lane_withdraw(td_coll_lane *l)
{
    for (int i = 0; i < l->n_send; i++) {
        if (l->send[i].done) continue;
        post *at = l->send[i].own;
        unsigned s = POINTER;
        while (!atomic_compare_exchange_strong(&at->state, &s, EMPTY) && s != EMPTY) {
            s = POINTER;
            sched_yield();
        }
        l->send[i].done = true;
    }
}

static td_status end_start(td_coll *c, int lane)
{
    td_coll_lane *l = &c->lane[lane];
    for (int i = 0; i < l->n_send; i++) post_part((end *)c, l, &l->send[i]);
    return TD_OK;
}

static td_status too_late(end *e, const td_coll_lane *l)
{
    int peer = -1;
    for (int i = 0; i < l->n_send && peer < 0; i++)
        if (!l->send[i].done) peer = l->send[i].peer;
    for (int i = 0; i < l->n_recv && peer < 0; i++)
        if (!l->recv[i].done) peer = l->recv[i].peer;
    char text[120];
    snprintf(text, sizeof text, "rank %d of %d did not come within %lld us", peer, e->base.size,
             (long long)e->base.timeout_us);
    return family_break(e->g->fam, TD_ETIME, text);
}

/* 32 looks take 1 us when nothing happens. When they take long they copied: that is no idling. */
static td_status spin(end *e, int lane)
{
    int64_t idle_from = td_spin_us(), before, now = idle_from;
    while (now - idle_from < e->g->fam->spin_us) {
        for (int i = 0; i < LOOKS_PER_CLOCK; i++) {
            RELAX();
            td_status s = look(e, lane);
            if (s != TD_AGAIN) return s;
        }
        before = now;
        now = td_spin_us();
        if (now - before > TD_COLL_WORK_US) idle_from = now;
    }
    return TD_AGAIN;
}

/* AGAIN never leaves here. */
static td_status wait_looking(end *e, int lane)
{
    td_status s = look(e, lane);
    if (s != TD_AGAIN) return s;
    int64_t start = td_spin_us(), limit = e->base.timeout_us;
    if ((s = spin(e, lane)) != TD_AGAIN) return s;
    for (;;) {
        int64_t left = limit ? start + limit - td_spin_us() : -1;
        if (limit && left <= 0) return too_late(e, &e->base.lane[lane]);
        atomic_store(&e->self->sleeping, 1);
        s = look(e, lane);
        if (s != TD_AGAIN) {
            atomic_store(&e->self->sleeping, 0);
            return s;
        }
        sleep_until_woken(e->self, left);
    }
}

static td_status end_wait(td_coll *c, int lane)
{
    td_status s = wait_looking((end *)c, lane);
    if (s < 0) lane_withdraw(&c->lane[lane]);
    return s;
}

/* ---- opening, splitting, closing ---- */

static void family_leave(family *f)
{
    if (atomic_fetch_sub(&f->users, 1) > 1) return;
    pthread_mutex_destroy(&f->lock);
    free(f);
}

static family *family_open(int n)
{
    size_t bytes = sizeof(family) + (size_t)n * sizeof(member);
    family *f = aligned_alloc(64, (bytes + 63) / 64 * 64);
    TD_CHECK(f != NULL);
    memset(f, 0, bytes);
    f->size = n;
    cpu_set_t cores;
    int n_cores = sched_getaffinity(0, sizeof cores, &cores) == 0 ? CPU_COUNT(&cores) : 1;
    f->spin_us = n <= n_cores ? TD_COLL_SPIN_US : 0;
    atomic_store(&f->users, 1);
    pthread_mutex_init(&f->lock, NULL);
    return f;
}

/* For n users, each of whom takes an end. Posts are touched only where they are used: mapped, not cleared. */
static td_status group_open(family *f, int n, const int *world, group **out)
{
    size_t bytes = (size_t)n * (size_t)n * PAIR_POSTS * sizeof(post);
    void *posts =
        mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (posts == MAP_FAILED) return td_fail(TD_EIO, "no memory for a group of %d: %s", n, strerror(errno));
    group *g = td_xalloc(sizeof *g);
    g->size = n;
    g->fam = f;
    g->posts = posts;
    g->posts_bytes = bytes;
    g->world = td_xalloc((size_t)n * sizeof *g->world);
    memcpy(g->world, world, (size_t)n * sizeof *world);
    g->gone = td_xalloc((size_t)n * sizeof *g->gone);
    atomic_store(&g->users, n);
    atomic_fetch_add(&f->users, 1);
    *out = g;
    return TD_OK;
}

static void group_leave(group *g)
{
    if (atomic_fetch_sub(&g->users, 1) > 1) return;
    munmap(g->posts, g->posts_bytes);
    family_leave(g->fam);
    free(g->world);
    free(g->gone);
    free(g);
}

static void end_close(td_coll *c)
{
    end *e = (end *)c;
    for (int i = 0; i < TD_COLL_LANES; i++)
        if (c->lane[i].busy) lane_withdraw(&c->lane[i]);
    atomic_store(&e->g->gone[c->rank], true);
    for (int i = 0; i < c->size; i++)
        if (i != c->rank) wake(member_of(e->g, i));
    group_leave(e->g);
    td_coll_deinit(c);
    free(e->next_send);
    free(e->next_recv);
    free(e);
}

static td_status end_split(td_coll *c, int color, int key, td_coll **out);

static const td_coll_ops threads_ops = {
    .name = "threads",
    .start = end_start,
    .wait = end_wait,
    .health = health,
    .copy = td_coll_copy_host,
    .split = end_split,
    .close = end_close,
    .abort = end_abort,
};

static td_coll *end_open(group *g, int rank)
{
    end *e = td_xalloc(sizeof *e);
    td_coll_init(&e->base, &threads_ops, rank, g->size);
    e->g = g;
    e->self = member_of(g, rank);
    e->next_send = td_xalloc((size_t)g->size * TD_COLL_CHANNELS * sizeof *e->next_send);
    e->next_recv = td_xalloc((size_t)g->size * TD_COLL_CHANNELS * sizeof *e->next_recv);
    return &e->base;
}

/* Everybody's color and key, then the address of each new group from its first member. */
static td_status end_split(td_coll *c, int color, int key, td_coll **out)
{
    end *e = (end *)c;
    int mine[2] = {color, key}, all[TD_COLL_MAX_THREADS][2], ranks[TD_COLL_MAX_THREADS];
    group *new_groups[TD_COLL_MAX_THREADS], *made = NULL;
    TD_TRY(td_coll_all_gather(c, mine, all, sizeof mine));
    int n = color < 0 ? 0 : td_coll_members((const int(*)[2])all, c->size, color, ranks);
    td_status opened = TD_OK;
    if (n && ranks[0] == c->rank) {
        int world[TD_COLL_MAX_THREADS];
        for (int i = 0; i < n; i++) world[i] = e->g->world[ranks[i]];
        opened = group_open(e->g->fam, n, world, &made);
        if (opened < 0) family_break(e->g->fam, opened, "a split found no memory");
    }
    TD_TRY(opened);
    TD_TRY(td_coll_all_gather(c, &made, new_groups, sizeof made));
    *out = NULL;
    for (int i = 0; i < n; i++)
        if (ranks[i] == c->rank) *out = end_open(new_groups[ranks[0]], i);
    return TD_OK;
}

td_status td_coll_threads_open(int n, td_coll **ends)
{
    if (n < 1 || n > TD_COLL_MAX_THREADS)
        return td_refuse(TD_EBADREQ, "%d ranks as threads; 1 to %d are possible", n, TD_COLL_MAX_THREADS);
    int world[TD_COLL_MAX_THREADS];
    for (int i = 0; i < n; i++) world[i] = i;
    family *f = family_open(n);
    group *g = NULL;
    td_status s = group_open(f, n, world, &g);
    family_leave(f); /* the group has its own share */
    TD_TRY(s);
    for (int i = 0; i < n; i++) ends[i] = end_open(g, i);
    return TD_OK;
}
