// SPDX-License-Identifier: Apache-2.0
/* kernels/panel.c - packing into the x86 families' panels, reading rows back out of them, scratch sizes. */
#include "kernels/x86.h"

td_dtype td_panel_dtype(td_dtype from)
{
    (void)from;
    return TD_BF16;
}

size_t td_panel_packed_bytes(int N, int K, int slices, td_dtype from)
{
    (void)slices, (void)from; /* slices are runs of one order */
    return td_panels(N) * td_panel_bytes(K);
}

enum { STRIP = 256 }; /* elements of k converted at a time */

void td_panel_pack(void *dst, const void *src, td_dtype from, int N, int K, int slices, int n0, int n1)
{
    (void)slices;
    uint16_t row[STRIP];
    size_t unit = td_dtype_bytes(from);
    for (int p = n0 / TD_PANEL; p * TD_PANEL < n1; p++) {
        uint16_t *panel = (uint16_t *)((char *)dst + (size_t)p * td_panel_bytes(K));
        for (int k0 = 0; k0 < K; k0 += STRIP) {
            int n_k = K - k0 < STRIP ? K - k0 : STRIP;
            for (int c = 0; c < TD_PANEL; c++) {
                int n = p * TD_PANEL + c;
                if (n < N)
                    td_convert(row, TD_BF16, (const char *)src + ((size_t)n * (size_t)K + (size_t)k0) * unit,
                               from, (size_t)n_k);
                else memset(row, 0, sizeof row);
                if (n_k & 1) row[n_k] = 0;
                uint16_t *to = panel + (size_t)k0 * TD_PANEL + 2 * c;
                for (int k = 0; k < n_k; k += 2, to += 2 * TD_PANEL) memcpy(to, row + k, 4);
            }
        }
    }
}

size_t td_x86_scratch_bytes(int max_rows, int max_K, int max_D, int n_threads)
{
    size_t gemm = td_gemm_scratch_bytes(max_rows, max_K);
    size_t attn = td_round64(((size_t)max_rows + 1) * sizeof(int32_t)) +
                  (size_t)n_threads * td_round64(td_attn_member_bytes(max_D));
    return gemm > attn ? gemm : attn;
}

typedef struct embed_job {
    const td_weight *w;
    const int32_t *ids;
    float *out;
    size_t ldo;
} embed_job;

static void embed_row(void *arg, int t, int member)
{
    (void)member;
    const embed_job *j = arg;
    int id = j->ids[t], K = j->w->K;
    float *out = j->out + (size_t)t * j->ldo;
    if (id < 0 || id >= j->w->N) {
        memset(out, 0, (size_t)K * sizeof *out);
        return;
    }
    const uint16_t *p =
        (const uint16_t *)((const char *)j->w->p + (size_t)(id / TD_PANEL) * td_panel_bytes(K)) +
        2 * (id % TD_PANEL);
    for (int k = 0; k < K; k++) out[k] = td_bf16_to_f32(p[(size_t)(k / 2) * 2 * TD_PANEL + (size_t)(k & 1)]);
}

void td_panel_embed(td_pool *pool, const td_weight *w, const int32_t *ids, int T, float *out, size_t ldo)
{
    embed_job j = {w, ids, out, ldo};
    td_pool_for(pool, T, embed_row, &j);
}
