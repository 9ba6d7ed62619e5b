// SPDX-License-Identifier: Apache-2.0
/* tests/worker/test_engine_identity.c - the engine over real models: the golden's greedy continuations, the
 * demo model's recorded answers, and the promise of the whole system: tokens, logprobs and prompt scores are
 * the same bytes however they were computed. test_engine.c makes the same promise over a model of hashes,
 * where no two contexts can be mistaken for each other; here the kernels take part. */
#include "common/json.h"
#include "common/log.h"
#include "tests/worker/support_handoff.h"
#include "worker/model/safetensors.h"

enum { N = 32, CASES = 5, GREEDY = 24 };

static td_pool *threads;
static const td_ops *ops;
static td_model *model;
static uint32_t V;
static te_spec spec[N];
static te_result want[N];
static te_watch watch;
static td_engine_opts current;

static td_engine *open_with(td_engine_opts o)
{
    td_engine *e = NULL;
    o.model = model, o.ops = ops, o.pool = threads;
    o.hash_key = (td_hkey){3, 4};
    if (!o.page_size) o.page_size = 16;
    if (!o.max_batched_tokens) o.max_batched_tokens = 256;
    if (!o.max_seqs) o.max_seqs = 64;
    if (!o.max_legs) o.max_legs = 256;
    if (!o.kv_pages) o.kv_pages = 40000 / o.page_size;
    current = o;
    if (td_engine_open(&o, &e) < 0) {
        T_OK(0, "%s", td_reason());
        exit(1);
    }
    watch = (te_watch){&current, e, 0, 0};
    td_engine_on_step(e, te_on_step, &watch);
    return e;
}

static void close_idle(td_engine *e)
{
    T_OK(te_ledger(e, true), "pages or legs are left");
    td_engine_close(e);
}

static bool open_model(const char *dir)
{
    td_model_opts o = {
        .dir = dir, .ops = ops, .pool = threads, .max_rows = 256, .max_logits = td_engine_logit_rows(64)};
    model = NULL;
    if (td_model_open(&o, &model) < 0) {
        T_OK(0, "%s: %s", dir, td_reason());
        return false;
    }
    V = (uint32_t)td_model_descr(model)->V;
    return true;
}

/* ---- recorded continuations ---- */

static size_t read_i32(const td_safetensors *f, const char *what, int k, int32_t *out, size_t most)
{
    char name[40];
    snprintf(name, sizeof name, "%s_%d", what, k);
    const td_st_tensor *t = td_safetensors_find(f, name);
    if (!t || (size_t)t->shape[0] > most || td_st_read_i32(t, out, (size_t)t->shape[0]) < 0) {
        T_OK(0, "%s", name);
        exit(1);
    }
    return (size_t)t->shape[0];
}

/* The engine's tokens are the recorded ones, up to the first that another arithmetic may choose differently.
 */
static uint32_t compare_greedy(const te_result *r, const int32_t *ids, const float *margin, uint32_t n,
                               float sure, const char *what)
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

/* Margins above this are no matter of rounding: twice the error that bfloat16 makes of the largest logit. */
static float sure_margin(const td_safetensors *f)
{
    float err, most = 0;
    static float row[TE_MAX_PROMPT * 320];
    T_OK(td_st_read_f32(td_safetensors_find(f, "err_bf16"), &err, 1) == TD_OK);
    for (int k = 0; k < CASES; k++) {
        char name[40];
        snprintf(name, sizeof name, "logits_%d", k);
        const td_st_tensor *t = td_safetensors_find(f, name);
        size_t n = (size_t)t->shape[0] * V;
        T_OK(n <= TD_COUNT(row) && td_st_read_f32(t, row, n) == TD_OK);
        for (size_t i = 0; i < n; i++) most = fmaxf(most, fabsf(row[i]));
    }
    return strcmp(ops->family, "ref") ? 2 * err * most : 2e-4f * most;
}

static void test_golden_greedy(const char *dir)
{
    char path[300];
    td_safetensors *f;
    te_spec s[CASES];
    te_result r[CASES] = {0};
    int32_t ids[TE_MAX_PROMPT], greedy[GREEDY];
    float margin[GREEDY];
    uint32_t compared = 0;
    snprintf(path, sizeof path, "%s/golden.safetensors", dir);
    if (td_safetensors_open(path, &f) < 0) {
        T_OK(0, "%s", td_reason());
        return;
    }
    float sure = sure_margin(f);
    for (int k = 0; k < CASES; k++) {
        size_t n = read_i32(f, "ids", k, ids, TE_MAX_PROMPT);
        s[k] = te_make((uint64_t)k + 1, (uint32_t)n, GREEDY, V);
        for (size_t i = 0; i < n; i++) s[k].prompt[i] = (uint32_t)ids[i];
    }
    td_engine *e = open_with((td_engine_opts){.max_prefill_chunk = 20});
    te_run(e, s, r, CASES);
    for (int k = 0; k < CASES; k++) {
        char name[40];
        snprintf(name, sizeof name, "margin_%d", k);
        read_i32(f, "greedy", k, greedy, GREEDY);
        T_OK(td_st_read_f32(td_safetensors_find(f, name), margin, GREEDY) == TD_OK);
        T_EQ(r[k].n[0], GREEDY);
        compared += compare_greedy(&r[k], greedy, margin, GREEDY, sure, dir);
        te_result_free(&r[k]);
    }
    /* of mixtures of experts no margin is above what a flipped route changes (tests/worker/test_moe.c) */
    uint32_t fast = td_model_descr(model)->moe.route.n_experts == 0;
    T_OK(compared >= (strcmp(ops->family, "ref") ? fast : 60), "%s: %u tokens compared", dir, compared);
    if (getenv("VERBOSE"))
        printf("%s %s: %u of %d recorded tokens compared\n", dir, ops->family, compared, CASES * GREEDY);
    close_idle(e);
    td_safetensors_close(f);
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
    FILE *f = fopen("../shared/demo-model/questions.jsonl", "r");
    if (!f) {
        printf("demo model: not here, left out\n");
        return;
    }
    if (!open_model("../shared/demo-model/target")) exit(1);
    const td_model_desc *d = td_model_descr(model);
    while (n < CHATS && getline(&line, &cap, f) > 0) {
        td_arena a;
        td_json *j;
        td_arena_init(&a, 4 << 20);
        T_OK(td_json_parse(&a, line, strlen(line), (td_json_limits){0}, &j) == TD_OK, "%s", td_reason());
        s[n] = te_make(n + 1, 1, TE_MAX_OUT - 1, V);
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
    td_engine *e = open_with((td_engine_opts){.prefix_cache = true, .max_seqs = 24});
    te_run_some(e, s, r, n, 8);
    for (uint32_t i = 0; i < n; i++) {
        uint32_t same = compare_greedy(&r[i], answer[i], margin[i], n_answer[i], 0.5f, "demo model");
        compared += same;
        all += n_answer[i];
        if (same == n_answer[i] && n_answer[i] < TE_MAX_OUT - 1)
            T_OK(r[i].n[0] == same && r[i].finish[0] == TD_FINISH_STOP, "chat %u", i);
        te_result_free(&r[i]);
    }
    T_OK(n == CHATS && compared > all * 3 / 4, "%u of %u recorded tokens compared", compared, all);
    if (getenv("VERBOSE"))
        printf("demo model %s: %u of %u recorded tokens compared\n", ops->family, compared, all);
    close_idle(e);
    td_model_close(model);
}

/* ---- identity ---- */

static void compare_all(te_result *got, const char *why)
{
    for (int i = 0; i < N; i++) te_same(&spec[i], &want[i], &got[i], why);
}

/* What each leg makes alone, its prompt in one piece, without a cache. */
static void make_expected(void)
{
    te_rnd = 7;
    for (int i = 0; i < N; i++) {
        uint32_t n = i < 3 ? 1 + (uint32_t)i * 15 : 1 + te_draw(110);
        spec[i] = te_make((uint64_t)i + 1, n, 1 + te_draw(16), V);
        if (i % 3 == 1)
            memcpy(spec[i].prompt, spec[i - 1].prompt,
                   TD_MIN(n, spec[i - 1].leg.n_prompt) * 2 / 3 * sizeof(uint32_t));
        if (i % 5) te_vary(&spec[i], V);
        if (i == 10) spec[i].leg.sampling.n = 3;
        td_engine *e = open_with((td_engine_opts){0});
        te_run(e, &spec[i], &want[i], 1);
        close_idle(e);
    }
}

static void vary(td_engine_opts o, uint32_t together, bool twice, const char *why)
{
    te_result *got = td_xalloc(N * sizeof *got);
    td_engine *e = open_with(o);
    td_engine_stats st;
    for (int round = 0; round < 1 + twice; round++) {
        te_run_some(e, spec, got, N, together);
        compare_all(got, why);
    }
    td_engine_stats_get(e, &st);
    if (twice && o.prefix_cache && !o.kv_pages)
        T_OK(st.hit_tokens > 400, "%s: %llu tokens hit", why, (unsigned long long)st.hit_tokens);
    if (o.kv_pages) T_OK(st.preemptions > 0, "%s: no preemption", why);
    close_idle(e);
    for (int i = 0; i < N; i++) te_result_free(&got[i]);
    free(got);
}

/* The longest of these legs and a page: the pool in which everything is preempted over and over. */
static int64_t tight_pages(int P)
{
    uint32_t most = 0;
    for (int i = 0; i < N; i++) {
        const td_sampling *p = &spec[i].leg.sampling;
        uint32_t shared = spec[i].leg.n_prompt / (uint32_t)P, len = spec[i].leg.n_prompt + p->max_tokens;
        most = TD_MAX(most, shared + p->n * ((len + (uint32_t)P - 1) / (uint32_t)P - shared + 1));
    }
    return most + 1;
}

static void test_ways(bool all)
{
    static const int chunks[] = {1, 7, 16, 64}, pages[] = {8, 16, 64};
    char why[64];
    vary((td_engine_opts){0}, N, false, "32 together");
    vary((td_engine_opts){0}, 1, false, "arriving one by one");
    vary((td_engine_opts){.max_batched_tokens = 40, .max_seqs = 12}, N, false, "40 rows a step");
    for (int i = 0; i < 4 && all; i++) {
        snprintf(why, sizeof why, "chunks of %d", chunks[i]);
        vary((td_engine_opts){.max_prefill_chunk = chunks[i]}, N, false, why);
    }
    for (int i = 0; i < 3; i++) {
        snprintf(why, sizeof why, "pages of %d, cached", pages[i]);
        vary((td_engine_opts){.page_size = pages[i], .prefix_cache = true, .max_prefill_chunk = 10 * i},
             1 + (uint32_t)i * 8, true, why);
        snprintf(why, sizeof why, "few pages of %d", pages[i]);
        int64_t tight = tight_pages(pages[i]);
        if (pages[i] < 64)
            vary(
                (td_engine_opts){
                    .page_size = pages[i], .kv_pages = tight, .max_model_len = 130, .prefix_cache = i == 1},
                N, i == 1, why);
    }
}

static void test_resume(void)
{
    te_result got = {0};
    td_engine *e = open_with((td_engine_opts){.prefix_cache = true, .max_prefill_chunk = 9});
    for (int i = 0; i < N; i++)
        for (uint32_t at = 1; at < want[i].n[0]; at += i % 5 ? 4 : 1) {
            te_spec s = spec[i];
            s.leg.sampling.prompt_logprobs = -1;
            for (uint32_t c = 0; c < s.leg.sampling.n; c++) { /* choices at different points, some at none */
                s.n_resume[c] = TD_MIN(want[i].n[c], at > 3 * c ? at - 3 * c : 0);
                memcpy(s.resume[c], want[i].token[c], s.n_resume[c] * sizeof(uint32_t));
            }
            te_run(e, &s, &got, 1);
            for (uint32_t c = 0; c < s.leg.sampling.n; c++)
                T_OK(te_same_choice(&want[i], c, &got, c), "leg %d choice %u resumed at %u", i, c, at);
        }
    close_idle(e);
    te_result_free(&got);
}

static void test_hand_off(int page_a, int page_b, int chunk, bool cache, bool lost)
{
    char why[96];
    snprintf(why, sizeof why, "hand-off, pages of %d and %d, chunk %d, cache %d, lost %d", page_a, page_b,
             chunk, cache, lost);
    te_result got = {0};
    td_engine *a =
        open_with((td_engine_opts){.page_size = page_a, .prefix_cache = cache, .max_prefill_chunk = chunk});
    td_engine_on_step(a, NULL, NULL);
    td_engine *b = open_with((td_engine_opts){.page_size = page_b, .prefix_cache = cache});
    for (int i = 0; i < N; i++) {
        te_spec s = spec[i];
        te_hand_off(a, b, &s, &got, lost && i % 2, why);
        te_same(&spec[i], &want[i], &got, why);
        if (want[i].n[0] < 2) continue;
        s.leg.sampling.prompt_logprobs = -1;
        for (uint32_t c = 0; c < s.leg.sampling.n; c++) { /* and once more, from the middle */
            s.n_resume[c] = TD_MIN(want[i].n[c] - 1, 3 + 2 * c);
            memcpy(s.resume[c], want[i].token[c], s.n_resume[c] * sizeof(uint32_t));
        }
        te_hand_off(a, b, &s, &got, lost && i % 2, why);
        for (uint32_t c = 0; c < s.leg.sampling.n; c++)
            T_OK(te_same_choice(&want[i], c, &got, c), "%s: resumed leg %d choice %u", why, i, c);
    }
    close_idle(a);
    close_idle(b);
    te_result_free(&got);
}

static void test_identity(const char *dir, bool all)
{
    make_expected();
    test_ways(all);
    test_resume();
    test_hand_off(16, 16, 0, true, false);
    if (all) test_hand_off(8, 64, 0, false, false);
    test_hand_off(64, 8, 7, true, true);
    if (t_failed) printf("in %s with %s\n", dir, ops->family);
    for (int i = 0; i < N; i++) te_result_free(&want[i]);
}

static void test_family(const char *family)
{
    static const char *const dirs[] = {"tests/golden/models/llama-gqa", "tests/golden/models/mistral-swa",
                                       "tests/golden/models/qwen3", "tests/golden/models/mixtral"};
    if (td_ops_open(family, &ops) < 0) {
        T_OK(0, "%s", td_reason());
        return;
    }
    for (size_t i = 0; i < TD_COUNT(dirs) && !t_failed; i++) {
        if (!open_model(dirs[i])) return;
        test_golden_greedy(dirs[i]);
        test_identity(dirs[i], strcmp(family, "ref") == 0 && i < 2);
        td_model_close(model);
    }
    if (!t_failed) test_demo_model();
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    threads = td_pool_open(2);
    test_family("ref");
    test_family("auto");
    td_pool_close(threads);
    return T_DONE();
}
