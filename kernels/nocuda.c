// SPDX-License-Identifier: Apache-2.0
/* kernels/nocuda.c - stands in for dev_cuda.cu and ops_cuda.cu in a build without CUDA. */
#include "kernels/dev.h"

td_status td_dev_open_cuda(int index, td_dev **out)
{
    (void)out;
    return td_fail(TD_ENOSUP, "device cuda:%d: this build has no CUDA kernels (cmake -DTD_CUDA=ON)", index);
}
