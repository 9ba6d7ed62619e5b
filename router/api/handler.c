/* router/api/handler.c - routes: what is answered at once, what goes to the core, what goes to the text pool.
 * */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "common/clock.h"
#include "router/api/grpc.h"
#include "router/api/openai.h"

#include <string.h>

enum { CORE_LAG_US = 5000000 };

bool td_api_alive(const td_api *a) { return td_now_us() - atomic_load(&a->core_beat_us) < CORE_LAG_US; }

/* Time depends on the lengths alone. */
static bool same_secret(const char *a, const char *b)
{
    size_t n = strlen(a), m = strlen(b);
    volatile unsigned char diff = n != m;
    for (size_t i = 0; i < m; i++) diff = diff | (unsigned char)(a[n ? i % n : 0] ^ b[i]);
    return !diff;
}

bool td_api_authorized(const td_api *a, const td_exchange *x)
{
    if (!a->conf->api_key[0]) return true;
    const char *h = td_exchange_header(x, "authorization");
    if (!h || strncasecmp(h, "bearer ", 7)) return false;
    h += 7;
    while (*h == ' ') h++;
    return same_secret(h, a->conf->api_key);
}

static void reply_json(td_exchange *x, int status, const td_buf *b)
{
    td_header h = {"content-type", "application/json"};
    td_exchange_reply(x, status, &h, 1, b->p, b->len);
}

static void reply_error(td_api_net *n, td_exchange *x, const td_api_error *e, const td_header *extra)
{
    td_buf b;
    td_buf_init(&b, 0);
    td_api_error_json(&b, e);
    td_header h[2] = {{"content-type", "application/json"}};
    if (extra) h[1] = *extra;
    td_exchange_reply(x, e->status, h, extra ? 2 : 1, b.p, b.len);
    td_buf_deinit(&b);
    atomic_fetch_add(&n->http_errors, 1);
}

/* ---- answered at once ---- */

static void state(td_exchange *x, bool ok, const char *good, const char *bad)
{
    td_buf b;
    td_buf_init(&b, 0);
    td_buf_fmt(&b, "{\"status\": \"%s\"}", ok ? good : bad);
    reply_json(x, ok ? 200 : 503, &b);
    td_buf_deinit(&b);
}

static void livez(td_api_net *n, td_exchange *x)
{
    state(x, td_api_alive(n->api), "ok", "the core does not turn");
}

static void readyz(td_api_net *n, td_exchange *x)
{
    td_api *a = n->api;
    bool draining = atomic_load(&a->draining);
    state(x, td_api_alive(a) && atomic_load(&a->ready) && !draining, "ok",
          draining ? "draining" : "no worker is ready");
}

static void version(td_api_net *n, td_exchange *x)
{
    (void)n;
    td_buf b;
    td_buf_init(&b, 0);
    td_buf_str(&b, "{\"name\": \"tandem\", \"version\": \"" TD_VERSION "\"}");
    reply_json(x, 200, &b);
    td_buf_deinit(&b);
}

static void put_model(td_buf *b, const td_api *a)
{
    uint32_t len = atomic_load(&a->max_model_len);
    td_buf_str(b, "{\"id\": ");
    td_buf_json_str(b, a->model.name, strlen(a->model.name));
    td_buf_fmt(b, ", \"object\": \"model\", \"created\": %lld, \"owned_by\": \"tandem\", \"root\": ",
               (long long)a->model.created);
    td_buf_json_str(b, a->model.name, strlen(a->model.name));
    td_buf_fmt(b, ", \"parent\": null, \"max_model_len\": %u}", len ? len : a->model.max_len);
}

static void models(td_api_net *n, td_exchange *x)
{
    td_buf b;
    td_buf_init(&b, 0);
    td_buf_str(&b, "{\"object\": \"list\", \"data\": [");
    put_model(&b, n->api);
    td_buf_str(&b, "]}");
    reply_json(x, 200, &b);
    td_buf_deinit(&b);
}

static void one_model(td_api_net *n, td_exchange *x, const char *id)
{
    if (strcmp(id, n->api->model.name)) {
        td_api_error e;
        td_api_fail(&e, 404, "model_not_found", "model",
                    "the model '%.128s' does not exist; this server has '%s'", id, n->api->model.name);
        reply_error(n, x, &e, NULL);
        return;
    }
    td_buf b;
    td_buf_init(&b, 0);
    put_model(&b, n->api);
    reply_json(x, 200, &b);
    td_buf_deinit(&b);
}

/* ---- from the core ---- */

static void report(td_api_net *n, td_exchange *x, td_ask_core_kind kind)
{
    td_call *c = td_call_new(n, x, TD_TEXT_TOKENIZE, &td_voice_plain);
    c->state = TD_CALL_REPORT;
    if (td_api_tell_core(n, kind, NULL, 0, c)) return;
    td_api_fail(&c->err, 503, "overloaded", NULL, "the server is overloaded");
    td_call_reply_error(c, &c->err);
    td_call_free(c);
}

static void metrics(td_api_net *n, td_exchange *x) { report(n, x, TD_CORE_METRICS); }

static void ledger(td_api_net *n, td_exchange *x) { report(n, x, TD_CORE_LEDGER); }

/* ---- to the text pool ---- */

static void text(td_api_net *n, td_exchange *x, td_text_kind kind, const td_voice *v)
{
    td_call_parse(td_call_new(n, x, kind, v));
}
static void chat(td_api_net *n, td_exchange *x) { text(n, x, TD_TEXT_CHAT, &td_voice_openai); }
static void completions(td_api_net *n, td_exchange *x) { text(n, x, TD_TEXT_COMPLETION, &td_voice_openai); }
static void tokenize(td_api_net *n, td_exchange *x) { text(n, x, TD_TEXT_TOKENIZE, &td_voice_plain); }
static void detokenize(td_api_net *n, td_exchange *x) { text(n, x, TD_TEXT_DETOKENIZE, &td_voice_plain); }

/* ---- routes ---- */

static const struct {
    const char *method, *path;
    bool open;
    void (*fn)(td_api_net *, td_exchange *);
} routes[] = {
    {"POST", "/v1/chat/completions", false, chat},
    {"POST", "/v1/completions", false, completions},
    {"POST", "/tokenize", false, tokenize},
    {"POST", "/detokenize", false, detokenize},
    {"GET", "/v1/models", false, models},
    {"GET", "/debug/ledger", true, ledger},
    {"GET", "/livez", true, livez},
    {"GET", "/readyz", true, readyz},
    {"GET", "/health", true, readyz},
    {"GET", "/metrics", true, metrics},
    {"GET", "/version", true, version},
};

static bool method_is(const char *m, const char *want)
{
    return !strcmp(m, want) || (!strcmp(want, "GET") && !strcmp(m, "HEAD"));
}

void td_api_handle(void *arg, td_exchange *x)
{
    td_api_net *n = arg;
    atomic_fetch_add(&n->http_requests, 1);
    if (td_grpc_is(x)) {
        td_grpc_handle(n, x);
        return;
    }
    const char *path = td_exchange_path(x), *method = td_exchange_method(x);
    bool authorized = td_api_authorized(n->api, x), known = false;
    td_api_error e;
    for (unsigned i = 0; i < TD_COUNT(routes); i++) {
        if (strcmp(path, routes[i].path) || (routes[i].fn == ledger && !n->api->conf->debug_endpoints))
            continue;
        known = true;
        if (!method_is(method, routes[i].method)) continue;
        if (!routes[i].open && !authorized) break;
        routes[i].fn(n, x);
        return;
    }
    static const char one[] = "/v1/models/";
    bool is_one = !strncmp(path, one, sizeof one - 1) && path[sizeof one - 1];
    if (!authorized) {
        td_api_fail(&e, 401, "invalid_api_key", NULL, "the API key is missing or wrong");
        reply_error(n, x, &e, &(td_header){"www-authenticate", "Bearer"});
    } else if (is_one && method_is(method, "GET")) {
        one_model(n, x, path + sizeof one - 1);
    } else if (known || is_one) {
        td_api_fail(&e, 405, "method_not_allowed", NULL, "%.16s is not allowed here", method);
        bool post = !strcmp(path, "/tokenize") || !strcmp(path, "/detokenize") ||
                    (strstr(path, "completions") != NULL);
        reply_error(n, x, &e, &(td_header){"allow", post ? "POST" : "GET"});
    } else {
        td_api_fail(&e, 404, "not_found", NULL, "there is nothing at this path");
        reply_error(n, x, &e, NULL);
    }
}
