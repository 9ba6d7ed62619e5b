/* kernels/cuda.h - launchers of the CUDA kernels, as C functions over device pointers.
 *
 * Rules:   1. Every function queues its work on `stream` (td_dev.stream[], a cudaStream_t) and returns 0 or a CUDA
 *             error code; 1 (invalid value) is a shape that the kernel does not take. td_cuda_status turns it into
 *             a td_status.
 *          2. All pointers are device pointers unless a comment says host. Structures of kernels/ops.h given by
 *             pointer are host memory that holds device pointers; they are read before the call returns.
 *          3. Row invariance (rule 1 of ops.h): launch shapes follow from the row's width, never from the number
 *             of rows.
 *          4. Activations are f32 [T, width] with a leading dimension in elements. Where a function takes
 *             out_dtype its output may be bf16 or f16 instead, rounded to nearest even: the input of a matrix
 *             product.
 *          5. No allocation, no synchronization; workspaces are the caller's, sized by the _bytes function.
 *          6. A launch goes to the calling thread's current device, which has to be the stream's: td_cuda_use
 *             before a thread's first one. Every function of td_dev, and every operation of the table, does that
 *             itself.
 * Errors:  no launcher logs; an error inside a kernel appears at the stream's next sync.
 * Threads: one per stream. Limits: D <= 256; E, F, V below 2^31; n_experts and top_k as in ops.h.
 * Matrix products: kernels/cuda_gemm.h. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_CUDA_H
#define TD_KERNELS_CUDA_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif
#include "kernels/dev.h"
#include "kernels/ops.h"

typedef void *td_stream; /* a cudaStream_t; NULL: the default stream */
void td_cuda_use(const td_dev *d);

/* ---- rows ---- */

/* out = x / sqrt(mean(x^2) + eps) * w. f32 out may be x. */
int td_cuda_rmsnorm(td_stream s, const float *x, size_t ldx, const float *w, float eps, int T, int E, void *out,
                    td_dtype out_dtype, size_t ldo);
/* x += delta, then as above: the residual and the next layer's norm in one pass. */
int td_cuda_add_rmsnorm(td_stream s, float *x, size_t ldx, const float *delta, size_t ldd, const float *w, float eps,
                        int T, int E, void *out, td_dtype out_dtype, size_t ldo);
/* x += delta. */
int td_cuda_add(td_stream s, float *x, size_t ldx, const float *delta, size_t ldd, int T, int E);
/* As td_ops.sum_tree: y (+)= tree(parts) + bias. */
int td_cuda_sum_tree(td_stream s, const float *parts, size_t part_stride, int n_parts, int T, int N, size_t ld,
                     const float *bias, float *y, size_t ldy, bool add);
/* As td_ops.rows_to_i8 and rows_of_i8. */
int td_cuda_rows_to_i8(td_stream s, const float *x, int T, int E, void *out);
int td_cuda_rows_of_i8(td_stream s, const void *in, int T, int E, float *x);
/* As td_ops.rope_append; the arrays of *a and kv->base are device memory, kv itself is host memory. */
int td_cuda_rope_append(td_stream s, const td_rope_args *a);

typedef enum { TD_ACT_SILU, TD_ACT_GELU, TD_ACT_GELU_TANH } td_act;
/* out[t][f] = act(x[t][f]) * x[t][F + f]; f32 out may be x. */
int td_cuda_act_mul(td_stream s, td_act act, const float *x, size_t ldx, int T, int F, void *out, td_dtype out_dtype,
                    size_t ldo);
/* out[t] = row ids[t] of the row-major table [N, K]; a foreign id gives zeros. */
int td_cuda_embed(td_stream s, const void *table, td_dtype dtype, int N, int K, const int32_t *ids, int T, float *out,
                  size_t ldo);
/* out[i] = x[rows[i]]; out may not overlap x. */
int td_cuda_take_rows(td_stream s, const float *x, size_t ldx, const int32_t *rows, int n, int width, float *out,
                      size_t ldo);
/* out = x in another type, RNE. */
int td_cuda_convert(td_stream s, const float *x, size_t ldx, int T, int E, void *out, td_dtype out_dtype, size_t ldo);

/* ---- mixture of experts: see td_ops ---- */
int td_cuda_moe_logits(td_stream s, const void *router, td_dtype dtype, int N, int K, const float *x, size_t ldx, int T,
                       float *logits);
/* A row with NaN gets distinct ids (NaN counts as the least) and NaN weights. */
int td_cuda_moe_route(td_stream s, const td_route_law *law, const float *logits, int T, int32_t *ids, float *weights);
int td_cuda_moe_place(td_stream s, const int32_t *ids, int T, int top_k, int n_experts, int32_t *row0, int32_t *row);
int td_cuda_moe_gather(td_stream s, const float *x, size_t ldx, const int32_t *row, int T, int top_k, int E, void *out,
                       td_dtype out_dtype, size_t ldo);
/* One chain of fused multiply-adds from 0 over the slots, then one addition to out. */
int td_cuda_moe_combine(td_stream s, const float *y, size_t ldy, const int32_t *row, const float *weights, int T,
                        int top_k, int E, float *out, size_t ldo);

/* ---- token choice ----
 * rows: device copies of td_sample_row whose pen, bias and mask are device pointers. The logits are read only; their
 * processed form lies in the workspace. Noise has the bits of common/rng.h, logits those of the CPU families; masses
 * of top_p are added in fixed point (2^-44), so no sum depends on an order. */
size_t td_cuda_sample_bytes(int n, int V);
/* with_logprobs: some row has logprobs >= 0. */
int td_cuda_sample(td_stream s, const float *logits, size_t ld, int V, const td_sample_row *rows, int n,
                   bool with_logprobs, void *workspace, td_sample_out *out);
int td_cuda_score(td_stream s, const float *logits, size_t ld, int V, const int32_t *ids, int n_alternatives, int n,
                  td_sample_out *out);

/* As td_ops.fill_ids. */
int td_cuda_fill_ids(td_stream s, int32_t *ids, int n, const td_sample_out *before);

/* As td_ops.draw_say; draws: device copies whose pointers, those of their rows too, are the device's (out is not
 * looked at);
 * message: device. */
int td_cuda_draw_say(td_stream s, const td_vocab *v, const td_draw *draws, int n, unsigned char *message);

/* ---- pages ---- (td_kv_rows: dev.h) */
size_t td_cuda_rows_bytes(const td_kv_rows *r);
int td_cuda_kv_gather(td_stream s, const td_kv_rows *r, void *payload);
int td_cuda_kv_scatter(td_stream s, const td_kv_rows *r, const void *payload);
/* Pages from[i] of `src` to pages to[i] of `dst`, in every slot [0, n_slots); the two may be one pool (then no
 * page is in both lists), or one may be host memory that the device can address. Same P, G, D and type. */
int td_cuda_kv_copy(td_stream s, const td_kv *dst, const int32_t *to, const td_kv *src, const int32_t *from, int n,
                    int n_slots);

/* ---- limits of a device ----
 * td_cuda_read: one pass over `bytes`, a multiple of 64 KiB; out: 4 bytes. td_cuda_probe: bytes/s of the best such
 * pass over far more than the caches hold, and operations/s of the largest bf16 product, by cuBLASLt where it is
 * in the build. Takes memory of the device for about 0.1 s. */
int td_cuda_read(td_stream s, const void *src, size_t bytes, unsigned *out);
td_status td_cuda_probe(td_dev *dev, double *read_s, double *multiply_s);

/* ---- the table ----
 * A td_ops named "cuda" over `dev`: bulk arguments (activations, weights, pages, ids, tables, everything that *a
 * of an operation points to) are device pointers; the argument structures themselves, td_attn_args.seq with its
 * page tables, td_grouped.w and td_sample_row with what it points to are host memory, sent along through a pinned
 * ring (of td_grouped.w the device keeps its pointers, and they are sent again only when they differ). `pool` and
 * `scratch` are not looked at; work goes to the compute stream and is not done on return. pack works host to host:
 * the packed image is uploaded as it is. One table per process. Workspaces are of the sizes given to
 * td_ops.reserve; a call beyond them makes them larger, once, with a synchronization (td_cuda_ops_grown counts
 * these).
 * Mode: which kernels products and attention run is choose_cuda.h's; with check, after the check there.
 * td_cuda_ops_kernels: those that are left beside the portable ones, as bits; keep: of these no others (ranks of a
 * worker compute alike). Before the first model.
 * td_cuda_ops_status: the first error of any call since the last query; calls after an error do nothing.
 * td_ops.status is this, td_ops.wait a synchronization before it. */
#define TD_CUDA_NUMERICS "cuda-sm80-bf16" /* of the deterministic mode */
typedef struct td_cuda_mode {
    bool fast;     /* else deterministic */
    bool check;    /* run the smallest cases first; ENOSUP where the portable kernels compute otherwise than the host */
    unsigned also; /* tests: kernels (bits of choose_cuda.h) taken as proven */
} td_cuda_mode;
td_status td_cuda_ops_open_as(td_dev *dev, const td_cuda_mode *mode, const td_ops **out);
/* Deterministic, unchecked. */
static inline td_status td_cuda_ops_open(td_dev *dev, const td_ops **out)
{
    const td_cuda_mode plain = {false, false, 0};
    return td_cuda_ops_open_as(dev, &plain, out);
}
td_status td_cuda_ops_status(void);
unsigned td_cuda_ops_grown(void);
unsigned td_cuda_ops_kernels(void);
void td_cuda_ops_keep(unsigned bits);
void td_cuda_ops_close(void);
/* After open. replay false: td_ops.replay is NULL. overlap false: no kernel starts before the one before it has
 * ended (rule 6 of td_cuda.h), until the device is opened again. Results are the same. */
void td_cuda_ops_steps(bool replay, bool overlap);

/* OK for 0; EDEVICE with the driver's text, or ENOSUP for a refused shape. what: the operation. */
td_status td_cuda_status(int code, const char *what);

#ifdef __cplusplus
}
#endif
#endif
