// SPDX-License-Identifier: Apache-2.0
/* tests/gpu/nccl_ranks.c - the NCCL back end on a real device: build/release/tests/nccl_ranks, no arguments.
 *
 * With NCCL 2.30 or later it starts two ranks on device 0 (mpirun -n 2, NCCL_MULTI_RANK_GPU_ENABLE=1; older
 * ones refuse two ranks of one device), else one rank, and says so: "two ranks: not run (NCCL 2.28.9)". Each
 * rank runs the case list of tests/coll over pinned memory, which both sides address, then an all-gather in
 * device memory of 4 MiB, beside work on another stream. Ends after 120 s at the latest: what hangs is a
 * failure. Under MPS the two ranks' kernels run at once; without, the device switches between them, slowly
 * (algorithms notes 9.10). It measures nothing: one device has no link between ranks. Exit: 0 passed, 1
 * failed, 77 no NCCL or no device. */
#include "common/log.h"
#include "tests/coll/support_cases.h"
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long long address;

static struct { /* of libcuda.so.1 */
    int (*cuInit)(unsigned flags);
    int (*cuDeviceGetCount)(int *n);
    int (*cuStreamCreate)(void **out, unsigned flags);
    int (*cuStreamSynchronize)(void *stream);
    int (*cuMemHostAlloc)(void **out, size_t bytes, unsigned flags);
    int (*cuMemFreeHost)(void *p);
    int (*cuMemAlloc)(address *out, size_t bytes);
    int (*cuMemcpyHtoD)(address to, const void *from, size_t bytes);
    int (*cuMemcpyDtoH)(void *to, address from, size_t bytes);
    int (*cuDevicePrimaryCtxRetain)(void **out, int device);
    int (*cuCtxSetCurrent)(void *context);
} cu;
static void *stream;

static void must(int code, const char *what)
{
    if (code == 0) return;
    printf("%s: CUDA error %d\n", what, code);
    exit(1);
}

static int load_cuda(void)
{
    static const struct {
        const char *name;
        void *at;
    } calls[] = {
        {"cuInit", &cu.cuInit},
        {"cuDeviceGetCount", &cu.cuDeviceGetCount},
        {"cuStreamCreate", &cu.cuStreamCreate},
        {"cuStreamSynchronize", &cu.cuStreamSynchronize},
        {"cuMemHostAlloc", &cu.cuMemHostAlloc},
        {"cuMemFreeHost", &cu.cuMemFreeHost},
        {"cuMemAlloc_v2", &cu.cuMemAlloc},
        {"cuMemcpyHtoD_v2", &cu.cuMemcpyHtoD},
        {"cuMemcpyDtoH_v2", &cu.cuMemcpyDtoH},
        {"cuDevicePrimaryCtxRetain", &cu.cuDevicePrimaryCtxRetain},
        {"cuCtxSetCurrent", &cu.cuCtxSetCurrent},
    };
    void *lib = dlopen("libcuda.so.1", RTLD_NOW);
    for (size_t i = 0; lib && i < sizeof calls / sizeof *calls; i++) {
        void *symbol = dlsym(lib, calls[i].name);
        if (!symbol) return 0;
        memcpy(calls[i].at, &symbol, sizeof symbol);
    }
    int n = 0;
    return lib && cu.cuInit(0) == 0 && cu.cuDeviceGetCount(&n) == 0 ? n : 0;
}

static void *pinned_alloc(size_t bytes)
{
    void *p = NULL;
    must(cu.cuMemHostAlloc(&p, bytes, 1 | 2), "cuMemHostAlloc"); /* portable, mapped */
    return p;
}

static void pinned_free(void *p)
{
    must(cu.cuMemFreeHost(p), "cuMemFreeHost");
}

static void settle(void)
{
    must(cu.cuStreamSynchronize(stream), "cuStreamSynchronize");
}

/* In device memory: on the caller's stream, then in two slots at once. */
static void device_memory(td_coll *c, coll_tally *t)
{
    enum { BYTES = 4 << 20 };
    int me = td_coll_rank(c), n = td_coll_size(c);
    unsigned char *host = malloc((size_t)n * BYTES);
    address send = 0, recv[3] = {0};
    if (!host) abort();
    for (size_t i = 0; i < BYTES; i++) host[i] = (unsigned char)(i * 7 + (i >> 9) + (size_t)me * 31);
    must(cu.cuMemAlloc(&send, BYTES), "cuMemAlloc");
    for (int k = 0; k < 3; k++) must(cu.cuMemAlloc(&recv[k], (size_t)n * BYTES), "cuMemAlloc");
    must(cu.cuMemcpyHtoD(send, host, BYTES), "cuMemcpyHtoD");
    const void *from = (const void *)(uintptr_t)send;
    C_IS(t, td_coll_all_gather_start(c, 0, from, (void *)(uintptr_t)recv[0], BYTES), TD_OK);
    C_IS(t, td_coll_all_gather_start(c, 1, from, (void *)(uintptr_t)recv[1], BYTES), TD_OK);
    C_IS(t, td_coll_all_gather(c, from, (void *)(uintptr_t)recv[2], BYTES), TD_OK);
    C_IS(t, td_coll_all_gather_wait(c, 1), TD_OK);
    C_IS(t, td_coll_all_gather_wait(c, 0), TD_OK);
    settle();
    for (int k = 0; k < 3; k++) {
        size_t wrong = 0;
        must(cu.cuMemcpyDtoH(host, recv[k], (size_t)n * BYTES), "cuMemcpyDtoH");
        for (size_t i = 0; i < (size_t)n * BYTES; i++) {
            size_t r = i / BYTES, at = i % BYTES;
            wrong += host[i] != (unsigned char)(at * 7 + (at >> 9) + r * 31);
        }
        C_OK(t, wrong == 0);
    }
    free(host);
}

static int run_rank(td_coll *host)
{
    td_coll *c = NULL;
    coll_tally t = {0};
    void *context = NULL;
    int version = 0, rank = td_coll_rank(host), n = td_coll_size(host);
    must(cu.cuDevicePrimaryCtxRetain(&context, 0), "cuDevicePrimaryCtxRetain");
    must(cu.cuCtxSetCurrent(context), "cuCtxSetCurrent");
    must(cu.cuStreamCreate(&stream, 1), "cuStreamCreate");
    if (td_coll_nccl_open(host, 0, stream, &version, &c) < 0) {
        printf("rank %d: %s\n", rank, td_reason());
        return 1;
    }
    coll_mem = (coll_memory){pinned_alloc, pinned_free, settle};
    td_coll_deadline(c, 60000000);
    C_OK(&t, td_coll_size(c) == n && td_coll_rank(c) == rank);
    coll_cases(c, 1 << 20, &t);
    device_memory(c, &t);
    C_IS(&t, td_coll_barrier(c), TD_OK);
    td_coll_close(c);
    printf("rank %d of %d, NCCL %d: %d passed, %d failed\n", rank, n, version, t.passed, t.failed);
    return t.failed != 0;
}

int main(int argc, char **argv)
{
    int version = 0, status;
    const char *path = "";
    td_coll *host = NULL;
    td_log_open("nccl_ranks", TD_LOG_WARN);
    if (td_coll_nccl_find(&version, &path) < 0) {
        printf("SKIP: %s\n", td_reason());
        return 77;
    }
    int as_rank = argc > 1 && !strcmp(argv[1], "rank"), two = version >= 23000;
    if (!as_rank) printf("NCCL %d.%d.%d (%s)\n", version / 10000, version / 100 % 100, version % 100, path);
    if (load_cuda() < 1) {
        printf("two ranks: not run (no device)\n");
        return 77;
    }
    if (!as_rank && two) {
        setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1", 1);
        setenv("NCCL_NVLS_ENABLE", "0", 0);
        setenv("NCCL_MAX_CTAS", "2", 0);
        fflush(stdout);
        execlp("timeout", "timeout", "-k", "5", "120", "mpirun", "--allow-run-as-root", "--oversubscribe",
               "-n", "2", argv[0], "rank", (char *)NULL);
        printf("timeout and mpirun could not be started\n");
        return 1;
    }
    if (as_rank ? td_coll_mpi_open(&argc, &argv, &host) < 0 : td_coll_self_open(&host) < 0) return 1;
    alarm(120);
    status = run_rank(host);
    if (!as_rank) printf("two ranks: not run (NCCL %d.%d)\n", version / 10000, version / 100 % 100);
    td_coll_close(host);
    return status;
}
