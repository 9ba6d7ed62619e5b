/* kernels/act_cuda.h - the activation functions, internal to .cu files. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_ACT_CUDA_H
#define TD_KERNELS_ACT_CUDA_H

#include "kernels/cuda.h"
#include "kernels/td_cuda.h"

template <td_act ACT> TD_DEV float td_act_of(float g)
{
    if (ACT == TD_ACT_SILU) return g / (1.0f + expf(-g));
    if (ACT == TD_ACT_GELU) return 0.5f * g * (1.0f + erff(g * 0.70710678f));
    return 0.5f * g * (1.0f + tanhf(0.79788456f * fmaf(0.044715f * g, g * g, g)));
}

#endif
