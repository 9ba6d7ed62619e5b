// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_selftest.c - the shim itself: semantics of warp operations, mma, ldmatrix, cp.async, and
 * one planted error of each kind, every one of which must be seen. */
#include "kernels/tensor.h"
#include "tests/simt/selftest.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"

static void test_warps(void)
{
    int *d = dev_new(128 * sizeof(int)), o[128];
    T_EQ(simt_run_shuffles(d), 0);
    T_OK(dev_get(o, d, 64 * sizeof(int)));
    for (int t = 0; t < 64; t++) {
        int l = t & 31, r;
        if (l < 16)
            r = (l ^ 5) + 1000 * ((l & 7) + 3 > 7 ? l : l + 3);
        else
            r = ((l & 15) < 2 ? l : l - 2) + 1000 * (17 + (l & 1));
        T_EQ(o[t], r + 100000 * 11);
    }
    T_EQ(simt_run_loops(d), 0);
    T_OK(dev_get(o, d, sizeof o));
    for (int t = 0; t < 128; t++) {
        int w = ((t >> 5) + 1) & 3, a = 0;
        for (int i = 0; i <= w * 3; i++) a += 496 + 32 * i;
        T_EQ(o[t], a + 12);
    }
    dev_done();
}

static void test_mma(int f16)
{
    uint16_t a[256], b[128];
    float c[128], x;
    uint64_t s = 7;
    for (int i = 0; i < 256; i++) x = rnd_float(&s, 1), a[i] = f16 ? td_f32_to_f16(x) : td_f32_to_bf16(x);
    for (int i = 0; i < 128; i++) x = rnd_float(&s, 1), b[i] = f16 ? td_f32_to_f16(x) : td_f32_to_bf16(x);
    float *dc = dev_new(sizeof c);
    T_EQ(simt_run_mma(f16, dc, dev_put(a, sizeof a), dev_put(b, sizeof b)), 0);
    T_OK(dev_get(c, dc, sizeof c));
    for (int i = 0; i < 16; i++)
        for (int j = 0; j < 8; j++) {
            double sum = 0;
            for (int k = 0; k < 16; k++) {
                uint16_t u = a[i * 16 + k], v = b[k * 8 + j];
                sum += f16 ? (double)td_f16_to_f32(u) * (double)td_f16_to_f32(v)
                           : (double)td_bf16_to_f32(u) * (double)td_bf16_to_f32(v);
            }
            T_NEAR(c[i * 8 + j], sum, 1e-5);
        }
    dev_done();
}

static void test_ldmatrix(int trans)
{
    uint16_t in[256], out[256];
    for (int i = 0; i < 256; i++) in[i] = (uint16_t)i;
    uint16_t *d = dev_new(sizeof out);
    T_EQ(simt_run_ldmatrix(trans, d, dev_put(in, sizeof in)), 0);
    T_OK(dev_get(out, d, sizeof out));
    for (int m = 0; m < 4; m++)
        for (int l = 0; l < 32; l++)
            for (int h = 0; h < 2; h++) {
                int row = l / 4, col = l % 4 * 2 + h;
                T_EQ(out[(m * 32 + l) * 2 + h], m * 64 + (trans ? col * 8 + row : row * 8 + col));
            }
    dev_done();
}

static void test_convert(int f16)
{
    float *up = floats(65536), *d = dev_new(65536 * 4);
    uint16_t *back = block_alloc(65536 * 2), *db = dev_new(65536 * 2);
    T_EQ(simt_run_convert(f16, d, db), 0);
    T_OK(dev_get(up, d, 65536 * 4) && dev_get(back, db, 65536 * 2));
    int bad = 0;
    for (int i = 0; i < 65536; i++) {
        float want = f16 ? td_f16_to_f32((uint16_t)i) : td_bf16_to_f32((uint16_t)i);
        bad += want == want ? up[i] != want || back[i] != i : up[i] == up[i];
    }
    T_EQ(bad, 0);
    free(up);
    free(back);
    dev_done();
}

static void test_copy(void)
{
    float in[256], out[256];
    rnd_fill(in, 256, 3, 1);
    float *d = dev_new(sizeof out);
    T_EQ(simt_run_copy(d, dev_put(in, sizeof in), 256, 128), 0);
    T_OK(dev_get(out, d, sizeof out));
    for (int i = 0; i < 256; i++) T_OK(out[i] == (255 - i < 128 ? in[255 - i] : 0));
    dev_done();
}

/* Blocks that hand over by an atomic: what it does not release, nobody may read. Blocks run one after another here, so
 * that values are right whatever is missing. */
static void test_hand_over(void)
{
    bool shim = !strncmp(dev()->name, "simt", 4);
    for (int bug = 0; bug < (shim ? HAND_N : 1); bug++) {
        int zero[4 * 64 + 2] = {0}, *d = dev_put(zero, sizeof zero);
        simt_quiet(bug != HAND_NONE);
        int e = simt_run_last_block(bug, d);
        if (bug == HAND_NONE) {
            T_OK(e == 0 && dev_get(zero, d, sizeof zero), "%s", simt_last_error());
            T_EQ(zero[1], 64 * 6);
        } else if (simt_checks()) T_OK(e && strstr(simt_last_error(), "RACE on global"), "%d: \"%s\"", bug, simt_last_error());
        simt_clear_error();
        dev_done();
    }
    simt_quiet(0);
}

typedef struct bug_case {
    int bug, rows;
    const char *text; /* in the message of either mode; NULL: the plain mode sees a wrong result or nothing */
    const char *check_text; /* in the message of check mode; "never": of the download */
} bug_case;

static const bug_case bugs[] = {
    {BUG_NO_BARRIER, 2, NULL, "RACE on shared|UNINITIALISED"},
    {BUG_SHARED_OUTSIDE, 2, "OUT OF BOUNDS", "OUT OF BOUNDS"},
    {BUG_STATIC_SHARED_OUTSIDE, 2, NULL, "UNINITIALISED|RACE"},
    {BUG_MASK_SHORT, 2, "not in its own mask", "not in its own mask"},
    {BUG_MASK_LONG, 2, "DEADLOCK|mismatch", "DEADLOCK|mismatch"},
    {BUG_BARRIER_IN_BRANCH, 2, "DEADLOCK|divergent", "DEADLOCK|divergent|RACE|UNINITIALISED"},
    {BUG_EARLY_EXIT, 2, "DEADLOCK", "DEADLOCK"},
    {BUG_NO_COPY_WAIT, 2, "not waited for", "before cp.async.wait"},
    {BUG_NO_SYNCWARP, 2, NULL, "RACE on shared|UNINITIALISED"},
    {BUG_BLOCKS_RACE, 2, NULL, "RACE on global"},
    {BUG_UNWRITTEN, 2, NULL, "never written"},
    {BUG_GLOBAL_OUTSIDE, 2, "OUT OF BOUNDS", "OUT OF BOUNDS"},
    {BUG_UNINITIALISED, 2, NULL, "UNINITIALISED"},
    {BUG_OVERWRITE_EARLY, 2, NULL, "RACE on shared"},
    {BUG_SHUFFLE_FOR_SYNC, 2, NULL, "RACE on shared"},
};

static bool says(const char *any_of)
{
    char words[128];
    snprintf(words, sizeof words, "%s", any_of);
    for (char *save, *w = strtok_r(words, "|", &save); w; w = strtok_r(NULL, "|", &save))
        if (strstr(simt_last_error(), w)) return true;
    return false;
}

/* True when the launch and the download went well and the sums are right. */
static bool run_bug(int bug, int rows)
{
    float x[512], out[512];
    for (int i = 0; i < 512; i++) x[i] = (float)(i % 7);
    float *d = dev_new((size_t)rows * 256 * 4), *dx = dev_put(x, (size_t)rows * 256 * 4);
    bool ok = simt_run_bug(bug, d, dx, rows) == 0 && dev_get(out, d, (size_t)rows * 256 * 4);
    for (int r = 0; r < rows && ok; r++) {
        float sum = 0;
        for (int i = 0; i < 256; i++) sum += x[r * 256 + i];
        for (int i = 0; i < 256; i++) ok = ok && out[r * 256 + i] == sum + (float)i;
    }
    dev_done();
    return ok;
}

static void test_bugs(void)
{
    T_OK(run_bug(BUG_NONE, 2), "%s", simt_last_error());
    simt_quiet(1);
    for (size_t i = 0; i < TD_COUNT(bugs); i++) {
        const bug_case *b = &bugs[i];
        bool ok = run_bug(b->bug, b->rows);
        const char *want = simt_checks() ? b->check_text : b->text;
        if (want) T_OK(!ok && says(want), "bug %d: \"%s\"", b->bug, simt_last_error());
        simt_clear_error();
    }
    simt_quiet(0);
}

/* Accesses of less than a word, beside others of the same word: none is a race with its neighbours, each is checked. */
static void test_narrow(void)
{
    static const char *const text[NARROW_N] = {NULL, "RACE on shared|UNINITIALISED", "UNINITIALISED", "RACE on shared memory (write-write",
                                               "RACE on shared", NULL};
    unsigned char in[512], out[512];
    for (int i = 0; i < 512; i++) in[i] = (unsigned char)(i * 7);
    for (int bug = 0; bug < NARROW_N; bug++) {
        void *d = dev_new(sizeof out);
        simt_quiet(bug != NARROW_NONE);
        bool ok = simt_run_narrow(bug, d, dev_put(in, sizeof in)) == 0 && dev_get(out, d, sizeof out);
        for (int i = 0; i < 512 && bug == NARROW_NONE; i++) T_EQ(out[i], (unsigned char)(in[i] + 1));
        if (bug == NARROW_NONE) T_OK(ok, "%s", simt_last_error());
        else if (bug == NARROW_OUT && simt_checks())
            T_OK(!ok && strstr(simt_last_error(), "2 of 512 bytes") && strstr(simt_last_error(), "offset 77"), "\"%s\"",
                 simt_last_error());
        else if (simt_checks()) T_OK(!ok && says(text[bug]), "%d: \"%s\"", bug, simt_last_error());
        simt_clear_error();
        dev_done();
    }
    simt_quiet(0);
}

/* Without hooks a missing barrier shows in the result, under one of the two skewed schedules. */
static void test_missing_barrier_shows(void)
{
    static const int seen_plain[] = {BUG_NO_BARRIER, BUG_OVERWRITE_EARLY, BUG_UNWRITTEN, BUG_BLOCKS_RACE};
    simt_quiet(1);
    for (size_t i = 0; i < TD_COUNT(seen_plain); i++) {
        bool seen = false;
        for (int order = 0; order < 2; order++) {
            int old = simt_set_option("order", order);
            seen = !run_bug(seen_plain[i], 2) || seen;
            simt_set_option("order", old);
            simt_clear_error();
        }
        T_OK(seen, "bug %d", seen_plain[i]);
    }
    simt_quiet(0);
}

/* ---- launches that overlap, launches that are recorded ---- */

typedef struct early_case {
    float *out, *tmp, *in, *scale, x[256];
} early_case;

static early_case early_new(void)
{
    early_case c;
    float two = 2;
    for (int i = 0; i < 256; i++) c.x[i] = (float)i;
    c.in = dev_put(c.x, sizeof c.x);
    c.scale = dev_put(&two, sizeof two);
    c.tmp = dev_new(sizeof c.x);
    c.out = dev_new(sizeof c.x);
    return c;
}

static int run_early(int bug, early_case *c)
{
    return simt_run_early(bug, dev()->stream[TD_STREAM_COMPUTE], c->out, c->tmp, c->in, c->scale);
}

static bool early_right(const early_case *c, float add)
{
    float got[256];
    bool ok = dev_get(got, c->out, sizeof got);
    for (int i = 0; i < 256 && ok; i++) ok = got[i] == 2 * (2 * (c->x[i] + add) + 1);
    return ok;
}

static void test_early(void)
{
    static const char *const text[EARLY_N] = {NULL, "read before td_grid_wait",
                                              "write of global memory before td_grid_wait",
                                              "ends without td_grid_wait", "read before td_grid_wait"};
    for (int bug = 0; bug < EARLY_N; bug++) {
        early_case c = early_new();
        simt_quiet(bug != EARLY_NONE);
        int e = run_early(bug, &c);
        if (bug == EARLY_NONE) T_OK(!e && early_right(&c, 0), "%s", simt_last_error());
        else if (simt_checks() || bug == EARLY_NO_WAIT)
            T_OK(e && strstr(simt_last_error(), text[bug]), "%d: \"%s\"", bug, simt_last_error());
        simt_clear_error();
        dev_done();
    }
    simt_quiet(0);
}

/* A graph reads what its addresses hold when it runs; nothing runs while it is recorded. Also on a device. */
static void test_graph(void)
{
    td_dev *d = dev();
    early_case c = early_new();
    td_graph *g = NULL;
    float zero[256] = {0}, more[256];
    d->upload(d, TD_STREAM_COMPUTE, c.out, zero, sizeof zero);
    d->sync(d, TD_STREAM_COMPUTE);
    T_EQ(d->capture_begin(d, TD_STREAM_COMPUTE), TD_OK);
    T_EQ(run_early(EARLY_NONE, &c), 0);
    T_EQ(d->copy(d, TD_STREAM_COMPUTE, c.in, c.out, sizeof zero), TD_OK);
    T_EQ(d->capture_end(d, TD_STREAM_COMPUTE, &g), TD_OK);
    T_OK(dev_get(more, c.out, sizeof more) && !memcmp(more, zero, sizeof zero), "it ran while it was recorded");
    T_EQ(d->graph_run(d, TD_STREAM_COMPUTE, g), TD_OK);
    T_OK(early_right(&c, 0), "%s", simt_last_error());
    for (int i = 0; i < 256; i++) more[i] = c.x[i] + 5;
    d->upload(d, TD_STREAM_COMPUTE, c.in, more, sizeof more);
    T_EQ(d->graph_run(d, TD_STREAM_COMPUTE, g), TD_OK);
    T_OK(early_right(&c, 5), "%s", simt_last_error());
    T_EQ(d->graph_run(d, TD_STREAM_COMPUTE, g), TD_OK); /* of its own output */
    for (int i = 0; i < 256; i++) c.x[i] = 2 * (2 * (c.x[i] + 5) + 1);
    T_OK(early_right(&c, 0), "%s", simt_last_error());
    d->graph_close(d, g);
    g = NULL;
    T_EQ(d->capture_begin(d, TD_STREAM_COMPUTE), TD_OK); /* a wait loses the recording, and no more than that */
    T_EQ(run_early(EARLY_NONE, &c), 0);
    T_OK(d->sync(d, TD_STREAM_COMPUTE) != TD_OK);
    T_OK(d->capture_end(d, TD_STREAM_COMPUTE, &g) != TD_OK && !g);
    T_EQ(run_early(EARLY_NONE, &c), 0);
    T_EQ(d->sync(d, TD_STREAM_COMPUTE), TD_OK);
    dev_done();
}

static void test_device(void)
{
    td_dev *d = dev();
    T_EQ(d->arch, 80);
    char a[100], b[100];
    memset(a, 5, sizeof a);
    void *p = dev_put(a, sizeof a);
    simt_quiet(1);
    T_OK(d->download(d, TD_STREAM_OUT, b, p, 101) == TD_EDEVICE); /* longer than the block */
    simt_clear_error();
    T_OK(d->upload(d, TD_STREAM_IN, b, a, 100) == TD_EDEVICE); /* not device memory */
    simt_clear_error();
    simt_quiet(0);
    td_event *e = NULL, *f = NULL;
    T_EQ(d->event_open(d, &e), TD_OK);
    T_EQ(d->event_open(d, &f), TD_OK);
    double us = -1;
    d->record(d, TD_STREAM_COMPUTE, e);
    d->wait(d, TD_STREAM_OUT, e);
    d->record(d, TD_STREAM_COMPUTE, f);
    T_EQ(d->await(d, f), TD_OK);
    T_OK(d->elapsed_us(d, e, f, &us) == TD_OK && us >= 0);
    d->event_close(d, e);
    d->event_close(d, f);
    td_dev *none = NULL;
    T_EQ(td_dev_open("cuda", 1, &none), TD_ENOSUP);
    T_EQ(td_dev_open("tpu", 0, &none), TD_EBADREQ);
    td_dev *host = NULL;
    T_EQ(td_dev_open("host", 0, &host), TD_OK);
    void *h = NULL;
    T_OK(host->alloc(host, 100, &h) == TD_OK && !((uintptr_t)h & 255));
    T_OK(host->upload(host, TD_STREAM_IN, h, a, 100) == TD_OK && !memcmp(h, a, 100));
    host->free(host, h);
    td_dev_close(host);
    dev_done();
}

int main(void)
{
    test_warps();
    test_mma(0);
    test_mma(1);
    test_ldmatrix(0);
    test_ldmatrix(1);
    test_convert(0);
    test_convert(1);
    test_copy();
    test_hand_over();
    test_graph();
    if (!strncmp(dev()->name, "simt", 4)) { /* on a device an error would end the process */
        test_bugs();
        test_narrow();
        test_early();
        test_missing_barrier_shows();
        test_device();
    }
    return T_DONE();
}
