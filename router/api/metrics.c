/* router/api/metrics.c - histograms, and one table per kind of name. */
// SPDX-License-Identifier: Apache-2.0
#include "router/api/metrics.h"
#include "common/check.h"
#include "router/api/api.h"

#include <stdlib.h>
#include <string.h>

enum { MAX_BUCKETS = 24 };
typedef struct histogram {
    const double *edge;
    unsigned n;
    uint64_t count[MAX_BUCKETS + 1];
    double sum;
} histogram;

/* Seconds; the token interval starts at 1 ms, where the usual first bucket of 10 ms is too coarse. */
static const double ttft_edge[] = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                                   1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
static const double itl_edge[] = {.001, .0025, .005, .01, .025, .05, .075, .1, .15, .2, .3,
                                  .4,   .5,    .75,  1,   2.5,  5,   7.5,  10, 20,  40, 80};
static const double e2e_edge[] = {.01, .05, .1, .3, .5, .8, 1,   1.5, 2,   2.5, 5,    10,
                                  15,  20,  30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680};
static const double token_edge[] = {1,    2,    5,     10,    20,    50,     100,    200,    500,    1000,
                                    2000, 5000, 10000, 20000, 50000, 100000, 200000, 500000, 1000000};
static const double n_edge[] = {1, 2, 5, 10, 20};

/* X(field, edges, tandem name, vllm name or NULL, help) */
#define HISTOGRAMS(X)                                                                                        \
    X(ttft, ttft_edge, "time_to_first_token_seconds", "time_to_first_token_seconds",                         \
      "From the complete request to its first token")                                                        \
    X(second, ttft_edge, "second_token_seconds", NULL,                                                       \
      "From the first to the second token: what a hand-off costs")                                           \
    X(itl, itl_edge, "inter_token_latency_seconds", "inter_token_latency_seconds",                           \
      "Between two deliveries of one stream")                                                                \
    X(tpot, itl_edge, "time_per_output_token_seconds", "request_time_per_output_token_seconds",              \
      "Mean time per token after the first")                                                                 \
    X(e2e, e2e_edge, "e2e_request_latency_seconds", "e2e_request_latency_seconds",                           \
      "From the complete request to its end")                                                                \
    X(queue, e2e_edge, "request_queue_time_seconds", "request_queue_time_seconds",                           \
      "Waiting in router and worker")                                                                        \
    X(prefill, e2e_edge, "request_prefill_time_seconds", "request_prefill_time_seconds",                     \
      "Computing the prompt")                                                                                \
    X(decode, e2e_edge, "request_decode_time_seconds", "request_decode_time_seconds",                        \
      "From the first token to the last")                                                                    \
    X(inference, e2e_edge, "request_inference_time_seconds", "request_inference_time_seconds",               \
      "From the end of the queues to the end")                                                                \
    X(transfer, ttft_edge, "kv_transfer_seconds", NULL, "Shipping the pages")                                \
    X(exposed, ttft_edge, "kv_transfer_exposed_seconds", NULL,                                               \
      "The part of shipping that computing did not hide")                                                    \
    X(prompt, token_edge, "request_prompt_tokens", "request_prompt_tokens", "Prompt tokens")                 \
    X(output, token_edge, "request_generation_tokens", "request_generation_tokens", "Generated tokens")      \
    X(longest, token_edge, "request_max_num_generation_tokens", "request_max_num_generation_tokens",         \
      "Generated tokens of the longest choice")                                                              \
    X(computed, token_edge, "request_prefill_kv_computed_tokens", "request_prefill_kv_computed_tokens",      \
      "Prompt tokens that were not cached")                                                                  \
    X(max, token_edge, "request_params_max_tokens", "request_params_max_tokens", "max_tokens asked for")     \
    X(n, n_edge, "request_params_n", "request_params_n", "Choices asked for")

struct td_metrics {
#define X(field, ...) histogram field;
    HISTOGRAMS(X)
#undef X
    uint64_t finished[3]; /* stop, length, abort or error */
    uint64_t aborted, errors;
};

td_metrics *td_metrics_open(void)
{
    td_metrics *m = td_xalloc(sizeof *m);
#define X(field, edges, ...) m->field.edge = edges, m->field.n = TD_COUNT(edges);
    HISTOGRAMS(X)
#undef X
    return m;
}

static void observe(histogram *h, double v, uint64_t times)
{
    unsigned i = 0;
    while (i < h->n && v > h->edge[i]) i++;
    h->count[i] += times;
    h->sum += v * (double)times;
}

static void observe_ms(histogram *h, double ms)
{
    if (ms >= 0) observe(h, ms / 1e3, 1);
}

void td_metrics_request(td_metrics *m, const td_request *r, int64_t now_us)
{
    td_timings t;
    td_request_timings(r, now_us, &t);
    uint32_t n = r->job->sampling.n, out = 0, longest = 0;
    for (uint32_t i = 0; i < n; i++) {
        const td_choice *c = &r->choice[i];
        out += c->n;
        longest = TD_MAX(longest, c->n);
        if (r->why != TD_WHY_NONE) continue;
        m->finished[c->finish == TD_FINISH_LENGTH]++;
    }
    if (r->why == TD_WHY_CANCELLED) m->aborted++;
    else if (r->why != TD_WHY_NONE) m->errors++;
    observe_ms(&m->ttft, t.ttft_ms);
    observe_ms(&m->second, t.second_token_ms);
    uint32_t gaps = TD_MIN(r->n_gaps, (uint32_t)TD_REQUEST_GAPS);
    for (uint32_t i = 0; i < gaps; i++) observe(&m->itl, r->gap_us[i] / 1e6, 1);
    if (r->why != TD_WHY_NONE) return;
    if (r->choice[0].n > 1 && r->last_us > r->first_us)
        observe(&m->tpot, (double)(r->last_us - r->first_us) / 1e6 / (r->choice[0].n - 1), 1);
    observe_ms(&m->e2e, t.total_ms);
    observe_ms(&m->queue, t.queue_ms);
    observe_ms(&m->prefill, t.prefill_ms);
    if (t.queue_ms >= 0) observe_ms(&m->inference, t.total_ms - t.queue_ms);
    if (r->first_us) observe(&m->decode, (double)(r->last_us - r->first_us) / 1e6, 1);
    observe_ms(&m->transfer, t.transfer_ms);
    observe_ms(&m->exposed, t.transfer_exposed_ms);
    observe(&m->prompt, r->job->n_prompt, 1);
    observe(&m->output, out, 1);
    observe(&m->longest, longest, 1);
    observe(&m->computed, r->job->n_prompt - TD_MIN(r->cached_tokens, r->job->n_prompt), 1);
    observe(&m->max, r->job->sampling.max_tokens, 1);
    observe(&m->n, n, 1);
}

/* ---- text ---- */

typedef struct sheet { td_buf *b; const char *model; } sheet; /* model: escaped for a label */

static void head(sheet *s, const char *prefix, const char *name, const char *type, const char *help)
{
    td_buf_fmt(s->b, "# HELP %s%s %s\n# TYPE %s%s %s\n", prefix, name, help, prefix, name, type);
}

static void one(sheet *s, const char *type, const char *name, double v, const char *help)
{
    head(s, "", name, type, help);
    td_buf_fmt(s->b, "%s ", name);
    td_buf_json_num(s->b, v);
    td_buf_chr(s->b, '\n');
}

static void put_histogram(sheet *s, const char *prefix, const char *name, const histogram *h,
                          const char *label, const char *help)
{
    head(s, prefix, name, "histogram", help);
    uint64_t sum = 0;
    for (unsigned i = 0; i <= h->n; i++) {
        sum += h->count[i];
        if (i < h->n)
            td_buf_fmt(s->b, "%s%s_bucket{%s%sle=\"%g\"} %llu\n", prefix, name, label, *label ? "," : "",
                       h->edge[i], (unsigned long long)sum);
        else
            td_buf_fmt(s->b, "%s%s_bucket{%s%sle=\"+Inf\"} %llu\n", prefix, name, label, *label ? "," : "",
                       (unsigned long long)sum);
    }
    td_buf_fmt(s->b, "%s%s_sum{%s} %.9g\n%s%s_count{%s} %llu\n", prefix, name, label, h->sum, prefix, name,
               label, (unsigned long long)sum);
}

static void escape(char *out, size_t n, const char *in)
{
    size_t k = 0;
    for (; *in && k + 3 < n; in++) {
        if (*in == '"' || *in == '\\') out[k++] = '\\';
        out[k++] = *in == '\n' ? ' ' : *in;
    }
    out[k] = 0;
}

static const char *role_name(td_role r)
{
    static const char *const name[] = {"none", "prefill", "decode", "mixed"};
    return name[r & 3];
}

typedef struct pool {
    uint64_t prompt_rows, preemptions, hit, query, prompt_kv_used, kv_total;
    uint32_t running, waiting;
    double usage;
} pool;

static pool sum_pool(const td_fleet *f)
{
    pool p = {0};
    int64_t used = 0, all = 0;
    for (unsigned i = 0; i < TD_INDEX_SLOTS; i++) {
        const td_worker *w = &f->w[i];
        if (!td_worker_alive(w)) continue;
        p.preemptions += w->beat.preemptions;
        p.hit += w->beat.hit_tokens;
        p.query += w->beat.query_tokens;
        p.running += w->beat.seqs_running;
        p.waiting += w->beat.legs_waiting;
        for (uint32_t g = 0; g < w->beat.n_groups; g++) {
            all += w->beat.ledger[g].total;
            used += w->beat.ledger[g].total - w->beat.ledger[g].free - w->beat.ledger[g].cached;
        }
        p.kv_total += w->kv_tokens;
    }
    p.usage = all > 0 ? (double)used / (double)all : 0;
    return p;
}

/* 1: nobody waits for another rank's experts. */
static void expert_rows(sheet *s, const td_fleet *f)
{
    static const char *const when[] = {"counted", "before", "after"};
    head(s, "", "tandem_eplb_imbalance", "gauge",
         "Load of the heaviest rank against the mean at the last balancing: as counted, and by its counts before "
         "and after");
    for (unsigned i = 0; i < TD_INDEX_SLOTS; i++) {
        const td_worker *w = &f->w[i];
        const td_msg_experts *x = &w->beat.experts;
        const double v[] = {x->counted, x->before, x->after};
        char name[140];
        escape(name, sizeof name, w->name);
        for (unsigned k = 0; td_worker_alive(w) && w->beat.has_experts && k < TD_COUNT(when); k++) {
            td_buf_fmt(s->b, "tandem_eplb_imbalance{worker=\"%s\",role=\"%s\",at=\"%s\"} ", name,
                       role_name(w->role), when[k]);
            td_buf_json_num(s->b, v[k]);
            td_buf_chr(s->b, '\n');
        }
    }
}

static void worker_rows(sheet *s, const td_fleet *f)
{
    static const struct { const char *name, *type, *help; int what; } rows[] = {
        {"tandem_worker_state", "gauge", "1 loading, 2 ready, 3 draining, 4 hung, 5 dead", 0},
        {"tandem_worker_leases", "gauge", "Parts of requests placed on the worker by this router", 1},
        {"tandem_worker_sequences", "gauge", "Sequences running", 2},
        {"tandem_worker_pending_tokens", "gauge", "Prompt tokens placed and not yet computed", 3},
        {"tandem_worker_steps_total", "counter", "Steps of the engine", 4},
        {"tandem_worker_prompt_rows_total", "counter", "Prompt rows computed", 5},
        {"tandem_worker_decode_rows_total", "counter", "Decode rows computed", 6},
        {"tandem_worker_preemptions_total", "counter", "Preemptions", 7},
        {"tandem_worker_kv_bytes_sent_total", "counter", "KV bytes sent", 8},
        {"tandem_worker_kv_frames_bad_total", "counter", "KV frames that failed their check", 9},
        {"tandem_worker_step_seconds", "gauge", "Mean length of a step", 10},
        {"tandem_worker_link_bytes_per_second", "gauge", "Best of the last shipments; 0: none yet", 11},
        {"tandem_eplb_balances_total", "counter", "Balancings of parallel experts", 12},
        {"tandem_eplb_experts_moved_total", "counter", "Experts that moved to another rank", 13},
        {"tandem_eplb_bytes_moved_total", "counter", "Bytes of experts that moved", 14},
        {"tandem_worker_discarded_rows_total", "counter", "Rows computed for choices that had ended by then", 15},
    };
    for (unsigned k = 0; k < TD_COUNT(rows); k++) {
        head(s, "", rows[k].name, rows[k].type, rows[k].help);
        for (unsigned i = 0; i < TD_INDEX_SLOTS; i++) {
            const td_worker *w = &f->w[i];
            if (w->state == TD_WORKER_NONE || w->replaced) continue;
            const td_msg_heartbeat *h = &w->beat;
            const double v[] = {(double)w->state,        w->n_leases,
                                h->seqs_running,         (double)w->pending_tokens,
                                (double)h->steps,         (double)h->prompt_rows,
                                (double)h->decode_rows,  (double)h->preemptions,
                                (double)h->bytes_sent,   (double)h->frames_bad,
                                (double)h->step_us / 1e6, td_fleet_link(w),
                                (double)h->experts.balanced, (double)h->experts.moved,
                                (double)h->experts.bytes,  (double)h->discarded_rows};
            char name[140];
            escape(name, sizeof name, w->name);
            td_buf_fmt(s->b, "%s{worker=\"%s\",role=\"%s\"} ", rows[k].name, name, role_name(w->role));
            td_buf_json_num(s->b, v[rows[k].what]);
            td_buf_chr(s->b, '\n');
        }
    }
    expert_rows(s, f);
    static const char *const kind[] = {"total",  "free",       "private", "shared",
                                       "cached", "in_transit", "pinned"};
    head(s, "", "tandem_kv_pages", "gauge", "Pages of a worker's page group by kind");
    for (unsigned i = 0; i < TD_INDEX_SLOTS; i++) {
        const td_worker *w = &f->w[i];
        char name[140];
        escape(name, sizeof name, w->name);
        for (uint32_t g = 0; td_worker_alive(w) && g < w->beat.n_groups; g++) {
            const td_msg_ledger *l = &w->beat.ledger[g];
            const int64_t v[] = {l->total,  l->free,       l->private_, l->shared,
                                 l->cached, l->in_transit, l->pinned};
            for (unsigned k = 0; k < TD_COUNT(kind); k++)
                td_buf_fmt(s->b, "tandem_kv_pages{worker=\"%s\",role=\"%s\",group=\"%u\",kind=\"%s\"} %lld\n",
                           name, role_name(w->role), g, kind[k], (long long)v[k]);
        }
    }
}

static void core_rows(sheet *s, const td_core_counts *n)
{
    const struct {
        const char *name; uint64_t v; const char *help;
    } rows[] = {
        {"tandem_requests_submitted_total", n->submitted, "Requests given to the core"},
        {"tandem_requests_done_total", n->done, "Requests that got their whole answer"},
        {"tandem_prompt_tokens_total", n->prompt_tokens, "Prompt tokens computed or found cached"},
        {"tandem_cached_prompt_tokens_total", n->cached_tokens, "Prompt tokens found cached"},
        {"tandem_generation_tokens_total", n->output_tokens, "Tokens delivered"},
        {"tandem_placements_pair_total", n->placed_pair, "Placements on a prefill and a decode worker"},
        {"tandem_placements_alone_total", n->placed_alone, "Placements on one worker"},
        {"tandem_handoffs_landed_total", n->landed, "Hand-offs whose pages arrived"},
        {"tandem_handoffs_recomputed_total", n->recomputed,
         "Hand-offs that the decode worker computed itself"},
        {"tandem_kv_bytes_shipped_total", n->kv_bytes, "KV bytes landed"},
        {"tandem_worker_messages_stale_total", n->stale_messages, "Messages about placements that are over"},
        {"tandem_worker_messages_unknown_total", n->unknown_messages,
         "Messages from strangers or of unknown kind"},
        {"tandem_worker_faults_total", n->faults, "Messages that broke the protocol"},
        {"tandem_token_mismatches_total", n->mismatches,
         "Tokens that differed from, or did not follow, those delivered"},
        {"tandem_workers_lost_total", n->workers_lost, "Workers that died or left"},
        {"tandem_workers_hung_total", n->workers_hung, "Workers whose step stood still"},
        {"tandem_workers_refused_total", n->workers_refused, "Workers of another model or numerics"},
    };
    for (unsigned i = 0; i < TD_COUNT(rows); i++)
        one(s, "counter", rows[i].name, (double)rows[i].v, rows[i].help);
    head(s, "", "tandem_requests_failed_total", "counter", "Requests that ended without their whole answer");
    for (int w = TD_WHY_BAD; w <= TD_WHY_INTERNAL; w++)
        td_buf_fmt(s->b, "tandem_requests_failed_total{why=\"%s\"} %llu\n", td_why_name((td_why)w),
                   (unsigned long long)n->failed[w]);
    static const char *const why[] = {
#define X(id, name) name,
        TD_REPLACE_MAP(X)
#undef X
    };
    head(s, "", "tandem_replacements_total", "counter",
         "Placements given up, the request being placed again");
    for (int w = 0; w < TD_REPLACE_COUNT; w++)
        td_buf_fmt(s->b, "tandem_replacements_total{reason=\"%s\"} %llu\n", why[w],
                   (unsigned long long)n->replaced[w]);
}

static void api_rows(sheet *s, td_api *a)
{
    uint64_t requests = 0, errors = 0, unknown = 0, gone = 0, refused = 0;
    for (unsigned i = 0; i < a->n_nets; i++) {
        requests += atomic_load(&a->nets[i].http_requests);
        errors += atomic_load(&a->nets[i].http_errors);
        unknown += atomic_load(&a->nets[i].unknown_fields);
        gone += atomic_load(&a->nets[i].clients_gone);
        refused += atomic_load(&a->nets[i].text_refused);
    }
    one(s, "counter", "tandem_http_requests_total", (double)requests, "HTTP and gRPC requests");
    one(s, "counter", "tandem_http_errors_total", (double)errors, "Answers that were errors");
    one(s, "counter", "tandem_request_fields_unknown_total", (double)unknown,
        "Fields of requests that nobody knows");
    one(s, "counter", "tandem_clients_gone_total", (double)gone,
        "Clients that left before their answer was complete");
    one(s, "counter", "tandem_text_refused_total", (double)refused,
        "Requests refused because the text pool was full");
    one(s, "gauge", "tandem_text_waiting", td_textpool_waiting(a->text),
        "Requests waiting for the text pool");
    one(s, "gauge", "tandem_ready", atomic_load(&a->ready) && !atomic_load(&a->draining),
        "1: a request can be completed");
}

static void vllm_rows(sheet *s, const td_metrics *m, const td_core_counts *n, const td_fleet *f,
                      uint32_t queued)
{
    char label[300];
    td_buf l;
    td_buf_init(&l, sizeof label);
    td_buf_fmt(&l, "model_name=\"%s\",engine=\"0\"", s->model);
    pool p = sum_pool(f);
    const struct {
        const char *type, *name; double v; const char *help;
    } rows[] = {
        {"gauge", "vllm:num_requests_running", p.running, "Sequences running"},
        {"gauge", "vllm:num_requests_waiting", (double)queued + p.waiting, "Requests waiting"},
        {"gauge", "vllm:kv_cache_usage_perc", p.usage, "KV pages in use, 1 is all"},
        {"counter", "vllm:prompt_tokens_total", (double)n->prompt_tokens, "Prompt tokens"},
        {"counter", "vllm:prompt_tokens_cached_total", (double)n->cached_tokens,
         "Prompt tokens found cached"},
        {"counter", "vllm:generation_tokens_total", (double)n->output_tokens, "Generated tokens"},
        {"counter", "vllm:prefix_cache_queries_total", (double)p.query,
         "Tokens looked for in the prefix cache"},
        {"counter", "vllm:prefix_cache_hits_total", (double)p.hit, "Tokens found there"},
        {"counter", "vllm:num_preemptions_total", (double)p.preemptions, "Preemptions"},
    };
    for (unsigned i = 0; i < TD_COUNT(rows); i++) {
        head(s, "", rows[i].name, rows[i].type, rows[i].help);
        td_buf_fmt(s->b, "%s{%s} ", rows[i].name, l.p);
        td_buf_json_num(s->b, rows[i].v);
        td_buf_chr(s->b, '\n');
    }
    head(s, "", "vllm:request_success_total", "counter", "Choices that ended, by reason");
    const struct {
        const char *reason;
        uint64_t v;
    } why[] = {
        {"stop", m->finished[0]}, {"length", m->finished[1]}, {"abort", m->aborted}, {"error", m->errors}};
    for (unsigned i = 0; i < TD_COUNT(why); i++)
        td_buf_fmt(s->b, "vllm:request_success_total{%s,finished_reason=\"%s\"} %llu\n", l.p, why[i].reason,
                   (unsigned long long)why[i].v);
    head(s, "", "vllm:cache_config_info", "gauge", "Page size and number of pages");
    uint32_t page = 0;
    for (unsigned i = 0; i < TD_INDEX_SLOTS && !page; i++)
        if (td_worker_alive(&f->w[i])) page = f->w[i].page_size;
    td_buf_fmt(s->b, "vllm:cache_config_info{%s,block_size=\"%u\",num_gpu_blocks=\"%llu\"} 1\n", l.p, page,
               (unsigned long long)(page ? p.kv_total / page : 0));
    head(s, "", "vllm:lora_requests_info", "gauge", "Adapters, of which there are none: schedulers look for the row");
    td_buf_fmt(s->b, "vllm:lora_requests_info{%s,max_lora=\"0\",running_lora_adapters=\"\",waiting_lora_adapters=\"\"} 0\n", l.p);
#define X(field, edges, name, vname, help)                           \
    {                                                                \
        const char *const v_ = vname;                                \
        if (v_) put_histogram(s, "vllm:", v_, &m->field, l.p, help); \
    }
    HISTOGRAMS(X)
#undef X
    td_buf_deinit(&l);
}

void td_metrics_render(const td_metrics *m, td_core *core, td_api *api, uint64_t bad_messages, int64_t now_us,
                       td_buf *out)
{
    (void)now_us;
    char model[300];
    escape(model, sizeof model, api->model.name);
    sheet s = {out, model};
    uint32_t queued, running, closing;
    td_core_load(core, &queued, &running, &closing);
    one(&s, "gauge", "tandem_requests_queued", queued, "Requests waiting for a worker");
    one(&s, "gauge", "tandem_requests_running", running, "Requests placed on workers");
    one(&s, "gauge", "tandem_requests_closing", closing, "Ended requests whose workers have not said so yet");
    one(&s, "counter", "tandem_worker_messages_bad_total", (double)bad_messages,
        "Messages that could not be read");
    core_rows(&s, td_core_counts_of(core));
    api_rows(&s, api);
    worker_rows(&s, td_core_fleet(core));
#define X(field, edges, name, vname, help) put_histogram(&s, "tandem_", name, &m->field, "", help);
    HISTOGRAMS(X)
#undef X
    vllm_rows(&s, m, td_core_counts_of(core), td_core_fleet(core), queued);
}

/* ---- the ledger ---- */

typedef struct live { uint32_t by_state[TD_REQ_COUNT], leases; uint64_t tokens; } live;

static void count_live(void *arg, const td_request *r)
{
    live *l = arg;
    l->by_state[r->state]++;
    for (const td_lease *k = r->leases; k; k = k->next_of_request) l->leases++;
    for (uint32_t i = 0; i < r->job->sampling.n; i++) l->tokens += r->choice[i].n;
}

static void put_worker(td_buf *b, const td_worker *w, int64_t now_us)
{
    const td_msg_heartbeat *h = &w->beat;
    td_buf_str(b, "{\"name\": ");
    td_buf_json_str(b, w->name, strlen(w->name));
    td_buf_fmt(b,
               ", \"incarnation\": \"%016llx\", \"role\": \"%s\", \"state\": \"%s\", \"beat_age_ms\": %lld, "
               "\"leases\": %u, \"sequences\": %u, "
               "\"pending_tokens\": %llu, \"kv_tokens\": %llu, \"kv_leased\": %llu, \"step\": %llu, "
               "\"busy\": %s, \"legs_waiting\": %u, "
               "\"legs_running\": %u, \"seqs_running\": %u, \"epochs_open\": %u, \"preemptions\": %llu, "
               "\"hit_tokens\": %llu, "
               "\"frames_sent\": %llu, \"frames_received\": %llu, \"bytes_sent\": %llu, \"frames_bad\": "
               "%llu, \"groups\": [",
               (unsigned long long)w->incarnation, role_name(w->role), td_worker_state_name(w->state),
               (long long)(now_us - w->beat_us) / 1000, w->n_leases, w->seqs,
               (unsigned long long)w->pending_tokens, (unsigned long long)w->kv_tokens,
               (unsigned long long)w->kv_leased, (unsigned long long)h->step, h->busy ? "true" : "false",
               h->legs_waiting, h->legs_running, h->seqs_running, h->epochs_open,
               (unsigned long long)h->preemptions, (unsigned long long)h->hit_tokens,
               (unsigned long long)h->frames_sent, (unsigned long long)h->frames_received,
               (unsigned long long)h->bytes_sent, (unsigned long long)h->frames_bad);
    for (uint32_t g = 0; g < h->n_groups && td_worker_alive(w);
         g++) { /* the pages of a dead process are gone */
        const td_msg_ledger *l = &h->ledger[g];
        td_buf_fmt(b,
                   "%s{\"total\": %lld, \"free\": %lld, \"private\": %lld, \"shared\": %lld, \"cached\": "
                   "%lld, \"in_transit\": %lld, \"pinned\": %lld}",
                   g ? ", " : "", (long long)l->total, (long long)l->free, (long long)l->private_,
                   (long long)l->shared, (long long)l->cached, (long long)l->in_transit,
                   (long long)l->pinned);
    }
    td_buf_str(b, "]}");
}

void td_ledger_render(td_core *core, int64_t now_us, td_buf *b)
{
    const td_fleet *f = td_core_fleet(core);
    bool any = false;
    td_buf_str(b, "{\"workers\": [");
    for (unsigned i = 0; i < TD_INDEX_SLOTS; i++) {
        if (f->w[i].state == TD_WORKER_NONE || f->w[i].replaced) continue;
        if (any) td_buf_str(b, ", ");
        any = true;
        put_worker(b, &f->w[i], now_us);
    }
    live l = {0};
    td_core_each(core, count_live, &l);
    uint32_t queued, running, closing;
    td_core_load(core, &queued, &running, &closing);
    td_buf_fmt(b, "], \"requests\": %u, \"leases\": %u, \"tokens\": %llu, \"states\": {",
               queued + running + closing, l.leases, (unsigned long long)l.tokens);
    for (int s = 0; s < TD_REQ_COUNT; s++)
        td_buf_fmt(b, "%s\"%s\": %u", s ? ", " : "", td_request_state_name((td_req_state)s), l.by_state[s]);
    td_buf_str(b, "}}");
}
