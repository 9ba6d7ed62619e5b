// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_boot_cuda.c - from options to an engine on a device: which device and mode, what its
 * arithmetic is called and pinned to, memory that is fixed at the start, and what is said where there is no
 * device, an old driver, too little memory or a kernel that computes wrongly. */
#include "common/conf.h"
#include "common/log.h"
#include "kernels/choose_cuda.h"
#include "kernels/cuda.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"
#include "tests/worker/support_engine.h"
#include "worker/boot.h"
#include "worker/devmem.h"
#include "worker/ranks.h"
#include <pthread.h>
#include <stdarg.h>

#define GQA "tests/golden/models/llama-gqa"
enum { MAX_ARGS = 32 };
static td_conf conf;
static td_boot boot;
static bool emulated;

/* The status of td_boot_open with these words, ended by NULL, after those that every case has. */
static td_status open_with(td_ranks *ranks, const char *dir, ...)
{
    static char words[MAX_ARGS][64];
    static char *argv[MAX_ARGS];
    const char *common[] = {"logits",
                            "--no-pack-cache",
                            "--max-model-len",
                            "300",
                            "--max-num-seqs",
                            "4",
                            "--max-num-batched-tokens",
                            "128",
                            "--threads",
                            "1"},
               *w, *none[1];
    int n = 0, n_none = 0;
    va_list v;
    for (; n < (int)TD_COUNT(common); n++) snprintf(words[n], sizeof words[n], "%s", common[n]);
    va_start(v, dir);
    while ((w = va_arg(v, const char *))) snprintf(words[n++], sizeof words[0], "%s", w);
    va_end(v);
    for (int i = 0; i < n; i++) argv[i] = words[i];
    td_conf_deinit(&conf);
    T_OK(td_conf_parse(&conf, TD_CONF_LOGITS, n, argv, none, 1, &n_none) == TD_OK, "%s", td_reason());
    return td_boot_open(&conf, dir, 0, ranks, &boot);
}

static bool opened(td_status s)
{
    T_OK(s == TD_OK, "%s", td_reason());
    return s == TD_OK;
}

static void refused(td_status s, td_status want, const char *text)
{
    T_EQ(s, want);
    T_OK(s == TD_OK || strstr(td_reason(), text), "\"%s\" is not in: %s", text, td_reason());
    if (s == TD_OK) td_boot_close(&boot);
}

static void expect_numerics(const char *want)
{
    char name[64];
    td_boot_numerics(&boot, name, sizeof name);
    T_OK(!strcmp(name, want), "%s, not %s", name, want);
    td_boot_close(&boot);
}

/* ---- modes ---- */

static void test_modes(void)
{
    char fast[64], pinned[] = "cuda-fast-sm80-lt9-bf16";
    if (!opened(open_with(NULL, GQA, "--ops", "cuda", NULL))) return;
    td_boot_numerics(&boot, fast, sizeof fast);
    T_OK(!emulated || !strcmp(fast, "cuda-fast-sm80-lt120901-bf16"), "%s", fast);
    td_boot_close(&boot);
    if (opened(open_with(NULL, GQA, "--ops", "cuda", "--deterministic", NULL)))
        expect_numerics(TD_CUDA_NUMERICS);
    if (opened(open_with(NULL, GQA, "--ops", "cuda", "--numerics", TD_CUDA_NUMERICS, NULL)))
        expect_numerics(TD_CUDA_NUMERICS);
    if (opened(open_with(NULL, GQA, "--ops", "cuda", "--numerics", fast, NULL))) expect_numerics(fast);
    refused(open_with(NULL, GQA, "--ops", "cuda", "--numerics", pinned, NULL), TD_ENOSUP, pinned);
    refused(open_with(NULL, GQA, "--ops", "cuda", "--deterministic", "--numerics", fast, NULL),
            strcmp(fast, TD_CUDA_NUMERICS) ? TD_ENOSUP : TD_OK, fast);
    if (opened(open_with(NULL, GQA, "--ops", "auto", "--numerics", "cpu-ref-f32", NULL)))
        expect_numerics("cpu-ref-f32");
    if (opened(open_with(NULL, GQA, "--ops", "ref", "--deterministic", NULL)))
        expect_numerics("cpu-ref-f32"); /* always is */
}

/* ---- a step allocates nothing ---- */

static td_status (*real_alloc)(td_dev *d, size_t bytes, void **out), (*real_alloc_host)(td_dev *d, size_t bytes, void **out);
static int allocated;

static td_status count_alloc(td_dev *d, size_t bytes, void **out)
{
    allocated++;
    return real_alloc(d, bytes, out);
}

static td_status count_alloc_host(td_dev *d, size_t bytes, void **out)
{
    allocated++;
    return real_alloc_host(d, bytes, out);
}

static void run(te_spec *s, te_result *r, uint32_t n, uint64_t key0)
{
    td_engine *e = NULL;
    if (!opened(td_engine_open(&boot.opts, &e))) return;
    real_alloc = boot.dev->alloc, real_alloc_host = boot.dev->alloc_host;
    boot.dev->alloc = count_alloc, boot.dev->alloc_host = count_alloc_host;
    allocated = 0;
    te_rnd = 5;
    for (uint32_t i = 0; i < n; i++) {
        s[i] = te_make(key0 + i, i ? 20 + te_draw(60) : 100, 4, 320);
        s[i].leg.sampling.prompt_logprobs = i == 1 ? 1 : -1;
        s[i].leg.sampling.temperature = i % 2 ? 0.7f : 0;
    }
    te_run(e, s, r, n);
    T_EQ(td_cuda_ops_grown(), 0);
    T_EQ(allocated, 0);
    boot.dev->alloc = real_alloc, boot.dev->alloc_host = real_alloc_host;
    td_engine_close(e);
}

static void test_fixed(const char *mode)
{
    enum { N = 3 };
    static te_spec s[N];
    static te_result a[N], b[N];
    int n = simt_checks() ? 1 : N;
    for (int round = 0; round < 2 - simt_checks(); round++) {
        if (!opened(open_with(NULL, GQA, "--ops", "cuda", mode, NULL))) return;
        run(s, round ? b : a, (uint32_t)n, 1);
        td_boot_close(&boot);
    }
    for (int i = 0; i < n; i++) {
        T_EQ(a[i].n[0], 4);
        if (!simt_checks()) te_same(&s[i], &a[i], &b[i], "a second run");
        te_result_free(&a[i]), te_result_free(&b[i]);
    }
}

/* ---- which device ---- */

static void test_device(void)
{
    refused(open_with(NULL, GQA, "--ops", "cuda", "--device", "1000", NULL), TD_ENOSUP,
            "cuda:1000: this machine has");
    if (!emulated) return;
    (void)simt_set_option("devices", 3);
    if (opened(open_with(NULL, GQA, "--ops", "cuda", "--device", "2", NULL))) {
        T_EQ(boot.dev->index, 2);
        td_boot_close(&boot);
    }
    static const struct {
        const char *rank;
        int want;
    } local[] = {{"1", 1}, {"4", 1}, {"x", 0}, {"-1", 0}, {"", 0}};
    for (size_t i = 0; i < TD_COUNT(local); i++) {
        setenv("OMPI_COMM_WORLD_LOCAL_RANK", local[i].rank, 1);
        if (!opened(open_with(NULL, GQA, "--ops", "cuda", NULL))) continue;
        T_EQ(boot.dev->index, local[i].want);
        td_boot_close(&boot);
    }
    unsetenv("OMPI_COMM_WORLD_LOCAL_RANK");
    (void)simt_set_option("devices", 1);
}

static te_spec elsewhere_spec;
static te_result elsewhere_result;

static void *run_elsewhere(void *arg)
{
    (void)arg;
    run(&elsewhere_spec, &elsewhere_result, 1, 1);
    return NULL;
}

/* A worker opens its device on one thread and computes on another, whose current device is 0 at first. */
static void test_thread(void)
{
    pthread_t thread;
    if (!emulated) return;
    (void)simt_set_option("devices", 2);
    if (opened(open_with(NULL, GQA, "--ops", "cuda", "--device", "1", NULL))) {
        TD_CHECK(!pthread_create(&thread, NULL, run_elsewhere, NULL) && !pthread_join(thread, NULL));
        T_EQ(elsewhere_result.n[0], 4);
        te_result_free(&elsewhere_result);
        td_boot_close(&boot);
    }
    (void)simt_set_option("devices", 1);
}

/* With auto the CPU serves; with cuda it is one error. */
static void expect_cpu(const char *text)
{
    refused(open_with(NULL, GQA, "--ops", "cuda", NULL), TD_ENOSUP, text);
    if (!opened(open_with(NULL, GQA, "--ops", "auto", NULL))) return;
    T_OK(!boot.dev && strcmp(boot.ops->family, "cuda"), "%s", boot.ops->family);
    td_boot_close(&boot);
}

static void test_none(void)
{
    if (!emulated) return;
    (void)simt_set_option("devices", 0);
    expect_cpu("no CUDA device: no CUDA-capable device is detected");
    (void)simt_set_option("devices", -1);
    expect_cpu("no CUDA device: the driver is for CUDA 12.2, this build needs one for 13.0");
    (void)simt_set_option("devices", -2);
    expect_cpu("no CUDA device: no driver is installed (one for CUDA 13.0 or later)");
    (void)simt_set_option("devices", 1);
    (void)simt_set_option("arch", 75);
    expect_cpu("sm_75): this build has machine code from sm_80 on");
    (void)simt_set_option("arch", 89);
    (void)simt_set_option("shared", 99);
    expect_cpu("sm_89): a block has 99 KiB of shared memory, the kernels need 161");
    (void)simt_set_option("arch", 80);
    (void)simt_set_option("shared", 163); /* an A100 has enough */
    if (opened(open_with(NULL, GQA, "--ops", "cuda", NULL))) td_boot_close(&boot);
    (void)simt_set_option("shared", 227);
    (void)simt_set_option("wrong", 1);
    expect_cpu("product of few rows computes otherwise than the host");
    (void)simt_set_option("wrong", 0);
}

/* ---- memory ---- */

/* The least MiB with which the model opens; every figure below it is refused with a text. */
static int least_memory(const char *shape)
{
    int least = 0;
    for (int mib = 1; mib <= 256 && !least; mib += mib < 40 ? 1 : 8) {
        (void)simt_set_option("memory", mib);
        td_engine *e = NULL;
        td_status s = open_with(NULL, "", "--ops", "cuda", "--deterministic", "--load-format", "dummy",
                                "--shape", shape, NULL);
        if (s == TD_OK) s = td_engine_open(&boot.opts, &e);
        T_OK(s == TD_OK || s == TD_EFULL, "%d MiB: %s", mib, td_reason());
        if (s == TD_OK) least = mib;
        td_engine_close(e);
        if (boot.ops) td_boot_close(&boot);
    }
    (void)simt_set_option("memory", 4096);
    return least;
}

static void small(int mib, const char *text, const char *more)
{
    (void)simt_set_option("memory", mib);
    refused(open_with(NULL, "", "--ops", "cuda", "--deterministic", "--load-format", "dummy", "--shape",
                      "tiny", "--max-num-batched-tokens", more, NULL),
            TD_EFULL, text);
    (void)simt_set_option("memory", 4096);
}

static void test_memory(void)
{
    td_engine *e = NULL;
    if (!emulated) return;
    T_OK(least_memory("tiny") > 0, "the tiny shape never fits");
    small(8, "a device with more than", "64");
    small(60, "--max-num-batched-tokens", "16384");
    if (opened(open_with(NULL, GQA, "--ops", "cuda", "--kv-pages", "10", NULL))) {
        T_EQ(td_engine_open(&boot.opts, &e), TD_EFULL);
        T_OK(strstr(td_reason(), "--max-model-len 128 would fit") != NULL, "%s", td_reason());
        td_boot_close(&boot);
    }
    /* pages of the size of the pool that the memory makes, not of what the sequences could use */
    if (opened(open_with(NULL, GQA, "--ops", "cuda", "--max-num-seqs", "1000", "--max-model-len", "1000",
                         NULL))) {
        size_t left = 0;
        T_EQ(boot.dev->free_bytes(boot.dev, &left), TD_OK);
        (void)simt_set_option("memory", 4096 - (int)(left >> 20) + 32);
        T_EQ(boot.dev->free_bytes(boot.dev, &left), TD_OK);
        size_t page = 2 * 16 * 32 * 2; /* times heads and layers */
        int64_t pages = td_engine_choose_pages(&boot.opts);
        const td_model_desc *d = td_model_descr(boot.model);
        size_t bytes = (size_t)pages * page / 32 * (size_t)(d->D * d->G * d->L);
        T_OK(bytes > left / 2 && bytes < left, "%lld pages are %zu bytes of %zu", (long long)pages, bytes,
             left);
        (void)simt_set_option("memory", 4096);
        td_boot_close(&boot);
    }
}

/* ---- weights on their way ---- */

static double fraction;
static int told;

static void progress(void *arg, const char *what, double f)
{
    T_OK(!strcmp(what, "upload") && f > fraction && f <= 1 && arg == &told, "%s: %g after %g", what, f,
         fraction);
    fraction = f;
    told++;
}

static td_status (*real_upload)(td_dev *d, td_stream_kind s, void *dst, const void *src, size_t bytes);
static int uploads_left;

static td_status failing_upload(td_dev *d, td_stream_kind s, void *dst, const void *src, size_t bytes)
{
    if (uploads_left-- > 0) return real_upload(d, s, dst, src, bytes);
    return td_fail(TD_EDEVICE, "CUDA: upload: planted");
}

static td_status (*real_await)(td_dev *d, td_event *e);
static int awaits;

static td_status count_await(td_dev *d, td_event *e) { return awaits++, real_await(d, e); }

/* Through both buffers, each more than once: a transfer is waited for; an error in the
 * middle is the answer. */
static void test_staged(void)
{
    enum { BYTES = (56 << 20) + 12345 };
    td_dev *d = NULL;
    void *p = NULL;
    td_pool *pool = td_pool_open(2);
    uint8_t *a = block_alloc(BYTES), *b = block_alloc(BYTES);
    for (size_t i = 0; i < BYTES; i++) a[i] = (uint8_t)(i * 2654435761u >> 13);
    TD_CHECK(td_dev_open("cuda", 0, &d) == TD_OK && d->alloc(d, BYTES, &p) == TD_OK);
    real_await = d->await;
    d->await = count_await;
    T_EQ(td_devmem_put_staged(d, pool, p, a, BYTES, progress, &told), TD_OK);
    T_OK(awaits == 4, "%d waits for a buffer", awaits);
    d->await = real_await;
    T_OK(told == 4 && fraction == 1, "told %d times, at last %g", told, fraction);
    T_EQ(td_devmem_fetch(d, b, p, BYTES), TD_OK);
    T_OK(!memcmp(a, b, BYTES), "other bytes arrived");
    real_upload = d->upload;
    d->upload = failing_upload;
    for (int at = 0; at < 4; at++) {
        uploads_left = at;
        T_EQ(td_devmem_put_staged(d, pool, p, a, BYTES, NULL, NULL), TD_EDEVICE);
    }
    d->upload = real_upload;
    d->free(d, p);
    td_dev_close(d);
    td_pool_close(pool);
    free(a), free(b);
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    emulated = !strncmp(dev()->name, "simt", 4);
    td_dev_close(dev());
    simt_quiet(1);
    test_modes();
    test_fixed("--no-deterministic");
    test_fixed("--deterministic");
    test_device();
    if (!simt_checks()) test_thread();
    test_none();
    if (!simt_checks()) test_memory();
    if (!simt_checks()) test_staged();
    td_conf_deinit(&conf);
    return T_DONE();
}
