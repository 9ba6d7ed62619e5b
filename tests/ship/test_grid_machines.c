// SPDX-License-Identifier: Apache-2.0
/* tests/ship/test_grid_machines.c - senders and receivers of all ranks of two workers over a simulated network that loses, repeats,
 * reorders, damages and delays messages, from a seed. Whatever happens: every page of every rank is right, or some rank failed and
 * nothing is written afterwards; what is acknowledged everywhere has landed everywhere. And rank 0's book of the ranks' words. */
#include "common/check.h"
#include "common/crc.h"
#include "proto/kvframe.h"
#include "tests/ship/support_grid.h"
#include "tests/t.h"
#include "worker/ship/group.h"
#include "worker/ship/receiver.h"
#include "worker/ship/sender.h"

enum { TIMEOUT = 5000000, NET_MAX = 4096, RANKS = 8 };

typedef struct { int64_t at; td_kvframe head; uint8_t *payload; uint8_t src, dst; bool to_sender; } packet;
typedef struct { int loss, dup, corrupt, reorder, late, cancel, slow; } faults; /* of 1000 */

typedef struct {
    td_model_desc d;
    td_ship_grid gs, gd;
    grid_rank src[RANKS], dst[RANKS];
    uint32_t n_s, n_d, n, hit, n_first, written;
    td_grid_plan *plan[RANKS];
    td_sender snd[RANKS][RANKS];
    bool talks[RANKS][RANKS];
    td_receiver *rcv[RANKS];
    td_epoch_state state[RANKS];
    bool done[RANKS];
    uint32_t s; /* the source that adds now */
    uint64_t seed;
    faults f;
    packet q[NET_MAX];
    uint32_t n_q;
    int64_t now;
} world;

static uint32_t rnd(world *w, uint32_t n)
{
    return kv_rnd(&w->seed, n);
}

static void net_put(world *w, uint32_t s, uint32_t d, td_kvframe h, const void *payload, bool to_sender)
{
    for (int copies = 1 + ((int)rnd(w, 1000) < w->f.dup); copies--;) {
        if ((int)rnd(w, 1000) < w->f.loss || w->n_q == NET_MAX) continue;
        packet p = {.at = w->now + 100, .head = h, .to_sender = to_sender, .src = (uint8_t)s, .dst = (uint8_t)d};
        if ((int)rnd(w, 1000) < w->f.reorder) p.at += rnd(w, 300000);
        if ((int)rnd(w, 1000) < w->f.late) p.at += 3 * TIMEOUT; /* after everything is over */
        if (h.payload_bytes) {
            p.payload = malloc(h.payload_bytes);
            memcpy(p.payload, payload, h.payload_bytes);
        }
        if ((int)rnd(w, 1000) < w->f.corrupt) {
            if (h.payload_bytes && rnd(w, 2))
                p.payload[rnd(w, (uint32_t)h.payload_bytes)] ^= (uint8_t)(1u << rnd(w, 8));
            else ((uint8_t *)&p.head)[rnd(w, sizeof h)] ^= (uint8_t)(1u << rnd(w, 8));
        }
        w->q[w->n_q++] = p;
    }
}

static void pump(world *w, uint32_t s, uint32_t d, td_send_event e)
{
    static uint8_t payload[TD_KVF_FRAME_BYTES];
    td_send_action a = td_sender_step(&w->snd[s][d], w->now, &e);
    while (a.type != TD_SEND_NOTHING) {
        if (rnd(w, 100) < 5) return;
        td_send_event p = {.type = TD_SEND_POSTED};
        if (a.type == TD_SEND_DO_FRAME) {
            int g = a.rect.group;
            const td_codec_side from = grid_side(&w->src[s], g);
            const td_token_set *pick = &w->dst[d].part.tokens;
            p.bytes = td_codec_bytes(from.kv, &a.rect, pick);
            TD_CHECK(td_codec_gather(&from, w->src[s].pages[g], 0, w->src[s].n_pages[g], &a.rect, pick,
                                     payload, NULL));
            td_frame_rect(&a.head, &a.rect, TD_BF16, from.kv->D,
                          td_token_before(pick, a.rect.tok0 + a.rect.n_tok) - td_token_before(pick, a.rect.tok0));
            td_frame_seal(&a.head, payload, p.bytes);
            p.digest = td_frame_digest(&a.head);
            net_put(w, s, d, a.head, payload, false);
        } else {
            td_buf b;
            td_buf_init(&b, 0);
            td_first first[4] = {{1, -0.5f, 0, NULL}, {2, -1, 0, NULL}, {3, -1, 0, NULL}, {4, -1, 0, NULL}};
            td_commit c = {.n_first = a.head.n_first, .logprobs = true, .first = first};
            if (a.type == TD_SEND_DO_COMMIT) td_commit_write(&b, &c);
            td_frame_seal(&a.head, b.p, b.len);
            net_put(w, s, d, a.head, b.p, false);
            td_buf_deinit(&b);
        }
        a = td_sender_step(&w->snd[s][d], w->now, &p);
    }
}

static void on_rect(void *arg, const td_rect *r)
{
    world *w = arg;
    td_send_event e = {.type = TD_SEND_RECT, .rect = *r};
    T_OK(w->talks[w->s][r->dst], "a frame for a rank that hears nothing");
    (void)td_sender_step(&w->snd[w->s][r->dst], w->now, &e);
}

static void settle(world *w, uint32_t d, td_epoch *e)
{
    if (e->state == TD_EPOCH_LANDED) {
        T_EQ(grid_wrong(&w->dst[d], &w->d, w->hit, w->n, 0x55), 0);
        if (!d) { /* the first tokens came to rank 0 */
            td_arena a;
            td_commit c;
            td_arena_init(&a, 1 << 16);
            T_EQ(td_commit_read(&a, e->commit, e->commit_bytes, e->n_first, &c), TD_OK);
            T_OK(c.n_first == w->n_first && c.first[0].token == 1);
            td_arena_deinit(&a);
        }
    }
    w->done[d] = true;
    w->state[d] = e->state;
    td_receiver_close(w->rcv[d], e);
    for (int g = 0; g < w->d.n_groups; g++)
        memset(w->dst[d].kv[g].base, 0x33, w->dst[d].bytes[g]); /* someone else's now */
}

/* As ship_in does: what ends an epoch is told to every source. */
static void answer_all(world *w, uint32_t d, uint16_t type)
{
    td_kvframe h;
    td_frame_init(&h, type, 5, 77);
    td_frame_seal(&h, NULL, 0);
    for (uint32_t s = 0; s < w->n_s; s++)
        if (w->talks[s][d]) net_put(w, s, d, h, NULL, true);
}

static void deliver(world *w, packet *p)
{
    td_kvframe f;
    if (td_frame_parse(&p->head, sizeof p->head,
                       p->head.payload_bytes > (1 << 20) ? 0 : p->head.payload_bytes, &f) != TD_OK)
        return;
    if (p->to_sender) {
        td_send_event e = {.n = f.index};
        if (f.type == TD_KVF_CREDIT) e.type = TD_SEND_CREDIT;
        else if (f.type == TD_KVF_ACK) e.type = TD_SEND_ACK;
        else if (f.type == TD_KVF_NACK) e.type = TD_SEND_NACK;
        pump(w, p->src, p->dst, e);
        return;
    }
    grid_rank *to = &w->dst[p->dst];
    td_rect rect;
    uint32_t crc = f.type == TD_KVF_COMMIT ? td_crc32c(0, p->payload, (size_t)f.payload_bytes) : 0;
    if (td_receiver_place(w->rcv[p->dst], &f, &rect)) {
        const td_codec_side side = grid_side(to, rect.group);
        T_OK(td_codec_scatter(&side, to->pages[rect.group], 0, to->n_pages[rect.group], &rect, &side.tokens,
                              p->payload, &crc));
        T_OK(!w->done[p->dst], "a page was written after the end");
        w->written++;
    }
    td_recv_action a = td_receiver_message(w->rcv[p->dst], w->now, &f, p->payload, crc);
    bool ended = a.epoch && a.epoch->state >= TD_EPOCH_LANDED;
    if (ended) settle(w, p->dst, a.epoch);
    if (ended) answer_all(w, p->dst, w->state[p->dst] == TD_EPOCH_LANDED ? TD_KVF_ACK : TD_KVF_NACK);
    else if (a.answer) {
        td_kvframe h;
        td_frame_init(&h, a.answer, f.epoch, f.incarnation);
        h.index = a.credits;
        td_frame_seal(&h, NULL, 0);
        net_put(w, p->src, p->dst, h, NULL, true);
    }
}

static void setup(world *w)
{
    const int sizes[] = {1, 3, 4, 16};
    const uint32_t units[] = {1, 4, 16};
    kv_desc(&w->d, 8, 1 << rnd(w, 3), 2, rnd(w, 3) ? 0 : 19, 2);
    w->n = 5 + rnd(w, 140);
    w->hit = rnd(w, 3) ? 0 : rnd(w, w->n);
    w->n_first = 1 + rnd(w, 4);
    uint32_t grids = 0;
    while (grid_nth(&w->d, grids, RANKS, TD_TOKENS_ALL, 1, &w->gs)) grids++;
    TD_CHECK(grid_nth(&w->d, rnd(w, grids), RANKS, (td_token_kind)rnd(w, 3), units[rnd(w, 3)], &w->gs));
    TD_CHECK(grid_nth(&w->d, rnd(w, grids), RANKS, (td_token_kind)rnd(w, 3), units[rnd(w, 3)], &w->gd));
    w->n_s = td_ship_grid_ranks(&w->gs);
    w->n_d = td_ship_grid_ranks(&w->gd);
    int Ps = sizes[rnd(w, 4)], Pd = sizes[rnd(w, 4)];
    for (uint32_t d = 0; d < w->n_d; d++) {
        grid_open(&w->dst[d], &w->gd, &w->d, d, Pd, w->n, 0x55, w->seed + d);
        w->rcv[d] = td_receiver_open(&(td_receiver_opts){.desc = &w->d,
                                                         .kv_dtype = TD_BF16,
                                                         .incarnation = 77,
                                                         .max_epochs = 4,
                                                         .timeout_us = TIMEOUT,
                                                         .grid = &w->gd,
                                                         .rank = d});
        T_EQ(td_receiver_add(w->rcv[d], w->now, 5, w->hit, w->n, w->n_first, NULL), TD_OK);
        td_epoch *e = td_receiver_find(w->rcv[d], 5);
        if (e->state == TD_EPOCH_LANDED) settle(w, d, e);
    }
    for (uint32_t s = 0; s < w->n_s; s++) {
        grid_open(&w->src[s], &w->gs, &w->d, s, Ps, w->n, 0xAA, w->seed + 70 + s);
        grid_tag(&w->src[s], &w->d, w->n);
        T_EQ(td_grid_plan_open(&(td_grid_plan_opts){.desc = &w->d,
                                                    .kv = TD_BF16,
                                                    .src = &w->gs,
                                                    .dst = &w->gd,
                                                    .rank = s,
                                                    .hit = w->hit,
                                                    .n_tokens = w->n},
                               &w->plan[s]),
             TD_OK);
        for (uint32_t d = 0; d < w->n_d; d++) {
            td_sender_init(&w->snd[s][d],
                           &(td_sender_opts){.epoch = 5,
                                             .incarnation = 77,
                                             .credits = 1 + rnd(w, 6),
                                             .max_frames = 10000,
                                             .timeout_us = TIMEOUT,
                                             .src_rank = (uint16_t)s,
                                             .dst_rank = (uint16_t)d,
                                             .n_src = (uint16_t)td_grid_plan_sources(w->plan[s], d)});
            w->talks[s][d] = td_grid_plan_pair(w->plan[s], s, d);
            T_OK(!w->talks[s][d] || !w->done[d], "a rank that lacks nothing is sent something");
        }
    }
}

static void cancel_source(world *w, uint32_t s, uint32_t index)
{
    for (uint32_t d = 0; d < w->n_d; d++)
        if (w->talks[s][d] && !td_sender_done(&w->snd[s][d]))
            pump(w, s, d, (td_send_event){.type = TD_SEND_CANCEL, .n = index, .reason = "cancelled"});
}

/* A source's ranks give up together, as the ship thread does. */
static bool senders_over(world *w)
{
    bool over = true;
    for (uint32_t s = 0; s < w->n_s; s++) {
        bool failed = false;
        for (uint32_t d = 0; d < w->n_d; d++) failed |= w->talks[s][d] && w->snd[s][d].state == TD_SENDER_FAILED;
        if (failed)
            for (uint32_t k = 0; k < w->n_s; k++) cancel_source(w, k, 1);
    }
    for (uint32_t s = 0; s < w->n_s; s++)
        for (uint32_t d = 0; d < w->n_d; d++) over &= !w->talks[s][d] || td_sender_done(&w->snd[s][d]);
    return over;
}

typedef struct { int layer[RANKS]; uint32_t tok[RANKS], chunk; } progress;

static void compute(world *w, progress *p)
{
    for (uint32_t s = 0; s < w->n_s; s++) { /* stages and ranks go at their own pace */
        const td_ship_part *part = &w->src[s].part;
        if (p->tok[s] >= w->n || !rnd(w, 3)) continue;
        w->s = s;
        if (p->layer[s] < part->layer0) p->layer[s] = part->layer0;
        td_grid_plan_add(w->plan[s], p->layer[s], p->layer[s] + 1, p->tok[s],
                         TD_MIN(p->tok[s] + p->chunk, w->n), on_rect, w);
        if (++p->layer[s] < part->layer1) continue;
        p->layer[s] = part->layer0;
        p->tok[s] += p->chunk;
        for (uint32_t d = 0; d < w->n_d && p->tok[s] >= w->n; d++)
            if (w->talks[s][d])
                pump(w, s, d, (td_send_event){.type = TD_SEND_COMMIT, .n = !s && !d ? w->n_first : 0});
    }
}

static void run(uint64_t seed, faults f, int counts[2])
{
    static world w;
    memset(&w, 0, sizeof w);
    w.seed = seed;
    w.f = f;
    w.now = 1000;
    setup(&w);
    progress p = {.chunk = 1 + rnd(&w, 60)};
    uint32_t steps = 0, cancel_at = rnd(&w, 1000) < (uint32_t)f.cancel ? 1 + rnd(&w, 60) : 0;
    for (; steps < 20000; steps++) {
        w.now += 500 + rnd(&w, 3000);
        if (!senders_over(&w)) compute(&w, &p);
        if (f.slow && (int)rnd(&w, 1000) < f.slow) w.now += TIMEOUT / 2;
        if (cancel_at && steps == cancel_at) cancel_source(&w, rnd(&w, w.n_s), rnd(&w, 2));
        for (uint32_t i = 0; i < w.n_q;) {
            if (w.q[i].at > w.now) {
                i++;
                continue;
            }
            packet x = w.q[i];
            w.q[i] = w.q[--w.n_q];
            deliver(&w, &x);
            free(x.payload);
        }
        bool over = true;
        for (uint32_t s = 0; s < w.n_s; s++)
            for (uint32_t d = 0; d < w.n_d; d++)
                if (w.talks[s][d]) pump(&w, s, d, (td_send_event){.type = TD_SEND_TICK});
        for (uint32_t d = 0; d < w.n_d; d++) {
            td_epoch *e = td_receiver_tick(w.rcv[d], w.now);
            if (e) {
                settle(&w, d, e);
                answer_all(&w, d, TD_KVF_NACK);
            }
            over &= w.done[d];
        }
        if (senders_over(&w) && over && !w.n_q) break;
    }
    T_OK(steps < 20000, "seed %llu does not end", (unsigned long long)seed);
    bool landed = true, acked = true;
    for (uint32_t d = 0; d < w.n_d; d++) {
        uint64_t dirty = 0;
        landed &= w.state[d] == TD_EPOCH_LANDED;
        for (int g = 0; g < w.d.n_groups; g++)
            for (size_t i = 0; i < w.dst[d].bytes[g]; i++) dirty += w.dst[d].kv[g].base[i] != 0x33;
        T_EQ(dirty, 0);
        for (uint32_t s = 0; s < w.n_s; s++) acked &= !w.talks[s][d] || w.snd[s][d].state == TD_SENDER_ACKED;
    }
    T_OK(!acked || landed, "seed %llu: acknowledged but not landed", (unsigned long long)seed);
    if (!f.loss && !f.corrupt && !f.cancel && !f.slow && !f.late)
        T_OK(landed && acked, "seed %llu: %d %d", (unsigned long long)seed, landed, acked);
    counts[!landed]++;
    for (uint32_t s = 0; s < w.n_s; s++) {
        for (uint32_t d = 0; d < w.n_d; d++) td_sender_deinit(&w.snd[s][d], NULL);
        td_grid_plan_close(w.plan[s]);
        grid_close(&w.src[s], &w.d);
    }
    for (uint32_t d = 0; d < w.n_d; d++) {
        td_receiver_free(w.rcv[d], NULL);
        grid_close(&w.dst[d], &w.d);
    }
}

static void test_network(int rounds)
{
    const faults kinds[] = {{0},
                            {.dup = 200, .reorder = 300},
                            {.loss = 5, .dup = 50, .reorder = 100},
                            {.corrupt = 10, .reorder = 200},
                            {.dup = 50, .reorder = 300, .cancel = 700, .slow = 30},
                            {.dup = 100, .late = 10}};
    for (size_t k = 0; k < TD_COUNT(kinds); k++) {
        int c[2] = {0};
        for (int i = 0; i < rounds; i++) run((uint64_t)i * 1000003 + k * 17 + 1, kinds[k], c);
        if (k < 2) T_OK(c[0] == rounds, "%d of %d landed", c[0], rounds);
        else T_OK(c[0] > rounds / 20 && c[1] > rounds / 20, "faults %zu: %d landed, %d failed", k, c[0], c[1]);
    }
}

/* ---- several sources of one rank, step by step ---- */
static td_kvframe head(uint16_t type, uint16_t src, uint32_t index, uint16_t head0, const void *pay)
{
    td_kvframe f;
    td_frame_init(&f, type, 5, 77);
    f.index = index;
    f.src_rank = src;
    td_rect r = {.n_layers = 2, .head0 = head0, .n_heads = 1, .n_tok = 10};
    if (type == TD_KVF_FRAME) td_frame_rect(&f, &r, TD_BF16, 8, 10);
    td_frame_seal(&f, pay, type == TD_KVF_FRAME ? 2 * 2 * 10 * 8 * 2 : 0);
    return f;
}

static td_kvframe commit(uint16_t src, uint32_t frames, uint16_t n_src, uint64_t digest)
{
    td_kvframe f = head(TD_KVF_COMMIT, src, frames, 0, NULL);
    f.n_src = n_src;
    f.digest = digest;
    f.n_first = !src;
    td_frame_seal(&f, NULL, 0);
    return f;
}

static void test_sources(void)
{
    static uint8_t pay[4096];
    td_model_desc d;
    kv_desc(&d, 2, 2, 8, 0, 1);
    const char *why[] = {NULL,
                         "number of sources",
                         "digest",
                         "more frames than COMMIT says",
                         "frames do not cover the reservation",
                         "more sources than COMMIT says",
                         "not one first token per choice"};
    for (int k = 0; k < 7; k++) {
        td_receiver *r = td_receiver_open(&(td_receiver_opts){
            .desc = &d, .kv_dtype = TD_BF16, .incarnation = 77, .max_epochs = 1, .timeout_us = 100});
        T_EQ(td_receiver_add(r, 0, 5, 0, 10, 1, NULL), TD_OK);
        td_kvframe a = head(TD_KVF_FRAME, 0, 0, 0, pay), b = head(TD_KVF_FRAME, 3, 0, 1, pay),
                   x = head(TD_KVF_FRAME, 4, 0, 1, pay);
        td_kvframe ca = commit(0, k == 3 ? 0 : 1, k == 5 ? 1 : 2, td_frame_digest(&a)),
                   cb = commit(3, 1,
                               k == 1   ? 3
                               : k == 5 ? 1
                                        : 2,
                               td_frame_digest(&b) + (k == 2));
        if (k == 6) cb.n_first = 1;
        if (k == 4) cb.index = 0, cb.digest = 0;
        const td_kvframe *m[] = {&a, k == 5 ? &b : &ca, k == 4 ? &cb : k == 5 ? &ca : &b, &cb, &x};
        td_recv_action act = {0};
        int i = 0;
        for (; i < 5 && !(act.epoch && act.epoch->state >= TD_EPOCH_LANDED); i++) {
            act = kv_receive(r, 1, m[i], pay);
            T_OK(i || (act.taken && act.answer == TD_KVF_CREDIT));
        }
        T_OK(act.epoch && act.epoch->state == (k ? TD_EPOCH_FAILED : TD_EPOCH_LANDED), "case %d", k);
        if (k) T_STR(act.why ? act.why : "", why[k]);
        else T_OK(i == 4 && act.answer == TD_KVF_ACK); /* the last COMMIT decides */
        td_receiver_close(r, act.epoch);
        td_receiver_free(r, NULL);
    }
}

/* ---- rank 0's book ---- */
static td_ship_event *ev(td_ship_event_type t, uint64_t key, bool ok, const char *reason)
{
    td_ship_event *e = td_xalloc(sizeof *e);
    *e = (td_ship_event){.type = t, .key = key, .ok = ok, .frames = 1, .bytes = 10};
    snprintf(e->reason, sizeof e->reason, "%s", reason);
    td_arena_init(&e->arena, 1 << 10);
    return e;
}

static void peer(td_ship_group *g, uint32_t rank, td_ship_event_type t, uint64_t key, bool ok, const char *reason)
{
    td_ship_event *e = ev(t, key, ok, reason);
    td_ship_report r;
    td_ship_event_report(e, rank, &r);
    td_ship_group_peer(g, &r, NULL);
    td_ship_event_free(e);
}

static void expect(td_ship_group *g, int type, bool ok, const char *reason, uint32_t frames)
{
    td_ship_event *e = td_ship_group_next(g);
    T_OK((e ? (int)e->type : -1) == type, "%d, not %d", e ? (int)e->type : -1, type);
    if (!e) return;
    T_OK(e->key == 9 && e->ok == ok && !strcmp(e->reason, reason), "%s", e->reason);
    if (type != TD_SHIP_RECALL) T_EQ(e->frames, frames);
    td_ship_event_free(e);
}

static void test_book(void)
{
    td_ship_group *g = td_ship_group_open(3, 8);
    td_ship_group_begin(g, 9, true, 0);
    td_ship_group_own(g, ev(TD_SHIP_SENT, 9, true, ""));
    peer(g, 2, TD_SHIP_SENT, 9, true, "");
    peer(g, 2, TD_SHIP_SENT, 9, true, ""); /* said already */
    peer(g, 1, TD_SHIP_LANDED, 9, true, ""); /* about another kind of key */
    expect(g, -1, false, "", 0);
    peer(g, 1, TD_SHIP_SENT, 9, true, "");
    expect(g, TD_SHIP_SENT, true, "", 3);
    expect(g, -1, false, "", 0);
    /* one fails: the others are recalled, once, and the decision waits for them */
    td_ship_group_begin(g, 9, false, 0);
    peer(g, 1, TD_SHIP_LOST, 9, false, "payload checksum");
    expect(g, TD_SHIP_RECALL, false, "rank 1: payload checksum", 0);
    peer(g, 2, TD_SHIP_LANDED, 9, false, "");
    expect(g, -1, false, "", 0);
    td_ship_group_own(g, ev(TD_SHIP_CLOSED, 9, false, ""));
    expect(g, TD_SHIP_LOST, false, "rank 1: payload checksum", 3);
    td_ship_group_begin(g, 9, false, 0); /* the engine closes it */
    td_ship_group_own(g, ev(TD_SHIP_CLOSED, 9, false, ""));
    expect(g, TD_SHIP_RECALL, false, "", 0);
    peer(g, 1, TD_SHIP_CLOSED, 9, false, "");
    peer(g, 2, TD_SHIP_LANDED, 9, false, "");
    expect(g, TD_SHIP_CLOSED, false, "", 3);
    td_ship_group_begin(g, 9, true, 0); /* words about nothing; the last rank fails: nobody is left to recall */
    peer(g, 1, TD_SHIP_SENT, 7, true, "");
    peer(g, 3, TD_SHIP_SENT, 9, true, "");
    peer(g, 0, TD_SHIP_SENT, 9, true, "");
    td_ship_group_own(g, ev(TD_SHIP_SENT, 8, true, ""));
    peer(g, 1, TD_SHIP_SENT, 9, true, "");
    peer(g, 2, TD_SHIP_SENT, 9, true, "");
    td_ship_group_own(g, ev(TD_SHIP_SENT, 9, false, "no credits in time"));
    expect(g, TD_SHIP_SENT, false, "no credits in time", 3);
    td_ship_group_begin(g, 9, true, 0);
    td_ship_group_own(g, ev(TD_SHIP_SENT, 9, false, "x"));
    td_ship_group_free(g); /* with an event waiting and a key open */
}

/* Data parallel: the words of one replica's ranks decide, and its first rank's brings the first tokens. */
static void test_book_of_replicas(void)
{
    td_ship_group *g = td_ship_group_open(2, 8);
    const td_top top[2] = {{.id = 7, .logprob = -0.5f}, {.id = 3, .logprob = -2}};
    const td_first first = {.token = 7, .logprob = -0.5f, .n_top = 2, .top = top};
    const td_commit commit = {.n_first = 1, .logprobs = true, .first = &first};
    td_buf b;
    td_buf_init(&b, 0);
    td_commit_write(&b, &commit);
    td_ship_report r = {.key = 9, .type = TD_SHIP_LANDED, .rank = 4, .frames = 2,
                        .n_first = 1, .commit_bytes = (uint32_t)b.len};
    td_ship_group_begin(g, 9, false, 2);
    td_ship_group_own(g, ev(TD_SHIP_LANDED, 9, false, "")); /* rank 0 is of another */
    peer(g, 1, TD_SHIP_LANDED, 9, false, "");
    peer(g, 3, TD_SHIP_LANDED, 9, false, "");
    td_ship_group_peer(g, &r, b.p);
    td_ship_group_peer(g, &r, b.p);
    expect(g, -1, false, "", 0);
    peer(g, 5, TD_SHIP_LANDED, 9, false, "");
    td_ship_event *e = td_ship_group_next(g);
    T_OK(e && e->type == TD_SHIP_LANDED && e->frames == 3, "landed");
    T_OK(e && e->commit.n_first == 1 && e->commit.first->token == 7 && e->commit.first->n_top == 2, "first token");
    T_OK(e && e->commit.first->top[1].id == 3, "its alternatives");
    td_ship_event_free(e);
    td_ship_group_begin(g, 9, false, 2); /* what cannot be read has not landed */
    r.n_first = 2;
    td_ship_group_peer(g, &r, b.p);
    expect(g, TD_SHIP_RECALL, false, "rank 4: COMMIT of 36 bytes with 2 first tokens, 2 alternatives", 0);
    peer(g, 5, TD_SHIP_LANDED, 9, false, "");
    expect(g, TD_SHIP_LOST, false, "rank 4: COMMIT of 36 bytes with 2 first tokens, 2 alternatives", 3);
    td_ship_group_begin(g, 9, true, 1); /* recalled after the second rank's failure */
    peer(g, 3, TD_SHIP_SENT, 9, false, "no credits");
    expect(g, TD_SHIP_RECALL, false, "rank 3: no credits", 0);
    td_ship_group_free(g);
    td_buf_deinit(&b);
}

int main(int argc, char **argv)
{
    test_sources();
    test_book();
    test_book_of_replicas();
    test_network(argc > 1 ? atoi(argv[1]) : 120);
    return T_DONE();
}
