/* kernels/family.h - internal: how ops.c assembles the families. A fill function overrides the entries of its
 * op. Every x86 family shares one packed layout. All but amx share one scratch layout and one arithmetic (the matrix law of
 * ops.h), so they share one numerics id as well: a mixed fleet of AVX2 and AVX-512 machines produces the same
 * tokens. amx has a law, and so an id, of its own; what is neither a product of bf16 matrices nor attention it
 * takes from the others. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_FAMILY_H
#define TD_KERNELS_FAMILY_H

#include "kernels/ops.h"

enum { TD_LAYOUT_ROWS = 0, TD_LAYOUT_PANEL32_BF16 = 1, TD_LAYOUT_FRAGMENT = 4 /* cuda_gemm.h */ };

void td_gemm_fill_ref(td_ops *t);
void td_attn_fill_ref(td_ops *t);
void td_norm_rope_fill_ref(td_ops *t);
void td_act_fill_ref(td_ops *t);
void td_embed_fill_ref(td_ops *t);
void td_sample_fill_ref(td_ops *t);
void td_moe_fill_ref(td_ops *t);

#if defined(__x86_64__)
void td_gemm_fill_avx2(td_ops *t);
void td_gemm_fill_avx512(td_ops *t);
void td_gemm_fill_avx512bf16(td_ops *t);
void td_gemm_fill_amx(td_ops *t);
void td_attn_fill_avx2(td_ops *t);
void td_attn_fill_avx512(td_ops *t);
void td_attn_fill_avx512bf16(td_ops *t);
void td_attn_fill_amx(td_ops *t);
void td_norm_rope_fill_avx2(td_ops *t);
void td_norm_rope_fill_avx512(td_ops *t);
void td_act_fill_avx2(td_ops *t);
void td_act_fill_avx512(td_ops *t);
void td_sample_fill_avx2(td_ops *t);
void td_sample_fill_avx512(td_ops *t);
void td_moe_fill_avx2(td_ops *t);
void td_moe_fill_avx512(td_ops *t);
bool td_has_avx512bf16(void);
#endif

static inline size_t td_round64(size_t n) { return (n + 63) & ~(size_t)63; }

static inline float td_load_f32(const void *p, td_dtype dtype, size_t i)
{
    switch (dtype) {
    case TD_F32: return ((const float *)p)[i];
    case TD_BF16: return td_bf16_to_f32(((const uint16_t *)p)[i]);
    case TD_F16: return td_f16_to_f32(((const uint16_t *)p)[i]);
    case TD_E4M3: return td_e4m3_to_f32(((const uint8_t *)p)[i]);
    }
    return 0.0f;
}

/* Row-wise ops: rows per item so that an item is worth the hand-out (about 16 Ki elements), and the number of
 * items. */
static inline int td_rows_per_item(int T, size_t elements_per_row)
{
    size_t rows = elements_per_row ? ((size_t)1 << 14) / elements_per_row : 1;
    if (rows < 1) rows = 1;
    return rows < (size_t)T ? (int)rows : (T > 0 ? T : 1);
}

#endif
