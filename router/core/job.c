/* router/core/job.c - birth and death of jobs. */
// SPDX-License-Identifier: Apache-2.0
#include "router/core/job.h"
#include "common/check.h"

#include <stdlib.h>

td_job *td_job_new(size_t arena_max_bytes)
{
    td_job *j = td_xalloc(sizeof *j);
    td_arena_init(&j->arena, arena_max_bytes);
    j->skip_special = true;
    return j;
}

void td_job_free(td_job *j)
{
    if (!j) return;
    td_arena_deinit(&j->arena);
    free(j);
}

const char *td_why_name(td_why w)
{
    static const char *const name[] = {
#define X(n) #n,
        TD_WHY_MAP(X)
#undef X
    };
    return (unsigned)w < TD_COUNT(name) ? name[w] : "?";
}
