/* worker/engine.h - the engine: sequences in, tokens out. The deep module of a worker.
 *
 *   control --start/reserve/land/cancel--> [seqs] --sched (pure)--> step --submit--> model, sample
 *                                             \                                          |
 *                                              `-- kvpool: pages, prefix tree, pins    collect--> events
 *
 * A *leg* is what one worker does for a request: MIXED (prompt and output), PREFILL (prompt and first token;
 * its pages are shipped away), DECODE (pages arrive; output). A leg has n choices that share the prompt's
 * pages. The engine makes its tokens exactly as if the leg were alone: they depend on the leg only, never on
 * batch, chunks, hits, page size or threads.
 *
 * Three lengths per sequence: planned >= computed >= committed. The scheduler plans on planned; publishing,
 * shipping, emitting and freeing use committed.
 *
 * Rules:     1. Decode rows come first in every step; the rest of max_batched_tokens goes to prompt chunks,
 *               oldest first.
 *            2. A leg is admitted only if its whole prompt and one more page fit beside what other partial
 *               prompts still need.
 *            3. When pages run out while decoding, the youngest leg is preempted: its pages go back and it is
 *               recomputed from its ids.
 *            4. Every page is free, private, shared, cached or in transit; the sum is checked after every
 *               step (td_engine_ledger).
 *            5. Pages of a held leg (td_engine_hold) stay until unhold, whatever happens to the leg: a
 *               transfer may be touching them.
 *            6. Prefix hits are whole pages whose blocks' hash chain and token ids both match; at least the
 *               last prompt token is recomputed. Legs with prompt_logprobs do not read the cache.
 *            7. Tokens of one turn come in one td_engine_out.
 *            8. Hooks run inside a turn: they may read (pages, kv, descr) and hold, nothing else.
 *            9. Data parallel (ranks->grid.dp > 1): a leg is admitted by the replica that has most of its prompt, if that one
 *               has no more than its share of max_seqs, else by the one with the fewest sequences; it stays there until it
 *               ends or is preempted. kv_pages, max_batched_tokens and max_logits are of each replica, max_seqs of all.
 * Ownership: leg descriptions are copied by start/reserve. td_engine_out is valid until the next call of
 *            turn.
 * Threads:   one owner (the engine thread) for all calls.
 * Errors:    EBADREQ: the leg is malformed (ids outside the vocabulary, too long, values out of range);
 *            EFULL: no room now (reserve) or table full; EGONE: no such key.
 * Limits:    max_seqs running sequences (choices), max_legs legs in the table, max_batched_tokens rows a
 *            step, n_pages pages.
 * Source:    Orca (OSDI 22) 3.1, Sarathi-Serve (OSDI 24) 4.2, vLLM (SOSP 23) 4. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_ENGINE_H
#define TD_WORKER_ENGINE_H

#include "common/sampling.h"
#include "worker/exec.h"
#include "worker/model/model.h"

typedef struct td_engine td_engine;

typedef struct td_engine_opts {
    td_model *model;                /* borrowed */
    const td_ops *ops;
    td_pool *pool;
    int page_size;                  /* P */
    int64_t kv_pages;               /* pages per group, of all slots together; 0: from kv_memory_bytes */
    /* 0: a quarter of the free memory, at most what max_seqs * max_model_len need */
    int64_t kv_memory_bytes;
    int max_model_len;              /* prompt + output; 0: min(model's max_positions, what the pages hold) */
    int max_batched_tokens, max_seqs, max_legs;
    int max_prefill_chunk;          /* cap of one leg's rows per step; 0: none. Tests use 1, 7, 16, 64 */
    bool prefix_cache;
    td_hkey hash_key;
    const char *numerics;           /* id that enters the hash domain */
    /* logit rows per step, as the model was opened with; 0: td_engine_logit_rows(max_seqs) */
    int max_logits;
    const td_ranks *ranks;          /* the worker's ranks (this one is rank 0); NULL: one. Borrowed */
    /* Steps in flight; 0: one. More, where one stage draws what it reads (td_exec_knows_draws): the device has
     * its next step before the host has the last one's tokens. With pipeline stages: one a stage. */
    int depth;
    int eplb_interval;              /* parallel experts are balanced every so many steps; 0: never */
} td_engine_opts;

typedef enum { TD_LEG_MIXED, TD_LEG_PREFILL, TD_LEG_DECODE } td_leg_kind;

typedef struct td_leg {
    uint64_t key;                   /* unique in this worker while the leg lives */
    td_leg_kind kind;
    td_sampling sampling;
    const uint32_t *prompt; uint32_t n_prompt;
    /* [sampling.n]: output tokens a choice already has (another worker made them), or NULL */
    const uint32_t *const *resume;
    /* [sampling.n] or NULL. They count as output: penalties, max_tokens, positions */
    const uint32_t *n_resume;
    const void *salt; uint32_t salt_bytes; /* tenant's cache salt */
    int64_t deadline_us;            /* monotonic; 0: none */
    uint32_t hit_tokens;            /* PREFILL: tokens the decode side already has (not shipped) */
    /* hand every prompt row's logits to td_engine_on_logits (tools); reads no cache */
    bool all_logits;
} td_leg;

typedef struct td_engine_tokens {   /* tokens of one choice, in order */
    uint64_t key;
    /* base_index: of tokens[0] in the choice's output (resume tokens included) */
    uint32_t choice, base_index, n;
    const uint32_t *token;
    const float *logprob;           /* [n]; NULL when not asked */
    const td_top *top;              /* [n * n_top] */
    uint32_t n_top;
    td_finish finish;               /* NONE: more to come */
    uint32_t stop_token;            /* with TD_FINISH_STOP: the id that ended it */
} td_engine_tokens;

typedef struct td_engine_prompt {   /* a leg's prompt is computed */
    uint64_t key;
    uint32_t cached_tokens;
    int64_t queued_us, prefill_us;  /* waiting before the first row; from there to the last row's step end */
    /* prompt logprobs of positions 1 .. n_prompt-1: id, logprob, alternatives */
    uint32_t n_scores;
    const td_sample_out *scores;    /* token = the prompt's id */
} td_engine_prompt;

typedef struct td_engine_end {
    uint64_t key;
    td_finish finish;
    td_status status;
    const char *reason;
} td_engine_end;

typedef struct td_engine_out {
    uint64_t step;                  /* number of the step just collected; 0: none */
    const td_engine_prompt *prompt; uint32_t n_prompt;
    const td_engine_tokens *tokens; uint32_t n_tokens;
    /* legs that are gone (all choices finished, cancelled or failed): their last event */
    const td_engine_end *end; uint32_t n_end;
} td_engine_out;

typedef struct td_engine_ledger_row {
    int64_t total, free, private_, shared, cached, in_transit, pinned;
} td_engine_ledger_row;

typedef struct td_engine_stats {
    uint64_t steps, rows, prompt_rows, decode_rows, preemptions, hit_tokens, query_tokens, evictions;
    uint64_t discarded_rows;        /* of rows: of legs and choices that had ended by the time they were computed */
    uint32_t legs_waiting, legs_running, seqs_running;
    uint64_t waiting_tokens;        /* prompt tokens not yet computed */
    int64_t step_us_ewma;
    double prefill_tok_s, decode_tok_s;          /* EWMA, 0 until measured */
    td_engine_ledger_row ledger[TD_MAX_GROUPS];
    td_expert_stats experts;        /* of rank 0's stage */
} td_engine_stats;

/* Logit rows a step may have: one per sequence and 64 for prompt logprobs. What td_model_opts.max_logits
 * should be. */
static inline int td_engine_logit_rows(int max_seqs) { return max_seqs + 64; }

td_status td_engine_open(const td_engine_opts *o, td_engine **out);
/* KV pages per group that this rank would take: as told, or from memory. */
int64_t td_engine_choose_pages(const td_engine_opts *o);
/* Of a worker of several ranks: a message to the others, in order with the steps; their news (worker/mirror.h). */
bool td_engine_many(const td_engine *e);
bool td_engine_computing(const td_engine *e); /* on_kv speaks of rows of the step being computed, not of a prefix hit */
td_status td_engine_command(td_engine *e, const void *p, size_t n);
/* Parallel experts are balanced now: before the next step. */
td_status td_engine_balance(td_engine *e, bool force);
td_status td_engine_poll(td_engine *e, td_status (*take)(void *arg, const void *p, size_t n), void *arg);
void td_engine_close(td_engine *e);

td_status td_engine_start(td_engine *e, const td_leg *leg);   /* MIXED or PREFILL */
/* DECODE: take pages for the prompt and, of a single choice, its resumed tokens (hits pinned), and one more;
 * the leg waits. out_hit: tokens already here. EFULL: not now. */
td_status td_engine_reserve(td_engine *e, const td_leg *leg, uint32_t *out_hit);
/* The pages of a reserved leg have arrived and been verified: decode from the first tokens, one per choice,
 * which the prefill leg has reported already. A first token that ends a choice ends it here too. n = 0
 * (several choices that resume): the prompt's last row is computed again, for choices without tokens. */
td_status td_engine_land(td_engine *e, uint64_t key, const uint32_t *first, uint32_t n);
/* The pages will not come: compute them here from the ids. The leg becomes MIXED. */
td_status td_engine_recompute(td_engine *e, uint64_t key);
/* its td_engine_end follows in the next turn's output */
td_status td_engine_cancel(td_engine *e, uint64_t key);
/* a stop string was found: others go on */
td_status td_engine_cancel_choice(td_engine *e, uint64_t key, uint32_t choice);
td_status td_engine_hold(td_engine *e, uint64_t key);
void td_engine_unhold(td_engine *e, uint64_t key);            /* also after the leg ended */

/* One turn: collect the step in flight, emit, plan and submit the next. TD_AGAIN: nothing to do until a call
 * changes that. */
td_status td_engine_turn(td_engine *e, td_engine_out *out);

/* Called on the engine thread when layers [layer0, layer1) of token range [tok0, tok1) of a PREFILL leg are
 * in their pages. */
typedef void td_engine_kv_fn(void *arg, uint64_t key, int layer0, int layer1, uint32_t tok0, uint32_t tok1);
void td_engine_on_kv(td_engine *e, td_engine_kv_fn *fn, void *arg);
/* A PREFILL leg has its pages, and so its replica. In planning: td_engine_command may be called. */
void td_engine_on_admit(td_engine *e, void (*fn)(void *arg, uint64_t key), void *arg);
/* Each submitted step, for traces and the step log (before it runs). */
void td_engine_on_step(td_engine *e, void (*fn)(void *arg, const td_step *s), void *arg);
/* Rows of legs with all_logits, as they are computed: logits[V] of the leg's position. */
void td_engine_on_logits(td_engine *e,
                         void (*fn)(void *arg, uint64_t key, uint32_t position, const float *logits),
                         void *arg);

/* Pages of a leg's prompt: page table of a group; -1: not held (before a window). Valid while the leg is
 * held. */
const int32_t *td_engine_pages(const td_engine *e, uint64_t key, int group, uint32_t *n);
/* The replica that has the leg's pages (data parallel); 0 if it has none yet. */
uint32_t td_engine_replica_of(const td_engine *e, uint64_t key);
uint32_t td_engine_replicas(const td_engine *e);
const td_kv *td_engine_kv(const td_engine *e, int group);
const td_model_desc *td_engine_descr(const td_engine *e);
int td_engine_max_model_len(const td_engine *e);
int64_t td_engine_capacity_tokens(const td_engine *e);
void td_engine_stats_get(const td_engine *e, td_engine_stats *out);

#endif
