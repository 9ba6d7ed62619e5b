/* router/core/core_int.h - what the files of the machine share. router.c: events, workers, timers. attempt.c:
 * placing, losing, ending. leg.c: what workers say about a request. out.c: making td_outs. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_ROUTER_CORE_CORE_INT_H
#define TD_ROUTER_CORE_CORE_INT_H

#include "common/map.h"
#include "router/core/admit.h"
#include "router/core/place.h"
#include "router/core/router.h"

struct td_core {
    td_core_opts o;
    td_fleet fleet;
    td_index *index;
    td_map by_id;               /* job id -> td_request * */
    td_list queue, running, closing;
    td_request *grave;          /* released: freed at the start of the next step */
    td_core_counts counts;
    bool draining, left;        /* left: every worker was told GOODBYE */
    int64_t now_us, dark_us;    /* dark: since when no worker is alive; 0: someone is */
    int64_t drain_end_us;
    td_actions *out;            /* of the current step */
    td_buf text;                /* scratch of a delta */
};

/* out.c */
td_action *core_action(td_core *c, td_action_type type);
td_msg *core_send(td_core *c, const td_worker *w, td_msg_type type);
void core_log(td_core *c, td_log_level level, const char *fmt, ...) __attribute__((format(printf, 3, 4)));
void core_emit_delta(td_core *c, const td_request *r, uint32_t choice, uint32_t offset,
                     const td_msg_tokens *t, uint32_t skip, uint32_t n, const char *text, size_t text_len);
void core_emit_prompt(td_core *c, const td_request *r, const td_msg_score *s, uint32_t n);
void core_emit_end(td_core *c, td_request *r, td_out_kind kind, uint32_t retry_ms, const char *reason);
void core_emit_refusal(td_core *c, const td_job *j, td_why why, uint32_t retry_ms, const char *reason);

/* attempt.c */
void core_schedule(td_core *c); /* place from the head of the queue while someone has room */
void core_start_prefill(td_core *c, td_request *r, const td_msg *reserved);
/* The current attempt is over. worker: who caused it (0: nobody in particular), to be avoided next time. */
void core_again(td_core *c, td_request *r, uint64_t worker, td_replace why, const char *reason);
void core_fail(td_core *c, td_request *r, td_why why, uint32_t retry_ms, const char *fmt, ...)
    __attribute__((format(printf, 5, 6)));
void core_check_done(td_core *c, td_request *r);      /* all choices finished? then DONE */
void core_cancel_lease(td_core *c, td_lease *l);
void core_close_lease(td_core *c, td_lease *l);       /* and release its request if that was the last one */
void core_lose_worker(td_core *c, td_worker *w, td_worker_state to, td_replace why, const char *reason);

/* leg.c */
void core_leg_message(td_core *c, td_worker *w, const td_msg *m);

#endif
