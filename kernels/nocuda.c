// SPDX-License-Identifier: Apache-2.0
/* kernels/nocuda.c - stands in for dev_cuda.cu and ops_cuda.cu in a build without CUDA. */
#include "kernels/cuda.h"

td_status td_dev_open_cuda(int index, td_dev **out)
{
    (void)out;
    return td_refuse(TD_ENOSUP, "device cuda:%d: this build has no CUDA kernels (cmake -DTD_CUDA=ON)", index);
}

td_status td_cuda_ops_open(td_dev *dev, const td_ops **out)
{
    (void)out;
    return td_refuse(TD_ENOSUP, "kernels cuda on %s: this build has none (cmake -DTD_CUDA=ON)", dev->name);
}

void td_cuda_ops_close(void)
{
}

void td_cuda_ops_steps(bool replay, bool overlap)
{
    (void)replay, (void)overlap;
}
