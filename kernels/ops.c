// SPDX-License-Identifier: Apache-2.0
/* kernels/ops.c - the families of this build and CPU, best last in `all`, and the check that precedes their use. */
#include "common/check.h"
#include "common/log.h"
#include "kernels/family.h"
#include <math.h>
#include <pthread.h>
#include <stdlib.h>

enum { MAX_FAMILIES = 5 };

typedef struct family {
    const char *name, *numerics;
    const char *needs; /* for the error text */
    bool (*supported)(void);
    void (*fill)(td_ops *t);
} family;

static bool always(void)
{
    return true;
}

static void fill_ref(td_ops *t)
{
    td_gemm_fill_ref(t);
    td_attn_fill_ref(t);
    td_norm_rope_fill_ref(t);
    td_act_fill_ref(t);
    td_embed_fill_ref(t);
    td_sample_fill_ref(t);
}

static const family families[] = {
    {"ref", "cpu-ref-f32", "nothing", always, fill_ref},
};

static td_ops tables[MAX_FAMILIES];
static const td_ops *available[MAX_FAMILIES];
static int n_available;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static void fill_tables(void)
{
    for (size_t i = 0; i < TD_COUNT(families); i++) {
        if (!families[i].supported()) continue;
        td_ops *t = &tables[i];
        fill_ref(t);
        families[i].fill(t);
        t->family = families[i].name;
        t->numerics = families[i].numerics;
        available[n_available++] = t;
    }
}

const td_ops *td_ops_family(int i)
{
    pthread_once(&once, fill_tables);
    return i >= 0 && i < n_available ? available[i] : NULL;
}

static const td_ops *find(const char *name)
{
    for (int i = 0; i < n_available; i++)
        if (!strcmp(available[i]->family, name)) return available[i];
    return NULL;
}

td_status td_ops_open(const char *name, const td_ops **out)
{
    pthread_once(&once, fill_tables);
    if (strcmp(name, "auto")) {
        for (size_t i = 0; i < TD_COUNT(families); i++) {
            if (strcmp(families[i].name, name)) continue;
            const td_ops *t = find(name);
            if (!t) return td_fail(TD_ENOSUP, "kernel family \"%s\" needs a CPU with %s", name, families[i].needs);
            *out = t;
            return TD_OK;
        }
        return td_fail(TD_ENOSUP, "kernel family \"%s\" is not in this build", name);
    }
    *out = available[n_available - 1];
    return TD_OK;
}
