/* router/api/call.h - one client call from its request to its answer; a call has one job per prompt.
 *
 *   PARSING --jobs made--> RUNNING --all terminal--> freed
 *      \--error--> answered, freed              voice: how the answer is spoken (OpenAI JSON, gRPC)
 *
 * Rules:     1. x is NULL once the client has left or has its whole answer.
 *            2. Voices are called on the net thread with x set, never after done or fail.
 * Ownership: the call owns its arena and buffers; jobs go to the core. Threads: api.h rule 1. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_API_CALL_H
#define TD_ROUTER_API_CALL_H

#include "common/vocab.h"
#include "router/api/api.h"

typedef struct td_voice {
    void (*out)(td_call *c, const td_out *o);               /* DELTA or PROMPT */
    void (*done)(td_call *c, const td_out *last);           /* every job is DONE */
    void (*fail)(td_call *c, const td_api_error *e);        /* the answer is an error */
    void (*quiet)(td_call *c); /* nothing was sent for keepalive_s; NULL: nothing to do */
} td_voice;

typedef enum { TD_CALL_PARSING, TD_CALL_RUNNING, TD_CALL_REPORT } td_call_state;
typedef enum {
    TD_TEXT_CHAT,
    TD_TEXT_COMPLETION,
    TD_TEXT_TOKENIZE,
    TD_TEXT_DETOKENIZE,
    TD_TEXT_GRPC
} td_text_kind;

/* One choice of one prompt, as far as it has been told. */
typedef struct td_answer {
    td_buf text;                 /* whole answer, or nothing when streaming */
    uint32_t *ids;
    uint32_t n_ids, cap_ids;
    td_buf lp[4]; /* JSON of log probabilities: chat uses [0]; completions tokens, values, top, offsets */
    uint32_t lp_chars;           /* text_offset so far */
    bool told_role;
    td_finish finish;
    uint32_t stop_token;
    int stop_string;
} td_answer;

struct td_call {
    td_api_net *n;
    td_exchange *x;
    td_call *next, *prev;
    td_call_state state;
    td_text_kind kind;
    const td_voice *voice;
    char id[48], request_id[TD_REQUEST_ID_MAX];
    td_buf body;                 /* the request: freed when parsed */
    td_arena arena;              /* what outlives parsing */
    td_ask ask;                  /* its pointers into the body are gone after parsing, except stop */
    td_api_error err;
    bool failed;                 /* parsing: answer err */
    td_job **jobs;               /* until they are submitted */
    uint64_t *job_ids;
    uint32_t n_jobs, n_open;     /* n_open: without a terminal td_out */
    bool *job_done;
    const char **echo;           /* [n_jobs] text of the prompt, when echoed */
    td_answer *parts;              /* [n_jobs * n] */
    td_buf scores;               /* JSON prompt_logprobs, parts joined by commas */
    td_buf *echo_lp;             /* [n_jobs][4]: completions' logprobs of the echoed prompt */
    const uint32_t **prompt_ids; /* [n_jobs] when return_token_ids */
    uint32_t *n_prompt_ids;
    td_usage usage;
    td_timings timings;          /* of the slowest prompt */
    td_buf reply;                /* TOKENIZE, DETOKENIZE: the answer made by the text thread */
    td_out *held;                /* the last finishing delta, waiting for DONE and its timings */
    int64_t received_us, deadline_us, wrote_us, created;
    void *grpc;                  /* grpc.c's own */
};

td_call *td_call_new(td_api_net *n, td_exchange *x, td_text_kind kind, const td_voice *v);
void td_call_free(td_call *c);
/* Copy the body and give the call to the text pool; answers 503 when it is full. */
void td_call_parse(td_call *c);
/* parse.c, on a text thread: fills jobs or err or reply. */
void td_call_parse_text(td_call *c);
/* The client is told; x is forgotten, jobs still open are cancelled. */
void td_call_over(td_call *c);
void td_call_cancel(td_call *c);
void td_call_on_out(td_call *c, td_out *o); /* takes o */
/* From the text pool or the core: answer a metrics or ledger request on the net thread. */
void td_call_report(void *ask);
/* Make jobs of what was asked; ids are in the arena given. Used by parse.c and grpc.c. */
bool td_call_make_jobs(td_call *c, const uint32_t *const *ids, const uint32_t *n_ids, uint32_t n_prompts);
/* The whole answer as headers and body. */
void td_call_reply(td_call *c, int status, const char *type, const td_buf *body);
void td_call_reply_error(td_call *c, const td_api_error *e);

#endif
