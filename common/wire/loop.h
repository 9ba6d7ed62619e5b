/* common/wire/loop.h - sleep until one of a few sockets or file descriptors has something, or a time has
 * passed.
 *
 * ZeroMQ's descriptor is edge-triggered and any call on a socket may eat the edge, so sleeping without asking
 * every socket first loses wake-ups. td_loop_wait is the one place that gets this right (sock.h rule 2).
 *
 * Threads: one owner. Limits: TD_LOOP_MAX sockets and as many descriptors; add returns false beyond. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_WIRE_LOOP_H
#define TD_COMMON_WIRE_LOOP_H

#include "common/wire/sock.h"

enum { TD_LOOP_MAX = 128 };

typedef struct td_loop {
    td_sock *sock[TD_LOOP_MAX];
    int fd[TD_LOOP_MAX];
    bool room[TD_LOOP_MAX];      /* of a socket: td_loop_want_room */
    unsigned n_sock, n_fd;
} td_loop;

static inline void td_loop_init(td_loop *l)
{
    l->n_sock = l->n_fd = 0;
}
bool td_loop_add_sock(td_loop *l, td_sock *s);
void td_loop_del_sock(td_loop *l, const td_sock *s);
bool td_loop_add_fd(td_loop *l, int fd); /* level-readable: eventfd, pipe, signalfd */
/* Until td_loop_want_none: room to send on this socket ends a sleep too. Else the news of it, eaten by a call that
 * asked for messages, would be slept over. */
void td_loop_want_room(td_loop *l, const td_sock *s);
void td_loop_want_none(td_loop *l);
/* Returns after at most timeout_us (negative: no limit), rounded up to a millisecond; at once if any socket
 * has messages, or room that is wanted. May wake early. */
void td_loop_wait(td_loop *l, int64_t timeout_us);

#endif
