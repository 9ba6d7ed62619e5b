/* worker/model/huge.h - large pages under a read-only mapping of a file, where the page cache has small ones.
 *
 * The kernel puts a file into its cache in the pieces that it finds free at that time; what got 4 KiB pages keeps them until it is
 * read anew, and every process that maps it pays page walks for it. Extents of 2 MiB that are wholly inside the mapping and not
 * mapped by one entry get a private copy in a large page, moved to the same address.
 *
 * Rules:   1. The bytes stay what they were at the time of the call; the file is not changed.
 *          2. At most a quarter of the mapping is copied, and not more than half of the memory that is available: if more
 *             is in small pages, the file's system has no large ones, and a copy of everything would be no cache any more.
 *          3. Best effort: without PAGEMAP_SCAN (Linux 6.7), large pages or memory nothing happens.
 * Threads: no one may read the mapping meanwhile. Large pages of x86-64 and arm64 with 4 KiB ones. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_HUGE_H
#define TD_WORKER_MODEL_HUGE_H

#include "common/pool.h"
#include <stdbool.h>
#include <stddef.h>

enum { TD_HUGE_BYTES = 2 << 20 };

/* Bytes of whole, aligned extents in [map, map + bytes) that are not mapped by one entry; false: the kernel does not tell. */
bool td_huge_missing(const void *map, size_t bytes, size_t *missing);
/* Returns the bytes that were copied. available: of memory, in bytes; 0: ask the system. */
size_t td_huge_repair(td_pool *pool, void *map, size_t bytes, size_t available);

#endif
