// SPDX-License-Identifier: Apache-2.0
/* common/arena.c - chunks double from 4 KiB to 1 MiB; an object larger than a chunk gets one of its own. */
#include "common/arena.h"
#include <stdlib.h>
#include <string.h>

enum { FIRST_CHUNK = 4096, LAST_CHUNK = 1 << 20 };

typedef struct td_arena_chunk {
    struct td_arena_chunk *older;
    size_t used, size;
    _Alignas(16) unsigned char data[];
} chunk;

void td_arena_init(td_arena *a, size_t max_bytes)
{
    *a = (td_arena){.max = max_bytes};
}

void td_arena_deinit(td_arena *a)
{
    for (chunk *c = a->chunk, *older; c; c = older) {
        older = c->older;
        free(c);
    }
    *a = (td_arena){.max = a->max};
}

static chunk *add_chunk(td_arena *a, size_t bytes)
{
    size_t size = a->chunk ? a->chunk->size * 2 : FIRST_CHUNK - sizeof(chunk);
    if (size > LAST_CHUNK - sizeof(chunk)) size = LAST_CHUNK - sizeof(chunk);
    if (size < bytes) size = bytes;
    chunk *c = malloc(sizeof(chunk) + size);
    if (!c) return NULL;
    *c = (chunk){.older = a->chunk, .size = size};
    a->chunk = c;
    return c;
}

void *td_arena_alloc(td_arena *a, size_t bytes)
{
    if (bytes > a->max || a->used > a->max - bytes) return NULL;
    size_t rounded = (bytes + 15) & ~(size_t)15;
    if (rounded < bytes) return NULL;
    if (!rounded) rounded = 16;
    chunk *c = a->chunk;
    if (!c || c->size - c->used < rounded) c = add_chunk(a, rounded);
    if (!c) return NULL;
    void *p = c->data + c->used;
    c->used += rounded;
    a->used += rounded;
    return memset(p, 0, rounded);
}

void *td_arena_copy(td_arena *a, const void *p, size_t bytes)
{
    void *q = td_arena_alloc(a, bytes);
    if (q && bytes) memcpy(q, p, bytes);
    return q;
}

char *td_arena_strndup(td_arena *a, const char *s, size_t n)
{
    if (n == (size_t)-1) return NULL;
    char *q = td_arena_alloc(a, n + 1);
    if (q && n) memcpy(q, s, n);
    return q;
}
