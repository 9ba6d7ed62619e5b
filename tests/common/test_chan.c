// SPDX-License-Identifier: Apache-2.0
/* Order, back-pressure, and no lost wake-up: the consumer sleeps in poll() without a timeout between bursts. */
#include "tests/t.h"
#include "common/chan.h"
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <unistd.h>

enum { N = 200000 };
typedef struct producer { td_chan *chan; uintptr_t base; } producer;

static void *produce(void *arg)
{
    producer *p = arg;
    for (uintptr_t i = 1; i <= N; i++) {
        uintptr_t *msg = malloc(sizeof *msg);
        *msg = i; /* plain write: the channel must order it */
        while (!td_chan_push(p->chan, msg)) sched_yield();
        if (i % 5000 == 0) usleep(100);
    }
    return NULL;
}

/* Two channels, one wake-up. */
static void test_stress(void)
{
    int fd = td_wake_open(), bad = 0;
    producer p[2] = {{td_chan_open(64, fd), 0}, {td_chan_open(3, fd), 0}};
    pthread_t t[2];
    for (int i = 0; i < 2; i++) pthread_create(&t[i], NULL, produce, &p[i]);
    uintptr_t next[2] = {1, 1};
    while (next[0] + next[1] < 2 * N + 2) {
        struct pollfd f = {.fd = fd, .events = POLLIN};
        if (poll(&f, 1, 20000) != 1) {
            T_OK(0, "a wake-up was lost at %ju %ju", (uintmax_t)next[0], (uintmax_t)next[1]);
            exit(1);
        }
        td_wake_clear(fd);
        for (int i = 0; i < 2; i++)
            for (uintptr_t *m; (m = td_chan_pop(p[i].chan)); free(m)) bad += *m != next[i]++;
    }
    T_EQ(bad, 0);
    for (int i = 0; i < 2; i++) {
        pthread_join(t[i], NULL);
        T_OK(td_chan_pop(p[i].chan) == NULL && td_chan_len(p[i].chan) == 0);
        td_chan_close(p[i].chan);
    }
    close(fd);
}

static bool readable(td_chan *c)
{
    struct pollfd f = {.fd = td_chan_fd(c), .events = POLLIN};
    return poll(&f, 1, 0) == 1;
}

/* The consumer has closed the wake-up, and its number is another descriptor's: that one gets nothing. */
static void test_consumer_gone(void)
{
    int fd = td_wake_open(), x;
    td_chan *c = td_chan_open(2, fd);
    close(fd);
    int other = td_wake_open();
    T_EQ(other, fd);
    T_OK(td_chan_push(c, &x));
    struct pollfd f = {.fd = other, .events = POLLIN};
    T_EQ(poll(&f, 1, 0), 0);
    T_OK(td_chan_pop(c) == &x);
    td_chan_close(c);
    close(other);
}

int main(void)
{
    td_chan *c = td_chan_open(3, -1);
    int x[4];
    T_OK(!readable(c) && td_chan_pop(c) == NULL);
    for (int i = 0; i < 3; i++) T_OK(td_chan_push(c, &x[i]));
    T_OK(!td_chan_push(c, &x[3]), "full at its capacity, not at the next power of two");
    T_OK(readable(c) && td_chan_len(c) == 3);
    td_chan_clear(c);
    T_OK(!readable(c));
    T_OK(td_chan_pop(c) == &x[0]);
    T_OK(td_chan_push(c, &x[3]) && readable(c));
    T_OK(td_chan_pop(c) == &x[1] && td_chan_pop(c) == &x[2] && td_chan_pop(c) == &x[3] && !td_chan_pop(c));
    td_wake_clear(td_chan_fd(c));
    td_wake_clear(td_chan_fd(c)); /* does not block */
    td_chan_close(c);
    td_chan_close(NULL);
    test_consumer_gone();
    test_stress();
    return T_DONE();
}
