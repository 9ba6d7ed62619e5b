// SPDX-License-Identifier: Apache-2.0
/* tests/ship/test_machines.c - sender and receiver over a simulated link that loses, repeats, reorders and damages messages, from a seed.
 * Whatever happens: either every page is right, or the hand-off failed and nothing is written afterwards; and both ends come to an end. */
#include "common/check.h"
#include "common/crc.h"
#include "proto/kvframe.h"
#include "tests/ship/support_kv.h"
#include "tests/t.h"
#include "worker/ship/codec.h"
#include "worker/ship/receiver.h"
#include "worker/ship/sender.h"

enum { TIMEOUT = 5000000, FRAMES_MAX = 1 << 20, LINK_MAX = 512 };

typedef struct { int64_t at; td_kvframe head; uint8_t *payload; bool to_sender; } packet;
typedef struct {
    uint64_t seed;
    packet q[LINK_MAX];
    uint32_t n;
    int loss, dup, corrupt, reorder; /* of 1000 */
    uint32_t in_flight, most_in_flight, corrupted;
} link;

static void link_put(link *l, int64_t now, td_kvframe h, const void *payload, bool to_sender)
{
    for (int copies = 1 + ((int)kv_rnd(&l->seed, 1000) < l->dup); copies--;) {
        if ((int)kv_rnd(&l->seed, 1000) < l->loss || l->n == LINK_MAX) continue;
        packet p = {.at = now + 100 +
                          ((int)kv_rnd(&l->seed, 1000) < l->reorder ? (int64_t)kv_rnd(&l->seed, 300000) : 0),
                    .head = h,
                    .to_sender = to_sender};
        if (h.payload_bytes) {
            p.payload = malloc(h.payload_bytes);
            memcpy(p.payload, payload, h.payload_bytes);
        }
        if ((int)kv_rnd(&l->seed, 1000) < l->corrupt) {
            l->corrupted++;
            if (h.payload_bytes && kv_rnd(&l->seed, 2))
                p.payload[kv_rnd(&l->seed, (uint32_t)h.payload_bytes)] ^=
                    (uint8_t)(1u << kv_rnd(&l->seed, 8));
            else ((uint8_t *)&p.head)[kv_rnd(&l->seed, sizeof h)] ^= (uint8_t)(1u << kv_rnd(&l->seed, 8));
        }
        l->q[l->n++] = p;
    }
}

static bool link_get(link *l, int64_t now, packet *out)
{
    uint32_t best = l->n;
    for (uint32_t i = 0; i < l->n; i++)
        if (l->q[i].at <= now && (best == l->n || l->q[i].at < l->q[best].at)) best = i;
    if (best == l->n) return false;
    *out = l->q[best];
    memmove(&l->q[best], &l->q[best + 1], (l->n - best - 1) * sizeof *l->q);
    l->n--;
    return true;
}

typedef struct {
    td_model_desc d;
    kv_side src, dst;
    td_sender s;
    td_receiver *r;
    link l;
    int64_t now;
    td_epoch_state recv_state;
    bool recv_done, over, computing;
    uint32_t n, hit, n_first;
    td_grid_plan *plan;
    const char *why;
} world;

static void on_rect(void *arg, const td_rect *r)
{
    world *w = arg;
    td_send_event e = {.type = TD_SEND_RECT, .rect = *r};
    (void)td_sender_step(&w->s, w->now, &e);
}

static void pump_sender(world *w, td_send_event e)
{
    static uint8_t payload[TD_KVF_FRAME_BYTES];
    td_send_action a = td_sender_step(&w->s, w->now, &e);
    while (a.type != TD_SEND_NOTHING) {
        if (kv_rnd(&w->l.seed, 100) < 5) return; /* no room: the same action is offered at the next step */
        td_send_event p = {.type = TD_SEND_POSTED};
        if (a.type == TD_SEND_DO_FRAME) {
            const td_kv *kv = &w->src.kv[a.rect.group];
            static const td_token_set all = {{TD_TOKENS_ALL, 1, 0}, 0};
            p.bytes = td_codec_bytes(kv, &a.rect, &all);
            TD_CHECK(kv_gather(&w->src, &w->d, &a.rect, payload));
            td_frame_rect(&a.head, &a.rect, TD_BF16, kv->D, a.rect.n_tok);
            td_frame_seal(&a.head, payload, p.bytes);
            p.digest = td_frame_digest(&a.head);
            link_put(&w->l, w->now, a.head, payload, false);
        } else {
            td_buf b;
            td_buf_init(&b, 0);
            td_top top[2] = {{7, -1}, {8, -2}};
            td_first first[4] = {{1, -0.5f, 2, top}, {2, -1, 0, NULL}, {3, -1, 1, top}, {4, -1, 0, NULL}};
            td_commit c = {.n_first = a.head.n_first, .logprobs = true, .first = first};
            if (a.type == TD_SEND_DO_COMMIT) td_commit_write(&b, &c);
            td_frame_seal(&a.head, b.p, b.len);
            link_put(&w->l, w->now, a.head, b.p, false);
            td_buf_deinit(&b);
        }
        a = td_sender_step(&w->s, w->now, &p);
    }
}

static void settle(world *w, td_epoch *e)
{
    if (e->state == TD_EPOCH_LANDED) {
        td_arena arena;
        td_arena_init(&arena, 1 << 16);
        td_commit c;
        T_EQ(td_commit_read(&arena, e->commit, e->commit_bytes, e->n_first, &c), TD_OK);
        T_OK(c.first[0].token == 1 && c.first[0].n_top == 2 && c.first[0].top[1].id == 8);
        td_arena_deinit(&arena);
        for (int g = 0; g < w->d.n_groups; g++)
            T_EQ(kv_side_wrong(&w->dst, &w->d, g, td_ship_plan_first(w->d.group[g].window, w->hit, w->n),
                               w->n, 0x55),
                 0);
    }
    w->recv_done = true;
    w->recv_state = e->state;
    w->why = e->why;
    w->over = e->over;
    td_receiver_close(w->r, e);
    /* the pages belong to someone else from now on: nobody may write them */
    for (int g = 0; g < w->d.n_groups; g++) memset(w->dst.kv[g].base, 0x33, w->dst.bytes[g]);
}

static void deliver(world *w, packet *p)
{
    td_kvframe f;
    if (td_frame_parse(&p->head, sizeof p->head,
                       p->head.payload_bytes > FRAMES_MAX ? 0 : p->head.payload_bytes, &f) != TD_OK)
        return;
    if (p->to_sender) {
        td_send_event e = {.n = f.index};
        if (f.type == TD_KVF_CREDIT) e.type = TD_SEND_CREDIT;
        else if (f.type == TD_KVF_ACK) e.type = TD_SEND_ACK;
        else if (f.type == TD_KVF_NACK) e.type = TD_SEND_NACK;
        pump_sender(w, e);
        return;
    }
    td_rect rect;
    uint32_t crc = f.type == TD_KVF_COMMIT ? td_crc32c(0, p->payload, (size_t)f.payload_bytes) : 0;
    bool placed = td_receiver_place(w->r, &f, &rect) != NULL;
    if (placed) {
        T_OK(kv_scatter(&w->dst, &w->d, &rect, p->payload, &crc));
        T_OK(!w->recv_done, "a page was written after the end");
    }
    td_recv_action a = td_receiver_message(w->r, w->now, &f, p->payload, crc);
    T_OK(f.type != TD_KVF_FRAME || a.taken == (placed && crc == f.payload_crc32c), "placed %d, taken %d",
         placed, a.taken);
    if (a.epoch && a.epoch->state >= TD_EPOCH_LANDED) settle(w, a.epoch);
    if (a.answer) {
        td_kvframe h;
        td_frame_init(&h, a.answer, f.epoch, f.incarnation);
        h.index = a.credits;
        td_frame_seal(&h, NULL, 0);
        link_put(&w->l, w->now, h, NULL, true);
    }
}

typedef struct { int loss, dup, corrupt, reorder, cancel, slow; } faults;

static void run(uint64_t seed, faults f, int counts[4])
{
    world w = {.l = {.seed = seed, .loss = f.loss, .dup = f.dup, .corrupt = f.corrupt, .reorder = f.reorder},
               .now = 1000,
               .computing = true};
    uint64_t *sd = &w.l.seed;
    const int sizes[] = {1, 3, 4, 8, 16, 64};
    kv_desc(&w.d, 2 + (int)kv_rnd(sd, 4), 1 + (int)kv_rnd(sd, 2), 8, kv_rnd(sd, 3) == 0 ? 30 : 0, 2);
    w.n = 20 + kv_rnd(sd, 150);
    w.hit = kv_rnd(sd, 2) ? kv_rnd(sd, w.n) : 0;
    w.n_first = 1 + kv_rnd(sd, 4);
    kv_side_open(&w.src, &w.d, sizes[kv_rnd(sd, 6)], w.n, 0xAA, seed);
    kv_side_open(&w.dst, &w.d, sizes[kv_rnd(sd, 6)], w.n, 0x55, seed + 9);
    kv_side_tag(&w.src, &w.d, 0, w.n);
    uint32_t credits = 1 + kv_rnd(sd, 8);
    td_sender_init(
        &w.s,
        &(td_sender_opts){
            .epoch = 5, .incarnation = 77, .credits = credits, .max_frames = 10000, .timeout_us = TIMEOUT});
    w.r = td_receiver_open(&(td_receiver_opts){
        .desc = &w.d, .kv_dtype = TD_BF16, .incarnation = 77, .max_epochs = 4, .timeout_us = TIMEOUT});
    T_EQ(td_receiver_add(w.r, w.now, 5, w.hit, w.n, w.n_first, NULL), TD_OK);
    w.plan = kv_plan(&w.d, w.hit, w.n);
    uint32_t chunk = 1 + kv_rnd(sd, 40), tok = 0,
             cancel_at = kv_rnd(sd, 1000) < (uint32_t)f.cancel ? 1 + kv_rnd(sd, 200) : 0, steps = 0;
    int layer = 0;
    for (; steps < 20000; steps++) {
        w.now += 500 + kv_rnd(sd, 3000);
        bool sender_over = td_sender_done(&w.s);
        if (w.computing && !sender_over && kv_rnd(sd, 4)) { /* one more layer */
            td_grid_plan_add(w.plan, layer, layer + 1, tok, TD_MIN(tok + chunk, w.n), on_rect, &w);
            if (++layer == w.d.L) {
                layer = 0;
                tok += chunk;
            }
            if (tok >= w.n) {
                w.computing = false;
                pump_sender(&w, (td_send_event){.type = TD_SEND_COMMIT, .n = w.n_first});
            }
        }
        if (f.slow && kv_rnd(sd, 1000) < (uint32_t)f.slow) w.now += TIMEOUT / 2;
        if (steps == cancel_at && cancel_at)
            pump_sender(&w,
                        (td_send_event){.type = TD_SEND_CANCEL, .n = kv_rnd(sd, 2), .reason = "cancelled"});
        packet p;
        while (link_get(&w.l, w.now, &p)) {
            deliver(&w, &p);
            free(p.payload);
        }
        pump_sender(&w, (td_send_event){.type = TD_SEND_TICK});
        td_epoch *e = td_receiver_tick(w.r, w.now);
        if (e) settle(&w, e);
        if (td_sender_done(&w.s) && w.recv_done && !w.l.n) break;
    }
    T_OK(steps < 20000, "seed %llu does not end", (unsigned long long)seed);
    bool landed = w.recv_state == TD_EPOCH_LANDED;
    T_OK(w.s.state != TD_SENDER_ACKED || landed, "seed %llu: acknowledged but not landed", (unsigned long long)seed);
    if (!f.loss && !f.corrupt && !f.cancel && !f.slow)
        T_OK(landed && w.s.state == TD_SENDER_ACKED, "seed %llu: %s %s", (unsigned long long)seed, w.why,
             w.s.reason);
    for (int g = 0; g < w.d.n_groups; g++) { /* rule: nothing is written after the end */
        uint64_t dirty = 0;
        for (size_t i = 0; i < w.dst.bytes[g]; i++) dirty += w.dst.kv[g].base[i] != 0x33;
        T_EQ(dirty, 0);
    }
    counts[landed ? 0 : 1]++;
    counts[2] += w.s.state == TD_SENDER_ACKED;
    counts[3] += w.l.corrupted > 0;
    td_grid_plan_close(w.plan);
    td_sender_deinit(&w.s, NULL);
    td_receiver_free(w.r, NULL);
    kv_side_close(&w.src, &w.d);
    kv_side_close(&w.dst, &w.d);
}

static void test_model(int rounds)
{
    int c[4] = {0};
    for (int i = 0; i < rounds; i++) run((uint64_t)i * 1000003, (faults){0}, c);
    T_OK(c[0] == rounds && c[2] == rounds);
    memset(c, 0, sizeof c);
    for (int i = 0; i < rounds; i++) run((uint64_t)i * 1000003 + 1, (faults){.dup = 200, .reorder = 300}, c);
    T_OK(c[0] == rounds, "repeats and reordering are harmless: %d", c[0]);
    memset(c, 0, sizeof c);
    for (int i = 0; i < rounds; i++)
        run((uint64_t)i * 1000003 + 2, (faults){.loss = 20, .dup = 50, .corrupt = 20, .reorder = 100}, c);
    T_OK(c[0] > rounds / 20 && c[1] > rounds / 20 && c[3] > 0, "%d landed, %d failed", c[0], c[1]);
    memset(c, 0, sizeof c);
    for (int i = 0; i < rounds; i++)
        run((uint64_t)i * 1000003 + 3, (faults){.dup = 50, .reorder = 300, .cancel = 700, .slow = 30}, c);
    T_OK(c[1] > rounds / 20);
}

/* Single steps that the random walk may not hit. */
static td_kvframe frame_of(const td_model_desc *d, uint32_t index, int layer0, int n_layers, uint32_t tok0,
                           uint32_t n_tok, const void *payload)
{
    td_kvframe f;
    td_frame_init(&f, TD_KVF_FRAME, 5, 77);
    f.index = index;
    f.dtype = TD_BF16;
    f.layer0 = (uint16_t)layer0;
    f.n_layers = (uint16_t)n_layers;
    f.tok0 = tok0;
    f.n_tok = n_tok;
    f.n_heads = (uint16_t)d->G;
    f.n_held = n_tok;
    f.head_dim = (uint16_t)d->D;
    td_frame_seal(&f, payload, 4u * (size_t)n_layers * n_tok * (size_t)d->G * (size_t)d->D);
    return f;
}

static void expect_failed(const char *why, td_kvframe f, const void *payload)
{
    td_model_desc d;
    kv_desc(&d, 2, 1, 8, 0, 1);
    td_receiver *r = td_receiver_open(&(td_receiver_opts){
        .desc = &d, .kv_dtype = TD_BF16, .incarnation = 77, .max_epochs = 1, .timeout_us = 100});
    T_EQ(td_receiver_add(r, 0, 5, 4, 20, 1, NULL), TD_OK);
    T_EQ(td_receiver_add(r, 0, 6, 4, 20, 1, NULL), TD_EFULL);
    td_recv_action a = kv_receive(r, 1, &f, payload);
    T_OK(a.epoch && a.epoch->state == TD_EPOCH_FAILED && a.answer == TD_KVF_NACK && !a.taken && a.bad, "%s", why);
    T_STR(a.why, why);
    td_receiver_free(r, NULL);
}

static void test_refusals(void)
{
    td_model_desc d;
    kv_desc(&d, 2, 1, 8, 0, 1);
    static uint8_t pay[4096];
    td_kvframe good = frame_of(&d, 0, 0, 2, 4, 8, pay), f;
    f = good, f.group = 1, expect_failed("no such page group", f, pay);
    f = good, f.dtype = TD_F32, expect_failed("another KV type", f, pay);
    f = good, f.n_heads = 2, expect_failed("other heads or head size", f, pay);
    f = good, f.n_heads = 0, expect_failed("other heads or head size", f, pay);
    f = good, f.head0 = 1, expect_failed("other heads or head size", f, pay);
    f = good, f.n_held = 7, expect_failed("other tokens than this rank holds", f, pay);
    f = good, f.dst_rank = 1, expect_failed("for another rank", f, pay);
    f = good, f.src_rank = TD_SHIP_MAX_RANKS, expect_failed("source rank", f, pay);
    f = good, f.head_dim = 16, expect_failed("other heads or head size", f, pay);
    f = good, f.layer0 = 1, expect_failed("layers outside the group", f, pay);
    f = good, f.tok0 = 3, expect_failed("tokens outside the reservation", f, pay);
    f = good, f.tok0 = 13, expect_failed("tokens outside the reservation", f, pay);
    f = good, f.n_tok = 0xffffffffu, expect_failed("tokens outside the reservation", f, pay);
    f = good, f.n_tok = f.n_held = 7, expect_failed("payload size", f, pay);
    f = good, f.index = 1u << 30, expect_failed("frame index", f, pay);
    f = good, f.payload_crc32c ^= 1, expect_failed("payload checksum", f, pay);
    td_frame_init(&f, TD_KVF_COMMIT, 5, 77);
    td_frame_seal(&f, NULL, 0);
    f.n_first = 2, expect_failed("not one first token per choice", f, NULL);

    td_receiver *r = td_receiver_open(&(td_receiver_opts){
        .desc = &d, .kv_dtype = TD_BF16, .incarnation = 77, .max_epochs = 1, .timeout_us = 100});
    T_EQ(td_receiver_add(r, 0, 5, 4, 20, 1, NULL), TD_OK);
    f = good, f.incarnation = 78; /* of an earlier process: dropped, the epoch is untouched */
    td_recv_action a = kv_receive(r, 1, &f, pay);
    T_OK(!a.epoch && !a.taken && a.answer == TD_KVF_NACK);
    a = kv_receive(r, 1, &good, pay);
    T_OK(a.taken && a.epoch->state == TD_EPOCH_OPEN);
    a = kv_receive(r, 1, &good, pay); /* again: nothing */
    T_OK(!a.taken && a.epoch && a.epoch->state == TD_EPOCH_OPEN);
    f = frame_of(&d, 1, 0, 2, 11, 2, pay); /* another index, one token of it is here already */
    a = kv_receive(r, 1, &f, pay);
    T_OK(a.epoch && a.epoch->state == TD_EPOCH_FAILED && !a.taken);
    T_STR(a.why, "a part came twice");
    td_receiver_close(r, a.epoch);
    T_EQ(td_receiver_live(r), 0);
    T_OK(kv_receive(r, 1, &good, pay).epoch == NULL);
    /* COMMIT with too few frames: FAILED by the deadline; ABORT with index 0: over */
    T_EQ(td_receiver_add(r, 0, 5, 4, 20, 1, NULL), TD_OK);
    td_frame_init(&f, TD_KVF_COMMIT, 5, 77);
    f.index = 3;
    f.n_first = f.n_src = 1;
    td_frame_seal(&f, NULL, 0);
    a = kv_receive(r, 50, &f, NULL);
    T_OK(a.epoch->state == TD_EPOCH_COMMITTED && !a.answer);
    T_OK(!td_receiver_tick(r, 149));
    T_EQ(td_receiver_deadline(r), 150);
    td_epoch *e = td_receiver_tick(r, 150);
    T_OK(e && e->state == TD_EPOCH_FAILED);
    td_receiver_close(r, e);
    td_receiver_free(r, NULL);
}

/* COMMIT against what came: too little, or other bytes than were sent. */
static void test_commit(void)
{
    td_model_desc d;
    kv_desc(&d, 2, 1, 8, 0, 1);
    static uint8_t pay[4096];
    for (int wrong = 0; wrong < 3; wrong++) {
        td_receiver *r = td_receiver_open(&(td_receiver_opts){
            .desc = &d, .kv_dtype = TD_BF16, .incarnation = 77, .max_epochs = 1, .timeout_us = 100});
        T_EQ(td_receiver_add(r, 0, 5, 0, 20, 1, NULL), TD_OK);
        td_kvframe a = frame_of(&d, 0, 0, 2, 0, 10, pay), b = frame_of(&d, 1, 0, 2, 10, wrong == 1 ? 9 : 10, pay), c;
        T_OK(kv_receive(r, 1, &a, pay).taken && kv_receive(r, 1, &b, pay).taken);
        td_frame_init(&c, TD_KVF_COMMIT, 5, 77);
        c.index = 2;
        c.n_first = c.n_src = 1;
        c.digest = td_frame_digest(&a) ^ td_frame_digest(&b) ^ (wrong == 2);
        td_frame_seal(&c, NULL, 0);
        td_recv_action x = kv_receive(r, 2, &c, NULL);
        T_EQ(x.epoch->state, wrong ? TD_EPOCH_FAILED : TD_EPOCH_LANDED);
        T_EQ(x.answer, wrong ? TD_KVF_NACK : TD_KVF_ACK);
        if (wrong) T_STR(x.why, wrong == 1 ? "frames do not cover the reservation" : "digest");
        td_receiver_close(r, x.epoch);
        td_receiver_free(r, NULL);
    }
}

static void test_header(void)
{
    td_kvframe f, g;
    td_frame_init(&f, TD_KVF_CREDIT, 5, 77);
    td_frame_seal(&f, NULL, 0);
    T_EQ(td_frame_parse(&f, sizeof f, 0, &g), TD_OK);
    for (size_t bit = 0; bit < 8 * sizeof f; bit++) {
        g = f;
        ((uint8_t *)&g)[bit / 8] ^= (uint8_t)(1u << bit % 8);
        T_EQ(td_frame_parse(&g, sizeof g, 0, &g), TD_EPROTO);
    }
    T_EQ(td_frame_parse(&f, sizeof f - 1, 0, &g), TD_EPROTO);
    T_EQ(td_frame_parse(&f, sizeof f, 1, &g), TD_EPROTO);
}

static void test_credits(void)
{
    td_sender s;
    td_sender_init(&s, &(td_sender_opts){
                           .epoch = 5, .incarnation = 77, .credits = 2, .max_frames = 4, .timeout_us = 1000});
    td_send_event rect = {.type = TD_SEND_RECT, .rect = {.n_layers = 1, .n_tok = 1}},
                  posted = {.type = TD_SEND_POSTED}, credit = {.type = TD_SEND_CREDIT, .n = 1};
    for (int i = 0; i < 4; i++) T_EQ(td_sender_step(&s, 0, &rect).type, TD_SEND_DO_FRAME);
    T_EQ(td_sender_step(&s, 0, &posted).type, TD_SEND_DO_FRAME);
    T_EQ(td_sender_step(&s, 0, &posted).type, TD_SEND_NOTHING); /* both are out */
    T_EQ(td_sender_step(&s, 900, &credit).type, TD_SEND_DO_FRAME);
    T_EQ(td_sender_step(&s, 900, &posted).type, TD_SEND_NOTHING);
    td_send_event tick = {.type = TD_SEND_TICK}, many = {.type = TD_SEND_CREDIT, .n = 1u << 31};
    T_EQ(td_sender_step(&s, 1800, &tick).type, TD_SEND_NOTHING);
    T_EQ(s.state, TD_SENDER_SENDING);
    T_EQ(td_sender_step(&s, 1901, &tick).type, TD_SEND_DO_ABORT);
    T_OK(s.state == TD_SENDER_FAILED && !td_sender_done(&s) && !strcmp(s.reason, "no credits in time"));
    T_EQ(td_sender_step(&s, 1950, &tick).type, TD_SEND_DO_ABORT); /* the link had no room */
    T_EQ(td_sender_deadline(&s), 2901);
    T_EQ(td_sender_step(&s, 1960, &posted).type, TD_SEND_NOTHING);
    T_OK(td_sender_done(&s) && td_sender_deadline(&s) == INT64_MAX);
    td_sender_deinit(&s, NULL);
    /* an ABORT that never leaves: until the deadline, or until the peer is gone */
    td_send_event cancel = {.type = TD_SEND_CANCEL, .reason = "over"}, gone = {.type = TD_SEND_GONE, .reason = "x"};
    for (int how = 0; how < 2; how++) {
        td_sender_init(&s, &(td_sender_opts){.credits = 2, .max_frames = 4, .timeout_us = 1000});
        T_EQ(td_sender_step(&s, 900, &rect).type, TD_SEND_DO_FRAME);
        T_EQ(td_sender_step(&s, 1000, &cancel).type, TD_SEND_DO_ABORT); /* its own clock, not the frame's */
        T_EQ(td_sender_step(&s, 1999, &tick).type, TD_SEND_DO_ABORT);
        T_EQ(td_sender_step(&s, how ? 1999 : 2000, how ? &gone : &tick).type, TD_SEND_NOTHING);
        T_OK(td_sender_done(&s) && !strcmp(s.reason, "over"));
        td_sender_deinit(&s, NULL);
    }
    td_sender_init(&s, &(td_sender_opts){.credits = 2, .max_frames = 2, .timeout_us = 1000});
    (void)td_sender_step(&s, 0, &many); /* more than were given out: clamped */
    T_EQ(s.credits, 2);
    for (int i = 0; i < 3; i++) (void)td_sender_step(&s, 0, &rect); /* more than the table holds */
    T_EQ(s.state, TD_SENDER_FAILED);
    td_sender_deinit(&s, NULL);
}

/* Anything at all with a right header checksum: no crash, no write outside the reservation. */
static void test_receiver_fuzz(int rounds)
{
    uint64_t seed = 99;
    td_model_desc d;
    kv_desc(&d, 3, 2, 8, 10, 2);
    static uint8_t pay[1 << 16];
    kv_side side;
    kv_side_open(&side, &d, 4, 40, 0x55, 3);
    td_receiver *r = td_receiver_open(&(td_receiver_opts){
        .desc = &d, .kv_dtype = TD_BF16, .incarnation = 77, .max_epochs = 2, .timeout_us = 100});
    int writes = 0;
    for (int i = 0; i < rounds; i++) {
        if (!td_receiver_find(r, 5)) T_EQ(td_receiver_add(r, i, 5, 3, 40, 2, NULL), TD_OK);
        td_kvframe f;
        td_frame_init(&f, (uint16_t)(1 + kv_rnd(&seed, 6)), kv_rnd(&seed, 8) ? 5 : kv_rnd(&seed, 0),
                      kv_rnd(&seed, 8) ? 77 : 78);
        if (kv_rnd(&seed, 3)) f.type = TD_KVF_FRAME;
        f.index = kv_rnd(&seed, 20) ? kv_rnd(&seed, 8) : kv_rnd(&seed, 0);
        f.group = (uint16_t)kv_rnd(&seed, kv_rnd(&seed, 9) ? 2 : 70000);
        f.dtype = TD_BF16;
        f.layer0 = (uint16_t)kv_rnd(&seed, kv_rnd(&seed, 9) ? 2 : 65536);
        f.n_layers = (uint16_t)kv_rnd(&seed, kv_rnd(&seed, 9) ? 3 : 65536);
        f.tok0 = kv_rnd(&seed, kv_rnd(&seed, 9) ? 45 : 0);
        f.n_tok = kv_rnd(&seed, kv_rnd(&seed, 9) ? 40 : 0);
        f.head0 = (uint16_t)(kv_rnd(&seed, 4) ? 0 : kv_rnd(&seed, kv_rnd(&seed, 9) ? 2 : 65536));
        f.n_heads = (uint16_t)(kv_rnd(&seed, 4) ? 2 : kv_rnd(&seed, kv_rnd(&seed, 9) ? 3 : 65536));
        f.head_dim = 8;
        f.n_held = kv_rnd(&seed, 9) ? f.n_tok : kv_rnd(&seed, 0);
        f.src_rank = (uint16_t)kv_rnd(&seed, kv_rnd(&seed, 9) ? 3 : 65536);
        f.dst_rank = (uint16_t)!kv_rnd(&seed, 20);
        f.n_src = (uint16_t)(1 + kv_rnd(&seed, 3));
        f.n_first = kv_rnd(&seed, 3);
        uint64_t n = 32ull * f.n_heads * f.n_layers * f.n_tok;
        td_frame_seal(&f, pay, n <= sizeof pay ? n : kv_rnd(&seed, sizeof pay));
        td_rect rect;
        uint32_t crc = 0;
        if (td_receiver_place(r, &f, &rect)) {
            writes++;
            T_OK(kv_scatter(&side, &d, &rect, pay, &crc));
        }
        td_recv_action a = td_receiver_message(r, i, &f, pay, crc);
        if (a.epoch && a.epoch->state >= TD_EPOCH_LANDED) td_receiver_close(r, a.epoch);
    }
    T_OK(writes > rounds / 100, "%d writes", writes);
    td_receiver_free(r, NULL);
    kv_side_close(&side, &d);
    /* COMMIT's payload: every cut and many changes */
    td_buf b;
    td_buf_init(&b, 0);
    td_top top[2] = {{7, -1}, {8, -2}};
    td_first first[3] = {{1, -0.5f, 2, top}, {2, -1, 0, NULL}, {3, -1, 1, top}};
    td_commit_write(&b, &(td_commit){.n_first = 3, .logprobs = true, .first = first});
    for (int i = 0; i < rounds; i++) {
        uint8_t *p = malloc(b.len);
        memcpy(p, b.p, b.len);
        size_t n = kv_rnd(&seed, 4) ? b.len : kv_rnd(&seed, (uint32_t)b.len);
        for (uint32_t k = kv_rnd(&seed, 3); k--;)
            p[kv_rnd(&seed, (uint32_t)b.len)] = (uint8_t)kv_rnd(&seed, kv_rnd(&seed, 2) ? 4 : 256);
        uint8_t *exact = malloc(n + 1);
        memcpy(exact, p, n);
        td_arena arena;
        td_arena_init(&arena, 1 << 16);
        td_commit c;
        if (td_commit_read(&arena, exact, n, kv_rnd(&seed, 9) ? 3 : kv_rnd(&seed, 0), &c) == TD_OK)
            for (uint32_t k = 0; k < c.n_first; k++)
                writes += c.first[k].n_top ? (int)c.first[k].top[c.first[k].n_top - 1].id & 1 : 0;
        td_arena_deinit(&arena);
        free(exact);
        free(p);
    }
    td_buf_deinit(&b);
}

/* Two frames at 1000 and 3000, COMMIT at 5000: how long that took, and how much of it after the prompt's computation, which ended
 * `hidden` after the first frame by the sender's clock. */
static void expect_exposed(int64_t hidden, int64_t exposed)
{
    td_model_desc d;
    kv_desc(&d, 2, 1, 8, 0, 1);
    static uint8_t pay[4096];
    td_receiver *r = td_receiver_open(&(td_receiver_opts){
        .desc = &d, .kv_dtype = TD_BF16, .incarnation = 77, .max_epochs = 1, .timeout_us = TIMEOUT});
    T_EQ(td_receiver_add(r, 0, 5, 4, 12, 0, NULL), TD_OK);
    int64_t now = 1000, transfer_us = -1, exposed_us = -1;
    td_kvframe commit;
    td_frame_init(&commit, TD_KVF_COMMIT, 5, 77);
    for (uint32_t i = 0; i < 2; i++, now += 2000) {
        td_kvframe f = frame_of(&d, i, (int)i, 1, 4, 8, pay);
        commit.digest ^= td_frame_digest(&f);
        T_OK(kv_receive(r, now, &f, pay).taken);
    }
    commit.index = 2;
    commit.n_src = 1;
    commit.hidden_us = hidden;
    td_frame_seal(&commit, NULL, 0);
    td_epoch *e = kv_receive(r, now, &commit, NULL).epoch;
    T_OK(e && e->state == TD_EPOCH_LANDED, "%s", e && e->why ? e->why : "?");
    td_receiver_times(e, now, &transfer_us, &exposed_us);
    T_EQ(transfer_us, 4000);
    T_OK(exposed_us == exposed, "hidden %lld: exposed %lld", (long long)hidden, (long long)exposed_us);
    td_receiver_free(r, NULL);
}

static void test_times(void)
{
    expect_exposed(3500, 500);
    expect_exposed(0, 4000); /* the prompt was computed before anything left: all of the transfer, and no more */
    expect_exposed(4000, 0);
    expect_exposed(INT64_MAX, 0); /* a lie stays within the transfer */
    expect_exposed(INT64_MIN, 4000);

    td_model_desc d;
    kv_desc(&d, 2, 1, 8, 0, 1);
    td_receiver *r = td_receiver_open(&(td_receiver_opts){
        .desc = &d, .kv_dtype = TD_BF16, .incarnation = 77, .max_epochs = 1, .timeout_us = TIMEOUT});
    T_EQ(td_receiver_add(r, 0, 5, 12, 12, 0, NULL), TD_OK);
    int64_t transfer_us = -1, exposed_us = -1;
    td_receiver_times(td_receiver_find(r, 5), 9000, &transfer_us, &exposed_us);
    T_OK(transfer_us == 0 && exposed_us == 0, "no frame, no transfer: %lld, %lld", (long long)transfer_us, (long long)exposed_us);
    td_receiver_free(r, NULL);
}

int main(int argc, char **argv)
{
    test_refusals();
    test_times();
    test_commit();
    test_header();
    test_credits();
    test_receiver_fuzz(20000);
    test_model(argc > 1 ? atoi(argv[1]) : 300);
    return T_DONE();
}
