/* tests/text/support_folder.h - throw-away model folders and the shared data, for the C tests of router/text.
 * */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_TEXT_SUPPORT_FOLDER_H
#define TD_TESTS_TEXT_SUPPORT_FOLDER_H

#include <stddef.h>

/* A new empty folder under the system's temporary one; removed with its files by folder_drop(). */
const char *folder_new(void);
void folder_write(const char *dir, const char *name, const char *text, size_t n); /* n 0: strlen */
void folder_drop(const char *dir);
/* Whole file, NUL-terminated, to be freed; NULL if it is not there. */
char *file_text(const char *path, size_t *n);

/* A small byte-level tokenizer.json: all byte characters, a few merges, <s> </s> <|end|> special and <x> not.
 * `extra` (may be "") is put in front of the members, so it can override any of them: JSON readers keep the
 * last, this one too, so it goes last. */
char *small_tokenizer(const char *extra);

#endif
