// SPDX-License-Identifier: Apache-2.0
/* tests/coll/test_coll.c - self and threads: the case list for groups of 1 to 8; who waits is woken when a
 * peer leaves, comes too late, calls something else, or aborts; and nobody spins while waiting. */
#include "common/clock.h"
#include "common/log.h"
#include "kernels/dev.h"
#include "tests/coll/support_cases.h"
#include "tests/t.h"
#include <pthread.h>
#include <semaphore.h>
#include <time.h>
#include <unistd.h>

enum { MAX = 9 };

typedef void rank_fn(td_coll *c, coll_tally *t);
typedef struct rank {
    pthread_t thread;
    td_coll *c;
    rank_fn *fn;
    coll_tally tally;
} rank;

static void *rank_main(void *arg)
{
    rank *r = arg;
    r->fn(r->c, &r->tally);
    td_coll_close(r->c);
    return NULL;
}

static void run_ranks(int n, rank_fn *fn)
{
    td_coll *ends[MAX];
    rank ranks[MAX] = {0};
    T_EQ(td_coll_threads_open(n, ends), TD_OK);
    for (int i = 0; i < n; i++) {
        ranks[i].c = ends[i];
        ranks[i].fn = fn;
        if (pthread_create(&ranks[i].thread, NULL, rank_main, &ranks[i])) abort();
    }
    for (int i = 0; i < n; i++) {
        pthread_join(ranks[i].thread, NULL);
        t_passed += ranks[i].tally.passed;
        t_failed += ranks[i].tally.failed;
    }
}

static void cases(td_coll *c, coll_tally *t)
{
    C_OK(t, !strcmp(td_coll_name(c), "threads"));
    coll_cases(c, td_coll_size(c) <= 3 ? (1u << 20) + 7 : 100001, t);
}

/* Deadlines that ended, of the ranks that rank 1 keeps waiting: it comes when they have, however long that takes here. */
static sem_t over;

static void wait_for(int ranks)
{
    for (; ranks > 0; ranks--)
        while (sem_wait(&over)) {}
}

static _Thread_local int downloads, syncs;
static _Thread_local td_status (*real_download)(td_dev *d, td_stream_kind s, void *dst, const void *src, size_t bytes);
static _Thread_local td_status (*real_sync)(td_dev *d, td_stream_kind s);

static td_status count_download(td_dev *d, td_stream_kind s, void *dst, const void *src, size_t bytes)
{
    downloads++;
    return real_download(d, s, dst, src, bytes);
}

static td_status count_sync(td_dev *d, td_stream_kind s)
{
    syncs++;
    return real_sync(d, s);
}

/* What goes to all peers comes from the device once, and an exchange waits for it once. */
static void staged_once(td_coll *host, td_dev *dev, coll_tally *t)
{
    enum { BYTES = 5000, MOST = 4 };
    static _Thread_local uint8_t all[MOST * BYTES];
    int n = td_coll_size(host), me = td_coll_rank(host);
    td_dev counting = *dev;
    real_download = dev->download, real_sync = dev->sync;
    td_coll *c = NULL, *s = NULL;
    C_IS(t, td_coll_split(host, 0, me, &c), TD_OK);
    C_IS(t, td_coll_staged_open(c, &counting, &s), TD_OK);
    counting.download = count_download, counting.sync = count_sync;
    for (int k = 0; k < 3; k++) {
        downloads = syncs = 0;
        memset(all + me * BYTES, 10 * k + me, BYTES);
        C_IS(t, td_coll_all_gather(s, all + me * BYTES, all, BYTES), TD_OK);
        for (int i = 0; i < n; i++) C_OK(t, all[i * BYTES] == 10 * k + i && all[i * BYTES + BYTES - 1] == 10 * k + i);
        C_OK(t, downloads == (n > 1) && syncs == (n > 1));
    }
    td_coll_close(s), td_coll_close(c);
}

/* Buffers of a device, which is this host here (tests/simt has one whose memory nobody else can touch). */
static void staged(td_coll *c, coll_tally *t)
{
    td_dev *dev = NULL;
    td_coll *s = NULL;
    C_IS(t, td_dev_open("host", 0, &dev), TD_OK);
    C_IS(t, td_coll_staged_open(c, dev, &s), TD_OK);
    C_OK(t, !strcmp(td_coll_name(s), "staged"));
    coll_cases(s, 100001, t);
    staged_once(c, dev, t);
    td_coll_deadline(s, td_coll_rank(c) == 0 ? 20000 : 0);
    if (td_coll_rank(c) != 1) {
        C_IS(t, td_coll_barrier(s),
             td_coll_size(c) > 1 ? TD_ETIME : TD_OK); /* its own deadline, not its group's */
        if (td_coll_size(c) > 1) sem_post(&over);
    } else {
        wait_for(td_coll_size(c) - 1);
    }
    if (td_coll_size(c) > 1) C_IS(t, td_coll_barrier(s), TD_ETIME);
    td_coll_close(s);
    td_dev_close(dev);
}

static void test_self(void)
{
    coll_tally t = {0};
    td_coll *c = NULL;
    T_EQ(td_coll_self_open(&c), TD_OK);
    T_EQ(td_coll_size(c), 1);
    T_STR(td_coll_name(c), "self");
    coll_cases(c, 4097, &t);
    t_passed += t.passed;
    t_failed += t.failed;
    td_coll_abort(c, "test");
    T_EQ(td_coll_barrier(c), TD_EGONE);
    td_coll_close(c);
    td_coll *ends[1];
    T_EQ(td_coll_threads_open(0, ends), TD_EBADREQ);
    T_EQ(td_coll_threads_open(TD_COLL_MAX_THREADS + 1, ends), TD_EBADREQ);
}

static int64_t thread_cpu_us(void)
{
    struct timespec ts;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &ts);
    return (int64_t)ts.tv_sec * 1000000 + ts.tv_nsec / 1000;
}

/* The others wait in a group of their own, for one another and with a message too big to be in flight. */
static void aborted(td_coll *c, coll_tally *t)
{
    static char big[3][100000];
    int me = td_coll_rank(c);
    td_coll *part = NULL;
    C_IS(t, td_coll_split(c, me > 0, 0, &part), TD_OK);
    if (me == 0) {
        usleep(30000);
        td_coll_abort(c, "a test");
    } else if (me == 1) {
        C_IS(t, td_coll_send(c, 0, big[0], sizeof big[0]), TD_EGONE);
    } else {
        C_IS(t, td_coll_all_gather_start(c, 3, big[1], big, sizeof big[1]), TD_OK);
        C_IS(t, td_coll_recv(part, 0, big[2], 5), TD_EGONE);
        C_OK(t, strstr(td_reason(), "a test") != NULL);
        C_IS(t, td_coll_all_gather_wait(c, 3), TD_EGONE);
    }
    C_IS(t, td_coll_barrier(c), TD_EGONE); /* for ever */
    C_IS(t, td_coll_barrier(part), TD_EGONE);
    td_coll_close(part);
}

/* Rank 0 never comes: the first deadline ends it for all, well before theirs. */
static void late(td_coll *c, coll_tally *t)
{
    int me = td_coll_rank(c);
    char b[MAX * 4];
    td_coll_deadline(c, me == 1 ? 40000 : 60000000);
    if (me == 0) {
        wait_for(td_coll_size(c) - 1);
    } else {
        int64_t start = td_spin_us(), cpu = thread_cpu_us();
        C_IS(t, td_coll_all_gather(c, "abc", b, 4), TD_ETIME);
        int64_t took = td_spin_us() - start;
        C_OK(t, took < 30000000);
        C_OK(t, me != 1 || took >= 30000); /* the others may have come when it was over */
        C_OK(t, thread_cpu_us() - cpu < 20000); /* it slept (50 us of spinning, two switches, a log line) */
        sem_post(&over);
    }
    C_IS(t, td_coll_barrier(c), TD_ETIME);
}

static void leaves(td_coll *c, coll_tally *t)
{
    char b[3];
    if (td_coll_rank(c) == 0) {
        usleep(20000);
        C_IS(t, td_coll_send(c, 1, "hi", 3), TD_OK); /* arrives although it leaves at once */
        return;
    }
    if (td_coll_rank(c) == 1) {
        C_IS(t, td_coll_recv(c, 0, b, 3), TD_OK);
        C_IS(t, td_coll_recv(c, 0, b, 3), TD_EGONE);
    }
    C_IS(t, td_coll_barrier(c), TD_EGONE);
}

static void other_size(td_coll *c, coll_tally *t)
{
    char b[64];
    C_IS(t, td_coll_all_gather(c, "abcdefgh", b, td_coll_rank(c) == 1 ? 7 : 8), TD_EPROTO);
    C_IS(t, td_coll_barrier(c), TD_EPROTO);
}

static void other_call(td_coll *c, coll_tally *t)
{
    char b[64];
    if (td_coll_rank(c) == 0)
        C_IS(t, td_coll_all_gather(c, "a", b, 1), TD_EPROTO);
    else
        C_IS(t, td_coll_all_to_all(c, "abc", b, 1), TD_EPROTO);
}

/* A sender whose deadline ends while nobody takes its message owns the buffer again at once. */
static void withdrawn(td_coll *c, coll_tally *t)
{
    size_t n = 200000;
    char *buf = malloc(n);
    memset(buf, 1, n);
    td_coll_deadline(c, 20000);
    if (td_coll_rank(c) == 0) {
        C_OK(t, td_coll_send(c, 1, buf, n) < 0);
        free(buf);
        sem_post(&over);
        return;
    }
    if (td_coll_rank(c) == 1) {
        wait_for(1);
        C_IS(t, td_coll_recv(c, 0, buf, n), TD_ETIME);
    }
    free(buf);
}

int main(void)
{
    sem_init(&over, 0, 0);
    static const int sizes[] = {1, 2, 3, 4, 8, 9};
    td_log_open("test", TD_LOG_ERROR);
    test_self();
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) run_ranks(sizes[i], cases);
    for (int n = 1; n <= 4; n++) run_ranks(n, staged);
    run_ranks(3, aborted);
    run_ranks(4, late);
    run_ranks(3, leaves);
    run_ranks(3, other_size);
    run_ranks(3, other_call);
    run_ranks(2, withdrawn);
    return T_DONE();
}
