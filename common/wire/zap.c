// SPDX-License-Identifier: Apache-2.0
#include "common/wire/zap.h"
#include "common/check.h"
#include "common/log.h"
#include <errno.h>
#include <pthread.h>
#include <sodium.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>
#include <zmq.h>

/* Parts of a request: version, request id, domain, address, identity, mechanism, credentials. */
enum { ZAP_PARTS = 7, ZAP_PART_MAX = 256 };

struct td_zap {
    void *ctx, *rep, *stop[2]; /* stop: a PAIR of which [0] belongs to the thread */
    pthread_t thread;
    pthread_mutex_t mu;
    unsigned n_keys;
    uint8_t key[TD_ZAP_MAX_KEYS][32];
};

static bool allowed(td_zap *z, const uint8_t key[32])
{
    bool hit = false;
    pthread_mutex_lock(&z->mu);
    for (unsigned i = 0; i < z->n_keys; i++) hit |= !sodium_memcmp(z->key[i], key, 32);
    pthread_mutex_unlock(&z->mu);
    return hit;
}

static void reply(td_zap *z, const char *request_id, size_t n, bool ok)
{
    zmq_send(z->rep, "1.0", 3, ZMQ_SNDMORE);
    zmq_send(z->rep, request_id, n, ZMQ_SNDMORE);
    zmq_send(z->rep, ok ? "200" : "400", 3, ZMQ_SNDMORE);
    zmq_send(z->rep, ok ? "OK" : "unknown key", ok ? 2 : 11, ZMQ_SNDMORE);
    zmq_send(z->rep, "", 0, ZMQ_SNDMORE);
    zmq_send(z->rep, "", 0, 0);
}

static void serve(td_zap *z)
{
    char part[ZAP_PARTS][ZAP_PART_MAX];
    size_t len[ZAP_PARTS] = {0};
    int n = 0, more = 1;
    while (more) {
        zmq_msg_t m;
        zmq_msg_init(&m);
        if (zmq_msg_recv(&m, z->rep, 0) < 0) {
            zmq_msg_close(&m);
            return;
        }
        if (n < ZAP_PARTS) {
            len[n] = TD_MIN(zmq_msg_size(&m), (size_t)ZAP_PART_MAX);
            memcpy(part[n], zmq_msg_data(&m), len[n]);
        }
        n++;
        more = zmq_msg_more(&m);
        zmq_msg_close(&m);
    }
    bool ok = n == ZAP_PARTS && len[5] == 5 && !memcmp(part[5], "CURVE", 5) && len[6] == 32 &&
        len[2] == strlen(TD_ZAP_DOMAIN) && !memcmp(part[2], TD_ZAP_DOMAIN, len[2]) &&
        allowed(z, (const uint8_t *)part[6]);
    if (!ok)
        TD_WARN("a peer from %.*s was refused: its key is not the cluster's", n > 3 ? (int)len[3] : 0,
                part[3]);
    reply(z, part[1], n > 1 ? len[1] : 0, ok);
}

static void *run(void *arg)
{
    td_zap *z = arg;
    for (;;) {
        zmq_pollitem_t item[2] = {{.socket = z->rep, .events = ZMQ_POLLIN},
                                  {.socket = z->stop[0], .events = ZMQ_POLLIN}};
        if (zmq_poll(item, 2, -1) < 0 && errno != EINTR) break;
        if (item[1].revents) break;
        if (item[0].revents) serve(z);
    }
    zmq_close(z->rep);
    zmq_close(z->stop[0]);
    return NULL;
}

td_status td_zap_start(void *zmq_ctx, td_zap **out)
{
    if (sodium_init() < 0) return td_fail(TD_EIO, "libsodium did not start");
    td_zap *z = td_xalloc(sizeof *z);
    pthread_mutex_init(&z->mu, NULL);
    z->ctx = zmq_ctx;
    z->rep = zmq_socket(zmq_ctx, ZMQ_REP);
    z->stop[0] = zmq_socket(zmq_ctx, ZMQ_PAIR);
    z->stop[1] = zmq_socket(zmq_ctx, ZMQ_PAIR);
    int zero = 0;
    bool ok = z->rep && z->stop[0] && z->stop[1];
    for (int i = 0; ok && i < 3; i++)
        ok = !zmq_setsockopt(i == 2 ? z->rep : z->stop[i], ZMQ_LINGER, &zero, sizeof zero);
    ok = ok && !zmq_bind(z->rep, "inproc://zeromq.zap.01") && !zmq_bind(z->stop[0], "inproc://td.zap.stop") &&
         !zmq_connect(z->stop[1], "inproc://td.zap.stop");
    if (ok && pthread_create(&z->thread, NULL, run, z) == 0) {
        *out = z;
        return TD_OK;
    }
    td_status st = td_fail(TD_EIO, "key check did not start: %s", zmq_strerror(errno));
    if (z->rep) zmq_close(z->rep);
    if (z->stop[0]) zmq_close(z->stop[0]);
    if (z->stop[1]) zmq_close(z->stop[1]);
    free(z);
    return st;
}

td_status td_zap_allow(td_zap *z, const uint8_t public_key[32])
{
    if (allowed(z, public_key)) return TD_OK;
    td_status st = TD_OK;
    pthread_mutex_lock(&z->mu);
    if (z->n_keys == TD_ZAP_MAX_KEYS) st = TD_EFULL;
    else memcpy(z->key[z->n_keys++], public_key, 32);
    pthread_mutex_unlock(&z->mu);
    return st == TD_OK ? st : td_fail(st, "more than %d keys", TD_ZAP_MAX_KEYS);
}

void td_zap_stop(td_zap *z)
{
    if (!z) return;
    zmq_send(z->stop[1], "", 0, 0);
    pthread_join(z->thread, NULL);
    zmq_close(z->stop[1]);
    pthread_mutex_destroy(&z->mu);
    free(z);
}
