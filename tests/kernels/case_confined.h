/* tests/kernels/case_confined.h - what every operation on rows promises, whatever it computes:
 *   1. every element of its rows is written, and nothing beside them (two poisons, in the padding of rows too);
 *   2. a NaN or an infinity in a row stays in that row: the others keep their bits, the row itself is not finite;
 *   3. a row's bits do not depend on the rows in the same call.
 *
 * Model: an operation is a function from n rows of `in` floats to n rows of `out` bytes, first row t0 of T: what else it
 * reads follows from the row's number. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_KERNELS_CASE_CONFINED_H
#define TD_TESTS_KERNELS_CASE_CONFINED_H

#include "tests/kernels/support.h"

enum { ROWS = 11, OUT_PAD = 16 };

typedef struct row_op {
    const char *who, *name;
    const void *with;   /* the table */
    int in;             /* floats of a row */
    int out;            /* bytes of a row, and how far rows lie apart: out + OUT_PAD */
    td_dtype type;      /* of its results; E4M3: bytes that are not looked at */
    bool keeps_nan;     /* a NaN in a row makes a NaN in its results; false: token choice passes over it */
    int at;             /* the column that becomes NaN */
    void (*run)(const struct row_op *op, const float *x, size_t ldx, int t0, int n, uint8_t *out, size_t ldo);
} row_op;

/* Rows are aligned where their width allows it: kernels have another way then. */
static inline size_t row_pad(const row_op *op)
{
    return op->in % 4 ? 3 : 4;
}

static inline bool row_is_finite(const row_op *op, const uint8_t *row)
{
    int n = op->out / (int)td_dtype_bytes(op->type);
    float v;
    for (int i = 0; i < n; i++) {
        td_convert(&v, TD_F32, row + (size_t)i * td_dtype_bytes(op->type), op->type, 1);
        if (!isfinite(v)) return false;
    }
    return true;
}

static inline uint8_t *rows_of_op(const row_op *op, const float *x, int t0, int n, int poison)
{
    size_t ldx = (size_t)op->in + row_pad(op), ldo = (size_t)op->out + OUT_PAD;
    uint8_t *out = block_alloc(ROWS * ldo);
    memset(out, poison, ROWS * ldo);
    op->run(op, x + (size_t)t0 * ldx, ldx, t0, n, out, ldo);
    for (int t = 0; t < ROWS; t++) /* behind the rows, and those that were not asked for */
        for (size_t i = t < n ? (size_t)op->out : 0; i < ldo; i++)
            if (out[(size_t)t * ldo + i] != poison) {
                T_OK(false, "%s %s: byte %zu of row %d of %d was written", op->who, op->name, i, t, n);
                return out;
            }
    return out;
}

static inline void row_op_check(const row_op *op)
{
    size_t ldx = (size_t)op->in + row_pad(op), ldo = (size_t)op->out + OUT_PAD, bytes = (size_t)op->out;
    static const float bad[] = {NAN, INFINITY, -INFINITY};
    float *x = floats(ROWS * ldx);
    rnd_fill(x, ROWS * ldx, 5, 1);
    for (size_t t = 0; t < ROWS; t++)
        for (size_t i = 0; i < row_pad(op); i++) x[t * ldx + (size_t)op->in + i] = NAN; /* nobody's */
    uint8_t *whole = rows_of_op(op, x, 0, ROWS, 0xff), *again = rows_of_op(op, x, 0, ROWS, 0x5a);
    for (size_t t = 0; t < ROWS; t++) {
        T_OK(!memcmp(whole + t * ldo, again + t * ldo, bytes), "%s %s: row %zu is not written whole, or not the same twice", op->who, op->name, t);
        T_OK(op->type == TD_E4M3 || row_is_finite(op, whole + t * ldo), "%s %s: row %zu is not finite", op->who, op->name, t);
    }
    free(again);
    for (int n = 1; n < ROWS; n += 3) /* 1, 4, 7 and 10 rows */
        for (int t = 0; t + n <= ROWS; t++) {
            uint8_t *part = rows_of_op(op, x, t, n, 0xff);
            for (int i = 0; i < n; i++)
                T_OK(!memcmp(part + (size_t)i * ldo, whole + (size_t)(t + i) * ldo, bytes), "%s %s: row %d among %d", op->who, op->name, t + i, n);
            free(part);
        }
    for (int t = 0; t < ROWS; t += 5)
        for (size_t k = 0; k < TD_COUNT(bad); k++) {
            float *at = x + (size_t)t * ldx + op->at, was = *at;
            *at = bad[k];
            uint8_t *out = rows_of_op(op, x, 0, ROWS, 0xff);
            for (int i = 0; i < ROWS; i++)
                if (i != t)
                    T_OK(!memcmp(out + (size_t)i * ldo, whole + (size_t)i * ldo, bytes), "%s %s: %g of row %d in row %d", op->who, op->name,
                         (double)bad[k], t, i);
            if (op->keeps_nan && k == 0) T_OK(!row_is_finite(op, out + (size_t)t * ldo), "%s %s: row %d lost its NaN", op->who, op->name, t);
            *at = was;
            free(out);
        }
    free(x), free(whole);
}

#endif
