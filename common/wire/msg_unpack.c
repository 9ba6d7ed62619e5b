// SPDX-License-Identifier: Apache-2.0
/* common/wire/msg_unpack.c - bytes from a peer become plain structs: everything is checked here, once.
 *
 * protobuf-c allocates from the caller's arena, so its limit also bounds what a hostile message can expand
 * to; the schema has no recursive messages (protobuf-c 1.4 has no depth limit). Arrays of numbers and strings
 * are handed out in place. */
#include "common/check.h"
#include "common/wire/msg.h"
#include "control.pb-c.h"
#include <math.h>
#include <string.h>

#define PB(name) Tandem__Control__V1__##name

enum {
    WIRE_VERSION = 1,
    MAX_TEXT = 4096,
    MAX_SALT = 1024,
    MAX_RANKS_BYTES = 64 << 10,
    MAX_IDS = 4 << 20,
    MAX_RESUME_IDS = 4 << 20,
    MAX_MODEL_NUMBER = 1 << 28
};

#define BAD(...) return td_refuse(TD_EPROTO, __VA_ARGS__)

static void *arena_alloc(void *arena, size_t n)
{
    return td_arena_alloc(arena, n);
}

static void arena_free(void *arena, void *p)
{
    (void)arena;
    (void)p;
}

static td_status get_text(const char *s, const char *what, const char **out)
{
    if (s && strnlen(s, MAX_TEXT + 1) > MAX_TEXT) BAD("%s is longer than %d bytes", what, MAX_TEXT);
    *out = s ? s : "";
    return TD_OK;
}

static td_status get_key(const PB(Key) *k, td_req_key *out)
{
    if (!k) BAD("key is missing");
    *out = (td_req_key){.request = k->request, .attempt = k->attempt};
    return TD_OK;
}

static td_status get_public_key(ProtobufCBinaryData b, uint8_t out[32], bool *has)
{
    if (b.len && b.len != 32) BAD("public key of %zu bytes, not 32", b.len);
    *has = b.len == 32;
    if (*has) memcpy(out, b.data, 32);
    return TD_OK;
}

static td_status get_identity(const PB(Identity) *id, td_identity *out)
{
    if (!id) BAD("identity is missing");
    out->model_digest = (td_h128){.lo = id->model_lo, .hi = id->model_hi};
    TD_TRY(get_text(id->model, "model", &out->model));
    TD_TRY(get_text(id->kv_dtype, "kv_dtype", &out->kv_dtype));
    TD_TRY(get_text(id->numerics, "numerics", &out->numerics));
    const uint32_t v[] = {id->layers, id->kv_heads, id->head_dim, id->vocab, id->max_model_len};
    for (size_t i = 0; i < TD_COUNT(v); i++)
        if (!v[i] || v[i] > MAX_MODEL_NUMBER)
            BAD("identity number %zu is %u, outside 1..%d", i, v[i], MAX_MODEL_NUMBER);
    out->layers = v[0];
    out->kv_heads = v[1];
    out->head_dim = v[2];
    out->vocab = v[3];
    out->max_model_len = v[4];
    return TD_OK;
}

static td_status get_hello(const PB(Hello) *p, td_msg_hello *h)
{
    TD_TRY(get_text(p->name, "name", &h->name));
    TD_TRY(get_text(p->bulk_endpoint, "bulk_endpoint", &h->bulk_endpoint));
    TD_TRY(get_text(p->build, "build", &h->build));
    TD_TRY(get_text(p->kernels, "kernels", &h->kernels));
    TD_TRY(get_identity(p->identity, &h->id));
    if ((int)p->role < TD_ROLE_PREFILL || (int)p->role > TD_ROLE_MIXED) BAD("role %d", (int)p->role);
    h->role = (td_role)p->role;
    if (p->n_eos > TD_MSG_MAX_EOS) BAD("%zu end ids, limit %d", p->n_eos, TD_MSG_MAX_EOS);
    h->n_eos = (uint32_t)p->n_eos;
    for (uint32_t i = 0; i < h->n_eos; i++) h->eos[i] = p->eos[i];
    if (!p->page_size || p->page_size > 4096) BAD("page size %u", p->page_size);
    if (!p->max_seqs) BAD("max_seqs 0");
    h->page_size = p->page_size;
    h->kv_tokens = p->kv_tokens;
    h->max_seqs = p->max_seqs;
    h->max_batched_tokens = p->max_batched_tokens;
    return get_public_key(p->bulk_public_key, h->bulk_public_key, &h->has_bulk_key);
}

static double not_nan(double v)
{
    return isfinite(v) ? v : 0;
}

static td_status get_heartbeat(const PB(Heartbeat) *p, td_msg_heartbeat *h)
{
    if ((int)p->state < TD_WSTATE_LOADING || (int)p->state > TD_WSTATE_DRAINING)
        BAD("worker state %d", (int)p->state);
    if (p->n_ledger > TD_MSG_MAX_GROUPS) BAD("%zu page groups, limit %d", p->n_ledger, TD_MSG_MAX_GROUPS);
    h->n_groups = (uint32_t)p->n_ledger;
    for (uint32_t i = 0; i < h->n_groups; i++) {
        const PB(GroupLedger) *g = p->ledger[i];
        h->ledger[i] = (td_msg_ledger){.total = g->total, .free = g->free, .private_ = g->private_,
                                       .shared = g->shared, .cached = g->cached, .in_transit = g->in_transit,
                                       .pinned = g->pinned};
    }
    const PB(Experts) *x = p->experts;
    if ((h->has_experts = x != NULL))
        h->experts = (td_msg_experts){.balanced = x->balanced, .moved = x->moved, .bytes = x->bytes,
                                      .counted = not_nan(x->counted), .before = not_nan(x->before),
                                      .after = not_nan(x->after)};
    h->seq = p->seq;
    h->state = (td_wstate)p->state;
    h->step = p->step;
    h->busy = p->busy;
    h->legs_waiting = p->legs_waiting;
    h->legs_running = p->legs_running;
    h->seqs_running = p->seqs_running;
    h->waiting_tokens = p->waiting_tokens;
    h->prefill_tok_s = not_nan(p->prefill_tok_s);
    h->decode_tok_s = not_nan(p->decode_tok_s);
    h->step_us = p->step_us;
    h->prompt_rows = p->prompt_rows;
    h->decode_rows = p->decode_rows;
    h->steps = p->steps;
    h->discarded_rows = p->discarded_rows;
    h->preemptions = p->preemptions;
    h->hit_tokens = p->hit_tokens;
    h->query_tokens = p->query_tokens;
    h->frames_sent = p->frames_sent;
    h->frames_received = p->frames_received;
    h->bytes_sent = p->bytes_sent;
    h->frames_bad = p->frames_bad;
    h->epochs_open = p->epochs_open;
    return TD_OK;
}

static td_status get_sampling(const PB(Sampling) *p, td_arena *a, td_sampling *s)
{
    if (!p) BAD("sampling is missing");
    const float f[] = {p->temperature, p->top_p, p->min_p, p->repetition_penalty, p->presence_penalty,
                       p->frequency_penalty};
    for (size_t i = 0; i < TD_COUNT(f); i++)
        if (!isfinite(f[i])) BAD("sampling number %zu is not finite", i);
    if (!p->n || p->n > TD_MAX_CHOICES) BAD("n is %u, outside 1..%d", p->n, TD_MAX_CHOICES);
    if (!p->max_tokens) BAD("max_tokens is 0");
    if (p->logprobs < -1 || p->logprobs > TD_MAX_TOP_LOGPROBS) BAD("logprobs %d", p->logprobs);
    if (p->prompt_logprobs < -1 || p->prompt_logprobs > TD_MAX_TOP_LOGPROBS)
        BAD("prompt_logprobs %d", p->prompt_logprobs);
    if (p->n_bias > TD_MAX_LOGIT_BIAS) BAD("%zu biases, limit %d", p->n_bias, TD_MAX_LOGIT_BIAS);
    if (p->n_stop_ids > TD_MAX_STOP_IDS) BAD("%zu stop ids, limit %d", p->n_stop_ids, TD_MAX_STOP_IDS);
    td_bias *bias = td_arena_alloc(a, p->n_bias * sizeof *bias);
    if (!bias) return td_refuse(TD_EFULL, "message expands over the limit");
    for (size_t i = 0; i < p->n_bias; i++) {
        if (isnan(p->bias[i]->add)) BAD("bias %zu is not a number", i);
        bias[i] = (td_bias){.id = p->bias[i]->id, .add = p->bias[i]->add};
    }
    *s = (td_sampling){.temperature = p->temperature, .top_k = p->top_k, .top_p = p->top_p, .min_p = p->min_p,
                       .repetition_penalty = p->repetition_penalty, .presence_penalty = p->presence_penalty,
                       .frequency_penalty = p->frequency_penalty, .seed = p->seed,
                       .max_tokens = p->max_tokens, .min_tokens = p->min_tokens, .ignore_eos = p->ignore_eos,
                       .n = p->n, .logprobs = p->logprobs, .prompt_logprobs = p->prompt_logprobs,
                       .n_bias = (uint32_t)p->n_bias, .bias = bias, .n_stop_ids = (uint32_t)p->n_stop_ids,
                       .stop_ids = p->stop_ids};
    return TD_OK;
}

static td_status get_work(const PB(Work) *p, td_arena *a, td_msg_work *w)
{
    if (!p) BAD("work is missing");
    TD_TRY(get_key(p->key, &w->key));
    TD_TRY(get_sampling(p->sampling, a, &w->sampling));
    if (!p->n_prompt_ids || p->n_prompt_ids > MAX_IDS)
        BAD("%zu prompt ids, outside 1..%d", p->n_prompt_ids, MAX_IDS);
    if (p->n_resume_ids && p->n_resume_ids != w->sampling.n)
        BAD("%zu resume lists for %u choices", p->n_resume_ids, w->sampling.n);
    if (p->salt.len > MAX_SALT) BAD("salt of %zu bytes, limit %d", p->salt.len, MAX_SALT);
    td_ids *resume = td_arena_alloc(a, p->n_resume_ids * sizeof *resume);
    if (!resume) return td_refuse(TD_EFULL, "message expands over the limit");
    for (size_t i = 0; i < p->n_resume_ids; i++) {
        if (p->resume_ids[i]->n_ids > MAX_RESUME_IDS) BAD("%zu resume ids", p->resume_ids[i]->n_ids);
        resume[i] = (td_ids){.p = p->resume_ids[i]->ids, .n = (uint32_t)p->resume_ids[i]->n_ids};
    }
    w->prompt = (td_ids){.p = p->prompt_ids, .n = (uint32_t)p->n_prompt_ids};
    w->resume = resume;
    w->n_resume = (uint32_t)p->n_resume_ids;
    w->remaining_ms = p->remaining_ms;
    w->salt = p->salt.data;
    w->salt_bytes = (uint32_t)p->salt.len;
    return TD_OK;
}

static td_status get_ranks(ProtobufCBinaryData b, const void **p, uint32_t *n)
{
    if (b.len > MAX_RANKS_BYTES) BAD("list of ranks of %zu bytes", b.len);
    *p = b.data;
    *n = (uint32_t)b.len;
    return TD_OK;
}

td_status td_msg_ranks_unpack(const void *p, size_t n, td_arena *arena, td_msg_ranks *out)
{
    ProtobufCAllocator alloc = {arena_alloc, arena_free, arena};
    PB(BulkRanks) *m = n > MAX_RANKS_BYTES ? NULL : tandem__control__v1__bulk_ranks__unpack(&alloc, n, p);
    if (!m) BAD("list of ranks of %zu bytes", n);
    if (m->n_endpoint > TD_MSG_MAX_RANKS || m->n_stage > TD_MSG_MAX_RANKS + 1)
        BAD("%zu ranks, %zu stage bounds", m->n_endpoint, m->n_stage);
    td_msg_ranks r = {.tp = m->tp,
                      .pp = m->pp,
                      .cp = m->cp,
                      .token_kind = m->token_kind,
                      .token_unit = m->token_unit,
                      .n_stages = (uint32_t)m->n_stage,
                      .n = (uint32_t)m->n_endpoint};
    for (uint32_t i = 0; i < r.n_stages; i++) r.stage[i] = m->stage[i];
    for (uint32_t i = 0; i < r.n; i++) TD_TRY(get_text(m->endpoint[i], "endpoint", &r.endpoint[i]));
    *out = r;
    return TD_OK;
}

static td_status get_sink(const PB(Sink) *p, td_msg_sink *s)
{
    TD_TRY(get_text(p->endpoint, "endpoint", &s->endpoint));
    if (!s->endpoint[0]) BAD("sink without endpoint");
    if (!p->credits) BAD("sink with 0 credits");
    s->epoch = p->epoch;
    s->incarnation = p->incarnation;
    s->hit_tokens = p->hit_tokens;
    s->credits = p->credits;
    TD_TRY(get_ranks(p->ranks, &s->ranks, &s->ranks_bytes));
    return get_public_key(p->public_key, s->public_key, &s->has_key);
}

static td_status get_tops(PB(Top) *const *list, size_t n, td_arena *a, const td_top **out)
{
    td_top *top = td_arena_alloc(a, n * sizeof *top);
    if (!top) return td_refuse(TD_EFULL, "message expands over the limit");
    for (size_t i = 0; i < n; i++) top[i] = (td_top){.id = list[i]->id, .logprob = list[i]->logprob};
    *out = top;
    return TD_OK;
}

static td_status get_one_tokens(const PB(Tokens) *p, td_arena *a, td_msg_tokens *t)
{
    TD_TRY(get_key(p->key, &t->key));
    if (p->choice >= TD_MAX_CHOICES) BAD("choice %u", p->choice);
    if (p->n_ids > MAX_IDS || p->base_index > MAX_IDS) BAD("%zu tokens at %u", p->n_ids, p->base_index);
    if (p->n_logprobs && p->n_logprobs != p->n_ids)
        BAD("%zu logprobs for %zu tokens", p->n_logprobs, p->n_ids);
    if (p->alternatives > TD_MAX_TOP_LOGPROBS) BAD("%u alternatives", p->alternatives);
    if (p->n_top != p->n_ids * p->alternatives) BAD("%zu alternatives for %zu tokens", p->n_top, p->n_ids);
    if (p->finish > TD_FINISH_ERROR) BAD("finish %u", p->finish);
    t->choice = p->choice;
    t->base_index = p->base_index;
    t->n = (uint32_t)p->n_ids;
    t->ids = p->ids;
    t->logprobs = p->n_logprobs ? p->logprobs : NULL;
    t->n_top = p->alternatives;
    t->finish = (td_finish)p->finish;
    t->stop_token = p->stop_token;
    return get_tops(p->top, p->n_top, a, &t->top);
}

static td_status get_tokens(const PB(TokenBatch) *p, td_arena *a, td_msg *m)
{
    td_msg_tokens *list = td_arena_alloc(a, p->n_tokens * sizeof *list);
    if (!list || p->n_tokens > UINT32_MAX) return td_refuse(TD_EFULL, "message expands over the limit");
    for (size_t i = 0; i < p->n_tokens; i++) TD_TRY(get_one_tokens(p->tokens[i], a, &list[i]));
    m->tokens.step = p->step;
    m->tokens.list = list;
    m->tokens.n = (uint32_t)p->n_tokens;
    return TD_OK;
}

static td_status get_prompt_done(const PB(PromptDone) *p, td_arena *a, td_msg *m)
{
    TD_TRY(get_key(p->key, &m->prompt_done.key));
    if (p->n_scores > MAX_IDS) BAD("%zu scores", p->n_scores);
    td_msg_score *list = td_arena_alloc(a, p->n_scores * sizeof *list);
    if (!list) return td_refuse(TD_EFULL, "message expands over the limit");
    for (size_t i = 0; i < p->n_scores; i++) {
        const PB(Score) *s = p->scores[i];
        if (s->n_top > TD_MAX_TOP_LOGPROBS) BAD("%zu alternatives", s->n_top);
        list[i] = (td_msg_score){.id = s->id, .logprob = s->logprob, .n_top = (uint32_t)s->n_top};
        TD_TRY(get_tops(s->top, s->n_top, a, &list[i].top));
    }
    m->prompt_done.cached_tokens = p->cached_tokens;
    m->prompt_done.queued_us = p->queued_us;
    m->prompt_done.prefill_us = p->prefill_us;
    m->prompt_done.scores = list;
    m->prompt_done.n_scores = (uint32_t)p->n_scores;
    return TD_OK;
}

static td_status get_ended(const PB(Ended) *p, td_msg *m)
{
    TD_TRY(get_key(p->key, &m->ended.key));
    TD_TRY(get_text(p->reason, "reason", &m->ended.reason));
    if (p->finish > TD_FINISH_ERROR) BAD("finish %u", p->finish);
    if (p->status < TD_ENOSUP || p->status > TD_AGAIN) BAD("status %d", p->status);
    m->ended.finish = (td_finish)p->finish;
    m->ended.status = (td_status)p->status;
    m->ended.handed_off = p->handed_off;
    return TD_OK;
}

static td_status get_ship_report(const PB(ShipReport) *p, td_msg *m)
{
    TD_TRY(get_key(p->key, &m->ship_report.key));
    TD_TRY(get_text(p->reason, "reason", &m->ship_report.reason));
    m->ship_report.landed = p->landed;
    m->ship_report.transfer_us = p->transfer_us;
    m->ship_report.exposed_us = p->exposed_us;
    m->ship_report.bytes = p->bytes;
    m->ship_report.frames = p->frames;
    return TD_OK;
}

static td_status get_welcome(const PB(Welcome) *p, td_msg *m)
{
    if (p->hash_key.len != sizeof(td_hkey))
        BAD("hash key of %zu bytes, not %zu", p->hash_key.len, sizeof(td_hkey));
    if (p->heartbeat_ms > 60000) BAD("heartbeat of %u ms", p->heartbeat_ms);
    m->welcome.heartbeat_ms = p->heartbeat_ms;
    memcpy(&m->welcome.hash_key, p->hash_key.data, sizeof(td_hkey));
    return TD_OK;
}

static td_status get_reserved(const PB(Reserved) *p, td_msg *m)
{
    TD_TRY(get_key(p->key, &m->reserved.key));
    m->reserved.epoch = p->epoch;
    m->reserved.hit_tokens = p->hit_tokens;
    m->reserved.credits = p->credits;
    TD_TRY(get_ranks(p->ranks, &m->reserved.ranks, &m->reserved.ranks_bytes));
    return get_text(p->endpoint, "endpoint", &m->reserved.endpoint);
}

static td_status get_busy(const PB(Busy) *p, td_msg *m)
{
    TD_TRY(get_key(p->key, &m->busy.key));
    m->busy.retry_ms = p->retry_ms;
    return get_text(p->reason, "reason", &m->busy.reason);
}

static td_status get_body(const PB(Envelope) *e, td_arena *a, td_msg *m)
{
#define AS(TYPE) (m->type = TD_MSG_##TYPE)
    switch (e->body_case) {
    case 10: AS(HELLO); return get_hello(e->hello, &m->hello);
    case 11: AS(WELCOME); return get_welcome(e->welcome, m);
    case 12: AS(REFUSED); return get_text(e->refused->reason, "reason", &m->refused.reason);
    case 13: AS(HEARTBEAT); return get_heartbeat(e->heartbeat, &m->heartbeat);
    case 14:
        AS(HEARTBEAT_ACK);
        m->heartbeat_ack.seq = e->heartbeat_ack->seq;
        return TD_OK;
    case 15: AS(DRAIN); return TD_OK;
    case 16: AS(GOODBYE); return TD_OK;
    case 20:
        AS(START);
        m->start.has_sink = e->start->sink != NULL;
        if (e->start->sink) TD_TRY(get_sink(e->start->sink, &m->start.sink));
        return get_work(e->start->work, a, &m->start.work);
    case 21: AS(RESERVE); return get_work(e->reserve->work, a, &m->reserve.work);
    case 22: AS(RESERVED); return get_reserved(e->reserved, m);
    case 23: AS(BUSY); return get_busy(e->busy, m);
    case 24: AS(CANCEL); return get_key(e->cancel->key, &m->cancel.key);
    case 25:
        AS(CANCEL_CHOICE);
        if (e->cancel_choice->choice >= TD_MAX_CHOICES) BAD("choice %u", e->cancel_choice->choice);
        m->cancel.choice = e->cancel_choice->choice;
        return get_key(e->cancel_choice->key, &m->cancel.key);
    case 30: AS(TOKENS); return get_tokens(e->tokens, a, m);
    case 31: AS(PROMPT_DONE); return get_prompt_done(e->prompt_done, a, m);
    case 32: AS(ENDED); return get_ended(e->ended, m);
    case 33: AS(SHIP_REPORT); return get_ship_report(e->ship_report, m);
    default: return TD_AGAIN;
    }
#undef AS
}

td_status td_msg_unpack(const void *p, size_t n, td_arena *arena, td_msg *out)
{
    ProtobufCAllocator alloc = {.alloc = arena_alloc, .free = arena_free, .allocator_data = arena};
    const PB(Envelope) *e = tandem__control__v1__envelope__unpack(&alloc, n, p);
    if (!e) BAD("control message of %zu bytes is no Envelope or expands over %zu bytes", n, arena->max);
    if (e->version != WIRE_VERSION)
        BAD("control protocol version %u, this program speaks %d", e->version, WIRE_VERSION);
    td_msg m = {.sender = e->sender};
    td_status s = get_body(e, arena, &m);
    if (s == TD_OK) *out = m;
    return s;
}
