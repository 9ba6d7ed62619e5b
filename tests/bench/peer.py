"""Speed against llama.cpp on the same weights, interleaved on the same cores: A B A B ..., medians, ratios, shares of the machine's limits.

    python tests/bench/peer.py [--rounds 3] [--dir build/bench/1b] [--out tests/bench/results]

Needs ../shared/tools (make_bench_model.py, peer_llama.py) and, in build/bench-venv, llama-cpp-python, gguf, ml_dtypes, numpy and safetensors (made here when
absent: about fifteen minutes). Goals: pp512 >= 1.2x, tg64 >= 1.0x and >= 0.90 of read bandwidth, tg64xB8 >= 1.5x and >= 0.80 of the roofline.
SPDX-License-Identifier: Apache-2.0
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time

from common import BUILD, RESULTS, ROOT, save

TOOLS = os.path.join(os.path.dirname(ROOT), "shared", "tools")
p = argparse.ArgumentParser()
p.add_argument("--rounds", type=int, default=3)
p.add_argument("--dir", default=os.path.join(ROOT, "build", "bench", "1b"))
p.add_argument("--build", default=BUILD)
p.add_argument("--out", default=RESULTS)
a = p.parse_args()
PY = os.path.join(ROOT, "build", "bench-venv", "bin", "python")

if not os.path.exists(TOOLS):
    print("SKIP: ../shared/tools is not here")
    sys.exit(77)
if not os.path.exists(PY):
    subprocess.check_call([sys.executable, "-m", "venv", os.path.join(ROOT, "build", "bench-venv")])
    subprocess.check_call([PY, "-m", "pip", "-q", "install", "llama-cpp-python", "gguf", "ml_dtypes", "numpy", "safetensors"])
if not os.path.exists(os.path.join(a.dir, "model-bf16.gguf")):
    subprocess.check_call([PY, os.path.join(TOOLS, "make_bench_model.py"), a.dir, "--shape", "1b", "--gguf", "bf16"])


def lines(argv):
    out = subprocess.run(argv, capture_output=True, text=True)
    if out.returncode:
        sys.exit(f"{argv}: status {out.returncode}\n{out.stderr[-2000:]}")
    return [json.loads(x) for x in out.stdout.splitlines() if x.startswith("{")]


SIZES = ["-p", "512", "-n", "64", "-B", "1,8", "-t", "2", "-r", "1"]
ours, peer = [], []
for r in range(a.rounds):
    ours += lines([os.path.join(a.build, "bin", "tandem"), "bench", "engine", a.dir, *SIZES, "--json", "-"])
    peer += lines([PY, os.path.join(TOOLS, "peer_llama.py"), os.path.join(a.dir, "model-bf16.gguf"), *SIZES])
    print(f"round {r + 1} of {a.rounds}", file=sys.stderr, flush=True)

cpu = next((x.split(":")[1].strip() for x in open("/proc/cpuinfo") if x.startswith("model name")), platform.processor())
report = {"date": time.strftime("%Y-%m-%d"), "commit": subprocess.run(["git", "-C", ROOT, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip(),
          "cpu": cpu, "cores": os.cpu_count(), "command": "python tests/bench/peer.py --rounds %d" % a.rounds, "tests": {}}
print(f"{cpu}, {os.cpu_count()} cores; median of {a.rounds} interleaved rounds")
print(f"{'':10}{'tandem':>10}{'llama.cpp':>11}{'ratio':>8}   of bandwidth  of arithmetic  of roofline")
for test in ("pp512", "tg64", "tg64xB8"):
    mine = [x for x in ours if x["test"] == test]
    theirs = [x["tok_s"] for x in peer if x["test"] == test]
    if not mine or not theirs:
        continue
    m = statistics.median(x["tok_s"] for x in mine)
    t = statistics.median(theirs)
    ratio = statistics.median(x["tok_s"] / y for x, y in zip(mine, theirs))
    shares = {k: statistics.median(x[k] for x in mine) for k in ("of_bandwidth", "of_arithmetic", "of_roofline") if k in mine[0]}
    report["tests"][test] = {"tandem_tok_s": round(m, 2), "llama_tok_s": round(t, 2), "ratio": round(ratio, 3), **{k: round(v, 3) for k, v in shares.items()},
                             "family": mine[0].get("family"), "tandem_all": [x["tok_s"] for x in mine], "llama_all": theirs}
    print(f"{test:10}{m:10.2f}{t:11.2f}{ratio:8.2f}   " + "  ".join(f"{shares.get(k, float('nan')):12.2f}" for k in ("of_bandwidth", "of_arithmetic", "of_roofline")))
save(a.out, "peer.json", report)
