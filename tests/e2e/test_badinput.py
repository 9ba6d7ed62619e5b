"""Bad input: a clear error in OpenAI's shape or a clean close; nothing lost, others undisturbed (a stream
runs beside it all the time).
SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import socket
import subprocess
import tempfile
import threading
import time

from support.cluster import BIN, DEMO, ROOT, Cluster, Error, questions
from support.machine import patience
from support.report import done, ok

Q = questions()[0]
with Cluster(router_extra=["--max-body-bytes", "1M"]) as c:
    def raw(data, wait=5.0, hold=0.0):
        """Send bytes, return everything that comes back until the server closes or `wait` s pass."""
        with socket.create_connection(("127.0.0.1", c.port), timeout=wait) as s:
            out = b""
            try:
                s.sendall(data)
                time.sleep(hold)
                while True:
                    part = s.recv(65536)
                    if not part:
                        break
                    out += part
                    if b"\r\n\r\n" in out:
                        head, _, body = out.partition(b"\r\n\r\n")
                        for line in head.split(b"\r\n"):
                            if line.lower().startswith(b"content-length:") and len(body) >= int(
                                    line.split(b":")[1]):
                                return out
            except (TimeoutError, ConnectionResetError, BrokenPipeError):
                pass
            return out

    def status(data, **kw):
        out = raw(data, **kw)
        head, _, body = out.partition(b"\r\n\r\n")
        code = int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/1.1 ") else 0
        if code >= 400:  # refused before any handler saw it: in the same shape
            e = json.loads(body)["error"]
            assert set(e) == {"message", "type", "param", "code"} and e["message"] and e["type"], (data[:80], body)
        return code

    def rejected(path, body, want=400, code=None, param=None):
        try:
            r = c.post(path, body)
        except Error as e:
            assert e.status == want, (body, e.status, str(e))
            assert set(e.error) == {"message", "type", "param", "code"}, (body, str(e))
            assert e.error["message"] and e.error["type"], (body, str(e))
            assert code is None or e.error["code"] == code, (body, e.error)
            assert param is None or e.error["param"] == param, (body, e.error)
            return
        raise AssertionError(f"accepted: {str(body)[:200]} -> {str(r)[:200]}")

    stop = threading.Event()
    streamed = []

    def beside():
        want = None
        while not stop.is_set():
            ids = []
            for _, ev in c.stream(
                    "/v1/completions",
                    dict(prompt=Q["prompt_ids"], max_tokens=60, temperature=0.7, seed=3,
                         return_token_ids=True)):
                for ch in ev.get("choices", []):
                    ids += ch.get("token_ids") or []
            want = want or ids
            streamed.append(ids == want and len(ids) > 5)
            stop.wait(0.05)

    t = threading.Thread(target=beside)
    t.start()
    chat = lambda **kw: {"model": "demo", "messages": [{"role": "user", "content": "hi"}], **kw}  # noqa: E731
    comp = lambda **kw: {"model": "demo", "prompt": "hi", **kw}  # noqa: E731
    for body in (b"", b"{", b"[]", b"null", b'{"model": "demo"', b'{"model": "demo",}', b"\xff\xfe",
                 b'{"a": 1e999e}', b"[" * 100000, b'{"a":' * 5000):
        rejected("/v1/chat/completions", body)
        rejected("/v1/completions", body)
    ok("malformed JSON")
    rejected("/v1/chat/completions", chat(model="nope"), 404, "model_not_found")
    rejected("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}]}, 400, param="model")
    rejected("/v1/completions", comp(prompt=[20] * 5000), 400, "context_length_exceeded")
    rejected("/v1/completions", comp(max_tokens=100000), 400, "context_length_exceeded")
    rejected("/v1/chat/completions", chat(messages=[{"role": "user", "content": "word " * 6000}]), 400,
             "context_length_exceeded")
    ok("unknown model, too long a prompt")
    for kw in (dict(temperature="hot"), dict(temperature=-1), dict(temperature=2.5), dict(top_p=0),
               dict(top_p=1.5), dict(n=0), dict(n=100000), dict(n=1.5),
               dict(max_tokens=0), dict(max_tokens=-1), dict(max_tokens="x"), dict(seed="x"), dict(stop=5),
               dict(stop=["a"] * 100), dict(stop=[1]), dict(presence_penalty=9), dict(frequency_penalty=-9),
               dict(logit_bias={"x": 1}), dict(logit_bias={"999999": 1}), dict(logit_bias=[1]),
               dict(stream="yes"), dict(top_k="a"), dict(min_p=2), dict(repetition_penalty=0),
               dict(min_tokens=-1), dict(stop_token_ids=[10**9])):
        rejected("/v1/chat/completions", chat(**kw), param=next(iter(kw)))
    for body in (comp(temperature=float("nan")), comp(temperature=float("inf"))):
        rejected("/v1/completions", json.dumps(body).encode())
    for p in ([], "", [[]], [99999], [-1], [1.5], ["a", 1], 5, None, {"a": 1}, [[1, "a"]], [2**40]):
        rejected("/v1/completions", comp(prompt=p), param="prompt")
    for m in ([], "x", [5], [{}], [{"role": "user"}], [{"role": 5, "content": "x"}], None):
        rejected("/v1/chat/completions", chat(messages=m))
    rejected("/v1/chat/completions", chat(top_logprobs=99, logprobs=True))
    rejected("/v1/completions", comp(logprobs=99))
    for field, value in (("response_format", {"type": "json_object"}), ("suffix", "x"), ("best_of", 5)):
        rejected("/v1/completions" if field != "response_format" else "/v1/chat/completions",
                 (comp if field != "response_format" else chat)(**{field: value}), 400,
                 "unsupported_parameter", field)
    ignored = c.metric("tandem_request_fields_unknown_total")
    assert c.chat(chat()["messages"], max_tokens=2, no_such_field=1, nor_this={"a": 1})["choices"]
    assert c.metric("tandem_request_fields_unknown_total") == ignored + 2
    ok("wrong types, ranges, token ids; unsupported named, unknown ignored and counted")
    rejected("/v1/nothing", {}, 404)
    assert status(b"GET /v1/chat/completions HTTP/1.1\r\nHost: x\r\n\r\n") == 405
    big = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99000000\r\n\r\n"
    assert status(big) == 413
    assert status(b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: %s\r\n" % (i, b"y" * 200)
                                                                   for i in range(2000)) + b"\r\n") == 431
    both = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n" \
           b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n"
    assert status(both) == 400
    assert status(b"GARBAGE\r\n\r\n") == 400
    assert status(b"GET /livez HTTP/1.1\r\n\r\n") == 400
    assert status(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n") == 200
    ok("HTTP: 404, 405, 413, 431, both lengths, garbage")
    body = json.dumps(comp(prompt=Q["prompt_ids"], stream=True, max_tokens=1500, ignore_eos=True)).encode()
    post = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    slow = socket.create_connection(("127.0.0.1", c.port))
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    slow.sendall(post)  # and never reads
    gone = [socket.create_connection(("127.0.0.1", c.port)) for _ in range(20)]
    for i, s in enumerate(gone):
        s.sendall(post[: len(post) * (i + 1) // 20])
        s.close()
    n = len(streamed)
    c.until("the stream beside goes on", 20, lambda: len(streamed) > n + 2)
    slow.close()
    ok("a slow reader, clients that leave in the middle of a request")
    stop.set()
    t.join()
    assert all(streamed) and streamed, "the stream beside was disturbed"
    c.wait_clean()
    ok(f"{len(streamed)} streams beside, all undisturbed; every page back")

# Without a tokenizer: prompts of token ids only, and it says so.
with Cluster(os.path.join(ROOT, "tests", "golden", "models", "llama-gqa"), prefill=0, decode=0, mixed=1) as c:
    assert "no tokenizer: prompts must be token ids" in c.log("router")
    r = c.complete([1, 2, 3], max_tokens=4, temperature=0, ignore_eos=True)["choices"][0]
    assert len(r["token_ids"]) == 4 and r["text"] == "", r
    rejected("/v1/completions", comp(), 400, "no_tokenizer", "prompt")
    rejected("/v1/completions", comp(prompt=[1, 2, 3], stop="x"), 400, "no_tokenizer", "stop")
    rejected("/v1/chat/completions", chat(), 400)
    rejected("/tokenize", {"model": "demo", "prompt": "x"}, 400, "no_tokenizer")
    ok("a folder without a tokenizer")


# A folder that is wrong in one file: refused at load, with the file, the tensor and the reason.
def refused(program, what, name, content, *words):
    with tempfile.TemporaryDirectory() as d:
        for f in os.listdir(DEMO):
            if f != name:
                os.symlink(os.path.join(DEMO, f), os.path.join(d, f))
        with open(os.path.join(d, name), "wb") as f:
            f.write(content if isinstance(content, bytes) else content.encode())
        argv = {"router": ["--port", "0", "--grpc-port", "0", "--router-bind", f"ipc://{d}/c"],
                "worker": ["--router", f"ipc://{d}/c", "--no-pack-cache", "--ops", "ref"]}[program]
        r = subprocess.run([os.path.join(BIN, "tandem-" + program), "--model", d, *argv], capture_output=True,
                           text=True, timeout=patience(20))
        last = r.stderr.strip().splitlines()[-1]
        assert r.returncode == 1 and all(w in last for w in (name, *words)), (what, words, r.returncode, r.stderr)
        assert r.stderr.count(last.split(": ", 1)[1]) == 1, "said twice: " + r.stderr


with open(os.path.join(DEMO, "model.safetensors"), "rb") as f:
    weights = f.read()
n_header = int.from_bytes(weights[:8], "little")
NORM, MLP = "model.norm.weight", "model.layers.3.mlp.up_proj.weight"


def safetensors(change):
    header = json.loads(weights[8:8 + n_header])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + weights[8 + n_header:]


def overlap(h):
    h[NORM]["data_offsets"] = [x - 2 for x in h[NORM]["data_offsets"]]


for what, content, words in (
    ("truncated", weights[:-1000], ()), ("truncated in its header", weights[:n_header // 2], ()),
    ("overlapping", safetensors(overlap), ()),
    ("lying about a size", safetensors(lambda h: h[NORM].update(shape=[77])), (NORM,)),
    ("of another size", safetensors(lambda h: h[NORM].update(dtype="F32")), (NORM,)),
    ("of an unknown dtype", safetensors(lambda h: h[NORM].update(dtype="X9")), (NORM, "X9")),
    ("without a tensor", safetensors(lambda h: h.update({MLP + "s": h.pop(MLP)})), (MLP,)),
    ("of another shape", safetensors(lambda h: h[MLP].update(shape=h[MLP]["shape"][::-1])), (MLP,)),
):
    refused("worker", what, "model.safetensors", content, *words)
ok("a bad safetensors file is refused with its name, the tensor and the reason")
with open(os.path.join(DEMO, "config.json")) as f:
    config = json.load(f)
refused("worker", "config", "config.json", '{"architectures": [', "line 1")
refused("worker", "architecture", "config.json", json.dumps({**config, "architectures": ["NewLM"]}), "NewLM")
refused("worker", "config", "config.json", json.dumps({**config, "hidden_act": "gelu"}), "hidden_act", "gelu")
refused("router", "tokenizer", "tokenizer.json", '{"model": {"type": "BPE"', "line 1")
refused("router", "tokenizer", "tokenizer.json", '{"model": {"type": "Unigram", "vocab": []}}', "Unigram")
refused("router", "template", "chat_template.jinja", "a\n{% for m in %}", "line 2")
refused("router", "template", "chat_template.jinja", "a\nb\n{% wibble %}", "line 3", "wibble")
ok("a bad config.json, tokenizer or template is refused with its name and the reason")
# What a request must not ask for is no default either.
for key, value in (("top_p", 0), ("temperature", -1), ("repetition_penalty", 1e-50), ("top_k", 1e30),
                   ("min_p", 2)):
    refused("router", key, "generation_config.json", json.dumps({key: value}), key)
ok("a bad generation_config.json is refused by name")
done()
