// SPDX-License-Identifier: Apache-2.0
#include "worker/ranks.h"
#include "common/check.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

td_status td_ranks_open(td_coll *world, const td_grid *grid, td_ranks *out)
{
    td_ranks r = {.grid = *grid, .world = world};
    int rank = td_coll_rank(world), tp = grid->tp, cp = grid->cp, pp = grid->pp;
    r.grid.rank = rank;
    if (td_coll_size(world) != td_grid_ranks(grid))
        return td_fail(TD_EBADREQ, "%d ranks were started for tensor %d x pipeline %d x context %d x data %d = %d", td_coll_size(world),
                       tp, pp, cp, grid->dp, td_grid_ranks(grid));
    r.at = td_grid_coord(grid, rank);
    td_coord c = r.at;
    td_status s = td_coll_split(world, (c.dp * pp + c.pp) * cp + c.cp, c.tp, &r.tp);
    if (s >= 0) s = td_coll_split(world, (c.dp * pp + c.pp) * tp + c.tp, c.cp, &r.cp);
    if (s >= 0) s = td_coll_split(world, (c.dp * cp + c.cp) * tp + c.tp, c.pp, &r.pp);
    if (s >= 0) s = td_coll_split(world, c.pp, (c.dp * cp + c.cp) * tp + c.tp, &r.stage);
    if (s >= 0) s = td_coll_split(world, c.pp * tp + c.tp, c.dp * cp + c.cp, &r.shard);
    if (s >= 0) s = td_coll_split(world, 0, rank, &r.back);
    if (s >= 0) s = td_coll_split(world, 0, rank, &r.news);
    if (s < 0) {
        td_ranks_close(&r);
        return s;
    }
    r.data.tp = r.tp, r.data.cp = r.cp, r.data.pp = r.pp, r.data.stage = r.stage;
    *out = r;
    return TD_OK;
}

void td_ranks_close(td_ranks *r)
{
    td_coll *all[] = {r->news, r->back, r->shard, r->stage, r->pp, r->cp, r->tp};
    for (size_t i = 0; i < TD_COUNT(all); i++)
        if (all[i]) td_coll_close(all[i]);
    *r = (td_ranks){0};
}

void td_ranks_deadline(td_ranks *r, int64_t timeout_us)
{
    td_coll *all[] = {r->news, r->back, r->shard, r->stage, r->pp, r->cp, r->tp, r->world};
    for (size_t i = 0; i < TD_COUNT(all); i++)
        if (all[i]) td_coll_deadline(all[i], timeout_us);
}

/* The first line in which two texts differ. */
static void first_difference(const char *a, const char *b, char *la, char *lb, size_t n)
{
    while (*a && *b) {
        size_t na = strcspn(a, "\n"), nb = strcspn(b, "\n");
        snprintf(la, n, "%.*s", (int)TD_MIN(na, n - 1), a);
        snprintf(lb, n, "%.*s", (int)TD_MIN(nb, n - 1), b);
        if (na != nb || memcmp(a, b, na)) return;
        a += na + (a[na] == '\n');
        b += nb + (b[nb] == '\n');
    }
}

td_status td_ranks_agree(td_coll *world, const char *text)
{
    enum { TEXT = 4096, LINE = 200 };
    int n = td_coll_size(world);
    char *all = td_xalloc((size_t)n * TEXT), mine[TEXT] = "";
    snprintf(mine, sizeof mine, "%s", text);
    td_status s = td_coll_all_gather(world, mine, all, TEXT);
    for (int i = 1; s >= 0 && i < n; i++) {
        char *other = all + (size_t)i * TEXT, la[LINE] = "", lb[LINE] = "";
        other[TEXT - 1] = 0;
        if (!strcmp(all, other)) continue;
        first_difference(all, other, la, lb, LINE);
        s = td_fail(TD_EPROTO, "the ranks were started differently: rank 0 has \"%s\", rank %d \"%s\"", la, i, lb);
    }
    free(all);
    return s;
}
