// SPDX-License-Identifier: Apache-2.0
#include "tests/ship/support_worker.h"
#include "common/chan.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/wire/loop.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void sw_open(sw_worker *w, td_zctx *z, uint64_t incarnation, const char *router, const td_curve *curve,
             const char *const *options)
{
    memset(w, 0, sizeof *w);
    w->incarnation = incarnation;
    snprintf(w->name, sizeof w->name, "w%llu", (unsigned long long)incarnation);
    td_conf *c = &w->conf;
    td_conf_init(c);
    const char *base[] = {
        "load-format=dummy",         "shape=tiny",         "threads=1", "max-num-seqs=8", "kv-pages=400",
        "max-num-batched-tokens=64", "max-model-len=2000", NULL};
    const char *const *lists[] = {base, options};
    char bulk[128];
    snprintf(bulk, sizeof bulk, "ipc:///tmp/td-ship-%d-%llu", (int)getpid(), (unsigned long long)incarnation);
    TD_CHECK(td_conf_set(c, "bulk-bind", bulk) == TD_OK);
    for (int l = 0; l < 2; l++)
        for (const char *const *o = lists[l]; o && *o; o++) {
            const char *eq = strchr(*o, '=');
            char *name = strndup(*o, (size_t)(eq - *o)); /* the conf may borrow the value */
            TD_CHECK(td_conf_set(c, name, eq + 1) == TD_OK);
            free(name);
        }
    w->done_fd = td_wake_open();
    if (c->trace_file[0]) TD_CHECK(td_trace_open(c->trace_file, &w->trace) == TD_OK);
    td_control_thread_opts co = {.z = z,
                                 .router = router,
                                 .curve = curve,
                                 .incarnation = incarnation,
                                 .max_legs = 64,
                                 .drain_us = (int64_t)c->drain_s * 1000000,
                                 .done_fd = w->done_fd};
    TD_CHECK(td_control_thread_open(&co, &w->control) == TD_OK);
    TD_CHECK(td_boot_open(c, c->model, 0, NULL, &w->boot) == TD_OK);
    w->boot.opts.hash_key = (td_hkey){incarnation, 2};
    TD_CHECK(td_engine_open(&w->boot.opts, &w->engine) == TD_OK);
    td_wengine_opts wo = {.engine = w->engine,
                          .max_legs = 64,
                          .credits = (uint32_t)c->credits,
                          .trace = w->trace,
                          .wake_fd = td_control_thread_wake_fd(w->control)};
    w->wengine = td_wengine_open(&wo);
    td_ship_opts so = {.z = z,
                       .desc = td_engine_descr(w->engine),
                       .incarnation = incarnation,
                       .bulk_bind = c->bulk_bind,
                       .curve = curve,
                       .max_keys = 64,
                       .credits = (uint32_t)c->credits,
                       .timeout_us = (int64_t)c->ship_timeout_ms * 1000,
                       .wake_fd = td_wengine_wake_fd(w->wengine),
                       .trace = w->trace,
                       .fault = c->fault};
    for (int g = 0; g < so.desc->n_groups; g++) so.kv[g] = td_engine_kv(w->engine, g);
    TD_CHECK(td_ship_open(&so, &w->ship) == TD_OK);
    td_wengine_start(w->wengine, w->ship);
    const td_model_desc *d = so.desc;
    w->hello = (td_msg_hello){.name = w->name,
                              .role = TD_ROLE_MIXED,
                              .bulk_endpoint = td_ship_endpoint(w->ship),
                              .build = "t",
                              .page_size = (uint32_t)c->page_size,
                              .max_seqs = 8,
                              .max_batched_tokens = 64,
                              .has_bulk_key = curve != NULL,
                              .id = {.model_digest = d->digest,
                                     .model = "tiny",
                                     .kv_dtype = "x",
                                     .numerics = w->boot.ops->numerics,
                                     .layers = (uint32_t)d->L,
                                     .kv_heads = (uint32_t)d->G,
                                     .head_dim = (uint32_t)d->D,
                                     .vocab = (uint32_t)d->V,
                                     .max_model_len = 2000}};
    if (curve) memcpy(w->hello.bulk_public_key, curve->public_key, 32);
    td_control_thread_loaded(w->control, w->wengine, w->ship, &w->hello);
}

void sw_close(sw_worker *w)
{
    td_control_thread_close(w->control);
    td_wengine_close(w->wengine);
    td_ship_close(w->ship);
    td_engine_close(w->engine);
    td_boot_close(&w->boot);
    td_trace_close(w->trace);
    td_conf_deinit(&w->conf);
    close(w->done_fd);
}

bool sw_clean(sw_worker *w, int ms)
{
    int64_t until = td_now_us() + ms * 1000;
    do {
        td_wengine_snapshot s;
        td_wengine_snapshot_get(w->wengine, &s);
        bool clean = !s.stats.legs_running && !s.stats.legs_waiting;
        for (uint32_t g = 0; g < s.n_groups; g++) {
            const td_engine_ledger_row *l = &s.stats.ledger[g];
            clean = clean && l->total > 0 && l->free + l->cached == l->total && !l->pinned;
        }
        td_ship_stats f;
        td_ship_stats_get(w->ship, &f);
        if (clean && !f.epochs_open) return true;
        usleep(1000);
    } while (td_now_us() < until);
    return false;
}

/* ---- router ---- */
void sw_router_open(sw_router *r, td_zctx *z, const char *bind, uint64_t incarnation, const td_curve *curve)
{
    memset(r, 0, sizeof *r);
    r->incarnation = incarnation;
    td_sock_opts o = {.max_message_bytes = 8 << 20, .hwm = 1000, .curve = curve};
    TD_CHECK(td_sock_bind_router(z, bind, &o, r->endpoint, sizeof r->endpoint, &r->sock) == TD_OK);
}

void sw_router_close(sw_router *r)
{
    td_sock_close(r->sock);
}

sw_peer *sw_peer_of(sw_router *r, uint64_t worker)
{
    for (unsigned i = 0; i < r->n_peers; i++)
        if (r->peer[i].incarnation == worker) return &r->peer[i];
    TD_CHECK(r->n_peers < TD_COUNT(r->peer));
    r->peer[r->n_peers] = (sw_peer){.incarnation = worker};
    return &r->peer[r->n_peers++];
}

sw_leg *sw_leg_of(sw_router *r, uint64_t worker, td_req_key key)
{
    for (unsigned i = 0; i < SW_MAX_LEGS; i++)
        if (r->leg[i].worker == worker && r->leg[i].key.request == key.request &&
            r->leg[i].key.attempt == key.attempt)
            return &r->leg[i];
    sw_leg *l = &r->leg[r->next_leg++ % SW_MAX_LEGS]; /* the oldest goes */
    *l = (sw_leg){.worker = worker, .key = key};
    return l;
}

sw_log *sw_log_of(sw_router *r, uint64_t request)
{
    for (unsigned i = 0; i < SW_MAX_LEGS; i++)
        if (r->log[i].request == request) return &r->log[i];
    sw_log *l = &r->log[r->next_log++ % SW_MAX_LEGS];
    memset(l, 0, sizeof *l);
    l->request = request;
    return l;
}

void sw_send(sw_router *r, uint64_t worker, td_msg *m)
{
    sw_peer *p = sw_peer_of(r, worker);
    td_buf b;
    td_buf_init(&b, 8 << 20);
    m->sender = r->incarnation;
    TD_CHECK(td_msg_pack(m, &b) == TD_OK);
    td_part part = {b.p, b.len};
    (void)td_sock_send(r->sock, p->id, p->id_bytes, &part, 1);
    td_buf_deinit(&b);
}

static void on_tokens(sw_router *r, uint64_t worker, const td_msg_tokens *t)
{
    sw_log *l = sw_log_of(r, t->key.request);
    sw_leg_of(r, worker, t->key)->token_messages++;
    if (t->choice >= SW_MAX_CHOICES) {
        r->bad++, fprintf(stderr, "bad: choice\n");
        return;
    }
    uint32_t c = t->choice;
    if (t->base_index > l->n[c]) l->gaps++;
    for (uint32_t i = 0; i < t->n && t->base_index + i < SW_MAX_OUT; i++) {
        uint32_t at = t->base_index + i;
        float lp = t->logprobs ? t->logprobs[i] : 0;
        if (at < l->n[c]) {
            if (l->ids[c][at] != t->ids[i] || memcmp(&l->lp[c][at], &lp, 4)) l->differences++;
            for (uint32_t k = 0; k < t->n_top && k < 5; k++)
                if (memcmp(&l->top[c][at][k], &t->top[i * t->n_top + k], sizeof(td_top))) l->differences++;
            continue;
        }
        l->ids[c][at] = t->ids[i];
        l->lp[c][at] = lp;
        l->n_top = t->n_top;
        for (uint32_t k = 0; k < t->n_top && k < 5; k++) l->top[c][at][k] = t->top[i * t->n_top + k];
        if (at == l->n[c]) l->n[c]++;
    }
    if (t->finish != TD_FINISH_NONE) l->finish[c] = t->finish;
}

static void on_message(sw_router *r, const td_msg *m)
{
    sw_peer *p = sw_peer_of(r, m->sender);
    td_msg a = {.type = TD_MSG_NONE};
    sw_leg *l;
    switch (m->type) {
    case TD_MSG_HELLO:
        p->hello = true;
        p->hellos++;
        snprintf(p->endpoint, sizeof p->endpoint, "%s", m->hello.bulk_endpoint);
        a.type = TD_MSG_WELCOME;
        a.welcome.heartbeat_ms = 50;
        if (!r->mute) sw_send(r, m->sender, &a);
        break;
    case TD_MSG_HEARTBEAT:
        p->beats++;
        p->state = m->heartbeat.state;
        p->beat = m->heartbeat;
        a.type = TD_MSG_HEARTBEAT_ACK;
        if (!r->mute) sw_send(r, m->sender, &a);
        break;
    case TD_MSG_GOODBYE: p->goodbye = true; break;
    case TD_MSG_RESERVED:
        l = sw_leg_of(r, m->sender, m->reserved.key);
        l->reserved = true;
        l->epoch = m->reserved.epoch;
        l->hit = m->reserved.hit_tokens;
        l->credits = m->reserved.credits;
        break;
    case TD_MSG_BUSY:
        l = sw_leg_of(r, m->sender, m->busy.key);
        l->busy = l->ended = true;
        snprintf(l->reason, sizeof l->reason, "%s", m->busy.reason);
        break;
    case TD_MSG_TOKENS:
        for (uint32_t i = 0; i < m->tokens.n; i++) on_tokens(r, m->sender, &m->tokens.list[i]);
        break;
    case TD_MSG_PROMPT_DONE: sw_leg_of(r, m->sender, m->prompt_done.key)->prompt_done = true; break;
    case TD_MSG_SHIP_REPORT:
        l = sw_leg_of(r, m->sender, m->ship_report.key);
        l->reported = true;
        l->landed = m->ship_report.landed;
        l->msg_report = *m;
        snprintf(l->report_reason, sizeof l->report_reason, "%s", m->ship_report.reason);
        break;
    case TD_MSG_ENDED:
        l = sw_leg_of(r, m->sender, m->ended.key);
        if (l->ended && m->ended.status != TD_EGONE) r->bad++, fprintf(stderr, "bad: second end %s\n", l->reason);
        l->ended = true;
        l->finish = m->ended.finish;
        l->status = m->ended.status;
        l->handed_off = m->ended.handed_off;
        snprintf(l->reason, sizeof l->reason, "%s", m->ended.reason);
        break;
    default: r->bad++, fprintf(stderr, "bad: type %d\n", m->type);
    }
}

bool sw_until(sw_router *r, int ms, bool (*cond)(void *arg), void *arg)
{
    int64_t until = td_now_us() + (int64_t)ms * 1000;
    td_loop loop;
    td_loop_init(&loop);
    td_loop_add_sock(&loop, r->sock);
    for (;;) {
        td_part id, part[2];
        int n;
        if (cond && cond(arg)) return true;
        if (td_sock_recv(r->sock, &id, part, &n) == TD_OK) {
            td_arena a;
            td_arena_init(&a, 64 << 20);
            td_msg m;
            if (td_msg_unpack(part[0].p, part[0].n, &a, &m) == TD_OK) {
                sw_peer *p = sw_peer_of(r, m.sender);
                p->id_bytes = id.n;
                memcpy(p->id, id.p, id.n);
                on_message(r, &m);
            } else r->bad++, fprintf(stderr, "bad: %s\n", td_reason());
            td_arena_deinit(&a);
            continue;
        }
        if (td_now_us() >= until) return false;
        td_loop_wait(&loop, TD_MIN(until - td_now_us(), (int64_t)5000));
    }
}

void sw_pump(sw_router *r, int ms)
{
    (void)sw_until(r, ms, NULL, NULL);
}
