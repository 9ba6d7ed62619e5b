/* A step's way: rank 0 -> all steps to the ranks of stage 0 -> each stage's ranks to the same place in the next stage, with the
 * hidden rows -> the last stage draws -> rank 0. With one rank, or one stage, the ways are empty. */
// SPDX-License-Identifier: Apache-2.0
#include "worker/exec.h"
#include "common/check.h"
#include "worker/devmem.h"
#include "worker/ranks.h"
#include "worker/results.h"
#include "worker/sampler.h"
#include <stdlib.h>
#include <string.h>

enum { STEP = 1, COMMAND, POLL, BALANCE, STOP };

/* bytes of the payload and of the hidden rows after it */
typedef struct head { uint32_t kind, bytes; uint64_t hidden; } head;

typedef struct slot { /* a replica's step in flight on rank 0 */
    uint32_t n_samples, n_logits, want_logits;
    int at;                        /* its results, if they are drawn here */
    float *logits;                 /* of a step that wanted them; owned */
} slot;

typedef struct out_buf { /* what goes to the next stage */
    head h;
    uint8_t *p;
    size_t cap;
    bool busy;
    void *hidden;                  /* on a device: hidden rows in its memory */
    size_t cap_hidden;
    bool hidden_busy;
} out_buf;

struct td_exec {
    td_exec_opts o;
    const td_model_desc *desc;
    td_kv kv[TD_MAX_GROUPS];
    td_sampler *sampler;
    float *logits;                 /* last stage: [max_logits][this rank's part of V] */
    float *whole;                  /* of a step that wants them: [n_logits][V] */
    size_t cap_whole;
    slot *flight;                  /* [depth][replicas], a ring of steps */
    int first, n;
    td_results results;            /* of steps that are drawn here, a ring */
    int last;                      /* those of the last step */
    uint32_t *n_last;              /* rank 0, [replicas]: samples of it that the next step's ids may refer to */
    uint8_t *in;                   /* a step on another rank than 0 */
    size_t cap_in;
    out_buf next[2], back[TD_EXEC_MAX_DEPTH];
    int turn, back_turn;
    uint64_t n_news;               /* another rank's answer to a poll, under way: its size, and the news */
    uint8_t *news;
    bool news_busy;
    bool asked;                    /* rank 0: the others owe an answer, which comes after owed_after more steps */
    int owed_after;
    int64_t submitted;             /* steps since experts were balanced */
    td_status dead;                /* the device failed: nothing is computed any more */
};

static int stages(const td_exec *x) { return x->o.ranks ? x->o.ranks->grid.pp : 1; }
static int replicas(const td_exec *x) { return x->o.ranks ? x->o.ranks->grid.dp : 1; }
static slot *slots_at(td_exec *x, int i) { return x->flight + (size_t)i * (size_t)replicas(x); }
static bool is_first(const td_exec *x) { return !x->o.ranks || x->o.ranks->at.pp == 0; }
static bool is_last(const td_exec *x) { return !x->o.ranks || x->o.ranks->at.pp == stages(x) - 1; }
static bool alone(const td_exec *x) { return !x->o.ranks || td_grid_ranks(&x->o.ranks->grid) == 1; }
/* The rank that draws: of a replica's last stage, the first. */
static bool draws(const td_exec *x) { return is_last(x) && (!x->o.ranks || (!x->o.ranks->at.tp && !x->o.ranks->at.cp)); }
static int drawing_rank(const td_exec *x, int replica)
{
    const td_grid *g = &x->o.ranks->grid;
    return td_grid_rank(g, (td_coord){.pp = g->pp - 1, .dp = replica});
}

static void free_all(td_exec *x)
{
    for (int i = 0; i < 2; i++) {
        free(x->next[i].p);
        td_devmem_free(x->o.ops->dev, x->next[i].hidden);
    }
    for (int i = 0; i < TD_EXEC_MAX_DEPTH; i++) free(x->back[i].p);
    for (int i = 0; i < x->o.depth * replicas(x); i++) free(x->flight[i].logits);
    td_sampler_close(x->sampler);
    td_devmem_free(x->o.ops->dev, x->logits);
    td_results_close(&x->results);
    free(x->news), free(x->in), free(x->flight), free(x->n_last), free(x->whole);
    free(x);
}

static td_status open_head(td_exec *x)
{
    int v0, n;
    td_model_vocab(x->o.model, &v0, &n);
    void *logits;
    TD_TRY(td_devmem_alloc(x->o.ops->dev, (size_t)x->o.max_logits * (size_t)n * sizeof(float), "rows of logits", &logits));
    x->logits = logits;
    TD_TRY(td_results_open(alone(x) ? x->o.ops->dev : NULL, TD_MAX(x->o.depth, 2), 2 * (size_t)x->o.max_logits, &x->results));
    return td_sampler_open(x->o.ops, x->o.pool, x->desc->V, v0, n, x->o.ranks, &x->sampler);
}

td_status td_exec_open(const td_exec_opts *o, td_exec **out)
{
    td_exec *x = td_xalloc(sizeof *x);
    x->o = *o;
    if (replicas(x) > 1 && stages(x) == 1 && o->depth > TD_EXEC_MAX_DEPTH) {
        free(x);
        return td_fail(TD_EBADREQ, "%d steps in flight: at most %d with data parallel ranks of one stage", o->depth, TD_EXEC_MAX_DEPTH);
    }
    x->desc = td_model_descr(o->model);
    for (int g = 0; g < x->desc->n_groups; g++) x->kv[g] = o->kv[g];
    x->flight = td_xalloc((size_t)o->depth * (size_t)replicas(x) * sizeof *x->flight);
    x->n_last = td_xalloc((size_t)replicas(x) * sizeof *x->n_last);
    td_status s = is_last(x) ? open_head(x) : TD_OK;
    if (s < 0) {
        free_all(x);
        return s;
    }
    *out = x;
    return TD_OK;
}

/* ---- the way to the next stage ---- */

static td_status wait_out(td_exec *x, int i)
{
    if (x->next[i].hidden_busy) {
        x->next[i].hidden_busy = false;
        TD_TRY(td_coll_send_wait(x->o.ranks->data.pp, i));
    }
    if (!x->next[i].busy) return TD_OK;
    x->next[i].busy = false;
    TD_TRY(td_coll_send_wait(x->o.ranks->pp, 2 * i));
    return td_coll_send_wait(x->o.ranks->pp, 2 * i + 1);
}

static uint8_t *room_out(out_buf *b, size_t bytes)
{
    if (b->cap < bytes) {
        b->cap = bytes;
        b->p = td_xrealloc(b->p, bytes);
    }
    return b->p;
}

/* Hidden rows of a device go by themselves, from a copy: the next step writes its own where they are. */
static td_status send_hidden(td_exec *x, int i, const void *hidden, size_t bytes)
{
    td_dev *d = x->o.ops->dev;
    out_buf *b = &x->next[i];
    if (!bytes) return TD_OK;
    if (b->cap_hidden < bytes) {
        TD_TRY(d->sync(d, TD_STREAM_COMPUTE));
        td_devmem_free(d, b->hidden);
        b->hidden = NULL, b->cap_hidden = 0;
        TD_TRY(td_devmem_alloc(d, bytes, "rows on their way", &b->hidden));
        b->cap_hidden = bytes;
    }
    TD_TRY(d->copy(d, TD_STREAM_COMPUTE, b->hidden, hidden, bytes));
    TD_TRY(td_coll_send_start(x->o.ranks->data.pp, i, x->o.ranks->at.pp + 1, b->hidden, bytes));
    b->hidden_busy = true;
    return TD_OK;
}

/* Head, payload and this rank's hidden rows; sent while this stage goes on. */
static td_status pass_on(td_exec *x, head h, const void *payload, const void *hidden, size_t hidden_bytes)
{
    h.hidden = hidden_bytes;
    if (is_last(x)) return TD_OK;
    int i = x->turn ^= 1, to = x->o.ranks->at.pp + 1;
    out_buf *b = &x->next[i];
    size_t along = x->o.ops->dev ? 0 : hidden_bytes;
    TD_TRY(wait_out(x, i));
    (void)room_out(b, h.bytes + along);
    b->h = h;
    if (h.bytes) memcpy(b->p, payload, h.bytes);
    if (along) memcpy(b->p + h.bytes, hidden, along);
    b->busy = true;
    TD_TRY(td_coll_send_start(x->o.ranks->pp, 2 * i, to, &b->h, sizeof b->h));
    TD_TRY(td_coll_send_start(x->o.ranks->pp, 2 * i + 1, to, b->p, h.bytes + along));
    return along ? TD_OK : send_hidden(x, i, hidden, hidden_bytes);
}

/* ---- one step on one rank ---- */

static td_status copy_page(const td_exec *x, const td_kv *kv, int k, int32_t from, int32_t to)
{
    td_dev *d = x->o.ops->dev;
    uint8_t *dst = td_kv_page(kv, k, to);
    const uint8_t *src = td_kv_page(kv, k, from);
    if (d) return d->copy(d, TD_STREAM_COMPUTE, dst, src, td_kv_page_bytes(kv));
    memcpy(dst, src, td_kv_page_bytes(kv));
    return TD_OK;
}

static td_status copy_pages(td_exec *x, const td_step *s)
{
    const td_step_copy *c = td_step_copies(s);
    for (uint32_t i = 0; i < s->n_copies; i++) {
        const td_kv *kv = &x->kv[c[i].group];
        int n_slots = td_model_groups(x->o.model)[c[i].group].n_slots;
        for (int k = 0; k < n_slots; k++) TD_TRY(copy_page(x, kv, k, c[i].from, c[i].to));
    }
    return TD_OK;
}

typedef struct layer_arg { td_exec *x; const td_step *step; } layer_arg;

/* Also: rows on their way to the next stage go on, which waits for them. A group that is broken says so at its next use. */
static void on_layer(void *arg, int layer)
{
    const layer_arg *a = arg;
    if (!is_last(a->x)) (void)td_coll_poke(a->x->o.ranks->pp);
    if (a->x->o.on_layer) a->x->o.on_layer(a->x->o.arg, a->step, layer);
}

bool td_exec_knows_draws(const td_ops *ops, const td_ranks *ranks)
{
    return !ranks ||
           (ranks->grid.pp == 1 && ranks->grid.cp == 1 && (!ops->dev || td_grid_ranks(&ranks->grid) == 1));
}

static td_status compute(td_exec *x, const td_step *step)
{
    layer_arg a = {x, step};
    TD_TRY(copy_pages(x, step));
    td_model_drawn(x->o.model,
                   td_exec_knows_draws(x->o.ops, x->o.ranks) ? td_results_at(&x->results, x->last) : NULL);
    TD_TRY(td_model_forward(x->o.model, step, x->kv, x->logits, on_layer, &a));
    return x->o.ops->wait && !is_last(x) ? x->o.ops->wait() : TD_OK; /* an error belongs to its step */
}

static size_t logit_bytes(const td_exec *x, uint32_t n_logits) { return (size_t)n_logits * (size_t)x->desc->V * sizeof(float); }

/* A message to rank 0 of this size. Rank 0 may be busy with a later step that needs this rank too: so nobody waits for it to
 * be taken until as many more are under way. */
static td_status back_open(td_exec *x, size_t bytes, out_buf **out)
{
    out_buf *b = &x->back[x->back_turn];
    if (b->busy) TD_TRY(td_coll_send_wait(x->o.ranks->back, x->back_turn));
    b->busy = false;
    (void)room_out(b, bytes);
    *out = b;
    return TD_OK;
}

static td_status back_send(td_exec *x, out_buf *b, size_t bytes)
{
    int i = x->back_turn;
    if (!bytes) return TD_OK;
    b->busy = true;
    x->back_turn = (i + 1) % TD_EXEC_MAX_DEPTH;
    return td_coll_send_start(x->o.ranks->back, i, 0, b->p, bytes);
}

/* A step without results says so from the last stage, so that none is collected before all stages have computed it. */
static size_t result_bytes(const td_exec *x, size_t n) { return n || stages(x) == 1 ? n : 1; }

static float *room_whole(td_exec *x, uint32_t n_logits)
{
    size_t bytes = logit_bytes(x, n_logits);
    if (x->cap_whole < bytes) {
        x->cap_whole = bytes;
        x->whole = td_xrealloc(x->whole, bytes);
    }
    return x->whole;
}

/* The last stage: all of its ranks draw, each over its rows and its part of the vocabulary; the first one sends the results
 * back. Logits that are wanted (x->whole) are put together first: draws change them. */
static td_status finish(td_exec *x, const td_step *step)
{
    const td_ops *ops = x->o.ops;
    size_t logits = step->want_logits ? logit_bytes(x, step->n_logits) : 0, n = step->n_samples,
           results = n * sizeof(td_sample_out);
    size_t bytes = result_bytes(x, logits + results);
    int at = (x->last + 1) % x->results.depth;
    out_buf *b = NULL;
    TD_TRY(td_results_room(&x->results, n));
    if (logits) TD_TRY(td_model_join_logits(x->o.model, step, x->logits, room_whole(x, step->n_logits)));
    TD_TRY(td_sampler_run(x->sampler, step, td_model_logit_places(x->o.model), x->logits,
                          td_results_at(&x->results, at)));
    if (ops->status) TD_TRY(ops->status());
    TD_TRY(td_results_send(&x->results, at, n));
    x->last = at;
    if (!x->o.ranks || !x->o.ranks->grid.rank) return TD_OK; /* collect waits */
    /* Once a step is collected its pages may go to others, who may write them from another queue. */
    if (ops->wait) TD_TRY(ops->wait());
    if (!draws(x)) return TD_OK;
    TD_TRY(back_open(x, bytes, &b));
    if (bytes > logits + results) b->p[0] = 0;
    if (logits) memcpy(b->p, x->whole, logits);
    TD_TRY(td_results_fetch(&x->results, at, n, b->p + logits));
    return back_send(x, b, bytes);
}

static uint8_t *room_in(td_exec *x, size_t n)
{
    if (x->cap_in < n) {
        x->cap_in = n;
        free(x->in);
        x->in = aligned_alloc(64, (n + 63) / 64 * 64);
        TD_CHECK(x->in);
    }
    return x->in;
}

/* An error after the ranks have heard of a step: they are no longer together. */
static td_status broken(td_exec *x, td_status s)
{
    if (s < 0 && !alone(x)) td_coll_abort(x->o.ranks->world, td_reason());
    return s;
}

/* ---- rank 0 ---- */

static td_status tell_stage(td_exec *x, head h, const void *payload)
{
    if (alone(x)) return TD_OK;
    TD_TRY(td_coll_bcast(x->o.ranks->stage, &h, sizeof h, 0));
    return td_coll_bcast(x->o.ranks->stage, (void *)(uintptr_t)payload, h.bytes, 0);
}

/* All replicas' steps, one after the other. */
static td_status tell_steps(td_exec *x, const td_step *const *step)
{
    if (replicas(x) == 1) return tell_stage(x, (head){STEP, step[0]->bytes, 0}, step[0]);
    size_t bytes = 0;
    for (int i = 0; i < replicas(x); i++) bytes += step[i]->bytes;
    if (bytes > UINT32_MAX) return td_fail(TD_EFULL, "%zu bytes of steps", bytes);
    uint8_t *all = room_in(x, bytes);
    for (int i = 0; i < replicas(x); all += step[i++]->bytes) memcpy(all, step[i], step[i]->bytes);
    return tell_stage(x, (head){STEP, (uint32_t)bytes, 0}, x->in);
}

static td_status submit(td_exec *x, const td_step *const *steps)
{
    int at = (x->first + x->n) % x->o.depth;
    const td_step *step = steps[0]; /* of this rank's replica */
    TD_TRY(tell_steps(x, steps));
    TD_TRY(compute(x, step));
    size_t hidden_bytes = 0;
    const void *hidden = td_model_hidden(x->o.model, step, x->kv, &hidden_bytes);
    TD_TRY(pass_on(x, (head){STEP, step->bytes, 0}, step, hidden, hidden_bytes));
    for (int i = 0; i < replicas(x); i++) {
        slot *f = &slots_at(x, at)[i];
        free(f->logits);
        *f = (slot){.n_samples = steps[i]->n_samples, .n_logits = steps[i]->n_logits, .want_logits = steps[i]->want_logits};
        x->n_last[i] = td_exec_knows_draws(x->o.ops, x->o.ranks) ? f->n_samples : 0;
        size_t bytes = logit_bytes(x, f->n_logits);
        if (!f->want_logits) continue;
        f->logits = td_xalloc(bytes + f->n_samples * sizeof(td_sample_out)); /* as it comes from another rank */
    }
    if (is_last(x)) TD_TRY(finish(x, step));
    td_model_record(x->o.model); /* all is queued: the host has time */
    slots_at(x, at)->at = x->last;
    if (is_last(x) && step->want_logits) memcpy(slots_at(x, at)->logits, x->whole, logit_bytes(x, step->n_logits));
    x->n++;
    return TD_OK;
}

td_status td_exec_check(const td_exec *x, const td_step *const *steps)
{
    for (int i = 0; i < replicas(x); i++) {
        const td_step *s = steps[i];
        TD_TRY(td_model_check(x->o.model, s, x->kv));
        if (s->n_before > x->n_last[i])
            return td_fail(TD_EPROTO, "step %llu refers to %u draws of a step of %u",
                           (unsigned long long)s->number, s->n_before, x->n_last[i]);
    }
    return TD_OK;
}

td_status td_exec_submit(td_exec *x, const td_step *const *steps)
{
    TD_CHECK(x->n < x->o.depth);
    if (x->o.balance_steps && x->submitted == x->o.balance_steps) TD_TRY(td_exec_balance(x, false));
    x->submitted++;
    if (x->dead < 0) return td_refuse(x->dead, "the device failed before");
    td_status s = submit(x, steps);
    if (s == TD_EDEVICE) x->dead = s;
    return broken(x, s);
}

static td_status collect(td_exec *x, td_sample_out *out, const float **logits)
{
    int at = x->first;
    x->first = (x->first + 1) % x->o.depth;
    x->n--;
    if (x->owed_after) x->owed_after--;
    if (x->dead < 0) return td_refuse(x->dead, "the device failed before");
    for (int i = 0; i < replicas(x); i++) {
        slot *s = &slots_at(x, at)[i];
        size_t bytes = s->n_samples * sizeof *out, before = s->want_logits ? logit_bytes(x, s->n_logits) : 0;
        logits[i] = s->logits;
        if (i == 0 && is_last(x)) {
            TD_TRY(td_results_fetch(&x->results, s->at, s->n_samples, out));
        } else if (s->want_logits) {
            TD_TRY(td_coll_recv(x->o.ranks->back, drawing_rank(x, i), s->logits, before + bytes));
            if (bytes) memcpy(out, (const char *)s->logits + before, bytes);
        } else {
            uint8_t none;
            TD_TRY(td_coll_recv(x->o.ranks->back, drawing_rank(x, i), bytes ? (void *)out : &none, result_bytes(x, bytes)));
        }
        out += s->n_samples;
    }
    return TD_OK;
}

td_status td_exec_collect(td_exec *x, td_sample_out *out, const float **logits)
{
    TD_CHECK(x->n > 0);
    td_status s = collect(x, out, logits);
    if (s == TD_EDEVICE) x->dead = s;
    return broken(x, s);
}

static td_status tell_all(td_exec *x, head h, const void *payload)
{
    TD_TRY(tell_stage(x, h, payload));
    return pass_on(x, h, payload, NULL, 0);
}

td_status td_exec_command(td_exec *x, const void *p, size_t n)
{
    if (alone(x)) return TD_OK;
    TD_CHECK(n <= UINT32_MAX);
    return broken(x, tell_all(x, (head){COMMAND, (uint32_t)n, 0}, p));
}

td_status td_exec_balance(td_exec *x, bool force)
{
    uint32_t how = force;
    x->submitted = 0;
    if (alone(x) || !x->o.ranks->grid.ep) return TD_OK;
    td_status s = tell_all(x, (head){BALANCE, sizeof how, 0}, &how);
    if (s >= 0) s = td_model_balance(x->o.model, force);
    if (td_model_expert_stats(x->o.model).left) x->submitted = x->o.balance_steps - 1; /* after the next step */
    return broken(x, s);
}

/* What each of the others answered. take NULL: nobody wants to know. */
static td_status take_news(td_exec *x, td_status (*take)(void *arg, const void *p, size_t n), void *arg)
{
    td_coll *c = x->o.ranks->news;
    uint8_t news[TD_EXEC_POLL_BYTES];
    uint64_t n;
    x->asked = false;
    for (int i = 1; i < td_coll_size(c); i++) {
        TD_TRY(td_coll_recv(c, i, &n, sizeof n));
        if (n > sizeof news) return td_fail(TD_EPROTO, "%llu bytes of news from rank %d", (unsigned long long)n, i);
        TD_TRY(td_coll_recv(c, i, news, (size_t)n));
        if (n && take) TD_TRY(take(arg, news, (size_t)n));
    }
    return TD_OK;
}

td_status td_exec_poll(td_exec *x, td_status (*take)(void *arg, const void *p, size_t n), void *arg)
{
    if (alone(x)) return TD_OK;
    if (!x->asked) {
        TD_TRY(broken(x, tell_all(x, (head){POLL, 0, 0}, NULL)));
        x->asked = true;
        x->owed_after = x->n;
    }
    return x->owed_after ? TD_AGAIN : broken(x, take_news(x, take, arg));
}

/* ---- the other ranks ---- */

static td_status hear(td_exec *x, head *h)
{
    const td_ranks *r = x->o.ranks;
    if (!is_first(x)) return td_coll_recv(r->pp, r->at.pp - 1, h, sizeof *h);
    return td_coll_bcast(r->stage, h, sizeof *h, 0);
}

/* The payload, and for a step its hidden rows, which go into the model. */
static td_status hear_payload(td_exec *x, head h)
{
    const td_ranks *r = x->o.ranks;
    bool device = x->o.ops->dev != NULL;
    size_t along = device ? 0 : (size_t)h.hidden;
    uint8_t *p = room_in(x, h.bytes + along);
    if (is_first(x)) return td_coll_bcast(r->stage, p, h.bytes, 0);
    TD_TRY(td_coll_recv(r->pp, r->at.pp - 1, p, h.bytes + along));
    if (h.kind != STEP) return TD_OK;
    size_t want = 0;
    void *hidden = td_model_hidden(x->o.model, (const td_step *)(const void *)p, x->kv, &want);
    if (h.hidden != want) return td_fail(TD_EPROTO, "%zu bytes of hidden rows, not %zu", (size_t)h.hidden, want);
    if (device) return td_coll_recv(r->data.pp, r->at.pp - 1, hidden, want);
    memcpy(hidden, p + h.bytes, want);
    return TD_OK;
}

/* This replica's step: rank 0 tells all of them, stages pass on their own. */
static td_status own_step(const td_exec *x, head h, const td_step **out)
{
    int n = is_first(x) ? replicas(x) : 1, mine = is_first(x) ? x->o.ranks->at.dp : 0;
    const uint8_t *p = x->in;
    size_t left = h.bytes;
    for (int i = 0; i < n; i++) {
        const td_step *s = (const td_step *)(const void *)p;
        if (left < sizeof *s || s->bytes < sizeof *s || s->bytes > left || s->bytes % 8)
            return td_fail(TD_EPROTO, "a step of %zu bytes", left);
        if (i == mine) *out = s;
        p += s->bytes;
        left -= s->bytes;
    }
    return left ? td_fail(TD_EPROTO, "%zu bytes after the steps", left) : TD_OK;
}

static td_status do_step(td_exec *x, head h)
{
    const td_step *step = NULL;
    TD_TRY(own_step(x, h, &step));
    TD_TRY(compute(x, step));
    size_t bytes = 0;
    const void *hidden = td_model_hidden(x->o.model, step, x->kv, &bytes);
    TD_TRY(pass_on(x, (head){STEP, step->bytes, 0}, step, hidden, bytes));
    if (is_last(x)) TD_TRY(finish(x, step));
    td_model_record(x->o.model); /* nobody waits for this rank */
    return TD_OK;
}

static td_status news_out(td_exec *x)
{
    if (!x->news_busy) return TD_OK;
    x->news_busy = false;
    TD_TRY(td_coll_send_wait(x->o.ranks->news, 0));
    return x->n_news ? td_coll_send_wait(x->o.ranks->news, 1) : TD_OK;
}

/* This rank goes on: rank 0 hears the answer when it has collected the steps before. */
static td_status answer_poll(td_exec *x)
{
    td_coll *c = x->o.ranks->news;
    TD_TRY(news_out(x)); /* taken before it asked again */
    if (!x->news) x->news = td_xalloc(TD_EXEC_POLL_BYTES);
    x->n_news = x->o.on_poll ? x->o.on_poll(x->o.arg, x->news, TD_EXEC_POLL_BYTES) : 0;
    TD_TRY(td_coll_send_start(c, 0, 0, &x->n_news, sizeof x->n_news));
    if (x->n_news) TD_TRY(td_coll_send_start(c, 1, 0, x->news, (size_t)x->n_news));
    x->news_busy = true;
    return TD_OK;
}

static td_status balance(td_exec *x, head h)
{
    uint32_t how;
    if (h.bytes != sizeof how) return td_fail(TD_EPROTO, "%u bytes of a balancing", h.bytes);
    memcpy(&how, x->in, sizeof how);
    TD_TRY(pass_on(x, h, x->in, NULL, 0));
    return td_model_balance(x->o.model, how != 0);
}

static td_status serve_one(td_exec *x, bool *stop)
{
    head h;
    TD_TRY(hear(x, &h));
    TD_TRY(hear_payload(x, h));
    switch (h.kind) {
    case STEP: return do_step(x, h);
    case COMMAND:
        if (x->o.on_command) TD_TRY(x->o.on_command(x->o.arg, x->in, h.bytes));
        return pass_on(x, h, x->in, NULL, 0);
    case POLL:
        TD_TRY(pass_on(x, h, NULL, NULL, 0));
        return answer_poll(x);
    case BALANCE: return balance(x, h);
    case STOP: *stop = true; return pass_on(x, h, NULL, NULL, 0);
    default: return td_fail(TD_EPROTO, "rank %d heard a message of kind %u", x->o.ranks->grid.rank, h.kind);
    }
}

td_status td_exec_serve(td_exec *x)
{
    bool stop = false;
    td_status s = TD_OK;
    while (!stop && s >= 0) s = serve_one(x, &stop);
    if (s < 0) td_coll_abort(x->o.ranks->world, td_reason());
    return s;
}

/* Rank 0: what is under way is taken, so that nobody waits for that. */
static td_status collect_rest(td_exec *x)
{
    const float **logits = td_xalloc((size_t)replicas(x) * sizeof *logits);
    td_status s = TD_OK;
    while (x->n && s >= 0) {
        size_t n = 1;
        for (int i = 0; i < replicas(x); i++) n += slots_at(x, x->first)[i].n_samples;
        td_sample_out *out = td_xalloc(n * sizeof *out);
        s = collect(x, out, logits);
        free(out);
    }
    free(logits);
    return s >= 0 && x->asked ? take_news(x, NULL, NULL) : s;
}

void td_exec_close(td_exec *x)
{
    if (!x) return;
    if (!alone(x) && x->o.ranks->grid.rank == 0) {
        td_status s = collect_rest(x);
        if (s >= 0) (void)tell_all(x, (head){STOP, 0, 0}, NULL);
    }
    for (int i = 0; i < 2; i++)
        if (!alone(x)) (void)wait_out(x, i);
    for (int i = 0; i < TD_EXEC_MAX_DEPTH; i++)
        if (x->back[i].busy) (void)td_coll_send_wait(x->o.ranks->back, i);
    if (!alone(x)) (void)news_out(x);
    free_all(x);
}
