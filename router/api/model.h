/* router/api/model.h - what the router knows of the model folder: text and defaults, never weights.
 *
 * Reads config.json (vocabulary, context), generation_config.json (sampling defaults, end ids), the tokenizer
 * and the chat template. Without a tokenizer the server takes token ids only.
 * Threads: read-only after opening. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_API_MODEL_H
#define TD_ROUTER_API_MODEL_H

#include "common/conf.h"
#include "router/api/params.h"
#include "router/text/tokenizer.h"

enum { TD_API_MAX_STOPS = 32 };

typedef struct td_api_model {
    char name[256];
    td_tokenizer *tokenizer;       /* NULL: token ids only */
    struct td_chat *chat;          /* NULL: no chat template */
    td_defaults defaults;
    uint32_t vocab, max_len;       /* 0: not known here */
    uint32_t stops[TD_API_MAX_STOPS], n_stops; /* ids that end a text */
    int64_t created;
} td_api_model;

td_status td_api_model_open(td_api_model *m, const td_conf *c);
void td_api_model_close(td_api_model *m);
/* The chat as text. False: *err. */
bool td_api_model_render(const td_api_model *m, const td_ask *ask, td_arena *a, td_buf *out,
                         td_api_error *err);
/* Text to ids. False: *err. */
bool td_api_model_encode(const td_api_model *m, const char *text, size_t n, bool add_special, td_arena *a,
                         const uint32_t **ids, uint32_t *n_ids, td_api_error *err);
/* The text of ids, whole. */
void td_api_model_decode(const td_api_model *m, const uint32_t *ids, uint32_t n, bool skip_special,
                         td_buf *out);
/* Bytes of one token; "" if there is no tokenizer. */
const char *td_api_model_piece(const td_api_model *m, uint32_t id, size_t *n);

#endif
