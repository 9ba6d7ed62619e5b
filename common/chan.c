// SPDX-License-Identifier: Apache-2.0
/* common/chan.c - head and tail count up without wrapping to the ring; each side keeps a stale copy of the
 * other's counter, so that the shared cache line is read only when the ring looks full or empty. Every push
 * signals: a consumer that stops early is woken by the next message. */
#include "common/chan.h"
#include "common/check.h"
#include "common/status.h"
#include <errno.h>
#include <fcntl.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <unistd.h>

struct td_chan {
    unsigned mask, capacity;
    int fd;
    void **ring;
    _Alignas(64) _Atomic unsigned tail; /* written by the producer */
    unsigned head_seen;
    _Alignas(64) _Atomic unsigned head; /* written by the consumer */
    unsigned tail_seen;
};

int td_wake_open(void)
{
    int fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    if (fd < 0) td_fail(TD_EIO, "eventfd: %s", strerror(errno));
    return fd;
}

void td_wake_signal(int fd)
{
    uint64_t one = 1;
    ssize_t n;
    do n = write(fd, &one, sizeof one); /* EAGAIN: the counter is at its maximum, so it is readable: fine */
    while (n < 0 && errno == EINTR);
}

void td_wake_clear(int fd)
{
    uint64_t count;
    ssize_t n;
    do n = read(fd, &count, sizeof count);
    while (n < 0 && errno == EINTR);
}

td_chan *td_chan_open(unsigned capacity, int wake_fd)
{
    TD_CHECK(capacity >= 1 && capacity <= 1u << 24);
    unsigned size = 1;
    while (size < capacity) size *= 2;
    int fd = wake_fd >= 0 ? fcntl(wake_fd, F_DUPFD_CLOEXEC, 0) : td_wake_open();
    if (fd < 0 && wake_fd >= 0) td_fail(TD_EIO, "eventfd: %s", strerror(errno));
    if (fd < 0) return NULL;
    td_chan *c = aligned_alloc(64, sizeof *c);
    TD_CHECK(c != NULL);
    memset(c, 0, sizeof *c);
    c->mask = size - 1;
    c->capacity = capacity;
    c->fd = fd;
    c->ring = td_xalloc(size * sizeof *c->ring);
    return c;
}

void td_chan_close(td_chan *c)
{
    if (!c) return;
    close(c->fd);
    free(c->ring);
    free(c);
}

bool td_chan_push(td_chan *c, void *msg)
{
    TD_ASSERT(msg != NULL);
    unsigned tail = atomic_load_explicit(&c->tail, memory_order_relaxed);
    if (tail - c->head_seen >= c->capacity) {
        c->head_seen = atomic_load_explicit(&c->head, memory_order_acquire);
        if (tail - c->head_seen >= c->capacity) return false;
    }
    c->ring[tail & c->mask] = msg;
    atomic_store_explicit(&c->tail, tail + 1, memory_order_release);
    td_wake_signal(c->fd);
    return true;
}

void *td_chan_pop(td_chan *c)
{
    unsigned head = atomic_load_explicit(&c->head, memory_order_relaxed);
    if (head == c->tail_seen) {
        c->tail_seen = atomic_load_explicit(&c->tail, memory_order_acquire);
        if (head == c->tail_seen) return NULL;
    }
    void *msg = c->ring[head & c->mask];
    atomic_store_explicit(&c->head, head + 1, memory_order_release);
    return msg;
}

int td_chan_fd(const td_chan *c)
{
    return c->fd;
}

void td_chan_clear(td_chan *c)
{
    td_wake_clear(c->fd);
}

unsigned td_chan_len(const td_chan *c)
{
    unsigned head = atomic_load_explicit(&c->head, memory_order_relaxed);
    unsigned tail = atomic_load_explicit(&c->tail, memory_order_relaxed);
    return tail - head <= c->capacity ? tail - head : 0;
}
