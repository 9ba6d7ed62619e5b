/* worker/model/image.h - bytes that are computed once per host: a file in the cache directory, mapped shared
 * and read-only by every process, or anonymous memory when there is no directory or it fails.
 *
 *   [header page: magic, version, key, sizes, boot, CRC][CRC32C of each MiB][data, page aligned]
 *
 * Rules:     1. A file is written under a temporary name and renamed when complete; it is never changed
 *               afterwards, except for the boot id.
 *            2. It is not synced, so a crash of the machine can leave holes in it: the header names the boot
 *               during which it was written or last verified. In that boot, opening checks the header and
 *               64 samples; in another one, every byte, on the pool.
 *            3. Processes that start together make it once: the others wait on a lock file, at most ten
 *               minutes.
 *            4. A directory keeps the images used last, up to a limit (prune.h). An image is held while it is mapped.
 *            5. A broken image is removed and made again; a directory that cannot be used costs a log line,
 *               not the start.
 * Threads:   one owner; the map is read by all.
 * Errors:    EFULL when there is no memory either. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_IMAGE_H
#define TD_WORKER_MODEL_IMAGE_H

#include "common/hash.h"
#include "common/pool.h"
#include "common/status.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef struct td_image_key {
    td_h128 model, plan; /* whose bytes, in which arrangement */
    uint32_t layout;     /* of the kernel family */
    uint32_t shard, n_shards;
    uint32_t pad_; /* keys are compared as bytes: no padding of the compiler's */
} td_image_key;

typedef struct td_image {
    const uint8_t *data; /* 64-byte aligned */
    size_t bytes;
    void *map;
    size_t map_bytes;
    bool shared, made; /* from the cache directory; filled by this call */
    int held;          /* shared: prune.h's descriptor, or -1 */
} td_image;

typedef void td_image_fill_fn(void *arg, uint8_t *data);

/* dir NULL: anonymous. limit: bytes of all images there; 0: none. fill is called at most once, on this thread, with `bytes` of zeroed memory. */
td_status td_image_open(td_image *im, const char *dir, uint64_t limit, const td_image_key *key, size_t bytes,
                        td_pool *pool, td_image_fill_fn *fill, void *arg);
void td_image_close(td_image *im);

#endif
