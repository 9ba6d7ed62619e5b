"""The commands a newcomer types, as they are: deploy/quickstart --once, `tandem serve` (every source of its options,
the ready line, a child that dies, SIGTERM, kill -9), `tandem chat` (a folder, a URL, a conversation), `tandem bench
engine` and `tandem bench serve`.
SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import re
import signal
import socket
import subprocess
import tempfile

from support.cluster import BIN, BUILD, DEMO, ROOT, Cluster, questions
from support.machine import free_port, patience
from support.report import done, ok
from support.serve import Serve

TANDEM = os.path.join(BIN, "tandem")
CACHE = ["--cache-dir", os.path.join(BUILD, "test-cache")]
ASK, ANSWER = "Add 770 and 605.", "Answer: 1375"
LABELS = ("queue", "prefill", "KV transfer", "time to first token", "first to second token", "between tokens, mean",
          "KV shipped")
READY = re.compile(r"(\S+) on http://([\d.]+):(\d+) \(gRPC (\d+)\), kernels (\S+) \(numerics (\S+)\), "
                   r"KV (\d+) tokens: ([\d.]+) requests of the full (\d+) tokens at once")


def run(*argv, env=(), status=0, stdin="", seconds=120):
    r = subprocess.run(argv, capture_output=True, text=True, input=stdin, cwd=ROOT, timeout=patience(seconds),
                       env={**os.environ, **dict(env)})
    assert r.returncode == status, (argv, r.returncode, r.stdout[-1500:], r.stderr[-1500:])
    return r


def answered(text, shipped):
    """The answer, then every timing with its unit; pages travelled or not."""
    assert ANSWER in text, text
    after = text[text.index(ANSWER):]
    for label in LABELS:
        assert re.search(rf"^ +{label} +[\d.]+ (ms|bytes)$", after, re.M), (label, text)
    n = int(re.search(r"KV shipped +(\d+) bytes", after)[1])
    assert (n > 0) == shipped, text


def ready(c):
    """The ready line of serve: it comes when all workers are ready."""
    return c.until("the ready line", 30, lambda: READY.search(c.log("serve")), router=False)


def children(pid):
    """{"router", or a worker's role: process} of what serve started."""
    found = {}
    with open(f"/proc/{pid}/task/{pid}/children") as f:
        for p in f.read().split():
            try:
                with open(f"/proc/{p}/cmdline") as argv:
                    words = argv.read().split("\0")
            except FileNotFoundError:
                continue  # gone meanwhile
            found[words[words.index("--role") + 1] if "--role" in words else "router"] = int(p)
    return found


QUICKSTART = [os.path.join(ROOT, "deploy", "quickstart"), "--once"]
r = run(*QUICKSTART, "--port", str(free_port()), "--grpc-port", str(free_port()), *CACHE, seconds=300)
lines = [line for line in r.stdout.splitlines() if line.startswith("demo on ")]
assert len(lines) == 1 and READY.fullmatch(lines[0]), r.stdout
assert r.stdout.index(lines[0]) < r.stdout.index(ANSWER)
answered(r.stdout, shipped=True)
ok("quickstart --once: the ready line, the answer, its timings, status 0")
r = run(*QUICKSTART, "--page-size", "24", status=2, seconds=300)
assert "page-size: '24' is not a power of two" in r.stderr and ANSWER not in r.stdout
ok("quickstart with a bad option: what serve says, its status")

# Without --once it goes on serving; Ctrl-C, which reaches every process of the terminal, lets a stream end.
LONG = max(questions(), key=lambda q: len(q["answer_ids"]))
c, port = Cluster.__new__(Cluster), free_port()  # for its calls
c.port, c.name = port, "demo"
log = tempfile.TemporaryFile("w+")
p = subprocess.Popen([*QUICKSTART[:1], "--port", str(port), "--grpc-port", str(free_port()), *CACHE], cwd=ROOT, text=True,
                     stdout=subprocess.PIPE, stderr=log, start_new_session=True)
head = []
for line in p.stdout:
    head.append(line)
    if line.startswith("serving on"):
        break
assert line.startswith(f"serving on http://127.0.0.1:{port} until Ctrl-C"), head
answered("".join(head), shipped=True)
body = dict(prompt=LONG["prompt_ids"], max_tokens=400, temperature=0, ignore_eos=True, return_token_ids=True)
got = 0
for i, (_, ev) in enumerate(c.stream("/v1/completions", body)):
    assert "error" not in ev, ev
    got += sum(len(ch.get("token_ids") or []) for ch in ev["choices"])
    if i == 2:
        os.killpg(p.pid, signal.SIGINT)
assert got == 400, got
assert p.wait(patience(30)) == 130
log.seek(0)
told = log.read()
assert 0 < told.index(" router stopped") < told.index(" worker signal "), "it drains, it is not told twice: " + told
try:
    socket.create_connection(("127.0.0.1", port), 5)
    raise AssertionError("still serving")
except ConnectionRefusedError:
    pass
ok("quickstart goes on serving; Ctrl-C lets a running stream end, then nothing is left")

for words, why in ((["bench"], "tandem: what of 'bench'"), (["bench", "foo"], "tandem: no command 'bench foo'"), (["foo"], "tandem: no command 'foo'")):
    r = run(TANDEM, *words, status=2)
    assert r.stderr.startswith(why + "\n") and "tandem bench serve " in r.stderr, r.stderr
ok("tandem with half a command: what there is")

# Options of serve: flag before environment before file; the ready line says what they came to.
with tempfile.TemporaryDirectory() as d:
    conf = os.path.join(d, "tandem.conf")
    with open(conf, "w") as f:
        f.write("# one file for a cluster\nmax-model-len: 512\nkv-pages: 4000\nops: ref\npage-size: 32   # tokens\n")
    os.environ.update(TANDEM_KV_PAGES="160", TANDEM_PAGE_SIZE="8")
    try:
        with Serve("--config", conf, "--page-size", "16", "--decode", "2", "--prefill", "1") as c:
            m = ready(c)
            assert m[1] == "demo" and m[2] == "127.0.0.1", m[0]
            assert (int(m[3]), int(m[4])) == (c.port, c.grpc_port), m[0]
            workers = c.ledger()["workers"]
            assert len(workers) == 3 and m[5] == "ref" and m[9] == "512", m[0]
            per_worker = int(m[7]) / 2  # of the two decode workers
            assert per_worker <= 160 * 16 and per_worker > 150 * 16, m[0]
            assert abs(float(m[8]) - int(m[7]) / 512) <= 0.05, m[0]
            assert json.loads(c.get("/v1/models"))["data"][0]["max_model_len"] == 512
            for w in workers:
                assert sum(g["total"] for g in w["groups"]) == 160, w
    finally:
        del os.environ["TANDEM_KV_PAGES"], os.environ["TANDEM_PAGE_SIZE"]
    with Serve("--mixed", "1") as c:
        want = json.load(open(os.path.join(DEMO, "config.json")))["max_position_embeddings"]
        assert int(ready(c)[9]) == want and ready(c)[5] != "ref", "max-model-len auto is the model's"
    for argv, words in ((["--max-num-seq", "4"], "unknown flag --max-num-seq: did you mean --max-num-seqs?"),
                        (["--port", "65536"], "port: 65536 is out of range: 0 to 65535 port"),
                        (["--prefill", "0", "--decode", "0"], "no workers")):
        assert words in run(TANDEM, "serve", DEMO, *argv, status=2).stderr
    with open(conf, "w") as f:
        f.write("max-num-seqz: 4\n")
    r = run(TANDEM, "serve", DEMO, "--config", conf, status=2)
    assert "line 1: unknown option 'max-num-seqz': did you mean max-num-seqs?" in r.stderr
    r = run(TANDEM, "serve", DEMO, env={"TANDEM_PORT": "x"}, status=2)
    assert "TANDEM_PORT: port: 'x' is not a whole number" in r.stderr
    for command in ("serve", "chat"):
        for folder, why in (("/nowhere", "No such file or directory"), (conf, "is no directory"), (d, "config.json: No such file")):
            r = run(TANDEM, command, folder, *(["-p", ASK] if command == "chat" else []), status=2)
            assert r.stderr.startswith(f"tandem {command}: {folder}") and why in r.stderr, r.stderr
            assert r.stderr.count("\n") == 1, "one line, not one of every child: " + r.stderr
    # A worker, the router or the model that is refused: the reason once, on the line that tells of the end.
    SOLE = ["--prefill", "0", "--decode", "0", "--mixed", "1", "--port", "0", "--grpc-port", "0"]

    def refused(line, *argv, folder=DEMO):
        r = run(TANDEM, "serve", folder, *SOLE, *argv, status=1)
        assert r.stderr.count(line) == 1, (line, r.stderr)
        return r.stderr

    refused(f" E worker worker mixed-1 cannot start: --max-model-len {want + 1}: the model has {want} positions",
            "--max-model-len", str(want + 1))
    refused(f"--max-model-len {want + 1}: the model has", "--max-model-len", str(want + 1))
    refused("no kernel family of this CPU computes as cpu-avx", "--numerics", "cpu-avx")
    refused("--tls-key needs --tls-cert too", "--tls-key", "x")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        refused(f"cannot listen on 127.0.0.1 port {port}: Address already in use", "--port", str(port))
    with open(os.path.join(DEMO, "config.json")) as f:
        foreign = {**json.load(f), "architectures": ["FooForCausalLM"], "model_type": "foo"}
    with open(os.path.join(d, "config.json"), "w") as f:
        json.dump(foreign, f)
    text = refused(f"tandem serve: {d}: config.json: architecture FooForCausalLM is not supported", folder=d)
    assert text.count("\n") == 1, text
    with open(conf, "w") as f:
        f.write("a\n{{ messages | nofilter }}")
    r = run(TANDEM, "serve", DEMO, "--chat-template", conf, "--port", "0", "--grpc-port", "0", status=1)
    assert r.stderr.count(f"{conf}: chat template line 2: no filter named 'nofilter'") == 1, r.stderr
    # an unknown variable is said once, by serve, and not by its children; a Service's variables are nobody's
    os.environ.update(TANDEM_MAX_NUM_SEQ="4", TANDEM_SERVICE_HOST="10.96.0.7", TANDEM_PORT="tcp://10.96.0.7:8000",
                      TANDEM_ROUTER_SERVICE_HOST="10.96.0.8", TANDEM_ROUTER_PORT_8000_TCP="tcp://10.96.0.8:8000")
    try:
        with Serve("--mixed", "1") as c:
            ready(c)
            said = [line for line in c.log("serve").splitlines() if "TANDEM_" in line]
            assert len(said) == 1 and "TANDEM_MAX_NUM_SEQ is no option and is ignored: did you mean TANDEM_MAX_NUM_SEQS?" in said[0], said
    finally:
        for name in ("MAX_NUM_SEQ", "SERVICE_HOST", "PORT", "ROUTER_SERVICE_HOST", "ROUTER_PORT_8000_TCP"):
            del os.environ["TANDEM_" + name]
ok("serve: file, environment, flag; the ready line; refusals")

# A child that dies is started again; SIGTERM lets a stream end; kill -9 of serve leaves nobody.
Q = max(questions(), key=lambda q: len(q["answer_ids"]))
BODY = dict(prompt=Q["prompt_ids"], max_tokens=400, temperature=0, ignore_eos=True, return_token_ids=True)
with Serve(prefill=1, decode=1) as c:
    ready(c)
    serve = c.procs["serve"]
    before = children(serve.pid)
    assert sorted(before) == ["decode", "prefill", "router"], before
    names = {w["name"] for w in c.ledger()["workers"]}
    os.kill(before["decode"], signal.SIGKILL)
    c.until("another decode worker", 30, lambda: children(serve.pid).get("decode", 0) not in (0, before["decode"]))
    c.until("it is ready", 30, lambda: {w["name"] for w in c.ledger()["workers"] if w["state"] == "READY"} == names)
    want = c.complete(**{k: v for k, v in BODY.items() if k != "return_token_ids"})["choices"][0]["token_ids"]
    got = []
    for i, (_, ev) in enumerate(c.stream("/v1/completions", BODY)):
        got += [t for ch in ev["choices"] for t in ch.get("token_ids") or []]
        if i == 2:
            serve.terminate()
    assert got == want and len(want) == 400, (got, want)
    assert serve.wait(patience(30)) == 0
    assert not any(os.path.exists(f"/proc/{p}") for p in before.values())
    ok("serve: a worker comes again; SIGTERM: the running stream ends as it would, status 0")
with Serve(prefill=1, decode=1) as c:
    pids = children(c.procs["serve"].pid).values()
    c.procs["serve"].kill()
    c.procs["serve"].wait()
    c.until("all children are gone", 15, lambda: not any(os.path.exists(f"/proc/{p}") for p in pids), router=False)
    ok("serve: kill -9 leaves no process")

answered(run(TANDEM, "chat", DEMO, "-p", ASK, "--temperature", "0").stdout, shipped=True)
ok("chat -p with a folder")
with Cluster(prefill=0, decode=0, mixed=1) as c:
    answered(run(TANDEM, "chat", "--url", c.url(""), "-p", ASK, "--temperature", "0").stdout, shipped=False)
    said = run(TANDEM, "chat", "--url", c.url(""), "--temperature", "0",
               stdin=f"hello\n{ASK}\n/clear\n{ASK}\n/exit\nmore\n").stdout
    assert said.startswith("model demo;") and said.count("time to first token") == 3, said
    prompts = [int(n) for n in re.findall(r"tokens +(\d+) prompt", said)]
    assert prompts[0] < prompts[1] > prompts[2] and said.count("\n> ") >= 1, (prompts, said)
    answered(said[said.index("> ", said.rindex("prompt (", 0, said.rindex("queue"))):], shipped=False)
    answered(run(TANDEM, "chat", "--url", c.url("/v1/"), "-p", ASK, "--temperature", "0").stdout, shipped=False)
    r = run(TANDEM, "chat", DEMO, "--url", c.url(""), "-p", ASK, status=2)
    assert "a folder or --url, not both" in r.stderr, r.stderr
    r = run(TANDEM, "chat", "--url", c.url("/nothing"), "-p", ASK, status=1)
    assert "/nothing/v1/models: status 404: there is nothing at this path" in r.stderr, r.stderr
    r = run(TANDEM, "chat", "--url", c.url(""), "-p", ASK, "--served-model-name", "other", status=1)
    assert "error 404" in r.stderr, r.stderr
    ok("chat with a URL: one question, a conversation, an error")

    out = os.path.join(c.dir, "bench.json")
    load = "--num-prompts 12 --request-rate 200 --input-len 40 --output-len 6 --shared-prefix 0.8 --ttft-ms 60000 " \
           "--tpot-ms 60000 --temperature 0"
    text = run(TANDEM, "bench", "serve", "--url", c.url(""), "--json", out, *load.split()).stdout
    for word in ("TTFT", "TPOT", "ITL by event", "ITL by token", "E2E", "goodput"):
        assert re.search(rf"^ +{word} +[\d.]+ ", text, re.M), (word, text)
    b = json.load(open(out))
    assert (b["requests"], b["failed"], b["good"]) == (12, 0, 12), b
    assert (b["input_tokens"], b["output_tokens"]) == (12 * 40, 12 * 6), b
    assert all(set(b[k]) == {"n", "mean", "p50", "p90", "p99", "max"}
               for k in ("ttft_ms", "tpot_ms", "itl_event_ms", "itl_token_ms", "e2e_ms")), b
    assert (b["ttft_ms"]["n"], b["tpot_ms"]["n"], b["itl_token_ms"]["n"]) == (12, 12, 12 * 5), b
    assert c.metric("vllm:prompt_tokens_cached_total") >= 11 * 16, "four fifths of each prompt are the same ids"
    trace = os.path.join(c.dir, "trace.jsonl")
    with open(trace, "w") as f:
        for i in range(4):
            f.write(json.dumps({"timestamp": 5000 + 3 * i, "input_length": 10 + i, "output_length": 2 + i}) + "\n")
    run(TANDEM, "bench", "serve", "--url", c.url(""), "--trace", trace, "--json", out)
    b = json.load(open(out))
    assert (b["requests"], b["input_tokens"], b["output_tokens"]) == (4, 10 + 11 + 12 + 13, 2 + 3 + 4 + 5), b
    c.wait_clean()
    r = run(TANDEM, "bench", "serve", "--url", c.url("/v1"), "--json", "-", *"--num-prompts 2 --input-len 5 --output-len 2".split())
    assert json.loads(r.stdout)["requests"] == 2 and "TTFT" in r.stderr, "the table is not JSON"
    r = run(TANDEM, "bench", "serve", "--url", c.url(""), "--json", "/nowhere/x", status=1)
    assert "/nowhere/x: No such file or directory" in r.stderr and "requests in" not in r.stdout, "found before the load"
    r = run(TANDEM, "bench", "serve", "--url", c.url(""), *"--num-prompts 2 --input-len 5000".split(), status=1)
    assert "context_length_exceeded" in r.stderr and "0 requests in" in r.stdout and "TTFT" not in r.stdout, r.stdout
    c.wait_clean()
    ok("bench serve: a Poisson load with a shared prefix, a trace; JSON alone on stdout; what goes wrong is said")

# Nobody listens: chat says what it is waiting for, while it waits.
nobody = f"http://127.0.0.1:{free_port()}"
p = subprocess.Popen([TANDEM, "chat", "--url", nobody, "-p", ASK], stderr=subprocess.PIPE, text=True)
line = p.stderr.readline()
p.send_signal(signal.SIGINT)
assert line.startswith(f"waiting for a server: {nobody}: ") and p.wait(patience(60)) == 1, line
ok("chat without a server: what it waits for")

r = run(TANDEM, "bench", "engine", DEMO, *"-p 16 -n 4 -B 1,3 -t 1 -r 1 --json -".split(), *CACHE)
lines = [json.loads(line) for line in r.stdout.splitlines()]
assert [b["test"] for b in lines] == ["pp16", "tg4", "tg4xB3"], lines
for b in lines:
    assert min(b[k] for k in ("tok_s", "of_bandwidth", "of_arithmetic", "gbytes", "read_gb_s", "peak_gflop_s")) > 0, b
assert lines[1]["steps"] == lines[2]["steps"] == 4 and lines[0]["steps"] == 1, lines
r = run(TANDEM, "bench", "engine", *"--load-format dummy --shape tiny -p 3 -n 2 -B 1 -t 1 -r 1 --json -".split())
assert [json.loads(line)["test"] for line in r.stdout.splitlines()] == ["pp3", "tg2"], r.stdout
ok("bench engine: a line for each test, with its shares of bandwidth and arithmetic")
done()
