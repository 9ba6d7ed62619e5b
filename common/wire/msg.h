/* common/wire/msg.h - the control messages between router and worker as plain structs (proto/control.proto is
 * their wire form).
 *
 * Rules:     1. td_msg_unpack validates everything (sizes, enum ranges, n in 1..TD_MAX_CHOICES, array
 *               lengths) before handing out; what it hands out needs no further checks against memory, only
 *               against meaning (ids against the vocabulary).
 *            2. Unknown bodies and fields are ignored (TD_AGAIN) and counted by the caller.
 * Ownership: unpacked arrays and strings live in the arena given; packing copies. Threads: pure. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_WIRE_MSG_H
#define TD_COMMON_WIRE_MSG_H

#include "common/arena.h"
#include "common/buf.h"
#include "common/hash.h"
#include "common/sampling.h"
#include "common/status.h"

typedef enum {
    TD_MSG_NONE, TD_MSG_HELLO, TD_MSG_WELCOME, TD_MSG_REFUSED, TD_MSG_HEARTBEAT, TD_MSG_HEARTBEAT_ACK,
        TD_MSG_DRAIN, TD_MSG_GOODBYE, TD_MSG_START, TD_MSG_RESERVE, TD_MSG_RESERVED, TD_MSG_BUSY,
        TD_MSG_CANCEL, TD_MSG_CANCEL_CHOICE, TD_MSG_TOKENS, TD_MSG_PROMPT_DONE, TD_MSG_ENDED,
        TD_MSG_SHIP_REPORT
} td_msg_type;

typedef enum { TD_ROLE_NONE, TD_ROLE_PREFILL, TD_ROLE_DECODE, TD_ROLE_MIXED } td_role;
typedef enum { TD_WSTATE_NONE, TD_WSTATE_LOADING, TD_WSTATE_READY, TD_WSTATE_DRAINING } td_wstate;
enum { TD_MSG_MAX_GROUPS = 4, TD_MSG_MAX_EOS = 16 };

typedef struct td_req_key { uint64_t request; uint32_t attempt; } td_req_key;

typedef struct td_identity {
    td_h128 model_digest;
    const char *model, *kv_dtype, *numerics;
    uint32_t layers, kv_heads, head_dim, vocab, max_model_len;
} td_identity;
/* Equal in everything that must be equal; else reason (at most n bytes) names the field and both values. */
bool td_identity_same(const td_identity *a, const td_identity *b, char *reason, size_t n);

typedef struct td_msg_hello {
    const char *name, *bulk_endpoint, *build, *kernels;
    td_role role;
    td_identity id;
    uint32_t page_size, max_seqs, max_batched_tokens;
    uint64_t kv_tokens;
    uint32_t n_eos, eos[TD_MSG_MAX_EOS];
    uint8_t bulk_public_key[32];
    bool has_bulk_key;
} td_msg_hello;

typedef struct td_msg_ledger { int64_t total, free, private_, shared, cached, in_transit,
                               pinned; } td_msg_ledger;
typedef struct td_msg_experts { uint64_t balanced, moved, bytes; double counted, before, after; } td_msg_experts;
typedef struct td_msg_heartbeat {
    uint64_t seq, step, waiting_tokens;
    td_wstate state;
    bool busy;
    uint32_t legs_waiting, legs_running, seqs_running, epochs_open;
    uint32_t n_groups;
    td_msg_ledger ledger[TD_MSG_MAX_GROUPS];
    double prefill_tok_s, decode_tok_s;
    int64_t step_us;
    uint64_t steps, prompt_rows, decode_rows, discarded_rows, preemptions, hit_tokens, query_tokens;
    uint64_t frames_sent, frames_received, bytes_sent, frames_bad;
    td_msg_experts experts;
    bool has_experts;
} td_msg_heartbeat;

typedef struct td_ids { const uint32_t *p; uint32_t n; } td_ids;

typedef struct td_msg_work {
    td_req_key key;
    td_ids prompt;
    const td_ids *resume;        /* [n_resume]; n_resume is 0 or sampling.n */
    uint32_t n_resume;
    td_sampling sampling;
    uint32_t remaining_ms;       /* 0: no deadline */
    const void *salt; uint32_t salt_bytes;
} td_msg_work;

/* ranks: a packed BulkRanks as it came with Reserved (td_msg_ranks_unpack); none: one rank, at endpoint. */
typedef struct td_msg_sink { const char *endpoint; uint64_t epoch, incarnation; uint32_t hit_tokens,
                             credits; uint8_t public_key[32]; bool has_key; const void *ranks;
                             uint32_t ranks_bytes; } td_msg_sink;

enum { TD_MSG_MAX_RANKS = 64 };
/* control.proto's BulkRanks: what the numbers mean is worker/ship/grid_plan.h's business. */
typedef struct td_msg_ranks {
    uint32_t tp, pp, cp, token_kind, token_unit;
    uint32_t n_stages, stage[TD_MSG_MAX_RANKS + 1];
    uint32_t n;
    const char *endpoint[TD_MSG_MAX_RANKS];
} td_msg_ranks;

typedef struct td_msg_tokens {
    td_req_key key;
    uint32_t choice, base_index, n;
    const uint32_t *ids;
    const float *logprobs;       /* [n] or NULL */
    const td_top *top; uint32_t n_top; /* [n * n_top] */
    td_finish finish;
    uint32_t stop_token;
} td_msg_tokens;

typedef struct td_msg_score { uint32_t id; float logprob; uint32_t n_top; const td_top *top; } td_msg_score;

typedef struct td_msg {
    td_msg_type type;
    uint64_t sender;             /* incarnation of the sending process */
    union {
        td_msg_hello hello;
        struct { uint32_t heartbeat_ms; td_hkey hash_key; } welcome;
        struct { const char *reason; } refused;
        td_msg_heartbeat heartbeat;
        struct { uint64_t seq; } heartbeat_ack;
        struct { td_msg_work work; bool has_sink; td_msg_sink sink; } start;
        struct { td_msg_work work; } reserve;
        struct {
            td_req_key key;
            uint64_t epoch;
            uint32_t hit_tokens, credits;
            const char *endpoint;
            const void *ranks;   /* as in td_msg_sink */
            uint32_t ranks_bytes;
        } reserved;
        struct { td_req_key key; uint32_t retry_ms; const char *reason; } busy;
        struct { td_req_key key; uint32_t choice; } cancel; /* CANCEL and CANCEL_CHOICE */
        struct { uint64_t step; const td_msg_tokens *list; uint32_t n; } tokens;
        struct {
            td_req_key key;
            uint32_t cached_tokens;
            int64_t queued_us, prefill_us;
            const td_msg_score *scores;
            uint32_t n_scores;
        } prompt_done;
        struct {
            td_req_key key;
            td_finish finish;
            td_status status;
            const char *reason;
            bool handed_off;
        } ended;
        struct {
            td_req_key key;
            bool landed;
            const char *reason;
            int64_t transfer_us, exposed_us;
            uint64_t bytes;
            uint32_t frames;
        } ship_report;
    };
} td_msg;

const char *td_msg_name(td_msg_type t);
/* EFULL: over out's limit */
td_status td_msg_pack(const td_msg *m, td_buf *out);
/* EPROTO with reason; AGAIN: unknown body */
td_status td_msg_unpack(const void *p, size_t n, td_arena *arena, td_msg *out);

td_status td_msg_ranks_pack(const td_msg_ranks *r, td_buf *out);
td_status td_msg_ranks_unpack(const void *p, size_t n, td_arena *arena, td_msg_ranks *out);

#endif
