/* router/net/head.h - the head of one request: method, path, query, headers; the same for both protocols.
 *
 * Rules:     1. Everything is a NUL-terminated string inside `text`; the rest are offsets, so it may grow.
 *            2. Names are lower case. Of repeated names, get() returns the first; framing headers may not
 *               repeat.
 * Ownership: the owner of the struct. Threads: one owner. Limits: TD_HEAD_MAX headers, max_bytes of text. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_NET_HEAD_H
#define TD_ROUTER_NET_HEAD_H

#include "common/buf.h"
#include <stdbool.h>
#include <stdint.h>

#define TD_HEAD_MAX 100

typedef struct td_head {
    td_buf text;
    uint32_t method, path, query; /* offsets into text; 0: not seen, the empty string */
    uint32_t name[TD_HEAD_MAX], value[TD_HEAD_MAX];
    int n;
} td_head;

void td_head_init(td_head *h, size_t max_bytes);
void td_head_deinit(td_head *h);
void td_head_move(td_head *to, td_head *from); /* `to` must be empty; `from` is left as after deinit */
uint32_t td_head_put(td_head *h, const char *s, size_t n); /* store one string, return its offset */
/* False: TD_HEAD_MAX headers or max_bytes reached. */
bool td_head_add(td_head *h, const char *name, size_t nn, const char *value, size_t nv);
const char *td_head_at(const td_head *h, uint32_t offset);
const char *td_head_get(const td_head *h, const char *lower_name); /* NULL if absent */
/* Split an origin-form or absolute-form target ("http://host/p?q") into path and query. False: neither. */
bool td_head_target(td_head *h, const char *target, size_t n);

#endif
