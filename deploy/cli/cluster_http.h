/* deploy/cli/cluster_http.h - the client side: streamed completions over libcurl, many at once. The only user of curl.h.
 *
 * Rules:     1. An event is the JSON text of one "data:" line; [DONE] is not handed on.
 *            2. Every started call ends in exactly one on_end.
 * Ownership: calls are freed after on_end. Threads: one owner. Limits: 1 MiB per line. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_DEPLOY_CLI_CLUSTER_HTTP_H
#define TD_DEPLOY_CLI_CLUSTER_HTTP_H

#include "common/arena.h"
#include "common/json.h"
#include "common/status.h"
#include <stdbool.h>

typedef struct td_client td_client;

typedef struct td_client_call {
    void (*on_event)(void *arg, const char *json, size_t n); /* NULL: not a stream */
    void (*on_end)(void *arg, td_status s, int http_status, const char *body, size_t n); /* body: of an error or a plain answer */
    void *arg;
} td_client_call;

/* base_url: http://HOST:PORT, or with the /v1 that OpenAI's clients want. ca: PEM file that a https:// url is checked against; "": the system's. */
td_client *td_client_open(const char *base_url, const char *api_key, const char *ca);
void td_client_close(td_client *c); /* unfinished calls end with TD_EGONE */
/* POST body (copied) to path, or GET when body is NULL. */
td_status td_client_start(td_client *c, const char *path, const char *body, size_t n, const td_client_call *call);
int td_client_active(const td_client *c);
void td_client_turn(td_client *c, int timeout_ms); /* wait for traffic, run callbacks */
void td_client_cancel_all(td_client *c);
/* One plain call, waiting for its end: the answer, which lies in the arena. AGAIN: nobody listens there (yet); EIO: no answer, none
 * of this API, or an error, whose message is the reason. */
td_status td_client_ask(td_client *c, const char *path, const char *body, size_t n, td_arena *a, td_json **root);

#endif
