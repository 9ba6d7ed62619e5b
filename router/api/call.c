/* router/api/call.c - the life of a call on its net thread. */
// SPDX-License-Identifier: Apache-2.0
#include "router/api/call.h"
#include "common/check.h"
#include "common/clock.h"
#include "router/api/grpc.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/random.h>

enum { CALL_ARENA_BYTES = 128 << 20, ANSWER_MAX_BYTES = 256 << 20 };

void td_api_random_hex(char *out, size_t n)
{
    unsigned char raw[32];
    TD_CHECK(n <= sizeof raw && getrandom(raw, n, 0) == (ssize_t)n);
    for (size_t i = 0; i < n; i++) snprintf(out + 2 * i, 3, "%02x", raw[i]);
}

uint64_t td_api_random_u64(void)
{
    uint64_t v;
    TD_CHECK(getrandom(&v, sizeof v, 0) == sizeof v);
    return v;
}

/* A client may name its request: printable and short, else we do. */
static void name_request(td_call *c)
{
    const char *h = td_exchange_header(c->x, "x-request-id");
    size_t n = h ? strlen(h) : 0;
    bool ok = n > 0 && n < sizeof c->request_id;
    for (size_t i = 0; ok && i < n; i++) ok = h[i] > ' ' && h[i] < 127 && h[i] != '"' && h[i] != '\\';
    if (ok) memcpy(c->request_id, h, n + 1);
    else td_api_random_hex(c->request_id, 16);
}

static void left(void *user)
{
    td_call *c = user;
    c->x = NULL;
    atomic_fetch_add(&c->n->clients_gone, 1);
    td_call_cancel(c);
}

td_call *td_call_new(td_api_net *n, td_exchange *x, td_text_kind kind, const td_voice *v)
{
    td_call *c = td_xalloc(sizeof *c);
    c->n = n;
    c->x = x;
    c->kind = kind;
    c->voice = v;
    c->received_us = td_exchange_received_us(x);
    c->deadline_us = c->received_us + (int64_t)n->api->conf->request_timeout_s * 1000000;
    c->wrote_us = c->received_us;
    c->created = td_wall_s();
    td_arena_init(&c->arena, CALL_ARENA_BYTES);
    td_buf_init(&c->body, 0);
    td_buf_init(&c->reply, ANSWER_MAX_BYTES);
    td_buf_init(&c->scores, ANSWER_MAX_BYTES);
    name_request(c);
    snprintf(c->id, sizeof c->id, "%s-%.32s", kind == TD_TEXT_CHAT ? "chatcmpl" : "cmpl", c->request_id);
    c->next = n->calls;
    if (n->calls) n->calls->prev = c;
    n->calls = c;
    n->n_calls++;
    td_exchange_set_user(x, c, left);
    return c;
}

void td_call_free(td_call *c)
{
    td_api_net *n = c->n;
    if (c->prev) c->prev->next = c->next;
    else n->calls = c->next;
    if (c->next) c->next->prev = c->prev;
    n->n_calls--;
    uint32_t choices = c->parts ? c->n_jobs * c->ask.s.n : 0;
    for (uint32_t i = 0; i < choices; i++) {
        td_buf_deinit(&c->parts[i].text);
        for (int k = 0; k < 4; k++) td_buf_deinit(&c->parts[i].lp[k]);
        free(c->parts[i].ids);
    }
    for (uint32_t i = 0; c->jobs && i < c->n_jobs; i++) td_job_free(c->jobs[i]);
    for (uint32_t i = 0; c->echo_lp && i < 4 * c->n_jobs; i++) td_buf_deinit(&c->echo_lp[i]);
    free(c->held);
    td_grpc_call_free(c);
    td_buf_deinit(&c->body);
    td_buf_deinit(&c->reply);
    td_buf_deinit(&c->scores);
    td_arena_deinit(&c->arena);
    free(c);
}

bool td_api_tell_core(td_api_net *n, td_ask_core_kind kind, td_job *job, uint64_t id, td_call *call)
{
    td_ask_core *a = td_xalloc(sizeof *a);
    *a = (td_ask_core){.kind = kind, .job = job, .id = id, .from = n, .call = call};
    td_buf_init(&a->text, 0);
    if (td_chan_push(n->to_core, a)) return true;
    free(a);
    return false;
}

/* A full ring loses no cancel: the sweep tries again. */
void td_call_cancel(td_call *c)
{
    if (c->state != TD_CALL_RUNNING) return;
    for (uint32_t i = 0; i < c->n_jobs; i++)
        if (!c->job_done[i] && !td_api_tell_core(c->n, TD_CORE_CANCEL, NULL, c->job_ids[i], NULL)) return;
}

void td_call_over(td_call *c)
{
    c->x = NULL;
    if (c->n_open) td_call_cancel(c);
}

void td_call_reply(td_call *c, int status, const char *type, const td_buf *body)
{
    td_header h[] = {{"content-type", type}, {"x-request-id", c->request_id}};
    td_exchange_reply(c->x, status, h, 2, body->p, body->len);
}

void td_call_reply_error(td_call *c, const td_api_error *e)
{
    td_buf b;
    td_buf_init(&b, 0);
    td_api_error_json(&b, e);
    char retry[16];
    snprintf(retry, sizeof retry, "%u", e->retry_s);
    td_header h[] = {{"content-type", "application/json"},
                     {"x-request-id", c->request_id},
                     e->status == 401 ? (td_header){"www-authenticate", "Bearer"}
                                      : (td_header){"retry-after", retry}};
    td_exchange_reply(c->x, e->status, h, e->status == 401 || e->retry_s ? 3 : 2, b.p, b.len);
    td_buf_deinit(&b);
    atomic_fetch_add(&c->n->http_errors, 1);
}

static void fail(td_call *c, const td_api_error *e)
{
    if (!c->x) return;
    c->voice->fail(c, e);
    td_call_over(c);
}

/* ---- after the text pool ---- */

static void submit(td_call *c)
{
    c->state = TD_CALL_RUNNING;
    td_job **jobs = c->jobs;
    c->jobs = NULL; /* the core frees them from here on */
    uint32_t i = 0;
    for (; i < c->n_jobs; i++) {
        if (!td_api_tell_core(c->n, TD_CORE_SUBMIT, jobs[i], 0, NULL)) break;
        c->n_open++;
    }
    if (i == c->n_jobs) return;
    for (uint32_t k = i; k < c->n_jobs; k++) {
        c->job_done[k] = true;
        td_job_free(jobs[k]);
    }
    td_api_error e;
    td_api_fail(&e, 503, "overloaded", NULL, "the server is overloaded");
    e.retry_s = 1;
    fail(c, &e);
    if (!c->n_open) td_call_free(c);
}

static void parsed(void *arg)
{
    td_call *c = arg;
    atomic_fetch_add(&c->n->unknown_fields, c->ask.unknown);
    if (!c->x) {
        td_call_free(c);
    } else if (c->failed) {
        fail(c, &c->err);
        td_call_free(c);
    } else if (!c->n_jobs) { /* the text thread had the whole answer */
        c->voice->done(c, NULL);
        c->x = NULL;
        td_call_free(c);
    } else {
        submit(c);
    }
}

static void parse_job(void *arg)
{
    td_call *c = arg;
    td_call_parse_text(c);
    td_buf_deinit(&c->body);
    td_net_post(c->n->net, parsed, c);
}

void td_call_parse(td_call *c)
{
    size_t n;
    const char *body = td_exchange_body(c->x, &n);
    if (c->kind != TD_TEXT_GRPC) td_buf_add(&c->body, body, n); /* gRPC has put its message there */
    td_buf_str(&c->body, "");
    td_exchange_drop_body(c->x);
    if (atomic_load(&c->n->api->draining)) {
        td_api_fail(&c->err, 503, "draining", NULL, "the server is shutting down");
        c->err.retry_s = 1;
    } else if (!td_buf_ok(&c->body)) td_api_fail(&c->err, 413, NULL, NULL, "the request is too large");
    else if (td_textpool_submit(c->n->api->text, parse_job, c)) return;
    else {
        atomic_fetch_add(&c->n->text_refused, 1);
        td_api_fail(&c->err, 503, "overloaded", NULL, "too many requests are being read");
        c->err.retry_s = 1;
    }
    fail(c, &c->err);
    td_call_free(c);
}

/* ---- what the core says ---- */

static void add_up(td_call *c, const td_out *o)
{
    c->usage.prompt_tokens += o->usage.prompt_tokens;
    c->usage.completion_tokens += o->usage.completion_tokens;
    c->usage.cached_tokens += o->usage.cached_tokens;
    c->usage.placements = TD_MAX(c->usage.placements, o->usage.placements);
    if (o->timings.total_ms >= c->timings.total_ms) c->timings = o->timings;
}

void td_call_on_out(td_call *c, td_out *o)
{
    bool terminal = o->kind == TD_OUT_DONE || o->kind == TD_OUT_FAILED;
    if (terminal) {
        c->n_open--;
        c->job_done[o->part] = true;
        add_up(c, o);
    }
    if (c->x) {
        if (o->kind == TD_OUT_FAILED) {
            td_api_error e;
            td_api_error_of_out(&e, o);
            fail(c, &e);
        } else if (!terminal) {
            c->voice->out(c, o);
        } else if (!c->n_open) {
            c->voice->done(c, o);
            c->x = NULL;
        }
    }
    if (o != c->held) free(o);
    if (!c->n_open) td_call_free(c);
}

void td_call_report(void *arg)
{
    td_ask_core *a = arg;
    td_call *c = a->call;
    if (c->x) {
        bool json = a->kind == TD_CORE_LEDGER;
        td_call_reply(c, 200, json ? "application/json" : "text/plain; version=0.0.4; charset=utf-8",
                      &a->text);
        c->x = NULL;
    }
    td_buf_deinit(&a->text);
    free(a);
    td_call_free(c);
}

void td_api_from_core(void *arg)
{
    td_api_net *n = arg;
    td_chan_clear(n->from_core);
    for (td_out *o; (o = td_chan_pop(n->from_core));) td_call_on_out(o->client, o);
}

void td_api_every_second(void *arg)
{
    td_api_net *n = arg;
    td_grpc_health_changed(n);
    if (atomic_load(&n->api->draining)) td_grpc_watches_end(n);
    int64_t now = td_now_us(), quiet = (int64_t)n->api->conf->keepalive_s * 1000000;
    for (td_call *c = n->calls, *next; c; c = next) {
        next = c->next;
        if (c->state != TD_CALL_RUNNING) continue;
        if (!c->x) td_call_cancel(c); /* again, in case the ring was full */
        else if (c->voice->quiet && now - c->wrote_us >= quiet) {
            c->wrote_us = now;
            c->voice->quiet(c);
        }
    }
}
