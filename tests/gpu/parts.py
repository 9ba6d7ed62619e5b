# SPDX-License-Identifier: Apache-2.0
"""Parts of tests/gpu/run beside the test programs: goldens' logits on a device, the engine's speed and what the deterministic
mode costs. Python's own library only: nothing is installed on a machine with a device."""
import array
import json
import math
import os
import struct
import tempfile
import time

from gpu_sh import ROOT, sh, side_by_side

MOE = ("mixtral", "qwen3-moe")
KL_LIMIT = 2e-3
GOLDEN_S = 60 # one of its runs; a second and a half is what it takes


# ---- goldens ----

def read_safetensors(path):
    """name -> (shape, array): F32 and I32 only."""
    out = {}
    with open(path, "rb") as f:
        head = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
        data = f.read()
    for name, t in head.items():
        code = {"F32": "f", "I32": "i"}.get(t.get("dtype"))
        if code:
            a, b = t["data_offsets"]
            v = array.array(code)
            v.frombytes(data[a:b])
            out[name] = (t["shape"], v)
    return out


def log_softmax(row):
    m = max(row)
    s = math.log(sum(math.exp(x - m) for x in row)) + m
    return [x - s for x in row]


def compare(golden, got, kl_rows=4):
    """(largest error beside the largest logit, mean KL over some rows of each case)."""
    err, kls = 0.0, []
    for name in golden:
        if not name.startswith("logits_"):
            continue
        (n, v), want = golden[name]
        shape, have = got[name]
        if list(shape) != [n, v]:
            return math.inf, math.inf
        size = max(abs(x) for x in want)
        worst = max(abs(a - b) if a == a and b == b else math.inf for a, b in zip(want, have))
        err = max(err, worst / size)
        for r in range(0, n, max(1, n // kl_rows)):
            a, b = log_softmax(want[r * v:(r + 1) * v]), log_softmax(have[r * v:(r + 1) * v])
            kls.append(sum(math.exp(x) * (x - y) for x, y in zip(a, b)))
    return err, sum(kls) / max(1, len(kls))


def logits(tandem, folder, out, seconds, *more):
    return sh([tandem, "logits", folder, "--ids", os.path.join(folder, "golden.safetensors"), "--out", out, "--ops", "cuda",
               "--no-pack-cache", "--max-model-len", "512", "--max-num-seqs", "8", "--threads", "2", *more], seconds)


def golden(tandem, folder, tmp, deadline):
    """Deterministic, whole and in chunks at another page size: the same bytes; fast: within the same limits."""
    name = os.path.basename(folder)
    want = read_safetensors(os.path.join(folder, "golden.safetensors"))
    limit = want["err_bf16"][1][0] * (1.25 if name in MOE else 1)
    kl_limit = max(KL_LIMIT, want["kl_bf16"][1][0]) if name in MOE and "kl_bf16" in want else KL_LIMIT
    ways = [("whole", ["--deterministic"]), ("chunks", ["--deterministic", "--chunk", "7", "--page-size", "8"]), ("fast", [])]
    texts, ok = [], True
    for way, more in ways:
        path = os.path.join(tmp, way)
        left = deadline - time.time()
        rc, out = logits(tandem, folder, path, min(GOLDEN_S, left), *more)
        if rc == 124 and left < GOLDEN_S:
            return no_time(f"golden {name}")
        if rc:
            return {"test": f"golden {name}", "ok": False, "skipped": False, "status": rc, "what": f"{way}: {out.strip()[-160:]}"}
        err, kl = compare(want, read_safetensors(path))
        ok = ok and err <= limit and kl <= kl_limit
        texts.append(f"{way} {err:.1e} KL {kl:.0e}")
    with open(os.path.join(tmp, "whole"), "rb") as a, open(os.path.join(tmp, "chunks"), "rb") as b:
        same = a.read() == b.read()
    return {"test": f"golden {name}", "ok": ok and same, "skipped": False, "status": 0,
            "what": f"{', '.join(texts)} (limit {limit:.1e}); chunks are {'the same bytes' if same else 'OTHER BYTES'}"}


def no_time(name):
    return {"test": name, "ok": True, "skipped": True, "cut": True, "status": 77, "what": "no time left"}


def run_goldens(tandem, deadline, workers, names=None):
    models = os.path.join(ROOT, "tests", "golden", "models")

    def one(name):
        if time.time() > deadline:
            return no_time(f"golden {name}")
        with tempfile.TemporaryDirectory() as tmp:
            return golden(tandem, os.path.join(models, name), tmp, deadline)
    return side_by_side(one, names or sorted(os.listdir(models)), workers)


# ---- the engine ----

# One run of `tandem bench engine` each: mode, arguments; what goals are about comes first. All of one packed image (--cache-dir), which
# bench_step has made, so that it lies in the page cache. 256 sequences: for the time between steps; more context than 128 tokens says
# no more of it.
LONG = ["-p", "2048", "-n", "64", "-B", "1,8,64", "--context-len", "1024", "-r", "3", "--max-num-seqs", "64"]
ENGINE = {"shape": "8b", "runs": [
    ("fast", LONG), ("fast", ["-p", "0", "-n", "32", "-B", "256", "--context-len", "128", "-r", "2", "--max-num-seqs", "256"]),
    ("deterministic", LONG)]}
TINY = ["-p", "70", "-n", "2", "-B", "1,2", "--context-len", "20", "-r", "1", "--max-num-seqs", "2", "--max-num-batched-tokens", "80"]
ENGINE_SHIM = {"shape": "ranks-tiny", "runs": [
    ("fast", TINY), ("fast", ["-p", "0", "-n", "6", "-B", "3", "--context-len", "5", "-r", "1", "--max-num-seqs", "3"]),
    ("deterministic", TINY)]}
# Of the read stream (decode), from the shares of weights and KV bytes: reference figures for the 8b shape.
ENGINE_GOALS = {"tg64@1024": 0.85, "tg64xB8@1024": 0.85, "tg64xB64@1024": 0.80}
# What a run says beside its speed, in the fast mode: key -> what, unit, at most.
LIMITS = {"first_token_s": ("from the command to a first token", "s", 5.0), "idle_us": ("device idle between steps", "us", 10.0)}


def limits(r):
    """Of one result: the goals that it has a figure for; the time between steps is a goal of the largest batch."""
    return {k: v for k, v in LIMITS.items() if r["mode"] == "fast" and k in r and (k != "idle_us" or "xB" in r["test"])}


def run_engine(tandem, shape, mode, args, cache, deadline):
    """Results of one run, what was cut, and an error text where it failed."""
    out, left = [], deadline - time.time()
    rc, text = sh([tandem, "bench", "engine", "--ops", "cuda", "--load-format", "dummy", "--shape", shape, "--cache-dir", cache,
                   "--log-level", "warn", "--json", "-", *args, *(["--deterministic"] if mode != "fast" else [])],
                  left)
    for line in text.split("\n"):
        try:
            r = json.loads(line)
        except ValueError:
            continue
        if isinstance(r, dict) and "test" in r:
            goal = ENGINE_GOALS.get(r["test"])
            out.append({"mode": mode, **r, **({"goal": goal} if goal else {})})
    what = f"bench engine, {mode} {args[:6]}"
    if rc == 124:
        return out, [f"{what}: after {max(0, left):.0f} s"], []
    return out, [], [f"bench engine, {mode}: status {rc}: {text.strip()[-300:]}"] if rc or not out else []


def deterministic_cost(results):
    """test -> how much longer it takes in the deterministic mode, as a part of the fast mode's time."""
    speed = {(r["mode"], r["test"]): r["tok_s"] for r in results}
    return {t: speed["fast", t] / speed["deterministic", t] - 1 for m, t in speed if m == "fast" and speed.get(("deterministic", t))}
