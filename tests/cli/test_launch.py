# SPDX-License-Identifier: Apache-2.0
"""The launcher of workers of many ranks, with programs in the worker's place that only live, end or hang: what
it starts, what it does when a part dies or stops, that nothing is left. What real workers do is
tests/e2e/test_ranks.py."""
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time

from support.machine import patience

BUILD = os.environ.get("TANDEM_BUILD", "build/release")
MODEL = os.path.join("tests", "golden", "models", "llama-gqa")
# $WORK: what it writes into out.RANK: its environment and arguments; then it does what $WORK/do.RANK says.
WORKER = r"""#!/bin/sh
r=${OMPI_COMM_WORLD_RANK:-none}
{ echo $$; env; echo "args $*"; } > $WORK/out.$r.tmp
mv $WORK/out.$r.tmp $WORK/out.$r
: > $WORK/start.$r.$$
trap 'echo term > $WORK/term.$r; exit 0' TERM
while :; do
  if [ -f $WORK/do.$r ]; then read -r what < $WORK/do.$r; rm -f $WORK/do.$r; eval "$what"; fi
  [ "$r" != none ] && [ "$r" != 0 ] && [ -f $WORK/term.0 ] && exit 0
  sleep 0.05
done
"""
passed = failed = 0


def check(ok, *what):
    global passed, failed
    passed, failed = passed + bool(ok), failed + (not ok)
    if not ok:
        print("failed:", *what, "line", sys._getframe(1).f_lineno, flush=True)


def until(f, seconds):
    end = time.monotonic() + patience(seconds)
    while time.monotonic() < end:
        x = f()
        if x:
            return x
        time.sleep(0.02)
    return f()


def tagged(mark):
    """Processes that have this value in their environment."""
    found = []
    for p in os.listdir("/proc"):
        if not p.isdigit():
            continue
        try:
            with open(f"/proc/{p}/environ", "rb") as f:
                if mark.encode() in f.read():
                    found.append(int(p))
        except OSError:
            pass
    return found


class Launch:
    def __init__(self, own, worker=("--model", MODEL), env=()):
        self.dir = tempfile.mkdtemp(prefix="tdl")
        shutil.copy(os.path.join(BUILD, "bin", "tandem"), self.dir)
        with open(os.path.join(self.dir, "tandem-worker"), "w") as f:
            f.write(WORKER)
        os.chmod(os.path.join(self.dir, "tandem-worker"), 0o755)
        self.mark = "WORK=" + self.dir
        self.log = open(os.path.join(self.dir, "log"), "w+")
        e = dict(os.environ, WORK=self.dir, ASAN_OPTIONS="detect_leaks=0", **dict(env))
        self.p = subprocess.Popen([os.path.join(self.dir, "tandem"), "launch-worker", *own, "--", *worker],
                                  env=e,
                                  stdout=self.log,
                                  stderr=self.log)

    def out(self, rank, seconds=15):
        path = os.path.join(self.dir, f"out.{rank}")
        until(lambda: os.path.exists(path), seconds)
        with open(path) as f:
            lines = f.read().splitlines()
        return int(lines[0]), dict(x.partition("=")[::2] for x in lines[1:] if "=" in x), lines[-1]

    def do(self, rank, what):
        with open(os.path.join(self.dir, "do.new"), "w") as f:
            f.write(what + "\n")
        os.rename(os.path.join(self.dir, "do.new"), os.path.join(self.dir, f"do.{rank}"))

    def starts(self, rank):
        return len([x for x in os.listdir(self.dir) if x.startswith(f"start.{rank}.")])

    def text(self):
        self.log.seek(0)
        return self.log.read()

    def end(self, seconds, what):
        """Exit status within so many seconds, and nothing left of it."""
        try:
            rc = self.p.wait(patience(seconds))
        except subprocess.TimeoutExpired:
            rc = None
        left = tagged(self.mark)
        check(rc is not None and not left, what, rc, left, self.text()[-1500:])
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        self.p.wait()
        self.log.close()
        shutil.rmtree(self.dir)
        return rc


def held(path):
    """Whether a living launcher (perhaps of another test at the same time) holds this directory's lock."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError:
        return True  # gone meanwhile: nobody left it
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return False
    except OSError:
        return True
    finally:
        os.close(fd)


def launcher_dirs():
    """Directories of launchers. Others come and go with what runs beside this test: one counts as left behind
    when it is new and nobody holds it."""
    return {
        os.path.join(d, x)
        for d in ("/tmp", "/dev/shm")
        for x in os.listdir(d) if x.startswith("tandem-mpi.")
    }


def what_is_started():
    odd = {
        "OMPI_COMM_WORLD_SIZE": "7",
        "PMIX_RANK": "3",
        "PMI_RANK": "3",
        "OMPI_MCA_btl": "nothing",
        "TANDEM_LOG_LEVEL": "debug"
    }
    x = Launch(["--ranks", "2", "--mpi-args", "--mca  mpi_abort_delay 0"],
               ["--model", MODEL, "--name", "a b"], odd)
    for r in (0, 1):
        pid, env, args = x.out(r)
        check(env["OMPI_COMM_WORLD_SIZE"] == "2" and env["OMPI_COMM_WORLD_RANK"] == str(r), env)
        check(
            "PMI_RANK" not in env and env.get("OMPI_MCA_btl") != "nothing"
            and env["TANDEM_LOG_LEVEL"] == "debug", env)
        check(int(env["TANDEM_THREADS"]) == max(1, len(os.sched_getaffinity(0)) // 2), env["TANDEM_THREADS"])
        check(
            args.startswith(
                f"args --model {MODEL} --name a b --tensor-parallel-size=2 --pipeline-parallel-size=1"), args)
        check("TANDEM_LAUNCH_DIR" not in env, env)
    x.p.send_signal(signal.SIGTERM)
    check(x.end(10, "drained") == 0)
    x = Launch([], ["--model", MODEL, "--pipeline-parallel-size", "3", "--threads", "5"])
    check(x.out(2)[1]["OMPI_COMM_WORLD_SIZE"] == "3" and "TANDEM_THREADS" not in x.out(2)[1])
    x.p.send_signal(signal.SIGUSR1)
    check(x.end(10, "drained by SIGUSR1") == 0)
    x = Launch(["--ranks", "1"])  # one rank: no mpirun
    check("OMPI_COMM_WORLD_RANK" not in x.out("none")[1])
    x.p.send_signal(signal.SIGINT)
    check(x.end(10, "one rank drained") == 0)


def cores():
    """How many cores the first processor has for us."""
    found = set()
    for cpu in os.sched_getaffinity(0):
        ids = []
        for name in ("physical_package_id", "core_id"):
            with open(f"/sys/devices/system/cpu/cpu{cpu}/topology/{name}") as f:
                ids.append(int(f.read()))
        found.add(tuple(ids))
    first = min(found)[0]
    return len([x for x in found if x[0] == first])


def files():
    """Host and rank files: as those in deploy/mpi, of this host. A rank file binds each rank to its cores."""
    n = min(2, cores())
    with tempfile.TemporaryDirectory() as d:
        hosts, ranks = os.path.join(d, "hosts"), os.path.join(d, "ranks")
        with open(hosts, "w") as f:
            f.write("localhost slots=2 max_slots=2\n")
        with open(ranks, "w") as f:
            f.write("# which rank where\n" + "".join(f"rank {r}=localhost slot=0:{r % n}\n" for r in (0, 1)))
        for own in (["--ranks", "2", "--hostfile", hosts], ["--ranks", "2", "--rankfile", ranks], ["--hosts", "localhost:2"]):
            x = Launch(own, ["--model", MODEL, "--tensor-parallel-size", "2"])
            on = []
            for r in (0, 1):
                pid, env, _ = x.out(r)
                check(env["OMPI_COMM_WORLD_SIZE"] == "2", own, env)
                on.append(os.sched_getaffinity(pid))
            everywhere = os.sched_getaffinity(0)
            if own[-1] != ranks:
                check(on == [everywhere] * 2, own, on)
            elif n == 2:
                check(on[0] and on[1] and not on[0] & on[1], own, on)
            x.p.send_signal(signal.SIGTERM)
            check(x.end(10, own) == 0)


def death(how, victim, within):
    """A part dies: all ranks end, and come again."""
    x = Launch(["--ranks", "3"], ["--model", MODEL, "--pipeline-parallel-size", "3"])
    pids = [x.out(r)[0] for r in range(3)]
    with open(f"/proc/{pids[0]}/stat") as f:
        mpirun = int(f.read().rsplit(")", 1)[1].split()[1])
    time.sleep(patience(0.3))  # the launcher has seen them
    os.kill(mpirun if victim == "mpirun" else pids[victim], how)
    start = time.monotonic()
    gone = until(lambda: not any(os.path.exists(f"/proc/{p}") for p in [*pids, mpirun]), within)
    check(gone, how, victim, "still there after", within)
    again = until(lambda: all(x.starts(r) == 2 for r in range(3)), 10)
    check(again, "not started again", x.text()[-1500:])
    seconds = time.monotonic() - start
    x.p.send_signal(signal.SIGTERM)
    check(x.end(10, "after restart") == 0)
    return seconds


def ends():
    x = Launch(["--ranks", "2", "--no-restart"])
    x.out(0), x.out(1)
    x.do(1, "exit 3")
    check(x.end(5, "a rank ends badly") == 3)
    x = Launch(["--ranks", "2"])
    x.out(0), x.out(1)
    x.do(0, "exit 2")
    check(x.end(5, "options are refused: not started again") == 2)
    x = Launch(["--ranks", "2", "--no-restart"])  # one leaves in order, the others do not
    x.out(0), x.out(1)
    x.do(1, "exit 0")
    check(x.end(5, "a rank leaves alone") == 1)
    x = Launch(["--ranks", "2"])  # nobody drains: the second signal ends it
    x.out(0), x.out(1)
    x.do(0, "trap '' TERM; echo > $WORK/deaf")
    until(lambda: os.path.exists(os.path.join(x.dir, "deaf")), 5)
    x.p.send_signal(signal.SIGTERM)
    time.sleep(patience(0.5))  # two signals at once would be one
    check(x.p.poll() is None)
    x.p.send_signal(signal.SIGTERM)
    x.end(5, "asked twice")
    x = Launch(["--ranks", "2"], ["--model", MODEL, "--drain-s", "0"])  # or the time to drain is over
    x.out(0), x.out(1)
    x.do(0, "trap '' TERM; echo > $WORK/deaf")
    until(lambda: os.path.exists(os.path.join(x.dir, "deaf")), 5)
    x.p.send_signal(signal.SIGTERM)
    x.end(9, "drain-s is over")
    x = Launch(["--ranks", "2"])  # the launcher itself is killed: nothing goes on (its directory is left)
    x.out(0), x.out(1)
    x.p.kill()
    x.p.wait()
    check(until(lambda: not tagged(x.mark), 5), "left by a killed launcher", tagged(x.mark))
    x.end(1, "killed")


def refused():
    for own, worker, words in (
        (["--ranks", "2"], ["--model", MODEL, "--tensor-parallel-size", "4"], "2 ranks, but tensor 4"),
        ([], ["--model", MODEL, "--tensor-parallel-size",
              "16"], "cannot be divided among tensor-parallel-size 16"),
        (["--ranks", "4"], ["--model", "/nowhere"], "cannot be read here"),
        (["--ranks", "x"], ["--model", MODEL], "not a whole number"),
        (["--rank", "2"], ["--model", MODEL], "did you mean --ranks"),
        ([], ["--model", MODEL, "--rolle", "decode"], "did you mean --role"),
        ([], ["--model", MODEL, "positional"], "unexpected argument"),
    ):
        r = subprocess.run([os.path.join(BUILD, "bin", "tandem"), "launch-worker", *own, "--", *worker],
                           capture_output=True,
                           text=True,
                           timeout=patience(20))
        check(r.returncode == 2 and words in r.stderr, own, worker, r.returncode, r.stderr)
    r = subprocess.run([os.path.join(BUILD, "bin", "tandem"), "launch-worker", "--ranks", "2"],
                       capture_output=True,
                       text=True)
    check(r.returncode == 2 and "options are missing" in r.stderr, r.stderr)
    r = subprocess.run([
        os.path.join(BUILD, "bin", "tandem"), "launch-worker", "--ranks", "2", "--no-restart", "--",
        "--model", MODEL
    ],
                       capture_output=True,
                       text=True,
                       env={"PATH": "/nowhere"},
                       timeout=patience(20))
    check(r.returncode == 127 and "install openmpi-bin" in r.stderr, r.returncode, r.stderr)


if not shutil.which("mpirun"):
    print("SKIP: no mpirun (install openmpi-bin)")
    sys.exit(77)
before = launcher_dirs()
old = ["/tmp/tandem-mpi.abc123", "/dev/shm/tandem-mpi.abc123"]  # of a launcher that was killed
for d in old:
    os.makedirs(os.path.join(d, "below"), exist_ok=True)
    os.utime(d, (1e9, 1e9))
refused()
what_is_started()
files()
for sig in (signal.SIGKILL, signal.SIGSTOP):
    for who in (0, 1, 2, "mpirun"):
        death(sig, who, 3)
check(not any(os.path.exists(d) for d in old), "old files are left")
check(not [d for d in launcher_dirs() - before if not held(d)], "files left", launcher_dirs() - before)
ends()
for d in launcher_dirs() - before:  # of the launcher that was killed
    if not held(d):
        shutil.rmtree(d)
print(passed, "passed,", failed, "failed")
sys.exit(failed != 0)
