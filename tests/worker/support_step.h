/* tests/worker/support_step.h - a hand-built step for tests of the forward pass: sequences with consecutive
 * pages, logits of chosen rows.
 *
 *   ts_kv kv; ts_kv_open(&kv, desc, ops, page_tokens, max_tokens, n_seqs);
 *   td_step *s = ts_step(&kv, desc, seqs, n, all_logits);
 *   td_model_forward(m, s, kv.kv, logits, NULL, NULL); free(s); ts_kv_close(&kv);
 *
 * Page tables are a permutation of the pages, so that a mix-up of logical and physical pages shows. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SUPPORT_STEP_H
#define TD_TESTS_SUPPORT_STEP_H

#include "worker/model/model.h"
#include <stdlib.h>
#include <string.h>

typedef struct ts_kv {
    td_kv kv[TD_MAX_GROUPS];
    int pages_per_seq, n_groups;
    bool drop_window; /* pages before the window are -1 in the tables */
} ts_kv;

typedef struct ts_seq {
    int index, pos0, n;
    const int32_t *ids;
} ts_seq; /* ids: of the n rows */

static inline void ts_kv_open(ts_kv *k, const td_model_desc *d, const td_ops *ops, int P, int max_tokens,
                              int n_seqs)
{
    *k = (ts_kv){.pages_per_seq = (max_tokens + P - 1) / P, .n_groups = d->n_groups};
    for (int g = 0; g < d->n_groups; g++) {
        k->kv[g] =
            (td_kv){NULL, ops->kv_dtype, k->pages_per_seq * n_seqs + 3, P, d->group[g].G, d->group[g].D};
        size_t bytes = td_kv_page_bytes(&k->kv[g]) * (size_t)k->kv[g].n_pages * (size_t)d->group[g].n_slots;
        k->kv[g].base = aligned_alloc(64, (bytes + 63) / 64 * 64);
        memset(k->kv[g].base, 0xff, bytes); /* NaN: reading what was never written shows */
    }
}

static inline void ts_kv_close(ts_kv *k)
{
    for (int g = 0; g < k->n_groups; g++) free(k->kv[g].base);
}

static inline int32_t ts_page(const ts_kv *k, int g, int seq, int page)
{
    int n = k->kv[g].n_pages;
    return (int32_t)(((long)(seq * k->pages_per_seq + page) * 7 + 2 + g) % (n % 7 ? n : n - 1));
}

static inline uint32_t ts_room(uint32_t *at, size_t bytes)
{
    uint32_t here = *at;
    *at += (uint32_t)((bytes + 7) / 8 * 8);
    return here;
}

/* all: logits of every row; else of each sequence's last. The caller frees. */
static inline td_step *ts_step(const ts_kv *k, const td_model_desc *d, const ts_seq *seq, int n, bool all)
{
    int T = 0;
    for (int i = 0; i < n; i++) T += seq[i].n;
    size_t cap = sizeof(td_step) + (size_t)T * 16 +
                 (size_t)n * (sizeof(td_step_seq) + 4 * (size_t)(k->pages_per_seq + 2) * TD_MAX_GROUPS) + 256;
    td_step *s = calloc(1, cap);
    uint32_t at = sizeof *s;
    s->n_rows = (uint32_t)T;
    s->n_seqs = (uint32_t)n;
    s->n_groups = (uint32_t)d->n_groups;
    s->n_logits = (uint32_t)(all ? T : n);
    s->ids = ts_room(&at, 4 * (size_t)T);
    s->pos = ts_room(&at, 4 * (size_t)T);
    s->seqs = ts_room(&at, (size_t)n * sizeof(td_step_seq));
    s->logit_rows = ts_room(&at, 4 * (size_t)s->n_logits);
    int32_t *ids = (int32_t *)(void *)((char *)s + s->ids), *pos = (int32_t *)(void *)((char *)s + s->pos);
    int32_t *want = (int32_t *)(void *)((char *)s + s->logit_rows);
    td_step_seq *q = (td_step_seq *)(void *)((char *)s + s->seqs);
    int row = 0;
    for (int i = 0; i < n; i++) {
        q[i] =
            (td_step_seq){.row0 = (uint32_t)row, .n_rows = (uint32_t)seq[i].n, .pos0 = (uint32_t)seq[i].pos0};
        for (int g = 0; g < d->n_groups; g++) {
            int P = k->kv[g].P, pages = (seq[i].pos0 + seq[i].n + P - 1) / P, W = d->group[g].window;
            q[i].n_pages[g] = (uint32_t)pages;
            q[i].pages[g] = ts_room(&at, 4 * (size_t)pages);
            int32_t *t = (int32_t *)(void *)((char *)s + q[i].pages[g]);
            for (int p = 0; p < pages; p++) {
                bool dead = k->drop_window && W > 0 && (p + 1) * P - 1 < seq[i].pos0 - W + 1;
                t[p] = dead ? -1 : ts_page(k, g, seq[i].index, p);
            }
        }
        for (int t = 0; t < seq[i].n; t++, row++) {
            ids[row] = seq[i].ids[t];
            pos[row] = seq[i].pos0 + t;
            if (all) want[row] = row;
        }
        if (!all) want[i] = row - 1;
    }
    s->bytes = at;
    return s;
}

#endif
