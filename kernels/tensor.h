/* kernels/tensor.h - element types, non-owning views, and the dimension letters used in every comment.
 *
 *   B sequences in a step   T rows (tokens) in a step   L layers       E hidden size
 *   H query heads           G kv heads                  V vocabulary   D head dimension
 *   F feed-forward size     P tokens per page           N, K a weight's rows and columns
 */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_TENSOR_H
#define TD_KERNELS_TENSOR_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* E4M3: 8-bit floats (fn: no infinity, 0x7f and 0xff are NaN), of weights only, always with scales. */
typedef enum { TD_F32, TD_BF16, TD_F16, TD_E4M3 } td_dtype;

static inline size_t td_dtype_bytes(td_dtype t) { return t == TD_F32 ? 4 : t == TD_E4M3 ? 1 : 2; }
const char *td_dtype_name(td_dtype t); /* "f32", "bf16", "f16", "e4m3" */

static inline float td_bf16_to_f32(uint16_t v)
{
    uint32_t u = (uint32_t)v << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}
/* Round to nearest even; NaN stays NaN; denormal results flush to zero, as the hardware's conversion does. */
static inline uint16_t td_f32_to_bf16(float f)
{
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((u >> 16) | 0x40u);
    if (!(u & 0x7f800000u)) return (uint16_t)((u >> 16) & 0x8000u);
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}
float td_f16_to_f32(uint16_t v);
uint16_t td_f32_to_f16(float f);
float td_e4m3_to_f32(uint8_t code);   /* exact; 0x7f, 0xff: NaN */
uint8_t td_f32_to_e4m3(float f);      /* to nearest even; over 448: 448, infinity too; NaN: NaN */
void td_convert(void *dst, td_dtype to, const void *src, td_dtype from, size_t n); /* element-wise, RNE */

/* y[N] = W[N,K] x[K] + bias. `p` is in the family's own packed order (td_ops.pack), one order for every row
 * count. */
typedef struct td_weight {
    int N, K;
    td_dtype dtype;    /* of the packed elements */
    const void *p;     /* 64-byte aligned; td_ops.packed_bytes bytes; borrowed (mapped image) */
    const float *bias; /* [N] or NULL; borrowed */
    int slices;        /* 0 or 1: one sum over K; else K is cut into so many (ops.h, matrix law) */
    /* E4M3: W[n][k] = code * td_weight_scale, rounded to f32. So many rows (a power of two) and columns share a scale;
     * the scales are f32 [ceil(N / scale_rows)][ceil(K / scale_cols)], scale_at bytes behind p: a weight is one run of
     * bytes, wherever it is moved. Other types: 0. */
    int scale_rows, scale_cols;
    size_t scale_at;
    const void *rows;  /* a copy in row-major order beside p, where the family made one (td_ops.beside); else NULL */
} td_weight;

static inline const float *td_weight_scales(const td_weight *w)
{
    return w->scale_rows ? (const float *)(const void *)((const char *)w->p + w->scale_at) : NULL;
}
static inline size_t td_weight_scale_count(const td_weight *w)
{
    if (!w->scale_rows) return 0;
    return (size_t)((w->N + w->scale_rows - 1) / w->scale_rows) * (size_t)((w->K + w->scale_cols - 1) / w->scale_cols);
}

enum { TD_MAX_SLICES = 8 };

/* May K be cut into S slices? S a power of two up to TD_MAX_SLICES, slices equal and of even length. */
static inline bool td_slices_fit(int K, int S)
{
    if (S == 1) return true;
    return (S == 2 || S == 4 || S == TD_MAX_SLICES) && K > 0 && K % (2 * S) == 0;
}

/* A row-major table [N, K] of any dtype, as stored in the checkpoint (embeddings when not tied). */
typedef struct td_table {
    int N, K;
    td_dtype dtype;
    const void *p;
} td_table;

/* How one page group's keys and values lie in memory: page[k|v][G][P][D]; pages of one layer slot are
 *   contiguous:   address(slot, page) = base + (slot * n_pages + page) * td_kv_page_bytes(). */
typedef struct td_kv {
    uint8_t *base; /* 64-byte aligned */
    td_dtype dtype;
    int n_pages, P, G, D;
} td_kv;

static inline size_t td_kv_page_bytes(const td_kv *kv)
{
    return 2 * (size_t)kv->G * (size_t)kv->P * (size_t)kv->D * td_dtype_bytes(kv->dtype);
}
static inline uint8_t *td_kv_page(const td_kv *kv, int slot, int page)
{
    return kv->base + ((size_t)slot * (size_t)kv->n_pages + (size_t)page) * td_kv_page_bytes(kv);
}

#endif
