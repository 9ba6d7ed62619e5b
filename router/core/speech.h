/* router/core/speech.h - the text of a request's choices: tokens through detokenizer and stop strings.
 *
 * Rules: 1. Text that may be the start of a stop string, or half a character, is held back until it is
 *           decided.
 *        2. After a match only the text up to it (with the stop string if the job says so) has come out;
 *           nothing follows.
 * Ownership: one per request; tokenizer and job must outlive it. Threads: core. Limits: those of
 *            router/text/stopper.h. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_CORE_SPEECH_H
#define TD_ROUTER_CORE_SPEECH_H

#include "common/buf.h"
#include "router/core/job.h"
#include "router/text/tokenizer.h"

typedef struct td_speech td_speech;

td_speech *td_speech_open(const td_tokenizer *t, const td_job *job);
void td_speech_close(td_speech *s);
int td_speech_push(td_speech *s, uint32_t choice, uint32_t id,
                   td_buf *out); /* index of the stop string that matched, or -1 */
int td_speech_end(td_speech *s, uint32_t choice,
                  td_buf *out); /* no more tokens: what was held back comes out */

#endif
