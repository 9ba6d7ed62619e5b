/* tests/net/support_toy.h - a small server on td_net: echo, delayed answers, endless streams, gRPC methods;
 * for the tests here.
 * HTTP: /echo /headers /post?ms /tick?ms /stream?n,size,gap_us /flood /hang /big?bytes /abort /late_abort
 *       /two_turns /stop
 * gRPC: t.T/Unary (echo)  t.T/Gen ("n size gap_us")  t.T/Hang  t.T/Fail ("code text")  t.T/Lost (count as
 *       text) */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_NET_TOY_H
#define TD_TESTS_NET_TOY_H

#include "router/net/exchange.h"
#include <pthread.h>
#include <stdatomic.h>

typedef struct toy_job toy_job;
typedef struct toy {
    td_net *net;
    int port, grpc_port;
    pthread_t thread;
    toy_job *jobs;
    atomic_int handled, lost, jobs_live;
    atomic_long max_unsent; /* seen by the toy's own streams */
    atomic_int connections, exchanges;
    atomic_long body_bytes;
} toy;

void toy_open(toy *t, td_net_opts o); /* fills handler, error_body, arg; ports 0 unless set; starts it */
void toy_close(toy *t);               /* stop, join, close */

#endif
