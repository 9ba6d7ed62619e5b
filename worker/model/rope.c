// SPDX-License-Identifier: Apache-2.0
/* worker/model/rope.c */
#include "worker/model/rope.h"
#include "common/check.h"
#include <math.h>
#include <stdlib.h>

static void scale_llama3(const td_rope_desc *d, double *inv)
{
    double low = d->original_max / d->low_freq_factor, high = d->original_max / d->high_freq_factor;
    for (int i = 0; i < d->rot_dim / 2; i++) {
        double wavelength = 2 * M_PI / inv[i];
        if (wavelength < high) continue;
        double smooth =
            (d->original_max / wavelength - d->low_freq_factor) / (d->high_freq_factor - d->low_freq_factor);
        inv[i] = wavelength > low ? inv[i] / d->factor : (1 - smooth) * inv[i] / d->factor + smooth * inv[i];
    }
}

/* The (fractional) index of the frequency that turns `rotations` times over the original context. */
static double yarn_index(const td_rope_desc *d, double rotations)
{
    return d->rot_dim * log(d->original_max / (rotations * 2 * M_PI)) / (2 * log(d->theta));
}

static void scale_yarn(const td_rope_desc *d, double *inv)
{
    double low = yarn_index(d, d->beta_fast), high = yarn_index(d, d->beta_slow);
    if (d->truncate) {
        low = floor(low);
        high = ceil(high);
    }
    low = TD_MAX(low, 0.0);
    high = TD_MIN(high, d->rot_dim - 1.0);
    if (low == high) high += 0.001; /* as the source: no division by zero */
    for (int i = 0; i < d->rot_dim / 2; i++) {
        double ramp = TD_MIN(TD_MAX((i - low) / (high - low), 0.0), 1.0);
        inv[i] = inv[i] / d->factor * ramp + inv[i] * (1 - ramp);
    }
}

static double yarn_mscale(double factor, double mscale)
{
    return factor <= 1 ? 1.0 : 0.1 * mscale * log(factor) + 1.0;
}

static double yarn_attention(const td_rope_desc *d)
{
    if (d->attention_factor > 0) return d->attention_factor;
    if (d->mscale != 0 && d->mscale_all_dim != 0)
        return yarn_mscale(d->factor, d->mscale) / yarn_mscale(d->factor, d->mscale_all_dim);
    return yarn_mscale(d->factor, 1.0);
}

void td_rope_inv_freq(const td_rope_desc *d, double *inv, double *attention_factor)
{
    for (int i = 0; i < d->rot_dim / 2; i++) inv[i] = pow(d->theta, -2.0 * i / d->rot_dim);
    *attention_factor = 1.0;
    switch (d->type) {
    case TD_ROPE_DEFAULT:
        break;
    case TD_ROPE_LINEAR:
        for (int i = 0; i < d->rot_dim / 2; i++) inv[i] /= d->factor;
        break;
    case TD_ROPE_LLAMA3:
        scale_llama3(d, inv);
        break;
    case TD_ROPE_YARN:
        scale_yarn(d, inv);
        *attention_factor = yarn_attention(d);
        break;
    }
}

void td_rope_init(td_rope *r, const td_model_desc *d)
{
    *r = (td_rope){.half = d->rope.rot_dim / 2, .q_beta = d->q_scale_beta, .q_base = d->q_scale_base};
    r->inv = td_xalloc((size_t)r->half * sizeof *r->inv);
    td_rope_inv_freq(&d->rope, r->inv, &r->attention_factor);
}

void td_rope_deinit(td_rope *r)
{
    for (size_t i = 0; i < TD_COUNT(r->block); i++) free(r->block[i]);
    free(r->inv);
    *r = (td_rope){0};
}

static void one_row(const td_rope *r, int pos, float *cs)
{
    for (int i = 0; i < r->half; i++) {
        double angle = r->inv[i] * pos;
        cs[2 * i] = (float)(cos(angle) * r->attention_factor);
        cs[2 * i + 1] = (float)(sin(angle) * r->attention_factor);
    }
}

static const float *cached_row(td_rope *r, int pos)
{
    size_t b = (size_t)pos / TD_ROPE_BLOCK, row = 2 * (size_t)r->half;
    if (!r->block[b]) {
        float *p = td_xalloc(TD_ROPE_BLOCK * row * sizeof *p);
        for (int i = 0; i < TD_ROPE_BLOCK; i++) one_row(r, (int)b * TD_ROPE_BLOCK + i, p + (size_t)i * row);
        r->block[b] = p;
    }
    return r->block[b] + (size_t)pos % TD_ROPE_BLOCK * row;
}

void td_rope_rows(td_rope *r, const int32_t *pos, int T, float *cs)
{
    size_t row = 2 * (size_t)r->half;
    for (int t = 0; t < T; t++, cs += row) {
        if (pos[t] < TD_ROPE_CACHED)
            memcpy(cs, cached_row(r, pos[t]), row * sizeof *cs);
        else
            one_row(r, pos[t], cs);
    }
}

const float *td_rope_q_scale(const td_rope *r, const int32_t *pos, int T, float *q_scale)
{
    if (r->q_beta == 0) return NULL;
    for (int t = 0; t < T; t++) q_scale[t] = (float)(1 + r->q_beta * log(1.0 + pos[t] / r->q_base));
    return q_scale;
}
