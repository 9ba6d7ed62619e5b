/* tests/ship/support_worker.h - whole workers in this process (as worker/main.c builds them) and a scripted router to talk to them. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SHIP_SUPPORT_WORKER_H
#define TD_TESTS_SHIP_SUPPORT_WORKER_H

#include "common/conf.h"
#include "worker/boot.h"
#include "worker/control_thread.h"

typedef struct sw_worker {
    td_conf conf;
    uint64_t incarnation;
    char name[32], endpoint[256];
    int done_fd;
    td_control_thread *control;
    td_boot boot;
    td_engine *engine;
    td_wengine *wengine;
    td_ship *ship;
    td_trace *trace;
    td_msg_hello hello;
} sw_worker;

/* options: "name=value" pairs for td_conf_set, NULL-terminated. incarnation: any number, also the name. */
void sw_open(sw_worker *w, td_zctx *z, uint64_t incarnation, const char *router, const td_curve *curve,
             const char *const *options);
void sw_close(sw_worker *w);
/* Every page free or cached, no pin, no leg, within ms. */
bool sw_clean(sw_worker *w, int ms);

enum { SW_MAX_CHOICES = 4, SW_MAX_OUT = 512, SW_MAX_LEGS = 64 };

/* What the router knows about one leg. */
typedef struct sw_leg {
    uint64_t worker;
    td_req_key key;
    bool reserved, busy, prompt_done, ended, reported, landed, handed_off;
    uint64_t epoch;
    uint32_t hit, credits, token_messages;
    td_finish finish;
    td_status status;
    char reason[256], report_reason[256];
    td_msg msg_report;
} sw_leg;

/* A request's log, as DESIGN 4 rule 5 wants it. */
typedef struct sw_log {
    uint64_t request;
    uint32_t n[SW_MAX_CHOICES], ids[SW_MAX_CHOICES][SW_MAX_OUT];
    float lp[SW_MAX_CHOICES][SW_MAX_OUT];
    uint32_t n_top;
    td_top top[SW_MAX_CHOICES][SW_MAX_OUT][5];
    td_finish finish[SW_MAX_CHOICES];
    int gaps, differences; /* must stay 0 */
} sw_log;

typedef struct sw_peer {
    uint64_t incarnation;
    uint8_t id[64];
    size_t id_bytes;
    bool hello;
    td_wstate state;
    uint64_t beats, hellos;
    bool goodbye;
    td_msg_heartbeat beat;
    char endpoint[256];
} sw_peer;

typedef struct sw_router {
    uint64_t incarnation;
    td_sock *sock;
    char endpoint[128];
    bool mute;              /* no answers at all */
    sw_peer peer[8];
    unsigned n_peers;
    sw_leg leg[SW_MAX_LEGS];
    unsigned next_leg;
    sw_log log[SW_MAX_LEGS];
    unsigned next_log;
    uint64_t bad;
} sw_router;

void sw_router_open(sw_router *r, td_zctx *z, const char *bind, uint64_t incarnation, const td_curve *curve);
void sw_router_close(sw_router *r);
void sw_send(sw_router *r, uint64_t worker, td_msg *m);
/* Handles messages until cond(arg) or ms have passed; returns cond. */
bool sw_until(sw_router *r, int ms, bool (*cond)(void *arg), void *arg);
void sw_pump(sw_router *r, int ms);
sw_peer *sw_peer_of(sw_router *r, uint64_t worker);
sw_leg *sw_leg_of(sw_router *r, uint64_t worker, td_req_key key);
sw_log *sw_log_of(sw_router *r, uint64_t request);

#endif
