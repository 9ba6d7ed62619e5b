"""A worker whose kernels run on the emulated device (tests/simt), as a process of a cluster: its tokens are the same twice and
alone, groups of ranks with a device each hand pages to groups of another shape and page size with the text of one rank, a device
that fails ends the worker and its requests go on elsewhere with the same text, and a worker that cannot start
says why in one line.
SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import shutil
import subprocess
import time

from support import cluster
from support.cluster import BIN, BUILD, Cluster, questions, skip
from support.report import done, ok

WORKER = os.path.join(BUILD, "simt", "simt_tandem_worker")
if not os.path.exists(WORKER):
    skip("no worker on the shim in this build")
SMALL = ["--max-model-len", "128", "--max-num-seqs", "2", "--max-num-batched-tokens", "64", "--ops", "cuda", "--deterministic",
         "--no-pack-cache", "--no-prefix-cache"]


class OnShim(Cluster):
    """Its workers are those of the shim; env: of workers started while it is set."""

    env = {}

    def _spawn(self, label, argv):
        if argv[0] == "tandem-worker":
            argv = [WORKER, *argv[1:]]  # os.path.join keeps an absolute path
        elif argv[0] == "tandem":  # the launcher takes the worker beside itself
            there = os.path.join(self.dir, "bin")
            if not os.path.exists(there):
                os.mkdir(there)
                shutil.copy(os.path.join(BIN, "tandem"), there)
                os.symlink(WORKER, os.path.join(there, "tandem-worker"))
            argv = [os.path.join(there, "tandem"), *argv[1:]]
        before = dict(os.environ)
        os.environ.update(self.env)
        try:
            return super()._spawn(label, argv)
        finally:
            os.environ.clear()
            os.environ.update(before)


def start(env, **layout):
    OnShim.env = env
    return OnShim(prefill=0, decode=0, extra=SMALL, **layout)


Q = min(questions(), key=lambda q: len(q["prompt_ids"]))
BODY = dict(prompt=Q["prompt_ids"], max_tokens=6, temperature=0.8, seed=7)


def ids(c):
    r = c.post("/v1/completions", {"model": c.name, "return_token_ids": True, **BODY})
    return r["choices"][0]["token_ids"]


with start({}, mixed=1) as c:
    want = ids(c)
    assert len(want) > 1 and ids(c) == want, "not the same twice"
    c.wait_clean()
    assert "device cuda:0: simt host emulation" in c.log(c.workers[0]) and "deterministic" in c.log(c.workers[0])
    ok(f"the same {len(want)} tokens twice")



# ---- groups of devices: pages of one shape to ranks of another ----


def full(c, body):
    ch = c.complete(ignore_eos=True, logprobs=2, **body)["choices"][0]
    lp = ch["logprobs"]
    return ch["token_ids"], ch["text"], lp["token_logprobs"], lp["top_logprobs"]


def sizes(tp=1, pp=1, cp=1):
    return ["--tensor-parallel-size", str(tp), "--pipeline-parallel-size", str(pp), "--context-parallel-size", str(cp)]


# Shorter than a page, longer than a chunk, several chunks
BODIES = [
    dict(prompt=[5 + (7 * i + k * k) % 300 for k in range(n)], max_tokens=4, temperature=0.9 * (i % 2), seed=100 + i)
    for i, n in enumerate((5, 40, 97))
]


def hand_off(name, pre, dec, **ranks):
    with start({}, mixed=0, ready=False, ranks=ranks) as c:
        c.role_extra = {"prefill": [*pre, "--page-size", "16", "--max-prefill-chunk", "32"], "decode": [*dec, "--page-size", "8"]}
        c.start_worker("prefill")
        c.start_worker("decode")
        c.wait_ready()
        got = [full(c, b) for b in BODIES]
        assert got == alone, f"{name}: {[i for i in range(len(got)) if got[i] != alone[i]]} differ: {got}, one rank: {alone}"
        assert c.metric("tandem_handoffs_landed_total") == len(BODIES), c.metric("tandem_handoffs_landed_total")
        assert c.metric("tandem_handoffs_recomputed_total") == 0
        c.wait_clean()
        for w in c.workers:
            n = ranks.get(w[:-1], 1)
            assert c.log(w).count("device cuda:0: simt host emulation") == n, c.log(w)
            fast, sharded = "--no-deterministic" in pre, "--fully-sharded" in c.role_extra[w[:-1]]
            assert c.log(w).count(", fast\n") == (n if fast and not sharded else 0), c.log(w)
    ok(f"devices, {name}: {len(BODIES)} answers as of one rank, none computed again")


if shutil.which("mpirun"):
    with start({}, mixed=1) as c:
        alone = [full(c, b) for b in BODIES]
    hand_off("one rank to one rank", [], [])
    hand_off("cp2 fully sharded to tp2 dp2 fully sharded", [*sizes(1, 1, 2), "--fully-sharded"],
             [*sizes(2), "--data-parallel-size", "2", "--fully-sharded"], prefill=2, decode=4)
    hand_off("tp2 to pp2", sizes(2), sizes(1, 2), prefill=2, decode=2)
    hand_off("pp2 to tp2", sizes(1, 2), sizes(2), prefill=2, decode=2)
    hand_off("cp2 to tp2 pp2", sizes(1, 1, 2), sizes(2, 2), prefill=2, decode=4)
    # Steps of up to 64 rows: what the fast mode does with more is tests/simt/test_ranks_cuda.c's. One id, whatever the grid.
    fast = "--no-deterministic"
    hand_off("tp2 to pp2, fast", [*sizes(2), fast], [*sizes(1, 2), fast], prefill=2, decode=2)
    hand_off("dp2 to one rank, fast", ["--data-parallel-size", "2", fast], [fast], prefill=2)

    # Devices of two kinds in one worker: both compute what every device can.
    bench = [os.path.join(BUILD, "simt", "simt_tandem"), "bench", "engine", "--ops", "cuda", "--load-format", "dummy", "--shape", "ranks-tiny",
             "-p", "70", "-n", "1", "-B", "1", "-r", "1", "--max-num-seqs", "2", "--max-num-batched-tokens", "80", "--no-pack-cache",
             "--tensor-parallel-size", "2", "--threads", "1", "--json", "-"]
    for archs, numerics in (((80, 90), "cuda-sm80-bf16"), ((90, 90), "cuda-fast-sm90-lt120901-f8-bf16")):
        ranks = [["-n", "1", "env", f"SIMT_ARCH={a}", *bench] for a in archs]
        r = subprocess.run(["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", *ranks[0], ":", *ranks[1]],
                           capture_output=True, text=True, timeout=120)
        rows = [json.loads(line) for line in r.stdout.splitlines() if line.startswith("{")]
        assert r.returncode == 0 and rows and {row["numerics"] for row in rows} == {numerics}, f"{archs}: {r.returncode} {r.stdout} {r.stderr}"
        differ = (r.stdout + r.stderr).count(f"devices of other ranks differ: all compute as {numerics}")
        assert differ == (2 if archs[0] != archs[1] else 0), r.stdout + r.stderr
        ok(f"ranks on devices of sm_{archs[0]} and sm_{archs[1]} compute as {numerics}")

# A launch fails in the middle of the request, and so does all that follows: the worker ends, another one goes on.
with start({"SIMT_FAIL_AFTER": "150"}, mixed=1) as c:
    OnShim.env = {}
    bad, good = c.workers[0], c.start_worker("mixed")
    c.wait_ready()
    deadline = time.monotonic() + 60
    while c.procs[bad].poll() is None and time.monotonic() < deadline:
        got = ids(c)
        assert got == want, f"after a device failed: {got}, not {want}"
    assert c.procs[bad].poll() == 1, f"the worker whose device failed: {c.procs[bad].poll()}"
    assert ids(c) == want and c.log(bad).count("the device failed, this worker ends") == 1, c.log(bad)
    assert "planted" in c.log(bad) and "the device failed" not in c.log(good)
    ok("a device fails: the text goes on elsewhere")

# A worker that cannot start: one error, which says why.
for env, why in (({"SIMT_DEVICES": "0"}, "no CUDA device: no CUDA-capable device is detected"),
                 ({"SIMT_DEVICES": "-1"}, "no CUDA device: the driver is for CUDA 12.2, this build needs one for 13.0"),
                 ({"SIMT_MEMORY": "5"}, "would do")):
    with start(env, mixed=1, ready=False) as c:
        rc = c.procs[c.workers[0]].wait(30)
        log = c.log(c.workers[0])
        errors = [line for line in log.splitlines() if " E " in line]
        assert rc == 1 and len(errors) == 1 and why in errors[0], f"status {rc}: {log}"
        ok(why)
done()
