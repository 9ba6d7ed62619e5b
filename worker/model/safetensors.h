/* worker/model/safetensors.h - read and write safetensors files: one file, or a folder of shards.
 *
 *   [u64 header bytes][JSON header, padded with spaces][data]
 *   one entry of the header: "name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}
 *
 * Rules:     1. Nothing in a file is believed: the header's size, JSON, names, dtypes, shapes and offsets are
 *               checked before anything is used; the data must be covered exactly (no overlap, no hole,
 *               nothing left over). A reason names file, tensor and cause.
 *            2. A folder is read through model.safetensors, or else model.safetensors.index.json, whose
 *               weight_map may only name files of that folder. A tensor may not be in two shards.
 *            3. Data is not aligned to anything: read it with memcpy or the readers below.
 * Ownership: names, shapes and data live until close. Files must not be truncated while they are mapped.
 * Threads:   open and close: one; everything else only reads.
 * Errors:    EPROTO; EFULL over a limit; EIO when the system refused.
 * Limits:    the enum below. Source: the format description in huggingface/safetensors. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_SAFETENSORS_H
#define TD_WORKER_MODEL_SAFETENSORS_H

#include "common/hash.h"
#include "common/status.h"
#include "kernels/tensor.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

enum {
    TD_ST_MAX_RANK = 8,
    TD_ST_MAX_TENSORS = 100000, /* of all shards together */
    TD_ST_MAX_FILES = 1024,
    TD_ST_MAX_NAME = 512, /* bytes of a tensor's name */
    TD_ST_MAX_HEADER_BYTES = 100 << 20,
    TD_ST_MAX_INDEX_BYTES = 64 << 20,
};

/* name, bits per element */
#define TD_ST_DTYPE_MAP(X)                                                                                   \
    X(BOOL, 8)                                                                                               \
    X(U8, 8) X(I8, 8) X(F8_E5M2, 8) X(F8_E4M3, 8) X(F8_E8M0, 8) X(I16, 16) X(U16, 16) X(F16, 16) X(BF16, 16) \
        X(I32, 32) X(U32, 32) X(F32, 32) X(I64, 64) X(U64, 64) X(F64, 64) X(C64, 64) X(F4, 4) X(F6_E2M3, 6)  \
            X(F6_E3M2, 6)

typedef enum {
#define X(name, bits) TD_ST_##name,
    TD_ST_DTYPE_MAP(X)
#undef X
} td_st_dtype;

const char *td_st_dtype_name(td_st_dtype t); /* "BF16" */

typedef struct td_st_tensor {
    const char *name;
    td_st_dtype dtype;
    int rank, file; /* file: index for td_safetensors_file */
    int64_t shape[TD_ST_MAX_RANK];
    const uint8_t *data; /* unaligned */
    size_t bytes;
} td_st_tensor;

typedef struct td_safetensors td_safetensors;

td_status td_safetensors_open(const char *path, td_safetensors **out);    /* one file */
td_status td_safetensors_open_dir(const char *dir, td_safetensors **out); /* a checkpoint's folder */
/* The same checks on bytes in memory (borrowed until close); name is used in reasons. */
td_status td_safetensors_open_memory(const char *name, const void *p, size_t n, td_safetensors **out);
void td_safetensors_close(td_safetensors *s);

size_t td_safetensors_count(const td_safetensors *s);
const td_st_tensor *td_safetensors_at(const td_safetensors *s, size_t i);           /* by name, ascending */
const td_st_tensor *td_safetensors_find(const td_safetensors *s, const char *name); /* NULL: not there */
const char *td_safetensors_file(const td_safetensors *s, int file);                 /* name without folder */
const char *td_safetensors_list(const td_safetensors *s); /* the file that names every tensor: the only one, or the index */
/* The pages behind these bytes are not needed soon: give them back (they can still be read). */
void td_safetensors_drop(const void *p, size_t n);
/* Identity of headers, sizes and sampled contents (all of it up to 4 MiB a file): fast, equal on every
 * machine. */
td_h128 td_safetensors_digest(const td_safetensors *s);

/* Weights the kernels can take: F32, BF16, F16. false for every other dtype. */
bool td_st_weight_dtype(const td_st_tensor *t, td_dtype *out);
/* Convert a whole tensor: to float from F32, BF16, F16; to int32 from I32, I64 (which must fit). `n` must be
 * its number of elements. */
td_status td_st_read_f32(const td_st_tensor *t, float *out, size_t n);
td_status td_st_read_i32(const td_st_tensor *t, int32_t *out, size_t n);
size_t td_st_elements(const td_st_tensor *t);

/* Write a file of n tensors in the given order (each entry's name, dtype, rank, shape and data; bytes and
 * file are ignored) to a temporary name beside `path`, then rename. */
td_status td_safetensors_write(const char *path, const td_st_tensor *entries, size_t n);

#endif
