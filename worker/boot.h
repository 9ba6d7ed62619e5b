/* worker/boot.h - from options to an engine: threads, kernel family, model, and the engine's options, for
 * every program that runs one.
 *
 * Use:       td_boot_open, then change b.opts where the program knows better (hash key, pages), then
 *            td_engine_open(&b.opts, &e).
 * --ops:     cuda: the CUDA device of --device (default: this process's number among its host's), or ENOSUP; auto: it, where this
 *            build and machine have one, the model fits, on all ranks; else the best family of this CPU.
 * Modes:     of a device, kernels/choose_cuda.h: fast, or --deterministic, whose id also pins it (--numerics); several ranks are
 *            deterministic always, as CPU families are.
 * Ownership: td_boot owns device, pool and model; the engine borrows them and is closed first.
 * Threads:   one, before the others start. Errors: as td_ops_open and td_model_open. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_BOOT_H
#define TD_WORKER_BOOT_H

#include "common/conf.h"
#include "kernels/dev.h"
#include "worker/engine.h"

typedef struct td_boot {
    td_dev *dev; /* NULL: the host */
    const td_ops *ops;
    td_pool *pool;
    td_model *model;
    td_engine_opts opts;
    int attn_split;
    bool quantized;
} td_boot;

/* dir: the model's folder; "" or NULL with --load-format dummy. max_logits 0: what max-num-seqs needs. */
/* ranks: this rank's place, NULL: one rank; on devices it gets groups for their memory (td_ranks_device). Of several ranks all
 * open, and agree on the number of KV pages. */
td_status td_boot_open(const td_conf *c, const char *dir, int max_logits, td_ranks *ranks, td_boot *out);
/* The descriptor of the model that the options name: dir's config.json, or the dummy shape. */
td_status td_boot_describe(const td_conf *c, const char *dir, td_model_desc *out);
/* Device, kernel family and threads alone: no model. */
td_status td_boot_ops(const td_conf *c, td_boot *out);
/* The arithmetic's id as the handshake and page hashes carry it: the family's, and what else changes bits. */
void td_boot_numerics(const td_boot *b, char *out, size_t n);
void td_boot_close(td_boot *b);
/* Cores this process may run on, at most 256. */
int td_boot_cores(void);

#endif
