/* router/core/place.c - the cost terms and the choice. */
// SPDX-License-Identifier: Apache-2.0
#include "router/core/place.h"
#include "common/hash.h"

static double prefill_ms(const td_place_worker *w, const td_place_ask *a)
{
    /* The last prompt token is always recomputed. */
    double hit = w->hit_tokens >= a->tokens ? (double)a->tokens - 1 : (double)w->hit_tokens;
    return ((double)a->tokens - hit) / w->prefill_tok_s * 1e3;
}

static double queue_ms(const td_place_worker *w) { return w->pending_tokens / w->prefill_tok_s * 1e3; }

/* Own decoding plus the harm to those who share the batch. A step grows slowly with its rows, so a full
 * worker counts as twice an empty one; near the end of its KV pages a worker preempts, hence the barrier
 * k/(1-k). */
static double decode_ms(const td_place_worker *w, const td_place_ask *a)
{
    double fill = w->max_seqs ? (double)w->seqs / w->max_seqs : 1;
    double k = w->kv_used < 0.95 ? w->kv_used : 0.95;
    return a->out_tokens * w->step_ms * (1 + fill) + w->step_ms * k / (1 - k);
}

/* Rule 4. */
static double link_of(const td_place_worker *p, const td_place_worker *d, const td_place_ask *a)
{
    double x = p->link_bytes_per_s, y = d->link_bytes_per_s;
    if (x > 0 && y > 0) return x < y ? x : y;
    return x > 0 ? x : y > 0 ? y : a->link_bytes_per_s;
}

/* The prompt's pages follow the compute layer by layer: only what is slower than the compute is seen, and the
 * last layer. */
static double transfer_ms(const td_place_worker *p, const td_place_worker *d, const td_place_ask *a)
{
    double tokens = (double)a->tokens - (d->hit_tokens < a->tokens ? d->hit_tokens : a->tokens);
    double ms = tokens * a->kv_bytes_per_token / link_of(p, d, a) * 1e3;
    double hidden = prefill_ms(p, a);
    return ms > hidden ? ms - hidden : 0.1 * ms;
}

/* A prompt stalls the requests that decode in the same batch. */
static double harm_ms(const td_place_worker *w, const td_place_ask *a)
{
    double share = w->max_seqs ? (double)w->seqs / w->max_seqs : 0;
    return prefill_ms(w, a) * share;
}

typedef struct pools { bool prefill, decode; } pools;

static pools find_pools(const td_place_worker *w, int n)
{
    pools s = {false, false};
    for (int i = 0; i < n; i++) {
        if (!w[i].usable) continue;
        if (w[i].role == TD_ROLE_PREFILL) s.prefill = true;
        if (w[i].role == TD_ROLE_DECODE) s.decode = true;
    }
    return s;
}

static bool may_be_alone(const td_place_worker *w, pools s)
{
    return w->role == TD_ROLE_MIXED || (w->role == TD_ROLE_DECODE && !s.prefill) ||
           (w->role == TD_ROLE_PREFILL && !s.decode);
}

/* Rule 3. */
static bool better(double ms, uint64_t tie, double best_ms, uint64_t best_tie, bool none)
{
    if (none || ms < best_ms * 0.98) return true;
    return ms <= best_ms * 1.02 && tie < best_tie;
}

static void consider(td_placement *best, uint64_t *best_tie, td_placement c, uint64_t tie)
{
    if (!better(c.ms, tie, best->ms, *best_tie, best->kind < TD_PLACE_PAIR)) return;
    *best = c;
    *best_tie = tie;
}

td_placement td_place_choose(const td_place_worker *w, int n, const td_place_ask *a)
{
    pools s = find_pools(w, n);
    td_placement best = {TD_PLACE_NONE, -1, -1, 0};
    uint64_t best_tie = 0;
    for (int d = 0; d < n; d++) {
        if (!w[d].usable) continue;
        if (may_be_alone(&w[d], s)) {
            if (best.kind == TD_PLACE_NONE) best.kind = TD_PLACE_WAIT;
            if (!w[d].room_prefill || !w[d].room_decode) continue;
            double ms = queue_ms(&w[d]) + prefill_ms(&w[d], a) + decode_ms(&w[d], a) + harm_ms(&w[d], a);
            consider(&best, &best_tie, (td_placement){TD_PLACE_ALONE, d, -1, ms}, td_mix64(a->tie ^ w[d].id));
        } else if (w[d].role == TD_ROLE_DECODE) {
            if (best.kind == TD_PLACE_NONE) best.kind = TD_PLACE_WAIT;
            if (!w[d].room_decode) continue;
            for (int p = 0; p < n; p++) {
                if (w[p].role != TD_ROLE_PREFILL || !w[p].usable || !w[p].room_prefill) continue;
                double ms = queue_ms(&w[p]) + prefill_ms(&w[p], a) + transfer_ms(&w[p], &w[d], a) +
                            decode_ms(&w[d], a);
                consider(&best, &best_tie, (td_placement){TD_PLACE_PAIR, d, p, ms},
                         td_mix64(a->tie ^ w[d].id ^ td_mix64(w[p].id)));
            }
        }
    }
    return best;
}
