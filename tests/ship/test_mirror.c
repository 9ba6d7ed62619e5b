// SPDX-License-Identifier: Apache-2.0
/* tests/ship/test_mirror.c - what another rank does with rank 0's commands about hand-offs: carried out in order; one that is damaged,
 * lost, doubled or too long ends the worker on every rank, with the reason, and so does a report that cannot be read. */
#include "common/chan.h"
#include "common/check.h"
#include "common/log.h"
#include "tests/ship/support_grid.h"
#include "tests/t.h"
#include "tests/worker/support_ranks.h"
#include "worker/mirror.h"
#include <unistd.h>

enum { RANKS = 2, COMMANDS = 3 };
typedef enum { AS_SENT, CUT, LONGER, OTHER_KIND, LOST, TWICE, HEAD_ONLY, TOO_LONG, BAD_REPORT, CASES } damage;
static const struct { const char *name, *reason; } cases[CASES] = {
    [AS_SENT] = {"as sent", ""}, [CUT] = {"cut", "bytes, not"}, [LONGER] = {"longer", "bytes, not"},
    [OTHER_KIND] = {"of another kind", "of kind 99"}, [LOST] = {"lost", "command 1 comes where 0 was due"},
    [TWICE] = {"twice", "command 0 comes where 1 was due"}, [HEAD_ONLY] = {"almost nothing", "of 7 bytes"},
    [TOO_LONG] = {"too long", "too long"}, [BAD_REPORT] = {"a report", "a report of 10 bytes"},
};

static const td_ops *ops;
static td_model_desc d;
static damage how;
static td_mirror *mirror;            /* rank 1's */
static uint32_t n_commands;
static char reason[200];
static td_status heard, turned;

static td_status tell(const void *p, size_t n)
{
    td_status s = td_mirror_on_command(mirror, p, n);
    if (s < 0 && heard >= 0) snprintf(reason, sizeof reason, "%s", td_reason());
    if (s < 0) heard = s;
    return s;
}

/* On rank 1: the first command arrives otherwise than it was sent. */
static td_status on_command(void *arg, const void *p, size_t n)
{
    (void)arg;
    uint8_t copy[4096] = {0};
    TD_CHECK(n + 4 <= sizeof copy);
    memcpy(copy, p, n);
    if (n_commands++) return tell(copy, n);
    if (how == CUT) return tell(copy, n - 1);
    if (how == LONGER) return tell(copy, n + 4);
    if (how == HEAD_ONLY) return tell(copy, 7);
    if (how == LOST) return TD_OK;
    if (how == OTHER_KIND) copy[0] = 99;
    if (how == TWICE) TD_TRY(tell(copy, n));
    return tell(copy, n);
}

static size_t on_poll(void *arg, void *out, size_t cap)
{
    (void)arg;
    if (how != BAD_REPORT) return td_mirror_on_poll(mirror, out, cap);
    memset(out, 1, 10);
    return 10;
}

static td_status take(void *arg, const void *p, size_t n)
{
    td_status s = td_mirror_take(arg, p, n);
    if (s < 0) snprintf(reason, sizeof reason, "%s", td_reason());
    return s;
}

/* Rank 0: three hand-offs that the other rank does not know are recalled, and what it says of them is asked for. */
static void lead(td_engine *e, void *arg)
{
    td_ship_event recall = {.type = TD_SHIP_RECALL, .sending = true, .reason = "nobody wants it"};
    uint32_t told = 0;
    td_mirror_key k = {.engine = e, .n_told = &told};
    int32_t page = 0;
    const int32_t *pages[TD_MAX_GROUPS] = {&page};
    uint32_t n_pages[TD_MAX_GROUPS] = {0};
    (void)arg;
    if (how == TOO_LONG) { /* a context that no model has; the pages are not there */
        static int32_t many[(64 << 20) / 4];
        pages[0] = many;
        n_pages[0] = TD_COUNT(many);
        td_mirror_send_hit(&k, 0, 1, pages, n_pages);
    }
    for (int i = 0; i < COMMANDS; i++) {
        k.key = 100 + (uint64_t)i;
        td_mirror_recall(&k, &recall);
    }
    while ((turned = td_engine_poll(e, take, NULL)) == TD_AGAIN) {}
}

static void run(damage h)
{
    int wake = td_wake_open();
    td_ship_grid grid = td_ship_grid_one(&d);
    grid_rank pages;
    td_zctx *z = td_zctx_open();
    how = h, n_commands = 0, heard = turned = TD_OK, reason[0] = 0;
    grid.tp = RANKS;
    grid_open(&pages, &grid, &d, 1, 16, 64, 0, 1);
    td_ship_opts so = {.z = z,
                       .desc = &d,
                       .grid = &grid,
                       .rank = 1,
                       .incarnation = 3,
                       .max_keys = 4,
                       .timeout_us = 1000000,
                       .wake_fd = wake};
    for (int g = 0; g < d.n_groups; g++) so.kv[g] = &pages.kv[g];
    td_ship *ship;
    TD_CHECK(td_ship_open(&so, &ship) == TD_OK);
    td_ranks r = {.grid = {.tp = RANKS, .pp = 1, .cp = 1, .dp = 1, .rank = 1}};
    r.grid.layer0[1] = d.L;
    mirror = td_mirror_open(ship, &d, &r, so.max_keys);
    tr_opts o = {.shape = "ranks-tiny",
                 .ops = ops,
                 .grid = {.tp = RANKS, .pp = 1, .cp = 1, .dp = 1},
                 .attn_split = 64,
                 .block_rows = 1 << 20,
                 .depth = 1,
                 .on_command = on_command,
                 .on_poll = on_poll,
                 .engine = {.page_size = 16,
                            .kv_pages = 64,
                            .max_batched_tokens = 32,
                            .max_seqs = 4,
                            .max_legs = 8,
                            .hash_key = {1, 2}}};
    bool ok = tr_run(&o, lead, NULL);
    T_OK(ok == (h == AS_SENT), "%s: the worker %s", cases[h].name, ok ? "went on" : "ended");
    T_OK(strstr(reason, cases[h].reason), "%s: \"%s\"", cases[h].name, reason);
    T_OK(h == AS_SENT ? turned == TD_OK && n_commands == COMMANDS : turned < 0, "%s: rank 0 was told %d",
         cases[h].name, turned);
    td_ship_close(ship);
    td_mirror_close(mirror);
    grid_close(&pages, &d);
    td_zctx_close(z);
    close(wake);
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    T_OK(td_ops_open("auto", &ops) == TD_OK);
    T_OK(td_model_desc_shape("ranks-tiny", &d) == TD_OK);
    for (int h = 0; h < CASES; h++) run((damage)h);
    return T_DONE();
}
