// SPDX-License-Identifier: Apache-2.0
/* tests/coll/fake_cuda.c - a libcuda.so.1 with one device whose memory is the host's, for fake_nccl.c. A
 * stream says once that it is not ready; an event that was not recorded may not be waited for. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WANT(e)                                                                                              \
    ((e) ? (void)0 : (fprintf(stderr, "fake cuda: not true: %s (line %d)\n", #e, __LINE__), abort()))
static _Thread_local int current, asked;

int cuInit(unsigned flags)
{
    return (int)flags;
}

int cuDeviceGetCount(int *n)
{
    *n = 1;
    return 0;
}

int cuDeviceGet(int *device, int i)
{
    *device = i;
    return i ? 101 : 0;
}

int cuDevicePrimaryCtxRetain(void **out, int device)
{
    static int context;
    *out = &context;
    return device;
}

int cuCtxSetCurrent(void *c)
{
    current = c != NULL;
    return 0;
}

int cuStreamCreate(void **out, unsigned flags)
{
    WANT(current && flags == 1);
    *out = malloc(1);
    return 0;
}

int cuStreamDestroy_v2(void *s)
{
    free(s);
    return 0;
}

int cuStreamQuery(void *s)
{
    WANT(s);
    return ++asked % 2 ? 600 : 0;
}

int cuEventCreate(void **out, unsigned flags)
{
    WANT(current && flags == 2);
    *out = calloc(1, sizeof(int));
    return 0;
}

int cuEventDestroy_v2(void *e)
{
    free(e);
    return 0;
}

int cuEventRecord(void *e, void *s)
{
    WANT(s);
    ++*(int *)e;
    return 0;
}

int cuStreamWaitEvent(void *s, void *e, unsigned flags)
{
    WANT(s && *(int *)e > 0 && flags == 0);
    return 0;
}

int cuMemAlloc_v2(unsigned long long *out, size_t n)
{
    WANT(current);
    *out = (unsigned long long)calloc(1, n);
    return 0;
}

int cuMemFree_v2(unsigned long long p)
{
    free((void *)p);
    return 0;
}

int cuMemcpyAsync(unsigned long long to, unsigned long long from, size_t n, void *s)
{
    WANT(s);
    memcpy((void *)to, (void *)from, n);
    return 0;
}

/* What tests/gpu/nccl_ranks.c uses beyond the back end. */

int cuStreamSynchronize(void *s)
{
    WANT(s);
    return 0;
}

int cuMemHostAlloc(void **out, size_t n, unsigned flags)
{
    WANT(current && flags == 3);
    *out = malloc(n);
    return 0;
}

int cuMemFreeHost(void *p)
{
    free(p);
    return 0;
}

int cuMemcpyHtoD_v2(unsigned long long to, const void *from, size_t n)
{
    memcpy((void *)to, from, n);
    return 0;
}

int cuMemcpyDtoH_v2(void *to, unsigned long long from, size_t n)
{
    memcpy(to, (void *)from, n);
    return 0;
}
