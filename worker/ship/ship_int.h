/* worker/ship/ship_int.h - shared by ship.c (thread, commands), ship_out.c (sending) and ship_in.c
 * (receiving). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_SHIP_SHIP_INT_H
#define TD_WORKER_SHIP_SHIP_INT_H

#include "common/chan.h"
#include "common/map.h"
#include "common/wire/loop.h"
#include "worker/ship/codec.h"
#include "worker/ship/group.h"
#include "worker/ship/receiver.h"
#include "worker/ship/sender.h"
#include "worker/ship/ship.h"
#include "worker/ship/stage.h"
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>

typedef enum { CMD_SEND_OPEN, CMD_SEND_RECT, CMD_SEND_COMMIT, CMD_SEND_CANCEL, CMD_RECV_OPEN, CMD_RECV_CLOSE,
               CMD_STOP } cmd_type;

/* A rectangle with the pages it lies in; pages follow the struct. */
typedef struct rect_ref { uint32_t page0, n_pages, mark; int32_t pages[]; } rect_ref; /* mark: stage.h */

/* A rank that a hand-off goes to. */
typedef struct pair {
    uint16_t rank, n_src;        /* n_src: how many sources it hears */
    td_token_set tokens;         /* that it holds */
    char endpoint[256];
} pair;

typedef struct cmd {
    struct cmd *next;
    cmd_type type;
    uint64_t key;
    td_msg_sink sink;            /* numbers and key only */
    pair *pair;                  /* SEND_OPEN: [n_pairs] */
    uint32_t n_pairs;
    uint32_t n_tokens, hit, n_first, abort_index;
    td_rect rect;
    rect_ref *ref;
    td_buf payload;              /* SEND_COMMIT */
    bool logprobs;
    int64_t prompt_end_us;
    char text[256];              /* reason */
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

/* A sending key: done when each of its sendings is. */
typedef struct handoff {
    struct handoff *next;
    uint64_t key;
    uint32_t left, frames;
    uint64_t bytes;
    bool failed, over;           /* over: cancelled, with index 0 (kvframe.h rule 8) */
    char reason[160];            /* of the first that failed */
} handoff;

/* One hand-off to one rank. */
typedef struct sending {
    struct sending *next;
    uint64_t key;
    handoff *of;                 /* NULL: decided; only its ABORT has not left yet */
    dest *to;
    td_sender m;
    td_token_set tokens;         /* that the destination holds */
    td_buf commit;
    int64_t prompt_end_us, commit_at_us; /* commit_at_us: not before (fault delay-commit) */
} sending;

/* Who sent the last message of a source for an epoch: told when it ends. */
typedef struct peer { uint8_t id[32]; size_t bytes; uint32_t owed; } peer;

typedef struct receiving {
    uint64_t key;
    peer *peer;                  /* [n_peers], by source rank */
    struct receiving *owed_next; /* list of those with credits to give back at the end of this turn */
    bool owes;
    uint32_t n_peers;
    int32_t *pages[TD_MAX_GROUPS];
    uint32_t n_pages[TD_MAX_GROUPS];
} receiving;

/* A frame for a reservation that rank 0 has told the world of, and this rank not yet: kept until it is. */
typedef struct early {
    struct early *next;
    int64_t until_us;
    uint8_t id[32];
    size_t id_bytes, n;
    td_kvframe head;
    uint8_t payload[];
} early;

/* Payload buffers of one size, kept for the next frame: fresh memory costs more than filling it. They come
 * back on a ZeroMQ thread, maybe after the ship is closed: the last one frees the stack. Page-locked ones, of a
 * device, are waited for: the device may be closed next. */
typedef struct stack {
    pthread_mutex_t mu;
    pthread_cond_t back;
    td_dev *dev;                 /* NULL: this host's memory */
    uint32_t n, out;             /* kept; with ZeroMQ */
    bool closed;
    void *kept[128];
} stack;

typedef struct fault { enum { FAULT_NONE, FAULT_FLIP, FAULT_DROP,
                              FAULT_DELAY_COMMIT } what; int64_t n; } fault;

struct td_ship {
    td_ship_opts o;
    td_ship_grid grid;
    td_ship_part part;
    fault fault;
    pthread_t thread;
    sem_t started;
    td_status start_status;
    char endpoint[256], reason[256];
    td_chan *commands, *events;
    /* engine thread's own: commands that found the ring full, what is sent to whom, rank 0's book */
    cmd *wait_first, **wait_last;
    td_map plans;                /* sending key -> td_grid_plan * */
    td_ship_group *group;        /* NULL: one rank, or not rank 0 */
    /* the rest belongs to the ship thread */
    bool stop;
    td_loop loop;
    td_sock *router;
    td_receiver *receiver;
    receiving *owed;
    early *early_first, **early_last;
    uint32_t n_early;
    uint64_t newest;             /* epoch that was opened: keys of a worker only grow */
    dest dest[TD_SHIP_MAX_DESTS];
    stack *buffers;
    td_stage stage;              /* how pages are read and written */
    sending *sendings;
    uint32_t n_concluded;        /* of them without a handoff */
    handoff *handoffs;
    atomic_uint_fast64_t frames_sent, frames_received, bytes_sent, bytes_received, frames_bad;
    atomic_uint epochs_open;
};

/* This rank's pages of a group, as the codec wants them. */
static inline td_codec_side ship_side(const td_ship *s, int g)
{
    return (td_codec_side){.kv = s->o.kv[g], .slot0 = s->part.slot0[g], .n_slots = s->part.n_slots[g],
                           .head0 = s->part.head0[g], .tokens = s->part.tokens};
}

void ship_emit(td_ship *s, td_ship_event *e);
td_ship_event *ship_event(td_ship_event_type type, uint64_t key);
void ship_drain(td_ship *s, int64_t now);

stack *ship_stack_open(td_dev *dev);
void ship_stack_close(stack *b);
void ship_out_command(td_ship *s, int64_t now, cmd *c);
bool ship_out_pump(td_ship *s, int64_t now);     /* true: more could be done at once */
void ship_out_receive(td_ship *s, int64_t now);
int64_t ship_out_deadline(const td_ship *s, int64_t now);
void ship_out_close(td_ship *s);

void ship_in_command(td_ship *s, int64_t now, cmd *c);
bool ship_in_receive(td_ship *s, int64_t now);   /* true: more may be there */
void ship_in_tick(td_ship *s, int64_t now);
int64_t ship_in_deadline(const td_ship *s);
void ship_in_close(td_ship *s);

#endif
