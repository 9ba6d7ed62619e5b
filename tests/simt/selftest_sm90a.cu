// SPDX-License-Identifier: Apache-2.0
#include "kernels/sm90a.h"
#include "tests/simt/selftest_sm90a.h"

static TD_DEV unsigned char *aligned(unsigned char *raw)
{
    return raw + ((1024 - (td_smem_u32(raw) & 1023)) & 1023);
}

static __global__ void box_kernel(const __grid_constant__ CUtensorMap map, hop_box b, int bytes, uint8_t *out)
{
    TD_DYN_SMEM(unsigned char, raw);
    unsigned char *smem = aligned(raw);
    uint64_t *bar = (uint64_t *)(smem + HOP_BOX_BYTES);
    for (int i = (int)threadIdx.x; i < HOP_BOX_BYTES; i += 32) smem[i] = 0xee;
    if (threadIdx.x == 0) {
        sm90_barrier_init(bar, 1);
        sm90_barrier_fence();
    }
    sm90_fence_stores();
    __syncthreads();
    if (threadIdx.x == 0) {
        sm90_expect(bar, bytes);
        sm90_copy_box(smem + b.shift, &map, b.x, b.y, bar);
    }
    sm90_wait(bar, 0);
    for (int i = (int)threadIdx.x; i < HOP_BOX_BYTES; i += 32) out[i] = smem[i];
}

int hop_copy_box(void *stream, const hop_box *b, uint8_t *out)
{
    static const CUtensorMapSwizzle swizzles[] = {CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_SWIZZLE_32B,
                                                  CU_TENSOR_MAP_SWIZZLE_64B, CU_TENSOR_MAP_SWIZZLE_NONE,
                                                  CU_TENSOR_MAP_SWIZZLE_128B};
    void *entry = nullptr;
    cudaDriverEntryPointQueryResult found;
    cudaError_t e =
        cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &entry, 12000, cudaEnableDefault, &found);
    if (e != cudaSuccess || found != cudaDriverEntryPointSuccess) return (int)cudaErrorNotSupported;
    CUtensorMap map;
    cuuint64_t dim[2] = {(cuuint64_t)b->cols, (cuuint64_t)b->rows}, stride[1] = {(cuuint64_t)b->pitch};
    cuuint32_t box[2] = {(cuuint32_t)b->box_cols, (cuuint32_t)b->box_rows},
               step[2] = {1, (cuuint32_t)b->step};
    if (((PFN_cuTensorMapEncodeTiled_v12000)entry)(
            &map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, const_cast<void *>(b->tensor), dim, stride, box, step,
            CU_TENSOR_MAP_INTERLEAVE_NONE, swizzles[b->swizzle / 32], CU_TENSOR_MAP_L2_PROMOTION_NONE,
            CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
        return (int)cudaErrorInvalidValue;
    const int bytes = (b->box_rows + b->step - 1) / b->step * b->box_cols * 2;
    return (int)td_launch(box_kernel, dim3(1), dim3(32), (size_t)(HOP_BOX_BYTES + 1024 + 8),
                          (cudaStream_t)stream, map, *b, bytes, out);
}

/* This lane's part of A, of rows 16 w up. */
static TD_DEV void load_a(uint32_t (&f)[4], const uint16_t *a)
{
    const int row = (int)threadIdx.x / 32 * 16 + (int)threadIdx.x % 32 / 4, k = (int)threadIdx.x % 4 * 2;
    for (int i = 0; i < 4; i++) {
        const uint16_t *p = a + (row + i % 2 * 8) * 16 + k + i / 2 * 8;
        f[i] = (uint32_t)p[0] | (uint32_t)p[1] << 16;
    }
}
static TD_DEV float *sum_at(float *d, int i)
{
    const int row = (int)threadIdx.x / 32 * 16 + (int)threadIdx.x % 32 / 4 + i / 2 % 2 * 8;
    return d + row * 128 + i / 4 * 8 + (int)threadIdx.x % 4 * 2 + i % 2;
}
static TD_DEV void load_image(unsigned char *to, const uint8_t *from)
{
    for (int i = (int)threadIdx.x * 16; i < HOP_IMAGE_BYTES; i += 128 * 16)
        *(uint4 *)(to + i) = *(const uint4 *)(from + i);
}
static TD_DEV uint64_t address_of(const void *p)
{
    return (td_smem_u32(p) & 0x3ffffu) >> 4;
}

template <int WHAT>
static __global__ void __launch_bounds__(128)
    mma_kernel(hop_mma m, const uint8_t *a_image, uint64_t a_desc, float *d)
{
    TD_DYN_SMEM(unsigned char, raw);
    unsigned char *b = aligned(raw), *a = b + HOP_IMAGE_BYTES;
    float acc[64];
    uint32_t f[1][4];
    load_image(b, m.image);
    if (WHAT == 2) load_image(a, a_image);
    sm90_fence_stores();
    __syncthreads();
    load_a(f[0], m.a);
    for (int i = 0; i < 64; i++) acc[i] = *sum_at(d, i);
    sm90_hold(acc);
    sm90_hold(f);
    sm90_mma_fence();
    const uint64_t desc = m.desc | address_of(b + m.start);
    if constexpr (WHAT == 0)
        sm90_mma_n128_rs(acc, f[0], desc, m.accumulate);
    else if constexpr (WHAT == 1)
        sm90_mma_n128_rs_t(acc, f[0], desc, m.accumulate);
    else
        sm90_mma_n128_ss(acc, a_desc | address_of(a), desc, m.accumulate);
    sm90_mma_commit();
    sm90_mma_wait<0>();
    sm90_hold(acc);
    for (int i = 0; i < 64; i++) *sum_at(d, i) = acc[i];
}

int hop_multiply(void *stream, const hop_mma *m, float *d)
{
    return (int)td_launch(m->across ? mma_kernel<1> : mma_kernel<0>, dim3(1), dim3(128),
                          (size_t)(2 * HOP_IMAGE_BYTES + 1024), (cudaStream_t)stream, *m,
                          (const uint8_t *)nullptr, (uint64_t)0, d);
}

int hop_multiply_ss(void *stream, const hop_mma *m, const uint8_t *a_image, uint64_t a_desc, float *d)
{
    return (int)td_launch(mma_kernel<2>, dim3(1), dim3(128), (size_t)(2 * HOP_IMAGE_BYTES + 1024),
                          (cudaStream_t)stream, *m, a_image, a_desc, d);
}
