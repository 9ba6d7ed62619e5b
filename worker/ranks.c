// SPDX-License-Identifier: Apache-2.0
#include "worker/ranks.h"
#include "common/check.h"
#include "common/hash.h"
#include "common/log.h"
#include "kernels/dev.h"
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

td_status td_ranks_open(td_coll *world, const td_grid *grid, td_ranks *out)
{
    td_ranks r = {.grid = *grid, .world = world};
    int rank = td_coll_rank(world), tp = grid->tp, cp = grid->cp, pp = grid->pp;
    r.grid.rank = rank;
    if (td_coll_size(world) != td_grid_ranks(grid))
        return td_fail(TD_EBADREQ,
                       "%d ranks were started for tensor %d x pipeline %d x context %d x data %d = %d",
                       td_coll_size(world), tp, pp, cp, grid->dp, td_grid_ranks(grid));
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
    r.data.tp = r.tp, r.data.cp = r.cp, r.data.pp = r.pp, r.data.stage = r.stage, r.data.shard = r.shard;
    *out = r;
    return TD_OK;
}

/* ---- groups for a device's memory ---- */

/* OK on all ranks, or not OK on all. */
static td_status all_or_none(td_coll *world, td_status mine)
{
    int n = td_coll_size(world), ok = mine >= 0, *all = td_xalloc((size_t)n * sizeof *all);
    td_status s = td_coll_all_gather(world, &ok, all, sizeof ok);
    for (int i = 0; i < n && s >= 0; i++)
        if (!all[i]) s = mine < 0 ? mine : td_refuse(TD_ENOSUP, "rank %d could not", i);
    free(all);
    return s;
}

static void close_data(td_ranks *r)
{
    td_coll *all[] = {r->data.shard, r->data.stage, r->data.pp, r->data.cp, r->data.tp};
    for (size_t i = 0; i < TD_COUNT(all) && r->dev; i++) td_coll_close(all[i]);
}

static td_status by_nccl(td_ranks *r, struct td_dev *dev)
{
    td_coord c = r->at;
    int tp = r->grid.tp, cp = r->grid.cp, pp = r->grid.pp;
    td_coll *all = NULL;
    td_status s = td_coll_nccl_open(r->world, dev->index, dev->stream[TD_STREAM_COMPUTE], NULL, &all);
    s = all_or_none(r->world, s);
    if (s >= 0) s = td_coll_split(all, (c.dp * pp + c.pp) * cp + c.cp, c.tp, &r->data.tp);
    if (s >= 0) s = td_coll_split(all, (c.dp * pp + c.pp) * tp + c.tp, c.cp, &r->data.cp);
    if (s >= 0) s = td_coll_split(all, (c.dp * cp + c.cp) * tp + c.tp, c.pp, &r->data.pp);
    if (s >= 0) s = td_coll_split(all, c.pp, (c.dp * cp + c.cp) * tp + c.tp, &r->data.stage);
    if (s >= 0) s = td_coll_split(all, c.pp * tp + c.tp, c.dp * cp + c.cp, &r->data.shard);
    td_coll_close(all);
    return s;
}

static td_status by_staging(td_ranks *r, struct td_dev *dev)
{
    TD_TRY(td_coll_staged_open(r->tp, dev, &r->data.tp));
    TD_TRY(td_coll_staged_open(r->cp, dev, &r->data.cp));
    TD_TRY(td_coll_staged_open(r->pp, dev, &r->data.pp));
    TD_TRY(td_coll_staged_open(r->stage, dev, &r->data.stage));
    return td_coll_staged_open(r->shard, dev, &r->data.shard);
}

td_status td_ranks_device(td_ranks *r, struct td_dev *dev)
{
    r->dev = dev;
    memset(&r->data, 0, sizeof r->data);
    td_status s = all_or_none(r->world, by_nccl(r, dev));
    if (s < 0) {
        TD_INFO("ranks exchange what is on their devices through this host's memory: %s", td_reason());
        close_data(r);
        memset(&r->data, 0, sizeof r->data);
        s = by_staging(r, dev);
    }
    return s;
}

void td_ranks_close(td_ranks *r)
{
    td_coll *all[] = {r->news, r->back, r->shard, r->stage, r->pp, r->cp, r->tp};
    close_data(r);
    for (size_t i = 0; i < TD_COUNT(all); i++)
        if (all[i]) td_coll_close(all[i]);
    *r = (td_ranks){0};
}

void td_ranks_deadline(td_ranks *r, int64_t timeout_us)
{
    td_coll *all[] = {r->news, r->back,  r->shard,   r->stage,   r->pp,      r->cp,
                      r->tp,   r->world, r->data.tp, r->data.cp, r->data.pp, r->data.stage, r->data.shard};
    for (size_t i = 0; i < TD_COUNT(all); i++)
        if (all[i]) td_coll_deadline(all[i], timeout_us);
}

/* ---- what one works out for all ---- */

typedef struct sum { /* of rank 0 */
    pthread_t thread;
    pthread_mutex_t lock;
    pthread_cond_t cond;
    int (*fn)(void *arg);
    void *arg;
    int value;
    bool done;
} sum;

static void *work_out(void *arg)
{
    sum *s = arg;
    int value = s->fn(s->arg);
    pthread_mutex_lock(&s->lock);
    s->value = value, s->done = true;
    pthread_cond_signal(&s->cond);
    pthread_mutex_unlock(&s->lock);
    return NULL;
}

static bool done_after(sum *s, int64_t us)
{
    struct timespec until;
    clock_gettime(CLOCK_MONOTONIC, &until);
    int64_t ns = until.tv_nsec + us % 1000000 * 1000;
    until.tv_sec += us / 1000000 + ns / 1000000000, until.tv_nsec = ns % 1000000000;
    pthread_mutex_lock(&s->lock);
    while (!s->done && pthread_cond_timedwait(&s->cond, &s->lock, &until) != ETIMEDOUT) continue;
    bool done = s->done;
    pthread_mutex_unlock(&s->lock);
    return done;
}

static td_status lead_sum(td_coll *world, sum *s, int64_t tick_us, int *out)
{
    td_status st = TD_OK;
    for (int said[2] = {0}; st >= 0 && !said[0];) {
        said[0] = done_after(s, tick_us);
        said[1] = said[0] ? s->value : 0;
        st = td_coll_bcast(world, said, sizeof said, 0);
        *out = said[1];
    }
    return st;
}

td_status td_ranks_compute(td_coll *world, int (*fn)(void *arg), void *arg, int64_t tick_us, int *out)
{
    int heard[2] = {0};
    if (td_coll_rank(world) != 0) {
        while (!heard[0]) TD_TRY(td_coll_bcast(world, heard, sizeof heard, 0));
        *out = heard[1];
        return TD_OK;
    }
    sum s = {.fn = fn, .arg = arg};
    pthread_condattr_t monotonic;
    pthread_condattr_init(&monotonic);
    pthread_condattr_setclock(&monotonic, CLOCK_MONOTONIC);
    pthread_mutex_init(&s.lock, NULL);
    pthread_cond_init(&s.cond, &monotonic);
    pthread_condattr_destroy(&monotonic);
    bool started = pthread_create(&s.thread, NULL, work_out, &s) == 0;
    if (!started) work_out(&s);
    td_status st = lead_sum(world, &s, tick_us, out);
    if (started) pthread_join(s.thread, NULL);
    pthread_cond_destroy(&s.cond);
    pthread_mutex_destroy(&s.lock);
    return st;
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
    enum { TEXT = TD_RANKS_TEXT, LINE = 200 };
    static const td_hkey key = {0x74616e64656d2d72ull, 0x616e6b732d303031ull};
    int n = td_coll_size(world);
    char *all = td_xalloc((size_t)n * TEXT), mine[TEXT] = "";
    size_t len = strlen(text), head = TD_MIN(len, (size_t)TEXT - LINE);
    snprintf(mine, sizeof mine, "%.*s", (int)head, text);
    if (len > head) /* what does not fit must be equal all the same */
        snprintf(mine + head, sizeof mine - head, "\nthe rest: %016llx\n",
                 (unsigned long long)td_siphash128(key, text + head, len - head).lo);
    td_status s = td_coll_all_gather(world, mine, all, TEXT);
    for (int i = 1; s >= 0 && i < n; i++) {
        char *other = all + (size_t)i * TEXT, la[LINE] = "", lb[LINE] = "";
        other[TEXT - 1] = 0;
        if (!strcmp(all, other)) continue;
        first_difference(all, other, la, lb, LINE);
        s = td_fail(TD_EPROTO, "the ranks were started differently: rank 0 has \"%s\", rank %d \"%s\"", la, i,
                    lb);
    }
    free(all);
    return s;
}

td_status td_ranks_all(td_coll *world, bool mine, bool *all)
{
    int n = td_coll_size(world);
    bool *each = td_xalloc((size_t)n * sizeof *each);
    td_status s = td_coll_all_gather(world, &mine, each, sizeof mine);
    *all = mine;
    for (int i = 0; i < n; i++) *all &= each[i];
    free(each);
    return s;
}
