/* kernels/attn_cuda_launch.h - launchers of the two kernels of cuda_attn.h; called by attn_cuda.cu (and
 * attn_cuda_sm90a.cu). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_ATTN_CUDA_LAUNCH_H
#define TD_KERNELS_ATTN_CUDA_LAUNCH_H

#include "kernels/attn_cuda_tile.h"

int attn_prompt(void *stream, const attn_args &a, bool f16, int blocks);
attn_args attn_args_of(const td_cuda_attn_args *a);
long long attn_most_blocks(const td_cuda_attn_args *a); /* of the prompt kernel, whatever the plan says */
int attn_split(void *stream, const attn_args &a, bool f16, int sms);

#endif
