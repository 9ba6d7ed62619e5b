/* kernels/proven_cuda.h - kernels for Hopper alone whose results on a device are recorded: only these are
 * chosen (choose_cuda.h, rule 1). Empty: none has been run.
 *
 * X(bit of choose_cuda.h, name in the results, file in tests/gpu/results). tests/lint/test_proven.py holds
 * every line against its file. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_PROVEN_CUDA_H
#define TD_KERNELS_PROVEN_CUDA_H

#define TD_CUDA_PROVEN(X)

#endif
