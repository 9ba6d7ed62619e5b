// SPDX-License-Identifier: Apache-2.0
/* tests/amx/test_tile.c - the emulated tiles do what the SDM says: order of the sums, one rounding of each
 * multiply-add, denormals, NaN, shapes, MXCSR; and they refuse what a CPU refuses. Every expected value is worked out by
 * hand. */
#include "tests/amx/emulated.h"
#include "tests/t.h"
#include <immintrin.h>
#include <sys/wait.h>
#include <unistd.h>

enum { C, A, B, OTHER };
static uint16_t a[16][32], b[16][16][2];
static float c[16][16];

static void shapes(int rows, int columns, int pairs)
{
    td_tile_config t = {.palette = 1};
    t.rows[C] = t.rows[A] = (uint8_t)rows, t.rows[B] = (uint8_t)pairs;
    t.row_bytes[C] = t.row_bytes[B] = (uint16_t)(4 * columns), t.row_bytes[A] = (uint16_t)(4 * pairs);
    t.rows[OTHER] = 16, t.row_bytes[OTHER] = 64;
    td_tile_configure(&t);
}

static void put(uint16_t *to, float v)
{
    uint32_t u;
    memcpy(&u, &v, sizeof u);
    T_OK(!(u & 0xffff), "%a is no bf16", (double)v);
    *to = (uint16_t)(u >> 16);
}

static void clear(void)
{
    memset(a, 0, sizeof a), memset(b, 0, sizeof b), memset(c, 0, sizeof c);
}

static void multiply(void)
{
    td_tile_load(C, c, 64);
    td_tile_load(A, a, 64);
    td_tile_load(B, b, 64);
    td_tile_dp(C, A, B);
    td_tile_store(C, c, 64);
}

static bool same(float x, float y)
{
    return !memcmp(&x, &y, sizeof x);
}

/* c[0][0] after one product of these pairs, beginning with `from`. */
static float dot(float from, const float (*x)[2], const float (*w)[2], int pairs)
{
    clear();
    c[0][0] = from;
    for (int k = 0; k < pairs; k++)
        for (int h = 0; h < 2; h++) put(&a[0][2 * k + h], x[k][h]), put(&b[k][0][h], w[k][h]);
    multiply();
    return c[0][0];
}
#define DOT(from, x, w) dot(from, x, w, sizeof x / sizeof *x)

static void order(void)
{
    const float big = 0x1p12f; /* its square and 1: half a unit in the last place */
    float one[][2] = {{1, 1}, {1, 1}, {1, 1}, {1, 1}}, halves[][2] = {{big, 1}}, rising[][2] = {{1, 0}, {1, 0}, {big, 0}},
          falling[][2] = {{big, 0}, {1, 0}, {1, 0}};
    T_OK(same(DOT(0, one, one), 8) && same(DOT(5, one, one), 13));
    T_OK(same(DOT(1, halves, halves), 0x1p24f)); /* a chain from C, odd first: 1 + 1, then 2^24 + 2 */
    T_OK(same(DOT(0, rising, rising), 0x1p24f + 2) && same(DOT(0, falling, falling), 0x1p24f)); /* ascending k */
    for (int i = 0; i < 3; i++) { /* the same of the odd elements */
        float t = rising[i][0];
        rising[i][0] = rising[i][1], rising[i][1] = t;
        t = falling[i][0], falling[i][0] = falling[i][1], falling[i][1] = t;
    }
    T_OK(same(DOT(0, rising, rising), 0x1p24f + 2) && same(DOT(0, falling, falling), 0x1p24f));
    /* C comes in last: even + odd first */
    float cancel[][2] = {{big, big}}, signs[][2] = {{big, -big}};
    T_OK(same(DOT(0x1p-20f, cancel, signs), 0x1p-20f));
}

static void small(void)
{
    const float tiny = 0x1p-126f; /* the least normal number */
    float x[][2] = {{0x1p-63f, 0}, {0x1p-65f, 0}}, w[][2] = {{0x1p-63f, 0}, {0x1p-65f, 0}};
    T_OK(same(DOT(0, x, w), tiny + 0x1p-130f)); /* one rounding: the product alone would be a denormal */
    x[1][0] = -0x1p-65f;
    T_OK(same(DOT(0, x, w), 0)); /* 2^-126 - 2^-130 is one */
    float p[][2] = {{0x1p-63f, 0x1.1p-63f}}, m[][2] = {{0x1p-63f, -0x1p-63f}};
    T_OK(same(DOT(0, p, m), 0)); /* even + odd */
    float none[][2] = {{0, 0}}, unit[][2] = {{0x1p-63f, 0}};
    T_OK(same(DOT(0x1p-127f, none, none), 0) && same(DOT(-tiny * 1.0625f, unit, unit), -0.0f)); /* C read; C written */
    float denormal[][2] = {{0x1p-127f, 0}}, large[][2] = {{0x1p100f, 0}};
    T_OK(same(DOT(0, denormal, large), 0) && same(DOT(0, large, denormal), 0));
}

static void special(void)
{
    clear();
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 32; k++) put(&a[m][k], 1);
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < 16; n++) put(&b[k][n][0], 1), put(&b[k][n][1], 1);
    a[3][7] = 0x7fc0, b[5][9][0] = 0x7f80, a[4][10] = 0;
    multiply();
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) {
            float v = c[m][n], want = m == 4 ? 31 : 32;
            bool nan = m == 3 || (m == 4 && n == 9); /* a[4][10] meets the infinity: 0 x inf */
            T_OK(nan ? v != v : n == 9 ? v == INFINITY : v == want, "[%d][%d] %g", m, n, (double)v);
        }
}

/* Five columns of three rows, two pairs: nothing else is read or written. */
static void part(void)
{
    shapes(3, 5, 2);
    clear();
    for (int m = 0; m < 16; m++)
        for (int k = 0; k < 32; k++) put(&a[m][k], m < 3 && k < 4 ? (float)(m + 1) : 100);
    for (int k = 0; k < 16; k++)
        for (int n = 0; n < 16; n++)
            for (int h = 0; h < 2; h++) put(&b[k][n][h], k < 2 && n < 5 ? (float)(n + 1) : 100);
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++) c[m][n] = 7;
    multiply();
    for (int m = 0; m < 16; m++)
        for (int n = 0; n < 16; n++)
            T_OK(c[m][n] == (m < 3 && n < 5 ? 7 + 4 * (float)((m + 1) * (n + 1)) : 7), "[%d][%d] %g", m, n, (double)c[m][n]);
    td_tile_zero(C);
    td_tile_store(C, c, 64);
    T_OK(c[2][4] == 0 && c[2][5] == 7 && c[3][0] == 7);
    shapes(16, 16, 16);
}

static void mxcsr(void)
{
    const float big = 0x1p12f;
    unsigned old = _mm_getcsr(), odd = 0x7f81; /* towards zero, a flag that is set, denormals kept */
    float up[][2] = {{big, 1}, {1, 1}}, x[][2] = {{INFINITY, 0}}, w[][2] = {{0, 0}};
    clear();
    for (int k = 0; k < 2; k++)
        for (int h = 0; h < 2; h++) put(&a[0][2 * k + h], up[k][h]), put(&b[k][0][h], k == 0 ? up[k][h] : 1.5f);
    _mm_setcsr(odd);
    multiply(); /* even 2^24 + 1.5 -> 2^24 + 2, odd 2.5; 2^24 + 4.5 -> 2^24 + 4 */
    unsigned after = _mm_getcsr();
    _mm_setcsr(old);
    T_OK(after == odd && same(c[0][0], 0x1p24f + 4), "%x, %a", after, (double)c[0][0]);
    memcpy(&up, &x, sizeof x);
    _mm_setcsr(0x1f00); /* invalid operations would trap */
    clear();
    a[0][0] = td_f32_to_bf16(x[0][0]), b[0][0][0] = td_f32_to_bf16(w[0][0]);
    multiply();
    after = _mm_getcsr();
    _mm_setcsr(old);
    T_OK(after == 0x1f00 && c[0][0] != c[0][0]);
}

/* ---- what a CPU refuses ---- */

static void unconfigured(void) { td_tile_release(), td_tile_zero(C); }
static void same_tiles(void) { td_tile_dp(C, A, A); }
static void no_rows(void) { td_tile_zero(4); }
static void no_such(void) { td_tile_zero(8); }
static void wrong_rows(void) { shapes(3, 16, 16), td_tile_dp(OTHER, A, B); }
static void wrong_columns(void) { shapes(16, 5, 16), td_tile_dp(OTHER, A, B); }
static void wrong_depth(void) { shapes(16, 16, 5), td_tile_dp(C, OTHER, B); }
static void palette(void) { td_tile_configure(&(td_tile_config){.palette = 2}); }
static void reserved(void) { td_tile_configure(&(td_tile_config){.palette = 1, .reserved[13] = 1}); }
static void tall(void) { td_tile_configure(&(td_tile_config){.palette = 1, .rows[0] = 17, .row_bytes[0] = 64}); }
static void wide(void) { td_tile_configure(&(td_tile_config){.palette = 1, .rows[0] = 16, .row_bytes[0] = 68}); }
static void empty(void) { td_tile_configure(&(td_tile_config){.palette = 1, .rows[0] = 16}); }
static void ninth(void) { td_tile_configure(&(td_tile_config){.palette = 1, .rows[8] = 1, .row_bytes[8] = 4}); }
static void half(void) { td_tile_configure(&(td_tile_config){.palette = 1, .rows[0] = 1, .row_bytes[0] = 6}), td_tile_zero(0); }
static void allowed(void) { td_tile_dp(C, A, B); }
static void (*const refused[])(void) = {allowed, unconfigured, same_tiles, no_rows, no_such, wrong_rows, wrong_columns, wrong_depth,
                                        palette, reserved, tall, wide, empty, ninth, half};

static void refusals(void)
{
    for (size_t i = 0; i < sizeof refused / sizeof *refused; i++) {
        int status = 0;
        fflush(stdout);
        pid_t child = fork();
        if (!child) {
            if (!freopen("/dev/null", "w", stderr)) _exit(2);
            shapes(16, 16, 16);
            refused[i]();
            _exit(0);
        }
        waitpid(child, &status, 0);
        if (i) T_OK(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT, "case %zu was let through", i);
        else T_OK(WIFEXITED(status) && !WEXITSTATUS(status), "the valid case was refused");
    }
}

int main(void)
{
    td_amx_family(0);
    shapes(16, 16, 16);
    order();
    small();
    special();
    part();
    mxcsr();
    refusals();
    T_OK(td_tile_count().held == 1);
    td_tile_release();
    T_OK(td_tile_count().held == 0);
    return T_DONE();
}
