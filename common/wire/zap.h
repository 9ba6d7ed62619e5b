/* common/wire/zap.h - the ZAP handler (ZeroMQ RFC 27): which CURVE clients may connect to this process.
 * Private to common/wire.
 *
 * A client is let in if and only if it proved a public key on the list. Threads: one handler thread per
 * context; allow: any. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_WIRE_ZAP_H
#define TD_COMMON_WIRE_ZAP_H

#include "common/status.h"
#include <stdint.h>

#define TD_ZAP_DOMAIN "tandem"
enum { TD_ZAP_MAX_KEYS = 8 };

typedef struct td_zap td_zap;

td_status td_zap_start(void *zmq_ctx, td_zap **out);
td_status td_zap_allow(td_zap *z, const uint8_t public_key[32]); /* EFULL over TD_ZAP_MAX_KEYS */
void td_zap_stop(td_zap *z);                                     /* NULL is allowed */

#endif
