/* common/sampling.h - how one request wants its tokens chosen and when it ends. Plain values, used by router
 * and worker.
 *
 * Order of operations (Hugging Face's): logit_bias, min_tokens, repetition, presence/frequency, temperature,
 * top_k, top_p, min_p, then the exponential race (common/rng.h). Source: algorithms notes 13.
 * Ownership: arrays are borrowed from whoever owns the request. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_SAMPLING_H
#define TD_COMMON_SAMPLING_H

#include <stdbool.h>
#include <stdint.h>

enum {
    TD_MAX_CHOICES = 128, TD_MAX_TOP_LOGPROBS = 20, TD_MAX_LOGIT_BIAS = 1024, TD_MAX_STOP_IDS = 64,
    TD_MAX_STOP_STRINGS = 16
};

typedef struct td_bias { uint32_t id; float add; } td_bias;

typedef struct td_sampling {
    float temperature;        /* < 1e-5: greedy, lowest id on ties, before any filter */
    int32_t top_k;            /* <= 0: off; ties with the k-th are kept */
    float top_p;              /* 1: off */
    float min_p;              /* 0: off */
    float repetition_penalty; /* 1: off; over prompt and output */
    float presence_penalty, frequency_penalty; /* over output only */
    uint64_t seed;
    uint32_t max_tokens;      /* >= 1: output tokens per choice */
    uint32_t min_tokens;      /* no EOS or stop id before this many */
    bool ignore_eos;
    uint32_t n;               /* choices, 1..TD_MAX_CHOICES */
    int32_t logprobs;         /* -1: none; else 0..TD_MAX_TOP_LOGPROBS alternatives to the chosen token */
    int32_t prompt_logprobs;  /* -1: none; else as above, for every prompt position after the first */
    uint32_t n_bias, n_stop_ids;
    const td_bias *bias;
    const uint32_t *stop_ids; /* with the model's EOS ids (the router adds them) unless ignore_eos */
} td_sampling;

typedef enum {
    TD_FINISH_NONE, TD_FINISH_STOP, TD_FINISH_LENGTH, TD_FINISH_CANCEL, TD_FINISH_ERROR
} td_finish;

/* Log probability report of one position: the token itself, then n alternatives in descending order (raw
 * logits' softmax). */
typedef struct td_top { uint32_t id; float logprob; } td_top;

#endif
