# SPDX-License-Identifier: Apache-2.0
"""What is checked of a program once it is built for a device: that it needs the C library and CUDA alone, so that it runs on a bare
GPU machine, and that every file of kernels is in it as machine code of the targets, so that nothing is compiled at start."""
import re
import struct

from gpu_sh import sh

LIBC = ("libc", "libm", "libpthread", "libdl", "librt", "ld-linux-x86-64", "libcublasLt", "libgcc_s")
MAGIC = struct.pack("<I", 0xBA55ED50) # of a fat binary: a head, then entries of one kind (1: PTX, 2: machine code) and target each
HOPPER_FILES = 2 # kernels/*_sm90a.cu: for that target alone


def needed(path):
    """Names of the shared libraries that it asks for; none where there is no readelf."""
    rc, out = sh(["readelf", "-d", path], 30)
    return re.findall(r"\(NEEDED\).*\[(.*?)\]", out) if rc == 0 else []


def foreign(names):
    return [n for n in names if n.split(".so")[0] not in LIBC]


def code_of(data):
    """Of each fat binary in a file the targets of its machine code, as numbers (90a: 90)."""
    out, at = [], 0
    while (at := data.find(MAGIC, at)) >= 0:
        _, _, head, size = struct.unpack_from("<IHHQ", data, at)
        p, end, found = at + head, min(at + head + size, len(data) - 32), set()
        while p < end:
            kind, _, h, n, _, _, _, _, arch = struct.unpack_from("<HHIQIIHHI", data, p)
            if h + n == 0:
                break
            found |= {arch} if kind == 2 else set()
            p += h + n
        if found:
            out.append(found)
        at += 4
    return out


def without_code(found, archs):
    """What lacks machine code, as one text or ""."""
    want = {int(re.match(r"\d+", a).group(0)) for a in archs}
    less = [f for f in found if not want <= f]
    hopper = [f for f in less if f == {90}] if 90 in want else []
    less = [f for f in less if f not in hopper] + hopper[HOPPER_FILES:]
    return f"{len(less)} of {len(found)} files lack machine code of {sorted(want)}: {less[:3]}" if less or not found else ""


def problem(path, archs):
    """One text, or ""."""
    names = foreign(needed(path))
    if names:
        return f"{path} needs {', '.join(names)}: more than the C library and CUDA"
    with open(path, "rb") as f:
        text = without_code(code_of(f.read()), archs)
    return f"{path}: {text}" if text else ""
