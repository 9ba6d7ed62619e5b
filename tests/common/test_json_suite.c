// SPDX-License-Identifier: Apache-2.0
/* JSONTestSuite: y_ is accepted, n_ is refused, i_ may be either; each also with a depth of 2, few nodes and little memory. */
#include "tests/t.h"
#include "common/json.h"
#include <dirent.h>

static const char dir[] = "../shared/data/json/JSONTestSuite/test_parsing";

static td_status parse(const char *text, size_t n, size_t memory, td_json_limits lim)
{
    td_arena a;
    td_json *v = NULL;
    td_arena_init(&a, memory);
    char *exact = malloc(n ? n : 1); /* so that a sanitizer sees any read past the end */
    memcpy(exact, text, n);
    td_status s = td_json_parse(&a, exact, n, lim, &v);
    free(exact);
    if (s == TD_OK) {
        td_buf b;
        td_buf_init(&b, 0);
        td_json_write(&b, v, 0);
        T_OK(td_buf_ok(&b) && b.len > 0);
        td_json *again;
        T_OK(td_json_parse(&a, b.p, b.len, (td_json_limits){0, 0}, &again) == TD_OK || memory < 1 << 20, "%s",
             td_reason());
        td_buf_deinit(&b);
    } else {
        T_OK(!strncmp(td_reason(), "line ", 5), "%s", td_reason());
    }
    td_arena_deinit(&a);
    return s;
}

int main(void)
{
    DIR *d = opendir(dir);
    if (!d) T_SKIP("%s is not there", dir);
    static char text[1 << 20];
    int files = 0;
    for (struct dirent *e; (e = readdir(d));) {
        char path[512];
        snprintf(path, sizeof path, "%s/%.200s", dir, e->d_name);
        FILE *f = strstr(e->d_name, ".json") ? fopen(path, "rb") : NULL;
        if (!f) continue;
        size_t n = fread(text, 1, sizeof text, f);
        fclose(f);
        files++;
        td_status s = parse(text, n, 64 << 20, (td_json_limits){0, 0});
        T_OK(e->d_name[0] != 'y' || s == TD_OK, "%s: %s", e->d_name, td_reason());
        T_OK(e->d_name[0] != 'n' || s < 0, "%s was accepted", e->d_name);
        parse(text, n, 64 << 20, (td_json_limits){2, 3});
        parse(text, n, 200, (td_json_limits){0, 0});
        for (size_t cut = 0; cut < n && cut < 60; cut++) parse(text, cut, 64 << 20, (td_json_limits){0, 0});
    }
    closedir(d);
    T_OK(files > 300, "%d files", files);
    return T_DONE();
}
