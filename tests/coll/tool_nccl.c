// SPDX-License-Identifier: Apache-2.0
/* tests/coll/tool_nccl.c - for test_nccl.py.
 *   find       prints "VERSION PATH" of the library, exit 77 with the reason if there is none
 *   open       opens a group of one on device 0: prints its name, or the status and the reason
 *   cases N    the case list over N ranks as threads; only where device memory is host memory (the fakes) */
#include "common/log.h"
#include "tests/coll/support_cases.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX = 8 };
typedef struct rank {
    pthread_t thread;
    td_coll *host;
    coll_tally t;
} rank;

static void *rank_main(void *arg)
{
    static char stream; /* any address: the fakes want one */
    rank *r = arg;
    coll_tally *t = &r->t;
    td_coll *c = NULL;
    int version = 0;
    C_IS(t, td_coll_nccl_open(r->host, 1, &stream, &version, &c), TD_ENOSUP);
    C_IS(t, td_coll_nccl_open(r->host, td_coll_rank(r->host) ? 0 : 5, &stream, &version, &c), TD_ENOSUP);
    C_OK(t, !c && !version);
    C_IS(t, td_coll_nccl_open(r->host, 0, &stream, &version, &c), TD_OK);
    C_OK(t, version > 20000 && !strcmp(td_coll_name(c), "nccl"));
    if (c) coll_cases(c, 70000, t);
    if (c) td_coll_abort(c, "a test");
    if (c) C_IS(t, td_coll_barrier(c), TD_EGONE);
    td_coll_close(c);
    td_coll_close(r->host);
    return NULL;
}

static int run_cases(int n)
{
    rank ranks[MAX] = {0};
    td_coll *ends[MAX];
    coll_tally all = {0};
    if (n < 1 || n > MAX || td_coll_threads_open(n, ends) < 0) return 2;
    for (int i = 0; i < n; i++) {
        ranks[i].host = ends[i];
        if (pthread_create(&ranks[i].thread, NULL, rank_main, &ranks[i])) abort();
    }
    for (int i = 0; i < n; i++) {
        pthread_join(ranks[i].thread, NULL);
        all.passed += ranks[i].t.passed;
        all.failed += ranks[i].t.failed;
    }
    printf("%d passed, %d failed\n", all.passed, all.failed);
    return all.failed != 0;
}

static int run_find(void)
{
    int version = 0;
    const char *path = NULL;
    if (td_coll_nccl_find(&version, &path) < 0) {
        printf("%s\n", td_reason());
        return 77;
    }
    printf("%d %s\n", version, path);
    return 0;
}

static int run_open(void)
{
    td_coll *host = NULL, *c = NULL;
    td_coll_self_open(&host);
    td_status s = td_coll_nccl_open(host, 0, NULL, NULL, &c);
    if (s < 0)
        printf("%s: %s\n", td_status_name(s), td_reason());
    else
        printf("%s\n", td_coll_name(c));
    td_coll_close(c);
    td_coll_close(host);
    return 0;
}

int main(int argc, char **argv)
{
    td_log_open("nccl", TD_LOG_ERROR);
    if (argc > 1 && !strcmp(argv[1], "find")) return run_find();
    if (argc > 1 && !strcmp(argv[1], "open")) return run_open();
    if (argc > 2 && !strcmp(argv[1], "cases")) return run_cases(atoi(argv[2]));
    return 2;
}
