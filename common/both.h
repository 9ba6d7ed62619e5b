/* common/both.h - functions of one text for C on the host and CUDA C++ on both sides: bits that must not differ are
 * written once. They use scalars, IEEE operations, fmaf and memcpy alone. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_BOTH_H
#define TD_COMMON_BOTH_H

#include <stdint.h>
#include <string.h>

#ifdef __CUDACC__
#define TD_BOTH static __host__ __device__ __forceinline__
#else
#define TD_BOTH static inline __attribute__((always_inline))
#endif

TD_BOTH float td_float_of_bits(uint32_t b)
{
    float f;
    memcpy(&f, &b, 4);
    return f;
}

TD_BOTH uint32_t td_bits_of_float(float f)
{
    uint32_t b;
    memcpy(&b, &f, 4);
    return b;
}

#endif
