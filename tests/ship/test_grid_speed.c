// SPDX-License-Identifier: Apache-2.0
/* tests/ship/test_grid_speed.c - a prompt's KV from one rank to two (TP 2) against the bare sockets under it: the same sockets, threads and
 * frames, sent as they lie in the source's pages and dropped on arrival; and against the same with one memcpy on arrival to where the bytes
 * are to stay, which nothing over ZeroMQ can do without. Rounds of the three in turn; the first shipment is checked by bytes.
 * Then the same with layers that take PACE times as long to compute as to ship, on a busy core: what remains after the last one is exposed.
 * As a test: small, no claim.
 *
 *     ship_test_grid_speed [rounds [tokens [shape [tcp|ipc]]]]      prints one JSON line
 */
#include "common/chan.h"
#include "common/check.h"
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

enum { DSTS = 2, CREDITS = 64, CHUNK = 256, SRC_INC = 500, DST_INC = 600, MAX_ROUNDS = 99, PACE = 4 };
static td_model_desc d;
static td_zctx *zs, *zd[DSTS]; /* each rank is a process of its own: a context, and its I/O thread, each */
static bool tcp;
static int serial;

static const char *address(char *b, size_t n)
{
    if (tcp)
        snprintf(b, n, "tcp://127.0.0.1:0");
    else
        snprintf(b, n, "ipc:///tmp/td-speed-%d-%d", (int)getpid(), serial++);
    return b;
}

/* ---- the sockets alone ---- */
/* Links and threads live as long as the ships do, so that neither side pays for connecting or has the wider windows. */
/* place: where what arrives is copied to, one after the other; NULL: dropped. */
typedef struct sink {
    td_zctx *z;
    td_sock *sock;
    char endpoint[256];
    _Atomic(uint8_t *) place;
    atomic_ullong bytes;
    atomic_bool bound, stop;
    pthread_t thread;
    int wake;
} sink;
static sink sinks[DSTS];
static td_sock *links[DSTS];
static int raw_wake;

static void *sink_main(void *arg)
{
    sink *k = arg;
    char b[128];
    td_sock_opts o = {.max_message_bytes = TD_KVF_FRAME_BYTES + 64 * 1024, .hwm = 1 << 20};
    TD_CHECK(td_sock_bind_router(k->z, address(b, sizeof b), &o, k->endpoint, sizeof k->endpoint, &k->sock) ==
             TD_OK);
    k->bound = true;
    td_loop loop;
    td_loop_init(&loop);
    td_loop_add_sock(&loop, k->sock);
    td_loop_add_fd(&loop, k->wake);
    while (!k->stop) {
        td_part id, part[2];
        int n;
        bool any = false;
        for (; td_sock_recv(k->sock, &id, part, &n) == TD_OK; any = true) {
            if (k->place) memcpy(k->place + k->bytes, part[1].p, part[1].n);
            k->bytes += part[1].n;
        }
        if (any) td_wake_signal(raw_wake);
        td_loop_wait(&loop, -1);
    }
    td_sock_close(k->sock);
    return NULL;
}

static void raw_open(void)
{
    raw_wake = td_wake_open();
    for (int i = 0; i < DSTS; i++) {
        sinks[i].z = zd[i];
        sinks[i].wake = td_wake_open();
        pthread_create(&sinks[i].thread, NULL, sink_main, &sinks[i]);
        while (!sinks[i].bound) usleep(100);
        td_sock_opts o = {
            .max_message_bytes = 64 * 1024, .hwm = TD_SHIP_HWM, .send_buffer = TD_SHIP_LOCAL_BUFFER};
        TD_CHECK(td_sock_connect_dealer(zs, sinks[i].endpoint, NULL, 0, &o, &links[i]) == TD_OK);
        while (!td_sock_writable(links[i])) usleep(100);
    }
}

static void raw_close(void)
{
    for (int i = 0; i < DSTS; i++) {
        sinks[i].stop = true;
        td_wake_signal(sinks[i].wake);
        pthread_join(sinks[i].thread, NULL);
        td_sock_close(links[i]);
        close(sinks[i].wake);
    }
    close(raw_wake);
}

static void keep(void *p, void *hint)
{
    (void)p;
    (void)hint;
}

/* Microseconds from the first frame to the last one's arrival: frames as they lie in the source's memory. */
static int64_t raw(uint64_t bytes_each, uint32_t frame, uint8_t *from, uint8_t *const place[DSTS])
{
    uint64_t left[DSTS];
    td_kvframe h = {0};
    td_loop loop;
    td_loop_init(&loop);
    td_loop_add_fd(&loop, raw_wake);
    for (int i = 0; i < DSTS; i++) {
        td_loop_add_sock(&loop, links[i]);
        left[i] = bytes_each;
        sinks[i].bytes = 0;
        sinks[i].place = place ? place[i] : NULL;
    }
    int64_t t = td_now_us();
    while (sinks[0].bytes < bytes_each || sinks[1].bytes < bytes_each) {
        bool any = false;
        td_wake_clear(raw_wake);
        for (int i = 0; i < DSTS; i++) {
            uint64_t n = TD_MIN(left[i], (uint64_t)frame);
            if (!n || !td_sock_writable(links[i])) continue;
            if (td_sock_send_owned(links[i], NULL, 0, (td_part){&h, sizeof h}, from, n, keep, NULL) == TD_OK)
                left[i] -= n, from += n, any = true;
        }
        if (!any) td_loop_wait(&loop, 1000);
    }
    return td_now_us() - t;
}

/* ---- ships ---- */
typedef struct ranks {
    td_ship_grid ga, gb;
    grid_rank src, dst[DSTS];
    td_ship *from, *to[DSTS];
    int wake;
    uint32_t n;
    uint64_t key;
} ranks;

static void ships_open(ranks *r, uint32_t n)
{
    char b[128];
    *r = (ranks){
        .ga = td_ship_grid_one(&d), .gb = td_ship_grid_one(&d), .wake = td_wake_open(), .n = n, .key = 1};
    r->gb.tp = DSTS;
    grid_open(&r->src, &r->ga, &d, 0, 16, n, 0xAA, 1);
    grid_tag(&r->src, &d, n);
    td_ship_opts o = {.z = zs,
                      .desc = &d,
                      .incarnation = SRC_INC,
                      .max_keys = 4,
                      .credits = CREDITS,
                      .timeout_us = 20000000,
                      .wake_fd = r->wake};
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

typedef struct shipment {
    uint64_t frames, bytes;
    int64_t wall_us, transfer_us, exposed_us;
} shipment;

/* A layer's computation: a core that is busy for so long. */
static void compute(int64_t until_us)
{
    while (td_now_us() < until_us) {
    }
}

/* From the first layer to both workers' last word. pace_us: what the layers take to compute, one after the other, of the whole
 * prompt; 0: they are all there. */
static shipment ship(ranks *r, int64_t pace_us)
{
    shipment x = {0};
    td_buf b;
    td_buf_init(&b, 0);
    const char *ends[DSTS] = {td_ship_endpoint(r->to[0]), td_ship_endpoint(r->to[1])};
    TD_CHECK(td_ship_ranks(&r->gb, ends, &b) == TD_OK);
    uint64_t key = r->key++;
    for (int k = 0; k < DSTS; k++)
        td_ship_recv_open(r->to[k], key, 0, r->n, 1, (const int32_t *const *)r->dst[k].pages,
                          r->dst[k].n_pages);
    td_msg_sink whom = {.endpoint = ends[0],
                        .epoch = key,
                        .incarnation = DST_INC,
                        .credits = CREDITS,
                        .ranks = b.p,
                        .ranks_bytes = (uint32_t)b.len};
    td_ship_send_open(r->from, key, &whom, r->n);
    usleep(20000); /* the links are there, as in the measure of the sockets */
    int64_t t = td_now_us(), end = t;
    uint32_t steps = (r->n + CHUNK - 1) / CHUNK * (uint32_t)d.L, step = 0;
    for (uint32_t at = 0; at < r->n; at += CHUNK)
        for (int l = 0; l < d.L; l++) {
            if (pace_us) compute(t + pace_us * ++step / steps);
            td_ship_send_layers(r->from, key, l, l + 1, at, TD_MIN(at + CHUNK, r->n),
                                (const int32_t *const *)r->src.pages, r->src.n_pages);
        }
    if (pace_us) end = td_now_us();
    td_first first = {.token = 5};
    td_ship_send_commit(r->from, key, &(td_commit){.n_first = 1, .first = &first}, end);
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
        if (f)
            x.frames = f->frames, x.bytes = f->bytes, x.transfer_us = f->transfer_us,
            x.exposed_us = td_now_us() - end;
        if (e) td_ship_event_free(e);
        if (f) td_ship_event_free(f);
        if (!e && !f) td_loop_wait(&loop, 1000);
    }
    x.wall_us = td_now_us() - t;
    T_OK(sent && landed, "it did not land");
    td_buf_deinit(&b);
    return x;
}

static double cpu_ms(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec) * 1e3 +
           (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e3;
}

static int up(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

typedef struct series {
    double v[MAX_ROUNDS], min, median;
} series;

static void close_series(series *s, int n)
{
    qsort(s->v, (size_t)n, sizeof *s->v, up);
    s->min = s->v[0];
    s->median = n % 2 ? s->v[n / 2] : (s->v[n / 2 - 1] + s->v[n / 2]) / 2;
}

enum {
    RAW_US,
    PLACED_US,
    SHIP_US,
    RATIO,
    PLACED_RATIO,
    RAW_CPU,
    PLACED_CPU,
    SHIP_CPU,
    EXPOSED,
    TRANSFER,
    N_SERIES
};
static series of[N_SERIES];

/* Each number once of all rounds' middle and once of the best round: on a busy machine the best says more. */
static void print(const char *shape, int rounds, const shipment *x)
{
    double bytes = (double)x->bytes;
    for (int i = 0; i < N_SERIES; i++) close_series(&of[i], rounds);
    printf("{\"shape\":\"%s\",\"transport\":\"%s\",\"rounds\":%d,\"bytes\":%.0f,\"frames\":%llu,\"raw_mb_s\":"
           "%.0f,\"placed_mb_s\":%.0f,"
           "\"ship_mb_s\":%.0f,\"ratio\":%.3f,\"placed_ratio\":%.3f,",
           shape, tcp ? "tcp" : "ipc", rounds, bytes, (unsigned long long)x->frames,
           bytes / of[RAW_US].median, bytes / of[PLACED_US].median, bytes / of[SHIP_US].median,
           of[RATIO].median, of[PLACED_RATIO].median);
    printf("\"raw_best_mb_s\":%.0f,\"placed_best_mb_s\":%.0f,\"ship_best_mb_s\":%.0f,\"best_ratio\":%.3f,"
           "\"placed_best_ratio\":%.3f,",
           bytes / of[RAW_US].min, bytes / of[PLACED_US].min, bytes / of[SHIP_US].min,
           of[RAW_US].min / of[SHIP_US].min, of[PLACED_US].min / of[SHIP_US].min);
    printf("\"raw_cpu_ms\":%.1f,\"placed_cpu_ms\":%.1f,\"ship_cpu_ms\":%.1f,\"raw_least_cpu_ms\":%.1f,"
           "\"placed_least_cpu_ms\":%.1f,"
           "\"ship_least_cpu_ms\":%.1f,",
           of[RAW_CPU].median, of[PLACED_CPU].median, of[SHIP_CPU].median, of[RAW_CPU].min,
           of[PLACED_CPU].min, of[SHIP_CPU].min);
    printf("\"paced_ms\":%.1f,\"exposed_ms\":%.2f,\"least_exposed_ms\":%.2f,\"exposed_of_shipping\":%.4f,"
           "\"exposed_of_transfer\":%.4f}\n",
           of[TRANSFER].median / 1e3, of[EXPOSED].median / 1e3, of[EXPOSED].min / 1e3,
           of[EXPOSED].median / of[SHIP_US].median, of[EXPOSED].median / of[TRANSFER].median);
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
    raw_open();
    shipment x = ship(&r, 0); /* warm */
    uint64_t wrong = 0;
    for (int k = 0; k < DSTS; k++) wrong += grid_wrong(&r.dst[k], &d, 0, n, 0x55);
    T_EQ(wrong, 0);
    TD_CHECK(d.n_groups == 1); /* what is sent as it lies is one group's */
    uint8_t *const to[DSTS] = {r.dst[0].kv[0].base, r.dst[1].kv[0].base};
    for (int i = 0; i < rounds && !t_failed; i++) {
        double c0 = cpu_ms();
        of[RAW_US].v[i] = (double)raw(x.bytes / DSTS, (uint32_t)(x.bytes / x.frames), r.src.kv[0].base, NULL);
        double c1 = cpu_ms();
        of[PLACED_US].v[i] =
            (double)raw(x.bytes / DSTS, (uint32_t)(x.bytes / x.frames), r.src.kv[0].base, to);
        double c2 = cpu_ms();
        x = ship(&r, 0);
        of[SHIP_US].v[i] = (double)x.wall_us;
        of[SHIP_CPU].v[i] = cpu_ms() - c2;
        of[PLACED_CPU].v[i] = c2 - c1;
        of[RAW_CPU].v[i] = c1 - c0;
        of[RATIO].v[i] = of[RAW_US].v[i] / of[SHIP_US].v[i];
        of[PLACED_RATIO].v[i] = of[PLACED_US].v[i] / of[SHIP_US].v[i];
        x = ship(&r, PACE * x.wall_us);
        of[EXPOSED].v[i] = (double)x.exposed_us;
        of[TRANSFER].v[i] = (double)x.transfer_us;
    }
    if (argc > 1 && !t_failed) print(shape, rounds, &x);
    raw_close();
    ships_close(&r);
    td_zctx_close(zs);
    for (int k = 0; k < DSTS; k++) td_zctx_close(zd[k]);
    return argc > 1 ? t_failed != 0 : T_DONE();
}
