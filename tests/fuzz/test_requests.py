"""Mutated requests over the wire, HTTP and gRPC, from a seed: each gets an answer or an error in the
protocol's own shape; afterwards the server serves as before and every page is back. `test_requests.py SEED
COUNT` replays or goes on for longer; run it on an address build too.
SPDX-License-Identifier: Apache-2.0
"""
import copy
import http.client
import json
import os
import random
import sys
import tempfile

import grpc
from grpc_tools import protoc

from support.cluster import ROOT, Cluster, questions

tmp = tempfile.mkdtemp()
assert protoc.main(["", f"-I{ROOT}/proto", f"--python_out={tmp}", "inference.proto"]) == 0
sys.path.insert(0, tmp)
import inference_pb2 as pb  # noqa: E402

SEED = int(sys.argv[1]) if len(sys.argv) > 1 else 1
COUNT = int(sys.argv[2]) if len(sys.argv) > 2 else 700
R = random.Random(SEED)
Q = questions()[0]

MESSAGES = [{"role": "system", "content": "short"}, {"role": "user", "content": "2+2 \u00e9\U0001f600"}]
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
CHAT = dict(model="demo", messages=MESSAGES, temperature=0.5, top_p=0.9, top_k=3, n=2, seed=1, max_tokens=3,
            logprobs=True, top_logprobs=2, stop=["zz", "\u00e9"], logit_bias={"5": -1}, stream=False,
            tools=TOOLS, stream_options=None)
TEXT = dict(model="demo", prompt=["2+2=", "a"], temperature=0.5, min_p=0.1, seed=2, max_tokens=2, logprobs=1,
            echo=True, stop="q", user="u", n=1, presence_penalty=0.5, frequency_penalty=0.5,
            repetition_penalty=1.1, min_tokens=1, stop_token_ids=[5])
IDS = dict(model="demo", prompt=[[1, 2, 3]], max_tokens=2, return_token_ids=True, prompt_logprobs=1,
           cache_salt="s")
TOKENIZE = dict(model="demo", messages=CHAT["messages"], add_generation_prompt=True)
DETOKENIZE = dict(model="demo", tokens=[1, 2, 3])
HTTP = [("/v1/chat/completions", CHAT), ("/v1/completions", TEXT), ("/v1/completions", IDS),
        ("/tokenize", TOKENIZE), ("/detokenize", DETOKENIZE)]
VALUES = [
    None, True, False, 0, 1, -1, 3, 129, 2**31, 2**32, 2**63,
    -2**63, 2**64, 0.5, -0.5, 1e300, 1e-300, "", "x", "1", "\0", "\ud800", "\U0001f600" * 9, [], {}, [None],
    [[]], [""], [0.5], [-1], [[1], "a"], {"": ""}, {"a": [{}]}, {"1": 1000}, [{"role": "user"}],
    [{"role": "user", "content": 5}], "a" * 5000, [1] * 300,
    list(range(300))
]


def nodes(v, path=()):
    """Every place in the tree."""
    yield path
    for k, x in v.items() if isinstance(v, dict) else enumerate(v) if isinstance(v, list) else ():
        yield from nodes(x, (*path, k))


def mutate_tree(v):
    v = copy.deepcopy(v)
    for _ in range(R.randint(1, 3)):
        path = R.choice([p for p in nodes(v) if p] or [()])
        if not path:
            break
        at = v
        for k in path[:-1]:
            at = at[k]
        what = R.random()
        if what < 0.7:
            at[path[-1]] = copy.deepcopy(R.choice(VALUES))
        elif what < 0.85:
            del at[path[-1]]
        elif isinstance(at, dict):
            at[str(path[-1]) + R.choice(["x", "\0", "\u00e9"])] = copy.deepcopy(R.choice(VALUES))
        else:
            at.append(copy.deepcopy(R.choice(at)))
    return v


def mutate_bytes(b):
    b = bytearray(b)
    for _ in range(R.randint(1, 4)):
        if not b:
            break
        i, n = R.randrange(len(b)), R.randint(1, 12)
        what = R.randrange(4)
        if what == 0:
            b[i] = R.randrange(256)
        elif what == 1:
            del b[i:i + n]
        elif what == 2:
            b[i:i] = b[R.randrange(len(b)):][:n]
        else:
            b[i] ^= 1 << R.randrange(8)
    return bytes(b)


def bounded(v):
    """Long answers are not what this is about."""
    if isinstance(v, dict):
        v.pop("ignore_eos", None)
        for k in ("max_tokens", "max_completion_tokens", "min_tokens"):
            if isinstance(v.get(k), int) and not isinstance(v.get(k), bool) and v[k] > 8:
                v[k] = 8
        if isinstance(v.get("n"), int) and 8 < v["n"] <= 128:
            v["n"] = 8
    return v


def check_error(status, body, sent):
    e = json.loads(body)["error"]
    assert 400 <= status < 500 and set(e) == {"message", "type", "param", "code"}, (status, body, sent)
    assert e["message"] and e["type"], (status, body, sent)
    assert all(e[k] is None or (isinstance(e[k], str) and e[k]) for k in ("param", "code")), (body, sent)


def http_request(conn, path, body):
    try:
        conn.request("POST", path, body, {"Content-Type": "application/json"})
        r = conn.getresponse()
        got = r.read()
    except (OSError, http.client.HTTPException) as e:
        raise AssertionError(f"seed {SEED}: the connection broke ({e!r}) at {path} {body[:600]!r}") from None
    text = got.decode()  # always UTF-8
    if r.status != 200:
        check_error(r.status, text, (path, body[:600]))
    elif r.headers["Content-Type"].startswith("text/event-stream"):
        lines = [x for x in text.split("\n") if x and not x.startswith(":")]
        assert lines and all(x.startswith("data: ") for x in lines), (text, body)
        assert lines[-1] == "data: [DONE]", (text, body)
        for x in lines[:-1]:
            json.loads(x[6:])
    else:
        json.loads(text)
    return r.status


GENERATE = pb.GenerateRequest(
    request_id="r", model="demo", tokens=pb.TokenIds(ids=Q["prompt_ids"]), logprobs=1, prompt_logprobs=1,
    cache_salt="s",
    sampling=pb.SamplingParams(temperature=0.5, top_p=0.9, top_k=3, min_p=0.1, frequency_penalty=0.1,
                               repetition_penalty=1.1, max_tokens=3, min_tokens=1, stop=["a", "\u00e9"],
                               stop_token_ids=[3], n=2, seed=5, logit_bias=[pb.LogitBias(id=3, bias=1.5)]))
BYTEXT = pb.GenerateRequest(model="demo", text="hello \u00e9", sampling=pb.SamplingParams(max_tokens=2))
BYCHAT = pb.GenerateRequest(model="demo",
                            chat=pb.ChatInput(messages=[pb.ChatMessage(role="user", content="hi")]),
                            sampling=pb.SamplingParams(max_tokens=2))
BYJSON = pb.GenerateRequest(
    model="demo", chat=pb.ChatInput(messages_json=json.dumps(CHAT["messages"]),
                                    tools_json=json.dumps(CHAT["tools"])),
    sampling=pb.SamplingParams(max_tokens=2))
TOKENS = pb.TokenizeRequest(model="demo", text="hello", no_special=True)
RPCS = [("Generate", GENERATE), ("Complete", GENERATE), ("Generate", BYTEXT), ("Complete", BYCHAT),
        ("Complete", BYJSON), ("Tokenize", TOKENS), ("ListModels", pb.ListModelsRequest())]
FINE = {
    grpc.StatusCode[x]
    for x in ("INVALID_ARGUMENT", "NOT_FOUND", "RESOURCE_EXHAUSTED", "OUT_OF_RANGE", "UNIMPLEMENTED",
              "FAILED_PRECONDITION")
}


def grpc_request(channel, method, body):
    """Raw bytes in, raw bytes out; a mutated length of the answer is cut off by a cancel."""
    path, raw = f"/tandem.v1.Inference/{method}", dict(request_serializer=None, response_deserializer=None)
    try:
        if method == "Generate":
            call = channel.unary_stream(path, **raw)(body, timeout=60)
            for i, _ in enumerate(call):
                if i == 12:
                    call.cancel()
                    return False
        else:
            channel.unary_unary(path, **raw)(body, timeout=60)
        return True
    except grpc.RpcError as e:
        if e.code() == grpc.StatusCode.CANCELLED:
            return False
        assert e.code() in FINE and e.details(), f"seed {SEED}: {e.code()} {e.details()} at {method} {body!r}"
        return False


with Cluster(prefill=0, decode=0, mixed=1, extra=["--max-model-len", "64"]) as c:
    conn = http.client.HTTPConnection("127.0.0.1", c.port, timeout=60)
    taken = 0
    for _ in range(COUNT):
        path, body = R.choice(HTTP)
        body = bounded(mutate_tree(body)) if R.random() < 0.7 else body
        data = json.dumps(body, ensure_ascii=R.random() < 0.5).encode(errors="surrogatepass")
        if R.random() < 0.3:
            data = mutate_bytes(data)
        taken += http_request(conn, path, data) == 200
    assert COUNT * 0.05 < taken < COUNT * 0.95, taken
    print(f"ok {COUNT} HTTP requests, {taken} of them answered")
    channel = grpc.insecure_channel(f"127.0.0.1:{c.grpc_port}")
    answered = 0
    for _ in range(COUNT):
        method, message = R.choice(RPCS)
        data = message.SerializeToString()
        answered += grpc_request(channel, method, mutate_bytes(data) if R.random() < 0.9 else data)
    assert COUNT * 0.05 < answered < COUNT * 0.95, answered
    print(f"ok {COUNT} gRPC requests, {answered} of them answered")
    c.wait_clean()
    assert c.complete(Q["prompt_ids"], temperature=0,
                      max_tokens=4)["choices"][0]["token_ids"] == Q["answer_ids"][:4]
    assert c.procs["router"].poll() is None and all(c.procs[w].poll() is None for w in c.workers)
    print("ok it serves as before")
print("3 passed, 0 failed")
