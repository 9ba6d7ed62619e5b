/* tandem chat: one question (-p TEXT) or a conversation, against a server (--url) or a model directory, for which a local cluster is
 * started. Each answer is streamed and followed by its timings as the server measured them. */
// SPDX-License-Identifier: Apache-2.0
#include "common/clock.h"
#include "common/json.h"
#include "common/log.h"
#include "deploy/cli/cli.h"
#include "deploy/cli/cluster_http.h"
#include "deploy/cli/cluster_local.h"
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

enum { WAIT_SERVER_US = 20 * 1000000, TELL_US = 1000000 };

typedef struct talk {
    td_client *client;
    const td_conf *conf;
    char model[256];
    td_buf history; /* the messages so far, as a JSON array without brackets */
    td_buf answer;
    td_buf timings; /* JSON of the last event's timings and usage */
    bool ended, show;
    td_status s;
    int http;
} talk;

static volatile sig_atomic_t interrupted;
static void on_int(int sig) { (void)sig, interrupted = 1; }

static void print_ms(const td_json *t, const char *key, const char *label)
{
    printf("  %-28s %9.2f ms\n", label, td_json_num(t, key, 0));
}

static void print_timings(const td_json *root)
{
    const td_json *t = td_json_get(root, "timings"), *u = td_json_get(root, "usage");
    if (!t) return;
    const td_json *itl = td_json_get(t, "itl_ms");
    printf("\n");
    print_ms(t, "queue_ms", "queue");
    print_ms(t, "prefill_ms", "prefill");
    print_ms(t, "transfer_ms", "KV transfer");
    print_ms(t, "transfer_exposed_ms", "  of it not hidden");
    print_ms(t, "ttft_ms", "time to first token");
    print_ms(t, "second_token_ms", "first to second token");
    print_ms(itl, "mean", "between tokens, mean");
    print_ms(itl, "p99", "between tokens, p99");
    printf("  %-28s %9lld bytes\n", "KV shipped", (long long)td_json_int(t, "kv_bytes_shipped", 0));
    if (u) {
        const td_json *d = td_json_get(u, "prompt_tokens_details");
        printf("  %-28s %lld prompt (%lld cached), %lld generated\n", "tokens", (long long)td_json_int(u, "prompt_tokens", 0),
               (long long)td_json_int(d, "cached_tokens", 0), (long long)td_json_int(u, "completion_tokens", 0));
    }
}

static void on_event(void *arg, const char *json, size_t n)
{
    talk *t = arg;
    td_arena a;
    td_json *root;
    td_arena_init(&a, 16 << 20);
    if (td_json_parse(&a, json, n, (td_json_limits){0}, &root) == TD_OK) {
        const td_json *choice = td_json_at(td_json_get(root, "choices"), 0);
        const td_json *text = td_json_get(td_json_get(choice, "delta"), "content");
        if (text && text->type == TD_JSON_STR) {
            fwrite(text->s, 1, text->n, stdout);
            fflush(stdout);
            td_buf_add(&t->answer, text->s, text->n);
        }
        const td_json *err = td_json_get(root, "error");
        if (err) fprintf(stderr, "\nerror: %s\n", td_json_str(err, "message", "?")), t->s = TD_EIO;
        if (td_json_get(root, "timings")) {
            td_buf_reset(&t->timings);
            td_buf_add(&t->timings, json, n);
        }
    }
    td_arena_deinit(&a);
}

static void on_end(void *arg, td_status s, int http, const char *body, size_t n)
{
    talk *t = arg;
    t->ended = true;
    if (t->s == TD_OK) t->s = s;
    t->http = http;
    if (s != TD_OK || http == 200) return;
    td_arena a;
    td_json *root;
    td_arena_init(&a, 16 << 20);
    t->s = TD_EIO;
    if (td_json_parse(&a, body, n, (td_json_limits){0}, &root) == TD_OK)
        fprintf(stderr, "error %d: %s\n", http, td_json_str(td_json_get(root, "error"), "message", "?"));
    else fprintf(stderr, "error %d\n", http);
    td_arena_deinit(&a);
}

/* The server's model name; waits for a server that is just starting. */
static td_status find_model(talk *t)
{
    int64_t start = td_now_us();
    bool told = false;
    td_arena a;
    td_json *root;
    td_arena_init(&a, 4 << 20);
    td_status s;
    while ((s = td_client_ask(t->client, "/v1/models", NULL, 0, &a, &root)) == TD_AGAIN && td_now_us() - start < WAIT_SERVER_US && !interrupted) {
        if (!told && td_now_us() - start > TELL_US) {
            fprintf(stderr, "waiting for a server: %s\n", td_reason());
            told = true;
        }
        usleep(20000); /* nothing to wait on: the server has no socket yet */
    }
    if (s == TD_AGAIN) s = TD_EIO;
    if (s == TD_OK)
        snprintf(t->model, sizeof t->model, "%s",
                 t->conf->served_model_name[0] ? t->conf->served_model_name : td_json_str(td_json_at(td_json_get(root, "data"), 0), "id", ""));
    td_arena_deinit(&a);
    return s;
}

static void add_message(td_buf *history, const char *role, const char *text, size_t n)
{
    if (history->len) td_buf_chr(history, ',');
    td_buf_fmt(history, "{\"role\":\"%s\",\"content\":", role);
    td_buf_json_str(history, text, n);
    td_buf_chr(history, '}');
}

static td_status ask_once(talk *t, const char *text)
{
    td_buf body;
    td_buf_init(&body, 32 << 20);
    add_message(&t->history, "user", text, strlen(text));
    td_buf_str(&body, "{\"model\":");
    td_buf_json_str(&body, t->model, strlen(t->model));
    td_buf_fmt(&body, ",\"stream\":true,\"stream_options\":{\"include_usage\":true},\"max_tokens\":%d", t->conf->max_tokens);
    if (t->conf->source[TD_CONF_ID_temperature] != TD_CONF_DEFAULT) td_buf_fmt(&body, ",\"temperature\":%g", t->conf->temperature);
    if (t->conf->source[TD_CONF_ID_seed] != TD_CONF_DEFAULT) td_buf_fmt(&body, ",\"seed\":%llu", (unsigned long long)t->conf->seed);
    td_buf_fmt(&body, ",\"messages\":[%s]}", t->history.p);
    t->ended = false;
    t->s = TD_OK;
    td_buf_reset(&t->answer);
    td_buf_reset(&t->timings);
    td_client_call call = {.on_event = on_event, .on_end = on_end, .arg = t};
    td_client_start(t->client, "/v1/chat/completions", body.p, body.len, &call);
    interrupted = 0;
    while (!t->ended) {
        td_client_turn(t->client, 200);
        if (interrupted) td_client_cancel_all(t->client);
    }
    td_buf_deinit(&body);
    printf("\n");
    if (t->s == TD_EGONE) printf("(stopped)\n");
    else if (t->s < 0 || t->s == TD_AGAIN) return t->s;
    add_message(&t->history, "assistant", t->answer.p ? t->answer.p : "", t->answer.len);
    td_arena a;
    td_json *root;
    td_arena_init(&a, 4 << 20);
    if (t->timings.len && td_json_parse(&a, t->timings.p, t->timings.len, (td_json_limits){0}, &root) == TD_OK) print_timings(root);
    td_arena_deinit(&a);
    return TD_OK;
}

static int converse(talk *t)
{
    char line[65536];
    printf("model %s; /clear forgets the conversation, /exit or Ctrl-D ends\n", t->model);
    for (;;) {
        printf("> ");
        fflush(stdout);
        interrupted = 0;
        if (!fgets(line, sizeof line, stdin)) {
            if (!interrupted) break;
            clearerr(stdin);
            printf("\n");
            continue;
        }
        line[strcspn(line, "\n")] = 0;
        if (!strcmp(line, "/exit")) break;
        if (!strcmp(line, "/clear")) td_buf_reset(&t->history);
        else if (line[0] && ask_once(t, line) < 0) fprintf(stderr, "%s\n", td_reason_take());
    }
    printf("\n");
    return 0;
}

static td_status start_local(const char *dir, td_conf *serve, td_local **local, char *url, size_t n)
{
    td_conf_init(serve);
    td_conf_set(serve, "model", dir);
    td_conf_set(serve, "port", "0");
    td_conf_set(serve, "grpc-port", "0");
    td_conf_set(serve, "log-level", "warn");
    TD_TRY(td_local_start(serve, true, local));
    TD_TRY(td_local_wait_ready(*local));
    snprintf(url, n, "http://127.0.0.1:%d", td_local_port(*local));
    return TD_OK;
}

int cmd_chat(int argc, char **argv)
{
    td_conf conf, serve;
    talk t = {0};
    td_local *local = NULL;
    const char *dir = NULL;
    char url[64];
    int n = 0, status = 1;
    td_log_open("chat", TD_LOG_WARN);
    td_status s = td_conf_parse(&conf, TD_CONF_CHAT, argc, argv, &dir, 1, &n);
    if (s == TD_AGAIN) return 0;
    if (s < 0) {
        fprintf(stderr, "tandem chat: %s\n", td_reason_take());
        td_conf_deinit(&conf);
        return 2;
    }
    if (n && conf.source[TD_CONF_ID_url] == TD_CONF_FLAG) {
        fprintf(stderr, "tandem chat: a folder or --url, not both\n");
        td_conf_deinit(&conf);
        return 2;
    }
    if (n) {
        s = start_local(dir, &serve, &local, url, sizeof url);
        if (s == TD_EBADREQ) status = 2;
        conf.url = url;
    }
    struct sigaction sa = {.sa_handler = on_int}; /* no SA_RESTART: fgets returns */
    sigaction(SIGINT, &sa, NULL);
    t.conf = &conf;
    t.client = td_client_open(conf.url, conf.api_key, conf.tls_ca);
    td_buf_init(&t.history, 16 << 20);
    td_buf_init(&t.answer, 16 << 20);
    td_buf_init(&t.timings, 1 << 20);
    if (s == TD_OK) s = find_model(&t);
    if (s == TD_OK && conf.prompt[0]) s = ask_once(&t, conf.prompt), status = s < 0 ? 1 : 0;
    else if (s == TD_OK) status = converse(&t);
    if (s < 0 && td_reason()[0]) fprintf(stderr, "tandem chat: %s\n", td_reason_take());
    td_client_close(t.client);
    td_buf_deinit(&t.history);
    td_buf_deinit(&t.answer);
    td_buf_deinit(&t.timings);
    if (local) td_local_stop(local);
    if (n) td_conf_deinit(&serve);
    td_conf_deinit(&conf);
    return status;
}
