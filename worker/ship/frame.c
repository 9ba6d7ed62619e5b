// SPDX-License-Identifier: Apache-2.0
#include "worker/ship/frame.h"
#include "common/crc.h"
#include "common/hash.h"
#include <string.h>

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "kvframe.h is little-endian and copied as it lies");

void td_frame_init(td_kvframe *f, uint16_t type, uint64_t epoch, uint64_t incarnation)
{
    *f = (td_kvframe){.magic = TD_KVF_MAGIC, .version = TD_KVF_VERSION, .type = type, .epoch = epoch,
                      .incarnation = incarnation};
}

void td_frame_rect(td_kvframe *f, const td_rect *r, td_dtype dtype, int head_dim, uint32_t n_held)
{
    f->group = r->group;
    f->dtype = (uint16_t)dtype;
    f->layer0 = r->layer0;
    f->n_layers = r->n_layers;
    f->head0 = r->head0;
    f->n_heads = r->n_heads;
    f->head_dim = (uint16_t)head_dim;
    f->tok0 = r->tok0;
    f->n_tok = r->n_tok;
    f->n_held = n_held;
    f->dst_rank = r->dst;
}

static uint32_t head_crc(const td_kvframe *f)
{
    td_kvframe c = *f;
    c.head_crc32c = 0;
    return td_crc32c(0, &c, sizeof c);
}

void td_frame_seal_with(td_kvframe *f, uint32_t payload_crc, size_t n)
{
    f->payload_bytes = n;
    f->payload_crc32c = payload_crc;
    f->head_crc32c = head_crc(f);
}

void td_frame_seal(td_kvframe *f, const void *payload, size_t n)
{
    td_frame_seal_with(f, n ? td_crc32c(0, payload, n) : 0, n);
}

td_status td_frame_parse(const void *head, size_t n_head, size_t n_payload, td_kvframe *out)
{
    td_kvframe f;
    if (n_head != sizeof f) return td_refuse(TD_EPROTO, "frame header of %zu bytes", n_head);
    memcpy(&f, head, sizeof f);
    if (f.magic != TD_KVF_MAGIC) return td_refuse(TD_EPROTO, "no KV frame");
    if (f.version != TD_KVF_VERSION)
        return td_refuse(TD_EPROTO, "frame version %u, this program speaks %d", f.version, TD_KVF_VERSION);
    if (f.head_crc32c != head_crc(&f)) return td_refuse(TD_EPROTO, "frame header checksum");
    if (f.type < TD_KVF_FRAME || f.type > TD_KVF_NACK) return td_refuse(TD_EPROTO, "frame type %u", f.type);
    if (f.payload_bytes != n_payload)
        return td_refuse(TD_EPROTO, "frame says %llu payload bytes, has %zu",
                         (unsigned long long)f.payload_bytes, n_payload);
    *out = f;
    return TD_OK;
}

bool td_frame_payload_ok(const td_kvframe *f, const void *payload)
{
    return f->payload_crc32c == (f->payload_bytes ? td_crc32c(0, payload, (size_t)f->payload_bytes) : 0);
}

uint64_t td_frame_digest(const td_kvframe *f)
{
    return td_mix64((uint64_t)f->payload_crc32c << 32 | f->index);
}

void td_commit_write(td_buf *b, const td_commit *c)
{
    td_kvcommit h = {.logprobs = c->logprobs};
    for (uint32_t i = 0; i < c->n_first; i++) h.n_top += c->first[i].n_top;
    td_buf_add(b, &h, sizeof h);
    for (uint32_t i = 0; i < c->n_first; i++) {
        const td_first *f = &c->first[i];
        td_kvfirst w = {.token = f->token, .logprob = f->logprob, .n_top = f->n_top};
        td_buf_add(b, &w, sizeof w);
    }
    for (uint32_t i = 0; i < c->n_first; i++) {
        for (uint32_t k = 0; k < c->first[i].n_top; k++) {
            td_kvtop t = {.id = c->first[i].top[k].id, .logprob = c->first[i].top[k].logprob};
            td_buf_add(b, &t, sizeof t);
        }
    }
}

td_status td_commit_read(td_arena *a, const void *p, size_t n, uint32_t n_first, td_commit *out)
{
    const uint8_t *at = p;
    td_kvcommit h;
    if (n_first > TD_MAX_CHOICES || n < sizeof h)
        return td_refuse(TD_EPROTO, "COMMIT of %zu bytes with %u first tokens", n, n_first);
    memcpy(&h, at, sizeof h);
    at += sizeof h;
    if (h.n_top > n_first * TD_MAX_TOP_LOGPROBS ||
        n != sizeof h + n_first * sizeof(td_kvfirst) + h.n_top * sizeof(td_kvtop))
        return td_refuse(TD_EPROTO, "COMMIT of %zu bytes with %u first tokens, %u alternatives", n, n_first,
                         h.n_top);
    td_first *first = td_arena_alloc(a, n_first * sizeof *first);
    td_top *top = td_arena_alloc(a, h.n_top * sizeof *top);
    if (!first || !top) return td_refuse(TD_EFULL, "COMMIT's first tokens");
    const uint8_t *tops = at + n_first * sizeof(td_kvfirst);
    uint32_t used = 0;
    for (uint32_t i = 0; i < n_first; i++) {
        td_kvfirst w;
        memcpy(&w, at + i * sizeof w, sizeof w);
        if (w.n_top > TD_MAX_TOP_LOGPROBS || w.n_top > h.n_top - used)
            return td_refuse(TD_EPROTO, "COMMIT: first token %u has %u alternatives", i, w.n_top);
        first[i] = (td_first){.token = w.token, .logprob = w.logprob, .n_top = w.n_top, .top = top + used};
        for (uint32_t k = 0; k < w.n_top; k++, used++) {
            td_kvtop t;
            memcpy(&t, tops + used * sizeof t, sizeof t);
            top[used] = (td_top){.id = t.id, .logprob = t.logprob};
        }
    }
    if (used != h.n_top) return td_refuse(TD_EPROTO, "COMMIT: %u alternatives, %u used", h.n_top, used);
    *out = (td_commit){.n_first = n_first, .logprobs = h.logprobs != 0, .first = first};
    return TD_OK;
}
