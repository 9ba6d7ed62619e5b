/* worker/model/prune.h - keeps a directory of images (image.h) within a limit: those that were opened longest ago
 * go first.
 *
 * Rules:   1. An image that a process holds (td_image_hold, for as long as it maps it) is never removed, nor are
 *             those of the model and arrangement that is being opened: the other shards of its worker.
 *          2. So the limit is a wish: what is in use, and what is to come, may be more than it.
 *          3. Files that a process left half made count as images, and go when nobody has written them for a day.
 *          4. When it was opened last: its time of modification, which td_image_hold sets.
 * Threads: any, any number of processes. Errors: none; what cannot be read or removed stays. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_PRUNE_H
#define TD_WORKER_MODEL_PRUNE_H

#include <stdint.h>

/* A descriptor that holds the image until it is closed; -1: there is none. */
int td_image_hold(const char *path);
/* Makes room for `want` bytes in limit (0: none is set). keep: how the names of the image's worker begin. */
void td_image_prune(const char *dir, uint64_t limit, uint64_t want, const char *keep);

#endif
