"""A tandem cluster for tests: one router and any workers, started directly (so that a test can kill one), on
free ports.

    with Cluster(MODEL, prefill=1, decode=1, extra=["--page-size", "8"]) as c:
        c.complete(prompt_ids, max_tokens=8) -> dict of /v1/completions
        c.wait_clean()                        every page free or cached again
SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

from support.machine import free_port, patience

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.environ.get("TANDEM_BUILD") or os.path.join(ROOT, "build", "release")
BIN = os.path.join(BUILD, "bin")
SHARED = os.path.join(os.path.dirname(ROOT), "shared")
DEMO = os.path.join(ROOT, "deploy", "demo", "target")
QUESTIONS = os.path.join(ROOT, "deploy", "demo", "questions.jsonl")


SANITIZER = re.compile(r"(ERROR|WARNING): \w+Sanitizer|: runtime error: ")  # in builds with TD_SANITIZE


def sanitized():
    """Whether BUILD is one with a sanitizer: the double precision kernels are far slower there."""
    with open(os.path.join(BUILD, "CMakeCache.txt")) as f:
        return re.search(r"^TD_SANITIZE:\w+=\w", f.read(), re.M) is not None


def rank_pids(above, flat=False):
    """{rank: process} of the MPI ranks below a process; flat: [process], of all workers below it."""
    parent, rank = {}, {}
    for p in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{p}/stat") as f:
                parent[int(p)] = int(f.read().rsplit(")", 1)[1].split()[1])
            with open(f"/proc/{p}/environ", "rb") as f:
                m = re.search(rb"(?:^|\0)OMPI_COMM_WORLD_RANK=(\d+)", f.read())
            with open(f"/proc/{p}/cmdline", "rb") as f:
                program = os.path.basename(f.read().split(b"\0")[0])
            if m and program == b"tandem-worker":
                rank[int(p)] = int(m[1])
        except (OSError, IndexError):
            pass

    def below(p):
        while p in parent:
            if p == above:
                return True
            p = parent[p]
        return False

    found = [(r, p) for p, r in rank.items() if p != above and below(p)]
    return [p for _, p in found] if flat else dict(found)


class Gone(threading.Thread):
    """Notes when the last of some processes is gone: .after(seconds) -> how long that took."""

    def __init__(self, pids):
        super().__init__(daemon=True)
        self.pids, self.began, self.took = list(pids), time.monotonic(), None
        self.start()

    def run(self):
        while any(os.path.exists(f"/proc/{p}") for p in self.pids):
            if time.monotonic() - self.began > patience(60):
                return
            time.sleep(0.01)
        self.took = time.monotonic() - self.began

    def after(self, seconds):
        seconds = patience(seconds)
        self.join(max(0, self.began + seconds - time.monotonic()) + 1)
        assert self.took and self.took <= seconds, f"{self.took} s, not within {seconds} s: {self.pids}"
        return self.took


def open_mpi_under_sanitizers():
    """It keeps what it allocated, and is not instrumented."""
    os.environ.setdefault("ASAN_OPTIONS", "detect_leaks=0")
    os.environ.setdefault("TSAN_OPTIONS", "ignore_noninstrumented_modules=1 report_signal_unsafe=0")


def skip(reason):
    print("SKIP:", reason)
    sys.exit(77)


def questions():
    with open(QUESTIONS) as f:
        return [json.loads(line) for line in f]


class Error(Exception):
    def __init__(self, status, body):
        super().__init__(f"HTTP {status}: {body[:500]}")
        self.status = status
        try:
            self.error = json.loads(body)["error"]
        except (ValueError, KeyError, TypeError):
            self.error = None


class Cluster:
    tls = None  # an ssl.SSLContext: the API is spoken to over TLS

    def __init__(self, model=DEMO, prefill=1, decode=1, mixed=0, extra=(), router_extra=(), prefill_extra=(),
                 decode_extra=(), mixed_extra=(), name="demo", tcp=False, ready=True, threads=1, ranks=None, tls=None):
        """ranks: {role: number}: such workers are started by `tandem launch-worker --no-restart`."""
        self.dir = tempfile.mkdtemp(prefix="td", dir="/tmp")
        self.port, self.grpc_port = free_port(), free_port()
        self.model, self.extra, self.name, self.tcp, self.threads = model, list(extra), name, tcp, threads
        self.control = f"tcp://127.0.0.1:{free_port()}" if tcp else f"ipc://{self.dir}/control"
        self.procs, self.n_started = {}, 0
        self.ranks, self.tls = ranks or {}, tls
        self.role_extra = {"prefill": prefill_extra, "decode": decode_extra, "mixed": mixed_extra}
        self.router_extra = router_extra
        self.start_router()
        self.workers = []
        for role, n in (("prefill", prefill), ("decode", decode), ("mixed", mixed)):
            for _ in range(n):
                self.start_worker(role)
        if ready:
            self.ready_or_closed()

    def ready_or_closed(self):
        """What does not come up is not left behind."""
        try:
            self.wait_ready()
        except BaseException:
            self.dump()
            self.close()
            raise

    def _spawn(self, label, argv):
        log = open(os.path.join(self.dir, label + ".log"), "ab")
        argv = [os.path.join(BIN, argv[0]), *argv[1:]]
        self.procs[label] = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        log.close()
        return label

    def start_router(self):
        argv = ["tandem-router", "--model", self.model, "--served-model-name", self.name]
        argv += ["--port", str(self.port), "--grpc-port", str(self.grpc_port), "--router-bind", self.control]
        self._spawn("router", [*argv, *self.router_extra])

    def start_worker(self, role, program="tandem-worker"):
        label = f"{role}{self.n_started}"
        self.n_started += 1
        bulk = "tcp://127.0.0.1:*" if self.tcp else f"ipc://{self.dir}/bulk{self.n_started}"
        argv = [program]
        if self.ranks.get(role, 1) > 1:
            argv = ["tandem", "launch-worker", "--no-restart", "--ranks", str(self.ranks[role]), "--"]
        argv += ["--model", self.model, "--role", role, "--router", self.control]
        argv += ["--bulk-bind", bulk, "--name", label, "--threads", str(self.threads)]
        argv += ["--cache-dir", os.path.join(BUILD, "test-cache"), *self.extra, *self.role_extra[role]]
        self._spawn(label, argv)
        self.workers.append(label)
        return label

    def __enter__(self):
        return self

    def __exit__(self, kind, value, tb):
        if kind is not None:
            self.dump()
        self.close()

    def dump(self, lines=25):
        for label in self.procs:
            text = self.log(label).splitlines()[-lines:]
            print(f"--- {label}", *text, sep="\n", flush=True)

    def log(self, label):
        with open(os.path.join(self.dir, label + ".log"), errors="replace") as f:
            return f.read()

    def close(self):
        for p in self.procs.values():
            if p.poll() is None:
                p.send_signal(signal.SIGCONT)
                p.terminate()
        for p in self.procs.values():
            try:
                p.wait(patience(8))
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait()
        found = [
            line for label in self.procs for line in self.log(label).splitlines() if SANITIZER.search(line)
        ]
        if found:
            self.dump(120)
        shutil.rmtree(self.dir, ignore_errors=True)
        assert not found, found

    def url(self, path):
        return f"http{'s' if self.tls else ''}://127.0.0.1:{self.port}{path}"

    def get(self, path, timeout=20):
        try:
            with urllib.request.urlopen(self.url(path), timeout=patience(timeout), context=self.tls) as r:
                return r.read().decode()
        except urllib.error.HTTPError as e:
            raise Error(e.code, e.read().decode(errors="replace")) from None

    def post(self, path, body, timeout=120, headers=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        req = urllib.request.Request(self.url(path), data,
                                     {"Content-Type": "application/json", **(headers or {})})
        try:
            with urllib.request.urlopen(req, timeout=patience(timeout), context=self.tls) as r:
                return json.loads(r.read())
        except urllib.error.HTTPError as e:
            raise Error(e.code, e.read().decode(errors="replace")) from None

    def until(self, what, timeout, f, router=True):
        end = time.monotonic() + patience(timeout)
        last = None
        while time.monotonic() < end:
            try:
                last = f()
                if last:
                    return last
            except (OSError, Error) as e:
                last = e
            for label, p in self.procs.items():
                if router and label == "router" and p.poll() is not None:
                    raise AssertionError(f"router exited with {p.returncode} while waiting for {what}")
            time.sleep(0.01)
        raise AssertionError(f"not within {patience(timeout):.0f} s: {what}; last: {last}")

    def wait_ready(self, timeout=60):
        self.until(
            "ready", timeout,
            lambda: self.get("/readyz", 2) is not None and len(self.ledger()["workers"]) >= len(self.workers))

    def ledger(self):
        return json.loads(self.get("/debug/ledger"))

    def is_clean(self, since=None):
        """No live request, and on every worker each page is free or cached, as it said after `since` (monotonic)."""
        asked = time.monotonic()
        d = self.ledger()
        if d["requests"]:
            return False
        for w in d["workers"]:
            if since and w["groups"] and asked - w["beat_age_ms"] / 1000 < since:
                return False
            for g in w["groups"]:
                if g["free"] + g["cached"] != g["total"] or g["pinned"]:
                    return False
        return True

    def wait_clean(self, timeout=10):
        since = time.monotonic()
        self.until("every page free or cached", timeout, lambda: self.is_clean(since))

    def complete(self, prompt, **kw):
        return self.post("/v1/completions",
                         {"model": self.name, "prompt": prompt, "return_token_ids": True, **kw})

    def chat(self, messages, **kw):
        return self.post("/v1/chat/completions",
                         {"model": self.name, "messages": messages, "return_token_ids": True, **kw})

    def stream(self, path, body, timeout=120):
        """Yield (seconds, event) of an SSE stream."""
        req = urllib.request.Request(self.url(path),
                                     json.dumps({"model": self.name, "stream": True, **body}).encode(),
                                     {"Content-Type": "application/json"})
        try:
            r = urllib.request.urlopen(req, timeout=patience(timeout), context=self.tls)
        except urllib.error.HTTPError as e:
            raise Error(e.code, e.read().decode(errors="replace")) from None
        with r:
            for raw in r:
                line = raw.decode().strip()
                if line.startswith("data: "):
                    if line == "data: [DONE]":
                        return
                    yield time.monotonic(), json.loads(line[6:])

    def metric(self, name):
        total = 0.0
        for line in self.get("/metrics").splitlines():
            m = re.match(re.escape(name) + r"(\{[^}]*\})? (\S+)$", line)
            if m:
                total += float(m.group(2))
        return total

    def rank_pids(self, label):
        """{rank: process} of a worker of many ranks."""
        return rank_pids(self.procs[label].pid)

    def kill(self, label, sig=signal.SIGKILL):
        self.procs[label].send_signal(sig)
        if sig == signal.SIGKILL:
            self.procs[label].wait()
            self.workers.remove(label)
