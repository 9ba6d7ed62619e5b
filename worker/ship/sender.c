// SPDX-License-Identifier: Apache-2.0
#include "worker/ship/sender.h"
#include "common/check.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

void td_sender_init(td_sender *s, const td_sender_opts *o)
{
    *s = (td_sender){.o = *o, .credits = o->credits, .first_us = -1, .stuck_us = -1};
}

void td_sender_deinit(td_sender *s, void (*drop)(void *ref))
{
    for (; s->n; s->n--, s->head = (s->head + 1) % s->cap)
        if (drop) drop(s->item[s->head].ref);
    free(s->item);
    s->item = NULL;
}

static void fail(td_sender *s, bool tell, uint32_t abort_index, const char *reason)
{
    s->state = TD_SENDER_FAILED;
    s->abort_due = tell;
    s->abort_index = abort_index;
    s->stuck_us = -1;
    snprintf(s->reason, sizeof s->reason, "%s", reason ? reason : "");
}

static bool push(td_sender *s, const td_send_event *e)
{
    if (s->n == s->o.max_frames) return false;
    if (s->n == s->cap) {
        uint32_t cap = s->cap ? s->cap * 2 : 16;
        td_send_item *item = td_xalloc(cap * sizeof *item);
        for (uint32_t i = 0; i < s->n; i++) item[i] = s->item[(s->head + i) % s->cap];
        free(s->item);
        s->item = item;
        s->cap = cap;
        s->head = 0;
    }
    s->item[(s->head + s->n++) % s->cap] = (td_send_item){.rect = e->rect, .ref = e->ref};
    return true;
}

/* What the state asks for, whatever happened before. */
static td_send_action next_action(const td_sender *s)
{
    td_send_action a = {.type = TD_SEND_NOTHING};
    uint16_t type = TD_KVF_FRAME;
    if (s->abort_due) {
        a.type = TD_SEND_DO_ABORT;
        type = TD_KVF_ABORT;
    } else if (s->state == TD_SENDER_SENDING && s->n && s->credits) {
        a.type = TD_SEND_DO_FRAME;
        a.rect = s->item[s->head].rect;
        a.ref = s->item[s->head].ref;
    } else if (s->state == TD_SENDER_SENDING && !s->n && s->commit_ready) {
        a.type = TD_SEND_DO_COMMIT;
        type = TD_KVF_COMMIT;
    }
    if (a.type == TD_SEND_NOTHING) return a;
    td_frame_init(&a.head, type, s->o.epoch, s->o.incarnation);
    a.head.src_rank = s->o.src_rank;
    a.head.dst_rank = s->o.dst_rank;
    a.head.index = type == TD_KVF_ABORT ? s->abort_index : s->index;
    if (type == TD_KVF_COMMIT) {
        a.head.n_first = s->n_first;
        a.head.n_src = s->o.n_src ? s->o.n_src : 1;
        a.head.digest = s->digest;
    }
    return a;
}

static void posted(td_sender *s, int64_t now, const td_send_event *e)
{
    td_send_action a = next_action(s);
    if (a.type == TD_SEND_DO_ABORT) s->abort_due = false;
    if (a.type == TD_SEND_DO_COMMIT) s->state = TD_SENDER_COMMITTED;
    if (a.type == TD_SEND_DO_FRAME) {
        if (s->first_us < 0) s->first_us = now;
        s->digest ^= e->digest;
        s->bytes += e->bytes;
        s->head = (s->head + 1) % s->cap;
        s->n--;
        s->index++;
        s->credits--;
    }
    s->stuck_us = -1; /* progress: the clock of rule 2 starts anew */
}

static void handle(td_sender *s, int64_t now, const td_send_event *e)
{
    bool live = s->state == TD_SENDER_SENDING || s->state == TD_SENDER_COMMITTED;
    if (e->type == TD_SEND_POSTED) {
        posted(s, now, e);
        return;
    }
    if (!live) {
        if (e->type == TD_SEND_GONE) s->abort_due = false;
        return;
    }
    switch (e->type) {
    case TD_SEND_RECT:
        TD_CHECK(!s->commit_ready);
        if (!push(s, e)) fail(s, true, 1, "more frames are waiting than the table holds");
        break;
    case TD_SEND_COMMIT:
        s->commit_ready = true;
        s->n_first = e->n;
        break;
    case TD_SEND_CREDIT:
        s->credits = e->n > s->o.credits - s->credits ? s->o.credits : s->credits + e->n;
        s->stuck_us = -1;
        break;
    case TD_SEND_ACK:
        if (s->state == TD_SENDER_COMMITTED) s->state = TD_SENDER_ACKED;
        else fail(s, true, 1, "acknowledged before the COMMIT");
        break;
    case TD_SEND_NACK: fail(s, false, 0, e->reason &&
                            e->reason[0] ? e->reason : "refused by the receiver"); break;
    case TD_SEND_CANCEL: fail(s, true, e->n, e->reason); break;
    case TD_SEND_GONE: fail(s, false, 0, e->reason); break;
    default: break;
    }
}

td_send_action td_sender_step(td_sender *s, int64_t now_us, const td_send_event *e)
{
    handle(s, now_us, e);
    bool waiting = s->abort_due || s->state == TD_SENDER_COMMITTED ||
                   (s->state == TD_SENDER_SENDING && (s->n || s->commit_ready));
    if (!waiting) s->stuck_us = -1;
    else if (s->stuck_us < 0) s->stuck_us = now_us;
    else if (now_us - s->stuck_us >= s->o.timeout_us) {
        if (s->abort_due) s->abort_due = false; /* the receiver's own deadline has to do */
        else {
            fail(s, true, 1,
                 s->state == TD_SENDER_COMMITTED ? "no acknowledgement in time"
                 : s->credits                    ? "the receiver could not be reached in time"
                                                 : "no credits in time");
            s->stuck_us = now_us;
        }
    }
    return next_action(s);
}

int64_t td_sender_deadline(const td_sender *s)
{
    return s->stuck_us < 0 ? INT64_MAX : s->stuck_us + s->o.timeout_us;
}
