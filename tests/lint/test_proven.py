# SPDX-License-Identifier: Apache-2.0
"""kernels/proven_cuda.h against tests/gpu/results: a kernel for Hopper is in the list only with a recorded run on a
device of its kind, in which every case passed."""
import json
import os
import re
import sys
import tempfile

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
LINE = re.compile(r'^\s*X\(\s*(\w+)\s*,\s*"([^"]*)"\s*,\s*"([^"]*)"\s*\)\s*\\?$', re.M)
# What stands in the list, and the name that the test program gives it (tests/gpu/test_hopper.c), with its compute capability.
KERNELS = {"TD_CUDA_GEMM_SM90A": ("gemm_sm90a", "9.0"), "TD_CUDA_ATTN_SM90A": ("attn_sm90a", "9.0")}


def lines_of(text):
    body = text.split("#define TD_CUDA_PROVEN(X)", 1)[1].split("#endif")[0]
    found = LINE.findall(body)
    rest = LINE.sub("", body).replace("\\", "").strip()
    return found, [f"proven_cuda.h: not a line of the list: {rest[:80]}"] if rest else []


def problem(bit, name, file, results):
    if bit not in KERNELS or KERNELS[bit][0] != name:
        return f"{bit}: the name {name} is not its own"
    path = os.path.join(results, file)
    if os.path.basename(file) != file or not os.path.isfile(path):
        return f"{name}: no file {file} in tests/gpu/results"
    with open(path, encoding="utf-8") as f:
        report = json.load(f)
    if report.get("device", {}).get("compute_cap") != KERNELS[bit][1] or report.get("changed"):
        return f"{name}: {file} is of another device, or of a changed tree"
    runs = [k for k in report.get("kernels", []) if k.get("kernel") == name]
    if not runs or any(k["failed"] or not k["cases"] for k in runs):
        return f"{name}: {file} has no run of it without failures"
    return None


def check(text, results):
    found, bad = lines_of(text)
    return bad + [p for p in (problem(*line, results) for line in found) if p]


def self_test():
    head = "#define TD_CUDA_PROVEN(X) \\\n"
    good = {"device": {"compute_cap": "9.0"}, "changed": False, "kernels": [{"kernel": "gemm_sm90a", "cases": 3, "failed": 0}]}
    line = '    X(TD_CUDA_GEMM_SM90A, "gemm_sm90a", "%s")\n'
    with tempfile.TemporaryDirectory() as d:
        cases = {"good.json": good, "failed.json": {**good, "kernels": [{"kernel": "gemm_sm90a", "cases": 3, "failed": 1}]},
                 "none.json": {**good, "kernels": []}, "empty.json": {**good, "kernels": [{"kernel": "gemm_sm90a", "cases": 0, "failed": 0}]},
                 "other.json": {**good, "device": {"compute_cap": "8.0"}}, "changed.json": {**good, "changed": True}}
        for name, content in cases.items():
            with open(os.path.join(d, name), "w", encoding="utf-8") as f:
                json.dump(content, f)
        assert check("#define TD_CUDA_PROVEN(X)\n\n#endif", d) == []
        assert check(head + line % "good.json" + "#endif", d) == []
        for name in [*cases, "absent.json", "../x/good.json"]:
            assert (len(check(head + line % name + "#endif", d)) == 1) == (name != "good.json"), name
        assert len(check(head + '    X(TD_CUDA_ATTN_SM90A, "gemm_sm90a", "good.json")\n#endif', d)) == 1
        assert len(check(head + "    Y(1)\n#endif", d)) == 1


def main():
    self_test()
    with open(os.path.join(ROOT, "kernels/proven_cuda.h"), encoding="utf-8") as f:
        bad = check(f.read(), os.path.join(ROOT, "tests/gpu/results"))
    print("\n".join(bad) if bad else "the list of proven kernels is true")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
