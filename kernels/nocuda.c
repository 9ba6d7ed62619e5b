// SPDX-License-Identifier: Apache-2.0
/* kernels/nocuda.c - stands in for dev_cuda.cu and ops_cuda.cu in a build without CUDA. */
#include "kernels/cuda.h"

int td_dev_count(void)
{
    return 0;
}

td_status td_dev_open_cuda(int index, td_dev **out)
{
    (void)out;
    return td_refuse(TD_ENOSUP, "device cuda:%d: this build has no CUDA kernels (cmake -DTD_CUDA=ON)", index);
}

td_status td_cuda_ops_open_as(td_dev *dev, const td_cuda_mode *mode, const td_ops **out)
{
    (void)mode, (void)out;
    return td_refuse(TD_ENOSUP, "kernels cuda on %s: this build has none (cmake -DTD_CUDA=ON)", dev->name);
}

td_status td_cuda_probe(td_dev *dev, double *read_s, double *multiply_s)
{
    (void)read_s, (void)multiply_s;
    return td_refuse(TD_ENOSUP, "limits of %s: this build has no CUDA kernels", dev->name);
}

void td_cuda_ops_close(void)
{
}

unsigned td_cuda_ops_kernels(void)
{
    return 0;
}

void td_cuda_ops_keep(unsigned bits)
{
    (void)bits;
}

void td_cuda_ops_steps(bool replay, bool overlap)
{
    (void)replay, (void)overlap;
}
