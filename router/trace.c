/* router/trace.c - the line. */
// SPDX-License-Identifier: Apache-2.0
#include "router/trace.h"
#include "common/buf.h"
#include "common/log.h"

#include <string.h>

enum { LINE_MAX_BYTES = 4096 };

static void put_name(td_buf *b, const char *key, td_fleet *f, uint64_t incarnation)
{
    const td_worker *w = incarnation ? td_fleet_find(f, incarnation) : NULL;
    td_buf_fmt(b, ", \"%s\": ", key);
    if (w) td_buf_json_str(b, w->name, strlen(w->name));
    else td_buf_str(b, "null");
}

static void put_ms(td_buf *b, const char *key, double ms)
{
    if (ms >= 0) td_buf_fmt(b, ", \"%s\": %.3f", key, ms);
}

static const char *outcome(const td_request *r)
{
    if (r->why != TD_WHY_NONE) return td_why_name(r->why);
    return r->choice[0].finish == TD_FINISH_LENGTH ? "length" : "stop";
}

void td_trace_request(const td_request *r, td_fleet *f, int64_t now_us)
{
    td_timings t;
    td_request_timings(r, now_us, &t);
    td_usage u = td_request_usage(r);
    td_buf b;
    td_buf_init(&b, LINE_MAX_BYTES);
    td_buf_str(&b, "{\"request\": ");
    td_buf_json_str(&b, r->job->name, strlen(r->job->name));
    td_buf_fmt(&b,
               ", \"finish\": \"%s\", \"prompt_tokens\": %u, \"cached_tokens\": %u, \"completion_tokens\": "
               "%u, \"n\": %u, \"attempts\": %u",
               outcome(r), u.prompt_tokens, u.cached_tokens, u.completion_tokens, r->job->sampling.n,
               r->attempt);
    put_name(&b, "prefill", f, r->prefill_worker);
    put_name(&b, "decode", f, r->decode_worker);
    put_ms(&b, "queue_ms", t.queue_ms);
    put_ms(&b, "prefill_ms", t.prefill_ms);
    put_ms(&b, "transfer_ms", t.transfer_ms);
    put_ms(&b, "transfer_exposed_ms", t.transfer_exposed_ms);
    put_ms(&b, "ttft_ms", t.ttft_ms);
    put_ms(&b, "second_token_ms", t.second_token_ms);
    put_ms(&b, "itl_ms_mean", t.itl_ms_mean);
    put_ms(&b, "itl_ms_p99", t.itl_ms_p99);
    put_ms(&b, "total_ms", t.total_ms);
    td_buf_fmt(&b, ", \"kv_bytes\": %llu}", (unsigned long long)t.kv_bytes_shipped);
    if (td_buf_ok(&b)) TD_INFO("access %s", b.p);
    td_buf_deinit(&b);
}
