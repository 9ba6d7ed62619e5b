// SPDX-License-Identifier: Apache-2.0
#include "worker/mirror.h"
#include "common/buf.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "common/map.h"
#include "worker/ranks.h"
#include <stdlib.h>
#include <string.h>

/* UNTOLD: a command that rank 0 could not put together; the text says why. */
typedef enum { SEND_OPEN = 1, SEND_HIT, SEND_COMMIT, SEND_CANCEL, RECV_OPEN, RECV_CLOSE, UNTOLD } verb;

enum { MAX_COMMAND = 64 << 20 };

/* One command; what it does not use is 0. Texts, bytes and page tables follow. */
typedef struct command {
    uint32_t verb, number, n_tokens, tok0, tok1, hit, credits, n_first, abort_index;
    uint64_t key, epoch, incarnation;
    uint8_t public_key[32];
    uint32_t has_key, replica, text_bytes, ranks_bytes, n_pages[TD_MAX_GROUPS]; /* ranks_bytes: or COMMIT's payload */
} command;

struct td_mirror {
    td_ship *ship;
    const td_model_desc *desc;
    uint32_t rank, place, replica; /* in the worker; in its replica */
    int layer0, layer1;
    uint32_t n_heard;            /* commands */
    td_map sending;              /* key -> tokens that the other side has already */
};

/* ---- rank 0 ---- */

static bool put_together(td_buf *b, command *c, const char *text, const void *ranks,
                         const int32_t *const *pages, const uint32_t *n_pages)
{
    c->text_bytes = text ? (uint32_t)strlen(text) : 0;
    for (int g = 0; n_pages && g < TD_MAX_GROUPS; g++) c->n_pages[g] = pages[g] ? n_pages[g] : 0;
    td_buf_add(b, c, sizeof *c);
    for (int g = 0; n_pages && g < TD_MAX_GROUPS; g++)
        td_buf_add(b, pages[g], c->n_pages[g] * sizeof **pages);
    td_buf_add(b, ranks, c->ranks_bytes);
    td_buf_add(b, text, c->text_bytes);
    return td_buf_ok(b);
}

/* What does not get there has ended the worker (exec.h): nothing else is to be done here. */
static void tell(const td_mirror_key *k, command *c, const char *text, const void *ranks, const int32_t *const *pages,
                 const uint32_t *n_pages)
{
    static const char too_long[] = "a hand-off's command is too long";
    td_buf b;
    if (!td_engine_many(k->engine)) return;
    td_buf_init(&b, MAX_COMMAND);
    c->key = k->key;
    c->replica = k->replica;
    c->number = (*k->n_told)++;
    if (!put_together(&b, c, text, ranks, pages, n_pages)) {
        command none = {.verb = UNTOLD, .number = c->number, .key = c->key};
        td_buf_deinit(&b);
        td_buf_init(&b, MAX_COMMAND);
        (void)put_together(&b, &none, too_long, NULL, NULL, NULL);
    }
    if (td_engine_command(k->engine, b.p, b.len) < 0)
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
    if (!td_engine_many(k->engine)) return; /* nobody to write it for */
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

static td_status send_open(td_mirror *m, const command *c, const char *text, const void *ranks)
{
    td_msg_sink sink = {.endpoint = text, .epoch = c->epoch, .incarnation = c->incarnation, .hit_tokens = c->hit, .credits = c->credits,
                        .has_key = c->has_key, .ranks = ranks, .ranks_bytes = c->ranks_bytes};
    memcpy(sink.public_key, c->public_key, sizeof sink.public_key);
    if (!td_map_put(&m->sending, c->key, c->hit))
        return td_fail(TD_EFULL, "more hand-offs than rank 0 may have");
    td_ship_send_open(m->ship, c->key, &sink, c->n_tokens);
    return TD_OK;
}

/* First tokens leave from the first rank of a replica; what the others are told of them they leave out. */
static td_status send_commit(td_mirror *m, const command *c, const void *payload)
{
    td_arena a;
    td_commit commit = {0};
    td_arena_init(&a, 1 << 20);
    td_status s = td_commit_read(&a, payload, c->ranks_bytes, c->n_first, &commit);
    if (s == TD_OK) td_ship_send_commit(m->ship, c->key, &commit, td_now_us());
    td_arena_deinit(&a);
    return s;
}

static td_status carry_out(td_mirror *m, const command *c, const char *text, const void *bytes,
                           const int32_t *const pages[TD_MAX_GROUPS])
{
    switch ((verb)c->verb) {
    case SEND_OPEN:
        return send_open(m, c, text, bytes);
    case SEND_HIT:
        td_ship_send_layers(m->ship, c->key, m->layer0, m->layer1, c->tok0, c->tok1, pages, c->n_pages);
        break;
    case SEND_COMMIT:
        return send_commit(m, c, bytes);
    case SEND_CANCEL:
        td_ship_send_cancel(m->ship, c->key, c->abort_index, text);
        break;
    case RECV_OPEN:
        td_ship_recv_open(m->ship, c->key, c->hit, c->n_tokens, c->n_first, pages, c->n_pages);
        break;
    case RECV_CLOSE:
        td_ship_recv_close(m->ship, c->key);
        break;
    case UNTOLD:
        return td_fail(TD_EPROTO, "rank 0: %s", text);
    default:
        return td_fail(TD_EPROTO, "a hand-off's command of kind %u", c->verb);
    }
    return TD_OK;
}

/* The command, and the start of its page tables; EPROTO: not as it was sent. */
static td_status parse(td_mirror *m, const void *p, size_t n, command *c, const int32_t *pages[TD_MAX_GROUPS],
                       const char **rest)
{
    if (n < sizeof *c) return td_fail(TD_EPROTO, "a hand-off's command of %zu bytes", n);
    memcpy(c, p, sizeof *c);
    *rest = (const char *)p + sizeof *c;
    size_t want = sizeof *c + c->ranks_bytes + (size_t)c->text_bytes;
    for (int g = 0; g < TD_MAX_GROUPS; g++) {
        pages[g] = (const int32_t *)(const void *)*rest;
        *rest += c->n_pages[g] * sizeof **pages;
        want += c->n_pages[g] * sizeof **pages;
    }
    if (want != n) return td_fail(TD_EPROTO, "a hand-off's command of %zu bytes, not %zu", n, want);
    if (c->number != m->n_heard)
        return td_fail(TD_EPROTO, "a hand-off's command %u comes where %u was due", c->number, m->n_heard);
    m->n_heard++;
    return TD_OK;
}

td_status td_mirror_on_command(void *arg, const void *p, size_t n)
{
    td_mirror *m = arg;
    command c;
    const int32_t *pages[TD_MAX_GROUPS];
    const char *rest = NULL;
    TD_TRY(parse(m, p, n, &c, pages, &rest));
    if (c.replica != m->replica && c.verb != UNTOLD) return TD_OK;
    char *text = strndup(rest + c.ranks_bytes, c.text_bytes);
    td_status s = carry_out(m, &c, text, rest, pages);
    free(text);
    td_ship_flush(m->ship);
    return s;
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

td_status td_mirror_take(td_ship *ship, const void *p, size_t n)
{
    const char *at = p, *end = at + n;
    for (td_ship_report r; at < end; at += r.commit_bytes) {
        size_t left = (size_t)(end - at);
        if (left >= sizeof r) memcpy(&r, at, sizeof r);
        if (left < sizeof r || left - sizeof r < r.commit_bytes)
            return td_fail(TD_EPROTO, "a report of %zu bytes", left);
        at += sizeof r;
        td_ship_peer(ship, &r, at);
    }
    return TD_OK;
}
