/* Beats: ranks that run are heard; one that stops beating is given up by name, by rank 0, and rank 0 by the others. */
// SPDX-License-Identifier: Apache-2.0
#include "common/log.h"
#include "tests/t.h"
#include "worker/beat.h"
#include <semaphore.h>
#include <stdatomic.h>
#include <time.h>

typedef struct loss { sem_t seen; atomic_int rank, times; } loss;

static void lost(void *arg, int rank)
{
    loss *l = arg;
    l->rank = rank;
    l->times++;
    sem_post(&l->seen);
}

static bool seen_within(loss *l, int seconds)
{
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    t.tv_sec += seconds;
    return sem_timedwait(&l->seen, &t) == 0;
}

static td_beat *begin(td_zctx *z, int rank, int64_t timeout_us, loss *l, char *where)
{
    td_beat *b = NULL;
    td_beat_opts o = {.z = z,
                      .rank = rank,
                      .n_ranks = 3,
                      .endpoint = rank ? where : "tcp://127.0.0.1:*",
                      .timeout_us = timeout_us,
                      .lost = lost,
                      .arg = l};
    sem_init(&l->seen, 0, 0);
    l->rank = -1;
    l->times = 0;
    T_OK(td_beat_open(&o, rank ? NULL : where, 256, &b) == TD_OK, "%s", td_reason());
    return b;
}

/* Rank `victim` stops: whoever depends on it notices, the others do not. */
static void one_stops(int victim)
{
    char where[256];
    loss l[3] = {0};
    td_beat *b[3];
    td_zctx *z = td_zctx_open();
    for (int i = 0; i < 3; i++) b[i] = begin(z, i, 1500000, &l[i], where);
    T_OK(!seen_within(&l[0], 3) && !l[1].times && !l[2].times, "a rank that beats was given up");
    td_beat_close(b[victim]);
    b[victim] = NULL;
    int witness = victim ? 0 : 1;
    T_OK(seen_within(&l[witness], 30), "nobody noticed that rank %d stopped", victim);
    T_EQ(l[witness].rank, victim);
    for (int i = 0; i < 3; i++) td_beat_close(b[i]);
    td_zctx_close(z);
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    one_stops(1);
    one_stops(0);
    return T_DONE();
}
