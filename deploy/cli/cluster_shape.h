/* deploy/cli/cluster_shape.h - how the ranks of a worker divide a model, as `tandem serve` and `tandem
 * launch-worker` write it.
 *
 * Rules:   1. As text: "tp=2,pp=1,cp=1,dp=1,ep,fsdp", every part optional, sizes 1 where not given.
 *          2. A number of ranks alone: tensor parallel as far as heads and columns of the model can be
 *             divided, the rest pipeline stages.
 *          3. Ranks and shape together must agree. What the model does not allow is refused with the rule it
 *             breaks (worker/grid.h).
 * Threads: pure. Errors: TD_EBADREQ, TD_ENOSUP with td_reason(). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_DEPLOY_CLI_CLUSTER_SHAPE_H
#define TD_DEPLOY_CLI_CLUSTER_SHAPE_H

#include "common/conf.h"
#include "worker/model/model.h"
#include <stdbool.h>

typedef struct td_shape {
    int tp, pp, cp, dp;
    bool ep, fsdp;
} td_shape;

enum { TD_SHAPE_ARGS = 6 };

static inline long long td_shape_ranks(const td_shape *s) { return (long long)s->tp * s->pp * s->cp * s->dp; }
/* what: the option's name, for errors. */
td_status td_shape_parse(const char *what, const char *text, td_shape *out);
td_shape td_shape_of_conf(const td_conf *worker);
/* ranks 0: as the shape says. given: shape was asked for; else it is chosen (rule 2). d NULL: the model is
 * not known here, and only the numbers are compared. *shape is changed only on success. */
td_status td_shape_settle(const char *what, const td_model_desc *d, int ranks, bool given, td_shape *shape);
/* The worker's options that say so: at most TD_SHAPE_ARGS words, in the arena. The count; -1: arena full. */
int td_shape_args(const td_shape *s, td_arena *a, char **argv);

#endif
