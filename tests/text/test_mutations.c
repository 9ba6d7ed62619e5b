// SPDX-License-Identifier: Apache-2.0
/* Broken input ends in a status, never in a crash: mutated tokenizer.json and templates, from a seed. Run it
 * under the sanitizers too. */
#include "router/text/detok.h"
#include "router/text/jinja.h"
#include "router/text/tokenizer.h"
#include "router/text/unicode.h"
#include "tests/t.h"
#include "tests/text/support_folder.h"
#include <glob.h>

static uint64_t state = 42;
static uint32_t rnd(uint32_t n)
{
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (uint32_t)(state >> 33) % n;
}

/* A few edits: bytes changed, pieces cut, doubled or moved. The result is at most cap bytes. */
static size_t mutate(char *p, size_t n, size_t cap)
{
    static const char *const words[] = {
        "null", "{}", "[]", "\"\"", "-1",           "9999999999", "true", "\"type\": \"Sequence\"",
        "{%",   "%}", "{{", "}}",   "{%- endif %}", "(",          ")",    "\\u0000"};
    for (uint32_t k = 1 + rnd(4); k && n; k--) {
        size_t at = rnd((uint32_t)n), len = 1 + rnd(40);
        if (len > n - at) len = n - at;
        switch (rnd(5)) {
        case 0: p[at] = (char)rnd(256); break;
        case 1:
            memmove(p + at, p + at + len, n - at - len);
            n -= len;
            break;
        case 2:
            if (n + len > cap) break;
            memmove(p + at + len, p + at, n - at);
            n += len;
            break;
        case 3: {
            const char *w = words[rnd(sizeof words / sizeof words[0])];
            len = strlen(w);
            if (n + len > cap) break;
            memmove(p + at + len, p + at, n - at);
            memcpy(p + at, w, len);
            n += len;
            break;
        }
        default: memmove(p + rnd((uint32_t)(n - len + 1)), p + at, len);
        }
    }
    return n;
}

/* One scalar of JSON text becomes another, so that the syntax holds and the meaning breaks. */
static size_t swap_scalar(char *p, size_t n, size_t cap)
{
    static const char *const values[] = {"null",
                                         "true",
                                         "false",
                                         "0",
                                         "-1",
                                         "3",
                                         "1.5",
                                         "\"\"",
                                         "\"a\"",
                                         "\" \"",
                                         "\"\xE2\x96\x81\"",
                                         "[]",
                                         "{}",
                                         "\"Sequence\"",
                                         "\"Split\"",
                                         "\"ByteLevel\"",
                                         "\"Metaspace\"",
                                         "\"NFC\"",
                                         "\"Lowercase\"",
                                         "\"Strip\"",
                                         "\"Fuse\"",
                                         "\"Removed\"",
                                         "\"first\"",
                                         "\"[a-z]*\"",
                                         "\"(?=a)\"",
                                         "\"\\\\b\"",
                                         "\"(a*)*b\"",
                                         "\"x{0}\""};
    size_t at[4096], len[4096], count = 0;
    for (size_t i = 0; i < n && count < 4096; i++) {
        size_t e = i;
        if (p[i] == '"') {
            for (e = i + 1; e < n && p[e] != '"'; e++) e += p[e] == '\\';
            e++;
        } else if (strchr("-0123456789tfn", p[i])) {
            while (e < n && !strchr(",]} \n", p[e])) e++;
        }
        if (e <= i || e > n) continue;
        if (e < n && p[e] != ':') at[count] = i, len[count++] = e - i;
        i = e - 1;
    }
    if (!count) return n;
    size_t k = rnd((uint32_t)count), vn;
    const char *v = values[rnd(sizeof values / sizeof values[0])];
    vn = strlen(v);
    if (n + vn > cap) return n;
    memmove(p + at[k] + vn, p + at[k] + len[k], n - at[k] - len[k]);
    memcpy(p + at[k], v, vn);
    return n + vn - len[k];
}

static void use(const td_tokenizer *t)
{
    static const char text[] = "the abab <|end|> \xC3\xA9t\xC3\xA9 1234 \xF0\x9F\xA6\x99\n\n  don't <x>";
    td_arena a;
    td_buf out;
    uint32_t *ids = NULL;
    size_t n = 0;
    td_detok d;
    td_arena_init(&a, 8 << 20);
    td_buf_init(&out, 1 << 20);
    td_status st = td_tokenizer_encode(t, text, sizeof text - 1, true, true, 1000, &a, &ids, &n);
    T_OK(st <= 0);
    td_detok_init(&d, t, rnd(2));
    for (size_t i = 0; i < n; i++) td_detok_push(&d, ids[i], &out);
    for (int i = 0; i < 20; i++) td_detok_push(&d, rnd(400), &out);
    td_detok_flush(&d, &out);
    T_OK(!out.p || td_uc_valid(out.p, out.len, NULL));
    td_buf_deinit(&out);
    td_arena_deinit(&a);
}

static void tokenizers(int rounds)
{
    static const char *const extras[] = {
        "",
        ", \"normalizer\": {\"type\": \"Sequence\", \"normalizers\": [{\"type\": \"NFKC\"}, {\"type\": "
        "\"Prepend\", \"prepend\": \"_\"}, {\"type\": \"Replace\", \"pattern\": {\"Regex\": \"\\\\s+\"}, "
        "\"content\": \"_\"}]}, \"decoder\": {\"type\": \"Sequence\", \"decoders\": [{\"type\": \"Replace\", "
        "\"pattern\": {\"String\": \"_\"}, \"content\": \" \"}, {\"type\": \"ByteFallback\"}, "
        "{\"type\": \"Fuse\"}, {\"type\": \"Strip\", \"content\": \" \", \"start\": 1, \"stop\": 0}]}",
        ", \"pre_tokenizer\": {\"type\": \"Sequence\", \"pretokenizers\": [{\"type\": \"Split\", "
        "\"pattern\": {\"Regex\": \"\\\\p{N}{1,3}|(?i:'s)|[^\\\\s\\\\p{L}]+\"}, \"behavior\": "
        "\"MergedWithNext\", "
        "\"invert\": true}, {\"type\": \"Metaspace\", \"prepend_scheme\": \"first\"}, {\"type\": "
        "\"Digits\"}]}, \"decoder\": {\"type\": \"Metaspace\"}",
    };
    int opened = 0;
    for (int i = 0; i < rounds; i++) {
        char *text = small_tokenizer(extras[i % 3]);
        size_t n = strlen(text), tail = 300 + strlen(extras[i % 3]) + rnd(500),
               keep = n - tail; /* the interesting part is behind the alphabet */
        char *p = malloc(n + 1024);
        memcpy(p, text, n);
        if (i % 4)
            for (uint32_t k = 1 + rnd(2); k; k--) n = keep + swap_scalar(p + keep, n - keep, tail + 1000);
        else n = keep + mutate(p + keep, n - keep, tail + 1000);
        const char *dir = folder_new();
        td_tokenizer *t = NULL;
        folder_write(dir, "tokenizer.json", p, n);
        if (td_tokenizer_open(dir, &t) >= 0) opened++, use(t);
        td_tokenizer_close(t);
        folder_drop(dir);
        free(p);
        free(text);
    }
    T_OK(opened > rounds / 5, "only %d of %d opened", opened, rounds);
}

static const char CONTEXT[] =
    "{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}, {\"role\": \"user\", \"content\": \"u\"}, "
    "{\"role\": \"assistant\", \"content\": \"\", \"tool_calls\": "
    "[{\"id\": \"call12345\", \"function\": {\"name\": \"f\", \"arguments\": {\"a\": [1, 2.5, null]}}}]}, "
    "{\"role\": \"tool\", \"content\": \"r\", \"tool_call_id\": "
    "\"call12345\"}], \"tools\": [{\"type\": \"function\", \"function\": {\"name\": \"f\", \"description\": "
    "\"d\", \"parameters\": {\"type\": \"object\", "
    "\"properties\": {\"a\": {\"type\": \"array\"}}, \"required\": [\"a\"]}}}], \"add_generation_prompt\": "
    "true, \"bos_token\": \"<s>\", \"eos_token\": \"</s>\"}";

static const char TEMPLATE[] =
    "{% macro f(a, b=1) %}{{ a ~ b }}{% endmacro %}{% set ns = namespace(x=0) %}{%- for m in messages if "
    "m.role != 'q' -%}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ f(m['content'] | trim, b=loop.index) }}{% set ns.x = ns.x + 1 %}{{ m | tojson(indent=2) }}{{ "
    "m.content[1:-1].split(',')[0] }}{% else %}none{% endfor %}"
    "{{ ns.x if ns.x > 1 else 'x' }}{{ tools | map(attribute='function.name') | join(', ') }}{% raw %}{{ x "
    "}}{% endraw %}{# c #}{% set y %}a{% endset %}{{ y }}";

static void templates(int rounds)
{
    glob_t g = {0};
    td_arena json;
    td_json *context;
    int rendered = 0;
    td_arena_init(&json, 1 << 20);
    T_EQ(td_json_parse(&json, CONTEXT, sizeof CONTEXT - 1, (td_json_limits){0}, &context), TD_OK);
    glob("../shared/data/chat_templates/*.jinja", 0, NULL, &g);
    for (int i = 0; i < rounds; i++) {
        size_t n = sizeof TEMPLATE - 1;
        char *own = i % 3 && g.gl_pathc ? file_text(g.gl_pathv[rnd((uint32_t)g.gl_pathc)], &n) : NULL,
             *p = malloc(n + 1024);
        memcpy(p, own ? own : TEMPLATE, n);
        free(own);
        n = mutate(p, n, n + 1000);
        td_jinja *t = NULL;
        if (td_jinja_compile(p, n, &t) >= 0) {
            td_arena a;
            td_buf out;
            td_arena_init(&a, 4 << 20);
            td_buf_init(&out, 1 << 18);
            td_buf_str(&out, "before");
            td_status st = td_jinja_render(
                t, context, &a, (td_jinja_limits){.steps = 100000, .now_s = 1, .immutable = rnd(2)}, &out);
            T_OK(st <= 0 && !strncmp(out.p, "before", 6) && (st == 0 || out.len == 6));
            rendered += st == 0;
            td_buf_deinit(&out);
            td_arena_deinit(&a);
        }
        td_jinja_close(t);
        free(p);
    }
    T_OK(rendered > rounds / 50, "only %d of %d rendered", rendered, rounds);
    td_arena_deinit(&json);
    globfree(&g);
}

int main(void)
{
    const char *r = getenv("TANDEM_TEST_ROUNDS");
    int rounds = r ? atoi(r) : 1500;
    if (!freopen("/dev/null", "w", stderr)) return 1; /* refusals are logged */
    tokenizers(rounds);
    templates(rounds);
    return T_DONE();
}
