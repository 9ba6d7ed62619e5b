"""A worker whose kernels run on the emulated device (tests/simt), as a process of a cluster: its tokens are the same twice and
alone, a device that fails ends the worker and its requests go on elsewhere with the same text, and a worker that cannot start
says why in one line.
SPDX-License-Identifier: Apache-2.0
"""
import os
import time

from support import cluster
from support.cluster import BUILD, Cluster, questions, skip
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

# A launch fails in the middle of the request, and so does all that follows: the worker ends, another one goes on.
with start({"SIMT_FAIL_AFTER": "150"}, mixed=1) as c:
    OnShim.env = {}
    bad, good = c.workers[0], c.start_worker("mixed")
    c.wait_ready()
    deadline = time.monotonic() + 60
    while c.procs[bad].poll() is None and time.monotonic() < deadline:
        assert ids(c) == want, "after a device failed"
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
