// SPDX-License-Identifier: Apache-2.0
#include "worker/mirror.h"
#include "common/buf.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "common/map.h"
#include "worker/ranks.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef enum { SEND_OPEN = 1, SEND_HIT, SEND_COMMIT, SEND_CANCEL, RECV_OPEN, RECV_CLOSE } verb;

/* One command; what it does not use is 0. Texts, bytes and page tables follow. */
typedef struct command {
    uint32_t verb, n_tokens, tok0, tok1, hit, credits, n_first, abort_index;
    uint64_t key, epoch, incarnation;
    uint8_t public_key[32];
    uint32_t has_key, replica, text_bytes, ranks_bytes, n_pages[TD_MAX_GROUPS]; /* ranks_bytes: or COMMIT's payload */
} command;

struct td_mirror {
    td_ship *ship;
    const td_model_desc *desc;
    uint32_t rank, place, replica; /* in the worker; in its replica */
    int layer0, layer1;
    td_map sending;              /* key -> tokens that the other side has already */
};

/* ---- rank 0 ---- */

static void tell(const td_mirror_key *k, command *c, const char *text, const void *ranks, const int32_t *const *pages,
                 const uint32_t *n_pages)
{
    td_buf b;
    if (!td_engine_many(k->engine)) return;
    td_buf_init(&b, 64u << 20);
    c->key = k->key;
    c->replica = k->replica;
    c->text_bytes = text ? (uint32_t)strlen(text) : 0;
    for (int g = 0; n_pages && g < TD_MAX_GROUPS; g++) c->n_pages[g] = pages[g] ? n_pages[g] : 0;
    td_buf_add(&b, c, sizeof *c);
    for (int g = 0; n_pages && g < TD_MAX_GROUPS; g++) td_buf_add(&b, pages[g], c->n_pages[g] * sizeof **pages);
    td_buf_add(&b, ranks, c->ranks_bytes);
    td_buf_add(&b, text, c->text_bytes);
    if (!td_buf_ok(&b) || td_engine_command(k->engine, b.p, b.len) < 0)
        TD_ERROR("the other ranks cannot be told of a hand-off: %s", td_reason());
    td_buf_deinit(&b);
}

void td_mirror_send_open(const td_mirror_key *k, const td_msg_sink *sink, uint32_t n_tokens)
{
    command c = {.verb = SEND_OPEN, .n_tokens = n_tokens, .hit = sink->hit_tokens, .credits = sink->credits,
                 .epoch = sink->epoch, .incarnation = sink->incarnation, .has_key = sink->has_key, .ranks_bytes = sink->ranks_bytes};
    memcpy(c.public_key, sink->public_key, sizeof c.public_key);
    if (k->replica) td_ship_expect(k->ship, k->key, true, k->replica);
    else td_ship_send_open(k->ship, k->key, sink, n_tokens);
    tell(k, &c, sink->endpoint, sink->ranks, NULL, NULL);
}

void td_mirror_send_hit(const td_mirror_key *k, uint32_t tok0, uint32_t tok1,
                        const int32_t *const pages[TD_MAX_GROUPS], const uint32_t n_pages[TD_MAX_GROUPS])
{
    command c = {.verb = SEND_HIT, .tok0 = tok0, .tok1 = tok1};
    tell(k, &c, NULL, NULL, pages, n_pages);
}

void td_mirror_send_commit(const td_mirror_key *k, const td_commit *commit, int64_t prompt_end_us)
{
    td_buf payload;
    if (!k->replica) td_ship_send_commit(k->ship, k->key, commit, prompt_end_us);
    td_buf_init(&payload, 0);
    td_commit_write(&payload, commit);
    command c = {.verb = SEND_COMMIT, .n_first = commit->n_first, .ranks_bytes = (uint32_t)payload.len};
    tell(k, &c, NULL, payload.p, NULL, NULL);
    td_buf_deinit(&payload);
}

static void tell_cancel(const td_mirror_key *k, uint32_t abort_index, const char *reason)
{
    command c = {.verb = SEND_CANCEL, .abort_index = abort_index};
    tell(k, &c, reason, NULL, NULL, NULL);
}

void td_mirror_send_cancel(const td_mirror_key *k, uint32_t abort_index, const char *reason)
{
    if (k->replica) tell_cancel(k, abort_index, reason);
    else td_ship_send_cancel(k->ship, k->key, abort_index, reason);
}

void td_mirror_recv_open(const td_mirror_key *k, uint32_t hit, uint32_t n_tokens, uint32_t n_first,
                         const int32_t *const pages[TD_MAX_GROUPS], const uint32_t n_pages[TD_MAX_GROUPS])
{
    command c = {.verb = RECV_OPEN, .hit = hit, .n_tokens = n_tokens, .n_first = n_first};
    if (k->replica) td_ship_expect(k->ship, k->key, false, k->replica);
    else td_ship_recv_open(k->ship, k->key, hit, n_tokens, n_first, pages, n_pages);
    tell(k, &c, NULL, NULL, pages, n_pages);
}

static void tell_close(const td_mirror_key *k)
{
    command c = {.verb = RECV_CLOSE};
    tell(k, &c, NULL, NULL, NULL, NULL);
}

void td_mirror_recv_close(const td_mirror_key *k)
{
    if (k->replica) tell_close(k);
    else td_ship_recv_close(k->ship, k->key);
}

void td_mirror_recall(const td_mirror_key *k, const td_ship_event *recall)
{
    if (recall->sending) tell_cancel(k, recall->over ? 0 : 1, recall->reason);
    else tell_close(k);
}

/* ---- the other ranks ---- */

td_mirror *td_mirror_open(td_ship *ship, const td_model_desc *d, const td_ranks *r, uint32_t max_keys)
{
    const td_grid *g = &r->grid;
    td_mirror *m = td_xalloc(sizeof *m);
    *m = (td_mirror){.ship = ship, .desc = d, .rank = (uint32_t)g->rank,
                     .place = (uint32_t)(g->rank % (g->tp * g->cp * g->pp)),
                     .replica = (uint32_t)r->at.dp, .layer0 = g->layer0[r->at.pp], .layer1 = g->layer0[r->at.pp + 1]};
    td_map_init(&m->sending, max_keys);
    return m;
}

void td_mirror_close(td_mirror *m)
{
    if (!m) return;
    td_map_deinit(&m->sending);
    free(m);
}

void td_mirror_on_layer(void *arg, const td_step *step, int layer)
{
    td_mirror *m = arg;
    const td_step_seq *q = td_step_seqs(step);
    for (uint32_t i = 0; m->sending.n && i < step->n_seqs; i++, q++) {
        uint64_t hit;
        const int32_t *pages[TD_MAX_GROUPS] = {0};
        if (!td_map_get(&m->sending, q->key, &hit)) continue;
        uint32_t from = TD_MAX(q->pos0, (uint32_t)hit), to = q->pos0 + q->n_rows;
        if (from >= to) continue;
        for (int g = 0; g < m->desc->n_groups; g++) pages[g] = td_step_pages(step, q, g);
        td_ship_send_layers(m->ship, q->key, layer, layer + 1, from, to, pages, q->n_pages);
    }
}

static void send_open(td_mirror *m, const command *c, const char *text, const void *ranks)
{
    td_msg_sink sink = {.endpoint = text, .epoch = c->epoch, .incarnation = c->incarnation, .hit_tokens = c->hit, .credits = c->credits,
                        .has_key = c->has_key, .ranks = ranks, .ranks_bytes = c->ranks_bytes};
    memcpy(sink.public_key, c->public_key, sizeof sink.public_key);
    (void)td_map_put(&m->sending, c->key, c->hit);
    td_ship_send_open(m->ship, c->key, &sink, c->n_tokens);
}

/* First tokens leave from the first rank of a replica; what the others are told of them they leave out. */
static void send_commit(td_mirror *m, const command *c, const void *payload)
{
    td_arena a;
    td_commit commit = {0};
    td_arena_init(&a, 1 << 20);
    if (td_commit_read(&a, payload, c->ranks_bytes, c->n_first, &commit) != TD_OK)
        TD_ERROR("a COMMIT from rank 0: %s", td_reason());
    else td_ship_send_commit(m->ship, c->key, &commit, td_now_us());
    td_arena_deinit(&a);
}

void td_mirror_on_command(void *arg, const void *p, size_t n)
{
    td_mirror *m = arg;
    command c;
    const int32_t *pages[TD_MAX_GROUPS] = {0};
    if (n < sizeof c) return;
    memcpy(&c, p, sizeof c);
    const char *at = (const char *)p + sizeof c;
    size_t want = sizeof c + c.ranks_bytes + c.text_bytes;
    for (int g = 0; g < TD_MAX_GROUPS; g++) {
        pages[g] = (const int32_t *)(const void *)at;
        at += c.n_pages[g] * sizeof **pages;
        want += c.n_pages[g] * sizeof **pages;
    }
    if (want != n) {
        TD_ERROR("a command of %zu bytes, not %zu", n, want);
        return;
    }
    if (c.replica != m->replica) return;
    char *text = strndup(at + c.ranks_bytes, c.text_bytes);
    switch ((verb)c.verb) {
    case SEND_OPEN: send_open(m, &c, text, at); break;
    case SEND_HIT: td_ship_send_layers(m->ship, c.key, m->layer0, m->layer1, c.tok0, c.tok1, pages, c.n_pages); break;
    case SEND_COMMIT: send_commit(m, &c, at); break;
    case SEND_CANCEL: td_ship_send_cancel(m->ship, c.key, c.abort_index, text); break;
    case RECV_OPEN: td_ship_recv_open(m->ship, c.key, c.hit, c.n_tokens, c.n_first, pages, c.n_pages); break;
    case RECV_CLOSE: td_ship_recv_close(m->ship, c.key); break;
    }
    free(text);
    td_ship_flush(m->ship);
}

/* Its report, and of the first rank of a replica the COMMIT: rank 0 may not have had it. */
static void report(const td_mirror *m, const td_ship_event *e, td_buf *out)
{
    td_ship_report r;
    td_buf commit;
    td_buf_init(&commit, 0);
    td_ship_event_report(e, m->rank, &r);
    if (e->type == TD_SHIP_LANDED && !m->place) td_commit_write(&commit, &e->commit);
    r.n_first = e->commit.n_first;
    r.commit_bytes = (uint32_t)commit.len;
    td_buf_add(out, &r, sizeof r);
    td_buf_add(out, commit.p, commit.len);
    td_buf_deinit(&commit);
}

enum {
    MOST_REPORT = sizeof(td_ship_report) + sizeof(td_kvcommit) +
                  TD_MAX_CHOICES * (sizeof(td_kvfirst) + TD_MAX_TOP_LOGPROBS * sizeof(td_kvtop))
};
_Static_assert((int)MOST_REPORT <= (int)TD_EXEC_POLL_BYTES, "one report fits");

size_t td_mirror_on_poll(void *arg, void *out, size_t cap)
{
    td_mirror *m = arg;
    td_ship_event *e;
    td_buf b;
    td_buf_init(&b, cap);
    td_ship_flush(m->ship);
    while (b.len + MOST_REPORT <= cap && (e = td_ship_poll(m->ship))) {
        report(m, e, &b);
        td_map_del(&m->sending, e->key);
        td_ship_event_free(e);
    }
    size_t n = b.len;
    if (n) memcpy(out, b.p, n);
    td_buf_deinit(&b);
    return n;
}

void td_mirror_take(td_ship *ship, const void *p, size_t n)
{
    const char *at = p, *end = at + n;
    for (td_ship_report r; (size_t)(end - at) >= sizeof r; at += r.commit_bytes) {
        memcpy(&r, at, sizeof r);
        at += sizeof r;
        if ((size_t)(end - at) < r.commit_bytes) return;
        td_ship_peer(ship, &r, at);
    }
}
