/* router/core/speech.c - one stopper for all choices, a detokenizer and a stop state for each. */
// SPDX-License-Identifier: Apache-2.0
#include "router/core/speech.h"
#include "common/check.h"
#include "common/log.h"
#include "router/text/detok.h"
#include "router/text/stopper.h"

#include <stdlib.h>

enum { PIECE_MAX_BYTES = 64 << 10 /* text of one token */ };
_Static_assert((int)TD_STOPPER_STRINGS >= (int)TD_MAX_STOP_STRINGS, "the API lets more strings through");

typedef struct mouth { td_detok detok; td_stop_state stop; } mouth;

struct td_speech {
    const td_job *job;
    td_stopper *stopper; /* NULL: no stop strings */
    td_buf piece;
    mouth m[]; /* [sampling.n] */
};

td_speech *td_speech_open(const td_tokenizer *t, const td_job *job)
{
    td_speech *s = td_xalloc(sizeof *s + job->sampling.n * sizeof *s->m);
    s->job = job;
    td_buf_init(&s->piece, PIECE_MAX_BYTES);
    for (uint32_t i = 0; i < job->sampling.n; i++) td_detok_init(&s->m[i].detok, t, job->skip_special);
    /* The API has checked the strings; without a stopper the text would go on to max_tokens, so say it. */
    if (job->n_stop && td_stopper_open(job->stop, NULL, job->n_stop, &s->stopper) != TD_OK)
        TD_WARN("request %s: stop strings are not looked for: %s", job->name, td_reason());
    return s;
}

void td_speech_close(td_speech *s)
{
    if (!s) return;
    td_stopper_close(s->stopper);
    td_buf_deinit(&s->piece);
    free(s);
}

static int let_out(td_speech *s, mouth *m, td_buf *out)
{
    if (!s->piece.len) return -1;
    return td_stopper_push(s->stopper, &m->stop, s->piece.p, s->piece.len, s->job->include_stop, out)
               ? m->stop.which
               : -1;
}

int td_speech_push(td_speech *s, uint32_t choice, uint32_t id, td_buf *out)
{
    mouth *m = &s->m[choice];
    if (m->stop.matched) return -1;
    td_buf_reset(&s->piece);
    td_detok_push(&m->detok, id, &s->piece);
    return let_out(s, m, out);
}

int td_speech_end(td_speech *s, uint32_t choice, td_buf *out)
{
    mouth *m = &s->m[choice];
    if (m->stop.matched) return -1;
    td_buf_reset(&s->piece);
    td_detok_flush(&m->detok, &s->piece);
    int which = let_out(s, m, out);
    if (which < 0) td_stopper_flush(s->stopper, &m->stop, out);
    return which;
}
