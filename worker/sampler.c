/* Scores go first (they need the raw logits), then draws. Consecutive samples with logits of their own run as
 * one call. */
// SPDX-License-Identifier: Apache-2.0
#include "worker/sampler.h"
#include "common/check.h"
#include <stdlib.h>
#include <string.h>

struct td_sampler {
    const td_ops *ops;
    td_pool *pool;
    size_t V;
    td_sample_row *row;
    float *copy; /* rows of logits that several samples share */
    size_t n_row, n_copy;
};

td_sampler *td_sampler_open(const td_ops *ops, td_pool *pool, int V)
{
    td_sampler *s = td_xalloc(sizeof *s);
    *s = (td_sampler){.ops = ops, .pool = pool, .V = (size_t)V};
    return s;
}

void td_sampler_close(td_sampler *s)
{
    if (!s) return;
    free(s->row);
    free(s->copy);
    free(s);
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

static void run_scores(td_sampler *s, const td_step *step, const float *logits, td_sample_out *out)
{
    const td_step_sample *d = td_step_samples(step);
    for (uint32_t i = 0; i < step->n_samples; i++)
        if (d[i].score >= 0)
            s->ops->score(s->pool, logits + d[i].logit * s->V, s->V, (int)s->V, &d[i].score, d[i].logprobs, 1,
                          &out[i]);
}

/* A run of draws [first, end) whose logits are consecutive rows, used by no other draw: in place. */
static void run_group(td_sampler *s, const td_step *step, float *logits, uint32_t first, uint32_t end,
                      td_sample_out *out)
{
    const td_step_sample *d = td_step_samples(step);
    for (uint32_t i = first; i < end; i++) s->row[i - first] = row_of(step, &d[i]);
    s->ops->sample(s->pool, logits, s->V, (int)s->V, s->row, (int)(end - first), out + first);
}

void td_sampler_run(td_sampler *s, const td_step *step, float *logits, td_sample_out *out)
{
    const td_step_sample *d = td_step_samples(step);
    uint32_t n = step->n_samples;
    if (s->n_row < n) {
        s->n_row = n;
        s->row = td_xrealloc(s->row, n * sizeof *s->row);
    }
    run_scores(s, step, logits, out);
    for (uint32_t i = 0; i < n;) {
        if (d[i].score >= 0) {
            i++;
            continue;
        }
        uint32_t end = i + 1;
        if (end < n && d[end].score < 0 && d[end].logit == d[i].logit) { /* n choices of one row */
            while (end < n && d[end].score < 0 && d[end].logit == d[i].logit) end++;
            if (s->n_copy < end - i) {
                s->n_copy = end - i;
                s->copy = td_xrealloc(s->copy, s->n_copy * s->V * sizeof(float));
            }
            for (uint32_t k = i; k < end; k++)
                memcpy(s->copy + (k - i) * s->V, logits + d[i].logit * s->V, s->V * sizeof(float));
            run_group(s, step, s->copy, i, end, out);
        } else {
            while (end < n && d[end].score < 0 && d[end].logit == d[end - 1].logit + 1 &&
                   (end + 1 == n || d[end + 1].logit != d[end].logit))
                end++;
            run_group(s, step, logits + d[i].logit * s->V, i, end, out);
        }
        i = end;
    }
}
