/* router/api/api.h - the client side of the router: who is what, and which thread owns it.
 *
 *   net thread                    text pool                core thread (bridge.h)
 *   handler -> td_call --job--> parse, template, tokenize
 *             <--td_net_post--- jobs or an error
 *           ---------------------- td_ask_core (SUBMIT, CANCEL, REPORT) --> td_core
 *           <--------------------- td_out --------------------------------
 *
 * Rules:     1. A td_call belongs to its net thread, except while its text job runs (PARSING): then net only
 *               notes that the client left.
 *            2. A call lives until its last job's terminal td_out, even when its client is long gone.
 *            3. Field and endpoint names are in this folder only.
 * Threads:   see above. td_api itself is read-only after opening, but for its atomics.
 * Limits:    TD_API_TEXT_JOBS waiting for the text pool; TD_API_RING messages between a net thread and the
 *            core. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_API_API_H
#define TD_ROUTER_API_API_H

#include "common/chan.h"
#include "common/conf.h"
#include "router/api/model.h"
#include "router/api/textpool.h"
#include "router/core/job.h"
#include "router/net/exchange.h"
#include <stdatomic.h>

enum { TD_API_TEXT_JOBS = 4096, TD_API_RING = 65536, TD_API_NETS = 64 };

typedef struct td_api td_api;
typedef struct td_call td_call;

/* One net thread's share. */
typedef struct td_api_net {
    td_api *api;
    unsigned index;
    td_net *net;
    td_chan *to_core, *from_core;
    td_call *calls;                  /* all of this thread */
    uint32_t n_calls;
    void *watchers;                  /* grpc.c: health watches */
    atomic_uint_fast64_t http_requests, http_errors, unknown_fields, clients_gone, text_refused;
} td_api_net;

struct td_api {
    const td_conf *conf;
    td_api_model model;
    td_hkey hash_key;
    td_textpool *text;
    unsigned n_nets;
    td_api_net nets[TD_API_NETS];
    atomic_uint_fast64_t next_id;
    /* Published by the core thread. */
    atomic_bool ready, draining;     /* ready: a request can be completed now */
    atomic_uint max_model_len;       /* 0: not known yet */
    atomic_int_fast64_t core_beat_us;
};

typedef enum { TD_CORE_SUBMIT, TD_CORE_CANCEL, TD_CORE_METRICS, TD_CORE_LEDGER } td_ask_core_kind;
typedef struct td_ask_core {
    td_ask_core_kind kind;
    td_job *job;                     /* SUBMIT */
    uint64_t id;                     /* CANCEL */
    td_api_net *from;                /* METRICS, LEDGER: answered with td_call_report on that net thread */
    td_call *call;
    td_buf text;                     /* the report */
} td_ask_core;

/* The handler of td_net_opts; arg is a td_api_net. */
void td_api_handle(void *arg, td_exchange *x);
/* Watch callbacks: from_core has something; a second has passed. */
void td_api_from_core(void *arg);
void td_api_every_second(void *arg);
/* Give the core a request. False: its ring is full. */
bool td_api_tell_core(td_api_net *n, td_ask_core_kind kind, td_job *job, uint64_t id, td_call *call);
bool td_api_authorized(const td_api *a, const td_exchange *x);
bool td_api_alive(const td_api *a); /* the core thread is turning */
/* Lower-case hex of n random bytes; out has 2n + 1. */
void td_api_random_hex(char *out, size_t n);
uint64_t td_api_random_u64(void);

#endif
