/* tests/worker/support_fake.h - a model made of hashes, in place of the real one (a program that includes
 * this links no other).
 *
 * Each row starts from its id. At each layer it writes what it has so far into its page slot, reads the slots
 * of every position it may see through the page table, and mixes them in, so that the logits depend on the
 * whole context, on its order and on the window. Every slot also carries its position and a check word: a
 * slot that was never written, belongs elsewhere, or was torn, is noticed where it is read. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_SUPPORT_FAKE_H
#define TD_TESTS_SUPPORT_FAKE_H

#include "common/check.h"
#include "tests/t.h"
#include "worker/model/model.h"

enum { FAKE_V = 61, FAKE_L = 4, FAKE_WINDOW = 24 };

struct td_model {
    td_model_desc desc;
    uint64_t bad_reads, forwards, ahead, refuse; /* refuse: the number of a step that fails the check */
    int fail_after;
    const td_sample_out *drawn;
};

static inline td_model *fake_open(bool windows)
{
    td_model *m = td_xalloc(sizeof *m);
    td_model_desc *d = &m->desc;
    *d = (td_model_desc){.L = FAKE_L,
                         .E = 4,
                         .H = 1,
                         .G = 1,
                         .D = 4,
                         .F = 4,
                         .V = FAKE_V,
                         .max_positions = 2000,
                         .n_groups = windows ? 2 : 1,
                         .digest = {5, windows}};
    snprintf(d->arch, sizeof d->arch, "Fake");
    d->group[0] = (td_group_desc){windows ? 2 : 4, 0, 1, 4};
    d->group[1] = (td_group_desc){2, FAKE_WINDOW, 1, 4};
    for (int i = 0; i < FAKE_L; i++)
        d->layer[i] = windows && i % 2 ? (td_layer_desc){1, i / 2, FAKE_WINDOW, false}
                                       : (td_layer_desc){0, windows ? i / 2 : i, 0, false};
    m->fail_after = -1;
    return m;
}

const td_model_desc *td_model_descr(const td_model *m)
{
    return &m->desc;
}
size_t td_model_weight_bytes(const td_model *m)
{
    return m ? 1000 : 0;
}

td_status td_model_check(const td_model *m, const td_step *s, const td_kv *kv)
{
    (void)kv;
    return s->number == m->refuse
               ? td_refuse(TD_EPROTO, "step %llu is refused", (unsigned long long)s->number)
               : TD_OK;
}
void td_model_drawn(td_model *m, const td_sample_out *before)
{
    m->drawn = before;
}
void td_model_record(td_model *m)
{
    (void)m;
}
size_t td_model_workspace_bytes(const td_model *m)
{
    (void)m;
    return 0;
}
td_expert_stats td_model_expert_stats(const td_model *m)
{
    (void)m;
    return (td_expert_stats){0};
}
td_status td_model_balance(td_model *m, bool force)
{
    (void)m, (void)force;
    return TD_OK;
}
void *td_model_hidden(td_model *m, const td_step *s, const td_kv *kv, size_t *bytes)
{
    (void)s, (void)kv;
    *bytes = 0;
    return m;
}
const td_group_desc *td_model_groups(const td_model *m)
{
    return m->desc.group;
}
void td_model_vocab(const td_model *m, int *v0, int *n)
{
    *v0 = 0;
    *n = m->desc.V;
}
const td_logit_place *td_model_logit_places(const td_model *m)
{
    (void)m;
    return NULL;
}
td_status td_model_join_logits(td_model *m, const td_step *s, const float *part, float *logits)
{
    memcpy(logits, part, s->n_logits * (size_t)m->desc.V * sizeof *logits);
    return TD_OK;
}
td_kvmap td_model_kvmap(const td_model *m)
{
    (void)m;
    return (td_kvmap){0, 1};
}

static inline uint32_t *fake_slot(const td_kv *kv, int slot, const int32_t *pages, uint32_t pos, int which)
{
    int32_t page = pages[pos / (uint32_t)kv->P];
    if (page < 0 || page >= kv->n_pages) return NULL;
    return (uint32_t *)(void *)(td_kv_page(kv, slot, page) +
                                ((size_t)which * (size_t)kv->P + pos % (uint32_t)kv->P) * 4 * sizeof(float));
}

static uint32_t fake_mix(uint32_t a, uint32_t b)
{
    return (uint32_t)td_mix64(((uint64_t)a << 32 | b) + 0x9e3779b97f4a7c15ull);
}

static inline void fake_write(td_model *m, const td_step *s, const td_step_seq *q, const td_kv *kv, int layer,
                              const uint32_t *x)
{
    const td_layer_desc *l = &m->desc.layer[layer];
    for (uint32_t i = 0; i < q->n_rows; i++) {
        uint32_t pos = q->pos0 + i, v = x[q->row0 + i];
        uint32_t *k = fake_slot(&kv[l->group], l->slot, td_step_pages(s, q, l->group), pos, 0);
        uint32_t *c = fake_slot(&kv[l->group], l->slot, td_step_pages(s, q, l->group), pos, 1);
        if (!k) {
            m->bad_reads++;
            continue;
        }
        k[0] = v, k[1] = pos, k[2] = (uint32_t)layer, k[3] = fake_mix(v, pos);
        c[0] = ~v, c[1] = pos, c[2] = (uint32_t)layer, c[3] = 7;
    }
}

static inline void fake_read(td_model *m, const td_step *s, const td_step_seq *q, const td_kv *kv, int layer,
                             uint32_t *x)
{
    const td_layer_desc *l = &m->desc.layer[layer];
    for (uint32_t i = 0; i < q->n_rows; i++) {
        uint32_t pos = q->pos0 + i, W = (uint32_t)l->window, from = W && pos + 1 > W ? pos + 1 - W : 0, h = 0;
        for (uint32_t p = from; p <= pos; p++) {
            const uint32_t *k = fake_slot(&kv[l->group], l->slot, td_step_pages(s, q, l->group), p, 0);
            const uint32_t *c = fake_slot(&kv[l->group], l->slot, td_step_pages(s, q, l->group), p, 1);
            if (!k || k[1] != p || k[2] != (uint32_t)layer || k[3] != fake_mix(k[0], p) || c[0] != ~k[0] ||
                c[1] != p)
                m->bad_reads++;
            else
                h = fake_mix(h, k[0]);
        }
        x[q->row0 + i] = fake_mix(x[q->row0 + i], h);
    }
}

td_status td_model_forward(td_model *m, const td_step *s, const td_kv *kv, float *logits,
                           void (*on_layer)(void *arg, int layer), void *arg)
{
    if (m->fail_after >= 0 && m->fail_after-- == 0) return td_refuse(TD_EPROTO, "the fake model fails");
    uint32_t *x = td_xalloc(s->n_rows * sizeof *x);
    const td_step_seq *q = td_step_seqs(s);
    const int32_t *want = td_step_logit_rows(s);
    m->forwards++;
    for (uint32_t i = 0; i < s->n_rows; i++) {
        int32_t id = td_step_ids(s)[i];
        if (id < 0) m->ahead++, id = m->drawn[-1 - id].token;
        x[i] = fake_mix(1, (uint32_t)id);
    }
    for (int l = 0; l < FAKE_L; l++) {
        for (uint32_t i = 0; i < s->n_seqs; i++) fake_write(m, s, &q[i], kv, l, x);
        if (on_layer) on_layer(arg, l);
        for (uint32_t i = 0; i < s->n_seqs; i++) fake_read(m, s, &q[i], kv, l, x);
    }
    for (uint32_t i = 0; i < s->n_logits; i++)
        for (uint32_t v = 0; v < FAKE_V; v++)
            logits[i * FAKE_V + v] = (float)(fake_mix(x[want[i]], v) % 4096) / 512.0f - 4.0f;
    free(x);
    return TD_OK;
}

#endif
