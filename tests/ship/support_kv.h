/* tests/ship/support_kv.h - descriptors, pages and tagged contents for the ship tests. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SHIP_SUPPORT_KV_H
#define TD_TESTS_SHIP_SUPPORT_KV_H

#include "kernels/tensor.h"
#include "worker/ship/codec.h"
#include "worker/ship/grid_plan.h"
#include "worker/ship/receiver.h"

/* Of a leg of one rank to one rank: n tokens, of which the other has hit. */
td_grid_plan *kv_plan(const td_model_desc *d, uint32_t hit, uint32_t n);
uint32_t kv_rnd(uint64_t *seed, uint32_t n); /* uniform in [0, n); n 0: any */
int32_t *kv_shuffled(uint32_t n, uint64_t *seed); /* 0 .. n - 1 in an order of their own: a page table; malloc */
/* L layers; every `every`-th layer (from 1) is in a second group with a window, if window > 0. */
void kv_desc(td_model_desc *d, int L, int G, int D, int window, int every);

typedef struct kv_side {
    td_kv kv[TD_MAX_GROUPS];
    int32_t *pages[TD_MAX_GROUPS]; /* page table of the one sequence, shuffled physical pages */
    uint32_t n_pages;
    size_t bytes[TD_MAX_GROUPS];
} kv_side;
void kv_side_open(kv_side *s, const td_model_desc *d, int P, uint32_t n_tokens, uint8_t fill, uint64_t seed);
void kv_side_close(kv_side *s, const td_model_desc *d);
/* From and to a side that holds everything. */
bool kv_gather(const kv_side *s, const td_model_desc *d, const td_rect *r, void *payload);
bool kv_scatter(kv_side *s, const td_model_desc *d, const td_rect *r, const void *payload, uint32_t *crc);
/* A message whose payload was read and not written anywhere. */
td_recv_action kv_receive(td_receiver *r, int64_t now, const td_kvframe *f, const void *payload);
/* The element of (group, slot, k|v, head, token, dim) gets a tag that names exactly that place. */
uint16_t kv_tag(int group, int slot, int side, int head, uint32_t token, int dim);
void kv_side_tag(kv_side *s, const td_model_desc *d, uint32_t tok0, uint32_t tok1);
/* Counts elements of [tok0, tok1) of a group that do not have their tag; outside of them, elements that are not `fill`. */
uint64_t kv_side_wrong(const kv_side *s, const td_model_desc *d, int group, uint32_t tok0, uint32_t tok1,
                       uint8_t fill);

#endif
