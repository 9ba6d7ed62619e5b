// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_stage_cuda.c - pages that leave one engine's device memory and land in another's through worker/ship/stage.h:
 * a leg by hand-off makes the bytes that it makes alone, for two page sizes; missing pages are refused and nothing is touched; a frame
 * takes one kernel and one copy each way, behind an event of the compute stream, and nobody waits for a stream. */
#include "common/log.h"
#include "kernels/cuda.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"
#include "tests/worker/support_engine.h"
#include "worker/ship/stage.h"

enum { N = 4, MAX_ROWS = 64, FRAME = 1 << 20, HELD = 4 };

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
        td_stage_rect x = {.name = &r, .side = &from, .pages = pa, .n_pages = na, .r = &r, .pick = &to.tokens},
                      y = {.side = &to, .pages = pb, .n_pages = nb, .r = &r, .pick = &to.tokens};
        T_EQ(td_stage_mark(&c->stage, &x.mark), TD_OK);
        T_OK(td_stage_gather(&c->stage, &x, c->payload, NULL) == TD_OK, "gather: %s", td_reason());
        T_OK(td_stage_scatter(&c->stage, &y, c->payload, NULL) == TD_OK, "scatter: %s", td_reason());
    }
    T_EQ(td_stage_flush(&c->stage), TD_OK);
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
    T_EQ(td_stage_open(&c.stage, dev(), FRAME), TD_OK);
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

/* ---- what is asked of the device ---- */
static char asked[256];
static td_dev real;

static void ask(char what)
{
    size_t n = strlen(asked);
    if (n + 1 < sizeof asked) asked[n] = what;
}
/* Letters: a stream's copies in and out, packing, events. A stream that is waited for: S. */
static td_status my_upload(td_dev *d, td_stream_kind s, void *dst, const void *src, size_t bytes) { ask(bytes > 256 ? 'U' : 'u'); return real.upload(d, s, dst, src, bytes); }
static td_status my_download(td_dev *d, td_stream_kind s, void *dst, const void *src, size_t bytes) { ask('D'); return real.download(d, s, dst, src, bytes); }
static td_status my_pack(td_dev *d, td_stream_kind s, const td_kv_rows *r, void *p) { ask('P'); return real.pack(d, s, r, p); }
static td_status my_unpack(td_dev *d, td_stream_kind s, const td_kv_rows *r, const void *p) { ask('Q'); return real.unpack(d, s, r, p); }
static td_status my_record(td_dev *d, td_stream_kind s, td_event *e) { ask(s == TD_STREAM_COMPUTE ? 'm' : 'r'); return real.record(d, s, e); }
static td_status my_wait(td_dev *d, td_stream_kind s, td_event *e) { ask(s == TD_STREAM_OUT ? 'w' : '?'); return real.wait(d, s, e); }
static td_status my_await(td_dev *d, td_event *e) { ask('a'); return real.await(d, e); }
static td_status my_sync(td_dev *d, td_stream_kind s) { ask('S'); return real.sync(d, s); }

static void listen(bool on)
{
    td_dev *d = dev();
    if (on) {
        real = *d;
        d->upload = my_upload, d->download = my_download, d->pack = my_pack, d->unpack = my_unpack;
        d->record = my_record, d->wait = my_wait, d->await = my_await, d->sync = my_sync;
    } else {
        *d = real;
    }
}

static void expect_asked(const char *what)
{
    T_STR(asked, what);
    memset(asked, 0, sizeof asked);
}

/* Through the device as through the codec: rectangles of some heads and tokens, of a destination that holds every other block;
 * what is beside them stays. */
static void test_rectangles(void)
{
    enum { PAGES = 6, SLOTS = 3, P = 8, G = 2, D = 16 };
    td_kv kv = {.dtype = TD_BF16, .n_pages = PAGES, .P = P, .G = G, .D = D}, host = kv;
    size_t bytes = td_kv_page_bytes(&kv) * PAGES * SLOTS;
    uint8_t *before = td_xalloc(bytes), *after = td_xalloc(bytes), *b = td_xalloc(bytes);
    void *a;
    const int32_t pages[HELD] = {4, 1, 5, 0};
    const td_token_set all = {{TD_TOKENS_ALL, 1, 0}, 0}, half = {{TD_TOKENS_INTERLEAVE, 2, 3}, 1};
    T_EQ(dev()->alloc_host(dev(), bytes, &a), TD_OK);
    for (size_t i = 0; i < bytes; i++) before[i] = (uint8_t)te_draw(256);
    kv.base = dev_put(before, bytes), host.base = before;
    td_codec_side on_dev = td_codec_whole(&kv, SLOTS), on_host = td_codec_whole(&host, SLOTS);
    td_stage s, plain;
    T_EQ(td_stage_open(&s, dev(), bytes), TD_OK);
    T_EQ(td_stage_open(&plain, NULL, bytes), TD_OK);
    for (int i = 0; i < 40; i++) {
        uint32_t x = 0, y = 1;
        td_rect r = {.layer0 = (uint16_t)te_draw(SLOTS), .n_layers = 1, .head0 = (uint16_t)te_draw(G), .n_heads = 1, .tok0 = te_draw(HELD * P - 7)};
        r.n_tok = 7 + te_draw(HELD * P - 6 - r.tok0);
        if (!r.head0) r.n_heads = (uint16_t)(1 + te_draw(G));
        if (r.layer0 + 1 < SLOTS) r.n_layers = (uint16_t)(1 + te_draw(2));
        td_stage_rect d = {.name = &r, .side = &on_dev, .pages = pages, .n_pages = HELD, .r = &r, .pick = i % 3 ? &all : &half}, h = d;
        h.side = &on_host;
        size_t n = td_codec_bytes(&kv, &r, d.pick);
        T_EQ(td_stage_mark(&s, &d.mark), TD_OK);
        T_EQ(td_stage_gather(&s, &d, a, &x), TD_OK);
        T_EQ(td_stage_gather(&plain, &h, b, &y), TD_OK);
        T_OK(!memcmp(a, b, n) && x == y, "gather %d differs", i);
        for (size_t k = 0; k < n; k++) ((uint8_t *)a)[k] = (uint8_t)te_draw(256);
        T_EQ(td_stage_scatter(&s, &d, a, &x), TD_OK);
        T_EQ(td_stage_scatter(&plain, &h, a, &y), TD_OK);
        T_EQ(td_stage_flush(&s), TD_OK);
        T_OK(dev_get(after, kv.base, bytes) && !memcmp(before, after, bytes) && x == y, "scatter %d differs", i);
    }
    const int32_t hole[HELD] = {4, -1, 5, 0};
    td_rect r = {.n_layers = 1, .n_heads = G, .tok0 = 2, .n_tok = 20}, slot = {.layer0 = 2, .n_layers = 2, .n_heads = G, .n_tok = 1};
    td_stage_rect d = {.name = &r, .side = &on_dev, .pages = hole, .n_pages = HELD, .r = &r, .pick = &all};
    T_EQ(td_stage_scatter(&s, &d, a, NULL), TD_EPROTO);
    T_EQ(td_stage_gather(&s, &d, a, NULL), TD_EPROTO);
    d.pages = pages, d.page0 = 1, d.n_pages = HELD - 1;
    T_EQ(td_stage_gather(&s, &d, a, NULL), TD_EPROTO);
    d.page0 = 0, d.n_pages = HELD, d.r = &slot;
    T_EQ(td_stage_gather(&s, &d, a, NULL), TD_EPROTO);
    T_EQ(td_stage_flush(&s), TD_OK);
    T_OK(dev_get(after, kv.base, bytes) && !memcmp(before, after, bytes), "a refused rectangle was written");
    td_stage_close(&s), td_stage_close(&plain);
    dev()->free_host(dev(), a);
    free(before), free(after), free(b);
    dev_done();
}

/* A frame is one kernel and one copy (and a small one: where its rows lie), behind the mark; several are begun before the first is
 * waited for; the one that is forgotten gives its buffer back. */
static void test_calls(void)
{
    enum { PAGES = 4, P = 8, G = 2, D = 16, FRAMES = 3 };
    td_kv kv = {.dtype = TD_BF16, .n_pages = PAGES, .P = P, .G = G, .D = D};
    size_t bytes = td_kv_page_bytes(&kv) * PAGES;
    uint8_t *zero = td_xalloc(bytes);
    const int32_t pages[PAGES] = {3, 1, 0, 2};
    kv.base = dev_put(zero, bytes);
    td_codec_side side = td_codec_whole(&kv, 1);
    td_rect r[FRAMES];
    td_stage_rect x[FRAMES];
    void *payload[FRAMES];
    uint32_t crc;
    td_stage s;
    T_EQ(td_stage_open(&s, dev(), bytes), TD_OK);
    for (int i = 0; i < FRAMES; i++) {
        r[i] = (td_rect){.n_layers = 1, .n_heads = G, .tok0 = (uint32_t)i * P, .n_tok = P};
        x[i] = (td_stage_rect){.name = &r[i], .side = &side, .pages = pages, .n_pages = PAGES, .r = &r[i], .pick = &side.tokens};
        T_EQ(dev()->alloc_host(dev(), bytes, &payload[i]), TD_OK);
        T_EQ(td_stage_begin(&s, &x[i], payload[i]), TD_OK); /* rows' memory is made at first */
        T_OK(td_stage_forget(&s, &r[i]) == payload[i] && !td_stage_forget(&s, &r[i]));
        T_EQ(td_stage_scatter(&s, &x[i], payload[i], NULL), TD_OK);
    }
    T_EQ(td_stage_flush(&s), TD_OK);
    listen(true);
    for (int i = 0; i < FRAMES; i++) T_EQ(td_stage_mark(&s, &x[i].mark), TD_OK);
    expect_asked("mmm");
    for (int i = 0; i < FRAMES; i++) T_EQ(td_stage_begin(&s, &x[i], payload[i]), TD_OK);
    expect_asked("uwPDruwPDruwPDr");
    T_EQ(td_stage_room(&s), TD_STAGE_OUT - FRAMES);
    T_OK(td_stage_begun(&s, &r[1]) == payload[1]);
    T_EQ(td_stage_gather(&s, &x[0], payload[0], &crc), TD_OK);
    expect_asked("a");
    T_OK(td_stage_forget(&s, &r[2]) == payload[2] && td_stage_room(&s) == TD_STAGE_OUT - 1);
    expect_asked("a");
    T_EQ(td_stage_gather(&s, &x[2], payload[2], &crc), TD_OK); /* not begun any more */
    expect_asked("uwPDra");
    T_EQ(td_stage_scatter(&s, &x[1], payload[0], &crc), TD_OK);
    expect_asked("uUQr");
    T_EQ(td_stage_scatter(&s, &x[2], payload[0], &crc), TD_OK);
    expect_asked("auUQr"); /* the room of the first of four: long done */
    T_EQ(td_stage_flush(&s), TD_OK);
    T_EQ(td_stage_flush(&s), TD_OK);
    expect_asked("S");
    listen(false);
    td_stage_close(&s);
    for (int i = 0; i < FRAMES; i++) dev()->free_host(dev(), payload[i]);
    free(zero);
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
    test_calls();
    test_hand_off("llama-gqa", 16, 8);
    if (!simt_checks()) test_hand_off("mistral-swa", 8, 16);
    td_cuda_ops_close();
    td_dev_close(dev());
    td_pool_close(threads);
    return T_DONE();
}
