/* kernels/sm90a.h - Hopper's own instructions for the *_sm90a.cu files: bulk copies, mbarriers, wgmma,
 * registers.
 *
 * Under nvcc inline PTX, for sm_90a alone; otherwise the shim's emulation under the same names
 * (tests/simt/simt_sm90a.h). What uses it is off until a run on a GPU is recorded. wgmma: D[64, N] f32 +=
 * A[64, 16] B[16, N], by one warpgroup; warp w holds rows 16 w up, its part of D and of A (registers) laid
 * out as in mma.m16n8k16. Matrices in shared memory: 128-byte rows, pieces of 16 bytes exchanged by row % 8,
 * 8 rows to a group of 1024 bytes, groups aligned. "Along K": a row is one row of A or one column of B with
 * 64 values of k. "Across K": a row is one k with 64 columns of B. Source: PTX ISA 8.7, sections on wgmma,
 * mbarrier and cp.async.bulk. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_SM90A_H
#define TD_KERNELS_SM90A_H

#include "kernels/td_cuda.h"

/* The host's pass must see the kernels' text, too; only the device's assembles it. */
#define TD_SM90 static __device__ __forceinline__

#ifdef __CUDACC__
#include <cuda.h>
#include <cudaTypedefs.h>

TD_SM90 void sm90_barrier_init(uint64_t *b, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(td_smem_u32(b)), "r"(count) : "memory");
}
/* After the inits, before other threads or copies use the barriers. */
TD_SM90 void sm90_barrier_fence()
{
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
TD_SM90 void sm90_arrive(uint64_t *b)
{
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(td_smem_u32(b)) : "memory");
}
/* Arrives and announces bytes that copies will bring. */
TD_SM90 void sm90_expect(uint64_t *b, int bytes)
{
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(td_smem_u32(b)), "r"(bytes)
                 : "memory");
}
TD_SM90 void sm90_wait(uint64_t *b, int parity)
{
    asm volatile("{.reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra done; "
                 "bra again; done:}" ::"r"(td_smem_u32(b)),
                 "r"(parity)
                 : "memory");
}
/* bytes: a multiple of 16, both sides aligned to 16. */
TD_SM90 void sm90_copy(void *smem, const void *gmem, int bytes, uint64_t *b)
{
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
            td_smem_u32(smem)),
        "l"(gmem), "r"(bytes), "r"(td_smem_u32(b))
        : "memory");
}
TD_SM90 void sm90_copy_box(void *smem, const CUtensorMap *map, int x, int y, uint64_t *b)
{
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], "
                 "[%1, {%2, %3}], [%4];" ::"r"(td_smem_u32(smem)),
                 "l"(map), "r"(x), "r"(y), "r"(td_smem_u32(b))
                 : "memory");
}
/* Ordinary stores to shared memory become visible to wgmma. */
TD_SM90 void sm90_fence_stores()
{
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
TD_SM90 void sm90_bar_sync(int id, int threads)
{
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
TD_SM90 void sm90_bar_arrive(int id, int threads)
{
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
template <int N> TD_SM90 void sm90_fewer_registers()
{
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N));
}
template <int N> TD_SM90 void sm90_more_registers()
{
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N));
}

/* Before the first wgmma after registers of D or A were written by other instructions. */
TD_SM90 void sm90_mma_fence()
{
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
TD_SM90 void sm90_mma_commit()
{
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int N> TD_SM90 void sm90_mma_wait()
{
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
/* Values are final here: the compiler moves no use or definition of them across. Before a fence for what the
 * products read, after a wait for what they made. */
template <int N> TD_SM90 void sm90_hold(float (&d)[N])
{
#pragma unroll
    for (int i = 0; i < N; i++) asm volatile("" : "+f"(d[i])::"memory");
}
template <int N> TD_SM90 void sm90_hold(uint32_t (&d)[N][4])
{
#pragma unroll
    for (int i = 0; i < N; i++)
        asm volatile("" : "+r"(d[i][0]), "+r"(d[i][1]), "+r"(d[i][2]), "+r"(d[i][3])::"memory");
}

/* rs: A from registers, ss: from shared memory; t: B across K. accumulate 0: D is overwritten. */
#define SM90_D8(d, i)                                                                                        \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]),              \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define SM90_D32(d, i) SM90_D8(d, i), SM90_D8(d, i + 8), SM90_D8(d, i + 16), SM90_D8(d, i + 24)
#define SM90_P32                                                                                             \
    "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "                                 \
    "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SM90_P64                                                                                             \
    SM90_P32 ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "            \
             "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
/* scale: the operand that accumulate is; ab: A and B. Neither is negated. */
#define SM90_MMA(n, d, ab, scale, transposed)                                                                \
    "{.reg .pred p; setp.ne.b32 p, " scale ", 0; wgmma.mma_async.sync.aligned.m64n" n                        \
    "k16.f32.bf16.bf16 {" d "}, " ab ", p, 1, 1, " transposed ";}"
#define SM90_A(a) "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])

TD_SM90 void sm90_mma_n128_ss(float (&d)[64], uint64_t a, uint64_t b, int accumulate)
{
    asm volatile(SM90_MMA("128", SM90_P64, "%64, %65", "%66", "0, 0")
                 : SM90_D32(d, 0), SM90_D32(d, 32)
                 : "l"(a), "l"(b), "r"(accumulate));
}
TD_SM90 void sm90_mma_n128_rs(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate)
{
    asm volatile(SM90_MMA("128", SM90_P64, "{%64, %65, %66, %67}, %68", "%69", "0")
                 : SM90_D32(d, 0), SM90_D32(d, 32)
                 : SM90_A(a), "l"(b), "r"(accumulate));
}
TD_SM90 void sm90_mma_n128_rs_t(float (&d)[64], const uint32_t (&a)[4], uint64_t b, int accumulate)
{
    asm volatile(SM90_MMA("128", SM90_P64, "{%64, %65, %66, %67}, %68", "%69", "1")
                 : SM90_D32(d, 0), SM90_D32(d, 32)
                 : SM90_A(a), "l"(b), "r"(accumulate));
}
TD_SM90 void sm90_mma_n64_rs_t(float (&d)[32], const uint32_t (&a)[4], uint64_t b, int accumulate)
{
    asm volatile(SM90_MMA("64", SM90_P32, "{%32, %33, %34, %35}, %36", "%37", "1")
                 : SM90_D32(d, 0)
                 : SM90_A(a), "l"(b), "r"(accumulate));
}
#endif

/* Matrix along K: p is its first row (or 32 bytes further per 16 values of k). */
TD_SM90 uint64_t sm90_along_k(const void *p)
{
    return (uint64_t)((td_smem_u32(p) & 0x3ffffu) >> 4) | (uint64_t)1 << 16 | (uint64_t)(1024 >> 4) << 32 |
           (uint64_t)1 << 62;
}
/* Matrix across K: p is its first k; `next` bytes further lie the next 64 columns. */
TD_SM90 uint64_t sm90_across_k(const void *p, int next)
{
    return (uint64_t)((td_smem_u32(p) & 0x3ffffu) >> 4) | (uint64_t)(next >> 4) << 16 |
           (uint64_t)(1024 >> 4) << 32 | (uint64_t)1 << 62;
}

#endif
