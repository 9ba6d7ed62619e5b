/* One step: admit waiting legs, give decode rows their next page (preempting the youngest leg when there is
 * none), let the scheduler choose, build the flat step, run the forward pass and the draws, and take the
 * results in.
 *
 * Planned, computed, committed: at depth 1 a step is collected in the turn that submits it, so planned =
 * computed between turns; publishing and emitting happen in collect, on committed tokens only.
 *
 * Ahead: with more depth, the next row of a choice is planned while the step that draws its token runs
 * (step.h: ids). All that a step says of the row follows from the number of tokens, so the step is the one
 * that depth 1 would make, and the noise is stateless: the tokens are the same. If that token ends the
 * choice, its rows in flight are thrown away when they are collected: they count for nothing, and the tables,
 * which they wrote behind the committed tokens, go back. */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "common/clock.h"
#include "worker/engine_int.h"
#include "worker/ranks.h"
#include <stdio.h>

/* ---- pages ---- */

/* e->ids[0, length): the leg's log. */
static td_status take_pages_of(td_engine *e, td_engine_replica *r, td_seq *q, bool fresh, bool in_transit)
{
    td_choice *trunk = &q->choice[0];
    uint32_t length = td_seq_length(q, 0), hit = 0;
    TD_TRY(td_kvseq_begin(r->pool, &trunk->kv, q->root));
    if (!fresh) hit = td_kvseq_match(r->pool, &trunk->kv, e->ids, length);
    trunk->kv.in_transit = in_transit;
    /* The log, the next token's page, and for several choices a copied last page and a new one each. A leg
     * that is alone needs no such margin: check_leg knows that it fits to its end. */
    int64_t each = 1 + td_kvpool_pages(r->pool, length) - td_kvpool_whole_pages(r->pool, length), more = 0;
    if (r->slots && q->d.kind != TD_LEG_PREFILL && q->d.sampling.n > 1) more = TD_MAX(each, 2) * (int64_t)q->d.sampling.n;
    int64_t pages = (int64_t)td_kvpool_pages(r->pool, length + 1) - trunk->kv.n_pages;
    td_status s = pages + more > td_kvpool_available(r->pool)
                      ? td_refuse(TD_EFULL, "%lld KV pages wanted", (long long)(pages + more))
                      : td_kvseq_ensure(r->pool, &trunk->kv, length + 1);
    if (s < 0) {
        td_kvseq_release(r->pool, &trunk->kv);
        return s;
    }
    q->replica = r->index;
    trunk->computed = trunk->planned = hit;
    if (!q->prompt_told) q->hit = TD_MIN(hit, q->d.n_prompt);
    e->stats.query_tokens += length;
    e->stats.hit_tokens += hit;
    return TD_OK;
}

/* Fewer sequences, else more pages, else longer without a new leg: where nothing runs, they take turns. */
static bool has_more_room(const td_engine_replica *a, const td_engine_replica *b)
{
    int64_t pages_a = td_kvpool_available(a->pool), pages_b = td_kvpool_available(b->pool);
    if (a->slots != b->slots) return a->slots < b->slots;
    return pages_a != pages_b ? pages_a > pages_b : a->taken < b->taken;
}

/* Where the leg goes: where most of its log is already, unless that replica has its share of the sequences; else where
 * least runs. Not to those that were tried. */
static td_engine_replica *choose_replica(td_engine *e, const td_seq *q, bool fresh, bool may_fill)
{
    uint32_t length = td_seq_length(q, 0), share = TD_MAX((uint32_t)e->o.max_seqs / e->n_replicas, 1), best_hit = 0;
    td_engine_replica *best = NULL;
    for (uint32_t i = 0; i < e->n_replicas; i++) {
        td_engine_replica *r = &e->replica[i];
        /* Room to grow for those that run already, so that a newcomer is not preempted at once. */
        if (r->tried || (!may_fill && r->slots && td_kvpool_available(r->pool) < r->slots)) continue;
        bool full = e->n_replicas == 1 || fresh || r->slots + td_seq_slots(q) > share;
        uint32_t hit = full ? 0 : td_kvpool_peek(r->pool, q->root, e->ids, length);
        if (!best || hit > best_hit || (hit == best_hit && has_more_room(r, best))) best = r, best_hit = hit;
    }
    return best;
}

td_status td_engine_take_pages(td_engine *e, td_seq *q, bool in_transit)
{
    bool fresh = q->score || q->d.all_logits; /* every row has to be computed */
    uint32_t length = td_seq_length(q, 0);
    td_status s = td_refuse(TD_EFULL, "no replica has KV pages to spare");
    td_engine_replica *r;
    for (uint32_t i = 0; i < length && !fresh; i++) e->ids[i] = td_seq_token(q, 0, i);
    for (uint32_t i = 0; i < e->n_replicas; i++) e->replica[i].tried = false;
    while (s < 0 && (r = choose_replica(e, q, fresh, in_transit))) {
        r->tried = true;
        s = take_pages_of(e, r, q, fresh, in_transit);
        if (s >= 0) r->taken = ++e->n_taken;
    }
    return s;
}

/* Goes up whenever some replica has more room or more to hit. */
static uint64_t all_changes(const td_engine *e)
{
    uint64_t n = 0;
    for (uint32_t r = 0; r < e->n_replicas; r++) n += td_kvpool_changes(e->replica[r].pool);
    return n;
}

static void preempt(td_engine *e, td_seq *q)
{
    td_engine_drop_tables(e, q);
    for (uint32_t c = 0; c < q->d.sampling.n; c++)
        q->choice[c].computed = q->choice[c].planned = q->choice[c].ahead = 0;
    q->forked = q->d.sampling.n == 1;
    q->state = TD_LEG_WAITING;
    e->stats.preemptions++;
}

static bool has_ready(const td_seq *q)
{
    for (uint32_t c = 0; c < q->d.sampling.n; c++)
        if (q->choice[c].ready) return true;
    return false;
}

/* The youngest running leg whose pages nobody else touches: no transfer, no step in flight, no row of the
 * step being planned: what was copied for that row is part of the step, and must go to the page's owner.
 * Where rows run ahead everybody is in flight: the youngest is waited for, and until then nobody younger than
 * the one in need goes on (draining). */
static td_seq *victim(td_engine *e, td_engine_replica *r)
{
    for (uint32_t i = e->n_leg; i-- > 0;) {
        td_seq *q = e->leg[i];
        if (q->state != TD_LEG_RUNNING || q->replica != r->index || q->holds || has_ready(q)) continue;
        if (!q->flying) return q;
        if (e->ahead) {
            r->draining = true;
            return NULL;
        }
    }
    return NULL;
}

/* A page for choice c's next row, at whose cost may be. False: this leg itself has been put back, or must
 * wait. */
static bool grow(td_engine *e, td_seq *q, uint32_t c)
{
    td_choice *x = &q->choice[c];
    td_engine_replica *r = &e->replica[q->replica];
    uint64_t copies = e->copies;
    for (;;) {
        if (td_kvseq_ensure(r->pool, &x->kv, td_seq_planned(q, c)) == TD_OK &&
            td_kvseq_writable(r->pool, &x->kv, x->planned) == TD_OK) {
            x->copied = e->copies != copies;
            return true;
        }
        td_seq *v = victim(e, r);
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
        uint64_t changes = all_changes(e);
        if (e->blocked.changes == changes && e->blocked.key == q->d.key && e->blocked.slots == e->slots)
            return;
        if (td_engine_take_pages(e, q, false) < 0) {
            e->blocked.changes = all_changes(e); /* putting its own hits back is no change */
            e->blocked.key = q->d.key;
            e->blocked.slots = e->slots;
            return;
        }
        q->state = TD_LEG_RUNNING;
        td_engine_use_slots(e, q);
        if (e->on_admit && q->d.kind == TD_LEG_PREFILL) e->on_admit(e->admit_arg, q->d.key);
        shipped_hit(e, q);
    }
}

/* ---- plan ---- */

static bool choice_runs(const td_engine *e, const td_seq *q, uint32_t c)
{
    const td_choice *x = &q->choice[c];
    if (q->state != TD_LEG_RUNNING || (q->forked ? x->done : c > 0)) return false;
    if (td_seq_length(q, c) > x->planned) return true;
    return e->ahead && td_seq_planned(q, c) > x->planned && x->drawn_in == e->submitted &&
           td_seq_runs_ahead(q, c, (uint32_t)e->max_len);
}

/* Decode rows take their pages first; this may preempt legs, so candidates are listed afterwards. */
static void grow_decodes(td_engine *e)
{
    for (uint32_t i = 0; i < e->n_leg; i++)
        for (uint32_t c = 0; c < e->leg[i]->d.sampling.n; c++)
            e->leg[i]->choice[c].ready = e->leg[i]->choice[c].copied = false;
    for (uint32_t r = 0; r < e->n_replicas; r++) e->replica[r].draining = false;
    for (uint32_t i = 0; i < e->n_leg; i++) {
        td_seq *q = e->leg[i];
        for (uint32_t c = 0;
             c < q->d.sampling.n && q->state == TD_LEG_RUNNING && !e->replica[q->replica].draining; c++)
            if (choice_runs(e, q, c) && !(q->choice[c].ready = grow(e, q, c))) break;
    }
}

/* Steps that the sequences are dealt out among: one for each stage. Flights beyond that take prompt rows only, which need
 * no token of the steps before them. */
static uint32_t lanes(const td_engine *e)
{
    int stages = e->o.ranks ? e->o.ranks->grid.pp : 1;
    if (e->ahead) return 1; /* one after the other, all sequences in each */
    return (uint32_t)(stages > 1 ? TD_MIN(stages, e->depth) : e->depth);
}

static uint32_t share_of_flight(const td_engine *e, uint32_t replica)
{
    uint32_t running = 0, n = lanes(e);
    for (uint32_t i = 0; i < e->n_leg && n > 1; i++)
        if (e->leg[i]->state == TD_LEG_RUNNING && e->leg[i]->replica == replica)
            running += e->leg[i]->forked ? td_seq_slots(e->leg[i]) : 1;
    return n > 1 ? TD_MAX((running + n - 1) / n, 1) : (uint32_t)e->o.max_seqs;
}

/* Prompt rows of the replica's running legs that no step has yet. */
static uint64_t prompt_rows_left(const td_engine *e, uint32_t replica)
{
    uint64_t n = 0;
    for (uint32_t i = 0; i < e->n_leg; i++) {
        const td_seq *q = e->leg[i];
        uint32_t length = td_seq_length(q, 0), planned = q->choice[0].planned;
        if (q->state == TD_LEG_RUNNING && q->replica == replica && length > planned + 1) n += length - planned;
    }
    return n;
}

static uint32_t list_candidates(td_engine *e, uint32_t replica)
{
    uint32_t n = 0, most = TD_MIN(share_of_flight(e, replica), (uint32_t)e->o.max_seqs);
    for (uint32_t i = 0; i < e->n_leg; i++) {
        td_seq *q = e->leg[i];
        for (uint32_t c = 0; c < q->d.sampling.n && n < most && q->replica == replica; c++) {
            if (!choice_runs(e, q, c) || !q->choice[c].ready) continue;
            const td_choice *x = &q->choice[c];
            uint32_t want = td_seq_planned(q, c) - x->planned;
            bool every = (q->score || q->d.all_logits) && x->planned < q->d.n_prompt;
            e->sched[n] = (td_sched_item){.want = want, .decode = want == 1 && !every, .all_logits = every};
            e->cand[n++] = (td_engine_item){.q = q, .c = c, .pos0 = x->planned};
        }
    }
    return n;
}

static void add_draw(td_engine_flight *f, uint32_t item, uint32_t c, int32_t score_at)
{
    if (f->n_draw ==
        f->cap_draw) { /* prefill legs of many choices; at most max_seqs * TD_MAX_CHOICES and the scores */
        f->cap_draw *= 2;
        f->draw = td_xrealloc(f->draw, f->cap_draw * sizeof *f->draw);
        f->res = td_xrealloc(f->res, f->cap_draw * sizeof *f->res);
    }
    f->draw[f->n_draw++] = (td_engine_draw){item, c, score_at};
}

static void draw_token(td_engine_flight *f, uint32_t item, uint32_t c, uint32_t logit, uint32_t position)
{
    td_seq *q = f->item[item].q;
    td_choice *x = &q->choice[c];
    x->drawn_at = td_step_build_draw(f->build[q->replica], q, c, logit, position);
    x->drawn_in = f->number;
    x->ahead++;
    add_draw(f, item, c, -1);
}

/* The draws at the end of a log: one for the choice, or one for each choice of a trunk that has no tokens
 * yet. */
static void add_end_draws(td_engine_flight *f, uint32_t i, uint32_t row)
{
    td_engine_item *it = &f->item[i];
    td_seq *q = it->q;
    bool trunk = !q->forked;
    if (trunk && q->d.kind == TD_LEG_PREFILL && td_seq_resumes(q))
        return; /* the decode side goes on from the logs it has */
    uint32_t logit = td_step_build_logit(f->build[q->replica], row), position = it->pos0 + it->n_rows;
    for (uint32_t c = trunk ? 0 : it->c; c < (trunk ? q->d.sampling.n : it->c + 1); c++) {
        if (q->choice[c].done || (trunk && q->choice[c].n_out)) continue;
        draw_token(f, i, c, logit, position);
    }
}

static void scored_rows(td_engine_flight *f, uint32_t i, uint32_t row0, bool *last_has_logit)
{
    td_engine_item *it = &f->item[i];
    td_step_build *build = f->build[it->q->replica];
    if (it->q->d.all_logits) td_step_build_want_logits(build);
    for (uint32_t k = 0; k < it->n_rows; k++) {
        uint32_t pos = it->pos0 + k;
        bool last = it->ends && k + 1 == it->n_rows;
        if (pos >= it->q->d.n_prompt || (last && !it->q->d.all_logits))
            break; /* the end's draw makes its own */
        uint32_t logit = td_step_build_logit(build, row0 + k);
        if (it->q->score && pos + 1 < it->q->d.n_prompt) {
            td_step_build_score(build, it->q, logit, pos + 1);
            add_draw(f, i, 0, (int32_t)pos + 1);
        }
        if (last) { /* all_logits: one row of logits serves both */
            *last_has_logit = true;
            draw_token(f, i, it->c, logit, pos + 1);
        }
    }
}

static void plan_item(td_engine *e, td_engine_flight *f, const td_sched_item *s, const td_engine_item *cand)
{
    bool done = false;
    uint32_t n = f->n_item++;
    td_engine_item *it = &f->item[n];
    td_choice *x = &cand->q->choice[cand->c];
    (void)e;
    *it = *cand;
    it->n_rows = s->rows;
    it->ends = it->pos0 + it->n_rows == td_seq_planned(it->q, it->c);
    if (!it->q->first_row_us) it->q->first_row_us = td_now_us();
    uint32_t row0 = it->row0 = td_step_build_rows(f->build[it->q->replica], it->q, it->c, &x->kv, it->pos0, it->n_rows);
    if (s->all_logits) scored_rows(f, n, row0, &done);
    if (it->ends && !done) add_end_draws(f, n, row0 + it->n_rows - 1);
    x->planned = it->pos0 + it->n_rows;
    it->q->flying++;
    x->flying++;
}

static void plan_replica(td_engine *e, td_engine_flight *f, uint32_t replica)
{
    uint32_t n = list_candidates(e, replica);
    td_sched_plan(e->sched, n,
                  (td_sched_caps){(uint32_t)e->o.max_batched_tokens, (uint32_t)e->o.max_prefill_chunk,
                                  (uint32_t)e->max_logits,
                                  td_sched_pipe_rows(prompt_rows_left(e, replica), (int)lanes(e), (uint32_t)e->o.ops->full_rows)});
    for (uint32_t i = 0; i < n; i++)
        if (e->sched[i].rows) plan_item(e, f, &e->sched[i], &e->cand[i]);
}

/* The next flight of the ring; NULL: there are no rows. A replica without rows has a step without rows. */
static td_engine_flight *plan(td_engine *e)
{
    td_engine_flight *f = td_engine_flight_at(e, e->n_flights);
    f->n_draw = f->n_item = 0;
    f->number = e->step + 1;
    for (uint32_t r = 0; r < e->n_replicas; r++)
        td_step_build_begin(f->build[r], f->number); /* before pages are taken: copies go into it */
    admit(e);
    grow_decodes(e);
    for (uint32_t r = 0; r < e->n_replicas; r++) plan_replica(e, f, r);
    if (!f->n_item) return NULL;
    for (uint32_t r = 0; r < e->n_replicas; r++) f->step[r] = td_step_build_finish(f->build[r]);
    return f;
}

/* ---- submit ---- */

/* The flight of a step: the one being submitted, or one that another rank is done with. */
static const td_engine_flight *flight_of(td_engine *e, const td_step *step)
{
    for (int i = e->n_flights; i >= 0; i--)
        if (td_engine_flight_at(e, i)->step[0] && td_engine_flight_at(e, i)->step[0]->number == step->number)
            return td_engine_flight_at(e, i);
    return NULL;
}

void td_engine_layer_written(td_engine *e, const td_step *step, int layer)
{
    const td_engine_flight *f = flight_of(e, step);
    for (uint32_t i = 0; f && i < f->n_item; i++) {
        const td_engine_item *it = &f->item[i];
        uint32_t from = TD_MAX(it->pos0, TD_MAX(it->q->d.hit_tokens, it->q->kv_told)),
                 to = it->pos0 + it->n_rows;
        if (it->q->d.kind == TD_LEG_PREFILL && it->q->replica == 0 && from < to) /* of this rank */
            e->on_kv(e->kv_arg, it->q->d.key, layer, layer + 1, from, to);
    }
}

static void off_flight(const td_engine_item *it)
{
    it->q->flying--;
    it->q->choice[it->c].flying--;
}

/* Nothing of the step was computed: its rows are wanted again. */
static void unplan(td_engine *e, td_engine_flight *f)
{
    for (uint32_t i = 0; i < f->n_draw; i++)
        if (f->draw[i].score_at < 0) f->item[f->draw[i].item].q->choice[f->draw[i].c].ahead--;
    for (uint32_t i = 0; i < f->n_item; i++) {
        f->item[i].q->choice[f->item[i].c].planned = f->item[i].pos0;
        off_flight(&f->item[i]);
    }
    for (uint32_t i = 0; i < f->n_item; i++)
        if (i + 1 == f->n_item || f->item[i + 1].q != f->item[i].q) td_engine_landed(e, f->item[i].q);
}

/* No rank has heard of the step: every leg that has rows in it ends, for it would be made again; so does one
 * whose page the step should have copied. The others go on. */
static void refused(td_engine *e, td_engine_flight *f, td_status s)
{
    char why[200];
    snprintf(why, sizeof why, "%s", td_reason());
    for (uint32_t i = 0; i < f->n_item; i++) f->item[i].q->choice[f->item[i].c].copied = true;
    unplan(e, f);
    for (uint32_t i = e->n_leg; i-- > 0;) {
        td_seq *q = e->leg[i];
        bool lost = false;
        for (uint32_t c = 0; c < q->d.sampling.n; c++) lost |= q->choice[c].copied;
        if (lost) td_engine_leg_end(e, q, TD_FINISH_ERROR, s, why);
    }
}

static td_status submit(td_engine *e, td_engine_flight *f)
{
    for (uint32_t r = 0; r < e->n_replicas && e->on_step; r++)
        if (f->step[r]->n_rows) e->on_step(e->step_arg, f->step[r]);
    f->submitted_us = td_now_us();
    e->computing = true;
    td_status s = td_exec_submit(e->exec, f->step);
    e->computing = false;
    if (s < 0) {
        unplan(e, f);
        return s;
    }
    e->n_flights++;
    e->submitted = f->number;
    return TD_OK;
}

/* ---- collect ---- */

void td_engine_publish(td_engine *e, td_seq *q, uint32_t c)
{
    td_choice *x = &q->choice[c];
    td_kvpool *pool = td_engine_pool(e, q);
    uint32_t unit = (uint32_t)td_kvpool_unit(pool);
    for (uint32_t at; (at = td_kvseq_unpublished(pool, &x->kv, x->computed)) != UINT32_MAX;) {
        for (uint32_t i = 0; i < unit; i++) e->ids[i] = td_seq_token(q, c, at + i);
        td_kvseq_publish_unit(pool, &x->kv, e->ids);
    }
}

void td_engine_fork(td_engine *e, td_seq *q)
{
    if (q->forked || q->d.kind == TD_LEG_PREFILL || q->choice[0].computed < q->d.n_prompt) return;
    for (uint32_t c = 1; c < q->d.sampling.n; c++) {
        if (q->choice[c].done) continue;
        td_status s = td_kvseq_fork(td_engine_pool(e, q), &q->choice[0].kv, &q->choice[c].kv, q->d.n_prompt);
        TD_CHECK(s == TD_OK); /* the pool has as many sequences as slots were counted */
        q->choice[c].computed = q->choice[c].planned = q->d.n_prompt;
    }
    q->forked = true;
    if (q->choice[0].done && !q->holds && !q->flying) td_kvseq_release(td_engine_pool(e, q), &q->choice[0].kv);
}

static void take_draw(td_engine *e, const td_engine_flight *f, const td_engine_draw *d,
                      const td_sample_out *r)
{
    td_seq *q = f->item[d->item].q;
    if (d->score_at < 0) q->choice[d->c].ahead--;
    if (q->state == TD_LEG_ENDED) return;
    if (d->score_at >= 0) {
        q->score[d->score_at - 1] = *r;
        return;
    }
    if (q->choice[d->c].done)
        return; /* cancelled, or ended by the token before, while the step was in flight */
    if (r->token < 0) {               /* every token masked or not a number */
        td_engine_leg_end(e, q, TD_FINISH_ERROR, TD_EPROTO,
                          "no token can be drawn: all logits are masked or not numbers");
        return;
    }
    td_engine_tell_prompt(e, q);
    td_finish fin = td_seq_append(q, d->c, (uint32_t)r->token, (uint32_t)e->max_len);
    td_engine_tell_tokens(e, q, d->c, r, fin);
    if (fin != TD_FINISH_NONE) td_engine_choice_done(e, q, d->c);
}

/* After its draws: pages that no row will see again, and whether the leg is over. */
static void settle(td_engine *e, const td_engine_item *it)
{
    td_seq *q = it->q;
    if (q->state == TD_LEG_ENDED) return;
    if (td_seq_all_done(q))
        td_engine_leg_end(e, q, TD_FINISH_STOP, TD_OK, NULL);
    else if (q->d.kind == TD_LEG_PREFILL && it->ends) {
        td_engine_tell_prompt(e, q);
        td_engine_leg_end(e, q, TD_FINISH_NONE, TD_OK, NULL);
    }
}

static void note_speed(td_engine *e, const td_engine_flight *f, int64_t us)
{
    uint64_t decode = 0, rows = 0;
    for (uint32_t r = 0; r < e->n_replicas; r++) rows += f->step[r]->n_rows;
    for (uint32_t i = 0; i < f->n_item; i++) decode += f->item[i].n_rows == 1 && f->item[i].ends;
    td_engine_stats *s = &e->stats;
    double *rate = decode * 2 > rows ? &s->decode_tok_s : &s->prefill_tok_s,
           now = (double)rows * 1e6 / (double)TD_MAX(us, 1);
    *rate = *rate > 0 ? 0.9 * *rate + 0.1 * now : now;
    s->step_us_ewma = s->step_us_ewma ? (9 * s->step_us_ewma + us) / 10 : us;
    s->steps++;
    s->rows += rows;
    s->decode_rows += decode;
    s->prompt_rows += rows - decode;
}

static void tell_logits(td_engine *e, const td_engine_flight *f)
{
    for (uint32_t i = 0; i < f->n_item; i++) {
        const td_engine_item *it = &f->item[i];
        const td_step *step = f->step[it->q->replica];
        const float *logits = f->logits[it->q->replica];
        const int32_t *row = td_step_logit_rows(step);
        if (it->q->state == TD_LEG_ENDED || !it->q->d.all_logits || !logits) continue;
        for (uint32_t k = 0; k < step->n_logits; k++)
            if ((uint32_t)row[k] >= it->row0 && (uint32_t)row[k] < it->row0 + it->n_rows)
                e->on_logits(e->logits_arg, it->q->d.key, it->pos0 + (uint32_t)row[k] - it->row0,
                             logits + (size_t)k * (size_t)e->desc->V);
    }
}

static void land_rows(td_engine *e, const td_engine_item *it)
{
    td_seq *q = it->q;
    td_choice *x = &q->choice[it->c];
    if (q->state == TD_LEG_ENDED || (q->forked && x->done)) {
        e->stats.discarded_rows += it->n_rows;
        return;
    }
    x->computed = it->pos0 + it->n_rows;
    q->kv_told = TD_MAX(q->kv_told, x->computed);
    td_engine_publish(e, q, it->c);
    td_engine_fork(e, q);
}

static td_status collect(td_engine *e)
{
    td_engine_flight *f = td_engine_flight_at(e, 0);
    td_status st = td_exec_collect(e->exec, f->res, f->logits);
    int64_t now = td_now_us();
    e->first = (e->first + 1) % (e->depth + 1);
    e->n_flights--;
    if (st < 0) {
        unplan(e, f);
        return st;
    }
    if (e->on_logits) tell_logits(e, f);
    for (uint32_t i = 0; i < f->n_item; i++) land_rows(e, &f->item[i]);
    for (uint32_t i = 0; i < f->n_draw; i++) take_draw(e, f, &f->draw[i], &f->res[i]);
    for (uint32_t i = 0; i < f->n_item; i++) {
        td_engine_item *it = &f->item[i];
        td_seq *q = it->q;
        td_choice *x = &q->choice[it->c];
        off_flight(it); /* a leg is freed by its last item at the earliest */
        if (x->kv.is_open && !q->holds && !x->done && q->state != TD_LEG_ENDED)
            td_kvseq_trim(td_engine_pool(e, q), &x->kv, x->computed);
        if (i + 1 < f->n_item && f->item[i + 1].q == q) continue;
        q->flying++; /* it stays while it is settled */
        settle(e, it);
        q->flying--;
        td_engine_landed(e, q);
    }
    /* A step that waited in the queue behind another takes from that one's end. */
    note_speed(e, f, now - (e->ahead ? TD_MAX(f->submitted_us, e->collected_us) : f->submitted_us));
    e->collected_us = now;
    return TD_OK;
}

td_status td_engine_step(td_engine *e, uint64_t *collected)
{
    while (e->n_flights < e->depth) {
        td_engine_flight *f = plan(e);
        if (!f) break;
        e->step++;
        td_status s = td_exec_check(e->exec, f->step);
        if (s < 0) {
            refused(e, f, s);
            return TD_OK;
        }
        TD_TRY(submit(e, f));
    }
    if (!e->n_flights) return TD_AGAIN;
    uint64_t number = td_engine_flight_at(e, 0)->step[0]->number;
    TD_TRY(collect(e));
    *collected = number;
    return TD_OK;
}
