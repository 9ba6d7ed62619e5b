/* router/api/textpool.c - a ring of jobs under one mutex: a job is worth many times the lock. */
// SPDX-License-Identifier: Apache-2.0
#include "router/api/textpool.h"
#include "common/check.h"

#include <pthread.h>
#include <stdlib.h>

typedef struct work { void (*fn)(void *); void *arg; } work;

struct td_textpool {
    pthread_mutex_t lock;
    pthread_cond_t some;
    work *ring;
    int max, head, n, n_threads;
    bool closing;
    pthread_t thread[64];
};

static void *body(void *arg)
{
    td_textpool *p = arg;
    pthread_mutex_lock(&p->lock);
    for (;;) {
        while (!p->n && !p->closing) pthread_cond_wait(&p->some, &p->lock);
        if (!p->n) break;
        work w = p->ring[p->head];
        p->head = (p->head + 1) % p->max;
        p->n--;
        pthread_mutex_unlock(&p->lock);
        w.fn(w.arg);
        pthread_mutex_lock(&p->lock);
    }
    pthread_mutex_unlock(&p->lock);
    return NULL;
}

td_textpool *td_textpool_open(int threads, int max_jobs)
{
    td_textpool *p = td_xalloc(sizeof *p);
    p->max = max_jobs;
    p->ring = td_xalloc((size_t)max_jobs * sizeof *p->ring);
    pthread_mutex_init(&p->lock, NULL);
    pthread_cond_init(&p->some, NULL);
    for (p->n_threads = 0; p->n_threads < TD_MIN(threads, 64); p->n_threads++)
        if (pthread_create(&p->thread[p->n_threads], NULL, body, p)) break;
    TD_CHECK(p->n_threads > 0);
    return p;
}

void td_textpool_close(td_textpool *p)
{
    if (!p) return;
    pthread_mutex_lock(&p->lock);
    p->closing = true;
    pthread_cond_broadcast(&p->some);
    pthread_mutex_unlock(&p->lock);
    for (int i = 0; i < p->n_threads; i++) pthread_join(p->thread[i], NULL);
    pthread_mutex_destroy(&p->lock);
    pthread_cond_destroy(&p->some);
    free(p->ring);
    free(p);
}

bool td_textpool_submit(td_textpool *p, void (*fn)(void *), void *arg)
{
    pthread_mutex_lock(&p->lock);
    bool ok = p->n < p->max && !p->closing;
    if (ok) {
        p->ring[(p->head + p->n++) % p->max] = (work){fn, arg};
        pthread_cond_signal(&p->some);
    }
    pthread_mutex_unlock(&p->lock);
    return ok;
}

int td_textpool_waiting(td_textpool *p)
{
    pthread_mutex_lock(&p->lock);
    int n = p->n;
    pthread_mutex_unlock(&p->lock);
    return n;
}
