// SPDX-License-Identifier: Apache-2.0
#include "deploy/cli/cluster_http.h"
#include "common/check.h"
#include <curl/curl.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LINE = 1 << 20, MAX_BODY = 256 << 20 };

typedef struct call {
    td_client_call user;
    CURL *easy;
    td_buf in; /* a partial line of the stream, or the whole body */
    bool is_stream;
    struct call *next;
} call;

struct td_client {
    CURLM *multi;
    struct curl_slist *headers;
    char *base, *ca; /* ca: NULL: the system's */
    call *calls;
    int n;
};

td_client *td_client_open(const char *base_url, const char *api_key, const char *ca)
{
    td_client *c = td_xalloc(sizeof *c);
    curl_global_init(CURL_GLOBAL_DEFAULT);
    c->multi = curl_multi_init();
    TD_CHECK(c->multi);
    c->base = td_xstrdup(base_url);
    c->ca = ca[0] ? td_xstrdup(ca) : NULL;
    size_t n = strlen(c->base);
    while (n && c->base[n - 1] == '/') c->base[--n] = 0;
    if (n > 3 && !strcmp(c->base + n - 3, "/v1")) c->base[n - 3] = 0;
    c->headers = curl_slist_append(NULL, "Content-Type: application/json");
    c->headers = curl_slist_append(c->headers, "Expect:"); /* no 100-continue round trip before the body */
    if (api_key && api_key[0]) {
        td_buf b;
        td_buf_init(&b, 8192);
        td_buf_fmt(&b, "Authorization: Bearer %s", api_key);
        c->headers = curl_slist_append(c->headers, b.p);
        td_buf_deinit(&b);
    }
    return c;
}

static void call_end(td_client *c, call *k, td_status s, int http)
{
    for (call **at = &c->calls; *at; at = &(*at)->next) {
        if (*at == k) {
            *at = k->next;
            break;
        }
    }
    c->n--;
    curl_multi_remove_handle(c->multi, k->easy);
    k->user.on_end(k->user.arg, s, http, k->in.p ? k->in.p : "", k->in.len);
    curl_easy_cleanup(k->easy);
    td_buf_deinit(&k->in);
    free(k);
}

void td_client_cancel_all(td_client *c)
{
    while (c->calls) {
        td_refuse(TD_EGONE, "cancelled");
        call_end(c, c->calls, TD_EGONE, 0);
    }
}

void td_client_close(td_client *c)
{
    if (!c) return;
    td_client_cancel_all(c);
    curl_multi_cleanup(c->multi);
    curl_slist_free_all(c->headers);
    free(c->base);
    free(c->ca);
    free(c);
}

static void stream_lines(call *k)
{
    size_t start = 0;
    for (char *nl; (nl = memchr(k->in.p + start, '\n', k->in.len - start)); start = (size_t)(nl - k->in.p) + 1) {
        const char *line = k->in.p + start;
        size_t n = (size_t)(nl - line);
        if (n && line[n - 1] == '\r') n--;
        if (n > 6 && !memcmp(line, "data: ", 6) && !(n == 12 && !memcmp(line + 6, "[DONE]", 6)))
            k->user.on_event(k->user.arg, line + 6, n - 6);
    }
    td_buf_drop_front(&k->in, start);
}

static size_t on_bytes(char *p, size_t size, size_t n, void *arg)
{
    call *k = arg;
    td_buf_add(&k->in, p, size * n);
    if (!td_buf_ok(&k->in)) return 0;
    long http = 0;
    curl_easy_getinfo(k->easy, CURLINFO_RESPONSE_CODE, &http);
    if (k->user.on_event && http == 200) {
        stream_lines(k);
        if (k->in.len > MAX_LINE) return 0;
    }
    return size * n;
}

td_status td_client_start(td_client *c, const char *path, const char *body, size_t n, const td_client_call *user)
{
    call *k = td_xalloc(sizeof *k);
    k->user = *user;
    td_buf_init(&k->in, MAX_BODY);
    k->easy = curl_easy_init();
    TD_CHECK(k->easy);
    td_buf url;
    td_buf_init(&url, 8192);
    td_buf_fmt(&url, "%s%s", c->base, path);
    curl_easy_setopt(k->easy, CURLOPT_URL, url.p);
    td_buf_deinit(&url);
    if (c->ca) curl_easy_setopt(k->easy, CURLOPT_CAINFO, c->ca);
    curl_easy_setopt(k->easy, CURLOPT_HTTPHEADER, c->headers);
    curl_easy_setopt(k->easy, CURLOPT_WRITEFUNCTION, on_bytes);
    curl_easy_setopt(k->easy, CURLOPT_WRITEDATA, k);
    curl_easy_setopt(k->easy, CURLOPT_PRIVATE, k);
    curl_easy_setopt(k->easy, CURLOPT_NOSIGNAL, 1L);
    curl_easy_setopt(k->easy, CURLOPT_CONNECTTIMEOUT_MS, 5000L);
    curl_easy_setopt(k->easy, CURLOPT_TCP_NODELAY, 1L);
    if (body) {
        curl_easy_setopt(k->easy, CURLOPT_POSTFIELDSIZE_LARGE, (curl_off_t)n);
        curl_easy_setopt(k->easy, CURLOPT_COPYPOSTFIELDS, body);
    }
    k->next = c->calls;
    c->calls = k;
    c->n++;
    curl_multi_add_handle(c->multi, k->easy);
    int running;
    curl_multi_perform(c->multi, &running);
    return TD_OK;
}

int td_client_active(const td_client *c) { return c->n; }

void td_client_turn(td_client *c, int timeout_ms)
{
    int running, left;
    curl_multi_poll(c->multi, NULL, 0, timeout_ms, NULL);
    curl_multi_perform(c->multi, &running);
    for (CURLMsg *m; (m = curl_multi_info_read(c->multi, &left));) {
        if (m->msg != CURLMSG_DONE) continue;
        call *k = NULL;
        long http = 0;
        CURLcode r = m->data.result;
        curl_easy_getinfo(m->easy_handle, CURLINFO_PRIVATE, (char **)&k);
        curl_easy_getinfo(m->easy_handle, CURLINFO_RESPONSE_CODE, &http);
        td_status s = r == CURLE_OK ? TD_OK : r == CURLE_COULDNT_CONNECT ? TD_AGAIN : TD_EIO;
        if (s != TD_OK) td_refuse(s, "%s: %s", c->base, curl_easy_strerror(r));
        call_end(c, k, s, (int)http);
    }
}

typedef struct ask {
    bool ended;
    td_status s;
    int http;
    td_buf *out;
} ask;

static void ask_end(void *arg, td_status s, int http, const char *body, size_t n)
{
    ask *a = arg;
    a->ended = true;
    a->s = s;
    a->http = http;
    td_buf_add(a->out, body, n);
}

td_status td_client_ask(td_client *c, const char *path, const char *body, size_t n, td_arena *a, td_json **root)
{
    td_buf out;
    td_buf_init(&out, MAX_BODY);
    ask k = {.out = &out};
    td_client_call plain = {.on_end = ask_end, .arg = &k};
    td_status s = td_client_start(c, path, body, n, &plain);
    while (s == TD_OK && !k.ended) td_client_turn(c, 1000);
    if (s == TD_OK) s = k.s;
    if (s == TD_OK && td_json_parse(a, out.p ? out.p : "", out.len, (td_json_limits){0}, root) < 0)
        s = td_refuse(TD_EIO, "%s%s: status %d, and no JSON: is that a server of this API?", c->base, path, k.http);
    else if (s == TD_OK && k.http != 200)
        s = td_refuse(TD_EIO, "%s%s: status %d: %s", c->base, path, k.http, td_json_str(td_json_get(*root, "error"), "message", "?"));
    td_buf_deinit(&out);
    return s;
}
