"""What the workers did and when, from their traces: pages leave while later layers are still being computed;
requests join and leave a running batch; n samples share one prefill.
SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import threading

from support.cluster import Cluster, questions
from support.machine import patience
from support.report import done, ok


def trace(path):
    with open(path) as f:
        return [json.loads(line) for line in f]


QS = questions()
STORY = max(QS, key=lambda q: len(q["prompt_ids"]))

# One request of 2,000 tokens: frames leave layer by layer.
path = "/tmp/td_trace_p.%d" % os.getpid()
with Cluster(prefill_extra=["--trace-file", path],
             extra=["--max-num-batched-tokens", "2048", "--no-prefix-cache"]) as c:
    ids = (STORY["prompt_ids"] * 30)[:2000]
    r = c.complete(ids, max_tokens=4, temperature=0, ignore_eos=True)
    assert r["timings"]["kv_bytes_shipped"] == 6 * 2000 * 2 * 2 * 64 * 2, r[
        "timings"]  # layers, tokens, k and v, heads, dimension, bytes
    c.wait_clean()
    ev = trace(path)
    os.unlink(path)
    frames = [e for e in ev if e["ev"] == "frame_sent"]
    layers = [e for e in ev if e["ev"] == "layers"]
    first = frames[0]
    second_group = [e for e in layers if e["layer0"] >= first["layer0"] + first["n_layers"]]
    assert second_group and first["t_us"] < second_group[-1]["t_us"], \
        "no frame left before the prefill was over"
    before = sum(f["t_us"] < max(e["t_us"] for e in layers) for f in frames)
    early = first["t_us"] < min(e["t_us"] for e in second_group)
    print(
        f"first frame: layers {first['layer0']}..{first['layer0'] + first['n_layers'] - 1}, "
        f"{len(frames)} frames, {before} of them before the last layer was computed"
    )
    assert early, "the first frame left only after the second layer group was computed"
    assert sum(f["bytes"] for f in frames) == r["timings"]["kv_bytes_shipped"]
    ok("the first frame leaves before the second layer group is computed")

# A request joins and leaves while another runs.
path = "/tmp/td_trace_m.%d" % os.getpid()
with Cluster(prefill=0, decode=0, mixed=1, mixed_extra=["--trace-file", path]) as c:
    started = threading.Event()

    def long():
        for _, e in c.stream("/v1/completions",
                             dict(prompt=STORY["prompt_ids"], max_tokens=400, temperature=0,
                                  ignore_eos=True)):
            started.set()

    t = threading.Thread(target=long)
    t.start()
    started.wait(patience(20))
    c.complete(QS[0]["prompt_ids"], max_tokens=10, temperature=0, ignore_eos=True)
    t.join()
    c.wait_clean()
    steps = [e for e in trace(path) if e["ev"] == "step"]
    os.unlink(path)
    seqs = [s["seqs"] for s in steps]
    joined = [i for i, n in enumerate(seqs) if n == 2]
    assert joined and seqs[0] == 1 and seqs[-1] == 1, seqs
    assert joined == list(range(
        joined[0], joined[-1] + 1)) and len(joined) == 10, joined  # its prompt's step and nine decode steps
    assert steps[joined[0]]["rows"] == len(
        QS[0]["prompt_ids"]) + 1, "its prompt did not share a step with the running decode row"
    assert len(steps) == 400, f"{len(steps)} steps for 400 tokens: the long one was stalled"
    ok("a request joins and leaves the running batch; the other loses no step")

# n samples share one prefill.
with Cluster(prefill=0, decode=0, mixed=1, mixed_extra=["--trace-file", path],
             extra=["--no-prefix-cache"]) as c:
    n, length = 8, len(STORY["prompt_ids"])
    c.complete(STORY["prompt_ids"], max_tokens=1, temperature=1, seed=1, n=n)
    c.wait_clean()
    steps = [e for e in trace(path) if e["ev"] == "step"]
    os.unlink(path)
    assert sum(s["rows"] for s in steps) == length and sum(s["samples"] for s in steps) == n, steps
    ok(f"{n} samples: {length} prompt rows computed once")
done()
