// SPDX-License-Identifier: Apache-2.0
/* The public calls on an exchange. HTTP/1.1 and HTTP/2 queue body bytes alike (x->out); they differ in how
 * the queue is framed. */
#include "common/check.h"
#include "common/clock.h"
#include "router/net/http1_out.h"
#include "router/net/net_int.h"
#include <stdlib.h>
#include <string.h>

td_exchange *exchange_new(td_conn *c, int32_t stream_id)
{
    td_exchange *x = td_xalloc(sizeof *x);
    x->c = c;
    x->stream_id = stream_id;
    x->created_us = td_now_us();
    outq_init(&x->out);
    td_buf_init(&x->body, c->n->o.max_body_bytes + 1);
    x->next = c->xs;
    if (c->xs) c->xs->prev = x;
    c->xs = x;
    c->n_xs++;
    c->n->n_exchanges++;
    return x;
}

void exchange_free(td_exchange *x)
{
    td_conn *c = x->c;
    if (x->prev) x->prev->next = x->next;
    else c->xs = x->next;
    if (x->next) x->next->prev = x->prev;
    c->n_xs--;
    c->n->n_exchanges--;
    body_hold(c->n, &x->body_held, 0);
    td_head_deinit(&x->req);
    td_head_deinit(&x->trailers);
    td_buf_deinit(&x->body);
    td_buf_deinit(&x->fields);
    outq_deinit(&x->out);
    free(x);
}

bool body_hold(td_net *n, size_t *held, size_t now)
{
    n->body_bytes = n->body_bytes - *held + now;
    *held = now;
    return n->body_bytes <= n->o.max_body_bytes * TD_NET_BODY_BUDGET;
}

void exchange_hand(td_exchange *x)
{
    td_net *n = x->c->n;
    x->received_us = td_now_us();
    x->handed = true;
    x->no_body = !strcmp(td_exchange_method(x), "HEAD");
    n->counts.requests++;
    n->o.handler(n->o.arg, x);
}

void exchange_lost(td_exchange *x)
{
    if (!x->handed || x->finished || x->gone) return;
    x->gone = true;
    x->c->n->counts.lost++;
    if (x->on_close) x->on_close(x->user);
}

const char *td_exchange_method(const td_exchange *x) { return td_head_at(&x->req, x->req.method); }
const char *td_exchange_path(const td_exchange *x) { return td_head_at(&x->req, x->req.path); }
const char *td_exchange_query(const td_exchange *x) { return td_head_at(&x->req, x->req.query); }
const char *td_exchange_header(const td_exchange *x, const char *lower_name)
{
    return td_head_get(&x->req, lower_name);
}
const char *td_exchange_peer(const td_exchange *x) { return x->c->peer; }
bool td_exchange_is_h2(const td_exchange *x) { return x->stream_id != 0; }
int64_t td_exchange_received_us(const td_exchange *x) { return x->received_us; }
bool td_exchange_started(const td_exchange *x) { return x->started; }

const char *td_exchange_body(const td_exchange *x, size_t *n)
{
    *n = x->body.len;
    return x->body.len ? x->body.p : "";
}

void td_exchange_drop_body(td_exchange *x)
{
    td_buf_deinit(&x->body);
    body_hold(x->c->n, &x->body_held, 0);
}

void td_exchange_set_user(td_exchange *x, void *user, void (*on_close)(void *user))
{
    x->user = user;
    x->on_close = on_close;
}

void td_exchange_start(td_exchange *x, int status, const td_header *h, size_t n)
{
    TD_ASSERT(!x->started);
    if (x->started) return;
    x->started = true;
    x->status = status;
    if (td_http1_bodyless(status)) x->no_body = true;
    if (x->stream_id) {
        h2_start(x, h, n, false, false, 0);
    } else {
        td_buf_init(&x->fields, 0);
        td_http1_fields(&x->fields, h, n);
    }
    for (size_t i = 0; i < n; i++) /* a handler may ask for the end of an HTTP/1.1 connection */
        if (!x->stream_id && !strcmp(h[i].name, "connection") && !strcmp(h[i].value, "close"))
            x->c->keep = false;
    conn_touch(x->c);
}

void exchange_write_parts(td_exchange *x, const char *a, size_t na, const char *b, size_t nb, const char *c,
                          size_t nc)
{
    TD_ASSERT(x->started && !x->finished);
    if (!x->started || x->finished || x->gone || x->reset) return;
    if (x->no_body) {
        x->discarded += na + nb + nc;
        return;
    }
    const td_net_opts *o = &x->c->n->o;
    if (td_exchange_unsent(x) > o->high_mark_bytes * TD_NET_OVERFLOW_MARKS) {
        /* The producer did not look at unsent(). It ends; on_close comes with a later turn. */
        x->c->n->counts.slow_readers++;
        if (x->stream_id) h2_reset(x, NGHTTP2_ENHANCE_YOUR_CALM);
        else x->c->dead = true;
        conn_touch(x->c);
        return;
    }
    td_buf_add(&x->out.b, a, na);
    td_buf_add(&x->out.b, b, nb);
    td_buf_add(&x->out.b, c, nc);
    if (x->stream_id) h2_kick(x);
    conn_touch(x->c);
}

void td_exchange_write(td_exchange *x, const void *p, size_t n)
{
    exchange_write_parts(x, p, n, NULL, 0, NULL, 0);
}

void td_exchange_finish(td_exchange *x, const td_header *trailers, size_t n)
{
    TD_ASSERT(x->started && !x->finished);
    if (!x->started) td_exchange_start(x, 500, NULL, 0);
    conn_touch(x->c);
    if (x->stream_id) h2_finish(x, trailers, n);
    else h1_finish(x);
}

void td_exchange_reply(td_exchange *x, int status, const td_header *h, size_t n, const void *body, size_t len)
{
    if (!x->stream_id || x->started) {
        td_exchange_start(x, status, h, n);
        if (len) td_exchange_write(x, body, len);
        td_exchange_finish(x, NULL, 0);
        return;
    }
    x->started = true;
    x->status = status;
    bool end = !len || x->no_body || td_http1_bodyless(status);
    if (!end) td_buf_add(&x->out.b, body, len);
    x->finished = true;
    h2_start(x, h, n, end, !td_http1_bodyless(status), len);
    conn_touch(x->c);
}

void td_exchange_abort(td_exchange *x)
{
    td_conn *c = x->c;
    x->gone = true;
    if (x->stream_id) {
        h2_reset(x, NGHTTP2_INTERNAL_ERROR);
    } else {
        exchange_free(x);
        c->dead = true;
    }
    conn_touch(c);
}

size_t td_exchange_unsent(const td_exchange *x)
{
    return outq_len(&x->out) + (x->stream_id ? 0 : outq_len(&x->c->out));
}

void td_exchange_drop_unsent(td_exchange *x)
{
    if (x->stream_id) outq_clear(&x->out);
}
