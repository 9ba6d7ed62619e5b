// SPDX-License-Identifier: Apache-2.0
/* Token choice of every family against a plain oracle with a sort in double; ties, masks, penalties, NaN; the
 * distribution by chi-square; the same bytes when the vocabulary is cut into parts. */
#include "common/rng.h"
#include "kernels/draw.h"
#include "tests/kernels/case_sample.h"
#include "tests/kernels/support.h"

typedef struct entry {
    double x, p;
    int id;
} entry;

static int by_value(const void *a, const void *b)
{
    const entry *x = a, *y = b;
    return x->x != y->x ? (x->x < y->x ? 1 : -1) : x->id - y->id;
}

/* The processed logits in f32, as the definition has them. */
static void process(const float *raw, int V, const td_sample_row *r, float *x)
{
    for (int i = 0; i < V; i++) {
        x[i] = raw[i] != raw[i] ? -INFINITY : raw[i];
        if (r->mask && !(r->mask[i / 32] >> (i % 32) & 1)) x[i] = -INFINITY;
    }
    for (uint32_t i = 0; i < r->n_bias; i++) x[r->bias[i].id] += r->bias[i].add;
    for (uint32_t i = 0; i < r->n_pen; i++) {
        float *v = &x[r->pen[i].id];
        *v = *v > 0 ? *v / r->repetition_penalty : *v * r->repetition_penalty;
        if (r->pen[i].n_out) *v -= r->presence_penalty + r->frequency_penalty * (float)r->pen[i].n_out;
    }
}

/* The token, or -2 where a rounding of the masses decides (within 1e-6 of a border). keep (may be NULL) and
 * prob: the kept set's law. */
static int oracle(const float *raw, int V, const td_sample_row *r, double *prob)
{
    float *x = malloc((size_t)V * sizeof *x);
    entry *e = malloc((size_t)V * sizeof *e);
    process(raw, V, r, x);
    int n = V, doubt = 0, token = -1;
    for (int i = 0; i < V; i++)
        e[i] = (entry){r->temperature < 1e-5f ? (double)x[i] : (double)(x[i] / r->temperature), 0, i};
    qsort(e, (size_t)V, sizeof *e, by_value);
    if (!(e[0].x > -INFINITY)) goto out;
    if (r->temperature < 1e-5f) {
        token = e[0].id;
        goto out;
    }
    if (r->top_k > 0 && r->top_k < V)
        for (n = r->top_k; n < V && e[n].x == e[r->top_k - 1].x; n++) {
        }
    while (n > 0 && !(e[n - 1].x > -INFINITY)) n--;
    double total = 0, before = 0;
    for (int i = 0; i < n; i++) total += e[i].p = exp(e[i].x - e[0].x);
    if (r->top_p < 1) {
        int k = 0;
        for (; k < n && (k == 0 || before / total < (double)r->top_p); k++) before += e[k].p;
        double last = before - e[k - 1].p;
        doubt |= fabs(before / total - (double)r->top_p) < 1e-6 ||
                 (k > 1 && fabs(last / total - (double)r->top_p) < 1e-6);
        n = k;
    }
    int m = 0;
    for (int i = 0; i < n; i++) {
        if (r->min_p > 0) doubt |= fabs(e[i].p - (double)r->min_p) < 1e-6 && e[i].p < 1;
        if (e[i].p >= (double)r->min_p) e[m++] = e[i];
    }
    float best = -INFINITY;
    double kept = 0;
    for (int i = 0; i < m; i++) {
        float noise[4], v;
        td_gumbel4(r->seed, r->position, r->stream, (uint32_t)e[i].id / 4, noise);
        v = (float)e[i].x + noise[e[i].id % 4];
        if (token < 0 || v > best || (v == best && e[i].id < token)) best = v, token = e[i].id;
        kept += e[i].p;
    }
    for (int i = 0; prob && i < V; i++) prob[i] = 0;
    for (int i = 0; prob && i < m; i++) prob[e[i].id] = e[i].p / kept;
    if (doubt) token = -2;
out:
    free(x), free(e);
    return token;
}

static td_sample_row row_of(sample_case c, uint64_t seed, uint32_t position)
{
    return (td_sample_row){.temperature = c.temperature,
                           .top_p = c.top_p,
                           .min_p = c.min_p,
                           .top_k = c.top_k,
                           .repetition_penalty = 1,
                           .seed = seed,
                           .position = position,
                           .stream = 256,
                           .logprobs = -1};
}

/* kind 0: normal; 1: few distinct values, ties everywhere; 2: one value; 3: peaked, with NaN and -inf. */
static void fill(float *x, int V, int kind, uint64_t seed)
{
    for (int i = 0; i < V; i++) {
        float v = rnd_float(&seed, 3);
        if (kind == 1) v = (float)(int)v, v = v == 0 && i % 2 ? -0.0f : v; /* both zeros */
        if (kind == 2) v = -0.5f;
        if (kind == 3) v = i % 5 == 1 ? NAN : i % 7 == 2 ? -INFINITY : v * 4;
        x[i] = v;
    }
}

static void against_oracle(const td_ops *o, int V)
{
    enum { ROWS = 4 };
    size_t ld = (size_t)V + 5;
    float *x = floats(ROWS * ld), *copy = floats(ROWS * ld);
    uint32_t *mask = malloc(((size_t)V + 31) / 32 * 4);
    int doubts = 0, tried = 0;
    for (size_t c = 0; c < TD_COUNT(sample_cases); c++)
        for (int extra = 0; extra < 3; extra++) {
            td_sample_row rows[ROWS];
            td_sample_out out[ROWS];
            td_bias bias[] = {{0, -2}, {(uint32_t)V - 1, 5}, {1, -INFINITY}};
            td_penalty pen[] = {{0, 2, 1}, {(uint32_t)V / 2, 0, 3}};
            for (int i = 0; i < (V + 31) / 32; i++) mask[i] = 0x5a5a5a5bu + (uint32_t)i * 0x01030507u;
            for (int k = 0; k < ROWS; k++) {
                fill(x + (size_t)k * ld, V, k, c * 10 + (uint64_t)extra + 1);
                rows[k] = row_of(sample_cases[c], c * 77 + (uint64_t)k, (uint32_t)(extra * 1000 + k));
                if (extra == 1) rows[k].pen = pen, rows[k].n_pen = V > 2 ? 2 : 1;
                if (extra == 1 && k % 2 == 0) /* and without */
                    rows[k].bias = bias, rows[k].n_bias = V > 2 ? 3 : 2;
                rows[k].repetition_penalty = extra ? 1.3f : 1, rows[k].presence_penalty = 0.4f,
                rows[k].frequency_penalty = 0.2f;
                if (extra == 2) rows[k].mask = mask;
                rows[k].logprobs = k == 3 ? -1 : 3;
            }
            memcpy(copy, x, ROWS * ld * sizeof *x);
            o->sample(team(1 + extra), copy, ld, V, rows, ROWS, out);
            for (int k = 0; k < ROWS; k++) {
                int want = oracle(x + (size_t)k * ld, V, &rows[k], NULL);
                tried++;
                if (want == -2)
                    doubts++;
                else
                    T_OK(out[k].token == want, "%s V=%d case %zu extra %d kind %d: got %d, expected %d",
                         o->family, V, c, extra, k, out[k].token, want);
            }
        }
    T_OK(doubts * 3 < tried, "V=%d: %d of %d cases undecided", V, doubts, tried);
    free(x), free(copy), free(mask);
}

static void log_probabilities(const td_ops *o, int V)
{
    float *x = floats((size_t)V);
    entry *e = malloc((size_t)V * sizeof *e);
    for (int kind = 0; kind < 2; kind++) {
        fill(x, V, kind, 5 + (uint64_t)kind);
        double sum = 0;
        for (int i = 0; i < V; i++) sum += exp((double)x[i]), e[i] = (entry){(double)x[i], 0, i};
        qsort(e, (size_t)V, sizeof *e, by_value);
        int32_t id = V / 3;
        td_sample_out out, sampled;
        o->score(team(2), x, (size_t)V, V, &id, 20, 1, &out);
        T_EQ(out.token, id);
        T_EQ(out.n_top, V < 20 ? V : 20);
        T_NEAR(out.logprob, (double)x[id] - log(sum), 2e-6 * (1 + fabs((double)x[id])));
        for (int i = 0; i < out.n_top; i++) {
            T_EQ(out.top[i].id, e[i].id);
            T_NEAR(out.top[i].logprob, e[i].x - log(sum), 2e-6 * (1 + fabs(e[i].x)));
        }
        td_sample_row r = row_of((sample_case){0, 1, 0, 0}, 1, 1);
        td_bias ban = {(uint32_t)e[0].id, -INFINITY};
        r.bias = &ban, r.n_bias = 1, r.logprobs = 0; /* the report is of the raw logits, the choice is not */
        o->sample(team(1), x, (size_t)V, V, &r, 1, &sampled);
        T_EQ(sampled.token, e[1].id);
        T_EQ(sampled.n_top, 0);
        T_NEAR(sampled.logprob, e[1].x - log(sum), 2e-6 * (1 + fabs(e[1].x)));
    }
    free(x), free(e);
}

/* Thousands of masses of a few units each, beside the whole: they are rounded to the nearest unit, not down.
 */
static void small_masses(const td_ops *o)
{
    enum { SMALL = 8000 };
    float *x = floats(SMALL);
    double sum = 1;
    int32_t id = 0;
    td_sample_out out;
    for (int i = 1; i < SMALL; i++) sum += exp((double)(x[i] = -20 - (float)i / SMALL));
    x[0] = 0;
    o->score(team(1), x, SMALL, SMALL, &id, 0, 1, &out);
    T_OK(fabs(out.logprob / -log(sum) - 1) < 1e-6, "%s: %.9g, not %.9g", o->family, (double)out.logprob,
         -log(sum));
    free(x);
}

static void edges(const td_ops *o)
{
    float x[64];
    uint32_t none[2] = {0, 0}, one[2] = {0, 1u << 9};
    td_sample_out out;
    for (int i = 0; i < 64; i++) x[i] = (float)(i % 3);
    for (int greedy = 0; greedy < 2; greedy++) {
        td_sample_row r = row_of((sample_case){greedy ? 0 : 1, 1, 0, 0}, 3, 4);
        r.mask = none;
        o->sample(team(1), x, 64, 64, &r, 1, &out);
        T_EQ(out.token, -1);
        r.mask = one;
        o->sample(team(1), x, 64, 64, &r, 1, &out);
        T_EQ(out.token, 41);
        r.mask = NULL;
        x[50] = INFINITY, x[60] = INFINITY, x[1] = NAN;
        o->sample(team(1), x, 64, 64, &r, 1, &out);
        T_EQ(out.token, 50);
        for (int i = 0; i < 64; i++) x[i] = NAN;
        o->sample(team(1), x, 64, 64, &r, 1, &out);
        T_EQ(out.token, -1);
        for (int i = 0; i < 64; i++) x[i] = (float)(i % 3);
    }
    T_EQ(out.n_top, 0);
}

#ifndef TEST_PARTS_V
#define TEST_PARTS_V 4000
#endif
#ifndef TEST_DRAWS
#define TEST_DRAWS 20000 /* fewer where a draw is slow */
#endif

/* TEST_DRAWS draws of fixed seeds over 64 tokens against the exact law: chi-square below its 1e-6 quantile.
 */
static void distribution(const td_ops *o)
{
    enum { V = 64, N = TEST_DRAWS };
    static const sample_case cases[] = {{1, 1, 0, 0}, {0.8f, 0.9f, 0, 0}, {1, 1, 0.05f, 30}};
    float x[V];
    fill(x, V, 0, 99);
    for (size_t c = 0; c < TD_COUNT(cases); c++) {
        int count[V] = {0}, cells = 0;
        double prob[V], chi = 0;
        td_sample_row r = row_of(cases[c], 12345, 0);
        T_OK(oracle(x, V, &r, prob) != -1);
        for (uint32_t i = 0; i < N; i++) {
            td_sample_out out;
            r.position = i % 1000, r.seed = 12345 + i / 1000;
            o->sample(team(1), x, V, V, &r, 1, &out);
            if (out.token >= 0) count[out.token]++;
        }
        for (int i = 0; i < V; i++) {
            if (prob[i] == 0) T_EQ(count[i], 0);
            if (prob[i] * N < 5) continue;
            double d = count[i] - prob[i] * N;
            chi += d * d / (prob[i] * N), cells++;
        }
        double df = cells - 1, z = 4.75,
               limit = df * pow(1 - 2 / (9 * df) + z * sqrt(2 / (9 * df)), 3); /* Wilson-Hilferty */
        T_OK(chi < limit, "%s case %zu: chi-square %g of %d cells, limit %g", o->family, c, chi, cells,
             limit);
    }
}

/* ---- a vocabulary in parts ---- */

enum { MAX_PARTS = 8, PART_ROWS = 2 * TD_COUNT(sample_cases) * 5 };

typedef struct parts {
    const td_ops *o;
    const float *x; /* [PART_ROWS][V] */
    int V, n;
    const td_sample_row *row;
    const int32_t *score;
} parts;

/* What part `r` of n ranks has, as the grid deals it: the last parts may be short or empty. */
static td_vocab part_of(int V, int r, int n)
{
    int block = ((V + n - 1) / n + 31) / 32 * 32, v0 = TD_MIN(r * block, V);
    return (td_vocab){V, v0, TD_MIN(block, V - v0), r, n};
}

/* All ranks' ends in one thread. out: of the last rank; the others' must be the same. */
static void draw_in_parts(const parts *p, td_sample_out *out)
{
    static td_draw d[MAX_PARTS][PART_ROWS];
    static td_sample_out others[MAX_PARTS][PART_ROWS];
    size_t bytes = PART_ROWS * (size_t)TD_DRAW_MAX_BYTES;
    uint8_t *all = aligned_alloc(64, bytes * (size_t)p->n);
    float *raw[MAX_PARTS], *x[MAX_PARTS];
    td_vocab v[MAX_PARTS];
    int stages = 0;
    for (int r = 0; r < p->n; r++) {
        v[r] = part_of(p->V, r, p->n);
        size_t n = (size_t)v[r].n;
        raw[r] = malloc(n * PART_ROWS * 4 + 1),
        x[r] = malloc(n * PART_ROWS * 4 + 1); /* exactly: a sanitizer sees more */
        for (size_t i = 0; i < PART_ROWS; i++) {
            memcpy(raw[r] + i * n, p->x + i * (size_t)p->V + v[r].v0, n * 4);
            bool in_place = p->score[i] < 0 && p->row[i].logprobs < 0 && i % 2;
            d[r][i] = td_draw_open(p->row[i], p->score[i], raw[r] + i * n, (in_place ? raw : x)[r] + i * n,
                                   r == p->n - 1 ? &out[i] : &others[r][i]);
        }
    }
    for (;; stages++) {
        size_t used = 0;
        for (size_t i = 0; i < PART_ROWS; i++) {
            for (int r = 0; r < p->n; r++) {
                T_EQ(d[r][i].bytes, d[0][i].bytes);
                d[r][i].at = used;
            }
            used += d[0][i].bytes;
        }
        if (!used) break;
        for (int r = 0; r < p->n; r++)
            p->o->draw_say(team(1 + r % 2), &v[r], d[r], PART_ROWS, all + (size_t)r * used);
        for (int r = 0; r < p->n; r++) p->o->draw_hear(team(1 + r % 2), &v[r], d[r], PART_ROWS, all, used);
    }
    T_OK(stages <= 8, "%d messages", stages);
    for (int r = 0; r < p->n; r++) {
        if (r < p->n - 1) T_OK(!memcmp(others[r], out, sizeof others[r]), "rank %d of %d differs", r, p->n);
        free(raw[r]), free(x[r]);
    }
    free(all);
}

static void in_parts(const td_ops *o, int V)
{
    float *x = malloc((size_t)V * PART_ROWS * sizeof *x);
    uint32_t *mask = calloc(((size_t)V + 31) / 32, 4), *none = calloc(((size_t)V + 31) / 32, 4);
    static td_sample_row row[PART_ROWS];
    static int32_t score[PART_ROWS];
    static td_sample_out want[PART_ROWS], got[PART_ROWS];
    td_bias bias[] = {{0, -2}, {(uint32_t)V - 1, 5}, {(uint32_t)V / 2, -INFINITY}, {(uint32_t)V - 1, 0.5f}};
    td_penalty pen[] = {{0, 2, 1}, {(uint32_t)V - 1, 1, 0}, {(uint32_t)V / 2, 0, 3}};
    const uint32_t n_pen = V > 2 ? 3 : (uint32_t)V; /* distinct ids */
    for (int i = 0; i < (V + 31) / 32; i++) mask[i] = 0x5a5a5a5bu + (uint32_t)i * 0x01030507u;
    for (size_t i = 0; i < PART_ROWS; i++) {
        size_t c = i / 10;
        int kind = (int)(i % 5), extra = (int)(i / 5 % 7);
        float *to = x + i * (size_t)V;
        fill(to, V, kind % 4, i + 1);
        for (int k = 0; k < V && kind == 4; k++) to[k] = i % 2 ? NAN : k % 9 == 8 ? INFINITY : to[k];
        row[i] = row_of(sample_cases[c], i * 77, (uint32_t)i);
        row[i].repetition_penalty = 1.3f, row[i].presence_penalty = 0.4f, row[i].frequency_penalty = 0.2f;
        if (extra % 2) row[i].bias = bias, row[i].n_bias = 4, row[i].pen = pen, row[i].n_pen = n_pen;
        if (extra > 3) row[i].mask = extra == 6 && kind == 0 ? none : mask;
        row[i].logprobs = i % 3 == 0 ? -1 : i % 3 == 1 ? 0 : 20;
        score[i] = i % 11 == 7 ? (int32_t)(i * 131 % (size_t)V) : -1;
        if (score[i] >= 0) row[i].logprobs = (int)(i % 4) * 7;
        if (score[i] >= 0)
            o->score(team(1), to, (size_t)V, V, &score[i], row[i].logprobs, 1, &want[i]);
        else
            o->sample(team(1), to, (size_t)V, V, &row[i], 1, &want[i]);
    }
    for (int n = 1; n <= MAX_PARTS; n += n < 4 ? 1 : 4) {
        draw_in_parts(&(parts){o, x, V, n, row, score}, got);
        for (size_t i = 0; i < PART_ROWS; i++)
            T_OK(!memcmp(&got[i], &want[i], sizeof got[i]),
                 "%s V=%d in %d parts, row %zu (case %zu): %d, alone %d", o->family, V, n, i, i / 10,
                 got[i].token, want[i].token);
    }
    free(x), free(mask), free(none);
}

int main(void)
{
    const td_ops *o;
    for (int f = 0; (o = td_ops_family(f)); f++) {
        for (size_t i = 0; i < TD_COUNT(sample_V); i++)
            against_oracle(o, sample_V[i]), log_probabilities(o, sample_V[i]);
        for (int V = 1; o->draw_say && V < TEST_PARTS_V; V = V * 3 + V % 7 + 1) in_parts(o, V);
        edges(o);
        small_masses(o);
        distribution(o);
    }
    return T_DONE();
}
