/* worker/model/model.h - a Hugging Face folder as a descriptor plus packed weights, and the one forward pass.
 *
 *   config.json -> td_model_desc -> tensor list -> packed image -> td_model -> td_model_forward(step)
 *
 * The forward pass is generic: it interprets the descriptor and knows no family's name; a layer's weights are
 * taken by acquire and released after use (a pointer today).
 *
 * Rules:     1. An unsupported architecture, key, rope type, activation or dtype is refused by name at open
 *               (TD_ENOSUP). A lying, truncated or overlapping safetensors file is refused with file, tensor
 *               and reason (TD_EPROTO).
 *            2. Layers of equal page bytes and equal retention (window) form a page group; layer -> (group,
 *               slot) is here.
 *            3. The packed image is a file in the cache directory, keyed by model digest, layout and shard,
 *               checksummed, written to a temporary name and renamed; mapped shared and read-only, so a
 *               second worker costs no memory.
 *            4. A step is checked before anything is computed; rows whose logits nobody wants stop after the
 *               last layer's keys and values are written.
 * Ownership: td_model owns maps and scratch; desc is borrowed until close.
 * Threads:   forward: the engine thread; everything else before it starts. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_MODEL_H
#define TD_WORKER_MODEL_MODEL_H

#include "common/hash.h"
#include "common/status.h"
#include "kernels/ops.h"
#include "worker/kvmap.h"
#include "worker/step.h"
#include <stdbool.h>

enum { TD_MAX_LAYERS = 256, TD_MAX_EOS = 16 };

typedef enum { TD_ROPE_DEFAULT, TD_ROPE_LINEAR, TD_ROPE_LLAMA3, TD_ROPE_YARN } td_rope_type;

typedef struct td_rope_desc {
    td_rope_type type;
    double theta, factor, low_freq_factor, high_freq_factor, beta_fast, beta_slow, mscale, mscale_all_dim;
    double attention_factor;        /* <= 0: derived */
    int original_max, rot_dim;
    bool truncate;                  /* yarn */
} td_rope_desc;

typedef struct td_layer_desc {
    int group, slot, window;        /* window 0: full attention */
    bool moe;                       /* the feed-forward network is a mixture of experts */
} td_layer_desc;
typedef struct td_group_desc { int n_slots, window, G, D; } td_group_desc;

/* route.n_experts 0: no layer has experts. F: columns of one expert. */
typedef struct td_moe_desc {
    td_route_law route;
    int F;
} td_moe_desc;

/* FP8 weights (fp8.h). keep: names of modules that are not FP8, each ended by a NUL. */
typedef enum { TD_FP8_NONE, TD_FP8_ROWS, TD_FP8_BLOCKS } td_fp8_kind;
typedef struct td_fp8_desc {
    td_fp8_kind kind;
    const char *suffix;             /* of a scale's name, behind that of its weight */
    bool any_part;                  /* a name in keep is the beginning or the end of a module's; else all of it, or a pattern */
    size_t keep_bytes;
    char keep[48 << 10];
} td_fp8_desc;

typedef struct td_model_desc {
    char arch[64];                  /* config.json architectures[0] */
    char dtype[8];                  /* "bf16", "f16", "f32"; before opening: what config.json says, or "" */
    int L, E, H, G, D, F, V;
    int max_positions;              /* max_position_embeddings; yarn: factor x the original, if that is more */
    double rms_eps;
    bool tied, qkv_bias, o_bias, mlp_bias, qk_norm;
    td_moe_desc moe;                /* layers with layer[i].moe; F is of the others */
    td_fp8_desc fp8;
    td_rope_desc rope;
    double attn_scale;              /* 1/sqrt(D) unless the config says otherwise */
    /* ministral3 (llama-4 scaling): q *= 1 + beta * log(1 + floor(pos / base)); beta 0: off */
    double q_scale_beta;
    int q_scale_base;
    int32_t bos, eos[TD_MAX_EOS];   /* bos -1: none; from generation_config.json, else config.json */
    int n_eos;
    int n_groups;
    td_group_desc group[TD_MAX_GROUPS];
    td_layer_desc layer[TD_MAX_LAYERS];
    td_h128 digest;                 /* identity: of config.json, and once opened of the weights too */
} td_model_desc;

/* Reads config.json (rope keys of both transformers generations) and generation_config.json only. */
td_status td_model_desc_read(const char *dir, td_model_desc *out);
/* A shape without files, for load-format dummy: "tiny", "0.5b", "1b", "8b" (as the benchmark checkpoints); for
 * tests of ranks "ranks-tiny", "ranks-mqa" (one kv head, tied), "moe-tiny" (8 experts, two a token). */
td_status td_model_desc_shape(const char *shape, td_model_desc *out);

typedef enum { TD_CP_AUTO, TD_CP_PASS_Q, TD_CP_PASS_KV } td_cp_mode;

typedef struct td_model td_model;
typedef struct td_model_opts {
    const char *dir;                /* NULL with dummy */
    const td_model_desc *desc;      /* dir's or the dummy shape's, if the caller has read it; NULL: it is read here */
    const char *dummy_shape;        /* random weights: this shape, or dir's config if given */
    const td_ops *ops;
    td_pool *pool;                  /* borrowed */
    int max_rows, max_logits;       /* scratch sizes: rows and logit rows per step */
    int max_seqs, max_len, page_size; /* of a step and its sequences, for workspaces of a device; 0: max_rows, the model's, 16 */
    const char *cache_dir;          /* NULL: no packed image on disk (anonymous memory) */
    uint64_t cache_limit;           /* bytes of all images there (image.h); 0: none */
    void (*progress)(void *arg, const char *what, double fraction); /* may be NULL */
    void *arg;
    const struct td_ranks *ranks;   /* this rank's place and groups (worker/ranks.h), borrowed; NULL: one rank */
    int attn_split;                 /* keys per attention split; 0: TD_ATTN_SPLIT */
    td_cp_mode cp_mode;             /* what travels between context-parallel ranks */
    bool quantized;                 /* TP ranks exchange their parts of sums as int8 (quant.h) */
    bool least_workspace;           /* tests: exchanges of a few rows, attention of one row and one split at a time */
    int block_rows;                 /* from so many rows a TP rank keeps only a block of them; 0: as measured */
} td_model_opts;

/* Whether a kernel family can compute this model: the x86 families want head dimensions that are multiples of 16. open: else ENOSUP. */
bool td_model_fits(const td_model_desc *d, const td_ops *ops);
td_status td_model_open(const td_model_opts *o, td_model **out);
void td_model_close(td_model *m);
const td_model_desc *td_model_descr(const td_model *m);
/* Packed bytes read by one forward pass of one row (embedding row excepted; of a layer's experts, as many as
 * a token goes to). */
size_t td_model_weight_bytes(const td_model *m);

/* Bytes of weights that this rank keeps or maps: its packed image, what it reads as stored, the buffers in which a fully
 * sharded model's layers are put together, and experts that were received. */
size_t td_model_resident_bytes(const td_model *m);
/* Bytes of activations and of what ranks exchange. Made at open; expert parallel and fully sharded models take more when a step
 * needs it (share.h). */
size_t td_model_workspace_bytes(const td_model *m);
/* Fully sharded: bytes of the largest layer as it is gathered; 0: weights are whole. */
size_t td_model_unit_bytes(const td_model *m);
/* Fully sharded: layers gathered and their bytes, how long steps waited for them, or copied them while they waited for something
 * else, and how long the gathers take when nothing else is done (measured at open). All 0: weights are whole. */
typedef struct td_shard_stats { uint64_t gathers, bytes; int64_t waited_us, alone_us; } td_shard_stats;
td_shard_stats td_model_shard_stats(const td_model *m);
/* Part of the gathers' time that was hidden behind other work, 0 to 1. */
double td_model_shard_overlap(const td_model *m);

/* Expert parallel: how often experts were balanced, how many of them moved and their bytes, layers that the last balancing left
 * to the next one; the heaviest rank's load against
 * the mean, averaged over layers, at the last balancing: as counted, as the counts say it was, as they say it is now. On the
 * stage's first rank; the ratios are 0 elsewhere. */
typedef struct td_expert_stats { uint64_t balanced, moved, bytes, left; double measured, before, after; } td_expert_stats;
td_expert_stats td_model_expert_stats(const td_model *m);
/* Expert parallel: experts move to where the load since the last time would have been even (experts.h). Between steps, by
 * all ranks of the stage; force: also where little is won. */
td_status td_model_balance(td_model *m, bool force);

/* What the ids of later steps that are not known yet refer to (step.h): results of the step before, where draws
 * write them (a device's memory with ops->dev). Borrowed until the next call; NULL, as at first: a step with such
 * ids is refused. */
void td_model_drawn(td_model *m, const td_sample_out *before);
/* EPROTO if the step is outside the model's limits (ids, positions, pages, rows, offsets). */
td_status td_model_check(const td_model *m, const td_step *step, const td_kv *kv);

/* Run this rank's part of one step; of several ranks, all run it. kv[g] for each group. logits: caller's, f32,
 * written on ranks of the last pipeline stage: of the step's rows of logits those that this rank computes
 * (td_model_logit_places), of the vocabulary its part (td_model_vocab); one rank: [step->n_logits, V].
 * on_layer(arg, layer) is called on this thread once keys and values of layer `layer` of all rows are in their pages (NULL: none).
 * On a device logits has room for max_logits rows: those beyond n_logits may be written.
 * EPROTO as td_model_check: nothing computed. */
td_status td_model_forward(td_model *m, const td_step *step, const td_kv *kv, float *logits,
                           void (*on_layer)(void *arg, int layer), void *arg);
/* After a forward and what follows it (draws) is queued, before the step goes: if later steps could run as this one
 * did, that is prepared now (td_replay of kernels/ops.h). Nothing is computed; without effect on the CPU. */
void td_model_record(td_model *m);
/* Between a step and a replayed one after it: from the end of what the first one queued before td_model_record until
 * the arrays of the second one were there and its launches could begin. */
typedef struct td_model_idle {
    uint64_t steps;
    double us, most_us;
} td_model_idle;
td_model_idle td_model_idle_time(const td_model *m);

/* This rank's tokens: [v0, v0 + n). */
void td_model_vocab(const td_model *m, int *v0, int *n);
/* Of the step of the last forward: [n_logits]. NULL: all rows are here, in the step's order. */
const td_logit_place *td_model_logit_places(const td_model *m);
/* What forward wrote on each rank of the last stage -> [step->n_logits, V] on all of them. Tools only: draws need
 * no whole row. */
td_status td_model_join_logits(td_model *m, const td_step *step, const float *part, float *logits);

/* Between pipeline stages: this rank's rows of the residual after its layers (or, before a forward, where those of the
 * stage before must be); bytes is a function of the step. */
void *td_model_hidden(td_model *m, const td_step *step, const td_kv *kv, size_t *bytes);
/* The page groups as this rank holds them: its layers, its kv heads; [n_groups]. */
const td_group_desc *td_model_groups(const td_model *m);
/* Which tokens' keys this rank keeps. */
td_kvmap td_model_kvmap(const td_model *m);

#endif
