/* router/api/params.h - the body of a chat or text completion request, checked and in our own terms. No
 * tokenizing here.
 *
 * Every field is one of: served; accepted without effect (user, metadata ...); known but not served: 400
 * unsupported_parameter unless its value asks for nothing (null, false, empty, "auto" ...); unknown: ignored
 * and counted. Nothing we know is silently ignored.
 * Rules:     1. Values come from the request, then generation_config.json, then OpenAI's defaults.
 *            2. Types are strict: "1" is not a number, 1.5 is not a count.
 * Ownership: results point into the body's tree and the arena. Threads: pure.
 * Limits:    TD_ASK_PROMPTS prompts, TD_ASK_STOP_BYTES per stop string, and those of common/sampling.h. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_API_PARAMS_H
#define TD_ROUTER_API_PARAMS_H

#include "common/json.h"
#include "common/sampling.h"
#include "router/api/error.h"

enum {
    TD_ASK_PROMPTS = 256,
    TD_ASK_STOP_BYTES = 256,
    TD_ASK_SALT_BYTES = 256,
    TD_ASK_SEQUENCES = 1024,
    TD_ASK_MESSAGES = 4096
};

typedef enum { TD_ASK_CHAT = 1, TD_ASK_COMPLETION = 2 } td_ask_kind;

/* generation_config.json; NAN: not there. */
typedef struct td_defaults { double temperature, top_p, top_k, min_p, repetition_penalty; } td_defaults;
td_defaults td_defaults_none(void);

typedef struct td_prompt {
    const char *text;
    size_t n_text;
    const uint32_t *ids;
    uint32_t n_ids;
} td_prompt; /* text NULL: ids */

typedef struct td_ask {
    td_ask_kind kind;
    const char *model;               /* NULL: not named */
    td_sampling s;                   /* stop_ids: the request's only; EOS is added by who knows the model */
    bool seed_given;
    bool max_tokens_given;           /* else: completions 16, chat the rest of the context */
    bool drop_output;                /* max_tokens 0 with echo: only the prompt is wanted */
    bool stream, include_usage, continuous_usage;
    bool echo, logprobs, prompt_logprobs; /* what the answer shows */
    int top_logprobs;
    bool return_token_ids, tokens_as_ids, skip_special, add_special, include_stop;
    const char *const *stop;
    uint32_t n_stop;
    const td_prompt *prompts;        /* completion */
    uint32_t n_prompts;
    const td_json *messages, *tools, *template_kwargs; /* chat; documents are among the kwargs */
    bool add_generation_prompt;
    const char *salt;
    uint32_t unknown;                /* fields nobody knows */
} td_ask;

/* False: *err says what to answer. vocab 0: token ids are not checked here. */
bool td_ask_parse(td_ask_kind kind, const td_json *body, const td_defaults *d, uint32_t vocab, td_arena *a,
                  td_ask *out, td_api_error *err);
/* The messages array alone: roles present, content text or text parts. */
bool td_ask_messages(const td_json *messages, td_api_error *err);
/* An array of token ids. */
bool td_ask_ids(const td_json *v, const char *param, uint32_t vocab, td_arena *a, const uint32_t **ids,
                uint32_t *n, td_api_error *err);

#endif
