// SPDX-License-Identifier: Apache-2.0
#include "common/buf.h"
#include "router/text/normalizer.h"
#include "tests/text/support_folder.h"
#include <dirent.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

const char *folder_new(void)
{
    static char path[8][64];
    static int at;
    char *p = path[at++ % 8];
    snprintf(p, 64, "/tmp/tandem-text-XXXXXX");
    if (!mkdtemp(p)) perror("mkdtemp"), exit(1);
    return p;
}

void folder_write(const char *dir, const char *name, const char *text, size_t n)
{
    char path[256];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    if (!f) perror(path), exit(1);
    fwrite(text, 1, n ? n : strlen(text), f);
    fclose(f);
}

void folder_drop(const char *dir)
{
    DIR *d = opendir(dir);
    struct dirent *e;
    while (d && (e = readdir(d))) {
        char path[512];
        snprintf(path, sizeof path, "%s/%s", dir, e->d_name);
        unlink(path);
    }
    if (d) closedir(d);
    rmdir(dir);
}

char *file_text(const char *path, size_t *n)
{
    FILE *f = fopen(path, "rb");
    if (!f) return NULL;
    fseek(f, 0, SEEK_END);
    long size = ftell(f);
    rewind(f);
    char *p = malloc((size_t)size + 1);
    *n = fread(p, 1, (size_t)size, f);
    p[*n] = 0;
    fclose(f);
    return p;
}

char *small_tokenizer(const char *extra)
{
    static const char *const merges[] = {"t h", "th e", "\xC4\xA0 the", "a b", "ab ab"};
    static const char *const merged[] = {"th", "the", "\xC4\xA0the", "ab", "abab"};
    td_buf b;
    td_buf_init(&b, 0);
    td_buf_str(&b, "{\"model\": {\"type\": \"BPE\", \"vocab\": {");
    for (int i = 0; i < 256; i++) {
        td_buf one;
        char c = (char)i;
        td_buf_init(&one, 0);
        td_bytelevel_add(&one, &c, 1);
        td_buf_json_str(&b, one.p, one.len);
        td_buf_fmt(&b, ": %d, ", i);
        td_buf_deinit(&one);
    }
    for (int i = 0; i < 5; i++) td_buf_fmt(&b, "%s\"%s\": %d", i ? ", " : "", merged[i], 256 + i);
    td_buf_str(&b, "}, \"merges\": [");
    for (int i = 0; i < 5; i++) td_buf_fmt(&b, "%s\"%s\"", i ? ", " : "", merges[i]);
    td_buf_str(&b, "]}, \"added_tokens\": [");
    static const char *const added[] = {"<s>", "</s>", "<|end|>", "<x>"};
    for (int i = 0; i < 4; i++)
        td_buf_fmt(&b, "%s{\"id\": %d, \"content\": \"%s\", \"special\": %s, \"normalized\": false}",
                   i ? ", " : "", 261 + i, added[i], i < 3 ? "true" : "false");
    td_buf_str(&b, "], \"pre_tokenizer\": {\"type\": \"ByteLevel\", \"add_prefix_space\": false}, "
                   "\"decoder\": {\"type\": \"ByteLevel\"}");
    td_buf_str(&b, extra);
    td_buf_str(&b, "}");
    return b.p;
}
