// SPDX-License-Identifier: Apache-2.0
/* router/text/tokenizer_load.c - a model folder's files into a td_tokenizer. */
#include "common/check.h"
#include "router/text/files.h"
#include "router/text/tokenizer_impl.h"
#include <stdlib.h>
#include <string.h>

static const char FILE_JSON[] = "tokenizer.json", FILE_CONFIG[] = "tokenizer_config.json";
enum { NESTING = 8 };

typedef struct loader {
    td_tokenizer *t;
    td_arena arena;
    const char *dir;
    td_json *root, *config,
        *map; /* tokenizer.json, tokenizer_config.json, special_tokens_map.json; NULL if absent */
    bool slow;
} loader;

/* ---- added tokens ---- */

/* A token's id comes from the model's vocabulary where it has that text, as in the tokenizers library. */
static td_status add_token(loader *l, int64_t id, const char *text, size_t n, const td_json *flags,
                           const char *file)
{
    int64_t known = td_bpe_find(l->t->bpe, text, n);
    if (known >= 0) id = known;
    if (id < 0 || id >= TD_BPE_MAX_ID)
        return td_fail(TD_EPROTO, "%s: added token \"%.40s\": id out of range", file, text);
    return td_added_add(&l->t->added, (uint32_t)id, text, n, flags, file);
}

static td_status load_added(loader *l)
{
    const td_json *list = td_json_get(l->root, "added_tokens"),
                  *more = td_json_get(l->config, "added_tokens_decoder");
    if (!td_json_is_null(list) && list->type != TD_JSON_ARR)
        return td_fail(TD_EPROTO, "%s: added_tokens is no list", FILE_JSON);
    for (const td_json *x = list ? list->child : NULL; x; x = x->next) {
        const td_json *c = td_json_get(x, "content");
        if (!c || c->type != TD_JSON_STR)
            return td_fail(TD_EPROTO, "%s: added_tokens: entry without content", FILE_JSON);
        TD_TRY(add_token(l, td_json_int(x, "id", -1), c->s, c->n, x, FILE_JSON));
    }
    if (!more || more->type != TD_JSON_OBJ) return TD_OK;
    for (const td_json *x = more->child; x; x = x->next) {
        const td_json *c = td_json_get(x, "content");
        char *end;
        long id = strtol(x->key, &end, 10);
        if (!c || c->type != TD_JSON_STR || *end || end == x->key)
            return td_fail(TD_EPROTO, "%s: added_tokens_decoder: bad entry \"%.40s\"", FILE_CONFIG, x->key);
        TD_TRY(add_token(l, id, c->s, c->n, x, FILE_CONFIG));
    }
    return TD_OK;
}

static const td_json *token_text(const td_json *obj, const char *key)
{
    const td_json *v = td_json_get(obj, key);
    if (v && v->type == TD_JSON_OBJ) v = td_json_get(v, "content");
    return v && v->type == TD_JSON_STR ? v : NULL;
}

int64_t td_tokenizer_id(const td_tokenizer *t, const char *text)
{
    size_t n = strlen(text);
    const td_added_token *x = td_added_find(&t->added, text, n);
    return x ? (int64_t)x->id : td_bpe_find(t->bpe, text, n);
}

/* bos or eos: its text and id; a known token so named is special even if no list says so. */
static td_status load_named(loader *l, const char *key, char **text, int64_t *id)
{
    const td_json *v = token_text(l->config, key);
    if (!v && !td_json_get(l->config, key)) v = token_text(l->map, key);
    const char *s = v ? v->s : "";
    if (!v && !l->root && !l->config && !l->map && td_bpe_find(l->t->bpe, "<|endoftext|>", 13) >= 0)
        s = "<|endoftext|>";
    *text = td_xstrdup(s);
    *id = *s ? td_tokenizer_id(l->t, s) : -1;
    if (*id >= 0 && !td_added_find(&l->t->added, s, strlen(s)))
        TD_TRY(td_added_add(&l->t->added, (uint32_t)*id, s, strlen(s), NULL, FILE_CONFIG));
    return TD_OK;
}

/* ---- post-processor ---- */

/* Processors of a Sequence wrap each other: a later one's ids go outside. */
static td_status wrap(td_tokenizer *t, bool before, const uint32_t *id, size_t n)
{
    uint32_t *list = before ? t->before : t->after, *count = before ? &t->n_before : &t->n_after;
    if (*count + n > TD_TOKENIZER_WRAP)
        return td_fail(TD_ENOSUP, "%s: post_processor adds more than %d tokens", FILE_JSON,
                       TD_TOKENIZER_WRAP);
    if (before) memmove(list + n, list, *count * sizeof *list);
    memcpy(before ? list : list + *count, id, n * sizeof *list);
    *count += (uint32_t)n;
    return TD_OK;
}

static td_status template_ids(const td_json *node, const char *name, uint32_t *id, size_t *n)
{
    const td_json *ids = td_json_get(td_json_get(td_json_get(node, "special_tokens"), name), "ids");
    if (!ids || ids->type != TD_JSON_ARR)
        return td_fail(TD_EPROTO, "%s: post_processor: token \"%.40s\" has no ids", FILE_JSON, name);
    for (const td_json *v = ids->child; v; v = v->next) {
        if (*n == TD_TOKENIZER_WRAP || v->type != TD_JSON_INT || v->i < 0 || v->i >= TD_BPE_MAX_ID)
            return td_fail(TD_EPROTO, "%s: post_processor: bad ids of \"%.40s\"", FILE_JSON, name);
        id[(*n)++] = (uint32_t)v->i;
    }
    return TD_OK;
}

static td_status load_template(td_tokenizer *t, const td_json *node)
{
    uint32_t id[2][TD_TOKENIZER_WRAP];
    size_t n[2] = {0, 0};
    int side = 0;
    const td_json *single = td_json_get(node, "single");
    if (!single || single->type != TD_JSON_ARR)
        return td_fail(TD_ENOSUP, "%s: post_processor: TemplateProcessing.single is no list", FILE_JSON);
    for (const td_json *p = single->child; p; p = p->next) {
        const td_json *special = td_json_get(p, "SpecialToken");
        if (special) TD_TRY(template_ids(node, td_json_str(special, "id", ""), id[side], &n[side]));
        else if (td_json_get(p, "Sequence") && !side) side = 1;
        else
            return td_fail(TD_ENOSUP, "%s: post_processor: TemplateProcessing piece not understood",
                           FILE_JSON);
    }
    if (!side)
        return td_fail(TD_ENOSUP, "%s: post_processor: TemplateProcessing without its sequence", FILE_JSON);
    TD_TRY(wrap(t, true, id[0], n[0]));
    return wrap(t, false, id[1], n[1]);
}

/* ["text", id] */
static td_status pair_id(const td_json *node, const char *key, uint32_t *id)
{
    const td_json *v = td_json_at(td_json_get(node, key), 1);
    if (!v || v->type != TD_JSON_INT || v->i < 0 || v->i >= TD_BPE_MAX_ID)
        return td_fail(TD_EPROTO, "%s: post_processor.%s has no id", FILE_JSON, key);
    *id = (uint32_t)v->i;
    return TD_OK;
}

static td_status load_post(td_tokenizer *t, const td_json *node, int depth)
{
    const char *type = td_json_str(node, "type", "");
    uint32_t cls, sep;
    if (td_json_is_null(node)) return TD_OK;
    if (depth > NESTING) return td_fail(TD_ENOSUP, "%s: post_processor nested too deeply", FILE_JSON);
    t->has_post = true;
    if (!strcmp(type, "ByteLevel")) return TD_OK; /* offsets only */
    if (!strcmp(type, "TemplateProcessing")) return load_template(t, node);
    if (!strcmp(type, "Sequence")) {
        const td_json *list = td_json_get(node, "processors");
        if (!list || list->type != TD_JSON_ARR)
            return td_fail(TD_EPROTO, "%s: post_processor Sequence has no processors", FILE_JSON);
        for (const td_json *c = list->child; c; c = c->next) TD_TRY(load_post(t, c, depth + 1));
        return TD_OK;
    }
    if (strcmp(type, "RobertaProcessing") && strcmp(type, "BertProcessing"))
        return td_fail(TD_ENOSUP, "%s: post_processor type \"%.40s\" is not supported", FILE_JSON, type);
    TD_TRY(pair_id(node, "cls", &cls));
    TD_TRY(pair_id(node, "sep", &sep));
    TD_TRY(wrap(t, true, &cls, 1));
    return wrap(t, false, &sep, 1);
}

static void apply_add_flags(loader *l)
{
    static const char *const own[] = {"LlamaTokenizer",         "LlamaTokenizerFast", "CodeLlamaTokenizer",
                                      "CodeLlamaTokenizerFast", "GemmaTokenizer",     "GemmaTokenizerFast"};
    td_tokenizer *t = l->t;
    const char *cls = td_json_str(l->config, "tokenizer_class", "");
    bool rebuild = !t->has_post;
    for (size_t i = 0; i < TD_COUNT(own); i++) rebuild |= !strcmp(cls, own[i]);
    const td_json *bos = td_json_get(l->config, "add_bos_token"),
                  *eos = td_json_get(l->config, "add_eos_token");
    if (!rebuild || (td_json_is_null(bos) && td_json_is_null(eos))) return;
    t->n_before = t->n_after = 0;
    if (td_json_bool(l->config, "add_bos_token", t->has_post) && t->bos >= 0)
        t->before[t->n_before++] = (uint32_t)t->bos;
    if (td_json_bool(l->config, "add_eos_token", false) && t->eos >= 0)
        t->after[t->n_after++] = (uint32_t)t->eos;
}

/* ---- vocabulary and stops ---- */

const char *td_tokenizer_raw(const td_tokenizer *t, uint32_t id, size_t *n)
{
    if (id >= t->vocab.n) return NULL;
    if (!t->added_at[id]) return td_bpe_token(t->bpe, id, n);
    const td_added_token *x = &t->added.token[t->added_at[id] - 1];
    *n = x->n;
    return x->text;
}

static td_status build_vocab(td_tokenizer *t)
{
    td_vocab *v = &t->vocab;
    v->n = td_bpe_size(t->bpe);
    for (size_t i = 0; i < t->added.n; i++) v->n = TD_MAX(v->n, t->added.token[i].id + 1);
    t->added_at = td_xalloc((v->n + 1) * sizeof(uint32_t));
    v->off = td_xalloc((v->n + 1) * sizeof(uint32_t));
    v->flags = td_xalloc(v->n + 1);
    for (size_t i = 0; i < t->added.n; i++) t->added_at[t->added.token[i].id] = (uint32_t)i + 1;
    td_buf all;
    td_buf_init(&all, 1u << 30);
    td_match *m = td_match_open();
    td_status st = TD_OK;
    for (uint32_t id = 0; id < v->n && st >= 0; id++) {
        size_t n = 0;
        const char *s = td_tokenizer_raw(t, id, &n);
        v->off[id] = (uint32_t)all.len;
        if (!s) v->flags[id] = TD_TOK_UNUSED;
        else st = td_decoder_token(t->decoder, m, s, n, false, &all);
        if (t->added_at[id])
            v->flags[id] = TD_TOK_ADDED | (t->added.token[t->added_at[id] - 1].special ? TD_TOK_SPECIAL : 0);
        else if (t->facts.byte_fallback && s && n == 6 && !memcmp(s, "<0x", 3) && all.len - v->off[id] == 1)
            v->flags[id] = TD_TOK_BYTE;
    }
    v->off[v->n] = (uint32_t)all.len;
    v->bytes = all.p ? all.p : td_xalloc(1);
    td_match_close(m);
    return st;
}

static void add_stop(td_tokenizer *t, int64_t id)
{
    if (id < 0 || id >= TD_BPE_MAX_ID || t->n_stop == TD_TOKENIZER_STOPS) return;
    for (size_t i = 0; i < t->n_stop; i++)
        if (t->stop[i] == (uint32_t)id) return;
    t->stop[t->n_stop++] = (uint32_t)id;
}

static td_status load_stops(loader *l)
{
    static const char *const files[] = {"generation_config.json", "config.json"};
    add_stop(l->t, l->t->eos);
    for (size_t i = 0; i < TD_COUNT(files); i++) {
        td_json *root;
        TD_TRY(td_files_json(l->dir, files[i], &l->arena, &root));
        const td_json *v = td_json_get(root, "eos_token_id");
        if (v && v->type == TD_JSON_INT) add_stop(l->t, v->i);
        if (v && v->type == TD_JSON_ARR)
            for (const td_json *e = v->child; e; e = e->next)
                if (e->type == TD_JSON_INT) add_stop(l->t, e->i);
    }
    return TD_OK;
}

/* ---- opening ---- */

static td_status load_json(loader *l)
{
    td_tokenizer *t = l->t;
    TD_TRY(td_bpe_open(td_json_get(l->root, "model"), FILE_JSON, &t->bpe));
    TD_TRY(td_normalizer_open(td_json_get(l->root, "normalizer"), FILE_JSON, &t->normalizer));
    TD_TRY(td_pretok_open(td_json_get(l->root, "pre_tokenizer"), FILE_JSON, l->slow, &t->pretok));
    TD_TRY(td_decoder_open(td_json_get(l->root, "decoder"), FILE_JSON, &t->decoder));
    return load_post(t, td_json_get(l->root, "post_processor"), 0);
}

static td_status load_pair(loader *l)
{
    static const char BYTELEVEL[] = "{\"type\": \"ByteLevel\", \"add_prefix_space\": false}";
    td_json *vocab, *pre;
    char *merges;
    size_t n;
    td_status st = td_files_json(l->dir, "vocab.json", &l->arena, &vocab);
    if (st == TD_AGAIN) return td_fail(TD_ENOSUP, "model folder has neither tokenizer.json nor vocab.json");
    TD_TRY(st);
    st = td_files_read(l->dir, "merges.txt", &merges, &n);
    if (st == TD_AGAIN) return td_fail(TD_ENOSUP, "model folder has vocab.json but no merges.txt");
    TD_TRY(st);
    st = td_bpe_open_files(vocab, merges, n, &l->t->bpe);
    free(merges);
    TD_TRY(st);
    TD_TRY(td_json_parse(&l->arena, BYTELEVEL, sizeof BYTELEVEL - 1, (td_json_limits){0}, &pre));
    pre->child->next->truth = td_json_bool(l->config, "add_prefix_space", false);
    TD_TRY(td_normalizer_open(NULL, "vocab.json", &l->t->normalizer));
    TD_TRY(td_pretok_open(pre, "vocab.json", l->slow, &l->t->pretok));
    return td_decoder_bytelevel(&l->t->decoder);
}

static td_status load(loader *l)
{
    td_tokenizer *t = l->t;
    TD_TRY(td_files_json(l->dir, FILE_JSON, &l->arena, &l->root));
    TD_TRY(td_files_json(l->dir, FILE_CONFIG, &l->arena, &l->config));
    TD_TRY(td_files_json(l->dir, "special_tokens_map.json", &l->arena, &l->map));
    TD_TRY(l->root ? load_json(l) : load_pair(l));
    t->facts = *td_decoder_about(t->decoder);
    TD_TRY(load_added(l));
    TD_TRY(load_named(l, "bos_token", &t->bos_text, &t->bos));
    TD_TRY(load_named(l, "eos_token", &t->eos_text, &t->eos));
    TD_TRY(td_added_build(&t->added, t->normalizer));
    apply_add_flags(l);
    TD_TRY(build_vocab(t));
    return load_stops(l);
}

td_status td_tokenizer_open_slow(const char *model_dir, bool slow, td_tokenizer **out)
{
    loader l = {.t = td_xalloc(sizeof(td_tokenizer)), .dir = model_dir, .slow = slow};
    td_arena_init(&l.arena, (size_t)4 << 30);
    l.t->bos = l.t->eos = -1;
    td_status st = load(&l);
    td_arena_deinit(&l.arena);
    if (st < 0) td_tokenizer_close(l.t);
    else *out = l.t;
    return st < 0 ? st : TD_OK;
}

td_status td_tokenizer_open(const char *model_dir, td_tokenizer **out)
{
    return td_tokenizer_open_slow(model_dir, false, out);
}

void td_tokenizer_close(td_tokenizer *t)
{
    if (!t) return;
    td_bpe_close(t->bpe);
    td_normalizer_close(t->normalizer);
    td_pretok_close(t->pretok);
    td_decoder_close(t->decoder);
    td_added_deinit(&t->added);
    td_vocab_deinit(&t->vocab);
    free(t->added_at);
    free(t->bos_text);
    free(t->eos_text);
    free(t);
}
