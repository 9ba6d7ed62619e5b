/* tests/router/support_api.h - the router program over real sockets: a process of it, a mock worker in a
 * thread of this process, and a small HTTP client. The worker's tokens are sim_token(), so what every answer
 * must be is known. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_ROUTER_SUPPORT_API_H
#define TD_TESTS_ROUTER_SUPPORT_API_H

#include "common/json.h"
#include "common/wire/sock.h"
#include "tests/router/support_sim.h"

#include <pthread.h>
#include <stdatomic.h>
#include <sys/types.h>

extern char api_control[128]; /* the router's endpoint for workers */

/* Finds bin/tandem-router beside the test argv0 (or TANDEM_ROUTER). False: there is none. */
bool api_init(const char *argv0);

/* ---- the mock worker: one thread, MIXED ---- */
enum { API_MOCK_LEGS = 64 };
typedef struct api_leg {
    bool used;
    td_req_key key;
    uint32_t prompt[1024], n_prompt, n, max, at[8];
    uint64_t seed;
    bool done[8], told;
    int32_t lp, plp;
    float temperature;
    uint32_t n_stop, bias;
} api_leg;
typedef struct api_mock {
    pthread_t thread;
    atomic_bool stop;
    atomic_int step_ms, cancels, legs, goodbyes;
    atomic_uint seen_temp_milli, seen_topk, seen_stop_ids, seen_max;
    td_zctx *z;
    td_sock *s;
    api_leg leg[API_MOCK_LEGS];
    uint64_t inc, step;
} api_mock;

api_mock *api_mock_start(uint64_t inc, int step_ms);
void api_mock_stop(api_mock *m);

/* ---- the router ---- */
typedef struct api_router {
    pid_t pid;
    int fd;
} api_router;
api_router api_router_start(const char *a1, const char *a2); /* two more flags, or NULL */
int api_router_stop(api_router *r); /* SIGTERM; exit status, 1000 + signal, or -1: it had to be killed */
bool api_read_line(int fd, char *line, size_t n, int ms);

/* ---- a client: one connection per request ---- */
typedef struct api_reply {
    int status;
    char *head, *body;
    td_arena arena;
    td_json *json;
    char *raw;
} api_reply;
int api_dial(void);
int api_ask(const char *method, const char *path, const char *headers, const char *body); /* the connection */
api_reply api_finish(int fd);
void api_done(api_reply *r);
api_reply api_get(const char *path);
api_reply api_send_json(const char *path, const char *body);

/* "a.0.b" */
const td_json *api_at(const td_json *v, const char *path);
const char *api_str_at(const td_json *v, const char *path); /* "(none)" */
int64_t api_int_at(const td_json *v, const char *path);     /* -999 */

#endif
