/* common/pool.h - fixed team of compute threads; the caller is member 0.
 *
 * td_pool_for runs fn(arg, i, member) once for each i in [0, n). Items are handed out dynamically, so n
 * should be a few times the team size; results must not depend on who ran what. Members spin at most 50 us
 * for the next job, then block (workers share machines). Fork+join about 0.5 us while spinning.
 * Threads: one caller at a time. Limits: 256 members. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_POOL_H
#define TD_COMMON_POOL_H

typedef struct td_pool td_pool;
typedef void td_pool_fn(void *arg, int i, int member);

td_pool *td_pool_open(int n_threads); /* >= 1; 1 runs everything on the caller */
void td_pool_close(td_pool *p);
int td_pool_size(const td_pool *p);
void td_pool_for(td_pool *p, int n, td_pool_fn *fn, void *arg);

#endif
