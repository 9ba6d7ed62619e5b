// SPDX-License-Identifier: Apache-2.0
#if defined(__x86_64__)
#include "kernels/amx.h"
#include "kernels/family.h"
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

enum {
    AMX_BF16 = 1 << 22,
    AMX_TILE = 1 << 24,
    XTILEDATA = 18,         /* its number among the states */
    REQ_XCOMP_PERM = 0x1023 /* <asm/prctl.h>, from Linux 5.16 on */
};
#define XTILE_STATES ((uint64_t)3 << 17) /* configuration and data */

bool td_amx_fits(const td_amx_words *w)
{
    uint32_t row_bytes = w->shape & 0xffff, tiles = w->shape >> 16, max_k = w->tmul & 0xff, max_n = w->tmul >> 8 & 0xffff;
    return w->features & AMX_BF16 && w->features & AMX_TILE && (w->xcr0 & XTILE_STATES) == XTILE_STATES &&
           w->size >> 16 >= 1024 && row_bytes == 64 && tiles >= 8 && (w->max_rows & 0xffff) >= 16 && max_k >= 16 &&
           max_n >= 64;
}

static uint64_t state_saved(void)
{
    uint32_t a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return 0;
    __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (uint64_t)d << 32 | a;
}

bool td_amx_supported(void)
{
    td_amx_words w = {.xcr0 = state_saved()};
    uint32_t unused;
    if (!td_has_avx512bf16() || !__get_cpuid_count(7, 0, &unused, &unused, &unused, &w.features) ||
        !__get_cpuid_count(0x1d, 1, &w.size, &w.shape, &w.max_rows, &unused) ||
        !__get_cpuid_count(0x1e, 0, &unused, &w.tmul, &unused, &unused))
        return false;
    return td_amx_fits(&w) && !syscall(SYS_arch_prctl, REQ_XCOMP_PERM, XTILEDATA);
}
#endif
