// SPDX-License-Identifier: Apache-2.0
/* tests/ship/test_grid_plan.c - every pair of grids of up to 8 ranks a side: each element that a destination rank lacks
 * comes exactly once and is the right one (tags), whatever page sizes, KV heads, stages, windows, hits and chunks. */
#include "common/check.h"
#include "common/crc.h"
#include "proto/kvframe.h"
#include "tests/ship/support_grid.h"
#include "tests/t.h"

/* ---- which rank holds which token ---- */
static void test_token_map(void)
{
    const uint32_t units[] = {1, 3, 4, 16};
    for (int kind = 0; kind < 3; kind++)
        for (uint32_t n = 1; n <= 5; n++)
            for (size_t u = 0; u < 4; u++) {
                td_token_map m = {(td_token_kind)kind, n, units[u]};
                uint32_t count[5] = {0}, N = 211, x;
                T_OK(td_token_map_ok(&m));
                for (uint32_t t = 0; t < N; t++)
                    for (uint32_t r = 0; r < n; r++) {
                        td_token_set s = {m, r};
                        T_EQ(td_token_before(&s, t), count[r]);
                        bool held = td_token_held(&s, t);
                        if (held) T_EQ(td_token_at(&s, count[r]), t);
                        count[r] += held;
                        /* the run from here: the next held tokens without a gap */
                        uint32_t from = t, to, got = td_token_run(&s, t, N, &x);
                        while (from < N && !td_token_held(&s, from)) from++;
                        for (to = from; to < N && td_token_held(&s, to);) to++;
                        T_OK(got == from && x == to - from, "kind %d n %u unit %u rank %u: run at %u", kind,
                             n, units[u], r, t);
                    }
                uint32_t sum = 0;
                for (uint32_t r = 0; r < n; r++) sum += count[r];
                T_EQ(sum, kind == TD_TOKENS_ALL ? n * N : N);
            }
    /* a causal prompt of 128 tokens on 4 ranks: first and last eighth together */
    td_token_map z = {TD_TOKENS_ZIGZAG, 4, 16}, i = {TD_TOKENS_INTERLEAVE, 2, 4};
    T_OK(td_token_owner(&z, 0) == 0 && td_token_owner(&z, 127) == 0 && td_token_owner(&z, 16) == 1 &&
         td_token_owner(&z, 70) == 3);
    T_OK(td_token_owner(&i, 3) == 0 && td_token_owner(&i, 4) == 1 && td_token_owner(&i, 8) == 0);
    T_OK(!td_token_map_ok(&(td_token_map){TD_TOKENS_ZIGZAG, 2, 0}) &&
         !td_token_map_ok(&(td_token_map){TD_TOKENS_ALL, 0, 1}) &&
         !td_token_map_ok(&(td_token_map){TD_TOKENS_KINDS, 1, 1}));
}

static void test_part(void)
{
    td_model_desc d;
    kv_desc(&d, 5, 2, 8, 40, 2); /* layers 1 and 3 in the window group */
    td_ship_grid g = {.tp = 4, .pp = 2, .cp = 2, .tokens = {TD_TOKENS_INTERLEAVE, 2, 4}}, x;
    td_ship_grid_stages(&g, 5);
    T_EQ(td_ship_grid_check(&g, &d), TD_OK);
    td_ship_part p;
    td_ship_part_of(&g, &d, 15, &p); /* pp 1, cp 1, tp 3 */
    T_OK(p.layer0 == 3 && p.layer1 == 5 && p.head0[0] == 1 && p.n_heads[0] == 1 && p.tokens.rank == 1);
    T_OK(p.slot0[0] == 2 && p.n_slots[0] == 1 && p.slot0[1] == 1 && p.n_slots[1] == 1);
    T_OK(p.replica[0] == 1 && p.n_replicas[0] == 2);
    td_ship_part_of(&g, &d, 0, &p);
    T_OK(p.layer0 == 0 && p.layer1 == 3 && p.head0[0] == 0 && p.slot0[0] == 0 && p.n_slots[0] == 2 &&
         p.n_slots[1] == 1);
    td_grid wg = {.tp = 4, .pp = 2, .cp = 2, .dp = 1, .layer0 = {0, 3, 5}};
    x = td_ship_grid_of(&wg, 4); /* as the worker's own grid says */
    T_OK(td_ship_grid_check(&x, &d) == TD_OK && !memcmp(&x.tokens, &g.tokens, sizeof g.tokens) &&
         !memcmp(x.stage, g.stage, 3 * sizeof g.stage[0]));
    for (int r = 0; r < 16; r++) {
        td_local l = td_grid_local(&wg, &d, r);
        td_ship_part_of(&x, &d, (uint32_t)r, &p);
        T_OK(l.g0 == p.head0[0] && l.G == p.n_heads[0] && l.layer0 == p.layer0 && l.layer1 == p.layer1, "rank %d", r);
    }
    x = g;
    x.tp = 3;
    T_EQ(td_ship_grid_check(&x, &d), TD_EBADREQ);
    T_OK(strstr(td_reason(), "tensor parallel 3 neither divides nor is a multiple of 2 KV heads") != NULL,
         "%s", td_reason());
    x = g;
    x.stage[1] = 5;
    T_EQ(td_ship_grid_check(&x, &d), TD_EBADREQ);
    x = g;
    x.stage[2] = 4;
    T_EQ(td_ship_grid_check(&x, &d), TD_EBADREQ);
    x = g;
    x.cp = 0;
    T_EQ(td_ship_grid_check(&x, &d), TD_EBADREQ);
    x = g;
    x.tokens.n = 3;
    T_EQ(td_ship_grid_check(&x, &d), TD_EBADREQ);
    x = g;
    x.pp = 33;
    T_EQ(td_ship_grid_check(&x, &d), TD_EBADREQ);
}

/* ---- plans ---- */
typedef struct job {
    td_model_desc d;
    td_ship_grid gs, gd;
    grid_rank src[8], dst[8];
    td_grid_plan *plan;
    uint32_t s, n_s, n_d, hit, n;
    uint64_t sent[8][8], frames, rect_bytes, most_frames;
    bool bad_frame;
} job;

static void carry(void *arg, const td_rect *r)
{
    static uint8_t payload[TD_KVF_FRAME_BYTES];
    job *j = arg;
    grid_rank *a = &j->src[j->s], *b = &j->dst[r->dst];
    const td_codec_side from = grid_side(a, r->group), to = grid_side(b, r->group);
    size_t bytes = td_codec_bytes(&a->kv[r->group], r, &to.tokens);
    j->bad_frame |= bytes > TD_KVF_FRAME_BYTES || !bytes || r->dst >= j->n_d;
    if (j->bad_frame) return;
    uint32_t P = (uint32_t)a->kv[r->group].P,
             p0 = td_token_before(&from.tokens, r->tok0) / P; /* a part of the table */
    uint32_t sent = 0, read = 1;
    j->bad_frame |= !td_codec_gather(&from, a->pages[r->group] + p0, p0, a->n_pages[r->group] - p0, r,
                                     &to.tokens, payload, &sent);
    j->bad_frame |=
        !td_codec_scatter(&to, b->pages[r->group], 0, b->n_pages[r->group], r, &to.tokens, payload, &read);
    j->bad_frame |= sent != read || sent != td_crc32c(0, payload, td_codec_bytes(to.kv, r, &to.tokens));
    j->sent[j->s][r->dst] += bytes / 2;
    j->frames++;
}

static void run_sources(job *j, uint32_t chunk, int step)
{
    for (j->s = 0; j->s < j->n_s; j->s++) {
        td_grid_plan_opts o = {.desc = &j->d,
                               .kv = TD_BF16,
                               .src = &j->gs,
                               .dst = &j->gd,
                               .rank = j->s,
                               .hit = j->hit,
                               .n_tokens = j->n};
        T_EQ(td_grid_plan_open(&o, &j->plan), TD_OK);
        const td_ship_part *p = &j->src[j->s].part;
        for (uint32_t t = 0; t < j->n; t += chunk)
            for (int l = p->layer0; l < p->layer1; l += step)
                td_grid_plan_add(j->plan, l, TD_MIN(l + step, (int)p->layer1), t, TD_MIN(t + chunk, j->n), carry, j);
        for (uint32_t k = 0; k < j->n_d; k++) {
            T_EQ(td_grid_plan_elements(j->plan, j->s, k), j->sent[j->s][k]);
            T_EQ(td_grid_plan_pair(j->plan, j->s, k), j->sent[j->s][k] || (!j->s && !k));
        }
        td_grid_plan_close(j->plan);
    }
}

static void check_all(job *j, const char *what)
{
    uint64_t wrong = 0, twice = 0;
    for (uint32_t k = 0; k < j->n_d; k++) {
        uint64_t want = 0, got = 0;
        for (int g = 0; g < j->d.n_groups; g++)
            want += td_ship_part_lacks(&j->dst[k].part, &j->d, g, j->hit, j->n) * j->dst[k].part.n_slots[g] *
                    j->dst[k].part.n_heads[g] * 2 * (uint64_t)j->d.group[g].D;
        for (uint32_t s = 0; s < j->n_s; s++) got += j->sent[s][k];
        twice += got != want; /* all are right and as many came as there are: none came twice */
        wrong += grid_wrong(&j->dst[k], &j->d, j->hit, j->n, 0x55);
    }
    T_OK(!wrong && !twice && !j->bad_frame,
         "%s: (%u %u %u) to (%u %u %u), %u tokens, hit %u: %llu wrong, %llu counts, frame %d", what, j->gs.tp,
         j->gs.pp, j->gs.cp, j->gd.tp, j->gd.pp, j->gd.cp, j->n, j->hit, (unsigned long long)wrong,
         (unsigned long long)twice, j->bad_frame);
}

/* Other stage bounds than equal ones, as measured times would give. */
static void uneven(td_ship_grid *g, int L, uint64_t *seed)
{
    for (int k = 0; k < 8 && g->pp > 1; k++) {
        uint32_t s = 1 + kv_rnd(seed, g->pp - 1u);
        int to = g->stage[s] + (kv_rnd(seed, 2) ? 1 : -1);
        if (to > g->stage[s - 1] && to < g->stage[s + 1] && to < L) g->stage[s] = (uint16_t)to;
    }
}

static void one(job *j, int G, uint32_t i, uint32_t k, int Ps, int Pd, uint64_t seed)
{
    const uint32_t lengths[] = {1, 17, 61, 127, 33}, units[] = {1, 3, 4, 16};
    memset(j, 0, sizeof *j);
    kv_desc(&j->d, 9, G, 2, seed % 3 ? 0 : 19, 2);
    j->n = seed % 41 == 40 ? 601 : lengths[seed % 5];
    j->hit = seed % 4 == 0 ? kv_rnd(&seed, j->n) : 0;
    T_OK(grid_nth(&j->d, i, 8,
                  seed % 3 == 1 ? TD_TOKENS_ALL
                  : seed % 3    ? TD_TOKENS_ZIGZAG
                                : TD_TOKENS_INTERLEAVE,
                  units[kv_rnd(&seed, 4)], &j->gs));
    T_OK(grid_nth(&j->d, k, 8,
                  seed % 4 == 1   ? TD_TOKENS_ALL
                  : seed % 4 == 2 ? TD_TOKENS_ZIGZAG
                                  : TD_TOKENS_INTERLEAVE,
                  units[kv_rnd(&seed, 4)], &j->gd));
    if (kv_rnd(&seed, 2)) uneven(&j->gs, j->d.L, &seed), uneven(&j->gd, j->d.L, &seed);
    j->n_s = td_ship_grid_ranks(&j->gs);
    j->n_d = td_ship_grid_ranks(&j->gd);
    for (uint32_t r = 0; r < j->n_s; r++) {
        grid_open(&j->src[r], &j->gs, &j->d, r, Ps, j->n, 0xAA, seed + r);
        grid_tag(&j->src[r], &j->d, j->n);
    }
    for (uint32_t r = 0; r < j->n_d; r++) grid_open(&j->dst[r], &j->gd, &j->d, r, Pd, j->n, 0x55, seed + 50 + r);
    run_sources(j, 1 + kv_rnd(&seed, 90), 1 + (int)kv_rnd(&seed, 3));
    check_all(j, "grids");
    for (uint32_t r = 0; r < j->n_s; r++) grid_close(&j->src[r], &j->d);
    for (uint32_t r = 0; r < j->n_d; r++) grid_close(&j->dst[r], &j->d);
}

static uint32_t test_grids(uint32_t rounds)
{
    static const int sizes[] = {1, 3, 4, 16}, heads[] = {1, 2, 4};
    static job j;
    uint32_t runs = 0;
    for (int h = 0; h < 3; h++) {
        td_model_desc d;
        td_ship_grid g;
        uint32_t n = 0;
        kv_desc(&d, 9, heads[h], 2, 0, 1);
        while (grid_nth(&d, n, 8, TD_TOKENS_ALL, 1, &g)) n++;
        T_OK(n > 20, "%u grids", n);
        for (uint32_t i = 0; i < n; i++)
            for (uint32_t k = 0; k < n; k++)
                for (uint32_t r = 0; r < rounds;
                     r++, runs++) /* 16: every pair of page sizes; everything else goes round */
                    one(&j, heads[h], i, k, sizes[runs % 4], sizes[runs / 4 % 4], runs + 3);
    }
    return runs;
}

/* Where one side has copies, all of its ranks share the work; frames are large. */
static void test_balance(void)
{
    static job j;
    memset(&j, 0, sizeof j);
    kv_desc(&j.d, 4, 2, 64, 0, 1);
    j.gs = (td_ship_grid){.tp = 4, .pp = 1, .cp = 1, .stage = {0, 4}, .tokens = {TD_TOKENS_ALL, 1, 0}};
    j.gd = td_ship_grid_one(&j.d);
    j.n = 2048;
    for (int way = 0; way < 2; way++) { /* TP 4 of 2 heads to one; to TP 4 */
        if (way) j.gd.tp = 4;
        td_grid_plan *p;
        T_EQ(td_grid_plan_open(
                 &(td_grid_plan_opts){
                     .desc = &j.d, .kv = TD_BF16, .src = &j.gs, .dst = &j.gd, .n_tokens = j.n},
                 &p),
             TD_OK);
        for (uint32_t s = 0; s < 4; s++) {
            uint64_t sum = 0;
            for (uint32_t k = 0; k < (way ? 4u : 1u); k++) sum += td_grid_plan_elements(p, s, k);
            T_EQ(sum, 4ull * 2 * 64 * 2048 / (way ? 1 : 2));
        }
        T_EQ(td_grid_plan_sources(p, 0), way ? 1 : 4);
        td_grid_plan_close(p);
    }
    /* one rank to two that interleave tokens by pages of 16: still frames of hundreds of tokens */
    j.gs = td_ship_grid_one(&j.d);
    j.gd = (td_ship_grid){.tp = 1, .pp = 1, .cp = 2, .stage = {0, 4}, .tokens = {TD_TOKENS_INTERLEAVE, 2, 16}};
    j.n_s = 1, j.n_d = 2;
    grid_open(&j.src[0], &j.gs, &j.d, 0, 16, j.n, 0xAA, 1);
    grid_tag(&j.src[0], &j.d, j.n);
    for (uint32_t r = 0; r < 2; r++) grid_open(&j.dst[r], &j.gd, &j.d, r, 16, j.n, 0x55, 9 + r);
    run_sources(&j, 256, 1);
    check_all(&j, "interleaved");
    T_OK(j.frames <= 8 * 2 * 2, "%llu frames", (unsigned long long)j.frames);
    grid_close(&j.src[0], &j.d);
    for (uint32_t r = 0; r < 2; r++) grid_close(&j.dst[r], &j.d);
    td_grid_plan *p;
    T_EQ(td_grid_plan_open(
             &(td_grid_plan_opts){
                 .desc = &j.d, .kv = TD_BF16, .src = &j.gs, .dst = &j.gd, .rank = 1, .n_tokens = 5},
             &p),
         TD_EBADREQ);
}

int main(int argc, char **argv)
{
    test_token_map();
    test_part();
    test_balance();
    uint32_t runs = test_grids(argc > 1 ? (uint32_t)atoi(argv[1]) : 16);
    T_OK(runs > 1000, "%u", runs);
    return T_DONE();
}
