// SPDX-License-Identifier: Apache-2.0
#include "worker/model/prune.h"
#include "common/check.h"
#include "common/log.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { MAX_PATH = 4096, DAY_S = 86400 };

typedef struct image {
    char name[256];
    uint64_t bytes;
    struct timespec opened;
} image;

typedef struct images {
    image *at;
    size_t n, room;
    uint64_t bytes; /* of all */
} images;

int td_image_hold(const char *path)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (fd < 0) return -1;
    if (flock(fd, LOCK_SH | LOCK_NB) < 0) { /* it is being removed this moment: what is mapped stays mapped */
        close(fd);
        return -1;
    }
    (void)futimens(fd, NULL);
    return fd;
}

bool td_image_is_at(int dir, const char *name, int fd)
{
    struct stat a, b;
    return fstat(fd, &a) == 0 && fstatat(dir, name, &b, AT_SYMLINK_NOFOLLOW) == 0 && a.st_ino == b.st_ino &&
           a.st_dev == b.st_dev;
}

/* model-*.image, and model-*.image.XXXXXX while it is made; not its lock file. */
static bool is_image(const char *name)
{
    const char *end = strstr(name, ".image");
    return !strncmp(name, "model-", 6) && end && strcmp(end, ".image.lock");
}

static bool is_finished(const char *name)
{
    return !strcmp(name + strlen(name) - 6, ".image");
}

/* From its first entry; to be closed with closedir. NULL: it cannot be read. */
static DIR *entries(int dir)
{
    int copy = dup(dir);
    DIR *d = copy < 0 ? NULL : fdopendir(copy);
    if (d)
        rewinddir(d); /* the copy stands where the last reader stopped */
    else if (copy >= 0)
        close(copy);
    return d;
}

static images list(int dir)
{
    images l = {0};
    DIR *d = entries(dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        struct stat sb;
        if (!is_image(e->d_name) || strlen(e->d_name) >= sizeof l.at->name) continue;
        if (fstatat(dir, e->d_name, &sb, AT_SYMLINK_NOFOLLOW) < 0 || !S_ISREG(sb.st_mode)) continue;
        if (l.n == l.room) {
            l.room = l.room ? 2 * l.room : 16;
            l.at = td_xrealloc(l.at, l.room * sizeof *l.at);
        }
        image *i = &l.at[l.n++];
        *i = (image){.bytes = (uint64_t)sb.st_blocks * 512, .opened = sb.st_mtim};
        strcpy(i->name, e->d_name);
        l.bytes += i->bytes;
    }
    if (d) closedir(d);
    return l;
}

static int by_time(const void *a, const void *b)
{
    const struct timespec *x = &((const image *)a)->opened, *y = &((const image *)b)->opened;
    if (x->tv_sec != y->tv_sec) return x->tv_sec < y->tv_sec ? -1 : 1;
    return (x->tv_nsec > y->tv_nsec) - (x->tv_nsec < y->tv_nsec);
}

/* Under a lock of its own, so that nobody comes to hold it meanwhile without being seen. */
static bool remove_free(int dir, const char *name)
{
    int fd = openat(dir, name, O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOFOLLOW);
    if (fd < 0) return false;
    bool gone = flock(fd, LOCK_EX | LOCK_NB) == 0 && td_image_is_at(dir, name, fd) && unlinkat(dir, name, 0) == 0;
    close(fd);
    return gone;
}

/* Lock files of images that are gone: removed here or by hand, or never finished. Whoever waits for an image to be made
 * holds its own. */
static void remove_orphans(int dir, const char *keep)
{
    DIR *d = entries(dir);
    for (struct dirent *e; d && (e = readdir(d));) {
        char made[sizeof e->d_name];
        size_t n = strlen(e->d_name);
        if (strncmp(e->d_name, "model-", 6) || !strncmp(e->d_name, keep, strlen(keep)) || n <= 11 ||
            strcmp(e->d_name + n - 11, ".image.lock"))
            continue;
        snprintf(made, sizeof made, "%.*s", (int)(n - 5), e->d_name);
        if (faccessat(dir, made, F_OK, AT_SYMLINK_NOFOLLOW) < 0 && errno == ENOENT) (void)remove_free(dir, e->d_name);
    }
    if (d) closedir(d);
}

static bool may_go(const image *i, const char *keep)
{
    if (!strncmp(i->name, keep, strlen(keep))) return false;
    return is_finished(i->name) || i->opened.tv_sec + DAY_S < time(NULL);
}

void td_image_prune(const char *dir, uint64_t limit, uint64_t want, const char *keep)
{
    int d = limit ? open(dir, O_RDONLY | O_DIRECTORY | O_CLOEXEC) : -1;
    if (d < 0) return;
    images l = list(d);
    if (l.n) qsort(l.at, l.n, sizeof *l.at, by_time);
    for (size_t i = 0; i < l.n && l.bytes + want > limit; i++) {
        if (!may_go(&l.at[i], keep) || !remove_free(d, l.at[i].name)) continue;
        l.bytes -= l.at[i].bytes;
        TD_INFO("image cache: %s was not used for long and is removed: %.1f MB", l.at[i].name,
                (double)l.at[i].bytes / 1e6);
    }
    remove_orphans(d, keep);
    free(l.at);
    close(d);
}
