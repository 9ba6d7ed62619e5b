// SPDX-License-Identifier: Apache-2.0
/* common/pool.c - a job is open while the caller hands out items; helpers may join an open job and must leave
 * before the caller returns, but nobody waits for a helper that never woke up: on a shared machine a sleeping
 * helper costs nothing.
 *
 * One word holds it all: state = job number << 32 | OPEN | helpers inside. A helper enters by
 * compare-and-swap on an open job, so it can never see the fields of a job that is over. */
#include "common/pool.h"
#include "common/check.h"
#include "common/clock.h"
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { MAX_MEMBERS = 256, SPIN_US = 50 };
#define OPEN (UINT64_C(1) << 31)
#define INSIDE (OPEN - 1)

typedef struct helper {
    td_pool *pool;
    int member;
    pthread_t thread;
} helper;

struct td_pool {
    int size;
    helper *helpers; /* size - 1 */
    td_pool_fn *fn;  /* the open job's; written while nobody is inside */
    void *arg;
    int n;
    _Alignas(64) _Atomic uint64_t state;
    _Alignas(64) _Atomic int next;       /* item to hand out */
    _Alignas(64) _Atomic uint32_t job;   /* futex: counts jobs, helpers block on it */
    _Atomic uint32_t sleepers;
    _Atomic bool stop;
    _Alignas(64) _Atomic uint32_t left;  /* futex: counts last departures, the caller blocks on it */
    _Atomic bool caller_waits;
};

static void futex_wait(_Atomic uint32_t *word, uint32_t seen)
{
    syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, seen, NULL, NULL, 0);
}

static void futex_wake(_Atomic uint32_t *word)
{
    syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}

#if defined(__x86_64__)
#define RELAX() __builtin_ia32_pause()
#else
#define RELAX() atomic_signal_fence(memory_order_seq_cst)
#endif

static void run_items(td_pool *p, int member)
{
    td_pool_fn *fn = p->fn;
    void *arg = p->arg;
    int n = p->n;
    for (int i; (i = atomic_fetch_add_explicit(&p->next, 1, memory_order_relaxed)) < n;) fn(arg, i, member);
}

static bool enter(td_pool *p)
{
    uint64_t s = atomic_load_explicit(&p->state, memory_order_relaxed);
    while (s & OPEN)
        if (atomic_compare_exchange_weak_explicit(&p->state, &s, s + 1, memory_order_acquire,
                                                  memory_order_relaxed))
            return true;
    return false;
}

static void leave(td_pool *p)
{
    uint64_t before = atomic_fetch_sub(&p->state, 1);
    if ((before & INSIDE) != 1 || (before & OPEN)) return;
    if (!atomic_load(&p->caller_waits)) return;
    atomic_fetch_add(&p->left, 1);
    futex_wake(&p->left);
}

/* Until another job than `seen` was announced: spin, then block. */
static void await_job(td_pool *p, uint32_t seen)
{
    int64_t until = 0;
    for (int i = 1;; i++) {
        if (atomic_load_explicit(&p->job, memory_order_acquire) != seen) return;
        RELAX();
        if (i % 32) continue;
        int64_t now = td_spin_us();
        if (!until) until = now + SPIN_US;
        if (now >= until) break;
    }
    atomic_fetch_add(&p->sleepers, 1);
    while (atomic_load(&p->job) == seen) futex_wait(&p->job, seen);
    atomic_fetch_sub(&p->sleepers, 1);
}

static void *helper_main(void *arg)
{
    helper *h = arg;
    td_pool *p = h->pool;
    uint32_t seen = 0;
    for (;;) {
        await_job(p, seen);
        seen = atomic_load_explicit(&p->job, memory_order_acquire);
        if (atomic_load_explicit(&p->stop, memory_order_relaxed)) return NULL;
        if (!enter(p)) continue;
        run_items(p, h->member);
        leave(p);
    }
}

static void announce(td_pool *p)
{
    atomic_fetch_add(&p->job, 1);
    if (atomic_load(&p->sleepers)) futex_wake(&p->job);
}

static void await_helpers(td_pool *p)
{
    int64_t until = 0;
    for (int i = 1;; i++) {
        if (!(atomic_load_explicit(&p->state, memory_order_acquire) & INSIDE)) return;
        RELAX();
        if (i % 32) continue;
        int64_t now = td_spin_us();
        if (!until) until = now + SPIN_US;
        if (now >= until) break;
    }
    atomic_store(&p->caller_waits, true);
    for (;;) {
        uint32_t left = atomic_load(&p->left);
        if (!(atomic_load(&p->state) & INSIDE)) break;
        futex_wait(&p->left, left);
    }
    atomic_store(&p->caller_waits, false);
}

void td_pool_for(td_pool *p, int n, td_pool_fn *fn, void *arg)
{
    if (p->size == 1 || n <= 1) {
        for (int i = 0; i < n; i++) fn(arg, i, 0);
        return;
    }
    p->fn = fn;
    p->arg = arg;
    p->n = n;
    atomic_store_explicit(&p->next, 0, memory_order_relaxed);
    uint64_t number = (atomic_load_explicit(&p->state, memory_order_relaxed) >> 32) + 1;
    atomic_store_explicit(&p->state, number << 32 | OPEN, memory_order_release);
    announce(p);
    run_items(p, 0);
    atomic_fetch_and(&p->state, ~OPEN);
    await_helpers(p);
}

td_pool *td_pool_open(int n_threads)
{
    TD_CHECK(n_threads >= 1 && n_threads <= MAX_MEMBERS);
    td_pool *p = aligned_alloc(64, sizeof *p);
    TD_CHECK(p != NULL);
    memset(p, 0, sizeof *p);
    p->helpers = td_xalloc((size_t)n_threads * sizeof *p->helpers);
    p->size = 1;
    for (int i = 1; i < n_threads; i++) {
        helper *h = &p->helpers[i - 1];
        *h = (helper){.pool = p, .member = i};
        if (pthread_create(&h->thread, NULL, helper_main, h)) break; /* a smaller team: same results */
        char name[16];
        snprintf(name, sizeof name, "pool-%d", i & 255);
        pthread_setname_np(h->thread, name);
        p->size++;
    }
    return p;
}

void td_pool_close(td_pool *p)
{
    if (!p) return;
    atomic_store(&p->stop, true);
    announce(p);
    for (int i = 0; i < p->size - 1; i++) pthread_join(p->helpers[i].thread, NULL);
    free(p->helpers);
    free(p);
}

int td_pool_size(const td_pool *p)
{
    return p->size;
}
