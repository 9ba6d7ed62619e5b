/* The ruler: scripted events must give the closed-form figures. */
// SPDX-License-Identifier: Apache-2.0
#include "deploy/cli/cluster_stats.h"
#include "tests/t.h"

int main(void)
{
    /* Intended at 0, first token at 10 ms, then 1 token after 2 ms, 3 tokens after 6 ms. */
    td_event a[] = {{10000, 1}, {12000, 1}, {18000, 3}};
    td_event b[] = {{25000, 1}}; /* one token: no TPOT */
    td_sample s[] = {{.t0_us = 0, .event = a, .n_events = 3, .prompt_tokens = 7, .output_tokens = 5},
                     {.t0_us = 5000, .event = b, .n_events = 1, .prompt_tokens = 3, .output_tokens = 1},
                     {.failed = 1}};
    td_report r;
    td_report_make(s, 3, 15, 3, &r);
    T_EQ(r.n_ok, 2);
    T_EQ(r.n_failed, 1);
    T_NEAR(r.ttft.mean, 15, 1e-9);
    T_NEAR(r.ttft.p50, 10, 1e-9);
    T_NEAR(r.ttft.p99, 20, 1e-9);
    T_EQ(r.tpot.n, 1);
    T_NEAR(r.tpot.mean, 2, 1e-9);
    T_EQ(r.itl_event.n, 2);
    T_NEAR(r.itl_event.mean * 2, r.e2e.p50 - 10, 1e-9); /* sum(ITL) = E2E - TTFT of the first */
    T_EQ(r.itl_token.n, 5 - 1);                          /* m - c_1 */
    T_NEAR(r.itl_token.max, 2, 1e-9);
    T_EQ(r.n_good, 1); /* the second missed its first token */
    T_NEAR(r.duration_s, 0.025, 1e-12);
    T_NEAR(r.output_tok_s, 6 / 0.025, 1e-6);
    T_NEAR(r.total_tok_s, 16 / 0.025, 1e-6);
    td_report_make(s, 2, 25, 1, &r);
    T_EQ(r.n_good, 1); /* the first is too slow per token */
    td_report_make(s, 0, 0, 0, &r);
    T_EQ(r.n_ok, 0);
    return T_DONE();
}
