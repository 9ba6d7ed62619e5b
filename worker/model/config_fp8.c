// SPDX-License-Identifier: Apache-2.0
/* worker/model/config_fp8.c - quantization_config: FP8 weights in the two ways that are read, everything else refused
 * by name. Every key in there is arithmetic unless it is listed here; activations are not rounded (fp8.h), so of the
 * keys about them only those count that would put more tensors into the checkpoint. */
#include "common/check.h"
#include "worker/model/config_int.h"
#include "worker/model/fp8.h"

/* A key and the JSON values it may have ("a|b"; NULL: any). Missing counts as null. */
typedef struct rule {
    const char *key, *values;
} rule;

static td_status refuse(const char *where, const char *key, const td_json *v)
{
    td_buf b;
    td_buf_init(&b, 1 << 20);
    if (v)
        td_json_write(&b, v, 0);
    else
        td_buf_str(&b, "null");
    td_status st = td_fail(TD_ENOSUP, "config.json: %s.%.60s = %.80s%s is not supported", where, key, b.p ? b.p : "?",
                           b.len > 80 ? "..." : "");
    td_buf_deinit(&b);
    return st;
}

static bool allowed(const td_json *v, const char *values)
{
    td_buf b;
    bool ok = !values;
    td_buf_init(&b, 1 << 20);
    if (v)
        td_json_write(&b, v, 0);
    else
        td_buf_str(&b, "null");
    for (const char *p = values; p && b.p && !ok; p = strchr(p, '|') ? strchr(p, '|') + 1 : NULL) {
        size_t n = strcspn(p, "|");
        ok = n == b.len && !memcmp(p, b.p, n);
    }
    td_buf_deinit(&b);
    return ok;
}

static td_status check_members(const td_json *o, const char *where, const rule *r, size_t n)
{
    if (!o || o->type != TD_JSON_OBJ) return td_fail(TD_EPROTO, "config.json: %s is no object", where);
    for (size_t i = 0; i < n; i++) {
        const td_json *v = td_json_get(o, r[i].key);
        if (!allowed(v, r[i].values)) return refuse(where, r[i].key, v);
    }
    for (const td_json *v = o->child; v; v = v->next) {
        size_t i = 0;
        while (i < n && strcmp(r[i].key, v->key)) i++;
        if (i == n && v->type != TD_JSON_NULL) return refuse(where, v->key, v);
    }
    return TD_OK;
}

/* ---- modules that stay as they are ---- */

static td_status read_keep(const td_json *list, const char *where, td_fp8_desc *out)
{
    if (td_json_is_null(list)) return TD_OK;
    if (list->type != TD_JSON_ARR) return td_fail(TD_EPROTO, "config.json: %s is no list of names", where);
    for (const td_json *v = list->child; v; v = v->next) {
        if (v->type != TD_JSON_STR || !v->n || memchr(v->s, 0, v->n))
            return td_fail(TD_EPROTO, "config.json: %s has an entry that is no name", where);
        if (!td_fp8_pattern_ok(v->s, out->any_part))
            return td_fail(TD_ENOSUP, "config.json: %s: the pattern \"%.120s\" is not supported", where, v->s);
        if (out->keep_bytes + v->n + 1 > sizeof out->keep)
            return td_fail(TD_EFULL, "config.json: %s has more than %zu bytes", where, sizeof out->keep);
        memcpy(out->keep + out->keep_bytes, v->s, v->n + 1);
        out->keep_bytes += v->n + 1;
    }
    return TD_OK;
}

/* ---- the two ways ---- */

/* transformers' FineGrainedFP8Config, as DeepSeek and Qwen publish it. */
static td_status read_blocks(const td_json *q, td_fp8_desc *out)
{
    static const rule rules[] = {{"quant_method", NULL},
                                 {"fmt", "null|\"e4m3\""},
                                 {"activation_scheme", "null|\"dynamic\""},
                                 {"weight_block_size", "[128, 128]"},
                                 {"modules_to_not_convert", NULL},
                                 {"dequantize", "null|false"}};
    TD_TRY(check_members(q, "quantization_config", rules, TD_COUNT(rules)));
    out->kind = TD_FP8_BLOCKS;
    out->suffix = "_scale_inv";
    out->any_part = true;
    return read_keep(td_json_get(q, "modules_to_not_convert"), "quantization_config.modules_to_not_convert", out);
}

static td_status read_group(const td_json *g, td_fp8_desc *out)
{
    static const rule rules[] = {{"targets", "[\"Linear\"]"},
                                 {"weights", NULL},
                                 {"input_activations", NULL},
                                 {"output_activations", "null"},
                                 {"format", "null|\"float-quantized\""}};
    static const rule weights[] = {{"num_bits", "8"},          {"type", "\"float\""},
                                   {"symmetric", "null|true"}, {"strategy", "\"channel\"|\"block\""},
                                   {"dynamic", "null|false"},  {"group_size", "null"},
                                   {"actorder", "null"},       {"block_structure", "null|[128, 128]"},
                                   {"observer", NULL},         {"observer_kwargs", NULL}};
    static const char where[] = "quantization_config.config_groups.weights";
    TD_TRY(check_members(g, "quantization_config.config_groups", rules, TD_COUNT(rules)));
    const td_json *w = td_json_get(g, "weights"), *a = td_json_get(g, "input_activations");
    TD_TRY(check_members(w, where, weights, TD_COUNT(weights)));
    bool blocks = allowed(td_json_get(w, "strategy"), "\"block\"");
    if (blocks == td_json_is_null(td_json_get(w, "block_structure")))
        return refuse(where, "block_structure", td_json_get(w, "block_structure"));
    if (!td_json_is_null(a) && !allowed(td_json_get(a, "dynamic"), "true"))
        return refuse("quantization_config.config_groups.input_activations", "dynamic", td_json_get(a, "dynamic"));
    out->kind = blocks ? TD_FP8_BLOCKS : TD_FP8_ROWS;
    return TD_OK;
}

static td_status read_compressed(const td_json *q, td_fp8_desc *out)
{
    static const rule rules[] = {{"quant_method", NULL},
                                 {"format", "\"float-quantized\""},
                                 {"quantization_status", "null|\"compressed\"|\"frozen\""},
                                 {"config_groups", NULL},
                                 {"ignore", NULL},
                                 {"version", NULL},
                                 {"global_compression_ratio", NULL},
                                 {"kv_cache_scheme", "null"},
                                 {"sparsity_config", "null|{}"},
                                 {"transform_config", "null|{}"}};
    TD_TRY(check_members(q, "quantization_config", rules, TD_COUNT(rules)));
    const td_json *groups = td_json_get(q, "config_groups");
    if (!groups || groups->type != TD_JSON_OBJ || groups->n != 1)
        return refuse("quantization_config", "config_groups", groups);
    out->suffix = "_scale";
    TD_TRY(read_group(groups->child, out));
    return read_keep(td_json_get(q, "ignore"), "quantization_config.ignore", out);
}

td_status td_config_fp8(const td_json *root, td_fp8_desc *out)
{
    static const struct {
        const char *method;
        td_status (*read)(const td_json *, td_fp8_desc *);
    } methods[] = {{"fp8", read_blocks}, {"compressed-tensors", read_compressed}};
    const td_json *q = td_json_get(root, "quantization_config");
    *out = (td_fp8_desc){0};
    if (td_json_is_null(q) || (q->type == TD_JSON_OBJ && !q->n) || (q->type == TD_JSON_BOOL && !q->truth))
        return TD_OK;
    const char *method = td_json_str(q, "quant_method", NULL);
    for (size_t i = 0; method && i < TD_COUNT(methods); i++)
        if (!strcmp(method, methods[i].method)) return methods[i].read(q, out);
    return refuse("quantization_config", "quant_method", td_json_get(q, "quant_method"));
}
