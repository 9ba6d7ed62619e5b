// SPDX-License-Identifier: Apache-2.0
/* worker/model/safetensors_write.c - writing: header first (sizes are known), then the data as given. */
#include "common/buf.h"
#include "worker/model/file.h"
#include "worker/model/safetensors.h"
#include <stdio.h>

static size_t tensor_bytes(const td_st_tensor *t)
{
    static const int bits[] = {
#define X(name, bits) bits,
        TD_ST_DTYPE_MAP(X)
#undef X
    };
    return td_st_elements(t) * (size_t)bits[t->dtype] / 8;
}

static void write_header(td_buf *b, const td_st_tensor *t, size_t n)
{
    size_t at = 0;
    td_buf_str(b, "{\"__metadata__\":{\"format\":\"pt\"}");
    for (size_t i = 0; i < n; i++) {
        td_buf_str(b, ",");
        td_buf_json_str(b, t[i].name, strlen(t[i].name));
        td_buf_fmt(b, ":{\"dtype\":\"%s\",\"shape\":[", td_st_dtype_name(t[i].dtype));
        for (int d = 0; d < t[i].rank; d++) td_buf_fmt(b, "%s%lld", d ? "," : "", (long long)t[i].shape[d]);
        size_t end = at + tensor_bytes(&t[i]);
        td_buf_fmt(b, "],\"data_offsets\":[%zu,%zu]}", at, end);
        at = end;
    }
    td_buf_str(b, "}");
    while (b->len % 8 && td_buf_ok(b)) td_buf_chr(b, ' '); /* data starts aligned */
}

static bool write_all(FILE *f, const td_buf *header, const td_st_tensor *t, size_t n)
{
    uint8_t size[8];
    for (int i = 0; i < 8; i++) size[i] = (uint8_t)(header->len >> (8 * i));
    bool ok = fwrite(size, 1, 8, f) == 8 && fwrite(header->p, 1, header->len, f) == header->len;
    for (size_t i = 0; ok && i < n; i++) {
        size_t bytes = tensor_bytes(&t[i]);
        ok = fwrite(t[i].data, 1, bytes, f) == bytes;
    }
    return ok;
}

td_status td_safetensors_write(const char *path, const td_st_tensor *entries, size_t n)
{
    char tmp[4096];
    FILE *f;
    TD_TRY(td_file_create_beside(path, tmp, sizeof tmp, &f));
    td_buf header;
    td_buf_init(&header, TD_ST_MAX_HEADER_BYTES);
    write_header(&header, entries, n);
    bool ok = td_buf_ok(&header) && write_all(f, &header, entries, n);
    td_buf_deinit(&header);
    return td_file_finish(f, tmp, path, ok);
}
