// SPDX-License-Identifier: Apache-2.0
/* worker/model/safetensors.c - reading. Per file: map, header, entries sorted by offset and checked to tile
 * the data; then all entries of all files sorted by name. */
#include "worker/model/safetensors.h"
#include "common/arena.h"
#include "common/check.h"
#include "common/json.h"
#include "worker/model/file.h"
#include <stdlib.h>
#include <sys/mman.h>

enum { SMALL_FILE = 4 << 20, SAMPLE_BYTES = 64 << 10, N_SAMPLES = 64, NODES_PER_TENSOR = 32 };

typedef struct st_file {
    char *name;
    const uint8_t *p;
    size_t bytes, header_bytes;
    bool mapped;
} st_file;

struct td_safetensors {
    td_arena arena; /* names */
    st_file *file;
    int n_files;
    td_st_tensor *tensor;
    size_t n, cap;
};

static const struct {
    const char *name;
    int bits;
} dtypes[] = {
#define X(name, bits) {#name, bits},
    TD_ST_DTYPE_MAP(X)
#undef X
};

const char *td_st_dtype_name(td_st_dtype t)
{
    return (size_t)t < TD_COUNT(dtypes) ? dtypes[t].name : "?";
}

size_t td_st_elements(const td_st_tensor *t)
{
    size_t n = 1;
    for (int i = 0; i < t->rank; i++) n *= (size_t)t->shape[i];
    return n;
}

/* ---- one entry of the header ---- */

static td_status bad_tensor(const st_file *f, const char *tensor, const char *what)
{
    return td_fail(TD_EPROTO, "%s: tensor \"%.200s\": %s", f->name, tensor, what);
}

static td_status read_dtype(const st_file *f, const td_json *e, td_st_tensor *t)
{
    const char *name = td_json_str(e, "dtype", NULL);
    if (!name) return bad_tensor(f, t->name, "no dtype");
    for (size_t i = 0; i < TD_COUNT(dtypes); i++) {
        if (strcmp(dtypes[i].name, name)) continue;
        t->dtype = (td_st_dtype)i;
        return TD_OK;
    }
    return td_fail(TD_EPROTO, "%s: tensor \"%.200s\": unknown dtype \"%.40s\"", f->name, t->name, name);
}

/* Shape and its size in bytes, without overflow. */
static td_status read_shape(const st_file *f, const td_json *e, td_st_tensor *t)
{
    const td_json *shape = td_json_get(e, "shape");
    if (!shape || shape->type != TD_JSON_ARR) return bad_tensor(f, t->name, "no shape");
    if (shape->n > TD_ST_MAX_RANK) return bad_tensor(f, t->name, "more than 8 dimensions");
    size_t elements = 1;
    for (const td_json *d = shape->child; d; d = d->next) {
        if (d->type != TD_JSON_INT || d->i < 0) return bad_tensor(f, t->name, "a dimension is no size");
        if (__builtin_mul_overflow(elements, (size_t)d->i, &elements))
            return bad_tensor(f, t->name, "shape overflows");
        t->shape[t->rank++] = d->i;
    }
    size_t bits;
    if (__builtin_mul_overflow(elements, (size_t)dtypes[t->dtype].bits, &bits) || elements > SIZE_MAX / 64)
        return bad_tensor(f, t->name, "shape overflows");
    if (bits % 8) return bad_tensor(f, t->name, "shape does not end on a byte");
    t->bytes = bits / 8;
    return TD_OK;
}

static td_status read_offsets(const st_file *f, const td_json *e, td_st_tensor *t)
{
    const td_json *off = td_json_get(e, "data_offsets");
    const td_json *a = off && off->type == TD_JSON_ARR && off->n == 2 ? off->child : NULL;
    if (!a || a->type != TD_JSON_INT || a->next->type != TD_JSON_INT)
        return bad_tensor(f, t->name, "no data_offsets [begin, end]");
    int64_t begin = a->i, end = a->next->i;
    size_t data = f->bytes - f->header_bytes;
    if (begin < 0 || end < begin || (uint64_t)end > data)
        return td_fail(TD_EPROTO,
                       "%s: tensor \"%.200s\": data_offsets [%lld, %lld] are not within the %zu data bytes",
                       f->name, t->name, (long long)begin, (long long)end, data);
    if ((uint64_t)(end - begin) != t->bytes)
        return td_fail(TD_EPROTO, "%s: tensor \"%.200s\": %lld bytes of data, but dtype and shape make %zu",
                       f->name, t->name, (long long)(end - begin), t->bytes);
    t->data = f->p + f->header_bytes + begin;
    return TD_OK;
}

static td_status read_entry(td_safetensors *s, int file, const td_json *e, td_st_tensor *out)
{
    const st_file *f = &s->file[file];
    td_st_tensor t = {.file = file};
    if (e->key_len == 0 || e->key_len > TD_ST_MAX_NAME || memchr(e->key, 0, e->key_len))
        return td_fail(TD_EPROTO, "%s: a tensor's name is empty, over %d bytes or contains NUL", f->name,
                       TD_ST_MAX_NAME);
    t.name = td_arena_strndup(&s->arena, e->key, e->key_len);
    if (!t.name) return td_fail(TD_EFULL, "%s: names need too much memory", f->name);
    if (e->type != TD_JSON_OBJ || e->n != 3)
        return bad_tensor(f, t.name, "not an object of dtype, shape, data_offsets");
    TD_TRY(read_dtype(f, e, &t));
    TD_TRY(read_shape(f, e, &t));
    TD_TRY(read_offsets(f, e, &t));
    *out = t;
    return TD_OK;
}

/* ---- the header ---- */

/* The JSON reader keeps the last of two equal keys; a header with two is lying. Members are counted from the
 * text (colons outside strings) and from the tree. */
static size_t count_colons(const char *p, size_t n)
{
    size_t colons = 0;
    bool in_string = false;
    for (size_t i = 0; i < n; i++) {
        if (in_string && p[i] == '\\')
            i++;
        else if (p[i] == '"')
            in_string = !in_string;
        else if (p[i] == ':' && !in_string)
            colons++;
    }
    return colons;
}

static size_t count_members(const td_json *root)
{
    size_t members = root->n;
    for (const td_json *e = root->child; e; e = e->next)
        if (e->type == TD_JSON_OBJ) members += e->n;
    return members;
}

static int by_offset(const void *a, const void *b)
{
    const td_st_tensor *x = a, *y = b;
    if (x->data != y->data) return x->data < y->data ? -1 : 1;
    return (x->bytes > y->bytes) - (x->bytes < y->bytes);
}

static td_status check_tiling(const st_file *f, td_st_tensor *t, size_t n)
{
    if (n) qsort(t, n, sizeof *t, by_offset);
    const uint8_t *at = f->p + f->header_bytes, *end = f->p + f->bytes;
    for (size_t i = 0; i < n; i++) {
        if (t[i].data < at)
            return td_fail(TD_EPROTO, "%s: tensor \"%.200s\" overlaps \"%.200s\"", f->name, t[i].name,
                           t[i - 1].name);
        if (t[i].data > at)
            return td_fail(TD_EPROTO, "%s: tensor \"%.200s\": %zu bytes before it belong to no tensor",
                           f->name, t[i].name, (size_t)(t[i].data - at));
        at = t[i].data + t[i].bytes;
    }
    if (at != end)
        return td_fail(TD_EPROTO, "%s: the last %zu bytes belong to no tensor", f->name, (size_t)(end - at));
    return TD_OK;
}

static td_status read_metadata(const st_file *f, const td_json *m)
{
    if (m->type != TD_JSON_OBJ) return td_fail(TD_EPROTO, "%s: __metadata__ is no object", f->name);
    for (const td_json *e = m->child; e; e = e->next)
        if (e->type != TD_JSON_STR)
            return td_fail(TD_EPROTO, "%s: __metadata__: a value is no string", f->name);
    return TD_OK;
}

static td_status read_tree(td_safetensors *s, int file, const td_json *root)
{
    const st_file *f = &s->file[file];
    if (root->type != TD_JSON_OBJ) return td_fail(TD_EPROTO, "%s: the header is no JSON object", f->name);
    if (s->n + root->n > (size_t)TD_ST_MAX_TENSORS + 1)
        return td_fail(TD_EFULL, "%s: more than %d tensors", f->name, TD_ST_MAX_TENSORS);
    if (count_colons((const char *)f->p + 8, f->header_bytes - 8) != count_members(root))
        return td_fail(TD_EPROTO, "%s: the header names a tensor or a member twice, or nests too deep",
                       f->name);
    if (s->n + root->n > s->cap) {
        s->cap = s->n + root->n;
        s->tensor = td_xrealloc(s->tensor, s->cap * sizeof *s->tensor);
    }
    size_t first = s->n;
    for (const td_json *e = root->child; e; e = e->next) {
        if (!strcmp(e->key, "__metadata__"))
            TD_TRY(read_metadata(f, e));
        else
            TD_TRY(read_entry(s, file, e, &s->tensor[s->n++]));
    }
    return check_tiling(f, s->tensor + first, s->n - first);
}

static td_status read_header(td_safetensors *s, int file)
{
    st_file *f = &s->file[file];
    if (f->bytes < 8)
        return td_fail(TD_EPROTO, "%s: %zu bytes are too few for a safetensors file", f->name, f->bytes);
    uint64_t header = 0;
    for (int i = 7; i >= 0; i--) header = header << 8 | f->p[i];
    if (header > f->bytes - 8)
        return td_fail(TD_EPROTO, "%s: a header of %llu bytes reaches past the end of %zu", f->name,
                       (unsigned long long)header, f->bytes);
    if (header > TD_ST_MAX_HEADER_BYTES)
        return td_fail(TD_EFULL, "%s: a header of %llu bytes is over the limit of %d", f->name,
                       (unsigned long long)header, TD_ST_MAX_HEADER_BYTES);
    f->header_bytes = 8 + (size_t)header;
    td_arena tree;
    td_arena_init(&tree, ((size_t)64 << 20) + 12 * (size_t)header);
    td_json *root;
    td_json_limits lim = {.max_depth = 8, .max_nodes = (size_t)TD_ST_MAX_TENSORS * NODES_PER_TENSOR};
    td_status st = td_json_parse(&tree, (const char *)f->p + 8, (size_t)header, lim, &root);
    if (st < 0)
        st = td_fail(st, "%s: header: %s", f->name, td_reason());
    else
        st = read_tree(s, file, root);
    td_arena_deinit(&tree);
    return st;
}

/* ---- files ---- */

static int by_name(const void *a, const void *b)
{
    return strcmp(((const td_st_tensor *)a)->name, ((const td_st_tensor *)b)->name);
}

static td_status sort_names(td_safetensors *s)
{
    if (s->n) qsort(s->tensor, s->n, sizeof *s->tensor, by_name);
    for (size_t i = 1; i < s->n; i++)
        if (!strcmp(s->tensor[i - 1].name, s->tensor[i].name))
            return td_fail(TD_EPROTO, "tensor \"%.200s\" is in %s and in %s", s->tensor[i].name,
                           s->file[s->tensor[i - 1].file].name, s->file[s->tensor[i].file].name);
    return TD_OK;
}

static td_safetensors *new_set(void)
{
    td_safetensors *s = td_xalloc(sizeof *s);
    td_arena_init(&s->arena, (size_t)TD_ST_MAX_TENSORS * (TD_ST_MAX_NAME + 16));
    return s;
}

static st_file *new_file(td_safetensors *s, const char *name)
{
    s->file = td_xrealloc(s->file, (size_t)(s->n_files + 1) * sizeof *s->file);
    st_file *f = &s->file[s->n_files++];
    *f = (st_file){.name = td_xstrdup(name)};
    return f;
}

static td_status add_path(td_safetensors *s, const char *name, const char *path)
{
    st_file *f = new_file(s, name);
    TD_TRY(td_file_map(path, name, &f->p, &f->bytes));
    f->mapped = true;
    return read_header(s, s->n_files - 1);
}

static td_status finish(td_safetensors *s, td_status st, td_safetensors **out)
{
    if (st >= 0) st = sort_names(s);
    if (st < 0)
        td_safetensors_close(s);
    else
        *out = s;
    return st;
}

td_status td_safetensors_open(const char *path, td_safetensors **out)
{
    td_safetensors *s = new_set();
    const char *slash = strrchr(path, '/');
    return finish(s, add_path(s, slash ? slash + 1 : path, path), out);
}

td_status td_safetensors_open_memory(const char *name, const void *p, size_t n, td_safetensors **out)
{
    td_safetensors *s = new_set();
    st_file *f = new_file(s, name);
    f->p = p;
    f->bytes = n;
    return finish(s, read_header(s, 0), out);
}

void td_safetensors_close(td_safetensors *s)
{
    if (!s) return;
    for (int i = 0; i < s->n_files; i++) {
        if (s->file[i].mapped && s->file[i].bytes) munmap((void *)(uintptr_t)s->file[i].p, s->file[i].bytes);
        free(s->file[i].name);
    }
    free(s->file);
    free(s->tensor);
    td_arena_deinit(&s->arena);
    free(s);
}

/* ---- the index of a sharded checkpoint ---- */

static const char index_name[] = "model.safetensors.index.json";

static bool plain_name(const char *s)
{
    size_t n = strlen(s);
    const char ext[] = ".safetensors";
    return n >= sizeof ext && n <= 255 && s[0] != '.' && !strchr(s, '/') &&
           !strcmp(s + n - (sizeof ext - 1), ext);
}

static td_status open_shard(td_safetensors *s, const char *dir, const td_json *entry)
{
    if (entry->type != TD_JSON_STR || strlen(entry->s) != entry->n || !plain_name(entry->s))
        return td_fail(TD_EPROTO, "%s: tensor \"%.200s\": not the name of a .safetensors file in the folder",
                       index_name, entry->key);
    for (int i = s->n_files - 1; i >= 0; i--)
        if (!strcmp(s->file[i].name, entry->s)) return TD_OK;
    if (s->n_files == TD_ST_MAX_FILES)
        return td_fail(TD_EFULL, "%s: more than %d files", index_name, TD_ST_MAX_FILES);
    char path[4096];
    TD_TRY(td_file_path(path, sizeof path, dir, entry->s));
    return add_path(s, entry->s, path);
}

static td_status check_index(const td_safetensors *s, const td_json *map)
{
    for (const td_json *e = map->child; e; e = e->next) {
        const td_st_tensor *t = td_safetensors_find(s, e->key);
        if (!t || strcmp(s->file[t->file].name, e->s))
            return td_fail(TD_EPROTO, "%s: tensor \"%.200s\" is not in %s", index_name, e->key, e->s);
    }
    return TD_OK;
}

static td_status open_index(td_safetensors *s, const char *dir, const char *text, size_t n)
{
    td_arena tree;
    td_arena_init(&tree, ((size_t)32 << 20) + 12 * n);
    td_json *root;
    td_json_limits lim = {.max_depth = 8, .max_nodes = 2 * (size_t)TD_ST_MAX_TENSORS};
    td_status st = td_json_parse(&tree, text, n, lim, &root);
    const td_json *map = NULL;
    if (st < 0)
        st = td_fail(st, "%s: %s", index_name, td_reason());
    else if (!(map = td_json_get(root, "weight_map")) || map->type != TD_JSON_OBJ || map->n == 0)
        st = td_fail(TD_EPROTO, "%s: no weight_map", index_name);
    for (const td_json *e = st < 0 ? NULL : map->child; e && st >= 0; e = e->next) st = open_shard(s, dir, e);
    if (st >= 0) st = sort_names(s);
    if (st >= 0) st = check_index(s, map);
    td_arena_deinit(&tree);
    return st;
}

td_status td_safetensors_open_dir(const char *dir, td_safetensors **out)
{
    char path[4096];
    TD_TRY(td_file_path(path, sizeof path, dir, "model.safetensors"));
    if (td_file_exists(path)) return td_safetensors_open(path, out);
    TD_TRY(td_file_path(path, sizeof path, dir, index_name));
    if (!td_file_exists(path))
        return td_fail(TD_EIO, "the model folder has neither model.safetensors nor %s", index_name);
    char *text;
    size_t n;
    TD_TRY(td_file_read(path, index_name, TD_ST_MAX_INDEX_BYTES, &text, &n));
    td_safetensors *s = new_set();
    td_status st = open_index(s, dir, text, n);
    free(text);
    return finish(s, st, out);
}

/* ---- looking things up ---- */

size_t td_safetensors_count(const td_safetensors *s)
{
    return s->n;
}
const td_st_tensor *td_safetensors_at(const td_safetensors *s, size_t i)
{
    return &s->tensor[i];
}
const char *td_safetensors_file(const td_safetensors *s, int file)
{
    return s->file[file].name;
}

const char *td_safetensors_list(const td_safetensors *s)
{
    return s->n_files == 1 ? s->file[0].name : index_name;
}

const td_st_tensor *td_safetensors_find(const td_safetensors *s, const char *name)
{
    td_st_tensor key = {.name = name};
    return s->n ? bsearch(&key, s->tensor, s->n, sizeof key, by_name) : NULL;
}

void td_safetensors_drop(const void *p, size_t n)
{
    uintptr_t page = 4096, a = ((uintptr_t)p + page - 1) & ~(page - 1), b = ((uintptr_t)p + n) & ~(page - 1);
    if (b > a)
        (void)madvise((void *)a, b - a, MADV_DONTNEED); /* best effort: they are clean pages of a file */
}

/* A file's part: header, size, then everything, or 64 samples at even strides, the first at the start and the
 * last at the end. */
static td_h128 file_digest(const st_file *f)
{
    const td_hkey key = {0x74616e64656d2d73ull, 0x6166657465736f72ull};
    td_h128 part[2 + N_SAMPLES] = {{f->bytes, f->header_bytes}, td_siphash128(key, f->p, f->header_bytes)};
    size_t n = 2, data = f->bytes - f->header_bytes;
    const uint8_t *p = f->p + f->header_bytes;
    if (data <= SMALL_FILE)
        part[n++] = td_siphash128(key, p, data);
    else
        for (size_t i = 0; i < N_SAMPLES; i++) {
            size_t at = (size_t)((double)i / (N_SAMPLES - 1) * (double)(data - SAMPLE_BYTES));
            part[n++] = td_siphash128(key, p + at, SAMPLE_BYTES);
        }
    return td_siphash128(key, part, n * sizeof *part);
}

td_h128 td_safetensors_digest(const td_safetensors *s)
{
    const td_hkey key = {0x74616e64656d2d73ull, 0x68617264732d3031ull};
    td_h128 *part = td_xalloc((size_t)s->n_files * sizeof *part);
    for (int i = 0; i < s->n_files; i++) part[i] = file_digest(&s->file[i]);
    td_h128 h = td_siphash128(key, part, (size_t)s->n_files * sizeof *part);
    free(part);
    return h;
}

/* ---- values ---- */

bool td_st_weight_dtype(const td_st_tensor *t, td_dtype *out)
{
    if (t->dtype == TD_ST_F32)
        *out = TD_F32;
    else if (t->dtype == TD_ST_BF16)
        *out = TD_BF16;
    else if (t->dtype == TD_ST_F16)
        *out = TD_F16;
    else
        return false;
    return true;
}

td_status td_st_read_f32(const td_st_tensor *t, float *out, size_t n)
{
    td_dtype from;
    if (!td_st_weight_dtype(t, &from) || td_st_elements(t) != n)
        return td_fail(TD_EPROTO, "tensor \"%.200s\": %s [%zu elements], expected %zu of F32, BF16 or F16",
                       t->name, td_st_dtype_name(t->dtype), td_st_elements(t), n);
    for (size_t i = 0; i < n; i++) {
        uint16_t h;
        if (from == TD_F32)
            memcpy(&out[i], t->data + 4 * i, 4);
        else {
            memcpy(&h, t->data + 2 * i, 2);
            out[i] = from == TD_BF16 ? td_bf16_to_f32(h) : td_f16_to_f32(h);
        }
    }
    return TD_OK;
}

td_status td_st_read_i32(const td_st_tensor *t, int32_t *out, size_t n)
{
    if ((t->dtype != TD_ST_I32 && t->dtype != TD_ST_I64) || td_st_elements(t) != n)
        return td_fail(TD_EPROTO, "tensor \"%.200s\": %s [%zu elements], expected %zu of I32 or I64", t->name,
                       td_st_dtype_name(t->dtype), td_st_elements(t), n);
    for (size_t i = 0; i < n; i++) {
        int64_t v;
        if (t->dtype == TD_ST_I32) {
            memcpy(&out[i], t->data + 4 * i, 4);
            continue;
        }
        memcpy(&v, t->data + 8 * i, 8);
        if (v < INT32_MIN || v > INT32_MAX)
            return td_fail(TD_EPROTO, "tensor \"%.200s\": element %zu does not fit 32 bits", t->name, i);
        out[i] = (int32_t)v;
    }
    return TD_OK;
}
