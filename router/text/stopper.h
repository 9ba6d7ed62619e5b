/* router/text/stopper.h - stop strings over streaming text.
 *
 * Text goes in, in pieces of any size, and comes out as soon as it cannot be part of a stop string. The match
 * is the stop string that is complete first; of several that end at the same byte, the longest. So the result
 * does not depend on how the text was cut.
 * Model: an Aho-Corasick automaton; what is held back is exactly the path of the current node, so the state
 * is one number.
 * Rules:     1. Pieces of whole characters in give pieces of whole characters out: a held part starts where a
 *               stop string starts.
 *            2. After a match nothing more comes out.
 * Threads:   a td_stopper is const; a td_stop_state is plain data of one stream: copy it to fork.
 * Limits:    16 stop strings of 1 to 256 bytes. Cost: constant a byte, amortized.
 * Source:    Aho, Corasick, Efficient String Matching (CACM 1975). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_TEXT_STOPPER_H
#define TD_ROUTER_TEXT_STOPPER_H

#include "common/buf.h"
#include "common/status.h"
#include <stdint.h>

enum { TD_STOPPER_STRINGS = 16, TD_STOPPER_BYTES = 256 };

typedef struct td_stopper td_stopper;
typedef struct td_stop_state {
    uint16_t node;
    bool matched;
    uint8_t which; /* index of the stop string, once matched */
} td_stop_state;   /* zero: start of text */

/* n_bytes NULL: NUL-terminated. TD_EBADREQ: empty or too long or too many. */
td_status td_stopper_open(const char *const *strings, const size_t *n_bytes, size_t count, td_stopper **out);
void td_stopper_close(td_stopper *s);
/* Appends the text let out; true: a stop string is complete (its text is let out too with include_stop). s
 * NULL: no stop strings. */
bool td_stopper_push(const td_stopper *s, td_stop_state *st, const char *p, size_t n, bool include_stop,
                     td_buf *out);
/* End of text: what was held back comes out. */
void td_stopper_flush(const td_stopper *s, td_stop_state *st, td_buf *out);

#endif
