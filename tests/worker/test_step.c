// SPDX-License-Identifier: Apache-2.0
/* tests/worker/test_step.c - a step is all that is needed to compute it: every step of a run is copied away,
 * then all are executed again from the copies, on other memory, without an engine; the same tokens and scores
 * come out. What a builder makes of sampling parameters. And a step drawn by ranks that have parts of its
 * logits. */
#include "common/log.h"
#include "common/rng.h"
#include "tests/worker/support_engine.h"
#include "tests/worker/support_fake.h"
#include "worker/ranks.h"
#include "worker/sampler.h"
#include "worker/step_build.h"
#include <pthread.h>

enum { N = 12, MAX_STEPS = 400, PAGES = 300, P = 16 };

typedef struct tape {
    void *step[MAX_STEPS];
    uint32_t n;
} tape;

static void record(void *arg, const td_step *s)
{
    tape *t = arg;
    T_OK(t->n < MAX_STEPS && s->bytes >= sizeof *s && s->bytes % 8 == 0);
    if (t->n == MAX_STEPS) return;
    t->step[t->n] = malloc(s->bytes); /* exactly: reading past the end is seen by the sanitizer */
    memcpy(t->step[t->n++], s, s->bytes);
}

/* Samples of key and choice in the order of positions; scores into their places. */
static void take(te_spec *spec, te_result *r, const td_step_sample *d, const td_sample_out *out)
{
    for (uint32_t i = 0; i < N; i++) {
        if (spec[i].leg.key != d->key) continue;
        if (d->score >= 0) {
            if (!r[i].scores) r[i].scores = calloc(TE_MAX_PROMPT, sizeof *r[i].scores);
            r[i].scores[d->position - 1] = *out;
            continue;
        }
        uint32_t c = d->choice, at = r[i].n[c]++;
        T_EQ(d->position, spec[i].leg.n_prompt + at);
        r[i].token[c][at] = (uint32_t)out->token;
        if (d->logprobs >= 0) r[i].logprob[c][at] = out->logprob;
    }
}

static void replay(const tape *t, td_model *m, const td_ops *ops, td_pool *pool, te_spec *spec, te_result *r)
{
    td_kv kv[TD_MAX_GROUPS];
    td_sampler *sampler;
    T_OK(td_sampler_open(ops, pool, FAKE_V, 0, FAKE_V, NULL, &sampler) == TD_OK);
    static float logits[256 * FAKE_V];
    static td_sample_out out[512];
    for (int g = 0; g < m->desc.n_groups; g++) {
        kv[g] = (td_kv){NULL, TD_F32, PAGES, P, m->desc.group[g].G, m->desc.group[g].D};
        size_t bytes = td_kv_page_bytes(&kv[g]) * PAGES * (size_t)m->desc.group[g].n_slots;
        kv[g].base = aligned_alloc(64, bytes);
        memset(kv[g].base, 0xee, bytes);
    }
    for (uint32_t i = 0; i < t->n; i++) {
        const td_step *s = t->step[i];
        T_EQ(s->number, i + 1);
        T_OK(td_model_forward(m, s, kv, logits, NULL, NULL) == TD_OK);
        T_OK(td_sampler_run(sampler, s, NULL, logits, out) == TD_OK);
        for (uint32_t k = 0; k < s->n_samples; k++) take(spec, r, &td_step_samples(s)[k], &out[k]);
    }
    for (int g = 0; g < m->desc.n_groups; g++) free(kv[g].base);
    td_sampler_close(sampler);
}

static void test_replay(td_model *m, const td_ops *ops, td_pool *pool)
{
    static te_spec spec[N];
    static te_result told[N], again[N];
    tape t = {0};
    td_engine *e = NULL;
    td_engine_opts o = {.model = m,
                        .ops = ops,
                        .pool = pool,
                        .page_size = P,
                        .kv_pages = PAGES,
                        .max_model_len = 300,
                        .max_batched_tokens = 64,
                        .max_seqs = 16,
                        .max_legs = N,
                        .max_prefill_chunk = 23,
                        .prefix_cache = true,
                        .hash_key = {1, 1}};
    T_OK(td_engine_open(&o, &e) == TD_OK, "%s", td_reason());
    td_engine_on_step(e, record, &t);
    for (int i = 0; i < N; i++) {
        spec[i] = te_make((uint64_t)i + 1, 1 + te_draw(120), 1 + te_draw(20), FAKE_V);
        te_vary(&spec[i], FAKE_V);
        if (spec[i].leg.sampling.n > 1)
            spec[i].leg.n_prompt =
                TD_MAX(spec[i].leg.n_prompt / P, 1u) * P; /* forks at a page's end copy nothing */
        te_expect(&spec[i], &again[i]);
    }
    te_run_some(e, spec, told, N, 3);
    td_engine_close(e);
    m->bad_reads = 0;
    replay(&t, m, ops, pool, spec, again);
    T_EQ(m->bad_reads, 0);
    T_OK(t.n > 20);
    for (int i = 0; i < N; i++) {
        for (uint32_t c = 0; c < spec[i].leg.sampling.n; c++) {
            T_OK(told[i].n[c] == again[i].n[c] &&
                     !memcmp(told[i].token[c], again[i].token[c], told[i].n[c] * sizeof(uint32_t)),
                 "leg %d choice %u", i, c);
            T_OK(!memcmp(told[i].logprob[c], again[i].logprob[c], told[i].n[c] * sizeof(float)),
                 "logprobs of leg %d choice %u", i, c);
        }
        for (uint32_t k = 0; k < told[i].n_scores; k++)
            T_OK(te_same_sample(&told[i].scores[k], &again[i].scores[k]), "leg %d score %u", i, k);
        te_result_free(&told[i]);
        te_result_free(&again[i]);
    }
    for (uint32_t i = 0; i < t.n; i++) free(t.step[i]);
}

/* Two choices and a score, field by field. */
static void test_words(void)
{
    te_spec s = te_make(77, 20, 9, FAKE_V);
    td_sampling *p = &s.leg.sampling;
    *p = (td_sampling){.temperature = 0.5f,
                       .top_k = 3,
                       .top_p = 0.9f,
                       .min_p = 0.1f,
                       .repetition_penalty = 1.5f,
                       .presence_penalty = 0.25f,
                       .frequency_penalty = 0.125f,
                       .seed = 99,
                       .max_tokens = 9,
                       .min_tokens = 2,
                       .n = 2,
                       .logprobs = 1,
                       .prompt_logprobs = 2,
                       .n_bias = 1,
                       .n_stop_ids = 2};
    s.stop[0] = 5, s.stop[1] = 6;
    s.bias[0] = (td_bias){7, 1.5f};
    for (uint32_t i = 0; i < 20; i++) s.prompt[i] = i < 10 ? 11 : i;
    s.n_resume[1] = 3;
    s.resume[1][0] = s.resume[1][1] = 11, s.resume[1][2] = 30;
    td_seq *q;
    T_OK(td_seq_open(te_leg(&s), &q) == TD_OK);
    int32_t table[2] = {4, 9};
    td_kvseq kv = {.pages = {table}, .n_pages = 2};
    td_step_build *b = td_step_build_open(1, P, (td_kvmap){0, 1});
    td_step_build_begin(b, 3);
    T_EQ(td_step_build_rows(b, q, 0, &kv, 17, 3), 0);
    T_EQ(td_step_build_rows(b, q, 0, &kv, 0, 2), 3);
    uint32_t l0 = td_step_build_logit(b, 1), l1 = td_step_build_logit(b, 2);
    td_step_build_score(b, q, l0, 19);
    td_step_build_draw(b, q, 0, l1, 20);
    td_step_build_draw(b, q, 1, l1, 23);
    const td_step *st = td_step_build_finish(b);
    const td_step_sample *d = td_step_samples(st);
    const td_step_seq *r = td_step_seqs(st);
    T_OK(st->number == 3 && st->n_rows == 5 && st->n_seqs == 2 && st->n_groups == 1 && st->n_logits == 2 &&
         st->n_samples == 3);
    static const int32_t ids[] = {17, 18, 19, 11, 11}, pos[] = {17, 18, 19, 0, 1};
    T_OK(!memcmp(td_step_ids(st), ids, sizeof ids) && !memcmp(td_step_pos(st), pos, sizeof pos));
    T_OK(r[0].row0 == 0 && r[0].n_rows == 3 && r[0].pos0 == 17 && r[0].n_pages[0] == 2 &&
         td_step_pages(st, &r[0], 0)[1] == 9 && r[0].key == 77);
    T_OK(r[1].row0 == 3 && r[1].n_rows == 2 && r[1].pos0 == 0 && r[1].n_pages[0] == 1 &&
         td_step_pages(st, &r[1], 0)[0] == 4);
    T_OK(d[0].score == 19 && d[0].logit == 0 && d[0].logprobs == 2 && d[0].key == 77);
    for (uint32_t c = 0; c < 2; c++) {
        const td_step_sample *x = &d[c + 1];
        T_OK(x->choice == c && x->score == -1 && x->logit == 1 && x->seed == 99 && x->stream == c << 8 &&
             x->position == (c ? 23 : 20) && x->logprobs == 1);
        T_OK(x->temperature == 0.5f && x->top_k == 3 && x->top_p == 0.9f && x->min_p == 0.1f &&
             x->repetition_penalty == 1.5f);
        T_OK(x->presence_penalty == 0.25f && x->frequency_penalty == 0.125f && !x->n_mask);
        const td_bias *bias = TD_STEP_AT(st, td_bias, x->bias);
        T_EQ(x->n_bias, c ? 1 : 3); /* below min_tokens the stop ids are banned */
        T_OK(bias[0].id == 7 && bias[0].add == 1.5f);
        if (!c) T_OK(bias[1].id == 5 && bias[2].id == 6 && isinf(bias[1].add) && bias[2].add < 0);
        const td_penalty *pen = TD_STEP_AT(st, td_penalty, x->pen);
        T_EQ(x->n_pen, c ? 11 : 10);
        for (uint32_t k = 0; k < x->n_pen; k++) {
            T_EQ(pen[k].in_prompt, pen[k].id != 30);
            T_EQ(pen[k].n_out, !c ? 0 : pen[k].id == 11 ? 2 : pen[k].id == 30);
        }
    }
    td_step_build_close(b);
    td_seq_close(q);
}

/* ---- the same step on several ranks ---- */

enum { R_V = 509, R_ROWS = 40, R_MAX = 3 * R_ROWS };

typedef struct words {
    _Alignas(8) uint8_t p[1 << 16];
    uint32_t n;
} words;

static uint32_t put(words *w, const void *p, size_t n)
{
    uint32_t at = w->n;
    memcpy(w->p + at, p, n);
    w->n += (uint32_t)(n + 7) / 8 * 8;
    T_OK(w->n <= sizeof w->p);
    return at;
}

/* Every kind of sample over R_ROWS rows of logits; some rows have three choices, some are scored as well. */
static const td_step *all_kinds(words *w)
{
    static td_step_sample d[R_MAX];
    td_step s = {.number = 1, .n_rows = R_ROWS, .n_logits = R_ROWS};
    uint32_t mask[(R_V + 31) / 32];
    td_bias bias[] = {{3, 2.5f}, {R_V - 1, 1}, {200, -INFINITY}};
    td_penalty pen[] = {{7, 2, 1}, {300, 0, 1}, {R_V - 2, 1, 0}};
    w->n = sizeof s;
    for (size_t i = 0; i < TD_COUNT(mask); i++) mask[i] = te_draw(3) ? ~0u : te_draw(1u << 31);
    uint32_t at_mask = put(w, mask, sizeof mask), at_bias = put(w, bias, sizeof bias),
             at_pen = put(w, pen, sizeof pen);
    for (uint32_t k = 0; k < R_ROWS; k++) {
        uint32_t choices = k % 5 == 2 ? 3 : 1;
        if (k % 4 == 1)
            d[s.n_samples++] = (td_step_sample){
                .logit = k, .score = (int32_t)te_draw(R_V), .logprobs = (int32_t)te_draw(21)};
        for (uint32_t c = 0; c < choices; c++) {
            td_step_sample *x = &d[s.n_samples++];
            *x = (td_step_sample){.choice = c,
                                  .logit = k,
                                  .score = -1,
                                  .temperature = k % 3 ? 0.4f + (float)c : 0,
                                  .top_p = te_draw(2) ? 1 : 0.7f,
                                  .top_k = te_draw(2) ? 0 : 1 + (int32_t)te_draw(30),
                                  .min_p = te_draw(3) ? 0 : 0.02f,
                                  .repetition_penalty = 1.2f,
                                  .presence_penalty = 0.5f,
                                  .frequency_penalty = 0.1f,
                                  .logprobs = (int32_t)te_draw(22) - 1,
                                  .seed = te_draw(1000),
                                  .position = k,
                                  .stream = c << 8};
            if (te_draw(3) == 0) x->mask = at_mask, x->n_mask = TD_COUNT(mask);
            if (te_draw(3) == 0) x->bias = at_bias, x->n_bias = TD_COUNT(bias);
            if (te_draw(3) == 0) x->pen = at_pen, x->n_pen = TD_COUNT(pen);
        }
    }
    s.samples = put(w, d, s.n_samples * sizeof *d);
    s.bytes = w->n;
    memcpy(w->p, &s, sizeof s);
    return (const td_step *)(const void *)w->p;
}

typedef struct draw_rank {
    pthread_t thread;
    td_coll *world;
    td_grid grid;
    const td_ops *ops;
    const td_step *step;
    const float *logits;
    td_logit_place place[R_ROWS];
    td_sample_out out[R_MAX];
    td_status status;
    bool has_all;
} draw_rank;

/* This rank's rows and part of the vocabulary (the last parts are short), cut out exactly. */
static td_status draw_part(draw_rank *r, const td_ranks *ranks, td_pool *pool)
{
    int tp = r->grid.tp, block = ((R_V + tp - 1) / tp + 31) / 32 * 32, v0 = TD_MIN(ranks->at.tp * block, R_V);
    size_t n = (size_t)TD_MIN(block, R_V - v0), rows = 0;
    float *part = malloc(R_ROWS * n * sizeof *part + 1);
    for (size_t k = 0; k < R_ROWS; k++)
        if (r->place[k].cp == ranks->at.cp)
            memcpy(part + n * rows++, r->logits + k * R_V + v0, n * sizeof *part);
    td_sampler *s;
    td_status st = td_sampler_open(r->ops, pool, R_V, v0, (int)n, ranks, &s);
    if (st >= 0) {
        st = td_sampler_run(s, r->step, r->grid.cp > 1 ? r->place : NULL, part, r->out);
        td_sampler_close(s);
    }
    free(part);
    r->has_all = ranks->at.cp == 0 && (ranks->at.tp == 0 || r->grid.cp == 1);
    return st;
}

static void *draw_thread(void *arg)
{
    draw_rank *r = arg;
    td_pool *pool = td_pool_open(1);
    td_ranks ranks;
    r->status = td_ranks_open(r->world, &r->grid, &ranks);
    if (r->status >= 0) {
        r->status = draw_part(r, &ranks, pool);
        td_ranks_close(&ranks);
    }
    if (r->status < 0) td_coll_abort(r->world, td_reason());
    td_pool_close(pool);
    return NULL;
}

static void on_ranks(const td_ops *ops, const td_step *step, const float *logits, const td_sample_out *want,
                     int tp, int cp)
{
    static draw_rank rank[32];
    td_coll *end[32];
    int n = tp * cp;
    T_OK(td_coll_threads_open(n, end) == TD_OK);
    for (int i = 0; i < n; i++) {
        draw_rank *r = &rank[i];
        int rows[32] = {0};
        *r = (draw_rank){.world = end[i],
                         .grid = {.tp = tp, .pp = 1, .cp = cp, .dp = 1},
                         .ops = ops,
                         .step = step,
                         .logits = logits};
        for (int k = 0; k < R_ROWS; k++) {
            int c = k < 20 ? k * 7 / 3 % cp : cp - 1; /* some ranks have few rows */
            r->place[k] = (td_logit_place){c, rows[c]++};
        }
        T_OK(!pthread_create(&r->thread, NULL, draw_thread, r));
    }
    for (int i = 0; i < n; i++) {
        pthread_join(rank[i].thread, NULL);
        T_OK(rank[i].status == TD_OK, "tensor %d context %d rank %d", tp, cp, i);
        for (uint32_t k = 0; rank[i].has_all && k < step->n_samples; k++)
            T_OK(te_same_sample(&rank[i].out[k], &want[k]) &&
                     !memcmp(&rank[i].out[k], &want[k], sizeof want[k]),
                 "%s, tensor %d context %d rank %d, sample %u: token %d, one rank %d", ops->family, tp, cp, i,
                 k, rank[i].out[k].token, want[k].token);
    }
    for (int i = 0; i < n; i++) td_coll_close(end[i]);
}

static void test_parts(const td_ops *ops, td_pool *pool)
{
    static const int grids[][2] = {{2, 1}, {3, 1}, {8, 1}, {17, 1}, {1, 2}, {2, 2}, {4, 3}};
    static words w;
    static td_sample_out want[R_MAX];
    static float logits[R_ROWS * R_V], copy[R_ROWS * R_V];
    td_sampler *s;
    const td_step *step = all_kinds(&w);
    for (int i = 0; i < R_ROWS * R_V; i++) {
        int k = i / R_V;
        logits[i] = k % 7 == 3 ? (float)te_draw(5) : (float)te_draw(4096) / 256;
        if (k % 6 == 5 && te_draw(3)) logits[i] = te_draw(2) ? NAN : -INFINITY;
        if (k == 30) logits[i] = NAN; /* nothing can be drawn */
        if (k == 31 && i % 100 == 99) logits[i] = INFINITY;
    }
    memcpy(copy, logits, sizeof copy);
    T_OK(td_sampler_open(ops, pool, R_V, 0, R_V, NULL, &s) == TD_OK);
    T_OK(td_sampler_run(s, step, NULL, copy, want) == TD_OK);
    td_sampler_close(s);
    for (size_t i = 0; i < TD_COUNT(grids); i++) on_ranks(ops, step, logits, want, grids[i][0], grids[i][1]);
    td_ops none = *ops; /* kernels that cannot */
    none.draw_say = NULL;
    td_ranks two = {.grid = {.tp = 2, .pp = 1, .cp = 1, .dp = 1}};
    T_OK(td_sampler_open(&none, pool, R_V, 0, 256, &two, &s) == TD_ENOSUP);
}

int main(void)
{
    const td_ops *ops = NULL;
    td_log_open("test", TD_LOG_ERROR);
    td_pool *pool = td_pool_open(1);
    T_OK(td_ops_open("ref", &ops) == TD_OK);
    for (int windows = 0; windows < 2; windows++)
        for (int round = 0; round < 5; round++) {
            td_model *m = fake_open(windows);
            test_replay(m, ops, pool);
            free(m);
        }
    test_words();
    for (int f = 0; (ops = td_ops_family(f)); f++)
        for (int round = 0; round < 3; round++) test_parts(ops, pool);
    td_pool_close(pool);
    return T_DONE();
}
