// SPDX-License-Identifier: Apache-2.0
/* The pure parts of gRPC framing. What needs a connection is in test_h2.py. */
#include "router/net/grpc_frame.h"
#include "tests/t.h"

static void test_timeout(void)
{
    static const struct { const char *in; long long us;
    } good[] = {{"1H", 3600000000},
                {"2M", 120000000},
                {"3S", 3000000},
                {"4m", 4000},
                {"5u", 5},
                {"1n", 1},
                {"1000n", 1},
                {"1001n", 2},
                {"0S", 0},
                {"99999999H", 99999999LL * 3600000000LL},
                {"00000001S", 1000000}};
    static const char *const bad[] = {"",    "S",   "1",   "1s",  "123456789S", "1 S", "-1S",
                                      "+1S", "1SS", "1S ", " 1S", "1.5S",       "0x1S"};
    int64_t us = -7;
    for (size_t i = 0; i < sizeof good / sizeof *good; i++) {
        T_OK(td_grpc_timeout(good[i].in, &us), "%s", good[i].in);
        T_EQ(us, good[i].us);
    }
    us = -7;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        T_OK(!td_grpc_timeout(bad[i], &us), "\"%s\"", bad[i]);
    T_EQ(us, -7);
}

static void test_path(void)
{
    td_grpc_call c;
    T_OK(td_grpc_split_path("/tandem.v1.Inference/Generate", &c), "path");
    T_STR(c.service, "tandem.v1.Inference");
    T_STR(c.method, "Generate");
    static const char *const bad[] = {"",    "/",      "//",    "a/b",    "/a",       "/a/",
                                      "//b", "/a/b/c", "/a/b/", "/a b/c", "/a\xc3/c", "*"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++)
        T_OK(!td_grpc_split_path(bad[i], &c), "\"%s\"", bad[i]);
    char name[400];
    snprintf(name, sizeof name, "/%0127d/m", 0);
    T_OK(td_grpc_split_path(name, &c), "127 bytes");
    snprintf(name, sizeof name, "/%0128d/m", 0);
    T_OK(!td_grpc_split_path(name, &c), "128 bytes");
    snprintf(name, sizeof name, "/s/%064d", 0);
    T_OK(!td_grpc_split_path(name, &c), "method of 64 bytes");
}

static void test_content_type(void)
{
    static const char *const good[] = {"application/grpc", "application/grpc+proto", "Application/GRPC",
                                       "application/grpc; charset=utf-8", "application/grpc+proto;x"};
    static const char *const bad[] = {"",
                                      "application/json",
                                      "application/grpc+json",
                                      "application/grpc-web",
                                      "application/grpcx",
                                      "application/grp"};
    for (size_t i = 0; i < sizeof good / sizeof *good; i++)
        T_OK(td_grpc_content_type(good[i]), "%s", good[i]);
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) T_OK(!td_grpc_content_type(bad[i]), "%s", bad[i]);
    T_OK(!td_grpc_content_type(NULL), "absent");
}

static int deframe(const char *body, size_t n, size_t *len)
{
    const void *msg = NULL;
    const char *why = NULL;
    char *copy = malloc(n ? n : 1); /* exact size, for ASan */
    memcpy(copy, body, n);
    td_grpc_status s = td_grpc_deframe(copy, n, &msg, len, &why);
    T_OK((s == TD_GRPC_OK) == (why == NULL), "a reason comes with every error");
    if (s == TD_GRPC_OK) T_OK(msg == copy + 5, "message");
    free(copy);
    return (int)s;
}

static void test_deframe(void)
{
    size_t len = 99;
    T_EQ(deframe("\0\0\0\0\0", 5, &len), TD_GRPC_OK);
    T_EQ(len, 0);
    T_EQ(deframe("\0\0\0\0\3abc", 8, &len), TD_GRPC_OK);
    T_EQ(len, 3);
    T_EQ(deframe("", 0, &len), TD_GRPC_INTERNAL);
    T_EQ(deframe("\0\0\0\0", 4, &len), TD_GRPC_INTERNAL);
    T_EQ(deframe("\0\0\0\0\4abc", 8, &len), TD_GRPC_INTERNAL);
    T_EQ(deframe("\0\xff\xff\xff\xff" "abc", 8, &len), TD_GRPC_INTERNAL);
    T_EQ(deframe("\0\0\0\0\2abc", 8, &len), TD_GRPC_UNIMPLEMENTED);
    T_EQ(deframe("\1\0\0\0\3abc", 8, &len), TD_GRPC_UNIMPLEMENTED);
    T_EQ(deframe("\2\0\0\0\3abc", 8, &len), TD_GRPC_INTERNAL);
    T_EQ(len, 3);
}

static void test_message(void)
{
    td_buf b;
    td_buf_init(&b, 0);
    td_grpc_encode_message(&b, "100 % \xc3\xa4\n~");
    T_STR(b.p, "100 %25 %C3%A4%0A~");
    td_buf_reset(&b);
    char *big = malloc(5001);
    memset(big, 'x', 5000), big[5000] = 0;
    td_grpc_encode_message(&b, big);
    T_EQ(b.len, 1024);
    free(big);
    td_buf_deinit(&b);
}

int main(void)
{
    test_timeout();
    test_path();
    test_content_type();
    test_deframe();
    test_message();
    return T_DONE();
}
