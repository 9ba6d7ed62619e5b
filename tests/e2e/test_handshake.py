"""A worker of another model or numerics id than its peers is refused at the handshake with both values named;
another page size is welcome.
SPDX-License-Identifier: Apache-2.0
"""
import os

from support.cluster import ROOT, Cluster, questions
from support.machine import patience

DRAFT = os.path.join(ROOT, "deploy", "demo", "draft")
Q = questions()[0]
with Cluster(prefill=1, decode=1) as c:
    c.role_extra["decode"] = ["--ops", "ref"]
    other = c.start_worker("decode")
    assert c.procs[other].wait(patience(20)) == 3, c.procs[other].returncode
    text = c.log(other)
    assert "bf16" in text and "f32" in text, text
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
print("3 passed, 0 failed")
