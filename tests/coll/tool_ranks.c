// SPDX-License-Identifier: Apache-2.0
/* tests/coll/tool_ranks.c - one rank of test_mpi.py, started by mpirun: tool_ranks CASE. Prints "rank R: N
 * passed, M failed" and exits 1 if any failed. cases   the list every back end must pass       big   a
 * message of more than 1 GiB (2 ranks) late    rank 0 comes too late                    short other sizes at
 * both ends abort   rank 1 ends all                          idle  waiting costs no processor time */
#include "common/clock.h"
#include "common/log.h"
#include "tests/coll/support_cases.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static int64_t cpu_us(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

static void run_cases(td_coll *c, coll_tally *t)
{
    td_coll *again = NULL;
    C_OK(t, !strcmp(td_coll_name(c), "mpi"));
    C_IS(t, td_coll_mpi_open(NULL, NULL, &again), TD_EBADREQ);
    coll_cases(c, 1u << 20 | 7, t);
}

/* A mark on both sides of the cut, and the last byte. */
static void run_big(td_coll *c, coll_tally *t)
{
    static const size_t mark[] = {0, ((size_t)1 << 30) - 1, (size_t)1 << 30, ((size_t)1 << 30) + 4};
    size_t n = ((size_t)1 << 30) + 5;
    unsigned char *p = calloc(n, 1);
    if (!p) abort();
    if (td_coll_rank(c) == 0) {
        for (unsigned i = 0; i < 4; i++) p[mark[i]] = (unsigned char)(i + 1);
        C_IS(t, td_coll_send(c, 1, p, n), TD_OK);
    } else if (td_coll_rank(c) == 1) {
        C_IS(t, td_coll_recv(c, 0, p, n), TD_OK);
        for (unsigned i = 0; i < 4; i++) C_OK(t, p[mark[i]] == i + 1);
    }
    free(p);
}

static void run_late(td_coll *c, coll_tally *t)
{
    char b[64];
    if (td_coll_rank(c) == 0) {
        usleep(500000);
        return;
    }
    td_coll_deadline(c, 50000);
    int64_t start = td_spin_us();
    C_IS(t, td_coll_recv(c, 0, b, sizeof b), TD_ETIME);
    int64_t took = td_spin_us() - start;
    C_OK(t, took >= 50000 && took < 400000);
    C_IS(t, td_coll_barrier(c), TD_ETIME);
}

/* Rank 0 sends n bytes, rank 1 expects m: told, whichever way either size takes. */
static void other_size(td_coll *c, coll_tally *t, size_t n, size_t m)
{
    static char b[200000];
    td_coll_deadline(c, 3000000);
    if (td_coll_rank(c) == 0) {
        C_OK(t, td_coll_send(c, 1, b, n) != TD_EPROTO);
    } else if (td_coll_rank(c) == 1) {
        C_IS(t, td_coll_recv(c, 0, b, m), TD_EPROTO);
        C_IS(t, td_coll_barrier(c), TD_EPROTO);
    }
}

static void run_short(td_coll *c, coll_tally *t)
{
    other_size(c, t, 8, 9);
}

static void run_long(td_coll *c, coll_tally *t)
{
    other_size(c, t, 100001, 100000);
}

static void run_small_for_large(td_coll *c, coll_tally *t)
{
    other_size(c, t, 16, 100000);
}

static void run_large_for_small(td_coll *c, coll_tally *t)
{
    other_size(c, t, 100000, 8);
}

static void run_abort(td_coll *c, coll_tally *t)
{
    if (td_coll_rank(c) == 1) td_coll_abort(c, "a test");
    td_coll_barrier(c);
    t->failed++; /* not reached */
}

static void run_idle(td_coll *c, coll_tally *t)
{
    char b[4] = "abc";
    C_IS(t, td_coll_barrier(c), TD_OK);
    int64_t start = td_spin_us(), cpu = cpu_us();
    if (td_coll_rank(c) == 0) usleep(400000);
    C_IS(t, td_coll_bcast(c, b, sizeof b, 0), TD_OK);
    int64_t took = td_spin_us() - start, used = cpu_us() - cpu;
    C_OK(t, took >= 300000);
    if (used > took / 5)
        printf("waiting %lld us used %lld us of processor\n", (long long)took, (long long)used);
    C_OK(t, used <= took / 5);
}

int main(int argc, char **argv)
{
    static const struct {
        const char *name;
        void (*fn)(td_coll *, coll_tally *);
    } list[] = {{"cases", run_cases},
                {"big", run_big},
                {"late", run_late},
                {"abort", run_abort},
                {"idle", run_idle},
                {"short", run_short},
                {"long", run_long},
                {"small-for-large", run_small_for_large},
                {"large-for-small", run_large_for_small}};
    td_coll *c = NULL;
    coll_tally t = {0};
    td_log_open("ranks", TD_LOG_WARN);
    if (td_coll_mpi_open(&argc, &argv, &c) < 0) {
        printf("%s\n", td_reason());
        return 77;
    }
    int rank = td_coll_rank(c), found = 0;
    for (size_t i = 0; i < sizeof list / sizeof *list; i++)
        if (argc > 1 && !strcmp(argv[1], list[i].name)) list[i].fn(c, &t), found = 1;
    if (!found) C_OK(&t, !"a known case");
    td_coll_close(c);
    printf("rank %d: %d passed, %d failed\n", rank, t.passed, t.failed);
    return t.failed != 0;
}
