#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernels/*.cu with nvcc and holds the compiler's figures against the limits noted beside each kernel.

A kernel is preceded by one line of the form
    // limits: regs 64, spill 0, smem 4096
(registers per thread, bytes spilled, bytes of static shared memory), valid for all its instantiations. Results are cached by
the content of the file, of what it includes, the flags and the compiler; only files that changed are compiled.

    test_compile.py [--nvcc PATH] [--cache DIR] [--arch sm_90a ...] [--table] [file.cu ...]
"""
import argparse
import concurrent.futures
import glob
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LIMITS = re.compile(r"//\s*limits: regs (\d+), spill (\d+), smem (\d+)\s*$")
KERNEL = re.compile(r"__global__\s+(?:void\s+)?(?:__launch_bounds__\s*\((?:[^()]|\([^()]*\))*\)\s*)?(?:void\s+)?(\w+)\s*\(")
INCLUDE = re.compile(r'^\s*#\s*include\s*"([^"]+)"', re.M)


def nvcc_flags():
    """The flags of deploy/cmake/cuda.cmake, so that what is checked is what is built."""
    with open(os.path.join(ROOT, "deploy/cmake/cuda.cmake"), encoding="utf-8") as f:
        words = re.search(r"set\(TD_NVCC_FLAGS ([^)]*)\)", f.read()).group(1).split()
    return [w.replace("${CMAKE_SOURCE_DIR}", ".") for w in words]


def closure(path, seen=None):
    """The file and everything it includes from the root, in a fixed order."""
    seen = {} if seen is None else seen
    if path in seen or not os.path.isfile(os.path.join(ROOT, path)):
        return seen
    with open(os.path.join(ROOT, path), encoding="utf-8") as f:
        seen[path] = f.read()
    for inc in INCLUDE.findall(seen[path]):
        closure(inc, seen)
    return seen


# What ptxas says of a kernel that runs otherwise than it is written, as a remark and not a warning: products of wgmma one at a
# time, registers that setmaxnreg did not move.
LOST = re.compile(r"^.*(?:Potential Performance Loss|setmaxnreg.* ignored).*$", re.M)


def kernels_of(texts):
    """name -> limits or None, of the kernels defined in the texts. The limits line stands before the kernel, with at most the
    kernel's template line and other comments between."""
    out = {}
    for text in texts:
        for m in KERNEL.finditer(text):
            limits = None
            for line in reversed(text[:m.start()].split("\n")[-8:]):
                if (found := LIMITS.search(line)):
                    limits = tuple(int(x) for x in found.groups())
                    break
                if line.strip() in ("}", "};") or line.rstrip().endswith(("}", ");")):
                    break
            out[m.group(1)] = limits
    return out


def figures_of(log):
    """One entry per compiled kernel: mangled name, registers, spilled bytes, static shared bytes, stack."""
    out, entry = [], None
    for line in log.split("\n"):
        if (m := re.search(r"Compiling entry function '(\w+)' for '(\w+)'", line)):
            entry = {"entry": m.group(1), "arch": m.group(2), "regs": 0, "spill": 0, "smem": 0, "stack": 0}
            out.append(entry)
        elif entry and (m := re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", line)):
            entry["stack"], entry["spill"] = int(m.group(1)), int(m.group(2)) + int(m.group(3))
        elif entry and (m := re.search(r"Used (\d+) registers", line)):
            entry["regs"] = int(m.group(1))
            smem = re.search(r"(\d+) bytes smem", line)
            entry["smem"] = int(smem.group(1)) if smem else 0
            entry = None
    lost = LOST.search(log)
    if lost and out:
        out[0]["lost"] = lost.group(0).strip()
    return out


def name_of(entry, kernels):
    """The kernel of a mangled name: its length-prefixed identifier; the longest if several fit."""
    fits = [k for k in kernels if f"{len(k)}{k}" in entry]
    return max(fits, key=len) if fits else None


def judge(path, kernels, figures):
    bad = []
    for name, limits in kernels.items():
        if limits is None:
            bad.append(f"{path}: kernel {name} has no limits line")
    for f in figures:
        name = name_of(f["entry"], kernels)
        if name is None:
            bad.append(f"{path}: kernel {f['entry']} is not found in the text")
            continue
        if "lost" in f:
            bad.append(f"{path} ({f['arch']}): {f['lost']}")
        for what, limit in zip(("regs", "spill", "smem"), kernels[name] or ()):
            if f[what] > limit:
                bad.append(f"{path}: {name} ({f['arch']}): {what} {f[what]}, limit {limit} ({f['entry'][:80]})")
    return bad


def compile_file(nvcc, version, cache, path, arch):
    """(figures, error text). The cache holds the figures of successful compilations only."""
    flags = nvcc_flags()
    texts = closure(path)
    key = hashlib.sha256(json.dumps([LOST.pattern, version, flags, arch, texts], sort_keys=True).encode()).hexdigest()[:32]
    kept = os.path.join(cache, f"{os.path.basename(path)}.{arch}.{key}.json")
    if os.path.exists(kept):
        with open(kept, encoding="utf-8") as f:
            return json.load(f), None
    target = arch.replace("sm_", "compute_")
    code = f"-gencode=arch={target},code={target if arch.startswith('compute_') else arch}"
    with tempfile.TemporaryDirectory() as tmp:
        r = subprocess.run([nvcc, *flags, code, "-Werror=all-warnings", "-Xptxas=-v", "-c", path, "-o", os.path.join(tmp, "x.o")],
                           cwd=ROOT, capture_output=True, text=True)
    if r.returncode:
        return [], f"{path} ({arch}): nvcc failed\n" + "\n".join((r.stdout + r.stderr).split("\n")[:30])
    figures = figures_of(r.stdout + r.stderr)
    os.makedirs(cache, exist_ok=True)
    with open(kept + ".new", "w", encoding="utf-8") as f:
        json.dump(figures, f)
    os.replace(kept + ".new", kept)
    return figures, None


def not_estimated(names, readme):
    """Kernels of which no line of a table says what they could reach at best."""
    lines = [line for line in readme.split("\n") if line.startswith("|") and ("not measured" in line or re.search(r"\d\s*\|$", line))]
    return [f"kernels/README.md: no estimate for {n}" for n in sorted(names) if not any(f"`{n}`" in line for line in lines)]


def self_test():
    """The judge must see each kind of excess, a kernel without limits and one that the text does not have."""
    text = ("// limits: regs 40, spill 0, smem 100\ntemplate <int D>\nstatic __global__ void __launch_bounds__(128, (D > 1 ? 2 : 1)) "
            "alpha(int *p)\n{\n}\n\nstatic __global__ void beta(int *p)\n{\n}\n")
    kernels = kernels_of([text])
    assert kernels == {"alpha": (40, 0, 100), "beta": None}, kernels
    log = ("ptxas info    : Compiling entry function '_ZN1x5alphaILi1EEEvPi' for 'sm_90a'\n"
           "    8 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads\n"
           "ptxas info    : Used 41 registers, used 1 barriers, 101 bytes smem, 400 bytes cmem[0]\n"
           "ptxas info    : Compiling entry function '_Z5gammaPi' for 'sm_90a'\nptxas info    : Used 4 registers\n"
           "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x\n")
    bad = judge("x.cu", kernels, figures_of(log))
    for want in ("beta has no limits", "regs 41, limit 40", "spill 12, limit 0", "smem 101, limit 100", "_Z5gammaPi is not found", "are serialized"):
        assert sum(want in b for b in bad) == 1, (want, bad)
    assert len(bad) == 6, bad
    assert not_estimated(["a", "b"], "`b`\n| x `a` | 5 us | not measured |") == ["kernels/README.md: no estimate for b"]


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--nvcc", default=shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc")
    p.add_argument("--cache", default=os.path.join(ROOT, "build/nvcc-cache"))
    p.add_argument("--arch", nargs="+", default=["sm_90a"])
    p.add_argument("--table", action="store_true", help="print the figures of every kernel")
    p.add_argument("files", nargs="*")
    a = p.parse_args()
    self_test()
    files = a.files or sorted(os.path.relpath(f, ROOT) for f in glob.glob(os.path.join(ROOT, "kernels/*.cu")))
    with open(os.path.join(ROOT, "kernels/README.md"), encoding="utf-8") as f:
        missing = not_estimated({k for path in files for k in kernels_of(closure(path).values())}, f.read())
    if missing:
        print("\n".join(missing))
        return 1
    if not os.path.exists(a.nvcc):
        print("SKIP: no nvcc")
        return 77
    version = subprocess.run([a.nvcc, "--version"], capture_output=True, text=True).stdout.split("\n")[-2:]
    jobs = [(f, arch) for f in files for arch in a.arch if not f.endswith("_sm90a.cu") or arch in ("sm_90a", "compute_90a")]
    bad, n = [], 0
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda j: compile_file(a.nvcc, version, a.cache, *j), jobs)
        for (path, arch), (figures, error) in zip(jobs, results):
            kernels = kernels_of(closure(path).values())
            bad += [error] if error else judge(path, kernels, figures)
            n += len(figures)
            for f in figures if a.table else ():
                print(f"{os.path.basename(path):24} {f['arch']:7} {name_of(f['entry'], kernels) or '?':28} regs {f['regs']:3} "
                      f"spill {f['spill']:3} smem {f['smem']:6} stack {f['stack']:4}")
    print("\n".join(bad) if bad else f"{len(jobs)} compilations, {n} kernels within their limits")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
