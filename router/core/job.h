/* router/core/job.h - what the API hands to the core for one prompt, and what the core hands back while it is
 * answered.
 *
 *   api (text pool) --td_job--> core --td_out*, then exactly one terminal td_out--> api (net thread)
 *
 * Rules:     1. Every td_job that entered td_core_step ends in exactly one terminal td_out (DONE or FAILED);
 *               nothing follows it.
 *            2. DELTAs of one choice are contiguous: offset is the number of that choice's tokens delivered
 *               before.
 *            3. The job's arena owns everything the job points to. The core frees the job (td_job_free).
 *            4. A td_out is one allocation; whoever receives it frees it with free().
 * Threads:   both move between threads; one owner at a time. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_CORE_JOB_H
#define TD_ROUTER_CORE_JOB_H

#include "common/arena.h"
#include "common/hash.h"
#include "common/sampling.h"
#include <stddef.h>

enum { TD_REQUEST_ID_MAX = 64 };

typedef struct td_job {
    td_arena arena;
    uint64_t id;                    /* unique in this router; the wire's Key.request */
    char name[TD_REQUEST_ID_MAX];   /* x-request-id, for logs */
    void *client;                   /* the API's object and its net thread; never looked into by the core */
    uint32_t net, part;             /* net thread; which prompt of the call this is */
    const uint32_t *prompt;
    uint32_t n_prompt;
    td_sampling sampling; /* stop_ids: the request's and the model folder's; the core adds the worker's EOS */
    bool max_tokens_open;           /* no limit was asked: the rest of the context */
    bool max_tokens_soft;           /* the limit is a default: shortened to the context without an error */
    const char *const *stop;        /* stop strings */
    uint32_t n_stop;
    bool include_stop;              /* keep the stop string in the text */
    bool skip_special;              /* no text for special tokens */
    bool want_text;
    const td_h128 *blocks;          /* hashes of the prompt's full blocks */
    uint32_t n_blocks;
    const void *salt;
    uint32_t salt_bytes;
    int64_t received_us, deadline_us; /* monotonic; deadline 0: none */
} td_job;

td_job *td_job_new(size_t arena_max_bytes);
void td_job_free(td_job *j);

/* Why a request failed; the API maps it to HTTP and gRPC statuses. */
#define TD_WHY_MAP(X)                                                                                        \
    X(NONE) X(BAD) X(TOO_LONG) X(QUEUE_FULL) X(NO_WORKER) X(DEADLINE) X(CANCELLED) X(DRAINING) X(INTERNAL)
typedef enum {
#define X(name) TD_WHY_##name,
    TD_WHY_MAP(X)
#undef X
} td_why;
const char *td_why_name(td_why w);

typedef struct td_usage { uint32_t prompt_tokens, completion_tokens, cached_tokens, placements; } td_usage;

/* Milliseconds; negative: did not happen. */
typedef struct td_timings {
    double queue_ms, prefill_ms, transfer_ms, transfer_exposed_ms, ttft_ms, second_token_ms, itl_ms_mean,
        itl_ms_p99, total_ms;
    uint64_t kv_bytes_shipped;
} td_timings;

typedef struct td_score { uint32_t id; float logprob; uint32_t n_top; const td_top *top; } td_score;

typedef enum { TD_OUT_PROMPT, TD_OUT_DELTA, TD_OUT_DONE, TD_OUT_FAILED } td_out_kind;

typedef struct td_out {
    void *client;
    uint64_t id;
    uint32_t net, part;
    td_out_kind kind;
    /* DELTA */
    uint32_t choice, offset, n_ids;
    const uint32_t *ids;
    const float *logprobs;          /* [n_ids] or NULL */
    const td_top *top;              /* [n_ids * n_top] */
    uint32_t n_top;
    const char *text;
    uint32_t text_len;
    td_finish finish;               /* not NONE: the choice's last delta */
    uint32_t stop_token;            /* with TD_FINISH_STOP and stop_string -1 */
    int stop_string;                /* index into the job's stop strings, or -1 */
    /* PROMPT: log probabilities of prompt positions 1 .. n_prompt-1 */
    const td_score *scores;
    uint32_t n_scores;
    /* DONE and FAILED */
    td_usage usage;
    td_timings timings;
    /* FAILED */
    td_why why;
    uint32_t retry_ms;              /* hint for Retry-After; 0: none */
    const char *reason;
} td_out;

#endif
