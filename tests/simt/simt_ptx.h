/* tests/simt/simt_ptx.h - the wrappers of instructions in kernels/td_cuda.h, under their names. Part of simt.h. */
// SPDX-License-Identifier: Apache-2.0
#pragma once

// D(16x8,f32) = A(16x16,bf16 or f16,row) * B(16x8,bf16,col) + C; registers
// exactly as in the PTX manual's fragment figures.
#define SIMT_MMA(NAME, K)                                                                                    \
    inline void NAME(float(&d)[4], const uint32_t(&a)[4], const uint32_t(&b)[2], const float(&c)[4],         \
                     SIMT_AT)                                                                                \
    {                                                                                                        \
        simt::Fiber *f = simt::cur;                                                                          \
        memcpy(f->in, a, 16);                                                                                \
        memcpy(f->in + 4, b, 8);                                                                             \
        memcpy(f->in + 6, c, 16);                                                                            \
        simt::warp_op(simt::K, 0xffffffffu, line, file);                                                     \
        memcpy(d, f->out, 16);                                                                               \
    }
SIMT_MMA(td_mma_m16n8k16_bf16, MMABF)
SIMT_MMA(td_mma_m16n8k16_f16, MMAF16)
#undef SIMT_MMA
#define SIMT_LDM(NAME, N, K)                                                                                 \
    inline void NAME(uint32_t(&r)[N], const void *p, SIMT_AT)                                                \
    {                                                                                                        \
        simt::Fiber *f = simt::cur;                                                                          \
        memcpy(f->in, &p, 8);                                                                                \
        simt::warp_op(simt::K, 0xffffffffu, line, file);                                                     \
        memcpy(r, f->out, 4 * N);                                                                            \
    }
    SIMT_LDM(td_ldmatrix_x1, 1, LDM1) SIMT_LDM(td_ldmatrix_x2, 2, LDM2) SIMT_LDM(td_ldmatrix_x4, 4, LDM4)
        SIMT_LDM(td_ldmatrix_x1_trans, 1, LDM1T) SIMT_LDM(td_ldmatrix_x2_trans, 2, LDM2T)
            SIMT_LDM(td_ldmatrix_x4_trans, 4, LDM4T)
#undef SIMT_LDM
                inline void td_cp_async_16(void *smem, const void *gmem, bool pred = true,
                                           int line = __builtin_LINE())
{
    simt::cp_async(smem, gmem, 16, pred ? 16 : 0, line);
}
inline void td_cp_async_8(void *smem, const void *gmem, bool pred = true, int line = __builtin_LINE())
{
    simt::cp_async(smem, gmem, 8, pred ? 8 : 0, line);
}
inline void td_cp_async_4(void *smem, const void *gmem, bool pred = true, int line = __builtin_LINE())
{
    simt::cp_async(smem, gmem, 4, pred ? 4 : 0, line);
}
inline void td_cp_async_commit()
{
    simt::cp_commit();
}
template <int N> inline void td_cp_async_wait()
{
    simt::cp_wait(N);
}
inline float td_exp2(float x)
{
    return ::exp2f(x);
}
inline uint4 td_ld_stream(const void *p)
{
    return *(const uint4 *)p;
}
inline uint2 td_ld_stream8(const void *p)
{
    return *(const uint2 *)p;
}
inline void td_grid_wait()
{
    simt::grid_wait();
}
inline void td_grid_launch() {}
#define TD_ACQUIRE_ALL() simt::acquire_all()
