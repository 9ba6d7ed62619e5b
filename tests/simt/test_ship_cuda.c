// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_ship_cuda.c - ships whose pages are a device's, at either end and at both: every element lands in its place, frames
 * begun ahead and given up leave nothing behind, and the page-locked buffers are back when the ship is closed. */
#include "common/chan.h"
#include "common/clock.h"
#include "common/log.h"
#include "common/wire/loop.h"
#include "tests/ship/support_grid.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"
#include "worker/ship/ship.h"
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <unistd.h>

enum { N = 300, DSTS = 2, CREDITS = 8, INC = 600, PATIENCE_US = 60000000 };
static td_model_desc d;
static td_zctx *z;
static int serial;
static atomic_int locked;
static td_dev real;

static td_status my_alloc_host(td_dev *v, size_t n, void **out) { locked++; return real.alloc_host(v, n, out); }
static void my_free_host(td_dev *v, void *p) { locked--; real.free_host(v, p); }

static void guard(td_dev *v)
{
    real = *v;
    v->alloc_host = my_alloc_host, v->free_host = my_free_host;
}

typedef struct end { td_ship_grid grid; grid_rank rank[DSTS]; td_kv host[DSTS][TD_MAX_GROUPS]; td_ship *ship[DSTS]; uint32_t n; bool on_dev; } end;

/* The rank's pages, now on the device; the host's copy stays for comparing. */
static void to_device(end *e, uint32_t k)
{
    for (int g = 0; g < d.n_groups; g++) {
        e->host[k][g] = e->rank[k].kv[g];
        if (e->on_dev) e->rank[k].kv[g].base = dev_put(e->host[k][g].base, e->rank[k].bytes[g]);
    }
}

static void to_host(end *e, uint32_t k)
{
    for (int g = 0; g < d.n_groups && e->on_dev; g++) {
        T_OK(dev_get(e->host[k][g].base, e->rank[k].kv[g].base, e->rank[k].bytes[g]), "%s", simt_last_error());
        e->rank[k].kv[g].base = e->host[k][g].base;
    }
}

static void end_open(end *e, int P, uint16_t tp, bool receives, bool on_dev, int wake)
{
    *e = (end){.grid = td_ship_grid_one(&d), .n = tp, .on_dev = on_dev};
    e->grid.tp = tp;
    for (uint32_t k = 0; k < e->n; k++) {
        char b[100];
        snprintf(b, sizeof b, "ipc:///tmp/td-shipcuda-%d-%d", (int)getpid(), serial++);
        grid_open(&e->rank[k], &e->grid, &d, k, P, N, receives ? 0x55 : 0xAA, 3 + k);
        if (!receives) grid_tag(&e->rank[k], &d, N);
        to_device(e, k);
        td_ship_opts o = {.z = z, .desc = &d, .dev = on_dev ? dev() : NULL, .grid = &e->grid, .rank = k, .incarnation = receives ? INC : 1,
                          .bulk_bind = receives ? b : NULL, .max_keys = 4, .credits = CREDITS, .timeout_us = PATIENCE_US, .wake_fd = wake};
        for (int g = 0; g < d.n_groups; g++) o.kv[g] = &e->rank[k].kv[g];
        T_OK(td_ship_open(&o, &e->ship[k]) == TD_OK, "%s", td_reason());
    }
}

static void end_close(end *e)
{
    for (uint32_t k = 0; k < e->n; k++) {
        td_ship_close(e->ship[k]);
        if (e->on_dev) to_host(e, k);
        grid_close(&e->rank[k], &d);
    }
}

/* Until both have said their last word; false: not in time. */
static bool both(end *a, end *b, int wake, td_ship_event *sent, td_ship_event *landed)
{
    td_loop loop;
    int64_t until = td_now_us() + PATIENCE_US;
    int have = 0;
    td_loop_init(&loop);
    td_loop_add_fd(&loop, wake);
    while (have != 3 && td_now_us() < until) {
        td_wake_clear(wake);
        td_ship_flush(a->ship[0]);
        for (uint32_t k = 1; k < b->n; k++)
            for (td_ship_event *e; (e = td_ship_poll(b->ship[k])); td_ship_event_free(e)) {
                td_ship_report r;
                td_ship_event_report(e, k, &r);
                td_ship_peer(b->ship[0], &r, NULL);
            }
        td_ship_event *e = td_ship_poll(a->ship[0]), *f = td_ship_poll(b->ship[0]);
        if (e) *sent = *e, have |= 1, td_ship_event_free(e);
        if (f && f->type == TD_SHIP_RECALL) for (uint32_t k = 1; k < b->n; k++) td_ship_recv_close(b->ship[k], f->key);
        else if (f) *landed = *f, have |= 2;
        if (f) td_ship_event_free(f);
        if (!e && !f) td_loop_wait(&loop, 100000);
    }
    return have == 3;
}

static void send_layers(end *a, uint64_t key, uint32_t from, uint32_t to)
{
    for (uint32_t at = from; at < to; at += 15)
        for (int l = 0; l < d.L; l++)
            td_ship_send_layers(a->ship[0], key, l, l + 1, at, TD_MIN(at + 15, to), (const int32_t *const *)a->rank[0].pages, a->rank[0].n_pages);
}

static bool received(td_ship *s)
{
    td_ship_stats st;
    td_ship_stats_get(s, &st);
    return st.frames_received > 0;
}

/* give_up: one frame is sent, others are begun and have no credit, when it is cancelled. */
static void test_way(bool from_dev, bool to_dev, uint16_t tp, bool give_up)
{
    end a, b;
    td_buf ranks;
    td_ship_event sent = {0}, landed = {0};
    const char *ends[DSTS];
    int wake = td_wake_open(), before = locked;
    end_open(&a, 16, 1, false, from_dev, wake);
    end_open(&b, 8, tp, true, to_dev, wake);
    for (uint32_t k = 0; k < b.n; k++) ends[k] = td_ship_endpoint(b.ship[k]);
    td_buf_init(&ranks, 0);
    T_EQ(td_ship_ranks(&b.grid, ends, &ranks), TD_OK);
    for (uint32_t k = 0; k < b.n; k++)
        td_ship_recv_open(b.ship[k], 5, 0, N, 1, (const int32_t *const *)b.rank[k].pages, b.rank[k].n_pages);
    td_msg_sink sink = {.endpoint = ends[0], .epoch = 5, .incarnation = INC, .credits = give_up ? 1 : CREDITS, .ranks = ranks.p, .ranks_bytes = (uint32_t)ranks.len};
    td_first first = {.token = 5};
    td_ship_send_open(a.ship[0], 5, &sink, N);
    send_layers(&a, 5, 0, give_up ? N / 2 : N);
    while (give_up && !received(b.ship[0])) (void)poll(NULL, 0, 1);
    if (give_up) td_ship_send_cancel(a.ship[0], 5, 1, "given up");
    else td_ship_send_commit(a.ship[0], 5, &(td_commit){.n_first = 1, .first = &first}, td_now_us());
    T_OK(both(&a, &b, wake, &sent, &landed), "no end");
    if (give_up) T_OK(!sent.ok && landed.type == TD_SHIP_LOST);
    else T_OK(sent.ok && landed.type == TD_SHIP_LANDED && landed.frames > 2 * CREDITS, "%s %s, %u frames", sent.reason, landed.reason, landed.frames);
    for (uint32_t k = 0; k < b.n; k++) {
        to_host(&b, k);
        b.on_dev = b.on_dev && k + 1 < b.n;
        if (!give_up) T_EQ(grid_wrong(&b.rank[k], &d, 0, N, 0x55), 0);
    }
    b.on_dev = false;
    end_close(&b);
    end_close(&a);
    T_EQ(locked, before);
    td_buf_deinit(&ranks);
    dev_done();
    close(wake);
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    (void)simt_set_option("hide", 1);
    kv_desc(&d, 4, 2, 64, 70, 2);
    guard(dev());
    z = td_zctx_open();
    test_way(true, false, 2, false);
    test_way(false, true, 1, false);
    test_way(true, true, 1, false);
    test_way(true, true, 1, true);
    td_zctx_close(z);
    *dev() = real;
    td_dev_close(dev());
    return T_DONE();
}
