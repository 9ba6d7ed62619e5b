"""What the benchmarks here share: where things are, a run of a tool, a report as a file.
SPDX-License-Identifier: Apache-2.0
"""
import json
import os
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.environ.get("TANDEM_BUILD") or os.path.join(ROOT, "build", "release")
RESULTS = os.path.join(ROOT, "tests", "bench", "results")
MPIRUN = ["mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2"]


def output(cmd, seconds):
    """What it prints; ends this program when it fails or takes longer."""
    r = subprocess.run(["timeout", str(seconds), *cmd], capture_output=True, text=True)
    if r.returncode:
        sys.exit(f"{' '.join(cmd)}: {r.returncode} {r.stderr[-500:]}")
    return r.stdout


def save(out, name, report):
    os.makedirs(out, exist_ok=True)
    with open(os.path.join(out, name), "w") as f:
        json.dump(report, f, indent=1)
        f.write("\n")


def finish(out, name, report, ok):
    """Writes the report, prints it, ends this program: 1 when a goal was missed."""
    report["goals_met"] = ok
    save(out, name, report)
    print(json.dumps(report, indent=1))
    sys.exit(not ok)
