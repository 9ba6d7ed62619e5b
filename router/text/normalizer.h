/* router/text/normalizer.h - the "normalizer" of tokenizer.json: text in, text out.
 *
 * Taken: Sequence, NFC, NFD, NFKC, NFKD, Lowercase, Prepend, Replace (String or Regex), Strip, StripAccents,
 * ByteLevel. Everything else is refused by name. Steps are flattened into one list at opening.
 * Threads: const after opening; the td_match belongs to the caller's thread. Limits: 32 steps; output by the
 *          buffer's max. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_TEXT_NORMALIZER_H
#define TD_ROUTER_TEXT_NORMALIZER_H

#include "common/buf.h"
#include "common/json.h"
#include "router/text/regex.h"

typedef struct td_normalizer td_normalizer;

/* node: the JSON value (NULL or null: identity); file names it in errors. */
td_status td_normalizer_open(const td_json *node, const char *file, td_normalizer **out);
void td_normalizer_close(td_normalizer *z);
bool td_normalizer_identity(const td_normalizer *z);
/* out (reset first) receives the text; tmp is scratch. */
td_status td_normalizer_run(const td_normalizer *z, td_match *m, const char *p, size_t n, td_buf *out,
                            td_buf *tmp);

/* A {"String": s} or {"Regex": s} pattern, shared with the pre-tokenizers and decoders. */
typedef struct td_pattern {
    char *literal; /* NULL: use regex */
    size_t n;
    td_regex *regex;
} td_pattern;
td_status td_pattern_open(const td_json *node, const char *file, td_pattern *out);
void td_pattern_close(td_pattern *p);
/* TD_AGAIN: no match. An empty match is possible for a regex only. */
td_status td_pattern_find(const td_pattern *p, td_match *m, const char *text, size_t n, size_t from,
                          size_t *start, size_t *end);
/* Append text with every match replaced by `by`. */
td_status td_pattern_replace(const td_pattern *p, td_match *m, const char *text, size_t n, const char *by,
                             size_t by_n, td_buf *out);

/* The printable stand-in of each byte in byte-level vocabularies, as UTF-8; and back (-1: not a stand-in). */
void td_bytelevel_add(td_buf *b, const char *p, size_t n);
int td_bytelevel_byte(uint32_t cp);
uint32_t td_bytelevel_char(unsigned char byte);

#endif
