// SPDX-License-Identifier: Apache-2.0
#include "worker/model/replay.h"
#include "common/check.h"
#include <string.h>

enum { MOST_FIRST = 1 << 20 }; /* bytes of the blocks at first: page tables for 4 million tokens in pages of 16 */
_Static_assert((int)TD_REPLAY_WORDS >= 2 + 2 * (int)TD_MAX_GROUPS &&
                   (int)TD_ATTN_GROUPS >= (int)TD_MAX_GROUPS,
               "a key holds all page groups");

/* ---- blocks ---- */

/* What the step two before says of the time before it: both events are past. */
static void count_idle(td_replay_place *p, td_replay_stage *b)
{
    double us;
    if (!b->before || p->dev->elapsed_us(p->dev, b->before, b->post.sent, &us) != TD_OK) return;
    p->idle.steps++;
    p->idle.us += us;
    p->idle.most_us = us > p->idle.most_us ? us : p->idle.most_us;
}

td_model_idle td_model_idle_time(const td_model *m)
{
    return m->replay.idle;
}

void td_replay_step_ends(td_model *m)
{
    td_replay_place *p = &m->replay;
    if (!p->dev) return;
    p->last = p->next;
    for (int i = 0; i < 2; i++)
        if (p->stage[i].before == p->end[p->last]) p->stage[i].before = NULL; /* not looked at for long */
    p->next = (p->next + 1) % (int)TD_COUNT(p->end);
    if (p->dev->record(p->dev, TD_STREAM_COMPUTE, p->end[p->last]) != TD_OK) p->last = -1;
}

/* The other one of two, free to be written. */
static td_status next_stage(td_replay_place *p, size_t bytes, td_replay_stage **out)
{
    td_dev *d = p->dev;
    td_replay_stage *b = *out = &p->stage[p->turn ^= 1];
    td_status s = td_devmem_post_wait(d, &b->post);
    if (s == TD_OK) count_idle(p, b);
    b->before = NULL;
    if (s < 0 || b->post.bytes >= bytes) return s;
    td_devmem_post_close(d, &b->post);
    return td_devmem_post_open(d, TD_STREAM_COMPUTE, 2 * bytes, &b->post);
}

/* Recordings of another address are not found any more. */
static td_status fixed_room(td_replay_place *p, size_t bytes)
{
    td_dev *d = p->dev;
    if (p->fixed_bytes >= bytes) return TD_OK;
    void *at;
    bytes *= 2;
    TD_TRY(d->sync(d, TD_STREAM_COMPUTE));
    if (p->fixed) d->free(d, p->fixed);
    p->fixed = NULL, p->fixed_bytes = 0;
    TD_TRY(d->alloc(d, bytes, &at));
    p->fixed = at, p->fixed_bytes = bytes;
    return TD_OK;
}

/* Of all sequences at their longest, with pages of 16. */
static size_t page_entries(const td_model *m)
{
    return (size_t)m->max_rows * (size_t)(m->desc.max_positions / 16 + 1) * (size_t)m->desc.n_groups;
}

td_status td_replay_open(td_model *m)
{
    td_dev *d = m->ops->dev;
    td_replay_place *p = &m->replay;
    if (!d || !m->ops->replay) return TD_OK;
    p->dev = d;
    /* Activations begin as numbers: those of padded rows are read without having been written. */
    TD_TRY(d->fill(d, TD_STREAM_COMPUTE, m->scratch.block, 0, m->scratch.bytes));
    size_t row = (size_t)m->desc.rope.rot_dim * sizeof(float) + TD_MAX_GROUPS * 32,
           first = (size_t)m->max_rows * row + 4 * page_entries(m);
    first = TD_MIN(first + 32 * TD_DEVMEM_PART, (size_t)MOST_FIRST);
    for (int i = 0; i < 2; i++) TD_TRY(td_devmem_post_open(d, TD_STREAM_COMPUTE, first, &p->stage[i].post));
    for (size_t i = 0; i < TD_COUNT(p->end); i++) TD_TRY(d->event_open(d, &p->end[i]));
    p->last = -1;
    return fixed_room(p, (first + 1) / 2);
}

void td_replay_close(td_model *m)
{
    td_replay_place *p = &m->replay;
    if (!p->dev) return;
    m->ops->replay->drop(m);
    for (int i = 0; i < 2; i++) td_devmem_post_close(p->dev, &p->stage[i].post);
    for (size_t i = 0; i < TD_COUNT(p->end); i++)
        if (p->end[i]) p->dev->event_close(p->dev, p->end[i]);
    if (p->fixed) p->dev->free(p->dev, p->fixed);
    *p = (td_replay_place){0};
}

/* ---- a step ---- */

/* Nothing between the first launch of a pass and the last: no other rank, and no word of the host. */
static bool is_alone(const td_model *m)
{
    return td_model_tp(m) == 1 && td_model_cp(m) == 1 && m->local.shards <= 1 && !m->experts;
}

int td_replay_rows(const td_model *m, const td_step *step)
{
    const td_share *s = &m->share;
    bool generated =
        s->n_own > 0 && s->n_own == s->n_own_seqs && s->n_want == s->n_own && step->n_rows == step->n_seqs;
    if (!m->replay.dev || !is_alone(m) || !generated) return 0;
    return TD_MIN(m->ops->replay->rows(m, s->n_own), TD_MIN(m->max_rows, m->max_logits));
}

/* The block as it is filled: host NULL while it is counted. */
typedef struct filling {
    uint8_t *host, *device;
    size_t at;
} filling;

/* n elements of src, then `pad` up to `rows` of them; where they will be. */
static void *fill(filling *f, const void *src, int n, int rows, size_t each, int pad)
{
    void *there = f->device + f->at;
    size_t bytes = (size_t)n * each, room = (size_t)rows * each;
    if (f->host && bytes) memcpy(f->host + f->at, src, bytes);
    if (f->host) memset(f->host + f->at + bytes, pad, room - bytes);
    f->at += td_devmem_padded(room);
    return there;
}

/* One group's sequences; their page tables follow those of the groups before, from *page0 on. */
static const td_attn_place *fill_seqs(filling *f, const td_attn_seq *seq, int n, int rows, int P,
                                      int32_t *page0)
{
    td_attn_place *to = f->host ? (td_attn_place *)(void *)(f->host + f->at) : NULL;
    const void *there = f->device + f->at;
    for (int i = 0; i < n; i++) {
        if (to) to[i] = (td_attn_place){i, 1, seq[i].pos0, *page0};
        *page0 += seq[i].pos0 / P + 1;
    }
    for (int i = n; to && i < rows; i++) to[i] = (td_attn_place){i, 0, 0, 0};
    f->at += td_devmem_padded((size_t)rows * sizeof *to);
    return there;
}

static void fill_tables(filling *f, const td_attn_seq *seq, int n, int P)
{
    for (int i = 0; i < n; i++) {
        size_t bytes = (size_t)(seq[i].pos0 / P + 1) * sizeof(int32_t);
        if (f->host) memcpy(f->host + f->at, seq[i].pages, bytes);
        f->at += bytes;
    }
}

static const td_attn_seq *seqs_of(const td_model *m, int g)
{
    return m->share.seq + (size_t)g * (size_t)m->max_rows + (size_t)m->share.own_seq0;
}

/* What depends on `rows` alone comes first. */
static size_t fill_all(td_forward *f, int rows, const float *cs, const float *q_scale, uint8_t *host)
{
    const td_model *m = f->m;
    const td_share *s = &m->share;
    int n = s->n_own, n_groups = m->desc.n_groups;
    filling to = {host, m->replay.fixed, 0};
    int32_t page0 = 0;
    f->at = (td_placed){.ids = fill(&to, s->ids, n, rows, sizeof *s->ids, 0)};
    f->at.cs = fill(&to, cs, n, rows, (size_t)m->desc.rope.rot_dim * sizeof *cs, 0);
    if (q_scale) f->at.q_scale = fill(&to, q_scale, n, rows, sizeof *q_scale, 0);
    for (int g = 0; g < n_groups; g++) {
        size_t at = (size_t)g * (size_t)m->max_rows;
        f->at.page[g] = fill(&to, s->page + at, n, rows, sizeof *s->page, 0xff);
        f->at.in_page[g] = fill(&to, s->in_page + at, n, rows, sizeof *s->in_page, 0);
        f->attn[g] = (td_attn_placed){
            .seq = fill_seqs(&to, seqs_of(m, g), n, rows, f->kv[g].P, &page0), .n = rows, .group = g};
    }
    for (int g = 0; g < n_groups; g++) f->attn[g].pages = (const int32_t *)(const void *)(to.device + to.at);
    for (int g = 0; g < n_groups; g++) fill_tables(&to, seqs_of(m, g), n, f->kv[g].P);
    return to.at;
}

static size_t most_parts(const td_model *m)
{
    size_t most = 0;
    for (int g = 0; g < m->desc.n_groups; g++) {
        const td_attn_seq *seq = seqs_of(m, g);
        size_t parts = 0;
        for (int i = 0; i < m->share.n_own_seqs; i++)
            parts += td_attn_parts(1, seq[i].pos0, m->desc.group[g].window, m->local.H);
        most = TD_MAX(most, parts);
    }
    return most;
}

static void make_key(td_forward *f, int rows)
{
    const td_model *m = f->m;
    f->key = (td_replay_key){.owner = m, .rows = rows, .parts = most_parts(m)};
    uint64_t *word = f->key.word;
    *word++ = (uintptr_t)f->logits;
    *word++ = (uintptr_t)m->replay.fixed;
    for (int g = 0; g < m->desc.n_groups; g++) {
        *word++ = (uintptr_t)f->kv[g].base;
        *word++ = (uint64_t)f->kv[g].n_pages << 32 | (uint32_t)f->kv[g].P;
    }
    for (int g = 0; g < m->desc.n_groups; g++) f->attn[g].parts = f->key.parts;
}

td_status td_replay_step(td_forward *f, int rows, const float *cs, const float *q_scale)
{
    td_replay_place *p = &f->m->replay;
    td_dev *d = p->dev;
    td_replay_stage *b;
    size_t bytes = fill_all(f, rows, cs, q_scale, NULL);
    TD_TRY(fixed_room(p, bytes));
    TD_TRY(next_stage(p, bytes, &b));
    fill_all(f, rows, cs, q_scale, b->post.host);
    f->T = f->n_want = rows;
    f->replayed = true;
    make_key(f, rows);
    b->before = p->last >= 0 ? p->end[p->last] : NULL;
    return td_devmem_post_send(d, p->fixed, &b->post, bytes);
}
