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
    uint32_t prompt = caps.max_prompt_rows ? caps.max_prompt_rows : caps.max_rows;
    for (uint32_t i = 0; i < n; i++) {
        if (item[i].decode || !left || !logits || !prompt) continue;
        uint32_t rows = TD_MIN(TD_MIN(item[i].want, left), prompt);
        if (caps.max_chunk) rows = TD_MIN(rows, caps.max_chunk);
        if (item[i].all_logits) rows = TD_MIN(rows, logits);
        item[i].rows = rows;
        left -= rows;
        prompt -= rows;
        logits -= item[i].all_logits ? rows : 1;
    }
    return left;
}

uint32_t td_sched_pipe_rows(uint64_t wanted, int stages, uint32_t least)
{
    if (stages < 2) return 0;
    uint64_t rows = wanted / (TD_SCHED_PIPE_STEPS * (uint64_t)(stages - 1));
    return (uint32_t)TD_MIN(TD_MAX(rows, (uint64_t)least), (uint64_t)UINT32_MAX);
}
