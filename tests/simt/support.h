/* tests/simt/support.h - what every test of CUDA kernels needs: the device, blocks on it filled with a
 * poison, and downloads that see bytes no kernel wrote.
 *
 * The same tests run on the shim (plain and check) and on a GPU: there the SIMT functions are absent and
 * poison is all there is. Threads: one. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SIMT_SUPPORT_H
#define TD_TESTS_SIMT_SUPPORT_H

#include "kernels/dev.h"
#include "tests/kernels/support.h"

enum { DEV_MAX_BLOCKS = 2048 };
static void *dev_block[DEV_MAX_BLOCKS];
static int dev_n_blocks;

static inline td_dev *dev(void)
{
    static td_dev *d;
    if (!d && td_dev_open("cuda", 0, &d) != TD_OK) T_SKIP("%s", td_reason());
    return d;
}
/* Uninitialised device memory: on the shim never readable before written; on a device filled with 0xff (NaN).
 */
static inline void *dev_new(size_t bytes)
{
    void *p = NULL;
    TD_CHECK(dev_n_blocks < DEV_MAX_BLOCKS && dev()->alloc(dev(), bytes, &p) == TD_OK);
    if (strncmp(dev()->name, "simt", 4)) dev()->fill(dev(), TD_STREAM_COMPUTE, p, 0xff, bytes);
    dev_block[dev_n_blocks++] = p;
    return p;
}
static inline void *dev_put(const void *src, size_t bytes)
{
    void *p = dev_new(bytes);
    TD_CHECK(dev()->upload(dev(), TD_STREAM_COMPUTE, p, src, bytes) == TD_OK);
    TD_CHECK(dev()->sync(dev(), TD_STREAM_COMPUTE) == TD_OK);
    return p;
}
/* False when a kernel failed, or (check mode) when some of the bytes were never written. */
static inline bool dev_get(void *dst, const void *src, size_t bytes)
{
    return dev()->download(dev(), TD_STREAM_COMPUTE, dst, src, bytes) == TD_OK &&
           dev()->sync(dev(), TD_STREAM_COMPUTE) == TD_OK;
}
/* Frees every block of the case. */
static inline void dev_done(void)
{
    while (dev_n_blocks) dev()->free(dev(), dev_block[--dev_n_blocks]);
}

#endif
