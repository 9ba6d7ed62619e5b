/* kernels/moe.h - internal: what the CPU families' routers share.
 *
 * Rules:   1. The k largest logits in descending order, ties to the lower id: softmax keeps the order, so the
 * choice is made before anything is rounded.
 *          2. A row with NaN still gets k distinct ids below n. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_MOE_H
#define TD_KERNELS_MOE_H

#include "kernels/family.h"

static inline void td_moe_top(const float *score, int n, int k, int32_t *ids, float *value)
{
    int have = 0;
    for (int e = 0; e < n; e++) {
        float s = score[e];
        if (have == k && !(s > value[k - 1])) continue;
        int at = have < k ? have++ : k - 1;
        for (; at > 0 && s > value[at - 1]; at--) value[at] = value[at - 1], ids[at] = ids[at - 1];
        value[at] = s, ids[at] = e;
    }
}

/* Softmax over all, then renormalised over the chosen, is softmax over the chosen. */
static inline bool td_moe_over_top(const td_route_law *law)
{
    return law->score == TD_ROUTE_SOFTMAX_TOP || law->renormalise;
}

#endif
