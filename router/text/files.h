/* router/text/files.h - reading the small files of a model folder. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_TEXT_FILES_H
#define TD_ROUTER_TEXT_FILES_H

#include "common/json.h"

enum { TD_FILES_MAX_MIB = 256 };

/* Whole file into memory the caller frees; dir may be NULL (name is a path). TD_AGAIN: no such file (nothing
 * logged). */
td_status td_files_read(const char *dir, const char *name, char **text, size_t *n);
/* The same, parsed into the arena; *out NULL with TD_AGAIN when absent. */
td_status td_files_json(const char *dir, const char *name, td_arena *a, td_json **out);

#endif
