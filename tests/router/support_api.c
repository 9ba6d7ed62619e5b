/* tests/router/support_api.c - mock worker, router process, HTTP client. */
// SPDX-License-Identifier: Apache-2.0
#include "tests/router/support_api.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/wire/loop.h"
#include "tests/router/support_msg.h"
#include "tests/router/support_tok.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <libgen.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

static char binary[512];
char api_control[128];
static int port;

/* ---- the mock worker ---- */
static void post(api_mock *m, td_msg *msg)
{
    msg->sender = m->inc;
    td_buf b;
    td_buf_init(&b, 0);
    TD_CHECK(td_msg_pack(msg, &b) == TD_OK);
    td_part p = {b.p, b.len};
    for (int i = 0; i < 1000 && td_sock_send(m->s, NULL, 0, &p, 1) == TD_AGAIN; i++) usleep(1000);
    td_buf_deinit(&b);
}

static void post_hello(api_mock *m)
{
    td_msg h = support_hello("mock", TD_ROLE_MIXED, 258, 256, SIM_EOS);
    h.hello.bulk_endpoint = "";
    h.hello.max_seqs = 32;
    post(m, &h);
}

static void post_end(api_mock *m, api_leg *l, td_finish f)
{
    td_msg e = support_ended(l->key, f, TD_OK, "", false);
    post(m, &e);
    l->used = false;
    atomic_fetch_sub(&m->legs, 1);
}

static void post_prompt(api_mock *m, api_leg *l)
{
    static td_msg_score sc[1024];
    static td_top top[1024];
    uint32_t n = 0;
    for (uint32_t i = 0; l->plp >= 0 && i + 1 < l->n_prompt; i++) {
        top[i] = (td_top){'x', -0.5f};
        sc[i] = (td_msg_score){l->prompt[i + 1], -1.25f, l->plp > 0, &top[i]};
        n++;
    }
    td_msg p = support_prompt_done(l->key, sc, n);
    post(m, &p);
    l->told = true;
}

static void step_leg(api_mock *m, api_leg *l)
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
        if (id == SIM_EOS)
            t.finish = TD_FINISH_STOP, t.stop_token = id;
        else if (l->at[k] >= l->max)
            t.finish = TD_FINISH_LENGTH;
        l->done[k] = t.finish != TD_FINISH_NONE;
        all &= l->done[k];
        td_msg msg = support_tokens(&t, m->step);
        post(m, &msg);
    }
    if (all) post_end(m, l, TD_FINISH_STOP);
}

static void take(api_mock *m, const td_msg *msg)
{
    if (msg->type == TD_MSG_GOODBYE) {
        td_msg bye = {.type = TD_MSG_GOODBYE};
        post(m, &bye);
        atomic_fetch_add(&m->goodbyes, 1);
    }
    if (msg->type == TD_MSG_START) {
        const td_msg_work *w = &msg->start.work;
        api_leg *l = m->leg;
        while (l->used) l++;
        *l = (api_leg){.used = true,
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
        for (api_leg *l = m->leg; l < m->leg + API_MOCK_LEGS; l++) {
            if (!l->used || l->key.request != msg->cancel.key.request ||
                l->key.attempt != msg->cancel.key.attempt)
                continue;
            atomic_fetch_add(&m->cancels, 1);
            if (msg->type == TD_MSG_CANCEL)
                post_end(m, l, TD_FINISH_CANCEL);
            else
                l->done[msg->cancel.choice] = true;
        }
    }
}

static void *mock_body(void *arg)
{
    api_mock *m = arg;
    td_sock_opts o = {.max_message_bytes = 8 << 20, .hwm = 10000};
    char id[32];
    snprintf(id, sizeof id, "w/%llx", (unsigned long long)m->inc);
    TD_CHECK(td_sock_connect_dealer(m->z, api_control, id, strlen(id), &o, &m->s) == TD_OK);
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
            td_msg h = support_beat(TD_WSTATE_READY, m->step, atomic_load(&m->legs) > 0);
            h.heartbeat.n_groups = 1;
            h.heartbeat.ledger[0] = (td_msg_ledger){.total = 9, .free = 9};
            post(m, &h);
        }
        if (now - stepped < atomic_load(&m->step_ms) * 1000) continue;
        stepped = now;
        m->step++;
        for (api_leg *l = m->leg; l < m->leg + API_MOCK_LEGS; l++)
            if (l->used) step_leg(m, l);
    }
    td_sock_close(m->s);
    return NULL;
}

api_mock *api_mock_start(uint64_t inc, int step_ms)
{
    api_mock *m = td_xalloc(sizeof *m);
    m->inc = inc;
    m->z = td_zctx_open();
    atomic_store(&m->step_ms, step_ms);
    pthread_create(&m->thread, NULL, mock_body, m);
    return m;
}

void api_mock_stop(api_mock *m)
{
    atomic_store(&m->stop, true);
    pthread_join(m->thread, NULL);
    td_zctx_close(m->z);
    free(m);
}

/* ---- the router ---- */
bool api_read_line(int fd, char *line, size_t n, int ms)
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

api_router api_router_start(const char *a1, const char *a2)
{
    int p[2];
    TD_CHECK(!pipe(p));
    api_router r = {.fd = p[0]};
    char fd[16], bind[160];
    snprintf(fd, sizeof fd, "%d", p[1]);
    snprintf(bind, sizeof bind, "%s", api_control);
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
    TD_CHECK(api_read_line(r.fd, line, sizeof line, 10000) &&
             sscanf(line, "listening %d %d", &port, &grpc) == 2);
    return r;
}

int api_router_stop(api_router *r)
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
int api_dial(void)
{
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    struct sockaddr_in a = {
        .sin_family = AF_INET, .sin_port = htons((uint16_t)port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    TD_CHECK(fd >= 0 && !connect(fd, (struct sockaddr *)&a, sizeof a));
    return fd;
}

int api_ask(const char *method, const char *path, const char *headers, const char *body)
{
    int fd = api_dial();
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
    else
        td_buf_str(&b, "\r\n");
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

api_reply api_finish(int fd)
{
    api_reply r = {0};
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

void api_done(api_reply *r)
{
    free(r->raw);
    td_arena_deinit(&r->arena);
}
api_reply api_get(const char *path)
{
    return api_finish(api_ask("GET", path, "", NULL));
}
api_reply api_send_json(const char *path, const char *body)
{
    return api_finish(api_ask("POST", path, "", body));
}

/* "a.0.b" */
const td_json *api_at(const td_json *v, const char *path)
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
const char *api_str_at(const td_json *v, const char *path)
{
    v = api_at(v, path);
    return v && v->type == TD_JSON_STR ? v->s : "(none)";
}
int64_t api_int_at(const td_json *v, const char *path)
{
    v = api_at(v, path);
    return v && v->type == TD_JSON_INT ? v->i : -999;
}

bool api_init(const char *argv0)
{
    char self[400];
    snprintf(self, sizeof self, "%s", argv0);
    const char *given = getenv("TANDEM_ROUTER");
    if (given)
        snprintf(binary, sizeof binary, "%s", given);
    else
        snprintf(binary, sizeof binary, "%s/../bin/tandem-router", dirname(self));
    signal(SIGPIPE, SIG_IGN);
    snprintf(api_control, sizeof api_control, "ipc:///tmp/td-router-test-%d", (int)getpid());
    return !access(binary, X_OK);
}
