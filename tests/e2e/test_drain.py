"""SIGTERM to the router, as a load balancer and its clients see it: the ports stay open while a stream runs; readiness and
gRPC health say no, liveness yes; what is new is refused in the protocol's shape with a time to come back, on new and on
kept connections; the stream ends as it would. What outlives --drain-s gets an error in its stream. --drain-listen-s
keeps the ports of an idle router open. Streams are held by a barrier (--fault, worker/fault.h).
SPDX-License-Identifier: Apache-2.0
"""
import http.client
import json
import os
import signal
import socket
import sys
import tempfile

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_tools import protoc

from support.cluster import ROOT, Cluster, questions
from support.machine import patience
from support.report import done, ok

tmp = tempfile.mkdtemp()
assert protoc.main(
    ["", f"-I{ROOT}/proto", f"--python_out={tmp}", f"--grpc_python_out={tmp}", "inference.proto"]) == 0
sys.path.insert(0, tmp)
import inference_pb2 as pb  # noqa: E402
import inference_pb2_grpc as rpc  # noqa: E402

SEED = 64023  # TD_FAULT_SEED
Q = max(questions(), key=lambda q: len(q["answer_ids"]))
BODY = dict(prompt=Q["prompt_ids"], max_tokens=60, temperature=0, seed=SEED, return_token_ids=True)
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


class Held(Cluster):
    """A cluster in which the marked request stops at a decode step; the router with these options."""

    def __init__(self, *router):
        self.gate = os.path.join(tmp, "gate")
        for p in (self.gate, self.gate + ".go"):
            if os.path.exists(p):
                os.unlink(p)
        super().__init__(decode_extra=["--fault", f"pause:decode-step:{self.gate}"], router_extra=router)
        self.kept = http.client.HTTPConnection("127.0.0.1", self.port, timeout=patience(20))
        self.ask(self.kept, "GET", "/version")
        self.waiting = socket.create_connection(("127.0.0.1", self.port), patience(20))  # says nothing yet
        self.channel = grpc.insecure_channel(f"127.0.0.1:{self.grpc_port}")
        self.watch = health_pb2_grpc.HealthStub(self.channel).Watch(health_pb2.HealthCheckRequest())
        assert next(self.watch).status == health_pb2.HealthCheckResponse.SERVING

    def hold(self):
        """A stream that has begun and stands still."""
        self.events = self.stream("/v1/completions", BODY)
        self.seen = [next(self.events)[1]]
        self.until("the barrier", 30, lambda: os.path.exists(self.gate))

    def go(self):
        open(self.gate + ".go", "w").close()

    def term(self):
        self.procs["router"].send_signal(signal.SIGTERM)
        self.until("not ready", 20, lambda: self.ask(None, "GET", "/readyz")[0] == 503)

    def ask(self, connection, method, path, body=None):
        """(status, headers, JSON) over a connection, or a new one."""
        c = connection or http.client.HTTPConnection("127.0.0.1", self.port, timeout=patience(20))
        c.request(method, path, json.dumps(body) if body else None, {"Content-Type": "application/json"})
        r = c.getresponse()
        text = r.read()
        return r.status, {k.lower(): v for k, v in r.getheaders()}, json.loads(text) if text[:1] == b"{" else text

    def over(self, status=0):
        assert self.procs["router"].wait(patience(30)) == status
        try:
            socket.create_connection(("127.0.0.1", self.port), 5).close()
        except ConnectionRefusedError:
            return
        raise AssertionError("the port is still open")


def refused(status, headers, body):
    assert status == 503 and int(headers["retry-after"]) >= 1 and headers["connection"] == "close", (status, headers)
    assert headers["content-type"] == "application/json" and set(body) == {"error"}, (headers, body)
    e = body["error"]
    assert set(e) == {"message", "type", "param", "code"} and e["message"] == "the server is shutting down", e
    assert (e["type"], e["code"], e["param"]) == ("unavailable_error", "draining", None), e


NEW = {"model": "demo", "prompt": Q["prompt_ids"], "max_tokens": 2}
with Held() as c:
    want = c.complete(**{**BODY, "seed": 1})["choices"][0]["token_ids"]
    c.hold()
    c.term()
    assert c.ask(None, "GET", "/readyz")[2] == {"status": "draining"} and c.ask(None, "GET", "/health")[0] == 503
    assert c.ask(None, "GET", "/livez")[0] == 200
    assert "tandem_ready " in c.get("/metrics") and c.metric("tandem_ready") == 0
    ok("ready 503, live 200, metrics go on")
    refused(*c.ask(None, "POST", "/v1/completions", NEW))
    refused(*c.ask(None, "POST", "/v1/chat/completions", {"model": "demo", "messages": Q["messages"], "stream": True}))
    refused(*c.ask(c.kept, "POST", "/v1/completions", NEW))  # as a pool of connections would
    c.kept.close()
    c.waiting.sendall(b"GET /livez HTTP/1.1\r\nHost: a\r\n\r\n")
    assert c.waiting.recv(12) == b"HTTP/1.1 200"
    ok("new requests: 503, Retry-After, OpenAI's shape, on new and kept connections")
    for channel in (c.channel, grpc.insecure_channel(f"127.0.0.1:{c.grpc_port}")):
        try:
            list(rpc.InferenceStub(channel).Generate(pb.GenerateRequest(model="demo", tokens=pb.TokenIds(ids=[1]))))
            raise AssertionError("no error")
        except grpc.RpcError as e:
            assert (e.code(), e.details()) == (grpc.StatusCode.UNAVAILABLE, "the server is shutting down"), e
    assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == NOT_SERVING
    try:
        told = [r.status for r in c.watch]
        raise AssertionError(f"the watch goes on: {told}")
    except grpc.RpcError as e:
        assert e.code() == grpc.StatusCode.UNAVAILABLE, e
    ok("gRPC: UNAVAILABLE, health NOT_SERVING")
    c.go()
    c.seen += [ev for _, ev in c.events]
    got = [t for ev in c.seen for ch in ev["choices"] for t in ch.get("token_ids") or []]
    assert got == want and c.seen[-1]["choices"][0]["finish_reason"] == "stop", (got, want)
    c.over()
    ok("the stream ends as it would; then the port closes, status 0")

with Held("--drain-s", "1", "--drain-listen-s", "600") as c:
    c.hold()
    c.procs["router"].send_signal(signal.SIGTERM)
    last = [ev for _, ev in c.events][-1]
    refused(503, {"retry-after": "1", "connection": "close", "content-type": "application/json"}, last)
    c.over()
    c.go()
    ok("--drain-s: an error in the stream that outlives it, status 0")

with Held("--drain-s", "600", "--drain-listen-s", "600") as c:
    c.term()
    refused(*c.ask(None, "POST", "/v1/completions", NEW))
    c.procs["router"].send_signal(signal.SIGTERM)
    c.over()
    ok("--drain-listen-s: an idle router goes on refusing politely; the second signal ends it")

with Held() as c:
    c.procs["router"].send_signal(signal.SIGTERM)
    c.over()
    ok("an idle router ends at once")
done()
