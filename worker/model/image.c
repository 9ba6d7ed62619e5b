// SPDX-License-Identifier: Apache-2.0
/* worker/model/image.c */
#include "worker/model/image.h"
#include "common/check.h"
#include "common/crc.h"
#include "common/log.h"
#include "worker/model/file.h"
#include "worker/model/huge.h"
#include "worker/model/prune.h"
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

enum { VERSION = 1, PAGE = 4096, CHUNK = 1 << 20, N_SAMPLES = 64, LOCK_WAIT_MS = 600000, LOCK_POLL_MS = 50 };

typedef struct header {
    char magic[8];
    uint32_t version, header_crc; /* of the header with this field and boot at zero */
    td_image_key key;
    uint32_t crc_of_crcs, pad_;
    uint64_t bytes, data_offset;
    char boot[40];
} header;

static const char magic[8] = "tdimage";
_Static_assert(sizeof(td_image_key) == 48 && sizeof(header) == 128 && offsetof(header, boot) == 88,
               "no padding: it is in the CRC");

static size_t n_chunks(size_t bytes)
{
    return (bytes + CHUNK - 1) / CHUNK;
}
static size_t round_page(size_t n)
{
    return (n + PAGE - 1) / PAGE * PAGE;
}
static size_t data_offset(size_t bytes)
{
    return PAGE + round_page(n_chunks(bytes) * sizeof(uint32_t));
}

static void boot_id(char out[40])
{
    memset(out, 0, 40);
    FILE *f = fopen("/proc/sys/kernel/random/boot_id", "re");
    if (!f) return;
    if (!fgets(out, 40, f)) out[0] = 0;
    fclose(f);
}

static uint32_t header_crc(header h)
{
    h.header_crc = 0;
    memset(h.boot, 0, sizeof h.boot);
    return td_crc32c(0, &h, sizeof h);
}

static header make_header(const td_image_key *key, size_t bytes)
{
    header h;
    memset(&h, 0, sizeof h);
    memcpy(h.magic, magic, sizeof magic);
    h.version = VERSION;
    memcpy(&h.key, key, sizeof *key);
    h.key.pad_ = 0;
    h.bytes = bytes;
    h.data_offset = data_offset(bytes);
    return h;
}

/* ---- checksums, on the pool ---- */

typedef struct crc_job {
    const uint8_t *data;
    size_t bytes, stride;
    uint32_t *out;
} crc_job;

static void crc_one(void *arg, int i, int member)
{
    const crc_job *j = arg;
    (void)member;
    size_t c = (size_t)i * j->stride, at = c * CHUNK;
    j->out[c] = td_crc32c(0, j->data + at, TD_MIN((size_t)CHUNK, j->bytes - at));
}

/* Every stride-th chunk. */
static void crc_chunks(td_pool *pool, const uint8_t *data, size_t bytes, size_t stride, uint32_t *out)
{
    crc_job j = {data, bytes, stride, out};
    td_pool_for(pool, (int)((n_chunks(bytes) + stride - 1) / stride), crc_one, &j);
}

static bool data_matches(td_pool *pool, const uint8_t *data, size_t bytes, const uint32_t *want, bool all)
{
    size_t n = n_chunks(bytes), stride = all ? 1 : n / N_SAMPLES + 1;
    uint32_t *got = td_xalloc(n * sizeof *got);
    crc_chunks(pool, data, bytes, stride, got);
    bool same = true;
    for (size_t i = 0; i < n; i += stride) same = same && got[i] == want[i];
    free(got);
    return same;
}

/* ---- opening ---- */

typedef enum { IMAGE_OK, IMAGE_NONE, IMAGE_BROKEN } verdict;

static verdict check_map(const uint8_t *map, size_t map_bytes, const td_image_key *key, size_t bytes,
                         td_pool *pool, bool *verified)
{
    header h, want = make_header(key, bytes);
    if (map_bytes != data_offset(bytes) + bytes) return IMAGE_BROKEN;
    memcpy(&h, map, sizeof h);
    const uint32_t *crcs = (const uint32_t *)(const void *)(map + PAGE);
    if (memcmp(h.magic, magic, sizeof magic) || h.version != VERSION || h.header_crc != header_crc(h) ||
        h.bytes != bytes || h.data_offset != want.data_offset || memcmp(&h.key, &want.key, sizeof h.key) ||
        h.crc_of_crcs != td_crc32c(0, crcs, n_chunks(bytes) * sizeof *crcs))
        return IMAGE_BROKEN;
    char boot[40];
    boot_id(boot);
    bool all = !boot[0] || memcmp(boot, h.boot, sizeof boot);
    if (!data_matches(pool, map + h.data_offset, bytes, crcs, all)) return IMAGE_BROKEN;
    *verified = all;
    return IMAGE_OK;
}

/* ---- page tables ---- */

/* Before the first byte of a mapping is touched: pages of 2 MiB, where the file's system has such (xfs, ext4 from Linux
 * 6.16 on). With 4 KiB ones, page walks took a fifth of a decode step's time in a virtual machine. Best effort. */
static void *want_huge(void *map, size_t bytes)
{
    if (map != MAP_FAILED) (void)madvise(map, bytes, MADV_HUGEPAGE);
    return map;
}

#ifndef MADV_POPULATE_READ
#define MADV_POPULATE_READ                                                                                   \
    22 /* Linux 5.14; older kernels answer EINVAL and fault pages in one by one, later */
#endif
enum { POPULATE_BYTES = 32 << 20 };

typedef struct populate_job {
    uint8_t *map;
    size_t bytes;
} populate_job;

static void populate_one(void *arg, int i, int member)
{
    const populate_job *j = arg;
    (void)member;
    size_t at = (size_t)i * POPULATE_BYTES;
    (void)madvise(j->map + at, TD_MIN((size_t)POPULATE_BYTES, j->bytes - at), MADV_POPULATE_READ);
}

/* Map all pages now: else the first steps pay half a second per 2.5 GB for page faults. */
static void populate(td_pool *pool, void *map, size_t bytes)
{
    populate_job j = {map, bytes};
    (void)madvise(map, bytes, MADV_WILLNEED);
    td_pool_for(pool, (int)((bytes + POPULATE_BYTES - 1) / POPULATE_BYTES), populate_one, &j);
}

static void repair(td_pool *pool, void *map, size_t bytes)
{
    size_t copied = td_huge_repair(pool, map, bytes, 0);
    if (copied) TD_DEBUG_LOG("%zu MiB of packed weights were in small pages and are this process's own now", copied >> 20);
}

/* ---- opening, continued ---- */

/* Remember that every byte was good in this boot. Best effort: without it the next start verifies again. */
static void mark_verified(const char *path)
{
    char boot[40];
    boot_id(boot);
    int fd = open(path, O_WRONLY | O_CLOEXEC);
    if (fd < 0) return;
    ssize_t n = pwrite(fd, boot, sizeof boot, (off_t)offsetof(header, boot));
    (void)n;
    close(fd);
}

static verdict try_open(td_image *im, const char *path, const td_image_key *key, size_t bytes, td_pool *pool)
{
    struct stat sb;
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return IMAGE_NONE;
    if (fstat(fd, &sb) < 0 || !S_ISREG(sb.st_mode) || (size_t)sb.st_size < PAGE) {
        close(fd);
        return IMAGE_BROKEN;
    }
    size_t n = (size_t)sb.st_size;
    void *map = want_huge(mmap(NULL, n, PROT_READ, MAP_SHARED, fd, 0), n);
    close(fd);
    if (map == MAP_FAILED) return IMAGE_NONE;
    bool verified = false;
    verdict v = check_map(map, n, key, bytes, pool, &verified);
    if (v != IMAGE_OK) {
        munmap(map, n);
        return v;
    }
    if (verified) mark_verified(path);
    populate(pool, map, n);
    repair(pool, map, n);
    *im = (td_image){(const uint8_t *)map + data_offset(bytes), bytes, map, n, true, false, -1};
    return IMAGE_OK;
}

/* ---- making ---- */

static td_status no_cache(const char *what)
{
    TD_WARN("image cache: %s: %s; packed weights stay in this process's memory", what, strerror(errno));
    return TD_EIO;
}

/* Reserve the space first: a full disk must be an error here, not a SIGBUS while packing. */
static td_status map_new_file(int fd, size_t n, uint8_t **map)
{
    int error = posix_fallocate(fd, 0, (off_t)n);
    if (error) {
        errno = error;
        return no_cache("no room for an image");
    }
    void *p = want_huge(mmap(NULL, n, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0), n);
    if (p == MAP_FAILED) return no_cache("mmap");
    *map = p;
    return TD_OK;
}

static void write_image(uint8_t *map, const td_image_key *key, size_t bytes, td_pool *pool,
                        td_image_fill_fn *fill, void *arg)
{
    header h = make_header(key, bytes);
    uint32_t *crcs = (uint32_t *)(void *)(map + PAGE);
    fill(arg, map + h.data_offset);
    crc_chunks(pool, map + h.data_offset, bytes, 1, crcs);
    h.crc_of_crcs = td_crc32c(0, crcs, n_chunks(bytes) * sizeof *crcs);
    boot_id(h.boot);
    h.header_crc = header_crc(h);
    memcpy(map, &h, sizeof h);
}

static td_status make_file(td_image *im, const char *path, const td_image_key *key, size_t bytes,
                           td_pool *pool, td_image_fill_fn *fill, void *arg)
{
    char tmp[4096];
    FILE *f;
    uint8_t *map;
    size_t n = data_offset(bytes) + bytes;
    if (td_file_create_beside(path, tmp, sizeof tmp, &f) < 0) return TD_EIO;
    td_status st = map_new_file(fileno(f), n, &map);
    if (st < 0) {
        fclose(f);
        unlink(tmp);
        return st;
    }
    write_image(map, key, bytes, pool, fill, arg);
    st = td_file_finish(f, tmp, path, true);
    (void)mprotect(map, n, PROT_READ);
    repair(pool, map, n);
    /* The bytes are good even if the rename failed: keep the map either way. */
    *im = (td_image){map + data_offset(bytes), bytes, map, n, st == TD_OK, true, -1};
    return TD_OK;
}

/* Wait for whoever makes the image now. -1: no lock (read-only directory, or too long): go on without. A lock
 * file that was removed meanwhile (prune.c) locks nobody out: those who come now lock another one. */
static int take_lock(const char *path)
{
    char name[4096];
    int fd = -1;
    if (snprintf(name, sizeof name, "%s.lock", path) >= (int)sizeof name) return -1;
    for (int waited = 0; waited < LOCK_WAIT_MS; waited += LOCK_POLL_MS) {
        if (fd < 0) fd = open(name, O_RDWR | O_CREAT | O_CLOEXEC, 0644);
        if (fd < 0) return -1;
        if (flock(fd, LOCK_EX | LOCK_NB) == 0) {
            if (td_image_is_at(AT_FDCWD, name, fd)) return fd;
            close(fd);
            fd = -1;
            continue;
        }
        if (errno != EWOULDBLOCK && errno != EINTR) break;
        usleep(LOCK_POLL_MS * 1000);
    }
    close(fd);
    return -1;
}

static td_status open_cached(td_image *im, const char *path, const td_image_key *key, size_t bytes,
                             td_pool *pool, td_image_fill_fn *fill, void *arg)
{
    if (try_open(im, path, key, bytes, pool) == IMAGE_OK) return TD_OK;
    int lock = take_lock(path);
    verdict v = try_open(im, path, key, bytes, pool); /* made by the one we waited for? */
    td_status st = TD_OK;
    if (v == IMAGE_BROKEN) {
        TD_WARN("image cache: a broken image is removed and made again");
        unlink(path);
    }
    if (v != IMAGE_OK) st = make_file(im, path, key, bytes, pool, fill, arg);
    if (lock >= 0) close(lock);
    return st;
}

static td_status open_anonymous(td_image *im, size_t bytes, td_image_fill_fn *fill, void *arg)
{
    void *p = want_huge(mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0), bytes);
    if (p == MAP_FAILED) return td_fail(TD_EFULL, "no memory for %zu bytes of packed weights", bytes);
    fill(arg, p);
    *im = (td_image){p, bytes, p, bytes, false, true, -1};
    return TD_OK;
}

/* mkdir -p */
static bool make_dirs(const char *dir)
{
    char path[4096];
    if (strlen(dir) >= sizeof path) {
        errno = ENAMETOOLONG;
        return false;
    }
    strcpy(path, dir);
    for (char *p = path + 1; *p; p++) {
        if (*p != '/') continue;
        *p = 0;
        (void)mkdir(path, 0755); /* what matters is the last one */
        *p = '/';
    }
    struct stat sb;
    return (mkdir(path, 0755) == 0 || errno == EEXIST) && stat(path, &sb) == 0 &&
           (S_ISDIR(sb.st_mode) || (errno = ENOTDIR, false));
}

static bool image_path(char *out, size_t cap, const char *dir, const td_image_key *k)
{
    int n = snprintf(out, cap, "%s/model-%016llx%016llx-%08llx-l%u-s%uof%u.image", dir,
                     (unsigned long long)k->model.hi, (unsigned long long)k->model.lo,
                     (unsigned long long)(k->plan.lo & 0xffffffffu), k->layout, k->shard, k->n_shards);
    errno = ENAMETOOLONG;
    return n > 0 && (size_t)n < cap;
}

/* Room for the image, if it is not there already, among those of other workers. */
static void prune(const char *dir, uint64_t limit, const char *path, size_t bytes)
{
    const char *name = strrchr(path, '/') + 1, *shard = strrchr(name, '-');
    char keep[256];
    snprintf(keep, sizeof keep, "%.*s", (int)(shard + 1 - name), name);
    td_image_prune(dir, limit, access(path, F_OK) == 0 ? 0 : data_offset(bytes) + bytes, keep);
}

td_status td_image_open(td_image *im, const char *dir, uint64_t limit, const td_image_key *key, size_t bytes,
                        td_pool *pool, td_image_fill_fn *fill, void *arg)
{
    char path[4096];
    *im = (td_image){0};
    if (bytes == 0) return TD_OK;
    if (!dir || !dir[0]) return open_anonymous(im, bytes, fill, arg);
    if (!image_path(path, sizeof path, dir, key) || !make_dirs(dir)) {
        no_cache("directory");
        return open_anonymous(im, bytes, fill, arg);
    }
    prune(dir, limit, path, bytes);
    if (open_cached(im, path, key, bytes, pool, fill, arg) != TD_OK)
        return open_anonymous(im, bytes, fill, arg);
    im->held = im->shared ? td_image_hold(path) : -1;
    return TD_OK;
}

void td_image_close(td_image *im)
{
    if (im->map) munmap(im->map, im->map_bytes);
    if (im->shared && im->held >= 0) close(im->held);
    *im = (td_image){0};
}
