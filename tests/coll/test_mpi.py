# SPDX-License-Identifier: Apache-2.0
"""The MPI back end on this host: mpirun starts tests/coll/tool_ranks.c, which runs the case list of test_coll.c and what only
processes can show (a message beyond 1 GiB, an abort that ends all, waiting without using a core).

Every way of moving bytes is a run: pipes and shared memory with single copy, without it, TCP, and what ranks of different hosts have.
"""
import os
import re
import shutil
import subprocess
import sys
import time

BUILD = os.environ.get("TANDEM_BUILD", "build/release")
TOOL = os.path.join(BUILD, "tests", "tool_ranks")
passed = failed = 0


def check(ok, *what):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print("failed:", *what, "line", sys._getframe(1).f_lineno)


def mpirun(n, case, *options, timeout=120):
    """(exit status, output, seconds); everything started is gone afterwards."""
    env = dict(os.environ, OMPI_MCA_rmaps_base_oversubscribe="1")
    env["ASAN_OPTIONS"] = "detect_leaks=0"  # Open MPI keeps what it allocated
    env["TSAN_OPTIONS"] = "ignore_noninstrumented_modules=1 report_signal_unsafe=0"
    cmd = ["mpirun", "--allow-run-as-root", "--oversubscribe", *options, "-n", str(n), TOOL, case]
    start = time.monotonic()
    r = subprocess.run(["timeout", "-k", "5", str(timeout), *cmd], env=env, capture_output=True, text=True)
    return r.returncode, r.stdout + r.stderr, time.monotonic() - start


def ranks_passed(out):
    """{rank: checks} of the ranks that failed nothing."""
    return {int(m[1]): int(m[2]) for m in re.finditer(r"^rank (\d+): (\d+) passed, 0 failed$", out, re.M)}


def cases(n, *options):
    rc, out, _ = mpirun(n, "cases", *options)
    ok = ranks_passed(out)
    check(rc == 0 and len(ok) == n and min(ok.values()) > 1000, n, options, rc, out[-2000:])
    return out


def alone():
    """Without mpirun: a group of one."""
    r = subprocess.run([TOOL, "cases"], capture_output=True, text=True, timeout=120, env=dict(os.environ, ASAN_OPTIONS="detect_leaks=0"))
    check(r.returncode == 0 and 0 in ranks_passed(r.stdout), r.returncode, r.stdout[-500:], r.stderr[-500:])


def main():
    if not shutil.which("mpirun"):
        print("SKIP: no mpirun (install openmpi-bin)")
        sys.exit(77)
    rc, out, _ = mpirun(1, "cases")
    if rc == 77 or "this build has no MPI" in out:
        print("SKIP: this build has no MPI (install libopenmpi-dev and build again)")
        sys.exit(77)
    check(rc == 0 and 0 in ranks_passed(out), rc, out[-500:])
    for n in (2, 3, 4):
        cases(n)
    cases(3, "--mca", "btl_vader_single_copy_mechanism", "none")
    cases(2, "--mca", "btl", "self,tcp")
    out = cases(3, "--mca", "osc", "^sm", "--mca", "btl", "self,tcp")  # as between hosts: no bells, no pipes
    check("share no memory" in out, out[-500:])
    alone()
    rc, out, _ = mpirun(2, "big")
    check(rc == 0 and len(ranks_passed(out)) == 2, rc, out[-500:])
    rc, out, _ = mpirun(3, "idle")
    check(rc == 0 and len(ranks_passed(out)) == 3, rc, out[-500:])
    for case in ("late", "short", "long", "small-for-large", "large-for-small"):  # a rank that leaves a broken group takes the job with it
        rc, out, _ = mpirun(2, case)
        check(rc != 0 and 1 in ranks_passed(out), case, rc, out[:500])
    rc, out, seconds = mpirun(3, "abort")
    check(rc not in (0, 124) and seconds < 20 and not ranks_passed(out) and "a test" in out, rc, seconds, out[-500:])
    print(passed, "passed,", failed, "failed")
    sys.exit(failed != 0)


main()
