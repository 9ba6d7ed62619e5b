/* The sections are collected in buffers of their own and joined at the end, where offsets become known.
 * Offsets inside a section are kept relative until then. */
// SPDX-License-Identifier: Apache-2.0
#include "worker/step_build.h"
#include "common/buf.h"
#include "common/check.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

static const size_t MAX_BYTES = UINT32_MAX - (1u << 20); /* offsets are 32 bits */

struct td_step_build {
    td_step head;
    int n_groups, page_size;
    td_kvmap kvmap;
    bool finished;
    td_buf ids, pos, seqs, pages, copies, logits, samples, extra, out;
};

static td_buf *sections(td_step_build *b, int i)
{
    td_buf *all[] = {&b->ids, &b->pos, &b->seqs, &b->pages, &b->copies, &b->logits, &b->samples, &b->extra, &b->out};
    return i < (int)TD_COUNT(all) ? all[i] : NULL;
}

td_step_build *td_step_build_open(int n_groups, int page_size, td_kvmap kvmap)
{
    td_step_build *b = td_xalloc(sizeof *b);
    b->n_groups = n_groups;
    b->page_size = page_size;
    b->kvmap = kvmap;
    for (int i = 0; sections(b, i); i++) td_buf_init(sections(b, i), MAX_BYTES);
    return b;
}

void td_step_build_close(td_step_build *b)
{
    if (!b) return;
    for (int i = 0; sections(b, i); i++) td_buf_deinit(sections(b, i));
    free(b);
}

void td_step_build_begin(td_step_build *b, uint64_t number)
{
    /* A plan without rows has no copies either: done later, they might meet pages that are others' by then. */
    TD_CHECK(b->finished || !b->head.n_copies);
    for (int i = 0; sections(b, i); i++) td_buf_reset(sections(b, i));
    b->head = (td_step){.number = number, .n_groups = (uint32_t)b->n_groups};
    b->finished = false;
}

uint32_t td_step_build_rows(td_step_build *b, const td_seq *q, uint32_t c, const td_kvseq *kv, uint32_t pos0,
                            uint32_t n_rows)
{
    uint32_t row0 = b->head.n_rows;
    td_step_seq s = {.key = q->d.key, .row0 = row0, .n_rows = n_rows, .pos0 = pos0};
    for (uint32_t i = 0; i < n_rows; i++) {
        int32_t id = td_seq_id(q, c, pos0 + i), at = (int32_t)(pos0 + i);
        if (id < 0) b->head.n_before = TD_MAX(b->head.n_before, (uint32_t)-id);
        td_buf_add(&b->ids, &id, sizeof id);
        td_buf_add(&b->pos, &at, sizeof at);
    }
    uint32_t n = (td_kvmap_most(b->kvmap, pos0 + n_rows) + (uint32_t)b->page_size - 1) / (uint32_t)b->page_size;
    for (int g = 0; g < b->n_groups; g++) {
        s.n_pages[g] = n;
        s.pages[g] = (uint32_t)b->pages.len;
        td_buf_add(&b->pages, kv->pages[g], n * sizeof(int32_t));
        while (b->pages.len % 8) td_buf_chr(&b->pages, 0); /* every offset of a step is 8-byte aligned */
    }
    td_buf_add(&b->seqs, &s, sizeof s);
    b->head.n_rows += n_rows;
    b->head.n_seqs++;
    return row0;
}

void td_step_build_copy(td_step_build *b, int group, int32_t from, int32_t to)
{
    td_step_copy c = {.group = (uint32_t)group, .from = from, .to = to};
    td_buf_add(&b->copies, &c, sizeof c);
    b->head.n_copies++;
}

void td_step_build_want_logits(td_step_build *b)
{
    b->head.want_logits = 1;
}

uint32_t td_step_build_logit(td_step_build *b, uint32_t row)
{
    int32_t r = (int32_t)row;
    td_buf_add(&b->logits, &r, sizeof r);
    return b->head.n_logits++;
}

static uint32_t add_extra(td_step_build *b, const void *p, size_t bytes)
{
    uint32_t at = (uint32_t)b->extra.len;
    td_buf_add(&b->extra, p, bytes);
    while (b->extra.len % 8) td_buf_chr(&b->extra, 0);
    return at;
}

/* Biases of the request; below min_tokens also -inf for every id that would end it. */
static void add_biases(td_step_build *b, const td_seq *q, uint32_t c, td_step_sample *s)
{
    const td_sampling *p = &q->d.sampling;
    bool early = q->choice[c].n_out + q->choice[c].ahead < p->min_tokens;
    s->n_bias = p->n_bias + (early ? p->n_stop_ids : 0);
    if (!s->n_bias) return;
    s->bias = (uint32_t)b->extra.len;
    td_buf_add(&b->extra, p->bias, p->n_bias * sizeof *p->bias);
    for (uint32_t i = 0; early && i < p->n_stop_ids; i++) {
        td_bias ban = {p->stop_ids[i], -INFINITY};
        td_buf_add(&b->extra, &ban, sizeof ban);
    }
    add_extra(b, NULL, 0);
}

uint32_t td_step_build_draw(td_step_build *b, const td_seq *q, uint32_t c, uint32_t logit, uint32_t position)
{
    const td_sampling *p = &q->d.sampling;
    td_step_sample s = {.key = q->d.key,
                        .choice = c,
                        .logit = logit,
                        .score = -1,
                        .temperature = p->temperature,
                        .top_p = p->top_p,
                        .min_p = p->min_p,
                        .repetition_penalty = p->repetition_penalty,
                        .presence_penalty = p->presence_penalty,
                        .frequency_penalty = p->frequency_penalty,
                        .top_k = p->top_k,
                        .logprobs = p->logprobs,
                        .seed = p->seed,
                        .position = position,
                        .stream = c << 8 | TD_RNG_SAMPLE};
    const td_choice *x = &q->choice[c];
    if (x->pen) {
        s.n_pen = x->n_pen;
        s.pen = add_extra(b, x->pen, x->n_pen * sizeof *x->pen);
    }
    add_biases(b, q, c, &s);
    td_buf_add(&b->samples, &s, sizeof s);
    return b->head.n_samples++;
}

void td_step_build_score(td_step_build *b, const td_seq *q, uint32_t logit, uint32_t position)
{
    td_step_sample s = {.key = q->d.key,
                        .logit = logit,
                        .score = (int32_t)q->d.prompt[position],
                        .logprobs = q->d.sampling.prompt_logprobs,
                        .position = position};
    td_buf_add(&b->samples, &s, sizeof s);
    b->head.n_samples++;
}

static uint32_t join(td_buf *out, const td_buf *section)
{
    uint32_t at = (uint32_t)out->len;
    td_buf_add(out, section->p, section->len);
    while (out->len % 8) td_buf_chr(out, 0);
    return at;
}

const td_step *td_step_build_finish(td_step_build *b)
{
    td_step *h = &b->head;
    b->finished = true;
    td_buf_add(&b->out, h, sizeof *h);
    h->ids = join(&b->out, &b->ids);
    h->pos = join(&b->out, &b->pos);
    h->seqs = join(&b->out, &b->seqs);
    uint32_t pages = join(&b->out, &b->pages);
    h->copies = join(&b->out, &b->copies);
    h->logit_rows = join(&b->out, &b->logits);
    h->samples = join(&b->out, &b->samples);
    uint32_t extra = join(&b->out, &b->extra);
    h->bytes = (uint32_t)b->out.len;
    TD_CHECK(td_buf_ok(&b->out) && td_buf_ok(&b->extra)); /* bounded by the engine's limits */
    memcpy(b->out.p, h, sizeof *h);
    td_step_seq *s = (td_step_seq *)(void *)(b->out.p + h->seqs);
    for (uint32_t i = 0; i < h->n_seqs; i++)
        for (int g = 0; g < b->n_groups; g++) s[i].pages[g] += pages;
    td_step_sample *d = (td_step_sample *)(void *)(b->out.p + h->samples);
    for (uint32_t i = 0; i < h->n_samples; i++) {
        if (d[i].n_pen) d[i].pen += extra;
        if (d[i].n_bias) d[i].bias += extra;
    }
    return (const td_step *)(const void *)b->out.p;
}
