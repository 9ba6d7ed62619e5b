// SPDX-License-Identifier: Apache-2.0
/* kernels/sample_avx2.c - token choice, the same text compiled for AVX2. */
#if defined(__x86_64__)
#include "kernels/sample_tile.h"

void td_sample_fill_avx2(td_ops *t)
{
    t->sample = sample;
    t->score = score;
    t->draw_say = draw_say;
    t->draw_hear = draw_hear;
}
#endif
