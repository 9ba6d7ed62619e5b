/* router/core/admit.h - the bounded queue in front of the workers: first come, first served.
 *
 * Requests wait here and not in the workers, so that a cancelled one costs nothing and a late worker gets
 * work at once.
 * Rules:     1. push refuses at `max` (the client gets 429). A request that lost its worker goes back to its
 *               place by arrival, whatever the length: it was admitted once.
 * Ownership: the links are in the request; the queue owns nothing. Threads: core. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_CORE_ADMIT_H
#define TD_ROUTER_CORE_ADMIT_H

#include "router/core/request.h"

typedef struct td_list { td_request *first, *last; uint32_t n; } td_list;

void td_list_add(td_list *l, td_request *r);
void td_list_remove(td_list *l, td_request *r);

bool td_admit_push(td_list *q, td_request *r, uint32_t max);
void td_admit_again(td_list *q, td_request *r); /* by arrival */

#endif
