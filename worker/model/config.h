/* worker/model/config.h - config.json (and generation_config.json) of the supported families as a descriptor.
 *
 * Rules:     1. A key that would change the arithmetic and is not implemented is refused by name (ENOSUP),
 *               unless it has its neutral value (null, false, 0; 1 for factors). Keys known to change
 *               nothing are ignored; a key never heard of is named once in the log.
 *            2. Every number has bounds; a wrong type or value is EPROTO with file, key and reason.
 *            3. Defaults are those of the transformers classes, per family. Both generations of rope keys
 *               are read: rope_theta + rope_scaling{type | rope_type}, and rope_parameters.
 * Threads:   pure.
 * Source:    transformers 5.5.4: configuration_{llama,mistral,ministral3,qwen2,qwen3,mixtral,qwen3_moe}.py,
 *            modeling_rope_utils.py. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_WORKER_MODEL_CONFIG_H
#define TD_WORKER_MODEL_CONFIG_H

#include "worker/model/model.h"

enum { TD_CONFIG_MAX_BYTES = 4 << 20 };

/* config: the text of config.json; generation: of generation_config.json, or NULL. The digest is of the
 * config alone. */
td_status td_config_parse(const char *config, size_t n, const char *generation, size_t gen_n,
                          td_model_desc *out);
/* Page groups and layer -> (group, slot) from the layers' windows. ENOSUP: more kinds than TD_MAX_GROUPS. */
td_status td_config_group(td_model_desc *d);

#endif
