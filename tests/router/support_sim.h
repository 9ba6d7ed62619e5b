/* tests/router/support_sim.h - a cluster in one process: the real td_core, mock workers, virtual time, faults
 * from a seed.
 *
 * A mock worker makes token(prompt, seed, choice, index): a pure function, so what a client must receive is
 * known without a run. All messages go through td_msg_pack and td_msg_unpack, in order per worker, with
 * random delays. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_ROUTER_SUPPORT_SIM_H
#define TD_TESTS_ROUTER_SUPPORT_SIM_H

#include "router/core/router.h"

enum { SIM_EOS = 256, SIM_MAX_CLIENTS = 2048, SIM_MAX_WORKERS = 64 };

typedef struct sim_faults {    /* probabilities per opportunity */
    double kill, restart, freeze, hang, busy, fail, dup, lose_commit, goodbye;
} sim_faults;

typedef struct sim_opts {
    uint64_t seed;
    int prefill, decode, mixed, clients;
    int64_t arrive_us;         /* requests arrive over this span */
    double cancel, deadline;   /* fraction of clients */
    bool text, scores;
    sim_faults fault;
    int64_t faults_until_us;   /* quiet afterwards */
    const td_tokenizer *tokenizer;
    td_core_opts core;
    bool verbose;
} sim_opts;

typedef struct sim_client {
    td_job *job;               /* while not submitted */
    uint64_t id;
    uint32_t n, n_prompt, *prompt, max_tokens, min_tokens;
    uint64_t seed;
    char *stop[4];
    uint32_t n_stop;
    bool include_stop, scores;
    int64_t submit_us, cancel_us;
    /* what came */
    uint32_t *got[8], n_got[8];
    char *text[8];
    size_t n_text[8];
    td_finish finish[8];
    int stop_string[8];
    bool got_scores;
    int terminals;
    td_out_kind last;
    td_why why;
    td_usage usage;
    td_timings timings;
    char reason[200];
    int64_t first_us, end_us;
} sim_client;

typedef struct sim sim;

sim *sim_open(const sim_opts *o);
void sim_close(sim *s);
void sim_run(sim *s, int64_t until_us);  /* virtual time */
bool sim_settle(sim *s, int64_t limit_us); /* run until every client has its end and the core is idle */
td_core *sim_core(sim *s);
int64_t sim_now(const sim *s);
int sim_clients(const sim *s);
sim_client *sim_client_at(sim *s, int i);
/* Scripted: */
sim_client *sim_submit(sim *s, uint32_t n_prompt, uint32_t n, uint32_t max_tokens, uint64_t seed); /* now */
void sim_cancel(sim *s, const sim_client *c);
void sim_kill(sim *s, int worker);       /* like SIGKILL */
void sim_freeze(sim *s, int worker, int64_t us); /* like SIGSTOP ... SIGCONT */
void sim_hang(sim *s, int worker, bool on);      /* beats, but no steps */
int sim_start_worker(sim *s, td_role role);
int sim_n_workers(const sim *s);
uint64_t sim_incarnation(const sim *s, int worker);
uint32_t sim_worker_legs(const sim *s, int worker);
uint64_t sim_worker_started(const sim *s, int worker); /* legs ever begun */
/* The answer without a cluster: ids and text of one choice. Returns the number of ids. */
uint32_t sim_expect(const sim_client *c, const td_tokenizer *t, uint32_t choice, uint32_t *ids, char **text,
                    size_t *n_text, td_finish *finish);
uint32_t sim_token(const uint32_t *prompt, uint32_t n_prompt, uint64_t seed, uint32_t choice, uint32_t index);
/* Checks every client; returns the number of complaints, printed up to 10. allow_failed: FAILED for lack of
 * workers is no complaint. */
int sim_check(sim *s, bool allow_failed);

#endif
