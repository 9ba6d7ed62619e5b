/* tandem bench serve: an open-loop load of a server. Arrivals are a Poisson process of --request-rate (all at once when 0) or those of
 * a trace; each request is sent at its intended time whatever the others do, and its clock starts then. Prompts are token ids, so
 * their length is exact. */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "common/clock.h"
#include "common/conf.h"
#include "common/json.h"
#include "common/log.h"
#include "common/rng.h"
#include "deploy/cli/cli.h"
#include "deploy/cli/cluster_http.h"
#include "deploy/cli/cluster_stats.h"
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_POOL = 4096 };

typedef struct request {
    int64_t at_us; /* intended, relative to the start */
    uint32_t input_len, output_len;
    td_sample sample;
    td_event *event;
    uint32_t cap;
    struct bench *bench;
} request;

typedef struct bench {
    const td_conf *conf;
    td_client *client;
    char model[256];
    uint32_t pool[MAX_POOL]; /* ids that the model's tokenizer made: all inside the vocabulary */
    uint32_t n_pool;
    request *req;
    uint32_t n;
    int shown_error;
    FILE *table, *json; /* json: NULL: none */
} bench;

static uint32_t draw(const bench *b, uint32_t stream, uint32_t i)
{
    uint32_t key[2] = {(uint32_t)b->conf->seed, (uint32_t)(b->conf->seed >> 32)}, ctr[4] = {i, stream, 0, 0}, out[4];
    td_philox4x32(ctr, key, out);
    return out[0];
}

static void on_event(void *arg, const char *json, size_t n)
{
    request *r = arg;
    td_arena a;
    td_json *root;
    int64_t now = td_now_us();
    td_arena_init(&a, 4 << 20);
    if (td_json_parse(&a, json, n, (td_json_limits){0}, &root) == TD_OK) {
        const td_json *choice = td_json_at(td_json_get(root, "choices"), 0), *ids = td_json_get(choice, "token_ids");
        if (ids && ids->n) {
            if (r->sample.n_events == r->cap) {
                r->cap = r->cap ? 2 * r->cap : 64;
                r->event = td_xrealloc(r->event, r->cap * sizeof *r->event);
            }
            r->event[r->sample.n_events++] = (td_event){now, ids->n};
        }
        const td_json *usage = td_json_get(root, "usage");
        if (usage && usage->type == TD_JSON_OBJ) {
            r->sample.prompt_tokens = (uint32_t)td_json_int(usage, "prompt_tokens", 0);
            r->sample.output_tokens = (uint32_t)td_json_int(usage, "completion_tokens", 0);
        }
        if (td_json_get(root, "error")) r->sample.failed = 1;
    }
    td_arena_deinit(&a);
}

static void on_end(void *arg, td_status s, int http, const char *body, size_t n)
{
    request *r = arg;
    r->sample.event = r->event;
    if (s == TD_OK && http == 200) return;
    r->sample.failed = 1;
    if (r->bench->shown_error++ == 0) fprintf(stderr, "first failure: status %d %.*s\n", http, s == TD_OK ? (int)TD_MIN(n, 300) : 300, s == TD_OK ? body : td_reason());
}

static void send_request(bench *b, request *r, uint32_t index)
{
    td_buf body;
    td_buf_init(&body, 64 << 20);
    uint32_t shared = (uint32_t)(b->conf->shared_prefix * r->input_len);
    td_buf_str(&body, "{\"model\":");
    td_buf_json_str(&body, b->model, strlen(b->model));
    td_buf_fmt(&body, ",\"stream\":true,\"stream_options\":{\"include_usage\":true},\"return_token_ids\":true,\"ignore_eos\":true,");
    td_buf_fmt(&body, "\"temperature\":%g,\"seed\":%u,\"max_tokens\":%u,\"prompt\":[", b->conf->temperature, index, r->output_len);
    for (uint32_t i = 0; i < r->input_len; i++)
        td_buf_fmt(&body, "%s%u", i ? "," : "", b->pool[draw(b, i < shared ? 0 : index + 1, i) % b->n_pool]);
    td_buf_str(&body, "]}");
    td_client_call call = {.on_event = on_event, .on_end = on_end, .arg = r};
    td_client_start(b->client, "/v1/completions", body.p, body.len, &call);
    td_buf_deinit(&body);
}

/* Ids to make prompts from: what the tokenizer makes of a text; without a tokenizer, the first ids after the usual special ones. */
static td_status find_ids(bench *b)
{
    td_arena a;
    td_json *root;
    td_buf body;
    td_arena_init(&a, 16 << 20);
    td_buf_init(&body, 1 << 20);
    td_status s = td_client_ask(b->client, "/v1/models", NULL, 0, &a, &root);
    if (s == TD_AGAIN) s = TD_EIO;
    if (s == TD_OK) {
        snprintf(b->model, sizeof b->model, "%s",
                 b->conf->served_model_name[0] ? b->conf->served_model_name : td_json_str(td_json_at(td_json_get(root, "data"), 0), "id", ""));
        td_buf_str(&body, "{\"model\":");
        td_buf_json_str(&body, b->model, strlen(b->model));
        td_buf_str(&body, ",\"prompt\":\"");
        for (int i = 0; i < 400; i++) td_buf_fmt(&body, " word%d the of and %c%c to in", i, 'a' + i % 26, 'A' + i / 26 % 26);
        td_buf_str(&body, "\"}");
        if (td_client_ask(b->client, "/tokenize", body.p, body.len, &a, &root) == TD_OK)
            for (const td_json *id = td_json_get(root, "tokens") ? td_json_get(root, "tokens")->child : NULL; id && b->n_pool < MAX_POOL; id = id->next)
                b->pool[b->n_pool++] = (uint32_t)id->i;
        for (uint32_t i = 5; !b->n_pool || (b->n_pool < 200 && i < 205 && b->n_pool == i - 5); i++) b->pool[b->n_pool++] = i;
    }
    td_buf_deinit(&body);
    td_arena_deinit(&a);
    return s;
}

static void plan_poisson(bench *b)
{
    double t = 0;
    b->n = (uint32_t)b->conf->num_prompts;
    b->req = td_xalloc(b->n * sizeof *b->req);
    for (uint32_t i = 0; i < b->n; i++) {
        if (b->conf->request_rate > 0 && i) t += -log((draw(b, UINT32_MAX, i) + 0.5) / 4294967296.0) / b->conf->request_rate;
        b->req[i] = (request){.at_us = (int64_t)(t * 1e6), .input_len = (uint32_t)b->conf->input_len, .output_len = (uint32_t)b->conf->output_len, .bench = b};
    }
}

/* Mooncake JSON lines {"timestamp": ms, "input_length", "output_length"}, or Azure CSV "time,context,generated". */
static td_status plan_trace(bench *b)
{
    FILE *f = fopen(b->conf->trace, "r");
    if (!f) return td_fail(TD_EBADREQ, "cannot open trace %s", b->conf->trace);
    char line[1 << 16];
    td_arena a;
    b->req = td_xalloc((size_t)b->conf->num_prompts * sizeof *b->req);
    double first = -1;
    while (b->n < (uint32_t)b->conf->num_prompts && fgets(line, sizeof line, f)) {
        double t_s = 0, in = 0, out = 0;
        td_arena_init(&a, 1 << 20);
        td_json *root;
        if (line[0] == '{' && td_json_parse(&a, line, strlen(line), (td_json_limits){0}, &root) == TD_OK) {
            t_s = td_json_num(root, "timestamp", 0) / 1e3;
            in = td_json_num(root, "input_length", 0);
            out = td_json_num(root, "output_length", 0);
        } else {
            int y, mo, d, h, mi;
            double s;
            if (sscanf(line, "%d-%d-%d %d:%d:%lf,%lf,%lf", &y, &mo, &d, &h, &mi, &s, &in, &out) == 8) t_s = ((d * 24.0 + h) * 60 + mi) * 60 + s;
        }
        td_arena_deinit(&a);
        if (in < 1 || out < 1) continue;
        if (first < 0) first = t_s;
        b->req[b->n++] = (request){.at_us = (int64_t)((t_s - first) * 1e6), .input_len = (uint32_t)in, .output_len = (uint32_t)out, .bench = b};
    }
    fclose(f);
    return b->n ? TD_OK : td_fail(TD_EBADREQ, "trace %s has no request", b->conf->trace);
}

static void run(bench *b)
{
    int64_t start = td_now_us(), shown = start;
    uint32_t next = 0;
    while (next < b->n || td_client_active(b->client)) {
        int64_t now = td_now_us();
        int limit = b->conf->max_concurrency;
        while (next < b->n && start + b->req[next].at_us <= now && (!limit || td_client_active(b->client) < limit)) {
            request *r = &b->req[next];
            r->sample.t0_us = start + r->at_us;
            send_request(b, r, next++);
        }
        int wait = next < b->n ? (int)TD_MAX(0, TD_MIN(200, (start + b->req[next].at_us - now) / 1000)) : 200;
        td_client_turn(b->client, wait);
        if (now - shown > 2000000) {
            shown = now;
            fprintf(stderr, "%u of %u sent, %d running\n", next, b->n, td_client_active(b->client));
        }
    }
}

static void row(FILE *to, const char *name, const td_spread *s)
{
    fprintf(to, "  %-20s %9.2f %9.2f %9.2f %9.2f %9.2f   (%zu)\n", name, s->mean, s->p50, s->p90, s->p99, s->max, s->n);
}

static void json_spread(td_buf *b, const char *name, const td_spread *s)
{
    td_buf_fmt(b, "\"%s\":{\"n\":%zu,\"mean\":%.3f,\"p50\":%.3f,\"p90\":%.3f,\"p99\":%.3f,\"max\":%.3f},", name, s->n, s->mean, s->p50, s->p90, s->p99, s->max);
}

static void print_table(const bench *b, const td_report *r)
{
    FILE *to = b->table;
    fprintf(to, "\n%zu requests in %.2f s (%zu failed): %.2f req/s, %.1f output tok/s, %.1f total tok/s\n", r->n_ok, r->duration_s, r->n_failed,
            r->request_s, r->output_tok_s, r->total_tok_s);
    if (!r->n_ok) return;
    fprintf(to, "  %-20s %9s %9s %9s %9s %9s\n", "milliseconds", "mean", "p50", "p90", "p99", "max");
    row(to, "TTFT", &r->ttft);
    row(to, "TPOT", &r->tpot);
    row(to, "ITL by event", &r->itl_event);
    row(to, "ITL by token", &r->itl_token);
    row(to, "E2E", &r->e2e);
    if (b->conf->ttft_ms > 0 || b->conf->tpot_ms > 0)
        fprintf(to, "  goodput %.2f req/s: %zu of %zu within TTFT %g ms, TPOT %g ms\n", r->goodput_s, r->n_good, r->n_ok, b->conf->ttft_ms, b->conf->tpot_ms);
}

static td_status write_json(const bench *b, const td_report *r)
{
    td_buf j;
    if (!b->json) return TD_OK;
    td_buf_init(&j, 1 << 20);
    td_buf_fmt(&j, "{\"requests\":%zu,\"failed\":%zu,\"good\":%zu,\"duration_s\":%.3f,\"request_s\":%.3f,\"output_tok_s\":%.2f,\"total_tok_s\":%.2f,\"goodput_s\":%.3f,",
               r->n_ok, r->n_failed, r->n_good, r->duration_s, r->request_s, r->output_tok_s, r->total_tok_s, r->goodput_s);
    json_spread(&j, "ttft_ms", &r->ttft);
    json_spread(&j, "tpot_ms", &r->tpot);
    json_spread(&j, "itl_event_ms", &r->itl_event);
    json_spread(&j, "itl_token_ms", &r->itl_token);
    json_spread(&j, "e2e_ms", &r->e2e);
    td_buf_fmt(&j, "\"input_tokens\":%llu,\"output_tokens\":%llu}\n", (unsigned long long)r->prompt_tokens, (unsigned long long)r->output_tokens);
    bool written = fputs(j.p, b->json) >= 0 && !fflush(b->json);
    td_buf_deinit(&j);
    return written ? TD_OK : td_refuse(TD_EIO, "%s: %s", b->conf->json, strerror(errno));
}

/* JSON on stdout has it for itself. Opened before the load, not after it. */
static td_status open_outputs(bench *b)
{
    bool to_stdout = !strcmp(b->conf->json, "-");
    b->table = to_stdout ? stderr : stdout;
    if (b->conf->json[0]) b->json = to_stdout ? stdout : fopen(b->conf->json, "we");
    return b->conf->json[0] && !b->json ? td_refuse(TD_EIO, "%s: %s", b->conf->json, strerror(errno)) : TD_OK;
}

int cmd_bench_serve(int argc, char **argv)
{
    td_conf conf;
    bench b = {.conf = &conf};
    int n = 0;
    td_log_open("bench", TD_LOG_WARN);
    td_status s = td_conf_parse(&conf, TD_CONF_BENCH_SERVE, argc, argv, NULL, 0, &n);
    if (s == TD_AGAIN) return 0;
    if (s < 0) {
        fprintf(stderr, "tandem bench serve: %s\n", td_reason_take());
        return 2;
    }
    b.client = td_client_open(conf.url, conf.api_key, conf.tls_ca);
    s = open_outputs(&b);
    if (s == TD_OK) s = find_ids(&b);
    if (s == TD_OK) {
        if (conf.trace[0]) s = plan_trace(&b);
        else plan_poisson(&b);
    }
    td_report r = {0};
    if (s == TD_OK) {
        run(&b);
        td_sample *all = td_xalloc(b.n * sizeof *all);
        for (uint32_t i = 0; i < b.n; i++) all[i] = b.req[i].sample;
        td_report_make(all, b.n, conf.ttft_ms, conf.tpot_ms, &r);
        print_table(&b, &r);
        s = write_json(&b, &r);
        free(all);
    }
    if (s != TD_OK) fprintf(stderr, "tandem bench serve: %s\n", td_reason_take());
    if (b.json && b.json != stdout) fclose(b.json);
    for (uint32_t i = 0; i < b.n; i++) free(b.req[i].event);
    free(b.req);
    td_client_close(b.client);
    td_conf_deinit(&conf);
    return s == TD_OK && r.n_ok ? 0 : 1;
}
