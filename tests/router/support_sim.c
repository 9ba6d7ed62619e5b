/* tests/router/support_sim.c - event heap, mock workers, faults, and the checks. */
// SPDX-License-Identifier: Apache-2.0
#include "tests/router/support_sim.h"
#include "common/check.h"
#include "router/text/detok.h"
#include "tests/router/support_msg.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_LEGS = 256, TICK_US = 50000, STEP_US = 8000, BEAT_US = 250000 };

typedef enum {
    EV_NONE,
    EV_TICK,
    EV_TO_CORE,
    EV_TO_WORKER,
    EV_BEAT,
    EV_STEP,
    EV_COMMIT,
    EV_SUBMIT,
    EV_CANCEL,
    EV_THAW,
    EV_START,
    EV_FAULT,
    EV_UNHANG
} ev_type;
typedef struct ev {
    int64_t at;
    uint64_t seq;
    ev_type type;
    int who;
    uint64_t a, b;
    char *bytes;
    size_t n;
} ev;

typedef struct leg {
    bool used, alone, prefill, decode, landed, computed;
    td_req_key key;
    uint32_t *prompt, n_prompt, n;
    uint64_t seed;
    uint32_t max_tokens, min_tokens, at[8]; /* next index of each choice */
    bool done[8];
    int32_t logprobs, prompt_logprobs;
    uint64_t epoch, sink_epoch, sink_inc;
    int64_t ready_us, commit_by_us;
    bool told_prompt, ended, commit_lost;
} leg;

typedef struct worker {
    bool used, dead, frozen, hung;
    td_role role;
    uint64_t inc, step, epochs, started;
    char name[32];
    leg leg[MAX_LEGS];
    int64_t last_to_core, last_to_worker;
    ev *parked; /* what arrived while frozen, and what it wanted to do */
    int n_parked;
} worker;

struct sim {
    sim_opts o;
    td_core *core;
    td_actions act;
    int64_t now;
    uint64_t seq, rng, next_id;
    ev *heap;
    size_t n, cap;
    worker *w;
    int n_workers;
    sim_client *c[SIM_MAX_CLIENTS];
    int n_clients, n_open;
    int complaints;
};

static uint64_t rnd(sim *s)
{
    s->rng += 0x9E3779B97F4A7C15u;
    return td_mix64(s->rng);
}
static double chance(sim *s) { return (double)(rnd(s) >> 11) * 0x1p-53; }
static int64_t between(sim *s, int64_t lo, int64_t hi)
{
    return lo + (int64_t)(rnd(s) % (uint64_t)(hi - lo + 1));
}

static int64_t later(int64_t a, int64_t b) { return a > b ? a : b; } /* not TD_MAX: it would draw twice */

/* ---- heap ---- */
static bool before(const ev *a, const ev *b) { return a->at != b->at ? a->at < b->at : a->seq < b->seq; }

static void push(sim *s, ev e)
{
    e.seq = ++s->seq;
    if (s->n == s->cap) {
        s->cap = s->cap ? s->cap * 2 : 256;
        s->heap = td_xrealloc(s->heap, s->cap * sizeof *s->heap);
    }
    size_t i = s->n++;
    while (i && before(&e, &s->heap[(i - 1) / 2])) {
        s->heap[i] = s->heap[(i - 1) / 2];
        i = (i - 1) / 2;
    }
    s->heap[i] = e;
}

static ev pop(sim *s)
{
    ev top = s->heap[0], e = s->heap[--s->n];
    size_t i = 0;
    for (;;) {
        size_t k = 2 * i + 1;
        if (k >= s->n) break;
        if (k + 1 < s->n && before(&s->heap[k + 1], &s->heap[k])) k++;
        if (!before(&s->heap[k], &e)) break;
        s->heap[i] = s->heap[k];
        i = k;
    }
    if (s->n) s->heap[i] = e;
    return top;
}

/* ---- the model ---- */
uint32_t sim_token(const uint32_t *prompt, uint32_t n_prompt, uint64_t seed, uint32_t choice, uint32_t index)
{
    uint64_t h = td_mix64(seed ^ 0x7c15);
    for (uint32_t i = 0; i < n_prompt; i++) h = td_mix64(h ^ prompt[i]);
    h = td_mix64(h ^ ((uint64_t)choice << 32 | index));
    if (h % 61 == 0) return SIM_EOS;
    return (uint32_t)(h >> 8) % 4 ? 'a' + (uint32_t)(h >> 16) % 26 : (uint32_t)(h >> 16) & 255;
}

static uint32_t leg_token(const leg *l, uint32_t choice, uint32_t index)
{
    uint32_t t = sim_token(l->prompt, l->n_prompt, l->seed, choice, index);
    return t == SIM_EOS && index + 1 <= l->min_tokens ? 'z' : t; /* min_tokens forbids EOS */
}
static float lp_of(uint32_t id) { return -(float)(id % 97) / 16; }

/* ---- transport ---- */
static void to_core(sim *s, worker *w, td_msg *m)
{
    m->sender = w->inc;
    td_buf b;
    td_buf_init(&b, 0);
    TD_CHECK(td_msg_pack(m, &b) == TD_OK);
    int copies = chance(s) < s->o.fault.dup && s->now < s->o.faults_until_us ? 2 : 1;
    for (int i = 0; i < copies; i++) {
        int64_t at = later(s->now + between(s, 100, 3000), w->last_to_core);
        w->last_to_core = at;
        char *p = malloc(b.len + 1);
        memcpy(p, b.p, b.len);
        push(s, (ev){.at = at, .type = EV_TO_CORE, .who = (int)(w - s->w), .bytes = p, .n = b.len});
    }
    td_buf_deinit(&b);
}

static worker *by_inc(sim *s, uint64_t inc)
{
    for (int i = 0; i < s->n_workers; i++)
        if (s->w[i].used && s->w[i].inc == inc) return &s->w[i];
    return NULL;
}

static void feed(sim *s, const td_event *e);

static void deliver(sim *s, const td_out *o)
{
    sim_client *c = o->client;
    if (o->id != c->id || c->terminals) {
        printf("client %llu: something after its end\n", (unsigned long long)c->id);
        s->complaints++;
        return;
    }
    switch (o->kind) {
    case TD_OUT_DELTA: {
        uint32_t k = o->choice;
        if (k >= c->n || o->offset != c->n_got[k] || (c->finish[k] != TD_FINISH_NONE)) {
            printf("client %llu choice %u: offset %u, has %u\n", (unsigned long long)c->id, k, o->offset,
                   c->n_got[k]);
            s->complaints++;
            return;
        }
        if (!c->first_us) c->first_us = s->now;
        c->got[k] = td_xrealloc(c->got[k], (c->n_got[k] + o->n_ids + 1) * 4);
        memcpy(c->got[k] + c->n_got[k], o->ids, o->n_ids * 4);
        c->n_got[k] += o->n_ids;
        for (uint32_t i = 0; i < o->n_ids; i++)
            if (!o->logprobs || o->logprobs[i] != lp_of(o->ids[i]) || o->n_top != 2 ||
                o->top[2 * i].id != o->ids[i])
                s->complaints++;
        c->text[k] = td_xrealloc(c->text[k], c->n_text[k] + o->text_len + 1);
        memcpy(c->text[k] + c->n_text[k], o->text, o->text_len);
        c->n_text[k] += o->text_len;
        c->finish[k] = o->finish;
        c->stop_string[k] = o->stop_string;
        break;
    }
    case TD_OUT_PROMPT: c->got_scores = o->n_scores == c->n_prompt - 1; break;
    default:
        c->terminals++;
        c->last = o->kind;
        c->why = o->why;
        c->usage = o->usage;
        c->timings = o->timings;
        c->end_us = s->now;
        snprintf(c->reason, sizeof c->reason, "%s", o->reason);
        s->n_open--;
    }
}

static void carry_out(sim *s)
{
    uint64_t lost[64];
    int n_lost = 0;
    for (uint32_t i = 0; i < s->act.n; i++) {
        td_action *a = &s->act.a[i];
        if (a->type == TD_ACT_EMIT) deliver(s, a->out);
        if (a->type == TD_ACT_LOG && s->o.verbose) printf("%9.3f %s\n", (double)s->now / 1e6, a->text);
        if (a->type != TD_ACT_SEND) continue;
        worker *w = by_inc(s, a->to);
        if (!w || w->dead) {
            if (n_lost < 64) lost[n_lost++] = a->to;
            continue;
        }
        td_buf b;
        td_buf_init(&b, 0);
        TD_CHECK(td_msg_pack(&a->msg, &b) == TD_OK);
        char *p = malloc(b.len + 1);
        memcpy(p, b.p, b.len);
        int64_t at = later(s->now + between(s, 100, 2000), w->last_to_worker);
        w->last_to_worker = at;
        push(
            s,
            (ev){
                .at = at, .type = EV_TO_WORKER, .who = (int)(w - s->w), .bytes = p, .n = b.len, .a = w->inc});
        td_buf_deinit(&b);
    }
    for (int i = 0; i < n_lost; i++) feed(s, &(td_event){.type = TD_EV_PEER_LOST, .id = lost[i]});
}

static void feed(sim *s, const td_event *e)
{
    td_core_step(s->core, s->now, e, &s->act);
    carry_out(s);
}

/* ---- workers ---- */
static void hello(sim *s, worker *w)
{
    td_msg m = support_hello(w->name, w->role, 1000, 4096, SIM_EOS);
    to_core(s, w, &m);
}

static void beat(sim *s, worker *w)
{
    bool busy = false;
    for (int i = 0; i < MAX_LEGS; i++) busy |= w->leg[i].used && (!w->leg[i].decode || w->leg[i].landed);
    td_msg m = support_beat(TD_WSTATE_READY, w->step, busy);
    m.heartbeat.step_us = STEP_US;
    m.heartbeat.prefill_tok_s = 20000;
    m.heartbeat.decode_tok_s = 100;
    to_core(s, w, &m);
}

static void end_leg(sim *s, worker *w, leg *l, td_finish f, td_status st, const char *why, bool handed)
{
    td_msg m = support_ended(l->key, f, st, why, handed);
    to_core(s, w, &m);
    free(l->prompt);
    memset(l, 0, sizeof *l);
}

static leg *find_leg(worker *w, td_req_key k)
{
    for (int i = 0; i < MAX_LEGS; i++)
        if (w->leg[i].used && w->leg[i].key.request == k.request && w->leg[i].key.attempt == k.attempt)
            return &w->leg[i];
    return NULL;
}

static leg *new_leg(sim *s, worker *w, const td_msg_work *k)
{
    leg *l = NULL;
    for (int i = 0; i < MAX_LEGS && !l; i++)
        if (!w->leg[i].used) l = &w->leg[i];
    if (!l) return NULL;
    *l = (leg){.used = true,
               .key = k->key,
               .n_prompt = k->prompt.n,
               .n = k->sampling.n,
               .seed = k->sampling.seed,
               .max_tokens = k->sampling.max_tokens,
               .min_tokens = k->sampling.min_tokens,
               .logprobs = k->sampling.logprobs,
               .prompt_logprobs = k->sampling.prompt_logprobs};
    l->prompt = malloc(k->prompt.n * 4 + 4);
    memcpy(l->prompt, k->prompt.p, k->prompt.n * 4);
    uint32_t compute = k->prompt.n;
    for (uint32_t i = 0; i < k->n_resume; i++) {
        l->at[i] = k->resume[i].n;
        compute += k->resume[i].n;
        /* The log must be ours: tokens of another attempt are the same tokens. */
        for (uint32_t j = 0; j < l->at[i]; j++)
            if (k->resume[i].p[j] != leg_token(l, i, j)) s->complaints++, printf("resume log differs\n");
        if (l->at[i] && (l->at[i] >= l->max_tokens || leg_token(l, i, l->at[i] - 1) == SIM_EOS))
            l->done[i] = true;
    }
    l->ready_us = s->now + 2000 + compute * 50;
    w->started++;
    return l;
}

static void send_tokens(sim *s, worker *w, leg *l, uint32_t choice, uint32_t base, uint32_t n)
{
    uint32_t ids[8];
    float lp[8];
    td_top top[16];
    td_msg_tokens t = {.key = l->key,
                       .choice = choice,
                       .base_index = base,
                       .ids = ids,
                       .logprobs = lp,
                       .top = top,
                       .n_top = 2};
    for (uint32_t i = 0; i < n; i++) {
        ids[i] = leg_token(l, choice, base + i);
        lp[i] = lp_of(ids[i]);
        top[2 * i] = (td_top){ids[i], lp[i]};
        top[2 * i + 1] = (td_top){7, -9};
        t.n++;
        if (ids[i] == SIM_EOS) {
            t.finish = TD_FINISH_STOP;
            t.stop_token = SIM_EOS;
            break;
        }
        if (base + i + 1 >= l->max_tokens) {
            t.finish = TD_FINISH_LENGTH;
            break;
        }
    }
    l->at[choice] = base + t.n;
    if (t.finish) l->done[choice] = true;
    td_msg m = support_tokens(&t, w->step);
    to_core(s, w, &m);
}

static bool all_done(const leg *l)
{
    for (uint32_t i = 0; i < l->n; i++)
        if (!l->done[i]) return false;
    return true;
}

static void prompt_done(sim *s, worker *w, leg *l)
{
    td_msg_score *sc = NULL;
    uint32_t n = 0;
    if (l->prompt_logprobs >= 0) {
        sc = calloc(l->n_prompt, sizeof *sc);
        for (n = 0; n + 1 < l->n_prompt; n++) sc[n] = (td_msg_score){l->prompt[n + 1], -1, 0, NULL};
    }
    td_msg m = support_prompt_done(l->key, sc, n);
    to_core(s, w, &m);
    free(sc);
    l->told_prompt = true;
}

static void step_prefill(sim *s, worker *w, leg *l)
{
    if (!l->told_prompt) {
        prompt_done(s, w, l);
        for (uint32_t i = 0; i < l->n; i++)
            if (!l->done[i]) send_tokens(s, w, l, i, l->at[i], 1);
        if (!all_done(l)) {
            bool lost = chance(s) < s->o.fault.lose_commit && s->now < s->o.faults_until_us;
            if (!lost)
                push(s, (ev){.at = s->now + between(s, 500, 20000),
                             .type = EV_COMMIT,
                             .who = (int)(w - s->w),
                             .a = l->sink_inc,
                             .b = l->sink_epoch});
            l->commit_by_us = s->now + between(s, 2000, 25000);
            l->commit_lost = lost;
            return;
        }
        end_leg(s, w, l, TD_FINISH_STOP, TD_OK, "", false);
    } else if (s->now >= l->commit_by_us) {
        end_leg(s, w, l, TD_FINISH_STOP, TD_OK, "", !l->commit_lost);
    }
}

static void step_tokens(sim *s, worker *w, leg *l)
{
    if (l->alone && !l->told_prompt) prompt_done(s, w, l);
    for (uint32_t i = 0; i < l->n; i++)
        if (!l->done[i]) send_tokens(s, w, l, i, l->at[i], 1 + (uint32_t)(rnd(s) % 3));
    if (all_done(l)) end_leg(s, w, l, TD_FINISH_STOP, TD_OK, "", false);
}

static void step_leg(sim *s, worker *w, leg *l)
{
    if (chance(s) < s->o.fault.fail && s->now < s->o.faults_until_us) {
        end_leg(s, w, l, TD_FINISH_ERROR, TD_EDEVICE, "the device failed", false);
        return;
    }
    if (l->decode && !l->landed) {
        if (l->commit_by_us && s->now >= l->commit_by_us) { /* no COMMIT: recompute */
            td_msg m = support_recomputed(l->key, "no commit");
            to_core(s, w, &m);
            l->landed = true;
            l->ready_us = s->now + 20000;
        }
        return;
    }
    if (s->now < l->ready_us) return;
    if (l->prefill) step_prefill(s, w, l);
    else step_tokens(s, w, l);
}

static void land(sim *s, uint64_t inc, uint64_t epoch)
{
    worker *w = by_inc(s, inc);
    if (!w || w->dead) return;
    for (int i = 0; i < MAX_LEGS; i++) {
        leg *l = &w->leg[i];
        if (!l->used || !l->decode || l->landed || l->epoch != epoch) continue;
        td_msg m = support_landed(l->key, 4096, 3000);
        to_core(s, w, &m);
        l->landed = true;
        l->ready_us = s->now;
    }
}

static void worker_message(sim *s, worker *w, const td_msg *m)
{
    leg *l;
    switch (m->type) {
    case TD_MSG_RESERVE:
        if (find_leg(w, m->reserve.work.key)) s->complaints++;
        if (chance(s) < s->o.fault.busy && s->now < s->o.faults_until_us) l = NULL;
        else l = new_leg(s, w, &m->reserve.work);
        if (!l) {
            td_msg b = support_busy(m->reserve.work.key, 30, "full");
            to_core(s, w, &b);
            return;
        }
        l->decode = true;
        l->epoch = ++w->epochs;
        td_msg r = support_reserved(l->key, l->epoch, 0, 8, "mem");
        to_core(s, w, &r);
        l->commit_by_us = s->now + 3000000;
        return;
    case TD_MSG_START:
        if (find_leg(w, m->start.work.key)) s->complaints++;
        l = chance(s) < s->o.fault.busy && s->now < s->o.faults_until_us ? NULL
                                                                         : new_leg(s, w, &m->start.work);
        if (!l) {
            td_msg b = support_busy(m->start.work.key, 30, "full");
            to_core(s, w, &b);
            return;
        }
        l->prefill = m->start.has_sink;
        l->alone = !m->start.has_sink;
        l->sink_epoch = m->start.sink.epoch;
        l->sink_inc = m->start.sink.incarnation;
        return;
    case TD_MSG_CANCEL:
        l = find_leg(w, m->cancel.key);
        if (l) end_leg(s, w, l, TD_FINISH_CANCEL, TD_OK, "", false);
        return;
    case TD_MSG_CANCEL_CHOICE:
        l = find_leg(w, m->cancel.key);
        if (!l) return;
        l->done[m->cancel.choice] = true;
        if (all_done(l)) end_leg(s, w, l, TD_FINISH_STOP, TD_OK, "", false);
        return;
    default: return;
    }
}

int sim_start_worker(sim *s, td_role role)
{
    TD_CHECK(s->n_workers < SIM_MAX_WORKERS);
    worker *w = &s->w[s->n_workers];
    *w = (worker){.used = true, .role = role, .inc = 1000 + (uint64_t)s->n_workers};
    snprintf(w->name, sizeof w->name, "w%d", s->n_workers);
    int i = s->n_workers++;
    hello(s, w);
    push(s, (ev){.at = s->now + 1000, .type = EV_BEAT, .who = i});
    push(s, (ev){.at = s->now + STEP_US, .type = EV_STEP, .who = i});
    return i;
}

static void drop_legs(worker *w)
{
    for (int i = 0; i < MAX_LEGS; i++) free(w->leg[i].prompt);
    memset(w->leg, 0, sizeof w->leg);
}

void sim_kill(sim *s, int i)
{
    worker *w = &s->w[i];
    w->dead = true;
    drop_legs(w);
    for (int k = 0; k < w->n_parked; k++) free(w->parked[k].bytes);
    free(w->parked);
    w->parked = NULL;
    w->n_parked = 0;
    (void)s;
}

void sim_freeze(sim *s, int i, int64_t us)
{
    if (s->w[i].frozen || s->w[i].dead) return;
    s->w[i].frozen = true;
    push(s, (ev){.at = s->now + us, .type = EV_THAW, .who = i});
}

void sim_hang(sim *s, int i, bool on) { (void)s; s->w[i].hung = on; }

static void random_fault(sim *s)
{
    const sim_faults *f = &s->o.fault;
    int alive[SIM_MAX_WORKERS], n = 0;
    for (int i = 0; i < s->n_workers; i++)
        if (!s->w[i].dead) alive[n++] = i;
    if (n && chance(s) < f->kill) {
        int i = alive[rnd(s) % (unsigned)n];
        td_role role = s->w[i].role;
        if (chance(s) < f->goodbye) {
            td_msg m = {.type = TD_MSG_GOODBYE};
            to_core(s, &s->w[i], &m);
        }
        sim_kill(s, i);
        if (s->n_workers + 8 < SIM_MAX_WORKERS && chance(s) < f->restart)
            push(s, (ev){.at = s->now + between(s, 200000, 1500000), .type = EV_START, .a = role});
    }
    if (n && chance(s) < f->freeze) sim_freeze(s, alive[rnd(s) % (unsigned)n], between(s, 100000, 6000000));
    if (n && chance(s) < f->hang) {
        int i = alive[rnd(s) % (unsigned)n];
        s->w[i].hung = true;
        push(s, (ev){.at = s->now + between(s, 1000000, 9000000), .type = EV_UNHANG, .who = i});
    }
    if (s->now < s->o.faults_until_us) push(s, (ev){.at = s->now + 100000, .type = EV_FAULT});
}

/* ---- the loop ---- */
static void park(worker *w, ev e)
{
    w->parked = td_xrealloc(w->parked, (size_t)(w->n_parked + 1) * sizeof *w->parked);
    w->parked[w->n_parked++] = e;
}

static void worker_event(sim *s, ev e)
{
    worker *w = &s->w[e.who];
    if (w->dead) {
        free(e.bytes);
        return;
    }
    if (w->frozen) {
        park(w, e);
        return;
    }
    if (e.type == EV_BEAT) {
        beat(s, w);
        push(s, (ev){.at = s->now + BEAT_US, .type = EV_BEAT, .who = e.who});
    } else if (e.type == EV_STEP) {
        push(s, (ev){.at = s->now + STEP_US, .type = EV_STEP, .who = e.who});
        if (w->hung) return;
        w->step++;
        for (int i = 0; i < MAX_LEGS; i++)
            if (w->leg[i].used) step_leg(s, w, &w->leg[i]);
    } else {
        td_arena a;
        td_arena_init(&a, 16 << 20);
        td_msg m;
        TD_CHECK(td_msg_unpack(e.bytes, e.n, &a, &m) == TD_OK);
        worker_message(s, w, &m);
        td_arena_deinit(&a);
        free(e.bytes);
    }
}

static void thaw(sim *s, int who)
{
    worker *w = &s->w[who];
    if (w->dead) return;
    w->frozen = false;
    for (int i = 0; i < w->n_parked; i++) {
        ev e = w->parked[i];
        e.at = s->now;
        push(s, e);
    }
    free(w->parked);
    w->parked = NULL;
    w->n_parked = 0;
}

static void core_message(sim *s, ev e)
{
    td_arena a;
    td_arena_init(&a, 16 << 20);
    td_msg m;
    TD_CHECK(td_msg_unpack(e.bytes, e.n, &a, &m) == TD_OK);
    feed(s, &(td_event){.type = TD_EV_MESSAGE, .id = s->w[e.who].inc, .msg = &m});
    td_arena_deinit(&a);
    free(e.bytes);
}

static void handle(sim *s, ev e)
{
    switch (e.type) {
    case EV_TICK:
        feed(s, &(td_event){.type = TD_EV_TICK});
        push(s, (ev){.at = s->now + TICK_US, .type = EV_TICK});
        break;
    case EV_TO_CORE: core_message(s, e); break;
    case EV_TO_WORKER: case EV_BEAT: case EV_STEP: worker_event(s, e); break;
    case EV_COMMIT: land(s, e.a, e.b); break;
    case EV_SUBMIT: {
        sim_client *c = s->c[e.who];
        td_job *j = c->job;
        c->job = NULL;
        feed(s, &(td_event){.type = TD_EV_SUBMIT, .job = j});
        break;
    }
    case EV_CANCEL: feed(s, &(td_event){.type = TD_EV_CANCEL, .id = s->c[e.who]->id}); break;
    case EV_THAW: thaw(s, e.who); break;
    case EV_START: sim_start_worker(s, (td_role)e.a); break;
    case EV_FAULT: random_fault(s); break;
    case EV_UNHANG: s->w[e.who].hung = false; break;
    case EV_NONE: break;
    }
}

void sim_run(sim *s, int64_t until_us)
{
    while (s->n && s->heap[0].at <= until_us) {
        ev e = pop(s);
        s->now = e.at;
        handle(s, e);
    }
    s->now = until_us;
}

bool sim_settle(sim *s, int64_t limit_us)
{
    int64_t end = s->now + limit_us;
    while (s->now < end) {
        sim_run(s, s->now + 100000);
        if (!s->n_open && td_core_idle(s->core)) return true;
    }
    return false;
}

/* ---- clients ---- */
static sim_client *new_client(sim *s, uint32_t n_prompt, uint32_t n, uint32_t max_tokens, uint64_t seed)
{
    TD_CHECK(s->n_clients < SIM_MAX_CLIENTS && n <= 8);
    sim_client *c = td_xalloc(sizeof *c);
    s->c[s->n_clients++] = c;
    s->n_open++;
    td_job *j = td_job_new(1 << 20);
    c->job = j;
    j->id = c->id = ++s->next_id;
    snprintf(j->name, sizeof j->name, "r%llu", (unsigned long long)j->id);
    j->client = c;
    c->n_prompt = j->n_prompt = n_prompt;
    uint32_t *p = td_arena_alloc(&j->arena, n_prompt * 4 + 4);
    for (uint32_t i = 0; i < n_prompt; i++) p[i] = (uint32_t)(td_mix64(seed * 77 + i) % 200);
    j->prompt = p;
    c->prompt = td_xalloc(n_prompt * 4 + 4);
    memcpy(c->prompt, p, n_prompt * 4);
    td_h128 *h = td_arena_alloc(&j->arena, (n_prompt / 16 + 1) * sizeof *h);
    for (uint32_t i = 0; i < n_prompt / 16; i++) h[i] = (td_h128){td_mix64(seed * 31 + i), i};
    j->blocks = h;
    j->n_blocks = n_prompt / 16;
    j->sampling = (td_sampling){.temperature = 1,
                                .top_p = 1,
                                .repetition_penalty = 1,
                                .seed = seed,
                                .max_tokens = max_tokens,
                                .n = n,
                                .logprobs = 2,
                                .prompt_logprobs = -1};
    c->n = n;
    c->max_tokens = max_tokens;
    c->seed = seed;
    j->want_text = s->o.text;
    for (int i = 0; i < 8; i++) c->stop_string[i] = -1;
    return c;
}

sim_client *sim_submit(sim *s, uint32_t n_prompt, uint32_t n, uint32_t max_tokens, uint64_t seed)
{
    sim_client *c = new_client(s, n_prompt, n, max_tokens, seed);
    c->submit_us = s->now;
    td_job *j = c->job;
    c->job = NULL;
    feed(s, &(td_event){.type = TD_EV_SUBMIT, .job = j});
    return c;
}

void sim_cancel(sim *s, const sim_client *c) { feed(s, &(td_event){.type = TD_EV_CANCEL, .id = c->id}); }

static void random_client(sim *s, int i)
{
    uint32_t n = chance(s) < 0.2 ? 1 + (uint32_t)(rnd(s) % 4) : 1;
    sim_client *c = new_client(s, 1 + (uint32_t)(rnd(s) % 300), n, 1 + (uint32_t)(rnd(s) % 80), rnd(s) % 64);
    td_job *j = c->job;
    if (chance(s) < 0.3) c->min_tokens = j->sampling.min_tokens = (uint32_t)(rnd(s) % 10);
    if (s->o.scores && chance(s) < 0.2) c->scores = true, j->sampling.prompt_logprobs = 0;
    if (s->o.text && chance(s) < 0.4) {
        c->n_stop = 1 + (uint32_t)(rnd(s) % 3);
        const char **stop = td_arena_alloc(&j->arena, 4 * sizeof *stop);
        for (uint32_t k = 0; k < c->n_stop; k++) {
            char t[4] = {(char)('a' + rnd(s) % 26), chance(s) < 0.7 ? (char)('a' + rnd(s) % 26) : 0, 0, 0};
            stop[k] = td_arena_strndup(&j->arena, t, strlen(t));
            c->stop[k] = td_xstrdup(t);
        }
        j->stop = stop;
        j->n_stop = c->n_stop;
        c->include_stop = j->include_stop = chance(s) < 0.3;
    }
    c->submit_us = between(s, 0, s->o.arrive_us);
    if (chance(s) < s->o.deadline) j->deadline_us = c->submit_us + between(s, 1000, 3000000);
    j->received_us = c->submit_us;
    push(s, (ev){.at = c->submit_us, .type = EV_SUBMIT, .who = i});
    if (chance(s) < s->o.cancel) {
        c->cancel_us = c->submit_us + between(s, 0, 1500000);
        push(s, (ev){.at = c->cancel_us, .type = EV_CANCEL, .who = i});
    }
}

sim *sim_open(const sim_opts *o)
{
    sim *s = td_xalloc(sizeof *s);
    s->o = *o;
    s->rng = o->seed * 0x51ed27 + 1;
    s->w = td_xalloc(SIM_MAX_WORKERS * sizeof *s->w);
    td_core_opts co = o->core;
    co.incarnation = 42;
    co.tokenizer = o->tokenizer;
    s->core = td_core_open(&co);
    td_actions_init(&s->act);
    s->now = 1000;
    push(s, (ev){.at = s->now, .type = EV_TICK});
    for (int i = 0; i < o->prefill; i++) sim_start_worker(s, TD_ROLE_PREFILL);
    for (int i = 0; i < o->decode; i++) sim_start_worker(s, TD_ROLE_DECODE);
    for (int i = 0; i < o->mixed; i++) sim_start_worker(s, TD_ROLE_MIXED);
    for (int i = 0; i < o->clients; i++) random_client(s, i);
    if (o->faults_until_us) push(s, (ev){.at = 200000, .type = EV_FAULT});
    return s;
}

void sim_close(sim *s)
{
    while (s->n) free(pop(s).bytes);
    for (int i = 0; i < s->n_workers; i++) sim_kill(s, i);
    for (int i = 0; i < s->n_clients; i++) {
        sim_client *c = s->c[i];
        if (c->job) td_job_free(c->job);
        for (int k = 0; k < 8; k++) free(c->got[k]), free(c->text[k]);
        for (int k = 0; k < 4; k++) free(c->stop[k]);
        free(c->prompt);
        free(c);
    }
    td_core_close(s->core);
    td_actions_deinit(&s->act);
    free(s->heap);
    free(s->w);
    free(s);
}

td_core *sim_core(sim *s) { return s->core; }
int64_t sim_now(const sim *s) { return s->now; }
int sim_clients(const sim *s) { return s->n_clients; }
sim_client *sim_client_at(sim *s, int i) { return s->c[i]; }
int sim_n_workers(const sim *s) { return s->n_workers; }
uint64_t sim_incarnation(const sim *s, int i) { return s->w[i].inc; }
uint64_t sim_worker_started(const sim *s, int i) { return s->w[i].started; }

uint32_t sim_worker_legs(const sim *s, int i)
{
    uint32_t n = 0;
    for (int k = 0; k < MAX_LEGS; k++) n += s->w[i].leg[k].used;
    return n;
}

/* ---- the truth ---- */
uint32_t sim_expect(const sim_client *c, const td_tokenizer *t, uint32_t choice, uint32_t *ids, char **text,
                    size_t *n_text, td_finish *finish)
{
    td_buf all;
    td_buf_init(&all, 0);
    td_detok d;
    if (t) td_detok_init(&d, t, true);
    uint32_t n = 0;
    *finish = TD_FINISH_LENGTH;
    td_buf_str(&all, "");
    while (n < c->max_tokens) {
        uint32_t id = sim_token(c->prompt, c->n_prompt, c->seed, choice, n);
        if (id == SIM_EOS && n + 1 <= c->min_tokens) id = 'z';
        ids[n++] = id;
        if (id == SIM_EOS) {
            *finish = TD_FINISH_STOP;
            break;
        }
        if (!t) continue;
        size_t from = all.len, end = 0, len = 0;
        td_detok_push(&d, id, &all);
        /* The stop string that is complete first; of several that end there, the longest. */
        for (size_t e = from + 1; e <= all.len && !len; e++)
            for (uint32_t k = 0; k < c->n_stop; k++) {
                size_t m = strlen(c->stop[k]);
                if (m > len && m <= e && !memcmp(all.p + e - m, c->stop[k], m)) len = m, end = e;
            }
        if (len) {
            *finish = TD_FINISH_STOP;
            all.len = end - (c->include_stop ? 0 : len);
            *text = malloc(all.len + 1);
            memcpy(*text, all.p, all.len);
            *n_text = all.len;
            td_buf_deinit(&all);
            return n;
        }
    }
    if (t) td_detok_flush(&d, &all);
    *text = malloc(all.len + 1);
    if (all.len) memcpy(*text, all.p, all.len);
    *n_text = all.len;
    td_buf_deinit(&all);
    return n;
}

static void complain(sim *s, const sim_client *c, int *n, const char *what)
{
    if ((*n)++ < 10)
        printf("seed %llu client %llu: %s (end %d, why %s: %s)\n", (unsigned long long)s->o.seed,
               (unsigned long long)c->id, what, c->last, td_why_name(c->why), c->reason);
}

static void check_choice(sim *s, const sim_client *c, uint32_t k, int *bad)
{
    uint32_t *ids = malloc((c->max_tokens + 1) * 4);
    char *text;
    size_t n_text;
    td_finish fin;
    uint32_t n = sim_expect(c, s->o.text ? s->o.tokenizer : NULL, k, ids, &text, &n_text, &fin);
    bool done = c->last == TD_OUT_DONE;
    if (done ? c->n_got[k] != n : c->n_got[k] > n) complain(s, c, bad, "wrong number of tokens");
    else if (c->n_got[k] && memcmp(ids, c->got[k], c->n_got[k] * 4)) complain(s, c, bad, "wrong tokens");
    if (done && c->finish[k] != fin) complain(s, c, bad, "wrong finish");
    if (s->o.text) {
        if (done ? c->n_text[k] != n_text : c->n_text[k] > n_text)
            complain(s, c, bad, "wrong length of text");
        else if (c->n_text[k] && memcmp(text, c->text[k], c->n_text[k])) complain(s, c, bad, "wrong text");
    }
    free(ids);
    free(text);
}

int sim_check(sim *s, bool allow_failed)
{
    int bad = s->complaints;
    if (bad) printf("seed %llu: %d complaints on the way\n", (unsigned long long)s->o.seed, bad);
    for (int i = 0; i < s->n_clients; i++) {
        const sim_client *c = s->c[i];
        if (c->terminals != 1) complain(s, c, &bad, "not exactly one terminal event");
        bool excuse = (c->why == TD_WHY_CANCELLED && c->cancel_us) || c->why == TD_WHY_DEADLINE ||
                      (allow_failed && (c->why == TD_WHY_NO_WORKER || c->why == TD_WHY_INTERNAL));
        if (c->last != TD_OUT_DONE && !excuse) complain(s, c, &bad, "failed without a reason");
        if (c->last == TD_OUT_DONE && c->scores != c->got_scores) complain(s, c, &bad, "prompt scores");
        uint32_t sum = 0;
        for (uint32_t k = 0; k < c->n; k++) {
            check_choice(s, c, k, &bad);
            sum += c->n_got[k];
        }
        if (c->last == TD_OUT_DONE && c->usage.completion_tokens != sum)
            complain(s, c, &bad, "usage differs from what came");
    }
    const td_fleet *f = td_core_fleet(s->core);
    for (unsigned i = 0; i < TD_INDEX_SLOTS; i++)
        if (f->w[i].leases || f->w[i].seqs || f->w[i].pending_tokens || f->w[i].kv_leased ||
            f->w[i].n_leases) {
            printf("seed %llu: worker %s still has leases\n", (unsigned long long)s->o.seed, f->w[i].name);
            bad++;
        }
    if (td_core_counts_of(s->core)->illegal) bad++, printf("illegal state changes\n");
    return bad;
}
