/* tests/simt/selftest_sm90a.h - single instructions of kernels/sm90a.h as kernels, to pin what the shim takes
 * them to mean and what a device does. Pointers: device memory; results: 0 or the error. Only for sm_90a and
 * the shim. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SIMT_SELFTEST_SM90A_H
#define TD_TESTS_SIMT_SELFTEST_SM90A_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

enum { HOP_BOX_BYTES = 32768, HOP_IMAGE_BYTES = 16384 };

/* A bf16 tensor [rows][cols] whose rows lie `pitch` bytes apart: the box of box_rows x box_cols that begins
 * at column x of row y goes to shared memory, `shift` bytes past a multiple of 1024, and from there to
 * out[HOP_BOX_BYTES], which begins at that multiple. swizzle: 0, 32, 64, 128 bytes. step: every so many rows
 * (then box_rows / step of them come). */
typedef struct hop_box {
    const void *tensor;
    int rows, cols, pitch, box_rows, box_cols, step, swizzle, x, y, shift;
} hop_box;
int hop_copy_box(void *stream, const hop_box *b, uint8_t *out);

/* d[64][128] (or + d) = A B; a: 64 x 16 bf16 by rows, in registers; B in shared memory: the image, at a
 * multiple of 1024. desc: without its start address, which is that multiple + start bytes. across: B across
 * K. */
typedef struct hop_mma {
    const uint16_t *a;
    const uint8_t *image;
    uint64_t desc;
    int start, across, accumulate;
} hop_mma;
int hop_multiply(void *stream, const hop_mma *m, float *d);

/* The same A from shared memory: a_image, a_desc; B along K. */
int hop_multiply_ss(void *stream, const hop_mma *m, const uint8_t *a_image, uint64_t a_desc, float *d);

#ifdef __cplusplus
}
#endif
#endif
