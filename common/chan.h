/* common/chan.h - bounded single-producer single-consumer ring of pointers, with a wake-up.
 *
 * The pointed-to object moves with the message: the sender may not touch it after a successful push. The
 * consumer waits on td_chan_fd() (an eventfd, level-readable while anything may be queued); one eventfd may
 * serve several channels.
 * Rules: 1. push fails (false) when full: the producer applies back-pressure.
 *        2. drain: call td_chan_clear() first, then pop until NULL; what is pushed in between signals again,
 *           so none is lost.
 * Threads: exactly one producer and one consumer thread per channel. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_CHAN_H
#define TD_COMMON_CHAN_H

#include <stdbool.h>

typedef struct td_chan td_chan;

/* wake_fd -1: own eventfd; else a shared wake-up, of which the channel has a descriptor of its own: a producer that
 * outlives the consumer signals nobody, not whoever got the number of a closed descriptor. NULL: no descriptor to be
 * had (td_reason). */
td_chan *td_chan_open(unsigned capacity, int wake_fd);
void td_chan_close(td_chan *c); /* queued pointers are the caller's business: pop them first */
bool td_chan_push(td_chan *c, void *msg);
void *td_chan_pop(td_chan *c);                         /* NULL: empty */
int td_chan_fd(const td_chan *c);
void td_chan_clear(td_chan *c);                        /* reset the wake-up; before draining */
unsigned td_chan_len(const td_chan *c);                /* approximate */
/* A plain wake-up: eventfd helpers. */
int td_wake_open(void);
void td_wake_signal(int fd);
void td_wake_clear(int fd);

#endif
