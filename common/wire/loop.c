// SPDX-License-Identifier: Apache-2.0
#include "common/wire/loop.h"
#include <poll.h>

bool td_loop_add_sock(td_loop *l, td_sock *s)
{
    if (l->n_sock == TD_LOOP_MAX) return false;
    l->room[l->n_sock] = false;
    l->sock[l->n_sock++] = s;
    return true;
}

void td_loop_del_sock(td_loop *l, const td_sock *s)
{
    for (unsigned i = 0; i < l->n_sock; i++) {
        if (l->sock[i] != s) continue;
        l->sock[i] = l->sock[--l->n_sock];
        l->room[i] = l->room[l->n_sock];
        return;
    }
}

bool td_loop_add_fd(td_loop *l, int fd)
{
    if (l->n_fd == TD_LOOP_MAX) return false;
    l->fd[l->n_fd++] = fd;
    return true;
}

void td_loop_want_room(td_loop *l, const td_sock *s)
{
    for (unsigned i = 0; i < l->n_sock; i++)
        if (l->sock[i] == s) l->room[i] = true;
}

void td_loop_want_none(td_loop *l)
{
    for (unsigned i = 0; i < l->n_sock; i++) l->room[i] = false;
}

void td_loop_wait(td_loop *l, int64_t timeout_us)
{
    struct pollfd p[2 * TD_LOOP_MAX];
    nfds_t n = 0;
    for (unsigned i = 0; i < l->n_sock; i++)
        p[n++] = (struct pollfd){.fd = td_sock_fd(l->sock[i]), .events = POLLIN};
    for (unsigned i = 0; i < l->n_fd; i++) p[n++] = (struct pollfd){.fd = l->fd[i], .events = POLLIN};
    /* After the set is built and right before sleeping: what came in earlier may have no edge left. */
    for (unsigned i = 0; i < l->n_sock; i++)
        if (l->room[i] ? td_sock_ready_or_room(l->sock[i]) : td_sock_ready(l->sock[i])) return;
    int64_t ms = timeout_us < 0 ? -1 : (timeout_us + 999) / 1000;
    (void)poll(p, n, ms > 60000 ? 60000 : (int)ms);
}
