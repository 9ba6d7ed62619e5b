// SPDX-License-Identifier: Apache-2.0
/* worker/model/huge.c - PAGEMAP_SCAN is described in Documentation/admin-guide/mm/pagemap.rst of Linux; its structures are here
 * because the headers of older systems lack them. */
#include "worker/model/huge.h"
#include "common/check.h"
#include <fcntl.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

enum { IS_HUGE = 1 << 6, MAX_SHARE = 4, N_REGIONS = 256 };

typedef struct region { uint64_t start, end, categories; } region;
typedef struct scan_arg {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, any_of, returned;
} scan_arg;
_Static_assert(sizeof(scan_arg) == 96 && sizeof(region) == 24, "the kernel's");
#define SCAN _IOWR('f', 16, scan_arg)

static uint64_t up(uint64_t a)
{
    return (a + TD_HUGE_BYTES - 1) / TD_HUGE_BYTES * TD_HUGE_BYTES;
}

typedef bool extent_fn(void *arg, uint8_t *at, size_t bytes);

/* Runs of extents that are not mapped by one entry each, in ascending order, until fn says false. False: not known. */
static bool each_missing(const void *map, size_t bytes, extent_fn *fn, void *arg)
{
    region r[N_REGIONS];
    uint64_t at = up((uint64_t)(uintptr_t)map), end = ((uint64_t)(uintptr_t)map + bytes) / TD_HUGE_BYTES * TD_HUGE_BYTES;
    int fd = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC), n = 0;
    if (fd < 0) return false;
    for (bool more = true; more && at < end;) {
        scan_arg a = {.size = sizeof a, .start = at, .end = end, .vec = (uint64_t)(uintptr_t)r, .vec_len = N_REGIONS,
                      .inverted = IS_HUGE, .mask = IS_HUGE, .returned = IS_HUGE};
        n = ioctl(fd, SCAN, &a);
        if (n < 0 || a.walk_end <= at) break;
        uint64_t done = at; /* of two regions in one extent, the first takes it */
        for (int i = 0; i < n && more; i++) {
            uint64_t from = TD_MAX(r[i].start / TD_HUGE_BYTES * TD_HUGE_BYTES, done);
            done = TD_MIN(up(r[i].end), end);
            if (from < done) more = fn(arg, (uint8_t *)(uintptr_t)from, (size_t)(done - from));
        }
        at = TD_MAX(up(a.walk_end), done);
    }
    close(fd);
    return n >= 0;
}

static bool add(void *arg, uint8_t *at, size_t bytes)
{
    (void)at;
    *(size_t *)arg += bytes;
    return true;
}

bool td_huge_missing(const void *map, size_t bytes, size_t *missing)
{
    *missing = 0;
    return each_missing(map, bytes, add, missing);
}

/* ---- copies ---- */
typedef struct copy_job { const uint8_t *from; uint8_t *to; } copy_job;

static void copy_one(void *arg, int i, int member)
{
    const copy_job *j = arg;
    (void)member;
    memcpy(j->to + (size_t)i * TD_HUGE_BYTES, j->from + (size_t)i * TD_HUGE_BYTES, TD_HUGE_BYTES);
}

typedef struct repair { td_pool *pool; size_t copied; } repair;

/* One run: a copy in large pages, moved over the old mapping in one step. */
static bool replace(void *arg, uint8_t *at, size_t bytes)
{
    repair *r = arg;
    size_t room = bytes + TD_HUGE_BYTES, small;
    uint8_t *p = mmap(NULL, room, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) return false;
    uint8_t *to = (uint8_t *)(uintptr_t)up((uint64_t)(uintptr_t)p);
    (void)madvise(to, bytes, MADV_HUGEPAGE);
    td_pool_for(r->pool, (int)(bytes / TD_HUGE_BYTES), copy_one, &(copy_job){at, to});
    bool good = td_huge_missing(to, bytes, &small) && !small && !mprotect(to, bytes, PROT_READ) &&
                mremap(to, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, at) == at;
    if (good) r->copied += bytes;
    (void)munmap(p, (size_t)(to - p));
    (void)munmap(good ? to + bytes : to, good ? room - bytes - (size_t)(to - p) : room - (size_t)(to - p));
    return good;
}

static size_t memory_available(void)
{
    char line[128];
    unsigned long long kib = 0;
    FILE *f = fopen("/proc/meminfo", "re");
    while (f && fgets(line, sizeof line, f) && sscanf(line, "MemAvailable: %llu kB", &kib) != 1) {}
    if (f) fclose(f);
    return (size_t)kib * 1024;
}

size_t td_huge_repair(td_pool *pool, void *map, size_t bytes, size_t available)
{
    size_t missing;
    repair r = {.pool = pool};
    if (!td_huge_missing(map, bytes, &missing) || !missing || missing > bytes / MAX_SHARE) return 0;
    if (!available) available = memory_available();
    if (missing > available / 2) return 0;
    (void)each_missing(map, bytes, replace, &r);
    return r.copied;
}
