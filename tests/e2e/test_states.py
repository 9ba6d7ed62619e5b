"""A worker is killed, or the client leaves, in each state of a request. Every state is held by a barrier
(--fault, worker/fault.h) and read from the router before the damage is done; no case depends on how fast
anything is.

Freed: from the moment a worker hears of the departure (its trace: "cancel") to the moment all its pages are
back ("freed") there is at most one step, and both lie within that step + 100 ms of the departure, or of the
end of the pause on the worker that was held. The clock of the traces is the clock of this test. Only the
milliseconds may be spoiled by a loaded machine, so they get three tries; the steps get one.
SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import socket
import threading
import time

from support.cluster import Cluster, Error, questions
from support.report import done, ok

POINTS = {
    "PREFILLING": ("prefill", "prefill-chunk"), "SHIPPING": ("prefill", "ship-frame"),
    "LANDED": ("decode", "ship-landed"), "DECODING": ("decode", "decode-step")
}
SEED = 64023  # TD_FAULT_SEED
Q = max(questions(), key=lambda q: len(q["answer_ids"]))
BODY = dict(prompt=Q["prompt_ids"], max_tokens=60, temperature=0, seed=SEED, return_token_ids=True)


class Held(Cluster):
    """A cluster in which the marked request stops at `point` on a worker of `role`."""

    def __init__(self, role, point, **kw):
        self.gate = f"/tmp/tdg{os.getpid()}"
        self.unlink()
        extra = ["--fault", f"pause:{point}:{self.gate}"]
        super().__init__(**{f"{role}_extra": extra}, extra=["--max-prefill-chunk", "4", "--drain-s", "1"],
                         **kw)

    def unlink(self):
        for p in (self.gate, self.gate + ".go"):
            if os.path.exists(p):
                os.unlink(p)

    def close(self):
        self.release()
        super().close()
        self.unlink()

    def wait_held(self, state):
        """The label of the held worker, once the router says that its request is in `state`."""
        self.until("the barrier", 30, lambda: os.path.exists(self.gate))
        self.until(state, 20, lambda: self.ledger()["states"][state] == 1)
        pid = int(open(self.gate).read())
        return next(label for label, p in self.procs.items() if p.pid == pid)

    def release(self):
        open(self.gate + ".go", "w").close()
        return time.monotonic() * 1e6


class Client(threading.Thread):
    def __init__(self, c):
        super().__init__()
        self.c, self.ids, self.text, self.finish, self.error = c, [], "", None, None
        self.start()

    def run(self):
        try:
            for _, ev in self.c.stream("/v1/completions", BODY):
                if "error" in ev:
                    raise Error(500, json.dumps(ev))
                for ch in ev["choices"]:
                    self.ids += ch.get("token_ids") or []
                    self.text += ch["text"]
                    self.finish = ch.get("finish_reason") or self.finish
        except Error as e:
            self.error = e

    def result(self):
        self.join(90)
        assert not self.is_alive(), "the answer never ended"
        return self.ids, self.text, self.finish


with Cluster() as c:
    r = Client(c)
    WANT = r.result()
    assert r.error is None and len(WANT[0]) > 20, (r.error, WANT)

for state, (role, point) in POINTS.items():
    for victim in ("prefill", "decode"):
        with Held(role, point) as c:
            r = Client(c)
            c.wait_held(state)
            c.kill(next(w for w in c.workers if w.startswith(victim)))
            c.release()
            got = r.result()
            assert r.error is None and got == WANT, f"{state}, {victim} killed: {r.error} {got} is not {WANT}"
            c.wait_clean()
            ok(f"{state}: kill -9 {victim}: the same text")
    with Held(role, point) as c:
        r = Client(c)
        c.wait_held(state)
        for w in list(c.workers):
            c.kill(w)
        r.result()
        assert r.error is not None and r.error.error, (state, r.error, r.ids)
        assert "worker" in r.error.error["message"], (state, r.error)
        assert r.ids == WANT[0][:len(r.ids)]
        c.until("no live request", 10, lambda: c.ledger()["requests"] == 0)
        ok(f"{state}: kill -9 of both: {r.error.error['message']}")


def leave(state, role, point):
    """The client leaves in `state`; (milliseconds over the limit at worst, text of the figures)."""
    trace = {}
    with Held(role, point, prefill=0, decode=0, ready=False) as c:
        for w in ("prefill", "decode"):
            trace[w] = os.path.join(c.dir, w + ".trace")
            c.role_extra[w] = [*c.role_extra[w], "--trace-file", trace[w]]
            c.start_worker(w)
        c.wait_ready()
        body = json.dumps({"model": c.name, "stream": True, **BODY, "max_tokens": 300,
                           "ignore_eos": True}).encode()
        s = socket.create_connection(("127.0.0.1", c.port))
        s.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                  b"Content-Length: %d\r\n\r\n" % len(body) + body)
        held = c.wait_held(state)
        gone = time.monotonic() * 1e6
        s.close()
        c.until("the router has noticed", 10, lambda: c.ledger()["states"][state] == 0)
        assert c.ledger()["states"]["DRAINING"] == 1
        since = {"prefill": gone, "decode": gone, role: c.release()}
        assert held.startswith(role)
        c.wait_clean()
        over, figures = -1e9, []
        for w, path in trace.items():
            with open(path) as f:
                ev = [json.loads(line) for line in f]
            freed = [i for i, e in enumerate(ev) if e["ev"] == "freed"]
            assert len(freed) == 1 and ev[freed[0]]["used"] == 0, (state, w, ev[-5:])
            steps = [e["t_us"] for e in ev if e["ev"] == "step"]
            step_us = max((b - a for a, b in zip(steps, steps[1:]) if not a <= since[w] <= b), default=0)
            cancel = [i for i, e in enumerate(ev) if e["ev"] == "cancel"]
            if cancel:
                late = sum(e["ev"] == "step" for e in ev[cancel[0]:freed[0]])
                assert late <= 1, (state, w, late, "steps after it heard that the client left",
                                   ev[cancel[0]:freed[0]])
            else:  # its part was over
                assert ev[freed[0]]["t_us"] < gone and w == "prefill", (state, w)
                continue
            ms = (ev[freed[0]]["t_us"] - since[w]) / 1e3
            over = max(over, ms - step_us / 1e3 - 100)
            figures.append(f"{w} {ms:.1f} ms (a step {step_us / 1e3:.1f} ms, {late} after the cancel)")
        assert figures
        return over, ", ".join(figures)


for state, (role, point) in POINTS.items():
    for attempt in range(3):
        over, text = leave(state, role, point)
        if over <= 0:
            break
    assert over <= 0, f"{state}: pages came back {over:.1f} ms too late, three times: {text}"
    ok(f"{state}: the client left; pages back: {text}")
done()
