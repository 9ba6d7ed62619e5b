/* tests/amx/emulated.h - the tiles of Intel AMX in software, so that the amx family runs on any x86 machine with AVX2.
 *
 * emulated.c stands in for kernels/amx.c, and kernels/gemm_amx.c and attn_amx.c compiled with TD_AMX_EMULATED for
 * themselves: a program that is linked to these objects (td_amx_emulated in amx.cmake) has the family `amx`, whatever its
 * CPU. An instruction that a CPU would refuse (tiles not configured, shapes that do not fit) ends the program with the
 * reason.
 * Source: Intel SDM volume 2, LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBF16PS; exception classes
 *         AMX-E1 to E6. A CPU that has them (Intel, Granite Rapids) makes the same bits: kernels/test_gemm holds both to
 *         the matrix law, kernels/test_attn to one record. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_AMX_EMULATED_H
#define TD_TESTS_AMX_EMULATED_H

#include "kernels/ops.h"

#define TD_AMX_EMULATED
#include "kernels/amx_tile.h"

/* A CPU that adds as vdpbf16ps does, one chain over k pairs: what the check before use has to find. */
extern bool td_tile_as_chain;

typedef struct td_tile_counts {
    int held; /* threads whose tiles are configured now */
    long configured, multiplied;
} td_tile_counts;
td_tile_counts td_tile_count(void);

/* Stands for td_ops_family in tests of all families: amx alone. Exits with a skip where the CPU has no AVX2. */
const td_ops *td_amx_family(int i);

#endif
