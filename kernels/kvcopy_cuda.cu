// SPDX-License-Identifier: Apache-2.0
/* kernels/kvcopy_cuda.cu - pages to shipping payload and back, pages to pages. Pure copies in the widest unit
 * (16, 8, 4 or 2 bytes) that divides a token's row of one head; a block copies one (slot, k|v, head) side by
 * side over its tokens. */
#include "kernels/cuda.h"
#include "kernels/td_cuda.h"

enum { COPY_THREADS = 256, COPY_UNITS = 4 * COPY_THREADS };

struct rows_args {
    char *base;
    const int32_t *row;
    char *payload;
    uint32_t n_tok, P, row_units;         /* row_units: units of one token in one head */
    int slot0, n_pages, G, head0, n_heads;
};

/* grid: (chunks of COPY_UNITS units, 2 n_heads, slots) */
// limits: regs 40, spill 0, smem 0
template <class U, bool GATHER>
static __global__ void __launch_bounds__(COPY_THREADS) kv_rows(const __grid_constant__ rows_args a)
{
    const size_t slot = blockIdx.z, side = blockIdx.y; /* of the payload: heads of K, heads of V */
    const size_t in_pool = side < (size_t)a.n_heads ? a.head0 + side : a.G + a.head0 + (side - a.n_heads);
    const size_t head_units = (size_t)a.n_tok * a.row_units, page_units = (size_t)a.P * a.row_units;
    U *flat = reinterpret_cast<U *>(a.payload) + (slot * 2 * a.n_heads + side) * head_units;
    for (int k = 0; k < COPY_UNITS / COPY_THREADS; k++) {
        const uint32_t u = blockIdx.x * COPY_UNITS + k * COPY_THREADS + threadIdx.x; /* fits: see run_rows */
        if (u >= head_units) return;
        const uint32_t row = (uint32_t)a.row[u / a.row_units];
        const size_t page = ((size_t)a.slot0 + slot) * a.n_pages + row / a.P;
        U *in_page = reinterpret_cast<U *>(a.base) + (page * 2 * a.G + in_pool) * page_units +
                     (size_t)(row % a.P) * a.row_units + u % a.row_units;
        if (GATHER)
            flat[u] = *in_page;
        else
            *in_page = flat[u];
    }
}

static size_t row_bytes(const td_kv *kv)
{
    return (size_t)kv->D * td_dtype_bytes(kv->dtype);
}

/* The unit that divides the row and both addresses. */
static size_t unit_of(size_t row, const void *a, const void *b)
{
    uintptr_t all = (uintptr_t)row | (uintptr_t)a | (uintptr_t)b;
    return all % 16 == 0 ? 16 : all % 8 == 0 ? 8 : all % 4 == 0 ? 4 : 2;
}

template <bool GATHER> static int run_rows(cudaStream_t s, const td_kv_rows *r, char *payload)
{
    const td_kv *kv = r->kv;
    if (r->n_tok == 0 || r->n_slots == 0 || r->n_heads == 0) return 0;
    if (r->n_slots < 0 || r->n_slots > 65535 || r->head0 < 0 || r->n_heads < 0 || r->n_heads > 32767 ||
        r->head0 + r->n_heads > kv->G)
        return cudaErrorInvalidValue;
    size_t unit = unit_of(row_bytes(kv), kv->base, payload), units = row_bytes(kv) / unit * r->n_tok;
    if (units > UINT32_MAX - COPY_UNITS) return cudaErrorInvalidValue;
    rows_args a = {(char *)kv->base, r->row,      payload, r->n_tok, (uint32_t)kv->P, (uint32_t)(row_bytes(kv) / unit),
                   r->slot0,         kv->n_pages, kv->G,   r->head0, r->n_heads};
    dim3 grid((unsigned)((units + COPY_UNITS - 1) / COPY_UNITS), (unsigned)(2 * r->n_heads), (unsigned)r->n_slots);
    switch (unit) {
    case 16:
        return td_launch(kv_rows<uint4, GATHER>, grid, COPY_THREADS, 0, s, a);
    case 8:
        return td_launch(kv_rows<uint2, GATHER>, grid, COPY_THREADS, 0, s, a);
    case 4:
        return td_launch(kv_rows<unsigned, GATHER>, grid, COPY_THREADS, 0, s, a);
    default:
        return td_launch(kv_rows<unsigned short, GATHER>, grid, COPY_THREADS, 0, s, a);
    }
}

extern "C" size_t td_cuda_rows_bytes(const td_kv_rows *r)
{
    return 2 * (size_t)r->n_slots * (size_t)r->n_heads * r->n_tok * row_bytes(r->kv);
}

extern "C" int td_cuda_kv_gather(td_stream s, const td_kv_rows *r, void *payload)
{
    return run_rows<true>((cudaStream_t)s, r, (char *)payload);
}

extern "C" int td_cuda_kv_scatter(td_stream s, const td_kv_rows *r, const void *payload)
{
    return run_rows<false>((cudaStream_t)s, r, (char *)payload);
}

struct copy_args {
    char *dst;
    const char *src;
    const int32_t *to, *from;
    int dst_pages, src_pages;
    size_t page_units;
};

/* grid: (chunks of a page, pages, slots) */
// limits: regs 32, spill 0, smem 0
template <class U>
static __global__ void __launch_bounds__(COPY_THREADS) kv_pages(const __grid_constant__ copy_args a)
{
    const size_t to = (size_t)blockIdx.z * a.dst_pages + a.to[blockIdx.y],
                 from = (size_t)blockIdx.z * a.src_pages + a.from[blockIdx.y];
    for (int k = 0; k < COPY_UNITS / COPY_THREADS; k++) {
        const size_t u = (size_t)blockIdx.x * COPY_UNITS + k * COPY_THREADS + threadIdx.x;
        if (u >= a.page_units) return;
        reinterpret_cast<U *>(a.dst)[to * a.page_units + u] =
            reinterpret_cast<const U *>(a.src)[from * a.page_units + u];
    }
}

extern "C" int td_cuda_kv_copy(td_stream s, const td_kv *dst, const int32_t *to, const td_kv *src,
                               const int32_t *from, int n, int n_slots)
{
    if (n == 0 || n_slots == 0) return 0;
    if (dst->P != src->P || dst->G != src->G || dst->D != src->D || dst->dtype != src->dtype || n > 65535 ||
        n_slots > 65535)
        return cudaErrorInvalidValue;
    size_t bytes = td_kv_page_bytes(dst), unit = unit_of(bytes, dst->base, src->base);
    copy_args a = {(char *)dst->base, (const char *)src->base, to, from, dst->n_pages, src->n_pages,
                   bytes / unit};
    dim3 grid((unsigned)((a.page_units + COPY_UNITS - 1) / COPY_UNITS), (unsigned)n, (unsigned)n_slots);
    switch (unit) {
    case 16:
        return td_launch(kv_pages<uint4>, grid, COPY_THREADS, 0, (cudaStream_t)s, a);
    case 8:
        return td_launch(kv_pages<uint2>, grid, COPY_THREADS, 0, (cudaStream_t)s, a);
    case 4:
        return td_launch(kv_pages<unsigned>, grid, COPY_THREADS, 0, (cudaStream_t)s, a);
    default:
        return td_launch(kv_pages<unsigned short>, grid, COPY_THREADS, 0, (cudaStream_t)s, a);
    }
}
