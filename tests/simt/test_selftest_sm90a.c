// SPDX-License-Identifier: Apache-2.0
/* tests/simt/test_selftest_sm90a.c - what kernels/sm90a.h's instructions mean, on the shim and on a Hopper:
 * boxes of a tensor map with every swizzle, edges and steps; wgmma with every layout of a matrix in shared
 * memory. The tables are the PTX ISA's: 5.5.7 (swizzling modes), 9.7.15.5.1.2.1.3 (canonical layouts). */
#include "common/log.h"
#include "tests/simt/selftest_sm90a.h"
#include "tests/simt/simt_c.h"
#include "tests/simt/support.h"

static void *stream(void)
{
    return dev()->stream[TD_STREAM_COMPUTE];
}

/* 5.5.7: which piece of 16 bytes lies where, by rows of 128 bytes from a multiple of 1024; the pattern
 * repeats. */
static const int piece_in[5][8][8] = {[1] = {{0, 1, 2, 3, 4, 5, 6, 7}, {1, 0, 3, 2, 5, 4, 7, 6}},
                                      [2] = {{0, 1, 2, 3, 4, 5, 6, 7},
                                             {1, 0, 3, 2, 5, 4, 7, 6},
                                             {2, 3, 0, 1, 6, 7, 4, 5},
                                             {3, 2, 1, 0, 7, 6, 5, 4}},
                                      [4] = {{0, 1, 2, 3, 4, 5, 6, 7},
                                             {1, 0, 3, 2, 5, 4, 7, 6},
                                             {2, 3, 0, 1, 6, 7, 4, 5},
                                             {3, 2, 1, 0, 7, 6, 5, 4},
                                             {4, 5, 6, 7, 0, 1, 2, 3},
                                             {5, 4, 7, 6, 1, 0, 3, 2},
                                             {6, 7, 4, 5, 2, 3, 0, 1},
                                             {7, 6, 5, 4, 3, 2, 1, 0}}};

/* Where byte `at` of an image that is not swizzled lies in one that is. */
static int moved(int at, int swizzle)
{
    static const int rows[] = {1, 2, 4, 0, 8};
    if (!swizzle) return at;
    const int *in = piece_in[swizzle / 32][at / 128 % rows[swizzle / 32]];
    for (int i = 0; i < 8; i++)
        if (in[i] == at / 16 % 8) return at / 128 * 128 + i * 16 + at % 16;
    return -1;
}

/* ---- boxes ---- */

enum { ROWS = 40, COLS = 72, PITCH = 160 };

static void box_case(hop_box b)
{
    uint8_t *want = block_alloc(HOP_BOX_BYTES), *got = block_alloc(HOP_BOX_BYTES);
    uint16_t *t = block_alloc(ROWS * PITCH);
    const int pitch = b.swizzle ? b.swizzle : b.box_cols * 2;
    memset(want, 0xee, HOP_BOX_BYTES);
    for (int i = 0; i < ROWS * PITCH / 2; i++) t[i] = (uint16_t)(i + 1);
    for (int r = 0; r < (b.box_rows + b.step - 1) / b.step; r++)
        for (int c = 0; c < b.box_cols; c++) {
            const int y = b.y + r * b.step, x = b.x + c;
            const uint16_t v = y >= 0 && y < ROWS && x >= 0 && x < COLS ? t[y * PITCH / 2 + x] : 0;
            memcpy(want + moved(b.shift + r * pitch + c * 2, b.swizzle), &v, 2);
        }
    b.tensor = dev_put(t, ROWS * PITCH), b.rows = ROWS, b.cols = COLS, b.pitch = PITCH;
    uint8_t *out = dev_new(HOP_BOX_BYTES);
    T_EQ(hop_copy_box(stream(), &b, out), 0);
    T_OK(dev_get(got, out, HOP_BOX_BYTES), "%s", simt_last_error());
    T_OK(!memcmp(got, want, HOP_BOX_BYTES), "box %d x %d at (%d, %d), step %d, swizzle %d, shift %d",
         b.box_rows, b.box_cols, b.x, b.y, b.step, b.swizzle, b.shift);
    free(want), free(got), free(t);
    dev_done();
}

static void boxes(void)
{
    for (int s = 0; s <= 128; s = s ? s * 2 : 32) {
        const int cols = s ? s / 2 : 24;
        box_case((hop_box){.box_rows = 20, .box_cols = cols, .step = 1, .swizzle = s, .x = 8, .y = 3});
        box_case((hop_box){
            .box_rows = 9, .box_cols = cols, .step = 1, .swizzle = s, .x = COLS - 8, .y = ROWS - 4});
        box_case((hop_box){.box_rows = 9, .box_cols = cols, .step = 1, .swizzle = s, .x = -3, .y = -2});
        box_case((hop_box){.box_rows = 12, .box_cols = cols, .step = 3, .swizzle = s, .x = 1, .y = 1});
        box_case((hop_box){.box_rows = 16, .box_cols = cols, .step = 1, .swizzle = s, .y = 5, .shift = 384});
    }
}

/* ---- products ---- */

/* Byte of element (mn, k) of a matrix of 16 k and up to 128 rows or columns, without the swizzle. span 0:
 * none. */
static int canonical(int mn, int k, bool across, int span, int lbo, int sbo)
{
    if (!across) return mn % 8 * (span ? span : 16) + mn / 8 * sbo + (span ? k * 2 : k / 8 * lbo + k % 8 * 2);
    if (!span) return mn % 8 * 2 + mn / 8 * sbo + k % 8 * 16 + k / 8 * lbo;
    return mn % (span / 2) * 2 + mn / (span / 2) * lbo + k % 8 * span + k / 8 * sbo;
}
static uint64_t desc_of(int span, int lbo, int sbo)
{
    static const uint64_t mode[] = {0, 3, 2, 0, 1};
    return (uint64_t)(lbo >> 4) << 16 | (uint64_t)(sbo >> 4) << 32 | mode[span / 32] << 62;
}
static void image_of(uint8_t *image, const uint16_t *m, int n, int start, bool across, int span, int lbo,
                     int sbo)
{
    memset(image, 0xff, HOP_IMAGE_BYTES); /* NaN */
    for (int i = 0; i < n; i++)
        for (int k = 0; k < 16; k++)
            memcpy(image + moved(start + canonical(i, k, across, span, lbo, sbo), span), &m[i * 16 + k], 2);
}
static uint16_t *eighths(int n, uint64_t *seed)
{
    uint16_t *m = block_alloc((size_t)n * 2);
    for (int i = 0; i < n; i++) m[i] = td_f32_to_bf16((float)((int)(rnd_next(seed) >> 8) % 33 - 16) / 8);
    return m;
}

static void product_case(bool across, int span, int lbo, int sbo, int start, int accumulate, bool ss)
{
    uint64_t seed = (uint64_t)(span + lbo + sbo);
    uint16_t *a = eighths(64 * 16, &seed), *b = eighths(128 * 16, &seed);
    uint8_t *image = block_alloc(HOP_IMAGE_BYTES), *a_image = block_alloc(HOP_IMAGE_BYTES);
    float *d = floats(64 * 128), *got = floats(64 * 128);
    image_of(image, b, 128, start, across, span, lbo, sbo);
    image_of(a_image, a, 64, 0, false, span, lbo, sbo);
    for (int i = 0; i < 64 * 128; i++) d[i] = (float)(i % 31);
    hop_mma m = {.a = dev_put(a, 64 * 16 * 2),
                 .image = dev_put(image, HOP_IMAGE_BYTES),
                 .desc = desc_of(span, lbo, sbo),
                 .start = start,
                 .across = across,
                 .accumulate = accumulate};
    float *out = dev_put(d, 64 * 128 * 4);
    T_EQ(ss ? hop_multiply_ss(stream(), &m, dev_put(a_image, HOP_IMAGE_BYTES), desc_of(span, lbo, sbo), out)
            : hop_multiply(stream(), &m, out),
         0);
    T_OK(dev_get(got, out, 64 * 128 * 4), "%s", simt_last_error());
    int bad = 0;
    for (int i = 0; i < 64; i++)
        for (int j = 0; j < 128; j++) {
            float s = accumulate ? d[i * 128 + j] : 0;
            for (int k = 0; k < 16; k++) s += td_bf16_to_f32(a[i * 16 + k]) * td_bf16_to_f32(b[j * 16 + k]);
            bad += !(got[i * 128 + j] == s); /* exact: eighths */
        }
    T_OK(!bad, "%s K, span %d, lbo %d, sbo %d, start %d, ss %d: %d wrong", across ? "across" : "along", span,
         lbo, sbo, start, ss, bad);
    free(a), free(b), free(image), free(a_image), free(d), free(got);
    dev_done();
}

static void products(void)
{
    for (int ss = 0; ss < 2; ss++) {
        product_case(false, 0, 128, 256, 0, 1, ss);
        product_case(false, 0, 2048, 128, 0, 0, ss);
        product_case(false, 32, 16, 256, 0, 1, ss);
        product_case(false, 64, 16, 512, 0, 0, ss);
        product_case(false, 128, 16, 1024, 0, 1, ss);
    }
    product_case(false, 64, 16, 512, 32, 1, false); /* 16 values of k further */
    product_case(false, 128, 16, 1024, 96, 0, false);
    product_case(true, 0, 128, 256, 0, 0, false);
    product_case(true, 0, 2048, 128, 0, 1, false);
    product_case(true, 32, 512, 256, 0, 1, false);
    product_case(true, 64, 512, 2048, 0, 0, false);
    product_case(true, 128, 2048, 1024, 0, 1, false);
    product_case(true, 128, 1024, 2048, 4096, 0, false);
}

int main(void)
{
    td_log_open("test", TD_LOG_ERROR);
    (void)simt_set_option("arch", 90);
    if (dev()->arch != 90) T_SKIP("not a Hopper");
    boxes();
    products();
    return T_DONE();
}
