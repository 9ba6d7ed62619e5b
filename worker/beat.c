// SPDX-License-Identifier: Apache-2.0
#include "worker/beat.h"
#include "common/chan.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include <poll.h>
#include <pthread.h>
#include <stdio.h>
#include <stdatomic.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct td_beat {
    td_beat_opts o;
    td_sock *sock;      /* the thread's own, once it runs */
    char where[256];
    pthread_t thread;
    atomic_bool stop, ready;        /* ready: opened and where are said */
    int wake_fd, ready_fd;
    td_status opened;
    int64_t *heard_us;  /* rank 0: of every rank; others: [0] of rank 0 */
};

static td_status open_socket(td_beat *b)
{
    td_sock_opts o = {.max_message_bytes = 64, .hwm = 1024, .curve = b->o.curve};
    uint32_t id = (uint32_t)b->o.rank;
    char bound[256];
    if (b->o.rank) return td_sock_connect_dealer(b->o.z, b->where, &id, sizeof id, &o, &b->sock);
    TD_TRY(td_sock_bind_router(b->o.z, b->where, &o, bound, sizeof bound, &b->sock));
    memcpy(b->where, bound, sizeof bound);
    return TD_OK;
}

/* Beats that came in; rank 0 answers each at once. */
static void hear(td_beat *b)
{
    td_part id, part[2];
    int n;
    while (td_sock_recv(b->sock, &id, part, &n) == TD_OK) {
        uint32_t rank = 0;
        if (b->o.rank == 0) {
            if (id.n != sizeof rank) continue;
            memcpy(&rank, id.p, sizeof rank);
            if (rank == 0 || rank >= (uint32_t)b->o.n_ranks) continue;
            td_part beat = {&rank, sizeof rank};
            (void)td_sock_send(b->sock, &rank, sizeof rank, &beat, 1);
        }
        b->heard_us[rank] = td_now_us();
    }
}

static void give_up(td_beat *b, int rank, int64_t silent_us)
{
    TD_ERROR("rank %d has not been heard for %lld ms: all ranks of this worker end", rank, (long long)silent_us / 1000);
    if (!b->o.lost) _exit(TD_BEAT_EXIT);
    b->o.lost(b->o.arg, rank);
    b->stop = true;
}

static void check(td_beat *b, int64_t last_us)
{
    int64_t now = td_now_us();
    /* A thread that was itself held up knows nothing of the others: it listens first. */
    if (now - last_us > 2 * TD_BEAT_MS * 1000) {
        for (int i = 0; i < b->o.n_ranks; i++) b->heard_us[i] = TD_MAX(b->heard_us[i], now - b->o.timeout_us / 2);
        return;
    }
    for (int i = b->o.rank ? 0 : 1; i < (b->o.rank ? 1 : b->o.n_ranks) && !b->stop; i++)
        if (now - b->heard_us[i] > b->o.timeout_us) give_up(b, i, now - b->heard_us[i]);
}

static void *run(void *arg)
{
    td_beat *b = arg;
    b->opened = open_socket(b); /* a socket belongs to the thread that opens it */
    b->ready = true;
    td_wake_signal(b->ready_fd);
    int64_t due = 0, last = td_now_us();
    while (b->opened >= 0 && !b->stop) {
        int64_t now = td_now_us();
        hear(b);
        check(b, last);
        last = now;
        if (b->o.rank && now >= due) {
            uint32_t rank = (uint32_t)b->o.rank;
            td_part beat = {&rank, sizeof rank};
            (void)td_sock_send(b->sock, NULL, 0, &beat, 1);
            due = now + TD_BEAT_MS * 1000;
        }
        if (td_sock_ready(b->sock)) continue;
        struct pollfd p[2] = {{.fd = td_sock_fd(b->sock), .events = POLLIN}, {.fd = b->wake_fd, .events = POLLIN}};
        (void)poll(p, 2, TD_BEAT_MS / 2);
    }
    td_sock_close(b->sock);
    return NULL;
}

td_status td_beat_open(const td_beat_opts *o, char *bound, size_t n, td_beat **out)
{
    td_beat *b = td_xalloc(sizeof *b);
    b->o = *o;
    snprintf(b->where, sizeof b->where, "%s", o->endpoint);
    b->wake_fd = td_wake_open();
    b->ready_fd = td_wake_open();
    TD_CHECK(b->wake_fd >= 0 && b->ready_fd >= 0);
    b->heard_us = td_xalloc((size_t)o->n_ranks * sizeof *b->heard_us);
    for (int i = 0; i < o->n_ranks; i++) b->heard_us[i] = td_now_us() + o->timeout_us; /* time to start */
    TD_CHECK(!pthread_create(&b->thread, NULL, run, b));
    struct pollfd p = {.fd = b->ready_fd, .events = POLLIN};
    while (!b->ready) (void)poll(&p, 1, -1);
    if (b->opened < 0) {
        td_status s = b->opened;
        td_beat_close(b);
        return s;
    }
    if (bound) snprintf(bound, n, "%s", b->where);
    *out = b;
    return TD_OK;
}

void td_beat_close(td_beat *b)
{
    if (!b) return;
    b->stop = true;
    td_wake_signal(b->wake_fd);
    pthread_join(b->thread, NULL);
    close(b->wake_fd), close(b->ready_fd);
    free(b->heard_us);
    free(b);
}
