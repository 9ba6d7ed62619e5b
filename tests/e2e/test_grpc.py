"""grpcio, unchanged, against the router: Generate, Complete, Tokenize, ListModels, health; deadlines, cancel,
errors.
SPDX-License-Identifier: Apache-2.0
"""
import os
import sys
import tempfile
import time

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


def fails(code, f):
    try:
        f()
    except grpc.RpcError as e:
        assert e.code() == code, (e.code(), e.details())
        return e.details()
    raise AssertionError(f"no error, expected {code}")


QS = questions()
Q = next(q for q in QS if q["task"] == "add" and q["right"])
with Cluster() as c:
    channel = grpc.insecure_channel(f"127.0.0.1:{c.grpc_port}")
    stub = rpc.InferenceStub(channel)
    assert [m.id for m in stub.ListModels(pb.ListModelsRequest()).models] == ["demo"]
    ids = list(
        stub.Tokenize(
            pb.TokenizeRequest(model="demo",
                               chat=pb.ChatInput(messages=[pb.ChatMessage(**m) for m in Q["messages"]]))).ids)
    assert ids == Q["prompt_ids"], ids
    ok("ListModels, Tokenize")

    req = pb.GenerateRequest(model="demo", tokens=pb.TokenIds(ids=Q["prompt_ids"]),
                             sampling=pb.SamplingParams(temperature=0, max_tokens=100), logprobs=2)
    got, text, last, off = [], "", None, 0
    for ev in stub.Generate(req):
        assert ev.token_offset == off or not ev.token_ids
        off += len(ev.token_ids)
        got += ev.token_ids
        text += ev.text
        last = ev
    assert got == Q["answer_ids"] and text == Q["answer"] and last.finish_reason == pb.FINISH_STOP
    assert last.usage.completion_tokens == len(got) and last.timings.ttft_ms > 0
    ok("Generate")

    r = stub.Complete(
        pb.GenerateRequest(model="demo",
                           chat=pb.ChatInput(messages=[pb.ChatMessage(**m) for m in Q["messages"]]),
                           sampling=pb.SamplingParams(temperature=0, max_tokens=100, n=2)))
    assert len(r.choices) == 2 and all(
        list(ch.token_ids) == Q["answer_ids"] and ch.text == Q["answer"] for ch in r.choices)
    ok("Complete, n = 2")

    long = pb.GenerateRequest(model="demo", text="Tell me",
                              sampling=pb.SamplingParams(max_tokens=1500, ignore_eos=True))
    call = stub.Generate(long)
    for i, ev in enumerate(call):
        if i == 2:
            call.cancel()
            break
    c.wait_clean()
    ok("cancel")
    t = time.monotonic()
    fails(grpc.StatusCode.DEADLINE_EXCEEDED, lambda: list(stub.Generate(long, timeout=0.15)))
    assert time.monotonic() - t < patience(5)
    c.wait_clean()
    ok("deadline")

    fails(grpc.StatusCode.NOT_FOUND, lambda: stub.Complete(pb.GenerateRequest(model="other", text="x")))
    fails(grpc.StatusCode.INVALID_ARGUMENT, lambda: stub.Complete(pb.GenerateRequest(text="x")))
    fails(grpc.StatusCode.INVALID_ARGUMENT, lambda: stub.Complete(pb.GenerateRequest(model="demo")))
    fails(grpc.StatusCode.INVALID_ARGUMENT,
          lambda: stub.Complete(pb.GenerateRequest(model="demo", tokens=pb.TokenIds(ids=[99999]))))
    fails(
        grpc.StatusCode.INVALID_ARGUMENT, lambda: stub.Complete(
            pb.GenerateRequest(model="demo", text="x", sampling=pb.SamplingParams(n=10**6))))
    fails(
        grpc.StatusCode.INVALID_ARGUMENT, lambda: stub.Complete(
            pb.GenerateRequest(model="demo", text="x", sampling=pb.SamplingParams(temperature=float("nan")))))
    raw = channel.unary_unary("/tandem.v1.Inference/Complete", request_serializer=lambda b: b,
                              response_deserializer=lambda b: b)
    fails(grpc.StatusCode.INVALID_ARGUMENT, lambda: raw(b"\xff\xff\xff\xff"))
    # each says what was given and what is allowed
    chat = pb.ChatInput(messages=[pb.ChatMessage(role="user", content="x")], messages_json="[]")
    for request, why in (
        (dict(sampling=pb.SamplingParams(max_tokens=4000000000)), "max_tokens is 4000000000; it must be at least 1 and at most 2147483647"),
        (dict(sampling=pb.SamplingParams(max_tokens=3, min_tokens=5)), "min_tokens is 5; it must be at least 0 and at most 3"),
        (dict(sampling=pb.SamplingParams(stop=["x"] * 40)), "stop has 40 entries; at most 16 are allowed"),
        (dict(sampling=pb.SamplingParams(stop=[""])), "stop: a string must have 1 to 256 bytes"),
        (dict(sampling=pb.SamplingParams(stop_token_ids=[99999])), "stop_token_ids: token id 99999 is outside the vocabulary of 941"),
        (dict(sampling=pb.SamplingParams(logit_bias=[pb.LogitBias(id=99999)])), "logit_bias: token id 99999 is outside the vocabulary of 941"),
        (dict(text=None, chat=chat), "messages: messages or messages_json, not both")):
        said = fails(grpc.StatusCode.INVALID_ARGUMENT, lambda: stub.Complete(pb.GenerateRequest(**{"model": "demo", "text": "x", **request})))
        assert said == why, (said, why)
    fails(
        grpc.StatusCode.UNIMPLEMENTED, lambda: channel.unary_unary(
            "/tandem.v1.Inference/Nothing", request_serializer=lambda b: b, response_deserializer=lambda b: b)
        (b""))
    ok("errors as statuses")
    h = health_pb2_grpc.HealthStub(channel)
    assert h.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING
    assert h.Check(health_pb2.HealthCheckRequest(
        service="tandem.v1.Inference")).status == health_pb2.HealthCheckResponse.SERVING
    fails(grpc.StatusCode.NOT_FOUND, lambda: h.Check(health_pb2.HealthCheckRequest(service="nothing")))
    w = h.Watch(health_pb2.HealthCheckRequest())
    assert next(iter(w)).status == health_pb2.HealthCheckResponse.SERVING
    w.cancel()
    ok("grpc.health.v1")
    c.wait_clean()
    channel.close()
done()
