// SPDX-License-Identifier: Apache-2.0
/* worker/model/file.c */
#include "worker/model/file.h"
#include "common/check.h"
#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

td_status td_file_path(char *out, size_t cap, const char *dir, const char *name)
{
    int n = snprintf(out, cap, "%s/%s", dir, name);
    if (n < 0 || (size_t)n >= cap) return td_fail(TD_EFULL, "the path of %s is too long", name);
    return TD_OK;
}

bool td_file_exists(const char *path)
{
    struct stat sb;
    return stat(path, &sb) == 0;
}

static td_status open_regular(const char *path, const char *name, int *fd, size_t *bytes)
{
    struct stat sb;
    int f = open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK);
    if (f < 0) return td_fail(TD_EIO, "%s: %s", name, strerror(errno));
    if (fstat(f, &sb) < 0 || !S_ISREG(sb.st_mode)) {
        close(f);
        return td_fail(TD_EIO, "%s: not a regular file", name);
    }
    *fd = f;
    *bytes = (size_t)sb.st_size;
    return TD_OK;
}

td_status td_file_map(const char *path, const char *name, const uint8_t **p, size_t *bytes)
{
    int fd;
    size_t n;
    TD_TRY(open_regular(path, name, &fd, &n));
    void *map = n ? mmap(NULL, n, PROT_READ, MAP_PRIVATE, fd, 0) : NULL;
    int error = errno;
    close(fd);
    if (map == MAP_FAILED) return td_fail(TD_EIO, "%s: mmap of %zu bytes: %s", name, n, strerror(error));
    *p = map;
    *bytes = n;
    return TD_OK;
}

td_status td_file_read(const char *path, const char *name, size_t max_bytes, char **text, size_t *n)
{
    int fd;
    size_t size;
    TD_TRY(open_regular(path, name, &fd, &size));
    if (size > max_bytes) {
        close(fd);
        return td_fail(TD_EFULL, "%s: %zu bytes are over the limit of %zu", name, size, max_bytes);
    }
    char *p = td_xalloc(size + 1);
    size_t got = 0;
    while (got < size) {
        ssize_t r = read(fd, p + got, size - got);
        if (r < 0 && errno == EINTR) continue;
        if (r <= 0) break;
        got += (size_t)r;
    }
    close(fd);
    if (got < size) {
        free(p);
        return td_fail(TD_EIO, "%s: only %zu of %zu bytes could be read", name, got, size);
    }
    p[size] = 0;
    *text = p;
    *n = size;
    return TD_OK;
}

td_status td_file_create_beside(const char *path, char *tmp, size_t cap, FILE **out)
{
    int n = snprintf(tmp, cap, "%s.XXXXXX", path);
    if (n < 0 || (size_t)n >= cap) return td_fail(TD_EFULL, "an output path is too long");
    int fd = mkostemp(tmp, O_CLOEXEC);
    if (fd < 0) return td_fail(TD_EIO, "cannot write %s: %s", path, strerror(errno));
    (void)fchmod(fd, 0644);
    FILE *f = fdopen(fd, "wb");
    if (!f) {
        close(fd);
        unlink(tmp);
        return td_fail(TD_EIO, "cannot write %s: %s", path, strerror(errno));
    }
    *out = f;
    return TD_OK;
}

td_status td_file_finish(FILE *f, const char *tmp, const char *path, bool ok)
{
    int error = ok ? 0 : errno;
    if (fclose(f) != 0 && ok) {
        ok = false;
        error = errno;
    }
    if (ok && rename(tmp, path) < 0) {
        ok = false;
        error = errno;
    }
    if (ok) return TD_OK;
    unlink(tmp);
    return td_fail(TD_EIO, "cannot write %s: %s", path, strerror(error));
}
