// SPDX-License-Identifier: Apache-2.0
#include "worker/mirror.h"
#include "common/buf.h"
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "common/map.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef enum { SEND_OPEN = 1, SEND_HIT, SEND_COMMIT, SEND_CANCEL, RECV_OPEN, RECV_CLOSE } verb;

/* One command; what it does not use is 0. Texts, bytes and page tables follow. */
typedef struct command {
    uint32_t verb, n_tokens, tok0, tok1, hit, credits, n_first, abort_index;
    uint64_t key, epoch, incarnation;
    uint8_t public_key[32];
    uint32_t has_key, text_bytes, ranks_bytes, n_pages[TD_MAX_GROUPS];
} command;

struct td_mirror {
    td_ship *ship;
    const td_model_desc *desc;
    int rank, layer0, layer1;
    td_map sending;              /* key -> tokens that the other side has already */
};

/* ---- rank 0 ---- */

static void tell(td_engine *e, command *c, const char *text, const void *ranks, const int32_t *const *pages, const uint32_t *n_pages)
{
    td_buf b;
    if (!td_engine_many(e)) return;
    td_buf_init(&b, 64u << 20);
    c->text_bytes = text ? (uint32_t)strlen(text) : 0;
    for (int g = 0; n_pages && g < TD_MAX_GROUPS; g++) c->n_pages[g] = pages[g] ? n_pages[g] : 0;
    td_buf_add(&b, c, sizeof *c);
    for (int g = 0; n_pages && g < TD_MAX_GROUPS; g++) td_buf_add(&b, pages[g], c->n_pages[g] * sizeof **pages);
    td_buf_add(&b, ranks, c->ranks_bytes);
    td_buf_add(&b, text, c->text_bytes);
    if (!td_buf_ok(&b) || td_engine_command(e, b.p, b.len) < 0) TD_ERROR("the other ranks cannot be told of a hand-off: %s", td_reason());
    td_buf_deinit(&b);
}

void td_mirror_send_open(td_engine *e, uint64_t key, const td_msg_sink *sink, uint32_t n_tokens)
{
    command c = {.verb = SEND_OPEN, .key = key, .n_tokens = n_tokens, .hit = sink->hit_tokens, .credits = sink->credits,
                 .epoch = sink->epoch, .incarnation = sink->incarnation, .has_key = sink->has_key, .ranks_bytes = sink->ranks_bytes};
    memcpy(c.public_key, sink->public_key, sizeof c.public_key);
    tell(e, &c, sink->endpoint, sink->ranks, NULL, NULL);
}

void td_mirror_send_hit(td_engine *e, uint64_t key, uint32_t tok0, uint32_t tok1, const int32_t *const pages[TD_MAX_GROUPS],
                        const uint32_t n_pages[TD_MAX_GROUPS])
{
    command c = {.verb = SEND_HIT, .key = key, .tok0 = tok0, .tok1 = tok1};
    tell(e, &c, NULL, NULL, pages, n_pages);
}

void td_mirror_send_commit(td_engine *e, uint64_t key)
{
    command c = {.verb = SEND_COMMIT, .key = key};
    tell(e, &c, NULL, NULL, NULL, NULL);
}

void td_mirror_send_cancel(td_engine *e, uint64_t key, uint32_t abort_index, const char *reason)
{
    command c = {.verb = SEND_CANCEL, .key = key, .abort_index = abort_index};
    tell(e, &c, reason, NULL, NULL, NULL);
}

void td_mirror_recv_open(td_engine *e, uint64_t key, uint32_t hit, uint32_t n_tokens, uint32_t n_first,
                         const int32_t *const pages[TD_MAX_GROUPS], const uint32_t n_pages[TD_MAX_GROUPS])
{
    command c = {.verb = RECV_OPEN, .key = key, .hit = hit, .n_tokens = n_tokens, .n_first = n_first};
    tell(e, &c, NULL, NULL, pages, n_pages);
}

void td_mirror_recv_close(td_engine *e, uint64_t key)
{
    command c = {.verb = RECV_CLOSE, .key = key};
    tell(e, &c, NULL, NULL, NULL, NULL);
}

/* ---- the other ranks ---- */

td_mirror *td_mirror_open(td_ship *ship, const td_model_desc *d, int rank, int layer0, int layer1, uint32_t max_keys)
{
    td_mirror *m = td_xalloc(sizeof *m);
    *m = (td_mirror){.ship = ship, .desc = d, .rank = rank, .layer0 = layer0, .layer1 = layer1};
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
    char *text = strndup(at + c.ranks_bytes, c.text_bytes);
    td_commit none = {0};
    switch ((verb)c.verb) {
    case SEND_OPEN: send_open(m, &c, text, at); break;
    case SEND_HIT: td_ship_send_layers(m->ship, c.key, m->layer0, m->layer1, c.tok0, c.tok1, pages, c.n_pages); break;
    case SEND_COMMIT: td_ship_send_commit(m->ship, c.key, &none, td_now_us()); break;
    case SEND_CANCEL: td_ship_send_cancel(m->ship, c.key, c.abort_index, text); break;
    case RECV_OPEN: td_ship_recv_open(m->ship, c.key, c.hit, c.n_tokens, c.n_first, pages, c.n_pages); break;
    case RECV_CLOSE: td_ship_recv_close(m->ship, c.key); break;
    }
    free(text);
    td_ship_flush(m->ship);
}

size_t td_mirror_on_poll(void *arg, void *out, size_t cap)
{
    td_mirror *m = arg;
    td_ship_event *e;
    size_t n = 0;
    td_ship_flush(m->ship);
    while (n + sizeof(td_ship_report) <= cap && (e = td_ship_poll(m->ship))) {
        td_ship_report r;
        td_ship_event_report(e, (uint32_t)m->rank, &r);
        td_map_del(&m->sending, e->key);
        memcpy((char *)out + n, &r, sizeof r);
        n += sizeof r;
        td_ship_event_free(e);
    }
    return n;
}

void td_mirror_take(td_ship *ship, const void *p, size_t n)
{
    for (size_t at = 0; at + sizeof(td_ship_report) <= n; at += sizeof(td_ship_report)) {
        td_ship_report r;
        memcpy(&r, (const char *)p + at, sizeof r);
        td_ship_peer(ship, &r);
    }
}
