/* One tensor-parallel rank: scores go first (they need the raw logits), then draws; consecutive samples with
 * logits of their own run as one call. Several: all samples of this context rank's rows go through their
 * stages together, one exchange a stage. */
// SPDX-License-Identifier: Apache-2.0
#include "worker/sampler.h"
#include "common/check.h"
#include "kernels/draw.h"
#include "worker/devmem.h"
#include "worker/ranks.h"
#include <stdlib.h>
#include <string.h>

struct td_sampler {
    const td_ops *ops;
    td_pool *pool;
    td_vocab v;
    const td_ranks *ranks;
    size_t width;    /* tokens of a row here */
    uint32_t *own;   /* [n_samples]: this rank's samples, ascending */
    uint32_t *users; /* [n_logits]: how many samples a row has */
    td_sample_row *row;
    td_draw *draw;
    td_sample_out *packed; /* results of all context ranks */
    size_t n_row, n_users;
    td_sample_out *drawn; /* several ranks on a device: where its draws write; the host gathers them */
    size_t n_drawn;
    float *copy;   /* rows of logits that are processed beside the raw ones */
    uint8_t *wire; /* [ranks][message] */
    size_t n_copy, n_wire;
};

td_status td_sampler_open(const td_ops *ops, td_pool *pool, int V, int v0, int n, const td_ranks *ranks,
                          td_sampler **out)
{
    bool parts = ranks && ranks->grid.tp > 1;
    if (parts && !ops->draw_say)
        return td_fail(TD_ENOSUP, "kernels %s cannot draw from a vocabulary in parts: want tensor parallel 1",
                       ops->family);
    td_sampler *s = td_xalloc(sizeof *s);
    *s = (td_sampler){.ops = ops, .pool = pool, .ranks = ranks, .width = (size_t)n};
    s->v = (td_vocab){V, v0, n, parts ? ranks->at.tp : 0, parts ? ranks->grid.tp : 1};
    *out = s;
    return TD_OK;
}

void td_sampler_close(td_sampler *s)
{
    if (!s) return;
    td_devmem_free(s->ops->dev, s->copy);
    td_devmem_free(s->ops->dev, s->drawn);
    free(s->own), free(s->users), free(s->row), free(s->draw), free(s->packed), free(s->wire);
    free(s);
}

static void room(td_sampler *s, const td_step *step)
{
    size_t n = step->n_samples;
    if (s->n_row < n) {
        s->n_row = n;
        s->own = td_xrealloc(s->own, n * sizeof *s->own);
        s->row = td_xrealloc(s->row, n * sizeof *s->row);
        s->draw = td_xrealloc(s->draw, n * sizeof *s->draw);
        s->packed = td_xrealloc(s->packed, n * sizeof *s->packed);
    }
    if (s->n_users < step->n_logits) {
        s->n_users = step->n_logits;
        s->users = td_xrealloc(s->users, s->n_users * sizeof *s->users);
    }
}

/* On a device the old ones go: draws wait, so nothing queued uses them. */
static td_status copies(td_sampler *s, size_t n, float **out)
{
    if (s->n_copy < n) {
        void *p;
        TD_TRY(td_devmem_alloc(s->ops->dev, n * s->width * sizeof(float), "copies of logits", &p));
        td_devmem_free(s->ops->dev, s->copy);
        s->n_copy = n;
        s->copy = p;
    }
    *out = s->copy;
    return TD_OK;
}

static td_status copy_row(const td_sampler *s, float *to, const float *from)
{
    td_dev *d = s->ops->dev;
    if (d) return d->copy(d, TD_STREAM_COMPUTE, to, from, s->width * sizeof *to);
    memcpy(to, from, s->width * sizeof *to);
    return TD_OK;
}

/* What all of a run's functions look at. */
typedef struct run {
    td_sampler *s;
    const td_step *step;
    const td_step_sample *d;
    const td_logit_place *place;
    float *logits;
    td_sample_out *out;
    uint32_t n_own;
} run;

static float *logits_of(const run *r, uint32_t i)
{
    uint32_t k = r->d[i].logit;
    return r->logits + (r->place ? (size_t)r->place[k].row : k) * r->s->width;
}

static td_sample_row row_of(const td_step *step, const td_step_sample *d)
{
    return (td_sample_row){.temperature = d->temperature,
                           .top_p = d->top_p,
                           .min_p = d->min_p,
                           .repetition_penalty = d->repetition_penalty,
                           .presence_penalty = d->presence_penalty,
                           .frequency_penalty = d->frequency_penalty,
                           .top_k = d->top_k,
                           .seed = d->seed,
                           .position = d->position,
                           .stream = d->stream,
                           .logprobs = d->logprobs,
                           .pen = d->n_pen ? TD_STEP_AT(step, td_penalty, d->pen) : NULL,
                           .n_pen = d->n_pen,
                           .bias = d->n_bias ? TD_STEP_AT(step, td_bias, d->bias) : NULL,
                           .n_bias = d->n_bias,
                           .mask = d->n_mask ? TD_STEP_AT(step, uint32_t, d->mask) : NULL};
}

/* ---- the whole vocabulary is here ---- */

static void run_scores(const run *r)
{
    td_sampler *s = r->s;
    for (uint32_t i = 0; i < r->n_own; i++) {
        const td_step_sample *d = &r->d[s->own[i]];
        if (d->score >= 0)
            s->ops->score(s->pool, logits_of(r, s->own[i]), s->width, s->v.V, &d->score, d->logprobs, 1,
                          &r->out[s->own[i]]);
    }
}

/* Own samples [first, end), draws which follow each other in the step, of consecutive rows used by no other
 * draw: in place. */
static void run_group(const run *r, float *logits, uint32_t first, uint32_t end)
{
    td_sampler *s = r->s;
    for (uint32_t i = first; i < end; i++) s->row[i - first] = row_of(r->step, &r->d[s->own[i]]);
    s->ops->sample(s->pool, logits, s->width, s->v.V, s->row, (int)(end - first), r->out + s->own[first]);
}

/* Own sample i is a draw that follows the one before it in the step, `rows` rows of logits behind. */
static bool follows(const run *r, uint32_t i, ptrdiff_t rows)
{
    const uint32_t *own = r->s->own;
    return i < r->n_own && own[i] == own[i - 1] + 1 && r->d[own[i]].score < 0 &&
           logits_of(r, own[i]) - logits_of(r, own[i - 1]) == rows * (ptrdiff_t)r->s->width;
}

static td_status run_draws(const run *r)
{
    td_sampler *s = r->s;
    for (uint32_t i = 0, end; i < r->n_own; i = end) {
        float *logits = logits_of(r, s->own[i]);
        end = i + 1;
        if (r->d[s->own[i]].score >= 0) continue;
        if (follows(r, end, 0)) { /* n choices of one row */
            while (follows(r, end, 0)) end++;
            float *copy;
            TD_TRY(copies(s, end - i, &copy));
            for (uint32_t k = i; k < end; k++) TD_TRY(copy_row(s, copy + (k - i) * s->width, logits));
            run_group(r, copy, i, end);
        } else {
            while (follows(r, end, 1) && !follows(r, end + 1, 0)) end++;
            run_group(r, logits, i, end);
        }
    }
    return TD_OK;
}

static td_status run_whole(run *r)
{
    td_sampler *s = r->s;
    td_dev *dev = s->ops->dev;
    td_sample_out *out = r->out;
    size_t n = r->step->n_samples;
    bool here = dev && s->ranks && td_grid_ranks(&s->ranks->grid) > 1; /* this host's memory */
    if (here && s->n_drawn < n) {
        void *p;
        TD_TRY(td_devmem_alloc(dev, n * sizeof *out, "results of draws", &p));
        td_devmem_free(dev, s->drawn);
        s->drawn = p;
        s->n_drawn = n;
    }
    if (here) r->out = s->drawn;
    run_scores(r);
    TD_TRY(run_draws(r));
    r->out = out;
    return here ? td_devmem_fetch(dev, out, s->drawn, n * sizeof *out) : TD_OK;
}

/* ---- parts of it on several ranks ---- */

/* Every rank counts and opens the same. Draws that leave their row's raw logits alone get a copy to work in.
 */
static td_status open_draws(const run *r)
{
    td_sampler *s = r->s;
    size_t n = 0;
    memset(s->users, 0, r->step->n_logits * sizeof *s->users);
    for (uint32_t i = 0; i < r->n_own; i++) s->users[r->d[s->own[i]].logit]++;
    for (uint32_t i = 0; i < r->n_own; i++) {
        const td_step_sample *d = &r->d[s->own[i]];
        td_sample_row row = row_of(r->step, d);
        float *raw = logits_of(r, s->own[i]);
        bool beside = d->score < 0 && !td_draw_plain(&row) && (d->logprobs >= 0 || s->users[d->logit] > 1);
        s->draw[i] = td_draw_open(row, d->score, raw, beside ? NULL : raw, &r->out[s->own[i]]);
        n += beside;
    }
    float *copy;
    TD_TRY(copies(s, n, &copy));
    for (uint32_t i = 0; i < r->n_own; i++) {
        if (s->draw[i].x) continue;
        s->draw[i].x = copy;
        copy += s->width;
    }
    return TD_OK;
}

static uint8_t *wire(td_sampler *s, size_t bytes)
{
    size_t n = bytes * (size_t)s->v.ranks;
    if (s->n_wire < n) {
        s->n_wire = n;
        free(s->wire);
        s->wire = aligned_alloc(64, (n + 63) / 64 * 64);
        TD_CHECK(s->wire);
    }
    return s->wire;
}

static td_status draw_together(const run *r)
{
    td_sampler *s = r->s;
    TD_TRY(open_draws(r));
    for (;;) {
        size_t bytes = 0;
        for (uint32_t i = 0; i < r->n_own; i++) {
            s->draw[i].at = bytes;
            bytes += s->draw[i].bytes;
        }
        if (!bytes) return TD_OK;
        uint8_t *all = wire(s, bytes), *mine = all + (size_t)s->v.rank * bytes;
        s->ops->draw_say(s->pool, &s->v, s->draw, (int)r->n_own, mine);
        TD_TRY(td_coll_all_gather(s->ranks->tp, mine, all, bytes));
        s->ops->draw_hear(s->pool, &s->v, s->draw, (int)r->n_own, all, bytes);
    }
}

/* ---- rows on several context ranks ---- */

/* Their results go to context rank 0, each rank's packed. */
static td_status gather_results(const run *r)
{
    td_sampler *s = r->s;
    int me = s->ranks->at.cp, R = s->ranks->grid.cp;
    size_t bytes[TD_MAX_RANKS] = {0}, offset[TD_MAX_RANKS], next[TD_MAX_RANKS], at = 0;
    for (uint32_t i = 0; i < r->step->n_samples; i++) bytes[r->place[r->d[i].logit].cp] += sizeof *r->out;
    for (int c = 0; c < R; at += bytes[c++]) {
        offset[c] = at;
        next[c] = at / sizeof *r->out;
    }
    td_sample_out *mine = s->packed + next[me]; /* context rank 0: where gathering wants them */
    for (uint32_t i = 0; i < r->n_own; i++) mine[i] = r->out[s->own[i]];
    TD_TRY(td_coll_gatherv(s->ranks->cp, mine, s->packed, bytes, offset, 0));
    for (uint32_t i = 0; me == 0 && i < r->step->n_samples; i++)
        r->out[i] = s->packed[next[r->place[r->d[i].logit].cp]++];
    return TD_OK;
}

td_status td_sampler_run(td_sampler *s, const td_step *step, const td_logit_place *place, float *logits,
                         td_sample_out *out)
{
    run r = {s, step, td_step_samples(step), place, logits, out, 0};
    if (!step->n_samples) return TD_OK;
    room(s, step);
    for (uint32_t i = 0; i < step->n_samples; i++)
        if (!place || place[r.d[i].logit].cp == s->ranks->at.cp) s->own[r.n_own++] = i;
    if (s->v.ranks > 1) {
        TD_TRY(draw_together(&r));
    } else {
        TD_TRY(run_whole(&r));
    }
    return place && s->ranks->at.tp == 0 ? gather_results(&r) : TD_OK;
}
