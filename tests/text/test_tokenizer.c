// SPDX-License-Identifier: Apache-2.0
/* Opening: what is refused, with file and key; encoding: limits and time; the streaming detokenizer byte by
 *          byte. Equality of ids is
 * test_vectors.py's and test_library.py's. */
#include "router/text/detok.h"
#include "router/text/tokenizer_impl.h"
#include "router/text/unicode.h"
#include "tests/t.h"
#include "tests/text/support_folder.h"
#include <pthread.h>

static td_tokenizer *open_small(const char *extra, const char *config)
{
    const char *dir = folder_new();
    char *text = small_tokenizer(extra);
    td_tokenizer *t = NULL;
    folder_write(dir, "tokenizer.json", text, 0);
    if (config) folder_write(dir, "tokenizer_config.json", config, 0);
    T_EQ(td_tokenizer_open(dir, &t), TD_OK);
    free(text);
    folder_drop(dir);
    return t;
}

static void refusals(void)
{
    static const struct {
        const char *extra;
        td_status st;
        const char *says;
    } cases[] = {
        {", \"normalizer\": {\"type\": \"BertNormalizer\"}", TD_ENOSUP,
         "tokenizer.json: normalizer type \"BertNormalizer\""},
        {", \"normalizer\": {\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"Precompiled\"}]}",
         TD_ENOSUP, "\"Precompiled\""},
        {", \"pre_tokenizer\": {\"type\": \"UnicodeScripts\"}", TD_ENOSUP,
         "tokenizer.json: pre_tokenizer type \"UnicodeScripts\""},
        {", \"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"Regex\": \"(\"}, \"behavior\": "
         "\"Isolated\"}",
         TD_ENOSUP, "regex"},
        {", \"pre_tokenizer\": {\"type\": \"Split\", \"pattern\": {\"String\": \"x\"}, \"behavior\": "
         "\"Odd\"}",
         TD_ENOSUP, "behavior \"Odd\""},
        {", \"post_processor\": {\"type\": \"Unknown\"}", TD_ENOSUP, "post_processor type \"Unknown\""},
        {", \"decoder\": {\"type\": \"WordPiece\"}", TD_ENOSUP, "decoder type \"WordPiece\""},
        {", \"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Fuse\"}, {\"type\": \"Strip\", "
         "\"start\": 0, \"stop\": 1}]}",
         TD_ENOSUP, "Strip with stop"},
        {", \"model\": {\"type\": \"Unigram\", \"vocab\": []}", TD_ENOSUP, "model type \"Unigram\""},
        {", \"model\": {\"type\": \"WordPiece\", \"vocab\": {}}", TD_ENOSUP, "model type \"WordPiece\""},
        {", \"model\": {\"vocab\": []}", TD_ENOSUP, "model type \"Unigram\""},
        {", \"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": [], \"dropout\": 0.1}",
         TD_ENOSUP, "model.dropout"},
        {", \"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": [\"a a\"]}", TD_EPROTO,
         "merges: rank 0"},
        {", \"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": -1}, \"merges\": []}", TD_EPROTO,
         "vocab: id of \"a\""},
        {", \"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0, \"b\": 0}, \"merges\": []}", TD_EPROTO,
         "two tokens"},
        {", \"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": [[\"a\"]]}", TD_EPROTO,
         "not two strings"},
        {", \"model\": {\"type\": \"BPE\", \"vocab\": {\"a\": 0}, \"merges\": [], \"unk_token\": \"?\"}",
         TD_EPROTO, "unk_token"},
        {", \"model\": 3", TD_EPROTO, "tokenizer.json: no model"},
        {", \"added_tokens\": [{\"id\": 1}]", TD_EPROTO, "added_tokens"},
        {", \"added_tokens\": [{\"id\": 99999999, \"content\": \"qqq\"}]", TD_EPROTO, "out of range"},
        {"", TD_OK, ""},
    };
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        const char *dir = folder_new();
        char *text = small_tokenizer(cases[i].extra);
        td_tokenizer *t = NULL;
        folder_write(dir, "tokenizer.json", text, 0);
        td_status st = td_tokenizer_open(dir, &t);
        T_EQ(st, cases[i].st);
        if (st < 0) T_OK(!t && strstr(td_reason(), cases[i].says), "case %zu: %s", i, td_reason());
        td_tokenizer_close(t);
        free(text);
        folder_drop(dir);
    }
    const char *dir = folder_new();
    td_tokenizer *t = NULL;
    T_EQ(td_tokenizer_open(dir, &t), TD_ENOSUP);
    T_OK(strstr(td_reason(), "neither tokenizer.json nor vocab.json") != NULL, "%s", td_reason());
    folder_write(dir, "tokenizer.json", "{\"model\": [1, 2", 0);
    T_EQ(td_tokenizer_open(dir, &t), TD_EPROTO);
    T_OK(strstr(td_reason(), "tokenizer.json: line 1") != NULL, "%s", td_reason());
    folder_drop(dir);
}

static size_t count_ids(const td_tokenizer *t, const char *s, size_t n, bool add, bool parse, uint32_t *first)
{
    td_arena a;
    uint32_t *ids;
    size_t k = 0;
    td_arena_init(&a, (size_t)1 << 30);
    T_EQ(td_tokenizer_encode(t, s, n, add, parse, 0, &a, &ids, &k), TD_OK);
    if (k && first) *first = ids[0];
    td_arena_deinit(&a);
    return k;
}

static void special_and_bos(void)
{
    uint32_t first = 0;
    td_tokenizer *t = open_small(
        "", "{\"bos_token\": \"<s>\", \"eos_token\": {\"content\": \"</s>\"}, \"add_bos_token\": true}");
    T_EQ(td_tokenizer_bos(t), 261);
    T_EQ(td_tokenizer_eos(t), 262);
    T_STR(td_tokenizer_eos_text(t), "</s>");
    T_EQ(count_ids(t, "abab<|end|>", 11, true, true, &first), 3);
    T_EQ(first, 261);
    T_EQ(count_ids(t, "abab<|end|>", 11, false, true, &first), 2);
    T_EQ(count_ids(t, "<|end|>", 7, false, false, &first), 7);
    T_EQ(count_ids(t, "<x>", 3, false, false, &first), 1); /* not special: always a token */
    T_EQ(first, 264);
    T_EQ(count_ids(t, "", 0, false, true, NULL), 0);
    T_EQ(td_tokenizer_id(t, "<|end|>"), 263);
    T_EQ(td_tokenizer_id(t, "abab"), 260);
    T_EQ(td_tokenizer_id(t, "nothing"), -1);
    const td_vocab *v = td_tokenizer_vocab(t);
    size_t n;
    T_EQ(v->n, 265);
    T_EQ(v->flags[261], TD_TOK_SPECIAL | TD_TOK_ADDED);
    T_EQ(v->flags[264], TD_TOK_ADDED);
    const char *p = td_vocab_bytes(v, 258, &n);
    T_OK(n == 4 && !memcmp(p, " the", 4));
    p = td_vocab_bytes(v, 0xC3, &n);
    T_OK(n == 1 && p[0] == (char)0xC3);
    td_tokenizer_close(t);
    t = open_small(
        ", \"post_processor\": {\"type\": \"TemplateProcessing\", \"single\": [{\"SpecialToken\": {\"id\": "
        "\"<s>\"}}, {\"Sequence\": {\"id\": \"A\"}}], "
        "\"special_tokens\": {\"<s>\": {\"ids\": [261]}}}",
        "{\"bos_token\": \"<s>\", \"add_bos_token\": false, \"tokenizer_class\": \"LlamaTokenizerFast\"}");
    T_EQ(count_ids(t, "a", 1, true, true, NULL), 1); /* the class builds its own from add_bos_token */
    td_tokenizer_close(t);
}

static void limits(void)
{
    td_tokenizer *t = open_small("", NULL);
    td_arena a, tiny;
    uint32_t *ids = NULL;
    size_t n = 77;
    td_arena_init(&a, 1 << 20);
    T_EQ(td_tokenizer_encode(t, "a b c d e f", 11, false, true, 5, &a, &ids, &n), TD_EFULL);
    T_OK(!ids && n == 77); /* outputs only on success */
    T_OK(strstr(td_reason(), "5 tokens") != NULL, "%s", td_reason());
    T_EQ(td_tokenizer_encode(t, "ok \xC3", 4, false, true, 0, &a, &ids, &n), TD_EBADREQ);
    T_OK(strstr(td_reason(), "byte 3") != NULL, "%s", td_reason());
    td_arena_init(&tiny, 16);
    T_EQ(td_tokenizer_encode(t, "a b c d e f", 11, false, true, 0, &tiny, &ids, &n), TD_EFULL);
    td_arena_deinit(&tiny);
    T_EQ(td_tokenizer_encode(t, "x", (size_t)TD_TOKENIZER_TEXT_MAX + 1, false, true, 0, &a, &ids, &n),
         TD_EFULL);
    td_arena_deinit(&a);
    td_tokenizer_close(t);
}

/* One word of a million characters, white space runs, marks: near-linear, whatever the shape. */
static void time_is_near_linear(void)
{
    static const char *const unit[] = {"ab", " ", "the", "\n ", "<", "a\xCC\x81", "'s"};
    td_tokenizer *t = open_small("", NULL);
    for (size_t u = 0; u < sizeof unit / sizeof unit[0]; u++) {
        size_t k = strlen(unit[u]), n = (1 << 20) / k * k;
        char *p = malloc(n);
        for (size_t i = 0; i < n; i += k) memcpy(p + i, unit[u], k);
        long long t0 = T_CPU_US();
        T_OK(count_ids(t, p, n, false, true, NULL) > 0);
        T_OK(T_CPU_US() - t0 < 20000000, "\"%s\": %lld us", unit[u], T_CPU_US() - t0);
        free(p);
    }
    td_tokenizer_close(t);
}

static void detokenizer(void)
{
    td_tokenizer *t = open_small("", NULL);
    td_detok d, fork;
    td_buf out;
    T_OK(sizeof d <= 64);
    td_buf_init(&out, 0);
    td_detok_init(&d, t, true);
    static const struct {
        uint32_t id;
        const char *text;
    } steps[] = {
        {'a', "a"},
        {0xF0, "a"},
        {0x9F, "a"},
        {0xA6, "a"},
        {0x99, "a\xF0\x9F\xA6\x99"},
        {261, "a\xF0\x9F\xA6\x99"},
        {0xE2, "a\xF0\x9F\xA6\x99"},
        {'b', "a\xF0\x9F\xA6\x99\xEF\xBF\xBD"
              "b"},
        {99999, "a\xF0\x9F\xA6\x99\xEF\xBF\xBD"
                "b"},
        {264, "a\xF0\x9F\xA6\x99\xEF\xBF\xBD"
              "b<x>"},
    };
    for (size_t i = 0; i < sizeof steps / sizeof steps[0]; i++) {
        td_detok_push(&d, steps[i].id, &out);
        T_STR(out.p, steps[i].text);
    }
    td_detok_push(&d, 0xE2, &out);
    td_detok_push(&d, 0x82, &out);
    fork = d; /* plain data: both go on */
    td_buf_reset(&out);
    td_detok_push(&fork, 0xAC, &out);
    T_STR(out.p, "\xE2\x82\xAC");
    td_buf_reset(&out);
    td_detok_flush(&d, &out);
    T_STR(out.p, "\xEF\xBF\xBD");
    td_buf_deinit(&out);
    td_tokenizer_close(t);
}

/* Random bytes: the stream is Python's bytes.decode(errors="replace"), which is one U+FFFD a maximal part. */
static void broken_utf8(void)
{
    td_tokenizer *t = open_small("", NULL);
    uint32_t state = 7;
    for (int round = 0; round < 3000; round++) {
        static const unsigned char bytes[] = {'a',  0x80, 0xBF, 0xC3, 0xA9, 0xE2, 0x82, 0xAC,
                                              0xF0, 0x9F, 0xED, 0xA0, 0xFF, 0xC0, 0xF4, 0x90};
        char in[24];
        td_buf got, want;
        td_detok d;
        size_t n = 0;
        td_buf_init(&got, 0);
        td_buf_init(&want, 0);
        td_detok_init(&d, t, false);
        for (; n < sizeof in; n++) {
            state = state * 1664525 + 1013904223;
            in[n] = (char)bytes[state >> 28];
            size_t before = got.len;
            td_detok_push(&d, (unsigned char)in[n], &got);
            T_OK(!got.p || td_uc_valid(got.p + before, got.len - before, NULL));
        }
        td_detok_flush(&d, &got);
        for (size_t i = 0; i < n;) {
            uint32_t cp;
            int k = td_utf8_next(in + i, in + n, &cp);
            if (k > 0) td_buf_add(&want, in + i, (size_t)k);
            else td_buf_str(&want, "\xEF\xBF\xBD");
            i += (size_t)(k > 0 ? k : -k);
        }
        T_STR(got.p, want.p);
        td_buf_deinit(&got);
        td_buf_deinit(&want);
    }
    td_tokenizer_close(t);
}

static void stripping(void)
{
    td_tokenizer *t = open_small(", \"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": "
                                 "\"Replace\", \"pattern\": {\"String\": \"\xC4\xA0\"}, \"content\": \" \"}, "
                                 "{\"type\": \"ByteFallback\"}, {\"type\": \"Fuse\"}, {\"type\": \"Strip\", "
                                 "\"content\": \" \", \"start\": 1, \"stop\": 0}]}",
                                 NULL);
    td_detok d;
    td_buf out;
    td_buf_init(&out, 0);
    td_detok_init(&d, t, true);
    td_detok_push(&d, 258, &out);
    td_detok_push(&d, 258, &out);
    T_STR(out.p, "the the");
    td_buf_reset(&out);
    td_detok_init(&d, t, true);
    td_detok_continue(&d); /* behind other text: nothing is stripped */
    td_detok_push(&d, 258, &out);
    T_STR(out.p, " the");
    td_buf_deinit(&out);
    td_tokenizer_close(t);
}

static void *encode_many(void *arg)
{
    const td_tokenizer *t = arg;
    uintptr_t bad = 0;
    for (int i = 0; i < 300; i++) {
        td_arena a;
        uint32_t *ids;
        size_t n = 0;
        td_arena_init(&a, 1 << 20);
        bad += td_tokenizer_encode(t, "the abab the<|end|> the", 23, false, true, 0, &a, &ids, &n) != TD_OK ||
               n != 6;
        td_arena_deinit(&a);
    }
    return (void *)bad;
}

static void threads(void)
{
    td_tokenizer *t = open_small("", NULL);
    pthread_t th[4];
    for (int i = 0; i < 4; i++) pthread_create(&th[i], NULL, encode_many, t);
    for (int i = 0; i < 4; i++) {
        void *bad;
        pthread_join(th[i], &bad);
        T_EQ((uintptr_t)bad, 0);
    }
    td_tokenizer_close(t);
}

int main(void)
{
    refusals();
    special_and_bos();
    limits();
    time_is_near_linear();
    detokenizer();
    broken_utf8();
    stripping();
    threads();
    return T_DONE();
}
