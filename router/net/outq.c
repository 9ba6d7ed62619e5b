// SPDX-License-Identifier: Apache-2.0
#include "router/net/net_int.h"
#include <string.h>

/* Memory above this is given back when the queue runs empty; below, the next token would only allocate it
 * again. */
enum { KEEP_BYTES = 16 << 10 };

void outq_init(td_outq *q)
{
    memset(q, 0, sizeof *q);
    td_buf_init(&q->b, SIZE_MAX / 4); /* limited by the overflow rule, not by the buffer */
}

void outq_deinit(td_outq *q)
{
    td_buf_deinit(&q->b);
    q->off = 0;
}

void outq_clear(td_outq *q)
{
    q->off = 0;
    if (q->b.cap > KEEP_BYTES) td_buf_deinit(&q->b);
    else td_buf_reset(&q->b);
}

void outq_sent(td_outq *q, size_t n)
{
    q->sent += n;
    q->off += n;
    if (q->off == q->b.len) {
        outq_clear(q);
    } else if (q->off > KEEP_BYTES && q->off > q->b.len / 2) {
        td_buf_drop_front(&q->b, q->off);
        q->off = 0;
    }
}
