"""`cmake --install` gives a tree that serves from wherever it is put; TD_CLUSTER=OFF links the engine and its tools with libc
(and its libm and libdl) alone; the summary is one line and names what was found or left out; a part that was asked for and is not there is an error.
SPDX-License-Identifier: Apache-2.0
"""
import os
import re
import shlex
import subprocess
import tempfile

from support.cluster import BUILD, DEMO, ROOT, questions
from support.report import done, ok
from support.serve import Serve


def run(*argv, status=0):
    r = subprocess.run(argv, capture_output=True, text=True)
    assert (r.returncode == 0) == (status == 0), (argv, r.stdout[-2000:], r.stderr[-2000:])
    return r.stdout + r.stderr


class Installed(Serve):
    def _spawn(self, label, argv):
        with open(os.path.join(self.dir, label + ".log"), "ab") as log:
            self.procs[label] = subprocess.Popen([os.path.join(prefix, "bin", argv[0]), *argv[1:]], stdout=log, stderr=log,
                                                 stdin=subprocess.DEVNULL, cwd="/", env={"HOME": self.dir, "PATH": "/usr/bin:/bin"})
        return label


with tempfile.TemporaryDirectory() as d:
    prefix = os.path.join(d, "else where")
    run("cmake", "--install", BUILD, "--prefix", prefix)
    assert sorted(os.listdir(os.path.join(prefix, "bin"))) == ["tandem", "tandem-router", "tandem-worker"]
    for program in os.listdir(os.path.join(prefix, "bin")):
        libraries = run("ldd", os.path.join(prefix, "bin", program))
        assert "not found" not in libraries and ROOT not in libraries, libraries
    q = questions()[0]
    with Installed(model=DEMO, prefill=1, decode=1) as c:
        assert c.chat(q["messages"], temperature=0)["choices"][0]["message"]["content"] == q["answer"]
        programs = {os.path.dirname(os.readlink(f"/proc/{p}/exe"))
                    for p in open(f"/proc/{c.procs['serve'].pid}/task/{c.procs['serve'].pid}/children").read().split()}
        assert programs == {os.path.join(prefix, "bin")}, programs
    ok("an installed tree serves, with its own programs")

    engine = os.path.join(d, "engine")
    said = run("cmake", "-G", "Ninja", "-S", ROOT, "-B", engine, "-DTD_CLUSTER=OFF", "-DBUILD_TESTING=OFF")
    summary = re.findall(r"^-- tandem .*$", said, re.M)
    assert len(summary) == 1 and re.search(r"CPU kernels.*CUDA.*NCCL.*MPI off; cluster off", summary[0]), said
    link = shlex.split(run("ninja", "-C", engine, "-t", "commands", "bin/tandem").strip().splitlines()[-1])
    assert "bin/tandem" in link, link
    linked = [w for w in link if w.startswith("-l") or re.search(r"\.(so|a)(\.\d+)*$", w)]
    assert "-lm" in linked and all(w in ("-lm", "-ldl") or (w.startswith("lib") and w.endswith(".a")) for w in linked), linked
    made = {w for w in run("ninja", "-C", engine, "-t", "targets", "all").split() if w.startswith("bin/")}
    assert made == {"bin/tandem:"}, made
    ok("TD_CLUSTER=OFF: the engine and its tools, on libc; one summary line")
    why = run("cmake", "-G", "Ninja", "-S", ROOT, "-B", os.path.join(d, "none"), "-DTD_CLUSTER=OFF", "-DBUILD_TESTING=OFF", "-DTD_MPI=ON",
              "-DMPI_C_HEADER_DIR=/nowhere", "-DCMAKE_DISABLE_FIND_PACKAGE_MPI=TRUE", status=1)
    assert "TD_MPI=ON, but MPI was not found: install" in why, why
    ok("what is asked for and missing is an error that says what to install")
done()
