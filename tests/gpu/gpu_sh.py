# SPDX-License-Identifier: Apache-2.0
"""Running a program, for tests/gpu/run and its parts."""
import os
import subprocess

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def sh(args, timeout=None, **kw):
    """(status, output); 124: out of time, 127: not there."""
    try:
        r = subprocess.run(args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
                           errors="replace", **kw)
        return r.returncode, r.stdout
    except subprocess.TimeoutExpired as e:
        out = e.stdout or ""
        return 124, out if isinstance(out, str) else out.decode(errors="replace")
    except FileNotFoundError as e:
        return 127, str(e)
