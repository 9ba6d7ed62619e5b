// SPDX-License-Identifier: Apache-2.0
/* worker/coll/coll_nccl.c - device memory over NCCL; the only file that knows it. Both libraries are opened
 * at run time, so that one binary runs with and without them: libnccl, the newest of those found, and libcuda
 * (the driver, which is there where a device is). What is used of them is declared here; these interfaces
 * have not changed since NCCL 2.18 and CUDA 11.
 *
 * Calls enqueue and return. Lane 0 works on the caller's stream. A slot works on a stream of the group's own:
 * it begins when what the caller's stream holds at start is done (event `ready`), and wait makes the caller's
 * stream wait for its end (event `done`): the host waits for neither. NCCL runs the operations of one
 * communicator in the order of their calls, whatever their streams; operations that shall overlap others want
 * a group of their own.
 *
 * Only barrier waits for the device, so only there a deadline ends anything: the communicator is then
 * aborted, which also ends what hangs on the device. Elsewhere whoever waits for the stream calls
 * td_coll_abort. */
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "worker/coll/coll_int.h"
#include <dlfcn.h>
#include <glob.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

/* ---- what is used of nccl.h and cuda.h ---- */

enum { NCCL_SUCCESS = 0, NCCL_IN_PROGRESS = 7, NCCL_UINT8 = 1, NCCL_NO_COLOR = -1 };
enum { CU_SUCCESS = 0, CU_NOT_READY = 600, CU_STREAM_NON_BLOCKING = 1, CU_EVENT_NO_TIMING = 2 };

typedef struct nccl_id {
    char bytes[128];
} nccl_id;
typedef struct nccl_comm *nccl_comm;
typedef void *cu_stream, *cu_event, *cu_context;
typedef unsigned long long cu_address;

#define NCCL_CALLS(X)                                                                                        \
    X(int, ncclGetVersion, (int *version))                                                                   \
    X(int, ncclGetUniqueId, (nccl_id * id))                                                                  \
    X(int, ncclCommInitRank, (nccl_comm * out, int n, nccl_id id, int rank))                                 \
    X(int, ncclCommSplit, (nccl_comm c, int color, int key, nccl_comm *out, void *config))                   \
    X(int, ncclCommDestroy, (nccl_comm c))                                                                   \
    X(int, ncclCommAbort, (nccl_comm c))                                                                     \
    X(int, ncclCommGetAsyncError, (nccl_comm c, int *error))                                                 \
    X(int, ncclCommCount, (nccl_comm c, int *n))                                                             \
    X(int, ncclCommUserRank, (nccl_comm c, int *rank))                                                       \
    X(int, ncclGroupStart, (void))                                                                           \
    X(int, ncclGroupEnd, (void))                                                                             \
    X(int, ncclSend, (const void *from, size_t n, int type, int peer, nccl_comm c, cu_stream s))             \
    X(int, ncclRecv, (void *to, size_t n, int type, int peer, nccl_comm c, cu_stream s))                     \
    X(int, ncclAllGather, (const void *from, void *to, size_t n, int type, nccl_comm c, cu_stream s))        \
    X(const char *, ncclGetErrorString, (int error))

#define CUDA_CALLS(X)                                                                                        \
    X(int, cuInit, (unsigned flags))                                                                         \
    X(int, cuDeviceGetCount, (int *n))                                                                       \
    X(int, cuDeviceGet, (int *device, int i))                                                                \
    X(int, cuDevicePrimaryCtxRetain, (cu_context * out, int device))                                         \
    X(int, cuCtxSetCurrent, (cu_context c))                                                                  \
    X(int, cuStreamCreate, (cu_stream * out, unsigned flags))                                                \
    X(int, cuStreamDestroy_v2, (cu_stream s))                                                                \
    X(int, cuStreamQuery, (cu_stream s))                                                                     \
    X(int, cuStreamWaitEvent, (cu_stream s, cu_event e, unsigned flags))                                     \
    X(int, cuEventCreate, (cu_event * out, unsigned flags))                                                  \
    X(int, cuEventDestroy_v2, (cu_event e))                                                                  \
    X(int, cuEventRecord, (cu_event e, cu_stream s))                                                         \
    X(int, cuMemAlloc_v2, (cu_address * out, size_t n))                                                      \
    X(int, cuMemFree_v2, (cu_address p))                                                                     \
    X(int, cuMemcpyAsync, (cu_address to, cu_address from, size_t n, cu_stream s))

#define X(type, name, args) static type(*name) args;
NCCL_CALLS(X)
CUDA_CALLS(X)
#undef X

typedef struct call {
    const char *name;
    void *at; /* address of the pointer above */
} call;
#define X(type, name, args) {#name, &name},
static const call nccl_calls[] = {NCCL_CALLS(X)}, cuda_calls[] = {CUDA_CALLS(X)};
#undef X

/* ---- finding the libraries, once per process ---- */

static struct {
    void *nccl, *cuda;
    int version;
    char path[512], cuda_why[256];
} lib;
static pthread_once_t once = PTHREAD_ONCE_INIT;

static const char *const looked_for[] = {
    "libnccl.so.2", /* what the loader knows, LD_LIBRARY_PATH included */
    "/usr/local/cuda*/lib*/libnccl.so.2",
    "/usr/lib/*-linux-gnu/libnccl.so.2",
    "/usr/lib64/libnccl.so.2",
    "$VIRTUAL_ENV/lib/python3*/site-packages/nvidia/nccl/lib/libnccl.so.2",
    "$HOME/.local/lib/python3*/site-packages/nvidia/nccl/lib/libnccl.so.2",
    "/usr/local/lib/python3*/*-packages/nvidia/nccl/lib/libnccl.so.2",
    "/usr/lib/python3*/*-packages/nvidia/nccl/lib/libnccl.so.2",
};

/* Keeps it if it is newer than what is kept. */
static void try_nccl(const char *path)
{
    void *h = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!h) return;
    int (*get_version)(int *) = NULL, version = 0;
    void *symbol = dlsym(h, "ncclGetVersion");
    memcpy(&get_version, &symbol, sizeof symbol);
    if (!get_version || get_version(&version) != NCCL_SUCCESS || version <= lib.version) {
        dlclose(h);
        return;
    }
    if (lib.nccl) dlclose(lib.nccl);
    lib.nccl = h;
    lib.version = version;
    snprintf(lib.path, sizeof lib.path, "%s", path);
}

static void try_pattern(const char *pattern)
{
    char text[512];
    const char *value = "", *rest = pattern;
    if (*pattern == '$') {
        char name[32];
        rest = strchr(pattern, '/');
        snprintf(name, sizeof name, "%.*s", (int)(rest - pattern - 1), pattern + 1);
        value = getenv(name);
        if (!value || !*value) return;
    }
    if ((size_t)snprintf(text, sizeof text, "%s%s", value, rest) >= sizeof text) return;
    if (!strchr(text, '/')) {
        try_nccl(text);
        return;
    }
    glob_t found;
    if (glob(text, 0, NULL, &found) == 0)
        for (size_t i = 0; i < found.gl_pathc && i < 64; i++) try_nccl(found.gl_pathv[i]);
    globfree(&found);
}

/* The name of the first call that is missing, or NULL. */
static const char *bind_calls(void *h, const call *list, size_t n)
{
    for (size_t i = 0; i < n; i++) {
        void *symbol = dlsym(h, list[i].name);
        if (!symbol) return list[i].name;
        memcpy(list[i].at, &symbol, sizeof symbol);
    }
    return NULL;
}

static void load_cuda(void)
{
    lib.cuda = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (!lib.cuda) {
        snprintf(lib.cuda_why, sizeof lib.cuda_why, "no device driver (libcuda.so.1)");
        return;
    }
    const char *missing = bind_calls(lib.cuda, cuda_calls, TD_COUNT(cuda_calls));
    if (missing) snprintf(lib.cuda_why, sizeof lib.cuda_why, "libcuda.so.1 has no %s", missing);
}

static void load(void)
{
    for (size_t i = 0; i < TD_COUNT(looked_for); i++) try_pattern(looked_for[i]);
    if (!lib.nccl) return;
    const char *missing = bind_calls(lib.nccl, nccl_calls, TD_COUNT(nccl_calls));
    if (missing) {
        TD_WARN("NCCL %d has no %s: not used", lib.version, missing);
        dlclose(lib.nccl);
        lib.nccl = NULL;
        return;
    }
    load_cuda();
}

td_status td_coll_nccl_find(int *version, const char **path)
{
    pthread_once(&once, load);
    if (!lib.nccl)
        return td_refuse(TD_ENOSUP,
                         "no NCCL: libnccl.so.2 (2.18 or later) is neither known to the loader nor "
                         "in /usr/local/cuda, /usr/lib or a Python package nvidia/nccl/lib");
    if (version) *version = lib.version;
    if (path) *path = lib.path;
    return TD_OK;
}

/* ---- groups ---- */

typedef struct world {
    int users;
    td_status broken;
    char why[256];
    cu_address token; /* 1 + TD_COLL_MAX_RANKS bytes on the device, for barriers */
} world;

typedef struct end {
    td_coll base;
    world *w;
    nccl_comm comm;
    cu_stream stream, side;
    cu_event ready, done[TD_COLL_LANES];
} end;

static td_status world_health(world *w)
{
    return w->broken == TD_OK ? TD_OK : td_refuse(w->broken, "the group is broken: %s", w->why);
}

/* The first cause stays. Aborting ends what hangs on the device, for this rank; the peers see it as an error
 * or by their own deadlines. */
static td_status end_break(end *e, td_status s, const char *why)
{
    TD_TRY(world_health(e->w));
    snprintf(e->w->why, sizeof e->w->why, "%s", why);
    e->w->broken = s;
    if (e->comm) ncclCommAbort(e->comm);
    e->comm = NULL;
    return td_fail(s, "%s", why);
}

static td_status nccl_check(end *e, const char *what, int code)
{
    if (code == NCCL_SUCCESS) return TD_OK;
    char why[256];
    snprintf(why, sizeof why, "%s: %.180s", what, ncclGetErrorString(code));
    return end_break(e, TD_EDEVICE, why);
}

static td_status cuda_check(end *e, const char *what, int code)
{
    if (code == CU_SUCCESS) return TD_OK;
    char why[80];
    snprintf(why, sizeof why, "%.50s: CUDA error %d", what, code);
    return end_break(e, TD_EDEVICE, why);
}

static td_status health(td_coll *c)
{
    return world_health(((end *)c)->w);
}

static void end_abort(td_coll *c, const char *why)
{
    char text[200];
    snprintf(text, sizeof text, "aborted by rank %d: %.150s", c->rank, why);
    end_break((end *)c, TD_EGONE, text);
}

/* ---- moving ---- */

static td_status lane_enter(end *e, int lane, cu_stream *s)
{
    *s = lane ? e->side : e->stream;
    if (!lane) return TD_OK;
    TD_TRY(cuda_check(e, "cuEventRecord", cuEventRecord(e->ready, e->stream)));
    return cuda_check(e, "cuStreamWaitEvent", cuStreamWaitEvent(e->side, e->ready, 0));
}

static td_status lane_leave(end *e, int lane)
{
    return lane ? cuda_check(e, "cuEventRecord", cuEventRecord(e->done[lane], e->side)) : TD_OK;
}

static td_status end_start(td_coll *c, int lane)
{
    end *e = (end *)c;
    const td_coll_lane *l = &c->lane[lane];
    cu_stream s;
    TD_TRY(lane_enter(e, lane, &s));
    TD_TRY(nccl_check(e, "ncclGroupStart", ncclGroupStart()));
    int code = NCCL_SUCCESS;
    for (int i = 0; i < l->n_send && code == NCCL_SUCCESS; i++)
        code = ncclSend(l->send[i].from, l->send[i].bytes, NCCL_UINT8, l->send[i].peer, e->comm, s);
    for (int i = 0; i < l->n_recv && code == NCCL_SUCCESS; i++)
        code = ncclRecv(l->recv[i].to, l->recv[i].bytes, NCCL_UINT8, l->recv[i].peer, e->comm, s);
    int ended = ncclGroupEnd();
    TD_TRY(nccl_check(e, "ncclSend and ncclRecv", code));
    TD_TRY(nccl_check(e, "ncclGroupEnd", ended));
    return lane_leave(e, lane);
}

static td_status end_all_gather(td_coll *c, int lane, const void *send, void *recv, size_t bytes)
{
    end *e = (end *)c;
    cu_stream s;
    TD_TRY(lane_enter(e, lane, &s));
    if (bytes)
        TD_TRY(nccl_check(e, "ncclAllGather", ncclAllGather(send, recv, bytes, NCCL_UINT8, e->comm, s)));
    return lane_leave(e, lane);
}

static td_status end_wait(td_coll *c, int lane)
{
    end *e = (end *)c;
    TD_TRY(health(c));
    if (!lane) return TD_OK;
    return cuda_check(e, "cuStreamWaitEvent", cuStreamWaitEvent(e->stream, e->done[lane], 0));
}

static td_status end_copy(td_coll *c, void *to, const void *from, size_t bytes)
{
    end *e = (end *)c;
    int code = cuMemcpyAsync((cu_address)(uintptr_t)to, (cu_address)(uintptr_t)from, bytes, e->stream);
    return cuda_check(e, "cuMemcpyAsync", code);
}

/* The stream is looked at for 50 us, then every 50 us. */
static td_status end_barrier(td_coll *c)
{
    end *e = (end *)c;
    void *token = (void *)(uintptr_t)e->w->token;
    int code = ncclAllGather(token, (char *)token + 1, 1, NCCL_UINT8, e->comm, e->stream);
    TD_TRY(nccl_check(e, "ncclAllGather", code));
    int64_t start = td_spin_us();
    while ((code = cuStreamQuery(e->stream)) == CU_NOT_READY) {
        int error = NCCL_SUCCESS;
        TD_TRY(nccl_check(e, "ncclCommGetAsyncError", ncclCommGetAsyncError(e->comm, &error)));
        if (error != NCCL_IN_PROGRESS) TD_TRY(nccl_check(e, "NCCL", error));
        int64_t waited = td_spin_us() - start;
        if (c->timeout_us && waited > c->timeout_us)
            return end_break(e, TD_ETIME, "a peer did not come to the barrier within the deadline");
        struct timespec nap = {0, TD_COLL_SPIN_US * 1000};
        if (waited > TD_COLL_SPIN_US) nanosleep(&nap, NULL);
    }
    return cuda_check(e, "cuStreamQuery", code);
}

/* ---- opening, splitting, closing ---- */

static td_status end_split(td_coll *c, int color, int key, td_coll **out);

static void end_close(td_coll *c)
{
    end *e = (end *)c;
    if (e->comm && e->w->broken == TD_OK)
        ncclCommDestroy(e->comm);
    else if (e->comm)
        ncclCommAbort(e->comm);
    for (int i = 1; i < TD_COLL_LANES; i++)
        if (e->done[i]) cuEventDestroy_v2(e->done[i]);
    if (e->ready) cuEventDestroy_v2(e->ready);
    if (e->side) cuStreamDestroy_v2(e->side);
    if (--e->w->users == 0) {
        if (e->w->token) cuMemFree_v2(e->w->token);
        free(e->w);
    }
    td_coll_deinit(c);
    free(e);
}

static const td_coll_ops nccl_ops = {
    .name = "nccl",
    .start = end_start,
    .wait = end_wait,
    .health = health,
    .copy = end_copy,
    .split = end_split,
    .close = end_close,
    .abort = end_abort,
    .barrier = end_barrier,
    .all_gather = end_all_gather,
};

static td_status end_open(world *w, nccl_comm comm, cu_stream stream, int rank, int size, td_coll **out)
{
    end *e = td_xalloc(sizeof *e);
    td_coll_init(&e->base, &nccl_ops, rank, size);
    e->w = w;
    e->comm = comm;
    e->stream = stream;
    w->users++;
    td_status s = cuda_check(e, "cuStreamCreate", cuStreamCreate(&e->side, CU_STREAM_NON_BLOCKING));
    if (s == TD_OK) s = cuda_check(e, "cuEventCreate", cuEventCreate(&e->ready, CU_EVENT_NO_TIMING));
    for (int i = 1; i < TD_COLL_LANES && s == TD_OK; i++)
        s = cuda_check(e, "cuEventCreate", cuEventCreate(&e->done[i], CU_EVENT_NO_TIMING));
    if (s == TD_OK && !w->token)
        s = cuda_check(e, "cuMemAlloc", cuMemAlloc_v2(&w->token, 1 + TD_COLL_MAX_RANKS));
    if (s < 0)
        end_close(&e->base);
    else
        *out = &e->base;
    return s;
}

static td_status end_split(td_coll *c, int color, int key, td_coll **out)
{
    end *e = (end *)c;
    nccl_comm comm = NULL;
    int code = ncclCommSplit(e->comm, color < 0 ? NCCL_NO_COLOR : color, key, &comm, NULL);
    TD_TRY(nccl_check(e, "ncclCommSplit", code));
    if (!comm) return TD_OK;
    int rank = 0, size = 1;
    TD_TRY(nccl_check(e, "ncclCommUserRank", ncclCommUserRank(comm, &rank)));
    TD_TRY(nccl_check(e, "ncclCommCount", ncclCommCount(comm, &size)));
    return end_open(e->w, comm, e->stream, rank, size, out);
}

/* The calling thread works on this device from now on, in the context it shares with the CUDA runtime. */
static td_status use_device(int device)
{
    if (*lib.cuda_why) return td_fail(TD_ENOSUP, "NCCL %d found, but %s", lib.version, lib.cuda_why);
    int n = 0, handle = 0, code = cuInit(0);
    cu_context context = NULL;
    if (code == CU_SUCCESS) code = cuDeviceGetCount(&n);
    if (code != CU_SUCCESS || n < 1)
        return td_fail(TD_ENOSUP, "NCCL %d found, but no device (CUDA error %d)", lib.version, code);
    if (device < 0 || device >= n) return td_fail(TD_ENOSUP, "no device %d: this machine has %d", device, n);
    code = cuDeviceGet(&handle, device);
    if (code == CU_SUCCESS) code = cuDevicePrimaryCtxRetain(&context, handle);
    if (code == CU_SUCCESS) code = cuCtxSetCurrent(context);
    return code == CU_SUCCESS ? TD_OK : td_fail(TD_EDEVICE, "device %d: CUDA error %d", device, code);
}

/* All ranks go on, or none: one that stays away would leave the others hanging in NCCL. */
static td_status agree(td_coll *host, td_status mine, int version)
{
    int pair[2] = {(int)mine, version}, n = td_coll_size(host);
    int(*all)[2] = td_xalloc((size_t)n * sizeof *all);
    td_status s = td_coll_all_gather(host, pair, all, sizeof pair);
    for (int r = 0; r < n && s == TD_OK && mine == TD_OK; r++) {
        if (all[r][0] != TD_OK)
            s = td_fail(TD_ENOSUP, "rank %d of %d cannot use NCCL", r, n);
        else if (all[r][1] != version)
            s = td_fail(TD_ENOSUP, "rank %d has NCCL %d, this rank %d", r, all[r][1], version);
    }
    free(all);
    return mine < 0 ? mine : s;
}

td_status td_coll_nccl_open(td_coll *host, int device, void *stream, int *version, td_coll **out)
{
    int found = 0;
    td_status s = td_coll_nccl_find(&found, NULL);
    if (s == TD_OK) s = use_device(device);
    TD_TRY(agree(host, s, found));
    nccl_id id = {{0}};
    int code = td_coll_rank(host) == 0 ? ncclGetUniqueId(&id) : NCCL_SUCCESS;
    s = code == NCCL_SUCCESS ? TD_OK : td_fail(TD_EDEVICE, "ncclGetUniqueId: %s", ncclGetErrorString(code));
    TD_TRY(agree(host, s, found));
    TD_TRY(td_coll_bcast(host, &id, sizeof id, 0));
    nccl_comm comm = NULL;
    code = ncclCommInitRank(&comm, td_coll_size(host), id, td_coll_rank(host));
    if (code != NCCL_SUCCESS)
        return td_fail(TD_EDEVICE, "NCCL %d: ncclCommInitRank: %s", found, ncclGetErrorString(code));
    world *w = td_xalloc(sizeof *w);
    TD_TRY(end_open(w, comm, stream, td_coll_rank(host), td_coll_size(host), out));
    if (version) *version = found;
    return TD_OK;
}
