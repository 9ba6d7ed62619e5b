// SPDX-License-Identifier: Apache-2.0
/* worker/ship/ship_in.c - the receiving half: frames into pages, answers, and what the engine is told. */
#include "common/check.h"
#include "common/clock.h"
#include "common/crc.h"
#include "common/log.h"
#include "worker/ship/codec.h"
#include "worker/ship/ship_int.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RECV_PER_TURN = 32, MAX_EARLY = 128, EARLY_US = 2000000 };
static const char BAD_DEVICE[] = "pages cannot be written to the device";
static const char BAD_FIRST[] = "COMMIT's first tokens are malformed";

static void receiving_free(receiving *r)
{
    for (int g = 0; g < TD_MAX_GROUPS; g++) free(r->pages[g]);
    free(r->peer);
    free(r);
}

static void drop_user(void *r)
{
    receiving_free(r);
}

static void answer(td_ship *s, td_part id, uint64_t epoch, uint64_t incarnation, uint16_t type,
                   uint32_t credits, const char *why)
{
    td_kvframe h;
    td_frame_init(&h, type, epoch, incarnation);
    h.dst_rank = (uint16_t)s->o.rank;
    h.index = credits;
    size_t n = why ? strlen(why) : 0;
    td_frame_seal(&h, why, n);
    td_part part[2] = {{&h, sizeof h}, {why, n}};
    if (td_sock_send(s->router, id.p, id.n, part, n ? 2 : 1) < 0)
        TD_DEBUG_LOG("an answer did not leave: the sender is gone");
}

/* Every source of an epoch that has ended should know at once, but for one that knows (or none: -1). */
static void tell(td_ship *s, const receiving *r, uint64_t epoch, const char *why, int but)
{
    for (uint32_t k = 0; k < r->n_peers; k++)
        if (r->peer[k].bytes && (int)k != but)
            answer(s, (td_part){r->peer[k].id, r->peer[k].bytes}, epoch, s->o.incarnation,
                   why ? TD_KVF_NACK : TD_KVF_ACK, 0, why);
}

/* Credits go back by the quarter of what a sender was told: a message a frame would wake four threads each
 * time. Nobody waits for the others: a sender whose frames were all read has more than three quarters. */
static void owe(td_ship *s, receiving *r, uint32_t rank, uint32_t credits)
{
    r->peer[rank].owed += credits;
    if (r->owes) return;
    r->owes = true;
    r->owed_next = s->owed;
    s->owed = r;
}

static void pay(td_ship *s, receiving *r)
{
    for (uint32_t k = 0; k < r->n_peers; k++) {
        if (!r->peer[k].owed || r->peer[k].owed < s->o.credits / 4) continue;
        answer(s, (td_part){r->peer[k].id, r->peer[k].bytes}, r->key, s->o.incarnation, TD_KVF_CREDIT,
               r->peer[k].owed, NULL);
        r->peer[k].owed = 0;
    }
}

static void pay_all(td_ship *s)
{
    for (receiving *r; (r = s->owed);) {
        s->owed = r->owed_next;
        r->owes = false;
        pay(s, r);
    }
}

/* It ends: what it owes goes nowhere. */
static void disown(td_ship *s, receiving *r)
{
    receiving **p = &s->owed;
    while (*p && *p != r) p = &(*p)->owed_next;
    if (*p) *p = r->owed_next;
}

static void remember(receiving *r, uint32_t rank, td_part id)
{
    if (rank >= TD_SHIP_MAX_RANKS || id.n > sizeof r->peer->id) return;
    if (rank >= r->n_peers) {
        r->peer = td_xrealloc(r->peer, (rank + 1) * sizeof *r->peer);
        memset(r->peer + r->n_peers, 0, (rank + 1 - r->n_peers) * sizeof *r->peer);
        r->n_peers = rank + 1;
    }
    memcpy(r->peer[rank].id, id.p, id.n);
    r->peer[rank].bytes = id.n;
}

/* The epoch is over: tell the engine, take it out of the table, tell the sources but one. A COMMIT that
 * cannot be read turns LANDED into FAILED. */
static void settle(td_ship *s, td_epoch *e, int64_t now, int but)
{
    receiving *r = e->user;
    uint64_t id = e->id;
    td_ship_event *ev = ship_event(TD_SHIP_LANDED, r->key);
    if (e->state == TD_EPOCH_LANDED && e->commit &&
        td_commit_read(&ev->arena, e->commit, e->commit_bytes, e->n_first, &ev->commit) != TD_OK) {
        e->state = TD_EPOCH_FAILED;
        e->why = BAD_FIRST;
    }
    if (td_stage_flush(&s->stage) < 0 && e->state == TD_EPOCH_LANDED) {
        e->state = TD_EPOCH_FAILED;
        e->why = BAD_DEVICE;
    }
    const char *why = e->state == TD_EPOCH_LANDED ? NULL : e->why ? e->why : "failed";
    ev->bytes = e->bytes;
    ev->frames = e->frames;
    if (!why) {
        td_receiver_times(e, now, &ev->transfer_us, &ev->exposed_us);
        td_trace_event(s->o.trace, "landed", ",\"epoch\":%llu,\"frames\":%u,\"bytes\":%llu",
                       (unsigned long long)e->id, e->frames, (unsigned long long)e->bytes);
    } else {
        ev->type = TD_SHIP_LOST;
        ev->over = e->over;
        snprintf(ev->reason, sizeof ev->reason, "%s", why);
        td_trace_event(s->o.trace, "lost", ",\"epoch\":%llu,\"why\":\"%s\"", (unsigned long long)e->id,
                       ev->reason);
    }
    td_receiver_close(s->receiver, e);
    ship_emit(s, ev);
    disown(s, r);
    tell(s, r, id, why, but);
    receiving_free(r);
}

static void handle(td_ship *s, int64_t now, td_part id, const td_kvframe *f, td_part payload);

/* ---- frames that are earlier than their reservation ---- */
static bool keep_early(td_ship *s, int64_t now, td_part id, const td_kvframe *f, td_part payload)
{
    bool frame = f->type == TD_KVF_FRAME || f->type == TD_KVF_COMMIT || f->type == TD_KVF_ABORT;
    bool root = !s->o.rank && !s->o.replica; /* it tells the others */
    if (root || !frame || f->incarnation != s->o.incarnation || f->epoch <= s->newest ||
        s->n_early == MAX_EARLY || id.n > sizeof s->early_first->id)
        return false;
    early *e = td_xalloc(sizeof *e + payload.n);
    e->until_us = now + EARLY_US;
    memcpy(e->id, id.p, id.n);
    e->id_bytes = id.n;
    e->head = *f;
    e->n = payload.n;
    if (payload.n) memcpy(e->payload, payload.p, payload.n);
    *s->early_last = e;
    s->early_last = &e->next;
    s->n_early++;
    return true;
}

static early *take_early(td_ship *s, early **at)
{
    early *e = *at;
    *at = e->next;
    if (!e->next) s->early_last = at;
    s->n_early--;
    return e;
}

static void handle_early(td_ship *s, int64_t now, early *e)
{
    handle(s, now, (td_part){e->id, e->id_bytes}, &e->head, (td_part){e->payload, e->n});
    free(e);
}

static void replay_early(td_ship *s, int64_t now, uint64_t epoch)
{
    for (early **p = &s->early_first; *p;) {
        if ((*p)->head.epoch == epoch) handle_early(s, now, take_early(s, p));
        else p = &(*p)->next;
    }
}

int64_t ship_in_deadline(const td_ship *s)
{
    int64_t due = td_receiver_deadline(s->receiver);
    return s->early_first ? TD_MIN(due, s->early_first->until_us) : due;
}

void ship_in_command(td_ship *s, int64_t now, cmd *c)
{
    if (c->type == CMD_RECV_CLOSE) {
        td_epoch *e = td_receiver_find(s->receiver, c->key);
        if (!e) return; /* LANDED or LOST is on the way to the engine */
        if (td_stage_flush(&s->stage) < 0) TD_DEBUG_LOG("%s", td_reason());
        tell(s, e->user, e->id, "the reservation was cancelled", -1);
        disown(s, e->user);
        receiving_free(e->user);
        td_receiver_close(s->receiver, e);
        ship_emit(s, ship_event(TD_SHIP_CLOSED, c->key));
        return;
    }
    receiving *r = td_xalloc(sizeof *r);
    r->key = c->key;
    s->newest = TD_MAX(s->newest, c->key);
    for (int g = 0; g < TD_MAX_GROUPS; g++) {
        r->pages[g] = c->pages[g];
        r->n_pages[g] = c->n_pages[g];
        c->pages[g] = NULL;
    }
    if (td_receiver_add(s->receiver, now, c->key, c->hit, c->n_tokens, c->n_first, r) == TD_OK) {
        td_epoch *e = td_receiver_find(s->receiver, c->key);
        if (e->state == TD_EPOCH_LANDED) settle(s, e, now, -1); /* this rank lacks nothing */
        replay_early(s, now, c->key);
        return;
    }
    receiving_free(r);
    td_ship_event *ev = ship_event(TD_SHIP_LOST, c->key);
    snprintf(ev->reason, sizeof ev->reason, "%s", td_reason());
    ship_emit(s, ev);
}

static void on_message(td_ship *s, int64_t now, td_part id, const td_part part[2])
{
    td_kvframe f;
    if (td_frame_parse(part[0].p, part[0].n, part[1].n, &f) != TD_OK) {
        s->frames_bad++;
        TD_WARN("a message on the bulk endpoint was dropped: %s", td_reason());
        return;
    }
    /* Its reservation may still be in the ring: the router told the sender of it before we looked. */
    if (!td_receiver_find(s->receiver, f.epoch)) ship_drain(s, now);
    if (f.type == TD_KVF_FRAME) {
        s->frames_received++;
        s->bytes_received += part[1].n;
    }
    if (!keep_early(s, now, id, &f, part[1])) handle(s, now, id, &f, part[1]);
}

/* The payload to its pages, if it has a place. NULL, or why it cannot be written. */
static const char *write_pages(td_ship *s, const td_kvframe *f, td_part payload, td_epoch **e, uint32_t *crc)
{
    td_rect rect;
    *e = td_receiver_place(s->receiver, f, &rect);
    if (!*e) return NULL;
    const receiving *r = (*e)->user;
    const td_codec_side side = ship_side(s, rect.group);
    td_status st = td_stage_scatter(&s->stage,
                                    &(td_stage_rect){.side = &side,
                                                     .pages = r->pages[rect.group],
                                                     .n_pages = r->n_pages[rect.group],
                                                     .r = &rect,
                                                     .pick = &side.tokens},
                                    payload.p, crc);
    return st >= 0 ? NULL : st == TD_EPROTO ? "a page of the reservation is missing" : BAD_DEVICE;
}

static td_recv_action receive(td_ship *s, int64_t now, const td_kvframe *f, td_part payload)
{
    td_epoch *e;
    uint32_t crc = 0;
    const char *why = write_pages(s, f, payload, &e, &crc);
    if (f->type == TD_KVF_COMMIT) crc = td_crc32c(0, payload.p, payload.n);
    if (!why) return td_receiver_message(s->receiver, now, f, payload.p, crc);
    e->state = TD_EPOCH_FAILED;
    e->why = why;
    return (td_recv_action){.epoch = e};
}

static void handle(td_ship *s, int64_t now, td_part id, const td_kvframe *f, td_part payload)
{
    td_recv_action a = receive(s, now, f, payload);
    if (a.bad) {
        s->frames_bad++;
        TD_WARN("epoch %llu: %s; it will be recomputed", (unsigned long long)f->epoch,
                a.why ? a.why : "message for a sender");
    }
    if (a.epoch) remember(a.epoch->user, f->src_rank, id);
    if (a.epoch && a.epoch->state >= TD_EPOCH_LANDED)
        settle(s, a.epoch, td_now_us(),
               f->type == TD_KVF_ABORT ? f->src_rank : -1); /* now is when this turn began */
    else if (a.answer == TD_KVF_CREDIT && f->src_rank < ((receiving *)a.epoch->user)->n_peers)
        owe(s, a.epoch->user, f->src_rank, a.credits);
    else if (a.answer)
        answer(s, id, f->epoch, f->incarnation, a.answer, a.credits, a.answer == TD_KVF_NACK ? a.why : NULL);
}

bool ship_in_receive(td_ship *s, int64_t now)
{
    td_part id, part[2];
    int n, k = 0;
    if (!s->router) return false;
    for (; k < RECV_PER_TURN && td_sock_recv(s->router, &id, part, &n) == TD_OK; k++)
        on_message(s, now, id, part);
    pay_all(s);
    return k == RECV_PER_TURN;
}

void ship_in_tick(td_ship *s, int64_t now)
{
    while (s->early_first && s->early_first->until_us <= now) /* nobody tells of it any more: refused */
        handle_early(s, now, take_early(s, &s->early_first));
    td_epoch *e;
    while ((e = td_receiver_tick(s->receiver, now))) {
        TD_WARN("epoch %llu: %s; it will be recomputed", (unsigned long long)e->id, e->why);
        settle(s, e, now, -1);
    }
}

void ship_in_close(td_ship *s)
{
    while (s->early_first) free(take_early(s, &s->early_first));
    td_receiver_free(s->receiver, drop_user);
    s->receiver = NULL;
}
