// SPDX-License-Identifier: Apache-2.0
#include "tests/ship/support_kv.h"
#include "common/check.h"
#include "common/crc.h"
#include "common/hash.h"
#include <stdlib.h>
#include <string.h>

td_grid_plan *kv_plan(const td_model_desc *d, uint32_t hit, uint32_t n)
{
    td_ship_grid one = td_ship_grid_one(d);
    td_grid_plan *p;
    TD_CHECK(td_grid_plan_open(
                 &(td_grid_plan_opts){
                     .desc = d, .kv = TD_BF16, .src = &one, .dst = &one, .hit = hit, .n_tokens = n},
                 &p) == TD_OK);
    return p;
}

uint32_t kv_rnd(uint64_t *seed, uint32_t n)
{
    uint32_t x = (uint32_t)(td_mix64((*seed)++ * 0x9e3779b97f4a7c15ull + 1) >> 20);
    return n ? x % n : x;
}

void kv_desc(td_model_desc *d, int L, int G, int D, int window, int every)
{
    *d = (td_model_desc){.L = L, .G = G, .D = D, .n_groups = window > 0 ? 2 : 1};
    d->group[0] = (td_group_desc){.G = G, .D = D};
    d->group[1] = (td_group_desc){.G = G, .D = D, .window = window};
    for (int l = 0; l < L; l++) {
        int g = window > 0 && l % every == 1 % every;
        d->layer[l] = (td_layer_desc){.group = g, .slot = d->group[g].n_slots++, .window = d->group[g].window};
    }
}

int32_t *kv_shuffled(uint32_t n, uint64_t *seed)
{
    int32_t *all = malloc(n * sizeof *all);
    for (uint32_t i = 0; i < n; i++) all[i] = (int32_t)i;
    for (uint32_t i = n; i > 1; i--) {
        uint32_t j = kv_rnd(seed, i);
        int32_t t = all[i - 1];
        all[i - 1] = all[j];
        all[j] = t;
    }
    return all;
}

void kv_side_open(kv_side *s, const td_model_desc *d, int P, uint32_t n_tokens, uint8_t fill, uint64_t seed)
{
    *s = (kv_side){.n_pages = (n_tokens + (uint32_t)P - 1) / (uint32_t)P};
    for (int g = 0; g < d->n_groups; g++) {
        uint32_t total = s->n_pages + 5; /* some that belong to others */
        s->kv[g] = (td_kv){.dtype = TD_BF16, .n_pages = (int)total, .P = P, .G = d->group[g].G, .D = d->group[g].D};
        s->bytes[g] = td_kv_page_bytes(&s->kv[g]) * total * (size_t)d->group[g].n_slots;
        s->kv[g].base = malloc(s->bytes[g]);
        memset(s->kv[g].base, fill, s->bytes[g]);
        s->pages[g] = kv_shuffled(total, &seed);
    }
}

void kv_side_close(kv_side *s, const td_model_desc *d)
{
    for (int g = 0; g < d->n_groups; g++) {
        free(s->kv[g].base);
        free(s->pages[g]);
    }
}

static td_codec_side whole(const kv_side *s, const td_model_desc *d, const td_rect *r)
{
    return td_codec_whole(&s->kv[r->group], d->group[r->group].n_slots);
}

bool kv_gather(const kv_side *s, const td_model_desc *d, const td_rect *r, void *payload)
{
    const td_codec_side w = whole(s, d, r);
    return td_codec_gather(&w, s->pages[r->group], 0, s->n_pages, r, &w.tokens, payload, NULL);
}

bool kv_scatter(kv_side *s, const td_model_desc *d, const td_rect *r, const void *payload, uint32_t *crc)
{
    const td_codec_side w = whole(s, d, r);
    return td_codec_scatter(&w, s->pages[r->group], 0, s->n_pages, r, &w.tokens, payload, crc);
}

td_recv_action kv_receive(td_receiver *r, int64_t now, const td_kvframe *f, const void *payload)
{
    return td_receiver_message(r, now, f, payload,
                               f->payload_bytes ? td_crc32c(0, payload, (size_t)f->payload_bytes) : 0);
}

uint16_t kv_tag(int group, int slot, int side, int head, uint32_t token, int dim)
{
    uint64_t x = (uint64_t)group << 60 | (uint64_t)slot << 52 | (uint64_t)side << 51 | (uint64_t)head << 44 |
                 (uint64_t)token << 12 | (uint64_t)dim;
    uint16_t t = (uint16_t)(td_mix64(x) >> 13);
    return t == 0xAAAA || t == 0x5555 ? 1 : t;
}

static uint16_t *element(const kv_side *s, int g, int slot, int side, int head, uint32_t t, int dim)
{
    const td_kv *kv = &s->kv[g];
    uint8_t *page = td_kv_page(kv, slot, s->pages[g][t / (uint32_t)kv->P]);
    return (uint16_t *)(void *)page +
           (((size_t)side * (size_t)kv->G + (size_t)head) * (size_t)kv->P + t % (uint32_t)kv->P) *
               (size_t)kv->D +
           dim;
}

void kv_side_tag(kv_side *s, const td_model_desc *d, uint32_t tok0, uint32_t tok1)
{
    for (int g = 0; g < d->n_groups; g++)
        for (int sl = 0; sl < d->group[g].n_slots; sl++)
            for (int side = 0; side < 2; side++)
                for (int h = 0; h < d->group[g].G; h++)
                    for (uint32_t t = tok0; t < tok1; t++)
                        for (int i = 0; i < d->group[g].D; i++)
                            *element(s, g, sl, side, h, t, i) = kv_tag(g, sl, side, h, t, i);
}

uint64_t kv_side_wrong(const kv_side *s, const td_model_desc *d, int g, uint32_t tok0, uint32_t tok1, uint8_t fill)
{
    uint16_t f = (uint16_t)(fill | fill << 8);
    uint64_t wrong = 0, filled = 0, expect = 0;
    for (int sl = 0; sl < d->group[g].n_slots; sl++)
        for (int side = 0; side < 2; side++)
            for (int h = 0; h < d->group[g].G; h++)
                for (uint32_t t = tok0; t < tok1; t++)
                    for (int i = 0; i < d->group[g].D; i++)
                        wrong += *element(s, g, sl, side, h, t, i) != kv_tag(g, sl, side, h, t, i);
    const uint16_t *all = (const uint16_t *)(const void *)s->kv[g].base;
    for (size_t i = 0; i < s->bytes[g] / 2; i++) filled += all[i] != f;
    expect = (uint64_t)d->group[g].n_slots * 2 * (uint64_t)d->group[g].G * (tok1 - tok0) * (uint64_t)d->group[g].D;
    return wrong + (filled > expect ? filled - expect : 0);
}
