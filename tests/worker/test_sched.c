// SPDX-License-Identifier: Apache-2.0
/* tests/worker/test_sched.c - td_sched_plan on random cases: decode rows first, the budget kept and used up,
 * oldest first, the caps. */
#include "tests/t.h"
#include "worker/sched.h"

enum { MAX_ITEMS = 40 };

static uint64_t state = 99;
static uint32_t draw(uint32_t n)
{
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return (uint32_t)(state >> 33) % n;
}

typedef struct sums {
    uint32_t rows, decode, logits;
} sums;

static sums add_up(const td_sched_item *it, uint32_t n)
{
    sums s = {0};
    for (uint32_t i = 0; i < n; i++) {
        s.rows += it[i].rows;
        s.decode += it[i].decode ? it[i].rows : 0;
        s.logits += it[i].all_logits ? it[i].rows : it[i].rows > 0;
    }
    return s;
}

static void check(const td_sched_item *it, uint32_t n, td_sched_caps c, uint32_t left)
{
    sums s = add_up(it, n);
    uint32_t decodes = 0;
    T_OK(s.rows <= c.max_rows && s.logits <= c.max_logits, "%u rows of %u, %u logits of %u", s.rows,
         c.max_rows, s.logits, c.max_logits);
    T_EQ(left, c.max_rows - s.rows);
    for (uint32_t i = 0; i < n; i++) {
        decodes += it[i].decode;
        T_OK(it[i].rows <= it[i].want);
        T_OK(it[i].decode || !c.max_chunk || it[i].rows <= c.max_chunk, "a chunk of %u", it[i].rows);
    }
    /* Decode rows are skipped only when rows or logits are used up by decode rows alone, and then the
     * youngest. */
    uint32_t room = c.max_rows < c.max_logits ? c.max_rows : c.max_logits;
    T_EQ(s.decode, decodes < room ? decodes : room);
    for (uint32_t i = 0, skipped = 0; i < n; i++) {
        if (!it[i].decode) continue;
        T_OK(!skipped || !it[i].rows, "a younger decode row before an older one");
        skipped += !it[i].rows;
    }
    /* A prompt gets less than it could only when rows or logits ran out: then nobody younger gets any. */
    for (uint32_t i = 0, short_of = 0; i < n; i++) {
        if (it[i].decode) continue;
        uint32_t could = it[i].want;
        if (c.max_chunk && could > c.max_chunk) could = c.max_chunk;
        T_OK(!short_of || !it[i].rows, "prompt %u is served before an older one is", i);
        if (it[i].rows >= could) continue;
        short_of = 1;
        T_OK(!left || s.logits == c.max_logits, "rows are left, and prompt %u got %u of %u", i, it[i].rows,
             could);
    }
}

static void random_cases(int cases)
{
    for (int k = 0; k < cases && !t_failed; k++) {
        td_sched_item it[MAX_ITEMS], again[MAX_ITEMS];
        uint32_t n = draw(MAX_ITEMS);
        for (uint32_t i = 0; i < n; i++) {
            bool decode = draw(2);
            it[i] = (td_sched_item){.want = decode ? 1 : 1 + draw(draw(4) ? 30 : 500),
                                    .decode = decode,
                                    .all_logits = !decode && draw(5) == 0,
                                    .rows = 77};
        }
        td_sched_caps c = {1 + draw(draw(2) ? 300 : 20), draw(2) ? draw(65) : 0, 1 + draw(80), 0};
        memcpy(again, it, sizeof it);
        uint32_t left = td_sched_plan(it, n, c);
        check(it, n, c, left);
        T_OK(td_sched_plan(again, n, c) == left && add_up(again, n).rows == add_up(it, n).rows,
             "not a function of its input");
    }
}

static void named_cases(void)
{
    td_sched_item it[4] = {
        {.want = 100}, {.want = 1, .decode = true}, {.want = 50}, {.want = 1, .decode = true}};
    T_EQ(td_sched_plan(it, 4, (td_sched_caps){64, 0, 10, 0}), 0);
    T_OK(it[0].rows == 62 && it[1].rows == 1 && it[2].rows == 0 && it[3].rows == 1,
         "a long prompt does not stall decodes");
    T_EQ(td_sched_plan(it, 4, (td_sched_caps){64, 16, 10, 0}), 30);
    T_OK(it[0].rows == 16 && it[2].rows == 16);
    T_EQ(td_sched_plan(it, 4, (td_sched_caps){1, 16, 10, 0}), 0);
    T_OK(it[1].rows == 1 && !it[0].rows && !it[2].rows && !it[3].rows, "the oldest decode row first");
    T_EQ(td_sched_plan(it, 4, (td_sched_caps){200, 0, 10, 0}), 48);
    it[2].all_logits = true;
    T_EQ(td_sched_plan(it, 4, (td_sched_caps){200, 0, 10, 0}), 91);
    T_EQ(it[2].rows, 7); /* two decode rows and the first prompt's end take the other three */
    T_EQ(td_sched_plan(it, 0, (td_sched_caps){200, 0, 10, 0}), 200);
    it[2].all_logits = false;
    T_EQ(td_sched_plan(it, 4, (td_sched_caps){200, 0, 10, 110}), 88);
    T_OK(it[0].rows == 100 && it[2].rows == 10 && it[1].rows == 1, "decode rows are not of the prompts' share");
    T_EQ(td_sched_plan(it, 4, (td_sched_caps){200, 16, 10, 20}), 178);
    T_OK(it[0].rows == 16 && it[2].rows == 4);
}

static void pipe_rows(void)
{
    T_EQ(td_sched_pipe_rows(1 << 20, 1, 64), 0); /* one stage waits for nobody */
    T_EQ(td_sched_pipe_rows(2048, 2, 64), 64);
    T_EQ(td_sched_pipe_rows(1, 2, 64), 64);
    T_EQ(td_sched_pipe_rows(2048, 2, 256), 256);
    T_EQ(td_sched_pipe_rows(65536, 2, 64), 2048);
    T_EQ(td_sched_pipe_rows(65536, 5, 64), 512);
    T_EQ(td_sched_pipe_rows(UINT64_MAX, 2, 64), UINT32_MAX);
}

int main(void)
{
    named_cases();
    pipe_rows();
    random_cases(100000);
    return T_DONE();
}
