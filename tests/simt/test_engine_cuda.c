// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_engine_cuda.c - the engine with everything that kernels touch in a device's memory: a leg's tokens,
 * logprobs and scores are the same bytes alone, batched, in chunks, after prefix hits and after preemption; greedy tokens are
 * the golden's up to the first choice that rounding may change; a device that fails ends in one error, and stays so.
 *
 * On the shim device memory cannot be touched by the host but in copies and launches (option "hide"). */
#include "common/log.h"
#include "kernels/cuda.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"
#include "tests/worker/support_identity.h"
#include "worker/ranks.h"
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

enum { N = 12, READ = 42 };

#ifdef __SANITIZE_ADDRESS__
enum { CATCHES_WILD = 0 }; /* AddressSanitizer ends the process before the shim sees the fault */
#else
enum { CATCHES_WILD = 1 };
#endif

static bool open_named(const char *name)
{
    char dir[200];
    snprintf(dir, sizeof dir, "tests/golden/models/%s", name);
    return ti_open_model(dir);
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

/* ---- tokens ---- */

static void test_golden(const char *name)
{
    char dir[200];
    snprintf(dir, sizeof dir, "tests/golden/models/%s", name);
    if (!ti_open_model(dir)) return;
    uint32_t compared = ti_compare_recorded(dir, simt_checks() ? 1 : TI_CASES, simt_checks() ? 4 : TI_GREEDY);
    T_OK(compared || simt_checks(), "%s: %u tokens compared", name, compared);
    td_model_close(ti_model);
}

/* Hiding memory costs as much again as the kernels do: one run of each model shows what it shows. */
static void test_ways(const char *name, bool all)
{
    int n = simt_checks() ? 3 : N, hidden = simt_set_option("hide", 0);
    if (!open_named(name)) return;
    ti_make_expected(n, 60, 8);
    simt_set_option("hide", hidden > 0);
    ti_vary((td_engine_opts){.depth = 2}, (uint32_t)n, (uint32_t)n, false, "all together");
    simt_set_option("hide", 0);
    if (all) { /* two in flight, as a device has by default */
        ti_vary((td_engine_opts){0}, (uint32_t)n, (uint32_t)n, false, "all together");
        ti_vary((td_engine_opts){.depth = 2, .max_prefill_chunk = 7, .max_batched_tokens = 40}, N, 3, false,
                "chunks of 7");
        ti_vary((td_engine_opts){.depth = 2, .page_size = 8, .prefix_cache = true}, N, 1, true,
                "pages of 8, cached");
    }
    for (ti_depth = 3 - 2 * all; ti_depth <= 3 && !simt_checks(); ti_depth += 2) {
        td_engine_opts few = {.page_size = 8, .kv_pages = ti_tight_pages(N, 8), .max_model_len = 80};
        T_OK(ti_vary(few, N, N, false, "few pages") > 0 || !all, "no preemption");
    }
    ti_depth = 1;
    simt_set_option("hide", hidden);
    if (t_failed) printf("in %s\n", name);
    ti_free_expected(n);
    td_model_close(ti_model);
}

/* ---- waits ---- */

static td_dev real;
static long n_waits, n_blocks;
static long n_records, past; /* records so far; the last one that somebody has waited for, and so all before it */
static struct {
    td_event *e;
    long at; /* its last record; 0: before they were counted */
} record[64];

static td_status count_record(td_dev *d, td_stream_kind s, td_event *e)
{
    int i = 0;
    while (record[i].e && record[i].e != e) i++;
    TD_CHECK(i + 1 < (int)TD_COUNT(record));
    record[i].e = e, record[i].at = ++n_records;
    return real.record(d, s, e);
}
static td_status count_sync(td_dev *d, td_stream_kind s)
{
    past = n_records;
    return n_waits++, real.sync(d, s);
}
/* A wait, unless what was recorded later has been waited for. */
static td_status count_await(td_dev *d, td_event *e)
{
    int i = 0;
    while (record[i].e && record[i].e != e) i++;
    n_waits += record[i].at > past;
    past = TD_MAX(past, record[i].at);
    return real.await(d, e);
}
static td_status count_alloc(td_dev *d, size_t bytes, void **out)
{
    return n_blocks++, real.alloc(d, bytes, out);
}
static td_status count_alloc_host(td_dev *d, size_t bytes, void **out)
{
    return n_blocks++, real.alloc_host(d, bytes, out);
}
static td_status count_event(td_dev *d, td_event **out)
{
    return n_blocks++, real.event_open(d, out);
}

/* Nothing but the read of its tokens waits in a step of decode rows, and nothing is allocated. With three in flight a
 * block is written again when the transfer before the last step but one is past, which the last read of tokens does
 * not tell: that await is counted, and is short. */
static void test_waits(int depth)
{
    enum { LEGS = 3, WARM = 8, STEPS = 16 };
    static te_spec s[LEGS];
    static te_result r[LEGS];
    td_engine_stats before, after;
    td_engine_out o;
    if (!open_named("llama-gqa")) return;
    td_engine *e = ti_open((td_engine_opts){.depth = depth, .max_model_len = 100, .prefix_cache = true});
    real = *dev();
    memset(record, 0, sizeof record);
    n_records = past = 0;
    dev()->sync = count_sync, dev()->await = count_await, dev()->record = count_record;
    dev()->alloc = count_alloc, dev()->alloc_host = count_alloc_host, dev()->event_open = count_event;
    for (uint32_t i = 0; i < LEGS; i++) {
        s[i] = te_make(i + 1, 10 + 15 * i, 60, ti_V);
        s[i].leg.sampling.temperature = (float)i;
        s[i].leg.sampling.n = 1 + i % 2;
        te_expect(&s[i], &r[i]);
        T_EQ(td_engine_start(e, te_leg(&s[i])), TD_OK);
    }
    for (int i = 0; i < WARM; i++) T_EQ(td_engine_turn(e, &o), TD_OK);
    td_engine_stats_get(e, &before);
    n_waits = n_blocks = 0;
    for (int i = 0; i < STEPS; i++) {
        T_EQ(td_engine_turn(e, &o), TD_OK);
        T_EQ(o.n_tokens, 4);
    }
    td_engine_stats_get(e, &after);
    T_EQ(after.steps - before.steps, STEPS);
    T_EQ(n_waits, depth < 3 ? STEPS : 2 * STEPS);
    T_EQ(n_blocks, 0);
    for (uint32_t i = 0; i < LEGS; i++) T_EQ(td_engine_cancel(e, i + 1), TD_OK);
    dev()->sync = real.sync, dev()->await = real.await, dev()->record = real.record;
    dev()->alloc = real.alloc, dev()->alloc_host = real.alloc_host, dev()->event_open = real.event_open;
    ti_close(e);
    td_model_close(ti_model);
}

/* ---- what does not go well ---- */

static void test_refused(void)
{
    td_ranks two = {.grid = {.tp = 2, .pp = 1, .cp = 1, .dp = 1}};
    td_model_opts o = {.dir = "tests/golden/models/llama-gqa",
                       .ops = ti_ops,
                       .pool = ti_pool,
                       .max_rows = 16,
                       .max_logits = 16,
                       .ranks = &two};
    td_model *m = NULL;
    T_EQ(td_model_open(&o, &m), TD_EBADREQ); /* groups for the device's memory were not opened */
    T_OK(strstr(td_reason(), "td_ranks_device"), "%s", td_reason());
    o.ranks = NULL, o.attn_split = 128;
    T_EQ(td_model_open(&o, &m), TD_ENOSUP);
    T_OK(strstr(td_reason(), "128 keys"), "%s", td_reason());
    if (!open_named("llama-gqa")) return;
    td_engine *e = NULL;
    td_engine_opts much = {.model = ti_model,
                           .ops = ti_ops,
                           .pool = ti_pool,
                           .page_size = 16,
                           .kv_pages = 100000000,
                           .max_batched_tokens = 64,
                           .max_seqs = 1,
                           .max_legs = 1};
    T_EQ(td_engine_open(&much, &e), TD_EFULL);
    T_OK(strstr(td_reason(), "free"), "%s", td_reason());
    td_model_close(ti_model);
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
        if (!open_named("llama-gqa")) return;
        td_engine *e = ti_open((td_engine_opts){.max_prefill_chunk = 8});
        T_EQ(td_engine_start(e, te_leg(&s)), TD_OK);
        uploads_left = at;
        dev()->upload = failing_upload;
        expect_end(e, "planted");
        dev()->upload = real_upload;
        td_engine_close(e);
        td_model_close(ti_model);
        (void)td_cuda_ops_status();
    }
    if (!open_named("llama-gqa")) return;
    td_engine *e = ti_open((td_engine_opts){0});
    T_EQ(td_engine_start(e, te_leg(&s)), TD_OK);
    simt_quiet(1);
    if (CATCHES_WILD && simt_set_option("order", 0) >= 0) { /* a wild pointer: on a device the process would be lost to later cases */
        ti_ops->rmsnorm(ti_pool, (const float *)64, 64, (const float *)64, 1, 1, 64, (float *)64, 64);
        expect_end(e, "norm");
        simt_clear_error();
    }
    simt_quiet(0);
    td_engine_close(e);
    td_model_close(ti_model);
    (void)td_cuda_ops_status();
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    ti_pool = td_pool_open(1);
    ti_limits.rows = 128, ti_limits.seqs = 32, ti_limits.legs = 64, ti_limits.tokens = 4000;
    test_hidden();
    T_OK(td_cuda_ops_open(dev(), &ti_ops) == TD_OK, "%s", td_reason());
    if (ti_ops) {
        test_golden("llama-gqa");
        test_ways("llama-gqa", !simt_checks());
        if (!simt_checks()) test_ways("mistral-swa", false);
        if (!simt_checks()) test_ways("mixtral", false);
        for (int depth = 1; depth <= 3; depth++) test_waits(depth);
        test_refused();
        for (ti_depth = 1; ti_depth <= 2; ti_depth++) test_device_fails();
        ti_depth = 1;
        td_replay_stats r;
        ti_ops->replay->stats(&r);
        T_OK(r.runs > r.recorded && r.recorded > 0, "%d steps of %d recordings", (int)r.runs, (int)r.recorded);
        td_cuda_ops_close();
    }
    td_dev_close(dev());
    td_pool_close(ti_pool);
    return T_DONE();
}
