/* kernels/amx_tile.h - internal: the instructions on tiles that the amx family is written in; for gemm_amx.c alone.
 *
 * A tile is up to 16 rows of up to 64 bytes; their shapes are the thread's until it releases them. C is f32 [m][n],
 * A bf16 [m][2k], B [k][n] pairs of bf16, as the panels of x86.h have them. td_tile_dp, for every m and n (Intel SDM
 * volume 2, TDPBF16PS):
 *   even = odd = 0
 *   for k ascending:  even = fma(A[m][2k], B[k][n][0], even);  odd = fma(A[m][2k+1], B[k][n][1], odd)
 *   C[m][n] = C[m][n] + (even + odd)
 * in f32, rounded to nearest even, denormals read and written as zero whatever MXCSR says, no exceptions.
 *
 * With TD_AMX_EMULATED the same names are functions that do this step by step and check that the CPU would not have
 * refused (tests/amx), so that the family runs on any machine. Tile numbers are literals. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_AMX_TILE_H
#define TD_KERNELS_AMX_TILE_H

#include <stddef.h>
#include <stdint.h>

/* Memory format of palette 1. A tile that is not used has no rows and no columns. */
typedef struct td_tile_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} td_tile_config;

#if defined(TD_AMX_EMULATED)
void td_tile_configure(const td_tile_config *c);
void td_tile_release(void);
void td_tile_zero(int tile);
void td_tile_load(int tile, const void *p, size_t stride);
void td_tile_store(int tile, void *p, size_t stride);
void td_tile_dp(int c, int a, int b);
#else
/* The compiler knows nothing of tiles: order is kept by volatile, and memory by the clobber. */
#define TD_TILE_NAME_(n) "%%tmm" #n
#define TD_TILE_NAME(n) TD_TILE_NAME_(n)
#define td_tile_configure(c) __asm__ volatile("ldtilecfg %0" : : "m"(*(c)) : "memory")
#define td_tile_release() __asm__ volatile("tilerelease" : : : "memory")
#define td_tile_zero(n) __asm__ volatile("tilezero " TD_TILE_NAME(n) : : : "memory")
#define td_tile_load(n, p, stride) \
    __asm__ volatile("tileloadd (%0,%1,1), " TD_TILE_NAME(n) : : "r"(p), "r"((size_t)(stride)) : "memory")
#define td_tile_store(n, p, stride) \
    __asm__ volatile("tilestored " TD_TILE_NAME(n) ", (%0,%1,1)" : : "r"(p), "r"((size_t)(stride)) : "memory")
#define td_tile_dp(c, a, b) \
    __asm__ volatile("tdpbf16ps " TD_TILE_NAME(b) ", " TD_TILE_NAME(a) ", " TD_TILE_NAME(c) : : : "memory")
#endif

#endif
