// SPDX-License-Identifier: Apache-2.0
/* tests/wire/test_sock.c - delivery, wake-ups, back-pressure, lost peers, message limits, and who CURVE lets in. */
#include "common/check.h"
#include "common/clock.h"
#include "common/wire/loop.h"
#include "tests/t.h"
#include <pthread.h>
#include <unistd.h>

static td_zctx *z;
static const td_sock_opts plain = {.max_message_bytes = 1 << 20, .hwm = 1000};

static td_status recv_within(td_sock *s, int ms, td_part *id, td_part part[2], int *n)
{
    td_loop l;
    td_loop_init(&l);
    td_loop_add_sock(&l, s);
    int64_t until = td_now_us() + ms * 1000;
    td_status st;
    while ((st = td_sock_recv(s, id, part, n)) == TD_AGAIN && td_now_us() < until) td_loop_wait(&l, 20000);
    return st;
}

static td_status send_within(td_sock *s, int ms, const char *text)
{
    int64_t until = td_now_us() + ms * 1000;
    td_part p = {text, strlen(text)};
    td_status st;
    while ((st = td_sock_send(s, NULL, 0, &p, 1)) == TD_AGAIN && td_now_us() < until) usleep(1000);
    return st;
}

typedef struct { char endpoint[128]; int rounds; } echo_arg;

/* Sends bursts of 1..7 and waits for their echoes by the loop only: a lost wake-up shows as a timeout. */
static void *pinger(void *arg)
{
    echo_arg *a = arg;
    td_sock *s;
    TD_CHECK(td_sock_connect_dealer(z, a->endpoint, "ping", 4, &plain, &s) == TD_OK);
    td_loop l;
    td_loop_init(&l);
    td_loop_add_sock(&l, s);
    uint32_t sent = 0, got = 0;
    intptr_t bad = 0;
    while (send_within(s, 3000, "go") != TD_OK) {}
    for (uint32_t round = 0; got < (uint32_t)a->rounds && !bad; round++) {
        for (uint32_t k = 0; k < 1 + round % 7; k++, sent++) {
            td_part p[2] = {{&sent, 4}, {&round, 4}};
            if (td_sock_send(s, NULL, 0, p, 2) != TD_OK) bad++;
        }
        while (got < sent && !bad) {
            td_part id, part[2];
            int n;
            int64_t t0 = td_now_us();
            while (td_sock_recv(s, &id, part, &n) == TD_AGAIN) {
                td_loop_wait(&l, 2000000);
                if (td_now_us() - t0 > 1900000) {
                    bad++;
                    break;
                }
            }
            if (bad) break;
            if (n != 2 || part[0].n != 4 || memcmp(part[0].p, &got, 4)) bad++;
            got++;
        }
    }
    td_part p = {"stop", 4};
    (void)td_sock_send(s, NULL, 0, &p, 1);
    usleep(50000); /* linger 0 */
    td_sock_close(s);
    return (void *)bad;
}

static void test_ping_pong(const char *endpoint, int rounds)
{
    echo_arg a = {.rounds = rounds};
    td_sock *s;
    T_EQ(td_sock_bind_router(z, endpoint, &plain, a.endpoint, sizeof a.endpoint, &s), TD_OK);
    pthread_t t;
    pthread_create(&t, NULL, pinger, &a);
    td_loop l;
    td_loop_init(&l);
    td_loop_add_sock(&l, s);
    bool stop = false;
    int64_t t0 = td_now_us();
    while (!stop && td_now_us() - t0 < 100000000) {
        td_part id, part[2];
        int n;
        if (td_sock_recv(s, &id, part, &n) == TD_AGAIN) {
            td_loop_wait(&l, 1000000);
            continue;
        }
        if (n == 1) stop = part[0].n == 4;
        else T_EQ(td_sock_send(s, id.p, id.n, part, n), TD_OK);
    }
    void *bad;
    pthread_join(t, &bad);
    T_EQ((intptr_t)bad, 0);
    T_OK(stop);
    td_sock_close(s);
}

/* Room that came while another call asked the socket: its news is eaten, and sleeping on it would last. */
static void test_room(void)
{
    enum { LONG_US = 20000000 };
    static char block[1 << 16];
    const td_sock_opts one = {.max_message_bytes = 1 << 20, .hwm = 1};
    char ep[128];
    td_sock *r, *d;
    T_EQ(td_sock_bind_router(z, "tcp://127.0.0.1:*", &one, ep, sizeof ep, &r), TD_OK);
    T_EQ(td_sock_connect_dealer(z, ep, NULL, 0, &one, &d), TD_OK);
    td_loop l;
    td_loop_init(&l);
    td_loop_add_sock(&l, d);
    T_EQ(send_within(d, 3000, "first"), TD_OK);
    td_part p = {block, sizeof block};
    uint32_t sent = 1, got = 0;
    bool full = false;
    while (!full) { /* the kernel's buffers take some */
        td_loop_want_room(&l, d);
        td_loop_wait(&l, 100000);
        td_loop_want_none(&l);
        full = !td_sock_writable(d);
        while (td_sock_writable(d)) sent += td_sock_send(d, NULL, 0, &p, 1) == TD_OK;
    }
    td_part id, part[2];
    int n;
    for (; got < sent && recv_within(r, 3000, &id, part, &n) == TD_OK; got++) {
    }
    T_EQ(got, sent);
    while (!td_sock_writable(d)) usleep(1000); /* the last of these eats it */
    td_loop_want_room(&l, d);
    int64_t t0 = td_now_us();
    td_loop_wait(&l, LONG_US);
    T_OK(td_now_us() - t0 < LONG_US - 100000, "the room that is there was slept over");
    td_sock_close(d);
    td_sock_close(r);
}

static int freed;
static void count_free(void *p, void *hint)
{
    free(p);
    __atomic_add_fetch((int *)hint, 1, __ATOMIC_SEQ_CST);
}

static void test_gone_and_again(void)
{
    char ep[128];
    td_sock *r, *d;
    T_EQ(td_sock_bind_router(z, "tcp://127.0.0.1:*", &plain, ep, sizeof ep, &r), TD_OK);
    td_part p = {"x", 1};
    T_EQ(td_sock_send(r, "nobody", 6, &p, 1), TD_EGONE);
    T_EQ(td_sock_send_owned(r, "nobody", 6, p, malloc(10), 10, count_free, &freed), TD_EGONE);
    T_EQ(__atomic_load_n(&freed, __ATOMIC_SEQ_CST), 1);

    /* a dealer without a peer keeps nothing: IMMEDIATE */
    T_EQ(td_sock_connect_dealer(z, "tcp://127.0.0.1:1", NULL, 0, &plain, &d), TD_OK);
    T_EQ(td_sock_send(d, NULL, 0, &p, 1), TD_AGAIN);
    T_EQ(td_sock_send_owned(d, NULL, 0, p, malloc(10), 10, count_free, &freed), TD_AGAIN);
    T_EQ(__atomic_load_n(&freed, __ATOMIC_SEQ_CST), 2);
    td_sock_close(d);

    /* a peer that does not read: AGAIN after a bounded number of messages */
    td_sock_opts small = {.max_message_bytes = 1 << 20, .hwm = 8};
    T_EQ(td_sock_connect_dealer(z, ep, "slow", 4, &small, &d), TD_OK);
    T_EQ(send_within(d, 3000, "hi"), TD_OK);
    td_part id, part[2];
    int n;
    T_EQ(recv_within(r, 3000, &id, part, &n), TD_OK);
    T_OK(id.n == 4 && !memcmp(id.p, "slow", 4) && n == 1);
    static char big[200000];
    td_part bp = {big, sizeof big};
    int sent = 0;
    td_status st;
    while ((st = td_sock_send(r, "slow", 4, &bp, 1)) == TD_OK && sent < 5000) sent++;
    T_EQ(st, TD_AGAIN);
    T_OK(sent >= 8 && sent < 3000, "sent %d", sent);

    /* the payload handed over arrives whole and is freed once */
    td_sock *d2;
    T_EQ(td_sock_connect_dealer(z, ep, "own", 3, &plain, &d2), TD_OK);
    char *pay = malloc(300000);
    memset(pay, 7, 300000);
    int64_t until = td_now_us() + 3000000;
    st = TD_AGAIN;
    while (send_within(d2, 3000, "up") != TD_OK && td_now_us() < until) {}
    st = td_sock_send_owned(d2, NULL, 0, (td_part){"head", 4}, pay, 300000, count_free, &freed);
    T_EQ(st, TD_OK);
    T_EQ(recv_within(r, 3000, &id, part, &n), TD_OK);
    T_EQ(recv_within(r, 3000, &id, part, &n), TD_OK);
    T_OK(n == 2 && part[0].n == 4 && part[1].n == 300000 && ((const char *)part[1].p)[299999] == 7);
    for (int i = 0; i < 1000 && __atomic_load_n(&freed, __ATOMIC_SEQ_CST) < 3; i++) usleep(1000);
    T_EQ(__atomic_load_n(&freed, __ATOMIC_SEQ_CST), 3);

    /* a peer that left: EGONE before long */
    td_sock_close(d2);
    until = td_now_us() + 3000000;
    while ((st = td_sock_send(r, "own", 3, &p, 1)) != TD_EGONE && td_now_us() < until) usleep(1000);
    T_EQ(st, TD_EGONE);
    td_sock_close(d);
    td_sock_close(r);
}

/* A message over the receiver's limit never arrives and the socket goes on working for others. */
static void test_over_size(void)
{
    char ep[128];
    td_sock *r, *d, *ok;
    td_sock_opts small = {.max_message_bytes = 1000, .hwm = 100};
    T_EQ(td_sock_bind_router(z, "tcp://127.0.0.1:0", &small, ep, sizeof ep, &r), TD_OK);
    T_EQ(td_sock_connect_dealer(z, ep, "big", 3, &plain, &d), TD_OK);
    char text[2001];
    memset(text, 'a', 2000);
    text[2000] = 0;
    T_EQ(send_within(d, 3000, text), TD_OK);
    td_part id, part[2];
    int n;
    T_EQ(recv_within(r, 300, &id, part, &n), TD_AGAIN);
    T_EQ(td_sock_connect_dealer(z, ep, "ok", 2, &plain, &ok), TD_OK);
    text[900] = 0;
    T_EQ(send_within(ok, 3000, text), TD_OK);
    T_EQ(recv_within(r, 3000, &id, part, &n), TD_OK);
    T_OK(id.n == 2 && part[0].n == 900);
    td_sock_close(d);
    td_sock_close(ok);
    td_sock_close(r);
}

static bool delivers(const char *ep, td_sock *r, const td_curve *c)
{
    td_sock_opts o = plain;
    o.curve = c;
    td_sock *d;
    if (td_sock_connect_dealer(z, ep, "cu", 2, &o, &d) != TD_OK) return false;
    td_status st = send_within(d, 400, "secret");
    td_part id, part[2];
    int n;
    bool got = st == TD_OK && recv_within(r, 2000, &id, part, &n) == TD_OK && part[0].n == 6;
    td_sock_close(d);
    return got;
}

static void test_curve(void)
{
    td_curve cluster, stranger, wrong_server;
    td_curve_generate(&cluster);
    td_curve_generate(&stranger);
    wrong_server = cluster;
    memcpy(wrong_server.server_key, stranger.public_key, 32);
    memcpy(stranger.server_key, cluster.public_key, 32); /* knows the server's public key, has another pair */
    td_sock_opts o = plain;
    o.curve = &cluster;
    char ep[128];
    td_sock *r;
    T_EQ(td_sock_bind_router(z, "tcp://127.0.0.1:*", &o, ep, sizeof ep, &r), TD_OK);
    T_OK(delivers(ep, r, &cluster));
    T_OK(!delivers(ep, r, &stranger));
    T_OK(!delivers(ep, r, &wrong_server));
    T_OK(!delivers(ep, r, NULL));
    T_OK(delivers(ep, r, &cluster));
    td_sock_close(r);

    char dir[] = "/tmp/td-keys-XXXXXX", sec[64], pub[64];
    T_OK(mkdtemp(dir) != NULL);
    snprintf(sec, sizeof sec, "%s/k.secret", dir);
    snprintf(pub, sizeof pub, "%s/k.public", dir);
    td_curve back;
    T_EQ(td_curve_save(&cluster, sec, pub), TD_OK);
    T_EQ(td_curve_load(&back, sec, pub), TD_OK);
    T_OK(!memcmp(&back, &cluster, sizeof back));
    T_EQ(td_curve_load(&back, sec, NULL), TD_OK);
    T_OK(!memcmp(&back, &cluster, sizeof back));
    T_EQ(td_curve_load(&back, "/nonexistent", NULL), TD_EIO);
    T_EQ(td_curve_load(&back, "/dev/null", NULL), TD_EPROTO);
    unlink(sec);
    unlink(pub);
    rmdir(dir);
}

static void test_local(void)
{
    T_OK(td_curve_required("router", "ipc:///x", NULL, false) == TD_OK && td_curve_required("router", "tcp://10.0.0.1:5", NULL, true) == TD_OK);
    T_EQ(td_curve_required("router", "tcp://10.0.0.1:5", NULL, false), TD_EBADREQ);
    T_OK(strstr(td_reason(), "--router tcp://10.0.0.1:5 leaves this machine"), "%s", td_reason());
    T_EQ(td_curve_required("router", "10.0.0.1:5", NULL, true), TD_EBADREQ);
    T_OK(strstr(td_reason(), "--router 10.0.0.1:5 is no endpoint: tcp://HOST:PORT or ipc://PATH"), "%s", td_reason());
    T_OK(td_endpoint_is_local("ipc:///tmp/x") && td_endpoint_is_local("tcp://127.0.0.1:5") &&
         td_endpoint_is_local("tcp://[::1]:5"));
    T_OK(td_endpoint_is_local("tcp://localhost:*") && !td_endpoint_is_local("tcp://0.0.0.0:5") &&
         !td_endpoint_is_local("tcp://*:5"));
    T_OK(!td_endpoint_is_local("tcp://127.evil.example:5") && !td_endpoint_is_local("tcp://[::]:5") && !td_endpoint_is_local("127.0.0.1:5"));
}

/* What a host is called is as good as its address. */
static void test_names(void)
{
    char bound[128] = "";
    td_sock *s = NULL;
    test_ping_pong("tcp://localhost:*", 10);
    T_EQ(td_sock_bind_router(z, "tcp://localhost:*", &plain, bound, sizeof bound, &s), TD_OK);
    T_OK(strstr(bound, "127.0.0.1"), "%s", bound);
    td_sock_close(s);
    T_EQ(td_sock_bind_router(z, "tcp://no-host.invalid:*", &plain, bound, sizeof bound, &s), TD_EIO);
    T_OK(strstr(td_reason(), "bind tcp://no-host.invalid:*: no address of this host"), "%s", td_reason());
}

int main(int argc, char **argv)
{
    int rounds = argc > 1 ? atoi(argv[1]) : 50000;
    z = td_zctx_open();
    test_local();
    test_ping_pong("tcp://127.0.0.1:*", rounds);
    char ipc[64];
    snprintf(ipc, sizeof ipc, "ipc:///tmp/td-test-%d.sock", (int)getpid());
    test_ping_pong(ipc, rounds);
    test_names();
    test_room();
    test_gone_and_again();
    test_over_size();
    test_curve();
    td_zctx_close(z);
    return T_DONE();
}
