/* router/text/chat.h - a model folder's chat template: messages -> prompt text.
 *
 * Taken from, in this order: the file given (--chat-template); chat_template.jinja; chat_template of tokenizer_config.json, a string or a list of
 * {name, template} ("tool_use" when tools are given and it exists, else "default").
 * The template sees messages, tools, add_generation_prompt, bos_token, eos_token, and the call's extra variables, as with transformers.
 *
 * Rules:     1. Content given as a list of parts {"type": "text", "text": ...} reaches a template that only knows strings as their texts joined;
 *               templates that mention content parts themselves get the list.
 * Threads:   const after open: any number render at once. Errors: those of jinja.h; TD_AGAIN from open: the folder has no template. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_TEXT_CHAT_H
#define TD_ROUTER_TEXT_CHAT_H

#include "router/text/jinja.h"
#include "router/text/tokenizer.h"

typedef struct td_chat td_chat;

td_status td_chat_open(const char *model_dir, const char *override_file, const td_tokenizer *t, td_chat **out);
void td_chat_close(td_chat *c);
/* tools, extra: NULL or null: none. extra: an object of further variables. */
td_status td_chat_render(const td_chat *c, const td_json *messages, const td_json *tools, const td_json *extra, bool add_generation_prompt,
                         td_arena *a, td_buf *out);

#endif
