/* tandem logits DIR --ids IN.safetensors --out OUT.safetensors: for each tensor ids_K of the input, logits_K
 * f32 [n, V] for every position. Each case is a leg of the engine, one after the other; chunks, pages and
 * steps are the server's. */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "common/log.h"
#include "deploy/cli/cli.h"
#include "worker/boot.h"
#include "worker/model/safetensors.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { MAX_CASES = 4096, MAX_ROWS = 4096, MIN_ROWS = 64, LOGIT_BYTES = 256 << 20 };

typedef struct sink {
    float *logits;
    size_t V;
    uint32_t n, seen;
} sink;

static void on_logits(void *arg, uint64_t key, uint32_t position, const float *logits)
{
    (void)key;
    sink *s = arg;
    if (position >= s->n) return;
    memcpy(s->logits + (size_t)position * s->V, logits, s->V * sizeof(float));
    s->seen++;
}

static td_status run_case(td_boot *s, td_engine *e, const td_st_tensor *ids, uint64_t key, td_st_tensor *out,
                          char *name, size_t name_bytes)
{
    size_t n = td_st_elements(ids), V = (size_t)td_model_descr(s->model)->V;
    if (ids->rank != 1 || !n || n >= (size_t)td_engine_max_model_len(e))
        return td_fail(TD_EBADREQ, "%s: %zu ids; wanted one row of 1 to %d", ids->name, n,
                       td_engine_max_model_len(e) - 1);
    int32_t *prompt = td_xalloc(n * sizeof *prompt);
    sink got = {.logits = td_xalloc(n * V * sizeof(float)), .V = V, .n = (uint32_t)n};
    td_status st = td_st_read_i32(ids, prompt, n);
    td_leg leg = {.key = key,
                  .kind = TD_LEG_MIXED,
                  .prompt = (const uint32_t *)prompt,
                  .n_prompt = (uint32_t)n,
                  .all_logits = true,
                  .sampling = {.top_p = 1,
                               .repetition_penalty = 1,
                               .max_tokens = 1,
                               .n = 1,
                               .logprobs = -1,
                               .prompt_logprobs = -1}};
    td_engine_on_logits(e, on_logits, &got);
    if (st == TD_OK) st = td_engine_start(e, &leg);
    td_engine_out o;
    while (st == TD_OK) {
        st = td_engine_turn(e, &o);
        for (uint32_t i = 0; i < o.n_end && st == TD_OK; i++)
            st = o.end[i].status < 0 ? td_fail(o.end[i].status, "%s: %s", ids->name, o.end[i].reason)
                                     : TD_AGAIN;
    }
    if (st == TD_AGAIN)
        st = got.seen == n ? TD_OK
                           : td_fail(TD_EPROTO, "%s: %u of %zu positions computed", ids->name, got.seen, n);
    snprintf(name, name_bytes, "logits_%s", ids->name + 4);
    *out = (td_st_tensor){.name = name,
                          .dtype = TD_ST_F32,
                          .rank = 2,
                          .shape = {(int64_t)n, (int64_t)V},
                          .data = (const uint8_t *)got.logits};
    free(prompt);
    return st;
}

/* Rows of logits in a step: as many as the rows, unless the vocabulary makes them larger than LOGIT_BYTES. */
static td_status logit_rows(const td_conf *conf, int *out)
{
    td_model_desc *d = td_xalloc(sizeof *d);
    td_status s = conf->model[0] ? td_model_desc_read(conf->model, d) : td_model_desc_shape(conf->shape, d);
    if (s == TD_OK)
        *out = TD_MAX(
            TD_MIN(conf->max_num_batched_tokens, (int)((size_t)LOGIT_BYTES / sizeof(float) / (size_t)d->V)),
            (int)MIN_ROWS);
    free(d);
    return s;
}

static td_status run(td_conf *conf)
{
    int rows = 0;
    td_safetensors *in = NULL;
    td_boot s = {0};
    td_engine *e = NULL;
    td_st_tensor *out = td_xalloc(MAX_CASES * sizeof *out);
    char(*name)[TD_ST_MAX_NAME] = td_xalloc(MAX_CASES * sizeof *name);
    size_t n = 0;
    conf->max_prefill_chunk = conf->chunk;
    conf->max_num_batched_tokens = TD_MIN(conf->max_num_batched_tokens, (int)MAX_ROWS);
    td_status st = td_safetensors_open(conf->ids, &in);
    if (st == TD_OK) st = logit_rows(conf, &rows);
    if (st == TD_OK) st = td_boot_open(conf, conf->model, rows, NULL, &s);
    if (st == TD_OK) st = td_engine_open(&s.opts, &e);
    for (size_t i = 0; st == TD_OK && i < td_safetensors_count(in); i++) {
        const td_st_tensor *t = td_safetensors_at(in, i);
        if (strncmp(t->name, "ids_", 4)) continue;
        if (n == MAX_CASES) st = td_fail(TD_EFULL, "more than %d cases", MAX_CASES);
        else st = run_case(&s, e, t, i + 1, &out[n], name[n], sizeof name[n]), n++;
    }
    if (st == TD_OK && !n) st = td_fail(TD_EBADREQ, "%s has no tensor named ids_...", conf->ids);
    if (st == TD_OK) st = td_safetensors_write(conf->out, out, n);
    for (size_t i = 0; i < n; i++) free((void *)(uintptr_t)out[i].data);
    free(out);
    free(name);
    td_engine_close(e);
    td_boot_close(&s);
    td_safetensors_close(in);
    return st;
}

int cmd_logits(int argc, char **argv)
{
    td_conf conf;
    const char *dir = NULL;
    int n = 0;
    td_log_open("logits", TD_LOG_WARN);
    td_status s = td_conf_parse(&conf, TD_CONF_LOGITS, argc, argv, &dir, 1, &n);
    if (s == TD_AGAIN) return 0;
    if (s == TD_OK && n) s = td_conf_set(&conf, "model", dir);
    if (s == TD_OK && (!conf.ids[0] || !conf.out[0]))
        s = td_refuse(TD_EBADREQ, "--ids IN.safetensors and --out OUT.safetensors are needed");
    bool usage = s < 0;
    if (s == TD_OK) s = run(&conf);
    if (s < 0) fprintf(stderr, "tandem logits: %s\n", td_reason_take());
    td_conf_deinit(&conf);
    return s == TD_OK ? 0 : usage ? 2 : 1;
}
