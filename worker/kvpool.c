/* The pool is arrays: per group and page a reference count and the node it belongs to, a LIFO free list;
 * nodes in an array with a hash map by their name and an LRU list of those that no sequence uses. A node's
 * use count covers the whole path (a sequence that uses a node uses its ancestors), so an unused node has
 * only unused descendants and the list's tail is always a leaf. A node may lack pages of window groups (-1):
 * how many an eviction gives back is counted per group. */
// SPDX-License-Identifier: Apache-2.0
#include "worker/kvpool.h"
#include "common/check.h"
#include "common/map.h"
#include "worker/devmem.h"
#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

typedef enum { FREE, PRIVATE, SHARED, CACHED, TRANSIT, N_CLASSES } page_class;

typedef struct page {
    uint16_t refs; /* sequences that hold it */
    bool transit;  /* of those, its content is still arriving */
    int32_t node;  /* -1: none */
} page;

typedef struct node {
    td_h128 hash, before;             /* before: the parent's, or the root of the chain */
    int32_t parent, n_children, uses; /* uses: sequences whose path contains it */
    int32_t newer, older;             /* LRU list, when uses == 0 */
    bool live;
} node;

typedef struct group {
    td_kv kv;
    td_group_desc desc;
    page *page;
    int32_t *free_list;
    int n_free;
    int64_t idle;             /* pages of nodes that no sequence uses */
    int64_t count[N_CLASSES]; /* pages of each class, kept as they change: the ledger costs nothing */
} group;

struct td_kvpool {
    td_kvpool_opts o;
    group g[TD_MAX_GROUPS];
    int unit, pages_per_unit;
    node *node;
    uint32_t *node_tokens; /* [n_nodes][unit] */
    int32_t *node_pages;   /* [n_nodes][n_groups][pages_per_unit] */
    int32_t *free_node;
    int n_nodes, n_free_node, n_lru, newest, oldest;
    td_map by_hash;
    uint64_t evictions, changes;
    int32_t *slab; /* tables of all sequences */
    int *free_slot, n_free_slot;
    size_t slot_ints;
};

static int32_t *pages_of(const td_kvpool *p, int n, int g)
{
    return p->node_pages + ((size_t)n * (size_t)p->o.n_groups + (size_t)g) * (size_t)p->pages_per_unit;
}
static uint32_t *tokens_of(const td_kvpool *p, int n)
{
    return p->node_tokens + (size_t)n * (size_t)p->unit;
}

/* ---- pool ---- */

/* Pages that n tokens take; the page a position lies in. */
static int pages_for(const td_kvpool *p, uint32_t n)
{
    uint32_t P = (uint32_t)p->o.page_size;
    return (int)((td_kvmap_most(p->o.kvmap, n) + P - 1) / P);
}

int td_kvpool_pages(const td_kvpool *p, uint32_t n)
{
    return pages_for(p, n);
}

int td_kvpool_whole_pages(const td_kvpool *p, uint32_t n)
{
    td_kvmap m = p->o.kvmap;
    uint32_t whole = m.ranks > 1 ? n / (m.split * m.ranks) * m.split : n;
    return (int)(whole / (uint32_t)p->o.page_size);
}

static int page_at(const td_kvpool *p, uint32_t position)
{
    return (int)(td_kvmap_local(p->o.kvmap, position) / (uint32_t)p->o.page_size);
}

static size_t kvmem_bytes(const td_group_desc *d, const td_kv *kv)
{
    return td_kv_page_bytes(kv) * (size_t)kv->n_pages * (size_t)d->n_slots;
}

static td_status map_pages(size_t bytes, void **out)
{
    void *m = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (m == MAP_FAILED) return td_fail(TD_EFULL, "no memory for the KV pool: %zu bytes: %s", bytes, strerror(errno));
    madvise(m, bytes, MADV_HUGEPAGE);
    *out = m;
    return TD_OK;
}

/* Zeroed, as a fresh map is. */
static td_status device_pages(td_dev *dev, size_t bytes, void **out)
{
    void *m;
    TD_TRY(td_devmem_alloc(dev, bytes, "the KV pool", &m));
    td_status s = dev->fill(dev, TD_STREAM_COMPUTE, m, 0, bytes);
    if (s < 0) td_devmem_free(dev, m);
    else *out = m;
    return s;
}

td_status td_kvmem_open(td_dev *dev, const td_group_desc *desc, int n_groups, int n_pages, int page_size, td_dtype dtype, td_kv *out)
{
    for (int i = 0; i < n_groups; i++) {
        td_kv kv = {NULL, dtype, n_pages, page_size, desc[i].G, desc[i].D};
        size_t bytes = kvmem_bytes(&desc[i], &kv);
        void *m = NULL;
        td_status s = !bytes ? TD_OK : dev ? device_pages(dev, bytes, &m) : map_pages(bytes, &m);
        if (s < 0) {
            td_kvmem_close(dev, desc, i, out);
            return s;
        }
        kv.base = m;
        out[i] = kv;
    }
    return TD_OK;
}

void td_kvmem_close(td_dev *dev, const td_group_desc *desc, int n_groups, td_kv *kv)
{
    for (int i = 0; i < n_groups; i++) {
        if (kv[i].base && dev) td_devmem_free(dev, kv[i].base);
        else if (kv[i].base) munmap(kv[i].base, kvmem_bytes(&desc[i], &kv[i]));
        kv[i].base = NULL;
    }
}

static td_status group_open(td_kvpool *p, int i)
{
    group *g = &p->g[i];
    g->desc = p->o.group[i];
    TD_TRY(td_kvmem_open(p->o.dev, &g->desc, 1, p->o.n_pages, p->o.page_size, p->o.kv_dtype, &g->kv));
    g->page = td_xalloc((size_t)p->o.n_pages * sizeof *g->page);
    g->free_list = td_xalloc((size_t)p->o.n_pages * sizeof *g->free_list);
    for (int k = 0; k < p->o.n_pages; k++) {
        g->page[k].node = -1;
        g->free_list[k] = p->o.n_pages - 1 - k;
    }
    g->n_free = p->o.n_pages;
    g->count[FREE] = p->o.n_pages;
    return TD_OK;
}

td_status td_kvpool_open(const td_kvpool_opts *o, td_kvpool **out)
{
    TD_CHECK(o->n_groups >= 1 && o->n_groups <= TD_MAX_GROUPS && o->page_size >= 1 && o->n_pages >= 1 &&
             o->max_seqs >= 1 && o->copy);
    if (o->page_size > TD_BLOCK_TOKENS ? o->page_size % TD_BLOCK_TOKENS : TD_BLOCK_TOKENS % o->page_size)
        return td_fail(TD_EBADREQ, "page size %d neither divides nor is a multiple of %d", o->page_size,
                       TD_BLOCK_TOKENS);
    td_kvpool *p = td_xalloc(sizeof *p);
    p->o = *o;
    p->unit = TD_MAX(o->page_size, (int)TD_BLOCK_TOKENS);
    if (o->kvmap.ranks > 1) p->unit = (int)(o->kvmap.split * o->kvmap.ranks); /* a stripe: its pages hold nothing else */
    p->pages_per_unit = pages_for(p, (uint32_t)p->unit);
    p->newest = p->oldest = -1;
    td_status s = TD_OK;
    for (int i = 0; i < o->n_groups && s == TD_OK; i++) s = group_open(p, i);
    p->n_nodes = TD_MAX(1, o->n_pages / p->pages_per_unit);
    p->node = td_xalloc((size_t)p->n_nodes * sizeof *p->node);
    p->node_tokens = td_xalloc((size_t)p->n_nodes * (size_t)p->unit * sizeof *p->node_tokens);
    p->node_pages = td_xalloc((size_t)p->n_nodes * (size_t)o->n_groups * (size_t)p->pages_per_unit *
                              sizeof *p->node_pages);
    p->free_node = td_xalloc((size_t)p->n_nodes * sizeof *p->free_node);
    for (int i = 0; i < p->n_nodes; i++) p->free_node[p->n_free_node++] = p->n_nodes - 1 - i;
    td_map_init(&p->by_hash, (size_t)p->n_nodes + 1);
    int units = o->max_pages_per_seq / p->pages_per_unit + 1;
    p->slot_ints = (size_t)o->n_groups * (size_t)o->max_pages_per_seq + (size_t)units;
    p->slab = td_xalloc((size_t)o->max_seqs * p->slot_ints * sizeof *p->slab);
    p->free_slot = td_xalloc((size_t)o->max_seqs * sizeof *p->free_slot);
    for (int i = 0; i < o->max_seqs; i++) p->free_slot[p->n_free_slot++] = o->max_seqs - 1 - i;
    if (s < 0) {
        td_kvpool_close(p);
        return s;
    }
    *out = p;
    return TD_OK;
}

void td_kvpool_close(td_kvpool *p)
{
    if (!p) return;
    for (int i = 0; i < p->o.n_groups; i++) {
        td_kvmem_close(p->o.dev, &p->g[i].desc, 1, &p->g[i].kv);
        free(p->g[i].page);
        free(p->g[i].free_list);
    }
    td_map_deinit(&p->by_hash);
    free(p->node);
    free(p->node_tokens);
    free(p->node_pages);
    free(p->free_node);
    free(p->slab);
    free(p->free_slot);
    free(p);
}

const td_kv *td_kvpool_kv(const td_kvpool *p, int g)
{
    return &p->g[g].kv;
}
int td_kvpool_unit(const td_kvpool *p)
{
    return p->unit;
}
uint64_t td_kvpool_evictions(const td_kvpool *p)
{
    return p->evictions;
}
uint64_t td_kvpool_changes(const td_kvpool *p)
{
    return p->changes;
}

int64_t td_kvpool_available(const td_kvpool *p)
{
    int64_t least = INT64_MAX;
    for (int i = 0; i < p->o.n_groups; i++) least = TD_MIN(least, p->g[i].n_free + p->g[i].idle);
    return least;
}

/* ---- pages ---- */

static page_class class_of(const page *x)
{
    if (!x->refs) return x->node >= 0 ? CACHED : FREE;
    if (x->transit) return TRANSIT;
    return x->refs == 1 && x->node < 0 ? PRIVATE : SHARED;
}

/* The one place where a page changes: its class is counted anew. */
static void page_set(td_kvpool *p, int g, int32_t k, int refs, bool transit, int32_t of)
{
    page *x = &p->g[g].page[k];
    p->g[g].count[class_of(x)]--;
    *x = (page){(uint16_t)refs, transit, of};
    p->g[g].count[class_of(x)]++;
}

/* ---- nodes ---- */

/* Pages of node n that are there, taken as idle or not. */
static void idle_add(td_kvpool *p, int n, int sign)
{
    for (int g = 0; g < p->o.n_groups; g++)
        for (int j = 0; j < p->pages_per_unit; j++)
            if (pages_of(p, n, g)[j] >= 0) p->g[g].idle += sign;
}

static void lru_remove(td_kvpool *p, int n)
{
    idle_add(p, n, -1);
    node *x = &p->node[n];
    if (x->newer >= 0)
        p->node[x->newer].older = x->older;
    else
        p->newest = x->older;
    if (x->older >= 0)
        p->node[x->older].newer = x->newer;
    else
        p->oldest = x->newer;
    p->n_lru--;
}

static void lru_push(td_kvpool *p, int n)
{
    node *x = &p->node[n];
    x->newer = -1;
    x->older = p->newest;
    if (p->newest >= 0)
        p->node[p->newest].newer = n;
    else
        p->oldest = n;
    p->newest = n;
    p->n_lru++;
    idle_add(p, n, 1);
}

static void node_use(td_kvpool *p, int n)
{
    if (p->node[n].uses++ == 0) lru_remove(p, n);
}

static void node_unuse(td_kvpool *p, int n)
{
    TD_ASSERT(p->node[n].uses > 0);
    if (--p->node[n].uses) return;
    lru_push(p, n);
    p->changes++;
}

static void page_free(td_kvpool *p, int g, int32_t k)
{
    p->g[g].free_list[p->g[g].n_free++] = k;
    p->changes++;
}

static void node_evict(td_kvpool *p, int n)
{
    node *x = &p->node[n];
    TD_CHECK(x->uses == 0 && x->n_children == 0);
    lru_remove(p, n);
    for (int g = 0; g < p->o.n_groups; g++)
        for (int j = 0; j < p->pages_per_unit; j++) {
            int32_t k = pages_of(p, n, g)[j];
            if (k < 0) continue;
            TD_ASSERT(p->g[g].page[k].refs == 0);
            page_set(p, g, k, 0, false, -1);
            page_free(p, g, k);
        }
    if (x->parent >= 0) p->node[x->parent].n_children--;
    td_map_del(&p->by_hash, x->hash.lo);
    x->live = false;
    p->free_node[p->n_free_node++] = n;
    p->evictions++;
}

/* The node of this name, if its tokens, its parent and its root are the same too: names may collide, across
 * tenants as well. */
static int node_find(const td_kvpool *p, td_h128 hash, td_h128 before, int parent, const uint32_t *tokens)
{
    uint64_t v;
    if (!td_map_get(&p->by_hash, hash.lo, &v)) return -1;
    const node *x = &p->node[v];
    if (x->hash.hi != hash.hi || x->parent != parent || x->before.lo != before.lo ||
        x->before.hi != before.hi)
        return -1;
    return memcmp(tokens_of(p, (int)v), tokens, (size_t)p->unit * sizeof *tokens) ? -1 : (int)v;
}

static td_h128 next_hash(const td_kvpool *p, td_h128 h, const uint32_t *tokens)
{
    for (int i = 0; i < p->unit; i += TD_BLOCK_TOKENS) h = td_blockhash_next(p->o.hash_key, h, tokens + i);
    return h;
}

/* ---- sequences ---- */

td_status td_kvseq_begin(td_kvpool *p, td_kvseq *s, td_h128 root)
{
    if (!p->n_free_slot)
        return td_refuse(TD_EFULL, "all %d sequences of the KV pool are in use", p->o.max_seqs);
    *s = (td_kvseq){.hash = root, .is_open = true, .slot = p->free_slot[--p->n_free_slot]};
    int32_t *at = p->slab + (size_t)s->slot * p->slot_ints;
    for (int g = 0; g < p->o.n_groups; g++, at += p->o.max_pages_per_seq) s->pages[g] = at;
    s->node = at;
    return TD_OK;
}

static void page_hold(td_kvpool *p, int g, int32_t k)
{
    const page *x = &p->g[g].page[k];
    TD_ASSERT(x->refs < UINT16_MAX);
    page_set(p, g, k, x->refs + 1, x->transit, x->node);
}

static void page_drop(td_kvpool *p, int g, int32_t k)
{
    const page *x = &p->g[g].page[k];
    TD_CHECK(x->refs > 0);
    page_set(p, g, k, x->refs - 1, x->transit && x->refs > 1, x->node);
    if (!x->refs && x->node < 0) page_free(p, g, k);
}

/* Whether the row at position n finds all it sees on a path whose last absent pages end at absent[g]. */
static bool sees_all(const td_kvpool *p, const int absent[TD_MAX_GROUPS], uint32_t n)
{
    for (int g = 0; g < p->o.n_groups; g++) {
        uint32_t W = (uint32_t)p->g[g].desc.window, first_seen = W && n >= W ? n - W + 1 : 0;
        if ((uint32_t)absent[g] * (uint32_t)p->o.page_size > first_seen) return false;
    }
    return true;
}

static uint32_t match(const td_kvpool *p, td_h128 root, const uint32_t *tokens, uint32_t n, int32_t *path,
                      td_h128 *end)
{
    int count = 0, best = 0, parent = -1, absent[TD_MAX_GROUPS] = {0};
    td_h128 h = root;
    if (end) *end = root;
    if (!p->o.prefix_cache) n = 0;
    for (uint32_t at = 0; at + (uint32_t)p->unit < n;
         at += (uint32_t)p->unit) { /* < : one token is left to compute */
        td_h128 next = next_hash(p, h, tokens + at);
        int k = node_find(p, next, h, parent, tokens + at);
        if (k < 0) break;
        for (int g = 0; g < p->o.n_groups; g++)
            for (int j = 0; j < p->pages_per_unit; j++)
                if (pages_of(p, k, g)[j] < 0) absent[g] = count * p->pages_per_unit + j + 1;
        if (path) path[count] = k;
        count++;
        parent = k;
        h = next;
        if (!sees_all(p, absent, at + (uint32_t)p->unit)) continue;
        best = count;
        if (end) *end = h;
    }
    return (uint32_t)best;
}

uint32_t td_kvpool_peek(const td_kvpool *p, td_h128 root, const uint32_t *tokens, uint32_t n)
{
    return match(p, root, tokens, n, NULL, NULL) * (uint32_t)p->unit;
}

uint32_t td_kvseq_match(td_kvpool *p, td_kvseq *s, const uint32_t *tokens, uint32_t n)
{
    TD_ASSERT(s->n_pages == 0 && s->n_nodes == 0);
    uint32_t room = (uint32_t)p->o.max_pages_per_seq * (uint32_t)p->o.page_size;
    if (p->o.kvmap.ranks > 1) room *= p->o.kvmap.ranks;
    s->n_nodes = (int)match(p, s->hash, tokens, TD_MIN(n, room), s->node, &s->hash);
    for (int i = 0; i < s->n_nodes; i++) {
        node_use(p, s->node[i]);
        for (int j = 0; j < p->pages_per_unit; j++, s->n_pages++)
            for (int g = 0; g < p->o.n_groups; g++) {
                int32_t k = s->pages[g][s->n_pages] = pages_of(p, s->node[i], g)[j];
                if (k >= 0) page_hold(p, g, k);
            }
    }
    return (uint32_t)(s->n_nodes * p->unit);
}

static int32_t page_take(td_kvpool *p, int g)
{
    while (!p->g[g].n_free && p->oldest >= 0) node_evict(p, p->oldest);
    TD_CHECK(p->g[g].n_free > 0); /* ensure has counted */
    return p->g[g].free_list[--p->g[g].n_free];
}

td_status td_kvseq_ensure(td_kvpool *p, td_kvseq *s, uint32_t n_tokens)
{
    int want = pages_for(p, n_tokens);
    if (want > p->o.max_pages_per_seq)
        return td_refuse(TD_EFULL, "%u tokens are beyond a sequence's %d pages", n_tokens,
                         p->o.max_pages_per_seq);
    if (want - s->n_pages > td_kvpool_available(p))
        return td_refuse(TD_EFULL, "%d KV pages wanted, %lld available", want - s->n_pages,
                         (long long)td_kvpool_available(p));
    for (; s->n_pages < want; s->n_pages++)
        for (int g = 0; g < p->o.n_groups; g++) {
            int32_t k = page_take(p, g);
            page_set(p, g, k, 1, s->in_transit, -1);
            s->pages[g][s->n_pages] = k;
        }
    return TD_OK;
}

td_status td_kvseq_writable(td_kvpool *p, td_kvseq *s, uint32_t position)
{
    int at = page_at(p, position);
    TD_ASSERT(at < s->n_pages);
    bool shared = false;
    for (int g = 0; g < p->o.n_groups; g++) {
        int32_t k = s->pages[g][at];
        shared |= k >= 0 && (p->g[g].page[k].refs > 1 || p->g[g].page[k].node >= 0);
    }
    if (!shared) return TD_OK;
    if (td_kvpool_available(p) < 1) return td_refuse(TD_EFULL, "no KV page for a copy");
    for (int g = 0; g < p->o.n_groups; g++) {
        int32_t from = s->pages[g][at];
        if (from < 0) continue;
        int32_t to = page_take(p, g);
        p->o.copy(p->o.copy_arg, g, from, to);
        page_set(p, g, to, 1, false, -1);
        page_drop(p, g, from);
        s->pages[g][at] = to;
    }
    return TD_OK;
}

void td_kvseq_landed(td_kvpool *p, td_kvseq *s, uint32_t hit, uint32_t n)
{
    s->in_transit = false;
    for (int g = 0; g < p->o.n_groups; g++) {
        uint32_t W = (uint32_t)p->g[g].desc.window;
        if (W && n >= W && n - W + 1 > hit)
            s->hole[g] = (int)((n - W + (uint32_t)p->o.page_size) / (uint32_t)p->o.page_size);
        for (int j = 0; j < s->n_pages; j++) {
            int32_t k = s->pages[g][j];
            if (k >= 0) page_set(p, g, k, p->g[g].page[k].refs, false, p->g[g].page[k].node);
        }
    }
}

/* May this page become a node's: here, in none yet, nothing still arriving, and no sequence beside this one
 * holds it: one that goes on differently would keep it when the node is evicted (a fork inside a block, with
 * pages smaller than it). */
static bool page_whole(const td_kvpool *p, const td_kvseq *s, int g, int j)
{
    int32_t k = s->pages[g][j];
    if (k < 0 || j < s->hole[g]) return false;
    const page *x = &p->g[g].page[k];
    return x->node < 0 && !x->transit && x->refs == 1;
}

/* A page in the hole is absent from the node; every other one must be whole. */
static bool unit_whole(const td_kvpool *p, const td_kvseq *s, int first)
{
    for (int g = 0; g < p->o.n_groups; g++)
        for (int j = first; j < first + p->pages_per_unit; j++)
            if (j >= s->hole[g] && !page_whole(p, s, g, j)) return false;
    return true;
}

/* A node's absent pages from a sequence that has them. */
static void node_fill(td_kvpool *p, const td_kvseq *s, int n)
{
    int first = s->n_nodes * p->pages_per_unit;
    for (int g = 0; g < p->o.n_groups; g++)
        for (int j = 0; j < p->pages_per_unit; j++) {
            if (pages_of(p, n, g)[j] >= 0 || !page_whole(p, s, g, first + j)) continue;
            int32_t k = pages_of(p, n, g)[j] = s->pages[g][first + j];
            page_set(p, g, k, p->g[g].page[k].refs, false, n);
            p->changes++;
        }
}

uint32_t td_kvseq_unpublished(const td_kvpool *p, const td_kvseq *s, uint32_t n)
{
    uint32_t from = (uint32_t)(s->n_nodes * p->unit);
    return p->o.prefix_cache && !s->no_publish && from + (uint32_t)p->unit <= n ? from : UINT32_MAX;
}

static int node_make(td_kvpool *p, const td_kvseq *s, td_h128 hash, int parent, const uint32_t *tokens)
{
    int first = s->n_nodes * p->pages_per_unit;
    uint64_t other;
    /* A node of another text under the same 64 bits, pages of another node, or no node left: this path ends
     * here. */
    if (td_map_get(&p->by_hash, hash.lo, &other) || !unit_whole(p, s, first)) return -1;
    if (!p->n_free_node && p->oldest >= 0) node_evict(p, p->oldest); /* nodes that lack pages outnumber them */
    if (!p->n_free_node) return -1;
    int k = p->free_node[--p->n_free_node];
    p->node[k] = (node){
        .hash = hash, .before = s->hash, .parent = parent, .uses = 1, .newer = -1, .older = -1, .live = true};
    memcpy(tokens_of(p, k), tokens, (size_t)p->unit * sizeof *tokens);
    for (int g = 0; g < p->o.n_groups; g++)
        for (int j = 0; j < p->pages_per_unit; j++) {
            int32_t at = pages_of(p, k, g)[j] = first + j < s->hole[g] ? -1 : s->pages[g][first + j];
            if (at >= 0) page_set(p, g, at, p->g[g].page[at].refs, false, k);
        }
    if (parent >= 0) p->node[parent].n_children++;
    td_map_put(&p->by_hash, hash.lo, (uint64_t)k);
    p->changes++;
    return k;
}

void td_kvseq_publish_unit(td_kvpool *p, td_kvseq *s, const uint32_t *tokens)
{
    int parent = s->n_nodes ? s->node[s->n_nodes - 1] : -1;
    td_h128 h = next_hash(p, s->hash, tokens);
    int k = node_find(p, h, s->hash, parent, tokens);
    if (k >= 0) {
        node_use(p, k);
        node_fill(p, s, k);
    } else
        k = node_make(p, s, h, parent, tokens);
    if (k < 0) {
        s->no_publish = true;
        return;
    }
    s->node[s->n_nodes++] = k;
    s->hash = h;
}

void td_kvseq_publish(td_kvpool *p, td_kvseq *s, const uint32_t *tokens, uint32_t n)
{
    for (uint32_t at; (at = td_kvseq_unpublished(p, s, n)) != UINT32_MAX;)
        td_kvseq_publish_unit(p, s, tokens + at);
}

void td_kvseq_trim(td_kvpool *p, td_kvseq *s, uint32_t q_next)
{
    for (int g = 0; g < p->o.n_groups; g++) {
        uint32_t W = (uint32_t)p->g[g].desc.window, P = (uint32_t)p->o.page_size;
        if (!W || q_next < W) continue;
        uint32_t first_seen = q_next - W + 1; /* the oldest key that position q_next attends */
        for (int *j = &s->trimmed[g]; *j < s->n_pages && ((uint32_t)*j + 1) * P <= first_seen; ++*j) {
            /* pages not yet published stay until their unit is whole, unless they will not be in its node */
            if (p->o.prefix_cache && !s->no_publish && *j >= s->n_nodes * p->pages_per_unit &&
                *j >= s->hole[g])
                break;
            if (s->pages[g][*j] >= 0) page_drop(p, g, s->pages[g][*j]);
            s->pages[g][*j] = -1;
        }
    }
}

td_status td_kvseq_fork(td_kvpool *p, const td_kvseq *from, td_kvseq *to, uint32_t n_tokens)
{
    TD_TRY(td_kvseq_begin(p, to, from->hash));
    int n =
        TD_MIN(from->n_pages, pages_for(p, n_tokens));
    to->n_nodes = from->n_nodes;
    to->no_publish = from->no_publish;
    memcpy(to->trimmed, from->trimmed, sizeof to->trimmed);
    memcpy(to->hole, from->hole, sizeof to->hole);
    for (int i = 0; i < from->n_nodes; i++) node_use(p, to->node[i] = from->node[i]);
    for (int g = 0; g < p->o.n_groups; g++)
        for (int j = 0; j < n; j++) {
            int32_t k = to->pages[g][j] = from->pages[g][j];
            if (k >= 0) page_hold(p, g, k);
        }
    to->n_pages = n;
    return TD_OK;
}

void td_kvseq_release(td_kvpool *p, td_kvseq *s)
{
    if (!s->is_open) return;
    for (int g = 0; g < p->o.n_groups; g++)
        for (int j = 0; j < s->n_pages; j++)
            if (s->pages[g][j] >= 0) page_drop(p, g, s->pages[g][j]);
    for (int i = s->n_nodes - 1; i >= 0; i--)
        node_unuse(p, s->node[i]); /* tail first: the head is the most recent */
    p->free_slot[p->n_free_slot++] = s->slot;
    *s = (td_kvseq){0};
}

/* ---- checks ---- */

void td_kvpool_ledger(const td_kvpool *p, int g, td_kv_ledger *out)
{
    const int64_t *n = p->g[g].count;
    *out = (td_kv_ledger){p->o.n_pages, n[FREE], n[PRIVATE], n[SHARED], n[CACHED], n[TRANSIT]};
}

bool td_kvpool_balanced(const td_kvpool *p)
{
    for (int g = 0; g < p->o.n_groups; g++) {
        td_kv_ledger l;
        td_kvpool_ledger(p, g, &l);
        if (l.free + l.private_ + l.shared + l.cached + l.transit != l.total || l.free != p->g[g].n_free)
            return false;
    }
    return true;
}

static bool group_right(const td_kvpool *p, int g)
{
    const group *x = &p->g[g];
    int64_t n[N_CLASSES] = {0};
    for (int k = 0; k < p->o.n_pages; k++) n[class_of(&x->page[k])]++;
    if (memcmp(n, x->count, sizeof n)) return false;
    for (int i = 0; i < x->n_free; i++)
        if (class_of(&x->page[x->free_list[i]]) != FREE) return false;
    return true;
}

bool td_kvpool_check(const td_kvpool *p)
{
    for (int g = 0; g < p->o.n_groups; g++)
        if (!td_kvpool_balanced(p) || !group_right(p, g)) {
            td_kv_ledger l;
            td_kvpool_ledger(p, g, &l);
            td_refuse(TD_EPROTO,
                      "group %d: %lld free, %lld private, %lld shared, %lld cached, %lld in transit of %lld",
                      g, (long long)l.free, (long long)l.private_, (long long)l.shared, (long long)l.cached,
                      (long long)l.transit, (long long)l.total);
            return false;
        }
    int lru = 0;
    int64_t idle[TD_MAX_GROUPS] = {0};
    for (int n = 0; n < p->n_nodes; n++) {
        const node *x = &p->node[n];
        if (!x->live) continue;
        lru += x->uses == 0;
        if (x->parent >= 0 && (!p->node[x->parent].live || p->node[x->parent].uses < x->uses))
            return td_refuse(TD_EPROTO, "node %d is used more than its parent", n) == TD_OK;
        for (int g = 0; g < p->o.n_groups; g++)
            for (int j = 0; j < p->pages_per_unit; j++) {
                int32_t k = pages_of(p, n, g)[j];
                if (k < 0 && !p->g[g].desc.window)
                    return td_refuse(TD_EPROTO, "node %d lacks a page of full attention", n) == TD_OK;
                if (k < 0) continue;
                idle[g] += !x->uses;
                if (p->g[g].page[k].node != n)
                    return td_refuse(TD_EPROTO, "page %d does not know its node", k) == TD_OK;
                if (!x->uses && p->g[g].page[k].refs)
                    return td_refuse(TD_EPROTO, "page %d of an unused node is held", k) == TD_OK;
            }
    }
    for (int g = 0; g < p->o.n_groups; g++)
        if (idle[g] != p->g[g].idle)
            return td_refuse(TD_EPROTO, "group %d: %lld pages of unused nodes, %lld counted", g,
                             (long long)idle[g], (long long)p->g[g].idle) == TD_OK;
    if (lru != p->n_lru)
        return td_refuse(TD_EPROTO, "%d unused nodes, %d in the list", lru, p->n_lru) == TD_OK;
    return true;
}
