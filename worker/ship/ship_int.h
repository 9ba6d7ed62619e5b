/* worker/ship/ship_int.h - shared by ship.c (thread, commands), ship_out.c (sending) and ship_in.c
 * (receiving). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SHIP_SHIP_INT_H
#define TD_WORKER_SHIP_SHIP_INT_H

#include "common/chan.h"
#include "common/map.h"
#include "common/wire/loop.h"
#include "worker/ship/receiver.h"
#include "worker/ship/sender.h"
#include "worker/ship/ship.h"
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>

typedef enum { CMD_SEND_OPEN, CMD_SEND_RECT, CMD_SEND_COMMIT, CMD_SEND_CANCEL, CMD_RECV_OPEN, CMD_RECV_CLOSE,
               CMD_STOP } cmd_type;

/* A rectangle with the pages it lies in; pages follow the struct. */
typedef struct rect_ref { uint32_t page0, n_pages; int32_t pages[]; } rect_ref;

typedef struct cmd {
    struct cmd *next;
    cmd_type type;
    uint64_t key;
    td_msg_sink sink;            /* endpoint: in `text` */
    uint32_t n_tokens, hit, n_first, abort_index;
    td_rect rect;
    rect_ref *ref;
    td_buf payload;              /* SEND_COMMIT */
    int64_t prompt_end_us;
    char text[256];              /* endpoint or reason */
    int32_t *pages[TD_MAX_GROUPS];
    uint32_t n_pages[TD_MAX_GROUPS];
} cmd;

/* One connection to a decode worker's bulk endpoint. */
typedef struct dest {
    char endpoint[256];
    td_curve curve;
    bool has_key;
    td_sock *sock;
    uint32_t users;
    int64_t idle_us;
} dest;

typedef struct sending {
    struct sending *next;
    uint64_t key;
    dest *to;
    td_sender m;
    td_buf commit;
    int64_t prompt_end_us, commit_at_us; /* commit_at_us: not before (fault delay-commit) */
} sending;

typedef struct receiving {
    uint64_t key;
    uint8_t peer[32];            /* who sent the last message for it: told when it ends by our doing */
    size_t peer_bytes;
    int32_t *pages[TD_MAX_GROUPS];
    uint32_t n_pages[TD_MAX_GROUPS];
} receiving;

typedef struct fault { enum { FAULT_NONE, FAULT_FLIP, FAULT_DROP,
                              FAULT_DELAY_COMMIT } what; int64_t n; } fault;

struct td_ship {
    td_ship_opts o;
    fault fault;
    pthread_t thread;
    sem_t started;
    td_status start_status;
    char endpoint[256], reason[256];
    td_chan *commands, *events;
    cmd *wait_first, **wait_last; /* engine thread's own: commands that found the ring full */
    /* the rest belongs to the ship thread */
    bool stop;
    td_loop loop;
    td_sock *router;
    td_receiver *receiver;
    dest dest[TD_SHIP_MAX_DESTS];
    sending *sendings;
    atomic_uint_fast64_t frames_sent, frames_received, bytes_sent, bytes_received, frames_bad;
    atomic_uint epochs_open;
};

void ship_emit(td_ship *s, td_ship_event *e);
td_ship_event *ship_event(td_ship_event_type type, uint64_t key);
void ship_drain(td_ship *s, int64_t now);

void ship_out_command(td_ship *s, int64_t now, cmd *c);
bool ship_out_pump(td_ship *s, int64_t now);     /* true: more could be done at once */
void ship_out_receive(td_ship *s, int64_t now);
int64_t ship_out_deadline(const td_ship *s, int64_t now);
void ship_out_close(td_ship *s);

void ship_in_command(td_ship *s, int64_t now, cmd *c);
bool ship_in_receive(td_ship *s, int64_t now);   /* true: more may be there */
void ship_in_tick(td_ship *s, int64_t now);
void ship_in_close(td_ship *s);

#endif
