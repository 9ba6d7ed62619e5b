"""A whole cluster as one MPI job (deploy/mpi/cluster with its one-host.conf): router, a prefill worker and a decode worker of 2
ranks each, under one outer mpirun. The same text as of one worker; parts die and come back while the job goes
on; SIGTERM drains.
SPDX-License-Identifier: Apache-2.0
"""
import os
import shutil
import signal
import subprocess
import tempfile
import time

from support.cluster import (BUILD, DEMO, ROOT, Cluster, free_port, open_mpi_under_sanitizers, questions,
                             rank_pids, skip)
from support.machine import patience
from support.report import done, ok

if not shutil.which("mpirun"):
    skip("no mpirun (install openmpi-bin)")
open_mpi_under_sanitizers()
FILES = os.path.join(ROOT, "deploy", "mpi")


def tagged(mark):
    """Processes with this in their environment, with their arguments."""
    found = {}
    for p in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{p}/environ", "rb") as f:
                env = f.read()
            with open(f"/proc/{p}/cmdline", "rb") as f:
                args = f.read().decode(errors="replace").split("\0")
        except OSError:
            continue
        if mark.encode() in env:
            found[int(p)] = args
    return found


class Job(Cluster):
    def __init__(self):
        self.dir = tempfile.mkdtemp(prefix="td", dir="/tmp")
        self.port, self.grpc_port, self.name, self.model = free_port(), free_port(), "demo", DEMO
        self.procs, self.workers = {}, ["prefill", "decode"]
        self.mark = "TANDEM_CONTROL_PORT=" + str(free_port())
        conf = os.path.join(self.dir, "job.conf")
        with open(conf, "w") as f, open(os.path.join(FILES, "one-host.conf")) as shipped:
            f.write("\nall --log-level info\n" + shipped.read())
        name, value = self.mark.split("=")
        env = dict(os.environ, TANDEM_BUILD=BUILD, TANDEM_PORT=str(self.port), TANDEM_GRPC_PORT=str(self.grpc_port),
                   TANDEM_SERVED_MODEL_NAME="demo", TANDEM_THREADS="1", TANDEM_CACHE_DIR=os.path.join(BUILD, "test-cache"))
        log = open(os.path.join(self.dir, "job.log"), "ab")
        self.procs["job"] = subprocess.Popen([os.path.join(FILES, "cluster"), conf, DEMO],
                                             stdout=log,
                                             stderr=log,
                                             stdin=subprocess.DEVNULL,
                                             env={**env, name: value})
        log.close()
        self.wait_ready()

    def part(self, *words):
        """The process whose arguments hold all these words, mpirun and wrappers excepted."""
        return next(
            (p for p, args in tagged(self.mark).items()
             if all(w in args for w in words) and os.path.basename(args[0]) not in ("mpirun", "bash")), None)

    def is_back(self):
        return sorted(w["role"].lower() for w in self.ledger()["workers"]
                      if w["state"] == "READY") == ["decode", "prefill"]


def wrong_files():
    for text, words in (("prefill localhost\n", "the router's line comes first"), ("router h\n",
                                                                                   "at least one worker"),
                        ("router h\nrouter i\n", "more than one router"), ("router h\nprefil i\n",
                                                                           "is none of")):
        with tempfile.NamedTemporaryFile("w", suffix=".conf") as f:
            f.write(text)
            f.flush()
            r = subprocess.run([os.path.join(FILES, "cluster"), f.name, DEMO],
                               capture_output=True,
                               text=True,
                               env=dict(os.environ, TANDEM_BUILD=BUILD),
                               timeout=patience(20))
        assert r.returncode == 2 and words in r.stderr, (text, r)
    ok("wrong files are refused")


def binds():
    """Where the router listens for workers: a name is for the others, so there everywhere."""
    with tempfile.TemporaryDirectory() as d:
        with open(os.path.join(d, "mpirun"), "w") as f:
            f.write('#!/bin/sh\nprintf "%s\\n" "$@"\n')
        os.chmod(f.name, 0o755)
        env = dict(os.environ, TANDEM_BUILD=BUILD, PATH=d + ":" + os.environ["PATH"], TANDEM_CONTROL_PORT="5")
        for host, at in ("localhost", "127.0.0.1"), ("127.0.0.1", "127.0.0.1"), ("10.1.2.3:1", "10.1.2.3"), ("head", "*"), ("a1", "*"):
            with open(os.path.join(d, "job.conf"), "w") as f:
                f.write(f"router {host}\ndecode n1:4,n2:4 --bulk-bind tcp://*:*\n")
            words = subprocess.run([os.path.join(FILES, "cluster"), f.name, DEMO], capture_output=True, text=True, env=env,
                                   timeout=patience(20)).stdout.split("\n")
            assert words[words.index("--router-bind") + 1] == f"tcp://{at}:5", (host, words)
            assert words[words.index("--router") + 1] == f"tcp://{host.split(':')[0]}:5", (host, words)
            assert "tcp://*:*" in words, words  # no name of a file here in its place
    ok("the router listens where its host's name leads")


wrong_files()
binds()
BODY = [
    dict(prompt=q["prompt_ids"], max_tokens=40, temperature=0.7, seed=i)
    for i, q in enumerate(questions()[::40])
]
with Cluster(prefill=0, decode=0, mixed=1) as c:
    want = [c.complete(**b)["choices"][0]["token_ids"] for b in BODY]


def same(c):
    got = [c.complete(**b)["choices"][0]["token_ids"] for b in BODY]
    assert got == want, (got, want)


with Job() as c:
    same(c)
    assert c.metric("tandem_kv_bytes_shipped_total") > 0, "nothing was handed off"
    ok("the same text as of one worker")
    launcher = c.part("launch-worker", "decode")
    ranks = rank_pids(launcher)
    assert set(ranks) == {0, 1}, ranks
    os.kill(ranks[1], signal.SIGKILL)
    c.until("the rank's worker is gone", 5,
            lambda: not any(os.path.exists(f"/proc/{p}") for p in ranks.values()))
    c.until("the worker is back", 30, lambda: set(rank_pids(launcher)) == {0, 1} and c.is_back())
    same(c)
    ok("a rank is killed: its launcher starts the worker again")
    router = c.part("--router-bind")
    os.kill(router, signal.SIGKILL)
    c.until("the router is gone", 10, lambda: not os.path.exists(f"/proc/{router}"))
    c.until("the router is back", 30, c.is_back)
    same(c)
    ok("the router is killed: started again, the workers join it")
    launcher, ranks = c.part("launch-worker", "decode"), rank_pids(c.part("launch-worker", "decode"))
    os.kill(launcher, signal.SIGKILL)
    c.until("its ranks are gone", 5, lambda: not any(os.path.exists(f"/proc/{p}") for p in ranks.values()))
    c.until("the router knows", 10, lambda: not c.is_back())
    same(c)  # on the prefill worker
    assert c.procs["job"].poll() is None
    ok("a launcher is killed: the job goes on with what is left")
    c.procs["job"].terminate()
    status = c.procs["job"].wait(patience(20))
    left = tagged(c.mark)
    assert status == 0 and not left, (status, left, c.log("job")[-3000:])
    ok("SIGTERM drains the job, nothing is left")
done()
