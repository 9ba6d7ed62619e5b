/* router/api/textpool.h - threads for work that may take milliseconds: JSON, templates, tokenizing. Never on
 * net or core.
 *
 * Rules:   1. Bounded: submit refuses when max_jobs wait (the client gets 503). First come, first served.
 *          2. Jobs that wait at close are run, so that nobody waits for an answer for ever.
 * Threads: submit from any; fn runs on a pool thread. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_API_TEXTPOOL_H
#define TD_ROUTER_API_TEXTPOOL_H

#include <stdbool.h>

typedef struct td_textpool td_textpool;

td_textpool *td_textpool_open(int threads, int max_jobs);
void td_textpool_close(td_textpool *p);
bool td_textpool_submit(td_textpool *p, void (*fn)(void *), void *arg);
int td_textpool_waiting(td_textpool *p);

#endif
