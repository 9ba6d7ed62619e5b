/* kernels/sample_tile.h - choosing tokens; one text compiled once per instruction set by sample_ref.c and
 * sample_avx*.c.
 *
 * Every result is defined by exactly rounded scalar operations, maxima and integer sums, so all families give
 * the same bits, and so do ranks that hold parts of the vocabulary (draw.h): one rank is the case of one part.
 *
 *   raw logits -> (log probabilities) -> mask, bias, penalties
 *              -> greedy, or: /T -> top_k -> top_p -> min_p -> exponential race
 *
 * Rules:   1. The kept set is {key > cut.key} + {key == cut.key and id <= cut.id}: three radix passes over
 *             order-preserving integer keys find the cut, so nothing is ever sorted.
 *          2. NaN logits count as -inf; a +inf logit wins as under greedy.
 *          3. Tokens whose logit plus the largest possible noise cannot beat the best so far draw no noise.
 *          4. A mass is exp(x - max) to the nearest 2^-44, an integer: V < 2^20 of them fit 64 bits, and no
 *             order of addition or cut of the vocabulary shows in a sum. top_p keeps tokens until their sum
 *             is floor(top_p * total); a log probability is x - (max + log(sum)) in double.
 * Memory:  4 bytes x V per thread that ever draws other than plain greedy, allocated at its first such call,
 *          freed with the thread.
 * Source:  algorithms notes 9.2, 13. */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "common/noise.h"
#include "common/rng.h"
#include "kernels/draw.h"
#include "kernels/family.h"
#include "kernels/sample_scan.h"
#include <limits.h>
#include <math.h>
#include <pthread.h>
#include <stdlib.h>

enum { BINS = TD_DRAW_BINS };

/* ---- workspace ---- */

typedef struct space {
    int V;
    float *x; /* processed logits */
} space;

static pthread_key_t space_key;
static pthread_once_t space_once = PTHREAD_ONCE_INIT;

static void space_free(void *p)
{
    space *s = p;
    free(s->x);
    free(s);
}

static void space_init(void)
{
    TD_CHECK(pthread_key_create(&space_key, space_free) == 0);
}

static float *space_of_thread(int V)
{
    pthread_once(&space_once, space_init);
    space *s = pthread_getspecific(space_key);
    if (!s) {
        s = td_xalloc(sizeof *s);
        TD_CHECK(pthread_setspecific(space_key, s) == 0);
    }
    if (s->V < V) {
        s->x = td_xrealloc(s->x, (size_t)V * sizeof *s->x);
        s->V = V;
    }
    return s->x;
}

/* ---- logits processors, on the tokens [v0, v0 + n) ---- */

static void apply_mask(float *x, const td_vocab *v, const uint32_t *mask)
{
    mask += v->v0 / 32;
    for (int i0 = 0; i0 < v->n; i0 += 32) {
        uint32_t bits = mask[i0 / 32];
        if (bits == UINT32_MAX) continue;
        int c = v->n - i0 < 32 ? v->n - i0 : 32;
        for (int j = 0; j < c; j++)
            if (!(bits >> j & 1)) x[i0 + j] = -INFINITY;
    }
}

static void apply_bias(float *x, const td_vocab *v, const td_sample_row *r)
{
    for (uint32_t i = 0; i < r->n_bias; i++) {
        uint32_t at = r->bias[i].id - (uint32_t)v->v0;
        if (at < (uint32_t)v->n) x[at] = canonical(x[at] + r->bias[i].add);
    }
}

static void apply_penalties(float *x, const td_vocab *v, const td_sample_row *r)
{
    for (uint32_t i = 0; i < r->n_pen; i++) {
        const td_penalty *p = &r->pen[i];
        uint32_t at = p->id - (uint32_t)v->v0;
        if (at >= (uint32_t)v->n) continue;
        float l = x[at];
        if (p->n_out || p->in_prompt) l = l > 0 ? l / r->repetition_penalty : l * r->repetition_penalty;
        if (p->n_out) l -= r->presence_penalty + r->frequency_penalty * (float)p->n_out;
        x[at] = canonical(l);
    }
}

/* ---- START: the largest logits ---- */

enum { START = TD_DRAW_START, CUT = TD_DRAW_CUT, END = TD_DRAW_END };
typedef td_draw_start start_msg;
typedef td_draw_end end_msg;

_Static_assert(sizeof(start_msg) == TD_DRAW_START_BYTES && sizeof(td_top) == 8, "messages");
_Static_assert(sizeof(end_msg) + TD_MAX_TOP_LOGPROBS * sizeof(td_top) <= TD_DRAW_MAX_BYTES, "messages");

static bool greedy(const td_draw *d)
{
    return d->row.temperature < TD_GREEDY_BELOW;
}

static bool wants_report(const td_draw *d)
{
    return d->score >= 0 || d->row.logprobs >= 0;
}

static void say_start(const td_vocab *v, td_draw *d, uint8_t *to)
{
    start_msg m = {.max = -INFINITY, .raw_max = -INFINITY, .first = INT32_MAX};
    bool plain = td_draw_plain(&d->row);
    int n = v->n;
    if (wants_report(d) || plain) m.raw_max = scan_max(d->raw, n);
    if (d->score < 0) {
        const float *x = plain ? d->raw : d->x;
        m.max = m.raw_max;
        if (!plain) {
            scan_copy(d->x, d->raw, n);
            if (d->row.mask) apply_mask(d->x, v, d->row.mask);
            apply_bias(d->x, v, &d->row);
            apply_penalties(d->x, v, &d->row);
            m.max = scan_max(d->x, n);
        }
        m.live = m.max > -INFINITY;
        if (!greedy(d)) {
            scan_divide(d->x, n, d->row.temperature);
            m.max = m.max / d->row.temperature + 0.0f; /* division keeps the order */
        }
        int at = m.live || !greedy(d) ? scan_find(x, n, m.max) : -1;
        if (at >= 0) m.first = v->v0 + at;
    }
    memcpy(to, &m, sizeof m);
}

static void go_on(td_draw *d, int stage, size_t bytes)
{
    d->stage = stage;
    d->bytes = bytes;
}

static int alternatives(const td_draw *d)
{
    return TD_MIN(TD_MAX(d->row.logprobs, 0), TD_MAX_TOP_LOGPROBS);
}

static void go_to_end(td_draw *d)
{
    size_t bytes = sizeof(end_msg) + (size_t)alternatives(d) * sizeof(td_top);
    bool over = d->score < 0 && d->token != INT32_MAX && !wants_report(d);
    *d->out = (td_sample_out){.token = d->token};
    go_on(d, END, over ? 0 : bytes);
}

static void go_to_cut(td_draw *d, bool by_mass)
{
    d->by_mass = by_mass;
    d->pass = 0;
    d->key = 0;
    d->before = 0;
    d->target = by_mass ? 0 : (uint64_t)d->row.top_k;
    go_on(d, CUT, BINS * sizeof(uint64_t));
}

static void hear_start(const td_vocab *v, td_draw *d, const uint8_t *all, size_t each)
{
    bool live = false;
    d->max = d->raw_max = d->floor = -INFINITY;
    d->first = INT32_MAX;
    for (int r = 0; r < v->ranks; r++) {
        start_msg m;
        memcpy(&m, all + (size_t)r * each, sizeof m);
        live |= m.live != 0;
        if (m.raw_max > d->raw_max) d->raw_max = m.raw_max;
        if (m.max > d->max || (m.max == d->max && m.first < d->first)) {
            d->max = m.max;
            d->first = m.first;
        }
    }
    const td_sample_row *row = &d->row;
    bool by_k = row->top_k > 0 && row->top_k < v->V, by_p = row->top_p < 1.0f;
    d->key = 0;
    d->id = v->V;
    d->filtered = by_k || by_p || row->min_p > 0;
    d->token = INT32_MAX; /* to be drawn */
    if (d->score >= 0)
        d->token = d->score;
    else if (!live)
        d->token = -1;
    else if (greedy(d) || isinf(d->max))
        d->token = d->first;
    if (d->token != INT32_MAX || (!by_k && !by_p))
        go_to_end(d);
    else
        go_to_cut(d, !by_k);
}

/* ---- CUT: where top_k and top_p end ---- */

enum { TOP_SHIFT = 21, MID_SHIFT = 10 };

static bool any_within(const float *x, int n, float lo, float hi)
{
    int any = 0;
    if (n % LANES) return true;
    for (int i = 0; i < n; i += LANES)
        for (int j = 0; j < LANES; j++) any |= (x[i + j] >= lo) & (x[i + j] <= hi);
    return any != 0;
}

/* Neighbours add to two histograms: equal bins would wait for each other's store. */
static void add_to_bins(const uint32_t *bin, const uint64_t *w, int n, uint64_t *even, uint64_t *odd)
{
    int i = 0;
    for (; i + 2 <= n; i += 2) {
        even[bin[i]] += w[i];
        odd[bin[i + 1]] += w[i + 1];
    }
    if (i < n) even[bin[i]] += w[i];
}

/* A lower bound of the k-th largest: of the chunks' largest the k-th, or less. */
static float bound_of_kth(const float *x, int n, int k)
{
    uint32_t count[BINS] = {0};
    int b = BINS - 1, sum = 0;
    if (n / CHUNK < k) return -INFINITY;
    for (int i0 = 0; i0 + CHUNK <= n; i0 += CHUNK) count[key_of(scan_max(x + i0, CHUNK)) >> TOP_SHIFT]++;
    while ((sum += (int)count[b]) < k) b--;
    float bound = value_of((uint32_t)b << TOP_SHIFT);
    return bound == bound ? bound : -INFINITY;
}

/* Values that surely are below the k-th are not counted: the bins above it are complete, and so is its own
 * from the bound on. */
static void count_all(const float *x, int n, int k, uint64_t *mass)
{
    float bound = bound_of_kth(x, n, k);
    for (int i0 = 0; i0 < n; i0 += LANES) {
        int c = n - i0 < LANES ? n - i0 : LANES;
        if (!any_within(x + i0, c, bound, INFINITY)) continue;
        for (int i = i0; i < i0 + c; i++)
            if (x[i] >= bound) mass[key_of(x[i]) >> TOP_SHIFT]++;
    }
}

static void weigh_all(const float *x, int n, float max, float floor, uint64_t *mass)
{
    uint64_t odd[BINS] = {0}, w[CHUNK];
    uint32_t bin[CHUNK];
    for (int i0 = 0; i0 < n; i0 += CHUNK) {
        int c = n - i0 < CHUNK ? n - i0 : CHUNK;
        float e[CHUNK];
        if (c < CHUNK) {
            for (int k = 0; k < c; k++) e[k] = x[i0 + k] >= floor ? exp_neg(x[i0 + k] - max) : 0.0f;
            for (int k = 0; k < c; k++) w[k] = mass_of(e[k]), bin[k] = key_of(x[i0 + k]) >> TOP_SHIFT;
        } else {
            if (floor > -INFINITY && !any_within(x + i0, CHUNK, floor, INFINITY)) continue;
            for (int k = 0; k < CHUNK; k++) e[k] = x[i0 + k] >= floor ? exp_neg(x[i0 + k] - max) : 0.0f;
            for (int k = 0; k < CHUNK; k++) w[k] = mass_of(e[k]);
            for (int k = 0; k < CHUNK; k++) bin[k] = key_of(x[i0 + k]) >> TOP_SHIFT;
        }
        add_to_bins(bin, w, c, mass, odd);
    }
    for (int b = 0; b < BINS; b++) mass[b] += odd[b];
}

/* The values whose keys begin as d->key does in the bits above `shift`, and are above the floor. */
static void range_of(const td_draw *d, int shift, float *lo, float *hi)
{
    *lo = value_of(d->key);
    *hi = value_of(d->key | ((1u << shift) - 1));
    if (*lo != *lo) *lo = -INFINITY; /* the outermost bins begin or end among NaN patterns */
    if (*hi != *hi) *hi = INFINITY;
    if (*lo < d->floor) *lo = d->floor;
}

static void count_members(const td_draw *d, int n, uint64_t *mass)
{
    uint32_t shift = d->pass == 1 ? MID_SHIFT : 0, low = (d->pass == 1 ? BINS : BINS / 2) - 1, bin[CHUNK];
    uint64_t odd[BINS] = {0}, w[CHUNK];
    float lo, hi, in[CHUNK], e[CHUNK];
    range_of(d, d->pass == 1 ? TOP_SHIFT : MID_SHIFT, &lo, &hi);
    for (int i0 = 0; i0 < n; i0 += CHUNK) {
        int c = n - i0 < CHUNK ? n - i0 : CHUNK, m = 0;
        const float *x = d->x + i0;
        if (!any_within(x, c, lo, hi)) continue;
        for (int j = 0; j < c; j++) {
            in[m] = x[j];
            m += (x[j] >= lo) & (x[j] <= hi);
        }
        for (int j = 0; j < m; j++) bin[j] = key_of(in[j]) >> shift & low;
        if (d->by_mass) {
            for (int j = 0; j < m; j++) e[j] = exp_neg(in[j] - d->max);
            for (int j = 0; j < m; j++) w[j] = mass_of(e[j]);
        } else {
            for (int j = 0; j < m; j++) w[j] = 1;
        }
        add_to_bins(bin, w, m, mass, odd);
    }
    for (int b = 0; b < BINS; b++) mass[b] += odd[b];
}

static void say_cut(const td_vocab *v, const td_draw *d, uint8_t *to)
{
    uint64_t *mass = (uint64_t *)(void *)to;
    memset(mass, 0, BINS * sizeof *mass);
    if (d->pass > 0)
        count_members(d, v->n, mass);
    else if (d->by_mass)
        weigh_all(d->x, v->n, d->max, d->floor, mass);
    else
        count_all(d->x, v->n, d->row.top_k, mass);
}

/* The descending bin in which the mass reaches `target`; *before: the mass of the bins above it. -1: no mass
 * at all. */
static int crossing_bin(const uint64_t *mass, uint64_t target, uint64_t *before)
{
    int crossing = -1;
    uint64_t sum = *before;
    for (int b = BINS - 1; b >= 0; b--) {
        if (mass[b] == 0) continue;
        crossing = b;
        *before = sum;
        sum += mass[b];
        if (sum >= target) break;
    }
    return crossing;
}

/* The id of the m-th token here (from 1) with the cut's value, in ascending order. */
static int nth_member(const td_vocab *v, const td_draw *d, uint64_t m)
{
    float value = value_of(d->key);
    for (int i = 0; i < v->n; i++)
        if (d->x[i] == value && --m == 0) return v->v0 + i;
    return v->V;
}

/* All bits of the key are known, and `bin` of the last pass: how many of the equal tokens stay, which follow
 * each other by id, one rank's after the other's. */
static void settle_ties(const td_vocab *v, td_draw *d, int bin, const uint8_t *all, size_t each)
{
    uint64_t one = mass_of(exp_neg(value_of(d->key) - d->max));
    uint64_t left = d->target > d->before ? d->target - d->before : 0,
             want = left ? (left + one - 1) / one : 1;
    for (int r = 0; r < v->ranks; r++) {
        const uint64_t *mass = (const uint64_t *)(const void *)(all + (size_t)r * each);
        uint64_t here = mass[bin] / one;
        if (r == v->rank) {
            d->id = want == 0 ? -1 : v->V;
            d->tie = want < here ? want : 0;
        }
        want -= TD_MIN(want, here);
    }
}

static void hear_cut(const td_vocab *v, td_draw *d, const uint8_t *all, size_t each)
{
    uint64_t joined[BINS];
    const uint64_t *mass = (const uint64_t *)(const void *)all;
    if (v->ranks > 1) {
        memcpy(joined, mass, sizeof joined);
        for (int r = 1; r < v->ranks; r++) {
            const uint64_t *more = (const uint64_t *)(const void *)(all + (size_t)r * each);
            for (int b = 0; b < BINS; b++) joined[b] += more[b];
        }
        mass = joined;
    }
    if (d->by_mass && d->pass == 0) {
        uint64_t total = 0;
        for (int b = 0; b < BINS; b++) total += mass[b];
        d->target = (uint64_t)((double)d->row.top_p * (double)total);
    }
    int bin = crossing_bin(mass, d->target, &d->before);
    TD_CHECK(bin >= 0); /* the likeliest token is in it */
    d->key |= (uint32_t)bin << (d->pass == 0 ? TOP_SHIFT : d->pass == 1 ? MID_SHIFT : 0);
    if (++d->pass < 3) return;
    d->floor = value_of(d->key);
    d->id = v->V; /* ties with the k-th stay */
    if (d->by_mass) settle_ties(v, d, bin, all, each);
    if (!d->by_mass && d->row.top_p < 1.0f)
        go_to_cut(d, true);
    else
        go_to_end(d);
}

/* ---- END: the race, log probabilities ---- */

typedef struct race {
    const td_draw *d;
    int v0;
    float floor; /* no candidate lies below */
    float best;
    int token;
} race;

static bool candidate(const race *r, int i)
{
    const td_draw *d = r->d;
    float x = d->x[i];
    if (!(x > -INFINITY)) return false;
    if (!d->filtered) return true;
    uint32_t key = key_of(x);
    if (key < d->key || (key == d->key && r->v0 + i > d->id)) return false;
    return d->row.min_p <= 0 || exp_neg(x - d->max) >= d->row.min_p;
}

static void offer(race *r, int i, float noise)
{
    float v = r->d->x[i] + noise;
    if (v > r->best || (v == r->best && r->v0 + i < r->token)) {
        r->best = v;
        r->token = r->v0 + i;
    }
}

static void run_chunk(race *r, int i0, int n)
{
    float noise[CHUNK];
    const td_sample_row *s = &r->d->row;
    const float *x = r->d->x;
    int open[CHUNK], count = 0;
    for (int i = i0; i < i0 + n; i++)
        if (x[i] >= r->floor && x[i] + TD_NOISE_MAX >= r->best && candidate(r, i)) open[count++] = i;
    if (count > CHUNK / 8) {
        td_gumbel_row(s->seed, s->position, s->stream, (uint32_t)(r->v0 + i0), (uint32_t)n, noise);
        for (int k = 0; k < count; k++) offer(r, open[k], noise[open[k] - i0]);
        return;
    }
    for (int k = 0; k < count; k++) {
        int id = r->v0 + open[k];
        td_gumbel4(s->seed, s->position, s->stream, (uint32_t)id / 4, noise);
        offer(r, open[k], noise[id % 4]);
    }
}

/* The likeliest token, on whichever rank it is, sets a bar that most others cannot reach. */
static void run_race(const td_vocab *v, const td_draw *d, end_msg *m)
{
    float noise[4];
    race r = {.d = d, .v0 = v->v0, .floor = d->floor, .token = d->first};
    td_gumbel4(d->row.seed, d->row.position, d->row.stream, (uint32_t)d->first / 4, noise);
    r.best = d->max + noise[d->first % 4];
    if (d->row.min_p > 0) { /* a bound that is surely below the exact test's */
        float bound = d->max + logf(d->row.min_p) - 0.01f;
        if (bound > r.floor) r.floor = bound;
    }
    for (int i0 = 0; i0 < v->n; i0 += CHUNK) {
        int n = v->n - i0 < CHUNK ? v->n - i0 : CHUNK;
        float top = scan_max(d->x + i0, n);
        if (top >= r.floor && top + TD_NOISE_MAX >= r.best) run_chunk(&r, i0, n);
    }
    m->best = r.best;
    m->token = r.token;
}

static void say_end(const td_vocab *v, td_draw *d, uint8_t *to)
{
    end_msg m = {.token = d->token};
    if (d->tie) d->id = nth_member(v, d, d->tie);
    d->tie = 0;
    td_top top[TD_MAX_TOP_LOGPROBS] = {0};
    if (d->token == INT32_MAX) run_race(v, d, &m);
    if (wants_report(d)) {
        int n = alternatives(d), at = m.token - v->v0;
        m.owned = m.token >= 0 && at >= 0 && at < v->n;
        if (m.owned) m.raw = d->raw[at];
        m.n_top = top_n(d->raw, v->n, n, top);
        for (int i = 0; i < m.n_top; i++) top[i].id += (uint32_t)v->v0;
        if (!isinf(d->raw_max)) m.mass = scan_mass(d->raw, v->n, d->raw_max);
        memcpy(to + sizeof m, top, (size_t)n * sizeof *top);
    }
    memcpy(to, &m, sizeof m);
}

static void hear_end(const td_vocab *v, td_draw *d, const uint8_t *all, size_t each)
{
    td_sample_out *out = d->out;
    end_msg best = {0};
    uint64_t mass = 0;
    int n = alternatives(d);
    for (int r = 0; r < v->ranks; r++) {
        end_msg m;
        memcpy(&m, all + (size_t)r * each, sizeof m);
        mass += m.mass;
        bool better = r == 0 || m.best > best.best || (m.best == best.best && m.token < best.token);
        if (better || (m.token == best.token && m.owned)) best = m;
        for (int i = 0; i < m.n_top; i++) {
            td_top t;
            memcpy(&t, all + (size_t)r * each + sizeof m + (size_t)i * sizeof t, sizeof t);
            out->n_top = insert(out->top, out->n_top, n, t);
        }
    }
    out->token = best.token;
    go_on(d, END, 0);
    if (!wants_report(d)) return;
    double lse = (double)d->raw_max;
    if (!isinf(d->raw_max)) lse += log((double)mass * 0x1p-44);
    for (int i = 0; i < out->n_top; i++) out->top[i].logprob = (float)((double)out->top[i].logprob - lse);
    if (best.owned) out->logprob = (float)((double)best.raw - lse);
}

/* ---- the entries ---- */

static void say(const td_vocab *v, td_draw *d, uint8_t *to)
{
    switch (d->stage) {
    case START:
        say_start(v, d, to);
        break;
    case CUT:
        say_cut(v, d, to);
        break;
    default:
        say_end(v, d, to);
    }
}

static void hear(const td_vocab *v, td_draw *d, const uint8_t *all, size_t each)
{
    switch (d->stage) {
    case START:
        hear_start(v, d, all, each);
        break;
    case CUT:
        hear_cut(v, d, all, each);
        break;
    default:
        hear_end(v, d, all, each);
    }
}

typedef struct draw_job {
    const td_vocab *v;
    td_draw *d;
    uint8_t *to;
    const uint8_t *all;
    size_t each;
} draw_job;

static void say_one(void *arg, int i, int member)
{
    (void)member;
    const draw_job *j = arg;
    if (j->d[i].bytes) say(j->v, &j->d[i], j->to + j->d[i].at);
}

static void hear_one(void *arg, int i, int member)
{
    (void)member;
    const draw_job *j = arg;
    if (j->d[i].bytes) hear(j->v, &j->d[i], j->all + j->d[i].at, j->each);
}

static void draw_say(td_pool *pool, const td_vocab *v, td_draw *d, int n, uint8_t *message)
{
    draw_job j = {.v = v, .d = d, .to = message};
    td_pool_for(pool, n, say_one, &j);
}

static void draw_hear(td_pool *pool, const td_vocab *v, td_draw *d, int n, const uint8_t *messages,
                      size_t each)
{
    draw_job j = {.v = v, .d = d, .all = messages, .each = each};
    td_pool_for(pool, n, hear_one, &j);
}

/* All stages of a row whose whole vocabulary is here. */
static void run_alone(int V, td_sample_row row, int score, const float *raw, td_sample_out *out)
{
    _Alignas(8) uint8_t message[TD_DRAW_MAX_BYTES];
    td_vocab v = {.V = V, .n = V, .ranks = 1};
    float *x = score >= 0 || td_draw_plain(&row) ? NULL : space_of_thread(V);
    td_draw d = td_draw_open(row, score, raw, x, out);
    while (d.bytes) {
        say(&v, &d, message);
        hear(&v, &d, message, 0);
    }
}

typedef struct sample_job {
    const float *logits;
    size_t ld;
    int V, n_alternatives;
    const td_sample_row *rows; /* sample */
    const int32_t *ids;        /* score */
    td_sample_out *out;
} sample_job;

static void sample_row(void *arg, int i, int member)
{
    (void)member;
    const sample_job *j = arg;
    run_alone(j->V, j->rows[i], -1, j->logits + (size_t)i * j->ld, &j->out[i]);
}

static void sample(td_pool *pool, float *logits, size_t ld, int V, const td_sample_row *rows, int n,
                   td_sample_out *out)
{
    sample_job j = {.logits = logits, .ld = ld, .V = V, .rows = rows, .out = out};
    td_pool_for(pool, n, sample_row, &j);
}

static void score_row(void *arg, int i, int member)
{
    (void)member;
    const sample_job *j = arg;
    td_sample_row row = {.logprobs = j->n_alternatives};
    run_alone(j->V, row, j->ids[i], j->logits + (size_t)i * j->ld, &j->out[i]);
}

static void score(td_pool *pool, const float *logits, size_t ld, int V, const int32_t *ids,
                  int n_alternatives, int n, td_sample_out *out)
{
    sample_job j = {
        .logits = logits, .ld = ld, .V = V, .n_alternatives = n_alternatives, .ids = ids, .out = out};
    td_pool_for(pool, n, score_row, &j);
}
