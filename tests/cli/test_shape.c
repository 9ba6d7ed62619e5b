// SPDX-License-Identifier: Apache-2.0
/* How ranks divide a model: text, choice by a number of ranks, agreement, and the options for the worker. */
#include "deploy/cli/cluster_shape.h"
#include "tests/t.h"
#include <string.h>

static td_model_desc tiny, mqa, moe; /* 8 heads and 2 or 1 kv heads; experts */

static void text(void)
{
    td_shape s;
    T_EQ(td_shape_parse("x", "", &s), TD_OK);
    T_EQ(td_shape_ranks(&s), 1);
    T_EQ(td_shape_parse("x", "pp=3,tp=2,ep,cp=5,fsdp,dp=7", &s), TD_OK);
    T_EQ(s.tp, 2);
    T_EQ(s.pp, 3);
    T_EQ(s.cp, 5);
    T_EQ(s.dp, 7);
    T_EQ(s.ep && s.fsdp, 1);
    const char *bad[] = {"tp", "tp=", "tp=0", "tp=-1", "tp=1025", "tp=2x", "tp=2,", ",", "xp=2",
                         "tp=99999999999999999999",
                         "tp 2", "fsdp=1", "tp=64,pp=64", "tp=2;pp=2", "=2", "ep,,ep"};
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        td_shape before = s;
        T_EQ(td_shape_parse("decode-parallel", bad[i], &s), TD_EBADREQ);
        T_OK(!strncmp(td_reason(), "decode-parallel: ", 17), "%s", td_reason());
        T_OK(!memcmp(&before, &s, sizeof s), "%s", td_reason());
    }
}

static void chosen(const td_model_desc *d, int ranks, int tp, int pp)
{
    td_shape s = {.tp = 1, .pp = 1, .cp = 1, .dp = 1};
    T_EQ(td_shape_settle("ranks", d, ranks, false, &s), TD_OK);
    T_EQ(s.tp, tp);
    T_EQ(s.pp, pp);
}

static void settle(void)
{
    chosen(&tiny, 1, 1, 1);
    chosen(&tiny, 2, 2, 1);
    chosen(&tiny, 3, 1, 3);
    chosen(&tiny, 4, 4, 1);
    chosen(&tiny, 6, 2, 3);
    chosen(&tiny, 8, 8, 1);
    chosen(&mqa, 8, 8, 1);
    td_shape one = {.tp = 1, .pp = 1, .cp = 1, .dp = 1}, s = one;
    T_EQ(td_shape_settle("decode-ranks", &tiny, 1024, false, &s), TD_EBADREQ); /* more stages than layers */
    T_OK(strstr(td_reason(), "decode-ranks: pipeline-parallel-size"), "%s", td_reason());
    T_OK(!memcmp(&s, &one, sizeof s), "%s", td_reason());
    T_EQ(td_shape_settle("ranks", NULL, 4, false, &s), TD_EBADREQ); /* no model to choose by */
    s.tp = 3;
    T_EQ(td_shape_settle("x", &tiny, 0, true, &s), TD_EBADREQ);
    T_OK(strstr(td_reason(), "x: tensor-parallel-size 3 is no power of two"), "%s", td_reason());
    s.tp = 16;
    T_EQ(td_shape_settle("x", &tiny, 0, true, &s), TD_EBADREQ);
    T_OK(strstr(td_reason(), "query heads 8 cannot be divided"), "%s", td_reason());
    T_EQ(td_shape_settle("x", NULL, 0, true, &s), TD_OK); /* the worker will tell */
    T_EQ(td_shape_settle("x", NULL, 4, true, &s), TD_EBADREQ);
    T_OK(strstr(td_reason(), "4 ranks, but tensor 16"), "%s", td_reason());
    s = (td_shape){.tp = 2, .pp = 1, .cp = 1, .dp = 1, .ep = true};
    T_EQ(td_shape_settle("x", &tiny, 2, true, &s), TD_EBADREQ); /* no experts */
    T_EQ(td_shape_settle("x", &moe, 2, true, &s), TD_OK);
    s = (td_shape){.tp = 2, .pp = 1, .cp = 1, .dp = 1, .fsdp = true};
    T_EQ(td_shape_settle("x", &tiny, 2, true, &s), TD_EBADREQ); /* nothing to shard over */
}

static void options(void)
{
    td_shape in = {.tp = 2, .pp = 3, .cp = 4, .dp = 5, .ep = true, .fsdp = true};
    char *argv[TD_SHAPE_ARGS + 1] = {(char *)"worker"};
    td_arena a, small;
    td_arena_init(&a, 4096);
    td_arena_init(&small, 40);
    int n = td_shape_args(&in, &a, argv + 1);
    T_EQ(n, TD_SHAPE_ARGS);
    td_conf c;
    T_EQ(td_conf_parse(&c, TD_CONF_WORKER, n + 1, argv, NULL, 0, NULL), TD_OK);
    td_shape out = td_shape_of_conf(&c);
    T_OK(out.tp == 2 && out.pp == 3 && out.cp == 4 && out.dp == 5 && out.ep && out.fsdp, "%s", td_reason());
    T_EQ(td_shape_args(&in, &small, argv + 1), -1);
    td_conf_deinit(&c);
    td_arena_deinit(&a);
    td_arena_deinit(&small);
}

int main(void)
{
    T_EQ(td_model_desc_shape("ranks-tiny", &tiny), TD_OK);
    T_EQ(td_model_desc_shape("ranks-mqa", &mqa), TD_OK);
    T_EQ(td_model_desc_shape("moe-tiny", &moe), TD_OK);
    text();
    settle();
    options();
    return T_DONE();
}
