/* tests/kernels/torch_errors.h - what PyTorch's operations are off by: written by tests/golden/make_op_errors.py,
 * torch 2.15.0 on a CPU. Differences to float64 on the inputs of case_error.h. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_KERNELS_TORCH_ERRORS_H
#define TD_TESTS_KERNELS_TORCH_ERRORS_H

#include "kernels/tensor.h"

typedef struct torch_error {
    const char *op;
    td_dtype dtype;
    double most, square; /* the largest, the root of the mean square */
    uint32_t inputs;     /* hash */
} torch_error;
static const torch_error torch_errors[] = {
    {"rmsnorm", TD_F32, 9.533928e-07, 6.869378e-08, 0xbb05e051},
    {"rmsnorm", TD_BF16, 1.561506e-02, 1.622241e-03, 0xbb05e051},
    {"rmsnorm", TD_F16, 1.947785e-03, 2.054849e-04, 0xbb05e051},
    {"add_rmsnorm", TD_F32, 9.941718e-07, 7.172688e-08, 0x27908dfc},
    {"add_rmsnorm", TD_BF16, 3.162874e-02, 2.327936e-03, 0x27908dfc},
    {"add_rmsnorm", TD_F16, 6.336861e-03, 2.943680e-04, 0x27908dfc},
    {"silu_mul", TD_F32, 5.216671e-06, 3.122855e-07, 0x7506600f},
    {"silu_mul", TD_BF16, 2.518669e-01, 1.472985e-02, 0x7506600f},
    {"silu_mul", TD_F16, 2.811633e-02, 1.819907e-03, 0x7506600f},
    {"gelu_mul", TD_F32, 4.341307e-06, 3.722204e-07, 0x7506600f},
    {"gelu_mul", TD_BF16, 1.250000e-01, 1.180714e-02, 0x7506600f},
    {"gelu_mul", TD_F16, 1.603770e-02, 1.543140e-03, 0x7506600f},
    {"gelu_tanh_mul", TD_F32, 4.632703e-06, 2.433006e-07, 0x7506600f},
    {"gelu_tanh_mul", TD_BF16, 1.250000e-01, 1.176685e-02, 0x7506600f},
    {"gelu_tanh_mul", TD_F16, 1.544189e-02, 1.540860e-03, 0x7506600f},
    {"rope", TD_F32, 4.974255e-07, 4.914945e-08, 0x941481e5},
    {"norm_rope", TD_F32, 1.503629e-06, 9.665959e-08, 0x0f22f2eb},
    {"linear", TD_F32, 2.491742e-05, 5.343550e-06, 0x1fadddba},
    {"linear", TD_BF16, 1.207062e-01, 2.670355e-02, 0x1fadddba},
    {"linear", TD_F16, 1.536753e-02, 3.306171e-03, 0x1fadddba},
    {"linear_sums", TD_BF16, 1.070183e-05, 2.087791e-06, 0x1fadddba},
    {"linear_sums", TD_F16, 2.221647e-05, 5.207194e-06, 0x1fadddba},
    {"linear", TD_E4M3, 7.296115e-01, 1.069772e-01, 0x30452fd2},
    {"sum_tree", TD_F32, 1.788139e-06, 1.812201e-07, 0x80eda5d7},
    {"attention", TD_F32, 1.904106e-06, 1.663855e-07, 0xfa793cf1},
    {"attention", TD_BF16, 7.505130e-03, 6.669918e-04, 0xfa793cf1},
    {"attention", TD_F16, 1.048217e-03, 8.466991e-05, 0xfa793cf1},
    {"moe_logits", TD_F32, 7.653448e-05, 1.560304e-05, 0x8e7c5e9f},
    {"moe_route", TD_F32, 4.686135e-08, 1.129816e-08, 0x1e42bcec},
    {"moe_combine", TD_F32, 1.709487e-06, 1.824645e-07, 0x665c7f86},
    {"score", TD_F32, 1.939525e-06, 4.377154e-07, 0xb784f1fc},
};

#endif
