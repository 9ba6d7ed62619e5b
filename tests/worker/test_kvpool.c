// SPDX-License-Identifier: Apache-2.0
/* tests/worker/test_kvpool.c - the pool against a naive model: every sequence knows its tokens, every slot of
 * every page holds a tag made of the whole context up to its position. Random operations on small pools;
 * after each one every readable slot of every sequence is compared, and every page is accounted for. Then the
 * rules one by one. */
#include "tests/t.h"
#include "worker/kvpool.h"

/* The pool's own source, with a hash that can be made so weak that different texts get one name. */
static int hash_bits = 64;
static td_h128 weak_hash(td_hkey key, td_h128 parent, const uint32_t tokens[TD_BLOCK_TOKENS])
{
    td_h128 h = td_blockhash_next(key, parent, tokens);
    return hash_bits == 64 ? h : (td_h128){h.lo & ((1ull << hash_bits) - 1), 0};
}
#define td_blockhash_next weak_hash
#include "worker/kvpool.c"

enum { MAX_LIVE = 6, MAX_TOKENS = 1024, VOCAB = 2, SLOTS = 2, D = 4 };

typedef struct live {
    td_kvseq kv;
    td_h128 root;
    uint32_t tokens[MAX_TOKENS], n, room; /* room: pages asked for, in tokens */
    bool open, arriving;
    uint32_t trimmed; /* q_next of the last trim */
} live;

typedef struct world {
    td_kvpool *pool;
    td_kvpool_opts o;
    live seq[MAX_LIVE];
    uint64_t rnd, matched, full, copies, trims;
} world;

static uint32_t draw(world *w, uint32_t n)
{
    w->rnd = w->rnd * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(td_mix64(w->rnd) % n);
}

static uint32_t tag(const live *q, uint32_t position, int g, int slot)
{
    uint64_t h = q->root.lo * 31 + (uint64_t)(g * 8 + slot);
    for (uint32_t i = 0; i <= position; i++) h = td_mix64(h ^ (q->tokens[i] + 1));
    return (uint32_t)h | 1;
}

static uint32_t *cell(world *w, int g, int slot, int p, uint32_t in_page, int kv)
{
    const td_kv *k = td_kvpool_kv(w->pool, g);
    return (uint32_t *)(void *)(td_kv_page(k, slot, p) +
                                ((size_t)kv * (size_t)k->P + in_page) * D * sizeof(float));
}

static void write_tags(world *w, live *q, uint32_t from, uint32_t to)
{
    uint32_t P = (uint32_t)w->o.page_size;
    for (int g = 0; g < w->o.n_groups; g++)
        for (int s = 0; s < SLOTS; s++)
            for (uint32_t p = from; p < to; p++) {
                int at = q->kv.pages[g][p / P];
                T_OK(at >= 0, "no page to write position %u", p);
                if (at >= 0) *cell(w, g, s, at, p % P, 0) = *cell(w, g, s, at, p % P, 1) = tag(q, p, g, s);
            }
}

static uint32_t first_seen(const world *w, int g, const live *q)
{
    uint32_t W = (uint32_t)w->o.group[g].window;
    return W && q->n >= W ? q->n - W + 1 : 0;
}

static bool tags_right(world *w, live *q)
{
    uint32_t P = (uint32_t)w->o.page_size;
    for (int g = 0; g < w->o.n_groups; g++)
        for (uint32_t p = first_seen(w, g, q); p < q->n; p++) {
            int at = q->kv.pages[g][p / P];
            if (at < 0) return false;
            int s = (int)(p % SLOTS); /* alternating: half of the work */
            uint32_t t = tag(q, p, g, s);
            if (*cell(w, g, s, at, p % P, 0) != t || *cell(w, g, s, at, p % P, 1) != t) return false;
        }
    return true;
}

/* Pages held by sequences, counted from their tables alone. */
static bool counts_right(world *w)
{
    static int held[4096];
    for (int g = 0; g < w->o.n_groups; g++) {
        td_kv_ledger l;
        int64_t n = 0, twice = 0;
        memset(held, 0, sizeof held);
        for (int i = 0; i < MAX_LIVE; i++)
            for (int j = 0; w->seq[i].open && j < w->seq[i].kv.n_pages; j++) {
                int k = w->seq[i].kv.pages[g][j];
                if (k < 0) continue;
                n += held[k] == 0;
                twice += held[k]++ == 1;
            }
        td_kvpool_ledger(w->pool, g, &l);
        if (l.free + l.private_ + l.shared + l.cached + l.transit != l.total || l.total != w->o.n_pages)
            return false;
        if (l.private_ + l.shared + l.transit != n || l.shared + l.transit < twice) return false;
    }
    return true;
}

/* ---- operations ---- */

static bool begin(world *w, live *q)
{
    *q = (live){.root = {draw(w, 2), 7}};
    if (td_kvseq_begin(w->pool, &q->kv, q->root) < 0) return false;
    q->open = true;
    return true;
}

static void close_seq(world *w, live *q)
{
    td_kvseq_release(w->pool, &q->kv);
    q->open = false;
}

/* A new sequence takes its hit; the rest is appended later. Tokens repeat with period 3 or 7 often, so that
 * prefixes are shared. */
static void op_new(world *w, live *q)
{
    if (!begin(w, q)) return;
    uint32_t n = 1 + draw(w, (uint32_t)(w->o.n_pages * w->o.page_size)), kind = draw(w, 4);
    n = TD_MIN(n, (uint32_t)MAX_TOKENS / 2);
    for (uint32_t i = 0; i < n; i++) q->tokens[i] = kind < 3 ? (i % (kind + 1)) % VOCAB : draw(w, VOCAB);
    uint32_t peek = td_kvpool_peek(w->pool, q->root, q->tokens, n),
             hit = td_kvseq_match(w->pool, &q->kv, q->tokens, n);
    T_EQ(hit, peek);
    T_OK(hit < n && hit % (uint32_t)td_kvpool_unit(w->pool) == 0, "hit %u of %u", hit, n);
    q->n = hit;
    w->matched += hit;
    if (draw(w, 4) == 0) { /* its pages come from elsewhere */
        q->arriving = q->kv.in_transit = true;
        q->room = n;
        if (td_kvseq_ensure(w->pool, &q->kv, n) < 0) close_seq(w, q);
    }
}

static void op_append(world *w, live *q)
{
    uint32_t n = 1 + draw(w, 20);
    if (q->n + n > MAX_TOKENS) return;
    for (uint32_t i = q->n; i < q->n + n; i++) q->tokens[i] = draw(w, 8) ? (i % 2) % VOCAB : draw(w, VOCAB);
    int before = q->kv.n_pages;
    int64_t avail = td_kvpool_available(w->pool);
    if (td_kvseq_ensure(w->pool, &q->kv, q->n + n) < 0) {
        T_OK(q->kv.n_pages == before && td_kvpool_available(w->pool) == avail,
             "a refused ensure changed something");
        w->full++;
        if (draw(w, 3) == 0) close_seq(w, q);
        return;
    }
    if (q->n % (uint32_t)w->o.page_size) { /* the only page that may be shared */
        int was = q->kv.pages[0][q->n / (uint32_t)w->o.page_size];
        if (td_kvseq_writable(w->pool, &q->kv, q->n) < 0) {
            w->full++;
            return;
        }
        w->copies += was != q->kv.pages[0][q->n / (uint32_t)w->o.page_size];
    }
    write_tags(w, q, q->n, q->n + n);
    q->n += n;
    if (draw(w, 8)) td_kvseq_publish(w->pool, &q->kv, q->tokens, q->n);
    if (draw(w, 2)) {
        td_kvseq_trim(w->pool, &q->kv, q->n);
        w->trims++;
    }
}

static void op_land(world *w, live *q)
{
    uint32_t P = (uint32_t)w->o.page_size;
    write_tags(w, q, q->n, q->room);
    for (int g = 0; g < w->o.n_groups; g++) { /* what the next row does not see never came */
        uint32_t W = (uint32_t)w->o.group[g].window;
        for (uint32_t p = q->n; W && p + W <= q->room; p++)
            for (int s = 0; s < SLOTS; s++) *cell(w, g, s, q->kv.pages[g][p / P], p % P, 0) = 0;
    }
    q->n = q->room;
    td_kvseq_landed(w->pool, &q->kv, q->kv.n_nodes ? (uint32_t)(q->kv.n_nodes * td_kvpool_unit(w->pool)) : 0,
                    q->room);
    q->arriving = false;
    td_kvseq_publish(w->pool, &q->kv, q->tokens, q->n);
}

static void op_fork(world *w, const live *from, live *to)
{
    td_kvseq kv;
    if (td_kvseq_fork(w->pool, &from->kv, &kv, from->n) < 0) return;
    *to = *from;
    to->kv = kv;
}

static void one_op(world *w)
{
    live *q = &w->seq[draw(w, MAX_LIVE)], *other = q;
    uint32_t what = draw(w, 12);
    for (int i = 0; i < MAX_LIVE; i++)
        if (!w->seq[i].open) other = &w->seq[i];
    if (!q->open)
        op_new(w, q);
    else if (q->arriving)
        what < 7 ? op_land(w, q) : close_seq(w, q);
    else if (what == 0)
        close_seq(w, q);
    else if (what < 4 && !other->open && q->n)
        op_fork(w, q, other);
    else
        op_append(w, q);
}

/* As the engine's steps do before their rows. */
static void copy(void *arg, int g, int32_t from, int32_t to)
{
    const world *w = arg;
    const td_kv *kv = td_kvpool_kv(w->pool, g);
    for (int slot = 0; slot < SLOTS; slot++)
        memcpy(td_kv_page(kv, slot, to), td_kv_page(kv, slot, from), td_kv_page_bytes(kv));
}

static td_kvpool *open_pool(world *w, int n_pages, int P, int n_groups, int window, bool cache)
{
    w->o = (td_kvpool_opts){.n_groups = n_groups,
                            .page_size = P,
                            .n_pages = n_pages,
                            .max_seqs = MAX_LIVE,
                            .max_pages_per_seq = n_pages,
                            .group = {{SLOTS, 0, 1, D}, {SLOTS, window, 1, D}},
                            .kv_dtype = TD_F32,
                            .prefix_cache = cache,
                            .copy = copy,
                            .copy_arg = w,
                            .hash_key = {1, 2}};
    if (n_groups == 1) w->o.group[0].window = window;
    T_OK(td_kvpool_open(&w->o, &w->pool) == TD_OK, "%s", td_reason());
    return w->pool;
}

static void random_ops(int n_pages, int P, int n_groups, int window, bool cache, int ops, uint64_t seed)
{
    world *w = calloc(1, sizeof *w);
    w->rnd = seed;
    open_pool(w, n_pages, P, n_groups, window, cache);
    for (int i = 0; i < ops && !t_failed; i++) {
        one_op(w);
        bool good = counts_right(w) && td_kvpool_check(w->pool);
        for (int k = 0; k < MAX_LIVE && good; k++) good = !w->seq[k].open || tags_right(w, &w->seq[k]);
        T_OK(good, "pages %d of %d, %d groups, window %d, cache %d, op %d: %s", n_pages, P, n_groups, window,
             cache, i, td_reason());
    }
    for (int k = 0; k < MAX_LIVE; k++)
        if (w->seq[k].open) close_seq(w, &w->seq[k]);
    td_kv_ledger l;
    td_kvpool_ledger(w->pool, 0, &l);
    T_EQ(l.free + l.cached, n_pages);
    T_OK(cache || l.cached == 0);
    if (getenv("VERBOSE"))
        printf("pages %d of %d, groups %d, window %d: %llu tokens hit, %llu refusals, %llu copies, %llu "
               "evictions\n",
               n_pages, P, n_groups, window, (unsigned long long)w->matched, (unsigned long long)w->full,
               (unsigned long long)w->copies, (unsigned long long)td_kvpool_evictions(w->pool));
    if (cache && n_pages >= 9 && hash_bits == 64 && !t_failed)
        T_OK(w->matched && w->full && (P == 1 || w->copies) && td_kvpool_evictions(w->pool),
             "the walk misses what it is for");
    td_kvpool_close(w->pool);
    free(w);
}

/* ---- rules, one by one ---- */

static td_kvseq filled(world *w, const uint32_t *tokens, uint32_t n)
{
    td_kvseq s;
    T_OK(td_kvseq_begin(w->pool, &s, (td_h128){1, 1}) == TD_OK);
    td_kvseq_match(w->pool, &s, tokens, n);
    T_OK(td_kvseq_ensure(w->pool, &s, n) == TD_OK, "%s", td_reason());
    td_kvseq_publish(w->pool, &s, tokens, n);
    return s;
}

static void test_hits(int P)
{
    world *w = calloc(1, sizeof *w);
    uint32_t t[200], unit = (uint32_t)TD_MAX(P, 16);
    for (uint32_t i = 0; i < 200; i++) t[i] = i;
    open_pool(w, 400 / P + 40, P, 1, 0, true);
    td_h128 root = {1, 1}, other = {1, 2};
    td_kvseq s = filled(w, t, 150);
    T_EQ(td_kvpool_peek(w->pool, root, t, 150), 149 / unit * unit);
    T_EQ(td_kvpool_peek(w->pool, root, t, 200), 150 / unit * unit); /* only full units */
    T_EQ(td_kvpool_peek(w->pool, root, t, unit), 0);                /* one token is left to compute */
    T_EQ(td_kvpool_peek(w->pool, root, t, unit + 1), unit);
    T_EQ(td_kvpool_peek(w->pool, other, t, 150), 0); /* another tenant */
    t[unit - 1]++;
    T_EQ(td_kvpool_peek(w->pool, root, t, 150), 0);
    t[unit - 1]--;
    if (unit == 16) {
        t[40]++;
        T_EQ(td_kvpool_peek(w->pool, root, t, 150), 32);
        t[40]--;
    }
    td_kvseq twin;
    T_OK(td_kvseq_begin(w->pool, &twin, root) ==
         TD_OK); /* computed at the same time: existing pages are kept */
    T_OK(td_kvseq_ensure(w->pool, &twin, 150) == TD_OK);
    td_kvseq_publish(w->pool, &twin, t, 150);
    T_OK(twin.pages[0][0] != s.pages[0][0]);
    td_kvseq_release(w->pool, &twin);
    td_kv_ledger l;
    td_kvpool_ledger(w->pool, 0, &l);
    T_EQ(l.shared, (int64_t)(150 / unit * unit) / P);
    T_EQ(l.private_ + l.shared, (150 + P - 1) / P);
    T_EQ(l.cached, 0);
    td_kvseq_release(w->pool, &s);
    td_kvpool_ledger(w->pool, 0, &l);
    T_EQ(l.cached, (int64_t)(150 / unit * unit) / P);
    T_OK(td_kvpool_check(w->pool), "%s", td_reason());
    td_kvpool_close(w->pool);
    free(w);
}

/* The tail goes before the head; a used path is never evicted; an older sequence before a younger one. */
static void test_eviction(void)
{
    world *w = calloc(1, sizeof *w);
    uint32_t a[64], b[64];
    for (uint32_t i = 0; i < 64; i++) a[i] = i, b[i] = 100 + i;
    open_pool(w, 9, 16, 1, 0, true);
    td_h128 root = {1, 1};
    td_kvseq s = filled(w, a, 64), x, y;
    td_kvseq_release(w->pool, &s);
    s = filled(w, b, 64);
    td_kvseq_release(w->pool, &s);
    T_EQ(td_kvpool_available(w->pool), 9);
    T_OK(td_kvseq_begin(w->pool, &x, root) == TD_OK &&
         td_kvseq_ensure(w->pool, &x, 32) == TD_OK); /* the free page, then a's tail */
    T_EQ(td_kvpool_peek(w->pool, root, a, 64), 48);
    T_OK(td_kvseq_ensure(w->pool, &x, 64) == TD_OK);
    T_EQ(td_kvpool_peek(w->pool, root, a, 64), 16);
    T_EQ(td_kvpool_peek(w->pool, root, b, 64), 48);
    T_OK(td_kvseq_begin(w->pool, &y, root) == TD_OK);
    T_EQ(td_kvseq_match(w->pool, &y, b, 64), 48); /* held: taken before the rest is allocated */
    T_EQ(td_kvpool_available(w->pool), 2);        /* a's head, b's fourth */
    T_EQ(td_kvseq_ensure(w->pool, &x, 16 * 7), TD_EFULL);
    T_OK(td_kvseq_ensure(w->pool, &x, 16 * 6) == TD_OK);
    T_EQ(td_kvpool_available(w->pool), 0);
    T_EQ(td_kvseq_ensure(w->pool, &y, 64), TD_EFULL);
    T_OK(td_kvpool_check(w->pool), "%s", td_reason());
    td_kvseq_release(w->pool, &x);
    td_kvseq_release(w->pool, &y);
    T_EQ(td_kvpool_available(w->pool), 9);
    td_kvpool_close(w->pool);
    free(w);
}

/* Page j goes when its last key is before the oldest that q_next sees; not a position earlier. */
static void test_window(void)
{
    world *w = calloc(1, sizeof *w);
    open_pool(w, 32, 8, 2, 20, false);
    td_kvseq s;
    T_OK(td_kvseq_begin(w->pool, &s, (td_h128){0, 0}) == TD_OK && td_kvseq_ensure(w->pool, &s, 100) == TD_OK);
    for (uint32_t q = 0; q <= 100; q++) {
        td_kvseq_trim(w->pool, &s, q);
        for (uint32_t j = 0; j < 12; j++) {
            bool gone = (int)((j + 1) * 8 - 1) < (int)q - 20 + 1;
            T_OK((s.pages[1][j] < 0) == gone, "page %u at %u", j, q);
            T_OK(s.pages[0][j] >= 0);
        }
    }
    td_kv_ledger l;
    td_kvpool_ledger(w->pool, 1, &l);
    T_EQ(l.private_, 13 - 10);
    td_kvseq_release(w->pool, &s);
    td_kvpool_close(w->pool);
    free(w);
}

/* A hand-off of 100 tokens lands with 20 of them in the window group: its prefix can be hit, where the window
 * is there; whoever computes the rest completes the nodes. */
static void test_window_landed(int P)
{
    world *w = calloc(1, sizeof *w);
    uint32_t t[100], unit = (uint32_t)TD_MAX(P, 16);
    for (uint32_t i = 0; i < 100; i++) t[i] = i;
    open_pool(w, 40 + 400 / P, P, 2, 20, true);
    td_h128 root = {1, 1};
    td_kvseq s, x;
    td_kv_ledger l;
    T_OK(td_kvseq_begin(w->pool, &s, root) == TD_OK);
    s.in_transit = true;
    T_OK(td_kvseq_ensure(w->pool, &s, 100) == TD_OK);
    td_kvseq_landed(w->pool, &s, 0, 100);
    td_kvseq_publish(w->pool, &s, t, 100);
    td_kvseq_trim(w->pool, &s, 100);
    T_OK(td_kvpool_check(w->pool), "%s", td_reason());
    /* tokens from 81 on came: a row at 96 sees 77, at 64 sees 45 */
    T_EQ(td_kvpool_peek(w->pool, root, t, 100), 0);
    td_kvseq_release(w->pool, &s);
    td_kvpool_ledger(w->pool, 1, &l);
    int64_t last = (int64_t)(100 / unit * unit) / P, lost = (81 + P - 1) / P;
    T_EQ(l.cached, TD_MAX(last - lost, (int64_t)0));
    td_kvpool_ledger(w->pool, 0, &l);
    T_EQ(l.cached, (int64_t)(100 / unit * unit) / P);
    /* a second hand-off of the same has no more to give */
    T_OK(td_kvseq_begin(w->pool, &s, root) == TD_OK && td_kvseq_ensure(w->pool, &s, 100) == TD_OK);
    td_kvseq_landed(w->pool, &s, 0, 100);
    td_kvseq_publish(w->pool, &s, t, 100);
    T_EQ(td_kvpool_peek(w->pool, root, t, 100), 0);
    td_kvseq_release(w->pool, &s);
    /* the rest is computed: from there on the same names, now with every page */
    T_OK(td_kvseq_begin(w->pool, &x, root) == TD_OK);
    T_EQ(td_kvseq_match(w->pool, &x, t, 100), 0);
    T_OK(td_kvseq_ensure(w->pool, &x, 100) == TD_OK);
    td_kvseq_publish(w->pool, &x, t, 100);
    td_kvseq_trim(w->pool, &x, 100);
    T_OK(td_kvpool_check(w->pool), "%s", td_reason());
    T_EQ(td_kvpool_peek(w->pool, root, t, 100), 99 / unit * unit);
    T_EQ(td_kvpool_peek(w->pool, root, t, unit + 1), unit);
    td_kvseq_release(w->pool, &x);
    /* a longer hand-off that goes on: 150 tokens, and a row at 144 sees only what came or was computed */
    uint32_t more[200];
    for (uint32_t i = 0; i < 200; i++) more[i] = 1000 + i;
    T_OK(td_kvseq_begin(w->pool, &s, root) == TD_OK);
    s.in_transit = true;
    T_OK(td_kvseq_ensure(w->pool, &s, 120) == TD_OK);
    td_kvseq_landed(w->pool, &s, 0, 120);
    T_OK(td_kvseq_ensure(w->pool, &s, 150) == TD_OK);
    td_kvseq_publish(w->pool, &s, more, 150);
    uint32_t came = (101 + (uint32_t)P - 1) / (uint32_t)P * (uint32_t)P, best[3] = {0}, ask[3] = {200, 130, 120};
    for (int i = 0; i < 3; i++) /* the first page that is whole, the rows that see no older one */
        for (uint32_t h = unit; h < ask[i] && h <= 150; h += unit)
            if (h + 1 >= came + 20) best[i] = h;
    for (int i = 0; i < 3; i++) T_EQ(td_kvpool_peek(w->pool, root, more, ask[i]), best[i]);
    T_OK(P > 16 || best[0] == 144);
    T_OK(td_kvseq_begin(w->pool, &x, root) == TD_OK);
    uint32_t hit = td_kvseq_match(w->pool, &x, more, 200);
    T_OK(!hit || (x.pages[1][0] < 0 && x.pages[0][0] >= 0 && x.pages[1][(hit - 19) / (uint32_t)P] >= 0));
    T_OK(td_kvpool_check(w->pool), "%s", td_reason());
    td_kvseq_release(w->pool, &x);
    td_kvseq_release(w->pool, &s);
    T_OK(td_kvpool_check(w->pool), "%s", td_reason());
    td_kvpool_close(w->pool);
    free(w);
}

/* What is still arriving belongs to nobody else, and is no prefix to be hit. */
static void test_transit(void)
{
    world *w = calloc(1, sizeof *w);
    td_kvseq s;
    td_kv_ledger l;
    uint32_t t[64] = {0};
    open_pool(w, 8, 16, 1, 0, true);
    T_OK(td_kvseq_begin(w->pool, &s, (td_h128){1, 1}) == TD_OK);
    s.in_transit = true;
    T_OK(td_kvseq_ensure(w->pool, &s, 64) == TD_OK);
    td_kvpool_ledger(w->pool, 0, &l);
    T_OK(l.transit == 4 && l.free == 4);
    td_kvseq_publish(w->pool, &s, t, 64);
    T_EQ(td_kvpool_peek(w->pool, (td_h128){1, 1}, t, 64), 0);
    td_kvseq_release(w->pool, &s);
    td_kvpool_ledger(w->pool, 0, &l);
    T_EQ(l.free, 8);
    T_OK(td_kvpool_check(w->pool), "%s", td_reason());
    td_kvpool_close(w->pool);
    free(w);
}

static void test_limits(void)
{
    world *w = calloc(1, sizeof *w);
    td_kvpool *p = NULL;
    td_kvpool_opts o = {.n_groups = 1,
                        .page_size = 24,
                        .n_pages = 4,
                        .max_seqs = 1,
                        .max_pages_per_seq = 4,
                        .copy = copy,
                        .group = {{1, 0, 1, 4}}};
    T_EQ(td_kvpool_open(&o, &p), TD_EBADREQ);
    open_pool(w, 4, 16, 1, 0, true);
    td_kvseq s[MAX_LIVE + 1];
    for (int i = 0; i < MAX_LIVE; i++) T_EQ(td_kvseq_begin(w->pool, &s[i], (td_h128){0, 0}), TD_OK);
    T_EQ(td_kvseq_begin(w->pool, &s[MAX_LIVE], (td_h128){0, 0}), TD_EFULL);
    T_EQ(td_kvseq_ensure(w->pool, &s[0], 65), TD_EFULL);
    T_EQ(td_kvseq_ensure(w->pool, &s[0], 64), TD_OK);
    T_EQ(td_kvseq_ensure(w->pool, &s[1], 1), TD_EFULL);
    for (int i = 0; i < MAX_LIVE; i++) td_kvseq_release(w->pool, &s[i]);
    td_kvseq_release(w->pool, &s[0]); /* again: nothing */
    T_EQ(td_kvpool_available(w->pool), 4);
    td_kvpool_close(w->pool);
    free(w);
}

int main(void)
{
    static const struct {
        int pages, P, ops;
    } pools[] = {{3, 1, 10000},  {64, 1, 25000}, {40, 2, 25000},  {16, 8, 25000}, {64, 8, 8000},
                 {3, 16, 20000}, {9, 16, 25000}, {24, 16, 15000}, {5, 32, 10000}, {4, 128, 4000}};
    for (int P = 1; P <= 64; P *= 2) test_hits(P);
    test_eviction();
    test_window();
    for (int P = 1; P <= 64; P *= 2) test_window_landed(P);
    test_transit();
    test_limits();
    for (size_t i = 0; i < TD_COUNT(pools); i++) {
        int P = pools[i].P;
        random_ops(pools[i].pages, P, 1, 0, true, pools[i].ops, i + 1);
        random_ops(pools[i].pages, P, 2, 19, true, pools[i].ops / 4, i + 11);
        random_ops(pools[i].pages, P, 1, 5, true, pools[i].ops / 4, i + 21);
        random_ops(pools[i].pages, P, 2, 19, false, pools[i].ops / 8, i + 31);
    }
    for (hash_bits = 0; hash_bits < 4; hash_bits++) {
        random_ops(24, 16, 1, 0, true, 8000, 51 + (uint64_t)hash_bits);
        random_ops(64, 1, 2, 19, true, 4000, 61 + (uint64_t)hash_bits);
        random_ops(8, 32, 1, 0, true, 4000, 71 + (uint64_t)hash_bits);
    }
    return T_DONE();
}
