// SPDX-License-Identifier: Apache-2.0
#include "common/check.h"
#include "router/text/stopper.h"
#include <stdlib.h>
#include <string.h>

enum { NODES = TD_STOPPER_STRINGS * TD_STOPPER_BYTES + 1, NONE = 255 };

typedef struct node {
    uint16_t child, sibling; /* 0: none; node 0 is the root */
    uint16_t fail;           /* node of the longest proper suffix */
    uint16_t depth;
    uint8_t path; /* the node's text is string[path][0, depth) */
    uint8_t stop; /* longest stop string that ends here, or NONE */
    unsigned char byte;
} node;

struct td_stopper {
    uint16_t n;
    char *string[TD_STOPPER_STRINGS];
    size_t len[TD_STOPPER_STRINGS];
    node *node;
};

static uint16_t child(const td_stopper *s, uint16_t at, unsigned char c)
{
    uint16_t k = s->node[at].child;
    while (k && s->node[k].byte != c) k = s->node[k].sibling;
    return k;
}

static void add_string(td_stopper *s, uint8_t which)
{
    uint16_t at = 0;
    for (size_t i = 0; i < s->len[which]; i++) {
        unsigned char c = (unsigned char)s->string[which][i];
        uint16_t k = child(s, at, c);
        if (!k) {
            k = s->n++;
            s->node[k] = (node){.sibling = s->node[at].child,
                                .depth = (uint16_t)(i + 1),
                                .path = which,
                                .stop = NONE,
                                .byte = c};
            s->node[at].child = k;
        }
        at = k;
    }
    if (s->node[at].stop == NONE) s->node[at].stop = which; /* of equal strings the first */
}

static uint16_t step(const td_stopper *s, uint16_t at, unsigned char c)
{
    for (;;) {
        uint16_t k = child(s, at, c);
        if (k || !at) return k;
        at = s->node[at].fail;
    }
}

/* Suffix links, breadth first. A node without a stop string of its own takes that of its suffix. */
static void link_nodes(td_stopper *s)
{
    uint16_t queue[NODES], head = 0, tail = 0;
    queue[tail++] = 0;
    while (head < tail) {
        uint16_t at = queue[head++];
        for (uint16_t k = s->node[at].child; k; k = s->node[k].sibling) {
            s->node[k].fail = at ? step(s, s->node[at].fail, s->node[k].byte) : 0;
            if (s->node[k].stop == NONE) s->node[k].stop = s->node[s->node[k].fail].stop;
            queue[tail++] = k;
        }
    }
}

td_status td_stopper_open(const char *const *strings, const size_t *n_bytes, size_t count, td_stopper **out)
{
    size_t total = 1;
    if (count > TD_STOPPER_STRINGS)
        return td_refuse(TD_EBADREQ, "stop: %zu strings, at most %d", count, TD_STOPPER_STRINGS);
    for (size_t i = 0; i < count; i++) {
        size_t n = n_bytes ? n_bytes[i] : strlen(strings[i]);
        if (!n || n > TD_STOPPER_BYTES)
            return td_refuse(TD_EBADREQ, "stop: string %zu has %zu bytes, allowed are 1 to %d", i, n,
                             TD_STOPPER_BYTES);
        total += n;
    }
    td_stopper *s = td_xalloc(sizeof *s);
    s->node = td_xalloc(total * sizeof(node));
    s->node[0].stop = NONE;
    s->n = 1;
    for (size_t i = 0; i < count; i++) {
        s->len[i] = n_bytes ? n_bytes[i] : strlen(strings[i]);
        s->string[i] = td_xstrndup(strings[i], s->len[i]);
        add_string(s, (uint8_t)i);
    }
    link_nodes(s);
    *out = s;
    return TD_OK;
}

void td_stopper_close(td_stopper *s)
{
    if (!s) return;
    for (int i = 0; i < TD_STOPPER_STRINGS; i++) free(s->string[i]);
    free(s->node);
    free(s);
}

bool td_stopper_push(const td_stopper *s, td_stop_state *st, const char *p, size_t n, bool include_stop,
                     td_buf *out)
{
    if (st->matched) return true;
    if (!s) {
        td_buf_add(out, p, n);
        return false;
    }
    size_t from = 0; /* bytes of p before it are let out or held in the path */
    uint16_t at = st->node;
    uint16_t before = s->node[at].depth; /* held bytes that stand before p[0] */
    const char *held = s->string[s->node[at].path];
    size_t held_at = 0;
    for (size_t i = 0; i < n; i++) {
        at = step(s, at, (unsigned char)p[i]);
        const node *x = &s->node[at];
        size_t all = before - held_at + (i + 1 - from), keep = x->depth;
        if (x->stop != NONE) keep = include_stop ? 0 : s->len[x->stop];
        /* Let out all but the last `keep` bytes: first what was held, then from p. */
        size_t go = x->stop == NONE && s->node[at].depth && i + 1 < n ? 0 : all - keep;
        size_t old = TD_MIN(go, before - held_at);
        td_buf_add(out, held + held_at, old);
        held_at += old;
        td_buf_add(out, p + from, go - old);
        from += go - old;
        if (x->stop != NONE) {
            st->matched = true;
            st->which = x->stop;
            return true;
        }
    }
    st->node = at;
    return false;
}

void td_stopper_flush(const td_stopper *s, td_stop_state *st, td_buf *out)
{
    if (!s || st->matched) return;
    td_buf_add(out, s->string[s->node[st->node].path], s->node[st->node].depth);
    st->node = 0;
}
