// SPDX-License-Identifier: Apache-2.0
/* tests/bench/bench_coll.c - two ranks on one host, for coll.py: `bench_coll threads`, or `mpirun -n 2
 * bench_coll mpi`. Rank 0 prints one JSON object, times in microseconds, each the median of ROUNDS rounds
 * (and the best). What is compared is measured in turn within a round.
 *
 *   shm            1 MiB of each rank through shared memory: copy in, meet, copy the other's out
 *   shm_gather     the same and a copy of the own block: a whole all-gather made of memcpy
 *   memcpy         1 MiB from the other rank's memory by plain memcpy, both at once (threads only)
 *   in_place       td_coll_all_gather, send being recv's own block: moves what shm moves
 *   gather         td_coll_all_gather from another buffer: moves what shm_gather moves
 *   pingpong       half of td_coll_send, td_coll_recv there and back, 8 bytes
 *   exchange       td_coll_all_gather of 8 bytes
 *   mpi_pingpong, mpi_gather   MPI_Send and MPI_Recv, MPI_Allgather (mpi only) */
#include "common/log.h"
#include "worker/coll/coll.h"
#include <fcntl.h>
#include <mpi.h>
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

enum { ROUNDS = 151, BLOCK = 1 << 20, PINGS = 200 };
enum { SHM, SHM_GATHER, MEMCPY, IN_PLACE, GATHER, PINGPONG, EXCHANGE, MPI_PINGPONG, MPI_GATHER, N_KINDS };
static const char *const names[N_KINDS] = {"shm",      "shm_gather", "memcpy",       "in_place",  "gather",
                                           "pingpong", "exchange",   "mpi_pingpong", "mpi_gather"};

typedef struct meeting { /* in shared memory; a spinning barrier, so that waiting is no part of what is
                            measured */
    _Alignas(64) _Atomic unsigned here[2];
    void *address[2];
    _Alignas(4096) char block[2][BLOCK];
} meeting;

typedef struct rank {
    pthread_t thread;
    td_coll *c;
    meeting *m;
    unsigned phase;
    bool threads;
    char *send, *recv;
    double us[N_KINDS][ROUNDS];
} rank;

static double now_us(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec * 1e6 + (double)t.tv_nsec / 1e3;
}

/* Seldom is the other rank not running: then it gets the core. */
static void meet(rank *r)
{
    int me = td_coll_rank(r->c);
    atomic_store(&r->m->here[me], ++r->phase);
    for (unsigned i = 1; atomic_load(&r->m->here[1 - me]) < r->phase; i++)
        if (i % 4096 == 0) sched_yield();
}

static void ping(rank *r, bool raw)
{
    char b[8] = {0};
    int me = td_coll_rank(r->c);
    for (int i = 0; i < 2 * PINGS; i++) {
        bool sends = (i + me) % 2 == 0;
        if (raw && sends)
            MPI_Send(b, 8, MPI_BYTE, 1 - me, 0, MPI_COMM_WORLD);
        else if (raw)
            MPI_Recv(b, 8, MPI_BYTE, 1 - me, 0, MPI_COMM_WORLD, MPI_STATUS_IGNORE);
        else if (sends)
            td_coll_send(r->c, 1 - me, b, 8);
        else
            td_coll_recv(r->c, 1 - me, b, 8);
    }
}

static void run(rank *r, int kind)
{
    int me = td_coll_rank(r->c), other = 1 - me;
    char *mine = r->recv + (size_t)me * BLOCK, *theirs = r->recv + (size_t)other * BLOCK;
    switch (kind) {
    case SHM_GATHER:
        memcpy(mine, r->send, BLOCK); /* fall through */
    case SHM:
        memcpy(r->m->block[me], r->send, BLOCK);
        meet(r);
        memcpy(theirs, r->m->block[other], BLOCK);
        break;
    case MEMCPY:
        if (r->threads) memcpy(theirs, r->m->address[other], BLOCK);
        break;
    case IN_PLACE:
        td_coll_all_gather(r->c, mine, r->recv, BLOCK);
        break;
    case GATHER:
        td_coll_all_gather(r->c, r->send, r->recv, BLOCK);
        break;
    case PINGPONG:
        ping(r, false);
        break;
    case EXCHANGE:
        for (int i = 0; i < PINGS; i++) td_coll_all_gather(r->c, r->send, r->recv, 8);
        break;
    case MPI_PINGPONG:
        ping(r, true);
        break;
    case MPI_GATHER:
        MPI_Allgather(r->send, BLOCK, MPI_BYTE, r->recv, BLOCK, MPI_BYTE, MPI_COMM_WORLD);
        break;
    }
}

/* Of both ranks' times the longer counts: a copy is done when both are. */
static void measure(rank *r)
{
    int kinds = r->threads ? MPI_PINGPONG : N_KINDS, me = td_coll_rank(r->c);
    r->m->address[me] = r->send;
    for (int i = -5; i < ROUNDS; i++)
        for (int k = 0; k < kinds; k++) {
            meet(r);
            double start = now_us();
            run(r, k);
            meet(r);
            int n = k == PINGPONG || k == MPI_PINGPONG ? 2 * PINGS : k == EXCHANGE ? PINGS : 1;
            if (i >= 0) r->us[k][i] = (now_us() - start) / n;
        }
}

static int by_value(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void report(rank *r)
{
    printf("{");
    for (int k = 0; k < (r->threads ? MPI_PINGPONG : N_KINDS); k++) {
        if (k == MEMCPY && !r->threads) continue;
        qsort(r->us[k], ROUNDS, sizeof r->us[k][0], by_value);
        printf("%s\"%s\": [%.3f, %.3f]", k ? ", " : "", names[k], r->us[k][ROUNDS / 2], r->us[k][0]);
    }
    printf("}\n");
}

/* As mpirun binds its ranks: each to a core of its own. */
static void bind_thread(int which)
{
    cpu_set_t all, one;
    CPU_ZERO(&one);
    if (sched_getaffinity(0, sizeof all, &all) != 0) return;
    for (int i = 0; i < CPU_SETSIZE; i++)
        if (CPU_ISSET(i, &all) && which-- == 0) CPU_SET(i, &one);
    if (CPU_COUNT(&one)) sched_setaffinity(0, sizeof one, &one);
}

static void *rank_main(void *arg)
{
    rank *r = arg;
    if (r->threads) bind_thread(td_coll_rank(r->c));
    r->send = aligned_alloc(4096, BLOCK);
    r->recv = aligned_alloc(4096, 2 * BLOCK);
    if (!r->send || !r->recv) abort();
    memset(r->send, 1, BLOCK);
    memset(r->recv, 2, 2 * BLOCK);
    memset(r->m->block[td_coll_rank(r->c)], 3, BLOCK);
    measure(r);
    return NULL;
}

static void *shared_memory(int fd)
{
    void *p =
        mmap(NULL, sizeof(meeting), PROT_READ | PROT_WRITE, MAP_SHARED | (fd < 0 ? MAP_ANONYMOUS : 0), fd, 0);
    if (p == MAP_FAILED) abort();
    return p;
}

static int run_threads(void)
{
    static rank ranks[2];
    td_coll *ends[2];
    meeting *m = shared_memory(-1);
    if (td_coll_threads_open(2, ends) < 0) return 1;
    for (int i = 0; i < 2; i++) {
        ranks[i].c = ends[i];
        ranks[i].m = m;
        ranks[i].threads = true;
        if (pthread_create(&ranks[i].thread, NULL, rank_main, &ranks[i])) return 1;
    }
    for (int i = 0; i < 2; i++) pthread_join(ranks[i].thread, NULL);
    report(&ranks[0]);
    for (int i = 0; i < 2; i++) td_coll_close(ends[i]);
    return 0;
}

static int run_mpi(int *argc, char ***argv)
{
    static rank r;
    char name[64];
    if (td_coll_mpi_open(argc, argv, &r.c) < 0 || td_coll_size(r.c) != 2) return 1;
    int pid = (int)getpid();
    td_coll_bcast(r.c, &pid, sizeof pid, 0);
    snprintf(name, sizeof name, "/bench-coll-%d", pid);
    int fd = shm_open(name, O_CREAT | O_RDWR, 0600);
    if (fd < 0 || ftruncate(fd, sizeof(meeting)) < 0) return 1;
    r.m = shared_memory(fd);
    td_coll_barrier(r.c);
    shm_unlink(name);
    rank_main(&r);
    if (td_coll_rank(r.c) == 0) report(&r);
    td_coll_close(r.c);
    return 0;
}

int main(int argc, char **argv)
{
    td_log_open("bench_coll", TD_LOG_WARN);
    if (argc == 2 && !strcmp(argv[1], "threads")) return run_threads();
    if (argc == 2 && !strcmp(argv[1], "mpi")) return run_mpi(&argc, &argv);
    fprintf(stderr, "usage: bench_coll threads | mpirun -n 2 bench_coll mpi\n");
    return 2;
}
