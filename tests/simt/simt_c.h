/* tests/simt/simt_c.h - what a C test asks the shim: the text of the last failed launch, silence while errors
 * are provoked, the mode, the schedule. Threads: one. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SIMT_C_H
#define TD_TESTS_SIMT_C_H
#ifdef __cplusplus
extern "C" {
#endif

const char *simt_last_error(void); /* "" if none */
void simt_clear_error(void);       /* errors stick until then, as on a device */
void simt_quiet(int on);           /* do not print errors */
int simt_checks(void); /* 1 in check mode: races, uninitialised reads and bytes never written are found */
int simt_set_option(const char *name,
                    int value); /* "order", "poison", "timeout", "eager", "hide" (host
                                accesses to device memory end the process), and the device: "devices" (0: none,
                                -1: an old driver), "memory" in MiB, "arch", "wrong" (bits: 1 mma, 2 cuBLASLt, 4
                                and 8 Hopper's kernels), "fail_after" launches; the old value, -1: unknown */

#ifdef __cplusplus
}
#endif
#endif
