// SPDX-License-Identifier: Apache-2.0
#include "worker/seq.h"
#include "common/check.h"
#include <stdlib.h>
#include <string.h>

static void *copy(const void *p, size_t bytes)
{
    void *q = td_xalloc(TD_MAX(bytes, 1));
    if (bytes) memcpy(q, p, bytes);
    return q;
}

static bool wants_penalties(const td_sampling *s)
{
    return s->repetition_penalty != 1 || s->presence_penalty != 0 || s->frequency_penalty != 0;
}

static void penalty_count(td_choice *c, uint32_t id, bool prompt)
{
    uint64_t at;
    if (!td_map_get(&c->pen_at, id, &at)) {
        at = c->n_pen++;
        c->pen[at] = (td_penalty){.id = id};
        td_map_put(&c->pen_at, id, at);
    }
    if (prompt)
        c->pen[at].in_prompt = 1;
    else
        c->pen[at].n_out++;
}

static void choice_open(td_seq *q, uint32_t i)
{
    td_choice *c = &q->choice[i];
    const td_sampling *s = &q->d.sampling;
    uint32_t n_resume = q->d.n_resume ? q->d.n_resume[i] : 0;
    c->out = td_xalloc(((size_t)TD_MAX(s->max_tokens, n_resume) + 1) * sizeof *c->out);
    if (wants_penalties(s)) {
        size_t cap = (size_t)q->d.n_prompt + TD_MAX(s->max_tokens, n_resume) + 1;
        c->pen = td_xalloc(cap * sizeof *c->pen);
        td_map_init(&c->pen_at, cap);
        for (uint32_t k = 0; k < q->d.n_prompt; k++) penalty_count(c, q->d.prompt[k], true);
    }
    for (uint32_t k = 0; k < n_resume; k++) {
        c->out[c->n_out++] = q->d.resume[i][k];
        if (c->pen) penalty_count(c, q->d.resume[i][k], false);
    }
}

td_status td_seq_open(const td_leg *leg, td_seq **out)
{
    const td_sampling *s = &leg->sampling;
    if (!leg->n_prompt) return td_refuse(TD_EBADREQ, "the prompt is empty");
    if (!s->n || s->n > TD_MAX_CHOICES)
        return td_refuse(TD_EBADREQ, "n is %u, not 1 to %d", s->n, TD_MAX_CHOICES);
    if (!s->max_tokens) return td_refuse(TD_EBADREQ, "max_tokens is 0");
    td_seq *q = td_xalloc(sizeof *q);
    q->d = *leg;
    q->d.prompt = copy(leg->prompt, leg->n_prompt * sizeof *leg->prompt);
    q->d.salt = copy(leg->salt, leg->salt_bytes);
    q->d.sampling.bias = copy(s->bias, s->n_bias * sizeof *s->bias);
    q->d.sampling.stop_ids = copy(s->stop_ids, s->n_stop_ids * sizeof *s->stop_ids);
    q->choice = td_xalloc(s->n * sizeof *q->choice);
    for (uint32_t i = 0; i < s->n; i++) choice_open(q, i);
    q->d.resume = NULL; /* copied into the choices */
    q->d.n_resume = NULL;
    q->forked = s->n == 1;
    if (s->prompt_logprobs >= 0) q->score = td_xalloc(leg->n_prompt * sizeof *q->score);
    *out = q;
    return TD_OK;
}

void td_seq_close(td_seq *q)
{
    if (!q) return;
    for (uint32_t i = 0; i < q->d.sampling.n; i++) {
        TD_ASSERT(!q->choice[i].kv.is_open);
        free(q->choice[i].out);
        if (q->choice[i].pen) td_map_deinit(&q->choice[i].pen_at);
        free(q->choice[i].pen);
    }
    free(q->choice);
    free((void *)(uintptr_t)q->d.prompt);
    free((void *)(uintptr_t)q->d.salt);
    free((void *)(uintptr_t)q->d.sampling.bias);
    free((void *)(uintptr_t)q->d.sampling.stop_ids);
    free(q->score);
    free(q);
}

uint32_t td_seq_slots(const td_seq *q)
{
    return q->d.kind == TD_LEG_PREFILL ? 1 : q->d.sampling.n;
}

bool td_seq_resumes(const td_seq *q)
{
    for (uint32_t i = 0; i < q->d.sampling.n; i++)
        if (q->choice[i].n_out) return true;
    return false;
}

uint32_t td_seq_length(const td_seq *q, uint32_t c)
{
    return q->d.n_prompt + (q->forked ? q->choice[c].n_out : 0);
}

uint32_t td_seq_planned(const td_seq *q, uint32_t c)
{
    return td_seq_length(q, c) + (q->forked ? q->choice[c].ahead : 0);
}

bool td_seq_runs_ahead(const td_seq *q, uint32_t c, uint32_t max_model_len)
{
    const td_choice *x = &q->choice[c];
    uint32_t n = x->n_out + x->ahead;
    return q->d.kind != TD_LEG_PREFILL && !x->pen && n < q->d.sampling.max_tokens &&
           q->d.n_prompt + n < max_model_len;
}

int32_t td_seq_id(const td_seq *q, uint32_t c, uint32_t position)
{
    const td_choice *x = &q->choice[c];
    if (position < q->d.n_prompt + x->n_out) return (int32_t)td_seq_token(q, c, position);
    TD_ASSERT(x->ahead && position == td_seq_planned(q, c) - 1);
    return -1 - (int32_t)x->drawn_at;
}

uint32_t td_seq_token(const td_seq *q, uint32_t c, uint32_t position)
{
    return position < q->d.n_prompt ? q->d.prompt[position] : q->choice[c].out[position - q->d.n_prompt];
}

static bool is_stop(const td_sampling *s, uint32_t id)
{
    for (uint32_t i = 0; i < s->n_stop_ids; i++)
        if (s->stop_ids[i] == id) return true;
    return false;
}

td_finish td_seq_ended(const td_seq *q, uint32_t c, uint32_t max_model_len)
{
    const td_choice *x = &q->choice[c];
    const td_sampling *s = &q->d.sampling;
    if (!x->n_out) return TD_FINISH_NONE;
    if (x->n_out > s->min_tokens && is_stop(s, x->out[x->n_out - 1])) return TD_FINISH_STOP;
    if (x->n_out >= s->max_tokens || q->d.n_prompt + x->n_out >= max_model_len) return TD_FINISH_LENGTH;
    return TD_FINISH_NONE;
}

td_finish td_seq_append(td_seq *q, uint32_t c, uint32_t token, uint32_t max_model_len)
{
    td_choice *x = &q->choice[c];
    x->out[x->n_out++] = token;
    if (x->pen) penalty_count(x, token, false);
    return td_seq_ended(q, c, max_model_len);
}

bool td_seq_all_done(const td_seq *q)
{
    for (uint32_t i = 0; i < q->d.sampling.n; i++)
        if (!q->choice[i].done) return false;
    return true;
}
