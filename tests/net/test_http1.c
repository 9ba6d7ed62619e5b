// SPDX-License-Identifier: Apache-2.0
/* The HTTP/1.1 parser: good requests at every split, a table of bad ones, mutations (whole = split), and the
 * response framer. */
#include "router/net/exchange.h"
#include "router/net/http1.h"
#include "router/net/http1_out.h"
#include "tests/t.h"
#include <stdint.h>
#include <time.h>

enum { HEADER_MAX = 1024, BODY_MAX = 4096 };

typedef struct good { const char *in, *method, *path, *query, *body, *header, *value; int keep, rest; } good;

static const good GOOD[] = {
    {"GET / HTTP/1.1\r\nHost: a\r\n\r\n", "GET", "/", "", "", "host", "a", 1, 0},
    {"\r\nGET /v1/models?x=1&y=%20 HTTP/1.1\r\nHost:a:80\r\nX-Y:  v w \t\r\n\r\n", "GET", "/v1/models",
     "x=1&y=%20", "", "x-y", "v w", 1, 0},
    {"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\n\r\nhelloGET", "POST", "/p", "", "hello",
     "content-length", "5", 1, 3},
    {"POST /p HTTP/1.1\r\nHost: a\r\nContent-Length: 0\r\n\r\n", "POST", "/p", "", "", NULL, NULL, 1, 0},
    {"POST /p HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: Chunked\r\n\r\n5\r\nhello\r\n00A;x=\"y\"\r\n, all "
     "well\r\n0\r\nT: v\r\n\r\nX",
     "POST", "/p", "", "hello, all well", NULL, NULL, 1, 1},
    {"GET / HTTP/1.0\r\n\r\n", "GET", "/", "", "", NULL, NULL, 0, 0},
    {"GET / HTTP/1.0\r\nConnection: foo, Keep-Alive\r\n\r\n", "GET", "/", "", "", NULL, NULL, 1, 0},
    {"GET / HTTP/1.1\r\nHost: a\r\nConnection: Close\r\n\r\n", "GET", "/", "", "", NULL, NULL, 0, 0},
    {"GET http://h.example:8/a/b?c HTTP/1.1\r\nHost: h.example:8\r\n\r\n", "GET", "/a/b", "c", "", NULL, NULL,
     1, 0},
    {"GET https://h?c HTTP/1.1\r\nHost: h\r\n\r\n", "GET", "/", "c", "", NULL, NULL, 1, 0},
    {"OPTIONS * HTTP/1.1\r\nHost: a\r\n\r\n", "OPTIONS", "*", "", "", NULL, NULL, 1, 0},
    {"PUT /p HTTP/1.1\r\nHost:\r\nExpect: 100-Continue\r\nContent-Length: 3\r\nE:\r\n\r\nabc", "PUT", "/p",
     "", "abc", "e", "", 1, 0},
    {"GET / HTTP/1.1\r\nHost: a\r\nDup: 1\r\nDup: 2\r\nU: \xc3\xa4\r\n\r\n", "GET", "/", "", "", "dup", "1",
     1, 0},
};

#define H "GET / HTTP/1.1\r\nHost: a\r\n"
#define P "POST / HTTP/1.1\r\nHost: a\r\n"
#define C P "Transfer-Encoding: chunked\r\n\r\n"
static const struct { const char *in; int status;
} BAD[] = {
    {"GET / HTTP/1.1\nHost: a\n\n", 400},
    {"GET / HTTP/1.1\r\nHost: a\n\r\n", 400},
    {"GET / HTTP/1.1\rHost: a\r\n\r\n", 400},
    {"GET / HTTP/1.1\r\n\r\n", 400},
    {"GET / HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400},
    {"GET / HTTP/1.1\r\nHost: a b\r\n\r\n", 400},
    {"GET / HTTP/1.1\r\nHost: a,b\r\n\r\n", 400},
    {"GET / HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400},
    {"\r\n\r\n\r\nGET / HTTP/1.1\r\n", 400},
    {"\n", 400},
    {"GET  / HTTP/1.1\r\n", 400},
    {" GET / HTTP/1.1\r\n", 400},
    {"GET /\r\n\r\n", 400},
    {"GET / \r\n", 400},
    {"GET / HTTP/1.1 \r\n", 400},
    {"GET / http/1.1\r\n", 400},
    {"GET / HTTP/11\r\n", 400},
    {"GET / HTTP/2.0\r\n", 505},
    {"GET / HTTP/1.2\r\n", 505},
    {"GET / HTTP/0.9\r\n", 505},
    {"G\x01T / HTTP/1.1\r\n", 400},
    {"GET /\x7f HTTP/1.1\r\n", 400},
    {"GET /\xff HTTP/1.1\r\n", 400},
    {"GET /a#b HTTP/1.1\r\n", 400},
    {"GET a HTTP/1.1\r\n", 400},
    {"GET * HTTP/1.1\r\n", 400},
    {"GET http:///x HTTP/1.1\r\n", 400},
    {"CONNECT a:1 HTTP/1.1\r\n", 400},
    {"ABCDEFGHIJKLMNOPQRSTUVWXYZ / HTTP/1.1\r\n", 501},
    {"\x16\x03\x01\x02", 400},
    {H " folded\r\n\r\n", 400},
    {H "A: b\r\n c\r\n\r\n", 400},
    {H "A : b\r\n\r\n", 400},
    {H ": b\r\n\r\n", 400},
    {H "A\r\n\r\n", 400},
    {H "A: b\x01\r\n\r\n", 400},
    {H "A: b\rc\r\n\r\n", 400},
    {H "A: b\x7f\r\n\r\n", 400},
    {H "A\xe9: b\r\n\r\n", 400},
    {H "\r\r", 400},
    {P "Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
    {P "Transfer-Encoding: chunked\r\nContent-Length: 5\r\n\r\n", 400},
    {P "Content-Length: 5\r\nContent-Length: 6\r\n\r\n", 400},
    {P "Content-Length: 5\r\nContent-Length: 5\r\n\r\n", 400},
    {P "Content-Length: 5, 5\r\n\r\n", 400},
    {P "Content-Length: +5\r\n\r\n", 400},
    {P "Content-Length: -1\r\n\r\n", 400},
    {P "Content-Length: 0x5\r\n\r\n", 400},
    {P "Content-Length:\r\n\r\n", 400},
    {P "Content-Length: 5 5\r\n\r\n", 400},
    {P "Content-Length: 4097\r\n\r\n", 413},
    {P "Content-Length: 99999999999999999999999\r\n\r\n", 413},
    {P "Transfer-Encoding: gzip\r\n\r\n", 501},
    {P "Transfer-Encoding: gzip, chunked\r\n\r\n", 501},
    {P "Transfer-Encoding:\r\n\r\n", 501},
    {P "Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
    {P "Transfer-Encoding: xchunked\r\n\r\n", 501},
    {P "Transfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
    {"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n", 400},
    {P "Expect: 200-ok\r\n\r\n", 417},
    {C "g\r\n", 400},
    {C "\r\n", 400},
    {C ";x\r\n", 400},
    {C "5\nhello", 400},
    {C "5\r\nhelloo\r\n", 400},
    {C "5\r\nhello\n0\r\n", 400},
    {C "5 \r\nhello\r\n", 400},
    {C "0x5\r\n", 400},
    {C "-5\r\n", 400},
    {C "1001\r\n", 413},
    {C "ffffffffffffffff\r\n", 413},
    {C "00000000000000005\r\n", 400},
    {C "5;\x01\r\n", 400},
    {C "5;a\rb\n", 400},
    {C "0\r\n: v\r\n\r\n", 400},
    {C "0\r\nA: v\n\r\n", 400},
    {C "0\r\n\rX", 400},
};

/* One line that says everything about a parse, to compare two ways of feeding. */
static void describe(td_http1 *p, td_http1_result r, size_t used, char *out, size_t n)
{
    if (r == TD_HTTP1_ERROR) {
        snprintf(out, n, "error %d %s", p->status, p->what);
        return;
    }
    int at = snprintf(out, n, "%d used %zu %s %s ? %s keep %d v11 %d body %zu:%.*s", (int)r, used,
                      td_head_at(&p->head, p->head.method), td_head_at(&p->head, p->head.path),
                      td_head_at(&p->head, p->head.query), p->keep_alive, p->v11, p->body.len,
                      (int)p->body.len, p->body.p ? p->body.p : "");
    for (int i = 0; i < p->head.n && at > 0 && (size_t)at < n; i++)
        at += snprintf(out + at, n - (size_t)at, "|%s=%s", td_head_at(&p->head, p->head.name[i]),
                       td_head_at(&p->head, p->head.value[i]));
}

/* Feed in[0..n) in pieces ending at the given cuts (ascending); each piece in its own heap block, so ASan
 * sees overreads. */
static td_http1_result feed(td_http1 *p, const char *in, size_t n, const size_t *cuts, int n_cuts,
                            size_t *used)
{
    td_http1_result r = TD_HTTP1_MORE;
    *used = 0;
    for (int i = 0; i <= n_cuts && r == TD_HTTP1_MORE; i++) {
        size_t end = i < n_cuts ? cuts[i] : n;
        if (end <= *used) continue;
        char *piece = malloc(end - *used);
        memcpy(piece, in + *used, end - *used);
        size_t k = 0;
        r = td_http1_feed(p, piece, end - *used, &k);
        if (r == TD_HTTP1_MORE) T_EQ(k, end - *used);
        *used += k;
        free(piece);
    }
    return r;
}

static void parse(const char *in, size_t n, const size_t *cuts, int n_cuts, char *out, size_t n_out)
{
    td_http1 p;
    size_t used;
    td_http1_init(&p, HEADER_MAX, BODY_MAX);
    td_http1_result r = feed(&p, in, n, cuts, n_cuts, &used);
    describe(&p, r, used, out, n_out);
    td_http1_deinit(&p);
}

static void every_split(const char *in, size_t n)
{
    char whole[16384], other[16384];
    size_t cuts[2], all[4096];
    parse(in, n, NULL, 0, whole, sizeof whole);
    for (size_t i = 0; i < n && i < 4096; i++) all[i] = i + 1;
    parse(in, n, all, (int)(n < 4096 ? n : 4096), other, sizeof other);
    T_STR(other, whole);
    for (size_t i = 1; i < n && i < 400; i++) {
        cuts[0] = i;
        cuts[1] = i + 1 + i % 7;
        parse(in, n, cuts, 1, other, sizeof other);
        if (strcmp(other, whole)) T_STR(other, whole);
        parse(in, n, cuts, cuts[1] < n ? 2 : 1, other, sizeof other);
        if (strcmp(other, whole)) T_STR(other, whole);
    }
}

static void test_good(void)
{
    for (size_t i = 0; i < sizeof GOOD / sizeof *GOOD; i++) {
        const good *g = &GOOD[i];
        td_http1 p;
        size_t n = strlen(g->in), used;
        td_http1_init(&p, HEADER_MAX, BODY_MAX);
        for (int again = 0; again < 2; again++) { /* the same after a reset */
            T_EQ(td_http1_feed(&p, g->in, n, &used), TD_HTTP1_DONE);
            T_EQ(used, n - (size_t)g->rest);
            T_STR(td_head_at(&p.head, p.head.method), g->method);
            T_STR(td_head_at(&p.head, p.head.path), g->path);
            T_STR(td_head_at(&p.head, p.head.query), g->query);
            T_EQ(p.body.len, strlen(g->body));
            T_OK(!p.body.len || !memcmp(p.body.p, g->body, p.body.len), "body of %zu", i);
            T_EQ(p.keep_alive, g->keep);
            if (g->header) T_STR(td_head_get(&p.head, g->header), g->value);
            T_OK(!td_head_get(&p.head, "absent"));
            td_http1_reset(&p);
        }
        td_http1_deinit(&p);
        every_split(g->in, n);
    }
}

static void test_bad(void)
{
    for (size_t i = 0; i < sizeof BAD / sizeof *BAD; i++) {
        td_http1 p;
        size_t used;
        td_http1_init(&p, HEADER_MAX, BODY_MAX);
        td_http1_result r = td_http1_feed(&p, BAD[i].in, strlen(BAD[i].in), &used);
        T_OK(r == TD_HTTP1_ERROR && p.status == BAD[i].status && p.what,
             "case %zu: result %d status %d, expected %d", i, (int)r, p.status, BAD[i].status);
        td_http1_deinit(&p);
        every_split(BAD[i].in, strlen(BAD[i].in));
    }
    every_split("GET /\0 HTTP/1.1\r\n", 17);
    char out[256];
    parse("GET /\0 HTTP/1.1\r\n", 17, NULL, 0, out, sizeof out);
    T_STR(out, "error 400 bad byte in the request target");
    parse(H "A: \0\r\n\r\n", sizeof H + 8, NULL, 0, out, sizeof out);
    T_STR(out, "error 400 bad byte in a header value");
}

static void expect_long(const char *prefix, char fill, size_t n, const char *suffix, const char *want)
{
    char out[16384];
    td_buf b;
    td_buf_init(&b, 0);
    td_buf_str(&b, prefix);
    for (size_t i = 0; i < n; i++) td_buf_chr(&b, fill);
    td_buf_str(&b, suffix);
    parse(b.p, b.len, NULL, 0, out, sizeof out);
    T_OK(!strncmp(out, want, strlen(want)), "%.60s, expected %s", out, want);
    size_t cuts[2] = {b.len / 3, b.len / 2};
    char again[16384];
    parse(b.p, b.len, cuts, 2, again, sizeof again);
    T_STR(again, out);
    td_buf_deinit(&b);
}

static void test_limits(void)
{
    expect_long("GET /", 'a', HEADER_MAX - 1, " HTTP/1.1\r\nHost: a\r\n\r\n", "1 used");
    expect_long("GET /", 'a', HEADER_MAX, " HTTP/1.1\r\nHost: a\r\n\r\n", "error 414");
    expect_long(H "A: ", 'v', HEADER_MAX - 18, "\r\n\r\n",
                "1 used"); /* "Host: a" + 2, "A: " + 2, final 2: 9 + 5 + 2 = 16 */
    expect_long(H "A: ", 'v', HEADER_MAX - 15, "\r\n\r\n", "error 431");
    expect_long(H "A:", ' ', HEADER_MAX, "\r\n\r\n", "error 431");
    expect_long(H, 'n', HEADER_MAX, ": v\r\n\r\n", "error 431");
    expect_long(C "5;", 'e', 4097, "\r\nhello\r\n0\r\n\r\n", "error 400 bad chunk extension");
    expect_long(C "0\r\nT: ", 'e', HEADER_MAX, "\r\n\r\n", "error 431");
    expect_long(P "Content-Length: 4096\r\n\r\n", 'b', 4096, "", "1 used");
    expect_long(C "1000\r\n", 'b', 4096, "\r\n0\r\n\r\n", "1 used");
    expect_long(C "1000\r\n", 'b', 4096, "\r\n1\r\nx", "error 413");
    td_buf b;
    td_buf_init(&b, 0);
    td_buf_str(&b, H);
    for (int i = 0; i < TD_HEAD_MAX - 1; i++) td_buf_str(&b, "a:\r\n");
    char out[16384];
    td_buf_str(&b, "\r\n");
    parse(b.p, b.len, NULL, 0, out, sizeof out);
    T_OK(!strncmp(out, "1 used", 6), "%.40s", out);
    b.len -= 2;
    td_buf_str(&b, "a:\r\n\r\n");
    parse(b.p, b.len, NULL, 0, out, sizeof out);
    T_STR(out, "error 431 too many header fields");
    td_buf_deinit(&b);
}

static void test_expect(void)
{
    td_http1 p;
    size_t used;
    const char *head = P "Expect: 100-continue\r\nContent-Length: 2\r\n\r\n";
    td_http1_init(&p, HEADER_MAX, BODY_MAX);
    T_EQ(td_http1_feed(&p, head, strlen(head), &used), TD_HTTP1_MORE);
    T_OK(p.head_done && p.expect);
    T_EQ(td_http1_feed(&p, "ab", 2, &used), TD_HTTP1_DONE);
    T_OK(!p.expect);
    td_http1_reset(&p);
    T_OK(!p.expect && !p.started && !p.head_done);
    td_http1_deinit(&p);
}

static uint64_t next(uint64_t *s) /* xorshift64* */
{
    *s ^= *s >> 12, *s ^= *s << 25, *s ^= *s >> 27;
    return (*s * 2685821657736338717u) >> 11;
}

/* Mutations of the corpus: no crash, bounded memory, and any two ways of cutting agree. */
static void test_fuzz(void)
{
    uint64_t seed = 12345;
    char in[1024], a[16384], b[16384];
    clock_t end = clock() + 2 * CLOCKS_PER_SEC;
    int rounds = 0;
    for (; clock() < end && t_failed < 5; rounds++) {
        const good *g = &GOOD[next(&seed) % (sizeof GOOD / sizeof *GOOD)];
        size_t n = strlen(g->in), cuts[8];
        memcpy(in, g->in, n);
        for (int k = (int)(next(&seed) % 4); k >= 0; k--) {
            size_t at = next(&seed) % n;
            static const char special[] = "\r\n \t:;,0fG\0\xff\x7f/?";
            switch (next(&seed) % 4) {
            case 0: in[at] = (char)next(&seed); break;
            case 1: in[at] = special[next(&seed) % (sizeof special - 1)]; break;
            case 2: memmove(in + at, in + at + 1, n - at - 1), n -= n > 1; break;
            default: memmove(in + at + 1, in + at, n - at), n++; break;
            }
        }
        int n_cuts = (int)(next(&seed) % 8);
        size_t last = 0;
        for (int i = 0; i < n_cuts; i++) cuts[i] = last = last + next(&seed) % (n - last + 1);
        parse(in, n, NULL, 0, a, sizeof a);
        parse(in, n, cuts, n_cuts, b, sizeof b);
        if (strcmp(a, b)) T_STR(b, a);
    }
    T_OK(rounds > 1000, "%d rounds", rounds);
}

static void test_out(void)
{
    td_buf out, fields;
    td_buf_init(&out, 0);
    td_buf_init(&fields, 0);
    const td_header h[] = {{"X-A", "1\r\nInjected: 2"}, {"content-length", "77"}, {"Transfer-Encoding", "x"}};
    td_http1_fields(&fields, h, 3);
    T_STR(fields.p, "X-A: 1  Injected: 2\r\n");
    td_http1_head(&out, 200, TD_HTTP1_LENGTH, 5, true, "D", &fields);
    T_STR(out.p, "HTTP/1.1 200 OK\r\nDate: D\r\nX-A: 1  Injected: 2\r\nContent-Length: 5\r\nConnection: "
                 "keep-alive\r\n\r\n");
    td_buf_reset(&out);
    td_http1_head(&out, 204, TD_HTTP1_LENGTH, 0, false, "D", NULL);
    T_STR(out.p, "HTTP/1.1 204 No Content\r\nDate: D\r\nConnection: close\r\n\r\n");
    td_buf_reset(&out);
    td_http1_chunk(&out, "", 0);
    T_EQ(out.len, 0);
    td_http1_chunk(&out, "0123456789abcdef", 16);
    td_http1_last_chunk(&out);
    T_STR(out.p, "10\r\n0123456789abcdef\r\n0\r\n\r\n");
    td_buf_deinit(&out);
    td_buf_deinit(&fields);
}

int main(void)
{
    test_good();
    test_bad();
    test_limits();
    test_expect();
    test_fuzz();
    test_out();
    return T_DONE();
}
