/* router/api/openai.h - the answer in OpenAI's JSON: one object, or a stream of chunks. Threads: net. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_API_OPENAI_H
#define TD_ROUTER_API_OPENAI_H

#include "router/api/call.h"

extern const td_voice td_voice_openai; /* chat, completion; streaming or not */
extern const td_voice td_voice_plain;  /* the text thread made the whole answer */

/* Shared with grpc.c: append what a delta brings to the choice's account. */
void td_answer_add(td_call *c, td_answer *p, const td_out *o);

#endif
