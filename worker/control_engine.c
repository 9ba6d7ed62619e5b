// SPDX-License-Identifier: Apache-2.0
#include "worker/control_engine.h"
#include "common/chan.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "common/map.h"
#include "worker/mirror.h"
#include "worker/fault.h"
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

enum { POLL_US = 3000, IDLE_MS = 20, SNAPSHOT_US = 10000, RETRY_FULL_MS = 20, COMMANDS_PER_LEG = 4 };
/* packed size of one log probability, at most; control messages are at most 8 MiB */
enum { SCORE_BYTES = 16, MAX_SCORES_BYTES = 6 << 20 };

typedef struct wleg {
    uint64_t id;
    td_leg_kind kind;
    bool in_engine, in_ship;
    bool has_end, handed_off;        /* its last word, said when it is out of both */
    td_finish finish;
    td_status status;
    char reason[256];
    uint32_t n_choices, n_ctx;       /* n_ctx: tokens whose KV is shipped */
    uint32_t replica;                /* whose pages it has; known when it is opened in ship */
    bool open_due;                   /* PREFILL: ship hears of it when its replica is known */
    td_msg_sink sink;                /* until then; its texts are in arena */
    td_arena arena;
    bool reserved_due; /* RESERVED waits until every rank has opened the epoch (wengine.due) */
    uint32_t reserved_hit;
    uint32_t *base;                  /* [n_choices]: index of the first new token of each choice */
    td_first *first;                 /* [n_choices], PREFILL; token TD_KVF_NO_TOKEN: none yet */
    td_top (*top)[TD_MAX_TOP_LOGPROBS];
    uint32_t n_first;
    bool logprobs, cancelled;
    char ship_failed[160];           /* PREFILL: the hand-off failed while the prompt was being computed */
    int64_t prompt_end_us;
} wleg;

struct td_wengine {
    td_wengine_opts o;
    pthread_t thread;
    td_ship *ship;
    int fd;                          /* this thread's wake-up: commands and ship's events */
    td_chan *commands, *batches;
    atomic_uint_fast64_t progress;
    pthread_mutex_t mu;              /* of snap */
    td_wengine_snapshot snap;
    /* the thread's own */
    bool stop, failing;
    td_map legs;                     /* id -> wleg * */
    uint32_t n_shipping;             /* of them in ship */
    uint32_t n_told;                 /* mirror.h */
    /* reservations whose RESERVED waits, the oldest first; of the first n_asked the poll under way will tell
     */
    uint64_t *due;
    uint32_t n_due, n_asked, due_room;
    td_wbatch *batch;
    bool asked;                      /* a poll of the other ranks is under way */
    int64_t snap_us, poll_us;
};

/* ---- legs ---- */
static wleg *find(td_wengine *w, uint64_t id)
{
    uint64_t v;
    return td_map_get(&w->legs, id, &v) ? (wleg *)(uintptr_t)v : NULL;
}

static void leg_free(wleg *l)
{
    td_arena_deinit(&l->arena);
    free(l->base);
    free(l->first);
    free(l->top);
    free(l);
}

static const char *keep(td_wengine *w, const char *s)
{
    const char *t = s ? td_arena_strndup(&w->batch->arena, s, strlen(s)) : NULL;
    return t ? t : "";
}

/* The first one counts. */
static void set_end(wleg *l, td_finish finish, td_status status, const char *reason, bool handed_off)
{
    if (l->has_end) return;
    l->has_end = true;
    l->handed_off = handed_off;
    l->finish = finish;
    l->status = status;
    snprintf(l->reason, sizeof l->reason, "%s", reason ? reason : "");
}

/* All that the leg had is back; what is in use now is others'. */
static void trace_freed(td_wengine *w, const wleg *l)
{
    if (!w->o.trace) return;
    td_engine_stats s;
    int64_t used = 0;
    td_engine_stats_get(w->o.engine, &s);
    for (int g = 0; g < td_engine_descr(w->o.engine)->n_groups; g++)
        used += s.ledger[g].total - s.ledger[g].free - s.ledger[g].cached;
    td_trace_event(w->o.trace, "freed", ",\"key\":%llu,\"used\":%lld", (unsigned long long)l->id,
                   (long long)used);
}

/* Out of the engine and out of ship: every page is back, and the last word may be said. */
static void maybe_forget(td_wengine *w, wleg *l)
{
    if (l->in_engine || l->in_ship) return;
    trace_freed(w, l);
    td_msg *m = td_wbatch_event(w->batch, l->id, TD_MSG_ENDED);
    m->ended.finish = l->finish;
    m->ended.status = l->status;
    m->ended.reason = keep(w, l->reason);
    m->ended.handed_off = l->handed_off;
    td_map_del(&w->legs, l->id);
    leg_free(l);
}

static void say_refused(td_wengine *w, uint64_t id, td_status s)
{
    if (s == TD_EFULL) {
        td_msg *m = td_wbatch_event(w->batch, id, TD_MSG_BUSY);
        m->busy.retry_ms = RETRY_FULL_MS;
        m->busy.reason = keep(w, td_reason());
        return;
    }
    td_msg *m = td_wbatch_event(w->batch, id, TD_MSG_ENDED);
    m->ended.finish = TD_FINISH_ERROR;
    m->ended.status = s;
    m->ended.reason = keep(w, td_reason());
}

static void say_ship_report(td_wengine *w, const wleg *l, const td_ship_event *e, bool landed,
                            const char *reason)
{
    td_msg *m = td_wbatch_event(w->batch, l->id, TD_MSG_SHIP_REPORT);
    m->ship_report.landed = landed;
    m->ship_report.reason = keep(w, reason);
    m->ship_report.transfer_us = e->transfer_us;
    m->ship_report.exposed_us = e->exposed_us;
    m->ship_report.bytes = e->bytes;
    m->ship_report.frames = e->frames;
}

/* ---- commands ---- */
static wleg *leg_new(const td_wcmd *c, td_leg_kind kind)
{
    const td_msg_work *k = &c->work;
    wleg *l = td_xalloc(sizeof *l);
    l->id = c->leg;
    td_arena_init(&l->arena, 1 << 18);
    l->kind = kind;
    l->n_choices = k->sampling.n;
    l->logprobs = k->sampling.logprobs >= 0;
    l->base = td_xalloc(l->n_choices * sizeof *l->base);
    for (uint32_t i = 0; i < k->n_resume; i++) l->base[i] = k->resume[i].n;
    /* One choice: its resumed tokens are part of what is computed and shipped. Several share the prompt
     * only (worker/seq.h). */
    l->n_ctx = k->prompt.n + (l->n_choices == 1 ? l->base[0] : 0);
    if (kind != TD_LEG_PREFILL) return l;
    l->first = td_xalloc(l->n_choices * sizeof *l->first);
    l->top = td_xalloc(l->n_choices * sizeof *l->top);
    for (uint32_t i = 0; i < l->n_choices; i++)
        l->first[i] = (td_first){.token = TD_KVF_NO_TOKEN, .top = l->top[i]};
    return l;
}

static td_leg describe(const td_wcmd *c, td_leg_kind kind, td_arena *a)
{
    const td_msg_work *k = &c->work;
    td_leg d = {.key = c->leg, .kind = kind, .sampling = k->sampling, .prompt = k->prompt.p,
                .n_prompt = k->prompt.n, .salt = k->salt, .salt_bytes = k->salt_bytes,
                .deadline_us = c->deadline_us, .hit_tokens = c->has_sink ? c->sink.hit_tokens : 0};
    if (!k->n_resume) return d;
    const uint32_t **resume = td_arena_alloc(a, k->n_resume * sizeof *resume);
    uint32_t *n = td_arena_alloc(a, k->n_resume * sizeof *n);
    if (!resume || !n) return d;
    for (uint32_t i = 0; i < k->n_resume; i++) {
        resume[i] = k->resume[i].p;
        n[i] = k->resume[i].n;
    }
    d.resume = resume;
    d.n_resume = n;
    return d;
}

static td_mirror_key mirror_key(td_wengine *w, const wleg *l)
{
    return (td_mirror_key){w->o.engine, w->ship, l->id, l->replica, &w->n_told};
}

static void open_sending(td_wengine *w, wleg *l, const td_msg_sink *sink)
{
    l->open_due = false;
    l->replica = td_engine_replica_of(w->o.engine, l->id);
    td_mirror_key k = mirror_key(w, l);
    td_mirror_send_open(&k, sink, l->n_ctx);
}

/* The sink outlives its command. Without memory for it the hand-off fails at once, as one to nobody. */
static void keep_sink(wleg *l, const td_msg_sink *sink)
{
    l->open_due = true;
    l->sink = *sink;
    l->sink.endpoint = td_arena_strndup(&l->arena, sink->endpoint, strlen(sink->endpoint));
    l->sink.ranks = td_arena_copy(&l->arena, sink->ranks, sink->ranks_bytes);
    if (!l->sink.ranks) l->sink.ranks_bytes = 0;
    if (!l->sink.endpoint) l->sink.endpoint = "";
}

/* A leg that ended before it had pages: any replica says the last word. */
static void cancel_sending(td_wengine *w, wleg *l, uint32_t abort_index, const char *reason)
{
    if (l->open_due) open_sending(w, l, &l->sink);
    td_mirror_key k = mirror_key(w, l);
    td_mirror_send_cancel(&k, abort_index, reason);
}

static void on_start(td_wengine *w, td_wcmd *c)
{
    td_leg_kind kind = c->has_sink ? TD_LEG_PREFILL : TD_LEG_MIXED;
    td_leg d = describe(c, kind, &c->arena);
    td_status s = td_engine_start(w->o.engine, &d);
    if (s < 0) {
        say_refused(w, c->leg, s);
        return;
    }
    wleg *l = leg_new(c, kind);
    td_fault_mark(l->id, c->work.sampling.seed);
    l->in_engine = true;
    td_map_put(&w->legs, l->id, (uint64_t)(uintptr_t)l);
    if (!c->has_sink) return;
    l->in_ship = true;
    w->n_shipping++;
    if (td_engine_replicas(w->o.engine) > 1) keep_sink(l, &c->sink);
    else open_sending(w, l, &c->sink);
    /* No hold: the leg has ended already (resumed tokens contained the end); its end comes with the next
     * turn and aborts the epoch. */
    (void)td_engine_hold(w->o.engine, l->id);
}

/* Page tables of a held leg. */
typedef struct tables {
    const int32_t *pages[TD_MAX_GROUPS];
    uint32_t n[TD_MAX_GROUPS];
} tables;

static tables tables_of(const td_wengine *w, uint64_t id)
{
    tables t = {0};
    for (int g = 0; g < td_engine_descr(w->o.engine)->n_groups; g++)
        t.pages[g] = td_engine_pages(w->o.engine, id, g, &t.n[g]);
    return t;
}

static void say_reserved(td_wengine *w, wleg *l)
{
    td_msg *m = td_wbatch_event(w->batch, l->id, TD_MSG_RESERVED);
    l->reserved_due = false;
    m->reserved.epoch = l->id;
    m->reserved.hit_tokens = l->reserved_hit;
    m->reserved.credits = w->o.credits;
    const td_ship_home *home = w->o.home ? &w->o.home[l->replica] : NULL;
    m->reserved.endpoint = home ? home->endpoint : ""; /* "": Hello's bulk endpoint */
    if (home) m->reserved.ranks = home->ranks.p, m->reserved.ranks_bytes = (uint32_t)home->ranks.len;
}

static void reserve_later(td_wengine *w, wleg *l)
{
    if (w->n_due == w->due_room) {
        w->due_room = w->due_room ? 2 * w->due_room : 16;
        w->due = td_xrealloc(w->due, w->due_room * sizeof *w->due);
    }
    w->due[w->n_due++] = l->id;
    l->reserved_due = true;
    w->poll_us = 0;
}

static void on_reserve(td_wengine *w, td_wcmd *c)
{
    td_leg d = describe(c, TD_LEG_DECODE, &c->arena);
    uint32_t hit = 0;
    td_status s = td_ship_endpoint(w->ship)[0]
                      ? td_engine_reserve(w->o.engine, &d, &hit)
                      : td_refuse(TD_EFULL, "this worker receives no pages: it has no bulk endpoint");
    if (s < 0) {
        say_refused(w, c->leg, s);
        return;
    }
    wleg *l = leg_new(c, TD_LEG_DECODE);
    td_fault_mark(l->id, c->work.sampling.seed);
    l->in_engine = l->in_ship = true;
    w->n_shipping++;
    td_map_put(&w->legs, l->id, (uint64_t)(uintptr_t)l);
    (void)td_engine_hold(w->o.engine, l->id);
    tables t = tables_of(w, l->id);
    l->replica = td_engine_replica_of(w->o.engine, l->id);
    td_mirror_key k = mirror_key(w, l);
    td_mirror_recv_open(&k, hit, l->n_ctx, l->n_choices, t.pages, t.n);
    l->reserved_hit = hit;
    if (td_engine_many(w->o.engine))
        reserve_later(w, l);
    else say_reserved(w, l);
}

static void on_cancel(td_wengine *w, uint64_t id)
{
    wleg *l = find(w, id);
    if (!l || l->has_end) return;
    l->cancelled = true;
    td_trace_event(w->o.trace, "cancel", ",\"key\":%llu", (unsigned long long)id);
    if (l->in_engine) {
        (void)td_engine_cancel(w->o.engine, id); /* its end comes with the next turn and does the rest */
        return;
    }
    /* A prefill leg that waits for the acknowledgement. */
    set_end(l, TD_FINISH_CANCEL, TD_OK, "cancelled", false);
    cancel_sending(w, l, 0, "cancelled");
}

static void take_commands(td_wengine *w)
{
    td_wcmd *c;
    while ((c = td_chan_pop(w->commands))) {
        switch (c->type) {
        case TD_WCMD_START: on_start(w, c); break;
        case TD_WCMD_RESERVE: on_reserve(w, c); break;
        case TD_WCMD_CANCEL: on_cancel(w, c->leg); break;
        case TD_WCMD_CANCEL_CHOICE: (void)td_engine_cancel_choice(w->o.engine, c->leg, c->choice); break;
        case TD_WCMD_STOP: w->stop = true; break;
        }
        td_wcmd_free(c);
    }
}

static void push_batch(td_wengine *w)
{
    if (!w->batch->n_events && !w->batch->n_tokens) return;
    /* A full ring means that the control thread is behind: waiting for it is the back-pressure. */
    while (!td_chan_push(w->batches, w->batch)) (void)poll(NULL, 0, 1);
    w->batch = td_wbatch_new();
}

/* Tests: the router knows all that was before this point. */
static void stop_if_due(td_wengine *w, td_fault_point p, uint64_t leg)
{
    if (!td_fault_due(p, leg)) return;
    push_batch(w);
    td_fault_pause();
}

/* ---- hand-off ---- */
/* The decode's first message for each choice repeats COMMIT's token: the router may not have heard it from
 * the prefill worker. */
static void repeat_first(td_wengine *w, const wleg *l, const td_commit *c)
{
    for (uint32_t i = 0; i < c->n_first; i++) {
        const td_first *f = &c->first[i];
        if (f->token == TD_KVF_NO_TOKEN) continue;
        td_msg_tokens *t = td_wbatch_tokens(w->batch);
        t->key.request = l->id;
        t->choice = i;
        t->base_index = l->base[i];
        t->n = 1;
        t->ids = td_arena_copy(&w->batch->arena, &f->token, sizeof f->token);
        if (!c->logprobs) continue;
        t->logprobs = td_arena_copy(&w->batch->arena, &f->logprob, sizeof f->logprob);
        t->top = td_arena_copy(&w->batch->arena, f->top, f->n_top * sizeof *f->top);
        t->n_top = f->n_top;
    }
}

static void recompute(td_wengine *w, const wleg *l, const td_ship_event *e, const char *reason)
{
    if (td_engine_recompute(w->o.engine, l->id) < 0) return; /* it has ended meanwhile */
    say_ship_report(w, l, e, false, reason);
}

static void on_landed(td_wengine *w, wleg *l, const td_ship_event *e)
{
    uint32_t first[TD_MAX_CHOICES], V = (uint32_t)td_engine_descr(w->o.engine)->V;
    for (uint32_t i = 0; i < e->commit.n_first; i++) {
        first[i] = e->commit.first[i].token;
        if (first[i] != TD_KVF_NO_TOKEN) {
            if (first[i] < V) continue;
            recompute(w, l, e, "a first token is outside the vocabulary");
            return;
        }
        first[i] = 0;
        (void)td_engine_cancel_choice(w->o.engine, l->id, i);
    }
    if (td_engine_land(w->o.engine, l->id, first, e->commit.n_first) < 0) {
        recompute(w, l, e, td_reason());
        return;
    }
    say_ship_report(w, l, e, true, "");
    stop_if_due(w, TD_FAULT_SHIP_LANDED, l->id);
    repeat_first(w, l, &e->commit);
}

static void on_sent(td_wengine *w, wleg *l, const td_ship_event *e)
{
    if (!e->ok && !l->cancelled) TD_DEBUG_LOG("hand-off of leg %llx failed: %s", (unsigned long long)l->id, e->reason);
    if (!l->in_engine) {
        set_end(l, TD_FINISH_NONE, TD_OK, e->reason, e->ok);
        return;
    }
    /* Refused while the prompt is still being computed: the decode side computes it itself, so this is
     * wasted work. */
    memcpy(l->ship_failed, e->reason, sizeof l->ship_failed);
    if (!l->cancelled) (void)td_engine_cancel(w->o.engine, l->id);
}

static void take_ship_events(td_wengine *w)
{
    td_ship_event *e;
    while ((e = td_ship_poll(w->ship))) {
        wleg *l = find(w, e->key);
        TD_CHECK(l && l->in_ship);
        if (e->type == TD_SHIP_RECALL) { /* one of this worker's ranks failed, or the key was cancelled */
            td_mirror_key k = mirror_key(w, l);
            td_mirror_recall(&k, e);
            td_ship_event_free(e);
            continue;
        }
        l->in_ship = false;
        w->n_shipping--;
        if (e->type == TD_SHIP_SENT) on_sent(w, l, e);
        else if (e->type == TD_SHIP_LANDED && l->in_engine) on_landed(w, l, e);
        else if (e->type == TD_SHIP_LOST && l->in_engine) {
            if (e->over) (void)td_engine_cancel(w->o.engine, l->id);
            else recompute(w, l, e, e->reason);
        }
        td_engine_unhold(w->o.engine, l->id);
        maybe_forget(w, l);
        td_ship_event_free(e);
    }
}

/* ---- hooks, inside td_engine_turn ---- */
static void on_kv(void *arg, uint64_t key, int layer0, int layer1, uint32_t tok0, uint32_t tok1)
{
    td_wengine *w = arg;
    wleg *l = find(w, key);
    w->progress++;
    td_trace_event(w->o.trace, "layers", ",\"key\":%llu,\"layer0\":%d,\"layer1\":%d,\"tok0\":%u,\"tok1\":%u",
                   (unsigned long long)key, layer0, layer1, tok0, tok1);
    if (l && l->in_ship) {
        tables t = tables_of(w, key);
        int a = TD_MAX(layer0, w->o.layer0), b = TD_MIN(layer1, w->o.layer1);
        td_mirror_key k = mirror_key(w, l);
        if (a < b && !l->replica) td_ship_send_layers(w->ship, key, a, b, tok0, tok1, t.pages, t.n);
        if (!td_engine_computing(w->o.engine)) td_mirror_send_hit(&k, tok0, tok1, t.pages, t.n);
    }
    if (l && l->kind != TD_LEG_DECODE && tok1 < l->n_ctx) stop_if_due(w, TD_FAULT_PREFILL_CHUNK, key);
}

static void on_admit(void *arg, uint64_t key)
{
    td_wengine *w = arg;
    wleg *l = find(w, key);
    if (l && l->open_due) open_sending(w, l, &l->sink);
}

static void on_step(void *arg, const td_step *s)
{
    td_wengine *w = arg;
    w->progress++;
    td_trace_event(w->o.trace, "step", ",\"step\":%llu,\"rows\":%u,\"seqs\":%u,\"samples\":%u",
                   (unsigned long long)s->number, s->n_rows, s->n_seqs, s->n_samples);
}

/* ---- what a turn brought ---- */
static void pass_prompt(td_wengine *w, const td_engine_prompt *p)
{
    wleg *l = find(w, p->key);
    if (!l) return;
    l->prompt_end_us = td_now_us();
    uint64_t bytes = (uint64_t)p->n_scores * SCORE_BYTES * (1 + (p->n_scores ? (uint64_t)p->scores[0].n_top
                                                                 : 0));
    if (bytes > MAX_SCORES_BYTES) { /* one message has to hold them */
        set_end(l, TD_FINISH_ERROR, TD_EBADREQ,
                "the log probabilities of so long a prompt do not fit one message", false);
        (void)td_engine_cancel(w->o.engine, l->id);
        return;
    }
    td_msg_score *scores = td_arena_alloc(&w->batch->arena, p->n_scores * sizeof *scores);
    td_msg *m = td_wbatch_event(w->batch, l->id, TD_MSG_PROMPT_DONE);
    m->prompt_done.cached_tokens = p->cached_tokens;
    m->prompt_done.queued_us = p->queued_us;
    m->prompt_done.prefill_us = p->prefill_us;
    if (!scores) return;
    for (uint32_t i = 0; i < p->n_scores; i++) {
        const td_sample_out *s = &p->scores[i];
        scores[i] = (td_msg_score){.id = (uint32_t)s->token, .logprob = s->logprob,
                                   .n_top = (uint32_t)s->n_top,
                                   .top = td_arena_copy(&w->batch->arena, s->top,
                                                        (size_t)s->n_top * sizeof *s->top)};
        if (!scores[i].top) scores[i].n_top = 0;
    }
    m->prompt_done.scores = scores;
    m->prompt_done.n_scores = p->n_scores;
}

static void keep_first(wleg *l, const td_engine_tokens *t)
{
    if (t->choice >= l->n_choices || !t->n || l->first[t->choice].token != TD_KVF_NO_TOKEN) return;
    td_first *f = &l->first[t->choice];
    f->token = t->token[0];
    l->n_first++;
    if (!t->logprob) return;
    f->logprob = t->logprob[0];
    f->n_top = TD_MIN(t->n_top, (uint32_t)TD_MAX_TOP_LOGPROBS);
    memcpy(l->top[t->choice], t->top, f->n_top * sizeof *t->top);
}

static void pass_tokens(td_wengine *w, const td_engine_tokens *t)
{
    wleg *l = find(w, t->key);
    if (!l) return;
    td_arena *a = &w->batch->arena;
    if (l->kind == TD_LEG_PREFILL) keep_first(l, t);
    else if (t->base_index >= l->base[t->choice] + TD_FAULT_DECODED)
        stop_if_due(w, TD_FAULT_DECODE_STEP, t->key);
    td_msg_tokens *m = td_wbatch_tokens(w->batch);
    m->key.request = l->id;
    m->choice = t->choice;
    m->base_index = t->base_index;
    m->finish = t->finish;
    m->stop_token = t->stop_token;
    m->ids = td_arena_copy(a, t->token, t->n * sizeof *t->token);
    TD_CHECK(m->ids); /* a turn's tokens are far below the arena's limit */
    m->n = t->n;
    if (!t->logprob) return;
    m->logprobs = td_arena_copy(a, t->logprob, t->n * sizeof *t->logprob);
    m->top = td_arena_copy(a, t->top, (size_t)t->n * t->n_top * sizeof *t->top);
    m->n_top = t->n_top;
}

static void end_prefill(td_wengine *w, wleg *l, const td_engine_end *e)
{
    if (!l->in_ship) { /* the hand-off failed before */
        if (l->ship_failed[0] && e->status == TD_OK && !l->cancelled)
            set_end(l, TD_FINISH_NONE, TD_OK, l->ship_failed, false);
        else set_end(l, e->finish, e->status, e->reason, false);
        return;
    }
    if (e->status == TD_OK && e->finish == TD_FINISH_NONE) { /* ENDED follows when the hand-off is decided */
        td_commit c = {.n_first = l->n_first ? l->n_choices : 0, .logprobs = l->logprobs, .first = l->first};
        td_mirror_key k = mirror_key(w, l);
        td_mirror_send_commit(&k, &c, l->prompt_end_us);
        return;
    }
    /* finished at the first token, cancelled, out of time: nothing to decode */
    bool over = e->status == TD_OK || e->status == TD_ETIME;
    cancel_sending(w, l, over ? 0 : 1, e->reason && e->reason[0] ? e->reason : "the request is over");
    set_end(l, e->finish, e->status, e->reason, false);
}

static void pass_end(td_wengine *w, const td_engine_end *e)
{
    wleg *l = find(w, e->key);
    if (!l) return;
    l->in_engine = false;
    if (l->kind == TD_LEG_PREFILL) end_prefill(w, l, e);
    else {
        td_mirror_key k = mirror_key(w, l);
        if (l->in_ship) td_mirror_recv_close(&k);
        set_end(l, e->finish, e->status, e->reason, false);
    }
    maybe_forget(w, l);
}

/* Whatever was in the step cannot be computed, and it is not known whose fault it is. */
static void fail_all(td_wengine *w)
{
    size_t it = 0;
    uint64_t k, v;
    if (!w->failing) TD_ERROR("a step failed: %s; %zu legs are given up", td_reason(), w->legs.n);
    w->failing = true;
    while (td_map_next(&w->legs, &it, &k, &v)) {
        wleg *l = (wleg *)(uintptr_t)v;
        if (!l->in_engine || l->has_end) continue;
        set_end(l, TD_FINISH_ERROR, TD_EIO, "the worker could not compute a step", false);
        if (l->kind == TD_LEG_PREFILL && l->in_ship)
            cancel_sending(w, l, 1, "the prefill worker could not compute");
        (void)td_engine_cancel(w->o.engine, k);
    }
}

/* A device that failed stays so for this process: the router sees the worker go and places its requests elsewhere. */
static void end_worker(void)
{
    TD_ERROR("the device failed, this worker ends: %s", td_reason());
    _exit(1);
}

static bool turn(td_wengine *w)
{
    td_engine_out out;
    td_status s = td_engine_turn(w->o.engine, &out);
    w->batch->step = out.step;
    for (uint32_t i = 0; i < out.n_prompt; i++) pass_prompt(w, &out.prompt[i]);
    for (uint32_t i = 0; i < out.n_tokens; i++) pass_tokens(w, &out.tokens[i]);
    for (uint32_t i = 0; i < out.n_end; i++) pass_end(w, &out.end[i]);
    if (s == TD_EDEVICE) end_worker();
    if (s < 0) fail_all(w);
    else if (out.step) w->failing = false;
    return s != TD_AGAIN;
}

static void take_snapshot(td_wengine *w, bool idle)
{
    int64_t now = td_now_us();
    if (!idle && now - w->snap_us < SNAPSHOT_US) return;
    w->snap_us = now;
    td_wengine_snapshot s = {.n_groups = (uint32_t)td_engine_descr(w->o.engine)->n_groups};
    td_engine_stats_get(w->o.engine, &s.stats);
    s.busy = s.stats.seqs_running || s.stats.waiting_tokens;
    pthread_mutex_lock(&w->mu);
    w->snap = s;
    pthread_mutex_unlock(&w->mu);
}

static td_status take_news(void *arg, const void *p, size_t n)
{
    return td_mirror_take(arg, p, n);
}

/* The ranks answer in order: what they were told before they were asked is done. */
static void say_asked(td_wengine *w)
{
    for (uint32_t i = 0; i < w->n_asked; i++) {
        wleg *l = find(w, w->due[i]);
        if (l && l->reserved_due && l->in_engine && !l->cancelled)
            say_reserved(w, l); /* nothing more of one that is over */
    }
    w->n_due -= w->n_asked;
    if (w->n_due) memmove(w->due, w->due + w->n_asked, w->n_due * sizeof *w->due);
    w->n_asked = 0;
}

/* Hand-offs under way: what do the other ranks say of them? True: there are some. */
static bool poll_ranks(td_wengine *w)
{
    int64_t now = td_now_us();
    bool any = w->n_shipping > 0;
    if (!td_engine_many(w->o.engine)) return false;
    if (!w->asked && (!any || now - w->poll_us < POLL_US)) return any;
    if (!w->asked) { /* it asks now */
        w->poll_us = now;
        w->n_asked = w->n_due;
    }
    td_status s = td_engine_poll(w->o.engine, take_news, w->ship);
    w->asked = s == TD_AGAIN;
    if (s < 0) TD_ERROR("the other ranks do not answer: %s", td_reason());
    if (s == TD_OK) say_asked(w);
    return any;
}

static void *run(void *arg)
{
    td_wengine *w = arg;
    while (!w->stop) {
        td_wake_clear(w->fd);
        take_commands(w);
        bool shipping = poll_ranks(w);
        take_ship_events(w);
        bool more = turn(w);
        td_ship_flush(w->ship);
        w->progress++;
        bool told = w->batch->n_events > 0;
        /* before the news, so that a beat after them shows the ledger after them */
        take_snapshot(w, !more || told);
        push_batch(w);
        if (more || w->stop) continue;
        struct pollfd p = {.fd = w->fd, .events = POLLIN};
        (void)poll(&p, 1, shipping ? POLL_US / 1000 : w->legs.n ? IDLE_MS : 1000);
    }
    return NULL;
}

/* ---- open, close ---- */
td_wengine *td_wengine_open(const td_wengine_opts *o)
{
    td_wengine *w = td_xalloc(sizeof *w);
    w->o = *o;
    w->fd = td_wake_open();
    TD_CHECK(w->fd >= 0);
    w->commands = td_chan_open(COMMANDS_PER_LEG * o->max_legs + 16, w->fd);
    w->batches = td_chan_open(1024, o->wake_fd);
    TD_CHECK(w->commands && w->batches);
    w->batch = td_wbatch_new();
    pthread_mutex_init(&w->mu, NULL);
    if (!w->o.layer1) w->o.layer1 = td_engine_descr(o->engine)->L;
    td_map_init(&w->legs, o->max_legs); /* control counts the same legs */
    td_engine_on_kv(o->engine, on_kv, w);
    td_engine_on_admit(o->engine, on_admit, w);
    td_engine_on_step(o->engine, on_step, w);
    take_snapshot(w, true);
    return w;
}

int td_wengine_wake_fd(const td_wengine *w)
{
    return w->fd;
}

void td_wengine_start(td_wengine *w, td_ship *ship)
{
    w->ship = ship;
    TD_CHECK(!pthread_create(&w->thread, NULL, run, w));
}

void td_wengine_close(td_wengine *w)
{
    if (!w) return;
    if (w->ship) {
        td_wcmd *c = td_xalloc(sizeof *c);
        c->type = TD_WCMD_STOP;
        while (!td_chan_push(w->commands, c)) (void)poll(NULL, 0, 1);
        td_wbatch *b;
        struct timespec t;
        do { /* it may be waiting for room */
            while ((b = td_chan_pop(w->batches))) td_wbatch_free(b);
            clock_gettime(CLOCK_REALTIME, &t);
            t.tv_nsec += 10000000;
            if (t.tv_nsec >= 1000000000) t.tv_sec++, t.tv_nsec -= 1000000000;
        } while (pthread_timedjoin_np(w->thread, NULL, &t));
    }
    td_wcmd *c;
    td_wbatch *b;
    while ((c = td_chan_pop(w->commands))) td_wcmd_free(c);
    while ((b = td_chan_pop(w->batches))) td_wbatch_free(b);
    td_wbatch_free(w->batch);
    free(w->due);
    size_t it = 0;
    uint64_t k, v;
    while (td_map_next(&w->legs, &it, &k, &v)) leg_free((wleg *)(uintptr_t)v);
    td_map_deinit(&w->legs);
    td_chan_close(w->commands);
    td_chan_close(w->batches);
    close(w->fd);
    pthread_mutex_destroy(&w->mu);
    free(w);
}

bool td_wengine_command(td_wengine *w, td_wcmd *c)
{
    return td_chan_push(w->commands, c);
}

td_wbatch *td_wengine_poll(td_wengine *w)
{
    return td_chan_pop(w->batches);
}

void td_wengine_snapshot_get(td_wengine *w, td_wengine_snapshot *out)
{
    pthread_mutex_lock(&w->mu);
    *out = w->snap;
    pthread_mutex_unlock(&w->mu);
    out->progress = w->progress;
}
