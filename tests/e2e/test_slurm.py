"""deploy/slurm: the batch scripts with a stand-in for srun (support/slurm.py). Which step runs where, with which arguments;
signals, ends, refusals; and a cluster that answers, grows by a job and drains.
SPDX-License-Identifier: Apache-2.0
"""
import os
import shutil
import signal
import subprocess
import sys
import tempfile

from support import slurm
from support.cluster import BIN, BUILD, DEMO, ROOT, Cluster, free_port, open_mpi_under_sanitizers, questions
from support.machine import patience
from support.report import done, ok

NODES = [f"127.0.0.{i}" for i in range(1, 8)]
SCRIPTS = os.path.join(ROOT, "deploy", "slurm")
# Programs that note how they were called, and run until SIGUSR1 or SIGTERM; a file "fail-NAME" makes one end at once.
STUB = """#!/bin/bash
trap 'echo "drained $*" >> {d}/ends; exit 0' USR1 TERM
[ ! -e {d}/fail-"${{0##*/}}" ] || exit "$(cat {d}/fail-"${{0##*/}}")"
echo "$*" >> {d}/calls
while :; do sleep 60 & wait $!; done
"""
open_mpi_under_sanitizers()


class Job(Cluster):
    """A batch script on some nodes, as the batch step of a job."""

    def __init__(self, script, nodes, stubs=True, fails=None, **env):
        self.dir = tempfile.mkdtemp(prefix="tdslurm", dir="/tmp")
        self.procs, self.workers, self.name, self.model = {}, [], "demo", DEMO
        if stubs:
            for name in "tandem", "tandem-router":
                with open(os.path.join(self.dir, name), "w") as f:
                    f.write(STUB.format(d=self.dir))
                os.chmod(f.name, 0o755)
        if fails:
            self.fail(*fails)
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "TANDEM_", "OMPI_"))}
        env = {**clean, "PATH": slurm.install(self.dir) + ":" + os.environ["PATH"], "TANDEM_ROOT": ROOT, "MODEL": DEMO,
               "TANDEM_BIN": self.dir if stubs else BIN, "SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": ",".join(nodes),
               "SLURM_SUBMIT_DIR": self.dir, "SLURM_NNODES": str(len(nodes)), **env}
        with open(os.path.join(self.dir, "job.log"), "ab") as log:
            self.procs["job"] = subprocess.Popen(["bash", os.path.join(SCRIPTS, script)], stdout=log, stderr=log,
                                                 stdin=subprocess.DEVNULL, env=env, cwd=self.dir)

    def fail(self, program, status):
        """It ends at once from now on."""
        with open(os.path.join(self.dir, "fail-" + program), "w") as f:
            f.write(str(status))

    def lines(self, name):
        try:
            with open(os.path.join(self.dir, name)) as f:
                return f.read().splitlines()
        except FileNotFoundError:
            return []

    def started(self, n):
        """Steps, once the programs of all are running: [(node, program, words)]."""
        self.until(f"{n} steps", 30, lambda: len(self.lines("calls")) == len(self.lines("steps")) == n,
                   router=False)
        return [(s["node"], os.path.basename(s["argv"][0]), s["argv"][1:]) for s in slurm.steps(self.dir)]

    def ends(self, seconds=30):
        return self.procs["job"].wait(patience(seconds))

    def signal(self, s):
        self.procs["job"].send_signal(s)

    def close(self):
        """Whatever the case left behind."""
        if self.procs["job"].poll() is None:
            self.procs["job"].kill()
        for s in slurm.steps(self.dir) if self.lines("steps") else []:
            try:
                os.killpg(s["pid"], signal.SIGKILL)
            except ProcessLookupError:
                pass
        shutil.rmtree(self.dir, ignore_errors=True)


def has(words, *pair):
    return any(words[i:i + len(pair)] == list(pair) for i in range(len(words)))


def layout():
    with Job("cluster.sbatch", NODES[:5], PREFILL="1", DECODE="2", NODES_DECODE="2", RANKS_PER_NODE="4", HTTP_PORT="8800",
             GRPC_PORT="8801", OPTIONS="--insecure --page-size 8",
             ROUTER_OPTIONS="--max-queue 9 --tls-cert /c --tls-key /k",
             PREFILL_OPTIONS="--tensor-parallel-size 4",
             DECODE_OPTIONS="--tensor-parallel-size 4 --pipeline-parallel-size 2") as j:
        got = sorted(j.started(4), key=lambda s: (s[1], s[2][-1] if s[1] == "part" else s[2][s[2].index("--name") + 1]))
        router, d0, d1, p0 = got
        assert router[:2] == (NODES[0], "part"), router
        assert router[2][0].endswith("tandem-router") and has(router[2], "--port", "8800") and has(router[2], "--max-queue", "9")
        assert has(router[2], "--grpc-port", "8801") and has(router[2], "--page-size", "8")
        assert j.lines("tandem-77.url") == [f"https://{NODES[0]}:8800"]
        for step, node, name, role, where in (
            (p0, NODES[0], "prefill-0", "prefill", ["--ranks", "4", "--"]),
            (d0, NODES[1], "decode-0", "decode", ["--ranks", "8", "--hosts", f"{NODES[1]}:4,{NODES[2]}:4", "--"]),
            (d1, NODES[3], "decode-1", "decode", ["--ranks", "8", "--hosts", f"{NODES[3]}:4,{NODES[4]}:4", "--"])):
            assert step[:2] == (node, "tandem") and step[2][0] == "launch-worker", step
            assert has(step[2], *where) and has(step[2], "--name", name) and has(step[2], "--role", role), step
            assert has(step[2], "--model", DEMO) and has(step[2], "--router", f"tcp://{NODES[0]}:5570"), step
            assert has(step[2], "--page-size", "8") and ("--pipeline-parallel-size" in step[2]) == (role == "decode"), step
        j.signal(signal.SIGUSR1)
        status = j.ends()
        assert status == 0 and len(j.lines("ends")) == 4, (status, j.lines("ends"))
    ok("cluster: every part on its nodes; SIGUSR1 drains all")


def ends():
    with Job("cluster.sbatch", NODES[:2]) as j:
        steps = j.started(3)
        worker = next(s["pid"] for s in slurm.steps(j.dir) if has(s["argv"], "--name", "prefill-0"))
        os.kill(worker, signal.SIGKILL)
        j.until("the worker's end", 20, lambda: not os.path.exists(f"/proc/{worker}"), router=False)
        assert j.procs["job"].poll() is None, "the job ended with a worker"
        j.signal(signal.SIGTERM)
        assert j.ends() == 0 and len(j.lines("ends")) == len(steps) - 1
    ok("cluster: outlives a worker; SIGTERM drains the rest")
    with Job("cluster.sbatch", NODES[:2]) as j:
        router = next(s for s in j.started(3) if s[1] == "part")
        j.fail("tandem-router", 2)
        part = next(s["pid"] for s in slurm.steps(j.dir) if s["argv"][0].endswith("part"))
        child = subprocess.run(["pgrep", "-P", str(part)], capture_output=True, text=True).stdout.split()[0]
        os.kill(int(child), signal.SIGKILL)  # part starts it again, and now its options are wrong
        assert j.ends() == 2 and len(j.lines("ends")) == 2, (router, j.log("job"))
    ok("cluster: a router that refuses its options ends the job, the workers drain")


def refusals():
    for script, nodes, env, words in (("cluster.sbatch", NODES[:2], {"DECODE": "2"},
                                       "3 nodes are needed (1 x 1 prefill, 2 x 1 decode), the job has 2"),
                                      ("cluster.sbatch", NODES[:2], {"MODEL": ""}, "which model?"),
                                      ("worker.sbatch", NODES[:1], {}, "which router?")):
        with Job(script, nodes, **env) as j:
            assert j.ends() and words in j.log("job"), (words, j.log("job"))
            assert not j.lines("steps") and not j.lines("calls")
    ok("too few nodes, no model, no router: refused, nothing started")


def workers():
    for nodes, env, where in ((NODES[:1], {"RANKS_PER_NODE": "2"}, ["--ranks", "2"]),
                              (NODES[:1], {"SLURM_GPUS_ON_NODE": "8"}, ["--ranks", "8"]),
                              (NODES[:2], {}, ["--ranks", "2", "--hosts", f"{NODES[0]}:1,{NODES[1]}:1"]),
                              (NODES[:2], {"HOSTFILE": "/h"}, ["--ranks", "2", "--hostfile", "/h"]),
                              (NODES[:2], {"HOSTFILE": "/h", "RANKFILE": "/r"}, ["--ranks", "2", "--rankfile", "/r"])):
        with Job("worker.sbatch", nodes, ROUTER="tcp://head:1", ROLE="decode", **env) as j:
            j.until("started", 30, lambda: j.lines("calls"), router=False)
            call = j.lines("calls")[0].split()
            assert call[0] == "launch-worker" and has(call, *where, "--"), call
            assert has(call, "--router", "tcp://head:1") and has(call, "--role", "decode") and has(call, "--name", "decode-77")
            j.signal(signal.SIGUSR1)
            assert j.ends() == 0 and len(j.lines("ends")) == 1
    with Job("worker.sbatch", NODES[:1], fails=("tandem", 2), ROUTER="tcp://head:1") as j:
        assert j.ends() == 2, j.log("job")
    ok("worker: ranks by nodes, GPUs, files; SIGUSR1 drains it; its status is the job's")


def real():
    bodies = [dict(prompt=q["prompt_ids"], max_tokens=40, temperature=0) for q in questions()[::40]]
    want = [q["answer_ids"][:40] for q in questions()[::40]]
    options = f"--insecure --served-model-name demo --threads 1 --cache-dir {BUILD}/test-cache"
    control, port, grpc = str(free_port()), free_port(), str(free_port())

    def same(c):
        got = [c.complete(**b)["choices"][0]["token_ids"] for b in bodies]
        assert got == want, (got, want)

    with Job("cluster.sbatch", NODES[:2], stubs=False, TANDEM_CONTROL_PORT=control, HTTP_PORT=str(port), GRPC_PORT=grpc,
             RANKS_PER_NODE="2", ROUTER_OPTIONS="--served-model-name demo", OPTIONS="--insecure",
             PREFILL_OPTIONS=options + " --tensor-parallel-size 2",
             DECODE_OPTIONS=options + " --pipeline-parallel-size 2 --page-size 8") as c:
        c.port, c.workers = port, ["prefill", "decode"]
        c.wait_ready()
        same(c)
        assert c.metric("tandem_handoffs_landed_total") >= len(want) and c.metric("tandem_handoffs_recomputed_total") == 0
        ok("a real cluster of two nodes: the recorded answers, handed off")
        with Job("worker.sbatch", NODES[2:3], stubs=False, ROUTER=f"tcp://{NODES[0]}:{control}", ROLE="decode",
                 OPTIONS=options) as w:
            c.until("three workers", 30, lambda: sum(x["state"] == "READY" for x in c.ledger()["workers"]) == 3)
            same(c)
            w.signal(signal.SIGUSR1)
            assert w.ends() == 0, w.log("job")
        same(c)
        ok("a worker comes as a job of its own, and goes")
        c.signal(signal.SIGUSR1)
        assert c.ends() == 0, c.log("job")
        left = [s for s in slurm.steps(c.dir) if os.path.exists(f"/proc/{s['pid']}")]
        assert not left, left
    ok("SIGUSR1 drains it")


layout()
ends()
refusals()
workers()
if shutil.which("mpirun"):
    real()
else:
    print("no mpirun: the real cluster is left out (install openmpi-bin)")
done()
sys.exit(0)
