/* router/api/grpc.h - tandem.v1.Inference and grpc.health.v1.Health over gRPC.
 *
 * Rules:   1. Errors are gRPC statuses, never fields. A passed deadline is DEADLINE_EXCEEDED as trailers.
 *          2. Messages are size-checked before they are unpacked, and unpacked into an arena with a limit.
 * Threads: td_grpc_handle on net; td_grpc_parse_text on a text thread. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_API_GRPC_H
#define TD_ROUTER_API_GRPC_H

#include "router/api/call.h"

void td_grpc_handle(td_api_net *n, td_exchange *x);
bool td_grpc_parse_text(td_call *c, td_arena *scratch);
/* Once a second: tell watchers of the health service what has changed. */
void td_grpc_health_changed(td_api_net *n);
void td_grpc_watches_end(td_api_net *n); /* a drain begins */
void td_grpc_call_free(td_call *c);

#endif
