// SPDX-License-Identifier: Apache-2.0
/* worker/model/config_rope.c - rope keys of both transformers generations. Every key in there is arithmetic,
 * so an unknown one is refused. */
#include "common/check.h"
#include "worker/model/config_int.h"
#include <math.h>

/* Of all types; a known key in a section of another type is ignored, as transformers does. */
static const char *const rope_keys[] = {
    "rope_theta",
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "attention_factor",
    "truncate",
    "partial_rotary_factor",
    "llama_4_scaling_beta",
    "max_position_embeddings",
    "finetuned",
};

static td_status read_type(const td_json *o, td_rope_type *out)
{
    static const char *const names[] = {"default", "linear", "llama3", "yarn"};
    const td_json *v = td_json_get(o, "rope_type");
    if (td_json_is_null(v)) v = td_json_get(o, "type");
    if (td_json_is_null(v)) {
        *out = TD_ROPE_DEFAULT;
        return TD_OK;
    }
    const char *s = v->type == TD_JSON_STR ? v->s : "?";
    for (size_t i = 0; i < TD_COUNT(names); i++)
        if (!strcmp(names[i], s)) {
            *out = (td_rope_type)i;
            return TD_OK;
        }
    return td_fail(TD_ENOSUP,
                   "config.json: rope type %.40s is not supported (default, linear, llama3, yarn are)", s);
}

static td_status check_keys(const td_json *o)
{
    for (const td_json *v = o->child; v; v = v->next) {
        size_t i = 0;
        while (i < TD_COUNT(rope_keys) && strcmp(rope_keys[i], v->key)) i++;
        if (i == TD_COUNT(rope_keys) && v->type != TD_JSON_NULL)
            return td_fail(TD_ENOSUP, "config.json: rope key %.60s is not supported", v->key);
    }
    double partial;
    TD_TRY(td_config_num(o, "partial_rotary_factor", 1.0, 0.0, 1.0, &partial));
    if (partial != 1.0)
        return td_fail(TD_ENOSUP, "config.json: partial_rotary_factor = %g is not supported", partial);
    return TD_OK;
}

/* Per layer type ({"full_attention": {...}, "sliding_attention": {...}}): fine while all are the same. */
static td_status unnest(const td_json **section)
{
    const td_json *o = *section, *first = NULL;
    td_buf a, b;
    td_status st = TD_OK;
    td_buf_init(&a, 1 << 20);
    td_buf_init(&b, 1 << 20);
    for (const td_json *v = o->child; v; v = v->next) {
        if (strcmp(v->key, "full_attention") && strcmp(v->key, "sliding_attention")) continue;
        td_buf_reset(&b);
        td_json_write(first ? &b : &a, v, 0);
        if (v->type != TD_JSON_OBJ)
            st = td_fail(TD_EPROTO, "config.json: rope_parameters.%s is no object", v->key);
        else if (first && (a.len != b.len || memcmp(a.p, b.p, a.len)))
            st = td_fail(TD_ENOSUP,
                         "config.json: rope_parameters that differ by layer type are not supported");
        if (!first) first = v;
    }
    td_buf_deinit(&a);
    td_buf_deinit(&b);
    if (first && st >= 0) *section = first;
    return st;
}

/* original_max_position_embeddings: beside rope_parameters (it wins, as in transformers), in it, or
 * max_position_embeddings. */
static td_status read_original(const td_json *root, const td_json *o, td_model_desc *d)
{
    const char *key = "original_max_position_embeddings";
    return td_config_int(td_json_is_null(td_json_get(root, key)) ? o : root, key, d->max_positions, 1,
                         1 << 24, &d->rope.original_max);
}

static td_status read_llama3(const td_json *root, const td_json *o, td_model_desc *d)
{
    td_rope_desc *r = &d->rope;
    TD_TRY(td_config_num(o, "factor", NAN, 1.0, 1e4, &r->factor));
    TD_TRY(td_config_num(o, "low_freq_factor", NAN, 1e-3, 1e4, &r->low_freq_factor));
    TD_TRY(td_config_num(o, "high_freq_factor", NAN, 1e-3, 1e4, &r->high_freq_factor));
    if (!(r->high_freq_factor > r->low_freq_factor))
        return td_fail(TD_EPROTO, "config.json: high_freq_factor must be greater than low_freq_factor");
    return read_original(root, o, d);
}

static td_status read_yarn(const td_json *root, const td_json *o, td_model_desc *d)
{
    td_rope_desc *r = &d->rope;
    TD_TRY(read_original(root, o, d));
    double implied = (double)d->max_positions / r->original_max;
    TD_TRY(td_config_num(o, "factor", implied, 1.0, 1e4, &r->factor));
    TD_TRY(td_config_num(o, "beta_fast", 32.0, 0.0, 1e4, &r->beta_fast));
    TD_TRY(td_config_num(o, "beta_slow", 1.0, 0.0, 1e4, &r->beta_slow));
    if (r->beta_fast == 0.0) r->beta_fast = 32.0; /* 0 counts as unset, as in transformers */
    if (r->beta_slow == 0.0) r->beta_slow = 1.0;
    if (r->beta_fast < r->beta_slow)
        return td_fail(TD_EPROTO, "config.json: beta_fast is less than beta_slow");
    TD_TRY(td_config_num(o, "mscale", 0.0, 0.0, 1e3, &r->mscale));
    TD_TRY(td_config_num(o, "mscale_all_dim", 0.0, 0.0, 1e3, &r->mscale_all_dim));
    TD_TRY(td_config_num(o, "attention_factor", 0.0, 1e-6, 1e3, &r->attention_factor));
    return td_config_bool(o, "truncate", true, &r->truncate);
}

/* A configuration with yarn added by hand keeps the positions that the model was trained with, and names them again: what it
 * serves is factor times those, as in vLLM. Without that key it is not known which of the two the number is. */
static void extend_positions(const td_json *root, const td_json *o, td_model_desc *d)
{
    const char *key = "original_max_position_embeddings";
    if (d->rope.type != TD_ROPE_YARN || (td_json_is_null(td_json_get(root, key)) && td_json_is_null(td_json_get(o, key))))
        return;
    double served = d->rope.factor * d->rope.original_max;
    d->max_positions = TD_MAX(d->max_positions, (int)TD_MIN(served, (double)(1 << 24)));
}

static td_status read_section(const td_json *root, const td_json *o, td_model_desc *d)
{
    td_rope_desc *r = &d->rope;
    TD_TRY(check_keys(o));
    TD_TRY(read_type(o, &r->type));
    TD_TRY(td_config_num(o, "rope_theta", r->theta, 1.0 + 1e-6, 1e15, &r->theta));
    switch (r->type) {
    case TD_ROPE_DEFAULT:
        return TD_OK;
    case TD_ROPE_LINEAR:
        return td_config_num(o, "factor", NAN, 1.0, 1e4, &r->factor);
    case TD_ROPE_LLAMA3:
        return read_llama3(root, o, d);
    case TD_ROPE_YARN:
        return read_yarn(root, o, d);
    }
    return TD_OK;
}

/* The class's own default when a ministral3 config has no rope keys at all would be yarn x16: such a file is
 * refused instead. */
static td_status read_q_scaling(const td_json *o, bool q_scaling, td_model_desc *d)
{
    if (o) TD_TRY(td_config_num(o, "llama_4_scaling_beta", 0.0, 0.0, 1e3, &d->q_scale_beta));
    if (!q_scaling && d->q_scale_beta != 0.0)
        return td_fail(TD_ENOSUP, "config.json: llama_4_scaling_beta is not supported for %s", d->arch);
    if (q_scaling && !o) return td_fail(TD_EPROTO, "config.json: rope_parameters are missing");
    if (q_scaling)
        return td_config_int(o, "original_max_position_embeddings", d->max_positions, 1, 1 << 24,
                             &d->q_scale_base);
    return TD_OK;
}

td_status td_config_rope(const td_json *root, double theta, bool q_scaling, td_model_desc *d)
{
    const td_json *o = td_json_get(root, "rope_parameters");
    const char *name = "rope_parameters";
    if (td_json_is_null(o)) o = td_json_get(root, name = "rope_scaling");
    d->rope = (td_rope_desc){.type = TD_ROPE_DEFAULT, .factor = 1.0, .rot_dim = d->D, .truncate = true};
    TD_TRY(td_config_num(root, "rope_theta", theta, 1.0 + 1e-6, 1e15, &d->rope.theta));
    if (td_json_is_null(o)) return read_q_scaling(NULL, q_scaling, d);
    if (o->type != TD_JSON_OBJ) return td_fail(TD_EPROTO, "config.json: %s is no object", name);
    TD_TRY(unnest(&o));
    TD_TRY(read_section(root, o, d));
    TD_TRY(read_q_scaling(o, q_scaling, d));
    extend_positions(root, o, d);
    return TD_OK;
}
