// SPDX-License-Identifier: Apache-2.0
/* worker/model/config.c - a table of families, one list of keys that must be neutral, then the descriptor
 * field by field. Rope keys are in config_rope.c. */
#include "worker/model/config.h"
#include "common/arena.h"
#include "common/check.h"
#include "common/log.h"
#include "worker/model/config_int.h"
#include "worker/model/file.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>

static const char file[] = "config.json";

/* ---- the families ---- */

typedef enum { BIAS_NONE, BIAS_QKV, BIAS_BY_KEY } bias_rule; /* BY_KEY: attention_bias, on q, k, v and o */
/* ALL: sliding_window on every layer; OFF: use_sliding_window must be false, and the rest is then ignored */
typedef enum { WINDOW_NONE, WINDOW_ALL, WINDOW_QWEN, WINDOW_OFF } window_rule;
/* EVERY: on all layers, of intermediate_size; QWEN: sizes, and which layers, have keys of their own */
typedef enum { MOE_NONE, MOE_EVERY, MOE_QWEN } moe_rule;

typedef struct family {
    const char *arch, *model_type;
    bias_rule bias;
    bool mlp_bias_key, qk_norm, q_scaling;
    window_rule window;
    int default_window, default_kv_heads, default_head_dim; /* 0: none; = query heads; hidden / heads */
    double default_eps, default_theta;
    moe_rule moe;
} family;

static const family families[] = {
    {"LlamaForCausalLM", "llama", BIAS_BY_KEY, true, false, false, WINDOW_NONE, 0, 0, 0, 1e-6, 1e4, MOE_NONE},
    {"MistralForCausalLM", "mistral", BIAS_NONE, false, false, false, WINDOW_ALL, 4096, 8, 0, 1e-6, 1e4,
     MOE_NONE},
    {"Ministral3ForCausalLM", "ministral3", BIAS_NONE, false, false, true, WINDOW_ALL, 0, 8, 128, 1e-5, 1e4,
     MOE_NONE},
    {"Qwen2ForCausalLM", "qwen2", BIAS_QKV, false, false, false, WINDOW_QWEN, 4096, 32, 0, 1e-6, 1e4,
     MOE_NONE},
    {"Qwen3ForCausalLM", "qwen3", BIAS_BY_KEY, false, true, false, WINDOW_QWEN, 4096, 32, 128, 1e-6, 1e4,
     MOE_NONE},
    {"MixtralForCausalLM", "mixtral", BIAS_NONE, false, false, false, WINDOW_ALL, 0, 8, 0, 1e-5, 1e6,
     MOE_EVERY},
    {"Qwen3MoeForCausalLM", "qwen3_moe", BIAS_BY_KEY, false, true, false, WINDOW_OFF, 0, 4, 0, 1e-6, 1e4,
     MOE_QWEN},
};

/* ---- keys that must be neutral ---- */

/* null, false, 0 or empty */
static const char *const off_keys[] = {
    /* other ways to store weights */
    "quantization", "compression_config",
    /* soft caps and scales */
    "attn_logit_softcapping", "final_logit_softcapping", "logits_soft_cap", "query_pre_attn_scalar",
    "attention_multiplier", "scale_depth", "dim_model_base", "attn_temperature_tuning",
    /* parts of the block that are not in this one */
    "clip_qkv", "use_qk_norm", "qk_layernorm", "qk_norm", "attention_out_bias", "lm_head_bias",
    "parallel_attn", "use_parallel_residual", "add_cross_attention", "cross_attention_layers", "alibi",
    "use_alibi", "attention_sinks", "use_sinks", "num_kv_shared_layers", "hidden_size_per_layer_input",
    "final_layernorm_bias",
    /* mixtures of experts and latent attention */
    "n_routed_experts", "n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size",
    "first_k_dense_replace", "moe_router_enable_expert_bias", "swiglu_limit", "kv_lora_rank", "q_lora_rank",
    "num_nextn_predict_layers",
    /* positions */
    "rope_interleave", "rope_interleaved", "use_mrope", "no_rope_layers", "no_rope_layer_interval",
    "rope_local_base_freq", "attention_chunk_size", "sliding_window_pattern",
    /* wrappers */
    "text_config", "vision_config", "audio_config", "is_encoder_decoder"};

/* of mixtures of experts: off in the other families */
static const char *const moe_keys[] = {"num_experts", "num_local_experts", "num_experts_per_tok",
                                       "moe_intermediate_size"};
static const char *const qwen_moe_keys[] = {"norm_topk_prob", "decoder_sparse_step", "mlp_only_layers"};

/* the same, or 1 */
static const char *const one_keys[] = {
    "embedding_multiplier", "residual_multiplier",   "logits_scaling", "logit_scale",           "scale_emb",
    "pretraining_tp",       "partial_rotary_factor", "rotary_pct",     "routed_scaling_factor", "n_group",
    "topk_group",           "moe_layer_freq"};

static const char *const known[] = {
    /* read */
    "architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
    "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act", "hidden_activation",
    "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings", "attention_bias", "mlp_bias",
    "torch_dtype", "dtype", "bos_token_id", "eos_token_id", "sliding_window", "use_sliding_window",
    "max_window_layers", "layer_types", "rope_theta", "rope_scaling", "rope_parameters",
    "original_max_position_embeddings", "quantization_config",
    /* without effect on inference */
    "pad_token_id", "transformers_version", "use_cache", "initializer_range", "attention_dropout",
    "_name_or_path", "hidden_dropout", "embd_pdrop", "resid_pdrop", "attn_pdrop", "output_attentions",
    "output_hidden_states", "return_dict", "id2label", "label2id", "task_specific_params",
    "_attn_implementation", "auto_map", "unsloth_fixed", "unsloth_version", "problem_type", "sep_token_id",
    "decoder_start_token_id", "chunk_size_feed_forward", "tokenizer_class", "is_decoder", "prefix",
    "pruned_heads", "attn_implementation", "license", "max_length", "temperature", "top_k", "top_p",
    "output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "do_sample", "vocab_file",
    "num_labels", "finetuning_task", "gradient_checkpointing"};

/* ---- typed getters ---- */

static td_status wrong(const td_json *v, const char *key, const char *expected)
{
    td_buf b;
    td_buf_init(&b, 1 << 20);
    td_json_write(&b, v, 0);
    td_status st = td_fail(TD_EPROTO, "%s: %s is %.80s%s, expected %s", file, key, b.p ? b.p : "?",
                           b.len > 80 ? "..." : "", expected);
    td_buf_deinit(&b);
    return st;
}

td_status td_config_num(const td_json *o, const char *key, double dflt, double lo, double hi, double *out)
{
    const td_json *v = td_json_get(o, key);
    char expected[80];
    if (td_json_is_null(v)) {
        if (isnan(dflt)) return td_fail(TD_EPROTO, "%s: %s is missing", file, key);
        *out = dflt;
        return TD_OK;
    }
    snprintf(expected, sizeof expected, "a number from %g to %g", lo, hi);
    if ((v->type != TD_JSON_INT && v->type != TD_JSON_REAL) || !(v->num >= lo && v->num <= hi))
        return wrong(v, key, expected);
    *out = v->num;
    return TD_OK;
}

td_status td_config_int(const td_json *o, const char *key, int dflt, int lo, int hi, int *out)
{
    const td_json *v = td_json_get(o, key);
    char expected[80];
    if (td_json_is_null(v)) {
        if (dflt == TD_CONFIG_REQUIRED) return td_fail(TD_EPROTO, "%s: %s is missing", file, key);
        *out = dflt;
        return TD_OK;
    }
    snprintf(expected, sizeof expected, "an integer from %d to %d", lo, hi);
    if ((v->type != TD_JSON_INT && v->type != TD_JSON_REAL) || !(v->num >= lo && v->num <= hi) ||
        v->num != floor(v->num))
        return wrong(v, key, expected);
    *out = (int)v->num;
    return TD_OK;
}

td_status td_config_bool(const td_json *o, const char *key, bool dflt, bool *out)
{
    const td_json *v = td_json_get(o, key);
    if (td_json_is_null(v))
        *out = dflt;
    else if (v->type != TD_JSON_BOOL)
        return wrong(v, key, "true or false");
    else
        *out = v->truth;
    return TD_OK;
}

/* ---- refusals ---- */

static bool is_off(const td_json *v, bool one)
{
    switch (v->type) {
    case TD_JSON_NULL:
        return true;
    case TD_JSON_BOOL:
        return !v->truth;
    case TD_JSON_INT:
    case TD_JSON_REAL:
        return v->num == 0.0 || (one && v->num == 1.0);
    case TD_JSON_STR:
    case TD_JSON_ARR:
    case TD_JSON_OBJ:
        return v->n == 0;
    }
    return false;
}

static td_status refuse(const td_json *v, const family *fam)
{
    td_buf b;
    td_buf_init(&b, 1 << 20);
    td_json_write(&b, v, 0);
    td_status st = td_fail(TD_ENOSUP, "%s: %s = %.80s%s is not supported for %s", file, v->key,
                           b.p ? b.p : "?", b.len > 80 ? "..." : "", fam->arch);
    td_buf_deinit(&b);
    return st;
}

static bool listed(const char *key, const char *const *list, size_t n)
{
    for (size_t i = 0; i < n; i++)
        if (!strcmp(list[i], key)) return true;
    return false;
}

static td_status check_key(const td_json *v, const family *fam, const char **unknown)
{
    bool fine = true;
    if (listed(v->key, one_keys, TD_COUNT(one_keys)))
        fine = is_off(v, true);
    else if (listed(v->key, off_keys, TD_COUNT(off_keys)))
        fine = is_off(v, false);
    else if (listed(v->key, moe_keys, TD_COUNT(moe_keys)))
        fine = fam->moe != MOE_NONE || is_off(v, false);
    else if (listed(v->key, qwen_moe_keys, TD_COUNT(qwen_moe_keys)))
        fine = fam->moe == MOE_QWEN || fam->moe == MOE_NONE || is_off(v, false);
    else if (!strcmp(v->key, "scoring_func"))
        fine = v->type == TD_JSON_NULL || (v->type == TD_JSON_STR && !strcmp(v->s, "softmax"));
    else if (!strcmp(v->key, "use_sliding_window") && fam->window == WINDOW_OFF)
        fine = is_off(v, false);
    else if (!strcmp(v->key, "hidden_act") || !strcmp(v->key, "hidden_activation"))
        fine = v->type == TD_JSON_NULL || (v->type == TD_JSON_STR && !strcmp(v->s, "silu"));
    else if (!strcmp(v->key, "attention_bias") && fam->bias != BIAS_BY_KEY)
        fine = is_off(v, false);
    else if (!strcmp(v->key, "mlp_bias") && !fam->mlp_bias_key)
        fine = is_off(v, false);
    else if (!strcmp(v->key, "sliding_window") && fam->window == WINDOW_NONE)
        fine = is_off(v, false);
    else if (!*unknown && !listed(v->key, known, TD_COUNT(known)))
        *unknown = v->key;
    return fine ? TD_OK : refuse(v, fam);
}

static td_status check_keys(const td_json *root, const family *fam)
{
    const char *unknown = NULL;
    for (const td_json *v = root->child; v; v = v->next) TD_TRY(check_key(v, fam, &unknown));
    if (unknown) TD_WARN("%s: ignoring a key that is not known here: %.80s", file, unknown);
    return TD_OK;
}

/* ---- family ---- */

static td_status no_family(const char *what, const char *name)
{
    char list[512] = "";
    for (size_t i = 0, n = 0; i < TD_COUNT(families); i++)
        n += (size_t)snprintf(list + n, sizeof list - n, "%s%s", i ? ", " : "", families[i].arch);
    return td_fail(TD_ENOSUP, "%s: %s %.60s is not supported (this build has %s)", file, what, name, list);
}

static td_status find_family(const td_json *root, const family **out)
{
    const td_json *arches = td_json_get(root, "architectures");
    const td_json *arch = arches && arches->type == TD_JSON_ARR ? arches->child : NULL;
    const char *model_type = td_json_str(root, "model_type", NULL);
    if (!td_json_is_null(arches) && (!arch || arch->type != TD_JSON_STR || arches->n != 1))
        return wrong(arches, "architectures", "a list of one name");
    if (!arch && !model_type) return td_fail(TD_EPROTO, "%s: neither architectures nor model_type", file);
    for (size_t i = 0; i < TD_COUNT(families); i++) {
        const family *f = &families[i];
        if (strcmp(arch ? f->arch : f->model_type, arch ? arch->s : model_type)) continue;
        if (model_type && strcmp(model_type, f->model_type))
            return td_fail(TD_EPROTO, "%s: architectures says %s, but model_type %.60s", file, f->arch,
                           model_type);
        *out = f;
        return TD_OK;
    }
    return arch ? no_family("architecture", arch->s) : no_family("model_type", model_type);
}

/* ---- fields ---- */

static td_status read_sizes(const td_json *o, const family *f, td_model_desc *d)
{
    const int R = TD_CONFIG_REQUIRED;
    TD_TRY(td_config_int(o, "vocab_size", R, 1, 1 << 22, &d->V));
    TD_TRY(td_config_int(o, "hidden_size", R, 1, 1 << 17, &d->E));
    TD_TRY(td_config_int(o, "intermediate_size", R, 1, 1 << 20, &d->F));
    TD_TRY(td_config_int(o, "num_hidden_layers", R, 1, TD_MAX_LAYERS, &d->L));
    TD_TRY(td_config_int(o, "num_attention_heads", R, 1, 1024, &d->H));
    TD_TRY(td_config_int(o, "num_key_value_heads", f->default_kv_heads ? f->default_kv_heads : d->H, 1, 1024,
                         &d->G));
    if (d->H % d->G)
        return td_fail(TD_EPROTO, "%s: num_attention_heads %d is no multiple of num_key_value_heads %d", file,
                       d->H, d->G);
    TD_TRY(td_config_int(o, "head_dim", f->default_head_dim, 2, 1024, &d->D));
    if (d->D == 0 && d->E % d->H)
        return td_fail(TD_EPROTO, "%s: hidden_size %d is no multiple of num_attention_heads %d", file, d->E,
                       d->H);
    if (d->D == 0) d->D = d->E / d->H;
    if (d->D % 2 || d->D > 1024) return td_fail(TD_ENOSUP, "%s: head_dim %d is odd or over 1024", file, d->D);
    TD_TRY(td_config_int(o, "max_position_embeddings", R, 1, 1 << 24, &d->max_positions));
    TD_TRY(td_config_num(o, "rms_norm_eps", f->default_eps, 1e-12, 1e-1, &d->rms_eps));
    d->attn_scale = 1.0 / sqrt(d->D);
    return TD_OK;
}

static td_status read_flags(const td_json *o, const family *f, td_model_desc *d)
{
    bool attention_bias = false;
    TD_TRY(td_config_bool(o, "tie_word_embeddings", false, &d->tied));
    if (f->bias == BIAS_BY_KEY) TD_TRY(td_config_bool(o, "attention_bias", false, &attention_bias));
    if (f->mlp_bias_key) TD_TRY(td_config_bool(o, "mlp_bias", false, &d->mlp_bias));
    d->qkv_bias = f->bias == BIAS_QKV || attention_bias;
    d->o_bias = attention_bias;
    d->qk_norm = f->qk_norm;
    return TD_OK;
}

/* ---- mixtures of experts ---- */

/* num_local_experts, or (qwen) num_experts; a file that has both means the same. */
static td_status read_expert_count(const td_json *o, int *out)
{
    const char *a = "num_experts", *b = "num_local_experts";
    int n = 0, other = 0;
    if (td_json_is_null(td_json_get(o, a))) a = b;
    TD_TRY(td_config_int(o, a, TD_CONFIG_REQUIRED, 1, TD_MAX_EXPERTS, &n));
    TD_TRY(td_config_int(o, b, n, 1, TD_MAX_EXPERTS, &other));
    if (n != other) return td_fail(TD_EPROTO, "%s: %s is %d, but %s is %d", file, a, n, b, other);
    *out = n;
    return TD_OK;
}

/* Layer i has experts unless it is listed, and if i + 1 is a multiple of the step. */
static td_status read_moe_layers(const td_json *o, td_model_desc *d)
{
    const td_json *dense = td_json_get(o, "mlp_only_layers");
    int step = 1;
    TD_TRY(td_config_int(o, "decoder_sparse_step", 1, 1, 1 << 20, &step));
    for (int i = 0; i < d->L; i++) d->layer[i].moe = (i + 1) % step == 0;
    if (td_json_is_null(dense)) return TD_OK;
    if (dense->type != TD_JSON_ARR) return wrong(dense, "mlp_only_layers", "a list of layers");
    for (const td_json *v = dense->child; v; v = v->next) {
        if (v->type != TD_JSON_INT || v->i < 0 || v->i >= d->L)
            return wrong(v, "an mlp_only_layers entry", "a layer below num_hidden_layers");
        d->layer[v->i].moe = false;
    }
    return TD_OK;
}

static td_status read_moe(const td_json *o, const family *f, td_model_desc *d)
{
    td_route_law *law = &d->moe.route;
    if (f->moe == MOE_NONE) return TD_OK;
    law->score = TD_ROUTE_SOFTMAX;
    law->renormalise = true;
    law->scale = 1.0f;
    d->moe.F = d->F;
    TD_TRY(read_expert_count(o, &law->n_experts));
    TD_TRY(td_config_int(o, "num_experts_per_tok", TD_CONFIG_REQUIRED, 1, TD_MAX_TOP_K, &law->top_k));
    if (law->top_k > law->n_experts)
        return td_fail(TD_EPROTO, "%s: num_experts_per_tok %d is more than the %d experts", file, law->top_k,
                       law->n_experts);
    for (int i = 0; i < d->L; i++) d->layer[i].moe = true;
    if (f->moe == MOE_EVERY) return TD_OK;
    TD_TRY(td_config_int(o, "moe_intermediate_size", TD_CONFIG_REQUIRED, 1, 1 << 20, &d->moe.F));
    TD_TRY(td_config_bool(o, "norm_topk_prob", false, &law->renormalise));
    return read_moe_layers(o, d);
}

static td_status read_dtype(const td_json *o, td_model_desc *d)
{
    static const struct {
        const char *name, *ours;
    } names[] = {
        {"bfloat16", "bf16"},
        {"float16", "f16"},
        {"float32", "f32"},
    };
    const char *key = td_json_is_null(td_json_get(o, "dtype")) ? "torch_dtype" : "dtype";
    const td_json *v = td_json_get(o, key);
    if (td_json_is_null(v)) return TD_OK; /* the weights say it */
    const char *s = v->type == TD_JSON_STR ? v->s : "";
    if (!strncmp(s, "torch.", 6)) s += 6;
    for (size_t i = 0; i < TD_COUNT(names); i++)
        if (!strcmp(names[i].name, s)) {
            snprintf(d->dtype, sizeof d->dtype, "%s", names[i].ours);
            return TD_OK;
        }
    return wrong(v, key, "bfloat16, float16 or float32");
}

/* ---- windows ---- */

/* layer_types where the family reads it; elsewhere it may only repeat what the other keys say. */
static td_status apply_layer_types(const td_json *types, const family *f, int window, td_model_desc *d)
{
    if (types->type != TD_JSON_ARR || types->n != (uint32_t)d->L)
        return td_fail(TD_EPROTO, "%s: layer_types is not a list of num_hidden_layers = %d names", file,
                       d->L);
    int i = 0;
    for (const td_json *t = types->child; t; t = t->next, i++) {
        const char *name = t->type == TD_JSON_STR ? t->s : "";
        bool sliding = !strcmp(name, "sliding_attention");
        if (!sliding && strcmp(name, "full_attention"))
            return wrong(t, "a layer_types entry", "full_attention or sliding_attention");
        if (sliding && window == 0)
            return td_fail(TD_EPROTO, "%s: layer_types[%d] is sliding_attention without a sliding_window",
                           file, i);
        if (f->window != WINDOW_QWEN && sliding != (d->layer[i].window > 0))
            return td_fail(TD_ENOSUP, "%s: layer_types[%d] = %s is not supported for %s", file, i, name,
                           f->arch);
        d->layer[i].window = sliding ? window : 0;
    }
    return TD_OK;
}

static td_status read_windows(const td_json *o, const family *f, td_model_desc *d)
{
    int window = 0, from = 0;
    bool use = f->window == WINDOW_ALL;
    const td_json *v = td_json_get(o, "sliding_window"), *types = td_json_get(o, "layer_types");
    if (f->window == WINDOW_QWEN) TD_TRY(td_config_bool(o, "use_sliding_window", false, &use));
    if (use && !v)
        window = f->default_window; /* absent: the class's default; null: none */
    else if (use)
        TD_TRY(td_config_int(o, "sliding_window", 0, 1, 1 << 24, &window));
    if (f->window == WINDOW_QWEN) TD_TRY(td_config_int(o, "max_window_layers", 28, 0, 1 << 20, &from));
    for (int i = 0; i < d->L; i++) d->layer[i].window = i >= from ? window : 0;
    if (!td_json_is_null(types)) TD_TRY(apply_layer_types(types, f, window, d));
    for (int i = 0; i < d->L; i++) /* a window over everything is none */
        if (d->layer[i].window >= d->max_positions) d->layer[i].window = 0;
    return td_config_group(d);
}

td_status td_config_group(td_model_desc *d)
{
    d->n_groups = 0;
    for (int i = 0; i < d->L; i++) {
        int g = 0;
        while (g < d->n_groups && d->group[g].window != d->layer[i].window) g++;
        if (g == TD_MAX_GROUPS)
            return td_fail(TD_ENOSUP, "%s: more than %d kinds of layers", file, TD_MAX_GROUPS);
        if (g == d->n_groups) d->group[d->n_groups++] = (td_group_desc){0, d->layer[i].window, d->G, d->D};
        d->layer[i].group = g;
        d->layer[i].slot = d->group[g].n_slots++;
    }
    return TD_OK;
}

/* ---- special tokens ---- */

static td_status read_id(const td_json *v, const char *where, const char *key, int V, int32_t *out)
{
    if (v->type != TD_JSON_INT || v->i >= V || v->i < -1)
        return td_fail(TD_EPROTO, "%s: %s is not a token id below vocab_size %d", where, key, V);
    *out = (int32_t)v->i;
    return TD_OK;
}

static td_status read_eos(const td_json *v, const char *where, td_model_desc *d)
{
    bool list = v->type == TD_JSON_ARR;
    if (list && v->n > TD_MAX_EOS)
        return td_fail(TD_EFULL, "%s: more than %d eos_token_id", where, TD_MAX_EOS);
    d->n_eos = 0;
    for (const td_json *e = list ? v->child : v; e; e = list ? e->next : NULL) {
        int32_t id = -1;
        TD_TRY(read_id(e, where, "eos_token_id", d->V, &id));
        if (id >= 0) d->eos[d->n_eos++] = id;
    }
    return TD_OK;
}

static td_status read_tokens(const td_json *o, const char *where, td_model_desc *d)
{
    const td_json *bos = td_json_get(o, "bos_token_id"), *eos = td_json_get(o, "eos_token_id");
    if (!td_json_is_null(bos)) TD_TRY(read_id(bos, where, "bos_token_id", d->V, &d->bos));
    if (!td_json_is_null(eos)) TD_TRY(read_eos(eos, where, d));
    return TD_OK;
}

/* ---- both files ---- */

static td_status parse_text(td_arena *a, const char *name, const char *text, size_t n, td_json **out)
{
    if (n > TD_CONFIG_MAX_BYTES) return td_fail(TD_EFULL, "%s: over %d bytes", name, TD_CONFIG_MAX_BYTES);
    td_status st = td_json_parse(a, text, n, (td_json_limits){.max_depth = 32, .max_nodes = 200000}, out);
    if (st < 0) return td_fail(st, "%s: %s", name, td_reason());
    if ((*out)->type != TD_JSON_OBJ) return td_fail(TD_EPROTO, "%s: not a JSON object", name);
    return TD_OK;
}

static td_status parse_config(td_arena *a, const char *text, size_t n, td_model_desc *d)
{
    td_json *root;
    const family *f = NULL;
    TD_TRY(parse_text(a, file, text, n, &root));
    TD_TRY(find_family(root, &f));
    TD_TRY(check_keys(root, f));
    snprintf(d->arch, sizeof d->arch, "%s", f->arch);
    d->bos = -1;
    TD_TRY(read_sizes(root, f, d));
    TD_TRY(read_flags(root, f, d));
    TD_TRY(read_dtype(root, d));
    TD_TRY(read_moe(root, f, d));
    TD_TRY(td_config_fp8(root, &d->fp8));
    TD_TRY(td_config_rope(root, f->default_theta, f->q_scaling, d));
    TD_TRY(read_windows(root, f, d));
    TD_TRY(read_tokens(root, file, d));
    const td_hkey key = {0x74616e64656d2d63ull, 0x6f6e6669672d3031ull};
    d->digest = td_siphash128(key, text, n);
    return TD_OK;
}

td_status td_config_parse(const char *config, size_t n, const char *generation, size_t gen_n,
                          td_model_desc *out)
{
    td_arena a;
    td_arena_init(&a, (size_t)128 << 20);
    td_model_desc *d = td_xalloc(sizeof *d);
    td_json *root;
    td_status st = parse_config(&a, config, n, d);
    if (st >= 0 && generation) {
        st = parse_text(&a, "generation_config.json", generation, gen_n, &root);
        if (st >= 0) st = read_tokens(root, "generation_config.json", d);
    }
    if (st >= 0) *out = *d;
    free(d);
    td_arena_deinit(&a);
    return st;
}

td_status td_model_desc_read(const char *dir, td_model_desc *out)
{
    char path[4096], *config = NULL, *generation = NULL;
    size_t n = 0, gen_n = 0;
    TD_TRY(td_file_path(path, sizeof path, dir, file));
    if (!td_file_exists(path)) return td_fail(TD_EIO, "no %s in the model folder %s", file, dir);
    td_status st = td_file_read(path, file, TD_CONFIG_MAX_BYTES, &config, &n);
    if (st >= 0) st = td_file_path(path, sizeof path, dir, "generation_config.json");
    if (st >= 0 && td_file_exists(path))
        st = td_file_read(path, "generation_config.json", TD_CONFIG_MAX_BYTES, &generation, &gen_n);
    if (st >= 0) st = td_config_parse(config, n, generation, gen_n, out);
    free(config);
    free(generation);
    return st;
}

/* ---- shapes without files ---- */

td_status td_model_desc_shape(const char *shape, td_model_desc *out)
{
    static const struct {
        const char *name;
        int E, F, L, H, G, D, V;
        bool tied;
        int experts, top_k;
    } shapes[] = {
        {"tiny", 256, 768, 6, 4, 2, 64, 2048, true, 0, 0},
        {"0.5b", 896, 4864, 24, 14, 2, 64, 151936, true, 0, 0},
        {"1b", 2048, 8192, 16, 32, 8, 64, 128256, true, 0, 0},
        {"8b", 4096, 14336, 32, 32, 8, 128, 128256, true, 0, 0},
        {"ranks-tiny", 128, 256, 4, 8, 2, 16, 509, false, 0, 0},
        {"ranks-mqa", 128, 256, 4, 8, 1, 16, 509, true, 0, 0},
        {"moe-tiny", 128, 128, 4, 8, 2, 16, 509, false, 8, 2},
    };
    for (size_t i = 0; i < TD_COUNT(shapes); i++) {
        if (strcmp(shapes[i].name, shape)) continue;
        td_model_desc d = {.dtype = "bf16",
                           .L = shapes[i].L,
                           .E = shapes[i].E,
                           .H = shapes[i].H,
                           .G = shapes[i].G,
                           .D = shapes[i].D,
                           .F = shapes[i].F,
                           .V = shapes[i].V,
                           .max_positions = 131072,
                           .rms_eps = 1e-5,
                           .tied = shapes[i].tied,
                           .attn_scale = 1.0 / sqrt(shapes[i].D),
                           .bos = 0,
                           .n_eos = 1,
                           .eos = {1}};
        d.rope = (td_rope_desc){.type = TD_ROPE_DEFAULT, .theta = 500000.0, .factor = 1.0, .rot_dim = d.D};
        bool moe = shapes[i].experts > 0;
        snprintf(d.arch, sizeof d.arch, "%s", moe ? "MixtralForCausalLM" : "LlamaForCausalLM");
        if (moe)
            d.moe = (td_moe_desc){{shapes[i].experts, shapes[i].top_k, TD_ROUTE_SOFTMAX, true, 1.0f}, d.F};
        for (int k = 0; k < d.L; k++) d.layer[k].moe = moe;
        const td_hkey key = {0x74616e64656d2d64ull, 0x756d6d792d303131ull};
        d.digest = td_siphash128(key, shape, strlen(shape));
        TD_TRY(td_config_group(&d));
        *out = d;
        return TD_OK;
    }
    return td_fail(TD_ENOSUP,
                   "no shape called %.40s (there are tiny, 0.5b, 1b, 8b, ranks-tiny, ranks-mqa, moe-tiny)",
                   shape);
}
