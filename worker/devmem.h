/* worker/devmem.h - memory where the kernels work: this host's (dev NULL: td_ops.dev of the CPU families), or a device's.
 *
 * Rules:     1. What alloc gives is 64-byte aligned; of a device only td_dev calls and kernels touch it.
 *            2. fetch is done on return, and comes after everything queued on the device before it.
 * Ownership: the caller frees with the same dev. Threads: any.
 * Errors:    EFULL with what was wanted; EDEVICE. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_DEVMEM_H
#define TD_WORKER_DEVMEM_H

#include "common/pool.h"
#include "kernels/dev.h"

/* Arrays that share a block begin at multiples of this. */
enum { TD_DEVMEM_PART = 256 };
static inline size_t td_devmem_padded(size_t bytes)
{
    return (bytes + TD_DEVMEM_PART - 1) / TD_DEVMEM_PART * TD_DEVMEM_PART;
}

/* what: for the error's text. */
td_status td_devmem_alloc(td_dev *dev, size_t bytes, const char *what, void **out);
void td_devmem_free(td_dev *dev, void *p); /* NULL: nothing */
td_status td_devmem_fetch(td_dev *dev, void *host, const void *src, size_t bytes);
/* Host memory -> memory of alloc; done on return. */
td_status td_devmem_put(td_dev *dev, void *dst, const void *host, size_t bytes);
/* The same for much of it, such as a mapped file: through two page-locked buffers, one filled by the pool while the other
 * is on its way. progress: NULL, or told of each buffer. */
td_status td_devmem_put_staged(td_dev *dev, td_pool *pool, void *dst, const void *host, size_t bytes,
                               void (*progress)(void *arg, const char *what, double fraction), void *arg);

/* A page-locked block of this host, filled and sent again and again on one stream. {0} is closed: nothing to wait for or
 * to close. It is written, or closed, once its last transfer is over. */
typedef struct td_devmem_post {
    uint8_t *host;
    size_t bytes;
    td_stream_kind stream;
    td_event *sent; /* its last transfer; before the first: it was opened */
} td_devmem_post;

td_status td_devmem_post_open(td_dev *dev, td_stream_kind stream, size_t bytes, td_devmem_post *p);
void td_devmem_post_close(td_dev *dev, td_devmem_post *p);
/* Until it may be filled again. */
td_status td_devmem_post_wait(td_dev *dev, const td_devmem_post *p);
/* Its first `bytes`. */
td_status td_devmem_post_send(td_dev *dev, void *dst, const td_devmem_post *p, size_t bytes);

#endif
