/* worker/engine_int.h - the engine's insides, shared by its parts: engine_open.c (open, sizes, close), engine.c
 * (legs: start, reserve, land, cancel, end, events) and engine_step.c (admit, plan, submit, collect). Not for anyone else. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_ENGINE_INT_H
#define TD_WORKER_ENGINE_INT_H

#include "worker/engine.h"
#include "worker/kvpool.h"
#include "worker/exec.h"
#include "worker/sched.h"
#include "worker/seq.h"
#include "worker/step_build.h"

/* What a turn tells, in growable arrays bounded by the engine's limits; two of them: one being filled, one
 * lent to the caller. */
typedef struct td_engine_news {
    td_engine_tokens *tokens;
    td_engine_prompt *prompt;
    td_engine_end *end;
    uint32_t *token;                 /* storage of tokens[i].token: index i */
    td_sample_out *sample;           /* storage of logprob and top: index i */
    td_sample_out **scores;          /* [n_prompt]: owned until the buffer is filled again */
    char (*reason)[256];             /* storage of end[i].reason */
    uint32_t n_tokens, n_prompt, n_end, cap_tokens, cap_prompt, cap_end;
} td_engine_news;

/* A sequence's part in the step being computed. */
typedef struct td_engine_item {
    td_seq *q;
    uint32_t c, pos0, n_rows, row0;  /* row0: in its replica's step */
    bool ends;                       /* its last row completes the log: draw from it */
} td_engine_item;

/* score_at: prompt position, -1: a draw */
typedef struct td_engine_draw { uint32_t item, c; int32_t score_at; } td_engine_draw;

/* A step from its planning until it is collected: one of each replica, items and draws replica after replica. */
typedef struct td_engine_flight {
    td_step_build **build;           /* [replicas] */
    const td_step **step;            /* [replicas] */
    const float **logits;            /* [replicas] */
    td_engine_item *item;            /* [max_seqs] */
    td_engine_draw *draw;
    td_sample_out *res;              /* [cap_draw] */
    uint32_t n_item, n_draw, cap_draw;
    uint64_t number;
    int64_t submitted_us;
} td_engine_flight;

/* The ranks that keep one part of the sequences (data parallel): their pages' books. Without data parallel there is one. */
typedef struct td_engine_replica {
    struct td_engine *engine;
    td_kvpool *pool;
    uint32_t index, slots;           /* slots: sequences in use here */
    uint64_t taken;                  /* the engine's legs until it last took one */
    bool tried;                      /* while a place for a leg is looked for */
    bool draining;                   /* of this turn: pages are short, and whose they could be are in flight */
} td_engine_replica;

struct td_engine {
    td_engine_opts o;
    const td_model_desc *desc;
    td_engine_replica *replica;      /* [n_replicas] */
    uint32_t n_replicas;
    uint64_t n_taken;                /* legs that were given to a replica */
    td_exec *exec;
    int max_len, max_logits, depth;
    bool ahead;                      /* rows of tokens that are still being drawn are planned too */
    td_seq **leg;                    /* [max_legs + max_seqs * depth] in order of arrival: live, held and gone ones */
    uint32_t n_leg, n_gone;
    td_map by_key;                   /* key -> td_seq pointer */
    uint32_t slots;                  /* sequences in use by running and reserved legs */
    /* [depth + 1], a ring: flight[first] is collected next; the one after the last in flight is being planned */
    td_engine_flight *flight;
    int first, n_flights;
    bool computing;                  /* inside submit */
    td_engine_item *cand;            /* [max_seqs]: what could run */
    td_sched_item *sched;            /* [max_seqs] */
    uint32_t *ids;                   /* [max_len + 1]: a log, or a unit of it, as one array */
    /* the first waiting leg did not fit then: no new try until something changes */
    struct { uint64_t changes, key; uint32_t slots; } blocked; /* changes: of all pools */
    td_engine_news news[2];
    int filling;
    uint64_t step, submitted;        /* the last one planned; the last one that runs or ran */
    uint64_t copies;                 /* pages copied on write, ever */
    int64_t collected_us;            /* when the last step was */
    td_engine_stats stats;
    td_engine_kv_fn *on_kv;
    void (*on_admit)(void *, uint64_t);
    void (*on_step)(void *, const td_step *);
    void (*on_logits)(void *, uint64_t, uint32_t, const float *);
    void *kv_arg, *admit_arg, *step_arg, *logits_arg;
};

/* Tokens that so many pages of each group hold. */
int64_t td_engine_tokens_of(const td_engine_opts *o, int64_t pages);
void td_engine_news_reset(td_engine_news *n);
td_seq *td_engine_find(const td_engine *e, uint64_t key);
/* The choice is over: its tables go back (unless held). The leg ends with its last choice. */
void td_engine_choice_done(td_engine *e, td_seq *q, uint32_t c);
void td_engine_leg_end(td_engine *e, td_seq *q, td_finish finish, td_status status, const char *reason);
void td_engine_drop_tables(td_engine *e, td_seq *q);
void td_engine_tell_tokens(td_engine *e, const td_seq *q, uint32_t c, const td_sample_out *drawn, td_finish
                           finish);
void td_engine_tell_prompt(td_engine *e, td_seq *q);
/* The books of the pages that a leg has; of replicas, any one's for what is the same for all. */
static inline td_kvpool *td_engine_pool(const td_engine *e, const td_seq *q) { return e->replica[q->replica].pool; }
static inline td_kvpool *td_engine_any_pool(const td_engine *e) { return e->replica[0].pool; }
/* Sequences of a leg come into use, or go out of it. */
static inline void td_engine_use_slots(td_engine *e, const td_seq *q)
{
    e->slots += td_seq_slots(q);
    e->replica[q->replica].slots += td_seq_slots(q);
}
static inline void td_engine_free_slots(td_engine *e, const td_seq *q)
{
    e->slots -= td_seq_slots(q);
    e->replica[q->replica].slots -= td_seq_slots(q);
}
/* A replica for the leg, pages for its log (hits taken first) and what its first step needs. EFULL: not now, nothing taken. */
td_status td_engine_take_pages(td_engine *e, td_seq *q, bool in_transit);
/* Whole units of what choice c has computed can be hit from now on. Before a fork: then nobody else has the pages. */
void td_engine_publish(td_engine *e, td_seq *q, uint32_t c);
/* Once the prompt of several choices is here, each gets tables of its own. */
void td_engine_fork(td_engine *e, td_seq *q);
static inline td_engine_flight *td_engine_flight_at(td_engine *e, int i)
{
    return &e->flight[(e->first + i) % (e->depth + 1)];
}
/* Plan and submit while there is room in flight, then collect the oldest step: its number, or 0. TD_AGAIN: no rows. */
td_status td_engine_step(td_engine *e, uint64_t *collected);
void td_engine_layer_written(td_engine *e, const td_step *step, int layer);
/* The leg's items in flight are all collected: what an ended leg kept for them goes back. May free q. */
void td_engine_landed(td_engine *e, td_seq *q);

#endif
