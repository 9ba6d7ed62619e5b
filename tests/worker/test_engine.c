// SPDX-License-Identifier: Apache-2.0
/* tests/worker/test_engine.c - the engine over a model of hashes (support_fake.h): the same tokens, logprobs
 * and prompt scores, byte for byte, however they were computed; every page back in the end, whatever
 * happened. */
#include "common/log.h"
#include "tests/worker/support_fake.h"
#include "tests/worker/support_handoff.h"

enum { N = 32, V = FAKE_V };

static td_model *model;
static td_pool *threads;
static const td_ops *ops;
static te_spec spec[N];
static te_result want[N];
static te_watch watch;
static td_engine_opts current;
static int depth = 1; /* steps in flight */

static td_engine *open_with(td_engine_opts o)
{
    td_engine *e = NULL;
    o.model = model, o.ops = ops, o.pool = threads;
    o.hash_key = (td_hkey){3, 4};
    o.depth = depth;
    if (!o.page_size) o.page_size = 16;
    if (!o.max_batched_tokens) o.max_batched_tokens = 512;
    if (!o.max_seqs) o.max_seqs = 48;
    if (!o.max_legs) o.max_legs = 64;
    if (!o.kv_pages) o.kv_pages = 40000 / o.page_size;
    if (!o.max_model_len) o.max_model_len = 400;
    current = o;
    td_status s = td_engine_open(&o, &e);
    T_OK(s == TD_OK, "%s", td_reason());
    if (s < 0) exit(1);
    watch = (te_watch){&current, e, 0, 0};
    td_engine_on_step(e, te_on_step, &watch);
    return e;
}

static void close_idle(td_engine *e)
{
    te_drain(e);
    T_OK(te_ledger(e, true), "pages or legs are left");
    td_engine_close(e);
}

static void compare_all(te_result *got, const char *why)
{
    for (int i = 0; i < N; i++) te_same(&spec[i], &want[i], &got[i], why);
}

/* What each leg makes alone, its prompt in one piece, without a cache. */
static void make_expected(void)
{
    for (int i = 0; i < N; i++) {
        uint32_t n = i < 4 ? 1 + (uint32_t)i * 15 : 1 + te_draw(180);
        spec[i] = te_make((uint64_t)i + 1, n, 1 + te_draw(40), V);
        if (i % 3 == 1)
            memcpy(spec[i].prompt, spec[i - 1].prompt,
                   TD_MIN(n, spec[i - 1].leg.n_prompt) * 2 / 3 * sizeof(uint32_t));
        te_vary(&spec[i], V);
        td_engine *e = open_with((td_engine_opts){0});
        te_run(e, &spec[i], &want[i], 1);
        close_idle(e);
        T_OK(want[i].prompt_told && want[i].cached == 0);
        for (uint32_t c = 0; c < spec[i].leg.sampling.n; c++)
            T_OK(want[i].finish[c] == TD_FINISH_STOP || want[i].finish[c] == TD_FINISH_LENGTH);
    }
    T_EQ(model->bad_reads, 0);
}

static void vary(td_engine_opts o, uint32_t together, bool twice, const char *why)
{
    te_result *got = td_xalloc(N * sizeof *got);
    td_engine *e = open_with(o);
    for (int round = 0; round < 1 + twice; round++) {
        te_run_some(e, spec, got, N, together);
        compare_all(got, why);
    }
    td_engine_stats st;
    td_engine_stats_get(e, &st);
    if (twice) T_OK(st.hit_tokens > 100, "%s: %llu tokens hit", why, (unsigned long long)st.hit_tokens);
    if (o.kv_pages) T_OK(st.preemptions > 0, "%s: %llu preemptions", why, (unsigned long long)st.preemptions);
    T_EQ(st.discarded_rows > 0, depth > 1); /* stop ids, met in flight */
    if (getenv("VERBOSE"))
        printf("%-28s steps %llu, rows %llu, discarded %llu, preemptions %llu, hits %llu of %llu, evictions "
               "%llu\n",
               why, (unsigned long long)st.steps, (unsigned long long)st.rows,
               (unsigned long long)st.discarded_rows, (unsigned long long)st.preemptions,
               (unsigned long long)st.hit_tokens, (unsigned long long)st.query_tokens,
               (unsigned long long)st.evictions);
    T_OK(model->bad_reads == 0, "%s: %llu bad reads", why, (unsigned long long)model->bad_reads);
    model->bad_reads = 0;
    close_idle(e);
    for (int i = 0; i < N; i++) te_result_free(&got[i]);
    free(got);
}

static void test_ways(void)
{
    static const int chunks[] = {1, 7, 16, 64}, pages[] = {1, 8, 16, 64};
    char why[64];
    vary((td_engine_opts){0}, N, false, "batch of 32");
    vary((td_engine_opts){0}, 1, false, "arriving one by one");
    vary((td_engine_opts){.max_seqs = 6}, N, false, "six at a time");
    vary((td_engine_opts){.max_batched_tokens = 40}, N, false, "40 rows a step");
    for (int i = 0; i < 4; i++) {
        snprintf(why, sizeof why, "chunks of %d", chunks[i]);
        vary((td_engine_opts){.max_prefill_chunk = chunks[i]}, N, false, why);
        snprintf(why, sizeof why, "pages of %d", pages[i]);
        vary((td_engine_opts){.page_size = pages[i]}, N, false, why);
        snprintf(why, sizeof why, "pages of %d, cached", pages[i]);
        vary(
            (td_engine_opts){.page_size = pages[i], .prefix_cache = true, .max_prefill_chunk = chunks[3 - i]},
            1 + (uint32_t)i * 8, true, why);
    }
    /* Just enough for the longest: everything is preempted over and over. */
    vary((td_engine_opts){.page_size = 8, .kv_pages = 60, .prefix_cache = false}, N, false, "few pages");
    vary((td_engine_opts){.page_size = 8, .kv_pages = 60, .prefix_cache = true}, N, true,
         "few pages, cached");
    vary((td_engine_opts){.page_size = 16, .kv_pages = 36, .prefix_cache = true, .max_prefill_chunk = 7}, 3,
         true, "few pages of 16, chunks of 7");
    vary((td_engine_opts){.page_size = 1, .kv_pages = 420, .prefix_cache = true}, N, true, "few pages of 1");
}

/* Prompt logprobs are not read from a cache, and a short budget of logit rows cuts their chunks. */
static void test_few_logits(void)
{
    vary((td_engine_opts){.max_logits = 49, .prefix_cache = true}, N, false, "49 logit rows");
}

/* A leg that goes on from any point of its own output ends in the same tokens. */
static void test_resume(void)
{
    te_result got = {0};
    for (int i = 0; i < N; i++) {
        td_engine *e = open_with((td_engine_opts){
            .prefix_cache = i % 2 == 0, .page_size = i % 3 ? 16 : 8, .max_prefill_chunk = i % 4 ? 0 : 5});
        for (uint32_t at = 1; at <= TD_MIN(want[i].n[0], 12u); at++) {
            te_spec s = spec[i];
            for (uint32_t c = 0; c < s.leg.sampling.n; c++) {
                s.n_resume[c] =
                    TD_MIN(want[i].n[c],
                           (at * (c + 1)) % 13); /* choices at different points, some at none, some ended */
                memcpy(s.resume[c], want[i].token[c], s.n_resume[c] * sizeof(uint32_t));
            }
            te_run(e, &s, &got, 1);
            if (!got.prompt_told)
                got.n_scores = want[i].n_scores,
                got.scores = te_copy(want[i].scores, want[i].n_scores); /* all had ended */
            te_same(&s, &want[i], &got, "resumed");
        }
        T_OK(model->bad_reads == 0, "bad reads");
        model->bad_reads = 0;
        close_idle(e);
    }
    te_result_free(&got);
}

/* n choices are n separate runs: choice 0 is the run with n = 1; greedy choices are equal. */
static void test_choices(void)
{
    te_result got = {0}, one = {0};
    td_engine *e = open_with((td_engine_opts){0});
    for (int i = 0; i < N; i++) {
        te_spec s = spec[i];
        s.leg.sampling.n = 4;
        te_run(e, &s, &got, 1);
        s.leg.sampling.n = 1;
        te_run(e, &s, &one, 1);
        T_OK(te_same_choice(&one, 0, &got, 0), "leg %d: the first of four is not the only one", i);
        for (uint32_t c = 1; c < 4 && s.leg.sampling.temperature < 1e-5f; c++)
            T_OK(te_same_choice(&one, 0, &got, c), "leg %d: greedy choice %u", i, c);
    }
    close_idle(e);
    te_result_free(&got);
    te_result_free(&one);
}

/* ---- two engines ---- */

static void test_hand_off(bool cache, int page_a, int page_b, int chunk, bool lost)
{
    char why[96];
    snprintf(why, sizeof why, "hand-off, pages of %d and %d, chunk %d, cache %d, lost %d", page_a, page_b,
             chunk, cache, lost);
    te_result got = {0};
    td_engine *a =
        open_with((td_engine_opts){.page_size = page_a, .prefix_cache = cache, .max_prefill_chunk = chunk});
    td_engine_on_step(a, NULL, NULL);
    td_engine *b = open_with((td_engine_opts){.page_size = page_b, .prefix_cache = cache});
    for (int round = 0; round < 2; round++)
        for (int i = 0; i < N; i++) {
            te_spec s = spec[i];
            te_hand_off(a, b, &s, &got, lost && i % 2, why);
            te_same(&spec[i], &want[i], &got, why);
            for (uint32_t c = 0; c < s.leg.sampling.n; c++) { /* and once more, from the middle */
                s.n_resume[c] = round && (s.leg.sampling.n == 1 || (c + (uint32_t)i) % 3)
                                    ? TD_MIN(want[i].n[c] - 1, 3 + 2 * c)
                                    : 0;
                memcpy(s.resume[c], want[i].token[c], s.n_resume[c] * sizeof(uint32_t));
            }
            if (!round) continue;
            s.leg.sampling.prompt_logprobs = -1;
            te_hand_off(a, b, &s, &got, lost && i % 2, why);
            for (uint32_t c = 0; c < s.leg.sampling.n; c++)
                T_OK(te_same_choice(&want[i], c, &got, c), "%s: resumed leg %d choice %u", why, i, c);
        }
    T_OK(model->bad_reads == 0, "%s: %llu bad reads", why, (unsigned long long)model->bad_reads);
    model->bad_reads = 0;
    td_engine_stats st;
    td_engine_stats_get(b, &st);
    /* What fell out of a window before it was shipped is not published. */
    if (cache)
        T_OK(st.hit_tokens > (model->desc.n_groups > 1 ? 0 : 100), "%llu tokens hit",
             (unsigned long long)st.hit_tokens);
    close_idle(a);
    close_idle(b);
    te_result_free(&got);
}

/* ---- ends ---- */

/* A leg cancelled in every state it can be in gives all back at once (with several steps in flight, once they
 * are collected); held, it keeps its pages until unhold. */
static void test_cancel(void)
{
    for (int turns = 0; turns < 14; turns++)
        for (int held = 0; held < 2; held++)
            for (int kind = 0; kind < 3; kind++) {
                td_engine *e = open_with(
                    (td_engine_opts){.max_prefill_chunk = 16, .prefix_cache = turns % 2, .max_seqs = 4});
                te_spec s = te_make(9, 80, 20, V);
                te_result r = {0};
                td_engine_out o;
                uint32_t hit, n;
                s.leg.sampling.n = (uint32_t)(1 + turns % 3);
                s.leg.kind = (td_leg_kind)kind;
                te_expect(&s, &r);
                T_OK((kind == TD_LEG_DECODE ? td_engine_reserve(e, te_leg(&s), &hit)
                                            : td_engine_start(e, te_leg(&s))) == TD_OK,
                     "%s", td_reason());
                if (kind == TD_LEG_DECODE && turns == 3) td_engine_recompute(e, 9);
                if (kind == TD_LEG_DECODE && turns == 5) {
                    uint32_t first[3] = {1, 2, 3};
                    T_OK(td_engine_land(e, 9, first, s.leg.sampling.n) == TD_OK);
                    for (int c = 0; c < 3; c++) r.n[c] = 1;
                }
                if (held) td_engine_hold(e, 9);
                for (int i = 0; i < turns; i++)
                    if (td_engine_turn(e, &o) == TD_OK) te_take(&s, &r, 1, &o);
                bool was_over = r.ended;
                td_status st = td_engine_cancel(e, 9);
                T_EQ(st, was_over ? TD_EGONE : TD_OK);
                if (!was_over) {
                    /* pages that steps in flight write come back with those steps */
                    if (depth == 1) T_OK(te_ledger(e, !held) || held, "cancelled, but pages are left");
                    T_OK(td_engine_turn(e, &o) == TD_OK);
                    te_take(&s, &r, 1, &o);
                    for (int i = 1; i < depth; i++) (void)td_engine_turn(e, &o);
                    T_OK(te_ledger(e, !held) || held, "cancelled and collected, but pages are left");
                    T_OK(r.ended && r.end.finish == TD_FINISH_CANCEL);
                }
                if (held) {
                    const int32_t *pages = td_engine_pages(e, 9, 0, &n);
                    if (turns) T_OK(pages && n >= 5 && pages[0] >= 0, "a held leg lost its pages");
                    td_engine_unhold(e, 9);
                }
                T_OK(td_engine_pages(e, 9, 0, &n) == NULL);
                T_EQ(td_engine_turn(e, &o), TD_AGAIN);
                close_idle(e);
                te_result_free(&r);
            }
    model->bad_reads = 0; /* the landed leg's pages had nothing in them */
}

static void test_cancel_choice(void)
{
    te_spec s = te_make(5, 50, 30, V);
    te_result full = {0}, r = {0};
    td_engine_out o;
    s.leg.sampling.n = 3;
    s.leg.sampling.temperature = 1;
    td_engine *e = open_with((td_engine_opts){0});
    te_run(e, &s, &full, 1);
    for (int turns = 0; turns < 6; turns++)
        for (uint32_t c = 0; c < 3; c++) {
            te_expect(&s, &r);
            T_OK(td_engine_start(e, te_leg(&s)) == TD_OK);
            for (int i = 0; i < turns; i++)
                if (td_engine_turn(e, &o) == TD_OK) te_take(&s, &r, 1, &o);
            uint32_t had = r.n[c];
            T_OK(td_engine_cancel_choice(e, 5, c) == TD_OK);
            te_finish(e, &s, &r, 1);
            T_EQ(r.n[c], had);
            for (uint32_t k = 0; k < 3; k++)
                if (k != c)
                    T_OK(te_same_choice(&full, k, &r, k), "choice %u changed when %u was cancelled", k, c);
        }
    T_EQ(td_engine_cancel_choice(e, 5, 0), TD_EGONE);
    close_idle(e);
    te_result_free(&full);
    te_result_free(&r);
}

/* The rows that a cancelled choice has in flight fill a block, maybe with a token that nobody has seen: it is
 * not published. */
static void test_cancelled_block(void)
{
    for (uint32_t at = 3; at < 8; at++) {
        td_engine *e = open_with((td_engine_opts){.prefix_cache = true});
        te_spec s = te_make(1, 10, 30, V);
        te_result r = {0};
        td_engine_stats st;
        td_engine_out o;
        s.leg.sampling.n = 2;
        s.leg.sampling.temperature = 1;
        te_expect(&s, &r);
        T_OK(td_engine_start(e, te_leg(&s)) == TD_OK);
        while (r.n[0] < at && td_engine_turn(e, &o) == TD_OK) te_take(&s, &r, 1, &o);
        T_OK(td_engine_cancel_choice(e, 1, 0) == TD_OK);
        te_finish(e, &s, &r, 1);
        te_drain(e);
        td_engine_stats_get(e, &st);
        T_OK(st.ledger[0].cached == (at > 6 ? 3 : 2), "cancelled at %u: %lld blocks", at,
             (long long)st.ledger[0].cached);
        close_idle(e);
        te_result_free(&r);
    }
}

static void test_deadline(void)
{
    for (int state = 0; state < 3; state++) {
        td_engine *e = open_with((td_engine_opts){0});
        te_spec s = te_make(5, 50, 30, V);
        te_result r = {0};
        td_engine_out o;
        uint32_t hit;
        td_clock_fake(1000);
        s.leg.deadline_us = 2000;
        te_expect(&s, &r);
        if (state == 2) s.leg.kind = TD_LEG_DECODE;
        T_OK((state == 2 ? td_engine_reserve(e, te_leg(&s), &hit) : td_engine_start(e, te_leg(&s))) == TD_OK);
        for (int i = 0; i < state * 2; i++)
            if (td_engine_turn(e, &o) == TD_OK) te_take(&s, &r, 1, &o);
        T_OK(!r.ended);
        td_clock_fake(2000);
        T_OK(td_engine_turn(e, &o) == TD_OK);
        te_take(&s, &r, 1, &o);
        T_OK(r.ended && r.end.status == TD_ETIME && r.end.finish == TD_FINISH_ERROR);
        td_clock_fake(-1);
        close_idle(e);
    }
}

/* ---- refusals ---- */

static void test_refusals(void)
{
    td_engine *e = open_with((td_engine_opts){.kv_pages = 30, .max_seqs = 4, .max_legs = 3});
    te_spec s = te_make(1, 20, 5, V);
    uint32_t hit;
    s.prompt[3] = V;
    T_EQ(td_engine_start(e, te_leg(&s)), TD_EBADREQ);
    s.prompt[3] = 1;
    s.leg.n_prompt = 0;
    T_EQ(td_engine_start(e, te_leg(&s)), TD_EBADREQ);
    s.leg.n_prompt = 400;
    T_EQ(td_engine_start(e, te_leg(&s)), TD_EBADREQ);
    T_OK(strstr(td_reason(), "400"), "%s", td_reason());
    s.leg.n_prompt = 20;
    s.leg.sampling.n = 5;
    T_EQ(td_engine_start(e, te_leg(&s)), TD_EBADREQ);
    s.leg.sampling.n = 1;
    s.leg.sampling.max_tokens = 0;
    T_EQ(td_engine_start(e, te_leg(&s)), TD_EBADREQ);
    s.leg.sampling.max_tokens = 5;
    s.leg.sampling.logprobs = TD_MAX_TOP_LOGPROBS + 1;
    T_EQ(td_engine_start(e, te_leg(&s)), TD_EBADREQ);
    s.leg.sampling.logprobs = -1;
    s.leg.sampling.prompt_logprobs = 1000;
    T_EQ(td_engine_start(e, te_leg(&s)), TD_EBADREQ);
    s.leg.sampling.prompt_logprobs = -1;
    s.leg.sampling.n_bias = 1, s.bias[0].id = V;
    T_EQ(td_engine_start(e, te_leg(&s)), TD_EBADREQ);
    s.leg.sampling.n_bias = 0;
    s.n_resume[0] = 1, s.resume[0][0] = V;
    T_EQ(td_engine_start(e, te_leg(&s)), TD_EBADREQ);
    s.n_resume[0] = 0;
    s.leg.sampling.n_stop_ids = 1, s.stop[0] = 4000000000u,
    s.leg.sampling.min_tokens = 3; /* can never be drawn: no harm */
    te_result r = {0};
    te_run(e, &s, &r, 1);
    T_EQ(r.n[0], 5);
    T_EQ(td_engine_start(e, te_leg(&s)), TD_OK);
    T_EQ(td_engine_start(e, te_leg(&s)), TD_EBADREQ); /* the key is taken */
    T_EQ(td_engine_land(e, 1, (uint32_t[1]){1}, 1), TD_EGONE);
    T_EQ(td_engine_recompute(e, 1), TD_EGONE);
    T_EQ(td_engine_cancel(e, 77), TD_EGONE);
    for (uint64_t k = 2; k < 4; k++) {
        s.leg.key = k;
        T_EQ(td_engine_start(e, te_leg(&s)), TD_OK);
    }
    s.leg.key = 4;
    T_EQ(td_engine_start(e, te_leg(&s)), TD_EFULL);
    for (uint64_t k = 1; k < 4; k++) td_engine_cancel(e, k);
    s.leg.kind = TD_LEG_DECODE;
    s.leg.n_prompt = 300;
    T_EQ(td_engine_reserve(e, te_leg(&s), &hit), TD_OK);
    s.leg.key = 5;
    T_EQ(td_engine_reserve(e, te_leg(&s), &hit), TD_EFULL); /* no pages now */
    T_EQ(td_engine_land(e, 4, (uint32_t[2]){1, 2}, 2), TD_EPROTO);
    T_EQ(td_engine_land(e, 4, (uint32_t[1]){V}, 1), TD_EPROTO);
    td_engine_cancel(e, 4);
    T_EQ(td_engine_reserve(e, te_leg(&s), &hit), TD_OK);
    td_engine_cancel(e, 5);
    close_idle(e);
    te_result_free(&r);
}

/* Many choices of many legs end their prompts in one step; many ended legs are held: nothing overflows. */
static void test_crowd(void)
{
    static te_spec s[60];
    static te_result r[60];
    td_engine *e = open_with((td_engine_opts){.max_seqs = 6, .max_legs = 60, .max_batched_tokens = 400});
    for (uint32_t i = 0; i < 60; i++) {
        s[i] = te_make(i + 1, 20, 4, V);
        s[i].leg.sampling.n = i < 40 ? 6 : 5;
        s[i].leg.kind = i < 40 ? TD_LEG_PREFILL : TD_LEG_MIXED;
        te_expect(&s[i], &r[i]);
        T_OK(td_engine_start(e, te_leg(&s[i])) == TD_OK, "%s", td_reason());
        if (i < 40) td_engine_hold(e, i + 1);
    }
    te_finish(e, s, r, 60);
    for (uint32_t i = 0; i < 60; i++)
        for (uint32_t c = 0; c < s[i].leg.sampling.n; c++) T_EQ(r[i].n[c], i < 40 ? 1 : 4);
    T_OK(!te_ledger(e, true));
    for (uint32_t i = 0; i < 40; i++) td_engine_unhold(e, i + 1);
    close_idle(e);
    for (int i = 0; i < 60; i++) te_result_free(&r[i]);
}

/* Several choices that fill the pool to its last page, alone. */
static void test_tight_choices(void)
{
    uint32_t ran = 0;
    for (uint32_t n = 2; n <= 6; n++)
        for (uint32_t prompt = 95; prompt < 113; prompt++) {
            td_engine *e =
                open_with((td_engine_opts){.kv_pages = 6 + 2 * n + prompt % 2, .max_model_len = 125});
            te_spec s = te_make(1, prompt, 12, V);
            te_result r = {0};
            s.leg.sampling.n = n;
            s.leg.sampling.temperature = 1;
            if (td_engine_start(e, te_leg(&s)) == TD_OK) {
                te_expect(&s, &r);
                te_finish(e, &s, &r, 1);
                T_EQ(r.n[n - 1], 12);
                ran++;
            }
            close_idle(e);
            te_result_free(&r);
        }
    T_OK(ran > 20, "%u ran", ran);
}

/* Each of 20 legs draws 20 choices from its prompt's last row. */
static void test_many_draws(void)
{
    td_engine *e = open_with((td_engine_opts){.max_seqs = 20, .max_legs = 20, .max_batched_tokens = 600});
    uint32_t tokens = 0, ends = 0;
    td_engine_out o;
    for (uint32_t i = 0; i < 20; i++) {
        te_spec s = te_make(i + 1, 20, 4, V);
        s.leg.sampling.n = 20;
        s.leg.kind = TD_LEG_PREFILL;
        T_OK(td_engine_start(e, te_leg(&s)) == TD_OK, "%s", td_reason());
    }
    while (td_engine_turn(e, &o) == TD_OK) tokens += o.n_tokens, ends += o.n_end;
    T_EQ(tokens, 400);
    T_EQ(ends, 20);
    close_idle(e);
}

/* Another salt is another cache; the choices of one prompt differ from each other. */
static void test_salt(void)
{
    td_engine *e = open_with((td_engine_opts){.prefix_cache = true});
    te_spec s = te_make(1, 100, 24, V);
    te_result r = {0};
    s.leg.sampling.temperature = 1;
    s.leg.sampling.n = 2;
    static const struct {
        const char *salt;
        uint32_t bytes, cached;
    } round[] = {{"", 0, 0}, {"", 0, 96}, {"a", 1, 0}, {"b", 1, 0}, {"ab", 2, 0}, {"a", 1, 96}, {"", 0, 96}};
    for (size_t i = 0; i < TD_COUNT(round); i++) {
        s.leg.salt = round[i].salt;
        s.leg.salt_bytes = round[i].bytes;
        te_run(e, &s, &r, 1);
        T_EQ(r.cached, round[i].cached);
        T_OK(memcmp(r.token[0], r.token[1], 24 * sizeof(uint32_t)));
    }
    close_idle(e);
    te_result_free(&r);
}

static void count_logits(void *arg, uint64_t key, uint32_t position, const float *logits)
{
    float(*rows)[FAKE_V] = arg;
    (void)key;
    memcpy(rows[position], logits, sizeof rows[0]);
}

/* The rows handed out are the rows of each position, whatever the chunks. */
static void test_all_logits(void)
{
    static float whole[100][FAKE_V], cut[100][FAKE_V];
    for (int chunk = 0; chunk < 20; chunk += 3) {
        td_engine *e =
            open_with((td_engine_opts){.max_prefill_chunk = chunk, .max_logits = 64, .prefix_cache = true});
        te_spec s = te_make(1, 100, 1, V);
        te_result r = {0};
        for (uint32_t i = 0; i < 100; i++) s.prompt[i] = i % 7;
        s.leg.all_logits = true;
        memset(cut, 0, sizeof cut);
        td_engine_on_logits(e, count_logits, chunk ? cut : whole);
        te_run(e, &s, &r, 1);
        te_run(e, &s, &r, 1); /* not from the cache */
        T_EQ(r.cached, 0);
        if (chunk) T_OK(!memcmp(whole, cut, sizeof whole), "chunks of %d", chunk);
        T_OK(memcmp(whole[99], whole[98], sizeof whole[0]) && whole[99][0] != 0);
        close_idle(e);
        te_result_free(&r);
    }
}

/* An error of the model is an error of the turn; nothing is lost with it. */
static void test_model_error(void)
{
    td_engine *e = open_with((td_engine_opts){0});
    te_spec s = te_make(1, 30, 5, V);
    te_result r = {0}, right = {0};
    td_engine_out o;
    te_run(e, &s, &right, 1);
    te_expect(&s, &r);
    T_OK(td_engine_start(e, te_leg(&s)) == TD_OK);
    model->fail_after = 2;
    int errors = 0;
    for (int i = 0; i < 20 && !r.ended; i++) {
        td_status st = td_engine_turn(e, &o);
        errors += st < 0;
        te_take(&s, &r, 1, &o);
    }
    model->fail_after = -1;
    T_EQ(errors, 1);
    te_same(&s, &right, &r, "after an error");
    close_idle(e);
    te_result_free(&r);
    te_result_free(&right);
}

static bool begins(const te_spec *s, const te_result *whole, const te_result *part)
{
    for (uint32_t c = 0; c < s->leg.sampling.n; c++)
        if (part->n[c] > whole->n[c] ||
            memcmp(part->token[c], whole->token[c], part->n[c] * sizeof(uint32_t)))
            return false;
    return true;
}

/* Whichever step is refused: its legs end with the error, the others are as if nothing had been. A page that
 * it should have copied would be read as it is. */
static void test_refused_step(void)
{
    enum { LEGS = 4 };
    static te_spec s[LEGS];
    static te_result right[LEGS], r[LEGS];
    uint32_t ended = 0, whole = 0;
    td_engine *e = open_with((td_engine_opts){0});
    for (uint32_t i = 0; i < LEGS; i++) {
        s[i] = te_make(i + 1, 9 + 7 * i, 6 + 3 * i, V);
        s[i].leg.sampling.n = 1 + (i + 2) % 3;
        s[i].leg.sampling.temperature = 1;
        te_run(e, &s[i], &right[i], 1);
    }
    close_idle(e);
    for (uint64_t refuse = 1; refuse < 40; refuse++) {
        e = open_with((td_engine_opts){.max_batched_tokens = 5, .prefix_cache = refuse % 2});
        model->refuse = refuse;
        te_run_some(e, s, r, LEGS, 2);
        for (uint32_t i = 0; i < LEGS; i++) {
            bool error = r[i].end.finish == TD_FINISH_ERROR;
            if (error)
                T_OK(r[i].end.status == TD_EPROTO && begins(&s[i], &right[i], &r[i]), "refused in step %d",
                     (int)refuse);
            else
                te_same(&s[i], &right[i], &r[i], "beside a refused step");
            ended += error, whole += !error;
        }
        T_OK(!model->bad_reads, "%llu bad reads", (unsigned long long)model->bad_reads);
        model->refuse = model->bad_reads = 0;
        close_idle(e);
    }
    T_OK(ended > 20 && whole > 20, "%u ended, %u did not", ended, whole);
    for (int i = 0; i < LEGS; i++) te_result_free(&right[i]), te_result_free(&r[i]);
}

/* A leg without rows in the refused step, which should have copied its choices' pages. */
static void test_refused_copies(void)
{
    td_engine *a = open_with((td_engine_opts){0});
    td_engine_on_step(a, NULL, NULL);
    td_engine *b = open_with((td_engine_opts){.max_batched_tokens = 2});
    te_spec old = te_make(1, 2, 30, V), q = te_make(2, 20, 8, V);
    te_result r = {0}, old_r = {0};
    td_engine_out o;
    uint32_t hit, first[2];
    te_carrier *c = td_xalloc(sizeof *c);
    old.leg.sampling.n = q.leg.sampling.n = 2;
    te_expect(&old, &old_r);
    T_OK(td_engine_start(b, te_leg(&old)) == TD_OK, "%s", td_reason());
    while (old_r.n[1] < 3 && td_engine_turn(b, &o) == TD_OK) te_take(&old, &old_r, 1, &o);
    te_spec d = q;
    d.leg.kind = TD_LEG_DECODE;
    T_OK(td_engine_reserve(b, te_leg(&d), &hit) == TD_OK, "%s", td_reason());
    *c = (te_carrier){.from = a, .to = b, .key = 2, .n_tokens = 20};
    T_OK(te_prefill(c, &q, &r, "refused copies"));
    for (int k = 0; k < 2; k++) first[k] = r.token[k][0];
    model->refuse = watch.steps + 1;
    T_OK(td_engine_land(b, 2, first, 2) == TD_OK, "%s", td_reason());
    te_result_free(&r);
    te_spec both[2] = {old, d};
    te_result end[2] = {old_r};
    end[1].n[0] = end[1].n[1] = 1;
    te_finish(b, both, end, 2);
    model->refuse = 0;
    T_OK(end[0].end.status == TD_EPROTO && end[1].end.status == TD_EPROTO, "%d, %d", end[0].end.status,
         end[1].end.status);
    T_OK(!model->bad_reads, "%llu bad reads", (unsigned long long)model->bad_reads);
    model->bad_reads = 0;
    close_idle(a);
    close_idle(b);
    free(c);
    te_result_free(&end[0]), te_result_free(&end[1]);
}

/* ---- several choices ---- */

/* A landed prompt of several choices is published like any other: the next hand-off of it hits. */
static void test_landed_choices_hit(uint32_t n)
{
    te_result got = {0}, one = {0};
    td_engine *a = open_with((td_engine_opts){.prefix_cache = true}),
              *b = open_with((td_engine_opts){.prefix_cache = true});
    te_spec s = te_make(1, 100, 12, V);
    uint32_t hit = 0;
    s.leg.sampling.n = n;
    s.leg.sampling.temperature = 1;
    te_run(a, &s, &one, 1);
    te_hand_off(a, b, &s, &got, false, "landed choices");
    te_same(&s, &one, &got, "landed choices");
    s.leg.kind = TD_LEG_DECODE;
    T_OK(td_engine_reserve(b, te_leg(&s), &hit) == TD_OK, "%s", td_reason());
    if (model->desc.n_groups == 1) T_EQ(hit, 96);
    td_engine_cancel(b, 1);
    td_engine_out o;
    (void)td_engine_turn(b, &o);
    close_idle(a);
    close_idle(b);
    te_result_free(&got), te_result_free(&one);
}

/* The choices' first rows each want a copy of the prompt's last page, and there is room for one: that choice goes on.
 * A copy never outlives the plan it was made in: pages that are given back may be arriving ones a moment later. */
static void test_choices_short_of_copies(void)
{
    td_engine *a = open_with((td_engine_opts){0});
    td_engine_on_step(a, NULL, NULL);
    td_engine *b = open_with((td_engine_opts){.kv_pages = 14, .max_model_len = 200, .max_batched_tokens = 64});
    te_spec q = te_make(1, 20, 12, V), late = te_make(2, 175, 4, V), next = te_make(3, 40, 8, V);
    te_result right = {0}, r = {0}, next_right = {0}, next_got = {0};
    td_engine_out o;
    uint32_t hit;
    q.leg.sampling.n = 3;
    q.leg.sampling.temperature = 1;
    te_run(a, &q, &right, 1);
    te_run(a, &next, &next_right, 1);
    te_expect(&q, &r);
    T_OK(td_engine_start(b, te_leg(&q)) == TD_OK, "%s", td_reason());
    while (!r.prompt_told && td_engine_turn(b, &o) == TD_OK) te_take(&q, &r, 1, &o);
    late.leg.kind = TD_LEG_DECODE; /* all pages but one */
    T_OK(td_engine_reserve(b, te_leg(&late), &hit) == TD_OK, "%s", td_reason());
    while (!r.ended && td_engine_turn(b, &o) == TD_OK) te_take(&q, &r, 1, &o);
    te_hand_off(a, b, &next, &next_got, false, "short of copies"); /* into pages that the choices had */
    te_same(&next, &next_right, &next_got, "short of copies");
    T_OK(model->bad_reads == 0, "%llu bad reads", (unsigned long long)model->bad_reads);
    td_engine_cancel(b, 2);
    T_OK(r.ended, "the choices stand still");
    if (r.ended) te_same(&q, &right, &r, "short of copies");
    (void)td_engine_turn(b, &o);
    if (r.ended) close_idle(b);
    close_idle(a);
    te_result_free(&r), te_result_free(&right), te_result_free(&next_right), te_result_free(&next_got);
}

static void all_tests(void)
{
    te_rnd = 11; /* the same legs at every depth */
    make_expected();
    test_ways();
    test_few_logits();
    test_resume();
    test_choices();
    test_hand_off(false, 16, 16, 0, false);
    test_hand_off(true, 16, 16, 20, false);
    test_hand_off(true, 8, 64, 0, false);
    test_hand_off(true, 64, 8, 7, true);
    test_cancel();
    test_cancel_choice();
    test_cancelled_block();
    test_deadline();
    test_refusals();
    test_crowd();
    test_many_draws();
    test_salt();
    test_tight_choices();
    test_landed_choices_hit(2);
    test_landed_choices_hit(3);
    test_choices_short_of_copies();
    test_all_logits();
    test_model_error();
    test_refused_step();
    test_refused_copies();
    for (int i = 0; i < N; i++) te_result_free(&want[i]);
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    threads = td_pool_open(1);
    T_OK(td_ops_open("ref", &ops) == TD_OK);
    for (int windows = 0; windows < 2 && !t_failed; windows++) {
        model = fake_open(windows);
        for (depth = 1; depth <= 3; depth += 1 + windows) {
            model->ahead = 0;
            all_tests();
            T_EQ(model->ahead > 10000,
                 depth > 1); /* rows of tokens that nobody knew when they were planned */
        }
        free(model);
    }
    td_pool_close(threads);
    return T_DONE();
}
