"""What happens when a worker dies, a client leaves, or a frame is damaged: the same text or a clear error,
and every page back.

Each case stops a stream at a chosen state, does the damage, and compares the whole text with an undisturbed
run.
SPDX-License-Identifier: Apache-2.0
"""
import json
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

from support.cluster import Cluster, questions, Error
from support.machine import patience
from support.report import done, ok

QS = sorted(questions(), key=lambda q: -len(q["answer_ids"]))
LONGQ = QS[0]


def stream_ids(c, body, on_event=None):
    ids, finish = [], None
    for i, (_, ev) in enumerate(c.stream("/v1/completions", {"return_token_ids": True, **body})):
        if "error" in ev:
            raise Error(500, json.dumps(ev))
        for ch in ev["choices"]:
            ids += ch.get("token_ids") or []
            finish = ch.get("finish_reason") or finish
        if on_event:
            on_event(i, ev)
    return ids, finish


BODY = dict(prompt=LONGQ["prompt_ids"], max_tokens=100, temperature=0.8, seed=7)
with Cluster(mixed=1, prefill=0, decode=0) as c:
    want = stream_ids(c, BODY)
    ok(f"undisturbed: {len(want[0])} tokens")


def kill_while_decoding(victim_role, **layout):
    with Cluster(**layout) as c:
        victim = next(w for w in c.workers if w.startswith(victim_role))
        done = []

        def hit(i, ev):
            if i == 6 and not done:
                done.append(1)
                c.kill(victim)
        got = stream_ids(c, BODY, hit)
        assert got == want, f"{victim_role} killed while decoding: {got} is not {want}"
        c.wait_clean()
        ok(f"kill -9 {victim_role} while decoding, {layout}")


kill_while_decoding("decode", prefill=1, decode=2)
kill_while_decoding("prefill", prefill=1, decode=1)
kill_while_decoding("decode", prefill=1, decode=1)  # the prefill worker goes on as a mixed one
kill_while_decoding("mixed", prefill=0, decode=0, mixed=2)

# Killed in each state of a request, held there: test_states.py.

# No worker is left: a clear error, not a hang.
with Cluster(prefill=0, decode=0, mixed=1) as c:
    try:
        stream_ids(c, BODY, lambda i, ev: c.kill(c.workers[0]) if i == 4 else None)
        raise AssertionError("a stream without workers ended well")
    except Error as e:
        ok(f"last worker killed: {str(e)[:90]}")

# The client leaves at moments that nothing chose: every page comes back. In each state, and how soon: test_states.py.
with Cluster(extra=["--max-prefill-chunk", "2"]) as c:
    body = json.dumps({"model": c.name, "stream": True, **BODY, "max_tokens": 400,
                       "ignore_eos": True}).encode()
    for wait in (0.0, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2):
        s = socket.create_connection(("127.0.0.1", c.port))
        s.sendall(
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
            b"%d\r\n\r\n"
            % len(body) + body)
        time.sleep(wait)
        s.close()
        c.wait_clean()
        ok(f"client left after {wait} s")

# Hundreds of frames in flight at once (a frame per token): no answer is lost, every page comes back.
with Cluster(extra=["--max-prefill-chunk", "1", "--no-prefix-cache"]) as c:
    prompt = (LONGQ["prompt_ids"] * 40)[:330]
    for _ in range(3):
        with ThreadPoolExecutor(32) as pool:
            texts = list(
                pool.map(lambda i: c.complete(prompt, max_tokens=4, temperature=0)["choices"][0]["token_ids"],
                         range(32)))
        assert all(x == texts[0] for x in texts)
        c.wait_clean()
    ok("32 hand-offs of 330 frames each, at once")

# A stopped worker is a dead one after 3 s.
with Cluster(prefill=1, decode=2) as c:
    state = []

    def stop(i, ev):
        if i == 6 and not state:
            state.append(1)
            for w in c.workers:
                if w.startswith("decode") and any(x["name"] == w and x["seqs_running"]
                                                  for x in c.ledger()["workers"]):
                    c.kill(w, signal.SIGSTOP)
    got = stream_ids(c, BODY, stop)
    assert got == want, (got, want)
    ok("kill -STOP of the decoding worker")
# A router that is asked to stop finishes what runs and says goodbye; the workers go on, for the next one.
with Cluster(prefill=1, decode=1) as c:
    def stop_router(i, ev):
        if i == 3:
            c.procs["router"].terminate()
    assert stream_ids(c, BODY, stop_router) == want
    assert c.procs["router"].wait(patience(20)) == 0
    for w in c.workers:
        c.until(f"goodbye at {w}", 10, lambda: "the router said goodbye" in c.log(w), router=False)
        assert "router lost" not in c.log(w), c.log(w)
    c.start_router()
    c.wait_ready()
    assert stream_ids(c, BODY) == want
    c.wait_clean()
    ok("the router leaves in order, another one comes")
done()
