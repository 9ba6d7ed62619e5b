// SPDX-License-Identifier: Apache-2.0
/* tests/amx/test_choose.c - the amx family among the others: when it is chosen, what its arithmetic is called, what is said
 * and used instead where tiles add otherwise than the law; that threads release their tiles; and ranks that differ. */
#include "common/conf.h"
#include "common/log.h"
#include "kernels/amx.h"
#include "kernels/family.h"
#include "tests/amx/emulated.h"
#include "tests/kernels/support.h"
#include "tests/said.h"
#include "worker/boot.h"
#include "worker/ranks.h"
#include <pthread.h>

#define X86 "cpu-x86-bf16"
#define AMX "cpu-amx-bf16"

typedef struct booted {
    td_status status;
    char family[32], numerics[64], reason[512];
} booted;

/* Opens the tiny shape with these options. */
static booted boot(td_ranks *ranks, const char *ops, const char *numerics)
{
    char *argv[] = {"logits", "--load-format", "dummy", "--threads", "1", "--no-pack-cache", "--ops", (char *)ops,
                    "--numerics", (char *)numerics};
    const char *none[1];
    int n = (int)TD_COUNT(argv) - (numerics ? 0 : 2), n_none = 0;
    booted b = {0};
    td_conf conf = {0};
    td_boot at;
    b.status = td_conf_parse(&conf, TD_CONF_LOGITS, n, argv, none, 1, &n_none);
    if (b.status >= 0) b.status = td_boot_open(&conf, "", 0, ranks, &at);
    if (b.status >= 0) {
        snprintf(b.family, sizeof b.family, "%s", at.ops->family);
        td_boot_numerics(&at, b.numerics, sizeof b.numerics);
        td_boot_close(&at);
    } else snprintf(b.reason, sizeof b.reason, "%s", td_reason());
    td_conf_deinit(&conf);
    return b;
}

static void is(const char *ops, const char *numerics, const char *want_numerics)
{
    booted b = boot(NULL, ops, numerics);
    T_OK(b.status == TD_OK && !strcmp(b.numerics, want_numerics), "--ops %s --numerics %s: %s %s", ops, numerics ? numerics : "",
         b.numerics, b.reason);
    T_OK(!strcmp(b.family, "amx") == !strcmp(b.numerics, AMX), "%s is called %s", b.family, b.numerics);
}

static void is_not(const char *ops, const char *numerics, const char *why)
{
    booted b = boot(NULL, ops, numerics);
    T_OK(b.status == TD_ENOSUP && strstr(b.reason, why), "--ops %s --numerics %s: \"%s\" is not in: %s", ops,
         numerics ? numerics : "", why, b.reason);
}

static void choose(void)
{
    is("auto", NULL, AMX), is("amx", NULL, AMX), is("auto", AMX, AMX), is("amx", AMX, AMX);
    is("auto", X86, X86), is("avx2", NULL, X86); /* a mixed fleet: the best of those that compute so */
    is_not("amx", X86, "kernel family amx computes as " AMX ", not as " X86);
    is_not("avx2", AMX, "kernel family avx2 computes as " X86 ", not as " AMX);
}

/* Tiles that add as vdpbf16ps does: another id's arithmetic. */
static void auto_only(void) { is("auto", NULL, X86); }
static void wrong_tiles(void)
{
    td_tile_as_chain = true;
    const char *text = said(auto_only);
    T_OK(times_said(text, "kernel family amx does not keep the matrix law on this CPU: not used") == 1, "not once: %s", text);
    is("auto", X86, X86);
    is_not("amx", NULL, "kernel family \"amx\" computes otherwise than its numerics id on this CPU");
    is_not("auto", AMX, "no kernel family of this CPU computes as " AMX);
    td_tile_as_chain = false;
    is("auto", NULL, AMX);
}

/* One packed order: an image that another family made serves this one. */
static void same_images(const td_ops *amx)
{
    const td_ops *avx2 = NULL;
    T_OK(td_ops_open("avx2", &avx2) == TD_OK && amx->layout == avx2->layout && amx->layout == TD_LAYOUT_PANEL32_BF16);
    T_OK(amx->pack == avx2->pack && amx->packed_bytes == avx2->packed_bytes && amx->packed_dtype == avx2->packed_dtype);
    T_OK(amx->attention != td_ops_family(0)->attention && amx->linear != avx2->linear);
}

static void threads_release(const td_ops *amx)
{
    enum { N = 96, K = 40, M = 33 };
    td_tile_counts before = td_tile_count();
    float *w = floats(N * K), *x = floats(M * K), *y = floats(M * N);
    rnd_fill(w, N * K, 1, 1), rnd_fill(x, M * K, 2, 1);
    void *packed = block_alloc(amx->packed_bytes(N, K, 1, TD_F32)), *scratch = block_alloc(amx->scratch_bytes(M, K, 16, 3));
    amx->pack(packed, w, TD_F32, N, K, 1, 0, N);
    td_weight weight = {.N = N, .K = K, .dtype = TD_BF16, .p = packed, .slices = 1};
    amx->linear(team(3), scratch, &weight, x, K, M, y, N, false);
    td_tile_counts after = td_tile_count();
    /* 3 panels; blocks of 17 rows (two tiles of rows) and 16; two steps of k */
    T_EQ(after.multiplied - before.multiplied, 3 * (4 + 2) * 2);
    T_OK(after.configured - before.configured >= 2 && after.held == 0, "%d threads hold tiles", after.held);
    free(w), free(x), free(y), free(packed), free(scratch);
}

static void peak_loop(void)
{
    td_tile_counts before = td_tile_count();
    T_OK(td_amx_loop(5) == 0);
    T_EQ(td_tile_count().multiplied - before.multiplied, 5 * 4);
    T_EQ(td_tile_count().held, 0);
    T_EQ(TD_AMX_LOOP_OPS, 4 * 2 * 16 * 16 * 32);
}

/* ---- ranks of one worker on different machines ---- */

typedef struct rank {
    td_coll *world;
    const char *ops;
    booted b;
} rank;

static void *rank_boots(void *arg)
{
    rank *r = arg;
    td_ranks ranks;
    td_grid grid = {.tp = 2, .pp = 1, .cp = 1, .dp = 1};
    T_OK(td_ranks_open(r->world, &grid, &ranks) == TD_OK);
    r->b = boot(&ranks, r->ops, NULL);
    td_ranks_close(&ranks);
    td_coll_close(r->world);
    return NULL;
}

static void ranks_agree(const char *a, const char *b, bool alike)
{
    td_coll *end[2];
    pthread_t t[2];
    rank r[2];
    T_OK(td_coll_threads_open(2, end) == TD_OK);
    for (int i = 0; i < 2; i++) {
        r[i] = (rank){.world = end[i], .ops = i ? b : a};
        TD_CHECK(!pthread_create(&t[i], NULL, rank_boots, &r[i]));
    }
    for (int i = 0; i < 2; i++) pthread_join(t[i], NULL);
    for (int i = 0; i < 2; i++)
        T_OK(alike ? r[i].b.status == TD_OK
                   : r[i].b.status == TD_EPROTO && strstr(r[i].b.reason, AMX) && strstr(r[i].b.reason, X86),
             "rank %d with %s: %s", i, r[i].ops, r[i].b.reason);
}

int main(void)
{
    const td_ops *amx = td_amx_family(0);
    td_log_open("test", TD_LOG_WARN);
    choose();
    wrong_tiles();
    same_images(amx);
    threads_release(amx);
    peak_loop();
    ranks_agree("amx", "avx2", false);
    ranks_agree("amx", "amx", true), ranks_agree("auto", "auto", true);
    return T_DONE();
}
