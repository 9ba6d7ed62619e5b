/* worker/model/prune.h - keeps a directory of images (image.h) within a limit: those that were opened longest ago
 * go first.
 *
 * Rules:   1. An image that a process holds (td_image_hold, for as long as it maps it) is never removed, nor are
 *             those of the model and arrangement that is being opened: the other shards of its worker.
 *          2. So the limit is a wish: what is in use, and what is to come, may be more than it.
 *          3. Files that a process left half made count as images, and go when nobody has written them for a day.
 *          4. A lock file (image.h) goes with its image, or when it has none; who holds it keeps it, and who locked one
 *             that is gone (td_image_is_at) locks the next.
 *          5. When it was opened last: its time of modification, which td_image_hold sets.
 * Threads: any, any number of processes. Errors: none; what cannot be read or removed stays. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_PRUNE_H
#define TD_WORKER_MODEL_PRUNE_H

#include <stdbool.h>
#include <stdint.h>

/* A descriptor that holds the image until it is closed; -1: there is none. */
int td_image_hold(const char *path);
/* Whether the file that fd has open is still the one of this name. */
bool td_image_is_at(int dir, const char *name, int fd);
/* Makes room for `want` bytes in limit (0: none is set). keep: how the names of the image's worker begin. */
void td_image_prune(const char *dir, uint64_t limit, uint64_t want, const char *keep);

#endif
