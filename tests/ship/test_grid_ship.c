// SPDX-License-Identifier: Apache-2.0
/* tests/ship/test_grid_ship.c - ship threads of all ranks of two workers over ipc sockets, with the wiring that a worker gives them:
 * rank 0's commands on every rank, the others' last words as reports, RECALL to all. Pages right, one last event a key, clean failures. */
#include "common/check.h"
#include "common/chan.h"
#include "common/clock.h"
#include "tests/ship/support_grid.h"
#include "tests/t.h"
#include "worker/ship/ship.h"
#include <unistd.h>

enum { CREDITS = 8, RANKS = 8, KEYS = 8, SRC_INC = 500, DST_INC = 600 };
static td_zctx *z;
static td_model_desc d;
static int serial;

typedef struct worker {
    td_ship_grid grid;
    uint32_t n;
    grid_rank rank[RANKS];
    td_ship *ship[RANKS];
    int wake;
    td_ship_event *last; /* the worker's last event about the one key */
    uint32_t n_last, recalls;
} worker;

static void worker_open(worker *w, const td_ship_grid *g, bool receives, int P, uint32_t n_tokens,
                        uint8_t fill, int64_t timeout_ms, const char *const fault[RANKS])
{
    *w = (worker){.grid = *g, .n = td_ship_grid_ranks(g), .wake = td_wake_open()};
    for (uint32_t r = 0; r < w->n; r++) {
        char bind[96];
        snprintf(bind, sizeof bind, "ipc:///tmp/td-gship-%d-%d", (int)getpid(), serial++);
        grid_open(&w->rank[r], g, &d, r, P, n_tokens, fill, 9 + r);
        td_ship_opts o = {.z = z,
                          .desc = &d,
                          .incarnation = receives ? DST_INC : SRC_INC,
                          .bulk_bind = receives ? bind : NULL,
                          .max_keys = KEYS,
                          .credits = CREDITS,
                          .timeout_us = timeout_ms * 1000,
                          .wake_fd = w->wake,
                          .grid = w->n > 1 ? &w->grid : NULL,
                          .rank = r,
                          .fault = fault ? fault[r] : NULL};
        for (int i = 0; i < d.n_groups; i++) o.kv[i] = &w->rank[r].kv[i];
        T_OK(td_ship_open(&o, &w->ship[r]) == TD_OK, "%s", td_reason());
    }
}

static void worker_close(worker *w)
{
    for (uint32_t r = 0; r < w->n; r++) td_ship_close(w->ship[r]);
    for (uint32_t r = 0; r < w->n; r++) grid_close(&w->rank[r], &d);
    if (w->last) td_ship_event_free(w->last);
    close(w->wake);
}

/* What a worker's ranks do in turn: the others report, rank 0 decides and recalls. */
static void worker_turn(worker *w)
{
    td_ship_event *e;
    for (uint32_t r = 1; r < w->n; r++) {
        td_ship_flush(w->ship[r]);
        while ((e = td_ship_poll(w->ship[r]))) {
            td_ship_report report;
            td_ship_event_report(e, r, &report);
            td_ship_peer(w->ship[0], &report, NULL);
            td_ship_event_free(e);
        }
    }
    td_ship_flush(w->ship[0]);
    while ((e = td_ship_poll(w->ship[0]))) {
        if (e->type != TD_SHIP_RECALL) {
            if (w->last) td_ship_event_free(w->last);
            w->last = e;
            w->n_last++;
            continue;
        }
        w->recalls++;
        for (uint32_t r = 1; r < w->n; r++) {
            if (e->sending) td_ship_send_cancel(w->ship[r], e->key, e->over ? 0 : 1, e->reason);
            else td_ship_recv_close(w->ship[r], e->key);
        }
        td_ship_event_free(e);
    }
}

static bool until_done(worker *a, worker *b, int ms)
{
    for (int64_t end = td_now_us() + (int64_t)ms * 1000; td_now_us() < end; usleep(500)) {
        worker_turn(a);
        worker_turn(b);
        if ((!a || a->n_last) && b->n_last) return true;
    }
    return false;
}

static void reserve(worker *b, uint64_t key, uint32_t hit, uint32_t n, uint32_t n_first)
{
    for (uint32_t r = 0; r < b->n; r++)
        td_ship_recv_open(b->ship[r], key, hit, n, n_first, (const int32_t *const *)b->rank[r].pages,
                          b->rank[r].n_pages);
}

static void send_open(worker *a, worker *b, uint64_t key, uint64_t epoch, uint32_t hit, uint32_t n)
{
    td_buf ranks;
    const char *ends[RANKS];
    td_buf_init(&ranks, 0);
    for (uint32_t r = 0; r < b->n; r++) ends[r] = td_ship_endpoint(b->ship[r]);
    T_EQ(td_ship_ranks(&b->grid, ends, &ranks), TD_OK);
    td_msg_sink sink = {.endpoint = ends[0],
                        .epoch = epoch,
                        .incarnation = DST_INC,
                        .hit_tokens = hit,
                        .credits = CREDITS,
                        .ranks = ranks.p,
                        .ranks_bytes = (uint32_t)ranks.len};
    for (uint32_t r = 0; r < a->n; r++) td_ship_send_open(a->ship[r], key, &sink, n);
    td_buf_deinit(&ranks);
}

static void compute(worker *a, uint64_t key, uint32_t n, uint32_t chunk)
{
    for (uint32_t t = 0; t < n; t += chunk)
        for (int l = 0; l < d.L; l++)
            for (uint32_t r = 0; r < a->n; r++) /* each rank says its own stage's layers */
                if (l >= a->rank[r].part.layer0 && l < a->rank[r].part.layer1)
                    td_ship_send_layers(a->ship[r], key, l, l + 1, t, TD_MIN(t + chunk, n),
                                        (const int32_t *const *)a->rank[r].pages, a->rank[r].n_pages);
}

static void commit(worker *a, uint64_t key, uint32_t n_first)
{
    td_top top[2] = {{7, -1}, {8, -2}};
    td_first first[2] = {{11, -0.5f, 2, top}, {12, -1, 0, NULL}};
    td_commit c = {.n_first = n_first, .logprobs = true, .first = first};
    for (uint32_t r = a->n; r-- > 0;) td_ship_send_commit(a->ship[r], key, &c, td_now_us());
}

typedef struct pair_of_grids { const char *what; uint16_t tp, pp, cp, tp2, pp2, cp2; } pair_of_grids;
static const pair_of_grids shapes[] = {
    {"one to one", 1, 1, 1, 1, 1, 1},        {"TP2 to one", 2, 1, 1, 1, 1, 1},
    {"one to TP2", 1, 1, 1, 2, 1, 1},        {"TP2 PP2 to CP2 TP2", 2, 2, 1, 2, 1, 2},
    {"CP2 PP2 to TP4", 1, 2, 2, 4, 1, 1},    {"TP4 to PP3", 4, 1, 1, 1, 3, 1},
    {"PP2 to PP2 CP2 TP2", 1, 2, 1, 2, 2, 2}};

static void grids(const pair_of_grids *s, td_ship_grid *a, td_ship_grid *b)
{
    *a = (td_ship_grid){.tp = s->tp,
                        .pp = s->pp,
                        .cp = s->cp,
                        .tokens = {s->cp > 1 ? TD_TOKENS_ZIGZAG : TD_TOKENS_ALL, s->cp, 32}};
    *b = (td_ship_grid){.tp = s->tp2,
                        .pp = s->pp2,
                        .cp = s->cp2,
                        .tokens = {s->cp2 > 1 ? TD_TOKENS_INTERLEAVE : TD_TOKENS_ALL, s->cp2, 16}};
    td_ship_grid_stages(a, (uint32_t)d.L);
    td_ship_grid_stages(b, (uint32_t)d.L);
}

static void test_good(const pair_of_grids *s, uint32_t n, uint32_t hit, uint32_t chunk)
{
    td_ship_grid ga, gb;
    worker a, b;
    grids(s, &ga, &gb);
    worker_open(&a, &ga, false, 16, n, 0xAA, 10000, NULL);
    worker_open(&b, &gb, true, 8, n, 0x55, 10000, NULL);
    for (uint32_t r = 0; r < a.n; r++) grid_tag(&a.rank[r], &d, n);
    reserve(&b, 5, hit, n, 2);
    send_open(&a, &b, 6, 5, hit, n);
    compute(&a, 6, n, chunk);
    commit(&a, 6, 2);
    T_OK(until_done(&a, &b, 20000), "%s: no end", s->what);
    T_OK(a.n_last == 1 && a.last->type == TD_SHIP_SENT && a.last->ok && a.last->key == 6, "%s: %s", s->what,
         a.last ? a.last->reason : "");
    T_OK(b.n_last == 1 && b.last->type == TD_SHIP_LANDED && b.last->key == 5, "%s: %s", s->what,
         b.last ? b.last->reason : "");
    if (a.last && b.last) {
        T_OK(b.last->commit.n_first == 2 && b.last->commit.first[0].token == 11 &&
                 b.last->commit.first[0].top[1].id == 8,
             "%s", s->what);
        T_EQ(a.last->bytes, b.last->bytes);
        T_EQ(a.last->frames, b.last->frames);
    }
    uint64_t wrong = 0;
    for (uint32_t r = 0; r < b.n; r++) wrong += grid_wrong(&b.rank[r], &d, hit, n, 0x55);
    T_OK(!wrong, "%s, %u tokens, hit %u: %llu wrong", s->what, n, hit, (unsigned long long)wrong);
    T_EQ(a.recalls + b.recalls, 0);
    worker_close(&a);
    worker_close(&b);
}

/* Something goes wrong on one rank: both workers come to an end, none says that it is well, and no ship has anything open. */
static void test_fault(const pair_of_grids *s, const char *fault, uint32_t at, const char *why)
{
    td_ship_grid ga, gb;
    worker a, b;
    const uint32_t n = 200;
    grids(s, &ga, &gb);
    const char *faults[RANKS] = {0};
    bool commits = true, lead = false;
    if (!strcmp(fault, "gone")) commits = false;
    else if (!strcmp(fault, "cancel")) lead = true, commits = false;
    else faults[at % ((uint32_t)ga.tp * ga.pp * ga.cp)] = fault;
    worker_open(&a, &ga, false, 16, n, 0xAA, 700, faults);
    worker_open(&b, &gb, true, 8, n, 0x55, 700, NULL);
    for (uint32_t r = 0; r < a.n; r++) grid_tag(&a.rank[r], &d, n);
    reserve(&b, 5, 0, n, 2);
    send_open(&a, &b, 6, 5, 0, n);
    compute(&a, 6, n, 64);
    if (commits) commit(&a, 6, 2);
    else usleep(200000); /* the links are there */
    if (lead)
        td_ship_send_cancel(a.ship[0], 6, 0,
                            "the request is over"); /* rank 0's engine; the others are recalled */
    if (!strcmp(fault, "gone")) td_ship_send_cancel(a.ship[a.n - 1], 6, 1, "a rank gave up");
    T_OK(until_done(&a, &b, 20000), "%s, %s: no end", s->what, fault);
    T_OK(a.n_last == 1 && a.last->type == TD_SHIP_SENT && !a.last->ok, "%s, %s: sent", s->what, fault);
    T_OK(b.n_last == 1 && b.last->type == TD_SHIP_LOST && b.last->over == lead, "%s, %s: lost", s->what, fault);
    /* whose word comes first is open: the rank's that found it, or of one that the sender then gave up */
    if (b.last)
        T_OK(strstr(b.last->reason, why) || strstr(b.last->reason, "gave up"), "%s, %s: %s", s->what, fault,
             b.last->reason);
    for (int i = 0; i < 400; i++, usleep(5000)) {
        uint32_t open = 0;
        for (uint32_t r = 0; r < b.n; r++) {
            td_ship_stats st;
            td_ship_stats_get(b.ship[r], &st);
            open += st.epochs_open;
        }
        if (!open) break;
        T_OK(i < 399, "%s, %s: an epoch is left", s->what, fault);
    }
    worker_turn(&a);
    worker_turn(&b);
    T_OK(a.n_last == 1 && b.n_last == 1);
    worker_close(&a);
    worker_close(&b);
}

/* The other ranks hear of the reservation late: what came before is not lost; never: it is refused after a while. */
static void test_early(const pair_of_grids *s, bool ever)
{
    td_ship_grid ga, gb;
    worker a, b;
    const uint32_t n = 200;
    grids(s, &ga, &gb);
    worker_open(&a, &ga, false, 16, n, 0xAA, 5000, NULL);
    worker_open(&b, &gb, true, 8, n, 0x55, 5000, NULL);
    for (uint32_t r = 0; r < a.n; r++) grid_tag(&a.rank[r], &d, n);
    td_ship_recv_open(b.ship[0], 5, 0, n, 2, (const int32_t *const *)b.rank[0].pages, b.rank[0].n_pages);
    send_open(&a, &b, 6, 5, 0, n);
    compute(&a, 6, n, 64);
    commit(&a, 6, 2);
    for (int64_t end = td_now_us() + 150000; td_now_us() < end; usleep(1000)) worker_turn(&a), worker_turn(&b);
    T_OK(!a.n_last && !b.n_last, "%s: decided without the other ranks", s->what);
    for (uint32_t r = 1; r < b.n && ever; r++)
        td_ship_recv_open(b.ship[r], 5, 0, n, 2, (const int32_t *const *)b.rank[r].pages, b.rank[r].n_pages);
    if (ever) {
        uint64_t wrong = 0;
        T_OK(until_done(&a, &b, 20000) && a.last->ok && b.last->type == TD_SHIP_LANDED, "%s: %s", s->what,
             a.last ? a.last->reason : "");
        for (uint32_t r = 0; r < b.n; r++) wrong += grid_wrong(&b.rank[r], &d, 0, n, 0x55);
        T_EQ(wrong, 0);
    } else {
        for (int i = 0; i < 10000 && !a.n_last; i++, usleep(1000)) worker_turn(&a), worker_turn(&b);
        T_OK(a.n_last && !a.last->ok && strstr(a.last->reason, "the epoch is not live"), "%s: %s", s->what,
             a.last ? a.last->reason : "no end");
    }
    worker_close(&a);
    worker_close(&b);
}

static void test_refused(void)
{
    td_ship_grid ga, gb;
    worker a, b;
    grids(&shapes[2], &ga, &gb);
    worker_open(&a, &ga, false, 16, 50, 0xAA, 700, NULL);
    worker_open(&b, &gb, true, 8, 50, 0x55, 700, NULL);
    td_buf junk;
    td_buf_init(&junk, 0);
    const char *ends[2] = {td_ship_endpoint(b.ship[0]), td_ship_endpoint(b.ship[1])};
    td_ship_grid bad = gb;
    bad.stage[1] = 3; /* not this model */
    T_EQ(td_ship_ranks(&bad, ends, &junk), TD_OK);
    for (int k = 0; k < 3; k++) {
        td_msg_sink sink = {.endpoint = ends[0],
                            .epoch = 5,
                            .incarnation = DST_INC,
                            .credits = CREDITS,
                            .ranks = k == 1 ? "\xff\xff" : junk.p,
                            .ranks_bytes = k == 0   ? (uint32_t)junk.len
                                           : k == 1 ? 2
                                                    : (uint32_t)junk.len / 2};
        td_ship_send_open(a.ship[0], 6, &sink, 50);
        for (int i = 0; i < 2000 && !a.n_last; i++, usleep(1000)) worker_turn(&a);
        T_OK(a.n_last == 1 && !a.last->ok && a.last->reason[0], "case %d", k);
        if (k == 0 && a.last)
            T_OK(strstr(a.last->reason, "stages cover layers 0 to 3") != NULL, "%s", a.last->reason);
        a.n_last = 0;
    }
    /* pages of other heads than the grid says */
    td_ship *s = NULL;
    td_ship_opts o = {
        .z = z, .desc = &d, .max_keys = 1, .timeout_us = 1000, .wake_fd = a.wake, .grid = &gb, .rank = 1};
    for (int i = 0; i < d.n_groups; i++) o.kv[i] = &a.rank[0].kv[i];
    T_EQ(td_ship_open(&o, &s), TD_EBADREQ);
    o.rank = 2;
    T_EQ(td_ship_open(&o, &s), TD_EBADREQ);
    td_buf_deinit(&junk);
    worker_close(&a);
    worker_close(&b);
}

/* The list of ranks as the router gets it from one worker and gives it to the other. */
static void test_messages(void)
{
    td_ship_grid ga, gb;
    grids(&shapes[3], &ga, &gb);
    const char *ends[4] = {"ipc:///a", "tcp://host:1", "c", "d"};
    td_buf ranks, b;
    td_buf_init(&ranks, 0);
    td_buf_init(&b, 0);
    td_arena a;
    td_arena_init(&a, 1 << 20);
    T_EQ(td_ship_ranks(&gb, ends, &ranks), TD_OK);
    td_msg m = {.type = TD_MSG_RESERVED, .sender = 1}, got, start = {.type = TD_MSG_START, .sender = 1};
    m.reserved.epoch = 3;
    m.reserved.endpoint = "";
    m.reserved.ranks = ranks.p;
    m.reserved.ranks_bytes = (uint32_t)ranks.len;
    T_EQ(td_msg_pack(&m, &b), TD_OK);
    T_EQ(td_msg_unpack(b.p, b.len, &a, &got), TD_OK);
    uint32_t prompt = 1;
    start.start.work = (td_msg_work){
        .prompt = {&prompt, 1}, .sampling = {.n = 1, .max_tokens = 1, .top_p = 1, .repetition_penalty = 1}};
    start.start.has_sink = true;
    start.start.sink = (td_msg_sink){
        .endpoint = "x", .credits = 1, .ranks = got.reserved.ranks, .ranks_bytes = got.reserved.ranks_bytes};
    td_buf_reset(&b);
    T_EQ(td_msg_pack(&start, &b), TD_OK);
    T_EQ(td_msg_unpack(b.p, b.len, &a, &got), TD_OK);
    T_OK(got.start.sink.ranks_bytes == ranks.len && !memcmp(got.start.sink.ranks, ranks.p, ranks.len));
    td_msg_ranks r;
    T_EQ(td_msg_ranks_unpack(got.start.sink.ranks, got.start.sink.ranks_bytes, &a, &r), TD_OK);
    T_OK(r.n == 4 && r.tp == 2 && r.pp == 1 && r.cp == 2 && r.token_kind == TD_TOKENS_INTERLEAVE &&
         r.token_unit == 16 && r.n_stages == 2 && r.stage[1] == 6);
    T_STR(r.endpoint[1], "tcp://host:1");
    for (size_t cut = 0; cut < ranks.len; cut++) (void)td_msg_ranks_unpack(ranks.p, cut, &a, &r); /* no crash */
    r.n = TD_MSG_MAX_RANKS + 1;
    T_EQ(td_msg_ranks_pack(&r, &b), TD_EFULL);
    td_arena_deinit(&a);
    td_buf_deinit(&b);
    td_buf_deinit(&ranks);
}

int main(void)
{
    z = td_zctx_open();
    kv_desc(&d, 6, 4, 64, 0, 1);
    for (size_t i = 0; i < TD_COUNT(shapes); i++) {
        test_good(&shapes[i], 613, 0, 256);
        test_good(&shapes[i], 130, 48, 64);
        test_good(&shapes[i], 65, 64, 64); /* some ranks lack nothing */
    }
    kv_desc(&d, 6, 4, 64, 100, 2);
    for (size_t i = 0; i < TD_COUNT(shapes); i++) test_good(&shapes[i], 613, 0, 128);
    kv_desc(&d, 6, 4, 64, 0, 1);
    for (size_t i = 1; i < TD_COUNT(shapes); i++) {
        test_fault(&shapes[i], "flip:1", (uint32_t)i, "payload checksum");
        test_fault(&shapes[i], "cancel", 0, "the request is over");
        if (i % 2) test_fault(&shapes[i], "drop:1", (uint32_t)i, "in time");
        if (i % 3 == 1) test_fault(&shapes[i], "gone", 0, "");
        if (i % 3 == 0) test_fault(&shapes[i], "delay-commit:3000", (uint32_t)i, "in time");
    }
    for (size_t i = 2; i < TD_COUNT(shapes); i++) test_early(&shapes[i], true);
    test_early(&shapes[2], false);
    test_refused();
    test_messages();
    td_zctx_close(z);
    return T_DONE();
}
