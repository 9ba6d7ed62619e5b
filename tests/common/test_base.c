// SPDX-License-Identifier: Apache-2.0
/* status, log, clock, check, buf, arena, map, utf8: the small parts. */
#include "tests/said.h"
#include "tests/t.h"
#include "common/arena.h"
#include "common/buf.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "common/map.h"
#include "common/status.h"
#include "common/utf8.h"
#include "common/vocab.h"
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

/* What fn writes to standard error. */
static const char *captured;
static void capture(void (*fn)(void)) { captured = said(fn); }

static void *other_thread(void *arg)
{
    td_refuse(TD_EIO, "other");
    return strcmp(td_reason(), "other") ? NULL : arg;
}

static td_status passes(td_status s)
{
    TD_TRY(s);
    return TD_OK;
}

static void fail_once(void) { td_fail(TD_EPROTO, "bad %s %d", "thing", 7); }
static void refuse_once(void) { td_refuse(TD_EBADREQ, "no %s", "way"); }

static void hold_and_take(void)
{
    td_fail_hold(true);
    td_fail(TD_EIO, "inner");
    td_fail(TD_EIO, "outer: %s", td_reason());
    fprintf(stderr, "end: %s\n", td_reason_take());
    td_fail_hold(false);
}
static void hold_and_go_on(void)
{
    td_fail_hold(true);
    td_fail(TD_EIO, "first");
    TD_WARN("went on");
    td_fail(TD_EIO, "second");
    td_fail(TD_EIO, "third");
    td_refuse(TD_EIO, "fourth");
    td_fail(TD_EIO, "fifth");
    td_fail_hold(false);
    td_fail(TD_EIO, "sixth");
}
/* A program that ends says its reason once; one that goes on has said everything, in order. */
static void test_hold(void)
{
    capture(hold_and_take);
    T_STR(captured, "end: outer: inner\n");
    capture(hold_and_go_on);
    const char *at = captured;
    static const char *const line[] = {"EIO: first\n", "went on\n", "EIO: second\n", "EIO: third\n", "EIO: fifth\n", "EIO: sixth\n"};
    for (unsigned i = 0; i < TD_COUNT(line); i++) {
        T_EQ(times_said(captured, line[i]), 1);
        const char *found = strstr(at, line[i]);
        T_OK(found != NULL, "%s after %s", line[i], at);
        at = found ? found : at;
    }
    T_EQ(times_said(captured, "\n"), 6);
}

static void test_status(void)
{
    T_STR(td_status_name(TD_OK), "OK");
    T_STR(td_status_name(TD_EFULL), "EFULL");
    T_STR(td_status_name((td_status)99), "unknown");
    capture(fail_once);
    T_OK(strstr(captured, " W test EPROTO: bad thing 7\n"), "%s", captured);
    T_STR(td_reason(), "bad thing 7");
    capture(refuse_once);
    T_STR(captured, "");
    T_STR(td_reason(), "no way");
    pthread_t t;
    void *ok;
    pthread_create(&t, NULL, other_thread, &ok);
    pthread_join(t, &ok);
    T_OK(ok != NULL);
    T_STR(td_reason(), "no way");
    td_refuse(TD_EIO, "outer: %s", td_reason());
    T_STR(td_reason(), "outer: no way");
    char big[2000];
    memset(big, 'x', sizeof big);
    big[1999] = 0;
    td_refuse(TD_EIO, "%s", big);
    T_EQ(strlen(td_reason()), 511);
    T_EQ(passes(TD_EGONE), TD_EGONE);
    T_EQ(passes(TD_AGAIN), TD_OK);
}

static void log_some(void)
{
    td_clock_fake(86400000000 + 1234);
    TD_INFO("hello %d\nW forged", 5);
    TD_DEBUG_LOG("hidden");
    TD_ERROR("%04000d", 1);
    td_clock_fake(-1);
}

static void test_log(void)
{
    capture(log_some);
    char *second = strchr(captured, '\n');
    T_OK(second && second[1] == '1', "two lines");
    if (!second) return;
    *second++ = '\0';
    T_STR(captured, "1970-01-02T00:00:00.001234Z I test hello 5 W forged");
    T_OK(strlen(second) < 2049 && second[strlen(second) - 1] == '\n' &&
         strchr(second, '\n') == second + strlen(second) - 1);
    T_EQ(td_log_parse("trace"), TD_LOG_TRACE);
    T_EQ(td_log_parse("what"), TD_LOG_INFO);
    T_EQ(td_log_parse(NULL), TD_LOG_INFO);
}

static void test_clock(void)
{
    int64_t a = td_now_us(), b = td_now_us();
    T_OK(b >= a && a > 0);
    td_clock_fake(5000000);
    T_EQ(td_now_us(), 5000000);
    T_EQ(td_wall_s(), 5);
    T_OK(td_spin_us() >= a, "spinning never stops on a fake clock");
    td_clock_fake(-1);
    T_OK(td_now_us() >= b && td_wall_s() > 1700000000);
}

static void test_check(void)
{
    fflush(stdout);
    pid_t pid = fork();
    if (!pid) {
        dup2(open("/dev/null", 1), 2);
        TD_CHECK(1 + 1 == 3);
        _exit(0);
    }
    int status;
    waitpid(pid, &status, 0);
    T_OK(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
    char *s = td_xstrndup("abcdef", 3);
    T_STR(s, "abc");
    s = td_xrealloc(s, 100);
    T_STR(s, "abc");
    free(s);
    unsigned char *z = td_xalloc(64);
    int sum = 0;
    for (int i = 0; i < 64; i++) sum += z[i];
    T_EQ(sum, 0);
    free(z);
}

static const char *json_of(td_buf *b, const char *s, size_t n)
{
    td_buf_reset(b);
    td_buf_json_str(b, s, n);
    return b->p;
}

static const char *num_of(td_buf *b, double v)
{
    td_buf_reset(b);
    td_buf_json_num(b, v);
    return b->p;
}

static void test_buf(void)
{
    td_buf b;
    td_buf_init(&b, 10);
    td_buf_str(&b, "12345");
    td_buf_fmt(&b, "%d", 678);
    td_buf_chr(&b, '9');
    td_buf_add(&b, NULL, 0);
    T_STR(b.p, "123456789");
    T_OK(td_buf_ok(&b));
    td_buf_str(&b, "ab");
    T_OK(!td_buf_ok(&b));
    td_buf_chr(&b, 'a');
    T_EQ(b.len, 9);
    td_buf_reset(&b);
    T_OK(td_buf_ok(&b));
    td_buf_str(&b, "0123456789");
    T_OK(td_buf_ok(&b) && b.len == 10 && b.p[10] == 0, "exactly max fits");
    td_buf_drop_front(&b, 4);
    T_STR(b.p, "456789");
    td_buf_drop_front(&b, 100);
    T_EQ(b.len, 0);
    td_buf_deinit(&b);
    td_buf_init(&b, 0);
    td_buf_drop_front(&b, 1);
    td_buf_fmt(&b, "%0500d", 1);
    T_EQ(b.len, 500);
    T_STR(json_of(&b, "a\"\\/\b\f\n\r\t\x01\x7f", 11), "\"a\\\"\\\\/\\b\\f\\n\\r\\t\\u0001\x7f\"");
    T_STR(json_of(&b, "\0x", 2), "\"\\u0000x\"");
    T_STR(json_of(&b, "\xc3\xa9\xf0\x9f\x98\x80", 6), "\"\xc3\xa9\xf0\x9f\x98\x80\"");
    T_STR(json_of(&b, "\xf0\x9f\x98z\xff\xed\xa0\x80", 8),
          "\"\xef\xbf\xbdz\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\xef\xbf\xbd\"");
    /* Expected texts: Python's repr. */
    static const struct { double v; const char *s;
    } n[] = {
        {0, "0.0"},
        {-0.0, "-0.0"},
        {1, "1.0"},
        {-1.5, "-1.5"},
        {0.1, "0.1"},
        {0.1 + 0.2, "0.30000000000000004"},
        {1e15, "1000000000000000.0"},
        {1e16, "1e+16"},
        {123456789012345680.0, "1.2345678901234568e+17"},
        {1e22, "1e+22"},
        {1e-4, "0.0001"},
        {0.00012345, "0.00012345"},
        {1e-5, "1e-05"},
        {1.5e-7, "1.5e-07"},
        {5e-324, "5e-324"},
        {1e100, "1e+100"},
        {1.7976931348623157e308, "1.7976931348623157e+308"},
        {2.2250738585072014e-308, "2.2250738585072014e-308"},
        {9007199254740993.0, "9007199254740992.0"},
        {1234567890123456.7, "1234567890123456.8"},
        {-2.5e-5, "-2.5e-05"},
        {9.5367431640625e-07, "9.5367431640625e-07"},
        {0x1p-1017, "7.120236347223045e-307"},
        {NAN, "null"},
        {INFINITY, "null"},
    };
    for (size_t i = 0; i < TD_COUNT(n); i++) T_STR(num_of(&b, n[i].v), n[i].s);
    uint64_t x = 88172645463325252u;
    for (int i = 0; i < 20000; i++) {
        double v, back;
        x ^= x << 13;
        x ^= x >> 7;
        x ^= x << 17;
        memcpy(&v, &x, 8);
        if (!isfinite(v)) continue;
        back = strtod(num_of(&b, v), NULL);
        T_OK(back == v, "%s", b.p);
    }
    td_buf_deinit(&b);
}

static void test_arena(void)
{
    td_arena a;
    int bad = 0;
    td_arena_init(&a, 1 << 20);
    memset(td_arena_alloc(&a, 2000), 0xff, 2000);
    td_arena_deinit(&a); /* the next chunk is this one again, dirty */
    for (int i = 1; i < 200; i++) {
        unsigned char *p = td_arena_alloc(&a, (size_t)i);
        bad += ((uintptr_t)p & 15) != 0;
        for (int j = 0; j < i; j++) bad += p[j] != 0;
        memset(p, 0xff, (size_t)i);
    }
    T_EQ(bad, 0);
    T_STR(td_arena_strndup(&a, "hello", 4), "hell");
    T_OK(!memcmp(td_arena_copy(&a, "xyz", 3), "xyz", 3));
    T_OK(td_arena_alloc(&a, 500000) != NULL, "an object larger than a chunk");
    T_OK(td_arena_alloc(&a, 1 << 20) == NULL, "limit");
    T_OK(td_arena_alloc(&a, SIZE_MAX) == NULL && td_arena_alloc(&a, SIZE_MAX - 7) == NULL);
    T_OK(td_arena_alloc(&a, 0) != NULL);
    T_OK(a.used <= a.max);
    td_arena_deinit(&a);
    T_OK(a.chunk == NULL && a.used == 0);
}

/* Against a plain array: small key range, so that runs collide, wrap around and close. */
static void test_map(void)
{
    enum { KEYS = 300, STEPS = 200000 };
    static uint64_t want[KEYS];
    static bool have[KEYS];
    td_map m;
    td_map_init(&m, 150); /* random puts and deletes would settle near 169 */
    size_t n = 0;
    uint64_t x = 1, got;
    int bad = 0;
    for (int i = 0; i < STEPS; i++) {
        x = x * 6364136223846793005u + 1442695040888963407u;
        unsigned k = (unsigned)(x >> 33) % KEYS, op = (unsigned)(x >> 60);
        if (op < 9) {
            bool fits = have[k] || n < 150;
            bad += td_map_put(&m, k, x) != fits;
            if (fits) {
                n += !have[k];
                have[k] = true;
                want[k] = x;
            }
        } else {
            bad += td_map_del(&m, k) != have[k];
            n -= have[k];
            have[k] = false;
        }
        unsigned q = (unsigned)(x >> 20) % KEYS;
        bad += td_map_get(&m, q, &got) != have[q] || (have[q] && got != want[q]) || m.n != n;
    }
    T_EQ(bad, 0);
    size_t it = 0, seen = 0;
    uint64_t key;
    while (td_map_next(&m, &it, &key, &got)) {
        seen++;
        T_OK(key < KEYS && have[key] && want[key] == got);
    }
    T_EQ(seen, n);
    td_map_deinit(&m);
    T_OK(!td_map_get(&m, 1, &got) && !td_map_del(&m, 1));
    td_map_init(&m, 10);
    T_OK(td_map_put(&m, UINT64_MAX, 1) && td_map_put(&m, 0, 2) && td_map_put(&m, 1, 3));
    T_OK(td_map_get(&m, 0, &got) && got == 2);
    T_OK(td_map_del(&m, 0) && !td_map_get(&m, 0, NULL) && td_map_get(&m, UINT64_MAX, NULL));
    td_map_deinit(&m);
    td_map_init(&m, 0);
    T_OK(!td_map_put(&m, 1, 1));
    td_map_deinit(&m);
}

static void test_utf8(void)
{
    static const struct { const char *s; int n, want;
    } c[] = {
        {"a", 1, 1},
        {"\x80", 1, -1},
        {"\xc0\x80", 2, -1},
        {"\xc1\xbf", 2, -1},
        {"\xc2\x80", 2, 2},
        {"\xe0\x9f\xbf", 3, -1},
        {"\xe0\xa0\x80", 3, 3},
        {"\xed\x9f\xbf", 3, 3},
        {"\xed\xa0\x80", 3, -1},
        {"\xef\xbf\xbf", 3, 3},
        {"\xf0\x8f\xbf\xbf", 4, -1},
        {"\xf0\x90\x80\x80", 4, 4},
        {"\xf4\x8f\xbf\xbf", 4, 4},
        {"\xf4\x90\x80\x80", 4, -1},
        {"\xf5\x80\x80\x80", 4, -1},
        {"\xf0\x90\x80", 3, -3},
        {"\xe2\x82", 2, -2},
        {"\xe2\x82"
         "a",
         3, -2},
        {"\xff", 1, -1},
    };
    for (size_t i = 0; i < TD_COUNT(c); i++) {
        uint32_t cp = 0;
        T_OK(td_utf8_next(c[i].s, c[i].s + c[i].n, &cp) == c[i].want, "case %zu", i);
    }
    int bad = 0;
    for (uint32_t cp = 0; cp < 0x110000; cp++) {
        char out[4];
        uint32_t back = ~0u;
        if (cp >= 0xD800 && cp < 0xE000) continue;
        int n = td_utf8_put(out, cp);
        bad += td_utf8_next(out, out + n, &back) != n || back != cp;
    }
    T_EQ(bad, 0);
    T_OK(td_utf8_valid("a\xc3\xa9", 3) && !td_utf8_valid("a\xc3", 2));
}

int main(void)
{
    td_log_open("test", TD_LOG_INFO);
    test_status();
    test_hold();
    test_log();
    test_clock();
    test_check();
    test_buf();
    test_arena();
    test_map();
    test_utf8();
    td_vocab v = {0};
    td_vocab_deinit(&v);
    return T_DONE();
}
