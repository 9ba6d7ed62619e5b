/* router/api/metrics.h - what the router counts, as Prometheus text (0.0.4) and the ledger as JSON.
 *
 * tandem_* are our names; vllm:* are the names dashboards and schedulers already read, summed over the pool.
 * Threads: core. Source: reference notes, engines D1 and D4. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_API_METRICS_H
#define TD_ROUTER_API_METRICS_H

#include "common/buf.h"
#include "router/core/router.h"

typedef struct td_metrics td_metrics;
struct td_api;

td_metrics *td_metrics_open(void);
void td_metrics_request(td_metrics *m, const td_request *r, int64_t now_us); /* it had its terminal event */
void td_metrics_render(const td_metrics *m, td_core *core, struct td_api *api, uint64_t bad_messages,
                       int64_t now_us, td_buf *out);
/* {"workers": [...], "requests": N live, "leases": N, "states": {...}}: every page group of every worker,
 * from its last heartbeat. */
void td_ledger_render(td_core *core, int64_t now_us, td_buf *out);

#endif
