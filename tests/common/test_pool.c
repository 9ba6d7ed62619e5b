// SPDX-License-Identifier: Apache-2.0
/* Every item runs once, by a member of the team, with its writes visible to the caller; also across pauses in which members sleep. */
#include "tests/t.h"
#include "common/pool.h"
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

enum { N = 1000 };
static int count[N];
static _Atomic int used[256];
static int finished[8];

static void item(void *arg, int i, int member)
{
    count[i] += *(int *)arg; /* plain: the pool must order it */
    atomic_fetch_add_explicit(&used[member], 1, memory_order_relaxed);
}

static void slow(void *arg, int i, int member)
{
    (void)arg;
    atomic_fetch_add(&used[member], 1);
    usleep(300);
    finished[i]++; /* plain: visible only because the caller waits */
}

static void self_check(void *arg, int i, int member)
{
    (void)i;
    T_OK(member == 0 && pthread_equal(*(pthread_t *)arg, pthread_self()));
}

int main(void)
{
    td_pool *one = td_pool_open(1);
    pthread_t me = pthread_self();
    T_EQ(td_pool_size(one), 1);
    td_pool_for(one, 50, self_check, &me);
    td_pool_close(one);
    for (int size = 2; size <= 5; size++) {
        td_pool *p = td_pool_open(size);
        T_EQ(td_pool_size(p), size);
        memset(count, 0, sizeof count);
        int want = 0, bad = 0;
        for (int job = 1; job <= 400; job++) {
            int n = job % 7 == 0 ? N : job % 5;
            td_pool_for(p, n, item, &job);
            if (n == N) want += job;
            if (job % 100 == 0) usleep(2000); /* members go to sleep */
        }
        for (int i = 10; i < N; i++) bad += count[i] != want;
        T_EQ(bad, 0);
        td_pool_for(p, 0, item, NULL);
        td_pool_for(p, -3, item, NULL);
        memset(used, 0, sizeof used);
        for (int k = 1; k <= 20; k++) { /* the caller often ends first and has to block */
            td_pool_for(p, 7, slow, NULL);
            for (int i = 0; i < 7; i++) bad += finished[i] != k;
        }
        T_EQ(bad, 0);
        memset(finished, 0, sizeof finished);
        int members = 0, total = 0;
        for (int i = 0; i < 256; i++) {
            members += used[i] > 0;
            total += used[i];
        }
        T_EQ(total, 140);
        T_OK(members > 1 && members <= size, "%d members worked", members);
        td_pool_close(p);
    }
    for (int i = 0; i < 50; i++) td_pool_close(td_pool_open(3)); /* closing while members still start */
    td_pool_close(NULL);
    return T_DONE();
}
