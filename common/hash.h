/* common/hash.h - SipHash-2-4-128 (keyed, for hashes that peers or prompts could attack) and CRC32C (payload
 * checks).
 * Source: Aumann & Bernstein, SipHash (2012), 128-bit variant; Castagnoli polynomial 0x1EDC6F41 (RFC 3720
 * B.4).
 * Threads: any (pure). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_HASH_H
#define TD_COMMON_HASH_H

#include <stddef.h>
#include <stdint.h>

typedef struct td_h128 { uint64_t lo, hi; } td_h128;
typedef struct td_hkey { uint64_t k0, k1; } td_hkey;

td_h128 td_siphash128(td_hkey key, const void *p, size_t n);
uint32_t td_crc32c(uint32_t crc, const void *p, size_t n); /* 0 to start; chainable; hardware where present */
uint32_t td_crc32c_tables(uint32_t crc, const void *p, size_t n); /* the same without hardware: for tests */
uint64_t td_mix64(uint64_t x);                             /* bijective finalizer, for hash tables */

#endif
