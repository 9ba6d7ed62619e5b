// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_stage_cuda.c - pages that leave one engine's device memory and land in another's through worker/ship/stage.h:
 * a leg by hand-off makes the bytes that it makes alone, for two page sizes; missing pages are refused and nothing is touched. */
#include "common/log.h"
#include "kernels/cuda.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"
#include "tests/worker/support_engine.h"
#include "worker/ship/stage.h"

enum { N = 4, MAX_ROWS = 64, FRAME = 1 << 20 };

static td_pool *threads;
static const td_ops *cuda;
static td_model *model;

static td_engine *open_engine(int P)
{
    td_engine *e = NULL;
    td_engine_opts o = {.model = model, .ops = cuda, .pool = threads, .page_size = P, .kv_pages = 1024 / P, .max_batched_tokens = MAX_ROWS,
                        .max_seqs = 8, .max_legs = 16, .hash_key = {1, 2}};
    TD_CHECK(td_engine_open(&o, &e) == TD_OK);
    return e;
}

/* One prompt's way from a to b: layer by layer, as it is computed. */
typedef struct carrier {
    td_engine *a, *b;
    td_stage stage;
    uint64_t key;
    uint32_t n_tokens;
    uint8_t *payload;
} carrier;

static void carry(void *arg, uint64_t key, int layer0, int layer1, uint32_t tok0, uint32_t tok1)
{
    carrier *c = arg;
    const td_model_desc *d = td_engine_descr(c->a);
    for (int l = layer0; l < layer1; l++) {
        int g = d->layer[l].group;
        uint32_t na, nb, W = (uint32_t)d->layer[l].window, first = W && c->n_tokens + 1 > W ? c->n_tokens + 1 - W : 0;
        const int32_t *pa = td_engine_pages(c->a, key, g, &na), *pb = td_engine_pages(c->b, key, g, &nb);
        td_codec_side from = td_codec_whole(td_engine_kv(c->a, g), d->group[g].n_slots), to = from;
        to.kv = td_engine_kv(c->b, g);
        td_rect r = {.group = (uint16_t)g, .layer0 = (uint16_t)d->layer[l].slot, .n_layers = 1, .n_heads = (uint16_t)d->group[g].G,
                     .tok0 = TD_MAX(tok0, first), .n_tok = tok1 - TD_MIN(TD_MAX(tok0, first), tok1)};
        if (!r.n_tok) continue;
        T_OK(td_stage_gather(&c->stage, &from, pa, 0, na, &r, &to.tokens, c->payload, NULL) == TD_OK, "gather: %s", td_reason());
        T_OK(td_stage_scatter(&c->stage, &to, pb, 0, nb, &r, &to.tokens, c->payload, NULL) == TD_OK, "scatter: %s", td_reason());
    }
}

static void hand_off(carrier *c, const te_spec *s, te_result *out)
{
    te_spec p = *s, d = *s;
    te_result second = {0};
    uint32_t hit = 0;
    c->key = s->leg.key, c->n_tokens = s->leg.n_prompt;
    d.leg.kind = TD_LEG_DECODE, p.leg.kind = TD_LEG_PREFILL;
    T_EQ(td_engine_reserve(c->b, te_leg(&d), &hit), TD_OK);
    T_EQ(hit, 0);
    td_engine_on_kv(c->a, carry, c);
    te_expect(&p, out);
    T_EQ(td_engine_start(c->a, te_leg(&p)), TD_OK);
    te_finish(c->a, &p, out, 1);
    td_engine_on_kv(c->a, NULL, NULL);
    if (out->finish[0] != TD_FINISH_NONE) {
        T_EQ(td_engine_cancel(c->b, d.leg.key), TD_OK);
        te_finish(c->b, &d, &second, 1);
        return;
    }
    te_expect(&d, &second);
    memcpy(second.token[0], out->token[0], sizeof second.token[0]);
    second.n[0] = 1;
    T_EQ(td_engine_land(c->b, d.leg.key, out->token[0], 1), TD_OK);
    te_finish(c->b, &d, &second, 1);
    memcpy(&out->token[0][1], &second.token[0][1], (TE_MAX_OUT - 1) * sizeof(uint32_t));
    memcpy(&out->logprob[0][1], &second.logprob[0][1], (TE_MAX_OUT - 1) * sizeof(float));
    memcpy(out->top[0][1], second.top[0][1], (TE_MAX_OUT - 1) * sizeof out->top[0][0]);
    out->n[0] = second.n[0];
    out->finish[0] = second.finish[0];
    te_result_free(&second);
}

static void test_hand_off(const char *name, int Pa, int Pb)
{
    char dir[200];
    snprintf(dir, sizeof dir, "tests/golden/models/%s", name);
    td_model_opts o = {.dir = dir, .ops = cuda, .pool = threads, .max_rows = MAX_ROWS, .max_logits = td_engine_logit_rows(8)};
    TD_CHECK(td_model_open(&o, &model) == TD_OK);
    carrier c = {.a = open_engine(Pa), .b = open_engine(Pb), .payload = td_xalloc(FRAME)};
    T_EQ(td_stage_open(&c.stage, dev()), TD_OK);
    td_engine *alone = open_engine(16);
    te_rnd = 11;
    for (int i = 0; i < (simt_checks() ? 1 : N); i++) {
        te_result want = {0}, got = {0};
        te_spec s = te_make((uint64_t)i + 1, 5 + te_draw(40), 2 + te_draw(6), 320);
        s.leg.sampling.seed = 7, s.leg.sampling.temperature = i % 2 ? 0.8f : 0;
        te_run(alone, &s, &want, 1);
        hand_off(&c, &s, &got);
        te_same(&s, &want, &got, name);
        te_result_free(&want), te_result_free(&got);
    }
    td_stage_close(&c.stage);
    td_engine_close(alone), td_engine_close(c.a), td_engine_close(c.b);
    free(c.payload);
    td_model_close(model);
}

/* Through the device as through the codec: rectangles of some heads and tokens, what is beside them stays. */
static void test_rectangles(void)
{
    enum { PAGES = 6, SLOTS = 3, P = 8, G = 2, D = 16, HELD = 4 };
    td_kv kv = {.dtype = TD_BF16, .n_pages = PAGES, .P = P, .G = G, .D = D}, host = kv;
    size_t bytes = td_kv_page_bytes(&kv) * PAGES * SLOTS;
    uint8_t *before = td_xalloc(bytes), *after = td_xalloc(bytes), *a = td_xalloc(bytes), *b = td_xalloc(bytes);
    const int32_t pages[HELD] = {4, 1, 5, 0};
    for (size_t i = 0; i < bytes; i++) before[i] = (uint8_t)te_draw(256);
    kv.base = dev_put(before, bytes), host.base = before;
    td_codec_side on_dev = td_codec_whole(&kv, SLOTS), on_host = td_codec_whole(&host, SLOTS);
    td_stage s, plain;
    T_EQ(td_stage_open(&s, dev()), TD_OK);
    T_EQ(td_stage_open(&plain, NULL), TD_OK);
    for (int i = 0; i < 40; i++) {
        uint32_t x = 0, y = 1;
        td_rect r = {.layer0 = (uint16_t)te_draw(SLOTS), .n_layers = 1, .head0 = (uint16_t)te_draw(G), .n_heads = 1, .tok0 = te_draw(HELD * P - 1)};
        r.n_tok = 1 + te_draw(HELD * P - r.tok0);
        if (!r.head0) r.n_heads = (uint16_t)(1 + te_draw(G));
        if (r.layer0 + 1 < SLOTS) r.n_layers = (uint16_t)(1 + te_draw(2));
        size_t n = td_codec_bytes(&kv, &r, &on_dev.tokens);
        T_EQ(td_stage_gather(&s, &on_dev, pages, 0, HELD, &r, &on_dev.tokens, a, &x), TD_OK);
        T_EQ(td_stage_gather(&plain, &on_host, pages, 0, HELD, &r, &on_host.tokens, b, &y), TD_OK);
        T_OK(!memcmp(a, b, n) && x == y, "gather %d differs", i);
        for (size_t k = 0; k < n; k++) a[k] = (uint8_t)te_draw(256);
        T_EQ(td_stage_scatter(&s, &on_dev, pages, 0, HELD, &r, &on_dev.tokens, a, &x), TD_OK);
        T_EQ(td_stage_scatter(&plain, &on_host, pages, 0, HELD, &r, &on_host.tokens, a, &y), TD_OK);
        T_OK(dev_get(after, kv.base, bytes) && !memcmp(before, after, bytes) && x == y, "scatter %d differs", i);
    }
    const int32_t hole[HELD] = {4, -1, 5, 0};
    td_rect r = {.n_layers = 1, .n_heads = G, .tok0 = 2, .n_tok = 20}, slot = {.layer0 = 2, .n_layers = 2, .n_heads = G, .n_tok = 1};
    T_EQ(td_stage_scatter(&s, &on_dev, hole, 0, HELD, &r, &on_dev.tokens, a, NULL), TD_EPROTO);
    T_EQ(td_stage_gather(&s, &on_dev, pages, 1, HELD - 1, &r, &on_dev.tokens, a, NULL), TD_EPROTO);
    T_EQ(td_stage_gather(&s, &on_dev, pages, 0, HELD, &slot, &on_dev.tokens, a, NULL), TD_EPROTO);
    T_OK(dev_get(after, kv.base, bytes) && !memcmp(before, after, bytes), "a refused rectangle was written");
    td_stage_close(&s), td_stage_close(&plain);
    free(before), free(after), free(a), free(b);
    dev_done();
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    threads = td_pool_open(1);
    (void)dev();
    (void)simt_set_option("hide", 1);
    T_OK(td_cuda_ops_open(dev(), &cuda) == TD_OK, "%s", td_reason());
    test_rectangles();
    test_hand_off("llama-gqa", 16, 8);
    if (!simt_checks()) test_hand_off("mistral-swa", 8, 16);
    td_cuda_ops_close();
    td_dev_close(dev());
    td_pool_close(threads);
    return T_DONE();
}
