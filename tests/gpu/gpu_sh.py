# SPDX-License-Identifier: Apache-2.0
"""Running programs, several at once, for tests/gpu/run and its parts; what the device's clocks did meanwhile."""
import concurrent.futures
import os
import statistics
import subprocess

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
running = set()
ended = False


def sh(args, timeout=None, **kw):
    """(status, output); 124: out of time, with what it had said until then; 125: after stop(); 127: not there."""
    if ended:
        return 125, "ended from outside"
    if timeout is not None and timeout <= 0:
        return 124, "no time left"
    try:
        p = subprocess.Popen(args, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             errors="replace", **kw)
    except OSError as e:
        return 127, str(e)
    running.add(p)
    try:
        out = p.communicate(timeout=timeout)[0]
        return p.returncode, out
    except subprocess.TimeoutExpired:
        p.kill()
        return 124, p.communicate()[0]
    finally:
        running.discard(p)


def stop():
    """Ends what is still running; nothing more begins."""
    global ended
    ended = True
    for p in list(running):
        p.kill()


def side_by_side(fn, items, workers):
    """fn of each, in their order. What programs on a device mostly do is what the host does: read, pack, compare."""
    with concurrent.futures.ThreadPoolExecutor(max(1, workers)) as pool:
        return list(pool.map(fn, items))


class Clocks:
    """The device's clocks and power, twice a second from begin() to end(): what a figure was measured at."""
    FIELDS = ["clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "clocks_event_reasons.active"]

    def __init__(self, smi):
        self.smi, self.p = smi, None

    def begin(self):
        if self.smi:
            self.p = subprocess.Popen([self.smi, "--query-gpu=" + ",".join(self.FIELDS), "--format=csv,noheader,nounits", "-i", "0",
                                       "-lms", "500"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)

    def end(self):
        if not self.p:
            return None
        self.p.terminate()
        said, self.p = self.p.communicate()[0], None
        return self.summary(said)

    @classmethod
    def summary(cls, said):
        """Smallest, median and largest of each figure; why clocks were held back, as the driver's bits of all samples."""
        rows = [[v.strip() for v in line.split(",")] for line in said.splitlines() if line.count(",") == len(cls.FIELDS) - 1]
        out, reasons = {"samples": len(rows)}, 0
        for i, name in enumerate(("sm_mhz", "mem_mhz", "power_w", "celsius")):
            v = [float(r[i]) for r in rows if r[i].replace(".", "", 1).isdigit()]
            if v:
                out[name] = [min(v), statistics.median(v), max(v)]
        for r in rows:
            if r[-1].startswith("0x"):
                reasons |= int(r[-1], 16)
        return {**out, "held_back_by": hex(reasons)} if rows else None
