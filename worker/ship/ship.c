// SPDX-License-Identifier: Apache-2.0
/* worker/ship/ship.c - commands from the engine, events to it, and the thread's loop. */
#include "worker/ship/ship.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "worker/ship/ship_int.h"
#include <errno.h>
#include <malloc.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { ANSWER_HWM = 1 << 20, MAX_WAIT_US = 500000 };
/* Frames come and go by the hundred: their memory stays with the process, or each would be mapped and cleared
 * anew. */
enum { KEEP_BELOW = 8 * TD_KVF_FRAME_BYTES, KEEP_FREE = 256 * TD_KVF_FRAME_BYTES };

/* ---- engine thread ---- */
static cmd *command(cmd_type type, uint64_t key)
{
    cmd *c = td_xalloc(sizeof *c);
    c->type = type;
    c->key = key;
    return c;
}

static void command_free(cmd *c)
{
    td_buf_deinit(&c->payload);
    free(c->ref);
    free(c->pair);
    for (int g = 0; g < TD_MAX_GROUPS; g++) free(c->pages[g]);
    free(c);
}

void td_ship_flush(td_ship *s)
{
    while (s->wait_first) {
        cmd *c = s->wait_first, *next = c->next;
        if (!td_chan_push(s->commands, c)) return;
        s->wait_first = next;
    }
    s->wait_last = &s->wait_first;
}

static void post(td_ship *s, cmd *c)
{
    *s->wait_last = c;
    s->wait_last = &c->next;
    td_ship_flush(s);
}

static int32_t *copy_pages(const int32_t *pages, uint32_t n)
{
    int32_t *p = td_xalloc(n * sizeof *p + 1);
    if (n) memcpy(p, pages, n * sizeof *p);
    return p;
}

/* ---- whom to send to ---- */
td_status td_ship_ranks(const td_ship_grid *g, const char *const *endpoint, td_buf *out)
{
    td_msg_ranks r = {.tp = g->tp, .pp = g->pp, .cp = g->cp, .token_kind = (uint32_t)g->tokens.kind,
                      .token_unit = g->tokens.unit, .n_stages = g->pp + 1u, .n = td_ship_grid_ranks(g)};
    if (r.n < 2) return TD_OK;
    if (r.n > TD_MSG_MAX_RANKS || g->pp > TD_MSG_MAX_RANKS) return td_refuse(TD_EBADREQ, "%u ranks", r.n);
    for (uint32_t i = 0; i < r.n_stages; i++) r.stage[i] = g->stage[i];
    for (uint32_t i = 0; i < r.n; i++) r.endpoint[i] = endpoint[i];
    return td_msg_ranks_pack(&r, out);
}

/* The grid and endpoints that a sink tells; what is wrong with them is found by td_ship_grid_check. */
static td_status sink_ranks(const td_ship *s, const td_msg_sink *sink, td_arena *a, td_ship_grid *g,
                            td_msg_ranks *r)
{
    if (!sink->ranks_bytes) {
        *g = td_ship_grid_one(s->o.desc);
        *r = (td_msg_ranks){.n = 1, .endpoint = {sink->endpoint}};
        return TD_OK;
    }
    TD_TRY(td_msg_ranks_unpack(sink->ranks, sink->ranks_bytes, a, r));
    uint64_t n = (uint64_t)r->tp * r->pp * r->cp;
    if (!n || r->tp > TD_SHIP_MAX_RANKS || r->pp > TD_SHIP_MAX_RANKS || r->cp > TD_SHIP_MAX_RANKS ||
        n != r->n || r->n_stages != r->pp + 1)
        return td_refuse(TD_EPROTO, "a grid of %u x %u x %u ranks with %u endpoints and %u stage bounds",
                         r->tp, r->pp, r->cp, r->n, r->n_stages);
    *g = (td_ship_grid){.tp = (uint16_t)r->tp, .pp = (uint16_t)r->pp, .cp = (uint16_t)r->cp,
                        .tokens = {(td_token_kind)r->token_kind, r->cp, r->token_unit}};
    for (uint32_t i = 0; i < r->n_stages; i++) {
        if (r->stage[i] > TD_MAX_LAYERS) return td_refuse(TD_EPROTO, "a stage bound of %u", r->stage[i]);
        g->stage[i] = (uint16_t)r->stage[i];
    }
    return TD_OK;
}

static td_status make_pairs(td_ship *s, cmd *c, const td_msg_sink *sink, td_arena *a)
{
    td_ship_grid to;
    td_msg_ranks r;
    td_grid_plan *p;
    TD_TRY(sink_ranks(s, sink, a, &to, &r));
    const td_grid_plan_opts o = {.desc = s->o.desc, .kv = s->o.kv[0]->dtype, .src = &s->grid, .dst = &to,
                                 .rank = s->o.rank, .hit = sink->hit_tokens, .n_tokens = c->n_tokens};
    TD_TRY(td_grid_plan_open(&o, &p));
    if (!td_map_put(&s->plans, c->key, (uint64_t)(uintptr_t)p)) {
        td_grid_plan_close(p);
        return td_refuse(TD_EFULL, "more than %u hand-offs", s->o.max_keys);
    }
    c->pair = td_xalloc(r.n * sizeof *c->pair);
    for (uint32_t k = 0; k < r.n; k++) {
        if (!td_grid_plan_pair(p, s->o.rank, k)) continue;
        pair *x = &c->pair[c->n_pairs++];
        *x = (pair){.rank = (uint16_t)k, .n_src = (uint16_t)td_grid_plan_sources(p, k),
                    .tokens = td_grid_plan_dst(p, k)->tokens};
        snprintf(x->endpoint, sizeof x->endpoint, "%s", r.endpoint[k]);
    }
    return TD_OK;
}

static td_grid_plan *plan_of(td_ship *s, uint64_t key)
{
    uint64_t v;
    return td_map_get(&s->plans, key, &v) ? (td_grid_plan *)(uintptr_t)v : NULL;
}

void td_ship_send_open(td_ship *s, uint64_t key, const td_msg_sink *sink, uint32_t n_tokens)
{
    cmd *c = command(CMD_SEND_OPEN, key);
    td_arena a;
    td_arena_init(&a, 1 << 18);
    c->sink = *sink;
    c->sink.endpoint = NULL;
    c->sink.ranks = NULL;
    c->n_tokens = n_tokens;
    td_status st = make_pairs(s, c, sink, &a);
    if (s->group) td_ship_group_begin(s->group, key, true, 0);
    post(s, c);
    if (st != TD_OK) td_ship_send_cancel(s, key, 1, td_reason());
    td_arena_deinit(&a);
}

/* pages: the group's page table from page page0 on, covering the rectangle. */
static void send_rect(td_ship *s, uint64_t key, const td_rect *r, uint32_t mark, const int32_t *pages,
                      uint32_t page0, uint32_t n_pages)
{
    cmd *c = command(CMD_SEND_RECT, key);
    c->rect = *r;
    c->ref = td_xalloc(sizeof *c->ref + n_pages * sizeof *pages);
    c->ref->page0 = page0;
    c->ref->n_pages = n_pages;
    c->ref->mark = mark;
    memcpy(c->ref->pages, pages, n_pages * sizeof *pages);
    post(s, c);
}

typedef struct layers {
    td_ship *s;
    uint64_t key;
    uint32_t mark; /* behind their computation (stage.h) */
    const int32_t *const *pages;
    const uint32_t *n_pages;
} layers;

static void layers_rect(void *arg, const td_rect *r)
{
    const layers *x = arg;
    const td_token_set *mine = &x->s->part.tokens;
    uint32_t P = (uint32_t)x->s->o.kv[r->group]->P, t0 = td_token_before(mine, r->tok0);
    uint32_t p0 = t0 / P, p1 = (t0 + r->n_tok - 1) / P + 1; /* the source holds the whole range */
    TD_CHECK(p1 <= x->n_pages[r->group]);
    send_rect(x->s, x->key, r, x->mark, x->pages[r->group] + p0, p0, p1 - p0);
}

void td_ship_send_layers(td_ship *s, uint64_t key, int layer0, int layer1, uint32_t tok0, uint32_t tok1,
                         const int32_t *const pages[TD_MAX_GROUPS], const uint32_t n_pages[TD_MAX_GROUPS])
{
    td_grid_plan *p = plan_of(s, key);
    layers x = {s, key, 0, pages, n_pages};
    if (p && td_stage_mark(&s->stage, &x.mark) < 0)
        td_ship_send_cancel(s, key, 1, td_reason());
    else if (p)
        td_grid_plan_add(p, layer0, layer1, tok0, tok1, layers_rect, &x);
}

void td_ship_send_commit(td_ship *s, uint64_t key, const td_commit *commit, int64_t prompt_end_us)
{
    cmd *c = command(CMD_SEND_COMMIT, key);
    c->n_first = commit->n_first;
    c->prompt_end_us = prompt_end_us;
    td_buf_init(&c->payload, 0);
    td_commit_write(&c->payload, commit);
    c->logprobs = commit->logprobs;
    post(s, c);
}

void td_ship_send_cancel(td_ship *s, uint64_t key, uint32_t abort_index, const char *reason)
{
    cmd *c = command(CMD_SEND_CANCEL, key);
    c->abort_index = abort_index;
    snprintf(c->text, sizeof c->text, "%s", reason);
    post(s, c);
}

void td_ship_recv_open(td_ship *s, uint64_t key, uint32_t hit, uint32_t n_tokens, uint32_t n_first,
                       const int32_t *const pages[TD_MAX_GROUPS], const uint32_t n_pages[TD_MAX_GROUPS])
{
    cmd *c = command(CMD_RECV_OPEN, key);
    if (s->group) td_ship_group_begin(s->group, key, false, 0);
    c->hit = hit;
    c->n_tokens = n_tokens;
    c->n_first = n_first;
    for (int g = 0; g < s->o.desc->n_groups; g++) {
        c->pages[g] = copy_pages(pages[g], n_pages[g]);
        c->n_pages[g] = n_pages[g];
    }
    post(s, c);
}

void td_ship_recv_close(td_ship *s, uint64_t key)
{
    post(s, command(CMD_RECV_CLOSE, key));
}

void td_ship_event_report(const td_ship_event *e, uint32_t rank, td_ship_report *out)
{
    *out = (td_ship_report){.key = e->key, .bytes = e->bytes, .transfer_us = e->transfer_us,
                            .exposed_us = e->exposed_us, .rank = rank, .frames = e->frames,
                            .type = (uint8_t)e->type, .ok = e->ok, .over = e->over};
    snprintf(out->reason, sizeof out->reason, "%.*s", (int)sizeof out->reason - 1, e->reason);
}

void td_ship_expect(td_ship *s, uint64_t key, bool sends, uint32_t replica)
{
    if (s->group) td_ship_group_begin(s->group, key, sends, replica);
}

void td_ship_peer(td_ship *s, const td_ship_report *r, const void *commit)
{
    if (s->group) td_ship_group_peer(s->group, r, commit);
}

static td_ship_event *own_event(td_ship *s)
{
    td_ship_event *e = td_chan_pop(s->events);
    td_grid_plan *p = e ? plan_of(s, e->key) : NULL;
    if (p && e->type == TD_SHIP_SENT) {
        td_map_del(&s->plans, e->key);
        td_grid_plan_close(p);
    }
    return e;
}

td_ship_event *td_ship_poll(td_ship *s)
{
    td_ship_event *e;
    if (!s->group) return own_event(s);
    while ((e = own_event(s))) td_ship_group_own(s->group, e);
    e = td_ship_group_next(s->group);
    if (e && e->type == TD_SHIP_RECALL) { /* here too, if it is not over already */
        if (e->sending) td_ship_send_cancel(s, e->key, e->over ? 0 : 1, e->reason);
        else td_ship_recv_close(s, e->key);
    }
    return e;
}

void td_ship_event_free(td_ship_event *e)
{
    td_arena_deinit(&e->arena);
    free(e);
}

void td_ship_stats_get(td_ship *s, td_ship_stats *out)
{
    *out = (td_ship_stats){.frames_sent = s->frames_sent, .frames_received = s->frames_received,
                           .bytes_sent = s->bytes_sent, .bytes_received = s->bytes_received,
                           .frames_bad = s->frames_bad, .epochs_open = s->epochs_open};
}

/* ---- ship thread ---- */
td_ship_event *ship_event(td_ship_event_type type, uint64_t key)
{
    td_ship_event *e = td_xalloc(sizeof *e);
    e->type = type;
    e->key = key;
    td_arena_init(&e->arena, 1 << 20);
    return e;
}

/* The ring has room for one event of every open key, and a key has one. */
void ship_emit(td_ship *s, td_ship_event *e)
{
    TD_CHECK(td_chan_push(s->events, e));
}

void ship_drain(td_ship *s, int64_t now)
{
    cmd *c;
    while ((c = td_chan_pop(s->commands))) {
        if (c->type == CMD_STOP) s->stop = true;
        else if (c->type == CMD_RECV_OPEN || c->type == CMD_RECV_CLOSE) ship_in_command(s, now, c);
        else ship_out_command(s, now, c);
        command_free(c);
    }
}

static int64_t wait_us(const td_ship *s, int64_t now)
{
    int64_t due = TD_MIN(ship_in_deadline(s), ship_out_deadline(s, now));
    if (due == INT64_MAX) return -1;
    return due <= now ? 0 : TD_MIN(due - now, (int64_t)MAX_WAIT_US);
}

static void loop(td_ship *s)
{
    while (!s->stop) {
        int64_t now = td_now_us();
        td_chan_clear(s->commands);
        ship_drain(s, now);
        bool more = ship_in_receive(s, now);
        ship_out_receive(s, now);
        more |= ship_out_pump(s, now);
        ship_in_tick(s, now);
        s->epochs_open = td_receiver_live(s->receiver);
        if (!more && !s->stop) td_loop_wait(&s->loop, wait_us(s, td_now_us()));
    }
}

static td_status start(td_ship *s)
{
    (void)mallopt(M_MMAP_THRESHOLD, KEEP_BELOW);
    (void)mallopt(M_TRIM_THRESHOLD, KEEP_FREE);
    td_loop_init(&s->loop);
    td_loop_add_fd(&s->loop, td_chan_fd(s->commands));
    if (!s->o.bulk_bind) return TD_OK;
    /* An answer that does not leave is a lost credit or ACK, so this queue holds all that can be due: one per
     * frame in flight, and those are bounded by the credits of the open epochs, not by this number. */
    td_sock_opts so = {.max_message_bytes = TD_KVF_FRAME_BYTES + 64 * 1024, .hwm = ANSWER_HWM,
                       .curve = s->o.curve};
    TD_TRY(td_sock_bind_router(s->o.z, s->o.bulk_bind, &so, s->endpoint, sizeof s->endpoint, &s->router));
    td_loop_add_sock(&s->loop, s->router);
    return TD_OK;
}

static void *thread_main(void *arg)
{
    td_ship *s = arg;
    s->start_status = start(s);
    snprintf(s->reason, sizeof s->reason, "%s", s->start_status == TD_OK ? "" : td_reason());
    bool ok = s->start_status == TD_OK;
    sem_post(&s->started); /* from here on open() may read what start wrote */
    if (ok) loop(s);
    ship_out_close(s);
    ship_in_close(s);
    td_sock_close(s->router);
    return NULL;
}

static td_status parse_fault(const char *text, fault *f)
{
    static const struct { const char *name; int what; } known[] = {{"flip:", FAULT_FLIP},
                                                                   {"drop:", FAULT_DROP}, {"delay-commit:",
                                                                       FAULT_DELAY_COMMIT}};
    *f = (fault){0};
    if (!text || !text[0]) return TD_OK;
    for (size_t i = 0; i < TD_COUNT(known); i++) {
        size_t n = strlen(known[i].name);
        char *end;
        if (strncmp(text, known[i].name, n)) continue;
        long long v = strtoll(text + n, &end, 10);
        if (end == text + n || *end || v < 0) break;
        f->what = known[i].what;
        f->n = v;
        TD_WARN("fault injection is on: %s", text);
        return TD_OK;
    }
    return td_fail(TD_EBADREQ, "fault \"%s\": flip:N, drop:N or delay-commit:MS", text);
}

static void destroy(td_ship *s)
{
    size_t it = 0;
    uint64_t k, v;
    while (td_map_next(&s->plans, &it, &k, &v)) td_grid_plan_close((td_grid_plan *)(uintptr_t)v);
    td_map_deinit(&s->plans);
    td_ship_group_free(s->group);
    cmd *c;
    td_ship_event *e;
    while ((c = td_chan_pop(s->commands))) command_free(c);
    while ((e = td_chan_pop(s->events))) td_ship_event_free(e);
    while ((c = s->wait_first)) {
        s->wait_first = c->next;
        command_free(c);
    }
    td_chan_close(s->commands);
    td_chan_close(s->events);
    td_receiver_free(s->receiver, NULL);
    ship_stack_close(s->buffers);
    td_stage_close(&s->stage);
    sem_destroy(&s->started);
    free(s);
}

static td_status grid_fits(const td_ship_opts *o, const td_ship_grid *g, td_ship_part *part)
{
    TD_TRY(td_ship_grid_check(g, o->desc));
    if (o->rank >= td_ship_grid_ranks(g)) return td_refuse(TD_EBADREQ, "no rank %u in the grid", o->rank);
    td_ship_part_of(g, o->desc, o->rank, part);
    for (int i = 0; i < o->desc->n_groups; i++)
        if (o->kv[i]->G != part->n_heads[i])
            return td_refuse(TD_EBADREQ, "pages of %d KV heads on rank %u, the grid says %u", o->kv[i]->G,
                             o->rank, part->n_heads[i]);
    return TD_OK;
}

td_status td_ship_open(const td_ship_opts *o, td_ship **out)
{
    fault f;
    TD_TRY(parse_fault(o->fault, &f));
    td_ship_grid grid = o->grid ? *o->grid : td_ship_grid_one(o->desc);
    td_ship_part part;
    TD_TRY(grid_fits(o, &grid, &part));
    td_ship *s = td_xalloc(sizeof *s);
    s->o = *o;
    s->grid = grid;
    s->part = part;
    s->o.grid = NULL;
    td_map_init(&s->plans, o->max_keys);
    s->buffers = ship_stack_open(o->dev);
    s->early_last = &s->early_first;
    if ((td_ship_grid_ranks(&grid) > 1 || o->replicas > 1) && !o->rank && !o->replica)
        s->group = td_ship_group_open(td_ship_grid_ranks(&grid), o->max_keys);
    s->fault = f;
    s->wait_last = &s->wait_first;
    s->commands = td_chan_open(1024, -1);
    s->events = td_chan_open(o->max_keys + 1, o->wake_fd);
    TD_CHECK(s->commands && s->events);
    s->receiver = td_receiver_open(&(td_receiver_opts){.desc = o->desc, .kv_dtype = o->kv[0]->dtype,
                                                       .incarnation = o->incarnation,
                                                       .max_epochs = o->max_keys,
                                                       .timeout_us = o->timeout_us, .grid = &grid,
                                                       .rank = o->rank});
    sem_init(&s->started, 0, 0);
    td_status staged = td_stage_open(&s->stage, o->dev, TD_KVF_FRAME_BYTES);
    if (staged < 0) {
        destroy(s);
        return staged;
    }
    if (pthread_create(&s->thread, NULL, thread_main, s)) {
        destroy(s);
        return td_fail(TD_EIO, "ship thread: %s", strerror(errno));
    }
    while (sem_wait(&s->started) && errno == EINTR) {}
    if (s->start_status != TD_OK) {
        td_status st = td_refuse(s->start_status, "%s", s->reason);
        pthread_join(s->thread, NULL);
        destroy(s);
        return st;
    }
    *out = s;
    return TD_OK;
}

void td_ship_close(td_ship *s)
{
    if (!s) return;
    post(s, command(CMD_STOP, 0));
    while (s->wait_first) { /* the thread is draining */
        td_loop_wait(&(td_loop){.n_sock = 0, .n_fd = 0}, 1000);
        td_ship_flush(s);
    }
    pthread_join(s->thread, NULL);
    destroy(s);
}

const char *td_ship_endpoint(const td_ship *s)
{
    return s->endpoint;
}

void td_ship_reachable(const char *bound, char *out, size_t n)
{
    static const char *const wild[] = {"tcp://0.0.0.0:", "tcp://[::]:", "tcp://*:"};
    char host[128] = "";
    snprintf(out, n, "%s", bound);
    for (size_t i = 0; i < TD_COUNT(wild); i++)
        if (!strncmp(bound, wild[i], strlen(wild[i])) && !gethostname(host, sizeof host - 1))
            snprintf(out, n, "tcp://%s:%s", host, bound + strlen(wild[i]));
}

void td_ship_advertised(const td_ship *s, const char *given, char *out, size_t n)
{
    if (given[0]) snprintf(out, n, "%s", given);
    else td_ship_reachable(s->endpoint, out, n);
}
