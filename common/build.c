// SPDX-License-Identifier: Apache-2.0
#include "common/build.h"
#include <elf.h>
#include <link.h>
#include <stdio.h>
#include <string.h>

typedef struct text { char *out; size_t cap; } text;

static size_t padded(size_t n)
{
    return (n + 3) & ~(size_t)3;
}

/* A note: three words, its owner's name, its bytes, both padded to words. */
static void find_id(const text *t, const unsigned char *p, size_t left)
{
    ElfW(Nhdr) h;
    while (left >= sizeof h) {
        memcpy(&h, p, sizeof h);
        size_t name = padded(h.n_namesz), desc = padded(h.n_descsz);
        if (left - sizeof h < name || left - sizeof h - name < desc) return;
        if (h.n_type == NT_GNU_BUILD_ID && h.n_namesz == 4 && !memcmp(p + sizeof h, "GNU", 4)) {
            size_t n = strlen(t->out);
            for (size_t i = 0; i < h.n_descsz && n + 3 < t->cap; i++)
                n += (size_t)snprintf(t->out + n, t->cap - n, "%s%02x", i ? "" : " ", p[sizeof h + name + i]);
            return;
        }
        p += sizeof h + name + desc;
        left -= sizeof h + name + desc;
    }
}

/* The first object is the program itself. */
static int look(struct dl_phdr_info *o, size_t size, void *arg)
{
    (void)size;
    for (int i = 0; i < o->dlpi_phnum; i++)
        if (o->dlpi_phdr[i].p_type == PT_NOTE)
            find_id(arg, (const unsigned char *)o->dlpi_addr + o->dlpi_phdr[i].p_vaddr, o->dlpi_phdr[i].p_memsz);
    return 1;
}

void td_build_name(char *out, size_t cap)
{
    text t = {out, cap};
    snprintf(out, cap, "%s", TD_VERSION);
    dl_iterate_phdr(look, &t);
}
