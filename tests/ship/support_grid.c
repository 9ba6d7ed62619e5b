// SPDX-License-Identifier: Apache-2.0
#include "tests/ship/support_grid.h"
#include "common/check.h"
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { HUGE = 2 << 20 };

bool grid_nth(const td_model_desc *d, uint32_t i, uint32_t most, td_token_kind kind, uint32_t unit, td_ship_grid *out)
{
    for (uint16_t tp = 1; tp <= most; tp++)
        for (uint16_t pp = 1; tp * pp <= most; pp++)
            for (uint16_t cp = 1; tp * pp * cp <= most; cp++) {
                td_ship_grid g = {.tp = tp, .pp = pp, .cp = cp, .tokens = {kind, cp, unit}};
                td_ship_grid_stages(&g, (uint32_t)d->L);
                if (td_ship_grid_check(&g, d) != TD_OK || i--) continue;
                *out = g;
                return true;
            }
    return false;
}

void grid_open(grid_rank *r, const td_ship_grid *grid, const td_model_desc *d, uint32_t rank, int P,
               uint32_t n_tokens, uint8_t fill, uint64_t seed)
{
    memset(r, 0, sizeof *r);
    td_ship_part_of(grid, d, rank, &r->part);
    uint32_t local = td_token_before(&r->part.tokens, n_tokens);
    for (int g = 0; g < d->n_groups; g++) {
        uint32_t n = (local + (uint32_t)P - 1) / (uint32_t)P, total = n + 3; /* some belong to others */
        r->n_pages[g] = n;
        r->kv[g] = (td_kv){
            .dtype = TD_BF16, .n_pages = (int)total, .P = P, .G = r->part.n_heads[g], .D = d->group[g].D};
        r->bytes[g] = td_kv_page_bytes(&r->kv[g]) * total * r->part.n_slots[g];
        r->kv[g].base = aligned_alloc(HUGE, (r->bytes[g] / HUGE + 1) * HUGE);
        if (r->bytes[g] > HUGE)
            madvise(r->kv[g].base, (r->bytes[g] / HUGE + 1) * HUGE, MADV_HUGEPAGE); /* as the pool */
        memset(r->kv[g].base, fill, r->bytes[g]);
        r->pages[g] = kv_shuffled(total, &seed);
    }
}

void grid_close(grid_rank *r, const td_model_desc *d)
{
    for (int g = 0; g < d->n_groups; g++) {
        free(r->kv[g].base);
        free(r->pages[g]);
    }
}

td_codec_side grid_side(const grid_rank *r, int g)
{
    return (td_codec_side){.kv = &r->kv[g], .slot0 = r->part.slot0[g], .n_slots = r->part.n_slots[g],
                           .head0 = r->part.head0[g], .tokens = r->part.tokens};
}

/* By definition, not by the code under test: the i-th held token is found by asking for each one's owner. */
typedef uint64_t visit(uint16_t *x, uint16_t tag);
static uint64_t set(uint16_t *x, uint16_t tag)
{
    *x = tag;
    return 0;
}
static uint64_t differs(uint16_t *x, uint16_t tag)
{
    return *x != tag;
}

static uint64_t each(const grid_rank *r, const td_model_desc *d, int g, uint32_t from, uint32_t n, visit *fn,
                     uint64_t *count)
{
    uint64_t sum = 0;
    uint32_t P = (uint32_t)r->kv[g].P, local = 0;
    for (uint32_t t = 0; t < n; t++) {
        if (r->part.tokens.map.kind != TD_TOKENS_ALL &&
            td_token_owner(&r->part.tokens.map, t) != r->part.tokens.rank)
            continue;
        for (int s = 0; t >= from && s < r->part.n_slots[g]; s++)
            for (int side = 0; side < 2; side++)
                for (int h = 0; h < r->kv[g].G; h++)
                    for (int i = 0; i < d->group[g].D; i++) {
                        uint16_t *x = (uint16_t *)(void *)td_kv_page(&r->kv[g], s, r->pages[g][local / P]);
                        x += (((uint32_t)side * (uint32_t)r->kv[g].G + (uint32_t)h) * P + local % P) *
                                 (uint32_t)d->group[g].D +
                             (uint32_t)i;
                        sum += fn(x, kv_tag(g, s + r->part.slot0[g], side, h + r->part.head0[g], t, i));
                        ++*count;
                    }
        local++;
    }
    return sum;
}

void grid_tag(grid_rank *r, const td_model_desc *d, uint32_t n)
{
    uint64_t count = 0;
    for (int g = 0; g < d->n_groups; g++) (void)each(r, d, g, 0, n, set, &count);
}

uint64_t grid_wrong(const grid_rank *r, const td_model_desc *d, uint32_t hit, uint32_t n, uint8_t fill)
{
    uint64_t wrong = 0;
    uint16_t f = (uint16_t)(fill | fill << 8);
    for (int g = 0; g < d->n_groups; g++) {
        uint64_t expect = 0, filled = 0;
        wrong += each(r, d, g, td_ship_plan_first(d->group[g].window, hit, n), n, differs, &expect);
        const uint16_t *all = (const uint16_t *)(const void *)r->kv[g].base;
        for (size_t i = 0; i < r->bytes[g] / 2; i++) filled += all[i] != f;
        wrong += filled > expect ? filled - expect : 0;
    }
    return wrong;
}
