// SPDX-License-Identifier: Apache-2.0
/* tests/gpu/bench_step.c - a whole generating step on a device: the server's forward pass on random weights of a
 * shape, B sequences at a context, queued launch by launch and replayed. One JSON object a line, as bench_cuda's:
 *   {"case":"step 8b x1 @1024 replayed", "us":median, "gb_s":.., "tflop_s":.., "share":of reading, "goal":0.85}
 *   {"between":"steps of 8b x1", "us":mean, "goal_us_at_most":10}: the device has nothing to do
 * Draws are not part of it. usage: bench_step [shape [context [batch ..]]]; BENCH_CACHE: a directory for the packed
 * weights, so that the three ways to run a step make them once. BENCH_TINY: sizes that the shim can do. */
#include "kernels/cuda.h"
#include "tests/simt/support.h"
#include "tests/worker/support_step.h"
#include <unistd.h>

#ifdef BENCH_TINY
enum { P = 16, MAX_BATCH = 64, SAMPLES = 1, WARM = 2, READ_BYTES = 1 << 16, READS = 1, SAMPLE_US = 1 };
#define BENCH_SHAPE "ranks-tiny"
static const int usual[] = {1, 2};
static int context = 20;
#else
enum { P = 16, MAX_BATCH = 64, SAMPLES = 9, WARM = 4, READ_BYTES = 1 << 30, READS = 20, SAMPLE_US = 20000 };
#define BENCH_SHAPE "8b"
static const int usual[] = {1, 8, 64};
static int context = 1024;
#endif

static const td_ops *cuda;
static const char *shape = BENCH_SHAPE;
static double read_s; /* bytes a second */

typedef struct run {
    td_model *m;
    ts_kv kv;
    td_step *step;
    float *logits;
} run;

static void must(td_status s)
{
    if (s >= 0) return;
    printf("{\"error\":\"%s\"}\n", td_reason());
    exit(1);
}

static int ascending(const void *a, const void *b)
{
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

static double between_us(td_event *from, td_event *to)
{
    double us = 0;
    must(dev()->sync(dev(), TD_STREAM_COMPUTE));
    must(dev()->elapsed_us(dev(), from, to, &us));
    return us;
}

static void measure_read(void)
{
    td_event *from, *to;
    char *p = dev_new(READ_BYTES);
    unsigned *out = dev_new(4);
    double us[READS];
    must(dev()->fill(dev(), TD_STREAM_COMPUTE, p, 1, READ_BYTES));
    must(dev()->event_open(dev(), &from));
    must(dev()->event_open(dev(), &to));
    for (int i = 0; i < READS; i++) {
        dev()->record(dev(), TD_STREAM_COMPUTE, from);
        if (td_cuda_read(dev()->stream[TD_STREAM_COMPUTE], p, READ_BYTES, out)) exit(1);
        dev()->record(dev(), TD_STREAM_COMPUTE, to);
        us[i] = between_us(from, to);
    }
    qsort(us, READS, sizeof *us, ascending);
    read_s = READ_BYTES / us[READS / 2] * 1e6;
    dev_done();
    dev()->event_close(dev(), from);
    dev()->event_close(dev(), to);
}

static td_model *open_model(const td_ops *ops)
{
    td_model *m = NULL;
    static td_pool *pool;
    if (!pool) pool = td_pool_open((int)TD_MIN(sysconf(_SC_NPROCESSORS_ONLN), 16l));
    td_model_opts o = {.dummy_shape = shape, .ops = ops, .pool = pool, .cache_dir = getenv("BENCH_CACHE")};
    o.max_rows = o.max_logits = MAX_BATCH;
    must(td_model_open(&o, &m));
    return m;
}

static run run_open(td_model *m, int batch)
{
    run r = {.m = m};
    const td_model_desc *d = td_model_descr(m);
    int32_t ids[MAX_BATCH];
    ts_seq q[MAX_BATCH];
    r.kv = (ts_kv){.pages_per_seq = context / P + 1, .n_groups = d->n_groups};
    for (int g = 0; g < d->n_groups; g++) {
        td_kv *kv = &r.kv.kv[g];
        *kv = (td_kv){NULL, cuda->kv_dtype, r.kv.pages_per_seq * batch + 3, P, d->group[g].G, d->group[g].D};
        size_t bytes = td_kv_page_bytes(kv) * (size_t)kv->n_pages * (size_t)d->group[g].n_slots;
        kv->base = dev_new(bytes);
        must(dev()->fill(dev(), TD_STREAM_COMPUTE, kv->base, 0, bytes));
    }
    for (int i = 0; i < batch; i++) {
        ids[i] = i + 5;
        q[i] = (ts_seq){i, context, 1, &ids[i]};
    }
    r.step = ts_step(&r.kv, d, q, batch, false);
    r.logits = dev_new((size_t)MAX_BATCH * (size_t)d->V * sizeof *r.logits);
    return r;
}

/* Microseconds a step. */
static double sample(run *r, int n, td_event *from, td_event *to)
{
    dev()->record(dev(), TD_STREAM_COMPUTE, from);
    for (int i = 0; i < n; i++) {
        must(td_model_forward(r->m, r->step, r->kv.kv, r->logits, NULL, NULL));
        td_model_record(r->m);
    }
    dev()->record(dev(), TD_STREAM_COMPUTE, to);
    return between_us(from, to) / n;
}

static void bench(td_model *m, int batch, const char *how)
{
    run r = run_open(m, batch);
    const td_model_desc *d = td_model_descr(m);
    td_event *from, *to;
    double us[SAMPLES];
    must(dev()->event_open(dev(), &from));
    must(dev()->event_open(dev(), &to));
    double once = sample(&r, WARM, from, to);
    once = sample(&r, WARM, from, to);
    td_model_idle a = td_model_idle_time(m);
    for (int i = 0; i < SAMPLES; i++) us[i] = sample(&r, (int)TD_MIN(SAMPLE_US / once + 2, 200.0), from, to);
    td_model_idle b = td_model_idle_time(m);
    must(td_cuda_ops_status());
    qsort(us, SAMPLES, sizeof *us, ascending);
    double t = us[SAMPLES / 2] * 1e-6, kv = 0;
    for (int l = 0; l < d->L; l++) kv += 2.0 * d->G * d->D * 2 * batch * (context + 1);
    double bytes = (double)td_model_weight_bytes(m) + kv, ops = 2.0 * batch * (double)td_model_weight_bytes(m) / 2;
    printf("{\"case\":\"step %s x%d @%d %s\",\"us\":%.1f,", shape, batch, context, how, t * 1e6);
    printf("\"gb_s\":%.1f,\"tflop_s\":%.2f,\"share\":%.3f", bytes / t * 1e-9, ops / t * 1e-12, bytes / t / read_s);
    if (!strcmp(how, "replayed")) printf(",\"goal\":%.2f", batch <= 8 ? 0.85 : 0.80);
    printf("}\n");
    if (b.steps > a.steps)
        printf("{\"between\":\"steps of %s x%d\",\"us\":%.1f,\"goal_us_at_most\":10}\n", shape, batch,
               (b.us - a.us) / (double)(b.steps - a.steps));
    fflush(stdout);
    free(r.step);
    dev()->event_close(dev(), from);
    dev()->event_close(dev(), to);
    dev_done();
}

int main(int argc, char **argv)
{
    int n = argc > 3 ? argc - 3 : (int)TD_COUNT(usual);
    if (argc > 1) shape = argv[1];
    if (argc > 2) context = atoi(argv[2]);
    measure_read();
    must(td_cuda_ops_open(dev(), &cuda));
    for (int way = 0; way < 3; way++) {
        static const char *const how[] = {"replayed", "queued", "apart"};
        td_cuda_ops_steps(way == 0, way < 2); /* from here on: neither comes back */
        td_model *m = open_model(cuda);
        for (int i = 0; i < n; i++) {
            int batch = argc > 3 ? atoi(argv[3 + i]) : usual[i];
            if (batch < 1 || batch > MAX_BATCH) return 1;
            bench(m, batch, how[way]);
        }
        td_model_close(m);
    }
    td_cuda_ops_close();
    td_dev_close(dev());
    (void)t_passed, (void)t_failed;
    return 0;
}
