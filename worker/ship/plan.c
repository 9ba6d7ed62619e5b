// SPDX-License-Identifier: Apache-2.0
#include "worker/ship/plan.h"
#include "common/check.h"
#include "proto/kvframe.h"

uint32_t td_ship_plan_first(int window, uint32_t hit, uint32_t n_tokens)
{
    uint32_t live = 0;
    if (window > 0 && n_tokens + 1 > (uint32_t)window) live = n_tokens + 1 - (uint32_t)window;
    return TD_MIN(TD_MAX(hit, live), n_tokens);
}

size_t td_ship_plan_token_bytes(const td_model_desc *d, int group, td_dtype kv)
{
    return 2 * (size_t)d->group[group].G * (size_t)d->group[group].D * td_dtype_bytes(kv);
}

td_status td_ship_plan_check(const td_model_desc *d, td_dtype kv)
{
    for (int g = 0; g < d->n_groups; g++) {
        size_t bytes = td_ship_plan_token_bytes(d, g, kv);
        if (bytes > TD_KVF_FRAME_BYTES)
            return td_refuse(TD_ENOSUP, "one token of page group %d has %zu bytes, a frame %d", g, bytes,
                             TD_KVF_FRAME_BYTES);
    }
    return TD_OK;
}

uint32_t td_ship_plan_max_frames(const td_model_desc *d, uint32_t n_tokens)
{
    uint64_t n = (uint64_t)d->L * ((uint64_t)n_tokens + 1);
    return n > 1u << 22 ? 1u << 22 : (uint32_t)n;
}
