// SPDX-License-Identifier: Apache-2.0
#include "worker/devmem.h"
#include <stdlib.h>
#include <string.h>

td_status td_devmem_alloc(td_dev *dev, size_t bytes, const char *what, void **out)
{
    if (dev) return dev->alloc(dev, bytes, out);
    void *p = bytes > SIZE_MAX - 64 ? NULL : aligned_alloc(64, (bytes + 64) / 64 * 64);
    if (!p) return td_fail(TD_EFULL, "no memory for %s: %zu bytes", what, bytes);
    *out = p;
    return TD_OK;
}

void td_devmem_free(td_dev *dev, void *p)
{
    if (p && dev) dev->free(dev, p);
    else free(p);
}

td_status td_devmem_fetch(td_dev *dev, void *host, const void *src, size_t bytes)
{
    if (dev) {
        TD_TRY(dev->download(dev, TD_STREAM_COMPUTE, host, src, bytes));
        return dev->sync(dev, TD_STREAM_COMPUTE);
    }
    if (bytes) memcpy(host, src, bytes);
    return TD_OK;
}

td_status td_devmem_put(td_dev *dev, void *dst, const void *host, size_t bytes)
{
    if (dev) {
        TD_TRY(dev->upload(dev, TD_STREAM_COMPUTE, dst, host, bytes));
        return dev->sync(dev, TD_STREAM_COMPUTE);
    }
    if (bytes) memcpy(dst, host, bytes);
    return TD_OK;
}
