/* router/core/admit.c - lists of requests. */
// SPDX-License-Identifier: Apache-2.0
#include "router/core/admit.h"

/* Insert before `at` (NULL: at the end). */
static void insert(td_list *l, td_request *r, td_request *at)
{
    r->next = at;
    r->prev = at ? at->prev : l->last;
    if (r->prev) r->prev->next = r;
    else l->first = r;
    if (at) at->prev = r;
    else l->last = r;
    l->n++;
}

void td_list_add(td_list *l, td_request *r) { insert(l, r, NULL); }

void td_list_remove(td_list *l, td_request *r)
{
    if (r->prev) r->prev->next = r->next;
    else l->first = r->next;
    if (r->next) r->next->prev = r->prev;
    else l->last = r->prev;
    r->next = r->prev = NULL;
    l->n--;
}

bool td_admit_push(td_list *q, td_request *r, uint32_t max)
{
    if (q->n >= max) return false;
    td_list_add(q, r);
    r->queued = true;
    return true;
}

void td_admit_again(td_list *q, td_request *r)
{
    td_request *at = q->first;
    while (at && at->arrived_us <= r->arrived_us) at = at->next;
    insert(q, r, at);
    r->queued = true;
}
