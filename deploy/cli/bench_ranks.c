// SPDX-License-Identifier: Apache-2.0
#include "deploy/cli/bench_ranks.h"
#include "common/check.h"
#include "kernels/cuda.h"
#include "worker/profile.h"
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { MEASURE = 'm', STREAM_PASSES = 5, STREAM_MEGABYTES = 1024 };

/* ---- every rank ---- */

static double processor_s(void)
{
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

static td_status measure(const td_boot *b, int n_ranks, bench_figures *f)
{
    double v, m;
    if (b->dev) {
        TD_TRY(td_cuda_probe(b->dev, &v, &m));
        f->read_s = TD_MAX(f->read_s, v);
        f->multiply_s = TD_MAX(f->multiply_s, m);
        return TD_OK;
    }
    TD_TRY(td_profile_read(b->pool, NULL, ((size_t)STREAM_MEGABYTES << 20) / (size_t)n_ranks, STREAM_PASSES, &v));
    f->read_s = TD_MAX(f->read_s, v);
    v = td_profile_multiply(b->pool, NULL, b->ops);
    f->multiply_s = TD_MAX(f->multiply_s, v);
    return TD_OK;
}

static void look(const td_boot *b, int rank, bench_figures *f)
{
    td_shard_stats s = td_model_shard_stats(b->model);
    f->rank = rank;
    f->threads = td_pool_size(b->pool);
    f->row_bytes = (double)td_model_weight_bytes(b->model);
    f->resident = (double)td_model_resident_bytes(b->model);
    f->unit = (double)td_model_unit_bytes(b->model);
    f->cpu_s = processor_s();
    f->gather_alone_s = (double)s.alone_us * 1e-6;
    f->gather_waited_s = (double)s.waited_us * 1e-6;
}

/* ---- ranks other than 0 ---- */

typedef struct other {
    td_rank_self *self;
    bench_figures figures;
} other;

static td_status on_command(void *arg, const void *p, size_t n)
{
    other *o = arg;
    if (n != 1 || *(const char *)p != MEASURE) return td_fail(TD_EPROTO, "a command of %zu bytes", n);
    return measure(&o->self->boot, td_coll_size(o->self->ranks->world), &o->figures);
}

static size_t on_poll(void *arg, void *out, size_t cap)
{
    other *o = arg;
    TD_CHECK(cap >= sizeof o->figures);
    look(&o->self->boot, o->self->ranks->grid.rank, &o->figures);
    memcpy(out, &o->figures, sizeof o->figures);
    return sizeof o->figures;
}

static td_status opened(void *arg, td_rank_self *self, td_exec_opts *x)
{
    other *o = arg;
    o->self = self;
    x->on_command = on_command;
    x->on_poll = on_poll;
    return TD_OK;
}

td_status bench_ranks_serve(bench_ranks *r, const td_conf *c)
{
    other o = {0};
    td_rank_hooks h = {opened, NULL, &o};
    return td_rank_serve(c, &r->ranks, &h);
}

/* ---- rank 0 ---- */

td_status bench_ranks_open(bench_ranks *r, const td_conf *c, int *argc, char ***argv)
{
    td_grid g = td_rank_grid(c);
    r->n = td_grid_ranks(&g);
    r->many = r->n > 1;
    r->of = td_xalloc((size_t)r->n * sizeof *r->of);
    return r->many ? td_rank_open(c, argc, argv, &r->ranks) : td_rank_alone(c);
}

void bench_ranks_close(bench_ranks *r)
{
    if (r->many) td_rank_close(&r->ranks);
    free(r->of);
}

static td_status take(void *arg, const void *p, size_t n)
{
    bench_ranks *r = arg;
    bench_figures f;
    TD_CHECK(n == sizeof f);
    memcpy(&f, p, sizeof f);
    TD_CHECK(f.rank > 0 && f.rank < r->n);
    r->of[f.rank] = f;
    return TD_OK;
}

td_status bench_ranks_look(bench_ranks *r)
{
    if (r->many) TD_TRY(td_engine_poll(r->engine, take, r));
    look(r->boot, 0, &r->of[0]);
    return TD_OK;
}

td_status bench_ranks_measure(bench_ranks *r)
{
    char what = MEASURE;
    if (r->many) TD_TRY(td_engine_command(r->engine, &what, 1));
    TD_TRY(measure(r->boot, r->n, &r->of[0]));
    return bench_ranks_look(r);
}

void bench_ranks_json(const bench_ranks *r, td_buf *o)
{
    td_grid one = {.tp = 1, .pp = 1, .cp = 1, .dp = 1};
    const td_grid *g = r->many ? &r->ranks.grid : &one;
    td_buf_fmt(o, ",\"ranks\":%d,\"shape\":{\"tp\":%d,\"pp\":%d,\"cp\":%d,\"dp\":%d,\"ep\":%s,\"fsdp\":%s},\"of_rank\":[", r->n, g->tp,
               g->pp, g->cp, g->dp, g->ep ? "true" : "false", g->fsdp ? "true" : "false");
    for (int i = 0; i < r->n; i++) {
        const bench_figures *f = &r->of[i];
        td_buf_fmt(o, "%s{\"threads\":%d,\"weights_mb\":%.3f,\"unit_mb\":%.3f}", i ? "," : "", f->threads, f->resident * 1e-6,
                   f->unit * 1e-6);
    }
    td_buf_str(o, "]");
}
