"""Between machines: an endpoint that leaves this one needs a key or --insecure, by name; `tandem keys` makes it; with it a cluster
serves over encrypted tcp, control and pages, and who has another key or none stays outside.
SPDX-License-Identifier: Apache-2.0
"""
import os
import re
import stat
import subprocess
import tempfile

from support.cluster import BIN, DEMO, Cluster, free_port, questions
from support.machine import patience
from support.report import done, ok

Q = questions()[0]
PORTS = ["--port", "0", "--grpc-port", "0"]


def run(program, *argv):
    return subprocess.run([os.path.join(BIN, program), *argv], capture_output=True, text=True, timeout=patience(60))


with tempfile.TemporaryDirectory() as d:
    key, other = os.path.join(d, "cluster.key"), os.path.join(d, "other.key")
    for path in key, other:
        r = run("tandem", "keys", path)
        assert (r.returncode, r.stdout, r.stderr) == (0, "", ""), r
        assert stat.S_IMODE(os.stat(path).st_mode) == 0o600 and re.fullmatch(r"[!-~]{40}\n", open(path).read())
    assert open(key).read() != open(other).read()
    was = open(key).read()
    r = run("tandem", "keys", key)
    assert r.returncode == 1 and "File exists" in r.stderr and open(key).read() == was, r
    assert run("tandem", "keys").returncode == 2
    ok("tandem keys: a key of one's own, never over another")

    away = f"tcp://0.0.0.0:{free_port()}"
    for program, argv, option in (("tandem-router", ["--model", DEMO, *PORTS, "--router-bind", away], "router-bind"),
                                  ("tandem-worker", ["--model", DEMO, "--router", "tcp://10.255.0.1:5"], "router"),
                                  ("tandem-worker", ["--model", DEMO, "--role", "decode", "--bulk-bind", "tcp://0.0.0.0:*"], "bulk-bind")):
        r = run(program, *argv)
        where = argv[-1]
        line = f"--{option} {where} leaves this machine: give --curve-secret-file (`tandem keys FILE` makes one), or --insecure"
        assert r.returncode in (1, 2) and r.stderr.count(line) == 1, r
    p = subprocess.Popen([os.path.join(BIN, "tandem-router"), "--model", DEMO, *PORTS, "--router-bind", away, "--insecure"],
                         stderr=subprocess.PIPE, text=True)
    line = p.stderr.readline()
    p.terminate()
    assert "listening on" in line and p.wait(patience(30)) == 0, line
    ok("off this machine: a key, or --insecure by name")

    mine = ["--curve-secret-file", key]
    with Cluster(tcp=True, extra=mine, router_extra=mine) as c:
        r = c.chat(Q["messages"], temperature=0)
        assert r["choices"][0]["message"]["content"] == Q["answer"] and r["timings"]["kv_bytes_shipped"] > 0, r
        for options in ["--curve-secret-file", other], []:
            c.extra = options
            stranger = c.start_worker("decode")
            c.workers.remove(stranger)
            c.until("it has tried", 30, lambda: re.search("no router answers at .* are the keys of one pair", c.log(stranger)))
            assert c.chat(Q["messages"], temperature=0)["choices"][0]["message"]["content"] == Q["answer"]
            assert len(c.ledger()["workers"]) == 2 and stranger not in c.log("router"), c.log("router")
        c.wait_clean()
        ok("with the key: pages over encrypted tcp; with another, or none: outside")
done()
