"""A worker of another model or numerics id than its peers is refused at the handshake with both values named;
another page size is welcome. Two kernel families of x86 have ids that differ: amx, on emulated
tiles (tests/amx), against the others.
SPDX-License-Identifier: Apache-2.0
"""
import os
import platform

from support.cluster import BUILD, ROOT, Cluster, questions
from support.machine import patience

DRAFT = os.path.join(ROOT, "deploy", "demo", "draft")
AVX2 = platform.machine() == "x86_64" and " avx2 " in open("/proc/cpuinfo").read()
AMX_WORKER = os.path.join(BUILD, "tests", "amx_tandem_worker")
Q = questions()[0]
with Cluster(prefill=1, decode=1) as c:
    c.role_extra["decode"] = ["--ops", "ref"]
    other = c.start_worker("decode")
    assert c.procs[other].wait(patience(20)) == 3, c.procs[other].returncode
    text = c.log(other)
    assert "bf16" in text and "f32" in text, text
    c.workers.remove(other)
    c.role_extra["decode"] = []
    if AVX2:  # where this CPU has tiles of its own, the cluster is of amx, and the other family is the stranger
        own = "kernels amx" in c.log(c.workers[0])
        c.role_extra["decode"] = ["--numerics", "cpu-x86-bf16"] if own else ["--ops", "amx"]
        other = c.start_worker("decode", "tandem-worker" if own else AMX_WORKER)
        assert c.procs[other].wait(patience(20)) == 3, c.procs[other].returncode
        text = c.log(other)
        assert "numerics" in text and "cpu-amx-bf16" in text and "cpu-x86-bf16" in text, text
        c.workers.remove(other)
        c.role_extra["decode"] = []
    c.model = DRAFT
    other = c.start_worker("decode")
    assert c.procs[other].wait(patience(20)) == 3, c.procs[other].returncode
    c.workers.remove(other)
    c.model = os.path.join(ROOT, "deploy", "demo", "target")
    c.role_extra["prefill"] = ["--page-size", "8"]
    c.start_worker("prefill")
    c.wait_ready()
    r = c.chat(Q["messages"], temperature=0)
    assert r["choices"][0]["message"]["content"] == Q["answer"]
    c.wait_clean()
print(f"{3 + AVX2} passed, 0 failed")
