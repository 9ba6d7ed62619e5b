// SPDX-License-Identifier: Apache-2.0
/* tests/worker/test_huge.c - a file whose pages were cached one by one in places: the same bytes, in large pages. */
#include "tests/t.h"
#include "worker/model/huge.h"
#include <fcntl.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

enum { N = 32, BYTES = N * TD_HUGE_BYTES, HEAD = 4096, ALL = HEAD + BYTES + 4096, GIB = 1 << 30 };

static uint8_t *content;

/* In the page cache, all of it; the extents in `small` by pages of 4 KiB. */
static int cached(const char *path, unsigned small)
{
    int fd = open(path, O_RDWR | O_CREAT | O_TRUNC, 0600);
    T_OK(fd >= 0 && !unlink(path) && !posix_fallocate(fd, 0, ALL) && write(fd, content, ALL) == ALL && !fsync(fd));
    T_OK(!posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED) && !posix_fadvise(fd, 0, 0, POSIX_FADV_RANDOM));
    char byte;
    for (int e = 0; e < N; e++)
        for (off_t at = 0; small >> e & 1 && at < TD_HUGE_BYTES; at += 4096)
            T_OK(pread(fd, &byte, 1, (off_t)e * TD_HUGE_BYTES + at) == 1);
    return fd;
}

static void *map_at_2mib(int fd)
{
    uint8_t *room = mmap(NULL, ALL + TD_HUGE_BYTES, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint8_t *at = (uint8_t *)(((uintptr_t)room + TD_HUGE_BYTES - 1) / TD_HUGE_BYTES * TD_HUGE_BYTES);
    uint8_t *map = mmap(at, ALL, PROT_READ, MAP_SHARED | MAP_FIXED, fd, 0);
    T_OK(map == at && !madvise(map, ALL, MADV_HUGEPAGE));
    (void)madvise(map, ALL, 22 /* MADV_POPULATE_READ */);
    return map;
}

int main(void)
{
    char path[64];
    snprintf(path, sizeof path, "td-huge-%d", (int)getpid());
    content = malloc(ALL);
    for (size_t i = 0; i < ALL; i++) content[i] = (uint8_t)((i * 2654435761u >> 13) + i / TD_HUGE_BYTES);
    td_pool *pool = td_pool_open(2);
    int repaired = 0, left = 0;
    /* none; one, two apart, two in a row; over a quarter. The kernel may give small pages to neighbours too. */
    static const unsigned small[] = {0, 1u << 5, 1u << 2 | 1u << 20, 3u << 13, 0x3fffff};
    for (size_t c = 0; c < sizeof small / sizeof small[0]; c++) {
        int fd = cached(path, small[c]);
        uint8_t *map = map_at_2mib(fd);
        size_t before, after;
        bool known = td_huge_missing(map, ALL, &before);
        size_t want = before <= ALL / 4 ? before : 0;
        if (known) {
            T_OK(before >= (size_t)__builtin_popcount(small[c]) * TD_HUGE_BYTES && !(before % TD_HUGE_BYTES));
            if (want) T_EQ(td_huge_repair(pool, map, ALL, want * 2 - 1), 0); /* not at the cost of the last memory */
            T_OK(td_huge_missing(map, ALL, &after) && after == before);
            T_EQ(td_huge_repair(pool, map, ALL, GIB), want);
            T_OK(td_huge_missing(map, ALL, &after) && after == before - want);
            repaired += want > 0;
            left += before > want;
        } else T_EQ(td_huge_repair(pool, map, ALL, GIB), 0);
        T_OK(!memcmp(map, content, ALL), "case %zu: the bytes", c);
        munmap(map, ALL);
        close(fd);
    }
    if (!repaired || !left) printf("SKIP a repair, or a file with too many small pages: the file's system or the kernel has no such here\n");
    td_pool_close(pool);
    free(content);
    return T_DONE();
}
