/* router/core/request.c - the state table, token logs and timings. */
// SPDX-License-Identifier: Apache-2.0
#include "router/core/request.h"
#include "common/check.h"

#include <stdlib.h>
#include <string.h>

static const struct { const char *name; unsigned to; } states[] = {
#define X(name, to) {#name, to},
    TD_REQUEST_STATES(X)
#undef X
};

const char *td_request_state_name(td_req_state s)
{
    return (unsigned)s < TD_REQ_COUNT ? states[s].name : "?";
}

bool td_request_legal(td_req_state from, td_req_state to)
{
    return (unsigned)from < TD_REQ_COUNT && (unsigned)to < TD_REQ_COUNT && (states[from].to >> to & 1u);
}

bool td_request_go(td_request *r, td_req_state to, int64_t now_us)
{
    if (!td_request_legal(r->state, to)) {
        r->illegal++;
        TD_ASSERT(!"illegal request state change");
        return false;
    }
    r->state = to;
    r->entered_us = now_us;
    return true;
}

td_request *td_request_new(td_job *job, int64_t now_us, const td_tokenizer *t)
{
    td_request *r = td_xalloc(sizeof *r);
    uint32_t n = job->sampling.n;
    TD_CHECK(n >= 1 && n <= TD_MAX_CHOICES);
    r->job = job;
    r->state = TD_REQ_QUEUED;
    r->arrived_us = job->received_us ? job->received_us : now_us;
    r->entered_us = now_us;
    r->choice = td_xalloc(n * sizeof *r->choice);
    r->n_open = n;
    r->scores_due = job->sampling.prompt_logprobs >= 0;
    r->worker_queue_us = r->prefill_us = r->transfer_us = r->exposed_us = -1;
    for (uint32_t i = 0; i < n; i++) r->choice[i].stop_string = -1;
    if (t && job->want_text) r->speech = td_speech_open(t, job);
    return r;
}

void td_request_free(td_request *r)
{
    if (!r) return;
    TD_CHECK(!r->leases);
    for (uint32_t i = 0; i < r->job->sampling.n; i++) free(r->choice[i].ids);
    td_speech_close(r->speech);
    free(r->choice);
    free(r->gap_us);
    td_job_free(r->job);
    free(r);
}

bool td_request_excludes(const td_request *r, uint64_t incarnation)
{
    for (uint32_t i = 0; i < r->n_excluded; i++)
        if (r->excluded[i] == incarnation) return true;
    return false;
}

void td_request_exclude(td_request *r, uint64_t incarnation)
{
    if (td_request_excludes(r, incarnation)) return;
    if (r->n_excluded == TD_REQUEST_EXCLUDED) { /* forget the oldest: it had its turn long ago */
        memmove(r->excluded, r->excluded + 1, sizeof r->excluded - sizeof r->excluded[0]);
        r->n_excluded--;
    }
    r->excluded[r->n_excluded++] = incarnation;
}

bool td_choice_append(td_choice *c, uint32_t id, uint32_t limit)
{
    if (c->n >= limit) return false;
    if (c->n == c->cap) {
        c->cap = c->cap ? c->cap * 2 : 32;
        c->ids = td_xrealloc(c->ids, c->cap * sizeof *c->ids);
    }
    c->ids[c->n++] = id;
    return true;
}

td_finish td_choice_implied(const td_choice *c, const td_sampling *s)
{
    if (c->finish != TD_FINISH_NONE) return c->finish;
    if (c->n && c->n > s->min_tokens)
        for (uint32_t i = 0; i < s->n_stop_ids; i++)
            if (s->stop_ids[i] == c->ids[c->n - 1]) return TD_FINISH_STOP;
    return c->n >= s->max_tokens ? TD_FINISH_LENGTH : TD_FINISH_NONE;
}

void td_request_token_time(td_request *r, uint32_t choice, uint32_t n_new, int64_t now_us)
{
    r->tokens_out += n_new;
    if (choice != 0) return; /* intervals are those of one stream */
    if (!r->first_us) {
        r->first_us = r->last_us = now_us;
        return;
    }
    if (!r->second_us) r->second_us = now_us;
    if (!r->gap_us) r->gap_us = td_xalloc(TD_REQUEST_GAPS * sizeof *r->gap_us);
    int64_t gap = now_us - r->last_us;
    r->gap_us[r->n_gaps % TD_REQUEST_GAPS] = gap > UINT32_MAX ? UINT32_MAX : (uint32_t)gap;
    r->n_gaps++;
    r->gap_sum_us += (uint64_t)gap;
    r->last_us = now_us;
}

static int by_value(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

static double gap_p99_ms(const td_request *r)
{
    uint32_t n = r->n_gaps < TD_REQUEST_GAPS ? r->n_gaps : TD_REQUEST_GAPS;
    if (!n) return -1;
    uint32_t *v = td_xalloc(n * sizeof *v);
    memcpy(v, r->gap_us, n * sizeof *v);
    qsort(v, n, sizeof *v, by_value);
    double ms = v[(n * 99 + 99) / 100 - 1] / 1e3; /* nearest rank: ceil(0.99 n) */
    free(v);
    return ms;
}

static double span_ms(int64_t from, int64_t to) { return from && to ? (double)(to - from) / 1e3 : -1; }
static double dur_ms(int64_t us) { return us >= 0 ? (double)us / 1e3 : -1; }

void td_request_timings(const td_request *r, int64_t now_us, td_timings *out)
{
    double router_wait = span_ms(r->arrived_us, r->placed_us);
    *out = (td_timings){
        .queue_ms = router_wait < 0
                        ? -1
                        : router_wait + (r->worker_queue_us > 0 ? (double)r->worker_queue_us / 1e3 : 0),
        .prefill_ms = dur_ms(r->prefill_us),
        .transfer_ms = dur_ms(r->transfer_us),
        .transfer_exposed_ms = dur_ms(r->exposed_us),
        .ttft_ms = span_ms(r->arrived_us, r->first_us),
        .second_token_ms = span_ms(r->first_us, r->second_us),
        .itl_ms_mean = r->n_gaps ? (double)r->gap_sum_us / 1e3 / r->n_gaps : -1,
        .itl_ms_p99 = gap_p99_ms(r),
        .total_ms = (double)(now_us - r->arrived_us) / 1e3,
        .kv_bytes_shipped = r->kv_bytes,
    };
}

td_usage td_request_usage(const td_request *r)
{
    td_usage u = {r->job->n_prompt, 0, r->cached_tokens, r->attempt};
    for (uint32_t i = 0; i < r->job->sampling.n; i++) u.completion_tokens += r->choice[i].n;
    return u;
}
