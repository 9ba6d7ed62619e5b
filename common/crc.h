/* common/crc.h - CRC32C, the check of payloads and files: of bytes as they lie, of several runs at once, and of
 * parts that are joined.
 *
 * A value is the finished checksum of the bytes so far (0: of none), so that a piece may be taken up where another
 * ended.
 *
 * Rules:   1. td_crc32c(td_crc32c(c, A), B) == td_crc32c(c, A B) == td_crc_join(over |B|, td_crc32c(c, A),
 *             td_crc32c(0, B)).
 *          2. td_crc32c_lanes(l) is td_crc32c of each lane. In one lane the instruction takes 3 cycles for 8
 *             bytes, in three or more 1; and what is done next comes to the caches meanwhile (ahead), so that a
 *             copy of what was checked before, or is checked next, finds it there: the checksum costs a copy
 *             almost nothing.
 * Threads: any (pure). Limits: TD_CRC_LANES lanes.
 * Source:  Castagnoli polynomial 0x1EDC6F41 (RFC 3720 B.4). */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_CRC_H
#define TD_COMMON_CRC_H

#include <stddef.h>
#include <stdint.h>

uint32_t td_crc32c(uint32_t crc, const void *p, size_t n);        /* hardware where present */
uint32_t td_crc32c_tables(uint32_t crc, const void *p, size_t n); /* the same without: for tests */

enum { TD_CRC_LANES = 4 };
/* ahead: n bytes that are wanted in the caches, or NULL. */
typedef struct td_crc_lane { const uint8_t *p, *ahead; uint32_t crc; } td_crc_lane;
void td_crc32c_lanes(td_crc_lane *lane, int n_lanes, size_t n);

/* Moves a checksum over n bytes that follow. */
typedef struct td_crc_over { uint32_t z[8][16]; } td_crc_over;
void td_crc_over_init(td_crc_over *o, uint64_t n);
uint32_t td_crc_join(const td_crc_over *o, uint32_t a, uint32_t b);

#endif
