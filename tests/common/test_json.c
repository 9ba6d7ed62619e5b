// SPDX-License-Identifier: Apache-2.0
/* Values, limits, places of errors, duplicate keys, and the writer against Python's json.dumps. */
#include "tests/t.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/json.h"

static td_arena arena;

static td_json *parse_n(const char *text, size_t n, int depth, size_t nodes)
{
    td_json *v = NULL;
    td_status s = td_json_parse(&arena, text, n, (td_json_limits){depth, nodes}, &v);
    return s == TD_OK ? v : NULL;
}

static td_json *parse(const char *text)
{
    return parse_n(text, strlen(text), 0, 0);
}

static void test_values(void)
{
    const td_json *v = parse(" {\"a\": 1, \"b\": [true, null, -2.5e1], \"c\": "
                             "\"x\\u00e9\\ud83d\\ude00\\n\\/\", \"d\": {}, \"e\": 3.0}\n");
    T_OK(v && v->type == TD_JSON_OBJ && v->n == 5, "%s", td_reason());
    T_EQ(td_json_int(v, "a", -1), 1);
    T_EQ(td_json_int(v, "e", -1), 3);
    T_EQ(td_json_int(v, "c", -1), -1);
    T_EQ(td_json_int(v, "zz", -1), -1);
    T_NEAR(td_json_num(v, "a", 0), 1, 0);
    const td_json *b = td_json_get(v, "b");
    T_OK(b && b->n == 3 && td_json_at(b, 0)->truth && td_json_is_null(td_json_at(b, 1)) &&
         td_json_at(b, 2)->num == -25);
    T_OK(td_json_at(b, 3) == NULL && td_json_at(v, 0) == NULL && td_json_get(b, "a") == NULL &&
         td_json_get(NULL, "a") == NULL);
    T_STR(td_json_str(v, "c", ""), "x\xc3\xa9\xf0\x9f\x98\x80\n/");
    T_STR(td_json_str(v, "a", "dflt"), "dflt");
    T_OK(td_json_bool(v, "a", true) && !td_json_bool(v, "zz", false) && td_json_is_null(td_json_get(v, "zz")));
    v = parse("\"a\\u0000b\"");
    T_OK(v && v->n == 3 && !memcmp(v->s, "a\0b", 4));
}

static void test_numbers(void)
{
    static const struct { const char *s; td_json_type t; double num;
    } c[] = {
        {"0", TD_JSON_INT, 0},
        {"-0", TD_JSON_INT, 0},
        {"-0.0", TD_JSON_REAL, -0.0},
        {"9223372036854775807", TD_JSON_INT, 0x1p63},
        {"9223372036854775808", TD_JSON_REAL, 0x1p63},
        {"-9223372036854775807", TD_JSON_INT, -0x1p63},
        {"12345678901234567890123", TD_JSON_REAL, 12345678901234567890123.0},
        {"1e3", TD_JSON_REAL, 1000},
        {"0.1", TD_JSON_REAL, 0.1},
        {"123456.789e-3", TD_JSON_REAL, 123.456789},
        {"1E400000000000000000000000", TD_JSON_NULL, 0},
        {"1e-400", TD_JSON_REAL, 0},
        {"0.00000000000000000000000000001e29", TD_JSON_REAL, 1},
        {"5e-324", TD_JSON_REAL, 5e-324},
        {"0e99999999999", TD_JSON_REAL, 0},
        {"1.7976931348623157e308", TD_JSON_REAL, 1.7976931348623157e308},
        {"01", TD_JSON_NULL, 0},
        {"-", TD_JSON_NULL, 0},
        {"1.", TD_JSON_NULL, 0},
        {".5", TD_JSON_NULL, 0},
        {"+1", TD_JSON_NULL, 0},
        {"1e", TD_JSON_NULL, 0},
        {"0x10", TD_JSON_NULL, 0},
        {"NaN", TD_JSON_NULL, 0},
        {"Infinity", TD_JSON_NULL, 0},
        {"3.141592653589793238462643", TD_JSON_REAL, 3.141592653589793},
        {"72057594037927945", TD_JSON_INT, 72057594037927945.0},
    };
    for (size_t i = 0; i < TD_COUNT(c); i++) {
        const td_json *v = parse(c[i].s);
        T_OK((v ? v->type : TD_JSON_NULL) == c[i].t, "%s", c[i].s);
        if (v) T_OK(v->num == c[i].num && signbit(v->num) == signbit(c[i].num), "%s: %.17g", c[i].s, v->num);
    }
    uint64_t x = 1; /* the fast path and the C library must agree to the bit */
    for (int i = 0; i < 50000; i++) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        char s[64];
        snprintf(s, sizeof s, "%s%llu.%ue%d", x >> 63 ? "-" : "", (unsigned long long)(x >> 8) >> (x >> 3) % 50,
                 (unsigned)(x >> 20) % 1000000, (int)((x >> 32) % 80) - 40);
        const td_json *v = parse(s);
        T_OK(v && v->num == strtod(s, NULL), "%s", s);
        if (i % 1000 == 0) td_arena_deinit(&arena);
    }
    static char digits[2000];
    memset(digits, '7', 1999);
    T_OK(!parse(digits) && strstr(td_reason(), "longer than 1024"), "%s", td_reason());
}

static void test_errors(void)
{
    static const struct { const char *s, *reason; } c[] = {
        {"", "line 1 column 1: unexpected end of text"},
        {"{\n  \"a\": 1,\n  }", "line 3 column 3: expected a member name in quotes"},
        {"[\"\xc3\xa9\xc3\xa9\", x]", "line 1 column 8: expected a value"},
        {"[1 2]", "line 1 column 4: expected ',' or ']'"},
        {"{\"a\" 1}", "line 1 column 6: expected ':'"},
        {"{\"a\":1", "line 1 column 7: unexpected end of text"},
        {"1 1", "line 1 column 3: text after the value"},
        {"\"a\tb\"", "line 1 column 3: control character in a string"},
        {"\"\\x\"", "line 1 column 3: unknown escape"},
        {"\"\\u12G4\"", "line 1 column 3: \\u needs four hexadecimal digits"},
        {"\"\\ud800\"", "line 1 column 3: unpaired surrogate"},
        {"\"\\ud800\\u0041\"", "line 1 column 3: unpaired surrogate"},
        {"\"\\udc00\"", "line 1 column 3: unpaired surrogate"},
        {"\"\xff\"", "line 1 column 2: invalid UTF-8"},
        {"\"\xed\xa0\x80\"", "line 1 column 2: invalid UTF-8"},
        {"[-01]", "line 1 column 4: a number may not start with 0"},
        {"tru", "line 1 column 1: expected a value"},
        {"[1,]", "line 1 column 4: expected a value"},
        {"\"abc", "line 1 column 5: unexpected end of text"},
        {"\"abc\\", "line 1 column 6: unexpected end of text"},
        {"[1e400]", "line 1 column 2: number out of range"},
        {"\xef\xbb\xbf{}", "line 1 column 1: expected a value"},
    };
    for (size_t i = 0; i < TD_COUNT(c); i++) {
        td_json *v = (td_json *)&arena;
        td_status s = td_json_parse(&arena, c[i].s, strlen(c[i].s), (td_json_limits){0, 0}, &v);
        T_OK(s == TD_EPROTO && v == (td_json *)&arena, "output untouched");
        T_STR(td_reason(), c[i].reason);
    }
}

static void test_limits(void)
{
    char deep[3000];
    memset(deep, '[', 1500);
    memset(deep + 1500, ']', 1500);
    T_OK(parse_n(deep + 1500 - 64, 128, 0, 0) != NULL);
    T_OK(parse_n(deep + 1500 - 65, 130, 0, 0) == NULL && strstr(td_reason(), "nested too deeply"));
    T_OK(parse_n(deep + 1500 - 1024, 2048, 5000, 0) != NULL);
    T_OK(parse_n(deep, 3000, 5000, 0) == NULL, "1024 is the deepest, whatever is asked");
    T_OK(parse_n("[1,2,3]", 7, 0, 4) != NULL);
    T_OK(parse_n("[1,2,3]", 7, 0, 3) == NULL && strstr(td_reason(), "too many values"));
    td_arena small;
    td_json *v;
    td_arena_init(&small, 1000);
    T_EQ(td_json_parse(&small, "[1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16]", 40, (td_json_limits){0, 0}, &v), TD_EFULL);
    td_arena_deinit(&small);
}

static void test_duplicates(void)
{
    td_buf b;
    td_buf_init(&b, 0);
    td_json_write(&b, parse("{\"a\":1,\"a\":2,\"b\":3,\"a\":[4],\"b\":{\"c\":1,\"c\":2},\"d\":5}"), 0);
    T_STR(b.p, "{\"a\": [4], \"b\": {\"c\": 2}, \"d\": 5}");
    /* Large objects take another path. */
    td_buf_reset(&b);
    for (int i = 0; i < 1000; i++) td_buf_fmt(&b, "%c\"k%d\":%d", i ? ',' : '{', i % 300, i);
    td_buf_chr(&b, '}');
    const td_json *v = parse(b.p);
    T_OK(v && v->n == 300);
    int i = 0, bad = 0;
    for (const td_json *m = v->child; m; m = m->next, i++)
        bad += m->i != (i < 100 ? 900 + i : 600 + i) || m->key_len < 2;
    T_EQ(bad, 0);
    T_EQ(i, 300);
    td_buf_deinit(&b);
}

static void test_writer(void)
{
    /* Expected: json.dumps(json.loads(text), ensure_ascii=False) of Python 3.11. */
    static const struct { const char *in, *out;
    } c[] = {
        {"[ ]", "[]"},
        {"{ }", "{}"},
        {"[1,2.0,-0.0,1e16,1E-5,12345678901234567890]", "[1, 2.0, -0.0, 1e+16, 1e-05, 12345678901234567890]"},
        {"{\"\\u00e9\":\"\\u2028\\u0001\\u007f\"}", "{\"\xc3\xa9\": \"\xe2\x80\xa8\\u0001\x7f\"}"},
        {"[true,false,null,[[]],{\"a\":{}}]", "[true, false, null, [[]], {\"a\": {}}]"},
        {"\"\\\"\\\\\\/\\b\\f\\n\\r\\t\"", "\"\\\"\\\\/\\b\\f\\n\\r\\t\""},
    };
    td_buf b;
    td_buf_init(&b, 0);
    for (size_t i = 0; i < TD_COUNT(c); i++) {
        td_buf_reset(&b);
        td_json_write(&b, parse(c[i].in), 0);
        T_STR(b.p, c[i].out);
    }
    td_buf_reset(&b);
    td_json_write(&b, parse("{\"a\":[1,{\"b\":[]}],\"c\":{}}"), 2);
    T_STR(b.p, "{\n  \"a\": [\n    1,\n    {\n      \"b\": []\n    }\n  ],\n  \"c\": {}\n}");
    td_buf_deinit(&b);
    td_buf_init(&b, 10);
    td_json_write(&b, parse("[1,2,3,4,5,6,7,8]"), 0);
    T_OK(!td_buf_ok(&b));
    td_buf_deinit(&b);
}

/* About 10 MB shaped like a tokenizer file. The bound is loose (sanitizers, shared machines): it catches a quadratic step. */
static void test_speed(void)
{
    td_buf b;
    td_buf_init(&b, 0);
    td_buf_str(&b, "{\"vocab\":{");
    for (int i = 0; i < 200000; i++) td_buf_fmt(&b, "%s\"\\u0120tok\xc3\xa9n%d\":%d", i ? "," : "", i, i);
    td_buf_str(&b, "},\"merges\":[");
    for (int i = 0; i < 250000; i++) td_buf_fmt(&b, "%s\"abc%d de%d\"", i ? "," : "", i, i);
    td_buf_str(&b, "]}");
    td_arena a;
    td_json *v = NULL;
    td_arena_init(&a, 1u << 30);
    int64_t t = td_spin_us();
    td_status s = td_json_parse(&a, b.p, b.len, (td_json_limits){0, 0}, &v);
    t = td_spin_us() - t;
    T_OK(s == TD_OK && v->child->n == 200000 && v->child->next->n == 250000);
    T_OK(t < 3000000, "%.1f MB took %lld us", (double)b.len / 1e6, (long long)t);
    printf("%.1f MB in %.0f ms\n", (double)b.len / 1e6, (double)t / 1e3);
    td_arena_deinit(&a);
    td_buf_deinit(&b);
}

int main(void)
{
    td_arena_init(&arena, 64 << 20);
    test_values();
    test_numbers();
    test_errors();
    test_limits();
    test_duplicates();
    test_writer();
    td_arena_deinit(&arena);
    test_speed();
    return T_DONE();
}
