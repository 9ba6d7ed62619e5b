// SPDX-License-Identifier: Apache-2.0
/* worker/model/step_check.c - whether a step is within the model's limits: every offset, id, position and page. */
#include "common/check.h"
#include "worker/model/model_int.h"

/* [off, off + count * size) inside the step, 8-byte aligned. */
static bool inside(const td_step *s, uint32_t off, uint64_t count, size_t size)
{
    return count == 0 ||
           (off % 8 == 0 && off >= sizeof *s && off <= s->bytes && count <= (s->bytes - off) / size);
}

static td_status bad_step(const td_step *s, const char *what, long long value)
{
    return td_fail(TD_EPROTO, "step %llu: %s (%lld)", (unsigned long long)s->number, what, value);
}

static td_status check_shape(const td_model *m, const td_step *s)
{
    if (s->bytes < sizeof *s) return bad_step(s, "too short", s->bytes);
    bool idle = !s->n_rows && !s->n_seqs && m->ranks && m->ranks->grid.dp > 1; /* a replica without work */
    if ((s->n_rows < 1 && !idle) || s->n_rows > (uint32_t)m->max_rows)
        return bad_step(s, "rows out of range", s->n_rows);
    if ((s->n_seqs < 1 && !idle) || s->n_seqs > s->n_rows) return bad_step(s, "sequences out of range", s->n_seqs);
    if (s->n_logits > (uint32_t)m->max_logits || s->n_logits > s->n_rows)
        return bad_step(s, "logit rows out of range", s->n_logits);
    if (s->n_groups != (uint32_t)m->desc.n_groups)
        return bad_step(s, "page groups differ from the model's", s->n_groups);
    if (!inside(s, s->ids, s->n_rows, 4) || !inside(s, s->pos, s->n_rows, 4) ||
        !inside(s, s->copies, s->n_copies, sizeof(td_step_copy)) || !inside(s, s->logit_rows, s->n_logits, 4) ||
        !inside(s, s->seqs, s->n_seqs, sizeof(td_step_seq)))
        return bad_step(s, "an array lies outside the step", s->bytes);
    return TD_OK;
}

static td_status check_kv(const td_model *m, const td_step *s, const td_kv *kv)
{
    for (int g = 0; g < m->desc.n_groups; g++) {
        if (kv[g].G != m->group[g].G || kv[g].D != m->desc.group[g].D || kv[g].dtype != m->ops->kv_dtype)
            return bad_step(s, "pages of another shape or type than the model's, group", g);
        if (kv[g].P < 1 || kv[g].n_pages < 1) return bad_step(s, "no pages, group", g);
    }
    return TD_OK;
}

/* One sequence's pages in one group: all that its rows write or read must be there. */
static td_status check_pages(const td_model *m, const td_step *s, const td_step_seq *q, const td_kv *kv,
                             int g)
{
    uint32_t P = (uint32_t)kv->P, need = (td_kvmap_most(m->kvmap, q->pos0 + q->n_rows) + P - 1) / P, live = 0;
    int window = m->desc.group[g].window;
    if (q->n_pages[g] < need || !inside(s, q->pages[g], q->n_pages[g], 4))
        return bad_step(s, "page table too short", q->n_pages[g]);
    if (window > 0 && q->pos0 + 1 > (uint32_t)window)
        live = (q->pos0 + 1 - (uint32_t)window) / P; /* first page still read */
    const int32_t *pages = td_step_pages(s, q, g);
    for (uint32_t i = live; i < need; i++)
        if (pages[i] < 0 || pages[i] >= kv->n_pages) return bad_step(s, "page out of range", pages[i]);
    return TD_OK;
}

static td_status check_seqs(const td_model *m, const td_step *s, const td_kv *kv)
{
    const td_step_seq *q = td_step_seqs(s);
    uint32_t row = 0, limit = (uint32_t)m->desc.max_positions;
    for (uint32_t i = 0; i < s->n_seqs; i++, q++) {
        if (q->row0 != row || q->n_rows < 1 || q->n_rows > s->n_rows - row)
            return bad_step(s, "rows of a sequence", q->row0);
        if (q->pos0 >= limit || q->n_rows > limit - q->pos0)
            return bad_step(s, "position beyond the model's", q->pos0);
        for (int g = 0; g < m->desc.n_groups; g++) TD_TRY(check_pages(m, s, q, &kv[g], g));
        row += q->n_rows;
    }
    return row == s->n_rows ? TD_OK : bad_step(s, "rows without a sequence", s->n_rows - row);
}

static td_status check_copies(const td_model *m, const td_step *s, const td_kv *kv)
{
    const td_step_copy *c = td_step_copies(s);
    for (uint32_t i = 0; i < s->n_copies; i++, c++) {
        if (c->group >= (uint32_t)m->desc.n_groups) return bad_step(s, "a copy in a page group there is not", c->group);
        if (c->from < 0 || c->to < 0 || c->from >= kv[c->group].n_pages || c->to >= kv[c->group].n_pages)
            return bad_step(s, "a copied page is out of range", TD_MAX(c->from, c->to));
    }
    return TD_OK;
}

static td_status check_rows(const td_model *m, const td_step *s)
{
    const int32_t *ids = td_step_ids(s), *pos = td_step_pos(s), *want = td_step_logit_rows(s);
    const td_step_seq *q = td_step_seqs(s);
    for (uint32_t i = 0; i < s->n_seqs; i++, q++)
        for (uint32_t t = 0; t < q->n_rows; t++)
            if (pos[q->row0 + t] != (int32_t)(q->pos0 + t))
                return bad_step(s, "positions are not consecutive", pos[q->row0 + t]);
    for (uint32_t t = 0; t < s->n_rows; t++)
        if (ids[t] >= m->desc.V || (ids[t] < 0 && -1 - (int64_t)ids[t] >= s->n_before))
            return bad_step(s, "token id out of range", ids[t]);
    for (uint32_t i = 0; i < s->n_logits; i++)
        if (want[i] < 0 || want[i] >= (int32_t)s->n_rows || (i && want[i] <= want[i - 1]))
            return bad_step(s, "logit rows are not ascending rows", want[i]);
    return TD_OK;
}

td_status td_model_check(const td_model *m, const td_step *s, const td_kv *kv)
{
    TD_TRY(check_shape(m, s));
    TD_TRY(check_kv(m, s, kv));
    TD_TRY(check_seqs(m, s, kv));
    TD_TRY(check_copies(m, s, kv));
    return check_rows(m, s);
}
