// SPDX-License-Identifier: Apache-2.0
#include "common/build.h"
#include "common/check.h"
#include <elf.h>
#include <link.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>

enum { SHOWN = 6 }; /* bytes of the id: enough to tell builds apart */

static char text[64];
static pthread_once_t once = PTHREAD_ONCE_INIT;

static size_t padded(size_t n)
{
    return (n + 3) / 4 * 4;
}

/* Notes of one segment: {name size, description size, type}, name, description, each padded to 4 bytes. */
static void find(const uint8_t *p, size_t n)
{
    ElfW(Nhdr) h;
    for (size_t at = 0; at + sizeof h <= n;) {
        memcpy(&h, p + at, sizeof h);
        size_t name = at + sizeof h, desc = name + padded(h.n_namesz), end = desc + padded(h.n_descsz);
        if (end > n) return;
        if (h.n_type == NT_GNU_BUILD_ID && h.n_namesz == 4 && !memcmp(p + name, "GNU", 4) && h.n_descsz >= SHOWN) {
            size_t len = strlen(text);
            for (int i = 0; i < SHOWN; i++)
                len += (size_t)snprintf(text + len, sizeof text - len, "%s%02x", i ? "" : "-", p[desc + (size_t)i]);
            return;
        }
        at = end;
    }
}

/* The first object is the program itself. */
static int program(struct dl_phdr_info *info, size_t size, void *arg)
{
    (void)size;
    (void)arg;
    for (int i = 0; i < info->dlpi_phnum; i++)
        if (info->dlpi_phdr[i].p_type == PT_NOTE)
            find((const uint8_t *)(uintptr_t)(info->dlpi_addr + info->dlpi_phdr[i].p_vaddr), info->dlpi_phdr[i].p_memsz);
    return 1;
}

static void make(void)
{
    snprintf(text, sizeof text, "%s", TD_VERSION);
    (void)dl_iterate_phdr(program, NULL);
}

const char *td_build(void)
{
    pthread_once(&once, make);
    return text;
}
