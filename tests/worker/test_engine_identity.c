// SPDX-License-Identifier: Apache-2.0
/* tests/worker/test_engine_identity.c - the engine over real models: the golden's greedy continuations, the
 * demo model's recorded answers, and the promise of the whole system: tokens, logprobs and prompt scores are
 * the same bytes however they were computed. test_engine.c makes the same promise over a model of hashes,
 * where no two contexts can be mistaken for each other; here the kernels take part. */
#include "common/json.h"
#include "common/log.h"
#include "tests/worker/support_handoff.h"
#include "tests/worker/support_identity.h"

enum { N = TI_MAX };

static void test_golden_greedy(const char *dir)
{
    uint32_t compared = ti_compare_recorded(dir, TI_CASES, TI_GREEDY);
    /* of mixtures of experts no margin is above what a flipped route changes (tests/worker/test_moe.c) */
    uint32_t fast = td_model_descr(ti_model)->moe.route.n_experts == 0;
    T_OK(compared >= (strcmp(ti_ops->family, "ref") ? fast : 60), "%s: %u tokens compared", dir, compared);
    if (getenv("VERBOSE"))
        printf("%s %s: %u of %d recorded tokens compared\n", dir, ti_ops->family, compared,
               TI_CASES * TI_GREEDY);
}

static uint32_t read_numbers(const td_json *list, uint32_t *ids, float *x, uint32_t most)
{
    uint32_t n = 0;
    for (const td_json *v = list ? list->child : NULL; v && n < most; v = v->next, n++) {
        if (ids) ids[n] = (uint32_t)v->i;
        if (x) x[n] = (float)v->num;
    }
    return n;
}

/* Many chats at once give the answers that were recorded one by one by another program. */
static void test_demo_model(void)
{
    enum { CHATS = 48 };
    static te_spec s[CHATS];
    static te_result r[CHATS];
    static int32_t answer[CHATS][TE_MAX_OUT];
    static float margin[CHATS][TE_MAX_OUT];
    uint32_t n_answer[CHATS], n = 0, compared = 0, all = 0;
    char *line = NULL;
    size_t cap = 0;
    float sure = strcmp(ti_ops->family, "ref") ? 0.25f : 1e-3f; /* as tests/e2e/test_questions.py */
    FILE *f = fopen("deploy/demo/questions.jsonl", "r");
    if (!f || !ti_open_model("deploy/demo/target")) {
        T_OK(0, "no demo model");
        exit(1);
    }
    const td_model_desc *d = td_model_descr(ti_model);
    while (n < CHATS && getline(&line, &cap, f) > 0) {
        td_arena a;
        td_json *j;
        td_arena_init(&a, 4 << 20);
        T_OK(td_json_parse(&a, line, strlen(line), (td_json_limits){0}, &j) == TD_OK, "%s", td_reason());
        s[n] = te_make(n + 1, 1, TE_MAX_OUT - 1, ti_V);
        s[n].leg.n_prompt = read_numbers(td_json_get(j, "prompt_ids"), s[n].prompt, NULL, TE_MAX_PROMPT);
        n_answer[n] = read_numbers(td_json_get(j, "answer_ids"), (uint32_t *)answer[n], NULL, TE_MAX_OUT);
        read_numbers(td_json_get(j, "margin"), NULL, margin[n], TE_MAX_OUT);
        s[n].leg.sampling.n_stop_ids = (uint32_t)TD_MIN(d->n_eos, 3);
        for (int i = 0; i < d->n_eos && i < 3; i++) s[n].stop[i] = (uint32_t)d->eos[i];
        td_arena_deinit(&a);
        n++;
    }
    free(line);
    fclose(f);
    td_engine *e = ti_open((td_engine_opts){.prefix_cache = true, .max_seqs = 24});
    te_run_some(e, s, r, n, 8);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t same = ti_compare_greedy(&r[i], answer[i], margin[i], n_answer[i], sure, "demo model");
        compared += same;
        all += n_answer[i];
        if (same == n_answer[i] && n_answer[i] < TE_MAX_OUT - 1)
            T_OK(r[i].n[0] == same && r[i].finish[0] == TD_FINISH_STOP, "chat %u", i);
        te_result_free(&r[i]);
    }
    T_OK(n == CHATS && compared > all * 3 / 4, "%u of %u recorded tokens compared", compared, all);
    if (getenv("VERBOSE"))
        printf("demo model %s: %u of %u recorded tokens compared\n", ti_ops->family, compared, all);
    ti_close(e);
    td_model_close(ti_model);
}

/* ---- identity ---- */

static void test_ways(bool all)
{
    static const int chunks[] = {1, 7, 16, 64}, pages[] = {8, 16, 64};
    char why[64];
    ti_vary((td_engine_opts){0}, N, N, false, "32 together");
    ti_vary((td_engine_opts){0}, N, 1, false, "arriving one by one");
    ti_vary((td_engine_opts){.max_batched_tokens = 40, .max_seqs = 12}, N, N, false, "40 rows a step");
    for (int i = 0; i < 4 && all; i++) {
        snprintf(why, sizeof why, "chunks of %d", chunks[i]);
        ti_vary((td_engine_opts){.max_prefill_chunk = chunks[i]}, N, N, false, why);
    }
    for (int i = 0; i < 3; i++) {
        snprintf(why, sizeof why, "pages of %d, cached", pages[i]);
        ti_vary((td_engine_opts){.page_size = pages[i], .prefix_cache = true, .max_prefill_chunk = 10 * i}, N,
                1 + (uint32_t)i * 8, true, why);
        snprintf(why, sizeof why, "few pages of %d", pages[i]);
        int64_t tight = ti_tight_pages(N, (uint32_t)pages[i]);
        td_engine_opts few = {
            .page_size = pages[i], .kv_pages = tight, .max_model_len = 130, .prefix_cache = i == 1};
        if (pages[i] < 64) T_OK(ti_vary(few, N, N, i == 1, why) > 0, "%s: no preemption", why);
    }
}

static void test_resume(void)
{
    te_result got = {0};
    td_engine *e = ti_open((td_engine_opts){.prefix_cache = true, .max_prefill_chunk = 9});
    for (int i = 0; i < N; i++)
        for (uint32_t at = 1; at < ti_want[i].n[0]; at += i % 5 ? 4 : 1) {
            te_spec s = ti_spec[i];
            s.leg.sampling.prompt_logprobs = -1;
            for (uint32_t c = 0; c < s.leg.sampling.n; c++) { /* choices at different points, some at none */
                s.n_resume[c] = TD_MIN(ti_want[i].n[c], at > 3 * c ? at - 3 * c : 0);
                memcpy(s.resume[c], ti_want[i].token[c], s.n_resume[c] * sizeof(uint32_t));
            }
            te_run(e, &s, &got, 1);
            for (uint32_t c = 0; c < s.leg.sampling.n; c++)
                T_OK(te_same_choice(&ti_want[i], c, &got, c), "leg %d choice %u resumed at %u", i, c, at);
        }
    ti_close(e);
    te_result_free(&got);
}

static void test_hand_off(int page_a, int page_b, int chunk, bool cache, bool lost)
{
    char why[96];
    snprintf(why, sizeof why, "hand-off, pages of %d and %d, chunk %d, cache %d, lost %d", page_a, page_b,
             chunk, cache, lost);
    te_result got = {0};
    td_engine *a =
        ti_open((td_engine_opts){.page_size = page_a, .prefix_cache = cache, .max_prefill_chunk = chunk});
    td_engine_on_step(a, NULL, NULL);
    td_engine *b = ti_open((td_engine_opts){.page_size = page_b, .prefix_cache = cache});
    for (int i = 0; i < N; i++) {
        te_spec s = ti_spec[i];
        te_hand_off(a, b, &s, &got, lost && i % 2, why);
        te_same(&ti_spec[i], &ti_want[i], &got, why);
        if (ti_want[i].n[0] < 2) continue;
        s.leg.sampling.prompt_logprobs = -1;
        for (uint32_t c = 0; c < s.leg.sampling.n; c++) { /* and once more, from the middle */
            s.n_resume[c] = TD_MIN(ti_want[i].n[c] - 1, 3 + 2 * c);
            memcpy(s.resume[c], ti_want[i].token[c], s.n_resume[c] * sizeof(uint32_t));
        }
        te_hand_off(a, b, &s, &got, lost && i % 2, why);
        for (uint32_t c = 0; c < s.leg.sampling.n; c++)
            T_OK(te_same_choice(&ti_want[i], c, &got, c), "%s: resumed leg %d choice %u", why, i, c);
    }
    ti_close(a);
    ti_close(b);
    te_result_free(&got);
}

/* Rows are planned before their tokens are known. */
static uint64_t preempted; /* with several steps in flight */

static void test_ahead(void)
{
    for (ti_depth = 2; ti_depth <= 3; ti_depth++) {
        td_engine_opts few = {.page_size = 8,
                              .kv_pages = ti_tight_pages(N, 8),
                              .max_model_len = 130,
                              .prefix_cache = ti_depth == 2};
        ti_vary((td_engine_opts){.max_batched_tokens = 40, .max_prefill_chunk = 16}, N, N, false,
                "chunks of 16, 40 rows a step");
        preempted += ti_vary(few, N, N, false, "few pages");
        if (ti_depth == 2) test_hand_off(16, 8, 20, true, false);
    }
    ti_depth = 1;
}

static void test_identity(const char *dir, bool all, bool ahead)
{
    ti_make_expected(N, 110, 16);
    test_ways(all);
    test_resume();
    test_hand_off(16, 16, 0, true, false);
    if (all) test_hand_off(8, 64, 0, false, false);
    test_hand_off(64, 8, 7, true, true);
    if (ahead) test_ahead();
    if (t_failed) printf("in %s with %s\n", dir, ti_ops->family);
    ti_free_expected(N);
}

static void test_family(const char *family)
{
    static const char *const dirs[] = {"tests/golden/models/llama-gqa", "tests/golden/models/mistral-swa",
                                       "tests/golden/models/qwen3", "tests/golden/models/mixtral"};
    if (td_ops_open(family, &ti_ops) < 0) {
        T_OK(0, "%s", td_reason());
        return;
    }
    for (size_t i = 0; i < TD_COUNT(dirs) && !t_failed; i++) {
        if (!ti_open_model(dirs[i])) return;
        test_golden_greedy(dirs[i]);
        test_identity(dirs[i], strcmp(family, "ref") == 0 && i < 2, i % 3 == 0);
        td_model_close(ti_model);
    }
    if (!t_failed) test_demo_model();
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    ti_pool = td_pool_open(2);
    ti_limits.rows = 256, ti_limits.seqs = 64, ti_limits.legs = 256, ti_limits.tokens = 40000;
    test_family("ref");
    test_family("auto");
    T_OK(preempted > 0, "no preemption with several steps in flight");
    td_pool_close(ti_pool);
    return T_DONE();
}
