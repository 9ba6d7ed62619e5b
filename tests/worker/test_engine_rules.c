// SPDX-License-Identifier: Apache-2.0
/* tests/worker/test_engine_rules.c - what the engine promises beside its tokens, over the model of hashes:
 * the step log shows continuous batching and shared prompts; on_kv tells each layer and token once and only
 * when it is written; held pages stay; limits and ends. */
#include "common/log.h"
#include "tests/worker/support_fake.h"
#include "tests/worker/support_handoff.h"

enum { V = FAKE_V, MAX_LOG = 4000 };

static td_model *model;
static td_pool *threads;
static const td_ops *ops;
static td_engine_opts current;

/* One sequence's part in one step. */
typedef struct entry {
    uint64_t step, key;
    uint32_t pos0, n_rows;
} entry;
static entry entries[MAX_LOG];
static uint32_t n_entries;
static te_watch watch;

static void on_step(void *arg, const td_step *s)
{
    te_on_step(arg, s);
    for (uint32_t i = 0; i < s->n_seqs && n_entries < MAX_LOG; i++) {
        const td_step_seq *q = &td_step_seqs(s)[i];
        entries[n_entries++] = (entry){s->number, q->key, q->pos0, q->n_rows};
    }
}

static const entry *logged(uint64_t step, uint64_t key)
{
    for (uint32_t i = 0; i < n_entries; i++)
        if (entries[i].step == step && entries[i].key == key) return &entries[i];
    return NULL;
}

static uint32_t rows_before(uint64_t key, uint32_t position)
{
    uint32_t n = 0;
    for (uint32_t i = 0; i < n_entries; i++)
        for (uint32_t k = 0; k < entries[i].n_rows; k++)
            n += entries[i].key == key && entries[i].pos0 + k < position;
    return n;
}

static td_engine_opts filled(td_engine_opts o)
{
    o.model = model, o.ops = ops, o.pool = threads;
    o.hash_key = (td_hkey){3, 4};
    if (!o.page_size) o.page_size = 16;
    if (!o.max_batched_tokens) o.max_batched_tokens = 512;
    if (!o.max_seqs) o.max_seqs = 48;
    if (!o.max_legs) o.max_legs = 64;
    if (!o.kv_pages) o.kv_pages = 1000;
    if (!o.max_model_len) o.max_model_len = 400;
    return o;
}

static td_engine *open_with(td_engine_opts o)
{
    td_engine *e = NULL;
    o = filled(o);
    current = o;
    if (td_engine_open(&o, &e) < 0) {
        T_OK(0, "%s", td_reason());
        exit(1);
    }
    watch = (te_watch){&current, e, 0, 0};
    n_entries = 0;
    td_engine_on_step(e, on_step, &watch);
    return e;
}

static void close_idle(td_engine *e)
{
    te_drain(e);
    T_OK(te_ledger(e, true), "pages or legs are left");
    td_engine_close(e);
}

static void turn(td_engine *e, te_spec *s, te_result *r, uint32_t n)
{
    td_engine_out o;
    if (td_engine_turn(e, &o) == TD_OK) te_take(s, r, n, &o);
}

static void start(td_engine *e, te_spec *s, te_result *r)
{
    te_expect(s, r);
    T_OK(td_engine_start(e, te_leg(s)) == TD_OK, "start: %s", td_reason());
}

/* ---- the step log ---- */

/* A leg that comes while others run joins their next step, and nobody waits for anybody's end. */
static void test_joins(void)
{
    te_spec s[4];
    te_result r[4] = {0};
    td_engine *e = open_with((td_engine_opts){0});
    for (uint64_t i = 0; i < 4; i++) {
        s[i] = te_make(i + 1, 30, 20, V);
        start(e, &s[i], &r[i]);
        for (int k = 0; k < 2; k++) turn(e, s, r, (uint32_t)i + 1);
    }
    te_finish(e, s, r, 4);
    for (uint64_t i = 0; i < 4; i++) {
        const entry *first = logged(2 * i + 1, i + 1);
        T_OK(first && first->pos0 == 0 && first->n_rows == 30, "leg %d did not start in step %d", (int)i + 1,
             (int)(2 * i + 1));
        for (uint64_t k = 0; k < i; k++) {
            const entry *other = logged(2 * i + 1, k + 1);
            T_OK(other && other->n_rows == 1, "leg %d waited while leg %d came", (int)k + 1, (int)i + 1);
        }
        for (uint64_t k = 0; k < 20; k++)
            T_OK(logged(2 * i + 1 + k, i + 1), "leg %d missed a step", (int)i + 1);
        T_OK(!logged(2 * i + 21, i + 1));
        te_result_free(&r[i]);
    }
    close_idle(e);
}

/* A long prompt comes in chunks of what the running decodes leave of the budget; they have a row in every
 * step. */
static void test_stall_free(void)
{
    te_spec s[6];
    te_result r[6] = {0};
    td_engine *e = open_with((td_engine_opts){.max_batched_tokens = 24, .max_prefill_chunk = 20});
    for (uint64_t i = 0; i < 5; i++) {
        s[i] = te_make(i + 1, 3, 40, V);
        start(e, &s[i], &r[i]);
    }
    turn(e, s, r, 5);
    s[5] = te_make(6, 200, 5, V);
    start(e, &s[5], &r[5]);
    te_finish(e, s, r, 6);
    uint64_t step = 2;
    for (uint32_t at = 0; at < 200; step++) {
        const entry *long_one = logged(step, 6);
        uint32_t chunk = TD_MIN(24 - 5, 200 - at);
        T_OK(long_one && long_one->pos0 == at && long_one->n_rows == chunk,
             "step %d: not the %u rows that are left", (int)step, chunk);
        for (uint64_t i = 0; i < 5; i++)
            T_OK(logged(step, i + 1), "decode of leg %d is skipped in step %d", (int)i + 1, (int)step);
        at += chunk;
    }
    T_EQ(step, 2 + 11);
    close_idle(e);
    for (int i = 0; i < 6; i++) te_result_free(&r[i]);
}

/* n choices: the prompt's rows are computed once, its full pages are held once. */
static void test_shared_prompt(void)
{
    for (uint32_t prompt = 60; prompt <= 70; prompt++) {
        te_spec s = te_make(1, prompt, 20, V);
        te_result r = {0};
        td_engine_stats st;
        s.leg.sampling.n = 5;
        s.leg.sampling.temperature = 1;
        td_engine *e = open_with((td_engine_opts){0});
        start(e, &s, &r);
        turn(e, &s, &r, 1);
        for (uint32_t c = 0; c < 5; c++) T_EQ(r.n[c], 1);
        turn(e, &s, &r, 1);
        td_engine_stats_get(e, &st);
        T_EQ(st.ledger[0].shared, prompt / 16);
        T_EQ(st.ledger[0].private_, 5);
        te_finish(e, &s, &r, 1);
        td_engine_stats_get(e, &st);
        T_EQ(rows_before(1, prompt), prompt);
        T_EQ(st.rows, prompt + 5 * 19);
        close_idle(e);
        te_result_free(&r);
    }
}

/* The second of two equal prompts computes only what is no whole page; the last token is always computed. */
static void test_hit_rows(void)
{
    for (uint32_t prompt = 30; prompt < 52; prompt++) {
        te_spec s = te_make(1, prompt, 3, V);
        te_result r = {0};
        td_engine *e = open_with((td_engine_opts){.prefix_cache = true});
        te_run(e, &s, &r, 1);
        T_EQ(r.cached, 0);
        n_entries = 0;
        te_run(e, &s, &r, 1);
        T_EQ(r.cached, (prompt - 1) / 16 * 16);
        T_EQ(rows_before(1, prompt), prompt - (prompt - 1) / 16 * 16);
        s.leg.salt = "another tenant", s.leg.salt_bytes = 14;
        te_run(e, &s, &r, 1);
        T_EQ(r.cached, 0);
        close_idle(e);
        te_result_free(&r);
    }
}

/* ---- on_kv ---- */

typedef struct kv_log {
    td_engine *e;
    uint8_t told[4][FAKE_L][TE_MAX_PROMPT];
} kv_log;

static void on_kv(void *arg, uint64_t key, int layer0, int layer1, uint32_t tok0, uint32_t tok1)
{
    kv_log *k = arg;
    for (int l = layer0; l < layer1; l++)
        for (uint32_t t = tok0; t < tok1; t++) {
            const td_layer_desc *d = &model->desc.layer[l];
            uint32_t n;
            const int32_t *pages = td_engine_pages(k->e, key, d->group, &n);
            const uint32_t *slot = fake_slot(td_engine_kv(k->e, d->group), d->slot, pages, t, 0);
            T_OK(slot && slot[1] == t && slot[2] == (uint32_t)l && slot[3] == fake_mix(slot[0], t),
                 "layer %d of token %u is told, not written", l, t);
            k->told[key][l][t]++;
        }
}

/* Chunks, hits, resumed tokens, preemption (unheld legs, so many that the pool is short): once each. */
static void test_on_kv(void)
{
    for (int chunk = 0; chunk < 20; chunk += 7) {
        te_spec s[4];
        te_result r[4] = {0};
        kv_log *k = td_xalloc(sizeof *k);
        td_engine *e = k->e = open_with((td_engine_opts){
            .max_prefill_chunk = chunk, .prefix_cache = true, .kv_pages = 34, .max_batched_tokens = 40});
        td_engine_on_kv(e, on_kv, k);
        s[0] = te_make(0, 150, 60, V); /* decodes, and takes the pages of the others away */
        start(e, &s[0], &r[0]);
        for (int i = 0; i < 6; i++) turn(e, s, r, 1);
        for (uint64_t i = 1; i < 4; i++) {
            s[i] = te_make(i, 100 + 7 * (uint32_t)i, 10, V);
            s[i].leg.kind = TD_LEG_PREFILL;
            s[i].leg.hit_tokens = i == 2 ? 48 : 0;
            s[i].leg.sampling.n = i == 3 ? 3 : 1;
            if (i == 3) memcpy(s[3].prompt, s[1].prompt, 80 * sizeof(uint32_t));
            if (i == 1) s[1].n_resume[0] = 5; /* made before, by someone */
            start(e, &s[i], &r[i]);
        }
        te_finish(e, s, r, 4);
        for (uint64_t i = 1; i < 4; i++) {
            uint32_t n = s[i].leg.n_prompt + s[i].n_resume[0];
            bool once = true;
            for (int l = 0; l < FAKE_L; l++)
                for (uint32_t t = 0; t < n; t++) once &= k->told[i][l][t] == (t >= s[i].leg.hit_tokens);
            T_OK(once, "chunk %d: leg %d is not told once", chunk, (int)i);
            T_OK(r[i].end.finish == TD_FINISH_NONE && r[i].n[0] == s[i].n_resume[0] + 1);
        }
        for (int l = 0; l < FAKE_L; l++) T_EQ(k->told[0][l][0], 0); /* a mixed leg is nobody's business */
        close_idle(e);
        free(k);
        for (int i = 0; i < 4; i++) te_result_free(&r[i]);
    }
}

/* A prefill leg that is preempted in the middle of its prompt is told again of nothing. */
static void test_on_kv_preempted(void)
{
    te_spec s[2] = {te_make(0, 16, 90, V), te_make(1, 200, 1, V)};
    te_result r[2] = {0};
    td_engine_stats st;
    kv_log *k = td_xalloc(sizeof *k);
    td_engine *e = k->e =
        open_with((td_engine_opts){.max_prefill_chunk = 1, .kv_pages = 16, .max_model_len = 220});
    td_engine_on_kv(e, on_kv, k);
    start(e, &s[0], &r[0]);
    turn(e, s, r, 1);
    s[1].leg.kind = TD_LEG_PREFILL;
    start(e, &s[1], &r[1]);
    te_finish(e, s, r, 2);
    td_engine_stats_get(e, &st);
    T_OK(st.preemptions > 0, "nothing was preempted");
    for (int l = 0; l < FAKE_L; l++)
        for (uint32_t t = 0; t < 200; t++)
            T_OK(k->told[1][l][t] == 1, "layer %d, token %u: told %d times", l, t, k->told[1][l][t]);
    close_idle(e);
    free(k);
    te_result_free(&r[0]);
    te_result_free(&r[1]);
}

/* ---- holds ---- */

/* Fill the pool with other legs' pages, over and over. */
static void press(td_engine *e)
{
    te_spec s[3];
    te_result r[3] = {0};
    for (uint64_t i = 0; i < 3; i++) {
        s[i] = te_make(100 + i, 150, 8, V);
        start(e, &s[i], &r[i]);
    }
    te_finish(e, s, r, 3);
    for (int i = 0; i < 3; i++) te_result_free(&r[i]);
}

/* Held after `turns` turns (before the first: it has no pages yet), then ended by whatever comes first; then
 * others want all pages. */
static void test_hold(void)
{
    static uint32_t before[8][FAKE_L][8];
    for (int turns = 0; turns < 12; turns += 1)
        for (int cache = 0; cache < 2; cache++) {
            te_spec s = te_make(7, 100, 4, V);
            te_result r = {0};
            td_engine_out o;
            uint32_t n;
            td_engine *e = open_with((td_engine_opts){
                .kv_pages = 40, .max_prefill_chunk = 20, .prefix_cache = cache, .max_model_len = 300});
            s.leg.kind = turns % 3 ? TD_LEG_MIXED : TD_LEG_PREFILL;
            s.leg.sampling.n = turns % 2 ? 1 : 3;
            start(e, &s, &r);
            for (int i = 0; i < turns; i++) turn(e, &s, &r, 1);
            bool gone = r.ended;
            T_EQ(td_engine_hold(e, 7), gone ? TD_EGONE : TD_OK);
            T_EQ(td_engine_hold(e, 7), gone ? TD_EGONE : TD_OK); /* twice: two transfers */
            for (int i = 0; i < 20 && !r.ended; i++) turn(e, &s, &r, 1);
            T_OK(r.ended);
            const int32_t *pages = td_engine_pages(e, 7, 0, &n);
            T_OK(gone ? !pages : pages && n >= 7 && !te_ledger(e, true), "a held leg has lost its pages");
            for (uint32_t j = 0; !gone && j < 6; j++)
                for (int l = 0; l < model->desc.group[0].n_slots; l++)
                    memcpy(before[j][l], fake_slot(td_engine_kv(e, 0), l, pages, 16 * j, 0),
                           sizeof before[j][l]);
            press(e);
            td_engine_unhold(e, 7);
            press(e);
            for (uint32_t j = 0; !gone && j < 6; j++)
                for (int l = 0; l < model->desc.group[0].n_slots; l++)
                    T_OK(!memcmp(before[j][l], fake_slot(td_engine_kv(e, 0), l, pages, 16 * j, 0),
                                 sizeof before[j][l]),
                         "a held page has changed");
            td_engine_unhold(e, 7);
            td_engine_unhold(e, 7); /* nothing */
            T_OK(!td_engine_pages(e, 7, 0, &n));
            T_EQ(td_engine_turn(e, &o), TD_AGAIN);
            close_idle(e);
            te_result_free(&r);
        }
}

/* A held leg whose choices want pages while a reservation has the rest: it waits, writes nobody's page, and
 * goes on. */
static void test_held_waits(void)
{
    te_spec s = te_make(1, 20, 30, V), d = te_make(2, 210, 1, V);
    te_result alone = {0}, r = {0}, ignored = {0};
    td_engine_out o;
    uint32_t hit;
    s.leg.sampling.n = 3;
    s.leg.sampling.temperature = 1;
    td_engine *e = open_with((td_engine_opts){0});
    te_run(e, &s, &alone, 1);
    close_idle(e);
    e = open_with((td_engine_opts){.kv_pages = 17, .max_model_len = 230});
    start(e, &s, &r);
    turn(e, &s, &r, 1);
    T_EQ(r.n[2], 1);
    (void)td_engine_hold(e, 1);
    d.leg.kind = TD_LEG_DECODE;
    te_expect(&d, &ignored);
    T_OK(td_engine_reserve(e, te_leg(&d), &hit) == TD_OK, "%s", td_reason());
    for (int i = 0; i < 100; i++) turn(e, &s, &r, 1);
    T_OK(!r.ended, "the pool was meant to be too small");
    T_EQ(td_engine_cancel(e, 2), TD_OK);
    for (int i = 0; i < 100 && !r.ended; i++)
        if (td_engine_turn(e, &o) == TD_OK) {
            bool over = false; /* beside the end of leg 2 */
            for (uint32_t k = 0; k < o.n_end; k++) over |= o.end[k].key == 1;
            o.n_end = 0;
            te_take(&s, &r, 1, &o);
            r.ended = over;
        }
    td_engine_unhold(e, 1);
    te_same(&s, &alone, &r, "held, short of pages");
    close_idle(e);
    te_result_free(&alone);
    te_result_free(&r);
    te_result_free(&ignored);
}

/* The first of the waiting legs does not fit and goes away: the next is tried at once, though no page has
 * moved. */
static void test_next_in_line(void)
{
    te_spec s[3] = {te_make(1, 95, 60, V), te_make(2, 200, 5, V), te_make(3, 30, 5, V)};
    te_result r[3] = {0};
    td_engine *e = open_with((td_engine_opts){.kv_pages = 17, .max_model_len = 230});
    for (int i = 0; i < 3; i++) start(e, &s[i], &r[i]);
    for (int i = 0; i < 4; i++) turn(e, s, r, 3);
    T_OK(r[0].n[0] == 4 && !r[1].prompt_told && !r[2].prompt_told, "the third overtook the second");
    T_EQ(td_engine_cancel(e, 2), TD_OK);
    turn(e, s, r, 3);
    T_OK(r[2].prompt_told && r[0].n[0] == 5);
    te_finish(e, s, r, 3);
    close_idle(e);
    for (int i = 0; i < 3; i++) te_result_free(&r[i]);
}

/* ---- reservations ---- */

static void test_reservations(void)
{
    te_spec s = te_make(1, 100, 60, V), d;
    te_result r = {0}, got = {0};
    td_engine_out o;
    td_engine_stats a, b;
    uint32_t hit = 0;
    td_engine *e = open_with((td_engine_opts){.prefix_cache = true, .kv_pages = 40});
    te_run(e, &s, &r, 1);
    /* Hits reach into the tokens a single choice resumes with: all of what is here already is said to be
     * here. */
    d = s;
    d.leg.kind = TD_LEG_DECODE;
    d.n_resume[0] = 50;
    memcpy(d.resume[0], r.token[0], 50 * sizeof(uint32_t));
    T_OK(td_engine_reserve(e, te_leg(&d), &hit) == TD_OK, "%s", td_reason());
    T_EQ(hit, 149 / 16 * 16);
    T_EQ(td_engine_cancel(e, 1), TD_OK);
    /* Refused for want of pages: nothing is taken. */
    d = te_make(2, 380, 5, V);
    d.leg.kind = TD_LEG_DECODE;
    T_OK(td_engine_reserve(e, te_leg(&d), &hit) == TD_OK, "%s", td_reason());
    td_engine_stats_get(e, &a);
    d.leg.key = 3;
    T_EQ(td_engine_reserve(e, te_leg(&d), &hit), TD_EFULL);
    td_engine_stats_get(e, &b);
    T_OK(!memcmp(a.ledger, b.ledger, sizeof a.ledger) && a.ledger[0].in_transit == 24);
    T_EQ(td_engine_cancel(e, 2), TD_OK);
    /* One of two choices came with its end: it says so and stays as it is; the other goes on. */
    while (td_engine_turn(e, &o) == TD_OK) continue; /* the ends of the cancelled ones */
    d = te_make(4, 49, 20, V);
    d.leg.sampling.n = 2;
    d.leg.sampling.temperature = 1;
    te_run(e, &d, &r, 1);
    d.leg.kind = TD_LEG_DECODE;
    d.leg.sampling.n_stop_ids = 1;
    d.stop[0] = r.token[0][2];
    for (uint32_t i = 0; i < 20; i++)
        T_OK(i == 2 || r.token[0][i] != d.stop[0] || i > 2, "another seed, please");
    d.n_resume[0] = 3, memcpy(d.resume[0], r.token[0], 12);
    te_expect(&d, &got);
    T_OK(td_engine_reserve(e, te_leg(&d), &hit) == TD_OK, "%s", td_reason());
    T_EQ(td_engine_land(e, 4, (uint32_t[2]){1, 2}, 2),
         TD_EPROTO); /* choices that have tokens want no first ones */
    T_EQ(td_engine_recompute(e, 4), TD_OK);
    te_finish(e, &d, &got, 1);
    T_OK(got.finish[0] == TD_FINISH_STOP && got.n[0] == 3);
    T_OK(got.n[1] >= 1 && !memcmp(got.token[1], r.token[1], got.n[1] * sizeof(uint32_t)));
    te_expect(&d, &got);
    T_OK(td_engine_reserve(e, te_leg(&d), &hit) == TD_OK && hit == 48, "%s", td_reason());
    T_EQ(td_engine_land(e, 4, NULL, 0),
         TD_OK); /* the cache has all but the last row, which is computed again */
    te_finish(e, &d, &got, 1);
    T_OK(got.finish[0] == TD_FINISH_STOP && got.n[0] == 3);
    T_OK(got.n[1] >= 1 && !memcmp(got.token[1], r.token[1], got.n[1] * sizeof(uint32_t)));
    close_idle(e);
    te_result_free(&r);
    te_result_free(&got);
    model->bad_reads = 0;
}

/* ---- ends and limits ---- */

static void test_ends(void)
{
    te_spec s = te_make(1, 50, 90, V);
    te_result r = {0}, got = {0};
    td_engine *e = open_with((td_engine_opts){.max_model_len = 64});
    te_run(e, &s, &r, 1);
    T_OK(r.n[0] == 14 && r.finish[0] == TD_FINISH_LENGTH, "the context is full at 64");
    for (uint32_t at = 0; at < 14; at++) { /* a stop id ends where it is first drawn, and is the last token */
        uint32_t first = at;
        for (uint32_t i = at; i-- > 0;)
            if (r.token[0][i] == r.token[0][at]) first = i;
        s.stop[0] = r.token[0][at];
        s.leg.sampling.n_stop_ids = 1;
        te_run(e, &s, &got, 1);
        T_OK(got.n[0] == first + 1 && got.finish[0] == TD_FINISH_STOP, "stop at %u: %u tokens", first,
             got.n[0]);
        s.leg.sampling.min_tokens = at + 1; /* banned at indexes 0 .. at */
        te_run(e, &s, &got, 1);
        T_OK(got.n[0] > at + 1 || got.finish[0] == TD_FINISH_LENGTH);
        for (uint32_t i = 0; i <= at; i++) T_OK(got.token[0][i] != s.stop[0]);
        T_OK(!memcmp(got.token[0], r.token[0], first * sizeof(uint32_t)));
        s.leg.sampling.min_tokens = 0;
    }
    s.leg.sampling.n_stop_ids = 0;
    for (uint32_t most = 1; most < 14; most++) {
        s.leg.sampling.max_tokens = most;
        te_run(e, &s, &got, 1);
        T_OK(got.n[0] == most && got.finish[0] == TD_FINISH_LENGTH &&
             !memcmp(got.token[0], r.token[0], most * sizeof(uint32_t)));
    }
    s.leg.n_prompt = 63; /* one token fits */
    te_run(e, &s, &got, 1);
    T_OK(got.n[0] == 1 && got.finish[0] == TD_FINISH_LENGTH);
    s.leg.n_prompt = 64;
    T_EQ(td_engine_start(e, te_leg(&s)), TD_EBADREQ);
    close_idle(e);
    te_result_free(&r);
    te_result_free(&got);
}

static void test_bad_values(void)
{
    static const float nan = NAN, inf = INFINITY;
    td_engine *e = open_with((td_engine_opts){.max_legs = 5, .max_seqs = 8});
    te_spec good = te_make(1, 20, 5, V), s;
    good.leg.sampling.n_bias = 1;
    good.bias[0] = (td_bias){3, 1};
#define REFUSED(change)                                                                                      \
    do {                                                                                                     \
        s = good;                                                                                            \
        td_sampling *p = &s.leg.sampling;                                                                    \
        (void)p;                                                                                             \
        change;                                                                                              \
        T_EQ(td_engine_start(e, te_leg(&s)), TD_EBADREQ);                                                    \
    } while (0)
    REFUSED(p->temperature = nan);
    REFUSED(p->temperature = -1);
    REFUSED(p->temperature = inf);
    REFUSED(p->top_p = 0);
    REFUSED(p->top_p = nan);
    REFUSED(p->top_p = 1.5f);
    REFUSED(p->min_p = nan);
    REFUSED(p->min_p = -0.5f);
    REFUSED(p->repetition_penalty = 0);
    REFUSED(p->repetition_penalty = nan);
    REFUSED(p->presence_penalty = inf);
    REFUSED(p->frequency_penalty = nan);
    REFUSED(s.bias[0].add = nan);
    REFUSED(p->n_bias = TD_MAX_LOGIT_BIAS + 1);
    REFUSED(p->n_stop_ids = TD_MAX_STOP_IDS + 1);
    REFUSED(p->n = 9);
    REFUSED(p->n = 0);
    REFUSED(p->max_tokens = 0);
    REFUSED(s.leg.salt = good.prompt; s.leg.salt_bytes = 1 << 20);
    T_OK(te_ledger(e, true));
    te_result r = {0};
    te_run(e, &good, &r, 1);
    T_EQ(r.n[0], 5);
    close_idle(e);
    te_result_free(&r);
}

/* Forty prefill legs of a hundred choices end in one step: four thousand draws. */
static void test_many_draws(void)
{
    td_engine *e = open_with((td_engine_opts){.max_seqs = 100, .max_legs = 40, .max_batched_tokens = 400});
    td_engine_out o;
    te_spec s = te_make(1, 8, 4, V);
    s.leg.sampling.n = 100;
    s.leg.kind = TD_LEG_PREFILL;
    for (uint64_t i = 0; i < 40; i++) {
        s.leg.key = i;
        T_OK(td_engine_start(e, te_leg(&s)) == TD_OK, "%s", td_reason());
    }
    T_OK(td_engine_turn(e, &o) == TD_OK);
    T_OK(o.n_tokens == 4000 && o.n_end == 40, "%u tokens, %u ends", o.n_tokens, o.n_end);
    close_idle(e);
}

static void refused(td_engine_opts o, td_status want, const char *why)
{
    td_engine *e = NULL;
    o = filled(o);
    T_EQ(td_engine_open(&o, &e), want);
    T_OK(!e && strstr(td_reason(), why), "%s", td_reason());
}

/* What could only end badly later. */
static void test_impossible(void)
{
    int most = td_model_descr(model)->max_positions;
    char why[64];
    snprintf(why, sizeof why, "--max-model-len %d: the model has %d positions", most + 1, most);
    refused((td_engine_opts){.max_model_len = most + 1, .kv_pages = most}, TD_EBADREQ, why);
    refused((td_engine_opts){.kv_pages = 2, .max_model_len = 20}, TD_EFULL, "at least");
    refused((td_engine_opts){.kv_pages = INT32_MAX}, TD_EFULL, "GiB, this machine has ");
    refused((td_engine_opts){.kv_memory_bytes = (int64_t)1 << 44, .kv_pages = -1}, TD_EFULL, "GiB, this machine has ");
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    threads = td_pool_open(1);
    T_OK(td_ops_open("ref", &ops) == TD_OK);
    for (int windows = 0; windows < 2 && !t_failed; windows++) {
        model = fake_open(windows);
        test_joins();
        test_stall_free();
        test_shared_prompt();
        test_hit_rows();
        test_on_kv();
        test_on_kv_preempted();
        test_hold();
        test_held_waits();
        test_next_in_line();
        test_reservations();
        test_ends();
        test_bad_values();
        test_many_draws();
        test_impossible();
        T_EQ(model->bad_reads, 0);
        free(model);
    }
    td_pool_close(threads);
    return T_DONE();
}
