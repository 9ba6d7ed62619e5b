// SPDX-License-Identifier: Apache-2.0
/* kernels/sample_ref.c - token choice for the baseline instruction set. */
#include "kernels/sample_tile.h"

void td_sample_fill_ref(td_ops *t)
{
    t->sample = sample;
    t->score = score;
    t->draw_say = draw_say;
    t->draw_hear = draw_hear;
}
