/* tests/kernels/case_sample.h - vocabularies and parameter sets of the token choice. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_KERNELS_CASE_SAMPLE_H
#define TD_TESTS_KERNELS_CASE_SAMPLE_H

typedef struct sample_case {
    float temperature, top_p, min_p;
    int top_k;
} sample_case;

#ifndef TEST_LARGE_V
#define TEST_LARGE_V 32000
#endif
static const int sample_V[] = {2, 7, 509, TEST_LARGE_V};
static const sample_case sample_cases[] = {
    {0, 1, 0, 0},      {1, 1, 0, 0},       {0.7f, 1, 0, 1},    {0.7f, 1, 0, 5},     {1.3f, 1, 0, 50},
    {1, 0.9f, 0, 0},   {0.5f, 0.5f, 0, 0}, {1, 0, 0, 0},       {1, 1e-6f, 0, 0},    {1, 0.999f, 0, 0},
    {1, 0.95f, 0, 40}, {1, 1, 0.05f, 0},   {1.5f, 1, 0.5f, 0}, {1, 0.8f, 0.1f, 20}, {2, 0.99f, 0.001f, 300},
    {1e-4f, 1, 0, 0},  {1, 1, 1, 0},
};

#endif
