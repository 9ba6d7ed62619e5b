/* worker/model/config_int.h - shared by config.c and config_rope.c: bounded getters (null counts as absent)
 * and the rope keys. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_CONFIG_INT_H
#define TD_WORKER_MODEL_CONFIG_INT_H

#include "common/json.h"
#include "worker/model/model.h"
#include <limits.h>

#define TD_CONFIG_REQUIRED INT_MIN /* as the default: a missing key is an error; for numbers, NAN */

td_status td_config_int(const td_json *o, const char *key, int dflt, int lo, int hi, int *out);
td_status td_config_num(const td_json *o, const char *key, double dflt, double lo, double hi, double *out);
td_status td_config_bool(const td_json *o, const char *key, bool dflt, bool *out);
/* Fills d->rope and, where the family has it (q_scaling), q_scale_beta and q_scale_base. theta: the class's
 * default. */
td_status td_config_rope(const td_json *root, double theta, bool q_scaling, td_model_desc *d);
/* quantization_config; no kind without one. */
td_status td_config_fp8(const td_json *root, td_fp8_desc *out);

#endif
