# SPDX-License-Identifier: Apache-2.0
"""Shared by the Python tests of router/text: where things are, and a tokenizer process to talk to."""
import glob
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
SHARED = os.path.join(os.path.dirname(ROOT), "shared")
BUILD = os.environ.get("TANDEM_BUILD", os.path.join(ROOT, "build"))
TOKENIZERS = os.path.join(SHARED, "data", "tokenizers")
DEMO = os.path.join(ROOT, "deploy", "demo")


def skip(reason):
    print("SKIP:", reason)
    sys.exit(77)


def need(path):
    if not os.path.exists(path):
        skip("no " + os.path.relpath(path, ROOT))
    return path


def tool(name):
    return need(os.path.join(BUILD, "tests", name))


class Tokenizer:
    def __init__(self, folder, *flags):
        self.p = subprocess.Popen([tool("tool_tokenize"), folder, *flags], stdin=subprocess.PIPE,
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)

    def ask(self, **q):
        self.p.stdin.write(json.dumps(q).encode() + b"\n")
        self.p.stdin.flush()
        line = self.p.stdout.readline()
        if not line:
            raise RuntimeError("tokenizer ended: " + self.p.stderr.read().decode(errors="replace")[-2000:])
        return json.loads(line)

    def encode(self, text, special=False, parse=True):
        r = self.ask(text=text, special=special, parse=parse)
        if "error" in r:
            raise RuntimeError(r["error"])
        return r["ids"]

    def decode(self, ids, skip=False):
        r = self.ask(ids=ids, skip=skip)
        assert r["broken"] == 0, "a push ended inside a character"
        return r["text"]

    def close(self):
        self.p.stdin.close()
        self.p.wait()


class Check:
    """Counts; report() prints a summary and gives the exit status."""

    def __init__(self):
        self.passed = self.failed = 0

    def ok(self, good, *what):
        if good:
            self.passed += 1
        else:
            self.failed += 1
            if self.failed <= 20:
                print("failed:", *[str(w)[:400] for w in what])

    def eq(self, got, want, *what):
        self.ok(got == want, *what, "\n   got ", repr(got)[:600], "\n   want", repr(want)[:600])

    def report(self):
        print(self.passed, "passed,", self.failed, "failed")
        return 1 if self.failed else 0
