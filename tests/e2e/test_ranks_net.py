"""Ranks on hosts of their own: network namespaces joined by a bridge, MPI over TCP, ZeroMQ tcp between
addresses. The same tokens as of one rank; a rank elsewhere dies, stops, or its link goes down: the worker
ends, requests go on.
SPDX-License-Identifier: Apache-2.0
"""
import os
import shutil
import signal
import subprocess
import tempfile
import time

from support.cluster import (BIN, DEMO, Cluster, Gone, free_port, open_mpi_under_sanitizers, questions,
                             rank_pids, skip)
from support.machine import patience
from support.models import with_tokenizer
from support.netns import Hosts, missing
from support.report import done, ok

why = "no mpirun (install openmpi-bin)" if not shutil.which("mpirun") else missing()
if why:
    skip(why)
open_mpi_under_sanitizers()


def mpi_args(hosts, network):
    return (f"--mca plm_rsh_agent {hosts.agent} --mca btl tcp,self --mca btl_tcp_if_include {network}"
            f" --mca oob_tcp_if_include {hosts.subnet} --mca osc ^sm")


def unreachable(name, hosts, network, words):
    """Ranks that cannot reach each other: an error within 10 s of MPI's start, not a hang."""
    argv = [os.path.join(BIN, "tandem"), "launch-worker", "--no-restart", "--hosts"]
    argv += [",".join(hosts.address(i) + ":1" for i in (1, 2)), "--mpi-args", mpi_args(hosts, network), "--"]
    argv += [
        "--model", DEMO, "--tensor-parallel-size", "2", "--threads", "1", "--router", "tcp://127.0.0.1:1"
    ]
    began = time.monotonic()
    with tempfile.TemporaryFile("w+") as log:
        p = subprocess.Popen(hosts.inside(1, argv), stdout=log, stderr=log)
        try:
            status = p.wait(patience(30))
        except subprocess.TimeoutExpired:
            p.kill()
            raise
        took = time.monotonic() - began
        log.seek(0)
        text = log.read()
    assert status and took < patience(15) and words in text, (name, status, took, text)
    ok(f"{name}: an error after {took:.1f} s")


class Net(Cluster):
    """A router on the outside, each worker on the hosts of its role."""
    def __init__(self, hosts, places, extra, model=DEMO):
        self.hosts, self.places, self.options = hosts, places, extra
        self.port_of_control = free_port()
        super().__init__(model, ready=False, tcp=True, prefill=0, decode=0, router_extra=["--insecure"])
        for role in places:
            self.start_worker(role)
        self.ready_or_closed()

    def start_router(self):
        self.control = f"tcp://{self.hosts.outside}:{self.port_of_control}"
        super().start_router()

    def start_worker(self, role):
        h, on = self.hosts, self.places[role]
        label = f"{role}{self.n_started}"
        self.n_started += 1
        argv = [os.path.join(BIN, "tandem"), "launch-worker"]
        argv += [
            "--hosts", ",".join(h.address(i) + ":1" for i in on), "--mpi-args",
            mpi_args(h, h.subnet), "--"
        ]
        argv += [
            "--model", self.model, "--role", role, "--name", label, "--router", self.control, "--bulk-bind",
            "tcp://*:*", "--insecure"
        ]
        argv += ["--threads", "1", "--no-pack-cache", *self.options[role]]
        self._spawn(label, h.inside(on[0], argv))
        self.workers.append(label)

    def ready_roles(self):
        return sorted(w["role"].lower() for w in self.ledger()["workers"] if w["state"] == "READY")


BODY = [
    dict(prompt=q["prompt_ids"], max_tokens=30, temperature=0.7 * (i % 2), seed=i)
    for i, q in enumerate(questions()[::25])
]
LONGQ = max(questions(), key=lambda q: len(q["answer_ids"]))
LONG = dict(prompt=LONGQ["prompt_ids"],
            max_tokens=80,
            temperature=0.8,
            seed=7,
            ignore_eos=True,
            return_token_ids=True)


MOE = [
    dict(prompt=[5 + (7 * i + k * k) % 300 for k in range(n)],
         max_tokens=20, temperature=0.7 * (i % 2), seed=i, ignore_eos=True) for i, n in enumerate((1, 17, 40, 131))
]


def answers(c, bodies=BODY):
    return [c.complete(**b)["choices"][0]["token_ids"] for b in bodies]


def everywhere(c, hosts, want, bodies, what):
    """The same tokens as of one rank, and every host had a part in them."""
    before = [hosts.received(i) for i in range(1, hosts.n + 1)]
    assert answers(c, bodies) == want
    moved = [hosts.received(i) - before[i - 1] for i in range(1, hosts.n + 1)]
    assert min(moved) > 20000, moved
    assert c.metric("tandem_kv_bytes_shipped_total") > 0, "nothing was handed off"
    c.wait_clean()
    ok(f"{what} on two hosts, decode on four others: as of one rank; bytes in {moved}")


def stream(c, strike=None):
    ids = []
    for i, (_, ev) in enumerate(c.stream("/v1/completions", LONG)):
        assert "error" not in ev, ev
        ids += [x for ch in ev["choices"] for x in ch.get("token_ids") or []]
        if i == 8 and strike:
            strike()
    return ids


with Cluster(prefill=0, decode=0, mixed=1) as c:
    want, want_long = answers(c), stream(c)

with Hosts(6) as hosts, with_tokenizer("mixtral") as moe:
    places = {"prefill": (1, 2), "decode": (3, 4, 5, 6)}
    four = ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "2", "--page-size", "8"]
    with Cluster(moe, prefill=0, decode=0, mixed=1) as c:
        want_moe = answers(c, MOE)
    with Net(hosts, places, {"prefill": ["--context-parallel-size", "2"], "decode": [*four, "--expert-parallel"]}, moe) as c:
        everywhere(c, hosts, want_moe, MOE, "mixtral: prefill")
    with Net(hosts, places, {"prefill": ["--tensor-parallel-size", "2"], "decode": four}) as c:
        everywhere(c, hosts, want, BODY, "prefill")
        assert stream(c) == want_long
        label = next(w for w in c.workers if w.startswith("decode"))

        def hurt(name, limit, strike, mend=None):
            ranks = rank_pids(c.procs[label].pid)
            assert set(ranks) == {0, 1, 2, 3}, ranks
            watch = []

            def now():
                strike(ranks)
                watch.append(Gone(ranks.values()))

            got = stream(c, now)
            took = watch[0].after(limit)
            assert got == want_long, (got, want_long)
            if mend:
                mend()
            c.until("the worker is back", 40, lambda: c.ready_roles() == ["decode", "prefill"])
            assert stream(c) == want_long
            c.wait_clean()
            ok(f"{name}: ranks gone after {took:.1f} s, the stream complete, the worker back")

        for i in range(4):
            hurt(f"kill -9 of rank {i}, on a host of its own", 5, lambda r: os.kill(r[i], signal.SIGKILL))
            hurt(f"kill -STOP of rank {i}, on a host of its own", 5, lambda r: os.kill(r[i], signal.SIGSTOP))
        hurt("the link of a rank goes down", 10, lambda r: hosts.link(6, False), lambda: hosts.link(6, True))
    unreachable("no network for messages", hosts, "127.0.0.0/8", "has not reached the other ranks within 8 s")
    hosts.link(2, False)
    unreachable("a host that is not there", hosts, hosts.subnet, "unable to complete a TCP connection")
done()
