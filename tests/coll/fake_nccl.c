// SPDX-License-Identifier: Apache-2.0
/* tests/coll/fake_nccl.c - a libnccl.so.2 for machines without a device: ranks are threads, "device" memory
 * is the host's, and every call is done when it returns. It checks what the real library would trip over:
 * groups, types, streams, ranks. Built as a shared library of its own; FAKE_VERSION tells it apart. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define WANT(e)                                                                                              \
    ((e) ? (void)0 : (fprintf(stderr, "fake nccl: not true: %s (line %d)\n", #e, __LINE__), abort()))
enum { OK = 0, UINT8 = 1, MAX = 16, OPS = 64 };

typedef struct message {
    struct message *next;
    size_t n;
    char data[];
} message;
typedef struct shared {
    int size;
    message *first[MAX][MAX];
} shared;
typedef struct comm {
    shared *s;
    int rank;
} comm;
typedef struct id {
    char bytes[128];
} id;
typedef struct op {
    const void *from;
    void *to;
    size_t n;
    int peer;
    comm *c;
} op;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static shared *opened[MAX];
static int n_opened;
static _Thread_local int in_group, n_ops;
static _Thread_local op ops[OPS];

static void put(comm *c, int to, const void *from, size_t n)
{
    message *m = malloc(sizeof *m + n);
    m->next = NULL;
    m->n = n;
    memcpy(m->data, from, n);
    pthread_mutex_lock(&lock);
    message **at = &c->s->first[c->rank][to];
    while (*at) at = &(*at)->next;
    *at = m;
    pthread_cond_broadcast(&changed);
    pthread_mutex_unlock(&lock);
}

static void get(comm *c, int from, void *to, size_t n)
{
    pthread_mutex_lock(&lock);
    while (!c->s->first[from][c->rank]) pthread_cond_wait(&changed, &lock);
    message *m = c->s->first[from][c->rank];
    c->s->first[from][c->rank] = m->next;
    pthread_mutex_unlock(&lock);
    WANT(m->n == n);
    memcpy(to, m->data, n);
    free(m);
}

static void gather(comm *c, const void *from, void *to, size_t n)
{
    for (int r = 0; r < c->s->size; r++)
        if (r != c->rank) put(c, r, from, n);
    memmove((char *)to + (size_t)c->rank * n, from, n);
    for (int r = 0; r < c->s->size; r++)
        if (r != c->rank) get(c, r, (char *)to + (size_t)r * n, n);
}

int ncclGetVersion(int *version)
{
    *version = FAKE_VERSION;
    return OK;
}

const char *ncclGetErrorString(int error)
{
    return error ? "a fake error" : "no error";
}

int ncclGetUniqueId(id *out)
{
    pthread_mutex_lock(&lock);
    WANT(n_opened < MAX);
    memset(out, 0x5A, sizeof *out);
    opened[n_opened] = calloc(1, sizeof(shared));
    memcpy(out->bytes, &n_opened, sizeof n_opened);
    n_opened++;
    pthread_mutex_unlock(&lock);
    return OK;
}

static comm *comm_of(shared *s, int rank, int size)
{
    comm *c = calloc(1, sizeof *c);
    c->s = s;
    c->rank = rank;
    pthread_mutex_lock(&lock);
    s->size = size;
    pthread_mutex_unlock(&lock);
    return c;
}

int ncclCommInitRank(comm **out, int n, id i, int rank)
{
    int which;
    memcpy(&which, i.bytes, sizeof which);
    WANT(n >= 1 && n <= MAX && rank >= 0 && rank < n && which >= 0 && which < n_opened &&
         i.bytes[127] == 0x5A);
    *out = comm_of(opened[which], rank, n);
    return OK;
}

int ncclCommSplit(comm *c, int color, int key, comm **out, void *config)
{
    WANT(!config && !in_group && (color >= 0 || color == -1));
    struct {
        int color, key;
        shared *s;
    } mine = {color, key, calloc(1, sizeof(shared))}, all[MAX];
    gather(c, &mine, all, sizeof mine);
    int size = 0, rank = 0, first = c->rank;
    for (int r = 0; r < c->s->size; r++) {
        if (all[r].color != color) continue;
        size++;
        rank += all[r].key < key || (all[r].key == key && r < c->rank);
        if (r < first) first = r;
    }
    *out = color < 0 ? NULL : comm_of(all[first].s, rank, size);
    if (color < 0 || first != c->rank) free(mine.s);
    return OK;
}

int ncclCommDestroy(comm *c)
{
    free(c);
    return OK;
}

int ncclCommAbort(comm *c)
{
    free(c);
    return OK;
}

int ncclCommGetAsyncError(comm *c, int *error)
{
    *error = c ? OK : 1;
    return OK;
}

int ncclCommCount(comm *c, int *n)
{
    *n = c->s->size;
    return OK;
}

int ncclCommUserRank(comm *c, int *rank)
{
    *rank = c->rank;
    return OK;
}

int ncclGroupStart(void)
{
    in_group++;
    return OK;
}

static void add(op o, int type, void *stream)
{
    WANT(in_group == 1 && n_ops < OPS && type == UINT8 && stream && o.n > 0);
    WANT(o.peer >= 0 && o.peer < o.c->s->size && o.peer != o.c->rank);
    ops[n_ops++] = o;
}

int ncclSend(const void *from, size_t n, int type, int peer, comm *c, void *stream)
{
    add((op){.from = from, .n = n, .peer = peer, .c = c}, type, stream);
    return OK;
}

int ncclRecv(void *to, size_t n, int type, int peer, comm *c, void *stream)
{
    add((op){.to = to, .n = n, .peer = peer, .c = c}, type, stream);
    return OK;
}

int ncclGroupEnd(void)
{
    WANT(in_group == 1);
    in_group = 0;
    for (int i = 0; i < n_ops; i++)
        if (ops[i].from) put(ops[i].c, ops[i].peer, ops[i].from, ops[i].n);
    for (int i = 0; i < n_ops; i++)
        if (ops[i].to) get(ops[i].c, ops[i].peer, ops[i].to, ops[i].n);
    n_ops = 0;
    return OK;
}

int ncclAllGather(const void *from, void *to, size_t n, int type, comm *c, void *stream)
{
    WANT(!in_group && type == UINT8 && stream && n > 0);
    gather(c, from, to, n);
    return OK;
}
