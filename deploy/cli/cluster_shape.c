// SPDX-License-Identifier: Apache-2.0
/* deploy/cli/cluster_shape.c - text and numbers to a shape, a shape to options. */
#include "deploy/cli/cluster_shape.h"
#include "common/check.h"
#include "worker/grid.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

static int *size_of(td_shape *s, const char *name, size_t n)
{
    if (n != 2 || name[1] != 'p') return NULL;
    switch (name[0]) {
    case 't': return &s->tp;
    case 'p': return &s->pp;
    case 'c': return &s->cp;
    case 'd': return &s->dp;
    }
    return NULL;
}

static td_status parse_part(const char *what, const char *part, size_t n, td_shape *s)
{
    if (n == 2 && !memcmp(part, "ep", 2)) return s->ep = true, TD_OK;
    if (n == 4 && !memcmp(part, "fsdp", 4)) return s->fsdp = true, TD_OK;
    const char *eq = memchr(part, '=', n);
    int *size = eq ? size_of(s, part, (size_t)(eq - part)) : NULL;
    if (!size)
        return td_refuse(TD_EBADREQ, "%s: '%.*s' is none of tp=N, pp=N, cp=N, dp=N, ep, fsdp", what,
                         (int)TD_MIN(n, 40u), part);
    char *end;
    errno = 0;
    long v = strtol(eq + 1, &end, 10);
    if (errno || end == eq + 1 || end != part + n || v < 1 || v > TD_MAX_RANKS)
        return td_refuse(TD_EBADREQ, "%s: '%.*s' is not a number of ranks from 1 to %d", what,
                         (int)TD_MIN(n, 40u), part, TD_MAX_RANKS);
    *size = (int)v;
    return TD_OK;
}

td_status td_shape_parse(const char *what, const char *text, td_shape *out)
{
    td_shape s = {.tp = 1, .pp = 1, .cp = 1, .dp = 1};
    for (const char *p = text; *p;) {
        size_t n = strcspn(p, ",");
        TD_TRY(parse_part(what, p, n, &s));
        p += n;
        if (*p && !*++p) return td_refuse(TD_EBADREQ, "%s: nothing after the last comma", what);
    }
    if (td_shape_ranks(&s) > TD_MAX_RANKS)
        return td_refuse(TD_EBADREQ, "%s: more than %d ranks: %lld", what, TD_MAX_RANKS, td_shape_ranks(&s));
    *out = s;
    return TD_OK;
}

td_shape td_shape_of_conf(const td_conf *c)
{
    return (td_shape){.tp = c->tensor_parallel_size, .pp = c->pipeline_parallel_size,
                      .cp = c->context_parallel_size, .dp = c->data_parallel_size,
                      .ep = c->expert_parallel, .fsdp = c->fully_sharded};
}

/* What td_grid_check will say of tensor parallelism, without its log line: a choice tries many. */
static bool divides(const td_model_desc *d, int tp)
{
    return (tp & (tp - 1)) == 0 && d->H % tp == 0 && d->F % tp == 0 &&
           (tp <= d->G ? d->G % tp == 0 : tp % d->G == 0) &&
           (!d->moe.route.n_experts || d->moe.F % tp == 0);
}

static td_shape choose(const td_model_desc *d, int ranks)
{
    td_shape s = {.tp = 1, .pp = ranks, .cp = 1, .dp = 1};
    for (int tp = ranks; tp > 1; tp--) {
        if (ranks % tp || !divides(d, tp)) continue;
        s.tp = tp, s.pp = ranks / tp;
        break;
    }
    return s;
}

td_status td_shape_settle(const char *what, const td_model_desc *d, int ranks, bool given, td_shape *shape)
{
    td_shape s = *shape;
    if (!given && ranks > 1) {
        if (!d)
            return td_refuse(TD_EBADREQ,
                             "%s: %d ranks of a model that cannot be read here: give its sizes", what, ranks);
        td_shape chosen = choose(d, ranks);
        s.tp = chosen.tp, s.pp = chosen.pp;
    }
    if (ranks && td_shape_ranks(&s) != ranks)
        return td_refuse(TD_EBADREQ,
                         "%s: %d ranks, but tensor %d x pipeline %d x context %d x data %d is %lld", what,
                         ranks, s.tp, s.pp, s.cp, s.dp, td_shape_ranks(&s));
    if (d) {
        td_grid g = {.tp = s.tp, .pp = s.pp, .cp = s.cp, .dp = s.dp, .ep = s.ep, .fsdp = s.fsdp};
        td_status ok = td_grid_check(&g, d);
        char why[256];
        snprintf(why, sizeof why, "%s", td_reason());
        if (ok < 0) return td_refuse(ok, "%s: %s", what, why);
    }
    *shape = s;
    return TD_OK;
}

int td_shape_args(const td_shape *s, td_arena *a, char **argv)
{
    const struct { const char *name; int v; } size[] = {
        {"tensor", s->tp}, {"pipeline", s->pp}, {"context", s->cp}, {"data", s->dp}};
    int n = 0;
    char text[64];
    for (size_t i = 0; i < TD_COUNT(size); i++) {
        snprintf(text, sizeof text, "--%s-parallel-size=%d", size[i].name, size[i].v);
        if (!(argv[n++] = td_arena_strndup(a, text, strlen(text)))) return -1;
    }
    if (s->ep && !(argv[n++] = td_arena_strndup(a, "--expert-parallel", 17))) return -1;
    if (s->fsdp && !(argv[n++] = td_arena_strndup(a, "--fully-sharded", 15))) return -1;
    return n;
}
