/* tests/router/support_tok.h - a byte-level tokenizer in a temporary folder: ids 0..255 are the bytes, 256 is
 * <eos>, 257 is <bos>. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_TESTS_ROUTER_SUPPORT_TOK_H
#define TD_TESTS_ROUTER_SUPPORT_TOK_H

#include "router/text/tokenizer.h"

const td_tokenizer *support_tokenizer(void);
const char *support_model_dir(void);
void support_tokenizer_close(void);

#endif
