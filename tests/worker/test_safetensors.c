// SPDX-License-Identifier: Apache-2.0
/* tests/worker/test_safetensors.c - lying headers, shards and their index, writing and reading back,
 * mutations. */
#include "common/log.h"
#include "common/rng.h"
#include "tests/t.h"
#include "worker/model/safetensors.h"
#include <sys/stat.h>
#include <unistd.h>

/* A file of this header and n data bytes; `claim` overrides the header's size when >= 0. */
static uint8_t *make(const char *header, size_t n_data, long long claim, size_t *n)
{
    size_t h = strlen(header);
    uint64_t size = claim >= 0 ? (uint64_t)claim : h;
    *n = 8 + h + n_data;
    uint8_t *p = malloc(*n);
    for (int i = 0; i < 8; i++) p[i] = (uint8_t)(size >> (8 * i));
    memcpy(p + 8, header, h);
    for (size_t i = 0; i < n_data; i++) p[8 + h + i] = (uint8_t)i;
    return p;
}

static const struct {
    const char *header;
    size_t data;
    long long claim;
    const char *reason;
} lies[] = {
    {"{}", 0, -1, NULL},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}   ", 8, -1, NULL},
    {"{\"a\":{\"dtype\":\"BF16\",\"shape\":[],\"data_offsets\":[0,2]}}", 2, -1, NULL},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[0,5],\"data_offsets\":[0,0]},\"b\":{\"dtype\":\"U8\",\"shape\":[3]"
     ",\"data_offsets\":[0,3]}}",
     3, -1, NULL},
    {"{\"__metadata__\":{\"format\":\"pt\"},\"b\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[2,3]},"
     "\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]}}",
     3, -1, NULL},
    {"{}", 0, 3, "reaches past the end"},
    {"{}", 0, 1ll << 62, "reaches past the end"},
    {"[]", 0, -1, "no JSON object"},
    {"{", 0, -1, "line 1 column"},
    {"", 0, -1, "line 1"},
    {"{}", 1, -1, "last 1 bytes belong to no tensor"},
    {"{\"a\":1}", 0, -1, "\"a\": not an object"},
    {"{\"a\":{}}", 0, -1, "\"a\": not an object"},
    {"{\"\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, -1, "name is empty"},
    {"{\"a\\u0000b\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, -1, "NUL"},
    {"{\"a\":{\"dtype\":\"F33\",\"shape\":[2],\"data_offsets\":[0,8]}}", 8, -1, "unknown dtype \"F33\""},
    {"{\"a\":{\"dtype\":32,\"shape\":[2],\"data_offsets\":[0,8]}}", 8, -1, "no dtype"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":2,\"data_offsets\":[0,8]}}", 8, -1, "no shape"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[-2],\"data_offsets\":[0,8]}}", 8, -1, "no size"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2.0],\"data_offsets\":[0,8]}}", 8, -1, "no size"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,4]}}", 4, -1,
     "4 bytes of data, but dtype and shape make 8"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8]}}", 7, -1,
     "not within the 7 data bytes"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[8,0]}}", 8, -1, "not within"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[-8,0]}}", 8, -1, "not within"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0]}}", 8, -1, "no data_offsets"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[0,8,8]}}", 8, -1, "no data_offsets"},
    {"{\"a\":{\"dtype\":\"F32\",\"shape\":[4294967296,4294967296],\"data_offsets\":[0,0]}}", 0, -1,
     "shape overflows"},
    {"{\"a\":{\"dtype\":\"F64\",\"shape\":[9223372036854775807],\"data_offsets\":[0,0]}}", 0, -1,
     "shape overflows"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1,1,1,1,1,1,1,1,1],\"data_offsets\":[0,1]}}", 1, -1,
     "more than 8 dimensions"},
    {"{\"a\":{\"dtype\":\"F4\",\"shape\":[3],\"data_offsets\":[0,1]}}", 1, -1, "does not end on a byte"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1],\"x\":1}}", 1, -1, "not an object of"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"b\":{\"dtype\":\"U8\",\"shape\":[2],"
     "\"data_offsets\":[1,3]}}",
     3, -1, "\"b\" overlaps \"a\""},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"b\":{\"dtype\":\"U8\",\"shape\":[2],"
     "\"data_offsets\":[0,2]}}",
     2, -1, "overlaps"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[2],\"data_offsets\":[0,2]},\"b\":{\"dtype\":\"U8\",\"shape\":[1],"
     "\"data_offsets\":[3,4]}}",
     4, -1, "\"b\": 1 bytes before it belong to no tensor"},
    {"{\"a\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]},\"a\":{\"dtype\":\"U8\",\"shape\":[1],"
     "\"data_offsets\":[0,1]}}",
     1, -1, "twice"},
    {"{\"a\":{\"dtype\":\"U8\",\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}", 1, -1, "twice"},
    {"{\"__metadata__\":[]}", 0, -1, "__metadata__ is no object"},
    {"{\"__metadata__\":{\"a\":1}}", 0, -1, "a value is no string"},
    {"{\"__metadata__\":{\"a\":{\"b\":{}}}}", 0, -1, "nests too deep"},
};

static void test_lies(void)
{
    for (size_t i = 0; i < sizeof lies / sizeof *lies; i++) {
        size_t n;
        td_safetensors *s = NULL;
        uint8_t *p = make(lies[i].header, lies[i].data, lies[i].claim, &n);
        td_status st = td_safetensors_open_memory("f.safetensors", p, n, &s);
        if (lies[i].reason) {
            T_OK(st == TD_EPROTO && !s && strstr(td_reason(), lies[i].reason) &&
                     strstr(td_reason(), "f.safetensors"),
                 "%s: %s (%s)", lies[i].header, td_status_name(st), td_reason());
        } else {
            T_OK(st == TD_OK, "%s: %s", lies[i].header, td_reason());
        }
        if (st == TD_OK) td_safetensors_close(s);
        free(p);
    }
    td_safetensors *s = NULL;
    for (size_t n = 0; n < 8; n++)
        T_OK(td_safetensors_open_memory("f", "\0\0\0\0\0\0\0\0", n, &s) == TD_EPROTO);
}

/* ---- files ---- */

static char dir[64];

static void put(const char *name, const void *p, size_t n)
{
    char path[512];
    snprintf(path, sizeof path, "%s/%s", dir, name);
    FILE *f = fopen(path, "wb");
    T_OK(f && fwrite(p, 1, n, f) == n);
    if (f) fclose(f);
}

static void remove_all(const char *const *names)
{
    char path[512];
    for (; *names; names++) {
        snprintf(path, sizeof path, "%s/%s", dir, *names);
        unlink(path);
    }
}

static void test_write(void)
{
    char path[512];
    float a[6] = {1, -2, 3.5f, 4, 5, 6e-30f};
    int32_t b[2] = {-7, 1 << 30};
    int64_t c[1] = {5};
    uint16_t h[3] = {0x3f80, 0xc000, 0x7f80};
    const td_st_tensor e[] = {
        {.name = "logits", .dtype = TD_ST_F32, .rank = 2, .shape = {2, 3}, .data = (const uint8_t *)a},
        {.name = "i \"32\"", .dtype = TD_ST_I32, .rank = 1, .shape = {2}, .data = (const uint8_t *)b},
        {.name = "i64", .dtype = TD_ST_I64, .rank = 1, .shape = {1}, .data = (const uint8_t *)c},
        {.name = "bf", .dtype = TD_ST_BF16, .rank = 1, .shape = {3}, .data = (const uint8_t *)h},
    };
    snprintf(path, sizeof path, "%s/out.safetensors", dir);
    T_OK(td_safetensors_write(path, e, 4) == TD_OK, "%s", td_reason());
    td_safetensors *s = NULL;
    T_OK(td_safetensors_open(path, &s) == TD_OK, "%s", td_reason());
    if (!s) return;
    T_EQ(td_safetensors_count(s), 4);
    float fa[6], fh[3];
    int32_t ib[2], ic[1];
    const td_st_tensor *t = td_safetensors_find(s, "logits");
    T_OK(t && t->rank == 2 && t->shape[1] == 3 && td_st_read_f32(t, fa, 6) == TD_OK &&
         !memcmp(fa, a, sizeof a));
    T_OK(td_st_read_f32(t, fa, 5) == TD_EPROTO && td_st_read_i32(t, ib, 6) == TD_EPROTO);
    T_OK(td_st_read_i32(td_safetensors_find(s, "i \"32\""), ib, 2) == TD_OK && !memcmp(ib, b, sizeof b));
    T_OK(td_st_read_i32(td_safetensors_find(s, "i64"), ic, 1) == TD_OK && ic[0] == 5);
    T_OK(td_st_read_f32(td_safetensors_find(s, "bf"), fh, 3) == TD_OK && fh[0] == 1 && fh[1] == -2 &&
         isinf(fh[2]));
    T_OK(!td_safetensors_find(s, "nothing"));
    td_h128 d1 = td_safetensors_digest(s);
    td_safetensors_close(s);
    a[3] = 9;
    T_OK(td_safetensors_write(path, e, 4) == TD_OK && td_safetensors_open(path, &s) == TD_OK);
    T_OK(td_safetensors_digest(s).lo != d1.lo, "the digest sees contents");
    td_safetensors_close(s);
    c[0] = 1ll << 40;
    T_OK(td_safetensors_write(path, e, 4) == TD_OK && td_safetensors_open(path, &s) == TD_OK);
    T_OK(td_st_read_i32(td_safetensors_find(s, "i64"), ic, 1) == TD_EPROTO, "does not fit");
    td_safetensors_close(s);
    T_OK(td_safetensors_write("/proc/nothing/x.safetensors", e, 1) == TD_EIO);
    unlink(path);
}

#define ENTRY(name) "{\"" name "\":{\"dtype\":\"U8\",\"shape\":[1],\"data_offsets\":[0,1]}}"
static const struct {
    const char *index, *reason;
} indexes[] = {
    {"{\"metadata\":{},\"weight_map\":{\"a\":\"1.safetensors\",\"b\":\"2.safetensors\"}}", NULL},
    {"{\"weight_map\":{\"a\":\"../1.safetensors\"}}", "tensor \"a\": not the name"},
    {"{\"weight_map\":{\"a\":\"/etc/x.safetensors\"}}", "not the name"},
    {"{\"weight_map\":{\"a\":\"..\"}}", "not the name"},
    {"{\"weight_map\":{\"a\":\"config.json\"}}", "not the name"},
    {"{\"weight_map\":{\"a\":\"1.safetensors\\u0000.safetensors\"}}", "not the name"},
    {"{\"weight_map\":{\"a\":5}}", "not the name"},
    {"{\"weight_map\":{\"a\":\"9.safetensors\"}}", "9.safetensors: No such file"},
    {"{\"weight_map\":{\"a\":\"1.safetensors\",\"b\":\"1.safetensors\"}}", "\"b\" is not in 1.safetensors"},
    {"{\"weight_map\":{\"a\":\"1.safetensors\",\"x\":\"3.safetensors\"}}",
     "\"a\" is in 1.safetensors and in 3.safetensors"},
    {"{\"weight_map\":{}}", "no weight_map"},
    {"[]", "no weight_map"},
    {"{", "model.safetensors.index.json: line"},
};

static void test_index(void)
{
    size_t n;
    const char *names[] = {"1.safetensors", "2.safetensors", "3.safetensors", "model.safetensors.index.json",
                           NULL};
    static const char *const headers[] = {ENTRY("a"), ENTRY("b"), ENTRY("a")};
    td_safetensors *s = NULL;
    T_OK(td_safetensors_open_dir(dir, &s) == TD_EIO && strstr(td_reason(), "neither"), "%s", td_reason());
    for (int i = 0; i < 3; i++) {
        uint8_t *p = make(headers[i], 1, -1, &n);
        put(names[i], p, n);
        free(p);
    }
    for (size_t i = 0; i < sizeof indexes / sizeof *indexes; i++) {
        put("model.safetensors.index.json", indexes[i].index, strlen(indexes[i].index));
        td_status st = td_safetensors_open_dir(dir, &s);
        if (indexes[i].reason)
            T_OK(st < 0 && strstr(td_reason(), indexes[i].reason), "%s: %s", indexes[i].index, td_reason());
        else
            T_OK(st == TD_OK && td_safetensors_count(s) == 2, "%s: %s", indexes[i].index, td_reason());
        if (st == TD_OK) td_safetensors_close(s);
    }
    remove_all(names);
}

/* ---- mutations: never a crash, and what is accepted must be readable to its last byte ---- */

static void touch(const td_safetensors *s)
{
    volatile unsigned sum = 0;
    for (size_t i = 0; i < td_safetensors_count(s); i++) {
        const td_st_tensor *t = td_safetensors_at(s, i);
        for (size_t k = 0; k < t->bytes; k++) sum += t->data[k];
        T_OK(strlen(t->name) > 0);
    }
}

static void mutate(uint8_t *p, size_t n, uint32_t round)
{
    uint32_t key[2] = {7, 9}, r[4];
    for (uint32_t i = 0; i < 1 + round % 4; i++) {
        td_philox4x32((uint32_t[]){round, i, 0, 0}, key, r);
        size_t at = r[0] % n;
        switch (r[1] % 4) {
        case 0:
            p[at] = (uint8_t)r[2];
            break;
        case 1:
            p[at] ^= (uint8_t)(1u << (r[2] % 8));
            break;
        case 2:
            p[at] = (uint8_t) "0123456789{}[],:\"\\-eE"[r[2] % 21];
            break;
        default:
            memmove(p + at, p + r[3] % n, n - (at > r[3] % n ? at : r[3] % n));
            break;
        }
    }
}

static void test_mutations(void)
{
    size_t n;
    int accepted = 0;
    uint8_t *p = make(lies[4].header, 3, -1, &n);
    for (uint32_t round = 0; round < 30000; round++) {
        uint8_t *q = malloc(n); /* exact size: a read past the end is seen by the sanitizer */
        memcpy(q, p, n);
        mutate(q, n, round);
        td_safetensors *s;
        if (td_safetensors_open_memory("m", q, round % 8 ? n : round % n, &s) == TD_OK) {
            accepted++;
            touch(s);
            td_safetensors_close(s);
        }
        free(q);
    }
    T_OK(accepted > 100 && accepted < 25000, "%d accepted", accepted);
    free(p);
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    snprintf(dir, sizeof dir, "/tmp/td-st-%d", (int)getpid());
    mkdir(dir, 0755);
    test_lies();
    test_write();
    test_index();
    test_mutations();
    rmdir(dir);
    return T_DONE();
}
