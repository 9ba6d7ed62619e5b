# SPDX-License-Identifier: Apache-2.0
"""The NCCL back end without a device: the newest library is found; opening a group says what is missing; and its whole
code runs over stand-ins of libnccl and libcuda (fake_nccl.c, fake_cuda.c) with the case list of the other back ends.

What only a device can show is tests/gpu/nccl_ranks.c.
"""
import os
import re
import shutil
import subprocess
import sys
import tempfile

BUILD = os.environ.get("TANDEM_BUILD", "build/release")
TOOL = os.path.join(BUILD, "tests", "tool_nccl")
FAKES = os.path.abspath(os.path.join(BUILD, "tests", "fake"))
passed = failed = 0


def check(ok, *what):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print("failed:", *what, "line", sys._getframe(1).f_lineno)


def tool(*args, **env):
    r = subprocess.run([TOOL, *map(str, args)], capture_output=True, text=True, timeout=120,
                       env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", **env})
    return r.returncode, (r.stdout + r.stderr).strip()


def find(**env):
    rc, out = tool("find", **env)
    m = re.fullmatch(r"(\d+) (\S+)", out)
    return (int(m[1]), m[2]) if rc == 0 and m else (0, out)


def venv_with(lib):
    """A virtual environment whose nvidia/nccl package has this library."""
    d = tempfile.mkdtemp()
    lib_dir = os.path.join(d, "lib", "python3.99", "site-packages", "nvidia", "nccl", "lib")
    os.makedirs(lib_dir)
    shutil.copy(lib, os.path.join(lib_dir, "libnccl.so.2"))
    return d


def main():
    version, path = find()
    if version == 0 and "TD_NCCL=OFF" in path:
        print("SKIP:", path)
        sys.exit(77)
    print(f"NCCL of this machine: {version} ({path})" if version else path)
    check(version > 0 or "no NCCL" in path, path)
    rc, out = tool("open")
    check(rc == 0 and (out == "nccl" or re.match(r"ENOSUP: (no NCCL|NCCL \d+ found, but no device)", out)), out)
    if out != "nccl":
        print("two ranks: not run (no device)")

    new, old = (os.path.join(FAKES, v, "libnccl.so.2") for v in ("new", "old"))
    for lib, env_wins in ((new, True), (old, False)):  # newest of the loader's and a package's
        d = venv_with(lib)
        other = os.path.dirname(old if env_wins else new)
        v, where = find(VIRTUAL_ENV=d, LD_LIBRARY_PATH=other)
        check(v == 29999, v, where)
        check(where.startswith(d) == env_wins, where)
        shutil.rmtree(d)
    libs = os.pathsep.join((os.path.dirname(new), FAKES))
    for n in (1, 2, 3, 4):
        rc, out = tool("cases", n, LD_LIBRARY_PATH=libs)
        check(rc == 0 and re.search(r"^\d{4,} passed, 0 failed$", out, re.M), n, rc, out[-800:])
    # the program for a machine with a device, as far as it goes without: one rank
    r = subprocess.run([os.path.join(BUILD, "tests", "nccl_ranks")], capture_output=True, text=True, timeout=120,
                       env={**os.environ, "ASAN_OPTIONS": "detect_leaks=0", "LD_LIBRARY_PATH": os.pathsep.join((os.path.dirname(old), FAKES))})
    check(r.returncode == 0 and re.search(r"rank 0 of 1, NCCL 22999: \d{4,} passed, 0 failed\ntwo ranks: not run \(NCCL 2.29\)", r.stdout), r.stdout[-500:], r.stderr[-500:])
    print(passed, "passed,", failed, "failed")
    sys.exit(failed != 0)


main()
