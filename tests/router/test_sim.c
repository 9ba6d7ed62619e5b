/* tests/router/test_sim.c - whatever dies, clients receive what they would have received undisturbed. */
// SPDX-License-Identifier: Apache-2.0
#include "tests/router/support_sim.h"
#include "tests/router/support_tok.h"
#include "tests/t.h"

static const td_tokenizer *tok;

static void undisturbed(void)
{
    for (uint64_t seed = 1; seed <= 4; seed++) {
        sim *s = sim_open(&(sim_opts){.seed = seed,
                                      .prefill = 2,
                                      .decode = 2,
                                      .mixed = seed % 2,
                                      .clients = 120,
                                      .arrive_us = 2000000,
                                      .text = true,
                                      .scores = true,
                                      .tokenizer = tok});
        T_OK(sim_settle(s, 60000000));
        T_EQ(sim_check(s, false), 0);
        const td_core_counts *n = td_core_counts_of(sim_core(s));
        T_EQ(n->done, 120);
        T_EQ(n->mismatches + n->faults, 0);
        if (!(seed % 2)) T_EQ(n->placed_pair, 120);
        T_OK(n->landed > 50);
        sim_close(s);
    }
}

/* Every kind of fault by itself, so that a failure names it. */
static void one_fault(const char *name, sim_faults f, bool allow_failed)
{
    for (uint64_t seed = 1; seed <= 6; seed++) {
        sim *s = sim_open(&(sim_opts){.seed = seed,
                                      .prefill = 2,
                                      .decode = 2,
                                      .mixed = 1,
                                      .clients = 100,
                                      .arrive_us = 3000000,
                                      .text = true,
                                      .scores = true,
                                      .tokenizer = tok,
                                      .fault = f,
                                      .faults_until_us = 5000000});
        bool settled = sim_settle(s, 120000000);
        T_OK(settled, "%s seed %d", name, (int)seed);
        int bad = sim_check(s, allow_failed);
        T_OK(bad == 0, "%s seed %d: %d", name, (int)seed, bad);
        sim_close(s);
    }
}

static void everything_at_once(int seeds)
{
    uint64_t placed = 0, replaced = 0;
    for (uint64_t seed = 100; seed < 100 + (uint64_t)seeds; seed++) {
        sim *s = sim_open(&(sim_opts){.seed = seed,
                                      .prefill = (int)(seed % 3),
                                      .decode = 1 + (int)(seed % 2),
                                      .mixed = (int)(seed % 4 == 0) + 1,
                                      .clients = 120,
                                      .arrive_us = 4000000,
                                      .cancel = 0.15,
                                      .deadline = 0.1,
                                      .text = true,
                                      .scores = true,
                                      .tokenizer = tok,
                                      .fault = {.kill = 0.05,
                                                .restart = 0.9,
                                                .freeze = 0.03,
                                                .hang = 0.02,
                                                .busy = 0.1,
                                                .fail = 0.001,
                                                .dup = 0.1,
                                                .lose_commit = 0.1,
                                                .goodbye = 0.3},
                                      .faults_until_us = 6000000});
        T_OK(sim_settle(s, 200000000), "seed %d", (int)seed);
        int bad = sim_check(s, true);
        T_OK(bad == 0, "seed %d: %d complaints", (int)seed, bad);
        const td_core_counts *n = td_core_counts_of(sim_core(s));
        placed += n->placed_alone + n->placed_pair;
        for (int i = 0; i < TD_REPLACE_COUNT; i++) replaced += n->replaced[i];
        /* Workers hold nothing either, once the ones that slept have read their mail. */
        sim_run(s, sim_now(s) + 20000000);
        for (int i = 0; i < sim_n_workers(s); i++) T_EQ(sim_worker_legs(s, i), 0);
        sim_close(s);
    }
    T_OK(replaced > placed / 20, "the faults did something: %llu of %llu", (unsigned long long)replaced,
         (unsigned long long)placed);
}

/* The same seed gives the same run. */
static void repeatable(void)
{
    int64_t end[2];
    uint64_t stale[2];
    for (int i = 0; i < 2; i++) {
        sim *s = sim_open(&(sim_opts){.seed = 9,
                                      .prefill = 1,
                                      .decode = 2,
                                      .mixed = 0,
                                      .clients = 60,
                                      .arrive_us = 2000000,
                                      .cancel = 0.2,
                                      .fault = {.kill = 0.05, .restart = 1, .freeze = 0.05, .busy = 0.1},
                                      .faults_until_us = 3000000});
        sim_settle(s, 60000000);
        end[i] = sim_now(s);
        stale[i] = td_core_counts_of(sim_core(s))->stale_messages;
        sim_close(s);
    }
    T_EQ(end[0], end[1]);
    T_EQ(stale[0], stale[1]);
}

int main(int argc, char **argv)
{
    tok = support_tokenizer();
    int seeds = argc > 1 ? atoi(argv[1]) : 25;
    undisturbed();
    one_fault("kill", (sim_faults){.kill = 0.06, .restart = 1}, true);
    one_fault("freeze", (sim_faults){.freeze = 0.1}, true);
    one_fault("hang", (sim_faults){.hang = 0.04}, true);
    one_fault("busy", (sim_faults){.busy = 0.4}, false);
    one_fault("fail", (sim_faults){.fail = 0.004}, true);
    one_fault("dup", (sim_faults){.dup = 0.5}, false);
    one_fault("lose_commit", (sim_faults){.lose_commit = 0.5}, false);
    everything_at_once(seeds);
    repeatable();
    support_tokenizer_close();
    return T_DONE();
}
