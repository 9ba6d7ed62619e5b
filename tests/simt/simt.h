/* tests/simt/simt.h - runs CUDA C kernels on the CPU: host compiler only, one fiber per CUDA thread, blocks
 * one after another. Forced in front of every .cu file (-include) in place of the CUDA runtime;
 * kernels/td_cuda.h sees SIMT_SHIM and adds nothing.
 *
 * Model:   A fiber runs until it blocks: barrier, warp operation, exit. Static __shared__ is thread_local, so
 *          that all of it lies in one TLS block that is poisoned before every block. Device memory has its own
 *          pages, each allocation flush with an inaccessible one, contents poisoned. A fault, a deadlock, a
 *          wrong mask ends the launch with cudaErrorLaunchFailure and a text (simt_last_error in simt_c.h), not
 *          the process.
 * Rules:   1. Kernels live in the shared library of the shim, never in the test program: the program's own
 *             thread_local variables would be poisoned with the shared memory.
 *          2. SIMT_CHECK: kernel files are compiled with -fsanitize=thread, libtsan is not linked: the hooks
 *             of every access arrive in simt_rt.cpp, which itself is compiled without the flag.
 *          3. Tests compare with a tolerance where mma or __expf is involved: neither has the hardware's bits.
 * Environment: SIMT_ORDER 0/1 skewed schedules, 2 round robin, 3.. random seeds; SIMT_POISON byte;
 *          SIMT_TIMEOUT s; SIMT_EAGER=1 copies cp.async at once; SIMT_EXIT_OK=1 lets exited threads count at
 *          barriers.
 * Hopper:  simt_sm90a.h. Not emulated: clusters, memory order, streams (all synchronous).
 * tests/simt/README.md. */
// SPDX-License-Identifier: Apache-2.0
#pragma once
#ifdef __CUDACC__
#error "simt.h is the host emulation"
#endif
#define SIMT_SHIM 1
#include <cfloat>
#include <climits>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>
#if defined(__SANITIZE_ADDRESS__)
#define SIMT_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define SIMT_ASAN 1
#endif
#endif

// ---------------------------------------------------------------- qualifiers
#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __launch_bounds__(...)
#define __forceinline__ inline __attribute__((always_inline))
#define __align__(n) __attribute__((aligned(n)))
// No __noinline__ here: libstdc++ writes __attribute__((__noinline__)).
// Static __shared__: a function-local static is one object per template instantiation; blocks run one after
// another, so one copy is enough.  thread_local puts all of them (and nothing else) in .tbss, which the
// runtime can find and poison at the start of every block (g++ 12 ignores section attributes on template
// statics, so sections cannot). Under ASan plain static, because only that gets red zones.
#ifdef SIMT_ASAN
#define __shared__ static
#else
#define __shared__ static thread_local
#endif
#define TD_DYN_SMEM(T, name) T *name = reinterpret_cast<T *>(simt::dyn_smem())

// ---------------------------------------------------------------- vector types
#define SIMT_V(T, S, A)                                                                                      \
    struct __attribute__((aligned(sizeof(T)))) S##1                                                          \
    {                                                                                                        \
        T x;                                                                                                 \
    };                                                                                                       \
    struct __attribute__((aligned(2 * sizeof(T)))) S##2                                                      \
    {                                                                                                        \
        T x, y;                                                                                              \
    };                                                                                                       \
    struct S##3                                                                                              \
    {                                                                                                        \
        T x, y, z;                                                                                           \
    };                                                                                                       \
    struct __attribute__((aligned(A))) S##4                                                                  \
    {                                                                                                        \
        T x, y, z, w;                                                                                        \
    };                                                                                                       \
    inline S##2 make_##S##2(T x, T y)                                                                        \
    {                                                                                                        \
        return {x, y};                                                                                       \
    }                                                                                                        \
    inline S##3 make_##S##3(T x, T y, T z)                                                                   \
    {                                                                                                        \
        return {x, y, z};                                                                                    \
    }                                                                                                        \
    inline S##4 make_##S##4(T x, T y, T z, T w)                                                              \
    {                                                                                                        \
        return {x, y, z, w};                                                                                 \
    }
SIMT_V(signed char, char, 4)
SIMT_V(unsigned char, uchar, 4) SIMT_V(short, short, 8) SIMT_V(unsigned short, ushort, 8) SIMT_V(int, int, 16)
    SIMT_V(unsigned, uint, 16) SIMT_V(float, float, 16) SIMT_V(double, double, 16)
        SIMT_V(long long, longlong, 16) SIMT_V(unsigned long long, ulonglong, 16)
#undef SIMT_V
            struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned a = 1, unsigned b = 1, unsigned c = 1) : x(a), y(b), z(c) {}
    constexpr dim3(uint3 v) : x(v.x), y(v.y), z(v.z) {}
};
// Plain globals, not macros: cudaLaunchConfig_t has members called gridDim and blockDim.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---------------------------------------------------------------- runtime interface
namespace simt
{
enum Kind : int {
    SYNC,
    SHFL,
    BALLOT,
    MATCH,
    RADD,
    RMIN,
    RMAX,
    RAND,
    ROR,
    MMABF,
    MMAF16,
    LDM1,
    LDM2,
    LDM4,
    LDM1T,
    LDM2T,
    LDM4T,
    CALL
};
struct Fiber {
    void *sp;
    char *stack;
    void *fake;
    void *uctx;
    uint3 tid;
    unsigned idx, lane, warp;
    int alive, where; // where: 0 running/ready, 1 block barrier, 2 warp op, 3 asleep
    unsigned mask;
    int kind, line;
    const char *file;
    unsigned wep;
    int pred;
    alignas(16) uint32_t in[12];
    alignas(16) uint32_t out[4];
    int waited; // td_grid_wait has been passed
    // simt_rt.h: a warp operation's operands; what is slept on; what is known of other warps; stores before this epoch
    // are fenced for the async proxy
    void *call;
    const void *on;
    const char *what;
    uint32_t seen[32], fenced;
};
struct Options {
    int order = 0, poison = 0xFF, timeout = 20, exit_ok = 0, uninit = 1, quiet = 0, eager = 0, hide = 0;
    // the device that is emulated: how many (0: none, -1: the driver is too old), MiB of memory, compute capability
    int devices = 1, memory = 4096, arch = 80;
    int shared = 227;   // KiB of shared memory that a block can have
    int wrong = 0;      // bits: 1 mma, 2, 16 cuBLASLt (plain, codes), 4, 8 Hopper's product and attention compute wrongly
    int plant = 0;      // simt_sm90a.h: a mistake that Hopper's kernels then make
    int fail_after = 0; // that launch fails, and everything after it; 0: none
};
struct Stats {
    uint64_t launches, blocks, threads, switches, barriers, warp_ops, mma, hooks;
};
extern Fiber *cur;
extern Options opt;
extern Stats stats;
void *dyn_smem();
int block_barrier(int pred, int what, int line, const char *file); // what: 0 count 1 and 2 or
void warp_op(int kind, unsigned mask, int line, const char *file); // operands in cur->in, result in cur->out
void yield();
[[noreturn]] void fail(const char *fmt, ...) __attribute__((format(printf, 1, 2)));
const char *last_error(); // text of the last failed launch or copy, "" if none
void clear_error();
void set_static_shared(const void *fn);
void grid_wait();
void hook_atomic(const void *p, unsigned n, void *pc);
void cp_async(void *dst, const void *src, unsigned n, unsigned srcn, int line);
void cp_commit();
void cp_wait(int keep);
void acquire_all(); // CHECK mode: this block may read from here on what others have released: by a barrier, then an atomic
template <class... P> struct Thunk {
    void (*k)(P...);
    std::tuple<P...> a;
    static void run(void *s)
    {
        Thunk *t = (Thunk *)s;
        std::apply(t->k, t->a);
    }
};
template <class T> struct same {
    using type = T;
};
} // namespace simt
#define SIMT_AT int line = __builtin_LINE(), const char *file = __builtin_FILE()
#define SIMT_NOSAN __attribute__((noinline, no_sanitize("thread")))

#include "tests/simt/simt_ops.h"
#include "tests/simt/simt_types.h"
#include "tests/simt/simt_ptx.h"

// ---------------------------------------------------------------- host API
enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorMemoryAllocation = 2,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorInsufficientDriver = 35,
    cudaErrorNoDevice = 100,
    cudaErrorInvalidDevice = 101,
    cudaErrorInvalidResourceHandle = 400,
    cudaErrorNotReady = 600,
    cudaErrorLaunchFailure = 719,
    cudaErrorNotSupported = 801,
    cudaErrorStreamCaptureUnsupported = 900,
    cudaErrorStreamCaptureInvalidated = 901,
    cudaErrorStreamCaptureImplicit = 906
};
enum cudaMemcpyKind {
    cudaMemcpyHostToHost,
    cudaMemcpyHostToDevice,
    cudaMemcpyDeviceToHost,
    cudaMemcpyDeviceToDevice,
    cudaMemcpyDefault
};
enum cudaFuncAttribute {
    cudaFuncAttributeMaxDynamicSharedMemorySize = 8,
    cudaFuncAttributePreferredSharedMemoryCarveout = 9
};
enum cudaDeviceAttr {
    cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
    cudaDevAttrMaxSharedMemoryPerMultiprocessor = 81,
    cudaDevAttrMultiProcessorCount = 16,
    cudaDevAttrComputeCapabilityMajor = 75,
    cudaDevAttrComputeCapabilityMinor = 76
};
struct cudaDeviceProp {
    char name[256];
    size_t totalGlobalMem, sharedMemPerBlock, sharedMemPerBlockOptin;
    int major, minor, multiProcessorCount, warpSize, maxThreadsPerBlock;
};
struct simt_stream;
struct simt_graph;
struct simt_event {
    double t;
    int device; // that was current when it was made
};
using cudaStream_t = simt_stream *;
using cudaEvent_t = simt_event *;
using cudaGraph_t = simt_graph *;
using cudaGraphExec_t = simt_graph *;
using cudaGraphNode_t = void *;
enum cudaStreamCaptureMode { cudaStreamCaptureModeThreadLocal = 1 };
enum cudaLaunchAttributeID { cudaLaunchAttributeProgrammaticStreamSerialization = 6 };
struct cudaLaunchAttribute {
    cudaLaunchAttributeID id;
    struct {
        int programmaticStreamSerializationAllowed;
    } val;
};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};
namespace simt
{
// Runs the kernel, or takes it down where the stream is recorded.
int launch(const cudaLaunchConfig_t *c, void (*fn)(void *), void *arg, size_t argsz, const void *kernel);
} // namespace simt
// Streams are synchronous, but a recorded one takes its copies and launches down (argument bytes and all) and runs
// them at each cudaGraphLaunch. What a device refuses meanwhile is refused here: waiting, asking, allocating.
cudaError_t cudaStreamBeginCapture(cudaStream_t s, cudaStreamCaptureMode mode);
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *g);
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *e, cudaGraph_t g, unsigned long long flags);
cudaError_t cudaGraphUpload(cudaGraphExec_t e, cudaStream_t s);
cudaError_t cudaGraphLaunch(cudaGraphExec_t e, cudaStream_t s);
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t *nodes, size_t *n);
cudaError_t cudaGraphDestroy(cudaGraph_t g);
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t e);
cudaError_t simt_refused_while_recorded(const char *what); // cudaSuccess when nothing is
cudaError_t simt_malloc(void **p, size_t n);
cudaError_t cudaFree(void *p);
cudaError_t cudaMemcpy(void *d, const void *s, size_t n, cudaMemcpyKind k);
cudaError_t cudaMemset(void *d, int v, size_t n);
cudaError_t cudaGetLastError();
cudaError_t cudaPeekAtLastError();
const char *cudaGetErrorString(cudaError_t e);
cudaError_t simt_set_smem(const void *fn, int bytes);
double simt_now();
template <class T> cudaError_t cudaMalloc(T **p, size_t n)
{
    return simt_malloc((void **)p, n);
}
template <class T> cudaError_t cudaMallocHost(T **p, size_t n)
{
    if (auto e = simt_refused_while_recorded("cudaMallocHost")) return e;
    *p = (T *)malloc(n);
    return *p ? cudaSuccess : cudaErrorMemoryAllocation;
}
template <class T> cudaError_t cudaMallocAsync(T **p, size_t n, cudaStream_t)
{
    return simt_malloc((void **)p, n);
}
inline cudaError_t cudaFreeHost(void *p)
{
    free(p);
    return cudaSuccess;
}
inline cudaError_t cudaFreeAsync(void *p, cudaStream_t)
{
    return cudaFree(p);
}
cudaError_t cudaMemcpyAsync(void *d, const void *s, size_t n, cudaMemcpyKind k, cudaStream_t stream = 0);
cudaError_t cudaMemsetAsync(void *d, int v, size_t n, cudaStream_t stream = 0);
template <class T>
cudaError_t cudaMemcpyToSymbol(T &sym, const void *s, size_t n, size_t off = 0,
                               cudaMemcpyKind = cudaMemcpyHostToDevice)
{
    memcpy((char *)&sym + off, s, n);
    return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *s);
cudaError_t cudaSetDevice(int d); // each thread has its own, 0 at first
cudaError_t cudaGetDevice(int *d);
enum { cudaStreamNonBlocking = 1 };
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned)
{
    return cudaStreamCreate(s);
}
cudaError_t cudaMemGetInfo(size_t *left, size_t *total);
cudaError_t cudaStreamDestroy(cudaStream_t s);
inline cudaError_t cudaStreamSynchronize(cudaStream_t)
{
    if (auto e = simt_refused_while_recorded("cudaStreamSynchronize")) return e;
    return cudaPeekAtLastError();
}
inline cudaError_t cudaDeviceSynchronize()
{
    if (auto e = simt_refused_while_recorded("cudaDeviceSynchronize")) return e;
    return cudaPeekAtLastError();
}
inline cudaError_t cudaEventCreate(cudaEvent_t *e)
{
    int device;
    cudaGetDevice(&device);
    *e = new simt_event{0, device};
    return cudaSuccess;
}
int simt_device_of(cudaStream_t s); // of the default stream: the current one
inline cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s = 0)
{
    if (auto x = simt_refused_while_recorded("cudaEventRecord")) return x;
    if (e->device != simt_device_of(s)) return cudaErrorInvalidResourceHandle;
    e->t = simt_now();
    return cudaSuccess;
}
inline cudaError_t cudaEventSynchronize(cudaEvent_t)
{
    return cudaSuccess;
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned = 0)
{
    return cudaSuccess;
}
inline cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b)
{
    *ms = (float)((b->t - a->t) * 1e3);
    return cudaSuccess;
}
inline cudaError_t cudaEventDestroy(cudaEvent_t e)
{
    delete e;
    return cudaSuccess;
}
cudaError_t cudaGetDeviceCount(int *n);
inline cudaError_t cudaDriverGetVersion(int *v)
{
    *v = simt::opt.devices < -1 ? 0 : simt::opt.devices < 0 ? 12020 : 13000;
    return cudaSuccess;
}
inline cudaError_t cudaRuntimeGetVersion(int *v)
{
    *v = 13000;
    return cudaSuccess;
}
void simt_device_of_env();
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int)
{
    simt_device_of_env();
    *p = cudaDeviceProp{};
    strcpy(p->name, "simt host emulation");
    size_t left;
    cudaMemGetInfo(&left, &p->totalGlobalMem);
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = (size_t)simt::opt.shared * 1024;
    p->major = simt::opt.arch / 10;
    p->minor = simt::opt.arch % 10;
    p->multiProcessorCount = 4;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int *v, cudaDeviceAttr a, int)
{
    *v = a == cudaDevAttrMaxSharedMemoryPerBlockOptin       ? simt::opt.shared * 1024
         : a == cudaDevAttrMaxSharedMemoryPerMultiprocessor ? (simt::opt.shared + 1) * 1024
         : a == cudaDevAttrMultiProcessorCount              ? 4
         : a == cudaDevAttrComputeCapabilityMajor           ? simt::opt.arch / 10
                                                            : 0;
    return cudaSuccess;
}
template <class F> cudaError_t cudaFuncSetAttribute(F *f, cudaFuncAttribute a, int v)
{
    return a == cudaFuncAttributeMaxDynamicSharedMemorySize ? simt_set_smem((const void *)f, v) : cudaSuccess;
}
// The launch form both compilers take: the CUDA runtime's own C++ call, no <<<>>>.
template <class... P, class... A>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *c, void (*k)(P...), A &&...a)
{
    static_assert(sizeof...(P) == sizeof...(A), "kernel argument count");
    simt::Thunk<std::remove_cv_t<P>...> t{(void (*)(std::remove_cv_t<P>...))k,
                                          std::tuple<std::remove_cv_t<P>...>(std::forward<A>(a)...)};
    return (cudaError_t)simt::launch(c, &t.run, &t, sizeof t, (const void *)k);
}

#include "tests/simt/simt_sm90a.h"
