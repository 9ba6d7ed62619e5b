/* tests/worker/support_engine.h - legs with their expected results: run some on an engine, gather what it
 * tells, compare by bytes.
 *
 *   te_spec s[N]; te_result want[N], got[N];
 *   te_run(e, s, want, N); ... te_same(&want[i], &got[i], "why"); te_result_free(...)
 *
 * Every step that any test runs is checked against the rules of step.h (te_watch). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SUPPORT_ENGINE_H
#define TD_TESTS_SUPPORT_ENGINE_H

#include "common/check.h"
#include "common/clock.h"
#include "tests/t.h"
#include "worker/engine.h"

enum { TE_MAX_N = 6, TE_MAX_OUT = 96, TE_MAX_PROMPT = 512 };

typedef struct te_spec {
    td_leg leg; /* pointers are set by te_leg */
    uint32_t prompt[TE_MAX_PROMPT], stop[3], resume[TE_MAX_N][TE_MAX_OUT], n_resume[TE_MAX_N];
    const uint32_t *resume_at[TE_MAX_N];
    td_bias bias[3];
} te_spec;

typedef struct te_result {
    uint32_t n[TE_MAX_N], token[TE_MAX_N][TE_MAX_OUT],
        from[TE_MAX_N]; /* from: first index this run told itself */
    float logprob[TE_MAX_N][TE_MAX_OUT];
    td_top top[TE_MAX_N][TE_MAX_OUT][3];
    td_finish finish[TE_MAX_N];
    uint32_t n_scores, cached;
    td_sample_out *scores;
    bool prompt_told, ended;
    td_engine_end end;
} te_result;

/* Not of the engine's own random numbers. */
static uint64_t te_rnd = 1;
static inline uint32_t te_draw(uint32_t n)
{
    te_rnd = te_rnd * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(td_mix64(te_rnd) % n);
}

static inline te_spec te_make(uint64_t key, uint32_t n_prompt, uint32_t max_tokens, uint32_t V)
{
    te_spec s = {.leg = {.key = key,
                         .n_prompt = n_prompt,
                         .sampling = {.top_p = 1,
                                      .repetition_penalty = 1,
                                      .max_tokens = max_tokens,
                                      .n = 1,
                                      .logprobs = 2,
                                      .prompt_logprobs = -1}}};
    for (uint32_t i = 0; i < n_prompt; i++) s.prompt[i] = te_draw(V);
    return s;
}

/* Sampling parameters of every kind. */
static inline void te_vary(te_spec *s, uint32_t V)
{
    td_sampling *p = &s->leg.sampling;
    p->seed = te_draw(1000000);
    if (te_draw(4)) p->temperature = 0.3f + (float)te_draw(10) / 10;
    if (te_draw(3) == 0) p->top_k = 1 + (int)te_draw(20);
    if (te_draw(3) == 0) p->top_p = 0.5f + (float)te_draw(5) / 10;
    if (te_draw(4) == 0) p->min_p = 0.05f;
    if (te_draw(4) == 0) p->repetition_penalty = 1.3f;
    if (te_draw(4) == 0) p->presence_penalty = 0.5f, p->frequency_penalty = 0.25f;
    if (te_draw(3) == 0)
        p->n_stop_ids = 2, s->stop[0] = te_draw(V), s->stop[1] = te_draw(V), p->min_tokens = te_draw(6);
    if (te_draw(4) == 0)
        p->n_bias = 2, s->bias[0] = (td_bias){te_draw(V), 2.5f},
        s->bias[1] = (td_bias){te_draw(V), -INFINITY};
    if (te_draw(3) == 0) p->n = 2 + te_draw(TE_MAX_N - 1);
    if (te_draw(5) == 0) p->prompt_logprobs = (int)te_draw(3);
    if (te_draw(6) == 0) p->logprobs = -1;
}

static inline const td_leg *te_leg(te_spec *s)
{
    td_leg *l = &s->leg;
    bool resumes = false;
    for (int c = 0; c < TE_MAX_N; c++) {
        s->resume_at[c] = s->resume[c];
        resumes |= s->n_resume[c] > 0;
    }
    l->prompt = s->prompt;
    l->sampling.stop_ids = s->stop;
    l->sampling.bias = s->bias;
    l->resume = resumes ? s->resume_at : NULL;
    l->n_resume = resumes ? s->n_resume : NULL;
    return l;
}

static inline void te_result_free(te_result *r)
{
    free(r->scores);
    *r = (te_result){0};
}

static inline td_sample_out *te_copy(const td_sample_out *s, uint32_t n)
{
    if (!n) return NULL;
    td_sample_out *c = malloc(n * sizeof *c);
    memcpy(c, s, n * sizeof *c);
    return c;
}

/* ---- gathering ---- */

static inline void te_expect(te_spec *s, te_result *r)
{
    te_result_free(r);
    for (uint32_t c = 0; c < s->leg.sampling.n; c++) {
        r->n[c] = r->from[c] = s->n_resume[c];
        memcpy(r->token[c], s->resume[c], sizeof r->token[c]);
    }
}

static inline void te_take_tokens(te_result *r, const td_engine_tokens *t)
{
    uint32_t c = t->choice;
    T_OK(!r->ended && c < TE_MAX_N && r->finish[c] == TD_FINISH_NONE, "tokens after the end");
    if (c >= TE_MAX_N) return;
    T_OK(t->base_index == r->n[c], "key %llu choice %u: base index %u, expected %u",
         (unsigned long long)t->key, c, t->base_index, r->n[c]);
    for (uint32_t i = 0; i < t->n && r->n[c] < TE_MAX_OUT; i++) {
        r->token[c][r->n[c]] = t->token[i];
        if (t->logprob) {
            r->logprob[c][r->n[c]] = t->logprob[i];
            for (uint32_t k = 0; k < t->n_top && k < 3; k++) r->top[c][r->n[c]][k] = t->top[i * t->n_top + k];
        }
        r->n[c]++;
    }
    r->finish[c] = t->finish;
    if (t->finish == TD_FINISH_STOP && r->n[c]) T_EQ(t->stop_token, r->token[c][r->n[c] - 1]);
}

static inline te_result *te_find(te_spec *s, te_result *r, uint32_t n, uint64_t key)
{
    for (uint32_t i = 0; i < n; i++)
        if (s[i].leg.key == key) return &r[i];
    T_OK(0, "news of an unknown leg %llu", (unsigned long long)key);
    return NULL;
}

static inline void te_take(te_spec *s, te_result *res, uint32_t n, const td_engine_out *o)
{
    for (uint32_t i = 0; i < o->n_prompt; i++) {
        te_result *r = te_find(s, res, n, o->prompt[i].key);
        if (!r) continue;
        T_OK(!r->prompt_told, "prompt told twice");
        r->prompt_told = true;
        r->cached = o->prompt[i].cached_tokens;
        r->n_scores = o->prompt[i].n_scores;
        r->scores = te_copy(o->prompt[i].scores, r->n_scores);
    }
    for (uint32_t i = 0; i < o->n_tokens; i++) {
        te_result *r = te_find(s, res, n, o->tokens[i].key);
        if (r) te_take_tokens(r, &o->tokens[i]);
    }
    for (uint32_t i = 0; i < o->n_end; i++) {
        te_result *r = te_find(s, res, n, o->end[i].key);
        if (!r) continue;
        T_OK(!r->ended, "ended twice");
        r->ended = true;
        r->end = o->end[i];
        r->end.reason = NULL;
    }
}

/* ---- every step is looked at ---- */

typedef struct te_watch {
    const td_engine_opts *o;
    td_engine *e;
    uint64_t steps;
    uint32_t most_rows;
} te_watch;

static inline void te_on_step(void *arg, const td_step *s)
{
    te_watch *w = arg;
    const td_step_seq *q = td_step_seqs(s);
    const td_step_sample *d = td_step_samples(s);
    const int32_t *want = td_step_logit_rows(s);
    uint32_t row = 0, P = (uint32_t)w->o->page_size;
    w->steps++;
    w->most_rows = TD_MAX(w->most_rows, s->n_rows);
    T_OK(s->n_rows >= 1 && s->n_rows <= (uint32_t)w->o->max_batched_tokens &&
             s->n_seqs <= (uint32_t)w->o->max_seqs,
         "%u rows, %u sequences", s->n_rows, s->n_seqs);
    for (uint32_t i = 0; i < s->n_seqs; row += q[i++].n_rows) {
        T_OK(q[i].row0 == row && q[i].n_rows >= 1);
        T_OK(!w->o->max_prefill_chunk || q[i].n_rows <= (uint32_t)w->o->max_prefill_chunk);
        for (uint32_t k = 0; k < q[i].n_rows; k++) T_OK(td_step_pos(s)[row + k] == (int32_t)(q[i].pos0 + k));
        for (uint32_t g = 0; g < s->n_groups; g++) {
            T_OK(q[i].n_pages[g] == (q[i].pos0 + q[i].n_rows + P - 1) / P && q[i].pages[g] % 8 == 0);
            for (uint32_t j = q[i].pos0 / P; j < q[i].n_pages[g]; j++) { /* a written page is nobody else's */
                int32_t page = td_step_pages(s, &q[i], (int)g)[j];
                T_OK(page >= 0 && page < td_engine_kv(w->e, (int)g)->n_pages);
                for (uint32_t o = 0; o < s->n_seqs; o++)
                    for (uint32_t m = 0; o != i && m < q[o].n_pages[g]; m++)
                        if (td_step_pages(s, &q[o], (int)g)[m] == page)
                            T_OK(0, "step %llu writes a page that another sequence reads",
                                 (unsigned long long)s->number);
            }
        }
    }
    T_EQ(row, s->n_rows);
    for (uint32_t i = 0; i < s->n_logits; i++)
        T_OK(want[i] >= 0 && want[i] < (int32_t)s->n_rows && (!i || want[i] > want[i - 1]));
    for (uint32_t i = 0; i < s->n_samples; i++) {
        T_OK(d[i].logit < s->n_logits && d[i].pen + d[i].n_pen * sizeof(td_penalty) <= s->bytes);
        if (d[i].logit >= s->n_logits) continue;
        T_EQ(d[i].position, td_step_pos(s)[want[d[i].logit]] + 1); /* absolute, of the token that is made */
        if (d[i].score < 0) T_EQ(d[i].stream, d[i].choice << 8);
    }
}

/* ---- running ---- */

/* What is still in flight when all legs have ended: rows that are thrown away. */
static inline void te_drain(td_engine *e)
{
    td_engine_out o;
    for (int i = 0; i < 10; i++) {
        td_status s = td_engine_turn(e, &o);
        T_OK(s == TD_AGAIN || (s == TD_OK && !o.n_tokens), "news after the end: %s", s < 0 ? td_reason() : "");
        if (s != TD_OK) return;
    }
    T_OK(0, "steps without an end");
}

static inline bool te_ledger(td_engine *e, bool idle)
{
    td_engine_stats st;
    td_engine_stats_get(e, &st);
    for (int g = 0; g < td_engine_descr(e)->n_groups; g++) {
        td_engine_ledger_row l = st.ledger[g];
        if (l.free + l.private_ + l.shared + l.cached + l.in_transit != l.total) return false;
        if (idle && (l.free + l.cached != l.total || l.pinned)) return false;
    }
    return !idle || (!st.legs_waiting && !st.legs_running && !st.seqs_running);
}

/* Turn until every leg of s has ended. */
static inline void te_finish(td_engine *e, te_spec *s, te_result *r, uint32_t n)
{
    for (int turns = 0; turns < 200000; turns++) {
        uint32_t open = 0;
        for (uint32_t i = 0; i < n; i++) open += !r[i].ended;
        if (!open) return;
        td_engine_out o;
        td_status st = td_engine_turn(e, &o);
        T_OK(st == TD_OK, "turn: %s", st == TD_AGAIN ? "stands still" : td_reason());
        T_OK(te_ledger(e, false), "the ledger is out of balance");
        te_take(s, r, n, &o);
        if (st != TD_OK) return;
    }
    T_OK(0, "too many turns");
}

/* Start the legs in a random order, `together` before the first turn and the rest one by one between turns.
 */
static inline void te_run_some(td_engine *e, te_spec *s, te_result *r, uint32_t n, uint32_t together)
{
    uint32_t order[256];
    for (uint32_t i = 0; i < n; i++) {
        uint32_t k = te_draw(i + 1);
        order[i] = order[k];
        order[k] = i;
        te_expect(&s[i], &r[i]);
    }
    for (uint32_t i = 0; i < n; i++) {
        td_status st = td_engine_start(e, te_leg(&s[order[i]]));
        T_OK(st == TD_OK, "start: %s", td_reason());
        if (i + 1 < together) continue;
        td_engine_out o;
        if (td_engine_turn(e, &o) == TD_OK) te_take(s, r, n, &o);
    }
    te_finish(e, s, r, n);
}

static inline void te_run(td_engine *e, te_spec *s, te_result *r, uint32_t n)
{
    te_run_some(e, s, r, n, n);
}

static inline bool te_same_sample(const td_sample_out *a, const td_sample_out *b)
{
    return a->token == b->token && !memcmp(&a->logprob, &b->logprob, 4) && a->n_top == b->n_top &&
           !memcmp(a->top, b->top, (size_t)TD_MAX(a->n_top, 0) * sizeof *a->top);
}

/* Choice c of both, from the first index that both told. */
static inline bool te_same_choice(const te_result *a, uint32_t ca, const te_result *b, uint32_t cb)
{
    uint32_t from = TD_MAX(a->from[ca], b->from[cb]), n = a->n[ca];
    if (n != b->n[cb] || a->finish[ca] != b->finish[cb] ||
        memcmp(a->token[ca], b->token[cb], n * sizeof(uint32_t)))
        return false;
    return from >= n || (!memcmp(&a->logprob[ca][from], &b->logprob[cb][from], (n - from) * sizeof(float)) &&
                         !memcmp(a->top[ca][from], b->top[cb][from], (n - from) * sizeof a->top[0][0]));
}

static inline bool te_same(const te_spec *s, const te_result *a, const te_result *b, const char *why)
{
    bool same = a->n_scores == b->n_scores;
    for (uint32_t i = 0; same && i < a->n_scores; i++) same = te_same_sample(&a->scores[i], &b->scores[i]);
    T_OK(same, "%s: prompt scores of leg %llu differ", why, (unsigned long long)s->leg.key);
    for (uint32_t c = 0; c < s->leg.sampling.n; c++) {
        bool ok = te_same_choice(a, c, b, c);
        T_OK(ok, "%s: leg %llu choice %u of %u: %u tokens, expected %u", why, (unsigned long long)s->leg.key,
             c, s->leg.sampling.n, b->n[c], a->n[c]);
        same &= ok;
    }
    return same;
}

#endif
