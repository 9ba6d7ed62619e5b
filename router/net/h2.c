// SPDX-License-Identifier: Apache-2.0
/* HTTP/2 on a connection, by nghttp2: a stream is an exchange. Frames are made only TD_NET_H2_FILL_BYTES
 * ahead of the socket, so that body bytes stay in their stream's queue, where they are counted and can be
 * dropped. Ends of streams: the client's END_STREAM hands the request over; ours is on the last DATA, on the
 * trailers, or on the only HEADERS; if ours comes first (an error while the body still arrives)
 * RST_STREAM(NO_ERROR) follows (RFC 9113 8.1), for gRPC at once, for others after TD_NET_LINGER_US of
 * discarded upload. */
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "router/net/grpc_frame.h"
#include "router/net/http1_out.h"
#include "router/net/net_int.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    MAX_TARGET = 8192,
    STREAM_WINDOW = 1 << 20,
    CONNECTION_WINDOW = 4 << 20,
    MAX_NV = TD_HEAD_MAX + 4,
    RESETS_BURST = 1000, /* client RST_STREAMs, against rapid reset (CVE-2023-44487) */
    RESETS_PER_S = 100,
};

/* ---- header fields ---- */

/* nghttp2 copies fields when they are submitted, so these views need to live only until then. */
static size_t view(const td_head *h, nghttp2_nv *nv, size_t at)
{
    for (int i = 0; i < h->n; i++) {
        const char *name = td_head_at(h, h->name[i]), *value = td_head_at(h, h->value[i]);
        nv[at++] = (nghttp2_nv){(uint8_t *)(uintptr_t)name, (uint8_t *)(uintptr_t)value, strlen(name),
                                strlen(value), 0};
    }
    return at;
}

/* HTTP/2 wants lower-case names and no control bytes; framing fields of HTTP/1.1 are forbidden. */
static void collect(td_head *to, const td_header *h, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        if (td_http1_own_field(h[i].name)) continue;
        if (!td_head_add(to, h[i].name, strlen(h[i].name), h[i].value, strlen(h[i].value))) return;
        for (char *p = to->text.p + to->name[to->n - 1]; *p; p++)
            if (*p >= 'A' && *p <= 'Z') *p = (char)(*p + 32);
        for (char *p = to->text.p + to->value[to->n - 1]; *p; p++)
            if (((unsigned char)*p < 0x20 && *p != '\t') || *p == 0x7f) *p = ' ';
    }
}

static void add_field(td_head *to, const char *name, const char *value)
{
    td_head_add(to, name, strlen(name), value, strlen(value));
}

/* ---- response ---- */

static void submit_trailers(td_exchange *x)
{
    nghttp2_nv nv[MAX_NV];
    x->trailers_sent = true;
    nghttp2_submit_trailer(x->c->h2, x->stream_id, nv, view(&x->trailers, nv, 0));
}

static ssize_t read_body(nghttp2_session *s, int32_t id, uint8_t *buf, size_t room, uint32_t *flags,
                         nghttp2_data_source *src, void *arg)
{
    (void)src, (void)arg;
    td_exchange *x = nghttp2_session_get_stream_user_data(s, id);
    if (!x) return NGHTTP2_ERR_TEMPORAL_CALLBACK_FAILURE;
    size_t n = TD_MIN(outq_len(&x->out), room);
    if (n) {
        memcpy(buf, outq_ptr(&x->out), n);
        outq_sent(&x->out, n);
    }
    if (x->finished && !outq_len(&x->out)) {
        *flags |= NGHTTP2_DATA_FLAG_EOF;
        if (x->trailers.n) {
            *flags |= NGHTTP2_DATA_FLAG_NO_END_STREAM;
            if (!x->trailers_sent) submit_trailers(x);
        }
        return (ssize_t)n;
    }
    if (n) return (ssize_t)n;
    x->deferred = true;
    return NGHTTP2_ERR_DEFERRED;
}

void h2_start(td_exchange *x, const td_header *h, size_t n, bool end, bool has_length, size_t length)
{
    td_conn *c = x->c;
    td_head head;
    nghttp2_nv nv[MAX_NV];
    char text[32];
    td_head_init(&head, 0);
    snprintf(text, sizeof text, "%d", x->status);
    add_field(&head, ":status", text);
    collect(&head, h, TD_MIN(n, (size_t)TD_HEAD_MAX - 3));
    add_field(&head, "date", net_date(c->n));
    if (has_length) {
        snprintf(text, sizeof text, "%zu", length);
        add_field(&head, "content-length", text);
    }
    nghttp2_data_provider body = {.source = {.ptr = NULL}, .read_callback = read_body};
    if (nghttp2_submit_response(c->h2, x->stream_id, nv, view(&head, nv, 0),
                                end || x->no_body ? NULL : &body))
        c->dead = true;
    td_head_deinit(&head);
    x->head_sent = true;
}

void h2_kick(td_exchange *x)
{
    if (!x->deferred) return;
    x->deferred = false;
    nghttp2_session_resume_data(x->c->h2, x->stream_id);
}

/* With nothing queued, trailers go out at once: behind a closed flow-control window the data provider would
 * never be asked again, and its end would never come. */
void h2_finish(td_exchange *x, const td_header *trailers, size_t n)
{
    x->finished = true;
    if (x->reset || x->no_body) return;
    if (n) {
        td_head_init(&x->trailers, 0);
        collect(&x->trailers, trailers, TD_MIN(n, (size_t)TD_HEAD_MAX));
        if (!outq_len(&x->out)) {
            submit_trailers(x);
            return;
        }
    }
    h2_kick(x);
}

void h2_reset(td_exchange *x, uint32_t code)
{
    if (x->reset) return;
    x->reset = true;
    outq_clear(&x->out);
    nghttp2_submit_rst_stream(x->c->h2, NGHTTP2_FLAG_NONE, x->stream_id, code);
}

static void refuse_grpc(td_exchange *x, int status, const char *what)
{
    int code = status == 413 || status == 431 || status == 503 ? 8 : status == 408 ? 4 : 13;
    char text[8];
    snprintf(text, sizeof text, "%d", code);
    const td_header h[] = {
        {"content-type", "application/grpc"}, {"grpc-status", text}, {"grpc-message", what}};
    x->status = 200;
    h2_start(x, h, TD_COUNT(h), true, false, 0);
}

/* net's own answer, before the handler saw the request: nothing is owed to anybody afterwards. */
void h2_error(td_exchange *x, int status, const char *what)
{
    td_net *n = x->c->n;
    if (x->started || x->handed) {
        h2_reset(x, NGHTTP2_CANCEL);
        return;
    }
    n->counts.errors++;
    td_buf_deinit(&x->body);
    body_hold(n, &x->body_held, 0);
    x->started = x->finished = true;
    if (td_grpc_is(x)) {
        refuse_grpc(x, status, what);
        return;
    }
    td_buf body;
    td_buf_init(&body, 0);
    if (n->o.error_body) n->o.error_body(n->o.arg, status, what, &body);
    td_buf_add(&x->out.b, body.p, body.len);
    const td_header h[] = {{"content-type", "application/json"}};
    x->status = status;
    h2_start(x, h, TD_COUNT(h), !body.len, true, body.len);
    td_buf_deinit(&body);
}

/* ---- request ---- */

static int on_begin_headers(nghttp2_session *s, const nghttp2_frame *f, void *arg)
{
    td_conn *c = arg;
    if (f->hd.type != NGHTTP2_HEADERS || f->headers.cat != NGHTTP2_HCAT_REQUEST) return 0;
    td_exchange *x = exchange_new(c, f->hd.stream_id);
    td_head_init(&x->req, c->n->o.max_header_bytes + 2 * MAX_TARGET);
    nghttp2_session_set_stream_user_data(s, f->hd.stream_id, x);
    return 0;
}

static int on_header(nghttp2_session *s, const nghttp2_frame *f, const uint8_t *name, size_t nn,
                     const uint8_t *value, size_t nv, uint8_t flags, void *arg)
{
    td_conn *c = arg;
    (void)flags;
    td_exchange *x = nghttp2_session_get_stream_user_data(s, f->hd.stream_id);
    if (!x || x->bad_status || f->hd.type != NGHTTP2_HEADERS || f->headers.cat != NGHTTP2_HCAT_REQUEST)
        return 0;
    const char *k = (const char *)name, *v = (const char *)value;
    x->list_bytes += nn + nv + 32; /* as SETTINGS_MAX_HEADER_LIST_SIZE counts */
    if (nn == 5 && !memcmp(k, ":path", 5)) {
        if (nv > MAX_TARGET) x->bad_status = 414;
        else if (!td_head_target(&x->req, v, nv)) x->bad_status = 400;
    } else if (x->list_bytes > c->n->o.max_header_bytes) {
        x->bad_status = 431;
    } else if (nn == 7 && !memcmp(k, ":method", 7)) {
        x->req.method = td_head_put(&x->req, v, nv);
    } else if (nn == 10 && !memcmp(k, ":authority", 10)) {
        td_head_add(&x->req, "host", 4, v, nv);
    } else if (nn && k[0] != ':' && !td_head_add(&x->req, k, nn, v, nv)) {
        x->bad_status = 431;
    }
    return 0;
}

static void request_done(td_exchange *x)
{
    x->client_end = true;
    if (!x->finished && !x->handed && !x->reset) exchange_hand(x);
}

static void head_done(td_exchange *x)
{
    x->head_done = true;
    const char *length = td_head_get(&x->req, "content-length");
    if (x->bad_status) {
        h2_error(x, x->bad_status,
                 x->bad_status == 431   ? "request header fields too large"
                 : x->bad_status == 414 ? "request target too long"
                                        : "request target must be a path");
    } else if (length && strtoull(length, NULL, 10) > x->c->n->o.max_body_bytes) {
        h2_error(x, 413, "request body too large");
    }
}

static int on_frame(nghttp2_session *s, const nghttp2_frame *f, void *arg)
{
    (void)arg;
    if (f->hd.type != NGHTTP2_HEADERS && f->hd.type != NGHTTP2_DATA) return 0;
    td_exchange *x = nghttp2_session_get_stream_user_data(s, f->hd.stream_id);
    if (!x) return 0;
    bool end = f->hd.flags & NGHTTP2_FLAG_END_STREAM;
    if (end) x->client_end = true; /* before an error answer decides about RST_STREAM */
    if (f->hd.type == NGHTTP2_HEADERS && f->headers.cat == NGHTTP2_HCAT_REQUEST) head_done(x);
    if (end) request_done(x);
    return 0;
}

static int on_data(nghttp2_session *s, uint8_t flags, int32_t id, const uint8_t *p, size_t n, void *arg)
{
    td_conn *c = arg;
    (void)flags;
    nghttp2_session_consume(s, id, n); /* what is buffered is limited below; let the client go on */
    td_exchange *x = nghttp2_session_get_stream_user_data(s, id);
    if (!x || x->finished || x->reset) return 0;
    if (n > c->n->o.max_body_bytes - x->body.len) {
        h2_error(x, 413, "request body too large");
        return 0;
    }
    td_buf_add(&x->body, p, n);
    if (!body_hold(c->n, &x->body_held, x->body.len)) h2_error(x, 503, "too many request bytes in flight");
    return 0;
}

static int on_stream_close(nghttp2_session *s, int32_t id, uint32_t code, void *arg)
{
    (void)code, (void)arg;
    td_exchange *x = nghttp2_session_get_stream_user_data(s, id);
    if (!x) return 0;
    nghttp2_session_set_stream_user_data(s, id, NULL);
    exchange_lost(x);
    exchange_free(x);
    return 0;
}

static int on_frame_sent(nghttp2_session *s, const nghttp2_frame *f, void *arg)
{
    (void)arg;
    if ((f->hd.type != NGHTTP2_HEADERS && f->hd.type != NGHTTP2_DATA) ||
        !(f->hd.flags & NGHTTP2_FLAG_END_STREAM))
        return 0;
    td_exchange *x = nghttp2_session_get_stream_user_data(s, f->hd.stream_id);
    if (!x || x->client_end || x->reset) return 0;
    /* Some clients drop an answer that is followed by RST: give their upload time to end. */
    if (td_grpc_is(x)) h2_reset(x, NGHTTP2_NO_ERROR);
    else x->ended_us = td_now_us();
    return 0;
}

/* ---- connection ---- */

td_status h2_setup(td_net *n)
{
    if (nghttp2_session_callbacks_new(&n->h2_cb) || nghttp2_option_new(&n->h2_opt))
        return td_fail(TD_EFULL, "net: out of memory");
    nghttp2_session_callbacks_set_on_begin_headers_callback(n->h2_cb, on_begin_headers);
    nghttp2_session_callbacks_set_on_header_callback(n->h2_cb, on_header);
    nghttp2_session_callbacks_set_on_frame_recv_callback(n->h2_cb, on_frame);
    nghttp2_session_callbacks_set_on_data_chunk_recv_callback(n->h2_cb, on_data);
    nghttp2_session_callbacks_set_on_stream_close_callback(n->h2_cb, on_stream_close);
    nghttp2_session_callbacks_set_on_frame_send_callback(n->h2_cb, on_frame_sent);
    nghttp2_option_set_no_auto_window_update(n->h2_opt, 1);
    nghttp2_option_set_max_settings(n->h2_opt, 16);
    nghttp2_option_set_stream_reset_rate_limit(n->h2_opt, RESETS_BURST, RESETS_PER_S);
    return TD_OK;
}

bool h2_open(td_conn *c)
{
    const td_net_opts *o = &c->n->o;
    if (nghttp2_session_server_new2(&c->h2, c->n->h2_cb, c, c->n->h2_opt)) return false;
    const nghttp2_settings_entry set[] = {
        {NGHTTP2_SETTINGS_MAX_CONCURRENT_STREAMS, (uint32_t)o->max_streams},
        {NGHTTP2_SETTINGS_INITIAL_WINDOW_SIZE, STREAM_WINDOW},
        {NGHTTP2_SETTINGS_MAX_HEADER_LIST_SIZE, (uint32_t)TD_MIN(o->max_header_bytes, (size_t)1 << 24)},
    };
    return !nghttp2_submit_settings(c->h2, NGHTTP2_FLAG_NONE, set, TD_COUNT(set)) &&
           !nghttp2_session_set_local_window_size(c->h2, NGHTTP2_FLAG_NONE, 0, CONNECTION_WINDOW);
}

void h2_input(td_conn *c, const char *p, size_t n)
{
    ssize_t r = nghttp2_session_mem_recv(c->h2, (const uint8_t *)p, n);
    if (r >= 0) return;
    TD_DEBUG_LOG("net: %s: HTTP/2: %s", c->peer, nghttp2_strerror((int)r));
    c->dead = true;
}

void h2_fill(td_conn *c)
{
    while (outq_len(&c->out) < TD_NET_H2_FILL_BYTES) {
        const uint8_t *p = NULL;
        ssize_t n = nghttp2_session_mem_send(c->h2, &p);
        if (n < 0) c->dead = true;
        if (n <= 0) return;
        td_buf_add(&c->out.b, p, (size_t)n);
    }
}

bool h2_over(const td_conn *c)
{
    if (c->n->draining && !c->h2_goaway) return false; /* requests may still be on their way */
    return !nghttp2_session_want_read(c->h2) && !nghttp2_session_want_write(c->h2);
}

/* Two GOAWAYs: the first warns, the second names the last stream; between them a round trip, so that no request
 * in flight is refused. */
void h2_drain(td_conn *c, int64_t now)
{
    if (!c->h2_notice) {
        c->h2_notice = true;
        c->h2_notice_us = now;
        nghttp2_submit_shutdown_notice(c->h2);
        conn_touch(c);
    } else if (!c->h2_goaway && now - c->h2_notice_us >= TD_NET_SETTLE_US) {
        c->h2_goaway = true;
        conn_touch(c);
        nghttp2_submit_goaway(c->h2, NGHTTP2_FLAG_NONE, nghttp2_session_get_last_proc_stream_id(c->h2),
                              NGHTTP2_NO_ERROR, NULL, 0);
    }
}

static void sweep_stream(td_exchange *x, int64_t now)
{
    td_conn *c = x->c;
    const td_net_opts *o = &c->n->o;
    if (!x->head_done) {
        if (now - x->created_us <= o->header_us) return;
        c->n->counts.timeouts++;
        c->dead = true; /* a header block cut in the middle blocks the whole connection */
    } else if (!x->client_end && !x->finished && now - x->created_us > o->body_us) {
        c->n->counts.timeouts++;
        h2_error(x, 408, "request body took too long");
    } else if (x->ended_us && now - x->ended_us > TD_NET_LINGER_US) {
        h2_reset(x, NGHTTP2_NO_ERROR);
    } else if (!x->ended_us &&
               conn_slow(c, &x->slow, outq_len(&x->out) + x->finished, x->out.sent, x->finished, now)) {
        if (outq_len(&c->out) && now - c->progress_us > o->slow_reader_us)
            c->dead = true; /* not one slow stream: the peer */
        h2_reset(x, NGHTTP2_CANCEL);
    }
    /* RST_STREAM may be stuck behind a full socket, but the handler must not wait for it. */
    if (x->reset) exchange_lost(x);
}

void h2_sweep(td_conn *c, int64_t now)
{
    for (td_exchange *x = c->xs; x; x = x->next) sweep_stream(x, now);
    if (!c->xs && !c->h2_goaway && now - c->active_us > c->n->o.idle_us) {
        c->h2_goaway = true;
        nghttp2_session_terminate_session(c->h2, NGHTTP2_NO_ERROR);
    }
    conn_touch(c);
}
