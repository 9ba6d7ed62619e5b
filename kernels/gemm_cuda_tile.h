/* kernels/gemm_cuda_tile.h - what the kernels of cuda_gemm.h share: the packed order, leaves, operand types,
 * the end.
 *
 * Packed order: [row block of 16][block of 64 columns][chunk of 32 columns][lane][16 bytes, FP8: 8 codes
 * twice]. In a chunk the lane (g = lane / 4, q = lane % 4) holds columns 8q .. 8q+7 of rows g and g + 8. Step
 * j (0, 1) of a chunk feeds columns 8q + 4j + {0, 1} as the product's k = 2q + {0, 1} and 8q + 4j + {2, 3} as
 * k = 2q + 8 + {0, 1}: the order of k inside a chunk is permuted alike on both sides, so a token's fragment
 * for both steps is 16 contiguous bytes of its row and neither side needs ldmatrix. Each leaf begins at a
 * block of its own; padding columns are zero on both sides. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_GEMM_CUDA_TILE_H
#define TD_KERNELS_GEMM_CUDA_TILE_H

#include "kernels/cuda_gemm.h"
#include "kernels/td_cuda.h"

#define TD_HOSTDEV static __host__ __device__ inline

enum { GEMM_MAX_LEAVES = 8, GEMM_LEVELS = 3 };

/* Slices of this width hold whole groups of columns that are multiplied by their scale together, wherever in a block of
 * 128 x 128 they begin: the largest of 128, 64 and 32 that divides it. 0: there is none. So the order of a sum follows
 * from the slice alone, not from which rank has it. */
TD_HOSTDEV int gemm_scale_unit(int slice_cols)
{
    return slice_cols % 32 ? 0 : slice_cols % 64 ? 32 : slice_cols % 128 ? 64 : 128;
}

/* Where the columns of a packed row lie. */
typedef struct gemm_cut {
    int K, n_blocks, leaves;
    int slice_blocks, slice_cols; /* 0, 0: not sliced */
    int unit;                     /* blocks that stay together: 2 under block scales */
} gemm_cut;

TD_HOSTDEV gemm_cut gemm_cut_of(int K, int slices, td_cuda_wtype type)
{
    gemm_cut c = {K, (K + 63) / 64, 1, 0, 0, 1};
    if (type == TD_CUDA_W_E4M3_BLOCK) c.unit = 2;
    if (slices > 0) {
        c.leaves = slices;
        c.slice_cols = K / slices;
        c.slice_blocks = (c.slice_cols + 63) / 64;
        c.n_blocks = c.slice_blocks * slices;
    } else {
        while (c.leaves < GEMM_MAX_LEAVES && c.leaves * 2 * 256 <= K) c.leaves *= 2;
    }
    return c;
}
/* First block of leaf i; i = leaves: the end. */
TD_HOSTDEV int gemm_leaf_begin(const gemm_cut &c, int i)
{
    if (c.slice_blocks) return i * c.slice_blocks;
    int units = (c.n_blocks + c.unit - 1) / c.unit, b = (int)((long long)units * i / c.leaves) * c.unit;
    return b < c.n_blocks ? b : c.n_blocks;
}
/* Column of a block's first element, and the first column past its leaf's data. */
TD_HOSTDEV int gemm_block_col(const gemm_cut &c, int block, int *end)
{
    if (!c.slice_blocks) {
        *end = c.K;
        return block * 64;
    }
    int s = block / c.slice_blocks;
    *end = (s + 1) * c.slice_cols;
    return s * c.slice_cols + (block - s * c.slice_blocks) * 64;
}
/* Element of a chunk of a row block: index of (row r, column c) in the lane order, for 2-byte elements and
 * for codes. */
TD_HOSTDEV int gemm_chunk_index(int r, int c, bool fp8)
{
    int lane = (r & 7) * 4 + c / 8, j = c >> 2 & 1, reg = (r >> 3) + (c >> 1 & 1) * 2;
    return fp8 ? lane * 16 + j * 8 + reg * 2 + (c & 1) : j * 256 + lane * 8 + reg * 2 + (c & 1);
}

/* The packed element (n, block, column j in the block) comes from column gemm_block_col() + j of row n, or is zero. */
TD_HOSTDEV size_t gemm_packed_at(const gemm_cut &c, int n, int block, int j, bool fp8)
{
    size_t chunk = ((size_t)(n / 16) * (size_t)c.n_blocks + (size_t)block) * 2 + (size_t)(j / 32);
    return chunk * 512 + (size_t)gemm_chunk_index(n % 16, j % 32, fp8);
}

typedef struct gemm_args {
    const unsigned char *w;
    const void *x;
    size_t ldx;
    float *y;
    size_t ldy;
    const float *bias, *scale;
    int N, T, row_blocks;
    int scale_cols, scale_shift, scale_col_shift; /* rows >> scale_shift, columns >> scale_col_shift: a block's scale */
    int scale_unit; /* columns whose sum is multiplied by their scale at once: 128, 64 or 32 */
    bool add;
    gemm_cut cut;   /* of the weight */
    gemm_cut x_cut; /* of x: the same, or that of a copy that is padded like the weight */
    float *part;
    unsigned *count;
    int n_groups;                /* 0: one weight; else blockIdx.z is a tile of some group's rows: */
    const int32_t *row0, *tile0; /* [n_groups + 1]: its rows, its tiles */
    const void *const *group_w;
    const float *const *group_bias, *const *group_scale;
} gemm_args;

/* With groups: the arguments of this block's tile, as if it were a product of its own. False: no such tile.
 */
static TD_DEV bool gemm_enter(gemm_args &a, int tokens, int x_bytes)
{
    if (!a.n_groups) return true;
    const int z = (int)blockIdx.z;
    if (z >= a.tile0[a.n_groups]) return false;
    int lo = 0, hi = a.n_groups - 1;
    while (lo < hi) {
        int mid = (lo + hi + 1) / 2;
        if (a.tile0[mid] <= z)
            lo = mid;
        else
            hi = mid - 1;
    }
    const int row = a.row0[lo] + (z - a.tile0[lo]) * tokens;
    a.T = min(tokens, a.row0[lo + 1] - row);
    a.w = (const unsigned char *)a.group_w[lo];
    if (a.group_bias) a.bias = a.group_bias[lo];
    if (a.group_scale) a.scale = a.group_scale[lo];
    a.x = (const unsigned char *)a.x + (size_t)row * a.ldx * (size_t)x_bytes;
    a.y += (size_t)row * a.ldy;
    return true;
}

struct gemm_bf16 {
    static TD_DEV uint32_t pack(float lo, float hi)
    {
        __nv_bfloat162 v = __floats2bfloat162_rn(lo, hi);
        return (uint32_t)__bfloat16_as_ushort(v.x) | (uint32_t)__bfloat16_as_ushort(v.y) << 16;
    }
    static TD_DEV void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
    {
        td_mma_m16n8k16_bf16(d, a, b, d);
    }
};
struct gemm_f16 {
    static TD_DEV uint32_t pack(float lo, float hi)
    {
        __half2 v = __floats2half2_rn(lo, hi);
        return (uint32_t)__half_as_ushort(v.x) | (uint32_t)__half_as_ushort(v.y) << 16;
    }
    static TD_DEV void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2])
    {
        td_mma_m16n8k16_f16(d, a, b, d);
    }
};

/* The weight type is a parameter of the tile loader: V loads of 16 bytes per lane and chunk, and how a step's
 * fragment comes out of them. */
template <class OP> struct gemm_w16 {
    typedef OP op;
    enum { V = 2, CHUNK_BYTES = 1024, ROW_SCALE = 0, BLOCK_SCALE = 0 };
    static TD_DEV void step(const uint4 (&f)[2], int j, uint32_t (&a)[4])
    {
        a[0] = f[j].x;
        a[1] = f[j].y;
        a[2] = f[j].z;
        a[3] = f[j].w;
    }
};
/* Two codes in the low bytes of the halves of a word -> bf16 x 2: sign, exponent and mantissa move into
 * place, the biases differ by 120; exact, subnormal codes too. */
static TD_DEV uint32_t gemm_e4m3_pair(uint32_t u)
{
    uint32_t v = (u & 0x00800080u) << 8 | (u & 0x007f007fu) << 4;
    __nv_bfloat162 two120 = __bfloat162bfloat162(__ushort_as_bfloat16((unsigned short)((127 + 120) << 7)));
    __nv_bfloat162 r = __hmul2(__nv_bfloat162(__ushort_as_bfloat16((unsigned short)v),
                                              __ushort_as_bfloat16((unsigned short)(v >> 16))),
                               two120);
    return (uint32_t)__bfloat16_as_ushort(r.x) | (uint32_t)__bfloat16_as_ushort(r.y) << 16;
}
template <bool BLOCKS> struct gemm_e4m3 {
    typedef gemm_bf16 op;
    enum { V = 1, CHUNK_BYTES = 512, ROW_SCALE = !BLOCKS, BLOCK_SCALE = BLOCKS };
    static TD_DEV void step(const uint4 (&f)[1], int j, uint32_t (&a)[4])
    {
        uint32_t lo = j ? f[0].z : f[0].x, hi = j ? f[0].w : f[0].y;
        a[0] = gemm_e4m3_pair((lo & 0xffu) | (lo & 0xff00u) << 8);
        a[1] = gemm_e4m3_pair((lo >> 16 & 0xffu) | (lo >> 16 & 0xff00u) << 8);
        a[2] = gemm_e4m3_pair((hi & 0xffu) | (hi & 0xff00u) << 8);
        a[3] = gemm_e4m3_pair((hi >> 16 & 0xffu) | (hi >> 16 & 0xff00u) << 8);
    }
};

/* Scale of the row block that begins at row n and of column `col`. */
static TD_DEV float gemm_block_scale(const gemm_args &a, int n, int col)
{
    return a.scale[(size_t)(n >> a.scale_shift) * (size_t)a.scale_cols + (size_t)(col >> a.scale_col_shift)];
}
/* Do columns that are multiplied by their scale at once end with this chunk of 32? It begins at column col; from `end`
 * on there is padding; leaf_end: in chunks. */
static TD_DEV bool gemm_scale_ends(const gemm_args &a, int chunk, int leaf_end, int col, int end)
{
    if (a.scale_unit == 32) return col < end;
    return (chunk & 1) && (a.scale_unit == 64 || chunk + 1 == leaf_end || (col & 127) == 96);
}

/* The binary tree over n (a power of two) sums. */
static TD_DEV float gemm_tree(float (&v)[GEMM_MAX_LEAVES], int n)
{
#pragma unroll
    for (int s = 1; s < GEMM_MAX_LEAVES; s *= 2)
#pragma unroll
        for (int i = 0; i + s < GEMM_MAX_LEAVES; i += 2 * s)
            if (i + s < n) v[i] = v[i] + v[i + s];
    return v[0];
}
static TD_DEV void gemm_end(const gemm_args &a, int n, int t, float v)
{
    if (n >= a.N || t >= a.T) return;
    float *y = a.y + (size_t)t * a.ldy + n;
    if (a.bias) v = v + a.bias[n];
    *y = a.add ? *y + v : v;
}

gemm_args gemm_args_of(const td_cuda_gemm_args *a);
/* Launchers of the two kernels; x is f32 only for few rows. */
int gemm_few(void *stream, const gemm_args &a, td_cuda_wtype type, bool x_is_f32, int tiles = 1);
int gemm_many(void *stream, const gemm_args &a, td_cuda_wtype type, int tokens, int tiles = 1);

#endif
