/* tests/simt/simt_sm90a.h - Hopper's instructions on the CPU: every wrapper of kernels/sm90a.h under its
 * name, and what a launcher asks of the driver for a tensor map. Written from the text of the PTX ISA 9.0,
 * not from the kernels; runtime in simt_sm90a.cpp, where each part names its section.
 *
 * Model:   What is asynchronous happens as late as the ISA allows, and what must not be looked at meanwhile is
 *          poisoned.
 *          Bulk copies: the destination is poisoned at once and filled when no thread can go on (option "eager":
 *          at once), in the order of asking, backwards or at random as "order" says.
 *          wgmma: at the wait that covers it, by each warp for itself (warps of a warpgroup drift as on a
 *          device); until then its accumulator, and A's registers, hold poison, and whoever changes them is
 *          told. Matrices in shared memory are read then.
 * Seen:    - waits, arrivals, bytes, commits, fences that are missing; wrong parity
 *          - descriptors with bits that mean nothing; warps of a warpgroup that issue different things
 *          - registers that setmaxnreg cannot give; bytes over an mbarrier; copies that outlive their block
 *          - check mode: the order of accesses by mbarriers and named barriers, fence.proxy.async
 * Stricter than the ISA: stores are fenced by the thread that made them; every wait that completes products calls
 *          for a wgmma.fence before the next one.
 * Not covered: clusters and multicast; other types and shapes than the wrappers'; tensor maps of other than two
 *          dimensions; a wait that is a whole turn late (parity repeats).
 * Plants:  option "plant": the instruction of that kind does what it would if the kernel had the mistake. */
// SPDX-License-Identifier: Apache-2.0
#pragma once

// ---------------------------------------------------------------- cuda.h, as far as a launcher needs it
using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
struct alignas(64) CUtensorMap {
    cuuint64_t opaque[16];
};
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1, CUDA_ERROR_NOT_SUPPORTED = 801 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_FLOAT16 = 6, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE };
enum CUtensorMapSwizzle {
    CU_TENSOR_MAP_SWIZZLE_NONE,
    CU_TENSOR_MAP_SWIZZLE_32B,
    CU_TENSOR_MAP_SWIZZLE_64B,
    CU_TENSOR_MAP_SWIZZLE_128B
};
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE };
using PFN_cuTensorMapEncodeTiled_v12000 = CUresult (*)(CUtensorMap *, CUtensorMapDataType, cuuint32_t rank,
                                                       void *, const cuuint64_t *dim,
                                                       const cuuint64_t *stride, const cuuint32_t *box,
                                                       const cuuint32_t *step, CUtensorMapInterleave,
                                                       CUtensorMapSwizzle, CUtensorMapL2promotion,
                                                       CUtensorMapFloatOOBfill);
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess, cudaDriverEntryPointSymbolNotFound };
enum { cudaEnableDefault = 0 };
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **entry, unsigned version,
                                             unsigned long long flags,
                                             cudaDriverEntryPointQueryResult *found);

namespace simt
{
struct Mma {
    float *d; // of this lane: n / 2 sums
    int n;
    uint32_t *a; // four registers, or NULL: desc_a
    uint64_t desc_a, desc_b;
    int trans_b, accumulate;
};
uint32_t smem_u32(const void *p);
void mbar_init(uint64_t *b, int count, int line, const char *file);
void mbar_arrive(uint64_t *b, int expect, int line, const char *file); // expect -1: plain
void mbar_wait(uint64_t *b, int parity, int line, const char *file);
void bulk_copy(void *smem, const void *gmem, int bytes, uint64_t *b, int line);
void bulk_box(void *smem, const CUtensorMap *map, int x, int y, uint64_t *b, int line);
void fence_stores();
void bar_sync(int id, int threads, bool wait, int line, const char *file);
void set_registers(int n, bool more, int line, const char *file);
void mma_fence(int line, const char *file);
void mma_commit(int line, const char *file);
void mma_wait(int n, int line, const char *file);
void mma_issue(const Mma &m, int line, const char *file);
} // namespace simt

// ---------------------------------------------------------------- the wrappers
inline uint32_t td_smem_u32(const void *p)
{
    return simt::smem_u32(p);
}
inline void sm90_barrier_init(uint64_t *b, int count, SIMT_AT)
{
    simt::mbar_init(b, count, line, file);
}
inline void sm90_barrier_fence() {}
inline void sm90_arrive(uint64_t *b, SIMT_AT)
{
    simt::mbar_arrive(b, -1, line, file);
}
inline void sm90_expect(uint64_t *b, int bytes, SIMT_AT)
{
    simt::mbar_arrive(b, bytes, line, file);
}
inline void sm90_wait(uint64_t *b, int parity, SIMT_AT)
{
    simt::mbar_wait(b, parity, line, file);
}
inline void sm90_copy(void *smem, const void *gmem, int bytes, uint64_t *b, int line = __builtin_LINE())
{
    simt::bulk_copy(smem, gmem, bytes, b, line);
}
inline void sm90_copy_box(void *smem, const CUtensorMap *map, int x, int y, uint64_t *b,
                          int line = __builtin_LINE())
{
    simt::bulk_box(smem, map, x, y, b, line);
}
inline void sm90_fence_stores()
{
    simt::fence_stores();
}
inline void sm90_bar_sync(int id, int threads, SIMT_AT)
{
    simt::bar_sync(id, threads, true, line, file);
}
inline void sm90_bar_arrive(int id, int threads, SIMT_AT)
{
    simt::bar_sync(id, threads, false, line, file);
}
template <int N> inline void sm90_fewer_registers(SIMT_AT)
{
    static_assert(N >= 24 && N <= 256 && N % 8 == 0, "setmaxnreg");
    simt::set_registers(N, false, line, file);
}
template <int N> inline void sm90_more_registers(SIMT_AT)
{
    static_assert(N >= 24 && N <= 256 && N % 8 == 0, "setmaxnreg");
    simt::set_registers(N, true, line, file);
}
inline void sm90_mma_fence(SIMT_AT)
{
    simt::mma_fence(line, file);
}
inline void sm90_mma_commit(SIMT_AT)
{
    simt::mma_commit(line, file);
}
template <int N> inline void sm90_mma_wait(SIMT_AT)
{
    simt::mma_wait(N, line, file);
}
template <int N> inline void sm90_hold(float (&)[N]) {}
template <int N> inline void sm90_hold(uint32_t (&)[N][4]) {}
inline void sm90_mma_n128_ss(float (&d)[64], uint64_t a, uint64_t b, int accumulate, SIMT_AT)
{
    simt::mma_issue({d, 128, nullptr, a, b, 0, accumulate}, line, file);
}
inline void sm90_mma_n128_rs(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate, SIMT_AT)
{
    simt::mma_issue({d, 128, const_cast<uint32_t *>(a), 0, b, 0, accumulate}, line, file);
}
inline void sm90_mma_n128_rs_t(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate, SIMT_AT)
{
    simt::mma_issue({d, 128, const_cast<uint32_t *>(a), 0, b, 1, accumulate}, line, file);
}
inline void sm90_mma_n64_rs_t(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate, SIMT_AT)
{
    simt::mma_issue({d, 64, const_cast<uint32_t *>(a), 0, b, 1, accumulate}, line, file);
}
