/* common/conf.h - every option of every program in one list: TD_CONF_MAP makes the struct, the parser, the
 * help text and the argv handed to child processes.
 *
 * Rules:     1. Precedence: flag (`--max-num-seqs 8`, `--max-num-seqs=8`, `-p 8`; booleans `--insecure`,
 *               `--no-insecure`, `--insecure=false`), then environment (TANDEM_MAX_NUM_SEQS; empty counts as
 *               unset), then the file of --config (lines `max-num-seqs: 8`, `#` comments, optional quotes),
 *               then the default.
 *            2. An unknown flag or key is an error that names the nearest known one. A file or environment
 *               may hold options of other programs (one file for a cluster); a flag may not. Every value is
 *               checked, wherever it came from. A TANDEM_ variable that is no option gets a warning that names
 *               the nearest one, and is unset, so that child processes do not repeat it; what Kubernetes sets
 *               for Services (TANDEM_ROUTER_SERVICE_HOST, TANDEM_PORT=tcp://..) is nobody's option.
 *            3. Numbers take their unit from the list; bytes take K, M, G, T (powers of 1024); "auto" is
 *               stored as 0.
 *            4. Secret options that came from the environment or a file never go to a child's argv: it reads
 *               them there too.
 * Ownership: strings belong to argv, the environment, or the config text kept in td_conf (freed by
 *            td_conf_deinit).
 * Threads:   parse on one thread, then read-only.
 * Errors:    TD_EBADREQ with td_reason(); TD_AGAIN after --help or --version printed: exit 0. Limits: config
 *            file 1 MiB. */
// SPDX-License-Identifier: Apache-2.0
#ifndef TD_COMMON_CONF_H
#define TD_COMMON_CONF_H

#include "common/arena.h"
#include "common/status.h"
#include <stdbool.h>
#include <stdint.h>

enum {
    TD_CONF_ROUTER = 1, TD_CONF_WORKER = 2, TD_CONF_SERVE = 4, TD_CONF_CHAT = 8, TD_CONF_BENCH_ENGINE = 16,
    TD_CONF_BENCH_SERVE = 32, TD_CONF_LOGITS = 64, TD_CONF_LAUNCH = 128,
    TD_CONF_BENCH_KERNELS = 256,
    TD_CONF_SECRET = 1 << 16, /* never on a child's argv unless it was on ours */
    TD_CONF_OWN = 1 << 17,    /* the parent's own affair: never handed to a child */
    TD_CONF_PLACE = 1 << 18,  /* of one process or host: the ranks of a worker may have different ones */
};

/* Shorthands of the list: who takes an option. */
#define TD_C_ALL \
    (TD_C_CLUSTER | TD_C_CLIENT | TD_CONF_BENCH_ENGINE | TD_CONF_BENCH_KERNELS | TD_CONF_LOGITS | TD_CONF_LAUNCH)
#define TD_C_CLUSTER (TD_CONF_ROUTER | TD_CONF_WORKER | TD_CONF_SERVE)
#define TD_C_ENGINE (TD_CONF_WORKER | TD_CONF_SERVE | TD_CONF_BENCH_ENGINE | TD_CONF_LOGITS)
#define TD_C_FRONT (TD_CONF_ROUTER | TD_CONF_SERVE)
#define TD_C_BACK (TD_CONF_WORKER | TD_CONF_SERVE)
#define TD_C_START (TD_CONF_SERVE | TD_CONF_LAUNCH)
#define TD_C_RANKS (TD_CONF_WORKER | TD_CONF_BENCH_ENGINE)
#define TD_C_CLIENT (TD_CONF_CHAT | TD_CONF_BENCH_SERVE)
#define TD_C_CALL (TD_C_FRONT | TD_C_CLIENT)
#define TD_CONF_INT_MAX 2147483647

/* X(type, field, name, short flag, default, lowest, highest, unit (choices for CHOICE), programs, help)
 * Types: INT int; AUTO int, 0 = "auto"; POW2 int, a power of two; U64; REAL double; BOOL; STR; CHOICE string;
 *        BYTES int64_t. */
#define TD_CONF_MAP(X) \
    X(STR, config, "config", 0, "", 0, 4096, "file", TD_C_ALL | TD_CONF_PLACE, "read options from this file") \
    X(CHOICE, log_level, "log-level", 0, "info", 0, 0, "error|warn|info|debug|trace", TD_C_ALL | TD_CONF_PLACE, \
      "what to log") \
    X(STR, model, "model", 0, "", 0, 4096, "directory", TD_C_ENGINE | TD_CONF_ROUTER | TD_CONF_PLACE, \
      "model directory (config.json, tokenizer.json, *.safetensors)") \
    X(STR, served_model_name, "served-model-name", 0, "", 0, 255, "name", TD_C_CLUSTER | TD_C_CLIENT, \
      "model name in the API (default: the directory's name)") \
    /* tandem serve */ \
    X(INT, prefill, "prefill", 0, "1", 0, 256, "workers", TD_CONF_SERVE, "prefill workers to start") \
    X(INT, decode, "decode", 0, "1", 0, 256, "workers", TD_CONF_SERVE, "decode workers to start") \
    X(INT, mixed, "mixed", 0, "0", 0, 256, "workers", TD_CONF_SERVE, "workers to start that do both") \
    X(INT, prefill_ranks, "prefill-ranks", 0, "0", 0, 1024, "ranks", TD_CONF_SERVE, \
      "processes of a prefill worker, started by mpirun; 0: as prefill-parallel says, else 1") \
    X(INT, decode_ranks, "decode-ranks", 0, "0", 0, 1024, "ranks", TD_CONF_SERVE, \
      "processes of a decode worker") \
    X(INT, mixed_ranks, "mixed-ranks", 0, "0", 0, 1024, "ranks", TD_CONF_SERVE, \
      "processes of a worker that does both") \
    X(STR, prefill_parallel, "prefill-parallel", 0, "", 0, 128, "shape", TD_CONF_SERVE, \
      "how a prefill worker's ranks divide the model: tp=N,pp=N,cp=N,dp=N,ep,fsdp, each optional; empty: " \
      "tensor parallel as far as the heads allow, the rest pipeline parallel") \
    X(STR, decode_parallel, "decode-parallel", 0, "", 0, 128, "shape", TD_CONF_SERVE, \
      "the same of a decode worker") \
    X(STR, mixed_parallel, "mixed-parallel", 0, "", 0, 128, "shape", TD_CONF_SERVE, \
      "the same of a worker that does both") \
    /* tandem launch-worker; tandem serve uses it for workers of more than one rank */ \
    X(INT, ranks, "ranks", 0, "0", 0, 1024, "ranks", TD_CONF_LAUNCH, \
      "processes of the worker; 0: the product of its parallel sizes") \
    X(STR, hosts, "hosts", 0, "", 0, 4096, "list", TD_CONF_LAUNCH, \
      "hosts of the ranks with slots, as mpirun's --host: a:4,b:4; empty: this host") \
    X(STR, hostfile, "hostfile", 0, "", 0, 4096, "file", TD_CONF_LAUNCH, "the same as a file of mpirun") \
    X(STR, rankfile, "rankfile", 0, "", 0, 4096, "file", TD_CONF_LAUNCH, \
      "which rank runs on which cores of which host: a file of mpirun") \
    X(STR, mpi_args, "mpi-args", 0, "", 0, 4096, "words", TD_C_START, \
      "more arguments for mpirun, separated by blanks (OMPI_* of the environment is not passed on)") \
    X(BOOL, restart, "restart", 0, "true", 0, 0, "", TD_CONF_LAUNCH, "start a worker that died again") \
    /* client side of the router */ \
    X(STR, host, "host", 0, "127.0.0.1", 1, 255, "address", TD_C_FRONT, "address the API listens on") \
    X(INT, port, "port", 0, "8000", 0, 65535, "port", TD_C_FRONT, "HTTP port; 0 = any free one") \
    X(INT, grpc_port, "grpc-port", 0, "8001", 0, 65535, "port", TD_C_FRONT, "gRPC port; 0 = any free one") \
    X(STR, api_key, "api-key", 0, "", 0, 1024, "key", TD_C_CALL | TD_CONF_SECRET, \
      "key that clients must send as a bearer token; empty: none") \
    X(STR, tls_cert, "tls-cert", 0, "", 0, 4096, "file", TD_C_FRONT, \
      "PEM certificate chain: TLS 1.2 and up on the HTTP and the gRPC port; read again when it changes") \
    X(STR, tls_key, "tls-key", 0, "", 0, 4096, "file", TD_C_FRONT, "PEM key of tls-cert, without a passphrase") \
    X(STR, tls_client_ca, "tls-client-ca", 0, "", 0, 4096, "file", TD_C_FRONT, \
      "PEM authorities: clients must show a certificate of one of them; empty: none is asked for") \
    X(STR, tls_ca, "tls-ca", 0, "", 0, 4096, "file", TD_C_CLIENT, \
      "PEM authorities that a https:// url is checked against; empty: the system's") \
    X(STR, chat_template, "chat-template", 0, "", 0, 4096, "file", TD_C_FRONT, \
      "Jinja chat template to use instead of the model's") \
    X(INT, max_queue, "max-queue", 0, "4096", 1, 1000000, "requests", TD_C_FRONT, \
      "requests held before 429 is answered") \
    X(BYTES, max_body_bytes, "max-body-bytes", 0, "8M", 1024, 1073741824, "bytes", TD_C_FRONT, \
      "largest request body") \
    X(INT, request_timeout_s, "request-timeout-s", 0, "600", 1, 86400, "s", TD_C_FRONT, \
      "a request that takes longer is ended") \
    X(INT, keepalive_s, "keepalive-s", 0, "15", 1, 3600, "s", TD_C_FRONT, \
      "a comment is sent on a silent stream this often") \
    X(INT, net_threads, "net-threads", 0, "1", 1, 64, "threads", TD_C_FRONT, "threads for sockets and HTTP") \
    X(INT, text_threads, "text-threads", 0, "2", 1, 64, "threads", TD_C_FRONT, \
      "threads for templates and tokenizing") \
    X(BOOL, debug_endpoints, "debug-endpoints", 0, "true", 0, 0, "", TD_C_FRONT, "serve /debug/*") \
    /* between router and workers */ \
    X(STR, router_bind, "router-bind", 0, "tcp://127.0.0.1:5570", 1, 255, "endpoint", TD_C_FRONT, \
      "ZeroMQ endpoint on which the router awaits workers") \
    X(STR, router, "router", 0, "tcp://127.0.0.1:5570", 1, 255, "endpoint", TD_CONF_WORKER, \
      "the router's ZeroMQ endpoint (tcp:// or ipc://)") \
    X(STR, bulk_bind, "bulk-bind", 0, "tcp://127.0.0.1:*", 1, 255, "endpoint", TD_C_BACK | TD_CONF_PLACE, \
      "ZeroMQ endpoint on which a decode worker receives KV pages") \
    X(BOOL, insecure, "insecure", 0, "false", 0, 0, "", TD_C_CLUSTER, \
      "allow unencrypted tcp beyond this machine") \
    X(STR, curve_secret_file, "curve-secret-file", 0, "", 0, 4096, "file", TD_C_CLUSTER | TD_CONF_PLACE, \
      "the cluster's CURVE secret key, the same for the router and all workers (tandem keys makes it)") \
    X(STR, curve_public_file, "curve-public-file", 0, "", 0, 4096, "file", TD_C_CLUSTER | TD_CONF_PLACE, \
      "the router's CURVE public key, if it is not that of curve-secret-file") \
    X(INT, credits, "credits", 0, "64", 1, 4096, "frames", TD_C_BACK, "KV frames in flight per shipment") \
    X(STR, bulk_advertise, "bulk-advertise", 0, "", 0, 255, "endpoint", TD_CONF_WORKER | TD_CONF_PLACE, \
      "how other workers reach bulk-bind (default: as bound, with this host's name for a wildcard)") \
    X(INT, ship_timeout_ms, "ship-timeout-ms", 0, "30000", 10, 3600000, "ms", TD_C_BACK, \
      "a hand-off without progress for this long is given up and recomputed") \
    X(INT, drain_s, "drain-s", 0, "30", 0, 86400, "s", TD_C_CLUSTER, \
      "after SIGTERM, requests still running after this are ended; a worker hands them back to its router") \
    X(INT, drain_listen_s, "drain-listen-s", 0, "0", 0, 86400, "s", TD_C_FRONT, \
      "after SIGTERM the ports stay open for this long even if nothing runs, answering 503 until load balancers " \
      "have noticed; at most drain-s") \
    X(STR, fault, "fault", 0, "", 0, 64, "what", TD_CONF_WORKER | TD_CONF_PLACE, \
      "tests only: damage hand-offs (flip:N, drop:N, delay-commit:MS) or stop once (pause:POINT:PATH)") \
    /* worker */ \
    X(CHOICE, role, "role", 0, "mixed", 0, 0, "prefill|decode|mixed", TD_C_RANKS, \
      "which phase this worker serves") \
    X(STR, name, "name", 0, "", 0, 63, "name", TD_CONF_WORKER | TD_CONF_PLACE, \
      "worker name in logs and metrics (default: made up)") \
    X(INT, tensor_parallel_size, "tensor-parallel-size", 0, "1", 1, 1024, "ranks", TD_C_RANKS, \
      "ranks that share each layer: heads, feed-forward columns, vocabulary") \
    X(INT, pipeline_parallel_size, "pipeline-parallel-size", 0, "1", 1, 1024, "ranks", TD_C_RANKS, \
      "stages of consecutive layers") \
    X(INT, context_parallel_size, "context-parallel-size", 0, "1", 1, 1024, "ranks", TD_C_RANKS, \
      "ranks that share the tokens of a sequence and their KV") \
    X(INT, data_parallel_size, "data-parallel-size", 0, "1", 1, 1024, "ranks", TD_C_RANKS, \
      "groups of ranks that compute different sequences") \
    X(BOOL, expert_parallel, "expert-parallel", 0, "false", 0, 0, "", TD_C_RANKS, \
      "whole experts on ranks, instead of a part of every expert on each") \
    X(INT, redundant_experts, "redundant-experts", 0, "0", 0, 512, "experts", TD_C_BACK, \
      "where experts are parallel: slots of each pipeline stage for more copies of those that get many tokens") \
    X(INT, eplb_interval, "eplb-interval", 0, "0", 0, 1000000000, "steps", TD_C_BACK, \
      "where experts are parallel: they move to even the ranks' load after so many steps; 0: never") \
    X(BOOL, fully_sharded, "fully-sharded", 0, "false", 0, 0, "", TD_C_RANKS, \
      "weights are sharded over data- and context-parallel ranks and gathered a layer ahead of use") \
    X(INT, rank_timeout_ms, "rank-timeout-ms", 0, "2500", 500, 60000, "ms", TD_C_BACK, \
      "how long a rank waits for the others before the worker is given up") \
    X(BOOL, quantized_collectives, "quantized-collectives", 0, "false", 0, 0, "", TD_C_BACK, \
      "tensor-parallel ranks exchange their parts of sums as 8-bit integers (changes results)") \
    X(INT, ready_fd, "ready-fd", 0, "-1", -1, 65535, "fd", \
      TD_CONF_WORKER | TD_CONF_ROUTER | TD_CONF_OWN | TD_CONF_PLACE, \
      "write one line to this file descriptor when ready; -1: none") \
    X(INT, expected_workers, "expected-workers", 0, "0", 0, 768, "workers", TD_CONF_ROUTER | TD_CONF_OWN, \
      "the ready line waits for so many workers, requests do not; 0: for those that can serve") \
    X(STR, trace_file, "trace-file", 0, "", 0, 4096, "file", TD_CONF_WORKER | TD_CONF_PLACE, \
      "write every step and shipment as a JSON line") \
    X(STR, cache_dir, "cache-dir", 0, "", 0, 4096, "directory", TD_C_ENGINE | TD_CONF_PLACE, \
      "packed weights (default: $XDG_CACHE_HOME/tandem or ~/.cache/tandem)") \
    X(BYTES, cache_limit, "cache-limit", 0, "64G", 0, 17592186044416, "bytes", TD_C_ENGINE | TD_CONF_PLACE, \
      "packed weights to keep in the cache directory: those unused longest go at start; 0: all") \
    X(BOOL, pack_cache, "pack-cache", 0, "true", 0, 0, "", TD_C_ENGINE | TD_CONF_PLACE, \
      "keep packed weights in the cache directory") \
    X(BOOL, prefix_cache, "prefix-cache", 0, "true", 0, 0, "", TD_C_ENGINE, \
      "reuse KV pages of equal prompt prefixes") \
    /* engine */ \
    X(AUTO, threads, "threads", 't', "auto", 0, 256, "threads", TD_C_ENGINE | TD_CONF_BENCH_KERNELS | TD_CONF_PLACE, \
      "compute threads; auto: all cores") \
    X(AUTO, max_model_len, "max-model-len", 0, "auto", 0, 16777216, "tokens", TD_C_ENGINE | TD_CONF_ROUTER, \
      "longest prompt plus output; auto: the model's") \
    X(AUTO, kv_pages, "kv-pages", 0, "auto", 0, TD_CONF_INT_MAX, "pages", TD_C_ENGINE, \
      "KV pages; auto: from kv-memory") \
    X(BYTES, kv_memory, "kv-memory", 0, "auto", 0, 17592186044416, "bytes", TD_C_ENGINE, \
      "memory for KV pages; auto: a share of what is free") \
    X(POW2, page_size, "page-size", 0, "16", 1, 128, "tokens", TD_C_ENGINE, "tokens in a KV page") \
    X(POW2, attention_split, "attention-split", 0, "256", 64, 65536, "tokens", TD_C_ENGINE, \
      "keys per split of attention; context parallel ranks hold whole splits") \
    X(INT, max_num_batched_tokens, "max-num-batched-tokens", 0, "2048", 1, 1048576, "tokens", TD_C_ENGINE, \
      "rows in one step") \
    X(INT, max_num_seqs, "max-num-seqs", 0, "64", 1, 1024, "sequences", TD_C_ENGINE, \
      "sequences that run at once") \
    X(INT, max_prefill_chunk, "max-prefill-chunk", 0, "0", 0, 1048576, "tokens", TD_C_ENGINE, \
      "prompt tokens of one sequence in a step; 0: what the step has left") \
    X(CHOICE, ops, "ops", 0, "auto", 0, 0, "auto|ref|avx2|avx512|avx512bf16|amx|cuda", TD_C_ENGINE | TD_CONF_BENCH_KERNELS, \
      "kernel family") \
    X(CHOICE, device_steps, "device-steps", 0, "replay", 0, 0, "replay|queued|apart", TD_C_ENGINE, \
      "on a CUDA device: replay: steps that only generate are recorded once and run as one launch; " \
      "queued: launch by launch; apart: and no kernel starts before the one before it has ended") \
    X(BOOL, deterministic, "deterministic", 0, "false", 0, 0, "", TD_C_ENGINE | TD_CONF_BENCH_KERNELS, \
      "on a CUDA device: one arithmetic for every number of rows (kernels of the CPU: always)") \
    X(INT, device, "device", 0, "-1", -1, 1023, "number", TD_C_ENGINE | TD_CONF_BENCH_KERNELS | TD_CONF_PLACE, \
      "CUDA device; -1: this process's number among the ranks of its host") \
    X(STR, numerics, "numerics", 0, "", 0, 255, "id", TD_C_ENGINE | TD_CONF_BENCH_KERNELS, \
      "numerics id to pin in a mixed fleet (cpu-x86-bf16: with and without AMX)") \
    X(CHOICE, load_format, "load-format", 0, "auto", 0, 0, "auto|dummy", TD_C_ENGINE | TD_CONF_ROUTER, \
      "dummy: random weights of --shape, no files") \
    X(CHOICE, shape, "shape", 0, "tiny", 0, 0, "tiny|0.5b|1b|8b|ranks-tiny|ranks-mqa|moe-tiny", \
      TD_C_ENGINE | TD_CONF_BENCH_KERNELS | TD_CONF_ROUTER, \
      "model shape for --load-format dummy, and of the kernels' benchmark") \
    X(U64, seed, "seed", 0, "0", 0, 18446744073709551615.0, "", TD_C_ENGINE | TD_C_CLIENT, \
      "seed of random weights and prompts") \
    /* tandem chat and tandem bench serve */ \
    X(STR, url, "url", 0, "http://127.0.0.1:8000", 1, 1024, "URL", TD_C_CLIENT, "base URL of the API") \
    X(STR, prompt, "prompt", 'p', "", 0, 1048576, "text", TD_CONF_CHAT, \
      "ask this once and exit; empty: interactive") \
    X(REAL, temperature, "temperature", 0, "1", 0, 2, "", TD_C_CLIENT, "sampling temperature; 0: greedy") \
    X(INT, max_tokens, "max-tokens", 'n', "512", 1, 1048576, "tokens", TD_CONF_CHAT, "longest answer") \
    X(INT, num_prompts, "num-prompts", 0, "100", 1, 10000000, "requests", TD_CONF_BENCH_SERVE, \
      "requests to send") \
    X(REAL, request_rate, "request-rate", 0, "0", 0, 1000000, "1/s", TD_CONF_BENCH_SERVE, \
      "mean of Poisson arrivals; 0: all at once") \
    X(INT, input_len, "input-len", 0, "256", 1, 1048576, "tokens", TD_CONF_BENCH_SERVE, "prompt length") \
    X(INT, output_len, "output-len", 0, "64", 1, 1048576, "tokens", TD_CONF_BENCH_SERVE, "output length") \
    X(REAL, shared_prefix, "shared-prefix", 0, "0", 0, 1, "fraction", TD_CONF_BENCH_SERVE, \
      "part of the prompt that all requests share") \
    X(STR, trace, "trace", 0, "", 0, 4096, "file", TD_CONF_BENCH_SERVE, \
      "replay arrivals and lengths of this trace") \
    X(INT, max_concurrency, "max-concurrency", 0, "0", 0, 65536, "requests", TD_CONF_BENCH_SERVE, \
      "requests in flight; 0: no limit") \
    X(REAL, ttft_ms, "ttft-ms", 0, "0", 0, 1e9, "ms", TD_CONF_BENCH_SERVE, \
      "goodput: time to first token; 0: no bound") \
    X(REAL, tpot_ms, "tpot-ms", 0, "0", 0, 1e9, "ms", TD_CONF_BENCH_SERVE, \
      "goodput: time per output token; 0: no bound") \
    /* tandem bench engine */ \
    X(INT, prompt_len, "prompt-len", 'p', "512", 0, 1048576, "tokens", TD_CONF_BENCH_ENGINE, \
      "prompt tokens to compute") \
    X(INT, gen_len, "gen-len", 'n', "64", 0, 1048576, "tokens", TD_CONF_BENCH_ENGINE, "tokens to generate") \
    X(INT, context_len, "context-len", 0, "0", 0, 1048576, "tokens", TD_CONF_BENCH_ENGINE, \
      "tokens that generating sequences have before the clock starts") \
    X(STR, batch, "batch", 'B', "1,8,32", 1, 255, "list", TD_CONF_BENCH_ENGINE, \
      "batch sizes, comma separated") \
    X(INT, repeats, "repeats", 'r', "3", 1, 1000, "runs", TD_CONF_BENCH_ENGINE | TD_CONF_BENCH_KERNELS, \
      "runs of each case") \
    X(STR, json, "json", 0, "", 0, 4096, "file", TD_CONF_BENCH_ENGINE | TD_CONF_BENCH_KERNELS | TD_CONF_BENCH_SERVE, \
      "write results as JSON; -: to standard output") \
    /* tandem logits */ \
    X(STR, ids, "ids", 0, "", 0, 4096, "file", TD_CONF_LOGITS, "safetensors with the cases: int32 tensors ids_K")      \
    X(STR, out, "out", 0, "", 0, 4096, "file", TD_CONF_LOGITS, "safetensors to write: f32 logits_K [n, vocabulary]")   \
    X(INT, chunk, "chunk", 0, "0", 0, 1048576, "tokens", TD_CONF_LOGITS, "tokens in a step; 0: all at once")

#define TD_CONF_C_INT int
#define TD_CONF_C_AUTO int
#define TD_CONF_C_POW2 int
#define TD_CONF_C_U64 uint64_t
#define TD_CONF_C_REAL double
#define TD_CONF_C_BOOL bool
#define TD_CONF_C_STR const char *
#define TD_CONF_C_CHOICE const char *
#define TD_CONF_C_BYTES int64_t

enum {
#define X(type, field, ...) TD_CONF_ID_##field,
    TD_CONF_MAP(X)
#undef X
    TD_CONF_COUNT
};

typedef enum { TD_CONF_DEFAULT, TD_CONF_FILE, TD_CONF_ENV, TD_CONF_FLAG } td_conf_source;

typedef struct td_conf {
#define X(type, field, ...) TD_CONF_C_##type field;
    TD_CONF_MAP(X)
#undef X
    uint8_t source[TD_CONF_COUNT]; /* td_conf_source of each field, by TD_CONF_ID_<field> */
    char *file_text;
} td_conf;

void td_conf_init(td_conf *c); /* all defaults */
void td_conf_deinit(td_conf *c);
/* program: one TD_CONF_<PROGRAM>. argv[0] is skipped. Positional arguments (anything after "--" too) are
 * counted in *n_positional; more than max_positional is an error. c is initialized here; td_conf_deinit it
 * even after an error. */
td_status td_conf_parse(td_conf *c, unsigned program, int argc, char **argv, const char **positional,
                        int max_positional, int *n_positional);
/* Set one option by name, as its flag would (value is borrowed). */
td_status td_conf_set(td_conf *c, const char *name, const char *value);
/* The arguments (no argv[0]) that make `program` see the values of c: all its options that differ from the
 * default or were given explicitly. NULL-terminated, strings in the arena; returns the count, or -1 if max or
 * the arena is too small. */
int td_conf_to_argv(const td_conf *c, unsigned program, td_arena *a, char **argv, int max);
/* `name: value` lines of all options of these programs but those of TD_CONF_PLACE, in the order of the list: what two
 * processes that belong together must have in common. False: it does not fit. */
bool td_conf_to_text(const td_conf *c, unsigned programs, char *out, size_t cap);

#endif
