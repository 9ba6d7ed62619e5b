// SPDX-License-Identifier: Apache-2.0
#include "router/net/head.h"
#include <string.h>
#include <strings.h>

void td_head_init(td_head *h, size_t max_bytes)
{
    memset(h, 0, sizeof *h);
    td_buf_init(&h->text, max_bytes);
    td_buf_chr(&h->text, 0); /* offset 0 is the empty string */
}

void td_head_deinit(td_head *h)
{
    td_buf_deinit(&h->text);
    memset(h, 0, sizeof *h);
}

void td_head_move(td_head *to, td_head *from)
{
    *to = *from;
    memset(from, 0, sizeof *from);
}

uint32_t td_head_put(td_head *h, const char *s, size_t n)
{
    uint32_t at = (uint32_t)h->text.len;
    td_buf_add(&h->text, s, n);
    td_buf_chr(&h->text, 0);
    return td_buf_ok(&h->text) ? at : 0;
}

bool td_head_add(td_head *h, const char *name, size_t nn, const char *value, size_t nv)
{
    if (h->n >= TD_HEAD_MAX) return false;
    h->name[h->n] = td_head_put(h, name, nn);
    h->value[h->n] = td_head_put(h, value, nv);
    h->n++;
    return td_buf_ok(&h->text);
}

const char *td_head_at(const td_head *h, uint32_t offset)
{
    return offset < h->text.len ? h->text.p + offset : "";
}

const char *td_head_get(const td_head *h, const char *lower_name)
{
    for (int i = 0; i < h->n; i++)
        if (!strcmp(td_head_at(h, h->name[i]), lower_name)) return td_head_at(h, h->value[i]);
    return NULL;
}

bool td_head_target(td_head *h, const char *target, size_t n)
{
    const char *end = target + n, *p = target;
    if (n > 7 && !strncasecmp(p, "http://", 7)) p += 7;
    else if (n > 8 && !strncasecmp(p, "https://", 8)) p += 8;
    if (p != target) { /* absolute-form: only proxies send it, a server must take it (RFC 9112 3.2.2) */
        const char *host = p;
        while (p < end && *p != '/' && *p != '?') p++;
        if (p == host) return false;
        if (p == end || *p == '?') {
            h->path = td_head_put(h, "/", 1);
            if (p < end) h->query = td_head_put(h, p + 1, (size_t)(end - p - 1));
            return true;
        }
    } else if (!n || (*p != '/' && !(n == 1 && *p == '*'))) {
        return false;
    }
    const char *q = memchr(p, '?', (size_t)(end - p));
    h->path = td_head_put(h, p, (size_t)((q ? q : end) - p));
    if (q) h->query = td_head_put(h, q + 1, (size_t)(end - q - 1));
    return true;
}
