// SPDX-License-Identifier: Apache-2.0
/* worker/ship/ship_out.c - the sending half: connections, gathering, and the sender machines. */
#include "common/check.h"
#include "common/clock.h"
#include "common/log.h"
#include "worker/fault.h"
#include "worker/ship/codec.h"
#include "worker/ship/ship_int.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { BULK_HWM = 64, FRAMES_PER_TURN = 4, RECV_PER_TURN = 64, IDLE_US = 60000000, RETRY_US = 20000 };

static sending *find(td_ship *s, uint64_t key)
{
    for (sending *x = s->sendings; x; x = x->next)
        if (x->key == key) return x;
    return NULL;
}

/* ---- connections ---- */
static dest *dest_find(td_ship *s, const cmd *c)
{
    dest *free_one = NULL, *oldest = NULL;
    for (int i = 0; i < TD_SHIP_MAX_DESTS; i++) {
        dest *d = &s->dest[i];
        if (!d->sock) {
            if (!free_one) free_one = d;
            continue;
        }
        bool same_key = d->has_key == c->sink.has_key &&
            (!d->has_key || !memcmp(d->curve.server_key, c->sink.public_key, 32));
        if (same_key && !strcmp(d->endpoint, c->text)) return d;
        if (!d->users && (!oldest || d->idle_us < oldest->idle_us)) oldest = d;
    }
    if (free_one || !oldest) return free_one;
    td_loop_del_sock(&s->loop, oldest->sock);
    td_sock_close(oldest->sock);
    oldest->sock = NULL;
    return oldest;
}

static td_status dest_open(td_ship *s, const cmd *c, dest **out)
{
    dest *d = dest_find(s, c);
    if (!d) return td_refuse(TD_EFULL, "more than %d decode workers at once", TD_SHIP_MAX_DESTS);
    if (d->sock) {
        *out = d;
        return TD_OK;
    }
    *d = (dest){.has_key = c->sink.has_key};
    memcpy(d->endpoint, c->text, sizeof d->endpoint);
    td_sock_opts o = {.max_message_bytes = 64 * 1024, .hwm = BULK_HWM};
    if (d->has_key) {
        if (!s->o.curve)
            return td_refuse(TD_ENOSUP, "%s wants encryption and this worker has no key", d->endpoint);
        d->curve = *s->o.curve;
        memcpy(d->curve.server_key, c->sink.public_key, 32);
        o.curve = &d->curve;
    }
    TD_TRY(td_sock_connect_dealer(s->o.z, d->endpoint, NULL, 0, &o, &d->sock));
    td_loop_add_sock(&s->loop, d->sock);
    *out = d;
    return TD_OK;
}

static void dest_idle(td_ship *s, int64_t now)
{
    for (int i = 0; i < TD_SHIP_MAX_DESTS; i++) {
        dest *d = &s->dest[i];
        if (!d->sock || d->users || now - d->idle_us < IDLE_US) continue;
        td_loop_del_sock(&s->loop, d->sock);
        td_sock_close(d->sock);
        d->sock = NULL;
    }
}

/* ---- one hand-off ---- */
static void drop_ref(void *ref)
{
    free(ref);
}

static void finish(td_ship *s, sending *x, int64_t now)
{
    td_ship_event *e = ship_event(TD_SHIP_SENT, x->key);
    e->ok = x->m.state == TD_SENDER_ACKED;
    e->bytes = x->m.bytes;
    e->frames = x->m.index;
    snprintf(e->reason, sizeof e->reason, "%s", x->m.reason);
    td_trace_event(s->o.trace, e->ok ? "handed_off" : "handoff_failed",
                   ",\"key\":%llu,\"epoch\":%llu,\"frames\":%u,\"bytes\":%llu", (unsigned long long)x->key,
                   (unsigned long long)x->m.o.epoch, e->frames, (unsigned long long)e->bytes);
    if (x->to) {
        x->to->users--;
        x->to->idle_us = now;
    }
    sending **p = &s->sendings;
    while (*p != x) p = &(*p)->next;
    *p = x->next;
    td_sender_deinit(&x->m, drop_ref);
    td_buf_deinit(&x->commit);
    free(x);
    ship_emit(s, e);
}

static void free_payload(void *p, void *hint)
{
    (void)hint;
    free(p);
}

static td_status post_frame(td_ship *s, sending *x, td_send_action *a, td_send_event *posted)
{
    const td_kv *kv = s->o.kv[a->rect.group];
    const rect_ref *ref = a->ref;
    size_t n = td_codec_bytes(kv, &a->rect);
    uint8_t *payload = malloc(n);
    if (!payload) return td_fail(TD_EFULL, "no memory for a frame of %zu bytes", n);
    if (!td_codec_gather(kv, ref->pages, ref->page0, ref->n_pages, &a->rect, payload)) {
        free(payload);
        return td_fail(TD_EPROTO, "a page of tokens %u.. of group %u is not held", a->rect.tok0,
                       a->rect.group);
    }
    a->head.group = a->rect.group;
    a->head.dtype = (uint16_t)kv->dtype;
    a->head.layer0 = a->rect.layer0;
    a->head.n_layers = a->rect.n_layers;
    a->head.tok0 = a->rect.tok0;
    a->head.n_tok = a->rect.n_tok;
    a->head.kv_heads = (uint16_t)kv->G;
    a->head.head_dim = (uint16_t)kv->D;
    td_frame_seal(&a->head, payload, n);
    *posted = (td_send_event){.type = TD_SEND_POSTED, .digest = td_frame_digest(&a->head), .bytes = n};
    int64_t number = (int64_t)s->frames_sent;
    if (s->fault.what == FAULT_FLIP && number == s->fault.n) payload[n / 2] ^= 1;
    if (s->fault.what == FAULT_DROP && number == s->fault.n) {
        free(payload);
        return TD_OK;
    }
    return td_sock_send_owned(x->to->sock, NULL, 0, (td_part){&a->head, sizeof a->head}, payload, n,
                              free_payload, NULL);
}

static td_status post_commit(td_ship *s, sending *x, td_send_action *a, int64_t now, td_send_event *posted)
{
    if (s->fault.what == FAULT_DELAY_COMMIT) {
        if (!x->commit_at_us) x->commit_at_us = now + s->fault.n * 1000;
        if (now < x->commit_at_us) return TD_AGAIN;
    }
    td_kvcommit h;
    memcpy(&h, x->commit.p, sizeof h);
    h.exposed_us = TD_MAX(now - x->prompt_end_us, (int64_t)0);
    memcpy(x->commit.p, &h, sizeof h);
    a->head.sent_us = x->m.first_us < 0 ? 0 : now - x->m.first_us;
    td_frame_seal(&a->head, x->commit.p, x->commit.len);
    *posted = (td_send_event){.type = TD_SEND_POSTED};
    td_part part[2] = {{&a->head, sizeof a->head}, {x->commit.p, x->commit.len}};
    return td_sock_send(x->to->sock, NULL, 0, part, 2);
}

static void post_abort(sending *x, td_send_action *a)
{
    td_frame_seal(&a->head, NULL, 0);
    td_part part = {&a->head, sizeof a->head};
    if (x->to && td_sock_send(x->to->sock, NULL, 0, &part, 1) < 0)
        TD_DEBUG_LOG("an ABORT did not leave: %s", td_reason());
}

static void sent(td_ship *s, const sending *x, const td_send_action *a, size_t bytes)
{
    if (a->type == TD_SEND_DO_COMMIT) {
        td_trace_event(s->o.trace, "commit_sent", ",\"key\":%llu,\"epoch\":%llu,\"frames\":%u",
                       (unsigned long long)x->key, (unsigned long long)x->m.o.epoch, a->head.index);
        return;
    }
    s->frames_sent++;
    s->bytes_sent += bytes;
    td_trace_event(s->o.trace, "frame_sent",
                   ",\"key\":%llu,\"epoch\":%llu,\"index\":%u,\"group\":%u,\"layer0\":%u,\"n_layers\":%u"
                   ",\"tok0\":%u,\"n_tok\":%u,\"bytes\":%zu",
                   (unsigned long long)x->key, (unsigned long long)x->m.o.epoch, a->head.index, a->rect.group,
                   a->rect.layer0, a->rect.n_layers, a->rect.tok0, a->rect.n_tok, bytes);
}

/* Posts at most FRAMES_PER_TURN messages of one hand-off. True: it could go on at once. The sending may be
 * gone afterwards. */
static bool pump(td_ship *s, sending *x, int64_t now, td_send_event e)
{
    td_send_action a = td_sender_step(&x->m, now, &e);
    int n = 0;
    while (a.type != TD_SEND_NOTHING && n < FRAMES_PER_TURN) {
        td_send_event posted = {.type = TD_SEND_POSTED};
        td_status st = TD_OK;
        if (a.type == TD_SEND_DO_ABORT) post_abort(x, &a);
        else if (!td_sock_writable(x->to->sock)) st = TD_AGAIN;
        else if (td_fault_due(TD_FAULT_SHIP_FRAME, x->key)) td_fault_pause(), st = TD_AGAIN;
        else if (a.type == TD_SEND_DO_COMMIT) st = post_commit(s, x, &a, now, &posted);
        else st = post_frame(s, x, &a, &posted);
        if (st == TD_AGAIN) break;
        if (st < 0) posted = (td_send_event){.type = TD_SEND_GONE, .reason = td_reason()};
        else if (a.type != TD_SEND_DO_ABORT) sent(s, x, &a, posted.bytes);
        if (st == TD_OK && a.type == TD_SEND_DO_FRAME) drop_ref(a.ref);
        a = td_sender_step(&x->m, now, &posted);
        n++;
    }
    bool more = a.type != TD_SEND_NOTHING && n == FRAMES_PER_TURN;
    if (td_sender_done(&x->m)) finish(s, x, now);
    return more;
}

bool ship_out_pump(td_ship *s, int64_t now)
{
    bool more = false;
    for (sending *x = s->sendings, *next; x; x = next) {
        next = x->next;
        more |= pump(s, x, now, (td_send_event){.type = TD_SEND_TICK});
    }
    dest_idle(s, now);
    return more;
}

static void open_sending(td_ship *s, int64_t now, const cmd *c)
{
    sending *x = td_xalloc(sizeof *x);
    x->key = c->key;
    td_buf_init(&x->commit, 0);
    td_sender_init(&x->m, &(td_sender_opts){.epoch = c->sink.epoch, .incarnation = c->sink.incarnation,
                                            .credits = c->sink.credits,
                                            .max_frames = td_ship_plan_max_frames(s->o.desc, c->n_tokens),
                                            .timeout_us = s->o.timeout_us});
    x->next = s->sendings;
    s->sendings = x;
    if (dest_open(s, c, &x->to) != TD_OK) {
        x->to = NULL;
        (void)pump(s, x, now, (td_send_event){.type = TD_SEND_GONE, .reason = td_reason()});
        return;
    }
    x->to->users++;
}

void ship_out_command(td_ship *s, int64_t now, cmd *c)
{
    if (c->type == CMD_SEND_OPEN) {
        open_sending(s, now, c);
        return;
    }
    sending *x = find(s, c->key);
    if (!x) return; /* it has ended already; its SENT is on the way to the engine */
    td_send_event e = {.type = TD_SEND_RECT, .rect = c->rect, .ref = c->ref};
    if (c->type == CMD_SEND_RECT) {
        td_sender_state before = x->m.state;
        uint32_t n = x->m.n;
        (void)td_sender_step(&x->m, now, &e);
        if (before == TD_SENDER_SENDING && x->m.n > n) c->ref = NULL; /* queued: the machine has it now */
        return; /* the loop pumps */
    }
    if (c->type == CMD_SEND_COMMIT) {
        td_buf_deinit(&x->commit);
        x->commit = c->payload;
        td_buf_init(&c->payload, 0);
        x->prompt_end_us = c->prompt_end_us;
        (void)td_sender_step(&x->m, now, &(td_send_event){.type = TD_SEND_COMMIT, .n = c->n_first});
        return;
    }
    (void)pump(s, x, now, (td_send_event){.type = TD_SEND_CANCEL, .n = c->abort_index, .reason = c->text});
}

/* ---- what the receiver says ---- */
static void on_reply(td_ship *s, dest *d, int64_t now, const td_kvframe *f, td_part payload)
{
    sending *x = s->sendings;
    while (x && !(x->to == d && x->m.o.epoch == f->epoch && x->m.o.incarnation == f->incarnation))
        x = x->next;
    if (!x) return;
    char text[128] = "";
    if (payload.n && payload.n < sizeof text && td_frame_payload_ok(f, payload.p))
        memcpy(text, payload.p, payload.n);
    td_send_event e = {.n = f->index, .reason = text};
    if (f->type == TD_KVF_CREDIT) e.type = TD_SEND_CREDIT;
    else if (f->type == TD_KVF_ACK) e.type = TD_SEND_ACK;
    else if (f->type == TD_KVF_NACK) e.type = TD_SEND_NACK;
    else return;
    (void)pump(s, x, now, e);
}

void ship_out_receive(td_ship *s, int64_t now)
{
    for (int i = 0; i < TD_SHIP_MAX_DESTS; i++) {
        dest *d = &s->dest[i];
        for (int k = 0; d->sock && k < RECV_PER_TURN; k++) {
            td_part part[2];
            int n;
            td_kvframe f;
            if (td_sock_recv(d->sock, NULL, part, &n) != TD_OK) break;
            if (td_frame_parse(part[0].p, part[0].n, part[1].n, &f) != TD_OK) s->frames_bad++;
            else on_reply(s, d, now, &f, part[1]);
        }
    }
}

int64_t ship_out_deadline(const td_ship *s, int64_t now)
{
    int64_t due = INT64_MAX;
    for (const sending *x = s->sendings; x; x = x->next) {
        due = TD_MIN(due, td_sender_deadline(&x->m));
        bool ready = x->m.state == TD_SENDER_SENDING && ((x->m.n && x->m.credits) ||
                                                         (!x->m.n && x->m.commit_ready));
        /* not writable yet: the socket's wake-up may have been eaten */
        if (ready) due = TD_MIN(due, now + RETRY_US);
    }
    return due;
}

void ship_out_close(td_ship *s)
{
    for (sending *x = s->sendings, *next; x; x = next) {
        next = x->next;
        td_sender_deinit(&x->m, drop_ref);
        td_buf_deinit(&x->commit);
        free(x);
    }
    s->sendings = NULL;
    for (int i = 0; i < TD_SHIP_MAX_DESTS; i++) td_sock_close(s->dest[i].sock);
}
