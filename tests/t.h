/* tests/t.h - a small test harness: T_EQ and friends count; T_MAIN prints the cases and "N passed, N failed".
 * Exit status: 0 all passed, 1 some failed, 77 skipped (T_SKIP with the reason). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_T_H
#define TD_TESTS_T_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static int t_passed, t_failed;
#define T_OK(e, ...)                                                                  \
    do {                                                                              \
        if (e) t_passed++;                                                            \
        else if (t_failed++ < 50) {                                                   \
            printf("%s:%d: failed: %s ", __FILE__, __LINE__, #e);                     \
            printf(" " __VA_ARGS__);                                                  \
            printf("\n");                                                             \
        }                                                                             \
    } while (0)
#define T_EQ(a, b)                                                                                               \
    do {                                                                                                         \
        long long t_a = (long long)(a), t_b = (long long)(b);                                                    \
        T_OK(t_a == t_b, "%s = %lld, expected %lld", #a, t_a, t_b);                                              \
    } while (0)
#define T_STR(a, b)                                                                                              \
    do {                                                                                                         \
        const char *t_a = (a), *t_b = (b);                                                                       \
        T_OK(t_a && t_b && !strcmp(t_a, t_b), "got \"%s\", expected \"%s\"", t_a ? t_a : "(null)", t_b);         \
    } while (0)
#define T_NEAR(a, b, tol)                                                                                        \
    do {                                                                                                         \
        double t_a = (a), t_b = (b);                                                                             \
        T_OK(fabs(t_a - t_b) <= (tol), "%s = %g, expected %g", #a, t_a, t_b);                                    \
    } while (0)
/* CPU time of this process: grows with the work, not with the load of the machine. For loose limits that catch a
 * quadratic step. */
#define T_CPU_US() ((long long)((double)clock() * 1e6 / CLOCKS_PER_SEC))
#define T_SKIP(...) do { printf("SKIP: " __VA_ARGS__); printf("\n"); exit(77); } while (0)
#define T_DONE() (printf("%d passed, %d failed\n", t_passed, t_failed), t_failed != 0)

#endif
