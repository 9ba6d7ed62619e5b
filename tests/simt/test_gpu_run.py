#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""tests/gpu/run itself, on the programs of the shim and tiny sizes: everything that it would ask of a device is run, parsed and
shown, and an error of each kind is seen."""
import glob
import importlib.machinery
import importlib.util
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
BUILD = os.environ.get("TANDEM_BUILD", os.path.join(ROOT, "build/release"))
RUN = os.path.join(ROOT, "tests/gpu/run")
bad = []


def expect(ok, what):
    if not ok:
        bad.append(what)


def run(folder, *more, **env):
    with tempfile.TemporaryDirectory() as results:
        r = subprocess.run([sys.executable, RUN, "--shim", "--build", folder, "--results", results, *more], capture_output=True,
                           text=True, env={**os.environ, "SIMT_MEMORY": "512", **env})
        files = glob.glob(results + "/*.json")
        report = {}
        if files:
            with open(files[0], encoding="utf-8") as f:
                report = json.load(f)
        expect(len(files) == len(glob.glob(results + "/*.txt")), "as many tables as JSON files")
        return r.returncode, r.stdout + r.stderr, report


def load():
    loader = importlib.machinery.SourceFileLoader("gpu_run", RUN)
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_run", loader))
    loader.exec_module(module)
    return module


def test_all():
    rc, out, r = run(BUILD)
    expect(rc == 0, f"status {rc}: {out[-3000:]}")
    if rc:
        return
    expect([t["test"] for t in r["tests"]] == ["selftest", "choose_cuda"] and all(t["ok"] for t in r["tests"]), "tests")
    expect([g["test"] for g in r["goldens"]] == ["golden llama-gqa"] and "the same bytes" in r["goldens"][0]["what"], "goldens")
    cases = [b["case"] for b in r["bench"] if "case" in b]
    for part in ("gemm qkv", "decode attention", "prompt attention", "sample", "gather"):
        expect(any(part in c for c in cases), f"no case {part}")
    ratios = [b["ratio"] for b in r["bench"] if "ratio" in b]
    expect(sum("ceiling" in b for b in r["bench"]) == 2 and sum("default" in b for b in ratios) == 2 and len(ratios) == 4, f"ratios: {ratios}")
    steps = [b for b in r["bench"] if b.get("case", "").startswith("step ")]
    expect([b["case"].split()[-1] for b in steps] == ["replayed"] * 2 + ["queued"] * 2 + ["apart"] * 2, f"steps: {steps}")
    expect([b["between"] for b in r["bench"] if "between" in b] == ["steps of ranks-tiny x1", "steps of ranks-tiny x2"], "time between steps")
    tests = ["pp70", "tg2@20", "tg2xB2@20"]
    expect([(e["mode"], e["test"]) for e in r["engine"]] ==
           [("fast", t) for t in tests] + [("fast", "tg6xB3@5")] + [("deterministic", t) for t in tests], "engine")
    expect(all(e["load_s"] > 0 for e in r["engine"]) and "first_token_s" in r["engine"][0] and "idle_us" in r["engine"][3], "load and time between steps")
    expect(r["complete"] and list(r["steps"]) == ["tests", "goldens", "kernels", "a step", "engine 1", "engine 2", "engine 3"], f"steps: {r['steps']}")
    expect({e["numerics"] for e in r["engine"] if e["mode"] == "deterministic"} == {"cuda-sm80-bf16"}, "deterministic id")
    expect({e["numerics"] for e in r["engine"] if e["mode"] == "fast"} == {"cuda-fast-sm80-lt120901-bf16"}, "fast id")
    expect(sorted(r["deterministic_cost"]) == sorted(tests), "cost of the deterministic mode")
    for text in ("simt host emulation", "ok   golden llama-gqa", "engine fast", "deterministic mode, pp70", "goal at most 1.15", "0 failed",
                 "check of the kernels before use", "idle between steps of ranks-tiny x2", "device idle between steps", "from the command to a first token"):
        expect(text in out, f"the table has no {text}: {out[-3000:]}")


def test_failures():
    rc, out, r = run(BUILD, "--no-bench", SIMT_FAIL_AFTER="40")
    expect(rc == 1 and any(not g["ok"] for g in r["goldens"]) and "FAIL" in out, f"a failing device: status {rc}")
    rc, out, r = run(BUILD, "--no-bench", SIMT_DEVICES="0")
    expect(rc == 1 and all(not t["ok"] and not t["skipped"] and "no CUDA-capable device" in t["what"] for t in r["tests"]),
           f"programs that find no device where there is one: status {rc}, {r.get('tests')}")
    with tempfile.TemporaryDirectory() as empty:
        rc, out, r = run(empty)
        expect(rc == 1 and "not built" in out and any("bench engine, fast" in e for e in r["errors"]), f"no programs: status {rc}")


def test_ended():
    """Ended from outside: what was done before is on disk, and says that it is not all; nothing is left running."""
    with tempfile.TemporaryDirectory() as results:
        p = subprocess.Popen([sys.executable, RUN, "--shim", "--build", BUILD, "--results", results, "--commit", "abc1234"],
                             stdout=subprocess.PIPE, text=True, env={**os.environ, "SIMT_MEMORY": "512"})
        said = ""
        for line in p.stdout: # of tests, goldens, then the benchmark is under way
            said += line
            if line.startswith("goldens:"):
                break
        expect(len(glob.glob(results + "/*abc1234*.json")) == 1, "nothing on disk after two steps")
        p.terminate()
        said += p.stdout.read()
        rc = p.wait()
        files = glob.glob(results + "/*abc1234*.json")
        expect(rc == 1 and len(files) == 1, f"ended: status {rc}, {files}")
        with open(files[0], encoding="utf-8") as f:
            r = json.load(f)
        expect(not r["complete"] and r["commit"] == "abc1234" and len(r["tests"]) == 2 and len(r["goldens"]) == 1 and not r["engine"], "what was done")
        expect("NOT COMPLETE" in said and "ended from outside" in said, f"said: {said[-500:]}")


def test_sh():
    """Programs side by side in their order; what one had said when its time was over; clocks."""
    m = load()
    expect(m.sh([sys.executable, "-c", "import signal; print('so far', flush=True); signal.pause()"], 3) == (124, "so far\n"), "out of time")
    expect(m.sh(["/nonexistent/program"])[0] == 127, "not there")
    expect(m.side_by_side(lambda x: x * x, [3, 1, 2], 2) == [9, 1, 4], "order")
    c = m.Clocks.summary("1980, 2619, 650.5, 60, 0x0000000000000004\n1500, 2619, 700.1, 64, 0x0000000000000000\nx\n1700, 2619, [N/A], 66, 0x8\n")
    expect(c == {"samples": 3, "sm_mhz": [1500, 1700, 1980], "mem_mhz": [2619] * 3, "power_w": [650.5, 675.3, 700.1],
                 "celsius": [60, 64, 66], "held_back_by": "0xc"}, f"clocks {c}")
    expect(m.Clocks.summary("Field is not supported\n") is None, "no clocks")


FAKE_DRIVER = """
#include <stddef.h>
#include <string.h>
int cuInit(unsigned f) { (void)f; return 0; }
int cuDriverGetVersion(int *v) { *v = 13010; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return COUNT ? 0 : 101; }
int cuDeviceGetName(char *s, int n, int d) { (void)d; strncpy(s, "Fake H200", (size_t)n); return 0; }
int cuDeviceTotalMem_v2(size_t *n, int d) { (void)d; *n = (size_t)141 << 30; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { (void)d; *v = a == 75 ? 9 : a == 20 ? 3 : 0; return 0; }
"""


def test_driver():
    """The device as the driver itself tells it, where there is no nvidia-smi."""
    m = load()
    expect(m.driver_says("/nonexistent/libcuda.so") is None, "no driver")
    with tempfile.TemporaryDirectory() as tmp:
        for count in (0, 1):
            lib = os.path.join(tmp, f"libcuda{count}.so")
            subprocess.run(["cc", "-shared", "-fPIC", f"-DCOUNT={count}", "-x", "c", "-", "-o", lib], input=FAKE_DRIVER, text=True, check=True)
            said = m.driver_says(lib)
            expect(said == ({"name": "Fake H200", "driver_version": "for CUDA 13.1", "compute_cap": "9.0", "memory_total": "144384 MiB",
                             "clocks_max_sm": "unknown", "compute_mode": "Exclusive_Process"} if count else None), f"driver: {said}")
            expect(not said or m.arch_of(said) == "90a", "target")
    expect(m.cache_place("b", "/", 0) == "/" and m.cache_place("b", "/", 1 << 60) == "b" and m.cache_place("b", "/nonexistent", 0) == "b", "cache")
    expect(m.Programs("x", False, False).workers == 1, "one program at a time where the device takes one")


def test_list():
    """Every test program of tests/gpu/gpu.cmake is run, or said not to be."""
    m = load()
    with open(os.path.join(ROOT, "tests/gpu/gpu.cmake"), encoding="utf-8") as f:
        shared = re.search(r"set\(gpu_shared ([^)]*)\)", f.read()).group(1).split()
    files = glob.glob(ROOT + "/tests/simt/test_*.c") + glob.glob(ROOT + "/tests/gpu/test_*.c") + shared
    names = {os.path.basename(f)[len("test_"):-len(".c")] for f in files}
    listed = m.TESTS + m.NOT_HERE
    expect(set(listed) == names and len(listed) == len(names), f"programs and list differ: {sorted(set(listed) ^ names)}")
    expect(all(t.split()[0] in m.TESTS for _, some in m.SANITIZED for t in some), "a sanitized program is not in the list")
    expect(all(t in m.TESTS for t in m.HOPPER_ONLY), "what is Hopper's is not in the list")


def test_parts():
    m = load()
    between = {"between": "steps of x", "us": 11, "goal_us_at_most": 10}
    expect("missed" in m.bench_row(between) and "reached" in m.bench_row({**between, "us": 9}), "time between steps")
    took = {"took": "x", "ms": 201, "goal_ms_at_most": 200}
    expect("missed" in m.bench_row(took) and "reached" in m.bench_row({**took, "ms": 199}), "time that something took")
    slow = {"mode": "fast", "test": "tg32xB256@128", "idle_us": 12.0, "first_token_s": 4.0}
    expect(sorted(m.parts.limits(slow)) == ["first_token_s", "idle_us"] and not m.parts.limits({**slow, "mode": "deterministic"}), "limits")
    row = {"case": "x", "us": 1, "gb_s": 1, "tflop_s": 1, "share": 0.5}
    expect("missed" in m.bench_row({**row, "goal": 0.6}) and "reached" in m.bench_row({**row, "goal": 0.5}), "goals")
    expect("goal" not in m.bench_row(row) and m.bench_row({"device": "x"}) is None, "rows without a goal")
    expect("missed" in m.bench_row({"ratio": "r", "value": 1.2, "goal_at_most": 1.15}), "a ratio over its goal")
    v = m.verdict
    expect(v(0, "3 passed, 0 failed", False)["ok"] and not v(0, "3 passed, 1 failed", False)["ok"] and not v(0, "", True)["ok"], "verdicts")
    expect(not v(1, "3 passed, 0 failed", True)["ok"], "statuses")
    expect(v(77, "SKIP", True)["ok"] and v(77, "SKIP", True)["skipped"] and not v(77, "SKIP", False)["ok"], "skips: Hopper's elsewhere only")
    logits = {"logits_0": ([2, 3], [1.0, 2, 3, 4, 5, 6])}
    worse = {"logits_0": ([2, 3], [1.0, 2, 3, 4, 5, 6.6])}
    expect(m.parts.compare(logits, logits) == (0.0, 0.0), "equal logits")
    err, kl = m.parts.compare(logits, worse)
    expect(abs(err - 0.1) < 1e-9 and kl > 1e-3, f"error {err}, KL {kl}")
    expect(m.parts.compare(logits, {"logits_0": ([1, 3], [1.0, 2, 3])})[0] == float("inf"), "another shape")
    nan = {"logits_0": ([2, 3], [1.0, 2, 3, 4, 5, float("nan")])}
    expect(m.parts.compare(logits, nan)[0] == float("inf"), "no number")
    cost = m.parts.deterministic_cost([{"mode": "fast", "test": "a", "tok_s": 20.0}, {"mode": "deterministic", "test": "a", "tok_s": 16.0},
                                       {"mode": "fast", "test": "b", "tok_s": 1.0}])
    expect(cost == {"a": 0.25}, f"cost {cost}")


def test_kernels():
    """`tandem bench kernels` on the CPU, as on a device."""
    tandem = os.path.join(BUILD, "simt/simt_tandem")
    r = subprocess.run([tandem, "bench", "kernels", "--shape", "ranks-tiny", "-r", "1", "-t", "1", "--ops", "auto", "--json", "-"],
                       capture_output=True, text=True, env={**os.environ, "SIMT_DEVICES": "0"})
    rows = [json.loads(line) for line in r.stdout.splitlines()]
    expect(r.returncode == 0 and len(rows) == 24, f"bench kernels: status {r.returncode}, {len(rows)} rows: {r.stderr[-500:]}")
    expect(all(x["us"] > 0 and x["of_bandwidth"] > 0 for x in rows) and {x["family"] for x in rows} != {"cuda"}, "figures of kernels")
    bad_shape = subprocess.run([tandem, "bench", "kernels", "--shape", "70b"], capture_output=True, text=True)
    expect(bad_shape.returncode == 2 and "not one of" in bad_shape.stderr, f"a bad shape: {bad_shape.stderr}")


def test_codes():
    """The cases of products of codes, which only Hopper has."""
    r = subprocess.run([os.path.join(BUILD, "simt/simt_bench_cuda"), "cublasLt path"], capture_output=True, text=True,
                       env={**os.environ, "SIMT_MEMORY": "512", "SIMT_ARCH": "90"})
    rows = [json.loads(line) for line in r.stdout.splitlines()]
    cases, ratios = [b["case"] for b in rows if "case" in b], [b["ratio"] for b in rows if "ratio" in b]
    expect(r.returncode == 0 and len(cases) == 6 and sum("fp8 blocks" in c for c in cases) == 2, f"products of codes: {r.stdout} {r.stderr}")
    expect(len(ratios) == 4 and sum(" fp8 T=" in c for c in ratios) == 2, f"ratios of codes: {ratios}")


def fat(*entries):
    """A fat binary: (kind, target, bytes) each."""
    body = b"".join(struct.pack("<HHIQIIHHI", kind, 0x101, 64, n, 0, 0, 8, 1, arch).ljust(64, b"\0") + bytes(n) for kind, arch, n in entries)
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


def test_built():
    """A library that a bare GPU machine lacks, and kernels that are there as PTX only, are seen."""
    b = load().built
    expect(b.foreign(b.needed(os.path.join(BUILD, "simt/simt_tandem"))), "the shim's program needs more than the C library")
    expect(not b.foreign(["libc.so.6", "libm.so.6", "ld-linux-x86-64.so.2", "libcublasLt.so.13"]) and b.foreign(["libstdc++.so.6"]), "names")
    all3, hopper, late = fat((2, 80, 40), (2, 90, 8), (1, 100, 9), (2, 100, 24)), fat((2, 90, 16)), fat((2, 80, 8), (1, 100, 8))
    expect(b.code_of(b"x" + all3 + bytes(40) + hopper + bytes(40)) == [{80, 90, 100}, {90}], f"targets: {b.code_of(all3)}")
    found = b.code_of(all3 + hopper + hopper + all3)
    expect(b.without_code(found, ["80", "90a", "100"]) == "" and b.without_code(b.code_of(hopper * 9), ["90a"]) == "", "all is there")
    for some in (all3 + late, all3 + hopper * 3, b""):
        expect("machine code" in b.without_code(b.code_of(some + bytes(40)), ["80", "90a", "100"]), "something is not there")


def test_cut():
    """What there is no time for is cut and said, and no program outlives its part."""
    m = load()
    p, past, none = m.Programs(BUILD, True), time.time() - 1, [{"cut": True, "ok": True}] * 2
    same = lambda got: [{k: r[k] for k in ("cut", "ok")} for r in got] # noqa: E731
    expect(same(m.run_tests(p, m.SHIM_TESTS, past, False)[0]) == none, "tests")
    expect(same(m.parts.run_goldens(p.tandem, past, 1, ["llama-gqa", "qwen3"])) == none, "goldens")
    found, cut, errors = m.run_bench(p.bench, past)
    expect(not found and not errors and "simt_bench_cuda: after 0 s" in cut[0], f"kernels: {cut} {errors}")
    found, cut, errors = m.parts.run_engine(p.tandem, "ranks-tiny", "fast", ["-p", "1"], "/tmp", past)
    expect(not found and not errors and "bench engine, fast" in cut[0], f"engine: {cut} {errors}")
    with tempfile.TemporaryDirectory() as tmp: # programs that never end: killed, by the part's time or by their own
        os.makedirs(tmp + "/tests")
        for name in ("tests/simt_test_a", "tests/simt_test_b"):
            with open(os.path.join(tmp, name), "w", encoding="utf-8") as f:
                f.write("#!/usr/bin/env python3\nimport signal\nprint('3 passed, 0 failed', flush=True)\nsignal.pause()\n")
            os.chmod(os.path.join(tmp, name), 0o755)
        hung = m.Programs(tmp, True)
        expect([r.get("cut") for r in m.run_tests(hung, ["a", "b"], time.time() + 1, False)[0]] == [True, True], "tests that hang: cut")
        m.TEST_S = 1
        got = m.run_tests(hung, ["a"], time.time() + 100, False)[0]
        expect(not got[0]["ok"] and got[0]["status"] == 124, f"a test that hangs: {got}")
    rc, out, r = run(BUILD, "--minutes", "0.2")
    expect(rc == 0 and r["complete"] and r["cut"] and "cut for time: " in out and f"{len(r['cut'])} cut" in out, f"a fifth of a minute: {rc}, {out[-800:]}")


test_list()
test_built()
test_cut()
test_parts()
test_sh()
test_driver()
test_codes()
test_kernels()
test_all()
test_failures()
test_ended()
print("\n".join(bad) if bad else "1 passed, 0 failed")
sys.exit(1 if bad else 0)
