# SPDX-License-Identifier: Apache-2.0
"""The shape of the tree: layers, include cycles, foreign headers in their place, what device files may hold, licence lines,
top-level entries, size.

check(root) returns one line per violation. main() first plants every kind of violation in a temporary tree and requires that
each is reported exactly once there (a lint that cannot fail proves nothing), then checks the real tree.
"""
import os
import re
import subprocess
import sys
import tempfile

TOP = {"CMakeLists.txt", "README.md", "LICENSE", "router", "worker", "common", "kernels", "proto", "deploy", "tests"}
MAX_TRACKED = 40 << 20
CODE = (".c", ".h", ".cu", ".cuh")
TEXT = CODE + (".py", ".sh", ".cmake", ".proto", "CMakeLists.txt")

# Who may include whom: (files, may include), first match decides. A prefix ending in "/" is a folder, else a file prefix.
# "common/." means common/ without its subfolders: td_base, which knows no wire. deploy/ and tests/ may include anything.
LAYERS = [
    (("proto/",), ("proto/",)),
    (("common/wire/",), ("common/", "proto/")),
    (("common/",), ("common/.", "proto/.")),
    (("kernels/",), ("kernels/", "common/.", "proto/.")),
    (("worker/ship/", "worker/control", "worker/main", "worker/mirror", "worker/rank_ship", "worker/beat"), ("worker/", "kernels/", "common/", "proto/")),
    (("worker/",), ("worker/.", "worker/model/", "worker/coll/", "kernels/", "common/.", "proto/.")),
    (("router/text/",), ("router/text/", "common/.", "proto/.")),
    (("router/net/",), ("router/net/", "common/.", "proto/.")),
    (("router/",), ("router/", "common/", "proto/")),
    (("deploy/", "tests/"), ("router/", "worker/", "kernels/", "common/", "proto/", "deploy/", "tests/")),
]
# Foreign headers and the only places for them.
FOREIGN = [
    (r"zmq(_utils)?\.h", ("common/wire/",)),
    (r"sodium(/.*)?\.h", ("common/wire/",)),
    (r"(inference|health)\.pb-c\.h|protobuf-c/.*", ("common/wire/", "router/api/")),
    (r".*\.pb-c\.h", ("common/wire/",)),
    (r"(mpi|nccl)\.h", ("worker/coll/", "tests/bench/bench_coll")),
    (r"(cuda|cublas|cublasLt|curand|mma|cooperative_groups|nv).*", ("kernels/",)),
    (r"(nghttp2|event2|openssl)/.*", ("router/net/",)),
    (r"(pcre2|utf8proc)\.h", ("router/text/",)),
    (r"curl/.*", ("deploy/cli/",)),
]
LIBC = set("""aio assert byteswap complex cpuid ctype dirent dlfcn elf endian errno err execinfo fcntl fenv float fnmatch ftw getopt
glob grp immintrin inttypes iso646 langinfo libgen limits link locale malloc math mntent monetary netdb nl_types numa poll pthread pwd
regex sched search semaphore setjmp signal spawn stdalign stdarg stdatomic stdbool stddef stdint stdio stdlib stdnoreturn
string strings syslog tgmath threads time uchar unistd wchar wctype wordexp x86intrin nmmintrin arm_neon arm_acle""".split())
LINUX = ("sys/", "linux/", "net/", "netinet/", "arpa/", "asm/")
SANITIZER = ("sanitizer/",)
INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*([<"])([^>"]+)[>"]', re.M)
# Two halves each, so that this file does not contain what it looks for.
UNFINISHED = re.compile(r"\b(" + "TO" + "DO|FIX" + "ME)\\b")


def git(root, *args):
    try:
        r = subprocess.run(["git", "-C", root, *args], capture_output=True)
    except FileNotFoundError:
        return None
    return r.stdout.decode(errors="surrogateescape") if r.returncode == 0 else None


def files_of(root):
    """Tracked files and untracked ones that are not ignored; without git, everything outside build/."""
    out = git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if out is not None:
        return sorted(f for f in set(out.split("\0")) if f and os.path.isfile(os.path.join(root, f)))
    found = []
    for d, dirs, names in os.walk(root):
        dirs[:] = [x for x in dirs if x not in ("build", "__pycache__", ".git")]
        found += [os.path.relpath(os.path.join(d, n), root) for n in names]
    return sorted(found)


def tracked_bytes(root):
    out = git(root, "ls-files", "-z") or ""
    return sum(os.path.getsize(p) for f in out.split("\0") if f and os.path.isfile(p := os.path.join(root, f)))


def matches(path, prefix):
    if prefix.endswith("/."):
        folder = prefix[:-1]
        return path.startswith(folder) and "/" not in path[len(folder):]
    return path.startswith(prefix)


def check_project_include(path, target):
    for who, may in LAYERS:
        if any(matches(path, w) for w in who):
            ok = any(matches(target, m) for m in may)
            return [] if ok else [f"{path}: includes {target} against the layers"]
    return [f"{path}: code outside the layers"]


def check_foreign_include(path, header):
    if path.startswith("tests/"):
        return []
    for pattern, places in FOREIGN:
        if re.fullmatch(pattern, header):
            ok = any(path.startswith(p) for p in places)
            return [] if ok else [f"{path}: foreign header {header} belongs in {', '.join(places)}"]
    if header[:-2] in LIBC or header.startswith(LINUX + SANITIZER):
        return []
    return [f"{path}: unknown foreign header {header}"]


def find_cycles(graph):
    """Each strongly tied pair of headers is reported once, at the edge that closes the cycle."""
    state, bad = {}, []

    def visit(node, trail):
        state[node] = 1
        for nxt in graph.get(node, ()):
            if state.get(nxt) == 1:
                bad.append("include cycle: " + " -> ".join(trail[trail.index(nxt):] + [nxt]))
            elif nxt not in state:
                visit(nxt, trail + [nxt])
        state[node] = 2

    for n in sorted(graph):
        if n not in state:
            visit(n, [n])
    return bad


def check_code(root, path, text, known, graph):
    bad = []
    if "SPDX-License-Identifier:" not in "\n".join(text.split("\n")[:40]):
        bad.append(f"{path}: no SPDX line")
    for quote, target in INCLUDE.findall(text):
        if quote == "<" or target.endswith(".pb-c.h"):
            bad += check_foreign_include(path, target)
        elif target in known or os.path.isfile(os.path.join(root, target)):
            graph.setdefault(path, []).append(target)
            bad += check_project_include(path, target)
        else:
            bad.append(f"{path}: include \"{target}\" is not a path from the root")
    return bad


def check_device(path, text):
    """What the shim needs of a .cu file: PTX behind a name that has an emulation (headers), kernels of the file's own, launches
    by td_launch."""
    code = re.sub(r"//[^\n]*|/\*.*?\*/", "", text, flags=re.S)
    bad = []
    if re.search(r"\basm\b", code):
        bad.append(f"{path}: PTX outside the wrappers of td_cuda.h and sm90a.h")
    if len(re.findall(r"\b__global__\b", code)) != len(re.findall(r"\bstatic __global__\b", code)):
        bad.append(f"{path}: a kernel that is not static __global__")
    if "<<<" in code:
        bad.append(f"{path}: a launch not by td_launch")
    return bad


def check(root):
    files = files_of(root)
    known, graph, bad = set(files), {}, []
    for top in sorted({f.split("/")[0] for f in files}):
        if top not in TOP and not top.startswith("."):
            bad.append(f"{top}: not an allowed top-level entry")
    if tracked_bytes(root) > MAX_TRACKED:
        bad.append(f"tracked files are larger than {MAX_TRACKED >> 20} MiB")
    for path in files:
        if not path.endswith(TEXT):
            continue
        with open(os.path.join(root, path), encoding="utf-8", errors="replace") as f:
            text = f.read()
        m = UNFINISHED.search(text)
        if m:
            bad.append(f"{path}:{text.count(chr(10), 0, m.start()) + 1}: the word {m.group()}")
        if path.endswith(CODE):
            bad += check_code(root, path, text, known, graph)
        if path.startswith("kernels/") and path.endswith(".cu"):
            bad += check_device(path, text)
    return bad + find_cycles(graph)


# ---- self-test ----

SPDX = "// SPDX-License-Identifier: Apache-2.0\n"
CLEAN = {
    "CMakeLists.txt": "", "README.md": "", ".gitignore": "/build/\n", "build/x.c": '#include "nowhere.h"\n',
    "common/a.h": SPDX + "#include <stdint.h>\n#include <sys/types.h>\n",
    "common/wire/w.c": SPDX + '#include "common/a.h"\n#include <zmq.h>\n#include <sodium.h>\n#include "control.pb-c.h"\n',
    "common/wire/w.h": SPDX, "proto/kvframe.h": SPDX,
    "kernels/k.h": SPDX + '#include "common/a.h"\n',
    "kernels/k_cuda.cu": SPDX + '#include <cuda_runtime.h>\n#include "kernels/k.h"\n// asm, <<<\nstatic __global__ void k() {}\n',
    "worker/e.h": SPDX + '#include "kernels/k.h"\n#include "proto/kvframe.h"\n',
    "worker/ship/s.c": SPDX + '#include "worker/e.h"\n#include "common/wire/w.h"\n',
    "worker/coll/m.c": SPDX + "#include <mpi.h>\n",
    "router/core/c.h": SPDX + '#include "common/wire/w.h"\n#include "router/text/t.h"\n',
    "router/text/t.h": SPDX + '#include "common/a.h"\n#include <pcre2.h>\n',
    "router/net/n.c": SPDX + "#include <event2/event.h>\n#include <openssl/ssl.h>\n#include <nghttp2/nghttp2.h>\n",
    "router/api/g.c": SPDX + '#include "inference.pb-c.h"\n#include <protobuf-c/protobuf-c.h>\n',
    "deploy/cli/x.c": SPDX + '#include <curl/curl.h>\n#include "worker/e.h"\n#include "router/text/t.h"\n',
    "tests/x.c": SPDX + '#include <zmq.h>\n#include "router/core/c.h"\n#include "worker/e.h"\n',
}
# name -> (files to add or replace, text that exactly one reported line must contain)
PLANTED = {
    "router includes worker": ({"router/core/v.c": SPDX + '#include "worker/e.h"\n'}, "against the layers"),
    "worker includes router": ({"worker/v.c": SPDX + '#include "router/text/t.h"\n'}, "against the layers"),
    "kernels include worker": ({"kernels/v.c": SPDX + '#include "worker/e.h"\n'}, "against the layers"),
    "common includes kernels": ({"common/v.c": SPDX + '#include "kernels/k.h"\n'}, "against the layers"),
    "base includes wire": ({"common/v.c": SPDX + '#include "common/wire/w.h"\n'}, "against the layers"),
    "engine includes wire": ({"worker/v.c": SPDX + '#include "common/wire/w.h"\n'}, "against the layers"),
    "engine includes ship": ({"worker/v.c": SPDX + '#include "worker/ship/s.c"\n'}, "against the layers"),
    "text includes core": ({"router/text/v.c": SPDX + '#include "router/core/c.h"\n'}, "against the layers"),
    "net includes text": ({"router/net/v.c": SPDX + '# include "router/text/t.h"\n'}, "against the layers"),
    "proto includes common": ({"proto/v.h": SPDX + '#include "common/a.h"\n'}, "against the layers"),
    "cycle": ({"common/p.h": SPDX + '#include "common/q.h"\n', "common/q.h": SPDX + '#include "common/r.h"\n',
               "common/r.h": SPDX + '#include "common/p.h"\n'}, "include cycle"),
    "include of itself": ({"common/p.h": SPDX + '#include "common/p.h"\n'}, "include cycle"),
    "relative include": ({"common/v.c": SPDX + '#include "a.h"\n'}, "not a path from the root"),
    "unknown header": ({"common/v.c": SPDX + "#include <xxhash.h>\n"}, "unknown foreign header"),
    "no licence": ({"common/v.h": "int x;\n"}, "no SPDX line"),
    "unfinished": ({"common/v.c": SPDX + "// TO" + "DO later\n"}, "v.c:2: the word"),
    "unfinished script": ({"deploy/v.sh": "# FIX" + "ME\n"}, "v.sh:1: the word"),
    "top level": ({"scripts/v.py": ""}, "not an allowed top-level entry"),
    "top-level file": ({"notes.txt": ""}, "not an allowed top-level entry"),
    "PTX in a kernel": ({"kernels/v.cu": SPDX + 'void f() { asm volatile("bar.sync 0;"); }\n'}, "PTX outside the wrappers"),
    "a kernel for others": ({"kernels/v.cu": SPDX + "__global__ void k() {}\n"}, "not static __global__"),
    "chevrons": ({"kernels/v.cu": SPDX + "void f() { k<<<1, 32>>>(); }\n"}, "a launch not by td_launch"),
    "size": ({"tests/big.bin": "\0" * (MAX_TRACKED + 1)}, "larger than 40 MiB"),
}
for header, place in (("zmq.h", "worker/ship/v.c"), ("sodium.h", "router/core/v.c"), ("mpi.h", "worker/v.c"), ("nccl.h", "kernels/v.c"),
                      ("cuda_runtime.h", "worker/v.c"), ("cublasLt.h", "worker/coll/v.c"), ("nghttp2/nghttp2.h", "router/core/v.c"),
                      ("event2/event.h", "router/core/v.c"), ("openssl/ssl.h", "common/wire/v.c"), ("pcre2.h", "common/v.c"),
                      ("utf8proc.h", "router/net/v.c"), ("curl/curl.h", "router/net/v.c"), ("control.pb-c.h", "router/api/v.c"),
                      ("inference.pb-c.h", "router/core/v.c"), ("protobuf-c/protobuf-c.h", "worker/v.c")):
    PLANTED[f"{header} in {place}"] = ({place: SPDX + f"#include <{header}>\n"}, "foreign header " + header)


def plant(root, files):
    for path, text in files.items():
        full = os.path.join(root, path)
        os.makedirs(os.path.dirname(full), exist_ok=True)
        with open(full, "w") as f:
            f.write(text)


def self_test():
    bad = []
    with tempfile.TemporaryDirectory() as d:
        plant(d, CLEAN)
        if git(d, "init", "-q") is None:
            return ["self-test: git init failed"]
        bad += [f"self-test: clean tree: {x}" for x in check(d)]
        for name, (files, want) in PLANTED.items():
            before = {p: CLEAN.get(p) for p in files}
            plant(d, files)
            git(d, "add", "-A")
            got = check(d)
            if len(got) != 1 or want not in got[0]:
                bad.append(f"self-test: {name}: wanted one line with '{want}', got {got}")
            for p, text in before.items():
                os.unlink(os.path.join(d, p)) if text is None else plant(d, {p: text})
            git(d, "add", "-A")
    return bad


def main():
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    bad = self_test()
    planted = len(PLANTED)
    print(f"{planted - len(bad)} of {planted} planted violations caught")
    bad += check(root)
    print("\n".join(bad) if bad else "the tree keeps its rules")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
