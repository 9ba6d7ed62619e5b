// SPDX-License-Identifier: Apache-2.0
/* tests/worker/test_results.c - results of steps in flight on a device that does nothing before somebody
 * waits for it, and then only what must be done: so what fetch waits for is seen, and what it must not wait
 * for too. And on the host. */
#include "common/check.h"
#include "tests/t.h"
#include "worker/results.h"
#include <stdlib.h>
#include <string.h>

enum { MAX_OPS = 1000, DEPTH = 3, N = 50 };

typedef struct op { /* of a stream: bytes that move, or an event to wait for, or one that is recorded */
    void *to;
    const void *from;
    size_t bytes;
    td_event *wait, *record;
    int nth; /* wait: for that record of it */
} op;
struct td_event {
    int records, done;
}; /* done: of those */
static op queue[TD_N_STREAMS][MAX_OPS];
static int n_queued[TD_N_STREAMS], n_done[TD_N_STREAMS], live;

static void run_until(td_event *e, int nth);

static void run_one(int s)
{
    op *o = &queue[s][n_done[s]++];
    if (o->wait) run_until(o->wait, o->nth);
    if (o->bytes) memmove(o->to, o->from, o->bytes);
    if (o->record) o->record->done++;
}

/* Only the stream that records it goes on, up to there. */
static void run_until(td_event *e, int nth)
{
    for (int s = 0; s < TD_N_STREAMS && e->done < nth; s++) {
        bool here = false;
        for (int i = n_done[s]; i < n_queued[s]; i++) here |= queue[s][i].record == e;
        while (here && e->done < nth && n_done[s] < n_queued[s]) run_one(s);
    }
    TD_CHECK(e->done >= nth);
}

static td_status put(td_stream_kind s, op o)
{
    TD_CHECK(n_queued[s] < MAX_OPS);
    queue[s][n_queued[s]++] = o;
    return TD_OK;
}

static td_status lazy_alloc(td_dev *d, size_t bytes, void **out)
{
    (void)d;
    *out = malloc(bytes);
    memset(*out, 0xee, bytes);
    live++;
    return TD_OK;
}
static void lazy_free(td_dev *d, void *p)
{
    (void)d;
    free(p);
    live--;
}
static td_status lazy_move(td_dev *d, td_stream_kind s, void *to, const void *from, size_t bytes)
{
    (void)d;
    return put(s, (op){.to = to, .from = from, .bytes = bytes});
}
static td_status lazy_event(td_dev *d, td_event **out)
{
    (void)d;
    *out = td_xalloc(sizeof **out);
    live++;
    return TD_OK;
}
static void lazy_event_close(td_dev *d, td_event *e)
{
    lazy_free(d, e);
}
static td_status lazy_record(td_dev *d, td_stream_kind s, td_event *e)
{
    (void)d;
    e->records++;
    return put(s, (op){.record = e});
}
static td_status lazy_wait(td_dev *d, td_stream_kind s, td_event *e)
{
    (void)d;
    return put(s, (op){.wait = e, .nth = e->records});
}
static td_status lazy_await(td_dev *d, td_event *e)
{
    (void)d;
    run_until(e, e->records);
    return TD_OK;
}
static td_status lazy_sync(td_dev *d, td_stream_kind s)
{
    (void)d;
    while (n_done[s] < n_queued[s]) run_one((int)s);
    return TD_OK;
}

static td_dev lazy = {.kind = "lazy",
                      .alloc = lazy_alloc,
                      .free = lazy_free,
                      .alloc_host = lazy_alloc,
                      .free_host = lazy_free,
                      .upload = lazy_move,
                      .download = lazy_move,
                      .copy = lazy_move,
                      .event_open = lazy_event,
                      .event_close = lazy_event_close,
                      .record = lazy_record,
                      .wait = lazy_wait,
                      .await = lazy_await,
                      .sync = lazy_sync};

static td_sample_out made[64][2 * N];

static void make(void)
{
    for (int i = 0; i < 64; i++)
        for (int k = 0; k < 2 * N; k++) made[i][k] = (td_sample_out){.token = 1000 * i + k};
}

/* What a step's kernels do. */
static void draw(td_results *r, int step, size_t n)
{
    T_EQ(td_results_room(r, n), TD_OK);
    td_sample_out *to = td_results_at(r, step % DEPTH);
    if (r->dev && n)
        lazy_move(r->dev, TD_STREAM_COMPUTE, to, made[step], n * sizeof *to);
    else if (n)
        memcpy(to, made[step], n * sizeof *to);
    T_EQ(td_results_send(r, step % DEPTH, n), TD_OK);
}

static void fetch(td_results *r, int step, size_t n)
{
    td_sample_out out[2 * N];
    T_EQ(td_results_fetch(r, step % DEPTH, n, out), TD_OK);
    T_OK(!memcmp(out, made[step], n * sizeof *out), "step %d: %d is not %d", step, out[0].token,
         made[step][0].token);
}

static void test_order(td_dev *dev)
{
    td_results r;
    T_EQ(td_results_open(dev, DEPTH, 10, &r), TD_OK);
    draw(&r, 0, 8), draw(&r, 1, 8);
    int compute = n_queued[TD_STREAM_COMPUTE];
    for (int step = 2; step < 60; step++) {
        size_t n = step == 20   ? N
                   : step == 40 ? 2 * N
                                : 8; /* twice the arrays grow, with two steps in flight */
        draw(&r, step, n);
        int before = n_queued[TD_STREAM_COMPUTE];
        fetch(&r, step - 2, step - 2 == 20 ? N : step - 2 == 40 ? 2 * N : 8);
        bool grown = step >= 20 && step <= 21 + DEPTH; /* a larger step waits for everything */
        grown = grown || (step >= 40 && step <= 41 + DEPTH);
        T_OK(!dev || grown || n_done[TD_STREAM_COMPUTE] <= compute,
             "step %d's fetch has waited for later steps", step - 2);
        compute = before;
    }
    td_results_close(&r);
}

/* A step without draws: what was queued before it is done all the same. */
static void test_nothing_drawn(void)
{
    td_results r;
    int from = 5, to = 0;
    T_EQ(td_results_open(&lazy, 2, 1, &r), TD_OK);
    lazy_move(&lazy, TD_STREAM_COMPUTE, &to, &from, sizeof to);
    T_EQ(td_results_send(&r, 0, 0), TD_OK);
    T_EQ(to, 0);
    T_EQ(td_results_fetch(&r, 0, 0, NULL), TD_OK);
    T_EQ(to, 5);
    td_results_close(&r);
    T_EQ(live, 0);
}

int main(void)
{
    make();
    test_order(NULL);
    test_order(&lazy);
    T_EQ(live, 0);
    test_nothing_drawn();
    return T_DONE();
}
