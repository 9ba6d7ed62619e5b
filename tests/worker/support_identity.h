/* tests/worker/support_identity.h - an engine over a real model: recorded continuations, and legs whose
 * results alone are compared with their results in every other way to compute them.
 *
 *   ti_limits = ...; ti_ops, ti_pool = ...; ti_open_model(dir) -> ti_compare_recorded(...),
 * ti_make_expected(n, 110, 16), ti_vary(opts, n, together, twice, "why"); ti_free_expected(n)
 *
 * td_engine_opts.depth 0 is ti_depth here: a test runs as it is with more steps in flight. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SUPPORT_IDENTITY_H
#define TD_TESTS_SUPPORT_IDENTITY_H

#include "tests/worker/support_engine.h"
#include "worker/model/safetensors.h"
#include <math.h>

enum { TI_MAX = 32, TI_CASES = 5, TI_GREEDY = 24 };

static struct {
    int rows, seqs, legs, tokens;
} ti_limits; /* of an engine that says nothing else; tokens: that its pages hold */
static td_pool *ti_pool;
static const td_ops *ti_ops;
static td_model *ti_model;
static uint32_t ti_V;
static int ti_depth = 1;
static te_spec ti_spec[TI_MAX];
static te_result ti_want[TI_MAX];
static te_watch ti_watch;
static td_engine_opts ti_current;

static inline td_engine *ti_open(td_engine_opts o)
{
    td_engine *e = NULL;
    o.model = ti_model, o.ops = ti_ops, o.pool = ti_pool;
    o.hash_key = (td_hkey){3, 4};
    if (!o.depth) o.depth = ti_depth;
    if (!o.page_size) o.page_size = 16;
    if (!o.max_batched_tokens) o.max_batched_tokens = ti_limits.rows;
    if (!o.max_seqs) o.max_seqs = ti_limits.seqs;
    if (!o.max_legs) o.max_legs = ti_limits.legs;
    if (!o.kv_pages) o.kv_pages = ti_limits.tokens / o.page_size;
    ti_current = o;
    if (td_engine_open(&o, &e) < 0) {
        T_OK(0, "%s", td_reason());
        exit(1);
    }
    ti_watch = (te_watch){&ti_current, e, 0, 0};
    td_engine_on_step(e, te_on_step, &ti_watch);
    return e;
}

static inline void ti_close(td_engine *e)
{
    te_drain(e);
    T_OK(te_ledger(e, true), "pages or legs are left");
    td_engine_close(e);
}

static inline bool ti_open_model(const char *dir)
{
    td_model_opts o = {.dir = dir,
                       .ops = ti_ops,
                       .pool = ti_pool,
                       .max_rows = ti_limits.rows,
                       .max_logits = td_engine_logit_rows(ti_limits.seqs)};
    ti_model = NULL;
    T_OK(td_model_open(&o, &ti_model) == TD_OK, "%s: %s", dir, td_reason());
    if (ti_model) ti_V = (uint32_t)td_model_descr(ti_model)->V;
    return ti_model != NULL;
}

/* ---- recorded continuations ---- */

static inline size_t ti_read_i32(const td_safetensors *f, const char *what, int k, int32_t *out, size_t most)
{
    char name[40];
    snprintf(name, sizeof name, "%s_%d", what, k);
    const td_st_tensor *t = td_safetensors_find(f, name);
    TD_CHECK(t && (size_t)t->shape[0] <= most && td_st_read_i32(t, out, (size_t)t->shape[0]) == TD_OK);
    return (size_t)t->shape[0];
}

/* Margins above this are no matter of rounding: twice the error that bfloat16 makes of the largest logit. */
static inline float ti_sure_margin(const td_safetensors *f)
{
    static float row[TE_MAX_PROMPT * 320];
    float err, most = 0;
    TD_CHECK(td_st_read_f32(td_safetensors_find(f, "err_bf16"), &err, 1) == TD_OK);
    for (int k = 0; k < TI_CASES; k++) {
        char name[40];
        snprintf(name, sizeof name, "logits_%d", k);
        const td_st_tensor *t = td_safetensors_find(f, name);
        size_t n = (size_t)t->shape[0] * ti_V;
        TD_CHECK(n <= TD_COUNT(row) && td_st_read_f32(t, row, n) == TD_OK);
        for (size_t i = 0; i < n; i++) most = fmaxf(most, fabsf(row[i]));
    }
    return strcmp(ti_ops->family, "ref") ? 2 * err * most : 2e-4f * most;
}

/* The engine's tokens are the recorded ones, up to the first that another arithmetic may choose differently.
 */
static inline uint32_t ti_compare_greedy(const te_result *r, const int32_t *ids, const float *margin,
                                         uint32_t n, float sure, const char *what)
{
    uint32_t i = 0;
    for (; i < n && i < r->n[0] && margin[i] > sure; i++)
        if (r->token[0][i] != (uint32_t)ids[i]) {
            T_OK(0, "%s: token %u is %u, recorded %d (margin %g)", what, i, r->token[0][i], ids[i],
                 (double)margin[i]);
            break;
        }
    return i;
}

/* The first n recorded cases of the open model, together, n_tokens each. Returns how many tokens were
 * compared. */
static inline uint32_t ti_compare_recorded(const char *dir, int n, uint32_t n_tokens)
{
    static te_spec s[TI_CASES];
    static te_result r[TI_CASES];
    char path[300];
    td_safetensors *f = NULL;
    int32_t ids[TE_MAX_PROMPT], greedy[TI_GREEDY];
    float margin[TI_GREEDY];
    uint32_t compared = 0;
    snprintf(path, sizeof path, "%s/golden.safetensors", dir);
    T_OK(td_safetensors_open(path, &f) == TD_OK, "%s", td_reason());
    if (!f) return 0;
    float sure = ti_sure_margin(f);
    for (int k = 0; k < n; k++) {
        size_t len = ti_read_i32(f, "ids", k, ids, TE_MAX_PROMPT);
        s[k] = te_make((uint64_t)k + 1, (uint32_t)len, n_tokens, ti_V);
        for (size_t i = 0; i < len; i++) s[k].prompt[i] = (uint32_t)ids[i];
    }
    td_engine *e = ti_open((td_engine_opts){.max_prefill_chunk = 20});
    te_run(e, s, r, (uint32_t)n);
    for (int k = 0; k < n; k++) {
        char name[40];
        snprintf(name, sizeof name, "margin_%d", k);
        ti_read_i32(f, "greedy", k, greedy, TI_GREEDY);
        TD_CHECK(td_st_read_f32(td_safetensors_find(f, name), margin, TI_GREEDY) == TD_OK);
        T_EQ(r[k].n[0], n_tokens);
        compared += ti_compare_greedy(&r[k], greedy, margin, TI_GREEDY, sure, dir);
        te_result_free(&r[k]);
    }
    ti_close(e);
    td_safetensors_close(f);
    return compared;
}

/* ---- identity ---- */

/* What each leg makes alone, with one step in flight, its prompt in one piece, without a cache. */
static inline void ti_make_expected(int n, uint32_t most_prompt, uint32_t most_out)
{
    te_rnd = 7;
    for (int i = 0; i < n; i++) {
        uint32_t len = i < 3 ? 1 + (uint32_t)i * 15 : 1 + te_draw(most_prompt);
        ti_spec[i] = te_make((uint64_t)i + 1, len, 1 + te_draw(most_out), ti_V);
        if (i % 3 == 1)
            memcpy(ti_spec[i].prompt, ti_spec[i - 1].prompt,
                   TD_MIN(len, ti_spec[i - 1].leg.n_prompt) * 2 / 3 * sizeof(uint32_t));
        if (i % 5) te_vary(&ti_spec[i], ti_V);
        if (i == 10) ti_spec[i].leg.sampling.n = 3;
        td_engine *e = ti_open((td_engine_opts){.depth = 1});
        te_run(e, &ti_spec[i], &ti_want[i], 1);
        ti_close(e);
    }
}

static inline void ti_free_expected(int n)
{
    for (int i = 0; i < n; i++) te_result_free(&ti_want[i]);
}

/* All legs once more, in another way. Returns how many were preempted. */
static inline uint64_t ti_vary(td_engine_opts o, uint32_t n, uint32_t together, bool twice, const char *why)
{
    char what[120];
    te_result *got = td_xalloc(TI_MAX * sizeof *got);
    td_engine *e = ti_open(o);
    td_engine_stats st;
    snprintf(what, sizeof what, "%s, %d in flight", why, ti_current.depth);
    for (int round = 0; round < 1 + twice; round++) {
        te_run_some(e, ti_spec, got, n, together);
        for (uint32_t i = 0; i < n; i++) te_same(&ti_spec[i], &ti_want[i], &got[i], what);
    }
    te_drain(e);
    td_engine_stats_get(e, &st);
    if (twice && o.prefix_cache && !o.kv_pages)
        T_OK(st.hit_tokens > 12 * n, "%s: %llu tokens hit", what, (unsigned long long)st.hit_tokens);
    T_OK(ti_current.depth > 1 || !st.discarded_rows);
    ti_close(e);
    for (int i = 0; i < TI_MAX; i++) te_result_free(&got[i]);
    free(got);
    return st.preemptions;
}

/* The longest of these legs and a page: the pool in which everything is preempted over and over. */
static inline int64_t ti_tight_pages(int n, uint32_t P)
{
    uint32_t most = 0;
    for (int i = 0; i < n; i++) {
        const td_sampling *p = &ti_spec[i].leg.sampling;
        uint32_t shared = ti_spec[i].leg.n_prompt / P, len = ti_spec[i].leg.n_prompt + p->max_tokens;
        most = TD_MAX(most, shared + p->n * ((len + P - 1) / P - shared + 1));
    }
    return most + 1;
}

#endif
