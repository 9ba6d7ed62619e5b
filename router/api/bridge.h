/* router/api/bridge.h - the core thread: td_core between its ROUTER socket and the net threads.
 *
 *   workers <--ZeroMQ--> [recv, unpack] -> td_core_step -> [pack, send]
 *   net threads <--td_chan--> td_ask_core, td_out
 *
 * Rules:     1. One turn: socket, rings, tick (every 50 ms), then what did not fit into a net thread's ring,
 *               then sleep.
 *            2. A worker is addressed by the ZeroMQ identity its last message came with. A send that fails
 *               loses it (PEER_LOST).
 *            3. Draining (a SIGTERM on signal_fd): what is new is refused (503) on ports that stay open, what runs may
 *               finish until drain_us; the ports close when nothing runs any more, not before listen_us, or at drain_us.
 *               Then the workers are told (LEAVE).
 * Threads:   everything on the thread that calls td_bridge_run, which must also have opened the socket.
 * Limits:    TD_BRIDGE_PEERS peers known by identity; TD_BRIDGE_BATCH messages per turn. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_API_BRIDGE_H
#define TD_ROUTER_API_BRIDGE_H

#include "common/wire/loop.h"
#include "router/api/api.h"
#include "router/api/metrics.h"
#include "router/core/router.h"

enum {
    TD_BRIDGE_PEERS = 256,
    TD_BRIDGE_BATCH = 512,
    TD_BRIDGE_TICK_US = 50000,
    TD_BRIDGE_LEAVE_US = 500000, /* for the answers to GOODBYE */
    TD_BRIDGE_MESSAGE_BYTES = 8 << 20
};

typedef struct td_bridge td_bridge;

typedef struct td_bridge_opts {
    td_api *api;
    td_core *core;
    td_metrics *metrics;
    td_sock *sock;
    int wake_fd; /* of all td_chan towards the core; the net threads signal it when they end, too */
    int signal_fd;                     /* signalfd of SIGTERM and SIGINT, or -1 */
    atomic_uint *nets_running;         /* td_bridge_run returns when it drains and this is 0 */
    uint32_t expected_workers;         /* that on_ready waits for; the fleet may serve with fewer */
    void (*on_ready)(void *arg, const td_fleet *f); /* once, when the fleet can serve and all are ready */
    int64_t drain_us, listen_us;       /* rule 3 */
    void (*on_drain)(void *arg);       /* once: td_net_drain on the net threads */
    void (*on_stop)(void *arg);        /* once, later: td_net_stop on them */
    void *arg;
} td_bridge_opts;

/* Of the process: never closed. */
td_bridge *td_bridge_open(const td_bridge_opts *o);
void td_bridge_run(td_bridge *b);

#endif
