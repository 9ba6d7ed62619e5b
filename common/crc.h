/* common/crc.h - CRC32C, the check of payloads and files: of bytes as they lie, or while they are copied.
 *
 * A value is the finished checksum of the bytes so far (0: of none), so that a piece may be taken up where
 * another ended.
 *
 * Rules:   1. td_crc32c(td_crc32c(c, A), B) == td_crc32c(c, A B).
 *          2. td_crc32c_copy is memcpy and td_crc32c in one pass: where the processor has wide carry-less
 * products (AVX-512, VPCLMULQDQ) the checksum costs the copy nothing.
 *          3. past: whole lines (64 bytes, aligned) are written past the caches, for what nobody reads soon:
 * a line is not read from memory only to be overwritten. Whoever hands such bytes to another thread calls
 *             td_crc32c_copied first.
 * Threads: any (pure).
 * Source:  Castagnoli polynomial 0x1EDC6F41 (RFC 3720 B.4); folding: Gopal et al., "Fast CRC computation for
 * generic polynomials using PCLMULQDQ", Intel 2009. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_CRC_H
#define TD_COMMON_CRC_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

uint32_t td_crc32c(uint32_t crc, const void *p, size_t n);
uint32_t td_crc32c_copy(uint32_t crc, void *to, const void *from, size_t n, bool past);
void td_crc32c_copied(void);

/* For tests: the same in each way up to this machine's best. */
typedef enum { TD_CRC_TABLES, TD_CRC_SSE42, TD_CRC_WIDE } td_crc_way;
td_crc_way td_crc_best(void);
uint32_t td_crc32c_by(td_crc_way way, uint32_t crc, const void *p, size_t n);
uint32_t td_crc32c_copy_by(td_crc_way way, uint32_t crc, void *to, const void *from, size_t n, bool past);

#endif
