/* router/core/speech.c - detokenizer and stop strings of one choice. */
// SPDX-License-Identifier: Apache-2.0
#include "router/core/speech.h"
#include "common/check.h"
#include "router/text/detok.h"

#include <stdlib.h>
#include <string.h>

enum { HELD_MAX_BYTES = 1 << 20 };

struct td_speech {
    const td_job *job;
    td_detok detok;
    td_buf held; /* text not yet let out */
    bool matched;
};

td_speech *td_speech_open(const td_tokenizer *t, const td_job *job)
{
    td_speech *s = td_xalloc(sizeof *s);
    s->job = job;
    td_detok_init(&s->detok, t, job->skip_special);
    td_buf_init(&s->held, HELD_MAX_BYTES);
    return s;
}

void td_speech_close(td_speech *s)
{
    if (!s) return;
    td_buf_deinit(&s->held);
    free(s);
}

/* The earliest match wins; of two at the same place the longer one. */
static int find_stop(const td_speech *s, size_t *at)
{
    int best = -1;
    size_t best_len = 0;
    for (uint32_t i = 0; i < s->job->n_stop; i++) {
        size_t n = strlen(s->job->stop[i]);
        const char *p = n && s->held.len ? memmem(s->held.p, s->held.len, s->job->stop[i], n) : NULL;
        if (!p) continue;
        size_t where = (size_t)(p - s->held.p);
        if (best >= 0 && (where > *at || (where == *at && n <= best_len))) continue;
        best = (int)i;
        best_len = n;
        *at = where;
    }
    return best;
}

/* Bytes at the end that may become a stop string. */
static size_t undecided(const td_speech *s)
{
    size_t most = 0;
    for (uint32_t i = 0; i < s->job->n_stop; i++) {
        size_t n = strlen(s->job->stop[i]), k = TD_MIN(n ? n - 1 : 0, s->held.len);
        while (k > most && memcmp(s->held.p + s->held.len - k, s->job->stop[i], k)) k--;
        if (k > most) most = k;
    }
    return most;
}

static int look(td_speech *s, td_buf *out, bool end)
{
    size_t at = 0;
    int stop = find_stop(s, &at);
    if (stop >= 0) {
        s->matched = true;
        td_buf_add(out, s->held.p, at + (s->job->include_stop ? strlen(s->job->stop[stop]) : 0));
        return stop;
    }
    size_t keep = end ? 0 : undecided(s), go = s->held.len - keep;
    if (go) {
        td_buf_add(out, s->held.p, go);
        td_buf_drop_front(&s->held, go);
    }
    return -1;
}

int td_speech_push(td_speech *s, uint32_t id, td_buf *out)
{
    if (s->matched) return -1;
    td_detok_push(&s->detok, id, &s->held);
    return look(s, out, false);
}

int td_speech_end(td_speech *s, td_buf *out)
{
    if (s->matched) return -1;
    td_detok_flush(&s->detok, &s->held);
    return look(s, out, true);
}
