// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_engine_cuda.c - the engine with everything that kernels touch in a device's memory: a leg's tokens,
 * logprobs and scores are the same bytes alone, batched, in chunks, after prefix hits and after preemption; greedy tokens are
 * the golden's up to the first choice that rounding may change; a device that fails ends in one error, and stays so.
 *
 * On the shim device memory cannot be touched by the host but in copies and launches (option "hide"). */
#include "common/conf.h"
#include "common/log.h"
#include "kernels/cuda.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"
#include "tests/worker/support_engine.h"
#include "worker/boot.h"
#include "worker/model/safetensors.h"
#include "worker/ranks.h"
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

enum { N = 12, CASES = 5, GREEDY = 24, MAX_ROWS = 128, READ = 42 };

#ifdef __SANITIZE_ADDRESS__
enum { CATCHES_WILD = 0 }; /* AddressSanitizer ends the process before the shim sees the fault */
#else
enum { CATCHES_WILD = 1 };
#endif

static td_pool *threads;
static const td_ops *cuda;
static td_model *model;
static uint32_t V;
static te_spec spec[N];
static te_result want[N];
static te_watch watch;
static td_engine_opts current;

static td_engine *open_with(td_engine_opts o)
{
    td_engine *e = NULL;
    o.model = model, o.ops = cuda, o.pool = threads;
    o.hash_key = (td_hkey){3, 4};
    if (!o.page_size) o.page_size = 16;
    if (!o.max_batched_tokens) o.max_batched_tokens = MAX_ROWS;
    if (!o.max_seqs) o.max_seqs = 32;
    if (!o.max_legs) o.max_legs = 64;
    if (!o.kv_pages) o.kv_pages = 4000 / o.page_size;
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

static bool open_model(const char *name)
{
    char dir[200];
    snprintf(dir, sizeof dir, "tests/golden/models/%s", name);
    td_model_opts o = {.dir = dir, .ops = cuda, .pool = threads, .max_rows = MAX_ROWS, .max_logits = td_engine_logit_rows(32)};
    model = NULL;
    T_OK(td_model_open(&o, &model) == TD_OK, "%s: %s", name, td_reason());
    if (model) V = (uint32_t)td_model_descr(model)->V;
    return model != NULL;
}

/* ---- the trap itself ---- */

static void test_hidden(void)
{
    if (simt_set_option("hide", 1) < 0) return; /* a device hides its memory by itself */
    volatile char *p = dev_new(64);
    pid_t child = fork();
    if (!child) _exit(p[0] == 1 ? READ : READ + 1);
    int how = 0;
    T_OK(child > 0 && waitpid(child, &how, 0) == child && (WIFSIGNALED(how) || WEXITSTATUS(how) < READ), "the host can read device memory");
    dev_done();
}

/* ---- recorded continuations ---- */

static size_t read_i32(const td_safetensors *f, const char *what, int k, int32_t *out, size_t most)
{
    char name[40];
    snprintf(name, sizeof name, "%s_%d", what, k);
    const td_st_tensor *t = td_safetensors_find(f, name);
    TD_CHECK(t && (size_t)t->shape[0] <= most && td_st_read_i32(t, out, (size_t)t->shape[0]) == TD_OK);
    return (size_t)t->shape[0];
}

/* Twice the error that bfloat16 makes of the largest logit. */
static float sure_margin(const td_safetensors *f)
{
    static float row[TE_MAX_PROMPT * 320];
    float err, most = 0;
    TD_CHECK(td_st_read_f32(td_safetensors_find(f, "err_bf16"), &err, 1) == TD_OK);
    for (int k = 0; k < CASES; k++) {
        char name[40];
        snprintf(name, sizeof name, "logits_%d", k);
        const td_st_tensor *t = td_safetensors_find(f, name);
        size_t n = (size_t)t->shape[0] * V;
        TD_CHECK(n <= TD_COUNT(row) && td_st_read_f32(t, row, n) == TD_OK);
        for (size_t i = 0; i < n; i++) most = fmaxf(most, fabsf(row[i]));
    }
    return 2 * err * most;
}

static uint32_t compare_greedy(const td_safetensors *f, int k, const te_result *r, float sure)
{
    int32_t greedy[GREEDY];
    float margin[GREEDY];
    char name[40];
    uint32_t i = 0;
    snprintf(name, sizeof name, "margin_%d", k);
    read_i32(f, "greedy", k, greedy, GREEDY);
    TD_CHECK(td_st_read_f32(td_safetensors_find(f, name), margin, GREEDY) == TD_OK);
    for (; i < r->n[0] && margin[i] > sure; i++)
        if (r->token[0][i] != (uint32_t)greedy[i]) {
            T_OK(0, "case %d: token %u is %u, recorded %d (margin %g)", k, i, r->token[0][i], greedy[i], (double)margin[i]);
            break;
        }
    return i;
}

static void test_golden(const char *name)
{
    char path[300];
    td_safetensors *f = NULL;
    static te_spec s[CASES];
    static te_result r[CASES];
    int32_t ids[TE_MAX_PROMPT];
    uint32_t compared = 0;
    snprintf(path, sizeof path, "tests/golden/models/%s/golden.safetensors", name);
    T_OK(td_safetensors_open(path, &f) == TD_OK, "%s", td_reason());
    if (!f || !open_model(name)) return;
    float sure = sure_margin(f);
    int n = simt_checks() ? 1 : CASES;
    for (int k = 0; k < n; k++) {
        size_t len = read_i32(f, "ids", k, ids, TE_MAX_PROMPT);
        s[k] = te_make((uint64_t)k + 1, (uint32_t)len, simt_checks() ? 4 : GREEDY, V);
        for (size_t i = 0; i < len; i++) s[k].prompt[i] = (uint32_t)ids[i];
    }
    td_engine *e = open_with((td_engine_opts){.max_prefill_chunk = 20});
    te_run(e, s, r, (uint32_t)n);
    for (int k = 0; k < n; k++) {
        compared += compare_greedy(f, k, &r[k], sure);
        te_result_free(&r[k]);
    }
    T_OK(compared || simt_checks(), "%s: %u tokens compared", name, compared);
    close_idle(e);
    td_model_close(model);
    td_safetensors_close(f);
}

/* ---- identity ---- */

/* What each leg makes alone, its prompt in one piece, without a cache. */
static void make_expected(int n)
{
    te_rnd = 7;
    for (int i = 0; i < n; i++) {
        uint32_t len = i < 3 ? 1 + (uint32_t)i * 15 : 1 + te_draw(60);
        spec[i] = te_make((uint64_t)i + 1, len, 1 + te_draw(8), V);
        if (i % 3 == 1) memcpy(spec[i].prompt, spec[i - 1].prompt, TD_MIN(len, spec[i - 1].leg.n_prompt) * 2 / 3 * sizeof(uint32_t));
        if (i % 5) te_vary(&spec[i], V);
        if (i == 6) spec[i].leg.sampling.n = 3;
        td_engine *e = open_with((td_engine_opts){0});
        te_run(e, &spec[i], &want[i], 1);
        close_idle(e);
    }
}

static void vary(td_engine_opts o, uint32_t n, uint32_t together, bool twice, const char *why)
{
    te_result *got = td_xalloc(N * sizeof *got);
    td_engine *e = open_with(o);
    td_engine_stats st;
    for (int round = 0; round < 1 + twice; round++) {
        te_run_some(e, spec, got, n, together);
        for (uint32_t i = 0; i < n; i++) te_same(&spec[i], &want[i], &got[i], why);
    }
    td_engine_stats_get(e, &st);
    if (twice) T_OK(st.hit_tokens > 50, "%s: %llu tokens hit", why, (unsigned long long)st.hit_tokens);
    if (o.kv_pages && !strcmp(td_model_descr(model)->arch, "LlamaForCausalLM")) T_OK(st.preemptions > 0, "%s: no preemption", why);
    close_idle(e);
    for (int i = 0; i < N; i++) te_result_free(&got[i]);
    free(got);
}

/* The longest of these legs and a page: everything is preempted over and over. */
static int64_t tight_pages(uint32_t P)
{
    uint32_t most = 0;
    for (int i = 0; i < N; i++) {
        const td_sampling *p = &spec[i].leg.sampling;
        uint32_t shared = spec[i].leg.n_prompt / P, len = spec[i].leg.n_prompt + p->max_tokens;
        most = TD_MAX(most, shared + p->n * ((len + P - 1) / P - shared + 1));
    }
    return most + 1;
}

static void test_ways(const char *name, bool all)
{
    int n = simt_checks() ? 3 : N;
    if (!open_model(name)) return;
    make_expected(n);
    vary((td_engine_opts){0}, (uint32_t)n, (uint32_t)n, false, "all together");
    if (all) {
        vary((td_engine_opts){.max_prefill_chunk = 7, .max_batched_tokens = 40}, N, 3, false, "chunks of 7");
        vary((td_engine_opts){.page_size = 8, .prefix_cache = true}, N, 1, true, "pages of 8, cached");
    }
    if (!simt_checks())
        vary((td_engine_opts){.page_size = 8, .kv_pages = tight_pages(8), .max_model_len = 80}, N, N, false, "few pages");
    if (t_failed) printf("in %s\n", name);
    for (int i = 0; i < N; i++) te_result_free(&want[i]);
    td_model_close(model);
}

/* ---- what does not go well ---- */

static void test_refused(void)
{
    td_ranks two = {.grid = {.tp = 2, .pp = 1, .cp = 1, .dp = 1}};
    td_model_opts o = {.dir = "tests/golden/models/llama-gqa", .ops = cuda, .pool = threads, .max_rows = 16, .max_logits = 16, .ranks = &two};
    td_model *m = NULL;
    T_EQ(td_model_open(&o, &m), TD_ENOSUP);
    T_OK(strstr(td_reason(), "cuda") && strstr(td_reason(), "2 ranks"), "%s", td_reason());
    if (!open_model("llama-gqa")) return;
    td_engine *e = NULL;
    td_engine_opts much = {.model = model, .ops = cuda, .pool = threads, .page_size = 16, .kv_pages = 100000000, .max_batched_tokens = 64,
                           .max_seqs = 1, .max_legs = 1};
    T_EQ(td_engine_open(&much, &e), TD_EFULL);
    T_OK(strstr(td_reason(), "free"), "%s", td_reason());
    td_model_close(model);
}

static td_status (*real_upload)(td_dev *d, td_stream_kind s, void *dst, const void *src, size_t bytes);
static int uploads_left;

static td_status failing_upload(td_dev *d, td_stream_kind s, void *dst, const void *src, size_t bytes)
{
    if (uploads_left-- > 0) return real_upload(d, s, dst, src, bytes);
    return td_fail(TD_EDEVICE, "CUDA: upload: planted");
}

/* The step's error, and the same answer ever after. */
static void expect_end(td_engine *e, const char *text)
{
    td_engine_out out;
    td_status s = TD_OK;
    for (int i = 0; i < 50 && s >= 0; i++) s = td_engine_turn(e, &out);
    T_EQ(s, TD_EDEVICE);
    T_OK(strstr(td_reason(), text) != NULL, "%s", td_reason());
    T_EQ(td_engine_turn(e, &out), TD_EDEVICE);
}

static void test_device_fails(void)
{
    te_spec s = te_make(1, 20, 10, 320);
    real_upload = dev()->upload;
    for (int at = 0; at < 6; at++) {
        if (!open_model("llama-gqa")) return;
        td_engine *e = open_with((td_engine_opts){.max_prefill_chunk = 8});
        T_EQ(td_engine_start(e, te_leg(&s)), TD_OK);
        uploads_left = at;
        dev()->upload = failing_upload;
        expect_end(e, "planted");
        dev()->upload = real_upload;
        td_engine_close(e);
        td_model_close(model);
        (void)td_cuda_ops_status();
    }
    if (!open_model("llama-gqa")) return;
    td_engine *e = open_with((td_engine_opts){0});
    T_EQ(td_engine_start(e, te_leg(&s)), TD_OK);
    simt_quiet(1);
    if (CATCHES_WILD && simt_set_option("order", 0) >= 0) { /* a wild pointer: on a device the process would be lost to later cases */
        cuda->rmsnorm(threads, (const float *)64, 64, (const float *)64, 1, 1, 64, (float *)64, 64);
        expect_end(e, "norm");
        simt_clear_error();
    }
    simt_quiet(0);
    td_engine_close(e);
    td_model_close(model);
    (void)td_cuda_ops_status();
}

/* ---- boot ---- */

static void test_boot(void)
{
    static td_conf c;
    static td_boot b;
    static te_result r;
    char *argv[] = {"logits", "--ops", "cuda", "--no-pack-cache", "--max-model-len", "100", "--max-num-seqs", "4",
                    "--max-num-batched-tokens", "64", "--threads", "1"};
    int n = 0;
    const char *none[1];
    te_spec s = te_make(1, 9, 5, 320);
    T_OK(td_conf_parse(&c, TD_CONF_LOGITS, TD_COUNT(argv), argv, none, 1, &n) == TD_OK, "%s", td_reason());
    td_ranks two = {.grid = {.tp = 2, .pp = 1, .cp = 1, .dp = 1}};
    T_EQ(td_boot_open(&c, "tests/golden/models/llama-gqa", 0, &two, &b), TD_ENOSUP);
    T_OK(strstr(td_reason(), "--ops cuda on 2 ranks") != NULL, "%s", td_reason());
    if (td_boot_open(&c, "tests/golden/models/llama-gqa", 0, NULL, &b) == TD_OK) {
        td_engine *e = NULL;
        T_OK(!strcmp(b.ops->family, "cuda") && b.dev, "%s", b.ops->family);
        T_OK(td_engine_open(&b.opts, &e) == TD_OK, "%s", td_reason());
        if (e) te_run(e, &s, &r, 1);
        T_EQ(r.n[0], 5);
        td_engine_close(e);
        td_boot_close(&b);
        te_result_free(&r);
    } else {
        T_OK(0, "%s", td_reason());
    }
    td_conf_deinit(&c);
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    threads = td_pool_open(1);
    test_hidden();
    T_OK(td_cuda_ops_open(dev(), &cuda) == TD_OK, "%s", td_reason());
    if (cuda) {
        test_golden("llama-gqa");
        test_ways("llama-gqa", !simt_checks());
        if (!simt_checks()) test_ways("mistral-swa", false);
        if (!simt_checks()) test_ways("mixtral", false);
        test_refused();
        test_device_fails();
        td_replay_stats r;
        cuda->replay->stats(&r);
        T_OK(r.runs > r.recorded && r.recorded > 0, "%llu steps were replayed of %llu recordings", (unsigned long long)r.runs, (unsigned long long)r.recorded);
        td_cuda_ops_close();
        test_boot();
    }
    td_dev_close(dev());
    td_pool_close(threads);
    return T_DONE();
}
