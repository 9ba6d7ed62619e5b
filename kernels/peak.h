/* kernels/peak.h - loops that do nothing but read, or nothing but multiply: the two limits that a kernel's time is held
 * against. The caller times them; any thread, no state. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_KERNELS_PEAK_H
#define TD_KERNELS_PEAK_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/* Reads `bytes` (a multiple of 256, from an address that is a multiple of 64) once, with the widest loads of the CPU;
 * `fetch`: with lines asked for some KiB ahead, over the end too, which some CPUs need to keep memory busy and others do
 * not. Returns a digest, so that no load is left out. */
uint64_t td_peak_read(const void *p, size_t bytes, bool fetch);

/* `steps` rounds of the multiply-adds in which the kernel family counts its work, in independent chains. Returns the
 * operations done (two a multiply-add); 0: no such family here. The caller's CPU must have the family. */
double td_peak_multiply(const char *family, long steps);

#endif
