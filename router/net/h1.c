// SPDX-License-Identifier: Apache-2.0
/* HTTP/1.1 on a connection: one exchange at a time. While its answer is pending further bytes wait in
 * c->in. */
#include "common/check.h"
#include "common/clock.h"
#include "router/net/http1_out.h"
#include "router/net/net_int.h"

/* The parser holds the request's strings; they move into the exchange and the parser starts afresh. */
static void hand_over(td_conn *c)
{
    td_http1 *p = c->h1;
    td_exchange *x = exchange_new(c, 0);
    td_head_move(&x->req, &p->head);
    td_buf_deinit(&x->body);
    x->body = p->body;
    p->body = (td_buf){0};
    x->created_us = c->since_us;
    c->keep = p->keep_alive;
    c->v11 = p->v11;
    td_http1_reset(p);
    c->since_us = c->head_us = 0;
    body_hold(c->n, &c->body_held, 0);
    body_hold(c->n, &x->body_held, x->body.len);
    exchange_hand(x);
}

size_t h1_consume(td_conn *c, const char *p, size_t n)
{
    size_t used = 0;
    int requests = 0;
    if (!c->h1) {
        c->h1 = td_xalloc(sizeof *c->h1);
        td_http1_init(c->h1, c->n->o.max_header_bytes, c->n->o.max_body_bytes);
    }
    while (used < n && !c->xs && !c->closing && !c->dead) {
        if (outq_len(&c->out) > c->n->o.high_mark_bytes) break; /* pipelines and does not read */
        if (requests == TD_NET_REQUESTS_PER_TURN) {
            conn_touch(c);
            break;
        }
        size_t k = 0;
        td_http1_result r = td_http1_feed(c->h1, p + used, n - used, &k);
        used += k;
        if (c->h1->started && !c->since_us) c->since_us = td_now_us();
        if (c->h1->head_done && !c->head_us) c->head_us = td_now_us();
        if (r == TD_HTTP1_ERROR) {
            h1_error(c, c->h1->status, c->h1->what);
        } else if (!body_hold(c->n, &c->body_held, c->h1->body.len)) {
            h1_error(c, 503, "too many request bytes in flight");
        } else if (r == TD_HTTP1_DONE) {
            hand_over(c);
            requests++;
        } else if (c->h1->expect) {
            td_buf_str(&c->out.b, "HTTP/1.1 100 Continue\r\n\r\n");
            c->h1->expect = false;
        }
    }
    return c->closing ? n : used;
}

void h1_error(td_conn *c, int status, const char *what)
{
    td_net *n = c->n;
    td_buf body, fields;
    td_buf_init(&body, 0);
    td_buf_init(&fields, 0);
    if (n->o.error_body) n->o.error_body(n->o.arg, status, what, &body);
    td_buf_str(&fields, "Content-Type: application/json\r\n");
    td_http1_head(&c->out.b, status, TD_HTTP1_LENGTH, body.len, false, net_date(n), &fields);
    if (body.len) td_buf_add(&c->out.b, body.p, body.len);
    td_buf_deinit(&body);
    td_buf_deinit(&fields);
    n->counts.errors++;
    body_hold(n, &c->body_held, 0);
    if (c->h1) td_http1_reset(c->h1);
    c->closing = c->linger = true;
    conn_touch(c);
}

/* Frame what is queued. The head is held back until the turn ends, so an answer finished within one turn gets
 * Content-Length. */
static void emit(td_exchange *x, bool last)
{
    td_conn *c = x->c;
    td_buf *out = &c->out.b;
    size_t n = outq_len(&x->out);
    if (!x->head_sent) {
        td_http1_framing f = last ? TD_HTTP1_LENGTH : c->v11 ? TD_HTTP1_CHUNKED : TD_HTTP1_UNTIL_CLOSE;
        if (f == TD_HTTP1_UNTIL_CLOSE || c->n->draining) c->keep = false;
        td_http1_head(out, x->status, f, x->no_body ? x->discarded : n, c->keep, net_date(c->n), &x->fields);
        x->chunked = f == TD_HTTP1_CHUNKED && !x->no_body;
        x->head_sent = true;
        td_buf_deinit(&x->fields);
    }
    if (n && x->chunked) td_http1_chunk(out, outq_ptr(&x->out), n);
    else if (n) td_buf_add(out, outq_ptr(&x->out), n);
    outq_clear(&x->out);
    if (last && x->chunked) td_http1_last_chunk(out);
}

void h1_finish(td_exchange *x)
{
    td_conn *c = x->c;
    emit(x, true);
    x->finished = true;
    exchange_free(x);
    c->active_us = td_now_us();
    if (!c->keep) c->closing = c->linger = true;
}

void h1_turn(td_conn *c)
{
    if (c->in.len && !c->xs && !c->closing) {
        size_t used = h1_consume(c, c->in.p, c->in.len);
        if (used == c->in.len) td_buf_deinit(&c->in);
        else td_buf_drop_front(&c->in, used);
    }
    if (c->xs && c->xs->started && !c->dead && (outq_len(&c->xs->out) || !c->xs->head_sent))
        emit(c->xs, false);
}

void h1_sweep(td_conn *c, int64_t now)
{
    const td_net_opts *o = &c->n->o;
    if (c->xs) return;
    bool head = c->since_us && !c->head_us && now - c->since_us > o->header_us;
    bool body = c->head_us && now - c->head_us > o->body_us;
    if (head || body) {
        c->n->counts.timeouts++;
        h1_error(c, 408, head ? "request headers took too long" : "request body took too long");
    } else if (!c->since_us && !c->in.len && !outq_len(&c->out) && now - c->active_us > o->idle_us) {
        c->dead = true;
        conn_touch(c);
    }
}
