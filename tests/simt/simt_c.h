/* tests/simt/simt_c.h - what a C test asks the shim: the text of the last failed launch, silence while errors
 * are provoked, the mode, the schedule. Threads: one. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SIMT_C_H
#define TD_TESTS_SIMT_C_H
#ifdef __cplusplus
extern "C" {
#endif

/* Option "plant": a mistake that Hopper's kernels then make (simt_sm90a.h). */
enum simt_plant {
    PLANT_NONE,
    PLANT_SBO, /* descriptors: the next 8 rows or columns are taken to lie twice as far */
    PLANT_LBO, /* ... the next 64 columns half as far */
    PLANT_SWIZZLE, /* ... 64-byte instead of 128-byte swizzle */
    PLANT_START, /* ... a step of k is 16 bytes off */
    PLANT_NO_EXPECT, /* an arrival announces no bytes */
    PLANT_MORE_BYTES, /* ... 16 bytes too many */
    PLANT_PARITY, /* waits for the other phase */
    PLANT_NO_ARRIVE, /* plain arrivals are left out */
    PLANT_NO_FULL_WAIT, /* waits for an mbarrier with one arrival (the copies') are left out */
    PLANT_NO_FREE_WAIT, /* ... with more than one (the readers') are left out */
    PLANT_NO_MMA_WAIT,
    PLANT_LATE_WAIT, /* wait_group leaves one group more than it should */
    PLANT_NO_COMMIT,
    PLANT_NO_MMA_FENCE,
    PLANT_NO_STORE_FENCE, /* fence.proxy.async */
    PLANT_NO_BAR_SYNC, /* bar.sync of one warpgroup */
    PLANT_NO_TURN_SYNC, /* ... of more threads */
    PLANT_NO_BAR_ARRIVE,
    PLANT_MAP_STRIDE, /* the tensor map's rows lie 16 bytes further apart */
    PLANT_MAP_SWIZZLE,
    PLANT_COUNT
};

const char *simt_last_error(void); /* "" if none */
void simt_clear_error(void);       /* errors stick until then, as on a device */
void simt_quiet(int on);           /* do not print errors */
int simt_checks(void); /* 1 in check mode: races, uninitialised reads and bytes never written are found */
int simt_set_option(const char *name, int value); /* "order", "poison", "timeout", "eager", "hide" (host
                                accesses to device memory end the process), and the device: "devices" (0: none,
                                -1: an old driver, -2: none), "memory" in MiB, "arch", "wrong" (bits: 1 mma, 2 cuBLASLt, 4
                                and 8 Hopper's kernels), "plant" (enum simt_plant),
                                "fail_after" launches; the old value, -1: unknown */

#ifdef __cplusplus
}
#endif
#endif
