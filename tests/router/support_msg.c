/* tests/router/support_msg.c - plain constructors. */
// SPDX-License-Identifier: Apache-2.0
#include "tests/router/support_msg.h"

td_msg support_hello(const char *name, td_role role, uint32_t vocab, uint32_t max_model_len, uint32_t eos)
{
    td_msg m = {.type = TD_MSG_HELLO};
    m.hello = (td_msg_hello){.name = name,
                             .bulk_endpoint = role == TD_ROLE_PREFILL ? "" : "tcp://x",
                             .build = "test",
                             .kernels = "toy",
                             .role = role,
                             .id = {.model_digest = {1, 2},
                                    .model = "m",
                                    .kv_dtype = "bf16",
                                    .numerics = "ref",
                                    .layers = 2,
                                    .kv_heads = 1,
                                    .head_dim = 8,
                                    .vocab = vocab,
                                    .max_model_len = max_model_len},
                             .page_size = 16,
                             .max_seqs = 16,
                             .max_batched_tokens = 512,
                             .kv_tokens = 100000,
                             .n_eos = 1,
                             .eos = {eos}};
    return m;
}

td_msg support_beat(td_wstate state, uint64_t step, bool busy)
{
    td_msg m = {.type = TD_MSG_HEARTBEAT};
    m.heartbeat = (td_msg_heartbeat){.seq = 1, .step = step, .state = state, .busy = busy};
    return m;
}

td_msg support_reserved(td_req_key key, uint64_t epoch, uint32_t hit, uint32_t credits, const char *endpoint)
{
    td_msg m = {.type = TD_MSG_RESERVED};
    m.reserved.key = key;
    m.reserved.epoch = epoch;
    m.reserved.hit_tokens = hit;
    m.reserved.credits = credits;
    m.reserved.endpoint = endpoint;
    return m;
}

td_msg support_busy(td_req_key key, uint32_t retry_ms, const char *why)
{
    td_msg m = {.type = TD_MSG_BUSY};
    m.busy.key = key;
    m.busy.retry_ms = retry_ms;
    m.busy.reason = why;
    return m;
}

td_msg support_tokens(const td_msg_tokens *one, uint64_t step)
{
    td_msg m = {.type = TD_MSG_TOKENS};
    m.tokens.step = step;
    m.tokens.list = (td_msg_tokens *)(uintptr_t)one;
    m.tokens.n = 1;
    return m;
}

td_msg support_prompt_done(td_req_key key, const td_msg_score *scores, uint32_t n)
{
    td_msg m = {.type = TD_MSG_PROMPT_DONE};
    m.prompt_done.key = key;
    m.prompt_done.cached_tokens = 3;
    m.prompt_done.queued_us = 2000;
    m.prompt_done.prefill_us = 4000;
    m.prompt_done.scores = (td_msg_score *)(uintptr_t)scores;
    m.prompt_done.n_scores = n;
    return m;
}

td_msg support_landed(td_req_key key, uint64_t bytes, int64_t transfer_us)
{
    td_msg m = {.type = TD_MSG_SHIP_REPORT};
    m.ship_report.key = key;
    m.ship_report.landed = true;
    m.ship_report.transfer_us = transfer_us;
    m.ship_report.exposed_us = transfer_us / 4;
    m.ship_report.bytes = bytes;
    m.ship_report.frames = 2;
    return m;
}

td_msg support_recomputed(td_req_key key, const char *why)
{
    td_msg m = {.type = TD_MSG_SHIP_REPORT};
    m.ship_report.key = key;
    m.ship_report.reason = why;
    return m;
}

td_msg support_ended(td_req_key key, td_finish finish, td_status status, const char *why, bool handed_off)
{
    td_msg m = {.type = TD_MSG_ENDED};
    m.ended.key = key;
    m.ended.finish = finish;
    m.ended.status = status;
    m.ended.reason = why;
    m.ended.handed_off = handed_off;
    return m;
}
