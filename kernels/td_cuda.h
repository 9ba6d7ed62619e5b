/* kernels/td_cuda.h - the one include of every .cu file: real CUDA and inline PTX under nvcc; otherwise the shim, which
 * the build puts in front (-include tests/simt/simt.h) and which has every name below.
 *
 * Rules:   1. Kernels hold no inline PTX and no #ifdef: what differs is here, in a named function with an emulation.
 *          2. Launch with td_launch only; dynamic shared memory with TD_DYN_SMEM only, one per kernel.
 *          3. Warp functions (mma, ldmatrix, shuffles) are reached by all lanes of their mask at one source line.
 *          4. nvcc runs with -fmad=false: a fused multiply-add is written fmaf(), as in the rest of the project.
 *          5. Nothing below exists only on Hopper: files for sm_90a alone have an include of their own.
 *          6. A kernel of td_launch_next may start while those before it still run. So every thread of it calls
 *             td_grid_wait: before it ends, before it reads what a kernel may have written, and before it writes
 *             global memory. Weights, and what was uploaded before the step's first kernel, may be read earlier.
 *             td_grid_launch comes first thing: from there on, once all blocks have begun, the next kernel may
 *             start. The shim checks it.
 * Shapes:  mma: D[16,8] f32 = A[16,16] row * B[16,8] col + C, registers as in the PTX manual's m16n8k16 figures: lane l,
 *          g = l / 4, t = l % 4; a[i] = A[g + 8 (i & 1)][2t.. + 8 (i >> 1)], b[i] = B[2t.. + 8 i][g],
 *          c[i] = C[g + 8 (i >> 1)][2t + (i & 1)].
 *          ldmatrix: lane l gives the address of row l % 8 of matrix l / 8 (16 bytes, 16-byte aligned, shared). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_TD_CUDA_H
#define TD_KERNELS_TD_CUDA_H

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>

#define TD_DYN_SMEM(T, name)                                                                               \
    extern __shared__ __align__(128) unsigned char td_dyn_smem_raw[];                                      \
    T *name = reinterpret_cast<T *>(td_dyn_smem_raw)
#define TD_DEV __device__ __forceinline__
/* Tells the shim's race checker that a fence and an atomic handshake with other blocks have happened. */
#define TD_ACQUIRE_ALL() ((void)0)

TD_DEV unsigned td_smem_u32(const void *p)
{
    return (unsigned)__cvta_generic_to_shared(p);
}

TD_DEV void td_mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                 const float (&c)[4])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
                 "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};\n"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
                   "f"(c[2]), "f"(c[3]));
}

TD_DEV void td_mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                                const float (&c)[4])
{
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
                 "{%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%10,%11,%12,%13};\n"
                 : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
                   "f"(c[2]), "f"(c[3]));
}

#define TD_LDMATRIX_1(name, op)                                                                            \
    TD_DEV void name(uint32_t (&r)[1], const void *p)                                                      \
    {                                                                                                      \
        asm volatile(op " {%0},[%1];\n" : "=r"(r[0]) : "r"(td_smem_u32(p)) : "memory");                    \
    }
#define TD_LDMATRIX_2(name, op)                                                                            \
    TD_DEV void name(uint32_t (&r)[2], const void *p)                                                      \
    {                                                                                                      \
        asm volatile(op " {%0,%1},[%2];\n" : "=r"(r[0]), "=r"(r[1]) : "r"(td_smem_u32(p)) : "memory");     \
    }
#define TD_LDMATRIX_4(name, op)                                                                            \
    TD_DEV void name(uint32_t (&r)[4], const void *p)                                                      \
    {                                                                                                      \
        asm volatile(op " {%0,%1,%2,%3},[%4];\n"                                                           \
                     : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])                                      \
                     : "r"(td_smem_u32(p))                                                                 \
                     : "memory");                                                                          \
    }
TD_LDMATRIX_1(td_ldmatrix_x1, "ldmatrix.sync.aligned.m8n8.x1.shared.b16")
TD_LDMATRIX_2(td_ldmatrix_x2, "ldmatrix.sync.aligned.m8n8.x2.shared.b16")
TD_LDMATRIX_4(td_ldmatrix_x4, "ldmatrix.sync.aligned.m8n8.x4.shared.b16")
TD_LDMATRIX_1(td_ldmatrix_x1_trans, "ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16")
TD_LDMATRIX_2(td_ldmatrix_x2_trans, "ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16")
TD_LDMATRIX_4(td_ldmatrix_x4_trans, "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16")

/* Global to shared, 16, 8 or 4 bytes, both sides aligned to as many; !pred: zeros, the source is not read. */
TD_DEV void td_cp_async_16(void *smem, const void *gmem, bool pred = true)
{
    asm volatile("cp.async.cg.shared.global [%0],[%1],16,%2;\n" ::"r"(td_smem_u32(smem)), "l"(gmem),
                 "r"(pred ? 16 : 0)
                 : "memory");
}
TD_DEV void td_cp_async_8(void *smem, const void *gmem, bool pred = true)
{
    asm volatile("cp.async.ca.shared.global [%0],[%1],8,%2;\n" ::"r"(td_smem_u32(smem)), "l"(gmem),
                 "r"(pred ? 8 : 0)
                 : "memory");
}
TD_DEV void td_cp_async_4(void *smem, const void *gmem, bool pred = true)
{
    asm volatile("cp.async.ca.shared.global [%0],[%1],4,%2;\n" ::"r"(td_smem_u32(smem)), "l"(gmem),
                 "r"(pred ? 4 : 0)
                 : "memory");
}
TD_DEV void td_cp_async_commit()
{
    asm volatile("cp.async.commit_group;\n" ::: "memory");
}
/* At most N of this thread's groups are still on their way; other threads' copies need a barrier after it. */
template <int N> TD_DEV void td_cp_async_wait()
{
    asm volatile("cp.async.wait_group %0;\n" ::"n"(N) : "memory");
}

/* 2^x, 2 ulp, denormal results flushed; the special function unit. */
TD_DEV float td_exp2(float x)
{
    float y;
    asm("ex2.approx.ftz.f32 %0,%1;" : "=f"(y) : "f"(x));
    return y;
}

/* 16 and 8 bytes that are read once: past L1, evicted first. */
TD_DEV uint4 td_ld_stream(const void *p)
{
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3},[%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p));
    return v;
}
TD_DEV uint2 td_ld_stream8(const void *p)
{
    uint2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0,%1},[%2];" : "=r"(v.x), "=r"(v.y) : "l"(p));
    return v;
}

/* See td_launch_next: wait for the kernels before this one; let the next one start. Hopper; nothing before it. */
TD_DEV void td_grid_wait()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
TD_DEV void td_grid_launch()
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
inline bool td_overlaps = false; /* set with the device (dev_cuda.cu) */
#elif !defined(SIMT_SHIM)
#error "compile .cu files with nvcc, or with the shim in front: -include tests/simt/simt.h"
#else
#define TD_DEV inline
inline bool td_overlaps = true; /* the shim holds kernels to the rules of td_launch_next */
#endif

/* An ordinary function template in both worlds; the error is returned (and is not sticky for a bad argument). */
template <class... P, class... A>
inline cudaError_t td_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem, cudaStream_t stream,
                             A &&...args)
{
    cudaLaunchConfig_t c{};
    c.gridDim = grid;
    c.blockDim = block;
    c.dynamicSmemBytes = smem;
    c.stream = stream;
    return cudaLaunchKernelEx(&c, kernel, static_cast<A &&>(args)...);
}

/* The same with more than 48 KiB of dynamic shared memory: raises the kernel's limit first. */
template <class... P, class... A>
inline cudaError_t td_launch_big(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem,
                                 cudaStream_t stream, A &&...args)
{
    if (smem > 48 * 1024) {
        cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem);
        if (e != cudaSuccess) return e;
    }
    return td_launch(kernel, grid, block, smem, stream, static_cast<A &&>(args)...);
}

/* The same, and where td_overlaps holds the kernel may start before the one before it has ended (rule 6). */
template <class... P, class... A>
inline cudaError_t td_launch_next(void (*kernel)(P...), dim3 grid, dim3 block, size_t smem,
                                  cudaStream_t stream, A &&...args)
{
    if (smem > 48 * 1024) {
        cudaError_t e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)smem);
        if (e != cudaSuccess) return e;
    }
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    cudaLaunchConfig_t c{};
    c.gridDim = grid;
    c.blockDim = block;
    c.dynamicSmemBytes = smem;
    c.stream = stream;
    c.attrs = &early;
    c.numAttrs = td_overlaps ? 1 : 0;
    return cudaLaunchKernelEx(&c, kernel, static_cast<A &&>(args)...);
}

/* For a kernel of small blocks that wants many of them on an SM: the driver may split an SM's memory so that fewer
 * have their shared memory there. Before its launch. */
template <class... P> inline cudaError_t td_shared_before_l1(void (*kernel)(P...))
{
    return cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, 100 /* percent */);
}

/* The sum over the 32 lanes, same bits in every lane: one butterfly, widest first. */
TD_DEV float td_warp_sum(float v)
{
    for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    return v;
}

#endif
