/* router/core/out.c - actions, and td_outs as one allocation each. */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "router/core/core_int.h"

#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { STEP_ARENA_BYTES = 64 << 20 };

void td_actions_init(td_actions *a)
{
    memset(a, 0, sizeof *a);
    td_arena_init(&a->arena, STEP_ARENA_BYTES);
}

void td_actions_deinit(td_actions *a)
{
    for (uint32_t i = 0; i < a->n; i++)
        if (a->a[i].type == TD_ACT_EMIT) free(a->a[i].out);
    free(a->a);
    td_arena_deinit(&a->arena);
    memset(a, 0, sizeof *a);
}

td_action *core_action(td_core *c, td_action_type type)
{
    td_actions *o = c->out;
    if (o->n == o->cap) {
        o->cap = o->cap ? o->cap * 2 : 16;
        o->a = td_xrealloc(o->a, o->cap * sizeof *o->a);
    }
    td_action *a = &o->a[o->n++];
    memset(a, 0, sizeof *a);
    a->type = type;
    return a;
}

td_msg *core_send(td_core *c, const td_worker *w, td_msg_type type)
{
    td_action *a = core_action(c, TD_ACT_SEND);
    a->to = w->incarnation;
    a->msg.type = type;
    a->msg.sender = c->o.incarnation;
    return &a->msg;
}

void core_log(td_core *c, td_log_level level, const char *fmt, ...)
{
    char line[512];
    va_list ap;
    va_start(ap, fmt);
    vsnprintf(line, sizeof line, fmt, ap);
    va_end(ap);
    td_action *a = core_action(c, TD_ACT_LOG);
    a->level = level;
    a->text = td_arena_strndup(&c->out->arena, line, strlen(line));
    if (!a->text) c->out->n--;
}

/* A td_out with `extra` bytes behind it. */
static td_out *new_out(const td_job *j, td_out_kind kind, size_t extra, char **tail)
{
    td_out *o = td_xalloc(sizeof *o + extra);
    o->client = j->client;
    o->id = j->id;
    o->net = j->net;
    o->part = j->part;
    o->kind = kind;
    o->stop_string = -1;
    *tail = (char *)(o + 1);
    return o;
}

static const void *put(char **tail, const void *p, size_t n)
{
    void *at = *tail;
    if (n) memcpy(at, p, n);
    *tail += (n + 7) & ~(size_t)7;
    return at;
}

static size_t room(size_t n) { return (n + 7) & ~(size_t)7; }

void core_emit_delta(td_core *c, const td_request *r, uint32_t choice, uint32_t offset,
                     const td_msg_tokens *t, uint32_t skip, uint32_t n, const char *text, size_t text_len)
{
    const td_choice *ch = &r->choice[choice];
    bool lp = n && t->logprobs && r->job->sampling.logprobs >= 0;
    uint32_t n_top = lp && t->top ? t->n_top : 0;
    size_t b_ids = n * sizeof(uint32_t), b_lp = lp ? n * sizeof(float) : 0,
           b_top = (size_t)n * n_top * sizeof(td_top);
    char *tail;
    td_out *o =
        new_out(r->job, TD_OUT_DELTA, room(b_ids) + room(b_lp) + room(b_top) + room(text_len + 1), &tail);
    o->choice = choice;
    o->offset = offset;
    o->n_ids = n;
    o->ids = put(&tail, ch->ids + offset, b_ids);
    if (lp) o->logprobs = put(&tail, t->logprobs + skip, b_lp);
    if (n_top) o->top = put(&tail, t->top + (size_t)skip * n_top, b_top);
    o->n_top = n_top;
    o->text = put(&tail, text, text_len); /* the zero behind it is calloc's */
    o->text_len = (uint32_t)text_len;
    o->finish = ch->finish;
    o->stop_token = ch->stop_token;
    o->stop_string = ch->stop_string;
    core_action(c, TD_ACT_EMIT)->out = o;
}

void core_emit_prompt(td_core *c, const td_request *r, const td_msg_score *s, uint32_t n)
{
    size_t tops = 0;
    for (uint32_t i = 0; i < n; i++) tops += s[i].n_top;
    char *tail;
    td_out *o =
        new_out(r->job, TD_OUT_PROMPT, room(n * sizeof(td_score)) + room(tops * sizeof(td_top)), &tail);
    td_score *score = (td_score *)(void *)tail;
    td_top *top = (td_top *)(void *)(tail + room(n * sizeof *score));
    for (uint32_t i = 0; i < n; i++) {
        score[i] = (td_score){s[i].id, s[i].logprob, s[i].n_top, top};
        if (s[i].n_top) memcpy(top, s[i].top, s[i].n_top * sizeof *top);
        top += s[i].n_top;
    }
    o->scores = score;
    o->n_scores = n;
    core_action(c, TD_ACT_EMIT)->out = o;
}

void core_emit_end(td_core *c, td_request *r, td_out_kind kind, uint32_t retry_ms, const char *reason)
{
    TD_CHECK(!r->terminal); /* rule 4 of request.h */
    r->terminal = true;
    r->ended_us = c->now_us;
    size_t n = reason ? strlen(reason) : 0;
    char *tail;
    td_out *o = new_out(r->job, kind, room(n + 1), &tail);
    o->usage = td_request_usage(r);
    td_request_timings(r, c->now_us, &o->timings);
    o->why = r->why;
    o->retry_ms = retry_ms;
    o->reason = put(&tail, reason, n);
    core_action(c, TD_ACT_EMIT)->out = o;
    core_action(c, TD_ACT_ENDED)->request = r;
    c->counts.output_tokens += o->usage.completion_tokens;
    if (kind == TD_OUT_DONE) c->counts.done++;
    else c->counts.failed[r->why & 15]++;
}

void core_emit_refusal(td_core *c, const td_job *j, td_why why, uint32_t retry_ms, const char *reason)
{
    size_t n = strlen(reason);
    char *tail;
    td_out *o = new_out(j, TD_OUT_FAILED, room(n + 1), &tail);
    o->usage.prompt_tokens = j->n_prompt;
    o->why = why;
    o->retry_ms = retry_ms;
    o->reason = put(&tail, reason, n);
    core_action(c, TD_ACT_EMIT)->out = o;
    c->counts.failed[why & 15]++;
}
