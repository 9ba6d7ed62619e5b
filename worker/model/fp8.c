// SPDX-License-Identifier: Apache-2.0
#include "worker/model/fp8.h"
#include "common/check.h"
#include <stdio.h>

/* ---- patterns: the part of Python's re.match that lists of modules use ---- */

enum { MAX_ATOMS = 128 };

typedef struct atom {
    const char *p; /* a character, '.', '\' and a character, or '[' to ']' */
    int n;
    char repeat; /* '*', '+', '?' or 0 */
} atom;

typedef struct pattern {
    atom atom[MAX_ATOMS];
    int n;
    bool to_end; /* '$' */
} pattern;

/* Length of the atom at p; 0: none that is known here. */
static int atom_length(const char *p)
{
    if (*p == '[') {
        size_t n = 1 + strcspn(p + 1, "]\\[");
        return p[n] == ']' && n > 1 && n < 64 && p[1] != '^' ? (int)n + 1 : 0;
    }
    if (*p == '\\') return p[1] && strchr(".-_", p[1]) ? 2 : 0;
    return strchr("()|{}*+?^$]", *p) ? 0 : 1;
}

static bool parse(const char *p, pattern *out)
{
    *out = (pattern){0};
    if (*p == '^') p++;
    while (*p) {
        if (*p == '$') {
            out->to_end = true;
            return p[1] == 0;
        }
        int n = atom_length(p);
        if (!n || out->n == MAX_ATOMS) return false;
        atom *a = &out->atom[out->n++];
        *a = (atom){p, n, 0};
        p += n;
        if (*p && strchr("*+?", *p)) a->repeat = *p++;
    }
    return true;
}

static bool in_set(const char *p, int n, char c)
{
    for (int i = 0; i < n; i++) {
        if (i + 2 < n && p[i + 1] == '-') {
            if (c >= p[i] && c <= p[i + 2]) return true;
            i += 2;
        } else if (p[i] == c)
            return true;
    }
    return false;
}

static bool takes(const atom *a, char c)
{
    if (*a->p == '[') return in_set(a->p + 1, a->n - 2, c);
    if (*a->p == '\\') return a->p[1] == c;
    return *a->p == '.' || *a->p == c;
}

/* All places at once, so that no pattern takes long: at[i], the next character may be atom i's. */
static bool matches(const pattern *p, const char *s)
{
    bool at[MAX_ATOMS + 1] = {true}, next[MAX_ATOMS + 1];
    for (;; s++) {
        for (int i = 0; i < p->n; i++)
            if (at[i] && (p->atom[i].repeat == '*' || p->atom[i].repeat == '?')) at[i + 1] = true;
        if (at[p->n] && (!p->to_end || !*s)) return true;
        if (!*s) return false;
        memset(next, 0, sizeof next);
        for (int i = 0; i < p->n; i++) {
            if (!at[i] || !takes(&p->atom[i], *s)) continue;
            char r = p->atom[i].repeat;
            if (r == '*' || r == '+') next[i] = true;
            if (r != '*') next[i + 1] = true;
        }
        memcpy(at, next, sizeof at);
    }
}

static const char *expression(const char *entry)
{
    return strncmp(entry, "re:", 3) ? NULL : entry + 3;
}

bool td_fp8_pattern_ok(const char *entry, bool any_part)
{
    pattern p;
    if (any_part) return !strpbrk(entry, "*+?[](){}|^$\\");
    return !expression(entry) || parse(expression(entry), &p);
}

/* Names of modules have parts between dots: an entry is the whole, or the first or the last parts. */
static bool names_part(const char *entry, const char *module)
{
    size_t n = strlen(entry), m = strlen(module);
    if (n > m) return false;
    if (!memcmp(entry, module, n) && (module[n] == 0 || module[n] == '.')) return true;
    return !strcmp(entry, module + m - n) && module[m - n - 1] == '.';
}

bool td_fp8_keeps(const td_fp8_desc *f, const char *module)
{
    pattern p;
    for (const char *e = f->keep; e < f->keep + f->keep_bytes; e += strlen(e) + 1) {
        if (f->any_part) {
            if (names_part(e, module)) return true;
        } else if (expression(e)) {
            if (parse(expression(e), &p) && matches(&p, module)) return true;
        } else if (!strcmp(e, module))
            return true;
    }
    return false;
}

/* ---- binding ---- */

static td_status refuse(const td_plan *p, const td_st_tensor *t, td_status st, const char *why)
{
    return td_fail(st, "%s: tensor \"%.200s\" is %s, but %s", td_safetensors_file(p->files, t->file), t->name,
                   td_st_dtype_name(t->dtype), why);
}

static int64_t blocks(int n)
{
    return (n + TD_FP8_BLOCK - 1) / TD_FP8_BLOCK;
}

static td_status check_scales(const td_plan *p, const td_piece *e, const td_part *part, const td_st_tensor *s)
{
    bool rows = p->desc->fp8.kind == TD_FP8_ROWS;
    int64_t want0 = rows ? part->src_rows : blocks(part->src_rows), want1 = rows ? 1 : blocks(e->src_K);
    const char *file = td_safetensors_file(p->files, s->file);
    td_dtype t;
    if (!td_st_weight_dtype(s, &t))
        return td_fail(TD_ENOSUP,
                       "%s: tensor \"%.200s\": scales of dtype %s are not supported (F32, BF16 and F16 are)", file,
                       s->name, td_st_dtype_name(s->dtype));
    bool fits = (s->rank == 2 && s->shape[0] == want0 && s->shape[1] == want1) ||
                (rows && s->rank == 1 && s->shape[0] == want0);
    if (fits) return TD_OK;
    return td_fail(TD_EPROTO,
                   "%s: tensor \"%.200s\" has %zu values in %d dimensions, the scales of \"%.120s\" are [%lld, %lld]",
                   file, s->name, td_st_elements(s), s->rank, part->name, (long long)want0, (long long)want1);
}

td_status td_fp8_bind(const td_plan *p, const td_piece *e, td_part *part)
{
    const td_fp8_desc *f = &p->desc->fp8;
    const td_st_tensor *t = part->src;
    char name[160], module[112];
    if (f->kind == TD_FP8_NONE) return TD_OK;
    snprintf(name, sizeof name, "%s%s", part->name, f->suffix);
    const td_st_tensor *scale = td_safetensors_find(p->files, name);
    bool codes = t->dtype == TD_ST_F8_E4M3, head = !strncmp(part->name, "lm_head.", 8);
    bool linear = e->kind == TD_PIECE_MATRIX && !part->of && strncmp(part->name, "model.embed_tokens.", 19);
    if (!codes && scale) return refuse(p, t, TD_EPROTO, "the checkpoint has scales for it");
    if (!linear) return TD_OK;
    snprintf(module, sizeof module, "%.*s", (int)(strlen(part->name) - strlen(".weight")), part->name);
    bool kept = td_fp8_keeps(f, module);
    if (codes && kept) return refuse(p, t, TD_EPROTO, "quantization_config lists it among what is not converted");
    if (!codes && !kept && !head) return refuse(p, t, TD_EPROTO, "quantization_config makes it F8_E4M3");
    if (!codes) return TD_OK;
    if (!scale)
        return td_fail(TD_EPROTO, "%s: the checkpoint has no tensor \"%s\", the scales of \"%s\"",
                       td_safetensors_list(p->files), name, part->name);
    TD_TRY(check_scales(p, e, part, scale));
    part->scale = scale;
    return TD_OK;
}

static int common(int boundary, int offset)
{
    while (offset % boundary) boundary /= 2;
    return boundary;
}

void td_fp8_arrange(const td_plan *p, td_piece *e)
{
    int first = 0, rows = TD_FP8_BLOCK;
    if (e->from != TD_E4M3) return;
    for (int i = 0; i < e->n_parts; first += e->part[i++].rows) rows = common(common(rows, first), e->part[i].row0);
    bool by_row = p->desc->fp8.kind == TD_FP8_ROWS;
    e->scale_rows = by_row ? 1 : rows;
    e->scale_cols = by_row ? e->K : common(TD_FP8_BLOCK, e->k0);
}

/* ---- values ---- */

/* The stored scale of the element at (row, column) of a part's tensor. */
static float scale_at(const td_piece *e, const td_part *part, td_fp8_kind kind, int row, int column)
{
    size_t i = kind == TD_FP8_ROWS
                   ? (size_t)row
                   : (size_t)(row / TD_FP8_BLOCK) * (size_t)blocks(e->src_K) + (size_t)(column / TD_FP8_BLOCK);
    td_dtype t = TD_F32;
    (void)td_st_weight_dtype(part->scale, &t); /* checked when it was bound */
    uint32_t raw = 0;                          /* aligned for any of them */
    float v;
    memcpy(&raw, part->scale->data + i * td_dtype_bytes(t), td_dtype_bytes(t));
    td_convert(&v, TD_F32, &raw, t, 1);
    return v;
}

/* The part that row n of the piece is in, and its row in the part's tensor. */
static const td_part *part_of(const td_piece *e, int n, int *row)
{
    const td_part *p = e->part;
    while (n >= p->rows) n -= p++->rows;
    *row = p->row0 + n;
    return p;
}

void td_fp8_scales(const td_piece *e, td_fp8_kind kind, float *out)
{
    for (int n = 0; n < e->N; n += e->scale_rows) {
        int row;
        const td_part *p = part_of(e, n, &row);
        for (int k = 0; k < e->K; k += e->scale_cols) *out++ = scale_at(e, p, kind, row, e->k0 + k);
    }
}

void td_fp8_multiply(const td_piece *e, td_fp8_kind kind, const uint8_t *codes, int n0, int n1, float *out)
{
    float value[256];
    for (int i = 0; i < 256; i++) value[i] = td_e4m3_to_f32((uint8_t)i);
    for (int n = n0; n < n1; n++) {
        int row;
        const td_part *p = part_of(e, n, &row);
        for (int k = 0; k < e->K;) {
            int end = TD_MIN(e->K, k + e->scale_cols);
            float s = scale_at(e, p, kind, row, e->k0 + k);
            for (; k < end; k++) *out++ = value[*codes++] * s;
        }
    }
}
