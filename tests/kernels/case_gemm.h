/* tests/kernels/case_gemm.h - matrix shapes: `odd` for the tests (tails of N, K and of the tiles), `model`
 * for the benchmark. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_KERNELS_CASE_GEMM_H
#define TD_TESTS_KERNELS_CASE_GEMM_H

typedef struct gemm_case {
    int N, K;
} gemm_case;

static const gemm_case gemm_odd[] = {{1, 1},   {2, 3},   {31, 2},  {32, 16}, {33, 7},  {63, 31}, {64, 33},
                                     {96, 64}, {95, 65}, {130, 127}, {40, 258}, {509, 34}, {34, 2090}};
/* For slices: K a multiple of 16. Long ones: more k pairs than the x86 tiles take at a time (gemm_avx2.c, PIECE). */
static const gemm_case gemm_sliced[] = {{1, 16}, {33, 48}, {70, 144}, {130, 256}, {509, 32}, {2, 9632}};
static const gemm_case gemm_model[] = {{2048, 2048}, {512, 2048}, {8192, 2048}, {2048, 8192}};
static const int gemm_rows[] = {1, 2, 4, 8, 16, 32, 128, 512};

#endif
