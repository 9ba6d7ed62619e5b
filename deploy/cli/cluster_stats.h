/* deploy/cli/cluster_stats.h - client-side latency figures from token events, as defined in the literature.
 *
 * t0 = intended send time (open loop), event j brings c_j >= 1 tokens at e_j, m tokens in all (as the server counts):
 *   TTFT = e_1 - t0     E2E = e_last - t0     TPOT = (e_last - e_1) / (m - 1), only for m >= 2
 *   ITL by event = e_j - e_(j-1)              ITL by token = (e_j - e_(j-1)) / c_j, c_j times
 * so that sum(ITL by event) = E2E - TTFT and count(ITL by token) = m - c_1.
 * goodput = requests within both limits / duration. Source: DistServe (OSDI 24), Sarathi-Serve (OSDI 24).
 * Threads: pure. Units: microseconds in, milliseconds out. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_DEPLOY_CLI_CLUSTER_STATS_H
#define TD_DEPLOY_CLI_CLUSTER_STATS_H

#include <stddef.h>
#include <stdint.h>

typedef struct td_event { int64_t t_us; uint32_t n; } td_event;
typedef struct td_sample { /* one finished request */
    int64_t t0_us;
    const td_event *event;
    uint32_t n_events, prompt_tokens, output_tokens;
    int failed;
} td_sample;

typedef struct td_spread { size_t n; double mean, p50, p90, p99, max; } td_spread; /* ms */
typedef struct td_report {
    td_spread ttft, tpot, itl_event, itl_token, e2e;
    size_t n_ok, n_failed, n_good;
    uint64_t prompt_tokens, output_tokens;
    double duration_s, request_s, output_tok_s, total_tok_s, goodput_s;
} td_report;

/* limits in ms; 0: none. Percentiles: nearest rank. */
void td_report_make(const td_sample *s, size_t n, double ttft_limit_ms, double tpot_limit_ms, td_report *out);

#endif
