// SPDX-License-Identifier: Apache-2.0
#include "router/net/http1.h"
#include <string.h>
#include <strings.h>

enum {
    MAX_METHOD = 24,
    MAX_TARGET = 8192,
    MAX_BLANK_LINES = 2, /* before a request line; RFC 9112 2.2 asks for at least one */
    MAX_EXT_BYTES = 4096,
    MAX_SIZE_DIGITS = 16,
};

enum state {
    S_START, S_START_LF, S_METHOD, S_TARGET, S_VERSION, S_LINE_LF,
    S_FIELD, S_NAME, S_OWS, S_VALUE, S_VALUE_LF, S_HEAD_LF,
    S_BODY, S_SIZE, S_EXT, S_SIZE_LF, S_DATA, S_DATA_CR, S_DATA_LF,
    S_TRAILER, S_TRAILER_LINE, S_TRAILER_LF, S_END_LF, S_DONE, S_ERROR
};

static bool is_tchar(unsigned char b)
{
    if ((b >= '0' && b <= '9') || (b >= 'a' && b <= 'z') || (b >= 'A' && b <= 'Z')) return true;
    return b && strchr("!#$%&'*+-.^_`|~", b);
}

static bool is_text(unsigned char b) /* field-vchar, obs-text, SP, HT */
{
    return b == '\t' || (b >= 0x20 && b != 0x7f);
}

static bool is_host(unsigned char b)
{
    if ((b >= '0' && b <= '9') || (b >= 'a' && b <= 'z') || (b >= 'A' && b <= 'Z')) return true;
    return b && strchr("-._~%!$&'()*+;=:[]", b);
}

static int hex_value(unsigned char b)
{
    if (b >= '0' && b <= '9') return b - '0';
    if (b >= 'a' && b <= 'f') return b - 'a' + 10;
    if (b >= 'A' && b <= 'F') return b - 'A' + 10;
    return -1;
}

static bool fail(td_http1 *p, int status, const char *what)
{
    p->state = S_ERROR;
    p->status = status;
    p->what = what;
    return false;
}

void td_http1_init(td_http1 *p, size_t max_header_bytes, size_t max_body_bytes)
{
    memset(p, 0, sizeof *p);
    p->max_header_bytes = max_header_bytes;
    p->max_body_bytes = max_body_bytes;
}

void td_http1_deinit(td_http1 *p)
{
    td_head_deinit(&p->head);
    td_buf_deinit(&p->body);
}

void td_http1_reset(td_http1 *p)
{
    size_t max_header = p->max_header_bytes, max_body = p->max_body_bytes;
    td_http1_deinit(p);
    td_http1_init(p, max_header, max_body);
}

/* An idle parser holds no memory: ten thousand kept-alive connections cost their structs only. */
static void begin(td_http1 *p)
{
    p->started = true;
    /* A stored field is never longer than its line ("a:\r\n" -> "a\0\0"); a target is stored raw and
     * split. */
    td_head_init(&p->head, p->max_header_bytes + 2 * MAX_TARGET + MAX_METHOD + 64);
    td_buf_init(&p->body, p->max_body_bytes + 1);
}

/* ---- request line ---- */

static bool version_done(td_http1 *p)
{
    const char *v = p->version;
    if (p->version_len != 8 || memcmp(v, "HTTP/", 5) || v[6] != '.' || v[5] < '0' || v[5] > '9' ||
        v[7] < '0' || v[7] > '9')
        return fail(p, 400, "malformed request line");
    if (v[5] != '1' || v[7] > '1') return fail(p, 505, "only HTTP/1.0 and HTTP/1.1 are spoken here");
    p->v11 = v[7] == '1';
    p->keep_alive = p->v11;
    p->state = S_LINE_LF;
    return true;
}

static bool target_done(td_http1 *p)
{
    const char *raw = p->head.text.p + p->mark;
    char target[MAX_TARGET + 1];
    size_t n = p->head.text.len - p->mark;
    if (n > MAX_TARGET) return fail(p, 414, "request target too long");
    memcpy(target, raw, n); /* it is appended to the buffer it lies in */
    bool options = !strcmp(td_head_at(&p->head, p->head.method), "OPTIONS");
    if (!td_head_target(&p->head, target, n) || (*target == '*' && !options))
        return fail(p, 400, "request target must be a path");
    p->state = S_VERSION;
    return true;
}

static bool step_line(td_http1 *p, unsigned char b)
{
    td_buf *text = &p->head.text;
    size_t n = text->len - p->mark;
    switch (p->state) {
    case S_START:
        if (b == '\r') {
            p->state = S_START_LF;
            return true;
        }
        if (!p->started) begin(p);
        p->mark = text->len;
        p->state = S_METHOD;
        return step_line(p, b);
    case S_START_LF:
        if (b != '\n' || ++p->blank_lines > MAX_BLANK_LINES) return fail(p, 400, "malformed request line");
        p->state = S_START;
        return true;
    case S_METHOD:
        if (b == ' ' && n) {
            p->head.method = (uint32_t)p->mark;
            td_buf_chr(text, 0);
            p->mark = text->len;
            p->state = S_TARGET;
            return true;
        }
        if (!is_tchar(b)) return fail(p, 400, "malformed method");
        if (n >= MAX_METHOD) return fail(p, 501, "unknown method");
        td_buf_chr(text, (char)b);
        return true;
    case S_TARGET:
        if (b == ' ' && n) return target_done(p);
        if (b <= 0x20 || b >= 0x7f || b == '#') return fail(p, 400, "bad byte in the request target");
        if (n >= MAX_TARGET || n >= p->max_header_bytes) return fail(p, 414, "request target too long");
        td_buf_chr(text, (char)b);
        return true;
    case S_VERSION:
        if (b == '\r') return version_done(p);
        if (b < 0x20 || p->version_len >= 8) return fail(p, 400, "malformed request line");
        p->version[p->version_len++] = (char)b;
        return true;
    default: /* S_LINE_LF */
        if (b != '\n') return fail(p, 400, "CR without LF");
        p->state = S_FIELD;
        return true;
    }
}

/* ---- headers ---- */

static bool length_done(td_http1 *p, const char *v)
{
    if (p->has_length) return fail(p, 400, "more than one Content-Length");
    p->has_length = true;
    size_t n = strlen(v);
    if (!n || strspn(v, "0123456789") != n) return fail(p, 400, "Content-Length must be a decimal number");
    if (n > 18) return fail(p, 413, "request body too large");
    p->length = 0;
    for (; *v; v++) p->length = p->length * 10 + (uint64_t)(*v - '0');
    return true;
}

static void connection_done(td_http1 *p, const char *v)
{
    while (*v) {
        v += strspn(v, " \t,");
        size_t n = strcspn(v, " \t,");
        if (n == 5 && !strncasecmp(v, "close", 5)) p->keep_alive = false;
        if (n == 10 && !strncasecmp(v, "keep-alive", 10) && !p->v11) p->keep_alive = true;
        v += n;
    }
}

static bool field_done(td_http1 *p)
{
    td_head *h = &p->head;
    td_buf *text = &h->text;
    while (text->len > p->value_mark && (text->p[text->len - 1] == ' ' || text->p[text->len - 1] == '\t'))
        text->len--;
    td_buf_chr(text, 0);
    if (h->n >= TD_HEAD_MAX) return fail(p, 431, "too many header fields");
    h->name[h->n] = (uint32_t)p->mark;
    h->value[h->n] = (uint32_t)p->value_mark;
    h->n++;
    if (!td_buf_ok(text)) return fail(p, 431, "request header fields too large");
    const char *name = text->p + p->mark, *v = text->p + p->value_mark;
    p->state = S_VALUE_LF;
    if (!strcmp(name, "content-length")) return length_done(p, v);
    if (!strcmp(name, "connection")) {
        connection_done(p, v);
    } else if (!strcmp(name, "host")) {
        p->hosts++;
        for (; *v; v++)
            if (!is_host((unsigned char)*v)) return fail(p, 400, "malformed Host");
    } else if (!strcmp(name, "transfer-encoding")) {
        if (p->chunked || p->te_bad) return fail(p, 400, "more than one Transfer-Encoding");
        if (!strcasecmp(v, "chunked")) p->chunked = true;
        else p->te_bad = true;
    } else if (!strcmp(name, "expect") && p->v11) {
        if (strcasecmp(v, "100-continue")) return fail(p, 417, "unknown expectation");
        p->expect = true;
    }
    return true;
}

static bool head_done(td_http1 *p)
{
    if (p->v11 && !p->hosts) return fail(p, 400, "Host is missing");
    if (p->hosts > 1) return fail(p, 400, "more than one Host");
    if ((p->chunked || p->te_bad) && p->has_length)
        return fail(p, 400, "both Content-Length and Transfer-Encoding");
    if ((p->chunked || p->te_bad) && !p->v11) return fail(p, 400, "Transfer-Encoding on HTTP/1.0");
    if (p->te_bad) return fail(p, 501, "only the chunked transfer encoding is known");
    if (p->has_length && p->length > p->max_body_bytes) return fail(p, 413, "request body too large");
    p->head_done = true;
    if (p->chunked) {
        p->state = S_SIZE;
    } else if (p->has_length && p->length) {
        p->state = S_BODY;
    } else {
        p->expect = false;
        p->state = S_DONE;
    }
    return true;
}

static bool count_header(td_http1 *p)
{
    return ++p->header_bytes <= p->max_header_bytes || fail(p, 431, "request header fields too large");
}

static bool step_field(td_http1 *p, unsigned char b)
{
    td_buf *text = &p->head.text;
    switch (p->state) {
    case S_FIELD:
        if (b == '\r') {
            p->state = S_HEAD_LF;
            return true;
        }
        if (b == ' ' || b == '\t') return fail(p, 400, "folded header line");
        if (!is_tchar(b)) return fail(p, 400, "bad byte in a header name");
        p->mark = text->len;
        p->state = S_NAME;
        return step_field(p, b);
    case S_NAME:
        if (b == ':') {
            td_buf_chr(text, 0);
            p->value_mark = text->len;
            p->state = S_OWS;
            return true;
        }
        if (!is_tchar(b)) return fail(p, 400, "bad byte in a header name");
        td_buf_chr(text, (char)(b >= 'A' && b <= 'Z' ? b + 32 : b));
        return true;
    case S_OWS:
        if (b == ' ' || b == '\t') return true;
        p->state = S_VALUE;
        return step_field(p, b);
    case S_VALUE:
        if (b == '\r') return field_done(p);
        if (!is_text(b)) return fail(p, 400, "bad byte in a header value");
        td_buf_chr(text, (char)b);
        return true;
    case S_VALUE_LF:
        if (b != '\n') return fail(p, 400, "CR without LF");
        p->state = S_FIELD;
        return true;
    default: /* S_HEAD_LF */
        if (b != '\n') return fail(p, 400, "CR without LF");
        return head_done(p);
    }
}

/* ---- chunks ---- */

static bool size_done(td_http1 *p)
{
    if (p->length > p->max_body_bytes - p->body.len) return fail(p, 413, "request body too large");
    p->state = S_SIZE_LF;
    return true;
}

static bool step_size(td_http1 *p, unsigned char b)
{
    if (p->state == S_SIZE) {
        int v = hex_value(b);
        if (v >= 0) {
            if (++p->digits > MAX_SIZE_DIGITS) return fail(p, 400, "malformed chunk size");
            if (p->length >> 56) return fail(p, 413, "request body too large");
            p->length = p->length * 16 + (uint64_t)v;
            return true;
        }
        if (!p->digits || (b != ';' && b != '\r')) return fail(p, 400, "malformed chunk size");
        if (b == '\r') return size_done(p);
        p->state = S_EXT;
        return true;
    }
    if (p->state == S_EXT) {
        if (b == '\r') return size_done(p);
        if (!is_text(b) || ++p->ext_bytes > MAX_EXT_BYTES) return fail(p, 400, "bad chunk extension");
        return true;
    }
    if (b != '\n') return fail(p, 400, "CR without LF");
    p->digits = 0;
    p->state = p->length ? S_DATA : S_TRAILER;
    return true;
}

static bool step_chunk_end(td_http1 *p, unsigned char b)
{
    switch (p->state) {
    case S_DATA_CR:
        if (b != '\r') return fail(p, 400, "chunk longer than its size");
        p->state = S_DATA_LF;
        return true;
    case S_DATA_LF:
        if (b != '\n') return fail(p, 400, "CR without LF");
        p->state = S_SIZE;
        return true;
    case S_TRAILER:
        if (b == '\r') {
            p->state = S_END_LF;
            return true;
        }
        if (!is_tchar(b)) return fail(p, 400, "malformed trailer");
        p->state = S_TRAILER_LINE;
        break;
    case S_TRAILER_LINE:
        if (b == '\r') p->state = S_TRAILER_LF;
        else if (!is_text(b)) return fail(p, 400, "malformed trailer");
        break;
    case S_TRAILER_LF:
        if (b != '\n') return fail(p, 400, "CR without LF");
        p->state = S_TRAILER;
        break;
    default: /* S_END_LF */
        if (b != '\n') return fail(p, 400, "CR without LF");
        p->state = S_DONE;
        return true;
    }
    if (++p->header_bytes > p->max_header_bytes) return fail(p, 431, "trailers too large");
    return true;
}

static size_t take_data(td_http1 *p, const char *in, size_t n)
{
    size_t k = p->length < n ? (size_t)p->length : n;
    p->expect = false;
    td_buf_add(&p->body, in, k);
    p->length -= k;
    if (!p->length) p->state = p->state == S_BODY ? S_DONE : S_DATA_CR;
    return k;
}

td_http1_result td_http1_feed(td_http1 *p, const char *in, size_t n, size_t *used)
{
    size_t i = 0;
    while (i < n && p->state < S_DONE) {
        unsigned char b = (unsigned char)in[i];
        if (p->state == S_BODY || p->state == S_DATA) {
            i += take_data(p, in + i, n - i);
            continue;
        }
        if (p->state > S_BODY) p->expect = false;
        bool ok = p->state <= S_LINE_LF ? step_line(p, b)
                : p->state <= S_HEAD_LF ? count_header(p) && step_field(p, b)
                : p->state <= S_SIZE_LF ? step_size(p, b) : step_chunk_end(p, b);
        i++;
        if (!ok) break;
    }
    *used = i;
    return p->state == S_DONE ? TD_HTTP1_DONE : p->state == S_ERROR ? TD_HTTP1_ERROR : TD_HTTP1_MORE;
}
