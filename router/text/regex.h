/* router/text/regex.h - the patterns of tokenizer.json, run by PCRE2 with limits. The only user of pcre2.h.
 *
 * Patterns are written for Oniguruma (Ruby syntax) there. What differs is rewritten on opening: \s and \w
 * mean Oniguruma's sets, ^ and $ match at lines. A pattern PCRE2 does not take is TD_ENOSUP with its message.
 * Rules:     1. Text must be valid UTF-8.
 *            2. Steps and heap of one match are bounded; over them is TD_EBADREQ.
 * Threads:   a td_regex is const after opening; a td_match belongs to one thread.
 * Limits:    pattern 64 KiB, 20 million steps, 64 MiB heap a match. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_TEXT_REGEX_H
#define TD_ROUTER_TEXT_REGEX_H

#include "common/status.h"
#include <stddef.h>

typedef struct td_regex td_regex;
typedef struct td_match td_match; /* scratch of one thread */

td_status td_regex_open(const char *pattern, size_t n, td_regex **out);
void td_regex_close(td_regex *r);
td_match *td_match_open(void);
void td_match_close(td_match *m);
/* First match in text[from, n): TD_OK and its range, or TD_AGAIN when there is none. */
td_status td_regex_find(const td_regex *r, td_match *m, const char *text, size_t n, size_t from,
                        size_t *start, size_t *end);

#endif
