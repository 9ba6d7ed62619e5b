// SPDX-License-Identifier: Apache-2.0
#include "worker/sched.h"
#include "common/check.h"

uint32_t td_sched_plan(td_sched_item *item, uint32_t n, td_sched_caps caps)
{
    uint32_t left = caps.max_rows, logits = caps.max_logits;
    for (uint32_t i = 0; i < n; i++) {
        item[i].rows = 0;
        if (!item[i].decode || !left || !logits) continue;
        item[i].rows = 1;
        left--;
        logits--;
    }
    for (uint32_t i = 0; i < n; i++) {
        if (item[i].decode || !left || !logits) continue;
        uint32_t rows = TD_MIN(item[i].want, left);
        if (caps.max_chunk) rows = TD_MIN(rows, caps.max_chunk);
        if (item[i].all_logits) rows = TD_MIN(rows, logits);
        item[i].rows = rows;
        left -= rows;
        logits -= item[i].all_logits ? rows : 1;
    }
    return left;
}
