// SPDX-License-Identifier: Apache-2.0
#include "tests/net/support_toy.h"
#include "common/check.h"
#include "common/clock.h"
#include "router/net/grpc_frame.h"
#include "router/net/sse.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum kind { TICK, STREAM, FLOOD, HANG, LATE_ABORT, TWO_TURNS, POSTED };

struct toy_job {
    toy *t;
    toy_job *next, *prev;
    td_exchange *x; /* NULL: the client left */
    enum kind kind;
    bool grpc;
    long n, sent, size, gap_us;
    int64_t next_us, deadline_us;
};

static void job_free(toy_job *j)
{
    if (j->prev) j->prev->next = j->next;
    else j->t->jobs = j->next;
    if (j->next) j->next->prev = j->prev;
    j->t->jobs_live--;
    free(j);
}

static void on_close(void *user)
{
    toy_job *j = user;
    j->t->lost++;
    j->x = NULL;
    if (j->kind != POSTED) job_free(j); /* a posted one is still owned by the other thread */
}

static toy_job *job_new(toy *t, td_exchange *x, enum kind kind)
{
    toy_job *j = td_xalloc(sizeof *j);
    *j = (toy_job){
        .t = t, .x = x, .kind = kind, .next = t->jobs, .deadline_us = INT64_MAX, .n = 1L << 60, .size = 16};
    if (t->jobs) t->jobs->prev = j;
    t->jobs = j;
    t->jobs_live++;
    td_exchange_set_user(x, j, on_close);
    return j;
}

static void reply_text(td_exchange *x, int status, const char *text)
{
    const td_header h[] = {{"Content-Type", "text/plain"}};
    td_exchange_reply(x, status, h, 1, text, strlen(text));
}

static void posted(void *arg)
{
    toy_job *j = arg;
    if (j->x) reply_text(j->x, 200, "posted");
    job_free(j);
}

static void *sleeper(void *arg)
{
    toy_job *j = arg;
    usleep((useconds_t)j->gap_us);
    td_net_post(j->t->net, posted, j);
    return NULL;
}

static void stream_some(toy_job *j, int64_t now)
{
    char text[64];
    char *block = td_xalloc((size_t)j->size + 1);
    while (j->sent < j->n && now >= j->next_us && (j->kind == FLOOD || td_exchange_unsent(j->x) < 65536)) {
        memset(block, 'x', (size_t)j->size);
        int k = snprintf(text, sizeof text, "%ld ", j->sent);
        memcpy(block, text, (size_t)TD_MIN(k, j->size));
        if (j->grpc) td_grpc_send(j->x, block, (size_t)j->size);
        else td_sse_event(j->x, block, (size_t)j->size);
        j->sent++;
        j->next_us += j->gap_us;
        if (j->kind == FLOOD && j->sent % 16 == 0) break;
    }
    free(block);
    long unsent = (long)td_exchange_unsent(j->x);
    if (unsent > atomic_load(&j->t->max_unsent)) atomic_store(&j->t->max_unsent, unsent);
    if (j->sent < j->n) return;
    if (j->grpc) {
        td_grpc_finish(j->x, TD_GRPC_OK, NULL);
    } else {
        td_sse_done(j->x);
        td_exchange_finish(j->x, NULL, 0);
    }
    job_free(j);
}

static void tick(void *arg)
{
    toy *t = arg;
    int64_t now = td_now_us();
    td_net_counts counts;
    td_net_get_counts(t->net, &counts);
    t->connections = counts.connections;
    t->exchanges = counts.exchanges;
    t->body_bytes = (long)counts.body_bytes;
    for (toy_job *j = t->jobs, *next; j; j = next) {
        next = j->next;
        if (j->grpc && now >= j->deadline_us) {
            td_grpc_finish(j->x, TD_GRPC_DEADLINE, "deadline passed");
            job_free(j);
        } else if (j->kind == STREAM || j->kind == FLOOD) {
            stream_some(j, now);
        } else if (j->kind == TICK && now >= j->next_us) {
            reply_text(j->x, 200, "ticked");
            job_free(j);
        } else if (j->kind == LATE_ABORT) {
            td_exchange_abort(j->x);
            job_free(j);
        } else if (j->kind == TWO_TURNS) {
            td_exchange_write(j->x, "two", 3);
            td_exchange_finish(j->x, NULL, 0);
            job_free(j);
        }
    }
}

static void show_headers(td_exchange *x)
{
    td_buf b;
    size_t n;
    td_buf_init(&b, 0);
    td_exchange_body(x, &n);
    const char *auth = td_exchange_header(x, "authorization"), *host = td_exchange_header(x, "host");
    td_buf_fmt(&b, "%s %s ? %s auth=%s host=%s h2=%d body=%zu peer=%d", td_exchange_method(x),
               td_exchange_path(x), td_exchange_query(x), auth ? auth : "-", host ? host : "-",
               td_exchange_is_h2(x), n, strncmp(td_exchange_peer(x), "127.0.0.1:", 10) == 0);
    reply_text(x, 200, b.p);
    td_buf_deinit(&b);
}

static void handle_grpc(toy *t, td_exchange *x)
{
    td_grpc_call call;
    if (!td_grpc_open(x, &call)) return;
    if (strcmp(call.service, "t.T")) {
        td_grpc_finish(x, TD_GRPC_UNIMPLEMENTED, "no such service");
    } else if (!strcmp(call.method, "Unary")) {
        td_grpc_send(x, call.msg, call.msg_len);
        td_grpc_finish(x, TD_GRPC_OK, NULL);
    } else if (!strcmp(call.method, "Lost")) {
        char text[32];
        snprintf(text, sizeof text, "%d", atomic_load(&t->lost));
        td_grpc_send(x, text, strlen(text));
        td_grpc_finish(x, TD_GRPC_OK, NULL);
    } else if (!strcmp(call.method, "Fail")) {
        char text[256] = "";
        memcpy(text, call.msg, TD_MIN(call.msg_len, sizeof text - 1));
        const char *why = strchr(text, ' ');
        td_grpc_finish(x, (td_grpc_status)atoi(text), why ? why + 1 : NULL);
    } else if (!strcmp(call.method, "Gen") || !strcmp(call.method, "Hang")) {
        char text[64] = "";
        memcpy(text, call.msg, TD_MIN(call.msg_len, sizeof text - 1));
        toy_job *j = job_new(t, x, call.method[0] == 'G' ? STREAM : HANG);
        j->grpc = true;
        j->next_us = td_now_us();
        if (call.timeout_us != INT64_MAX) j->deadline_us = td_now_us() + call.timeout_us;
        sscanf(text, "%ld %ld %ld", &j->n, &j->size, &j->gap_us);
    } else {
        td_grpc_finish(x, TD_GRPC_UNIMPLEMENTED, "no such method: 100 % \xc3\xa4");
    }
}

static void handler(void *arg, td_exchange *x)
{
    toy *t = arg;
    const char *path = td_exchange_path(x), *q = td_exchange_query(x);
    t->handled++;
    if (td_grpc_is(x)) {
        handle_grpc(t, x);
    } else if (!strcmp(path, "/echo")) {
        size_t n;
        const char *body = td_exchange_body(x, &n);
        td_exchange_reply(x, 200, NULL, 0, body, n);
    } else if (!strcmp(path, "/headers")) {
        show_headers(x);
    } else if (!strcmp(path, "/post")) {
        toy_job *j = job_new(t, x, POSTED);
        pthread_t id;
        j->gap_us = atol(q) * 1000;
        if (!pthread_create(&id, NULL, sleeper, j)) pthread_detach(id);
    } else if (!strcmp(path, "/tick")) {
        job_new(t, x, TICK)->next_us = td_now_us() + atol(q) * 1000;
    } else if (!strcmp(path, "/stream") || !strcmp(path, "/flood")) {
        toy_job *j = job_new(t, x, path[1] == 's' ? STREAM : FLOOD);
        j->next_us = td_now_us();
        if (j->kind == FLOOD) j->size = 65536;
        sscanf(q, "%ld,%ld,%ld", &j->n, &j->size, &j->gap_us);
        td_sse_start(x, NULL, 0);
    } else if (!strcmp(path, "/hang")) {
        job_new(t, x, HANG);
        td_exchange_drop_body(x);
    } else if (!strcmp(path, "/big")) {
        size_t n = (size_t)atol(q);
        char *p = td_xalloc(n + 1);
        memset(p, 'b', n);
        td_exchange_reply(x, 200, NULL, 0, p, n);
        free(p);
    } else if (!strcmp(path, "/abort")) {
        td_exchange_abort(x);
    } else if (!strcmp(path, "/late_abort") || !strcmp(path, "/two_turns")) {
        td_exchange_start(x, 200, NULL, 0);
        td_exchange_write(x, "one", 3);
        job_new(t, x, path[1] == 'l' ? LATE_ABORT : TWO_TURNS);
    } else if (!strcmp(path, "/stop")) {
        reply_text(x, 200, "stopping");
        td_net_stop(t->net);
    } else {
        reply_text(x, 404, "no such path");
    }
}

static void error_body(void *arg, int status, const char *what, td_buf *out)
{
    (void)arg;
    td_buf_fmt(out, "{\"error\":{\"code\":\"%d\",\"message\":", status);
    td_buf_json_str(out, what, strlen(what));
    td_buf_str(out, "}}");
}

static void *run(void *arg)
{
    td_net_run(((toy *)arg)->net);
    return NULL;
}

void toy_open(toy *t, td_net_opts o)
{
    memset(t, 0, sizeof *t);
    if (!o.host) o.host = "127.0.0.1";
    o.handler = handler;
    o.error_body = error_body;
    o.arg = t;
    TD_CHECK(td_net_open(&o, &t->net) == TD_OK);
    TD_CHECK(td_net_every(t->net, 2000, tick, t) == TD_OK);
    td_net_ports(t->net, &t->port, &t->grpc_port);
    TD_CHECK(!pthread_create(&t->thread, NULL, run, t));
}

void toy_close(toy *t)
{
    td_net_stop(t->net);
    pthread_join(t->thread, NULL);
    td_net_close(t->net);
}
