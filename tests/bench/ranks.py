"""Workers of two ranks against one process with two threads, on the same two cores: `tandem bench engine` with and without mpirun.

    python tests/bench/ranks.py [--rounds 3] [--shape 1b] [--gen 64] [--only tp,pp,chunks,fsdp]

Dummy weights. Each pair takes turns (A B A B ..) within this run. Ratios are two ranks over one process:

tp      TP 2, 1 thread a rank: decode of 1 and 8 sequences, prefill of 512 tokens            goal >= 0.9 each
pp      PP 2, 16 sequences in two micro-batches of 8, against one process's batch of 8       goal >= 0.9
chunks  PP 2 as a prefill worker, a prompt of 2,048 in chunks of at most 256                 goal >= 0.9
        (in the last layer only rows whose logits are wanted go on: of 16 layers the first stage has 8 of 15.1, so 0.945 is the most,
        and of 32 steps of 64 rows one is waited for: 0.92)
fsdp    weights sharded over CP 2: memory of a rank <= half the weights + two gathered units; which part of the gathers was
        beside other work, and the speed

`wall` is tokens per second by the clock (best and median), as far as other work on the machine lets it be; `cpu` is tokens per
second of processor time of the rank that takes the most (one process: its time over its threads), what the clock would say on
idle cores if nobody waited: synchronization and pipeline bubbles are not in it. `load` is the machine's 1 minute average.
SPDX-License-Identifier: Apache-2.0
"""
import argparse
import json
import os
import statistics
import time

from common import BUILD, MPIRUN, RESULTS, output, save

TOOL = os.path.join(BUILD, "bin", "tandem")
GOAL = 0.9

p = argparse.ArgumentParser()
p.add_argument("--rounds", type=int, default=3)
p.add_argument("--repeats", type=int, default=1, help="of each test within a process, after one to warm up")
p.add_argument("--shape", default="1b")
p.add_argument("--gen", type=int, default=64)
p.add_argument("--prompt", type=int, default=512)
p.add_argument("--long", type=int, default=2048)
p.add_argument("--only", default="tp,pp,chunks,fsdp")
p.add_argument("--timeout", type=int, default=900)
p.add_argument("--out", default=RESULTS)
a = p.parse_args()

TP, PP, FSDP = ["--tensor-parallel-size", "2"], ["--pipeline-parallel-size", "2"], ["--context-parallel-size", "2", "--fully-sharded"]
g, n = str(a.gen), str(a.prompt)
LONG = ["-p", str(a.long), "-n", "0", "--max-prefill-chunk", "256"]
# name: (arguments of one process, of two ranks, [(name, test of one, test of two)])
PAIRS = {
    "tp": (["-p", n, "-n", g, "-B", "1,8"], TP + ["-p", n, "-n", g, "-B", "1,8"],
           [("prefill", f"pp{n}", f"pp{n}"), ("decode_1", f"tg{g}", f"tg{g}"), ("decode_8", f"tg{g}xB8", f"tg{g}xB8")]),
    "pp": (["-p", "0", "-n", g, "-B", "8"], PP + ["-p", "0", "-n", g, "-B", "16"], [("decode_16", f"tg{g}xB8", f"tg{g}xB16")]),
    "chunks": (LONG, PP + LONG + ["--role", "prefill"], [("prefill_chunks", f"pp{a.long}", f"pp{a.long}")]),
    "fsdp": (["-p", n, "-n", g, "-B", "8"], FSDP + ["-p", n, "-n", g, "-B", "8"],
             [("prefill", f"pp{n}", f"pp{n}"), ("decode_8", f"tg{g}xB8", f"tg{g}xB8")]),
}


def once(args, ranks):
    cmd = [*(MPIRUN if ranks > 1 else []), TOOL, "bench", "engine", "--load-format", "dummy", "--shape", a.shape,
           "-t", str(2 // ranks), "-r", str(a.repeats), "--log-level", "warn", "--json", "-", *args]
    return {j["test"]: j for j in map(json.loads, output(cmd, a.timeout).splitlines())}


def tokens(test):
    name, _, batch = test.partition("xB")
    return int(name[2:]) * int(batch or 1)


def cpu_rate(name, j):
    return tokens(name) / max(j["cpu_s"]) * (j["threads"] if j["ranks"] == 1 else 1)


def compare(name_a, name_b, rounds):
    wall_a, wall_b = ([x for r in rounds for x in r[k][t]["all"]] for k, t in ((0, name_a), (1, name_b)))
    cpu_a, cpu_b = ([cpu_rate(t, r[k][t]) for r in rounds] for k, t in ((0, name_a), (1, name_b)))
    return {
        "one_tok_s": round(max(wall_a), 3), "two_tok_s": round(max(wall_b), 3),
        "wall_best": round(max(wall_b) / max(wall_a), 3),
        "wall_median": round(statistics.median(wall_b) / statistics.median(wall_a), 3),
        "one_cpu_tok_s": round(max(cpu_a), 3), "two_cpu_tok_s": round(max(cpu_b), 3),
        "cpu_best": round(max(cpu_b) / max(cpu_a), 3),
        "cpu_median": round(statistics.median(cpu_b) / statistics.median(cpu_a), 3),
        "read_gb_s": [max(r[k][t]["read_gb_s"] for r in rounds) for k, t in ((0, name_a), (1, name_b))],
        "peak_gflop_s": [max(r[k][t]["peak_gflop_s"] for r in rounds) for k, t in ((0, name_a), (1, name_b))],
        "steps": [rounds[-1][0][name_a]["steps"], rounds[-1][1][name_b]["steps"]],
        "rank_cpu_s": min((r[1][name_b]["cpu_s"] for r in rounds), key=sum),
    }


path = os.path.join(a.out, "ranks.json")
report = {}
if os.path.exists(path):
    with open(path) as f:
        report = json.load(f)
for what in a.only.split(","):
    one, two, tests = PAIRS[what]
    rounds, load = [], []
    for _ in range(a.rounds):
        rounds.append((once(one, 1), once(two, 2)))
        load.append(round(os.getloadavg()[0], 1))
    entry = {"date": time.strftime("%Y-%m-%d"), "shape": a.shape, "rounds": a.rounds, "load": load,
             "command": f"python tests/bench/ranks.py --only {what} --rounds {a.rounds} --repeats {a.repeats} --gen {a.gen} --prompt {a.prompt} --long {a.long} --shape {a.shape}"}
    for name, ta, tb in tests:
        entry[name] = compare(ta, tb, rounds)
        entry[name]["goal"] = None if what == "fsdp" else GOAL
        print(what, name, {k: entry[name][k] for k in ("one_tok_s", "two_tok_s", "wall_best", "wall_median", "cpu_best", "cpu_median")}, flush=True)
    if what == "fsdp":
        whole = rounds[-1][0][tests[0][1]]["of_rank"][0]["weights_mb"]
        parts = rounds[-1][1][tests[0][2]]["of_rank"]
        entry["weights_mb"] = whole
        entry["of_rank"] = parts
        entry["memory_within_goal"] = all(r["weights_mb"] <= 0.5 * whole * 1.001 + 2 * r["unit_mb"] for r in parts)
        for name, _, tb in tests:
            entry[name]["gather_overlap"] = [r[1][tb].get("gather_overlap") for r in rounds]
        print("fsdp", whole, parts, entry["memory_within_goal"], [entry[t[0]]["gather_overlap"] for t in tests], flush=True)
    report[what] = entry
    save(a.out, "ranks.json", report)
missed = [f"{w} {k}" for w in report for k, v in report[w].items() if isinstance(v, dict) and v.get("goal") and v["wall_best"] < v["goal"]]
print("below the goal by the clock:", ", ".join(missed) or "none")
