/* kernels/x86.h - internal: the packed weight layout and the scratch sizes that all x86 families share.
 *
 * Weights: panels of 32 columns, [ceil(N/32)][ceil(K/2)][32][2] bf16, padded with zeros: one panel is one
 *          sequential stream for any number of rows. Measured against other orders: see README.md.
 * Scratch: linear and attention use the same bytes in turn. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_X86_H
#define TD_KERNELS_X86_H

#include "kernels/family.h"

enum {
    TD_PANEL = 32,       /* columns */
    TD_ATTN_ROWS = 512,  /* (token, head) rows of one attention item, at most */
    TD_ATTN_TILE = 64    /* keys */
};

static inline size_t td_pairs(int K) { return ((size_t)K + 1) / 2; }
static inline size_t td_panels(int N) { return ((size_t)N + TD_PANEL - 1) / TD_PANEL; }
static inline size_t td_panel_bytes(int K) { return td_pairs(K) * TD_PANEL * 4; }

/* Packed x: one dword per pair (bf16) or two (f32, for the families that emulate vdpbf16ps). */
static inline size_t td_gemm_scratch_bytes(int T, int K)
{
    return td_round64((size_t)T * td_pairs(K) * 8) + 4096;
}

/* More rows share one copy of K and V; what they need of L2 is the limit. */
static inline int td_attn_rows(int D) { return D <= 128 ? TD_ATTN_ROWS : TD_ATTN_ROWS / 2; }

/* One member's attention scratch: K and V tiles, q, scores, P (q and P as bf16 or f32, the latter for families that
 * emulate vdpbf16ps; scores and P of two groups of 4 rows, or of 32 on tiles, whose K and q are padded); outputs, maxima
 * and sums of a split and of all. */
static inline size_t td_attn_member_bytes(int D)
{
    size_t d = (size_t)D, rows = (size_t)td_attn_rows(D), tile = TD_ATTN_TILE;
    return 2 * tile * (d + 16) * 2 + rows * d * 4 + 2 * rows * d * 4 + 2 * 32 * tile * (4 + 2) + 2 * rows * 8 + 1024;
}

td_dtype td_panel_dtype(td_dtype from);
size_t td_panel_packed_bytes(int N, int K, int slices, td_dtype from);
void td_panel_pack(void *dst, const void *src, td_dtype from, int N, int K, int slices, int n0, int n1);
size_t td_x86_scratch_bytes(int max_rows, int max_K, int max_D, int n_threads);
void td_panel_embed(td_pool *pool, const td_weight *w, const int32_t *ids, int T, float *out, size_t ldo);

#endif
