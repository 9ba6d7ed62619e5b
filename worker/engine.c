/* Legs: how they come, what is told about them, how they end. The step itself is in engine_step.c.
 *
 * Everything a leg holds goes through td_engine_drop_tables, and every leg ends through td_engine_leg_end:
 * one place each. A held leg stays in the table as ENDED until its last hold is gone, with its page tables,
 * so that a transfer can go on reading them. */
// SPDX-License-Identifier: Apache-2.0
#include "worker/engine.h"
#include "common/buf.h"
#include "common/check.h"
#include "common/clock.h"
#include "worker/engine_int.h"
#include "worker/ranks.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* ---- what is told ---- */

void td_engine_news_reset(td_engine_news *n)
{
    for (uint32_t i = 0; i < n->n_prompt; i++) free(n->scores[i]);
    n->n_tokens = n->n_prompt = n->n_end = 0;
}

#define GROW(n, field, cap) ((n)->field = td_xrealloc((n)->field, (cap) * sizeof *(n)->field))

void td_engine_tell_tokens(td_engine *e, const td_seq *q, uint32_t c, const td_sample_out *drawn,
                           td_finish finish)
{
    td_engine_news *n = &e->news[e->filling];
    if (n->n_tokens == n->cap_tokens) {
        n->cap_tokens = n->cap_tokens ? 2 * n->cap_tokens : 64;
        GROW(n, tokens, n->cap_tokens), GROW(n, token, n->cap_tokens), GROW(n, sample, n->cap_tokens);
    }
    const td_choice *x = &q->choice[c];
    uint32_t i = n->n_tokens++;
    n->token[i] = x->n_out ? x->out[x->n_out - 1] : 0;
    if (drawn) n->sample[i] = *drawn;
    bool lp = drawn && q->d.sampling.logprobs >= 0;
    n->tokens[i] = (td_engine_tokens){.key = q->d.key,
                                      .choice = c,
                                      .base_index = x->n_out - (drawn ? 1 : 0),
                                      .n = drawn ? 1 : 0,
                                      .n_top = lp ? (uint32_t)drawn->n_top : 0,
                                      .finish = finish,
                                      .stop_token = finish == TD_FINISH_STOP ? n->token[i] : 0};
    n->tokens[i].logprob =
        lp ? &n->sample[i].logprob : NULL; /* addresses are made good when the news are handed out */
}

void td_engine_tell_prompt(td_engine *e, td_seq *q)
{
    if (q->prompt_told) return;
    q->prompt_told = true;
    td_engine_news *n = &e->news[e->filling];
    if (n->n_prompt == n->cap_prompt) {
        n->cap_prompt = n->cap_prompt ? 2 * n->cap_prompt : 16;
        GROW(n, prompt, n->cap_prompt), GROW(n, scores, n->cap_prompt);
    }
    int64_t now = td_now_us(), first = q->first_row_us ? q->first_row_us : now;
    n->scores[n->n_prompt] = q->score;
    n->prompt[n->n_prompt++] = (td_engine_prompt){.key = q->d.key,
                                                  .cached_tokens = q->hit,
                                                  .queued_us = first - q->arrived_us,
                                                  .prefill_us = now - first,
                                                  .n_scores = q->score ? q->d.n_prompt - 1 : 0,
                                                  .scores = q->score};
    q->score = NULL;
}

static void tell_end(td_engine *e, uint64_t key, td_finish finish, td_status status, const char *reason)
{
    td_engine_news *n = &e->news[e->filling];
    if (n->n_end == n->cap_end) {
        n->cap_end = n->cap_end ? 2 * n->cap_end : 16;
        GROW(n, end, n->cap_end), GROW(n, reason, n->cap_end);
    }
    snprintf(n->reason[n->n_end], sizeof n->reason[0], "%s", reason ? reason : "");
    n->end[n->n_end++] = (td_engine_end){.key = key, .finish = finish, .status = status};
}

static void hand_out(td_engine *e, td_engine_out *out)
{
    td_engine_news *n = &e->news[e->filling];
    e->filling ^= 1;
    td_engine_news_reset(&e->news[e->filling]);
    for (uint32_t i = 0; i < n->n_tokens; i++) {
        n->tokens[i].token = &n->token[i];
        if (n->tokens[i].logprob) {
            n->tokens[i].logprob = &n->sample[i].logprob;
            n->tokens[i].top = n->sample[i].top;
        }
    }
    for (uint32_t i = 0; i < n->n_end; i++) n->end[i].reason = n->reason[i];
    out->tokens = n->tokens, out->n_tokens = n->n_tokens;
    out->prompt = n->prompt, out->n_prompt = n->n_prompt;
    out->end = n->end, out->n_end = n->n_end;
}

/* ---- legs ---- */

td_seq *td_engine_find(const td_engine *e, uint64_t key)
{
    uint64_t v;
    return td_map_get(&e->by_key, key, &v) ? (td_seq *)(uintptr_t)v : NULL;
}

void td_engine_drop_tables(td_engine *e, td_seq *q)
{
    if (q->state == TD_LEG_RUNNING || q->state == TD_LEG_RESERVED) td_engine_free_slots(e, q);
    if (q->flying) return; /* steps in flight write these pages */
    /* A transfer reads the prompt's pages, which are the trunk's (choice 0); forks go back at once. */
    for (uint32_t c = q->holds ? 1 : 0; c < q->d.sampling.n; c++) td_kvseq_release(td_engine_pool(e, q), &q->choice[c].kv);
}

static void forget(td_engine *e, td_seq *q)
{
    uint32_t i = 0;
    while (i < e->n_leg && e->leg[i] != q) i++;
    TD_CHECK(i < e->n_leg);
    memmove(&e->leg[i], &e->leg[i + 1], (--e->n_leg - i) * sizeof *e->leg);
    if (q->gone)
        e->n_gone--;
    else
        td_map_del(&e->by_key, q->d.key);
    td_seq_close(q);
}

/* Nobody will ask for the leg again; it stays in the table while steps in flight have rows of it. */
static void let_go(td_engine *e, td_seq *q)
{
    if (!q->flying) {
        forget(e, q);
        return;
    }
    td_map_del(&e->by_key, q->d.key);
    q->gone = true;
    e->n_gone++;
}

void td_engine_leg_end(td_engine *e, td_seq *q, td_finish finish, td_status status, const char *reason)
{
    if (q->state == TD_LEG_ENDED) return;
    td_engine_drop_tables(e, q);
    q->state = TD_LEG_ENDED;
    tell_end(e, q->d.key, finish, status, reason);
    if (!q->holds) let_go(e, q);
}

void td_engine_landed(td_engine *e, td_seq *q)
{
    if (q->state == TD_LEG_ENDED) {
        if (q->flying) return;
        for (uint32_t c = q->holds ? 1 : 0; c < q->d.sampling.n; c++)
            td_kvseq_release(td_engine_pool(e, q), &q->choice[c].kv);
        if (!q->holds) forget(e, q);
        return;
    }
    for (uint32_t c = q->holds ? 1 : 0; q->forked && c < q->d.sampling.n; c++)
        if (q->choice[c].done && !q->choice[c].flying) /* cancelled meanwhile, or ended with a row ahead */
            td_kvseq_release(td_engine_pool(e, q), &q->choice[c].kv);
}

void td_engine_choice_done(td_engine *e, td_seq *q, uint32_t c)
{
    q->choice[c].done = true;
    /* An unforked choice 0 is the trunk of the others; a held leg keeps its trunk. */
    if (q->forked && !q->choice[c].flying && (c || !q->holds))
        td_kvseq_release(td_engine_pool(e, q), &q->choice[c].kv);
}

static td_h128 root_of(const td_engine *e, const td_leg *leg)
{
    td_buf b;
    td_buf_init(&b, 1 << 20);
    const char *numerics = e->o.numerics ? e->o.numerics : e->o.ops->numerics;
    uint64_t sizes[2] = {strlen(numerics), leg->salt_bytes};
    td_buf_add(&b, "tandem kv 1", 11); /* tagged and length-prefixed, so that no field can pose as another */
    td_buf_add(&b, &e->desc->digest, sizeof e->desc->digest);
    td_buf_add(&b, sizes, sizeof sizes);
    td_buf_add(&b, numerics, sizes[0]);
    td_buf_add(&b, leg->salt, leg->salt_bytes);
    td_h128 h = td_blockhash_root(e->o.hash_key, b.p, b.len);
    td_buf_deinit(&b);
    return h;
}

enum { MAX_SALT = 4096 };

/* Written so that a value that is not a number is refused too. */
static td_status check_sampling(const td_sampling *s)
{
    if (!(s->temperature >= 0 && s->temperature < 1e6f))
        return td_refuse(TD_EBADREQ, "temperature %g", (double)s->temperature);
    if (!(s->top_p > 0 && s->top_p <= 1))
        return td_refuse(TD_EBADREQ, "top_p %g is not in (0, 1]", (double)s->top_p);
    if (!(s->min_p >= 0 && s->min_p <= 1))
        return td_refuse(TD_EBADREQ, "min_p %g is not in [0, 1]", (double)s->min_p);
    if (!(s->repetition_penalty > 0 && s->repetition_penalty < 1e6f))
        return td_refuse(TD_EBADREQ, "repetition_penalty %g", (double)s->repetition_penalty);
    if (!(fabsf(s->presence_penalty) < 1e6f && fabsf(s->frequency_penalty) < 1e6f))
        return td_refuse(TD_EBADREQ, "presence_penalty %g, frequency_penalty %g", (double)s->presence_penalty,
                         (double)s->frequency_penalty);
    for (uint32_t i = 0; i < s->n_bias; i++)
        if (isnan(s->bias[i].add))
            return td_refuse(TD_EBADREQ, "the bias of token %u is not a number", s->bias[i].id);
    return TD_OK;
}

static td_status check_leg(const td_engine *e, const td_leg *leg)
{
    const td_sampling *s = &leg->sampling;
    uint32_t longest = 0;
    if (td_engine_find(e, leg->key))
        return td_refuse(TD_EBADREQ, "leg %llx exists already", (unsigned long long)leg->key);
    if (e->n_leg - e->n_gone >= (uint32_t)e->o.max_legs)
        return td_refuse(TD_EFULL, "all %d legs are in use", e->o.max_legs);
    if (!s->n || s->n > (uint32_t)TD_MIN(e->o.max_seqs, (int)TD_MAX_CHOICES))
        return td_refuse(TD_EBADREQ, "n is %u, not 1 to %d", s->n,
                         TD_MIN(e->o.max_seqs, (int)TD_MAX_CHOICES));
    if (s->logprobs > TD_MAX_TOP_LOGPROBS || s->prompt_logprobs > TD_MAX_TOP_LOGPROBS)
        return td_refuse(TD_EBADREQ, "more than %d alternatives per token", TD_MAX_TOP_LOGPROBS);
    if (s->n_bias > TD_MAX_LOGIT_BIAS || s->n_stop_ids > TD_MAX_STOP_IDS)
        return td_refuse(TD_EBADREQ, "%u biases and %u stop ids; at most %d and %d", s->n_bias, s->n_stop_ids,
                         TD_MAX_LOGIT_BIAS, TD_MAX_STOP_IDS);
    if (leg->all_logits && (s->n > 1 || leg->kind != TD_LEG_MIXED))
        return td_refuse(TD_EBADREQ, "all logits are for mixed legs of one choice");
    if (leg->salt_bytes > MAX_SALT)
        return td_refuse(TD_EBADREQ, "a salt of %u bytes; at most %d", leg->salt_bytes, MAX_SALT);
    TD_TRY(check_sampling(s));
    for (uint32_t i = 0; i < leg->n_prompt; i++)
        if (leg->prompt[i] >= (uint32_t)e->desc->V)
            return td_refuse(TD_EBADREQ, "token id %u at position %u is outside the vocabulary of %d",
                             leg->prompt[i], i, e->desc->V);
    for (uint32_t c = 0; leg->n_resume && c < s->n; c++) {
        longest = TD_MAX(longest, leg->n_resume[c]);
        for (uint32_t i = 0; i < leg->n_resume[c]; i++)
            if (leg->resume[c][i] >= (uint32_t)e->desc->V)
                return td_refuse(TD_EBADREQ, "resumed token id %u is outside the vocabulary of %d",
                                 leg->resume[c][i], e->desc->V);
    }
    for (uint32_t i = 0; i < s->n_bias; i++)
        if (s->bias[i].id >= (uint32_t)e->desc->V)
            return td_refuse(TD_EBADREQ, "biased token id %u is outside the vocabulary of %d", s->bias[i].id,
                             e->desc->V);
    uint64_t most = (uint64_t)leg->n_prompt + TD_MAX(longest, 1);
    if (most > (uint64_t)e->max_len)
        return td_refuse(TD_EBADREQ, "%llu tokens are more than the %d that fit", (unsigned long long)most,
                         e->max_len);
    uint64_t len = TD_MIN((uint64_t)leg->n_prompt + s->max_tokens, (uint64_t)e->max_len);
    uint64_t prompt_pages = (uint64_t)td_kvpool_whole_pages(td_engine_any_pool(e), leg->n_prompt);
    uint64_t each = (uint64_t)td_kvpool_pages(td_engine_any_pool(e), (uint32_t)len) - prompt_pages + 1;
    td_kv_ledger l;
    td_kvpool_ledger(td_engine_any_pool(e), 0, &l);
    if (leg->kind != TD_LEG_PREFILL && prompt_pages + s->n * each > (uint64_t)l.total + (s->n == 1))
        return td_refuse(TD_EBADREQ,
                         "%u choices of up to %llu tokens need more than the %lld KV pages there are", s->n,
                         (unsigned long long)len, (long long)l.total);
    return TD_OK;
}

static td_status add_leg(td_engine *e, const td_leg *leg, td_seq **out)
{
    TD_TRY(check_leg(e, leg));
    td_seq *q;
    td_leg bounded = *leg; /* the log is allocated for max_tokens */
    bounded.sampling.max_tokens = TD_MIN(bounded.sampling.max_tokens, (uint32_t)e->max_len - leg->n_prompt);
    uint32_t stop[TD_MAX_STOP_IDS],
        n_stop = 0; /* an id outside the vocabulary is never drawn, and cannot be banned either */
    for (uint32_t i = 0; i < leg->sampling.n_stop_ids; i++)
        if (leg->sampling.stop_ids[i] < (uint32_t)e->desc->V) stop[n_stop++] = leg->sampling.stop_ids[i];
    bounded.sampling.stop_ids = stop;
    bounded.sampling.n_stop_ids = n_stop;
    TD_TRY(td_seq_open(&bounded, &q));
    q->root = root_of(e, leg);
    q->arrived_us = td_now_us();
    e->leg[e->n_leg++] = q;
    td_map_put(&e->by_key, leg->key, (uint64_t)(uintptr_t)q);
    *out = q;
    return TD_OK;
}

/* Resumed tokens may already contain the end. True: the leg is over. */
static bool settle_resumed(td_engine *e, td_seq *q)
{
    for (uint32_t c = 0; c < q->d.sampling.n; c++) {
        td_finish f = td_seq_ended(q, c, (uint32_t)e->max_len);
        if (f == TD_FINISH_NONE || q->choice[c].done) continue;
        q->choice[c].done = true;
        td_engine_tell_tokens(e, q, c, NULL, f);
    }
    if (!td_seq_all_done(q)) return false;
    td_engine_leg_end(e, q, TD_FINISH_STOP, TD_OK, NULL);
    return true;
}

td_status td_engine_start(td_engine *e, const td_leg *leg)
{
    td_seq *q;
    TD_TRY(add_leg(e, leg, &q));
    settle_resumed(e, q);
    return TD_OK;
}

td_status td_engine_reserve(td_engine *e, const td_leg *leg, uint32_t *out_hit)
{
    td_seq *q;
    TD_TRY(add_leg(e, leg, &q));
    td_status s = e->slots + td_seq_slots(q) > (uint32_t)e->o.max_seqs
                      ? td_refuse(TD_EFULL, "all %d sequences are in use", e->o.max_seqs)
                      : td_engine_take_pages(e, q, true);
    if (s < 0) {
        forget(e, q);
        return s;
    }
    q->state = TD_LEG_RESERVED;
    td_engine_use_slots(e, q);
    *out_hit = q->choice[0].computed; /* of one choice's resumed tokens too */
    return TD_OK;
}

/* The oldest token that the row at `position` sees in the narrowest window; 0 without windows. */
static uint32_t window_begins(const td_engine *e, uint32_t position)
{
    uint32_t most = 0;
    for (int g = 0; g < e->desc->n_groups; g++) {
        uint32_t W = (uint32_t)e->desc->group[g].window;
        if (W && position + 1 > W) most = TD_MAX(most, position + 1 - W);
    }
    return most;
}

td_status td_engine_land(td_engine *e, uint64_t key, const uint32_t *first, uint32_t n)
{
    td_seq *q = td_engine_find(e, key);
    if (!q || q->state != TD_LEG_RESERVED)
        return td_refuse(TD_EGONE, "no reserved leg %llx", (unsigned long long)key);
    if (n && n != q->d.sampling.n)
        return td_refuse(TD_EPROTO, "%u first tokens for %u choices", n, q->d.sampling.n);
    if (n > 1 && td_seq_resumes(q))
        return td_refuse(TD_EPROTO, "first tokens for choices that have others already");
    for (uint32_t c = 0; c < n; c++)
        if (first[c] >= (uint32_t)e->desc->V)
            return td_refuse(TD_EPROTO, "first token %u is outside the vocabulary", first[c]);
    td_choice *trunk = &q->choice[0];
    uint32_t hit = trunk->computed, length = td_seq_length(q, 0);
    q->state = TD_LEG_RUNNING;
    q->prompt_told = true;
    /* Without first tokens the prompt's last row is computed again, to draw from. It sees one token more than
     * arrived of a window group (what arrived is for the row after it): then all of it is computed here. */
    bool again = !n, short_by_one = again && window_begins(e, length) > hit;
    trunk->computed = trunk->planned = short_by_one ? hit : again ? q->d.n_prompt - 1 : length;
    td_kvseq_landed(td_engine_pool(e, q), &trunk->kv, hit, short_by_one ? 0 : length);
    td_engine_publish(e, q, 0);
    if (settle_resumed(e, q)) return TD_OK;
    for (uint32_t c = 0; c < n; c++) {
        if (q->choice[c].done) continue;
        td_finish f = td_seq_append(q, c, first[c], (uint32_t)e->max_len);
        if (f == TD_FINISH_NONE) continue;
        q->choice[c].done = true;
        td_engine_tell_tokens(e, q, c, NULL, f);
    }
    if (td_seq_all_done(q))
        td_engine_leg_end(e, q, TD_FINISH_STOP, TD_OK, NULL);
    else
        td_engine_fork(e, q);
    return TD_OK;
}

td_status td_engine_recompute(td_engine *e, uint64_t key)
{
    td_seq *q = td_engine_find(e, key);
    if (!q || q->state != TD_LEG_RESERVED)
        return td_refuse(TD_EGONE, "no reserved leg %llx", (unsigned long long)key);
    q->state = TD_LEG_RUNNING;
    q->d.kind = TD_LEG_MIXED;
    td_kvseq_landed(td_engine_pool(e, q), &q->choice[0].kv, 0, 0); /* nothing came: all of it is computed here */
    settle_resumed(e, q);
    return TD_OK;
}

td_status td_engine_cancel(td_engine *e, uint64_t key)
{
    td_seq *q = td_engine_find(e, key);
    if (!q || q->state == TD_LEG_ENDED) return td_refuse(TD_EGONE, "no leg %llx", (unsigned long long)key);
    td_engine_leg_end(e, q, TD_FINISH_CANCEL, TD_OK, NULL);
    return TD_OK;
}

td_status td_engine_cancel_choice(td_engine *e, uint64_t key, uint32_t choice)
{
    td_seq *q = td_engine_find(e, key);
    if (!q || q->state == TD_LEG_ENDED || choice >= q->d.sampling.n)
        return td_refuse(TD_EGONE, "no leg %llx, choice %u", (unsigned long long)key, choice);
    if (!q->choice[choice].done) td_engine_choice_done(e, q, choice);
    if (td_seq_all_done(q)) td_engine_leg_end(e, q, TD_FINISH_STOP, TD_OK, NULL);
    return TD_OK;
}

td_status td_engine_hold(td_engine *e, uint64_t key)
{
    td_seq *q = td_engine_find(e, key);
    if (!q) return td_refuse(TD_EGONE, "no leg %llx", (unsigned long long)key);
    q->holds++;
    return TD_OK;
}

void td_engine_unhold(td_engine *e, uint64_t key)
{
    td_seq *q = td_engine_find(e, key);
    if (!q || !q->holds || --q->holds) return;
    if (q->state != TD_LEG_ENDED) {
        if (q->forked && q->choice[0].done && !q->choice[0].flying)
            td_kvseq_release(td_engine_pool(e, q), &q->choice[0].kv);
        return;
    }
    if (!q->flying)
        td_kvseq_release(td_engine_pool(e, q), &q->choice[0].kv); /* else td_engine_landed does it */
    let_go(e, q);
}

/* ---- turn ---- */

static void end_overdue(td_engine *e)
{
    int64_t now = 0;
    for (uint32_t i = e->n_leg; i-- > 0;) {
        td_seq *q = e->leg[i];
        if (!q->d.deadline_us || q->state == TD_LEG_ENDED) continue;
        if (!now) now = td_now_us();
        if (now >= q->d.deadline_us)
            td_engine_leg_end(e, q, TD_FINISH_ERROR, TD_ETIME, "the request's deadline has passed");
    }
}

td_status td_engine_turn(td_engine *e, td_engine_out *out)
{
    *out = (td_engine_out){0};
    end_overdue(e);
    td_status s = td_engine_step(e, &out->step);
    for (uint32_t r = 0; r < e->n_replicas; r++) TD_CHECK(td_kvpool_balanced(e->replica[r].pool)); /* rule 4 */
    const td_engine_news *n = &e->news[e->filling];
    bool told = n->n_tokens || n->n_prompt || n->n_end;
    hand_out(e, out);
#ifdef TD_DEBUG
    for (uint32_t r = 0; r < e->n_replicas; r++) TD_CHECK(td_kvpool_check(e->replica[r].pool));
#endif
    return s < 0 ? s : s == TD_AGAIN && !told ? TD_AGAIN : TD_OK;
}

bool td_engine_many(const td_engine *e)
{
    return e->o.ranks && td_grid_ranks(&e->o.ranks->grid) > 1;
}

bool td_engine_computing(const td_engine *e)
{
    return e->computing;
}

td_status td_engine_command(td_engine *e, const void *p, size_t n)
{
    return td_exec_command(e->exec, p, n);
}

td_status td_engine_balance(td_engine *e, bool force)
{
    return td_exec_balance(e->exec, force);
}

td_status td_engine_poll(td_engine *e, td_status (*take)(void *arg, const void *p, size_t n), void *arg)
{
    return td_exec_poll(e->exec, take, arg);
}

/* ---- views ---- */

void td_engine_on_kv(td_engine *e, td_engine_kv_fn *fn, void *arg)
{
    e->on_kv = fn, e->kv_arg = arg;
}
void td_engine_on_admit(td_engine *e, void (*fn)(void *, uint64_t), void *arg)
{
    e->on_admit = fn, e->admit_arg = arg;
}
void td_engine_on_step(td_engine *e, void (*fn)(void *, const td_step *), void *arg)
{
    e->on_step = fn, e->step_arg = arg;
}
void td_engine_on_logits(td_engine *e, void (*fn)(void *, uint64_t, uint32_t, const float *), void *arg)
{
    e->on_logits = fn, e->logits_arg = arg;
}
uint32_t td_engine_replica_of(const td_engine *e, uint64_t key)
{
    const td_seq *q = td_engine_find(e, key);
    return q ? q->replica : 0;
}
uint32_t td_engine_replicas(const td_engine *e)
{
    return e->n_replicas;
}
const td_kv *td_engine_kv(const td_engine *e, int group)
{
    return td_kvpool_kv(td_engine_any_pool(e), group);
}
const td_model_desc *td_engine_descr(const td_engine *e)
{
    return e->desc;
}
int td_engine_max_model_len(const td_engine *e)
{
    return e->max_len;
}

const int32_t *td_engine_pages(const td_engine *e, uint64_t key, int group, uint32_t *n)
{
    const td_seq *q = td_engine_find(e, key);
    *n = q ? (uint32_t)q->choice[0].kv.n_pages : 0;
    return q ? q->choice[0].kv.pages[group] : NULL;
}

int64_t td_engine_capacity_tokens(const td_engine *e)
{
    return td_engine_tokens_of(&e->o, td_engine_kv(e, 0)->n_pages) * e->n_replicas;
}

void td_engine_stats_get(const td_engine *e, td_engine_stats *out)
{
    *out = e->stats;
    if (e->o.ranks && e->o.ranks->grid.ep) out->experts = td_model_expert_stats(e->o.model);
    out->evictions = 0;
    for (uint32_t r = 0; r < e->n_replicas; r++) out->evictions += td_kvpool_evictions(e->replica[r].pool);
    out->legs_waiting = out->legs_running = out->seqs_running = 0;
    out->waiting_tokens = 0;
    int64_t pinned = 0;
    for (uint32_t i = 0; i < e->n_leg; i++) {
        const td_seq *q = e->leg[i];
        out->legs_waiting += q->state == TD_LEG_WAITING || q->state == TD_LEG_RESERVED;
        if (q->state == TD_LEG_RUNNING) out->legs_running++, out->seqs_running += td_seq_slots(q);
        if (q->state == TD_LEG_WAITING || q->state == TD_LEG_RUNNING) {
            uint32_t length = td_seq_length(q, 0), done = q->choice[0].planned;
            if (length > done + 1) out->waiting_tokens += length - done;
        }
        if (q->holds) pinned += q->choice[0].kv.n_pages;
    }
    for (int g = 0; g < e->desc->n_groups; g++) {
        td_engine_ledger_row *row = &out->ledger[g];
        *row = (td_engine_ledger_row){.pinned = pinned};
        for (uint32_t r = 0; r < e->n_replicas; r++) {
            td_kv_ledger l;
            td_kvpool_ledger(e->replica[r].pool, g, &l);
            row->total += l.total, row->free += l.free, row->private_ += l.private_, row->shared += l.shared;
            row->cached += l.cached, row->in_transit += l.transit;
        }
    }
}
