"""Fully sharded weights over two replicas on one host: memory of a rank, and what the gathers cost.

    python tests/bench/shard.py [--shape 0.5b] [--runs 3]

tests/bench/bench_shard.c runs the same steps with whole and with sharded weights, 1 thread a rank. goal: memory of a rank <= 0.5 of
the weights + the two largest gathered layers. The overlap is the part of the gathers' own time in which no rank waited; the CPU
back ends move bytes while a rank waits and at no other time, so there it is what other waits of the step give.
SPDX-License-Identifier: Apache-2.0
"""
import argparse
import json
import os
import time

from common import BUILD, MPIRUN, RESULTS, finish, output

TOOL = os.path.join(BUILD, "tests", "bench_shard")

p = argparse.ArgumentParser()
p.add_argument("--shape", default="0.5b")
p.add_argument("--runs", type=int, default=3)
p.add_argument("--out", default=RESULTS)
a = p.parse_args()


def once(kind):
    return json.loads(output((MPIRUN if kind == "mpi" else []) + [TOOL, kind, a.shape], 300))


report = {"date": time.strftime("%Y-%m-%d"), "command": f"python tests/bench/shard.py --shape {a.shape} --runs {a.runs}", "load": os.getloadavg()[0]}
ok = True
for kind in ("threads", "mpi"):
    runs = [once(kind) for _ in range(a.runs)]
    first = runs[0]
    limit = first["whole_bytes"] / 2 + 2 * first["unit_bytes"]
    of_limit = first["resident_bytes"] / limit
    # what does not divide: the last norm, vocabulary in steps of 32 rows
    ok = ok and of_limit <= 1.001
    out = {"resident_mb": round(first["resident_bytes"] / 1e6, 1), "whole_mb": round(first["whole_bytes"] / 1e6, 1),
           "largest_layer_mb": round(first["unit_bytes"] / 1e6, 1), "resident_of_limit": round(of_limit, 4)}
    for rows in (k for k in first if k.startswith("rows_")):
        best = min((r[rows] for r in runs), key=lambda r: r["sharded_us"])
        whole = min(r[rows]["whole_us"] for r in runs)
        out[rows] = {"whole_us": whole, "sharded_us": best["sharded_us"], "speed_of_whole": round(whole / best["sharded_us"], 2),
                     "gather_alone_us": best["gather_alone_us"], "waited_us": best["waited_us"],
                     "overlap": round(max(0.0, 1 - best["waited_us"] / best["gather_alone_us"]), 2)}
    report[kind] = out
finish(a.out, "shard.json", report, ok)
