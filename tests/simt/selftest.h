/* tests/simt/selftest.h - small kernels that pin what the shim means (and the device, when run there), and kernels with
 * one planted error each. Device pointers; 0 or a CUDA error code. Threads: one. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SIMT_SELFTEST_H
#define TD_TESTS_SIMT_SELFTEST_H

#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

int simt_run_shuffles(int *out);                                          /* [64] */
int simt_run_loops(int *out);                                             /* [128] */
int simt_run_mma(int f16, float *c, const uint16_t *a, const uint16_t *b); /* [16,8] = [16,16] * [16,8] */
int simt_run_ldmatrix(int trans, uint16_t *out, const uint16_t *in);      /* [4,8,8] -> [4][32 lanes][2] */
int simt_run_convert(int f16, float *up, uint16_t *back);                 /* [65536] each */
int simt_run_copy(float *out, const float *in, int n, int keep);          /* through cp.async */
/* [4 * 64 + 2], zeros: four blocks of 64 threads write 64 numbers each and hand over by an atomic; the last one adds up. With
 * an error, without the barrier before the atomic, without the atomic of one block, or without having looked at it. */
enum { HAND_NONE, HAND_NO_BARRIER, HAND_NO_ATOMIC, HAND_UNSEEN, HAND_N };
int simt_run_last_block(int bug, int *out);

enum {
    BUG_NONE, BUG_NO_BARRIER, BUG_SHARED_OUTSIDE, BUG_STATIC_SHARED_OUTSIDE, BUG_MASK_SHORT, BUG_MASK_LONG,
    BUG_BARRIER_IN_BRANCH, BUG_EARLY_EXIT, BUG_NO_COPY_WAIT, BUG_NO_SYNCWARP, BUG_BLOCKS_RACE, BUG_UNWRITTEN,
    BUG_GLOBAL_OUTSIDE, BUG_UNINITIALISED, BUG_OVERWRITE_EARLY,
    BUG_SHUFFLE_FOR_SYNC, BUG_N
};
enum { EARLY_NONE, EARLY_READ, EARLY_WRITE, EARLY_NO_WAIT, EARLY_COPY, EARLY_N };
/* Two launches that overlap: tmp = in + 1; out = 2 tmp, 256 values each; `scale` [1] is read before the wait. With
 * an error, the second one reads tmp, writes out or copies tmp to shared memory before it waits, or one of its
 * threads never waits. */
int simt_run_early(int bug, void *stream, float *out, float *tmp, const float *in, const float *scale);
/* Bytes of one word written by different threads: out [2][256] = in + 1, block by block, through words, then bytes, then
 * words of shared memory. With an error, a byte of a word is read too early, not written, written by two threads, written
 * while the word is still read, or missing in out. */
enum { NARROW_NONE, NARROW_NO_BARRIER, NARROW_UNWRITTEN, NARROW_TWICE, NARROW_OVER_WORD, NARROW_OUT, NARROW_N };
int simt_run_narrow(int bug, unsigned char *out, const unsigned char *in);
/* out[i] = sum of x's row of 256 + i; one block of 256 threads per row. */
int simt_run_bug(int bug, float *out, const float *x, int rows);

#ifdef __cplusplus
}
#endif
#endif
