// SPDX-License-Identifier: Apache-2.0
#include "router/text/files.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>

td_status td_files_read(const char *dir, const char *name, char **text, size_t *n)
{
    char path[4096];
    int k = snprintf(path, sizeof path, "%s%s%s", dir ? dir : "", dir ? "/" : "", name);
    if (k < 0 || (size_t)k >= sizeof path) return td_fail(TD_EIO, "%s: path too long", name);
    FILE *f = fopen(path, "rb");
    if (!f) {
        if (errno == ENOENT || errno == ENOTDIR) return TD_AGAIN;
        return td_fail(TD_EIO, "%s: %s", name, strerror(errno));
    }
    struct stat st;
    td_status rc = TD_OK;
    char *p = NULL;
    if (fstat(fileno(f), &st) || !S_ISREG(st.st_mode)) rc = td_fail(TD_EIO, "%s: not a regular file", name);
    else if (st.st_size > (off_t)TD_FILES_MAX_MIB << 20)
        rc = td_fail(TD_ENOSUP, "%s: larger than %d MiB", name, TD_FILES_MAX_MIB);
    else if (!(p = malloc((size_t)st.st_size + 1))) rc = td_fail(TD_EFULL, "%s: no memory", name);
    else if (fread(p, 1, (size_t)st.st_size, f) != (size_t)st.st_size)
        rc = td_fail(TD_EIO, "%s: could not be read whole", name);
    fclose(f);
    if (rc < 0) {
        free(p);
        return rc;
    }
    p[st.st_size] = '\0';
    *text = p;
    *n = (size_t)st.st_size;
    return TD_OK;
}

td_status td_files_json(const char *dir, const char *name, td_arena *a, td_json **out)
{
    char *text, why[400];
    size_t n;
    *out = NULL;
    td_status st = td_files_read(dir, name, &text, &n);
    if (st != TD_OK) return st;
    size_t skip = n >= 3 && !memcmp(text, "\xEF\xBB\xBF", 3) ? 3 : 0;
    st = td_json_parse(a, text + skip, n - skip, (td_json_limits){.max_nodes = 16 << 20}, out);
    free(text);
    if (st >= 0) return st;
    snprintf(why, sizeof why, "%s", td_reason());
    return td_fail(st, "%s: %s", name, why);
}
