// SPDX-License-Identifier: Apache-2.0
/* kernels/embed_cuda.cu - rows out of a table, by id. An id outside [0, N) gives zeros (what a vocabulary
 * shard adds for foreign ids). */
#include "kernels/cuda.h"
#include "kernels/cuda_row.h"
#include "kernels/td_cuda.h"

// limits: regs 32, spill 0, smem 0
template <class TABLE>
static __global__ void __launch_bounds__(256)
    embed_rows(const TABLE *table, int N, int K, const int32_t *ids, float *out, size_t ldo)
{
    const int id = ids[blockIdx.x], k = blockIdx.y * 256 + threadIdx.x;
    if (k >= K) return;
    out[(size_t)blockIdx.x * ldo + k] = id >= 0 && id < N ? td_get(table + (size_t)id * K + k) : 0.f;
}

extern "C" int td_cuda_embed(td_stream s, const void *table, td_dtype dtype, int N, int K, const int32_t *ids,
                             int T, float *out, size_t ldo)
{
    if (T == 0 || K == 0) return 0;
    dim3 grid((unsigned)T, (unsigned)(K + 255) / 256);
    return td_with_type(dtype, [&](auto type) -> int {
        typedef decltype(type) TABLE;
        return td_launch(embed_rows<TABLE>, grid, 256, 0, (cudaStream_t)s, (const TABLE *)table, N, K, ids,
                         out, ldo);
    });
}

// limits: regs 32, spill 0, smem 0
static __global__ void __launch_bounds__(256)
    take_rows(const float *x, size_t ldx, const int32_t *rows, int width, float *out, size_t ldo)
{
    const int k = blockIdx.y * 256 + threadIdx.x;
    if (k < width) out[(size_t)blockIdx.x * ldo + k] = x[(size_t)rows[blockIdx.x] * ldx + k];
}

extern "C" int td_cuda_take_rows(td_stream s, const float *x, size_t ldx, const int32_t *rows, int n,
                                 int width, float *out, size_t ldo)
{
    if (n == 0 || width == 0) return 0;
    dim3 grid((unsigned)n, (unsigned)(width + 255) / 256);
    return td_launch(take_rows, grid, 256, 0, (cudaStream_t)s, x, ldx, rows, width, out, ldo);
}
