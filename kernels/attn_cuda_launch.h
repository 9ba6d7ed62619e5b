/* kernels/attn_cuda_launch.h - launchers of the two kernels of cuda_attn.h; called by attn_cuda.cu only. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_ATTN_CUDA_LAUNCH_H
#define TD_KERNELS_ATTN_CUDA_LAUNCH_H

struct attn_args;
int attn_prompt(void *stream, const attn_args &a, bool f16, int blocks);
int attn_split(void *stream, const attn_args &a, bool f16, int sms);

#endif
