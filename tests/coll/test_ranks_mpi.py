# SPDX-License-Identifier: Apache-2.0
"""A covering subset of tests/worker/test_ranks.c over processes: mpirun starts it, rank 0 compares with one rank, byte for byte."""
import os
import shutil
import subprocess
import sys

BUILD = os.environ.get("TANDEM_BUILD", "build/release")
TOOL = os.path.join(BUILD, "tests", "worker_test_ranks")
# shape, tensor, pipeline, context, experts, fully sharded, data
GRIDS = [
    ("ranks-tiny", 2, 1, 1, 0, 0),
    ("ranks-tiny", 1, 2, 1, 0, 0),
    ("ranks-tiny", 1, 1, 2, 0, 1),
    ("ranks-mqa", 2, 2, 1, 0, 0),
    ("ranks-mqa", 1, 2, 2, 0, 0),
    ("moe-tiny", 2, 1, 2, 1, 0),
    ("moe-tiny", 2, 2, 2, 1, 1),
    ("ranks-tiny", 1, 2, 1, 0, 1, 2),
    ("moe-tiny", 2, 1, 1, 1, 1, 2),
]


def main():
    if not shutil.which("mpirun"):
        print("SKIP: no mpirun")
        return 77
    env = dict(os.environ, OMPI_MCA_rmaps_base_oversubscribe="1", ASAN_OPTIONS="detect_leaks=0")
    failed = 0
    for shape, *sizes in GRIDS:
        sizes = (sizes + [1])[:6]  # one replica unless told
        n = sizes[0] * sizes[1] * sizes[2] * sizes[5]
        cmd = ["timeout", "-k", "5", "120", "mpirun", "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", str(n),
               TOOL, "mpi", shape, *map(str, sizes)]
        r = subprocess.run(cmd, env=env, capture_output=True, text=True)
        if "MPI is not in this build" in r.stdout + r.stderr:
            print("SKIP: built without MPI")
            return 77
        ok = r.returncode == 0 and (r.stdout + r.stderr).count(" passed, 0 failed") == n
        failed += not ok
        print("ok" if ok else "failed", shape, "tensor %d, pipeline %d, context %d, experts %d, sharded %d, data %d" % tuple(sizes))
        if not ok:
            print((r.stdout + r.stderr)[-2000:])
    print(f"{len(GRIDS) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
