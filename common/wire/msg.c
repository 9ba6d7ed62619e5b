// SPDX-License-Identifier: Apache-2.0
/* common/wire/msg.c - names, identity, and packing: the plain structs become protobuf-c structs in a scratch
 * arena, then bytes. */
#include "common/wire/msg.h"
#include "common/check.h"
#include "control.pb-c.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define PB(name) Tandem__Control__V1__##name
/* One protobuf-c object of a type, initialized, in the scratch arena; NULL when the arena is full. */
#define NEW(a, type, init)                                        \
    ({                                                            \
        PB(type) *new_ = td_arena_alloc(a, sizeof(PB(type)));     \
        if (new_) *new_ = (PB(type))init;                         \
        new_;                                                     \
    })

enum { WIRE_VERSION = 1, SCRATCH_MAX = 256 << 20 };

const char *td_msg_name(td_msg_type t)
{
    static const char *const name[] = {"None", "Hello", "Welcome", "Refused", "Heartbeat", "HeartbeatAck",
                                       "Drain", "Goodbye", "Start", "Reserve", "Reserved", "Busy", "Cancel",
                                       "CancelChoice", "Tokens", "PromptDone", "Ended", "ShipReport"};
    return (unsigned)t < TD_COUNT(name) ? name[t] : "unknown";
}

static bool differ(char *reason, size_t n, const char *field, const char *a, const char *b)
{
    snprintf(reason, n, "%s: %s against %s", field, a && *a ? a : "(none)", b && *b ? b : "(none)");
    return false;
}

static bool differ_num(char *reason, size_t n, const char *field, uint32_t a, uint32_t b)
{
    snprintf(reason, n, "%s: %u against %u", field, a, b);
    return false;
}

static bool same_text(const char *a, const char *b)
{
    return !strcmp(a ? a : "", b ? b : "");
}

bool td_identity_same(const td_identity *a, const td_identity *b, char *reason, size_t n)
{
    if (!same_text(a->model, b->model)) return differ(reason, n, "model", a->model, b->model);
    if (!same_text(a->kv_dtype, b->kv_dtype)) return differ(reason, n, "kv dtype", a->kv_dtype, b->kv_dtype);
    if (!same_text(a->numerics, b->numerics)) return differ(reason, n, "numerics", a->numerics, b->numerics);
    if (a->layers != b->layers) return differ_num(reason, n, "layers", a->layers, b->layers);
    if (a->kv_heads != b->kv_heads) return differ_num(reason, n, "kv heads", a->kv_heads, b->kv_heads);
    if (a->head_dim != b->head_dim) return differ_num(reason, n, "head dim", a->head_dim, b->head_dim);
    if (a->vocab != b->vocab) return differ_num(reason, n, "vocabulary", a->vocab, b->vocab);
    if (a->max_model_len != b->max_model_len)
        return differ_num(reason, n, "max model length", a->max_model_len, b->max_model_len);
    if (a->model_digest.lo != b->model_digest.lo || a->model_digest.hi != b->model_digest.hi) {
        snprintf(reason, n, "model digest: %016llx%016llx against %016llx%016llx",
                 (unsigned long long)a->model_digest.hi, (unsigned long long)a->model_digest.lo,
                 (unsigned long long)b->model_digest.hi, (unsigned long long)b->model_digest.lo);
        return false;
    }
    return true;
}

/* ---- packing ----
 * protobuf-c wants mutable pointers although packing only reads: mutable() is the one place where const is
 * cast away. */
static char *mutable(const char *s)
{
    return s ? (char *)(uintptr_t)s : (char *)(uintptr_t)"";
}

static ProtobufCBinaryData bytes(const void *p, size_t n)
{
    return (ProtobufCBinaryData){.len = n, .data = (uint8_t *)(uintptr_t)p};
}

static PB(Key) * put_key(td_arena *a, td_req_key k)
{
    PB(Key) *p = NEW(a, Key, TANDEM__CONTROL__V1__KEY__INIT);
    if (!p) return NULL;
    p->request = k.request;
    p->attempt = k.attempt;
    return p;
}

static PB(Hello) * put_hello(td_arena *a, const td_msg_hello *h)
{
    PB(Hello) *p = NEW(a, Hello, TANDEM__CONTROL__V1__HELLO__INIT);
    PB(Identity) *id = NEW(a, Identity, TANDEM__CONTROL__V1__IDENTITY__INIT);
    if (!p || !id) return NULL;
    id->model_lo = h->id.model_digest.lo;
    id->model_hi = h->id.model_digest.hi;
    id->model = mutable(h->id.model);
    id->kv_dtype = mutable(h->id.kv_dtype);
    id->numerics = mutable(h->id.numerics);
    id->layers = h->id.layers;
    id->kv_heads = h->id.kv_heads;
    id->head_dim = h->id.head_dim;
    id->vocab = h->id.vocab;
    id->max_model_len = h->id.max_model_len;
    p->identity = id;
    p->name = mutable(h->name);
    p->role = (PB(Role))h->role;
    p->page_size = h->page_size;
    p->kv_tokens = h->kv_tokens;
    p->max_seqs = h->max_seqs;
    p->bulk_endpoint = mutable(h->bulk_endpoint);
    p->build = mutable(h->build);
    p->kernels = mutable(h->kernels);
    p->n_eos = TD_MIN(h->n_eos, (uint32_t)TD_MSG_MAX_EOS);
    p->eos = (uint32_t *)(uintptr_t)h->eos;
    p->max_batched_tokens = h->max_batched_tokens;
    if (h->has_bulk_key) p->bulk_public_key = bytes(h->bulk_public_key, 32);
    return p;
}

static PB(Heartbeat) * put_heartbeat(td_arena *a, const td_msg_heartbeat *h)
{
    PB(Heartbeat) *p = NEW(a, Heartbeat, TANDEM__CONTROL__V1__HEARTBEAT__INIT);
    uint32_t n = TD_MIN(h->n_groups, (uint32_t)TD_MSG_MAX_GROUPS);
    PB(GroupLedger) **rows = td_arena_alloc(a, n * sizeof *rows);
    if (!p || !rows) return NULL;
    for (uint32_t i = 0; i < n; i++) {
        PB(GroupLedger) *g = NEW(a, GroupLedger, TANDEM__CONTROL__V1__GROUP_LEDGER__INIT);
        if (!g) return NULL;
        const td_msg_ledger *l = &h->ledger[i];
        g->total = l->total;
        g->free = l->free;
        g->private_ = l->private_;
        g->shared = l->shared;
        g->cached = l->cached;
        g->in_transit = l->in_transit;
        g->pinned = l->pinned;
        rows[i] = g;
    }
    if (h->has_experts) {
        const td_msg_experts *x = &h->experts;
        if (!(p->experts = NEW(a, Experts, TANDEM__CONTROL__V1__EXPERTS__INIT))) return NULL;
        p->experts->balanced = x->balanced;
        p->experts->moved = x->moved;
        p->experts->bytes = x->bytes;
        p->experts->counted = x->counted;
        p->experts->before = x->before;
        p->experts->after = x->after;
    }
    p->n_ledger = n;
    p->ledger = rows;
    p->seq = h->seq;
    p->state = (PB(WorkerState))h->state;
    p->step = h->step;
    p->busy = h->busy;
    p->legs_waiting = h->legs_waiting;
    p->legs_running = h->legs_running;
    p->seqs_running = h->seqs_running;
    p->waiting_tokens = h->waiting_tokens;
    p->prefill_tok_s = h->prefill_tok_s;
    p->decode_tok_s = h->decode_tok_s;
    p->step_us = h->step_us;
    p->prompt_rows = h->prompt_rows;
    p->decode_rows = h->decode_rows;
    p->steps = h->steps;
    p->discarded_rows = h->discarded_rows;
    p->preemptions = h->preemptions;
    p->hit_tokens = h->hit_tokens;
    p->query_tokens = h->query_tokens;
    p->frames_sent = h->frames_sent;
    p->frames_received = h->frames_received;
    p->bytes_sent = h->bytes_sent;
    p->frames_bad = h->frames_bad;
    p->epochs_open = h->epochs_open;
    return p;
}

static PB(Sampling) * put_sampling(td_arena *a, const td_sampling *s)
{
    PB(Sampling) *p = NEW(a, Sampling, TANDEM__CONTROL__V1__SAMPLING__INIT);
    PB(Bias) **list = td_arena_alloc(a, s->n_bias * sizeof *list);
    if (!p || !list) return NULL;
    for (uint32_t i = 0; i < s->n_bias; i++) {
        if (!(list[i] = NEW(a, Bias, TANDEM__CONTROL__V1__BIAS__INIT))) return NULL;
        list[i]->id = s->bias[i].id;
        list[i]->add = s->bias[i].add;
    }
    p->n_bias = s->n_bias;
    p->bias = list;
    p->n_stop_ids = s->n_stop_ids;
    p->stop_ids = (uint32_t *)(uintptr_t)s->stop_ids;
    p->temperature = s->temperature;
    p->top_k = s->top_k;
    p->top_p = s->top_p;
    p->min_p = s->min_p;
    p->repetition_penalty = s->repetition_penalty;
    p->presence_penalty = s->presence_penalty;
    p->frequency_penalty = s->frequency_penalty;
    p->seed = s->seed;
    p->max_tokens = s->max_tokens;
    p->min_tokens = s->min_tokens;
    p->ignore_eos = s->ignore_eos;
    p->n = s->n;
    p->logprobs = s->logprobs;
    p->prompt_logprobs = s->prompt_logprobs;
    return p;
}

static PB(Work) * put_work(td_arena *a, const td_msg_work *w)
{
    PB(Work) *p = NEW(a, Work, TANDEM__CONTROL__V1__WORK__INIT);
    PB(IdList) **resume = td_arena_alloc(a, w->n_resume * sizeof *resume);
    if (!p || !resume) return NULL;
    for (uint32_t i = 0; i < w->n_resume; i++) {
        if (!(resume[i] = NEW(a, IdList, TANDEM__CONTROL__V1__ID_LIST__INIT))) return NULL;
        resume[i]->n_ids = w->resume[i].n;
        resume[i]->ids = (uint32_t *)(uintptr_t)w->resume[i].p;
    }
    p->key = put_key(a, w->key);
    p->sampling = put_sampling(a, &w->sampling);
    if (!p->key || !p->sampling) return NULL;
    p->n_prompt_ids = w->prompt.n;
    p->prompt_ids = (uint32_t *)(uintptr_t)w->prompt.p;
    p->n_resume_ids = w->n_resume;
    p->resume_ids = resume;
    p->remaining_ms = w->remaining_ms;
    p->salt = bytes(w->salt, w->salt_bytes);
    return p;
}

static PB(Sink) * put_sink(td_arena *a, const td_msg_sink *s)
{
    PB(Sink) *p = NEW(a, Sink, TANDEM__CONTROL__V1__SINK__INIT);
    if (!p) return NULL;
    p->endpoint = mutable(s->endpoint);
    p->epoch = s->epoch;
    p->hit_tokens = s->hit_tokens;
    p->credits = s->credits;
    p->incarnation = s->incarnation;
    if (s->has_key) p->public_key = bytes(s->public_key, 32);
    p->ranks = bytes(s->ranks, s->ranks_bytes);
    return p;
}

td_status td_msg_ranks_pack(const td_msg_ranks *r, td_buf *out)
{
    char *endpoint[TD_MSG_MAX_RANKS];
    uint32_t stage[TD_MSG_MAX_RANKS + 1];
    PB(BulkRanks) m = TANDEM__CONTROL__V1__BULK_RANKS__INIT;
    if (r->n > TD_MSG_MAX_RANKS || r->n_stages > TD_MSG_MAX_RANKS + 1)
        return td_refuse(TD_EFULL, "%u ranks, %u stage bounds", r->n, r->n_stages);
    for (uint32_t i = 0; i < r->n; i++) endpoint[i] = mutable(r->endpoint[i]);
    memcpy(stage, r->stage, r->n_stages * sizeof *stage);
    m.tp = r->tp;
    m.pp = r->pp;
    m.cp = r->cp;
    m.token_kind = r->token_kind;
    m.token_unit = r->token_unit;
    m.n_stage = r->n_stages;
    m.stage = stage;
    m.n_endpoint = r->n;
    m.endpoint = endpoint;
    uint8_t *p = td_xalloc(protobuf_c_message_get_packed_size(&m.base) + 1);
    td_buf_add(out, p, protobuf_c_message_pack(&m.base, p));
    free(p);
    return td_buf_ok(out) ? TD_OK : td_refuse(TD_EFULL, "the list of ranks");
}

/* One block for all alternatives: a batch has thousands of them. */
static PB(Top) * *put_tops(td_arena *a, const td_top *top, size_t n)
{
    PB(Top) **list = td_arena_alloc(a, n * sizeof *list);
    PB(Top) *t = td_arena_alloc(a, n * sizeof *t);
    if (!list || !t) return NULL;
    for (size_t i = 0; i < n; i++) {
        t[i] = (PB(Top))TANDEM__CONTROL__V1__TOP__INIT;
        t[i].id = top[i].id;
        t[i].logprob = top[i].logprob;
        list[i] = &t[i];
    }
    return list;
}

static PB(TokenBatch) * put_tokens(td_arena *a, uint64_t step, const td_msg_tokens *list, uint32_t n)
{
    PB(TokenBatch) *p = NEW(a, TokenBatch, TANDEM__CONTROL__V1__TOKEN_BATCH__INIT);
    PB(Tokens) **out = td_arena_alloc(a, n * sizeof *out);
    if (!p || !out) return NULL;
    for (uint32_t i = 0; i < n; i++) {
        const td_msg_tokens *t = &list[i];
        PB(Tokens) *q = out[i] = NEW(a, Tokens, TANDEM__CONTROL__V1__TOKENS__INIT);
        size_t n_top = (size_t)t->n * t->n_top;
        if (!q || !(q->key = put_key(a, t->key)) || !(q->top = put_tops(a, t->top, n_top))) return NULL;
        q->n_top = n_top;
        q->alternatives = t->n_top;
        q->choice = t->choice;
        q->base_index = t->base_index;
        q->n_ids = t->n;
        q->ids = (uint32_t *)(uintptr_t)t->ids;
        q->n_logprobs = t->logprobs ? t->n : 0;
        q->logprobs = (float *)(uintptr_t)t->logprobs;
        q->finish = (uint32_t)t->finish;
        q->stop_token = t->stop_token;
    }
    p->step = step;
    p->n_tokens = n;
    p->tokens = out;
    return p;
}

static PB(PromptDone) * put_prompt_done(td_arena *a, const td_msg *m)
{
    PB(PromptDone) *p = NEW(a, PromptDone, TANDEM__CONTROL__V1__PROMPT_DONE__INIT);
    uint32_t n = m->prompt_done.n_scores;
    PB(Score) **out = td_arena_alloc(a, n * sizeof *out);
    if (!p || !out || !(p->key = put_key(a, m->prompt_done.key))) return NULL;
    for (uint32_t i = 0; i < n; i++) {
        const td_msg_score *s = &m->prompt_done.scores[i];
        if (!(out[i] = NEW(a, Score, TANDEM__CONTROL__V1__SCORE__INIT))) return NULL;
        out[i]->id = s->id;
        out[i]->logprob = s->logprob;
        out[i]->n_top = s->n_top;
        if (!(out[i]->top = put_tops(a, s->top, s->n_top))) return NULL;
    }
    p->cached_tokens = m->prompt_done.cached_tokens;
    p->queued_us = m->prompt_done.queued_us;
    p->prefill_us = m->prompt_done.prefill_us;
    p->n_scores = n;
    p->scores = out;
    return p;
}

static PB(ShipReport) * put_ship_report(td_arena *a, const td_msg *m)
{
    PB(ShipReport) *p = NEW(a, ShipReport, TANDEM__CONTROL__V1__SHIP_REPORT__INIT);
    if (!p || !(p->key = put_key(a, m->ship_report.key))) return NULL;
    p->landed = m->ship_report.landed;
    p->reason = mutable(m->ship_report.reason);
    p->transfer_us = m->ship_report.transfer_us;
    p->exposed_us = m->ship_report.exposed_us;
    p->bytes = m->ship_report.bytes;
    p->frames = m->ship_report.frames;
    return p;
}

/* Replies about one request. Each sets e's body and returns whether memory sufficed. */
static bool put_reply(td_arena *a, const td_msg *m, PB(Envelope) *e)
{
    switch (m->type) {
    case TD_MSG_RESERVED:
        e->reserved = NEW(a, Reserved, TANDEM__CONTROL__V1__RESERVED__INIT);
        if (!e->reserved || !(e->reserved->key = put_key(a, m->reserved.key))) return false;
        e->reserved->epoch = m->reserved.epoch;
        e->reserved->hit_tokens = m->reserved.hit_tokens;
        e->reserved->credits = m->reserved.credits;
        e->reserved->endpoint = mutable(m->reserved.endpoint);
        e->reserved->ranks = bytes(m->reserved.ranks, m->reserved.ranks_bytes);
        return true;
    case TD_MSG_BUSY:
        e->busy = NEW(a, Busy, TANDEM__CONTROL__V1__BUSY__INIT);
        if (!e->busy || !(e->busy->key = put_key(a, m->busy.key))) return false;
        e->busy->retry_ms = m->busy.retry_ms;
        e->busy->reason = mutable(m->busy.reason);
        return true;
    case TD_MSG_CANCEL:
        e->cancel = NEW(a, Cancel, TANDEM__CONTROL__V1__CANCEL__INIT);
        return e->cancel && (e->cancel->key = put_key(a, m->cancel.key));
    case TD_MSG_CANCEL_CHOICE:
        e->cancel_choice = NEW(a, CancelChoice, TANDEM__CONTROL__V1__CANCEL_CHOICE__INIT);
        if (!e->cancel_choice || !(e->cancel_choice->key = put_key(a, m->cancel.key))) return false;
        e->cancel_choice->choice = m->cancel.choice;
        return true;
    default:
        e->ended = NEW(a, Ended, TANDEM__CONTROL__V1__ENDED__INIT);
        if (!e->ended || !(e->ended->key = put_key(a, m->ended.key))) return false;
        e->ended->finish = (uint32_t)m->ended.finish;
        e->ended->status = (int32_t)m->ended.status;
        e->ended->reason = mutable(m->ended.reason);
        e->ended->handed_off = m->ended.handed_off;
        return true;
    }
}

static bool put_body(td_arena *a, const td_msg *m, PB(Envelope) *e)
{
    switch (m->type) {
    case TD_MSG_HELLO: return (e->hello = put_hello(a, &m->hello));
    case TD_MSG_WELCOME:
        if (!(e->welcome = NEW(a, Welcome, TANDEM__CONTROL__V1__WELCOME__INIT))) return false;
        e->welcome->heartbeat_ms = m->welcome.heartbeat_ms;
        e->welcome->hash_key = bytes(&m->welcome.hash_key, sizeof m->welcome.hash_key);
        return true;
    case TD_MSG_REFUSED:
        if (!(e->refused = NEW(a, Refused, TANDEM__CONTROL__V1__REFUSED__INIT))) return false;
        e->refused->reason = mutable(m->refused.reason);
        return true;
    case TD_MSG_HEARTBEAT: return (e->heartbeat = put_heartbeat(a, &m->heartbeat));
    case TD_MSG_HEARTBEAT_ACK:
        if (!(e->heartbeat_ack = NEW(a, HeartbeatAck, TANDEM__CONTROL__V1__HEARTBEAT_ACK__INIT)))
            return false;
        e->heartbeat_ack->seq = m->heartbeat_ack.seq;
        return true;
    case TD_MSG_DRAIN: return (e->drain = NEW(a, Drain, TANDEM__CONTROL__V1__DRAIN__INIT));
    case TD_MSG_GOODBYE: return (e->goodbye = NEW(a, Goodbye, TANDEM__CONTROL__V1__GOODBYE__INIT));
    case TD_MSG_START:
        if (!(e->start = NEW(a, Start, TANDEM__CONTROL__V1__START__INIT))) return false;
        if (m->start.has_sink && !(e->start->sink = put_sink(a, &m->start.sink))) return false;
        return (e->start->work = put_work(a, &m->start.work));
    case TD_MSG_RESERVE:
        if (!(e->reserve = NEW(a, Reserve, TANDEM__CONTROL__V1__RESERVE__INIT))) return false;
        return (e->reserve->work = put_work(a, &m->reserve.work));
    case TD_MSG_TOKENS: return (e->tokens = put_tokens(a, m->tokens.step, m->tokens.list, m->tokens.n));
    case TD_MSG_PROMPT_DONE: return (e->prompt_done = put_prompt_done(a, m));
    case TD_MSG_SHIP_REPORT: return (e->ship_report = put_ship_report(a, m));
    case TD_MSG_NONE: return false;
    default: return put_reply(a, m, e);
    }
}

/* td_msg_type -> oneof number; the order of the enum. */
static const PB(Envelope__BodyCase) body_case[] = {0, 10, 11, 12, 13, 14, 15, 16, 20, 21, 22, 23, 24, 25, 30,
                                                   31, 32, 33};

td_status td_msg_pack(const td_msg *m, td_buf *out)
{
    if (m->type <= TD_MSG_NONE || (unsigned)m->type >= TD_COUNT(body_case))
        return td_refuse(TD_EBADREQ, "pack: no message type %d", (int)m->type);
    td_arena scratch;
    td_arena_init(&scratch, SCRATCH_MAX);
    PB(Envelope) e = TANDEM__CONTROL__V1__ENVELOPE__INIT;
    e.version = WIRE_VERSION;
    e.sender = m->sender;
    e.body_case = body_case[m->type];
    td_status s = TD_EFULL;
    uint8_t *bytes_ = NULL;
    size_t n = 0;
    if (put_body(&scratch, m, &e)) {
        n = protobuf_c_message_get_packed_size(&e.base);
        bytes_ = td_arena_alloc(&scratch, n);
    }
    if (bytes_) {
        protobuf_c_message_pack(&e.base, bytes_);
        td_buf_add(out, bytes_, n);
        if (td_buf_ok(out)) s = TD_OK;
    }
    td_arena_deinit(&scratch);
    return s == TD_OK ? s : td_refuse(s, "pack: %s of %zu bytes is over the limit", td_msg_name(m->type), n);
}
