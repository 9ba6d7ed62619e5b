// SPDX-License-Identifier: Apache-2.0
/* tests/ship/test_codec.c - the plan covers everything exactly once, whatever the chunks; pages of any two sizes exchange their contents. */
#include "common/check.h"
#include "common/crc.h"
#include "proto/kvframe.h"
#include "tests/ship/support_kv.h"
#include "tests/t.h"
#include "worker/ship/codec.h"

typedef struct { td_rect r[8192]; uint32_t n; } rects;
static void collect(void *arg, const td_rect *r)
{
    rects *l = arg;
    if (l->n < TD_COUNT(l->r)) l->r[l->n] = *r;
    l->n++;
}

/* The frames of a prompt of n tokens in such chunks, told of so many layers at a time. */
static void run_plan(const td_model_desc *d, uint32_t hit, uint32_t n, uint32_t chunk, int step, rects *out)
{
    td_grid_plan *p = kv_plan(d, hit, n);
    out->n = 0;
    for (uint32_t t = 0; t < n; t += chunk)
        for (int l = 0; l < d->L; l += step)
            td_grid_plan_add(p, l, TD_MIN(l + step, d->L), t, TD_MIN(t + chunk, n), collect, out);
    td_grid_plan_close(p);
}

static void check_cover(const td_model_desc *d, uint32_t hit, uint32_t n, const rects *l)
{
    for (int g = 0; g < d->n_groups; g++) {
        uint32_t first = td_ship_plan_first(d->group[g].window, hit, n), bad = 0;
        uint8_t *count = calloc((size_t)d->group[g].n_slots * n + 1, 1);
        for (uint32_t i = 0; i < l->n; i++) {
            const td_rect *r = &l->r[i];
            if (r->group != g) continue;
            T_OK(td_ship_plan_token_bytes(d, g, TD_BF16) * r->n_layers * r->n_tok <= TD_KVF_FRAME_BYTES);
            T_OK(r->n_layers && r->n_tok);
            for (uint32_t s = r->layer0; s < (uint32_t)r->layer0 + r->n_layers; s++)
                for (uint32_t t = r->tok0; t < r->tok0 + r->n_tok; t++) count[s * n + t]++;
        }
        for (int s = 0; s < d->group[g].n_slots; s++)
            for (uint32_t t = 0; t < n; t++) bad += count[(uint32_t)s * n + t] != (t >= first);
        T_OK(bad == 0, "group %d, %u tokens, hit %u: %u wrong", g, n, hit, bad);
        free(count);
    }
}

static void test_plan(void)
{
    static rects l;
    td_model_desc d;
    const uint32_t chunks[] = {1, 7, 16, 64, 1000};
    for (int w = 0; w < 3; w++) {
        kv_desc(&d, 6, 2, 64, w ? 20 * w : 0, 2);
        for (size_t c = 0; c < TD_COUNT(chunks); c++)
            for (uint32_t hit = 0; hit < 200; hit += 48) {
                run_plan(&d, hit, 199, chunks[c], 1 + (int)c % 3, &l);
                check_cover(&d, TD_MIN(hit, 199u), 199, &l);
                T_OK(l.n <= td_ship_plan_max_frames(&d, 199));
            }
    }
    /* gathering: 512 B per token and layer, 100 tokens: 50 KiB a layer, five layers to a frame, the last one goes with the last layer */
    kv_desc(&d, 12, 2, 64, 0, 1);
    run_plan(&d, 0, 100, 100, 1, &l);
    T_EQ(l.n, 3);
    T_OK(l.r[0].n_layers == 5 && l.r[1].n_layers == 5 && l.r[2].n_layers == 2 && l.r[1].layer0 == 5);
    /* cutting: 2000 tokens of one layer are 1000 KiB: four pieces */
    run_plan(&d, 0, 2000, 2000, 1, &l);
    T_EQ(l.n, 12 * 4);
    T_OK(l.r[0].n_tok == 500 && l.r[3].tok0 == 1500);
    check_cover(&d, 0, 2000, &l);
    /* one layer exactly at the limit goes at once, not with the next */
    td_grid_plan *p = kv_plan(&d, 0, 512);
    l.n = 0;
    td_grid_plan_add(p, 0, 1, 0, 512, collect, &l);
    T_EQ(l.n, 1);
    td_grid_plan_close(p);
    d.group[0].D = 1 << 20;
    T_EQ(td_ship_plan_check(&d, TD_BF16), TD_ENOSUP);
    T_OK(td_ship_plan_first(8, 0, 100) == 93 && td_ship_plan_first(8, 95, 100) == 95 &&
         td_ship_plan_first(8, 0, 7) == 0 && td_ship_plan_first(8, 0, 8) == 1);
}

static void test_codec(void)
{
    const int sizes[] = {1, 3, 4, 8, 16, 64};
    static rects l;
    uint8_t *payload = malloc(TD_KVF_FRAME_BYTES);
    for (size_t a = 0; a < TD_COUNT(sizes); a++)
        for (size_t b = 0; b < TD_COUNT(sizes); b++) {
            uint32_t n = 131, hit = (uint32_t)(a * 7 + b * 5), chunk = 1 + (uint32_t)(a * 31 + b * 17) % 90;
            td_model_desc d;
            kv_desc(&d, 5, 2, a % 3 ? 40 : 8, b % 2 ? 40 : 0,
                    2); /* rows of 80 and 16 bytes: checked in lanes, and at the end */
            kv_side src, dst;
            kv_side_open(&src, &d, sizes[a], n, 0xAA, a);
            kv_side_open(&dst, &d, sizes[b], n, 0x55, b + 100);
            kv_side_tag(&src, &d, 0, n);
            run_plan(&d, hit, n, chunk, 1, &l);
            for (uint32_t i = 0; i < l.n; i++) {
                const td_rect *r = &l.r[i];
                const td_kv *ks = &src.kv[r->group];
                const td_codec_side side = td_codec_whole(ks, d.group[r->group].n_slots);
                uint32_t p0 = r->tok0 / (uint32_t)ks->P, np = (r->tok0 + r->n_tok - 1) / (uint32_t)ks->P - p0 + 1;
                T_EQ(td_codec_bytes(ks, r, &side.tokens),
                     td_ship_plan_token_bytes(&d, r->group, TD_BF16) * r->n_layers * r->n_tok);
                uint32_t sent = 0, read = 1;
                T_OK(td_codec_gather(&side, src.pages[r->group] + p0, p0, np, r, &side.tokens, payload, &sent));
                T_OK(kv_scatter(&dst, &d, r, payload, &read));
                T_OK(sent == read && sent == td_crc32c(0, payload, td_codec_bytes(ks, r, &side.tokens)),
                     "%08x %08x", sent, read);
            }
            for (int g = 0; g < d.n_groups; g++)
                T_EQ(kv_side_wrong(&dst, &d, g, td_ship_plan_first(d.group[g].window, hit, n), n, 0x55), 0);
            /* pages that are not there are refused, not touched */
            td_rect r = {.n_layers = 1, .n_heads = 2, .tok0 = 0, .n_tok = n}, one = r;
            const td_codec_side ws = td_codec_whole(&src.kv[0], d.group[0].n_slots),
                                wd = td_codec_whole(&dst.kv[0], d.group[0].n_slots);
            one.n_tok = 1;
            for (int k = 0; k < 3; k++) {
                td_rect bad = one;
                T_OK(td_codec_scatter(&wd, dst.pages[0], 0, dst.n_pages, &one, &wd.tokens, payload, NULL));
                if (k == 0) bad.head0 = 1;
                else if (k == 1) bad.layer0 = (uint16_t)d.group[0].n_slots;
                else bad.n_tok = 0;
                T_OK(!td_codec_scatter(&wd, dst.pages[0], 0, dst.n_pages, &bad, &wd.tokens, payload, NULL));
            }
            dst.pages[0][dst.n_pages / 2] = -1;
            T_OK(!td_codec_scatter(&wd, dst.pages[0], 0, dst.n_pages, &r, &wd.tokens, payload, NULL));
            T_OK(!td_codec_scatter(&wd, dst.pages[0], 1, dst.n_pages, &r, &wd.tokens, payload, NULL));
            T_OK(!td_codec_gather(&ws, src.pages[0], 0, src.n_pages - 1, &r, &ws.tokens, payload, NULL));
            kv_side_close(&src, &d);
            kv_side_close(&dst, &d);
        }
    free(payload);
}

/* More heads than there is room for their checksums: the payload's is taken in one piece. */
static void test_many_heads(void)
{
    enum { L = 9, G = 64, D = 32, N = 5 };
    td_model_desc d;
    kv_side src, dst;
    uint8_t *payload = malloc(TD_KVF_FRAME_BYTES);
    uint32_t sent = 0, read = 1;
    kv_desc(&d, L, G, D, 0, 1);
    kv_side_open(&src, &d, 4, N, 0xAA, 3);
    kv_side_open(&dst, &d, 2, N, 0x55, 4);
    kv_side_tag(&src, &d, 0, N);
    for (uint32_t t = 0; t < N; t++) {
        const td_rect r = {.n_layers = L, .n_heads = G, .tok0 = t, .n_tok = 1};
        const td_codec_side side = td_codec_whole(&src.kv[0], L);
        T_OK(td_codec_gather(&side, src.pages[0], 0, src.n_pages, &r, &side.tokens, payload, &sent));
        T_OK(kv_scatter(&dst, &d, &r, payload, &read));
        T_OK(sent == read && sent == td_crc32c(0, payload, td_codec_bytes(&src.kv[0], &r, &side.tokens)));
    }
    T_EQ(kv_side_wrong(&dst, &d, 0, 0, N, 0x55), 0);
    kv_side_close(&src, &d);
    kv_side_close(&dst, &d);
    free(payload);
}

int main(void)
{
    test_many_heads();
    test_plan();
    test_codec();
    return T_DONE();
}
