/* kernels/sample_tile.h - choosing tokens; one text compiled once per instruction set by sample_ref.c and
 * sample_avx*.c.
 *
 * Every result is defined by exactly rounded scalar operations and fixed 16-lane sums, so all families give
 * the same bits.
 *   raw logits -> (log probabilities) -> mask, bias, penalties -> greedy,
 *   or: /T -> top_k -> top_p -> min_p -> exponential race
 * Rules:   1. The kept set is {key > cut.key} + {key == cut.key and id <= cut.id}: three radix passes over
 *             order-preserving integer keys find the cut, so nothing is ever sorted. 2. NaN logits count as
 *             -inf; a +inf logit wins as under greedy.
 *          3. Tokens whose logit plus the largest possible noise cannot beat the best so far draw no noise.
 * Memory:  12 bytes x V per thread that ever samples, allocated at its first call, freed with the thread.
 * Source:  algorithms notes 13. */
// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "common/rng.h"
#include "kernels/family.h"
#include <math.h>
#include <pthread.h>
#include <stdlib.h>

enum { LANES = 16, CHUNK = 64, BINS = 2048 };
#define NOISE_MAX 23.0f /* -log(2^-33) = 22.88 */
#define GREEDY_BELOW 1e-5f

/* ---- workspace ---- */

typedef struct space {
    int V;
    float *x;      /* processed logits */
    float *w;      /* exp(x - max) */
    uint32_t *ids; /* members of the bin under refinement */
} space;

static pthread_key_t space_key;
static pthread_once_t space_once = PTHREAD_ONCE_INIT;

static void space_free(void *p)
{
    space *s = p;
    free(s->x);
    free(s->w);
    free(s->ids);
    free(s);
}

static void space_init(void)
{
    TD_CHECK(pthread_key_create(&space_key, space_free) == 0);
}

static space *space_of_thread(int V)
{
    pthread_once(&space_once, space_init);
    space *s = pthread_getspecific(space_key);
    if (!s) {
        s = td_xalloc(sizeof *s);
        TD_CHECK(pthread_setspecific(space_key, s) == 0);
    }
    if (s->V >= V) return s;
    size_t n = (size_t)V;
    s->x = td_xrealloc(s->x, n * sizeof *s->x);
    s->w = td_xrealloc(s->w, n * sizeof *s->w);
    s->ids = td_xrealloc(s->ids, n * sizeof *s->ids);
    s->V = V;
    return s;
}

/* ---- scans: loops of 16 lanes that the compiler turns into vectors ---- */

/* Largest value, NaN ignored; -inf when there is none. */
static float scan_max(const float *x, int n)
{
    float m[LANES], best = -INFINITY;
    for (int j = 0; j < LANES; j++) m[j] = -INFINITY;
    int i = 0;
    for (; i + LANES <= n; i += LANES)
        for (int j = 0; j < LANES; j++) m[j] = x[i + j] > m[j] ? x[i + j] : m[j];
    for (int j = 0; i + j < n; j++) m[j] = x[i + j] > m[j] ? x[i + j] : m[j];
    for (int j = 0; j < LANES; j++) best = m[j] > best ? m[j] : best;
    return best;
}

static int scan_find(const float *x, int n, float value)
{
    int i = 0;
    for (; i + LANES <= n; i += LANES) {
        int any = 0;
        for (int j = 0; j < LANES; j++) any |= x[i + j] == value;
        if (any) break;
    }
    for (; i < n; i++)
        if (x[i] == value) return i;
    return -1;
}

/* NaN becomes -inf, -0 becomes +0: afterwards equal values have equal keys. */
static inline float canonical(float v)
{
    return v == v ? v + 0.0f : -INFINITY;
}

static void scan_copy(float *restrict out, const float *restrict x, int n)
{
    for (int i = 0; i < n; i++) out[i] = canonical(x[i]);
}

static void scan_divide(float *x, int n, float t)
{
    for (int i = 0; i < n; i++) x[i] = x[i] / t + 0.0f; /* no -0: see canonical */
}

/* exp(x), x <= 0: two-constant reduction and a polynomial, no fma (so that every instruction set rounds
 * alike); 1e-7 relative. */
static inline float exp_neg(float x)
{
    float lo = x < -87.0f ? -87.0f : x;
    float n = lo * 1.44269504f + 12582912.0f - 12582912.0f;
    float r = lo - n * 0.693359375f - n * -2.12194440e-4f;
    float p = 1.9875691500e-4f;
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.0f;
    uint32_t bits = (uint32_t)((int32_t)n + 127) << 23;
    float scale;
    memcpy(&scale, &bits, 4);
    return x >= -87.0f ? p * scale : 0.0f; /* false for NaN too */
}

/* out[i] = exp(x[i] - max), or 0 below `floor` (or where it is NaN); returns the sum over 16 lanes in double.
 * out may be NULL. */
static double scan_exp(float *out, const float *x, int n, float max, float floor)
{
    double s[LANES] = {0};
    for (int i = 0; i < n; i += LANES) {
        float e[LANES] = {0};
        int c = n - i < LANES ? n - i : LANES;
        if (c == LANES)
            for (int j = 0; j < LANES; j++) e[j] = x[i + j] >= floor ? exp_neg(x[i + j] - max) : 0.0f;
        else
            for (int j = 0; j < c; j++) e[j] = x[i + j] >= floor ? exp_neg(x[i + j] - max) : 0.0f;
        for (int j = 0; j < LANES; j++) s[j] += (double)e[j];
        if (out) memcpy(out + i, e, (size_t)c * sizeof *e);
    }
    for (int step = LANES / 2; step; step /= 2)
        for (int j = 0; j < step; j++) s[j] += s[j + step];
    return s[0];
}

/* ---- log probabilities of the raw logits ---- */

static bool before(float a, uint32_t ia, float b, uint32_t ib)
{
    return a > b || (a == b && ia < ib);
}

/* The n largest, descending, ties to the lower id. The list is short: insertion behind a threshold. */
static int top_n(const float *x, int V, int n, td_top *top)
{
    int have = 0;
    for (int i0 = 0; i0 < V && n > 0; i0 += CHUNK) {
        int c = V - i0 < CHUNK ? V - i0 : CHUNK;
        if (have == n && !(scan_max(x + i0, c) > top[n - 1].logprob)) continue;
        for (int i = i0; i < i0 + c; i++) {
            if (x[i] != x[i] || (have == n && !(x[i] > top[n - 1].logprob))) continue;
            int at = have < n ? have++ : n - 1;
            while (at > 0 && before(x[i], (uint32_t)i, top[at - 1].logprob, top[at - 1].id)) {
                top[at] = top[at - 1];
                at--;
            }
            top[at] = (td_top){(uint32_t)i, x[i]};
        }
    }
    return have;
}

static double log_sum_exp(const float *x, int V)
{
    float max = scan_max(x, V);
    if (isinf(max)) return (double)max;
    return (double)max + log(scan_exp(NULL, x, V, max, -INFINITY));
}

static void report(const float *raw, int V, int n, td_sample_out *out)
{
    double lse = log_sum_exp(raw, V);
    out->n_top = top_n(raw, V, TD_MIN(n, TD_MAX_TOP_LOGPROBS), out->top);
    for (int i = 0; i < out->n_top; i++) out->top[i].logprob = (float)((double)out->top[i].logprob - lse);
    if (out->token >= 0 && out->token < V) out->logprob = (float)((double)raw[out->token] - lse);
}

/* ---- logits processors ---- */

static void apply_mask(float *x, int V, const uint32_t *mask)
{
    for (int i0 = 0; i0 < V; i0 += 32) {
        uint32_t bits = mask[i0 / 32];
        if (bits == UINT32_MAX) continue;
        int c = V - i0 < 32 ? V - i0 : 32;
        for (int j = 0; j < c; j++)
            if (!(bits >> j & 1)) x[i0 + j] = -INFINITY;
    }
}

static void apply_bias(float *x, int V, const td_sample_row *r)
{
    for (uint32_t i = 0; i < r->n_bias; i++)
        if (r->bias[i].id < (uint32_t)V) x[r->bias[i].id] = canonical(x[r->bias[i].id] + r->bias[i].add);
}

static void apply_penalties(float *x, int V, const td_sample_row *r)
{
    for (uint32_t i = 0; i < r->n_pen; i++) {
        const td_penalty *p = &r->pen[i];
        if (p->id >= (uint32_t)V) continue;
        float v = x[p->id];
        if (p->n_out || p->in_prompt) v = v > 0 ? v / r->repetition_penalty : v * r->repetition_penalty;
        if (p->n_out) v -= r->presence_penalty + r->frequency_penalty * (float)p->n_out;
        x[p->id] = canonical(v);
    }
}

/* ---- the cut of top_k and top_p ---- */

typedef struct cut {
    uint32_t key;
    int id;
} cut;

static inline uint32_t key_of(float x)
{
    uint32_t u;
    memcpy(&u, &x, 4);
    return u ^ (u >> 31 ? UINT32_MAX : UINT32_C(0x80000000));
}

static inline bool kept(cut c, float x, int id)
{
    uint32_t k = key_of(x);
    return k > c.key || (k == c.key && id <= c.id);
}

static inline float value_of(uint32_t key)
{
    uint32_t u = key ^ (key >> 31 ? UINT32_C(0x80000000) : UINT32_MAX);
    float x;
    memcpy(&x, &u, 4);
    return x;
}

/* The descending bin in which the weight reaches `target`; *before: the weight of the bins above it. -1: no
 * weight at all. */
static int crossing_bin(const double *mass, int bins, double target, double *before)
{
    int crossing = -1;
    double sum = *before;
    for (int b = bins - 1; b >= 0; b--) {
        if (mass[b] == 0) continue;
        crossing = b; /* the last bin with weight, when rounding keeps the sum below the target */
        *before = sum;
        sum += mass[b];
        if (sum >= target) break;
    }
    return crossing;
}

/* Walks descending keys until the weight before a token reaches `target`: the last token with less weight
 * before it is the cut. The weight of i is w ? w[i] : 1, of those >= floor. Radix passes over 11, 11 and 10
 * key bits, each over the crossing bin of the one before; after the third its members are equal and follow
 * each other by id. */
static cut find_cut(space *s, int V, const float *w, double target, float floor)
{
    enum { TOP_SHIFT = 21, MID_SHIFT = 10, MID_BINS = 1 << 11, LOW_BINS = 1 << 10 };
    double before = 0, mass[BINS] = {0};
    const float *x = s->x;
    for (int i = 0; i < V; i++)
        if (x[i] >= floor) mass[key_of(x[i]) >> TOP_SHIFT] += w ? (double)w[i] : 1.0;
    int top = crossing_bin(mass, BINS, target, &before), n = 0;
    if (top < 0) return (cut){0, V};
    float lo = value_of((uint32_t)top << TOP_SHIFT),
          hi = value_of(((uint32_t)top << TOP_SHIFT) | ((1u << TOP_SHIFT) - 1));
    if (lo != lo) lo = -INFINITY; /* the outermost bins begin or end among NaN patterns */
    if (hi != hi) hi = INFINITY;
    if (lo < floor) lo = floor;
    for (int i0 = 0; i0 < V; i0 += LANES) {
        int c = V - i0 < LANES ? V - i0 : LANES, any = 0;
        if (c == LANES)
            for (int j = 0; j < LANES; j++) any |= (x[i0 + j] >= lo) & (x[i0 + j] <= hi);
        else any = 1;
        for (int i = i0; any && i < i0 + c; i++)
            if (x[i] >= lo && x[i] <= hi) s->ids[n++] = (uint32_t)i;
    }
    uint32_t prefix = (uint32_t)top << TOP_SHIFT;
    for (int pass = 0; pass < 2; pass++) {
        int shift = pass ? 0 : MID_SHIFT, bins = pass ? LOW_BINS : MID_BINS, m = 0;
        memset(mass, 0, sizeof mass);
        for (int i = 0; i < n; i++)
            mass[key_of(x[s->ids[i]]) >> shift & (uint32_t)(bins - 1)] += w ? (double)w[s->ids[i]] : 1.0;
        int bin = crossing_bin(mass, bins, target, &before);
        if (bin < 0) return (cut){0, V};
        for (int i = 0; i < n; i++)
            if ((key_of(x[s->ids[i]]) >> shift & (uint32_t)(bins - 1)) == (uint32_t)bin)
                s->ids[m++] = s->ids[i];
        n = m;
        prefix |= (uint32_t)bin << shift;
    }
    int last = 0;
    for (int i = 0; i < n && (i == 0 || before < target); i++) {
        last = (int)s->ids[i];
        before += w ? (double)w[s->ids[i]] : 1.0;
    }
    return (cut){prefix, last};
}

/* ---- the race ---- */

typedef struct race {
    const td_sample_row *row;
    const float *x;
    float max, floor_w; /* floor_w: min_p */
    float floor;        /* no candidate lies below */
    cut cut;
    bool filtered;
    float best;
    int token;
} race;

static bool candidate(const race *r, int i)
{
    float x = r->x[i];
    if (!(x > -INFINITY)) return false;
    if (!r->filtered) return true;
    return kept(r->cut, x, i) && (r->floor_w <= 0 || exp_neg(x - r->max) >= r->floor_w);
}

static void offer(race *r, int i, float noise)
{
    float v = r->x[i] + noise;
    if (v > r->best || (v == r->best && i < r->token) || r->token < 0) {
        r->best = v;
        r->token = i;
    }
}

static void run_chunk(race *r, int i0, int n)
{
    float noise[CHUNK];
    const td_sample_row *s = r->row;
    int open[CHUNK], count = 0;
    for (int i = i0; i < i0 + n; i++)
        if (r->x[i] >= r->floor && r->x[i] + NOISE_MAX >= r->best && candidate(r, i)) open[count++] = i;
    if (count > CHUNK / 8) {
        td_gumbel_row(s->seed, s->position, s->stream, (uint32_t)i0, (uint32_t)n, noise);
        for (int k = 0; k < count; k++) offer(r, open[k], noise[open[k] - i0]);
        return;
    }
    for (int k = 0; k < count; k++) {
        td_gumbel4(s->seed, s->position, s->stream, (uint32_t)open[k] / 4, noise);
        offer(r, open[k], noise[open[k] % 4]);
    }
}

static int run_race(race *r, int V, int first)
{
    float noise[4];
    td_gumbel4(r->row->seed, r->row->position, r->row->stream, (uint32_t)first / 4, noise);
    offer(r, first, noise[first % 4]); /* the likeliest token sets a bar that most others cannot reach */
    for (int i0 = 0; i0 < V; i0 += CHUNK) {
        int n = V - i0 < CHUNK ? V - i0 : CHUNK;
        float top = scan_max(r->x + i0, n);
        if (top >= r->floor && top + NOISE_MAX >= r->best) run_chunk(r, i0, n);
    }
    return r->token;
}

static int choose_random(space *s, int V, const td_sample_row *row, float max)
{
    race r = {.row = row, .x = s->x, .floor_w = row->min_p, .cut = {0, V}, .best = -INFINITY, .token = -1};
    scan_divide(s->x, V, row->temperature);
    r.max = scan_max(s->x, V);
    int first = scan_find(s->x, V, r.max);
    if (isinf(max) || isinf(r.max)) return first;
    bool by_k = row->top_k > 0 && row->top_k < V, by_p = row->top_p < 1.0f;
    r.filtered = by_k || by_p || row->min_p > 0;
    r.floor = -INFINITY;
    if (by_k) {
        r.cut = find_cut(s, V, NULL, (double)row->top_k, r.floor);
        r.cut.id = V; /* ties with the k-th stay */
        r.floor = value_of(r.cut.key);
    }
    if (by_p) {
        double total = scan_exp(s->w, s->x, V, r.max, r.floor);
        r.cut = find_cut(s, V, s->w, (double)row->top_p * total, r.floor);
        r.floor = value_of(r.cut.key);
    }
    if (row->min_p > 0) { /* a bound that is surely below the exact test's */
        float bound = r.max + logf(row->min_p) - 0.01f;
        if (bound > r.floor) r.floor = bound;
    }
    return run_race(&r, V, first);
}

static int choose(const float *raw, int V, const td_sample_row *row)
{
    bool greedy = row->temperature < GREEDY_BELOW;
    if (greedy && !row->mask && !row->n_bias && !row->n_pen) {
        float max = scan_max(raw, V);
        return max > -INFINITY ? scan_find(raw, V, max) : -1;
    }
    space *s = space_of_thread(V);
    scan_copy(s->x, raw, V);
    if (row->mask) apply_mask(s->x, V, row->mask);
    apply_bias(s->x, V, row);
    apply_penalties(s->x, V, row);
    float max = scan_max(s->x, V);
    if (!(max > -INFINITY)) return -1;
    return greedy ? scan_find(s->x, V, max) : choose_random(s, V, row, max);
}

/* ---- the two entries ---- */

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
    const float *raw = j->logits + (size_t)i * j->ld;
    td_sample_out *out = &j->out[i];
    *out = (td_sample_out){.token = choose(raw, j->V, &j->rows[i])};
    if (j->rows[i].logprobs >= 0) report(raw, j->V, j->rows[i].logprobs, out);
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
    j->out[i] = (td_sample_out){.token = j->ids[i]};
    report(j->logits + (size_t)i * j->ld, j->V, j->n_alternatives, &j->out[i]);
}

static void score(td_pool *pool, const float *logits, size_t ld, int V, const int32_t *ids,
                  int n_alternatives, int n, td_sample_out *out)
{
    sample_job j = {
        .logits = logits, .ld = ld, .V = V, .n_alternatives = n_alternatives, .ids = ids, .out = out};
    td_pool_for(pool, n, score_row, &j);
}
