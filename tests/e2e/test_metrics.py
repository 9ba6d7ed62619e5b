"""/metrics after a known load: the names that dashboards and schedulers read (vLLM's and ours), each once and in the text
format; what is counted equals the requests' own usage and timings.
SPDX-License-Identifier: Apache-2.0
"""
import re

from support.cluster import Cluster, Error, questions
from support.report import done, ok

VLLM = {
    "gauge": ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "cache_config_info", "lora_requests_info"),
    "counter": ("prompt_tokens_total", "prompt_tokens_cached_total", "generation_tokens_total", "prefix_cache_queries_total",
                "prefix_cache_hits_total", "num_preemptions_total", "request_success_total"),
    "histogram": ("time_to_first_token_seconds", "inter_token_latency_seconds", "request_time_per_output_token_seconds",
                  "e2e_request_latency_seconds", "request_queue_time_seconds", "request_prefill_time_seconds",
                  "request_decode_time_seconds", "request_inference_time_seconds", "request_prompt_tokens",
                  "request_generation_tokens", "request_params_n", "request_params_max_tokens",
                  "request_max_num_generation_tokens", "request_prefill_kv_computed_tokens"),
}
SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)(?:\{((?:[a-zA-Z_]\w*="(?:[^"\\]|\\.)*",?)*)\})? (-?[\d.]+(?:e[+-]?\d+)?|\+Inf|NaN)')


def read(text):
    """({family: type}, {(name, labels): value}); raises where it is not the text format."""
    types, values, family = {}, {}, None
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split()[2]
            assert family not in types, f"{family} comes twice"
        elif line.startswith("# TYPE "):
            assert line.split()[2] == family, line
            types[family] = line.split()[3]
        else:
            m = SAMPLE.fullmatch(line)
            assert m, line
            own = {family + s for s in ("_bucket", "_sum", "_count")} if types[family] == "histogram" else {family}
            assert m[1] in own, (family, line)
            assert (m[1], m[2] or "") not in values, line
            values[m[1], m[2] or ""] = float(m[3])
    return types, values


def histograms(types, values):
    for family in (f for f, t in types.items() if t == "histogram"):
        edges = [(k[1], v) for k, v in values.items() if k[0] == family + "_bucket"]
        counts = [v for _, v in edges]
        assert counts == sorted(counts) and 'le="+Inf"' in edges[-1][0], family
        assert counts[-1] == next(v for k, v in values.items() if k[0] == family + "_count"), family
        bounds = [float(re.search(r'le="([^"]+)"', label)[1]) for label, _ in edges]
        assert bounds == sorted(set(bounds)), family


Q = max(questions(), key=lambda q: len(q["prompt_ids"]))
with Cluster(prefill=1, decode=1) as c:
    kw = {"temperature": 0, "ignore_eos": True}
    answers = [c.complete(Q["prompt_ids"], max_tokens=20, **kw), c.complete(Q["prompt_ids"], max_tokens=5, **kw),
               c.complete(Q["prompt_ids"][:9], max_tokens=7, n=3, **{**kw, "temperature": 1})]
    stop = c.chat(questions()[0]["messages"], temperature=0)
    assert stop["choices"][0]["finish_reason"] == "stop" and answers[1]["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    answers.append(stop)
    try:
        c.complete(Q["prompt_ids"] * 100, max_tokens=1)
        raise AssertionError("no error")
    except Error as e:
        assert e.status == 400, e
    c.wait_clean()

    def steps():  # as the last heartbeats say
        text = c.get("/metrics")

        def of(what, role):
            return int(float(re.search(rf'^tandem_worker_{what}_total\{{.*role="{role}"\}} (\S+)$', text, re.M)[1]))

        return of("steps", "prefill"), of("steps", "decode"), of("prompt_rows", "prefill"), of("decode_rows", "decode")

    fresh = [a["usage"]["prompt_tokens"] - a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers]
    # One after another: a prompt is one step, and each token after the first, but of three choices at once.
    after = [20 - 1, 5 - 1, 7 - 1, stop["usage"]["completion_tokens"] - 1]
    c.until("the last beat", 20, lambda: steps() == (len(answers), sum(after), sum(fresh), sum(after) + 2 * after[2]))
    ok("steps and rows of the workers")
    types, values = read(c.get("/metrics"))
    histograms(types, values)
    for kind, names in VLLM.items():
        for name in names:
            assert types.get("vllm:" + name) == kind, name
    for (name, labels), _ in values.items():
        assert not name.startswith("vllm:") or 'model_name="demo"' in labels and "engine=" in labels, (name, labels)
    ok("vLLM's names, with their labels; the text format")

    def total(name, label=""):
        found = [v for (n, labels), v in values.items() if n == name and label in labels]
        assert found, name
        return sum(found)

    prompts = [a["usage"]["prompt_tokens"] for a in answers]
    cached = [a["usage"]["prompt_tokens_details"]["cached_tokens"] for a in answers]
    outputs = [a["usage"]["completion_tokens"] for a in answers]
    for p in "vllm:", "tandem_":
        assert total(p + "prompt_tokens_total") == sum(prompts), p
        assert total(p + "generation_tokens_total") == sum(outputs), p
        for name, want in (("request_prompt_tokens", prompts), ("request_generation_tokens", outputs), ("request_params_n", [1, 1, 3, 1]),
                           ("request_max_num_generation_tokens", [20, 5, 7, outputs[3]]),
                           ("request_prefill_kv_computed_tokens", [a - b for a, b in zip(prompts, cached)])):
            assert (total(p + name + "_sum"), total(p + name + "_count")) == (sum(want), len(want)), (p, name)
        for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_inference_time_seconds"):
            assert total(p + name + "_count") == 4, (p, name)
        for name, key in (("e2e_request_latency_seconds", "total_ms"), ("time_to_first_token_seconds", "ttft_ms"),
                          ("request_queue_time_seconds", "queue_ms"), ("request_prefill_time_seconds", "prefill_ms")):
            want = sum(a["timings"][key] for a in answers) / 1e3
            assert abs(total(p + name + "_sum") - want) < 2e-6 * len(answers) + 1e-6 * want, (p, name, total(p + name + "_sum"), want)
    seconds = {n: total(f"vllm:{n}_seconds_sum") for n in ("e2e_request_latency", "request_queue_time", "request_inference_time")}
    waited, worked = seconds["request_queue_time"], seconds["request_inference_time"]
    assert abs(seconds["e2e_request_latency"] - waited - worked) < 1e-6 < waited, seconds
    assert total("vllm:prompt_tokens_cached_total") == total("tandem_cached_prompt_tokens_total") == sum(cached)
    assert total("vllm:request_success_total", 'finished_reason="length"') == 1 + 1 + 3
    assert total("vllm:request_success_total", 'finished_reason="stop"') == 1
    assert total("vllm:request_success_total", 'finished_reason="error"') == 1
    assert total("vllm:num_requests_running") == total("vllm:num_requests_waiting") == total("vllm:kv_cache_usage_perc") == 0
    w = c.ledger()["workers"]
    assert total("tandem_kv_pages") > 0 and len({k for k in values if k[0] == "tandem_worker_state"}) == len(w) == 2
    shipped = sum(a["timings"]["kv_bytes_shipped"] for a in answers)
    assert total("tandem_kv_bytes_shipped_total") == shipped > 0
    ok("counts equal usage, sums of seconds equal timings")
done()
