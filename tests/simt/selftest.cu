// SPDX-License-Identifier: Apache-2.0
/* tests/simt/selftest.cu - see selftest.h. */
#include "kernels/td_cuda.h"
#include "tests/simt/selftest.h"

/* Diverged halves with their own masks; width; the edges of up and down. */
static __global__ void shuffles(int *out)
{
    int l = threadIdx.x & 31, r;
    if (l < 16) {
        r = __shfl_xor_sync(0x0000ffffu, l, 5);
        r += 1000 * __shfl_down_sync(0x0000ffffu, l, 3, 8);
    } else {
        r = __shfl_up_sync(0xffff0000u, l, 2, 16);
        r += 1000 * __shfl_sync(0xffff0000u, l, 17 + (l & 1));
    }
    out[threadIdx.x] = r + 100000 * __popc(__ballot_sync(0xffffffffu, l % 3 == 0));
}

/* Warps leave a loop after different numbers of rounds. */
static __global__ void loops(int *out)
{
    __shared__ int s[4];
    int w = threadIdx.x >> 5, l = threadIdx.x & 31, a = 0;
    for (int i = 0; i <= w * 3; i++) {
        a += (int)__reduce_add_sync(0xffffffffu, (unsigned)(l + i));
        if (__any_sync(0xffffffffu, a > 100000)) break;
    }
    if (l == 0) s[w] = a;
    __syncthreads();
    out[threadIdx.x] = s[(w + 1) & 3] + __syncthreads_count(l < 3);
}

/* Index formulas of CUTLASS' MMA_Traits: a linear index in M + 16 K order. */
template <bool F16> static __global__ void mma(float *c, const uint16_t *a, const uint16_t *b)
{
    int t = threadIdx.x;
    uint32_t ra[4], rb[2];
    float zero[4] = {0, 0, 0, 0}, d[4];
    for (int v = 0; v < 8; v++) {
        int li = (t % 4) * 32 + t / 4 + (v & 1) * 16 + ((v >> 1) & 1) * 8 + (v >> 2) * 128;
        uint32_t x = a[(li % 16) * 16 + li / 16];
        ra[v / 2] = v & 1 ? ra[v / 2] | x << 16 : x;
    }
    for (int v = 0; v < 4; v++) {
        int li = (t % 4) * 16 + t / 4 + (v & 1) * 8 + (v >> 1) * 64;
        uint32_t x = b[(li / 8) * 8 + li % 8];
        rb[v / 2] = v & 1 ? rb[v / 2] | x << 16 : x;
    }
    if constexpr (F16)
        td_mma_m16n8k16_f16(d, ra, rb, zero);
    else
        td_mma_m16n8k16_bf16(d, ra, rb, zero);
    for (int v = 0; v < 4; v++) {
        int li = (t % 4) * 32 + t / 4 + (v & 1) * 16 + (v >> 1) * 8;
        c[(li % 16) * 8 + li / 16] = d[v];
    }
}

static __global__ void ldmatrix(int trans, uint16_t *out, const uint16_t *in)
{
    __shared__ __align__(16) uint16_t s[4][8][8];
    int l = threadIdx.x;
    for (int i = 0; i < 8; i++) s[l / 8][l % 8][i] = in[l * 8 + i];
    __syncwarp();
    uint32_t r[4];
    if (trans)
        td_ldmatrix_x4_trans(r, s[l / 8][l % 8]);
    else
        td_ldmatrix_x4(r, s[l / 8][l % 8]);
    for (int j = 0; j < 4; j++) {
        out[(j * 32 + l) * 2] = (uint16_t)r[j];
        out[(j * 32 + l) * 2 + 1] = (uint16_t)(r[j] >> 16);
    }
}

static __global__ void convert(int f16, float *up, uint16_t *back)
{
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    float f = f16 ? __half2float(__ushort_as_half((unsigned short)i))
                  : __bfloat162float(__ushort_as_bfloat16((unsigned short)i));
    up[i] = f;
    back[i] = f16 ? __half_as_ushort(__float2half_rn(f)) : __bfloat16_as_ushort(__float2bfloat16_rn(f));
}

/* 64 threads copy 4 floats each; those past `keep` give zeros. */
static __global__ void copy(float *out, const float *in, int n, int keep)
{
    TD_DYN_SMEM(float, s);
    int i = threadIdx.x * 4;
    if (i < n) td_cp_async_16(s + i, in + i, i < keep);
    td_cp_async_commit();
    td_cp_async_wait<0>();
    __syncthreads();
    for (int k = threadIdx.x; k < n; k += blockDim.x) out[k] = s[n - 1 - k];
}

template <int BUG> static __global__ void last_block(int *out)
{
    __shared__ int last;
    out[2 + blockIdx.x * 64 + threadIdx.x] = (int)blockIdx.x;
    __threadfence();
    if (BUG != HAND_NO_BARRIER) __syncthreads();
    if (threadIdx.x == 0) last = blockIdx.x == 3;
    if (threadIdx.x == 0 && !(BUG == HAND_NO_ATOMIC && blockIdx.x == 1))
        last = atomicAdd(&out[0], 1) == (int)gridDim.x - 1 || BUG == HAND_NO_ATOMIC;
    __syncthreads();
    if (!last || (BUG == HAND_NO_ATOMIC && blockIdx.x != 3)) return;
    if (BUG != HAND_UNSEEN) TD_ACQUIRE_ALL();
    if (threadIdx.x) return;
    int a = 0;
    for (unsigned i = 0; i < gridDim.x * 64; i++) a += out[2 + i];
    out[1] = a;
}

template <int BUG> static __global__ void row_sum(float *out, const float *x)
{
    TD_DYN_SMEM(float, part); /* [8 warps][33] */
    __shared__ float count[8], total, junk;
    const int t = threadIdx.x, lane = t & 31, warp = t >> 5, row = blockIdx.x;
    if (BUG == BUG_UNINITIALISED && t == 0) {
        if (!x) junk = 1;
        if (junk > 0.5f) total = 1;
    }
    if (BUG == BUG_NO_COPY_WAIT) {
        td_cp_async_4(part + t + warp, x + row * 256 + t);
        td_cp_async_commit();
    } else
        part[(BUG == BUG_SHARED_OUTSIDE ? 8 * 33 + 8 : 0) + t + warp] =
            x[row * 256 + t + (BUG == BUG_GLOBAL_OUTSIDE)];
    if (BUG == BUG_STATIC_SHARED_OUTSIDE && lane == 0)
        count[warp + 1] = 0;
    else if (lane == 0)
        count[warp] = 0;
    if (BUG == BUG_SHUFFLE_FOR_SYNC)
        (void)__shfl_xor_sync(0xffffffffu, lane, 1); /* all are here, but nothing that they wrote is */
    else if (BUG != BUG_NO_SYNCWARP) __syncwarp();
    float v = part[warp * 33 + (lane ^ 1)];
    if (BUG == BUG_MASK_SHORT)
        for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0x0000ffffu, v, o);
    else if (BUG == BUG_MASK_LONG) {
        if (lane < 16)
            for (int o = 16; o > 0; o >>= 1) v += __shfl_xor_sync(0xffffffffu, v, o);
    } else
        v = td_warp_sum(v);
    if (lane == 0) count[warp] += v;
    if (BUG == BUG_EARLY_EXIT && warp == 3) return;
    if (BUG == BUG_BARRIER_IN_BRANCH) {
        if (warp == 0) __syncthreads();
    } else if (BUG != BUG_NO_BARRIER)
        __syncthreads();
    if (t == 0) {
        float sum = 0;
        for (int w = 0; w < 8; w++) sum += count[w];
        total = sum;
    }
    if (BUG == BUG_OVERWRITE_EARLY) count[warp] = 0;
    __syncthreads();
    if (BUG == BUG_BLOCKS_RACE)
        out[t] = total;
    else if (!(BUG == BUG_UNWRITTEN && t == 255))
        out[row * 256 + t] = total + (float)t;
}

/* tmp must not be read before the wait; scale, which nobody writes, may be. */
template <int BUG> static __global__ void early(float *out, const float *in, const float *scale, float add)
{
    __shared__ __align__(16) float s[256];
    const int t = threadIdx.x;
    td_grid_launch();
    const float k = scale[0];
    float v = BUG == EARLY_READ ? in[t] : 0.f;
    if (BUG == EARLY_COPY) td_cp_async_4(s + t, in + t);
    if (BUG == EARLY_WRITE) out[t] = 0;
    if (BUG == EARLY_NO_WAIT && t == 7) return;
    td_grid_wait();
    if (BUG != EARLY_COPY) td_cp_async_4(s + t, in + t);
    td_cp_async_commit();
    td_cp_async_wait<0>();
    if (BUG != EARLY_READ) v = s[t];
    out[t] = v * k + add;
}
template <int BUG>
static int run_early(int bug, cudaStream_t st, float *out, float *tmp, const float *in, const float *scale)
{
    if (bug == BUG) {
        int e = td_launch_next(early<EARLY_NONE>, 1, 256, 0, st, tmp, in, scale, 1.f);
        return e ? e : td_launch_next(early<BUG>, 1, 256, 0, st, out, (const float *)tmp, scale, 0.f);
    }
    if constexpr (BUG + 1 < EARLY_N) return run_early<BUG + 1>(bug, st, out, tmp, in, scale);
    return cudaErrorInvalidValue;
}
template <int BUG> static __global__ void narrow(unsigned char *out, const unsigned char *in)
{
    __shared__ __align__(16) unsigned words[64];
    unsigned char *bytes = (unsigned char *)words;
    const int t = threadIdx.x, far = (t + 128) % 256;
    if (BUG != NARROW_UNWRITTEN && t < 64) words[t] = 0;
    __syncthreads();
    if (BUG == NARROW_OVER_WORD && words[far / 4] == 12345) out[0] = 0;
    if (!(BUG == NARROW_UNWRITTEN && t == 77)) bytes[t] = in[blockIdx.x * 256 + t];
    if (BUG == NARROW_TWICE && t == 200) bytes[77] = 0;
    if (BUG != NARROW_NO_BARRIER) __syncthreads();
    const unsigned w = words[far / 4] >> (far % 4 * 8);
    if (!(BUG == NARROW_OUT && far == 77)) out[blockIdx.x * 256 + far] = (unsigned char)(w + 1);
}
template <int BUG> static int run_narrow(int bug, unsigned char *out, const unsigned char *in)
{
    if (bug == BUG) return td_launch(narrow<BUG>, 2, 256, 0, 0, out, in);
    if constexpr (BUG + 1 < NARROW_N) return run_narrow<BUG + 1>(bug, out, in);
    return cudaErrorInvalidValue;
}
extern "C" int simt_run_narrow(int bug, unsigned char *out, const unsigned char *in)
{
    return run_narrow<0>(bug, out, in);
}
extern "C" int simt_run_early(int bug, void *stream, float *out, float *tmp, const float *in,
                              const float *scale)
{
    return run_early<0>(bug, (cudaStream_t)stream, out, tmp, in, scale);
}
extern "C" int simt_run_shuffles(int *out)
{
    return td_launch(shuffles, 1, 64, 0, 0, out);
}
extern "C" int simt_run_loops(int *out)
{
    return td_launch(loops, 1, 128, 0, 0, out);
}
extern "C" int simt_run_mma(int f16, float *c, const uint16_t *a, const uint16_t *b)
{
    return f16 ? td_launch(mma<true>, 1, 32, 0, 0, c, a, b) : td_launch(mma<false>, 1, 32, 0, 0, c, a, b);
}
extern "C" int simt_run_ldmatrix(int trans, uint16_t *out, const uint16_t *in)
{
    return td_launch(ldmatrix, 1, 32, 0, 0, trans, out, in);
}
extern "C" int simt_run_convert(int f16, float *up, uint16_t *back)
{
    return td_launch(convert, 256, 256, 0, 0, f16, up, back);
}
extern "C" int simt_run_copy(float *out, const float *in, int n, int keep)
{
    return td_launch(copy, 1, 64, (size_t)n * 4, 0, out, in, n, keep);
}
template <int BUG> static int run_last_block(int bug, int *out)
{
    if (bug == BUG) return td_launch(last_block<BUG>, 4, 64, 0, 0, out);
    if constexpr (BUG + 1 < HAND_N) return run_last_block<BUG + 1>(bug, out);
    return cudaErrorInvalidValue;
}
extern "C" int simt_run_last_block(int bug, int *out)
{
    return run_last_block<0>(bug, out);
}

template <int BUG> static int run_bugs(int bug, float *out, const float *x, int rows)
{
    if (bug == BUG) return td_launch(row_sum<BUG>, rows, 256, 8 * 33 * 4, 0, out, x);
    if constexpr (BUG + 1 < BUG_N) return run_bugs<BUG + 1>(bug, out, x, rows);
    return cudaErrorInvalidValue;
}
extern "C" int simt_run_bug(int bug, float *out, const float *x, int rows)
{
    return run_bugs<0>(bug, out, x, rows);
}
