/* tests/ship/support_grid.h - the pages of all ranks of a worker, tagged by what they hold. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SHIP_SUPPORT_GRID_H
#define TD_TESTS_SHIP_SUPPORT_GRID_H

#include "tests/ship/support_kv.h"
#include "worker/ship/grid_plan.h"

typedef struct grid_rank {
    td_ship_part part;
    td_kv kv[TD_MAX_GROUPS];
    int32_t *pages[TD_MAX_GROUPS];  /* shuffled physical pages */
    uint32_t n_pages[TD_MAX_GROUPS];
    size_t bytes[TD_MAX_GROUPS];
} grid_rank;

/* Grid number i of those with at most `most` ranks that fit the model; false: no such number. kind: of the tokens,
 * when cp > 1. */
bool grid_nth(const td_model_desc *d, uint32_t i, uint32_t most, td_token_kind kind, uint32_t unit,
              td_ship_grid *out);
void grid_open(grid_rank *r, const td_ship_grid *g, const td_model_desc *d, uint32_t rank, int P, uint32_t n_tokens,
               uint8_t fill, uint64_t seed);
void grid_close(grid_rank *r, const td_model_desc *d);
td_codec_side grid_side(const grid_rank *r, int group);
/* Everything that the rank holds of tokens [0, n) gets its tag (kv_tag). */
void grid_tag(grid_rank *r, const td_model_desc *d, uint32_t n);
/* Elements from first_tok[g] to n that do not have their tag, and others that are not `fill`. */
uint64_t grid_wrong(const grid_rank *r, const td_model_desc *d, uint32_t hit, uint32_t n, uint8_t fill);

#endif
