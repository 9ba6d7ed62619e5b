// SPDX-License-Identifier: Apache-2.0
/* Whether a CPU and its kernel have the tiles that the amx family wants: what CPUID says of a machine that has, each word of it
 * taken away in turn; and this machine. The family itself, on any machine: tests/amx. */
#include "kernels/amx.h"
#include "tests/kernels/support.h"

#if defined(__x86_64__)
/* As Sapphire Rapids says it. */
static const td_amx_words has = {.features = 1u << 22 | 1u << 24 | 1u << 25,
                                 .xcr0 = 0x602e7,
                                 .size = 1024u << 16 | 8192,
                                 .shape = 8u << 16 | 64,
                                 .max_rows = 16,
                                 .tmul = 64u << 8 | 16};

static void words(void)
{
    T_OK(td_amx_fits(&has));
    td_amx_words w[] = {has, has, has, has, has, has, has, has, has, has, {0}};
    w[0].features &= ~(1u << 22), w[1].features &= ~(1u << 24);
    w[2].xcr0 &= ~(UINT64_C(1) << 17), w[3].xcr0 &= ~(UINT64_C(1) << 18);
    w[4].size = 512u << 16 | 8192, w[5].shape = 4u << 16 | 64, w[6].shape = 8u << 16 | 32;
    w[7].max_rows = 8, w[8].tmul = 64u << 8 | 8, w[9].tmul = 32u << 8 | 16;
    for (size_t i = 0; i < TD_COUNT(w); i++) T_OK(!td_amx_fits(&w[i]), "case %zu", i);
}

/* Linux names what a process may use; the permission is asked for once and stays. */
static void here(void)
{
    static char text[1 << 16];
    FILE *f = fopen("/proc/cpuinfo", "r");
    size_t n = f ? fread(text, 1, sizeof text - 1, f) : 0;
    if (f) fclose(f);
    text[n] = 0;
    bool listed = strstr(text, " amx_tile") && strstr(text, " amx_bf16"), found = false;
    for (int i = 0; td_ops_family(i); i++) found |= !strcmp(td_ops_family(i)->family, "amx");
    T_OK(!found || listed, "a CPU without tiles has the family");
    T_EQ(found, td_amx_supported());
    const td_ops *o;
    T_EQ(td_ops_open("amx", &o) == TD_OK, found);
    if (!found) T_OK(strstr(td_reason(), "\"amx\" needs a CPU with AMX") != NULL, "%s", td_reason());
}

int main(void)
{
    words();
    here();
    return T_DONE();
}
#else
int main(void)
{
    T_SKIP("not an x86 machine");
}
#endif
