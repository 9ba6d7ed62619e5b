// SPDX-License-Identifier: Apache-2.0
#include "worker/ship/token_map.h"
#include "common/check.h"

enum { MAX_N = 1024, MAX_UNIT = 1 << 20 };

static bool everything(const td_token_map *m)
{
    return m->kind == TD_TOKENS_ALL || m->n <= 1;
}

bool td_token_map_ok(const td_token_map *m)
{
    return (unsigned)m->kind < TD_TOKENS_KINDS && m->n >= 1 && m->n <= MAX_N &&
        (everything(m) || (m->unit >= 1 && m->unit <= MAX_UNIT));
}

/* Blocks until the pattern repeats, and how many of them are one rank's. */
static uint32_t period(const td_token_map *m, uint32_t *mine)
{
    *mine = m->kind == TD_TOKENS_ZIGZAG ? 2 : 1;
    return *mine * m->n;
}

uint32_t td_token_owner(const td_token_map *m, uint32_t t)
{
    uint32_t mine;
    if (everything(m)) return 0;
    uint32_t b = t / m->unit % period(m, &mine);
    return b < m->n ? b : 2 * m->n - 1 - b;
}

bool td_token_held(const td_token_set *s, uint32_t t)
{
    return everything(&s->map) || td_token_owner(&s->map, t) == s->rank;
}

/* Of tokens [0, r) of a period, those in block b. */
static uint32_t of_block(uint32_t r, uint32_t b, uint32_t unit)
{
    return r <= b * unit ? 0 : TD_MIN(r - b * unit, unit);
}

uint32_t td_token_before(const td_token_set *s, uint32_t t)
{
    const td_token_map *m = &s->map;
    uint32_t mine;
    if (everything(m)) return t;
    uint32_t span = period(m, &mine) * m->unit, r = t % span;
    uint32_t n = t / span * mine * m->unit + of_block(r, s->rank, m->unit);
    return mine == 2 ? n + of_block(r, 2 * m->n - 1 - s->rank, m->unit) : n;
}

uint32_t td_token_at(const td_token_set *s, uint32_t local)
{
    const td_token_map *m = &s->map;
    uint32_t mine;
    if (everything(m)) return local;
    uint32_t blocks = period(m, &mine), r = local % (mine * m->unit);
    uint32_t b = r < m->unit ? s->rank : 2 * m->n - 1 - s->rank;
    return (local / (mine * m->unit) * blocks + b) * m->unit + r % m->unit;
}

uint32_t td_token_run(const td_token_set *s, uint32_t t, uint32_t end, uint32_t *n)
{
    uint32_t first = td_token_at(s, td_token_before(s, t)), to;
    *n = 0;
    if (first >= end) return end;
    if (everything(&s->map)) to = end;
    else /* to the end of its block; two of zigzag's may lie side by side */
        for (to = first; to < end && td_token_held(s, to);) to = (to / s->map.unit + 1) * s->map.unit;
    *n = TD_MIN(to, end) - first;
    return first;
}
