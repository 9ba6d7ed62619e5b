/* tests/router/support_msg.h - what a worker says, for every mock of one: by hand (test_core), in virtual
 * time (support_sim), over sockets (support_api). Fields that a test is about are set by the test. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_ROUTER_SUPPORT_MSG_H
#define TD_TESTS_ROUTER_SUPPORT_MSG_H

#include "common/wire/msg.h"

/* A worker of a model of two layers and `vocab` ids; eos ends its texts. */
td_msg support_hello(const char *name, td_role role, uint32_t vocab, uint32_t max_model_len, uint32_t eos);
td_msg support_beat(td_wstate state, uint64_t step, bool busy);
td_msg support_reserved(td_req_key key, uint64_t epoch, uint32_t hit, uint32_t credits, const char *endpoint);
td_msg support_busy(td_req_key key, uint32_t retry_ms, const char *why);
td_msg support_tokens(const td_msg_tokens *one, uint64_t step); /* borrowed */
td_msg support_prompt_done(td_req_key key, const td_msg_score *scores, uint32_t n);
td_msg support_landed(td_req_key key, uint64_t bytes, int64_t transfer_us);
td_msg support_recomputed(td_req_key key, const char *why);
td_msg support_ended(td_req_key key, td_finish finish, td_status status, const char *why, bool handed_off);

#endif
