/* worker/model/file.h - files of a model folder: map, read, write through a temporary name.
 *
 * Rules:     1. Reasons carry the name the caller gives, not the path.
 *            2. Only regular files are read (a FIFO would block the start).
 * Threads:   any. Errors: EIO; EFULL over the limit. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_FILE_H
#define TD_WORKER_MODEL_FILE_H

#include "common/status.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

td_status td_file_path(char *out, size_t cap, const char *dir, const char *name);
bool td_file_exists(const char *path);
/* Map read-only; *p is NULL for an empty file. */
td_status td_file_map(const char *path, const char *name, const uint8_t **p, size_t *bytes);
/* The whole file, NUL-terminated; the caller frees. */
td_status td_file_read(const char *path, const char *name, size_t max_bytes, char **text, size_t *n);
/* A new file beside `path` with a name of its own in tmp, then td_file_finish renames it to path, or removes
 * it if !ok. */
td_status td_file_create_beside(const char *path, char *tmp, size_t cap, FILE **out);
td_status td_file_finish(FILE *f, const char *tmp, const char *path, bool ok);

#endif
