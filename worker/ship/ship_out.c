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
#include <time.h>

enum { FRAMES_PER_TURN = 4, AHEAD = 3, RECV_PER_TURN = 64, IDLE_US = 60000000, RETRY_US = 20000, BACK_S = 5 };

static sending *find(td_ship *s, uint64_t key, uint32_t dst)
{
    for (sending *x = s->sendings; x; x = x->next)
        if (x->key == key && x->m.o.dst_rank == dst) return x;
    return NULL;
}

static handoff *find_handoff(td_ship *s, uint64_t key)
{
    for (handoff *h = s->handoffs; h; h = h->next)
        if (h->key == key) return h;
    return NULL;
}

/* ---- connections ---- */
static dest *dest_find(td_ship *s, const cmd *c, const char *endpoint)
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
        if (same_key && !strcmp(d->endpoint, endpoint)) return d;
        if (!d->users && (!oldest || d->idle_us < oldest->idle_us)) oldest = d;
    }
    if (free_one || !oldest) return free_one;
    td_loop_del_sock(&s->loop, oldest->sock);
    td_sock_close(oldest->sock);
    oldest->sock = NULL;
    return oldest;
}

static td_status dest_open(td_ship *s, const cmd *c, const char *endpoint, dest **out)
{
    dest *d = dest_find(s, c, endpoint);
    if (!d) return td_refuse(TD_EFULL, "more than %d ranks of decode workers at once", TD_SHIP_MAX_DESTS);
    if (d->sock) {
        *out = d;
        return TD_OK;
    }
    *d = (dest){.has_key = c->sink.has_key};
    snprintf(d->endpoint, sizeof d->endpoint, "%s", endpoint);
    td_sock_opts o = {.max_message_bytes = 64 * 1024,
                      .hwm = TD_SHIP_HWM,
                      .send_buffer = td_endpoint_is_local(endpoint) ? TD_SHIP_LOCAL_BUFFER : 0};
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

/* ---- payload buffers ---- */
stack *ship_stack_open(td_dev *dev)
{
    stack *b = td_xalloc(sizeof *b);
    pthread_mutex_init(&b->mu, NULL);
    pthread_cond_init(&b->back, NULL);
    b->dev = dev;
    return b;
}

static void *buffer_new(const stack *b)
{
    void *p;
    if (!b->dev) return malloc(TD_KVF_FRAME_BYTES);
    return b->dev->alloc_host(b->dev, TD_KVF_FRAME_BYTES, &p) < 0 ? NULL : p;
}

static void buffer_free(const stack *b, void *p)
{
    if (!b->dev)
        free(p);
    else if (p)
        b->dev->free_host(b->dev, p);
}

static void stack_free(stack *b)
{
    while (b->n) buffer_free(b, b->kept[--b->n]);
    pthread_cond_destroy(&b->back);
    pthread_mutex_destroy(&b->mu);
    free(b);
}

void ship_stack_close(stack *b)
{
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += BACK_S;
    pthread_mutex_lock(&b->mu);
    while (b->dev && b->out && !pthread_cond_timedwait(&b->back, &b->mu, &until)) {
    } /* their sockets are closed: soon */
    if (b->dev && b->out) TD_WARN("%u frames have not come back from their sockets", b->out);
    b->closed = true;
    bool last = !b->out;
    pthread_mutex_unlock(&b->mu);
    if (last) stack_free(b);
}

static void *stack_take(stack *b)
{
    pthread_mutex_lock(&b->mu);
    void *p = b->n ? b->kept[--b->n] : NULL;
    b->out++;
    pthread_mutex_unlock(&b->mu);
    return p ? p : buffer_new(b);
}

/* On any thread. NULL: there was no memory. */
static void stack_give(void *p, void *hint)
{
    enum { KEEP = 32 }; /* page-locked memory is costly to make: all that fits */
    stack *b = hint;
    pthread_mutex_lock(&b->mu);
    bool keep = p && !b->closed && b->n < (b->dev ? TD_COUNT(b->kept) : KEEP);
    if (keep) b->kept[b->n++] = p;
    bool last = !--b->out && b->closed;
    if (!keep) buffer_free(b, p);
    pthread_cond_signal(&b->back);
    pthread_mutex_unlock(&b->mu);
    if (last) stack_free(b);
}

/* ---- one hand-off ---- */
static void drop_ref(void *ref)
{
    free(ref);
}

static void forget_begun(td_ship *s, const sending *x);

/* All ranks that it went to have ended. */
static void handoff_end(td_ship *s, handoff *h)
{
    td_ship_event *e = ship_event(TD_SHIP_SENT, h->key);
    e->ok = !h->failed;
    e->over = h->over;
    e->bytes = h->bytes;
    e->frames = h->frames;
    memcpy(e->reason, h->reason, sizeof e->reason);
    td_trace_event(s->o.trace, e->ok ? "handed_off" : "handoff_failed",
                   ",\"key\":%llu,\"frames\":%u,\"bytes\":%llu", (unsigned long long)h->key, e->frames,
                   (unsigned long long)e->bytes);
    handoff **p = &s->handoffs;
    while (*p != h) p = &(*p)->next;
    *p = h->next;
    free(h);
    ship_emit(s, e);
}

static void handoff_fail(handoff *h, const char *reason)
{
    if (h->failed) return;
    h->failed = true;
    snprintf(h->reason, sizeof h->reason, "%.*s", (int)sizeof h->reason - 1, reason);
}

/* To one rank: decided. The others of a hand-off that failed are given up by the next pump. Nothing of the request
 * is held any more; an ABORT that found no room in its socket stays behind until it leaves (more than max_keys of
 * them do not wait). */
static void conclude(td_ship *s, sending *x)
{
    handoff *h = x->of;
    x->of = NULL;
    h->frames += x->m.index;
    h->bytes += x->m.bytes;
    if (x->m.state != TD_SENDER_ACKED) handoff_fail(h, x->m.reason);
    forget_begun(s, x);
    td_sender_deinit(&x->m, drop_ref);
    if (++s->n_concluded > s->o.max_keys) x->m.abort_due = false;
    if (!--h->left) handoff_end(s, h);
}

static void release(td_ship *s, sending *x, int64_t now)
{
    if (x->to) {
        x->to->users--;
        x->to->idle_us = now;
    }
    sending **p = &s->sendings;
    while (*p != x) p = &(*p)->next;
    *p = x->next;
    td_buf_deinit(&x->commit);
    free(x);
    s->n_concluded--;
}

static td_stage_rect stage_rect(const td_codec_side *side, const td_rect *r, const rect_ref *ref,
                                const td_token_set *pick)
{
    return (td_stage_rect){.name = ref,
                           .mark = ref->mark,
                           .side = side,
                           .pages = ref->pages,
                           .page0 = ref->page0,
                           .n_pages = ref->n_pages,
                           .r = r,
                           .pick = pick};
}

/* The next frames of a device's pages are packed and copied while this one is checked and sent. */
static void begin_ahead(td_ship *s, const sending *x)
{
    const td_send_item *it;
    for (uint32_t i = 1; i < AHEAD && td_stage_room(&s->stage) > 1 && (it = td_sender_peek(&x->m, i)); i++) {
        if (td_stage_begun(&s->stage, it->ref)) continue;
        const td_codec_side side = ship_side(s, it->rect.group);
        const td_stage_rect r = stage_rect(&side, &it->rect, it->ref, &x->tokens);
        void *payload = stack_take(s->buffers);
        if (payload && td_stage_begin(&s->stage, &r, payload) == TD_OK) continue;
        stack_give(payload, s->buffers); /* its own turn tells why */
        return;
    }
}

static void forget_begun(td_ship *s, const sending *x)
{
    const td_send_item *it;
    for (uint32_t i = 0; (it = td_sender_peek(&x->m, i)); i++) {
        void *payload = td_stage_forget(&s->stage, it->ref);
        if (payload) stack_give(payload, s->buffers);
    }
}

static td_status post_frame(td_ship *s, sending *x, td_send_action *a, td_send_event *posted)
{
    const td_codec_side side = ship_side(s, a->rect.group);
    const td_kv *kv = side.kv;
    const td_stage_rect r = stage_rect(&side, &a->rect, a->ref, &x->tokens);
    size_t n = td_codec_bytes(kv, &a->rect, &x->tokens);
    TD_CHECK(n <= TD_KVF_FRAME_BYTES);
    uint8_t *payload = td_stage_begun(&s->stage, a->ref);
    if (!payload) payload = stack_take(s->buffers);
    uint32_t crc = 0;
    td_status st = TD_AGAIN;
    if (payload) st = td_stage_begun(&s->stage, a->ref) ? TD_OK : td_stage_begin(&s->stage, &r, payload);
    if (st == TD_OK) begin_ahead(s, x);
    if (st == TD_OK) st = td_stage_gather(&s->stage, &r, payload, &crc);
    if (st != TD_OK) {
        stack_give(payload, s->buffers);
        if (!payload) return td_fail(TD_EFULL, "no memory for a frame of %zu bytes", n);
        if (st != TD_EPROTO) return st;
        return td_fail(st, "a page of tokens %u.. of group %u is not held", a->rect.tok0, a->rect.group);
    }
    td_frame_rect(&a->head, &a->rect, kv->dtype, kv->D, td_codec_tokens(&a->rect, &x->tokens));
    td_frame_seal_with(&a->head, crc, n);
    *posted = (td_send_event){.type = TD_SEND_POSTED, .digest = td_frame_digest(&a->head), .bytes = n};
    int64_t number = (int64_t)s->frames_sent;
    if (s->fault.what == FAULT_FLIP && number == s->fault.n) payload[n / 2] ^= 1;
    if (s->fault.what == FAULT_DROP && number == s->fault.n) {
        stack_give(payload, s->buffers);
        return TD_OK;
    }
    return td_sock_send_owned(x->to->sock, NULL, 0, (td_part){&a->head, sizeof a->head}, payload, n,
                              stack_give, s->buffers);
}

static td_status post_commit(td_ship *s, sending *x, td_send_action *a, int64_t now, td_send_event *posted)
{
    if (s->fault.what == FAULT_DELAY_COMMIT) {
        if (!x->commit_at_us) x->commit_at_us = now + s->fault.n * 1000;
        if (now < x->commit_at_us) return TD_AGAIN;
    }
    a->head.hidden_us = x->m.first_us < 0 ? 0 : TD_MAX(x->prompt_end_us - x->m.first_us, (int64_t)0);
    td_frame_seal(&a->head, x->commit.p, x->commit.len);
    *posted = (td_send_event){.type = TD_SEND_POSTED};
    td_part part[2] = {{&a->head, sizeof a->head}, {x->commit.p, x->commit.len}};
    return td_sock_send(x->to->sock, NULL, 0, part, 2);
}

static td_status post_abort(sending *x, td_send_action *a)
{
    td_frame_seal(&a->head, NULL, 0);
    td_part part = {&a->head, sizeof a->head};
    return x->to ? td_sock_send(x->to->sock, NULL, 0, &part, 1) : td_refuse(TD_EGONE, "never connected");
}

/* False: room will end the sleep. */
static bool has_room(td_ship *s, const sending *x)
{
    if (!x->to || td_sock_writable(x->to->sock)) return true; /* never connected: posting tells */
    td_loop_want_room(&s->loop, x->to->sock);
    return false;
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
        if (!has_room(s, x)) st = TD_AGAIN;
        else if (a.type == TD_SEND_DO_ABORT) st = post_abort(x, &a);
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
    if (x->of && x->m.state >= TD_SENDER_ACKED) conclude(s, x);
    if (td_sender_done(&x->m)) release(s, x, now);
    return more;
}

bool ship_out_pump(td_ship *s, int64_t now)
{
    bool more = false;
    td_loop_want_none(&s->loop);
    for (sending *x = s->sendings, *next; x; x = next) {
        next = x->next;
        td_send_event e = {.type = TD_SEND_TICK};
        handoff *h = x->of;
        if (!h) {
            more |= pump(s, x, now, e);
            continue;
        }
        if (h->failed) e = (td_send_event){.type = TD_SEND_CANCEL, .n = !h->over, .reason = h->reason};
        bool alone = h->left == 1, failed = h->failed;
        more |= pump(s, x, now, e);
        more |= !alone && !failed && h->failed; /* the rest of this hand-off may lie behind us */
    }
    dest_idle(s, now);
    return more;
}

static void open_sending(td_ship *s, int64_t now, const cmd *c, handoff *h, const pair *to)
{
    sending *x = td_xalloc(sizeof *x);
    x->key = c->key;
    x->of = h;
    x->tokens = to->tokens;
    td_buf_init(&x->commit, 0);
    td_sender_init(&x->m, &(td_sender_opts){.epoch = c->sink.epoch, .incarnation = c->sink.incarnation,
                                            .credits = c->sink.credits,
                                            .max_frames = td_ship_plan_max_frames(s->o.desc, c->n_tokens),
                                            .timeout_us = s->o.timeout_us, .src_rank = (uint16_t)s->o.rank,
                                            .dst_rank = to->rank, .n_src = to->n_src});
    x->next = s->sendings;
    s->sendings = x;
    if (dest_open(s, c, to->endpoint, &x->to) != TD_OK) {
        x->to = NULL;
        (void)pump(s, x, now, (td_send_event){.type = TD_SEND_GONE, .reason = td_reason()});
        return;
    }
    x->to->users++;
}

static void open_handoff(td_ship *s, int64_t now, const cmd *c)
{
    handoff *h = td_xalloc(sizeof *h);
    h->key = c->key;
    h->left = c->n_pairs + 1; /* it ends when all are open */
    h->next = s->handoffs;
    s->handoffs = h;
    for (uint32_t k = 0; k < c->n_pairs; k++) open_sending(s, now, c, h, &c->pair[k]);
    if (!--h->left && c->n_pairs) handoff_end(s, h); /* without pairs: at COMMIT or CANCEL */
}

/* First tokens go from rank 0 to rank 0. */
static void on_commit(td_ship *s, int64_t now, cmd *c, sending *x)
{
    bool first = !s->o.rank && !x->m.o.dst_rank;
    const td_commit bare = {.logprobs = c->logprobs};
    td_buf_reset(&x->commit);
    if (first) td_buf_add(&x->commit, c->payload.p, c->payload.len);
    else td_commit_write(&x->commit, &bare);
    x->prompt_end_us = c->prompt_end_us;
    (void)td_sender_step(&x->m, now, &(td_send_event){.type = TD_SEND_COMMIT, .n = first ? c->n_first : 0});
}

void ship_out_command(td_ship *s, int64_t now, cmd *c)
{
    if (c->type == CMD_SEND_OPEN) {
        open_handoff(s, now, c);
        return;
    }
    if (c->type == CMD_SEND_RECT) {
        sending *x = find(s, c->key, c->rect.dst);
        if (!x) return; /* it has ended already; its SENT is on the way to the engine */
        td_send_event e = {.type = TD_SEND_RECT, .rect = c->rect, .ref = c->ref};
        td_sender_state before = x->m.state;
        uint32_t n = x->m.n;
        (void)td_sender_step(&x->m, now, &e);
        if (before == TD_SENDER_SENDING && x->m.n > n) c->ref = NULL; /* queued: the machine has it now */
        return; /* the loop pumps */
    }
    handoff *h = find_handoff(s, c->key);
    if (h && c->type == CMD_SEND_CANCEL) {
        h->over = !h->failed && !c->abort_index;
        handoff_fail(h, c->text);
    }
    if (h && !h->left) { /* nothing of it goes from this rank */
        handoff_end(s, h);
        return;
    }
    for (sending *x = s->sendings, *next; x; x = next) {
        next = x->next;
        if (x->key != c->key || !x->of) continue;
        if (c->type == CMD_SEND_COMMIT) on_commit(s, now, c, x);
        else
            (void)pump(s, x, now,
                       (td_send_event){.type = TD_SEND_CANCEL, .n = c->abort_index, .reason = c->text});
    }
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
        bool ready = x->m.abort_due || (x->m.state == TD_SENDER_SENDING && ((x->m.n && x->m.credits) ||
                                                                            (!x->m.n && x->m.commit_ready)));
        /* what is held up by anything but room (that ends the sleep: td_loop_want_room), such as a fault */
        if (ready) due = TD_MIN(due, now + RETRY_US);
    }
    return due;
}

void ship_out_close(td_ship *s)
{
    for (handoff *h = s->handoffs, *next; h; h = next) {
        next = h->next;
        free(h);
    }
    s->handoffs = NULL;
    for (sending *x = s->sendings, *next; x; x = next) {
        next = x->next;
        forget_begun(s, x);
        td_sender_deinit(&x->m, drop_ref);
        td_buf_deinit(&x->commit);
        free(x);
    }
    s->sendings = NULL;
    for (int i = 0; i < TD_SHIP_MAX_DESTS; i++) td_sock_close(s->dest[i].sock);
}
