// SPDX-License-Identifier: Apache-2.0
/* kernels/dev_cuda.cu - a CUDA device as a td_dev: the runtime's memory, streams and events. */
#include "kernels/cuda.h"
#include "kernels/dev.h"
#include "kernels/td_cuda.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct td_event {
    cudaEvent_t e;
};

static td_status check(cudaError_t e, const char *what)
{
    if (e == cudaSuccess) return TD_OK;
    return td_fail(TD_EDEVICE, "CUDA: %s: %s", what, cudaGetErrorString(e));
}

/* The runtime's current device is each thread's own, device 0 at first: a stream of another one would refuse the
 * launch, an allocation would go to the wrong memory, and any first call of a thread, a wait or a free too, would make
 * a context on device 0, of half a GiB, for each rank. An error shows in the call that follows. */
extern "C" void td_cuda_use(const td_dev *d)
{
    (void)cudaSetDevice(d->index);
}

static cudaStream_t stream_of(td_dev *d, td_stream_kind s)
{
    td_cuda_use(d);
    return (cudaStream_t)d->stream[s];
}

static td_status dev_alloc(td_dev *d, size_t bytes, void **out)
{
    void *p = NULL;
    td_cuda_use(d);
    cudaError_t e = cudaMalloc(&p, bytes ? bytes : 1);
    if (e == cudaSuccess) {
        *out = p;
        return TD_OK;
    }
    cudaGetLastError(); /* not sticky: the caller may try less */
    size_t left = 0, total = 0;
    cudaMemGetInfo(&left, &total);
    return td_fail(TD_EFULL, "device cuda:%d: %zu bytes wanted, %zu of %zu free", d->index, bytes, left,
                   total);
}

static void dev_free(td_dev *d, void *p)
{
    td_cuda_use(d);
    cudaFree(p);
}

static td_status dev_alloc_host(td_dev *d, size_t bytes, void **out)
{
    void *p = NULL;
    td_cuda_use(d);
    td_status s = check(cudaMallocHost(&p, bytes ? bytes : 1), "page-locked memory");
    if (s == TD_OK) *out = p;
    return s;
}

static void dev_free_host(td_dev *d, void *p)
{
    td_cuda_use(d);
    cudaFreeHost(p);
}

static td_status dev_free_bytes(td_dev *d, size_t *out)
{
    size_t left = 0, total = 0;
    td_cuda_use(d);
    td_status s = check(cudaMemGetInfo(&left, &total), "free memory");
    if (s == TD_OK) *out = left;
    return s;
}

static td_status dev_upload(td_dev *d, td_stream_kind s, void *dst, const void *src, size_t bytes)
{
    return check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyHostToDevice, stream_of(d, s)), "upload");
}

static td_status dev_download(td_dev *d, td_stream_kind s, void *dst, const void *src, size_t bytes)
{
    return check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToHost, stream_of(d, s)), "download");
}

static td_status dev_copy(td_dev *d, td_stream_kind s, void *dst, const void *src, size_t bytes)
{
    return check(cudaMemcpyAsync(dst, src, bytes, cudaMemcpyDeviceToDevice, stream_of(d, s)), "copy");
}

static td_status dev_fill(td_dev *d, td_stream_kind s, void *dst, int byte, size_t bytes)
{
    return check(cudaMemsetAsync(dst, byte, bytes, stream_of(d, s)), "fill");
}

static td_status dev_event_open(td_dev *d, td_event **out)
{
    td_cuda_use(d);
    td_event *e = (td_event *)malloc(sizeof *e);
    if (!e) return td_fail(TD_EFULL, "out of memory for an event");
    td_status s = check(cudaEventCreate(&e->e), "event");
    if (s == TD_OK)
        *out = e;
    else
        free(e);
    return s;
}

static void dev_event_close(td_dev *d, td_event *e)
{
    if (!e) return;
    td_cuda_use(d);
    cudaEventDestroy(e->e);
    free(e);
}

static td_status dev_record(td_dev *d, td_stream_kind s, td_event *e)
{
    return check(cudaEventRecord(e->e, stream_of(d, s)), "event");
}

static td_status dev_wait(td_dev *d, td_stream_kind s, td_event *e)
{
    return check(cudaStreamWaitEvent(stream_of(d, s), e->e, 0), "wait for an event");
}

static td_status dev_elapsed(td_dev *d, td_event *from, td_event *to, double *us)
{
    td_cuda_use(d);
    float ms = 0;
    td_status s = check(cudaEventElapsedTime(&ms, from->e, to->e), "time between events");
    if (s == TD_OK) *us = (double)ms * 1e3;
    return s;
}

static td_status dev_await(td_dev *d, td_event *e)
{
    td_cuda_use(d);
    return check(cudaEventSynchronize(e->e), "kernel");
}

static td_status dev_sync(td_dev *d, td_stream_kind s)
{
    return check(cudaStreamSynchronize(stream_of(d, s)), "kernel");
}

static td_status dev_pack(td_dev *d, td_stream_kind s, const td_kv_rows *r, void *payload)
{
    return check((cudaError_t)td_cuda_kv_gather(stream_of(d, s), r, payload), "packing pages");
}

static td_status dev_unpack(td_dev *d, td_stream_kind s, const td_kv_rows *r, const void *payload)
{
    return check((cudaError_t)td_cuda_kv_scatter(stream_of(d, s), r, payload), "unpacking pages");
}

/* ---- what is queued, to be run again ---- */

struct td_graph {
    cudaGraphExec_t exec;
    cudaStream_t ran_on;
};

static td_status dev_capture_begin(td_dev *d, td_stream_kind s)
{
    return check(cudaStreamBeginCapture(stream_of(d, s), cudaStreamCaptureModeThreadLocal), "capture");
}

/* Ready: its launches are on the device before the first run. */
static td_status instantiate(td_dev *d, td_stream_kind s, cudaGraph_t from, td_graph *g)
{
    td_status st = check(cudaGraphInstantiate(&g->exec, from, 0), "graph");
    if (st == TD_OK) st = check(cudaGraphUpload(g->exec, stream_of(d, s)), "graph");
    if (st != TD_OK && g->exec) cudaGraphExecDestroy(g->exec);
    return st;
}

static td_status dev_capture_end(td_dev *d, td_stream_kind s, td_graph **out)
{
    cudaGraph_t from = NULL;
    td_status st = check(cudaStreamEndCapture(stream_of(d, s), &from), "capture");
    td_graph *g = (td_graph *)calloc(1, sizeof *g);
    if (st == TD_OK) st = g ? instantiate(d, s, from, g) : td_fail(TD_EFULL, "out of memory for a graph");
    if (from) cudaGraphDestroy(from);
    if (st == TD_OK)
        *out = g;
    else
        free(g);
    cudaGetLastError(); /* a lost capture is not the device's end */
    return st;
}

static td_status dev_graph_run(td_dev *d, td_stream_kind s, td_graph *g)
{
    g->ran_on = stream_of(d, s);
    return check(cudaGraphLaunch(g->exec, g->ran_on), "graph");
}

static void dev_graph_close(td_dev *d, td_graph *g)
{
    if (!g) return;
    td_cuda_use(d);
    if (g->ran_on) cudaStreamSynchronize(g->ran_on);
    cudaGraphExecDestroy(g->exec);
    free(g);
}

static void dev_close(td_dev *d)
{
    td_cuda_use(d);
    for (int i = 0; i < TD_N_STREAMS; i++)
        if (d->stream[i]) cudaStreamDestroy((cudaStream_t)d->stream[i]);
    free(d);
}

static void fill_table(td_dev *d)
{
    d->kind = "cuda";
    d->alloc = dev_alloc;
    d->free = dev_free;
    d->alloc_host = dev_alloc_host;
    d->free_host = dev_free_host;
    d->free_bytes = dev_free_bytes;
    d->upload = dev_upload;
    d->download = dev_download;
    d->copy = dev_copy;
    d->fill = dev_fill;
    d->event_open = dev_event_open;
    d->event_close = dev_event_close;
    d->record = dev_record;
    d->wait = dev_wait;
    d->elapsed_us = dev_elapsed;
    d->await = dev_await;
    d->sync = dev_sync;
    d->capture_begin = dev_capture_begin;
    d->capture_end = dev_capture_end;
    d->graph_run = dev_graph_run;
    d->graph_close = dev_graph_close;
    d->pack = dev_pack;
    d->unpack = dev_unpack;
    d->close = dev_close;
}

/* Prompt attention with D 256 (attn_cuda_prompt.cu): 161 of the 163 that sm_80 has. */
static const size_t SHARED_KIB = 161;

static td_status describe(td_dev *d)
{
    cudaDeviceProp p;
    td_status s = check(cudaGetDeviceProperties(&p, d->index), "device properties");
    if (s != TD_OK) return s;
    snprintf(d->name, sizeof d->name, "%.100s", p.name);
    d->arch = p.major * 10 + p.minor;
    d->n_sm = p.multiProcessorCount;
    d->total_bytes = p.totalGlobalMem;
    if (d->arch >= 90) td_overlaps = true;
    if (d->arch < 80)
        return td_fail(TD_ENOSUP, "device cuda:%d (%s, sm_%d): this build has machine code from sm_80 on",
                       d->index, d->name, d->arch);
    if (p.sharedMemPerBlockOptin < SHARED_KIB * 1024) /* sm_86, sm_89, sm_12x */
        return td_fail(
            TD_ENOSUP,
            "device cuda:%d (%s, sm_%d): a block has %zu KiB of shared memory, the kernels need %zu",
            d->index, d->name, d->arch, (size_t)p.sharedMemPerBlockOptin / 1024, SHARED_KIB);
    return TD_OK;
}

extern "C" int td_dev_count(void)
{
    int n = 0;
    bool any = cudaGetDeviceCount(&n) == cudaSuccess;
    if (!any) cudaGetLastError();
    return any ? n : 0;
}

/* "13.0" of 13000. */
static const char *version(int v, char out[24])
{
    snprintf(out, 24, "%d.%d", v / 1000, v % 1000 / 10);
    return out;
}

static td_status no_device(cudaError_t e)
{
    int driver = 0, runtime = 0;
    char d[24], r[24];
    const bool known = e == cudaErrorInsufficientDriver && cudaDriverGetVersion(&driver) == cudaSuccess &&
                       cudaRuntimeGetVersion(&runtime) == cudaSuccess;
    if (known && !driver) /* libcuda is not there: the runtime calls that too old */
        return td_refuse(TD_ENOSUP, "no CUDA device: no driver is installed (one for CUDA %s or later)", version(runtime, r));
    if (known)
        return td_refuse(TD_ENOSUP, "no CUDA device: the driver is for CUDA %s, this build needs one for %s", version(driver, d),
                         version(runtime, r));
    return td_refuse(TD_ENOSUP, "no CUDA device: %s", cudaGetErrorString(e));
}

extern "C" td_status td_dev_open_cuda(int index, td_dev **out)
{
    int n = 0;
    cudaError_t e = cudaGetDeviceCount(&n);
    if (e != cudaSuccess) return no_device(e);
    if (index < 0 || index >= n) return td_fail(TD_ENOSUP, "device cuda:%d: this machine has %d", index, n);
    td_dev *d = (td_dev *)calloc(1, sizeof *d);
    if (!d) return td_fail(TD_EFULL, "out of memory for a device");
    d->index = index;
    fill_table(d);
    td_status s = check(cudaSetDevice(index), "choice of the device");
    if (s == TD_OK) s = describe(d);
    for (int i = 0; i < TD_N_STREAMS && s == TD_OK; i++) {
        cudaStream_t st = NULL;
        s = check(cudaStreamCreateWithFlags(&st, cudaStreamNonBlocking), "stream");
        d->stream[i] = (void *)st;
    }
    if (s == TD_OK)
        *out = d;
    else
        dev_close(d);
    return s;
}
