/* tandem bench engine - prefill and decode speed of the server's own engine, with shares of the machine's
 * limits.
 *
 *   ppN      one leg of N prompt tokens, until its first token
 *   tgN      one leg makes N tokens from a prompt of one token
 *   tgNxB    B legs at once
 *   tgNxB@C  the same from a prompt of C tokens: from when all of them have a token until they made N * B more
 *
 * Shares: bytes (packed weights once a step and rank, KV once a sequence and step) against the best read stream,
 * and operations against the family's multiply-add loop. Both limits are measured in this process before and
 * after the tests, and the better one is used; of several ranks (bench_ranks.h) they are the sum of all.
 * Processor time is of all ranks' processes: on a busy machine it says more than the clock.
 * idle_us (devices): mean time that rank 0's device had nothing to do between two replayed steps
 * (td_model_idle_time). load_s, first_token_s: from the command's start until the engine was open; the same, then
 * the first run of ppN. */
// SPDX-License-Identifier: Apache-2.0
#include "common/buf.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "common/rng.h"
#include "deploy/cli/bench_ranks.h"
#include "deploy/cli/cli.h"
#include "worker/boot.h"
#include "worker/profile.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_BATCHES = 32 };

typedef struct test {
    char name[48];
    uint32_t prompt, gen, batch, context; /* context > 0: the prompt is not timed */
    double tok_s[1001], best_s; /* sorted when reported */
    double bytes, ops; /* of one run */
    uint64_t steps;
    double *cpu_s, cpu_all_s;                  /* [ranks], and their sum: the run that took the least */
    double gather_alone_s, gather_waited_s;    /* of all runs, rank 0 */
    td_model_idle idle;                        /* of all runs: replayed steps on a device */
} test;

typedef struct bench {
    td_conf conf;
    td_boot boot;
    td_engine *engine;
    bench_ranks ranks;
    int batch[MAX_BATCHES], n_batch;
    test *tests;
    int n_tests;
    uint64_t key, steps;
    double bytes, ops; /* of the steps so far, by on_step */
    double weight_bytes, read_s, multiply_s; /* a step's weights, limits: of all ranks */
    int64_t begun_us;                        /* of the command */
    double load_s, first_token_s; /* until the engine was open; and a prompt's first token, 0: no such test */
} bench;

/* ---- what is run ---- */

static td_status parse_batches(bench *b)
{
    for (const char *p = b->conf.batch; *p;) {
        char *end;
        long v = strtol(p, &end, 10);
        if (end == p || v < 1 || v > 1024 || (*end && *end != ','))
            return td_refuse(TD_EBADREQ, "--batch: '%s' is not a list of 1 to 1024", b->conf.batch);
        if (b->n_batch == MAX_BATCHES)
            return td_refuse(TD_EBADREQ, "--batch: more than %d sizes", MAX_BATCHES);
        b->batch[b->n_batch++] = (int)v;
        p = *end ? end + 1 : end;
    }
    return TD_OK;
}

static void plan_tests(bench *b)
{
    b->tests = td_xalloc((size_t)(1 + b->n_batch) * sizeof *b->tests);
    if (b->conf.prompt_len) {
        test *t = &b->tests[b->n_tests++];
        *t = (test){.prompt = (uint32_t)b->conf.prompt_len, .gen = 1, .batch = 1};
        snprintf(t->name, sizeof t->name, "pp%u", t->prompt);
    }
    for (int i = 0; i < b->n_batch && b->conf.gen_len; i++) {
        test *t = &b->tests[b->n_tests++];
        *t = (test){.prompt = 1, .gen = (uint32_t)b->conf.gen_len, .batch = (uint32_t)b->batch[i],
                    .context = (uint32_t)b->conf.context_len};
        if (t->context) t->prompt = t->context;
        int n = t->batch == 1 ? snprintf(t->name, sizeof t->name, "tg%u", t->gen)
                              : snprintf(t->name, sizeof t->name, "tg%uxB%u", t->gen, t->batch);
        if (t->context) snprintf(t->name + n, sizeof t->name - (size_t)n, "@%u", t->context);
    }
}

/* Tokens that the first of B legs makes before the last one has its first, and those that are timed. */
static uint32_t most_tokens(const bench *b, const test *t)
{
    uint32_t rows = (uint32_t)TD_MAX(b->conf.max_num_batched_tokens - b->conf.max_num_seqs, 1);
    return t->context ? t->gen + 2 + t->batch * t->context / rows + t->batch : t->gen;
}

static uint32_t draw(const bench *b, uint32_t i, uint32_t V)
{
    uint32_t key[2] = {(uint32_t)b->conf.seed, (uint32_t)(b->conf.seed >> 32)}, ctr[4] = {i, 0, 0, 0}, out[4];
    td_philox4x32(ctr, key, out);
    return out[0] % V;
}

/* ---- one run ---- */

static void on_step(void *arg, const td_step *s)
{
    bench *b = arg;
    const td_step_seq *q = td_step_seqs(s);
    const int32_t *want = td_step_logit_rows(s);
    uint32_t at = 0;
    b->bytes += b->weight_bytes;
    for (uint32_t i = 0; i < s->n_seqs; i++) {
        uint32_t n = 0;
        for (; at < s->n_logits && (uint32_t)want[at] < q[i].row0 + q[i].n_rows; at++) n++;
        td_work w = td_profile_work(td_model_descr(b->boot.model), b->boot.ops->kv_dtype, q[i].pos0,
                                    q[i].n_rows, n);
        b->ops += w.ops;
        b->bytes += w.kv_bytes;
    }
    b->steps++;
}

static td_status start_legs(bench *b, const test *t, uint32_t *ids)
{
    uint32_t V = (uint32_t)td_model_descr(b->boot.model)->V;
    for (uint32_t i = 0; i < t->batch; i++) {
        for (uint32_t k = 0; k < t->prompt; k++) ids[k] = draw(b, i * t->prompt + k, V);
        td_leg leg = {.key = ++b->key,
                      .kind = TD_LEG_MIXED,
                      .prompt = ids,
                      .n_prompt = t->prompt,
                      .sampling = {.top_p = 1,
                                   .repetition_penalty = 1,
                                   .max_tokens = most_tokens(b, t),
                                   .n = 1,
                                   .ignore_eos = true,
                                   .logprobs = -1,
                                   .prompt_logprobs = -1}};
        TD_TRY(td_engine_start(b->engine, &leg));
    }
    return TD_OK;
}

static td_status turn(bench *b, td_engine_out *o, uint32_t left)
{
    td_status s = td_engine_turn(b->engine, o);
    if (s == TD_AGAIN) s = td_refuse(TD_EPROTO, "the engine stands still with %u sequences left", left);
    for (uint32_t i = 0; s == TD_OK && i < o->n_end; i++)
        if (o->end[i].status < 0)
            s = td_refuse(o->end[i].status, "%s", o->end[i].reason ? o->end[i].reason : "a sequence failed");
    return s;
}

static td_status run_to_end(bench *b, uint32_t left)
{
    td_engine_out o;
    for (; left; left -= o.n_end) TD_TRY(turn(b, &o, left));
    return TD_OK;
}

/* All legs generate; from when the last of them has its first token, until so many more were made. */
static td_status run_generation(bench *b, const test *t, int64_t *start)
{
    uint64_t made = 0, first = 0;
    uint32_t left = t->batch;
    td_engine_out o;
    while (first < t->batch || made < (uint64_t)t->gen * t->batch) {
        bool full = first == t->batch;
        TD_TRY(turn(b, &o, left));
        if (o.n_end) return td_refuse(TD_EPROTO, "a sequence ended before the test did");
        for (uint32_t i = 0; i < o.n_tokens; i++) {
            first += o.tokens[i].base_index == 0;
            made += full ? o.tokens[i].n : 0;
        }
        if (full || first < t->batch) continue;
        *start = td_now_us();
        b->bytes = b->ops = 0;
        b->steps = 0;
    }
    return TD_OK;
}

/* Seconds from the first turn, or from the end of the context, to the last token. */
static td_status run_once(bench *b, const test *t, double *out)
{
    uint32_t *ids = td_xalloc(t->prompt * sizeof *ids);
    uint64_t key = b->key;
    td_status s = start_legs(b, t, ids);
    free(ids);
    int64_t start = td_now_us();
    if (s == TD_OK) s = t->context ? run_generation(b, t, &start) : run_to_end(b, t->batch);
    *out = (double)TD_MAX(td_now_us() - start, 1) * 1e-6;
    for (uint32_t i = 0; s == TD_OK && t->context && i < t->batch; i++) s = td_engine_cancel(b->engine, ++key);
    return s == TD_OK && t->context ? run_to_end(b, t->batch) : s;
}

static double gather_s(const bench *b, bool alone)
{
    return alone ? b->ranks.of[0].gather_alone_s : b->ranks.of[0].gather_waited_s;
}

/* Processor time of the run that began with `before`. */
static void take_cpu(bench *b, test *t, const double *before)
{
    double all = 0;
    for (int i = 0; i < b->ranks.n; i++) all += b->ranks.of[i].cpu_s - before[i];
    if (t->cpu_all_s > 0 && all >= t->cpu_all_s) return;
    t->cpu_all_s = all;
    for (int i = 0; i < b->ranks.n; i++) t->cpu_s[i] = b->ranks.of[i].cpu_s - before[i];
}

static td_status run_measured(bench *b, test *t, double *before, double *s)
{
    TD_TRY(bench_ranks_look(&b->ranks));
    for (int i = 0; i < b->ranks.n; i++) before[i] = b->ranks.of[i].cpu_s;
    double alone = gather_s(b, true), waited = gather_s(b, false);
    TD_TRY(run_once(b, t, s));
    TD_TRY(bench_ranks_look(&b->ranks));
    take_cpu(b, t, before);
    t->gather_alone_s += gather_s(b, true) - alone;
    t->gather_waited_s += gather_s(b, false) - waited;
    return TD_OK;
}

static td_model_idle idle_since(const bench *b, const td_model_idle *before)
{
    td_model_idle now = td_model_idle_time(b->boot.model);
    return (td_model_idle){.steps = now.steps - before->steps, .us = now.us - before->us};
}

static bool generates(const test *t)
{
    return t->gen > 1 || t->prompt == 1 || t->context;
}

static td_status run_test(bench *b, test *t)
{
    double s, before[TD_COLL_MAX_RANKS];
    t->cpu_s = td_xalloc((size_t)b->ranks.n * sizeof *t->cpu_s);
    TD_TRY(run_once(b, t, &s)); /* pages and weights are in memory from here on */
    if (t == b->tests && t->prompt > 1 && t->gen == 1) b->first_token_s = b->load_s + s;
    const td_model_idle idle = td_model_idle_time(b->boot.model);
    for (int i = 0; i < b->conf.repeats; i++) {
        b->bytes = b->ops = 0;
        b->steps = 0;
        TD_TRY(run_measured(b, t, before, &s));
        t->tok_s[i] = (generates(t) ? (double)t->gen * t->batch : t->prompt) / s;
        t->bytes = b->bytes;
        t->ops = b->ops;
        t->steps = b->steps;
        if (!i || s < t->best_s) t->best_s = s;
    }
    t->idle = idle_since(b, &idle);
    return TD_OK;
}

static td_status measure_limits(bench *b)
{
    TD_TRY(bench_ranks_measure(&b->ranks));
    b->weight_bytes = b->read_s = b->multiply_s = 0;
    for (int i = 0; i < b->ranks.n; i++) {
        b->weight_bytes += b->ranks.of[i].row_bytes;
        b->read_s += b->ranks.of[i].read_s;
        b->multiply_s += b->ranks.of[i].multiply_s;
    }
    return TD_OK;
}

/* ---- the report ---- */

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static void json_line(const bench *b, const test *t, double median, double of_read, double of_multiply,
                      FILE *f)
{
    td_buf o;
    td_buf_init(&o, 0);
    td_buf_fmt(&o, "{\"test\":\"%s\",\"tok_s\":%.3f,\"all\":[", t->name, median);
    for (int i = 0; i < b->conf.repeats; i++) td_buf_fmt(&o, "%s%.3f", i ? "," : "", t->tok_s[i]);
    td_buf_fmt(&o, "],\"of_bandwidth\":%.4f,\"of_arithmetic\":%.4f,\"of_roofline\":%.4f", of_read,
               of_multiply, TD_MAX(of_read, of_multiply));
    td_buf_fmt(&o, ",\"read_gb_s\":%.2f,\"peak_gflop_s\":%.1f", b->read_s * 1e-9, b->multiply_s * 1e-9);
    td_buf_fmt(&o, ",\"steps\":%llu,\"gbytes\":%.4f,\"gflop\":%.3f", (unsigned long long)t->steps,
               t->bytes * 1e-9, t->ops * 1e-9);
    td_buf_fmt(&o, ",\"best_s\":%.6f,\"cpu_s\":[", t->best_s);
    for (int i = 0; i < b->ranks.n; i++) td_buf_fmt(&o, "%s%.6f", i ? "," : "", t->cpu_s[i]);
    td_buf_str(&o, "]");
    if (t->gather_alone_s > 0)
        td_buf_fmt(&o, ",\"gather_alone_s\":%.6f,\"gather_waited_s\":%.6f,\"gather_overlap\":%.4f", t->gather_alone_s,
                   t->gather_waited_s, TD_MAX(0.0, 1 - t->gather_waited_s / t->gather_alone_s));
    if (t->idle.steps) td_buf_fmt(&o, ",\"idle_us\":%.2f", t->idle.us / (double)t->idle.steps);
    td_buf_fmt(&o, ",\"load_s\":%.3f", b->load_s);
    if (t == b->tests && b->first_token_s > 0) td_buf_fmt(&o, ",\"first_token_s\":%.3f", b->first_token_s);
    bench_ranks_json(&b->ranks, &o);
    td_buf_fmt(&o, ",\"family\":\"%s\",\"numerics\":\"%s\",\"threads\":%d,\"arch\":", b->boot.ops->family,
               b->boot.ops->numerics, td_pool_size(b->boot.pool));
    const char *arch = td_model_descr(b->boot.model)->arch;
    td_buf_json_str(&o, arch, strlen(arch));
    td_buf_str(&o, "}\n");
    fwrite(o.p, 1, o.len, f);
    td_buf_deinit(&o);
}

static td_status report(const bench *b)
{
    bool to_stdout = !strcmp(b->conf.json, "-");
    FILE *table = to_stdout ? stderr : stdout, *json = NULL;
    if (b->conf.json[0]) json = to_stdout ? stdout : fopen(b->conf.json, "w");
    if (b->conf.json[0] && !json) return td_refuse(TD_EIO, "%s: %s", b->conf.json, strerror(errno));
    fprintf(table,
            "kernels %s, %d ranks of %d threads; read %.1f GB/s, multiply-add %.0f GFLOP/s; weights %.3f GB a step; "
            "median of %d\n",
            b->boot.ops->family, b->ranks.n, td_pool_size(b->boot.pool), b->read_s * 1e-9, b->multiply_s * 1e-9,
            b->weight_bytes * 1e-9, b->conf.repeats);
    fprintf(table, "open after %.2f s", b->load_s);
    if (b->first_token_s > 0)
        fprintf(table, ", with a prompt of %u and its first token %.2f s", b->tests[0].prompt,
                b->first_token_s);
    fprintf(table, "\n%-12s %12s   %s\n", "test", "tokens/s", "of bandwidth  of arithmetic");
    for (int i = 0; i < b->n_tests; i++) {
        test *t = &b->tests[i];
        int n = b->conf.repeats;
        qsort(t->tok_s, (size_t)n, sizeof *t->tok_s, ascending);
        double median = n % 2 ? t->tok_s[n / 2] : (t->tok_s[n / 2 - 1] + t->tok_s[n / 2]) / 2;
        double tokens = generates(t) ? (double)t->gen * t->batch : t->prompt,
               seconds = tokens / median;
        double of_read = t->bytes / seconds / b->read_s,
               of_multiply = b->multiply_s > 0 ? t->ops / seconds / b->multiply_s : 0;
        fprintf(table, "%-12s %12.2f   %11.1f %% %12.1f %%", t->name, median, 100 * of_read,
                100 * of_multiply);
        if (t->idle.steps)
            fprintf(table, "   device idle %.1f us a step", t->idle.us / (double)t->idle.steps);
        fputc('\n', table);
        if (json) json_line(b, t, median, of_read, of_multiply, json);
    }
    if (json && !to_stdout && fclose(json)) return td_refuse(TD_EIO, "%s: %s", b->conf.json, strerror(errno));
    return TD_OK;
}

/* Rows, sequences and pages that the tests need; what the command line says more, stays. */
static void fit(bench *b)
{
    int most = 1;
    for (int i = 0; i < b->n_batch; i++) most = TD_MAX(most, b->batch[i]);
    td_conf *c = &b->conf;
    c->max_num_seqs = TD_MAX(c->max_num_seqs, most);
    c->max_num_batched_tokens = TD_MAX(c->max_num_batched_tokens, c->max_num_seqs);
    c->prefix_cache = false; /* every run computes everything */
    if (!c->kv_pages && !c->kv_memory) {
        int64_t P = c->page_size, pages = (c->prompt_len + 1) / P + 3; /* an engine has 3 or more */
        for (int i = 0; i < b->n_tests; i++) {
            const test *t = &b->tests[i];
            pages = TD_MAX(pages, t->batch * ((int64_t)(t->prompt + most_tokens(b, t)) / P + 2));
        }
        c->kv_pages = (int)TD_MIN(pages, (int64_t)TD_CONF_INT_MAX);
    }
}

/* Rank 0, or the one process. */
static td_status run_tests(bench *b)
{
    TD_TRY(td_boot_open(&b->conf, b->conf.model, 0, b->ranks.many ? &b->ranks.ranks : NULL, &b->boot));
    TD_TRY(td_engine_open(&b->boot.opts, &b->engine));
    b->load_s = (double)(td_now_us() - b->begun_us) * 1e-6;
    b->ranks.boot = &b->boot;
    b->ranks.engine = b->engine;
    int longest = 1;
    for (int i = 0; i < b->n_tests; i++)
        longest = TD_MAX(longest, (int)(b->tests[i].prompt + most_tokens(b, &b->tests[i])));
    if (longest > td_engine_max_model_len(b->engine)) /* it would end early and look fast */
        return td_refuse(TD_EBADREQ, "%d tokens are more than the %d that model and pages hold", longest,
                         td_engine_max_model_len(b->engine));
    td_engine_on_step(b->engine, on_step, b);
    TD_TRY(measure_limits(b));
    for (int i = 0; i < b->n_tests; i++) TD_TRY(run_test(b, &b->tests[i]));
    TD_TRY(measure_limits(b));
    return report(b);
}

static td_status run(bench *b, int *argc, char ***argv)
{
    TD_TRY(parse_batches(b));
    plan_tests(b);
    if (!b->n_tests) return td_refuse(TD_EBADREQ, "nothing to do: --prompt-len and --gen-len are 0");
    fit(b);
    TD_TRY(bench_ranks_open(&b->ranks, &b->conf, argc, argv));
    if (b->ranks.many && b->ranks.ranks.grid.rank) return bench_ranks_serve(&b->ranks, &b->conf);
    td_status s = run_tests(b);
    if (s < 0 && b->ranks.many) td_coll_abort(b->ranks.ranks.world, td_reason_take());
    return s;
}

int cmd_bench_engine(int argc, char **argv)
{
    bench *b = td_xalloc(sizeof *b);
    const char *dir = NULL;
    int n_dir = 0;
    b->begun_us = td_now_us();
    td_status s = td_conf_parse(&b->conf, TD_CONF_BENCH_ENGINE, argc, argv, &dir, 1, &n_dir);
    td_log_open("bench", s == TD_OK ? td_log_parse(b->conf.log_level) : TD_LOG_WARN);
    if (n_dir) b->conf.model = dir;
    if (s == TD_OK) s = run(b, &argc, &argv);
    if (s < 0) fprintf(stderr, "tandem bench engine: %s\n", td_reason_take());
    if (b->engine) td_engine_close(b->engine);
    td_boot_close(&b->boot);
    bench_ranks_close(&b->ranks);
    for (int i = 0; i < b->n_tests; i++) free(b->tests[i].cpu_s);
    td_conf_deinit(&b->conf);
    free(b->tests);
    free(b);
    return s == TD_EBADREQ ? 2 : s < 0;
}
