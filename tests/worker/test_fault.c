// SPDX-License-Identifier: Apache-2.0
/* The pause of worker/fault.h: who stops, once, and until when. */
#include "tests/t.h"
#include "worker/fault.h"
#include <fcntl.h>
#include <pthread.h>
#include <unistd.h>

static char gate[40], go[48], text[64];
static atomic_bool over;

static void make(const char *path)
{
    int fd = open(path, O_CREAT | O_WRONLY, 0600);
    T_OK(fd >= 0);
    close(fd);
}

static void arming(void)
{
    T_EQ(td_fault_arm(NULL), TD_AGAIN);
    T_EQ(td_fault_arm(""), TD_AGAIN);
    T_EQ(td_fault_arm("flip:3"), TD_AGAIN); /* ship's */
    static const char *const bad[] = {
        "pause:", "pause:nowhere:/x", "pause:ship-frame", "pause:ship-frame:",
        "pause:ship-frame:/aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) T_EQ(td_fault_arm(bad[i]), TD_EBADREQ);
    T_EQ(td_fault_armed, TD_FAULT_NONE);
    td_fault_mark(5, TD_FAULT_SEED); /* not armed: nobody is marked */
    T_OK(td_fault_key == 0 && !td_fault_due(TD_FAULT_SHIP_FRAME, 5));
}

static void whom(void)
{
    T_EQ(td_fault_arm(text), TD_OK);
    td_fault_mark(4, TD_FAULT_SEED + 1);
    T_EQ(td_fault_key, 0);
    td_fault_mark(5, TD_FAULT_SEED);
    T_OK(td_fault_due(TD_FAULT_SHIP_FRAME, 5));
    T_OK(!td_fault_due(TD_FAULT_SHIP_FRAME, 4) && !td_fault_due(TD_FAULT_DECODE_STEP, 5));
}

static void *body(void *arg)
{
    (void)arg;
    td_fault_pause();
    over = true;
    return NULL;
}

static void pausing(void)
{
    pthread_t t;
    pthread_create(&t, NULL, body, NULL);
    for (int i = 0; i < 5000 && access(gate, F_OK); i++) usleep(1000);
    FILE *f = fopen(gate, "r");
    int pid = 0;
    T_OK(f && fscanf(f, "%d", &pid) == 1 && pid == (int)getpid());
    if (f) fclose(f);
    T_OK(!over && !td_fault_due(TD_FAULT_SHIP_FRAME, 5)); /* it waits, and there is no second time */
    make(go);
    pthread_join(t, NULL);
    T_OK(over);
    /* another worker that gets there finds it taken and does not stop */
    unlink(go);
    td_fault_pause();
    T_OK(1);
    unlink(gate);
}

int main(void)
{
    snprintf(gate, sizeof gate, "/tmp/td-fault-%d", (int)getpid());
    snprintf(go, sizeof go, "%s.go", gate);
    snprintf(text, sizeof text, "pause:ship-frame:%s", gate);
    arming();
    whom();
    pausing();
    return T_DONE();
}
