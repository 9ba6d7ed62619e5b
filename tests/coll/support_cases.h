/* tests/coll/support_cases.h - what every back end must do, run by each rank over its end of the group. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_COLL_CASES_H
#define TD_TESTS_COLL_CASES_H

#include "worker/coll/coll.h"

typedef struct coll_tally { /* of one rank */
    int passed, failed;
} coll_tally;

/* Where messages lie: malloc, unless a program for devices says otherwise. settle: what this rank's calls
 * enqueued is done (they return when it is, but on devices). */
typedef struct coll_memory {
    void *(*alloc)(size_t bytes);
    void (*free)(void *p);
    void (*settle)(void);
} coll_memory;
extern coll_memory coll_mem;

/* All operations over c, its splits and theirs. big: the largest message in bytes. */
void coll_cases(td_coll *c, size_t big, coll_tally *t);

/* One check of one rank; prints the first few failures. */
void coll_check(coll_tally *t, int ok, const char *file, int line, const char *what);
#define C_OK(t, e) coll_check(t, (e) != 0, __FILE__, __LINE__, #e)
#define C_IS(t, e, status) coll_check(t, (e) == (status), __FILE__, __LINE__, #e " is " #status)

#endif
