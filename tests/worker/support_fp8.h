/* tests/worker/support_fp8.h - checkpoints with FP8 weights and their twins: the same model with each FP8 matrix
 * multiplied out by arithmetic of its own (ldexp, doubles rounded once), as F32 or BF16, and no quantization_config.
 *
 *   tf_make(from, to, how)    any folder -> FP8: matrices named *_proj.weight, *.w1|w2|w3.weight are quantized here
 *   tf_plain(from, to, dtype) an FP8 folder -> its twin
 *
 * Threads: one; both end the test on an error. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SUPPORT_FP8_H
#define TD_TESTS_SUPPORT_FP8_H

#include "common/check.h"
#include "tests/t.h"
#include "worker/model/file.h"
#include "worker/model/safetensors.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

typedef enum { TF_ROWS, TF_BLOCKS } tf_how;
enum { TF_MAX = 4096 };

/* Tensors to be written; data and names are owned. */
typedef struct tf_set {
    td_st_tensor t[TF_MAX];
    size_t n;
} tf_set;

static inline void tf_add(tf_set *s, const char *name, td_st_dtype dtype, int rank, int64_t a, int64_t b, void *data)
{
    TD_CHECK(s->n < TF_MAX);
    s->t[s->n++] = (td_st_tensor){.name = strdup(name), .dtype = dtype, .rank = rank, .shape = {a, b}, .data = data};
}

static inline void tf_write(tf_set *s, const char *dir, const char *config)
{
    char path[512];
    mkdir(dir, 0755);
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    TD_CHECK(td_safetensors_write(path, s->t, s->n) == TD_OK);
    snprintf(path, sizeof path, "%s/config.json", dir);
    FILE *f = fopen(path, "wb");
    TD_CHECK(f && fwrite(config, 1, strlen(config), f) == strlen(config) && !fclose(f));
    for (size_t i = 0; i < s->n; i++) free((void *)(uintptr_t)s->t[i].name), free((void *)(uintptr_t)s->t[i].data);
    free(s);
}

static inline char *tf_config(const char *dir)
{
    char path[512], *text = NULL;
    size_t n;
    snprintf(path, sizeof path, "%s/config.json", dir);
    TD_CHECK(td_file_read(path, "config.json", 1 << 20, &text, &n) == TD_OK);
    return text;
}

static inline void tf_remove(const char *dir)
{
    char path[512];
    snprintf(path, sizeof path, "%s/model.safetensors", dir), unlink(path);
    snprintf(path, sizeof path, "%s/config.json", dir), unlink(path);
    rmdir(dir);
}

static inline bool tf_ends(const char *s, const char *end)
{
    size_t n = strlen(s), m = strlen(end);
    return n >= m && !strcmp(s + n - m, end);
}

static inline double tf_code(uint8_t c)
{
    int e = c >> 3 & 15, m = c & 7;
    double v = e ? ldexp(1 + m / 8.0, e - 7) : ldexp(m / 8.0, -6);
    return c & 0x80 ? -v : v;
}

static inline float *tf_floats(const td_st_tensor *t)
{
    size_t n = td_st_elements(t);
    float *v = malloc(n * sizeof *v);
    TD_CHECK(v && td_st_read_f32(t, v, n) == TD_OK);
    return v;
}

static inline void *tf_copy(const td_st_tensor *t)
{
    void *p = malloc(t->bytes + 1);
    TD_CHECK(p);
    memcpy(p, t->data, t->bytes);
    return p;
}

/* ---- to FP8 ---- */

static inline void tf_quantize(tf_set *s, const td_st_tensor *t, tf_how how)
{
    int N = (int)t->shape[0], K = (int)t->shape[1], bn = how == TF_ROWS ? 1 : 128, bk = how == TF_ROWS ? K : 128;
    int rows = (N + bn - 1) / bn, cols = (K + bk - 1) / bk;
    float *w = tf_floats(t), *scale = calloc((size_t)(rows * cols), sizeof *scale);
    uint8_t *code = malloc((size_t)N * (size_t)K);
    char name[200];
    for (int n = 0; n < N; n++)
        for (int k = 0; k < K; k++) {
            float *x = &scale[n / bn * cols + k / bk];
            *x = fmaxf(*x, fabsf(w[n * K + k]) / 448);
        }
    for (int n = 0; n < N; n++)
        for (int k = 0; k < K; k++) code[n * K + k] = td_f32_to_e4m3(w[n * K + k] / scale[n / bn * cols + k / bk]);
    free(w);
    tf_add(s, t->name, TD_ST_F8_E4M3, 2, N, K, code);
    snprintf(name, sizeof name, "%s%s", t->name, how == TF_ROWS ? "_scale" : "_scale_inv");
    tf_add(s, name, TD_ST_F32, 2, rows, cols, scale);
}

static const char tf_blocks[] =
    ",\"quantization_config\":{\"quant_method\":\"fp8\",\"fmt\":\"e4m3\",\"activation_scheme\":\"dynamic\","
    "\"weight_block_size\":[128,128],\"modules_to_not_convert\":[\"lm_head\",\"model.layers.0.mlp.gate\"]}}";
static const char tf_rows[] =
    ",\"quantization_config\":{\"quant_method\":\"compressed-tensors\",\"format\":\"float-quantized\","
    "\"ignore\":[\"lm_head\",\"re:.*gate$\"],\"config_groups\":{\"group_0\":{\"targets\":[\"Linear\"],"
    "\"weights\":{\"num_bits\":8,\"type\":\"float\",\"strategy\":\"channel\",\"symmetric\":true,\"dynamic\":false},"
    "\"input_activations\":null}}}}";

static inline void tf_make(const char *from, const char *to, tf_how how)
{
    td_safetensors *f;
    tf_set *s = calloc(1, sizeof *s);
    TD_CHECK(td_safetensors_open_dir(from, &f) == TD_OK);
    for (size_t i = 0; i < td_safetensors_count(f); i++) {
        const td_st_tensor *t = td_safetensors_at(f, i);
        bool matrix = tf_ends(t->name, "_proj.weight") || tf_ends(t->name, ".w1.weight") ||
                      tf_ends(t->name, ".w2.weight") || tf_ends(t->name, ".w3.weight");
        if (matrix)
            tf_quantize(s, t, how);
        else
            tf_add(s, t->name, t->dtype, t->rank, t->shape[0], t->shape[1], tf_copy(t));
    }
    td_safetensors_close(f);
    char *text = tf_config(from), *end = strrchr(text, '}');
    const char *more = how == TF_ROWS ? tf_rows : tf_blocks;
    text = realloc(text, strlen(text) + strlen(more) + 1);
    end = strrchr(text, '}');
    strcpy(end, more);
    tf_write(s, to, text);
    free(text);
}

/* ---- and back ---- */

static inline const td_st_tensor *tf_scale(const td_safetensors *f, const char *weight)
{
    char name[200];
    snprintf(name, sizeof name, "%s_scale", weight);
    const td_st_tensor *t = td_safetensors_find(f, name);
    snprintf(name, sizeof name, "%s_scale_inv", weight);
    return t ? t : td_safetensors_find(f, name);
}

/* [N, K] of codes times scales, rounded to f32 once. */
static inline float *tf_multiply(const td_safetensors *f, const td_st_tensor *t)
{
    const td_st_tensor *ts = tf_scale(f, t->name);
    TD_CHECK(ts);
    float *scale = tf_floats(ts);
    int64_t N = t->shape[0], K = t->shape[1], cols = tf_ends(ts->name, "_inv") ? (K + 127) / 128 : 1,
            bn = cols > 1 || tf_ends(ts->name, "_inv") ? 128 : 1;
    float *w = malloc((size_t)(N * K) * sizeof *w);
    for (int64_t n = 0; n < N; n++)
        for (int64_t k = 0; k < K; k++)
            w[n * K + k] =
                (float)(tf_code(t->data[n * K + k]) * (double)scale[n / bn * cols + (bn == 1 ? 0 : k / 128)]);
    free(scale);
    return w;
}

static inline void tf_plain(const char *from, const char *to, td_dtype dtype)
{
    td_safetensors *f;
    tf_set *s = calloc(1, sizeof *s);
    TD_CHECK(td_safetensors_open_dir(from, &f) == TD_OK);
    for (size_t i = 0; i < td_safetensors_count(f); i++) {
        const td_st_tensor *t = td_safetensors_at(f, i);
        if (tf_ends(t->name, "_scale") || tf_ends(t->name, "_scale_inv")) continue;
        if (t->dtype != TD_ST_F8_E4M3) {
            tf_add(s, t->name, t->dtype, t->rank, t->shape[0], t->shape[1], tf_copy(t));
            continue;
        }
        size_t n = td_st_elements(t);
        float *w = tf_multiply(f, t);
        void *out = malloc(n * 4);
        td_convert(out, dtype, w, TD_F32, n);
        free(w);
        tf_add(s, t->name, dtype == TD_F32 ? TD_ST_F32 : TD_ST_BF16, 2, t->shape[0], t->shape[1], out);
    }
    td_safetensors_close(f);
    char *text = tf_config(from), *cut = strstr(text, "\"quantization_config\"");
    TD_CHECK(cut); /* the last member */
    while (*cut != ',') cut--;
    strcpy(cut, "}");
    tf_write(s, to, text);
    free(text);
}

#endif
