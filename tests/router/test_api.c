/* tests/router/test_api.c - the router program itself, over real sockets, with a mock worker in this process.
 *
 * The worker's tokens are sim_token(): what every answer must be is known. Needs bin/tandem-router beside
 * this test (or TANDEM_ROUTER). */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "common/clock.h"
#include "common/json.h"
#include "common/wire/loop.h"
#include "tests/router/support_sim.h"
#include "tests/router/support_tok.h"
#include "tests/t.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <libgen.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static char binary[512], control[128];
static int port;

/* ---- the mock worker: one thread, MIXED ---- */
enum { LEGS = 64 };
typedef struct leg {
    bool used;
    td_req_key key;
    uint32_t prompt[1024], n_prompt, n, max, at[8];
    uint64_t seed;
    bool done[8], told;
    int32_t lp, plp;
    float temperature;
    uint32_t n_stop, bias;
} leg;
typedef struct mock {
    pthread_t thread;
    atomic_bool stop;
    atomic_int step_ms, cancels, legs, goodbyes;
    atomic_uint seen_temp_milli, seen_topk, seen_stop_ids, seen_max;
    td_zctx *z;
    td_sock *s;
    leg leg[LEGS];
    uint64_t inc, step;
} mock;

static void post(mock *m, td_msg *msg)
{
    msg->sender = m->inc;
    td_buf b;
    td_buf_init(&b, 0);
    TD_CHECK(td_msg_pack(msg, &b) == TD_OK);
    td_part p = {b.p, b.len};
    for (int i = 0; i < 1000 && td_sock_send(m->s, NULL, 0, &p, 1) == TD_AGAIN; i++) usleep(1000);
    td_buf_deinit(&b);
}

static void post_hello(mock *m)
{
    td_msg h = {.type = TD_MSG_HELLO};
    h.hello = (td_msg_hello){.name = "mock",
                             .bulk_endpoint = "",
                             .build = "t",
                             .role = TD_ROLE_MIXED,
                             .id = {.model_digest = {1, 2},
                                    .model = "m",
                                    .kv_dtype = "bf16",
                                    .numerics = "ref",
                                    .layers = 2,
                                    .kv_heads = 1,
                                    .head_dim = 8,
                                    .vocab = 258,
                                    .max_model_len = 256},
                             .page_size = 16,
                             .max_seqs = 32,
                             .max_batched_tokens = 512,
                             .kv_tokens = 100000,
                             .n_eos = 1,
                             .eos = {SIM_EOS}};
    post(m, &h);
}

static void post_end(mock *m, leg *l, td_finish f)
{
    td_msg e = {.type = TD_MSG_ENDED};
    e.ended.key = l->key;
    e.ended.finish = f;
    e.ended.reason = "";
    post(m, &e);
    l->used = false;
    atomic_fetch_sub(&m->legs, 1);
}

static void post_prompt(mock *m, leg *l)
{
    static td_msg_score sc[1024];
    static td_top top[1024];
    td_msg p = {.type = TD_MSG_PROMPT_DONE};
    p.prompt_done.key = l->key;
    p.prompt_done.cached_tokens = 3;
    p.prompt_done.queued_us = 2000;
    p.prompt_done.prefill_us = 4000;
    for (uint32_t i = 0; l->plp >= 0 && i + 1 < l->n_prompt; i++) {
        top[i] = (td_top){'x', -0.5f};
        sc[i] = (td_msg_score){l->prompt[i + 1], -1.25f, l->plp > 0, &top[i]};
        p.prompt_done.n_scores++;
    }
    p.prompt_done.scores = sc;
    post(m, &p);
    l->told = true;
}

static void step_leg(mock *m, leg *l)
{
    if (!l->told) post_prompt(m, l);
    bool all = true;
    for (uint32_t k = 0; k < l->n; k++) {
        if (l->done[k]) continue;
        uint32_t id = sim_token(l->prompt, l->n_prompt, l->seed, k, l->at[k]);
        float lp = -0.25f;
        td_top top[2] = {{id, -0.25f}, {'y', -3}};
        td_msg_tokens t = {.key = l->key, .choice = k, .base_index = l->at[k], .n = 1, .ids = &id};
        if (l->lp >= 0) t.logprobs = &lp, t.top = top, t.n_top = (uint32_t)(l->lp > 2 ? 2 : l->lp);
        l->at[k]++;
        if (id == SIM_EOS) t.finish = TD_FINISH_STOP, t.stop_token = id;
        else if (l->at[k] >= l->max) t.finish = TD_FINISH_LENGTH;
        l->done[k] = t.finish != TD_FINISH_NONE;
        all &= l->done[k];
        td_msg msg = {.type = TD_MSG_TOKENS};
        msg.tokens.step = m->step;
        msg.tokens.list = &t;
        msg.tokens.n = 1;
        post(m, &msg);
    }
    if (all) post_end(m, l, TD_FINISH_STOP);
}

static void take(mock *m, const td_msg *msg)
{
    if (msg->type == TD_MSG_GOODBYE) atomic_fetch_add(&m->goodbyes, 1);
    if (msg->type == TD_MSG_START) {
        const td_msg_work *w = &msg->start.work;
        leg *l = m->leg;
        while (l->used) l++;
        *l = (leg){.used = true,
                   .key = w->key,
                   .n_prompt = w->prompt.n,
                   .n = w->sampling.n,
                   .max = w->sampling.max_tokens,
                   .seed = w->sampling.seed,
                   .lp = w->sampling.logprobs,
                   .plp = w->sampling.prompt_logprobs};
        memcpy(l->prompt, w->prompt.p, w->prompt.n * 4);
        for (uint32_t k = 0; k < w->n_resume; k++) l->at[k] = w->resume[k].n;
        atomic_fetch_add(&m->legs, 1);
        atomic_store(&m->seen_temp_milli, (unsigned)(w->sampling.temperature * 1000 + 0.5f));
        atomic_store(&m->seen_topk, (unsigned)w->sampling.top_k);
        atomic_store(&m->seen_stop_ids, w->sampling.n_stop_ids);
        atomic_store(&m->seen_max, w->sampling.max_tokens);
    } else if (msg->type == TD_MSG_CANCEL || msg->type == TD_MSG_CANCEL_CHOICE) {
        for (leg *l = m->leg; l < m->leg + LEGS; l++) {
            if (!l->used || l->key.request != msg->cancel.key.request ||
                l->key.attempt != msg->cancel.key.attempt)
                continue;
            atomic_fetch_add(&m->cancels, 1);
            if (msg->type == TD_MSG_CANCEL) post_end(m, l, TD_FINISH_CANCEL);
            else l->done[msg->cancel.choice] = true;
        }
    }
}

static void *mock_body(void *arg)
{
    mock *m = arg;
    td_sock_opts o = {.max_message_bytes = 8 << 20, .hwm = 10000};
    char id[32];
    snprintf(id, sizeof id, "w/%llx", (unsigned long long)m->inc);
    TD_CHECK(td_sock_connect_dealer(m->z, control, id, strlen(id), &o, &m->s) == TD_OK);
    td_loop loop;
    td_loop_init(&loop);
    td_loop_add_sock(&loop, m->s);
    post_hello(m);
    int64_t beat = 0, stepped = 0;
    while (!atomic_load(&m->stop)) {
        td_loop_wait(&loop, 1000);
        td_part part[2];
        int n;
        while (td_sock_recv(m->s, NULL, part, &n) == TD_OK) {
            td_arena a;
            td_arena_init(&a, 32 << 20);
            td_msg msg;
            if (td_msg_unpack(part[0].p, part[0].n, &a, &msg) == TD_OK) take(m, &msg);
            td_arena_deinit(&a);
        }
        int64_t now = td_now_us();
        if (now - beat > 100000) {
            beat = now;
            td_msg h = {.type = TD_MSG_HEARTBEAT};
            h.heartbeat = (td_msg_heartbeat){.step = m->step,
                                             .state = TD_WSTATE_READY,
                                             .busy = atomic_load(&m->legs) > 0,
                                             .n_groups = 1,
                                             .ledger[0] = {.total = 9, .free = 9}};
            post(m, &h);
        }
        if (now - stepped < atomic_load(&m->step_ms) * 1000) continue;
        stepped = now;
        m->step++;
        for (leg *l = m->leg; l < m->leg + LEGS; l++)
            if (l->used) step_leg(m, l);
    }
    td_sock_close(m->s);
    return NULL;
}

static mock *mock_start(uint64_t inc, int step_ms)
{
    mock *m = td_xalloc(sizeof *m);
    m->inc = inc;
    m->z = td_zctx_open();
    atomic_store(&m->step_ms, step_ms);
    pthread_create(&m->thread, NULL, mock_body, m);
    return m;
}

static void mock_stop(mock *m)
{
    atomic_store(&m->stop, true);
    pthread_join(m->thread, NULL);
    td_zctx_close(m->z);
    free(m);
}

/* ---- the router ---- */
typedef struct router { pid_t pid; int fd; } router;

static bool read_line(int fd, char *line, size_t n, int ms)
{
    size_t k = 0;
    int64_t end = td_now_us() + ms * 1000;
    while (k + 1 < n) {
        struct pollfd p = {.fd = fd, .events = POLLIN};
        if (poll(&p, 1, (int)TD_MAX((end - td_now_us()) / 1000, 0)) <= 0 || read(fd, line + k, 1) != 1)
            return false;
        if (line[k] == '\n') break;
        k++;
    }
    line[k] = 0;
    return true;
}

static router router_start(const char *a1, const char *a2)
{
    int p[2];
    TD_CHECK(!pipe(p));
    router r = {.fd = p[0]};
    char fd[16], bind[160];
    snprintf(fd, sizeof fd, "%d", p[1]);
    snprintf(bind, sizeof bind, "%s", control);
    r.pid = fork();
    if (!r.pid) {
        close(p[0]);
        int null = open("/dev/null", O_WRONLY);
        if (!getenv("TD_TEST_VERBOSE")) dup2(null, 2);
        execl(binary, "tandem-router", "--model", support_model_dir(), "--served-model-name", "toy", "--port",
              "0", "--grpc-port", "0", "--router-bind", bind, "--ready-fd", fd, a1, a2, NULL);
        _exit(127);
    }
    close(p[1]);
    char line[256];
    int grpc;
    TD_CHECK(read_line(r.fd, line, sizeof line, 10000) && sscanf(line, "listening %d %d", &port, &grpc) == 2);
    return r;
}

static int router_stop(router *r)
{
    int st = 0;
    kill(r->pid, SIGTERM);
    for (int i = 0; i < 500; i++) {
        if (waitpid(r->pid, &st, WNOHANG) == r->pid) {
            close(r->fd);
            return WIFEXITED(st) ? WEXITSTATUS(st) : 1000 + WTERMSIG(st);
        }
        usleep(20000);
    }
    kill(r->pid, SIGKILL);
    waitpid(r->pid, &st, 0);
    close(r->fd);
    return -1;
}

/* ---- a client ---- */
typedef struct reply { int status; char *head, *body; td_arena arena; td_json *json; char *raw; } reply;

static int dial(void)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in a = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    TD_CHECK(fd >= 0 && !connect(fd, (struct sockaddr *)&a, sizeof a));
    return fd;
}

static int ask(const char *method, const char *path, const char *headers, const char *body)
{
    int fd = dial();
    td_buf b;
    td_buf_init(&b, 0);
    td_buf_fmt(&b, "%s %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n%s", method, path, headers);
    /* Cases that are not about the model's name leave it out; a body that starts with a space means it. */
    bool named = !body || body[0] != '{' || strstr(body, "\"model\"") || !strcmp(body, "{}");
    const char *name = named ? "" : "{\"model\": \"toy\", ";
    size_t skip = named ? 0 : 1;
    if (body)
        td_buf_fmt(&b, "Content-Type: application/json\r\nContent-Length: %zu\r\n\r\n%s%s",
                   strlen(name) + strlen(body) - skip, name, body + skip);
    else td_buf_str(&b, "\r\n");
    TD_CHECK(write(fd, b.p, b.len) == (ssize_t)b.len);
    td_buf_deinit(&b);
    return fd;
}

static void dechunk(char *p)
{
    char *w = p;
    for (;;) {
        char *e;
        unsigned long n = strtoul(p, &e, 16);
        if (!n || strncmp(e, "\r\n", 2)) break;
        memmove(w, e + 2, n);
        w += n;
        p = e + 2 + n + 2;
    }
    *w = 0;
}

static reply finish(int fd)
{
    reply r = {0};
    td_buf b;
    td_buf_init(&b, 0);
    char chunk[65536];
    ssize_t n;
    struct timeval t = {20, 0};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &t, sizeof t);
    while ((n = read(fd, chunk, sizeof chunk)) > 0) td_buf_add(&b, chunk, (size_t)n);
    close(fd);
    td_buf_str(&b, "");
    r.raw = r.head = b.p;
    r.body = strstr(b.p, "\r\n\r\n");
    if (r.body) {
        *r.body = 0;
        r.body += 4;
        r.status = atoi(r.head + 9);
        if (strcasestr(r.head, "transfer-encoding: chunked")) dechunk(r.body);
    } else {
        r.body = r.raw;
    }
    td_arena_init(&r.arena, 32 << 20);
    if (td_json_parse(&r.arena, r.body, strlen(r.body), (td_json_limits){0}, &r.json) != TD_OK) r.json = NULL;
    return r;
}

static void done(reply *r)
{
    free(r->raw);
    td_arena_deinit(&r->arena);
}
static reply get(const char *path) { return finish(ask("GET", path, "", NULL)); }
static reply send_json(const char *path, const char *body) { return finish(ask("POST", path, "", body)); }

/* "a.0.b" */
static const td_json *at(const td_json *v, const char *path)
{
    char key[64];
    while (v && *path) {
        size_t n = strcspn(path, ".");
        snprintf(key, sizeof key, "%.*s", (int)n, path);
        v = v->type == TD_JSON_ARR ? td_json_at(v, (size_t)atoi(key)) : td_json_get(v, key);
        path += n + (path[n] == '.');
    }
    return v;
}
static const char *str_at(const td_json *v, const char *path)
{
    v = at(v, path);
    return v && v->type == TD_JSON_STR ? v->s : "(none)";
}
static int64_t int_at(const td_json *v, const char *path)
{
    v = at(v, path);
    return v && v->type == TD_JSON_INT ? v->i : -999;
}

/* What the model must answer to this text. */
static uint32_t expect(const char *prompt, uint64_t seed, uint32_t choice, uint32_t max, const char *stop,
                       uint32_t *ids, char **text)
{
    sim_client c = {
        .n_prompt = (uint32_t)strlen(prompt), .seed = seed, .max_tokens = max, .n_stop = stop != NULL};
    uint32_t p[512];
    for (uint32_t i = 0; i < c.n_prompt; i++) p[i] = (uint8_t)prompt[i];
    c.prompt = p;
    c.stop[0] = (char *)(uintptr_t)stop;
    size_t n;
    td_finish f;
    uint32_t k = sim_expect(&c, support_tokenizer(), choice, ids, text, &n, &f);
    (*text)[n] = 0;
    return k;
}

static bool ids_are(const td_json *v, const uint32_t *ids, uint32_t n)
{
    if (!v || v->type != TD_JSON_ARR || v->n != n) return false;
    uint32_t i = 0;
    for (const td_json *e = v->child; e; e = e->next)
        if (e->i != ids[i++]) return false;
    return true;
}

/* ---- cases ---- */
static void before_workers(router *r)
{
    reply a = get("/readyz");
    T_EQ(a.status, 503);
    done(&a);
    a = get("/livez");
    T_EQ(a.status, 200);
    done(&a);
    (void)r;
}

static void completion(mock *m)
{
    uint32_t ids[300];
    char *text;
    uint32_t n = expect("hello", 7, 0, 12, NULL, ids, &text);
    reply a = send_json("/v1/completions", "{\"model\": \"toy\", \"prompt\": \"hello\", \"seed\": 7, "
                                           "\"max_tokens\": 12, \"return_token_ids\": true}");
    T_EQ(a.status, 200);
    T_STR(str_at(a.json, "choices.0.text"), text);
    T_OK(ids_are(at(a.json, "choices.0.token_ids"), ids, n));
    T_EQ(int_at(a.json, "usage.prompt_tokens"), 5);
    T_EQ(int_at(a.json, "usage.completion_tokens"), n);
    T_EQ(int_at(a.json, "usage.prompt_tokens_details.cached_tokens"), 3);
    T_NEAR(at(a.json, "timings.prefill_ms") ? at(a.json, "timings.prefill_ms")->num : 0, 4, 1e-9);
    T_OK(at(a.json, "timings.itl_ms.p99") && at(a.json, "timings.ttft_ms")->num >= 0);
    T_OK(strcasestr(a.head, "x-request-id: ") != NULL);
    T_STR(str_at(a.json, "object"), "text_completion");
    T_EQ(atomic_load(&m->seen_temp_milli), 500); /* generation_config.json */
    T_EQ(atomic_load(&m->seen_topk), 7);
    T_EQ(atomic_load(&m->seen_stop_ids), 1);
    done(&a);
    free(text);
    /* several prompts and choices: index = prompt * n + choice */
    a = send_json(
        "/v1/completions",
        "{\"prompt\": [\"ab\", \"cde\"], \"n\": 2, \"seed\": 3, \"max_tokens\": 5, \"temperature\": 1}");
    T_EQ(at(a.json, "choices") ? at(a.json, "choices")->n : 0, 4);
    for (unsigned i = 0; i < 4; i++) {
        char path[32];
        snprintf(path, sizeof path, "choices.%u.text", i);
        expect(i < 2 ? "ab" : "cde", 3, i % 2, 5, NULL, ids, &text);
        T_STR(str_at(a.json, path), text);
        free(text);
    }
    T_EQ(int_at(a.json, "usage.prompt_tokens"), 5);
    T_EQ(atomic_load(&m->seen_temp_milli), 1000);
    done(&a);
    /* ids as prompt; without max_tokens: 16 */
    a = send_json("/v1/completions",
                  "{\"prompt\": [104, 101, 108, 108, 111], \"seed\": 7, \"ignore_eos\": true}");
    T_EQ(a.status, 200);
    T_EQ(atomic_load(&m->seen_max), 16);
    done(&a);
}

static void stop_string(void)
{
    uint32_t ids[300];
    char *all, *text, stop[3] = "";
    expect("stop here", 11, 0, 60, NULL, ids, &all);
    T_OK(strlen(all) > 8, "the model says too little: %s", all);
    memcpy(stop, all + 4, 2);
    uint32_t n = expect("stop here", 11, 0, 60, stop, ids, &text);
    char body[300];
    td_buf b;
    td_buf_init(&b, 0);
    td_buf_json_str(&b, stop, 2);
    for (int stream = 0; stream < 2; stream++) {
        snprintf(body, sizeof body,
                 "{\"prompt\": \"stop here\", \"seed\": 11, \"max_tokens\": 60, \"stop\": [%s], "
                 "\"return_token_ids\": true, \"stream\": %s}",
                 b.p, stream ? "true" : "false");
        reply a = send_json("/v1/completions", body);
        if (!stream) {
            T_STR(str_at(a.json, "choices.0.text"), text);
            T_STR(str_at(a.json, "choices.0.finish_reason"), "stop");
            T_STR(str_at(a.json, "choices.0.stop_reason"), stop);
            T_EQ(int_at(a.json, "usage.completion_tokens"), n);
        } else {
            T_OK(!strstr(a.body, all + 4) && strstr(a.body, "\"finish_reason\": \"stop\""));
        }
        done(&a);
    }
    td_buf_deinit(&b);
    free(all);
    free(text);
}

typedef struct events { td_arena arena; td_json *v[400]; unsigned n; bool finished; } events;

static void split_events(const reply *r, events *e)
{
    memset(e, 0, sizeof *e);
    td_arena_init(&e->arena, 32 << 20);
    for (const char *p = r->body; (p = strstr(p, "data: "));) {
        p += 6;
        const char *end = strstr(p, "\n\n");
        if (!end || e->n == 400) break;
        if (!strncmp(p, "[DONE]", 6)) e->finished = !strcmp(end, "\n\n");
        else
            T_OK(td_json_parse(&e->arena, p, (size_t)(end - p), (td_json_limits){0}, &e->v[e->n++]) == TD_OK);
        p = end;
    }
}

static void streaming(void)
{
    uint32_t ids[300];
    char *text;
    uint32_t n = expect("hello", 7, 0, 12, NULL, ids, &text);
    reply a = send_json("/v1/completions",
                        "{\"prompt\": \"hello\", \"seed\": 7, \"max_tokens\": 12, \"stream\": true, "
                        "\"stream_options\": {\"include_usage\": true}, \"return_token_ids\": true}");
    T_EQ(a.status, 200);
    T_OK(strcasestr(a.head, "text/event-stream") != NULL);
    events e;
    split_events(&a, &e);
    T_OK(e.finished);
    td_buf got;
    td_buf_init(&got, 0);
    td_buf_str(&got, "");
    uint32_t k = 0;
    for (unsigned i = 0; i + 1 < e.n; i++) {
        td_buf_str(&got, str_at(e.v[i], "choices.0.text"));
        const td_json *t = at(e.v[i], "choices.0.token_ids");
        for (const td_json *x = t ? t->child : NULL; x; x = x->next) T_EQ(x->i, ids[k++]);
        T_OK(at(e.v[i], "usage") && at(e.v[i], "usage")->type == TD_JSON_NULL);
        bool last = i + 2 == e.n;
        T_EQ(at(e.v[i], "choices.0.finish_reason")->type == TD_JSON_NULL, !last);
        T_EQ(at(e.v[i], "timings") != NULL, last);
    }
    T_EQ(k, n);
    T_STR(got.p, text);
    const td_json *u = e.n ? e.v[e.n - 1] : NULL;
    T_EQ(at(u, "choices") ? at(u, "choices")->n : 9, 0);
    T_EQ(int_at(u, "usage.completion_tokens"), n);
    td_buf_deinit(&got);
    td_arena_deinit(&e.arena);
    done(&a);
    free(text);
}

static void chat(void)
{
    uint32_t ids[300];
    char *text;
    expect("[user]hi\n[assistant]", 5, 0, 9, NULL, ids, &text);
    const char *body = "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}], \"seed\": 5, "
                       "\"max_completion_tokens\": 9, \"logprobs\": true, \"top_logprobs\": 2%s}";
    char q[300];
    snprintf(q, sizeof q, body, "");
    reply a = send_json("/v1/chat/completions", q);
    T_EQ(a.status, 200);
    T_STR(str_at(a.json, "object"), "chat.completion");
    T_STR(str_at(a.json, "choices.0.message.content"), text);
    T_STR(str_at(a.json, "choices.0.message.role"), "assistant");
    T_NEAR(at(a.json, "choices.0.logprobs.content.0.logprob")
               ? at(a.json, "choices.0.logprobs.content.0.logprob")->num
               : 0,
           -0.25, 1e-9);
    T_EQ(at(a.json, "choices.0.logprobs.content.0.top_logprobs")
             ? at(a.json, "choices.0.logprobs.content.0.top_logprobs")->n
             : 0,
         2);
    done(&a);
    snprintf(q, sizeof q, body, ", \"stream\": true, \"n\": 2");
    a = send_json("/v1/chat/completions", q);
    events e;
    split_events(&a, &e);
    T_OK(e.finished);
    int roles = 0, ends = 0;
    td_buf got;
    td_buf_init(&got, 0);
    td_buf_str(&got, "");
    for (unsigned i = 0; i < e.n; i++) {
        roles += !strcmp(str_at(e.v[i], "choices.0.delta.role"), "assistant");
        ends += at(e.v[i], "choices.0.finish_reason")->type == TD_JSON_STR;
        if (int_at(e.v[i], "choices.0.index") == 0 && at(e.v[i], "choices.0.delta.content"))
            td_buf_str(&got, str_at(e.v[i], "choices.0.delta.content"));
    }
    T_EQ(roles, 2);
    T_EQ(ends, 2);
    T_STR(got.p, text);
    td_buf_deinit(&got);
    td_arena_deinit(&e.arena);
    done(&a);
    a = send_json("/tokenize", "{\"messages\": [{\"role\": \"user\", \"content\": \"hi\"}]}");
    T_EQ(int_at(a.json, "count"), 20);
    done(&a);
    free(text);
}

static void logprobs_and_echo(void)
{
    reply a =
        send_json("/v1/completions",
                  "{\"prompt\": \"abc\", \"seed\": 1, \"max_tokens\": 0, \"echo\": true, \"logprobs\": 1}");
    T_EQ(a.status, 200);
    T_STR(str_at(a.json, "choices.0.text"), "abc");
    T_EQ(at(a.json, "choices.0.logprobs.tokens") ? at(a.json, "choices.0.logprobs.tokens")->n : 0, 3);
    T_OK(at(a.json, "choices.0.logprobs.token_logprobs.0") &&
         at(a.json, "choices.0.logprobs.token_logprobs.0")->type == TD_JSON_NULL);
    T_NEAR(at(a.json, "choices.0.logprobs.token_logprobs.2")
               ? at(a.json, "choices.0.logprobs.token_logprobs.2")->num
               : 0,
           -1.25, 1e-9);
    T_NEAR(at(a.json, "choices.0.logprobs.top_logprobs.1.x")
               ? at(a.json, "choices.0.logprobs.top_logprobs.1.x")->num
               : 0,
           -0.5, 1e-9);
    T_EQ(int_at(a.json, "choices.0.logprobs.text_offset.2"), 2);
    T_EQ(int_at(a.json, "usage.completion_tokens"), 0);
    done(&a);
    a = send_json(
        "/v1/completions",
        "{\"prompt\": \"abc\", \"seed\": 1, \"max_tokens\": 2, \"min_tokens\": 2, \"prompt_logprobs\": 0}");
    T_OK(at(a.json, "prompt_logprobs.0") && at(a.json, "prompt_logprobs.0")->type == TD_JSON_NULL);
    T_NEAR(at(a.json, "prompt_logprobs.1.98.logprob") ? at(a.json, "prompt_logprobs.1.98.logprob")->num : 0,
           -1.25, 1e-9);
    T_STR(str_at(a.json, "prompt_logprobs.1.98.decoded_token"), "b");
    done(&a);
}

static void refusals(void)
{
    static const struct {
        const char *method, *path, *body; int status; const char *code, *param;
    } c[] = {
        {"POST", "/v1/completions", "{\"prompt\": \"x\"", 400, "invalid_json", NULL},
        {"POST", "/v1/completions", " {\"prompt\": \"x\"}", 400, "missing_required_parameter", "model"},
        {"POST", "/v1/completions", "{\"prompt\": \"x\", \"n\": 0}", 400, "invalid_value", "n"},
        {"POST", "/v1/completions", "{\"prompt\": \"\"}", 400, "invalid_value", "prompt"},
        {"POST", "/v1/completions", "{\"prompt\": [300]}", 400, "invalid_value", "prompt"},
        {"POST", "/v1/completions", "{\"prompt\": \"x\", \"model\": \"other\"}", 404, "model_not_found",
         "model"},
        {"POST", "/v1/completions", "{\"prompt\": \"x\", \"max_tokens\": 256}", 400,
         "context_length_exceeded", NULL},
        {"POST", "/v1/completions", "{\"prompt\": \"x\", \"response_format\": {\"type\": \"json_object\"}}",
         400, "unsupported_parameter", "response_format"},
        {"POST", "/v1/chat/completions", "{\"messages\": []}", 400, "invalid_type", "messages"},
        {"GET", "/v1/completions", NULL, 405, "method_not_allowed", NULL},
        {"POST", "/v1/models", "{}", 405, "method_not_allowed", NULL},
        {"GET", "/v1/models/none", NULL, 404, "model_not_found", "model"},
        {"GET", "/nothing", NULL, 404, "not_found", NULL},
        {"POST", "/detokenize", "{\"tokens\": \"x\"}", 400, "invalid_type", "tokens"},
        {"POST", "/tokenize", "{}", 400, "invalid_type", "prompt"},
    };
    for (unsigned i = 0; i < TD_COUNT(c); i++) {
        reply a = finish(ask(c[i].method, c[i].path, "", c[i].body));
        T_EQ(a.status, c[i].status);
        T_STR(str_at(a.json, "error.code"), c[i].code);
        if (c[i].param) T_STR(str_at(a.json, "error.param"), c[i].param);
        T_OK(at(a.json, "error.type") && at(a.json, "error.message"));
        done(&a);
    }
    char big[2200] = "{\"prompt\": \"";
    memset(big + strlen(big), 'x', 300);
    strcat(big, "\"}");
    reply a = send_json("/v1/completions", big);
    T_EQ(a.status, 400);
    T_STR(str_at(a.json, "error.code"), "context_length_exceeded");
    T_OK(strstr(str_at(a.json, "error.message"), "256") && strstr(str_at(a.json, "error.message"), "300"),
         "%s", str_at(a.json, "error.message"));
    done(&a);
}

static void small_pages(void)
{
    reply a = get("/v1/models");
    T_STR(str_at(a.json, "data.0.id"), "toy");
    T_EQ(int_at(a.json, "data.0.max_model_len"), 256);
    done(&a);
    a = get("/v1/models/toy");
    T_STR(str_at(a.json, "id"), "toy");
    done(&a);
    a = send_json("/tokenize", "{\"prompt\": \"h\\u00e9\"}");
    T_EQ(int_at(a.json, "count"), 3);
    T_EQ(int_at(a.json, "tokens.1"), 0xC3);
    done(&a);
    a = send_json("/detokenize", "{\"tokens\": [104, 195, 169]}");
    T_STR(str_at(a.json, "prompt"), "h\xc3\xa9");
    done(&a);
    a = get("/health");
    T_EQ(a.status, 200);
    done(&a);
    a = get("/metrics");
    T_EQ(a.status, 200);
    static const char *const names[] = {"tandem_requests_done_total",
                                        "tandem_kv_pages{",
                                        "vllm:num_requests_running{",
                                        "vllm:kv_cache_usage_perc{",
                                        "vllm:time_to_first_token_seconds_bucket{",
                                        "vllm:request_success_total{",
                                        "tandem_inter_token_latency_seconds_bucket{"};
    for (unsigned i = 0; i < TD_COUNT(names); i++) T_OK(strstr(a.body, names[i]) != NULL, "%s", names[i]);
    done(&a);
    a = finish(ask("POST", "/v1/completions", "x-request-id: mine-1\r\n",
                   "{\"prompt\": \"x\", \"max_tokens\": 1, \"zzz\": 1}"));
    T_OK(strcasestr(a.head, "x-request-id: mine-1") != NULL);
    T_STR(str_at(a.json, "id"), "cmpl-mine-1");
    done(&a);
}

static void wait_idle(mock *m)
{
    for (int i = 0; i < 100 && atomic_load(&m->legs); i++) usleep(20000);
    T_EQ(atomic_load(&m->legs), 0);
}

static void client_leaves(mock *m)
{
    wait_idle(m);
    atomic_store(&m->step_ms, 30);
    atomic_store(&m->cancels, 0);
    for (int stream = 0; stream < 2; stream++) {
        char body[200];
        snprintf(body, sizeof body,
                 "{\"prompt\": \"long one\", \"seed\": 2, \"max_tokens\": 200, \"ignore_eos\": true, "
                 "\"stream\": %s}",
                 stream ? "true" : "false");
        int fd = ask("POST", "/v1/completions", "", body);
        for (int i = 0; i < 100 && !atomic_load(&m->legs); i++) usleep(10000);
        T_EQ(atomic_load(&m->legs), 1);
        close(fd);
        int64_t t = td_now_us();
        while (atomic_load(&m->cancels) <= stream && td_now_us() - t < 3000000) usleep(5000);
        T_OK(td_now_us() - t < 1000000, "cancelled after %lld ms", (long long)(td_now_us() - t) / 1000);
    }
    wait_idle(m);
    usleep(100000);
    reply a = get("/debug/ledger");
    T_EQ(int_at(a.json, "leases"), 0);
    T_EQ(int_at(a.json, "requests"), 0);
    T_STR(str_at(a.json, "workers.0.state"), "READY");
    T_EQ(int_at(a.json, "workers.0.groups.0.total"), 9);
    done(&a);
    atomic_store(&m->step_ms, 0);
}

/* A worker dies in the middle: another one goes on, the client sees nothing. */
static mock *worker_dies(mock *m)
{
    uint32_t ids[300];
    char *text;
    atomic_store(&m->step_ms, 20);
    expect("survive", 4, 0, 40, NULL, ids, &text);
    int fd = ask("POST", "/v1/completions", "", "{\"prompt\": \"survive\", \"seed\": 4, \"max_tokens\": 40}");
    usleep(250000);
    mock *next = mock_start(901, 0);
    usleep(150000);
    mock_stop(m);
    reply a = finish(fd);
    T_EQ(a.status, 200);
    T_STR(str_at(a.json, "choices.0.text"), text);
    done(&a);
    free(text);
    return next;
}

static void drain(router *r, mock *m)
{
    uint32_t ids[300];
    char *text;
    atomic_store(&m->step_ms, 20);
    expect("goodbye", 4, 0, 30, NULL, ids, &text);
    int fd = ask("POST", "/v1/completions", "", "{\"prompt\": \"goodbye\", \"seed\": 4, \"max_tokens\": 30}");
    usleep(150000);
    T_EQ(atomic_load(&m->goodbyes), 0);
    T_EQ(router_stop(r), 0);
    for (int i = 0; i < 300 && !atomic_load(&m->goodbyes); i++) usleep(10000);
    T_EQ(atomic_load(&m->goodbyes), 1);
    reply a = finish(fd);
    T_EQ(a.status, 200);
    T_STR(str_at(a.json, "choices.0.text"), text);
    done(&a);
    free(text);
}

static void keys_and_queue(void)
{
    router r = router_start("--api-key", "s3cret");
    reply a = get("/v1/models");
    T_EQ(a.status, 401);
    T_STR(str_at(a.json, "error.code"), "invalid_api_key");
    done(&a);
    a = get("/livez");
    T_EQ(a.status, 200);
    done(&a);
    static const struct {
        const char *h;
        int status;
    } keys[] = {{"Authorization: Bearer s3cret\r\n", 200}, {"Authorization: bearer s3cret\r\n", 200},
                {"Authorization: Bearer s3cre\r\n", 401},  {"Authorization: Bearer s3cretx\r\n", 401},
                {"Authorization: Bearer \r\n", 401},       {"Authorization: s3cret\r\n", 401}};
    for (unsigned i = 0; i < TD_COUNT(keys); i++) {
        a = finish(ask("GET", "/v1/models", keys[i].h, NULL));
        T_EQ(a.status, keys[i].status);
        done(&a);
    }
    T_EQ(router_stop(&r), 0);
    r = router_start("--max-queue", "2");
    int fd[3];
    for (int i = 0; i < 3; i++) {
        fd[i] = ask("POST", "/v1/completions", "", "{\"prompt\": \"x\", \"max_tokens\": 2}");
        usleep(100000);
    }
    a = finish(fd[2]);
    T_EQ(a.status, 429);
    T_STR(str_at(a.json, "error.code"), "queue_full");
    T_OK(strcasestr(a.head, "retry-after: ") != NULL);
    done(&a);
    mock *m = mock_start(77, 0); /* the two that wait are served */
    for (int i = 0; i < 2; i++) {
        a = finish(fd[i]);
        T_EQ(a.status, 200);
        done(&a);
    }
    mock_stop(m);
    for (int i = 0; i < 200; i++) { /* nobody left: said at once */
        a = send_json("/v1/completions", "{\"prompt\": \"x\", \"max_tokens\": 2}");
        bool gone = a.status == 503;
        if (gone) T_STR(str_at(a.json, "error.code"), "no_worker");
        done(&a);
        if (gone) break;
        T_OK(i < 199);
    }
    T_EQ(router_stop(&r), 0);
}

/* A stream that waits is kept alive by comments, and answered when somebody comes. */
static void keepalive(void)
{
    router r = router_start("--keepalive-s", "1");
    int fd = ask("POST", "/v1/completions", "", "{\"prompt\": \"x\", \"max_tokens\": 2, \"stream\": true}");
    usleep(2300000);
    mock *m = mock_start(78, 0);
    reply a = finish(fd);
    T_EQ(a.status, 200);
    T_OK(!strncmp(a.body, ": keep-alive\n\n", 14) && strstr(a.body, "[DONE]"), "%.60s", a.body);
    done(&a);
    mock_stop(m);
    T_EQ(router_stop(&r), 0);
}

int main(int argc, char **argv)
{
    (void)argc;
    char self[400];
    snprintf(self, sizeof self, "%s", argv[0]);
    const char *given = getenv("TANDEM_ROUTER");
    if (given) snprintf(binary, sizeof binary, "%s", given);
    else snprintf(binary, sizeof binary, "%s/../bin/tandem-router", dirname(self));
    if (access(binary, X_OK)) T_SKIP("no tandem-router program beside this test");
    signal(SIGPIPE, SIG_IGN);
    snprintf(control, sizeof control, "ipc:///tmp/td-router-test-%d", (int)getpid());
    support_tokenizer();

    router r = router_start("--debug-endpoints", "--log-level=info");
    before_workers(&r);
    /* A request sent before any worker is there waits for one. */
    int fd = ask("POST", "/v1/completions", "", "{\"prompt\": \"early\", \"seed\": 1, \"max_tokens\": 3}");
    usleep(50000);
    mock *m = mock_start(900, 0);
    char line[512];
    T_OK(read_line(r.fd, line, sizeof line, 5000) && !strncmp(line, "ready toy", 9), "%s", line);
    reply a = finish(fd);
    T_EQ(a.status, 200);
    done(&a);
    completion(m);
    stop_string();
    streaming();
    chat();
    logprobs_and_echo();
    refusals();
    small_pages();
    client_leaves(m);
    m = worker_dies(m);
    drain(&r, m);
    mock_stop(m);
    keys_and_queue();
    keepalive();
    unlink(control + 6);
    support_tokenizer_close();
    return T_DONE();
}
