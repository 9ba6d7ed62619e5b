// SPDX-License-Identifier: Apache-2.0
#include "deploy/cli/cluster_stats.h"
#include "common/check.h"
#include <stdlib.h>

typedef struct list { double *v; size_t n, cap; } list;

static void push(list *l, double v)
{
    if (l->n == l->cap) {
        l->cap = l->cap ? 2 * l->cap : 1024;
        l->v = td_xrealloc(l->v, l->cap * sizeof *l->v);
    }
    l->v[l->n++] = v;
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double rank(const list *l, double p)
{
    size_t i = (size_t)(p * (double)l->n + 0.999999999);
    return l->v[i ? i - 1 : 0];
}

static td_spread spread(list *l)
{
    td_spread s = {.n = l->n};
    if (l->n) {
        double sum = 0;
        qsort(l->v, l->n, sizeof *l->v, ascending);
        for (size_t i = 0; i < l->n; i++) sum += l->v[i];
        s.mean = sum / (double)l->n;
        s.p50 = rank(l, 0.50);
        s.p90 = rank(l, 0.90);
        s.p99 = rank(l, 0.99);
        s.max = l->v[l->n - 1];
    }
    free(l->v);
    return s;
}

void td_report_make(const td_sample *s, size_t n, double ttft_limit_ms, double tpot_limit_ms, td_report *out)
{
    list ttft = {0}, tpot = {0}, by_event = {0}, by_token = {0}, e2e = {0};
    td_report r = {0};
    int64_t first = INT64_MAX, last = INT64_MIN;
    for (size_t i = 0; i < n; i++) {
        const td_sample *q = &s[i];
        if (q->failed || !q->n_events) {
            r.n_failed++;
            continue;
        }
        int64_t e1 = q->event[0].t_us, en = q->event[q->n_events - 1].t_us;
        double t = (double)(e1 - q->t0_us) / 1e3;
        double per = q->output_tokens >= 2 ? (double)(en - e1) / 1e3 / (q->output_tokens - 1) : 0;
        push(&ttft, t);
        push(&e2e, (double)(en - q->t0_us) / 1e3);
        if (q->output_tokens >= 2) push(&tpot, per);
        for (uint32_t j = 1; j < q->n_events; j++) {
            double gap = (double)(q->event[j].t_us - q->event[j - 1].t_us) / 1e3;
            push(&by_event, gap);
            for (uint32_t k = 0; k < q->event[j].n; k++) push(&by_token, gap / q->event[j].n);
        }
        r.n_ok++;
        r.n_good += (ttft_limit_ms <= 0 || t <= ttft_limit_ms) && (tpot_limit_ms <= 0 || per <= tpot_limit_ms);
        r.prompt_tokens += q->prompt_tokens;
        r.output_tokens += q->output_tokens;
        first = TD_MIN(first, q->t0_us);
        last = TD_MAX(last, en);
    }
    r.duration_s = r.n_ok ? (double)(last - first) / 1e6 : 0;
    double d = r.duration_s > 0 ? r.duration_s : 1;
    r.request_s = (double)r.n_ok / d;
    r.output_tok_s = (double)r.output_tokens / d;
    r.total_tok_s = (double)(r.output_tokens + r.prompt_tokens) / d;
    r.goodput_s = (double)r.n_good / d;
    r.ttft = spread(&ttft);
    r.tpot = spread(&tpot);
    r.itl_event = spread(&by_event);
    r.itl_token = spread(&by_token);
    r.e2e = spread(&e2e);
    *out = r;
}
