// SPDX-License-Identifier: Apache-2.0
#include "worker/fault.h"
#include "common/log.h"
#include <errno.h>
#include <poll.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

atomic_int td_fault_armed;
atomic_uint_fast64_t td_fault_key;
static char path[64];

td_status td_fault_arm(const char *text)
{
    static const char *const name[] = {"", "prefill-chunk:", "ship-frame:", "ship-landed:", "decode-step:"};
    static const char kind[] = "pause:";
    if (!text || strncmp(text, kind, sizeof kind - 1)) return TD_AGAIN;
    text += sizeof kind - 1;
    for (int p = TD_FAULT_PREFILL_CHUNK; p <= TD_FAULT_DECODE_STEP; p++) {
        size_t n = strlen(name[p]);
        if (strncmp(text, name[p], n) || !text[n] || strlen(text + n) >= sizeof path) continue;
        snprintf(path, sizeof path, "%s", text + n);
        td_fault_armed = p;
        TD_WARN("fault injection is on: pause:%s", text);
        return TD_OK;
    }
    return td_fail(TD_EBADREQ, "fault pause:%s: POINT:PATH, POINT is prefill-chunk, ship-frame, ship-landed "
                   "or decode-step", text);
}

/* link() makes the file with its text in it, and only if it is not there. */
static bool claim(void)
{
    char mine[96];
    snprintf(mine, sizeof mine, "%s.%d", path, (int)getpid());
    FILE *f = fopen(mine, "w");
    if (!f) {
        TD_WARN("fault: %s: %s", mine, strerror(errno));
        return false;
    }
    fprintf(f, "%d\n", (int)getpid());
    fclose(f);
    bool first = !link(mine, path);
    unlink(mine);
    return first;
}

void td_fault_pause(void)
{
    char go[96];
    td_fault_armed = TD_FAULT_NONE;
    if (!claim()) return;
    snprintf(go, sizeof go, "%s.go", path);
    TD_WARN("fault: stopped until %s is there", go);
    for (int ms = 0; ms < TD_FAULT_MAX_S * 1000 && access(go, F_OK); ms++) (void)poll(NULL, 0, 1);
}
