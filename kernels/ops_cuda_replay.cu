// SPDX-License-Identifier: Apache-2.0
/* kernels/ops_cuda_replay.cu - steps of the CUDA table that are recorded once and run as one launch from then
 * on (td_replay of ops.h).
 *
 * A recording holds addresses: the caller's are in its key, the table's workspaces are counted
 * (context.moved). */
#include "kernels/ops_cuda.h"
extern "C" {
#include "common/log.h"
}

namespace td_ops_cuda
{
enum { MAX_GRAPHS = 48, MAX_UNFIT = 8 };

struct recorded {
    td_replay_key key;
    td_graph *graph;
    bool more;    /* partial results may be more than there is room for: the launches see to that */
    size_t parts; /* for which it is right */
    size_t moved, stamp;
};

static recorded graphs[MAX_GRAPHS];
static recorded fresh;               /* being recorded */
static const void *unfit[MAX_UNFIT]; /* owners of which a recording failed */
static size_t now;
static td_replay_stats stats;

static void forget(recorded *r)
{
    if (!r->graph) return;
    ctx.dev->graph_close(ctx.dev, r->graph);
    *r = recorded{};
    stats.dropped++;
}

static bool is_unfit(const void *owner)
{
    for (const void *u : unfit)
        if (u == owner) return true;
    return false;
}

/* Where more owners fail than there are places, the first ones are tried again. */
static void give_up(const void *owner)
{
    unfit[stats.failed++ % MAX_UNFIT] = owner;
    TD_INFO("steps are queued launch by launch: they cannot be recorded: %s", td_reason());
}

/* Few sizes, so that a few recordings serve all; beyond 64 rows products work in tiles of 64 and more. */
static int padded_rows(int n)
{
    if (n <= 8) return n <= 2 ? n : n <= 4 ? 4 : 8;
    int step = n <= 64 ? 8 : n <= 128 ? 16 : n <= 256 ? 32 : 64;
    return (n + step - 1) / step * step;
}

static int replay_rows(const void *owner, int n)
{
    if (n < 1 || n > TD_REPLAY_MAX_ROWS || !ctx.dev->capture_begin || is_unfit(owner)) return 0;
    return padded_rows(n);
}

static bool same(const td_replay_key *a, const td_replay_key *b)
{
    return a->owner == b->owner && a->rows == b->rows && !memcmp(a->word, b->word, sizeof a->word);
}

static bool more_parts(const td_replay_key *k)
{
    return k->parts > attention_most_parts();
}

/* The recording for this key; what has become useless goes. */
static recorded *find(const td_replay_key *k)
{
    for (recorded &r : graphs) {
        if (!r.graph || !same(&r.key, k) || r.more != more_parts(k)) continue;
        if (r.moved == ctx.moved && (r.more || k->parts <= r.parts)) return &r;
        forget(&r);
    }
    return nullptr;
}

static bool replay_run(const td_replay_key *k)
{
    recorded *r = may_run() ? find(k) : nullptr;
    if (!r) return false;
    r->stamp = ++now;
    stats.runs++;
    kept(ctx.dev->graph_run(ctx.dev, TD_STREAM_COMPUTE, r->graph));
    return true;
}

static bool replay_record_begin(const td_replay_key *k)
{
    if (!may_run() || is_unfit(k->owner) || find(k)) return false;
    fresh = recorded{};
    fresh.key = *k;
    fresh.more = more_parts(k);
    fresh.moved = ctx.moved;
    ctx.rec = recording{true, TD_OK, SIZE_MAX};
    td_status s = ctx.dev->capture_begin(ctx.dev, TD_STREAM_COMPUTE);
    if (s == TD_OK) return true;
    ctx.rec.on = false;
    give_up(k->owner);
    return false;
}

static void replay_record_end()
{
    td_status st = ctx.dev->capture_end(ctx.dev, TD_STREAM_COMPUTE, &fresh.graph);
    td_status lost = ctx.rec.status;
    ctx.rec.on = false;
    if (st != TD_OK || lost != TD_OK) {
        if (st == TD_OK) ctx.dev->graph_close(ctx.dev, fresh.graph);
        give_up(fresh.key.owner);
        return;
    }
    recorded *to = &graphs[0];
    for (recorded &r : graphs)
        if (r.stamp < to->stamp) to = &r;
    forget(to);
    fresh.parts = ctx.rec.parts;
    fresh.stamp = ++now;
    *to = fresh;
    stats.recorded++;
}

static void replay_drop(const void *owner)
{
    for (recorded &r : graphs)
        if (r.key.owner == owner) forget(&r);
    for (const void *&u : unfit)
        if (u == owner) u = nullptr;
}

static void replay_stats(td_replay_stats *out)
{
    *out = stats;
}

void replay_fill(td_ops *t)
{
    static const td_replay table = {replay_rows,       replay_run,  replay_record_begin,
                                    replay_record_end, replay_drop, replay_stats};
    t->replay = &table;
}

void replay_close()
{
    for (recorded &r : graphs) forget(&r);
    for (const void *&u : unfit) u = nullptr;
    stats = td_replay_stats{};
}
} // namespace td_ops_cuda

extern "C" void td_cuda_ops_steps(bool replay, bool overlap)
{
    if (!replay) td_ops_cuda::ctx.ops.replay = nullptr;
    if (!overlap) td_overlaps = false;
}
