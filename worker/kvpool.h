/* worker/kvpool.h - the fixed pool of KV pages: who owns each page, which prefixes are kept, what may be
 * evicted.
 *
 * Each page group (layers of equal page bytes and retention) has n_pages pages; a sequence has one page table
 * per group. A *node* is a published prefix step: unit() tokens (a block of 16, or a page when that is
 * larger), the unit()/P pages per group that hold them, the chained hash of everything up to its end, and the
 * token ids themselves. Nodes form a tree by parent.
 *
 * A page is exactly one of
 *   free      in the free list
 *   private   held by one sequence, in no node
 *   shared    held by several sequences, or by a sequence and a node
 *   cached    held by a node only: evictable
 *   transit   held by a sequence whose content is still arriving from another worker
 *
 * Rules:     1. free + private + shared + cached + transit = total, in each group, always
 *               (td_kvpool_balanced; td_kvpool_check counts page by page).
 *            2. A shared page is never written: the write barrier td_kvseq_writable copies the last, partial
 *               page first.
 *            3. A node is made only of pages that are full, committed and complete. It has all pages of every
 *               group of full attention; of a window group it may lack pages that never arrived (a hand-off
 *               ships only what the next query sees). An equal node is kept, not replaced, and gets the pages
 *               that it lacks.
 *            4. A hit needs the hash, the token ids, the parent and the root: a name that collides is a miss.
 *               Hits take their references before anything is allocated, and end where the next row finds
 *               every page that its windows see.
 *            5. Eviction takes the least recently used node that no sequence uses. A sequence's release makes
 *               its tail older than its head, so that this node never has children.
 *            6. ensure is all or nothing.
 * Ownership: sequences are the caller's structs; their tables belong to the pool between begin and release.
 * Threads:   one owner (the engine thread). Units: pages, tokens. Errors: EFULL: not enough free and
 *            evictable pages: nothing changed.
 * Limits:    everything is sized at open.
 * Source:    vLLM (SOSP 23) 4.2-4.3; SGLang (2024) 3. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_KVPOOL_H
#define TD_WORKER_KVPOOL_H

#include "common/blockhash.h"
#include "kernels/dev.h"
#include "worker/model/model.h"

typedef struct td_kvpool td_kvpool;

typedef struct td_kvpool_opts {
    int n_groups, page_size, n_pages, max_seqs, max_pages_per_seq;
    td_group_desc group[TD_MAX_GROUPS];
    td_dtype kv_dtype;
    bool prefix_cache;
    td_hkey hash_key;
    /* A shared page that is to be written is copied by this (all slots), in the order of the calls. Never NULL. */
    void (*copy)(void *arg, int group, int32_t from, int32_t to);
    void *copy_arg;
    td_dev *dev;        /* whose memory the pages are; NULL: this host's. Borrowed */
    td_kvmap kvmap;     /* context parallel: a unit is then a whole stripe, and no group has a window */
} td_kvpool_opts;

typedef struct td_kvseq {
    int32_t *pages[TD_MAX_GROUPS]; /* [max_pages_per_seq]; -1: given back (before the window) */
    int32_t *node;                 /* [units]: the tree path this sequence uses */
    int n_pages, n_nodes;
    int trimmed[TD_MAX_GROUPS];    /* leading pages given back */
    int hole[TD_MAX_GROUPS];       /* pages of units to publish that end before this one never arrived whole */
    td_h128 hash;                  /* of the path's end */
    bool in_transit, is_open, no_publish;
    int slot;
} td_kvseq;

typedef struct td_kv_ledger { int64_t total, free, private_, shared, cached, transit; } td_kv_ledger;

/* The memory of n_pages pages of each group, for ranks that keep no books. dev NULL: this host's. */
td_status td_kvmem_open(td_dev *dev, const td_group_desc *desc, int n_groups, int n_pages, int page_size, td_dtype dtype, td_kv *out);
void td_kvmem_close(td_dev *dev, const td_group_desc *desc, int n_groups, td_kv *kv);

td_status td_kvpool_open(const td_kvpool_opts *o, td_kvpool **out);
void td_kvpool_close(td_kvpool *p);
const td_kv *td_kvpool_kv(const td_kvpool *p, int group);
int td_kvpool_unit(const td_kvpool *p);                 /* tokens per node */
int td_kvpool_pages(const td_kvpool *p, uint32_t n);    /* that n tokens take, in each group */
int td_kvpool_whole_pages(const td_kvpool *p, uint32_t n); /* of those, full ones: never written again */
int64_t td_kvpool_available(const td_kvpool *p);        /* free + evictable pages, least over the groups */
uint64_t td_kvpool_evictions(const td_kvpool *p);
/* goes up whenever there is more room or more to hit */
uint64_t td_kvpool_changes(const td_kvpool *p);
void td_kvpool_ledger(const td_kvpool *p, int group, td_kv_ledger *out);
bool td_kvpool_balanced(const td_kvpool *p);            /* rule 1, from counts kept as pages change */
/* Every rule that can be checked is checked; false with td_reason(). For tests; O(pages + nodes). */
bool td_kvpool_check(const td_kvpool *p);

td_status td_kvseq_begin(td_kvpool *p, td_kvseq *s, td_h128 root); /* EFULL: max_seqs are open */
/* Take the longest published prefix of tokens[0..n) that leaves at least one token. Returns its length. Once,
 * right after begin. */
uint32_t td_kvseq_match(td_kvpool *p, td_kvseq *s, const uint32_t *tokens, uint32_t n);
/* How long that prefix is, without taking it. */
uint32_t td_kvpool_peek(const td_kvpool *p, td_h128 root, const uint32_t *tokens, uint32_t n);
td_status td_kvseq_ensure(td_kvpool *p, td_kvseq *s, uint32_t n_tokens);
/* copy on write of that position's page (td_kvpool_opts.copy) */
td_status td_kvseq_writable(td_kvpool *p, td_kvseq *s, uint32_t position);
/* What was in transit is here: the pages become private. Tokens [hit, n) came, in a window group only those
 * that position n still sees: the nodes that this sequence publishes lack the pages of older ones. */
void td_kvseq_landed(td_kvpool *p, td_kvseq *s, uint32_t hit, uint32_t n);
/* Of n tokens that are committed and computed: where the next unit to publish starts; UINT32_MAX: none. */
uint32_t td_kvseq_unpublished(const td_kvpool *p, const td_kvseq *s, uint32_t n);
/* tokens[unit()] of that unit */
void td_kvseq_publish_unit(td_kvpool *p, td_kvseq *s, const uint32_t *tokens);
/* All units of tokens[0..n). */
void td_kvseq_publish(td_kvpool *p, td_kvseq *s, const uint32_t *tokens, uint32_t n);
/* Give back pages that no position >= q_next can see. */
void td_kvseq_trim(td_kvpool *p, td_kvseq *s, uint32_t q_next);
/* shares pages of tokens [0, n_tokens) */
td_status td_kvseq_fork(td_kvpool *p, const td_kvseq *from, td_kvseq *to, uint32_t n_tokens);
void td_kvseq_release(td_kvpool *p, td_kvseq *s);

#endif
