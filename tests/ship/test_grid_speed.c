// SPDX-License-Identifier: Apache-2.0
/* tests/ship/test_grid_speed.c - a prompt's KV from one rank to two (TP 2) against the bare sockets under it: frames of the same number
 * and size, sent as they lie in the source's pages and dropped on arrival. Alternating rounds; every shipment is checked. As a test: small, no claim.
 *
 *     ship_test_grid_speed [rounds [tokens [shape [tcp|ipc]]]]      prints one JSON line
 */
#include "common/check.h"
#include "common/chan.h"
#include "common/clock.h"
#include "common/wire/loop.h"
#include "proto/kvframe.h"
#include "tests/ship/support_grid.h"
#include "tests/t.h"
#include "worker/ship/ship.h"
#include <pthread.h>
#include <stdatomic.h>
#include <sys/resource.h>
#include <unistd.h>

enum { DSTS = 2, CREDITS = 64, CHUNK = 256, SRC_INC = 500, DST_INC = 600, HWM = 64, MAX_ROUNDS = 99 };
static td_model_desc d;
static td_zctx *zs, *zd[DSTS]; /* each rank is a process of its own: a context, and its I/O thread, each */
static bool tcp;
static int serial;

static const char *address(char *b, size_t n)
{
    if (tcp) snprintf(b, n, "tcp://127.0.0.1:0");
    else snprintf(b, n, "ipc:///tmp/td-speed-%d-%d", (int)getpid(), serial++);
    return b;
}

/* ---- the sockets alone ---- */
typedef struct sink { td_zctx *z; td_sock *sock; char endpoint[256]; uint64_t bytes, want; pthread_t thread; atomic_bool bound; } sink;

static void *sink_main(void *arg)
{
    sink *k = arg;
    char b[128];
    td_sock_opts o = {.max_message_bytes = TD_KVF_FRAME_BYTES + 64 * 1024, .hwm = 1 << 20};
    TD_CHECK(td_sock_bind_router(k->z, address(b, sizeof b), &o, k->endpoint, sizeof k->endpoint, &k->sock) == TD_OK);
    k->bound = true;
    td_loop loop;
    td_loop_init(&loop);
    td_loop_add_sock(&loop, k->sock);
    while (k->bytes < k->want) {
        td_part id, part[2];
        int n;
        if (td_sock_recv(k->sock, &id, part, &n) == TD_OK) k->bytes += part[1].n;
        else td_loop_wait(&loop, 1000);
    }
    td_sock_close(k->sock);
    return NULL;
}

static void keep(void *p, void *hint)
{
    (void)p;
    (void)hint;
}

/* Microseconds from the first frame to the last one's arrival. */
static int64_t raw(uint64_t bytes_each, uint32_t frame, uint8_t *from)
{
    static sink k[DSTS];
    td_sock *out[DSTS];
    uint64_t left[DSTS];
    td_loop loop;
    td_loop_init(&loop);
    for (int i = 0; i < DSTS; i++) {
        k[i] = (sink){.z = zd[i], .want = bytes_each};
        left[i] = bytes_each;
        pthread_create(&k[i].thread, NULL, sink_main, &k[i]);
        while (!k[i].bound) usleep(100);
        td_sock_opts o = {.max_message_bytes = 64 * 1024, .hwm = HWM};
        TD_CHECK(td_sock_connect_dealer(zs, k[i].endpoint, NULL, 0, &o, &out[i]) == TD_OK);
        td_loop_add_sock(&loop, out[i]);
        while (!td_sock_writable(out[i])) usleep(100);
    }
    td_kvframe h = {0};
    int64_t t = td_now_us();
    while (left[0] + left[1]) {
        bool any = false;
        for (int i = 0; i < DSTS; i++) {
            uint64_t n = TD_MIN(left[i], (uint64_t)frame);
            if (!n || !td_sock_writable(out[i])) continue;
            if (td_sock_send_owned(out[i], NULL, 0, (td_part){&h, sizeof h}, from, n, keep, NULL) == TD_OK) left[i] -= n, from += n, any = true;
        }
        if (!any) td_loop_wait(&loop, 1000);
    }
    for (int i = 0; i < DSTS; i++) pthread_join(k[i].thread, NULL);
    t = td_now_us() - t;
    for (int i = 0; i < DSTS; i++) td_sock_close(out[i]);
    return t;
}

/* ---- ships ---- */
typedef struct ranks { td_ship_grid ga, gb; grid_rank src, dst[DSTS]; td_ship *from, *to[DSTS]; int wake; uint32_t n; uint64_t key; } ranks;

static void ships_open(ranks *r, uint32_t n)
{
    char b[128];
    *r = (ranks){.ga = td_ship_grid_one(&d), .gb = td_ship_grid_one(&d), .wake = td_wake_open(), .n = n, .key = 1};
    r->gb.tp = DSTS;
    grid_open(&r->src, &r->ga, &d, 0, 16, n, 0xAA, 1);
    grid_tag(&r->src, &d, n);
    td_ship_opts o = {.z = zs, .desc = &d, .incarnation = SRC_INC, .max_keys = 4, .timeout_us = 20000000, .wake_fd = r->wake};
    for (int g = 0; g < d.n_groups; g++) o.kv[g] = &r->src.kv[g];
    TD_CHECK(td_ship_open(&o, &r->from) == TD_OK);
    o.grid = &r->gb;
    o.incarnation = DST_INC;
    o.bulk_bind = b;
    for (uint32_t k = 0; k < DSTS; k++) {
        grid_open(&r->dst[k], &r->gb, &d, k, 16, n, 0x55, 7 + k);
        o.z = zd[k];
        o.rank = k;
        address(b, sizeof b);
        for (int g = 0; g < d.n_groups; g++) o.kv[g] = &r->dst[k].kv[g];
        TD_CHECK(td_ship_open(&o, &r->to[k]) == TD_OK);
    }
}

static void ships_close(ranks *r)
{
    td_ship_close(r->from);
    for (int k = 0; k < DSTS; k++) td_ship_close(r->to[k]), grid_close(&r->dst[k], &d);
    grid_close(&r->src, &d);
    close(r->wake);
}

static void ships_report(ranks *r)
{
    td_ship_event *e;
    while ((e = td_ship_poll(r->to[1]))) {
        td_ship_report x;
        td_ship_event_report(e, 1, &x);
        td_ship_peer(r->to[0], &x, NULL);
        td_ship_event_free(e);
    }
}

/* Microseconds from the first layer to both workers' last word. */
static int64_t ship(ranks *r, uint64_t *frames, uint64_t *bytes)
{
    td_buf b;
    td_buf_init(&b, 0);
    const char *ends[DSTS] = {td_ship_endpoint(r->to[0]), td_ship_endpoint(r->to[1])};
    TD_CHECK(td_ship_ranks(&r->gb, ends, &b) == TD_OK);
    uint64_t key = r->key++;
    for (int k = 0; k < DSTS; k++) td_ship_recv_open(r->to[k], key, 0, r->n, 1, (const int32_t *const *)r->dst[k].pages, r->dst[k].n_pages);
    td_msg_sink sink = {.endpoint = ends[0], .epoch = key, .incarnation = DST_INC, .credits = CREDITS, .ranks = b.p, .ranks_bytes = (uint32_t)b.len};
    td_ship_send_open(r->from, key, &sink, r->n);
    usleep(20000); /* the links are there, as in the measure of the sockets */
    int64_t t = td_now_us();
    for (uint32_t at = 0; at < r->n; at += CHUNK)
        td_ship_send_layers(r->from, key, 0, d.L, at, TD_MIN(at + CHUNK, r->n), (const int32_t *const *)r->src.pages, r->src.n_pages);
    td_first first = {.token = 5};
    td_ship_send_commit(r->from, key, &(td_commit){.n_first = 1, .first = &first}, t);
    bool sent = false, landed = false;
    td_loop loop;
    td_loop_init(&loop);
    td_loop_add_fd(&loop, r->wake);
    while ((!sent || !landed) && td_now_us() - t < 60000000) {
        td_wake_clear(r->wake);
        td_ship_flush(r->from);
        ships_report(r);
        td_ship_event *e = td_ship_poll(r->from), *f = td_ship_poll(r->to[0]);
        sent |= e && e->type == TD_SHIP_SENT && e->ok;
        landed |= f && f->type == TD_SHIP_LANDED;
        if (f) *frames = f->frames, *bytes = f->bytes;
        if (e) td_ship_event_free(e);
        if (f) td_ship_event_free(f);
        if (!e && !f) td_loop_wait(&loop, 1000);
    }
    t = td_now_us() - t;
    T_OK(sent && landed, "it did not land");
    td_buf_deinit(&b);
    return t;
}

static double cpu_ms(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1e3 + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e3;
}

static int up(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double median(double *v, int n)
{
    qsort(v, (size_t)n, sizeof *v, up);
    return n % 2 ? v[n / 2] : (v[n / 2 - 1] + v[n / 2]) / 2;
}

int main(int argc, char **argv)
{
    int rounds = argc > 1 ? TD_MIN(atoi(argv[1]), (int)MAX_ROUNDS) : 1;
    uint32_t n = argc > 2 ? (uint32_t)atoi(argv[2]) : 300;
    const char *shape = argc > 3 ? argv[3] : "ranks-tiny";
    tcp = argc > 4 && !strcmp(argv[4], "tcp");
    T_OK(td_model_desc_shape(shape, &d) == TD_OK, "%s", td_reason());
    zs = td_zctx_open();
    for (int k = 0; k < DSTS; k++) zd[k] = td_zctx_open();
    static ranks r;
    ships_open(&r, n);
    double mb_raw[MAX_ROUNDS], mb_ship[MAX_ROUNDS], ratio[MAX_ROUNDS], cpu_raw[MAX_ROUNDS], cpu_ship[MAX_ROUNDS];
    uint64_t frames = 1, bytes = 1;
    (void)ship(&r, &frames, &bytes); /* warm */
    uint64_t wrong = 0;
    for (int k = 0; k < DSTS; k++) wrong += grid_wrong(&r.dst[k], &d, 0, n, 0x55);
    T_EQ(wrong, 0);
    for (int i = 0; i < rounds && !t_failed; i++) {
        double c0 = cpu_ms(), a = (double)raw(bytes / DSTS, (uint32_t)(bytes / frames), r.src.kv[0].base), c1 = cpu_ms(), b = (double)ship(&r, &frames, &bytes);
        cpu_raw[i] = c1 - c0;
        cpu_ship[i] = cpu_ms() - c1;
        mb_raw[i] = (double)bytes / a;
        mb_ship[i] = (double)bytes / b;
        ratio[i] = a / b;
    }
    (void)median(mb_raw, rounds); /* sorted: the last is the best */
    (void)median(mb_ship, rounds);
    if (argc > 1 && !t_failed)
        printf("{\"shape\":\"%s\",\"tokens\":%u,\"transport\":\"%s\",\"rounds\":%d,\"bytes\":%llu,\"frames\":%llu,\"raw_mb_s\":%.0f,\"ship_mb_s\":%.0f,\"ratio\":%.3f,\"raw_best_mb_s\":%.0f,\"ship_best_mb_s\":%.0f,\"raw_cpu_ms\":%.1f,\"ship_cpu_ms\":%.1f}\n", shape, n,
               tcp ? "tcp" : "ipc", rounds, (unsigned long long)bytes, (unsigned long long)frames, median(mb_raw, rounds), median(mb_ship, rounds), median(ratio, rounds), mb_raw[rounds - 1], mb_ship[rounds - 1], median(cpu_raw, rounds), median(cpu_ship, rounds));
    ships_close(&r);
    td_zctx_close(zs);
    for (int k = 0; k < DSTS; k++) td_zctx_close(zd[k]);
    return argc > 1 ? t_failed != 0 : T_DONE();
}
