/* worker/model/rope.h - rotary angles: inverse frequencies, and the cosines and sines of a step's rows.
 *
 *   inv[i], i < rot_dim / 2:  default  theta^(-2i / rot_dim)
 *                             linear   divided by factor
 *                             llama3   wavelengths over original / low: divided; under original / high:
 *                                      kept; between: blended
 *                             yarn     kept and divided blended by a ramp over i; cos and sin times
 *                                      attention_factor
 *
 * Rules:     1. Everything is double until the last step; a row's values depend on its position alone.
 *            2. Positions below TD_ROPE_CACHED are computed once (in blocks, on first use), others each
 *               time: the same bits.
 * Threads:   one owner.
 * Source:    transformers 5.5.4 modeling_rope_utils.py; YaRN, Peng et al. 2023, section 3. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_ROPE_H
#define TD_WORKER_MODEL_ROPE_H

#include "worker/model/model.h"

enum { TD_ROPE_CACHED = 32768, TD_ROPE_BLOCK = 128 };

typedef struct td_rope {
    int half; /* rot_dim / 2 */
    double attention_factor;
    double *inv;                                  /* [half] */
    float *block[TD_ROPE_CACHED / TD_ROPE_BLOCK]; /* [TD_ROPE_BLOCK][half][2] */
    double q_beta;
    int q_base;
} td_rope;

void td_rope_init(td_rope *r, const td_model_desc *d);
void td_rope_deinit(td_rope *r);
void td_rope_inv_freq(const td_rope_desc *d, double *inv, double *attention_factor); /* inv[rot_dim / 2] */
/* cs [T][half][2]: cos, sin of each row's position. */
void td_rope_rows(td_rope *r, const int32_t *pos, int T, float *cs);
/* q_scale [T]; returns NULL when the model has none. */
const float *td_rope_q_scale(const td_rope *r, const int32_t *pos, int T, float *q_scale);

#endif
