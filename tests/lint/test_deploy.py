# SPDX-License-Identifier: Apache-2.0
"""Scripts of deploy/ and tests/: shellcheck has nothing to say, and what they name exists."""
import os
import re
import shutil
import subprocess
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def scripts():
    out = subprocess.run([
        "git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "deploy", "tests"
    ],
                         capture_output=True,
                         check=True).stdout.decode()
    for path in filter(None, out.split("\0")):
        full = os.path.join(ROOT, path)
        if os.path.isfile(full) and not path.endswith(".py"):
            with open(full, "rb") as f:
                if re.match(rb"#!.*\b(ba)?sh\b", f.readline()) or path.endswith(".sh"):
                    yield path


def options_of(program):
    """Every option in common/conf.h."""
    with open(os.path.join(ROOT, "common", "conf.h")) as f:
        return set(re.findall(r'X\(\w+, \w+, "([a-z0-9-]+)"', f.read()))


def unknown_options(text, known):
    """Options of ours in the examples (lines of *.conf, calls of tandem) that no program has."""
    found = re.findall(r"--(?:no-)?([a-z0-9]+(?:-[a-z0-9]+)*)", text)
    return [x for x in found if x not in known]


def main():
    if not shutil.which("shellcheck"):
        print("SKIP: no shellcheck (install shellcheck)")
        return 77
    bad = []
    planted = subprocess.run(["shellcheck", "-"],
                             input="#!/bin/bash\nrm -r $1/*\n",
                             capture_output=True,
                             text=True)
    if planted.returncode == 0:
        bad.append("self-test: shellcheck finds nothing")
    found = sorted(scripts())
    if not {"deploy/mpi/cluster", "deploy/mpi/part", "deploy/quickstart"} <= set(found) or len(found) < 8:
        bad.append(f"self-test: scripts are missing: {found}")
    for path in found:
        r = subprocess.run(["shellcheck", "-x", "-S", "style", path],
                           cwd=ROOT,
                           capture_output=True,
                           text=True)
        if r.returncode:
            bad.append(r.stdout)
    known = options_of("any")
    if unknown_options("a --tensor-parallel-size 2 --no-restart --tensor-parallel 2",
                       known) != ["tensor-parallel"]:
        bad.append("self-test: unknown options")
    folder = os.path.join(ROOT, "deploy", "mpi")
    for name in sorted(x for x in os.listdir(folder) if x.endswith(".conf")):
        with open(os.path.join(folder, name)) as f:
            bad += [f"deploy/mpi/{name}: no option --{x}" for x in unknown_options(f.read(), known)]
    print("\n".join(bad) if bad else f"{len(found)} scripts are clean")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
