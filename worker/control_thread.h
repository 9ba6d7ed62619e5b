/* worker/control_thread.h - the control thread: the socket to the router, and the machine of control.h driven
 * by it.
 *
 * Messages that must arrive wait in a queue when the socket has no room; a queue over its limit means that
 * the router is stuck, and the link is made anew. Threads: open, close and the setters: main; the rest is the
 * thread's own.
 * Limits: TD_CONTROL_QUEUE_BYTES waiting to be sent; messages of at most TD_CONTROL_MESSAGE_BYTES. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_CONTROL_THREAD_H
#define TD_WORKER_CONTROL_THREAD_H

#include "common/wire/sock.h"
#include "worker/control.h"
#include "worker/control_engine.h"

enum { TD_CONTROL_QUEUE_BYTES = 32 << 20, TD_CONTROL_MESSAGE_BYTES = 8 << 20 };

typedef struct td_control_thread td_control_thread;

typedef struct td_control_thread_opts {
    td_zctx *z;
    const char *router;          /* endpoint */
    const td_curve *curve;       /* or NULL; borrowed */
    uint64_t incarnation;
    uint32_t max_legs;
    int64_t drain_us;
    int done_fd;                 /* signalled when the machine is over */
} td_control_thread_opts;

td_status td_control_thread_open(const td_control_thread_opts *o, td_control_thread **out);
int td_control_thread_wake_fd(const td_control_thread *t);
/* The engine is there: from now on work is accepted. hello is borrowed until close. Once. */
void td_control_thread_loaded(td_control_thread *t, td_wengine *w, td_ship *ship, const td_msg_hello *hello);
void td_control_thread_drain(td_control_thread *t);
td_control_outcome td_control_thread_over(td_control_thread *t);
void td_control_thread_close(td_control_thread *t);

#endif
