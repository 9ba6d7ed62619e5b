// SPDX-License-Identifier: Apache-2.0
/* common/vocab.c - release; filling is the tokenizer's business. */
#include "common/vocab.h"
#include <stdlib.h>

void td_vocab_deinit(td_vocab *v)
{
    free(v->off);
    free(v->flags);
    free(v->bytes);
    *v = (td_vocab){0};
}
