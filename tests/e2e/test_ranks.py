"""Workers of many ranks behind the API: the same tokens as one rank, whatever the shape; a rank that dies or
hangs takes its worker along, not its requests; ranks that do not belong together stop at start.

    python tests/e2e/test_ranks.py [--part same|data|handoff|replicas|served|death|groups|start]
SPDX-License-Identifier: Apache-2.0
"""
import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime

from support.cluster import (BIN, DEMO, Cluster, Error, Gone, open_mpi_under_sanitizers, questions, rank_pids,
                             sanitized, skip)
from support.machine import patience
from support.models import with_tokenizer
from support.report import done, ok
from support.serve import Serve

p = argparse.ArgumentParser()
p.add_argument("--part", action="append")
a = p.parse_args()
parts = a.part or ["same", "data", "handoff", "replicas", "served", "death", "groups", "start"]
if not shutil.which("mpirun"):
    skip("no mpirun (install openmpi-bin)")
open_mpi_under_sanitizers()


# ---- the same tokens ----


def jobs(model):
    """Bodies: greedy and seeded, short and long, with log probabilities."""
    if model == DEMO:
        qs = questions()[::20]
        story = max(questions(), key=lambda q: len(q["prompt_ids"]))
        prompts = [q["prompt_ids"] for q in qs] + [(story["prompt_ids"] + story["answer_ids"][:-1])[:331]]
    else:
        prompts = [[5 + (7 * i + k * k) % 300 for k in range(n)]
                   for i, n in enumerate((1, 3, 17, 40, 97, 131))]
    return [
        dict(prompt=x, max_tokens=24, logprobs=2, **kw) for i, x in enumerate(prompts)
        for kw in (dict(temperature=0), dict(temperature=0.9, top_p=0.95, seed=100 + i))
    ]


def ask(c, body):
    ch = c.complete(**{"ignore_eos": True, **body})["choices"][0]
    lp = ch["logprobs"]
    return ch["token_ids"], ch["text"], ch["finish_reason"], lp["token_logprobs"], lp["top_logprobs"]


def collect(model, together=6, **kw):
    with Cluster(model, **kw) as c:
        with ThreadPoolExecutor(together) as pool:
            got = list(pool.map(lambda b: ask(c, b), jobs(model)))
        c.wait_clean()
        if "--eplb-interval" in kw.get("mixed_extra", ()):
            experts_moved(c)
        return got


def experts_moved(c):
    """What /metrics says of it, once a beat has brought it."""
    c.until("experts moved", 10, lambda: c.metric("tandem_eplb_experts_moved_total") > 0)
    assert c.metric("tandem_eplb_balances_total") > 0 and c.metric("tandem_eplb_bytes_moved_total") > 0
    ratio = {at: float(v) for at, v in re.findall(r'^tandem_eplb_imbalance{.*at="(\w+)"} (\S+)$', c.get("/metrics"), re.M)}
    assert set(ratio) == {"counted", "before", "after"}, ratio
    assert ratio["counted"] >= 1 and 1 <= ratio["after"] <= ratio["before"], ratio


def sizes(tp=1, pp=1, cp=1, dp=1, *flags):
    return [
        "--tensor-parallel-size",
        str(tp), "--pipeline-parallel-size",
        str(pp), "--context-parallel-size",
        str(cp), "--data-parallel-size",
        str(dp), *flags
    ]


def compare(name, model, want, **kw):
    got = collect(model, **kw)
    bad = [i for i in range(len(want)) if got[i] != want[i]]
    first = bad and (jobs(model)[bad[0]], want[bad[0]], got[bad[0]])
    assert not bad, f"{name}: {len(bad)} of {len(want)} differ, first: {first}"
    ok(f"{name}: {len(want)} answers as of one rank")


SAME = {
    "tp2": (2, sizes(2)),
    "pp2": (2, sizes(1, 2)),
    "cp2": (2, sizes(1, 1, 2)),
    "tp2 pp2": (4, sizes(2, 2)),
    "cp2 fully sharded": (2, sizes(1, 1, 2, 1, "--fully-sharded")),
}
MOVING = ["--expert-parallel", "--redundant-experts", "2", "--eplb-interval", "3"]
SAME_MOE = {
    "tp2": (2, sizes(2)),
    "ep: tp2": (2, sizes(2, 1, 1, 1, "--expert-parallel")),
    "ep: cp2": (2, sizes(1, 1, 2, 1, "--expert-parallel")),
    "ep: tp2 pp2, experts move": (4, sizes(2, 2, 1, 1, *MOVING))
}


def one_rank(model):
    return collect(model, prefill=0, decode=0, mixed=1)


DATA = {"dp2": (2, sizes(1, 1, 1, 2)), "dp2 fully sharded": (2, sizes(1, 1, 1, 2, "--fully-sharded"))}
DATA_MOE = {
    "ep: dp2": (2, sizes(1, 1, 1, 2, "--expert-parallel")),
    "ep: dp2, experts move": (2, sizes(1, 1, 1, 2, *MOVING))
}


def mixed(name, model, shapes):
    want = one_rank(model)
    for shape, (n, extra) in shapes.items():
        compare(f"{name} {shape}",
                model,
                want,
                prefill=0,
                decode=0,
                mixed=1,
                mixed_extra=extra,
                ranks={"mixed": n})


def same(dense=SAME, experts=SAME_MOE):
    mixed("demo", DEMO, dense)
    for family in ("mixtral", "qwen3-moe"):
        with with_tokenizer(family) as model:
            mixed(family, model, experts)


def served():
    """`tandem serve` chooses the shapes: 2 ranks tp2; 4 ranks tp4, or as it is told."""
    want = one_rank(DEMO)
    for more in (), ("--decode-parallel", "cp=2,pp=2", "--threads", "4"):
        with Serve("--prefill-ranks", "2", "--decode-ranks", "4", *more, prefill=1, decode=1) as c:
            c.until("both workers", 30, lambda: len(alive_workers(c)) == 2)
            ranks = rank_pids(c.procs["serve"].pid, flat=True)
            assert len(ranks) == 6, ranks
            assert [ask(c, b) for b in jobs(DEMO)] == want
            assert c.metric("tandem_kv_bytes_shipped_total") > 0, "nothing was handed off"
            c.wait_clean()
            c.procs["serve"].terminate()
            assert c.procs["serve"].wait(patience(15)) == 0
            assert rank_pids(c.procs["serve"].pid, flat=True) == []
        ok(f"serve with ranks {more}: {len(want)} answers as of one rank, SIGTERM ends it")


def data():
    same(DATA, DATA_MOE)


def traced(path, event):
    with open(path) as f:
        return sum(f'"{event}"' in line for line in f)


def hand_off_among_replicas(name, model, want, pre, dec, n):
    """Both workers are data parallel: hand-offs between any two replicas, none computed again, none left behind by clients
    that go away. Rank 0 traces only those of its own replica."""
    with tempfile.TemporaryDirectory() as d, Cluster(
            model, prefill_extra=[*pre, "--max-num-seqs", "1", "--page-size", "16", "--trace-file", d + "/prefill"],
            decode_extra=[*dec, "--page-size", "8", "--trace-file", d + "/decode"],
            ranks=n, extra=["--max-prefill-chunk", "64"]) as c:
        with ThreadPoolExecutor(6) as pool:
            got = list(pool.map(lambda b: ask(c, b), jobs(model)))
        assert got == want, f"{name}: differs"
        landed = c.metric("tandem_handoffs_landed_total")
        assert landed >= len(want) and c.metric("tandem_handoffs_recomputed_total") == 0, landed
        for role, event in ("prefill", "handed_off"), ("decode", "landed"):
            own = traced(f"{d}/{role}", event)
            assert 0 < own < landed, f"{name}: {own} of {landed} hand-offs are of {role}'s first replica"
        bodies = jobs(model)

        def leave(b):
            for _ in c.stream("/v1/completions", {**b, "max_tokens": 300, "ignore_eos": True}):
                return

        def leave_at_once(b):
            """While most of them wait for the one sequence that the prefill worker takes."""
            data = json.dumps({"model": c.name, **b}).encode()
            with socket.create_connection(("127.0.0.1", c.port)) as s:
                s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                          % len(data) + data)
                c.until("placed", 10, lambda: c.metric("tandem_placements_pair_total") > landed)

        with ThreadPoolExecutor(6) as pool:
            list(pool.map(leave, bodies))
            list(pool.map(leave_at_once, bodies))
        c.wait_clean()
        assert ask(c, bodies[-1]) == want[-1]
    ok(f"{name}: {len(want)} answers as of one rank, by every replica")


def replicas():
    want = one_rank(DEMO)
    hand_off_among_replicas("dp2 to tp2 dp2", DEMO, want, sizes(1, 1, 1, 2), sizes(2, 1, 1, 2), {"prefill": 2, "decode": 4})
    hand_off_among_replicas("pp2 dp2 to dp2", DEMO, want, sizes(1, 2, 1, 2), sizes(1, 1, 1, 2), {"prefill": 4, "decode": 2})
    with with_tokenizer("mixtral") as model:
        hand_off_among_replicas("mixtral dp2 to ep dp2", model, one_rank(model), sizes(1, 1, 1, 2),
                                sizes(1, 1, 1, 2, "--expert-parallel"), {"prefill": 2, "decode": 2})


def handoff():
    """A prefill group of 2 and a decode group of 4, of other shapes and page sizes."""
    want = one_rank(DEMO)
    for name, pre, dec in (("tp2 to pp4", sizes(2), sizes(1, 4)), ("pp2 to tp4", sizes(1, 2), sizes(4)),
                           ("cp2 to tp2 pp2", sizes(1, 1, 2), sizes(2, 2))):
        compare(f"demo {name}",
                DEMO,
                want,
                prefill_extra=[*pre, "--page-size", "16"],
                decode_extra=[*dec, "--page-size", "8"],
                ranks={
                    "prefill": 2,
                    "decode": 4
                },
                extra=["--max-prefill-chunk", "64"])
    with with_tokenizer("mixtral") as model:
        want = one_rank(model)
        compare("mixtral tp2 to ep4",
                model,
                want,
                prefill_extra=[*sizes(2), "--page-size", "16"],
                decode_extra=[*sizes(2, 2, 1, 1, "--expert-parallel"), "--page-size", "32"],
                ranks={
                    "prefill": 2,
                    "decode": 4
                })


# ---- a rank dies ----

LONGQ = max(questions(), key=lambda q: len(q["answer_ids"]))
SEED = 64023  # of the request that worker/fault.h holds
BODY = dict(prompt=LONGQ["prompt_ids"], max_tokens=200, temperature=0, ignore_eos=True)  # greedy: the seed only marks


class Gate:
    """Workers started inside hold the request while it decodes, once, until its worker is damaged: no case depends on speed."""

    def __init__(self, point="decode-step"):
        self.point = point

    def __enter__(self):
        self.dir = tempfile.mkdtemp(prefix="tdgate", dir="/tmp")
        self.path = os.path.join(self.dir, "gate")
        os.environ["TANDEM_FAULT"] = f"pause:{self.point}:{self.path}"
        return self

    def __exit__(self, *_):
        del os.environ["TANDEM_FAULT"]
        shutil.rmtree(self.dir)

    def held(self, c):
        """The process that holds the request now."""
        return c.until("the request is held", 10, lambda: os.path.exists(self.path) and int(open(self.path).read() or 0))


def stream_ids(c, on_event=None):
    ids = []
    for i, (_, ev) in enumerate(c.stream("/v1/completions", {"return_token_ids": True, "seed": SEED if on_event else 7, **BODY})):
        if "error" in ev:
            raise Error(500, str(ev))
        ids += [x for ch in ev["choices"] for x in ch.get("token_ids") or []]
        if on_event:
            on_event(i)
    return ids


def owner_of(c, pid):
    """The worker that this process is a rank of."""
    return next(w["name"] for w in alive_workers(c) if pid in rank_pids(launcher_of(c, w["name"])).values())


def launcher_of(c, name):
    """The launcher that serve started for a worker; 0: none now."""
    out = subprocess.run(["ps", "-eo", "pid,ppid,args"], capture_output=True, text=True).stdout
    for line in out.splitlines()[1:]:
        pid, ppid, args = line.split(None, 2)
        if int(ppid) == c.procs["serve"].pid and f"--name {name} " in args + " ":
            return int(pid)
    return 0


def new_ranks(c, name, old):
    """Both ranks of a worker, once they are others than the old ones."""
    now = rank_pids(launcher_of(c, name))
    return now if set(now) == {0, 1} and not set(now.values()) & set(old) else None


def alive(pids):
    return [x for x in pids if os.path.exists(f"/proc/{x}")]


NO_WORKER_S = 3  # how long the router keeps a request while there is no worker (no_worker_us)


def seconds_away(c, name):
    """From the worker's loss to its return, as the router logged them."""
    said = re.findall(rf"^(\S+)Z \w router worker {name}(?:: \w+ -> (READY)| (lost) )", c.log("serve"), re.M)
    at = {ready or lost: datetime.fromisoformat(t) for t, ready, lost in said}
    assert len(said) == 3 and said[1][2] and said[2][1], said
    return (at["READY"] - at["lost"]).total_seconds()


def death(sig, rank, n_workers):
    """A rank of the worker that runs the request: gone in 5 s with the other, the text complete, all back."""
    with Gate() as gate, Serve("--mixed", str(n_workers), "--mixed-ranks", "2", "--threads", "2") as c:
        c.until("all workers", 30, lambda: len(alive_workers(c)) == n_workers)
        want = stream_ids(c)
        hit = {}

        def strike(i):
            if i != 1 or hit:
                return
            name = owner_of(c, gate.held(c))
            hit.update(rank_pids(launcher_of(c, name)), name=name)
            os.kill(hit[rank], sig)
            hit["watch"] = Gone([hit[0], hit[1]])

        refusal = None
        try:
            assert stream_ids(c, strike) == want  # on another worker, or on the same when it is back in time
        except Error as e:  # it was the only one, and not back in time
            assert n_workers == 1 and "no worker is left" in str(e), e
            refusal = e
        pids = [hit[0], hit[1]]
        took = hit["watch"].after(5)
        again = c.until("its ranks are back", 20, lambda: new_ranks(c, hit["name"], pids))
        c.until("the worker is back", 30, lambda: len(alive_workers(c)) == n_workers)
        assert new_ranks(c, hit["name"], pids) == again, "started more than once"
        if refusal:
            away = seconds_away(c, hit["name"])
            assert away >= NO_WORKER_S, f"the worker was back after {away:.1f} s, and yet: {refusal}"
        assert stream_ids(c) == want
        c.wait_clean()
        everything = rank_pids(c.procs["serve"].pid, flat=True)
        assert len(everything) == 2 * n_workers, everything
    assert not alive(everything), f"left: {alive(everything)}"
    ok(f"{signal.Signals(sig).name} of rank {rank} of {n_workers} workers: gone after {took:.1f} s")


def alive_workers(c):
    return [w for w in c.ledger()["workers"] if w["state"] == "READY"]


def last_worker():
    """It is not started again: a clear error, and nothing left."""
    with Gate() as gate, Cluster(prefill=0, decode=0, mixed=1, ranks={"mixed": 2}) as c:
        pids = list(c.rank_pids("mixed0").values())
        assert len(pids) == 2, pids
        try:
            stream_ids(c, lambda i: gate.held(c) and os.kill(pids[1], signal.SIGKILL) if i == 1 else None)
            raise AssertionError("a stream without workers ended well")
        except Error as e:
            ok(f"a rank of the last worker killed: {str(e)[:90]}")
        assert c.procs["mixed0"].wait(patience(5)) and not alive(pids), alive(pids)


def group_death(sig, role, point, rank):
    """A rank of a prefill group of 2 or a decode group of 4, while its group holds the request: that group alone is gone in
    5 s, the text is complete, and every page of both groups is back."""
    want = GROUP_WANT[0]
    with Gate(point) as gate, Serve("--prefill-ranks", "2", "--decode-ranks", "4", "--decode-parallel", "tp=2,pp=2",
                                    "--max-prefill-chunk", "64", "--kv-pages", "200", prefill=1, decode=1) as c:
        c.until("both workers", 30, lambda: len(alive_workers(c)) == 2)
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(ask, c, dict(GROUP_BODY, seed=SEED))
            name = owner_of(c, gate.held(c))
            assert name.startswith(role), (name, role)
            other = next(w["name"] for w in alive_workers(c) if w["name"] != name)
            pids, spared = rank_pids(launcher_of(c, name)), rank_pids(launcher_of(c, other))
            assert len(pids) + len(spared) == 6, (pids, spared)
            os.kill(pids[rank], sig)
            watch = Gone(pids.values())
            assert answer.result() == want
        took = watch.after(5)
        c.until("the worker is back", 30, lambda: len(alive_workers(c)) == 2)
        assert rank_pids(launcher_of(c, other)) == spared, "the other group was started again"
        assert ask(c, GROUP_BODY) == want
        c.wait_clean()
        totals = [g["total"] for w in alive_workers(c) for g in w["groups"]]
        assert totals == [200, 200], totals
        everything = rank_pids(c.procs["serve"].pid, flat=True)
        assert len(everything) == 6, everything
    assert not alive(everything), f"left: {alive(everything)}"
    ok(f"{signal.Signals(sig).name} of rank {rank} of the {role} group: gone after {took:.1f} s")


GROUP_BODY = dict(jobs(DEMO)[-2], seed=7)  # a long prompt: several chunks
GROUP_WANT = []


def groups():
    """kill -9 and kill -STOP of each rank in turn."""
    with Cluster(prefill=0, decode=0, mixed=1) as c:
        GROUP_WANT.append(ask(c, GROUP_BODY))
    for role, point, n in ("prefill", "prefill-chunk", 2), ("decode", "decode-step", 4):
        for sig in (signal.SIGKILL, signal.SIGSTOP):
            for rank in range(n):
                group_death(sig, role, point, rank)


def deaths():
    for sig in (signal.SIGKILL, signal.SIGSTOP):
        for rank in (0, 1):
            death(sig, rank, 2)
    death(signal.SIGKILL, 1, 1)
    last_worker()


# ---- ranks that do not belong together ----


def mpirun(*ranks, seconds=10, programs=None):
    """Each rank with its own arguments and, where given, program. (status, output); fails when it takes longer."""
    cmd = [
        "mpirun", "--oversubscribe", "--bind-to", "none",
        *(["--allow-run-as-root"] if os.geteuid() == 0 else [])
    ]
    for i, args in enumerate(ranks):
        cmd += [":"] * (i > 0) + [
            "-n", "1", (programs or {}).get(i, WORKER), "--threads", "1", "--router", "ipc:///nowhere/control",
            "--no-pack-cache", *args
        ]
    start = time.monotonic()
    r = subprocess.run(["timeout", "-k", "1", str(int(patience(60))), *cmd],
                       capture_output=True,
                       text=True,
                       stdin=subprocess.DEVNULL)
    took = time.monotonic() - start
    assert took < patience(seconds) * (4 if sanitized() else 1), f"{took:.1f} s: {ranks}\n{r.stdout}{r.stderr}"
    return r.returncode, r.stdout + r.stderr


WORKER = os.path.join(BIN, "tandem-worker")


def build_of(program):
    return subprocess.run([program, "--version"], capture_output=True, text=True, check=True).stdout.split()[1]


def other_build(path):
    """The same program with another build id."""
    with open(WORKER, "rb") as f:
        data = bytearray(f.read())
    at = data.index(bytes.fromhex(build_of(WORKER).split("-")[1]))
    data[at] ^= 0x40
    with open(path, "wb") as f:
        f.write(data)
    os.chmod(path, 0o755)
    return path


def other_weights(path):
    """The same configuration and names, other contents."""
    shutil.copytree(DEMO, path)
    for name in os.listdir(path):
        if not name.endswith(".safetensors"):
            continue
        with open(os.path.join(path, name), "r+b") as f:
            data = bytearray(f.read())
            head = 8 + int.from_bytes(data[:8], "little")
            data[head::512] = bytes(x ^ 1 for x in data[head::512])
            f.seek(0)
            f.write(data)
    return path


def refused(name, ranks, *words, programs=None):
    rc, out = mpirun(*ranks, programs=programs)
    assert rc not in (0, 124, 137), (name, rc, out[-2000:])
    for w in words:
        assert w in out, (name, w, out[-2000:])
    ok(f"refused at start: {name}")


def starts():
    tp2 = ["--model", DEMO, *sizes(2)]
    with tempfile.TemporaryDirectory() as d:
        other = os.path.join(d, "other")
        shutil.copytree(DEMO, other)
        with open(os.path.join(other, "config.json")) as f:
            text = f.read()
        with open(os.path.join(other, "config.json"), "w") as f:
            f.write(text.replace("10000.0", "20000.0"))
        refused("another model", [tp2, ["--model", other, *sizes(2)]], "rank 1", "model: LlamaForCausalLM, 6 layers, config.json ")
        refused("other weights", [tp2, ["--model", other_weights(os.path.join(d, "weights")), *sizes(2)]], "rank 1", "weights: ")
        copy = other_build(os.path.join(d, "worker"))
        refused("another build", [tp2, tp2], "rank 1", f'"build: {build_of(WORKER)}"', f'"build: {build_of(copy)}"', programs={1: copy})
        refused("another shape", [tp2, ["--model", DEMO, *sizes(1, 2)]], "rank 1", '"tensor-parallel-size: 2"', '"tensor-parallel-size: 1"')
        refused("a rank without sizes", [tp2, ["--model", DEMO]], "rank 1 of 2", "tensor 1")
        refused("ranks without sizes", [["--model", DEMO]] * 2, "of 2 that mpirun started", "tensor 1")
        refused("another option", [tp2, [*tp2, "--no-prefix-cache"]], "rank 1", "prefix-cache: false")
        refused("another time to wait", [tp2, [*tp2, "--rank-timeout-ms", "3000"]], "rank 1", "rank-timeout-ms: 3000", "2500")
        refused("another page size", [tp2, [*tp2, "--page-size", "8"]], "rank 1", "page-size", "8", "16")
        refused("another kernel family", [tp2, [*tp2, "--ops", "ref"]], "rank 1", "ref")
        refused("another number of rows", [tp2, [*tp2, "--max-num-batched-tokens", "64"]], "rank 1", "64",
                "2048")
        refused("another attention split", [tp2, [*tp2, "--attention-split", "64"]], "rank 1", "64", "256")
        refused("more ranks than the sizes say", [tp2] * 3, "3 ranks", "tensor 2")
        refused("fewer ranks than the sizes say", [["--model", DEMO, *sizes(4)]] * 2, "2 ranks", "tensor 4")
        refused("sums that are no binary tree", [["--model", DEMO, *sizes(3)]] * 3, "no power of two")
        refused("more stages than layers", [["--model", DEMO, *sizes(1, 7)]] * 7, "the model has 6 layers")
        refused("experts of a model without",
                [["--model", DEMO, *sizes(2, 1, 1, 1, "--expert-parallel")]] * 2, "has no experts")
        refused("nothing to shard over", [["--model", DEMO, *sizes(2, 1, 1, 1, "--fully-sharded")]] * 2,
                "fully-sharded")
    r = subprocess.run([WORKER, *tp2], capture_output=True, text=True, timeout=patience(20))
    assert r.returncode and "1 ranks were started for tensor 2" in r.stderr, r
    ok("refused at start: two ranks without mpirun")
    for args, words in ((["--decode-ranks", "3", "--decode-parallel",
                          "tp=2"], "3 ranks, but tensor 2"), (["--prefill-parallel",
                                                               "tp=8"], "query heads 4 cannot be divided"),
                        (["--decode-ranks",
                          "1024"], "the model has 6 layers"), (["--decode-parallel",
                                                                "tp=2,x"], "'x' is none of")):
        r = subprocess.run(
            [os.path.join(BIN, "tandem"), "serve", DEMO, "--port", "0", "--grpc-port", "0", *args],
            capture_output=True,
            text=True,
            timeout=patience(20))
        assert r.returncode == 2 and words in r.stderr, (args, r)
    ok("refused at start: impossible shapes of serve")


for part in parts:
    {
        "same": same,
        "handoff": handoff,
        "replicas": replicas,
        "death": deaths,
        "groups": groups,
        "start": starts,
        "data": data,
        "served": served
    }[part]()
done()
sys.exit(0)
