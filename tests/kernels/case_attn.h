/* tests/kernels/case_attn.h - attention shapes. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_KERNELS_CASE_ATTN_H
#define TD_TESTS_KERNELS_CASE_ATTN_H

typedef struct attn_case {
    int H, G, D, window, tokens; /* tokens: of the longest sequence */
} attn_case;

static const attn_case attn_odd[] = {
    {4, 1, 64, 0, 200},  {8, 4, 16, 0, 150}, {3, 3, 32, 0, 131},  {8, 2, 128, 0, 97},  {6, 2, 80, 0, 140},
    {7, 1, 96, 50, 190}, {4, 2, 64, 1, 80},  {8, 8, 64, 64, 210}, {2, 1, 256, 33, 70}, {16, 2, 48, 100, 300}};
static const attn_case attn_model = {32, 8, 64, 0, 8192};

#endif
