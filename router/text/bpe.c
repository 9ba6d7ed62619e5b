// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "common/hash.h"
#include "common/map.h"
#include "router/text/bpe.h"
#include "router/text/unicode.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    DIRECT = 0x800,
    TOKEN_MAX = 4096,
    SHORT_WORD = 24,
    MEMO_SLOTS = 4096,
    MEMO_TEXT = 24,
    MEMO_IDS = 6,
    NONE = -1
};

typedef struct td_bpe_sym {
    uint32_t id;
    int32_t prev, next;
    uint32_t live;
} sym;
typedef struct td_bpe_cand {
    uint64_t key;
    uint32_t new_id;
} cand; /* key: rank << 32 | position */
typedef struct td_bpe_memo {
    uint32_t n, n_ids;
    char text[MEMO_TEXT];
    uint32_t id[MEMO_IDS];
} memo;

/* SentencePiece's stand-in for a space, U+2581. */
static const char MARK[] = "\xE2\x96\x81";
enum { MARK_N = 3 };

typedef struct span {
    uint32_t off, n;
} span;

struct td_bpe {
    char *blob; /* token texts */
    size_t blob_n, blob_cap;
    span *token; /* by id; n 0: no such id (the empty token is not a token) */
    uint32_t size;
    uint32_t *slot; /* hash of text -> id + 1 */
    size_t slots;
    td_map merge;           /* left id << 32 | right id -> rank << 32 | new id */
    int32_t direct[DIRECT]; /* code point -> id of its one-character token */
    int32_t byte[256];      /* <0xNN> */
    bool byte_fallback, fuse_unk, ignore_merges;
    bool cut_at_mark; /* no merge joins another character with a following MARK: words may be cut there */
    int64_t unk;
    char *prefix, *suffix; /* continuing_subword_prefix, end_of_word_suffix; "" if none */
};

/* ---- vocabulary ---- */

static uint64_t hash_text(const char *s, size_t n)
{
    uint64_t h = n * 0x9E3779B97F4A7C15u, w;
    for (; n >= 8; n -= 8, s += 8) {
        memcpy(&w, s, 8);
        h = (h ^ w) * 0xFF51AFD7ED558CCDu;
        h ^= h >> 32;
    }
    w = 0;
    memcpy(&w, s, n);
    return td_mix64(h ^ w);
}

int64_t td_bpe_find(const td_bpe *b, const char *s, size_t n)
{
    if (!n || !b->slots) return NONE;
    for (size_t i = (size_t)hash_text(s, n) & (b->slots - 1); b->slot[i]; i = (i + 1) & (b->slots - 1)) {
        span t = b->token[b->slot[i] - 1];
        if (t.n == n && !memcmp(b->blob + t.off, s, n)) return b->slot[i] - 1;
    }
    return NONE;
}

const char *td_bpe_token(const td_bpe *b, uint32_t id, size_t *n)
{
    if (id >= b->size || !b->token[id].n) return NULL;
    *n = b->token[id].n;
    return b->blob + b->token[id].off;
}

uint32_t td_bpe_size(const td_bpe *b) { return b->size; }

static td_status check_vocab(const td_json *vocab, const char *file, uint32_t *size, size_t *bytes)
{
    *size = 0;
    *bytes = 0;
    if (!vocab || vocab->type != TD_JSON_OBJ) return td_fail(TD_EPROTO, "%s: vocab is no object", file);
    for (const td_json *m = vocab->child; m; m = m->next) {
        if (m->type != TD_JSON_INT || m->i < 0 || m->i >= TD_BPE_MAX_ID)
            return td_fail(TD_EPROTO, "%s: vocab: id of \"%.40s\" is not in [0, %d)", file, m->key,
                           TD_BPE_MAX_ID);
        if (m->key_len > TOKEN_MAX)
            return td_fail(TD_ENOSUP, "%s: vocab: token of %u bytes, limit %d", file, m->key_len, TOKEN_MAX);
        if ((uint32_t)m->i >= *size) *size = (uint32_t)m->i + 1;
        *bytes += m->key_len;
    }
    return TD_OK;
}

static td_status fill_vocab(td_bpe *b, const td_json *vocab, const char *file)
{
    size_t bytes;
    TD_TRY(check_vocab(vocab, file, &b->size, &bytes));
    b->blob = td_xalloc(bytes + 1);
    b->token = td_xalloc(b->size * sizeof(span) + 1);
    for (b->slots = 16; b->slots < 2 * (size_t)vocab->n;) b->slots *= 2;
    b->slot = td_xalloc(b->slots * sizeof b->slot[0]);
    for (const td_json *m = vocab->child; m; m = m->next) {
        uint32_t id = (uint32_t)m->i;
        if (!m->key_len) continue;
        if (b->token[id].n) return td_fail(TD_EPROTO, "%s: vocab: id %u has two tokens", file, id);
        b->token[id] = (span){(uint32_t)b->blob_n, m->key_len};
        memcpy(b->blob + b->blob_n, m->key, m->key_len);
        b->blob_n += m->key_len;
        size_t i = (size_t)hash_text(m->key, m->key_len) & (b->slots - 1);
        while (b->slot[i]) i = (i + 1) & (b->slots - 1);
        b->slot[i] = id + 1;
    }
    for (uint32_t cp = 0; cp < DIRECT; cp++) {
        char t[4];
        b->direct[cp] = (int32_t)td_bpe_find(b, t, (size_t)td_utf8_put(t, cp));
    }
    for (int i = 0; i < 256; i++) {
        char t[8];
        snprintf(t, sizeof t, "<0x%02X>", i);
        b->byte[i] = (int32_t)td_bpe_find(b, t, 6);
    }
    return TD_OK;
}

/* ---- merges ---- */

static td_status add_merge(td_bpe *b, const char *file, uint32_t rank, const char *l, size_t ln,
                           const char *r, size_t rn)
{
    char t[2 * TOKEN_MAX];
    size_t skip = strlen(b->prefix);
    int64_t li = td_bpe_find(b, l, ln), ri = td_bpe_find(b, r, rn), ni = NONE;
    if (li >= 0 && ri >= 0 && rn >= skip) {
        memcpy(t, l, ln);
        memcpy(t + ln, r + skip, rn - skip);
        ni = td_bpe_find(b, t, ln + rn - skip);
    }
    if (ni < 0)
        return td_fail(TD_EPROTO, "%s: merges: rank %u \"%.*s %.*s\" has no token in the vocabulary", file,
                       rank, (int)TD_MIN(ln, 40u), l, (int)TD_MIN(rn, 40u), r);
    bool after_mark = ln >= MARK_N && !memcmp(l + ln - MARK_N, MARK, MARK_N);
    if (rn >= MARK_N && !memcmp(r, MARK, MARK_N) && !after_mark) b->cut_at_mark = false;
    if (!td_map_put(&b->merge, (uint64_t)li << 32 | (uint64_t)ri, (uint64_t)rank << 32 | (uint64_t)ni))
        return td_fail(TD_ENOSUP, "%s: more than %d merges", file, TD_BPE_MAX_MERGES);
    return TD_OK;
}

static td_status add_merge_line(td_bpe *b, const char *file, uint32_t rank, const char *s, size_t n)
{
    const char *sp = memchr(s, ' ', n);
    if (!sp || memchr(sp + 1, ' ', (size_t)(s + n - sp - 1)))
        return td_fail(TD_EPROTO, "%s: merges: rank %u \"%.*s\" is not two tokens", file, rank,
                       (int)TD_MIN(n, 80u), s);
    return add_merge(b, file, rank, s, (size_t)(sp - s), sp + 1, (size_t)(s + n - sp - 1));
}

static td_status fill_merges(td_bpe *b, const td_json *merges, const char *file)
{
    uint32_t rank = 0;
    if (!merges || merges->type != TD_JSON_ARR)
        return td_fail(TD_EPROTO, "%s: model.merges is no list", file);
    for (const td_json *m = merges->child; m; m = m->next, rank++) {
        if (m->type == TD_JSON_STR) {
            TD_TRY(add_merge_line(b, file, rank, m->s, m->n));
            continue;
        }
        const td_json *l = m->type == TD_JSON_ARR && m->n == 2 ? m->child : NULL;
        if (!l || l->type != TD_JSON_STR || l->next->type != TD_JSON_STR)
            return td_fail(TD_EPROTO, "%s: merges: rank %u is not two strings", file, rank);
        TD_TRY(add_merge(b, file, rank, l->s, l->n, l->next->s, l->next->n));
    }
    return TD_OK;
}

/* ---- opening ---- */

static td_bpe *new_bpe(void)
{
    td_bpe *b = td_xalloc(sizeof *b);
    td_map_init(&b->merge, TD_BPE_MAX_MERGES);
    b->unk = NONE;
    b->cut_at_mark = true;
    return b;
}

static td_status fill(td_bpe *b, const td_json *model, const char *file)
{
    const td_json *drop = td_json_get(model, "dropout");
    const char *type = td_json_str(model, "type", NULL), *unk = td_json_str(model, "unk_token", NULL);
    if (!type) { /* old files: the members tell */
        const td_json *v = td_json_get(model, "vocab");
        type = td_json_get(model, "merges") ? "BPE" : v && v->type == TD_JSON_ARR ? "Unigram" : "WordPiece";
    }
    if (strcmp(type, "BPE"))
        return td_fail(TD_ENOSUP, "%s: model type \"%.40s\" is not supported, only BPE", file, type);
    if (!td_json_is_null(drop) && td_json_num(model, "dropout", 1) > 0)
        return td_fail(TD_ENOSUP, "%s: model.dropout is not supported", file);
    b->prefix = td_xstrdup(td_json_str(model, "continuing_subword_prefix", ""));
    b->suffix = td_xstrdup(td_json_str(model, "end_of_word_suffix", ""));
    if (strlen(b->prefix) > 64 || strlen(b->suffix) > 64)
        return td_fail(TD_ENOSUP, "%s: model: subword prefix or suffix over 64 bytes", file);
    b->byte_fallback = td_json_bool(model, "byte_fallback", false);
    b->fuse_unk = td_json_bool(model, "fuse_unk", false);
    b->ignore_merges = td_json_bool(model, "ignore_merges", false);
    TD_TRY(fill_vocab(b, td_json_get(model, "vocab"), file));
    if (unk) {
        b->unk = td_bpe_find(b, unk, strlen(unk));
        if (b->unk < 0)
            return td_fail(TD_EPROTO, "%s: model.unk_token \"%.40s\" is not in the vocabulary", file, unk);
    }
    TD_TRY(fill_merges(b, td_json_get(model, "merges"), file));
    /* A known mark also ends a run of unknown characters; what looks at whole words forbids cutting them. */
    if (*b->prefix || *b->suffix || b->ignore_merges || td_bpe_find(b, MARK, MARK_N) < 0)
        b->cut_at_mark = false;
    return TD_OK;
}

td_status td_bpe_open(const td_json *model, const char *file, td_bpe **out)
{
    td_bpe *b = new_bpe();
    td_status st =
        model && model->type == TD_JSON_OBJ ? fill(b, model, file) : td_fail(TD_EPROTO, "%s: no model", file);
    if (st < 0) td_bpe_close(b);
    else *out = b;
    return st;
}

static td_status fill_files(td_bpe *b, const td_json *vocab, const char *p, size_t n)
{
    uint32_t rank = 0;
    b->cut_at_mark = false; /* byte level: there is no such token */
    b->prefix = td_xstrdup("");
    b->suffix = td_xstrdup("");
    TD_TRY(fill_vocab(b, vocab, "vocab.json"));
    for (size_t i = 0; i < n;) {
        const char *nl = memchr(p + i, '\n', n - i);
        size_t e = nl ? (size_t)(nl - p) : n, k = e - i;
        if (k && p[e - 1] == '\r') k--;
        if (k && !(k > 8 && !memcmp(p + i, "#version", 8)))
            TD_TRY(add_merge_line(b, "merges.txt", rank++, p + i, k));
        i = e + 1;
    }
    return TD_OK;
}

td_status td_bpe_open_files(const td_json *vocab, const char *merges, size_t n, td_bpe **out)
{
    td_bpe *b = new_bpe();
    td_status st = fill_files(b, vocab, merges, n);
    if (st < 0) td_bpe_close(b);
    else *out = b;
    return st;
}

void td_bpe_close(td_bpe *b)
{
    if (!b) return;
    td_map_deinit(&b->merge);
    free(b->blob);
    free(b->token);
    free(b->slot);
    free(b->prefix);
    free(b->suffix);
    free(b);
}

/* ---- run ---- */

void td_bpe_memo_open(td_bpe_run *run)
{
    if (!run->memo) run->memo = td_xalloc(MEMO_SLOTS * sizeof(memo));
}

void td_bpe_run_deinit(td_bpe_run *run)
{
    free(run->ids);
    free(run->sym);
    free(run->heap);
    free(run->memo);
    *run = (td_bpe_run){0};
}

td_status td_bpe_push(td_bpe_run *run, uint32_t id)
{
    if (run->n >= run->max) return td_refuse(TD_EFULL, "more than %zu tokens", run->max);
    if (run->n == run->cap) {
        run->cap = TD_MAX(run->cap * 2, (size_t)256);
        run->ids = td_xrealloc(run->ids, run->cap * sizeof run->ids[0]);
    }
    run->ids[run->n++] = id;
    return TD_OK;
}

static void add_sym(td_bpe_run *run, int32_t *n, uint32_t id)
{
    if ((size_t)*n == run->sym_cap) {
        run->sym_cap = TD_MAX(run->sym_cap * 2, (size_t)64);
        run->sym = td_xrealloc(run->sym, run->sym_cap * sizeof(sym));
    }
    run->sym[*n] = (sym){id, *n - 1, *n + 1, 1};
    ++*n;
}

static int64_t char_id(const td_bpe *b, const char *p, size_t k, uint32_t cp, bool first, bool last)
{
    char t[4 + 2 * 64];
    size_t n = 0;
    bool prefix = !first && b->prefix[0], suffix = last && b->suffix[0];
    if (!prefix && !suffix) return cp < DIRECT ? b->direct[cp] : td_bpe_find(b, p, k);
    if (prefix) memcpy(t, b->prefix, n = strlen(b->prefix));
    memcpy(t + n, p, k);
    n += k;
    if (suffix) memcpy(t + n, b->suffix, strlen(b->suffix)), n += strlen(b->suffix);
    return td_bpe_find(b, t, n);
}

static bool add_bytes(const td_bpe *b, td_bpe_run *run, int32_t *n, const char *p, size_t k)
{
    for (size_t i = 0; i < k; i++)
        if (b->byte[(unsigned char)p[i]] < 0) return false;
    for (size_t i = 0; i < k; i++) add_sym(run, n, (uint32_t)b->byte[(unsigned char)p[i]]);
    return true;
}

/* One symbol a character. An unknown stretch is one unk with fuse_unk; it is written before the next known
 * character. */
static int32_t first_symbols(const td_bpe *b, td_bpe_run *run, const char *p, size_t n)
{
    int32_t count = 0;
    bool pending = false;
    uint32_t cp;
    for (size_t i = 0, k; i < n; i += k) {
        k = td_uc_next(p + i, n - i, &cp);
        int64_t id = char_id(b, p + i, k, cp, i == 0, i + k == n);
        if (id >= 0) {
            if (pending) add_sym(run, &count, (uint32_t)b->unk);
            pending = false;
            add_sym(run, &count, (uint32_t)id);
        } else if (!(b->byte_fallback && add_bytes(b, run, &count, p + i, k)) && b->unk >= 0) {
            if (pending && !b->fuse_unk) add_sym(run, &count, (uint32_t)b->unk);
            pending = true;
        }
    }
    if (pending) add_sym(run, &count, (uint32_t)b->unk);
    if (count) run->sym[count - 1].next = NONE;
    return count;
}

static inline bool pair(const td_bpe *b, uint32_t l, uint32_t r, uint64_t *v)
{
    return td_map_get(&b->merge, (uint64_t)l << 32 | r, v);
}

/* Few symbols: an array of the ranks of adjacent pairs, its minimum searched each time. */
static int32_t merge_short(const td_bpe *b, sym *s, int32_t n)
{
    uint64_t v[SHORT_WORD];
    for (int32_t i = 0; i + 1 < n; i++)
        if (!pair(b, s[i].id, s[i + 1].id, &v[i])) v[i] = UINT64_MAX;
    for (;;) {
        int32_t best = NONE;
        uint32_t rank = UINT32_MAX;
        for (int32_t i = 0; i + 1 < n; i++)
            if (v[i] != UINT64_MAX && (uint32_t)(v[i] >> 32) < rank) best = i, rank = (uint32_t)(v[i] >> 32);
        if (best < 0) return n;
        s[best].id = (uint32_t)v[best];
        n--;
        for (int32_t i = best + 1; i < n; i++) s[i].id = s[i + 1].id, v[i - 1] = v[i];
        /* v[best] held the pair that is gone; everything right of it moved left by one */
        if (best + 1 < n && !pair(b, s[best].id, s[best + 1].id, &v[best])) v[best] = UINT64_MAX;
        if (best > 0 && !pair(b, s[best - 1].id, s[best].id, &v[best - 1])) v[best - 1] = UINT64_MAX;
    }
}

static void heap_put(td_bpe_run *run, uint64_t value, int32_t pos)
{
    if (run->heap_n == run->heap_cap) {
        run->heap_cap = TD_MAX(run->heap_cap * 2, (size_t)64);
        run->heap = td_xrealloc(run->heap, run->heap_cap * sizeof(cand));
    }
    cand c = {(value & 0xFFFFFFFF00000000u) | (uint32_t)pos, (uint32_t)value};
    size_t i = run->heap_n++;
    for (; i && run->heap[(i - 1) / 2].key > c.key; i = (i - 1) / 2) run->heap[i] = run->heap[(i - 1) / 2];
    run->heap[i] = c;
}

static cand heap_take(td_bpe_run *run)
{
    cand top = run->heap[0], last = run->heap[--run->heap_n];
    size_t i = 0, n = run->heap_n;
    for (size_t k; (k = 2 * i + 1) < n; i = k) {
        if (k + 1 < n && run->heap[k + 1].key < run->heap[k].key) k++;
        if (run->heap[k].key >= last.key) break;
        run->heap[i] = run->heap[k];
    }
    run->heap[i] = last;
    return top;
}

static void offer(const td_bpe *b, td_bpe_run *run, int32_t left, int32_t right)
{
    uint64_t v;
    if (left >= 0 && right >= 0 && pair(b, run->sym[left].id, run->sym[right].id, &v)) heap_put(run, v, left);
}

static void merge_long(const td_bpe *b, td_bpe_run *run, int32_t n)
{
    sym *s = run->sym;
    run->heap_n = 0;
    for (int32_t i = 0; i + 1 < n; i++) offer(b, run, i, i + 1);
    while (run->heap_n) {
        cand c = heap_take(run);
        int32_t at = (int32_t)(uint32_t)c.key, right = s[at].next;
        uint64_t v;
        if (!s[at].live || right < 0) continue;
        if (!pair(b, s[at].id, s[right].id, &v) || (uint32_t)v != c.new_id) continue; /* stale */
        s[at].id = c.new_id;
        s[at].next = s[right].next;
        s[right].live = 0;
        if (s[at].next >= 0) s[s[at].next].prev = at;
        offer(b, run, s[at].prev, at);
        offer(b, run, at, s[at].next);
    }
}

static td_status encode_word(const td_bpe *b, td_bpe_run *run, const char *p, size_t n)
{
    if (b->ignore_merges) {
        int64_t id = td_bpe_find(b, p, n);
        if (id >= 0) return td_bpe_push(run, (uint32_t)id);
    }
    int32_t k = first_symbols(b, run, p, n);
    if (!k) return TD_OK;
    if (k <= SHORT_WORD) {
        k = merge_short(b, run->sym, k);
        for (int32_t i = 0; i < k; i++) TD_TRY(td_bpe_push(run, run->sym[i].id));
        return TD_OK;
    }
    merge_long(b, run, k);
    for (int32_t i = 0; i >= 0; i = run->sym[i].next) TD_TRY(td_bpe_push(run, run->sym[i].id));
    return TD_OK;
}

/* A word or a piece of one that no merge crosses, from the cache if it is short. */
static td_status encode_piece(const td_bpe *b, td_bpe_run *run, const char *p, size_t n)
{
    if (!run->memo || n > MEMO_TEXT) return encode_word(b, run, p, n);
    memo *m = &run->memo[hash_text(p, n) & (MEMO_SLOTS - 1)];
    if (m->n == n && !memcmp(m->text, p, n)) {
        for (uint32_t i = 0; i < m->n_ids; i++) TD_TRY(td_bpe_push(run, m->id[i]));
        return TD_OK;
    }
    size_t before = run->n;
    TD_TRY(encode_word(b, run, p, n));
    size_t k = run->n - before;
    if (k > MEMO_IDS) return TD_OK;
    m->n = (uint32_t)n;
    m->n_ids = (uint32_t)k;
    memcpy(m->text, p, n);
    memcpy(m->id, run->ids + before, k * sizeof m->id[0]);
    return TD_OK;
}

/* Where the piece that starts at p[0] ends: before the next mark that follows another character. */
static size_t piece_end(const char *p, size_t n)
{
    size_t i = 0;
    while (n - i >= MARK_N && !memcmp(p + i, MARK, MARK_N)) i += MARK_N;
    const char *next = i < n ? memmem(p + i, n - i, MARK, MARK_N) : NULL;
    return next ? (size_t)(next - p) : n;
}

td_status td_bpe_word(const td_bpe *b, td_bpe_run *run, const char *p, size_t n)
{
    if (n > INT32_MAX / 4) return td_refuse(TD_EFULL, "word of %zu bytes", n);
    if (!b->cut_at_mark) return encode_piece(b, run, p, n);
    for (size_t k; n; p += k, n -= k) {
        k = piece_end(p, n);
        TD_TRY(encode_piece(b, run, p, k));
    }
    return TD_OK;
}
