/* kernels/ops.h - every operation of the forward pass, as one table of function pointers per kernel family.
 *
 * `ref` is the definition of correct: f32 activations and KV, sums in double. A family fills its table from
 * ref first and overrides what it does better. Families on x86: avx2, avx512, avx512bf16, amx: bf16 matrix
 * inputs and KV; f32 residual, norms, softmax, logits.
 *
 * Rules:   1. Row invariance: a row's result never depends on which or how many rows share the call, on the
 *             number of threads, on the page size, or on how a prompt was cut into chunks. One order of
 *             summation over K per (N, K, dtype).
 *          2. NaN or infinity in a row stays in that row.
 *          3. Every output element is written.
 *          4. No allocation inside: scratch comes from td_ops.scratch_bytes, given per thread team at open.
 * Matrix law of the x86 families (all but amx, bit for bit): inputs rounded to bf16 (RNE, denormals to zero),
 *   per output one chain over k pairs: acc = fma(x[2i], w[2i], fma(x[2i+1], w[2i+1], acc)), starting at 0,
 *   odd K padded with zero; denormals are flushed. Bias is added after the chain, then the residual if `add`.
 * Matrix law of amx: the same, but for the chain. Runs of 32 k, the last one padded with zeros; per run two chains,
 *   even = fma(x[2i], w[2i], even) and odd = fma(x[2i+1], w[2i+1], odd), both starting at 0, and then
 *   acc = acc + (even + odd), starting at 0. Attention adds likewise: scores over runs of 32 d, P V over runs of 32 keys
 *   of a tile of 64, onto what the tiles before have left.
 * Slices:  a weight with slices = S (td_slices_fit) has one such chain, starting at 0, for each of S equal runs
 *   of K (ref: one sum in double, rounded to f32); the S sums are added in f32 by the balanced tree
 *   ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7)), then the bias, then the residual. So a rank that holds slices
 *   2..3 of 8 computes exactly that subtree with slices = 2 and no bias, and sum_tree over the ranks in order
 *   gives the bits of one rank with slices = 8.
 * Shapes:  letters from tensor.h; activations are row-major f32 with a leading dimension in elements. Outputs
 *          do not alias inputs unless a comment says so.
 * Threads: one call at a time per td_pool; the call runs on the pool's members.
 * Errors:  none at run time; shapes are checked when a model is loaded. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_OPS_H
#define TD_KERNELS_OPS_H

#include "common/pool.h"
#include "common/sampling.h"
#include "common/status.h"
#include "kernels/tensor.h"
#include <stdbool.h>

enum {
    TD_MAX_HEAD_DIM = 256, /* D of every family; the x86 families want D to be a multiple of 16 */
    TD_ATTN_SPLIT = 256    /* keys per attention split, unless a model was opened with another number */
};

/* One sequence's rows in a step: row0 .. row0+n_rows-1 of the batch are its tokens at positions pos0 ..
 * pos0+n_rows-1; keys 0 .. pos are read from pages[pos / P] (a page before the window may be -1 and is never
 * read). */
typedef struct td_attn_seq {
    int row0, n_rows, pos0;
    const int32_t *pages;
} td_attn_seq;

/* The same in a device's memory; the sequence's page table begins at pages[page0]. n_rows 0: no sequence. */
typedef struct td_attn_place {
    int32_t row0, n_rows, pos0, page0;
} td_attn_place;

/* Sequences of one row each, where a device reads them (td_ops.dev): [n], row i is sequence i's. What the memory
 * holds may change from one run of the launches to the next (replay, below); the launches follow from the rest
 * alone. */
typedef struct td_attn_placed {
    const td_attn_place *seq; int n;
    const int32_t *pages;
    int group;                       /* of pages: 0 .. TD_ATTN_GROUPS - 1; calls of one group have one window */
    bool fresh;                      /* the first call for this group since seq was written */
    size_t parts;                    /* at least the sum of td_attn_parts over the sequences */
} td_attn_placed;
enum { TD_ATTN_GROUPS = 4 };

typedef struct td_attn_args {
    const float *q; size_t ldq;      /* [T, H*D], after rope, not yet scaled */
    float *out; size_t ldo;          /* [T, H*D], of out_dtype */
    td_dtype out_dtype;              /* f32, or as td_operand_ops make it */
    const td_kv *kv; int slot;       /* K and V of this layer, rows of this step already appended */
    const td_attn_seq *seq; int n_seq;
    int H, G, D;
    float scale;                     /* usually 1/sqrt(D) */
    int window;                      /* 0: none; else query at p attends keys in [p - window + 1, p] */
    const td_attn_placed *placed;    /* NULL, or what stands for seq and n_seq, which are not read then */
    /* Keys u * split .. (u + 1) * split - 1 are split u, a multiple of 64 keys; 0: TD_ATTN_SPLIT. The online
     * softmax runs over each split by itself, and the splits' (maximum, sum, output) are merged in ascending
     * order: so the parts can be computed anywhere. */
    int split;
    /* Context parallel: NULL, or where the parts of the splits u = rank + (part0 + i) * ranks go instead of out:
     * [T][n_parts][H][D + 2] (maximum, sum, output), part i, empty ones included. pages[] then hold this rank's
     * splits, one after the other, from split part0 on. */
    float *part;
    int part0, n_parts, rank, ranks;
} td_attn_args;

/* (row, head, split) results of one sequence. */
static inline size_t td_attn_parts(int n_rows, int pos0, int window, int H)
{
    int first = window > 0 && pos0 + 1 > window ? (pos0 + 1 - window) / TD_ATTN_SPLIT : 0;
    int last = (pos0 + n_rows - 1) / TD_ATTN_SPLIT;
    return n_rows > 0 ? (size_t)n_rows * (size_t)H * (size_t)(last - first + 1) : 0;
}

/* Merges parts into out, for rows [0, T): split u is part u / ranks of block u % ranks. Many parts may be merged
 * some at a time, in ascending order: what is merged so far is a part itself. */
typedef struct td_merge_args {
    const float *const *part;        /* [ranks], host memory: as td_attn_args.part of each rank */
    const float *before;             /* [T][H][D + 2]: of the splits before these; NULL: there are none */
    float *state;                    /* [T][H][D + 2]: where the sum goes when more will follow; may be before. NULL: to out */
    float *out; size_t ldo;          /* [T, H*D] */
    int T, H, D, n_parts, ranks;
} td_merge_args;

/* Rope and append: splits qkv [T, (H + 2G) * D] into q (rotated in place, times q_scale[t] if given), k
 * (normed, rotated) and v, and writes k and v of row t to its page. q_norm/k_norm: RMSNorm over each head
 * with weight [D], before rope; NULL: none. Rotation (half split):
 * (a, b) = (x[i], x[i + rot_dim/2]) -> (a c - b s, a s + b c), c/s = cs[t][i][0/1]. rot_dim <= D: only the
 * first rot_dim. */
typedef struct td_rope_args {
    float *qkv; size_t ld; int T;
    const float *cs;                 /* [T][rot_dim/2][2] */
    const float *q_scale;            /* [T] or NULL */
    const float *q_norm, *k_norm; float norm_eps;
    int H, G, D, rot_dim;
    const td_kv *kv; int slot;
    const int32_t *row_page;         /* [T] page of the row's position in this group; -1: do not write */
    const int32_t *row_in_page;      /* [T] position % P */
} td_rope_args;

/* What is known about one row to be sampled. All arrays borrowed. */
typedef struct td_penalty {
    uint32_t id;
    uint32_t n_out;
    uint32_t in_prompt;
} td_penalty; /* distinct ids of prompt + output */
#define TD_GREEDY_BELOW 1e-5f /* a temperature below draws the likeliest token */
typedef struct td_sample_row {
    float temperature, top_p, min_p, repetition_penalty, presence_penalty, frequency_penalty;
    int32_t top_k;
    uint64_t seed;
    uint32_t position, stream;       /* of the token being made: absolute position, choice << 8 | purpose */
    int32_t logprobs;                /* -1 none; else number of alternatives */
    const td_penalty *pen; uint32_t n_pen;
    const td_bias *bias;
    uint32_t n_bias;                 /* -inf allowed: bans a token (min_tokens bans stop ids this way) */
    const uint32_t *mask;            /* allowed ids as bits [V/32], or NULL */
} td_sample_row;
typedef struct td_sample_out {
    int32_t token;                   /* -1: every token was masked */
    float logprob;                   /* of token under the raw logits; valid when logprobs >= 0 */
    int32_t n_top;
    td_top top[TD_MAX_TOP_LOGPROBS];
} td_sample_out;

typedef struct td_vocab td_vocab; /* draw.h */
typedef struct td_draw td_draw;

/* Which experts a token goes to, and with which weights: everything in f32 from the router's product on.
 *   SOFTMAX      softmax over all experts; the top_k largest, ties to the lower id; renormalise: their sum is
 *                made 1
 *   SOFTMAX_TOP  the top_k largest logits; softmax over them
 * then times scale. Slots are in descending order of score. */
enum { TD_MAX_EXPERTS = 512, TD_MAX_TOP_K = 32 };
typedef enum { TD_ROUTE_SOFTMAX, TD_ROUTE_SOFTMAX_TOP } td_route_score;
typedef struct td_route_law {
    int n_experts, top_k;            /* top_k <= n_experts */
    td_route_score score;
    bool renormalise;
    float scale;
} td_route_law;

/* Several products of one shape (N, K, dtype, slices and scales are w[0]'s): rows row0[e] .. row0[e + 1] - 1 of x
 * and y belong to w[e]. A w[e] without rows may have no bytes. */
typedef struct td_grouped {
    const td_weight *w; int n;
    const int32_t *row0;             /* [n + 1], ascending; row0[0] need not be 0 */
    int max_rows;                    /* row0[n] is at most this: for who does not look into row0 */
    const void *x; size_t ldx;
    float *y; size_t ldy;
    td_dtype x_dtype;                /* f32, or as td_operand_ops make it */
} td_grouped;

/* Replay: steps whose launches differ in nothing but what the memory holds that they read are queued once, recorded,
 * and from then on run as one launch.
 *
 *   rows = rows(owner, n)       the step is made for so many rows, those beyond n being padding; 0: not this one
 *   if (!run(key)) { queue the step }     run: true: it is queued
 *   ... later, when nobody waits for the host:
 *   if (record_begin(key)) { queue the step again: nothing runs; record_end() }
 *
 * A recording that fails is told once; its owner's steps are queued as ever from then on. The number of recordings
 * has a limit: the one unused for longest goes. */
enum { TD_REPLAY_WORDS = 10, TD_REPLAY_MAX_ROWS = 512 };
typedef struct td_replay_key {
    const void *owner;               /* what makes the steps */
    int rows;
    size_t parts;                    /* of attention (td_attn_placed), of the group with most */
    uint64_t word[TD_REPLAY_WORDS];  /* addresses and shapes that the launches hold and the owner does not fix */
} td_replay_key;
typedef struct td_replay_stats {
    uint64_t runs, recorded, dropped, failed;
} td_replay_stats;
typedef struct td_replay {
    int (*rows)(const void *owner, int n);
    bool (*run)(const td_replay_key *key);
    bool (*record_begin)(const td_replay_key *key);
    void (*record_end)(void);
    void (*drop)(const void *owner); /* all of its recordings: what they hold is about to go */
    void (*stats)(td_replay_stats *out);
} td_replay;

/* Where rounding is part of a product (x becomes bf16, f16, or FP8 codes first), an operation whose result only
 * products read may round it itself: half the bytes, one pass less, and the same bits, since it is one rounding to
 * nearest even either way. type: what x becomes for a product of T rows with this weight; dtype: the same where
 * codes are not made (attention, experts). The operations are those of td_ops with such an output or input;
 * attention and linear_grouped have a member for it. out does not alias x. E4M3 (rmsnorm and silu_mul alone):
 * codes, and behind T * ldo of them their scales (td_cuda_codes_in); together at most 2 bytes an element and 256.
 * linear: `type` is the one that x was made with. */
typedef struct td_operand {
    td_dtype dtype;
    int group; /* E4M3: columns that share a scale; 0: all */
} td_operand;
typedef struct td_operand_ops {
    td_operand (*type)(const td_weight *w, int T);
    td_dtype (*dtype)(td_dtype weight);
    void (*rmsnorm)(td_pool *pool, const float *x, size_t ldx, const float *w, float eps, int T, int E, void *out,
                    td_operand to, size_t ldo);
    void (*silu_mul)(td_pool *pool, const float *x, size_t ldx, int T, int F, void *out, td_operand to, size_t ldo);
    void (*moe_gather)(td_pool *pool, const float *x, size_t ldx, const int32_t *row, int T, int top_k, int E, void *out,
                       td_dtype to, size_t ldo);
    void (*linear)(td_pool *pool, void *scratch, const td_weight *w, const void *x, td_operand type, size_t ldx,
                   int T, float *y, size_t ldy, bool add);
} td_operand_ops;

/* What every rank of a worker is to do, or none (td_ops.beside): whether all of them say yes. Collective. */
typedef struct td_ops_agree {
    td_status (*all)(void *arg, bool mine, bool *out);
    void *arg;
} td_ops_agree;

/* Largest sizes of a model's steps, for reserve. */
typedef struct td_ops_room {
    int max_rows, max_logits;        /* rows; rows of logits, drawn or scored */
    int max_expert_rows;             /* rows of all experts together; 0: none */
    int N, K, V;                     /* largest of any product; of the vocabulary */
    int H, G, D;
    int max_seqs, max_len, page_size; /* sequences of a step, tokens of one */
} td_ops_room;

typedef struct td_ops {
    const char *family;              /* "ref", "avx2", "avx512", "avx512bf16", "amx"; "cuda" */
    const char *numerics;            /* id of the arithmetic: "cpu-ref-f32", "cpu-x86-bf16", "cpu-amx-bf16"; cuda.h */
    td_dtype weight_dtype; /* of packed weights; ref: "as stored" (bf16, f16 or f32 kept) */
    td_dtype kv_dtype;     /* of pages */
    int layout; /* id of the packed order: images are shared among families of one layout */
    int full_rows; /* rows of a product below which reading its weights costs more than a few percent: who cuts prompts
                    * into steps does not cut them shorter */

    /* Packing. src is [N, K] row-major of dtype `from`; rows [n0, n1) are packed (n0 a multiple of 32) so
     * that threads and shards can share the work; dst is the whole matrix; slices: as the td_weight will have them,
     * which the order may follow. packed_dtype: what `from` becomes
     * in this family: of E4M3 either E4M3 (the codes are packed, the scales put behind them by the caller) or
     * another type (then the caller multiplies first and packs f32). */
    td_dtype (*packed_dtype)(td_dtype from);
    size_t (*packed_bytes)(int N, int K, int slices, td_dtype from);
    void (*pack)(void *dst, const void *src, td_dtype from, int N, int K, int slices, int n0, int n1);
    /* Why `linear` does not take a weight of this shape, type, slices and scales (p is not looked at), or NULL.
     * NULL itself: it takes all. */
    const char *(*refuses)(const td_weight *w);

    size_t (*scratch_bytes)(int max_rows, int max_K, int max_D, int n_threads);

    /* NULL: bulk arguments are host memory and a call is done on return. Else they are this device's memory, and
     * calls are queued (kernels/cuda.h says which arguments stay on the host); borrowed. */
    struct td_dev *dev;
    /* With dev: waits for what is queued; the first error since the last call of this or of status. NULL without. */
    td_status (*wait)(void);
    /* With dev: the first error of a call since then, without waiting: what runs may still fail. NULL without. */
    td_status (*status)(void);
    /* With dev, before the first step. reserve: workspaces, so that no call within these sizes allocates. beside:
     * what the family keeps beside a model's packed matrices (sets rows of each w[i]), in one block of device
     * memory that the caller frees after the last step; *block NULL: nothing. May change numerics. ranks: all of
     * them keep it, or none; NULL: there are no others. */
    td_status (*reserve)(const td_ops_room *room);
    td_status (*beside)(td_weight *const *w, int n, const td_ops_agree *ranks, void **block);

    const td_replay *replay; /* NULL: every step is queued */
    const td_operand_ops *operand; /* NULL: all activations are f32 */

    /* out[i] = x[rows[i]]; out does not overlap x. */
    void (*take_rows)(td_pool *pool, const float *x, size_t ldx, const int32_t *rows, int n, int width, float *out,
                      size_t ldo);
    /* out[i] = page pages[i] of a slot, whole (td_kv_page_bytes each). */
    void (*gather_pages)(td_pool *pool, const td_kv *kv, int slot, const int32_t *pages, int n, void *out);
    /* Tokens that the host has not seen: ids[i] < 0 becomes the token of before[-1 - ids[i]], or 0 where none was
     * drawn. */
    void (*fill_ids)(td_pool *pool, int32_t *ids, int n, const td_sample_out *before);
    /* out[t] = row ids[t] of the table / of the packed weight (tied embeddings), as f32. */
    void (*embed_table)(td_pool *pool, const td_table *w, const int32_t *ids, int T, float *out, size_t ldo);
    void (*embed_packed)(td_pool *pool, const td_weight *w, const int32_t *ids, int T, float *out,
                         size_t ldo);
    /* out = x / sqrt(mean(x^2) + eps) * w */
    void (*rmsnorm)(td_pool *pool, const float *x, size_t ldx, const float *w, float eps, int T, int E,
                    float *out, size_t ldo);
    /* y = W x + bias; add: y += ... (the residual). */
    void (*linear)(td_pool *pool, void *scratch, const td_weight *w, const float *x, size_t ldx, int T,
                   float *y, size_t ldy, bool add);
    /* y = tree(parts) + bias; add: y += ... (slices, above). Part i, a [T, N] matrix, is at parts + i *
     * part_stride with leading dimension ld; n_parts: a power of two up to TD_MAX_SLICES. */
    void (*sum_tree)(td_pool *pool, const float *parts, size_t part_stride, int n_parts, int T, int N, size_t ld,
                     const float *bias, float *y, size_t ldy, bool add);
    /* Rows [T, E] as 8-bit integers with scales (row_i8.h), and back: the same bytes in every family. */
    void (*rows_to_i8)(td_pool *pool, const float *x, int T, int E, void *out);
    void (*rows_of_i8)(td_pool *pool, const void *in, int T, int E, float *x);
    void (*rope_append)(td_pool *pool, const td_rope_args *a);
    void (*attention)(td_pool *pool, void *scratch, const td_attn_args *a);
    void (*attn_merge)(td_pool *pool, const td_merge_args *a);
    /* out[t][f] = silu(x[t][f]) * x[t][F + f]; x is [T, 2F] (gate, then up). out may be x (in place, first F
     * columns). */
    void (*silu_mul)(td_pool *pool, const float *x, size_t ldx, int T, int F, float *out, size_t ldo);
    /* Mixture of experts: tokens [T] and their slots [T][top_k]; rows, one a slot, sorted by expert.
     *   x -moe_logits-> logits -moe_route-> ids, weights -moe_place-> row0, row
     *   x -moe_gather-> rows -linear_grouped, silu_mul, linear_grouped-> rows -moe_combine-> out
     * logits [T, N] = x W: f32 (ref: double), x not rounded, W of any dtype as stored; one order of
     * summation. */
    void (*moe_logits)(td_pool *pool, const td_table *router, const float *x, size_t ldx, int T,
                       float *logits);
    void (*moe_route)(td_pool *pool, const td_route_law *law, const float *logits, int T, int32_t *ids,
                      float *weights);
    /* row0 [n_experts + 1]: first row of each expert; row [T][top_k]: row of a slot. Stable: an expert's rows
     * ascend by token. Nothing is dropped. */
    void (*moe_place)(td_pool *pool, const int32_t *ids, int T, int top_k, int n_experts, int32_t *row0,
                      int32_t *row);
    /* out[row[t][s]] = x[t] for every slot; row -1: none. */
    void (*moe_gather)(td_pool *pool, const float *x, size_t ldx, const int32_t *row, int T, int top_k, int E,
                       float *out, size_t ldo);
    /* y = w[e] x for each expert's rows; a row's result does not depend on how many rows its expert got (rule
     * 1). ops: this table. scratch: td_moe_scratch_bytes. */
    void (*linear_grouped)(const struct td_ops *ops, td_pool *pool, void *scratch, const td_grouped *a);
    /* out[t] += the sum over slots, in their order, of weights[t][s] * y[row[t][s]]; row -1: left out.
     * x86: one chain of fused multiply-adds from 0, then one addition to out. */
    void (*moe_combine)(td_pool *pool, const float *y, size_t ldy, const int32_t *row, const float *weights,
                        int T, int top_k, int E, float *out, size_t ldo);
    /* One token per row from logits [n, V] (may be changed). Order of operations: common/sampling.h. With dev, of
     * this and of score: out is the device's memory; rows, what they point to, and ids are the host's. */
    void (*sample)(td_pool *pool, float *logits, size_t ld, int V, const td_sample_row *rows, int n,
                   td_sample_out *out);
    /* Log probabilities of given tokens: out[i] as sample's, for token ids[i] under the raw logits row i. */
    void (*score)(td_pool *pool, const float *logits, size_t ld, int V, const int32_t *ids,
                  int n_alternatives, int n, td_sample_out *out);
    /* The same when the vocabulary lies in parts on several ranks: draw.h. NULL: this family has it not. */
    void (*draw_say)(td_pool *pool, const td_vocab *v, td_draw *d, int n, uint8_t *message);
    /* messages: of all ranks in their order, `each` bytes apart. */
    void (*draw_hear)(td_pool *pool, const td_vocab *v, td_draw *d, int n, const uint8_t *messages,
                      size_t each);
} td_ops;

/* "auto": the fastest family this CPU has (of two with the same bits, by a short measurement); or one by name. ENOSUP
 * names what is missing. The table is process-wide and constant. Runs the family's smallest cases against the matrix law
 * (milliseconds) and falls back to the next family, with one line, on a mismatch. */
td_status td_ops_open(const char *name, const td_ops **out);
/* The same among the families of one numerics id. ENOSUP: none here computes so. */
td_status td_ops_open_as(const char *numerics, const td_ops **out);
/* Scratch of linear_grouped for up to max_rows rows (tokens times top_k) in all. */
size_t td_moe_scratch_bytes(const td_ops *ops, int max_rows, int max_K, int n_threads);
/* The i-th family this CPU can run, NULL past the last; for tests and benchmarks. */
const td_ops *td_ops_family(int i);

#endif
