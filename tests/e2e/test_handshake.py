"""A worker of another model, KV type or numerics id than its peers is refused at the handshake, by the router and
by the worker with both values named, and the cluster goes on; another page size is welcome. Every other fact that
must be equal: tests/wire/test_msg.c. The two ids are those of amx, on emulated tiles (tests/amx), and of the other x86 families.
SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import platform
import tempfile

from support.cluster import DEMO, ROOT, Cluster, questions
from support.machine import patience
from support.report import done, ok

AVX2 = platform.machine() == "x86_64" and " avx2 " in open("/proc/cpuinfo").read()
AMX_WORKER = "../tests/amx_tandem_worker"
Q = questions()[0]


def refused(c, what, model, extra, values, program="tandem-worker"):
    """A decode worker with these options ends with status 3, and says both values."""
    c.model, c.role_extra["decode"] = model, extra
    other = c.start_worker("decode", program)
    assert c.procs[other].wait(patience(20)) == 3, (what, c.procs[other].returncode)
    c.workers.remove(other)
    c.model, c.role_extra["decode"] = DEMO, []
    for text in (c.log(other), c.log("router")):
        assert values in text, (what, text)
    assert len(c.ledger()["workers"]) == 2
    ok(f"{what}: {values}")


with Cluster(prefill=1, decode=1) as c, tempfile.TemporaryDirectory() as d:
    refused(c, "KV type", DEMO, ["--ops", "ref"], "kv dtype: bf16 against f32")
    refused(c, "model", os.path.join(ROOT, "deploy", "demo", "draft"), [], "model: target against draft")
    x86, amx = "cpu-x86-bf16", "cpu-amx-bf16"
    if AVX2 and "kernels amx" in c.log(c.workers[0]):  # a CPU with tiles: the others are the strangers
        refused(c, "numerics", DEMO, ["--numerics", x86], f"numerics: {amx} against {x86}")
    elif AVX2:
        refused(c, "numerics", DEMO, ["--ops", "amx"], f"numerics: {x86} against {amx}", AMX_WORKER)
    twin = os.path.join(d, "target")  # the same name and shape, computed in another way
    os.mkdir(twin)
    for f in os.listdir(DEMO):
        if f != "config.json":
            os.symlink(os.path.join(DEMO, f), os.path.join(twin, f))
    with open(os.path.join(DEMO, "config.json")) as f:
        config = json.load(f)
    with open(os.path.join(twin, "config.json"), "w") as f:
        json.dump({**config, "rms_norm_eps": config["rms_norm_eps"] * 2}, f)
    refused(c, "model of the same name", twin, [], "model digest: ")
    c.role_extra["prefill"] = ["--page-size", "8"]
    c.start_worker("prefill")
    c.wait_ready()
    r = c.chat(Q["messages"], temperature=0)
    assert r["choices"][0]["message"]["content"] == Q["answer"]
    c.wait_clean()
    ok("another page size")
done()
