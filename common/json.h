/* common/json.h - strict, bounded JSON (RFC 8259) into a tree in an arena.
 *
 * Rules:    1. Text must be valid UTF-8 and escapes well-formed UTF-16; duplicate keys: the last value wins,
 *              at the first one's place.
 *            2. Limits: depth, nodes, and the arena's bytes; over a limit is EFULL, bad syntax EPROTO;
 *               td_reason() has "line L column C: what".
 *            3. Getters never fail: a missing or differently typed member yields NULL or the default.
 * Ownership: nodes and strings live in the arena; the source text is not referenced afterwards.
 * Threads:   pure. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_JSON_H
#define TD_COMMON_JSON_H

#include "common/arena.h"
#include "common/buf.h"
#include "common/status.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef enum {
    TD_JSON_NULL, TD_JSON_BOOL, TD_JSON_INT, TD_JSON_REAL, TD_JSON_STR, TD_JSON_ARR, TD_JSON_OBJ
} td_json_type;

typedef struct td_json {
    td_json_type type;
    uint32_t n;                  /* elements or members; bytes of s */
    struct td_json *child;       /* first element/member */
    struct td_json *next;        /* next sibling */
    const char *key;             /* member name (NUL-terminated), else NULL */
    uint32_t key_len;
    bool truth;
    int64_t i;                   /* TD_JSON_INT: integer that fits i64 (1.0 and 1e3 are REAL) */
    double num;                  /* INT and REAL */
    const char *s;               /* STR: unescaped, NUL-terminated (may hold NULs: use n); REAL: as written */
} td_json;

typedef struct td_json_limits { int max_depth; size_t max_nodes; } td_json_limits; /* 0: 64 and 4 million */

td_status td_json_parse(td_arena *a, const char *text, size_t n, td_json_limits lim, td_json **out);
const td_json *td_json_get(const td_json *obj, const char *key); /* NULL if absent or not an object */
const td_json *td_json_at(const td_json *arr, size_t i);         /* O(i): iterate with child/next instead */
const char *td_json_str(const td_json *obj, const char *key, const char *dflt);
int64_t td_json_int(const td_json *obj, const char *key, int64_t dflt);
double td_json_num(const td_json *obj, const char *key, double dflt);
bool td_json_bool(const td_json *obj, const char *key, bool dflt);
bool td_json_is_null(const td_json *v); /* absent or null */
/* Serialize as Python's json.dumps(ensure_ascii=False) does: ", " and ": " separators, or indented when
 * indent > 0. */
void td_json_write(td_buf *b, const td_json *v, int indent);

#endif
