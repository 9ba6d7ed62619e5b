// SPDX-License-Identifier: Apache-2.0
#include "worker/rank_ship.h"
#include "common/chan.h"
#include "common/check.h"
#include "worker/mirror.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

td_status td_rank_beat(const td_conf *c, td_ranks *r, td_zctx *z, const td_curve *curve, td_beat **out)
{
    enum { BYTES = 256 };
    char where[BYTES] = "", bound[BYTES] = "";
    const char *bulk = c->bulk_bind, *colon = strrchr(bulk, ':');
    /* Beside the bulk sockets: a port of its own on their address, or a path beside theirs. */
    if (!strncmp(bulk, "ipc:", 4)) snprintf(where, sizeof where, "%s.beat", bulk);
    else if (colon) snprintf(where, sizeof where, "%.*s:*", (int)(colon - bulk), bulk);
    else return td_fail(TD_EBADREQ, "bulk-bind %s is no endpoint", bulk);
    td_beat_opts o = {.z = z, .rank = r->grid.rank, .n_ranks = td_coll_size(r->world), .curve = curve,
                      .timeout_us = (int64_t)c->rank_timeout_ms * 1000};
    td_status s = TD_OK;
    o.endpoint = where;
    if (o.rank == 0) {
        s = td_beat_open(&o, bound, sizeof bound, out);
        if (s < 0) td_coll_abort(r->world, td_reason());
    }
    td_ship_reachable(bound, where, sizeof where);
    if (s >= 0) s = td_coll_bcast(r->world, where, sizeof where, 0);
    return s < 0 || o.rank == 0 ? s : td_beat_open(&o, NULL, 0, out);
}

td_status td_rank_incarnation(td_ranks *r, uint64_t *incarnation)
{
    return td_coll_bcast(r->world, incarnation, sizeof *incarnation, 0);
}

td_status td_rank_endpoints(td_ranks *r, const td_ship_grid *grid, const char *mine, td_ship_home *out)
{
    enum { BYTES = 256 };
    int n = td_coll_size(r->world), each = (int)td_ship_grid_ranks(grid);
    char own[BYTES] = "", *all = td_xalloc((size_t)n * BYTES);
    snprintf(own, sizeof own, "%s", mine);
    td_status s = td_coll_all_gather(r->world, own, all, BYTES);
    for (int k = 0; k < r->grid.dp && s >= 0 && out && mine[0]; k++) {
        const char *end[TD_SHIP_MAX_RANKS];
        for (int i = 0; i < each; i++) end[i] = all + (size_t)(k * each + i) * BYTES;
        snprintf(out[k].endpoint, sizeof out[k].endpoint, "%s", end[0]);
        s = td_ship_ranks(grid, end, &out[k].ranks);
    }
    free(all);
    return s;
}

/* A place of its own for each rank's socket: ipc paths get a suffix, fixed ports count up. */
static void bind_of(const char *bulk_bind, int rank, char *out, size_t n)
{
    const char *colon = strrchr(bulk_bind, ':');
    int port = colon && !strncmp(bulk_bind, "tcp:", 4) ? atoi(colon + 1) : 0;
    if (!strncmp(bulk_bind, "ipc:", 4)) snprintf(out, n, "%s.%d", bulk_bind, rank);
    else if (port > 0) snprintf(out, n, "%.*s:%d", (int)(colon - bulk_bind), bulk_bind, port + rank);
    else snprintf(out, n, "%s", bulk_bind);
}

typedef struct other { /* a rank that is not 0 */
    td_zctx *z;
    td_curve curve;
    td_ship *ship;
    td_mirror *mirror;
    td_beat *beat;
    int wake_fd;
} other;

static td_status opened(void *arg, td_rank_self *self, td_exec_opts *x)
{
    other *o = arg;
    const td_conf *c = self->conf;
    td_ranks *r = self->ranks;
    const td_model_desc *d = td_model_descr(self->boot.model);
    td_ship_grid grid = td_ship_grid_of(&r->grid, (uint32_t)c->attention_split);
    char where[300], endpoint[256] = "";
    uint64_t incarnation = 0;
    TD_TRY(td_rank_incarnation(r, &incarnation));
    bool keys = c->curve_secret_file[0], receives = strcmp(c->role, "prefill");
    bind_of(c->bulk_bind, r->grid.rank, where, sizeof where);
    o->wake_fd = td_wake_open();
    uint32_t place = (uint32_t)r->grid.rank % td_ship_grid_ranks(&grid); /* among its replica's ranks */
    td_ship_opts so = {.z = o->z, .desc = d, .grid = &grid, .rank = place, .replica = (uint32_t)r->at.dp,
                       .replicas = (uint32_t)r->grid.dp,
                       .incarnation = incarnation, .bulk_bind = receives ? where : NULL, .curve = keys ? &o->curve : NULL,
                       .max_keys = (uint32_t)self->boot.opts.max_legs, .credits = (uint32_t)c->credits,
                       .timeout_us = (int64_t)c->ship_timeout_ms * 1000,
                       .wake_fd = o->wake_fd};
    for (int g = 0; g < d->n_groups; g++) so.kv[g] = &self->kv[g];
    TD_TRY(td_ship_open(&so, &o->ship));
    td_ship_advertised(o->ship, c->bulk_advertise, endpoint, sizeof endpoint);
    o->mirror = td_mirror_open(o->ship, d, r, so.max_keys);
    x->on_layer = td_mirror_on_layer;
    x->on_command = td_mirror_on_command;
    x->on_poll = td_mirror_on_poll;
    x->arg = o->mirror;
    return td_rank_endpoints(r, &grid, endpoint, NULL);
}

static void closing(void *arg)
{
    other *o = arg;
    td_beat_close(o->beat); /* the others need not wait for this rank to give its memory back */
    o->beat = NULL;
    td_ship_close(o->ship);
    td_mirror_close(o->mirror);
}

/* Before the model is loaded, which may take long. */
static td_status start_beats(const td_conf *c, td_ranks *r, other *o)
{
    bool keys = c->curve_secret_file[0];
    if (keys) TD_TRY(td_curve_load(&o->curve, c->curve_secret_file, c->curve_public_file[0] ? c->curve_public_file : NULL));
    o->z = td_zctx_open();
    return td_rank_beat(c, r, o->z, keys ? &o->curve : NULL, &o->beat);
}

td_status td_rank_ship_serve(const td_conf *c, td_ranks *r)
{
    other o = {.wake_fd = -1};
    td_rank_hooks h = {opened, closing, &o};
    td_status s = start_beats(c, r, &o);
    if (s < 0) td_coll_abort(r->world, td_reason());
    else s = td_rank_serve(c, r, &h);
    td_beat_close(o.beat);
    if (o.z) td_zctx_close(o.z);
    if (o.wake_fd >= 0) close(o.wake_fd);
    return s;
}
