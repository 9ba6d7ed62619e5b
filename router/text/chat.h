/* router/text/chat.h - a model folder's chat template, applied to a request's messages.
 *
 * The template is, in this order: the override file; chat_template.jinja; chat_template of
 * tokenizer_config.json (a string, or a list of {name, template}); chat_template.json. With tools, one named
 * "tool_use" is preferred where there is one.
 * Rules:     1. Variables are those transformers gives: messages, tools and documents (null when absent),
 *               add_generation_prompt, bos_token, eos_token ("" when absent), unk_token, pad_token, then the
 *               request's own, which cannot replace these.
 *            2. Messages arrive in OpenAI's shape and are brought to the template's: it is tried at opening
 *               with made-up messages to learn whether it takes a list of parts as content (else text parts
 *               are joined by line breaks) and whether it takes tool call arguments as an object (else as
 *               JSON text). Absent or null content becomes "".
 *            3. Render, then encode with parse_special and without add_special: the template writes BOS
 *               itself.
 * Threads:   const after opening. Errors: jinja.h's; TD_AGAIN from open: the folder has no template.
 * Limits:    template 1 MiB; the arena's max bounds values, the buffer's max the text. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_TEXT_CHAT_H
#define TD_ROUTER_TEXT_CHAT_H

#include "common/json.h"
#include "router/text/tokenizer.h"

typedef struct td_chat td_chat;

/* override_file: a path; NULL or "": none. t: for bos and eos, borrowed while opening only; may be NULL. */
td_status td_chat_open(const char *model_dir, const char *override_file, const td_tokenizer *t,
                       td_chat **out);
void td_chat_close(td_chat *c);
bool td_chat_takes_parts(const td_chat *c);
bool td_chat_takes_argument_objects(const td_chat *c);
/* messages: an array. tools, extra (an object): NULL or JSON null when absent. The text is appended to out.
 * */
td_status td_chat_render(const td_chat *c, const td_json *messages, const td_json *tools,
                         const td_json *extra, bool add_generation_prompt, td_arena *a, td_buf *out);

#endif
