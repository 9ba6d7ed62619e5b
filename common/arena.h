/* common/arena.h - bump allocator: many small objects of one lifetime, freed by one call.
 *
 * Rules:   1. Returned memory is zeroed and 16-byte aligned.
 *          2. At `max` bytes alloc returns NULL (a limit, not an accident: callers answer EFULL).
 * Threads: one owner at a time; may be handed to another thread as a whole. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_ARENA_H
#define TD_COMMON_ARENA_H

#include <stddef.h>

typedef struct td_arena {
    struct td_arena_chunk *chunk; /* newest first */
    size_t used, max;             /* bytes handed out; limit */
} td_arena;

void td_arena_init(td_arena *a, size_t max_bytes);
void td_arena_deinit(td_arena *a);
void *td_arena_alloc(td_arena *a, size_t bytes);
void *td_arena_copy(td_arena *a, const void *p, size_t bytes);
char *td_arena_strndup(td_arena *a, const char *s, size_t n);

#endif
