"""The collective layer between two ranks on one host, against what the machine can do in the same run.

    python tests/bench/coll.py [--runs 7]

threads and mpi take turns (tests/bench/bench_coll.c, which measures its rivals in the same rounds); a run's figure is its best
round, since other work on the machine only ever adds; the report's is the median over runs.
goals: all-gather of 1 MiB >= 0.8 of the speed of memcpy through shared memory; 8 bytes there and back / 2 <= 1.5 of MPI's own.
SPDX-License-Identifier: Apache-2.0
"""
import argparse
import json
import os
import statistics
import time

from common import BUILD, RESULTS, finish, output

TOOL = os.path.join(BUILD, "tests", "bench_coll")
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "2"] # bound to cores, as mpirun does by itself

p = argparse.ArgumentParser()
p.add_argument("--runs", type=int, default=7)
p.add_argument("--out", default=RESULTS)
a = p.parse_args()


def once(kind):
    return json.loads(output((MPIRUN if kind == "mpi" else []) + [TOOL, kind], 120))


runs = {"threads": [], "mpi": []}
for _ in range(a.runs):
    for kind in runs:
        runs[kind].append(once(kind))
mpi_pingpong = [r["mpi_pingpong"][1] for r in runs["mpi"]]
report = {"date": time.strftime("%Y-%m-%d"), "command": f"python tests/bench/coll.py --runs {a.runs}", "load": os.getloadavg()[0]}
for kind, rs in runs.items():
    best = {k: round(statistics.median(r[k][1] for r in rs), 3) for k in rs[0]}
    report[kind] = {
        "us": best,
        "all_gather_1m_in_place_of_shm": round(statistics.median(r["shm"][1] / r["in_place"][1] for r in rs), 2),
        "all_gather_1m_of_shm_gather": round(statistics.median(r["shm_gather"][1] / r["gather"][1] for r in rs), 2),
        "pingpong_of_mpi": round(statistics.median(r["pingpong"][1] / m for r, m in zip(rs, mpi_pingpong)), 2),
    }
ok = all(min(report[k]["all_gather_1m_in_place_of_shm"], report[k]["all_gather_1m_of_shm_gather"]) >= 0.8 and report[k]["pingpong_of_mpi"] <= 1.5 for k in runs)
finish(a.out, "coll.json", report, ok)
