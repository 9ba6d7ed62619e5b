/* One step: admit waiting legs, give decode rows their next page (preempting the youngest leg when there is
 * none), let the scheduler choose, build the flat step, run the forward pass and the draws, and take the
 * results in.
 *
 * Planned, computed, committed: at depth 1 a step is collected in the turn that submits it, so planned =
 * computed between turns; publishing and emitting happen in collect, on committed tokens only. */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "worker/engine_int.h"
#include <stdlib.h>
#include <string.h>

/* ---- pages ---- */

td_status td_engine_take_pages(td_engine *e, td_seq *q, bool in_transit)
{
    td_choice *trunk = &q->choice[0];
    uint32_t length = td_seq_length(q, 0), P = (uint32_t)e->o.page_size;
    TD_TRY(td_kvseq_begin(e->pool, &trunk->kv, q->root));
    uint32_t hit = 0;
    bool fresh = q->score || q->d.all_logits; /* every row has to be computed */
    if (!fresh) {
        for (uint32_t i = 0; i < length; i++) e->ids[i] = td_seq_token(q, 0, i);
        hit = td_kvseq_match(e->pool, &trunk->kv, e->ids, length);
    }
    trunk->kv.in_transit = in_transit;
    /* The log, the next token's page, and for several choices a copied last page and a new one each. A leg
     * that is alone needs no such margin: check_leg knows that it fits to its end. */
    int64_t more =
        e->slots && q->d.kind != TD_LEG_PREFILL && q->d.sampling.n > 1 ? 2 * (int64_t)q->d.sampling.n : 0;
    int64_t pages = (int64_t)((length + 1 + P - 1) / P) - trunk->kv.n_pages;
    td_status s = pages + more > td_kvpool_available(e->pool)
                      ? td_refuse(TD_EFULL, "%lld KV pages wanted", (long long)(pages + more))
                      : td_kvseq_ensure(e->pool, &trunk->kv, length + 1);
    if (s < 0) {
        td_kvseq_release(e->pool, &trunk->kv);
        return s;
    }
    trunk->computed = hit;
    if (!q->prompt_told) q->hit = TD_MIN(hit, q->d.n_prompt);
    e->stats.query_tokens += length;
    e->stats.hit_tokens += hit;
    return TD_OK;
}

static void preempt(td_engine *e, td_seq *q)
{
    td_engine_drop_tables(e, q);
    for (uint32_t c = 0; c < q->d.sampling.n; c++) q->choice[c].computed = 0;
    q->forked = q->d.sampling.n == 1;
    q->state = TD_LEG_WAITING;
    e->stats.preemptions++;
}

/* The youngest running leg whose pages nobody else touches. */
static td_seq *victim(td_engine *e)
{
    for (uint32_t i = e->n_leg; i-- > 0;)
        if (e->leg[i]->state == TD_LEG_RUNNING && !e->leg[i]->holds) return e->leg[i];
    return NULL;
}

/* A page for choice c's next row, at whose cost may be. False: this leg itself has been put back, or must
 * wait. */
static bool grow(td_engine *e, td_seq *q, uint32_t c)
{
    td_choice *x = &q->choice[c];
    for (;;) {
        if (td_kvseq_ensure(e->pool, &x->kv, td_seq_length(q, c)) == TD_OK &&
            td_kvseq_writable(e->pool, &x->kv, x->computed) == TD_OK)
            return true;
        td_seq *v = victim(e);
        if (!v) return false;
        preempt(e, v);
        if (v == q) return false;
    }
}

/* ---- admission ---- */

static void shipped_hit(td_engine *e, td_seq *q)
{
    uint32_t from = TD_MAX(q->d.hit_tokens, q->kv_told), to = q->choice[0].computed;
    if (q->d.kind != TD_LEG_PREFILL || from >= to) return;
    if (e->on_kv) e->on_kv(e->kv_arg, q->d.key, 0, e->desc->L, from, to);
    q->kv_told = to;
}

static void admit(td_engine *e)
{
    for (uint32_t i = 0; i < e->n_leg; i++) {
        td_seq *q = e->leg[i];
        if (q->state != TD_LEG_WAITING) continue;
        if (e->slots + td_seq_slots(q) > (uint32_t)e->o.max_seqs) return;
        /* Room to grow for those that run already, so that a newcomer is not preempted at once. */
        if (e->slots && td_kvpool_available(e->pool) < e->slots) return;
        uint64_t changes = td_kvpool_changes(e->pool);
        if (e->blocked.changes == changes && e->blocked.key == q->d.key && e->blocked.slots == e->slots)
            return;
        if (td_engine_take_pages(e, q, false) < 0) {
            e->blocked.changes = td_kvpool_changes(e->pool); /* putting its own hits back is no change */
            e->blocked.key = q->d.key;
            e->blocked.slots = e->slots;
            return;
        }
        q->state = TD_LEG_RUNNING;
        e->slots += td_seq_slots(q);
        shipped_hit(e, q);
    }
}

/* ---- plan ---- */

static bool choice_runs(const td_seq *q, uint32_t c)
{
    return q->state == TD_LEG_RUNNING && (q->forked ? !q->choice[c].done : c == 0) &&
           td_seq_length(q, c) > q->choice[c].computed;
}

/* Decode rows take their pages first; this may preempt legs, so candidates are listed afterwards. */
static void grow_decodes(td_engine *e)
{
    for (uint32_t i = 0; i < e->n_leg; i++) {
        td_seq *q = e->leg[i];
        for (uint32_t c = 0; c < q->d.sampling.n; c++) q->choice[c].ready = false;
        for (uint32_t c = 0; c < q->d.sampling.n && q->state == TD_LEG_RUNNING; c++)
            if (choice_runs(q, c) && !(q->choice[c].ready = grow(e, q, c))) break;
    }
}

static void list_candidates(td_engine *e)
{
    e->n_item = 0;
    for (uint32_t i = 0; i < e->n_leg; i++) {
        td_seq *q = e->leg[i];
        for (uint32_t c = 0; c < q->d.sampling.n && e->n_item < (uint32_t)e->o.max_seqs; c++) {
            if (!choice_runs(q, c) || !q->choice[c].ready) continue;
            const td_choice *x = &q->choice[c];
            uint32_t want = td_seq_length(q, c) - x->computed;
            bool every = (q->score || q->d.all_logits) && x->computed < q->d.n_prompt;
            e->sched[e->n_item] =
                (td_sched_item){.want = want, .decode = want == 1 && !every, .all_logits = every};
            e->item[e->n_item++] = (td_engine_item){.q = q, .c = c, .pos0 = x->computed};
        }
    }
}

static void add_draw(td_engine *e, uint32_t item, uint32_t c, int32_t score_at)
{
    if (e->n_draw ==
        e->cap_draw) { /* prefill legs of many choices; at most max_seqs * TD_MAX_CHOICES and the scores */
        e->cap_draw *= 2;
        e->draw = td_xrealloc(e->draw, e->cap_draw * sizeof *e->draw);
        e->res = td_xrealloc(e->res, e->cap_draw * sizeof *e->res);
    }
    e->draw[e->n_draw++] = (td_engine_draw){item, c, score_at};
}

/* The draws at the end of a log: one for the choice, or one for each choice of a trunk that has no tokens
 * yet. */
static void add_end_draws(td_engine *e, uint32_t i, uint32_t row)
{
    td_engine_item *it = &e->item[i];
    td_seq *q = it->q;
    bool trunk = !q->forked;
    if (trunk && q->d.kind == TD_LEG_PREFILL && td_seq_resumes(q))
        return; /* the decode side goes on from the logs it has */
    uint32_t logit = td_step_build_logit(e->build, row), position = td_seq_length(q, it->c);
    for (uint32_t c = trunk ? 0 : it->c; c < (trunk ? q->d.sampling.n : it->c + 1); c++) {
        if (q->choice[c].done || (trunk && q->choice[c].n_out)) continue;
        td_step_build_draw(e->build, q, c, logit, position);
        add_draw(e, i, c, -1);
    }
}

static uint32_t scored_rows(td_engine *e, uint32_t i, uint32_t row0, bool *last_has_logit)
{
    td_engine_item *it = &e->item[i];
    uint32_t rows = 0;
    for (uint32_t k = 0; k < it->n_rows; k++) {
        uint32_t pos = it->pos0 + k;
        bool last = it->ends && k + 1 == it->n_rows;
        if (pos >= it->q->d.n_prompt || (last && !it->q->d.all_logits))
            break; /* the end's draw makes its own */
        uint32_t logit = td_step_build_logit(e->build, row0 + k);
        rows++;
        if (it->q->score && pos + 1 < it->q->d.n_prompt) {
            td_step_build_score(e->build, it->q, logit, pos + 1);
            add_draw(e, i, 0, (int32_t)pos + 1);
        }
        if (last) { /* all_logits: one row of logits serves both */
            *last_has_logit = true;
            td_step_build_draw(e->build, it->q, it->c, logit, td_seq_length(it->q, it->c));
            add_draw(e, i, it->c, -1);
        }
    }
    return rows;
}

static const td_step *plan(td_engine *e)
{
    admit(e);
    grow_decodes(e);
    list_candidates(e);
    uint32_t n = 0, max_rows = (uint32_t)e->o.max_batched_tokens;
    td_sched_plan(e->sched, e->n_item,
                  (td_sched_caps){max_rows, (uint32_t)e->o.max_prefill_chunk, (uint32_t)e->max_logits});
    td_step_build_begin(e->build, e->step + 1);
    e->n_draw = 0;
    for (uint32_t i = 0; i < e->n_item; i++) {
        if (!e->sched[i].rows) continue;
        bool every = e->sched[i].all_logits, done = false;
        td_engine_item *it = &e->item[n];
        *it = e->item[i];
        it->n_rows = e->sched[i].rows;
        it->ends = it->pos0 + it->n_rows == td_seq_length(it->q, it->c);
        if (!it->q->first_row_us) it->q->first_row_us = td_now_us();
        uint32_t row0 =
            td_step_build_rows(e->build, it->q, it->c, &it->q->choice[it->c].kv, it->pos0, it->n_rows);
        if (every) scored_rows(e, n, row0, &done);
        if (it->ends && !done) add_end_draws(e, n, row0 + it->n_rows - 1);
        n++;
    }
    e->n_item = n;
    return n ? td_step_build_finish(e->build) : NULL;
}

/* ---- submit ---- */

static void layer_written(void *arg, int layer)
{
    td_engine *e = arg;
    for (uint32_t i = 0; i < e->n_item; i++) {
        const td_engine_item *it = &e->item[i];
        uint32_t from = TD_MAX(it->pos0, TD_MAX(it->q->d.hit_tokens, it->q->kv_told)),
                 to = it->pos0 + it->n_rows;
        if (it->q->d.kind == TD_LEG_PREFILL && from < to)
            e->on_kv(e->kv_arg, it->q->d.key, layer, layer + 1, from, to);
    }
}

static td_status submit(td_engine *e, const td_step *step)
{
    td_kv kv[TD_MAX_GROUPS];
    for (int g = 0; g < e->desc->n_groups; g++) kv[g] = *td_kvpool_kv(e->pool, g);
    if (e->on_step) e->on_step(e->step_arg, step);
    TD_TRY(td_model_forward(e->o.model, step, kv, e->logits, e->on_kv ? layer_written : NULL, e));
    if (e->on_logits) {
        const int32_t *row = td_step_logit_rows(step);
        for (uint32_t i = 0; i < e->n_item; i++) {
            if (!e->item[i].q->d.all_logits) continue;
            uint32_t row0 = td_step_seqs(step)[i].row0;
            for (uint32_t k = 0; k < step->n_logits; k++)
                if ((uint32_t)row[k] >= row0 && (uint32_t)row[k] < row0 + e->item[i].n_rows)
                    e->on_logits(e->logits_arg, e->item[i].q->d.key,
                                 e->item[i].pos0 + (uint32_t)row[k] - row0,
                                 e->logits + (size_t)k * (size_t)e->desc->V);
        }
    }
    td_sampler_run(e->sampler, step, e->logits, e->res);
    return TD_OK;
}

/* ---- collect ---- */

static void publish(td_engine *e, td_seq *q, uint32_t c)
{
    td_choice *x = &q->choice[c];
    uint32_t unit = (uint32_t)td_kvpool_unit(e->pool);
    for (uint32_t at; (at = td_kvseq_unpublished(e->pool, &x->kv, x->computed)) != UINT32_MAX;) {
        for (uint32_t i = 0; i < unit; i++) e->ids[i] = td_seq_token(q, c, at + i);
        td_kvseq_publish_unit(e->pool, &x->kv, e->ids);
    }
}

void td_engine_fork(td_engine *e, td_seq *q)
{
    if (q->forked || q->d.kind == TD_LEG_PREFILL || q->choice[0].computed < q->d.n_prompt) return;
    for (uint32_t c = 1; c < q->d.sampling.n; c++) {
        if (q->choice[c].done) continue;
        td_status s = td_kvseq_fork(e->pool, &q->choice[0].kv, &q->choice[c].kv, q->d.n_prompt);
        TD_CHECK(s == TD_OK); /* the pool has as many sequences as slots were counted */
        q->choice[c].computed = q->d.n_prompt;
    }
    q->forked = true;
    if (q->choice[0].done && !q->holds) td_kvseq_release(e->pool, &q->choice[0].kv);
}

static void take_draw(td_engine *e, const td_engine_draw *d, const td_sample_out *r)
{
    td_seq *q = e->item[d->item].q;
    if (d->score_at >= 0) {
        q->score[d->score_at - 1] = *r;
        return;
    }
    if (q->state == TD_LEG_ENDED) return;
    if (r->token < 0) { /* every token masked or not a number */
        td_engine_leg_end(e, q, TD_FINISH_ERROR, TD_EPROTO,
                          "no token can be drawn: all logits are masked or not numbers");
        return;
    }
    td_engine_tell_prompt(e, q);
    td_finish f = td_seq_append(q, d->c, (uint32_t)r->token, (uint32_t)e->max_len);
    td_engine_tell_tokens(e, q, d->c, r, f);
    if (f != TD_FINISH_NONE) td_engine_choice_done(e, q, d->c);
}

/* After its draws: pages that no row will see again, and whether the leg is over. */
static void settle(td_engine *e, const td_engine_item *it)
{
    td_seq *q = it->q;
    td_choice *x = &q->choice[it->c];
    if (x->kv.is_open && !q->holds && !x->done) td_kvseq_trim(e->pool, &x->kv, x->computed);
    if (td_seq_all_done(q))
        td_engine_leg_end(e, q, TD_FINISH_STOP, TD_OK, NULL);
    else if (q->d.kind == TD_LEG_PREFILL && it->ends) {
        td_engine_tell_prompt(e, q);
        td_engine_leg_end(e, q, TD_FINISH_NONE, TD_OK, NULL);
    }
}

static void note_speed(td_engine *e, const td_step *step, int64_t us)
{
    uint64_t decode = 0;
    for (uint32_t i = 0; i < e->n_item; i++) decode += e->item[i].n_rows == 1 && e->item[i].ends;
    td_engine_stats *s = &e->stats;
    double *rate = decode * 2 > step->n_rows ? &s->decode_tok_s : &s->prefill_tok_s,
           now = (double)step->n_rows * 1e6 / (double)TD_MAX(us, 1);
    *rate = *rate > 0 ? 0.9 * *rate + 0.1 * now : now;
    s->step_us_ewma = s->step_us_ewma ? (9 * s->step_us_ewma + us) / 10 : us;
    s->steps++;
    s->rows += step->n_rows;
    s->decode_rows += decode;
    s->prompt_rows += step->n_rows - decode;
}

static void collect(td_engine *e)
{
    for (uint32_t i = 0; i < e->n_item; i++) {
        td_engine_item *it = &e->item[i];
        it->q->choice[it->c].computed = it->pos0 + it->n_rows;
        it->q->kv_told = TD_MAX(it->q->kv_told, it->pos0 + it->n_rows);
        publish(e, it->q, it->c);
        td_engine_fork(e, it->q);
    }
    for (uint32_t i = 0; i < e->n_draw; i++)
        if (e->draw[i].score_at >= 0) take_draw(e, &e->draw[i], &e->res[i]);
    /* A leg may be freed by its own settle, so its draws and its settle go together, and a leg that is gone
     * is not looked at again. */
    for (uint32_t i = 0, k = 0; i < e->n_item; i++) {
        td_seq *q = e->item[i].q;
        uint64_t key = q->d.key;
        bool last = i + 1 == e->n_item || e->item[i + 1].q != q;
        for (; k < e->n_draw && e->draw[k].item == i; k++)
            if (e->draw[k].score_at < 0 && td_engine_find(e, key)) take_draw(e, &e->draw[k], &e->res[k]);
        if (!td_engine_find(e, key)) {
            while (i + 1 < e->n_item && e->item[i + 1].q == q) i++;
            while (k < e->n_draw && e->draw[k].item <= i) k++;
            continue;
        }
        if (q->state == TD_LEG_ENDED) continue;
        if (!last && q->choice[e->item[i].c].kv.is_open && !q->holds)
            td_kvseq_trim(e->pool, &q->choice[e->item[i].c].kv, q->choice[e->item[i].c].computed);
        if (last) settle(e, &e->item[i]);
    }
}

td_status td_engine_step(td_engine *e)
{
    const td_step *step = plan(e);
    if (!step) return TD_AGAIN;
    int64_t t = td_now_us();
    e->step++;
    TD_TRY(submit(e, step));
    collect(e);
    note_speed(e, step, td_now_us() - t);
    return TD_OK;
}
